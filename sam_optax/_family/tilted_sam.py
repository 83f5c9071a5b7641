"""Tilted SAM (Li et al., 2024): many perturbations, the worse ones with more weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._family.random_perturbation import each_draw
from sam_optax._joined import in_turn
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization, Result


class GaussianNoiseState(NamedTuple):
    """Memory of `gaussian_noise`: data of the key of the next step."""

    key: jax.Array


class PerturbedLossState(NamedTuple):
    """The loss at the perturbed point of the last step, 0 at first."""

    loss: jax.Array


def gaussian_noise(key: int | jax.Array = 0) -> optax.GradientTransformationExtraArgs:
    r"""A filter that hands on standard normal noise in place of the gradient.

    Before `dual_ascent` it gives a perturbation that is uniform on the sphere
    of radius rho, in the norm of its normalization and over its mask;
    `gaussian_ascent` is noise in proportion to the weights.

        out ~ N(0, 1)

    Args:
      key: seed or key; the state keeps the next one.

    Returns:
      A filter with state. Of several draws in a step (`draws`, `tilted`) each
      has its own noise.

    Raises:
      ValueError: at the call, without params.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> ascent = optax.chain(sam_optax.gaussian_noise(), sam_optax.dual_ascent(rho=0.5))
      >>> w = jnp.zeros(100)
      >>> print(jnp.linalg.norm(ascent.update(w, ascent.init(w), w)[0]))
      0.5

    References:
      As for `tilted_sam`.

    Note:
      No gradient evaluation; a normal variable per parameter.
    """
    first, draw = _numerics.key_stream(key)

    def update(
        updates: Any, state: Any, params: Any = None, *, draw_index: Any = (0, 1), **_: Any
    ) -> Result:
        del updates
        _checks.given("params", params, "noise has their shapes")
        index, count = draw_index
        next_key, keys = draw(state.key, count)
        return _numerics.random_normal(keys[index], params), GaussianNoiseState(next_key)

    return transformation(lambda params: GaussianNoiseState(first()), update)


def keep_loss() -> optax.GradientTransformationExtraArgs:
    r"""A descent that passes its gradient on and keeps the loss at the perturbed point.

    For `tilted`, which weighs draws by it, and for logs.

        out = g_s;  l <- L(w + e)

    Returns:
      A descent rule whose state is the loss, a `PerturbedLossState`; it chains
      with others. It needs value_fn, the loss that g_s is the gradient of.

    Raises:
      ValueError: at the call, without value_fn or outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.sam(rho=0.5, descent=sam_optax.keep_loss())
      >>> w = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(w, tx.init(w), w, value_fn=lambda w: jnp.sum(w**2) / 2)
      >>> print(state.descent.loss)
      15.125

    References:
      As for `tilted_sam`.

    Note:
      A forward pass, which inside of jit is that of g_s.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, perturbation: Any, value_fn: Any, **_: Any
    ) -> Result:
        loss = value_fn(optax.apply_updates(params, perturbation))
        return updates, PerturbedLossState(jnp.asarray(loss, state.loss.dtype))

    return transformation(lambda params: PerturbedLossState(jnp.zeros([])), update)


def tilted(
    method: optax.GradientTransformation, count: int, tilt: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of several random draws of a method, weighed by their perturbed losses.

    Between `draws`, their plain mean (tilt 0), and the worst of them alone.

        out = sum over draws of softmax(tilt L(w + e_i)) method_i(g)

    Args:
      method: a method with a random ascent and `keep_loss` among its descents.
      count: number of draws, at least 1.
      tilt: any number: weight of the loss. A number or a traced scalar.

    Returns:
      A transformation with the state of the method.

    Raises:
      ValueError: if count is below 1 or tilt is no number; at the call, if the
        method keeps no loss.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> noisy = sam_optax.sharpness_aware(
      ...     sam_optax.gaussian_ascent(0.5), sam_optax.keep_loss())
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.ones(2)
      >>> for tilt in (0.0, 9.0):
      ...     tx = sam_optax.tilted(noisy, 50, tilt)
      ...     out, _ = tx.update(w, tx.init(w), w, value_fn=loss_fn)
      ...     print(jnp.linalg.norm(out) > 4)  # the gradient of the worst draw
      False
      True

    References:
      As for `tilted_sam`.

    Note:
      The gradients of the method, count times. The draws come one after another.
    """
    count = _checks.integer_at_least("count", count, 1)
    _checks.in_interval("tilt", tilt, "(-inf, inf)")
    method = optax.with_extra_args_support(method)

    def update(updates: optax.Updates, state: Any, params: Any = None, **given: Any) -> Result:
        outs, memories = each_draw(method, count, updates, state, params, **given)
        weights = jax.nn.softmax(tilt * jnp.stack([_loss_in(memory) for memory in memories]))
        weigh = lambda *gradients: sum(w * g for w, g in zip(weights, gradients, strict=True))
        return _numerics.map_wide(weigh, *outs), memories[-1]

    return transformation(method.init, update)


def tilted_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    tilt: jax.typing.ArrayLike = 1.0,
    samples: int = 3,
    radius: optax.ScalarOrSchedule = 1.0,
    key: int | jax.Array = 0,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Tilted SAM: SAM's ascent from several random points, the worse ones with more weight.

    A soft maximum over the neighbourhood in place of one point of it. For
    study: it costs two gradients a draw.

        n_i uniform with ||n_i|| = radius;  e_i = n_i + rho unit(grad L(w + n_i));
        out = sum over i of softmax(tilt L(w + e_i)) grad L(w + e_i)

    Args:
      rho: radius of the ascent, at least 0: a number, a traced scalar or a
        schedule.
      tilt: weight of the losses: 0 is the plain mean, infinity the worst draw.
      samples: number of draws, at least 1.
      radius: of the random start, at least 0; with 0 and one draw it is SAM.
      key: seed or key; the state keeps the next one.
      p: order of the norm of the ascent, see `dual_ascent`; that of the start is 2.
      normalization: operator T that measures start and ascent, such as
        `elementwise()`, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation with state: chain it. Its update needs params and value_fn
      beside grad_fn; the gradients given are unused.

    Raises:
      ValueError: if rho or radius is negative or samples below 1; at the call,
        without value_fn.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = sam_optax.tilted_sam(rho=0.5, radius=0.0)
      >>> print(tx.update(w, tx.init(w), w, value_fn=loss_fn)[0].round(2))
      [3.3 4.4]

    References:
      Li et al., `Tilted Sharpness-Aware Minimization
      <https://arxiv.org/abs/2410.22656>`_, 2024; the form and the defaults of
      the authors' code, whose start is Gaussian noise cut off at the radius: on
      the sphere for any network of some size.

    Note:
      Two gradient evaluations a draw, one after another, and samples gradients
      of memory. Depends on the scale of the loss by tilt.
    """
    samples = _checks.integer_at_least("samples", samples, 1)
    _checks.at_least("radius", radius, 0.0)
    start = dual_ascent(radius, normalization=normalization, mask=mask)
    climb = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    ascent = in_turn(optax.chain(gaussian_noise(key), start), climb)
    return tilted(sharpness_aware(ascent, keep_loss()), samples, tilt)


def _loss_in(memory: optax.OptState) -> jax.Array:
    is_loss = lambda x: isinstance(x, PerturbedLossState)
    found = [x for x in jax.tree.leaves(memory, is_leaf=is_loss) if is_loss(x)]
    if len(found) != 1:
        raise ValueError(
            f"method must hold one keep_loss among its descents, got {len(found)} of them"
        )
    return found[0].loss
