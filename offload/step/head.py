"""The language-model head: its tiles and chunks, and what is asked of logits that are never whole. See [Note: loss tiles] in
`offload.step.tiled_loss`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.step.deferred_logits import DeferredLogits, DeferredLoss
from offload.step.tiled_loss import TiledCrossEntropy, TokenScores, apply_operations, lane_losses

LOGITS_TILE_BYTES = 8 * 2**20  # fp32 logits of one tile
TRAINED_TILE_BYTES = 32 * 2**20  # where the head is trained: every tile adds to a gradient of the head's size
HEAD_CHUNK_BYTES = 32 * 2**20  # one chunk of the head, in the dtype that computes


def default_tiles(vocab_size: int, row_bytes: int, trained: bool = False) -> tuple[int, int]:
    """(tile_tokens, tile_vocab) for a head of `vocab_size` rows of `row_bytes` bytes each, in the dtype that computes."""
    tile_vocab = vocab_size
    if vocab_size * row_bytes > HEAD_CHUNK_BYTES:
        chunks = -(-vocab_size * row_bytes // HEAD_CHUNK_BYTES)
        tile_vocab = -(-vocab_size // chunks)
    tile_tokens = max(16, (TRAINED_TILE_BYTES if trained else LOGITS_TILE_BYTES) // (4 * tile_vocab) // 16 * 16)
    return tile_tokens, tile_vocab


@dataclass(slots=True)
class HeadChunk:
    """Rows [start, start + weight.shape[0]) of the head, while acquired, in the dtype that computes.

    weight: [rows, hidden]; bias: [rows] or None. A head of one chunk is bound to its module.
    """

    start: int
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, hidden] to [n, rows]."""
        return functional.linear(hidden, self.weight, self.bias)


class TiledHead:
    """Loss, scores of tokens and logits of a deferred head.

    module: the head (nn.Linear, or PEFT's wrapper of one). chunks: gives the head's chunks: between `acquire(i)` and
    `release(i)`, `enter(variant)` returns chunk i of that variant of the weights, bound to the module itself when there is
    only one chunk. `chunks.trained` says whether the head's own gradients are wanted: `add_gradients(i, ...)` takes those of
    chunk i, while it is acquired; those of a head of one chunk are left in `.grad`.
    """

    def __init__(self, module: nn.Module, chunks: Any, num_chunks: int, tile_tokens: int) -> None:
        self._forward = module.forward
        self._chunks = chunks
        self._num_chunks = num_chunks
        self._tile_tokens = tile_tokens
        module.forward = partial(DeferredLogits, vocab_size=module.weight.shape[0])

    def loss_and_backward(self, losses: Sequence[DeferredLoss]) -> torch.Tensor:
        """The loss of the step, fp32 []: of all lanes' own losses, each times its share of the step's labels.

        Backward runs through the head and through what the model computed between its last block and the head, and
        through what it added to its loss.
        """
        lanes = lane_losses(losses, self._tile_tokens)
        rows = [one for lane in lanes for one in lane.rows]
        if self._num_chunks == 1:
            self._chunks.acquire(0)
            self._chunks.enter(0)
            for one in rows:
                one.plain_loss(self._forward)
            self._chunks.release(0)
        else:
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                chunk = self._chunks.enter(0)
                for one in rows:
                    one.add_chunk(chunk)
                self._chunks.release(index)
            for one in rows:
                one.finish_chunks()
            if self._chunks.trained:
                self._train_chunks(rows)
        total = torch.zeros((), dtype=torch.float32)
        for lane in lanes:
            total = total + lane.loss
            lane.backward()
        return total

    def _train_chunks(self, rows: Sequence[TiledCrossEntropy]) -> None:
        for index in reversed(range(self._num_chunks)):  # the last one is still near
            self._chunks.acquire(index)
            chunk = self._chunks.enter(0)
            weight = torch.zeros(chunk.weight.shape, device=chunk.weight.device)
            bias = None if chunk.bias is None else torch.zeros(chunk.bias.shape, device=chunk.bias.device)
            for lane in rows:
                lane.add_weight_gradient(chunk, weight, bias)
            self._chunks.add_gradients(index, weight, bias)
            self._chunks.release(index)

    def losses(self, losses: Sequence[DeferredLoss], variants: int) -> torch.Tensor:
        """What `loss_and_backward` returns, for every variant of the weights, without gradients; fp32 [variants].

        losses: of all lanes of variant 0, of variant 1, ...
        """
        count = len(losses) // variants
        with torch.no_grad():
            by_variant = [
                lane_losses(losses[i * count : (i + 1) * count], self._tile_tokens, backward=False) for i in range(variants)
            ]
            for index in range(self._num_chunks):
                self._chunks.acquire(index)
                for variant, lanes in enumerate(by_variant):
                    chunk = self._chunks.enter(variant)
                    for one in (one for lane in lanes for one in lane.rows):
                        if self._num_chunks == 1:
                            one.plain_loss(self._forward)
                        else:
                            one.add_chunk(chunk)
                self._chunks.release(index)
            totals = []
            for lanes in by_variant:
                total = torch.zeros((), dtype=torch.float32)
                for lane in lanes:
                    for one in lane.rows if self._num_chunks > 1 else ():
                        one.finish_loss()
                    total = total + lane.loss
                totals.append(total)
        return torch.stack(totals)

    def token_scores(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], variants: Sequence[int] = ()
    ) -> list[TokenScores]:
        """What each lane's model says of every label. No gradients.

        logits: [n, V] a lane. labels: int64 [n] a lane, of these very rows; -100: nothing is asked. variants: which version
        of the weights each lane met, ascending; empty: all the only one.
        """
        with torch.no_grad():
            pairs = zip(logits, labels, strict=True)
            rows = [TiledCrossEntropy(lane, y, self._tile_tokens, backward=False) for lane, y in pairs]
            for i, chunk in self._every_chunk(len(rows), variants):
                rows[i].add_chunk(chunk, self._forward if self._num_chunks == 1 else None)
            return [lane.token_scores() for lane in rows]

    def last_logits(self, logits: Sequence[DeferredLogits], variants: Sequence[int] = ()) -> list[torch.Tensor]:
        """Logits of the last position of every row, fp32 [B, V] per lane. variants: as in `token_scores`."""
        parts: list[list[torch.Tensor]] = [[] for _ in logits]
        with torch.no_grad():
            for i, chunk in self._every_chunk(len(logits), variants):
                hidden = logits[i].hidden[:, -1]
                part = self._forward(hidden) if self._num_chunks == 1 else chunk.logits(hidden)
                columns = slice(chunk.start, chunk.start + chunk.weight.shape[0])
                parts[i].append(apply_operations(logits[i].operations, part, columns).float())
        return [torch.cat(part, dim=-1) for part in parts]

    def _every_chunk(self, lanes: int, variants: Sequence[int]) -> Iterator[tuple[int, HeadChunk]]:
        """(lane, chunk) for every chunk and lane, each with its version of the weights; chunks are fetched once."""
        for index in range(self._num_chunks):
            self._chunks.acquire(index)
            for i in range(lanes):
                yield i, self._chunks.enter(variants[i] if variants else 0)
            self._chunks.release(index)
