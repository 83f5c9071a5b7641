"""`python -m sam_optax`: which version on which devices, and what to try first."""

import importlib.metadata

import jax

import sam_optax

SOURCE = "https://github.com/sam-optax/sam-optax"
DOCUMENTATION = "https://sam-optax.github.io/sam-optax/"
_COMMANDS = {
    "examples/label_noise.py": "SGD, SAM and ASAM on wrong labels: table and figure in two minutes",
    "examples/train_nnx.py": "a jitted step with BatchNorm and dropout",
    "examples/landscape.py": "how sharp the solutions are, measured and drawn",
}


def main() -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    devices = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
    print(f"sam_optax {sam_optax.__version__} with {versions}; devices: {devices}")
    print(f"\nTo try, in a clone of {SOURCE} with pip install -e '.[label-noise,flax]':")
    for script, what in _COMMANDS.items():
        print(f"  python {script:26} # {what}")
    print(f"\nDocumentation: {DOCUMENTATION}")


if __name__ == "__main__":
    main()
