"""Rows of every form to tokens: what is tokenised, what is trained, what is cut."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from data_tools import CHAT, CHATML, LINES, make, prepare_in_this_process, texts, write_jsonl, write_tokenizer
from pyarrow import parquet
from tokenizers import Tokenizer

from finetune.data import DataError, json_rows, rows, sources
from finetune.data.forms import FORMS
from finetune.data.forms.base import Form, ParsedRow, RowEncoder, get
from finetune.data.options import DatasetOptions
from finetune.data.preparation import describe

GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 has it: a last turn carries an empty thought that an earlier one does not.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UPPER = (
    "{% for message in messages %}{{ message.content | upper if loop.last else message.content }}<|im_end|>{% endfor %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


CHAT_TEXT = (
    "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n"
    "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\nthe mat<|im_end|>\n"
)


@pytest.mark.parametrize("template", [None, GENERATION, "file"])
@pytest.mark.parametrize("form", ["messages", "conversations", "sharegpt"])
def test_messages_train_the_assistants_turns(chatml, tmp_path, here, form, template):
    names = {"user": "human", "assistant": "gpt"}
    row = {
        "messages": {"messages": CHAT},
        "conversations": {"conversations": CHAT, "system": None},
        "sharegpt": {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]},
    }[form]
    if template == "file":
        (tmp_path / "template.jinja").write_text(GENERATION)
        template = str(tmp_path / "template.jinja")
    data = make(write_jsonl(tmp_path / "a.jsonl", [row]), chatml, tmp_path, chat_template=template)
    assert texts(chatml, data) == [(CHAT_TEXT, ["the cat<|im_end|>", "the mat<|im_end|>"])]
    assert data.meta["form"] == "messages"
    from transformers import AutoTokenizer

    wanted = AutoTokenizer.from_pretrained(chatml).apply_chat_template(CHAT, return_dict=False)
    assert data[0].input_ids.tolist() == wanted


def test_messages_of_several_kinds(chatml, tmp_path, here):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " there"}]
    rows = [
        {"conversations": [{"from": "human", "value": "it"}, {"from": "gpt", "value": "cat"}], "system": "about"},
        {"conversations": [{"role": "user", "content": parts}, {"role": "assistant", "content": "the\n"}]},
    ]
    data = make(rows, chatml, tmp_path)
    assert texts(chatml, data) == [
        (
            "<|im_start|>system\nabout<|im_end|>\n<|im_start|>user\nit<|im_end|>\n"
            "<|im_start|>assistant\ncat<|im_end|>\n",
            ["cat<|im_end|>"],
        ),
        ("<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nthe\n<|im_end|>\n", ["the\n<|im_end|>"]),
    ]
    everything = make(rows, chatml, tmp_path, completion_only=False)
    assert [[text] for text, _ in texts(chatml, data)] == [trained for _, trained in texts(chatml, everything)]
    ended = make(rows, chatml, tmp_path, append_eos=True)
    assert [trained for _, trained in texts(chatml, ended)] == [["cat<|im_end|>", "</s>"], ["the\n<|im_end|>", "</s>"]]


def test_a_template_that_writes_the_last_turn_otherwise(chatml, tmp_path, here):
    data = make([{"messages": CHAT}], chatml, tmp_path, chat_template=THINKING)
    # Each turn as the model would write it after the prompt that it is given: the first has an example of its own.
    head = CHAT_TEXT[: CHAT_TEXT.index("<|im_start|>user\nwhat")]
    assert texts(chatml, data) == [
        (head.replace("the cat", "<think></think>the cat"), ["<think></think>the cat<|im_end|>"]),
        (CHAT_TEXT.replace("the mat", "<think></think>the mat"), ["<think></think>the mat<|im_end|>"]),
    ]
    assert data.meta["notes"] == [
        "1 conversations became several examples: the chat template writes turns differently when others follow"
    ]
    with pytest.raises(DataError, match=r"data\[0\]: the chat template writes .* give a chat_template with"):
        make([{"messages": CHAT}], chatml, tmp_path, chat_template=UPPER)


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_prompt_and_completion_as_messages_train_the_completion_only(chatml, tmp_path, here, template):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    data = make([row], chatml, tmp_path, chat_template=template)
    assert texts(chatml, data) == [(CHAT_TEXT, ["the mat<|im_end|>"])]
    assert data.meta["form"] == "prompt_completion"


def test_prompt_completion(plain, tmp_path, here):
    rows = [
        {"prompt": "the cat It was", "completion": " great"},
        {"prompt": "the mat It was gre", "completion": "at"},  # the whole text has one token across the boundary
        {"prompt": "", "completion": "hello world"},
    ]
    data = make(rows, plain, tmp_path)
    assert texts(plain, data) == [
        ("<s>the cat It was great</s>", [" great</s>"]),
        ("<s>the mat It was great</s>", ["at</s>"]),
        ("<s>hello world</s>", ["hello world</s>"]),
    ]
    assert data.pad_token_id == 2 and data.meta["eos_token_id"] == 1
    # Text that brings the special tokens itself has them once, too.
    whole = [{"text": "<s>hello world</s>\n"}], [{"prompt": "<s>the cat It was", "completion": " great</s>"}]
    found = [texts(plain, make(rows_, plain, tmp_path))[0][0] for rows_ in whole]
    assert found == ["<s>hello world</s>\n", "<s>the cat It was great</s>"]
    bare = make(rows, plain, tmp_path, append_eos=False, completion_only=False)
    assert [trained for _, trained in texts(plain, bare)][0] == ["<s>the cat It was great"]
    # The prompt's tokens are those of the prompt alone, so that generation continues from the same ones.
    tokenizer = Tokenizer.from_file(str(Path(plain) / "tokenizer.json"))
    for index, row in enumerate(rows):
        prompt = tokenizer.encode(row["prompt"]).ids
        assert data[index].input_ids[: len(prompt)].tolist() == prompt
        assert (data[index].labels != -100).tolist() == [i >= len(prompt) for i in range(data.lengths[index])]


def test_alpaca(plain, chatml, tmp_path, here):
    rows = [
        {"instruction": "what is it", "input": "the cat", "output": "hello"},
        {"instruction": "what is it", "input": "", "output": "hello"},
        {"instruction": "what is it", "input": None, "output": "hello"},
    ]
    path = write_jsonl(tmp_path / "alpaca.jsonl", rows)
    templated = texts(plain, make(path, plain, tmp_path))
    assert [trained for _, trained in templated] == [["hello</s>"]] * 3
    assert "context. Write" in templated[0][0] and "### Input:\nthe cat\n\n### Response:\nhello</s>" in templated[0][0]
    assert templated[1][0].endswith("the request.\n\n### Instruction:\nwhat is it\n\n### Response:\nhello</s>")
    assert templated[1] == templated[2]
    chats = texts(chatml, make(path, chatml, tmp_path))
    assert chats[0][0] == "<|im_start|>user\nwhat is it\n\nthe cat<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert [trained for _, trained in chats] == [["hello<|im_end|>"]] * 3


def test_text_is_cut_into_consecutive_chunks(plain, tmp_path, here, monkeypatch):
    # Pieces of the file much smaller than it, and cut in many places.
    monkeypatch.setattr(sources, "TEXT_PIECE_CHARS", 50)
    text = "\n".join(LINES * 7) + "\r\nlast éü line"
    (tmp_path / "a.txt").write_bytes(text.encode())
    data = make(tmp_path / "a.txt", plain, tmp_path, sequence_length=16)
    tokens = np.concatenate([data[index].input_ids for index in range(len(data))])
    assert np.array_equal(tokens, np.concatenate([data[index].labels for index in range(len(data))]))
    tokenizer = Tokenizer.from_file(str(Path(plain) / "tokenizer.json"))
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == f"<s>{text}</s>"
    assert set(data.lengths[:-1]) == {16} and data.meta["rows"] == 1 and data.meta["truncated"] == 0
    rows = [{"text": "the cat"}, {"text": "hello there " * 9}]
    found = [text for text, _ in texts(plain, make(rows, plain, tmp_path, sequence_length=16, append_eos=False))]
    assert found[0] == "<s>the cat" and len(found) > 2 and "".join(found[1:]) == "<s>" + "hello there " * 9


def test_pretokenised_rows(plain, tmp_path, here):
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": np.array([5, 6, 7, 2]), "labels": [-100, 6, 9, -100], "attention_mask": [1, 1, 1, 0]},
    ]
    data = make(rows, plain, tmp_path)
    assert [data[i].input_ids.tolist() for i in range(2)] == [[5, 6, 7], [5, 6, 7]]
    assert [data[i].labels.tolist() for i in range(2)] == [[5, 6, 7], [-100, 6, 9]]
    rows = [
        {"input_ids": [2, 2, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [2, 2, -100, 6, 7]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0]},
        {"input_ids": [5, 6, 7], "assistant_masks": [False, False, True]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "sample_weight": 1.0},
        {"input_ids": [5, 6, 7], "attention_mask": [0, 0, 0]},
    ]
    masked = make(rows, plain, tmp_path)
    assert [masked[i].input_ids.tolist() for i in range(4)] == [[5, 6, 7]] * 4 and masked.meta["dropped"] == 1
    expected = [[-100, 6, 7], [-100, 6, -100], [-100, -100, 7], [-100, 6, 7]]
    assert [masked[i].labels.tolist() for i in range(4)] == expected
    assert data.meta["label_tokens"] == 4  # nothing predicts a first token
    with pytest.raises(DataError, match=r"data\[0\]: expected input_ids\[1\] between 0 and \d+, found 70000: was"):
        make([{"input_ids": [5, 70000]}], plain, tmp_path)
    (config := Path(plain) / "config.json").write_text('{"vocab_size": 70001}')
    assert len(make([{"input_ids": [5, 70000]}], plain, tmp_path)) == 1
    config.unlink()


def test_truncated_and_dropped_are_counted(plain, tmp_path, here):
    rows = [
        {"prompt": "the cat", "completion": " sat" * 40},
        {"prompt": "the cat" * 40, "completion": " sat"},
        {"prompt": "the cat", "completion": " sat"},
    ]
    data = make(rows, plain, tmp_path, sequence_length=20)
    assert len(data) == 2 and data.lengths.max() == 20
    assert [data.meta[key] for key in ("rows", "truncated", "dropped")] == [3, 1, 1]
    assert describe(data) == [
        "data: 3 rows, 1 cut at 20 tokens, 1 of 3 left out: no token of them would be trained, "
        "25 tokens, 83% of them trained"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no example is left of 1 rows: none has a trained token in its first 20"):
        make(rows[1:2], plain, tmp_path, sequence_length=20)
    with pytest.raises(DataError, match="no example is left of 1 rows: none has a trained token$"):
        make([{"input_ids": [5, 6], "labels": [-100, -100]}], plain, tmp_path)


@pytest.mark.parametrize(
    "suffix",
    [
        ".jsonl", ".json", ".json array", ".json arrays", ".json objects", ".jsonl.gz", ".json.bz2 array", ".jsonl.xz",
        ".parquet", ".parquet groups",
    ],
)  # fmt: skip
def test_file_formats_give_the_same_tokens(plain, tmp_path, here, monkeypatch, suffix):
    monkeypatch.setattr(json_rows, "JSON_BUFFER_CHARS", 37)
    rows = [
        {"prompt": f"the cat {i} [" + "é\u2028,]}" * (i % 8), "completion": ' "hello"', "id": float("nan")} for i in range(45)
    ]
    path = tmp_path / f"rows{suffix.split()[0]}"
    lines = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows)
    array = "\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False)
    if suffix == ".json array":
        path.write_text(array)
    elif suffix == ".json arrays":  # joined, with an empty one between, and an object after
        path.write_text(f"\ufeff{json.dumps(rows[:9])}[]\n\ufeff{json.dumps(rows[9:-1])}\n{json.dumps(rows[-1])}")
    elif suffix == ".json objects":
        path.write_text("".join(json.dumps(row, indent=1) for row in rows))
    elif path.suffix in (".gz", ".bz2", ".xz"):
        module = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix]
        path.write_bytes(module.compress((array if "array" in suffix else lines).encode()))
    elif suffix.startswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7 if "groups" in suffix else None)
    else:
        path.write_text(lines)
    data, wanted = make(path, plain, tmp_path), make(rows, plain, tmp_path)
    assert texts(plain, data) == texts(plain, wanted) and len(data) == 45
    assert texts(plain, data)[3][1] == [' "hello"</s>']


def test_folders_globs_and_datasets(plain, tmp_path, here):
    import datasets

    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", [{"prompt": "b", "completion": "c"}])
    (folder / "a.txt").write_text("the cat")
    (folder / "README.md").write_text("not data")
    for source in (folder, str(folder / "*.[jt]*")):
        data = make(source, plain, tmp_path)
        assert [text for text, _ in texts(plain, data)] == ["<s>the cat</s>", "<s>bc</s>"]
        assert data.meta["form"] == "prompt_completion+text" and data.meta["sources"] == ["a.txt", "b.jsonl"]
    dataset = datasets.Dataset.from_list([{"text": "the cat", "n": 1}, {"text": "hello", "n": 2}])
    assert [text for text, _ in texts(plain, make(dataset, plain, tmp_path))] == ["<s>the cat</s>", "<s>hello</s>"]


def test_choices(plain, tmp_path, here):
    rows = [{"prompt": f"{i} It was", "completion": [" terrible", " great"][i % 2]} for i in range(5)]
    rows.insert(2, {"prompt": "cat " * 300, "completion": " great"})
    data = make(rows, plain, tmp_path, choices=True)
    assert data.num_choices == 2 and data.meta["choices"] == [" great", " terrible"] and data.meta["dropped"] == 1
    assert data.answers.tolist() == [1, 0, 1, 0, 1]
    wanted = [(f"<s>{i} It was{choice}", [choice]) for i in range(5) for choice in (" great", " terrible")]
    assert texts(plain, data) == wanted
    unexpanded = make(rows, plain, tmp_path)
    assert unexpanded.num_choices is None and unexpanded.meta["different_completions"] == 2
    many = [{"prompt": "the", "completion": f" {i}"} for i in range(17)]
    assert make(many, plain, tmp_path).meta["different_completions"] is None
    with pytest.raises(DataError, match=r"data\[16\]: .* at most 16 different completions .* brings the 17th"):
        make(many, plain, tmp_path, choices=True)
    with pytest.raises(DataError, match='needs rows with "prompt" and "completion" as strings'):
        make([{"text": "the cat"}], plain, tmp_path, choices=True)


def test_hub_names(plain, tmp_path, here, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        if split == "missing":
            raise ValueError("Unknown split")
        rows = datasets.Dataset.from_list([{"text": "the cat", "other": 1}] * (3 if streaming else 1))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(sources, "_hub_commit", lambda name: "c0ffee")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("some/set", "some/set:test", "some/set:main:test[:10]"):
        assert texts(plain, make(name, plain, tmp_path))[0][0] == "<s>the cat</s>"
    assert asked == [
        ("some/set", None, "train", "c0ffee"),
        ("some/set", None, "test", "c0ffee"),
        ("some/set", "main", "test[:10]", "c0ffee"),
    ]
    data = make("some/set", plain, tmp_path, streaming=True, most_rows=2)
    assert [text for text, _ in texts(plain, data)] == ["<s>the cat</s>"] * 2
    with pytest.raises(DataError, match="some/set is neither a file here nor .*split 'missing'.*Unknown split"):
        make("some/set:missing", plain, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets, which is not installed: pip install datasets"):
        make("some/other", plain, tmp_path)


def test_hub_out_of_reach_or_refusing(plain, tmp_path, here, monkeypatch):
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def answer(error):
        def dataset_info(self, name, timeout):
            raise error

        monkeypatch.setattr(HfApi, "dataset_info", dataset_info)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    response = SimpleNamespace(headers={}, request=None)
    answer(RepositoryNotFoundError("404\nRepository not found", response=response))
    with pytest.raises(DataError, match="some/set is not a file here, and it could not be loaded from the hub: .*not found"):
        make("some/set", plain, tmp_path)
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    # Out of reach, what was downloaded before serves.
    answer(ConnectionError("no network"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: datasets.Dataset.from_list([{"text": "the cat"}]))
    assert len(make("some/set", plain, tmp_path)) == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (  # as Mistral: no generation prompt, eos after the assistant
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
            " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
            [" the cat</s>", " the mat</s>"],
        ),
        (  # as Gemma: another name for the assistant, content trimmed, a line end after the turn
            "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
            ["the cat<|im_end|>", "the mat<|im_end|>"],
        ),
        (  # no token ends the turn: its line end does
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            [" the cat\n", " the mat\n"],
        ),
    ],
)
def test_templates_of_other_families(chatml, tmp_path, here, template, trained):
    data = make([{"messages": CHAT}], chatml, tmp_path, chat_template=template)
    assert texts(chatml, data)[0][1] == trained


class _Line(ParsedRow):
    """A form of its own: a line of which the last word is trained."""

    class encoder(RowEncoder):
        def encode(self, rows):
            for _, row in rows:
                ids = self._encoder.ids([row.text])[0]
                labels = np.asarray(ids, np.int32)
                labels[:-1] = -100
                yield [self._encoder.cut(ids, labels)]

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def size(self) -> int:
        return len(self.text)


def test_a_form_is_one_entry(plain, tmp_path, monkeypatch):
    """Found by its column, parsed, measured, encoded; other forms are what they were."""
    form = Form((("line",),), frozenset({"line"}), lambda row, place, chat: _Line(get(row, "line", str, place)))
    monkeypatch.setitem(rows._FORMS, "line", form)
    prepare_in_this_process(monkeypatch)
    path = write_jsonl(tmp_path / "train.jsonl", [{"line": "the cat sat"}, {"line": "on the mat"}])
    data = make(path, plain, tmp_path)
    assert data.meta["form"] == "line" and texts(plain, data) == [("the cat sat", [" sat"]), ("on the mat", [" mat"])]
    with pytest.raises(DataError, match=r'"input_ids", or "line"; found "lin"'):
        make(write_jsonl(tmp_path / "bad.jsonl", [{"lin": "x"}]), plain, tmp_path)


def test_every_form_is_found_by_its_columns_and_reads_them():
    assert set(DatasetOptions.model_fields["form"].annotation.__args__) == {"auto", *FORMS}
    for name, form in rows._FORMS.items():
        for needed in form.needs:
            assert rows.detect_form(dict.fromkeys(needed, "x"), "place") == name
            assert set(needed) <= form.reads <= rows.COLUMNS
    assert rows.detect_form({"input_ids": [1], "messages": [], "text": ""}, "place") == "input_ids"
    assert rows.detect_form({"messages": [], "text": "", "prompt": "", "completion": ""}, "place") == "messages"


def test_tables_are_read_as_the_rows_that_csv_has(plain, tmp_path, here):
    rows = [{"prompt": 'the "cat", sat', "completion": " on\n\nthe mat"}, {"prompt": "hello", "completion": " 7"}]
    for suffix, separator in ((".csv", ","), (".csv", ";"), (".tsv", "\t")):
        path = tmp_path / f"rows{suffix}"
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["completion", "prompt"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        assert make(path, plain, tmp_path).digest == make(rows, plain, tmp_path).digest


def test_parts_of_a_file(plain, tmp_path, here):
    rows = [{"text": f"the cat sat on {i} mats"} for i in range(11)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for part, wanted in (
        ("[:3]", rows[:3]), ("[3:]", rows[3:]), ("[:90%]", rows[:9]), ("[90%:]", rows[9:]), ("[2:50%]", rows[2:5]),
        ("[:]", rows),
    ):  # fmt: skip
        data = make(f"{path}{part}", plain, tmp_path)
        assert data.digest == make(wanted, plain, tmp_path).digest and data.meta["rows"] == len(wanted)
