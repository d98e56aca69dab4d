"""LoRA initialisations that take their first values out of the base: PiSSA and OLoRA.

[Note: residuals]
PEFT decomposes a weight W, gives the adapter A and B of it, and puts W - s B A in W's place. Here W stays in its files, and
the difference is computed when W is decoded (`offload/weights/formats/residual.py`): the same operations, so the same bits, and
nothing of the base is written. A and B as they were at first are kept in the run's `initial-adapter`, since a decomposition may
come out otherwise on another machine. The adapter that a run leaves is PEFT's conversion
(`path_initial_model_for_weight_conversion`): B A less the first B A, of twice the rank, for the base as it is.

Sources: Meng et al. 2024 (PiSSA), Büyükakyüz 2024 (OLoRA); `subtract_mutated_init` of `peft/tuners/lora/model.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.seal import CONFIG, WEIGHTS
from finetune.memory.errors import UserError
from finetune.objectives.registry import trains_beside_reference
from finetune.offload.files.new_directory import new_directory
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.formats.residual import Initial, ResidualWeight
from finetune.offload.weights.parts import ModelParts

INITIAL = "initial-adapter"
_NAME = "residual_initial"


def check_beside(arguments: Mapping[str, Any], config: Any) -> None:
    """Raises UserError for what cannot go with such an initialisation. arguments: of `peft.LoraConfig`."""
    word = arguments["init_lora_weights"]
    if config.method != "lora":
        raise UserError(f"lora.init_lora_weights {word}: expected method lora, found {config.method}")
    if trains_beside_reference(config):
        raise UserError(
            f"lora.init_lora_weights {word}: training.objective {config.objective} compares with the model without its "
            "adapter, which lacks what the adapter began with: use another initialisation"
        )
    for key in ("use_dora", "lora_bias", "target_parameters", "use_bdlora", "ensure_weight_tying"):
        if arguments.get(key):
            raise UserError(f"lora.init_lora_weights {word}: PEFT's conversion to an adapter of the base knows no {key}")
    if arguments.get("use_rslora") and (arguments.get("rank_pattern") or arguments.get("alpha_pattern")):
        raise UserError(f"lora.init_lora_weights {word}: PEFT's conversion has no rsLoRA with rank_pattern or alpha_pattern")


@contextmanager
def keeping_first_values() -> Iterator[None]:
    """Inside, layers that PEFT makes keep the values that it subtracts from the base: it rounds those of the adapter to the
    base's dtype afterwards."""
    from peft.tuners.lora import LoraLayer

    kept = {name: getattr(LoraLayer, name) for name in ("pissa_init", "olora_init")}

    def keeping(init: Callable[..., None]) -> Callable[..., None]:
        def run(layer: Any, adapter: str, *arguments: Any) -> None:
            init(layer, adapter, *arguments)
            matrices = (matrix[adapter].weight.detach().clone() for matrix in (layer.lora_A, layer.lora_B))
            layer.add_module(_NAME, Initial(*matrices, layer.scaling[adapter]))

        return run

    try:
        for name, init in kept.items():
            setattr(LoraLayer, name, keeping(init))
        yield
    finally:
        for name, init in kept.items():
            setattr(LoraLayer, name, init)


def with_residuals(parts: ModelParts, adapted: nn.Module) -> ModelParts:
    """The parts with the weights that PEFT has changed less the adapter's first values, which the layers keep.

    Raises UserError for weights of which that cannot be.
    """
    sources = copy.copy(parts.sources)
    layers = {name: module for name, module in adapted.named_modules() if "default" in getattr(module, "lora_A", ())}
    for name, module in layers.items():
        base, parameter = module.get_base_layer(), f"{name.removeprefix('base_model.model.')}.weight"
        old = sources[parameter]
        if not isinstance(old, PlainTensor) or type(base) is not nn.Linear:
            raise UserError(
                f"lora.init_lora_weights: {parameter} is stored as {getattr(old, 'word', 'packed numbers')}, of a "
                f"{type(base).__name__}: expected a linear layer in 16 or 32 bits, for PEFT subtracts from these alone"
            )
        if parameter in sources.tied or parameter in sources.tied.values():
            raise UserError(f"lora.init_lora_weights: {parameter} is tied to another weight, which would change too")
        if _NAME not in module._modules:  # of a plan
            matrices = (matrix["default"].weight for matrix in (module.lora_A, module.lora_B))
            module.add_module(_NAME, Initial(*(torch.zeros(matrix.shape) for matrix in matrices), module.scaling["default"]))
        module._modules[_NAME].dtype = base.weight.dtype
        sources[parameter] = ResidualWeight(old, module._modules[_NAME])
    return parts.on(parts.checkpoint, sources)


def initials(model: nn.Module) -> dict[str, Initial]:
    """By the name that the layer has in files of adapters."""
    end = f".{_NAME}"
    return {name.removesuffix(end): module for name, module in model.named_modules() if name.endswith(end)}


def write_initial(model: nn.Module, run: Path) -> None:
    """Keeps the first values in a run's directory. Raises UserError: the disk is full."""
    from safetensors.torch import save_file

    values = _values(model)
    try:
        with new_directory(run / INITIAL) as temporary:
            save_file(values, temporary / WEIGHTS)
    except OSError as error:
        raise UserError(f"cannot write {run / INITIAL}: {error.strerror or error}. Make room, and start again") from error


def read_initial(model: nn.Module, run: Path) -> None:
    """Sets the first values to those that the run has kept. Raises UserError where they are not there."""
    from safetensors.torch import load_file

    path, expected = run / INITIAL / WEIGHTS, _values(model)
    try:
        found = load_file(path)
    except Exception as error:  # safetensors' own, and the system's
        raise UserError(f"{path} can't be read, and the run needs it: bring it back from a copy ({error})") from error
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in expected.items()}:
        raise UserError(f"{path} is not of this run's adapter: bring it back from a copy")
    for name, value in expected.items():
        value.copy_(found[name])


def convert(model: nn.Module, directory: Path) -> None:
    """Makes the adapter that PEFT has just written to `directory` one of the base as it is, see [Note: residuals]."""
    from safetensors.torch import load_file, save_file

    first, path = _values(model), directory / WEIGHTS
    if not first:
        return
    values, dtypes = load_file(path), {name: layer.dtype for name, layer in initials(model).items()}
    for name, value in first.items():
        # As the adapter began: PEFT rounds it to the base's dtype.
        value = value.cpu().to(dtypes[name.rpartition(".lora_")[0]]).to(values[name].dtype)
        both = [values[name], value] if ".lora_A." in name else [values[name], -value]
        values[name] = torch.cat(both, dim=0 if ".lora_A." in name else 1)
    save_file(values, path, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    config |= {"init_lora_weights": True, "r": 2 * config["r"]}
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name: 2 * value for name, value in (config[key] or {}).items()}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, initial in initials(model).items():
        found |= {f"{name}.lora_A.weight": initial.one, f"{name}.lora_B.weight": initial.other}
    return found
