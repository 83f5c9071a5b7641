"""Normalization operators T of ASAM: functions of the parameters.

An operator returns a tree like the parameters whose leaves broadcast against
them; `dual_ascent` measures the perturbation e by ||T^-1 e||. Any function of
this kind serves; the three of the paper and of SAM-ON are here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._types import Normalization


def elementwise(eta: jax.typing.ArrayLike = 0.01, normalize_bias: bool = False) -> Normalization:
    """Element-wise normalization operator of ASAM.

    Each weight may move in proportion to its own size, which makes the
    perturbed loss blind to rescalings that leave the function unchanged. The
    usual choice.

        T = |w| + eta on weights; T = 1 on biases unless normalize_bias.

    Args:
      eta: added to |w| so that a zero weight still moves; at least 0. With 0
        the scale invariance is exact and zero weights stay unperturbed.
      normalize_bias: whether leaves with fewer than two dimensions (biases,
        normalization scales) are normalised as well. With True a rho of about
        2 fits, with False the authors' 0.5. Their code goes by name: it
        normalises every parameter called weight, the scales of normalization
        layers too, and leaves T = 1 on biases. For that give `dual_ascent` a
        function of your own.

    Returns:
      A function from the parameters to T, a tree of the same structure in
      float32 or wider.

    Raises:
      ValueError: if eta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> T = sam_optax.elementwise(eta=0.01)({"w": jnp.array([[-2.0, 0.0]]), "b": jnp.ones(1)})
      >>> print(T["w"], T["b"])
      [[2.01 0.01]] 1.0

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 3.
    """
    return _operator("elementwise", jnp.abs, eta, normalize_bias)


def filterwise(eta: jax.typing.ArrayLike = 0.01, normalize_bias: bool = False) -> Normalization:
    """Filter-wise normalization operator of ASAM.

    All weights of a filter share one scale, the norm of the filter; a filter
    is one index of the last axis (a Flax convolution's output channel, a
    column of a Dense kernel). Invariant to rescaling whole filters; gentler
    than `elementwise` on small weights within a large filter.

        T = ||w_f||_2 + eta for all weights of filter f; T = |b| + eta on biases
        if normalize_bias, else 1.

    Args:
      eta: added to the norm, at least 0.
      normalize_bias: see `elementwise`. One entry of a bias is its own filter.

    Returns:
      A function from the parameters to T; a leaf has shape (1, ..., 1, filters).

    Raises:
      ValueError: if eta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> T = sam_optax.filterwise(eta=0.0)({"w": jnp.array([[3.0, 0.0], [4.0, 2.0]])})
      >>> print(T["w"])
      [[5. 2.]]

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 3.
    """

    def scale(w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return jnp.abs(w)
        return _numerics.safe_norm(w, axis=tuple(range(w.ndim - 1)), keepdims=True)

    return _operator("filterwise", scale, eta, normalize_bias)


def layerwise(eta: jax.typing.ArrayLike = 0.01, normalize_bias: bool = False) -> Normalization:
    """Layer-wise normalization operator of ASAM: one scale a leaf.

    The perturbation of each leaf is proportional to the square of its norm,
    so layers with large weights carry it. Cheapest of the three.

        T = ||w_leaf||_2 + eta for all weights of a leaf; T = 1 on biases
        unless normalize_bias.

    Args:
      eta: added to the norm, at least 0.
      normalize_bias: see `elementwise`; a bias is then a layer of its own.

    Returns:
      A function from the parameters to T; a leaf is a scalar.

    Raises:
      ValueError: if eta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> T = sam_optax.layerwise(eta=0.0)({"w": jnp.array([[3.0], [4.0]])})
      >>> print(T["w"])
      5.0

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, section 3.
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware
      Minimization Needs <https://arxiv.org/abs/2306.04226>`_, 2023, train with
      it; their code has ||w|| (1 + eta), which over normalised leaves alone is
      this with eta 0 and a radius of rho (1 + eta), and moves no leaf of zeros.
    """
    return _operator("layerwise", _numerics.safe_norm, eta, normalize_bias)


def _operator(
    name: str,
    scale: Callable[[jax.Array], jax.Array],
    eta: jax.typing.ArrayLike,
    normalize_bias: bool,
) -> Normalization:
    _checks.at_least("eta", eta, 0.0)

    def normalization(params: optax.Params) -> optax.Params:
        def leaf_operator(w: Any) -> jax.Array:
            if not _numerics.is_perturbable(w) or (jnp.ndim(w) < 2 and not normalize_bias):
                return jnp.ones((), jnp.finfo(_numerics.wide_dtype(jnp.result_type(w))).dtype)
            return scale(_numerics.widened(w)) + eta

        return jax.tree.map(leaf_operator, params)

    normalization.__name__ = name
    return normalization


def scales(normalization: Normalization | None, tree: Any, params: Any) -> list[Any]:
    """The diagonal of T, leaf by leaf; None without a normalization."""
    grads, treedef = jax.tree.flatten(tree)
    if normalization is None:
        return [None] * len(grads)
    _checks.given("params", params, "the normalization is a function of them")
    try:
        scales = treedef.flatten_up_to(normalization(params))
    except ValueError as error:
        raise ValueError(
            f"normalization must return a tree with the structure of params: {error}"
        ) from error
    for scale, grad in zip(scales, grads, strict=True):
        if jnp.broadcast_shapes(jnp.shape(scale), jnp.shape(grad)) != jnp.shape(grad):
            raise ValueError(
                "normalization must return leaves that broadcast against params, "
                f"got shape {jnp.shape(scale)} for a leaf of shape {jnp.shape(grad)}"
            )
    return scales
