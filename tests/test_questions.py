"""What a plan is asked besides: answers are held against plans that are made, one by one."""

from __future__ import annotations

import json

import pytest
from test_cli import invoke
from tiny_models import make_config, save_tiny

from finetune.memory.plan import PlanRefused
from finetune.methods.base import make_method
from finetune.methods.registry import METHODS
from finetune.objectives.base import objective_class
from finetune.questions import MOST_BATCH, TOKENS, compare_methods, describe_costs, find_limits, largest
from finetune.session import Session
from finetune.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 6, 7, 8, 63, 64, 99, 100, 1000])
def test_the_largest_number_that_fits(limit, most):
    asked = []
    assert largest(lambda n: asked.append(n) or n <= limit, most) == min(limit, most)
    assert all(1 <= n <= most for n in asked)


def fits(config, process_bytes: int, tokens: int = 0, **training: int) -> bool:
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    session = Session(make_method(config), only_plan=True)
    session.process_bytes = process_bytes
    try:
        session.plan(objective_class(config).full_shape(config, session, tokens or config.dataset.sequence_length))
    except PlanRefused:
        return False
    finally:
        session.close()
    return True


def test_limits_are_where_plans_begin_to_be_refused(model, tmp_path):
    config = make_config(model, None, tmp_path, dataset={"sequence_length": 64}, training={"batch_size": 2})
    least = find_limits(config, Trainer(config).plan()).host_bytes
    config = config.model_copy(update={"host_memory": least + (8 << 20)})
    planned = Trainer(config).plan()
    found, process = find_limits(config, planned), planned.process_bytes
    assert found.device_bytes is None and abs(found.host_bytes - least) < 64 << 20
    n = found.sequence_length
    assert n >= 64 and n % TOKENS == 0
    assert fits(config, process, n) and not fits(config, process, n + TOKENS)
    rows = found.micro_batch_size
    assert fits(config, process, micro_batch_size=rows, batch_size=max(2, rows))
    assert not fits(config, process, micro_batch_size=rows + 1, batch_size=max(2, rows + 1))
    batch = found.batch_size
    assert fits(config, process, batch_size=batch)  # of any size: micro-batches go to disk
    assert batch == MOST_BATCH
    short = config.model_copy(update={"host_memory": found.host_bytes - 1})
    assert not fits(short, process)
    assert fits(config.model_copy(update={"host_memory": found.host_bytes}), process)


def test_rows_are_no_longer_than_the_model_has_positions(model, tmp_path):
    config = make_config(model, None, tmp_path, dataset={"sequence_length": 64})
    assert find_limits(config, Trainer(config).plan()).sequence_length == 2048 // TOKENS * TOKENS


def test_the_least_memory_of_both_tiers(model, tmp_path):
    config = make_config(model, None, tmp_path, device="simulated", dataset={"sequence_length": 64})
    planned = Trainer(config).plan()
    found = find_limits(config, planned)
    assert found.device_bytes and "on the device" in found.describe()
    tight = config.model_copy(update={"device_memory": found.device_bytes})
    assert fits(tight, planned.process_bytes)
    assert not fits(config.model_copy(update={"device_memory": found.device_bytes - 1}), planned.process_bytes)


def test_every_method_is_beside_the_others(model, tmp_path):
    config = make_config(model, None, tmp_path, dataset={"sequence_length": 64}, training={"batch_size": 2})
    costs = compare_methods(config, Trainer(config).plan())
    methods = [method for method in METHODS if method != "adapter"]  # none is named
    assert [cost.method for cost in costs] == methods
    of = {cost.method: cost.values for cost in costs}
    assert not of["lora"]["disk_write_bytes"] and not of["zo"]["disk_write_bytes"] and of["full"]["disk_write_bytes"]
    assert of["badam"]["disk_write_bytes"] < of["full"]["disk_write_bytes"]
    for values in of.values():
        assert values["least_host_bytes"] <= values["host_peak_bytes"] and values["step_seconds"] > 0
    table = describe_costs(costs).splitlines()
    assert all(line.startswith(name) for line, name in zip(table[1:], methods, strict=True))


def test_methods_that_do_not_run_say_why(model, tmp_path):
    config = make_config(model, None, tmp_path, quantize="nf4")
    small = config.model_copy(update={"host_memory": 50 << 20, "quantize": None})
    (tmp_path / "cache").mkdir()
    costs = {cost.method: cost for cost in compare_methods(config, Trainer(config).plan())}
    assert costs["full"].planned is None and costs["full"].reason and costs["lora"].planned is not None
    assert costs["full"].reason in describe_costs(list(costs.values()))
    refused = compare_methods(small, Trainer(config).plan())
    assert all(cost.planned is None and cost.least_bytes > 50 << 20 for cost in refused)


def test_a_plan_as_json(model):
    asked = ("plan", "--model", str(model), "--sequence-length", "32", "--max-steps", "3")
    result = invoke(*asked, "--json", "--limits")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["num_steps"] == 3 and found["host_peak_bytes"] <= found["host_budget_bytes"]
    assert sum(found["host_parts"].values()) == found["host_peak_bytes"]
    assert found["limits"]["sequence_length"] >= 32 and "methods" not in found
    assert found["step_seconds"] > 0 and found["slowest"] in ("disk", "compute")
    assert "written a step" in invoke(*asked, "--compare").stdout
