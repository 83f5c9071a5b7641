"""Weighted data, the Gauss-Newton matrix, several m, masks by name, results saved and loaded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import landscape, sharpness
from sam_optax._measures import chart

KEY = jax.random.key(0)


def token_loss(params, batch):
    """A mean over the tokens that the mask leaves."""
    x, y, mask = batch
    logits = jnp.tanh(x @ params["w"]) @ params["v"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(mask * losses) / jnp.sum(mask)


def token_problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 5))}
    x, y = rng.normal(size=(8, 6, 3)), rng.integers(0, 5, (8, 6))
    mask = (rng.random((8, 6)) < np.linspace(0.1, 1, 8)[:, None]).astype(float)
    mask[:, 0] = 1  # a token in every example
    whole = (x, y, mask)
    return params, whole, [tuple(a[i : i + 2] for a in whole) for i in range(0, 8, 2)]


def tokens(batch):
    return batch[2].sum()


MEASURES = {
    "one step": functools.partial(sharpness.one_step, rho=0.3),
    "worst case": functools.partial(sharpness.worst_case, key=KEY, rho=0.3, steps=3),
    "average case": functools.partial(sharpness.average_case, key=KEY, rho=0.1, samples=3),
    "trace": functools.partial(sharpness.hessian_trace, key=KEY, probes=3),
}


@pytest.mark.parametrize("name", MEASURES)
def test_batches_weighted_by_tokens_are_the_whole(x64, name):
    params, whole, batches = token_problem()
    expected = MEASURES[name](token_loss, params, whole).value
    data = sharpness.weighted(batches, tokens)
    np.testing.assert_allclose(MEASURES[name](token_loss, params, data).value, expected, rtol=1e-9)
    by_examples = MEASURES[name](token_loss, params, batches).value
    assert abs(by_examples - expected) > 1e-3 * abs(expected)


def test_weighted_data_serve_eigenvalues_and_landscapes(x64):
    params, whole, batches = token_problem()
    data = sharpness.weighted(batches, tokens)
    found, expected = (
        sharpness.hessian_eigenvalues(token_loss, params, d, key=KEY, tolerance=1e-13)
        for d in (data, whole)
    )
    np.testing.assert_allclose(found.top, expected.top, rtol=1e-8)
    assert found.examples == expected.examples == 8
    found, expected = (
        landscape.rays(token_loss, params, d, key=KEY, distances=[0.0, 1.0], directions=2)
        for d in (data, whole)
    )
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    one = sharpness.one_step(token_loss, params, sharpness.weighted(whole, tokens))
    assert one.loss == sharpness.one_step(token_loss, params, whole).loss  # one batch, to the bit


def test_a_batch_of_padding_alone_counts_nothing():
    params, _, batches = token_problem()
    x, y, mask = batches[0]
    padded = [(x, y, 0 * mask), *batches]
    result = sharpness.one_step(token_loss, params, sharpness.weighted(padded, tokens))
    expected = sharpness.one_step(token_loss, params, sharpness.weighted(batches, tokens))
    assert result.value == expected.value
    groups = sharpness.m_sharpness(token_loss, params, sharpness.weighted(padded, tokens), m=2)
    assert groups.groups == 4
    with pytest.raises(ValueError, match="at least one batch in every pass, of a weight above 0"):
        sharpness.one_step(token_loss, params, sharpness.weighted(padded[:1], tokens))
    with pytest.raises(ValueError, match=r"finite number, at least 0, got -1\.0"):
        sharpness.one_step(token_loss, params, sharpness.weighted(batches, lambda batch: -1.0))


def test_m_sharpness_of_weighted_data_weighs_its_groups(x64):
    params, whole, batches = token_problem()
    data = sharpness.weighted(batches, tokens)
    found = sharpness.m_sharpness(token_loss, params, data, m=4, rho=0.2)
    halves = [tuple(a[i : i + 4] for a in whole) for i in (0, 4)]
    rises = [sharpness.one_step(token_loss, params, half, rho=0.2).value for half in halves]
    weights = [tokens(half) for half in halves]
    np.testing.assert_allclose(found.value, np.average(rises, weights=weights), rtol=1e-10)


def test_several_m_share_one_pass(x64):
    params, _, batches = token_problem()
    passes = []

    class Counted:
        def __iter__(self):
            passes.append(1)
            return iter(batches)

    found = sharpness.m_sharpness(token_loss, params, Counted(), m=(1, 3, 8), rho=0.2)
    assert len(passes) == 1 and list(found) == [1, 3, 8]
    for m, own in found.items():
        alone = sharpness.m_sharpness(token_loss, params, batches, m=m, rho=0.2)
        np.testing.assert_equal(vars(own), vars(alone))  # of one group the error is NaN
    assert found[3].left_out == 2 and found[8].groups == 1
    random = sharpness.m_sharpness(token_loss, params, batches, m=[2, 4], restarts=1, key=KEY)
    alone = sharpness.m_sharpness(token_loss, params, batches, m=4, restarts=1, key=KEY)
    assert random[4] == alone
    with pytest.raises(ValueError, match=r"at least one number of examples, got \[\]"):
        sharpness.m_sharpness(token_loss, params, batches, m=[])
    with pytest.raises(ValueError, match="m must be at most the number of examples, 8, got 9"):
        sharpness.m_sharpness(token_loss, params, batches, m=[2, 9])


def network_parts():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(17, 3))

    def model(params, batch):
        return jnp.tanh(batch[0] @ params["w"]) @ params["v"]

    def criterion(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = {"w": rng.normal(size=(3, 2)), "v": rng.normal(size=(2, 3))}
    return model, criterion, params, (x, rng.integers(0, 3, len(x)))


def test_the_gauss_newton_matrix_equals_the_dense_one(x64):
    operator = sam_optax.elementwise(normalize_bias=True)
    model, criterion, params, batch = network_parts()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    J = jax.jacobian(lambda w: model(unravel(w), batch).ravel())(flat)
    z = model(params, batch)
    H = jax.hessian(lambda z_: criterion(z_.reshape(z.shape), batch))(z.ravel())
    T = jax.flatten_util.ravel_pytree(operator(params))[0]
    G = np.asarray(J.T @ H @ J) * np.outer(T, T)
    expected = np.linalg.eigvalsh(G)
    loss_fn = sharpness.gauss_newton(model, criterion)
    batches = [tuple(a[:9] for a in batch), tuple(a[9:] for a in batch)]
    found = sharpness.hessian_eigenvalues(
        loss_fn, params, batches, key=KEY, tolerance=1e-13, normalization=operator
    )
    np.testing.assert_allclose(found.top, expected[::-1][:5], rtol=1e-8, atol=1e-12)
    assert found.bottom[0] > -1e-9
    place = chart.chart(params, operator)
    trace = sharpness.hessian_trace(
        loss_fn, params, batches, key=KEY, probes=2, normalization=operator
    )
    for i, probe in enumerate(trace.probes):
        v = chart.random(jax.random.fold_in(KEY, i), place, jax.random.rademacher)
        v = np.concatenate([np.ravel(part) for part in v])
        np.testing.assert_allclose(probe, v @ G @ v, rtol=1e-10)
    density = sharpness.spectral_density(
        loss_fn, params, batch, key=KEY, probes=1, steps=20, normalization=operator
    )
    np.testing.assert_allclose(density.nodes.max(), expected[-1], rtol=1e-6)
    whole = sharpness.hessian_eigenvalues(
        lambda p, b: loss_fn(p, b), params, batch, key=KEY, normalization=operator
    )
    assert abs(whole.top[0] - found.top[0]) > 1e-3
    assert loss_fn(params, batch) == criterion(model(params, batch), batch)


def test_a_name_mask_perturbs_what_it_names():
    params = {"body": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    for mask, moved in (
        (sam_optax.name_mask("^head/"), {"head/kernel", "head/bias"}),
        (sam_optax.name_mask("kernel$"), {"head/kernel", "body/kernel"}),
        (sam_optax.name_mask("kernel$", invert=True), {"head/bias"}),
    ):
        ascent = sam_optax.dual_ascent(0.5, mask=mask)
        e, _ = ascent.update(gradient, ascent.init(params), params)
        flat = jax.tree_util.tree_leaves_with_path(e)
        names = {"/".join(k.key for k in path) for path, leaf in flat if leaf.any()}
        assert names == moved
        np.testing.assert_allclose(optax.tree.norm(e), 0.5, rtol=1e-6)
    loss_fn = lambda w, x: jnp.sum(x) * sum(jnp.sum(a**2) for a in jax.tree.leaves(w))
    trace = sharpness.hessian_trace(
        loss_fn, params, jnp.ones(1), key=KEY, probes=1, mask=sam_optax.name_mask("body")
    )
    np.testing.assert_allclose(trace.value, 6.0)


def test_a_name_mask_that_matches_all_or_nothing_is_refused():
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match="got 'haed', which matches no name of a, b"):
        sam_optax.name_mask("haed")(params)
    with pytest.raises(ValueError, match="matches every name of a, b"):
        sam_optax.name_mask("", invert=True)(params)
    with pytest.raises(ValueError, match=r"regular expression, got '\('"):
        sam_optax.name_mask("(")


def test_results_are_saved_and_loaded(tmp_path):
    loss_fn = lambda w, x: jnp.mean(x @ w**2) / 2
    at = loss_fn, jnp.ones(4), jnp.array([[7.0, 5.0, 1.0, -3.0]])
    results = (
        sharpness.hessian_eigenvalues(*at, key=KEY),
        sharpness.hessian_trace(*at, key=KEY, probes=2),
        sharpness.spectral_density(*at, key=KEY, probes=2),
        sharpness.average_case(*at, key=KEY, samples=2),
        sharpness.m_sharpness(*at, m=1),
    )
    for result in results:
        result.save(tmp_path / "result")
        loaded = type(result).load(tmp_path / "result")
        for name, saved in vars(result).items():
            np.testing.assert_array_equal(getattr(loaded, name), saved)
            assert type(getattr(loaded, name)) is type(saved), name
    density = results[2]
    density.save(tmp_path / "density")
    again = sharpness.Density.load(tmp_path / "density")
    np.testing.assert_array_equal(again(again.grid()), density(density.grid()))
    with pytest.raises(ValueError, match="must hold a Trace, got a Density"):
        sharpness.Trace.load(tmp_path / "density")
