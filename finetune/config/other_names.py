"""Names of Transformers' `TrainingArguments`, and a few of others, for keys that are called otherwise here.

They stand where ours would, in section `training` or at the top. What they were taken for is said when a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.options import Section, show

RENAMED = {
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch_size",
    "lr_scheduler_type": "training.lr_scheduler",
    "max_seq_length": "dataset.sequence_length",
    "max_length": "dataset.sequence_length",
    "output_dir": "output",
    "model_name_or_path": "model",
}
"""Another's name -> the key that means the same."""
_STRATEGIES = {"eval_strategy": "eval_steps", "save_strategy": "save_steps"}
_ACCUMULATION = "gradient_accumulation_steps"


def with_own_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(the same with our names, what was renamed, what contradicts itself), the latter two as lines for people.

    values: of a configuration, unchecked.
    """
    renaming = _Renaming(values)
    for place in (renaming.values, renaming.training):
        for name in [name for name in place if isinstance(name, str)]:
            renaming.rename(place, name)
    renaming.accumulate()
    if renaming.training or isinstance(values.get("training"), Mapping):
        renaming.values["training"] = renaming.training
    return renaming.values, renaming.notes, renaming.problems


class _Renaming:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.training = self._section("training", self.values)

    @staticmethod
    def _section(name: str, values: dict[str, Any]) -> dict[str, Any]:
        found = values.get(name)
        if isinstance(found, Section):
            found = found.model_dump(exclude_unset=True)
        return dict(found) if isinstance(found, Mapping) else {}

    def rename(self, place: dict[str, Any], name: str) -> None:
        if name in RENAMED:
            self._put(name, RENAMED[name], place.pop(name))
        elif name == "train_on_inputs":
            self._put(name, "dataset.completion_only", not place.pop(name))
        elif name in _STRATEGIES:
            self._take_strategy(name, place.pop(name))

    def _take_strategy(self, name: str, word: Any) -> None:
        key = f"training.{_STRATEGIES[name]}"
        word = getattr(word, "value", word)  # an enumeration of Transformers
        if word is False:  # YAML's no
            word = "no"
        if word == "epoch":
            self.training.pop(_STRATEGIES[name], None)
            self._put(name, key, "epoch")
        elif word == "no" and name == "eval_strategy":
            self.training.pop("eval_steps", None)
        elif word != "steps":
            self.problems.append(
                f"training.{name}: expected steps or epoch{'' if name == 'save_strategy' else ' or no'}, found {show(word)}"
            )

    def accumulate(self) -> None:
        """Rows a step are those that compute together, so many times."""
        for place in (self.values, self.training):
            if _ACCUMULATION not in place:
                continue
            times = place.pop(_ACCUMULATION)
            rows = self.training.get("micro_batch_size", self.values.get("micro_batch_size", 1))
            if not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in (times, rows)):
                self.problems.append(
                    f"training.{_ACCUMULATION}: expected a number of micro-batches of a size that is a number, found "
                    f"{show(times)} of {show(rows)}: set training.batch_size"
                )
                continue
            self._put(_ACCUMULATION, "training.batch_size", times * rows)

    def _put(self, name: str, key: str, value: Any) -> None:
        section, _, last = key.rpartition(".")
        if section == "training":
            place = self.training
        elif section:
            place = self.values[section] = self._section(section, self.values)
        else:
            place = self.values
        before = place.get(last, self.values.get(last, value)) if section else place.get(last, value)
        if before != value:
            self.problems.append(f"{key}: found {show(before)}, but {name} makes it {show(value)}: give one of them")
            return
        place[last] = value
        self.notes.append(f"{name} is {key} here: {show(value)}")
