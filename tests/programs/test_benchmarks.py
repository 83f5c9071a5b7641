"""The benchmarks: their statistics, their floor, and every table of a quick run."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.examples  # they test scripts, not the library

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
TABLES = (
    "step_time",
    "methods",
    "memory",
    "program",
    "micro_batches",
    "microbatches",
    "parameters",
    "leaves",
    "devices",
)
FIGURES = ("step_time", "methods", "program", "micro_batches", "growth")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of the folder, as a script there would."""
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: __import__(name)


def run(*arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "error::DeprecationWarning",
    }
    return subprocess.run(
        [sys.executable, FOLDER / "run.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_ratio_is_the_median_of_ratios_within_repeats(benchmarks):
    timing = benchmarks("_timing")
    a, b = np.array([1.0, 10.0, 3.0, 8.0]), np.array([1.0, 5.0, 1.0, 2.0])
    low, middle, high = timing.ratio({"a": a, "b": b}, "a", "b")
    assert [low, middle, high] == pytest.approx(np.quantile(a / b, [0.25, 0.5, 0.75]))
    assert middle != pytest.approx(np.median(a) / np.median(b))


def test_turns_alternate_and_warm_up_turns_are_left_out(benchmarks):
    timing = benchmarks("_timing")
    order = []
    turns = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds, _ = timing.paired(turns, 5)
    assert [len(seconds[name]) for name in "abc"] == [5, 5, 5]
    repeats = np.array(order).reshape(-1, 3)
    assert len(repeats) == 5 + timing.WARM_UP
    assert all(sorted(repeat) == ["a", "b", "c"] for repeat in repeats)
    assert len({tuple(repeat) for repeat in repeats}) > 1


@pytest.mark.parametrize(("rule", "gradients"), [("plain", 1), ("floor", 2), ("by_hand", 2)])
def test_the_floor_evaluates_exactly_two_gradients(benchmarks, rule, gradients):
    models, steps, timing = map(benchmarks, ("_models", "_steps", "_timing"))
    problem = models.problem("mlp", "tiny")
    base = steps.OPTIMIZERS["sgd"]()
    step, carry, _ = steps.through_first_door(problem, base, getattr(steps, rule))
    program, _ = timing.compiled(step, carry, problem.batch)
    layers = 2
    # A gradient of a layer is two products, less the one with respect to the images.
    products = layers + 2 * layers - 1
    assert timing.operations(program)["dot"] == gradients * products
    (_, _, _, count), loss = program(timing.own(carry), *problem.batch)
    assert count == 1 and np.isfinite(loss)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_models_trace_with_statistics_and_dropout(benchmarks, name):
    problem = benchmarks("_models").problem(name, "tiny", abstract=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss, stats = jax.eval_shape(
        problem.loss_fn, problem.params, problem.stats, key, *problem.batch
    )
    assert loss.shape == ()
    assert jax.tree.structure(stats) == jax.tree.structure(problem.stats)
    assert bool(jax.tree.leaves(stats)) == (name == "resnet")


def test_a_bar_is_met_missed_or_lost_in_noise(benchmarks):
    rows = [
        {"model": "m", "groups": 8, "mode": "automatic", "over sam": ratio, "memory over sam": 2.0}
        for ratio in ([1.0, 1.1, 1.2], [1.1, 1.2, 1.3], [1.2, 1.3, 1.4])
    ]
    found = benchmarks("_bars").bars({"micro_batches": rows})
    assert [row["met"] for row in found] == ["yes", "noise", "no", "no", "no", "no"]


def test_dry_run_of_a_gpu_says_what_would_run():
    done = run(
        "--device",
        "gpu",
        "--size",
        "large",
        "--dry-run",
        "--models",
        "resnet",
        "--optimizers",
        "sgd",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    row = done.stdout.splitlines()[-1].split()
    assert row[:2] == ["resnet", "25549352"]  # ResNet-50
    assert float(row[6]) / float(row[5]) == pytest.approx(2, rel=0.01)


def test_quick_run_writes_every_table_and_figure(tmp_path):
    done = run("--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert tuple(found["tables"]) == TABLES
    assert all(found["tables"].values())
    assert {"date", "device", "versions", "options", "bars"} <= set(found)
    times = {row["step"]: row for row in found["tables"]["step_time"]}
    assert times["plain"]["over plain"] == [1, 1, 1]
    programs = {row["step"]: row for row in found["tables"]["program"]}
    assert [programs[name]["loss traces"] for name in ("plain", "sam")] == [1, 1]
    assert programs["sam"]["dot"] == 2 * programs["plain"]["dot"]
    assert {row["all-reduce"] for row in found["tables"]["devices"]} == {1}
    for name in FIGURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
