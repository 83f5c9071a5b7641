"""Time and memory of eigenvalues and trace at a million parameters, beside matfree and SciPy.

    pip install matfree scipy
    python benchmarks/sharpness.py            # some minutes on two cores
    python benchmarks/sharpness.py --quick    # small, to see that it runs

Every route runs in a process of its own, so that its peak memory is its own, and is timed on its
second call: the first compiles. On a shared machine compare CPU seconds. All routes use float32
products with the same Hessian: 50 steps of Lanczos with full reorthogonalisation, or ARPACK to
its tolerance, and 100 Rademacher probes. matfree's trace maps over batches of probes of the given
size; its default is all at once.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

EXAMPLES, FEATURES, CLASSES = 256, 784, 10
WIDTHS = {False: (784, 480), True: (32, 16)}  # 1.0e6 parameters, or quick
STEPS, PROBES = 50, 100


def problem(quick: bool):
    """A tanh network at random parameters, whose Hessian has both signs."""
    sizes = (FEATURES, *WIDTHS[quick], CLASSES)
    rng = np.random.default_rng(0)
    params = [
        {
            "w": jnp.asarray(rng.normal(size=(a, b)) / a**0.5, jnp.float32),
            "b": jnp.zeros(b),
        }
        for a, b in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.normal(size=(EXAMPLES, FEATURES)), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, EXAMPLES))

    def loss_fn(params, batch):
        x, y = batch
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    return loss_fn, params, (x, y)


def product(loss_fn, params, batch):
    """The Hessian as a function of a flat vector, for the other libraries."""
    w, unravel = ravel_pytree(params)

    def multiply(vector, w, batch):
        gradient = jax.grad(lambda w: loss_fn(unravel(w), batch))
        return jax.jvp(gradient, (w,), (vector,))[1]

    return multiply, w


def ours_eigenvalues(loss_fn, params, batch, steps, probes) -> Callable:
    from sam_optax import sharpness

    def call(seed):
        found = sharpness.hessian_eigenvalues(
            loss_fn, params, batch, key=jax.random.key(seed), steps=steps
        )
        return found.top[0]

    return call


def ours_trace(loss_fn, params, batch, steps, probes) -> Callable:
    from sam_optax import sharpness

    def call(seed):
        key = jax.random.key(seed)
        return sharpness.hessian_trace(loss_fn, params, batch, key=key, probes=probes).value

    return call


def matfree_eigenvalues(loss_fn, params, batch, steps, probes) -> Callable:
    from matfree import decomp

    multiply, w = product(loss_fn, params, batch)
    tridiagonal = decomp.tridiag_sym(steps, reortho="full")

    @jax.jit
    def run(key, w, batch):
        start = jax.random.normal(key, w.shape)
        decomposition = tridiagonal(multiply, start / jnp.linalg.norm(start), w, batch)
        return jnp.linalg.eigvalsh(decomposition.J_small)[-1]

    return lambda seed: run(jax.random.key(seed), w, batch)


def matfree_trace(size: int) -> Callable:
    """Probes in batches of `size` under vmap, the batches one after another."""

    def route(loss_fn, params, batch, steps, probes) -> Callable:
        from matfree import stochtrace

        multiply, w = product(loss_fn, params, batch)
        integrand = stochtrace.monte_carlo_trace()
        sampler = stochtrace.sampler_signs(w, num=min(size, probes))
        estimate = stochtrace.estimator_monte_carlo(integrand, sampler)

        @jax.jit
        def run(key, w, batch):
            keys = jax.random.split(key, max(probes // size, 1))
            return jnp.mean(jax.lax.map(lambda key: estimate(multiply, key, w, batch), keys))

        return lambda seed: run(jax.random.key(seed), w, batch)

    return route


def scipy_eigenvalues(loss_fn, params, batch, steps, probes) -> Callable:
    import scipy.sparse.linalg

    multiply, w = product(loss_fn, params, batch)
    compiled = jax.jit(multiply)

    def call(seed):
        operator = scipy.sparse.linalg.LinearOperator(
            (w.size, w.size),
            matvec=lambda v: np.asarray(compiled(v.ravel(), w, batch)),
            dtype=np.float32,
        )
        start = np.random.default_rng(seed).normal(size=w.size).astype(np.float32)
        return scipy.sparse.linalg.eigsh(
            operator, 5, which="LA", v0=start, tol=1e-3, return_eigenvectors=False
        ).max()

    return call


ROUTES = {
    "nothing (imports and data)": lambda *args: lambda seed: 0.0,
    "eigenvalues, sam_optax": ours_eigenvalues,
    "eigenvalues, matfree": matfree_eigenvalues,
    "eigenvalues, SciPy eigsh, top 5": scipy_eigenvalues,
    "trace, sam_optax": ours_trace,
    "trace, matfree, one at a time": matfree_trace(1),
    "trace, matfree, 10 at a time": matfree_trace(10),
    "trace, matfree, all at once": matfree_trace(10**9),
}


def one(name: str, quick: bool, probes: int) -> dict:
    """First and second call of one route, in this process."""
    call = ROUTES[name](*problem(quick), STEPS, probes)
    seconds = []
    for seed in (0, 1):
        begin, cpu = time.perf_counter(), time.process_time()
        value = float(jax.block_until_ready(call(seed)))
        seconds.append(time.perf_counter() - begin)
        cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first": seconds[0], "second": seconds[1], "cpu": cpu, "peak": peak, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=ROUTES)
    parser.add_argument("--probes", type=int, default=PROBES)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(args.only, args.quick, args.probes)))
        return
    options = ["--quick"] if args.quick else []
    size = sum(w.size for w in jax.tree.leaves(problem(args.quick)[1]))
    print(f"{size} parameters, {EXAMPLES} examples, {STEPS} Lanczos steps, {jax.devices()}")
    print(
        f"{'route':40} {'first s':>8} {'second s':>9} {'its CPU s':>9} {'peak MB':>8} {'value':>9}"
    )
    work = [(name, PROBES) for name in ROUTES] + [
        (name, 10 * PROBES) for name in ROUTES if name == "trace, sam_optax" and not args.quick
    ]
    for name, probes in work:
        command = [sys.executable, __file__, "--only", name, "--probes", str(probes), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        label = f"{name}, {probes} probes" if name.startswith("trace") else name
        if done.returncode:
            print(f"{label:40} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{label:40} {row['first']:8.2f} {row['second']:9.2f} {row['cpu']:9.2f} "
            f"{row['peak']:8.0f} {row['value']:9.4g}"
        )


if __name__ == "__main__":
    main()
