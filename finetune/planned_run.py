"""What a run is planned for, its largest micro-batch, and the plan with what it says to a user before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.memory.needs import Needs
from finetune.memory.plan import Plan
from finetune.memory.units import format_bytes, format_seconds
from finetune.offload.sizing.calibration import NoRates, Rates
from finetune.offload.sizing.compression import Compression
from finetune.offload.sizing.dry_run import VisitSize
from finetune.offload.sizing.needs import (
    ACTIVATIONS,
    GRAPHS,
    HIDDEN_STATES,
    HOST_BLOCKS,
    HOST_HEAD,
    PROCESS,
    STATE,
    TEXTS,
    Streamed,
)
from finetune.offload.sizing.timing import Timing
from finetune.offload.weights.parts import ModelParts, describe_blocks
from finetune.prediction import predict_compressed, predict_step

if TYPE_CHECKING:
    from finetune.micro_batch_choice import MicroBatchChoice

SHORTEST_ROW = 16  # tokens; shorter ones are advised to nobody
_SERVERS = {  # of the simulator
    "disk": "the disk",
    "link": "the link to the device",
    "link back": "the link from the device",
    "compute": "compute",
}
LONE_MASK_PAIRS = 1 << 18
"""Two rows of 362 tokens, 8 of 181: longer ones need not be computed together."""


@dataclass(frozen=True, slots=True)
class Writing:
    """Text that the model writes before the updates of a step."""

    shape: BatchShape  # of the first pass over the prompts that are written at once, a prompt a micro-batch
    tokens: int  # of a text, at most: as many passes
    prompts: int  # of a step
    texts: int  # of each prompt

    @property
    def together(self) -> int:
        """Prompts that are written at once."""
        return self.shape.micro_batches

    @property
    def passes(self) -> int:
        """Over the weights, at most."""
        return -(-self.prompts // self.together) * self.tokens


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The largest micro-batch of a step, and how many there are."""

    inputs: dict[str, torch.Tensor]  # the model's keyword arguments; of rows of tensors, their labels too
    micro_batches: int  # of a step, each counted once for every version of the weights
    train: bool  # whether there is a backward pass
    kept_bytes: int = 0  # what a step holds beside, such as key-value caches
    packed: bool = False  # whether a row of text holds several
    samples: int | None = None  # rows of tensors in a micro-batch; None: text
    forward_lanes: int = 0  # micro-batches more that only go forward, such as those of a reference
    fills_caches: bool = False  # whether keys and values of all positions are kept, for text that is written
    writing: Writing | None = None  # before that
    cache_bytes: int = 0  # of keys and values beside `kept_bytes`, which may be on disk
    can_wait: bool = False  # whether micro-batches may wait on disk: those of a step, of which only the loss is wanted

    @classmethod
    def of_text(
        cls, micro_batch_size: int, sequence_length: int, micro_batches: int, train: bool, packed: bool = False
    ) -> BatchShape:
        ids = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64)
        return cls({"input_ids": ids, "use_cache": False}, micro_batches, train, packed=packed)

    def keeping(self, kept_bytes: int) -> BatchShape:
        return replace(self, kept_bytes=kept_bytes)

    def filling_caches(self, num_bytes: int) -> BatchShape:
        """num_bytes: of the key-value caches that a step holds."""
        return replace(self, kept_bytes=num_bytes, fills_caches=True)

    def of_rows(self, rows: int) -> BatchShape:
        """The same step in micro-batches of so many rows, at most as many as there are."""
        whole = self.samples or self.inputs["input_ids"].shape[0]
        inputs = {name: x[:rows] if _has_sizes(x, whole) else x for name, x in self.inputs.items()}
        samples = None if self.samples is None else rows
        times = -(-whole // rows)
        return replace(
            self, inputs=inputs, micro_batches=self.micro_batches * times, samples=samples,
            forward_lanes=self.forward_lanes * times,
        )  # fmt: skip

    def of_length(self, tokens: int) -> BatchShape:
        """Of text, with rows of at most so many tokens."""
        sizes = self.inputs["input_ids"].shape
        inputs = {name: x[:, :tokens] if _has_sizes(x, *sizes) else x for name, x in self.inputs.items()}
        return replace(self, inputs=inputs)

    @property
    def lanes(self) -> int:
        """That go forward."""
        return self.micro_batches + self.forward_lanes

    @property
    def mask_pairs(self) -> int:
        """Of a text micro-batch: pairs of positions, times rows, that attention masks are planned for. A text that is alone
        needs none: then short ones can be padded together, up to `LONE_MASK_PAIRS`."""
        count, length = self.inputs["input_ids"].shape
        return count * length**2 if count > 1 else min(length**2, LONE_MASK_PAIRS)

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch, of input or labels; samples, where it has none."""
        names = ("input_ids", "decoder_input_ids", "labels")
        tokens = [t.numel() for name, t in self.inputs.items() if name in names and t.ndim == 2 and not t.is_floating_point()]
        return max([self.samples or 0, *tokens])


@dataclass(frozen=True, slots=True)
class MeasuredBatch:
    """A batch with what the model's code makes of it: what methods look at to say what they add."""

    shape: BatchShape  # what was measured
    visit: VisitSize  # of one block, by one micro-batch
    loss_bytes: int  # that one tile of the loss allocates
    row_bytes: int  # of the embedding rows that a step names, in the dtype that computes
    chunk: int | None = None  # tokens of a text that compute together; None: all

    @property
    def rows(self) -> int:
        """Tokens of a step, or samples."""
        return self.shape.micro_batches * self.shape.rows


@dataclass(frozen=True, slots=True)
class StoreSize:
    """What training the model's own weights asks of the disk, at most."""

    num_bytes: int  # of the working store
    read_bytes: int  # of masters and state, in a step
    write_bytes: int  # of weights too, in a step
    pieces: int  # that a step updates
    elements: int  # that a step updates
    trained_share: float  # of the blocks, in a step
    end_share: float  # of what is moved in a step, what belongs to embedding, head and other ends


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A plan with what it was made from; `describe` is what `finetune plan` prints."""

    plan: Plan  # what lives where
    needs: Needs  # what it was made for
    streamed: Streamed  # what goes through slots
    batch: MeasuredBatch  # the largest of a step
    parts: ModelParts  # of the model
    device_kind: str  # where it computes
    store: StoreSize | None  # where the model's own weights are trained
    variants: int  # of the weights, that a step computes; `shape` counts each micro-batch as often
    adapter_elements: int  # that are trained by AdamW
    base_words: str = ""  # what is to be said of a model that is quantised here
    budget_words: str = ""  # where the host budget comes from, if not from the user
    num_steps: int | None = None  # of the run, where it is known
    rates: Rates | NoRates | None = None  # of this machine, by which `describe` says how long a step takes
    timing: Timing | None = None  # of visits that were run here
    untimed: str = ""  # why there is none, where that was tried
    choice: MicroBatchChoice | None = None  # why micro-batches have so many rows, where that was not said
    chunk_chosen: bool = False  # whether it was left open how many tokens of a text compute together
    compression: Compression | None = None  # what `finetune compress` would make of the model, where a run could go over that

    @property
    def shape(self) -> BatchShape:
        return self.batch.shape

    def describe(self) -> str:
        plan, parts, blocks = self.plan, self.parts, self.plan.slots[HOST_BLOCKS]
        lines = [
            f"{parts.directory.name}: {describe_blocks(parts.blocks)}, "
            f"{format_bytes(parts.checkpoint.num_bytes)} of weights, computed in {str(parts.dtype).removeprefix('torch.')} "
            f"on {self.device_kind}",
            f"a step: {self.shape.micro_batches // self.variants} micro-batches of at most "
            + " x ".join(map(str, next(iter(self.shape.inputs.values())).shape))
            + (f", each under {self.variants} versions of the weights" if self.variants > 1 else "")
            + (f", and {self.shape.forward_lanes} that only go forward" if self.shape.forward_lanes else ""),
            f"blocks: {blocks.kept} of {len(parts.blocks)} resident, lookahead {blocks.lookahead}; "
            + (f"{len(parts.blocks) - plan.count(GRAPHS)} recomputed in backward, " if self.shape.train else "")
            + self._waiting_words
            + f"; disk read a step {'about' if self.streamed.experts else 'at most'} {format_bytes(self.read_bytes)}",
        ]
        if self.shape.writing is not None:
            lines.insert(2, self._writing_words(self.shape.writing))
        if self.choice is not None:
            lines.insert(2, self.choice.words)
        if self.batch.chunk is not None:
            why = ", the most that fit: sums are rounded otherwise than of whole texts" if self.chunk_chosen else ""
            lines.insert(2, f"blocks compute {self.batch.chunk} tokens of a text at a time{why}")
        if self.base_words:
            lines.insert(1, self.base_words)
        if self.store is not None:
            lines.append(
                f"working store: at most {format_bytes(self.store.num_bytes)} on disk; a step reads "
                f"{format_bytes(self._store_read_bytes)} of it and writes {format_bytes(self.store.write_bytes)}"
            )
        lines.append(
            f"host memory: {format_bytes(plan.host_peak_bytes)} predicted, {format_bytes(plan.host_budget_bytes)} allowed"
            + self.budget_words
        )
        lines += [f"  {format_bytes(size):>10}  {name}" for name, size in plan.host_parts.items()]
        if plan.device_budget_bytes is not None:
            lines.append(
                f"device memory: {format_bytes(plan.device_peak_bytes)} predicted, "
                f"{format_bytes(plan.device_budget_bytes)} allowed"
            )
            lines += [f"  {format_bytes(size):>10}  {name}" for name, size in plan.device_parts.items()]
        if self.rates is not None:
            lines += self._seconds_words(self.rates)
            if self.rates and self.compression is not None:
                lines.append(self._compression_words(self.rates, self.compression))
        return "\n".join(lines)

    def _writing_words(self, writing: Writing) -> str:
        read_bytes = writing.passes * self.pass_read_bytes
        return (
            f"before it, {writing.texts} texts of each of {writing.prompts} prompts are written, {writing.together} prompts at "
            f"once: at most {writing.passes} passes over the weights, which read at most {format_bytes(read_bytes)} from disk"
        )

    @property
    def _waiting_words(self) -> str:
        """Where block inputs and hidden states of all micro-batches are."""
        if self.plan.count(TEXTS):
            if self.shape.cache_bytes:
                return "keys and values of texts in a file on disk"
            what = "block inputs, hidden states and their gradients" if self.shape.train else "hidden states"
            return f"{what} of all texts in a file on disk"
        if not self.plan.count(HIDDEN_STATES):
            return f"block inputs {'on disk' if self.plan.count(ACTIVATIONS) else 'in memory'}"
        what = "block inputs, hidden states and their gradients" if self.shape.train else "hidden states"
        return f"{what} of all micro-batches on disk"

    @property
    def process_bytes(self) -> int:
        """That it counts for the process before anything is opened."""
        return self.plan.host_parts[PROCESS]

    @property
    def values(self) -> dict[str, Any]:
        """What `describe` says, by name, for JSON: sizes in bytes, times in seconds."""
        plan, blocks = self.plan, self.plan.slots[HOST_BLOCKS]
        found = {
            "model": str(self.parts.directory),
            "model_bytes": self.parts.checkpoint.num_bytes,
            "dtype": str(self.parts.dtype).removeprefix("torch."),
            "device": self.device_kind,
            "micro_batches": self.shape.micro_batches // self.variants,
            "micro_batch_shape": list(next(iter(self.shape.inputs.values())).shape),
            "variants": self.variants,
            "blocks": len(self.parts.blocks),
            "resident_blocks": blocks.kept,
            "lookahead": blocks.lookahead,
            "kept_graphs": plan.count(GRAPHS),
            "block_inputs": "disk" if plan.count(ACTIVATIONS) or plan.count(TEXTS) else "host",
            "hidden_states": "disk" if plan.count(HIDDEN_STATES) or plan.count(TEXTS) else "host",
            "sequence_chunk": self.batch.chunk,
            "host_peak_bytes": plan.host_peak_bytes,
            "host_budget_bytes": plan.host_budget_bytes,
            "host_parts": dict(plan.host_parts),
            "device_peak_bytes": plan.device_peak_bytes,
            "device_budget_bytes": plan.device_budget_bytes,
            "device_parts": dict(plan.device_parts),
            "store_bytes": None if self.store is None else self.store.num_bytes,
            "num_steps": self.num_steps,
            "micro_batch_choice": None if self.choice is None else asdict(self.choice),
        }
        if not self.rates:
            return found
        step = predict_step(self, self.rates, self.timing)
        return found | {
            "machine": self.rates.machine or None,
            "step_seconds": step.seconds,
            "stall_seconds": step.stall_seconds,
            "busy_seconds": step.busy_seconds,
            "slowest": step.slowest,
            "tokens_per_second": self.step_tokens / step.seconds,
            "disk_read_bytes": step.read_bytes,
            "disk_write_bytes": step.write_bytes,
            "run_seconds": self.num_steps and self.num_steps * step.seconds,
        }

    def _seconds_words(self, rates: Rates | NoRates) -> list[str]:
        if not rates:
            return [f"no time of a step is predicted, because the model cannot be read here: {rates.reason}"]
        speeds = [f"reads {format_bytes(rates.read_bytes_per_second)}/s from disk"]
        if self.plan.device_budget_bytes is not None:
            speeds.append(f"copies {format_bytes(rates.copy_bytes_per_second)}/s to the device")
        if self.timing is None or self.timing.counted:
            speeds.append(f"computes {rates.flops_per_second / 1e9:.0f} GFLOP/s")
        else:
            speeds.append("has run some of the model's blocks")
        known = f"what is written of {rates.machine}" if rates.machine else "what was measured on this machine just now"
        if self.untimed:
            speeds[-1] += f" (its blocks could not be run by themselves: {self.untimed})"
        step = predict_step(self, rates, self.timing)
        tokens = f", {self.step_tokens / step.seconds:.0f} tokens a second" if self.step_tokens else ""
        busy = ", ".join(
            f"{words} {step.busy_seconds[server] / step.seconds:.0%}"
            for server, words in _SERVERS.items()
            if step.busy_seconds[server]
        )
        lines = [
            f"a step takes about {format_seconds(step.seconds)}{tokens}: a prediction from {known}, which "
            f"{', '.join(speeds[:-1])} and {speeds[-1]}",
            f"  in use: {busy}; {_SERVERS[step.slowest]} sets the pace",
        ]
        if self.shape.writing is not None:
            seconds = self.shape.writing.passes * self.pass_read_bytes / rates.read_bytes_per_second
            lines.append(
                f"  that is without the text that is written before: its passes take {format_seconds(seconds)} to read alone"
            )
        if self.num_steps:
            lines.append(f"  all {self.num_steps} steps: about {format_seconds(self.num_steps * step.seconds)}")
        if step.write_bytes:
            day = format_bytes(int(step.write_bytes * 86400 / step.seconds))
            whole = f", {format_bytes(self.num_steps * step.write_bytes)} in all steps" if self.num_steps else ""
            lines.append(f"  writes {format_bytes(step.write_bytes)} to disk a step{whole}, {day} a day")
        return lines

    @property
    def step_tokens(self) -> int:
        """Of a step with rows of full length; 0: rows are no text."""
        return self.shape.micro_batches // self.variants * self.shape.rows if self.shape.samples is None else 0

    def _compression_words(self, rates: Rates, found: Compression) -> str:
        now = predict_step(self, rates, self.timing).seconds
        then = predict_compressed(self, rates, found, self.timing).seconds
        rate, where = format_bytes(int(found.decoded_bytes_per_second)), "there" if rates.machine else "here"
        return (
            f"compressed without loss (finetune compress), {format_bytes(found.model_bytes)} in place of "
            f"{format_bytes(self.parts.checkpoint.num_bytes)}, a step would take about {format_seconds(then)}: it "
            f"{'pays' if then < now else 'does not pay'} {where}, where {rate} of weights are decoded in a second"
        )

    @property
    def read_bytes(self) -> int:
        """Of weights, in a step: at most, but of experts about."""
        resident, streamed = self.plan.slots[HOST_BLOCKS].resident, self.streamed
        passes = 2 if self.shape.train else 1
        read_bytes = passes * sum(size for i, size in enumerate(streamed.block_bytes) if i not in resident)
        if self.plan.count(HOST_HEAD) < streamed.chunks:
            read_bytes += streamed.chunks * streamed.chunk_bytes
        return read_bytes + self.expert_read_bytes

    @property
    def pass_read_bytes(self) -> int:
        """Of weights, in a pass that writes a token of every text; all that is not resident, experts too."""
        resident, streamed = self.plan.slots[HOST_BLOCKS].resident, self.streamed
        read_bytes = sum(size for i, size in enumerate(streamed.block_bytes) if i not in resident)
        if self.plan.count(HOST_HEAD) < streamed.chunks:
            read_bytes += streamed.chunks * streamed.chunk_bytes
        return read_bytes + sum(
            (size.count - min(size.count, self.plan.count(size.pools[0]))) * size.slot_bytes for size in streamed.experts
        )

    @property
    def expert_read_bytes(self) -> int:
        """Of experts that are fetched by themselves, in a step."""
        shape, read_bytes = self.shape, 0
        for size in self.streamed.experts:
            slots = self.plan.count(size.pools[0])
            read_bytes += size.read_bytes(slots, shape.rows, shape.micro_batches, shape.train)
            if slots < size.block_count:
                read_bytes += size.read_bytes(slots, shape.rows, shape.forward_lanes, False)
            if self.store is not None and slots < size.block_count:  # once more, to be updated
                read_bytes += int(self.store.trained_share * size.count) * size.slot_bytes
        return read_bytes

    @property
    def _store_read_bytes(self) -> int:
        """In a step, of masters and state: less what stays in memory."""
        return int(self.store.read_bytes * (1 - self.plan.slots[STATE].kept / max(1, self.store.pieces)))


def _has_sizes(value: Any, *sizes: int) -> bool:
    """Whether it is a tensor whose first dimensions are these."""
    return isinstance(value, torch.Tensor) and value.shape[: len(sizes)] == sizes
