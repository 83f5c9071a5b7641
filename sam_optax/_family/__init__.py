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
    "friendly_sam": Member("method"),
    "from_step": Member("cadence"),
    "gam": Member("method"),
    "gaussian_ascent": Member("ascent", uses_clean=False),
    "gradient_norm_penalty": Member("method"),
    "gsam": Member("method"),
    "k_sam": Member("examples", ("losses",)),
    "keep_momentum": Member("descent"),
    "keep_orthogonal": Member("descent"),
    "largest_entries": Member("filter"),
    "largest_scores": Member("filter"),
    "late_phase": Member("wrapper"),
    "look_sam": Member("method"),
    "lookbehind": Member("optimizer"),
    "momentum_sam": Member("method", uses_clean=False),
    "multi_step": Member("ascent"),
    "multi_step_sam": Member("method"),
    "previous": Member("filter"),
    "proportional_ascent": Member("ascent"),
    "random_perturbation": Member("method", uses_clean=False),
    "randomised": Member("wrapper"),
    "renormalise": Member("descent"),
    "reuse_orthogonal": Member("otherwise", ("keep_orthogonal",)),
    "running_average": Member("filter"),
    "sam": Member("method"),
    "sampa": Member("optimizer", ("previous_grad_fn",), uses_clean=False),
    "shared_momentum_sam": Member("optimizer", uses_clean=False),
    "sparse_sam": Member("method"),
    "stable_sam": Member("method"),
    "surrogate_gap": Member("descent"),
    "toward_eigenvector": Member("filter"),
    "unnormalised_sam": Member("method"),
    "vasso": Member("method"),
    "when_large": Member("cadence"),
    "with_probability": Member("cadence"),
    "without_average": Member("filter"),
    "wsam": Member("method"),
    "xsam": Member("method"),
    "z_sharp": Member("method"),
}
