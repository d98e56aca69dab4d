"""Objectives of what greedy decoding gives after a row's prompt, up to `zo.max_new_tokens` tokens; each is a pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from finetune.config import Config
from finetune.data import Example, TokenDataset
from finetune.data.batches import Row
from finetune.data.cache import MASKED
from finetune.decoding import Sampling, TextPieces, cache_bytes, chooser, decode, end_tokens, load_tokenizer
from finetune.memory.errors import UserError
from finetune.objectives.base import Objective, rows_of
from finetune.offload.perturb.variants import Variant
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape
from finetune.session import Session


class Generated(Objective):
    """A row's last run of trained tokens is its reference, what stands before is the prompt."""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        self._config = config
        self._data = data
        self._tokenizer = load_tokenizer(session.parts.directory, config)
        self._ends = end_tokens(session.parts.directory, self._tokenizer.eos_token_id)
        self.lengths = np.asarray(data.lengths)

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        """A prompt a micro-batch, caches for all of them."""
        if session.parts.head is None:
            raise UserError(
                f"zo.objective: expected a language model to generate with, found {type(session.model).__name__}"
            )
        lanes = config.training.batch_size * config.variants
        kept = cache_bytes(session, longest, config.zo.max_new_tokens, lanes)
        return BatchShape.of_text(1, longest, lanes, train=False).filling_caches(kept)

    def shape(self, session: Session) -> BatchShape:
        return self.full_shape(self._config, session, int(self.lengths.max()))

    @abstractmethod
    def value(self, prompts: list[str], completions: list[str], references: list[str]) -> float:
        """What is to be made small of the completions of a step, one a prompt."""

    def values(
        self, model: StreamedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        split = [split_example(self._data[row], "zo.objective") for row in rows_of(groups)]
        ids = [prompt.tolist() for prompt, _ in split]
        prompts, references = (
            [self._tokenizer.decode(part, skip_special_tokens=True) for part in parts]
            for parts in zip(*split, strict=True)
        )
        said, tokens = self._completions(model, ids, variants)
        values = [self.value(prompts, completions, references) for completions in said]
        return np.array(values, np.float32), tokens

    def _completions(
        self, model: StreamedModel, prompts: list[list[int]], variants: Sequence[Variant]
    ) -> tuple[list[list[str]], int]:
        """What each variant says after each prompt, and the tokens of the prompts and of what the first says."""
        lanes = prompts * len(variants)
        texts = [TextPieces(self._tokenizer, one) for one in lanes]
        completions = [""] * len(lanes)
        tokens = sum(map(len, prompts))
        versions = [variant for variant in range(len(variants)) for _ in prompts]
        with model.weights.under(variants):
            greedy = [chooser(Sampling()) for _ in lanes]
            steps = decode(model, lanes, greedy, self._ends, self._config.zo.max_new_tokens, versions)
            for pairs in steps:
                for i, token in pairs:
                    tokens += i < len(prompts)
                    if token not in self._ends:
                        completions[i] += texts[i].add(token)
        completions = [text + pieces.rest() for text, pieces in zip(completions, texts, strict=True)]
        return [completions[i : i + len(prompts)] for i in range(0, len(lanes), len(prompts))], tokens


def split_example(example: Example, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reference), token ids int32. Raises UserError where there is no prompt. key: of the configuration, that asks."""
    trained = example.labels != MASKED
    end = int(np.flatnonzero(trained)[-1]) + 1
    before = np.flatnonzero(~trained[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    if not start:
        raise UserError(
            f"{key}: expected rows with a prompt and a completion, found one that is all completion: use rows of "
            "prompt + completion or messages, with dataset.completion_only"
        )
    return example.input_ids[:start], example.input_ids[start:end]
