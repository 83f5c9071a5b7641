"""The family: one file a paper, its rules and the alias that carries the paper's name.

FAMILY says of every public name what it is, and what it needs beside a
gradient. It is the one table of this: contract test, benchmarks and examples
read it.
"""

from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal[
    "filter",  # gradient -> direction, before an ascent in optax.chain
    "ascent",  # direction -> perturbation
    "descent",  # perturbed gradient -> what the base optimizer sees
    "otherwise",  # clean gradient -> the same, at steps that a cadence does not pay for
    "cadence",  # gradient -> whether to pay for the perturbed gradient
    "method",  # gradient -> sharpness-aware gradient
    "wrapper",  # method -> method
    "optimizer",  # gradient -> updates; holds the base optimizer, or is one
    "examples",  # a function like value_and_grad of one loss per example
    "door",  # a function like value_and_grad of a model and a loss
]


class Member(NamedTuple):
    """What a name is and needs.

    Attributes:
      kind: its place in the algebra.
      needs: what its update takes beside params and grad_fn or value_fn, or its
        loss beside a batch.
      uses_clean: whether it looks at the gradient given; if not, a step that
        logs the loss of its own pass saves the clean one.
    """

    kind: Kind
    needs: tuple[str, ...] = ()
    uses_clean: bool = True


FAMILY = {
    "adaptive": Member("wrapper"),
    "along_momentum": Member("filter", ("keep_momentum",), uses_clean=False),
    "arc": Member("descent"),
    "asam": Member("method"),
    "async_sam": Member("method"),
    "bsam": Member("optimizer", uses_clean=False),
    "cadenced": Member("wrapper"),
    "cr_sam": Member("method"),
    "curvature": Member("descent"),
    "decoupled_wsam": Member("optimizer"),
    "draws": Member("wrapper"),
    "dual_ascent": Member("ascent"),
    "eigen_sam": Member("method"),
    "esam": Member("examples", ("key", "losses")),
    "every": Member("cadence"),
    "extrapolate": Member("descent"),
    "fisher_ascent": Member("ascent"),
    "fisher_sam": Member("method"),
    "flat_lora": Member("method", uses_clean=False),
    "friendly_sam": Member("method"),
    "from_step": Member("cadence"),
    "gam": Member("method"),
    "gaussian_ascent": Member("ascent", uses_clean=False),
    "gaussian_noise": Member("filter", uses_clean=False),
    "gradient_norm_penalty": Member("method"),
    "gsam": Member("method"),
    "imb_sam": Member("method", ("tail_grad_fn",)),
    "in_turn": Member("ascent"),
    "jacobian_sam": Member("door", ("model_fn", "loss_fn")),
    "k_sam": Member("examples", ("losses",)),
    "keep_loss": Member("descent", ("value_fn",)),
    "keep_momentum": Member("descent"),
    "keep_orthogonal": Member("descent"),
    "keep_second_moment": Member("descent"),
    "largest_entries": Member("filter"),
    "largest_scores": Member("filter"),
    "late_phase": Member("wrapper"),
    "late_tail": Member("wrapper"),
    "le_sam": Member("method"),
    "limit_rise": Member("ascent"),
    "look_sam": Member("method"),
    "lookbehind": Member("optimizer"),
    "momentum_sam": Member("method", uses_clean=False),
    "multi_step": Member("ascent"),
    "multi_step_sam": Member("method"),
    "periodic_sam": Member("method"),
    "polyak_sam": Member("method", ("value_fn",)),
    "polyak_step": Member("descent", ("value_fn",)),
    "precondition": Member("filter", ("keep_second_moment",)),
    "preconditioned_sam": Member("method"),
    "previous": Member("filter"),
    "proportional_ascent": Member("ascent"),
    "random_perturbation": Member("method", uses_clean=False),
    "randomised": Member("wrapper"),
    "renormalise": Member("descent"),
    "reuse_orthogonal": Member("otherwise", ("keep_orthogonal",)),
    "running_average": Member("filter"),
    "sagm": Member("method"),
    "sam": Member("method"),
    "sampa": Member("optimizer", ("previous_grad_fn",), uses_clean=False),
    "shared_momentum_sam": Member("optimizer", uses_clean=False),
    "shared_preconditioned_sam": Member("optimizer"),
    "sharing": Member("optimizer"),
    "sparse_sam": Member("method"),
    "spectral_ascent": Member("ascent"),
    "spectral_sam": Member("method"),
    "stable_sam": Member("method"),
    "sum_of": Member("ascent"),
    "surrogate_gap": Member("descent"),
    "tilted": Member("wrapper", ("value_fn",)),
    "tilted_sam": Member("method", ("value_fn",), uses_clean=False),
    "toward_eigenvector": Member("filter"),
    "unified_sam": Member("method"),
    "unnormalised_sam": Member("method"),
    "vasso": Member("method"),
    "when_large": Member("cadence"),
    "with_probability": Member("cadence"),
    "without_average": Member("filter"),
    "wsam": Member("method"),
    "xsam": Member("method"),
    "z_sharp": Member("method"),
}
