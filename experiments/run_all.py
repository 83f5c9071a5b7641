"""Runs the experiments one after another and collects what became of every claim in one table.

    python experiments/run_all.py                      # all of them
    python experiments/run_all.py p_norm m_sharpness   # some
    python experiments/run_all.py --quick              # digits, tiny grids, for CI

Writes OUT/claims.md and OUT/claims.json. An interrupted run, started again, goes on where it
stopped. Claims 1 to 4 at their published size (ImageNet, Wide ResNets on CIFAR) need data and
machines of their own: their rows point at examples/image_classification.py, which has the settings
for CIFAR; ImageNet is left out.
"""

import argparse
import importlib
import json
import re
import time
from pathlib import Path

HERE = Path(__file__).parent
OTHERS = (Path(__file__).stem, "compare_methods")  # which tests no claim
NAMES = sorted(p.stem for p in HERE.glob("[!_]*.py") if p.stem not in OTHERS)
QUICK = ("scale_invariance",)  # with --quick and no names: the others have tests of their own
WRN = "examples/image_classification.py --model"  # settings 1 to 3 of its docstring
ELSEWHERE = [  # claim, published, command
    (
        "1: SAM lowers test error on CIFAR, at full size",
        "WRN-28-10, basic augmentation: CIFAR-10 3.5 to 2.7 %, CIFAR-100 18.8 to 16.5 %",
        f"{WRN} 28-10",
    ),
    (
        "2: longer training on ImageNet overfits with SGD, not with SAM",
        "ResNet-152, 100 and 400 epochs, top-1 error: SGD 20.4, 20.9; SAM 19.2, 18.4",
        "none: needs ImageNet and a ResNet-152",
    ),
    (
        "3: ASAM on CIFAR-10, at full size",
        "WRN-22-8, accuracy: SGDW 96.99, SAM 97.45, ASAM 97.54",
        f"{WRN} 22-8",
    ),
    (
        "4: the same with a light wrapper",
        "WRN-16-8, error: SGD 3.20, SAM 2.86, ASAM 2.55",
        f"{WRN} 16-8",
    ),
]


def markdown(rows):
    """Rows of (claim, claimed, measured here, verdict, seconds, command)."""
    header = ("claim", "claimed", "measured here", "verdict", "seconds", "command")
    lines = [header, ("---",) * len(header), *rows]
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")
    return "".join(f"| {' | '.join(map(clean, line))} |\n" for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("results/experiments"))
    parser.add_argument("--seeds", type=int, help="test runs of a method; else each one's own")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of before")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"names must be among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    names = args.names or (QUICK if args.quick else NAMES)
    options = ["--out", str(args.out)] + ["--quick"] * args.quick + ["--fresh"] * args.fresh
    options += ["--seeds", str(args.seeds)] if args.seeds is not None else []
    begin, records = time.perf_counter(), []
    for name in names:
        print(f"\n=== {name} ===", flush=True)
        records.append(importlib.import_module(name).main(options))
    rows = [
        (
            *(c[key] for key in ("claim", "published", "measured", "verdict")),
            r["seconds"],
            r["command"],
        )
        for r in records
        for c in r["claims"]
    ]
    rows += [(claim, told, "-", "not tested here", "-", how) for claim, told, how in ELSEWHERE]
    rows.sort(key=lambda row: int(re.match(r"\d*", row[0]).group() or 99))  # others at the end
    table, stem = markdown(rows), "claims_quick" if args.quick else "claims"
    (args.out / f"{stem}.md").write_text(table)
    (args.out / f"{stem}.json").write_text(json.dumps(records, indent=1))
    print(f"\n{table}\n{time.perf_counter() - begin:.0f} s in all. Table: {args.out / stem}.md")
    return records


if __name__ == "__main__":
    main()
