"""Tests, corrections and curves for comparisons with equal tuning."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 0.95


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979); NaN, an untested one, stays and counts."""
    p = np.asarray(p, float)
    if not p.size:
        return []
    corrected = multipletests(np.where(np.isnan(p), 1.0, p), method="holm")[1]
    return np.where(np.isnan(p), np.nan, corrected).tolist()


def paired(a: Sequence[float], b: Sequence[float]) -> float:
    """p of the paired t-test, two-sided; NaN with fewer than two pairs.

    Without spread of the differences, which the test does not know, 1 for equal means and else 0.
    """
    difference = np.subtract(a, b)
    if len(difference) < 2:
        return float("nan")
    if np.ptp(difference) == 0:
        return float(difference[0] == 0)
    return float(scipy.stats.ttest_1samp(difference, 0.0).pvalue)


def best_of(validation: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Expected test error of the trial with the least validation error among k, for k = 1 ... n.

    Dodge et al. (1909.03004): k trials drawn with replacement from the n at hand, so the i-th best
    of them is the best drawn with probability ((n - i + 1)^k - (n - i)^k) / n^k. Both arrays have
    the trials on their last axis. Ties share their probability.
    """
    n = validation.shape[-1]
    order = np.argsort(validation, axis=-1, kind="stable")
    ranked, values = (np.take_along_axis(a, order, -1) for a in (validation, test))
    # The mean of the tied trials stands at each of their places.
    same = ranked[..., :, None] == ranked[..., None, :]
    values = (same * values[..., None, :]).sum(-1) / same.sum(-1)
    k = np.arange(1, n + 1)[:, None]
    i = np.arange(1, n + 1)[None, :]
    chance = ((n - i + 1) / n) ** k - ((n - i) / n) ** k
    return values @ chance.T


class Curve(NamedTuple):
    """Over k = 1 ... n trials; the interval is of CONFIDENCE, by the percentiles of a bootstrap."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _bootstrap(curve, arrays: Sequence[Sequence[float]]) -> Curve:
    """A curve of arrays over trials, and its interval over resampled trials, the same in all."""
    data = [np.asarray(a, float) for a in arrays]
    statistic = lambda *arrays, axis=-1: np.moveaxis(curve(*arrays), -1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            data, statistic, paired=True, vectorized=True, axis=-1, method="percentile",
            n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=np.random.default_rng(0),
        )  # fmt: skip
    return Curve(curve(*data), *map(np.asarray, found.confidence_interval))


def expected_best(validation: Sequence[float], test: Sequence[float]) -> Curve:
    """`best_of` with intervals."""
    return _bootstrap(best_of, (validation, test))


def expected_gain(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Curve:
    """How much lower `best_of` is for another method; each is (validation, test) of its trials.

    The trials of both are resampled together: the i-th trials share what was drawn for both.
    """
    curve = lambda bv, bt, ov, ot: best_of(bv, bt) - best_of(ov, ot)
    return _bootstrap(curve, (*base, *other))


def from_trial(gain: Curve) -> int | None:
    """The least number of trials from which on the interval of the gain is above 0."""
    sure = np.asarray(gain.low) > 0
    if not sure[-1]:
        return None
    return int(len(sure) - np.argmin(sure[::-1]) + 1) if not sure.all() else 1
