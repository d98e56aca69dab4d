from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_models, also where this folder is run alone

import pytest
import torch
from tiny_models import CONFIGS, image_rows, save_tiny, token_data

import finetune.offload.step.activations
import finetune.one_run
from finetune.data import TokenDataset


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """Folder of the tiny checkpoint of a name and stored dtype, made once for each configuration that tests give the name."""
    made: dict[tuple[str, torch.dtype, str], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        key = name, dtype, CONFIGS[name]().to_json_string(use_diff=False)
        if key not in made:
            made[key] = save_tiny(name, tmp_path_factory.mktemp(name), dtype)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> TokenDataset:
    return token_data(tmp_path_factory.mktemp("tokens") / "cache")


@pytest.fixture(scope="session")
def images() -> list[dict[str, torch.Tensor]]:
    return image_rows()


@pytest.fixture(autouse=True)
def quick_data(monkeypatch) -> None:
    """A TokenDataset given as data is used as it is: making one takes a process, and other tests hold that."""
    prepare = finetune.one_run.prepare_for
    monkeypatch.setattr(
        finetune.one_run,
        "prepare_for",
        lambda config, source, *to, **options: (
            source if isinstance(source, TokenDataset) else prepare(config, source, *to, **options)
        ),
    )


@pytest.fixture(autouse=True)
def planned_once(monkeypatch) -> None:
    """Tokens that are there need no plan before they are made; other tests hold what that refuses."""
    monkeypatch.setattr(finetune.one_run, "_refuse_all_rows", lambda config, session: None)


@pytest.fixture
def spill_everything(monkeypatch) -> None:
    """The tiny models' block inputs are below what is worth a disk request."""
    monkeypatch.setattr(finetune.offload.step.activations, "SPILL_MIN_BYTES", 1)
