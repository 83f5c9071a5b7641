"""Wide residual networks in Flax Linen, as in the authors' code, and their usual augmentation.

Pre-activation blocks of two 3x3 convolutions; where the number of channels changes, the shortcut
is a 1x1 convolution of the activation that both branches share. No dropout, no biases but the last.

References: Zagoruyko and Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_,
2016, and their models/wide-resnet.lua.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STATISTICS_MOMENTUM = 0.9  # share of the old running statistics that a step keeps; 0.1 in Torch
PADDING = 4  # pixels of black around an image before a crop of its old size


class WideResNet(nn.Module):
    """WRN-depth-width: images (N, height, width, channels) to float32 logits (N, classes).

    Parameters and BatchNorm statistics are float32; dtype is that of the computation.
    """

    depth: int  # 6 n + 4, n blocks in each of three stages
    width: int  # factor of the channels 16, 32, 64
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4 with n at least 1, got {self.depth}")
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=STATISTICS_MOMENTUM,
            dtype=self.dtype,
        )
        convolution = functools.partial(
            nn.Conv,
            padding=1,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
        )
        x = convolution(16, (3, 3))(x)
        for stage in range(3):
            channels = 16 * self.width * 2**stage
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage and not block else 1
                y = nn.relu(norm()(x))
                if x.shape[-1] != channels:
                    x = convolution(channels, (1, 1), stride, padding=0)(y)
                y = convolution(channels, (3, 3), stride)(y)
                x = x + convolution(channels, (3, 3))(nn.relu(norm()(y)))
        x = nn.relu(norm()(x)).mean((1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def crop_and_flip(key: jax.Array, image: jax.Array, flip: bool) -> jax.Array:
    """A random crop of the padded image, of its old size; mirrored half of the time."""
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    corner = jax.random.randint(crop_key, (2,), 0, 2 * PADDING + 1)
    image = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image) if flip else image


def cutout(key: jax.Array, image: jax.Array, size: int, probability: float) -> jax.Array:
    """Zero in a square around a random pixel, cut off at the border (arXiv 1708.04552)."""
    place_key, chance_key = jax.random.split(key)
    middle = jax.random.randint(place_key, (2,), 0, jnp.array(image.shape[:2]))
    rows, columns = (
        jnp.arange(n) - m + size // 2 for n, m in zip(image.shape, middle, strict=False)
    )
    hole = ((rows >= 0) & (rows < size))[:, None] & (columns >= 0) & (columns < size)
    hole &= jax.random.bernoulli(chance_key, probability)
    return jnp.where(hole[..., None], 0, image)
