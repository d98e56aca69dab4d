"""Fine-tune models that are larger than memory: `from finetune import Trainer, Config`."""

from __future__ import annotations

__all__ = ["Config", "Sweep", "Trainer", "__version__"]
__version__ = "0.1.0"


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
