"""What a step makes small: the loss of trained tokens, or, without gradients, anything that can be computed of a model.

| objective      | of a step's rows                                                                    | passes  |
|----------------|-------------------------------------------------------------------------------------|---------|
| loss           | mean cross entropy of the trained tokens                                            | 1       |
| classification | mean cross entropy of the right one among the data's few completions                | 1       |
| accuracy       | share of rows whose likeliest completion is another than theirs                     | 1       |
| exact_match    | share of rows whose completion is not what greedy decoding gives                    | 1       |
| f1, functions  | 1 - mean F1, - mean reward, of what greedy decoding gives                           | 1 a token |

classification is MeZO's train_as_classification, the last three its "non-differentiable objectives" (Malladi et al. 2023,
section 3.3). A completion is what greedy decoding gives where each of its tokens is the likeliest after those before it, so
exact match takes one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from finetune.config import Config
from finetune.data import Example, TokenDataset
from finetune.data.batches import Row
from finetune.data.micro_batches import make_micro_batches
from finetune.data.tensor_rows import TensorRows
from finetune.generate import TextPieces, cache_bytes, chooser, decode, end_tokens, load_tokenizer
from finetune.objectives.errors import StepNotKept
from finetune.objectives.rewards import call_reward, load_reward, token_f1
from finetune.objectives.scoring import Asked, Scores, ask_candidates, ask_trained, score
from finetune.planned_run import BatchShape
from finetune.session import Session
from memory.errors import UserError
from offload.perturb.perturbed_model import PerturbedModel
from offload.perturb.variants import Variant
from offload.step.head import IGNORE_INDEX

CANDIDATE_OBJECTIVES = ("classification", "accuracy")  # rows are prepared with all their candidates


class Objective(Protocol):
    """lengths: tokens of each row, int [rows], by which micro-batches are sorted."""

    lengths: np.ndarray

    def shape(self, session: Session) -> BatchShape:
        """Of the largest step, every version of the weights counted."""

    def values(
        self, model: PerturbedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        """What is to be made small under every version of the weights, fp32 [variants], and how many tokens went in.

        groups: the rows of each micro-batch, as `BatchPlan.step` gives them.
        """


def make_objective(config: Config, session: Session, data: TokenDataset | TensorRows) -> Objective:
    """data: for `classification` and `accuracy` prepared with choices. Raises UserError for data that does not suit."""
    word = config.zo.objective if config.method == "zo" else "loss"
    if isinstance(data, TensorRows) and config.dataset.packing:
        raise UserError("dataset.packing: expected it off with rows of tensors, each of which is computed alone, found it on")
    if word == "loss":
        return TokenLoss(config, data)
    if isinstance(data, TensorRows):
        raise UserError(f"zo.objective {word}: expected rows of text, found samples of tensors: use objective loss")
    if word in CANDIDATE_OBJECTIVES:
        return Candidates(config, data)
    if word == "exact_match":
        return ExactMatch(config, data)
    return Generated(config, session, data)


def full_shape(config: Config, session: Session, longest: int) -> BatchShape:
    """Of a step whose rows have at most `longest` tokens, before there is data."""
    if config.method == "zo" and config.zo.objective not in ("loss", "exact_match", *CANDIDATE_OBJECTIVES):
        return generated_shape(config, session, longest)
    return scored_shape(config, longest)


def scored_shape(config: Config, longest: int, sequences_per_row: int = 1) -> BatchShape:
    """Of a step that takes one pass over the weights."""
    options = config.training
    sequences = options.batch_size * sequences_per_row
    rows = min(options.micro_batch_size, sequences)
    return BatchShape.of_text(
        rows, longest, -(-sequences // rows) * config.variants, config.method != "zo", config.dataset.packing
    )


def generated_shape(config: Config, session: Session, longest: int) -> BatchShape:
    """Of a step that writes text after prompts of at most `longest` tokens: a prompt a micro-batch, caches for all of them.

    Raises UserError for models that write none.
    """
    if session.parts.head is None:
        raise UserError(
            f"zo.objective: expected a language model to generate with, found {type(session.model).__name__}"
        )
    lanes = config.training.batch_size * config.variants
    kept = cache_bytes(session, longest, config.zo.max_new_tokens, lanes)
    return BatchShape.of_text(1, longest, lanes, train=False).keeping(kept)


class TokenLoss:
    """The loss of the model's own forward: mean cross entropy of the trained tokens, and what a model adds to it."""

    def __init__(self, config: Config, data: TokenDataset | TensorRows) -> None:
        self._config = config
        self.data = data
        self.lengths = np.asarray(data.lengths)

    def shape(self, session: Session) -> BatchShape:
        packing = self._config.dataset.sequence_length if self._config.dataset.packing else None
        shape = scored_shape(self._config, packing or int(self.lengths.max()))
        if not isinstance(self.data, TensorRows):
            return shape
        longest = self.data.longest(shape.inputs["input_ids"].shape[0])
        return replace(shape, inputs=self.data.collate(longest), samples=len(longest), packed=False)

    def values(
        self, model: PerturbedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        batches = make_micro_batches(self.data, groups, model.device.torch_device)
        return model.losses(batches.inputs, batches.labels, variants).numpy(), batches.tokens


class _Scored:
    """Objectives of what the model says of given tokens: one pass over the weights."""

    def __init__(self, config: Config, data: TokenDataset) -> None:
        self._config = config
        self._data = data

    def _shape(self, sequences_per_row: int) -> BatchShape:
        return scored_shape(self._config, int(self._data.lengths.max()), sequences_per_row)

    def _scores(
        self, model: PerturbedModel, asked: Sequence[Asked], variants: Sequence[Variant]
    ) -> tuple[list[tuple[Asked, list[Scores]]], int]:
        """Every sequence with what each variant says of it, and their tokens."""
        asked = sorted(asked, key=lambda one: -len(one.input_ids))
        size = self._config.training.micro_batch_size
        lanes = [asked[start : start + size] for start in range(0, len(asked), size)]
        with model.under(variants):
            versions = [variant for variant in range(len(variants)) for _ in lanes]
            found = score(model, lanes * len(variants), self._data.pad_token_id, versions)
        if not all(np.isfinite(scores.losses).all() for scores in found):
            # What counts, such as accuracy, would be finite all the same.
            raise StepNotKept("a token's likelihood is not finite: lower training.learning_rate or zo.epsilon")
        results = []
        for index, lane in enumerate(lanes):
            ends = np.cumsum([len(one.positions) for one in lane])[:-1]
            pieces = [
                list(zip(*(np.split(values, ends) for values in found[v * len(lanes) + index]), strict=True))
                for v in range(len(variants))
            ]
            for i, one in enumerate(lane):
                results.append((one, [Scores(*pieces[v][i]) for v in range(len(variants))]))
        return results, sum(len(one.input_ids) for one in asked)


class Candidates(_Scored):
    """classification and accuracy: a row's completion among all completions of the data.

    The score of a candidate is the sum of its tokens' log-probabilities; an end-of-text token after it does not count.
    """

    def __init__(self, config: Config, data: TokenDataset) -> None:
        super().__init__(config, data)
        self._num = data.num_choices
        if self._num < 2:
            raise UserError(
                f"zo.objective {config.zo.objective}: expected rows that choose among 2 or more different completions, "
                "all rows have the same one"
            )
        self.lengths = np.asarray(data.lengths).reshape(-1, self._num).max(axis=1)

    def shape(self, session: Session) -> BatchShape:
        return self._shape(max(len(self._ask(row, 0)) for row in range(len(self.lengths))))

    def values(
        self, model: PerturbedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        rows = _rows_of(groups)
        asked = [one for i, row in enumerate(rows) for one in self._ask(row, i * self._num)]
        results, tokens = self._scores(model, asked, variants)
        losses = np.zeros((len(variants), len(rows) * self._num))
        for one, versions in results:
            for variant, scores in enumerate(versions):
                np.add.at(losses[variant], one.accounts, scores.losses)
        likelihoods = -losses.reshape(len(variants), len(rows), self._num)
        answers = self._data.answers[rows]
        if self._config.zo.objective == "accuracy":
            values = (likelihoods.argmax(axis=2) != answers).mean(axis=1)
        else:
            most = likelihoods.max(axis=2)
            log_sum = most + np.log(np.exp(likelihoods - most[..., None]).sum(axis=2))
            values = (log_sum - likelihoods[:, np.arange(len(rows)), answers]).mean(axis=1)
        return values.astype(np.float32), tokens

    def _ask(self, row: int, account: int) -> list[Asked]:
        candidates = [self._data[row * self._num + k].input_ids for k in range(self._num)]
        return ask_candidates(candidates, account)


class ExactMatch(_Scored):
    """Share of rows of which some trained token is not the likeliest."""

    def __init__(self, config: Config, data: TokenDataset) -> None:
        super().__init__(config, data)
        self.lengths = np.asarray(data.lengths)

    def shape(self, session: Session) -> BatchShape:
        return self._shape(1)

    def values(
        self, model: PerturbedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        results, tokens = self._scores(model, [ask_trained(self._data[row]) for row in _rows_of(groups)], variants)
        wrong = [[not scores.likeliest.all() for scores in versions] for _, versions in results]
        return np.mean(wrong, axis=0, dtype=np.float64).astype(np.float32), tokens


class Generated:
    """F1, or a user's reward, of what greedy decoding gives after a row's prompt, up to `zo.max_new_tokens` tokens.

    A row's last run of trained tokens is its reference, what stands before is the prompt.
    """

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        word = config.zo.objective
        self._config = config
        self._data = data
        self._reward = word if callable(word) else token_f1 if word == "f1" else load_reward(word)
        self._tokenizer = load_tokenizer(session.parts.directory, config)
        self._ends = end_tokens(session.parts.directory, self._tokenizer.eos_token_id)
        self.lengths = np.asarray(data.lengths)

    def shape(self, session: Session) -> BatchShape:
        return generated_shape(self._config, session, int(self.lengths.max()))

    def values(
        self, model: PerturbedModel, groups: Sequence[Sequence[Row]], variants: Sequence[Variant]
    ) -> tuple[np.ndarray, int]:
        examples = [self._data[row] for row in _rows_of(groups)]
        split = [_split(example) for example in examples]
        ids = [prompt.tolist() for prompt, _ in split]
        prompts, references = (
            [self._tokenizer.decode(part, skip_special_tokens=True) for part in parts]
            for parts in zip(*split, strict=True)
        )
        lanes = ids * len(variants)
        texts = [TextPieces(self._tokenizer, one) for one in lanes]
        completions = [""] * len(lanes)
        tokens = sum(map(len, ids))
        greedy: Callable[[torch.Tensor], int] = chooser(0.0, 1.0, 0)
        versions = [variant for variant in range(len(variants)) for _ in ids]
        with model.under(variants):
            steps = decode(model, lanes, [greedy] * len(lanes), self._ends, self._config.zo.max_new_tokens, versions)
            for pairs in steps:
                for i, token in pairs:
                    tokens += i < len(ids)
                    if token not in self._ends:
                        completions[i] += texts[i].add(token)
        completions = [text + pieces.rest() for text, pieces in zip(completions, texts, strict=True)]
        values = []
        for variant in range(len(variants)):
            said = completions[variant * len(ids) : (variant + 1) * len(ids)]
            mean = float(np.mean(call_reward(self._reward, prompts, said, references)))
            values.append(1.0 - mean if self._config.zo.objective == "f1" else -mean)
        return np.array(values, np.float32), tokens


def _rows_of(groups: Sequence[Sequence[Row]]) -> list[int]:
    """The step's rows, which are not packed."""
    return [row[0] for group in groups for row in group]


def _split(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reference), token ids int32. Raises UserError where there is no prompt."""
    trained = example.labels != IGNORE_INDEX
    end = int(np.flatnonzero(trained)[-1]) + 1
    before = np.flatnonzero(~trained[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    if not start:
        raise UserError(
            "zo.objective: expected rows with a prompt and a completion, found one that is all completion: use rows of "
            "prompt + completion or messages, with dataset.completion_only"
        )
    return example.input_ids[:start], example.input_ids[start:end]
