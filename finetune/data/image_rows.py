"""Conversations with images, for models that read both: rows of tensors that the model's own processor makes.

[Note: conversations with images]
A row has `messages`, whose contents may be lists of parts as Transformers' processors take them: {"type": "text", "text": ...}
and {"type": "image", ...}. The image of a part is a file, encoded bytes or an object of Pillow, in the part itself or, one
after the other, in the row's column `images`. Nothing is fetched from a network. A micro-batch is what the processor makes of
its rows when it is given them together, padded on the right. Images are read when their row is computed; tokens and labels
are kept.

The assistant's turns are trained: what a turn adds to the tokens of the prompt that asks for it. Where the tokens of the whole
conversation do not begin with that prompt, the row is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from finetune.config import Config
from finetune.data.cache import MASKED
from finetune.data.errors import DataError
from finetune.data.messages import ROLES, kind_of
from finetune.data.options import sources_in
from finetune.data.preparation import template_text
from finetune.data.sources import read_rows, resolve
from finetune.data.tensor_rows import TensorRows, open_tensor_rows
from finetune.memory.errors import UserError
from finetune.offload.weights.parts import ModelParts

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow reads without another program."""
_PLACES = ("image", "path", "url", "base64", "bytes")
_BYTES_OF_A_PIXEL, _BYTES_WHILE_PROCESSED = 4, 48
"""Of an image as it is read, and of one at a time that is brought to numbers: resized, in fp32, scaled, cut into patches."""
_LOOKED_AT = 1000
"""Rows of a source among which one has an image, where it has some."""
Messages = list[dict[str, Any]]


class ImageRows(TensorRows):
    """See [Note: conversations with images]. left_out: rows that are longer than `sequence_length`."""

    def __init__(self, rows: Iterable[tuple[str, Any]], processor: Any, sequence_length: int, template: str | None) -> None:
        """rows: (where it is, the row). processor: the model's. template: the text of a chat template in place of its own.
        Raises UserError for rows that are not conversations with images."""
        self._processor = processor
        self._template = {} if template is None else {"chat_template": template}
        self._conversations: list[tuple[Messages, list[Any]]] = []
        self._ids: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._pixels: list[list[int]] = []  # of the images of each row
        self.left_out = 0
        for place, row in rows:
            messages, images = parse_conversation(row, place)
            opened = [open_image(image, place) for image in images]
            ids, labels = self._tokens(messages, opened, place)
            if len(ids) > sequence_length or not bool((labels[1:] != MASKED).any()):
                self.left_out += 1
                continue
            self._conversations.append((messages, images))
            self._ids.append(ids)
            self._labels.append(labels)
            self._pixels.append([0, *(image.width * image.height for image in opened)])
        if not self._ids:
            raise DataError(
                f"no conversation is left of {self.left_out}: none has a trained token and at most {sequence_length} tokens, "
                "images counted as the model's processor makes them: raise sequence_length"
            )
        self.lengths = np.array([len(ids) for ids in self._ids], np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def digest(self) -> str:
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=16)
        for (_, images), ids, labels in zip(self._conversations, self._ids, self._labels, strict=True):
            digest.update(ids.numpy().tobytes() + labels.numpy().tobytes())
            for image in images:
                opened = open_image(image, "data")
                digest.update(f"{opened.size}".encode() + opened.tobytes())
        return digest.hexdigest()

    def reading_bytes(self, count: int) -> int:
        return _BYTES_OF_A_PIXEL * count * max(map(sum, self._pixels)) + _BYTES_WHILE_PROCESSED * max(map(max, self._pixels))

    def describe(self) -> list[str]:
        left = f", {self.left_out:,} left out: longer than sequence_length, or without a trained token" if self.left_out else ""
        images = sum(len(images) for _, images in self._conversations)
        return [f"{len(self):,} conversations with {images:,} images, at most {self.lengths.max():,} tokens{left}"]

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        texts, images = [], []
        for index in indices:
            messages, places = self._conversations[index]
            texts.append(self._text(messages))
            images.append([open_image(image, f"data[{index}]") for image in places])
        batch = self._processed(texts, images)
        length = batch["input_ids"].shape[1]
        rows = [self._labels[index] for index in indices]
        labels = [functional.pad(row, (0, length - len(row)), value=MASKED) for row in rows]
        if len({len(self._ids[index]) for index in indices}) == 1:
            del batch["attention_mask"]  # nothing is padded
        return batch | {"labels": torch.stack(labels)}

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, torch.Tensor]:
        given = {"images": images} if any(images) else {}
        batch = self._processor(text=texts, **given, padding=True, padding_side="right", return_tensors="pt")
        first = {"input_ids": batch["input_ids"]}
        return first | {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _text(self, messages: Messages, prompt: bool = False) -> str:
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self._template)

    def _tokens(self, messages: Messages, images: list[Any], place: str) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [tokens] of the whole conversation, and its labels."""
        try:
            ids = self._ids_of(messages, images, place, prompt=False)
            labels = torch.full_like(ids, MASKED)
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = self._ids_of(messages[:number], images, place, prompt=True)
                after = self._ids_of(messages[: number + 1], images, place, prompt=False)
                if not (ids[: len(before)].equal(before) and ids[: len(after)].equal(after) and len(after) > len(before)):
                    raise DataError(
                        f"{place}: the chat template writes messages[{number}] of the whole conversation otherwise than as an "
                        "answer to what comes before it: expected the same tokens; give another dataset.chat_template"
                    )
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
        except UserError:
            raise
        except Exception as error:  # whatever templates and processors raise
            words = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{place}: the model's processor refuses the conversation: {words:.300}") from error
        return ids, labels

    def _ids_of(self, messages: Messages, images: list[Any], place: str, prompt: bool) -> torch.Tensor:
        text = self._text(messages, prompt)
        parts = [part for message in messages for part in message["content"]]
        lost = next((part["text"] for part in parts if part["type"] == "text" and part["text"].strip() not in text), None)
        if lost is not None:
            raise DataError(f"{place}: the chat template leaves out the text {lost!r:.80}: give another dataset.chat_template")
        count = sum(part["type"] == "image" for part in parts)
        return self._processed([text], [images[:count]])["input_ids"][0]


def parse_conversation(row: Any, place: str) -> tuple[Messages, list[Any]]:
    """The messages of a row, each content a list of parts, and its images in their order. Raises DataError."""
    if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise DataError(f'{place}: expected a conversation under "messages", as in other rows, found {kind_of(row)}')
    for word in ("video", "videos", "audio", "audios", "tools"):
        if row.get(word):
            raise DataError(f'{place}: found "{word}", which is not taken beside images yet: remove the column, or the rows')
    column, found, messages = list(_as_list(row.get("images", row.get("image")))), [], []
    for number, message in enumerate(row["messages"]):
        where = f"{place}: messages[{number}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f'{where}: expected an object with a "role" among {", ".join(ROLES)} and a "content"')
        unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
        if unknown:
            raise DataError(f'{where} has "{unknown[0]}", which is not taken beside images yet: remove it')
        content, parts = message.get("content"), []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _as_list(content):
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "image_url"):
                found.append(_image_of(part, column, len(found), where))
                parts.append({"type": "image"})
            else:
                raise DataError(f'{where}.content: expected parts of type "text" and "image", found {kind!r}')
        if not parts:
            raise DataError(f"{where}.content is empty: remove the message or fill it")
        messages.append({"role": message["role"], "content": parts})
    if column and len(column) != len(found):
        raise DataError(
            f'{place}: expected as many parts of type "image" as there are images ({len(column)}), found {len(found)}'
        )
    return messages, found


def _image_of(part: Mapping[str, Any], column: list[Any], number: int, where: str) -> Any:
    given = [part[key] for key in (*_PLACES, "image_url") if part.get(key) is not None]
    if given:
        return given[0]["url"] if isinstance(given[0], Mapping) and "url" in given[0] else given[0]
    if number < len(column):
        return column[number]
    raise DataError(
        f'{where}.content: expected an image in the part ("image", "path", ...) or in the column "images", found none'
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def open_image(image: Any, place: str) -> Any:
    """RGB, as an object of Pillow. image: the path of a file, its bytes, a data URL, {"path", "bytes"} as datasets have it, or
    such an object. Raises UserError without Pillow and DataError for what is no image here."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("rows with images need the package Pillow, which is not installed: pip install pillow") from None
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image.startswith(("http://", "https://", "ftp://")):
        raise DataError(f"{place}: images are not fetched from a network: download {image:.100} and give its path")
    try:
        if isinstance(image, str) and image.startswith("data:"):
            image = base64.b64decode(image.partition(",")[2], validate=True)
        source = io.BytesIO(image) if isinstance(image, bytes) else Path(str(image).removeprefix("file://")).expanduser()
        with Image.open(source, formats=_FORMATS) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError, binascii.Error) as error:
        raise DataError(f"{place}: an image can't be read: {error}; expected {', '.join(_FORMATS)}") from error


def open_samples(source: Any, parts: ModelParts, config: Config) -> TensorRows | None:
    """The rows of `source`, a sequence or paths of files, where they are tensors to this model, or conversations of which one
    has images and it reads these; None: they are text. Raises UserError."""
    rows = None
    if getattr(parts.model.config, "vision_config", None) is not None and not config.dataset.streaming:
        rows = _open_image_rows(source, parts.directory, config)
    return open_tensor_rows(source, parts) if rows is None else rows


def _open_image_rows(source: Any, place: Path, config: Config) -> ImageRows | None:
    """place: of the model's processor."""
    sources = sources_in(source)
    if not any(has_images(row) for one in sources for _, row in islice(_rows(one), _LOOKED_AT)):
        return None
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # Transformers raises whatever its parts do
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place}: the model's processor, which reads images, can't be loaded: {words:.400}") from error
    if not hasattr(processor, "image_processor"):
        raise UserError(
            f"{place}: expected a processor that reads images, found {type(processor).__name__}: put the model's "
            "preprocessor_config.json and processor_config.json beside its weights"
        )
    rows = chain.from_iterable(map(_rows, sources))
    return ImageRows(rows, processor, config.dataset.sequence_length, template_text(config.dataset.chat_template))


def has_images(row: Any) -> bool:
    """Whether it is a conversation with a part that is not text, or with a column of images."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, list):
        return False
    parts = [part for message in messages if isinstance(message, Mapping) for part in _as_list(message.get("content"))]
    return bool(row.get("images") or row.get("image")) or any(
        isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts
    )


def _rows(source: Any) -> Iterator[tuple[str, Any]]:
    """(place, row). Paths of images in a file are relative to it."""
    if not isinstance(source, str | Path):
        is_sequence = not isinstance(source, Mapping) and hasattr(source, "__getitem__") and hasattr(source, "__len__")
        yield from ((f"data[{index}]", source[index]) for index in range(len(source) if is_sequence else 0))
        return
    for file in resolve(source):
        folder = Path(file.path).parent if hasattr(file, "path") and isinstance(file.path, str) else None
        for place, row in read_rows(file, every_column=True):
            if isinstance(row, Exception):
                raise row
            yield place, row if folder is None else _beside(row, folder)


def _beside(value: Any, folder: Path) -> Any:
    """Of a row: relative paths of images as they are seen from here."""
    if not isinstance(value, Mapping):
        return value
    row = dict(value)
    for key in ("images", "image"):
        if row.get(key) is not None:
            row[key] = [_placed(one, folder) for one in _as_list(row[key])]
    if isinstance(row.get("messages"), list):
        row["messages"] = [_with_places(message, folder) for message in row["messages"]]
    return row


def _with_places(message: Any, folder: Path) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {k: _placed(v, folder) if k in _PLACES else v for k, v in part.items()}
        if isinstance(part, Mapping) and part.get("type") == "image" else part
        for part in message["content"]
    ]  # fmt: skip
    return {**message, "content": parts}


def _placed(image: Any, folder: Path) -> Any:
    if isinstance(image, Mapping) and isinstance(image.get("path"), str) and not image.get("bytes"):
        return {**image, "path": _placed(image["path"], folder)}
    if not isinstance(image, str) or "://" in image or image.startswith(("data:", "~")):
        return image
    return str(folder / image)
