"""Where things lie, when they are fetched and through what: never a matter for the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import Run, assert_same_bits, make_config, reference_run, streamed_run

import finetune.planner
import finetune.trainer
from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.needs import Needs
from finetune.memory.plan import PlanRefused
from finetune.offload.devices import RaceError
from finetune.offload.devices.simulated import SimulatedDevice
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.tiers import DeviceTier, PassingTier
from finetune.offload.sizing.calibration import Rates
from finetune.offload.sizing.needs import HOST_HEAD
from finetune.offload.weights.parts import cut
from finetune.trainer import Trainer

SLOW_LINK = {"simulated_copy_gbps": 0.2, "simulated_delay_ms": 0.4}
CPU = [
    {"resident_blocks": 0, "lookahead": 0},
    {"resident_blocks": 0, "lookahead": 1},
    {"resident_blocks": 0, "lookahead": 3},
    {"resident_blocks": 1, "lookahead": 0, "kept_graphs": 2},
    {"resident_blocks": 3, "lookahead": 1, "kept_graphs": 0},
    {"resident_blocks": 5},
    {"resident_blocks": 0, "lookahead": 0, "activations": "disk"},
    {"resident_blocks": 0, "lookahead": 1, "activations": "disk", "kept_graphs": 3, "io_backend": "threads"},
    {"resident_blocks": 2, "activations": "host", "io_backend": "threads", "queue_depth": 1},
    {"loss_tile_vocab": 101, "loss_tile_tokens": 64},
]
SIMULATED = [
    {"resident_blocks": 0, "lookahead": 0, **SLOW_LINK},
    {"resident_blocks": 0, "lookahead": 1, **SLOW_LINK},
    {"resident_blocks": 0, "lookahead": 3, "io_backend": "threads", **SLOW_LINK},
    {"resident_blocks": 1, "lookahead": 1, "activations": "disk", "kept_graphs": 3, **SLOW_LINK},
    {"resident_blocks": 3, "lookahead": 0, "simulated_delay_ms": 2.0},
    {"resident_blocks": 5, **SLOW_LINK},
]


@pytest.fixture(scope="module")
def golden(checkpoint, tokens, tmp_path_factory) -> Run:
    return reference_run(make_config(checkpoint("llama"), tokens, tmp_path_factory.mktemp("golden")))


def skip_without_uring(engine: dict) -> None:
    if engine["io_backend"] == "io_uring":
        with IOEngine("auto") as io:
            if io.backend != "io_uring":
                pytest.skip(io.backend_reason)


@pytest.mark.every(3)
@pytest.mark.parametrize("engine", CPU, ids=str)
def test_cpu(engine, golden, checkpoint, tokens, tmp_path, spill_everything):
    engine = {"io_backend": "io_uring", **engine}
    skip_without_uring(engine)
    run = streamed_run(make_config(checkpoint("llama"), tokens, tmp_path / "out", engine=engine))
    assert_same_bits(run, golden)


@pytest.mark.every(3)
@pytest.mark.parametrize("engine", SIMULATED, ids=str)
def test_simulated_device(engine, golden, checkpoint, tokens, tmp_path, spill_everything):
    config = make_config(checkpoint("llama"), tokens, tmp_path / "out", device="simulated", engine=engine)
    assert_same_bits(streamed_run(config), golden)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_model_specific_paths_with_nothing_resident(device, checkpoint, tokens, tmp_path, spill_everything):
    """Tied weights, rotary tables shared by the blocks and two kinds of masks, spilled and streamed."""
    engine = {"resident_blocks": 0, "lookahead": 1, "activations": "disk"}
    config = make_config(checkpoint("gemma2"), tokens, tmp_path / "out", device=device, engine=engine)
    assert_same_bits(streamed_run(config), reference_run(config))


def test_smallest_device_budget(golden, checkpoint, tokens, tmp_path):
    """Room for one slot: every visit evicts the block before."""
    # The refusal names what rows of the full sequence length need: here the longest row's.
    changes = {"device": "simulated", "engine": SLOW_LINK, "dataset": {"sequence_length": 23}}
    config = smallest_device(make_config(checkpoint("llama"), tokens, tmp_path / "out", **changes))
    assert_same_bits(streamed_run(config), golden)


def smallest_device(config: Config) -> Config:
    """`config` with the budget that the refusal names."""
    budget = config.device_memory or 1024
    with pytest.raises(PlanRefused, match="--device-memory") as refused:
        Trainer(config.model_copy(update={"device_memory": budget})).train()
    return config.model_copy(update={"device_memory": refused.value.smallest_bytes})


@pytest.mark.parametrize("engine", [{}, {"loss_tile_vocab": 40, "loss_tile_tokens": 16}], ids=str)
def test_a_head_without_a_slot_passes_through_what_visits_leave(engine, checkpoint, tokens, tmp_path, monkeypatch):
    model, visits = checkpoint("llama"), []
    expected = streamed_run(make_config(model, tokens, tmp_path / "slot", engine=engine))
    needs_of, acquire = finetune.planner.stream_needs, PassingTier.acquire

    def without_slot(*wishes) -> Needs:
        needs = needs_of(*wishes[:5], True)
        return replace(needs, steps=tuple(step for step in needs.steps if HOST_HEAD not in step.rings))

    monkeypatch.setattr(finetune.planner, "stream_needs", without_slot)
    monkeypatch.setattr(PassingTier, "acquire", lambda tier, chunk: (visits.append(chunk), acquire(tier, chunk))[1])
    assert_same_bits(streamed_run(make_config(model, tokens, tmp_path / "none", engine=engine)), expected)
    chunks = 1 + max(visits)
    # One chunk alone may have been timed before.
    assert visits[len(visits) % chunks :] == list(range(chunks)) * (len(visits) // chunks) and (chunks > 1) == bool(engine)


@pytest.mark.every(2)
@pytest.mark.parametrize("resident", [0, 2])
def test_disk_bytes_do_not_depend_on_the_number_of_micro_batches(resident, checkpoint, tokens, tmp_path, monkeypatch):
    """At most 2 x (model - resident) a step, and what is read once: edges and resident blocks."""
    model = checkpoint("llama")
    wanted: list[int] = []
    submit = IOEngine.submit_reads
    monkeypatch.setattr(
        IOEngine, "submit_reads", lambda io, extents: (wanted.extend(e[2] for e in extents), submit(io, extents))[1]
    )
    monkeypatch.setattr(finetune.trainer, "with_prediction", lambda _, planned, **__: replace(planned, rates=Rates(1e9, 1e9)))
    totals = []
    for size in (1, 2, 5):
        wanted.clear()
        streamed_run(
            make_config(
                model, tokens, tmp_path / str(size), training={"micro_batch_size": size},
                engine={"resident_blocks": resident, "lookahead": 1},
            )  # fmt: skip
        )
        totals.append(sum(wanted))
    checkpoint_bytes = read_checkpoint(model).num_bytes
    block_bytes = sum(layout.num_bytes for layout in cut(model).layouts) // 5
    assert totals[0] == totals[1] == totals[2]
    # The last step has fetched what the next one starts with.
    assert totals[0] <= checkpoint_bytes + 4 * 2 * (checkpoint_bytes - resident * block_bytes) + 2 * block_bytes


class TestMissingWait:
    """An engine that does not wait for its copies must be noticed."""

    @pytest.fixture
    def config(self, checkpoint, tokens, tmp_path):
        engine = {"resident_blocks": 0, "lookahead": 1, "simulated_delay_ms": 5.0}
        return make_config(checkpoint("llama"), tokens, tmp_path / "out", device="simulated", engine=engine)

    @pytest.fixture(autouse=True)
    def broken_wait(self, monkeypatch):
        monkeypatch.setattr(SimulatedDevice, "wait", lambda self, event: None)

    def test_by_the_check(self, config):
        with pytest.raises(RaceError, match="not waited for"):
            streamed_run(config)

    def test_by_the_result(self, config, monkeypatch):
        monkeypatch.setattr(DeviceTier, "_check", lambda self, block: None)
        with pytest.raises(UserError, match=r"the loss of step \d+ is nan, so it is not kept"):
            streamed_run(config)


@pytest.mark.every(3)
@pytest.mark.parametrize("tiles", [{"loss_tile_tokens": 5}, {"loss_tile_vocab": 33}, {"loss_tile_vocab": 1}])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tiles_round_differently_but_mean_the_same(name, tiles, checkpoint, tokens, tmp_path):
    config = make_config(checkpoint(name), tokens, tmp_path / "out", engine=tiles)
    assert streamed_run(config).losses == pytest.approx(reference_run(config).losses, rel=3e-6)
