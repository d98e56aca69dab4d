"""A model that runs by streaming: the parts of `ModelParts` with slots, I/O and engine under them.

Ownership: the streamed model allocates the slabs and the I/O engine and frees them in `close`. Adapters are the model's own
parameters and belong to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune.memory.expert_guesses import ExpertGuesses
from finetune.memory.plan import Plan
from finetune.memory.slots import Slab
from finetune.memory.tensor_file import TensorFile, in_file
from finetune.memory.trace import Trace
from finetune.memory.units import format_bytes
from finetune.offload.devices import Device
from finetune.offload.residency.io import QUEUE_DEPTH, REQUEST_BYTES, IOEngine
from finetune.offload.sizing.needs import (
    ACTIVATIONS,
    GRAPHS,
    HIDDEN_STATES,
    LANES_NEAR,
    STAGING_BYTES,
    TEXTS,
    TEXTS_ON_DISK,
)
from finetune.offload.step.activations import Activations, SpillingActivations
from finetune.offload.step.engine import AdaptedModel, Engine, Versions
from finetune.offload.step.head import TiledHead
from finetune.offload.step.head_visits import HeadVisits
from finetune.offload.step.lane_storages import LaneActivations, LaneStorages
from finetune.offload.step.own_loss import MakeLoss, StepLoss, StepLosses, models_own_loss
from finetune.offload.step.tiled_loss import TokenScores
from finetune.offload.step.tiled_modules import TiledModules
from finetune.offload.step.traced_weights import TracedWeights
from finetune.offload.step.weights import Block, HeadChunk, Weights
from finetune.offload.weights.embedding import RowsOnDemand
from finetune.offload.weights.frozen import FrozenWeights
from finetune.offload.weights.parts import ModelParts
from finetune.offload.weights.skeleton import input_table
from finetune.offload.weights.streamed_parts import Room


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has gone over the disk, and how long the step waited for it, since the model was opened."""

    read_bytes: int  # from disk
    write_bytes: int  # to disk
    stall_seconds: float  # in which compute waited for bytes


class Options(NamedTuple):
    """What changes no result, but for rounding. scratch: directory for spilled activations. queue_depth: None: the I/O engine's
    own. progress: progress(phase, done, total) after every block visit. trace: gets what steps do; None: nobody wants to know.
    sequence_chunk: as in the engine."""

    scratch: Path
    io_backend: str = "auto"  # auto, io_uring or threads
    queue_depth: int | None = None
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    trace: Trace | None = None
    sequence_chunk: int | None = None


class StepOfRun(NamedTuple):
    """What one of several runs asks of a step that they do together: the arguments of `StreamedModel.train_step`, and of whose
    model the lanes are, and what is made of them."""

    inputs: Sequence[dict[str, Any]]
    labels: Sequence[torch.Tensor | None]
    seeds: Sequence[int]
    versions: Versions | None
    model: AdaptedModel
    loss: StepLoss


class PassOfRun(NamedTuple):
    """The same of a forward pass, as `StreamedModel.forward` has it."""

    inputs: Sequence[dict[str, Any]]
    variants: Sequence[int]
    model: AdaptedModel


class StreamedModel:
    """Opens a planned model: allocates everything that the plan names, reads the edges, takes over the forwards."""

    def __init__(
        self,
        parts: ModelParts,
        plan: Plan,
        device: Device,
        options: Options,
        *,
        model: nn.Module | None = None,
        open_weights: Callable[[Room], Weights] = FrozenWeights,
        make_loss: MakeLoss = models_own_loss,
    ) -> None:
        """model: what to call, where adapters wrap `parts.model`. open_weights: what becomes of weights while they are near.
        make_loss: what a step makes small."""
        self.parts = parts
        self.model = parts.model if model is None else model
        self.device = device
        self.guesses = ExpertGuesses()
        """Of experts, for passes of few tokens, where experts are streamed."""
        with ExitStack() as closing:
            after_io = closing.enter_context(ExitStack())
            self.io = IOEngine(options.io_backend, options.queue_depth or QUEUE_DEPTH, REQUEST_BYTES, STAGING_BYTES)
            closing.callback(self.io.close)
            host = computing = Slab(device.allocate_host_slab(plan.host_slab_bytes))
            self.io.register_buffer(host.buffer.data_ptr(), host.buffer.numel())
            if not device.shares_host_memory:
                computing = Slab(device.allocate_slab(plan.device_slab_bytes))
            self.embeddings = [
                RowsOnDemand(module, source, parts.dtype, self.io, device.torch_device)
                for _, module, source in parts.embeddings
            ]
            self.weights = open_weights(
                Room(
                    parts, self.model, plan, device, self.io, host, computing, options.scratch, self.embeddings,
                    closing, after_io, self.guesses,
                )  # fmt: skip
            )
            weights, self._trace = self.weights, options.trace
            if options.trace is not None:
                weights = TracedWeights(weights, options.trace)
                self.io.keep_log(True)
            self.activations = self._open_activations(plan, host, options.scratch)
            closing.callback(self.activations.close)
            self._file: TensorFile | None = None
            """Where what is as long as a text lies, in passes whose texts are cut."""
            if plan.count(TEXTS):
                self._file = TensorFile(options.scratch, plan.disk_parts[TEXTS_ON_DISK])
                closing.callback(self._file.close)
            self._storages: LaneStorages | None = None
            if isinstance(self.activations, LaneActivations):
                self._storages = LaneStorages(self.activations, self._outside_of_blocks(), 1 + plan.count(LANES_NEAR))
            self.head: TiledHead | None = None
            if parts.head is not None:
                module = self.model.get_output_embeddings()  # the head itself, or the adapter that wraps it
                self._head_visits = HeadVisits(weights)
                self.head = TiledHead(module, self._head_visits, len(parts.head.layouts), parts.head.tile_tokens)
                if self._storages is not None:
                    self.head.lanes_together = self._storages.most_near
            self._loss = make_loss(parts.model, self.head)
            self._own_loss = models_own_loss(parts.model, self.head)
            self._kept_graphs = plan.count(GRAPHS)
            self.engine = Engine(
                self.model, parts.blocks, weights, self.activations, options.progress, self._kept_graphs,
                options.sequence_chunk,
            )
            closing.callback(self.engine.close)
            if options.sequence_chunk is not None:
                outside = [module for module in self._outside_of_blocks() if isinstance(module, nn.Module)]
                closing.callback(TiledModules(outside, options.sequence_chunk).close)
            self._closing = closing.pop_all()

    def _open_activations(self, plan: Plan, host: Slab, scratch: Path) -> Activations:
        given = [plan.slots[name] for name in (ACTIVATIONS, HIDDEN_STATES) if plan.count(name)]
        if not given:
            return Activations()
        pool = host.carve(given[0].pool.name, given[0].slot_bytes, sum(slots.count for slots in given))
        if plan.count(HIDDEN_STATES):
            return LaneActivations(self.io, pool, self.device.torch_device, scratch)
        return SpillingActivations(self.io, pool, 0, self.device.torch_device, scratch)

    def _outside_of_blocks(self) -> list[Any]:
        """The model's modules, and what reads rows of its embeddings."""
        inside = {module for block in self.parts.blocks for module in block.modules()}
        return [*(module for module in self.model.modules() if module not in inside), *self.embeddings]

    def train_step(
        self,
        inputs: Sequence[dict[str, Any]],
        labels: Sequence[torch.Tensor | None],
        seeds: Sequence[int],
        versions: Versions | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one step; the loss, fp32 []. Gradients are left in `.grad`.

        inputs: keyword arguments of the model's forward per micro-batch. labels: what it takes as `labels`; None where the
        loss is of other arguments. versions: as in the engine.
        By default the loss is that of the model's own forward, of all rows of the step together: each micro-batch's counts as
        its share of the labelled tokens (or of what else the loss is a mean of).
        """
        self._begin(inputs, self._storages)
        inputs, watched = _labelled(inputs, labels), self._loss.watch(len(inputs))
        backward = partial(self._loss.backward, inputs=inputs, watched=watched)
        loss = self.engine.train_step(inputs, seeds, backward, watched, versions, self._storages)
        self._check_file()
        return loss

    def adapted(self, model: nn.Module, put_on: Callable[[], None]) -> AdaptedModel:
        """`model`, an adapter around the one of the parts, as one of several; its layers are in their places now, and whenever
        `put_on` was called."""
        return AdaptedModel(model, self.parts.blocks, self._kept_graphs, put_on)

    def train_together(self, runs: Sequence[StepOfRun]) -> list[torch.Tensor]:
        """`train_step` of each of the runs, with each block, and the head, fetched once for all of them. No lane waits on
        disk."""
        inputs = [_labelled(run.inputs, run.labels) for run in runs]
        watched = [run.loss.watch(len(run.inputs)) for run in runs]
        self._begin([kwargs for one in inputs for kwargs in one])
        # Lanes that only go forward come last.
        places = [(r, i) for r, run in enumerate(runs) for i in range(len(run.inputs))]
        places.sort(key=lambda place: not _has_gradients(runs[place[0]], place[1]))
        trained = sum(_has_gradients(runs[r], i) for r, i in places)
        variants = [0 if (met := runs[r].versions) is None else met.of_lanes[i] for r, i in places]
        versions = Versions(variants, trained, [runs[r].model for r, _ in places])

        def backward(outputs: list[Any]) -> torch.Tensor:
            found = dict(zip(places, outputs, strict=True))
            losses = [
                partial(
                    run.loss.backward, [found[r, i] for i in range(len(run.inputs))], inputs=inputs[r], watched=watched[r]
                )
                for r, run in enumerate(runs)
            ]
            return torch.stack(self._run_losses(losses))

        around = [watched[r][i] if watched[r] else nullcontext() for r, i in places]
        seeds = [runs[r].seeds[i] for r, i in places]
        losses = self.engine.train_step([inputs[r][i] for r, i in places], seeds, backward, around, versions)
        self._check_file()
        return list(losses)

    def _run_losses(self, losses: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        return [loss() for loss in losses] if self.head is None else self._head_visits.run(losses)

    def forward_together(self, runs: Sequence[PassOfRun]) -> list[list[Any]]:
        """`forward` of each of the runs, with each block fetched once for all of them."""
        inputs = [kwargs for run in runs for kwargs in run.inputs]
        self._begin(inputs)
        variants = [variant for run in runs for variant in run.variants or [0] * len(run.inputs)]
        outputs = iter(self.engine.forward(inputs, variants, models=[run.model for run in runs for _ in run.inputs]))
        self._check_file()
        return [[next(outputs) for _ in run.inputs] for run in runs]

    def step_losses(
        self,
        inputs: Sequence[dict[str, Any]],
        labels: Sequence[torch.Tensor | None],
        variants: int = 1,
        keep_outputs: bool = False,
        models_own: bool = False,
    ) -> StepLosses:
        """The loss as in `train_step`, without gradients, under every variant of the weights; each block is fetched once.

        keep_outputs: whether the result has the model's outputs. They are in memory, all of them. models_own: whether it is
        instead that of the model's own forward, as it is by default, whatever is made small."""
        loss = self._own_loss if models_own else self._loss
        storages = None if keep_outputs else self._storages
        self._begin(inputs, storages)
        inputs, watched = _labelled(inputs, labels), loss.watch(len(inputs) * variants)
        lanes = [variant for variant in range(variants) for _ in inputs]
        outputs = self.engine.forward(inputs * variants, lanes, watched, storages)
        with nullcontext() if storages is None else storages.guarded():
            found = loss.values(outputs, inputs, watched, variants)
        self._check_file()
        return found if keep_outputs else found._replace(outputs=[])

    def forward(self, inputs: Sequence[dict[str, Any]], variants: Sequence[int] = ()) -> list[Any]:
        """Model outputs without gradients; `logits` are deferred where the head is tiled. variants as in the engine."""
        self._begin(inputs)
        outputs = self.engine.forward(inputs, variants)
        self._check_file()
        return outputs

    def last_logits(self, outputs: Sequence[Any], variants: Sequence[int] = ()) -> list[torch.Tensor]:
        """Logits of the last position of each output of `forward`, fp32 [B, V]."""
        if self.head is None:
            return [output.logits[:, -1].float() for output in outputs]
        found = self.head.last_logits([output.logits for output in outputs], variants)
        self._check_file()
        return found

    def token_scores(
        self, logits: Sequence[Any], labels: Sequence[torch.Tensor], variants: Sequence[int] = (), predicts: bool = False
    ) -> list[TokenScores]:
        """As `TiledHead.token_scores`, of deferred logits that `forward` has given."""
        found = self.head.token_scores(logits, labels, variants, predicts)
        self._check_file()
        return found

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the disk is read."""
        notes = list(self.io.notes)
        if self.io.backend_reason:
            notes.append(f"disk I/O through {self.io.backend}: {self.io.backend_reason}")
        return notes

    def traffic(self) -> Traffic:
        stall = self.weights.stall_seconds + self.activations.stall_seconds
        stall += sum(embedding.stall_seconds for embedding in self.embeddings)
        return Traffic(self.io.read_bytes, self.io.write_bytes, stall)

    @contextmanager
    def step_traced(self) -> Iterator[None]:
        """What happens inside is a step, for the trace, where there is one."""
        trace = self._trace
        if trace is None:
            yield
            return
        self.io.take_log()
        trace.begin_step()
        yield
        for transfer in self.io.take_log():
            words = f"{'write' if transfer.is_write else 'read'} {format_bytes(transfer.num_bytes)}"
            trace.add("disk", words, transfer.started, transfer.finished)
        trace.end_step()

    def visit_modules(self, visit: Callable[[Iterable[nn.Module]], None]) -> None:
        """Calls `visit(modules)` with all modules, a part of them at a time, while their weights are bound: what is resident,
        the head, where it is of one chunk, and every block."""
        streamed = set()
        for block in self.parts.blocks:
            streamed.update(block.modules())
        head = None if self.head is None else self.model.get_output_embeddings()
        if head is not None:
            streamed.update(head.modules())
        visit(module for module in self.model.modules() if module not in streamed)
        self.weights.begin_pass()
        if head is not None and len(self.parts.head.layouts) == 1:
            self.weights.acquire(HeadChunk(0))
            visit(head.modules())
            self.weights.release(HeadChunk(0))
        self.weights.begin(range(len(self.parts.blocks)))
        for index, block in enumerate(self.parts.blocks):
            self.weights.acquire(Block(index))
            visit(block.modules())
            self.weights.release(Block(index))

    def close(self) -> None:
        """Waits for all I/O, frees the slots; every part is closed even if one fails. The model keeps its adapters."""
        self._closing.close()

    def _begin(self, inputs: Sequence[dict[str, Any]], storages: LaneStorages | None = None) -> None:
        """Of a pass: what it reads outside of blocks is on its way, or there. Where lanes wait on disk, rows of an embedding
        are read for one after the other, but for those that are trained."""
        self.weights.begin_pass()
        ids = [kwargs["input_ids"].reshape(-1) for kwargs in inputs if "input_ids" in kwargs]
        input_embedding = input_table(self.model) if ids else None
        found = [one for one in self.embeddings if input_embedding is not None and one.serves(input_embedding)]
        by_lane = [one for one in found if storages is not None and len(ids) == len(inputs) and not one.trained]
        for embedding in found:
            if embedding not in by_lane:
                with in_file(not embedding.trained):
                    embedding.read(torch.cat(ids))

        def begin_lane(index: int) -> None:
            for embedding in by_lane:
                embedding.read(ids[index % len(ids)])

        if storages is not None:
            storages.begin_step(inputs, begin_lane)

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()


def _has_gradients(run: StepOfRun, lane: int) -> bool:
    return run.versions is None or lane < run.versions.trained


def _labelled(
    inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor | None]
) -> list[dict[str, Any]]:
    return [kwargs if y is None else {**kwargs, "labels": y} for kwargs, y in zip(inputs, labels, strict=True)]
