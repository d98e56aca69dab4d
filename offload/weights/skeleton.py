"""The model without its weights: built on the meta device, from config.json alone.

Parameters become placeholders: one NaN expanded to the full shape, so they cost nothing, have the right device and dtype
for PEFT, and a forgotten bind gives NaN instead of a plausible number. Buffers that no checkpoint carries (rotary
tables, scales) get their real values from the model's own initialisation.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.memory.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What Transformers' code raises on values in config.json that it does not check.
_WRONG_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read_config(directory: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises UserError for a config.json that Transformers can't read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, StrictDataclassError, *_WRONG_VALUES) as error:
        raise UserError(f"cannot read the model's configuration in {directory}: {' '.join(str(error).split())}") from error


def build_on_meta(
    config: PretrainedConfig, directory: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """The architecture that `config`, of `directory`, names: all tensors on meta, in eval mode. Linear layers are
    Transformers' own whatever their weights are packed in. Raises UserError when it is unknown."""
    from transformers import AutoModelForCausalLM, initialization

    architectures = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    model_class = _model_class(config, architectures, directory)
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        if model_class is not None:
            try:
                model = model_class._from_config(config, dtype=dtype)
            except _WRONG_VALUES as error:
                raise UserError(
                    f"{directory / 'config.json'}: Transformers cannot make {architectures[0]} of it "
                    f"({type(error).__name__}: {' '.join(str(error).split())}): correct it, or download the model again"
                ) from error
        else:
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            except ValueError as error:
                raise UserError(
                    f"{directory}: Transformers has no class for architectures={architectures}. If the checkpoint brings "
                    f"its own code and you trust it, pass --trust-remote-code. ({error})"
                ) from error
    for module in model.modules():
        # A pass keeps no keys and values unless it is asked to: a block that is recomputed would add them a second time.
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    return model.eval()


def _model_class(config: Any, architectures: Sequence[str], directory: Path) -> Any:
    """The class of Transformers that config.json asks for; None where there is none of that name."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    model_class = getattr(transformers, architectures[0], None) if architectures else None
    is_other_model = model_class is not None and not isinstance(config, model_class.config_class or object)
    is_bare = model_class is MODEL_MAPPING.get(type(config), ())  # saved without a head, which may be the embedding
    if is_other_model and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{directory / 'config.json'}: model_type is {config.model_type}, but architectures names {architectures[0]}, "
            "a class of another model: correct the one that is wrong"
        )
    if (is_other_model or is_bare) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # as AutoModelForCausalLM, which goes by model_type
    return model_class


def build_scorer(config: PretrainedConfig, directory: Path, dtype: torch.dtype) -> nn.Module:
    """As `build_on_meta`, with a linear layer `score` of one output in place of the vocabulary's: the model that
    `AutoModelForSequenceClassification` makes with num_labels=1. Raises UserError where there is none."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    architectures = list(getattr(config, "architectures", None) or [])
    if kind is not None and architectures == [kind.__name__] and config.num_labels != 1:
        raise UserError(f"{directory}: expected a model with one label, which is its score, found {config.num_labels} labels")
    if kind is not None:
        config.num_labels, config.architectures = 1, [kind.__name__]
        model = build_on_meta(config, directory, dtype)
        if isinstance(getattr(model, "score", None), nn.Linear):
            return model
    raise UserError(
        f"{directory}: expected a language model that Transformers can give a scalar head, a linear layer named score, found "
        f"{config.model_type}"
    )


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers, outermost first found, in module order: fqn -> module.

    A block is a Transformers `GradientCheckpointingLayer` inside a module list; for code that has none, the elements of
    the module list with the most parameters.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in blocks)
        if isinstance(module, GradientCheckpointingLayer) and not inside and name.rpartition(".")[2].isdigit():
            blocks[name] = module
    if blocks:
        return blocks
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no repeated layers to stream: expected layers in an nn.ModuleList, found none"
        )
    name, largest = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(largest)}


def input_table(model: nn.Module) -> nn.Module | None:
    """What makes vectors of a model's inputs; None where there is no one of it, as in models of two towers."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def dtype_plan(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameter fqn -> the dtype `from_pretrained(dtype=dtype)` would give it (some modules insist on fp32)."""
    patterns = {re.compile(key.replace("*", r".*")): value for key, value in model._get_dtype_plan(dtype).items()}
    plan = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        chosen = next((value for pattern, value in patterns.items() if pattern.search(name)), dtype)
        plan[name] = chosen if parameter.is_floating_point() else parameter.dtype
    return plan


def set_placeholders(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Replaces every parameter by a placeholder and gives non-persistent buffers their values (on the CPU)."""
    nan = {dtype: torch.full((), float("nan")).to(dtype) for dtype in set(dtypes.values())}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        placeholder = nn.Parameter(nan[dtypes[name]].expand(parameter.shape), requires_grad=False)
        placeholder._is_hf_initialized = True
        _owner(model, name)._parameters[name.rpartition(".")[2]] = placeholder
    persistent = set(model.state_dict())
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        value = torch.empty_like(buffer, device="cpu")
        value._is_hf_initialized = name in persistent
        _owner(model, name)._buffers[name.rpartition(".")[2]] = value
    model.initialize_weights()


def draw_scores(model: nn.Module, seed: int) -> None:
    """Gives `score` the values that Transformers gives it after `torch.manual_seed(seed)` where a checkpoint lacks it."""
    placeholder = model.score.weight
    model.score.weight = nn.Parameter(torch.empty(placeholder.shape, dtype=placeholder.dtype), requires_grad=False)
    torch.manual_seed(seed)
    model._init_weights(model.score)


def is_placeholder(parameter: torch.Tensor) -> bool:
    """Whether a parameter has a shape and no memory behind it."""
    return parameter.numel() > 1 and parameter.untyped_storage().nbytes() < parameter.nbytes


def cache_argument(model: nn.Module) -> str:
    """The keyword under which the model's forward takes a key-value cache; Transformers has renamed it within version 5."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
