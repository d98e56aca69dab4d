"""Runs that step together: each one's own code, and one pass over the weights for what all of them ask for.

[Note: runs that step together]
A run is a greenlet with the same loop, method and files as by itself. Where it asks the model for a step or a pass, it waits
until all runs that go on have asked. Passes, which evaluations ask for, come first; steps are done when all have asked for one.
What is asked for is computed in one go: every lane as it is alone, with its own adapter in place. Then each run goes on with
what it asked for. So nothing in a run knows of the others, and each has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from finetune.adapters.side_by_side import Attached
from finetune.offload.step.engine import AdaptedModel, Versions
from finetune.offload.step.own_loss import StepLoss
from finetune.offload.streamed_model import PassOfRun, StepOfRun, StreamedModel, Traffic
from finetune.runs.signals import Stopped


class ModelOfRun:
    """The open model as one of the runs has it: what the code of a run asks of a `StreamedModel`."""

    def __init__(self, streamed: StreamedModel, adapted: AdaptedModel, loss: StepLoss) -> None:
        self._streamed = streamed
        self._adapted = adapted
        self._loss = loss
        self.parts, self.device, self.head = streamed.parts, streamed.device, streamed.head
        self.weights, self.guesses, self.token_scores = streamed.weights, streamed.guesses, streamed.token_scores

    def train_step(
        self,
        inputs: Sequence[dict[str, Any]],
        labels: Sequence[torch.Tensor | None],
        seeds: Sequence[int],
        versions: Versions | None = None,
    ) -> torch.Tensor:
        return _ask(StepOfRun(inputs, labels, seeds, versions, self._adapted, self._loss))

    def forward(self, inputs: Sequence[dict[str, Any]], variants: Sequence[int] = ()) -> list[Any]:
        return _ask(PassOfRun(inputs, variants, self._adapted))

    def visit_modules(self, visit: Callable[[Iterable[nn.Module]], None]) -> None:
        self._streamed.visit_modules(visit)

    def traffic(self) -> Traffic:
        """Of all runs."""
        return self._streamed.traffic()

    @contextmanager
    def step_traced(self) -> Iterator[None]:
        """A trace has the steps of all runs."""
        yield


def _ask(what: StepOfRun | PassOfRun) -> Any:
    return getcurrent().parent.switch(what)


class SharingRun(Protocol):
    """A run among others. attached: its adapter, once there is one. error: what has ended it, where that was not its end."""

    attached: Attached | None
    error: Exception | None

    def run(self) -> None:
        """From its beginning to its end, in a greenlet that asks for steps and passes."""

    def ended(self) -> None:
        """It is over, and its adapter is out of its places."""


class Together:
    """Has so many runs step together, `places`, and those that wait begin as places become free."""

    def __init__(self, streamed: StreamedModel, places: int) -> None:
        self._streamed = streamed
        self._places = places
        self._going: dict[int, tuple[SharingRun, greenlet, StepOfRun | PassOfRun]] = {}  # by their place in the queue

    def run(self, runs: Sequence[SharingRun]) -> None:
        """To the end of all runs. An error of one ends that one. Raises KeyboardInterrupt, and what no run can go on after,
        when all that are under way have kept what they did."""
        queue = iter(enumerate(runs))
        try:
            while True:
                while len(self._going) < self._places and (found := next(queue, None)) is not None:
                    number, run = found
                    self._go_on(number, run, greenlet(run.run))
                if not self._going:
                    return
                self._serve()
        except BaseException as error:
            self._end_all(error)
            raise

    def _serve(self) -> None:
        passes = {number: asked for number, (_, _, asked) in self._going.items() if isinstance(asked, PassOfRun)}
        if passes:
            found = self._streamed.forward_together(list(passes.values()))
            answers = dict(zip(passes, found, strict=True))
        else:
            with self._streamed.step_traced():
                found = self._streamed.train_together([asked for _, _, asked in self._going.values()])
            answers = dict(zip(self._going, found, strict=True))
        del found
        for number in list(answers):
            run, one, _ = self._going[number]
            self._go_on(number, run, one, answers.pop(number))

    def _go_on(self, number: int, run: SharingRun, one: greenlet, *answer: Any) -> None:
        """Until the run asks again, or ends."""
        self._put_on(run)
        try:
            asked = one.switch(*answer)
        except Exception as error:
            run.error, asked = error, None
        except BaseException:
            self._end(number, run)
            raise
        if one.dead:
            self._end(number, run)
        else:
            self._going[number] = run, one, asked

    def _end_all(self, error: BaseException) -> None:
        """Every run keeps what it did, as after this error in its own step."""
        for number, (run, one, _) in list(self._going.items()):
            self._put_on(run)
            thrown = type(error)(error.number) if isinstance(error, Stopped) else error
            try:
                one.throw(thrown)
            except KeyboardInterrupt as stop:
                if isinstance(error, Stopped):
                    error.step = max(error.step, getattr(stop, "step", 0))
            except Exception as own:
                run.error = own
            self._end(number, run)

    def _put_on(self, run: SharingRun) -> None:
        if run.attached is not None:
            run.attached.put_on()
            self._streamed.weights.enter(0)

    def _end(self, number: int, run: SharingRun) -> None:
        self._going.pop(number, None)
        if run.attached is not None:
            run.attached.take_off()
        run.ended()
