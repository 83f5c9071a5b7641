"""Flat-LoRA (Li et al., 2024): noise on the frozen weights below an adapter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _masks, _numerics
from sam_optax._family.random_perturbation import gaussian_ascent
from sam_optax._hyperparameters import combined
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def flat_lora(
    frozen: Mask,
    steps: jax.typing.ArrayLike,
    rho: optax.ScalarOrSchedule = 0.05,
    key: int | jax.Array = 0,
    *,
    merged: Callable[[optax.Params], optax.Params] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Flat-LoRA: the adapter's gradient under noise on the frozen weights.

    For fine-tuning with low-rank adapters: a solution that is flat among the
    adapters need not be flat among all weights. For the price of one gradient.

        n ~ N(0, (rho f_t ||row of W + s B A|| / sqrt(length of a row))^2)
        on the frozen matrices W,  f_t = (1 - cos(pi t/steps))/2;
        out = gradient of the adapters at W + n, 0 for frozen leaves

    Args:
      frozen: leaves that are frozen, a tree of booleans like params or a prefix,
        or a function from params to one. Of these the matrices get noise, a row
        being what leads to one output: one index of the last axis, as in a
        Flax kernel.
      steps: length of training, at least 1, over which the noise grows; may be
        traced.
      rho: of the noise at the end, at least 0: a number, a traced scalar or a
        schedule.
      key: seed or key; the state keeps the next one.
      merged: function from params to a tree like them that has W + s B A in
        place of each frozen W; without it the rows of W are measured alone.

    Returns:
      A transformation with state: chain it. params are all weights, frozen ones
      included. The gradients given are unused; inside of jit those of frozen
      leaves are not computed, for nothing uses them.

    Raises:
      ValueError: if rho is negative or steps below 1; at the call, if frozen or
        merged does not fit params.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> params = {"W": jnp.eye(2), "A": jnp.ones((2, 1)), "B": jnp.zeros((1, 2))}
      >>> frozen = {"W": True, "A": False, "B": False}
      >>> merged = lambda p: {**p, "W": p["W"] + p["A"] @ p["B"]}
      >>> loss_fn = lambda p: jnp.sum(merged(p)["W"] ** 2)
      >>> tx = sam_optax.flat_lora(frozen, steps=2, rho=1.0, merged=merged)
      >>> state = tx.init(params)
      >>> for _ in range(2):  # noise begins in the second step
      ...     out, state = tx.update(params, state, params, value_fn=loss_fn)
      ...     print(out["W"].any(), out["B"].round(1))
      False [[2. 2.]]
      False [[... ...]]

    References:
      Li et al., `Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape
      <https://arxiv.org/abs/2409.14396>`_, 2024; the authors' code.

    Note:
      One gradient evaluation and a normal variable per frozen weight; no copy of
      the noise is kept. Weight decay after this link has to spare frozen leaves.
    """
    _checks.at_least("rho", rho, 0.0)
    steps = _checks.integer_at_least("steps", steps, 1, traced=True)
    ramp = lambda count: (1 - jnp.cos(jnp.pi * jnp.minimum(count / steps, 1))) / 2
    std = combined(lambda r, f: r * f, rho, ramp)
    ascent = gaussian_ascent(std, key, normalization=_rows_of(merged), mask=frozen)
    return sharpness_aware(ascent, _adapters_alone(frozen))


def _adapters_alone(frozen: Mask) -> optax.GradientTransformationExtraArgs:
    """A descent that has 0 for frozen leaves."""

    def kept(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        leaves, treedef = jax.tree.flatten(updates)
        fixed = _masks.chosen(frozen, updates, params, "frozen")
        parts = [
            jnp.zeros_like(_numerics.movable(g)) if f else g
            for f, g in zip(fixed, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, parts)

    return stateless(kept)


def _rows_of(merged: Callable[[optax.Params], optax.Params] | None) -> Normalization:
    """The operator T that is ||row||/sqrt(length) of the merged weights."""

    def rows(params: optax.Params) -> optax.Params:
        if merged is None:
            return jax.tree.map(_row_scale, params)
        whole = merged(params)
        _checks.same_structure("the result of merged", whole, params)
        return jax.tree.map(_row_scale, whole)

    return rows


def _row_scale(w: Any) -> jax.Array:
    """||row||/sqrt(length) for each row of a matrix; 0 for what is none."""
    if not _numerics.is_perturbable(w) or jnp.ndim(w) < 2:
        return jnp.zeros((), jnp.float32)
    square = _numerics.abs_square(_numerics.widened(w))
    return jnp.sqrt(jnp.mean(square, axis=tuple(range(jnp.ndim(w) - 1)), keepdims=True))
