"""From a configuration to an open streamed model: device, dtype, adapter, budget, plan. Shared by train, eval, generate."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from math import isqrt, prod
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
from finetune.methods.perturbation_demand import PerturbationDemand, most_product_groups, perturbation_demand
from finetune.methods.weight_demand import (
    check_rounding,
    largest_piece_bytes,
    make_keeping,
    make_rule,
    store_size,
    training_temporaries,
    update_host_bytes,
)
from finetune.planned_run import BatchShape, PlannedRun
from finetune.runs.identity import check_model, model_name
from finetune.runs.tuned_weights import JournalWeights, StoredWeights, find_result
from memory.arena import Arena, install_arena, trim_malloc, tune_malloc
from memory.errors import UserError
from memory.meter import host_bytes
from memory.onednn_cache import BYTES_PER_BUFFER, BYTES_PER_SHAPE, keep_shapes, shapes_to_keep
from memory.plan import Demand, Limits, Wishes, make_plan
from memory.units import available_host_bytes, format_bytes, parse_bytes, total_host_bytes
from offload.devices import Device, choose_device
from offload.files.checkpoint import read_header, resolve_model
from offload.noise.noise import Noise
from offload.perturb.perturbed_model import PerturbedModel
from offload.sizing.dry_run import MaskSize, VisitSize, measure_masks, measure_visit, walk
from offload.sizing.positions import longest_row
from offload.streamed_model import StreamedModel
from offload.update.parts import TrainedParts, check_storage, find_trained
from offload.update.trained_model import TrainedModel
from offload.weights.finite import first_not_finite
from offload.weights.layout import aligned_bytes
from offload.weights.parts import cut
from offload.weights.skeleton import is_placeholder

OPTIMIZER_BYTES_PER_PARAMETER = 8  # AdamW: exp_avg and exp_avg_sq in fp32, adapters' own dtype
COMPUTE_BOUND_TOKENS = 2048
"""A trained weight takes 8 operations a token and moves some 26 bytes a step: with so many tokens a CPU computes longer than
its disk moves."""
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
            print(f"note: --device-memory changes nothing, for this run computes on {self.device.kind}", file=sys.stderr)
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
        demand, visit = self._demand(shape)
        if also is not None:
            demand = demand.covering(self._demand(also)[0])
        engine = self.config.engine
        activations = engine.activations if shape.train else "host"  # nothing waits for a backward pass
        plan = make_plan(demand, limits, Wishes(engine.resident_blocks, engine.lookahead, activations))
        perturbed = self._perturbation_demand()
        return PlannedRun(
            plan,
            demand,
            visit,
            self.parts,
            shape,
            self.device.kind,
            tuple(self.trainable),
            perturbed.folded_bytes if perturbed else 0,
            None if self.trained is None else store_size(self.config, self.trained),
            self.config.variants if self.train else 1,
            "" if self.config.host_memory is not None else f", which is {1 - HOST_RESERVE_SHARE:.0%} of what is available",
        )

    def open(
        self,
        planned: PlannedRun,
        scratch: Path,
        progress: Callable[[str, int, int], None] = lambda *_: None,
        about: Mapping[str, Any] | None = None,
    ) -> StreamedModel:
        """Allocates what the plan names and opens the model; adapters move into the arena or onto the device.

        about: what a working store must say of the run that it belongs to.
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
        options = {
            "model": self.model,
            "io_backend": engine.io_backend,
            "queue_depth": engine.queue_depth,
            "progress": progress,
        }
        if self.train and self.config.method == "zo":
            adapters = None if self.perturbs_all else dict(self._named_trainable())
            self.streamed = PerturbedModel(
                self.parts,
                plan,
                self.device,
                scratch,
                noise=Noise(self.config.zo.noise, self.config.zo.noise_rank),
                adapters=adapters,
                product_groups=most_product_groups(self.config.zo, self.num_steps),
                **options,
            )
        elif isinstance(self.tuned, JournalWeights):
            self.streamed = PerturbedModel(
                self.parts, plan, self.device, scratch, noise=self.tuned.journal.noise, **options
            )
            self.tuned.move(self.streamed)
        elif self.trained is not None:
            self.streamed = TrainedModel(
                self.parts,
                plan,
                self.device,
                scratch,
                trained=self.trained,
                store_directory=self.config.output / "store",
                about=dict(about or {}),
                resume=self.config.resume,
                versions=self.config.optimizer.versions,
                keeping=make_keeping(self.config),
                seed=self.config.training.seed,
                **options,
            )
        else:
            self.streamed = StreamedModel(self.parts, plan, self.device, scratch, **options)
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

    def _demand(self, shape: BatchShape) -> tuple[Demand, VisitSize]:
        parts, lanes = self.parts, shape.micro_batches
        if shape.samples is None:
            prefix.check_positions(self.model, shape.inputs["input_ids"].shape[1])
            self._check_positions(shape)
        if shape.packed:
            check_positions_argument(self.parts.model)
        trained = self.trained
        names = [frozenset(unit.fqns) for unit in trained.blocks] if trained else None
        measured = (parts, self.model, shape.inputs, shape.train, names)
        visit = measure_visit(*measured) if shape.samples is None else walk(*measured).size
        itemsize = parts.dtype.itemsize
        adapter_bytes = sum(p.nbytes for p in self.trainable)
        state = adapter_bytes
        if shape.train:
            state += adapter_bytes + OPTIMIZER_BYTES_PER_PARAMETER * sum(p.numel() for p in self.trainable)
        elif self.train:
            state += sum(4 * p.numel() + self.config.variants * p.nbytes for p in self.trainable)
        head = parts.head
        loss_bytes, step = 0, shape.kept_bytes
        if head is not None:
            hidden_size = head.module.weight.shape[1]
            tile = min(head.tile_tokens, shape.rows)
            # logits in the model's dtype, in fp32, their softmax and its gradient; a converted weight where dtypes differ
            loss_bytes = tile * head.tile_vocab * (3 * 4 + (itemsize if itemsize < 4 else 0))
            if self.model.get_output_embeddings() is not head.module:
                loss_bytes += 3 * tile * head.tile_vocab * itemsize  # an adapter's product, scaled, and the sum
            if head.layouts[0].views["weight"].dtype != parts.dtype:
                loss_bytes += head.tile_vocab * hidden_size * itemsize
            # hidden states of every lane before the head and their gradients; a head in chunks keeps sums in fp32
            per_row = hidden_size * (3 * itemsize + (4 if len(head.layouts) > 1 else 0)) + 64
            step += lanes * shape.rows * per_row
        elif (output := self.model.get_output_embeddings()) is not None:  # whole logits, of every lane until the loss is there
            logits_bytes = shape.rows * output.weight.shape[0] * itemsize
            loss_bytes, step = 3 * logits_bytes, step + lanes * logits_bytes
        for _, _, source in parts.embeddings:
            row_bytes = source.num_bytes // source.shape[0] + prod(source.shape[1:]) * itemsize
            step += min(lanes * shape.rows, source.shape[0]) * row_bytes
        edge_bytes = parts.edge_bytes
        block_bytes = [layout.num_bytes for layout in parts.layouts]
        head_chunk_bytes = max((layout.num_bytes for layout in head.layouts), default=0) if head else 0
        loss_bytes += adapters.table_bytes(self.model, parts)
        temporaries, perturbed = max(visit.peak_bytes, loss_bytes), self._perturbation_demand()
        if shape.samples is None or "input_ids" in shape.inputs:
            masks = self._masks(shape)
            step += lanes * (masks.kept_bytes + prefix.lane_bytes(self.model, itemsize))
            temporaries = max(temporaries, masks.made_bytes)
        if perturbed is not None:
            block_bytes, head_chunk_bytes = perturbed.block_bytes, perturbed.head_chunk_bytes
            edge_bytes = perturbed.edge_bytes
            temporaries += perturbed.visit_bytes
        if not self.device.shares_host_memory:
            block_bytes = [max(pair) for pair in zip(block_bytes, map(aligned_bytes, parts.layouts), strict=True)]
            head_chunk_bytes = max([head_chunk_bytes, *(aligned_bytes(x) for x in (head.layouts if head else ()))])
        state_slot_bytes = 0
        waiting_state_slots = update_image_bytes = update_gradients_bytes = 0
        if trained is not None:
            state_slot_bytes = largest_piece_bytes(self.config, trained)
            store = store_size(self.config, trained)
            shares = self.device.shares_host_memory
            computes_long = store.trained_share == 1 and shares and lanes * shape.rows >= COMPUTE_BOUND_TOKENS
            # Buffers may be as large as what a rule with directions keeps of a whole unit, and the disk has little to do there.
            if computes_long and not make_rule(self.config, of_blocks=True).has_directions:
                waiting_state_slots = max(len(unit.pieces) for unit in trained.blocks)
            host_edge_bytes = 2 * edge_bytes  # the image of what is stored, and gradients on their way to it
            edge_bytes += host_edge_bytes if shares else edge_bytes
            head_chunk_bytes = max([head_chunk_bytes, *(part.unit.layout.num_bytes for part in trained.table)])
            temporaries, waiting = training_temporaries(
                self.config, parts, trained, visit.peak_bytes, loss_bytes, lanes
            )
            rows_bytes = sum(
                min(lanes * shape.rows, source.shape[0]) * prod(source.shape[1:]) * itemsize
                for _, _, source in parts.embeddings
            )
            step += 2 * rows_bytes  # gradients of the rows, and what one micro-batch adds to them
            if shares:
                step += waiting
            else:
                update_image_bytes = max(*block_bytes, head_chunk_bytes)
                update_gradients_bytes = update_host_bytes(self.config, trained, itemsize) + host_edge_bytes + rows_bytes
        demand = Demand(
            block_bytes=tuple(block_bytes),
            head_chunk_bytes=head_chunk_bytes,
            head_chunks=(len(head.layouts) if head else 0) + (len(trained.table) if trained else 0),
            state_bytes=state,
            edge_bytes=edge_bytes,
            temporaries_bytes=temporaries,
            step_bytes=step,
            boundary_bytes=visit.boundary_bytes,
            boundary_total_bytes=visit.boundary_bytes * lanes * len(parts.blocks)
            if shape.train
            else visit.boundary_bytes * lanes,
            baseline_bytes=_baseline_bytes(adapter_bytes),
            variant_bytes=perturbed.variant_bytes if perturbed else 0,
            head_variant_bytes=perturbed.head_variant_bytes if perturbed else 0,
            folding_bytes=perturbed.folding_bytes if perturbed else 0,
            code_bytes=self._code_bytes(lanes),
            state_slot_bytes=state_slot_bytes,
            waiting_state_slots=waiting_state_slots,
            state_pieces=0 if trained is None else store.pieces,
            update_image_bytes=update_image_bytes,
            update_gradients_bytes=update_gradients_bytes,
            saving_bytes=0 if self.device.shares_host_memory else self._saving_bytes(adapter_bytes),
            device_libraries_bytes=self.device.traits.libraries_bytes,
            host_libraries_bytes=self.device.traits.host_libraries_bytes,
        )
        return demand, visit

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

    def _masks(self, shape: BatchShape) -> MaskSize:
        count, length = shape.inputs["input_ids"].shape
        if shape.samples is not None:  # short texts would not do without the rows' other tensors: one of numbers is assumed
            return MaskSize(count * length**2 * self.parts.dtype.itemsize, 0)
        masks = measure_masks(self.parts, self.model, count, length, shape.packed)
        if count > 1:
            return masks
        short = measure_masks(self.parts, self.model, 2, isqrt(shape.mask_pairs // 2), False)
        return max(masks, short)

    def _perturbation_demand(self) -> PerturbationDemand | None:
        """None: no weights of the model's own are perturbed or moved."""
        if isinstance(self.tuned, JournalWeights):
            return self.tuned.demand(self.parts)
        return perturbation_demand(self.parts, self.config.zo, self.num_steps) if self.perturbs_all else None

    def _saving_bytes(self, adapter_bytes: int) -> int:
        """What adapters on a device take of host memory: while they are saved, with their moments; a zeroth-order run has
        clean values there all the time."""
        if not self.train:
            return 0
        per_parameter = 4 if self.config.method == "zo" else OPTIMIZER_BYTES_PER_PARAMETER
        return adapter_bytes + per_parameter * sum(p.numel() for p in self.trainable)

    def _code_bytes(self, micro_batches: int) -> int:
        if not self.device.traits.computes_on_host or self.parts.dtype == torch.float32:
            return 0  # fp32 products go through MKL, which compiles nothing
        return shapes_to_keep(micro_batches) * BYTES_PER_SHAPE


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


def _baseline_bytes(adapter_bytes: int) -> int:
    """The process as it is, less the adapters, which move into the arena."""
    trim_malloc()
    return max(0, host_bytes() - adapter_bytes)


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
