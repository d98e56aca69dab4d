"""Tuners that PEFT lacks, as PEFT has its own: importing this package registers them, and PEFT makes, saves and loads adapters
of these types from then on. It needs PEFT alone, nothing else of this project."""

from finetune.peft_tuners.dynmole import DynMoleConfig, DynMoleModel
from finetune.peft_tuners.mixlora import MixLoraConfig, MixLoraModel
from finetune.peft_tuners.mos import MosConfig, MosModel
from finetune.peft_tuners.registration import register

__all__ = ["DynMoleConfig", "DynMoleModel", "MixLoraConfig", "MixLoraModel", "MosConfig", "MosModel"]

register("mixlora", MixLoraConfig, MixLoraModel)
register("dynmole", DynMoleConfig, DynMoleModel)
register("mos", MosConfig, MosModel)
