"""Training data: prepared into a token cache by a process of its own, memory-mapped by the trainer.

Names load on first use: the preparing process and the command line need no torch.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "BatchPlan": "batches",
    "DataError": "errors",
    "Example": "cache",
    "TokenDataset": "cache",
    "collate": "collation",
    "pack": "packing",
    "prepare": "preparation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'finetune.data' has no attribute {name!r}")
    return getattr(import_module(f"finetune.data.{_HOME[name]}"), name)
