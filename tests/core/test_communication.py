"""What steps move between devices, counted in compiled programs, and the page that says so."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from jax.sharding import NamedSharding

import sam_optax

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "meshes.md"
# Layout and method: volumes all-reduced, gathered, exchanged, and those between hosts.
MOVES = {
    ("data parallel", "SGD"): (1, 0, 0, 1),
    ("data parallel", "shared"): (2, 0, 0, 2),
    ("data parallel", "device"): (1, 0, 0, 1),
    ("data parallel", "group"): (2, 0, 0, 1),
    ("FSDP", "SGD"): (1, 1, 0, 2),
    ("FSDP", "shared"): (2, 2, 0, 4),
    ("FSDP", "device"): (1, 1, 0, 2),
    ("FSDP", "group"): (2.25, 2.25, 0.25, 0.75),
    ("HSDP", "SGD"): (1.25, 1, 0, 0.25),
    ("HSDP", "shared"): (2.5, 2, 0, 0.5),
    ("HSDP", "device"): (1, 1, 0, 1),
    ("HSDP", "group"): (2.25, 2, 0, 0.25),
}
GROUPS = {"SGD": 1, "shared": 1, "device": 8, "group": 2}


@pytest.fixture
def communication(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return __import__("communication")


@pytest.fixture
def committed(communication):
    return json.loads(communication.RESULTS.read_text())


def loop_over_groups(c, params, batch, method):
    """The definition: each group perturbs along its own gradient; then one mean."""
    transform = optax.identity() if method == "SGD" else sam_optax.sam(c.RHO)
    plain = jax.jit(sam_optax.value_and_grad(c.loss_fn, transform))
    outs = [
        plain(params, x, y)
        for x, y in zip(*(np.split(part, GROUPS[method]) for part in batch), strict=True)
    ]
    loss, grads = jax.tree.map(lambda *leaves: sum(leaves) / len(outs), *outs)
    return jax.tree.map(lambda w, g: w - c.LEARNING_RATE * g, params, grads), loss


@functools.cache
def temporary_of_sgd(c, layout):
    return c.count(c.compiled("SGD", layout, c.make_mesh()))["temporary MB"]


@pytest.mark.parametrize("layout, method", MOVES, ids=str)
@pytest.mark.usefixtures("optimised")
def test_what_a_step_moves_holds_and_computes(communication, committed, layout, method):
    c, mesh = communication, communication.make_mesh()
    program = c.compiled(method, layout, mesh)
    row = c.count(program)
    kinds = ("reduced", "gathered", "exchanged", "between hosts")
    # Beside these only scalars move: losses and norms.
    np.testing.assert_allclose([row[k] for k in kinds], MOVES[layout, method], atol=1e-3)
    (stored,) = (
        r for r in committed["volumes"]["rows"] if (r["layout"], r["method"]) == (layout, method)
    )
    np.testing.assert_allclose([stored[k] for k in kinds], MOVES[layout, method], atol=1e-3)
    copy = 4e-6 * c.LAYERS * c.WIDTH**2
    # JAX 0.12 holds a layer more than a copy for the shared perturbation.
    assert row["temporary MB"] <= temporary_of_sgd(c, layout) + copy * (1 + 1.1 / c.LAYERS)

    params, batch = jax.device_get((c.new_params(), c.new_batch()))
    expected = loop_over_groups(c, params, batch, method)
    cut = NamedSharding(mesh, c.LAYOUTS[layout])
    split = NamedSharding(mesh, c.P(c.EVERYWHERE))
    out = program(jax.device_put(params, cut), *jax.device_put(batch, split))
    steps = [
        jax.tree.map(lambda a, b: (a - b) / c.LEARNING_RATE, o, params) for o, _ in (out, expected)
    ]
    assert_close(jax.device_get(steps[0]), steps[1], rtol=1e-3, atol=2e-4)
    assert_close(out[1], expected[1])


def test_targets():
    """Own perturbations move what SGD moves, a shared one twice that."""
    moves = {key: np.array(value) for key, value in MOVES.items()}
    for layout in ("data parallel", "FSDP", "HSDP"):
        np.testing.assert_array_equal(moves[layout, "shared"], 2 * moves[layout, "SGD"])
    for layout in ("data parallel", "FSDP"):
        np.testing.assert_array_equal(moves[layout, "device"], moves[layout, "SGD"])
    for layout in ("data parallel", "HSDP"):
        assert moves[layout, "group"][-1] == moves[layout, "SGD"][-1]  # between hosts


def test_all_routes_of_a_perturbation_give_the_same_step(communication):
    found = {}
    for name, (step, params, batch) in communication.ready().items():
        params, loss = step(params, *batch)
        if name.endswith("pmap"):
            params, loss = jax.tree.map(lambda x: x[0], (params, loss))
        found.setdefault(name.split(":")[0], []).append(jax.device_get((params, loss)))
    assert {name: len(outs) for name, outs in found.items()} == {"SGD": 1, "shared": 2, "device": 5}
    for first, *others in found.values():
        for other in others:
            assert_close(other, first, rtol=1e-5, atol=2e-8)
    largest = lambda a, b: max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))
    assert largest(found["shared"][0][0], found["device"][0][0]) > 2e-7


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,4},{1,5}}, use", [[0, 4], [1, 5]]),
        ("replica_groups=[2,4]<=[8], use", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[2,4], use", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, use", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, use",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_devices_are_read_as_xla_writes_them(communication, text, groups):
    assert communication.replica_groups(text) == groups


def test_unknown_groups_are_not_guessed(communication):
    with pytest.raises(ValueError, match="must be written in a known way"):
        communication.replica_groups("replica_groups=mesh['a'=8] {'a':(1)2}")


def test_the_page_quotes_the_results(communication, committed):
    page = PAGE.read_text()
    assert communication.filled(page, committed) == page
    for name, text in communication.blocks(committed).items():
        assert communication.block(name, text) in page


def test_the_page_on_growth_quotes_the_model(monkeypatch, communication, committed):
    interconnect = __import__("interconnect")
    rows = committed["volumes"]["rows"]
    found = interconnect.simulate(rows, interconnect.Work(), interconnect.Machine())
    page = (ROOT / "docs" / "growth.md").read_text()
    assert communication.block("growth", interconnect.table(found)) in page
    for row in found:
        assert row["shared"] == pytest.approx(2 * row["SGD"], rel=0.01)
        assert row["SGD"] < row["group"] <= row["shared"] * 1.0001
    # Without overlap, on hosts of one device: one ring, whose terms are those of the formula.
    machine = interconnect.Machine(devices=1, latency_between=1e-6, bandwidth_between=1e9)
    work = interconnect.Work(parameters=1e6, gradient=0.0)
    seconds = interconnect.step_time(rows, "data parallel", "SGD", 64, work, machine)
    ring = 63e-6 + 63 / 64 * 4e6 / 1e9
    assert seconds == pytest.approx(2 * ring, rel=1e-3)
    assert interconnect.one_way(64, 8.0, 1e-6, 1e9) == pytest.approx(6e-6, rel=0.01)  # a tree


def test_a_jitted_step_changes_in_two_lines():
    diff = re.search(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].splitlines()
    assert sum(line.startswith("+") for line in diff) == 2
    before, after = (
        "\n".join(line[1:] for line in diff if not line.startswith(sign)) for sign in "+-"
    )
    losses = [trained(text) for text in (before, after)]
    assert losses[0] != losses[1] and losses[1] < 0.5


def trained(text):
    """The loss of a model after some steps of the code, as it stands on the page."""
    from flax import nnx

    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    names = {"jax": jax, "nnx": nnx, "loss_fn": loss_fn}
    exec(text, names)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    x = jnp.tile(jnp.eye(2), (8, 1))
    for _ in range(5):
        loss = names["train_step"](model, optimizer, x, x[:, :1] + 1)
    return float(loss)
