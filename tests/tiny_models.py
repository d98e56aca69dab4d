"""Tiny random checkpoints of many architectures, token data for them, and the reference: a plain PyTorch + PEFT loop.

[Note: the reference] `reference_run` shares no code with the engine: the whole model in memory, Transformers' own forward
with whole logits, autograd over all of it. Only which examples make a micro-batch, and the seeds, are taken from the project.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch.nn import functional
from transformers.optimization import get_scheduler

from finetune.config import Config
from finetune.data import BatchPlan, TokenDataset, collate
from finetune.data.cache import CacheWriter
from finetune.data.tensor_rows import TensorRows
from finetune.memory.needs import Needs
from finetune.methods.first_order import lane_seed
from finetune.offload.residency.tiers import HostTier
from finetune.offload.sizing.needs import state_needs
from finetune.trainer import Trainer

VOCAB = 101
TEXT = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
# Transformers defaults some of these to ids beyond the tiny vocabulary.
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**TEXT | {"num_hidden_layers": 5}, **HEADS, **IDS),
    "llama-tied": lambda: tf.LlamaConfig(**TEXT, **HEADS, **IDS, tie_word_embeddings=True, attention_bias=True),
    "qwen3": lambda: tf.Qwen3Config(**TEXT, **HEADS, **IDS, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(
        **TEXT, **HEADS, **IDS, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**TEXT, **HEADS, **IDS, sliding_window=6, query_pre_attn_scalar=12),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_positions=37, n_embd=40, n_layer=3, n_head=4, **IDS),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=40, ffn_dim=56, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=37, word_embed_proj_dim=24, dropout=0.1, attention_dropout=0.1, **IDS,
    ),
    # In training, lanes leave out different blocks.
    "opt-layerdrop": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=40, ffn_dim=56, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=37, word_embed_proj_dim=40, layerdrop=0.4, **IDS,
    ),
    "mixtral": lambda: tf.MixtralConfig(**TEXT, **HEADS, **IDS, num_local_experts=5, num_experts_per_tok=2),
    "vit": lambda: tf.ViTConfig(
        hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, image_size=14, patch_size=4,
        num_labels=7, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    ),
}  # fmt: skip


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "50KB") -> Path:
    """A random checkpoint of `CONFIGS[name]`, in several shards; all weights, norms, biases and buffers are unlike 0 and 1."""
    torch.manual_seed(7)
    config = CONFIGS[name]()
    kind = tf.AutoModelForImageClassification if name == "vit" else tf.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())):
            tensor.add_(torch.randn_like(tensor), alpha=0.06)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def token_data(folder: Path, num_examples: int = 13, shortest: int = 7, longest: int = 23) -> TokenDataset:
    """Random tokens of unlike lengths, the first third of each not trained; the third example has no trained token."""
    generator = np.random.default_rng(3)
    folder.mkdir()
    writer = CacheWriter(folder)
    for index in range(num_examples):
        ids = generator.integers(3, VOCAB, int(generator.integers(shortest, longest + 1))).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) if index == 2 else len(ids) // 3] = -100
        writer.add(ids, labels)
    writer.finish({"pad_token_id": 0, "choices": None})
    return TokenDataset.open(folder)


def image_rows(num_rows: int = 13) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"pixel_values": torch.randn(3, 14, 14, generator=generator), "labels": torch.tensor(i % 7)}
        for i in range(num_rows)
    ]


@dataclass(frozen=True)
class Run:
    """losses: of every step. adapter: PEFT's names -> values after the last step."""

    losses: list[float]
    adapter: dict[str, torch.Tensor]


def assert_same_bits(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert found.adapter.keys() == expected.adapter.keys()
    for name, value in expected.adapter.items():
        assert found.adapter[name].dtype == value.dtype and found.adapter[name].equal(value), name


def make_config(model: Path, data: Any, output: Path, **changes: Any) -> Config:
    """4 steps of 5 rows in micro-batches of 2, 2 and 1; a section in `changes` adds to what is here, of which a method has what
    it reads."""
    values: dict[str, Any] = {
        "model": str(model), "data": data, "output": output, "host_memory": "8GiB", "device": "cpu",
        "training": {
            "max_steps": 4, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 5e-3, "seed": 11, "warmup_steps": 1,
            "weight_decay": 0.01, "max_grad_norm": 0.5,
        },
        "dataset": {"sequence_length": 24},
        "lora": {"r": 3, "alpha": 7, "dropout": 0.1},
        "engine": {"dtype": "float32", "num_threads": 1},  # two threads are slower here, more so beside others
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) and key in values else value
    if values.get("method", "lora") != "lora" and values.get("zo", {}).get("parameters") != "lora":
        del values["lora"]
    if values.get("method") == "zo":
        values["training"].pop("max_grad_norm", None)
    return Config(**values)


def aligned_copies(monkeypatch: Any) -> None:
    """MKL rounds a lone row's product (a token alone with its expert) otherwise where the matrix is not aligned to 16 bytes, as
    these tiny ones in their slots: blocks compute with aligned copies here."""
    views = HostTier.views
    monkeypatch.setattr(HostTier, "views", lambda *args: {name: x.clone() for name, x in views(*args).items()})


def keep_at_most(pieces: int, monkeypatch: Any) -> None:
    """So many pieces of an optimizer's state stay in memory, however much room there is."""

    def needs(slot_bytes: int, most: int, waiting: int) -> Needs:
        return state_needs(slot_bytes, min(pieces, most), waiting)

    monkeypatch.setattr("finetune.methods.weight_needs.state_needs", needs)


def streamed_run(config: Config, **options: Any) -> Run:
    """What the Trainer leaves behind."""
    Trainer(config, **options).train()
    rows = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    losses = [float("nan") if row["loss"] is None else row["loss"] for row in rows]
    return Run(losses, load_file(config.output / "adapter" / "adapter_model.safetensors"))


def reference_device(config: Config) -> torch.device:
    """Where the reference of that run computes: an accelerator's own kernels round differently from the CPU's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if config.device == "auto" and accelerator is not None else torch.device("cpu")


def load_plain(config: Config) -> Any:
    """The model with a fresh adapter, everything in memory, in training mode."""
    kind = tf.AutoModelForImageClassification if not isinstance(config.data, TokenDataset) else tf.AutoModelForCausalLM
    model = kind.from_pretrained(config.model, dtype=getattr(torch, config.engine.dtype))
    for parameter in model.parameters():
        # Transformers leaves them where they lie in the mapped file; a product of a single row (a classifier, a
        # micro-batch of one) rounds differently when its matrix is not aligned to 16 bytes.
        parameter.data = parameter.data.clone()
    task = {} if kind is tf.AutoModelForImageClassification else {"task_type": "CAUSAL_LM"}
    torch.manual_seed(config.training.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by PEFT itself for GPT-2
        if config.method == "adapter":
            adapter = PEFT_TYPE_TO_CONFIG_MAPPING[config.adapter.type.upper()](**task, **config.adapter.peft_arguments)
        else:
            adapter = LoraConfig(**task, **config.lora.peft_arguments())
        model = get_peft_model(model, adapter).train()
    return model.to(reference_device(config))


def plain_batches(config: Config) -> list[list[dict[str, torch.Tensor]]]:
    """Per step, per micro-batch: the model's inputs and labels. `config.data` is a TokenDataset or tensor rows."""
    data, options = config.data, config.training
    is_text = isinstance(data, TokenDataset)
    lengths = data.lengths if is_text else np.ones(len(data), np.int64)
    packing = config.dataset.sequence_length if config.dataset.packing else None
    plan = BatchPlan(
        len(data), options.batch_size, options.micro_batch_size, options.seed, lengths,
        steps=options.max_steps, packing=packing,
    )  # fmt: skip
    steps = []
    for step in range(plan.num_steps):
        if is_text:
            batches = [
                {**collate([[data[i] for i in row] for row in rows], data.pad_token_id), "use_cache": False}
                for rows in plan.step(step)
            ]
        else:
            batches = [TensorRows(data).collate([i for row in rows for i in row]) for rows in plan.step(step)]
        device = reference_device(config)
        steps.append([{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches])
    return steps


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of all labelled next tokens, over whole fp32 logits. Positions of a prompt have no labels."""
    labels = functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), reduction="sum")


def loss_shares(config: Config, batches: list[dict[str, torch.Tensor]]) -> tuple[list[float], int]:
    """Of a step's micro-batches: by what the own loss of each, a mean over its items, counts for the step's; items in all."""
    is_text = isinstance(config.data, TokenDataset)
    labels = [batch["labels"] for batch in batches]
    items = [int((y[:, 1:] != -100).sum()) if is_text else len(y) for y in labels]
    count = max(1, sum(items))
    return [n / count for n in items], count


def reference_run(
    config: Config,
    own_loss: Callable[[Any], torch.Tensor] | None = None,
    after_update: Callable[[Any, int], None] = lambda model, step: None,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    prepare: Callable[[Any], None] = lambda model: None,
    lane_loss: Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], torch.Tensor] | None = None,
) -> Run:
    """See [Note: the reference]. own_loss: of the adapter, once a step. after_update: called with the model and the step.
    make_optimizer: of the model; None: AdamW. prepare: called with the model before all steps. lane_loss: of a micro-batch's
    logits, its labels and those of all; None: the mean over the tokens of the step."""
    options = config.training
    torch.set_num_threads(config.engine.num_threads)  # sums are cut at other places for another number
    model = load_plain(config)
    prepare(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = set(tf.Trainer.get_decay_parameter_names(None, model))  # norms and biases are left alone
    groups: dict[float, list[torch.nn.Parameter]] = {options.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[options.weight_decay if name in decayed else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()], lr=options.learning_rate
    )
    if make_optimizer is not None:
        optimizer = make_optimizer(model)
    scheduler = get_scheduler("linear", optimizer, options.warmup_steps, options.max_steps)
    losses = []
    for step, batches in enumerate(plain_batches(config)):
        shares, count = loss_shares(config, batches)
        all_labels = [batch["labels"] for batch in batches]
        total, own = torch.zeros(()), torch.zeros(())
        if own_loss is not None:
            own = own_loss(model)
            own.backward()
        for index, batch in enumerate(batches):
            labels = batch.pop("labels")
            torch.manual_seed(lane_seed(options.seed, step, index))
            if isinstance(config.data, TokenDataset):
                output = model(**batch)
                loss = token_loss(output.logits, labels) / count if lane_loss is None else None
                if lane_loss is not None:
                    loss = lane_loss(output.logits, labels, all_labels)
                if getattr(output, "aux_loss", None) is not None:  # of its router, as its own loss has it
                    loss = loss + model.config.router_aux_loss_coef * output.aux_loss * shares[index]
            else:
                loss = model(**batch, labels=labels).loss * shares[index]
            loss.backward()
            total = total + loss.detach().float()
        torch.nn.utils.clip_grad_norm_(trainable, options.max_grad_norm)
        optimizer.step()
        after_update(model, step)
        scheduler.step()
        optimizer.zero_grad()
        losses.append((total + own.detach()).item())
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = {name: value.detach().clone().contiguous().cpu() for name, value in state.items()}
    return Run(losses, adapter)


def assert_same_on_both_devices(
    packed: Path, decoded: Path, data: Any, folder: Path, lora: Mapping[str, Any], dtype: str = "float32"
) -> Run:
    """Runs over `packed`, on a CPU and beside a device, with one block in each memory: the bits of plain PEFT over `decoded`,
    whose run this returns. Graphs of two blocks stay, the others are recomputed."""
    expected = reference_run(make_config(decoded, data, folder / "plain", lora=lora, engine={"dtype": dtype}))
    for device in ("cpu", "simulated"):
        engine = {"resident_blocks": 1, "kept_graphs": 2, "dtype": dtype}
        config = make_config(packed, data, folder / device, device=device, engine=engine, lora=lora)
        assert_same_bits(streamed_run(config), expected)
    return expected
