"""Images as rows give them: read one by one, and put aside while their row is not computed."""

from __future__ import annotations

import base64
import binascii
import io
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.errors import DataError
from finetune.memory.errors import UserError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow reads without another program."""


@dataclass(frozen=True, slots=True)
class Aside:
    """Where the bytes of an encoded image are in the file of `Pictures`."""

    offset: int
    num_bytes: int


class Pictures:
    """The images of all rows. Those in files stay there; others are put into a file without a name, which ends with this.

    beside: a path, maybe of what is not there yet, in whose directory, or the next one above that is there, the file is made,
    for its owner alone.
    """

    def __init__(self, beside: Path) -> None:
        self._beside = beside.absolute()
        self._file: io.FileIO | None = None
        self._end = 0

    def keep(self, image: Any, opened: Any, place: str) -> str | Aside:
        """What `open` takes for this image, see `open_image`. opened: what that has made of it. Raises UserError for a disk
        without room."""
        found = _found_in(image, place)
        if isinstance(found, str | Path):
            return str(found)
        if not isinstance(found, bytes):
            buffer = io.BytesIO()
            opened.save(buffer, "PNG", compress_level=1)  # without loss
            found = buffer.getvalue()
        try:
            if self._file is None:
                folder = next(path for path in (self._beside, *self._beside.parents) if path.is_dir())
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # ends with this
            self._file.seek(self._end)
            left = memoryview(found)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise UserError(f"images of rows can't be put aside in {self._beside}: {error.strerror or error}") from error
        self._end += len(found)
        return Aside(self._end - len(found), len(found))

    def open(self, kept: str | Aside, place: str) -> Any:
        """RGB, as an object of Pillow. kept: what `keep` gave. Raises DataError."""
        if isinstance(kept, Aside):
            kept = os.pread(self._file.fileno(), kept.num_bytes, kept.offset)
        return open_image(kept, place)


def open_image(image: Any, place: str) -> Any:
    """RGB, turned as its tag of orientation says, as an object of Pillow. image: the path of a file, its bytes, a data URL,
    {"path", "bytes"} as datasets have it, or such an object. Raises UserError without Pillow and DataError for what is no image
    here."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise UserError("rows with images need the package Pillow, which is not installed: pip install pillow") from None
    found = _found_in(image, place)
    damaged = (OSError, ValueError, SyntaxError, struct.error, UnidentifiedImageError, Image.DecompressionBombError)
    try:
        if isinstance(found, Image.Image):
            return ImageOps.exif_transpose(found).convert("RGB")
        source = io.BytesIO(found) if isinstance(found, bytes) else Path(str(found).removeprefix("file://")).expanduser()
        with Image.open(source, formats=_FORMATS) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except damaged as error:
        raise _unreadable(place, error) from error


def _found_in(image: Any, place: str) -> Any:
    """Encoded bytes, a path or an object. Raises DataError for addresses in a network and damaged data URLs."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image.startswith(("http://", "https://", "ftp://")):
        raise DataError(f"{place}: images are not fetched from a network: download {image:.100} and give its path")
    if not isinstance(image, str) or not image.startswith("data:"):
        return image
    try:
        return base64.b64decode(image.partition(",")[2], validate=True)
    except (ValueError, binascii.Error) as error:
        raise _unreadable(place, error) from error


def _unreadable(place: str, error: Exception) -> DataError:
    return DataError(f"{place}: an image can't be read: {error}; expected {', '.join(_FORMATS)}")
