"""What LoRA adds to a layer's output, in one pass: PEFT's own bits, forward and backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.adapters.lora_sums import sum_in_one_pass
from finetune.offload.step.deferred_products import Needless
from finetune.offload.step.scaled_sum import ScaledSum, Widener

SCALINGS = (2.0, 1.37, -0.1, 1 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 77, 1031), (0, 4)])
def test_bits_of_three_operations(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    for scaling in SCALINGS:
        values = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator) * 3
        ours, theirs = ([value.clone().requires_grad_() for value in values] for _ in range(2))
        out = ScaledSum.apply(*ours, scaling)
        expected = (theirs[0] + theirs[1] * scaling).to(dtype)
        out.backward(gradient)
        expected.backward(gradient)
        assert out.dtype == dtype and torch.equal(out, expected)
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad.dtype == other.grad.dtype and torch.equal(one.grad, other.grad)


def test_what_is_not_finite():
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40, -0.0])
    result, update = special.repeat_interleave(len(special)).bfloat16(), special.repeat(len(special))
    out, expected = ScaledSum.apply(result, update, 1.5), (result + update * 1.5).to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7.0).view(torch.int16), expected.nan_to_num(7.0).view(torch.int16))


def test_strides_that_the_kernel_does_not_take():
    result, update = torch.randn(7, 5).bfloat16().t(), torch.randn(5, 7)
    leaf = update.clone().requires_grad_()
    out = ScaledSum.apply(result, leaf, 0.3)
    out.backward(torch.ones(7, 5).bfloat16().t())
    assert torch.equal(out, (result + update * 0.3).to(torch.bfloat16))
    assert torch.equal(leaf.grad, torch.full((5, 7), torch.tensor(0.3).item()))


class Block(nn.Module):
    """Ends as a decoder's block does, so that the last product is needless when it is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def adapted(dtype: torch.dtype, one_pass: bool, **options) -> nn.Module:
    torch.manual_seed(5)
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["up", "down"]} | options
    model = get_peft_model(nn.Sequential(Block()).to(dtype), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if one_pass:
        sum_in_one_pass(model)
    return model


def gradients(model: nn.Module, dtype: torch.dtype, steps: int = 3) -> dict[str, torch.Tensor]:
    """After some steps whose block runs twice, as streamed ones do."""
    needless = Needless(model.base_model.model[0])
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(2, 9, 24).to(dtype).requires_grad_()
        (out,) = needless.recompute(lambda x=x: [model(x)])
        out.backward(torch.randn(2, 9, 24).to(dtype))
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_have_pefts_bits(dtype, options):
    ours, theirs = (gradients(adapted(dtype, one_pass, **options), dtype) for one_pass in (True, False))
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name


def test_needless_products_are_deferred_still():
    model, dtype = adapted(torch.bfloat16, one_pass=True), torch.bfloat16
    block = model.base_model.model[0]
    needless, x = Needless(block), torch.randn(1, 4, 24).to(dtype).requires_grad_()
    needless.recompute(lambda: [block(x)])
    assert block.down.base_layer in needless._layers and block.up.base_layer not in needless._layers


def test_without_an_adapter_and_with_two():
    model, plain = (adapted(torch.bfloat16, one_pass) for one_pass in (True, False))
    x = torch.randn(1, 4, 24).bfloat16()
    for both in (model, plain):
        torch.manual_seed(8)
        both.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["up"]))
    with model.disable_adapter(), plain.disable_adapter():
        bare = model(x)
        assert torch.equal(bare, plain(x))
    for names in (["default"], ["default", "other"]):
        for both in (model, plain):
            both.base_model.set_adapter(names)
        assert torch.equal(model(x), plain(x)) and not torch.equal(model(x), bare)


class Gated(nn.Module):
    """Two layers with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * self.down(x)


def test_layers_share_their_input_in_fp32_and_no_more(monkeypatch):
    monkeypatch.setattr(__name__ + ".Block", Gated)
    ours, theirs = (gradients(adapted(torch.bfloat16, one_pass), torch.bfloat16) for one_pass in (True, False))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    widen, x = Widener(), torch.randn(3, 4).bfloat16().requires_grad_()
    first, again = widen(x), widen(x)
    assert first is not again and first.data_ptr() == again.data_ptr()
    with torch.no_grad():
        x += 1.0
    changed = widen(x)
    assert changed.data_ptr() != first.data_ptr() and torch.equal(changed, x.float())
    (2 * changed + changed).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.equal(x.grad, torch.full((3, 4), 3.0).bfloat16())
    used = weakref.ref(changed)
    del first, again, changed
    assert used() is None
