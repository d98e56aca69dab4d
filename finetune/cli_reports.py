"""Commands that tell of a run: its page, and before it begins which learning rate would do. As in `finetune/cli.py`, what they
need is imported inside of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli_options import OTHER
from finetune.memory.errors import UserError

if TYPE_CHECKING:
    from finetune.config import Config


def report(
    config: Config,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Show what the model says after this text before and after. May be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 64,
) -> None:
    """Write report.html of a run, as in finetune report out: curves, times, memory, settings. Runs end with writing it too."""
    if not (config.output / "metrics.jsonl").is_file():
        raise UserError(f"expected the directory of a run, found none in {config.output}: finetune report DIRECTORY")
    from finetune.adapters.merging import can_merge
    from finetune.objectives.registry import find_objective
    from finetune.reporting.ending import describe_result
    from finetune.reporting.page import Sample, write_page

    samples = []
    if prompts:
        from finetune.generate import generate

        for prompt in prompts:
            before, after = (
                "".join(generate(config, adapter, [prompt], max_new_tokens=max_new_tokens)) for adapter in (None, config.output)
            )
            samples.append(Sample(prompt, before, after))
    has_adapter, is_text = (config.output / "adapter").is_dir(), not find_objective(config.objective).scores
    words = describe_result(config.output, has_adapter, is_text, can_merge(config))
    typer.echo(write_page(config.output, words, samples))


def lr_find(
    config: Config,
    num_steps: Annotated[int, typer.Option("--steps", help="Steps, each with a higher rate than the one before.")] = 100,
    least: Annotated[float, typer.Option("--from", help="The rate of the first step.")] = 1e-7,
    most: Annotated[float, typer.Option("--to", help="The rate of the last step, if the loss lets it come to that.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OTHER)] = False,
) -> None:
    """Try rising learning rates on the first steps of a run, and print the losses and a rate to begin with.

    The rate is the smaller of two: where the loss falls fastest, and a tenth of where it is lowest. Nothing stays of the steps.
    """
    if config.data is None:
        raise UserError("expected data to train on, found none: give --data FILE")
    from finetune.learning_rates import find_learning_rate
    from finetune.reporting.report import to_json

    found = find_learning_rate(config, num_steps, least, most)
    typer.echo(to_json(found.values, indent=2) if as_json else found.describe())
