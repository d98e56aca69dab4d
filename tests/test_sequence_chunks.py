"""Visits in chunks of a text: the loss and all gradients of plain Transformers and PEFT, in fp64; what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from test_engine import Weights
from tiny_models import CONFIGS, HEADS, IDS, TEXT
from torch import nn
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.offload.step.activations import Activations
from finetune.offload.step.engine import Engine
from finetune.offload.step.sequence_chunks import SequenceChunks
from finetune.offload.step.tiled_modules import TiledModules
from finetune.offload.weights.skeleton import find_blocks

LENGTH, CHUNK = 23, 7
SIZES = TEXT | {"num_hidden_layers": 2} | IDS
MODELS = {
    "llama": lambda: tf.LlamaConfig(**SIZES, **HEADS),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, **HEADS),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SIZES, **HEADS, sliding_window=6, query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: tf.MistralConfig(**SIZES, **HEADS, sliding_window=9),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=101, n_positions=37, n_embd=40, n_layer=2, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, **IDS
    ),
    "phi": lambda: tf.PhiConfig(**SIZES, num_attention_heads=4, partial_rotary_factor=0.4),
    "neox": lambda: tf.GPTNeoXConfig(**SIZES, num_attention_heads=4),
    "starcoder2": lambda: tf.Starcoder2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, **HEADS),
    "opt": CONFIGS["opt"],
    "bloom": lambda: tf.BloomConfig(vocab_size=101, hidden_size=40, n_layer=2, n_head=4, **IDS),
}  # fmt: skip
ALIKE = [name for name in MODELS if name not in ("gemma2", "opt", "bloom")]


@pytest.fixture
def all_in_fp64(monkeypatch) -> None:
    """Norms convert to fp32, in which gradients would be summed in another order."""
    to = torch.Tensor.to
    wide = {torch.float32: torch.float64}
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def to_wide(tensor: torch.Tensor, *given, **named) -> torch.Tensor:
        return to(tensor, *(wide.get(one, one) if isinstance(one, torch.dtype) else one for one in given), **named)

    monkeypatch.setattr(torch.Tensor, "to", to_wide)


def rows(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 101, (1 if kind == "packed" else 2, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "use_cache": False}
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [12]])).long()
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(11), torch.arange(7)])[None]
    return inputs


def built(name: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]())
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", lora_dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.06)
    for parameter in model.parameters():
        parameter.requires_grad_()  # the base too
    return model.to(dtype)


def loss_of(output, inputs) -> torch.Tensor:
    weights = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, 1:]
    losses = functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: torch.nn.Module, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_of(model(**inputs), inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def chunked(model: torch.nn.Module, inputs, chunk: int = CHUNK) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    engine = Engine(model, list(find_blocks(model).values()), Weights(), Activations(), sequence_chunk=chunk)

    def objective(outputs) -> torch.Tensor:
        loss = loss_of(outputs[0], inputs)
        loss.backward()
        return loss.detach()

    try:
        loss = engine.train_step([inputs], [3], objective)
        return loss, gradients(model)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "whole") for name in ALIKE), ("llama", "padded"), ("gemma3", "padded"), ("gpt2", "padded"),
        ("llama", "packed"), ("gemma3", "packed"), ("mistral", "packed"),
    ],
)  # fmt: skip
def test_loss_and_all_gradients_are_those_of_the_plain_model(name, kind, all_in_fp64):
    model, inputs = built(name), rows(kind)
    expected, expected_grads = plain(model, inputs)
    for chunk in (CHUNK, 11) if name == "llama" else (CHUNK,):  # the last one has 2 tokens, or 1
        found, grads = chunked(model, inputs, chunk)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert grads.keys() == expected_grads.keys()
        for key, grad in grads.items():
            largest = float(expected_grads[key].abs().max())
            torch.testing.assert_close(grad, expected_grads[key], rtol=1e-12, atol=1e-12 * largest)


def test_texts_that_are_no_longer_have_the_bits_of_whole_visits():
    model, inputs = built("gemma3", torch.float32), rows("padded")
    expected, expected_grads = plain(model, inputs)
    found, grads = chunked(model, inputs, LENGTH)
    assert found.equal(expected) and all(grad.equal(expected_grads[key]) for key, grad in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_errors_are_not_larger_than_those_of_whole_visits(dtype):
    inputs = rows("whole")
    exact, exact_grads = plain(built("llama"), inputs)
    errors = []
    for run in (plain, chunked):
        _, grads = run(built("llama", dtype), inputs)
        errors.append(torch.stack([(grads[key].double() - g).norm() / g.norm() for key, g in exact_grads.items()]))
    whole, in_chunks = errors
    assert in_chunks.mean() < 1.1 * whole.mean()
    assert in_chunks.max() < 1.5 * whole.max()


def test_dropout_is_the_same_when_a_chunk_is_recomputed(all_in_fp64):
    """Gradients are those of the loss that was found: by differences of losses with the same seeds."""
    model = built("llama", dropout=0.3).train()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n and "v_proj" in n)
    inputs = rows("whole")
    _, grads = chunked(model, inputs)
    direction, step, losses = torch.randn_like(parameter), 2e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * direction
        losses.append(chunked(model, inputs)[0].item())
        with torch.no_grad():
            parameter -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-5) and slope != 0


class Mixing(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + 0.1 * hidden_states.roll(1, 1), **kwargs)


class Numbering(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, position_embeddings, **kwargs):
        angles = torch.arange(hidden_states.shape[1])[:, None] * torch.logspace(0, -2, 12)
        return super().forward(hidden_states, position_embeddings=(angles.cos()[None], angles.sin()[None]), **kwargs)


def refused(model: torch.nn.Module) -> str:
    with pytest.raises(UserError) as error:
        chunked(model, rows("whole"))
    return str(error.value)


def test_blocks_that_do_not_go_with_chunks_are_refused():
    assert "is given a tensor of shape [2, 1, 23, 23]" in refused(built("gemma2"))  # attends without sdpa
    assert "attention dropout" in refused(built("opt").train())
    for kind, why in ((Mixing, "mixes tokens outside of its attention"), (Numbering, "depends on how many stand before")):
        model = built("llama", torch.bfloat16)
        for block in find_blocks(model).values():
            block.__class__ = kind
        assert why in refused(model)
    model = built("llama")
    model.config.is_causal = False
    assert "attend to later ones" in refused(model)
    assert "BloomBlock can't be run in chunks" in refused(built("bloom"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_outside_of_blocks_run_in_chunks(dtype):
    """Without what they keep in fp32 for a whole text; the bits of each token are the same."""
    torch.manual_seed(0)
    norm, hidden = nn.LayerNorm(8).to(dtype), torch.randn(2, 40, 8).to(dtype)
    found = []
    for tiles in (None, TiledModules([norm], 16)):
        value = hidden.clone().requires_grad_()
        output = norm(value)
        output.backward(hidden.flip(-1))
        found.append((output, value.grad, norm.weight.grad.clone()))
        norm.zero_grad()
        if tiles is not None:
            assert type(output.grad_fn).__name__ == "_InChunksBackward"
            tiles.close()
    (plain, plain_grad, plain_weight), (tiled, tiled_grad, tiled_weight) = found
    assert tiled.equal(plain) and tiled_grad.equal(plain_grad)
    torch.testing.assert_close(tiled_weight, plain_weight, rtol=1e-12 if dtype == torch.float64 else 0.02, atol=1e-12)
    assert norm(hidden).equal(plain) and "forward" not in vars(norm)


def test_modules_that_mix_or_number_tokens_or_train_alone_run_whole():
    class Shift(nn.Module):
        def forward(self, x):
            return x.roll(1, 1)

    class Number(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1])[:, None]

    shift, number, norm, hidden = Shift(), Number(), nn.LayerNorm(8), torch.randn(1, 40, 8)
    tiles = TiledModules([shift, number, norm], 16)
    assert shift(hidden).equal(hidden.roll(1, 1))
    assert number(hidden).equal(hidden + torch.arange(40)[:, None])
    norm(hidden).sum().backward()  # the input has no gradient, the norm's own weights have
    assert norm.bias.grad.equal(torch.full((8,), 40.0))
    tiles.close()


def test_passes_that_fill_a_cache_are_not_cut():
    chunks, hidden = SequenceChunks(3), torch.zeros(1, 5, 4)
    assert chunks.cuts((hidden,), {"cache": None}) and not chunks.cuts((hidden,), {"cache": tf.DynamicCache()})
