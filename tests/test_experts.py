"""Which expert leaves its slot, what a plan says of experts, and what a stack that is streamed refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune.memory.errors import UserError
from finetune.memory.expert_use import ExpertUse
from finetune.offload.sizing.needs import ExpertSize
from finetune.offload.weights.experts import ExpertStack, StackedMatrices, StreamedStack
from finetune.offload.weights.formats import PlainTensor


def test_waits_follow_the_order_of_blocks_and_the_share_of_visits():
    use = ExpertUse(blocks=[0, 1, 2])
    use.begin([0, 1, 2, 0, 1, 2])
    for visit in range(3):
        use.used(1, [5, visit], is_new=True)
    use.visit(0)
    # Expert 5: in each of 3 visits of block 1, which comes next. Expert 0: in one of them, (1 + 1) / (3 + 1).
    assert use.wait(1, 5) == pytest.approx(1)
    assert use.wait(1, 0) == pytest.approx(1 + 3 * (4 / 2 - 1))
    assert use.wait(1, 7) == pytest.approx(1 + 3 * (4 / 1 - 1))
    use.visit(1)
    assert use.wait(0, 3) == pytest.approx(2), "its stack was never asked: nothing is known against it"
    use.visit(2)
    use.visit(0)
    use.visit(1)
    use.visit(2)
    assert use.wait(0, 3) == pytest.approx(1), "behind what was announced"


def test_experts_wait_for_the_next_visit_once_all_lanes_have_come():
    use = ExpertUse(blocks=[0, 1])
    use.begin([0, 1, 0, 1])
    use.visit(0)
    assert use.wait(0, 3) == pytest.approx(0), "another lane may want it"
    use.end()
    assert (use.wait(0, 3), use.wait(1, 3)) == (pytest.approx(2), pytest.approx(1))
    use.visit(1)
    assert use.wait(1, 3) == pytest.approx(0)


def test_lanes_of_a_visit_count_once():
    use = ExpertUse(blocks=[0])
    for _ in range(4):
        use.used(0, [1, 2], is_new=True)
        use.used(0, [3], is_new=False)
    assert [use.count(0, expert) for expert in range(5)] == [0, 4, 4, 4, 0]
    assert use.likely(0) == [1, 2, 3]
    use.used(0, [1], is_new=True)
    use.used(0, [1], is_new=True)
    assert use.likely(0) == [1], "4 of 6 visits are not enough"


def test_the_next_block_is_one_with_experts():
    use = ExpertUse(blocks=[1, 3, 3])
    use.begin([0, 1, 2, 3, 0, 1, 2, 3])
    use.visit(1)
    assert use.next_block == 3
    use.visit(3)
    assert use.next_block == 1


def test_only_a_backward_pass_goes_back():
    use = ExpertUse(blocks=[0, 1])
    use.begin([0, 1, 0, 1])  # passes without gradients
    use.visit(0)
    use.visit(1)
    assert not use.goes_back(0) and not use.goes_back(1)
    use.begin([0, 1, 1, 0, 0, 1])
    assert not use.goes_back(0)
    use.visit(0)
    assert use.goes_back(0) and not use.goes_back(1)
    use.visit(1)
    assert use.next_block == 1, "the last block is the first of the backward pass"
    assert not use.is_backward(1)
    use.visit(1)
    assert use.next_block == 0 and use.is_backward(1) and not use.is_backward(0)
    use.visit(0)
    assert not use.goes_back(0) and use.next_block == 0


def test_reads_of_a_step():
    size = ExpertSize(slot_bytes=10, count=4 * 16, block_count=16, per_token=1 / 4, stacks=(0, 1, 2, 3))
    # Of 64 matrices 1 - (3/4)^2 = 7/16 are chosen by two tokens: 28; 20 are kept.
    assert size.read_bytes(slots=20, tokens=2, lanes=1, train=False) == 10 * 8
    assert size.read_bytes(slots=20, tokens=1, lanes=2, train=True) == 2 * 10 * 8
    assert size.read_bytes(slots=64, tokens=99, lanes=9, train=True) == 0
    # With few slots every lane fetches its own, in backward for the recomputation and for gradients.
    assert size.read_bytes(slots=2, tokens=1, lanes=3, train=True) == 3 * 3 * 16 * 10


@pytest.fixture
def stack() -> StreamedStack:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(()).expand(3, 8, 4), requires_grad=False)
    weight = PlainTensor(torch.float32, (3, 8, 4), ())
    matrices = StackedMatrices(ExpertStack(0, "layers.0.experts.weight", module, "weight", weight, torch.float32), 0)
    return nn.Parameter(StreamedStack.of(module.weight.data, matrices), requires_grad=False)


@pytest.mark.parametrize(
    ("use", "word"),
    [
        (lambda stack: stack + 1, "add"),
        (lambda stack: stack[1], "__getitem__"),
        (lambda stack: functional.linear(torch.ones(1, 4), stack), "linear"),
        (lambda stack: stack.norm(), "norm"),
        (lambda stack: stack.transpose(0, 1), "rows and columns"),
        (lambda stack: stack.copy_(torch.ones(3, 8, 4)), "copy_"),
        (lambda stack: torch.baddbmm(torch.baddbmm(stack, *TWO), *TWO), "one adapter"),
    ],
)
def test_other_uses_of_a_stack_are_refused(stack, use, word):
    with pytest.raises(UserError, match=word) as refusal:
        use(stack)
    assert "layers.0.experts.weight" in str(refusal.value)


TWO = torch.ones(3, 8, 2), torch.ones(3, 2, 4)


def test_what_a_stack_tells(stack):
    assert stack.shape == (3, 8, 4) and stack.dtype == torch.float32 and not stack.requires_grad
    assert repr(stack) == "StreamedStack(layers.0.experts.weight, (3, 8, 4))"
    turned = stack.detach().transpose(-2, -1)
    assert turned.shape == (3, 4, 8) and turned.turned and not turned.mT.is_contiguous()


def test_a_product_allocates_one_matrix_at_a_time_on_meta(stack):
    x = torch.empty(5, 4, device="meta")
    y = torch._grouped_mm(x, stack.transpose(-2, -1), offs=torch.empty(3, dtype=torch.int32, device="meta"))
    assert y.is_meta and y.shape == (5, 8)


class _Everything:
    """All experts are near, in memory."""

    def __init__(self, stack: torch.Tensor) -> None:
        self.stack, self.held, self.order = stack, 0, []

    def expect(self, stack, experts, backward) -> None:
        self.order.append((list(experts), backward))
        return experts[1:] + experts[:1]

    def acquire(self, stack, expert):
        self.held += 1
        assert self.held == 1
        return {"": self.stack[expert : expert + 1].clone()}

    def release(self, stack, expert) -> None:
        self.held -= 1


@pytest.mark.parametrize("turned", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 1, 3, 8])
@pytest.mark.parametrize("rows", [(0, 1, 5, 0, 3), (1, 1, 1, 1, 1), (0, 0, 0, 0, 7), (9, 0, 2, 1, 0)], ids=str)
def test_products_and_gradients_are_those_of_whole_stacks(rows, rank, dtype, turned):
    """PyTorch's `grouped_mm` and `baddbmm` over all experts at once: the same bits, also of experts without tokens."""
    experts, height, width = len(rows), 48, 40
    generator = torch.Generator().manual_seed(sum(rows) + (rank or 0))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    whole = random(experts, height, width)
    offsets = torch.tensor(rows).cumsum(0).int()
    x, grad = random(sum(rows), width if turned else height), random(sum(rows), height if turned else width)
    # As PEFT has them: ranks of all experts beside one another.
    factors = [] if rank is None else [random(height, rank * experts), random(rank * experts, width)]

    def run(stack: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *factors)]
        if rank is not None:
            left = leaves[1].reshape(height, rank, experts).permute(2, 0, 1)
            stack = torch.baddbmm(stack, left, leaves[2].reshape(experts, rank, width), alpha=0.37)
        y = torch._grouped_mm(leaves[0], stack.transpose(-2, -1) if turned else stack, offs=offsets)
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    near = _Everything(whole)
    stack = ExpertStack(0, "w", nn.Module(), "w", PlainTensor(dtype, whole.shape, ()), dtype)
    matrices = StackedMatrices(stack, 0)
    matrices.near = near
    found = run(StreamedStack.of(torch.zeros((), dtype=dtype).expand(whole.shape), matrices))
    for mine, expected in zip(found, run(whole), strict=True):
        assert mine.dtype == expected.dtype and mine.equal(expected)
    chosen = [expert for expert, count in enumerate(rows) if count]
    assert near.order == [(chosen, False), (chosen[::-1], True)] and not near.held


def test_nothing_is_multiplied_while_no_experts_are_near(stack):
    with pytest.raises(RuntimeError, match="no experts are near"):
        torch._grouped_mm(torch.ones(5, 4), stack.transpose(1, 2), offs=torch.tensor([2, 2, 5], dtype=torch.int32))
