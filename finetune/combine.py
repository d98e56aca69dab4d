"""Several LoRA adapters of a model into one, by PEFT's own `add_weighted_adapter` around a model without weights.

Sources, by PEFT's words: Yadav et al. 2023 (ties), Yu et al. 2023 (dare), Ilharco et al. 2022 (linear); `cat` is exact, and
`svd` up to its rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapters import peft_files, saved
from finetune.adapters.seal import trained_on
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.weights.on_demand import weights_on_demand
from finetune.offload.weights.parts import cut
from finetune.runs.exports import check_new

KINDS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_UNCOMBINED = {
    "use_dora": "magnitudes", "lora_bias": "biases", "target_parameters": "adapters of stacked parameters",
    "modules_to_save": "modules that were trained whole", "trainable_token_indices": "rows of an embedding",
    "use_rslora": "adapters of rsLoRA, of which it gives the result another scale,",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Combination:
    """How adapters become one: PEFT's arguments.

    kind: of `KINDS`. density: the share of values that are kept, of kinds that prune. rank: of kinds with svd; None: the
    largest. majority_sign: "total" or "frequency", of kinds with ties. seed: of kinds with dare, which drop values by chance.
    """

    kind: str = "linear"
    density: float | None = None
    rank: int | None = None
    majority_sign: str = "total"
    seed: int = 42


def combine(adapters: Sequence[str], to: Path, how: Combination, model: str | None = None, trust_code: bool = False) -> str:
    """Writes the sum of `adapters`, each "PLACE" or "PLACE=WEIGHT", to the directory `to`, and says so, for people. A place is
    the directory of an adapter or of a run, or a hub id.

    model: what they were trained on; None: what the first one says. Memory: the adapters, and with svd one matrix of the model
    in fp32. Raises UserError.
    """
    check_new(to)
    _check(how, len(adapters))
    places, weights = zip(*(_split(word) for word in adapters), strict=True)
    bases = [trained_on(place) for place in places]
    if len({base["digest"] for base in bases if base is not None}) > 1:
        raise UserError(f"{places[0]} and others were trained on different weights: combine adapters of one model")
    about = next((base for base in bases if base is not None), None)
    parts = cut(resolve_model(model or _base_of(places[0])), trust_remote_code=trust_code)
    parts.model.name_or_path = parts.model.config._name_or_path = model or _base_of(places[0])
    read = [saved.read_plain(parts, place, tuple(_UNCOMBINED.items())) for place in places]
    names = [f"source{number}" for number in range(len(read))]
    try:
        with warnings.catch_warnings(), weights_on_demand(parts):
            warnings.simplefilter("ignore")
            combined = _combined(parts.model, names, read, weights, how)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"PEFT cannot combine these adapters: {' '.join(str(error).split())}") from error
    peft_files.save(combined, to, {"model": about, "run": ""} if about is not None else None)
    words = ", ".join(f"{place} x {weight:g}" for place, weight in zip(places, weights, strict=True))
    return f"{to}: one adapter ({how.kind}) of {words}"


def _combined(model: Any, names: Sequence[str], read: Sequence[Any], weights: Sequence[float], how: Combination) -> Any:
    from peft import get_peft_model, set_peft_model_state_dict

    adapted = None
    for name, (config, values) in zip(names, read, strict=True):
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        found = set_peft_model_state_dict(adapted, values, adapter_name=name)
        if found.unexpected_keys:
            raise UserError(f"an adapter has tensors that the model has no place for, such as {found.unexpected_keys[0]}")
        lost = saved.missing_tensors(adapted, name, values.keys(), found.missing_keys)
        if lost:
            raise UserError(f"an adapter lacks tensors that its configuration names, such as {lost[0]}: it is not whole")
    torch.manual_seed(how.seed)
    adapted.add_weighted_adapter(
        list(names), list(weights), "default", combination_type=how.kind, svd_rank=how.rank, density=how.density,
        majority_sign_method=how.majority_sign,
    )  # fmt: skip
    adapted.set_adapter("default")
    return adapted


def _check(how: Combination, count: int) -> None:
    if how.kind not in KINDS:
        raise UserError(f"--kind: expected one of {', '.join(KINDS)}, found {how.kind!r:.60}")
    if count < 2:
        raise UserError(f"expected two adapters or more, found {count}")
    prunes = how.kind.startswith(("ties", "dare", "magnitude"))
    if prunes != (how.density is not None):
        wanted, found = "the share of values to keep" if prunes else "none", "none" if prunes else f"{how.density:g}"
        raise UserError(f"--density: expected {wanted} with {how.kind}, found {found}")
    if how.density is not None and not 0 < how.density <= 1:
        raise UserError(f"--density: expected a number above 0 and at most 1, found {how.density:g}")
    if how.rank is not None and not (how.kind.endswith("svd") and how.rank > 0):
        raise UserError(f"--rank: expected a positive number, with kinds that end in svd, found {how.rank} with {how.kind}")
    if how.majority_sign not in ("total", "frequency"):
        raise UserError(f"--majority-sign: expected total or frequency, found {how.majority_sign!r:.60}")


def _split(word: str) -> tuple[Path, float]:
    """"PLACE=WEIGHT" or "PLACE"."""
    name, _, number = word.rpartition("=")
    try:
        weight = float(number) if name else 1.0
    except ValueError:
        raise UserError(f"expected ADAPTER or ADAPTER=WEIGHT, found {word!r:.200}") from None
    if not math.isfinite(weight):
        raise UserError(f"expected a finite weight, found {word!r:.200}")
    place = saved.find(name or word)
    inside = place / "adapter"
    return (inside if (inside / "adapter_config.json").is_file() else place), weight


def _base_of(place: Path) -> str:
    base = saved.base_name(place)
    if base is None:
        raise UserError(f"{place} does not say which model it was trained on: give --model")
    return base
