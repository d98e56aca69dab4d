"""Resumable states: what was damaged or exchanged is refused, with what to do; doing it helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.memory.errors import UserError
from finetune.runs.state import load_state, save_state, saved_states

ABOUT = {"run": "1" * 32, "seed": 1}


def trained(steps: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(5)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"a": (3, 5), "b": (7,)}.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        sum((p**2).sum() for p in parameters.values()).backward()
        optimizer.step()
    return parameters, optimizer


@pytest.fixture
def folder(tmp_path) -> Path:
    for steps in (1, 2, 3):
        save_state(tmp_path, steps, *trained(steps), ABOUT)
    assert [path.name for path in saved_states(tmp_path)] == ["step-00000002", "step-00000003"]
    return tmp_path


def assert_goes_on_from(folder: Path, step: int) -> None:
    found, expected = trained(0), trained(step)
    assert load_state(folder, *found, ABOUT) == step
    for name, parameter in found[0].items():
        assert parameter.equal(expected[0][name])
        for key, value in expected[1].state[expected[0][name]].items():
            assert found[1].state[parameter][key].equal(value)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def exchange(one: Path, other: Path, between: Path) -> None:
    one.rename(between)
    other.rename(one)
    between.rename(other)


DAMAGE = {
    "a bit of a weight": lambda new, old: flip(new / "tensors.safetensors", -1),
    "a bit of a name": lambda new, old: flip(new / "tensors.safetensors", 12),
    "a bit of the position": lambda new, old: (new / "state.json").write_text(
        (new / "state.json").read_text().replace('"step": 3', '"step": 2')
    ),
    "cut": lambda new, old: (new / "tensors.safetensors").write_bytes((new / "tensors.safetensors").read_bytes()[:-1]),
    "joined": lambda new, old: (new / "state.json").write_text((new / "state.json").read_text() * 2),
    "emptied": lambda new, old: (new / "state.json").write_text(""),
    "deleted": lambda new, old: (new / "tensors.safetensors").unlink(),
    "another's": lambda new, old: shutil.copy(old / "tensors.safetensors", new),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_and_what_is_said_to_do_helps(damage, folder):
    new, old = folder / "step-00000003", folder / "step-00000002"
    damage(new, old)
    with pytest.raises(UserError) as refused:
        load_state(folder, *trained(0), ABOUT)
    assert f"{new} is damaged" in str(refused.value)
    assert f"remove {new}; --resume then goes on from step 2, whose state is intact" in str(refused.value)
    shutil.rmtree(new)
    assert_goes_on_from(folder, 2)


def test_tensors_that_were_exchanged_leave_no_state(folder):
    exchange(*(state / "tensors.safetensors" for state in saved_states(folder)), folder / "held")
    with pytest.raises(UserError, match=f"no other state is intact; remove {folder} and begin again"):
        load_state(folder, *trained(0), ABOUT)


def test_states_that_were_exchanged_whole_are_what_they_say(folder):
    exchange(*saved_states(folder), folder / "held")
    assert_goes_on_from(folder, 2)


def test_states_without_checksums_are_taken(folder):
    new = folder / "step-00000003"
    found = json.loads((new / "state.json").read_text())
    (new / "state.json").write_text(json.dumps({"step": found["step"], **ABOUT}))
    assert_goes_on_from(folder, 3)
    tensors = load_file(new / "tensors.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "parameter.a"}, new / "tensors.safetensors")
    with pytest.raises(UserError, match="lacks parameter.a and 0 more.*goes on from step 2"):
        load_state(folder, *trained(0), ABOUT)
