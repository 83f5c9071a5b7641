"""The experiments: their harness, and that every script runs with --quick."""

import importlib
import json

import jax
import matplotlib
import numpy as np
import pytest
import scipy.stats
from scripts import EXAMPLES, ROOT, run_example

pytestmark = pytest.mark.examples  # they test scripts, not the library

matplotlib.use("Agg")
FOLDER = ROOT / "experiments"
SHARING = ("does_it_pay", "after_training", "rho_rules", "sensitivity")  # one log, in this order
COLLECTED = "scale_invariance"  # run by run_all
SCRIPTS = {path.stem for path in FOLDER.glob("[!_]*.py")}
SCRIPTS -= {"compare_methods", "run_all", COLLECTED, *SHARING}


@pytest.fixture(autouse=True)
def siblings(monkeypatch):
    """Scripts import their siblings and the examples by name, as when run by Python."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness():
    return importlib.import_module("_harness")


@pytest.fixture
def report():
    return importlib.import_module("_report")


@pytest.fixture
def study(harness, tmp_path):
    return lambda *argv: harness.Study("some.py", "Title.", ["--out", str(tmp_path), *argv])


def test_welch_is_scipys(report):
    rng = np.random.default_rng(0)
    for n, m in ((2, 2), (5, 9), (20, 3)):
        a, b = rng.normal(size=n), rng.normal(1, 3, size=m)
        expected = scipy.stats.ttest_ind(a, b, equal_var=False).pvalue
        np.testing.assert_allclose(report.welch(a, b), expected, rtol=1e-12)


def test_welch_without_spread_is_silent(report):
    assert report.welch([3.1] * 4, [3.1] * 4) == 1
    assert report.welch([3.1] * 4, [3.2] * 4) == 0
    assert 0 < report.welch([3.1] * 4, [3.0, 3.2, 3.3]) < 1
    assert np.isnan(report.welch([3.1], [3.0, 3.2]))


def test_spread(report):
    assert report.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert report.spread([1.0], 1) == "1.0 ± ?"


def test_an_interrupted_study_does_only_what_is_missing(study, tmp_path):
    keys = [{"method": "SGD", "seed": seed} for seed in range(7)]
    done, failing = [], 5

    def compute(group):
        for key in group:
            if len(done) == failing:
                raise KeyboardInterrupt
            done.append(key["seed"])
        return [{"error": key["seed"] ** 2 + 0.1} for key in group]

    with pytest.raises(KeyboardInterrupt):
        study().collect(keys, compute, lanes=2)
    assert done == [0, 1, 2, 3, 4]
    log = tmp_path / "some.jsonl"
    assert len(log.read_text().splitlines()) == 1 + 4  # the group of 4 and 5 is lost
    log.write_text(log.read_text() + '{"key": {"meth')  # and the crash cut a line
    done, failing = [], None
    results = study().collect(keys, compute, lanes=2)
    assert done == [4, 5, 6]
    assert [r["error"] for r in results] == [seed**2 + 0.1 for seed in range(7)]
    done = []
    assert study().collect(keys[::-1], compute) == results[::-1] and done == []
    study("--fresh").collect(keys, compute)
    assert len(done) == 7


def test_runs_of_other_versions_are_not_mixed_in(study, tmp_path, capsys):
    study().collect([{"seed": 0}], lambda group: [{"error": 1.0}])
    log = tmp_path / "some.jsonl"
    header, *rest = log.read_text().splitlines()
    older = json.dumps(json.loads(header) | {"jax": "0.0.1"})
    log.write_text("\n".join([older, *rest]) + "\n")
    assert study().collect([{"seed": 0}], lambda group: [{"error": 2.0}]) == [{"error": 2.0}]
    assert "other versions" in capsys.readouterr().out


def test_a_resumed_comparison_gives_the_same_table(harness, study, tmp_path, capsys):
    networks = importlib.import_module("_networks")

    def table(study, runs_before):
        split, recipe = study.load("digits", 0.4), study.recipe("digits")
        settings = harness.grid(lr=(0.05, 0.1), weight_decay=(0.01,), rho=(0.1,))
        arms = [harness.Arm("SGD", recipe, settings)]
        arms.append(harness.Arm("SAM", recipe._replace(method=networks.sam), settings))
        assert len(study._finished) == runs_before
        rows = study.compare(arms, split)
        capsys.readouterr()
        study.compared("Title", rows, rows["SGD"])
        return capsys.readouterr().out

    whole = table(study("--quick"), 0)
    log = tmp_path / "some_quick.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 1 + 2 * (2 + 2)  # settings with a tuning seed, test seeds
    log.write_text("\n".join(lines[:4]) + "\n")  # stopped between the test runs of SGD
    assert table(study("--quick"), 3) == whole
    assert "SAM" in whole and "±" in whole


def test_the_baseline_may_not_have_fewer_settings(harness):
    recipe = importlib.import_module("_networks").Recipe()
    small, large = harness.grid(lr=(0.1,)), harness.grid(lr=(0.1,), rho=(0.1, 0.2))
    harness.check_budgets(
        [harness.Arm("SGD", recipe, large), harness.Arm("SAM", recipe, small)], "SGD"
    )
    with pytest.raises(ValueError, match=r"baseline 'SGD'.*got 1 settings, and 2 for 'SAM'"):
        harness.check_budgets(
            [harness.Arm("SGD", recipe, small), harness.Arm("SAM", recipe, large)], "SGD"
        )


@pytest.mark.parametrize("name", ("plateau", "fine_tuning"))
def test_grids_outside_of_compare_keep_the_budget_too(name):
    grids = importlib.import_module(name).GRIDS
    assert all(len(settings) <= len(grids["SGD"]) for settings in grids.values())


def test_tuning_and_test_seeds_differ(harness, study):
    assert study("--seeds", "999").seeds < harness.TUNING_SEED


def test_splits_are_disjoint_and_only_training_labels_are_wrong(tmp_path):
    splits = importlib.import_module("_splits")
    _, y = splits.images("digits", tmp_path)
    rows = splits.rows(y, "digits")
    assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows)) == len(y)
    clean, noisy = (splits.load("digits", noise, cache=tmp_path) for noise in (0.0, 0.4))
    for name, of in zip(clean._fields[1:], rows, strict=True):
        np.testing.assert_array_equal(getattr(clean, name)[1], y[of])
    wrong = np.mean(np.asarray(noisy.train[1]) != np.asarray(clean.train[1]))
    assert 0.3 < wrong < 0.42  # 36 % expected
    for name in ("validation", "test"):
        np.testing.assert_array_equal(getattr(noisy, name)[1], getattr(clean, name)[1])
    assert abs(float(clean.train[0].mean())) < 1e-5 and abs(float(clean.train[0].std()) - 1) < 1e-5


def test_fine_tuning_splits_are_disjoint(study):
    old, split = importlib.import_module("fine_tuning").splits(study("--quick"), 0.0)
    images = np.concatenate([np.asarray(part[0]) for part in (old, *split[1:])])
    labels = np.concatenate([np.asarray(part[1]) for part in (old, *split[1:])])
    everything = importlib.import_module("_splits").images("digits", None)
    assert len(images) == len(everything[0])
    assert np.unique(images, axis=0).shape == np.unique(everything[0], axis=0).shape
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(everything[1]))
    assert set(np.asarray(old[1])) == {0, 1, 2, 3, 4}


def test_lanes_do_not_see_each_other(study):
    """A network trained beside others is the one trained alone."""
    networks, study = importlib.import_module("_networks"), study("--quick")
    train, recipe = study.load("digits").train, study.recipe("digits")
    settings = [{"lr": 0.05, "weight_decay": 0.01}, {"lr": 0.2, "weight_decay": 0.0}]
    *_, both = networks.fit(recipe, settings, [3, 4], train)
    *_, alone = networks.fit(recipe, settings[1:], [4], train)
    leaves = (jax.tree.leaves(trained.params) for trained in (both, alone))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a[1], b[0])
        assert not np.array_equal(a[0], b[0])


def check_quick_run(name, folder, capsys):
    importlib.import_module(name).main(["--quick", "--out", str(folder)])
    out, err = capsys.readouterr()
    assert "Warning" not in err
    assert len(out.splitlines()) > 3
    assert all(figure.stat().st_size > 10_000 for figure in folder.glob("*.png"))
    record = json.loads((folder / f"{name}_quick.json").read_text())
    assert record["claims"] and all(c["verdict"] and c["measured"] for c in record["claims"])


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_experiments_run_with_small_settings(name, tmp_path, capsys):
    check_quick_run(name, tmp_path, capsys)


def test_experiments_that_share_a_log_train_nothing_twice(tmp_path, capsys):
    log = tmp_path / "does_it_pay_quick.jsonl"
    for name in SHARING:
        before = log.read_text() if log.exists() else ""
        check_quick_run(name, tmp_path, capsys)
        runs = [json.dumps(json.loads(line)["key"]) for line in log.read_text().splitlines()[1:]]
        assert len(set(runs)) == len(runs) and log.read_text().startswith(before)


def test_compare_methods_runs_with_small_settings(tmp_path):
    run_example(FOLDER / "compare_methods.py", tmp_path)


def test_claims_are_collected_in_one_table(tmp_path, capsys):
    run_all = importlib.import_module("run_all")
    assert run_all.QUICK == (COLLECTED,)
    records = run_all.main(["--quick", "--out", str(tmp_path)])
    table = (tmp_path / "claims_quick.md").read_text()
    assert all(claim["measured"] in table for record in records for claim in record["claims"])
    assert len({line.count(" | ") for line in table.splitlines()}) == 1
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(tmp_path), "no_such_experiment"])
