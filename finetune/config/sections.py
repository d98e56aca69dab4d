"""The sections of a configuration, by name and in the order in which they are written: of all runs, of adapters, of methods, of
objectives."""

from __future__ import annotations

from finetune.adapters.registry import ADAPTERS
from finetune.config.engine_options import EngineOptions
from finetune.config.training_options import TrainingOptions
from finetune.data.options import DatasetOptions
from finetune.methods.registry import METHOD_SECTIONS
from finetune.objectives.registry import OBJECTIVE_SECTIONS
from finetune.options import Section
from finetune.plugin import load
from finetune.quantization.quantization_options import QuantizationOptions

ADAPTER_SECTIONS = {entry.section: entry.options for entry in ADAPTERS.values() if entry.section}

SECTIONS: dict[str, type[Section]] = {
    "training": TrainingOptions,
    "dataset": DatasetOptions,
    **{name: load(place) for name, place in (ADAPTER_SECTIONS | METHOD_SECTIONS | OBJECTIVE_SECTIONS).items()},
    "quantization": QuantizationOptions,
    "engine": EngineOptions,
}
