"""Step time over many devices by a model: SGD, SAM with one perturbation, SAM with one a group.

    python benchmarks/interconnect.py                   # table and figure, up to 4096 devices
    python benchmarks/interconnect.py --page docs/growth.md     # and into the page's table

Nothing is measured here but the volumes, which come from results/communication.json (compiled
programs of two hosts of four devices). The rest is a model:

  * Over n devices with latency a and bandwidth b, a gather or a scatter of V bytes takes
    (n-1) a + (n-1)/n V/b on a ring, or ceil(log2 n) (a + V/b) on a tree, whichever is less, and an
    all-reduce is both.
  * Devices of a host are joined by links of the host; between hosts every device has a link of its
    own. What several hosts take part in runs in two stages: within hosts the whole volume, and
    between hosts the part that each device holds then.
  * A pass, forward and backward, takes the time of its arithmetic, with as many examples on each
    device for any number of devices. A share of it hides communication; the rest waits. The second
    pass of SAM moves what SGD moves, the first what its method moves beyond that, and the second
    starts when the first has all of its gradient.
  * Where parameters are cut, an all-reduce of whole gradients within a host counts as the scatter
    that it stands for: a compiler for CPUs writes it so.

A group is a host.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import _paths  # noqa: F401
import communication
import matplotlib
import matplotlib.pyplot as plt
from _report import BLUE, GREEN, GREY, RED, STYLE

DEVICES = tuple(2**n for n in range(3, 13))  # 8 to 4096
SHOWN = (8, 64, 512, 4096)  # in the table
LAYOUTS = ("data parallel", "HSDP")  # over thousands of devices nobody gathers over all of them
METHODS = {  # label, color, marker
    "SGD": ("SGD", RED, "o"),
    "shared": ("SAM, one perturbation for all", BLUE, "s"),
    "group": ("SAM, one for each host", GREEN, "^"),
}


class Machine(NamedTuple):
    """Seconds, and bytes a second in one direction, of every device."""

    devices: int = 8  # of a host
    latency: float = 3e-6  # of a step of a ring within a host
    bandwidth: float = 300e9  # within a host
    latency_between: float = 10e-6
    bandwidth_between: float = 12.5e9  # 100 Gbit/s a device


class Work(NamedTuple):
    parameters: float = 1e9
    bytes: int = 4  # of a parameter and of a gradient
    gradient: float = 0.2  # seconds of one on a device, with its part of the batch
    overlap: float = 0.5  # share of it that hides communication


NETWORKS = {"100 Gbit/s a device": 12.5e9, "25 Gbit/s a device": 3.125e9}


def one_way(n: int, volume: float, latency: float, bandwidth: float) -> float:
    """Seconds of a gather or a scatter, half an all-reduce, on a ring or a tree."""
    ring = (n - 1) * latency + (n - 1) / n * volume / bandwidth
    tree = math.ceil(math.log2(n)) * (latency + volume / bandwidth)
    return min(ring, tree)


def moving(row: dict[str, Any], devices: int, work: Work, machine: Machine) -> float:
    """Seconds of the collectives that a row of the volumes lists, on so many devices."""
    local = min(machine.devices, devices)
    hosts = devices // local
    unit = work.parameters * work.bytes / communication.parameters()
    seconds = 0.0
    for c in row["collectives"]:
        volume, over_hosts_alone = unit * c["elements"], c["devices"] == communication.HOSTS
        one = 0.0
        if over_hosts_alone:  # of the part that a device holds, counted on hosts of fewer devices
            part = volume * communication.DEVICES / local
        else:
            one += one_way(local, volume, machine.latency, machine.bandwidth)
            part = volume / local
        if c["between"]:
            one += one_way(hosts, part, machine.latency_between, machine.bandwidth_between)
        scatter = row["layout"] != "data parallel" and not c["between"]
        seconds += one * (2 if c["kind"] == "reduced" and not scatter else 1)
    return seconds


def step_time(rows: Any, layout: str, method: str, n: int, work: Work, machine: Machine) -> float:
    """Seconds of a step of a method, from the rows of the volumes."""
    of = {r["method"]: moving(r, n, work, machine) for r in rows if r["layout"] == layout}
    passes = [of["SGD"]] if method == "SGD" else [of[method] - of["SGD"], of["SGD"]]
    hidden = work.overlap * work.gradient
    return sum(work.gradient + max(0.0, seconds - hidden) for seconds in passes)


def simulate(rows: list[dict[str, Any]], work: Work, machine: Machine) -> list[dict[str, Any]]:
    """A row for each layout, network and number of devices: seconds of each method."""
    found = []
    for layout in LAYOUTS:
        for network, bandwidth in NETWORKS.items():
            own = machine._replace(bandwidth_between=bandwidth)
            for n in DEVICES:
                times = {m: step_time(rows, layout, m, n, work, own) for m in METHODS}
                found.append({"layout": layout, "network": network, "devices": n} | times)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| parameters | network | devices | SGD, ms | shared, ms | group, ms "
        "| shared over SGD | group over SGD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row["devices"] in SHOWN:
            sgd, shared, group = (row[method] for method in METHODS)
            times = " | ".join(f"{1e3 * seconds:.0f}" for seconds in (sgd, shared, group))
            lines.append(
                f"| {row['layout']} | {row['network']} | {row['devices']} | {times} "
                f"| {shared / sgd:.2f} | {group / sgd:.2f} |"
            )
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], work: Work, path: Path) -> None:
    """Data parallel; the curves of HSDP lie within a hundredth of these."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(
        1, len(NETWORKS), figsize=(8, 3.4), layout="constrained", sharex=True, sharey=True
    )
    for axis, network in zip(axes, NETWORKS, strict=True):
        rows = [r for r in found if (r["layout"], r["network"]) == (LAYOUTS[0], network)]
        devices = [row["devices"] for row in rows]
        for method, (label, color, marker) in METHODS.items():
            times = [1e3 * row[method] for row in rows]
            axis.plot(devices, times, marker=marker, ms=4, color=color, label=label)
        for gradients in (1, 2):
            axis.axhline(1e3 * gradients * work.gradient, color=GREY, lw=1, ls=":", zorder=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=f"Between hosts {network}", xlabel="devices, eight a host")
    axes[0].set(ylabel="ms a step (model)", ylim=(0, None))
    axes[0].legend(frameon=False, loc="upper left")
    axes[0].annotate(
        "dotted: arithmetic of one gradient, of two",
        (DEVICES[0], 1e3 * work.gradient),
        va="bottom",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=Path, default=communication.RESULTS)
    parser.add_argument("--out", type=Path, default=Path("results/interconnect"))
    parser.add_argument("--page", type=Path, help="write table and figure into it and beside it")
    args = parser.parse_args()
    matplotlib.use("Agg")
    work, machine = Work(), Machine()
    found = simulate(json.loads(args.volumes.read_text())["volumes"]["rows"], work, machine)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "interconnect.json").write_text(
        json.dumps({"work": work._asdict(), "machine": machine._asdict(), "rows": found}, indent=1)
    )
    draw(found, work, args.out / "interconnect.png")
    if args.page:
        draw(found, work, args.page.with_suffix(".png"))
    print(table(found))
    if args.page:
        args.page.write_text(
            communication.replaced(args.page.read_text(), {"growth": table(found)})
        )
    print(f"\nNumbers and figure: {args.out}")


if __name__ == "__main__":
    main()
