"""config.yaml in a run's directory: the settings of the run, so that the directory is all that later commands need."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from finetune.config.config import Config
from finetune.data.options import is_named, split_part

_FIRST_LINE = "# The settings of this run, written by finetune.\n"
_USES = """# Name this directory where a command takes a configuration:
#   finetune resume, eval, generate, chat, export DIRECTORY
"""


def run_text(config: Config) -> str:
    """What `config.yaml` holds: all keys, with whole paths, so that it serves from anywhere (but for a reward in a file,
    whose name is part of what the run is); without those of one call only."""
    changes: dict[str, Any] = {"model": _whole(config.model), "resume": False, "trace": None, "machine": None}
    changes["output"] = config.output.absolute()
    changes |= {key: _whole(getattr(config, key)) for key in ("data", "eval_data")}
    changes["dataset"] = config.dataset.model_copy(update={"chat_template": _whole(config.dataset.chat_template)})
    if (cache := config.quantization.cache) is not None:
        changes["quantization"] = config.quantization.model_copy(update={"cache": cache.absolute()})
    return _FIRST_LINE + _USES + config.model_copy(update=changes).to_yaml()


def may_be_replaced(path: Path) -> bool:
    """Whether nothing stands there, or what a run has written."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline() == _FIRST_LINE
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _whole(value: Any) -> Any:
    """A path or pattern of files that are here, from the root; a hub id, text and rows as they are."""
    if isinstance(value, list) and is_named(value):
        return [_whole(one) for one in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or len(value) > 4096 or "\n" in value:
        return value
    is_here = os.path.exists(value) or glob.glob(value) or os.path.exists(split_part(value)[0])
    return os.path.abspath(value) if is_here else value
