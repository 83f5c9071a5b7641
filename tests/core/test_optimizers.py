"""SAM before every optimizer and transformation of optax and optax.contrib.

The modules are searched, so that a new optimizer is picked up: one that takes
nothing but a learning rate is built, another one fails the test until its
arguments, or the reason why it cannot follow SAM in a chain, stand below.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import sam_optax

ARGUMENTS = {
    "adaptive_grad_clip": dict(clipping=0.1),
    "add_noise": dict(eta=0.1, gamma=0.5, key=0),
    "apply_if_finite": dict(inner=optax.sgd(0.1), max_consecutive_errors=3),
    "clip": dict(max_delta=0.1),
    "clip_by_block_rms": dict(threshold=0.1),
    "clip_by_global_norm": dict(max_norm=0.1),
    "conditionally_mask": dict(inner=optax.sgd(0.1), should_transform_fn=lambda step: step != 1),
    "conditionally_transform": dict(
        inner=optax.sgd(0.1), should_transform_fn=lambda step: step != 1
    ),
    "ema": dict(decay=0.9),
    "flatten": dict(inner=optax.adam(0.1)),
    "freeze": dict(mask={"w": True, "b": False}),
    "masked": dict(inner=optax.sgd(0.1), mask={"w": True, "b": False}),
    "mechanize": dict(base_optimizer=optax.sgd(0.1)),
    "multi_transform": dict(
        transforms={"a": optax.sgd(0.1), "b": optax.adam(0.1)}, param_labels={"w": "a", "b": "b"}
    ),
    "noisy_sgd": dict(key=0),
    "partition": dict(
        transforms={"a": optax.sgd(0.1), "b": optax.adam(0.1)}, param_labels={"w": "a", "b": "b"}
    ),
    "scale": dict(step_size=-0.1),
    "scale_by_backtracking_linesearch": dict(max_backtracking_steps=3),
    "scale_by_learning_rate": dict(learning_rate=0.1),
    "scale_by_schedule": dict(step_size_fn=lambda count: -0.1 / (1 + count)),
    "scale_by_zoom_linesearch": dict(max_linesearch_steps=3),
    "schedule_free": dict(base_optimizer=optax.sgd(0.1), learning_rate=0.1),
    "selective_transform": dict(optimizer=optax.sgd(0.1), freeze_mask={"w": True, "b": False}),
    "snapshot": dict(measure_name="norm", measure=optax.tree.norm),
    "split_real_and_imaginary": dict(inner=optax.adam(0.1)),
    "stateless": dict(f=lambda updates, params: updates),
    "stateless_with_tree_map": dict(f=lambda update, param: 2 * update),
    "trace": dict(decay=0.9),
    "with_extra_args_support": dict(tx=optax.sgd(0.1)),
}

CANNOT = {
    "lookahead": "its params are a pair (fast, slow), and its fast optimizer gets no grad_fn; "
    "use the functional door on params.fast (tested below)",
    "dpsgd": "it takes one gradient per example, not their mean",
    "differentially_private_aggregate": "it takes one gradient per example, not their mean",
    "sam": "optax.contrib.sam is SAM itself, and its update takes no other extra arguments",
    "chain": "built by every test here",
    "named_chain": "built in a test below, since its arguments are pairs",
    "inject_hyperparams": "returns a factory; tested in test_contract",
    "inject_stateful_hyperparams": "deprecated name of inject_hyperparams",
    "measure_with_ema": "its output is a measurement, not an update",
    "scale_by_muon": "it takes matrices alone; muon, which runs here, splits them off",
    "optimistic_adam": "deprecated name of optimistic_adam_v2",
}


def found():
    for module in (optax, optax.contrib):
        for name, public in sorted(vars(module).items()):
            if inspect.isfunction(public) and not name.startswith("_"):
                returned = str(inspect.signature(public).return_annotation)
                if "GradientTransformation" in returned:
                    yield pytest.param(public, id=f"{module.__name__}.{name}")


def build(factory):
    parameters = inspect.signature(factory).parameters
    arguments = dict(ARGUMENTS.get(factory.__name__, {}))
    if "learning_rate" in parameters:
        arguments.setdefault("learning_rate", 0.1)
    return optax.with_extra_args_support(factory(**arguments))


PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 0.3]]), "b": jnp.array([0.5, 0.25])}
X = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]])


def loss_fn(params):
    return jnp.mean((jnp.tanh(X @ params["w"] + params["b"]) - 0.3) ** 2)


@jax.jit
def sharp_gradient(params, rho):
    grads = jax.grad(loss_fn)(params)
    e = jax.tree.map(lambda g: rho * g / optax.tree.norm(grads), grads)
    return jax.grad(loss_fn)(optax.apply_updates(params, e))


@pytest.mark.parametrize("factory", list(found()))
def test_every_optimizer_follows_sam(factory):
    """The chain makes the updates that the optimizer alone makes of SAM's gradients."""
    if factory.__name__ in CANNOT:
        assert len(CANNOT[factory.__name__]) > 10
        return
    optimizer = build(factory)
    tx = optax.chain(sam_optax.sam(0.1), optimizer)
    # Line searches need value_fn and refuse other functions, so SAM takes it as well.
    extra = {"value_fn": loss_fn} | ({"obj_fn": loss_fn} if factory.__name__ == "sophia" else {})

    @jax.jit
    def chained(params, state):
        grads = jax.grad(loss_fn)(params)
        return tx.update(grads, state, params, value=loss_fn(params), grad=grads, **extra)

    def alone(params, state):
        return optimizer.update(
            sharp_gradient(params, 0.1),
            state,
            params,
            value=loss_fn(params),
            grad=jax.grad(loss_fn)(params),
            **extra,
        )

    params, state, alone_state = PARAMS, tx.init(PARAMS), optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = chained(params, state)
        expected, alone_state = alone(params, alone_state)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), updates, expected
        )
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    assert chained._cache_size() <= 2  # line searches compile twice


def test_lookahead_through_the_functional_door():
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    sharp = sam_optax.grad(loss_fn, sam_optax.sam(0.1))
    params = optax.LookaheadParams.init_synced(PARAMS)
    state, fast = tx.init(params), PARAMS
    for _ in range(2):
        updates, state = tx.update(sharp(params.fast), state, params)
        params = optax.apply_updates(params, updates)
        fast = jax.tree.map(lambda w, g: w - 0.1 * g, fast, sharp_gradient(fast, 0.1))
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, fast)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), params.slow, halfway)


def test_named_chain():
    tx = optax.named_chain(("sam", sam_optax.sam(0.1)), ("sgd", optax.sgd(1.0)))
    updates, _ = tx.update(
        jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn)
    )
    expected = jax.tree.map(jnp.negative, sharp_gradient(PARAMS, 0.1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected)


def test_sam_inside_masked_with_a_gradient_function_that_fills_the_gaps():
    """optax.masked hides the other parameters from SAM, so grad_fn has to put them back."""
    tx = optax.masked(optax.chain(sam_optax.sam(0.1), optax.sgd(1.0)), {"w": True, "b": False})

    def grad_fn(masked):
        grads = jax.grad(loss_fn)({**masked, "b": PARAMS["b"]})
        return {**grads, "b": optax.MaskedNode()}

    grads = jax.grad(loss_fn)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
    moved = {**PARAMS, "w": PARAMS["w"] + 0.1 * grads["w"] / jnp.linalg.norm(grads["w"])}
    np.testing.assert_allclose(updates["w"], -jax.grad(loss_fn)(moved)["w"], rtol=1e-5)


def test_reduce_on_plateau_sees_the_value():
    tx = optax.chain(
        sam_optax.sam(0.1), optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    )
    state = tx.init(PARAMS)
    for _ in range(4):
        _, state = tx.update(
            jax.grad(loss_fn)(PARAMS), state, PARAMS, grad_fn=jax.grad(loss_fn), value=1.0
        )
    assert float(state[-1].scale) < 1.0


def test_clipping_after_sam_limits_the_update_and_before_it_changes_nothing():
    def updates(*links):
        tx = optax.chain(*links)
        return tx.update(
            jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn)
        )[0]

    clip = optax.clip_by_global_norm(1e-3)
    after = updates(sam_optax.sam(0.1), clip)
    np.testing.assert_allclose(optax.tree.norm(after), 1e-3, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        updates(clip, sam_optax.sam(0.1)),
        updates(sam_optax.sam(0.1)),
    )


def test_decay_in_the_chain_is_not_perturbed_and_in_the_loss_it_is():
    """L2 in the loss enters the ascent; add_decayed_weights after SAM does not."""
    tx = optax.chain(sam_optax.sam(0.1), optax.add_decayed_weights(0.5))
    decoupled, _ = tx.update(
        jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn)
    )
    by_hand = jax.tree.map(lambda g, w: g + 0.5 * w, sharp_gradient(PARAMS, 0.1), PARAMS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), decoupled, by_hand)
    in_loss = sam_optax.grad(
        lambda p: loss_fn(p) + 0.25 * optax.tree.norm(p, squared=True), sam_optax.sam(0.1)
    )(PARAMS)
    assert float(optax.tree.norm(optax.tree.sub(in_loss, by_hand))) > 1e-2
