"""Before anything imports Triton: its kernels are interpreted where there is no device for them."""

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """A run collects garbage several times, which takes as long as there are objects: those of libraries are left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick_prediction(request, monkeypatch) -> None:
    """Runs are predicted from products alone: timing visits and the disk takes longer than many a run here. Tests with the mark
    `timed` see the real thing."""
    if request.node.get_closest_marker("timed") is None:
        monkeypatch.setattr("finetune.prediction.MOST_SECONDS", 0.0)
        monkeypatch.setattr("finetune.prediction.write_rate", lambda directory: 1e9)


@pytest.fixture
def quick_data(monkeypatch) -> None:
    """Tokens are made in this process."""
    from data_tools import prepare_in_this_process

    prepare_in_this_process(monkeypatch)


@pytest.fixture
def compiled() -> Callable[[str], str]:
    """Runs code that compiles Triton kernels, which this process may only interpret; gives what it prints."""

    def run(code: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        root = Path(__file__).parent.parent
        result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run


@pytest.hookimpl(tryfirst=True)  # before what is not slow is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen = Counter()
    for item in items:
        if every := item.get_closest_marker("every"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % every.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
