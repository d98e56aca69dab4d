"""Sequences and what is asked of them: how likely the model finds some of their tokens, after what stands before.

[Note: what is asked of a sequence]
Everything measured is the cross entropy of some token at some position: an `Asked` row is a sequence and such pairs.
The loss asks for every trained token. A candidate completion asks for its own tokens; where another sequence begins with
all that predicts them, that sequence is asked: with completions of one token, a row is computed once however many
candidates there are.

Candidates are compared by the sum of their tokens' log-probabilities, which is the likelihood of the completion given
the prompt; the end-of-text token after it does not count. (MeZO divides the sum by the number of tokens; for completions
of one token that is the same.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from finetune.data import Example, TokenDataset, collate
from finetune.data.cache import MASKED
from finetune.objectives.metrics import Predictions, prediction_bytes
from finetune.offload.streamed_model import StreamedModel


@dataclass(frozen=True, slots=True)
class Asked:
    """A sequence, int32 [tokens], and what is asked of it: `targets[i]` as the token after `positions[i]`.

    accounts[i] says what the cross entropy counts for: 0 the loss, 1 + r * K + k candidate k of row r.
    """

    input_ids: np.ndarray  # of the sequence
    positions: np.ndarray
    targets: np.ndarray
    accounts: np.ndarray


class TextRows:
    """The rows of a token cache as `Asked` sequences, longest row first. metrics: a user's function of what is predicted."""

    def __init__(self, data: TokenDataset, metrics: Callable[..., Any] | None = None) -> None:
        self._data = data
        self.metrics = metrics
        self._choices = data.num_choices or 1
        lengths = np.asarray(data.lengths).reshape(-1, self._choices)
        self._order = np.argsort(-lengths.max(axis=1), kind="stable")
        answers = np.zeros(len(lengths), np.int64) if data.answers is None else data.answers
        self.max_length = int(lengths.max())
        self.tokens = int(lengths[np.arange(len(lengths)), answers].sum())  # where every row is computed once
        self.pad_token_id = data.pad_token_id
        self.versions = 1  # of the weights, that are asked
        self.kept_bytes = 0 if metrics is None else prediction_bytes(len(lengths), self.max_length)

    def predictions(self) -> Predictions:
        """For one pass."""
        return Predictions(self._order.tolist(), self.max_length)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[Asked]]:
        for row in self._order:
            yield self._of_choices(int(row)) if self._data.num_choices else [ask_trained(self._data[int(row)])]

    def _of_choices(self, row: int) -> list[Asked]:
        """The right candidate's sequence first, which the loss is over; then those that cannot be read off another."""
        examples = [self._data[row * self._choices + k] for k in range(self._choices)]
        eos = self._data.meta["eos_token_id"]
        compared = [one.input_ids[:-1] if one.input_ids[-1] == eos else one.input_ids for one in examples]
        trained = ask_trained(examples[int(self._data.answers[row])])
        return ask_candidates(compared, 1 + row * self._choices, [trained])

    def result(self, totals: dict[int, float], tokens: int) -> dict[str, float]:
        loss = totals.pop(0, 0.0) / max(tokens, 1)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        result = {"loss": loss, "perplexity": perplexity, "tokens": tokens, "examples": len(self)}
        if self._data.num_choices:
            scores = np.zeros((len(self), self._choices))
            for account, total in totals.items():
                scores.flat[account - 1] = total
            result["accuracy"] = float((scores.argmin(axis=1) == self._data.answers).mean())
        return result


def ask_trained(example: Example, account: int = 0) -> Asked:
    """The cross entropy of every trained token."""
    trained = np.flatnonzero(example.labels[1:] != MASKED)
    return Asked(example.input_ids, trained, example.labels[1:][trained], np.full(len(trained), account))


def ask_candidates(candidates: Sequence[np.ndarray], account: int, also: Sequence[Asked] = ()) -> list[Asked]:
    """The cross entropies of the tokens that tell `candidates`, sequences int32 [tokens], apart; those of candidate k count
    for `account + k`.

    also: sequences that are asked something else; they come first in what is returned, asked this too where they can be.
    """
    asked = list(also)
    start = _common_prefix(candidates)  # what all candidates share decides nothing
    for k, ids in enumerate(candidates):
        positions = np.arange(start - 1, len(ids) - 1)
        needed = ids[:-1]
        share = next((i for i, a in enumerate(asked) if np.array_equal(a.input_ids[: len(needed)], needed)), None)
        added = Asked(ids, positions, ids[positions + 1], np.full(len(positions), account + k))
        if share is None:
            asked.append(added)
        else:
            asked[share] = _join(asked[share], added)
    return [one for one in asked if len(one.positions)]


def _join(a: Asked, b: Asked) -> Asked:
    fields = ("positions", "targets", "accounts")
    return Asked(a.input_ids, *(np.concatenate([getattr(a, name), getattr(b, name)]) for name in fields))


def _common_prefix(sequences: Sequence[np.ndarray]) -> int:
    length = min(map(len, sequences))
    table = np.stack([ids[:length] for ids in sequences])
    different = (table != table[0]).any(axis=0)
    return int(different.argmax()) if different.any() else length


class Scores(NamedTuple):
    """Of the pairs of one lane, in order. losses: fp32, cross entropies. likeliest: bool, whether no token is likelier.
    tokens: int64, the likeliest ones; None: not asked."""

    losses: np.ndarray
    likeliest: np.ndarray
    tokens: np.ndarray | None = None


def score(
    streamed: StreamedModel, lanes: Sequence[Sequence[Asked]], pad_token_id: int, variants: Sequence[int] = (),
    predicts: bool = False,
) -> list[Scores]:  # fmt: skip
    """What every lane's sequences are asked for, from one pass over the weights.

    variants: which variant of the weights each lane meets, as in `StreamedModel.forward`. predicts: whether the likeliest
    tokens are asked too.
    """
    device = streamed.device.torch_device
    inputs = []
    for lane in lanes:
        batch = collate([[Example(one.input_ids, one.input_ids)] for one in lane], pad_token_id)
        del batch["labels"]
        inputs.append({key: value.to(device) for key, value in batch.items()} | {"use_cache": False})
    outputs = streamed.forward(inputs, variants)
    logits, labels, results = [], [], []
    for lane, output in zip(lanes, outputs, strict=True):
        row = np.repeat(np.arange(len(lane)), [len(one.positions) for one in lane])
        position = np.concatenate([one.positions for one in lane])
        target = torch.from_numpy(np.concatenate([one.targets for one in lane]).astype(np.int64)).to(device)
        if streamed.head is None:
            asked = output.logits[row, position].float()
            losses = functional.cross_entropy(asked, target, reduction="none")
            tokens = asked.max(dim=1).indices
            results.append(Scores(losses.cpu().numpy(), (tokens == target).cpu().numpy(), tokens.cpu().numpy()))
            continue
        logits.append(output.logits[row, position])
        labels.append(target)
    del outputs
    if streamed.head is not None:
        found = streamed.token_scores(logits, labels, variants, predicts)
        results = [Scores(*(None if values is None else values.cpu().numpy() for values in one)) for one in found]
    return results
