"""Graphs that wait for backward: the plan has room for them, and they take no more."""

from __future__ import annotations

from tiny_models import make_config, save_tiny, token_data

import finetune.one_run
from finetune.trainer import Trainer


def test_the_arena_holds_what_the_plan_counts(tmp_path, monkeypatch):
    """Of all lanes, which are unlike in length, as few or as many blocks as there are."""
    model, data = save_tiny("llama", tmp_path / "model"), token_data(tmp_path / "tokens", 13, 100, 500)
    monkeypatch.setattr(finetune.one_run, "prepare_for", lambda config, source, *to, **options: source)
    arenas = {}
    for kept in (0, 2, None):
        config = make_config(
            model, data, tmp_path / str(kept), training={"max_steps": 3, "batch_size": 12}, engine={"kept_graphs": kept},
            dataset={"sequence_length": 500},
        )  # fmt: skip
        report = Trainer(config).train().report
        assert report["plan"]["kept_graphs"] == (5 if kept is None else kept)
        arenas[kept] = report["arena"]
        assert report["measured"]["host_peak_bytes"] <= report["predicted"]["host_peak_bytes"]
        assert arenas[kept]["overflow_peak_bytes"] == 0
    base = arenas.pop(0)
    for arena in arenas.values():
        used, planned = (arena[key] - base[key] for key in ("extent_bytes", "capacity_bytes"))
        assert 4 << 20 < used <= planned
