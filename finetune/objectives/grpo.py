"""grpo: group relative policy optimisation (Shao et al. 2024, section 4.1): the model writes several completions of a prompt, a
function says what they are worth, and those that are worth more than others of their prompt become likelier.

With r the ratio of a token's likelihood to that before the step's first update, A the completion's reward less the mean of its
prompt's, by their standard deviation + 1e-4 (`grpo.scale_rewards`), and k = exp(d) - d - 1 with d = log(reference / model):
  -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k
of each token, whose mean is taken as `grpo.loss_type` says: grpo; bnpo and dapo (Yu et al. 2025), which over a whole step are
the same; dr_grpo (Liu et al. 2025). With `importance_sampling_level` sequence, r is that of the completion (Zheng et al. 2025).
Everything is over the rows of a step together, however they are cut into micro-batches. What is logged has TRL's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from finetune.config import Config
from finetune.config.function_names import distinct_names
from finetune.data import Example, TokenDataset
from finetune.data.batches import Row
from finetune.data.cache import MASKED
from finetune.data.micro_batches import MicroBatches, make_micro_batches
from finetune.decoding import Sampling, cache_bytes, chooser, end_tokens, load_tokenizer
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.objectives.answers import LabelledLane
from finetune.objectives.base import rows_of, scored_shape
from finetune.objectives.completions import completion_seed, write_completions
from finetune.objectives.generated import split_example
from finetune.objectives.judged import Judged
from finetune.objectives.rewards import Reward, call_reward, load_reward
from finetune.objectives.written_rows import WrittenRows
from finetune.offload.step.engine import Versions
from finetune.planned_run import BatchShape, Writing
from finetune.session import Session

_LEAST_SPREAD = 1e-4  # TRL's: added to what advantages are divided by


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the step. advantage: what its tokens' ratios are multiplied by. has_ended: by a token that ends a text."""

    prompt: list[int]
    tokens: list[int]
    advantage: float
    has_ended: bool


class Completions:
    """Prompts with their completions as examples, of which the completions are labelled."""

    def __init__(self, completions: Sequence[Completion], pad_token_id: int) -> None:
        self._completions = completions
        self.pad_token_id = pad_token_id

    def __getitem__(self, index: int) -> Example:
        one = self._completions[index]
        ids = np.array(one.prompt + one.tokens, np.int32)
        return Example(ids, np.where(np.arange(len(ids)) < len(one.prompt), MASKED, ids).astype(np.int32))


def advantages(rewards: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, spreads that decide on them), fp32 [prompts, completions] each. rewards: of the same shape. scale:
    `grpo.scale_rewards`."""
    found = torch.from_numpy(np.asarray(rewards, np.float32))
    centred = found - found.mean(dim=1, keepdim=True)
    spread = (found.std() if scale == "batch" else found.std(dim=1, keepdim=True)).expand_as(found)
    return (centred if scale == "none" else centred / (spread + _LEAST_SPREAD)).numpy(), spread.numpy()


class GRPO(Judged):
    """A row's last run of trained tokens is its reference, which rewards are given; what stands before is the prompt."""

    judged = ""

    def __init__(self, config: Config, session: Session, data: TokenDataset) -> None:
        super().__init__(config, session, data)
        options = config.grpo
        self.beta, self.temperature = options.beta, options.temperature
        self._rewards: list[Reward] = [
            word if callable(word) else load_reward(word, "grpo.reward_funcs") for word in options.reward_funcs
        ]
        self._tokenizer = load_tokenizer(session.parts.directory, config)
        self.ends = end_tokens(session.parts.directory, self._tokenizer.eos_token_id)
        self.lengths = np.array([len(self.split(row)[0]) for row in range(len(data))])
        if data.meta["truncated"]:
            raise UserError(
                f"dataset.sequence_length: {data.meta['truncated']} rows are cut at {config.dataset.sequence_length} tokens, "
                "with the references that rewards are given: raise it, or leave those rows out"
            )
        longest, most = int(self.lengths.max()), config.dataset.sequence_length - options.max_completion_length
        if longest > most:
            raise UserError(
                f"dataset.sequence_length: expected at least {longest + options.max_completion_length}, for the longest prompt "
                f"and grpo.max_completion_length tokens, found {config.dataset.sequence_length}"
            )
        self._completions: list[Completion] = []
        self._old: list[torch.Tensor] | None = None  # log-probabilities before the step's first update, of each lane
        self._reference: list[torch.Tensor] | None = None
        self._of_text: dict[str, float] = {}
        self._of_updates: list[dict[str, float]] = []

    @classmethod
    def full_shape(cls, config: Config, session: Session, longest: int) -> BatchShape:
        """With as many prompts written at once as make a step read least."""
        cls.check_head(config, session)
        options, prompts = config.grpo, config.training.batch_size
        shape = scored_shape(config, longest, options.num_generations)
        if options.beta:
            shape = replace(shape, forward_lanes=shape.micro_batches)
        prompt = max(1, longest - options.max_completion_length)
        found: list[tuple[float, BatchShape]] = []
        together = prompts
        while together:
            kept = cache_bytes(session, prompt, options.max_completion_length, together, options.num_generations)
            first = BatchShape.of_text(1, prompt, together, train=False).filling_caches(kept)
            writing = Writing(first, options.max_completion_length, prompts, options.num_generations)
            candidate, together = replace(shape, writing=writing), together // 2
            try:
                found.append((-(-prompts // writing.together) * session.plan(candidate, elsewhere=True).read_bytes, candidate))
            except PlanRefused:
                if not together:
                    return found[0][1] if found else candidate
        return min(found, key=lambda one: one[0])[1]

    def shape(self, session: Session) -> BatchShape:
        longest = int(self.lengths.max()) + self._config.grpo.max_completion_length
        return self.full_shape(self._config, session, longest)

    def split(self, row: int) -> tuple[list[int], list[int]]:
        """Token ids of the row's prompt, and of its reference."""
        prompt, reference = split_example(self._data[row], "training.objective grpo")
        return prompt.tolist(), reference.tolist()

    def updates(self, session: Session, step: int, groups: Sequence[Sequence[Row]]) -> Iterator[MicroBatches]:
        self._write(session, step, rows_of(groups))
        self._old = self._reference = None
        self._of_updates = []
        size = self._config.training.micro_batch_size
        order = sorted(range(len(self._completions)), key=lambda i: -len(self._example(i).input_ids))
        parts = [[(i,) for i in order[start : start + size]] for start in range(0, len(order), size)]
        for update in range(self._config.grpo.num_iterations):
            yield self._lanes_of(parts, session, with_reference=bool(self.beta) and not update)

    def _example(self, index: int) -> Example:
        return Completions(self._completions, 0)[index]

    def _lanes_of(self, parts: Sequence[Sequence[Row]], session: Session, with_reference: bool) -> MicroBatches:
        self._order = [[i for (i,) in part] for part in parts]
        rows = Completions(self._completions, self._data.pad_token_id)
        batches = make_micro_batches(rows, parts, session.device.torch_device)
        lanes, times = [LabelledLane.of(one, None) for one in batches.labels], 2 if with_reference else 1
        versions = Versions([version for version in range(times) for _ in lanes], len(lanes))
        batches = replace(batches, inputs=batches.inputs * times, labels=batches.labels * times)
        return self.asked(batches, lanes * times, versions)

    def _write(self, session: Session, step: int, rows: Sequence[int]) -> None:
        """Has the model write the step's completions, and the functions say what they are worth."""
        config, options = self._config, self._config.grpo
        ids, references = zip(*map(self.split, rows), strict=True)
        written: list[list[list[int]]] = []
        seeds = [[completion_seed(config.training.seed, step, row, i) for i in range(options.num_generations)] for row in rows]
        how = partial(Sampling, temperature=options.temperature, top_p=options.top_p)
        choosers = [[chooser(how(seed=seed)) for seed in own] for own in seeds]
        session.set_training(False)
        together = self.planned.writing.together
        for start in range(0, len(ids), together):
            part = slice(start, start + together)
            written += write_completions(
                session.streamed, ids[part], choosers[part], self.ends, options.max_completion_length
            )
        session.set_training(True)
        texts = [[self.text(tokens) for tokens in one] for one in written]
        weighed, self._of_text = self.worth([*map(self.text, ids)], [*map(self.text, references)], texts)
        found, spread = advantages(weighed, options.scale_rewards)
        self._of_text["frac_reward_zero_std"] = float(np.isclose(spread, 0.0).mean())
        self._completions = [
            Completion(prompt, tokens, float(advantage), tokens[-1] in self.ends)
            for prompt, own, of_prompt in zip(ids, written, found, strict=True)
            for tokens, advantage in zip(own, of_prompt, strict=True)
        ]
        self._of_text |= _lengths(self._completions)

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def worth(
        self, prompts: Sequence[str], references: Sequence[str], texts: Sequence[Sequence[str]]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """(the weighed sum of rewards, fp32 [prompts, texts]; what is logged of them). texts: each prompt's completions."""
        count, options = len(texts[0]), self._config.grpo
        weights = options.reward_weights or [1.0] * len(self._rewards)
        total, logged = np.zeros(len(texts) * count, np.float32), {}
        for reward, name, weight in zip(self._rewards, distinct_names(self._rewards), weights, strict=True):
            values = call_reward(
                reward,
                [prompt for prompt in prompts for _ in range(count)],
                [text for one in texts for text in one],
                [reference for reference in references for _ in range(count)],
            )
            found = np.array(values, np.float32)
            total += np.float32(weight) * found
            logged |= {f"rewards/{name}/mean": float(found.mean()), f"rewards/{name}/std": _spread(found)}
        logged |= {"reward": float(total.mean()), "reward_std": _spread(total)}
        return total.reshape(len(texts), count), logged

    def of_lanes(
        self, lanes: Sequence[LabelledLane], log_probs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        count = len(self._order)
        if self._old is None:
            self._old = [one.detach() for one in log_probs[:count]]
            self._reference = [one.detach() for one in log_probs[count:]] or None
        order = [i for part in self._order for i in part]
        parts = [_split(tensors, lanes) for tensors in (log_probs[:count], self._old, self._reference) if tensors is not None]
        loss, logged = self.of_completions([self._completions[i] for i in order], *parts)
        self._of_updates.append(logged)
        return loss, {name: float(np.mean([one[name] for one in self._of_updates])) for name in logged}

    def of_completions(
        self,
        completions: Sequence[Completion],
        log_probs: Sequence[torch.Tensor],
        old: Sequence[torch.Tensor],
        reference: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(the loss, fp32 [], differentiable; what is logged). log_probs, old, reference: fp32 [tokens] of each completion. As
        TRL logs it, completions that count for nothing are left out; where a completion has one ratio, it is one value, and
        these are unclipped."""
        options = self._config.grpo
        by_completion = options.importance_sampling_level == "sequence"
        losses, weights, low, high, kls = [], [], [], [], []
        for index, (one, found, before) in enumerate(zip(completions, log_probs, old, strict=True)):
            counts = one.has_ended or not options.mask_truncated_completions
            ratio = found - before
            if by_completion:
                ratio = ratio.mean(dim=0, keepdim=True) * counts
            ratio = ratio.exp()
            clipped = ratio.clamp(1 - options.epsilon, 1 + options.high)
            loss = -torch.minimum(ratio * one.advantage, clipped * one.advantage)
            if reference is not None:
                away = reference[index] - found
                distance = away.exp() - away - 1
                loss = loss + options.beta * distance
                kls += [distance] * counts
            losses.append(loss.expand_as(found))
            weights.append(float(counts))
            if counts or by_completion:
                low.append(((ratio < 1 - options.epsilon) & (one.advantage < 0)).float())
                high.append(((ratio > 1 + options.high) & (one.advantage > 0)).float())
        total = self._mean(losses, weights)
        logged = {
            "clip_ratio/low_mean": _mean(low),
            "clip_ratio/low_min": min((float(one.mean()) for one in low), default=0.0),
            "clip_ratio/high_mean": _mean(high),
            "clip_ratio/high_max": max((float(one.mean()) for one in high), default=0.0),
            "clip_ratio/region_mean": _mean(low) + _mean(high),
        }
        return total, logged | ({} if reference is None else {"kl": _mean(kls)})

    def _mean(self, losses: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        options = self._config.grpo
        sums = torch.stack([weight * one.sum() for one, weight in zip(losses, weights, strict=True)])
        counts = torch.tensor([max(weight * len(one), 1.0) for one, weight in zip(losses, weights, strict=True)])
        if options.loss_type == "grpo":
            return (sums / counts).mean()
        if options.loss_type == "dr_grpo":
            return sums.sum() / (len(losses) * options.max_completion_length)
        return sums.sum() / max(1.0, sum(weight * len(one) for one, weight in zip(losses, weights, strict=True)))

    def logged(self) -> dict[str, float]:
        return self._of_text | self._logged

    def measured(self) -> WrittenRows:
        return WrittenRows(self, self._config.grpo.max_completion_length)


def _split(tensors: Sequence[torch.Tensor], lanes: Sequence[LabelledLane]) -> list[torch.Tensor]:
    """[labels] of lanes to [tokens] of completions."""
    return [part for one, lane in zip(tensors, lanes, strict=False) for part in one.split(lane.counts)]


def _mean(parts: Sequence[torch.Tensor]) -> float:
    """Over all values; 0 of none."""
    return float(torch.cat([part.detach() for part in parts]).mean()) if parts else 0.0


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _lengths(completions: Sequence[Completion]) -> dict[str, float]:
    every = [float(len(one.tokens)) for one in completions]
    ended = [float(len(one.tokens)) for one in completions if one.has_ended]
    logged = {"completions/clipped_ratio": 1 - len(ended) / len(every)}
    for word, found in (("", every), ("terminated_", ended or [0.0])):
        logged |= {
            f"completions/mean_{word}length": float(np.mean(found)),
            f"completions/min_{word}length": min(found),
            f"completions/max_{word}length": max(found),
        }
    return logged
