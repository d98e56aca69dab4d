"""AdaLoRA (Zhang et al. 2023): PEFT's tuner has a loss of its own beside the model's, and after every update takes ranks away.

Its loss keeps its matrices orthogonal. It is of the adapter alone, so it counts once a step, before the first micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from finetune.adapters.tuners import Tuner

_KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANKS = "rank_pattern"


class AdaLora(Tuner):
    @property
    def gradients_rise(self) -> bool:
        return False  # those of its own loss come first

    def own_loss(self) -> torch.Tensor:
        tuner = self.model.base_model
        outputs = _with_loss(tuner, torch.zeros((), requires_grad=False))
        outputs.loss.backward()
        return outputs.loss.detach()

    def after_update(self, step: int) -> None:
        self.model.base_model.update_and_allocate(step)

    def state(self) -> dict[str, torch.Tensor]:
        kept = {f"{word}.{name}": value for word in _KEPT for name, value in getattr(self._allocator, word).items()}
        ranks = self._config.rank_pattern or {}
        return kept | {f"{_RANKS}.{name}": torch.tensor(mask) for name, mask in ranks.items()}

    @property
    def state_bytes(self) -> int:
        return 2 * len(_KEPT) * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)  # the old ones beside the new

    def set_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        ranks: dict[str, list[bool]] = {}
        for full, value in tensors.items():
            word, _, name = full.partition(".")
            if word in _KEPT:
                getattr(self._allocator, word)[name] = value
            elif word == _RANKS:
                ranks[name] = value.tolist()
        self._config.rank_pattern = ranks or None

    @property
    def _allocator(self) -> Any:
        return self.model.base_model.rankallocator

    @property
    def _config(self) -> Any:
        return self.model.active_peft_config


def _with_loss(tuner: Any, loss: torch.Tensor) -> SimpleNamespace:
    """What the tuner's forward makes of an output of its model with this loss: the model itself does not run."""
    model = tuner.model
    before = model.__dict__.pop("forward", None)
    model.forward = lambda: SimpleNamespace(loss=loss)
    try:
        return tuner.forward()
    finally:
        del model.forward
        if before is not None:
            model.forward = before
