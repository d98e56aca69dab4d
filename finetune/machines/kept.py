"""This machine's profile, kept in the user's cache: what `finetune bench` has measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from finetune.config.errors import ConfigError
from finetune.machines.profiles import machine_text, read_machine
from memory.errors import UserError
from memory.machine import MachineProfile
from offload.files.new_directory import flush
from offload.files.user_cache import user_cache


def profile_path() -> Path:
    return user_cache() / "machine.yaml"


def keep_profile(profile: MachineProfile) -> Path:
    """Writes it for its user alone, in place of the one that was kept. Drives of that one that were not measured again stay.

    Raises UserError when it cannot be written.
    """
    path = profile_path()
    earlier = kept_profile()
    if earlier is not None:
        measured = {drive.name for drive in profile.drives}
        others = tuple(drive for drive in earlier.drives if drive.name not in measured)
        profile = profile.model_copy(update={"drives": profile.drives + others})
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
