"""Sharpness-aware training as Optax gradient transformations.

A perturbation is an Optax update, and a method is a composition: a cadence of
(filter before ascent, descent). The map, from the ground up:

    _checks, _numerics, _axes, _memory,      errors; arithmetic on trees; mapped axes;
    _selection, _hyperparameters, _types     averages; order statistics; numbers or schedules
    _rules                                   how a rule is written
    _masks, _normalization                   what is perturbed, and how it is measured
    _gradients                               the gradient functions that update is given, checked
    _ascent, _joined, _descent, _cadence,    the rules that no paper owns; a method that reads its
    _payments, _sharing                      optimizer's memory; cadences told to the host
    _sharpness_aware                         the one generic method over them
    _family/, _composition                   one file a paper: its rules and its alias; what a
                                             method is made of
    _mesh, _cuts, _groups, _gathers          a map of the library's own; groups; what is refused
    _ascent_pass, _doors, _functional,       passes over a loss; the doors for functions and for
    _jacobian_sam, nnx, equinox              modules
    averaging/                               averages of weights
    _measures/, sharpness/, landscape/, draw what measures share; measuring; drawing
"""

from sam_optax._ascent import dual_ascent as dual_ascent
from sam_optax._ascent import proportional_ascent as proportional_ascent
from sam_optax._axes import pmean as pmean
from sam_optax._cadence import CadencedState as CadencedState
from sam_optax._cadence import StepCountState as StepCountState
from sam_optax._cadence import cadenced as cadenced
from sam_optax._cadence import every as every
from sam_optax._cadence import from_step as from_step
from sam_optax._composition import Composition as Composition
from sam_optax._composition import Part as Part
from sam_optax._composition import composition as composition
from sam_optax._descent import extrapolate as extrapolate
from sam_optax._family import FAMILY as FAMILY
from sam_optax._family import Member as Member
from sam_optax._family.adaptive import WhenLargeState as WhenLargeState
from sam_optax._family.adaptive import adaptive as adaptive
from sam_optax._family.adaptive import when_large as when_large
from sam_optax._family.asam import asam as asam
from sam_optax._family.async_sam import PreviousState as PreviousState
from sam_optax._family.async_sam import async_sam as async_sam
from sam_optax._family.async_sam import previous as previous
from sam_optax._family.bsam import BSAMState as BSAMState
from sam_optax._family.bsam import bsam as bsam
from sam_optax._family.cr_sam import cr_sam as cr_sam
from sam_optax._family.cr_sam import curvature as curvature
from sam_optax._family.eigen_sam import TowardEigenvectorState as TowardEigenvectorState
from sam_optax._family.eigen_sam import eigen_sam as eigen_sam
from sam_optax._family.eigen_sam import toward_eigenvector as toward_eigenvector
from sam_optax._family.esam import esam as esam
from sam_optax._family.fisher_sam import fisher_ascent as fisher_ascent
from sam_optax._family.fisher_sam import fisher_sam as fisher_sam
from sam_optax._family.flat_lora import flat_lora as flat_lora
from sam_optax._family.friendly_sam import WithoutAverageState as WithoutAverageState
from sam_optax._family.friendly_sam import friendly_sam as friendly_sam
from sam_optax._family.friendly_sam import without_average as without_average
from sam_optax._family.gam import GAMState as GAMState
from sam_optax._family.gam import gam as gam
from sam_optax._family.gradient_norm_penalty import gradient_norm_penalty as gradient_norm_penalty
from sam_optax._family.gsam import gsam as gsam
from sam_optax._family.gsam import rho_from_learning_rate as rho_from_learning_rate
from sam_optax._family.gsam import surrogate_gap as surrogate_gap
from sam_optax._family.imb_sam import imb_sam as imb_sam
from sam_optax._family.k_sam import k_sam as k_sam
from sam_optax._family.late_phase import late_phase as late_phase
from sam_optax._family.late_tail import late_tail as late_tail
from sam_optax._family.le_sam import le_sam as le_sam
from sam_optax._family.le_sam import limit_rise as limit_rise
from sam_optax._family.look_sam import keep_orthogonal as keep_orthogonal
from sam_optax._family.look_sam import look_sam as look_sam
from sam_optax._family.look_sam import reuse_orthogonal as reuse_orthogonal
from sam_optax._family.lookbehind import LookbehindState as LookbehindState
from sam_optax._family.lookbehind import lookbehind as lookbehind
from sam_optax._family.momentum_sam import MomentumState as MomentumState
from sam_optax._family.momentum_sam import along_momentum as along_momentum
from sam_optax._family.momentum_sam import keep_momentum as keep_momentum
from sam_optax._family.momentum_sam import momentum_sam as momentum_sam
from sam_optax._family.momentum_sam import shared_momentum_sam as shared_momentum_sam
from sam_optax._family.multi_step_sam import multi_step as multi_step
from sam_optax._family.multi_step_sam import multi_step_sam as multi_step_sam
from sam_optax._family.periodic_sam import periodic_sam as periodic_sam
from sam_optax._family.polyak_sam import polyak_sam as polyak_sam
from sam_optax._family.polyak_sam import polyak_step as polyak_step
from sam_optax._family.preconditioned_sam import SecondMomentState as SecondMomentState
from sam_optax._family.preconditioned_sam import keep_second_moment as keep_second_moment
from sam_optax._family.preconditioned_sam import precondition as precondition
from sam_optax._family.preconditioned_sam import preconditioned_sam as preconditioned_sam
from sam_optax._family.preconditioned_sam import (
    shared_preconditioned_sam as shared_preconditioned_sam,
)
from sam_optax._family.random_perturbation import GaussianAscentState as GaussianAscentState
from sam_optax._family.random_perturbation import draws as draws
from sam_optax._family.random_perturbation import gaussian_ascent as gaussian_ascent
from sam_optax._family.random_perturbation import random_perturbation as random_perturbation
from sam_optax._family.randomised import WithProbabilityState as WithProbabilityState
from sam_optax._family.randomised import randomised as randomised
from sam_optax._family.randomised import with_probability as with_probability
from sam_optax._family.sagm import sagm as sagm
from sam_optax._family.sam import sam as sam
from sam_optax._family.sam_on import normalization_mask as normalization_mask
from sam_optax._family.sampa import SAMPaState as SAMPaState
from sam_optax._family.sampa import sampa as sampa
from sam_optax._family.sparse_sam import LargestEntriesState as LargestEntriesState
from sam_optax._family.sparse_sam import largest_entries as largest_entries
from sam_optax._family.sparse_sam import sparse_sam as sparse_sam
from sam_optax._family.spectral_sam import spectral_ascent as spectral_ascent
from sam_optax._family.spectral_sam import spectral_sam as spectral_sam
from sam_optax._family.stable_sam import renormalise as renormalise
from sam_optax._family.stable_sam import stable_sam as stable_sam
from sam_optax._family.tilted_sam import GaussianNoiseState as GaussianNoiseState
from sam_optax._family.tilted_sam import PerturbedLossState as PerturbedLossState
from sam_optax._family.tilted_sam import gaussian_noise as gaussian_noise
from sam_optax._family.tilted_sam import keep_loss as keep_loss
from sam_optax._family.tilted_sam import tilted as tilted
from sam_optax._family.tilted_sam import tilted_sam as tilted_sam
from sam_optax._family.unified_sam import unified_sam as unified_sam
from sam_optax._family.unnormalised_sam import unnormalised_sam as unnormalised_sam
from sam_optax._family.vasso import RunningAverageState as RunningAverageState
from sam_optax._family.vasso import running_average as running_average
from sam_optax._family.vasso import vasso as vasso
from sam_optax._family.wsam import DecoupledWSAMState as DecoupledWSAMState
from sam_optax._family.wsam import decoupled_wsam as decoupled_wsam
from sam_optax._family.wsam import wsam as wsam
from sam_optax._family.xsam import arc as arc
from sam_optax._family.xsam import xsam as xsam
from sam_optax._family.xsam import xsam_alpha as xsam_alpha
from sam_optax._family.z_sharp import largest_scores as largest_scores
from sam_optax._family.z_sharp import z_sharp as z_sharp
from sam_optax._functional import grad as grad
from sam_optax._functional import value_and_grad as value_and_grad
from sam_optax._functional import value_and_grad_fn as value_and_grad_fn
from sam_optax._jacobian_sam import jacobian_grad_fn as jacobian_grad_fn
from sam_optax._jacobian_sam import jacobian_sam as jacobian_sam
from sam_optax._joined import in_turn as in_turn
from sam_optax._joined import sum_of as sum_of
from sam_optax._masks import name_mask as name_mask
from sam_optax._normalization import elementwise as elementwise
from sam_optax._normalization import filterwise as filterwise
from sam_optax._normalization import layerwise as layerwise
from sam_optax._payments import payments as payments
from sam_optax._payments import pays as pays
from sam_optax._rules import stateless as stateless
from sam_optax._sharing import SharingState as SharingState
from sam_optax._sharing import sharing as sharing
from sam_optax._sharpness_aware import SharpnessAwareState as SharpnessAwareState
from sam_optax._sharpness_aware import sharpness_aware as sharpness_aware

__version__ = "0.2.0"

__all__ = (
    "BSAMState",
    "CadencedState",
    "Composition",
    "DecoupledWSAMState",
    "FAMILY",
    "GAMState",
    "GaussianAscentState",
    "GaussianNoiseState",
    "LargestEntriesState",
    "LookbehindState",
    "Member",
    "MomentumState",
    "Part",
    "PerturbedLossState",
    "PreviousState",
    "RunningAverageState",
    "SAMPaState",
    "SecondMomentState",
    "SharingState",
    "SharpnessAwareState",
    "StepCountState",
    "TowardEigenvectorState",
    "WhenLargeState",
    "WithProbabilityState",
    "WithoutAverageState",
    "adaptive",
    "along_momentum",
    "arc",
    "asam",
    "async_sam",
    "bsam",
    "cadenced",
    "composition",
    "cr_sam",
    "curvature",
    "decoupled_wsam",
    "draws",
    "dual_ascent",
    "eigen_sam",
    "elementwise",
    "esam",
    "every",
    "extrapolate",
    "filterwise",
    "fisher_ascent",
    "fisher_sam",
    "flat_lora",
    "friendly_sam",
    "from_step",
    "gam",
    "gaussian_ascent",
    "gaussian_noise",
    "grad",
    "gradient_norm_penalty",
    "gsam",
    "imb_sam",
    "in_turn",
    "jacobian_grad_fn",
    "jacobian_sam",
    "k_sam",
    "keep_loss",
    "keep_momentum",
    "keep_orthogonal",
    "keep_second_moment",
    "largest_entries",
    "largest_scores",
    "late_phase",
    "late_tail",
    "layerwise",
    "le_sam",
    "limit_rise",
    "look_sam",
    "lookbehind",
    "momentum_sam",
    "multi_step",
    "multi_step_sam",
    "name_mask",
    "normalization_mask",
    "payments",
    "pays",
    "periodic_sam",
    "pmean",
    "polyak_sam",
    "polyak_step",
    "precondition",
    "preconditioned_sam",
    "previous",
    "proportional_ascent",
    "random_perturbation",
    "randomised",
    "renormalise",
    "reuse_orthogonal",
    "rho_from_learning_rate",
    "running_average",
    "sagm",
    "sam",
    "sampa",
    "shared_momentum_sam",
    "shared_preconditioned_sam",
    "sharing",
    "sharpness_aware",
    "sparse_sam",
    "spectral_ascent",
    "spectral_sam",
    "stable_sam",
    "stateless",
    "sum_of",
    "surrogate_gap",
    "tilted",
    "tilted_sam",
    "toward_eigenvector",
    "unified_sam",
    "unnormalised_sam",
    "value_and_grad",
    "value_and_grad_fn",
    "vasso",
    "when_large",
    "with_probability",
    "without_average",
    "wsam",
    "xsam",
    "xsam_alpha",
    "z_sharp",
)
