"""Resumable state: everything that a later process needs to go on with the same bits.

`state/step-N/` holds the adapter, the optimizer's moments and the position; it is written under another name, flushed and
renamed, so a directory of that name is whole. The newest ones are kept: those before stay until the next is durable.
`state.json` has a checksum of itself and one of the tensors: what was damaged or exchanged is refused.
Data order, learning rate and random numbers are functions of (seed, step) and need no saving.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.memory.errors import UserError
from finetune.offload.files.new_directory import new_directory
from finetune.offload.files.sealed import SEAL, file_checksum, seal, unseal
from finetune.runs.identity import check_same_run

_PREFIX = "step-"
_ABOUT, _TENSORS = "state.json", "tensors.safetensors"
_MORE = "more/"  # no parameter's name has a slash


def save_state(
    folder: Path,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    more: Mapping[str, torch.Tensor] | None = None,
    keep: int = 2,
) -> Path:
    """Commits the state after `step` updates. about: JSON values that say which run it is. more: what else there is. keep: so
    many states stay, the newest ones.

    Raises UserError: disk full.
    """
    from safetensors.torch import save_file

    final = folder / f"{_PREFIX}{step:08d}"
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach()
    tensors |= {f"{_MORE}{name}": value for name, value in (more or {}).items()}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_directory(final) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
            sealed = seal({"step": step, "tensors": file_checksum(temporary / _TENSORS), **about})
            (temporary / _ABOUT).write_text(json.dumps(sealed, indent=2))
    except OSError as error:
        raise UserError(
            f"cannot save the state after step {step} in {folder}: {error.strerror or error}. The states saved before are "
            "intact; make room and go on with --resume"
        ) from error
    for old in [state for state in saved_states(folder) if state.name <= final.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def saved_states(folder: Path) -> list[Path]:
    """Whole states, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def load_state(
    folder: Path,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    set_more: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
) -> int:
    """Fills parameters and optimizer from the newest state; returns its step, 0 when there is none. set_more: takes what else
    `save_state` was given.

    Raises UserError when the state is another run's, or damaged, saying whether the one before it is whole.
    """
    from safetensors import SafetensorError

    states = saved_states(folder)
    if not states:
        return 0
    state = states[-1]
    try:
        step, found = read_about(state)
        check_same_run(state, found, about)
        set_more(_fill(state / _TENSORS, trainable, optimizer))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the saved state {state} is damaged ({error}): {_way_on(states)}") from error
    return step


def read_about(state: Path) -> tuple[int, dict[str, Any]]:
    """The step of a state and what it says of its run. Raises OSError, ValueError, KeyError or TypeError when it is damaged."""
    found = json.loads((state / _ABOUT).read_text())
    # States of runs that began before there were checksums have neither of the two.
    if SEAL in found or "tensors" in found:
        try:
            found = unseal(found)
        except ValueError as error:
            raise ValueError(f"{_ABOUT}: {error}") from error
        if file_checksum(state / _TENSORS) != found.pop("tensors"):
            raise ValueError(f"{_TENSORS}: its checksum does not fit")
    return found.pop("step"), found


def _fill(
    path: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Returns what else there is."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        if missing := {f"parameter.{name}" for name in trainable} - names:
            raise ValueError(f"{path.name} lacks {sorted(missing)[0]} and {len(missing) - 1} more")
        for name, parameter in trainable.items():
            parameter.copy_(file.get_tensor(f"parameter.{name}"))
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in names:
                    value = file.get_tensor(f"{key}.{name}")
                    optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device, copy=True)
        return {name.removeprefix(_MORE): file.get_tensor(name) for name in names if name.startswith(_MORE)}


def _way_on(states: list[Path]) -> str:
    """What to do when the newest of `states`, oldest first, is damaged."""
    damaged = [states[-1]]
    for state in reversed(states[:-1]):
        try:
            step, _ = read_about(state)
        except (OSError, KeyError, ValueError, TypeError):
            damaged.append(state)
        else:
            return f"remove {' and '.join(map(str, damaged))}; --resume then goes on from step {step}, whose state is intact"
    return f"no other state is intact; remove {damaged[0].parent} and begin again"
