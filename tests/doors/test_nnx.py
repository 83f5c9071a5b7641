"""Flax NNX modules in jit-compiled training steps: both doors."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from public import WHOLE, build

import sam_optax
import sam_optax.nnx
from sam_optax import FAMILY

RHO = 0.3
X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jnp.sin(3 * X[:, 0])
P = PartitionSpec


def perturbed(params, grads):
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads)


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def pure(tree):
    """Values of an NNX state, keys of random streams as their data."""

    def value(x):
        x = x[...] if isinstance(x, nnx.Variable) else x
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(value, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.parametrize("jit", [True, False])
def test_nnx_follows_the_equation_and_advances_once(jit):
    model, reference = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    plain = nnx.Optimizer(reference, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    def step(model, optimizer):
        loss, grads = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(model, X, Y)
        optimizer.update(model, grads)
        return loss

    step = nnx.jit(step) if jit else step
    for _ in range(3):
        loss = step(model, optimizer)
        # By hand: two copies of the module, as it was, one moved by e.
        moved = nnx.clone(reference)
        clean_loss, g = nnx.value_and_grad(nnx_loss)(reference, X, Y)
        nnx.update(moved, perturbed(nnx.state(reference, nnx.Param), g))
        plain.update(reference, nnx.grad(nnx_loss)(moved, X, Y))
        assert_close(loss, clean_loss)
        assert_close(pure(nnx.state(model)), pure(nnx.state(reference)))


def test_nnx_options_aux_microbatches_and_perturbed_statistics():
    def loss_with_aux(model, x, y):
        return nnx_loss(model, x, y), {"mean": jnp.mean(x)}

    model = Module(nnx.Rngs(0))
    before = pure(nnx.state(model))
    sharp = sam_optax.nnx.value_and_grad(
        loss_with_aux, sam_optax.sam(RHO), has_aux=True, microbatch_size=8
    )
    (_, aux), grads = nnx.jit(lambda model: sharp(model, X, Y))(model)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-5)
    assert jax.tree.structure(pure(grads)) == jax.tree.structure(pure(nnx.state(model, nnx.Param)))
    after = pure(nnx.state(model))
    expected = 0.1 * np.mean(
        [pure_mean(Module(nnx.Rngs(0)), X[:8]), pure_mean(Module(nnx.Rngs(0)), X[8:])], axis=0
    )
    np.testing.assert_allclose(after["norm"]["mean"], expected, rtol=1e-4, atol=1e-6)
    assert after["dropout"]["rngs"]["count"] == before["dropout"]["rngs"]["count"] + 1

    clean, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(clean, X, Y)
    sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO), aux_from="perturbed")(other, X, Y)
    assert np.abs(clean.norm.mean[...] - other.norm.mean[...]).max() > 1e-4


def pure_mean(model, x):
    return np.asarray(jnp.mean(model.first(x), axis=0))


def test_nnx_optimizer_in_the_optax_door():
    """A stock nnx.Optimizer hands grad_fn on to the chain."""
    model, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    for module in (model, other):
        module.eval()  # no state moves
    tx = optax.chain(sam_optax.sam(RHO), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def grad_fn(params):
        return jax.grad(lambda params: nnx_loss(nnx.merge(graph, params, rest), X, Y))(params)

    optimizer.update(model, nnx.grad(nnx_loss)(model, X, Y), grad_fn=grad_fn)
    plain = nnx.Optimizer(other, optax.sgd(0.1), wrt=nnx.Param)
    _, grads = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(other, X, Y)
    plain.update(other, grads)
    assert_close(pure(nnx.state(model)), pure(nnx.state(other)))


# Objects among the arguments.


class Masked(nnx.Module):
    """Dropout from a stream that is an argument."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x, rngs):
        hidden = jnp.tanh(self.norm(self.first(x)))
        return self.last(self.dropout(hidden, rngs=rngs))[:, 0]


def masked_loss(model, batch, rngs):
    x, y = batch
    return jnp.mean((model(x, rngs) - y) ** 2)


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f], ids=["jit", "eager"])
def test_random_streams_as_an_argument_advance_once(jit):
    """The form of Flax's own examples: loss_fn(model, rngs, batch)."""
    model, rngs = Masked(nnx.Rngs(0)), nnx.Rngs(7)
    other, other_rngs = Masked(nnx.Rngs(0)), nnx.Rngs(7)
    step = jit(
        lambda model, rngs: sam_optax.nnx.grad(masked_loss, sam_optax.sam(RHO))(
            model, (X, Y), rngs=rngs
        )
    )
    for _ in range(2):
        grads = step(model, rngs)
        moved, same_rngs = nnx.clone(other), nnx.clone(other_rngs)
        g = nnx.grad(masked_loss)(other, (X, Y), other_rngs)
        nnx.update(moved, perturbed(nnx.state(other, nnx.Param), g))
        assert_close(pure(grads), pure(nnx.grad(masked_loss)(moved, (X, Y), same_rngs)))
        assert_close(pure(nnx.state((model, rngs))), pure(nnx.state((other, other_rngs))))
    assert rngs.default.count[...] == 2


def test_metrics_and_a_second_module_as_arguments():
    teacher, student = Module(nnx.Rngs(1)), Module(nnx.Rngs(0))
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))

    def loss_fn(student, teacher, metrics, x):
        loss = jnp.mean((student(x) - jax.lax.stop_gradient(teacher(x))) ** 2)
        metrics.update(loss=loss)
        return loss

    step = nnx.jit(lambda *args: sam_optax.nnx.value_and_grad(loss_fn)(*args)[0])
    losses = [float(step(student, teacher, metrics, X)) for _ in range(3)]
    np.testing.assert_allclose(metrics.compute()["loss"], np.mean(losses), rtol=1e-6)
    for module in (student, teacher):
        assert module.dropout.rngs.count[...] == 3
        assert np.abs(module.norm.mean[...]).max() > 1e-3


def test_what_objects_share_stays_shared():
    model, rngs = Masked(nnx.Rngs(0)), nnx.Rngs(3)
    model.stream = rngs.default  # the model holds the stream that is an argument as well
    nnx.jit(lambda model, rngs: sam_optax.nnx.grad(masked_loss)(model, (X, Y), rngs))(model, rngs)
    assert rngs.default.count[...] == 1 and model.stream.count[...] == 1


@pytest.mark.parametrize("argnums", [1, (0, 1), (nnx.DiffState(0, nnx.PathContains("kernel")), 1)])
def test_argnums_as_in_nnx(argnums):
    """One perturbation of length rho over all that is differentiated."""
    first, second = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))

    def loss_fn(first, second, x):
        return jnp.mean(second(jnp.tanh(first(x))) ** 2)

    loss, grads = sam_optax.nnx.value_and_grad(loss_fn, sam_optax.sam(RHO), argnums=argnums)(
        first, second, X
    )
    clean_loss, g = nnx.value_and_grad(loss_fn, argnums=argnums)(first, second, X)
    norm = optax.tree.norm(pure(g))
    moved = [nnx.clone(first), nnx.clone(second)]
    positions = [0, 1] if isinstance(argnums, tuple) else [1]
    for position, part in zip(positions, g if isinstance(argnums, tuple) else [g], strict=True):
        own = nnx.state(moved[position], nnx.OfType(nnx.Param))
        if isinstance(argnums, tuple) and not isinstance(argnums[position], int):
            own = nnx.state(moved[position], argnums[position].filter)
        nnx.update(moved[position], jax.tree.map(lambda w, g: w + RHO * g / norm, own, part))
    assert_close(loss, clean_loss)
    assert jax.tree.structure(grads) == jax.tree.structure(g)
    assert_close(pure(grads), pure(nnx.grad(loss_fn, argnums=argnums)(*moved, X)))


def test_arrays_may_be_differentiated():
    model, shift = nnx.Linear(6, 1, rngs=nnx.Rngs(0)), jnp.ones(6)
    loss_fn = lambda model, shift, x: jnp.mean(model(x + shift) ** 2)
    g = nnx.grad(loss_fn, argnums=1)(model, shift, X)
    moved = shift + RHO * g / jnp.linalg.norm(g)
    expected = nnx.grad(loss_fn, argnums=1)(model, moved, X)
    assert_close(
        sam_optax.nnx.grad(loss_fn, sam_optax.sam(RHO), argnums=1)(model, shift, X), expected
    )


# Groups of examples.


def loop_over_groups(model, groups):
    """Each group from the state of before, its keys folded with its index; then means."""
    outs, states = [], []
    for index in range(groups):
        own = nnx.clone(model)
        key = own.dropout.rngs.key
        own.dropout.rngs.key[...] = jax.random.fold_in(key[...], index)
        rows = slice(index * len(X) // groups, (index + 1) * len(X) // groups)
        outs.append(
            sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(own, X[rows], Y[rows])
        )
        states.append(nnx.state(own, nnx.BatchStat))
    mean = lambda *xs: sum(xs) / groups
    return jax.tree.map(mean, *outs), jax.tree.map(mean, *states)


@pytest.mark.parametrize("options", [{}, {"vectorize": 2}, {"unroll": True}], ids=str)
def test_micro_batches_draw_masks_of_their_own(options):
    model, before = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    sharp = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO), microbatch_size=4, **options)
    out = nnx.jit(sharp)(model, X, Y)
    expected, stats = loop_over_groups(before, 4)
    assert_close(out, expected)
    assert_close(pure(nnx.state(model, nnx.BatchStat)), pure(stats))
    # The key stays what it was, and its count advances once.
    rngs, old = model.dropout.rngs, before.dropout.rngs
    assert rngs.key[...] == old.key[...] and rngs.count[...] == old.count[...] + 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_draw_masks_of_their_own(check_vma):
    model, before = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    graph, state = nnx.split(model)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def step(state, x, y):
        model = nnx.merge(graph, state)
        sharp = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO), axis_name=["batch"])
        loss, grads = sharp(model, x, y)
        return loss, grads, nnx.state(model)

    loss, grads, state = step(state, X, Y)
    nnx.update(model, state)
    expected, stats = loop_over_groups(before, 4)
    assert_close((loss, grads), expected, atol=2e-5)  # a bias before BatchNorm: rounding alone
    assert_close(pure(nnx.state(model, nnx.BatchStat)), pure(stats))
    assert model.dropout.rngs.key[...] == before.dropout.rngs.key[...]


def test_aux_over_micro_batches():
    def loss_fn(model, x, y):
        out = model(x)
        right = jnp.sum(jnp.sign(out) == jnp.sign(y))
        return jnp.mean((out - y) ** 2), (right, {"mean": jnp.mean(x)})

    options = {"has_aux": True, "microbatch_size": 4}
    model = Module(nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"aux must be floating.*int32 at aux\[0\]"):
        sam_optax.nnx.value_and_grad(loss_fn, **options)(model, X, Y)
    sharp = sam_optax.nnx.value_and_grad(loss_fn, **options, average_aux=(False, True))
    (_, (right, aux)), _ = nnx.jit(sharp)(model, X, Y)
    assert right.shape == (4,) and aux["mean"].shape == ()
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-5)


# The second door.

STATEFUL = [
    name
    for name in WHOLE
    if jax.tree.leaves(optax.with_extra_args_support(build(name)).init({"w": jnp.ones(2)}))
]


def test_there_are_stateful_methods():
    assert {"look_sam", "vasso", "momentum_sam", "eigen_sam", "sampa", "bsam"} <= set(STATEFUL)


def arrays(state):
    """The state without variables, as nnx.Optimizer gives it to Optax."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda x: x[...], state, is_leaf=is_variable)


def save(path, *objects):
    """Plain arrays in a file."""
    leaves = jax.tree.leaves(pure(nnx.state(objects)))
    np.savez(path, *leaves)


def restore(path, *objects):
    leaves, treedef = jax.tree.flatten(nnx.state(objects))
    with np.load(path) as saved:
        arrays = [jnp.asarray(saved[name]) for name in saved.files]
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    keyed = [
        jax.random.wrap_key_data(new) if is_key(old) else new
        for new, old in zip(arrays, leaves, strict=True)
    ]
    nnx.update(objects, jax.tree.unflatten(treedef, keyed))


def chained(name):
    is_optimizer = name in FAMILY and FAMILY[name].kind == "optimizer"
    return build(name) if is_optimizer else optax.chain(build(name), optax.sgd(0.1))


@pytest.mark.parametrize("name", STATEFUL)
def test_methods_with_memory_train_modules_with_batch_norm_and_dropout(name, tmp_path):
    """As by hand on pure trees; saved, restored into new objects, and resumed."""
    tx = chained(name)

    @nnx.jit
    def step(model, optimizer):
        value, grads, grad_fn = sam_optax.nnx.value_and_grad_fn(nnx_loss)(model, X, Y)
        more = {"previous_grad_fn": grad_fn} if name == "sampa" else {}
        optimizer.update(model, grads, grad_fn=grad_fn, **more)
        return value

    def new():
        model = Module(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = new()
    other = Module(nnx.Rngs(0))
    params = arrays(nnx.state(other, nnx.Param))
    state = tx.init(params)
    for i in range(3):
        value = step(model, optimizer)
        # By hand: every pass on a copy of the module as it was before the step.
        graph, _, rest = nnx.split(other, nnx.Param, ...)

        def loss(params, graph=graph, rest=rest):
            module = nnx.merge(graph, params, jax.tree.map(jnp.copy, rest))
            return nnx_loss(module, X, Y), nnx.split(module, nnx.Param, ...)[2]

        (clean, new_rest), g = jax.value_and_grad(loss, has_aux=True)(params)
        grad_fn = lambda params: jax.grad(loss, has_aux=True)(params)[0]
        more = {"previous_grad_fn": grad_fn} if name == "sampa" else {}
        updates, state = tx.update(g, state, params, grad_fn=grad_fn, **more)
        params = optax.apply_updates(params, updates)
        nnx.update(other, params, new_rest)
        assert_close(value, clean, rtol=1e-4)
        assert_close(pure(nnx.state(model)), pure(nnx.state(other)), rtol=1e-3, atol=1e-4)
        if i == 1:
            save(tmp_path / "saved.npz", model, optimizer)
    resumed = new()
    restore(tmp_path / "saved.npz", *resumed)
    step(*resumed)
    jax.tree.map(np.testing.assert_array_equal, pure(nnx.state(resumed[0])), pure(nnx.state(model)))


@pytest.mark.parametrize("jit", [True, False])
def test_later_passes_start_from_the_state_before_the_step(jit):
    """Also outside of jit, and where another dtype has the loss traced again."""
    model, before = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    def gradients(model):
        _, grads, grad_fn = sam_optax.nnx.value_and_grad_fn(nnx_loss)(model, X, Y)
        params = nnx.state(model, nnx.Param)
        return grads, grad_fn(params), grad_fn(half(params))

    grads, again, halved = (nnx.jit(gradients) if jit else gradients)(model)
    assert_close(pure(grads), pure(nnx.grad(nnx_loss)(before, X, Y)))
    assert_close(pure(again), pure(grads))
    assert_close(pure(jax.tree.map(jnp.float32, halved)), pure(grads), rtol=0.1, atol=0.1)


# Training steps in the form of Flax's own examples.


def nnx_sam_by_hand(loss, steps, *objects):
    """Plain SAM by SGD of the first object, on copies; the values of the clean passes."""
    model, *others = objects
    optimizer, values = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), []
    for _ in range(steps):
        moved, *same = (nnx.clone(x) for x in (model, *others))
        value, g = nnx.value_and_grad(loss, has_aux=True)(model, *others)
        nnx.update(moved, perturbed(nnx.state(model, nnx.Param), g))
        optimizer.update(model, nnx.grad(loss, has_aux=True)(moved, *same)[0])
        values.append(value)
    return values


LABELS = jnp.arange(16) % 2


def classify(model, batch, rngs):
    logits = jnp.stack([model(batch["x"], rngs), jnp.zeros(16)], axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


@pytest.mark.parametrize("door", [1, 2])
def test_metrics_after_the_call_and_views_for_evaluation(door):
    method, sgd = sam_optax.sam(RHO), optax.sgd(0.1)
    model, rngs, batch = Masked(nnx.Rngs(0)), nnx.Rngs(7), {"x": X, "label": LABELS}
    tx = sgd if door == 1 else optax.chain(method, sgd)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    training = nnx.view(model, deterministic=False, use_running_average=False)
    evaluation = nnx.view(model, deterministic=True, use_running_average=True)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        if door == 1:
            evaluate = sam_optax.nnx.value_and_grad(classify, method, has_aux=True)
            (loss, logits), grads = evaluate(model, batch, rngs)
            optimizer.update(model, grads)
        else:
            evaluate = sam_optax.nnx.value_and_grad_fn(classify, has_aux=True)
            (loss, logits), grads, grad_fn = evaluate(model, batch, rngs)
            optimizer.update(model, grads, grad_fn=grad_fn)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    for _ in range(3):
        train_step(training, optimizer, metrics, rngs, batch)
    other, other_rngs = Masked(nnx.Rngs(0)), nnx.Rngs(7)
    loss_fn = lambda model, rngs: classify(model, batch, rngs)
    values = nnx_sam_by_hand(loss_fn, 3, other, other_rngs)
    assert_close(pure(nnx.state((model, rngs))), pure(nnx.state((other, other_rngs))), 1e-4, 1e-5)
    right = [np.argmax(logits, axis=1) == LABELS for _, logits in values]
    assert_close(
        metrics.compute(), {"accuracy": np.mean(right), "loss": np.mean([v[0] for v in values])}
    )
    other.eval()
    assert_close(evaluation(X, None), other(X, None), 1e-4, 1e-5)


class Sowing(Masked):
    def __call__(self, x, rngs):
        self.sow(nnx.Intermediate, "mean", jnp.mean(x, axis=0))
        return super().__call__(x, rngs)


# Before 0.12.8 Flax's own steps fail in its tree mode.
GRAPH_MODES = (
    [True, False] if tuple(map(int, flax.__version__.split(".")[:3])) >= (0, 12, 8) else [True]
)


@pytest.mark.parametrize("graph_mode", GRAPH_MODES)
@pytest.mark.parametrize("pure_params", [True, False])
@pytest.mark.parametrize("door", [1, 2])
def test_forked_streams_captured_intermediates_and_pure_params(door, pure_params, graph_mode):
    """The loss closes over the batch and gets a module, or the state of its parameters."""

    def step(model, optimizer, rngs):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(given, rngs):
            if pure_params:
                given = nnx.merge(graph, given, rest)
            out, captured = nnx.capture(given, nnx.Intermediate)(X, rngs)
            return jnp.mean((out - Y) ** 2), (out, captured)

        given = params if pure_params else model
        if door == 1:
            evaluate = sam_optax.nnx.value_and_grad(loss_fn, sam_optax.sam(RHO), has_aux=True)
            value, grads = evaluate(given, rngs.fork())
            optimizer.update(model, grads)
        else:
            evaluate = sam_optax.nnx.value_and_grad_fn(loss_fn, has_aux=True)
            value, grads, grad_fn = evaluate(given, rngs.fork())
            optimizer.update(model, grads, grad_fn=grad_fn)
        return value

    flax.config.update("nnx_graph_mode", graph_mode)
    try:
        model, rngs = Sowing(nnx.Rngs(0)), nnx.Rngs(7)
        model.norm.use_running_average = pure_params  # pure parameters do not bring statistics back
        tx = optax.sgd(0.1) if door == 1 else optax.chain(sam_optax.sam(RHO), optax.sgd(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        jitted = nnx.jit(step)
        values = [jitted(model, optimizer, rngs) for _ in range(2)]
    finally:
        flax.config.update("nnx_graph_mode", True)
    other, other_rngs = Masked(nnx.Rngs(0)), nnx.Rngs(7)
    other.norm.use_running_average = pure_params
    loss_fn = lambda model, rngs: (masked_loss(model, (X, Y), rngs), None)
    for value in values:
        ((clean, _),) = nnx_sam_by_hand(loss_fn, 1, other, other_rngs.fork())
        assert_close(value[0], clean, 1e-4)
        assert_close(jax.tree.leaves(value[1][1]), [jnp.mean(X, axis=0)])
    assert_close(pure(nnx.state(model)), pure(nnx.state(other)), 1e-4, 1e-5)


def test_an_optimizer_of_another_filter_is_refused():
    model = Module(nnx.Rngs(0))
    kernels = nnx.PathContains("kernel")
    optimizer = nnx.Optimizer(model, chained("look_sam"), wrt=kernels)
    _, grads, grad_fn = sam_optax.nnx.value_and_grad_fn(nnx_loss)(model, X, Y)
    with pytest.raises(ValueError, match=r"wrt.*6 arrays, got 2"):
        optimizer.update(model, nnx.state(grads, kernels), grad_fn=grad_fn)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_second_door_over_devices(check_vma):
    """A pmean link after the method: m-sharpness, one mask for each device."""
    model, before = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    tx = optax.chain(sam_optax.sam(RHO), sam_optax.pmean("batch"))
    graph, state = nnx.split(model)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def step(state, x, y):
        model = nnx.merge(graph, state)
        evaluate = sam_optax.nnx.value_and_grad_fn(nnx_loss, axis_name="batch")
        value, grads, grad_fn = evaluate(model, x, y)
        params = nnx.state(model, nnx.Param)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        return value, updates, nnx.state(model, nnx.BatchStat)

    value, updates, stats = step(state, X, Y)
    expected, expected_stats = loop_over_groups(before, 4)
    assert_close((value, updates), expected, atol=2e-5)
    assert_close(pure(stats), pure(expected_stats))


# Errors.


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: sam_optax.nnx.value_and_grad(nnx_loss, microbatchsize=4),
            TypeError,
            r"options must be among.*got \['microbatchsize'\]",
        ),
        (
            lambda: sam_optax.nnx.value_and_grad_fn(nnx_loss, aux_from="clean"),
            TypeError,
            r"options must be among.*got \['aux_from'\]",
        ),
        (
            lambda: sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam),
            TypeError,
            r"transform must be a GradientTransformation: call sam\(\)",
        ),
        (lambda: sam_optax.nnx.grad(nnx_loss, aux_from="both"), ValueError, "aux_from must be"),
        (
            lambda: sam_optax.nnx.grad(nnx_loss, argnums=3)(Module(nnx.Rngs(0)), X, Y),
            ValueError,
            "argnums must be positions .* 0 to 2, got 3",
        ),
        (
            lambda: sam_optax.nnx.grad(lambda m, metric, x: 0.0, microbatch_size=4)(
                Module(nnx.Rngs(0)), nnx.metrics.Accuracy(), X
            ),
            ValueError,
            "metrics must be updated after the call .* got Accuracy",
        ),
        (
            lambda: sam_optax.nnx.grad(lambda m, x: (m(x).mean(), x))(Module(nnx.Rngs(0)), X),
            TypeError,
            "has_aux must be True",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
