"""Greedy or sampled decoding on the streamed model: a token costs one pass over the weights, shared by all prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.base import adapter_of
from finetune.config import Config
from finetune.data.preparation import template_text
from finetune.data.tokenizer_files import read_tokenizer
from finetune.memory.errors import UserError
from finetune.memory.tensor_file import in_file
from finetune.offload.files.checkpoint import is_gguf
from finetune.offload.files.gguf_file import read_gguf_header
from finetune.offload.sizing.dry_run import measure_visit
from finetune.offload.step.cached_attention import attention_in_parts, refusing_what_has_no_parts
from finetune.offload.step.chunked_attention import check_sdpa
from finetune.offload.streamed_model import StreamedModel
from finetune.offload.weights.skeleton import cache_argument
from finetune.planned_run import BatchShape
from finetune.session import Session

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

_CHOOSING_BYTES = 32
"""For each token of the vocabulary: scores, sorted scores and their places while one is chosen."""
SEEDS = 1 << 63
"""Of the sampling there are so many: those of several prompts, which follow one another, are in 64 bits too."""


def decode(
    streamed: StreamedModel,
    prompts: Sequence[Sequence[int]],
    choosers: Sequence[Callable[[torch.Tensor], int]],
    ends: frozenset[int],
    max_new_tokens: int,
    variants: Sequence[int] = (),
    piece: int | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yields, pass by pass, (prompt, token) for every prompt that goes on; the end token is the last of a prompt's.

    prompts: token ids. choosers: logits, fp32 [vocabulary] on the CPU, to a token. variants: which one of the weights
    each prompt meets, as in `StreamedModel.forward`. piece: longer prompts go through the model so many tokens at a time, and
    attention over so many keys; None: whole.
    """
    with nullcontext() if piece is None else attention_in_parts(piece):
        yield from _decode(streamed, prompts, choosers, ends, max_new_tokens, variants, piece)


def _decode(
    streamed: StreamedModel, prompts: Sequence[Sequence[int]], choosers: Sequence[Callable[[torch.Tensor], int]],
    ends: frozenset[int], max_new_tokens: int, variants: Sequence[int], piece: int | None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    device = streamed.device.torch_device
    cache_key, before = cache_argument(streamed.parts.model), adapter_of(streamed.model).positions
    caches = [make_cache(streamed, before + len(prompt) + max_new_tokens) for prompt in prompts]
    news = [torch.tensor([list(prompt)], device=device) for prompt in prompts]
    if piece is not None:
        news = _fill_caches(streamed, news, caches, variants, piece)
    going = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        versions = [variants[i] for i in going] if variants else ()
        outputs = streamed.forward(
            [{"input_ids": news[i], cache_key: caches[i], "use_cache": True} for i in going], versions
        )
        tokens = []
        for i, logits in zip(going, streamed.last_logits(outputs, versions), strict=True):
            check_choosable(logits)
            token = choosers[i](logits[0].cpu())
            news[i] = torch.tensor([[token]], device=device)
            tokens.append((i, token))
        del outputs
        yield tokens
        for i, token in tokens:
            if token in ends:
                going.remove(i)
                caches[i] = None
        if not going:
            return


def _fill_caches(
    streamed: StreamedModel, prompts: Sequence[torch.Tensor], caches: Sequence[Any], variants: Sequence[int], piece: int
) -> list[torch.Tensor]:
    """Brings all of the prompts, int64 [1, tokens], into the caches but for a last piece of each, which is returned."""
    cache_key, rest = cache_argument(streamed.parts.model), list(prompts)
    while going := [i for i, prompt in enumerate(rest) if prompt.shape[1] > piece]:
        inputs = [{"input_ids": rest[i][:, :piece], cache_key: caches[i], "use_cache": True} for i in going]
        streamed.forward(inputs, [variants[i] for i in going] if variants else ())
        for i in going:
            rest[i] = rest[i][:, piece:]
    return rest


def check_choosable(logits: torch.Tensor) -> None:
    """Raises UserError for logits [..., vocabulary] of which no token can be chosen; one that is -inf never is."""
    highest = logits.amax(dim=-1)  # NaN where one is
    if not bool(highest.isfinite().all()):
        found = "NaN" if bool(highest.isnan().any()) else "infinite"
        raise UserError(
            f"no next token can be chosen, because the model's outputs are {found}: look for a faulty weight, or try another "
            "engine.dtype"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, under the names and with the meanings of Transformers' `GenerationConfig`."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Samples among so many of the likeliest tokens."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that together have this probability (Holtzman et al. 2020, nucleus sampling)."""
    min_p: float | None = None
    """Samples among tokens that have this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before are less likely (Keskar et al. 2019)."""
    no_repeat_ngram_size: int = 0
    """No so many tokens come in a row that did so before. 0: they may."""
    seed: int = 42
    """Of the sampling; prompt i uses seed + i."""

    def processors(self) -> LogitsProcessorList:
        """Transformers' own, in its order. Raises UserError for numbers that they do not take."""
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"sampling: expected a seed from 0 to {SEEDS - 1}, found {self.seed}")
        from transformers.generation import logits_process as kinds

        wanted = [
            (kinds.RepetitionPenaltyLogitsProcessor, self.repetition_penalty, self.repetition_penalty != 1),
            (kinds.NoRepeatNGramLogitsProcessor, self.no_repeat_ngram_size, self.no_repeat_ngram_size),
        ]
        if self.temperature:
            wanted += [
                (kinds.TemperatureLogitsWarper, float(self.temperature), self.temperature != 1),
                (kinds.TopKLogitsWarper, self.top_k, self.top_k),
                (kinds.TopPLogitsWarper, self.top_p, self.top_p != 1),
                (kinds.MinPLogitsWarper, self.min_p, self.min_p is not None),
            ]
        try:
            return kinds.LogitsProcessorList(kind(value) for kind, value, is_wanted in wanted if is_wanted)
        except ValueError as error:
            raise UserError(f"sampling: {error}") from None


def chooser(how: Sampling, prompt: Sequence[int] = (), number: int = 0) -> Callable[[torch.Tensor], int]:
    """A function from logits, fp32 [vocabulary] on the CPU, to the next token after those of `prompt`, number `number`, and
    those that it chose before: the one that Transformers' `generate` chooses, its generator seeded with how.seed + number."""
    processors, ids = how.processors(), torch.tensor([list(prompt)], dtype=torch.int64)
    generator = torch.Generator().manual_seed(how.seed + number)

    def choose(logits: torch.Tensor) -> int:
        nonlocal ids
        scores = processors(ids, logits[None])
        if how.temperature:
            token = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=-1)
        return int(token)

    return choose


class TextPieces:
    """Tokens to text as they come: pieces are whole characters, and together they are the decoded whole.

    A character may be several tokens (byte-level BPE), and a decoder may drop a space at the start of what it is given:
    each piece is what the last tokens add to the text of those before them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-8:])  # tokens whose text is out
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, or an empty string."""
        self._pending.append(token)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def rest(self) -> str:
        """At the end: what is left, an incomplete character as U+FFFD."""
        return self._piece() if self._pending else ""

    def _piece(self) -> str:
        return self._text(self._context + self._pending)[len(self._text(self._context)) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_tokens(directory: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, else of config.json, and the tokenizer's own; in a GGUF file, what
    it says ends a text, a turn or a message."""
    found: set[int] = set()
    if is_gguf(directory):
        values = read_gguf_header(directory).values
        found = {values[key] for key in (f"tokenizer.ggml.{word}_token_id" for word in ("eos", "eot", "eom")) if key in values}
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not found and path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            value = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found if tokenizer_eos is None else found | {tokenizer_eos})


def load_tokenizer(directory: Path, config: Config) -> Any:
    try:
        tokenizer = read_tokenizer(directory, config.trust_remote_code)
    except Exception as error:  # Transformers raises whatever its parts do
        raise UserError(
            f"the tokenizer of {config.model} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}): bring "
            "its files (tokenizer.json, ...) from where the model came from"
        ) from error
    if (template := template_text(config.dataset.chat_template)) is not None:
        tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What generation holds for some prompts while it goes on."""

    kept_bytes: int  # keys and values of all layers
    near_bytes: int  # what is made of them while a block attends, and logits


def cache_bytes(session: Session, prompt_tokens: int, max_new_tokens: int, prompts: int, rows: int = 1) -> int:
    """What generation holds for `prompts` prompts while it goes on: keys and values of all layers, and logits. rows: of
    each prompt, texts."""
    size = cache_size(session, prompt_tokens, prompt_tokens + max_new_tokens, prompts, rows)
    return size.kept_bytes + size.near_bytes


def cache_size(
    session: Session, tokens: int, most_tokens: int, prompts: int, rows: int = 1, piece: int | None = None
) -> CacheSize:
    """tokens: of a prompt that is tried. most_tokens: that a text has at most. rows: of each prompt. piece: as in `decode`.

    Raises UserError for a model whose attention does not go in pieces."""
    from transformers import DynamicCache

    # The dry run of a visit fills one layer of this cache on the meta device: so large is a layer's.
    probe = DynamicCache(config=session.parts.model.config)
    inputs = BatchShape.of_text(1, tokens, 1, train=False).inputs
    inputs |= {cache_argument(session.parts.model): probe, "use_cache": True}
    if piece is not None:
        check_sdpa(session.parts.model)
    with nullcontext() if piece is None else refusing_what_has_no_parts():
        measure_visit(session.parts, session.model, inputs, train=False)
    text_config = session.parts.model.config.get_text_config(decoder=True)
    filled = [layer for layer in probe.layers if getattr(layer, "keys", None) is not None]
    sizes = (layer.keys.nbytes + layer.values.nbytes for layer in filled)
    prompt_bytes = max(sizes, default=2 * tokens * text_config.hidden_size * session.parts.dtype.itemsize)
    layer_bytes = -(-prompt_bytes * most_tokens // tokens)
    # While a block attends, keys and values of a group of heads may be repeated for each.
    heads = getattr(text_config, "num_attention_heads", 1)
    repeated = heads // max(1, getattr(text_config, "num_key_value_heads", None) or heads)
    vocabulary = session.parts.head.module.weight.shape[0]
    logits_bytes = (4 * prompts * rows + _CHOOSING_BYTES) * vocabulary
    # In parts, so many keys are: and the sum over parts is in fp32.
    repeated_bytes = repeated * (layer_bytes if piece is None else 4 * prompt_bytes)
    return CacheSize(rows * layer_bytes * len(session.parts.blocks) * prompts, rows * repeated_bytes + logits_bytes)


def make_cache(streamed: StreamedModel, max_tokens: int, rows: int = 1) -> Any:
    """A key-value cache whose full-attention layers have room for `max_tokens` from the start.

    Transformers' own grow by a copy a token: twice the memory at that moment, and holes of every size left behind.
    rows: of texts that have one beginning: after that, `spread` of each of these layers makes it the beginning of all.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            both = (key_states, value_states)
            with in_file():
                self._room = [
                    states.new_empty(max(rows, len(states)), *states.shape[1:-2], max_tokens, states.shape[-1])
                    for states in both
                ]

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            start = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            end = start + key_states.shape[-2]
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[: len(states), ..., start:end, :] = states
            self.keys, self.values = (room[: len(key_states), ..., :end, :] for room in self._room)
            return self.keys, self.values

        def spread(self) -> None:
            end = self.get_seq_length()
            for room in self._room:
                room[1:, ..., :end, :] = room[:1, ..., :end, :]
            self.keys, self.values = (room[..., :end, :] for room in self._room)

    cache = DynamicCache(config=streamed.parts.model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
