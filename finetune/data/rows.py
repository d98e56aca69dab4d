"""Rows of all forms: which form a row has, and what no form takes. The forms themselves are in `finetune.data.forms`."""

from __future__ import annotations

from typing import Any

from finetune.data.errors import DataError
from finetune.data.forms import FORMS
from finetune.data.forms.base import Form, ParsedRow
from finetune.data.forms.labelled import with_label
from finetune.data.forms.preference import parse_scored
from finetune.data.forms.text import TextPiece
from finetune.data.messages import kind_of
from finetune.plugin import load

_FORMS: dict[str, Form] = {name: load(place) for name, place in FORMS.items()}

_JUDGED_FORMS = {"pairs": "preference", "scores": "preference", "labels": "prompt_completion"}
# Columns with which other programs weigh rows or tokens.
ROW_WEIGHTS = frozenset("weight sample_weight sample_weights loss_weight loss_weights loss_scale".split())
# Columns that a model of text cannot be given: that a row has one is all that is read of them.
MEDIA = frozenset("image images video videos audio audios".split())
# Every column that some form reads; others are not even loaded from Parquet.
COLUMNS = ROW_WEIGHTS.union({"label"}, *(form.reads for form in _FORMS.values()))


def detect_form(row: Any, place: str, judged: str = "") -> str:
    """The form of a file, from its first row. judged: as in `TokenOptions`; what has other columns too is pairs only there."""
    if isinstance(row, TextPiece):
        return "text"
    keys = _object(row, place).keys()
    for name, form in sorted(_FORMS.items(), key=lambda one: (one[0] != _JUDGED_FORMS.get(judged), not one[1].leads)):
        if any(keys >= set(needed) for needed in form.needs):
            return name
    found = ", ".join(f'"{key}"' for key in list(row)[:12]) or "no keys"
    inner = next(
        (key for key, value in row.items() if isinstance(value, list) and value[:1] and _is_row(value[0])), None
    )
    todo = "rename the columns" if inner is None else f'write the list under "{inner}" alone to the file'
    *others, last = (
        " and ".join(f'"{column}"' for column in needed) for form in _FORMS.values() for needed in form.needs
    )
    raise DataError(f"{place}: expected a row with {', '.join(others)}, or {last}; found {found}: {todo}")


def check_judged(form: str, judged: str, place: str) -> None:
    """Raises DataError for rows of a form that does not suit rows which are `judged` so, see `TokenOptions`."""
    if form == "preference" and judged not in ("pairs", "scores"):
        raise DataError(
            f"{place}: found pairs of a chosen and a rejected answer: train on them with training.objective dpo, orpo, simpo "
            'or cpo, or write the prompt with the chosen one as "prompt" and "completion"'
        )
    wanted = _JUDGED_FORMS.get(judged, form)
    if form != wanted:
        columns = {
            "pairs": '"prompt", "chosen" and "rejected"',
            "scores": '"chosen" and "rejected"',
            "labels": '"prompt", "completion" and "label"',
        }[judged]
        raise DataError(
            f"{place}: this training.objective is of judged answers: expected rows with {columns}, found the form {form}"
        )


def _is_row(value: Any) -> bool:
    try:
        return isinstance(value, dict) and bool(detect_form(value, ""))
    except DataError:
        return False


def parse(row: Any, form: str, place: str, *, chat: bool, judged: str = "") -> ParsedRow:
    """Check one row of a known form.

    `chat`: the tokenizer has a chat template, through which Alpaca rows then go. `judged`: as in `TokenOptions`.
    Raises DataError naming `place`, the key, what was expected and what was found.
    """
    if isinstance(row, TextPiece):
        if form != "text":
            raise DataError(f'{place}: a .txt file holds plain text, but the form asked for is "{form}"')
        return row
    row = _object(row, place)
    kind = _FORMS[form]
    if kind.has_answers and (media := sorted(key for key in MEDIA & row.keys() if row[key])):
        raise DataError(f'{place}: found "{media[0]}": only text is trained on here: remove the column, or the rows')
    _refuse_weights(row, place)
    if judged == "scores":
        return parse_scored(row, place)
    if judged == "labels":
        return with_label(kind.parse(row, place, chat), row, place)
    if kind.has_answers and row.get("label") is False:
        raise DataError(
            f'{place}: found "label" false, which marks an unwanted answer (TRL\'s KTO). It would be learned like any '
            "other: leave such rows out, or train with training.objective kto"
        )
    return kind.parse(row, place, chat)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected one JSON object, found {kind_of(row)}")
    # Parquet and hub rows say null where JSON lines leave a key out.
    return {key: value for key, value in row.items() if value is not None}


def _refuse_weights(row: dict[str, Any], place: str) -> None:
    for key in ROW_WEIGHTS.intersection(row):
        values = row[key] if isinstance(row[key], list) else [row[key]]
        if any(isinstance(value, (int, float)) and value != 1 for value in values):
            raise DataError(f'{place}: found "{key}" {row[key]!r}, but all rows and tokens have equal weight here: remove it')
