"""Rows of data to the tensors of a step's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data import TokenDataset, collate
from finetune.data.batches import Row
from finetune.data.tensor_rows import TensorRows
from finetune.offload.step.engine import Versions


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """inputs: keyword arguments of the model's forward, one dict a micro-batch. labels: its `labels`, one a micro-batch; None
    where rows have none. tokens: of the step, without padding (samples, for data of tensors). versions: of the weights, that
    they meet; None: all meet the only one."""

    inputs: list[dict[str, Any]]
    labels: list[torch.Tensor | None]
    tokens: int
    versions: Versions | None = None


def make_micro_batches(
    data: TokenDataset | TensorRows, groups: Sequence[Sequence[Row]], device: torch.device
) -> MicroBatches:
    """groups: the rows of each micro-batch, as `BatchPlan.step` gives them."""
    inputs, labels, tokens = [], [], 0
    for rows in groups:
        if isinstance(data, TensorRows):
            batch = data.collate([index for row in rows for index in row])
            tokens += len(rows)
        else:
            examples = [[data[index] for index in row] for row in rows]
            tokens += sum(len(example.input_ids) for row in examples for example in row)
            batch = {**collate(examples, data.pad_token_id), "use_cache": False}
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        labels.append(batch.pop("labels", None))
        inputs.append(batch)
    return MicroBatches(inputs, labels, tokens)
