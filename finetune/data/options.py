"""Section `dataset`, and what data may be given as."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from finetune.data.forms import FORMS
from finetune.options import Conflict, Count, Positive, Section, Switch, expand_path, show


class DatasetOptions(Section):
    """How rows become tokens."""

    form: Literal["auto", *FORMS] = "auto"
    """What rows look like, see `finetune.data.forms`. auto: by the first row of each file."""
    sequence_length: Count = 1024
    """Tokens a row at most."""
    evaluation_stride: Count | None = None
    """Of plain text that is measured: tokens by which a window of sequence_length moves on. Those before them are only seen.
    None: windows lie side by side, and the first tokens of each have little before them."""
    packing: Switch = False
    """Fill rows with several examples; attention stays within each example."""
    completion_only: Switch = True
    """Loss on completions and assistant turns only."""
    append_eos: Switch | None = None
    """None: as is usual for the form."""
    chat_template: str | None = None
    """A path or the template itself; None: the tokenizer's own."""
    probabilities: list[Positive] = []
    """How often a row comes from each of several sources in `data`, drawn as `datasets.interleave_datasets` does with
    `training.seed`; divided by their sum. Empty: all rows of one source after the other."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """When a mixture with `probabilities` ends: with the last row of any source, or of every source, of which the others then
    begin again."""
    streaming: Switch = False
    """Reads no more of `data` than `training.max_steps` can use, and hub data without downloading them whole."""

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if self.evaluation_stride is not None and self.evaluation_stride > self.sequence_length:
            length, found = self.sequence_length, self.evaluation_stride
            problem = f"expected dataset.evaluation_stride to be at most dataset.sequence_length ({length}), found {found}"
            yield Conflict(("dataset.evaluation_stride", "dataset.sequence_length"), problem)
        count, found = len(sources_in(config.data)), len(self.probabilities)
        if found and config.data is not None and found != count:
            problem = f"expected as many dataset.probabilities as data has sources ({count}), found {found}"
            yield Conflict(("dataset.probabilities", "data"), problem)
        streams = self.streaming or any(is_stream(one) for one in sources_in(config.data))
        if streams and config.training.max_steps is None:
            keys = ("training.max_steps", "dataset.streaming", "data")
            yield Conflict(keys, "expected training.max_steps where data are read as a stream, which has no length, found none")


def sources_in(data: Any) -> list[Any]:
    """Its sources: those of a list of names or of data sets, or itself alone."""
    several = isinstance(data, (list, tuple)) and data and not any(isinstance(one, Mapping) for one in data)
    return list(data) if several else [data]


def is_named(data: Any) -> bool:
    """Whether all of it can be written in a file; rows cannot."""
    return all(isinstance(one, (str, os.PathLike, type(None))) for one in sources_in(data))


def name_of(data: Any) -> str:
    """In short."""
    named = (one for one in sources_in(data) if one is not None)
    return ", ".join(os.path.basename(one) if isinstance(one, (str, os.PathLike)) else "rows" for one in named)


def is_stream(source: Any) -> bool:
    """Whether it gives its rows one after the other and does not know how many, as a `datasets.IterableDataset`."""
    return not (is_named(source) or hasattr(source, "__len__"))


_SPLITS = {"data": ("train",), "eval_data": ("validation", "test")}


def with_splits(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the splits that are meant in place of a mapping of splits, such as a `datasets.DatasetDict`: of `data` that
    is train, and validation is `eval_data` where that is not given."""
    taken = dict(values)
    splits = values.get("data")
    if isinstance(splits, Mapping) and "train" in splits and "validation" in splits:
        taken.setdefault("eval_data", splits["validation"])
    for key, names in _SPLITS.items():
        if isinstance(splits := values.get(key), Mapping):
            taken[key] = next((splits[name] for name in names if name in splits), splits)
    return taken


SAMPLES = Path(__file__).parent.parent / "samples"


def _check_data(data: Any) -> Any:
    if data is None or isinstance(data, (str, os.PathLike)):
        data = expand_path(data)
        return _sample_path(data.removeprefix("sample:")) if data and data.startswith("sample:") else data
    if isinstance(data, Mapping):
        named = ", ".join(map(str, data))
        raise ValueError(f"expected rows, or splits named train and validation, found a mapping with {named:.60}")
    if len(sources := sources_in(data)) > 1 or sources[0] is not data:
        if any(one is None for one in sources):
            raise ValueError("expected a path, a hub id or rows at each place of the list, found null: remove it")
        checked = [_check_data(one) for one in sources]
        return checked if len(checked) > 1 else checked[0]
    in_sequence = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not in_sequence and (not hasattr(data, "__iter__") or hasattr(data, "__next__")):
        raise ValueError(f"expected paths, hub ids, a sequence of rows or a datasets.IterableDataset, found {show(data)}")
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
"""A path, a hub id, `sample:NAME` for a file shipped here, or (in Python) a sequence or stream of rows; or a list of these."""
