"""Section `quantization`: how `quantize` packs weights, and where it keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from finetune.options import Conflict, Section, Switch, expand_path


class QuantizationOptions(Section):
    """What bitsandbytes writes: `quantize` says in how many bits."""

    nested: Switch = True
    """Of nf4: scales in 8 bits too (double quantization, Dettmers et al. 2023). 4.13 bits a weight in place of 4.5 are read
    from the disk at every pass."""
    cache: Annotated[Path | None, BeforeValidator(expand_path)] = None
    """Directory of quantised models. None: finetune/quantized in the user's cache directory."""

    def conflicts_with(self, config: Any) -> Iterator[Conflict]:
        if not self.nested and config.quantize != "nf4":
            problem = f"expected quantization.nested only with quantize nf4, found quantize {config.quantize or 'null'}"
            yield Conflict(("quantization.nested", "quantize"), problem)
        if self.cache is not None and config.quantize is None:
            problem = "expected quantization.cache only with quantize, found quantize null"
            yield Conflict(("quantization.cache", "quantize"), problem)
