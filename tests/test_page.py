"""report.html and its curves: one file that loads nothing, whatever the run and its files hold."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.learning_rates import read_curve
from finetune.memory.errors import UserError
from finetune.reporting.page import Sample, write_page
from finetune.reporting.report import METRIC_KEYS, MetricsWriter, write_report
from finetune.reporting.svg_chart import MOST_POINTS, Curve, chart, shares


class Page(HTMLParser):
    """Elements, what of them could load something, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href", "data", "onload", "srcset", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(folder: Path, steps: int, **more: Any) -> None:
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        for step in range(1, steps + 1):
            row = dict.fromkeys(METRIC_KEYS, 1.0) | {"step": step, "loss": 5 / step, "tokens": 100}
            row |= {"host_peak_bytes": 300 << 20}
            row |= {"eval_loss": 6.0 - step / 10, "eval_accuracy": 0.5, "eval_seconds": 2.0} if step % 4 == 0 else {}
            metrics.write(row | {"seconds": 3.0, "stall_seconds": 1.0, "rewards/margins": 0.25})
    memory = {"host_peak_bytes": 400 << 20}
    report = {"model": "a <b>model</b>", "budget": memory, "predicted": memory, "measured": memory, "evaluation": {"loss": 4.5}}
    write_report(folder / "report.json", report | more)
    (folder / "config.yaml").write_text("model: <script>alert(1)</script>\n")


def test_a_page_says_what_there_is_and_loads_nothing(tmp_path):
    write_run(tmp_path, 12, best={"step": 8, "metric": "loss", "value": 5.2})
    path = write_page(tmp_path, "finetune chat out", [Sample("2 < 3 & 'so'", "before", "after </pre>")])
    found = Page(path.read_text())
    assert path.stat().st_mode & 0o077 == 0
    assert not found.loads and not {"script", "link", "img", "iframe", "object"} & set(found.elements)
    assert "://" not in path.read_text()
    for words in (
        "a <b>model</b>", "result: step 8, loss 5.2000", "1,200 tokens in 36 s", "Evaluation: accuracy", "rewards/margins",
        "Host memory against its budget, MiB", "computing: 24 s (57%)", "waiting for transfers: 12 s (29%)",
        "(14%)", "finetune chat out", "<script>alert(1)</script>", "2 < 3 & 'so'", "after </pre>", "4.5000",
    ):  # fmt: skip
        assert words in found.text, words
    for drawn in re.findall("<svg.*?</svg>", path.read_text(), re.DOTALL):
        ElementTree.fromstring(drawn)


def test_a_page_of_a_run_that_has_not_ended_or_has_no_steps(tmp_path):
    write_run(tmp_path, 1)
    (tmp_path / "report.json").unlink()
    assert "1 steps · 100 tokens in 3 s · not ended yet" in Page(write_page(tmp_path, "").read_text()).text
    (tmp_path / "metrics.jsonl").write_text("")
    write_page(tmp_path, "")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report.json is damaged .*: move it away"):
        write_page(tmp_path, "")
    with pytest.raises(UserError, match="expected the directory of a run, found no metrics.jsonl"):
        write_page(tmp_path / "nowhere", "")


def test_curves_are_inside_of_their_axes():
    points = [(step, math.sin(step / 50) * 1e-3 + 7) for step in range(1, 2000)]
    drawn = chart([Curve("a", [*points, (2000, math.nan), (2001, None)]), Curve("limit", [(1, 7.1)], "limit")])
    (line,) = re.findall('polyline class="curve0" points="(.*?)"', drawn)
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(places) <= MOST_POINTS and all(72 <= x <= 628 and 12 <= y <= 192 for x, y in places)
    assert places[0][1] > places[20][1]  # it rises
    assert chart([Curve("a", []), Curve("limit", [(1, 2.0)], "limit")]) == "" == shares([("a", 0.0)], str)
    for values in ([0.0], [-3.0, -3.0], [0.0, 1e-12], [1e12, 2e12]):
        ElementTree.fromstring(re.match("<svg.*</svg>", chart([Curve("a", list(enumerate(values)))]))[0])


def test_a_rate_is_where_the_loss_falls_fastest_or_a_tenth_of_where_it_is_lowest():
    rates = [10 ** (-5 + i / 10) for i in range(51)]  # 1e-5 to 1
    losses = [3 - 2 / (1 + (1e-3 / rate) ** 2) + (0 if rate < 0.05 else 40 * rate) for rate in rates]
    found = read_curve(rates, losses)
    assert 1e-3 <= found.fastest <= 2.6e-3  # a smoothed curve lags by some steps
    assert found.suggestion == min(found.fastest, found.lowest / 10) and found.lowest < 0.06
    assert f"--learning-rate {found.suggestion:.1e}" in found.describe()
    flat = read_curve(rates, [2.0] * 51)
    assert flat.suggestion is None and "does not fall at any of these rates" in flat.describe()
    ended = read_curve(rates[:20], [2.0 - i / 10 for i in range(19)] + [math.nan])
    assert ended.lowest == rates[18] and "nan" in ended.describe()
