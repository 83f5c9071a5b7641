"""examples/image_classification.py: data, augmentation, methods, devices, resume."""

import argparse
import functools
import json
import math
import re
import sys
from pathlib import Path

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sam_optax

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import _wide_resnet
import image_classification as script

pytestmark = pytest.mark.examples


class Tiny(nn.Module):
    """A convolution, BatchNorm and a dense layer: quick to compile, made as a WideResNet is."""

    depth: int
    width: int
    classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No data set of a test is left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


INTEGER = {"label": datasets.Value("int64")}
TEXT = {"label": datasets.Value("string"), "img": datasets.Value("string")}
FLOAT = {"img": datasets.Array3D((12, 12, 3), "float32")}


def images(n=40, shape=(12, 12, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def split(x=None, y=None, image="img", label="label", kinds=()):
    """A split of a data set, in the format of those on the Hub unless kinds say otherwise."""
    x = images() if x is None else x
    y = np.arange(len(x)) % 4 if y is None else y
    usual = {image: datasets.Image(), label: datasets.ClassLabel(names=list("abcd"))}
    columns = {image: list(x), label: list(y)}
    return datasets.Dataset.from_dict(columns, datasets.Features(usual | dict(kinds)))


def save(path, train=None, test=None):
    both = datasets.DatasetDict(train=train or split(), test=test or split(images(13, seed=1)))
    both.save_to_disk(path)
    return both


def options(*words):
    return script.arguments().parse_args(["--model", "10-1", "--batch", "16", *map(str, words)])


def job_of(*words, devices=1, model=Tiny, x=None):
    x = images() if x is None else x
    y = np.arange(len(x), dtype=np.int32) % 4
    args, data = options(*words), script.Data((x, y), (x, y), 4)
    job = script.build(args, data, jax.devices()[:devices])
    return job._replace(model=model(10, 1, 4))


def refused(capsys, monkeypatch, *words):
    """The message on stderr with which the command line is refused."""
    monkeypatch.setattr(sys, "argv", ["image_classification.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


# The network


@pytest.mark.parametrize(
    ("depth", "width", "parameters", "published"),
    # Millions as in table 5 of the paper; 22-8 is not in it. Exact counts from the authors' rules.
    [(16, 8, 10_961_370, 11.0), (28, 10, 36_479_194, 36.5), (22, 8, 17_158_106, 17.2)],
)
def test_parameter_counts(depth, width, parameters, published):
    model = _wide_resnet.WideResNet(depth, width, 10)
    image = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes["params"]))
    assert count == parameters
    assert round(count / 1e6, 1) == published


def test_depth_is_checked():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 with n at least 1, got 12"):
        _wide_resnet.WideResNet(12, 1, 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False)


def test_bfloat16_computes_with_float32_parameters():
    model = _wide_resnet.WideResNet(10, 1, 10, jnp.bfloat16)
    image = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    apply = lambda v: model.apply(v, image, train=True, mutable="batch_stats")
    logits, updated = jax.eval_shape(apply, variables)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 10)
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(apply)(jax.tree.map(lambda s: jnp.zeros(s.shape), variables)))
    convolutions = [line for line in text.splitlines() if "conv_general_dilated[" in line]
    assert convolutions and all(":bf16" in line for line in convolutions)


# Data


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet"])
def test_data_are_read_as_they_were_written(tmp_path, kind):
    both = save(tmp_path / "saved")
    if kind == "parquet":
        (tmp_path / "parquet").mkdir()
        for name in both:
            both[name].to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    folder = tmp_path / ("saved" if kind == "save_to_disk" else "parquet")
    data = script.load(options("--data", folder))
    np.testing.assert_array_equal(data.train[0], images())
    np.testing.assert_array_equal(data.train[1], np.arange(40) % 4)
    np.testing.assert_array_equal(data.test[0], images(13, seed=1))
    assert data.train[0].dtype == np.uint8 and data.train[1].dtype == np.int32
    assert data.classes == 4


def test_gray_images_and_other_columns(tmp_path):
    x = images(shape=(12, 12))
    gray = split(x, image="image", label="fine_label", kinds={"fine_label": INTEGER["label"]})
    save(tmp_path / "gray", gray, gray)
    data = script.load(options("--data", tmp_path / "gray"))
    np.testing.assert_array_equal(data.train[0], x[..., None])
    assert data.classes == 4  # counted, as the feature does not say
    save(tmp_path / "named", split(image="x", label="y"), split(image="x", label="y"))
    named = ("--data", tmp_path / "named", "--image-column", "x", "--label-column", "y")
    np.testing.assert_array_equal(script.load(options(*named)).train[0], images())


BAD_DATA = {
    "mixed": (
        lambda: (split([*images(4), *images(4, (10, 12, 3))]), None, []),
        r"--data must have 8-bit images of one size, gray or RGB, in 'img' of 'train', "
        r"got object of shapes \[\(10, 12, 3\), \(12, 12, 3\)\]",
    ),
    "four channels": (
        lambda: (split(images(shape=(12, 12, 4))), None, []),
        r"gray or RGB, in 'img' of 'train', got uint8 of shapes \[\(12, 12, 4\)\]",
    ),
    "float": (
        lambda: (split(np.float32(images()), kinds=FLOAT), None, []),
        r"8-bit images .* got float32 of shapes \[\(12, 12, 3\)\]",
    ),
    "no images": (
        lambda: (split(["a", "b"], ["c", "d"], kinds=TEXT), None, []),
        r"8-bit images .* in 'img' of 'train', got <U1",
    ),
    "two shapes": (
        lambda: (None, split(images(shape=(10, 10, 3))), []),
        r"--data must have images of one shape, got \(\(12, 12, 3\), \(10, 10, 3\)\) in its splits",
    ),
    "no image column": (
        lambda: (split(image="picture"), None, []),
        r"--image-column must be a column of the data set, one of \['picture', 'label'\], "
        r"got none of \['image', 'img'\]",
    ),
    "wrong label column": (
        lambda: (None, None, ["--label-column", "y"]),
        r"--label-column must be a column of the data set, one of \['img', 'label'\], got 'y'",
    ),
    "column of one split": (
        lambda: (None, split(image="image"), []),
        r"--data must have a column 'img' in its split 'test', too, got \['image', 'label'\]",
    ),
    "wrong split": (
        lambda: (None, None, ["--test-split", "validation"]),
        r"--test-split must be a split of the data set, one of \['train', 'test'\], "
        r"got 'validation'",
    ),
    "label below": (
        lambda: (None, split(y=[-1] * 40, kinds=INTEGER), []),
        r"--data must have labels from 0 to 3 in 'label' of 'test', got \[-1\]",
    ),
    "label above": (
        lambda: (
            split(kinds=INTEGER),
            split(y=[7] * 40, kinds=INTEGER),
            [],
        ),
        r"--data must have labels from 0 to 3 in 'label' of 'test', got \[7\]",
    ),
    "words": (
        lambda: (split(y=list("ab") * 20, kinds={"label": TEXT["label"]}), None, []),
        r"--data must have an integer label in 'label' of 'train', got <U1 of shape \(\)",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(tmp_path, case):
    build, message = BAD_DATA[case]
    train, test, words = build()
    save(tmp_path / "saved", train, test)
    with pytest.raises(ValueError, match=message):
        script.load(options("--data", tmp_path / "saved", *words))


def test_paths_that_are_no_data(tmp_path, monkeypatch):
    must = r"--data must be a folder or a data set of the Hub, got "
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"{must}'{path}': \w"):
            script.load(options("--data", path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"{must}'some/thing': .*Offline"):
        script.load(options("--data", "some/thing"))
    split().save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"--train-split must be .* one of \[\], got 'train'"):
        script.load(options("--data", tmp_path / "one"))


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "12"], "--batch must be divisible by the number of devices, 8, got 12"),
        (["--batch", "64"], "--batch must be at most 40, the training set, got 64"),
        (["--epochs", "2", "--warmup", "2"], "--warmup must be below --epochs, 2, got 2.0"),
        (["--resume"], "--resume must find checkpoints in --out, got "),
        (["--method", "pmean"], "--method must not be 'pmean', which averages over devices"),
        (["--method", "esam"], "--method must not be 'esam', which needs each example's own loss"),
        (["--method", "adam"], "--method must be one of ['sgd', 'adaptive', 'asam', "),
        (["--method", "sgd", "--rho", "1"], "--rho must be left out, sgd has none, got 1.0"),
        (["--rho", "-1"], "argument --rho: must be at least 0, got -1"),
        (
            ["--method-args", "eta=1"],
            "--method-args must be of ['descent', 'mask', 'normalization', 'p', 'second_order'",
        ),
        (["--method-args", "p"], "--method-args must be name=value, a number, True, False, None"),
        (["--method-args", "p=big"], "None or one of ('elementwise', 'filterwise', 'layerwise', "),
        (["--method-args", "p=0.5"], "p must be"),
        (["--method", "late_phase"], "--method-args must give ['start'] for late_phase, got []"),
        (["--method", "lookbehind", "--method-args", "k='x'"], "--method-args must suit lookbehi"),
        (["--method", "bsam"], "--weight-decay must be 0 and --clip left out: bsam is an optimiz"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--label-smoothing", "2"], "argument --label-smoothing: must be in [0, 1], got 2"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--model", "9-9"], "argument --model: invalid choice: '9-9'"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, words, message):
    words = ["--data", tmp_path / "saved", "--out", tmp_path / "out", "--batch", "16", *words]
    save(tmp_path / "saved")
    assert message in refused(capsys, monkeypatch, *words)


def test_the_commands_of_the_docstring_are_accepted():
    text = script.__doc__.replace("\\\n", "")
    commands = re.findall(r"^ +python \S+\.py(.*)$", text, re.M)
    assert len(commands) == 7 and sum("--model 28-10" in command for command in commands) == 1
    for command in commands:
        args = script.arguments().parse_args(command.partition("#")[0].split())
        script.method_and_optimizer(args, 50_000, 50_000 // args.batch)


# Augmentation


def test_crops_are_windows_of_the_padded_image_half_of_them_mirrored():
    image, n = images(1)[0] // 2 + 1, 600  # no pixel is black as the padding is
    keys = jax.random.split(jax.random.key(0), n)
    pad = _wide_resnet.PADDING
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    places = [(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    windows = {padded[i : i + 12, j : j + 12].tobytes(): (i, j) for i, j in places}
    for flip in (False, True):
        crop = jax.vmap(lambda key, flip=flip: _wide_resnet.crop_and_flip(key, image, flip))
        out = np.asarray(jax.jit(crop)(keys))
        assert out.dtype == np.uint8 and out.shape == (n, *image.shape)
        straight = [windows.get(one.tobytes()) for one in out]
        mirrored = [windows.get(np.ascontiguousarray(one[:, ::-1]).tobytes()) for one in out]
        assert all((a is None) != (b is None) for a, b in zip(straight, mirrored, strict=True))
        found = {a or b for a, b in zip(straight, mirrored, strict=True)}
        assert len(found) == len(places)  # each is drawn, but for a chance of 0.05
        share = np.mean([b is not None for b in mirrored])
        assert abs(share - 0.5) < 0.1 if flip else share == 0  # 0.1 are five deviations


@pytest.mark.parametrize("size", [4, 5])
def test_cutout_zeroes_one_square_cut_off_at_the_border(size):
    n, image = 400, np.ones((12, 10, 3), np.float32)
    keys = jax.random.split(jax.random.key(1), n)
    cut = jax.jit(jax.vmap(lambda key: _wide_resnet.cutout(key, image, size, 1.0)))
    holes = np.asarray(cut(keys)) == 0
    assert (holes == holes[..., :1]).all()  # all channels
    centres = set()
    for hole in holes[..., 0]:
        expected = {}
        for i in range(12):
            for j in range(10):
                square = np.zeros((12, 10), bool)
                top, left = i - size // 2, j - size // 2
                square[max(top, 0) : top + size, max(left, 0) : left + size] = True
                expected[square.tobytes()] = (i, j)
        assert hole.tobytes() in expected
        centres.add(expected[hole.tobytes()])
    assert len(centres) > 100  # of 120
    some = jax.vmap(lambda key: _wide_resnet.cutout(key, image, size, 0.3))(keys)
    assert abs((np.asarray(some) == 0).any((1, 2, 3)).mean() - 0.3) < 0.12
    assert np.asarray(some).dtype == np.float32


def test_augmentation_does_not_depend_on_the_devices():
    x = images(16)
    shown = []
    for devices in (1, 4):
        job = job_of("--cutout", 4, devices=devices)
        look = job.over_devices(
            lambda job, state, x: script.augmented(job, x, state.step), script.P(script.AXIS)
        )
        state = script.first_state(job, x[0])
        shown.append(np.asarray(look(state, job.put(x, x)[0])))
    np.testing.assert_array_equal(*shown)
    later = np.asarray(look(state._replace(step=state.step + 1), job.put(x, x)[0]))
    assert (later != shown[0]).any((1, 2, 3)).mean() > 0.9
    plain = job_of("--augment", "none")
    assert plain.mean.shape == plain.std.shape == (3,)
    np.testing.assert_allclose(plain.mean, images().mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(plain.std, images().std((0, 1, 2)), rtol=1e-6)


# Optimizer and methods


def test_the_learning_rate_rises_and_ends_at_0():
    plain = script.schedule(options("--lr", 0.2, "--epochs", 5), 10)
    assert plain(0) == np.float32(0.2) and plain(50) == 0 < plain(49)
    np.testing.assert_allclose(plain(25), 0.1, rtol=1e-6)
    warm = script.schedule(options("--lr", 0.2, "--epochs", 5, "--warmup", 1.5), 10)
    assert warm(0) == 0 and warm(50) == 0
    np.testing.assert_allclose([warm(5), warm(15)], [0.2 / 3, 0.2], rtol=1e-6)
    assert script.schedule(options("--epochs", 5), 10, moves=2)(99) > 0


@pytest.mark.parametrize("decay", ["l2", "decoupled", "loss"])
def test_the_first_steps_of_the_optimizer(decay):
    args = options("--decay", decay, "--weight-decay", 0.5, "--clip", 1)
    tx = script.optimizer(args, lambda count: 0.1)
    w, g = np.array([[1.0, -2.0]] * 2, np.float32), np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)

    def two_steps(w, g):
        state = tx.init(w)
        first, state = tx.update(g, state, w)
        return first, tx.update(g, state, w)[0]

    steps = jax.vmap(two_steps, axis_name=script.AXIS)(w, g)
    clipped = np.array([0.6, 0.8])  # of the mean gradient [1.5, 2]
    seen = clipped + 0.5 * w[0] * (decay == "l2")
    for step, velocity in zip(steps, (seen, 1.9 * seen), strict=True):
        expected = seen + 0.9 * velocity + 0.5 * w[0] * (decay == "decoupled")
        np.testing.assert_allclose(step, -0.1 * np.stack([expected] * 2), rtol=1e-5)


WORDS = {"late_phase": ["--method-args", "start=1"], "bsam": ["--weight-decay", 0]}


@pytest.mark.parametrize("name", ["sgd", *script.methods()])
def test_every_method_takes_a_step_that_keeps_the_state(name):
    job = job_of("--method", name, *WORDS.get(name, []), devices=2)
    batch = job.put(images(16), np.arange(16, dtype=np.int32) % 4)
    state = jax.eval_shape(lambda: script.first_state(job, images(1)[0]))  # traced, not compiled
    step = job.over_devices(script.train_step, (script.SPECS, script.P()))
    new, metrics = jax.eval_shape(step, state, batch, batch)
    like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert like(new) == like(state)
    assert {value.shape for value in metrics.values()} == {()}


def test_every_public_method_is_accepted_or_refused_by_name():
    makers = {
        name
        for name in sam_optax.__all__
        if "Transformation" in str(getattr(getattr(sam_optax, name), "__annotations__", {}))
    }
    accepted = set(script.methods())
    assert {"sam", "asam", "gsam", "momentum_sam", "sampa", "bsam", "adaptive"} <= accepted
    assert accepted <= makers and not accepted & set(script.REFUSED)
    for name in script.REFUSED:
        with pytest.raises(ValueError, match=rf"--method must not be '{name}', which \w"):
            script.method_and_optimizer(options("--method", name), 40, 2)


def test_arguments_reach_the_method():
    words = ("--method", "asam", "--rho", 2, "--method-args", "eta=0", "normalize_bias=True")
    words = (*words, "normalization=filterwise")
    method, _ = script.method_and_optimizer(options(*words), 40, 2)
    same = sam_optax.asam(2.0, 0.0, normalize_bias=True, normalization=sam_optax.filterwise)
    w, seen = {"w": jnp.array([[1.0, 2.0], [3.0, 5.0]]), "b": jnp.array([4.0])}, []
    for one in (method, same):
        grad_fn = jax.grad(lambda w: (w["w"] ** 3).sum() + (w["b"] ** 4).sum())
        seen.append(one.update(grad_fn(w), one.init(w), w, grad_fn=grad_fn)[0])
    jax.tree.map(np.testing.assert_array_equal, *seen)
    half, _ = script.method_and_optimizer(options("--method", "randomised", "--rho", 0), 40, 2)
    out, _ = half.update(grad_fn(w), half.init(w), w, grad_fn=grad_fn)
    jax.tree.map(np.testing.assert_array_equal, out, grad_fn(w))


# Devices


@pytest.mark.parametrize(("method", "devices"), [("sam", 1), ("sam", 4), ("friendly_sam", 4)])
def test_a_step_is_the_mean_of_what_each_device_does_alone(method, devices):
    lr, rho, decay, smooth, classes = 0.1, 0.3, 0.01, 0.1, 4
    words = ["--method", method, "--rho", rho, "--lr", lr, "--weight-decay", decay]
    job = job_of(*words, "--label-smoothing", smooth, "--augment", "none", devices=devices)
    x, y = images(16), np.arange(16, dtype=np.int32) % 4
    state = script.first_state(job, x[0])
    params, stats = jax.device_get((state.params, state.batch_stats))
    step = job.over_devices(script.train_step, (script.SPECS, script.P()))
    new, metrics = step(state, job.put(x, y), job.put(x, y))

    def loss_fn(params, x, y):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = job.model.apply(variables, x, train=True, mutable="batch_stats")
        targets = (1 - smooth) * jnp.eye(classes)[y] + smooth / classes
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), updated["batch_stats"]

    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    clean, sharp, updated, losses = [], [], [], []
    for part in np.split(np.arange(16), devices):
        batch = (x[part] - job.mean) / job.std, y[part]
        (loss, aux), g = gradient(params, *batch)
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
        moved = jax.tree.map(lambda w, g, norm=norm: w + rho * g / norm, params, g)
        clean.append(g)
        sharp.append(gradient(moved, *batch)[1])
        updated.append(aux)
        losses.append(loss)
    mean = lambda trees: jax.tree.map(lambda *leaves: sum(leaves) / devices, *trees)
    expected = jax.tree.map(lambda w, g: w - lr * 1.9 * (g + decay * w), params, mean(sharp))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(new.params), jax.device_get(expected))
    jax.tree.map(close, jax.device_get(new.batch_stats), jax.device_get(mean(updated)))
    close(metrics["train_loss"], np.mean(losses))
    if devices > 1:  # the perturbations differ: one for all of them gives another step
        g = mean(clean)
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
        moved = jax.tree.map(lambda w, g: w + rho * g / norm, params, g)
        parts = [(x[p] - job.mean, y[p]) for p in np.split(np.arange(16), devices)]
        shared = mean([gradient(moved, a / job.std, b)[1] for a, b in parts])
        other = jax.tree.map(lambda w, g: w - lr * 1.9 * (g + decay * w), params, shared)
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, other)
        assert max(jax.tree.leaves(gaps)) > 1e-4
    if method == "friendly_sam":  # whose average starts at the first gradient: each device's own
        average = optax.tree.get(new.method, "average")
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(clean))
        jax.tree.map(close, jax.device_get(average), stacked)


def test_the_host_decides_for_methods_with_a_cadence(monkeypatch, tmp_path):
    """Its word is the cadence's; other methods get none."""
    words = {"sam": (None, None), "adaptive": (None, None), "look_sam": (True, False)}
    for name, (first, _) in words.items():
        job = job_of("--method", name, *WORDS.get(name, []), devices=2)
        state = script.first_state(job, images(1)[0])
        assert script.word_of_the_host(state.method) is first
    batch = job.put(images(16), np.arange(16, dtype=np.int32) % 4)
    step = lambda pay: job.over_devices(
        functools.partial(script.train_step, pay=pay), (script.SPECS, script.P())
    )
    for pay in words["look_sam"]:
        assert script.word_of_the_host(state.method) is pay
        told, free = step(pay)(state, batch, batch), step(None)(state, batch, batch)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, *jax.device_get((told, free)))
        state, _ = told

    told, over_devices = [], script.Job.over_devices  # and training asks it at every step

    def spied(self, function, *rest, **options):
        mapped = over_devices(self, function, *rest, **options)
        pay = getattr(function, "keywords", {}).get("pay", "evaluation")
        return lambda *args: (told.append(pay), mapped(*args))[1]

    monkeypatch.setattr(script.Job, "over_devices", spied)
    job = job_of("--method", "look_sam", "--epochs", 1, "--out", tmp_path, x=images(96))
    data = script.Data(*[(images(96), np.arange(96, dtype=np.int32) % 4)] * 2, 4)
    manager, state, history = script.begin(job, data)
    script.train(job, data, manager, state, history)
    assert [pay for pay in told if pay != "evaluation"] == [True, *[False] * 4, True]


def test_evaluation_leaves_padding_out():
    job = job_of(devices=2)
    x, y = images(21, seed=3), np.arange(21, dtype=np.int32) % 4  # a batch of 16 and 5 of another
    state = script.first_state(job, x[0])
    step = job.over_devices(script.test_step, script.P(script.AXIS))
    found = script.evaluate(job, step, state, x, y)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = job.model.apply(jax.device_get(variables), (x - job.mean) / job.std, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    np.testing.assert_allclose(found["test_loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["test_error"], 100 * (logits.argmax(-1) != y).mean())


# Whole runs


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", *map(str, words)])
    script.main()


def checkpoint(folder, epoch):
    manager = ocp.CheckpointManager(folder / "checkpoints")
    state = manager.restore(epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    manager.close()
    return state


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # orbax, to this test's restore
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, capsys):
    method = "sampa"  # needs the batch before, and has a memory on each device
    monkeypatch.setattr(script, "WideResNet", Tiny)
    two = functools.partial(script.build, devices=jax.devices()[:2])
    monkeypatch.setattr(script, "build", two)
    save(tmp_path / "saved")
    words = ["--data", tmp_path / "saved", "--batch", 8, "--epochs", 2, "--method", method]
    words += ["--cutout", 4, "--lr", 0.3, "--checkpoint-every", 1, "--seed", 3]
    run(monkeypatch, *words, "--out", tmp_path / "whole")
    parts = tmp_path / "parts"
    run(monkeypatch, *words, "--out", parts, "--stop-after", 1)
    with (parts / "metrics.jsonl").open("a") as log:
        log.write("an epoch that was lost with its checkpoint\n")
    message = refused(capsys, monkeypatch, *words, "--out", parts)
    assert "--out must be without checkpoints, or take --resume, got" in message
    message = refused(capsys, monkeypatch, *words, "--out", parts, "--resume", "--lr", 0.2)
    assert f"--lr must be 0.3 to --resume {parts}, got 0.2" in message
    run(monkeypatch, *words, "--out", parts, "--resume")
    states = [checkpoint(tmp_path / name, 2) for name in ("whole", "parts")]
    assert jax.tree.leaves(states[0]["method"])[0].shape[0] == 2
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0]["step"]) == 10
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for whole, part in zip(*lines, strict=True):
        assert whole | {"seconds": 0} == part | {"seconds": 0}
    assert [line["epoch"] for line in lines[0]] == [1, 2] and whole["learning_rate"] == 0
    before = checkpoint(tmp_path / "whole", 1)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0]["params"], before["params"])
    assert min(jax.tree.leaves(gaps)) > 0  # and it does train
    assert (parts / "learning_curves.png").stat().st_size > 10_000
    assert json.loads((parts / "results.json").read_text())["epochs"] == lines[1]
    assert list((parts / "tensorboard").glob("events.*"))
    assert "test error" in capsys.readouterr().out


def test_batches_depend_on_seed_and_epoch_alone():
    args = argparse.Namespace(seed=1, batch=8)
    first, again, next_one = (script.batches(args, epoch, 43) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (5, 8) and len(np.unique(first)) == 40
    assert (first != next_one).any()
    args.seed = 2
    assert (script.batches(args, 0, 43) != first).any()
