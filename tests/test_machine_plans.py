"""Plans for machines that are not here: memory and time are those of the profile, and nothing is measured."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tiny_models import make_config, save_tiny
from typer.testing import CliRunner

import finetune.machines.kept
import finetune.prediction
from finetune.cli import app
from finetune.config import Config
from finetune.config.errors import ConfigError
from finetune.machines.kept import keep_profile
from finetune.machines.profiles import find_machine
from finetune.memory.errors import UserError
from finetune.memory.machine import MachineProfile
from finetune.methods.base import make_method
from finetune.objectives.base import objective_class
from finetune.offload.devices import DescribedDevice
from finetune.offload.devices.base import Direction
from finetune.offload.devices.described import CUDA_CONTEXT_BYTES
from finetune.offload.rates.disk import drive_name
from finetune.offload.rates.machine import processor_name, versions
from finetune.offload.sizing.calibration import Rates
from finetune.offload.sizing.counted_visits import profile_rates
from finetune.offload.sizing.needs import HOST_BLOCKS
from finetune.prediction import predict_step
from finetune.session import Session
from finetune.trainer import Trainer

GPU, LAPTOP = find_machine("rtx4090-64gb-gen4"), find_machine("laptop-16gb-gen3")
FAST = 1e18
RATES = {"elementwise_bytes_per_second": FAST, "operation_seconds": 0.0}


def profile(
    rate: float = FAST, device: str | None = None, dtypes=("float32",), link: float = FAST, **drive: float
) -> dict:
    """A machine whose products take any time at most."""
    products = [
        {"dtype": dtype, "out_features": 1, "in_features": 1, "forward": [{"rows": 1, "flops_per_second": rate}]}
        for dtype in dtypes
    ]
    compute = RATES | {"products": products}
    found = {
        "name": "mine",
        "drives": [{"read_bytes_per_second": FAST, "write_bytes_per_second": FAST} | drive],
        "host": {
            "processor": "any", "threads": 1, "memory_bytes": 1 << 33, "copy_bytes_per_second": FAST, "compute": compute,
            "updated_elements_per_second": {"adamw": FAST},
        },
    }  # fmt: skip
    if device is not None:
        found["accelerator"] = {
            "kind": device, "name": "any", "memory_bytes": 1 << 32, "compute": compute,
            "host_to_device_bytes_per_second": link, "device_to_host_bytes_per_second": link,
        }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("something was measured here")

    for name in ("measure_rates", "try_rates", "time_visits", "write_rate"):
        monkeypatch.setattr(finetune.prediction, name, refuse)


def plan(model: Path, folder: Path, machine: dict | str | None, **options):
    if isinstance(machine, dict):
        path = folder / "machine.yaml"
        path.write_text(yaml.safe_dump(machine))
        machine = str(path)
    options = {"device": "auto"} | options
    return Trainer(make_config(model, None, folder / "out", machine=machine, **options)).plan()


def numbers(layout) -> int:
    """In its matrices."""
    return sum(prod(view.shape) for view in layout.views.values() if len(view.shape) == 2)


def seconds(planned) -> float:
    return predict_step(planned, planned.rates, planned.timing).seconds


def test_limits_and_device_are_the_machines(model, tmp_path):
    planned = plan(model, tmp_path, GPU.name, host_memory=None, device_memory=None)
    assert planned.device_kind == "cuda"
    assert planned.plan.host_budget_bytes == int(GPU.host.memory_bytes * 0.9)
    assert planned.plan.device_budget_bytes == int(GPU.accelerator.memory_bytes * 0.9)
    assert "90% of the machine's memory" in planned.describe()
    assert (
        f"a prediction from what is written of {GPU.name}, which reads 6.2 GiB/s from disk, copies"
        in planned.describe()
    )
    assert planned.values["machine"] == GPU.name


def test_words_of_memory_are_shares_of_the_machines(model, tmp_path):
    planned = plan(model, tmp_path, GPU.name, host_memory="50%", device_memory="-4GiB")
    assert planned.plan.host_budget_bytes == GPU.host.memory_bytes // 2
    assert planned.plan.device_budget_bytes == GPU.accelerator.memory_bytes - (4 << 30)


def test_what_cuda_takes_of_a_process_is_in_the_plan(model, tmp_path):
    there, here = (plan(model, tmp_path, GPU.name, device=device, host_memory=None) for device in ("auto", "cpu"))
    assert here.device_kind == "cpu" and here.plan.device_budget_bytes is None
    parts = there.plan.host_parts
    assert parts["libraries and context of the accelerator, assumed"] == CUDA_CONTEXT_BYTES
    assert not any("assumed" in name for name in here.plan.host_parts)


def test_a_machine_without_that_device_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=f"machine {LAPTOP.name}: expected a device of kind cuda, found no accelerator"):
        plan(model, tmp_path, LAPTOP.name, device="cuda")
    with pytest.raises(ConfigError, match="one of the machines"):
        plan(model, tmp_path, "nowhere")
    with pytest.raises(ConfigError, match="machine: expected"):
        Config(model="x", machine="")


def test_nothing_runs_on_a_machine_that_is_not_here(model, tmp_path):
    config = make_config(model, None, tmp_path / "out", machine=GPU.name)
    with pytest.raises(UserError, match="machine: only plans are made for another machine"):
        Session(make_method(config))
    device, tensor = DescribedDevice("cuda", GPU), torch.empty(1)
    for use in (
        lambda: device.allocate_slab(1), lambda: device.copy_async(tensor, tensor, Direction.H2D), device.record,
        lambda: device.wait(None), lambda: device.synchronize(None), device.peak_bytes, device.reset_peak,
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="not here"):
            use()


@pytest.mark.parametrize(("dtypes", "dtype"), [(("float32", "bfloat16"), "bfloat16"), (("float32",), "float32")])
def test_the_dtype_is_what_the_machine_multiplies(tmp_path, dtypes, dtype):
    model = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    planned = plan(model, tmp_path, profile(dtypes=dtypes), engine={"dtype": "auto"})
    assert planned.parts.dtype == getattr(torch, dtype)


def test_a_dtype_that_the_machine_has_no_rates_of_is_named(model, tmp_path):
    with pytest.raises(UserError, match="expected rates of products in bfloat16, found float32"):
        plan(model, tmp_path, profile(), engine={"dtype": "bfloat16"})


@pytest.mark.parametrize("method", ["lora", "full", "zo"])
def test_products_set_the_time_where_all_else_is_fast(model, tmp_path, method):
    planned = plan(model, tmp_path, profile(1e6), method=method, training={"batch_size": 2, "micro_batch_size": 1})
    once = seconds(planned)
    half = seconds(
        plan(model, tmp_path, profile(5e5), method=method, training={"batch_size": 2, "micro_batch_size": 1})
    )
    assert half == pytest.approx(2 * once, rel=1e-3)
    weights = sum(map(numbers, planned.parts.layouts))
    tokens = planned.shape.micro_batches * planned.shape.rows
    passes = once * 1e6 / (2 * weights * tokens)
    # Forward, recomputation in part, and gradients; attention and the head are some more.
    least = {"lora": 2.5, "full": 3.5, "zo": 1.0}[method]
    assert least < passes < 2.5 * least


def test_the_drive_or_the_link_sets_the_time_where_it_is_slow(model, tmp_path):
    streamed = {"engine": {"resident_blocks": 0, "lookahead": 0}}
    planned = plan(model, tmp_path, profile(read_bytes_per_second=1e3), **streamed)
    work = predict_step(planned, planned.rates, planned.timing)
    assert work.slowest == "disk" and work.seconds == pytest.approx(work.read_bytes / 1e3, rel=0.01)
    behind = plan(model, tmp_path, profile(device="cuda", link=1e3), **streamed)
    work = predict_step(behind, behind.rates, behind.timing)
    assert work.slowest == "link" and work.seconds > 2 * planned.plan.slots[HOST_BLOCKS].num_bytes / 1e3


def test_calling_operations_sets_the_time_of_tiny_ones(model, tmp_path):
    machine = profile(device="cuda")
    machine["accelerator"]["compute"] = machine["accelerator"]["compute"] | {"operation_seconds": 1e-3}
    blocks = plan(model, tmp_path, machine).timing.blocks
    calls = blocks[0].forward.other * 1e3
    assert 20 < calls < 200  # of a Llama's block
    assert blocks[0].backward.other + blocks[0].recomputed.other > 1.5 * blocks[0].forward.other


def test_weights_that_do_not_stay_decoded_are_decoded_for_every_product(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.weights.binding.LAZY_MIN_BYTES", 1)
    model = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    machine = profile()
    machine["host"]["compute"]["decoded_weights_per_second"] = {"bfloat16": 1e3}
    planned = plan(model, tmp_path, machine, training={"batch_size": 2, "micro_batch_size": 1}, host_memory=None)
    everything = sum(prod(view.shape) for view in planned.parts.layouts[0].views.values())
    forward, again = planned.timing.blocks[0].forward, planned.timing.blocks[0].recomputed
    assert forward.first == pytest.approx(everything / 1e3, rel=0.01) and forward.other < 0.01 * forward.first
    assert again.first == pytest.approx(everything / 1e3, rel=0.01) and again.other < 0.01 * again.first


def test_methods_add_what_their_kernels_take(model, tmp_path):
    machine = profile()
    machine["host"]["updated_elements_per_second"] = {"adamw": 1e3, "lion": 4e3}
    machine["host"]["compute"]["noise_elements_per_second"] = {"rademacher": 1e3}
    assert plan(model, tmp_path, machine, method="full").timing.weight_seconds == 1e-3
    lion = plan(model, tmp_path, machine, method="full", optimizer={"name": "lion"})
    assert lion.timing.weight_seconds == 2.5e-4
    other = plan(model, tmp_path, machine, method="full", optimizer={"name": "lamb"})
    assert other.timing.weight_seconds == 1e-3  # by AdamW's kernel
    zo = plan(model, tmp_path, machine, method="zo", zo={"noise": "rademacher"})
    assert zo.timing.weight_seconds >= 1e-3
    assert plan(model, tmp_path, machine, method="zo", zo={"noise": "gaussian"}).timing.weight_seconds == 0


def keep(**drive: object) -> None:
    """A profile of this machine as it is now, whose rates are made up."""
    values = profile(1e3)
    values["host"] |= {
        "processor": processor_name(), "threads": 1, "memory_bytes": psutil.virtual_memory().total,
    }  # fmt: skip
    values["drives"][0] |= drive
    keep_profile(MachineProfile.model_validate(values | {"versions": versions()}))


def test_visits_that_would_take_long_are_counted_where_a_profile_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(finetune.prediction, "try_rates", lambda *_: Rates(FAST, 1e3))
    assert plan(model, tmp_path, None, device="cpu").timing is None
    keep()
    planned = plan(model, tmp_path, None, device="cpu")
    assert planned.timing.counted and planned.values["machine"] is None
    assert "measured on this machine" in planned.describe() and "has run" not in planned.describe()
    monkeypatch.setattr(finetune.machines.kept, "is_current", lambda *_: False)
    assert plan(model, tmp_path, None, device="cpu").timing is None


def test_a_drive_that_was_measured_is_not_written_to_again(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(finetune.prediction, "try_rates", lambda *_: Rates(FAST, 1e3))
    keep(name=drive_name(tmp_path), read_bytes_per_second=1e3, write_bytes_per_second=500.0)
    planned = plan(model, tmp_path, None, device="cpu", method="full")
    assert planned.rates.write_bytes_per_second == 500
    keep(name="another")
    monkeypatch.setattr(finetune.prediction, "write_rate", lambda directory: 7.0)
    assert plan(model, tmp_path, None, device="cpu", method="full").rates.write_bytes_per_second == 7


def test_compressing_is_judged_by_the_machines_decoder(tmp_path):
    model = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    machine = profile(dtypes=("float32", "bfloat16"))
    assert plan(model, tmp_path, machine).compression is None
    big = MachineProfile.model_validate(machine)
    rates = profile_rates(plan(model, tmp_path, machine).parts, DescribedDevice("cpu", big), 16)
    assert rates.flops_per_second == pytest.approx(FAST) and rates.copy_bytes_per_second == float("inf")


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_a_plan_needs_no_values_of_an_adapter(model, tmp_path, lora):
    """What PEFT makes from weights alone, such as DoRA's magnitudes, is made all the same."""
    config = make_config(model, None, tmp_path / "out", lora=lora, engine={"resident_blocks": 1})
    parts = []
    for only_plan in (True, False):
        session = Session(make_method(config), only_plan=only_plan)
        session.process_bytes = 1 << 28
        try:
            assert all(p.is_meta == (only_plan and not lora) for p in session.trainable) and session.trainable
            shape = objective_class(config).full_shape(config, session, config.dataset.sequence_length)
            parts.append(session.plan(shape).plan.host_parts)
        finally:
            session.close()
    assert parts[0] == parts[1]


def test_plan_takes_a_machine_and_other_commands_do_not(model, tmp_path):
    words = ["--model", str(model), "--output", str(tmp_path / "out"), "--machine", GPU.name]
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 0 and f"what is written of {GPU.name}" in result.stdout
    result = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert json.loads(result.stdout)["machine"] == GPU.name
    assert CliRunner().invoke(app, ["run", *words, "--data", "x"]).exit_code == 2
    assert not (tmp_path / "out").exists()
