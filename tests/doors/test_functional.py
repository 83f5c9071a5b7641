"""value_and_grad and grad: a drop-in for jax.value_and_grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from checks import assert_close
from public import METHODS, build, own_inputs

import sam_optax
from sam_optax import FAMILY

jax_loss = functools.partial(ref.loss, jnp)
PARAMS, BATCH = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ref.network())


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
    assert step._cache_size() <= 1


def test_errors():
    with pytest.raises(
        ValueError, match="aux_from must be one of 'clean', 'ascent', 'perturbed', got"
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
    with pytest.raises(NameError, match=r"axis_name must be an axis of the pmap.*got 'nowhere'"):
        sam_optax.grad(jax_loss, axis_name="nowhere")(PARAMS, BATCH)
    for vectorize in (2.5, "2"):
        with pytest.raises(ValueError, match=f"vectorize must be an integer.*got {vectorize!r}"):
            sam_optax.value_and_grad(jax_loss, microbatch_size=4, vectorize=vectorize)
    with pytest.raises(TypeError, match="unexpected keyword argument 'microbatchsize'"):
        sam_optax.grad(jax_loss, microbatchsize=4)


@pytest.mark.parametrize(
    "transform, error, message",
    [
        (0.05, TypeError, r"transform must be a GradientTransformation such as .*got 0\.05"),
        (sam_optax.sam, TypeError, r"call sam\(\)"),
        (optax.adam(0.1), ValueError, "an optimizer is no transform, it comes after"),
        (optax.sgd(0.1), ValueError, "turns it around, as an optimizer does"),
        (optax.chain(sam_optax.sam(), optax.sgd(0.1)), ValueError, "as an optimizer does"),
    ],
    ids=["number", "uncalled", "adam", "sgd", "chain"],
)
def test_what_is_no_transform(transform, error, message):
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(error, match=message):
            wrap(lambda params: sam_optax.grad(jax_loss, transform)(params, BATCH))(PARAMS)


def test_every_stateless_method_is_a_transform():
    """Also those with masks, hyper-parameters traced, and plain links of Optax."""
    mask = jax.tree.map(lambda _: True, PARAMS)
    for transform in (optax.identity(), optax.clip(1.0), sam_optax.sam(mask=mask)):
        sam_optax.grad(jax_loss, transform)(PARAMS, BATCH)
    own = lambda params, batch: {"tail_grad_fn": lambda w: jax.grad(jax_loss)(w, batch)}
    for name in METHODS:
        tx = optax.with_extra_args_support(build(name))
        is_optimizer = name in FAMILY and FAMILY[name].kind == "optimizer"
        if name != "pmean" and not is_optimizer and not jax.tree.leaves(tx.init(PARAMS)):
            jax.eval_shape(sam_optax.grad(jax_loss, tx, extra_args=own), PARAMS, BATCH)


def test_aux_that_has_aux_does_not_announce():
    with pytest.raises(TypeError, match=r"has_aux must be True .* got a tuple of 2"):
        sam_optax.grad(loss_with_aux)(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"must return \(loss, aux\) with has_aux=True"):
        sam_optax.grad(jax_loss, has_aux=True)(PARAMS, BATCH)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_perturbed_aux_of_a_method_that_skips_steps_is_refused(wrap):
    """The branch that computes it may never run."""
    always = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (True, state)
    )
    skipping = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), when=always)
    options = {"has_aux": True, "aux_from": "perturbed"}
    with pytest.raises(ValueError, match=r'aux_from must be "clean" .*\(a cadence\)'):
        wrap(sam_optax.grad(loss_with_aux, skipping, **options))(PARAMS, BATCH)
    wrap(sam_optax.grad(loss_with_aux, skipping, has_aux=True))(PARAMS, BATCH)


@pytest.mark.parametrize("name", ["gam", "cr_sam", "multi_step_sam"])
def test_perturbed_aux_of_methods_with_several_passes_is_that_of_the_first(name):
    method = build(name)
    _, aux = sam_optax.grad(loss_with_aux, method, has_aux=True, aux_from="perturbed")(
        PARAMS, BATCH
    )
    first = sam_optax.sam({"gam": 0.02, "cr_sam": 0.1, "multi_step_sam": 0.05}[name])
    if name == "multi_step_sam":  # its ascent passes are no perturbed pass
        assert np.isfinite(aux["loss"])
        return
    _, expected = sam_optax.grad(loss_with_aux, first, has_aux=True, aux_from="perturbed")(
        PARAMS, BATCH
    )
    assert_close(aux, expected)


# Inputs of a method's own.


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_method_may_ask_for_losses(wrap):
    """value_fn is there, and gives the loss of the same examples elsewhere."""

    def descend(updates, state, params=None, *, value_fn, perturbation, **extra):
        rise = value_fn(optax.apply_updates(params, perturbation)) - value_fn(params)
        return jax.tree.map(lambda g: g * rise, updates), state

    descent = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), descend)
    method = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.2), descent)
    loss, grads = wrap(sam_optax.value_and_grad(jax_loss, method))(PARAMS, BATCH)
    g = jax.grad(jax_loss)(PARAMS, BATCH)
    norm = optax.tree.norm(g)
    moved = jax.tree.map(lambda w, g: w + 0.2 * g / norm, PARAMS, g)
    higher, g_s = jax.value_and_grad(jax_loss)(moved, BATCH)
    assert higher > loss + 0.01
    assert_close(grads, jax.tree.map(lambda g: g * (higher - loss), g_s), rtol=1e-4)


def take_head(updates, state, params=None, *, head, **extra):
    return jax.tree.map(lambda g: g * head, updates), state


HEADED = sam_optax.sharpness_aware(
    sam_optax.dual_ascent(0.2),
    optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), take_head),
)


def test_further_arguments_reach_the_method():
    plain = sam_optax.grad(jax_loss, sam_optax.sam(0.2))(PARAMS, BATCH)
    grads = sam_optax.grad(jax_loss, HEADED, extra_args={"head": 3.0})(PARAMS, BATCH)
    assert_close(grads, jax.tree.map(lambda g: 3 * g, plain))


def test_further_arguments_may_depend_on_the_group():
    """A function of what the loss gets: the group's own examples."""
    x, y = BATCH
    mean = lambda params, x, y: {"head": jnp.mean(x)}
    loss = lambda params, x, y: jax_loss(params, (x, y))
    size = len(x) // 2
    step = sam_optax.grad(loss, HEADED, extra_args=mean, microbatch_size=size)
    halves = [
        jax.tree.map(
            lambda g, s=s: jnp.mean(x[s]) * g,
            sam_optax.grad(loss, sam_optax.sam(0.2))(PARAMS, x[s], y[s]),
        )
        for s in (slice(0, size), slice(size, 2 * size))
    ]
    assert_close(jax.jit(step)(PARAMS, x, y), jax.tree.map(lambda a, b: (a + b) / 2, *halves))


# The second door.

STATEFUL = [
    name
    for name in METHODS
    if jax.tree.leaves(optax.with_extra_args_support(build(name)).init({"w": jnp.ones(2)}))
]


@pytest.mark.parametrize("name", STATEFUL)
def test_value_and_grad_fn_serves_every_method_with_memory(name):
    tx, traces = build(name), []

    def loss(params, batch):
        traces.append(1)
        return loss_with_aux(params, batch)

    def step(evaluate, params, state):
        value, grads, grad_fn = evaluate(params, BATCH)
        more = own_inputs(grad_fn, lambda params: jax_loss(params, BATCH))
        return value, *tx.update(grads, state, params, grad_fn=grad_fn, **more)

    def by_hand(params, batch):
        return (
            loss_with_aux(params, batch),
            jax.grad(jax_loss)(params, batch),
            lambda params: jax.grad(jax_loss)(params, batch),
        )

    door = jax.jit(functools.partial(step, sam_optax.value_and_grad_fn(loss, has_aux=True)))
    hand = jax.jit(functools.partial(step, by_hand))
    state = other = tx.init(PARAMS)
    for _ in range(2):
        value, updates, state = door(PARAMS, state)
        expected_value, expected, other = hand(PARAMS, other)
        assert_close((value, updates), (expected_value, expected))
    # eigen_sam differentiates grad_fn, which JAX traces once more.
    assert len(traces) == 1


def test_value_and_grad_fn_accumulates_with_one_perturbation_for_all():
    x, y = BATCH
    loss = lambda params, x, y: jax_loss(params, (x, y))
    evaluate = sam_optax.value_and_grad_fn(loss, microbatch_size=len(x) // 2)

    @jax.jit
    def step(params, x, y):
        value, grads, grad_fn = evaluate(params, x, y)
        return value, sam_optax.sam(0.2).update(
            grads, sam_optax.sam(0.2).init(params), params, grad_fn=grad_fn
        )[0]

    assert_close(
        step(PARAMS, x, y), sam_optax.value_and_grad(loss, sam_optax.sam(0.2))(PARAMS, x, y)
    )


def test_value_and_grad_fn_gives_optax_the_gradient_of_complex_leaves():
    loss = lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)
    z = jnp.zeros(1, jnp.complex64)
    _, grads, grad_fn = sam_optax.value_and_grad_fn(loss)(z)
    descended = z - 0.5 * grads
    np.testing.assert_allclose(descended, [1 + 2j], rtol=1e-6)
    np.testing.assert_allclose(grad_fn(descended), [0], atol=1e-6)
