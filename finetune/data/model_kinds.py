"""What a model reads: text, whose next tokens it predicts, or rows of tensors, with a loss of its own."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress

import torch
from torch import nn

from finetune.data.cache import MASKED
from finetune.memory.errors import UserError
from finetune.offload.sizing.dry_run import walk
from finetune.offload.step.deferred_logits import DeferredLoss
from finetune.offload.weights.parts import ModelParts


def reads_text(parts: ModelParts) -> bool:
    """Whether the model's loss is that of the next token."""
    return _obstacle(parts) is None


def refuse_text(parts: ModelParts) -> None:
    """Raises UserError where text rows would not train the model on the next token."""
    obstacle = _obstacle(parts)
    if obstacle is not None:
        raise UserError(
            f"{parts.directory}: expected a causal language model for text, found {type(parts.model).__name__}, {obstacle}: "
            "give it rows of tensors whose columns are its forward's arguments (input_ids, labels, ...), or use another model"
        )


def taken_names(model: nn.Module) -> list[str]:
    """The arguments of the model's forward, and of its base model's where the one hands on what it does not name."""
    names: dict[str, None] = {}
    for module in (model, getattr(model, "base_model", None)):
        parameters = inspect.signature(module.forward).parameters.values() if module is not None else ()
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _obstacle(parts: ModelParts) -> str | None:
    model, config = parts.model, parts.model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if not name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "which predicts masked tokens" if name.endswith("ForMaskedLM") else "which predicts no next token"
    if "labels" not in taken_names(model):
        return "whose forward takes no labels"
    # Families of encoders have causal models that are so only where their configuration says it.
    is_family_of_encoders = any(other.endswith("ForMaskedLM") for other in vars(sys.modules[type(model).__module__]))
    if is_family_of_encoders and getattr(config, "is_decoder", True) is False:
        return "which sees the tokens that it is to predict unless config.json says is_decoder: true"
    if not _loss_is_of_the_next_token(parts):
        return "whose own loss compares each position with the label at that position, not with the next one"
    return None


def _loss_is_of_the_next_token(parts: ModelParts) -> bool:
    """What the model's own loss makes of four tokens, on placeholders; True where that can't be found out."""
    ids = torch.arange(1, 5)[None]
    loss = None
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):
        loss = walk(parts, parts.model, {"input_ids": ids, "labels": ids, "use_cache": False}, train=False).loss
    if not isinstance(loss, DeferredLoss):
        return True
    labels = loss.terms[0].labels
    return labels[labels != MASKED].equal(ids[0, 1:])
