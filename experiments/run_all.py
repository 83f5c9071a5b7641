"""Runs the experiments one after another and collects what became of every claim in one table.

    python experiments/run_all.py                      # all of them
    python experiments/run_all.py p_norm m_sharpness   # some
    python experiments/run_all.py --quick              # digits, tiny grids, for CI

Writes OUT/claims.md, OUT/claims.json and OUT/RESULTS.md. RESULTS.md beside this file quotes the
tables of OUT/NAME_pages.json, copied to results/NAME.json. An interrupted run, started again, goes
on where it stopped. Claims 1 to 4 at their published size (ImageNet, Wide ResNets on CIFAR) need
data and machines of their own: their rows point at examples/image_classification.py, which has the
settings for CIFAR; ImageNet is left out.
"""

import argparse
import importlib
import json
import re
import time
from pathlib import Path

from _harness import markdown

HERE = Path(__file__).parent
OTHERS = (Path(__file__).stem, "compare_methods")  # which tests no claim
FIRST = "does_it_pay"  # whose runs these share:
SHARING = ("after_training", "rho_rules", "sensitivity")
NAMES = sorted(p.stem for p in HERE.glob("[!_]*.py") if p.stem not in (*OTHERS, *SHARING))
NAMES += SHARING
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


CLAIM = ("claim", "claimed", "measured here", "verdict", "seconds", "command")
BRIEF = "Does it pay?"  # README's table: the page has all of its columns


def results(records, claims):
    """The page of results: when and where, the tables of the experiments, all claims."""
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    minutes = sum(record["seconds"] for record in records) / 60
    lines = [
        "# Results of the experiments",
        f"Written by `python experiments/run_all.py` on {first['date'][:10]}: {first['cores']} "
        f"cores, {first['device']}, {versions}. {minutes:.0f} minutes of work. Errors are means "
        "and standard deviations over fresh seeds.",
    ]
    tables = {title: cells for record in records for title, cells in record["pages"].items()}
    tables.pop(BRIEF, None)
    if tables:
        lines.append(
            "Tables at equal tuning and equal compute; p-values, and better and worse, are by "
            "Welch's test over runs and a paired test over splits, corrected (Holm). What was "
            "looked at before, what was fixed beforehand and what was changed after a test error "
            "was seen: [PREREGISTERED.md](PREREGISTERED.md)."
        )
    for title, cells in tables.items():
        lines += [f"## {title}", markdown(cells).strip()]
    lines += ["## Claims", "p is Welch's, not corrected unless it says so.", claims.strip()]
    return "\n\n".join(lines) + "\n"


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
    table, stem = markdown([CLAIM, *rows]), "claims_quick" if args.quick else "claims"
    (args.out / f"{stem}.md").write_text(table)
    (args.out / f"RESULTS{'_quick' * args.quick}.md").write_text(results(records, table))
    (args.out / f"{stem}.json").write_text(json.dumps(records, indent=1))
    print(f"\n{table}\n{time.perf_counter() - begin:.0f} s in all. Table: {args.out / stem}.md")
    return records


if __name__ == "__main__":
    main()
