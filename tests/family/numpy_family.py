"""Float64 NumPy transcriptions of the family's equations, as oracle; nothing of the library.

A rule is (w, g, grad, memory, **arguments) -> the gradient that the base optimizer sees; the
arguments are named as in the library. memory is a dict that the rule owns and that starts empty
but for t, the count of its steps, value and tail, the loss that grad differentiates and the
gradient of a part of it, and ascend, the ascent's gradient where grad is that of the descent alone.
Trees are dicts of arrays.
"""

import functools

import numpy as np
import numpy_reference as ref


def add(a, s, b):
    return {k: a[k] + s * b[k] for k in a}


def scaled(s, a):
    return {k: s * a[k] for k in a}


def dot(a, b):
    return sum((a[k] * b[k]).sum() for k in a)


def ones(a):
    return {k: np.ones_like(v) for k, v in a.items()}


def norm(a):
    return np.sqrt(dot(a, a))


def unit(a):
    return scaled(1 / norm(a), a) if norm(a) else a


def orthogonal(a, b):
    """a minus its projection on b."""
    return add(a, -dot(a, unit(b)), unit(b))


def sam(w, g, grad, memory, rho):
    return grad(add(w, rho, unit(g)))


def unnormalised_sam(w, g, grad, memory, rho):
    return grad(add(w, rho, g))


def multi_step_sam(w, g, grad, memory, rho, steps, step_size=None):
    e = scaled(0, w)
    ascend = memory.get("ascend", grad)
    for i in range(steps):
        ascent = g if i == 0 else ascend(add(w, 1, e))
        e = add(e, rho / steps if step_size is None else step_size, unit(ascent))
        if norm(e) > rho:
            e = scaled(rho / norm(e), e)
    return grad(add(w, 1, e))


def of_the_descent(w, g, grad, memory):
    """The clean gradient of the examples that g_s is of."""
    return grad(w) if "ascend" in memory else g


def gsam(w, g, grad, memory, rho, alpha):
    g_s = grad(add(w, rho, unit(g)))
    return add(g_s, -alpha, orthogonal(of_the_descent(w, g, grad, memory), g_s))


def wsam(w, g, grad, memory, rho, gamma):
    return gradient_norm_penalty(w, g, grad, memory, rho, gamma / (1 - gamma))


def gradient_norm_penalty(w, g, grad, memory, rho, alpha):
    g_s = grad(add(w, rho, unit(g)))
    g = of_the_descent(w, g, grad, memory)
    return add(g, alpha, add(g_s, -1, g))


def look_sam(w, g, grad, memory, rho, k, alpha):
    if memory["t"] % k:
        return add(g, alpha * norm(g), unit(memory["g_v"]))
    g_s = grad(add(w, rho, unit(g)))
    memory["g_v"] = orthogonal(g_s, g)
    return g_s


def friendly_sam(w, g, grad, memory, rho, sigma, lmbda):
    if "m" not in memory:
        memory["m"] = direction = g
    else:
        direction = add(g, -sigma, memory["m"])
        memory["m"] = add(scaled(lmbda, memory["m"]), 1 - lmbda, g)
    return grad(add(w, rho, unit(direction)))


def vasso(w, g, grad, memory, rho, theta):
    d = add(scaled(1 - theta, memory["d"]), theta, g) if "d" in memory else g
    memory["d"] = d
    return grad(add(w, rho, unit(d)))


def momentum_sam(w, g, grad, memory, rho, momentum):
    v = memory.get("v", scaled(0, w))
    g_s = grad(add(w, -rho, unit(v)))
    memory["v"] = add(g_s, momentum, v)
    return g_s


def cr_sam(w, g, grad, memory, rho, gamma, beta):
    plus, minus = grad(add(w, rho, unit(g))), grad(add(w, -rho, unit(g)))
    middle = of_the_descent(w, g, grad, memory)
    return {
        k: plus[k] + gamma * (plus[k] + minus[k] - 2 * middle[k]) + beta * (plus[k] - minus[k])
        for k in w
    }


def slerp(a, b, alpha):
    """Between unit vectors along the great circle."""
    angle = np.arccos(np.clip(dot(a, b), -1, 1))
    if np.sin(angle) < 1e-8:
        return scaled(0.5, add(a, 1, b))
    return scaled(
        1 / np.sin(angle), add(scaled(np.sin((1 - alpha) * angle), a), np.sin(alpha * angle), b)
    )


def xsam(w, g, grad, memory, rho, alpha):
    g_s = grad(add(w, rho, unit(g)))
    return scaled(norm(g_s), slerp(unit(g), unit(g_s), alpha))


def fisher_sam(w, g, grad, memory, rho, eta):
    q = {k: 1 / (1 + eta * g[k] ** 2) for k in g}
    total = np.sqrt(sum((q[k] * g[k] ** 2).sum() for k in g))
    return grad({k: w[k] + rho * q[k] * g[k] / total for k in g})


def eigen_perturbation(g, v, rho, alpha):
    u = unit(g)
    return scaled(rho, add(u, alpha * np.sign(dot(g, v)), add(v, -dot(v, u), u)))


def stable_sam(w, g, grad, memory, rho):
    return scaled(norm(g), unit(grad(add(w, rho, unit(g)))))


def z_sharp_perturbation(g, rho, quantile):
    e = {}
    for k, leaf in g.items():
        if leaf.ndim > 1:
            spread = leaf.std(ddof=1) if leaf.size > 1 else np.inf
            z = np.abs((leaf - leaf.mean()) / (spread + 1e-12))
            kept = leaf * (z > np.quantile(z, quantile))
            if (kept**2).sum() > 0:
                e[k] = rho * kept / np.sqrt((kept**2).sum())
                continue
        e[k] = rho * leaf / norm(g)
    return e


def z_sharp(w, g, grad, memory, rho, quantile):
    return grad(add(w, 1, z_sharp_perturbation(g, rho, quantile)))


def async_sam(w, g, grad, memory, rho):
    e = scaled(rho, unit(memory["previous"])) if "previous" in memory else scaled(0, w)
    memory["previous"] = g
    return grad(add(w, 1, e))


def sparse_sam(w, g, grad, memory, rho, sparsity, every):
    if memory["t"] % every == 0:
        fisher = np.sort(np.concatenate([(g[k] ** 2).ravel() for k in g]))[::-1]
        threshold = fisher[int(fisher.size * (1 - sparsity)) - 1]
        memory["mask"] = {k: g[k] ** 2 >= threshold for k in g}
    return grad({k: w[k] + memory["mask"][k] * rho * g[k] / norm(g) for k in w})


def unified_sam(w, g, grad, memory, rho, lmbda):
    return grad(add(w, rho * (1 - lmbda + lmbda / norm(g)), g))


def sagm(w, g, grad, memory, rho, alpha):
    g_s = grad(add(w, rho / norm(g) - alpha, g))
    return scaled(0.5, add(of_the_descent(w, g, grad, memory), 1, g_s))


def le_sam(w, g, grad, memory, rho, sigma):
    return grad(add(w, min(sigma / norm(g), rho), unit(g)))


def divided(d, v, eps):
    return {k: np.where(v[k] == 0, d[k], d[k] / (np.sqrt(v[k]) + eps)) for k in d}


def preconditioned_sam(w, g, grad, memory, rho, b2, eps):
    v = memory.get("v", scaled(0, w))
    g_s = grad(add(w, rho / norm(g), divided(g, v, eps)))
    memory["v"] = {k: b2 * v[k] + (1 - b2) * g_s[k] ** 2 for k in w}
    return g_s


def polar(leaf):
    """U V^T of a leaf as a matrix U S V^T, without the directions where S is 0."""
    u, s, vt = np.linalg.svd(leaf.reshape(-1, leaf.shape[-1]), full_matrices=False)
    return (u @ np.diag(s > 1e-12 * s.max()) @ vt).reshape(leaf.shape)


def spectral_perturbation(g, rho):
    own_unit = lambda x: x / max(np.linalg.norm(x), 1e-300)
    return {k: rho * (polar(x) if x.ndim > 1 else own_unit(x)) for k, x in g.items()}


def spectral_sam(w, g, grad, memory, rho, ns_steps):
    return grad(add(w, 1, spectral_perturbation(g, rho)))


def polyak_sam(w, g, grad, memory, rho, bound, lowest):
    e = scaled(rho, unit(g))
    g_s, loss = grad(add(w, 1, e)), memory["value"](add(w, 1, e))
    step = min(max(loss - lowest - dot(g_s, e), 0) / dot(g_s, g_s), bound)
    return scaled(step, g_s)


def periodic_sam(w, g, grad, memory, rho, k):
    return g if memory["t"] % k else grad(add(w, k * rho, unit(g)))


def imb_sam(w, g, grad, memory, rho):
    tail = memory["tail"]
    moved = tail(add(w, rho, unit(tail(w))))
    return add(moved, 1, add(g, -1, tail(w)))


def rare(batch):
    """The examples that imb_sam perturbs for; their part of the loss is that of their number."""
    x, y = batch
    return (x[:3], y[:3]), 3 / len(y)


def ae_sam_pays(g, memory, decay, c):
    """Whether AE-SAM takes the SAM step; mean and variance of |g|^2 start at its first value, 0."""
    s = dot(g, g)
    if not memory:
        memory["mu"], memory["var"] = s, 0.0
        return True
    memory["mu"] = decay * memory["mu"] + (1 - decay) * s
    memory["var"] = decay * memory["var"] + (1 - decay) * (s - memory["mu"]) ** 2
    return s >= memory["mu"] + c * np.sqrt(memory["var"])


def trajectory(
    params,
    batches,
    rule,
    arguments,
    pays=None,
    gradient=ref.gradient,
    lr=0.05,
    mu=0.9,
    decay=0.01,
    other=None,
):
    """SGD with momentum and coupled weight decay on the rule's result, one step a batch.

    Arguments that are functions are schedules of the rule's own count. pays(step, g) decides
    whether the rule is used at a step, or the gradient. other(batch) is what the descent sees, if
    not the batch. Returns the parameters after each step and the points at which each step took
    further gradients.
    """
    w, velocity, memory = dict(params), scaled(0, params), {"t": 0}
    path, points = [], []
    for i, batch in enumerate(batches):
        g, seen = gradient(w, batch), []

        descended = batch if other is None else other(batch)

        def grad(point, batch=descended, seen=seen):
            seen.append(point)
            return gradient(point, batch)

        def tail(point, batch=batch, seen=seen):
            seen.append(point)
            part, share = rare(batch)
            return scaled(share, gradient(point, part))

        memory |= {"tail": tail, "value": functools.partial(ref.loss, np, batch=descended)}
        if other is not None:
            memory["ascend"] = functools.partial(gradient, batch=batch)

        out = g
        if pays is None or pays(i, g):
            given = {k: a(memory["t"]) if callable(a) else a for k, a in arguments.items()}
            out = rule(w, g, grad, memory, **given)
            memory["t"] += 1
        velocity = add(add(out, decay, w), mu, velocity)
        w = add(w, -lr, velocity)
        path.append(w)
        points.append(seen)
    return path, points
