"""Section `dataset`, and what data may be given as."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from finetune.data.forms import FORMS
from finetune.options import Count, Section, Switch, expand_path, show


class DatasetOptions(Section):
    """How rows become tokens."""

    form: Literal["auto", *FORMS] = "auto"
    """What rows look like, see `finetune.data.forms`. auto: by the first row of each file."""
    sequence_length: Count = 1024
    """Tokens a row at most."""
    packing: Switch = False
    """Fill rows with several examples; attention stays within each example."""
    completion_only: Switch = True
    """Loss on completions and assistant turns only."""
    append_eos: Switch | None = None
    """None: as is usual for the form."""
    chat_template: str | None = None
    """A path or the template itself; None: the tokenizer's own."""


SAMPLES = Path(__file__).parent.parent / "samples"


def _check_data(data: Any) -> Any:
    if data is None or isinstance(data, (str, os.PathLike)):
        data = expand_path(data)
        return _sample_path(data.removeprefix("sample:")) if data and data.startswith("sample:") else data
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(f"expected a path, a hub id or a sequence of rows, found {show(data)}")
    if isinstance(data, (list, tuple)) and data and all(isinstance(one, (str, os.PathLike)) for one in data):
        raise ValueError(f"expected one path (a folder or a glob for several files) or rows, found names {show(data)}")
    return data


def split_part(source: str) -> tuple[str, str]:
    """A source's name, and which of its rows are meant: "a.jsonl[:90%]" is a.jsonl and [:90%]; of all rows it is empty."""
    found = re.fullmatch(r"(.+?)(\[\d*%?:\d*%?\])", source)
    return (found[1], found[2]) if found else (source, "")


def _sample_path(source: str) -> str:
    name, part = split_part(source)
    names = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    if name not in names:
        raise ValueError(f"expected one of the samples shipped here ({', '.join(names)}), found {name!r}")
    return str(SAMPLES / f"{name}.jsonl") + part


Data = Annotated[Any, BeforeValidator(_check_data)]
"""A path, a hub id, `sample:NAME` for a file shipped here, or (in Python) a sequence of rows."""
