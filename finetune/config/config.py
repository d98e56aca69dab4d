"""The configuration of a run: a YAML file or preset, flags or Python arguments, checked once with all errors together.

Relative paths inside a configuration file are relative to the current directory, not to the file.
Imports neither torch nor Transformers: a mistake is reported before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from finetune.config.errors import ConfigError, explain
from finetune.config.presets import find_preset, preset_names
from finetune.config.schedule_options import argument_problems, length_problem, rate_problem, warmup_steps
from finetune.config.unused_keys import WEIGHT_METHODS, unused_keys
from finetune.config.yaml_text import read_document, read_word, write_document
from finetune.objectives.registry import check_objective, find_objective
from finetune.options import (
    Amount,
    Conflict,
    Count,
    CountOrZero,
    NonNegative,
    Number,
    Positive,
    Section,
    Share,
    Switch,
    expand_path,
    show,
)
from memory.device_kinds import DEVICE_WORDS

SAMPLES = Path(__file__).parent.parent / "samples"

# Everyday keys that may stand at the top level, as they do on the command line.
SHORTHANDS = {
    "max_steps": "training",
    "epochs": "training",
    "batch_size": "training",
    "micro_batch_size": "training",
    "learning_rate": "training",
    "seed": "training",
    "sequence_length": "dataset",
}


def _check_output(path: Any) -> Any:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"expected a directory's path, found {show(path)}")
    return expand_path(path)


def _check_data(data: Any) -> Any:
    if data is None or isinstance(data, (str, os.PathLike)):
        data = expand_path(data)
        return _sample_path(data.removeprefix("sample:")) if data and data.startswith("sample:") else data
    if isinstance(data, Mapping) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(f"expected a path, a hub id or a sequence of rows, found {show(data)}")
    if isinstance(data, (list, tuple)) and data and all(isinstance(one, (str, os.PathLike)) for one in data):
        raise ValueError(f"expected one path (a folder or a glob for several files) or rows, found names {show(data)}")
    return data


def _sample_path(name: str) -> str:
    names = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
    if name not in names:
        raise ValueError(f"expected one of the samples shipped here ({', '.join(names)}), found {name!r}")
    return str(SAMPLES / f"{name}.jsonl")


ModelName = Annotated[str, BeforeValidator(expand_path), Field(min_length=1)]
Data = Annotated[Any, BeforeValidator(_check_data)]


class TrainingOptions(Section):
    """One step is one optimizer update over `batch_size` rows, in micro-batches of at most `micro_batch_size` rows."""

    max_steps: Count | None = None
    """Stops after this many steps; None: after `epochs`."""
    epochs: Positive = 1.0
    batch_size: Count = 8
    micro_batch_size: Count = 1
    learning_rate: NonNegative | None = None
    """None: what suits the method, see `Config.learning_rate`."""
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """A name of `transformers.SchedulerType`; those that need an evaluation result every step are left out."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """`scheduler_specific_kwargs` of `transformers.get_scheduler`, such as `min_lr`; see `finetune.config.schedule_options`."""
    warmup_steps: CountOrZero = 0
    warmup_ratio: Share = 0.0
    """Share of all steps, rounded up; an alternative to `warmup_steps`."""
    weight_decay: NonNegative = 0.0
    decay_norms_and_biases: Switch = False
    """Whether weight decay is for all parameters; else norms and biases are left alone, as in Transformers' Trainer. Method zo
    decays all: its journal has one factor a step. Runs that began before there was a choice have decayed all."""
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NonNegative | None = 1.0
    """0 or None: gradients are not clipped."""
    seed: Annotated[CountOrZero, Field(lt=1 << 64)] = 42
    eval_steps: Count | None = None
    """Evaluates every so many steps; None: only at the end."""
    save_steps: Count = 50
    """How often the state is committed from which `resume` goes on; Ctrl-C commits too."""
    report_to: list[Literal["tensorboard"]] = []

    def conflicts(self) -> Iterator[Conflict]:
        if self.warmup_steps and self.warmup_ratio:
            yield Conflict(
                ("warmup_steps", "warmup_ratio"),
                f"expected warmup_steps or warmup_ratio, found both ({self.warmup_steps} and {self.warmup_ratio})",
            )
        schedule, arguments = self.lr_scheduler, self.lr_scheduler_kwargs
        problems = list(argument_problems(schedule, arguments))
        for problem in problems:
            yield Conflict(("lr_scheduler", "lr_scheduler_kwargs"), problem)
        if self.max_steps and not problems:
            warmup = warmup_steps(self.warmup_steps, self.warmup_ratio, self.max_steps)
            if problem := length_problem(schedule, arguments, warmup, self.max_steps):
                yield Conflict(("max_steps", "lr_scheduler", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"), problem)


class DatasetOptions(Section):
    """How rows become tokens."""

    form: Literal["auto", "messages", "prompt_completion", "alpaca", "text", "input_ids"] = "auto"
    sequence_length: Count = 1024
    """Tokens a row at most."""
    packing: Switch = False
    """Fill rows with several examples; attention stays within each example."""
    completion_only: Switch = True
    """Loss on completions and assistant turns only."""
    append_eos: Switch | None = None
    """None: as is usual for the form."""
    chat_template: str | None = None
    """A path or the template itself; None: the tokenizer's own."""


class LoraOptions(Section):
    """`peft.LoraConfig` under shorter names; what is not named here goes into `extra` as it is."""

    r: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    target_modules: str | list[str] | None = None
    """"all-linear", a regular expression of module names, or a list of their endings. None: all-linear less routed experts,
    which are most of a model that has them."""
    use_rslora: Switch = False
    use_dora: Switch = False
    init_lora_weights: Annotated[bool, Strict()] | str = True
    extra: dict[str, Any] = {}

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        named = {"lora_alpha": "alpha", "lora_dropout": "dropout"} | {key: key for key in cls.model_fields}
        for key in extra:
            if key in named:
                raise ValueError(
                    f"expected only arguments that have no key of their own, found {key!r}: use lora.{named[key]}"
                )
        return extra

    def peft_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `peft.LoraConfig`."""
        renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        own = {renamed.get(key, key): value for key, value in self if key != "extra"}
        return own | {"target_modules": self.target_modules or "all-linear"} | self.extra


PRODUCT_RANK = 32  # of all pending groups together: a few percent of a product, and of the weights' memory


class ZerothOrderOptions(Section):
    """Zeroth-order tuning; formulas and sources are in `finetune.methods.zeroth_order`."""

    parameters: Literal["all", "lora", "prefix"] = "all"
    """What is perturbed: all weights of the model, a LoRA adapter, or keys and values that stand before every layer's own."""
    prefix_tokens: Count = 5
    """Positions that a prefix has; it begins as random tokens' keys and values."""
    objective: Annotated[Any, BeforeValidator(check_objective)] = "loss"
    """What is made small: loss; classification (of the data's few completions, as MeZO trains), accuracy, exact_match or f1
    of the completion; FILE.py:FUNCTION or MODULE:FUNCTION, a reward to make large (in Python, a function), which is called
    as `finetune.objectives.rewards.Reward` says."""
    max_new_tokens: Count = 32
    """What f1 and rewards are of: at most so many tokens, decoded greedily; each is a pass over the weights."""
    estimator: Literal["spsa", "fzoo"] = "spsa"
    noise: Literal["rademacher", "gaussian", "low_rank"] = "rademacher"
    """Signs cost less than half of normals, pending ones a sixth. MeZO uses normals, LOZO low_rank."""
    rank: CountOrZero = 0
    """Of low_rank noise; 0: 4 there."""
    perturb: Literal["weights", "products"] = "weights"
    """products: noise of low rank is added to what linear layers multiply, x W^T + (x V) U^T, and W stays as it is: faster, in
    less memory, with other rounding; see `offload.perturb.products`."""
    epsilon: Positive = 1e-3
    perturbations: Count = 1
    """Per step; all are computed from one fetch of the weights."""
    update: Literal["sgd", "sign"] = "sgd"
    momentum: Share = 0.0
    momentum_window: Count = 10
    """Steps that momentum looks back on."""
    clip_quantile: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Projected gradients are clipped to this quantile of the last hundred."""
    fold_steps: Count | None = None
    """Steps that are summed before they are rounded into the weights; None: as many as have 32 noises (rademacher; 8 gaussian)
    together, those that momentum looks back on among them; 50 with low_rank, which keeps one V so long."""
    rounding: Literal["exact", "nearest", "stochastic"] = "exact"
    """How a sum goes into weights stored in 16 bits: exact keeps fp32 weights on disk. MeZO: nearest with fold_steps 1."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.estimator == "fzoo" and self.perturbations < 2:
            yield Conflict(
                ("estimator", "perturbations"),
                f"expected perturbations of at least 2 for fzoo, which takes their spread, found {self.perturbations}",
            )
        if self.rank and self.noise != "low_rank":
            yield Conflict(
                ("rank", "noise"), f"expected a rank with low_rank noise only, found {self.rank} with {self.noise}"
            )
        if self.noise == "low_rank" and self.momentum:
            yield Conflict(
                ("noise", "momentum"),
                f"expected no momentum with low_rank noise, whose V changes every fold_steps steps, found {self.momentum}",
            )
        if self.noise == "low_rank" and self.rounding == "stochastic":
            yield Conflict(
                ("noise", "rounding"), "expected rounding exact or nearest with low_rank noise, found stochastic"
            )
        if self.perturb == "products" and (self.noise != "low_rank" or self.parameters != "all"):
            yield Conflict(
                ("perturb", "noise", "parameters"),
                f"expected noise low_rank and parameters all with perturb products, found {self.noise} and {self.parameters}",
            )

    @property
    def group_steps(self) -> int:
        if self.fold_steps is not None or self.noise == "low_rank":
            return self.fold_steps or 50
        noises = self.perturbations * (self.momentum_window if self.momentum else 1)
        return max(1, {"rademacher": 32, "gaussian": 8}[self.noise] // noises)

    @property
    def product_groups(self) -> int:
        """Groups whose factors products can meet beside the weights; 0: none, weights are perturbed."""
        return max(1, PRODUCT_RANK // self.noise_rank) if self.perturb == "products" else 0

    @property
    def steps_between_folds(self) -> int:
        """After so many steps what is pending is folded into weights on disk."""
        return self.group_steps * max(1, self.product_groups)

    @property
    def noise_rank(self) -> int:
        return (self.rank or 4) if self.noise == "low_rank" else 0

    @property
    def variants(self) -> int:
        """Versions of the weights that a step computes."""
        return self.perturbations + 1 if self.estimator == "fzoo" else 2 * self.perturbations


class OptimizerOptions(Section):
    """The out-of-core optimizer of the methods that train the model's own weights; `training` has AdamW's numbers."""

    name: Literal["adamw", "adafactor", "apollo", "lamb", "lion", "sgd"] = "adamw"
    """adafactor keeps second moments as rows times columns, apollo moments of a projection of the gradient: a step moves
    little but weights between disk and memory. lamb reads its state twice."""
    rank: Count = 32
    """Of apollo's projections, and of frugal's where `selection.subspace` projects. 1 with a `scale` of 128: APOLLO-Mini."""
    refresh_steps: Count = 200
    """Apollo: updates between projections."""
    scale: NonNegative = 1.0
    """Apollo: the square of a factor of its steps, as in the authors' code."""
    momentum: Share = 0.9
    """Of sgd."""
    state: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How moments are kept, of all but adafactor and apollo: bfloat16 rounds stochastically, 8bit in blocks of 256 (Dettmers
    et al. 2022)."""
    master: Literal["float32", "none"] = "float32"
    """Of bf16 weights: float32 keeps 16 more bits beside each; none rounds every update stochastically."""
    clipping: Literal["previous", "exact"] = "previous"
    """By which norm gradients are clipped: the step before's, so that every block is updated as soon as its gradients are
    there (the first step is computed twice, for its own norm), or this step's own, for which all gradients wait on disk."""
    versions: Annotated[int, Strict(), Field(ge=1, le=2)] = 2
    """Of everything in the working store. 1 halves the disk space, and a process that dies in a step loses the run."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.name == "lamb" and self.state == "8bit":
            yield Conflict(("name", "state"), "expected optimizer.state float32 or bfloat16 with lamb, found 8bit")


class SelectionOptions(Section):
    """What is trained when, for lisa, badam, slimfit and frugal; formulas and sources are in `finetune.methods.selection`."""

    layers: Count | None = None
    """Blocks that are trained at a time; None: 2 for lisa, 1 for badam, a quarter of them for slimfit and frugal."""
    interval: Count | None = None
    """Steps between choices; None: 20 for lisa, 50 for badam and frugal, 1 for slimfit."""
    order: Literal["random", "ascending", "descending", "alternating"] = "random"
    """In which badam goes through the blocks."""
    ends: Switch | None = None
    """Whether embedding, head and final norm are trained too; None: except with badam, as in the papers."""
    keep_state: Switch | None = None
    """Whether a block's optimizer state waits on disk until it is chosen again; None: with slimfit only."""
    sign_scale: NonNegative = 1.0
    """Frugal: learning rate of the signs, in units of the learning rate."""
    subspace: Literal["blocks", "columns", "projection"] = "blocks"
    """Frugal: what has AdamW's state. blocks: some of them; columns and projection: `optimizer.rank` dimensions of every
    matrix, chosen rows or columns of it or directions at random."""
    prefer_resident: Annotated[float, Field(ge=1)] = 1.0
    """Lisa: blocks that stay in memory are so many times likelier; updates are weighted so that the expectation stays. Above
    1, another budget chooses other blocks."""


class EngineOptions(Section):
    """How the model is streamed. The planner chooses what is None or auto.

    No choice changes results, except `dtype` and the tiles of the loss, which round differently.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: the checkpoint's own."""
    io_backend: Literal["auto", "io_uring", "threads"] = "auto"
    resident_blocks: CountOrZero | None = None
    """Blocks that stay in memory for the whole run."""
    lookahead: CountOrZero | None = None
    """Blocks fetched ahead of the one that computes."""
    activations: Literal["auto", "host", "disk"] = "auto"
    """Where block inputs wait for the backward pass."""
    loss_tile_tokens: Count | None = None
    loss_tile_vocab: Count | None = None
    queue_depth: Count | None = None
    """Disk requests in flight."""
    num_threads: Count | None = None
    """Compute threads; None: PyTorch's choice."""
    simulated_copy_gbps: Positive | None = None
    """Bandwidth of a copy on the simulated device, in units of 10^9 bytes/s; None: unlimited."""
    simulated_delay_ms: NonNegative = 0.0


class Config(Section):
    """What to train, on what, within which limits. Frozen; every key is checked when it is made.

    The everyday keys of `SHORTHANDS` are also taken at the top level: `Config(model=..., max_steps=10)`.
    Byte amounts are words of `memory.units.parse_bytes`.

    Raises ConfigError, with all problems in one message.
    """

    model: ModelName
    """A directory with config.json and safetensors files, or a hub id."""
    data: Data = None
    """A path, a hub id, `sample:NAME` for a file shipped here, or (in Python) a sequence of rows."""
    eval_data: Data = None
    method: Literal["lora", "zo", "full", "lisa", "badam", "slimfit", "frugal"] = "lora"
    """lora: gradients for a LoRA adapter. zo: forward passes only, see `zo`. full: all weights; lisa, badam, slimfit, frugal:
    some of the blocks at a time, see `selection`."""
    train: list[str] = []
    """Regular expressions, searched in the names of parameters: only these are trained by the methods that train the
    model's own weights; none: all."""
    output: Annotated[Path, BeforeValidator(_check_output)] = Path("out")
    host_memory: Amount = None
    """Limit of the whole process, a promise; None: 95% of what the machine, or its cgroup, has available at the start."""
    device_memory: Amount = None
    disk: Amount = None
    """Limit of everything written under `output`."""
    device: Literal[DEVICE_WORDS] = "auto"
    resume: Switch = False
    """Go on from the state in `output`."""
    trust_remote_code: Switch = False
    training: TrainingOptions = TrainingOptions()
    dataset: DatasetOptions = DatasetOptions()
    lora: LoraOptions = LoraOptions()
    zo: ZerothOrderOptions = ZerothOrderOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    selection: SelectionOptions = SelectionOptions()
    engine: EngineOptions = EngineOptions()

    def conflicts(self) -> Iterator[Conflict]:
        schedule, arguments = self.training.lr_scheduler, self.training.lr_scheduler_kwargs
        problem = None
        if not any(argument_problems(schedule, arguments)):
            problem = rate_problem(schedule, arguments, self.learning_rate)
        if problem is not None:
            keys = ("lr_scheduler", "lr_scheduler_kwargs", "learning_rate")
            yield Conflict(("method", *(f"training.{key}" for key in keys)), problem)
        if self.dataset.packing and not find_objective(self.objective).packs:
            yield Conflict(
                ("method", "zo.objective", "dataset.packing"),
                f"expected dataset.packing off with zo.objective {self.zo.objective}, which is asked row by row, found it on",
            )
        if self.tunes_prefix and self.dataset.packing:
            yield Conflict(
                ("method", "zo.parameters", "dataset.packing"),
                "expected dataset.packing off with zo.parameters prefix, which stands before one text, found it on",
            )
        subspace = self.selection.subspace
        if subspace != "blocks" and self.method != "frugal":
            yield Conflict(
                ("method", "selection.subspace"),
                f"expected method frugal with selection.subspace {subspace}, found {self.method}",
            )
        if subspace != "blocks" and self.selection.layers:
            yield Conflict(
                ("selection.layers", "selection.subspace"),
                f"expected no selection.layers with selection.subspace {subspace}, which is of all blocks, found "
                f"{self.selection.layers}",
            )
        if self.method == "frugal" and self.selection.keep_state:
            yield Conflict(
                ("method", "selection.keep_state"),
                "expected selection.keep_state off with frugal, whose blocks lose their state when they take signs, found "
                "it on",
            )
        if self.train and not self.trains_weights:
            yield Conflict(
                ("method", "train"),
                f"expected train only with methods that train the model's own weights, found {self.method}",
            )

    def __init__(self, **values: Any) -> None:
        values = _expand_shorthands(values)
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
            wrong = explain(error, _SECTIONS, _KEYS)
            problems |= wrong
            try:  # what is right may still not go together
                super().__init__(**_without(values, wrong))
            except ValidationError:  # what is wrong could not be taken out
                raise ConfigError(list(problems.values())) from None
        found = [*problems.values(), *_all_conflicts(self, problems.keys())]
        if found:
            raise ConfigError(found)

    @property
    def learning_rate(self) -> float:
        """`training.learning_rate`, or what suits the method."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        if self.method == "lora":
            return 2e-4
        if self.method != "zo":
            return 2e-5
        return {"all": 1e-6, "lora": 1e-4, "prefix": 1e-3}[self.zo.parameters]

    @property
    def objective(self) -> Any:
        """The word for what a step makes small, or a function: see `finetune.objectives`."""
        return self.zo.objective if self.method == "zo" else "loss"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, rather than the model's own weights."""
        return self.method == "lora" or self.method == "zo" and self.zo.parameters != "all"

    @property
    def tunes_prefix(self) -> bool:
        return self.method == "zo" and self.zo.parameters == "prefix"

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights are trained by gradients."""
        return self.method in WEIGHT_METHODS

    @property
    def variants(self) -> int:
        """Versions of the weights that one step computes."""
        return self.zo.variants if self.method == "zo" else 1

    @classmethod
    def load(
        cls,
        source: str | os.PathLike | None = None,
        overrides: Mapping[str, Any] | None = None,
        settings: Sequence[str] = (),
    ) -> Config:
        """The configuration in a YAML file or preset, with changes on top.

        `source`: a path, or a preset's name where no such file exists. `overrides`: keys to values; a key may be dotted
        (`training.max_steps`) or a shorthand. `settings`: "key=value" words, the value as
        `finetune.config.yaml_text.read_word` has it; they come last.

        Raises ConfigError.
        """
        values, origin = {}, "the configuration"
        if source is not None:
            path = _find_source(os.fspath(source))
            values, origin = _expand_shorthands(_read_yaml(path)), str(path)
        changes: dict[str, Any] = {}
        for key, value in (overrides or {}).items():
            _assign(changes, key, value)
        problems = []
        for setting in settings:
            try:
                _assign(changes, *_parse_setting(setting))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError(problems, "--set")
        try:
            return cls(**_merge(values, _expand_shorthands(changes)))
        except ConfigError as error:
            raise ConfigError(error.problems, origin) from None

    def to_yaml(self) -> str:
        """All keys with their values, such that `load` gives an equal configuration back.

        Data given as a Python object has no place in a file: its key is null, and a comment says so.
        """
        values = self.model_dump() | {"output": str(self.output)}
        comments = ""
        if callable(self.zo.objective):
            comments += "# zo.objective was a Python function\n"
            values["zo"]["objective"] = "loss"
        for key in ("data", "eval_data"):
            if not isinstance(values[key], (str, type(None))):
                comments += f"# {key} was a Python object ({type(values[key]).__name__})\n"
                values[key] = None
        return comments + write_document(values)


_SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
_KEYS = [key for key in Config.model_fields if key not in _SECTIONS]
_KEYS += [f"{name}.{key}" for name, section in _SECTIONS.items() for key in section.model_fields]


def _all_conflicts(config: Config, wrong: Collection[str]) -> Iterator[str]:
    """A line for each, but for those that keys which are wrong by themselves take part in."""
    for name in _SECTIONS:
        for conflict in getattr(config, name).conflicts():
            if not wrong & {name, *(f"{name}.{key}" for key in conflict.keys)}:
                yield f"{name}: {conflict.problem}"
    for conflict in config.conflicts():
        if not wrong & {part for key in conflict.keys for part in (key, key.partition(".")[0])}:
            yield f"the keys together: {conflict.problem}"
    for key, problem in unused_keys(config):
        if not wrong & {"method", "zo.parameters", key, key.partition(".")[0]}:
            yield f"{key}: {problem}"


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """`values` without dotted `keys`; a section that is not a mapping goes with any of its keys."""
    left = dict(values)
    for key in keys:
        section, _, name = key.rpartition(".")
        if not section or not isinstance(left.get(section), Mapping):
            left.pop(section or name, None)
        else:
            left[section] = {inner: value for inner, value in left[section].items() if str(inner) != name}
    return {"model": "-"} | left if "model" in keys else left


def _find_source(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    preset = find_preset(source)
    if preset is None:
        near = difflib.get_close_matches(source, preset_names(), n=1)
        raise ConfigError(
            [
                f"expected a YAML file or one of the presets {', '.join(preset_names())}; found neither"
                + (f"; did you mean {near[0]}?" if near else "")
            ],
            origin=repr(source),
        )
    return preset


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values, duplicates = read_document(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"expected YAML, found: {' '.join(str(error).split())}"], str(path)) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None
    if duplicates:
        raise ConfigError(duplicates, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"expected keys and values, found {show(values)}"], str(path))
    return {str(key): value for key, value in values.items()}


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Raises ValueError."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"expected key=value, such as training.max_steps=50, found {setting!r}")

    def accepts(value: Any) -> bool:
        section, _, name = (f"{SHORTHANDS[key]}.{key}" if key in SHORTHANDS else key).rpartition(".")
        holder = _SECTIONS.get(section) if section else Config
        field = holder.model_fields.get(name) if holder else None
        if field is None:
            return True
        try:
            TypeAdapter(field.rebuild_annotation()).validate_python(value)
        except ValidationError:
            return False
        return True

    try:
        return key, read_word(text, accepts)
    except yaml.YAMLError:
        raise ValueError(
            f"{key}: expected a YAML value in which each key stands once, found {text!r}; text is quoted as in {key}='\"...\"'"
        ) from None


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, leaf = dotted.split(".")
    for folder in folders:
        if not isinstance(tree.get(folder), dict):
            tree[folder] = {}
        tree = tree[folder]
    tree.update(_merge(tree, {leaf: value}))  # a section's keys that came before stay


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _expand_shorthands(values: Mapping[str, Any]) -> dict[str, Any]:
    """Moves each shorthand into its section; one that contradicts its section stays, for `Config` to report."""
    values = dict(values)
    for key, section in SHORTHANDS.items():
        if key not in values:
            continue
        inner = values.get(section)
        if isinstance(inner, Section):
            inner = inner.model_dump(exclude_unset=True)
        if inner is None:
            inner = {}
        if isinstance(inner, Mapping) and inner.get(key, values[key]) == values[key]:
            values[section] = {**inner, key: values.pop(key)}
    return values
