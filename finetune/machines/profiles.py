"""Machine profiles as files: those that come with the package, and the user's own."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.config.errors import ConfigError
from finetune.config.loading import read_yaml
from finetune.config.presets import presets_folder
from finetune.config.yaml_text import write_document
from finetune.memory.machine import MachineProfile
from finetune.options import show


def machine_names() -> list[str]:
    """Of those that come with the package."""
    return sorted(path.stem for path in (presets_folder() / "machines").glob("*.yaml"))


def find_machine(source: str) -> MachineProfile:
    """source: a YAML file, or the name of a machine that comes with the package. Raises ConfigError."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_machine(path)
    names = machine_names()
    if source not in names:
        near = difflib.get_close_matches(source, names, n=1)
        raise ConfigError(
            [
                f"expected a YAML file or one of the machines {', '.join(names)}; found neither"
                + (f"; did you mean {near[0]}?" if near else "")
            ],
            origin=repr(source),
        )
    return read_machine(presets_folder() / "machines" / f"{source}.yaml")


def read_machine(path: Path) -> MachineProfile:
    """Raises ConfigError, with a line for everything that is wrong."""
    values = read_yaml(path)
    try:
        profile = MachineProfile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_problems(error), str(path)) from None
    return profile if profile.name else profile.model_copy(update={"name": path.stem})


def machine_text(profile: MachineProfile) -> str:
    """YAML that `read_machine` makes an equal profile of."""
    return write_document(profile.model_dump(mode="json", exclude_defaults=True))


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        key, kind = ".".join(map(str, problem["loc"])), problem["type"]
        if kind == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _keys_beside(problem["loc"]), n=1)
            lines.append(
                f"{key}: unknown key{f'; nearest: {near[0]}' if near else ''} (value {show(problem['input'])})"
            )
        elif kind == "missing":
            lines.append(f"{key}: missing")
        else:
            expected = problem["msg"].removeprefix("Input should be ").split(", unable to parse")[0]
            a = "a number " if expected.startswith("greater") else ""
            lines.append(f"{key}: expected {a}{expected}, found {show(problem['input'])}")
    return lines


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    """Those that could stand where the last one of `location` stands."""
    part: Any = MachineProfile
    for name in location[:-1]:
        if isinstance(name, str) and name in part.model_fields:
            part = _part_in(part.model_fields[name].annotation) or part
    return list(part.model_fields)


def _part_in(annotation: Any) -> type[BaseModel] | None:
    """The part of a profile that a field's type speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_part_in, getattr(annotation, "__args__", ()))), None)
