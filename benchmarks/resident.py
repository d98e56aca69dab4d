"""Trains as `finetune run` would, with the whole model, masters and state resident, in plain PyTorch and PEFT.

    python benchmarks/resident.py --set model=DIR --set data=FILE --set output=DIR --set method=full ...

What `quality.py --resident` compares with. Shared with the project: the settings, which rows and which blocks a step
has, and the learning rate. Not shared: forward, loss, gradients, clipping (by the exact norm), AdamW on fp32 masters. The
output gets adapter/ or model/, and metrics.jsonl with loss, seconds, device_peak_bytes and host_peak_bytes of every step.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from finetune.config import Config
from finetune.data import BatchPlan, collate, prepare
from finetune.memory.meter import MemoryMeter
from finetune.methods.schedule import make_scheduler
from finetune.methods.selection import make_selection
from finetune.methods.weight_decay import undecayed
from finetune.offload.weights.skeleton import find_blocks


class Masters:
    """AdamW on fp32 copies of the parameters that a step trains, and signs for the others that have a gradient (frugal)."""

    def __init__(self, model: torch.nn.Module, config: Config) -> None:
        blocks = list(find_blocks(model))
        self._config, self._named = config, dict(model.named_parameters())
        self._block_of = {n: i for i, prefix in enumerate(blocks) for n in self._named if n.startswith(f"{prefix}.")}
        self._selection = make_selection(config, len(blocks))
        self._masters = {name: p.detach().float().clone() for name, p in self._named.items()}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        left_alone = undecayed(model, self._named, config.training)
        self._decays = {name: 0.0 if name in left_alone else config.training.weight_decay for name in self._named}

    def choose(self, step: int) -> None:
        chosen = set(self._selection.blocks(step))
        self._active = {n for n in self._named if self._block_of.get(n, -1) in chosen or n not in self._block_of}
        if not self._selection.ends:
            self._active &= self._block_of.keys()
        for name, parameter in self._named.items():
            signed = self._config.method == "frugal" and name in self._block_of
            parameter.requires_grad_(name in self._active or signed)
        if not self._selection.keeps_state:
            self._optimizers = {name: value for name, value in self._optimizers.items() if name in self._active}

    @torch.no_grad()
    def update(self, rate: float) -> None:
        options, sums = self._config.training, {}
        for name, parameter in self._named.items():
            if parameter.grad is None:
                continue
            master, gradient = self._masters[name], parameter.grad.float()
            before = master.clone()
            if name in self._active:
                optimizer = self._optimizers.get(name) or torch.optim.AdamW(
                    [torch.nn.Parameter(master)], betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon,
                    weight_decay=self._decays[name],
                )  # fmt: skip
                self._optimizers[name] = optimizer
                (group,) = optimizer.param_groups
                group["lr"], group["params"][0].grad = rate, gradient
                optimizer.step()
            else:
                scaled = rate * self._config.selection.sign_scale
                master.mul_(1 - scaled * self._decays[name]).sub_(gradient.sign(), alpha=scaled)
            parameter.copy_(master)
            if (block := self._block_of.get(name)) is not None:
                change = torch.stack([(master - before).square().sum(), master.square().sum()])
                sums[block] = sums.get(block, 0) + change
        self._selection.observe({block: tuple(pair.tolist()) for block, pair in sums.items()})


def train(config: Config) -> None:
    options, device = config.training, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    meter = MemoryMeter().start()
    config.output.mkdir(parents=True, exist_ok=True)
    model: Any = tf.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.bfloat16)
    torch.manual_seed(options.seed)
    if config.method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora.peft_arguments()))
    model.to(device).train()
    rows = prepare(
        config.data, model=config.model, cache_dir=config.output / "tokens", sequence_length=config.dataset.sequence_length
    )
    plan = BatchPlan(
        len(rows), options.batch_size, options.micro_batch_size, options.seed, rows.lengths,
        epochs=None if options.max_steps else options.epochs, steps=options.max_steps,
    )  # fmt: skip
    masters = None if config.method == "lora" else Masters(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = torch.optim.AdamW(
        trained if masters is None else [torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2), eps=options.adam_epsilon, weight_decay=options.weight_decay,
    )  # fmt: skip
    scheduler = make_scheduler(options, rates, plan.num_steps, 0)
    with (config.output / "metrics.jsonl").open("w", buffering=1) as metrics:
        for step in range(plan.num_steps):
            started, total = time.perf_counter(), 0.0
            if masters is not None:
                masters.choose(step)
            batches = [collate([[rows[i] for i in row] for row in group], rows.pad_token_id) for group in plan.step(step)]
            count = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches), device=device)
            for batch in batches:
                batch = {key: value.to(device) for key, value in batch.items()}
                loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
                loss.backward()
                total += loss.item()
            if options.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            rate = rates.param_groups[0]["lr"]
            if masters is not None:
                masters.update(rate)
            rates.step()
            scheduler.step()
            model.zero_grad()
            meter.sample()
            device_peak = torch.accelerator.max_memory_reserved() if device.type != "cpu" else None
            row = {"step": step + 1, "loss": total, "seconds": time.perf_counter() - started, "learning_rate": rate}
            metrics.write(json.dumps(row | {"device_peak_bytes": device_peak, "host_peak_bytes": meter.peak_bytes}) + "\n")
    if config.method == "lora":
        model.save_pretrained(config.output / "adapter")
    else:
        model.save_pretrained(config.output / "model")
        tf.AutoTokenizer.from_pretrained(config.model).save_pretrained(config.output / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    train(Config.load(settings=parser.parse_args().set))


if __name__ == "__main__":
    main()
