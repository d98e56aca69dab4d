"""Every option of PEFT's LoraConfig: three steps with plain PEFT's bits, or a refusal that names the option as it is typed."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from tiny_models import aligned_copies, assert_same_bits, make_config, reference_run, streamed_run

import finetune.offload.weights.parts
from finetune.adapters.lora_options import DESCRIPTIVE, EQUAL, EQUAL_VALUES, REFUSED, check_fresh, key_of
from finetune.memory.errors import UserError
from finetune.trainer import Trainer

QV = {"target_modules": ["q_proj", "v_proj"]}
BD = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}


def own(**options: Any) -> dict[str, Any]:
    """Options of this project's own keys and, as `extra`, all others."""
    keys = {"r", "alpha", "dropout", "target_modules", "target_parameters", "use_rslora", "use_dora", "init_lora_weights"}
    extra = {key: value for key, value in options.items() if key not in keys}
    return {key: value for key, value in options.items() if key in keys} | ({"extra": extra} if extra else {})


SAME = {
    "plain": ("llama", own(**QV, r=5, alpha=3, dropout=0.2)),
    "rank-stabilised": ("llama", own(**QV, use_rslora=True)),
    "all-linear, less some": ("llama-tied", own(target_modules="all-linear", exclude_modules=["down_proj", "o_proj"])),
    "expression, less another": ("qwen3", own(target_modules=r".*\.[02]\..*_proj", exclude_modules=r".*(k|up)_proj")),
    "some layers": ("llama", own(**QV, layers_to_transform=[1, 3], layers_pattern="layers")),
    "ranks and scales by name": ("llama", own(**QV, rank_pattern={"q_proj": 5}, alpha_pattern={r".*\.1\..*v_proj": 2})),
    "Conv1D": ("gpt2", own(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "bias of the adapter": ("llama-tied", own(**QV, lora_bias=True)),
    "not zero at first": ("llama", own(**QV, init_lora_weights=False)),
    "gaussian": ("llama", own(**QV, init_lora_weights="gaussian")),
    "orthogonal": ("llama", own(**QV, r=4, init_lora_weights="orthogonal")),
    "mica": ("llama", own(**QV, r=4, init_lora_weights="mica")),
    "embedding": ("llama", own(target_modules=["embed_tokens", "q_proj"])),
    "head": ("llama", own(target_modules=["lm_head", "q_proj"])),
    "both ends, tied weights": ("llama-tied", own(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied adapters": ("llama-tied", own(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "dora": ("llama", own(**QV, use_dora=True)),
    "dora without dropout": ("llama-tied", own(dropout=0.0, use_dora=True)),
    "dora, rank-stabilised, not zero at first": ("llama", own(**QV, use_dora=True, use_rslora=True, init_lora_weights=False)),
    "dora of Conv1D": ("gpt2", own(target_modules=["c_attn", "c_proj"], use_dora=True)),
    "dora of the head": ("llama", own(target_modules=["lm_head", "q_proj"], use_dora=True)),
    "dora of the embedding": ("llama", own(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "dora of both ends, tied weights": ("llama-tied", own(target_modules=["embed_tokens", "lm_head"], use_dora=True)),
    "dora of edges": ("opt", own(target_modules=["project_in", "project_out", "fc1"], use_dora=True)),
    "stacked experts": ("mixtral", own(target_modules=["q_proj"], dropout=0.0, target_parameters=["experts.down_proj"])),
    "rows of the embedding": ("llama", own(**QV, trainable_token_indices=[3, 5, 90])),
    "rows of a tied embedding": ("llama-tied", own(**QV, trainable_token_indices={"embed_tokens": [3, 5, 90]})),
    "whole ends": ("llama", own(**QV, modules_to_save=["embed_tokens", "lm_head"])),
    "whole ends, tied": ("llama-tied", own(**QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "whole norm and projection": ("llama", own(**QV, modules_to_save=["model.norm", "k_proj"])),
    "block-diagonal": ("llama", own(**QV, r=4, use_bdlora=BD)),
    "block-diagonal in part": ("llama", own(target_modules=r".*_proj", r=4, use_bdlora={**BD, "match_strict": False})),
    "velora": ("llama", own(**QV, velora_config={"num_groups": 4, "scale": 0.5})),
    "velora, random": ("llama", own(**QV, velora_config={"num_groups": 4, "init_type": "random"})),
    "velora, batch average": ("llama", own(**QV, velora_config={"num_groups": 4, "init_type": "batch_average"})),
}  # fmt: skip


def use_of_one_end(lora: dict[str, Any]) -> bool:
    return not {"trainable_token_indices", "ensure_weight_tying"} & lora.get("extra", {}).keys()


@pytest.mark.every(3)
@pytest.mark.parametrize("case", SAME)
def test_gives_plain_pefts_bits(case, checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    name, lora = SAME[case]
    if name == "mixtral":
        aligned_copies(monkeypatch)
    # A value that is used at both ends gets its gradients of all micro-batches from one end first: another order of sums.
    rows = 4 if "tied" in name and not use_of_one_end(lora) else 2
    training = {"max_steps": 3, "batch_size": 4, "micro_batch_size": rows}
    config = make_config(checkpoint(name), tokens, tmp_path / "out", lora=lora, training=training)
    found = streamed_run(config)
    assert len(set(found.losses)) == 3
    assert_same_bits(found, reference_run(config))


def test_lora_plus_has_pefts_groups(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", 1)
    plus = {"loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 1e-3}
    lora = own(target_modules=["embed_tokens", "q_proj"]) | plus
    training = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2}
    config = make_config(checkpoint("llama"), tokens, tmp_path / "out", lora=lora, training=training)

    def make_optimizer(model: Any) -> torch.optim.Optimizer:
        decay = {"loraplus_weight_decay": config.training.weight_decay}
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=config.learning_rate, **plus, **decay)

    assert_same_bits(streamed_run(config), reference_run(config, make_optimizer=make_optimizer))


WRONG = {
    "task_type": {"task_type": "SEQ_CLS"},
    "inference_mode": {"inference_mode": True},
    "bias": {"bias": "lora_only"},
    "biases of all": {"bias": "all"},
    "megatron_config": {"megatron_config": {"a": 1}},
    "megatron_core": {"megatron_core": "other"},
    "loftq_config": {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"},
    "eva_config": {"eva_config": {"rho": 1.5}},
    "corda_config": {"corda_config": {}},
    "lora_ga_config": {"lora_ga_config": {}},
    "kasa_config": {"kasa_config": {}},
    "velora_config.init_type": {"velora_config": {"init_type": "batch_average_once"}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [3]},
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"qalora_group_size": 8},
    "monteclora_config": {"monteclora_config": {}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 4]]},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "arrow_config": {"arrow_config": {}},
} | {
    word: {"init_lora_weights": word}
    for word in ("loftq", "eva", "corda", "lora_ga", "PiSSA")
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_is_refused_by_name(case, checkpoint, tokens, tmp_path):
    options = QV | WRONG[case]
    config = make_config(checkpoint("llama"), tokens, tmp_path / "out", lora=own(**options))
    with pytest.raises(UserError) as refused:
        Trainer(config).train()
    message = str(refused.value)
    names = [key_of(option) for option in WRONG[case]]
    assert any(name in message for name in names), message
    assert not (tmp_path / "out" / "adapter").exists()


def test_every_option_is_held_by_a_case():
    options = {field.name for field in dataclasses.fields(LoraConfig)}
    parts = {name for name in (*EQUAL, *EQUAL_VALUES, *REFUSED) if "." in name}
    whole = {name.partition(".")[0] for name in parts}
    assert options == (EQUAL | set(EQUAL_VALUES) | set(REFUSED) | DESCRIPTIVE | whole) - parts
    for name in whole:
        kind = {"use_bdlora": peft.tuners.lora.config.BdLoraConfig, "velora_config": peft.tuners.lora.config.VeloraConfig}[name]
        assert {f"{name}.{field.name}" for field in dataclasses.fields(kind)} == {p for p in parts if p.startswith(name)}
    renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    given = [lora | lora.get("extra", {}) for _, lora in SAME.values()]
    held = {renamed.get(key, key) for lora in given for key in lora}
    held |= {f"{key}.{part}" for lora in given for key in whole for part in lora.get(key, ())}
    assert held >= EQUAL | set(EQUAL_VALUES), EQUAL - held
    assert {option for case in WRONG.values() for option in case} >= {name for name in REFUSED if "." not in name}
    for option, values in EQUAL_VALUES.items():
        key, _, part = option.partition(".")
        found = [lora[key][part] if part else lora[key] for lora in given if key in lora and (not part or part in lora[key])]
        assert set(values) - {True} <= set(found), option


def test_an_option_of_a_later_peft_is_refused_until_it_is_listed():
    @dataclasses.dataclass
    class Later(LoraConfig):
        use_next_idea: bool = False

    check_fresh(Later(), None)
    with pytest.raises(UserError, match=r"lora\.extra\.use_next_idea=True .* not known to give plain PEFT's numbers"):
        check_fresh(Later(use_next_idea=True), None)
