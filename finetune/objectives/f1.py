"""f1: how many words of the reference the completion lacks, and the other way round."""

from __future__ import annotations

import numpy as np

from finetune.objectives.generated import Generated
from finetune.objectives.rewards import call_reward, token_f1


class F1(Generated):
    """1 - mean F1 of what greedy decoding gives."""

    def value(self, prompts: list[str], completions: list[str], references: list[str]) -> float:
        return 1.0 - float(np.mean(call_reward(token_f1, prompts, completions, references)))
