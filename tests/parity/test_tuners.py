"""Every tuner of PEFT through `adapter.type`: three steps with the bits of plain PEFT, or a refusal with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packed_bases import BASES, write
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import IDS, VOCAB, Run, assert_same_bits, load_plain, make_config, reference_run, streamed_run

import finetune.offload.weights.binding
import finetune.one_run
from finetune.adapters.tuner_options import REFUSED
from finetune.config import Config, ConfigError
from finetune.decoding import decode
from finetune.memory.errors import UserError
from finetune.methods.base import make_method
from finetune.methods.results import find_result
from finetune.needs_of_model import ADAPTERS
from finetune.planned_run import BatchShape
from finetune.session import Session

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

SAME: dict[str, dict[str, Any]] = {
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "loha": {**QV, "r": 3, "alpha": 4, "rank_dropout": 0.1, "module_dropout": 0.1, "init_weights": False},
    "lokr": {**QV, "r": 3, "alpha": 4, "decompose_both": True, "init_weights": False},
    "vera": {**QV, "r": 4, "vera_dropout": 0.1},
    "oft": {**QV, "oft_block_size": 4, "module_dropout": 0.1},
    "boft": {**QV, "boft_block_size": 4},
    "adalora": {**QV, "init_r": 4, "target_r": 2, "total_step": 4, "tfinal": 1, "lora_dropout": 0.1},
    "vblora": {**QV, "num_vectors": 10, "vector_length": 4, "r": 2, "topk": 2, "init_vector_bank_bound": 0.1},
    "randlora": {**QV, "r": 3},
    "miss": {**QV, "r": 4},
    "fourierft": {**QV, "n_frequency": 20, "init_weights": False},
    "hra": {**QV, "r": 4},
    "c3a": {**QV, "block_size": 4},
    "shira": {**QV, "r": 2},
    "waveft": {**QV, "n_frequency": 20},
    "delora": {**QV, "r": 3},
    "gralora": {**QV, "r": 4, "gralora_k": 2},
    "road": {**QV, "group_size": 4},
    "ln_tuning": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "trainable_tokens": {"token_indices": [3, 5, 90]},
    "adamss": {**QV, "r": 6, "num_subspaces": 2, "subspace_rank": 2},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
    "beft": {**QV},
    "lily": {**QV, "r": 3, "num_B": 2},
    "frod": {**QV},
    "pvera": {**QV, "r": 4},
    "glora": {**QV},
    "unilora": {**QV, "r": 2, "theta_d_length": 20},
    "hira": {**QV, "r": 3},
    "osf": {**QV, "effective_rank": 4},
    "tinylora": {**QV, "r": 2, "u": 3, "weight_tying": 1.0},
    "psoft": {**QV, "r": 4},
    "peanut": {**QV, "r": 4},
    "supertuning": {**QV},
    "deft": {**QV, "r": 4},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "cartridge": {"num_virtual_tokens": 3},
}


OWN = {"mixlora", "dynmole", "mos"}
"""See `test_routed_tuners.py`."""

TINY = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **IDS}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    config = tf.LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    base = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.06)
    base.save_pretrained(tmp_path_factory.mktemp("base") / "model")
    return tmp_path_factory.getbasetemp() / "base0" / "model"


@pytest.fixture(autouse=True)
def planned_once(monkeypatch) -> None:
    """A run is planned before its data is read and then for its longest row; half of the time here is the former."""
    monkeypatch.setattr(finetune.one_run, "_refuse_all_rows", lambda *_: None)


def orthogonality(model: Any) -> torch.Tensor:
    """AdaLoRA's own loss: how far its A A^T and B^T B are from the identity, on average (Zhang et al. 2023, equation 4)."""
    grams = [p @ p.T for name, p in model.named_parameters() if "lora_A" in name]
    grams += [p.T @ p for name, p in model.named_parameters() if "lora_B" in name]
    norms = [torch.norm(gram - torch.eye(len(gram)), p="fro") for gram in grams]
    return model.active_peft_config.orth_reg_weight * (sum(norms) / len(norms))


def configure(model: Path, tokens: Any, output: Path, word: str, **changes: Any) -> Config:
    training = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2, **changes.pop("training", {})}
    adapter = {"type": word, **SAME[word]}
    return make_config(model, tokens, output, method="adapter", adapter=adapter, training=training, **changes)


@pytest.mark.parametrize("word", SAME)
def test_gives_plain_pefts_bits(word, model, tokens, tmp_path):
    """What is left loads in PEFT again and computes the same."""
    if word == "adamss":
        pytest.importorskip("sklearn")
    config = configure(model, tokens, tmp_path / "out", word)
    found, trained = streamed_run(config), []

    def after_update(model: Any, step: int) -> None:
        if word == "adalora":
            model.base_model.update_and_allocate(step)
        trained[:] = [model]

    expected = reference_run(config, orthogonality if word == "adalora" else None, after_update)
    assert len(set(found.losses)) == 3
    assert_same_bits(found, expected)
    loaded = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(model), config.output / "adapter")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [one.eval()(input_ids=ids).logits for one in (*trained, loaded)]
    assert torch.allclose(*logits, rtol=1e-5, atol=1e-5)


def test_the_table_says_what_there_is():
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    section = text.split("\n## Every adapter of PEFT\n")[1].split("\n## ")[0]
    runs, refused = (re.findall(r"^\| `(\w+)` \|", part, re.M) for part in section.split("| refused | why |"))
    assert set(runs) == SAME.keys() | OWN
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", section.split("| refused | why |")[1], re.M) == list(REFUSED.items())
    assert {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"lora"} == {*runs, *refused}
    assert len(refused) <= 5


WRONG = {
    "unknown type": ({"type": "vra"}, r"adapter\.type: expected a tuner of PEFT \(.*\), found 'vra'; nearest: vera"),
    "lora": ({"type": "lora"}, "LoRA is method lora"),
    "unknown key": ({"type": "vera", "rr": 3}, r"adapter\.rr: unknown key of vera; nearest: adapter\.r \(value 3\)"),
    "type": ({"type": "vera", "r": "4"}, r"adapter\.r: expected a valid integer, found '4'"),
    "value": ({"type": "vera", **QV, "r": -1}, "PEFT refuses the options of adapter vera"),
    "of the run": ({"type": "vera", "inference_mode": True}, r"adapter\.inference_mode: expected no value, found True"),
    "biases": ({"type": "vera", **QV, "bias": "all"}, r"adapter\.bias: expected none, found 'all'"),
    "nowhere": ({"type": "vera", "target_modules": ["nothing"]}, "PEFT refuses .* were found"),
    "the head": ({"type": "oft", "target_modules": ["lm_head"], "oft_block_size": 4}, "oft can't have the model's head"),
    **{word: ({"type": word}, f"{word} can't be trained on a streamed model: {reason}") for word, reason in REFUSED.items()},
}


@pytest.mark.parametrize("case", WRONG)
def test_is_refused_by_name(case, model, tokens, tmp_path):
    adapter, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        Session(make_method(make_config(model, tokens, tmp_path, adapter=adapter, method="adapter")))


def test_a_type_is_asked_for_and_says_the_method(tmp_path):
    assert Config(model="m", adapter={"type": "vera", "r": 4}).method == "adapter"
    with pytest.raises(ConfigError, match=r"expected adapter\.type, PEFT's word"):
        Config(model="m", adapter={"r": 4})


def test_modules_are_trained_whole_beside_a_tuner(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    packed, decoded = write(BASES["fp8"], model, tmp_path)
    adapter = {"type": "ia3", **SAME["ia3"], "modules_to_save": ["o_proj", "model.norm", "lm_head"]}
    training = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2}
    changes = {"method": "adapter", "adapter": adapter, "training": training}
    found = streamed_run(make_config(packed, tokens, tmp_path / "out", **changes))
    assert_same_bits(found, reference_run(make_config(decoded, tokens, tmp_path / "plain", **changes)))


def test_only_weights_that_layers_compute_with_are_bound_as_numbers(model, tokens, tmp_path):
    """A packed weight that a layer only calls stays packed until it is multiplied by."""
    found = {}
    for word in ("ia3", "vera", "loha", "lokr", "hra", "oft", "shira", "hira"):
        session = Session(make_method(configure(model, tokens, tmp_path, word)))
        found[word] = len(session.adapter.reads_weights)
        session.close()
    assert found == {"ia3": 0, "vera": 0, "loha": 0, "lokr": 0, "hra": 4, "oft": 0, "shira": 4, "hira": 4}


@pytest.mark.parametrize("word, device", [("hra", "cpu"), ("vblora", "simulated"), ("c3a", "cpu")])
def test_over_a_packed_base(word, device, model, tokens, tmp_path, monkeypatch):
    """HRA multiplies the weight itself, VB-LoRA's bank is shared by blocks, C3A adds in place. One block is in each memory."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 0)
    packed, decoded = write(BASES["fp8"], model, tmp_path)
    engine = {"kept_graphs": 0, "resident_blocks": 1, **({} if device == "simulated" else {"hidden_states": "disk"})}
    found = streamed_run(configure(packed, tokens, tmp_path / "out", word, device=device, engine=engine))
    assert_same_bits(found, reference_run(configure(decoded, tokens, tmp_path / "plain", word)))


@pytest.mark.parametrize("word", ["adalora", "vblora"])
def test_goes_on_with_the_same_bits(word, model, tokens, tmp_path):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    training = {"lr_scheduler": "constant"}
    expected = streamed_run(configure(model, tokens, whole, word, training=training))
    streamed_run(configure(model, tokens, parts, word, training=training | {"max_steps": 2}))
    again = streamed_run(configure(model, tokens, parts, word, training=training, resume=True))
    assert again.losses[-1:] == expected.losses[-1:]
    assert_same_bits(Run(expected.losses, again.adapter), expected)


@pytest.mark.parametrize("word", ["vblora", "prompt_tuning"])
def test_by_forward_passes_alone(word, model, tokens, tmp_path):
    """What is left loads in PEFT, and is not what the run began with."""
    adapter, training = {"type": word, **SAME[word]}, {"max_steps": 2, "learning_rate": 1e-2}
    zo = {"parameters": "adapter"}
    config = make_config(model, tokens, tmp_path / "out", method="zo", zo=zo, adapter=adapter, training=training)
    found = streamed_run(config)
    plain = tf.AutoModelForCausalLM.from_pretrained(model)
    fresh = get_peft_model_state_dict(load_plain(configure(model, tokens, tmp_path, word)), save_embedding_layers=False)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(plain, config.output / "adapter"))
    assert loaded.keys() == fresh.keys()
    assert any(not loaded[name].equal(fresh[name]) for name in fresh)
    assert all(loaded[name].equal(found.adapter[name]) for name in fresh)


def test_a_prompt_is_before_the_text_once(model, tokens, tmp_path):
    """Greedy tokens in a cache are those of plain PEFT over whole texts."""
    config = configure(model, tokens, tmp_path / "out", "prompt_tuning", training={"learning_rate": 0.3})
    streamed_run(config)
    loaded = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(model), config.output / "adapter").eval()
    expected = [5, 9, 4]
    with torch.no_grad():
        for _ in range(4):
            expected.append(int(loaded(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    session = Session(find_result(config, config.output))
    try:
        streamed = session.open(session.plan(BatchShape.of_text(1, 3, 1, train=False)), tmp_path)
        steps = list(decode(streamed, [[5, 9, 4]], [lambda logits: int(logits.argmax())], frozenset(), 4))
    finally:
        session.close()
    assert [5, 9, 4, *(token for ((_, token),) in steps)] == expected


def test_a_plan_counts_what_blocks_share_for_every_micro_batch(model, tokens, tmp_path):
    sizes = {}
    for micro_batches in (1, 5):
        session = Session(make_method(configure(model, tokens, tmp_path, "vblora")), only_plan=True)
        needs = session.plan(BatchShape.of_text(1, 20, micro_batches, train=True)).needs
        sizes[micro_batches] = sum(item.num_bytes for item in needs.items if item.name == ADAPTERS)
        session.close()
    assert sizes[5] - sizes[1] == 4 * SAME["vblora"]["num_vectors"] * SAME["vblora"]["vector_length"] * 4
