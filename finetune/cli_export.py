"""Commands that write a model or an adapter. As in `finetune/cli.py`, what they need is imported inside of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli_messages import require
from finetune.memory.errors import UserError

if TYPE_CHECKING:
    from finetune.config import Config


def export(
    config: Config,
    adapter: str | None,
    to: Annotated[str | None, typer.Option("--to", help="Directory to write, or GGUF file; it must not exist.")] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            "--merge",
            help="Merge an adapter into the model: plain (no weight is packed) or packed (what is packed is packed again).",
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            help="Write one GGUF file for llama.cpp, of type f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0: with --merge the "
            "model with the adapter in it, else the adapter alone, or the model.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            help="Upload the result to OWNER/NAME on the hub, private; without --to, the adapter of the run as it is.",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make a new repository public.")] = False,
    at_step: Annotated[
        int | None, typer.Option("--at-step", help="Export the model as it was after this step. [default: the last step]")
    ] = None,
) -> None:
    """Write the model that a run has tuned as a checkpoint like the original, or with --merge one with an adapter in it.

    An adapter alone needs no export: it is in the output directory, in PEFT's format.
    """
    if push is not None:
        from finetune.push import check_name, push_result

        check_name(push)
    elif public:
        raise UserError("--public: expected with --push OWNER/NAME alone")
    if push is None or to is not None or merge is not None or gguf is not None:
        require(to, "a place to write to", "--to DIRECTORY, or --to FILE.gguf with --gguf")
    target = None if to is None else Path(to).expanduser()
    if target is not None:
        _write(config, adapter, target, merge, gguf, at_step)
    if push is not None:
        typer.echo(push_result(config, adapter, target, push, public))


def _write(
    config: Config, adapter: str | None, target: Path, merge: str | None, gguf: str | None, at_step: int | None
) -> None:
    if merge is not None:
        if at_step is not None:
            raise UserError("--at-step is for a run that has tuned the model's own weights: leave it out with --merge")
        from finetune.merge import merge as merge_adapter
        from finetune.reporting.progress import Ticker

        typer.echo(merge_adapter(config, target, merge, adapter, Ticker("merging"), gguf).describe(target))
        return
    if gguf is not None:
        from finetune.export import export_gguf
        from finetune.reporting.progress import Ticker

        typer.echo(export_gguf(config, target, gguf, adapter, at_step, Ticker("exporting")))
        return
    if adapter is not None:
        raise UserError("an adapter alone needs no export: give --merge to merge it into the model")
    from finetune.export import export as export_model
    from finetune.reporting.progress import Ticker

    steps = export_model(config, target, at_step, Ticker("exporting"))
    typer.echo(f"{target}: the model after {steps} steps")


def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]", help="Directories of adapters or runs, or hub ids.")
    ],
    to: Annotated[str | None, typer.Option("--to", help="Directory to write; it must not exist.")] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="Model of the adapters. [default: what the first one names]")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, magnitude_prune or "
            "magnitude_prune_svd.",
        ),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of values that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="With svd: rank of the result. [default: the largest]")] = None,
    majority_sign: Annotated[str, typer.Option("--majority-sign", help="With ties: total or frequency.")] = "total",
    dropping_seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 63) - 1, help="Of what dare drops.")] = 42,
) -> None:
    """Write several LoRA adapters of one model as one, with PEFT's own arithmetic: the model's weights are not read."""
    require(to, "a directory to write to", "--to DIRECTORY")
    from finetune.combine import Combination
    from finetune.combine import combine as combine_adapters

    how = Combination(kind, density, rank, majority_sign, dropping_seed)
    typer.echo(combine_adapters(adapters, Path(to).expanduser(), how, base))


def compress(
    config: Config,
    to: Annotated[str | None, typer.Option("--to", help="Directory to write; it must not exist.")] = None,
) -> None:
    """Write a bf16 model with its exponents compressed: two thirds of the bytes, and the same numbers bit for bit.

    Name the directory as --model of runs with adapters on a CPU. That pays where the disk is what a step waits for.
    """
    require(to, "a directory to write to", "--to DIRECTORY")
    from finetune.compress import compress as compress_model
    from finetune.memory.units import format_bytes
    from finetune.reporting.progress import Ticker

    target = Path(to).expanduser()
    found = compress_model(config, target, Ticker("compressing"), lambda words: typer.echo(words, err=True))
    typer.echo(
        f"{target}: {found.weights} weights compressed, {format_bytes(found.plain_bytes)} are now "
        f"{format_bytes(found.num_bytes)} ({found.num_bytes / found.plain_bytes:.1%})"
    )
