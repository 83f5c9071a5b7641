"""Drawings of sharpness and landscapes, with matplotlib.

One function for each kind of result. Each takes one result, or a dictionary
from names to results of solutions to compare, draws into ax (a new figure
without it) and returns the axes, for titles, limits and saving to be added.
Names are told apart by colour and by line or hatch, with colours that colour
blindness keeps apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam_optax.landscape import Interpolation, Plane, Rays
from sam_optax.sharpness import Density, Eigenvalues

try:
    import matplotlib.pyplot as plt
    from matplotlib import colors, patheffects, ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("sam_optax.draw needs matplotlib: pip install 'sam-optax[plot]'") from error

# Okabe and Ito's colours, of which these four differ most in brightness as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "//", "..", "xx")
_MARKERS = ("o", "s", "^", "D")
_HALO = (patheffects.withStroke(linewidth=3, foreground="white"),)


def rays(results: Rays | Mapping[str, Rays], ax: Axes | None = None) -> Axes:
    """Loss along random rays: the mean over directions and one standard deviation.

    Use it to compare how wide solutions are at equal distance; draw results
    that share their key.

        line: mean over directions of L(w + t d); band: +- standard deviation

    Args:
      results: from `sam_optax.landscape.rays`, or several by name.
      ax: where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from sam_optax import draw, landscape
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> result = landscape.rays(
      ...     loss_fn, jnp.zeros(2), jnp.array([[1.0, 5.0]]), key=jax.random.key(0),
      ...     distances=np.linspace(-1, 1, 5))
      >>> draw.rays({"SGD": result}).figure.savefig("/dev/null", format="png")

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, figure 4.
    """
    named = _named(results)
    ax = _axes(ax)
    for i, (name, result) in enumerate(named.items()):
        mean, spread = result.values.mean(0), result.values.std(0)
        ax.plot(result.distances, mean, linewidth=2, **_line(i, name))
        ax.fill_between(
            result.distances, mean - spread, mean + spread, color=_COLORS[i % 7], alpha=0.2, lw=0
        )
    ax.set_xlabel("distance along a random ray")
    ax.set_ylabel("loss")
    return _finished(ax, named)


def interpolation(
    results: Interpolation | Mapping[str, Interpolation], ax: Axes | None = None
) -> Axes:
    """Loss on the line through two solutions, with the solutions marked.

    Use it to look for a barrier between solutions.

        L((1 - a) w1 + a w2) over a

    Args:
      results: from `sam_optax.landscape.interpolate`, or several by name.
      ax: where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import draw, landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum((w**2 - 1) ** 2)
      >>> result = landscape.interpolate(loss_fn, -jnp.ones(1), jnp.ones(1), jnp.ones(4))
      >>> draw.interpolation(result).figure.savefig("/dev/null", format="png")

    References:
      Goodfellow et al., `Qualitatively Characterizing Neural Network
      Optimization Problems <https://arxiv.org/abs/1412.6544>`_, 2015.
    """
    named = _named(results)
    ax = _axes(ax)
    for end in (0, 1):
        ax.axvline(end, color="0.7", linewidth=1, zorder=0)
    for i, (name, result) in enumerate(named.items()):
        ax.plot(result.positions, result.values, linewidth=2, **_line(i, name))
    ax.set_xlabel("position between the solutions, at 0 and 1")
    ax.set_ylabel("loss")
    return _finished(ax, named)


def contours(
    plane: Plane,
    ax: Axes | None = None,
    *,
    names: Sequence[str] = (),
    levels: Any = None,
    colorbar: bool = True,
) -> Axes:
    """A plane as filled contours, with its solutions or its trajectory on top.

    The form in which distances can be read: where both axes are distances they
    have one scale. Levels are spaced evenly in the logarithm of the loss where
    it spans more than a factor of ten.

        L over the coordinates (x, y) of the plane

    Args:
      plane: from `sam_optax.landscape.random_plane`, `plane_through` or
        `trajectory_plane`.
      ax: where to draw; a new figure by default.
      names: of the plane's points, in their order.
      levels: increasing losses at which the contours lie.
      colorbar: whether to add one.

    Returns:
      The axes.

    Raises:
      ValueError: if there are more names than points.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import draw, landscape
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> plane = landscape.random_plane(
      ...     loss_fn, jnp.ones((2, 1)), jnp.array([[1.0, 5.0]]), key=jax.random.key(0))
      >>> draw.contours(plane, names=["SGD"]).figure.savefig("/dev/null", format="png")

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, figure 5.
    """
    _check_names(plane, names)
    ax = _axes(ax)
    levels = _levels([plane]) if levels is None else np.asarray(levels)
    filled = _filled(plane, ax, levels)
    _draw_points(ax, plane)
    ax.set_xlabel(_direction(plane, 0))
    ax.set_ylabel(_direction(plane, 1))
    if colorbar:
        _colorbar(ax, filled, [ax])
    _place_names(ax, plane, names)
    return ax


def planes(planes: Mapping[str, Plane], *, names: Sequence[str] = (), levels: Any = None) -> Figure:
    """Planes side by side, with shared axes and levels: of several solutions, or data sets.

    The fair comparison: equal colours mean equal losses, equal lengths equal
    distances. Draw planes that share key and grid.

        L over (x, y), one panel for each name

    Args:
      planes: from `sam_optax.landscape`, all of one kind, by name.
      names: of the planes' points, in their order, the same in all panels; the
        one point of a random plane has the panel's name by default.
      levels: increasing losses at which the contours lie in all panels.

    Returns:
      The figure.

    Raises:
      ValueError: if there are no planes, planes of several kinds, or more names
        than points.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import draw, landscape
      >>> w, panels = jnp.ones((2, 1)), {}
      >>> for name, x in {"SGD": jnp.array([[1.0, 5.0]]), "SAM": jnp.array([[1.0, 2.0]])}.items():
      ...     panels[name] = landscape.random_plane(
      ...         lambda w, x: jnp.mean(x @ w**2), w, x, key=jax.random.key(0))
      >>> draw.planes(panels).savefig("/dev/null", format="png")

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, figure 5.
    """
    if not planes:
        raise ValueError(f"planes must hold at least one plane, got {dict(planes)}")
    kinds = sorted({plane.kind for plane in planes.values()})
    if len(kinds) > 1:
        raise ValueError(f"planes must be of one kind to share their axes, got {kinds}")
    for plane in planes.values():
        _check_names(plane, names)
    width = 3.0 * len(planes) + 1.2
    figure, row = plt.subplots(
        1, len(planes), figsize=(width, 3.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    levels = _levels(list(planes.values())) if levels is None else np.asarray(levels)
    filled = None
    for ax, (name, plane) in zip(row[0], planes.items(), strict=True):
        filled = _filled(plane, ax, levels)
        _draw_points(ax, plane)
        ax.set_title(name)
        ax.set_xlabel(_direction(plane, 0))
        if plane.kind == "random":  # coordinates are multiples of the solution
            ax.set_box_aspect(1)
    row[0][0].set_ylabel(_direction(next(iter(planes.values())), 1))
    _colorbar(row[0][-1], filled, list(row[0]))
    for ax, (name, plane) in zip(row[0], planes.items(), strict=True):
        _place_names(ax, plane, names or ([name] if len(plane.points) == 1 else ()))
    return figure


def surface(plane: Plane, ax: Any = None, *, limits: tuple[float, float] | None = None) -> Any:
    """A plane as a surface in three dimensions.

    For a first impression; `contours` is the form to read from.

        height: L over the coordinates (x, y)

    Args:
      plane: from `sam_optax.landscape`.
      ax: axes with projection="3d"; a new figure by default.
      limits: lowest and highest loss of axis and colours, the same for surfaces
        to be compared; what is higher is cut off. By default the plane's own.

    Returns:
      The axes.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import draw, landscape
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> plane = landscape.random_plane(
      ...     loss_fn, jnp.ones((2, 1)), jnp.array([[1.0, 5.0]]), key=jax.random.key(0))
      >>> draw.surface(plane).figure.savefig("/dev/null", format="png")

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, figure 1.
    """
    if ax is None:
        _, ax = plt.subplots(
            figsize=(5, 4.2), subplot_kw={"projection": "3d"}, layout="constrained"
        )
    finite = plane.values[np.isfinite(plane.values)]
    low, high = (float(finite.min()), float(finite.max())) if limits is None else limits
    across, up = np.meshgrid(plane.x, plane.y)
    ax.plot_surface(
        across,
        up,
        np.clip(plane.values, low, high),
        cmap="viridis",
        vmin=low,
        vmax=high,
        rstride=1,
        cstride=1,
        linewidth=0.2,
        edgecolor="0.3",
    )
    if high > low:
        ax.set_zlim(low, high)
    ax.set_xlabel("first direction", labelpad=10)
    ax.set_ylabel("second direction", labelpad=10)
    ax.set_zlabel("loss", labelpad=10)
    ax.view_init(elev=28, azim=-60)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(ticker.MaxNLocator(4))
    ax.set_box_aspect((1, 1, 0.8), zoom=0.8)  # the height's label lies outside otherwise
    return ax


def density(results: Density | Mapping[str, Density], ax: Axes | None = None) -> Axes:
    """Spectral densities of the Hessian, on a logarithmic axis.

    Shows the bulk at 0 and the outliers at once. The width of a peak is the
    result's sigma: give results to be compared the same one.

        mean over probes of sum_i weight_i N(t; node_i, sigma^2)

    Args:
      results: from `sam_optax.sharpness.spectral_density`, or several by name.
      ax: where to draw; a new figure by default.

    Returns:
      The axes. The axis ends at the weight of a thousandth of one eigenvalue.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import draw, sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> result = sharpness.spectral_density(
      ...     loss_fn, jnp.ones(3), jnp.array([[1.0, 2.0, 5.0]]), key=jax.random.key(0))
      >>> draw.density(result).figure.savefig("/dev/null", format="png")

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via
      Hessian Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019,
      figure 1.
    """
    named = _named(results)
    ax = _axes(ax)
    bottom, top = np.inf, 0.0
    for i, (name, result) in enumerate(named.items()):
        t = result.grid()
        values = result(t)
        ax.plot(t, values, linewidth=2, **_line(i, name))
        bottom = min(bottom, 1e-3 / (result.size * result.sigma))
        top = max(top, float(values.max()))
    ax.set_yscale("log")
    ax.set_ylim(bottom, top * 3)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("density")
    return _finished(ax, named)


def eigenvalues(results: Eigenvalues | Mapping[str, Eigenvalues], ax: Axes | None = None) -> Axes:
    """The largest eigenvalues of the Hessian as bars, with their residuals.

    The comparison that papers on SAM print as a table.

        lambda_1 >= lambda_2 >= ..., +- residual

    Args:
      results: from `sam_optax.sharpness.hessian_eigenvalues`, or several by
        name.
      ax: where to draw; a new figure by default.

    Returns:
      The axes.

    Raises:
      Nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import draw, sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> result = sharpness.hessian_eigenvalues(
      ...     loss_fn, jnp.ones(3), jnp.array([[1.0, 2.0, 5.0]]), key=jax.random.key(0))
      >>> draw.eigenvalues({"SGD": result}).figure.savefig("/dev/null", format="png")

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, figure 3.
    """
    named = _named(results)
    ax = _axes(ax)
    width, longest = 0.8 / len(named), 0
    for i, (name, result) in enumerate(named.items()):
        longest = max(longest, len(result.top))
        place = np.arange(1, len(result.top) + 1) + (i - (len(named) - 1) / 2) * width
        ax.bar(
            place,
            result.top,
            width,
            yerr=result.top_residuals,
            color=_COLORS[i % 7],
            hatch=_HATCHES[i % 4],
            edgecolor="white",
            ecolor="0.2",
            label=name,
        )
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xticks(range(1, longest + 1))
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue of the Hessian")
    return _finished(ax, named)


def _line(i: int, name: str) -> Any:
    return {"color": _COLORS[i % 7], "linestyle": _LINES[i % 4], "label": name}


def _named(results: Any) -> dict[str, Any]:
    return dict(results) if isinstance(results, Mapping) else {"": results}


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(5, 3.6), layout="constrained")[1]


def _finished(ax: Axes, named: Mapping[str, Any]) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    if any(named):
        ax.legend(frameon=False)
    return ax


def _levels(planes: Sequence[Plane]) -> np.ndarray:
    """Contour levels for all planes: even in the logarithm where the range asks for it."""
    values = np.concatenate([plane.values.ravel() for plane in planes])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.linspace(low - 1e-6, low + 1e-6 + abs(low) * 1e-6, 15)
    if 0 < 10 * low < high:
        return np.geomspace(low, high, 15)
    return np.asarray(ticker.MaxNLocator(14, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))


def _filled(plane: Plane, ax: Axes, levels: np.ndarray) -> Any:
    logarithmic = levels[0] > 0 and levels[-1] > 10 * levels[0]
    norm = (colors.LogNorm if logarithmic else colors.Normalize)(levels[0], levels[-1])
    grid = (plane.x, plane.y, np.clip(plane.values, levels[0], levels[-1]))
    filled = ax.contourf(*grid, levels=levels, cmap="viridis", norm=norm)
    ax.contour(*grid, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    if plane.kind != "random":  # both axes are distances
        ax.set_aspect("equal")
    return filled


def _direction(plane: Plane, axis: int) -> str:
    """The label of an axis."""
    order = ("first", "second")[axis]
    if plane.kind == "trajectory":
        return f"{order} component ({plane.explained[axis]:.0%})"
    return f"{order} direction{' (distance)' if plane.kind == 'solutions' else ''}"


def _draw_points(ax: Axes, plane: Plane) -> None:
    """The solutions, or the path of training with its end."""
    if plane.kind == "trajectory":
        ax.plot(*plane.points.T, color="white", linewidth=3.5)
        ax.plot(*plane.points.T, color="black", linewidth=1.5, marker=".", markersize=4)
        ax.plot(*plane.points[-1], "*", color="#E69F00", markersize=14, markeredgecolor="black")
        return
    for i, point in enumerate(plane.points):
        ax.plot(
            *point,
            marker=_MARKERS[i % 4],
            color=_COLORS[i % 7],
            linestyle="",
            markersize=9,
            markeredgecolor="white",
        )


def _colorbar(ax: Axes, filled: Any, row: Sequence[Axes]) -> None:
    bar = ax.figure.colorbar(filled, ax=list(row), label="loss")
    shown = filled.levels[::2]
    bar.locator = ticker.FixedLocator(list(shown))
    bar.formatter = ticker.FuncFormatter(_one_format(shown))
    bar.minorticks_off()
    bar.update_ticks()


def _one_format(values: np.ndarray) -> Any:
    """One number format for all values: as many decimals as tell each from the next by two digits.

    Powers of ten where that would be many digits before and behind the point.
    """
    gaps = np.diff(np.unique(values))
    finest = float(gaps.min()) if len(gaps) else max(abs(float(values[0])), 1e-300)
    decimals = max(0, 1 - int(np.floor(np.log10(finest))))
    while decimals and np.allclose(values, np.round(values, decimals - 1), rtol=0, atol=1e-12):
        decimals -= 1  # round numbers need fewer
    largest = float(np.abs(values).max())
    if decimals > 4 or largest >= 1e5:
        digits = max(1, int(np.ceil(np.log10(largest / finest))))
        return lambda value, _: f"{value:.{digits}e}"
    return lambda value, _: f"{value:.{decimals}f}"


def _check_names(plane: Plane, names: Sequence[str]) -> None:
    if len(names) > len(plane.points):
        raise ValueError(
            f"names must be at most one for each of {len(plane.points)} points, got {list(names)}"
        )


def _place_names(ax: Axes, plane: Plane, names: Sequence[str]) -> None:
    """Names beside their points: inside of the axes, away from each other and from the points."""
    figure = ax.figure.get_figure(root=True) or ax.figure
    if not names:
        return
    figure.draw_without_rendering()  # settles where the axes lie
    middle = plane.points.mean(0)
    markers = ax.transData.transform(plane.points)
    taken: list[Any] = []
    for name, point in zip(names, plane.points, strict=False):
        away = [1 if point[i] >= middle[i] else -1 for i in range(2)]
        sides = [(sx * away[0], sy * away[1]) for sx, sy in _SIDES]
        label = ax.annotate(
            name,
            point,
            (0, 0),
            textcoords="offset points",
            fontweight="bold",
            path_effects=list(_HALO),
        )
        faults = []
        for x, y in sides:
            _put(label, x, y)
            box = label.get_window_extent().padded(2)
            inside = all(ax.bbox.contains(*corner) for corner in box.corners())
            faults.append(
                4 * (not inside)
                + 2 * sum(box.overlaps(other) for other in taken)
                + sum(box.contains(*marker) for marker in markers)
            )
        _put(label, *sides[int(np.argmin(faults))])
        taken.append(label.get_window_extent().padded(2))


# To the right or left of a point, or over it; above or below, a line higher or lower, or beside.
_SIDES = tuple((x, y) for y in (1, -1, 0, 4, -4) for x in (1, -1, 0) if x or y)


def _put(label: Any, x: int, y: int) -> None:
    label.xyann = (9 * x, (6 if x else 10) * y)
    label.set_ha(("center", "left", "right")[x])
    label.set_va("center" if not y else "bottom" if y > 0 else "top")


__all__ = (
    "contours",
    "density",
    "eigenvalues",
    "interpolation",
    "planes",
    "rays",
    "surface",
)
