"""Lean imports, in processes of their own: what is saved, that training gives the same bits, and that the way back is
open."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from text_models import write_model

ROOT = Path(__file__).parent.parent

HEAVY = """
print(*(name for name in ("torch._dynamo", "sympy", "torch.distributed.tensor", "torch._inductor")
        if type(sys.modules.get(name)).__name__ == "module"))
"""
TRAIN = """
import contextlib, sys
import torch
from finetune.memory.meter import host_bytes
from finetune.memory.lean_imports import lean_imports
before = host_bytes()
with lean_imports() if LEAN else contextlib.nullcontext():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
torch.set_num_threads(1)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
lora = LoraConfig(r=4, target_modules="all-linear")
model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)), lora)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
block = model.base_model.model.model.layers[0]
for step in range(4):
    tokens = torch.randint(0, 61, (2, 13))
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False).loss.backward()
    hidden = torch.randn(1, 7, 32, requires_grad=True)  # the engine's way: a block alone, with explicit gradients
    embeddings = model.base_model.model.model.rotary_emb(hidden, torch.arange(7)[None])
    torch.autograd.backward(block(hidden, position_embeddings=embeddings), torch.ones(1, 7, 32))
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step(); schedule.step(); optimizer.zero_grad()
with torch.device("meta"):
    skeleton = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4))
print(host_bytes() - before, *(p.double().sum().item().hex() for p in trained))
""" + HEAVY
STREAMED = """
import sys
from finetune.cli import app
app(ARGUMENTS, standalone_mode=False)
""" + HEAVY


def run(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@cache
def trained(lean: bool) -> tuple[int, list[str], str]:
    figures, heavy = run(f"LEAN = {lean}\n" + TRAIN)
    grown_bytes, *sums = figures.split()
    return int(grown_bytes), sums, heavy


def test_training_gives_the_same_bits() -> None:
    assert len(trained(True)[1]) == 28  # two matrices for each of seven projections in two blocks
    assert trained(True)[1] == trained(False)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured on Linux")
def test_what_is_saved() -> None:
    assert trained(False)[0] - trained(True)[0] > 30 << 20


def test_heavy_modules_stay_out_of_a_whole_training_run() -> None:
    assert trained(True)[2] == ""


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_heavy_modules_stay_out_of_a_whole_streamed_run(device, tmp_path: Path) -> None:
    """Where products are deferred, too."""
    model, data = write_model("llama", tmp_path / "model"), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"the quick brown fox {n}"}) + "\n" for n in range(8)))
    command = ["run", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--device", device]
    command += ["--max-steps", "2", "--batch-size", "2", "--micro-batch-size", "1", "--host-memory", "2GiB"]
    assert run(f"ARGUMENTS = {command}" + STREAMED)[-1] == ""
    assert (tmp_path / "out" / "adapter").exists()


@pytest.mark.slow
def test_the_real_compiler_comes_when_asked_for() -> None:
    run("""
import torch
from finetune.memory.lean_imports import lean_imports
is_available = torch.distributed.is_available
try:
    with lean_imports():
        from transformers import LlamaForCausalLM
        assert not torch.distributed.is_available()
        raise KeyError
except KeyError:
    pass
assert torch.distributed.is_available is is_available

from torch.fx.experimental import symbolic_shapes
assert type(symbolic_shapes).__name__ == "_StandIn"
assert symbolic_shapes.sym_eq((2, 3), torch.Size([2, 3])) and not symbolic_shapes.sym_eq((2, 3), (2, 3, 1))
assert symbolic_shapes.guard_or_true(False) is False and symbolic_shapes.guard_or_false(True) is True
import sympy as early
assert type(early).__name__ == "_StandIn"
assert (torch.ones(3, device="meta") * 2 + 1).shape == (3,)
weight = torch.ones(3, requires_grad=True)
try:
    (weight * 2).backward(torch.ones(4))
except RuntimeError as error:
    assert "Mismatch in shape" in str(error), error
else:
    raise AssertionError("a gradient of another shape was taken")

compiled = torch.compile(lambda x: (x * 2).relu() + 1, backend="eager", dynamic=True)
for size in (3, 5):
    assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 3.0))
import sys
import torch._dynamo.utils
assert type(sys.modules["torch._dynamo"]).__name__ == "module" and torch._dynamo is sys.modules["torch._dynamo"]
from torch._dynamo import config, graph_break
from torch.fx.experimental.symbolic_shapes import ShapeEnv
import sympy
from sympy import Basic, Symbol
assert early.Basic is sympy.Basic is Basic and isinstance(Symbol("x"), Basic)
assert ShapeEnv().__class__.__module__ == "torch.fx.experimental.symbolic_shapes"
""")


def test_nothing_changes_where_all_was_imported_before() -> None:
    run("""
import torch, torch._dynamo, sys
real = torch._dynamo
from finetune.memory.lean_imports import lean_imports
with lean_imports():
    import torch._dynamo
assert torch._dynamo is real is sys.modules["torch._dynamo"]
""")


def test_the_models_of_transformers_are_those_of_its_own_scan() -> None:
    run("""
from finetune.memory.lean_imports import lean_imports
with lean_imports():
    import transformers.models
from transformers.utils.import_utils import create_import_structure_from_path, define_import_structure
import transformers.models.llama
own = define_import_structure(transformers.models.__file__)
names = {name for modules in own.values() for module, found in modules.items() for name in (module.split(".")[0], *found)}
assert len(names) > 1000 and names <= set(dir(transformers.models)), names - set(dir(transformers.models))
from transformers.models import LlamaConfig, llama
assert llama is transformers.models.llama and LlamaConfig is transformers.LlamaConfig
""")


def test_bitsandbytes_is_not_imported_and_can_be_afterwards(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("imported = True\n")
    run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from finetune.memory.lean_imports import lean_imports
with lean_imports():
    from transformers import LlamaConfig, LlamaForCausalLM
    from peft import LoraConfig, get_peft_model
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)), LoraConfig(r=4, target_modules="all-linear"))
assert "bitsandbytes" not in sys.modules
import bitsandbytes
assert bitsandbytes.imported
""")
