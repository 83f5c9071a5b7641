"""Claim 13: SAM's solutions are wide. Hessian eigenvalues along training and at the end.

    python experiments/spectrum.py

Published (Foret et al., 2010.01412, figure 3; WRN-40-10 without BatchNorm on CIFAR-10), lambda_max
and in brackets lambda_max / lambda_5, at epochs 1, 50 and 300: SGD 62.9 (2.5), 12.5 (1.7), 24.2
(11.4); SAM 18.6 (3.6), 8.9 (1.9), 1.0 (2.6). Here: an MLP on 1500 MNIST digits with 40 % wrong
labels, where the loss cannot simply vanish, and with clean labels, where it does and takes the
Hessian with it. The Hessian is that of the training loss without weight decay, by Lanczos.
"""

import functools

import jax
import numpy as np
from _figures import band, panels
from _harness import SIGNIFICANT, Study
from _networks import LANES, fit, lane, loss, no_ascent, sam
from _report import COLORS, spread, welch

from sam_optax import sharpness

EPOCHS = (1, 2, 5, 10, 20, 30, 40)  # at the end of which eigenvalues are measured
STEPS = 30  # of Lanczos; the residuals are kept with the values
DENSITY = {"steps": 50, "probes": 2, "sigma": 0.05}  # of the spectral density, for one seed
# Chosen on validation examples by error_rates.py's grids.
SETTINGS = {
    ("SGD", 0.4): {"lr": 0.2, "weight_decay": 0.03},
    ("SAM", 0.4): {"lr": 0.2, "weight_decay": 0.01, "rho": 0.3},
    ("SGD", 0.0): {"lr": 0.2, "weight_decay": 0.003},
    ("SAM", 0.0): {"lr": 0.2, "weight_decay": 0.01, "rho": 0.2},
}
POINTS = 300  # at which the density is evaluated
METHODS = {"SGD": no_ascent, "SAM": sam}
KEY = jax.random.key(0)  # of all measures, so that all start alike


def loss_of_batch(widths, params, batch):
    return loss(widths, params, *batch)


def main(argv=None):
    study = Study(__file__, __doc__, argv, seeds=4)
    epochs = (1, 2) if study.quick else EPOCHS
    steps = 10 if study.quick else STEPS
    found, densities = {}, {}
    for (name, noise), setting in list(SETTINGS.items())[: 2 if study.quick else None]:
        train = study.load("mnist", noise).train
        recipe = study.recipe("mnist")._replace(method=METHODS[name])
        loss_fn = functools.partial(loss_of_batch, recipe.widths)

        def compute(keys, recipe=recipe, setting=setting, train=train, loss_fn=loss_fn):
            seeds = [key["seed"] for key in keys]
            results = [{"top": [], "ratio": [], "residual": []} for _ in seeds]
            for epoch, networks in enumerate(fit(recipe, [setting] * len(seeds), seeds, train), 1):
                for i, result in enumerate(results if epoch in epochs else []):
                    params = lane(networks.params, i)
                    values = sharpness.hessian_eigenvalues(
                        loss_fn, params, train, key=KEY, steps=steps
                    )
                    result["top"].append(float(values.top[0]))
                    result["ratio"].append(float(values.ratio))
                    result["residual"].append(float(values.top_residuals.max()))
                    if epoch == epochs[-1] and seeds[i] == 0:
                        density = sharpness.spectral_density(
                            loss_fn, params, train, key=KEY, **DENSITY
                        )
                        t = density.grid(POINTS)
                        result["density"] = [t.tolist(), density(t).tolist()]
            return results

        keys = [
            {"method": name, "noise": noise, **setting, "at": epochs, "steps": steps, "seed": seed}
            for seed in range(study.seeds)
        ]
        runs = study.collect(keys, compute, LANES)
        found[name, noise] = {q: np.array([run[q] for run in runs]) for q in ("top", "ratio")}
        densities[name, noise] = runs[0]["density"]
        lines = [
            [epoch, spread(top, 1), spread(ratio, 1)]
            for epoch, top, ratio in zip(
                epochs, *(v.T for v in found[name, noise].values()), strict=True
            )
        ]
        title = f"{name}, {noise:.0%} of labels redrawn"
        study.table(title, ["epoch", "lambda_max", "lambda_max / lambda_5"], lines)

    noises = sorted({noise for _, noise in found}, reverse=True)
    wider, sentences = {}, []
    for noise in noises:
        sgd, sam_ = (found[name, noise]["top"][:, -1] for name in METHODS)
        wider[noise] = sam_.mean() < sgd.mean() and welch(sgd, sam_) < SIGNIFICANT
        ratios = (spread(found[name, noise]["ratio"][:, -1], 1) for name in METHODS)
        sentences.append(
            f"{noise:.0%} noise: lambda_max SGD {spread(sgd, 1)}, SAM {spread(sam_, 1)} "
            f"(p = {welch(sgd, sam_):.1g}), lambda_max / lambda_5 {', '.join(ratios)}"
        )
    study.claim(
        "13: SAM's Hessian eigenvalues are smaller",
        published="lambda_max at the end 24.2 (SGD), 1.0 (SAM); over lambda_5 11.4, 2.6",
        verdict="held" if all(wider.values()) else "held with label noise only"
        if wider[noises[0]] else "did not hold here",
        measured="At the end, " + "; ".join(sentences),
    )  # fmt: skip

    figure, axes = panels(len(noises) + 1, "Hessian of the training loss: SGD and SAM (MNIST)")
    for axis, noise in zip(axes, noises, strict=False):
        for i, name in enumerate(METHODS):
            band(axis, epochs, found[name, noise]["top"], i, f"{name}, lambda_max", marker="o")
            ratio = found[name, noise]["ratio"].mean(0)
            axis.plot(epochs, ratio, "--", color=COLORS[i], label=f"{name}, lambda_max / lambda_5")
        axis.set(title=f"{noise:.0%} of labels redrawn", xlabel="epoch", yscale="log")
        axis.legend(frameon=False, fontsize=8)
    for i, name in enumerate(METHODS):
        axes[-1].plot(*densities[name, noises[0]], color=COLORS[i], label=name)
    axes[-1].set(title=f"spectral density at the end, {noises[0]:.0%} noise", yscale="log")
    axes[-1].set(xlabel="eigenvalue", ylabel="density", ylim=(1e-6, None))
    axes[-1].legend(frameon=False)
    return study.finish(figure)


if __name__ == "__main__":
    main()
