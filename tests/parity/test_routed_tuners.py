"""MoS, MixLoRA and DynMoLE: the streamed run against a plain loop whose layers are written here from the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_tuners import TINY
from tiny_models import Run, assert_same_bits, load_plain, make_config, plain_batches, streamed_run, token_loss
from torch import Tensor
from torch.nn import functional

from finetune.adapters import saved
from finetune.config import Config, ConfigError
from finetune.memory.errors import UserError
from finetune.methods.first_order import lane_seed
from finetune.offload.weights.parts import cut
from finetune.peft_tuners.dynmole import DynMoleConfig, DynMoleLinear
from finetune.peft_tuners.mixlora import MixLoraBlock, MixLoraConfig, MixLoraLinear
from finetune.peft_tuners.mos import MosConfig, MosLinear

ADAPTERS: dict[str, dict[str, Any]] = {
    "mos": {
        "r": 3, "equivalent_rank": 2, "private_rank": 1, "shards_per_vector": 4, "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
    "mixlora": {"r": 3, "num_experts": 5, "top_k": 2, "lora_dropout": 0.1, "router_aux_loss_coef": 0.3},
    "dynmole": {
        "r": 3, "num_experts": 4, "keep_top_k": 1, "top_p": 0.55, "entropy_threshold": 0.97, "router_aux_loss_coef": 0.3,
        "router_dyn_loss_coef": 0.2, "target_modules": ["q_proj", "down_proj"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    config = tf.LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    base = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.06)
    folder = tmp_path_factory.mktemp("routed") / "model"
    base.save_pretrained(folder)
    return folder


def configure(model: Path, tokens: Any, output: Path, word: str, **changes: Any) -> Any:
    training = {
        "max_steps": 3, "batch_size": 5, "micro_batch_size": 2, "warmup_steps": 0, "lr_scheduler": "constant",
        "max_grad_norm": None, "learning_rate": 0.02, **changes.pop("training", {}),
    }  # fmt: skip
    adapter = {"type": word, **ADAPTERS[word], **changes.pop("adapter", {})}
    return make_config(model, tokens, output, method="adapter", adapter=adapter, training=training, **changes)


def mos(layer: MosLinear, x: Tensor) -> Tensor:
    """Row i of A is the shards i l, ..., i l + l - 1 that the layer takes of its pool, concatenated; B^T the same."""
    result = layer.base_layer(x)
    count = ADAPTERS["mos"]["shards_per_vector"]
    matrices = []
    for side in "AB":
        pool, index = (getattr(layer, name)["default"] for name in (f"pool_{side}", f"mos_index_{side}"))
        shards = [pool[i] for i in index.tolist()]
        matrices.append(torch.stack([torch.cat(shards[i : i + count]) for i in range(0, len(shards), count)]))
    a, b_t = matrices
    return result + (layer.mos_dropout["default"](x) @ a.t() @ b_t) * (16 / 3)


def plain_lora(pair: Any, x: Tensor) -> Tensor:
    return pair.lora_B(pair.lora_A(pair.dropout(x))) * (16 / 3)


def mixlora_ffn(block: MixLoraBlock, x: Tensor) -> Tensor:
    """sum_i G_i(x) E_i(x), with E_i the SwiGLU block whose three matrices have LoRA adapter i (section "MixLoRA")."""
    mlp, flat = block.base_layer, x.reshape(-1, x.shape[-1])
    block.logits = block.mixlora_router["default"](flat)
    gates, chosen = functional.softmax(block.logits, dim=-1).topk(2)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    experts = range(block.logits.shape[-1])
    tokens = [torch.cat([(chosen[:, k] == e).nonzero()[:, 0] for k in range(2)]) for e in experts]
    weights = [torch.cat([gates[:, k][chosen[:, k] == e] for k in range(2)]) for e in experts]
    inputs, sizes = flat[torch.cat(tokens)], [len(one) for one in tokens]

    def changed(layer: MixLoraLinear, base: Tensor, given: Tensor) -> Tensor:
        pairs = layer.mixlora_experts["default"]
        return base + torch.cat([plain_lora(pair, part) for pair, part in zip(pairs, given.split(sizes), strict=True)])

    gate = changed(mlp.gate_proj, mlp.gate_proj.base_layer(flat)[torch.cat(tokens)], inputs)
    up = changed(mlp.up_proj, mlp.up_proj.base_layer(flat)[torch.cat(tokens)], inputs)
    hidden = functional.silu(gate) * up
    made = changed(mlp.down_proj, mlp.down_proj.base_layer(hidden), hidden) * torch.cat(weights)[:, None]
    return torch.zeros_like(flat).index_add(0, torch.cat(tokens), made).reshape(x.shape)


def mixlora_linear(layer: MixLoraLinear, x: Tensor) -> Tensor:
    return layer.base_layer(x) + plain_lora(layer.mixlora_experts["default"][0], x)


def tsallis(p: Tensor) -> Tensor:
    q, n = 1.1, p.shape[-1]
    return (1 - ((p + 1e-5) ** q).sum(dim=-1)) / (q - 1) / ((1 - n ** (1 - q)) / (q - 1))


def hybrid(p: Tensor) -> Tensor:
    """Weights of experts of one layer, token by token: top-p and at least one; all where the entropy is high."""
    mask, entropies = torch.zeros_like(p), tsallis(p.detach()).tolist()
    for row, chances in enumerate(p.detach().numpy()):
        total = np.float32(0)
        for place, expert in enumerate(np.argsort(-chances)):
            total += chances[expert]
            mask[row, expert] = float(total <= 0.55 or place < 1 or entropies[row] > 0.97)
    return p * mask


def dynmole(layer: DynMoleLinear, x: Tensor) -> Tensor:
    result = layer.base_layer(x)
    layer.logits = layer.dynmole_router["default"](x.reshape(-1, x.shape[-1]))
    weights = hybrid(functional.softmax(layer.logits, dim=-1)).reshape(*x.shape[:-1], -1)
    for number, pair in enumerate(layer.dynmole_experts["default"]):
        result = result + weights[..., number, None] * plain_lora(pair, x)
    return result


def balance(word: str, logits: list[Tensor], mask: Tensor) -> Tensor:
    """Of the tokens of a step that are no padding, layers together: N sum_i f_i P_i; f_i of counts, or of weights."""
    count = mask.sum() * len(logits)
    if word == "mixlora":
        chosen, mean = torch.zeros(5), torch.zeros(5)
        for one in logits:
            p = functional.softmax(one, dim=-1)
            chosen = chosen + (functional.one_hot(p.topk(2).indices, 5).sum(dim=1) * mask[:, None]).sum(dim=0)
            mean = mean + (p * mask[:, None]).sum(dim=0)
        return 0.3 * ((chosen / count * (mean / count)).sum() * 5)
    p, kept = functional.softmax(torch.cat(logits), dim=-1), mask.repeat(len(logits))
    entropy = (tsallis(p) * kept).sum() / count
    share = (hybrid(p) * kept[:, None]).sum(dim=0) / count
    mean = (p * kept[:, None]).sum(dim=0) / count
    return 0.2 * entropy + 0.3 * (4 * (share * mean).sum())


TRANSCRIBED = {
    "mos": {MosLinear: mos},
    "mixlora": {MixLoraBlock: mixlora_ffn, MixLoraLinear: mixlora_linear},
    "dynmole": {DynMoleLinear: dynmole},
}


def transcribed_run(config: Any, word: str) -> tuple[Run, Any]:
    """AdamW over the loss of the tokens of a step and that of its routers, which sees the step whole."""
    options = config.training
    torch.set_num_threads(config.engine.num_threads)
    model = load_plain(config)
    for kind, forward in TRANSCRIBED[word].items():
        for layer in model.modules():
            if type(layer) is kind:
                layer.forward = forward.__get__(layer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    losses = []
    for step, batches in enumerate(plain_batches(config)):
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        parts, logits, masks = [], [], []
        for index, batch in enumerate(batches):
            labels = batch.pop("labels")
            torch.manual_seed(lane_seed(options.seed, step, index))
            parts.append(token_loss(model(**batch).logits, labels) / count)
            logits.append([layer.__dict__.pop("logits") for layer in model.modules() if "logits" in layer.__dict__])
            masks.append(batch.get("attention_mask", torch.ones(labels.shape)).reshape(-1).float())
        layers = [torch.cat(layer).detach().requires_grad_() for layer in zip(*logits, strict=True)]
        routed = balance(word, layers, torch.cat(masks)) if layers else torch.zeros(())
        if layers:
            routed.backward()
        start = 0
        for part, own, mask in zip(parts, logits, masks, strict=True):
            rows = slice(start, start + len(mask))
            torch.autograd.backward([part, *own], [None, *(layer.grad[rows] for layer in layers)])
            start = rows.stop
        optimizer.step()
        optimizer.zero_grad()
        losses.append((sum((part.detach() for part in parts), torch.zeros(())) + routed.detach()).item())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Run(losses, {name: value.detach().clone().contiguous() for name, value in state.items()}), model


@pytest.mark.parametrize("word, device", [("mos", "simulated"), ("mixlora", "cpu"), ("dynmole", "simulated")])
def test_gives_the_papers_bits(word, device, model, tokens, tmp_path):
    """Micro-batches of 2, 2 and 1 rows, padded; a block at a time; the last step in a resumed run. The file loads in PEFT."""
    options = {"device": device, "engine": {"resident_blocks": 1, "kept_graphs": 1}}
    begun = streamed_run(configure(model, tokens, tmp_path / "out", word, **options, training={"max_steps": 2}))
    config = configure(model, tokens, tmp_path / "out", word, **options, resume=True)
    found = streamed_run(config)
    expected, trained = transcribed_run(config, word)
    assert len(set(found.losses)) == 3 and begun.losses == found.losses[:2]
    assert_same_bits(found, expected)
    loaded = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(model), config.output / "adapter").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)


WRONG = {
    "more choices than experts": (lambda: MixLoraConfig(num_experts=2, top_k=3), "top_k is from 1 to num_experts"),
    "another routing": (lambda: MixLoraConfig(routing_strategy="mixlora-switch"), "routing_strategy: expected mixlora"),
    "other experts": (lambda: MixLoraConfig(expert_lora={"r": 2}), "expert_lora is not offered"),
    "another activation": (lambda: MixLoraConfig(act_fn="relu"), "act_fn: expected silu, the model's own, found relu"),
    "no experts": (lambda: MixLoraConfig(target_modules=["q_proj"]), "has no linear layer of a feed-forward block"),
    "no entropy": (lambda: DynMoleConfig(entropy_index=0.0), "entropy_index is above 0"),
    "too private": (lambda: MosConfig(r=2, private_rank=3), "private_rank is at most equivalent_rank"),
    "too few shards": (lambda: MosConfig(r=4), "r 4 is more than the 2 layers of q_proj_32x32 share: expected at most 3"),
    "unlike shards": (lambda: MosConfig(r=2, shards_per_vector=5), "does not divide the 32 features of q_proj_32x32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_is_refused_by_name(case, model):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(tf.AutoModelForCausalLM.from_pretrained(model), make())


def test_is_neither_merged_nor_perturbed(model):
    adapted = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(model), MixLoraConfig())
    with pytest.raises(ValueError, match="no weight can hold that"):
        adapted.merge_and_unload()
    with pytest.raises(ConfigError, match="mixlora, whose own loss goes by gradients"):
        Config(model="m", method="zo", zo={"parameters": "adapter"}, adapter={"type": "mixlora"})


@pytest.mark.parametrize("shard", [-1, 16, None])
def test_shards_that_are_not_there_are_refused(shard, model, tmp_path):
    adapted = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(model), MosConfig(r=2))
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("mos_index_B"))
    if shard is None:
        tensors[name] = tensors[name].float()
    else:
        tensors[name][3] = shard
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"q_proj: expected numbers of shards in mos_index_B, from 0 to 15"):
        saved.load(cut(model), tmp_path)
