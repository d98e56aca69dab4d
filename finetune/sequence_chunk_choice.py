"""`engine.sequence_chunk: auto`: whole texts where they fit, else the most tokens of a text at a time that do.

Chunks round otherwise than whole texts. So nothing is cut unless a run says auto or a number. What auto has chosen is
printed with the plan and recorded with the run: a run that goes on keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.plan import PlanRefused

if TYPE_CHECKING:
    from finetune.session import Session

LEAST_CHUNK = 256  # tokens of a text that compute together: fewer make products slow and save little


def chunk_sizes(longest: int) -> list[int]:
    """Of texts of at most so many tokens, from small to large."""
    return [LEAST_CHUNK << i for i in range(longest.bit_length()) if LEAST_CHUNK << i < longest]


def settle_sequence_chunk(
    session: Session, plan: Callable[[Config], Any], recorded: int | None = None, longest: int | None = None
) -> bool:
    """The session's configuration says a number, or None, afterwards. Whether it was left open, and texts are cut.

    plan: of the run, for a configuration that the session has settled on. recorded: what a run that goes on began with; None:
    it begins, or texts were whole. longest: text, in tokens; None: `dataset.sequence_length`.
    Raises PlanRefused where not even the smallest chunk fits.
    """
    config = session.config
    if config.engine.sequence_chunk != "auto":
        return False
    if recorded is not None:
        session.settle(_with_chunk(config, recorded))
        return True
    sizes = chunk_sizes(config.dataset.sequence_length if longest is None else longest)
    refused = _refusal(session, plan, None)
    if refused is None or not sizes:
        return False  # the plan that follows is refused
    try:
        smallest = _refusal(session, plan, sizes[0])
    except UserError as error:  # of a model whose texts can't be cut
        session.settle(_with_chunk(config, None))
        raise refused.noting(f"engine.sequence_chunk: auto does not help: {error}") from None
    if smallest is not None:
        raise smallest
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _refusal(session, plan, sizes[middle]) is None else (low, middle)
    session.settle(_with_chunk(config, sizes[low]))
    return True


def _refusal(session: Session, plan: Callable[[Config], Any], chunk: int | None) -> PlanRefused | None:
    """None: it fits. The session has settled on this chunk."""
    session.settle(_with_chunk(session.config, chunk))
    try:
        plan(session.config)
    except PlanRefused as refused:
        return refused
    return None


def _with_chunk(config: Config, chunk: int | None) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"sequence_chunk": chunk})})
