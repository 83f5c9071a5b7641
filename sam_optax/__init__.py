"""Sharpness-aware training as Optax gradient transformations."""

from sam_optax._ascent import dual_ascent as dual_ascent
from sam_optax._axes import pmean as pmean
from sam_optax._bsam import BSAMState as BSAMState
from sam_optax._bsam import bsam as bsam
from sam_optax._cadences import AdaptiveCadenceState as AdaptiveCadenceState
from sam_optax._cadences import CadencedState as CadencedState
from sam_optax._cadences import RandomCadenceState as RandomCadenceState
from sam_optax._cadences import adaptive as adaptive
from sam_optax._cadences import late_phase as late_phase
from sam_optax._cadences import randomised as randomised
from sam_optax._combinations import cr_sam as cr_sam
from sam_optax._combinations import gradient_norm_penalty as gradient_norm_penalty
from sam_optax._combinations import gsam as gsam
from sam_optax._combinations import rho_from_learning_rate as rho_from_learning_rate
from sam_optax._combinations import stable_sam as stable_sam
from sam_optax._combinations import wsam as wsam
from sam_optax._decoupled_wsam import DecoupledWSAMState as DecoupledWSAMState
from sam_optax._decoupled_wsam import decoupled_wsam as decoupled_wsam
from sam_optax._functional import grad as grad
from sam_optax._functional import value_and_grad as value_and_grad
from sam_optax._functional import value_and_grad_fn as value_and_grad_fn
from sam_optax._gam import GAMState as GAMState
from sam_optax._gam import gam as gam
from sam_optax._geometry import EigenState as EigenState
from sam_optax._geometry import eigen_sam as eigen_sam
from sam_optax._geometry import fisher_sam as fisher_sam
from sam_optax._look_sam import look_sam as look_sam
from sam_optax._lookbehind import LookbehindState as LookbehindState
from sam_optax._lookbehind import lookbehind as lookbehind
from sam_optax._memories import AverageState as AverageState
from sam_optax._memories import MomentumState as MomentumState
from sam_optax._memories import PreviousState as PreviousState
from sam_optax._memories import async_sam as async_sam
from sam_optax._memories import friendly_sam as friendly_sam
from sam_optax._memories import momentum_sam as momentum_sam
from sam_optax._memories import vasso as vasso
from sam_optax._methods import asam as asam
from sam_optax._methods import sam as sam
from sam_optax._noise import RandomState as RandomState
from sam_optax._noise import random_perturbation as random_perturbation
from sam_optax._normalization import elementwise as elementwise
from sam_optax._normalization import filterwise as filterwise
from sam_optax._normalization import layerwise as layerwise
from sam_optax._per_example import esam as esam
from sam_optax._per_example import k_sam as k_sam
from sam_optax._sampa import SAMPaState as SAMPaState
from sam_optax._sampa import sampa as sampa
from sam_optax._sharpness_aware import CadenceState as CadenceState
from sam_optax._sharpness_aware import SharpnessAwareState as SharpnessAwareState
from sam_optax._sharpness_aware import sharpness_aware as sharpness_aware
from sam_optax._sparse import SparseState as SparseState
from sam_optax._sparse import normalization_mask as normalization_mask
from sam_optax._sparse import sparse_sam as sparse_sam
from sam_optax._sparse import z_sharp as z_sharp
from sam_optax._steps import multi_step_sam as multi_step_sam
from sam_optax._steps import unnormalised_sam as unnormalised_sam
from sam_optax._xsam import xsam as xsam
from sam_optax._xsam import xsam_alpha as xsam_alpha

__version__ = "0.1.0"

__all__ = (
    "AdaptiveCadenceState",
    "AverageState",
    "BSAMState",
    "CadenceState",
    "CadencedState",
    "DecoupledWSAMState",
    "EigenState",
    "GAMState",
    "LookbehindState",
    "MomentumState",
    "PreviousState",
    "RandomCadenceState",
    "RandomState",
    "SAMPaState",
    "SharpnessAwareState",
    "SparseState",
    "adaptive",
    "asam",
    "async_sam",
    "bsam",
    "cr_sam",
    "decoupled_wsam",
    "dual_ascent",
    "eigen_sam",
    "elementwise",
    "esam",
    "filterwise",
    "fisher_sam",
    "friendly_sam",
    "gam",
    "grad",
    "gradient_norm_penalty",
    "gsam",
    "k_sam",
    "late_phase",
    "layerwise",
    "look_sam",
    "lookbehind",
    "momentum_sam",
    "multi_step_sam",
    "normalization_mask",
    "pmean",
    "random_perturbation",
    "randomised",
    "rho_from_learning_rate",
    "sam",
    "sampa",
    "sharpness_aware",
    "sparse_sam",
    "stable_sam",
    "unnormalised_sam",
    "value_and_grad",
    "value_and_grad_fn",
    "vasso",
    "wsam",
    "xsam",
    "xsam_alpha",
    "z_sharp",
)
