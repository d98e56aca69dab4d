"""Training of a model's own weights, out of core, against plain PyTorch with everything resident: bit for bit.

The reference keeps an fp32 master of every 16-bit weight, which torch.optim.AdamW updates; the weight is the master rounded
half away from zero (see `finetune.offload.update.kernels`).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from test_projections import PlainDirections
from tiny_models import (
    CONFIGS,
    aligned_copies,
    keep_at_most,
    loss_shares,
    make_config,
    plain_batches,
    reference_device,
    token_loss,
)
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.optimization import get_scheduler

import finetune.offload.update.matrices
import finetune.offload.update.units
import finetune.planner
from finetune.data import TokenDataset
from finetune.export import export
from finetune.methods.first_order import lane_seed
from finetune.methods.selection import make_selection
from finetune.methods.weight_needs import make_rule
from finetune.offload.sizing.needs import DEVICE_BLOCKS, stream_needs
from finetune.offload.update.kernels import ROOT, square_root
from finetune.offload.update.rules.projected import ProjectedRule
from finetune.offload.weights.skeleton import find_blocks
from finetune.trainer import Trainer

SMALL_PIECES = 4096  # bytes: several pieces for every matrix of the tiny models


@pytest.fixture(autouse=True)
def small_pieces(request, monkeypatch):
    """How many of them stay in memory differs: all, or some where ways of clipping are compared."""
    monkeypatch.setattr(finetune.offload.update.units, "PIECE_BYTES", SMALL_PIECES)
    clipping = getattr(request.node, "callspec", None) and request.node.callspec.params.get("clipping")
    if clipping:
        keep_at_most(3 if clipping == "previous" else 1, monkeypatch)


@pytest.fixture(autouse=True)
def roots_that_kernels_have(monkeypatch):
    """MKL has another root for Intel's processors, of which one in 140 is not rounded correctly: the reference takes IEEE's."""
    x = torch.rand(1 << 16)
    if not square_root(x, ROOT).equal(x.sqrt()):
        root = torch.Tensor.sqrt
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))


def rounded(master: torch.Tensor) -> torch.Tensor:
    """To bf16, halves away from zero."""
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def streamed(config: Any, export_to: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    Trainer(config).train()
    losses = [json.loads(line)["loss"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    export(config, export_to)
    return losses, load_whole(config, export_to).state_dict()


def load_whole(config: Any, directory: Any) -> Any:
    kind = tf.AutoModelForCausalLM if isinstance(config.data, TokenDataset) else tf.AutoModelForImageClassification
    model = kind.from_pretrained(directory, dtype=getattr(torch, config.engine.dtype)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def reference(config: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the model's state. Updates are the CPU's, wherever the model computes."""
    options = config.training
    torch.set_num_threads(config.engine.num_threads)
    model = load_whole(config, config.model).to(reference_device(config))
    blocks = list(find_blocks(model).items())
    selection = make_selection(config, len(blocks))
    decayed = set(tf.Trainer.get_decay_parameter_names(None, model))
    computing = dict(model.named_parameters())
    named = {name: torch.nn.Parameter(p.detach().cpu()) for name, p in computing.items()}
    masters = {name: p.detach().float().clone() for name, p in named.items()}
    decays = {n: options.weight_decay if n in decayed or options.decay_norms_and_biases else 0.0 for n in named}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    block_of = {name: i for i, (prefix, _) in enumerate(blocks) for name in named if name.startswith(f"{prefix}.")}
    schedule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler("linear", schedule, options.warmup_steps, options.max_steps)
    losses, previous = [], None
    files = [load_file(path) for path in Path(config.model).glob("*.safetensors")]
    stored_dtypes = {name: value.dtype for file in files for name, value in file.items()}
    for step, batches in enumerate(plain_batches(config)):
        chosen = set(selection.blocks(step))
        wanted = [n for n in named if not config.train or any(re.search(pattern, n) for pattern in config.train)]
        active = [n for n in wanted if (block_of[n] in chosen if n in block_of else selection.ends)]
        signs = [n for n in wanted if config.method == "frugal" and n in block_of and block_of[n] not in chosen]
        for name, parameter in computing.items():
            parameter.requires_grad_(name in active or name in signs)
        if not selection.keeps_state:
            optimizers = {name: value for name, value in optimizers.items() if name in active}
        shares, count = loss_shares(config, batches)
        total = torch.zeros(())
        for index, batch in enumerate(batches):
            labels = batch.pop("labels")
            torch.manual_seed(lane_seed(options.seed, step, index))
            if isinstance(config.data, TokenDataset):
                output = model(**batch, **({"output_router_logits": True} if options.router_loss == "micro_batch" else {}))
                loss = token_loss(output.logits, labels) / count
                if options.router_loss == "micro_batch":
                    loss = loss + options.router_loss_coefficient * output.aux_loss * shares[index]
            else:
                loss = model(**batch, labels=labels).loss * shares[index]
            loss.backward()
            total = total + loss.detach().float()
        losses.append(total.item())
        for name, parameter in computing.items():
            named[name].grad = None if parameter.grad is None else parameter.grad.cpu()
        trained = [p for p in named.values() if p.grad is not None]
        norm = get_total_norm([p.grad for p in trained])
        if options.max_grad_norm and config.optimizer.clipping == "exact":
            clip_grad_norm_(trained, options.max_grad_norm)
        elif options.max_grad_norm:
            by = norm if previous is None else previous
            scale = torch.clamp(options.max_grad_norm / (torch.tensor(float(by)) + 1e-6), max=1.0)
            for parameter in trained:
                parameter.grad.mul_(float(scale))
        previous = norm
        rate = schedule.param_groups[0]["lr"]
        squares: dict[int, list[float]] = {}
        for name in [*active, *signs]:
            parameter, master = named[name], masters[name]
            if parameter.grad is None:
                continue
            parameter = parameter.detach()
            grad = named[name].grad
            before = master.clone()
            if name in signs:
                master.mul_(1 - rate * decays[name]).sub_(grad.float().sign(), alpha=rate)
            else:
                if name not in optimizers:
                    optimizers[name] = new_optimizer(config, master, name, name in block_of, decays[name])
                (group,) = optimizers[name].param_groups
                group["lr"], group["params"][0].grad = rate, grad.float()
                optimizers[name].step()
            stored = stored_dtypes.get(name, parameter.dtype)
            parameter.data.copy_(rounded(master) if stored == torch.bfloat16 else master.to(stored))
            if name in block_of:
                entry = squares.setdefault(block_of[name], [0.0, 0.0])
                entry[0] += float((master - before).square().sum(dtype=torch.float64))
                entry[1] += float(master.square().sum(dtype=torch.float64))
        for name, parameter in computing.items():
            parameter.data.copy_(named[name].data)
        selection.observe({i: tuple(entry) for i, entry in squares.items()})
        model.zero_grad()
        schedule.step()
        scheduler.step()
    return losses, {name: value.detach().cpu() for name, value in model.state_dict().items()}


class Lamb:
    """Algorithm 2 of the paper, on one fp32 parameter."""

    def __init__(self, master: torch.Tensor, options: Any, decay: float) -> None:
        self._options, self._decay, self._step = options, decay, 0
        self._first, self._second = torch.zeros_like(master), torch.zeros_like(master)
        self.param_groups: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(master)]}]

    @torch.no_grad()
    def step(self) -> None:
        (group,), options = self.param_groups, self._options
        (theta,), self._step = group["params"], self._step + 1
        self._first = options.adam_beta1 * self._first + (1 - options.adam_beta1) * theta.grad
        self._second = options.adam_beta2 * self._second + (1 - options.adam_beta2) * theta.grad**2
        first = self._first / (1 - options.adam_beta1**self._step)
        second = self._second / (1 - options.adam_beta2**self._step)
        update = first / (second.sqrt() + options.adam_epsilon) + self._decay * theta
        norms = theta.norm(), update.norm()
        theta -= group["lr"] * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * update


def new_optimizer(
    config: Any, master: torch.Tensor, name: str, in_block: bool, decay: float
) -> torch.optim.Optimizer:
    options = config.training
    rule = replace(make_rule(config, of_blocks=in_block), weight_decay=decay)
    if isinstance(rule, ProjectedRule):
        return PlainDirections(rule, name, master, options.seed)
    if config.optimizer.name == "adafactor":
        return tf.optimization.Adafactor(
            [torch.nn.Parameter(master)], lr=1.0, scale_parameter=False, relative_step=False, weight_decay=decay
        )
    if config.optimizer.name == "lamb":
        return Lamb(master, options, decay)
    return torch.optim.AdamW(
        [torch.nn.Parameter(master)], betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon, weight_decay=decay, foreach=False,
    )  # fmt: skip


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[0] == expected[0]
    different = {
        name: (value - expected[1][name]).abs().max().item()
        for name, value in found[1].items()
        if not value.equal(expected[1][name])
    }
    assert not different


def weights_config(model: Any, data: Any, output: Any, method: str = "full", **changes: Any) -> Any:
    return make_config(model, data, output, **{"method": method} | changes)


@pytest.mark.every(5)
@pytest.mark.parametrize("clipping", ["previous", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "mixtral", "vit"])
def test_full(name, dtype, clipping, checkpoint, tokens, images, tmp_path, monkeypatch):
    if name == "mixtral" and dtype == "float32":
        aligned_copies(monkeypatch)
    data = images if name == "vit" else tokens
    # A weight that is used at both ends gets its gradients in another order: one micro-batch makes the sums the same.
    training = {"micro_batch_size": 5} if name in ("gemma2", "gpt2", "opt") else {}
    config = weights_config(
        checkpoint(name, getattr(torch, dtype)), data, tmp_path / "out", engine={"dtype": dtype},
        optimizer={"clipping": clipping}, training=training,
    )  # fmt: skip
    expected = reference(config)
    assert len(set(expected[0])) == 4
    assert_same(streamed(config, tmp_path / "model"), expected)


@pytest.mark.parametrize("optimizer", [{}, {"name": "lamb"}], ids=["adamw", "lamb"])
def test_full_stored_in_fp16(optimizer, checkpoint, tokens, tmp_path):
    """With a norm in fp32 in every piece: fp16 weights are their masters rounded to the nearest."""
    model = shutil.copytree(checkpoint("llama", torch.float16), tmp_path / "mixed")
    for path in model.glob("*.safetensors"):
        tensors = {n: v.float() if "input_layernorm" in n else v for n, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = weights_config(model, tokens, tmp_path / "out", optimizer=optimizer)
    expected, found = reference(config), streamed(config, tmp_path / "model")
    assert len(set(expected[0])) == 4
    if optimizer:  # sums over matrices are taken in chunks
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
    else:
        assert_same(found, expected)
    exported = [load_file(path) for path in (tmp_path / "model").glob("*.safetensors")]
    assert {value.dtype for file in exported for value in file.values()} == {torch.float16, torch.float32}


def test_smoothed_labels_and_noise_in_embeddings(checkpoint, tokens, tmp_path, monkeypatch):
    """The gradient of the embeddings comes through the noise, which is Transformers' own."""

    def load_noisy(*args: Any, load: Any = load_whole) -> Any:
        model = load(*args)
        model.get_input_embeddings().neftune_noise_alpha = 5.0
        model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
        return model

    monkeypatch.setitem(reference.__globals__, "load_whole", load_noisy)
    smoothing = partial(functional.cross_entropy, label_smoothing=0.1)
    monkeypatch.setitem(token_loss.__globals__, "functional", SimpleNamespace(pad=functional.pad, cross_entropy=smoothing))
    training = {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1}
    config = weights_config(checkpoint("llama"), tokens, tmp_path / "out", training=training)
    assert_same(streamed(config, tmp_path / "exported"), reference(config))


@pytest.mark.parametrize("method", ["lisa", "badam", "slimfit", "frugal"])
def test_selected_blocks(method, checkpoint, tokens, tmp_path):
    config = weights_config(
        checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", method, engine={"dtype": "bfloat16"},
        training={"max_steps": 9, "max_grad_norm": None}, selection={"interval": 2},
    )  # fmt: skip
    expected = reference(config)
    assert_same(streamed(config, tmp_path / "model"), expected)


@pytest.mark.parametrize("method", ["full", "lisa", "badam"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_without_tokens(dtype, method, checkpoint, tokens, tmp_path, monkeypatch):
    """They are rows of a stack that has a gradient: theirs is 0, so moments and weight decay go on, as in the resident loop.
    A router is trained by the loss of routers too."""
    sizes = {"num_experts": 23, "num_experts_per_tok": 1}
    monkeypatch.setitem(CONFIGS, "many experts", lambda: MIXTURES["olmoe"](**sizes))
    aligned_copies(monkeypatch)
    training = {"router_loss": "micro_batch", "router_loss_coefficient": 0.3, "max_grad_norm": None, "weight_decay": 0.1}
    config = weights_config(
        checkpoint("many experts", getattr(torch, dtype)), tokens, tmp_path / "out", method, engine={"dtype": dtype},
        training=training, **({} if method == "full" else {"selection": {"interval": 2}}),
    )  # fmt: skip
    counts = torch.zeros(3, 23)
    for batch in plain_batches(config)[0]:
        batch.pop("labels")
        routers = load_whole(config, config.model)(**batch, output_router_logits=True).router_logits
        counts += torch.stack([x.argmax(1).bincount(minlength=23) for x in routers])
    assert (counts == 0).any(dim=1).all() and (counts > 0).sum() > 6
    assert_same(streamed(config, tmp_path / "model"), reference(config))


@pytest.mark.every(5)
@pytest.mark.parametrize("clipping", ["previous", "exact"])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    # Without gpt2 for adafactor: it divides the gradient of the keys' bias, which is rounding alone, by its own size.
    [
        ("adafactor", "llama"), ("adafactor", "mixtral"), ("lamb", "llama"), ("lamb", "gpt2"),
        ("apollo", "llama"), ("apollo", "mixtral"),
    ],
)  # fmt: skip
def test_rules_that_look_at_whole_matrices(optimizer, name, clipping, checkpoint, tokens, tmp_path, monkeypatch):
    """To rounding: sums over matrices are taken in chunks. Adafactor is Transformers' own."""
    monkeypatch.setattr(finetune.offload.update.matrices, "CHUNK_ELEMENTS", 100)
    config = weights_config(
        checkpoint(name), tokens, tmp_path / "out", training={"weight_decay": 0.1, "micro_batch_size": 5},
        optimizer={"name": optimizer, "clipping": clipping}
        | ({"rank": 4, "refresh_steps": 3} if optimizer == "apollo" else {}),
    )  # fmt: skip
    assert_close(config, tmp_path)


@pytest.mark.parametrize("subspace", ["columns", "projection"])
def test_frugal_in_subspaces_of_matrices(subspace, checkpoint, tokens, tmp_path):
    config = weights_config(
        checkpoint("llama"), tokens, tmp_path / "out", "frugal", optimizer={"rank": 4},
        selection={"subspace": subspace, "interval": 3, "sign_scale": 0.2},
    )  # fmt: skip
    assert_close(config, tmp_path)


def assert_close(config: Any, directory: Any) -> None:
    expected, found = reference(config), streamed(config, directory / "model")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    initial = load_whole(config, config.model).state_dict()
    for key, value in found[1].items():
        moved, wanted = (value - initial[key]).double(), (expected[1][key] - initial[key]).double()
        assert (moved - wanted).norm() <= 2e-3 * wanted.norm(), key


def assert_same_beside_an_accelerator(model: Any, tokens: Any, directory: Any, clipping: str, engine: Any) -> None:
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings", True)
    config = weights_config(
        model, tokens, directory / "out", engine={"dtype": "bfloat16", **engine}, device="simulated",
        optimizer={"clipping": clipping}, training={"micro_batch_size": 5 if tied else 2},
    )  # fmt: skip
    assert_same(streamed(config, directory / "model"), reference(config))


SLOW_LINK = {"simulated_copy_gbps": 0.5, "simulated_delay_ms": 0.3}


@pytest.mark.every(7)
@pytest.mark.parametrize("clipping", ["previous", "exact"])
@pytest.mark.parametrize(
    "engine",
    [
        {"resident_blocks": 0, "lookahead": 0, **SLOW_LINK},
        {"resident_blocks": 0, "lookahead": 3, "io_backend": "threads", **SLOW_LINK},
        {"resident_blocks": 2, "lookahead": 1, "activations": "disk", **SLOW_LINK},
        {"resident_blocks": 5, "kept_graphs": 2, "simulated_delay_ms": 1.0},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_updates_beside_an_accelerator(name, engine, clipping, checkpoint, tokens, tmp_path):
    """Tied (gemma2) or not; a block that was fetched before its update, or not copied back, gives another loss."""
    assert_same_beside_an_accelerator(checkpoint(name, torch.bfloat16), tokens, tmp_path, clipping, engine)


@pytest.mark.every(3)
@pytest.mark.parametrize("clipping", ["previous", "exact"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_blocks_that_only_the_device_keeps(name, clipping, checkpoint, tokens, tmp_path, monkeypatch):
    """The host fetches such a block ahead at first, for a visit that does not ask for it."""

    def needs(streamed, on_device, *_):
        needs = stream_needs(streamed, on_device, resident_blocks=0, lookahead=1)
        kept = max(1, len(streamed.block_bytes) - 2)
        pools = (replace(pool, kept=kept) if pool.name == DEVICE_BLOCKS else pool for pool in needs.pools)
        return replace(needs, pools=tuple(pools))

    monkeypatch.setattr(finetune.planner, "stream_needs", needs)
    assert_same_beside_an_accelerator(checkpoint(name, torch.bfloat16), tokens, tmp_path, clipping, SLOW_LINK)


@pytest.mark.every(3)
@pytest.mark.parametrize("method", ["lisa", "badam", "slimfit", "frugal"])
def test_selected_blocks_beside_an_accelerator(method, checkpoint, tokens, tmp_path):
    config = weights_config(
        checkpoint("llama", torch.bfloat16), tokens, tmp_path / "out", method, device="simulated",
        engine={"dtype": "bfloat16", "resident_blocks": 1, "lookahead": 1, "kept_graphs": 2, **SLOW_LINK},
        training={"max_steps": 9, "max_grad_norm": None}, selection={"interval": 2},
    )  # fmt: skip
    assert_same(streamed(config, tmp_path / "model"), reference(config))


def test_thirty_steps_with_little_memory(checkpoint, tokens, tmp_path, monkeypatch):
    keep_at_most(0, monkeypatch)
    config = weights_config(
        checkpoint("llama"), tokens, tmp_path / "out",
        engine={"resident_blocks": 0, "lookahead": 0, "activations": "disk", "io_backend": "threads"},
        training={"max_steps": 30, "weight_decay": 0.1, "decay_norms_and_biases": True},
    )  # fmt: skip
    expected = reference(config)
    assert_same(streamed(config, tmp_path / "model"), expected)
    assert expected[0][-1] < expected[0][0]
