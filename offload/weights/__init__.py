"""The weights' room meets Transformers and PEFT first, and without the parts that a streamed run never uses."""

from finetune.memory.lean_imports import lean_imports

with lean_imports():
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
    import transformers.optimization  # noqa: F401
