"""Starts the local processes of multi_process.py, and sees that none is left behind.

On a cluster its launcher (srun, mpirun, ...) does this.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
from collections.abc import Callable
from typing import Any


def _child(target: Callable[..., None], *args: Any) -> None:
    """Runs the target, and ends when the parent does, however that happens."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    target(*args)


def start(target: Callable[..., None], processes: int, *args: Any) -> None:
    """Runs target(index, port, processes, *args) in processes of their own, to the end of all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork of a JAX program may hang
    running = {
        index: context.Process(target=_child, args=(target, index, port, processes, *args))
        for index in range(processes)
    }
    try:
        for process in running.values():
            process.start()
        while running:
            multiprocessing.connection.wait([p.sentinel for p in running.values()])
            for index, process in list(running.items()):
                if process.exitcode is not None:
                    del running[index]
                    if process.exitcode:
                        raise SystemExit(
                            f"process {index} of {processes} failed with exit code "
                            f"{process.exitcode}; what it said is above, the others were ended"
                        )
    finally:
        for process in running.values():
            process.kill()
            process.join()
