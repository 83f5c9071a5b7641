"""experiments/does_it_pay.py: its statistics, tasks, training, search, and a task of a user's."""

import gzip
import importlib
import itertools
import re
import types

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
import scipy.stats
from scripts import EXAMPLES, ROOT

pytestmark = pytest.mark.examples  # they test scripts, not the library

matplotlib.use("Agg")
FOLDER = ROOT / "experiments"


@pytest.fixture(autouse=True)
def siblings(monkeypatch):
    """Scripts import their siblings and the examples by name, as when run by Python."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name):
    return importlib.import_module(name)


# Statistics


@pytest.mark.parametrize("validation", [[3.0, 1.0, 2.0, 5.0], [2.0, 1.0, 2.0, 1.0]])
def test_the_best_of_k_is_the_mean_over_all_draws(validation):
    """Of all n^k ways to draw k trials, ties shared by those drawn values that are tied."""
    validation, test = np.array(validation), np.array([10.0, 40.0, 20.0, 70.0])
    found = module("_inference").best_of(validation, test)
    for k in (1, 2, 3, 4):
        best = []
        for draw in itertools.product(range(4), repeat=k):
            least = validation[list(draw)].min()
            best.append(test[validation == least].mean())
        assert found[k - 1] == pytest.approx(np.mean(best))


def test_intervals_cover_the_curve_and_vanish_without_spread():
    statistics, rng = module("_inference"), np.random.default_rng(0)
    validation = rng.normal(size=12)
    curve = statistics.expected_best(validation, validation + 20)
    assert np.all(curve.low <= curve.mean) and np.all(curve.mean <= curve.high)
    assert np.all(np.diff(curve.mean) < 0)
    same = statistics.expected_best([1.0] * 5, [2.0] * 5)
    np.testing.assert_allclose([same.low, same.mean, same.high], 2.0)


def test_gains_are_of_paired_trials():
    statistics, rng = module("_inference"), np.random.default_rng(1)
    trials = rng.normal(20, 3, size=10)
    lower = statistics.expected_gain((trials, trials), (trials - 1, trials - 1))
    np.testing.assert_allclose([lower.low, lower.mean, lower.high], 1.0)  # the same resamples
    assert statistics.from_trial(lower) == 1
    assert statistics.from_trial(lower._replace(low=np.array([-1.0, 1.0, -0.1, 0.2, 0.3]))) == 4
    assert statistics.from_trial(lower._replace(low=np.array([1.0, 1.0, -0.1]))) is None


def test_holm_and_the_paired_test():
    statistics = module("_inference")
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    found = statistics.holm([0.01, float("nan"), 0.6])
    np.testing.assert_allclose([found[0], found[2]], [0.03, 1.0])
    assert np.isnan(found[1]) and statistics.holm([]) == []
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    assert statistics.paired(a, b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert statistics.paired([1.0, 2.0], [1.0, 2.0]) == 1
    assert statistics.paired([1.0, 2.0], [0.0, 1.0]) == 0
    assert np.isnan(statistics.paired([1.0], [2.0]))


# Data


def test_wrong_labels_are_exactly_so_many_and_wrong():
    task = module("_tasks.task")
    y = np.repeat(np.array([5, 6, 9]), 50)
    split = task.Split((np.arange(150), y), (None, y), (None, y))
    found = task.wrong_labels(split, 0.4, seed=3)
    assert np.sum(found.train[1] != y) == 60 and set(found.train[1]) == {5, 6, 9}
    assert found.test is split.test and found.validation is split.validation
    assert np.sum(task.wrong_labels(split, 0.4, seed=4).train[1] != found.train[1]) > 0
    with pytest.raises(ValueError, match=r"share must be at least 0 and below 1, got 1.5"):
        task.wrong_labels(split, 1.5, 0)
    with pytest.raises(ValueError, match=r"one integer label an example, got float64"):
        task.wrong_labels(split._replace(train=(y, y / 2)), 0.4, 0)


def test_splits_share_validation_and_nothing_else():
    data = module("_tasks.data")
    pool = data.pool(np.arange(300), np.arange(300) % 10, 60)
    splits = [data.draw(pool, number, 100, 90) for number in (0, 1)]
    splits += [data.draw_few(pool, number, 3, 90) for number in (0, 1)]
    for split in splits:
        rows = [set(part[0].tolist()) for part in split]
        assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
        np.testing.assert_array_equal(split.validation[0], splits[0].validation[0])
        assert all(np.all(x % 10 == y) for x, y in split)
    assert set(splits[0].train[0].tolist()) != set(splits[1].train[0].tolist())
    np.testing.assert_array_equal(np.bincount(splits[2].train[1]), [3] * 10)
    with pytest.raises(ValueError, match=r"train must be below 240.*got 240"):
        data.draw(pool, 0, 240, 1)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_idx_folders_are_read_as_they_were_written(tmp_path):
    data, rng = module("_tasks.data"), np.random.default_rng(0)
    x, y = rng.integers(0, 256, (14, 28, 28), np.uint8), rng.integers(0, 10, 14, np.uint8)
    for name, array in (("train", slice(0, 8)), ("t10k", slice(8, None))):
        for kind, values in (("images-idx3", x), ("labels-idx1", y)):
            path = tmp_path / f"{name}-{kind}-ubyte"
            path.write_bytes(idx(values[array]))
            if name == "t10k":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    found = data.images(str(tmp_path), tmp_path)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_array_equal(found[1], y)
    assert data.half(x.astype(float)).shape == (14, 14, 14)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(x)[:-1])
    with pytest.raises(ValueError, match=r"must hold \(14, 28, 28\) elements, got 10975"):
        data.read_idx(tmp_path / "train-images-idx3-ubyte")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match=r"must be an idx file of bytes, got b'text'"):
        data.read_idx(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"images must be a folder with .*idx3"):
        data.images(str(tmp_path / "empty"), tmp_path)


def test_glosses_are_read_as_they_were_written(tmp_path):
    data = module("_tasks.data")
    lines = ["  1 the licence | on top"]
    for i in range(40):
        lines.append(f'0000{i} {5 if i % 2 else 17} n 01 x 0 000 | a thing, Green; "an example"  ')
    (tmp_path / "data.noun").write_text("\n".join(lines))
    x, y, kinds = data.glosses(tmp_path)
    assert x.shape == (40, data.LENGTH) and kinds == 2 + 3
    np.testing.assert_array_equal(y, [0 if i % 2 else 1 for i in range(40)])
    assert np.all(x[:, 3:] == data.PAD) and np.all(x[:, :3] > 1)
    with pytest.raises(ValueError, match=r"data\.noun, got .*nothing"):
        data.glosses(tmp_path / "nothing")


def test_cities_are_of_one_country():
    data = module("_tasks.data")
    x, y, kinds = data.cities()
    assert len(np.unique(x, axis=0)) > 0.99 * len(x)  # but for those cut off or with rare letters
    assert np.bincount(y).min() >= data.COUNTRY and x.max() == kinds - 1


# Networks of three libraries


def of_linen():
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))

    return module("_tasks.task").linen(Network(), jnp.zeros((1, 4)))


def of_nnx():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    return module("_tasks.task").nnx(lambda rngs: Network(rngs))


def of_equinox():
    import equinox as eqx

    def make(key):
        first, last = jax.random.split(key)
        layers = [eqx.nn.Linear(4, 8, key=first), eqx.nn.Lambda(jax.nn.relu)]
        return eqx.nn.Sequential([*layers, eqx.nn.Dropout(0.2), eqx.nn.Linear(8, 3, key=last)])

    return module("_tasks.task").equinox(make)


def blobs(number):
    rng = np.random.default_rng(number)
    y = rng.integers(0, 3, 120).astype(np.int32)
    x = (np.eye(4)[y] + 0.2 * rng.normal(size=(120, 4))).astype(np.float32)
    return module("_tasks.task").Split(*((x[i::3], y[i::3]) for i in range(3)))


def task_of(network, **changes):
    options = {"gradients": 80, "batch": 10, "chunk": 5, "optimizer": "sgd"} | changes
    return module("_tasks.task").Task("blobs", *network, blobs, **options)


SETTING = {"lr": 0.1, "weight_decay": 0.001, "rho": 0.1}


@pytest.mark.parametrize("network", [of_linen, of_nnx, of_equinox])
def test_networks_of_all_libraries_learn(network):
    training, task = module("_training"), task_of(network())
    params, state = task.init(jax.random.key(0))
    x = blobs(0).train[0]
    draws = [np.asarray(task.apply(params, state, x, jax.random.key(i), {})[0]) for i in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])  # dropout
    _, moved = task.apply(params, state, x, jax.random.key(1), {})
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    before, after = jax.tree.leaves(state), jax.tree.leaves(moved)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(changed) and bool(changed) == (network is not of_equinox)
    trained = training.fit(task, training.SAM, SETTING, 0, blobs(0).train, 40)
    said = training.outputs(task, trained, blobs(0).test[0])
    assert training.error(task, said, blobs(0).test[1]) < 15


# Training


@pytest.fixture(scope="module")
def small():
    """A task without dropout or statistics, whose programs the tests share."""
    import sys

    sys.path[:0] = [str(EXAMPLES), str(FOLDER)]
    networks, task = module("_tasks.networks"), module("_tasks.task")
    return task_of(task.linen(networks.MLP((8,), 3), jnp.zeros((1, 4))))


def params_of(trained):
    return jax.tree.leaves(trained.params)


def test_a_traced_dropout_rate():
    """None at a rate of 0; else the entries that are kept make up for those that are not."""
    import flax.linen as nn

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, rate, train):
            return module("_tasks.networks").drop(self, x, rate, train)

    x, rngs = jnp.arange(1.0, 4001.0), {"dropout": jax.random.key(0)}
    apply = jax.jit(Dropped().apply, static_argnames="train")
    np.testing.assert_array_equal(apply({}, x, 0.0, train=True, rngs=rngs), x)
    np.testing.assert_array_equal(apply({}, x, 0.25, train=False), x)
    ratio = np.asarray(apply({}, x, 0.25, train=True, rngs=rngs) / x)
    kept = ratio > 0
    np.testing.assert_allclose(ratio[kept], 4 / 3, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.03


def test_fit_is_a_plain_loop(small):
    training = module("_training")
    x, y = blobs(0).train
    shape = optax.warmup_cosine_decay_schedule(0, 1, 50, 1000)
    tx = optax.chain(
        optax.add_decayed_weights(0.01, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
        optax.sgd(lambda count: 0.1 * shape(50 * count), 0.9, nesterov=True),
    )
    params, _ = small.init(jax.random.key(3))
    state = tx.init(params)
    for rows in training.orders(3, len(y), small.batch, 20):
        loss = lambda params, rows=rows: optax.softmax_cross_entropy_with_integer_labels(
            small.apply(params, {}, x[rows], None, {})[0], y[rows]
        ).mean()
        grads = jax.grad(loss)(params)
        e = jax.tree.map(lambda g, norm=optax.tree.norm(grads): 0.1 * g / norm, grads)
        grads = jax.grad(loss)(optax.apply_updates(params, e))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    setting = SETTING | {"weight_decay": 0.01}
    found = training.fit(small, training.SAM, setting, 3, blobs(0).train, 20)
    for a, b in zip(jax.tree.leaves(params), params_of(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_late_tail_is_the_base_until_it_begins(small):
    training = module("_training")
    late = next(method for method in training.METHODS if method.late)
    seen = {}
    for method in (training.BASE, late):
        kept = seen[method.name] = {}
        watch = lambda step, carry, kept=kept: kept.update({step: params_of(carry)})
        training.fit(small, method, SETTING, 0, blobs(0).train, 40, watch=watch)
    same = {
        step: all(map(np.array_equal, params, seen[late.name][step]))
        for step, params in seen["base"].items()
    }
    assert same == {step: step <= 30 for step in range(5, 45, 5)}


def test_lengths_cost_the_same_and_are_whole_chunks(small):
    training = module("_training")
    for method, budget in itertools.product(training.METHODS, (0.3, 1.0, 2.0)):
        steps = training.length(small, method, budget)
        assert steps % small.chunk == 0 and (not method.late or (steps / 4) % small.chunk == 0)
        slack = method.cost * small.chunk * (4 if method.late else 1)
        assert abs(steps * method.cost - budget * small.gradients) <= slack


def test_orders_are_epochs():
    rows = module("_training").orders(0, 25, 10, 5)
    assert rows.shape == (5, 10)
    assert len(set(rows[:2].ravel())) == 20 and not np.array_equal(rows[0], rows[2])
    with pytest.raises(ValueError, match=r"batch must be at most 25, .* got 30"):
        module("_training").orders(0, 25, 30, 5)


def test_outputs_of_many_examples_are_those_of_each(small, monkeypatch):
    training = module("_training")
    monkeypatch.setattr(training, "EVALUATED", 16)
    trained = training.Trained(*small.init(jax.random.key(0)))
    x = blobs(0).train[0][:37]
    expected = small.apply(*trained, x, None, {})[0]
    np.testing.assert_allclose(training.outputs(small, trained, x), expected, rtol=1e-5)


# Search


class Log:
    """A study that keeps nothing."""

    quick, seeds = False, 4

    def collect(self, keys, compute, lanes, weight):
        return list(itertools.chain.from_iterable(compute([key]) for key in keys))


def test_trials_share_what_they_draw_and_keep_to_ranges(small):
    trials, training, task = module("_trials"), module("_training"), module("_tasks.task")
    found = trials.Trials(Log(), small, 0.0)
    for i in range(20):
        drawn = {m.name: found.draw(m, i) for m in training.METHODS}
        assert len({(d["length"], d["lr"], d["weight_decay"]) for d in drawn.values()}) == 1
        assert "rho" not in drawn["base"]
        rho = drawn["SAM"]["rho"]
        assert 0.02 <= rho <= 0.5 and drawn["ASAM"]["rho"] == pytest.approx(10 * rho, rel=1e-3)
        assert 0.01 <= drawn["SAM"]["lr"] <= 0.5
    own = (("SAM", (("rho", task.Choice((7.0,))), ("lr", task.Choice((3.0,))))),)
    drawn = trials.Trials(Log(), task_of((None, None), own=own), 0.0)
    assert drawn.draw(training.SAM, 0)["rho"] == 7 and drawn.draw(training.SAM, 0)["lr"] == 3
    assert drawn.draw(training.BASE, 0)["lr"] != 3


def test_the_search_takes_the_best_mean_of_the_best_few(small, monkeypatch):
    """The trial that was lucky in its first run is not chosen."""
    trials, base = module("_trials"), module("_training").BASE
    found, ran = trials.Trials(Log(), small, 0.0), []
    settings = [found.draw(base, i) for i in range(trials.TRIALS)]

    def run(method, points, stage):
        ran.append((stage, len(points)))
        errors = []
        for setting, seed, split in points:
            assert seed == split >= trials.SEARCH
            i = settings.index(setting)
            lucky = i == 5 and seed == trials.SEARCH
            errors.append(0.0 if lucky else 1.0 + abs(i - 8))
        return [{"validation": error, "error": 50 + error} for error in errors]

    monkeypatch.setattr(found, "run", run)
    search = found.search(base)
    assert search.best == settings[8]
    assert ran == [("search", trials.TRIALS), ("search", trials.KEPT * trials.MORE)]
    assert search.validation[5] == 0 and search.test[8] == 51 and len(search.test) == trials.TRIALS


def test_runs_are_in_the_order_of_their_points(small):
    trials, training = module("_trials"), module("_training")
    found = trials.Trials(Log(), small, 0.4)
    settings = [SETTING | {"length": length} for length in (1.0, 0.3)]
    both = found.run(training.SAM, [(s, 0, 1) for s in settings], "test")
    for setting, result in zip(settings, both, strict=True):
        assert found.run(training.SAM, [(setting, 0, 1)], "test") == [result]
    assert both[0] != both[1]
    assert set(both[0]) == {"validation", "error", "bits4", "bits3", "noisy", "calibration"}
    assert sorted(found.split(0).train[1] != blobs(0).train[1]).count(True) == 16


def test_verdicts():
    pay = module("_paying")
    curve = module("_inference").Curve(*np.array([[1.0] * 3, [-1.0, 0.5, 0.5], [2.0] * 3]))
    runs = lambda *errors: [{"error": e, "split": i % 3} for i, e in enumerate(errors)]
    base = pay.Row(types.SimpleNamespace(name="base"), None, runs(20, 21, 20, 21, 20, 21))
    row = base._replace(method=types.SimpleNamespace(name="SAM"), gain=curve)
    better = row._replace(runs=runs(10, 11, 10), p_welch=0.01, p_paired=0.02)
    words = lambda row: pay.verdict(row, base, "SGD")
    assert words(better) == "SAM pays from 2 trials on (10.3 % instead of 20.5 %)"
    assert words(better._replace(p_paired=0.06)).startswith("SAM is not told apart from SGD")
    assert words(better._replace(p_welch=float("nan"))).startswith("SAM is not told apart")
    assert "from how many" in words(better._replace(gain=curve._replace(low=-curve.mean)))
    worse = row._replace(runs=runs(30, 31, 30), p_welch=0.01, p_paired=0.02)
    assert words(worse) == "SAM is worse than SGD (30.3 % instead of 20.5 %)"
    assert base.told(1) == "20.5 ± 0.5"
    broken = base._replace(runs=runs(20, 21, 90, 20, 21))
    assert broken.told(0) == "34 ± 31 (median 21: 1 of 5 broke down)"


# After training


def test_rounding():
    after = module("_after")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32)
    params = {"kernel": w, "bias": w[0], "none": jnp.zeros((2, 2))}
    for bits in (3, 4):
        found = after.rounded(params, bits)
        levels = 2 ** (bits - 1) - 1
        scale = float(jnp.abs(w).max()) / levels
        values = np.asarray(found["kernel"]) / scale
        np.testing.assert_allclose(values, np.round(values), atol=1e-4)
        assert np.abs(values).max() == pytest.approx(levels)
        assert float(jnp.abs(found["kernel"] - w).max()) <= scale / 2 * 1.001
        np.testing.assert_array_equal(found["bias"], w[0])
        np.testing.assert_array_equal(found["none"], 0)
        again = after.rounded(found, bits)["kernel"]
        np.testing.assert_allclose(again, found["kernel"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"bits must be at least 2, got 1"):
        after.rounded(params, 1)


def test_calibration_error():
    after = module("_after")
    logits = np.log(np.array([[0.8, 0.2]] * 10))
    assert after.calibration_error(logits, np.array([0] * 8 + [1] * 2)) == pytest.approx(
        0, abs=1e-4
    )
    assert after.calibration_error(logits, np.array([1] * 10)) == pytest.approx(80, rel=1e-4)
    # Two bins whose gaps do not make up for each other: .8 - 1 and .6 - .4.
    logits = np.log(np.array([[0.8, 0.2]] * 5 + [[0.6, 0.4]] * 5))
    found = after.calibration_error(logits, np.array([0] * 5 + [0, 0, 1, 1, 1]))
    assert found == pytest.approx(20, rel=1e-4)
    for value in (np.nan, np.inf, -np.inf):  # of a diverged network: sure, and mostly wrong
        logits = np.full((10, 2), value)
        assert after.calibration_error(logits, np.array([0] * 4 + [1] * 6)) == pytest.approx(60)


def test_noise_of_the_input():
    after, rng = module("_after"), np.random.default_rng(0)
    tokens = rng.integers(1, 50, (200, 30)) * (rng.random((200, 30)) < 0.7)
    found = after.noisy(tokens, 0)
    np.testing.assert_array_equal(found == 0, tokens == 0)
    assert 0.08 < np.mean((found != tokens)[tokens > 0]) < 0.11
    x = rng.normal(2, 3, (100, 50)).astype(np.float32)
    assert np.std(after.noisy(x, 0) - x) == pytest.approx(1.5, rel=0.05)


def test_forgetting_is_read_where_all_know_the_rest_equally_well():
    after = module("after_training")
    runs = {
        "base": [{"new": [90.0, 40.0, 8.0], "old": [5.0, 10.0, 20.0, 30.0]}],
        "SAM": [{"new": [35.0, 20.0, 30.0], "old": [6.0, 7.0, 12.0, 13.0]}],
    }
    rises, level = after.forgotten(runs)
    assert level == 20 and rises == {"base": [25.0], "SAM": [6.0]}
    runs["SAM"].append({"new": [90.0, 89.0], "old": [90.0, 90.0, 90.0]})  # broke down
    assert after.forgotten(runs) == (rises, 20)


def test_halves_of_the_classes():
    after, rng = module("after_training"), np.random.default_rng(0)
    y = np.arange(60) % 7
    split = module("_tasks.task").Split(*[(rng.normal(size=60), y)] * 3)
    old, new, middle = after.halves(split)
    assert middle == 3 and set(old.train[1]) == {0, 1, 2} and set(new.test[1]) == {3, 4, 5, 6}
    assert len(old.train[0]) + len(new.train[0]) == 60


def test_answers_after_training_are_corrected_for_the_tasks():
    after, rng = module("after_training"), np.random.default_rng(0)

    def runs(mean):
        rise = mean + 0.5 * rng.normal(size=12)
        return [{"error": 7.0, "bits3": 7.0 + r, "split": i % 6} for i, r in enumerate(rise)]

    tasks = {"low": (9.0, 3.0), "same": (5.0, 5.0), "high": (3.0, 9.0)}
    results = {name: {"base": runs(a), "SAM": runs(b)} for name, (a, b) in tasks.items()}
    assert after.answers(results, "bits3", "SAM") == ["better", "", "worse"]
    useless = [run | {"error": 89.0, "bits3": 89.0} for run in runs(0.0)]
    results["low"]["SAM"] = useless  # has nothing to lose
    assert after.answers(results, "bits3", "SAM") == ["broke down", "", "worse"]
    # The same two samples among a hundred: Holm's correction takes them back.
    barely = {"base": runs(5.0), "SAM": runs(4.3)}
    assert after.answers({"one": barely}, "bits3", "SAM") == ["better"]
    crowd = {str(k): {"base": runs(5.0), "SAM": runs(5.0)} for k in range(99)}
    assert after.answers({"one": barely} | crowd, "bits3", "SAM")[0] == ""


# rho without a grid


def test_the_rise_of_the_loss_comes_to_its_target():
    rules = module("rho_rules")
    tx = rules.sam_of_rise(0.1)
    loss = lambda w: 1 + jnp.sum(jnp.array([1.0, 3.0]) * w**2) / 2
    w = jnp.array([3.0, 1.0])
    state, (value, grads) = tx.init(w), jax.value_and_grad(loss)(w)
    for _ in range(60):
        rho = state.rho
        sharp, state = tx.update(grads, state, w, value=value, grad_fn=jax.grad(loss))
    e = rho * grads / jnp.linalg.norm(grads)
    np.testing.assert_allclose(sharp, jax.grad(loss)(w + e), rtol=1e-5)
    assert float(loss(w + e) / value) == pytest.approx(1.1, rel=1e-4)
    _, after = tx.update(0 * grads, state, w, value=value, grad_fn=jax.grad(loss))
    assert np.isfinite(after.rho)  # a zero gradient has no rise


def test_the_range_test_steps_back_from_the_least_loss():
    rules = module("rho_rules")
    losses = [2.0 - 0.1 * i for i in range(15)] + [5.0] * 15
    at = rules.LOW * (rules.HIGH / rules.LOW) ** (14 / 29)
    assert rules.stepped_back(losses) == pytest.approx(at / rules.BACK)
    assert rules.stepped_back([*losses[:15], *[float("nan")] * 15]) == pytest.approx(
        at / rules.BACK
    )


def test_the_cliff_is_above_the_best():
    sensitivity = module("sensitivity")
    errors = np.array([[[30.0], [10.0], [12.0], [21.0]], [[40.0], [40.0], [40.0], [40.0]]])
    assert sensitivity.cliff((1.0, 2.0, 4.0, 8.0), errors) == 8.0
    assert sensitivity.cliff((1.0, 2.0, 4.0, 8.0), np.minimum(errors, 15)) is None


# Programs


def test_every_task_runs_with_small_settings(tmp_path, capsys):
    names = ["text", "resnet"]  # no state, and BatchNorm's; time forbids the other two here
    assert {*names} < {*module("_tasks.suite").TASKS}
    arguments = ["--quick", "--out", str(tmp_path), "--methods", "SAM", "--task", *names]
    module("does_it_pay").main(arguments)
    out, err = capsys.readouterr()
    assert "Warning" not in err
    table = (tmp_path / "does_it_pay_quick.md").read_text()
    assert len(table.splitlines()) == 2 + len(names)
    assert len({line.count(" | ") for line in table.splitlines()}) == 1
    figures = list(tmp_path.glob("*.png"))
    assert len(figures) == len(names) + 1 and all(f.stat().st_size > 10_000 for f in figures)
    assert out.count("Claim Does it pay") == len(names)


def test_a_task_of_the_users_own(tmp_path, capsys, monkeypatch):
    """That of the documentation, word for word."""
    page = (ROOT / "docs" / "recipes" / "does_it_pay.md").read_text()
    (code,) = re.findall(r"```python\n(# my_task.py.*?)```", page, re.DOTALL)
    (tmp_path / "my_task.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--out", str(tmp_path), "--methods", "SAM", "--task", "my_task:task"]
    monkeypatch.syspath_prepend(str(tmp_path))
    module("does_it_pay").main([*arguments, "--wrong", "0"])
    assert "Does it pay: my digits, clean labels" in capsys.readouterr().out
    module("does_it_pay").main([*arguments, "--plan"])
    assert "minutes in all" in capsys.readouterr().out


def test_the_task_of_the_readme(tmp_path, capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(# my_task.py.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(re.findall(r"^.*\S", code, re.M)) == 11  # ten, and the name of the file
    (tmp_path / "readme_task.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--out", str(tmp_path), "--task", "readme_task:task", "--plan"]
    module("does_it_pay").main(arguments)
    assert "minutes in all" in capsys.readouterr().out
    task = module("readme_task").task
    x, y = task.data(0).train
    params, state = task.init(jax.random.key(0))
    outputs, _ = task.apply(params, state, x, None, {})
    assert outputs.shape == (len(y), 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrong", "1.5"], r"--wrong must be at least 0 and below 1, got 1.5"),
        (["--trials", "1"], r"--trials must be at least 2, got 1"),
        (["--task", "nothing"], r"task must be one of mlp, .* or module:name, got 'nothing'"),
        (["--task", "json:decoder"], r"json:decoder must be a Task or return one"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        module("does_it_pay").main(["--quick", "--out", str(tmp_path), *arguments])


def test_the_page_of_results_has_all_tables():
    run_all = module("run_all")
    record = {"date": "2026-01-02T00:00", "cores": 2, "device": "1 x cpu", "seconds": 90.0}
    tables = {"versions": {"jax": "1"}, "pages": {"Rules": [["rule", "error"], ["none", "7.1"]]}}
    found = run_all.results([record | tables] * 2, "| claim |")
    parts = (
        "2026-01-02",
        "3 minutes",
        "| claim |",
        "## Rules\n\n| rule | error |",
        "| none | 7.1 |",
    )
    assert all(part in found for part in parts)
    assert "PREREGISTERED" in found and (FOLDER / "PREREGISTERED.md").exists()
    # The scripts that share the log of another run after it.
    after = run_all.NAMES.index(run_all.FIRST)
    assert all(run_all.NAMES.index(name) > after for name in run_all.SHARING)


def test_a_shared_log_is_not_forgotten(tmp_path):
    harness = module("_harness")
    options = ["--out", str(tmp_path)]
    keys, ran = [{"seed": 0}, {"seed": 1}], []
    run = lambda group: [ran.append(key) or {"error": 1.0} for key in group]
    harness.Study("one.py", "Title.", options).collect(keys, run)
    harness.Study("two.py", "Title.", [*options, "--fresh"], log="one").collect(keys, run)
    assert len(ran) == 2
    harness.Study("one.py", "Title.", [*options, "--fresh"]).collect(keys, run)
    assert len(ran) == 4


def test_the_time_left_counts_only_what_is_missing(tmp_path):
    harness = module("_harness")
    keys = [{"seed": seed} for seed in range(4)]
    run, weight = (lambda group: [{"error": 1.0}] * len(group)), (lambda key: 2.0 + key["seed"])
    study = lambda: harness.Study("one.py", "Title.", ["--out", str(tmp_path)])
    study().collect(keys[:2], run)
    again = study()
    again.expect(sum(map(weight, keys)))
    again.collect(keys, run, 1, weight)
    assert again._bar.n == again._bar.total == 4 + 5


def test_what_was_fixed_beforehand_is_what_runs():
    text = " ".join((FOLDER / "PREREGISTERED.md").read_text().split())
    trials, rules, task = module("_trials"), module("rho_rules"), module("_tasks.task")
    assert f"{trials.TRIALS} trials a method" in text
    assert (trials.KEPT, trials.MORE, trials.SEEDS, trials.SPLITS) == (4, 3, 12, 6)
    assert "the four with the least validation error run three times more" in text
    assert "seeds 0 to 11, of splits 0 to 5" in text
    assert trials.LENGTHS.values == (0.3, 1.0, 2.0) and "(0.3, 1 or 2 trainings" in text
    sgd, adamw = (task.SEARCHED[name] for name in ("sgd", "adamw"))
    said = "SGD: learning rate .01 to .5, weight decay (L2) .0005 to .1; AdamW: .001 to .01"
    assert said in text and "decoupled decay .05 to 5" in text
    assert (*sgd["lr"], *sgd["weight_decay"]) == (0.01, 0.5, 0.0005, 0.1)
    assert (*adamw["lr"], *adamw["weight_decay"]) == (0.001, 0.01, 0.05, 5.0)
    assert tuple(task.RHO) == (0.02, 0.5) and "SAM and late tail .02 to .5" in text
    assert (rules.PEAK, rules.TARGET, rules.KEPT, rules.ENOUGH) == (0.05, 0.1, 0.9, 4)
    assert (rules.LOW, rules.HIGH, rules.STEPS, rules.BACK) == (0.01, 2.0, 30, 2.0)
