"""messages: [{role, content}, ...], or conversations: [{from, value}, ...]; where there are any, system, history, tools (or
functions) and chat_template_kwargs."""

from __future__ import annotations

from typing import Any

from finetune.data.errors import DataError
from finetune.data.forms.base import Form, get
from finetune.data.forms.chat import CONTEXT, Chat, make_chat
from finetune.data.messages import parse_messages


def parse(row: dict[str, Any], place: str, chat: bool) -> Chat:
    key = "messages" if "messages" in row else "conversations"
    if row.get("conversations", row[key]) != row[key]:
        raise DataError(f'{place}: found "messages" and "conversations" that differ: keep one of them')
    messages, flags = parse_messages(get(row, key, list, place), key, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f'{place}: "{key}" has no message of the assistant: there is nothing to learn in it')
    return make_chat(row, messages, flags, place)


FORM = Form((("messages",), ("conversations",)), frozenset({"messages", "conversations", *CONTEXT}), parse)
