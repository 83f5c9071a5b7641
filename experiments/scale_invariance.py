"""Claim 14: ASAM's sharpness is blind to rescalings that leave the function unchanged.

    python experiments/scale_invariance.py

A ReLU network computes the same function after (W1, b1, W2) -> (a W1, a b1, W2 / a). The one-step
sharpness of SAM and the loss it descends change with a, though nothing about the network did; those
of ASAM with T = |w| on all leaves and eta = 0 do not, those of its usual settings (eta = .01,
T = 1 on biases) nearly. Then the toy problem L(w) = |w1 relu(w2) - 0.04|: all points of the valley
w1 w2 = 0.04 are the same function. Where it is far narrower along one axis than along the other,
SAM's perturbation jumps over it to where relu(w2) = 0, has no gradient there and stays; ASAM's is
relative and goes on (a toy of this kind is in figure 3 of Kwon et al., 2102.11600).
"""

import jax
import jax.numpy as jnp
import numpy as np
from _figures import panels
from _harness import Study
from _networks import LANES, fit, lane, loss
from _report import COLORS, MARKERS

import sam_optax
from sam_optax import sharpness

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # a; powers of two, so that rescaling rounds nothing
MEASURES = {  # T (None is 1) and rho: SAM's and those near ASAM's best on such networks
    "SAM": (None, 0.2),
    "ASAM, eta 0": (sam_optax.elementwise(0.0, normalize_bias=True), 2.0),
    "ASAM, eta 0, filters": (sam_optax.filterwise(0.0, normalize_bias=True), 0.2),
    "ASAM, eta 0.01": (sam_optax.elementwise(0.01, normalize_bias=True), 2.0),
    "ASAM, eta 0, bias T = 1": (sam_optax.elementwise(0.0), 0.5),
}
EXACT = ("ASAM, eta 0", "ASAM, eta 0, filters")  # those that theory calls invariant
ROUNDING = 1e-3  # relative change that is called none; float32 sums differ by less
TOY = {"SAM": sam_optax.sam(0.05), "ASAM": sam_optax.asam(0.5, 0.0, normalize_bias=True)}
TOY_STARTS = (
    (0.5, 0.5),
    (1.5, 0.03),
)  # above the valley; where it is narrow along w2, wide along w1
TOY_RATE, TOY_STEPS = 0.01, 1000


def rescaled(params, a):
    """The same function: a hidden layer times a, the kernel after it over a."""
    layers = dict(params["params"])
    layers["Dense_0"] = jax.tree.map(lambda w: a * w, layers["Dense_0"])
    layers["Dense_1"] = layers["Dense_1"] | {"kernel": layers["Dense_1"]["kernel"] / a}
    return {"params": layers}


def toy(w):
    return jnp.abs(w[0] * jax.nn.relu(w[1]) - 0.04)


def trajectory(method, start):
    """(steps + 1, 2) points of gradient descent on the toy problem."""
    gradient = sam_optax.grad(toy, method)
    step = lambda w, _: (w - TOY_RATE * gradient(w), w)
    return np.asarray(jax.lax.scan(step, jnp.array(start), length=TOY_STEPS + 1)[1])


def main(argv=None):
    study = Study(__file__, __doc__, argv, seeds=4)
    split, recipe = study.load("mnist"), study.recipe("mnist", epochs=10)
    loss_fn = lambda params, batch: loss(recipe.widths, params, *batch)
    setting = {"lr": 0.1, "weight_decay": 0.001}

    def compute(keys):
        seeds = [key["seed"] for key in keys]
        *_, networks = fit(recipe, [setting] * len(seeds), seeds, split.train)
        for i in range(len(seeds)):
            result = {}
            for name, (operator, rho) in MEASURES.items():
                measure = lambda a, operator=operator, rho=rho, i=i: sharpness.one_step(
                    *(loss_fn, rescaled(lane(networks.params, i), a), split.train),
                    rho=rho, normalization=operator,
                ).value  # fmt: skip
                result[name] = [measure(a) for a in SCALES]
            yield result

    keys = [{**setting, "epochs": recipe.epochs, "seed": seed} for seed in range(study.seeds)]
    runs = study.collect(keys, compute, LANES)
    ratios = {n: np.array([run[n] for run in runs]) for n in MEASURES}
    ratios = {n: values / values[:, [SCALES.index(1.0)]] for n, values in ratios.items()}
    lines = [[n, *(f"{x:.4g}" for x in values.mean(0))] for n, values in ratios.items()]
    header = ["", *(f"a = {a:g}" for a in SCALES)]
    study.table("Sharpness of the rescaled network over that at a = 1", header, lines)
    change = {n: float(np.abs(values - 1).max()) for n, values in ratios.items()}

    stays = {n: {s: trajectory(m, s) for s in TOY_STARTS} for n, m in TOY.items()}
    mean_loss = lambda path: float(np.mean(jax.vmap(toy)(path[-50:])))
    final = {n: {s: mean_loss(p) for s, p in paths.items()} for n, paths in stays.items()}
    ends = [
        f"{n} from {s} to ({p[-1][0]:.3f}, {p[-1][1]:.3f}), loss {final[n][s]:.4f}"
        for n, paths in stays.items()
        for s, p in paths.items()
    ]
    study.claim(
        "14: ASAM's sharpness is invariant to rescaling, SAM's is not",
        published="proved; toy problem in a figure",
        verdict="held"
        if max(change[n] for n in EXACT) < ROUNDING < change["SAM"]
        else "did not hold",
        measured="Largest relative change for a in 1/4 to 4: "
        + ", ".join(f"{n} {x:.1g}" for n, x in change.items()),
    )
    narrow = {n: losses[TOY_STARTS[1]] for n, losses in final.items()}
    study.claim(
        "14, toy problem: unequal axes hinder SAM, not ASAM",
        published="figure",
        # ASAM goes on where SAM stops, but swings across the valley rather than along it.
        verdict="held in part" if narrow["ASAM"] < narrow["SAM"] else "did not hold here",
        measured="; ".join(ends),
    )

    figure, axes = panels(2, "Rescaling that leaves the function unchanged", 4.8)
    for i, (n, values) in enumerate(ratios.items()):
        looks = {"marker": MARKERS[i], "color": COLORS[i], "ls": "-" if i < 2 else "--"}
        axes[0].plot(SCALES, values.mean(0), label=n, **looks)
    axes[0].set(xscale="log", yscale="log", xlabel="a: (a W1, a b1, W2 / a)")
    axes[0].set_xticks(SCALES, ["1/4", "1/2", "1", "2", "4"])
    axes[0].set_yticks((1, 2, 4), ("1", "2", "4"))
    axes[0].minorticks_off()
    axes[0].set(title="sharpness, over that at a = 1", ylabel="ratio (log scale)")
    axes[0].legend(frameon=False, fontsize=8)
    valley = np.array([0.05, 3])
    axes[1].plot(valley, 0.04 / valley, color="0.6", lw=4, label="valley w1 w2 = 0.04")
    for i, (n, paths) in enumerate(stays.items()):
        for s, p in paths.items():
            color, label = COLORS[i], n if s == TOY_STARTS[0] else None
            axes[1].plot(p[:, 0], p[:, 1], color=color, lw=1, label=label, ls=("-", "--")[i])
            axes[1].plot(*p[-1], MARKERS[i], color=color, ms=6)
    axes[1].plot(*np.transpose(TOY_STARTS), "kx", label="start")
    axes[1].set(xlabel="w1 (log scale)", xlim=(0.15, 2), xscale="log")
    axes[1].set(ylabel="w2 (log scale)", ylim=(0.005, 0.7), yscale="log")
    axes[1].set_xticks((0.2, 0.5, 1, 2), ("0.2", "0.5", "1", "2"))
    axes[1].set_yticks((0.01, 0.03, 0.1, 0.3), ("0.01", "0.03", "0.1", "0.3"))
    axes[1].minorticks_off()
    axes[1].set_title("toy problem |w1 relu(w2) - 0.04|")
    axes[1].legend(frameon=False)
    return study.finish(figure)


if __name__ == "__main__":
    main()
