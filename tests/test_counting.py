"""What a visit computes, counted on meta: the products of the model's shapes, and what they take at a machine's rates."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_config, save_tiny

from finetune.memory.machine import ComputeRates
from finetune.methods.base import make_method
from finetune.offload.sizing import dry_run
from finetune.offload.sizing.counting import CountedAttention, CountedProduct, Work, count_block, decode_seconds
from finetune.offload.weights.formats import PlainTensor
from finetune.planned_run import BatchShape
from finetune.session import Session

ROWS, RANK = 21, 3
# Of a Llama's block: [out, in] of every linear layer.
LAYERS = {
    "q_proj": (48, 40), "k_proj": (24, 40), "v_proj": (24, 40), "o_proj": (40, 48), "gate_proj": (56, 40), "up_proj": (56, 40),
    "down_proj": (40, 56),
}  # fmt: skip
RATES = ComputeRates(
    products=[
        {"dtype": dtype, "out_features": 1, "in_features": 1, "forward": [{"rows": 1, "flops_per_second": rate}]}
        for dtype, rate in (("float32", 1e9), ("bfloat16", 2e9))
    ],
    elementwise_bytes_per_second=1e12,
    operation_seconds=0.0,
)


def counted(tmp_path, kind: str = "llama", method: str = "lora", train: bool = True, **options):
    dtype = options.pop("dtype", torch.float32)
    config = make_config(save_tiny(kind, tmp_path / "model", dtype), None, tmp_path / "out", method=method, **options)
    session = Session(make_method(config), only_plan=True)
    try:
        inputs = BatchShape.of_text(3, ROWS // 3, 1, train).inputs
        first, args, kwargs = dry_run.first_call(session.parts, session.model, inputs)
        trained = session.setup.gradient_names
        return count_block(session.parts, first, args, kwargs, train, trained[first] if trained else ())
    finally:
        session.close()


def test_a_forward_pass_has_the_products_of_its_layers(tmp_path):
    work = counted(tmp_path, lora={"r": RANK, "target_modules": ["q_proj"]}).forward
    expected = [CountedProduct("forward", "float32", ROWS, *shape) for shape in LAYERS.values()]
    expected += [
        CountedProduct("forward", "float32", ROWS, RANK, 40),
        CountedProduct("forward", "float32", ROWS, 48, RANK),
    ]
    assert sorted(work.products.elements()) == sorted(expected)
    assert work.attention == {CountedAttention("float32", 3, ROWS // 3, 48, False): 1}


def test_a_backward_pass_has_gradients_and_recomputes_what_they_need(tmp_path):
    found = counted(tmp_path, lora={"r": RANK, "target_modules": ["q_proj"]})
    work = Work(found.recomputed.products + found.backward.products)
    kinds: dict[str, list[CountedProduct]] = {}
    for product in work.products.elements():
        kinds.setdefault(product.kind, []).append(product)
    adapter = {(RANK, 40), (48, RANK)}
    gradients = [(p.out_features, p.in_features) for p in kinds["weight_gradient"]]
    assert sorted(gradients) == sorted(adapter)  # of the adapter alone: the base is frozen
    inputs = [(p.out_features, p.in_features) for p in kinds["input_gradient"]]
    assert sorted(inputs) == sorted([*LAYERS.values(), *adapter])
    again = [(p.out_features, p.in_features) for p in kinds["forward"]]
    needless = {"down_proj"}  # whose result nothing but the block's output is made of
    assert sorted(again) == sorted([*(shape for name, shape in LAYERS.items() if name not in needless), *adapter])
    assert {product.kind for product in found.recomputed.products} == {"forward"}
    assert [one.backward for one in found.recomputed.attention] == [False]
    assert [one.backward for one in found.backward.attention] == [True]


def test_weights_that_are_trained_have_gradients(tmp_path):
    work = counted(tmp_path, method="full").backward
    gradients = [(p.out_features, p.in_features) for p in work.products.elements() if p.kind == "weight_gradient"]
    assert sorted(gradients) == sorted(LAYERS.values())


def test_without_gradients_there_is_no_backward_pass(tmp_path):
    found = counted(tmp_path, train=False)
    assert found.recomputed == found.backward == Work()


def test_what_is_decoded_is_no_work_of_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.weights.binding.LAZY_MIN_BYTES", 1)
    stored = counted(tmp_path / "a", lora={"r": RANK, "target_modules": ["q_proj"]})
    other = counted(
        tmp_path / "b",
        lora={"r": RANK, "target_modules": ["q_proj"]},
        dtype=torch.bfloat16,
        engine={"dtype": "float32"},
    )
    assert stored.decoded == () and len(other.decoded) == len(LAYERS)
    assert {weight.word for weight in (*other.decoded, *other.bound)} == {"bfloat16"}
    assert other.forward.products == stored.forward.products
    assert other.forward.moved_bytes == stored.forward.moved_bytes


def test_experts_that_have_rows_of_their_own_are_counted_or_refused(tmp_path):
    work = counted(tmp_path, "mixtral", lora={"r": RANK, "target_modules": ["q_proj"]}).forward
    assert work.products


def test_seconds_are_those_of_the_rates():
    work = Work(moved_bytes=int(2e12), operations=5)
    product = CountedProduct("forward", "float32", 100, 1000, 1000)
    work.products[product] = 3
    assert work.seconds(RATES, queued=False) == pytest.approx(3 * 0.2 + 2)
    calling = RATES.model_copy(update={"operation_seconds": 1.0})
    assert work.seconds(calling, queued=False) == pytest.approx(0.6 + 2 + 5)
    assert work.seconds(calling, queued=True) == 5
    assert work.seconds(RATES, queued=True) == pytest.approx(2.6)


def test_a_small_product_takes_as_long_as_its_numbers_move():
    slow = RATES.model_copy(update={"elementwise_bytes_per_second": 1e3})
    work = Work()
    work.products[CountedProduct("forward", "bfloat16", 10, 2, 20)] = 1
    assert work.seconds(slow, queued=False) == pytest.approx(2 * (10 * 20 + 10 * 2 + 2 * 20) / 1e3)


def test_decoding_takes_what_its_format_does_or_what_memory_does():
    weight = PlainTensor(torch.bfloat16, (10, 20), ())
    known = RATES.model_copy(update={"decoded_weights_per_second": {"bfloat16": 100.0}})
    assert decode_seconds(weight, torch.float32, known) == 2.0
    assert decode_seconds(weight, torch.float32, RATES) == pytest.approx(200 * 6 / 1e12)
