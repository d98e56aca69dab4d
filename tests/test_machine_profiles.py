"""Machine profiles as files: those of the package, a user's own, and this machine's, which is kept."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import finetune.bench
from finetune.cli import app
from finetune.config.errors import ConfigError
from finetune.machines.kept import keep_profile, kept_profile, profile_path
from finetune.machines.profiles import find_machine, machine_names, machine_text, read_machine
from finetune.machines.words import describe_machine
from finetune.memory.errors import UserError
from finetune.memory.machine import MachineProfile
from finetune.offload.rates.compute import Sizes
from finetune.offload.rates.machine import Effort

ROOT = Path(__file__).resolve().parent.parent
LAPTOP = find_machine("laptop-16gb-gen3")
GPU = find_machine("rtx4090-64gb-gen4")
TINY = Effort(
    seconds=1e-4, drive_seconds=0.02, drive_bytes=1, copy_bytes=1 << 14, decoded=(128, 256),
    sizes=Sizes(shapes=((16, 24),), rows=(1,), lengths=(4,), weight_bytes=1, elements=256),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def short(monkeypatch) -> None:
    """Of a bench, only what it needs at least."""
    measure = finetune.bench.measure_machine
    monkeypatch.setattr(finetune.bench, "measure_machine", lambda *where: measure(*where[:4], TINY, where[5]))


def changed(profile: MachineProfile, folder: Path, **values: object) -> Path:
    path = folder / "machine.yaml"
    path.write_text(yaml.safe_dump(profile.model_dump(mode="json", exclude_none=True) | values))
    return path


@pytest.mark.parametrize("name", machine_names())
def test_the_packages_machines_are_whole(name):
    machine = find_machine(name)
    text = (ROOT / "configs" / "machines" / f"{name}.yaml").read_text()
    assert machine.name == name and f"--machine {name}" in text and "not measured" in text
    kinds = ["cpu"] if machine.accelerator is None else ["cpu", machine.accelerator.kind]
    for kind in kinds:
        rates = machine.compute_of(kind)
        for table in rates.products:
            for rows in (1, 100, 5000):
                assert rates.product_seconds("forward", table.dtype, rows, 4096, 4096) > 0
            # A weight is read in no less time than memory gives: a product of one row is not faster than that.
            weight_bytes = 4096 * 4096 * (4 if table.dtype == "float32" else 2)
            seconds = rates.product_seconds("forward", table.dtype, 1, 4096, 4096)
            assert weight_bytes / seconds <= 1.01 * rates.elementwise_bytes_per_second
        assert {rate.dtype for rate in rates.attention} == {table.dtype for table in rates.products}


def test_a_profile_is_the_same_after_it_was_written(tmp_path):
    for machine in (LAPTOP, GPU):
        path = tmp_path / f"{machine.name}.yaml"
        path.write_text(machine_text(machine))
        assert read_machine(path) == machine


def test_a_machine_is_found_by_its_name_or_file(tmp_path):
    assert find_machine(str(changed(LAPTOP, tmp_path, name="mine"))).name == "mine"
    with pytest.raises(ConfigError, match="one of the machines .*rtx4090-64gb-gen4.*; did you mean rtx4090-64gb-gen4"):
        find_machine("rtx4090-64gb-gen5")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"drive": 1}, "drive: unknown key; nearest: drives (value 1)"),
        ({"host": {}}, "host.processor: missing"),
        ({"drives": []}, "drives: expected"),
        (
            {"drives": [{"read_bytes_per_second": -1}]},
            "drives.0.read_bytes_per_second: expected a number greater than 0, found -1",
        ),
        (
            {"drives": [{"read_bytes_per_second": 1, "write_byte_per_second": 1}]},
            "drives.0.write_byte_per_second: unknown key; nearest: write_bytes_per_second (value 1)",
        ),
        (
            {"drives": [{"read_bytes_per_second": "fast"}]},
            "drives.0.read_bytes_per_second: expected a valid number, found 'fast'",
        ),
        ({"accelerator": {"kind": "cpu"}}, "accelerator.kind: expected 'cuda', 'xpu', 'mps' or 'simulated', found 'cpu'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line_each(tmp_path, change, line):
    path = changed(LAPTOP, tmp_path, **change)
    with pytest.raises(ConfigError) as raised:
        read_machine(path)
    assert str(path) in str(raised.value) and any(line in problem for problem in raised.value.problems)


def test_a_profile_is_kept_for_its_user_alone(cache):
    assert kept_profile() is None
    path = keep_profile(GPU)
    assert path == profile_path() == cache / "finetune" / "machine.yaml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert kept_profile() == GPU
    assert [found.name for found in path.parent.iterdir()] == ["machine.yaml"]


def test_what_is_kept_and_is_no_profile_is_not_used():
    path = keep_profile(LAPTOP)
    path.write_text(path.read_text().replace("processor", "prozessor"))
    assert kept_profile() is None
    path.write_bytes(b"\xff: [")
    assert kept_profile() is None
    assert keep_profile(LAPTOP) == path and kept_profile() == LAPTOP


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file")
    with pytest.raises(UserError, match="machine.yaml: cannot be written .*XDG_CACHE_HOME"):
        keep_profile(LAPTOP)


def test_the_table_has_what_the_profile_has():
    words = describe_machine(GPU)
    for text in (GPU.drives[0].name, GPU.host.processor, GPU.accelerator.name, "64.0 GiB", "24.0 GiB"):
        assert text in words
    assert "reads 6.2 GiB/s, writes 3.2 GiB/s" in words and "copies 23.5 GiB/s to it" in words
    assert all(len(line) <= 200 for line in words.splitlines())
    assert "accelerator" not in describe_machine(LAPTOP)


def test_bench_prints_a_table_and_keeps_the_profile(tmp_path, short):
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "runs" / "out"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "processor" in result.stdout and f"kept in {profile_path()}" in result.stdout
    assert not (tmp_path / "runs").exists()
    assert kept_profile().host.threads >= 1


def test_bench_prints_json(tmp_path, short):
    result = CliRunner().invoke(app, ["bench", "--output", str(tmp_path), "--device", "simulated", "--json"])
    found = json.loads(result.stdout)
    assert found["kept"] == str(profile_path())
    assert MachineProfile.model_validate(found["machine"]) == kept_profile()
    assert kept_profile().accelerator.kind == "simulated"


def test_bench_refuses_what_is_no_model_or_device(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--model", str(tmp_path / "nowhere" / "x" / "y")])
    assert result.exit_code == 1 and "no such directory" in result.output
    result = CliRunner().invoke(app, ["bench", "--device", "abacus"])
    assert result.exit_code == 1 and "unknown device 'abacus'" in result.output
