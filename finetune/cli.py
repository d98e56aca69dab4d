"""The `finetune` command. Torch, Transformers and the configuration are imported inside the commands, when needed.

Exit codes: 0; 1 for a user's mistake, a refused budget or an unexpected error; 2 for wrong usage; after a signal 128 and its
number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

from __future__ import annotations

import errno
import functools
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.runs.signals import ignore_signals, take_signals
from memory.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.config import Config

app = typer.Typer(
    help="Fine-tune models that are larger than memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # square brackets in help texts stay
    pretty_exceptions_enable=False,
)

_MEMORY, _TRAINING, _OTHER = "Memory and device", "Training", "Other"
ConfigArgument = Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file or the name of a preset.")]
ModelFlag = Annotated[str | None, typer.Option("--model", help="Model directory or hub id.")]
DataFlag = Annotated[str | None, typer.Option("--data", help="Data file, directory or hub id.")]
EvalDataFlag = Annotated[str | None, typer.Option("--eval-data", help="Data to evaluate on.")]
MethodFlag = Annotated[
    str | None,
    typer.Option("--method", help="How: lora, zo (forward passes only), full, lisa, badam, slimfit or frugal."),
]
OutputFlag = Annotated[str | None, typer.Option("--output", help="Directory for everything that is written.")]
AdapterFlag = Annotated[
    str | None, typer.Option("--adapter", help="Directory of a PEFT adapter, or of a run. [default: a run in --output]")
]
HostMemoryFlag = Annotated[
    str | None,
    typer.Option("--host-memory", help="Limit of the whole process: 1GiB, 50%, -2GB.", rich_help_panel=_MEMORY),
]
DeviceMemoryFlag = Annotated[
    str | None, typer.Option("--device-memory", help="Limit on the accelerator.", rich_help_panel=_MEMORY)
]
DiskFlag = Annotated[
    str | None, typer.Option("--disk", help="Limit of what is written to disk.", rich_help_panel=_MEMORY)
]
DeviceFlag = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, xpu, mps or simulated.", rich_help_panel=_MEMORY)
]
MaxStepsFlag = Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps.", rich_help_panel=_TRAINING)]
EpochsFlag = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.", rich_help_panel=_TRAINING)]
BatchSizeFlag = Annotated[int | None, typer.Option("--batch-size", help="Rows a step.", rich_help_panel=_TRAINING)]
MicroBatchSizeFlag = Annotated[
    int | None, typer.Option("--micro-batch-size", help="Rows that compute together.", rich_help_panel=_TRAINING)
]
SequenceLengthFlag = Annotated[
    int | None, typer.Option("--sequence-length", help="Tokens a row at most.", rich_help_panel=_TRAINING)
]
LearningRateFlag = Annotated[float | None, typer.Option("--learning-rate", rich_help_panel=_TRAINING)]
SeedFlag = Annotated[int | None, typer.Option("--seed", rich_help_panel=_TRAINING)]
ResumeFlag = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume", help="Go on from the state in the output directory.", rich_help_panel=_TRAINING
    ),
]
TrustFlag = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code", help="Run the model's own code.", rich_help_panel=_OTHER
    ),
]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key, such as lora.r=8.", rich_help_panel=_OTHER),
]
DebugFlag = Annotated[
    bool, typer.Option("--debug", envvar="FINETUNE_DEBUG", help="Show tracebacks.", rich_help_panel=_OTHER)
]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command with one message and the right exit code, whatever it raised."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            typer.echo(f"\nInterrupted.{_how_to_go_on(command.__name__, getattr(stop, 'step', 0))}", err=True)
            raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if debug:
                raise
            typer.echo(_message(error), err=True)
            raise typer.Exit(1) from None

    return run


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


def _message(error: Exception) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in _DISK_ERRORS):
        return f"error: {error.filename or 'a file'}: {error.strerror}. Mend it, or make room, and try again"
    kind = type(error).__name__
    detail = " ".join(str(error).split())
    if kind == "OutOfMemoryError":  # torch's, which must not be imported for this
        return (
            f"error: the accelerator ran out of memory ({detail}). Raise --device-memory, lower --micro-batch-size or "
            "--sequence-length, or end what else uses it"
        )
    return f"error: {kind}{f': {detail}' if detail else ''} (run with FINETUNE_DEBUG=1 for the traceback)"


def _how_to_go_on(command: str, step: int) -> str:
    """step: the last whole one that is saved; 0: none was done."""
    if command != "run":
        return ""
    if not step:
        return f" No step was done. Start again with:\n  finetune {shlex.join(sys.argv[1:])}"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
    return f" Go on from the last committed step with:\n  finetune {shlex.join(words)} --resume"


def _load_config(context: typer.Context, settings: list[str] | None, **renamed: str) -> Config:
    """The configuration that a command's CONFIG and flags name; `renamed` maps a flag to another key than its own."""
    from finetune.config import Config

    flags = {name: value for name, value in context.params.items() if value is not None}
    overrides = {renamed.get(name, name): value for name, value in flags.items() if name not in _NOT_KEYS}
    return Config.load(flags.get("config"), overrides, settings or ())


def _named_run(config: Config) -> Path | None:
    """Where there is a run in an --output that was named: what it has tuned is asked for, not the model as it was."""
    if "output" not in config.model_fields_set:
        return None
    if any((config.output / name).exists() for name in ("adapter", "journal.zo", "store")):
        return config.output
    typer.echo(f"note: no run has ended in {config.output}: this is the model as it is", err=True)
    return None


_NOT_KEYS = {
    "config", "settings", "debug", "adapter", "as_json",
    "prompt", "max_new_tokens", "temperature", "top_p", "sampling_seed", "chat", "to", "at_step",
}  # fmt: skip


@app.command()
@_reported
def run(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    eval_data: EvalDataFlag = None,
    method: MethodFlag = None,
    output: OutputFlag = None,
    host_memory: HostMemoryFlag = None,
    device_memory: DeviceMemoryFlag = None,
    disk: DiskFlag = None,
    device: DeviceFlag = None,
    max_steps: MaxStepsFlag = None,
    epochs: EpochsFlag = None,
    batch_size: BatchSizeFlag = None,
    micro_batch_size: MicroBatchSizeFlag = None,
    sequence_length: SequenceLengthFlag = None,
    learning_rate: LearningRateFlag = None,
    seed: SeedFlag = None,
    resume: ResumeFlag = None,
    trust_remote_code: TrustFlag = None,
    settings: SetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Train, and write the adapter or the tuned weights, metrics and report into the output directory."""
    loaded = _load_config(context, settings)
    _require(loaded.data, "data to train on", "--data FILE")
    from finetune.reporting.progress import LastingStream
    from finetune.trainer import Trainer

    # A run is not lost because `| head` has seen enough of it.
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    Trainer(loaded).train()


@app.command()
@_reported
def plan(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    eval_data: EvalDataFlag = None,
    method: MethodFlag = None,
    output: OutputFlag = None,
    host_memory: HostMemoryFlag = None,
    device_memory: DeviceMemoryFlag = None,
    disk: DiskFlag = None,
    device: DeviceFlag = None,
    max_steps: MaxStepsFlag = None,
    epochs: EpochsFlag = None,
    batch_size: BatchSizeFlag = None,
    micro_batch_size: MicroBatchSizeFlag = None,
    sequence_length: SequenceLengthFlag = None,
    learning_rate: LearningRateFlag = None,
    seed: SeedFlag = None,
    resume: ResumeFlag = None,
    trust_remote_code: TrustFlag = None,
    settings: SetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Say whether it fits, what would live where and how long a step takes; nothing is trained."""
    loaded = _load_config(context, settings)
    from finetune.trainer import Trainer

    typer.echo(Trainer(loaded).plan().describe())


@app.command("eval")
@_reported
def evaluate(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    adapter: AdapterFlag = None,
    output: OutputFlag = None,
    host_memory: HostMemoryFlag = None,
    device_memory: DeviceMemoryFlag = None,
    disk: DiskFlag = None,
    device: DeviceFlag = None,
    batch_size: BatchSizeFlag = None,
    micro_batch_size: MicroBatchSizeFlag = None,
    sequence_length: SequenceLengthFlag = None,
    trust_remote_code: TrustFlag = None,
    settings: SetFlag = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OTHER)] = False,
    debug: DebugFlag = False,
) -> None:
    """Print the loss on data, and the accuracy where rows have a prompt and one of a few completions."""
    loaded = _load_config(context, settings, data="eval_data")
    _require(loaded.eval_data, "data to evaluate on", "--data FILE")
    from finetune.evaluate import evaluate as evaluate_model
    from finetune.reporting.report import to_json

    result = evaluate_model(loaded, adapter or _named_run(loaded))
    if as_json:
        typer.echo(to_json(result))
    else:
        for name, value in result.items():
            typer.echo(f"{name}: {f'{value:.4f}' if isinstance(value, float) else value}")


@app.command()
@_reported
def generate(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelFlag = None,
    adapter: AdapterFlag = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="None: read from standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    sampling_seed: Annotated[int, typer.Option("--seed")] = 42,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. [default: as the run was trained, else if there is one]"),
    ] = None,
    output: OutputFlag = None,
    host_memory: HostMemoryFlag = None,
    device_memory: DeviceMemoryFlag = None,
    disk: DiskFlag = None,
    device: DeviceFlag = None,
    trust_remote_code: TrustFlag = None,
    settings: SetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Print what the model says next, as it comes."""
    loaded = _load_config(context, settings)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")  # as a shell's $(...) would: echo's line end is no part of it
    _require(prompt, "a prompt", "--prompt TEXT, or text on standard input")
    from finetune.generate import generate as generate_text

    pieces = generate_text(
        loaded, adapter or _named_run(loaded), [prompt], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=sampling_seed, chat=chat,
    )  # fmt: skip
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
@_reported
def export(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelFlag = None,
    output: Annotated[str | None, typer.Option("--output", help="Directory of the run.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Directory to write; it must not exist.")] = None,
    at_step: Annotated[int | None, typer.Option("--at-step", help="The model as of this step; none: the last.")] = None,
    trust_remote_code: TrustFlag = None,
    settings: SetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Write the model whose own weights a run has tuned (any method but lora) as a checkpoint like the original.

    An adapter needs no export: it is in the run's output directory, in PEFT's format.
    """
    loaded = _load_config(context, settings)
    _require(to, "a directory to write to", "--to DIRECTORY")
    from pathlib import Path

    from finetune.export import export as export_model

    target = Path(to).expanduser()
    steps = export_model(loaded, target, at_step)
    typer.echo(f"{target}: the model after {steps} steps")


@app.command()
@_reported
def presets(debug: DebugFlag = False) -> None:
    """List the presets, for `finetune run NAME`."""
    from finetune.config.presets import read_presets

    found = read_presets()
    width = max((len(preset.name) for preset in found), default=0)
    for preset in found:
        typer.echo(f"{preset.name:{width}}  {preset.goal}")


@app.command()
@_reported
def version(debug: DebugFlag = False) -> None:
    """Print the versions of this tool and of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    from finetune import __version__

    typer.echo(f"finetune {__version__}")
    typer.echo(f"python {sys.version.split()[0]}")
    for package in ("torch", "transformers", "peft"):
        try:
            typer.echo(f"{package} {installed_version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def _require(value: object, what: str, remedy: str) -> None:
    # Not `if value`: a data set object given in a configuration may have any truth value; text must not be blank.
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"expected {what}, found none: give {remedy}")


def main() -> None:
    """The entry point of the `finetune` command."""
    take_signals()
    try:
        app(prog_name="finetune")
    finally:
        ignore_signals()  # one that is sent twice may come again now
