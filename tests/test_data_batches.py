"""Packing, step plans and collation; packed attention against separate forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.data import BatchPlan, Example, collate, pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook algorithm, one example at a time: free tokens of each row, sorted."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            free.remove(room)
        free.append(room - length)
    return sorted(free)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(2, 65, 64), (2, 9, 64), (30, 64, 64), (1, 1000, 1023), (7, 8, 20)])
def test_pack_is_best_fit_decreasing(seed, shape):
    low, high, capacity = shape
    generator = np.random.default_rng(seed)
    lengths = generator.integers(low, high, size=int(generator.integers(1, 400)))
    order = generator.permutation(len(lengths))
    rows = pack(lengths, capacity, order)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert sorted(capacity - int(lengths[row].sum()) for row in rows) == best_fit_decreasing(lengths.tolist(), capacity)
    assert rows == pack(lengths, capacity, order)
    assert len(rows) == len(pack(lengths, capacity))


def test_pack_refuses_what_no_row_holds():
    with pytest.raises(ValueError, match="example 1 has 9 tokens, more than the 8"):
        pack(np.array([3, 9, 2]), 8)
    with pytest.raises(ValueError, match="example 2 has no token"):
        pack(np.array([3, 8, 0]), 8)
    assert pack(np.array([], np.int64), 8) == []


def plan(**changes) -> BatchPlan:
    lengths = np.random.default_rng(3).integers(2, 40, 103)
    sizes = {"num_examples": 103, "batch_size": 10, "micro_batch_size": 4}
    return BatchPlan(**{**sizes, "seed": 0, "lengths": lengths, "epochs": 2.0, **changes})


@pytest.mark.parametrize("packing", [None, 64])
def test_every_epoch_visits_every_example_once_in_another_order(packing):
    p = plan(packing=packing)
    assert p.num_steps == 2 * p.steps_per_epoch
    epochs = []
    for epoch in range(2):
        steps = [p.step(epoch * p.steps_per_epoch + i) for i in range(p.steps_per_epoch)]
        epochs.append([index for step in steps for micro in step for row in micro for index in row])
        assert sorted(epochs[-1]) == list(range(103))
        assert all(len(row) == 1 for step in steps for micro in step for row in micro) or packing
        counts = [sum(len(micro) for micro in step) for step in steps]
        assert counts[:-1] == [10] * (len(counts) - 1) and sum(counts) == p.rows_per_epoch
    assert epochs[0] != epochs[1]


def test_step_is_a_function_of_seed_and_index_alone():
    forward = plan(packing=64)
    steps = [forward.step(i) for i in range(forward.num_steps)]
    assert [plan(packing=64).step(i) for i in reversed(range(forward.num_steps))] == steps[::-1]
    assert [plan(packing=64, seed=1).step(i) for i in range(forward.num_steps)] != steps


def test_micro_batches_are_cut_from_rows_sorted_by_length():
    p = plan()
    for index in range(p.num_steps):
        step = p.step(index)
        lengths = [int(p.lengths[list(row)].sum()) for micro in step for row in micro]
        assert lengths == sorted(lengths, reverse=True)
        assert [len(micro) for micro in step] == ([4, 4, 2] if len(lengths) == 10 else [3])
    # What a step holds does not hang on how it is cut.
    whole = plan(micro_batch_size=100)
    for index in range(p.num_steps):
        assert sorted(sum(p.step(index), [])) == sorted(sum(whole.step(index), []))


def test_plan_length():
    assert plan(steps=7, epochs=None).num_steps == 7
    assert plan(steps=70, epochs=None).epoch(22) == 2.0
    assert plan(drop_last=True).steps_per_epoch == 10
    assert plan(num_examples=30, lengths=np.full(30, 5), batch_size=1, epochs=0.1).num_steps == 3
    assert plan(epochs=1e-6).num_steps == 1
    with pytest.raises(IndexError, match="step 22 of 22"):
        plan().step(22)
    with pytest.raises(ValueError, match="drop_last leaves no step: 103 rows are fewer than batch_size 104"):
        plan(drop_last=True, batch_size=104)
    with pytest.raises(ValueError, match="either epochs or steps"):
        plan(steps=3)
    with pytest.raises(ValueError, match="micro_batch_size: expected at least 1, found 0"):
        plan(micro_batch_size=0)


def example(*ids: int, masked: int = 0) -> Example:
    labels = np.array(ids, np.int32)
    labels[:masked] = -100
    return Example(np.array(ids, np.int32), labels)


def test_collate_pads_on_the_right():
    batch = collate([[example(5, 6, 7, masked=2)], [example(8, 9)]], pad_token_id=1)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 1]],
        "labels": [[-100, -100, 7], [-100, 9, -100]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert set(collate([[example(5, 6)], [example(8, 9)]], pad_token_id=1)) == {"input_ids", "labels"}
    padded = collate([[example(5, 6, 7)]], pad_token_id=1, pad_to_multiple_of=4)
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_collate_packed_rows():
    batch = collate([[example(5, 6, 7), example(8, 9)], [example(2, 3)]], pad_token_id=1)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [2, 3, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_loss_is_the_sum_of_separate_losses(family, attention):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }[family]
    config = AutoConfig.for_model(family, vocab_size=61, **sizes, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = np.random.default_rng(0)
    examples = [example(*generator.integers(3, 61, size), masked=size // 3) for size in (7, 1, 13, 4, 9)]

    def loss(rows: list[list[Example]]) -> torch.Tensor:
        batch = collate(rows, pad_token_id=0)
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    with torch.no_grad():
        separate = sum(loss([[one]]) for one in examples)
        assert separate > 10
        torch.testing.assert_close(loss([examples]), separate, rtol=1e-5, atol=1e-4)
        # Rows of unlike length in one micro-batch: the padding keeps to itself.
        torch.testing.assert_close(loss([examples[:3], examples[3:]]), separate, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(loss([examples[:4], examples[4:]]), separate, rtol=1e-5, atol=1e-4)
