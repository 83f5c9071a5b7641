"""The MLP in PyTorch with its plain step and SAM's, where both are installed (never required).

    pip install torch pytorch_optimizer

Times of two frameworks also differ by their kernels: compare SAM over plain within each.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from _steps import CYCLE, LEARNING_RATE, RHO


def turns(widths: tuple[int, ...], batch: tuple[Any, Any], classes: int) -> dict[str, Callable]:
    """Turns of CYCLE steps for `_timing.paired`; empty, after a line, without PyTorch."""
    try:
        import torch
        from pytorch_optimizer import SAM
    except ImportError as error:
        print(f"PyTorch is left out: {error}")
        return {}
    device = "cuda" if torch.cuda.is_available() and _on_gpu(batch) else "cpu"
    x = torch.tensor(np.asarray(batch[0]).reshape(len(batch[0]), -1), device=device)
    y = torch.tensor(np.asarray(batch[1]).astype(np.int64), device=device)

    def network() -> Any:
        sizes, layers = (x.shape[1], *widths), []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], classes)).to(device)

    def turn(sharp: bool) -> Callable[[], None]:
        model, sgd = network(), torch.optim.SGD
        settings = {"lr": LEARNING_RATE, "momentum": 0.9}
        if sharp:
            optimizer = SAM(model.parameters(), sgd, rho=RHO, **settings)
        else:
            optimizer = sgd(model.parameters(), **settings)

        def loss() -> Any:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(model(x), y)
            value.backward()
            return value

        def run() -> None:
            for _ in range(CYCLE):
                value = loss()
                # SAM climbs by the gradient at hand and calls the closure there.
                optimizer.step(loss) if sharp else optimizer.step()
            value.item()  # waits for the device

        return run

    return {"PyTorch, plain": turn(False), "PyTorch, SAM": turn(True)}


def _on_gpu(batch: tuple[Any, Any]) -> bool:
    return any(device.platform == "gpu" for device in batch[0].devices())
