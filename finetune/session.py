"""From a configuration to an open streamed model: device, dtype, adapter, budget, plan. Shared by train, eval, generate."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters import lora, prefix
from finetune.adapters import peft_files as adapters
from finetune.adapters import saved as saved_adapter
from finetune.adapters.seal import WEIGHTS, trained_on
from finetune.config import Config
from finetune.data.packed_rows import check_positions_argument
from finetune.methods.perturbation_needs import PerturbedWeights, fold_needs, most_product_groups, perturbed_weights
from finetune.methods.weight_needs import (
    check_rounding,
    make_keeping,
    store_size,
    streamed_with_tables,
    trained_weight_needs,
)
from finetune.needs_of_model import (
    adapter_needs,
    batch_needs,
    measure_batch,
    perturbed_adapter_needs,
    process_as_it_is,
    trained_adapter_needs,
)
from finetune.planned_run import BatchShape, MeasuredBatch, PlannedRun
from finetune.runs.identity import check_model, model_name
from finetune.runs.tuned_weights import JournalWeights, StoredWeights, find_result
from memory.arena import Arena, install_arena, trim_malloc, tune_malloc
from memory.errors import UserError
from memory.needs import Needs
from memory.onednn_cache import BYTES_PER_BUFFER, keep_shapes, shapes_to_keep
from memory.plan import Limits, Plan, PlanRefused, make_plan
from memory.units import available_host_bytes, format_bytes, parse_bytes, total_host_bytes
from offload.devices import Device, choose_device
from offload.files.checkpoint import read_header, resolve_model
from offload.noise.noise import Noise
from offload.perturb.perturbed_weights import PerturbedWeights as VariantsOfWeights
from offload.sizing.needs import Streamed, stream_needs
from offload.sizing.positions import longest_row
from offload.step.own_loss import MakeLoss, models_own_loss
from offload.step.weights import Weights
from offload.streamed_model import Options, StreamedModel
from offload.update.parts import TrainedParts, check_storage, find_trained
from offload.update.trained_weights import StoreOptions, TrainedWeights
from offload.weights.finite import first_not_finite
from offload.weights.frozen import FrozenWeights
from offload.weights.parts import cut
from offload.weights.skeleton import is_placeholder
from offload.weights.streamed_parts import Room

HOST_RESERVE_SHARE = 0.05  # of what is available, left to others when no --host-memory is given


class Session:
    """Everything before the first step. `open` may be called once; `close` frees the streamed model."""

    def __init__(self, config: Config, adapter: Path | str | None = None, train: bool = True) -> None:
        """Builds the skeleton with its adapter; reads configuration and headers only.

        adapter: a saved adapter (a directory or a hub id), or the directory of a run, whose result is used: its adapter, or
        the weights that it has tuned. None: a fresh adapter when training, the bare model otherwise.
        Raises UserError for whatever is wrong with model, adapter, run or device.
        """
        self.config = config
        self.train = train
        result = None if adapter is None else find_result(config, saved_adapter.find(adapter))
        self.tuned = result if isinstance(result, (StoredWeights, JournalWeights)) else None
        try:
            self._build(None if self.tuned else result)
        except BaseException:
            self._release_tuned()
            raise

    def _build(self, adapter: Path | None) -> None:
        config, train = self.config, self.train
        if config.engine.num_threads:
            torch.set_num_threads(config.engine.num_threads)
        self.device = choose_device(
            config.device,
            simulated_bytes_per_second=(config.engine.simulated_copy_gbps or float("inf")) * 1e9,
            simulated_delay_seconds=config.engine.simulated_delay_ms / 1e3,
        )
        if self.device.shares_host_memory and config.device_memory is not None:
            print(f"note: --device-memory changes nothing, because this run computes on {self.device.kind}", file=sys.stderr)
        directory = resolve_model(config.model)
        if adapter is None and self.tuned is None:
            saved_adapter.refuse_beside(directory)
        self.parts = cut(
            directory,
            partial(_compute_dtype, config.engine.dtype, self.device, train and config.method != "zo"),
            trust_remote_code=config.trust_remote_code,
            tile_tokens=config.engine.loss_tile_tokens,
            tile_vocab=config.engine.loss_tile_vocab,
            trains_weights=train and config.trains_weights,
        )
        if self.tuned is not None:
            self.parts = self.tuned.place(self.parts)
            print(f"note: with the weights that the run has tuned in {self.tuned.num_steps} steps", file=sys.stderr)
        self.device.warm_up(self.parts.dtype)
        self.model: nn.Module = self.parts.model
        # PEFT writes it into adapters; of a hub id, Transformers knows the cache's path.
        self.model.name_or_path = self.model.config._name_or_path = model_name(config.model)
        self._adapter_notes: list[str] = []
        if adapter is not None:
            if (base := trained_on(adapter)) is not None:
                check_model(f"the adapter in {adapter} was trained on", base, self.parts, config.model)
            self.model, self.parts = saved_adapter.load(self.parts, adapter)
            if base is None and (other := saved_adapter.differing_base(adapter, config.model)):
                self._adapter_notes.append(f"note: the adapter {adapter} says that it was trained on {other}")
        elif train and config.tunes_prefix:
            self.model = prefix.attach(self.model, config.zo.prefix_tokens, config.training.seed)
        elif train and config.has_adapter:
            self.model, targets = lora.attach(
                self.model, config.lora.peft_arguments(), config.training.seed, experts=config.lora.target_modules is not None
            )
            self._adapter_notes += filter(None, [targets.note])
        prefix.take_over(self.model)
        adapters.check_streamable(self.model)
        self.parts = self.parts.read_whole(*adapters.reads_whole(self.model, self.parts))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._adapter = adapter
        if train and config.method == "zo":
            _check_zeroth_order(self.device, self.model)
        self.trained: TrainedParts | None = None
        if train and config.trains_weights:
            self.trained = find_trained(self.parts, config.train)
            check_rounding(config, self.parts, self.trained.fqns)
            for binding in self.parts.bindings:
                binding.convert_at_bind()
        if lora.needs_first_visit(self.model):
            for binding in self.parts.bindings:
                binding.convert_at_bind()
        self.set_training(train)
        self.num_steps = config.training.max_steps  # None: epochs set them, and the trainer will say
        self.perturbs_all = train and config.method == "zo" and not config.has_adapter
        if self.perturbs_all:
            check_storage(self.parts.sources, self.parts.parameters)
            check_rounding(config, self.parts, self.parts.parameters)
        self._longest_row = 0  # of those that were planned for
        self.arena: Arena | None = None
        self.streamed: StreamedModel | None = None
        gc.collect()  # what building the skeleton has left: plans count what the process holds

    def faulty_weight(self) -> str:
        """For messages about numbers that are not finite: the stored tensor that holds such a one. Reads all of them."""
        entries = list(self.parts.checkpoint.tensors.values())
        if self._adapter is not None:
            entries += read_header(self._adapter / WEIGHTS)
        entry = first_not_finite(entries)
        if entry is None:
            return "All stored weights are finite"
        return f"{entry.path} holds infinity or NaN in {entry.name}: bring the file from its source again"

    @property
    def notes(self) -> list[str]:
        """What the user should know about the checkpoint and the adapter."""
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
        return notes + self._adapter_notes

    def set_training(self, training: bool) -> None:
        """Train or eval mode, except for DoRA layers: in eval mode they cache matrices of the weight's size.

        Zeroth-order tuning is always in eval mode: the losses of a step must differ by the perturbation alone.
        """
        self.model.train(training and self.config.method != "zo")
        for module in self.model.modules():
            if hasattr(module, "_cache_clear"):
                module.training = True

    def plan(self, shape: BatchShape, also: BatchShape | None = None, elsewhere: bool = False) -> PlannedRun:
        """also: what must find room between steps. elsewhere: the run will be on another machine.

        Raises PlanRefused when the budgets are too small for one of them, UserError when the machine is too small for the
        budgets.
        """
        limits = self._limits
        if limits.host_bytes > total_host_bytes() and not elsewhere:
            raise UserError(
                f"host_memory: expected at most the {format_bytes(total_host_bytes())} that this machine (or its cgroup) "
                f"has, found {self.config.host_memory}: give less, such as 90%"
            )
        try:
            plan, needs, streamed, batch = self._plan(shape, also)
        except PlanRefused as refused:
            remedy = None if shape.kept_bytes else self._smaller_batch_that_fits(shape, also)
            if remedy is None:
                raise
            raise refused.with_remedy(remedy) from None
        return PlannedRun(
            plan,
            needs,
            streamed,
            batch,
            self.parts,
            self.device.kind,
            None if self.trained is None else store_size(self.config, self.trained),
            self.config.variants if self.train else 1,
            "" if self.config.host_memory is not None else f", which is {1 - HOST_RESERVE_SHARE:.0%} of what is available",
        )

    def _plan(self, shape: BatchShape, also: BatchShape | None) -> tuple[Plan, Needs, Streamed, MeasuredBatch]:
        # Without a backward pass nothing waits for it.
        block_inputs = self.config.engine.activations if shape.train else "host"
        needs, streamed, batch = self._needs(shape, block_inputs)
        if also is not None:
            needs = needs.covering(self._needs(also, block_inputs)[0])
        return make_plan(needs, self._limits), needs, streamed, batch

    def _smaller_batch_that_fits(self, shape: BatchShape, also: BatchShape | None) -> str | None:
        """What the user can lower, where that is enough."""
        for remedy, smaller in shape.smaller():
            if also is not None and also.samples is None:
                tokens = smaller.inputs["input_ids"].shape[1]
                also = also.of_length(tokens) if tokens < shape.inputs["input_ids"].shape[1] else also
            with contextlib.suppress(PlanRefused):
                self._plan(smaller, also)
                return remedy
        return None

    def open(
        self,
        planned: PlannedRun,
        scratch: Path,
        progress: Callable[[str, int, int], None] = lambda *_: None,
        about: Mapping[str, Any] | None = None,
        make_loss: MakeLoss = models_own_loss,
    ) -> StreamedModel:
        """Allocates what the plan names and opens the model; adapters move into the arena or onto the device.

        about: what a working store must say of the run that it belongs to. make_loss: what a step makes small.
        """
        plan = planned.plan
        keep_shapes(shapes_to_keep(planned.shape.micro_batches))
        if plan.arena_bytes:
            self.arena = install_arena(plan.arena_bytes) or None
            # With an arena, what is large and not a tensor is generated code: it goes back to the system at once.
            tune_malloc() if self.arena is None else tune_malloc(mmap_threshold_bytes=BYTES_PER_BUFFER)
        if plan.device_budget_bytes is not None:
            self.device.limit(plan.device_budget_bytes)
        target = self.device.torch_device
        with self.arena.long_lived() if self.arena else contextlib.nullcontext():
            _copy_to(target, [p for p in self.model.parameters() if not is_placeholder(p)])
        if not self.device.shares_host_memory:
            for module in self.model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(target)
        trim_malloc()
        engine = self.config.engine
        open_weights: Callable[[Room], Weights] = FrozenWeights
        if self.train and self.config.method == "zo":
            open_weights = partial(
                VariantsOfWeights,
                noise=Noise(self.config.zo.noise, self.config.zo.noise_rank),
                adapters=None if self.perturbs_all else dict(self._named_trainable()),
                product_groups=most_product_groups(self.config.zo, self.num_steps),
            )
        elif isinstance(self.tuned, JournalWeights):
            open_weights = partial(VariantsOfWeights, noise=self.tuned.journal.noise)
        elif self.trained is not None:
            store = StoreOptions(
                self.config.output / "store", dict(about or {}), self.config.resume, self.config.optimizer.versions
            )
            open_weights = partial(
                TrainedWeights,
                trained=self.trained,
                store=store,
                keeping=make_keeping(self.config),
                seed=self.config.training.seed,
            )
        options = Options(scratch, engine.io_backend, engine.queue_depth, progress)
        self.streamed = StreamedModel(
            self.parts, plan, self.device, options, model=self.model, open_weights=open_weights, make_loss=make_loss
        )
        if isinstance(self.tuned, JournalWeights):
            self.tuned.move(self.streamed.weights)
        if self._adapter is None and lora.needs_first_visit(self.model):
            self.streamed.visit_modules(lora.first_visit)
        return self.streamed

    def _named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def close(self) -> None:
        """Frees the streamed model and its memory; after that the process holds little more than before."""
        if self.streamed is not None:
            self.streamed.close()
            self.streamed = None
            gc.collect()  # its parts refer to each other
        self.device.close()
        if self.arena is not None:
            self.arena.give_back()
            self.arena = None
        trim_malloc()
        self._release_tuned()

    def _release_tuned(self) -> None:
        if self.tuned is not None:
            self.tuned.close()
            self.tuned = None

    @cached_property
    def _limits(self) -> Limits:
        """Once, so that all plans of a session have the same."""
        if self.config.host_memory is None:
            host = int(available_host_bytes() * (1 - HOST_RESERVE_SHARE))
        else:
            host = _amount("host_memory", self.config.host_memory, total_host_bytes())
        device = None
        if not self.device.shares_host_memory:
            if self.config.device_memory is None:
                device = int(self.device.available_bytes() * 0.9)
            else:
                device = _amount("device_memory", self.config.device_memory, self.device.total_bytes())
        return Limits(host, device)

    def _needs(self, shape: BatchShape, block_inputs: str) -> tuple[Needs, Streamed, MeasuredBatch]:
        """Raises UserError for rows that are longer than the model has positions for."""
        if shape.samples is None:
            prefix.check_positions(self.model, shape.inputs["input_ids"].shape[1])
            self._check_positions(shape)
        if shape.packed:
            check_positions_argument(self.parts.model)
        config, parts, trained, engine = self.config, self.parts, self.trained, self.config.engine
        on_device = not self.device.shares_host_memory
        names = [frozenset(unit.fqns) for unit in trained.blocks] if trained else None
        batch = measure_batch(parts, self.model, shape, names)
        streamed = Streamed.of(parts, on_device)
        needs = batch_needs(parts, self.model, batch, block_inputs)
        if trained is not None:
            streamed = streamed_with_tables(streamed, trained)
            needs += trained_weight_needs(config, parts, trained, batch, streamed, on_device)
        elif (perturbed := self._perturbed_weights()) is not None:
            streamed = streamed.holding(perturbed.block_bytes, perturbed.chunk_bytes)
            needs += perturbed.needs
            if self.perturbs_all:
                needs += fold_needs(parts, config.zo, self.num_steps)
        elif not self.train:
            needs += adapter_needs(self.trainable)
        elif config.method == "zo":
            needs += perturbed_adapter_needs(self.trainable, config.variants, on_device, config.tunes_prefix)
        else:
            needs += trained_adapter_needs(self.trainable, on_device)
        adapter_bytes = sum(p.nbytes for p in self.trainable)
        process = process_as_it_is(self.device, parts.dtype, adapter_bytes, shape.micro_batches)
        slots = stream_needs(streamed, on_device, engine.resident_blocks, engine.lookahead)
        return process + slots + needs, streamed, batch

    def _perturbed_weights(self) -> PerturbedWeights | None:
        """None: no weights of the model's own are perturbed or moved."""
        if isinstance(self.tuned, JournalWeights):
            return self.tuned.as_perturbed(self.parts)
        return perturbed_weights(self.parts, self.config.zo, self.num_steps) if self.perturbs_all else None

    def _check_positions(self, shape: BatchShape) -> None:
        length, kind = shape.inputs["input_ids"].shape[1], type(self.parts.model).__name__
        if length > self._longest_row:
            if (limit := longest_row(self.parts, self.model, shape.inputs)) < length:
                raise UserError(
                    f"rows of {length} tokens are longer than the {limit} positions of {kind}: give --sequence-length {limit} "
                    "or less"
                )
            made_for = getattr(self.parts.model.config.get_text_config(), "max_position_embeddings", None) or length
            if length > made_for >= self._longest_row and not shape.packed:
                print(f"note: rows of {length} tokens are longer than the {made_for} that {kind} was made for", file=sys.stderr)
            self._longest_row = length


def _copy_to(device: torch.device, parameters: Sequence[nn.Parameter]) -> None:
    """Gives the parameters memory on `device`; those that share memory (tied adapters) go on sharing it."""
    copies: dict[int, torch.Tensor] = {}
    sharing = Counter(p.untyped_storage().data_ptr() for p in parameters)
    for parameter in parameters:
        storage = parameter.untyped_storage()
        if sharing[storage.data_ptr()] == 1:
            parameter.data = parameter.data.to(device, copy=True)
            continue
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device, copy=True)
        copy = copies[storage.data_ptr()].untyped_storage()
        data = torch.empty(0, dtype=parameter.dtype, device=device)
        parameter.data = data.set_(copy, parameter.storage_offset(), parameter.shape, parameter.stride())


def _check_zeroth_order(device: Device, model: nn.Module) -> None:
    kernels = device.traits.noise_kernels
    if kernels is None:
        raise UserError(f"method zo has no kernels for {device.kind}: use --device cpu")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError(f"method zo needs Triton on {device.kind}, which is not installed: pip install triton")
    if lora.needs_first_visit(model):
        raise UserError(
            "lora.use_dora cannot be combined with method zo, nor can rows and modules that are trained beside the adapter "
            "(lora.extra): leave it out, or use method lora"
        )


def _amount(key: str, amount: Any, total: int) -> int:
    try:
        return parse_bytes(amount, total)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _compute_dtype(word: str, device: Device, has_gradients: bool, stored: torch.dtype) -> torch.dtype:
    """`auto`: as stored, but fp32 where this CPU has no hardware for the stored dtype, and bf16 (on a CPU fp32) in place of
    fp16 where gradients are computed, which are not scaled: small ones would be 0 in fp16.

    Raises UserError for fp16 with gradients.
    """
    if word == "float16" and has_gradients:
        raise UserError(
            "engine.dtype: expected bfloat16 or float32 with methods that have gradients, found float16, in which small "
            "gradients become 0: set engine.dtype to one of these, or leave it auto"
        )
    if word != "auto":
        return getattr(torch, word)
    if not device.multiplies(stored):
        return torch.float32
    if stored == torch.float16 and has_gradients:
        return torch.float32 if device.traits.computes_on_host else torch.bfloat16
    return stored
