"""The sign of the gradient, without state: theta = (1 - lr wd) theta - lr sign(g)."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.offload.update.rules.rule import Rule


@dataclass(frozen=True, kw_only=True)
class SignSgd(Rule):
    kernel = "signsgd"
