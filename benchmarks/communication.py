"""What a step moves between devices and holds in memory, counted in compiled programs.

    python benchmarks/communication.py                  # half a minute, eight devices of the CPU
    python benchmarks/communication.py --times 40       # and step times of all routes, in turns
    python benchmarks/communication.py --page docs/recipes/meshes.md     # and into its tables

Two hosts of four devices: a mesh of axes replica (2) and shard (4). Parameters lie whole on each
device (data parallel), cut over all eight (FSDP), or cut over the four of a host and whole on each
host (HSDP). The perturbation is one for all devices (shared), each device's own, or one of each
host (group). Volumes are elements that a collective yields on a device (of a scatter: takes), over
the number of parameters; those between hosts are counted apart. The compiler decides what is
moved, so nothing here depends on the machine but times. On a CPU it writes the scatter of a
gradient as an all-reduce of which each device keeps its part.
"""

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import _report
import _timing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sam_optax

HOSTS, DEVICES = 2, 4  # and devices of each host
LAYERS, WIDTH = 4, 256  # of the network: square and dense, so that any axis divides them
EXAMPLES = 128  # a step, over all devices
LEARNING_RATE, RHO = 1e-3, 0.05
STEPS_A_TURN = 5
RESULTS = Path(__file__).parent / "results" / "communication.json"

P = PartitionSpec
EVERYWHERE = ("replica", "shard")
LAYOUTS = {"data parallel": P(), "FSDP": P(EVERYWHERE), "HSDP": P("shard")}
METHODS = ("SGD", "shared", "device", "group")
KINDS = {  # of collectives, and whether a volume is what goes in or what comes out
    "all-reduce": "reduced",
    "all-gather": "gathered",
    "reduce-scatter": "scattered",
    "all-to-all": "exchanged",
    "collective-permute": "exchanged",
}


def make_mesh() -> Mesh:
    return jax.make_mesh((HOSTS, DEVICES), EVERYWHERE, axis_types=(AxisType.Auto,) * 2)


def new_params() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]


def parameters() -> int:
    return LAYERS * WIDTH**2


def new_batch() -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, WIDTH))
    return x, jnp.roll(x, 1, axis=1)


def loss_fn(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    for w in params:
        x = x + jnp.tanh(x @ w)
    return jnp.mean((x - y) ** 2)


def value_and_grad(method: str, layout: str, mesh: Mesh):
    """The gradient of the method; what groups need more of the parameters is gathered first."""
    sam = sam_optax.sam(RHO)
    sharp = functools.partial(sam_optax.value_and_grad, loss_fn, mesh=mesh)
    if method == "SGD":
        return jax.value_and_grad(loss_fn)
    if method == "shared":
        return sam_optax.value_and_grad(loss_fn, sam)
    if method == "device":  # its own gradient, perturbation and perturbed copy, all whole
        f, needed = sharp(sam, axis_name=EVERYWHERE), P()
    elif layout == "data parallel":  # devices of a host perturb along their mean gradient
        f = sharp(optax.chain(sam_optax.pmean("shard"), sam), axis_name=EVERYWHERE)
        needed = P()
    else:  # parameters stay cut within the group
        f, needed = sharp(sam, axis_name="replica"), P("shard")

    def gathered(params, x, y):
        place = lambda tree: jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, needed))
        loss, grads = f(place(params), x, y)
        return loss, place(grads)  # summed over hosts in the parts that groups hold

    return f if needed == LAYOUTS[layout] else gathered


def compiled(method: str, layout: str, mesh: Mesh) -> jax.stages.Compiled:
    """A step of SGD on the gradient of the method, parameters donated."""
    gradient = value_and_grad(method, layout, mesh)

    def step(params, x, y):
        loss, grads = gradient(params, x, y)
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads), loss

    cut, split = NamedSharding(mesh, LAYOUTS[layout]), NamedSharding(mesh, P(EVERYWHERE))
    params, batch = jax.eval_shape(lambda: (new_params(), new_batch()))
    step = jax.jit(
        step, in_shardings=(cut, split, split), out_shardings=(cut, None), donate_argnums=0
    )
    return step.lower(params, *batch).compile()


def moved(program: jax.stages.Compiled) -> list[dict[str, Any]]:
    """The collectives of a program: kind, elements, devices in a group, whether hosts take part."""
    pattern = rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)"
    found = []
    for yields, kind, rest in re.findall(pattern, program.as_text()):
        shapes = re.findall(r"[a-z]\d+\[([\d,]*)\]", yields)
        elements = sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)
        groups = replica_groups(rest)
        found.append(
            {
                "kind": KINDS[kind],
                "elements": elements * (len(groups[0]) if kind == "reduce-scatter" else 1),
                "devices": len(groups[0]),
                "between": any(len({n // DEVICES for n in group}) > 1 for group in groups),
            }
        )
    return found


def replica_groups(text: str) -> list[list[int]]:
    """Of a collective, in each of the three ways that XLA writes them."""
    numbers = lambda part: [int(n) for n in re.findall(r"\d+", part)]
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text)
    if listed:
        return [numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _permuted(numbers(iota[2]), iota[3]).reshape(numbers(iota[1])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}",
        text,
    )
    if named is None or ":" in named[4]:
        raise ValueError(f"groups of devices must be written in a known way, got {text[:200]}")
    axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    sizes = [int(n) for n in axes.values()]
    dims = numbers(named[2]) if named[2] else sizes
    ids = _permuted(dims, named[3]).reshape(sizes)
    over = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    length = np.prod([sizes[n] for n in over])
    return np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, length).tolist()


def _permuted(dims: list[int], order: str | None) -> np.ndarray:
    """The devices in an array of these dimensions, taken in another order."""
    axes = [int(n) for n in order.split(",")] if order else range(len(dims))
    return np.arange(np.prod(dims)).reshape(dims).transpose(axes)


def count(program: jax.stages.Compiled) -> dict[str, Any]:
    """Volumes in parameters of the network, memory in what a device holds of them at the least."""
    row: dict[str, Any] = dict.fromkeys((*KINDS.values(), "between hosts"), 0.0)
    for collective in moved(program):
        row[collective["kind"]] += collective["elements"] / parameters()
        row["between hosts"] += collective["elements"] / parameters() * collective["between"]
    row["temporary MB"] = program.memory_analysis().temp_size_in_bytes / 1e6
    return row


def volumes() -> list[dict[str, Any]]:
    """A row for each layout and method."""
    mesh = make_mesh()
    cells = [(layout, method) for layout in LAYOUTS for method in METHODS]
    rows = []
    for layout, method in tqdm.tqdm(cells, unit="program", dynamic_ncols=True):
        program = compiled(method, layout, mesh)
        rows.append({"layout": layout, "method": method} | count(program))
        rows[-1]["collectives"] = moved(program)
    return rows


# Step times.


def routes(mesh: Mesh) -> dict[str, Any]:
    """Perturbation and route -> step(params, x, y), which returns (params, loss)."""
    sam, base = sam_optax.sam(RHO), optax.sgd(LEARNING_RATE)
    own = functools.partial(sam_optax.value_and_grad, loss_fn, sam)

    def first(gradient):
        def step(params, x, y):
            loss, grads = gradient(params, x, y)
            return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, grads), loss

        return step

    def chain(evaluate, tx):
        def step(params, x, y):
            loss, grads, grad_fn = evaluate(params, x, y)
            updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), loss

        return step

    def by_hand(step):
        whole, split = P(), P(EVERYWHERE)
        specs = {"in_specs": (whole, split, split), "out_specs": (whole, whole)}
        return jax.shard_map(step, mesh=mesh, **specs)

    second = functools.partial(sam_optax.value_and_grad_fn, loss_fn, axis_name=EVERYWHERE)
    averaged = optax.chain(sam, sam_optax.pmean(EVERYWHERE), base)
    m = EXAMPLES // mesh.size
    return {
        "SGD": first(jax.value_and_grad(loss_fn)),
        "shared: jit alone": first(own()),
        "shared: chain, mesh=": chain(second(mesh=mesh), optax.chain(sam, base)),
        "device: mesh=": first(own(axis_name=EVERYWHERE, mesh=mesh)),
        "device: vectorize": first(own(microbatch_size=m, vectorize=True)),
        "device: shard_map": by_hand(first(own(axis_name=EVERYWHERE))),
        "device: shard_map, chain": by_hand(chain(second(), averaged)),
        "device: pmap": first(own(axis_name="batch")),
    }


def ready() -> dict[str, tuple[Any, Any, Any]]:
    """Name -> the jitted step of a route, and its parameters and batch on the devices."""
    mesh, placed = make_mesh(), {}
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(EVERYWHERE))
    for name, step in routes(mesh).items():
        params, batch = new_params(), new_batch()
        if name.endswith("pmap"):  # with an axis for the devices
            step = jax.pmap(step, axis_name="batch", donate_argnums=0)
            params = jax.tree.map(lambda w: jnp.broadcast_to(w, (mesh.size, *w.shape)), params)
            batch = jax.tree.map(lambda a: a.reshape(mesh.size, -1, *a.shape[1:]), batch)
        else:
            step = jax.jit(step, donate_argnums=0, out_shardings=(whole, None))
        params = jax.device_put(params, split if name.endswith("pmap") else whole)
        placed[name] = step, params, jax.device_put(batch, split)
    return placed


def times(repeats: int) -> list[dict[str, Any]]:
    """A row for each route: milliseconds of a step, and over SGD's, in turns within one run."""
    turns = {name: _timing.turn(*placed, STEPS_A_TURN) for name, placed in ready().items()}
    seconds, _ = _timing.paired(turns, repeats)
    return [
        {
            "route": name,
            "ms": _timing.quartiles(1e3 * seconds[name] / STEPS_A_TURN),
            "over SGD": _timing.ratio(seconds, name, "SGD"),
        }
        for name in turns
    ]


# The tables.


def volume_table(rows: list[dict[str, Any]]) -> str:
    head = (
        "| parameters | method | all-reduced | gathered | scattered | exchanged | between hosts "
        "| temporary memory, MB |\n|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in rows:
        cells = [row[kind] for kind in (*dict.fromkeys(KINDS.values()), "between hosts")]
        cells = " | ".join(f"{x:.2f}" for x in cells)
        lines.append(f"| {row['layout']} | {row['method']} | {cells} | {row['temporary MB']:.1f} |")
    return head + "\n".join(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    head = "| perturbation: route | ms a step | over SGD | its quartiles |\n|---|---|---|---|\n"
    lines = []
    for row in rows:
        low, middle, high = row["over SGD"]
        lines.append(
            f"| {row['route']} | {row['ms'][1]:.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
        )
    return head + "\n".join(lines)


def circumstances(record: dict[str, Any]) -> str:
    version = record["versions"]["jax"]
    return f"({record['date'][:10]}, jax {version}, {record['device']}, {record['cores']} cores)"


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the parts of a page that come from the results."""
    counted = results["volumes"]
    parts = {"volumes": f"{volume_table(counted['rows'])}\n\n{circumstances(counted)}"}
    if "times" in results:
        parts["times"] = (
            f"{time_table(results['times']['rows'])}\n\n{circumstances(results['times'])}"
        )
    return parts


def filled(page: str, results: dict[str, Any]) -> str:
    return replaced(page, blocks(results))


def replaced(page: str, texts: dict[str, str]) -> str:
    """The page with its blocks between <!-- name --> and <!-- end --> written anew."""
    for name, text in texts.items():
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        page = re.sub(pattern, lambda _, n=name, t=text: block(n, t), page, flags=re.DOTALL)
    return page


def block(name: str, text: str) -> str:
    return f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--times", type=int, metavar="REPEATS", help="step times too, so many turns"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", HOSTS * DEVICES)
    # Times are measured on a quiet machine, volumes on any: each has its own circumstances.
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    now = _report.circumstances(("jax", "optax"))
    del now["platform"]  # nothing but the compiler and the cores counts
    results["volumes"] = now | {"rows": volumes()}
    if args.times:
        results["times"] = now | {"rows": times(args.times)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1))
    print("\n\n".join(blocks(results).values()))
    if args.page:
        args.page.write_text(filled(args.page.read_text(), results))
    print(f"\nNumbers: {args.out}")


if __name__ == "__main__":
    main()
