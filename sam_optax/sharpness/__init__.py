"""Sharpness of a solution, measured.

All measures share one call: measure(loss_fn, params, data, *, options), with
loss_fn(params, batch) the mean loss over a batch, and data one batch or an
iterable of batches. They are taken in coordinates u with w(u) = w + T u, so a
normalization operator or a mask works in every one of them, and so do `weighted`
data and, for measures of the Hessian, a `gauss_newton` loss. Results are small
frozen dataclasses. `monitor` logs sharpness while training, for nothing.
"""

from sam_optax._measures.gauss_newton import GaussNewton as GaussNewton
from sam_optax._measures.gauss_newton import gauss_newton as gauss_newton
from sam_optax._measures.streams import Weighted as Weighted
from sam_optax._measures.streams import weighted as weighted
from sam_optax.sharpness._average_case import AverageCase as AverageCase
from sam_optax.sharpness._average_case import average_case as average_case
from sam_optax.sharpness._hessian import Density as Density
from sam_optax.sharpness._hessian import Eigenvalues as Eigenvalues
from sam_optax.sharpness._hessian import Trace as Trace
from sam_optax.sharpness._hessian import hessian_eigenvalues as hessian_eigenvalues
from sam_optax.sharpness._hessian import hessian_trace as hessian_trace
from sam_optax.sharpness._hessian import spectral_density as spectral_density
from sam_optax.sharpness._m_sharpness import MSharpness as MSharpness
from sam_optax.sharpness._m_sharpness import m_sharpness as m_sharpness
from sam_optax.sharpness._monitor import MonitorState as MonitorState
from sam_optax.sharpness._monitor import monitor as monitor
from sam_optax.sharpness._summary import Summary as Summary
from sam_optax.sharpness._summary import summary as summary
from sam_optax.sharpness._worst_case import WorstCase as WorstCase
from sam_optax.sharpness._worst_case import one_step as one_step
from sam_optax.sharpness._worst_case import worst_case as worst_case

__all__ = (
    "AverageCase",
    "Density",
    "Eigenvalues",
    "GaussNewton",
    "MSharpness",
    "MonitorState",
    "Summary",
    "Trace",
    "Weighted",
    "WorstCase",
    "average_case",
    "gauss_newton",
    "hessian_eigenvalues",
    "hessian_trace",
    "m_sharpness",
    "monitor",
    "one_step",
    "spectral_density",
    "summary",
    "weighted",
    "worst_case",
)
