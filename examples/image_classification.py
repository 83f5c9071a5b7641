r"""Wide ResNets on CIFAR, SVHN or Fashion-MNIST with any method: the papers' setting, for a GPU.

    python examples/image_classification.py                          # WRN-16-8, SAM, CIFAR-10
    python examples/image_classification.py --resume                 # goes on where that stopped
    python examples/image_classification.py --data my/folder --method vasso --method-args theta=0.5
    python examples/image_classification.py --quick                  # a few seconds, for CI

--data is a data set of the Hugging Face Hub (`uoft-cs/cifar10`, `uoft-cs/cifar100`,
`zalando-datasets/fashion_mnist`, `ufldl-stanford/svhn` with `--config cropped_digits --augment
crop`), a folder of parquet files or images, or what `save_to_disk` wrote. With HF_HUB_OFFLINE=1 a
data set of the Hub is read from the cache. All devices of this process share a batch; each
perturbs with its own gradient and normalises with its own batch statistics (m-sharpness, m =
batch / devices), and the memory of a method with state is each device's own. A run that was
interrupted and resumed equals one that was not: optimizer, method, statistics and schedule come
from the checkpoint, and the order of the examples, crops, flips and holes depend on seed, epoch and
step alone (bit for bit on CPU; a GPU may add in another order). Metrics go to metrics.jsonl and
TensorBoard in --out.

Settings of the papers; nothing at this size has been run here. Replace `--method sam --rho 0.05` by
`--method sgd` for the baseline.

1. SAM paper (arXiv 2010.01412), WRN-28-10, 200 epochs, basic augmentation: published test error of
   SGD and SAM 3.5 and 2.7 % on CIFAR-10, 18.8 and 16.5 % on CIFAR-100 (there --rho 0.1):

    python examples/image_classification.py --model 28-10 --batch 256 --weight-decay 5e-4 \
        --decay loss --clip 5 --label-smoothing 0 --method sam --rho 0.05

   Learning rate 0.1, batch, decay, clipping, cosine without warm-up and L2 in the loss are from the
   README and flags of github.com/google-research/sam; rho is what the ASAM paper says it is there.
   Their shortcuts are pooled and zero-padded, those here are the WRN authors' convolutions.

2. Accuracy with Cutout and decoupled decay, WRN-22-8, CIFAR-10, 200 epochs, three runs: SGDW 96.99,
   SAM 97.45, ASAM 97.54 (eta 0.01) and 97.59 (eta 0):

    python examples/image_classification.py --model 22-8 --batch 128 --decay decoupled \
        --weight-decay 5e-3 --cutout 16 --method asam --rho 0.5 --method-args eta=0.01

   We found rho and eta alone; the rest is ours. 5e-3 decays weights as much as L2 of 5e-4 with
   momentum 0.9, the setting of github.com/SamsungLabs/ASAM (whose batch, learning rate and label
   smoothing these are). ASAM paper (arXiv 2102.11600): rho 0.5 on CIFAR-10, 1 on CIFAR-100.

3. github.com/davda54/sam, WRN-16-8, CIFAR-10, 200 epochs: error of SGD 3.20, SAM (rho 0.05) 2.86,
   ASAM 2.55 %:

    python examples/image_classification.py --model 16-8 --batch 128 --weight-decay 5e-4 \
        --cutout 16 --cutout-probability 0.5 --method asam --rho 2 \
        --method-args eta=0 normalize_bias=True

   All as in its example/train.py, but for its steps of the learning rate, a cosine here.

bfloat16 rounds the perturbed weights, too, and e is small: compare with float32 once.
"""

import argparse
import ast
import functools
import inspect
import json
import math
import shutil
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
import tqdm
from _image_data import IMAGE_COLUMNS, LABEL_COLUMNS, Data, load, require, write_digits
from _report import BLUE, RED, STYLE
from _wide_resnet import WideResNet, crop_and_flip, cutout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

AXIS = "devices"  # of the mesh; examples and the memory of methods are split along it
MOMENTUM = 0.9  # Nesterov; multiplies the effective learning rate by 10
MODELS = ("10-1", "16-8", "22-8", "28-10")  # depth and width; the first is for tests
KEPT = 2  # checkpoints
NOT_SETTINGS = ("out", "resume", "stop_after", "checkpoint_every", "quick")  # may differ on resume
OPERATORS = ("elementwise", "filterwise", "layerwise", "normalization_mask")  # as --method-args
WHOLE = ("method", "wrapper", "optimizer")  # kinds of public names that this script can train with
LOSSES = "needs each example's own loss, and with BatchNorm examples have none"
REFUSED = {  # the others, and why
    name: LOSSES if "losses" in member.needs else "is a part of methods; take sam or asam"
    for name, member in sam_optax.FAMILY.items()
    if member.kind not in WHOLE
} | {
    "cadenced": "takes a cadence; take late_phase, randomised or adaptive",
    "draws": "takes a random method; take random_perturbation",
    "flat_lora": "is for adapters of frozen weights",
    "jacobian_sam": "takes model and loss apart; take sam or asam",
    "imb_sam": "needs the loss of rare classes",
    "polyak_sam": "has a learning rate of its own",
    "sharing": "takes a method that reads the optimizer; take shared_momentum_sam",
    "shared_preconditioned_sam": "needs Adam, and this script has SGD; take preconditioned_sam",
    "tilted": "takes a random method and its losses",
    "tilted_sam": "needs the losses of its draws",
    "sharpness_aware": "builds methods from parts; take sam or asam",
    "pmean": "averages over devices, which this script does by itself",
}


class State(NamedTuple):
    """What a checkpoint holds."""

    params: Any
    batch_stats: Any
    method: Any  # memories of the devices, stacked on a new first axis
    base: Any
    step: jax.Array


SPECS = State(P(), P(), P(AXIS), P(), P())  # all but the memories is the same on all devices


class Job(NamedTuple):
    args: argparse.Namespace
    model: WideResNet
    method: optax.GradientTransformationExtraArgs  # sees a device's own gradients
    base: optax.GradientTransformation  # sees what the method made of them, and averages
    mean: np.ndarray  # of the training images, a value per channel
    std: np.ndarray
    mesh: Mesh

    def over_devices(self, function: Any, outputs: Any, **options: Any) -> Any:
        """function(job, state, *batches), written as one device sees it, for all devices."""

        def call(state: State, *batches: Any) -> Any:
            specs = (SPECS, *[P(AXIS) for _ in batches])
            local = functools.partial(function, self)
            # With its checks on, JAX would sum each device's own gradient over all of them.
            mapped = jax.shard_map(
                local, mesh=self.mesh, in_specs=specs, out_specs=outputs, check_vma=False
            )
            return mapped(state, *batches)

        return jax.jit(call, **options)

    def put(self, images: np.ndarray, labels: np.ndarray) -> Any:
        return jax.device_put((images, labels), NamedSharding(self.mesh, P(AXIS)))


def augmented(job: Job, images: jax.Array, step: jax.Array) -> jax.Array:
    """A device's share of a batch, for the network; alike however many devices there are."""
    args, key = job.args, jax.random.fold_in(jax.random.key(job.args.seed), step)
    places = jax.lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
    keys = jax.vmap(lambda place: jax.random.split(jax.random.fold_in(key, place)))(places)
    if args.augment != "none":
        crop = functools.partial(crop_and_flip, flip=args.augment == "basic")
        images = jax.vmap(crop)(keys[:, 0], images)
    images = (images - job.mean) / job.std
    if args.cutout:
        hole = functools.partial(cutout, size=args.cutout, probability=args.cutout_probability)
        images = jax.vmap(hole)(keys[:, 1], images)
    return images


def schedule(args: argparse.Namespace, steps: int, moves: int = 1) -> optax.Schedule:
    """Learning rate of an optimizer that moves so often a step; steps are those of an epoch."""
    require(args.warmup < args.epochs, "warmup", f"be below --epochs, {args.epochs}", args.warmup)
    whole, warmup = moves * args.epochs * steps, round(moves * args.warmup * steps)
    if not warmup:
        return optax.cosine_decay_schedule(args.lr, whole)
    return optax.warmup_cosine_decay_schedule(0.0, args.lr, warmup, whole)


def optimizer(args: argparse.Namespace, learning_rate: optax.Schedule) -> Any:
    """SGD as in PyTorch, or with --decay decoupled SGDW, of the devices' mean gradient."""
    momentum = optax.trace(MOMENTUM, nesterov=True)
    decay = optax.add_decayed_weights(args.weight_decay)  # of all parameters, as in those papers
    links = {"l2": (decay, momentum), "decoupled": (momentum, decay), "loss": (momentum,)}
    clip = (optax.clip_by_global_norm(args.clip),) if args.clip else ()
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(sam_optax.pmean(AXIS), *clip, *links[args.decay], rate)


def methods() -> list[str]:
    """Names of the methods of the library."""
    return [name for name in sam_optax.FAMILY if name not in REFUSED]


def parsed(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if value in OPERATORS:
        return name, getattr(sam_optax, value)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        values = f"a number, True, False, None or one of {OPERATORS}"
        raise ValueError(f"--method-args must be name=value, {values}, got {text!r}") from None


def method_and_optimizer(args: argparse.Namespace, examples: int, steps: int) -> tuple[Any, Any]:
    """The method by its name, and the optimizer after it, unless the method holds it."""
    name = args.method
    require(name not in REFUSED, "method", f"not be {name!r}, which {REFUSED.get(name)}", "it")
    names = ["sgd", *methods()]
    require(name in names, "method", f"be one of {names}", repr(name))
    build = getattr(sam_optax, name, optax.identity)
    parameters = inspect.signature(build).parameters
    given = dict(parsed(text) for text in args.method_args)
    rho = {} if args.rho is None else {"rho": args.rho}
    has_rho = {"rho", "method"} & set(parameters)
    require(has_rho or not rho, "rho", f"be left out, {name} has none", args.rho)
    try:
        moves = given.get("k", parameters["k"].default) if name == "lookbehind" else 1
        base = optimizer(args, schedule(args, steps, moves))
        ours = {"base": base, "learning_rate": schedule(args, steps), "data_size": examples}
        ours |= {"axis_name": AXIS, "steps": args.epochs * steps}
        ours["method"] = sam_optax.sam(**rho)
        free = sorted(set(parameters) - {"rho", *ours} | {"steps"} & set(parameters))
        require(set(given) <= set(free), "method-args", f"be of {free} for {name}", list(given))
        needed = [k for k, p in parameters.items() if p.default is p.empty or k == "axis_name"]
        chosen = {k: ours[k] for k in needed if k in ours} | given
        missing = [k for k in needed if k not in chosen]
        require(not missing, "method-args", f"give {missing} for {name}", args.method_args)
        method = build(**chosen, **(rho if "rho" in parameters else {}))
    except TypeError as error:
        raise ValueError(
            f"--method-args must suit {name}, got {args.method_args}: {error}"
        ) from None
    if name == "bsam":
        plain = not args.clip and (args.decay == "loss" or not args.weight_decay)
        got = f"{args.weight_decay} and {args.clip}"
        must = "be 0 and --clip left out: bsam is an optimizer with a prior (prior_precision)"
        require(plain, "weight-decay", must, got)
    # Optimizers inside a method move all devices alike; what decoupled_wsam adds needs the mean.
    inside = {"base", "learning_rate"} & set(chosen)
    return optax.with_extra_args_support(method), sam_optax.pmean(AXIS) if inside else base


def build(args: argparse.Namespace, data: Data, devices: Any = None) -> Job:
    (x, _), (_, y_test) = data.train, data.test
    mesh = Mesh(devices or jax.devices(), (AXIS,))
    shares = f"be divisible by the number of devices, {mesh.size}"
    require(args.batch % mesh.size == 0, "batch", shares, args.batch)
    require(args.batch <= len(x), "batch", f"be at most {len(x)}, the training set", args.batch)
    require(len(y_test), "test_split", "have examples", 0)
    depth, width = map(int, args.model.split("-"))
    model = WideResNet(depth, width, data.classes, jnp.dtype(args.precision))
    mean = x.mean((0, 1, 2))
    squares = np.einsum("nhwc,nhwc->c", x, x, dtype=np.float64) * x.shape[-1] / x.size
    std = np.sqrt(np.maximum(squares - mean**2, 1.0))  # at least one gray level of 256
    method, base = method_and_optimizer(args, len(x), len(x) // args.batch)
    return Job(args, model, method, base, np.float32(mean), np.float32(std), mesh)


def first_state(job: Job, image: np.ndarray) -> State:
    def first() -> State:
        # The default generator would take longer to compile than the training step.
        key = jax.random.key(job.args.seed, impl="rbg")
        variables = job.model.init(key, image[None] / 255, train=False)
        params = variables["params"]
        memory = jax.tree.map(lambda m: jnp.stack([m] * job.mesh.size), job.method.init(params))
        step = jnp.zeros([], jnp.int32)
        return State(params, variables["batch_stats"], memory, job.base.init(params), step)

    shardings = jax.tree.map(functools.partial(NamedSharding, job.mesh), SPECS)
    return jax.jit(first, out_shardings=shardings)()


def train_step(
    job: Job, state: State, batch: Any, previous: Any, pay: bool | None = None
) -> tuple[State, Any]:
    """A step as one device sees it: its share of the batch, and its own memory of the method.

    A method with a cadence decides by `jax.lax.cond`, unless pay says it: see `word_of_the_host`.
    """

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = job.model.apply(variables, x, train=True, mutable="batch_stats")
        targets = optax.smooth_labels(
            jax.nn.one_hot(y, job.model.classes), job.args.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        metrics = {"train_loss": loss, "train_error": 100 * (logits.argmax(-1) != y).mean()}
        if job.args.decay == "loss":  # here the perturbation sees it
            squares = sum(jnp.vdot(w, w) for w in jax.tree.leaves(params))
            loss += job.args.weight_decay / 2 * squares
        return loss, (updated["batch_stats"], metrics)

    def gradient_of(batch: Any, step: jax.Array) -> Any:
        x, y = augmented(job, batch[0], step), batch[1]
        # Traced once, however often a method evaluates it.
        return jax.jit(lambda params: jax.grad(loss_fn, has_aux=True)(params, x, y))

    now = gradient_of(batch, state.step)
    before = gradient_of(previous, jnp.maximum(state.step - 1, 0))
    clean, (batch_stats, metrics) = now(state.params)  # statistics are those of the clean pass
    memory = jax.tree.map(lambda m: m[0], state.method)
    extra = {"grad_fn": lambda w: now(w)[0], "previous_grad_fn": lambda w: before(w)[0]}
    extra |= {} if pay is None else {"pay": pay}
    updates, memory = job.method.update(clean, memory, state.params, **extra)
    updates, base = job.base.update(updates, state.base, state.params)
    params = optax.apply_updates(state.params, updates)
    batch_stats, metrics = jax.lax.pmean((batch_stats, metrics), AXIS)
    memory = jax.tree.map(lambda m: m[None], memory)
    return State(params, batch_stats, memory, base, state.step + 1), metrics


def word_of_the_host(memory: Any) -> bool | None:
    """Whether the coming step pays for the perturbed gradient: which program it is.

    None where the step decides itself: without a cadence, or with one that looks at the gradient.
    """
    try:
        return sam_optax.pays(memory)
    except ValueError:
        return None


def test_step(job: Job, state: State, batch: Any) -> jax.Array:
    """A device's sums (1, 2) of losses and of errors; labels below 0 are padding."""
    x, y = (batch[0] - job.mean) / job.std, batch[1]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = job.model.apply(variables, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
    both = jnp.stack([losses, 100 * (logits.argmax(-1) != y)])
    return both.sum(-1, where=y >= 0)[None]


def evaluate(job: Job, step: Any, state: State, images: np.ndarray, labels: np.ndarray) -> Any:
    sums, batch = np.zeros(2), job.args.batch
    for i in range(0, len(images), batch):
        x, y = images[i : i + batch], labels[i : i + batch]
        pad = (0, batch - len(x))
        x, y = np.pad(x, (pad, *[(0, 0)] * 3)), np.pad(y, pad, constant_values=-1)
        sums += np.asarray(step(state, job.put(x, y))).sum(0)
    return dict(zip(("test_loss", "test_error"), (sums / len(images)).tolist(), strict=True))


def batches(args: argparse.Namespace, epoch: int, examples: int) -> np.ndarray:
    """Rows of the batches of an epoch, (steps, batch): of seed and epoch alone."""
    order = np.random.default_rng((args.seed, epoch)).permutation(examples)
    return order[: examples // args.batch * args.batch].reshape(-1, args.batch)


def settings(job: Job, data: Data) -> dict[str, Any]:
    """What must be the same to go on exactly."""
    chosen = {k: v for k, v in vars(job.args).items() if k not in NOT_SETTINGS}
    checksum = zlib.crc32(data.train[1], zlib.crc32(data.train[0]))
    return chosen | {"devices": job.mesh.size, "checksum_of_data": checksum}


def begin(job: Job, data: Data) -> tuple[Any, State, list[dict[str, Any]]]:
    """Checkpoints, and the state and the metrics to go on from."""
    args, now = job.args, settings(job, data)
    # Saving in the background would read buffers that the next step is given to overwrite.
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager((args.out / "checkpoints").absolute(), options=options)
    state, epoch = first_state(job, data.train[0][0]), manager.latest_step()
    if not args.resume:
        require(epoch is None, "out", "be without checkpoints, or take --resume", args.out)
        return manager, state, []
    require(epoch is not None, "resume", "find checkpoints in --out", args.out)
    then = manager.restore(epoch, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))
    for name, value in then.settings.items():
        require(now.get(name) == value, name, f"be {value!r} to --resume {args.out}", now.get(name))
    restored = ocp.args.Composite(state=ocp.args.StandardRestore(state))
    lines = (args.out / "metrics.jsonl").read_text().splitlines()[:epoch]
    return manager, manager.restore(epoch, args=restored).state, [json.loads(s) for s in lines]


def train(job: Job, data: Data, manager: Any, state: State, history: list[Any]) -> list[Any]:
    """Metrics of all epochs; writes checkpoints, metrics and TensorBoard's events on the way."""
    args, (x, y) = job.args, data.train
    steps_of = {  # compiled when first called, so a method without a cadence compiles one
        pay: job.over_devices(
            functools.partial(train_step, pay=pay), (SPECS, P()), donate_argnums=0
        )
        for pay in (None, True, False)
    }
    pays = word_of_the_host(state.method) is not None
    test = job.over_devices(test_step, P(AXIS))
    rate, steps = schedule(args, len(x) // args.batch), len(x) // args.batch
    last = min(args.epochs, args.stop_after or args.epochs)
    rows = batches(args, max(0, len(history) - 1), len(x))[-1 if history else 0]
    previous = job.put(x[rows], y[rows])
    writer = tensorboardX.SummaryWriter(str(args.out / "tensorboard"))
    log = (args.out / "metrics.jsonl").open("w")
    log.writelines(json.dumps(line) + "\n" for line in history)
    bar = tqdm.tqdm(total=last * steps, initial=len(history) * steps, unit="step")
    with bar, writer, log:
        for epoch in range(len(history), last):
            start, found = time.perf_counter(), []
            for rows in batches(args, epoch, len(x)):
                batch = job.put(x[rows], y[rows])
                pay = word_of_the_host(state.method) if pays else None
                state, metrics = steps_of[pay](state, batch, previous)
                jax.block_until_ready(found[-1:])  # one step ahead of the devices, not an epoch
                found.append(metrics)
                previous = batch
                bar.update()
            means = {k: float(np.mean([m[k] for m in found])) for k in found[0]}
            line = {"epoch": epoch + 1, "learning_rate": float(rate((epoch + 1) * steps))} | means
            line |= evaluate(job, test, state, *data.test)
            line["seconds"] = time.perf_counter() - start
            history.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            for name in line.keys() - {"epoch"}:
                writer.add_scalar(name, line[name], epoch + 1)
            bar.set_postfix_str(f"test error {line['test_error']:.2f} %")
            if (epoch + 1) % args.checkpoint_every == 0 or epoch + 1 == last:
                saved = {"state": ocp.args.StandardSave(state)}
                saved["settings"] = ocp.args.JsonSave(settings(job, data))
                manager.save(epoch + 1, args=ocp.args.Composite(**saved))
    manager.close()
    return history


def draw(title: str, history: list[dict[str, Any]], path: Path) -> None:
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    epochs = [line["epoch"] for line in history]
    for axis, what, unit in zip(axes, ("loss", "error"), ("cross-entropy", "%"), strict=True):
        for part, color, marker in (("train", RED, "o"), ("test", BLUE, "s")):
            label = {"train": "training, augmented", "test": "test"}[part]
            values = [line[f"{part}_{what}"] for line in history]
            every = max(1, len(epochs) // 10)
            axis.plot(
                epochs, values, color=color, marker=marker, markevery=every, ms=4, label=label
            )
        axis.set(title=what.capitalize(), xlabel="epoch", ylabel=f"{what} ({unit})")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=200)


def report(history: list[dict[str, Any]]) -> None:
    names = ("train_loss", "train_error", "test_loss", "test_error")
    print("epoch" + "".join(f"{name.replace('_', ' '):>14}" for name in names) + "   seconds")
    count = len(history)
    for i in sorted({*range(max(1, count // 10) - 1, count, max(1, count // 10)), count - 1}):
        cells = "".join(f"{history[i][name]:14.3f}" for name in names)
        print(f"{history[i]['epoch']:5}{cells}{history[i]['seconds']:10.1f}")


def number(kind: type, low: float, high: float = math.inf) -> Any:
    """A type for argparse: a number within bounds."""

    def bounded(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    bounded.__name__ = kind.__name__  # argparse names it where the text is no number
    return bounded


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="uoft-cs/cifar10", help="folder or data set of the Hugging Face Hub")
    add("--config", help="of a data set that has several, such as cropped_digits of SVHN")
    add("--train-split", default="train")
    add("--test-split", default="test")
    add("--image-column", help=f"by default the first there is of {', '.join(IMAGE_COLUMNS)}")
    add("--label-column", help=f"by default the first there is of {', '.join(LABEL_COLUMNS)}")
    add("--augment", choices=("none", "crop", "basic"), default="basic", help="basic: with flips")
    add("--cutout", type=number(int, 0), default=0, help="pixels a side, 0 for none")
    add("--cutout-probability", type=number(float, 0, 1), default=1.0)
    add("--model", choices=MODELS, default="16-8", help="depth and width of the Wide ResNet")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of activations")
    add("--method", default="sam", help="sgd, or a method of the library by its name")
    add("--rho", type=number(float, 0), help="radius; by default the method's own")
    add("--method-args", nargs="*", default=[], metavar="NAME=VALUE", help="such as eta=0.01")
    add("--epochs", type=number(int, 1), default=200)
    add("--batch", type=number(int, 1), default=128, help="examples a step, over all devices")
    add(
        "--lr",
        type=number(float, 0),
        default=0.1,
        help="peak of the learning rate; a cosine takes it to 0",
    )
    add("--warmup", type=number(float, 0), default=0.0, help="epochs of rising learning rate")
    add("--weight-decay", type=number(float, 0), default=5e-4)
    add("--decay", choices=("l2", "decoupled", "loss"), default="l2")
    add(
        "--clip",
        type=number(float, 0),
        default=0.0,
        help="largest norm of the gradient, 0 for none",
    )
    add("--label-smoothing", type=number(float, 0, 1), default=0.1)
    add("--seed", type=number(int, 0), default=0)
    add("--checkpoint-every", type=number(int, 1), default=10, help="epochs")
    add("--stop-after", type=number(int, 1), help="epoch to stop after, for --resume to go on")
    add("--resume", action="store_true", help="from the newest checkpoint in --out")
    add("--out", type=Path, default=Path("results/image_classification"))
    add("--quick", action="store_true", help="WRN-10-1 on digits, in a folder quick in --out")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.quick:
        args.out = args.out / "quick"
        shutil.rmtree(args.out, ignore_errors=True)
        write_digits(args.out / "digits")
        quick = {"data": str(args.out / "digits"), "model": "10-1", "epochs": 4, "batch": 32}
        vars(args).update(quick)
    try:
        data = load(args)
        job = build(args, data)
        args.out.mkdir(parents=True, exist_ok=True)
        manager, state, history = begin(job, data)
    except ValueError as error:
        parser.error(str(error))
    size = sum(w.size for w in jax.tree.leaves(state.params))
    title = f"{args.method}, WRN-{args.model} ({size / 1e6:.2f} million parameters), "
    title += Path(args.data).name
    print(f"{title}: {len(data.train[1])} training images on {job.mesh.devices.ravel().tolist()}")
    history = train(job, data, manager, state, history)
    report(history)
    draw(title, history, args.out / "learning_curves.png")
    record = {"settings": settings(job, data), "parameters": size, "epochs": history}
    (args.out / "results.json").write_text(json.dumps(record))
    if args.quick:
        print("--quick only shows that everything runs.")
    print(f"Figure, metrics, checkpoints and TensorBoard's events: {args.out}")


if __name__ == "__main__":
    main()
