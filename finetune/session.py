"""From a configuration to an open streamed model: device, dtype, adapter, budget, plan. Shared by train, eval, generate."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from finetune.adapters.base import adapter_of
from finetune.adapters.lora_sums import sum_in_one_pass
from finetune.adapters.peft_files import reads_whole
from finetune.adapters.placement import copy_to
from finetune.config import Config
from finetune.data.tokenizer_files import split_note
from finetune.machines.profiles import find_machine
from finetune.memory.arena import Arena, install_arena, trim_malloc, tune_malloc
from finetune.memory.errors import UserError
from finetune.memory.machine import MachineProfile
from finetune.memory.mapped_files import read_code_in_small_pieces
from finetune.memory.onednn_cache import BYTES_PER_BUFFER, keep_shapes, shapes_to_keep
from finetune.memory.trace import Trace
from finetune.objectives.registry import find_objective
from finetune.offload.devices import DescribedDevice, Device, choose_device
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.sizing.needs import TEXTS
from finetune.offload.step.own_loss import MakeLoss, models_own_loss
from finetune.offload.step.rms_norm import norms_in_few_passes
from finetune.offload.streamed_model import Options, StreamedModel
from finetune.offload.weights.finite import first_not_finite
from finetune.offload.weights.parts import ModelParts, cut
from finetune.offload.weights.skeleton import is_placeholder
from finetune.planned_run import BatchShape, PlannedRun
from finetune.planner import Planner
from finetune.quantization.base import Base, open_base
from finetune.runs.identity import model_name
from finetune.setup import Setup


def _choose_device(config: Config, machine: MachineProfile | None) -> Device:
    """machine: another than this one. Raises UserError for a device that is not there."""
    if machine is None:
        return choose_device(
            config.device,
            simulated_bytes_per_second=(config.engine.simulated_copy_gbps or float("inf")) * 1e9,
            simulated_delay_seconds=config.engine.simulated_delay_ms / 1e3,
        )
    there = "cpu" if machine.accelerator is None else machine.accelerator.kind
    return DescribedDevice(there if config.device == "auto" else config.device, machine)


class Session:
    """Everything before the first step. `open` may be called once; `close` frees the streamed model."""

    def __init__(self, setup: Setup, only_plan: bool = False) -> None:
        """Builds the skeleton as `setup` wants it; reads configuration and headers only, or quantises first what is to be
        quantised. Closes `setup` in the end.

        only_plan: it will not be opened, and nothing is quantised.

        Raises UserError for whatever is wrong with model, adapter, run or device.
        """
        self.config = setup.config
        self.setup = setup
        self.process_bytes: int | None = None  # that plans count for the process; None: what it has when they are made
        self.base: Base | None = None
        try:
            self._build(only_plan)
        except BaseException:
            self._close_files()
            raise

    def _build(self, only_plan: bool) -> None:
        config, setup = self.config, self.setup
        if config.engine.num_threads:
            torch.set_num_threads(config.engine.num_threads)
        if config.machine is not None and not only_plan:
            raise UserError("machine: only plans are made for another machine: leave it out of what runs on this one")
        self.machine = None if config.machine is None else find_machine(config.machine)
        self.device = _choose_device(config, self.machine)
        if self.device.shares_host_memory and config.device_memory is not None:
            print(f"note: --device-memory changes nothing, because this run computes on {self.device.kind}", file=sys.stderr)
        source = resolve_model(config.model)
        setup.only_plan = only_plan
        setup.check_model(source)
        choose_dtype = partial(setup.compute_dtype, self.device)
        self.base = open_base(config, source, self.device, choose_dtype, only_plan)
        parts = cut(
            self.base.directory,
            choose_dtype,
            trust_remote_code=config.trust_remote_code,
            tile_tokens=config.engine.loss_tile_tokens,
            tile_vocab=config.engine.loss_tile_vocab,
            score_seed=config.training.seed if find_objective(config.objective).scores else None,
            **setup.cut_options(),
        )
        self._check_decodes(parts)
        self.device.warm_up(parts.dtype)
        # PEFT writes it into adapters; of a hub id, Transformers knows the cache's path.
        parts.model.name_or_path = parts.model.config._name_or_path = model_name(config.model)
        own_buffers = {id(buffer) for buffer in parts.model.buffers()}
        self.model, parts = setup.wrap(parts)
        self.adapter = adapter_of(self.model)
        if self.adapter.needs_whole_texts and config.engine.sequence_chunk is not None:
            word = self.model.active_peft_config.peft_type.lower()
            raise UserError(f"engine.sequence_chunk: not offered with an adapter of kind {word} yet: leave it out")
        self.adapter.take_over()
        if self.device.traits.computes_on_host:
            sum_in_one_pass(self.model)
            norms_in_few_passes(parts.blocks)
        self.parts = parts.read_whole(*reads_whole(self.model, parts))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.adapter_parameters = [p for p in self.model.parameters() if not is_placeholder(p)]
        self.adapter_buffers = [b for b in self.model.buffers() if id(b) not in own_buffers]
        setup.prepare(self)
        read = self.adapter.reads_weights
        for binding in self.parts.bindings:
            binding.convert_at_bind(read)
        self.set_training(True)
        self.planner = Planner(self)
        self.arena: Arena | None = None
        self.streamed: StreamedModel | None = None
        gc.collect()  # what building the skeleton has left: plans count what the process holds

    def _check_decodes(self, parts: ModelParts) -> None:
        """Raises UserError for weights that the device can't make numbers of."""
        stored = {weight.word for weight in parts.sources.values() if weight.needs_host}
        if stored and not self.device.traits.computes_on_host:
            raise UserError(
                f"{parts.directory}: the weights are stored as {' and '.join(sorted(stored))}, which only a CPU decodes yet, "
                f"and this run computes on {self.device.kind}: use the original model, or --device cpu"
            )

    def faulty_weight(self) -> str:
        """For messages about numbers that are not finite: the stored tensor that holds such a one. Reads all of them."""
        entry = first_not_finite([*self.parts.checkpoint.tensors.values(), *self.setup.own_tensors()])
        if entry is None:
            return "All stored weights are finite"
        return f"{entry.path} holds infinity or NaN in {entry.name}: bring the file from its source again"

    @property
    def notes(self) -> list[str]:
        """What the user should know about the checkpoint, and what was put around the model."""
        sources = self.parts.sources
        notes = [
            f"note: config.json ties {target} to {source}, but the checkpoint holds both with different values: they "
            "stay two weights, as in Transformers"
            for target, source in sources.apart
        ]
        if unused := sources.unused:
            notes.append(
                f"note: {len(unused)} tensors of the checkpoint belong to no parameter of {type(self.parts.model).__name__} "
                f"and are not used ({', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''})"
            )
        if (note := split_note(self.parts.directory)) is not None:
            notes.append(note)
        forms = dict.fromkeys(weight.note for weight in sources.values() if weight.note)
        return notes + [f"note: {note}" for note in forms] + self.setup.notes

    def set_training(self, training: bool) -> None:
        """Before steps, or before something is measured. DoRA layers stay in train mode: in eval mode they cache matrices of
        the weight's size."""
        self.setup.set_mode(self.model, training)
        for module in self.model.modules():
            if hasattr(module, "_cache_clear"):
                module.training = True

    def settle(self, config: Config) -> None:
        """Goes on with `config`, which says a number where the one before left it open, and nothing else that is new."""
        self.config = self.setup.config = config

    @property
    def on_device(self) -> bool:
        """Whether compute has memory of its own."""
        return not self.device.shares_host_memory

    def plan(self, shape: BatchShape, also: BatchShape | None = None, elsewhere: bool = False) -> PlannedRun:
        """See `finetune.planner.Planner.plan`."""
        return self.planner.plan(shape, also, elsewhere)

    def least_memory(self, shape: BatchShape) -> tuple[int, int | None]:
        """See `finetune.planner.Planner.least_memory`."""
        return self.planner.least_memory(shape)

    def before_products(self, shape: BatchShape) -> None:
        """Bounds what a process holds for its code. Of no effect after its first product in 16 bits."""
        read_code_in_small_pieces()
        keep_shapes(shapes_to_keep(shape.micro_batches, bool(self.parts.experts)))

    def open(
        self,
        planned: PlannedRun,
        scratch: Path,
        progress: Callable[[str, int, int], None] = lambda *_: None,
        make_loss: MakeLoss = models_own_loss,
        trace: Trace | None = None,
    ) -> StreamedModel:
        """Allocates what the plan names and opens the model; adapters move into the arena or onto the device.

        make_loss: what a step makes small. trace: gets what steps do.
        """
        plan = planned.plan
        self.before_products(planned.shape)
        if plan.arena_bytes:
            self.arena = install_arena(plan.arena_bytes) or None
            # With an arena, what is large and not a tensor is generated code: it goes back to the system at once.
            tune_malloc() if self.arena is None else tune_malloc(mmap_threshold_bytes=BYTES_PER_BUFFER)
        if plan.count(TEXTS) and not self.arena:
            raise UserError(
                "engine.hidden_states: tensors of texts can't be on disk, because torch's memory can't be taken over on this "
                "system: give more memory, or set it to host"
            )
        if plan.device_budget_bytes is not None:
            self.device.limit(plan.device_budget_bytes)
        self._move_in(self.model.modules())
        trim_malloc()
        engine, chunk = self.config.engine, self.config.engine.sequence_chunk
        if planned.shape.fills_caches:  # whose prompts go through in pieces, see `finetune.decoding`
            chunk = None
        self.streamed = StreamedModel(
            self.parts, plan, self.device,
            Options(scratch, engine.io_backend, engine.queue_depth, progress, trace, chunk),
            model=self.model, open_weights=self.setup.open_weights(self), make_loss=make_loss,
        )  # fmt: skip
        self.setup.opened(self)
        return self.streamed

    def _move_in(self, modules: Iterable[nn.Module]) -> None:
        """What is of numbers in these modules moves into the arena, or onto the device."""
        modules, target = list(modules), self.device.torch_device
        own = dict.fromkeys(p for module in modules for p in module._parameters.values() if p is not None)
        with self.arena.long_lived() if self.arena else contextlib.nullcontext():
            copy_to(target, [p for p in own if not is_placeholder(p)])
        if not self.device.shares_host_memory:
            for module in modules:
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(target)

    def close(self) -> None:
        """Frees the streamed model and its memory; after that the process holds little more than before."""
        try:
            if self.streamed is not None:
                self.streamed.close()
                self.streamed = None
                gc.collect()  # its parts refer to each other
            self.device.close()
            if self.arena is not None:
                self.arena.give_back()
                self.arena = None
            trim_malloc()
        finally:
            self._close_files()  # another run may take them, whatever failed

    def _close_files(self) -> None:
        if self.base is not None:
            self.base.close()
        self.setup.close()
