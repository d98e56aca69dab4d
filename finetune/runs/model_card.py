"""A model card, as the hub reads it: what a model was made of, how, and how well it did. It stands beside adapters and
exports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune.config.yaml_text import read_document
from finetune.runs.directory import RUN, recorded
from finetune.runs.identity import flat

CARD = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Of the base's card."""
_SETTINGS = (
    "training.learning_rate", "training.lr_scheduler", "training.batch_size", "training.seed", "training.objective",
    "dataset.sequence_length", "dataset.packing", "quantize", "lora.r", "lora.alpha", "lora.dropout", "adapter.type",
    "optimizer.name", "engine.dtype",
)  # fmt: skip


def model_card(output: Path, base: str, library: str, what: str, base_card: Path | None = None) -> str:
    """Of what the run in `output` has made, Markdown under a header of YAML; without a run, of what was made of `base`.

    base: the model as it was named; the paths of this machine are left out. library: "peft", "transformers" or "gguf". what:
    what it is, in a sentence. base_card: the base's own, of which licence and languages are taken.
    """
    from huggingface_hub import ModelCardData

    run, report = recorded(output) or {}, _json(output / "report.json")
    settings, own = flat(run.get("settings", {})), _yaml(output / "config.yaml")
    names = [str(name) for name in _list(own.get("data"))]
    method, kept = run.get("method"), {key: value for key, value in _header(base_card).items() if key in _KEPT}
    header = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if library == "peft" else "quantized" if library == "gguf" else "finetune",
        library_name=library,
        datasets=[name for name in names if is_hub_id(name)] or None,
        tags=["finetune", *([method] if method else []), *(["base_model:adapter:" + base] if library == "peft" else [])],
        **{"pipeline_tag": "text-generation", **kept},
    )
    if not is_hub_id(base):
        del header.base_model_relation
        header.tags = [tag for tag in header.tags if not tag.startswith("base_model:")]
    lines = ["---", header.to_yaml(), "---", "", f"# {shown_name(base)}, fine-tuned" if run else f"# {shown_name(base)}", ""]
    lines += [what, "", f"- Base model: {f'[{base}](https://huggingface.co/{base})' if is_hub_id(base) else shown_name(base)}"]
    if run:
        rows = run.get("data", {}).get("examples")
        shown = ", ".join(map(shown_name, names)) or "not named"
        lines += [f"- Data: {shown}{f' ({rows} rows)' if rows is not None else ''}"]
        steps, best = report.get("steps", run.get("num_steps")), report.get("best")
        words = f"{best['step']} of {steps} steps, after which {best['metric']} was best" if best else f"{steps} steps"
        lines += [f"- Method: `{method}`, {words}"]
        lines += _table("Settings", ((key, settings[key]) for key in _SETTINGS if settings.get(key) not in (None, False)))
        lines += _table("Results", _results(report))
        versions = ", ".join(f"{name} {number}" for name, number in run.get("versions", {}).items())
        lines += ["", f"Made with {versions}."]
    return "\n".join(lines) + "\n"


def run_of(place: Path) -> Path:
    """The directory of the run that an adapter in `place` is of; `place`, where it is of none."""
    return place.parent if (place.parent / RUN).is_file() and not (place / RUN).is_file() else place


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is not None and not Path(name).exists()


def shown_name(name: str) -> str:
    """Without the folders of this machine."""
    return name if is_hub_id(name) else Path(name.rstrip("/")).name


def _results(report: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Of the step that is the result: what was measured after others is left out."""
    best = report.get("best")
    for key in ("first_loss",) if best else ("first_loss", "last_loss", "training_loss"):
        if report.get(key) is not None:
            yield key.replace("_", " "), report[key]
    yield from [(best["metric"], best["value"])] if best else (report.get("evaluation") or {}).items()


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> list[str]:
    lines = [f"| {key} | {f'{value:.6g}' if isinstance(value, float) else value} |" for key, value in rows]
    return ["", f"## {title}", "", "| | |", "|---|---|", *lines] if lines else []


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _json(path: Path) -> dict[str, Any]:
    return _mapping(path, json.loads)


def _yaml(path: Path) -> dict[str, Any]:
    return _mapping(path, lambda text: read_document(text)[0])


def _mapping(path: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """Empty where there is none, or it is damaged: a card is made of what is left."""
    try:
        found = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _header(card: Path | None) -> dict[str, Any]:
    """Of another card; empty where it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(card) if card is not None and card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        return {}
