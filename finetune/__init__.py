"""Fine-tune models that are larger than memory: `from finetune import Trainer, Config`."""

from __future__ import annotations

import os.path

__all__ = ["Config", "Sweep", "Trainer", "__version__"]
__version__ = "0.1.0"

# "Where packages are" in docs/architecture.md: installed, `finetune.offload` and `finetune.memory` are folders of this
# one; in a checkout they are beside it, in the root of the repository.
if not os.path.isdir(os.path.join(__path__[0], "memory")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str):
    # Loaded on first use: `finetune --help` must not wait for torch.
    if name == "Trainer":
        from finetune.trainer import Trainer

        return Trainer
    if name == "Sweep":
        from finetune.sweep import Sweep

        return Sweep
    if name == "Config":
        from finetune.config import Config

        return Config
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
