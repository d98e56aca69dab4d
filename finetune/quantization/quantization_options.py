"""Section `quantization`: how `quantize` packs weights, and where it keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from finetune.options import Conflict, Section, Switch, expand_path, show

_LEAST_BITS, _MOST_BITS = 4, 16  # both taken by nobody: scales come on top of 4, and 16 is the model as it is


def _check_quantize(value: Any) -> Any:
    """nf4, int8, None, or a number of bits, as a float."""
    if value in (None, "nf4", "int8"):
        return value
    try:
        bits = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        bits = float("nan")
    if not _LEAST_BITS < bits < _MOST_BITS:
        raise ValueError(
            f"expected nf4, int8, or bits a weight above {_LEAST_BITS} (scales come on top of 4) and below {_MOST_BITS} (left "
            f"out, a model stays in 16 bits), found {show(value)}"
        )
    return bits


Quantize = Annotated[Literal["nf4", "int8"] | float | None, BeforeValidator(_check_quantize)]


class QuantizationOptions(Section):
    """What bitsandbytes writes: `quantize` says in how many bits."""

    nested: Switch = True
    """Of nf4: scales in 8 bits too (double quantization, Dettmers et al. 2023). 4.13 bits a weight in place of 4.5 are read
    from the disk at every pass."""
    cache: Annotated[Path | None, BeforeValidator(expand_path)] = None
    """Directory of quantised models. None: in the user's cache directory, see `finetune cache`."""

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if not self.nested and config.quantize in (None, "int8"):
            problem = f"expected quantization.nested only with quantize nf4 or bits, found quantize {config.quantize or 'null'}"
            yield Conflict(("quantization.nested", "quantize"), problem)
        if self.cache is not None and config.quantize is None:
            problem = "expected quantization.cache only with quantize, found quantize null"
            yield Conflict(("quantization.cache", "quantize"), problem)
