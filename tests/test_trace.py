"""What a run says of its last step, in a file: spans that add up to the step, beside the same step as it was predicted."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from data_tools import write_tokenizer
from tiny_models import make_config, save_tiny

from finetune.memory.errors import UserError
from finetune.memory.trace import Span, Trace, write_trace
from finetune.offload.residency.io import IOEngine
from finetune.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"))
    write_tokenizer(folder)
    return folder


def spans_in(path: Path) -> dict[str, list[dict]]:
    """Process -> its events, each with the name of its track as "track"."""
    events = json.loads(path.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict]] = {name: [] for name in processes.values()}
    for event in events:
        if event["ph"] == "X":
            found[processes[event["pid"]]].append(event | {"track": tracks[event["pid"], event["tid"]]})
    return found


@pytest.mark.parametrize("method", ["lora", "full", "zo"])
def test_a_run_leaves_its_last_step_and_the_prediction(method, model, tmp_path, quick_data):
    tokens, path = [{"input_ids": list(range(1, 9 + n))} for n in range(6)], tmp_path / "step.json"
    lora = {"lora": {}} if method != "lora" else {}
    config = make_config(
        model, tokens, tmp_path / "out", method=method, trace=path, engine={"resident_blocks": 0, "lookahead": 0},
        training={"max_steps": 2, "batch_size": 2}, **lora,
    )  # fmt: skip
    before = Trainer(config.model_copy(update={"trace": None, "output": tmp_path / "other"})).train()
    assert Trainer(config).train().training_loss == before.training_loss
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = spans_in(path)
    assert list(found) == ["the last step", "predicted"]
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    for name, events in found.items():
        compute = [e for e in events if e["track"] == "compute"]
        named = [e["name"].split(",")[0] for e in compute]
        for block in range(5):
            assert f"block {block}" in named and (f"block {block} backward" in named) == (method != "zo")
        ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in compute)
        assert all(a[1] <= b[0] + 1e-3 for a, b in zip(ends, ends[1:], strict=False)), name  # one after the other
        assert [e for e in events if e["track"] == "disk" and e["name"].startswith("read")]
    measured = found["the last step"]
    assert max(e["ts"] + e["dur"] for e in measured) <= (last["seconds"] + 0.5) * 1e6
    if method == "full":
        assert [e for e in measured if e["track"] == "disk" and e["name"].startswith("write")]


def test_a_plan_leaves_the_prediction_alone(model, tmp_path):
    path = tmp_path / "step.json"
    Trainer(make_config(model, None, tmp_path / "out", trace=path)).plan()
    assert list(spans_in(path)) == ["predicted"] and spans_in(path)["predicted"]


def test_a_place_that_is_not_there_is_refused_before_anything_else(model, tmp_path):
    config = make_config(model, None, tmp_path / "out", trace=tmp_path / "nowhere" / "step.json")
    with pytest.raises(UserError, match="trace: expected a file in a directory that is there"):
        Trainer(config).train()
    with pytest.raises(UserError, match="cannot be written"):
        Trainer(config).plan()


def test_only_the_last_step_is_kept():
    trace = Trace()
    for step in range(3):
        trace.begin_step()
        with trace.span("compute", f"step {step}"):
            pass
        trace.end_step()
    (span,) = trace.spans
    assert span.name == "step 2" and 0 <= span.start_seconds and span.seconds >= 0


def test_what_began_before_the_step_is_cut(monkeypatch):
    monkeypatch.setattr("finetune.memory.trace.time.perf_counter", lambda: 10.0)
    trace = Trace()
    trace.begin_step()
    trace.add("disk", "early", 9.0, 12.0)
    trace.add("disk", "over", 8.0, 9.5)
    trace.end_step()
    assert trace.spans == (Span("disk", "early", 0.0, 2.0),)


def test_the_file_has_a_track_for_everything(tmp_path):
    write_trace(tmp_path / "a.json", {"one": [Span("fan", "turns", 1.5, 0.25)], "two": []})
    (event,) = spans_in(tmp_path / "a.json")["one"]
    assert (event["track"], event["name"], event["ts"], event["dur"]) == ("fan", "turns", 1.5e6, 0.25e6)


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_transfers_are_logged_when_that_is_wanted(backend, tmp_path):
    (tmp_path / "data").write_bytes(bytes(10000))
    buffer = torch.empty(8192, dtype=torch.uint8)
    with IOEngine(backend) as io:
        file = io.open(tmp_path / "data", writable=True)
        io.wait(io.submit_reads([(file, 0, 100, buffer.data_ptr())]))
        assert io.take_log() == []
        io.keep_log(True)
        io.wait(io.submit_reads([(file, 0, 100, buffer.data_ptr()), (file, 5000, 200, buffer.data_ptr() + 100)]))
        io.wait(io.submit_writes([(file, 0, 4096, buffer.data_ptr())]))
        first, second = io.take_log()
        assert (first.is_write, first.num_bytes, second.is_write, second.num_bytes) == (False, 300, True, 4096)
        assert first.submitted <= first.started <= first.finished <= second.finished
        assert io.take_log() == []
