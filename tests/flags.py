"""The tests under every debug flag of JAX, and whose fault each failure is.

    python tests/flags.py                     # all modes, all tests but the examples
    python tests/flags.py debug_nans x64      # some modes
    python tests/flags.py x64 -- tests/core   # what follows goes to pytest

A failure belongs to whom the innermost line outside of JAX belongs: to the library, to a test (or
Flax, Optax, ...). The command fails if one belongs to the library and is not in EXPECTED, where
every entry has its reason.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "debug_nans": {"JAX_DEBUG_NANS": "1"},
    "debug_infs": {"JAX_DEBUG_INFS": "1"},
    "checking_leaks": {"JAX_CHECK_TRACER_LEAKS": "1"},
    "disable_jit": {"JAX_DISABLE_JIT": "1"},
    "debug_nans, disable_jit": {"JAX_DEBUG_NANS": "1", "JAX_DISABLE_JIT": "1"},
    "rank_promotion": {"JAX_NUMPY_RANK_PROMOTION": "raise"},
    "dtype_promotion": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    "x64": {"JAX_ENABLE_X64": "1"},
    "threefry_partitionable": {"JAX_THREEFRY_PARTITIONABLE": "1"},
    "threefry_original": {"JAX_THREEFRY_PARTITIONABLE": "0"},
    "python -O": {"PYTHONOPTIMIZE": "1"},
    "python -W error": {"PYTHONWARNINGS": "error"},
}
FED = "the test feeds NaN or infinity, which the flag is there to stop"
# mode: [(pattern of the test, pattern of the message, why a failure in a line of the library is
# right)]; both patterns have to be found.
EXPECTED = {
    "debug_nans": [
        (r"nonfinite|one_bad_entry", r"^FloatingPointError: invalid value \(nan\)", FED),
    ],
    "disable_jit": [
        (
            r"mesh|multi_device|shard|pmap|devices|explicit|axis|vmap",
            "",
            "JAX has no maps over devices without jit",
        ),
        (
            r"compile|trace|program|cache|donat|memory|text|cost",
            "",
            "there is no program to look at",
        ),
        (
            r"cond|scan|loop|count|evaluat|points",
            "",
            "a loop or branch of Python runs as it is written",
        ),
    ],
    "dtype_promotion": [
        ("", "complex64|complex128", "a complex number times a real one is a promotion")
    ],
}
EXPECTED["debug_infs"] = [
    (
        r"nonfinite|not_finite|non_finite|nan|inf(inite|inity)?\b|finite|overflow|bad|float16|"
        r"limit|skips|memory_is_kept|at_the_edge|kept_or_replaced|huge|diverge",
        r"^FloatingPointError: invalid value",
        FED,
    ),
    (
        "",
        r"encountered in (div|pow)",
        "p = 1 is an infinite power, and its order may be infinity",
    ),
]
EXPECTED["debug_nans, disable_jit"] = EXPECTED["debug_nans"] + EXPECTED["disable_jit"]


# --- a plugin of pytest, which tells of every failure whose line it came from ---


def owner(excinfo):
    """Whose line failed: the innermost one that belongs neither to JAX nor to the interpreter."""
    places = [str(entry.path) for entry in excinfo.traceback]
    for path in reversed(places):
        if "/sam_optax/" in path and "/site-packages/" not in path:
            return "library"
        if str(ROOT / "tests") in path or "doctest" in path:
            return "test"
        for package in ("optax", "flax", "equinox", "orbax", "chex", "hypothesis"):
            if f"/site-packages/{package}/" in path:
                return package
    return "test"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        message = str(call.excinfo.value).splitlines() or [""]
        told = owner(call.excinfo), f"{call.excinfo.typename}: {message[0]}"[:160]
        item.user_properties.append(("failure", told))
    yield


def pytest_runtest_logreport(report):
    path = os.environ.get("FLAGS_REPORT")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    failure = dict(report.user_properties).get("failure") if report.failed else None
    if report.when == "call" or report.failed:
        with open(path, "a") as file:
            file.write(json.dumps([report.nodeid, failure]) + "\n")


# --- the command ---


def run(mode, arguments, cache):
    """(seconds, passed, [(test, whose, message)]) of one mode."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | MODES[mode] | {"FLAGS_REPORT": str(report)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        # Many modes compile the same programs.
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", "pytest", "-p", "flags", "-q", "--tb=no", "-n", "2"]
        command += ["-m", "not examples", "-p", "no:cacheprovider"]
        # With -O only the assertions that pytest rewrites are there: those of the tests.
        command += ["-W", "ignore::pytest.PytestConfigWarning"]
        start = time.monotonic()
        ended = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{mode}: no test ran\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
    failures = [(test, *(failure or ("test", "?"))) for test, failure in lines if failure]
    return seconds, len(lines) - len(failures), failures


def reason(mode, test, message):
    """Why this failure is right, if it is known."""
    for of_test, of_message, why in EXPECTED.get(mode, []):
        if re.search(of_test, test) and re.search(of_message, message):
            return why
    return None


def main(arguments):
    if "--" in arguments:
        modes, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    else:
        modes, rest = arguments, []
    unexpected, cache = [], tempfile.TemporaryDirectory()
    print("| mode | passed | library | expected | tests and others | minutes |")
    print("|---|---|---|---|---|---|")
    for mode in modes or MODES:
        seconds, passed, failures = run(mode, rest, cache.name)
        ours = [f for f in failures if f[1] == "library"]
        new = [f for f in ours if reason(mode, f[0], f[2]) is None]
        unexpected += [(mode, *f) for f in new]
        others = {}
        for _, whose, _ in failures:
            others[whose] = others.get(whose, 0) + (whose != "library")
        told = ", ".join(f"{n} {whose}" for whose, n in sorted(others.items()) if n) or "0"
        row = (mode, passed, len(new), len(ours) - len(new), told, f"{seconds / 60:.0f}")
        print("|", " | ".join(map(str, row)), "|", flush=True)
        if log := os.environ.get("FLAGS_LOG"):
            with open(log, "a") as file:
                file.writelines(
                    f"{mode}\t{whose}\t{t}\t{message}\n" for t, whose, message in failures
                )
    groups = {}
    for mode, test, _, message in unexpected:
        groups.setdefault((mode, message), []).append(test)
    for (mode, message), tests in groups.items():
        print(f"{mode}: {message}\n    {len(tests)} tests, such as {tests[0]}")
    return bool(unexpected)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
