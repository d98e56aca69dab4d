"""report.html: what a run was and did, in one file that loads nothing from elsewhere and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes, format_seconds
from finetune.reporting.report import METRIC_KEYS, read_metrics, write_text
from finetune.reporting.svg_chart import Curve, chart, shares

PAGE = "report.html"
SMOOTHED_STEPS = 10  # of a loss, at most so many count; fewer in a short run
_NOT_SHOWN = ("seconds", "tokens", "examples", "perplexity")  # of an evaluation, as curves
_STYLE = """
:root{--ink:#1b1f24;--faint:#6b7280;--line:#e5e7eb;--back:#fff;--c0:#2563eb;--c1:#d97706;--c2:#059669;--c3:#db2777}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--faint:#9ca3af;--line:#374151;--back:#111827;--c0:#60a5fa;--c1:#fbbf24;
--c2:#34d399;--c3:#f472b6}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1100px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:0 0 .4em}.sub{color:var(--faint);margin:.2em 0 1.5em}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:1.5em 2em}section{margin-bottom:1.8em}
svg{width:100%;height:auto;display:block}.grid{stroke:var(--line)}.tick{fill:var(--faint);font-size:11px}
polyline{fill:none;stroke-width:2}.faint{stroke-width:1;opacity:.4}.limit{stroke-dasharray:5 4;stroke-width:1.5}
.curve0{stroke:var(--c0)}.curve1{stroke:var(--c1)}.curve2{stroke:var(--c2)}.curve3{stroke:var(--c3)}
.fill0{fill:var(--c0)}.fill1{fill:var(--c1)}.fill2{fill:var(--c2)}.fill3{fill:var(--c3)}
.legend{margin:.2em 0;font-size:13px;color:var(--faint)}.key{margin-right:1em}.key::before{content:"";display:inline-block;
width:.8em;height:.8em;border-radius:2px;margin-right:.35em;background:var(--c0)}.key1::before{background:var(--c1)}
.key2::before{background:var(--c2)}.key3::before{background:var(--c3)}
table{border-collapse:collapse;font-size:14px}td,th{padding:.2em .9em .2em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}th{color:var(--faint);font-weight:normal}
pre{background:var(--line);padding:.8em;border-radius:6px;overflow:auto;font-size:13px;white-space:pre-wrap}summary{cursor:pointer}
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model says after a prompt, before and after the run."""

    prompt: str
    before: str
    after: str


def write_page(output: Path, next_commands: str, samples: Sequence[Sample] = ()) -> Path:
    """Writes report.html of the run in `output` from its metrics.jsonl, report.json (where it has ended) and config.yaml.

    next_commands: as text. Raises UserError for files that are damaged, or cannot be written.
    """
    path = output / PAGE
    if not (output / "metrics.jsonl").is_file():
        raise UserError(f"expected the directory of a run, found no metrics.jsonl in {output}")
    rows = list(read_metrics(output / "metrics.jsonl"))
    report = _read(output / "report.json")
    config = output / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    write_text(path, _page(output, rows, report, text, next_commands, samples))
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from error


def _page(
    output: Path, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], config: str, next_commands: str,
    samples: Sequence[Sample],
) -> str:  # fmt: skip
    parts = [_heading(output, rows, report), '<div class="grid2">']
    parts += [_section(title, drawn) for title, drawn in _charts(rows, report) if drawn]
    parts += ["</div>", _section("Where the time went", _times(rows)), _section("Plan and outcome", _outcome(report))]
    parts.append(_section("Last evaluation", _values(report.get("evaluation") or {})))
    parts += [_section("Before and after", "".join(map(_sample, samples)))]
    parts.append(_section("Next", f"<pre>{escape(next_commands)}</pre>"))
    if config:
        parts.append(_section("Settings", f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(output.name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def _heading(output: Path, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    words = [str(report["model"])] if "model" in report else []
    if rows:
        words.append(f"{rows[-1]['step']} steps")
        words.append(f"{sum(row['tokens'] for row in rows):,} tokens in {format_seconds(sum(row['seconds'] for row in rows))}")
    if report.get("best"):
        best = report["best"]
        words.append(f"result: step {best['step']}, {best['metric']} {best['value']:.4f}")
    if not report:
        words.append("not ended yet")
    return f'<h1>{escape(output.name)}</h1><p class="sub">{escape(" · ".join(words))}</p>'


def _charts(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    def of(key: str) -> list[tuple[float, float | None]]:
        return [(row["step"], row[key]) for row in rows if row.get(key) is not None]

    losses = [Curve("smoothed", _smoothed(of("loss"))), Curve("each step", of("loss"), "faint")]
    found = [("Loss", chart([*losses, Curve("evaluation", of("eval_loss"), "dots")]))]
    measured = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_") and key != "eval_loss")
    for key in measured:
        name = key.removeprefix("eval_")
        if name not in _NOT_SHOWN:
            found.append((f"Evaluation: {name}", chart([Curve(name, of(key), "dots")])))
    found.append(("Learning rate", chart([Curve("learning rate", of("learning_rate"))], "{:.2g}".format)))
    found.append(("Gradient norm, before clipping", chart([Curve("norm", of("grad_norm"))])))
    logged = dict.fromkeys(
        key for row in rows for key, value in row.items()
        if key not in METRIC_KEYS and not key.startswith("eval_") and isinstance(value, int | float) and key != "written_bytes"
    )  # fmt: skip
    found += [(key, chart([Curve(key, of(key))])) for key in logged]
    for key, name in (("host_peak_bytes", "Host memory"), ("device_peak_bytes", "Device memory")):
        limits = [(word, report.get(word, {}).get(key)) for word in ("budget", "predicted")]
        limits, peaks = [(word, size) for word, size in limits if size], of(key)
        most = max((size for _, size in [*peaks, *limits]), default=0)
        unit, word = (1 << 30, "GiB") if most >= 1 << 30 else (1 << 20, "MiB")
        curves = [Curve("peak so far", [(step, size / unit) for step, size in peaks])]
        curves += [Curve(word, [(1, size / unit)], "limit") for word, size in limits]
        if any(size for _, size in peaks):
            found.append((f"{name} against its budget, {word}", chart(curves)))
    seconds = [Curve("a step", of("seconds")), Curve("of that waited for transfers", of("stall_seconds"))]
    found.append(("Seconds", chart(seconds)))
    found.append(("Tokens a second", chart([Curve("tokens a second", of("tokens_per_s"))], "{:,.0f}".format)))
    return found


def _smoothed(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """An exponential mean, its bias taken out."""
    found, mean, weight = [], 0.0, 0.0
    kept = 1 - 1 / max(1.0, min(SMOOTHED_STEPS, len(points) / SMOOTHED_STEPS))
    for step, value in points:
        mean, weight = kept * mean + (1 - kept) * value, kept * weight + 1 - kept
        found.append((step, mean / weight))
    return found


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    stalls = sum(row["stall_seconds"] for row in rows)
    steps = sum(row["seconds"] for row in rows)
    parts = [("computing", max(0.0, steps - stalls)), ("waiting for transfers", stalls)]
    evaluations = sum(row.get("eval_seconds") or 0.0 for row in rows)
    return shares([*parts, *([("evaluations", evaluations)] if evaluations else [])], format_seconds)


def _outcome(report: Mapping[str, Any]) -> str:
    columns = ("predicted", "measured", "budget")
    keys = dict.fromkeys(key for column in columns for key in report.get(column, {}))
    lines = []
    for key in keys:
        values = [report.get(column, {}).get(key) for column in columns]
        if any(value is not None for value in values):
            show = format_bytes if key.endswith("_bytes") else "{:.3g}".format
            cells = "".join(f'<td class="n">{"" if value is None else escape(show(value))}</td>' for value in values)
            title = key.removesuffix("_bytes").replace("_", " ")
            lines.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    head = "".join(f"<th>{column}</th>" for column in ("", *columns))
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>" if lines else ""


def _values(values: Mapping[str, Any]) -> str:
    lines = []
    for name, value in values.items():
        words = f"{value:.4f}" if isinstance(value, float) else escape(str(value))
        lines.append(f'<tr><td>{escape(name)}</td><td class="n">{words}</td></tr>')
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _sample(one: Sample) -> str:
    rows = (("prompt", one.prompt), ("before", one.before), ("after", one.after))
    lines = (f"<tr><th>{name}</th><td><pre>{escape(text)}</pre></td></tr>" for name, text in rows)
    return f"<table>{''.join(lines)}</table>"
