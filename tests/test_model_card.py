"""Cards beside what is made, as the hub's own library reads them; and what goes to a hub, which is a stub here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_cli import invoke
from text_models import make_config, write_model, write_rows

from finetune import Trainer
from finetune.adapters.saved import base_name
from finetune.adapters.seal import check_adapter, trained_on
from finetune.runs.model_card import model_card


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    model = write_model("llama", folder / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- de\ntags:\n- other\n---\n# Base\n")
    rows = write_rows(folder / "rows.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 3)
    config = make_config(model, folder / "out", data=rows, training={"max_steps": 2, "batch_size": 1}, lora={"r": 3})
    Trainer(config).train()
    return model, folder / "out"


class Hub:
    """Notes what is asked of it."""

    calls: list[tuple[str, dict[str, Any]]] = []
    refuses = ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> str:
            if name == self.refuses:
                raise ConnectionError("no way there")
            if "folder_path" in options:  # which may be gone later
                options["files"] = {path.name: path.read_bytes() for path in options.pop("folder_path").iterdir()}
            self.calls.append((name, options | {"args": args}))
            return "https://hub/me/mine"

        return call


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_cards_and_uploads(run, hub, tmp_path):
    model, out = run
    card = ModelCard.load(out / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation" and "lora" in card.data.tags
    assert card.data.base_model is None and str(model.parent) not in card.content  # a path is nobody else's business
    assert (out / "adapter" / "README.md").stat().st_mode & 0o777 == 0o600
    assert "rows.jsonl (3 rows)" in card.content and "`lora`, 2 steps" in card.content and "| lora.r | 3 |" in card.content
    found = invoke("export", str(out), "--merge", "plain", "--to", str(tmp_path / "merged"))
    assert found.exit_code == 0, found.stderr
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.license == "apache-2.0" and merged.data.language == ["de"] and merged.data.library_name == "transformers"
    assert not hub.calls  # nothing goes away unasked
    found = invoke("export", str(out), "--push", "me/mine")
    assert found.exit_code == 0 and "uploaded to https://hub/me/mine" in found.stdout, found.stderr
    made, (call, options) = hub.calls
    assert made == ("create_repo", {"args": ("me/mine",), "private": True, "exist_ok": True})
    files = options.pop("files")
    assert call == "upload_folder" and options == {"args": (), "repo_id": "me/mine"}
    assert files.keys() == {path.name for path in (out / "adapter").iterdir()}
    assert not any(str(model.parent).encode() in content for content in files.values())
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    check_adapter(tmp_path / "copy")
    assert base_name(tmp_path / "copy") == trained_on(tmp_path / "copy")["name"] == "model"
    assert base_name(out / "adapter") == str(model)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "copy", out / "adapter"))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    hub.calls.clear()
    found = invoke("export", str(out), "--gguf", "f16", "--to", str(tmp_path / "x.gguf"), "--push", "me/mine", "--public")
    assert found.exit_code == 0, found.stderr
    assert hub.calls[0][1]["private"] is False and hub.calls[2][1]["path_in_repo"] == "x.gguf"
    assert ModelCard(hub.calls[1][1]["path_or_fileobj"].decode()).data.library_name == "gguf"


@pytest.mark.parametrize("words, message", [
    (("--push", "mine"), "--push: expected OWNER/NAME, found 'mine'"),
    (("--public",), "--public: expected with --push"),
    (("--push", "me/mine", "--merge", "plain"), "expected a place to write to"),
    (("--push", "me/mine"), "but me/mine on the hub did not take it (no way there)"),
])  # fmt: skip
def test_uploads_that_do_not_go(words, message, run, hub, monkeypatch):
    monkeypatch.setattr(Hub, "refuses", "upload_folder")
    found = invoke("export", str(run[1]), *words)
    assert found.exit_code == 1 and message in " ".join(found.stderr.split())


def test_a_hub_id_is_named(run):
    card = ModelCard(model_card(run[1], "owner/name", "peft", "Words."))
    assert card.data.base_model == "owner/name" and "base_model:adapter:owner/name" in card.data.tags
    assert "[owner/name](https://huggingface.co/owner/name)" in card.content


def test_of_a_run_that_leaves_its_best_step_the_card_says_what_that_one_is(run, tmp_path):
    (tmp_path / "run.json").write_bytes((run[1] / "run.json").read_bytes())
    report = {"steps": 9, "first_loss": 4.0, "last_loss": 1.0, "evaluation": {"loss": 3.5, "perplexity": 33.0}}
    report["best"] = {"step": 5, "metric": "loss", "value": 2.25}
    (tmp_path / "report.json").write_text(json.dumps(report))
    card = model_card(tmp_path, "owner/name", "peft", "Words.")
    assert "`lora`, 5 of 9 steps, after which loss was best" in card and "| loss | 2.25 |" in card and "3.5 |" not in card
    assert "perplexity" not in card and "last loss" not in card
    (tmp_path / "report.json").write_text("[")
    (tmp_path / "config.yaml").write_bytes(b"data: [\xff")
    assert "- Data: not named (3 rows)\n- Method: `lora`, 2 steps" in model_card(tmp_path, "owner/name", "peft", "Words.")
