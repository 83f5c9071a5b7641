"""Per-device SAM over several processes with jax.distributed, against one process.

    python examples/multi_process.py            # two local processes of 4 CPU devices each
    python examples/multi_process.py --quick    # fewer steps, for CI
    srun python examples/multi_process.py --cluster     # joins; Slurm, Open MPI, TPU pods, ...
    python examples/multi_process.py --coordinator host:1234 --num-processes 2 --process-id 0

Every process runs this same program and loads its own rows of each batch. The mesh spans the
devices of all processes, and each device perturbs with its own gradient (m-sharpness); one
all-reduce a step averages gradient, BatchNorm statistics and loss, as for SGD. The step stands in a
shard_map, and once more in an ordinary jitted one, with mesh=, which gives the same numbers.
Without arguments the same training also runs in one process with as many devices, in float64, and
the final parameters are compared. The last method shows what a perturbation shared by all devices
would move.
"""

import argparse
import functools
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import _digits
import _processes
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

PROCESSES, DEVICES = 2, 4  # started without arguments, and CPU devices of each
BATCH = 128  # examples a step, over all devices of all processes
STEPS = 24
LEARNING_RATE = 0.1
MOMENTUM = 0.9
RHO = 0.05  # length of SAM's ascent step, in units of the parameters
SEED = 0
JITTED = "SAM, own, no shard_map"  # the same method as the one before it
METHODS = {
    "SGD": optax.identity(),
    "SAM, own perturbations": sam_optax.sam(RHO),
    JITTED: sam_optax.sam(RHO),
    "SAM, one perturbation": optax.chain(sam_optax.pmean("batch"), sam_optax.sam(RHO)),
}


def make_step(method: optax.GradientTransformation, mesh: Mesh):
    value_and_grad = sam_optax.value_and_grad(
        _digits.loss_fn, method, axis_name="batch", has_aux=True, average_aux=(True, False)
    )  # the statistics, and not the logits, which are each device's own

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=(P(), P())
    )
    def step(state, x, y):
        key = jax.random.fold_in(jax.random.key(SEED), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index("batch"))  # counts over all processes
        out, grads = value_and_grad(state.params, state.batch_stats, x, y, key)
        loss, (batch_stats, _) = out
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    return step


def make_jitted_step(method: optax.GradientTransformation, mesh: Mesh):
    """The same step without a shard_map of its own: an ordinary jitted one over the mesh."""
    value_and_grad = sam_optax.value_and_grad(
        _digits.loss_fn,
        method,
        axis_name="batch",
        mesh=mesh,
        batch_argnums=(2, 3),  # x and y
        has_aux=True,
        average_aux=(True, False),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        key = jax.random.fold_in(jax.random.key(SEED), state.step)  # each device folds its index in
        out, grads = value_and_grad(state.params, state.batch_stats, x, y, key)
        loss, (batch_stats, _) = out
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    return step


def train(steps: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Losses, final parameters and communication of each method, over all processes there are."""
    # In the order of the processes, which make_mesh does not promise.
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    _digits.per_device(BATCH, mesh.size)
    x, _, y, _ = _digits.load()
    x = x.astype(float)  # float64, to tell rounding from error
    tx, results = optax.sgd(LEARNING_RATE, MOMENTUM), {}
    new_state = jax.jit(lambda: _digits.new_state(SEED, tx), out_shardings=replicated)
    for name in names:
        state, step, losses = new_state(), None, []
        make = make_jitted_step if name == JITTED else make_step
        for i in range(steps):
            rows = np.random.default_rng(i).choice(len(x), BATCH, replace=False)
            # Each process hands in its own rows only, and need not know the others.
            own = np.split(rows, jax.process_count())[jax.process_index()]
            batch = [jax.make_array_from_process_local_data(split, part[own]) for part in (x, y)]
            step = step or make(METHODS[name], mesh).lower(state, *batch).compile()
            state, loss = step(state, *batch)
            losses.append(float(loss))
        parameters = np.asarray(ravel_pytree(state.params)[0])
        elements = _digits.all_reduced_elements(step)
        results[name] = {"losses": losses, "parameters": parameters, "all_reduced": elements}
    return results


def join(index: int | None, coordinator: str | None, processes: int | None, *work: Any) -> Any:
    """One process of several. What is None comes from the cluster's own settings."""
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(coordinator, processes, index)
    results = train(*work)
    first = jax.process_index() == 0
    title = f"{jax.process_count()} processes, {jax.device_count()} devices"
    jax.distributed.shutdown()
    return (results, title) if first else None


def local_process(index: int, port: int, processes: int, file: Path, *work: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo greets on stdout; errors go to stderr
    jax.config.update("jax_platforms", "cpu")  # two processes would fight over one GPU
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    out = join(index, f"localhost:{port}", processes, *work)
    if out:
        file.write_bytes(pickle.dumps(out))


def report(results: Any, alone: Any, title: str, out: Path) -> None:
    """Table, figure and JSON; alone is the same training in one process, if it was done."""
    parameters = next(iter(results.values()))["parameters"].size
    rows = []
    for name, result in results.items():
        row = {"method": name, "losses": result["losses"], "all_reduced": result["all_reduced"]}
        if alone is not None:
            row["losses_alone"] = alone[name]["losses"]
            pairs = [(result[key], alone[name][key]) for key in ("parameters", "losses")]
            row["difference"] = max(_digits.largest_difference(*map(np.array, p)) for p in pairs)
        rows.append(row)
    print("                            first    last  all-reduced elements  largest difference")
    print("method                       loss    loss                a step    from one process")
    for row in rows:
        difference = f"{row['difference']:.1e}" if "difference" in row else "-"
        print(
            f"{row['method']:24} {row['losses'][0]:8.4f}{row['losses'][-1]:8.4f} "
            f"{row['all_reduced']:10} = {row['all_reduced'] / parameters:4.2f} x {parameters} "
            f"{difference:>19}"
        )

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    colors = ("#D55E00", "#0072B2", "#56B4E9", "#009E73")  # Okabe and Ito's palette
    for i, (row, color) in enumerate(zip(rows, colors, strict=False)):
        steps = np.arange(1, len(row["losses"]) + 1)
        if alone is not None:
            axes[0].plot(steps, row["losses_alone"], color=color, lw=1)
        axes[0].plot(steps, row["losses"], "o", ms=3.5, color=color, label=row["method"])
        bar = axes[1].barh(i, row["all_reduced"] / parameters, color=color, height=0.6)
        axes[1].bar_label(bar, fmt="%.2f", padding=3)
    line = "" if alone is None else " (lines: one process)"
    axes[0].set(title=f"Dots: {title}{line}", xlabel="step", ylabel="training loss", ylim=(0, None))
    axes[0].legend(frameon=False)
    axes[1].set(title="Moved between devices in a step", xlabel="parameter volumes", xlim=(0, 2.5))
    axes[1].set_yticks(range(len(rows)), [row["method"].replace(", ", "\n") for row in rows])
    axes[1].invert_yaxis()
    figure.savefig(out / "multi_process.png", dpi=200)
    (out / "multi_process.json").write_text(json.dumps({"title": title, "rows": rows}))
    print(f"Figure: {out / 'multi_process.png'}; numbers: {out / 'multi_process.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", action="store_true", help="join, by the cluster's settings")
    parser.add_argument("--coordinator", help="join: address of the first process, host:port")
    parser.add_argument("--num-processes", type=int, help="join: how many there are")
    parser.add_argument("--process-id", type=int, help="join: which of them this is, from 0")
    parser.add_argument("--out", type=Path, default=Path("results/multi_process"))
    parser.add_argument("--quick", action="store_true", help="two steps, without SGD")
    args = parser.parse_args()
    explicit = (args.coordinator, args.num_processes, args.process_id)
    if any(value is not None for value in explicit) and None in explicit:
        parser.error("--coordinator, --num-processes and --process-id belong together")
    work = (2, list(METHODS)[1:]) if args.quick else (STEPS, list(METHODS))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cluster or args.coordinator:
        joined = join(args.process_id, args.coordinator, args.num_processes, *work)
        if joined:
            report(joined[0], None, joined[1], args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results"
        _processes.start(local_process, PROCESSES, file, *work)
        results, title = pickle.loads(file.read_bytes())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", PROCESSES * DEVICES)
    jax.config.update("jax_enable_x64", True)
    report(results, train(*work), title, args.out)


if __name__ == "__main__":
    main()
