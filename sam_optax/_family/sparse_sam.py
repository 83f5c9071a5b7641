"""Sparse SAM (Mi et al., 2022): a mask of single entries over the perturbation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics, _selection
from sam_optax._ascent import dual_ascent
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class LargestEntriesState(NamedTuple):
    """Memory of `largest_entries`: steps seen, and the mask, a tree of booleans."""

    count: jax.typing.ArrayLike
    mask: Any


def largest_entries(
    sparsity: jax.typing.ArrayLike = 0.5, every: int = 100
) -> optax.GradientTransformationExtraArgs:
    r"""A filter that keeps the entries which are largest over all leaves.

    After an ascent it makes the perturbation sparse and shorter, as Sparse SAM
    does; before one, the norm runs over what is kept. Which entries are kept is
    looked at every so many steps.

        out = mask * v,  mask = the top (1 - sparsity) share of entries by |v|

    Args:
      sparsity: share of entries that are dropped, in [0, 1).
      every: steps between refreshes of the mask, at least 1.

    Returns:
      A filter with state, for a chain before or after an ascent.

    Raises:
      ValueError: if a value is outside its range.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> keep, v = sam_optax.largest_entries(0.5), jnp.array([3.0, -4.0])
      >>> print(keep.update(v, keep.init(v))[0])
      [ 0. -4.]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified
      Perturbation Approach <https://arxiv.org/abs/2210.05177>`_, 2022 (SSAM-F).

    Note:
      No gradient evaluation; a boolean per parameter in the state, and some
      thirty passes over the gradient when the mask is refreshed.
    """
    sparsity = _checks.in_interval("sparsity", sparsity, "[0, 1)")
    every = _checks.integer_at_least("every", every, 1)

    def init(params: optax.Params) -> LargestEntriesState:
        # Like params in their sharding, too.
        mask = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
        return LargestEntriesState(jnp.zeros([], jnp.int32), mask)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, LargestEntriesState]:
        del params, extra_args

        def refreshed() -> Any:
            sizes = jax.tree.map(
                lambda e: jnp.abs(_numerics.widened(e)) if _numerics.is_perturbable(e) else None,
                updates,
            )
            entries = jax.tree.leaves(sizes)
            if not entries:
                return state.mask
            total = sum(x.size for x in entries)
            kept = _selection.rounded("round", total * (1 - sparsity))
            least = _selection.smallest(entries, total - jnp.maximum(kept, 1))
            # A step that a guard will skip must not spoil the mask.
            finite = _numerics.all_finite(updates)
            return jax.tree.map(
                lambda s, m: m if s is None else jnp.where(finite, s >= least, m),
                sizes,
                state.mask,
                is_leaf=lambda x: x is None,
            )

        mask = jax.lax.cond(state.count % every == 0, refreshed, lambda: state.mask)
        sparse = _numerics.map_wide(
            lambda e, m: jnp.where((m > 0) | ~jnp.isfinite(e), e, 0), updates, mask
        )
        return sparse, LargestEntriesState(optax.safe_increment(state.count), mask)

    return transformation(init, update)


def sparse_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: jax.typing.ArrayLike = 0.5,
    every: int = 100,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM: perturbs only the entries with the largest Fisher information.

    The mask is laid over SAM's perturbation after the norm, so the length
    shrinks with it. A study of how much of the perturbation is needed; the
    cost stays that of SAM.

        e = mask * rho g/||g||,  mask = the top (1 - sparsity) share of entries by g^2

    Args:
      rho: radius before the mask, at least 0: a number, a traced scalar or a
        schedule.
      sparsity: share of entries that stay unperturbed, in [0, 1); 0 is SAM.
      every: steps between refreshes of the mask, at least 1.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if a value is outside its range.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = sam_optax.sparse_sam(rho=0.5, sparsity=0.5)
      >>> print(tx.update(w, tx.init(w), w, value_fn=loss_fn)[0])
      [3.  4.4]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified
      Perturbation Approach <https://arxiv.org/abs/2210.05177>`_, 2022 (SSAM-F).
      The authors sum squares of single examples' gradients; here the Fisher
      information is the square of the gradient given, at step 0 and every so
      many steps after. SSAM-D, which drops and regrows entries of a random mask,
      is not here.

    Note:
      Two gradient evaluations; a boolean per parameter in the state, and some
      thirty passes over the gradient when the mask is refreshed.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    # The perturbation is proportional to the gradient, so its order is that of the gradient.
    return sharpness_aware(optax.chain(ascent, largest_entries(sparsity, every)), descent)
