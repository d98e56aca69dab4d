"""Weight decay is for the parameters that Transformers' Trainer decays."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS

from finetune.config.training_options import TrainingOptions
from finetune.methods.weight_decay import undecayed

OPTIONS = TrainingOptions(weight_decay=0.1)


def make(name: str) -> torch.nn.Module:
    kind = tf.AutoModelForImageClassification if name == "vit" else tf.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(CONFIGS[name]())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_norms_and_biases_are_left_alone(name):
    model = make(name)
    names = dict(model.named_parameters())
    expected = names.keys() - set(tf.Trainer.get_decay_parameter_names(None, model))
    assert undecayed(model, names, OPTIONS) == expected
    assert expected and len(expected) < len(names)
    assert undecayed(model, names, OPTIONS.model_copy(update={"decay_norms_and_biases": True})) == set()
    assert undecayed(model, names, TrainingOptions()) == set()


def test_names_that_only_look_like_norms():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normal = torch.nn.Linear(2, 2, bias=False)
            self.q_norm = torch.nn.Linear(2, 2, bias=False)
            self.post = torch.nn.ModuleDict({"MyRMSNorm": torch.nn.Embedding(2, 2), "inner": torch.nn.LayerNorm(2)})
            self.norm = torch.nn.Parameter(torch.zeros(2))
            self.gate_bias = torch.nn.Parameter(torch.zeros(2))

    model = Other()
    names = dict(model.named_parameters())
    assert undecayed(model, names, OPTIONS) == names.keys() - set(tf.Trainer.get_decay_parameter_names(None, model))
    assert "normal.weight" not in undecayed(model, names, OPTIONS)


def test_matrices_of_an_adapter_are_decayed():
    model = get_peft_model(make("llama"), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(trained) <= set(tf.Trainer.get_decay_parameter_names(None, model))
    assert not undecayed(model, trained, OPTIONS)
