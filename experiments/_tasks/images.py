"""Handwritten digits with wrong training labels, and a network that can learn them by heart."""

from pathlib import Path

import _splits
from _networks import MLP

from _tasks.problem import Problem

NOISE = 0.4  # a training label is redrawn with this chance: 36 % are wrong


def noisy_digits(name: str, cache: Path, quick: bool) -> Problem:
    split = _splits.load(name, NOISE, cache=cache)
    widths, batch, epochs = {"mnist": ((256, 256), 100, 40), "digits": ((128, 128), 50, 60)}[name]
    lr = {"mnist": 0.05, "digits": 0.02}[name]
    return Problem(
        f"{_splits.IMAGES[name]}, {NOISE:.0%} label noise",
        *(MLP((16,) if quick else widths), *split[1:], batch, 2 if quick else epochs, "sgd"),
        **{"lr": lr, "decays": (0.01, 0.02, 0.03), "rho": 0.4},
        **{"plain_lrs": (lr, 2 * lr, 4 * lr), "plain_decays": (0.02, 0.03, 0.04)},
    )
