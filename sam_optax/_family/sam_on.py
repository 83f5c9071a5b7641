"""SAM-ON (Mueller et al., 2023): normalization layers alone."""

from typing import Any

import jax
import optax

from sam_optax import _masks


def normalization_mask(params: optax.Params) -> Any:
    """Marks the parameters of normalization layers in a Flax tree: SAM-ON by a mask.

    The paper finds that perturbing them alone does as well as SAM, with the
    norm taken over them alone. Use it as `sam(rho, mask=sam_optax.normalization_mask)`; rho
    has to be larger than for SAM.

        mask = True where a name on the path contains "norm" or "bn", in any
        case, or where the leaf or its sibling is called "scale"

    Args:
      params: parameters of a Flax model, nested by name (linen, or the state of
        an NNX module).

    Returns:
      A tree of booleans like params.

    Raises:
      ValueError: if no parameter is found, since nothing would be perturbed.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, sam_optax
      >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
      >>> print(sam_optax.normalization_mask(params)["layers_1"])
      {'bias': True, 'scale': True}

    References:
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware
      Minimization Needs <https://arxiv.org/abs/2306.04226>`_, 2023; the rule of
      names of the authors' code.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [[name.lower() for name in _masks.names(path)] for path, _ in flat]
    scaled_layers = {tuple(n[: n.index("scale")]) for n in names if "scale" in n}

    def is_normalization(path: list[str]) -> bool:
        named = any("norm" in name or "bn" in name for name in path)
        return named or any(tuple(path[:depth]) in scaled_layers for depth in range(len(path)))

    mask = [is_normalization(path) for path in names]
    if not any(mask):
        raise ValueError(
            "params must hold parameters of normalization layers, got only "
            f"{sorted({'/'.join(path) for path in names})[:5]}"
        )
    return jax.tree.unflatten(treedef, mask)
