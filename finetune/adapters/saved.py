"""An adapter that was saved, here or by another program, around the streamed model: PEFT's numbers, or a refusal.

Where the embedding or the head has an adapter, or the vocabulary was changed, PEFT saves the tables themselves beside it and
loads them over the model's; modules that were trained whole (`modules_to_save`) are saved likewise. Here they are streamed
from the adapter's file in place of the model's, so they are honoured without being in memory.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters.base import class_of
from finetune.adapters.peft_files import task_type
from finetune.adapters.seal import CONFIG, WEIGHTS, check_adapter
from finetune.adapters.tuners import check_kind
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import TensorEntry, read_header
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.formats.plain import TORCH_DTYPES
from finetune.offload.weights.on_demand import weights_on_demand
from finetune.offload.weights.parameter_map import ParameterMap
from finetune.offload.weights.parts import ModelParts


def load(parts: ModelParts, directory: Path) -> tuple[nn.Module, ModelParts]:
    """The model of `parts` with the adapter around it, frozen, and the parts with the adapter's own tables in place.

    Raises UserError when it is not there, is damaged, cannot be streamed, or does not fit the model tensor by tensor.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors import safe_open

    _check_files(directory)
    check_adapter(directory)
    config = _read_config(directory)
    entries = read_header(directory / WEIGHTS)
    tables = {name: entry for entry in entries if (name := _table_name(entry, parts.sources))}
    taken = {entry.name for entry in tables.values()}
    sources = _with_tables(parts, tables, config, directory)
    if not config.is_prompt_learning:
        # What it would wrap of the checkpoint is streamed instead.
        own = [word for word in config.modules_to_save or () if not any(_is_part(name, word) for name in parts.sources)]
        fresh = [word for word in own if any(_is_part(name, word) for name, _ in parts.model.named_parameters())]
        config.modules_to_save, config.task_type = fresh or None, task_type(parts.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            class_of(config.peft_type).check_parts(parts.model, config)
            with weights_on_demand(parts):
                model = get_peft_model(parts.model, config)
            with safe_open(directory / WEIGHTS, framework="pt") as file:
                values = {entry.name: file.get_tensor(entry.name) for entry in entries if entry.name not in taken}
            result = set_peft_model_state_dict(model, values)
    except Exception as error:  # whatever PEFT's layers raise for files that are not theirs
        raise UserError(f"the adapter in {directory} does not fit this model: {_line(error)}") from error
    if not config.is_prompt_learning:
        names = {entry.name for entry in entries}
        missing = missing_tensors(model, model.active_adapter, names, result.missing_keys)
        _check_complete(directory, config, missing, result.unexpected_keys)
    return model, parts.on(parts.checkpoint, sources) if tables else parts


def read_plain(parts: ModelParts, directory: Path, unwanted: Collection[tuple[str, str]]) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration of a LoRA adapter and its tensors, without tables of the model that lie beside them. unwanted:
    options that it may not have, and what they bring, in words.

    Raises UserError as `load` does.
    """
    from safetensors import safe_open

    _check_files(directory)
    check_adapter(directory)
    config = _read_config(directory)
    if config.peft_type != "LORA":
        raise UserError(f"{directory} is of kind {config.peft_type.lower()}, expected a LoRA adapter: PEFT combines no others")
    for option, word in unwanted:
        if getattr(config, option, None):
            raise UserError(f"{directory} has {option}, and PEFT does not combine {word} of adapters")
    config.task_type = task_type(parts.model)
    own = [entry.name for entry in read_header(directory / WEIGHTS) if _table_name(entry, parts.sources) is None]
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        return config, {name: file.get_tensor(name) for name in own}


def base_name(directory: Path) -> str | None:
    """What the adapter says that it was trained on."""
    _check_files(directory)
    return json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or None


def find(adapter: str | Path) -> Path:
    """The directory that is meant: a local one, or that of a hub id, downloaded or from the hub's cache. Raises UserError."""
    directory = Path(adapter).expanduser()
    if not directory.exists() and isinstance(adapter, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", adapter):
        return _download(adapter)
    return directory


def refuse_beside(model: Path) -> None:
    """Raises UserError when an adapter lies beside the weights of a model: Transformers would load it with them."""
    if (model / CONFIG).is_file() and (model / "config.json").is_file():
        raise UserError(
            f"{model} holds an adapter ({CONFIG}) beside a whole model, and Transformers would use both: move the adapter away "
            "or merge it into the model; to evaluate or generate with it, name it with --adapter too"
        )


def _check_files(directory: Path) -> None:
    """Raises UserError unless there are a configuration and weights as safetensors."""
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            found = ""
            if name == WEIGHTS and (directory / "adapter_model.bin").is_file():
                found = ", found adapter_model.bin, which can run code when it is read: load it with PEFT and save it again"
            raise UserError(f"{directory} is not an adapter: expected {name} in it{found}")


def differing_base(directory: Path, model: str) -> str | None:
    """What the adapter in a directory says that it was trained on, if that has another name than `model`."""
    base = json.loads((directory / CONFIG).read_text()).get("base_model_name_or_path") or ""
    return base if base and _last_name(base) != _last_name(model) else None


def replaces_modules(directory: Path) -> bool:
    """Whether the adapter in a directory brings modules that are read in place of the base's."""
    return bool(json.loads((directory / CONFIG).read_text()).get("modules_to_save"))


def _last_name(model: str) -> str:
    """The name without its folder or owner; that of a snapshot in the hub's cache is in the name of a folder above."""
    cached = re.search(r"models--(?:.*--)?([^/]+)/snapshots/", model)
    return (cached.group(1) if cached else Path(model).name).lower()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's HTTP client, and so the type of its errors, changes with its version
        raise UserError(
            f"adapter '{name}': there is no local directory {Path(name).absolute()}, and the hub didn't give it either "
            f"({_line(error)}). Give the path of an adapter's directory, or check the id, the network and your access to it"
        ) from error


def _read_config(directory: Path) -> Any:
    from peft import PeftConfig

    try:
        kind = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        check_kind(kind, directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{directory / CONFIG} cannot be read as PEFT's configuration: {_line(error)}") from error
    config.inference_mode = True
    class_of(kind).check_loaded(config, directory)
    return config


def _table_name(entry: TensorEntry, sources: ParameterMap) -> str | None:
    """The model's own parameter that a tensor of the adapter's file is to replace, None for those of the adapter itself."""
    name = entry.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name if name in sources else None


def _with_tables(parts: ModelParts, tables: dict[str, TensorEntry], config: Any, directory: Path) -> ParameterMap:
    """Where the parameters are, with these in the adapter's file: a table of the base together with those that are tied to
    it, a module that was trained whole alone."""
    sources, changed = parts.sources, copy.copy(parts.sources)
    whole = list(getattr(config, "modules_to_save", None) or ())
    found = set()
    for name, entry in tables.items():
        old = sources[name]
        _check_shape(name, entry, old.shape, directory)
        new = PlainTensor.of(entry)
        own = [word for word in whole if _is_part(name, word)]
        found.update(own)
        alone = own and not getattr(config, "ensure_weight_tying", False)
        changed.update({other: new for other in ([name] if alone else [n for n, s in sources.items() if s == old])})
    lost = [word for word in whole if word not in found and any(_is_part(name, word) for name in sources)]
    if lost:
        raise UserError(f"the adapter in {directory} lacks {lost[0]}, which its modules_to_save names: it is not whole")
    return changed


def _check_shape(name: str, entry: TensorEntry, shape: tuple[int, ...], directory: Path) -> None:
    if entry.shape != shape or entry.dtype not in TORCH_DTYPES:
        raise UserError(
            f"the adapter in {directory} brings {name} as {entry.dtype} {list(entry.shape)}, the model has "
            f"{list(shape)}: was its vocabulary changed? Merge the adapter into that model and give the result"
        )


def _is_part(parameter: str, module: str) -> bool:
    """Whether `parameter` belongs to a module that is called `module`, or ends so."""
    return f".{module}." in f".{parameter}"


def missing_tensors(model: nn.Module, adapter: str, found: Collection[str], not_loaded: Iterable[str]) -> list[str]:
    """Names of tensors that PEFT would save of the adapter that the model knows as `adapter`, and that are not in `found`, nor
    other names of those, nor, by `not_loaded`, made of what is found under other names."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    there = {value.data_ptr() for name, value in own.items() if name in found}
    absent = {key.replace(f".{adapter}", "") for key in not_loaded}
    return [name for name, value in own.items() if name in absent - set(found) and value.data_ptr() not in there]


def _check_complete(directory: Path, config: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    missing, unexpected = sorted(missing), sorted(unexpected)
    found = [
        f"{what} {len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in (("tensors that the model has no place for:", unexpected), ("tensors that it lacks:", missing))
        if names
    ]
    if any(name.endswith(".score.weight") for name in unexpected):
        raise UserError(
            f"the adapter in {directory} makes the model give scores: it neither speaks nor is merged here: measure it "
            "with --set training.objective=reward, or load it with AutoPeftModelForSequenceClassification"
        )
    if found:
        raise UserError(
            f"the adapter in {directory} does not fit this model: {'; '.join(found)}. It was trained on "
            f"{config.base_model_name_or_path or 'a model that it does not name'}: give that model, or save the adapter again"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
