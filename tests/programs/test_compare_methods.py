"""experiments/compare_methods.py: its methods, tasks, training, statistics and advice."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import EXAMPLES, ROOT

import sam_optax

pytestmark = pytest.mark.examples  # they test scripts, not the library

FOLDER = ROOT / "experiments"


@pytest.fixture(autouse=True)
def siblings(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def digits(cache):
    return module("_tasks").load("digits", cache, quick=True)


def test_every_method_takes_part_or_is_left_out_for_a_reason():
    methods = module("_methods")
    kinds = ("method", "wrapper", "optimizer", "examples")
    public = {name for name, member in sam_optax.FAMILY.items() if member.kind in kinds}
    known = {name.split(",")[0] for name in methods.METHODS}
    assert not known & set(methods.LEFT_OUT)
    assert public <= known | set(methods.LEFT_OUT)


def test_every_method_takes_a_step_that_keeps_its_state(cache):
    methods, training = module("_methods"), module("_compare_training")
    loaded = [
        module("_tasks").load(name, cache, quick=True)
        for name in ("digits", "adam", "rare", "adapters")
    ]
    for name, method in methods.METHODS.items():
        task = next(task for task in loaded if name in methods.names(task))
        settings = methods.grid(name, task)
        assert len(set(settings)) == 9, name
        rows = jax.ShapeDtypeStruct((task.batch,), jnp.int32)
        carry = jax.eval_shape(lambda: training.first(task, name, settings[0], 100, 0))  # noqa: B023
        for pay in (None,) if method.paid is None else (True, False):
            step = training.make_step(task, name, settings[0], 100)
            new = jax.eval_shape(lambda *args: step(*args, pay), carry, rows)  # noqa: B023
            like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
            assert like(new) == like(carry), name
    for task in loaded[1:]:
        assert set(task.methods) <= set(methods.names(task))


def test_rare_classes_are_rare_and_balanced_in_the_test_set(cache):
    task = module("_tasks").load("rare", cache, quick=True)
    counts = np.bincount(np.asarray(task.train[1]))
    assert np.all(counts[list(task.rare)] == 10) and np.all(np.delete(counts, task.rare) > 50)
    counts = np.bincount(np.asarray(task.test[1]))
    assert counts.max() < 1.1 * counts.min()


def test_imb_sam_is_the_plain_optimizer_where_no_class_is_rare(cache):
    methods, training = module("_methods"), module("_compare_training")
    task = module("_tasks").load("rare", cache, quick=True)
    setting, rare = methods.grid("imb_sam", task)[2], np.isin(task.train[1], task.rare)

    def trained(name, rows):
        carry = training.first(task, name, setting, 100, 0)
        step = jax.jit(training.make_step(task, name, setting, 100))
        return jax.tree.leaves(step(step(carry, rows), rows)[0])  # the first has rate 0

    for rows, equal in ((np.flatnonzero(~rare), True), (np.flatnonzero(rare), False)):
        pair = [trained(name, jnp.asarray(rows[: task.batch])) for name in ("plain", "imb_sam")]
        close = [np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*pair, strict=True)]
        assert all(close) if equal else not any(close)


def test_adapters_learn_and_what_is_frozen_stays(cache):
    methods, training = module("_methods"), module("_compare_training")
    task = module("_tasks").load("adapters", cache, quick=True)
    assert {*np.unique(task.train[1])} == {*np.unique(task.test[1])} == {5, 6, 7, 8, 9}
    params, x = task.init(jax.random.key(0)), task.train[0][:3]
    network = task.model.network
    whole = network.apply(task.model.weights, x)
    np.testing.assert_array_equal(task.model.apply(params, x), whole)  # b = 0
    params = jax.tree.map(lambda w: w + 0.1, params)
    kernel = lambda name: np.asarray(params[name]["params"]["Dense_0"]["kernel"])
    merged = task.model.merged(params)["frozen"]["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(merged, kernel("frozen") + kernel("a") @ kernel("b"), rtol=1e-5)
    for name in ("plain", "flat_lora", "sam, adapters alone"):
        setting = methods.grid(name, task)[-1]
        carry = training.first(task, name, setting, 100, 0)
        step = jax.jit(training.make_step(task, name, setting, 100))
        new = step(step(carry, jnp.arange(task.batch)), jnp.arange(task.batch))[0]
        jax.tree.map(np.testing.assert_array_equal, new["frozen"], task.model.weights)
        assert jax.tree.leaves(new["b"])[0].any(), name


@pytest.mark.parametrize("name", ["polyak_sam", "look_sam, k = 5"])
def test_training_side_by_side_is_a_loop_of_steps(digits, name):
    """Also where the length is no whole number of epochs; another length compiles nothing.

    The steps of polyak_sam know of no schedule, so one too many would show.
    """
    methods, training = module("_methods"), module("_compare_training")
    runs = [
        training.Run(methods.Setting(0.05, 0.01, 0.1), 3),
        training.Run(methods.Setting(0.2, 0.0, 0.2), 4),
    ]
    found = list(training.fit(digits, name, 17, runs, 2, "test"))
    for (setting, seed), error in zip(runs, found, strict=True):
        carry = training.first(digits, name, setting, 17, seed)
        step = jax.jit(training.make_step(digits, name, setting, 17))
        for rows in training._order(digits, seed, 17):
            carry = step(carry, rows)
        assert error == pytest.approx(float(digits.error(carry[0], digits.test)), abs=0.5)
    compiled = training._advance._cache_size()
    list(training.fit(digits, name, 5, runs, 2, "test"))
    assert training._advance._cache_size() <= max(compiled, 1)


def test_the_learning_rate_decays_in_the_tail_alone():
    job = module("_methods").Job(None, 100, 2.0, 0.0)
    usual, late = job.schedule(), job._replace(tail=0.3).schedule()
    assert [float(usual(t)) for t in (0, 5, 100)] == pytest.approx([0, 2, 0], abs=1e-6)
    assert [float(late(t)) for t in (0, 5, 70, 85, 100)] == pytest.approx([0, 2, 2, 1, 0], abs=1e-6)
    assert float(job.schedule(moves=2)(100)) == pytest.approx(float(usual(50)))


@pytest.mark.parametrize("name", ["cities", "glosses"])
def test_texts_are_split_without_overlap(name, tmp_path, monkeypatch):
    text = module("_tasks.text")
    lines = [
        f"{i:08} {i % 26:02} n 01 w{i} 0 | the word{i} of many; an example" for i in range(22_100)
    ]
    (tmp_path / "data.noun").write_text("  a licence\n" + "\n".join(lines))
    monkeypatch.setattr(text, "WORDNET", tmp_path)
    problem = getattr(text, name)(tmp_path, False)
    sets = [problem.train, problem.validation, problem.test]
    assert [len(y) for _, y in sets] == [4000, 5000, 13_000]
    assert {int(y) for _, part in sets for y in np.unique(part)} == set(range(26))
    tokens = np.asarray(problem.train[0])
    assert tokens[:, 0].min() >= 1 and tokens.max() < problem.model.tokens
    # Padding changes no logits: the mean is over the tokens that are there.
    short = problem.train[0][:2, :4].at[:, 2:].set(0)
    model = problem.model
    params = jax.jit(model.init)(jax.random.key(0), short)
    cut = jax.tree.map(lambda w: w, params)
    cut["params"]["position"] = params["params"]["position"][:2]
    apply = jax.jit(model.apply)
    whole, part = apply(params, short), apply(cut, short[:, :2])
    np.testing.assert_allclose(whole, part, rtol=1e-4, atol=1e-5)


PLAIN, SAM = [13.0, 13.2, 12.8, 13.0], [11.0, 11.1, 10.9, 11.0]


def rows_of(**errors):
    rows = [{"method": "plain", "errors": PLAIN}, {"method": "sam", "errors": SAM}]
    rows += [{"method": name, "errors": values} for name, values in errors.items()]
    cost = {"plain": 1.0, "sam": 2.0, "cheap": 1.05, "half": 1.5, "poor": 1.0}
    return [row | {"gradients": cost[row["method"]], "steps": 9} for row in rows]


def test_shares_have_intervals_and_no_gain_has_no_share():
    report = module("_compare_report")
    half = [12.0, 12.1, 11.9, 12.0]
    plain, sam, row = report.judged(rows_of(half=half))
    assert sam["share"] == 1 and row["share"] == pytest.approx(0.5)
    low, high = low_, high_ = row["share interval"]
    assert 0.35 < low < 0.5 < high < 0.65
    assert row["p against sam"] < 0.01 and "share" not in plain
    assert report.percent(row) == f"50 ({100 * low:.0f} to {100 * high:.0f})"
    wide = report.interval(PLAIN, SAM, [10.0, 14.0, 11.0, 13.0])
    assert wide[1] - wide[0] > 3 * (high - low)
    rows = report.judged([{"method": "plain", "errors": SAM}, {"method": "sam", "errors": PLAIN}])
    assert np.isnan(rows[1]["share"]) and report.percent(rows[1]) == "-"
    assert "SAM is not told apart" in report.advice(rows, {})
    # Lower by less than the seeds differ: a part of that would be a part of noise.
    noise = rows_of(half=half)
    noise[1]["errors"] = [e - 0.05 for e in PLAIN]
    told = report.judged(noise)[2]
    assert np.isnan(told["share"]) and report.percent(told) == "-"
    assert told["p against plain"] < 0.01
    # The figure then says by how much a method is better, in points.
    below, low, high = report.heights(noise)["half"]
    assert below == pytest.approx(1.0) and 0.5 < low < below < high < 1.5
    assert report.frontier(noise, {}, report.heights(noise)) == ["half"]
    noise[2]["errors"] = [e + 1 for e in PLAIN]  # no better than what costs nothing more
    report.judged(noise)
    assert report.frontier(noise, {}, report.heights(noise)) == ["sam"]
    assert report.heights([plain, sam, row])["half"] == pytest.approx([50, 100 * low_, 100 * high_])


def test_holm_is_the_textbooks():
    corrected = module("_inference").holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(corrected, [0.03, 0.06, 0.06, 0.02])


def test_the_advice_follows_from_the_rows():
    report = module("_compare_report")
    near, half = [11.1, 11.2, 11.0, 11.1], [12.0, 12.1, 11.9, 12.0]
    reached = report.advice(report.judged(rows_of(cheap=near, half=half)), {})
    assert "cheap (1.05 of a plain step, 95 (" in reached and "none" not in reached
    missed = report.advice(report.judged(rows_of(poor=half, half=near)), {})
    assert "none; of those so cheap poor (1.00 of" in missed and "half (1.50 of" in missed
    # Measured times count, where they are there.
    dear = report.advice(report.judged(rows_of(cheap=near)), {"cheap": [1.2, 1.3, 1.4]})
    assert "none" in dear and "cheap (1.30 of" in dear


def test_one_network_a_program_gives_what_several_give(tmp_path, monkeypatch):
    compare, tasks = module("compare_methods"), module("_tasks")
    load, found = tasks.load, {}
    for lanes in (4, 1):

        def changed(*args, lanes=lanes):
            task = load(*args)
            return dataclasses.replace(task, problem=task.problem._replace(lanes=lanes))

        monkeypatch.setattr(tasks, "load", changed)
        folder = tmp_path / str(lanes)
        compare.main(["--quick", "--out", str(folder), "--phase", "steps"])
        log = (folder / "compare_digits_quick.jsonl").read_text().splitlines()[1:]
        runs = map(json.loads, log)
        found[lanes] = {json.dumps(run["key"]): run["result"]["error"] for run in runs}
    assert len(set(found[1].values())) > 4
    assert found[1] == pytest.approx(found[4], abs=1.0)  # rounding may move an example or two


def test_a_report_counts_what_the_log_holds(tmp_path, capsys):
    """Run in phases, it ends with the tables of all of them, and trains nothing twice."""
    compare = module("compare_methods")
    options = ["--quick", "--out", str(tmp_path)]
    compare.main([*options, "--phase", "steps", "gradients"])
    log = (tmp_path / "compare_digits_quick.jsonl").read_text()
    capsys.readouterr()
    options += ["--methods", "look_sam, k = 5"]
    compare.main([*options, "--phase", "steps", "gradients", "report"])
    assert (tmp_path / "compare_digits_quick.jsonl").read_text() == log
    record = json.loads((tmp_path / "compare_digits_quick.json").read_text())
    assert set(record["pictures"]) == {"steps", "gradients"}
    assert record["command"].endswith("--task digits --methods 'look_sam, k = 5'")
    assert record["pages"]["At equal steps"][0][0] == "method"
    assert {row["steps"] for row in record["pictures"]["steps"]} == {24}
