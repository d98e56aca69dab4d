"""What a row may look like, checked and brought to one of four shapes: Chat, Pair, TextPiece, Tokens.

form               columns
messages           messages: [{role, content}, ...], or conversations: [{from, value}, ...]; where there are any, system,
                   history, tools (or functions) and chat_template_kwargs
prompt_completion  prompt, completion: both strings, or both lists of messages, which may have what messages may
alpaca             instruction, output, and input where there is one; with a chat template what messages may have
text               text
input_ids          input_ids; where there are any, labels (-100: not trained) or a mask of what is trained
                   (completion_mask, assistant_masks), and attention_mask (0: padding, removed)

A row that has the columns of several forms is of the first: input_ids, messages, conversations, prompt_completion, alpaca,
text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.messages import (
    Message,
    check_text,
    kind_of,
    parse_history,
    parse_messages,
    parse_system,
    parse_tools,
)
from finetune.data.sources import MEDIA, ROW_WEIGHTS, TextPiece

FORMS = ("messages", "prompt_completion", "alpaca", "text", "input_ids")

# https://github.com/tatsu-lab/stanford_alpaca#data-release
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_NAMES = {str: "a string", list: "a list", dict: "an object"}
# Columns that belong to a conversation.
_CONTEXT = ("system", "history", "tools", "functions", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. trained: indices of the assistant's turns that are trained. excludes: the row says of a message that it
    is not to be trained. options: what the row gives the chat template beside messages and tools."""

    messages: list[Message]
    trained: list[int]
    excludes: bool = False
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the completion that is trained, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and labels of the same length; a label is an id or -100."""

    input_ids: list[int]  # as they stand in the row
    labels: list[int]  # -100: not trained


Parsed = Chat | Pair | TextPiece | Tokens


def detect_form(row: Any, place: str) -> str:
    """The form of a file, from its first row."""
    if isinstance(row, TextPiece):
        return "text"
    keys = _object(row, place).keys()
    for form, needed in (
        ("input_ids", {"input_ids"}),
        ("messages", {"messages"}),
        ("messages", {"conversations"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if needed <= keys:
            return form
    found = ", ".join(f'"{key}"' for key in list(row)[:12]) or "no keys"
    if {"chosen", "rejected"} <= keys:
        raise DataError(
            f"{place}: found pairs of a chosen and a rejected answer, which are not trained on here: write the prompt with the "
            'chosen one as "prompt" and "completion", or as "messages"'
        )
    inner = next(
        (key for key, value in row.items() if isinstance(value, list) and value[:1] and _is_row(value[0])), None
    )
    todo = "rename the columns" if inner is None else f'write the list under "{inner}" alone to the file'
    raise DataError(
        f'{place}: expected a row with "messages", "conversations", "prompt" and "completion", "instruction" and '
        f'"output", "text", or "input_ids"; found {found}: {todo}'
    )


def _is_row(value: Any) -> bool:
    try:
        return isinstance(value, dict) and bool(detect_form(value, ""))
    except DataError:
        return False


def parse(row: Any, form: str, place: str, *, chat: bool) -> Parsed:
    """Check one row of a known form.

    `chat`: the tokenizer has a chat template, through which Alpaca rows then go.
    Raises DataError naming `place`, the key, what was expected and what was found.
    """
    if isinstance(row, TextPiece):
        if form != "text":
            raise DataError(f'{place}: a .txt file holds plain text, but the form asked for is "{form}"')
        return row
    row = _object(row, place)
    if form not in ("text", "input_ids") and (media := sorted(key for key in MEDIA & row.keys() if row[key])):
        raise DataError(f'{place}: found "{media[0]}": only text is trained on here: remove the column, or the rows')
    _refuse_weights(row, place)
    if row.get("label") is False and form not in ("text", "input_ids"):
        raise DataError(
            f'{place}: found "label" false, which marks an unwanted answer (TRL\'s KTO). It would be learned like any '
            "other: leave such rows out"
        )
    return _PARSERS[form](row, place, chat)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected one JSON object, found {kind_of(row)}")
    # Parquet and hub rows say null where JSON lines leave a key out.
    return {key: value for key, value in row.items() if value is not None}


def _get(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if key not in row:
        found = ", ".join(f'"{k}"' for k in list(row)[:12]) or "no keys"
        raise DataError(f'{place}: expected "{key}", found {found}')
    if not isinstance(row[key], kind):
        raise DataError(f'{place}: expected "{key}" to be {_NAMES[kind]}, found {kind_of(row[key])}')
    return check_text(row[key], key, place) if kind is str else row[key]


def _refuse_weights(row: dict[str, Any], place: str) -> None:
    for key in ROW_WEIGHTS.intersection(row):
        values = row[key] if isinstance(row[key], list) else [row[key]]
        if any(isinstance(value, (int, float)) and value != 1 for value in values):
            raise DataError(f'{place}: found "{key}" {row[key]!r}, but all rows and tokens have equal weight here: remove it')


def _parse_messages(row: dict[str, Any], place: str, chat: bool) -> Chat:
    key = "messages" if "messages" in row else "conversations"
    if row.get("conversations", row[key]) != row[key]:
        raise DataError(f'{place}: found "messages" and "conversations" that differ: keep one of them')
    messages, flags = parse_messages(_get(row, key, list, place), key, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f'{place}: "{key}" has no message of the assistant: there is nothing to learn in it')
    return _chat(row, messages, flags, place)


def _chat(row: dict[str, Any], messages: list[Message], flags: list[bool], place: str) -> Chat:
    """The conversation with what the row's other columns say of it."""
    system, history = parse_system(row, place), parse_history(row, place)
    if messages[0]["role"] == "system":
        if system and system[0]["content"] != messages[0]["content"]:
            raise DataError(f'{place}: found "system" and a first message of the system that differ: keep one of them')
        system, messages, flags = messages[:1], messages[1:], flags[1:]
    options = row.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or {"messages", "tools", "add_generation_prompt"} & options.keys():
        raise DataError(f'{place}: expected "chat_template_kwargs" to be an object of options, found {options!r:.80}')
    messages, flags = [*system, *history, *messages], [True] * len(system + history) + flags
    trained = [i for i, one in enumerate(messages) if one["role"] == "assistant" and flags[i]]
    return Chat(messages, trained, not all(flags), parse_tools(row, place), options)


def _refuse_context(row: dict[str, Any], place: str, remedy: str) -> None:
    if found := [key for key in _CONTEXT if row.get(key)]:
        raise DataError(f'{place}: "{found[0]}" belongs to a conversation, and this row is none: {remedy}')


def _parse_prompt_completion(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        head, head_flags = parse_messages(prompt, "prompt", place)
        tail, tail_flags = parse_messages(completion, "completion", place)
        if not any(message["role"] == "assistant" for message in tail):
            raise DataError(f'{place}: "completion" has no message of the assistant')
        parsed = _chat(row, head + tail, head_flags + tail_flags, place)
        # What is before the completion is given, history too.
        return replace(parsed, trained=[i for i in parsed.trained if i >= len(parsed.messages) - len(tail)])
    prompt = _get(row, "prompt", str, place)
    completion = _get(row, "completion", str, place)
    if not completion:
        raise DataError(f'{place}: "completion" is empty: there is nothing to learn in the row')
    _refuse_context(row, place, "give prompt and completion as lists of messages, or write it into the prompt")
    return Pair(prompt, completion)


def _parse_alpaca(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    instruction, output = _get(row, "instruction", str, place), _get(row, "output", str, place)
    context = _get(row, "input", str, place) if "input" in row else ""
    if not output:
        raise DataError(f'{place}: "output" is empty: there is nothing to learn in the row')
    if chat:
        question = f"{instruction}\n\n{context}" if context else instruction
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _chat(row, messages, [True, True], place)
    _refuse_context(row, place, "give a chat_template, through which such rows then go")
    template = _ALPACA_INPUT if context else _ALPACA
    return Pair(template.format(instruction=instruction, input=context), output)


def _parse_text(row: dict[str, Any], place: str, chat: bool) -> TextPiece:
    text = _get(row, "text", str, place)
    if not text:
        raise DataError(f'{place}: "text" is empty')
    return TextPiece(text, first=True, last=True)


def _parse_tokens(row: dict[str, Any], place: str, chat: bool) -> Tokens:
    ids = _integers(row, "input_ids", place)
    if not ids:
        raise DataError(f'{place}: "input_ids" is an empty list')
    labels = _same_length(row, "labels", ids, place) or list(ids)
    if "loss_mask" in row:
        raise DataError(
            f'{place}: found "loss_mask", which some tools align with the next token: write "labels" (-100: not trained) or '
            '"completion_mask", as long as "input_ids" and aligned with them'
        )
    for key in ("completion_mask", "assistant_masks"):
        if trained := _mask(row, key, ids, place):
            if "labels" in row:
                raise DataError(
                    f'{place}: found "labels" and "{key}", which both say what is trained: keep one of them'
                )
            labels = [label if one else MASKED for label, one in zip(labels, trained, strict=True)]
    kept = _mask(row, "attention_mask", ids, place) or [1] * len(ids)
    start, end = kept.index(1) if 1 in kept else 0, len(kept) - kept[::-1].index(1) if 1 in kept else 0
    if not all(kept[start:end]):
        where = start + kept[start:end].index(0)
        raise DataError(
            f"{place}: attention_mask[{where}] is 0 between tokens that are attended to: only padding at the ends can be "
            "left out"
        )
    return Tokens(ids[start:end], labels[start:end])


def _same_length(row: dict[str, Any], key: str, ids: list[int], place: str) -> list[int] | None:
    values = _integers(row, key, place) if key in row else None
    if values is not None and len(values) != len(ids):
        raise DataError(f'{place}: expected "{key}" as long as "input_ids" ({len(ids)}), found {len(values)}')
    return values


def _mask(row: dict[str, Any], key: str, ids: list[int], place: str) -> list[int] | None:
    values = _same_length(row, key, ids, place)
    if values is not None and set(values) - {0, 1}:
        raise DataError(f'{place}: expected "{key}" of 0 and 1, found {max(set(values) - {0, 1})}')
    return values


def _integers(row: dict[str, Any], key: str, place: str) -> list[int]:
    values = _get(row, key, list, place)
    for index, value in enumerate(values):
        if type(value) is not int and not (key.endswith(("mask", "masks")) and type(value) is bool):
            raise DataError(f"{place}: expected {key}[{index}] to be an integer, found {kind_of(value)}")
    return values


_PARSERS = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
    "input_ids": _parse_tokens,
}
