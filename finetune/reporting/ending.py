"""What a run says when it has ended: what was learned, where the result is, what to do with it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.memory.units import format_seconds


def describe_ending(report: Mapping[str, Any], output: Path, has_adapter: bool, is_text: bool, can_merge: bool) -> str:
    """report: what report.json says. The others as in `describe_result`."""
    done = report["steps"] - report["first_step"]
    lines = [f"{done} steps in {format_seconds(report['seconds'])}{_losses(report)}"]
    if report["evaluation"]:
        lines.append("evaluation: " + describe_values(report["evaluation"]))
    if report.get("best"):
        best = report["best"]
        lines.append(f"the result is that of step {best['step']}, with the best {best['metric']}, {best['value']:.4f}")
    lines.append(f"{output / 'report.html'}: the curves, times and memory, for a browser")
    return "\n".join([*lines, describe_result(output, has_adapter, is_text, can_merge)])


def describe_result(output: Path, has_adapter: bool, is_text: bool, can_merge: bool) -> str:
    """output: the run's directory. is_text: whether the model can be spoken with. can_merge: whether an adapter
    can be merged into it."""
    place = shlex.quote(str(output))
    what = "the adapter, in PEFT's format" if has_adapter else "the tuned model, until it is exported"
    result = f"{output / 'adapter' if has_adapter else output}: {what}"
    merge = " --merge plain" if has_adapter else ""
    uses = [f"eval {place} --data FILE"]
    if is_text:
        uses += [f'generate {place} --prompt "..."', f"chat {place}"]
    if can_merge or not has_adapter:
        uses.append(f"export {place}{merge} --to DIRECTORY")
    return "\n".join([result, "Next:", *(f"  finetune {words}" for words in uses)])


def describe_values(values: Mapping[str, Any]) -> str:
    """Of an evaluation, in one line."""
    shown = {name: value for name, value in values.items() if name not in ("seconds", "tokens", "perplexity")}
    return ", ".join(f"{name} {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'}" for name, value in shown.items())


def _losses(report: Mapping[str, Any]) -> str:
    first, last = report["first_loss"], report["last_loss"]
    if first is None or last is None:
        return ""
    return f"; loss {first:.4f} in the first and {last:.4f} in the last, {report['training_loss']:.4f} on average"
