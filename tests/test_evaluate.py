"""Evaluation on the streamed model against whole logits of the plain one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from text_models import make_adapter, make_config, plain_model, write_adapter, write_model, write_rows
from torch.nn import functional
from transformers import AutoTokenizer

import finetune.evaluate
from finetune.data import Example, preparation, worker
from finetune.evaluate import (
    MICRO_BATCH_TOKENS,
    _micro_batches,
    evaluate,
    evaluate_open,
    open_rows,
    plan_with_evaluation,
)
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.methods.base import make_method
from finetune.methods.results import find_result
from finetune.objectives.scoring import ask_trained
from finetune.offload.sizing.needs import STEP, VISIT
from finetune.planned_run import BatchShape
from finetune.session import Session
from finetune.trainer import Trainer

WORDS = "the cat sat on mat hello there world what is it about user assistant was great terrible".split()
ONE_TOKEN = [" great", " terrible"]
UNLIKE = [" great", " great world", " terrible cat on the mat"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory) -> Path:
    return write_model(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture(autouse=True)
def data_prepared_here(monkeypatch) -> None:
    """Without a process for each data set, which costs seconds; other tests hold that."""
    monkeypatch.setattr(worker, "_load_tokenizer", lambda job: AutoTokenizer.from_pretrained(job.tokenizer))
    monkeypatch.setattr(
        preparation, "_run_worker", lambda job, _: worker.run(worker.Job(**job), lambda rows, tokens: None)
    )


def pairs(completions: list[str], count: int = 23) -> list[dict[str, str]]:
    generator = np.random.default_rng(4)
    return [
        {
            "prompt": " ".join(generator.choice(WORDS, int(generator.integers(2, 14)))) + " It was",
            "completion": completions[int(generator.integers(len(completions)))],
        }
        for _ in range(count)
    ]


def token_losses(plain, ids: list[int]) -> torch.Tensor:
    """Cross entropy of every token after the first, one sequence alone, fp32 [tokens - 1]."""
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")


def reference(model: Path, rows: list[dict[str, str]], adapter: Path | None = None) -> dict[str, float]:
    """Row by row, candidate by candidate. The tokenizer puts <s> in front; training ends a completion with </s>."""
    plain, tokenizer = plain_model(model, adapter), AutoTokenizer.from_pretrained(model)
    completions = sorted({row["completion"] for row in rows})
    total, count, right = 0.0, 0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ends = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions}
        losses = token_losses(plain, prompt + ends[row["completion"]] + [tokenizer.eos_token_id])[len(prompt) - 1 :]
        total, count = total + float(losses.sum()), count + len(losses)
        likelihoods = {c: -float(token_losses(plain, prompt + ends[c])[len(prompt) - 1 :].sum()) for c in completions}
        right += max(likelihoods, key=likelihoods.get) == row["completion"]
    return {"loss": total / count, "tokens": count, "accuracy": right / len(rows)}


@pytest.mark.parametrize("completions", [ONE_TOKEN, UNLIKE], ids=["one token", "unlike lengths"])
@pytest.mark.parametrize("adapted", [None, "lora", "prefix"])
def test_loss_and_accuracy_are_those_of_whole_logits(kind, model, tmp_path, completions, adapted):
    rows = pairs(completions)
    adapter = make_adapter(model, kind, tmp_path / "adapter", adapted)
    config = make_config(
        model, tmp_path / "out", eval_data=write_rows(tmp_path / "rows.jsonl", rows),
        engine={"loss_tile_vocab": 77 if adapted else None, "loss_tile_tokens": 16, "resident_blocks": 0},
    )  # fmt: skip
    expected, found = reference(model, rows, adapter), evaluate(config, adapter)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected["loss"]), rel=1e-4)
    assert (found["tokens"], found["examples"]) == (expected["tokens"], len(rows))
    assert found["accuracy"] == expected["accuracy"]
    assert 0 < expected["accuracy"] < 1
    assert found["seconds"] > 0


def test_rows_are_padded_together_as_far_as_masks_are_planned():
    def lengths(shape, tokens):
        rows = [[ask_trained(Example(np.zeros(n, np.int32), np.zeros(n, np.int32)))] for n in tokens]
        return [[len(one.input_ids) for one in batch] for batch in _micro_batches(rows, shape)]

    alone = BatchShape.of_text(1, 2000, 4, train=False)
    assert lengths(alone, [2000, 400, 400, 300, 300, 100]) == [[2000], [400], [400], [300, 300], [100]]
    several = BatchShape.of_text(3, 400, 4, train=False)
    assert lengths(several, [400, 400, 300, 300, 100]) == [[400, 400, 300], [300, 100]]
    short = BatchShape.of_text(1, 50, 4, train=False)
    assert lengths(short, [50, 20, 20, 20]) == [[50], [20, 20], [20]]


def test_rows_without_choices_have_no_accuracy(model, tmp_path):
    rows = [{"text": row["prompt"]} for row in pairs(ONE_TOKEN, 9)]
    found = evaluate(make_config(model, tmp_path, eval_data=rows))
    plain, tokenizer = plain_model(model), AutoTokenizer.from_pretrained(model)
    losses = torch.cat([token_losses(plain, [*tokenizer(row["text"])["input_ids"], 1]) for row in rows])
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert (found["tokens"], found["examples"]) == (len(losses), 9)
    assert "accuracy" not in found


def test_one_pass_computes_a_row_once_where_candidates_are_single_tokens(model, tmp_path, monkeypatch):
    sequences = []
    scored = finetune.evaluate.score

    def count(streamed, lanes, pad, **options):
        sequences.extend(len(lane) for lane in lanes)
        return scored(streamed, lanes, pad, **options)

    monkeypatch.setattr(finetune.evaluate, "score", count)
    evaluate(make_config(model, tmp_path, eval_data=pairs(ONE_TOKEN)))
    assert sum(sequences) == 23
    sequences.clear()
    evaluate(make_config(model, tmp_path, eval_data=pairs([" great cat", " terrible mat", " great world"])))
    assert 23 < sum(sequences) < 3 * 23  # the first and the third share a row, where one of them is right or not


@pytest.mark.parametrize(
    "kind, few", [("llama", {"resident_blocks": 0}), ("mixtral", {"expert_slots": 4})]
)
def test_lanes_share_a_pass_when_nothing_is_resident(kind, few, tmp_path):
    model = write_model(kind, tmp_path / "model")
    blocks = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2  # more than half is blocks

    def run(**engine) -> tuple[dict, int]:
        config = make_config(model, tmp_path / "out", eval_data=pairs(ONE_TOKEN, 40), engine=engine)
        session = Session(find_result(config, None))
        try:
            rows = finetune.evaluate.open_rows(session, config)
            planned = finetune.evaluate._plan(session, rows, 1)
            streamed = session.open(planned, tmp_path / "scratch")
            before = streamed.traffic().read_bytes
            result = finetune.evaluate._measure(streamed, rows, planned.shape)
            return result, streamed.traffic().read_bytes - before
        finally:
            session.close()

    streaming, read = run(**few)
    resident, _ = run()
    assert streaming == resident  # also bit for bit
    assert read < 3 * blocks  # one pass for all, and what is prefetched for a next one


@pytest.mark.parametrize("longest", [40, 9])  # as long as any row, and shorter than most
def test_in_the_middle_of_training_the_same_is_measured(model, tmp_path, longest):
    rows = pairs(UNLIKE)
    config = make_config(model, tmp_path / "out", eval_data=rows, lora={"dropout": 0.5})
    alone = evaluate(config)
    session = Session(make_method(config))
    try:
        shape = BatchShape.of_text(2, longest, 3, train=True)
        planned, held_out = plan_with_evaluation(session, open_rows(session, config), shape, 1024)
        covered = session.plan(held_out.shape).needs
        assert planned.needs.bytes_of(VISIT) >= covered.bytes_of(VISIT)
        assert planned.needs.bytes_of(STEP) >= covered.bytes_of(STEP)
        session.open(planned, tmp_path / "scratch")
        inside = evaluate_open(session, held_out)
    finally:
        session.close()
    assert not any(module.training for module in session.model.modules())
    assert {**inside, "seconds": 0} == {**alone, "seconds": 0}  # a fresh adapter changes nothing


def test_what_is_made_small_is_not_what_is_measured(model, tmp_path):
    """Rows of tensors under label smoothing: plain cross entropy, in a run and after it."""
    ids = [torch.arange(3 + i, 12 + i) for i in range(4)]
    rows = [{"input_ids": one, "labels": one, "position_ids": torch.arange(9)} for one in ids]
    training = {"max_steps": 1, "label_smoothing_factor": 0.3, "z_loss": 0.1}
    Trainer(make_config(model, tmp_path / "out", data=rows, eval_data=rows, training=training)).train()
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    after = evaluate(make_config(model, tmp_path / "eval", eval_data=rows), tmp_path / "out")
    assert row["eval_loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert row["loss"] > 1.1 * after["loss"]


def test_an_evaluation_that_finds_no_room_is_named(model, tmp_path, monkeypatch):
    session = Session(make_method(make_config(model, tmp_path / "out", eval_data=pairs(UNLIKE))))
    plan, asked, rows = session.plan, [], open_rows(session, session.config)

    def only_training(shape, also=None):
        if also is None:
            return plan(shape)
        asked.append((also.inputs["input_ids"].shape[0], also.micro_batches))
        raise PlanRefused("the run needs more", 7)

    monkeypatch.setattr(session, "plan", only_training)
    shape = BatchShape.of_text(2, 9, 30, train=True)
    with pytest.raises(PlanRefused, match="that of training 9: with eval_data the run needs more") as caught:
        plan_with_evaluation(session, rows, shape, 1024)
    longest = rows.max_length
    together = min(MICRO_BATCH_TOKENS // longest, len(rows))
    assert together > 1 and caught.value.smallest_bytes == 7
    assert asked == [
        (together, 2 * 9 * 30 // (together * longest)), (together, 1), (1, 2 * 9 * 30 // longest), (1, 1)
    ]  # fmt: skip
    session.close()


def test_where_the_model_lives_changes_nothing(kind, model, tmp_path):
    adapter = write_adapter(model, kind, tmp_path / "adapter")
    options = {"eval_data": pairs(UNLIKE), "micro_batch_size": 3}
    on_cpu = evaluate(make_config(model, tmp_path / "cpu", **options), adapter)
    simulated = make_config(
        model, tmp_path / "simulated", engine={"resident_blocks": 1, "simulated_delay_ms": 1},
        **options | {"device": "simulated", "device_memory": "16MiB"},
    )  # fmt: skip
    assert {**evaluate(simulated, adapter), "seconds": 0} == {**on_cpu, "seconds": 0}


def test_training_data_is_measured_where_there_is_no_other(model, tmp_path, capsys):
    rows = pairs(ONE_TOKEN, 5)
    found = evaluate(make_config(model, tmp_path, data=rows))
    assert "measuring on the training data" in capsys.readouterr().err
    assert found["examples"] == 5


@pytest.mark.parametrize("count, stride", [(61, 5), (32, 16), (40, 12), (9, 3)])
def test_sliding_windows_are_those_of_transformers_guide(model, tmp_path, count, stride):
    """Its loop over windows of `max_length` ("Perplexity of fixed-length models"), over two documents."""
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, count)) for seed in (1, 2)]
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    dataset = {"evaluation_stride": stride, "append_eos": False, "sequence_length": 16}
    found = evaluate(make_config(model, tmp_path, data=data, dataset=dataset, sequence_length=16))
    tokenizer, plain = AutoTokenizer.from_pretrained(model), plain_model(model, None)
    total = tokens = 0
    for text in texts:
        ids, previous_end = torch.tensor([tokenizer(text)["input_ids"]]), 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + 16, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : previous_end - begin] = -100
            trained = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                logits = plain(input_ids=ids[:, begin:end]).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum"))
            tokens, previous_end = tokens + trained, end
            if end == ids.shape[1]:
                break
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_rows_that_are_cut_are_named(model, tmp_path, capsys):
    rows = [{"prompt": "the cat " * 40, "completion": " great"}, *pairs(ONE_TOKEN, 12)]
    found = evaluate(make_config(model, tmp_path, eval_data=rows))
    assert "data: 13 rows, 1 of 13 left out: longer than sequence_length (64)" in capsys.readouterr().err
    assert found["examples"] == 12


def test_refusals(model, tmp_path):
    with pytest.raises(UserError, match="no data to evaluate on"):
        evaluate(make_config(model, tmp_path))
    with pytest.raises(UserError, match="is not an adapter"):
        evaluate(make_config(model, tmp_path, eval_data=pairs(ONE_TOKEN)), tmp_path / "nothing")
    with pytest.raises(PlanRefused):
        evaluate(make_config(model, tmp_path, eval_data=pairs(ONE_TOKEN), host_memory="1MiB"))


def test_samples_of_tensors(tmp_path):
    import transformers as tf

    config = tf.ViTConfig(
        hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=14, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(2)
    plain = tf.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    plain.save_pretrained(tmp_path / "model")
    rows = [{"pixel_values": torch.randn(3, 14, 14), "labels": torch.tensor(i % 3)} for i in range(11)]
    pictures, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([i % 3 for i in range(11)])
    with torch.no_grad():
        logits = plain(pixel_values=pictures).logits
    found = evaluate(make_config(tmp_path / "model", tmp_path / "out", eval_data=rows, micro_batch_size=4))
    assert found["loss"] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy"] == int((logits.argmax(1) == labels).sum()) / 11
    assert found["examples"] == 11 and "tokens" not in found
