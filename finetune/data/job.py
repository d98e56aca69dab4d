"""What the process that prepares data is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MOST_READ = 64
"""Times the rows that steps take: so many are read at most where rows are left out or cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """How rows become tokens: part of the key of a token cache."""

    sequence_length: int
    """Tokens that an example may have. Longer ones are cut at the end and counted in meta["truncated"], plain text is cut into
    consecutive examples; one without any trained token left is counted in meta["dropped"]."""
    stride: int | None = None
    """Tokens by which the next example of a plain text moves on. The ones before, which an earlier example has trained, it only
    sees. None: as many as an example has."""
    form: str = "auto"
    """"auto": found from each file's first row; else one of `finetune.data.forms.FORMS`."""
    completion_only: bool = True
    """Train on the assistant's turns and completions only; else on every token."""
    append_eos: bool | None = None
    """None: after completions and documents, not after chats (their template ends them)."""
    chat_template: str | None = None
    """Jinja text, or the path of a file with it, in place of the tokenizer's own."""
    trust_remote_code: bool = False
    """Whether the tokenizer's own Python code is run."""
    choices: bool = False
    """Prompt + completion rows become one example for each different completion in the data, so that their likelihoods can be
    compared: see TokenDataset.num_choices and .answers."""
    judged: Literal["", "pairs", "scores", "labels"] = ""
    """pairs: rows are a chosen and a rejected answer, which become two examples, one behind the other. scores: the same for a
    model that gives texts a score: all of a text counts, the prompt may be missing, and rows may say in "margin" by how much
    the scores should differ, see TokenDataset.margins. labels: rows of prompt and completion say in "label" whether the
    completion is wanted; see TokenDataset.answers. Empty: rows judge nothing."""
    probabilities: list[float] = field(default_factory=list)
    """With which a row comes from each source, see `finetune.data.mixing`; empty: all rows of one after the other."""
    stopping_strategy: str = "first_exhausted"
    """Of that mixture."""
    mixing_seed: int = 0
    """Of its draws."""
    streaming: bool = False
    """Whether hub data are read as a stream, without downloading them whole."""
    most_rows: int | None = None
    """That the steps take, without those that are left out; no more are read than this needs."""
    most_tokens: int | None = None
    """No further rows are read when there are so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(TokenOptions):
    """Everything the process needs."""

    folder: str
    """Where the cache is written; it exists and is empty."""
    sources: list[list[dict[str, Any]]]
    """Of each source what it has, as fields of `finetune.data.sources.File` or `.HubSplit`."""
    tokenizer: str
    """Folder of its files."""
    fingerprint: str
    """Of these files."""
    model: str
    """What the user calls it, for messages."""
