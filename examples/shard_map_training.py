"""Per-device SAM with jax.shard_map over a mesh, jit with donation, and Orbax checkpoints.

    python examples/shard_map_training.py                  # all devices, or 8 of the CPU
    python examples/shard_map_training.py --shared 2       # pairs of devices share a perturbation
    python examples/shard_map_training.py --stop 12        # as if interrupted after 12 epochs,
    python examples/shard_map_training.py --resume         # and taken up again: the same bits
    python examples/shard_map_training.py --quick          # two short epochs, for CI

The Flax network of pmap_training.py (convolutions, BatchNorm, dropout; scikit-learn's digits).
shard_map checks what is equal on all devices (its default): loss, gradients and statistics come
back averaged, so the new state passes as replicated. With `--shared k` the devices form a 2-D
mesh, and the k devices of its inner axis perturb together, with their mean gradient, which moves a
second parameter volume. At the end the SAM run is taken up again from its checkpoint in the middle,
which has to give the same bits. One run a method shows that both train, not which is better: for
that see label_noise.py.
"""

import argparse
import functools
import hashlib
import json
import shutil
import statistics
import time
from pathlib import Path

import _digits
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

BATCH = 128  # examples a step, over all devices
EPOCHS = 30
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
RHO = 0.05  # length of SAM's ascent step, in units of the parameters
SEED = 0
REFERENCES = {"SGD": optax.identity(), "SAM": sam_optax.sam(RHO)}  # what one device would do


def make_mesh(devices: int, shared: int) -> jax.sharding.Mesh:
    if devices % shared:
        raise SystemExit(f"--shared must divide the number of devices, {devices}, got {shared}")
    # Without axis_types make_mesh gives explicit axes, which reach into the types of all arrays.
    return jax.make_mesh(
        (devices // shared, shared), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2
    )


def make_method(name: str, shared: int) -> optax.GradientTransformation:
    if name == "SGD" or shared == 1:
        return REFERENCES[name]
    # The ascent sees the mean over the inner axis, the perturbed gradient is each device's own.
    return optax.chain(sam_optax.pmean("inner"), REFERENCES[name])


def make_step(method: optax.GradientTransformation, mesh: jax.sharding.Mesh):
    axes = mesh.axis_names
    # The one line that differs from SGD. Loss, statistics and gradient come back averaged; the
    # logits stay those of the device's own examples, or they would not belong to its labels.
    value_and_grad = sam_optax.value_and_grad(
        _digits.loss_fn, method, axis_name=axes, has_aux=True, average_aux=(True, False)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(axes), P(axes), P()),
        out_specs=(P(), P(), P(axes)),
    )
    def step(state, x, y, key):  # the state is that of all devices, x and y are this one's part
        # Without the index of the device all would drop the same units. Both passes of SAM
        # get this one key.
        key = jax.random.fold_in(key, state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        out, grads = value_and_grad(state.params, state.batch_stats, x, y, key)
        loss, (batch_stats, logits) = out
        wrong = logits.argmax(-1) != y
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss, wrong

    return step


def new_state(tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> _digits.TrainState:
    # Made in place: device_put of an array that is there already may share its memory,
    # which donation then frees.
    return jax.jit(lambda: _digits.new_state(SEED, tx), out_shardings=NamedSharding(mesh, P()))()


def train(step, state, start, stop, history, data, mesh, checkpoints=None):
    """Epochs start to stop: the state, and milliseconds of every step; fills in history."""
    x, x_test, y, y_test = data
    split, times = NamedSharding(mesh, P(mesh.axis_names)), []
    key = jax.device_put(jax.random.key(SEED), NamedSharding(mesh, P()))
    for epoch in tqdm.trange(start, stop, unit="epoch", dynamic_ncols=True):
        losses, wrong = [], []
        for batch in _digits.batches(x, y, BATCH, epoch):
            begin = time.perf_counter()
            state, loss, errors = step(state, *jax.device_put(batch, split), key)
            losses.append(float(loss))
            wrong.append(errors)
            times.append(1e3 * (time.perf_counter() - begin))
        error = _digits.test_error(state.params, state.batch_stats, x_test, y_test)
        history[epoch] = np.mean(losses), float(error), 100 * np.mean(wrong)
        if checkpoints is not None:
            save = ocp.args.StandardSave({"state": state, "history": history.copy()})
            checkpoints.save(epoch + 1, args=save)  # in the background, from a copy
    if checkpoints is not None:
        checkpoints.wait_until_finished()
    return state, times


def restore(checkpoints, epoch, state, history):
    """What train saved after an epoch, with the structure, dtypes and shardings of the state."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": state, "history": history})
    saved = checkpoints.restore(epoch, args=ocp.args.StandardRestore(target))
    return saved["state"], np.array(saved["history"])


def digest(tree) -> str:
    """Equal for two trees if and only if they agree in every bit."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()[:12]


def run(name, tx, mesh, epochs, data, directory, args):
    """One method, with its checkpoints: the row of the table, and the history."""
    state, extra = new_state(tx, mesh), next(_digits.batches(data[0], data[2], BATCH, epochs))
    split = jax.device_put(extra, NamedSharding(mesh, P(mesh.axis_names)))
    key = jax.device_put(jax.random.key(SEED), NamedSharding(mesh, P()))
    step = make_step(make_method(name, args.shared), mesh).lower(state, *split, key).compile()
    history, start, half = np.full((epochs, 3), np.nan), 0, epochs // 2
    keep = ocp.CheckpointManagerOptions(max_to_keep=1, keep_period=half)
    with ocp.CheckpointManager(directory.absolute(), options=keep) as checkpoints:
        if args.resume and checkpoints.latest_step() is not None:
            start = checkpoints.latest_step()
            state, history = restore(checkpoints, start, state, history)
        stop = min(args.stop or epochs, epochs)
        state, times = train(step, state, start, stop, history, data, mesh, checkpoints)
        row = {"method": name, "epochs": stop, "bits": digest(state)}
        row |= {"milliseconds": statistics.median(times) if times else float("nan")}
        row["loss"], row["test_error"], row["training_error"] = map(float, history[stop - 1])
        if name == "SAM" and stop == epochs and half in checkpoints.all_steps():
            again, _ = restore(checkpoints, half, state, history)
            again, _ = train(step, again, half, epochs, history.copy(), data, mesh)
            row["bits_of_resumed"] = digest(again)
    # One more step, by both routes from the same state.
    shared, start = 1 if name == "SGD" else args.shared, jax.device_get(state)
    loop = _digits.loop_over_groups(REFERENCES[name], start, extra, key, mesh.size, shared)
    row["difference"] = _digits.largest_difference(step(state, *split, key)[:2], loop)
    row["all_reduced"] = _digits.all_reduced_elements(step)
    return row, history[:stop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/shard_map_training"))
    parser.add_argument("--shared", type=int, default=1, help="devices that perturb together")
    parser.add_argument("--stop", type=int, help="end after this many epochs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints")
    parser.add_argument("--quick", action="store_true", help="two epochs of few images")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # before any JAX operation; no GPU or TPU cares
    devices, epochs = jax.device_count(), 2 if args.quick else EPOCHS
    m, mesh = _digits.per_device(BATCH, devices), make_mesh(devices, args.shared)
    data = _digits.load(_digits.QUICK_N_TRAIN if args.quick else _digits.N_TRAIN)
    steps = epochs * (len(data[0]) // BATCH)
    tx = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), MOMENTUM, nesterov=True)
    kind = jax.devices()[0].device_kind
    print(f"{devices} devices ({kind}), mesh {dict(mesh.shape)}, {m} of {BATCH} examples on each")
    if not args.resume:
        shutil.rmtree(args.out / "checkpoints", ignore_errors=True)

    rows, histories = [], {}
    for name in REFERENCES:
        directory = args.out / "checkpoints" / name
        row, histories[name] = run(name, tx, mesh, epochs, data, directory, args)
        rows.append(row)

    print(
        "\n                 loss of the  training error  test error  median step  "
        "largest difference  all-reduced\nmethod  epochs    last epoch               %           %"
        "           ms  from a Python loop     elements"
    )
    for row in rows:
        print(
            f"{row['method']:6} {row['epochs']:7} {row['loss']:13.4f} "
            f"{row['training_error']:15.1f} {row['test_error']:11.1f} "
            f"{row['milliseconds']:12.1f} {row['difference']:19.1e} {row['all_reduced']:12}"
        )
    state = jax.eval_shape(lambda: _digits.new_state(SEED, tx))
    parameters, stats = _digits.size(state.params), _digits.size(state.batch_stats)
    print(f"{parameters} parameters + {stats} BatchNorm statistics + 1 loss.")
    print("Bits of the final state:", ", ".join(f"{r['method']} {r['bits']}" for r in rows))
    if "bits_of_resumed" in rows[-1]:
        same = "the same" if rows[-1]["bits_of_resumed"] == rows[-1]["bits"] else "NOT the same"
        print(f"SAM resumed from its checkpoint after {epochs // 2} epochs: {same} bits.")
    figure, log = (args.out / f"shard_map_training.{suffix}" for suffix in ("png", "json"))
    _digits.draw(histories, f"shard_map over the mesh {dict(mesh.shape)}, m = {m}", figure)
    record = {"devices": devices, "kind": kind, "shared": args.shared, "rows": rows}
    record["histories"] = {name: history.tolist() for name, history in histories.items()}
    log.write_text(json.dumps(record))
    print(f"Figure: {figure}; numbers: {log}")


if __name__ == "__main__":
    main()
