"""Before anything imports Triton: its kernels are interpreted where there is no device for them."""

import gc
import os
from collections import Counter
from collections.abc import Iterator

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


@pytest.hookimpl(tryfirst=True)  # before what is not slow is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen = Counter()
    for item in items:
        if every := item.get_closest_marker("every"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % every.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
