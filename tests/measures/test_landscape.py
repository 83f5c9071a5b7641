"""Lines and planes against closed forms, bit by bit at the corners, and saved and loaded."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import pytest

from sam_optax import landscape

KEY = jax.random.key(0)


def network_loss(params, batch):
    return ref.loss(jnp, params, batch)


def quadratic():
    """Loss 1/2 w^T H w + g^T w of a tree, and H and g."""
    rng = np.random.default_rng(0)
    root, g = rng.normal(size=(6, 6)), rng.normal(size=6)
    H = root @ root.T / 6

    def loss_fn(params, batch):
        w = jnp.concatenate([params["a"].ravel(), params["b"].ravel()])
        return jnp.mean(batch) * (0.5 * w @ H @ w + g @ w)

    trees = [{"a": rng.normal(size=(2, 2)), "b": rng.normal(size=(2, 1))} for _ in range(3)]
    return loss_fn, trees, H, g


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def value(H, g, w):
    return 0.5 * w @ H @ w + g @ w


def fitted_polynomial(x, y, values):
    """Coefficients and residual of a full quadratic in x and y."""
    across, up = (a.ravel() for a in np.meshgrid(x, y))
    basis = np.stack([across**0, across, up, across**2, across * up, up**2], axis=1)
    coefficients, *_ = np.linalg.lstsq(basis, values.ravel(), rcond=None)
    return coefficients, np.abs(basis @ coefficients - values.ravel()).max()


def test_a_plane_through_solutions_of_a_quadratic_is_its_polynomial(x64):
    loss_fn, trees, H, g = quadratic()
    x, y = np.linspace(-1, 3, 5), np.linspace(-2, 2, 4)
    plane = landscape.plane_through(loss_fn, trees, np.ones(3), x=x, y=y)
    w = [flat(tree) for tree in trees]
    a = (w[1] - w[0]) / np.linalg.norm(w[1] - w[0])
    b = w[2] - w[0] - a * (a @ (w[2] - w[0]))
    b /= np.linalg.norm(b)
    expected = [[value(H, g, w[0] + s * a + t * b) for s in x] for t in y]
    np.testing.assert_allclose(plane.values, expected, rtol=1e-11)
    for point, solution in zip(plane.points, w, strict=True):
        np.testing.assert_allclose(w[0] + point[0] * a + point[1] * b, solution, atol=1e-12)
    assert plane.values.shape == (4, 5) and plane.kind == "solutions" and plane.cosine == 0


def test_a_random_plane_of_a_quadratic_is_a_polynomial_with_its_cosine(x64):
    loss_fn, (params, *_), _, _ = quadratic()
    plane = landscape.random_plane(loss_fn, params, np.ones(3), key=KEY, x=np.linspace(-2, 2, 9))
    coefficients, residual = fitted_polynomial(plane.x, plane.y, plane.values)
    assert residual < 1e-11
    np.testing.assert_allclose(coefficients[0], loss_fn(params, np.ones(3)), rtol=1e-11)
    # With H = 1 the coefficients are the inner products of the directions themselves.
    square = lambda params, batch: (
        jnp.mean(batch) * jnp.sum(jnp.concatenate([params["a"].ravel(), params["b"].ravel()]) ** 2)
    )
    flat_plane = landscape.random_plane(square, params, np.ones(3), key=KEY, x=plane.x)
    (_, _, _, dd1, d12, dd2), _ = fitted_polynomial(plane.x, plane.y, flat_plane.values)
    np.testing.assert_allclose(dd1, (flat(params) ** 2).sum(), rtol=1e-10)  # norms of the filters
    np.testing.assert_allclose(dd2, (flat(params) ** 2).sum(), rtol=1e-10)
    np.testing.assert_allclose(plane.cosine, d12 / 2 / np.sqrt(dd1 * dd2), rtol=1e-6)
    assert abs(plane.cosine) > 1e-3  # not orthogonalised


def test_centres_and_ends_are_the_losses_to_the_last_bit():
    params, batch = jax.tree.map(jnp.float32, ref.network(examples=37))
    other, _ = jax.tree.map(jnp.float32, ref.network(1))
    clean, end = (np.float64(jax.jit(network_loss)(w, batch)) for w in (params, other))
    odd = [-1.0, 0.0, 1.0]
    plane = landscape.random_plane(network_loss, params, batch, key=KEY, x=odd)
    rays = landscape.rays(network_loss, params, batch, key=KEY, distances=odd, directions=3)
    line = landscape.interpolate(network_loss, params, other, batch)
    assert plane.values[1, 1] == clean and (rays.values[:, 1] == clean).all()
    ends = [line.values[np.flatnonzero(line.positions == a)[0]] for a in (0, 1)]
    assert ends == [clean, end]
    assert len(line.positions) == 41 and (line.positions[0], line.positions[-1]) == (-0.5, 1.5)
    np.testing.assert_allclose(line.distance, np.linalg.norm(flat(other) - flat(params)), rtol=1e-6)
    assert plane.values[0, 0] != plane.values[2, 2]  # both sides of the centre are there


def test_filters_have_the_solution_s_norms_and_biases_stay(x64):
    params, batch = ref.network()
    seen = []

    def loss_fn(w, batch):
        jax.debug.callback(lambda w: seen.append(jax.tree.map(np.asarray, w)), w)
        return network_loss(w, batch)

    landscape.random_plane(loss_fn, params, batch, key=KEY, x=[1.0], y=[0.0])
    jax.effects_barrier()
    moved = jax.tree.map(lambda a, b: a - b, seen[-1], params)
    assert not moved["b1"].any() and not moved["b2"].any()
    for name in ("w1", "w2"):
        axes = tuple(range(params[name].ndim - 1))
        norms = [np.sqrt((x[name] ** 2).sum(axes)) for x in (moved, params)]
        np.testing.assert_allclose(*norms, rtol=1e-12)
        ratio = moved[name] / params[name]
        assert ratio.std() > 0.1 and (ratio < 0).any()  # Gaussian, not a scaled copy


def test_the_hook_chooses_filters_of_other_layouts(x64):
    params = {"embedding": np.diag([1.0, 2.0, 3.0])[:, :2] + 0.1, "bias": np.ones(2)}
    rows = lambda path, leaf: (1,) if path[-1].key == "embedding" else ()
    row = jnp.arange(3)
    norms = []
    for i in row:
        loss_fn = lambda w, x, i=i: jnp.sum(jnp.square(w["embedding"] - params["embedding"])[i])
        plane = landscape.random_plane(
            loss_fn, params, np.ones(1), key=KEY, x=[1.0], y=[0.0], filter_axes=rows
        )
        norms.append(plane.values[0, 0])
    np.testing.assert_allclose(norms, (params["embedding"] ** 2).sum(1), rtol=1e-12)
    # () makes every entry a filter of its own: it moves by its own size.
    loss_fn = lambda w, x: jnp.sum(jnp.square(w["bias"] - params["bias"]))
    plane = landscape.random_plane(
        loss_fn, params, np.ones(1), key=KEY, x=[1.0], y=[0.0], filter_axes=rows
    )
    np.testing.assert_allclose(plane.values, [[2.0]], rtol=1e-12)


def test_a_filter_normalised_plane_does_not_see_a_rescaled_layer(x64):
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(3, 5)), "w2": rng.normal(size=(5, 2))}
    data = (rng.normal(size=(20, 3)), rng.normal(size=(20, 2)))
    loss_fn = lambda w, b: jnp.mean((jnp.maximum(b[0] @ w["w1"], 0) @ w["w2"] - b[1]) ** 2)
    same = {"w1": 7 * params["w1"], "w2": params["w2"] / 7}
    planes = [
        landscape.random_plane(loss_fn, w, data, key=KEY, x=[-1, 0, 0.5]) for w in (params, same)
    ]
    np.testing.assert_allclose(planes[0].values, planes[1].values, rtol=1e-11)
    rays = [
        landscape.rays(loss_fn, w, data, key=KEY, distances=[1.0], directions=2)
        for w in (params, same)
    ]
    assert not np.allclose(rays[0].values, rays[1].values)


def test_rays_are_unit_shared_and_uniform(x64):
    params = {"a": np.ones((10, 10)), "b": np.ones(100), "n": np.arange(3)}
    rays = []
    for solution in (0.0, 5.0):
        start = {**params, "a": solution * params["a"]}
        loss_fn = lambda w, x, s=start: (
            jnp.mean(x)
            * (jnp.sum((w["a"] - s["a"])[0] ** 2) + 1000 * jnp.sum((w["b"] - s["b"]) ** 2))
        )
        rays.append(
            landscape.rays(loss_fn, start, np.ones(2), key=KEY, distances=[0, 2.0], directions=40)
        )
    np.testing.assert_allclose(rays[0].values, rays[1].values, rtol=1e-9)  # the same directions
    # A unit vector has half of its square in the 100 entries of b.
    assert abs(rays[0].values[:, 1].mean() / 4000 - 0.5) < 0.02
    assert rays[0].values[:, 1].std() > 0 and not rays[0].values[:, 0].any()
    masked = landscape.rays(
        lambda w, x: jnp.sum((w["b"] - 1) ** 2),
        params,
        np.ones(2),
        key=KEY,
        distances=[3.0],
        directions=2,
        mask={"a": False, "b": True, "n": True},
    )
    np.testing.assert_allclose(masked.values, 9, rtol=1e-12)
    assert masked.seed == (0, 0)


def test_unequal_batches_are_weighted_and_read_once_for_all_points(x64):
    params, (x, y) = ref.network(examples=17)
    other, _ = ref.network(1)
    reads = []

    class Loader:
        def __iter__(self):
            reads.append(None)
            return iter([(x[:10], y[:10]), (x[10:16], y[10:16]), (x[16:], y[16:])])

    whole = landscape.interpolate(network_loss, params, other, (x, y))
    streamed = landscape.interpolate(network_loss, params, other, Loader())
    np.testing.assert_allclose(streamed.values, whole.values, rtol=1e-13)
    assert len(reads) == 1 and streamed.examples == 17


def test_sharded_data_gives_the_same_plane():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batch = jax.tree.map(jnp.float32, ref.network(examples=16))
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P("batch")))
    planes = [
        landscape.random_plane(network_loss, params, data, key=KEY, x=[-1, 0, 1])
        for data in (batch, sharded)
    ]
    np.testing.assert_allclose(planes[0].values, planes[1].values, rtol=1e-5)


def test_the_trajectory_s_plane_is_its_principal_one(x64):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(7, 3)))
    t = np.linspace(0, np.pi, 9)
    coordinates = np.stack([4 - t, np.sin(t), 0.1 * rng.normal(size=9)], 1)
    coordinates -= coordinates[-1]
    path = [{"w": np.ones(7) + basis @ c} for c in coordinates]
    square = lambda w, x: jnp.mean(x) * jnp.sum(w["w"] ** 2)
    plane = landscape.trajectory_plane(square, path, np.ones(2))
    _, singular, vectors = np.linalg.svd(coordinates, full_matrices=False)
    np.testing.assert_allclose(plane.explained, singular[:2] ** 2 / (singular**2).sum(), rtol=1e-9)
    for i in range(2):
        projected = coordinates @ vectors[i]
        np.testing.assert_allclose(np.abs(plane.points[:, i]), np.abs(projected), atol=1e-9)
    np.testing.assert_allclose(plane.points[-1], 0, atol=1e-12)
    assert (plane.points[0] >= 0).all() and abs(plane.cosine) < 1e-9
    # The path is inside, with room around it.
    assert plane.x[0] < plane.points[:, 0].min() and plane.x[-1] > plane.points[:, 0].max()
    # A path that lies in the plane has the surface's own losses.
    inside = [{"w": np.ones(7) + basis[:, :2] @ c[:2]} for c in coordinates]
    plane = landscape.trajectory_plane(square, inside, np.ones(2))
    for point, w in zip(plane.points, inside, strict=True):
        at = landscape.trajectory_plane(square, inside, np.ones(2), x=point[:1], y=point[1:])
        np.testing.assert_allclose(at.values[0, 0], square(w, np.ones(2)), rtol=1e-11)


# BatchNorm


def normalised_loss(params, statistics, batch):
    return jnp.mean((params["w"] * (batch - statistics["mean"])) ** 2)


def test_batch_norm_statistics_are_frozen_interpolated_or_recomputed(x64):
    first, second = {"w": np.array(1.0)}, {"w": np.array(3.0)}
    statistics = ({"mean": np.array(10.0)}, {"mean": np.array(20.0)})
    x, a = np.array([9.0, 11.0]), [0.0, 0.5, 1.0]
    calls = []

    def recompute(params, statistics):
        calls.append((float(params["w"]), float(statistics["mean"])))
        return {"mean": 100 * params["w"]}

    means = {"frozen": [10, 10, 10], "interpolated": [10, 15, 20], "recomputed": [100, 200, 300]}
    for choice, mean in means.items():
        line = landscape.interpolate(
            normalised_loss,
            first,
            second,
            x,
            positions=a,
            statistics=statistics,
            batch_norm=choice,
            recompute=recompute if choice == "recomputed" else None,
        )
        w = np.array([1.0, 2.0, 3.0])
        expected = [np.mean((w[i] * (x - mean[i])) ** 2) for i in range(3)]
        np.testing.assert_allclose(line.values, expected)
        assert line.batch_norm == choice
    assert calls == [(1.0, 10.0), (2.0, 10.0), (3.0, 10.0)]
    # Around one solution, and on a ray.
    plane = landscape.random_plane(
        normalised_loss, first, x, key=KEY, x=[0.0, 1.0], statistics=statistics[0],
        filter_axes=lambda path, leaf: (), batch_norm="recomputed", recompute=recompute,
    )  # fmt: skip
    np.testing.assert_allclose(plane.values[0, 0], np.mean((x - 100) ** 2))
    rays = landscape.rays(
        normalised_loss, first, x, key=KEY, distances=[0.0], statistics=statistics[0]
    )
    np.testing.assert_allclose(rays.values, 1.0)


STATISTICS = [{"mean": np.array(10.0)}, {"mean": np.array(20.0)}, {"mean": np.array(30.0)}]


def through(several, loss_fn, data, statistics=None, **options):
    """`plane_through` or `interpolate`, at the solutions, of as many statistics as it takes."""
    solutions = [{"w": np.array(w)} for w in ([1.0, 0.0], [3.0, 0.0], [1.0, 2.0])]
    if statistics is not None:
        options["statistics"] = statistics[: 3 if several else 2]
    if several:
        return landscape.plane_through(loss_fn, solutions, data, x=[0, 2], y=[0], **options)
    return landscape.interpolate(loss_fn, *solutions[:2], data, positions=[0, 1], **options)


def shifted_loss(params, statistics, batch):
    return jnp.mean((jnp.sum(params["w"]) * (batch - statistics["mean"])) ** 2)


@pytest.mark.parametrize("several", [False, True], ids=["interpolate", "plane_through"])
def test_between_differing_statistics_there_is_no_default(x64, several):
    x = np.array([9.0, 11.0])
    with pytest.raises(
        ValueError, match=r"batch_norm must be given.*'recomputed'.*'interpolated'.*'frozen'.*None"
    ):
        through(several, shifted_loss, x, STATISTICS)
    # The second solution itself has a loss of its own, which "frozen" does not show.
    second = np.mean((3 * (x - 20)) ** 2)
    expected = {"frozen": np.mean((3 * (x - 10)) ** 2), "interpolated": second}
    for choice, value_there in expected.items():
        found = through(several, shifted_loss, x, STATISTICS, batch_norm=choice)
        np.testing.assert_allclose(found.values.ravel()[1], value_there, rtol=1e-12)
        assert found.batch_norm == choice
    found = through(
        several, shifted_loss, x, STATISTICS, batch_norm="recomputed",
        recompute=lambda params, old: {"mean": 10 * params["w"].sum()},
    )  # fmt: skip
    np.testing.assert_allclose(found.values.ravel()[1], np.mean((3 * (x - 30)) ** 2), rtol=1e-12)


@pytest.mark.parametrize("several", [False, True], ids=["interpolate", "plane_through"])
def test_statistics_that_are_alike_need_no_choice(x64, several):
    x = np.array([9.0, 11.0])
    for statistics in ([STATISTICS[0]] * 3, [{"mean": jnp.array(10.0)} for _ in range(3)]):
        found = through(several, shifted_loss, x, statistics)
        np.testing.assert_allclose(found.values.ravel(), [1.0, 9.0], rtol=1e-12)
        assert found.batch_norm == "frozen"
    without = through(several, lambda w, x: jnp.mean(x) * jnp.sum(w["w"]), x)
    assert without.batch_norm == "frozen"


@pytest.mark.parametrize("several", [False, True], ids=["interpolate", "plane_through"])
def test_statistics_are_one_tree_for_each_solution(several):
    for statistics, got in ((STATISTICS[:1], "list of 1"), ({"mean": 1.0}, "dict of 1")):
        call = landscape.plane_through if several else landscape.interpolate
        w = [np.array([1.0, 0.0]), np.array([3.0, 0.0]), np.array([1.0, 2.0])]
        solutions = (w,) if several else w[:2]
        with pytest.raises(ValueError, match=rf"sequence of {2 + several} trees.*got {got}"):
            call(shifted_loss, *solutions, np.ones(2), statistics=statistics)


def test_solutions_have_one_structure_and_shapes():
    """A leaf that broadcasts against the other solution's would be mixed without a word."""
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w["a"] ** 2)
    one, other = {"a": np.ones((2, 2))}, {"a": np.ones((1, 2))}
    alike = r"structure and shapes, got \(\"\['a'\]\", \(2, 2\)\) and \(\"\['a'\]\", \(1, 2\)\)"
    for call in (
        lambda: landscape.interpolate(loss_fn, one, other, np.ones(2)),
        lambda: landscape.plane_through(loss_fn, [one, one, other], np.ones(2)),
        lambda: landscape.trajectory_plane(loss_fn, [one, one, other], np.ones(2)),
    ):
        with pytest.raises(ValueError, match=alike):
            call()
    with pytest.raises(ValueError, match="no further leaf"):
        landscape.interpolate(loss_fn, one, {**one, "b": 1.0}, np.ones(2))


def test_solutions_in_a_dict_or_in_other_containers_say_so():
    loss_fn, w = lambda w, x: jnp.sum(w["a"]), {"a": np.ones(2)}
    with pytest.raises(ValueError, match=r"must be a list of three trees.*got dict of 3"):
        landscape.plane_through(loss_fn, dict.fromkeys("abc", w), np.ones(2))
    with pytest.raises(ValueError, match=r"must be a list of at least three.*got dict of 3"):
        landscape.trajectory_plane(loss_fn, dict.fromkeys("abc", w), np.ones(2))
    with pytest.raises(ValueError, match=r"differ in their containers.*nnx\.split"):
        landscape.interpolate(loss_fn, w, flax.core.freeze(w), np.ones(2))


def test_axes_are_lists_of_numbers():
    loss_fn, data, w = lambda w, x: jnp.sum(w), np.ones(2), np.array([[1.0], [0.0]])
    calls = {
        "x": lambda axis: landscape.random_plane(loss_fn, w, data, key=0, x=axis),
        "y": lambda axis: landscape.random_plane(loss_fn, w, data, key=0, y=axis),
        "distances": lambda axis: landscape.rays(loss_fn, w, data, key=0, distances=axis),
        "positions": lambda axis: landscape.interpolate(loss_fn, w, w, data, positions=axis),
    }
    for name, call in calls.items():
        for axis in (25, [], [[0.0, 1.0], [2.0, 3.0]]):
            with pytest.raises(ValueError, match=rf"{name} must be a list of numbers.*linspace"):
                call(axis)


def test_a_seed_is_its_key():
    params, batch = jax.tree.map(jnp.float32, ref.network())
    for call in (
        lambda key: landscape.rays(network_loss, params, batch, key=key, distances=[1.0]),
        lambda key: landscape.random_plane(network_loss, params, batch, key=key, x=[1.0]),
    ):
        np.testing.assert_array_equal(call(3).values, call(jax.random.key(3)).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "other"}, "batch_norm must be one of .*got 'other'"),
        ({"batch_norm": "interpolated"}, "statistics must be given.*got None"),
        ({"statistics": (1, 2), "batch_norm": "recomputed"}, "recompute must be given.*got None"),
        ({"recompute": lambda *a: a}, "recompute must be given .* nothing else"),
    ],
)
def test_a_choice_that_does_not_fit_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        landscape.interpolate(lambda w, x: 0.0, np.ones(1), np.ones(1), np.ones(2), **options)


def test_errors_name_the_argument_the_rule_and_the_value():
    loss_fn, data, w = lambda w, x: jnp.sum(w), np.ones(2), np.array([1.0, 0.0])
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        landscape.rays(loss_fn, w, data, key=KEY, distances=[0.0], directions=0)
    with pytest.raises(ValueError, match=r"three trees.*got list of 2"):
        landscape.plane_through(loss_fn, [w, 2 * w], data)
    with pytest.raises(ValueError, match=r"must not lie on one line.*height 0"):
        landscape.plane_through(loss_fn, [w, 2 * w, 3 * w], data)
    with pytest.raises(ValueError, match="at least three points, got list of 2"):
        landscape.trajectory_plane(loss_fn, [w, 2 * w], data)
    with pytest.raises(ValueError, match="must span a plane"):
        landscape.trajectory_plane(loss_fn, [w, 2 * w, 3 * w], data)
    for call in (
        lambda **o: landscape.rays(loss_fn, w, data, key=KEY, distances=[0.0], **o),
        lambda **o: landscape.random_plane(loss_fn, w, data, key=KEY, **o),
        lambda **o: landscape.trajectory_plane(loss_fn, [w, 2 * w, w[::-1]], data, **o),
    ):
        with pytest.raises(ValueError, match=r"batch_norm must be .* got 'interpolated'"):
            call(batch_norm="interpolated", statistics=0)


def test_results_come_back_from_disk(tmp_path):
    params, batch = jax.tree.map(jnp.float32, ref.network())
    other, third = (jax.tree.map(jnp.float32, ref.network(i)[0]) for i in (1, 2))
    results = [
        landscape.rays(network_loss, params, batch, key=KEY, distances=[0, 1], directions=2),
        landscape.interpolate(network_loss, params, other, batch, positions=[0.0, 1.0]),
        landscape.random_plane(network_loss, params, batch, key=KEY, x=[0, 1]),
        landscape.plane_through(network_loss, [params, other, third], batch, x=[0, 1], y=[0]),
    ]
    for result in results:
        result.save(tmp_path / "result")  # the name is kept as it is
        loaded = type(result).load(tmp_path / "result")
        for name, saved in vars(result).items():
            np.testing.assert_array_equal(getattr(loaded, name), saved)
            assert type(getattr(loaded, name)) is type(saved)
    with pytest.raises(ValueError, match="path must hold a Rays, got a Plane"):
        landscape.Rays.load(tmp_path / "result")
    with np.load(tmp_path / "result") as file:  # without this library
        assert file["values"].shape == (1, 2)


def test_the_second_call_traces_nothing():
    traces = []

    def loss_fn(params, batch):
        traces.append(None)
        return network_loss(params, batch)

    for seed in range(2):
        before = len(traces)
        params, batch = jax.tree.map(jnp.float32, ref.network(seed))
        key = jax.random.key(seed)
        landscape.rays(loss_fn, params, batch, key=key, distances=[0, 1], directions=2)
        landscape.random_plane(loss_fn, params, batch, key=key, x=[0, 1])
    assert before == len(traces) > 0
