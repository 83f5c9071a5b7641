"""What every measure's result can do: be saved, and loaded as it was."""

import dataclasses
import json
import os
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A frozen record of arrays, numbers and strings that can be saved."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file, readable by NumPy alone."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays: Any = {name: value for name, value in fields.items() if hasattr(value, "shape")}
        others = {name: value for name, value in fields.items() if name not in arrays}
        arrays["header"] = json.dumps({"kind": type(self).__name__, "fields": others})
        with open(path, "wb") as file:  # np.savez would add a suffix to a bare path
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
          ValueError: if the file holds a result of another kind.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files if name != "header"}
            header = json.loads(str(file["header"]))
        if header["kind"] != cls.__name__:
            raise ValueError(f"path must hold a {cls.__name__}, got a {header['kind']} in {path}")
        others = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in header["fields"].items()
        }
        return cls(**arrays, **others)
