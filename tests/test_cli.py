"""The `finetune` command through its real entry point: flags, messages, exit codes, nothing heavy imported early.

The trainer and the others behind the commands are replaced: what is tested is what the command does itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from finetune.cli import app
from finetune.cli_messages import how_to_go_on
from finetune.cli_options import KEYS
from finetune.config import Config
from finetune.config.loading import SHORTHANDS
from finetune.config.presets import read_presets
from finetune.memory.errors import UserError
from finetune.methods.registry import METHODS

ROOT = Path(__file__).parent.parent


def finetune(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )


class Recorder:
    """Stands for the trainer: keeps the configuration, and raises what it is told to."""

    config: Config | None = None
    error: BaseException | None = None

    def __init__(self, config: Config) -> None:
        type(self).config = config

    def train(self) -> types.SimpleNamespace:
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(summary="a summary [/bold]")

    def plan(self) -> types.SimpleNamespace:
        self.train()
        return types.SimpleNamespace(describe=lambda: "a plan [/bold]")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    recorder = type("Recorder", (Recorder,), {})
    replace_module(monkeypatch, "finetune.trainer", Trainer=recorder)
    monkeypatch.delenv("FINETUNE_DEBUG", raising=False)
    return recorder


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def invoke(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [*words], input=text)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from finetune.cli import main\n"
        "sys.argv = ['finetune', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic', 'yaml', 'datasets', 'pyarrow'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "heavy: []" in result.stdout
    for command in ("run", "plan", "eval", "generate", "presets", "version"):
        assert f" {command} " in result.stdout


def test_version_and_presets() -> None:
    import finetune as package

    assert finetune("--version").stdout.startswith(f"finetune {package.__version__}\npython 3.")
    assert invoke("-h").stdout == invoke("--help").stdout and "Usage" in invoke("run", "-h").stdout
    lines = finetune("presets").stdout.splitlines()
    goals = {preset.name: preset.goal for preset in read_presets()}
    assert dict(line.split(maxsplit=1) for line in lines) == goals
    assert len({line.index(goals[line.split()[0]]) for line in lines}) == 1


def test_nothing_is_said_of_triton_at_the_end() -> None:
    """Kernels for accelerators, and bitsandbytes where PEFT finds it, bring it in."""
    pytest.importorskip("triton")
    code = "import sys, triton._C.libtriton; sys.argv = ['finetune', 'presets']; from finetune.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stderr


def test_shared_options_are_keys_of_the_configuration() -> None:
    assert KEYS.keys() <= Config.model_fields.keys() | SHORTHANDS.keys()


@pytest.mark.parametrize("command", ["run", "plan", "eval", "generate", "export", "compress"])
def test_help_says_what_every_option_is_for(command: str) -> None:
    parameters = get_command(app).commands[command].params
    assert all(len(one.help) > 9 for one in parameters), [one.name for one in parameters if not one.help]
    names = [one.name for one in parameters]
    assert names[:2] == ["config", "model"] and names[-1] == "debug" and len(set(names)) == len(names)


def test_help_says_what_each_method_trains() -> None:
    option = next(one for one in get_command(app).commands["run"].params if one.name == "method")
    assert all(f"{name} ({entry.goal})" in option.help for name, entry in METHODS.items())


EVERYDAY = [
    "--model", "m", "--data", "d", "--eval-data", "e", "--method", "lora", "--output", "o", "--host-memory", "-2GB",
    "--device-memory", "50%", "--disk", "7GB", "--device", "cpu", "--max-steps", "5", "--epochs", "0.5",
    "--batch-size", "6", "--micro-batch-size", "2", "--sequence-length", "99", "--learning-rate", "1e-3", "--seed", "0",
    "--resume", "--trust-remote-code", "--set", "lora.r=3", "--set", "training.save_steps=7",
]  # fmt: skip


@pytest.mark.parametrize("command", ["run", "plan"])
def test_flags_reach_the_trainer(trainer: type[Recorder], command: str) -> None:
    result = invoke(command, *EVERYDAY)
    assert result.exit_code == 0, result.output
    assert trainer.config == Config(
        model="m", data="d", eval_data="e", method="lora", output="o", host_memory="-2GB", device_memory="50%",
        disk="7GB", device="cpu", resume=True, trust_remote_code=True, max_steps=5, epochs=0.5, batch_size=6,
        micro_batch_size=2, sequence_length=99, learning_rate=1e-3, seed=0, lora={"r": 3}, training={"save_steps": 7},
    )  # fmt: skip
    said = {"plan": "a plan [/bold]\n", "run": "m: method lora, data d, output o\na summary [/bold]\n"}
    assert result.output == said[command]


def test_flags_win_over_the_file(trainer: type[Recorder], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\nresume: true\ntraining: {max_steps: 9, seed: 3}\n")
    assert invoke("run", str(file), "--max-steps", "2", "--no-resume").exit_code == 0
    assert (trainer.config.training.max_steps, trainer.config.training.seed, trainer.config.resume) == (2, 3, False)
    assert invoke("run", str(file)).exit_code == 0
    assert (trainer.config.training.max_steps, trainer.config.resume) == (9, True)


def test_preset_by_name(trainer: type[Recorder]) -> None:
    assert invoke("run", "laptop-8gb", "--model", "m", "--data", "d").exit_code == 0
    assert trainer.config == Config.load("laptop-8gb", {"model": "m", "data": "d"})


def test_a_run_is_named_by_its_directory(trainer: type[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`resume` goes on with its settings and what is changed; `eval` measures what it has left."""
    out, found = tmp_path / "out", []
    (out / "adapter").mkdir(parents=True)
    (out / "config.yaml").write_text("model: m\ndata: d\noutput: elsewhere\ntraining: {max_steps: 9}\n")
    assert "expected the directory of a run, found none in" in invoke("resume", str(out)).stderr
    (out / "run.json").write_text("{}")
    assert invoke("resume", str(out), "--max-steps", "20").exit_code == 0
    assert trainer.config == Config(model="m", data="d", output=out, max_steps=20, resume=True)
    replace_module(monkeypatch, "finetune.evaluate", evaluate=lambda *given: found.append(given) or {})
    assert invoke("eval", str(out), "--data", "e").exit_code == 0
    assert found == [(Config(model="m", data="d", eval_data="e", output=out, max_steps=9), out)]


def test_keys_are_printed() -> None:
    lines = invoke("config", "batch_size", "adam_beta1").stdout.splitlines()
    assert lines[0] == "training.batch_size: 8  (whole number from 1, --batch-size)" and lines[1] == "    Rows a step."
    assert [line.split(":")[0] for line in lines if line[0] != " "] == [
        "training.batch_size", "training.micro_batch_size", "training.adam_beta1"
    ]  # fmt: skip
    assert invoke("config", "nothing").stdout == "no key has nothing in its name\n"


def test_chat_takes_turn_after_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Conversation:
        def __init__(self, config: Config, adapter: str | None, max_new_tokens: int, **how: Any) -> None:
            assert (config, adapter, max_new_tokens) == (Config(model="m"), "x", 9)
            assert how == {"temperature": 0.5}

        def __enter__(self) -> Conversation:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def say(self, turn: str) -> Iterator[str]:
            yield from (turn, "!")

    replace_module(monkeypatch, "finetune.chat", Conversation=Conversation)
    words = ["chat", "--model", "m", "--adapter", "x", "--max-new-tokens", "9", "--temperature", "0.5"]
    assert invoke(*words, text="hello\nyou\n\nnever").stdout == "hello!\nyou!\n"


def test_configuration_errors_come_as_one_message() -> None:
    result = finetune("run", "--data", "d", "--host-memory", "5XB", "--set", "lora.rank=[8]")
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == "error: 3 problems in the configuration:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["model", "host_memory", "lora.rank"]
    assert lines[3].endswith("nearest: lora.r (value [8])")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--model", "m"], "error: expected data to train on, found none: give --data FILE\n"),
        (["eval", "--model", "m"], "error: expected data to evaluate on, found none: give --data FILE\n"),
        (["generate", "--model", "m"], "error: expected a prompt, found none: give --prompt TEXT, or text on standard"),
        (["run", "nowhere.yaml"], "error: 1 problem in 'nowhere.yaml':\n  expected a YAML file, a run's directory, or one"),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str) -> None:
    result = finetune(*words)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)


@pytest.mark.parametrize("words", [["run", "--modl", "m"], ["run", "--max-steps", "many"], ["fly"]])
def test_wrong_usage(words: list[str]) -> None:
    assert invoke(*words).exit_code == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("budget of [1 GiB] is\ntoo small [/red]"), "error: budget of [1 GiB] is\ntoo small [/red]\n"),
        (
            RuntimeError("shapes [2]\n  differ"),
            "error: RuntimeError: shapes [2] differ (run with FINETUNE_DEBUG=1 for the traceback)\n",
        ),
        (MemoryError(), "error: MemoryError (run with FINETUNE_DEBUG=1 for the traceback)\n"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_errors_end_in_one_message(trainer: type[Recorder], command: str, error: Exception, message: str) -> None:
    trainer.error = error
    result = invoke(command, "--model", "m", "--data", "d")
    first = "m: method lora, data d, output out\n" if command == "run" else ""
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", first + message)


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_debug_shows_the_traceback(trainer: type[Recorder], monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    trainer.error = UserError("no")
    if way == "environment":
        monkeypatch.setenv("FINETUNE_DEBUG", "1")
    result = invoke("run", "--model", "m", "--data", "d", *(["--debug"] if way == "flag" else []))
    assert result.exception is trainer.error


INTERRUPTED = """
import signal, sys, time, types
for number in (signal.SIGINT, signal.SIGHUP):  # background jobs of a shell, and of nohup, start with one ignored
    signal.signal(number, signal.default_int_handler)
module = types.ModuleType("finetune.trainer")
class Trainer:
    def __init__(self, config): pass
    def train(self):
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt as stop:
            stop.step = step
            raise
module.Trainer = Trainer
step = int(sys.argv.pop(1))
sys.modules["finetune.trainer"] = module
from finetune.cli import main
sys.argv[0] = "finetune"
main()
"""


@pytest.mark.parametrize(
    ("number", "step", "given", "said"),
    [
        (signal.SIGINT, 4, ["--no-resume"], "Go on from the last committed step with:\n  finetune resume out"),
        (signal.SIGTERM, 4, [], "Go on from the last committed step with:\n  finetune resume out"),
        (signal.SIGHUP, 0, ["--max-steps=5"], "No step was done. Start again with:\n  finetune run {} --max-steps=5"),
    ],
)  # fmt: skip
def test_a_signal_says_how_to_go_on(number: signal.Signals, step: int, given: list[str], said: str) -> None:
    """Sent twice, as a wrapper does that forwards what the group has got already."""
    words = ["run", "--model", "a model", "--data", "d", *given]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(step), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    first = "a model: method lora, data d, output out\n"
    assert message == first + "\nInterrupted. " + said.format("--model 'a model' --data d") + "\n"


def test_ctrl_c_elsewhere(trainer: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "resume", "out"])
    assert how_to_go_on("resume", 3, Path("out")) == " Go on from the last committed step with:\n  finetune resume out"
    trainer.error = KeyboardInterrupt()
    result = invoke("plan", "--model", "m")
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted.\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/a/file"), "/a/file: Permission denied"),
        (OSError(28, "No space left on device"), "a file: No space left on device"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(trainer: type[Recorder], error: OSError, words: str) -> None:
    trainer.error = error
    result = invoke("plan", "--model", "m")
    assert (result.exit_code, result.stderr) == (1, f"error: {words}. Mend it, or make room, and try again\n")


def test_eval_prints_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Config, str | None]] = []

    def evaluate(config: Config, adapter: str | None) -> dict[str, Any]:
        calls.append((config, adapter))
        return {"loss": float("nan") if adapter is None else 0.25, "accuracy": 0.87651, "rows": 872}

    replace_module(monkeypatch, "finetune.evaluate", evaluate=evaluate)
    words = ["eval", "--model", "m", "--data", "d", "--host-memory", "1GiB", "--micro-batch-size", "3"]
    assert invoke(*words, "--adapter", "out/adapter").stdout == "loss: 0.2500\naccuracy: 0.8765\nrows: 872\n"
    assert calls == [(Config(model="m", eval_data="d", host_memory="1GiB", micro_batch_size=3), "out/adapter")]
    assert json.loads(invoke(*words, "--json").stdout) == {"loss": None, "accuracy": 0.87651, "rows": 872}


def test_a_run_that_is_named_is_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[str | Path | None] = []
    replace_module(monkeypatch, "finetune.evaluate", evaluate=lambda config, adapter: found.append(adapter) or {})
    words = ["eval", "--model", "m", "--data", "d"]
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert invoke(*words).stderr == ""  # the default output is no choice of the user's
    assert invoke(*words, "--output", "out").stderr == ""
    assert invoke(*words, "--output", "out", "--adapter", "other").stderr == ""
    assert "no finished run in elsewhere: using the model as it is" in invoke(*words, "--output", "elsewhere").stderr
    assert found == [None, Path("out"), "other", None]


def test_generate_prints_pieces_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def generate(*args: Any, **options: Any) -> Iterator[str]:
        calls.append((args, options))
        yield from ("[a]", " b\n", "c")

    replace_module(monkeypatch, "finetune.generate", generate=generate)
    flags = ["--max-new-tokens", "9", "--temperature", "0.5", "--top-k", "3", "--seed", "0", "--no-chat"]
    result = invoke("generate", "--model", "m", "--adapter", "x", "-p", "Say [b]", *flags)
    assert (result.exit_code, result.stdout) == (0, "[a] b\nc\n")
    options = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "seed": 0, "chat": False}
    assert calls.pop() == ((Config(model="m"), "x", ["Say [b]"]), options)
    assert invoke("generate", "--model", "m", text="from\nstdin\n").exit_code == 0
    defaults = {"max_new_tokens": 128, "chat": None}
    assert calls.pop() == ((Config(model="m"), None, ["from\nstdin"]), defaults)


def test_generate_needs_a_prompt_with_text() -> None:
    result = invoke("generate", "--model", "m", "-p", " \n")
    assert result.exit_code == 1 and "expected a prompt" in result.stderr
