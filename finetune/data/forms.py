"""What a row may look like, checked and brought to one of four shapes: Chat, Pair, TextPiece, Tokens.

form               columns
messages           messages: [{role, content}, ...], or conversations: [{from, value}, ...]; tools
prompt_completion  prompt, completion: both strings, or both lists of messages
alpaca             instruction, output, and input where there is one
text               text
input_ids          input_ids; where there are any, labels (-100: not trained) and attention_mask (0: removed)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune.data.errors import DataError
from finetune.data.sources import TextPiece

FORMS = ("messages", "prompt_completion", "alpaca", "text", "input_ids")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
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
_JSON_TYPES = {
    str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the assistant's turns from index `trained_from` on are trained."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    trained_from: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the completion that is trained, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and labels of the same length; a label is an id or -100."""

    input_ids: list[int]
    labels: list[int]


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
    raise DataError(
        f'{place}: expected a row with "messages", "conversations", "prompt" and "completion", "instruction" and '
        f'"output", "text", or "input_ids"; found {found}: rename the columns'
    )


def parse(row: Any, form: str, place: str, *, chat: bool) -> Parsed:
    """Check one row of a known form.

    `chat`: the tokenizer has a chat template, through which Alpaca rows then go.
    Raises DataError naming `place`, the key, what was expected and what was found.
    """
    if isinstance(row, TextPiece):
        if form != "text":
            raise DataError(f'{place}: a .txt file holds plain text, but the form asked for is "{form}"')
        return row
    return _PARSERS[form](_object(row, place), place, chat)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected one JSON object, found {_kind(row)}")
    # Parquet and hub rows say null where JSON lines leave a key out.
    return {key: value for key, value in row.items() if value is not None}


def _kind(value: Any) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _get(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if key not in row:
        found = ", ".join(f'"{k}"' for k in list(row)[:12]) or "no keys"
        raise DataError(f'{place}: expected "{key}", found {found}')
    if not isinstance(row[key], kind):
        raise DataError(f'{place}: expected "{key}" to be {_JSON_TYPES[kind]}, found {_kind(row[key])}')
    return _text(row[key], key, place) if kind is str else row[key]


def _text(value: str, key: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}"
        raise DataError(f'{place}: "{key}" holds half of a surrogate pair at {where}: not text') from None
    return value


def _parse_messages(row: dict[str, Any], place: str, chat: bool) -> Chat:
    key = "messages" if "messages" in row else "conversations"
    messages = _messages(row, key, place)
    if key == "conversations" and isinstance(row.get("system"), str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f'{place}: "{key}" has no message of the assistant: there is nothing to learn in it')
    return Chat(messages, _tools(row, place))


def _messages(row: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    rows = _get(row, key, list, place)
    if not rows:
        raise DataError(f'{place}: "{key}" is an empty list')
    return [_message(message, f"{key}[{index}]", place) for index, message in enumerate(rows)]


def _message(message: Any, key: str, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f'{place}: expected {key} to be an object with "role" and "content", found {_kind(message)}')
    message = {k: value for k, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        role = _SHAREGPT_ROLES.get(speaker if isinstance(speaker, str) else None)
        if role is None:
            raise DataError(f"{place}: {key}.from: expected one of {', '.join(_SHAREGPT_ROLES)}, found {speaker!r}")
        message = {"role": role, "content": message.pop("value", None), **message}
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{place}: {key}.role: expected one of {', '.join(ROLES)}, found {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = _joined_parts(content, key, place)
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise DataError(f"{place}: expected {key}.content to be a string, found {_kind(content)}")
    if role == "assistant" and not content and not message.get("tool_calls"):
        raise DataError(f"{place}: {key}: the assistant's message is empty: remove the row or fill it")
    _text(content, f"{key}.content", place)
    return message


def _joined_parts(parts: list[Any], key: str, place: str) -> str:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DataError(f'{place}: {key}.content: expected parts of type "text", found {kind!r}')
    return "".join(part["text"] for part in parts)


def _tools(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # as datasets with columns of one type have it
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f'{place}: "tools" is a string that is not JSON: {error.msg}') from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f'{place}: expected "tools" to be a list of JSON schemas, found {_kind(tools)}')
    return tools or None


def _parse_prompt_completion(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        head, tail = _messages(row, "prompt", place), _messages(row, "completion", place)
        if not any(message["role"] == "assistant" for message in tail):
            raise DataError(f'{place}: "completion" has no message of the assistant')
        return Chat(head + tail, _tools(row, place), trained_from=len(head))
    prompt = _get(row, "prompt", str, place)
    completion = _get(row, "completion", str, place)
    if not completion:
        raise DataError(f'{place}: "completion" is empty: there is nothing to learn in the row')
    return Pair(prompt, completion)


def _parse_alpaca(row: dict[str, Any], place: str, chat: bool) -> Chat | Pair:
    instruction, output = _get(row, "instruction", str, place), _get(row, "output", str, place)
    context = _get(row, "input", str, place) if "input" in row else ""
    if not output:
        raise DataError(f'{place}: "output" is empty: there is nothing to learn in the row')
    if chat:
        question = f"{instruction}\n\n{context}" if context else instruction
        return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": output}])
    template = _ALPACA_INPUT if context else _ALPACA
    return Pair(template.format(instruction=instruction, input=context), output)


def _parse_text(row: dict[str, Any], place: str, chat: bool) -> TextPiece:
    text = _get(row, "text", str, place)
    if not text:
        raise DataError(f'{place}: "text" is empty')
    return TextPiece(text, first=True, last=True)


def _parse_tokens(row: dict[str, Any], place: str, chat: bool) -> Tokens:
    ids = _integers(row, "input_ids", place)
    labels = _integers(row, "labels", place) if "labels" in row else list(ids)
    mask = _integers(row, "attention_mask", place) if "attention_mask" in row else [1] * len(ids)
    if not ids:
        raise DataError(f'{place}: "input_ids" is an empty list')
    for key, values in (("labels", labels), ("attention_mask", mask)):
        if len(values) != len(ids):
            raise DataError(f'{place}: expected "{key}" as long as "input_ids" ({len(ids)}), found {len(values)}')
    if set(mask) - {0, 1}:
        raise DataError(f'{place}: expected "attention_mask" of 0 and 1, found {max(set(mask) - {0, 1})}')
    kept = [index for index, kept in enumerate(mask) if kept]
    return Tokens([ids[index] for index in kept], [labels[index] for index in kept])


def _integers(row: dict[str, Any], key: str, place: str) -> list[int]:
    values = _get(row, key, list, place)
    for index, value in enumerate(values):
        if type(value) is not int:
            raise DataError(f"{place}: expected {key}[{index}] to be an integer, found {_kind(value)}")
    return values


_PARSERS = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
    "input_ids": _parse_tokens,
}
