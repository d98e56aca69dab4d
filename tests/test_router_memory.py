"""What routers say waits in memory for its gradients: the plan has room for it."""

from __future__ import annotations

from mixtures import MIXTURES
from tiny_models import CONFIGS, make_config, save_tiny, token_data

import finetune.one_run
from finetune.trainer import Trainer


def test_the_plan_counts_what_routers_say(tmp_path, monkeypatch):
    """Of all lanes of a step."""
    monkeypatch.setitem(CONFIGS, "many", lambda: MIXTURES["olmoe"](num_experts=512, num_experts_per_tok=1))
    model, data = save_tiny("many", tmp_path / "model"), token_data(tmp_path / "tokens")
    monkeypatch.setattr(finetune.one_run, "prepare_for", lambda config, source, *to, **options: source)
    arenas = {}
    for word in ("without", "micro_batch", "global_batch"):
        training = {"max_steps": 1, "batch_size": 12, "micro_batch_size": 2, "warmup_steps": 0, "router_loss": word}
        config = make_config(model, data, tmp_path / word, training=training, lora={"target_modules": ["q_proj"]})
        arenas[word] = Trainer(config).train().report["arena"]
    base = arenas.pop("without")
    for word, arena in arenas.items():
        used, planned = (arena[key] - base[key] for key in ("peak_bytes", "capacity_bytes"))
        assert 1 << 20 < used <= planned, word
        assert arena["overflow_peak_bytes"] == 0
