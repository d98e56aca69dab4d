"""Weights that are converted where they are used: the bits of a model loaded in fp32."""

from __future__ import annotations

import pytest
import torch
from extents import plain_weights
from torch import nn

import offload.weights.binding
from offload.weights.binding import Binding


class Block(nn.Module):
    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=bias)
        self.norm = nn.LayerNorm(rows)
        self.register_buffer("scale", torch.ones(1))
        self.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale


@pytest.fixture(params=[1, 2])
def threads(request):
    """How many threads multiply: libraries cut a product by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 37), (1, 17), (2, 5)])  # a single row depends on how its matrix is aligned
@pytest.mark.parametrize("rows, columns", [(65, 97), (128, 64), (1536, 832), (770, 769)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_converted_linear_has_the_bits_of_fp32(rows, columns, shape, stored, bias, threads, monkeypatch):
    monkeypatch.setattr(offload.weights.binding, "LAZY_MIN_BYTES", 1)
    generator = torch.Generator().manual_seed(3)
    block = Block(rows, columns, bias)
    values = {name: torch.randn(t.shape, generator=generator).to(stored) for name, t in block.state_dict().items()}
    plain = Block(rows, columns, bias)
    plain.load_state_dict({name: value.float() for name, value in values.items()})
    placeholder = block.norm.weight
    binding = Binding(block, dict.fromkeys(values, torch.float32), plain_weights(values))
    with pytest.raises(RuntimeError, match="while its block is away"):
        block(torch.zeros(1, columns))
    inputs = torch.randn(*shape, columns, generator=generator)
    for _ in range(2):
        x, y = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        binding.bind(values)
        found, expected = block(x), plain(y)
        assert found.equal(expected)
        weights = torch.randn(found.shape, generator=generator)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert x.grad.equal(y.grad)
        binding.unbind()
        assert block.norm.weight is placeholder
    binding.convert_at_bind()
    binding.bind(values)
    assert block.linear.weight.dtype == torch.float32 and block(inputs).equal(plain(inputs))
    binding.unbind()


def test_bound_parameters_of_one_slot_do_not_share_a_version():
    """Writing one of them, as parametrisations do, must not spoil what autograd saved of another."""
    block = Block(6, 5, bias=True)
    slot = torch.randn(64)
    values, offset = {}, 0
    for name, tensor in block.state_dict().items():
        values[name] = slot[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    Binding(block, dict.fromkeys(values, torch.float32), plain_weights(values)).bind(values)
    x = torch.randn(2, 5, requires_grad=True)
    y = block(x)
    with torch.no_grad():
        block.linear.bias.add_(1)
    y.sum().backward()
    assert x.grad is not None and block.linear.weight.data_ptr() == values["linear.weight"].data_ptr()
