"""rho without a grid: three rules against a tuned rho, by the same search at equal compute.

    python experiments/rho_rules.py

(1) rho in proportion to the learning rate, as GSAM has it, from the library's default at its peak.
(2) A target for the rise of the loss: rho follows, so that L(w + e) - L(w) is a tenth of L(w).
(3) A range test: rho grows over thirty steps from the start until the training loss stops falling;
training then has half of the rho of that step. The gradients of the test are paid for by a shorter
training. Each rule searches learning rate, weight decay and length, as SAM does with rho besides;
the rows of the base and of SAM are those of does_it_pay.py, shared through its log. A rule is worth
offering if it keeps nine tenths of the tuned rho's gain on at least four tasks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from _figures import panels
from _harness import SIGNIFICANT, Study
from _paying import Row, base_name, compare
from _report import COLORS, MARKERS, spread
from _tasks.task import Examples, Task
from _training import BASE, SAM, Carry, Hyper, Method, fit, shape
from _trials import SEEDS
from does_it_pay import instances, parser_of

import sam_optax

TASKS, WRONG = ("mlp", "text", "fine_tuning"), (0.0, 0.4)
PEAK = 0.05  # rho at the peak of the learning rate, rule 1
TARGET = 0.1  # rise of the loss over the loss, rule 2
FASTEST = 1.1  # most that rho changes by in a step, rule 2
LOW, HIGH, STEPS = 0.01, 2.0, 30  # of rho in the range test, rule 3
SMOOTHED = 0.7  # weight of the past in the loss of the range test
BACK = 2.0  # from the rho at which the loss was least
KEPT, ENOUGH = 0.9, 4  # of the gain, on so many tasks


def _proportional(hyper: Hyper, base: Any) -> Any:
    rising = shape(hyper)
    return optax.chain(sam_optax.sam(lambda count: PEAK * rising(count)), base)


class RiseState(NamedTuple):
    """The rho of the coming step."""

    rho: Any


def sam_of_rise(target: float, start: float = PEAK) -> optax.GradientTransformationExtraArgs:
    """SAM whose rho follows, so that the loss rises by a share of itself.

    The rise is measured by the mean of both gradients along e, at no pass of its own.
    """

    def init(params: optax.Params) -> RiseState:
        del params
        return RiseState(jnp.asarray(start))

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **more: Any) -> Any:
        method = sam_optax.sam(state.rho)
        sharp, _ = method.update(updates, method.init(params), params, **more)
        norm = optax.tree.norm(updates)
        rise = state.rho * (norm + optax.tree.vdot(updates, sharp) / norm) / 2
        factor = jnp.clip(target * value / rise, 1 / FASTEST, FASTEST)
        factor = jnp.where(rise > 0, factor, jnp.where(rise <= 0, FASTEST, 1.0))  # NaN: as it was
        return sharp, RiseState(state.rho * factor)

    return optax.GradientTransformationExtraArgs(init, update)


class RampState(NamedTuple):
    """What the range test reads: the loss before the last step."""

    ramp: Any
    value: Any


def ramp(low: float, high: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """SAM whose rho grows by a constant factor from step to step."""
    method = sam_optax.sam(lambda count: low * (high / low) ** (count / (steps - 1)))

    def init(params: optax.Params) -> RampState:
        return RampState(method.init(params), jnp.zeros([]))

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **more: Any) -> Any:
        sharp, inner = method.update(updates, state.ramp, params, **more)
        return sharp, RampState(inner, value)

    return optax.GradientTransformationExtraArgs(init, update)


def _ramp(hyper: Hyper, base: Any) -> Any:
    return optax.chain(ramp(LOW, HIGH, STEPS), base)


RAMP = Method("ramp", _ramp, 2, None)


@functools.cache
def _step_by_step(task: Task) -> Task:
    return dataclasses.replace(task, chunk=1)


def stepped_back(losses: list[float]) -> float:
    """The rho of a range test from the losses of its steps."""
    smooth, least, best = losses[0], np.inf, 0
    for step, loss in enumerate(losses):
        smooth = SMOOTHED * smooth + (1 - SMOOTHED) * loss
        if not np.isfinite(smooth):
            break
        if smooth < least:
            least, best = smooth, step
    return LOW * (HIGH / LOW) ** (best / (len(losses) - 1)) / BACK


def range_test(task: Task, setting: dict[str, float], seed: int, examples: Examples) -> Any:
    losses: list[float] = []

    def watch(step: int, carry: Carry) -> None:
        losses.append(float(carry.opt_state[0].value))

    # The learning rate warms up and stays near its peak.
    options = {"horizon": 4 * STEPS, "watch": watch}
    fit(_step_by_step(task), RAMP, setting, seed, examples, STEPS, **options)
    return {"rho": stepped_back(losses)}


def _constant(hyper: Hyper, base: Any) -> Any:
    return optax.chain(sam_optax.sam(hyper["rho"]), base)


def _rise(hyper: Hyper, base: Any) -> Any:
    return optax.chain(sam_of_rise(TARGET), base)


RULES = (
    Method("rho ~ learning rate", _proportional, 2, None),
    Method("rise of the loss", _rise, 2, None),
    Method("range test", _constant, 2, None, probe=range_test, overhead=2 * STEPS),
)


def gains(rows: dict[str, Row]) -> bool:
    """Whether SAM with a tuned rho is better than the base."""
    sam = rows[SAM.name]
    return max(sam.p_welch, sam.p_paired) < SIGNIFICANT and sam.mean < rows[BASE.name].mean


def share(rows: dict[str, Row], name: str) -> float:
    """Part of the tuned rho's gain that a rule keeps; NaN where there is none."""
    if not gains(rows):
        return float("nan")
    base = rows[BASE.name].mean
    return (base - rows[name].mean) / (base - rows[SAM.name].mean)


def main(argv=None):
    study = Study(
        __file__, __doc__, argv, seeds=SEEDS, parser=parser_of(__doc__), log="does_it_pay"
    )
    tasks, wrong = (TASKS[:1], WRONG[1:]) if study.quick else (TASKS, WRONG)
    ahead = instances(study, tasks, wrong)
    methods = (BASE, SAM, *RULES)
    for trials in ahead:
        for method in methods:
            trials.expect(method)
    results = {}
    for trials in ahead:
        rows = compare(trials, methods)
        results[trials.name] = trials, rows
        lines = [
            (
                base_name(trials.task) if name == BASE.name else name,
                spread(row.errors),
                f"{share(rows, name):.0%}" if row is not rows[BASE.name] else "",
                f"{row.p_welch:.1g}, {row.p_paired:.1g}" if row is not rows[BASE.name] else "",
                f"{np.median([r['rho'] for r in row.runs]):.2g}" if "rho" in row.runs[0] else "",
            )
            for name, row in rows.items()
        ]
        header = ["", "test error %", "of SAM's gain", "p against the base", "rho found"]
        study.table(trials.name, header, lines)
    header = ["", "base", "SAM, rho tuned", *(rule.name for rule in RULES)]
    study.page("rho without a grid", [header, *(
        [name, f"{base_name(trials.task)} {rows[BASE.name].told(1)}",
         *(rows[m.name].told(1) for m in (SAM, *RULES))]
        for name, (trials, rows) in results.items()
    )])  # fmt: skip
    gained = {name: rows for name, (_, rows) in results.items() if gains(rows)}
    for rule in RULES:
        shares = {name: share(rows, rule.name) for name, rows in gained.items()}
        kept = [name for name, part in shares.items() if part >= KEPT]
        study.claim(
            f"rho without a grid: {rule.name}",
            published="-",
            verdict="a rule to offer" if len(kept) >= ENOUGH
            else f"not offered: nine tenths of SAM's gain on {len(kept)} of {len(gained)} tasks "
            "where SAM gains",
            measured="; ".join(
                f"{name}: {base_name(trials.task)} {rows[BASE.name].mean:.1f} %, tuned rho "
                f"{rows[SAM.name].mean:.1f} %, {rule.name} {rows[rule.name].mean:.1f} %"
                for name, (trials, rows) in results.items()
            ),
        )  # fmt: skip
    return study.finish(draw(results))


def draw(results: dict[str, Any]) -> Any:
    figure, axes = panels(len(results), "rho without a grid, at equal compute", 4.4, 3.2)
    for axis, (name, (trials, rows)) in zip(axes, results.items(), strict=True):
        for i, row in enumerate(rows.values()):
            places = i + np.linspace(-0.2, 0.2, len(row.runs))
            axis.plot(places, row.errors, MARKERS[i], color=COLORS[i], alpha=0.6, ms=4, mew=0)
            axis.hlines(row.mean, i - 0.3, i + 0.3, color=COLORS[i], lw=2)
        for reference, look in ((BASE.name, "--"), (SAM.name, ":")):
            axis.axhline(rows[reference].mean, color="0.5", lw=0.8, ls=look, zorder=0)
        names = [base_name(trials.task), "SAM,\ntuned", "rho ~\nrate", "rise", "range\ntest"]
        axis.set_xticks(range(len(rows)), names, size=8)
        axis.set_ylabel("test error (%)")
        axis.set_title(name, size=9)
    return figure


if __name__ == "__main__":
    main()
