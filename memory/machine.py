"""What a machine can do, as data: rates of its drives, memory, links and kernels. Measured on one, or written down for another.

Every rate is of useful work: bytes that arrive, floating-point operations of the mathematical product, numbers that come out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, log
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError

Rate = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Product = Literal["forward", "input_gradient", "weight_gradient"]
"""y = x W^T, g W and g^T x, for a weight W [out, in] and x [rows, in], g [rows, out]."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Drive(_Part):
    """A place on disk, read and written past the page cache in large requests."""

    name: str = ""
    """What a person calls it: a device, or a directory on it."""
    read_bytes_per_second: Rate
    write_bytes_per_second: Rate | None = None
    """None: not measured, as nothing is written there."""
    read_while_writing_bytes_per_second: Rate | None = None
    """When as many bytes are written at the same time."""
    write_while_reading_bytes_per_second: Rate | None = None
    """When as many bytes are read at the same time."""
    request_seconds: Seconds = 0.0
    """From submitting one small read to having it, with nothing else under way."""
    sync_seconds: Seconds = 0.0
    """Of an fdatasync after a small write."""


class ProductRate(_Part):
    rows: Size
    """Of x: tokens."""
    flops_per_second: Rate
    """Of 2 rows out in operations."""


class Products(_Part):
    """Products of one dtype by number of rows, with weights of [out_features, in_features]."""

    dtype: Dtype
    out_features: Size
    in_features: Size
    forward: tuple[ProductRate, ...] = Field(min_length=1)
    input_gradient: tuple[ProductRate, ...] = ()
    """Empty: as forward."""
    weight_gradient: tuple[ProductRate, ...] = ()
    """Empty: as forward."""


class AttentionRate(_Part):
    """Scaled dot-product attention with a causal mask. Operations are counted as if there were none: 4 length^2 width forward,
    10 length^2 width backward (scores recomputed, as fused kernels do), where width is heads times head size."""

    dtype: Dtype
    length: Size
    """Tokens of a sequence."""
    forward_flops_per_second: Rate
    backward_flops_per_second: Rate


class ComputeRates(_Part):
    """Of a processor or an accelerator. What was not measured is empty."""

    products: tuple[Products, ...] = ()
    attention: tuple[AttentionRate, ...] = ()
    elementwise_bytes_per_second: Rate
    """Read and written together, of operations on tensors that are larger than caches."""
    operation_seconds: Seconds
    """That Python and torch take to call one operation on little data; on an accelerator, to enqueue it."""
    decoded_weights_per_second: dict[str, Rate] = {}
    """By weight format (`StoredWeight.word`), to the dtype that computes. Of what is compressed without loss, too."""
    noise_elements_per_second: dict[str, Rate] = {}
    """By kind of noise: a weight read, noise of one seed added, the sum written."""

    def product_seconds(self, kind: Product, dtype: str, rows: int, out_features: int, in_features: int) -> float:
        """Of one product. Fewer rows than were measured take as long as the fewest that were: reading the weight counts then.

        Raises UserError where no products of that dtype were measured.
        """
        tables = [table for table in self.products if table.dtype == dtype]
        if not tables:
            raise UserError(
                f"a machine profile: expected rates of products in {dtype}, found {self._dtypes()}: add them to it, or compute "
                "in another dtype (engine.dtype)"
            )
        size = log(out_features * in_features)
        table = min(tables, key=lambda table: abs(log(table.out_features * table.in_features) - size))
        rates = getattr(table, kind) or table.forward
        measured_rows = max(rows, min(rate.rows for rate in rates))
        rate = _between([(rate.rows, rate.flops_per_second) for rate in rates], measured_rows)
        return 2.0 * measured_rows * out_features * in_features / rate

    def attention_seconds(self, dtype: str, sequences: int, length: int, width: int, backward: bool) -> float:
        """Of the attention of `sequences` rows of `length` tokens; width: heads times head size.

        Without a measurement in that dtype, as products with as many rows and columns take. Raises UserError without those.
        """
        flops = (10.0 if backward else 4.0) * sequences * length**2 * width
        rates = [rate for rate in self.attention if rate.dtype == dtype]
        if not rates:
            return flops * self.product_seconds("forward", dtype, length, length, length) / (2.0 * length**3)
        name = "backward_flops_per_second" if backward else "forward_flops_per_second"
        return flops / _between([(rate.length, getattr(rate, name)) for rate in rates], length)

    def _dtypes(self) -> str:
        return " and ".join(sorted({table.dtype for table in self.products})) or "none"


class Host(_Part):
    processor: str
    """Its name, as the system has it."""
    threads: Size
    """That computed when it was measured."""
    memory_bytes: Size
    """Of the machine, whatever a memory cgroup allows."""
    copy_bytes_per_second: Rate
    """Of bytes copied from memory to memory: each is read once and written once."""
    compute: ComputeRates
    updated_elements_per_second: dict[str, Rate] = {}
    """By optimizer: weights whose step is made, with state in memory."""


class Accelerator(_Part):
    """Of the first one."""

    kind: Literal["cuda", "xpu", "mps", "simulated"]
    name: str
    memory_bytes: Size
    host_to_device_bytes_per_second: Rate | None = None
    """From pinned memory; None: copies take no time."""
    device_to_host_bytes_per_second: Rate | None = None
    compute: ComputeRates


class MachineProfile(_Part):
    """A machine: what predictions of a run's time are made of. Frozen; checked when it is made (pydantic.ValidationError)."""

    name: str = ""
    drives: tuple[Drive, ...] = Field(min_length=1)
    """The first holds the model, the last the run's output; usually there is one."""
    host: Host
    accelerator: Accelerator | None = None
    versions: dict[str, str] = {}
    """Of what computed when it was measured, such as torch. Empty: it was written down."""

    def compute_of(self, device_kind: str) -> ComputeRates:
        """Of where blocks compute. Raises UserError when the machine has no such device."""
        if DEVICE_KINDS[device_kind].shares_host_memory:
            return self.host.compute
        if self.accelerator is None or self.accelerator.kind != device_kind:
            found = self.accelerator.kind if self.accelerator else "no accelerator"
            raise UserError(f"machine {self.name or 'profile'}: expected a device of kind {device_kind}, found {found}")
        return self.accelerator.compute


def _between(points: Sequence[tuple[int, float]], x: int) -> float:
    """The value at x of a line through the points on logarithmic axes; beyond them, that of the nearest."""
    points = sorted(points)
    at = bisect_left(points, (x,))
    if at == 0:
        return points[0][1]
    if at == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    share = (log(x) - log(x0)) / (log(x1) - log(x0))
    return exp(log(y0) + share * (log(y1) - log(y0)))
