"""The `finetune` command. Torch, Transformers and the configuration are imported inside the commands, when needed.

Exit codes: 0; 1 for a user's mistake, a refused budget or an unexpected error; 2 for wrong usage; after a signal 128 and its
number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune import cli_export, cli_reports
from finetune.cli_messages import how_to_go_on, message_of, one_a_flag, print_versions, read_turn, require
from finetune.cli_options import KEYS, OTHER, SAMPLING, MaxNewTokens, with_options
from finetune.memory.device_kinds import DEVICE_WORDS
from finetune.memory.errors import UserError
from finetune.runs.signals import ignore_signals, take_signals

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.config import Config
    from finetune.config.sweep import RunOfSweep

app = typer.Typer(
    help="Fine-tune models that are larger than memory.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",  # square brackets in help texts stay
    pretty_exceptions_enable=False,
)

_PLACES = ("quantize", "output", "host_memory", "device_memory", "disk", "device")
_LAST = ("trust_remote_code", "settings", ..., "debug")
_RUN = (
    "config", "model", "data", "eval_data", "method", *_PLACES, "max_steps", "epochs", "batch_size", "micro_batch_size",
    "sequence_length", "learning_rate", "seed", "resume", "max_writes", "trace", *_LAST,
)  # fmt: skip


def _command(*options: str | EllipsisType, name: str | None = None, **renamed: str) -> Callable[[Callable], Callable]:
    """Adds a command, which is called with the configuration that its options give, where CONFIG is one of them, or with those
    of a sweep's runs, with those of `SAMPLING` that were given as `how`, and with its own parameters. It ends with one message
    and the right exit code, whatever it raises.

    options: as `with_options` has them. renamed: an option to another key than its own.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        def run(debug: bool | None, **flags: Any) -> None:
            try:
                keys = {renamed.get(key, key): flags.pop(key) for key in KEYS if key in flags}
                if "config" in flags:
                    flags["config"] = _load_config(flags["config"], keys, flags.pop("settings"))
                if "runs" in flags:
                    flags["runs"] = _read_sweep(flags["runs"], keys, flags.pop("settings"))
                if sampling := [key for key in SAMPLING if key in flags]:
                    given = {key.removeprefix("sampling_"): flags.pop(key) for key in sampling}
                    flags["how"] = {key: value for key, value in given.items() if value is not None}
                command(**flags)
            except KeyboardInterrupt as stop:
                output = flags["config"].output if "config" in flags else None
                how = how_to_go_on(command.__name__, getattr(stop, "step", 0), output)
                typer.echo(f"\nInterrupted.{how}", err=True)
                raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
            except (typer.Exit, BrokenPipeError):
                raise
            except Exception as error:
                if debug:
                    raise
                from finetune.reporting.progress import fitted

                typer.echo(fitted(message_of(error), sys.stderr), err=True)
                raise typer.Exit(1) from None

        app.command(name)(with_options(run, command, options))
        return command

    return add


def _load_config(source: str | None, keys: Mapping[str, Any], settings: list[str] | None) -> Config:
    from finetune.config import Config

    return Config.load(source, {key: value for key, value in keys.items() if value is not None}, settings or ())


def _read_sweep(words: list[str] | None, keys: Mapping[str, Any], settings: list[str] | None) -> dict[str, RunOfSweep]:
    from finetune.config.sweep import read_sweep

    return read_sweep(words or (), {key: value for key, value in keys.items() if value is not None}, settings or ())


@contextlib.contextmanager
def _no_garbage_search() -> Iterator[None]:
    """While libraries are imported: they stay, and looking for garbage among them would take a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _name(config: Config) -> str:
    return os.path.basename(config.model.rstrip("/"))


def _say_first(doing: str, config: Config) -> None:
    """On a terminal, while libraries are imported."""
    if sys.stderr.isatty():
        typer.echo(f"{doing} {_name(config)}", err=True)


def _named_run(config: Config) -> Path | None:
    """Where there is a run in an --output that was named: what it has tuned is asked for, not the model as it was."""
    if "output" not in config.model_fields_set:
        return None
    if any((config.output / name).exists() for name in ("adapter", "journal.zo", "store")):
        return config.output
    typer.echo(f"note: there is no finished run in {config.output}: using the model as it is", err=True)
    return None


@app.callback(invoke_without_command=True)
def _of_all(
    shows_version: Annotated[bool, typer.Option("--version", help="Print the versions, and exit.")] = False,
) -> None:
    if shows_version:
        print_versions()
        raise typer.Exit


@_command(*_RUN)
def run(config: Config) -> None:
    """Train. The adapter or the tuned weights, metrics and a report are written into the output directory."""
    _train(config)


@_command(
    "config", "max_steps", "epochs", "data", "eval_data", "host_memory", "device_memory", "disk", "max_writes", "device",
    "trace", *_LAST
)  # fmt: skip
def resume(config: Config) -> None:
    """Go on with the run in a directory, as in finetune resume out, with its settings and what you change of them."""
    if not (config.output / "run.json").is_file():
        raise UserError(f"expected the directory of a run, found none in {config.output}: finetune resume DIRECTORY")
    _train(config.model_copy(update={"resume": True}))


def _train(config: Config) -> None:
    require(config.data, "data to train on", "--data FILE")
    from finetune.data.options import name_of

    typer.echo(f"{_name(config)}: method {config.method}, data {name_of(config.data)}, output {config.output}", err=True)
    with _no_garbage_search():
        from finetune.reporting.progress import LastingStream, fitted
        from finetune.trainer import Trainer

    # A run is not lost because `| head` has seen enough of it.
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    print(fitted(Trainer(config).train().summary, sys.stdout), flush=True)


@_command("runs", *(name for name in _RUN[1:] if name != "max_writes"))
def sweep(
    runs: dict[str, RunOfSweep],
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Show how many runs fit together and what a step takes; train nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what --plan shows as one JSON object.", rich_help_panel=OTHER)
    ] = False,
) -> None:
    """Train several LoRA runs that share each read of the model. Every one leaves what it leaves alone, in OUTPUT/NAME.

    Each combination of the values is a run: finetune sweep base.yaml lora.r=8,16 learning_rate=1e-4,3e-4. So is each file.
    Runs that do not fit together wait until one ends. The table at the end ranks them; it is in OUTPUT/sweep.json too.
    """
    with _no_garbage_search():
        from finetune.reporting.progress import LastingStream
        from finetune.reporting.report import to_json
        from finetune.sweep import Sweep

        made = Sweep({name: one.config for name, one in runs.items()}, {name: one.own for name, one in runs.items()})
    if only_plan:
        found = made.plan()
        typer.echo(to_json(found.values, indent=2) if as_json else found.describe())
        return
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    made.train()


@_command(*_RUN[: _RUN.index("max_steps")], "machine", *_RUN[_RUN.index("max_steps") :])
def plan(
    config: Config,
    limits: Annotated[bool, typer.Option("--limits", help="Also the longest row, largest batch, least memory.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also what a step costs with each method.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show whether the run fits, what is placed where, and how long a step takes. Nothing is trained."""
    with _no_garbage_search():
        from finetune.questions import compare_methods, describe_costs, find_limits
        from finetune.reporting.progress import fitted
        from finetune.reporting.report import to_json
        from finetune.trainer import Trainer

        trainer = Trainer(config)
    planned = trainer.plan()
    fits = find_limits(config, planned) if limits else None
    costs = compare_methods(config, planned) if compare else None
    if as_json:
        found = planned.values | ({} if fits is None else {"limits": asdict(fits)})
        typer.echo(to_json(found | ({} if costs is None else {"methods": [cost.values for cost in costs]}), indent=2))
        return
    typer.echo(fitted(planned.describe(), sys.stdout))
    if fits is not None:
        typer.echo(fits.describe())
    if costs is not None:
        typer.echo("\n" + describe_costs(costs))


@_command(
    "config", "model", "data", "adapter", *_PLACES, "batch_size", "micro_batch_size", "sequence_length", *_LAST,
    name="eval", data="eval_data",
)  # fmt: skip
def evaluate(
    config: Config,
    adapter: str | None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OTHER)] = False,
) -> None:
    """Print the loss on data, and the accuracy where each row has a prompt and one of a few completions."""
    require(config.eval_data, "data to evaluate on", "--data FILE")
    _say_first("measuring", config)
    from finetune.evaluate import evaluate as evaluate_model
    from finetune.reporting.report import to_json

    result = evaluate_model(config, adapter or _named_run(config))
    if as_json:
        typer.echo(to_json(result))
    else:
        for name, value in result.items():
            typer.echo(f"{name}: {f'{value:.4f}' if isinstance(value, float) else value}")


@_command("config", "model", "adapter", ..., *SAMPLING, *_PLACES, "trust_remote_code", "settings", "debug")
def generate(
    config: Config,
    adapter: str | None,
    how: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue. [default: read from standard input]")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. [default: as the run was trained, else if there is one]"),
    ] = None,
) -> None:
    """Print what the model says next, token by token."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")  # as a shell's $(...) would: echo's line end is no part of it
    require(prompt, "a prompt", "--prompt TEXT, or text on standard input")
    _say_first("opening", config)
    from finetune.generate import generate as generate_text

    adapter = adapter or _named_run(config)
    for piece in generate_text(config, adapter, [prompt], max_new_tokens=max_new_tokens, chat=chat, **how):
        typer.echo(piece, nl=False)
    typer.echo()


@_command("config", "model", "adapter", ..., *SAMPLING, *_PLACES, "trust_remote_code", "settings", "debug")
def chat(config: Config, adapter: str | None, how: dict[str, Any], max_new_tokens: MaxNewTokens = 256) -> None:
    """Talk with the model: a line is a turn, an empty one ends. What it says comes token by token."""
    _say_first("opening", config)
    from finetune.chat import Conversation

    with Conversation(config, adapter or _named_run(config), max_new_tokens, **how) as conversation:
        while turn := read_turn():
            for piece in conversation.say(turn):
                typer.echo(piece, nl=False)
            typer.echo()


_command("config", "model", "adapter", "quantize", "output", ..., "host_memory", "trust_remote_code", "settings", "debug")(
    cli_export.export
)
_command(..., "debug")(cli_export.combine)
_command("config", "model", ..., "trust_remote_code", "settings", "debug")(cli_export.compress)
_command("config", ..., "host_memory", "device_memory", "device", "trust_remote_code", "settings", "debug")(cli_reports.report)
_command(
    "config", "model", "data", "method", *_PLACES, "batch_size", "micro_batch_size", "sequence_length", "seed", *_LAST,
    name="lr-find",
)(cli_reports.lr_find)  # fmt: skip


@_command(..., "debug")
def bench(
    directory: Annotated[
        str, typer.Option("--output", help="Directory whose drive is measured: that of runs. Nothing stays in it.")
    ] = "out",
    model_directory: Annotated[
        str | None, typer.Option("--model", help="Model directory or hub id, where that is on another drive.")
    ] = None,
    device_kind: Annotated[str, typer.Option("--device", help=f"Device to measure: {', '.join(DEVICE_WORDS)}.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OTHER)] = False,
) -> None:
    """Measure what this machine does in a second: drives, products, decoders, copies. Takes less than a minute."""
    with _no_garbage_search():
        from finetune.bench import bench as measure
        from finetune.bench import describe
        from finetune.reporting.report import to_json

    found = measure(directory, model_directory, device_kind, lambda words: typer.echo(f"measuring {words}", err=True))
    if as_json:
        typer.echo(to_json({"kept": found.path, "machine": found.profile.model_dump(mode="json")}))
    else:
        typer.echo(describe(found))


@_command(..., "debug")
def doctor(
    directory: Annotated[str, typer.Option("--output", help="Directory of runs, to be looked at too.")] = "out",
    model_directory: Annotated[
        str | None, typer.Option("--model", help="Model directory, .gguf file or hub id, to be looked at too.")
    ] = None,
) -> None:
    """Look for what would stop a run on this machine or slow it down, and say what to do about it.

    Exit code 1 if something will not work.
    """
    from pathlib import Path

    from finetune.doctor.diagnosis import diagnose
    from finetune.doctor.findings import FAULT

    has_faults = False
    with _no_garbage_search():
        for finding in diagnose(Path(directory), model_directory):
            typer.echo(finding)
            has_faults = has_faults or finding.level == FAULT
    if has_faults:
        raise typer.Exit(1)


@_command(..., "debug")
def cache(
    action: Annotated[str, typer.Argument(help="list or remove.")] = "list",
    names: Annotated[list[str] | None, typer.Argument(help="What is removed, as it is listed.")] = None,
    directory: Annotated[str | None, typer.Option("--cache", help="Another directory than the user's cache.")] = None,
) -> None:
    """List the models that --quantize has made, with their sizes, or remove some of them."""
    from pathlib import Path

    from finetune.memory.units import format_bytes
    from finetune.quantization.cache import cache_home, cached_models, remove_cached

    place = Path(directory).expanduser() if directory else cache_home()
    if action not in ("list", "remove"):
        raise UserError(f"expected list or remove, found {action!r:.80}")
    if action == "remove":
        require(names or None, "names of quantised models", "those that `finetune cache list` prints")
        for name in names:
            typer.echo(f"{name}: {format_bytes(remove_cached(place, name))} removed")
        return
    models = cached_models(place)
    for model in models:
        words = f"of {model.about['model']}" if model.is_whole else "unfinished"
        typer.echo(f"{format_bytes(model.num_bytes):>10}  {model.name}  {words}")
    typer.echo(f"{format_bytes(sum(model.num_bytes for model in models)):>10}  in {place}")


@_command("debug")
def presets() -> None:
    """List the presets, for `finetune run NAME`."""
    from finetune.config.presets import read_presets

    found = read_presets()
    width = max((len(preset.name) for preset in found), default=0)
    for preset in found:
        typer.echo(f"{preset.name:{width}}  {preset.goal}")


@_command(..., "debug")
def runs(
    directories: Annotated[
        list[str] | None, typer.Argument(help="Directories of runs, or with runs somewhere in them. [default: this one]")
    ] = None,
) -> None:
    """List runs: their method, steps, losses and state; of several runs also the settings in which they differ."""
    from pathlib import Path

    from finetune.runs.listing import describe_runs, find_runs

    places = [Path(name).expanduser() for name in directories or ["."]]
    typer.echo(describe_runs(find_runs(places)))


@_command(..., "debug", name="config")
def configuration(
    words: Annotated[list[str] | None, typer.Argument(help="Print only keys whose names have one of these words.")] = None,
    as_page: Annotated[bool, typer.Option("--markdown", help="Print docs/configuration.md.")] = False,
) -> None:
    """Print all keys of a configuration, with their defaults and what they are for."""
    from finetune.config.reference import keys_page, keys_text

    typer.echo(keys_page(KEYS) if as_page else keys_text(words or (), KEYS))


@_command("debug")
def version() -> None:
    """Print the versions of this tool and of what it stands on."""
    print_versions()


def main() -> None:
    """The entry point of the `finetune` command."""
    take_signals()
    try:
        app(one_a_flag(sys.argv[1:]), prog_name="finetune")
    finally:
        ignore_signals()  # one that is sent twice may come again now
        # The interpreter looks for garbage before it ends: among all of Torch, half a second. Triton's module must be found,
        # or nanobind lists on the terminal what of it is still there.
        (gc.unfreeze if "triton._C.libtriton" in sys.modules else gc.freeze)()
