"""The presets: runnable configuration files, each a goal on a kind of machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Preset:
    """`goal` is the first comment line of the file."""

    name: str  # the file's name without `.yaml`
    goal: str
    path: Path  # of the file


def presets_folder() -> Path:
    """Where the files are: inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def find_preset(name: str) -> Path | None:
    return presets_folder() / f"{name}.yaml" if name in preset_names() else None


def read_presets() -> list[Preset]:
    presets = []
    for name in preset_names():
        path = presets_folder() / f"{name}.yaml"
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        presets.append(Preset(name, first_line.removeprefix("#").strip(), path))
    return presets
