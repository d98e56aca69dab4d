"""Rows of examples to the tensors of one micro-batch."""

from __future__ import annotations

import torch

from finetune.data.cache import MASKED, Example


def collate(
    rows: list[list[Example]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """A micro-batch of B rows, padded on the right to the longest row's T tokens.

    input_ids       int64 [B, T]
    labels          int64 [B, T], not shifted; -100 at padding and at the first token of every example, which nothing
                    (or, in a packed row, another example) would predict: labels != -100 counts what the loss is over
    attention_mask  int64 [B, T], 1 for tokens: only where there is padding and no row is packed
    position_ids    int64 [B, T], from 0 in each example and in the padding: only where a row is packed (holds several
                    examples). There is no attention_mask then: Transformers takes each restart as the begin of a
                    sequence of its own and keeps attention within it (masking_utils.find_packed_sequence_indices)
    """
    length = max(sum(len(example.input_ids) for example in row) for row in rows)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), MASKED, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example.input_ids)
            input_ids[index, start:end] = torch.from_numpy(example.input_ids)
            labels[index, start + 1 : end] = torch.from_numpy(example.labels[1:])
            position_ids[index, start:end] = torch.arange(end - start)
            start = end
        attention_mask[index, :start] = 1
        position_ids[index, start:] = torch.arange(length - start)
    batch = {"input_ids": input_ids, "labels": labels}
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = position_ids
    elif not attention_mask.all():
        batch["attention_mask"] = attention_mask
    return batch
