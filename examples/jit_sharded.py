"""SAM in one jitted step over a mesh: a transformer, data parallel, FSDP and HSDP, in Flax NNX.

    python examples/jit_sharded.py                   # all three, on all devices or 8 of the CPU
    python examples/jit_sharded.py --layout hsdp     # one of data, fsdp, hsdp
    python examples/jit_sharded.py --quick           # two short epochs of one method, for CI

No shard_map: the step is an ordinary jitted one, and JAX places it. Against plain SGD two lines
change, the import and the call of value_and_grad. The mesh has an outer and an inner axis. Data
parallel, every device holds all parameters; FSDP cuts them over all devices, and gathers them for
a perturbation of each device's own; HSDP cuts them over the inner axis, and each row of the mesh is
a group with a perturbation of its own. Printed are what a step of each moves between devices, how
far one step is from a plain Python loop over the groups, and what becomes of a checkpoint that is
taken up again on another mesh. One run a method shows that all train, not which is better: for
that see label_noise.py.
"""

import argparse
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import _digits
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax.nnx

BATCH = 128  # examples a step, over all devices
EPOCHS = 12
LEARNING_RATE = 0.1
MOMENTUM = 0.9
RHO = 0.05  # length of SAM's ascent step, in units of the parameters
WIDTH, HEADS, BLOCKS = 64, 4, 2  # of the transformer; tokens are the 8 rows of an image
AXES = ("outer", "inner")
LAYOUTS = {"data": (), "fsdp": AXES, "hsdp": ("inner",)}  # axes that parameters are cut over
METHODS = ("SGD", "SAM, shared", "SAM, own")


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.out(nnx.gelu(self.hidden(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (8, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x[..., 0]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def loss_fn(model: Transformer, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def new_training() -> tuple[Transformer, nnx.Optimizer]:
    model = Transformer(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(LEARNING_RATE, MOMENTUM), wrt=nnx.Param)


def make_mesh(devices: int) -> Mesh:
    if devices % 2:
        raise SystemExit(f"devices must be even in number, two rows of a mesh, got {devices}")
    return jax.make_mesh(
        (2, devices // 2), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )


def placement(tree: Any, layout: str, mesh: Mesh) -> Any:
    """Every array is cut along its first axis that the devices divide, if it has one."""
    axes = LAYOUTS[layout]
    shards = int(np.prod([mesh.shape[name] for name in axes]))

    def of_array(x: Any) -> NamedSharding:
        place = next((n for n, size in enumerate(x.shape) if size % shards == 0), None)
        spec = P() if place is None or not axes else P(*[None] * place, axes)
        return NamedSharding(mesh, spec)

    return jax.tree.map(of_array, tree)


def groups_of(layout: str) -> Any:
    """The axes along which each device, or row of devices, has a perturbation of its own."""
    return "outer" if layout == "hsdp" else AXES


def value_and_grad(name: str, layout: str, mesh: Mesh, groups: Any):
    """(model, x, y) -> loss and gradient: the line that differs from SGD."""
    if name == "SGD":
        return nnx.value_and_grad(loss_fn)
    method = sam_optax.sam(RHO)
    if name == "SAM, shared":
        return sam_optax.nnx.value_and_grad(loss_fn, method)
    sharp = sam_optax.nnx.value_and_grad(loss_fn, method, axis_name=groups, mesh=mesh)
    return of_whole(sharp, mesh) if layout == "fsdp" else sharp


def of_whole(sharp: Any, mesh: Mesh):
    """A perturbation of a device's own is as large as all parameters: they are gathered for it."""

    def value_and_grad(model, x, y):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        whole = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
        return sharp(nnx.merge(graph, whole, rest), x, y)

    return value_and_grad


@functools.cache
def make_step(name: str, layout: str, mesh: Mesh, groups: Any):
    """The compiled step(state, x, y), which gives state and loss; state is model and optimizer."""
    graph, state = nnx.split(nnx.eval_shape(new_training))
    gradient, placed = value_and_grad(name, layout, mesh, groups), placement(state, layout, mesh)
    split = NamedSharding(mesh, P(AXES))

    def step(state, x, y):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = gradient(model, x, y)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    step = jax.jit(
        step, in_shardings=(placed, split, split), out_shardings=(placed, None), donate_argnums=0
    )
    images = jax.ShapeDtypeStruct((BATCH, 8, 8, 1), np.float32)
    return step.lower(state, images, jax.ShapeDtypeStruct((BATCH,), np.int64)).compile()


def new_state(layout: str, mesh: Mesh) -> Any:
    make = lambda: nnx.state(new_training())
    return jax.jit(make, out_shardings=placement(jax.eval_shape(make), layout, mesh))()


@jax.jit
def test_error(state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """In %, of the whole test set."""
    model, _ = nnx.merge(nnx.graphdef(nnx.eval_shape(new_training)), state)
    return 100 * (model(x).argmax(-1) != y).mean()


def train(step: Any, state: Any, mesh: Mesh, data: Any, epochs: range, bar: Any) -> Any:
    """The state, and the mean loss of each epoch."""
    (x, _, y, _), split, means = data, NamedSharding(mesh, P(AXES)), []
    for epoch in epochs:
        losses = []
        for batch in _digits.batches(x, y, BATCH, epoch):
            state, loss = step(state, *jax.device_put(batch, split))
            losses.append(float(loss))
        means.append(float(np.mean(losses)))
        bar.update()
    return state, means


def loop_over_groups(name: str, groups: int, state: Any, batch: Any) -> Any:
    """One step as m-sharpness defines it, in a plain Python loop on one device."""
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    method = optax.identity() if name == "SGD" else sam_optax.sam(RHO)
    gradient = nnx.jit(sam_optax.nnx.value_and_grad(loss_fn, method))
    model, optimizer = nnx.merge(nnx.graphdef(new_training()), state)
    outs = [
        jax.device_get(gradient(model, x, y))
        for x, y in zip(*(np.split(part, groups) for part in batch), strict=True)
    ]
    loss, grads = jax.tree.map(lambda *leaves: sum(leaves) / groups, *outs)
    optimizer.update(model, grads)
    return nnx.state((model, optimizer)), loss


def run(name: str, layout: str, mesh: Mesh, data: Any, epochs: int, bar: Any) -> dict[str, Any]:
    """A row of the table."""
    groups = groups_of(layout)
    step, state = make_step(name, layout, mesh, groups), new_state(layout, mesh)
    state, losses = train(step, state, mesh, data, range(epochs), bar)
    row = {"layout": layout, "method": name, "losses": losses}
    row["test_error"] = float(test_error(jax.device_get(state), data[1], data[3]))
    parameters = _digits.size(nnx.state(nnx.eval_shape(new_training)[0], nnx.Param))
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        row[kind] = _digits.elements(step, kind) / parameters
    row["memory"] = step.memory_analysis().temp_size_in_bytes / 4 / parameters
    # One more step, by both routes from the same state.
    number = 1 if name != "SAM, own" else mesh.shape["outer"] if layout == "hsdp" else mesh.size
    extra = next(_digits.batches(data[0], data[2], BATCH, epochs))
    loop = loop_over_groups(name, number, state, extra)
    own = step(state, *jax.device_put(extra, NamedSharding(mesh, P(AXES))))
    row["difference"] = _digits.largest_difference(own, loop)
    return row


def resume(data: Any, epochs: int, mesh: Mesh, folder: Path, bar: Any) -> list[dict[str, Any]]:
    """Two groups under HSDP, a checkpoint in the middle, taken up again on several meshes."""
    half, name = epochs // 2, METHODS[-1]
    new_step = lambda layout, mesh: make_step(name, layout, mesh, "outer")
    step, state = new_step("hsdp", mesh), new_state("hsdp", mesh)
    state, _ = train(step, state, mesh, data, range(half), bar)
    saved, file, rows = jax.device_get(state), folder.absolute() / "checkpoint", []
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(file, jax.tree.leaves(state), force=True)
        checkpointer.wait_until_finished()
        state, _ = train(step, state, mesh, data, range(half, epochs), bar)
        end = jax.device_get(state)
        fewer = make_mesh(mesh.size // 2)
        for layout, where in (("hsdp", mesh), ("data", mesh), ("hsdp", fewer)):
            like = jax.eval_shape(lambda: nnx.state(new_training()))
            leaves, structure = jax.tree.flatten(like)
            places = jax.tree.leaves(placement(like, layout, where))
            target = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
                for x, place in zip(leaves, places, strict=True)
            ]
            again = jax.tree.unflatten(structure, checkpointer.restore(file, target))
            row = {"layout": layout, "mesh": dict(where.shape)}
            row["restored"] = _digits.largest_difference(jax.device_get(again), saved)
            again, _ = train(new_step(layout, where), again, where, data, range(half, epochs), bar)
            row["trained"] = _digits.largest_difference(jax.device_get(again), end)
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left the losses of one layout, right what a step of each moves."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    colors = dict(zip(METHODS, ("#D55E00", "#0072B2", "#009E73"), strict=True))  # Okabe and Ito's
    last = rows[-1]["layout"]
    for row in rows:
        if row["layout"] == last:
            losses = row["losses"]
            epochs = np.arange(1, len(losses) + 1)
            axes[0].plot(
                epochs, losses, "o-", ms=3, color=colors[row["method"]], label=row["method"]
            )
    axes[0].set(
        title=f"Training loss, {last}", xlabel="epoch", ylabel="cross-entropy", yscale="log"
    )
    axes[0].legend(frameon=False)
    for n, row in enumerate(rows):
        reduced, gathered = row["all-reduce"] + row["reduce-scatter"], row["all-gather"]
        axes[1].barh(n, reduced, color=colors[row["method"]])
        axes[1].barh(n, gathered, left=reduced, color=colors[row["method"]], alpha=0.4)
    axes[1].set_yticks(range(len(rows)), [f"{row['layout']}: {row['method']}" for row in rows])
    axes[1].invert_yaxis()
    axes[1].set(title="A step reduces (pale: gathers)", xlabel="parameter volumes")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, help="one alone, instead of all three")
    parser.add_argument("--out", type=Path, default=Path("results/jit_sharded"))
    parser.add_argument("--quick", action="store_true", help="two epochs, one method")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # before any JAX operation; no GPU or TPU cares
    epochs, mesh = 2 if args.quick else EPOCHS, make_mesh(jax.device_count())
    _digits.per_device(BATCH, mesh.size)
    data = _digits.load(_digits.QUICK_N_TRAIN if args.quick else _digits.N_TRAIN)
    layouts = [args.layout] if args.layout else list(LAYOUTS)[-1:] if args.quick else list(LAYOUTS)
    names = METHODS[2:] if args.quick else METHODS
    kind = jax.devices()[0].device_kind
    print(f"{mesh.size} devices ({kind}), mesh {dict(mesh.shape)}")
    shutil.rmtree(args.out / "checkpoint", ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)

    total = epochs * (len(layouts) * len(names) + 1) + 3 * (epochs - epochs // 2)
    with tqdm.tqdm(total=total, unit="epoch", dynamic_ncols=True) as bar:
        rows = [run(name, layout, mesh, data, epochs, bar) for layout in layouts for name in names]
        resumed = resume(data, epochs, mesh, args.out, bar)

    print(
        "\n                     training    test   all-             reduce-  temporary   "
        "largest difference\nlayout  method           loss  error % reduced  gathered scattered"
        "     memory   from a Python loop"
    )
    for row in rows:
        print(
            f"{row['layout']:7} {row['method']:12} {row['losses'][-1]:8.4f} "
            f"{row['test_error']:7.1f}{row['all-reduce']:8.2f} {row['all-gather']:9.2f} "
            f"{row['reduce-scatter']:9.2f} {row['memory']:10.1f} {row['difference']:20.1e}"
        )
    print("Moved and held in volumes of the parameters, moved over all devices.")
    print("\nTwo groups under HSDP, interrupted in the middle and taken up again:")
    print("layout  mesh                     bits restored  largest difference at the end")
    for row in resumed:
        same = "the same" if row["restored"] == 0 else "NOT the same"
        end = f"{row['trained']:.1e}" if row["trained"] else "0, the same bits"
        print(f"{row['layout']:7} {row['mesh']!s:24} {same:13}  {end}")
    print("On another mesh sums run in another order, and so do their roundings.")
    figure, log = (args.out / f"jit_sharded.{suffix}" for suffix in ("png", "json"))
    draw(rows, figure)
    log.write_text(json.dumps({"mesh": dict(mesh.shape), "rows": rows, "resumed": resumed}))
    print(f"Figure: {figure}; numbers: {log}")


if __name__ == "__main__":
    main()
