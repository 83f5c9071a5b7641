"""Puts the examples on the path: importing this, first, makes their modules importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))
