"""metrics.jsonl, report.json, the summary and the live line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import finetune.reporting.progress
from finetune.adapters.merging import can_merge
from finetune.config import Config
from finetune.reporting.ending import describe_ending
from finetune.reporting.progress import LastingStream, Progress, fitted
from finetune.reporting.report import (
    METRIC_KEYS,
    MetricsError,
    MetricsWriter,
    add_evaluation,
    read_metrics,
    summary_table,
    to_json,
    write_report,
)


def row(step: int, **values: object) -> dict[str, object]:
    return {key: 0 for key in METRIC_KEYS} | {"step": step, "loss": step / 4, "seconds": 2.0} | values


def write_steps(path: Path, first: int, last: int, resume_step: int = 0) -> None:
    with MetricsWriter(path, resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(row(step))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        assert path.read_bytes() == b""
        writer.write(row(1, note="ä"))
        assert json.loads(path.read_text()).items() > row(1, note="ä").items()
        assert [*read_metrics(path)] == [row(1, note="ä")]
        writer.write(row(3))
        assert steps(path) == [1, 3]
    assert path.stat().st_mode & 0o777 == 0o600
    writer.close()


@pytest.mark.parametrize(("resume_step", "kept"), [(0, []), (1, [1]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4, 5])])
def test_resume_drops_what_came_after(tmp_path: Path, resume_step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 5)
    before = path.read_text().splitlines()
    path.write_bytes(path.read_bytes() * 2)  # and what was put behind it
    write_steps(path, resume_step + 1, resume_step + 2, resume_step)
    assert steps(path) == [*kept, resume_step + 1, resume_step + 2]
    assert path.read_text().splitlines()[: len(kept)] == before[: len(kept)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\0", b"\xff\xfe\n", b"[]\n"])
def test_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("ab") as file:
        file.write(torn)
    assert [kept["step"] for kept in read_metrics(path)] == [1, 2]
    write_steps(path, 3, 3, resume_step=2)
    assert steps(path) == [1, 2, 3]


def test_damage_in_the_middle_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 1)
    with path.open("a") as file:
        file.write("garbage\n" + to_json(row(2)) + "\n")
    before = path.read_bytes()
    with pytest.raises(MetricsError, match=r"metrics.jsonl:2: expected a row of metrics, found b'garbage"):
        MetricsWriter(path, 2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("old, new", [(b'"loss":0.25', b'"loss":0.26'), (b"}\n", b"}\v")])
def test_a_changed_row_is_not_taken_for_another(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    path.write_bytes(path.read_bytes().replace(b": ", b":").replace(old, new, 1))
    with pytest.raises(MetricsError, match="move the file away, and go on with --resume"):
        MetricsWriter(path, 3)
    path.unlink()
    write_steps(path, 4, 4, resume_step=3)
    assert steps(path) == [4]


def test_rows_without_checksums_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_json(row(1)) + "\n" + to_json(row(2)) + "\n" + to_json(row(3)))  # as before there were any
    write_steps(path, 3, 3, resume_step=2)
    assert [*read_metrics(path)] == [row(1), row(2), row(3)]


def test_rows_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 4)
    with MetricsWriter(path, 4) as writer:
        with pytest.raises(ValueError, match="step 4 after step 4"):
            writer.write(row(4))
        incomplete = row(5)
        del incomplete["tokens"], incomplete["loss"]
        with pytest.raises(ValueError, match="lacks loss, tokens"):
            writer.write(incomplete)
    assert steps(path) == [1, 2, 3, 4]


def test_the_last_row_may_be_amended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with MetricsWriter(path, 2) as writer:  # row 3 is dropped
        assert writer.last_row == row(2)
        writer.amend({"eval_loss": 0.5, "loss": None})
        writer.write(row(3, note="ä" * 50))
        writer.amend({"note": ""})  # a shorter row
        writer.write(row(4))
        assert list(writer.rows()) == list(read_metrics(path))
    expected = [row(1), row(2, eval_loss=0.5, loss=None), row(3, note=""), row(4)]
    assert list(read_metrics(path)) == expected
    with MetricsWriter(path, 5) as writer:  # the row of step 5 was lost
        writer.amend({"eval_loss": 0.5})
    assert list(read_metrics(path)) == expected


def test_later_evaluations_are_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    assert add_evaluation(path, 2, "a.jsonl", {"loss": 1.5}) and add_evaluation(path, 3, "b.jsonl", {"loss": float("nan")})
    assert [one["step"] for one in read_metrics(path)] == [1, 2, 3]
    with MetricsWriter(path, 3) as writer:
        writer.amend({"later": 1})
        assert steps(path) == [1, 2, 3, 2, 3]
        writer.write(row(4))
        writer.amend({"later": 2})
    assert [one.get("later") for one in read_metrics(path)] == [None, None, 1, 2]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found[3].items() >= {"step": 2, "evaluated_on": "a.jsonl", "eval_loss": 1.5}.items()
    assert found[4]["eval_loss"] is None
    MetricsWriter(path, 2).close()  # what was measured of later steps goes with them
    assert steps(path) == [1, 2, 2]
    with path.open("ab") as file:
        file.write(b'{"step"')
    assert not add_evaluation(path, 2, "a.jsonl", {"loss": 1.5})
    assert path.read_bytes().endswith(b'{"step"')


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, {"loss": float("nan"), "all": [1.5, float("-inf"), {"x": float("inf")}], "at": Path("a/b")})
    expected = {"loss": None, "all": [1.5, None, {"x": None}], "at": "a/b"}
    assert json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name)) == expected


def test_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o644)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report(path, {"bad": object()})
    assert path.read_text() == "old"
    write_report(path, {"good": 1})
    assert json.loads(path.read_text()) == {"good": 1}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_summary_lines_up_plan_and_outcome() -> None:
    report = {
        "predicted": {"host_peak_bytes": 900 * 2**20, "step_seconds": 2},
        "measured": {"host_peak_bytes": 851 * 2**20, "step_seconds": 2.345, "stall_seconds": 0.1},
        "budget": {"host_peak_bytes": 2**30, "device_peak_bytes": None},
    }
    assert summary_table(report).splitlines() == [
        "                        predicted   measured   budget",
        "host memory peak        900.0 MiB  851.0 MiB  1.0 GiB",
        "seconds a step               2.00       2.35",
        "stalled seconds a step                  0.10",
    ]


REPORT = {
    "steps": 30, "first_step": 10, "seconds": 75.0, "first_loss": 0.75, "last_loss": 0.25, "training_loss": 0.5,
    "evaluation": {"loss": 0.3, "perplexity": 1.35, "tokens": 1200, "examples": 2000, "accuracy": 0.875, "seconds": 1.0},
}  # fmt: skip


def test_the_end_of_a_run_says_what_to_do_next() -> None:
    assert describe_ending(REPORT, Path("my out"), has_adapter=True, is_text=True, can_merge=True).splitlines() == [
        "20 steps in 75 s; loss 0.7500 in the first and 0.2500 in the last, 0.5000 on average",
        "evaluation: loss 0.3000, examples 2,000, accuracy 0.8750",
        "my out/report.html: the curves, times and memory, for a browser",
        "my out/adapter: the adapter, in PEFT's format",
        "Next:",
        "  finetune eval 'my out' --data FILE",
        "  finetune generate 'my out' --prompt \"...\"",
        "  finetune chat 'my out'",
        "  finetune export 'my out' --merge plain --to DIRECTORY",
    ]
    nothing = REPORT | {"steps": 10, "first_loss": None, "last_loss": None, "training_loss": None, "evaluation": None}
    assert describe_ending(nothing, Path("out"), has_adapter=False, is_text=False, can_merge=False).splitlines() == [
        "0 steps in 75 s",
        "out/report.html: the curves, times and memory, for a browser",
        "out: the tuned model, until it is exported",
        "Next:",
        "  finetune eval out --data FILE",
        "  finetune export out --to DIRECTORY",
    ]
    assert "export" not in describe_ending(nothing, Path("out"), has_adapter=True, is_text=True, can_merge=False)


def test_only_what_peft_merges_is_to_be_merged() -> None:
    def merges(**values: Any) -> bool:
        return can_merge(Config(model="m", **values))

    assert merges() and merges(method="adapter", adapter={"type": "vera"})
    for kind in ("mixlora", "dynmole", "prompt_tuning", "adaption_prompt"):
        assert not merges(method="adapter", adapter={"type": kind}), kind
    assert not merges(training={"objective": "reward"}) and not merges(method="full")
    assert not merges(method="zo", zo={"parameters": "prefix"}) and merges(method="zo", zo={"parameters": "lora"})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(finetune.reporting.progress, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return now


MEASURED = {
    "loss": 1.23456,
    "tokens_per_s": 833.3,
    "disk_read_bytes": 2_000_000_000,
    "disk_write_bytes": 400_000_000,
    "stall_seconds": 0.5,
    "host_peak_bytes": 2**29,
    "device_peak_bytes": 3 * 2**30,
}


def test_line_of_a_step(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(1000, host_budget_bytes=2**30, device_budget_bytes=2**32, stream=stream)
    progress.begin_at(10)
    progress.step(row(11, **MEASURED))
    assert stream.getvalue() == (
        "step 11/1000  ETA 32:58  loss 1.2346  device 3.00/4.00 GiB  host 0.50/1.00 GiB  833 tok/s  disk 1.20 GB/s  stall 25%\n"
    )


@pytest.mark.parametrize(
    ("columns", "device", "expected"),
    [
        (60, False, "step 12/300  ETA 9:34  backward 14/30  host 0.50/1.00 GiB"),
        (80, False, "step 12/300  ETA 9:34  backward 14/30  loss 1.2346  host 0.50/1.00 GiB"),
        (80, True, "step 12/300  ETA 9:34  backward 14/30  loss 1.2346  device 3.00/4.00 GiB"),
        (
            200, True, "step 12/300  ETA 9:34  backward 14/30  loss 1.2346  device 3.00/4.00 GiB  host 0.50/1.00 GiB"
            "  833 tok/s  disk 1.20 GB/s  stall 25%",
        ),
        (9, False, "ETA 9:34"),
    ],
)  # fmt: skip
def test_a_terminal_shows_what_matters_most(clock, monkeypatch, columns: int, device: bool, expected: str) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Progress(300, host_budget_bytes=2**30, device_budget_bytes=2**32 if device else None, stream=stream)
    progress.step(row(12, **MEASURED))
    clock[0] += 1.6
    progress.inside("backward", 14, 30)
    assert stream.getvalue().split("\r\x1b[K")[-1] == expected


def test_time_left_is_known_before_the_first_step(clock: list[float]) -> None:
    """From the prediction, and from where a run goes on; what has passed of a step counts, an evaluation does not."""
    stream = Terminal()
    progress = Progress(100, host_budget_bytes=2**30, step_seconds=10.0, peak_bytes=lambda: 2**29, stream=stream)
    progress.begin_at(90)
    clock[0] += 4
    progress.inside("forward", 1, 30)
    clock[0] += 60  # longer than predicted
    progress.inside("forward", 2, 30)
    progress.step(row(91, seconds=20.0))
    for done in (0, 5, 10):
        clock[0] += 30
        progress.work("evaluate", done, 10)
    clock[0] += 3
    progress.inside("forward", 1, 30)
    clock[0] += 1
    progress.inside("fold", 3 << 30, 4 << 30)
    frames = [frame.partition("  host")[0] for frame in stream.getvalue().split("\r\x1b[K")[1:]]
    assert frames == [
        "step 90/100  ETA ~1:36  forward 1/30",
        "step 90/100  ETA ~1:30  forward 2/30",
        "step 91/100  ETA 3:00  loss 22.7500",
        "step 91/100  ETA 3:00  evaluate 0/10  loss 22.7500",
        "step 91/100  ETA 3:00  evaluate 5/10  loss 22.7500",
        "step 91/100  ETA 3:00  evaluate 10/10  loss 22.7500",
        "step 91/100  ETA 2:40  forward 1/30  loss 22.7500",
        "step 91/100  ETA 2:40  fold 75%  loss 22.7500",
    ]


def test_a_measurement_has_no_steps(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(None, host_budget_bytes=2**30, peak_bytes=lambda: 2**28, stream=stream)
    progress.work("evaluate", 0, 40)
    clock[0] += 1
    progress.inside("forward", 3, 30)
    clock[0] += 9
    progress.work("evaluate", 10, 40)
    progress.clear()
    assert stream.getvalue().split("\r\x1b[K")[1:] == [
        "evaluate 0/40, forward 3/30  host 0.25/1.00 GiB", "ETA 0:30  evaluate 10/40  host 0.25/1.00 GiB", ""
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, "0:04"), (100, "13:20"), (1000, "2:13:20"), (30000.0, "2d 18:40:00")]
)
def test_time_left_is_the_mean_of_recent_steps(clock: list[float], seconds: float, expected: str) -> None:
    stream = io.StringIO()
    progress = Progress(20, host_budget_bytes=2**30, stream=stream)
    progress.step(row(1, seconds=1e9))  # falls out of the ten that count
    for step in range(2, 13):
        clock[0] += 20
        progress.step(row(step, seconds=seconds))
    assert f"ETA {expected}  " in stream.getvalue().splitlines()[-1]


def test_log_has_a_line_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(30, host_budget_bytes=2**30, stream=stream) as progress:
        for step in range(1, 31):
            progress.step(row(step))
            clock[0] += 4
            progress.inside("forward", 1, 9)
        progress.message("done [/dim]")
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines[:-1]] == [1, *range(4, 31, 3), 30]
    assert lines[-1] == "done [/dim]"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_log_shows_the_inside_of_a_long_step(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(2, host_budget_bytes=2**30, stream=stream)
    for visit in range(61):
        progress.inside("backward", visit, 61)
        clock[0] += 1
    assert stream.getvalue().splitlines() == ["step 0/2  backward 30/61", "step 0/2  backward 60/61"]


def test_live_line_is_rewritten_at_most_five_times_a_second(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(2, host_budget_bytes=2**30, stream=stream)
    progress.step(row(1))
    for visit in range(100):
        clock[0] += 1 / 16
        progress.inside("forward", visit, 100)
    frames = stream.getvalue().split("\r\x1b[K")
    assert len(frames) == 1 + 1 + 25  # 100/16 s; the first tick after 0.2 s is the fourth
    assert "\n" not in stream.getvalue()
    assert frames[-1].startswith("step 1/2  ") and "  forward 9" in frames[-1]
    progress.message("saved")
    progress.close()
    progress.close()
    assert "\r\x1b[Ksaved\n\r\x1b[Kstep 1/2" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2 and stream.getvalue().endswith("\n")


def test_dumb_terminal_gets_plain_lines(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Progress(2, host_budget_bytes=2**30, stream=stream).step(row(1))
    assert stream.getvalue().endswith("\n") and "\r" not in stream.getvalue()


def test_long_lines_are_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "  a line of more words than thirty columns have\nshort\n\n" + "x" * 40
    assert fitted(text, io.StringIO()) == text
    assert fitted(text, Terminal()) == (
        "  a line of more words than\n    thirty columns have\nshort\n\n" + "x" * 40
    )


def test_a_stream_that_was_closed_takes_everything() -> None:
    stream = LastingStream(None)
    assert stream.write("a line\n") == 7
    stream.flush()
