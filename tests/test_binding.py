"""Weights that are converted where they are used: the bits of a model loaded in fp32."""

from __future__ import annotations

import pytest
import torch
from extents import plain_weights
from torch import nn

import finetune.offload.weights.binding
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.formats import PlainTensor


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
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 1)
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


class Doubled(nn.Module):
    """A weight that two lanes of three rows multiply by, in bf16 in its slot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 30, bias=False), nn.Linear(40, 50, bias=False)
        self.requires_grad_(False)


@pytest.fixture
def doubled(monkeypatch) -> tuple[Doubled, Binding, list[str]]:
    """And the shapes of what is decoded, as it is."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", 1)
    block, decoded = Doubled(), []
    decode_into = PlainTensor.decode_into

    def counted(self, stored, numbers):
        decoded.append(tuple(numbers.shape))
        decode_into(self, stored, numbers)

    monkeypatch.setattr(PlainTensor, "decode_into", counted)
    values = {name: torch.empty(t.shape, dtype=torch.bfloat16) for name, t in block.state_dict().items()}
    return block, Binding(block, dict.fromkeys(values, torch.float32), plain_weights(values)), decoded


def random_values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"first.weight": (30, 40), "second.weight": (50, 40)}
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


def test_weights_stay_decoded_in_their_rooms_until_they_are_unbound(doubled):
    """The largest has the first room; the other one is decoded at each use. The next visit has its own numbers."""
    block, binding, decoded = doubled
    assert binding.lazy_bytes == {"second.weight": 8000, "first.weight": 4800}
    room = torch.zeros(8192, dtype=torch.uint8)
    for seed in (0, 1):
        values = random_values(seed)
        binding.bind(values, rooms=[room])
        x = torch.ones(3, 40, requires_grad=True)
        for layer, name in ((block.first, "first.weight"), (block.second, "second.weight")):
            for _ in range(2):
                y = layer(x)
                assert y.equal(x @ values[name].float().t())
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert grad.equal(torch.ones_like(y) @ values[name].float())
        assert decoded == [(30, 40)] * 4 + [(50, 40)]
        assert room[:8000].view(torch.float32).view(50, 40).equal(values["second.weight"].float())
        binding.unbind()
        decoded.clear()
        with pytest.raises(RuntimeError, match="while its block is away"):
            block.second(x)


def test_what_is_bound_again_is_decoded_again_where_it_is_not_the_same_tensor(doubled):
    """As variants of a block are: of each only some tensors are its own."""
    block, binding, decoded = doubled
    rooms, x = [torch.zeros(8192, dtype=torch.uint8) for _ in range(2)], torch.ones(3, 40)
    values = random_values(0)
    for first in (values["first.weight"], values["first.weight"], random_values(1)["first.weight"]):
        binding.bind(values | {"first.weight": first}, rooms=rooms)
        for _ in range(2):
            assert block.first(x).equal(x @ first.float().t())
            assert block.second(x).equal(x @ values["second.weight"].float().t())
    assert decoded == [(30, 40), (50, 40), (30, 40)]


def test_other_dtypes_than_the_planned_one_stay_nowhere(doubled):
    block, binding, decoded = doubled
    values = random_values(0)
    binding.bind(values, rooms=[torch.zeros(8192, dtype=torch.uint8), None])
    x = torch.ones(3, 40)
    for _ in range(2):
        assert block.second(x.double()).equal(x.double() @ values["second.weight"].double().t())
        assert block.second(x).equal(x @ values["second.weight"].float().t())
        assert block.first(x).equal(x @ values["first.weight"].float().t())
    assert decoded == [(50, 40), (50, 40), (30, 40), (50, 40), (30, 40)]
