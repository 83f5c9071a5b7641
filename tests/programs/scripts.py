"""Runs an example as its reader does, and sees that it ends with a table and a figure."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Run by tests/core/test_multi_device.py: how far they may be from the definition they compare with.
SEVERAL_DEVICES = {
    "pmap_training": 1e-5,
    "shard_map_training": 1e-5,
    "jit_sharded": 1e-5,
    "multi_process": 1e-12,
}


def run_example(path: pathlib.Path, out: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]
    figures = list(out.glob("**/*.png"))
    assert figures and all(figure.stat().st_size > 10_000 for figure in figures)
    assert len(done.stdout.splitlines()) > 3  # a table
