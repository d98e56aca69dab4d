"""Conversations through chat templates of many habits: every word of a row is in the text, and what is trained is what the
model would say after the prompt that it is given."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from data_tools import CHAT, CHATML, make, prepare_in_this_process, texts, write_jsonl, write_tokenizer
from pyarrow import parquet
from transformers import AutoTokenizer

from finetune.data import DataError

# As Qwen3: thoughts before the last question are left out; a last turn has one, if an empty one.
DROPS_THOUGHTS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set answer = m.content %}{% set thought = '' %}"
    "{% if '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As R1's distillates: the prompt opens a thought, and no turn that is written has one.
OPENS_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
    "{{ m.content.split('</think>')[-1].lstrip() }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
# As Qwen3-Thinking: the prompt opens a thought, and a last turn has it.
# As Phi-3: the last turn is followed by one more token.
ENDS_TWICE = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
KEEPS_THOUGHT = DROPS_THOUGHTS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
HEAD = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content }}{% for c in m.tool_calls %}"
)
TAIL = "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
AS_OBJECT = HEAD + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}' + TAIL
AS_STRING = HEAD + '{"name": "{{ c.function.name }}", "arguments": {{ "" + c.function.arguments }}}' + TAIL
AS_IT_IS = HEAD + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}' + TAIL
BY_KEY = (
    HEAD
    + "{{ c.function.name }}{% for k, v in c.function.arguments | items %} {{ k }}={{ v | tojson }}{% endfor %}"
    + TAIL
)
AS_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_IS_A_STRING = AS_PARTS.replace(
    "\n{% for part", "\n{% if m.role == 'system' %}{{ m.content }}{% else %}{% for part"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    prepare_in_this_process(monkeypatch)


def turn(role: str, content: str | None = None, **more) -> dict:
    return {"role": role, **({} if content is None else {"content": content}), **more}


def thinking(first: str | None, second: str | None) -> list[dict]:
    said = lambda thought, answer: answer if thought is None else f"<think>\n{thought}\n</think>\n\n{answer}"  # noqa: E731
    return [CHAT[0], turn("assistant", said(first, "the cat")), CHAT[2], turn("assistant", said(second, "the mat"))]


@pytest.mark.parametrize(
    ("template", "messages", "trained"),
    [
        (
            DROPS_THOUGHTS, thinking("hello", "world"),
            [["<think>\nhello\n</think>\n\nthe cat<|im_end|>"], ["<think>\nworld\n</think>\n\nthe mat<|im_end|>"]],
        ),
        (
            DROPS_THOUGHTS, thinking(None, None),
            [["<think>\n\n</think>\n\nthe cat<|im_end|>"], ["<think>\n\n</think>\n\nthe mat<|im_end|>"]],
        ),
        # After one question all turns share a text.
        (
            DROPS_THOUGHTS, [CHAT[0], thinking("hello", None)[1], turn("tool", "it"), thinking(None, "world")[3]],
            [["<think>\nhello\n</think>\n\nthe cat<|im_end|>", "<think>\nworld\n</think>\n\nthe mat<|im_end|>"]],
        ),
        (ENDS_TWICE, CHAT, [["the cat<|im_end|>", "the mat<|im_end|>\n</s>"]]),
        (KEEPS_THOUGHT, thinking(None, "world")[2:], [["world\n</think>\n\nthe mat<|im_end|>"]]),
        (KEEPS_THOUGHT, thinking(None, None)[2:], [["\n</think>\n\nthe mat<|im_end|>"]]),
        (OPENS_THOUGHT, thinking(None, None), [["the cat</s>", "the mat</s>"]]),
        (
            OPENS_THOUGHT, thinking("hello", "world"),
            [["hello\n</think>\n\nthe cat</s>"], ["world\n</think>\n\nthe mat</s>"]],
        ),
        (OPENS_THOUGHT, [CHAT[0], turn("assistant", "hello</think>the cat")], [["hello</think>the cat</s>"]]),
        (OPENS_THOUGHT, [CHAT[0], turn("assistant", "the cat", reasoning="hello")], [["hello\n</think>\n\nthe cat</s>"]]),
    ],
)  # fmt: skip
def test_what_is_trained_follows_the_prompt_that_asks_for_it(chatml, tmp_path, template, messages, trained):
    data = make([{"messages": messages}], chatml, tmp_path, chat_template=template, append_eos=False)
    found = texts(chatml, data)
    assert [runs for _, runs in found] == trained
    if not any("</think>" in run for run in sum(trained, [])):
        return  # written without what the prompt opens, as the notes say
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    asked = [messages[:index] for index, message in enumerate(messages) if message["role"] == "assistant"]
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    prompts = [tokenizer.apply_chat_template(one, **options) for one in asked]
    runs = [(index, text[: text.index(run)]) for index, (text, runs) in enumerate(found) for run in runs]
    assert [before for _, before in runs] == prompts
    for index, before in runs:  # in use the prompt is tokenised alone: no token of the row reaches over its end
        ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        assert data[index].input_ids[: len(ids)].tolist() == ids


def test_how_conversations_were_taken_is_said(chatml, tmp_path):
    def notes(template, messages) -> list[str]:
        return make([{"messages": messages}] * 2, chatml, tmp_path, chat_template=template).meta["notes"]

    assert "2 conversations became several examples" in notes(DROPS_THOUGHTS, thinking("hello", None))[0]
    assert "4 thoughts that the chat template leaves out" in notes(OPENS_THOUGHT, thinking("hello", "it"))[1]
    assert "4 turns are trained as the chat template writes them" in notes(OPENS_THOUGHT, thinking(None, None))[0]
    assert notes(CHATML, CHAT) == []


def test_a_thought_that_the_prompt_has_closed_is_refused(chatml, tmp_path):
    closed = "<think>\n{% if not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
    template = DROPS_THOUGHTS.replace("assistant\n{% endif %}", f"assistant\n{closed}")
    row = {"messages": thinking(None, "world")[2:]}
    with pytest.raises(DataError, match="has no place for its thoughts .'world'.: give chat_template_kwargs, such as"):
        make([row], chatml, tmp_path, chat_template=template)
    row["chat_template_kwargs"] = {"enable_thinking": True}
    data = make([row], chatml, tmp_path, chat_template=template)
    assert texts(chatml, data)[0][1] == ["world\n</think>\n\nthe mat<|im_end|>"]


def test_a_thought_that_no_prompt_opens_is_not_dropped(chatml, tmp_path):
    template = OPENS_THOUGHT.replace("<|im_end|><think>\n", "<|im_end|>")
    with pytest.raises(DataError, match=r"data\[0\]: the chat template leaves out what message 3 thinks \('world'\)"):
        make([{"messages": thinking(None, "world")}], chatml, tmp_path, chat_template=template)
    # What an earlier, untrained turn thought is not given to the model in use either.
    messages = [CHAT[0], {**thinking("hello", None)[1], "weight": 0}, *CHAT[2:]]
    data = make([{"messages": messages}], chatml, tmp_path, chat_template=template)
    assert texts(chatml, data)[0][1] == ["the mat</s>"]


@pytest.mark.parametrize(
    "flags", [{"weight": 0}, {"train": False}, {"training": False, "weight": 0.0}, {"loss": False, "weight": None}]
)
@pytest.mark.parametrize("template", [CHATML, "blocks"])
def test_turns_that_are_context_are_not_trained(chatml, tmp_path, flags, template):
    if template == "blocks":
        template = CHATML.replace("{{ message.content }}<|im_end|>", (
            "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ message.content }}<|im_end|>{% endif %}"))  # fmt: skip
    chat = [
        {**CHAT[0], "weight": 1},
        CHAT[1] | flags,
        {**CHAT[2], "train": False},
        {**CHAT[3], "weight": 1, "name": "a"},
    ]
    data = make([{"messages": chat}, {"messages": CHAT[:1] + chat[1:2]}], chatml, tmp_path, chat_template=template)
    assert [runs for _, runs in texts(chatml, data)] == [["the mat<|im_end|>"]]
    assert data.meta["dropped"] == 1
    with pytest.raises(DataError, match="marked as not to be trained: set completion_only to true"):
        make([{"messages": chat}], chatml, tmp_path, chat_template=template, completion_only=False)


def test_system_and_history_are_part_of_the_conversation(chatml, tmp_path):
    before = "<|im_start|>system\nuser\n<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthere<|im_end|>\n"
    columns = {"system": "user\n", "history": [["hello", "there"]]}
    question, answer = "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n", "the mat<|im_end|>"
    rows = [
        {"messages": CHAT[2:], **columns},
        {"conversations": [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "the mat"}], **columns},
        {"instruction": "what is it", "input": "", "output": "the mat", **columns},
        {"messages": [turn("system", "user\n"), *CHAT[2:]], **columns},
    ]
    for row in rows:
        text, trained = texts(chatml, make([row], chatml, tmp_path))[0]
        assert (text, trained) == (before + question + answer + "\n", ["there<|im_end|>", answer])
    given = make([{"prompt": CHAT[2:3], "completion": CHAT[3:], **columns}], chatml, tmp_path)
    assert texts(chatml, given)[0] == (before + question + answer + "\n", [answer])


ARGUMENTS = {"x": 0, "to": 'é "b"'}
AS_JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = {"name": "move", "arguments": ARGUMENTS}
WRITTEN = '{"name": "move", "arguments": {"x": 0, "to": "é \\"b\\""}}<|im_end|>'


@pytest.mark.parametrize(
    "message",
    [
        turn("assistant", tool_calls=[{"type": "function", "function": CALL}]),
        turn("assistant", tool_calls=[{"id": "1", "function": {**CALL, "arguments": AS_JSON}}]),
        turn("assistant", tool_calls=[CALL]),
        turn("assistant", tool_calls=json.dumps([CALL])),
        turn("assistant", function_call=CALL),
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
    ids=["object", "string", "flat", "as a string", "function_call", "sharegpt"],
)  # fmt: skip
@pytest.mark.parametrize("template", [AS_OBJECT, AS_STRING, AS_IT_IS])
def test_calls_are_written_once_whatever_their_spelling(chatml, tmp_path, message, template):
    data = make([{"messages": [CHAT[0], message]}], chatml, tmp_path, chat_template=template)
    assert texts(chatml, data)[0][1] == [WRITTEN]


def test_calls_of_other_templates(chatml, tmp_path):
    call = turn("assistant", None, tool_calls=[{"function": {**CALL, "arguments": '{"x": 0, "to": null}'}}])
    for template, said in (
        (BY_KEY, "move x=0 to=null<|im_end|>"),
        (AS_OBJECT, '{"name": "move", "arguments": {"x": 0, "to": null}}<|im_end|>'),
    ):
        data = make([{"messages": [CHAT[0], call]}], chatml, tmp_path, chat_template=template)
        assert texts(chatml, data)[0][1] == [said]
    # A template that asks for a content that is null, and gives nothing else to a message without one.
    null = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    data = make([{"messages": [CHAT[0], call]}], chatml, tmp_path, chat_template=null)
    assert texts(chatml, data)[0][1] == ['move{"x": 0, "to": null}<|im_end|>']
    # Not written, though the tools' schemas have the name and the key.
    silent = CHATML.replace("{% for message", "{{ tools | tojson }}{% for message", 1)
    schema = {"type": "function", "function": {"name": "move", "parameters": {"properties": {"x": {}, "to": {}}}}}
    for row, template in (({}, CHATML), ({"tools": [schema]}, silent)):
        with pytest.raises(DataError, match="does not write the call of move in message 1"):
            make([{"messages": [CHAT[0], call], **row}], chatml, tmp_path, chat_template=template)


def tool_row(name: str, arguments: dict) -> dict:
    schema = {
        "name": name,
        "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in arguments}},
    }
    call = turn("assistant", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])
    return {
        "messages": [CHAT[0], call, turn("tool", "it"), CHAT[1]], "tools": [{"type": "function", "function": schema}],
        "chat_template_kwargs": {"language": name},
    }  # fmt: skip


def test_nulls_that_columns_of_one_type_add_are_no_arguments(chatml, tmp_path):
    import datasets

    rows = [tool_row("move", {"x": "0"}), tool_row("say", {"word": "cat", "to": "it"})]
    template = "{{ language }}\n" + AS_OBJECT
    wanted = texts(chatml, make(rows, chatml, tmp_path, chat_template=template))
    assert '"arguments": {"x": "0"}}' in wanted[0][0] and '"properties": {"x": {"type": "string"}}' in wanted[0][0]
    assert wanted[0][0].startswith("move\n{")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", datasets.Dataset.from_list(rows), write_jsonl(tmp_path / "a.jsonl", rows)):
        assert texts(chatml, make(source, chatml, tmp_path, chat_template=template)) == wanted


def test_tools_reach_the_template_in_every_spelling(chatml, tmp_path):
    row = tool_row("move", {"x": "0"})
    row.pop("chat_template_kwargs")
    schema = row["tools"][0]["function"]
    wanted = texts(chatml, make([row], chatml, tmp_path, chat_template=AS_OBJECT))
    for tools in (
        {"tools": json.dumps(row["tools"])},
        {"tools": [json.dumps(row["tools"][0])]},
        {"functions": [schema]},
        {"functions": json.dumps([schema])},
    ):
        found = make([{"messages": row["messages"], **tools}], chatml, tmp_path, chat_template=AS_OBJECT)
        assert texts(chatml, found) == wanted
    nested = AS_OBJECT.replace("{{ t | tojson }}", "{{ t.function.name }}")
    flat = make([{**row, "tools": [schema]}], chatml, tmp_path, chat_template=nested)
    assert texts(chatml, flat)[0][0].startswith("move\n<|im_start|>")
    with pytest.raises(
        DataError, match='does not write the tool move: use another chat_template, or rows without "tools"'
    ):
        make([{"messages": CHAT, "tools": row["tools"]}], chatml, tmp_path)


@pytest.mark.parametrize("template", [CHATML, AS_PARTS, SYSTEM_IS_A_STRING])
def test_contents_as_strings_and_as_parts_are_the_same_text(chatml, tmp_path, template):
    messages = [turn("system", "about"), *CHAT]
    parts = [turn(m["role"], None) | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    wanted = texts(chatml, make([{"messages": messages}], chatml, tmp_path))
    assert wanted[0][1] == ["the cat<|im_end|>", "the mat<|im_end|>"]
    for one in (messages, parts, [turn("user", "x"), *parts[2:]]):
        found = texts(chatml, make([{"messages": one}], chatml, tmp_path, chat_template=template))
        assert found[0][0].endswith(wanted[0][0][-60:]) and found[0][1] == wanted[0][1]
    assert texts(chatml, make([{"messages": parts}], chatml, tmp_path, chat_template=template)) == wanted


def test_a_message_that_a_template_leaves_out_is_refused(chatml, tmp_path):
    silent = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    row = {"messages": [turn("system", "about"), *CHAT]}
    with pytest.raises(
        DataError, match=r"data\[0\]: the chat template does not write the content of message 0 \(role system"
    ):
        make([row], chatml, tmp_path, chat_template=silent)
    # Words that are there in another form are written.
    quoted = CHATML.replace(
        "{{ message.content }}", "{{ message.content | tojson if message.role == 'tool' else message.content | trim }}"
    )
    messages = [CHAT[0], turn("assistant", " the cat "), turn("tool", 'a "b"\n'), CHAT[3]]
    assert 'a \\"b\\"' in texts(chatml, make([{"messages": messages}], chatml, tmp_path, chat_template=quoted))[0][0]


def test_a_template_that_always_asks_is_refused(chatml, tmp_path):
    """What begins the next turn would be trained as the end of each."""
    always = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    with pytest.raises(DataError, match="asks for an answer after every conversation, also after message 3"):
        make([{"messages": CHAT}], chatml, tmp_path, chat_template=always)
    never = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
    assert len(make([{"messages": CHAT}], chatml, tmp_path, chat_template=never)) == 1


def test_a_prompt_ends_where_a_token_does(chatml, tmp_path):
    # "<|im_start|>assistant\n" and "\n..." would be one token of two line ends in context.
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    tokenizer.add_tokens(["\n\n"])
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    data = make([{"messages": [CHAT[0], turn("assistant", "\nthe cat")]}], str(folder), tmp_path)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert data[0].input_ids[: len(prompt)].tolist() == prompt
    assert (data[0].labels[: len(prompt)] == -100).all() and data[0].labels[len(prompt)] == prompt[-1]
    assert texts(str(folder), data)[0][1] == ["\nthe cat<|im_end|>"]
