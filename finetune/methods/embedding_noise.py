"""NEFTune: noise in embeddings while a model trains (Jain et al. 2023, algorithm 1), by Transformers' own hook.

It is drawn where the model's forward looks up its tokens, from the generator of the lane: the same numbers wherever weights and
hidden states are, and those of a plain loop. Blocks that are recomputed get what they got.
"""

from __future__ import annotations

from torch import nn

from finetune.adapters.peft_files import base_of
from finetune.memory.errors import UserError


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """model: bare, or with an adapter around it. In eval mode it changes nothing. Raises UserError for one without tokens."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embeddings = model.get_input_embeddings()
    if not isinstance(base_of(embeddings) or embeddings, nn.Embedding):
        raise UserError(
            "training.neftune_noise_alpha: expected a model that looks up embeddings of tokens, found one whose inputs go "
            f"through {type(embeddings).__name__}"
        )
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)
