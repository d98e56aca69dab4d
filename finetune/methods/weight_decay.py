"""Which parameters weight decay is for: not norms and biases, as in Transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from finetune.config.training_options import TrainingOptions

_LEFT_ALONE = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)")
"""The patterns of `transformers.Trainer.get_decay_parameter_names`, searched in lower case."""


def undecayed(model: nn.Module, names: Iterable[str], options: TrainingOptions) -> frozenset[str]:
    """Those of `names`, of parameters of `model`, that decay leaves alone: they, or a module around them, have a norm's or a
    bias's name, or are in an `nn.LayerNorm`. None where there is no decay, or where `options` wants it for all."""
    if not options.weight_decay or options.decay_norms_and_biases:
        return frozenset()
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return frozenset(name for name in names if _LEFT_ALONE.search(name.lower()) or name.startswith(norms))
