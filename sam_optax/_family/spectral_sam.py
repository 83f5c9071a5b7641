"""SAM over the spectral norm: the ascent that Muon's step is to descent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sam_optax import _checks, _masks, _normalization, _numerics
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization, Result

# Of Muon: they lift small singular values fast and leave all of them between 0.7 and 1.2.
LIFT = (3.4445, -4.7750, 2.0315)
# Of the convergent iteration of the same order: near 1 an error of x becomes one of 2.5 x^3.
POLISH = (1.875, -1.25, 0.375)


def spectral_ascent(
    rho: optax.ScalarOrSchedule,
    ns_steps: int = 5,
    *,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    matrices: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The perturbation that raises the linearised loss most, each matrix by its spectral norm.

    All singular directions of a matrix move alike, however small their gradient.
    `dual_ascent` with another norm: the largest over the leaves of a matrix's
    spectral norm or of another leaf's 2-norm.

        e = argmax <g, e> subject to ||T^-1 e_l|| <= rho in every leaf l
        e_l = rho T U V^T for a matrix with T g_l = U S V^T;  rho T^2 g_l/||T g_l|| else
        <g, e> = rho (sum of the singular values of T g_l, and of the norms of the others)

    Args:
      rho: radius of each leaf, at least 0: a number, a traced scalar or a
        schedule.
      ns_steps: steps of Muon's Newton-Schulz iteration, at least 0, before four of
        a convergent one. Singular values below 3.4^-ns_steps of the matrix's norm
        end below 1, zeros stay 0.
      normalization: operator T, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      matrices: leaves to take as matrices, a tree of booleans like params or a
        prefix, or a function from params to one; by default those with two or
        more dimensions. The last axis is one side of the matrix, all others the
        other. Muon's authors leave embeddings out.

    Returns:
      An ascent rule. Its update needs params if a normalization or a function
      as mask or matrices is given.

    Raises:
      ValueError: if rho or ns_steps is negative; at the call, if matrices marks a
        leaf with fewer than two dimensions.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, grads = sam_optax.spectral_ascent(rho=0.5), jnp.array([[0.0, 4.0], [-0.1, 0.0]])
      >>> print(ascent.update(grads, ascent.init(grads))[0].round(3))
      [[ 0.   0.5]
       [-0.5  0. ]]

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024;
      Bernstein and Newhouse, `Old Optimizer, New Norm: An Anthology
      <https://arxiv.org/abs/2409.20325>`_, 2024, who derive that step of descent.

    Note:
      No gradient evaluation; three products of matrices a step, at the side that
      is shorter. Muon's iteration alone would leave lengths of 0.7 to 1.2 rho. A
      matrix that is spread over explicit axes of a mesh is gathered.
    """
    _checks.at_least("rho", rho, 0.0)
    ns_steps = _checks.integer_at_least("ns_steps", ns_steps, 0)

    def update(updates: optax.Updates, state: Any, params: Any = None, **_: Any) -> Result:
        radius, state = scheduled(rho, state)
        scales = _normalization.scales(normalization, updates, params)
        marked = _marked(matrices, updates, params)
        move = lambda g, t, m: [_move(*x, radius, ns_steps) for x in zip(g, t, m, strict=True)]
        return _masks.moved(mask, move, updates, params, scales, marked), state

    return transformation(lambda params: count_for(rho), update)


def spectral_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    ns_steps: int = 5,
    *,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    matrices: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM over the spectral norm: the perturbation of each matrix is orthogonal.

    The neighbourhood in which Muon takes its steps; try it before Muon. Unlike
    with `sam`, every leaf has a radius of its own.

        e_l = rho U V^T for a matrix g_l = U S V^T, rho g_l/||g_l|| for other leaves;
        out = grad L(w + e)

    Args:
      rho: radius of each leaf, at least 0: a number, a traced scalar or a
        schedule. The 2-norm of e is rho times the root of the sum of ranks.
      ns_steps: steps of Muon's iteration, at least 0, see `spectral_ascent`.
      normalization: operator T that measures e, such as `elementwise()`, see
        `spectral_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      matrices: leaves to take as matrices, see `spectral_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or ns_steps is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> w = jnp.array([[3.0, 0.0], [0.0, 0.1]])
      >>> print(sam_optax.grad(loss_fn, sam_optax.spectral_sam(0.5))(w).round(2))
      [[3.5 0. ]
       [0.  0.6]]

    References:
      No paper was found, only code of others that perturbs along Muon's step;
      `spectral_ascent` has the norm whose ascent it is.

    Note:
      Two gradient evaluations and one copy of the parameters; 27 products of
      matrices for each leaf.
    """
    ascent = spectral_ascent(
        rho, ns_steps, normalization=normalization, mask=mask, matrices=matrices
    )
    return sharpness_aware(ascent, descent)


def _marked(matrices: Mask | None, grads: optax.Updates, params: Any) -> list[bool]:
    """Which leaves are taken as matrices: by default all that can be."""
    if matrices is None:
        matrices = jax.tree.map(lambda g: jnp.ndim(g) > 1, grads)
    return _masks.chosen(matrices, grads, params, "matrices")


def _move(g: Any, scale: Any, is_matrix: bool, radius: Any, ns_steps: int) -> jax.Array:
    """The perturbation of a leaf: radius T unit, the unit being that of T g."""
    if is_matrix and jnp.ndim(g) < 2:
        raise ValueError(
            "matrices must mark leaves with two dimensions or more, "
            f"got one of shape {jnp.shape(g)}"
        )
    scale = 1 if scale is None else scale
    _, unit = _numerics.norm_and_unit(_numerics.widened(g) * scale)
    if is_matrix:
        whole = _resharded(unit, None)
        whole = _orthogonalised(whole.reshape(-1, g.shape[-1]), ns_steps).reshape(g.shape)
        unit = _resharded(whole, unit)
    return radius * unit * scale


def _resharded(x: jax.Array, like: jax.Array | None) -> jax.Array:
    """Spread over the explicit axes of a mesh as another array is, or over none.

    The product of a matrix with its transpose has no type there if rows are spread.
    """
    sharding = jax.typeof(x if like is None else like).sharding
    if not any(sharding.spec):
        return x
    spec = PartitionSpec() if like is None else sharding.spec
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _orthogonalised(x: jax.Array, steps: int) -> jax.Array:
    """U V^T of a matrix x = U S V^T of norm 1; its zero singular values stay 0."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    times = lambda a, b: jnp.matmul(a, b, precision="highest")
    for a, b, c in [LIFT] * steps + [POLISH] * 4:
        square = times(x, x.conj().T)
        x = a * x + times(b * square + c * times(square, square), x)
    return x.T if tall else x
