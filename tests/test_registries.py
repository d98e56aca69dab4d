"""What a registry names is there, and can be listed without loading torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.adapters.registry import ADAPTERS
from finetune.methods.registry import METHODS


def test_methods_are_listed_without_torch():
    code = "import sys, finetune.methods.registry; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_loaded(name):
    assert METHODS[name].load().step


def test_a_kind_of_adapter_with_a_rate_for_gradients_is_a_method():
    assert {name for name, entry in ADAPTERS.items() if entry.gradient_rate is not None} == {"lora"} <= METHODS.keys()
