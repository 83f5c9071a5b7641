"""What plots, tests of means and logs of runs share, in examples, experiments and benchmarks."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats

import sam_optax

# Okabe and Ito's palette, told apart by all kinds of colour vision, and a grey.
COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
ORANGE, BLUE, GREEN, PURPLE, RED, SKY, BLACK, GREY = COLORS
MARKERS = "os^Dv<>P"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}  # for rcParams
PACKAGES = ("jax", "optax", "flax", "numpy", "scipy", "scikit-learn", "mlxtend")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over runs."""
    std = f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "?"
    return f"{np.mean(values):.{digits}f} ± {std}"


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """p of Welch's t-test, two-sided; NaN where a sample has fewer than two runs.

    Without spread in both samples, which the test does not know, 1 for equal means and else 0.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    if np.ptp(a) == np.ptp(b) == 0:
        return float(a[0] == b[0])
    # From moments: given the samples, SciPy warns of one without spread.
    moments = [moment for s in (a, b) for moment in (np.mean(s), np.std(s, ddof=1), len(s))]
    return float(scipy.stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)


def circumstances(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """When, where and with which versions a run was made."""
    devices = jax.devices()
    versions = {"python": platform.python_version(), "sam_optax": sam_optax.__version__}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        # Of the last 1, 5 and 15 minutes, where the system tells.
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "device": f"{len(devices)} x {devices[0].platform}: {devices[0].device_kind}",
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
    }
