"""The house's one-way imports and its ban on formats that run code when read, held by the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_NOT_IMPORT = {"memory": {"offload", "finetune"}, "offload": {"finetune"}, "finetune": set()}
NATIVE_IMPORTERS = {
    "offload/residency/io.py", "memory/arena.py", "memory/tensor_file.py",
    "offload/noise/noise.py", "offload/update/kernels.py",
    "offload/weights/formats/native_kernels.py", "offload/quantize/kernels.py",
    "offload/step/scaled_sum.py",
    "offload/weights/formats/lossless_code.py",
}  # fmt: skip
SOURCES = sorted(path for package in MAY_NOT_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported_roots(source: str) -> set[str]:
    """First names of everything that `source` imports: by statement anywhere in it, or by `import_module("name")`."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                roots.add(node.args[0].value.split(".")[0])
    return roots


ROOMS = [
    {"peft_tuners"},
    {"adapters", "config", "data", "machines", "reporting"},
    {"runs"},
    {"quantization"},
    {"needs_of_model", "planned_run", "planner", "prediction", "session", "setup"},
    {"decoding"},
    {"objectives"},
    {"methods"},
    {"micro_batch_choice", "nearest_plans", "sequence_chunk_choice"},
    {"training"},
    {
        "bench", "chat", "combine", "compress", "doctor", "evaluate", "export", "generate", "gguf_adapter", "gguf_export",
        "merge", "push", "questions",
    },  # fmt: skip
    {"one_run", "trainer"},
    {"sweep", "sweeps"},
    {"cli", "cli_export", "cli_messages", "demo"},
]
"""Of `finetune`, from low to high: a room imports those on its own line and the ones before it."""


def height(module: str) -> int:
    """Index into ROOMS + 1. 0: registries and options, which need no torch and import one another alone."""
    _, room, *inside = module.split(".") if "." in module else (module, "")
    name = inside[-1] if inside else room
    is_form = inside[:1] == ["forms"] and len(inside) == 1
    if is_form or name in ("plugin", "registry") or name.split("_")[-1] == "options":
        return 0
    return next((i for i, rooms in enumerate(ROOMS, start=1) if room in rooms), len(ROOMS) + 1)


def rooms_imported(source: str) -> list[str]:
    """Modules of `finetune` that running `source` imports; what is there for type checkers alone does not count."""
    tree = ast.parse(source)
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unseen = {id(inner) for one in checked for inner in ast.walk(one)}
    found = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and id(n) not in unseen]
    return [name for name in found if name.startswith("finetune.")]


def unpickling_calls(source: str) -> list[int]:
    """Lines that call `torch.load`, under whatever name, or pass an `allow_pickle` that is not False."""
    tree = ast.parse(source)
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "torch"}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            functions |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            (
                isinstance(node.func, ast.Attribute)
                and node.func.attr == "load"
                and ast.unparse(node.func.value) in modules
            )
            or (isinstance(node.func, ast.Name) and node.func.id in functions)
            or any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
        )
    ]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_package_has_sources():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_NOT_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_go_one_way_and_nothing_unpickles(path):
    source = path.read_text()
    roots = imported_roots(source)
    assert not roots & MAY_NOT_IMPORT[path.relative_to(ROOT).parts[0]]
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert unpickling_calls(source) == []
    if "finetune_native" in roots:
        assert named(path) in NATIVE_IMPORTERS


@pytest.mark.parametrize("path", [path for path in SOURCES if named(path).startswith("finetune/")], ids=named)
def test_rooms_of_finetune_import_downwards(path):
    module = named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    above = [name for name in rooms_imported(path.read_text()) if height(name) > height(module)]
    assert not above


def test_the_walk_finds_each_way_to_break_the_rules():
    assert imported_roots("def f():\n    import offload.residency.io as o\n    from finetune.cli import main") == {
        "offload",
        "finetune",
    }
    assert imported_roots("import importlib\nimportlib.import_module('finetune.cli')") == {"importlib", "finetune"}
    assert imported_roots("__import__('pickle')") == {"pickle"}
    assert imported_roots("from . import base") == set()
    assert unpickling_calls("import torch as t\nt.load('x')") == [2]
    assert unpickling_calls("from torch import load as read\n\nread('x')") == [3]
    assert unpickling_calls("np.load('x', allow_pickle=True)\nnp.load('x', allow_pickle=False)") == [1]
    assert unpickling_calls("import json\njson.load(f)") == []
