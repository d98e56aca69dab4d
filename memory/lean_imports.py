"""Imports Transformers and PEFT without torch's compiler, symbolic shapes, distributed tensors and without bitsandbytes, unused
in a streamed run.

They cost some 75 MB of anonymous memory and half of the import time (torch 2.13, Transformers 5.23), for decorators
that do nothing unless something is compiled, checks of sizes that are plain numbers, and a class of which there are no
instances.

- `torch.distributed.is_available` answers False while the block lasts. Transformers and PEFT then take the path they
  have for builds of torch without it, and keep that answer.
- `bitsandbytes`, which PEFT imports for layers of its own wherever it is installed (another 120 MB), is not to be found
  while the block lasts. PEFT keeps that answer.
- `torch._dynamo`, `torch.fx.experimental.symbolic_shapes` and `sympy` become stand-ins that answer what eager code and
  meta tensors ask of them and turn into the real modules when anything else is asked, so `torch.compile` still works
  afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import operator
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

_DYNAMO = "torch._dynamo"
_SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
_SYMPY = "sympy"
_BITSANDBYTES = "bitsandbytes"
# Transformers' masking takes one class from here; the module itself needs nothing of the compiler.
_INDEPENDENT_SUBMODULE = "torch._dynamo._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, `import transformers` and `import peft` cost less memory and time.

    Has effect only on what was not imported before. What is imported inside is without distributed training and without
    PEFT's layers over those of bitsandbytes for the life of the process; `torch.compile` works, but functions that were
    marked for the compiler inside (`disable`, `allow_in_graph`) are ordinary ones to it.
    """
    import torch

    if not {_DYNAMO, _SYMBOLIC_SHAPES, _SYMPY} & sys.modules.keys():
        _stand_in(_SYMPY, _sympy_answers)
        _stand_in(_SYMBOLIC_SHAPES, _symbolic_answers)
        _stand_in(_DYNAMO, _dynamo_answers)
        _import_without_package(_INDEPENDENT_SUBMODULE, Path(torch.__file__).parent.parent)
    was_available, collects = torch.distributed.is_available, gc.isenabled()
    torch.distributed.is_available = lambda: False
    hides_bitsandbytes = _BITSANDBYTES not in sys.modules
    if hides_bitsandbytes:
        sys.modules[_BITSANDBYTES] = None  # what `importlib.util.find_spec` takes for not installed
    gc.disable()  # what is imported stays, and every search for garbage would look at all of it
    try:
        _import_models_in_one_scan()
        yield
    finally:
        torch.distributed.is_available = was_available
        if hides_bitsandbytes:
            if "peft.import_utils" in sys.modules:
                sys.modules["peft.import_utils"].is_bnb_available()  # asks once in the life of the process
            del sys.modules[_BITSANDBYTES]
        if collects:
            gc.enable()


class _StandIn(types.ModuleType):
    """A module of torch until something asks for more than the few functions put here."""

    def __getattr__(self, name: str) -> object:
        # The import system asks a package for __path__ when it imports a submodule: the real package must come first
        # then.
        if name.startswith("__") and not (name == "__path__" and self.__name__ != _SYMBOLIC_SHAPES):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_real(self), name)


def _stand_in(name: str, answers: Callable[[_StandIn], dict[str, Callable | type]]) -> None:
    module = _StandIn(name)
    module.__spec__ = importlib.util.find_spec(name)
    module.answers = answers(module)
    vars(module).update(module.answers)
    _put(name, module)


def _real(stand_in: _StandIn) -> types.ModuleType:
    name = stand_in.__name__
    if sys.modules.get(name) is stand_in:
        del sys.modules[name]
        try:
            importlib.import_module(name)  # also sets the parent's attribute
        except BaseException:
            _put(name, stand_in)
            raise
        for answer in stand_in.answers:  # who still holds the stand-in gets the real thing from now on
            delattr(stand_in, answer)
    return sys.modules[name]


def _put(name: str, module: types.ModuleType) -> None:
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(importlib.import_module(parent), child, module)
    sys.modules[name] = module


def _dynamo_answers(_: _StandIn) -> dict[str, Callable]:
    """The compiler's markers, as they are to code that is not being compiled."""

    def disable(fn: Callable | None = None, recursive: bool = True, **options: object) -> Callable:
        return fn if fn is not None else lambda decorated: decorated

    def mark(fn: Callable) -> Callable:
        return fn

    def graph_break(msg: str = "") -> None:
        pass

    return {"disable": disable, "assume_constant_result": mark, "allow_in_graph": mark, "graph_break": graph_break}


def _symbolic_answers(module: _StandIn) -> dict[str, Callable]:
    """What these functions answer for plain booleans and sizes; anything symbolic goes to the real function."""

    def plainly(name: str, answer: Callable) -> Callable:
        def of_plain(*values: object, **options: object) -> object:
            if all(type(value) in (bool, int) for value in values):
                return answer(*values)
            return getattr(_real(module), name)(*values, **options)

        return of_plain

    def sym_eq(x: object, y: object) -> object:
        plain = all(isinstance(size, (tuple, list)) and all(type(n) is int for n in size) for size in (x, y))
        return tuple(x) == tuple(y) if plain else _real(module).sym_eq(x, y)

    itself = (
        "expect_true",
        "guard_or_false",
        "guard_or_true",
        "guard_size_oblivious",
        "guarding_hint_or_throw",
        "statically_known_true",
    )
    answers = {name: plainly(name, lambda value, *_: value) for name in itself}
    answers["is_nested_int"] = plainly("is_nested_int", lambda value: False)
    answers["has_guarding_hint"] = plainly("has_guarding_hint", lambda value: True)
    answers["sym_or"] = plainly("sym_or", lambda *values: functools.reduce(operator.or_, values))
    answers["sym_and"] = plainly("sym_and", lambda *values: functools.reduce(operator.and_, values))
    return answers | {"sym_eq": sym_eq}


def _sympy_answers(_: _StandIn) -> dict[str, type]:
    """`isinstance(x, sympy.Basic)`, what meta tensors ask: no instance can exist before the real sympy does."""
    return {"Basic": type("Basic", (), {"__slots__": ()})}


def _import_models_in_one_scan() -> None:
    """`transformers` reads all files of its models for the names in them; `transformers.models` would read them again, for its
    cache is too small for so many. Saves a quarter of a second."""
    import transformers
    from transformers.utils import import_utils

    folder, scan = Path(transformers.__file__).parent / "models", import_utils.define_import_structure

    def found_before(module_path: str, prefix: str | None = None) -> dict[frozenset[str], dict[str, set[str]]]:
        if prefix is not None or Path(module_path) != folder / "__init__.py":
            return scan(module_path, prefix)
        found = scan(folder, prefix="models")  # as `transformers` has called it: from its cache
        return {
            backends: {name.removeprefix("models."): exports for name, exports in names.items() if name.startswith("models.")}
            for backends, names in found.items()
        }

    import_utils.define_import_structure = found_before
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = scan


def _import_without_package(name: str, folder: Path) -> None:
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    if not path.exists():  # another version of torch: whoever asks for it gets the real package
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
