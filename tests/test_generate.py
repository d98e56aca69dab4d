"""Generation on the streamed model against Transformers' own `generate` with everything in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import CHAT, CHATML, make, prepare_in_this_process, write_tokenizer
from text_models import make_adapter, make_config, plain_model, write_model, write_rows
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from finetune.chat import Conversation
from finetune.decoding import Sampling, TextPieces, check_choosable, chooser, decode, end_tokens
from finetune.evaluate import evaluate
from finetune.generate import _encode as encode_prompt
from finetune.generate import _plan as plan_prompts
from finetune.generate import generate
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused
from finetune.methods.results import find_result
from finetune.offload.sizing.needs import STEP
from finetune.planned_run import BatchShape
from finetune.session import Session
from finetune.trainer import Trainer

# As vision models': contents are lists of parts.
PARTS = CHATML.replace("{{ message.content }}", "{% for part in message.content %}{{ part.text }}{% endfor %}")
PROMPTS = ["the cat sat on the mat", "hello", "what is it about the user and the great world"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory) -> Path:
    return write_model(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", template=CHATML)


def expected_ids(model: Path, prompt: list[int], count: int, adapter: Path | None = None) -> list[int]:
    plain = plain_model(model, adapter)
    if getattr(plain, "active_peft_config", None) is not None and plain.active_peft_config.is_prompt_learning:
        return greedy(plain, prompt, count)  # PEFT 0.21's generate says something else than its forward does
    out = plain.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=2,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def greedy(plain: Any, prompt: list[int], count: int) -> list[int]:
    """A whole forward pass for every token, until the end token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[len(prompt) :][-1:] != [1]:
        ids.append(int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generated_ids(
    config, prompts: list[list[int]], count: int, adapter: Path | None = None, choosers: Sequence[Any] = ()
) -> list[list[int]]:
    session = Session(find_result(config, adapter))
    try:
        planned = session.plan(BatchShape.of_text(1, max(map(len, prompts)), len(prompts), train=False))
        streamed = session.open(planned, config.output / "scratch")
        ends = end_tokens(session.parts.directory, None)
        texts: list[list[int]] = [[] for _ in prompts]
        choosers = choosers or [chooser(Sampling()) for _ in prompts]
        for tokens in decode(streamed, prompts, choosers, ends, count):
            for i, token in tokens:
                texts[i].append(token)
        return texts
    finally:
        session.close()


@pytest.mark.parametrize("adapted", [None, "lora", "prefix"])
@pytest.mark.parametrize("tile_vocab", [None, 77])
def test_greedy_tokens_are_those_of_transformers(kind, model, tmp_path, adapted, tile_vocab):
    adapter = make_adapter(model, kind, tmp_path / "adapter", adapted)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    config = make_config(model, tmp_path / "out", engine={"loss_tile_vocab": tile_vocab, "resident_blocks": 0})
    found = generated_ids(config, prompts, 20, adapter)
    assert found == [expected_ids(model, prompt, 20, adapter) for prompt in prompts]
    assert len({tuple(one) for one in found}) == len(prompts)  # the model says something else to each


def test_tokens_are_the_same_on_another_device(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    config = make_config(
        model, tmp_path / "out", device="simulated", device_memory="16MiB",
        engine={"resident_blocks": 1, "simulated_delay_ms": 0.2},
    )  # fmt: skip
    assert generated_ids(config, prompts, 8) == [expected_ids(model, prompt, 8) for prompt in prompts]


def test_text_is_the_decoded_whole_and_comes_in_whole_characters(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    pieces = list(generate(make_config(llama, tmp_path), None, [PROMPTS[0]], max_new_tokens=30, chat=False))
    ids = expected_ids(llama, prompt, 30)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) + "".join(pieces) == whole
    assert len(pieces) > 5


def test_several_prompts_are_answered_as_each_alone(llama, tmp_path):
    config = make_config(llama, tmp_path)
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "chat": False}
    together = "".join(generate(config, None, PROMPTS, seed=3, **options))
    alone = ["".join(generate(config, None, [p], seed=3 + i, **options)) for i, p in enumerate(PROMPTS)]
    assert together == "\n\n".join(alone)
    assert together == "".join(generate(config, None, PROMPTS, seed=3, **options))
    assert together != "".join(generate(config, None, PROMPTS, seed=4, **options))


def test_the_chat_template_is_used_where_there_is_one(llama, tmp_path):
    config, tokenizer = make_config(llama, tmp_path), AutoTokenizer.from_pretrained(llama)
    text = f"<|im_start|>user\n{PROMPTS[1]}<|im_end|>\n<|im_start|>assistant\n"
    ids = expected_ids(llama, tokenizer(text, add_special_tokens=False)["input_ids"], 10)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(generate(config, None, [PROMPTS[1]], max_new_tokens=10)) == expected
    assert "".join(generate(config, None, [PROMPTS[1]], max_new_tokens=10, chat=False)) != expected


@pytest.mark.parametrize("template", [None, CHATML, PARTS])
def test_the_prompt_is_what_training_puts_before_a_completion(tmp_path, monkeypatch, template):
    prepare_in_this_process(monkeypatch)
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_tokenizer(folder, template)
    # A tokenizer that ends every text: no prompt is the end of one.
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    core.save(str(folder / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("hello")["input_ids"][-1] == 1
    config = make_config(folder, tmp_path)
    for prompt in ("hello", "<s>hello"):
        row = {"prompt": prompt, "completion": " world"}
        if template:
            row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "world"}]}
        example = make([row], model, tmp_path)[0]
        before = example.input_ids[example.labels == -100]
        before = before[: np.flatnonzero(example.labels != -100)[0]].tolist()
        assert encode_prompt(tokenizer, prompt, None, config) == before
        assert before.count(0) == (0 if template and prompt == "hello" else 1)  # the template writes none


def test_what_a_run_has_tuned_reads_what_it_was_tuned_on(llama, tmp_path, monkeypatch):
    """The chat template that the run was given, where no other is named."""
    prepare_in_this_process(monkeypatch)
    template = CHATML.replace("<|im_start|>", "hello ")
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    output, dataset = tmp_path / "run", {"sequence_length": 64, "chat_template": template}
    given = make_config(llama, output, data=rows, eval_data=rows, dataset=dataset, max_steps=1, sequence_length=64)
    Trainer(given).train()
    config = make_config(llama, output, eval_data=rows)

    def said(config, run, **options) -> str:
        return "".join(generate(config, run, [PROMPTS[1]], max_new_tokens=10, **options))

    assert said(config, output) == said(given, output) != said(given, output, chat=False)
    measured = evaluate(given, output)["loss"]
    assert evaluate(config, str(output))["loss"] == measured != evaluate(config, output / "adapter")["loss"]


def test_a_run_is_asked_as_it_was_trained(llama, tmp_path, monkeypatch, capsys):
    """With a chat template that prompts of strings do not go through."""
    prepare_in_this_process(monkeypatch)
    config = make_config(llama, tmp_path, max_steps=1, sequence_length=64)
    rows = {
        "plain": [{"prompt": "hello", "completion": " world"}],
        "chat": [{"messages": CHAT}],
        "mixed": [{"prompt": "hello", "completion": " world"}, {"messages": CHAT}],
    }
    for kind, given in rows.items():
        sources = [write_rows(tmp_path / f"{kind}-{i}.jsonl", [row]) for i, row in enumerate(given)]
        source = sources[0] if len(sources) == 1 else str(tmp_path / f"{kind}-*.jsonl")
        run = config.model_copy(update={"data": source, "output": tmp_path / kind})
        Trainer(run).train()
        texts = {
            chat: "".join(generate(config, run.output, [PROMPTS[1]], max_new_tokens=10, chat=chat))
            for chat in (None, True, False)
        }
        assert texts[True] != texts[False]
        assert texts[None] == texts[kind != "plain"]
        assert ("without the chat template" in capsys.readouterr().err) == (kind == "plain")


def test_chat_without_a_template_is_refused(tmp_path):
    model = write_model("llama", tmp_path / "model")
    with pytest.raises(UserError, match="has no chat template"):
        list(generate(make_config(model, tmp_path), None, ["hello"], max_new_tokens=1, chat=True))


def test_generation_stops_at_any_end_token(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    ids = expected_ids(llama, prompt, 10)
    end = ids[4]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [344, end]}))
    assert end_tokens(folder, 1) == {1, 344, end}
    first = ids.index(end)
    assert generated_ids(make_config(folder, tmp_path), [prompt], 10) == [ids[: first + 1]]
    text = "".join(generate(make_config(folder, tmp_path), None, [PROMPTS[0]], max_new_tokens=10, chat=False))
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    assert before + text == tokenizer.decode(prompt + ids[:first], skip_special_tokens=True)


def test_end_tokens_come_from_the_config_where_there_is_no_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert end_tokens(tmp_path, None) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert end_tokens(tmp_path, 3) == {3, 8, 9}


def test_pieces_hold_back_half_a_character(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = "naïve 猫 ok 🐈"
    prompt, ids = tokenizer("hello")["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(tokenizer, prompt)
    out = [pieces.add(token) for token in ids]
    assert "".join(out) == text and pieces.rest() == ""
    assert not any("\ufffd" in piece for piece in out)
    assert "猫" in out and "🐈" in out  # three and four tokens, one piece
    cut = TextPieces(tokenizer, prompt)
    out = [cut.add(token) for token in ids[:-2]]
    assert "".join(out) == text[:-1] and cut.rest() == "\ufffd"


WAYS = [
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_that_transformers_chooses(llama, tmp_path, way):
    prompt = AutoTokenizer.from_pretrained(llama)(PROMPTS[0])["input_ids"]
    how = Sampling(seed=5, **way)
    found = generated_ids(make_config(llama, tmp_path), [prompt] * 2, 24, choosers=[chooser(how, prompt, i) for i in (0, 1)])
    plain = plain_model(llama)
    plain.generation_config.top_k = 0  # which is 50 where nothing is said
    for number, ids in enumerate(found):
        torch.manual_seed(5 + number)
        out = plain.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample="temperature" in way, pad_token_id=2,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), **way,
        )  # fmt: skip
        assert ids == out[0, len(prompt) :].tolist()
    assert (found[0] == found[1]) == ("temperature" not in way)
    assert found[0] != generated_ids(make_config(llama, tmp_path), [prompt], 24)[0]


def test_what_transformers_does_not_take_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="sampling: .*temperature.*strictly positive"):
        list(generate(make_config(llama, tmp_path), None, ["hello"], temperature=-1.0))
    with pytest.raises(UserError, match="sampling: expected a seed from 0 to 9223372036854775807, found 9223372036854775808"):
        list(generate(make_config(llama, tmp_path), None, ["hello"], temperature=1.0, seed=1 << 63))
    largest = generate(make_config(llama, tmp_path), None, ["hello", "the cat"], temperature=1.0, seed=(1 << 63) - 1)
    assert "".join(largest)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_outputs_of_which_no_token_can_be_chosen_are_named(value, word):
    check_choosable(torch.tensor([[0.0, float("-inf")], [float("-inf"), -3.0]]))
    with pytest.raises(UserError, match=f"the model's outputs are {word}"):
        check_choosable(torch.tensor([[0.0, 1.0], [value, 2.0]]))
    with pytest.raises(UserError, match="infinite"):
        check_choosable(torch.full((1, 3), float("-inf")))


def test_the_cache_is_part_of_the_plan(llama, tmp_path):
    session = Session(find_result(make_config(llama, tmp_path), None))
    try:
        step_bytes = {
            (prompts, new): plan_prompts(session, [[3] * 7] * prompts, new).needs.bytes_of(STEP)
            for prompts, new in ((1, 10), (1, 200), (2, 10), (2, 200))
        }
    finally:
        session.close()
    layer = 2 * 2 * 12 * 4  # keys and values, 2 heads of 12 numbers, fp32: bytes a token
    # Three layers a prompt, and one in which the 2 heads are repeated for 4.
    assert step_bytes[1, 200] - step_bytes[1, 10] == 190 * layer * (3 + 2)
    assert step_bytes[2, 200] - step_bytes[2, 10] == 190 * layer * (6 + 2)
    with pytest.raises(PlanRefused):
        list(generate(make_config(llama, tmp_path, host_memory="1MiB"), None, ["hello"], max_new_tokens=1))


def test_no_more_tokens_than_positions(tmp_path):
    model = write_model("gpt2", tmp_path / "model")  # 64 positions
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = "the cat sat on the mat " * 8
    ids = tokenizer(prompt)["input_ids"]
    assert 40 < len(ids) < 64
    text = "".join(generate(make_config(model, tmp_path), None, [prompt], max_new_tokens=500))
    expected = expected_ids(model, ids, 64 - len(ids))
    whole = tokenizer.decode(ids + expected, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) + text == whole
    with pytest.raises(UserError, match="64 positions"):
        list(generate(make_config(model, tmp_path), None, [prompt * 3], max_new_tokens=5))


def test_a_conversation_is_one_text(llama: Path, tmp_path: Path, capsys) -> None:
    """Each answer is what Transformers says to all turns before it; the oldest are forgotten when they have no room."""
    config = make_config(llama, tmp_path)
    plain, tokenizer = plain_model(llama), AutoTokenizer.from_pretrained(llama)
    messages: list[dict[str, str]] = []
    with Conversation(config, None, max_new_tokens=6) as conversation:
        conversation._most_prompt = 60
        for turn in ("hello there", "the cat sat on the mat", "what is it", "hello"):
            messages.append({"role": "user", "content": turn})
            while len(ids := tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]) > 60:
                del messages[:2]
            said = greedy(plain, ids, 6)
            expected = tokenizer.decode(said, skip_special_tokens=True)
            answer = "".join(conversation.say(turn))
            assert answer == expected
            messages.append({"role": "assistant", "content": answer})
        assert len(messages) < 8 and "no longer fit and are forgotten" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"a turn has \d+ tokens, 60 have room"):
            list(conversation.say("hello " * 60))
        assert "".join(conversation.say("hello"))


def test_a_model_without_a_chat_template_does_not_chat(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template: use finetune generate"):
        Conversation(make_config(model, tmp_path), None)
