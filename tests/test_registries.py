"""What a registry names is there, and can be listed without loading torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.adapters.base import Adapter
from finetune.adapters.registry import ADAPTERS
from finetune.methods.registry import METHODS
from finetune.offload.update.rules import OPTIMIZERS, SUBSPACES
from finetune.offload.update.rules.rule import DirectionRule, Rule
from finetune.plugin import load


@pytest.mark.parametrize("registry", ["finetune.methods.registry", "finetune.offload.update.rules"])
def test_what_there_is_is_listed_without_torch(registry):
    code = f"import sys, {registry}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_loaded(name):
    assert METHODS[name].load().step


def test_a_kind_of_adapter_with_a_rate_for_gradients_is_a_method():
    kinds = {name for name, entry in ADAPTERS.items() if entry.gradient_rate is not None}
    assert kinds == {"lora", "adapter"} <= METHODS.keys()


@pytest.mark.parametrize("rule", [*OPTIMIZERS.values(), *SUBSPACES.values()])
def test_rules_know_their_kernel_and_their_state(rule: type[Rule]):
    """Each has a kernel of the extension; only rules without state of elements look at whole matrices."""
    from finetune_native import optimizer

    assert rule.kernel in optimizer.Rule.__members__ and set(rule.states) <= {"first", "second"}
    assert rule.has_directions == issubclass(rule, DirectionRule) == (not rule.states)
    assert rule(weight_decay=0.1).scalars(0.5, 1).step < 0


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_can_be_loaded(name):
    assert issubclass(load(ADAPTERS[name].code), Adapter)


def test_a_kind_of_adapter_needs_no_torch_for_its_options():
    code = "import sys, finetune.adapters.base; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
