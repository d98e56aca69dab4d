"""instruction, output, and input where there is one; with a chat template what messages may have.

The wording without a chat template is https://github.com/tatsu-lab/stanford_alpaca#data-release.
"""

from __future__ import annotations

from typing import Any

from finetune.data.errors import DataError
from finetune.data.forms.base import Form, get
from finetune.data.forms.chat import CONTEXT, Chat, make_chat, refuse_context
from finetune.data.forms.prompt_completion import Pair

_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def parse(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    instruction, output = get(row, "instruction", str, place), get(row, "output", str, place)
    context = get(row, "input", str, place) if "input" in row else ""
    if not output:
        raise DataError(f'{place}: "output" is empty: there is nothing to learn in the row')
    if chat:
        question = f"{instruction}\n\n{context}" if context else instruction
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return make_chat(row, messages, [True, True], place)
    refuse_context(row, place, "give a chat_template, through which such rows then go")
    template = _PROMPT_WITH_INPUT if context else _PROMPT
    return Pair(template.format(instruction=instruction, input=context), output)


FORM = Form((("instruction", "output"),), frozenset({"instruction", "input", "output", *CONTEXT}), parse)
