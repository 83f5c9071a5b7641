"""Labelled images through Hugging Face `datasets`: from the Hub or local files, checked."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import sklearn.datasets

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label", "labels")  # on the Hub
QUICK_TRAIN, QUICK_TEST = 320, 128  # images

datasets.disable_progress_bars()  # the script shows its own


class Data(NamedTuple):
    train: tuple[np.ndarray, np.ndarray]  # uint8 (N, height, width, channels), int32 (N,)
    test: tuple[np.ndarray, np.ndarray]
    classes: int


def require(rule: Any, name: str, must: str, got: Any) -> None:
    if not rule:
        raise ValueError(f"--{name.replace('_', '-')} must {must}, got {got}")


def load(args: argparse.Namespace) -> Data:
    """The data set, checked."""
    path = Path(args.data)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = datasets.load_from_disk(path)
        else:
            splits = datasets.load_dataset(args.data, args.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{args.data!r}: {str(error).strip().splitlines()[0]}"
        require(False, "data", "be a folder or a data set of the Hub", reason)
    names = list(splits) if isinstance(splits, dict) else []
    for option in ("train_split", "test_split"):
        name = getattr(args, option)
        require(name in names, option, f"be a split of the data set, one of {names}", repr(name))
    train, test = splits[args.train_split], splits[args.test_split]
    keys = [
        column(args, train.column_names, "image_column", IMAGE_COLUMNS),
        column(args, train.column_names, "label_column", LABEL_COLUMNS),
    ]
    x, y = images_and_labels(train, args.train_split, *keys)
    x_test, y_test = images_and_labels(test, args.test_split, *keys)
    shapes = x.shape[1:], x_test.shape[1:]
    require(shapes[0] == shapes[1], "data", "have images of one shape", f"{shapes} in its splits")
    classes = getattr(train.features[keys[1]], "num_classes", int(y.max()) + 1)
    for name, labels in ((args.train_split, y), (args.test_split, y_test)):
        wrong = labels[(labels < 0) | (labels >= classes)]
        where = f"have labels from 0 to {classes - 1} in {keys[1]!r} of {name!r}"
        require(not len(wrong), "data", where, wrong[:1])
    return Data((x, y), (x_test, y_test), classes)


def column(args: argparse.Namespace, columns: list[str], option: str, usual: Any) -> str:
    given = getattr(args, option)
    found = [name for name in ((given,) if given else usual) if name in columns]
    got = repr(given) if given else f"none of {list(usual)}"
    require(found, option, f"be a column of the data set, one of {columns}", got)
    return found[0]


def images_and_labels(split: Any, name: str, image: str, label: str) -> Any:
    for key in (image, label):
        has = split.column_names
        require(key in has, "data", f"have a column {key!r} in its split {name!r}, too", has)
    rows = split.select_columns([image, label]).with_format("numpy")[:]
    x, y = np.asarray(rows[image]), np.asarray(rows[label])
    x = x[..., None] if x.ndim == 3 else x
    shapes = {np.shape(one) for one in x} if x.dtype == object else {x.shape[1:]}
    good = x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] in (1, 3)
    where = f"have 8-bit images of one size, gray or RGB, in {image!r} of {name!r}"
    require(good, "data", where, f"{x.dtype} of shapes {sorted(shapes)[:3]}")
    good = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    where = f"have an integer label in {label!r} of {name!r}"
    require(good, "data", where, f"{y.dtype} of shape {y.shape[1:]}")
    return x, y.astype(np.int32)


def write_digits(path: Path) -> None:
    """scikit-learn's digits, doubled, as RGB images in the format of CIFAR on the Hub."""
    digits = sklearn.datasets.load_digits()
    images = np.kron(digits.images * (255 / 16), np.ones((2, 2))).astype(np.uint8)
    columns = {"img": [np.stack([x] * 3, -1) for x in images], "label": digits.target}
    names = [str(name) for name in digits.target_names]
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    both = datasets.Dataset.from_dict(columns, datasets.Features(features))
    both.train_test_split(QUICK_TEST, QUICK_TRAIN, seed=0).save_to_disk(path)
