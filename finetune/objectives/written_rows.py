"""Prompts that are measured by what the model's likeliest text after each of them is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from finetune.decoding import cache_bytes
from finetune.memory.plan import PlanRefused
from finetune.objectives.completions import write_completions
from finetune.offload.streamed_model import StreamedModel
from finetune.planned_run import BatchShape, PlannedRun
from finetune.session import Session

if TYPE_CHECKING:
    from finetune.objectives.grpo import GRPO


class WrittenRows:
    """Every row of the data, the longest prompts first."""

    versions = 1

    def __init__(self, objective: GRPO, max_new_tokens: int) -> None:
        self._objective = objective
        self._max_new_tokens = max_new_tokens
        self._order = np.argsort(-objective.lengths, kind="stable").tolist()
        self.max_length = int(objective.lengths.max()) + max_new_tokens

    def __len__(self) -> int:
        return len(self._order)

    def shape(self, session: Session) -> BatchShape:
        """Of a pass, with as many prompts at once as fit. Raises PlanRefused where not even one does."""
        for shape in self._shapes(session):
            try:
                session.plan(shape)
                return shape
            except PlanRefused as error:
                refused = error
        raise refused

    def beside(self, session: Session, training: BatchShape) -> tuple[PlannedRun, BatchShape]:
        """(the plan of steps of `training` that has room for passes, their shape): with as many prompts at once as leave a step
        its reads, else those that add least to them. Raises PlanRefused where not even one prompt fits."""
        reads, found = session.plan(training).read_bytes, []
        for shape in self._shapes(session):
            try:
                planned = session.plan(training, shape)
            except PlanRefused as error:
                refused = error
                continue
            if planned.read_bytes <= reads:
                return planned, shape
            found.append((planned, shape))
        if not found:
            raise refused
        return min(found, key=lambda one: one[0].read_bytes)

    def _shapes(self, session: Session) -> Iterator[BatchShape]:
        """Of passes, with all prompts at once, with half of them, with a quarter."""
        together, longest = len(self), self.max_length - self._max_new_tokens
        while True:
            kept = cache_bytes(session, longest, self._max_new_tokens, together)
            yield BatchShape.of_text(1, longest, together, train=False).filling_caches(kept)
            if together == 1:
                return
            together = -(-together // 2)

    def measure(
        self, streamed: StreamedModel, together: int, progress: Callable[[int, int], None]
    ) -> dict[str, float]:
        """together: prompts at once. progress: is told the rows that are done, and all."""
        prompts, references, said = [], [], []
        for start in range(0, len(self), together):
            rows = [self._objective.split(row) for row in self._order[start : start + together]]
            likeliest = [[lambda logits: int(logits.argmax())] for _ in rows]
            ids = [prompt for prompt, _ in rows]
            written = write_completions(streamed, ids, likeliest, self._objective.ends, self._max_new_tokens)
            said += [[self._objective.text(one[0])] for one in written]
            prompts += [self._objective.text(prompt) for prompt, _ in rows]
            references += [self._objective.text(reference) for _, reference in rows]
            progress(len(said), len(self))
        total, logged = self._objective.worth(prompts, references, said)
        return {"loss": -float(total.mean()), **logged, "examples": len(self)}
