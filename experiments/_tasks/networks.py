"""The networks of the tasks: small ones, that train in seconds on two CPU cores."""

import flax.linen as nn
import jax
import jax.numpy as jnp

PAD = 0  # token that fills the end of a text


def drop(module: nn.Module, x: jax.Array, rate: jax.typing.ArrayLike, train: bool) -> jax.Array:
    """Dropout whose rate may be traced, which nn.Dropout's may not."""
    if not train:
        return x
    key = module.make_rng("dropout")

    def dropped() -> jax.Array:
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    # Random numbers take two fifths of a step of the text transformer: none for a rate of 0.
    return jax.lax.cond(jnp.asarray(rate) > 0, dropped, lambda: x)


class MLP(nn.Module):
    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class Encoder(nn.Module):
    """Pre-norm transformer blocks."""

    depth: int
    heads: int

    @nn.compact
    def __call__(self, x, mask, train, dropout):
        width = x.shape[-1]
        for _ in range(self.depth):
            y = nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + drop(self, y, dropout, train)
            y = nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))
            x = x + drop(self, y, dropout, train)
        return nn.LayerNorm()(x)


class TextTransformer(nn.Module):
    """Tokens to classes: the mean over those that are not PAD."""

    vocabulary: int
    classes: int
    width: int = 48
    depth: int = 1
    heads: int = 4

    @nn.compact
    def __call__(self, tokens, train, dropout):
        there = tokens != PAD
        places = self.param("places", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + places
        mask = there[:, None, None, :]
        x = Encoder(self.depth, self.heads)(x, mask, train, dropout)
        weight = there / jnp.maximum(there.sum(-1, keepdims=True), 1)
        return nn.Dense(self.classes)(jnp.einsum("nlw,nl->nw", x, weight))


class VisionTransformer(nn.Module):
    classes: int
    patch: int = 7
    width: int = 48
    depth: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, images, train, dropout):
        n, height, width, channels = images.shape
        p = self.patch
        x = images.reshape(n, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Dense(self.width)(x.reshape(n, -1, p * p * channels))
        x = x + self.param("places", nn.initializers.normal(0.02), x.shape[1:])
        x = Encoder(self.depth, self.heads)(x, None, train, dropout)
        return nn.Dense(self.classes)(x.mean(1))


class ResNet(nn.Module):
    """Pre-activation residual network with BatchNorm: a stem, and a block at each width."""

    classes: int
    widths: tuple[int, ...] = (8, 16)

    @nn.compact
    def __call__(self, x, train):
        def conv(features: int, size: int = 3, stride: int = 1) -> nn.Conv:
            return nn.Conv(features, (size, size), (stride, stride), use_bias=False)

        def norm(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        x = conv(self.widths[0], stride=2)(x)
        for i, width in enumerate(self.widths):
            stride = 1 if i == 0 else 2
            y = norm(x)
            shortcut = x if i == 0 else conv(width, 1, stride)(y)
            x = shortcut + conv(width)(norm(conv(width, stride=stride)(y)))
        return nn.Dense(self.classes)(norm(x).mean((1, 2)))
