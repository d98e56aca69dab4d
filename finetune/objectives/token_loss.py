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
from finetune.data.cache import trained_tokens
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.objectives.base import Objective, scored_shape
from finetune.objectives.router_loss import RouterLoss
from finetune.offload.perturb.variants import Variant
from finetune.offload.step.head import TiledHead
from finetune.offload.step.loss_form import LossForm, StepForm
from finetune.offload.step.own_loss import StepLoss, models_own_loss
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


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
        self._form = _form(config, session, data)

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        shape = replace(super().full_shape(config, session, longest), can_wait=True)
        routers = RouterLoss(config.training, session.parts.model).kept_bytes(shape)
        routers += _of_adapter(session, shape)
        return shape.keeping(routers + _form_bytes(_form(config, session, None).form, session, shape))

    def shape(self, session: Session) -> BatchShape:
        packing = self._config.dataset.sequence_length if self._config.dataset.packing else None
        shape = replace(scored_shape(self._config, packing or int(self.lengths.max())), can_wait=True)
        reading = 0
        if isinstance(self._data, TensorRows):
            samples = min(shape.inputs["input_ids"].shape[0], len(self._data))
            shape = replace(shape, inputs=self._data.largest(samples), samples=samples, packed=False)
            reading = self._data.reading_bytes(samples)
        more = reading + self._routers.kept_bytes(shape) + _of_adapter(session, shape)
        return shape.keeping(more + _form_bytes(self._form.form, session, shape))

    def lanes(self, groups: Sequence[Sequence[Row]], device: torch.device) -> MicroBatches:
        batches = make_micro_batches(self._data, groups, device)
        if self._config.training.loss_average == "sequence":
            self._weigh_sequences(groups)
        return replace(batches, inputs=[kwargs | self._routers.inputs for kwargs in batches.inputs])

    def make_loss(self, model: nn.Module, head: TiledHead | None) -> StepLoss:
        return self._routers.make(model, models_own_loss(model, head, self._form))

    def _weigh_sequences(self, groups: Sequence[Sequence[Row]]) -> None:
        """Each label counts as its share of its text's, each text that has one as its share of the step's."""
        counts = [[trained_tokens(self._data[index].labels) for row in rows for index in row] for rows in groups]
        self._form.weights = [
            torch.tensor([1 / count for count in lane for _ in range(count)], dtype=torch.float32) for lane in counts
        ]
        self._form.divisor = max(1, sum(count > 0 for lane in counts for count in lane))

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        batches = self.lanes(groups, model.device.torch_device)
        with model.weights.under(variants):
            found = model.step_losses(batches.inputs, batches.labels, len(variants))
        return found.losses.numpy(), batches.tokens


def _form(config: Config, session: Session, data: TokenDataset | TensorRows | None) -> StepForm:
    """Raises UserError for a model or data whose loss has no such form."""
    options = config.training
    form = StepForm(LossForm(options.label_smoothing_factor, options.z_loss))
    averages = options.loss_average == "sequence"
    if session.parts.head is None and (averages or not form.form.is_plain):
        raise UserError(
            f"training.label_smoothing_factor, training.z_loss, training.loss_average: expected their defaults, because "
            f"{type(session.parts.model).__name__} computes its loss itself, over whole logits"
        )
    if averages and isinstance(data, TensorRows):
        raise UserError("training.loss_average: expected token with rows of tensors, found sequence")
    return form


def _form_bytes(form: LossForm, session: Session, shape: BatchShape) -> int:
    """What the form takes beside the cross entropy: tiles of logits, and of a head in chunks sums of each row."""
    head = session.parts.head
    if form.is_plain or head is None:
        return 0
    rows = shape.micro_batches * shape.rows
    sums = 4 * rows * (head.module.weight.shape[1] + 2) if form.smoothing and len(head.layouts) > 1 else 0
    return 4 * form.tiles * min(head.tile_tokens, shape.rows) * head.tile_vocab + sums


def _of_adapter(session: Session, shape: BatchShape) -> int:
    """Bytes that the adapter's own loss keeps of a step."""
    return session.adapter.kept_bytes(shape.micro_batches * shape.rows) if shape.train else 0
