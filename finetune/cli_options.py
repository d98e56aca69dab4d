"""The options that commands of `finetune` share, each named once, and how a command takes some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, signature
from types import EllipsisType
from typing import Annotated, Any, get_type_hints

import typer

from finetune.memory.device_kinds import DEVICE_WORDS
from finetune.methods.registry import METHODS

OTHER = "Other"


def _option(kind: type, flag: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return Annotated[kind | None, typer.Option(flag, help=text, rich_help_panel=panel, **more)]


def _memory(flag: str, text: str) -> Any:
    return _option(str, flag, text, "Memory and device")


def _training(kind: type, flag: str, text: str) -> Any:
    return _option(kind, flag, text, "Training")


def _sampling(kind: type, flag: str, text: str, **limits: float) -> Any:
    return _option(kind, flag, text, "Sampling", **limits)


_METHODS = ", ".join(f"{name} ({entry.goal})" for name, entry in METHODS.items())

# Keys of the configuration, under the names that they have there. None: the option was not given.
KEYS = {
    "model": _option(str, "--model", "Model directory, .gguf file or hub id."),
    "data": _option(list[str], "--data", "Data file, directory or hub id; or several.", metavar="DATA"),
    "eval_data": _option(list[str], "--eval-data", "Data to evaluate on.", metavar="DATA"),
    "method": _option(str, "--method", f"Training method: {_METHODS}. [default: lora]"),
    "quantize": _option(
        str,
        "--quantize",
        "Train and run over the model in nf4 (4 bits), int8, or a mixture of them with so many bits a weight, such as 5.5; "
        "made once and kept, see `finetune cache`.",
    ),
    "output": _option(str, "--output", "Directory of the run: everything is written there. [default: out]"),
    "host_memory": _memory(
        "--host-memory",
        "Memory limit of the process: 8GiB, 50%, or -2GB for all but 2 GB. [default: 95% of the machine's available memory]",
    ),
    "device_memory": _memory("--device-memory", "Memory limit on the accelerator."),
    "disk": _memory("--disk", "Limit of what lies on disk."),
    "max_writes": _memory("--max-writes", "Limit of what the whole run writes to disk, such as 20TB, to spare an SSD."),
    "device": _memory("--device", f"Where to compute: {', '.join(DEVICE_WORDS)}. [default: auto]"),
    "machine": _memory("--machine", "Machine to plan for: a profile's YAML file, or a name. [default: this one]"),
    "max_steps": _training(int, "--max-steps", "Optimizer steps. [default: as many as --epochs have]"),
    "epochs": _training(float, "--epochs", "Passes over the data. [default: 1]"),
    "batch_size": _training(int, "--batch-size", "Rows per optimizer step. [default: 8]"),
    "micro_batch_size": _training(str, "--micro-batch-size", "Rows that are computed together, or auto. [default: 1]"),
    "sequence_length": _training(int, "--sequence-length", "Tokens per row; longer rows are cut. [default: 1024]"),
    "learning_rate": _training(float, "--learning-rate", "Peak learning rate. [default: depends on the method]"),
    "seed": _training(int, "--seed", "Seed of the data order, dropout and noise. [default: 42]"),
    "resume": _training(bool, "--resume/--no-resume", "Continue from the state in the output directory."),
    "trace": _option(str, "--trace", "File that gets what a step did when, for Perfetto.", OTHER),
    "trust_remote_code": _option(
        bool, "--trust-remote-code/--no-trust-remote-code", "Run Python code that comes with the model.", OTHER
    ),
}
SAMPLING = {
    "temperature": _sampling(float, "--temperature", "0: always the likeliest token. [default: 0]", min=0.0),
    "top_k": _sampling(int, "--top-k", "Sample from so many of the likeliest tokens.", min=1),
    "top_p": _sampling(float, "--top-p", "Sample from the likeliest tokens of this total probability.", min=0.0, max=1.0),
    "min_p": _sampling(
        float, "--min-p", "Sample from tokens with this share of the likeliest one's probability.", min=0.0, max=1.0
    ),
    "repetition_penalty": _sampling(float, "--repetition-penalty", "Above 1: tokens that came are less likely.", min=0.01),
    "no_repeat_ngram_size": _sampling(int, "--no-repeat-ngram-size", "No so many tokens in a row come twice.", min=1),
    "sampling_seed": _sampling(int, "--seed", "Seed of the sampling. [default: 42]", min=0, max=(1 << 63) - 1),
}
"""Fields of `finetune.decoding.Sampling`, but for the name of the seed. None: the option was not given."""
OPTIONS = KEYS | SAMPLING | {
    "config": Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML file, a preset's name, or the directory of a run.")
    ],
    "runs": Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|KEY=VALUES", help="YAML files or presets, and keys with values: lora.r=8,16."),
    ],
    "adapter": _option(
        str, "--adapter", "Directory of a PEFT adapter, or of a run. [default: the run in --output, where one is named]"
    ),
    "settings": _option(
        list[str], "--set", "Any other key of the configuration, such as lora.r=8.", OTHER, metavar="KEY=VALUE"
    ),
    "debug": _option(bool, "--debug", "Show tracebacks.", OTHER, envvar="FINETUNE_DEBUG"),
}


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
def own_options(command: Callable[..., None]) -> list[Parameter]:
    """Parameters of `command` that no other command has, with what typer is to know of them."""
    hints = get_type_hints(command, localns={"Config": Any, "RunOfSweep": Any}, include_extras=True)
    own = [one for name, one in signature(command).parameters.items() if name not in OPTIONS and name != "how"]
    return [one.replace(annotation=hints[one.name], kind=Parameter.KEYWORD_ONLY) for one in own]


def with_options(
    run: Callable[..., None], command: Callable[..., None], names: Iterable[str | EllipsisType]
) -> Callable[..., None]:
    """`run`, to be called with the options `names` and with those of `command`, whose name and help text it gets.

    names: of `OPTIONS`, in the order of the help text; ... stands for the command's own.
    """
    parameters: list[Parameter] = []
    for name in names:
        if name is ...:
            parameters += own_options(command)
        else:
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=OPTIONS[name]))
    run.__name__, run.__doc__, run.__annotations__ = command.__name__, command.__doc__, {}
    run.__signature__ = Signature(parameters)
    return run
