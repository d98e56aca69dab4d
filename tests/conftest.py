"""Before anything imports Triton: its kernels are interpreted where there is no device for them."""

import gc
import os
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
