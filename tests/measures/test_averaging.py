"""SWA, FGE and their schedules against closed forms and NumPy; BatchNorm against its statistics."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from checks import close_to
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
import sam_optax.averaging.nnx
from sam_optax import averaging


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=3), "b": rng.normal()}
    batch = rng.normal(size=(8, 3)), rng.normal(size=8)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))


def step_of(tx, batch):
    def step(params, state):
        grad_fn = lambda params: jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def iterates(tx, steps, dtype=jnp.float32):
    """w_1, ..., w_steps and the last state."""
    params, batch = problem(dtype)
    step, state, seen = jax.jit(step_of(tx, batch)), tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(params)
    return seen, state


assert_close = close_to(1e-6, 1e-7)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def mean64(trees):
    return jax.tree.map(lambda *xs: np.mean([np.asarray(x, np.float64) for x in xs], 0), *trees)


SCHEDULE = optax.linear_schedule(0.3, 0.01, 12)
SGD = optax.sgd(SCHEDULE, momentum=0.9)


# The iterates k = start, start + every, ... of 12, written out.
@pytest.mark.parametrize(
    "start, every, taken",
    [(0, 1, range(1, 13)), (0, 5, (5, 10)), (1, 5, (1, 6, 11)), (4, 3, (4, 7, 10)), (12, 2, (12,))],
)
def test_the_mean_and_the_last_of_the_iterates(start, every, taken):
    tx = averaging.swa(averaging.snapshots(SGD, 2, start, every), start, every)
    seen, state = iterates(tx, 12)
    assert (int(state.count), int(state.n), int(state.inner.n)) == (12, len(taken), len(taken))
    expected = mean64([seen[k - 1] for k in taken])
    assert_close(averaging.swa_params(state, seen[-1]), expected)
    members, weights = averaging.snapshot_params(state, seen[-1])
    kept = [seen[k - 1] for k in taken][-2:]
    slots = kept + [seen[-1]] * (2 - len(kept))  # empty slots hold the current parameters
    assert_same(members, jax.tree.map(lambda *xs: jnp.stack(xs), *slots))
    np.testing.assert_allclose(weights, [1 / len(kept)] * len(kept) + [0] * (2 - len(kept)))


def test_updates_and_the_state_inside_are_the_optimizer_s_to_the_last_bit():
    """SAM inside needs grad_fn, which must get there."""
    params, batch = problem()
    base = optax.chain(sam_optax.sam(0.2), SGD)
    tx = averaging.swa(averaging.snapshots(base, 2, start=0), start=1)
    plain, wrapped = (params, base.init(params)), (params, tx.init(params))
    for _ in range(3):  # not compiled, because two programs may round differently
        plain, wrapped = step_of(base, batch)(*plain), step_of(tx, batch)(*wrapped)
        assert_same((wrapped[0], wrapped[1].inner.inner), plain)


def test_the_mean_of_a_constant_gradient_is_half_the_way(x64):
    tx = averaging.swa(optax.sgd(0.5), start=0)
    w = jnp.array([1.0, -2.0])
    state = tx.init(w)
    for _ in range(9):
        updates, state = tx.update(jnp.array([1.0, 3.0]), state, w)
        w = optax.apply_updates(w, updates)
    # w_k = w_0 - k g/2, and the mean of 1, ..., 9 is 5.
    np.testing.assert_allclose(averaging.swa_params(state, w), [1 - 2.5, -2 - 7.5], rtol=1e-15)


def test_before_the_first_iterate_params_are_returned():
    params, _ = problem()
    for tx, read in [
        (averaging.swa(SGD, start=3), averaging.swa_params),
        (averaging.snapshots(SGD, 2, start=3), lambda s, w: averaging.snapshot_params(s, w)[0]),
    ]:
        seen, state = iterates(tx, 2)
        assert int(state.n) == 0
        first = read(state, seen[-1])
        first = (
            first if "Snapshots" not in str(type(state)) else jax.tree.map(lambda x: x[0], first)
        )
        assert_same(first, seen[-1])
    assert_same(averaging.snapshot_params(state, params)[1], jnp.array([1.0, 0.0]))


def test_equal_iterates_are_their_average_to_the_last_bit():
    params, _ = problem()
    tx = averaging.swa(optax.sgd(0.0), start=0)
    zeros = optax.tree.zeros_like(params)
    state = jax.lax.fori_loop(0, 50, lambda _, s: tx.update(zeros, s, params)[1], tx.init(params))
    assert int(state.n) == 50
    assert_same(averaging.swa_params(state, params), params)


def test_bfloat16_parameters_are_averaged_in_float32():
    tx = averaging.swa(optax.identity(), start=0)
    w = jnp.array(1.0, jnp.bfloat16)

    def body(_, carry):
        w, state = carry
        updates, state = tx.update(jnp.full_like(w, 2.0**-9), state, w)
        return optax.apply_updates(w, updates), state

    # 1 + 2^-9 rounds to 1: the parameters stay, and so must the mean of what they are.
    w, state = jax.jit(lambda c: jax.lax.fori_loop(0, 600, body, c))((w, tx.init(w)))
    assert float(state.average) == 1 == float(w) and state.average.dtype == jnp.float32
    # A mean in bfloat16 would not move any more.
    _, state = tx.update(jnp.array(2.0, jnp.bfloat16), state, w)
    np.testing.assert_allclose(state.average, 1 + 2 / 601, rtol=1e-6)
    assert averaging.swa_params(state, w).dtype == jnp.bfloat16


def test_other_leaves_pass():
    params = {
        "w": jnp.ones(2, jnp.float16),
        "steps": jnp.array(3),
        "none": None,
        "empty": jnp.ones(0),
    }
    params["masked"] = optax.MaskedNode()
    tx = averaging.swa(averaging.snapshots(optax.identity(), 2, start=0), start=0)
    state = tx.init(params)
    updates = {**params, "w": params["w"], "steps": np.zeros((), jax.dtypes.float0)}
    for _ in range(2):
        _, state = jax.jit(tx.update)(updates, state, params)
    averaged = averaging.swa_params(state, params)
    members, _ = averaging.snapshot_params(state, params)
    assert jax.tree.map(jnp.result_type, averaged) == jax.tree.map(jnp.result_type, params)
    np.testing.assert_array_equal(averaged["w"], [2, 2])
    assert averaged["steps"] == 3 and list(members["steps"]) == [3, 3]
    assert members["empty"].shape == (2, 0) and members["none"] is None


def layout(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_state_is_stable_under_jit_scan_vmap_and_donation(dtype):
    params, batch = problem(dtype)
    tx = averaging.swa(averaging.snapshots(SGD, 2, start=2, every=2), start=2, every=2)
    state = tx.init(params)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert layout(tx.init(like)) == layout(state) == layout(jax.eval_shape(tx.init, params))
    step = step_of(tx, batch)
    carry = params, state
    compiled = jax.jit(step)
    for _ in range(4):
        carry = compiled(*carry)
        assert layout(carry[1]) == layout(state)
    assert compiled._cache_size() <= 1
    scanned, _ = jax.jit(
        lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=4), donate_argnums=0
    )((jax.tree.map(jnp.copy, params), tx.init(params)))  # as it comes: no buffer twice
    # XLA may round fewer of a program's results to bfloat16: 1/512, an ulp at 0.4.
    close = {"rtol": 2e-2, "atol": 2e-3} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(scanned, carry, **close)
    two = jax.tree.map(lambda w: jnp.stack([w, w]), (params, state))
    batched = jax.jit(jax.vmap(step))
    for _ in range(4):
        two = batched(*two)
    one = jax.tree.map(lambda x: x[1], two)
    assert_close(one, carry, **close)


def test_found_inside_any_optimizer_state():
    """Also beside friendly_sam, whose state has a field named average as well."""
    params, _ = problem()
    seen, plain = iterates(averaging.swa(SGD, 2), 4)
    expected = averaging.swa_params(plain, seen[-1])
    injected = optax.inject_hyperparams(
        lambda momentum: averaging.swa(optax.sgd(SCHEDULE, momentum), 2), static_args="momentum"
    )(momentum=0.9)
    memory = sam_optax.friendly_sam(0.0)
    for tx in (
        injected,
        optax.chain(memory, averaging.swa(SGD, 2)),
        optax.MultiSteps(averaging.swa(SGD, 2), 1),
    ):
        seen, state = iterates(tx, 4)
        assert_close(averaging.swa_params(state, seen[-1]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"exactly one SWAState, of swa, got 0 in tuple"):
        averaging.swa_params(optax.adam(0.1).init(params), params)
    two = optax.chain(averaging.swa(SGD, 2), averaging.swa(SGD, 2)).init(params)
    with pytest.raises(ValueError, match="exactly one SWAState, of swa, got 2 in tuple"):
        averaging.swa_params(two, params)
    with pytest.raises(ValueError, match="exactly one SnapshotsState, of snapshots, got 0"):
        averaging.snapshot_params(state, params)
    with pytest.raises(ValueError, match=r"params must have the structure.*2 leaves, got 1"):
        averaging.swa_params(state, params["w"])


def test_multi_steps_counts_steps_of_params():
    tx = optax.MultiSteps(averaging.swa(optax.sgd(0.1), start=0, every=2), 3)
    seen, state = iterates(tx, 12)  # four steps, the iterates 3, 6, 9, 12
    assert_close(averaging.swa_params(state, seen[-1]), mean64([seen[5], seen[11]]))


# a1 = 0.9, a2 = 0.1, c = 4: t = 1/4, 1/2, 3/4, 1.
CYCLE = [0.7, 0.5, 0.3, 0.1]
TRIANGLE = [0.5, 0.1, 0.5, 0.9]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (averaging.cyclical_schedule(0.9, 0.1, 4), CYCLE * 3),
        (averaging.cyclical_schedule(0.9, 0.1, 4, start=3), [0.9] * 3 + CYCLE * 2),
        (averaging.cyclical_schedule(0.9, 0.1, 4, start=2, before=2.0), [2.0] * 2 + CYCLE * 2),
        (
            averaging.cyclical_schedule(0.9, 0.1, 4, start=2, before=lambda n: 5.0 - n),
            [5.0, 4.0, *CYCLE, *CYCLE],
        ),
        (averaging.cyclical_schedule(0.9, 0.1, 1), [0.1] * 5),
        (averaging.cyclical_schedule(0.9, 0.1, 2), [0.5, 0.1] * 3),
        (averaging.triangular_schedule(0.9, 0.1, 4), TRIANGLE * 3),
        (averaging.triangular_schedule(0.9, 0.1, 4, start=1, before=2.0), [2.0, *TRIANGLE * 2]),
        (averaging.triangular_schedule(0.9, 0.1, 2), [0.1, 0.9] * 3),
        # t = 1/6, ..., 1: down in three steps, up in three.
        (averaging.triangular_schedule(0.7, 0.1, 6), [0.5, 0.3, 0.1, 0.3, 0.5, 0.7] * 2),
    ],
)
def test_schedules_have_the_values_computed_by_hand(schedule, expected):
    counts = range(len(expected))
    np.testing.assert_allclose([schedule(n) for n in counts], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(len(expected))), expected, rtol=1e-6)


def test_swa_and_snapshots_line_up_with_their_cycles():
    """The iterates taken are those right after a step at the lowest rate."""
    start, c, low = 3, 4, 0.125
    for schedule, first, tx_of in [
        (averaging.cyclical_schedule, start + c, averaging.swa),
        (
            averaging.triangular_schedule,
            start + c // 2,
            lambda tx, *a: averaging.snapshots(tx, 9, *a),
        ),
    ]:
        lr = schedule(1.0, low, c, start=start)
        tx = tx_of(optax.sgd(lr), first, c)
        w = jnp.array(0.0)
        state = tx.init(w)
        for count in range(16):
            n = int(state.n)
            updates, state = tx.update(jnp.array(-1.0), state, w)
            assert (int(state.n) > n) == (float(updates) == low), count
        assert int(state.n) == 3


def cyclical_sgd():
    """Averages and snapshots whose rate, momentum and cycles all have a position."""
    tx = optax.sgd(averaging.cyclical_schedule(0.3, 0.01, c=4, start=2), momentum=0.9)
    tx = optax.chain(sam_optax.sam(0.1), tx)
    return averaging.swa(averaging.snapshots(tx, 2, start=4, every=4), start=6, every=4)


def test_a_checkpoint_in_mid_cycle_resumes_bit_for_bit(tmp_path):
    params, batch = problem()
    tx = cyclical_sgd()
    step = jax.jit(step_of(tx, batch))
    carry = params, tx.init(params)
    for _ in range(8):  # two steps into the second cycle, one iterate averaged, two kept
        carry = step(*carry)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", carry)
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "saved", like)
    assert type(restored[1]) is averaging.SWAState and int(restored[1].n) == 1
    for _ in range(7):
        carry, restored = step(*carry), step(*restored)
    assert int(carry[1].n) == 3
    assert_same(restored, carry)


def test_under_pmap_and_shard_map_devices_agree_with_one():
    """Each device perturbs on examples of its own; averages are replicated."""
    params, (x, y) = problem()
    tx = cyclical_sgd_on_devices()
    sharp = sam_optax.value_and_grad(loss_fn, sam_optax.sam(0.1), axis_name="batch")

    def step(params, state, batch):
        _, grads = sharp(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    groups = x.reshape(4, 2, -1), y.reshape(4, 2)
    one_device = jax.jit(jax.vmap(step, (None, None, 0), (None, None), axis_name="batch"))
    pmapped = jax.pmap(step, axis_name="batch", devices=jax.devices()[:4])
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole, parts = PartitionSpec(), PartitionSpec("batch")
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, parts), out_specs=(whole, whole))
    )
    expected = sharded = params, tx.init(params)
    replicated = jax.tree.map(lambda w: jnp.stack([w] * 4), expected)
    for _ in range(8):
        expected = one_device(*expected, groups)
        replicated = pmapped(*replicated, groups)
        sharded = mapped(*sharded, (x, y))
    assert int(expected[1].n) == 3
    for device in range(4):
        assert_close(jax.tree.map(lambda w, i=device: w[i], replicated), expected, 1e-5, 1e-6)
    assert_close(sharded, expected, 1e-5, 1e-6)
    read = jax.pmap(averaging.swa_params, devices=jax.devices()[:4])(replicated[1], replicated[0])
    assert_close(
        jax.tree.map(lambda w: w[3], read),
        averaging.swa_params(expected[1], expected[0]),
        1e-5,
        1e-6,
    )


def cyclical_sgd_on_devices():
    tx = optax.sgd(averaging.cyclical_schedule(0.3, 0.01, c=2, start=2), momentum=0.9)
    return averaging.swa(averaging.snapshots(tx, 2, start=3, every=2), start=4, every=2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_keep_their_sharding(kind):
    tx = averaging.swa(averaging.snapshots(optax.sgd(0.1), 3, start=0), start=0)
    w = jax.random.normal(jax.random.key(0), (8, 4))
    expected, _ = tx.update(w, tx.init(w), w)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    with jax.set_mesh(mesh):
        w = jax.device_put(w, rows)
        state = tx.init(w)
        assert state.average.sharding.is_equivalent_to(rows, 2)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(w, state, w)
        average = averaging.swa_params(state, w)
        assert state.average.sharding.is_equivalent_to(rows, 2)
        assert average.sharding.is_equivalent_to(rows, 2)
        stack = state.inner.stack
        assert stack.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp")), 3)
        assert averaging.snapshot_params(state, w)[0].shape == (3, 8, 4)
    assert_close(updates, expected)
    assert_close(average, w - 0.1 * w)


def test_predictions_are_the_weighted_mean_of_the_probabilities():
    rng = np.random.default_rng(0)
    members, x = {"w": rng.normal(size=(4, 3, 5))}, rng.normal(size=(6, 3)).astype(np.float32)
    traces = []

    def predict_fn(params, x):
        traces.append(1)
        return jax.nn.softmax(x @ params["w"]).astype(jnp.float16), params["w"].sum()

    z = np.exp(np.einsum("bi,kij->kbj", x, members["w"]))
    expected = z / z.sum(-1, keepdims=True)
    members = jax.tree.map(jnp.float32, members)
    mean, total = averaging.ensemble_predictions(predict_fn, members, x)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, expected.mean(0), atol=1e-3)
    np.testing.assert_allclose(total, np.sum(members["w"]) / 4, rtol=1e-5)
    before = len(traces)
    averaging.ensemble_predictions(predict_fn, members, x + 1)
    assert len(traces) == before  # nothing compiles again
    # Empty slots are not even looked at.
    spoilt = {"w": members["w"].at[1].set(jnp.nan)}
    weights = np.array([2, 0, 1, 1], np.float16)
    mean, _ = jax.jit(lambda m: averaging.ensemble_predictions(predict_fn, m, x, weights=weights))(
        spoilt
    )
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, (2 * expected[0] + expected[2] + expected[3]) / 4, atol=1e-3)


MOMENTA = (0.0, 0.9, 0.99, 0.9997, 1.0)
RNG = np.random.default_rng(1)
# Unequal batches of unequal distributions, far from zero.
BATCHES = [
    (RNG.normal(20 + 3 * i, 1 + i, size=(n, 3)).astype(np.float32), np.zeros(n))
    for i, n in enumerate((8, 8, 3))
]
SIZES = [len(x) for x, _ in BATCHES]


def weighted(statistic):
    per_batch = [statistic(np.asarray(x, np.float64)) for x, _ in BATCHES]
    return np.average(per_batch, axis=0, weights=SIZES)


class Linen(nn.Module):
    """Normalizations of several momenta side by side, one behind them, and dropout."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        sides = [norm(momentum=m, name=f"norm{i}")(x) for i, m in enumerate(MOMENTA)]
        x = nn.Dropout(0.5, deterministic=not train)(sides[0])
        return norm(momentum=0.95, name="behind")(nn.Dense(2, name="dense")(x * x))


def linen_problem():
    model = Linen()
    variables = model.init(jax.random.key(0), BATCHES[0][0], train=False)
    # What the running statistics were does not matter.
    stats = jax.tree.map(lambda s: s + 7.0, variables["batch_stats"])
    return model, {"params": variables["params"], "batch_stats": stats}


def test_batch_norm_of_linen_is_the_weighted_mean_of_the_batches():
    model, variables = linen_problem()
    key = jax.random.key(2)

    def apply_fn(variables, batch):
        return model.apply(
            variables, batch[0], train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    stats = averaging.estimate_batch_stats(apply_fn, variables, iter(BATCHES))
    assert layout(stats) == layout(variables["batch_stats"])
    mean, var = weighted(lambda x: x.mean(0)), weighted(lambda x: x.var(0))
    for i, momentum in enumerate(MOMENTA):
        if momentum == 1:  # never moves
            assert_same(stats[f"norm{i}"], variables["batch_stats"][f"norm{i}"])
        else:
            np.testing.assert_allclose(stats[f"norm{i}"]["mean"], mean, rtol=3e-7)
            # Flax takes the difference of squares: 400 times the rounding at a mean of 20.
            np.testing.assert_allclose(stats[f"norm{i}"]["var"], var, rtol=2e-4)
    # The layer behind sees what training shows it: normalised by batches, dropout on.
    captured = [
        model.apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: module.name == "dense",
        )[1]["intermediates"]["dense"]["__call__"][0]
        for x, _ in BATCHES
    ]
    behind = np.average([h.mean(0) for h in captured], axis=0, weights=SIZES)
    np.testing.assert_allclose(
        stats["behind"]["mean"], behind, rtol=1e-3
    )  # a variance of 0 + rounding


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, 1 - 1 / 300])
def test_batch_norm_is_accurate_whatever_the_momentum(momentum):
    """1 - float32(0.999) is off by 1e-5 of itself; 1 - 1/300 is no short decimal."""
    model = nn.BatchNorm(use_running_average=False, momentum=momentum, use_fast_variance=False)
    x = BATCHES[0][0]
    variables = model.init(jax.random.key(0), x)
    stats = averaging.estimate_batch_stats(
        lambda v, b: model.apply(v, b, mutable=["batch_stats"]), variables, x
    )
    rtol = 5e-7 if momentum != 1 - 1 / 300 else 1e-5
    np.testing.assert_allclose(stats["mean"], x.mean(0, dtype=np.float64), rtol=rtol)
    np.testing.assert_allclose(stats["var"], x.var(0, dtype=np.float64), rtol=max(rtol, 2e-6))


@pytest.mark.parametrize("statistics", [np.float32, np.float64])
@pytest.mark.parametrize("inputs", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9997, 1 - 1 / 300])
def test_batch_norm_under_x64_is_the_weighted_mean(x64, momentum, inputs, statistics):
    """Float64 sums of float32 products do not show the momentum that was built with."""
    data = [np.asarray(x - 15, inputs) for x, _ in BATCHES]
    exact = {
        name: np.average([f(np.float64(x), axis=0) for x in data], axis=0, weights=SIZES)
        for name, f in (("mean", np.mean), ("var", np.var))
    }
    options = {"momentum": momentum, "use_fast_variance": False}
    model = nn.BatchNorm(use_running_average=False, **options)
    variables = model.init(jax.random.key(0), data[0])
    variables["batch_stats"] = jax.tree.map(lambda s: s.astype(statistics), exact)
    linen = averaging.estimate_batch_stats(
        lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, data
    )
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    for variable in (module.mean, module.var):
        variable.set_value(jnp.ones(3, statistics))
    sam_optax.averaging.nnx.update_batch_stats(module, data)
    # One wide rounding at the end, or those of a mean of eight numbers.
    rtol = 1e-14 if inputs == statistics == np.float64 else 1e-7 if inputs == np.float64 else 2e-7
    for found in (linen, {"mean": module.mean[...], "var": module.var[...]}):
        for name, value in exact.items():
            assert found[name].dtype == statistics
            np.testing.assert_allclose(np.float64(found[name]), value, rtol=rtol)


@pytest.mark.parametrize("product", [jnp.float32, jnp.float64])
def test_the_momentum_is_read_in_the_precision_of_its_product(x64, product):
    """A layer may keep float32 and see float64 batches, or the other way round."""

    def apply_fn(variables, x):
        old = variables["batch_stats"].astype(product)
        return None, {"batch_stats": (old * 0.9997).astype(jnp.float64) + (1 - 0.9997) * x.mean()}

    found = averaging.estimate_batch_stats(apply_fn, {"batch_stats": jnp.ones(())}, np.full(3, 5.0))
    np.testing.assert_allclose(found, 5, rtol=1e-12)


LABELLED = {
    "tuple": (BATCHES[0], r"batch\[0\]"),
    "list of tuples": (BATCHES, r"batch\[0\]"),
    "dict": ({"image": BATCHES[0][0], "category": np.zeros(8, int)}, r"batch\['image'\]"),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_a_batch_with_labels_for_a_function_of_inputs_says_how_to_unpack_it(kind):
    data, part = LABELLED[kind]
    for first in (nn.Dense(2), lambda x: x):
        model = nn.Sequential([first, nn.BatchNorm(use_running_average=False)])
        variables = model.init(jax.random.key(0), BATCHES[0][0])
        with pytest.raises(
            ValueError,
            match=rf"apply_fn must take a whole batch.*\(8,\).*model.apply\(variables, {part}, ",
        ) as caught:
            averaging.estimate_batch_stats(
                lambda v, x, m=model: m.apply(v, x, mutable=["batch_stats"]), variables, data
            )
        assert caught.value.__cause__ is not None
    for model in (
        nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
        nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
    ):
        with pytest.raises(
            ValueError, match=rf"forward must take.*forward=lambda model, batch: model\({part}\)"
        ):
            sam_optax.averaging.nnx.update_batch_stats(model, data)


def test_other_errors_of_the_network_are_its_own():
    model, variables = linen_problem()
    wide = np.ones((8, 5), np.float32)  # one column too many for the network
    for data in (wide, (wide, np.zeros(8))):
        with pytest.raises(TypeError, match="incompatible shapes"):
            averaging.estimate_batch_stats(
                lambda v, b: model.apply(
                    v, jax.tree.leaves(b)[0], train=True, mutable=["batch_stats"]
                ),
                variables,
                data,
            )


@pytest.mark.parametrize(
    "returned", [lambda x: x, lambda x: x[:2], lambda x: (x, {}), lambda x: (x, x, x)]
)
def test_an_apply_fn_without_changes_says_so(returned):
    with pytest.raises(ValueError, match=r"apply_fn must return .*mutable=\['batch_stats'\]"):
        averaging.estimate_batch_stats(
            lambda v, x: returned(x), {"batch_stats": jnp.ones(3)}, BATCHES[0][0]
        )


def test_batch_norm_errors_name_the_argument():
    model, variables = linen_problem()
    evaluate = lambda v, b: model.apply(v, b[0], train=False, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="training mode"):
        averaging.estimate_batch_stats(evaluate, variables, BATCHES)
    with pytest.raises(ValueError, match=r"'batch_stats', got \['params'\]"):
        averaging.estimate_batch_stats(evaluate, {"params": variables["params"]}, BATCHES)
    with pytest.raises(ValueError, match="at least one batch"):
        averaging.estimate_batch_stats(evaluate, variables, [])
    doubling = lambda v, b: (None, {"batch_stats": 2 * v["batch_stats"]})
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\]"):
        averaging.estimate_batch_stats(doubling, {"batch_stats": jnp.ones(2)}, BATCHES)
    with pytest.raises(ValueError, match="must hold a BatchNorm layer, got none in Linear"):
        sam_optax.averaging.nnx.update_batch_stats(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), BATCHES)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.BatchNorm(3, momentum=m, rngs=rngs) for m in MOMENTA])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.behind = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        sides = [norm(x) for norm in self.norms]
        return self.behind(self.dense(self.dropout(sides[0] ** 2)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_of_nnx_is_the_weighted_mean_and_nothing_else_changes(mode):
    model = Nnx(nnx.Rngs(0))
    getattr(model, mode)()
    graph, *_ = nnx.split(model, nnx.BatchStat, ...)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    keys = [str(x) for x in jax.tree.leaves(nnx.state(model, nnx.RngState))]
    sam_optax.averaging.nnx.update_batch_stats(model, BATCHES, lambda model, batch: model(batch[0]))
    mean, var = weighted(lambda x: x.mean(0)), weighted(lambda x: x.var(0))
    for norm, momentum in zip(model.norms, MOMENTA, strict=True):
        np.testing.assert_allclose(norm.mean[...], mean, rtol=3e-7)
        np.testing.assert_allclose(norm.var[...], var, rtol=2e-4)
        assert norm.momentum == momentum
    # Without dropout, normalised by batches.
    kernel, bias = np.float64(model.dense.kernel[...]), np.float64(model.dense.bias[...])
    standard = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    behind = weighted(lambda x: (standard(x) ** 2 @ kernel + bias).mean(0))
    np.testing.assert_allclose(model.behind.mean[...], behind, rtol=1e-4)
    assert nnx.split(model, nnx.BatchStat, ...)[0] == graph  # modes and momenta
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
    assert [str(x) for x in jax.tree.leaves(nnx.state(model, nnx.RngState))] == keys


def test_swa_with_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, averaging.swa(optax.sgd(0.1), start=2), wrt=nnx.Param)
    kernels = []

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model))

    for x, _ in BATCHES:
        step(model, optimizer, x / 100)
        kernels.append(np.float64(model.kernel[...]))
    nnx.update(model, averaging.swa_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(model.kernel[...], np.mean(kernels[1:], 0), rtol=1e-6)
    assert abs(kernels[1] - kernels[-1]).max() > 1e-3


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: averaging.swa(SGD, -1), "start must be at least 0, got -1"),
        (lambda: averaging.swa(SGD, 0, 0), "every must be at least 1, got 0"),
        (lambda: averaging.swa(SGD, 1.5), "start must be an integer known when building, got 1.5"),
        (lambda: averaging.snapshots(SGD, 0, 0), "size must be at least 1, got 0"),
        (lambda: averaging.cyclical_schedule(0.1, 0.1, 0), "c must be at least 1, got 0"),
        (lambda: averaging.cyclical_schedule(-0.1, 0.1, 2), "a1 must be at least 0.0, got -0.1"),
        (lambda: averaging.triangular_schedule(0.1, 0.1, 3), "c must be even, .* got 3"),
        (lambda: averaging.triangular_schedule(0.1, -1, 2), "a2 must be at least 0.0, got -1"),
        (lambda: averaging.cyclical_schedule(1, 1, 2, before=-1), "before must be at least 0.0"),
        (lambda: averaging.swa(SGD, 0).update(1.0, None), "params must be given to update"),
        (
            lambda: averaging.ensemble_predictions(min, {"a": np.ones(2), "b": np.ones(3)}),
            r"stacked_params must share one leading axis of at least 1, got \[\(2,\), \(3,\)\]",
        ),
        (
            lambda: averaging.ensemble_predictions(min, [{"w": np.ones(3), "b": np.ones(2)}] * 2),
            r"stacked_params must share.*got \[\(2,\), \(3,\)\] \(stack a list of trees: jax",
        ),
        (
            lambda: averaging.ensemble_predictions(min, np.ones(2), weights=[1.0]),
            r"weights must have one entry per member, shape \(2,\), got shape \(1,\)",
        ),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_flax_is_imported_by_the_nnx_module_alone():
    code = (
        "import sys, sam_optax.averaging as a; assert 'flax' not in sys.modules;"
        "assert list(a.__all__) == sorted(a.__all__) and all(hasattr(a, n) for n in a.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
