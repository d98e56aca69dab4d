"""loss: the cross entropy of the trained tokens, by the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from finetune.config import Config
from finetune.data import TokenDataset
from finetune.data.batches import Row
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.data.tensor_rows import TensorRows
from finetune.objectives.base import Objective, scored_shape
from finetune.objectives.router_loss import RouterLoss
from finetune.planned_run import BatchShape
from finetune.session import Session
from offload.perturb.variants import Variant
from offload.step.head import TiledHead
from offload.step.own_loss import StepLoss
from offload.streamed_model import StreamedModel


class TokenLoss(Objective):
    """The loss of the model's own forward: mean cross entropy of the trained tokens, and what a model adds to it (losses of
    routers, as `training.router_loss` says).

    Others with a gradient differ in `lanes` or `make_loss`: their values are had in the same way.
    """

    has_gradient = True
    takes_tensors = True

    def __init__(self, config: Config, session: Session, data: TokenDataset | TensorRows) -> None:
        self._config = config
        self._data = data
        self.lengths = np.asarray(data.lengths)
        self._routers = RouterLoss(config.training, session.parts.model)

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        shape = replace(super().full_shape(config, session, longest), can_wait=True)
        return shape.keeping(RouterLoss(config.training, session.parts.model).kept_bytes(shape))

    def shape(self, session: Session) -> BatchShape:
        packing = self._config.dataset.sequence_length if self._config.dataset.packing else None
        shape = replace(scored_shape(self._config, packing or int(self.lengths.max())), can_wait=True)
        if isinstance(self._data, TensorRows):
            longest = self._data.longest(shape.inputs["input_ids"].shape[0])
            shape = replace(shape, inputs=self._data.collate(longest), samples=len(longest), packed=False)
        return shape.keeping(self._routers.kept_bytes(shape))

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        batches = make_micro_batches(self._data, groups, device)
        return replace(batches, inputs=[kwargs | self._routers.inputs for kwargs in batches.inputs])

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        return self._routers.make(model, head)

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        batches = self.lanes(groups, model.device.torch_device)
        with model.weights.under(variants):
            found = model.step_losses(batches.inputs, batches.labels, len(variants))
        return found.losses.numpy(), batches.tokens
