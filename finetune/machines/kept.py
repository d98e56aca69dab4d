"""This machine's profile, kept in the user's cache: what `finetune bench` has measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from finetune.config.errors import ConfigError
from finetune.machines.profiles import machine_text, read_machine
from finetune.memory.errors import UserError
from finetune.memory.machine import Drive, MachineProfile
from finetune.offload.devices import Device
from finetune.offload.files.new_directory import flush
from finetune.offload.files.user_cache import user_cache
from finetune.offload.rates.disk import drive_name
from finetune.offload.rates.machine import is_current


def profile_path() -> Path:
    return user_cache() / "machine.yaml"


def keep_profile(profile: MachineProfile) -> Path:
    """Writes it for its user alone, in place of the one that was kept. Raises UserError when it cannot be written."""
    path = profile_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".machine.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(machine_text(profile))
            flush(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        flush(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}): mend that, or set XDG_CACHE_HOME to another directory"
        ) from None
    return path


def kept_profile() -> MachineProfile | None:
    """None: there is none, or it was written by another version or changed by hand into something else."""
    path = profile_path()
    try:
        return read_machine(path) if path.is_file() else None
    except ConfigError:
        return None


def current_profile(device: Device) -> MachineProfile | None:
    """Of this machine as it is now. None: none is kept, or it was measured before something changed."""
    profile = kept_profile()
    return profile if profile is not None and is_current(profile, device) else None


def kept_drive(device: Device, path: Path) -> Drive | None:
    """The drive that a path lies on, if it was measured, writes too, on this machine as it is now."""
    profile, name = current_profile(device), drive_name(path)
    drives = () if profile is None else profile.drives
    return next((drive for drive in drives if drive.name == name and drive.write_bytes_per_second), None)
