"""A tokenizer as GGUF has it, made of Transformers' own: what llama.cpp needs to cut text into the same tokens.

Two kinds are written: byte-level BPE ("gpt2"), whose split of text into words llama.cpp knows by a name, and BPE with byte
fallback, as SentencePiece makes it ("llama"). llama.cpp merges the pair with the best score there, Transformers that with the
first merge: scores are the places of merges, from the first down.

Source: `SpecialVocab` of the package gguf; `src/llama-vocab.cpp` of llama.cpp; names of splits are those that Transformers
reads (`GGUF_PRE_TOKENIZER_SPLITS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.memory.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_LAST_SCORE = -1e6  # of pieces that no merge makes
_PASSED_OVER = ({"type": "NFC"},)  # by llama.cpp's own converter too, since most text has that form
_SPACES = ({"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, rows: int, config: Any) -> None:
    """tokenizer: of Transformers. rows: of the embedding table; ids without a token are filled up. config: the model's, for
    special tokens that the tokenizer does not name.

    Raises UserError for a tokenizer of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(f"{type(tokenizer).__name__} has no tokenizer.json")
    found = json.loads(backend.to_str())
    model = found["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is of type {model['type']}")
    tokens = _tokens(found, rows)
    if model.get("byte_fallback"):
        _add_scored(writer, found, tokens)
    else:
        _add_byte_level(writer, found, tokens)
    ids = {word: getattr(tokenizer, f"{word}_token_id", None) for word in _SPECIAL}
    ids |= {word: getattr(config, f"{word}_token_id", None) for word in ("bos", "eos", "pad") if ids[word] is None}
    for word, index in ids.items():
        if isinstance(index, int) and 0 <= index < rows:
            getattr(writer, f"add_{word}_token_id")(index)
    text = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(text) and ids["bos"] is not None and text[0] == ids["bos"])
    writer.add_add_eos_token(len(text) > 1 and ids["eos"] is not None and text[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def copy_tokenizer(writer: GGUFWriter, model: Path) -> None:
    """That of another GGUF file, as it is: what Transformers reads of it is less."""
    from gguf import GGUFReader, GGUFValueType

    for key, field in GGUFReader(model).fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)


def _unknown(reason: str) -> UserError:
    return UserError(
        f"the model's tokenizer can't be written as GGUF: {reason}; expected BPE in a way that llama.cpp has a name for. "
        "Export with --merge plain, and give the result to llama.cpp's own convert_hf_to_gguf.py"
    )


def _tokens(found: Mapping[str, Any], rows: int) -> list[tuple[str, int]]:
    """(text, GGUF's type) of every id."""
    from gguf import TokenType

    tokens: list[tuple[str, int]] = [(f"[PAD{index}]", TokenType.UNUSED) for index in range(rows)]
    named = [(index, text, TokenType.NORMAL) for text, index in found["model"]["vocab"].items()]
    for token in found["added_tokens"]:
        if token["id"] < rows:  # others are none of the model's: classes of tokenizers bring some of their own
            named.append((token["id"], token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED))
    for index, text, kind in named:
        if index >= rows:
            raise _unknown(f"token {text!r:.40} has the id {index}, and the model has {rows} rows for tokens")
        tokens[index] = (text, kind)
    return tokens


def _add_byte_level(writer: GGUFWriter, found: Mapping[str, Any], tokens: Sequence[tuple[str, int]]) -> None:
    _check_normalizer(found, _PASSED_OVER)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(found))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_token_merges([" ".join(pair) for pair in _merges(found)])


def _add_scored(writer: GGUFWriter, found: Mapping[str, Any], tokens: Sequence[tuple[str, int]]) -> None:
    from gguf import TokenType

    _check_normalizer(found, _SPACES)
    scores: dict[str, float] = {}
    for place, pair in enumerate(_merges(found)):
        scores.setdefault("".join(pair), -float(place))
    unknown = found["model"].get("unk_token")
    types = []
    for text, kind in tokens:
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = TokenType.UNKNOWN if text == unknown else TokenType.BYTE if is_byte else kind
        types.append(int(kind))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    # llama.cpp writes U+2581 for spaces of a text, but looks for tokens of the user's own before that.
    own = int(TokenType.USER_DEFINED)
    writer.add_token_list(
        [text.replace("\u2581", " ") if kind == own else text for (text, _), kind in zip(tokens, types, strict=True)]
    )
    writer.add_token_scores([scores.get(text, _LAST_SCORE) for text, _ in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_adds_space(found))


def _check_normalizer(found: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> None:
    """known: what may be done to a text before it is split."""
    for part in _parts(found["normalizer"], "normalizers"):
        if part not in known:
            raise _unknown(f"it changes a text before it splits it ({part['type']})")


def _merges(found: Mapping[str, Any]) -> list[Sequence[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in found["model"]["merges"]]


def _adds_space(found: Mapping[str, Any]) -> bool:
    """Whether a space goes before a text."""
    parts = [*_parts(found["normalizer"], "normalizers"), *_parts(found["pre_tokenizer"], "pretokenizers")]
    return any(
        part["type"] == "Prepend" or part["type"] == "Metaspace" and part.get("prepend_scheme", "never") != "never"
        for part in parts
    )


def _split_name(found: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split into words."""
    parts = _parts(found["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in parts]
    splits = bool(parts) and parts[-1]["type"] == "ByteLevel" and parts[-1].get("use_regex", True)
    if parts and parts[-1].get("add_prefix_space"):
        raise _unknown("it puts a space before every text")
    if kinds == ["ByteLevel"] and splits:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and splits and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not splits and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
        if name := _known_splits().get(parts[0]["pattern"].get("Regex")):
            return name
    raise _unknown(f"how it splits text ({', '.join(kinds) or 'not at all'}) isn't known")


def _parts(part: Mapping[str, Any] | None, word: str) -> list[Mapping[str, Any]]:
    """Of a sequence, what is in it."""
    if part is None:
        return []
    return list(part[word]) if part["type"] == "Sequence" else [part]


def _known_splits() -> dict[str, str]:
    """Regular expression -> llama.cpp's name, of several that of the model it was made for."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as splits
    except ImportError:  # before Transformers 5.24
        return {}
    preferred = [name for name in ("llama-bpe", "qwen2", "gpt-4o", "tekken") if name in splits]
    return {splits[name]: name for name in (*splits, *preferred)}
