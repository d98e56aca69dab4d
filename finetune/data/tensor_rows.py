"""A data set of tensors: for models that read pictures, sound or features, beside or instead of text, and for those whose loss
is not of the next token.

[Note: rows of tensors]
A row is one sample, without its batch dimension: names of the model's forward -> tensors, arrays, numbers or nested lists of
numbers. Everything in it reaches the model; what the model does not take is refused by name. Samples are stacked. Sequences
beside `input_ids` may have unlike lengths and are padded on the right, as Transformers' collators do; what stands for all
patches of a row's pictures (beside a `..._grid_thw`) is concatenated, as its processors do.
Rows of tokens alone are text to a causal language model, see `finetune.data.forms`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.data.cache import MASKED
from finetune.data.model_kinds import reads_text, taken_names
from finetune.data.options import sources_in
from finetune.data.sources import File, HubSplit, read_rows, resolve
from finetune.memory.errors import UserError
from finetune.offload.weights.parts import ModelParts

_TOKEN_COLUMNS = {"input_ids", "labels", "attention_mask"}
_GRIDS = ("image_grid_thw", "video_grid_thw")
_OF_PATCHES = {*_GRIDS, "pixel_values", "pixel_values_videos", "second_per_grid_ts"}
SAMPLED_ROWS = 1024


class TensorRows:
    """See [Note: rows of tensors].

    rows: the samples. pad_token_id: for `input_ids` and `decoder_input_ids`. takes: the names that the model takes. Raises
    UserError for what it does not.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0, takes: Sequence[str] | None = None) -> None:
        self._rows = rows
        self._pad_token_id = pad_token_id
        self._takes = takes
        self.lengths = self._find_lengths()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def digest(self) -> str:
        """Of the samples and their order, 128 bits in hexadecimal. Of a list or tuple all of it; of a sequence that makes its
        rows when they are asked for, their number and 1024 of them, and no values where they are others each time."""
        indices: Sequence[int] = range(len(self._rows))
        in_memory = isinstance(self._rows, (list, tuple))
        if not in_memory:
            indices = indices[:: -(-len(indices) // SAMPLED_ROWS)]
        with_values = in_memory or _digest([self._row(0)], True) == _digest([self._row(0)], True)
        return _digest((self._row(index) for index in indices), with_values, len(self._rows))

    def reading_bytes(self, count: int) -> int:
        """What reading so many rows together takes at most, beside their tensors."""
        return 0

    def describe(self) -> list[str]:
        """What became of the rows, in lines for the user."""
        return []

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A micro-batch of these rows: `input_ids` first, where there are any, then tensors [B, ...]."""
        rows = [self._row(index) for index in indices]
        names = sorted(rows[0], key=lambda name: name != "input_ids")
        for index, row in zip(indices, rows, strict=True):
            if row.keys() != rows[0].keys():
                name = min(row.keys() ^ rows[0].keys())
                raise UserError(f'data[{index}]: expected the same columns as in other rows, but one of them lacks "{name}"')
        concatenated = _OF_PATCHES if any(name in rows[0] for name in _GRIDS) else ()
        batch = {}
        for name in names:
            values = [row[name].long() if row[name].dtype in (torch.int16, torch.int32) else row[name] for row in rows]
            if name in concatenated:
                batch[name] = torch.cat(values)
            elif len({value.shape for value in values}) == 1:
                batch[name] = torch.stack(values)
            else:
                batch[name] = self._padded(name, values, rows)
        if "attention_mask" not in batch:
            batch |= _padding_mask(rows)
        return batch

    def largest(self, count: int) -> dict[str, torch.Tensor]:
        """A micro-batch that takes no less memory than any `count` rows: the longest ones."""
        return self.collate(np.argsort(-self.lengths, kind="stable")[:count].tolist())

    def _padded(
        self, name: str, values: Sequence[torch.Tensor], rows: Sequence[Mapping[str, torch.Tensor]]
    ) -> torch.Tensor:
        is_sequence = all(value.ndim == 1 and not value.is_floating_point() for value in values)
        beside = "input_ids" in rows[0] and all(len(row[name]) == len(row["input_ids"]) for row in rows if row[name].ndim)
        if not is_sequence or not (beside or name in ("labels", "decoder_input_ids", "decoder_attention_mask")):
            shapes = " and ".join(str(list(shape)) for shape in sorted({tuple(value.shape) for value in values})[:2])
            raise UserError(
                f'data: expected samples of one shape in "{name}", found {shapes}: bring them to one shape, or set '
                "micro_batch_size 1, with which each is computed alone"
            )
        fill = MASKED if name == "labels" else self._pad_token_id if name.endswith("input_ids") else 0
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    def _row(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: value for name, value in self._rows[index].items() if value is not None}
        unknown = [name for name in row if self._takes is not None and name not in self._takes]
        if unknown:
            raise UserError(
                f'data[{index}]: the model\'s forward takes no "{unknown[0]}": expected columns among '
                f"{', '.join(self._takes)}; remove or rename it"
            )
        return {name: as_tensor(value, f'data[{index}]: "{name}"') for name, value in row.items()}

    def _find_lengths(self) -> np.ndarray:
        """Tokens of each row; 1 for rows without tokens, which are all alike."""
        if "input_ids" not in self._rows[0]:
            return np.ones(len(self._rows), np.int64)
        columns = getattr(self._rows, "column_names", None)  # of a datasets.Dataset, which makes rows on demand
        ids = self._rows["input_ids"] if columns else [row["input_ids"] for row in self._rows]
        return np.array([len(one) for one in ids], np.int64)


def _padding_mask(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`attention_mask`, where there are tokens and not as many in each row."""
    lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
    if len(set(lengths)) < 2:
        return {}
    masks = [torch.ones(length, dtype=torch.int64) for length in lengths]
    return {"attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True)}


def _digest(rows: Iterable[Mapping[str, torch.Tensor]], with_values: bool, count: int = 1) -> str:
    digest = hashlib.blake2b(str(count).encode(), digest_size=16)
    for row in rows:
        for key in sorted(row):
            value = row[key].cpu()
            digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\n".encode())
            if with_values:
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def as_tensor(value: Any, place: str) -> torch.Tensor:
    """Numbers in any form; fp64, Python's and NumPy's own, becomes fp32. Raises UserError for others."""
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: expected numbers in equal rows, found {_kind(value)}: {error}") from None
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def open_tensor_rows(source: Any, parts: ModelParts) -> TensorRows | None:
    """The rows of `source`, a sequence or the path of files, where they are tensors to this model; None: it is text."""
    sources, takes = sources_in(source), taken_names(parts.model)
    are_tensors = [_is_row_of_tensors(_first_of(one), takes, reads_text(parts)) for one in sources]
    if not any(are_tensors):
        return None
    if not all(are_tensors):
        raise UserError("data: expected rows of tensors in each source, or of text in each, found both")
    rows = _rows_of(source) if len(sources) == 1 else list(chain.from_iterable(map(_rows_of, sources)))
    pad = getattr(parts.model.config.get_text_config(), "pad_token_id", None)
    return TensorRows(rows, pad if isinstance(pad, int) else 0, takes)


def _first_of(source: Any) -> Any:
    if isinstance(source, (str, Path)):
        return _first_row(str(source))
    is_sequence = not isinstance(source, Mapping) and hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return source[0] if is_sequence and len(source) else None


def _rows_of(source: Any) -> Sequence[Mapping[str, Any]]:
    is_path = isinstance(source, (str, Path))
    return [row for file in resolve(source) for row in _tensors(file)] if is_path else source


def _is_row_of_tensors(row: Any, takes: Sequence[str], is_text_model: bool) -> bool:
    if not isinstance(row, Mapping):
        return False
    arrays = {name: value for name, value in row.items() if _is_array(value)}
    if "input_ids" not in arrays:
        return any(name in takes or isinstance(value, (torch.Tensor, np.ndarray)) for name, value in arrays.items())
    others = arrays.keys() - _TOKEN_COLUMNS
    return not is_text_model or any(name in takes or _is_array(arrays[name][0]) for name in others if len(arrays[name]))


def _is_array(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim > 0
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
        if isinstance(value, (int, float)) or isinstance(value, (torch.Tensor, np.ndarray, np.number)):
            return True
    return False


def _first_row(source: str) -> Any:
    """None: it has none, or is not here."""
    try:
        found = resolve(source)
        return next((row for _, row in read_rows(found[0], every_column=True)), None) if found else None
    except UserError:
        return None  # whoever reads it as text says what is wrong


def _tensors(file: File | HubSplit) -> list[dict[str, torch.Tensor]]:
    found = []
    for place, row in read_rows(file, every_column=True):
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: expected one JSON object, found {_kind(row)}")
        kept = {name: value for name, value in row.items() if value is not None}
        found.append({name: as_tensor(value, f'{place}: "{name}"') for name, value in kept.items()})
    return found


def _kind(value: Any) -> str:
    return "a string" if isinstance(value, str) else f"a {type(value).__name__}"
