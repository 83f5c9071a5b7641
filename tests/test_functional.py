"""value_and_grad and grad: a drop-in for jax.value_and_grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest

import sam_optax

jax_loss = functools.partial(ref.loss, jnp)
PARAMS, BATCH = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ref.network())


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def loss_with_aux(params, batch):
    loss = jax_loss(params, batch)
    return loss, {"loss": loss, "w": params["w1"]}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_value_is_clean_and_gradient_is_that_of_the_perturbed_point(wrap):
    loss, grads = wrap(sam_optax.value_and_grad(jax_loss, sam_optax.sam(0.2)))(PARAMS, BATCH)
    clean = jax.grad(jax_loss)(PARAMS, BATCH)
    e = jax.tree.map(lambda g: 0.2 * g / optax.tree.norm(clean), clean)
    np.testing.assert_allclose(loss, jax_loss(PARAMS, BATCH), rtol=1e-6)
    assert_close(grads, jax.grad(jax_loss)(optax.apply_updates(PARAMS, e), BATCH))


def test_default_transform_is_sam():
    assert_close(
        sam_optax.grad(jax_loss)(PARAMS, BATCH),
        sam_optax.grad(jax_loss, sam_optax.sam(rho=0.05))(PARAMS, BATCH),
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_aux_of_either_pass(wrap):
    clean = wrap(sam_optax.value_and_grad(loss_with_aux, sam_optax.sam(0.2), has_aux=True))
    (loss, aux), grads = clean(PARAMS, BATCH)
    assert_close(aux, {"loss": loss, "w": PARAMS["w1"]})
    perturbed = wrap(
        sam_optax.value_and_grad(
            loss_with_aux, sam_optax.sam(0.2), has_aux=True, aux_from="perturbed"
        )
    )
    (same_loss, aux), same_grads = perturbed(PARAMS, BATCH)
    assert_close((same_loss, same_grads), (loss, grads))
    assert aux["loss"] > loss + 0.01
    assert np.abs(aux["w"] - PARAMS["w1"]).max() > 0.01
    only_grads, _ = sam_optax.grad(loss_with_aux, sam_optax.sam(0.2), has_aux=True)(PARAMS, BATCH)
    assert_close(only_grads, grads)


def test_keyword_and_static_arguments_of_the_loss():
    def loss(params, x, *, scale, kind):
        assert kind == "square" and isinstance(scale, float)
        return scale * jnp.sum((params - x) ** 2)

    sharp = sam_optax.value_and_grad(loss, sam_optax.sam(0.1))
    expected = sharp(jnp.zeros(2), jnp.ones(2), scale=2.0, kind="square")

    @jax.jit
    def step(params, x):
        return sharp(params, x, scale=2.0, kind="square")

    assert_close(step(jnp.zeros(2), jnp.ones(2)), expected)


def test_rho_may_be_traced_so_a_schedule_works_without_recompiling():
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    traces = []

    @jax.jit
    def step(params, count):
        traces.append(1)
        return sam_optax.grad(jax_loss, sam_optax.sam(schedule(count)))(params, BATCH)

    for count in range(3):
        expected = sam_optax.grad(jax_loss, sam_optax.sam(0.1 * count))(PARAMS, BATCH)
        assert_close(step(PARAMS, count), expected)
    assert len(traces) == 1


def test_the_loss_is_traced_once_in_a_jitted_step():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return jax_loss(params, batch)

    for transform in (sam_optax.sam(0.1), sam_optax.asam(0.5)):
        traces.clear()
        jax.jit(sam_optax.value_and_grad(loss, transform))(PARAMS, BATCH)
        assert len(traces) == 1


def test_outside_jit_the_loss_sees_what_it_closes_over_now():
    """As with jax.value_and_grad: no stale copy of a global."""
    scale = 1.0
    sharp = sam_optax.grad(lambda w: scale * jnp.sum(w**2), sam_optax.sam(0.0))
    np.testing.assert_allclose(sharp(jnp.ones(1)), [2.0])
    scale = 3.0
    np.testing.assert_allclose(sharp(jnp.ones(1)), [6.0])


def test_two_gradients_are_evaluated():
    calls = []

    def loss(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return jax_loss(params, batch)

    jax.block_until_ready(jax.jit(sam_optax.grad(loss, sam_optax.sam(0.1)))(PARAMS, BATCH))
    jax.effects_barrier()
    assert len(calls) == 2


def test_stateless_chains_are_transforms():
    transform = optax.chain(sam_optax.sam(0.2), optax.clip_by_global_norm(0.01))
    grads = sam_optax.grad(jax_loss, transform)(PARAMS, BATCH)
    np.testing.assert_allclose(optax.tree.norm(grads), 0.01, rtol=1e-5)


def test_works_under_scan_vmap_donation_and_remat():
    sharp = sam_optax.value_and_grad(jax.checkpoint(jax_loss), sam_optax.sam(0.2))
    tx = optax.sgd(0.05, momentum=0.9)

    def step(carry, _):
        params, state = carry
        loss, grads = sharp(params, BATCH)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry):
        return jax.lax.scan(step, carry, length=5)

    carry = (PARAMS, tx.init(PARAMS))
    for _ in range(5):
        carry, _ = step(carry, None)
    copies = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    assert_close(train(copies)[0], carry)

    seeds = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    loss, grads = jax.vmap(sharp, in_axes=(0, None))(seeds, BATCH)
    for i in range(2):
        assert_close(
            jax.tree.map(lambda x, i=i: x[i], (loss, grads)),
            sharp(jax.tree.map(lambda x, i=i: x[i], seeds), BATCH),
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_keeps_dtypes_and_direction(dtype):
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCH))
    loss, grads = jax.jit(sam_optax.value_and_grad(jax_loss, sam_optax.sam(0.2)))(params, batch)
    assert loss.dtype == dtype and {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    exact = sam_optax.grad(jax_loss, sam_optax.sam(0.2))(PARAMS, BATCH)
    assert_close(jax.tree.map(jnp.float32, grads), exact, rtol=0.1, atol=0.05)


def test_integer_parameters_as_in_jax():
    params = {"w": jnp.ones(2), "steps": jnp.array([3])}
    loss = lambda p: jnp.sum(p["w"] ** 2 * p["steps"])
    with pytest.raises(TypeError, match="int"):
        sam_optax.grad(loss, sam_optax.sam(0.1))(params)
    grads = sam_optax.grad(loss, sam_optax.sam(0.1), allow_int=True)(params)
    assert grads["steps"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(grads["w"], 6 * (1 + 0.1 / np.sqrt(2)) * np.ones(2), rtol=1e-6)


def test_nonfinite_loss_gives_nonfinite_gradients():
    grads = sam_optax.grad(lambda w: jnp.sum(jnp.log(w)), sam_optax.sam(0.1))(jnp.array([0.0, 1.0]))
    assert not np.isfinite(grads).any()


def test_a_second_call_compiles_nothing():
    step = jax.jit(sam_optax.value_and_grad(jax_loss, sam_optax.asam(0.5)))
    for _ in range(2):
        step(PARAMS, BATCH)
    assert step._cache_size() == 1


def test_errors():
    with pytest.raises(
        ValueError, match="aux_from must be one of 'clean', 'perturbed', got 'both'"
    ):
        sam_optax.value_and_grad(jax_loss, aux_from="both")
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        sam_optax.value_and_grad(jax_loss, microbatch_size=0)
    with pytest.raises(ValueError, match=r"microbatch_size must be an integer.*got 2\.5"):
        sam_optax.value_and_grad(jax_loss, microbatch_size=2.5)
    stateful = sam_optax.sam(optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match=r"transform must be without state.*optax\.chain"):
        sam_optax.grad(jax_loss, stateful)(PARAMS, BATCH)
    with pytest.raises(ValueError, match='aux_from must be "clean" for a transform that evaluates'):
        sam_optax.grad(jax_loss, optax.identity(), aux_from="perturbed")(PARAMS, BATCH)
    with pytest.raises(NameError, match="nowhere"):
        sam_optax.grad(jax_loss, axis_name="nowhere")(PARAMS, BATCH)
