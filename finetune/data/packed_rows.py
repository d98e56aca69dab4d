"""Whether a model keeps the texts of a packed row apart."""

from __future__ import annotations

import inspect
from math import isfinite

import numpy as np
import torch
from torch import nn

from finetune.data import Example, collate
from finetune.memory.errors import UserError
from finetune.offload.streamed_model import StreamedModel

TOKENS = (6, 4)  # of the two texts; the fewer the second has, the more of it a window of a convolution reaches
TOLERANCE = {torch.float32: 1e-4}  # relative error of a text's hidden states
TOLERANCE_16_BITS = 0.15  # rounding may send tokens to other experts


def check_positions_argument(model: nn.Module) -> None:
    """Raises UserError for a model that can't be told where a text begins."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise _refusal(model, "its forward takes no position_ids, which tell where a text begins")


def check_texts_stay_apart(streamed: StreamedModel, rows: int) -> None:
    """One pass over the weights: two texts in a row and each alone. Raises UserError unless the model says the same of both;
    layers that do more than attend (recurrence, convolutions) may carry one over into the other, and positions of their own
    may run on.

    rows: tokens that a micro-batch is planned for.
    """
    model = streamed.parts.model
    scale = min(1.0, rows / sum(TOKENS))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, vocab_size, max(1, int(count * scale))).astype(np.int32) for count in TOKENS]
    examples = [Example(ids, ids) for ids in texts]
    batches = [collate([row], 0) for row in (examples, examples[:1], examples[1:])]
    device = streamed.device.torch_device
    inputs = [
        {name: value.to(device) for name, value in batch.items() if name != "labels"} | {"use_cache": False}
        for batch in batches
    ]
    logits = [output.logits for output in streamed.forward(inputs)]
    states = [(one if isinstance(one, torch.Tensor) else one.hidden)[0].float() for one in logits]
    together, apart = states[0].split([len(ids) for ids in texts]), states[1:]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(together, apart, strict=True))
    if isfinite(error) and error > TOLERANCE.get(streamed.parts.dtype, TOLERANCE_16_BITS):
        raise _refusal(model, f"what it says of a text changes by {error:.1%} when another stands before it in the row")


def _refusal(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"dataset.packing: {type(model).__name__} does not keep the texts of a row apart ({why}): set it to false"
    )
