"""Conversations with images, for models that read both: rows of tensors that the model's own processor makes.

[Note: conversations with images]
A row has `messages`, whose contents may be lists of parts as Transformers' processors take them: {"type": "text", "text": ...}
and {"type": "image", ...}. The image of a part is a file, encoded bytes or an object of Pillow, in the part itself or, one
after the other, in the row's column `images`. Nothing is fetched from a network. A micro-batch is what the processor makes of
its rows when it is given them together, padded on the right. Images are read when their row is computed; until then
they are on disk, see `finetune.data.pictures`. Text and labels are kept.

The assistant's turns are trained: what a turn adds to the tokens of the prompt that asks for it. Where the tokens of the whole
conversation do not begin with that prompt, the row is refused.
"""

from __future__ import annotations

import hashlib
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
from finetune.data.pictures import Aside, Pictures, open_image
from finetune.data.preparation import template_text
from finetune.data.sources import read_rows, resolve, with_encoded_images
from finetune.data.tensor_rows import TensorRows, open_tensor_rows
from finetune.memory.errors import UserError
from finetune.offload.weights.parts import ModelParts

_PLACES = ("image", "path", "url", "base64", "bytes")
_BYTES_OF_A_PIXEL, _BYTES_WHILE_PROCESSED = 4, 48
"""Of an image as it is read, and of one at a time that is brought to numbers: resized, in fp32, scaled, cut into patches."""
_LOOKED_AT = 1000
"""Rows of a source among which one has an image, where it has some."""
Messages = list[dict[str, Any]]


class ImageRows(TensorRows):
    """See [Note: conversations with images]. left_out: rows that are longer than `sequence_length`. digest: of their tokens,
    labels and images and their order, 128 bits in hexadecimal."""

    digest = ""

    def __init__(
        self, rows: Iterable[tuple[str, Any]], processor: Any, sequence_length: int, template: str | None, pictures: Pictures
    ) -> None:
        """rows: (where it is, the row). processor: the model's. template: the text of a chat template in place of its own.
        pictures: has the images. Raises UserError for rows that are not conversations with images."""
        self._processor, self._pictures = processor, pictures
        self._template = {} if template is None else {"chat_template": template}
        self._texts: list[str] = []
        self._images: list[list[str | Aside]] = []
        self._labels: list[np.ndarray] = []  # int32 [tokens]
        self._most_pixels = self.left_out = 0  # of an image
        sizes, digest = [], hashlib.blake2b(digest_size=16)
        for place, row in rows:
            messages, images = parse_conversation(row, place)
            opened = [open_image(image, place) for image in images]
            batch, labels = self._read(messages, opened, place)
            ids = batch["input_ids"][0]
            if len(ids) > sequence_length or not bool((labels[1:] != MASKED).any()):
                self.left_out += 1
                continue
            self._texts.append(self._text(messages))
            self._images.append([pictures.keep(*both, place) for both in zip(images, opened, strict=True)])
            self._labels.append(labels.numpy().astype(np.int32))
            pixels = [image.width * image.height for image in opened]
            self._most_pixels = max(self._most_pixels, *pixels, 0)
            sizes.append((len(ids), sum(pixels), sum(x.numel() for x in batch.values() if x.is_floating_point())))
            digest.update(ids.numpy().tobytes() + labels.numpy().tobytes())
            for image in opened:
                digest.update(f"{image.size}".encode() + image.tobytes())
        if not sizes:
            raise DataError(
                f"no conversation is left of {self.left_out}: none has a trained token and at most {sequence_length} tokens, "
                "images counted as the model's processor makes them: raise sequence_length"
            )
        self.digest = digest.hexdigest()
        # Of each row: tokens, pixels of its images as they are read, and numbers that the processor makes of these.
        self.lengths, self._pixels, self._numbers = np.array(sizes, np.int64).T

    def __len__(self) -> int:
        return len(self._texts)

    def largest(self, count: int) -> dict[str, torch.Tensor]:
        """The rows of which the processor makes most numbers, as long as the longest one: text may be long without an image."""
        batch = self.collate(np.argsort(-self._numbers, kind="stable")[:count].tolist())
        rows, tokens = batch["input_ids"].shape
        batch.pop("attention_mask", None)
        more = int(self.lengths.max()) - tokens
        for name, value in batch.items():
            if value.shape == (rows, tokens) and not value.is_floating_point():
                batch[name] = torch.cat([value, value[:, -1:].expand(-1, more)], 1)
        if rows > 1 and self.lengths.min() < self.lengths.max():
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][-1, -1] = 0  # something is padded
        return batch

    def reading_bytes(self, count: int) -> int:
        return int(_BYTES_OF_A_PIXEL * count * self._pixels.max() + _BYTES_WHILE_PROCESSED * self._most_pixels)

    def describe(self) -> list[str]:
        left = f", {self.left_out:,} left out: longer than sequence_length, or without a trained token" if self.left_out else ""
        images = sum(map(len, self._images))
        return [f"{len(self):,} conversations with {images:,} images, at most {self.lengths.max():,} tokens{left}"]

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        texts = [self._texts[index] for index in indices]
        images = [[self._pictures.open(one, f"data[{index}]") for one in self._images[index]] for index in indices]
        batch = self._processed(texts, images)
        length = batch["input_ids"].shape[1]
        rows = [torch.from_numpy(self._labels[index]).long() for index in indices]
        labels = [functional.pad(row, (0, length - len(row)), value=MASKED) for row in rows]
        if len({int(self.lengths[index]) for index in indices}) == 1:
            del batch["attention_mask"]  # nothing is padded
        return batch | {"labels": torch.stack(labels)}

    def _processed(self, texts: list[str], images: list[list[Any]]) -> dict[str, torch.Tensor]:
        given = {"images": images} if any(images) else {}
        batch = self._processor(text=texts, **given, padding=True, padding_side="right", return_tensors="pt")
        first = {"input_ids": batch["input_ids"]}
        return first | {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _text(self, messages: Messages, prompt: bool = False) -> str:
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self._template)

    def _read(self, messages: Messages, images: list[Any], place: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the processor makes of the whole conversation, alone, and its labels, int64 [tokens]."""
        try:
            batch = self._batch_of(messages, images, place, prompt=False)
            ids = batch["input_ids"][0]
            labels = torch.full_like(ids, MASKED)
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = self._batch_of(messages[:number], images, place, prompt=True)["input_ids"][0]
                after = self._batch_of(messages[: number + 1], images, place, prompt=False)["input_ids"][0]
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
        return batch, labels

    def _batch_of(self, messages: Messages, images: list[Any], place: str, prompt: bool) -> dict[str, torch.Tensor]:
        text = self._text(messages, prompt)
        parts = [part for message in messages for part in message["content"]]
        lost = next((part["text"] for part in parts if part["type"] == "text" and part["text"].strip() not in text), None)
        if lost is not None:
            raise DataError(f"{place}: the chat template leaves out the text {lost!r:.80}: give another dataset.chat_template")
        count = sum(part["type"] == "image" for part in parts)
        return self._processed([text], [images[:count]])


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
    template = template_text(config.dataset.chat_template)
    return ImageRows(rows, processor, config.dataset.sequence_length, template, Pictures(config.output))


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
        found = with_encoded_images(source)
        rows = found if found is not source else (source[index] for index in range(len(source) if is_sequence else 0))
        yield from ((f"data[{index}]", row) for index, row in enumerate(rows))
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
