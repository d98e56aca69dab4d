"""Machine profiles: what they take, and the seconds that follow from their rates."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from finetune.memory.errors import UserError
from finetune.memory.machine import ComputeRates, MachineProfile

DRIVE = {
    "read_bytes_per_second": 2e9, "write_bytes_per_second": 1e9, "read_while_writing_bytes_per_second": 9e8,
    "write_while_reading_bytes_per_second": 8e8,
}  # fmt: skip
COMPUTE = {
    "elementwise_bytes_per_second": 1e10,
    "operation_seconds": 1e-5,
    "products": [
        {
            "dtype": "float32", "out_features": 64, "in_features": 64,
            "forward": [{"rows": 10, "flops_per_second": 1e9}, {"rows": 1000, "flops_per_second": 1e11}],
            "weight_gradient": [{"rows": 10, "flops_per_second": 5e8}],
        },
        {
            "dtype": "float32", "out_features": 4096, "in_features": 4096,
            "forward": [{"rows": 10, "flops_per_second": 7e9}],
        },
    ],
}  # fmt: skip
HOST = {"processor": "any", "threads": 2, "memory_bytes": 1 << 30, "copy_bytes_per_second": 5e9, "compute": COMPUTE}


def test_a_product_between_two_measured_ones_lies_between_them():
    rates = ComputeRates(**COMPUTE)

    def rate(rows: int, kind: str = "forward") -> float:
        return 2 * rows * 64 * 64 / rates.product_seconds(kind, "float32", rows, 64, 64)

    assert rate(10) == pytest.approx(1e9)
    assert rate(100) == pytest.approx(1e10)  # the line goes through both on logarithmic axes
    assert [rate(1000), rate(9000)] == pytest.approx([1e11, 1e11])
    assert rate(10, "input_gradient") == pytest.approx(1e9)
    assert rate(10, "weight_gradient") == pytest.approx(5e8)


def test_few_rows_take_as_long_as_the_fewest_measured():
    rates = ComputeRates(**COMPUTE)
    one, ten = (rates.product_seconds("forward", "float32", rows, 64, 64) for rows in (1, 10))
    assert one == ten


def test_the_table_of_the_nearest_size_counts():
    seconds = ComputeRates(**COMPUTE).product_seconds("forward", "float32", 10, 11008, 4096)
    assert seconds == pytest.approx(2 * 10 * 11008 * 4096 / 7e9)


def test_what_was_not_measured_is_said():
    with pytest.raises(UserError, match="expected rates of products in bfloat16, found float32"):
        ComputeRates(**COMPUTE).product_seconds("forward", "bfloat16", 1, 1, 1)


def test_attention_by_length_or_as_its_products():
    measured = [
        {"dtype": "float32", "length": 256, "forward_flops_per_second": 1e10, "backward_flops_per_second": 5e9},
        {"dtype": "float32", "length": 1024, "forward_flops_per_second": 4e10, "backward_flops_per_second": 2e10},
    ]
    rates = ComputeRates(**COMPUTE, attention=measured)
    assert rates.attention_seconds("float32", 3, 512, 64, False) == pytest.approx(3 * 4 * 512**2 * 64 / 2e10)
    assert rates.attention_seconds("float32", 1, 256, 64, True) == pytest.approx(10 * 256**2 * 64 / 5e9)
    alike = ComputeRates(**COMPUTE).attention_seconds("float32", 1, 10, 64, False)
    assert alike == pytest.approx(4 * 100 * 64 / 1e9)


def test_where_blocks_compute():
    machine = MachineProfile(drives=[DRIVE], host=HOST)
    assert machine.compute_of("cpu") is machine.host.compute
    with pytest.raises(UserError, match="expected a device of kind cuda, found no accelerator"):
        machine.compute_of("cuda")


@pytest.mark.parametrize(
    "change", [{"drives": []}, {"drives": [DRIVE | {"read_bytes_per_second": -1}]}, {"host": HOST | {"core": 1}}]
)
def test_what_is_no_machine_is_refused(change):
    with pytest.raises(ValidationError):
        MachineProfile(**({"drives": [DRIVE], "host": HOST} | change))
