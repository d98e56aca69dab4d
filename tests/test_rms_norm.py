"""Root mean square norms in few passes: Transformers' own bits, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from finetune.offload.step.rms_norm import RMSNorm, norms_in_few_passes

SHAPES = [(1, 1, 1), (2, 3, 24), (1, 33, 1031), (3, 257, 64), (2, 5, 4, 96), (0, 4, 8)]


class Block(nn.Module):
    """What is inside of a residual stream: a norm, and what reads it."""

    def __init__(self, norm: nn.Module, columns: int) -> None:
        super().__init__()
        self.norm = norm
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x) * self.scale.to(x.dtype)


def made(kind: type[nn.Module], columns: int, dtype: torch.dtype, trained: bool = False) -> Block:
    torch.manual_seed(3)
    norm = kind(columns, 1e-5)
    norm.weight.data = torch.randn(columns).to(dtype)
    norm.weight.requires_grad_(trained)
    return Block(norm, columns)


def run(block: Block, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(4)
    rows = torch.randn(shape) * torch.logspace(-6, 6, shape[-2])[:, None] if shape[0] else torch.empty(shape)
    x = rows.to(dtype).requires_grad_()
    out = block(x)
    out.backward(torch.randn(shape).to(dtype))
    return [out.detach(), x.grad, block.scale.grad] + ([] if block.norm.weight.grad is None else [block.norm.weight.grad])


def is_taken(block: Block) -> bool:
    return "forward" in vars(block.norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_bits_of_transformers(dtype, shape, trained):
    ours, theirs = (made(Qwen3RMSNorm, shape[-1], dtype, trained) for _ in range(2))
    norms_in_few_passes([ours])
    assert is_taken(ours)
    for one, other in zip(run(ours, shape, dtype), run(theirs, shape, dtype), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_what_is_not_finite_is_where_it_was():
    x = torch.tensor([[1.0, float("inf"), 2.0], [float("nan"), 0.0, 1.0], [0.0, 0.0, 0.0], [3e38, 1.0, -3e38]]).bfloat16()
    norm = LlamaRMSNorm(3).bfloat16()
    norm.weight.requires_grad_(False)
    out = RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    assert torch.equal(out.isnan(), norm(x).isnan()) and torch.equal(out.nan_to_num(5.0), norm(x).nan_to_num(5.0))


@pytest.mark.parametrize(
    ("kind", "taken"), [(LlamaRMSNorm, True), (Qwen3RMSNorm, True), (Gemma2RMSNorm, False), (Olmo2RMSNorm, False),
                        (T5LayerNorm, False)]
)  # fmt: skip
def test_only_the_usual_norm_is_taken(kind, taken):
    block = made(kind, 8, torch.float32)
    norms_in_few_passes([block])
    assert is_taken(block) == taken


def test_a_weight_of_another_dtype_and_strides_go_the_usual_way():
    ours, theirs = (made(LlamaRMSNorm, 16, torch.float32) for _ in range(2))
    norms_in_few_passes([ours])
    for x in (torch.randn(2, 3, 16).bfloat16(), torch.randn(2, 16, 3).transpose(1, 2)):
        assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == theirs(x).dtype


def test_it_keeps_its_input_and_a_number_a_row():
    block = made(LlamaRMSNorm, 64, torch.bfloat16)
    norms_in_few_passes([block])
    x, kept = torch.randn(2, 9, 64).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block.norm(x)
    assert sorted(tensor.numel() for tensor in kept) == [2 * 9, 64, 2 * 9 * 64]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)
