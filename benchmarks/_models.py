"""The subjects: an MLP, a pre-activation ResNet with BatchNorm, a vision transformer with dropout.

Each comes as a loss of (params, stats, key, x, y) that returns (loss, stats), its parameters, its
BatchNorm statistics (an empty tree without BatchNorm) and one batch of random images. With
`abstract=True` all arrays are shapes alone, so that a large subject costs nothing to describe.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Problem(NamedTuple):
    loss_fn: Callable[..., Any]
    params: Any
    stats: Any
    batch: tuple[Any, Any]  # images and labels
    classes: int


class MLP(nn.Module):
    widths: tuple[int, ...]
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class ResNet(nn.Module):
    """He et al., 2016: normalisation and activation come before each convolution."""

    blocks: tuple[int, ...]  # a stage; width doubles and resolution halves between stages
    width: int
    classes: int
    bottleneck: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        def norm_relu(x):
            return nn.relu(nn.BatchNorm(False, momentum=0.9, dtype=self.dtype)(x))

        def conv(x, width, kernel, stride=1):
            return nn.Conv(
                width, (kernel, kernel), (stride, stride), use_bias=False, dtype=self.dtype
            )(x)

        if self.bottleneck:
            x = nn.max_pool(conv(x, self.width, 7, 2), (3, 3), (2, 2), "SAME")
        else:
            x = conv(x, self.width, 3)
        for stage, blocks in enumerate(self.blocks):
            inner = self.width * 2**stage
            outer = 4 * inner if self.bottleneck else inner
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = norm_relu(x)
                if x.shape[-1] != outer or stride > 1:
                    x = conv(y, outer, 1, stride)
                if self.bottleneck:
                    y = norm_relu(conv(norm_relu(conv(y, inner, 1)), inner, 3, stride))
                    x = x + conv(y, outer, 1)
                else:
                    x = x + conv(norm_relu(conv(y, inner, 3, stride)), outer, 3)
        return nn.Dense(self.classes, dtype=self.dtype)(norm_relu(x).mean((1, 2)))


class Transformer(nn.Module):
    """A vision transformer: tokens are patches of the image, averaged at the end."""

    layers: int
    width: int
    heads: int
    patch: int  # pixels along an edge
    classes: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        n, height, width, channels = x.shape
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(n, rows, self.patch, columns, self.patch, channels).swapaxes(2, 3)
        x = nn.Dense(self.width, dtype=self.dtype)(x.reshape(n, rows * columns, -1))
        position = self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        drop = lambda x: nn.Dropout(self.dropout, deterministic=False)(x)
        norm = lambda x: nn.LayerNorm(dtype=self.dtype)(x)
        x = drop(x + position.astype(x.dtype))
        for _ in range(self.layers):
            x = x + drop(nn.MultiHeadDotProductAttention(self.heads, self.dtype)(norm(x)))
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(norm(x)))
            x = x + drop(nn.Dense(self.width, dtype=self.dtype)(drop(y)))
        return nn.Dense(self.classes, dtype=self.dtype)(norm(x).mean(1))


# size -> name -> the network, the edge of the images in pixels, and the examples a step
SIZES: dict[str, dict[str, tuple[nn.Module, int, int]]] = {
    "tiny": {  # to see that it runs
        "mlp": (MLP((32,), 10), 8, 16),
        "resnet": (ResNet((1,), 4, 10), 8, 16),
        "transformer": (Transformer(1, 16, 2, 4, 10), 8, 16),
    },
    "small": {
        "mlp": (MLP((512, 512), 10), 16, 64),  # 0.66 million parameters
        "resnet": (ResNet((1, 1, 1), 8, 10), 16, 32),
        "transformer": (Transformer(2, 64, 4, 4, 10), 16, 32),
    },
    "medium": {
        "mlp": (MLP((1024, 1024), 10), 16, 128),
        "resnet": (ResNet((2, 2, 2), 16, 10), 32, 64),
        "transformer": (Transformer(4, 128, 4, 4, 10), 32, 32),
    },
    "large": {  # for an accelerator: bfloat16 products, parameters in float32
        "mlp": (MLP((4096, 4096), 1000, jnp.bfloat16), 32, 1024),
        "resnet": (ResNet((3, 4, 6, 3), 64, 1000, True, jnp.bfloat16), 224, 128),  # ResNet-50
        "transformer": (Transformer(12, 768, 12, 16, 1000, 0.1, jnp.bfloat16), 224, 128),  # ViT-B
    },
}
MODELS = tuple(SIZES["small"])


def problem(name: str, size: str, abstract: bool = False) -> Problem:
    """A subject with its parameters and one batch; the same numbers at every call."""
    model, pixels, examples = SIZES[size][name]

    def loss_fn(params, stats, key, x, y):
        logits, updated = model.apply(
            {"params": params, **stats}, x, rngs={"dropout": key}, mutable=list(stats)
        )
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

    def build():
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (examples, pixels, pixels, 3))
        y = jax.random.randint(keys[1], (examples,), 0, model.classes)
        variables = model.init({"params": keys[2], "dropout": keys[3]}, x[:1])
        return variables.pop("params"), variables, (x, y)

    params, stats, batch = jax.eval_shape(build) if abstract else jax.jit(build)()
    return Problem(loss_fn, params, stats, batch, model.classes)


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
