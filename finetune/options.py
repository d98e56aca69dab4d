"""What the sections of a configuration are made of. Imports neither torch nor Transformers: sections live beside their code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from finetune.memory.units import parse_bytes


def show(value: Any) -> str:
    """For messages about a value that was found: at most 80 characters."""
    text = repr(value) if isinstance(value, (str, int, float, bool, list, dict, type(None))) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_amount(amount: Any) -> Any:
    if amount is not None:
        parse_bytes(amount, total_bytes=1 << 60)  # the form only; the machine's totals are the planner's matter
    return amount


def _check_absolute(amount: Any) -> Any:
    if amount is not None:
        parse_bytes(amount)
    return amount


def expand_path(path: Any) -> Any:
    """A path with the user's home in place of ~; anything else as it is."""
    return os.path.expanduser(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else path


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):  # it would count as 1 or 0
        raise ValueError(f"expected a number, found {value}")
    return value


Switch = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_check_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Amount = Annotated[str | int | None, BeforeValidator(_check_amount)]
AbsoluteAmount = Annotated[str | int | None, BeforeValidator(_check_absolute)]


class Conflict(NamedTuple):
    """Keys, dotted, whose values do not go together; problem: what was expected and what was found, these keys named."""

    keys: tuple[str, ...]
    problem: str


class Section(BaseModel):
    """Options that stand under one key. Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What is not as it is by default."""
        for key, value in super().__repr_args__():
            default = type(self).model_fields[key].default
            if type(value) is not type(default) or value != default:
                yield key, value

    def conflicts(self) -> Iterator[Conflict]:
        """Between keys of this section, which are named without it. `Config` asks all sections and reports everything."""
        yield from ()

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        """Between keys of this section and others, all named with their section."""
        yield from ()
