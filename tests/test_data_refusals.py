"""What data is refused with which words, when a cache is used again, and how the preparing process ends."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from data_tools import CHAT, CHATML, make, prepare_in_this_process, write_jsonl, write_tokenizer
from pyarrow import parquet

from finetune.data import DataError, TokenDataset, preparation


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


GOOD = '{"prompt": "the", "completion": " cat"}'
BAD_ROWS = [
    ('{"prompt": "the", "completion": ["x"]}', 'expected "completion" to be a string, found a list'),
    ('{"prompt": "the"}', 'expected "completion", found "prompt"'),
    ('{"prompt": "the", "completion": null}', 'expected "completion", found "prompt"'),
    ('{"prompt": "the", "completion": ""}', '"completion" is empty'),
    ('{"prompt": 3, "completion": "x"}', 'expected "prompt" to be a string, found a number'),
    ('{"prompt": "\\ud800", "completion": "x"}', '"prompt" holds half of a surrogate pair at character 1'),
    ('{"prompt": "the", ', "expected one JSON object, found what is not JSON"),
    ('["the"]', "expected one JSON object, found a list"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_bad_row_is_named_by_file_and_line(plain, tmp_path, here, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n{line}\n")
    with pytest.raises(DataError) as caught:
        make(path, plain, tmp_path)
    assert str(caught.value).startswith(f"train.jsonl:3: {message}")
    assert str(caught.value).endswith("(and 1 more bad row)")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == []


BAD_MESSAGES = [
    ({"messages": "hello"}, 'expected "messages" to be a list, found a string'),
    ({"messages": []}, '"messages" is an empty list'),
    ({"messages": CHAT[:1]}, '"messages" has no message of the assistant'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: expected one of system, developer, user"),
    ({"messages": ["hello"]}, 'expected messages[0] to be an object with "role" and "content", found a string'),
    ({"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]}, "messages[1]: the assistant's message is empty"),
    ({"messages": [*CHAT[:1], {"role": "assistant"}]}, "expected messages[1].content to be a string, found null"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content: expected parts of type"),
    ({"conversations": [{"from": "me", "value": "x"}]}, "conversations[0].from: expected one of human"),
    ({"messages": CHAT[1:]}, "the conversation begins with the assistant"),
    ({"messages": CHAT, "tools": "{"}, '"tools" is a string that is not JSON'),
    ({"prompt": CHAT[:1], "completion": CHAT[2:3]}, '"completion" has no message of the assistant'),
    ({"instruction": "it", "output": ""}, '"output" is empty'),
    ({"text": ""}, '"text" is empty'),
    ({"input_ids": [1, 2.5]}, "expected input_ids[1] to be an integer, found a number"),
    ({"input_ids": []}, '"input_ids" is an empty list'),
    ({"input_ids": [1, 2], "labels": [1]}, 'expected "labels" as long as "input_ids" (2), found 1'),
    ({"input_ids": [1, 2], "labels": [1, -7]}, "expected labels[1] between 0 and"),
    ({"input_ids": [1, 2], "attention_mask": [1, 3]}, 'expected "attention_mask" of 0 and 1, found 3'),
    ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask[1] is 0 between tokens that are attended to"),
    ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]}, 'found "labels" and "completion_mask"'),
    ({"messages": [*CHAT[:1], CHAT[1] | {"weight": 0.5}]}, "messages[1].weight: expected 0 or 1 (false or true), found 0.5"),
    ({"messages": [CHAT[0] | {"train": True}, CHAT[1]]}, 'messages[0] has "train" set, but only turns of the assistant'),
    ({"messages": [CHAT[0], CHAT[1] | {"train": True, "weight": 0}]}, "messages[1]: weight and train contradict each other"),
    ({"messages": [CHAT[0], CHAT[1] | {"train_detail": [{}]}]}, 'messages[1] has "train_detail", which is not known here'),
    ({"messages": [CHAT[0] | {"images": ["a.png"]}, CHAT[1]]}, 'messages[0] has "images", which is not known here: only'),
    ({"messages": CHAT, "weight": 0.1}, 'found "weight" 0.1'),
    ({"prompt": "the", "completion": " cat", "weight": 0}, 'found "weight" 0'),
    ({"text": "the", "weight": 0.5}, 'found "weight" 0.5'),
    ({"prompt": "the", "completion": " cat", "label": False}, 'found "label" false, which marks an unwanted answer'),
    ({"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": CHAT[3:]}, "found pairs of a chosen and a rejected answer"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1]}, 'found "loss_mask", which some tools align with the next token'),
    ({"prompt": "a", "completion": "b", "sample_weight": 0}, 'found "sample_weight" 0, but all rows and tokens'),
    ({"input_ids": [1, 2], "loss_weights": [1, 0.5]}, 'found "loss_weights" [1, 0.5]'),
    ({"messages": CHAT, "conversations": CHAT[:2]}, 'found "messages" and "conversations" that differ'),
    ({"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}, 'found "system" and a first message'),
    ({"messages": CHAT, "system": ["a"]}, 'expected "system" to be a string, found a list'),
    ({"messages": CHAT, "history": [["only"]]}, "expected history[0] to be a pair of strings, found ['only']"),
    ({"messages": CHAT, "tools": [{}], "functions": [{"name": "f"}]}, 'found both "tools" and "functions"'),
    ({"messages": CHAT, "tools": [3]}, 'expected "tools" to be a list of JSON schemas, found a list'),
    ({"messages": CHAT, "chat_template_kwargs": {"tools": []}}, 'expected "chat_template_kwargs" to be an object of options'),
    ({"messages": CHAT, "image": "a.png"}, 'found "image": only text is trained on here'),
    ({"messages": [*CHAT[:1], {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "expected messages[1].tool_calls[0] to be a"),
    (
        {"messages": [*CHAT[:1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "expected messages[1].tool_calls[0].arguments to be an object, found a string",
    ),
    (
        {"messages": [*CHAT[:1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}]},
        "messages[1].tool_calls is not JSON: Out of range float",
    ),
    ({"prompt": "the", "completion": " cat", "system": "it"}, '"system" belongs to a conversation, and this row is none'),
    ({"instruction": "the", "input": float("nan"), "output": "cat"}, 'expected "input" to be a string, found NaN'),
    ({"data": [{"text": "the"}]}, 'expected a row with "messages"'),
    ({"question": "x", "answer": "y"}, 'expected a row with "messages", "conversations", "prompt" and "completion"'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_MESSAGES)
def test_bad_rows_of_every_form(chatml, tmp_path, here, row, message):
    with pytest.raises(DataError) as caught:
        make(write_jsonl(tmp_path / "rows.jsonl", [row]), chatml, tmp_path)
    assert str(caught.value).startswith(f"rows.jsonl:1: {message}")


def test_bad_files(plain, chatml, tmp_path, here, monkeypatch):
    def message(source, model=plain, **options) -> str:
        with pytest.raises(DataError) as caught:
            make(source, model, tmp_path, **options)
        return str(caught.value)

    (array := tmp_path / "a.json").write_text('[\n{"text": "the"},\n{"text": 3},\n{"text": "cat"\n]')
    assert message(array) == 'a.json:3: expected "text" to be a string, found a number (and 1 more bad row)'
    array.write_text('[{"text": "the"},\n 7]')
    assert message(array) == "a.json:2: expected an object in the array, found '7]'"
    array.write_text('[{"text": "the"},\n {"text": "cat"')
    assert message(array).startswith("a.json:2: the array's element is not JSON")
    array.write_text('[{"text": "the"},\n')
    assert message(array) == "a.json:2: the file ends within the array: it was cut, or not written to its end"
    array.write_text('[{"text": "the"}\n{"text": "cat"}]')
    assert message(array) == """a.json:2: expected a comma or the array's end, found '{"text": "cat"}]'"""
    array.write_text('[{"text": "the"}]\n} x')
    assert message(array) == "a.json:2: expected an array or an object of JSON, found '} x'"
    array.write_text('[{"text": "the"},\n {"text": "cat", "text": "mat"}]')
    twice = 'the key "text" stands twice in one object'
    assert message(array) == f"a.json:2: the array's element cannot be read: {twice}"
    array.write_text('[{"text": "the", "n": ' + "[" * 100_000)
    assert message(array) == "a.json:1: the array's element cannot be read: nested too deeply"
    array.write_text('{\n"rows": [{"text": "the"}]}')
    assert message(array).endswith('found "rows": write the list under "rows" alone to the file')
    (tmp_path / "d.jsonl").write_text(f'{GOOD}\n{{"text": "cat", "text": "mat"}}\n')
    assert message(tmp_path / "d.jsonl").endswith(
        f"d.jsonl:2: expected one JSON object, found what is not JSON: {twice}"
    )
    (tmp_path / "d.jsonl").write_text(f'{GOOD}\n{{"prompt": "a", "completion": "b", "n": {"9" * 5000}}}\n')
    assert message(tmp_path / "d.jsonl").endswith("not JSON: an integer of thousands of digits")
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
    assert message(tmp_path / "g.jsonl.gz").startswith(f"cannot decompress {tmp_path / 'g.jsonl.gz'}: ")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "z.jsonl.zst").write_bytes(b"")
    assert message(tmp_path / "folder").endswith(
        "z.jsonl.zst: a .jsonl file in .zst is not read here: decompress it first"
    )
    alpaca = {"instruction": "the", "output": "cat", "history": [["a", "b"]]}
    assert message([alpaca]).startswith(
        'data[0]: "history" belongs to a conversation, and this row is none: give a chat_'
    )
    (tmp_path / "l.jsonl").write_bytes((GOOD + '\n{"prompt": "é", "completion": "x"}\n').encode("latin-1"))
    assert message(tmp_path / "l.jsonl").startswith("l.jsonl:2: not UTF-8 (byte 13 of the line)")
    (tmp_path / "l.txt").write_bytes("the\né".encode("latin-1"))
    assert message(tmp_path / "l.txt").startswith("l.txt: not UTF-8 after line 1")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 this is not one")
    assert message(tmp_path / "p.parquet").startswith("p.parquet: cannot be read as Parquet")
    parquet.write_table(pa.table({"text": ["the", None]}), tmp_path / "p.parquet")
    assert message(tmp_path / "p.parquet") == 'p.parquet:2: expected "text", found no keys'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        expected = "reading p.parquet needs pyarrow, which is not installed: pip install pyarrow"
        assert message(tmp_path / "p.parquet") == expected
    (tmp_path / "e.jsonl").write_text("\n")
    assert message(tmp_path / "e.jsonl") == "e.jsonl: no example is left of 0 rows: the data is empty"
    (tmp_path / "x.xml").write_text("a,b")
    assert "expected a file ending in .jsonl, .json, .csv, .tsv, .parquet, .txt, found '.xml'" in message(tmp_path / "x.xml")
    (tmp_path / "a.csv").write_text("prompt,completion\nthe,cat\nthe,cat,sat\n")
    assert message(tmp_path / "a.csv") == "a.csv:3: expected 2 cells as in the first line, found 3"
    (tmp_path / "a.csv").write_text('text\n"the cat\n')
    assert message(tmp_path / "a.csv") == "a.csv:2: expected CSV in UTF-8: unexpected end of data"
    (tmp_path / "a.csv").write_text("text,text\nthe,cat\n")
    assert message(tmp_path / "a.csv") == "a.csv:1: expected a name for each column, found one twice in text, text"
    (tmp_path / "a.txt").write_text("the cat")
    assert "a.txt[:1]: a .txt file is one document" in message(f"{tmp_path / 'a.txt'}[:1]")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "expected a file, for it is read more than once, found a pipe" in message(tmp_path / "pipe.jsonl")
    assert message(str(tmp_path / "no.jsonl")) == f"data file not found: {tmp_path / 'no.jsonl'}"
    assert message(str(tmp_path / "no*.jsonl")) == f"no file matches {tmp_path / 'no*.jsonl'}"
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty").startswith(f"no data file in the folder {tmp_path / 'empty'}")
    assert message([{"messages": CHAT}]).startswith("data[0]: the row is a conversation, but the model's tokenizer")
    assert message({"train": [], "test": []}).startswith("data: expected rows, found a mapping with train, test: hand")
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("")
    assert message([]) == f"the folder for token caches, {tmp_path / 'cache'}, cannot be made: File exists"
    (tmp_path / "cache").unlink()
    assert message([{"text": "the"}, "the cat"]) == "data[1]: expected a dict, found str"
    assert message([{"text": b"the"}]).startswith("data[0]: expected strings, numbers, lists and dicts: found bytes")
    assert message([{"text": "the"}], form="chat").startswith("form: expected one of auto, messages")
    assert message([{"text": "the"}], form="alpaca") == 'data[0]: expected "instruction", found "text"'
    assert message([{"text": "the"}], sequence_length=1).startswith("sequence_length: expected at least 2")
    assert "expected Jinja text or a file, found 'no" in message([{"text": "the"}], chat_template="no.jinja")
    refusing = "{{ raise_exception('roles must alternate') }}"
    refused = message([{"messages": CHAT}], chatml, chat_template=refusing)
    assert refused == "data[0]: the chat template refuses the conversation: roles must alternate"
    assert message([{"text": "the"}], str(tmp_path / "empty")).startswith("the tokenizer of ")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_cache_is_used_again_until_something_changes(chatml, tmp_path, here, monkeypatch, capfd):
    made = []
    run = preparation._run_worker
    monkeypatch.setattr(preparation, "_run_worker", lambda *given: (made.append(1), run(*given)))
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(chatml).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])

    def runs(source=path, **options) -> int:
        before = len(made)
        data = make(source, str(model), tmp_path, **options)
        assert data.meta["rows"] == 1
        return len(made) - before

    assert [runs(), runs()] == [1, 0]
    os.utime(path, ns=(1, 1))
    assert [runs(), runs()] == [1, 0]
    assert [runs(sequence_length=9), runs(append_eos=False), runs(completion_only=False)] == [1, 1, 1]
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + "\n")
    assert [runs(), runs()] == [1, 0]
    assert [runs([{"text": "the"}]), runs([{"text": "the"}]), runs([{"text": "cat"}])] == [1, 0, 1]
    folder = make(path, str(model), tmp_path).path
    whole = TokenDataset.open(folder)
    with open(folder / "tokens.int32", "ab") as stream:
        stream.write(b"torn")
    with pytest.raises(DataError, match="tokens.int32: expected 16 bytes, found 20"):
        TokenDataset.open(folder)
    assert [runs(), runs()] == [1, 0]
    for name in ("tokens.int32", "labels.int32", "offsets.int64", "meta.json"):
        flip(folder / name)
        with pytest.raises(DataError, match=f"{name} is damaged|is not a token cache"):
            TokenDataset.open(folder)
        assert [runs(), runs()] == [1, 0]
    assert "tokens.int32 is damaged: its checksum does not fit; it is made again from the data" in capfd.readouterr().err
    assert TokenDataset.open(folder).digest == whole.digest
    other = make([{"text": "the mat"}], str(model), tmp_path)
    assert other.digest != whole.digest and other.meta["tokens"] == whole.meta["tokens"]
    folder.rename(tmp_path / "held")
    other.path.rename(folder)
    with pytest.raises(DataError, match=f"expected the token cache of this name, found {other.path.name}"):
        TokenDataset.open(folder)
    assert [runs(), runs()] == [1, 0]
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="is not a token cache"):
        TokenDataset.open(folder)
    assert [runs(), runs()] == [1, 0]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert not list((tmp_path / "cache").glob(".*"))


def test_real_process_leaves_the_trainer_light(chatml, tmp_path):
    """The one test through everything: rows in memory, another process, the cache; and what that imports here."""
    write_jsonl(tmp_path / "train.jsonl", [{"messages": CHAT}] * 3)
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('a file of the user, not the library')")
    code = f"""
import sys
from finetune.data import prepare, TokenDataset, BatchPlan
data = prepare("train.jsonl", model={chatml!r}, cache_dir="cache", sequence_length=64)
assert len(TokenDataset.open(data.path)) == len(data) == 3
assert BatchPlan(3, 2, 1, 0, data.lengths, epochs=1).step(0)
heavy = {{"torch", "transformers", "tokenizers", "datasets", "pyarrow"}}
print(data[2].input_ids.tolist(), sorted(heavy & {{*sys.modules}}))
"""
    home = str(Path(preparation.__file__).parents[2])
    script = tmp_path / "script.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": home}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    from transformers import AutoTokenizer

    wanted = AutoTokenizer.from_pretrained(chatml).apply_chat_template(CHAT, return_dict=False)
    assert result.stdout.strip() == f"{wanted} []"


def test_errors_come_back_from_the_process(plain, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "the cat"}, {"text": ["é"]}])
    with pytest.raises(DataError) as caught:
        make(path, plain, tmp_path)
    assert str(caught.value) == 'train.jsonl:2: expected "text" to be a string, found a list'
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed by SIGKILL .*lack of memory"),
        ("raise SystemError('out of order')", "crashed with exit code 1; its last words:\n(.|\n)*out of order"),
        ("import os; print('printed', flush=True); os._exit(7)", "crashed with exit code 7; its last words:\nprinted"),
    ],
)
def test_a_process_that_dies_is_reported(plain, tmp_path, monkeypatch, program, message):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "transformers.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    with pytest.raises(DataError, match=message):
        make([{"text": "the cat"}], plain, tmp_path)
    assert not list((tmp_path / "cache").iterdir())
