"""Messages of a conversation, checked and brought to the keys that chat templates read: role, content, tool_calls.

What else a message says of itself is honoured here, or refused by name:

key                              meaning
weight, train, training, loss    0 or false: the assistant's turn is context, not something to learn (OpenAI's, axolotl's,
                                 ms-swift's files); 1 or true: it is trained, as without the key
from, value                      role and content, as ShareGPT has them
function_call                    one tool call, as OpenAI had them before tool_calls
"""

from __future__ import annotations

import json
from typing import Any

from finetune.data.errors import DataError
from finetune.data.json_rows import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # speakers whose text is a call
_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_weight")
_REFUSED = {
    **dict.fromkeys(
        ("train_detail", "training_detail", "mask", "masked", "loss_mask", "ignore"),
        'a turn is trained as a whole or not at all: use "weight"',
    ),
    **dict.fromkeys(("image", "images", "video", "videos", "audio"), "only text is trained on here: remove the row"),
    "refusal": 'write it as "content"',
}
_JSON_TYPES = {
    str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip


def kind_of(value: Any) -> str:
    return "NaN" if value != value else _JSON_TYPES.get(type(value), type(value).__name__)


def check_text(value: str, key: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}"
        raise DataError(f'{place}: "{key}" holds half of a surrogate pair at {where}: not text') from None
    return value


def parse_messages(rows: list[Any], key: str, place: str) -> tuple[list[Message], list[bool]]:
    """The messages under `key`, and which of them are not marked as mere context.

    Raises DataError naming place, key, what was expected and what was found.
    """
    if not rows:
        raise DataError(f'{place}: "{key}" is an empty list')
    parsed = [_message(row, f"{key}[{index}]", place) for index, row in enumerate(rows)]
    return [message for message, _ in parsed], [is_trained for _, is_trained in parsed]


def _message(row: Any, key: str, place: str) -> tuple[Message, bool]:
    if not isinstance(row, dict):
        raise DataError(f'{place}: expected {key} to be an object with "role" and "content", found {kind_of(row)}')
    message = _with_role({k: value for k, value in row.items() if value is not None}, key, place)
    for name in _REFUSED.keys() & message.keys():
        if message[name]:
            raise DataError(f'{place}: {key} has "{name}", which is not known here: {_REFUSED[name]}')
        del message[name]
    is_trained = _flag(message, key, place)
    _gather_calls(message, key, place)
    content, role = message.get("content"), message["role"]
    if isinstance(content, list):
        content = message["content"] = _joined_parts(content, key, place)
    if content is None and message.get("tool_calls"):
        return message, is_trained
    if not isinstance(content, str):
        raise DataError(f"{place}: expected {key}.content to be a string, found {kind_of(content)}")
    if role == "assistant" and not content and not message.get("tool_calls"):
        raise DataError(f"{place}: {key}: the assistant's message is empty: remove the row or fill it")
    check_text(content, f"{key}.content", place)
    return message, is_trained


def _with_role(message: Message, key: str, place: str) -> Message:
    name = "role" if "role" in message else "from"
    speaker = message.pop(name, None)
    if name == "from" and speaker is not None:
        message = {"content": message.pop("value", None), **message}
        if speaker in _CALLS:
            message["function_call"] = message.pop("content")
    role = speaker if speaker in ROLES and name == "role" else None
    if role is None and isinstance(speaker, str):
        role = _SHAREGPT_ROLES.get(speaker)
    if role is None:
        known = ROLES if name == "role" or speaker is None else _SHAREGPT_ROLES
        name = "role" if speaker is None else name
        raise DataError(f"{place}: {key}.{name}: expected one of {', '.join(known)}, found {speaker!r}")
    return {"role": role, **message}


def _flag(message: Message, key: str, place: str) -> bool:
    """Takes out what the message says about being trained."""
    said: dict[str, bool] = {}
    for name in _FLAGS:
        value = message.pop(name, None)
        if value is None:
            continue
        if not (isinstance(value, int | float) and value in (0, 1)):
            raise DataError(f"{place}: {key}.{name}: expected 0 or 1 (false or true), found {value!r}")
        # OpenAI's weight of 1 is what every message has; a flag set on another's message asks for more.
        if value and name != "weight" and message["role"] != "assistant":
            raise DataError(f'{place}: {key} has "{name}" set, but only turns of the assistant are trained here')
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"{place}: {key}: {' and '.join(said)} contradict each other: keep one of them")
    return all(said.values())


def _joined_parts(parts: list[Any], key: str, place: str) -> str:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise DataError(f'{place}: {key}.content: expected parts of type "text", found {kind!r}')
    return "".join(part["text"] for part in parts)


def _gather_calls(message: Message, key: str, place: str) -> None:
    calls = message.pop("tool_calls", None)
    if "function_call" in message:
        call = _decoded(message.pop("function_call"), f"{key}.function_call", place)
        calls = [*(calls or []), *(call if isinstance(call, list) else [call])]
    if not calls:
        return
    calls = _decoded(calls, f"{key}.tool_calls", place)
    if not isinstance(calls, list):
        raise DataError(f"{place}: expected {key}.tool_calls to be a list, found {kind_of(calls)}")
    message["tool_calls"] = [_call(call, f"{key}.tool_calls[{i}]", place) for i, call in enumerate(calls)]


def _call(call: Any, key: str, place: str) -> dict[str, Any]:
    """A call as {"type": "function", "function": {"name", "arguments"}, ...}; arguments an object, or a string with one."""
    if isinstance(call, dict) and "function" not in call:
        inner = {name: call[name] for name in ("name", "arguments", "parameters") if name in call}
        call = {"type": "function", **{k: v for k, v in call.items() if k not in inner}, "function": inner}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{place}: expected {key} to be a call with a "name" and "arguments", found {call!r:.80}')
    function = dict(function)
    arguments = function.setdefault("arguments", function.pop("parameters", None))
    if arguments is None or arguments == "":
        arguments = function["arguments"] = {}
    if not isinstance(_decoded(arguments, f"{key}.arguments", place), dict):
        raise DataError(f"{place}: expected {key}.arguments to be an object, found {kind_of(arguments)}")
    return {**{k: v for k, v in call.items() if v is not None}, "function": function}


def _decoded(value: Any, key: str, place: str) -> Any:
    """What a string of JSON holds, and anything else as it is. Raises DataError for what is not JSON, such as NaN."""
    what = "a string that is not JSON" if isinstance(value, str) else "not JSON"
    try:
        value = parse_json(value) if isinstance(value, str) else value
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise DataError(f"{place}: {key} is {what}: {error}") from None
    return value


def parse_tools(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    """JSON schemas of the functions that may be called, from `tools` or, as OpenAI had them before, `functions`."""
    found = {}
    for name in ("tools", "functions"):
        tools = row.get(name)
        if isinstance(tools, str):  # as datasets with columns of one type have it
            try:
                tools = parse_json(tools) if tools.strip() else None
            except ValueError as error:
                raise DataError(f'{place}: "{name}" is a string that is not JSON: {error}') from None
        if not tools:
            continue
        tools = [tools] if isinstance(tools, dict) else tools
        if isinstance(tools, list):
            tools = [_decoded(tool, f"{name}[{i}]", place) for i, tool in enumerate(tools)]
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise DataError(f'{place}: expected "{name}" to be a list of JSON schemas, found {kind_of(tools)}')
        found[name] = [as_tool(tool) for tool in tools] if name == "functions" else tools
    if len(found) == 2:
        raise DataError(f'{place}: found both "tools" and "functions": keep one of them')
    return next(iter(found.values()), None)


def as_tool(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as templates expect it, a function within a tool."""
    return schema if "function" in schema else {"type": "function", "function": schema}


def tool_name(tool: dict[str, Any]) -> str | None:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def parse_history(row: dict[str, Any], place: str) -> list[Message]:
    """Earlier turns, pairs of what the user and what the assistant said, as LLaMA-Factory has them."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise DataError(f'{place}: expected "history" to be a list, found {kind_of(pairs)}')
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) and one for one in pair)):
            raise DataError(f"{place}: expected history[{index}] to be a pair of strings, found {pair!r:.80}")
        for one in pair:
            check_text(one, f"history[{index}]", place)
    roles = ("user", "assistant")
    return [{"role": role, "content": one} for pair in pairs for role, one in zip(roles, pair, strict=True)]


def parse_system(row: dict[str, Any], place: str) -> list[Message]:
    system = row.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise DataError(f'{place}: expected "system" to be a string, found {kind_of(system)}')
    return [{"role": "system", "content": check_text(system, "system", place)}]
