"""Completions of prompts, many at once: a token of each costs one pass over the weights.

The completions of a prompt are the rows of one lane: at every pass they are equally long, so nothing is padded, and weights
that are near are multiplied by all of them at once. The prompt goes through the model once; its keys and values are then those
of all rows. A row that has ended goes on unread until the lane's last one has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune.adapters.base import adapter_of
from finetune.decoding import check_choosable, make_cache
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.skeleton import cache_argument

Choose = Callable[[torch.Tensor], int]
"""From logits, fp32 [vocabulary] on the CPU, to a token."""


def completion_seed(seed: int, step: int, row: int, number: int) -> int:
    """Of completion `number` of the row `row` of the data in step `step` (all from 0): a 63-bit hash of the four."""
    digest = hashlib.blake2b(f"{seed}/completion/{step}/{row}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def write_completions(
    streamed: StreamedModel,
    prompts: Sequence[Sequence[int]],
    choosers: Sequence[Sequence[Choose]],
    ends: frozenset[int],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Token ids of each prompt's completions, one for each of its choosers, which are equally many; the last one may be an end.

    Raises UserError where the model's outputs are NaN or infinite.
    """
    lanes = [_Lane(streamed, prompt, own, ends, max_new_tokens) for prompt, own in zip(prompts, choosers, strict=True)]
    for _ in range(max_new_tokens):
        going = [lane for lane in lanes if not lane.has_ended]
        if not going:
            break
        outputs = streamed.forward([lane.inputs() for lane in going])
        for lane, logits in zip(going, streamed.last_logits(outputs), strict=True):
            lane.take(logits)
        del outputs
    return [lane.tokens for lane in lanes]


class _Lane:
    """A prompt and its completions so far."""

    def __init__(
        self, streamed: StreamedModel, prompt: Sequence[int], choosers: Sequence[Choose], ends: frozenset[int], most: int
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in choosers]
        self._choosers = choosers
        self._ends = ends
        self._most = most
        self._key = cache_argument(streamed.parts.model)
        positions = adapter_of(streamed.model).positions + len(prompt) + most
        self._cache: Any = make_cache(streamed, positions, len(choosers))
        self._shares = all(hasattr(layer, "spread") for layer in self._cache.layers)
        rows = 1 if self._shares else len(choosers)
        self._news = torch.tensor([list(prompt)] * rows, device=streamed.device.torch_device)

    @property
    def has_ended(self) -> bool:
        return self._cache is None

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self._news, self._key: self._cache, "use_cache": True}

    def take(self, logits: torch.Tensor) -> None:
        """logits: of the last position, fp32 [1 or rows, vocabulary]."""
        check_choosable(logits)
        rows, news = logits.cpu(), []
        for number, (tokens, choose) in enumerate(zip(self.tokens, self._choosers, strict=True)):
            if self._is_over(tokens):
                news.append([tokens[-1]])
                continue
            tokens.append(choose(rows[number if len(rows) > 1 else 0]))
            news.append([tokens[-1]])
        if all(map(self._is_over, self.tokens)):
            self._cache = None
            return
        if self._shares and len(self._news) == 1:
            for layer in self._cache.layers:
                layer.spread()
        self._news = torch.tensor(news, device=self._news.device)

    def _is_over(self, tokens: Sequence[int]) -> bool:
        return len(tokens) == self._most or bool(tokens) and tokens[-1] in self._ends
