"""The configuration of a run: a YAML file or preset, flags or Python arguments, checked once with all errors together.

Relative paths inside a configuration file are relative to the current directory, not to the file.
Imports neither torch nor Transformers: a mistake is reported before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, TypeAdapter, ValidationError, create_model

from finetune.config.errors import ConfigError, explain
from finetune.config.function_names import word_for_function
from finetune.config.loading import (
    RUN_FILE,
    SHORTHANDS,
    assign,
    expand_shorthands,
    find_source,
    merge,
    parse_setting,
    read_yaml,
    without,
)
from finetune.config.other_names import with_own_names
from finetune.config.sections import SECTIONS
from finetune.config.unused_keys import unused_keys
from finetune.config.yaml_text import write_document
from finetune.data.options import Data, is_named, sources_in, with_splits
from finetune.memory.device_kinds import DEVICE_WORDS
from finetune.methods.registry import METHODS
from finetune.options import AbsoluteAmount, Amount, Conflict, Section, Switch, expand_path, show
from finetune.quantization.quantization_options import Quantize


def _check_output(path: Any) -> Any:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"expected a directory's path, found {show(path)}")
    return expand_path(path)


ModelName = Annotated[str, BeforeValidator(expand_path), Field(min_length=1)]


class _Rows(str):
    __repr__ = str.__str__


def _shown(data: Any) -> Any:
    """Rows are counted, not shown."""
    if is_named(data):
        return data
    if len(sources := sources_in(data)) > 1:
        return [_shown(one) for one in sources]
    return _Rows(f"<{len(data)} rows>" if hasattr(data, "__len__") else "<a stream of rows>")


class _Keys(Section):
    """The keys at the top level; `Config` has the sections too."""

    model: ModelName
    """A directory with config.json and safetensors files, a .gguf file, or a hub id."""
    data: Data = None
    """What is trained on: a file, a directory, a pattern of files, a hub data set, sample:NAME, in Python rows too; or
    some rows of a file, as in train.jsonl[:90%]; or a list of these, see `dataset.probabilities`."""
    eval_data: Data = None
    """What is evaluated on, named as `data`. None: nothing is, but by `finetune eval`."""
    method: Literal[*METHODS] = "lora"
    """How it is trained, and what of the model: see docs/methods.md."""
    quantize: Quantize = None
    """Goes over the model's linear layers in 4 or 8 bits, made once and kept in a cache; see `quantization`. A number: bits a
    weight on average, with scales, spread over the matrices by what each loses."""
    train: list[str] = []
    """Regular expressions: methods that train the model's own weights train only parameters whose names match one. Empty:
    all."""
    output: Annotated[Path, BeforeValidator(_check_output)] = Path("out")
    """Directory for everything that is written."""
    host_memory: Amount = None
    """Limit of the whole process. None: 95% of what the machine, or its cgroup, has available at the start."""
    device_memory: Amount = None
    """Limit on the accelerator. None: 90% of what is free there."""
    disk: Amount = None
    """Limit of everything that is written under `output`."""
    max_writes: AbsoluteAmount = None
    """Limit of what all steps and saves of the run write to disk, resumed ones too, such as 20TB: an SSD wears by what is
    written. A run that would write more is refused before its first step. None: no limit."""
    device: Literal[DEVICE_WORDS] = "auto"
    """Where blocks compute. auto: the accelerator if there is one."""
    machine: ModelName | None = None
    """For which machine a plan is made: a profile's file, or the name of one of the package. None: for this one."""
    resume: Switch = False
    """Continue from the state in `output`."""
    trace: Path | None = None
    """File that gets what the last step did when, and what was predicted of it, for Perfetto (ui.perfetto.dev)."""
    trust_remote_code: Switch = False
    """Whether code that comes with the model may run."""

    def conflicts(self) -> Iterator[Conflict]:
        for name in SECTIONS:
            yield from getattr(self, name).conflicts_with(self)
        if self.train and "train" not in METHODS[self.method].reads:
            yield Conflict(
                ("method", "train"),
                f"expected train only with methods that train the model's own weights, found {self.method}",
            )

    _renamed: list[str] = PrivateAttr(default_factory=list)

    def __init__(self, **values: Any) -> None:
        values, renamed, contradictions = with_own_names(values)
        values = with_splits(expand_shorthands(values))
        if "method" not in values and (values.get("adapter") or {}):
            values["method"] = "adapter"
        problems: dict[str, str] = {}
        for key in sorted(SHORTHANDS.keys() & values.keys()):
            value = values.pop(key)
            full = f"{SHORTHANDS[key]}.{key}"
            other = values[SHORTHANDS[key]]
            other = other[key] if isinstance(other, Mapping) else other
            problems[key] = f"{key}: found {show(value)}, but {full} is {show(other)}: give one of them"
        try:
            super().__init__(**values)
        except ValidationError as error:
            wrong = explain(error, SECTIONS, KEYS)
            problems |= wrong
            try:  # what is right may still not go together
                super().__init__(**without(values, wrong))
            except ValidationError:  # what is wrong could not be taken out
                raise ConfigError([*contradictions, *problems.values()]) from None
        found = [*contradictions, *problems.values(), *_all_conflicts(self, problems.keys())]
        if found:
            raise ConfigError(found)
        self._renamed += renamed

    @property
    def renamed(self) -> list[str]:
        """Which keys were given by the names of others, in words."""
        return list(self._renamed)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Rows are counted, not shown."""
        for key, value in super().__repr_args__():
            yield key, _shown(value) if key in ("data", "eval_data") else value

    @property
    def learning_rate(self) -> float:
        """`training.learning_rate`, or what suits the method."""
        rate = self.training.learning_rate
        return METHODS[self.method].learning_rate(self) if rate is None else rate

    @property
    def objective(self) -> Any:
        """The word for what a step makes small, or a function: see `finetune.objectives`."""
        return self.zo.objective if "zo" in METHODS[self.method].reads else self.training.objective

    @property
    def adapter_kind(self) -> str | None:
        """The kind of adapter that is trained, one of `ADAPTERS`; None: the model's own weights are."""
        return METHODS[self.method].adapter(self)

    @property
    def variants(self) -> int:
        """Versions of the weights that one step computes."""
        return self.zo.variants if "zo" in METHODS[self.method].reads else 1

    @classmethod
    def load(
        cls,
        source: str | os.PathLike | None = None,
        overrides: Mapping[str, Any] | None = None,
        settings: Sequence[str] = (),
    ) -> Config:
        """The configuration in a YAML file or preset, or of a run, with changes on top.

        `source`: a path, a run's directory, or a preset's name where nothing has that path. `overrides`: keys to values; a key
        may be dotted (`training.max_steps`) or a shorthand. `settings`: "key=value" words, the value as
        `finetune.config.yaml_text.read_word` has it; they come last.

        Raises ConfigError.
        """
        if source is None:
            return cls.of_values({}, "the configuration", overrides, settings)
        path = find_source(os.fspath(source))
        values = read_yaml(path)
        if "sweep" in values:
            raise ConfigError(["sweep: expected one run, found those of a sweep: use `finetune sweep`"], str(path))
        if path.name == RUN_FILE and path.parent == Path(source).expanduser():  # which may have been moved
            values["output"] = os.fspath(source)
        return cls.of_values(values, str(path), overrides, settings)

    @classmethod
    def of_values(
        cls, values: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
    ) -> Config:
        """As `load`, with what a file says given as values. origin: what messages call it."""
        changes: dict[str, Any] = {}
        for key, value in (overrides or {}).items():
            assign(changes, key, value)
        problems = []
        for setting in settings:
            try:
                assign(changes, *parse_setting(setting, _takes))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError(problems, "--set")
        try:
            return cls(**merge(expand_shorthands(values), expand_shorthands(changes)))
        except ConfigError as error:
            raise ConfigError(error.problems, origin) from None

    def to_yaml(self) -> str:
        """All keys with their values, such that `load` gives an equal configuration back.

        Data given as a Python object has no place in a file: its key is null, and a comment says so.
        """
        values = self.model_dump()
        comments = ""
        if callable(self.zo.objective):
            comments += "# zo.objective was a Python function\n"
            values["zo"]["objective"] = "loss"
        if any(map(callable, self.grpo.reward_funcs)):
            comments += "# grpo.reward_funcs had Python functions\n"
            values["grpo"]["reward_funcs"] = [
                word_for_function(word) if callable(word) else word for word in self.grpo.reward_funcs
            ]
        if callable(self.training.compute_metrics):
            comments += "# training.compute_metrics was a Python function\n"
            values["training"]["compute_metrics"] = None
        for key in ("data", "eval_data"):
            if not is_named(values[key]):
                comments += f"# {key} was a Python object ({type(values[key]).__name__})\n"
                values[key] = None
        return comments + write_document(values)


_Sections = create_model("_Sections", __base__=_Keys, **{name: (kind, kind()) for name, kind in SECTIONS.items()})


class Config(_Sections):
    """What to train, on what, within which limits. Frozen; every key is checked when it is made.

    The everyday keys of `SHORTHANDS` are also taken at the top level: `Config(model=..., max_steps=10)`.
    Byte amounts are words of `finetune.memory.units.parse_bytes`.

    Raises ConfigError, with all problems in one message.
    """


KEYS = [key for key in Config.model_fields if key not in SECTIONS]
KEYS += [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def parse_word(key: str, text: str) -> Any:
    """The value of a word for a key, as in "key=text". Raises ValueError."""
    return parse_setting(f"{key}={text}", _takes)[1]


def _takes(key: str, value: Any) -> bool:
    """Whether dotted `key`, where there is such a one, can have this value."""
    section, _, name = key.rpartition(".")
    holder = SECTIONS.get(section) if section else Config
    field = holder.model_fields.get(name) if holder else None
    if field is None:
        return True
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError:
        return False
    return True


def _all_conflicts(config: Config, wrong: Collection[str]) -> Iterator[str]:
    """A line for each, but for those that keys which are wrong by themselves take part in."""
    for name in SECTIONS:
        for conflict in getattr(config, name).conflicts():
            if not wrong & {name, *(f"{name}.{key}" for key in conflict.keys)}:
                yield f"{name}: {conflict.problem}"
    found = [("the keys together", conflict) for conflict in config.conflicts()]
    found += [(conflict.keys[0], conflict) for conflict in unused_keys(config)]
    for subject, conflict in found:
        if not wrong & {part for key in conflict.keys for part in (key, key.partition(".")[0])}:
            yield f"{subject}: {conflict.problem}"
