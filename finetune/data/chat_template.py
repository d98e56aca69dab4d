"""Conversations to text through a chat template, and which of it a model would say.

[Note: what a template takes]
A template is a program; what it does not understand it leaves out, or writes as Python does. So the text is looked at: what
every message says, the names of calls and tools, and the arguments' keys must be in it. Where they are not, the same
conversation is given otherwise (`Style`): contents as lists of parts, arguments as objects or as strings, a missing content
as null or as an empty string, bare schemas as tools. A conversation that no style gets through is refused.

[Note: trained turns]
What is trained of a turn is what the model would write after the prompt that asks for it: the conversation up to the turn,
with the generation prompt. That is what the text of the conversation up to and with the turn adds to it. Where the text of
the whole conversation begins in the same way, as it does with most templates, the turns are trained in that one text. Where
it does not (Qwen3 leaves out the thoughts of earlier turns), such a turn becomes an example of its own. A prompt may open a
thought that the turn as it is written does not have (R1, QwQ): the turn is trained from where the two part, and a thought
that the template left out is put back after the prompt that opens it. Another thought that is left out is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from os.path import commonprefix
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.errors import DataError
from finetune.data.forms.chat import Chat
from finetune.data.messages import Message, as_tool, tool_name

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "\ue000\ue001\ue002"  # nothing that a template would change
_Text = tuple[str, list[tuple[int, int]]]
"""The text of some messages, and the (start, end) of the template's generation blocks in it."""
_REFUSES = "refuses the conversation"
_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # as Transformers knows them


@dataclass(frozen=True, slots=True)
class Style:
    """parts: roles whose content is given as a list of parts. arguments: of calls, "given" as the row has them, "object" or
    "string". blank: how to say that a message is nothing but calls: no content (False), null or an empty string. bare:
    tools as the row has them, else each as {"type": "function", "function": schema}."""

    parts: frozenset[str] = frozenset()
    arguments: str = "given"
    blank: str | bool | None = False
    bare: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of an example, and the (start, end) of what is trained in it, in characters."""

    text: str  # as the template writes it
    spans: list[tuple[int, int]] = field(default_factory=list)  # of what is trained in `text`: (start, end)


class ChatTemplate:
    """The chat template of a tokenizer that has one. `counts` says how often something happened that a user should know."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._style = Style()
        # Longest first: one special token may begin another.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._enders = tuple(sorted(special, key=len, reverse=True))
        self.counts: Counter[str] = Counter()

    def prompt(self, messages: list[Message], place: str) -> str:
        """What the model is given to answer `messages`. Raises DataError for what the template cannot write."""
        chat = Chat(messages, [])
        self._find_style(chat, place)
        return self._text(chat, messages, place, prompt=True)

    def examples(self, chat: Chat, place: str, *, completion_only: bool) -> list[Rendered]:
        """One example, or several where turns cannot share a text; in all of them every trained turn once.

        See [Note: trained turns]. Raises DataError naming the place.
        """
        text, _ = whole = self._find_style(chat, place)
        if not completion_only:
            if chat.excludes:
                raise DataError(f"{place}: some messages are marked as not to be trained: set completion_only to true")
            return [Rendered(text, [(0, len(text))])]
        examples = [Rendered(text)]
        for index in reversed(chat.trained):
            self._place(self._turn(chat, index, whole, place), examples)
        trained = [one for one in examples if one.spans]
        self.counts["split"] += len(trained) > 1
        return trained[::-1] or examples

    def _place(self, turn: Rendered, examples: list[Rendered]) -> None:
        """Adds the turn to the first example whose text begins with it, or as one of its own."""
        for end in self._ends(turn):
            for one in examples:
                if one.text.startswith(turn.text[:end]):
                    one.spans.extend((a, min(b, end)) for a, b in turn.spans if a < end)
                    return
        examples.append(turn)

    def _ends(self, turn: Rendered) -> Iterator[int]:
        """Where the turn ends, and where it does without what a template writes after the last turn's end alone (Phi-3)."""
        end = turn.spans[-1][1] if turn.spans else 0
        yield end
        body = turn.text[:end].rstrip()
        if ender := next((one for one in self._enders if body.endswith(one)), ""):
            body = body.removesuffix(ender).rstrip()
            if body.endswith(self._enders) and len(body) > turn.spans[0][0]:
                yield len(body)

    # What the template takes.

    def _find_style(self, chat: Chat, place: str) -> _Text:
        """The conversation in a style that the template takes, which is kept for those that follow."""
        problems = []
        for style in chain([self._style], _styles(chat)):
            found, problem = self._try(chat, style)
            if problem is None:
                self._style = style
                return found
            problems.append(problem)
        # What a template lacks says more than what it stumbles over when it is given something odd.
        problem = next((one for one in problems if not one.startswith(_REFUSES)), problems[0])
        raise DataError(f"{place}: the chat template {problem}")

    def _try(self, chat: Chat, style: Style) -> tuple[_Text, str | None]:
        """The conversation in a style, and what it lacks, in words that follow "the chat template"; None: nothing."""
        try:
            found = self._render(chat, chat.messages, style)
        except Exception as error:  # a template is a program: it raises what it likes
            return ("", []), f"{_REFUSES}: {error}"
        return found, self._problem(chat, found[0], style)

    def _problem(self, chat: Chat, text: str, style: Style) -> str | None:
        for index, message in enumerate(chat.messages):
            content = message.get("content") or ""
            if not (_is_written(content, text) or self._writes(chat, index, {"content": _SENTINEL}, style)):
                return (
                    f"does not write the content of message {index} (role {message['role']}): use another chat_template, "
                    "or rows without such messages"
                )
            calls = message.get("tool_calls", [])
            # Names and keys may stand in the text for the tools: a call with another one tells.
            probe = {**calls[0], "function": {"name": "f", "arguments": {_SENTINEL: ""}}} if calls else {}
            if calls and not (
                all(_is_call_written(call["function"], text, style) for call in calls)
                and self._writes(chat, index, {"tool_calls": [probe]}, style)
            ):
                name = calls[0]["function"]["name"]
                return f"does not write the call of {name} in message {index} as a call: use another chat_template"
        if style.parts and "{'type': 'text', 'text':" in text:
            return "writes a list of parts as Python does: use another chat_template, or contents that are strings"
        for tool in chat.tools or ():
            if (name := tool_name(tool)) and name not in text:
                return f'does not write the tool {name}: use another chat_template, or rows without "tools"'
        return None

    def _writes(self, chat: Chat, index: int, words: Message, style: Style) -> bool:
        """Whether the template writes `words`, which have the sentinel in them, where message `index` has others."""
        messages = list(chat.messages)
        messages[index] = messages[index] | words
        try:
            return _SENTINEL in self._render(chat, messages, style)[0]
        except Exception:
            return False

    def _render(self, chat: Chat, messages: list[Message], style: Style, *, prompt: bool = False) -> _Text:
        tools = chat.tools if style.bare or not chat.tools else [as_tool(tool) for tool in chat.tools]
        template = self._tokenizer.get_chat_template(tools=tools)
        texts, blocks = render_jinja_template(
            [[_styled(message, style) for message in messages]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=_GENERATION.search(template) is not None,
            add_generation_prompt=prompt,
            **{**self._tokenizer.special_tokens_map, **chat.options},
        )
        return texts[0], list(blocks[0]) if blocks else []

    def _rendered(self, chat: Chat, messages: list[Message], place: str, *, prompt: bool = False) -> _Text:
        try:
            return self._render(chat, messages, self._style, prompt=prompt)
        except Exception as error:
            raise DataError(f"{place}: the chat template refuses the conversation: {error}") from error

    def _text(self, chat: Chat, messages: list[Message], place: str, *, prompt: bool = False) -> str:
        return self._rendered(chat, messages, place, prompt=prompt)[0]

    # What of it the model would say.

    def _turn(self, chat: Chat, index: int, whole: _Text, place: str) -> Rendered:
        """The conversation up to and with message `index`, and what the model would say of it."""
        messages, message = chat.messages[: index + 1], chat.messages[index]
        text, blocks = whole if len(messages) == len(chat.messages) else self._rendered(chat, messages, place)
        if _GENERATION.search(self._tokenizer.get_chat_template(tools=chat.tools)):
            before = len(self._rendered(chat, messages[:-1], place)[1]) if index else 0
            self._refuse_lost_thought(message, text, place, index)
            return Rendered(text, blocks[before:])
        if index == 0:
            raise DataError(
                f"{place}: the conversation begins with the assistant: put a user message first, or use a chat "
                "template with {% generation %} blocks"
            )
        asked = self._text(chat, messages[:-1], place, prompt=True)
        if self._always_asks(asked, text):
            raise DataError(
                f"{place}: the chat template asks for an answer after every conversation, also after message {index}, where "
                "it would be trained: give a chat_template that writes it under {% if add_generation_prompt %}"
            )
        if text.startswith(asked) and len(text) > len(asked):
            start = len(asked)
        else:
            start = self._where_they_part(chat, messages, asked, text, place)
        opened = asked[start:].strip()
        thinking = _thinking(message)
        if opened.endswith(_THOUGHT) and thinking and _THOUGHT_END not in text[start:]:
            text, start = asked + self._with_thought(thinking, text[start:], asked, place, index), len(asked)
            self.counts["put back"] += 1
        elif opened:
            self.counts["unopened"] += 1
        self._refuse_lost_thought(message, text, place, index)
        turn = text[start:]
        body = turn.rstrip()
        # White space after the token that ends a turn is never generated: the turn is over by then.
        end = start + (len(body) if body.endswith(self._enders) else len(turn))
        return Rendered(text, [(start, end)])

    def _always_asks(self, asked: str, text: str) -> bool:
        """Whether the end of a prompt, which begins a turn, also stands after the turn that `text` ends with."""
        asked, text = asked.rstrip(), text.rstrip()
        both = commonprefix([asked[::-1], text[::-1]])[::-1]
        return any(one in both for one in self._enders) and not asked.endswith(self._enders)

    def _where_they_part(self, chat: Chat, messages: list[Message], asked: str, text: str, place: str) -> int:
        """Where a turn as it is written leaves the prompt that asks for it: after what introduces any turn."""
        index = len(messages) - 1
        plain = self._text(chat, messages[:-1], place)
        probe = self._text(chat, [*messages[:-1], {"role": "assistant", "content": _SENTINEL}], place)
        start = len(commonprefix([asked, probe.partition(_SENTINEL)[0]]))
        if _THOUGHT_END in asked[len(plain) :] and (thinking := _thinking(messages[-1])):
            raise DataError(
                f"{place}: the generation prompt before message {index} has no place for its thoughts "
                f'({_thought_of(thinking)[:40]!r}): give chat_template_kwargs, such as {{"enable_thinking": true}}, another '
                "chat_template, or rows without thoughts"
            )
        if _SENTINEL not in probe or start < len(plain) or not text.startswith(asked[:start]):
            raise DataError(
                f"{place}: the chat template writes the messages before message {index} differently once others follow, so "
                "what the assistant said cannot be told apart: give a chat_template with {% generation %} blocks, or set "
                "completion_only to false"
            )
        return start

    def _with_thought(self, thinking: str, written: str, asked: str, place: str, index: int) -> str:
        """What follows a prompt that opened the thought: the thought, then the turn as it is written without."""
        answer = thinking.rpartition(_THOUGHT_END)[2].strip()
        lead, found, rest = written.partition(answer) if answer else ("", "", written)
        if lead.strip() or found != answer:
            raise self._thought_refused(place, index, thinking)
        thinking = thinking.strip().removeprefix(_THOUGHT)
        return (thinking.lstrip("\n") if asked.endswith("\n") else thinking) + rest

    def _refuse_lost_thought(self, message: Message, text: str, place: str, index: int) -> None:
        thinking = _thinking(message)
        if thinking and not _is_written(_thought_of(thinking), text):
            raise self._thought_refused(place, index, thinking)

    def _thought_refused(self, place: str, index: int, thinking: str) -> DataError:
        return DataError(
            f"{place}: the chat template leaves out what message {index} thinks ({_thought_of(thinking)[:40]!r}): use a "
            "chat_template that writes it, or rows without thoughts"
        )


def _styles(chat: Chat) -> Iterator[Style]:
    """All that could make a difference, the most usual first."""
    roles = sorted({message["role"] for message in chat.messages})
    parts = chain.from_iterable(combinations(roles, count) for count in range(len(roles) + 1))
    calls = [message for message in chat.messages if message.get("tool_calls")]
    arguments = ("given", "object", "string") if calls else ("given",)
    blanks = (False, None, "") if any(not message.get("content") for message in calls) else (False,)
    bare = (True, False) if chat.tools else (True,)
    for chosen, *rest in product(parts, arguments, blanks, bare):
        yield Style(frozenset(chosen), *rest)


def _styled(message: Message, style: Style) -> Message:
    message = dict(message)
    content = message.get("content")
    if message.get("tool_calls"):
        message["tool_calls"] = [_styled_call(call, style) for call in message["tool_calls"]]
        if not content and style.blank is not False:
            message["content"] = style.blank
    if isinstance(content, str) and message["role"] in style.parts:
        message["content"] = [{"type": "text", "text": content}]
    return message


def _styled_call(call: dict[str, Any], style: Style) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "arguments": _styled_arguments(call["function"], style)}}


def _styled_arguments(function: dict[str, Any], style: Style) -> Any:
    arguments = function["arguments"]
    if style.arguments == "object" and isinstance(arguments, str):
        return json.loads(arguments)
    if style.arguments == "string" and not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def _is_written(words: str, text: str) -> bool:
    """As they are, or as the inside of a JSON string."""
    words = words.strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _is_call_written(function: dict[str, Any], text: str, style: Style) -> bool:
    """Its name and the arguments' keys, and not a string within a string, nor an object as Python writes it."""
    arguments = _styled_arguments(function, style)
    whole = json.loads(arguments) if isinstance(arguments, str) else arguments
    if function["name"] not in text or not all(_is_written(key, text) for key in whole):
        return False
    quoted, python = json.dumps(arguments, ensure_ascii=False), str(whole)
    if isinstance(arguments, str):
        return quoted not in text
    return quoted in text or not whole or python not in text


def _thinking(message: Message) -> str:
    """The content with what the message thinks before it; empty where it thinks nothing."""
    content = message.get("content") or ""
    if _THOUGHT_END in content:
        return content
    thought = next((message[key] for key in _THOUGHT_KEYS if isinstance(message.get(key), str)), "").strip()
    return f"{_THOUGHT}\n{thought}\n{_THOUGHT_END}\n\n{content}" if thought else ""


def _thought_of(thinking: str) -> str:
    return thinking.rpartition(_THOUGHT_END)[0].strip().removeprefix(_THOUGHT).strip()
