"""The language-model head: its tiles and chunks, and what is asked of logits that are never whole. See [Note: loss tiles] in
`finetune.offload.step.tiled_loss`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune.offload.step.deferred_logits import DeferredLogits, DeferredLoss
from finetune.offload.step.sequence_loss import TokenLogProbs, Weigh
from finetune.offload.step.tiled_loss import (
    LaneLoss,
    TiledCrossEntropy,
    TokenScores,
    apply_operations,
    lane_losses,
    step_items,
)
from finetune.offload.step.weights import HeadChunk, HeadRows, Weights

if TYPE_CHECKING:
    from finetune.offload.step.engine import Versions

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


class TiledHead:
    """Loss, scores of tokens and logits of a deferred head.

    module: the head (nn.Linear, or PEFT's wrapper of one), to which a head of one chunk is bound. weights: give its chunks.
    """

    def __init__(self, module: nn.Module, weights: Weights, num_chunks: int, tile_tokens: int) -> None:
        self._forward = module.forward
        self._weights = weights
        self._keys = [HeadChunk(index) for index in range(num_chunks)]
        self._tile_tokens = tile_tokens
        self.lanes_together: int | None = None
        """That a loss with gradients goes through at a time; the others' hidden states are on disk. None: all, in memory."""
        module.forward = partial(DeferredLogits, vocab_size=module.weight.shape[0])

    def loss_and_backward(self, losses: Sequence[DeferredLoss]) -> torch.Tensor:
        """The loss of the step, fp32 []: of all lanes' own losses, each times its share of the step's labels.

        Backward runs through the head and through what the model computed between its last block and the head, and
        through what it added to its loss.
        """
        if self.lanes_together is not None:
            return self._loss_and_backward_in_turn(losses, self.lanes_together)
        lanes = lane_losses(losses, self._tile_tokens)
        rows = [one for lane in lanes for one in lane.rows]
        is_whole = len(self._keys) == 1
        for chunk in self._visit(self._keys):
            for one in rows:
                if is_whole:
                    one.plain_loss(self._forward)
                else:
                    one.add_chunk(chunk)
        if not is_whole:
            for one in rows:
                one.finish_chunks()
            if self._weights.trains(self._keys[0]):
                self._train_chunks(rows)
        total = torch.zeros((), dtype=torch.float32)
        for lane in lanes:
            total = total + lane.loss
            lane.backward()
        return total

    def _loss_and_backward_in_turn(self, losses: Sequence[DeferredLoss], together: int) -> torch.Tensor:
        """So many lanes after so many. A head of several chunks is read again for each of these groups."""
        items, total, rows = step_items(losses), torch.zeros((), dtype=torch.float32), []
        if len(self._keys) == 1:
            for _ in self._visit(self._keys):
                for loss in losses:
                    lane = LaneLoss(loss, items, self._tile_tokens, keeps_rows=False)
                    for one in lane.rows:
                        one.plain_loss(self._forward)
                    total = total + lane.loss
                    lane.backward()
            return total
        for start in range(0, len(losses), together):
            if start:
                self._weights.begin_pass()
            lanes = [LaneLoss(loss, items, self._tile_tokens, keeps_rows=False) for loss in losses[start : start + together]]
            for chunk in self._visit(self._keys):
                for one in (one for lane in lanes for one in lane.rows):
                    one.add_chunk(chunk)
            for lane in lanes:
                for one in lane.rows:
                    one.finish_chunks()
                total = total + lane.loss
                lane.backward()
                rows += lane.rows
        if self._weights.trains(self._keys[0]):
            self._train_chunks(rows)
        return total

    def _visit(self, keys: Sequence[HeadChunk]) -> Iterator[HeadRows]:
        """The chunks, one after the other; of the only variant of the weights."""
        for key in keys:
            self._weights.acquire(key)
            self._weights.enter(0)
            yield self._weights.head_rows
            self._weights.release(key)

    def _train_chunks(self, rows: Sequence[TiledCrossEntropy]) -> None:
        keys = self._keys[::-1]  # the last one is still near
        for key, chunk in zip(keys, self._visit(keys), strict=True):
            weight = torch.zeros(chunk.weight.shape, device=chunk.weight.device)
            bias = None if chunk.bias is None else torch.zeros(chunk.bias.shape, device=chunk.bias.device)
            for lane in rows:
                lane.add_weight_gradient(chunk, weight, bias)
            self._weights.add_gradients(key, weight, bias)

    def sequence_backward(
        self, losses: Sequence[DeferredLoss], versions: Versions, weigh: Weigh, temperature: float = 1.0
    ) -> None:
        """Log-probabilities of the labels of all lanes, then backward from what `weigh` makes of them, as far as
        `loss_and_backward` goes. See [Note: losses of sequences] in `finetune.offload.step.sequence_loss`.

        losses: the lanes' own; what they ask for is which rows meet which label. temperature: that logits are divided by.
        """
        lanes = [
            TokenLogProbs(loss, self._tile_tokens, i < versions.trained, temperature) for i, loss in enumerate(losses)
        ]
        trained, is_whole = lanes[: versions.trained], len(self._keys) == 1
        for key in self._keys:
            self._weights.acquire(key)
            for lane, variant in zip(lanes, versions.of_lanes, strict=True):
                self._weights.enter(variant)
                if is_whole:
                    lane.plain_log_probs(self._forward)
                else:
                    lane.add_chunk(self._weights.head_rows)
            if is_whole:
                weights = weigh([lane.log_probs for lane in lanes])
                self._weights.enter(0)
                for lane, weight in zip(trained, weights, strict=True):
                    lane.plain_backward(self._forward, weight)
            self._weights.release(key)
        if not is_whole:
            for lane in lanes:
                lane.finish_log_probs()
            for lane, weight in zip(trained, weigh([lane.log_probs for lane in lanes]), strict=True):
                lane.finish_backward(weight)
            if self._weights.trains(self._keys[0]):
                self._train_chunks(trained)
        for lane in trained:
            lane.backward()

    def losses(self, losses: Sequence[DeferredLoss], variants: int) -> torch.Tensor:
        """What `loss_and_backward` returns, for every variant of the weights, without gradients; fp32 [variants].

        losses: of all lanes of variant 0, of variant 1, ...
        """
        count = len(losses) // variants
        is_whole = len(self._keys) == 1
        with torch.no_grad():
            by_variant = [
                lane_losses(
                    losses[i * count : (i + 1) * count], self._tile_tokens, backward=False,
                    keeps_rows=self.lanes_together is None,
                )
                for i in range(variants)
            ]  # fmt: skip
            for variant, chunk in self._every_chunk(range(variants)):
                for one in (one for lane in by_variant[variant] for one in lane.rows):
                    if is_whole:
                        one.plain_loss(self._forward)
                    else:
                        one.add_chunk(chunk)
            totals = []
            for lanes in by_variant:
                total = torch.zeros((), dtype=torch.float32)
                for lane in lanes:
                    for one in () if is_whole else lane.rows:
                        one.finish_loss()
                    total = total + lane.loss
                totals.append(total)
        return torch.stack(totals)

    def token_scores(
        self, logits: Sequence[DeferredLogits], labels: Sequence[torch.Tensor], variants: Sequence[int] = (),
        predicts: bool = False,
    ) -> list[TokenScores]:  # fmt: skip
        """What each lane's model says of every label. No gradients. predicts: and which token it finds likeliest.

        logits: [n, V] a lane. labels: int64 [n] a lane, of these very rows; -100: nothing is asked. variants: which one
        of the weights each lane met, ascending; empty: all the only one.
        """
        with torch.no_grad():
            pairs = zip(logits, labels, strict=True)
            rows = [TiledCrossEntropy(lane, y, self._tile_tokens, backward=False) for lane, y in pairs]
            for one in rows:
                one.predicts = predicts
            forward = self._forward if len(self._keys) == 1 else None
            for i, chunk in self._every_chunk(variants or [0] * len(rows)):
                rows[i].add_chunk(chunk, forward)
            return [lane.token_scores() for lane in rows]

    def last_logits(self, logits: Sequence[DeferredLogits], variants: Sequence[int] = ()) -> list[torch.Tensor]:
        """Logits of the last position of every row, fp32 [B, V] per lane. variants: as in `token_scores`."""
        parts: list[list[torch.Tensor]] = [[] for _ in logits]
        with torch.no_grad():
            for i, chunk in self._every_chunk(variants or [0] * len(logits)):
                hidden = logits[i].hidden[:, -1]
                part = self._forward(hidden) if len(self._keys) == 1 else chunk.logits(hidden)
                columns = slice(chunk.start, chunk.start + chunk.weight.shape[0])
                parts[i].append(apply_operations(logits[i].operations, part, columns).float())
        return [torch.cat(part, dim=-1) for part in parts]

    def _every_chunk(self, variants: Sequence[int]) -> Iterator[tuple[int, HeadRows]]:
        """(lane, chunk) for every chunk and lane, each of its variant of the weights; chunks are fetched once."""
        for key in self._keys:
            self._weights.acquire(key)
            for lane, variant in enumerate(variants):
                self._weights.enter(variant)
                yield lane, self._weights.head_rows
            self._weights.release(key)
