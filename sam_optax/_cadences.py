"""Cadences: methods that pay for the perturbed gradient at some steps only.

Each wraps a whole method. On a step that is not paid for, the clean gradient
passes and the method's state stands still. For a cadence whose skipped steps
do something else, or let the ascent's memory run on, give `when` and
`otherwise` to `sharpness_aware`, as `look_sam` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._gradients import refuse_in_branch
from sam_optax._sharpness_aware import cadence_of, in_one_dtype
from sam_optax._types import Radius, When, transformation


class CadencedState(NamedTuple):
    """State of a method under a cadence: that of the cadence and that of the method."""

    cadence: optax.OptState
    method: optax.OptState


class RandomCadenceState(NamedTuple):
    """Memory of `randomised`: steps seen, and data of the key of the next step."""

    count: jax.typing.ArrayLike
    key: jax.Array


class AdaptiveCadenceState(NamedTuple):
    """Memory of `adaptive`: steps seen, and running mean and variance of ||g||^2."""

    count: jax.typing.ArrayLike
    mean: jax.Array
    variance: jax.Array


def randomised(
    method: optax.GradientTransformation,
    probability: Radius = 0.5,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Pays for the perturbed gradient with a probability: randomised sharpness-aware training.

    Trades a part of the method's gain for a part of its cost; a schedule of
    the probability moves the cost to the phase where it helps.

        out = method(g) with probability p, else g

    Args:
      method: any method.
      probability: in [0, 1]: a number, a traced scalar or a schedule of the
        step.
      key: seed or key; the state keeps the next one. The same key everywhere
        makes all devices decide alike.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if probability is outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.randomised(sam_optax.sam(0.5), probability=0.5)
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> step = jax.jit(lambda state: tx.update(w, state, w, value_fn=loss_fn))
      >>> state, norms = tx.init(w), []
      >>> for _ in range(100):
      ...     out, state = step(state)
      ...     norms.append(round(float(jnp.linalg.norm(out)), 1))
      >>> print(30 < norms.count(5.5) < 70, set(norms) == {5.0, 5.5})
      True True

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting
      Computational Efficiency in Deep Learning
      <https://arxiv.org/abs/2203.09962>`_, 2022.

    Note:
      1 + p gradient evaluations a step.
    """
    _checks.in_interval("probability", probability, "[0, 1]")
    first, draw = _numerics.key_stream(key)

    def init(params: optax.Params) -> RandomCadenceState:
        del params
        return RandomCadenceState(jnp.zeros([], jnp.int32), first)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, RandomCadenceState]:
        del updates, params, extra_args
        chance = probability(state.count) if callable(probability) else probability
        next_key, (own,) = draw(state.key)
        pay = jax.random.bernoulli(own, chance)
        return pay, RandomCadenceState(optax.safe_increment(state.count), next_key)

    return _under(method, transformation(init, update))


def adaptive(
    method: optax.GradientTransformation,
    steps: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike = 0.9,
    c_start: float = 1.0,
    c_end: float = -1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Pays for the perturbed gradient where the gradient is unusually large.

    AE-SAM: a large gradient marks a sharp region. About half of the steps are
    paid for, more of them late.

        mu <- decay mu + (1 - decay) s,  var <- decay var + (1 - decay) (s - mu)^2,
        pay if s >= mu + c_t sqrt(var),  s = ||g||^2,
        c_t = c_start + (c_end - c_start) t/steps

    Args:
      method: any method.
      steps: length of training, at least 1; may be traced.
      decay: of the running mean and variance, in [0, 1).
      c_start: threshold at step 0, in standard deviations.
      c_end: where the threshold goes; below c_start pays more often late. The
        last step, steps - 1, is at (steps - 1)/steps of the way, just short of
        it; steps beyond stay at c_end.

    Returns:
      A transformation with state: chain it. The first step is always paid for.

    Raises:
      ValueError: if steps is below 1 or decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.adaptive(sam_optax.sam(0.5), steps=10)
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(jnp.zeros(2))
      >>> for scale in (1.0, 0.1, 2.0):
      ...     w = scale * jnp.array([3.0, 4.0])
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(jnp.linalg.norm(out).round(2))
      5.5
      0.5
      10.5

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023. From secondary sources: no
      code of the authors was found; mean and variance start at the first value
      and 0, which is our choice.

    Note:
      One to two gradient evaluations a step.
    """
    steps = _checks.integer_at_least("steps", steps, 1, traced=True)
    _checks.in_interval("decay", decay, "[0, 1)")

    def init(params: optax.Params) -> AdaptiveCadenceState:
        del params
        return AdaptiveCadenceState(
            jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
        )

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, AdaptiveCadenceState]:
        del params, extra_args
        norm, _ = _numerics.norm_and_unit(updates)
        s = (norm**2).astype(jnp.float32)
        first = state.count == 0
        mean = jnp.where(first, s, decay * state.mean + (1 - decay) * s)
        spread = decay * state.variance + (1 - decay) * (s - mean) ** 2
        part = jnp.minimum(jnp.asarray(state.count) / steps, 1.0)
        threshold = mean + (c_start + (c_end - c_start) * part) * jnp.sqrt(spread)
        new = AdaptiveCadenceState(
            optax.safe_increment(state.count),
            mean.astype(jnp.float32),
            spread.astype(jnp.float32),
        )
        # A step that is not finite is paid for, so that guards see it, and forgotten.
        return ~(s < threshold), _numerics.keep_if_nonfinite(updates, new, state)

    return _under(method, transformation(init, update))


def late_phase(
    method: optax.GradientTransformation, start: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""The method from one step on, the clean gradient before it.

    The paper finds that SAM in the last few epochs reaches minima about as
    flat as SAM throughout, at a fraction of the cost.

        out = g before step `start`, method(g) from then on

    Args:
      method: any method.
      start: first step that is paid for, at least 0; may be traced.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if start is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.late_phase(sam_optax.sam(0.5), start=1)
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out)
      [3. 4.]
      [3.3 4.4]

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter
      Minima Late in Training <https://arxiv.org/abs/2410.10373>`_, 2024. The
      authors' code starts SAM with an empty momentum buffer; here the base
      optimizer goes on.

    Note:
      One gradient evaluation a step before `start`, then those of the method.
    """
    start = _checks.integer_at_least("start", start, 0, traced=True)
    return _under(method, lambda count: count >= start)


def _under(
    method: optax.GradientTransformation, when: When
) -> optax.GradientTransformationExtraArgs:
    """The method at the steps of the cadence, the clean gradient at the others."""
    method = optax.with_extra_args_support(method)
    cadence = cadence_of(when)

    def init(params: optax.Params) -> CadencedState:
        return CadencedState(cadence.init(params), method.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, CadencedState]:
        _checks.given("params", params, "the gradient is taken at a perturbed copy of them")
        refuse_in_branch(extra_args.get("descent_grad_fn"))
        pay, cadence_state = cadence.update(updates, state.cadence, params, **extra_args)
        result, method_state = jax.lax.cond(
            pay,
            in_one_dtype(
                lambda: method.update(updates, state.method, params, **extra_args), updates, params
            ),
            in_one_dtype(lambda: (updates, state.method), updates, params),
        )
        return result, CadencedState(cadence_state, method_state)

    return transformation(init, update)
