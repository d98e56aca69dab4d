"""Files of run directories that were changed by accident: what is made of them is the same bits, or one sentence.

Runs of seven methods, stopped a step before their end. Each draw changes a file (bits flipped, cut, emptied, deleted, appended
to, exchanged with another file of the run or of another run), then the run is resumed, evaluated or exported. `MUTATIONS=600`
draws them all, in some minutes of one core; without it a share is drawn. A failure names its draw: `MUTATION_SEED=S
MUTATIONS=N` draws it again.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from data_tools import write_tokenizer
from safetensors.torch import load_file
from test_resume import WORDS
from test_resume import data_prepared_here as prepared_here
from test_zeroth_order import weights
from text_models import VOCAB, StopAfter, make_config, write_rows

import finetune.offload.update.units
import finetune.trainer
from finetune import Config, Trainer
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.memory.errors import UserError
from finetune.methods.base import make_method
from finetune.offload.perturb.journal import Journal
from finetune.offload.sizing.calibration import Rates
from finetune.offload.update.store import read_manifest

DRAWS = int(os.environ.get("MUTATIONS", 84))
SEED = int(os.environ.get("MUTATION_SEED", 1))
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"r": 2}},
    "zo": {"method": "zo", "zo": {"fold_steps": 2, "epsilon": 1e-2}},
    "zo-lora": {"method": "zo", "zo": {"fold_steps": 2, "parameters": "lora"}, "lora": {"r": 2}},
    "zo-prefix": {"method": "zo", "zo": {"fold_steps": 2, "parameters": "prefix", "prefix_tokens": 3, "epsilon": 0.1}},
    "lisa": {"method": "lisa", "selection": {"interval": 2, "layers": 1}},
    "adafactor": {"method": "full", "optimizer": {"name": "adafactor"}},
    "8bit": {"method": "full", "optimizer": {"state": "8bit"}},
}
# What may be another run's: a log of the past, and an adapter, which may be anybody's.
FREE = ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json")


@dataclasses.dataclass
class World:
    """A run in `output`, its model, what both hold file by file, and what comes out of each action on it."""

    config: Config
    files: dict[Path, bytes]
    others: dict[str, list[bytes]]  # file name -> contents that another run has under it
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def roots(self) -> tuple[Path, Path]:
        return self.config.output, Path(self.config.model)

    def restore(self) -> None:
        for path, content in self.files.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for root in self.roots:
            for path in sorted(root.rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
                elif not path.is_dir() and path not in self.files:
                    path.unlink()


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    """No process for tokens, no measuring of the machine, and garbage of earlier tests is not looked through again."""
    with pytest.MonkeyPatch.context() as patch:
        prepared_here.__wrapped__(patch)
        patch.setattr(finetune.offload.update.units, "PIECE_BYTES", 4096)
        patch.setattr(finetune.trainer, "with_prediction", lambda _, planned, **__: replace(planned, rates=Rates(1e9, 1e9)))
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutations") / "model"
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(5)
    tf.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="24KB")
    text = (folder / "config.json").read_text()
    write_tokenizer(folder)
    (folder / "config.json").write_text(text)
    return folder


def make_world(name: str, model: Path, folder: Path) -> World:
    def begin(which: str, **training: Any) -> Config:
        rows = [
            {"prompt": " ".join(WORDS[(i * 7 + j) % 17] for j in range(3 + i % 5)), "completion": f" {which} {WORDS[i]}"}
            for i in range(6)
        ]
        options = {"max_steps": 4, "batch_size": 2, "micro_batch_size": 1, "save_steps": 1, "learning_rate": 1e-3}
        config = make_config(
            model, folder / which, data=write_rows(folder / f"{which}.jsonl", rows),
            training=options | training, **METHODS[name],
        )  # fmt: skip
        Trainer(config, callbacks=[StopAfter(3)]).train()
        return config

    one, other = begin("the"), begin("cat", learning_rate=2e-3)
    if make_method(one).adapter_directory:
        evaluate(evaluated(one), one.output / "adapter")  # for its token cache
    others: dict[str, list[bytes]] = {}
    for path in sorted(other.output.rglob("*")):
        if path.is_file():
            others.setdefault(path.name, []).append(path.read_bytes())
    paths = [path for root in (one.output, model) for path in sorted(root.rglob("*")) if path.is_file()]
    world = World(one, {path: path.read_bytes() for path in paths}, others)
    for action in actions(world):
        world.expected[action] = outcome(world, action)
        world.restore()
    return world


def evaluated(config: Config) -> Config:
    return config.model_copy(update={"eval_data": config.data})


def actions(world: World) -> list[str]:
    return ["resume", "evaluate" if make_method(world.config).adapter_directory else "export"]


def outcome(world: World, action: str) -> Any:
    """What is left for the user, or measured."""
    config = world.config
    if action == "evaluate":
        return {k: v for k, v in evaluate(evaluated(config), config.output / "adapter").items() if k != "seconds"}
    if action == "export":
        target = config.output.parent / "exported"
        try:
            export(config, target)
            return {name: value.numpy().tobytes() for name, value in weights(target).items()}
        finally:
            shutil.rmtree(target, ignore_errors=True)
    Trainer(config.model_copy(update={"resume": True})).train()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    left: dict[str, Any] = {"rows": {row["step"]: (row["loss"], row["learning_rate"]) for row in rows}}
    if make_method(config).adapter_directory:
        tensors = load_file(config.output / "adapter" / "adapter_model.safetensors")
        left["adapter"] = {name: value.numpy().tobytes() for name, value in tensors.items()}
    if config.method == "zo":
        left["records"] = Journal.read(config.output / "journal.zo").records
    if config.method in ("full", "lisa"):
        # Between tensors a piece holds whatever was in memory: its own checksum says nothing.
        pieces = read_manifest(config.output / "store")["pieces"]
        left["states"] = sorted((unit, index, *values[7:]) for unit, index, *values in pieces)
        left["weights"] = outcome(world, "export")
    return left


def is_same(found: Any, expected: Any) -> bool:
    """Rows of metrics may have been lost with their file; those that are there are right."""
    if isinstance(found, dict) and "rows" in found:
        kept = {step: expected["rows"].get(step) for step in found["rows"]}
        return found | {"rows": None} == expected | {"rows": None} and found["rows"] == kept
    return found == expected


def mutate(world: World, rng: random.Random) -> str:
    """Changes a file; says how."""
    output, model = world.roots
    groups: dict[str, list[Path]] = {}
    for path in world.files:
        if path.is_relative_to(output):
            groups.setdefault(path.relative_to(output).parts[0], []).append(path)
        elif path.name.endswith((".safetensors", ".index.json")) or path.name == "config.json":
            groups.setdefault("model", []).append(path)
    siblings = groups[rng.choice(sorted(groups))]
    path = rng.choice(siblings)
    ours = path.is_relative_to(output)
    name, content = str(path.relative_to(output if ours else model)), world.files[path]
    kind = rng.choice(["flip"] * 5 + ["cut", "empty", "delete", "append", "exchange", "replace"])
    if kind == "flip":
        end = 8 * flippable_bytes(path, content, ours)
        places = [rng.randrange(end) for _ in range(rng.choice((1, 1, 1, 3)))] if end else []
        changed = bytearray(content)
        for place in places:
            changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        return f"flip {name} at bits {places}"
    if kind == "cut":
        at = rng.randrange(len(content)) if content else 0
        path.write_bytes(content[:at])
        return f"cut {name} to {at} of {len(content)} bytes"
    if kind == "delete":
        whole = ours and path.parent != output and rng.random() < 0.3
        shutil.rmtree(path.parent) if whole else path.unlink()
        return f"delete {name}{' and all beside it' if whole else ''}"
    if kind == "exchange":
        partners = [other for other in world.files if other.is_relative_to(output)] if ours else siblings
        alike = [other for other in partners if other.name == path.name]
        partner = rng.choice(alike if rng.random() < 0.5 else partners)
        path.write_bytes(world.files[partner])
        partner.write_bytes(content)
        return f"exchange {name} with {partner.relative_to(output if ours else model)}"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "append":
        path.write_bytes(content + rng.choice((content, rng.randbytes(rng.randrange(1, 99)), b"\n", b"\0" * 40)))
    elif path.name not in FREE:
        path.write_bytes(rng.choice(world.others.get(path.name, [content])))
    return f"{kind} {name}"


def flippable_bytes(path: Path, content: bytes, ours: bool) -> int:
    """Of a base model, whose weights are the user's, only what says where they are."""
    if ours or path.suffix != ".safetensors":
        return len(content)
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("name", METHODS)
def test_changed_files(name, model, tmp_path):
    world = make_world(name, model, tmp_path)
    number = list(METHODS).index(name)
    wrong = []
    for draw in range(number, DRAWS, len(METHODS)):
        rng = random.Random(f"{SEED}/{draw}")
        words = mutate(world, rng)
        action = rng.choice(actions(world))
        try:
            if not is_same(outcome(world, action), world.expected[action]):
                wrong.append(f"draw {draw}, {words}, {action}: another result")
        except UserError as error:
            if "\n" in str(error):
                wrong.append(f"draw {draw}, {words}, {action}: more than a sentence: {error}")
        except Exception as error:  # noqa: BLE001  whatever a damaged file can cause
            wrong.append(f"draw {draw}, {words}, {action}: {type(error).__name__}: {error}")
        finally:
            world.restore()
    assert not wrong, f"seed {SEED}:\n" + "\n".join(wrong)
