"""Float64 NumPy transcriptions of the papers' equations, and a small network to try them on.

Everything is written out leaf by leaf from the equations, with nothing of the
library, and serves as oracle.
"""

import numpy as np

P_VALUES = (1.0, 1.5, 2.0, 4.0, np.inf)


def network(seed=0, inputs=3, hidden=4, examples=8):
    """Parameters and data of a two-layer network with a convolution-like 3-D leaf."""
    rng = np.random.default_rng(seed)
    params = {
        "w1": rng.normal(size=(inputs, hidden)),
        "b1": rng.normal(size=hidden),
        "w2": rng.normal(size=(2, hidden // 2, 1)),  # filters with more than one axis
        "b2": rng.normal(size=1),
    }
    return params, (rng.normal(size=(examples, inputs)), rng.normal(size=examples))


def loss(xp, params, batch):
    """Mean squared error of the network, in NumPy or jax.numpy."""
    x, y = batch
    hidden = xp.tanh(x @ params["w1"] + params["b1"])
    out = hidden @ params["w2"].reshape(-1, 1) + params["b2"]
    return xp.mean((out[:, 0] - y) ** 2)


def gradient(params, batch):
    """Its gradient by hand."""
    x, y = batch
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    w2 = params["w2"].reshape(-1, 1)
    error = 2 * (hidden @ w2 + params["b2"] - y[:, None]) / len(y)
    back = error @ w2.T * (1 - hidden**2)
    return {
        "w1": x.T @ back,
        "b1": back.sum(0),
        "w2": (hidden.T @ error).reshape(params["w2"].shape),
        "b2": error.sum(0),
    }


def operator(kind, params, eta, normalize_bias):
    """T of ASAM: |w|, the filter's norm or the leaf's norm, plus eta."""
    T = {}
    for name, w in params.items():
        if w.ndim < 2 and not normalize_bias:
            T[name] = np.ones_like(w)
        elif kind == "elementwise" or (kind == "filterwise" and w.ndim < 2):
            T[name] = np.abs(w) + eta
        elif kind == "filterwise":
            T[name] = np.empty_like(w)
            for f in range(w.shape[-1]):
                T[name][..., f] = np.sqrt((w[..., f] ** 2).sum()) + eta
        else:
            T[name] = np.full_like(w, np.sqrt((w**2).sum()) + eta)
    return T


def ascent(g, T, rho, p):
    """The maximiser of <g, e> subject to ||T^-1 e||_p <= rho."""
    Tg = np.concatenate([(T[k] * g[k]).ravel() for k in g])
    if p == 1:
        return {
            k: rho * T[k] * np.sign(g[k]) * (np.abs(T[k] * g[k]) == np.abs(Tg).max()) for k in g
        }
    if p == np.inf:
        return {k: rho * T[k] * np.sign(g[k]) for k in g}
    q = p / (p - 1)
    norm = (np.abs(Tg) ** q).sum() ** (1 / q)
    return {
        k: rho * T[k] * np.sign(g[k]) * np.abs(T[k] * g[k]) ** (q - 1) / norm ** (q - 1) for k in g
    }


def trajectory(params, batch, steps, perturbation, lr=0.05, momentum=0.9, decay=0.01):
    """SGD with momentum and coupled weight decay on the gradient at w + perturbation(w, g)."""
    params = {k: v.copy() for k, v in params.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    for _ in range(steps):
        e = perturbation(params, gradient(params, batch))
        g = gradient({k: params[k] + e[k] for k in params}, batch)
        for k in params:
            velocity[k] = momentum * velocity[k] + g[k] + decay * params[k]
            params[k] = params[k] - lr * velocity[k]
    return params
