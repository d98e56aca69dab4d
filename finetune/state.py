"""Resumable state: everything that a later process needs to go on with the same bits.

`state/step-N/` holds the adapter, the optimizer's moments and the position; it is written under another name, flushed and
renamed, so a directory of that name is whole. The two newest are kept: the one before stays until the next is durable.
Data order, learning rate and random numbers are functions of (seed, step) and need no saving.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memory.errors import UserError
from memory.new_directory import new_directory

_PREFIX = "step-"


def save_state(
    folder: Path,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
) -> Path:
    """Commits the state after `step` updates. about: JSON values that must match at resume. Raises UserError: disk full."""
    from safetensors.torch import save_file

    final = folder / f"{_PREFIX}{step:08d}"
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_directory(final) as temporary:
            (temporary / "state.json").write_text(json.dumps({"step": step, **about}, indent=2))
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / "tensors.safetensors"
            )
    except OSError as error:
        raise UserError(
            f"cannot save the state after step {step} in {folder}: {error.strerror or error}. The states saved before are "
            "intact; make room and go on with --resume"
        ) from error
    for old in sorted(saved_states(folder))[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def saved_states(folder: Path) -> list[Path]:
    """Whole states, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def load_state(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, about: dict[str, Any]
) -> int:
    """Fills parameters and optimizer from the newest state; returns its step, 0 when there is none.

    Raises UserError when the state belongs to a run with other settings, naming them, or when it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    states = saved_states(folder)
    if not states:
        return 0
    state = states[-1]
    try:
        found = json.loads((state / "state.json").read_text())
        step = found.pop("step")
        check_same_run(state, found, about)
        with safe_open(state / "tensors.safetensors", framework="pt") as file, torch.no_grad():
            names = set(file.keys())
            expected = {f"parameter.{name}" for name in trainable}
            if missing := expected - names:
                raise UserError(
                    f"cannot resume from {state}: it lacks {sorted(missing)[0]} and {len(missing) - 1} more"
                )
            for name, parameter in trainable.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                moments = {
                    key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in names
                }
                for key, full_name in moments.items():
                    value = file.get_tensor(full_name)
                    optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device, copy=True)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(
            f"the saved state {state} is damaged ({error}); remove it to go on from the one before"
        ) from error
    return step


def check_same_run(place: Path, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises UserError, naming the settings that differ, unless `found` in `place` is what this run would have written."""
    if different := _differences(found, about):
        raise UserError(
            f"cannot resume from {place}: the run was started with other settings ({'; '.join(different)}). "
            "Use the same settings, or another --output"
        )


def _differences(found: Mapping[str, Any], about: Mapping[str, Any], prefix: str = "") -> list[str]:
    words = []
    for key in sorted(found.keys() | about.keys()):
        then, now = found.get(key), about.get(key)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            words += _differences(then, now, f"{prefix}{key}.")
        elif then != now:
            words.append(f"{prefix}{key}: {then!r} then, {now!r} now")
    return words
