"""Loss landscapes: lines and planes through weight space, as data.

Everything is evaluated as a weighted sum of a few trees, in one pass over the
data; `rays`, `interpolate`, `random_plane`, `plane_through` and
`trajectory_plane` choose the trees and the weights. Results hold their grid,
seed and values, and are saved and loaded; `sam_optax.draw` draws them.
"""

from sam_optax.landscape._directions import flax_filters as flax_filters
from sam_optax.landscape._lines import interpolate as interpolate
from sam_optax.landscape._lines import rays as rays
from sam_optax.landscape._planes import plane_through as plane_through
from sam_optax.landscape._planes import random_plane as random_plane
from sam_optax.landscape._planes import trajectory_plane as trajectory_plane
from sam_optax.landscape._results import Interpolation as Interpolation
from sam_optax.landscape._results import Plane as Plane
from sam_optax.landscape._results import Rays as Rays

__all__ = (
    "Interpolation",
    "Plane",
    "Rays",
    "flax_filters",
    "interpolate",
    "plane_through",
    "random_plane",
    "rays",
    "trajectory_plane",
)
