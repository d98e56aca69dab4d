"""What was made here, on a hub: private unless it is said otherwise, and never without being asked."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.adapters.saved import base_name, find
from finetune.adapters.seal import CONFIG, rename_base, trained_on
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.runs.model_card import CARD, model_card, run_of, shown_name


def check_name(name: str) -> None:
    """Raises UserError for what is no repository's name."""
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise UserError(f"--push: expected OWNER/NAME, found {name!r:.80}")


def push_result(config: Config, adapter: Path | str | None, target: Path | None, name: str, public: bool) -> str:
    """Uploads what an export has written to `target`, or where that is None the adapter itself, and says so, for people. A GGUF
    file gets a card. adapter: as `merge` takes it. Raises UserError."""
    if target is None:
        target = find(config.output if adapter is None else adapter)
        target = target if (target / CONFIG).is_file() else target / "adapter"
        if not (target / CONFIG).is_file():
            raise UserError(f"--push: expected the directory of an adapter, or --to for what is to be written, found {target}")
    run = run_of(config.output if adapter is None else Path(adapter))
    words = f"{target.name}, for llama.cpp, made with finetune."
    card = "" if target.is_dir() else model_card(run, config.model, "gguf", words, Path(config.model) / CARD)
    return f"{target}: uploaded to {push(target, name, public, card)}"


def push(path: Path, name: str, public: bool = False, card: str = "") -> str:
    """Uploads a directory with what is in it, or a file with `card`, and returns the address.

    A repository that is not there is made, private unless `public`; one that is there stays as it is. Raises UserError.
    """
    from huggingface_hub import HfApi

    check_name(name)
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=not public, exist_ok=True))
        if path.is_dir():
            with _without_places(path) as folder:
                api.upload_folder(repo_id=name, folder_path=folder)
        else:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=name)
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=name)
    except Exception as error:  # the hub's HTTP client, and so the type of its errors, changes with its version
        raise UserError(
            f"{path} is written, but {name} on the hub did not take it ({' '.join(str(error).split()):.300}): log in with "
            "`hf auth login`, and give the same command with --push alone, or upload it with `hf upload`"
        ) from error
    return address


@contextmanager
def _without_places(path: Path) -> Iterator[Path]:
    """`path`, or where that is an adapter that names its base by a place on this machine, a copy that names it without."""
    names = []
    if (path / CONFIG).is_file():
        names = [name for name in (base_name(path), (trained_on(path) or {}).get("name")) if name]
    if all(name == shown_name(name) for name in names):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        shutil.copytree(path, copy)
        rename_base(copy, shown_name(names[0]))
        yield copy
