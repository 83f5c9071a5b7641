"""Drawings show the data they are given: lines, levels, labels; none overlap."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from sam_optax import draw, landscape, sharpness


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def plane(scale=1.0, kind="random", points=((0.0, 0.0),), explained=()):
    x, y = np.linspace(-1, 2, 7), np.linspace(-1, 1, 5)
    values = scale * (1 + x[None] ** 2 + 5 * y[:, None] ** 2)
    return landscape.Plane(
        x, y, values, np.array(points), 0.01, np.array(explained), kind, "frozen", 8, (0,)
    )


def overlapping(artists, renderer):
    boxes = [a.get_window_extent(renderer) for a in artists if a.get_visible() and a.get_text()]
    return any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_rays_draw_mean_and_spread():
    values = np.array([[1.0, 2.0], [3.0, 6.0]])
    result = landscape.Rays(np.array([0.0, 1.0]), values, "frozen", 8, (0,))
    ax = draw.rays({"SGD": result, "SAM": result})
    assert [line.get_label() for line in ax.lines] == ["SGD", "SAM"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 4])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 6)
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len({c for c, _ in looks}) == len({s for _, s in looks}) == 2  # both differ
    assert draw.rays(result).get_legend() is None


def test_interpolation_draws_its_values():
    result = landscape.Interpolation(np.array([0.0, 1.0]), np.array([2.0, 3.0]), 1.0, "frozen", 8)
    line = draw.interpolation(result).lines[-1]
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [1, 3]])


def test_contours_name_solutions_without_overlap():
    result = plane(kind="solutions", points=[(0.0, 0.0), (1.5, 0.0), (1.4, 0.6)])
    ax = draw.contours(result, names=["SGD", "SAM", "ASAM"])
    renderer = ax.figure.canvas.get_renderer()
    assert [text.get_text() for text in ax.texts] == ["SGD", "SAM", "ASAM"]
    assert not overlapping(ax.texts, renderer)
    assert "distance" in ax.get_xlabel()
    with pytest.raises(ValueError, match=r"at most one for each of 1 points, got \['a', 'b'\]"):
        draw.contours(plane(), names=["a", "b"])


def test_a_trajectory_is_drawn_with_its_shares():
    points = [(2.0, 1.0), (1.0, 0.5), (0.0, 0.0)]
    ax = draw.contours(plane(kind="trajectory", points=points, explained=(0.9, 0.06)))
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), points)
    assert "90%" in ax.get_xlabel() and "6%" in ax.get_ylabel()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_planes_share_axes_and_levels_and_their_bar_has_no_label_twice(scale):
    figure = draw.planes({"SGD": plane(scale), "SAM": plane(), "ASAM": plane(0.9)})
    *panels, bar = figure.axes
    assert [ax.get_title() for ax in panels] == ["SGD", "SAM", "ASAM"]
    filled = [ax.collections[0] for ax in panels]
    for other in filled[1:]:
        np.testing.assert_array_equal(filled[0].levels, other.levels)
    assert len({ax.get_xlim() for ax in panels}) == len({ax.get_ylim() for ax in panels}) == 1
    assert filled[0].levels[0] <= 0.9 and filled[0].levels[-1] >= 10 * scale
    figure.canvas.draw()
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert len(set(labels)) == len(labels) > 3
    for ax in figure.axes:
        for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert not overlapping(ticks, figure.canvas.get_renderer())


def test_a_flat_plane_and_infinite_losses_are_drawn():
    flat = plane()
    flat.values[:] = 3.0
    draw.contours(flat).figure.canvas.draw()
    high = plane()
    high.values[0, 0] = np.inf
    draw.contours(high).figure.canvas.draw()


def test_a_surface_is_cut_at_its_limits():
    ax = draw.surface(plane(), limits=(0.5, 4.0))
    np.testing.assert_allclose(ax.zz_dataLim.intervalx, (1, 4))
    np.testing.assert_allclose(ax.get_zlim(), (0.5, 4), atol=0.1)
    assert ax.collections[0].get_clim() == (0.5, 4)


def test_density_and_eigenvalues_draw_their_data():
    density = sharpness.Density(np.array([[0.0, 5.0]]), np.array([[0.9, 0.1]]), 0.1, 10, 8, (0,))
    ax = draw.density({"SGD": density})
    assert ax.get_yscale() == "log" and ax.get_ylim()[1] > density(0.0)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), density(density.grid()))
    found = sharpness.Eigenvalues(
        np.array([5.0, 2.0]), np.array([-1.0]), np.array([0.1, 0.2]), np.array([0.1]), 9, False, 8,
        (0,),
    )  # fmt: skip
    ax = draw.eigenvalues({"SGD": found, "SAM": found})
    assert [bar.get_height() for bar in ax.patches] == [5, 2, 5, 2]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(edges))


def test_without_matplotlib_the_error_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None; import sam_optax.draw"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sam_optax.draw needs matplotlib: pip install" in done.stderr


def inside(label, ax):
    box = label.get_window_extent(ax.figure.canvas.get_renderer())
    return all(ax.bbox.contains(*corner) for corner in box.corners())


@pytest.mark.parametrize(
    "points", [[(2.0, 1.0), (2.0, 0.8), (1.9, -1.0)], [(-1.0, -1.0), (-0.9, -1.0), (2.0, 1.0)]]
)
def test_names_of_solutions_at_the_edges_stay_inside_and_apart(points):
    result = plane(kind="solutions", points=points)
    names = ["SGD with momentum", "SAM", "ASAM"]
    figure = draw.planes({"train": result, "test": result}, names=names)
    figure.canvas.draw()
    for ax in figure.axes[:2]:
        assert [text.get_text() for text in ax.texts] == names
        assert all(inside(text, ax) for text in ax.texts)
        assert not overlapping(ax.texts, figure.canvas.get_renderer())
        assert ax.get_aspect() == 1 and "distance" in ax.get_xlabel()
    with pytest.raises(ValueError, match=r"at most one for each of 3 points"):
        draw.planes({"train": result}, names=["a", "b", "c", "d"])


def test_planes_name_the_solution_of_a_random_plane_and_refuse_mixed_kinds():
    figure = draw.planes({"SGD": plane(), "SAM": plane()})
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes[:2]] == [["SGD"], ["SAM"]]
    assert figure.axes[0].get_aspect() == "auto"
    with pytest.raises(ValueError, match=r"one kind to share their axes, got \['random', 'sol"):
        draw.planes({"SGD": plane(), "all": plane(kind="solutions")})


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 3.0, 1e3, 1e7])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_colorbar_has_one_number_format(scale, logarithmic):
    result = plane(scale)
    if not logarithmic:
        result.values[:] = scale * (1.3 + 0.05 * result.values / result.values.max())
    ax = draw.contours(result)
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.figure.axes[1].get_yticklabels()]
    assert len(set(labels)) == len(labels) > 3
    assert (
        len({("e" in label, len(label.split("e")[0].partition(".")[2])) for label in labels}) == 1
    )
    values = ax.figure.axes[1].get_yticks()
    np.testing.assert_allclose([float(label) for label in labels], values, rtol=0.07)
