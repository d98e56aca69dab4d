"""What the documents point at is there: files behind links, files named in the text, notes in the source, options, keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from finetune.cli import app
from finetune.cli_options import KEYS
from finetune.config.reference import keys_page
from finetune.config.sections import SECTIONS
from finetune.plugin import load

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
ROOMS = ("finetune", "offload", "memory", "csrc", "tests", "benchmarks", "configs", "docs")
SOURCES = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".inc")]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown text."""
    titles = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_at_is_there(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = document.parent / target if target else document
        assert path.exists(), link
        assert not anchor or anchor in headings(path.read_text(encoding="utf-8")), link
    for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w/.-]*\w", text):
        assert (ROOT / name).exists(), name


def test_notes_that_are_cited_are_written():
    written = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for document in DOCUMENTS:
        for note in re.findall(r"\[Note: [^\]]+\]", document.read_text(encoding="utf-8")):
            assert " ".join(note.split()) in written, (document.name, note)


def test_the_map_has_every_room():
    """Folders of the packages, and files that are in none of them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [ROOT / name for name in ("finetune", "offload", "memory")]
    folders = {path.parent for package in packages for path in package.rglob("*.py")} - set(packages)
    files = {path for package in packages for path in package.glob("[!_]*.py")} - {ROOT / "finetune" / "demo.py"}
    names = [f"{path.relative_to(ROOT)}/" for path in folders] + [str(path.relative_to(ROOT)) for path in files]
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def commands(text: str) -> list[str]:
    """What follows `finetune` in fenced, indented and inline code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4}(.+)$", text, re.M)
    lines = "\n".join([*fenced, *indented, *re.findall(r"`(finetune [^`]+)`", text)]).replace("\\\n", " ")
    return re.findall(r"^(?:\$ )?finetune (.+)$", lines, re.M)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_in_a_document_are_options_of_the_command(document):
    known = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in get_command(app).commands.items()
    }
    for line in commands(document.read_text(encoding="utf-8")):
        name, *words = line.split("#")[0].split()
        assert name in known, line
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known[name] | {"--help"}, line


@pytest.mark.parametrize("document", [*DOCUMENTS, *PRESETS], ids=lambda path: path.name)
def test_keys_in_a_document_are_keys_of_the_configuration(document):
    known = {f"{section}.{key}" for section, options in SECTIONS.items() for key in options.model_fields}
    named = re.findall(rf"[`'\s]((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)", document.read_text(encoding="utf-8"))
    assert {name for name in named if not name.endswith("py")} <= known


def test_the_page_of_keys_is_that_of_the_source():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == keys_page(KEYS) + "\n", "write it again: python -m finetune config --markdown > docs/configuration.md"


def test_commands_are_found_in_all_kinds_of_code():
    text = "`finetune plan`\n\n    finetune run a \\\n      --seed 1\n\n```sh\n$ finetune eval --json\n```\nfinetune: no\n"
    assert [line.split() for line in commands(text)] == [["eval", "--json"], ["run", "a", "--seed", "1"], ["plan"]]


def test_examples_for_contributors_are_the_trees():
    """A block of Python that begins with a file's name is a part of that file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for path, code in blocks:
        assert code.rstrip("\n") in (ROOT / path).read_text(encoding="utf-8"), (path, code)


@pytest.mark.parametrize(
    "heading, place",
    [
        ("Add a method", "finetune.methods.base:Method"),
        ("Add a weight format", "finetune.offload.weights.formats.base:StoredWeight"),
    ],
)
def test_what_contributors_are_to_give_has_these_names(heading, place):
    """The names in the table under a heading; `eval` and `generate` are commands."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = "\n".join(re.findall(r"^\|.+\|$", section, re.M))
    names = set(re.findall(r"`(\w+)`", rows)) - {"eval", "generate"}
    known = load(place)
    assert names and [name for name in sorted(names) if not hasattr(known, name)] == []
