"""What a session does to the bare model before it runs: what it puts around it, and how its weights are streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.adapters.reference import WithReference
from finetune.adapters.saved import refuse_beside
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.needs_of_model import adapter_needs
from finetune.objectives.registry import trains_beside_reference
from finetune.offload.devices import Device
from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.sizing.needs import Streamed
from finetune.offload.step.weights import Weights
from finetune.offload.weights.frozen import FrozenWeights
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.streamed_parts import Room
from finetune.planned_run import BatchShape, MeasuredBatch, StoreSize

if TYPE_CHECKING:
    from finetune.session import Session


class Setup:
    """The base leaves the model as it is and measures it: evaluation, generation. A method trains it; what a run has left
    (`finetune.methods.results`) puts its adapter or its weights in place.

    A session calls `check_model`, `wrap`, `prepare`, `needs` as often as it plans, `open_weights`, `opened` and `close`, in
    this order.
    notes: what the user should know of it. has_gradients: whether steps compute them. variants: versions of the weights that a
    step computes. frozen: whether the model's own weights stay as they are stored. tuned: whether they are others than the
    checkpoint's. gradient_names: per block, local names of the model's own weights that get gradients. store: what those take
    of the disk. result_step: of a run whose result is put in place, the step that it is of; None: of none, or not known.
    only_plan: whether nothing will run, so that adapters need no values; a session says so.
    """

    has_gradients = False
    variants = 1
    frozen = True
    tuned = False
    gradient_names: Sequence[frozenset[str]] | None = None
    store: StoreSize | None = None
    result_step: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.notes: list[str] = []
        self.only_plan = False

    def check_model(self, directory: Path) -> None:
        """Before the model in `directory` is read. Raises UserError for one that cannot be taken."""
        refuse_beside(directory)

    def compute_dtype(self, device: Device, stored: torch.dtype) -> torch.dtype:
        """For a checkpoint stored so, see `choose_dtype`."""
        return choose_dtype(self.config.engine.dtype, device, self.has_gradients, stored)

    def cut_options(self) -> dict[str, Any]:
        """For `finetune.offload.weights.parts.cut`."""
        return {"streams_experts": True}

    def wrap(self, parts: ModelParts) -> tuple[nn.Module, ModelParts]:
        """What is to be called in place of `parts.model`, and the parts with their bytes where they are to be read."""
        return parts.model, parts

    def prepare(self, session: Session) -> None:
        """The session knows its model and parts. Raises UserError for what cannot be done with them."""

    def needs(self, session: Session, batch: MeasuredBatch, streamed: Streamed) -> tuple[Needs, Streamed]:
        """What it asks of memory and disk beside the batch, and what goes through slots then. streamed: without it."""
        return adapter_needs(session), streamed

    def uses_of_weights(self, parts: ModelParts, shape: BatchShape) -> int:
        """How often a visit of a block multiplies by the same weights, where they are decoded for it."""
        return shape.lanes + shape.micro_batches * shape.train  # recomputed, and for the gradient

    def weight_seconds(self, session: Session, device: Device) -> float:
        """What a step on `device` adds to compute for every weight that it updates, or of which it makes variants: measured
        here, or from a described device's rates."""
        return 0.0

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """training: whether a step comes next, rather than a measurement."""
        model.eval()

    def open_weights(self, session: Session) -> Callable[[Room], Weights]:
        """How the weights of the open model are to be had."""
        return WithReference if trains_beside_reference(self.config) else FrozenWeights

    def check_reference(self, session: Session) -> None:
        """Raises UserError where the model without its adapter cannot be had beside the one with it, see `WithReference`."""
        peft_config = getattr(session.model, "active_peft_config", None)
        if self.tuned:
            raise _no_reference(self.config.objective, "one whose own weights were tuned")
        if peft_config is not None and (peft_config.is_prompt_learning or peft_config.is_adaption_prompt):
            raise _no_reference(self.config.objective, "one with a prefix or prompt")

    def opened(self, session: Session) -> None:
        """The model is open, for the first time."""

    def own_tensors(self) -> list[TensorEntry]:
        """Stored tensors that it brings beside the checkpoint's."""
        return []

    def close(self) -> None:
        """Gives up files and locks; also after an error, and more than once."""


def _no_reference(objective: str, found: str) -> UserError:
    return UserError(
        f"training.objective {objective}: expected the model as it is, or one with an adapter that can be switched off for the "
        f"reference, found {found}"
    )


def choose_dtype(word: str, device: Device, has_gradients: bool, stored: torch.dtype) -> torch.dtype:
    """word: `engine.dtype`; `auto`: as stored, but fp32 where this CPU has no hardware for the stored dtype, and bf16 (on a CPU
    fp32) in place of fp16 where gradients are computed, which are not scaled: small ones would be 0 in fp16.

    Raises UserError for fp16 with gradients.
    """
    if word == "float16" and has_gradients:
        raise UserError(
            "engine.dtype: expected bfloat16 or float32 with methods that have gradients, found float16, in which small "
            "gradients become 0: set engine.dtype to one of these, or leave it auto"
        )
    if word != "auto":
        return getattr(torch, word)
    if not device.multiplies(stored):
        return torch.float32
    if stored == torch.float16 and has_gradients:
        return torch.float32 if device.traits.computes_on_host else torch.bfloat16
    return stored
