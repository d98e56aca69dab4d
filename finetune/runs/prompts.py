"""How a run wrote the prompts that it was trained on: its model is to be asked the same way."""

from __future__ import annotations

from pathlib import Path

from finetune.config import Config
from finetune.runs.directory import recorded
from finetune.runs.identity import recorded_setting


def as_trained(config: Config, run: Path | str | None) -> Config:
    """`config` with the chat template that the run in `run` was given, where it names none: what the model reads is to be
    what it was tuned on. run: also an adapter's directory or hub id, which names none."""
    about = None if run is None or config.dataset.chat_template is not None else recorded(Path(run).expanduser())
    if about is None or (template := recorded_setting(about, "dataset.chat_template")) is None:
        return config
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"chat_template": template})})


def was_trained_on_plain_prompts(run: Path | str) -> bool:
    """Whether the run in `run` has seen no chat template: its model is to be asked without one."""
    about = recorded(Path(run).expanduser())
    return about is not None and about.get("data", {}).get("prompts") == "plain"
