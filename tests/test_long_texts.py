"""Tensors of long texts in a file, and prompts in pieces over a key-value cache that lies there."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from test_sequence_chunks import MODELS, all_in_fp64  # noqa: F401  fixture
from text_models import make_config, write_model
from transformers import modeling_utils

from finetune.generate import generate
from finetune.memory import tensor_file
from finetune.memory.arena import install_arena
from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError
from finetune.memory.tensor_file import (
    TensorFile,
    allocates_in_file,
    beside_file_bytes,
    fetch_soon,
    in_file,
    let_go,
    moved_to_file,
)
from finetune.offload.devices.simulated import SimulatedDevice
from finetune.offload.step.cached_attention import attention_in_parts, refusing_what_has_no_parts
from finetune.offload.streamed_model import PassOfRun, StreamedModel


@pytest.fixture
def arena():
    arena = install_arena(16 << 20)
    yield arena
    arena.give_back()


def test_what_is_allocated_inside_lies_in_the_file(arena, tmp_path):
    before = arena.stats().used_bytes
    with in_file():
        assert allocates_in_file()
        early = torch.ones(1 << 20)  # no file is open
    file = TensorFile(tmp_path, 12 << 20)
    assert not os.listdir(tmp_path)  # it has no name
    with in_file():
        large, small = torch.arange(1 << 20), torch.ones(100)
        with in_file(False):
            near = torch.ones(1 << 19)
        too_large = torch.ones(2 << 20)  # than what is left
        assert file.used_bytes == large.nbytes and file.beside_bytes == beside_file_bytes() == too_large.nbytes
    assert not allocates_in_file()
    copy = moved_to_file(near)
    assert file.used_bytes == large.nbytes + near.nbytes and copy.equal(near)
    assert arena.stats().used_bytes - before >= early.nbytes + near.nbytes + too_large.nbytes
    parts = large.view(1, 4, -1)
    let_go(parts[:, 1:2])
    fetch_soon(parts[:, 1:2])
    fetch_soon(small)
    file.check()
    assert large.equal(torch.arange(1 << 20))
    del copy
    assert file.used_bytes == large.nbytes
    with in_file():
        again = torch.ones(1 << 19)
    file.close()
    del parts
    assert int(large.sum()) == (1 << 19) * ((1 << 20) - 1) and float(again.sum()) == 1 << 19  # they stay valid
    del too_large
    before = arena.stats().used_bytes
    with in_file():
        late = torch.ones(1 << 20)
    assert arena.stats().used_bytes - before >= late.nbytes  # not in the file
    assert beside_file_bytes() == 0


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot write 1\.0 MiB to .*, for hidden states on disk: No space left"):
        TensorFile(tmp_path, 1 << 20)
    assert not os.listdir(tmp_path) and tensor_file._open is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_pieces_of_a_prompt_give_the_logits_of_all_of_it(name, all_in_fp64):  # noqa: F811
    """Full and sliding attention; the last piece has one token."""
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name]()).double().eval()
    ids = torch.randint(3, 101, (2, 22))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache, found = tf.DynamicCache(config=model.config), []
        with attention_in_parts(4):
            for piece in ids.split([4, 4, 4, 6, 3, 1], dim=1):
                found.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_generated_text_is_the_same_in_pieces_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MIN_BYTES", 1)
    opened: list[Path] = []
    init = TensorFile.__init__

    def noted(file: TensorFile, directory: Path, num_bytes: int) -> None:
        opened.append(directory)
        init(file, directory, num_bytes)

    monkeypatch.setattr(TensorFile, "__init__", noted)
    model, texts = write_model("llama", tmp_path / "model"), []
    in_pieces = {"sequence_chunk": 3}
    for engine in ({}, in_pieces | {"hidden_states": "host"}, in_pieces | {"hidden_states": "disk"}):
        config = make_config(model, tmp_path / str(len(texts)), engine=engine)
        prompts = ["what is it about the user and the great world", "hello"]
        texts.append("".join(generate(config, None, prompts, max_new_tokens=6)))
    assert len(opened) == 1 and len(set(texts)) == 1 and texts[0].strip()

def test_pieces_that_would_need_more_than_is_planned_are_refused(tmp_path, monkeypatch):
    def message(name: str, engine: dict, **options) -> str:
        model = write_model(name, tmp_path / name)
        config = make_config(model, tmp_path / "out", engine=engine, **options)
        with pytest.raises(UserError) as caught:
            "".join(generate(config, None, ["what is it about the user"], max_new_tokens=6))
        return str(caught.value)

    own_memory = replace(DEVICE_KINDS["simulated"], computes_on_host=False)
    monkeypatch.setattr(SimulatedDevice, "traits", own_memory)
    found = message("llama", {"sequence_chunk": 3}, device="simulated")
    assert found == "engine.sequence_chunk: only a CPU runs chunks of a text yet, found simulated: leave it out"
    assert "its attention is eager, and only Transformers' sdpa is known" in message("gemma2", {"sequence_chunk": 3})
    query = torch.ones(1, 2, 8, 4)
    for inside in (attention_in_parts(4), refusing_what_has_no_parts()):
        with inside, pytest.raises(UserError, match="Linear can't be run in chunks .* has a position_bias"):
            attend = modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
            attend(torch.nn.Linear(1, 1), query, query, query, None, position_bias=query)



def test_what_could_not_be_written_is_told_before_any_result_is_used():
    def full() -> None:
        raise UserError("hidden states could not be written to disk")

    streamed = StreamedModel.__new__(StreamedModel)
    streamed._file, streamed._begin = SimpleNamespace(check=full), lambda inputs: None
    streamed.engine = SimpleNamespace(forward=lambda inputs, variants, models=(): inputs)
    streamed.head = SimpleNamespace(last_logits=lambda logits, variants: logits, token_scores=lambda *asked: asked)
    output = SimpleNamespace(logits=torch.ones(1, 1, 3))
    for ask in (
        lambda: streamed.forward([output]),
        lambda: streamed.forward_together([PassOfRun([output], [0], None)]),
        lambda: streamed.last_logits([output]),
        lambda: streamed.token_scores([output.logits], [torch.ones(1)]),
    ):
        with pytest.raises(UserError, match="could not be written"):
            ask()
