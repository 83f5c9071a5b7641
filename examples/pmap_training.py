"""Per-device SAM with jax.pmap: replicate, shard, gradient on every device, one average.

    python examples/pmap_training.py            # all local devices, or 8 of the CPU; half a minute
    python examples/pmap_training.py --quick    # two short epochs, for CI

A Flax convolutional network with BatchNorm and dropout on scikit-learn's digits. Each device
perturbs with the gradient of its own part of the batch (m-sharpness, m = batch / devices), then
gradients, loss and BatchNorm statistics are averaged once, as plain SGD does. The last table shows
that this is what a Python loop over the parts computes, and what it moves between devices. One run
a method shows that both train, not which is better: for that see label_noise.py.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import _digits
import jax
import numpy as np
import optax
import tqdm
from flax import jax_utils
from flax.training import common_utils

import sam_optax

BATCH = 128  # examples a step, over all devices
EPOCHS = 30
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
RHO = 0.05  # length of SAM's ascent step, in units of the parameters
SEED = 0


def make_step(method: optax.GradientTransformation):
    # The one line that differs from SGD. Loss, statistics and gradient come back averaged; the
    # logits stay those of the device's own examples, or they would not belong to its labels.
    value_and_grad = sam_optax.value_and_grad(
        _digits.loss_fn, method, axis_name="batch", has_aux=True, average_aux=(True, False)
    )

    # The state is donated: its memory becomes that of the new state.
    @functools.partial(jax.pmap, axis_name="batch", in_axes=(0, 0, 0, None), donate_argnums=0)
    def step(state, x, y, key):
        # Without the index of the device all would drop the same units. Both passes of SAM
        # get this one key.
        key = jax.random.fold_in(key, state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
        out, grads = value_and_grad(state.params, state.batch_stats, x, y, key)
        loss, (batch_stats, logits) = out
        wrong = logits.argmax(-1) != y
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss, wrong

    return step


def train(step, tx, epochs, data, progress):
    """State of all devices, (loss, test error, training error) by epoch, milliseconds a step."""
    x, x_test, y, y_test = data
    key = jax.random.key(SEED)
    state = jax_utils.replicate(_digits.new_state(SEED, tx))  # a leading axis of devices
    history, times = [], []
    for epoch in range(epochs):
        losses, wrong = [], []
        for batch in _digits.batches(x, y, BATCH, epoch):
            begin = time.perf_counter()
            state, loss, errors = step(state, *common_utils.shard(batch), key)  # (devices, m, ...)
            losses.append(float(loss[0]))  # the same on all devices
            wrong.append(errors)
            times.append(1e3 * (time.perf_counter() - begin))
            progress.update()
        one = jax_utils.unreplicate(state)
        error = _digits.test_error(one.params, one.batch_stats, x_test, y_test)
        history.append((float(np.mean(losses)), float(error), 100 * float(np.mean(wrong))))
    return state, history, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/pmap_training"))
    parser.add_argument("--quick", action="store_true", help="two epochs of few images")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # before any JAX operation; no GPU or TPU cares
    args.out.mkdir(parents=True, exist_ok=True)
    devices = jax.local_device_count()
    m = _digits.per_device(BATCH, devices)
    epochs = 2 if args.quick else EPOCHS
    data = x, _, y, _ = _digits.load(_digits.QUICK_N_TRAIN if args.quick else _digits.N_TRAIN)
    steps = epochs * (len(x) // BATCH)
    tx = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), MOMENTUM, nesterov=True)
    kind = jax.local_devices()[0].device_kind
    print(f"{devices} devices ({kind}), {BATCH} examples a step, {m} on each device")

    methods = {"SGD": optax.identity(), "SAM": sam_optax.sam(RHO)}
    rows, histories = [], {}
    with tqdm.tqdm(total=steps * len(methods), unit="step", dynamic_ncols=True) as progress:
        for name, method in methods.items():
            progress.set_postfix_str(name)
            step = make_step(method)
            state, history, milliseconds = train(step, tx, epochs, data, progress)
            histories[name] = np.array(history)
            # One more step, by both routes from the same state.
            batch, key = next(_digits.batches(x, y, BATCH, epochs)), jax.random.key(SEED)
            start = jax.device_get(jax_utils.unreplicate(state))
            expected = _digits.loop_over_groups(method, start, batch, key, devices)
            arguments = state, *common_utils.shard(batch), key
            elements = _digits.all_reduced_elements(step.lower(*arguments).compile())
            state, loss, _ = step(*arguments)
            # Every device has to end in the same state, that of the loop.
            expected = jax.tree.map(lambda leaf: np.asarray(leaf)[None], expected)
            rows.append(
                {
                    "method": name,
                    "loss": history[-1][0],
                    "test_error": history[-1][1],
                    "training_error": history[-1][2],
                    "milliseconds": milliseconds,
                    "difference": _digits.largest_difference((state, loss), expected),
                    "all_reduced": elements,
                }
            )

    print(
        "\n         loss of the  training error  test error  median step   largest difference  "
        "all-reduced\nmethod    last epoch               %           %           ms   "
        "from a Python loop     elements"
    )
    for row in rows:
        print(
            f"{row['method']:6} {row['loss']:14.4f} {row['training_error']:15.1f} "
            f"{row['test_error']:11.1f} "
            f"{row['milliseconds']:12.1f} {row['difference']:20.1e} {row['all_reduced']:12}"
        )
    one = jax_utils.unreplicate(state)
    parameters, stats = _digits.size(one.params), _digits.size(one.batch_stats)
    print(f"{parameters} parameters + {stats} BatchNorm statistics + 1 loss.", end=" ")
    print("The difference is the largest over all devices.")
    figure, log = args.out / "pmap_training.png", args.out / "pmap_training.json"
    _digits.draw(histories, f"pmap over {devices} devices, m = {m}", figure)
    record = {"devices": devices, "kind": kind, "epochs": epochs, "rows": rows}
    record["histories"] = {name: history.tolist() for name, history in histories.items()}
    log.write_text(json.dumps(record))
    print(f"Figure: {figure}; numbers: {log}")


if __name__ == "__main__":
    main()
