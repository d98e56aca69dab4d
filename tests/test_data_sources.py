"""Several sources one after the other or mixed, streams, and mappings of splits."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
import yaml
from data_tools import make, prepare_in_this_process, texts, write_jsonl, write_tokenizer
from text_models import StopAfter, make_config, write_model

from finetune import Config, Trainer
from finetune.cli_messages import one_a_flag
from finetune.config import ConfigError
from finetune.data import DataError
from finetune.data.preparation import describe
from finetune.memory.errors import UserError

COUNTS = (7, 23, 4)
ROWS = [
    [{"prompt": f"{name}{i} the cat", "completion": f" sat {name}"} for i in range(count)]
    for name, count in zip("abc", COUNTS, strict=True)
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    return [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in zip("abc", ROWS, strict=True)]


def test_sources_one_after_the_other(plain, files, tmp_path, here):
    data = make(files, plain, tmp_path)
    assert texts(plain, data) == texts(plain, make(list(itertools.chain(*ROWS)), plain, tmp_path))
    assert "34 rows (7 of a.jsonl + 23 of b.jsonl + 4 of c.jsonl)" in describe(data)[0]
    mixed = make([files[0], ROWS[1], datasets.Dataset.from_list(ROWS[2])], plain, tmp_path)
    assert mixed.digest == data.digest
    with pytest.raises(DataError, match=r"data\[1\]\[2\]: expected .*\"prompt\""):
        make([files[0], [*ROWS[1][:2], {"prompt": 1}]], plain, tmp_path)


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(("probabilities", "seed"), [([0.2, 0.7, 0.1], 3), ([0.5, 0.25, 0.25], 42)])
def test_a_mixture_is_that_of_datasets(plain, files, tmp_path, here, strategy, probabilities, seed):
    sets = [datasets.Dataset.from_list(rows) for rows in ROWS]
    wanted = datasets.interleave_datasets(sets, probabilities, seed=seed, stopping_strategy=strategy)
    how = {"stopping_strategy": strategy, "mixing_seed": seed}
    data = make(files, plain, tmp_path, probabilities=probabilities, **how)
    assert data.digest == make(wanted, plain, tmp_path).digest
    counts = [sum(row["completion"] == f" sat {name}" for row in wanted) for name in "abc"]
    assert [count for _, count in data.meta["rows_of"]] == counts
    # Weights are divided by their sum.
    again = make(files, plain, tmp_path, probabilities=[20 * one for one in probabilities], **how)
    assert again.digest == data.digest


def test_documents_in_a_mixture_stay_whole(plain, files, tmp_path, here, monkeypatch):
    monkeypatch.setattr("finetune.data.sources.TEXT_PIECE_CHARS", 16)
    (tmp_path / "long.txt").write_text("the cat sat on the mat\n" * 5)
    how = {"probabilities": [1, 1], "stopping_strategy": "all_exhausted", "form": "auto"}
    data = make([files[2], str(tmp_path / "long.txt")], plain, tmp_path, **how)
    documents = [text for text, _ in texts(plain, data) if "mat\n" in text]
    assert set(documents) == {"<s>" + "the cat sat on the mat\n" * 5 + "</s>"}
    assert len(documents) == dict(data.meta["rows_of"])["long.txt"]


def test_an_empty_source_cannot_be_mixed(plain, files, tmp_path, here):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="none.jsonl"):
        make([files[0], str(tmp_path / "none.jsonl")], plain, tmp_path, probabilities=[1, 1])


def endless():
    for number in itertools.count():
        yield {"text": f"the cat {number}"}


def test_no_more_of_a_stream_is_read_than_is_used(plain, tmp_path, here):
    stream = datasets.IterableDataset.from_generator(endless)
    data = make(stream, plain, tmp_path, most_rows=6)
    assert [text for text, _ in texts(plain, data)] == [f"<s>the cat {i}</s>" for i in range(6)]
    packed = make(stream, plain, tmp_path, most_tokens=300)
    assert 300 <= packed.meta["tokens"] < 8 * 300


def uneven():
    """Of four rows three have no room for their completion."""
    for number in itertools.count():
        yield {"prompt": f"the cat {number}" + " mat" * (100 if number % 4 else 1), "completion": " sat"}


@pytest.mark.parametrize("way", ["rows", "a file"])
def test_rows_of_a_stream_that_are_left_out_are_replaced(way, plain, tmp_path, here):
    stream = datasets.IterableDataset.from_generator(uneven)
    if way == "a file":
        stream = str(write_jsonl(tmp_path / "long.jsonl", itertools.islice(uneven(), 1000)))
    data = make(stream, plain, tmp_path, most_rows=6, sequence_length=40, streaming=True)
    assert [text for text, _ in texts(plain, data)] == [f"<s>the cat {i} mat sat</s>" for i in range(0, 24, 4)]
    assert data.meta["enough"] and not data.meta["notes"]
    assert make(stream, plain, tmp_path, most_rows=6, sequence_length=40, streaming=True).path == data.path


def test_a_stream_is_read_on_where_a_token_takes_many_bytes(plain, tmp_path, here):
    def rows():
        for number in itertools.count():
            yield {"prompt": f"{number}", "completion": " sat" * 300}

    data = make(datasets.IterableDataset.from_generator(rows), plain, tmp_path, most_tokens=400, sequence_length=20)
    assert 400 <= data.meta["tokens"] < 1000 and data.meta["truncated"] == len(data) and data.meta["rows"] == len(data)


def test_a_stream_that_ends_too_early_is_said_to_repeat(plain, tmp_path, here, capsys):
    few = datasets.IterableDataset.from_generator(lambda: itertools.islice(endless(), 3))
    found = describe(make(few, plain, tmp_path, most_rows=9))
    assert found[1] == "note: the steps take 9 rows, and the 3 rows that were read of the data give 3: each is used 3.0 times"

    def rows():
        for number in itertools.count():
            yield {"prompt": "the cat" + " mat" * 100 * bool(number), "completion": " sat"}

    # What is left out endlessly is not read endlessly.
    long = datasets.IterableDataset.from_generator(rows)
    found = make(long, plain, tmp_path, most_rows=2, sequence_length=40)
    assert "2 rows, and the 128 rows that were read of the data give 1: each is used 2.0 times" in describe(found)[1]
    assert "no more than 128 rows of a stream were read" in capsys.readouterr().err


def test_what_a_configuration_takes(files):
    config = Config(model="m", data=files, dataset={"probabilities": [3, 1, 1]})
    assert yaml.safe_load(config.to_yaml())["data"] == files
    assert Config(model="m", data=files[:1]).data == files[0]
    shown = repr(Config(model="m", data=[ROWS[0], ROWS[1]], max_steps=3))
    assert shown == "Config(model='m', data=[<7 rows>, <23 rows>], training=TrainingOptions(max_steps=3))"
    sets = map(datasets.Dataset.from_list, ROWS)
    splits = datasets.DatasetDict(dict(zip(("train", "validation", "x"), sets, strict=True)))
    config = Config(model="m", data=splits)
    assert (config.data, config.eval_data) == (splits["train"], splits["validation"])
    assert Config(model="m", data=splits, eval_data="other.jsonl").eval_data == "other.jsonl"
    stream = datasets.IterableDataset.from_generator(endless)
    assert "<a stream of rows>" in repr(Config(model="m", data=stream, max_steps=3))
    for message, values in {
        "expected as many dataset.probabilities as data has sources": {"data": files, "dataset": {"probabilities": [1, 1]}},
        "training.max_steps where data are read as a stream, which has no": {"data": stream},
        "at each place of the list, found null": {"data": [files[0], None]},
        "expected training.max_steps": {"data": files, "dataset": {"streaming": True}},
        "named train and validation, found a mapping with x": {"data": datasets.DatasetDict({"x": splits["x"]})},
        "expected paths, hub ids, a sequence of rows or a datasets.IterableDataset, found": {"data": iter(ROWS[0])},
    }.items():
        with pytest.raises(ConfigError, match=message):
            Config(model="m", **values)


def test_several_values_of_a_flag(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    run = str(tmp_path / "run")
    last = f"my.yaml --eval-data c.jsonl {run} --data d.jsonl lora.r=8 --seed 3 -- x"
    assert one_a_flag(f"run --data a b.jsonl {last}".split()) == f"run --data a --data b.jsonl {last}".split()
    assert one_a_flag(["run", "--data"]) == ["run", "--data"]


def test_a_mixture_resumes(files, tmp_path, here):
    model = write_model("llama", tmp_path / "model")

    def config(name: str, **more):
        dataset = {"probabilities": [0.6, 0.3, 0.1], "stopping_strategy": "all_exhausted"}
        training = {"max_steps": 3, "batch_size": 3, "learning_rate": 5e-3, **more.pop("training", {})}
        return make_config(model, tmp_path / name, data=files, training=training, dataset=dataset, **more)

    Trainer(config("whole")).train()
    Trainer(config("parts"), callbacks=[StopAfter(1)]).train()
    Trainer(config("parts", resume=True)).train()
    losses, weights = {}, {}
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        weights[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(losses["whole"]) == 3
    assert losses["whole"] == losses["parts"]
    assert weights["whole"] == weights["parts"]
    with pytest.raises(UserError, match="data: .* then, .* now"):
        Trainer(config("parts", resume=True, training={"seed": 1})).train()
