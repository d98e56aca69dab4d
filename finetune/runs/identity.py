"""What makes a run this run: settings, model and data. `--resume`, export and evaluation are for the same, or refused.

Settings are all keys of the configuration except those listed here as changing no number, so that a new key counts unless it
is listed. Model and data are known by digests: where they lie, and under which name, does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.config import Config
from finetune.config.function_names import describe_function
from finetune.data import TokenDataset
from finetune.data.tensor_rows import TensorRows
from finetune.memory.errors import UserError
from finetune.methods.registry import METHODS, not_shared
from finetune.objectives.registry import OBJECTIVE_SECTIONS, find_objective
from finetune.offload.files.sealed import json_digest
from finetune.offload.update import units as update_units
from finetune.offload.weights.digest import model_digest
from finetune.offload.weights.parts import ModelParts

# Keys that change no number of a step. A resumed run may be given more steps; the model and the data have digests. Threads and
# devices do change the last bits of products, but a run may go on on another machine.
_CHANGES_NOTHING = frozenset(
    "model data eval_data quantization.cache output host_memory device_memory disk max_writes device machine resume trace "
    "trust_remote_code training.max_steps training.epochs training.eval_steps training.save_steps training.report_to "
    "training.compute_metrics training.save_total_limit training.metric_for_best_model training.greater_is_better "
    "training.load_best_model_at_end "
    "training.early_stopping_patience training.early_stopping_threshold "
    "optimizer.versions engine.io_backend engine.resident_blocks engine.lookahead engine.activations engine.queue_depth "
    "engine.hidden_states dataset.evaluation_stride "
    "engine.num_threads engine.expert_slots engine.kept_graphs engine.simulated_copy_gbps engine.simulated_delay_ms".split()
)
_EARLIER_NAMES = {"engine.loss_tile_vocab": "tile_vocab", "training.micro_batch_size": "micro_batch_size"}
# Keys that act through the tokens alone: named when these differ, of no matter when they are the same.
_ACTS_THROUGH_TOKENS = (
    "form", "completion_only", "append_eos", "chat_template", "sequence_length", "probabilities", "stopping_strategy",
    "streaming",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """model_name: as PEFT is to find it, see `model_name`. examples: rows of the data. dtype: that is computed in. prompts: how
    rows of text were written, "chat" or "plain", for those who ask the model; None: in both ways, or not known."""

    config: Config  # whose keys that change numbers count
    model_name: str
    model_digest: str  # of configuration, headers and a sample of the weights
    data_digest: str  # of all tokens or tensors
    examples: int
    dtype: torch.dtype
    prompts: str | None = None

    @classmethod
    def of(cls, config: Config, parts: ModelParts, data: TokenDataset | TensorRows, examples: int) -> RunIdentity:
        """Reads a sample of the weights. Raises UserError when they cannot be read."""
        prompts = data.meta.get("prompts") if isinstance(data, TokenDataset) else None
        digest = model_digest(parts.checkpoint)
        return cls(config, model_name(config.model), digest, data.digest, examples, parts.dtype, prompts)

    def about(self) -> dict[str, Any]:
        """As JSON values, for what the run writes; "run" is a digest of the others. The same run writes the same bytes."""
        values = settings(self.config, self.dtype)
        return {
            "run": json_digest([self.config.method, self.model_digest, self.data_digest, values]),
            "method": self.config.method,
            "seed": self.config.training.seed,
            "model": {"name": self.model_name, "digest": self.model_digest},
            "data": {"digest": self.data_digest, "examples": self.examples, "prompts": self.prompts},
            "settings": values,
        }

    def check(self, place: Path, found: Mapping[str, Any]) -> None:
        """Raises UserError naming everything that differs, unless `found`, what the run in `place` says of itself, is this."""
        about = self.about()
        if "settings" in found:
            different = _differences(found, about)
        else:
            different = _differences_of_earlier_versions(found, self.config, self.examples)
        if different:
            raise UserError(
                f"cannot resume from {place}: the run was started with other settings ({'; '.join(different)}). "
                "Use the same settings, or another --output"
            )


def settings(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Every key of `config` that changes a number of the run, with what stands for None, as JSON values."""
    values = config.model_dump(exclude={"data", "eval_data"})
    zo = values["zo"]
    values["training"]["learning_rate"] = config.learning_rate
    values["engine"]["dtype"] = str(dtype).removeprefix("torch.")
    if isinstance(values["lora"]["target_modules"], list):
        values["lora"]["target_modules"].sort()  # the order says nothing, and a set's is another in every process
    values["lora"]["target_parameters"].sort()
    zo |= {"fold_steps": config.zo.group_steps, "rank": config.zo.noise_rank, "clip": config.zo.most_coefficient}
    if callable(config.zo.objective):
        zo["objective"] = describe_function(config.zo.objective)
    values["preference"]["beta"] = config.preference.beta_of(config.objective)
    values["preference"]["cpo_alpha"] = config.preference.cpo_alpha_of(config.objective)
    values["grpo"]["reward_funcs"] = [
        describe_function(word) if callable(word) else word for word in config.grpo.reward_funcs
    ]
    for section in OBJECTIVE_SECTIONS:
        if section != find_objective(config.objective).section:
            del values[section]
    method = METHODS[config.method]
    for key in not_shared() - set(method.recorded(config)):
        del values[key]
    if _keeps_a_store(config):
        values["piece_bytes"] = update_units.PIECE_BYTES
    return json.loads(json.dumps(_counting(values), default=_plain))


def _keeps_a_store(config: Config) -> bool:
    return "store" in METHODS[config.method].files(config)


def model_name(model: str) -> str:
    """What the user typed, for others to find the model by: a hub id stays one; a directory or file has its whole path, because
    an adapter is loaded from anywhere, where a relative path would be taken for a hub id."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def check_same_run(place: Path, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises UserError when what `found` was read from in `place` is another run's than the one that goes on. `about`: of that
    one, as `finetune.runs.directory` gives it; what earlier versions wrote says nothing of it."""
    if found.get("run", about["run"]) != about["run"]:
        raise UserError(
            f"{place} belongs to another run than the rest of the directory: move it away, or bring back what belongs here"
        )


def check_model(what: str, recorded: str | Mapping[str, Any], parts: ModelParts, model: str) -> None:
    """Raises UserError unless `model`, of which `parts` are, is the one that `recorded` names. what: the beginning of the
    message, which ends with its name."""
    if isinstance(recorded, str):  # of earlier versions: the directory's last name
        if recorded not in (Path(model).name, parts.directory.name):
            raise UserError(f"{what} {recorded}, --model names {parts.directory.name}")
    elif recorded["digest"] != model_digest(parts.checkpoint):
        raise UserError(
            f"{what} {recorded['name']}, --model names {model_name(model)}, whose weights or configuration are others: "
            "name the model that it began with, and --quantize as then"
        )


def recorded_setting(about: Mapping[str, Any], key: str) -> Any:
    """The setting with this dotted key in what a run says of itself, this version's or an earlier one's; None: that had no such
    setting."""
    if "settings" in about:
        found = about["settings"]
    else:
        found, key = about, _EARLIER_NAMES.get(key, key)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _counting(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _counting(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in _CHANGES_NOTHING
    }


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _differences(found: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    words = []
    if found["method"] != about["method"]:
        words.append(f"method: {found['method']!r} then, {about['method']!r} now")
    (old, new), same_data = (x["model"] for x in (found, about)), found["data"]["digest"] == about["data"]["digest"]
    if old["digest"] != new["digest"]:
        words.append(f"model: {old['name']} ({old['digest'][:8]}) then, {new['name']} ({new['digest'][:8]}) now")
    if not same_data:
        old, new = (f"{x['examples']} examples ({x['digest'][:8]})" for x in (found["data"], about["data"]))
        words.append(f"data: {old} then, {new} now")
    then, now = flat(found["settings"]), flat(about["settings"])
    if same_data:
        for key in _ACTS_THROUGH_TOKENS:
            if key != "sequence_length" or not about["settings"]["dataset"]["packing"]:
                then.pop(f"dataset.{key}", None), now.pop(f"dataset.{key}", None)
    # A key that did not exist then had the effect of its default.
    defaults = flat(Config(model="any").model_dump()) if then.keys() != now.keys() else {}
    if found["method"] == about["method"]:
        words += _unequal({key: then.get(key, defaults.get(key)) for key in then.keys() | now.keys()}, now)
    return words


def _unequal(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {value!r} then, {now.get(key)!r} now" for key, value in sorted(then.items()) if value != now.get(key)
    ]


def _differences_of_earlier_versions(found: Mapping[str, Any], config: Config, examples: int) -> list[str]:
    """Of runs that began before there were digests, which said less of themselves: what they said is compared."""
    options = config.training
    zo = config.zo.model_dump() | {"fold_steps": config.zo.group_steps}
    if callable(config.zo.objective):
        zo["objective"] = getattr(config.zo.objective, "__qualname__", "a function")
    now = {
        "model": Path(config.model).name,
        "method": config.method,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "micro_batch_size": options.micro_batch_size,
        "learning_rate": config.learning_rate,
        "packing": config.dataset.packing,
        "examples": examples,
        "lora": config.lora.peft_arguments(),
        "train": list(config.train),
        "tile_vocab": config.engine.loss_tile_vocab,
        "piece_bytes": update_units.PIECE_BYTES,
        "optimizer": config.optimizer.model_dump(),
        "selection": config.selection.model_dump(),
        "adam": [options.adam_beta1, options.adam_beta2, options.adam_epsilon],
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "decay_norms_and_biases": options.decay_norms_and_biases or not options.weight_decay,
        "zo": zo,
    }
    now = flat(json.loads(json.dumps(now, default=str)))
    then = flat(found)
    if "zo" in found:
        then.setdefault("zo.perturb", "weights")  # there was no choice, or it was this one
    if _keeps_a_store(config):
        then.setdefault("decay_norms_and_biases", True)  # so it was
    if found.get("method") != config.method:
        then = {key: value for key, value in then.items() if key == "method"}
    return _unequal({key: value for key, value in then.items() if key in now}, now)
