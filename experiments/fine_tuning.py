"""Claim 12: SAM helps in fine-tuning as it does from scratch.

    python experiments/fine_tuning.py

Published (Foret et al., 2010.01412): EfficientNets pretrained on ImageNet or larger sets and then
fine-tuned have lower error with SAM than with SGD on nearly all of a dozen data sets. Here: an MLP
pretrained by SGD on all MNIST digits 0 to 4, then fine-tuned on 20 examples of each of 5 to 9,
clean and with 40 % wrong labels, by SGD, SAM and ASAM; and the same from scratch. Every method has
twelve settings to choose from, by 200 validation examples of each class.
"""

import functools
import itertools

import jax
import numpy as np
from _figures import dots, panels
from _harness import Arm, Study, grid
from _networks import asam, fit, lane, sam, stacked
from _splits import Split, images

NOISE = (0.0, 0.4)  # of the few labels
PER_CLASS = 20  # training examples of each new class
VALIDATION = 200  # of each new class; the rest are for the test
OLD = 5  # classes below it are for pretraining
PRETRAINING = {"lr": 0.1, "weight_decay": 0.001}
PRETRAINING_EPOCHS = 20
GRIDS = {
    "SGD": grid(lr=(0.003, 0.01, 0.03), weight_decay=(0.01, 0.03, 0.1, 0.3)),
    "SAM": grid(lr=(0.01, 0.03), weight_decay=(0.01, 0.1), rho=(0.1, 0.2, 0.4)),
    "ASAM": grid(lr=(0.01, 0.03), weight_decay=(0.01, 0.1), rho=(1, 2, 4)),
}
METHODS = {"SAM": sam, "ASAM": asam}


def splits(study, noise):
    """(Examples of the old classes, split of the new classes): all disjoint."""
    x, y = images("digits" if study.quick else "mnist", study.out)
    rng = np.random.default_rng(0)
    old = np.flatnonzero(y < OLD)
    parts = [rng.permutation(np.flatnonzero(y == c)) for c in range(OLD, 10)]
    validation = VALIDATION // (4 if study.quick else 1)
    ends = (0, PER_CLASS, PER_CLASS + validation, None)
    new = [np.concatenate([p[a:b] for p in parts]) for a, b in itertools.pairwise(ends)]
    x = ((x - x[old].mean()) / x[old].std()).astype(np.float32)
    redrawn = rng.random(len(new[0])) < noise
    noisy = np.where(redrawn, rng.integers(OLD, 10, len(new[0])), y[new[0]])
    labels = (noisy, y[new[1]], y[new[2]])
    sets = [(x[rows], label.astype(np.int32)) for rows, label in zip(new, labels, strict=True)]
    return jax.device_put((x[old], y[old].astype(np.int32))), Split(
        f"new classes, noise {noise:g}", *jax.device_put(sets)
    )


def main(argv=None):
    study = Study(__file__, __doc__, argv, seeds=20, tuning_seeds=4)
    pretraining = study.recipe("mnist", epochs=PRETRAINING_EPOCHS)
    base = study.recipe("mnist", epochs=60)._replace(batch=20)
    old, _ = splits(study, 0.0)

    @functools.cache
    def pretrained(seed):
        *_, networks = fit(pretraining, [PRETRAINING], [seed], old)
        return lane(networks.params, 0)

    starts = {"fine-tuned": lambda seeds: stacked([pretrained(s) for s in seeds])}
    starts |= {} if study.quick else {"from scratch": None}
    results = {}
    for noise in NOISE[1:] if study.quick else NOISE:
        _, split = splits(study, noise)
        for how, start in starts.items():
            arms = [Arm("SGD", base, GRIDS["SGD"])]
            arms += [
                Arm(name, base._replace(method=method), GRIDS[name])
                for name, method in METHODS.items()
            ]
            context = {"how": how}
            rows = study.compare(arms, split, context=context, start=start)
            results[noise, how] = rows
            study.compared(f"{how}, {noise:.0%} of labels redrawn", rows, rows["SGD"])

    tuned = {key: rows for key, rows in results.items() if key[1] == "fine-tuned"}
    wins = {n: [r[n].beats(r["SGD"]) for r in tuned.values()] for n in METHODS}
    answers = [answer for answers in wins.values() for answer in answers]
    study.claim(
        "12: SAM and ASAM help in fine-tuning as from scratch",
        published="lower error on nearly all of a dozen data sets (EfficientNets)",
        verdict="held" if all(answers) else "held in part" if any(answers) else "did not hold here",
        measured="; ".join(
            f"{how}, {noise:.0%} noise: {rows['SAM'].against(rows['SGD'])}, "
            f"{rows['ASAM'].against(rows['SGD'])}"
            for (noise, how), rows in results.items()
        ),
    )
    figure, axes = panels(len(results), "MNIST 5 to 9 from 20 examples each", 3.2)
    for axis, ((noise, how), rows) in zip(axes, results.items(), strict=True):
        dots(axis, rows.values())
        axis.set_title(f"{how}, {noise:.0%} noise", size=9)
    return study.finish(figure)


if __name__ == "__main__":
    main()
