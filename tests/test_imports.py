"""The house's one-way imports and its ban on formats that run code when read, held by the source itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_NOT_IMPORT = {"memory": {"finetune.offload", "finetune"}, "offload": {"finetune"}, "finetune": set()}
NOT_INSTALLED = {"offload", "memory"}
"""Names that only a checkout has: what is imported is `finetune.offload` and `finetune.memory`."""
NATIVE_IMPORTERS = {
    "offload/residency/io.py", "memory/arena.py", "memory/tensor_file.py",
    "offload/noise/noise.py", "offload/update/kernels.py",
    "offload/weights/formats/native_kernels.py", "offload/quantize/kernels.py",
    "offload/step/rms_norm.py",
    "offload/step/scaled_sum.py",
    "offload/weights/formats/lossless_code.py",
}  # fmt: skip
SOURCES = sorted(path for package in MAY_NOT_IMPORT for path in (ROOT / package).rglob("*.py"))


def root(module: str) -> str:
    """The first name, or the first two of `finetune.offload` and `finetune.memory`."""
    first, second = (*module.split("."), "")[:2]
    return f"{first}.{second}" if first == "finetune" and second in NOT_INSTALLED else first


def imported_roots(source: str) -> set[str]:
    """Roots of everything that `source` imports: by statement anywhere in it, or by `import_module("name")`."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {root(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots |= {root(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                roots.add(root(node.args[0].value))
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
    return [name for name in found if name.startswith("finetune.") and root(name) == "finetune"]


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
    assert not roots & (MAY_NOT_IMPORT[path.relative_to(ROOT).parts[0]] | NOT_INSTALLED)
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert unpickling_calls(source) == []
    if "finetune_native" in roots:
        assert named(path) in NATIVE_IMPORTERS


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=named)
def test_tests_import_what_is_installed(path):
    """A module that is imported under two names is there twice."""
    assert not imported_roots(path.read_text()) & NOT_INSTALLED


def test_a_user_may_have_such_names_beside_a_script(tmp_path):
    """Folders and scripts of the user's, under the names that the repository and its rooms have."""
    for name in ("memory/__init__.py", "offload.py", "data.py", "config/__init__.py", "methods.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("owner = 'the user'")
    (tmp_path / "script.py").write_text(
        "import config, data, memory, methods, offload\n"
        "import finetune.cli, finetune.config\n"
        "from finetune.memory.units import parse_bytes\n"
        "from finetune.offload.update import rules\n"
        "print({module.owner for module in (config, data, memory, methods, offload)}, parse_bytes('1KiB'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for words in (["script.py"], ["-m", "finetune", "presets"]):
        result = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        assert words[0] == "-m" or result.stdout == "{'the user'} 1024\n"


def test_a_wheel_has_one_name_beside_the_native_module():
    """Folders of the repository, and where the build backend puts them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert settings["wheel"]["packages"] == {"finetune": "finetune"} | {f"finetune/{name}": name for name in NOT_INSTALLED}


@pytest.mark.parametrize("path", [path for path in SOURCES if named(path).startswith("finetune/")], ids=named)
def test_rooms_of_finetune_import_downwards(path):
    module = named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    above = [name for name in rooms_imported(path.read_text()) if height(name) > height(module)]
    assert not above


def test_the_walk_finds_each_way_to_break_the_rules():
    assert imported_roots("def f():\n    import finetune.offload.residency.io as o\n    from finetune.cli import main") == {
        "finetune.offload", "finetune",
    }  # fmt: skip
    assert imported_roots("from finetune import memory\nfrom offload.step import engine") == {"finetune.memory", "offload"}
    assert imported_roots("import importlib\nimportlib.import_module('finetune.cli')") == {"importlib", "finetune"}
    assert imported_roots("__import__('pickle')") == {"pickle"}
    assert imported_roots("from . import base") == set()
    assert unpickling_calls("import torch as t\nt.load('x')") == [2]
    assert unpickling_calls("from torch import load as read\n\nread('x')") == [3]
    assert unpickling_calls("np.load('x', allow_pickle=True)\nnp.load('x', allow_pickle=False)") == [1]
    assert unpickling_calls("import json\njson.load(f)") == []
