"""The figures of examples/ into the site, so that they lie in the repository once."""

from pathlib import Path

import mkdocs_gen_files

for figure in sorted(Path("examples/figures").glob("*.png")):
    with mkdocs_gen_files.open(f"figures/{figure.name}", "wb") as file:
        file.write(figure.read_bytes())
