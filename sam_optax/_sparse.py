"""Methods that perturb a part of the parameters: by z-score, by Fisher information, by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import count_for, dual_ascent, scheduled
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Radius, transformation


class SparseState(NamedTuple):
    """Memory of `sparse_sam`: steps seen, and the mask, a tree of booleans."""

    count: jax.typing.ArrayLike
    mask: Any


def z_sharp(
    rho: Radius = 0.05, quantile: jax.typing.ArrayLike = 0.95
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
    _checks.at_least("rho", rho, 0.0)
    quantile = _checks.in_interval("quantile", quantile, "[0, 1)")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        radius, state = scheduled(rho, state)
        _, u = _numerics.norm_and_unit(updates)

        def leaf(g: jax.Array, u: jax.Array) -> jax.Array:
            if g.ndim < 2:
                return radius * u
            score = jnp.abs(u - jnp.mean(u)) / (jnp.std(u, ddof=1 if u.size > 1 else 0) + 1e-12)
            outstanding = jnp.where(score > _quantile(score, quantile), u, 0)
            norm = _numerics.safe_norm(outstanding)
            return radius * jnp.where(norm == 0, u, outstanding / jnp.where(norm == 0, 1, norm))

        return _numerics.map_wide(leaf, _numerics.movable(updates), u), state

    return sharpness_aware(transformation(lambda params: count_for(rho), update))


def sparse_sam(
    rho: Radius = 0.05, sparsity: jax.typing.ArrayLike = 0.5, every: int = 100
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
      many steps after.

    Note:
      Two gradient evaluations; a boolean per parameter in the state, and some
      thirty passes over the gradient when the mask is refreshed.
    """
    _checks.at_least("rho", rho, 0.0)
    sparsity = _checks.in_interval("sparsity", sparsity, "[0, 1)")
    every = _checks.integer_at_least("every", every, 1)

    def init(params: optax.Params) -> SparseState:
        mask = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), params)
        return SparseState(jnp.zeros([], jnp.int32), mask)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, SparseState]:
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
            kept = _rounded("round", total * (1 - sparsity))
            least = _smallest(entries, total - jnp.maximum(kept, 1))
            # A step that a guard will skip must not spoil the mask.
            finite = jnp.all(jnp.isfinite(jnp.stack([jnp.max(x) for x in entries])))
            return jax.tree.map(
                lambda s, m: m if s is None else jnp.where(finite, s >= least, m),
                sizes,
                state.mask,
                is_leaf=lambda x: x is None,
            )

        mask = jax.lax.cond(state.count % every == 0, refreshed, lambda: state.mask)
        sparse = _numerics.map_wide(
            lambda e, m: jnp.where((m > 0) | jnp.isnan(e), e, 0), updates, mask
        )
        return sparse, SparseState(optax.safe_increment(state.count), mask)

    masked = transformation(init, update)
    # The perturbation is proportional to the gradient, so its order is that of the gradient.
    return sharpness_aware(optax.chain(dual_ascent(rho), masked))


def _rounded(rounding: str, place: Any) -> Any:
    """The place as an integer; in double precision, unless it is traced."""
    if _checks.is_traced(place):
        return getattr(jnp, rounding)(place).astype(jnp.int32)
    return int(getattr(np, rounding)(place))


def _smallest(arrays: list[jax.Array], k: Any) -> jax.Array:
    """The k-th smallest entry, from 0, of arrays without negative ones.

    Bisects over the bits, which are in the order of the numbers: it needs no
    sort, slow on a CPU, and leaves arrays sharded as they are.
    """
    dtype = jnp.result_type(*arrays)
    kind = jnp.int64 if dtype == jnp.float64 else jnp.int32
    patterns = [jax.lax.bitcast_convert_type(x.astype(dtype), kind) for x in arrays]
    top = jnp.finfo(dtype).bits - 2  # below the sign

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.ones([], kind) << (top - i).astype(kind))
        below = sum(jnp.sum(x < candidate) for x in patterns)
        return jnp.where(below <= k, candidate, found)

    found = jax.lax.fori_loop(0, top + 1, step, jnp.zeros([], kind))
    return jax.lax.bitcast_convert_type(found, dtype)


def _quantile(x: jax.Array, q: Any) -> jax.Array:
    """As `jnp.quantile` of an array without negative entries."""
    place = q * (x.size - 1)
    whole = _rounded("floor", place)
    low = _smallest([x], whole)
    above = jnp.min(jnp.where(x > low, x, jnp.inf))
    following = jnp.where(jnp.sum(x <= low) > whole + 1, low, above)
    weight = place - whole
    return low * (1 - weight) + jnp.where(weight == 0, 0, following) * weight


def normalization_mask(params: optax.Params) -> Any:
    """Marks the parameters of normalization layers in a Flax tree: SAM-ON by a mask.

    The paper finds that perturbing them alone does as well as SAM, with the
    norm taken over them alone. Use it as `sam(rho, mask=sam_optax.normalization_mask)`; rho
    has to be larger than for SAM.

        mask = True where a name on the path contains "norm" or "bn", in any
        case, or where the leaf or its sibling is called "scale"

    Args:
      params: parameters of a Flax model, nested by name (linen, or the state of
        an NNX module).

    Returns:
      A tree of booleans like params.

    Raises:
      ValueError: if no parameter is found, since nothing would be perturbed.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, sam_optax
      >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
      >>> print(sam_optax.normalization_mask(params)["layers_1"])
      {'bias': True, 'scale': True}

    References:
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware
      Minimization Needs <https://arxiv.org/abs/2306.04226>`_, 2023; the rule of
      names of the authors' code.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [[_name(entry).lower() for entry in path] for path, _ in flat]
    scaled_layers = {tuple(n[: n.index("scale")]) for n in names if "scale" in n}

    def is_normalization(path: list[str]) -> bool:
        named = any("norm" in name or "bn" in name for name in path)
        return named or any(tuple(path[:depth]) in scaled_layers for depth in range(len(path)))

    mask = [is_normalization(path) for path in names]
    if not any(mask):
        raise ValueError(
            "params must hold parameters of normalization layers, got only "
            f"{sorted({'/'.join(path) for path in names})[:5]}"
        )
    return jax.tree.unflatten(treedef, mask)


def _name(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
