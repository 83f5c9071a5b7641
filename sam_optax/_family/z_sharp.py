"""ZSharp (Yun, 2025): the entries of each layer with the largest z-scores."""

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics, _selection
from sam_optax._ascent import proportional_ascent
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask


def largest_scores(
    quantile: jax.typing.ArrayLike = 0.95, unit_leaves: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""A filter that keeps the entries which stand out in their leaf.

    Makes an ascent sparse, leaf by leaf. Leaves with fewer than two dimensions
    pass as they are, and so does a leaf of which nothing stands out.

        z = (g - mean(g))/std(g);  d = g where |z| > quantile of |z| in the leaf, else 0

    Args:
      quantile: share of entries left out, in [0, 1).
      unit_leaves: hand on directions instead: d/||d|| in each leaf that was
        filtered, g_leaf/||g|| in the others, as ZSharp's code has it; then
        `proportional_ascent` gives each leaf a perturbation of length rho.

    Returns:
      A filter without state, for a chain before an ascent.

    Raises:
      ValueError: if quantile is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> keep, grads = sam_optax.largest_scores(0.7), jnp.array([[1.0, 1.0], [1.0, 5.0]])
      >>> print(keep.update(grads, keep.init(grads))[0])
      [[0. 0.]
       [0. 5.]]

    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering
      <https://arxiv.org/abs/2505.02369>`_, 2025.

    Note:
      No gradient evaluation; some thirty passes over the gradient.
    """
    quantile = _checks.in_interval("quantile", quantile, "[0, 1)")

    def filtered(updates: optax.Updates) -> optax.Updates:
        _, u = _numerics.norm_and_unit(updates)

        def leaf(g: jax.Array, u: jax.Array) -> jax.Array:
            whole = u if unit_leaves else g
            if g.ndim < 2:
                return whole
            # z-scores but for the standard deviation, which does not change their order.
            score = jnp.abs(u - jnp.mean(u))
            outstanding = score > _selection.quantile(score, quantile)
            kept = jnp.where(outstanding, u, 0)
            norm = _numerics.safe_norm(kept)
            if unit_leaves:
                part = kept / _numerics.nonzero(norm)
            else:
                part = jnp.where(outstanding | jnp.isnan(g), g, 0)
            return jnp.where(norm == 0, whole, part)

        return _numerics.map_wide(leaf, updates, u)

    return stateless(filtered)


def z_sharp(
    rho: optax.ScalarOrSchedule = 0.05,
    quantile: jax.typing.ArrayLike = 0.95,
    *,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ZSharp: ascends along the few entries of each layer with the largest z-scores.

    Every leaf with two or more dimensions gets a perturbation of its own, of
    length rho, along the entries that stand out in it; biases and other
    vectors move as in SAM.

        z = (g - mean(g))/std(g);  f = g where |z| > quantile of |z| in the leaf, else 0
        e_leaf = rho f/||f||, or rho g_leaf/||g|| where f = 0 and for vectors

    Args:
      rho: radius of each leaf, at least 0: a number, a traced scalar or a
        schedule.
      quantile: share of entries left out, in [0, 1).
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative or quantile outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> w = jnp.array([[1.0, 1.0], [1.0, 5.0]])
      >>> print(sam_optax.grad(loss_fn, sam_optax.z_sharp(0.1, quantile=0.7))(w))
      [[1.  1. ]
       [1.  5.1]]

    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering
      <https://arxiv.org/abs/2505.02369>`_, 2025; the authors' code, where each
      tensor is normalised by itself. For one norm over all leaves, as in the
      text, put a filter of your own before `dual_ascent`.

    Note:
      Two gradient evaluations and some thirty passes over them for the
      quantiles, which count where a gradient is cheap.
    """
    direction = largest_scores(quantile, unit_leaves=True)
    return sharpness_aware(optax.chain(direction, proportional_ascent(rho, mask=mask)), descent)
