"""Comparisons of trees, to one precision or another."""

import functools

import jax
import numpy as np


def close_to(rtol, atol):
    """assert_close(a, b) of two trees, with these tolerances unless others are given."""

    def assert_close(a, b, rtol=rtol, atol=atol):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)

    return assert_close


assert_close = close_to(1e-5, 1e-6)  # float32
assert_exact = close_to(1e-10, 1e-12)  # float64, after several steps
assert_same = close_to(1e-12, 1e-13)  # float64, the same sums in another order
