"""What the verifier costs, beside plain subprocesses in the same run.

    python tests/tools/bench_verifier.py [--rounds 5] [--ballast 0 3] [--no-site]

Every program is distinct and has four stdin tests. The rival is one subprocess per test that stops at the first failed
one, bare and with a limit set by preexec_fn, which makes Python fork the whole trainer. Programs per second depend on
what else the machine does, so ratios are taken round by round and shown with their spread. --no-site starts the rival's
interpreters with -S, the quickest start there is: a lower bound for the ratios.
"""
import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import verify  # noqa: E402

TESTS = [{"input": str(i), "output": str(i + 1)} for i in range(4)]
PYTHON = [sys.executable]
NUMBERS = itertools.count()                               # makes every program distinct
FAULT = {"passing": 1, "failing": 2}                      # what is added to the input, where 1 is right


def program(kind: str) -> str:
    return f"print(int(input()) + {FAULT[kind]})  # {next(NUMBERS)}"


def verifier(kind: str, count: int, fail_fast: bool = True) -> None:
    verdicts = verify.run_programs([program(kind) for _ in range(count)], [TESTS] * count, fail_fast=fail_fast)
    assert all(verdict.ok == (kind == "passing") for verdict in verdicts)


def subprocesses(kind: str, count: int, limit=None) -> None:
    def one(code: str) -> bool:
        for test in TESTS:
            done = subprocess.run([*PYTHON, "-c", code], input=test["input"], text=True, capture_output=True,
                                  preexec_fn=limit)
            if done.stdout.split() != test["output"].split():
                return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(one, [program(kind) for _ in range(count)]))
    assert all(ok == (kind == "passing") for ok in passed)


def no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def rate(work, kind: str, count: int, **options) -> float:
    """Programs per second."""
    begin = time.monotonic()
    work(kind, count, **options)
    return count / (time.monotonic() - begin)


def compare(kind: str, rounds: int) -> None:
    """Prints the ratios of one kind of program."""
    found = {"with one subprocess per test": [], "where every test counts": [], "with preexec_fn": []}
    for _ in range(rounds):
        ours, bare = rate(verifier, kind, 200), rate(subprocesses, kind, 24)
        ratios = (ours / bare, rate(verifier, kind, 100, fail_fast=False) / bare,
                  ours / rate(subprocesses, kind, 12, limit=no_core))
        for column, ratio in zip(found.values(), ratios):
            column.append(ratio)
    for title, column in found.items():
        middle = statistics.median(column)
        print(f"  {kind}, {title}: {middle:.1f}x ({min(column):.1f} to {max(column):.1f})", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each ratio is measured so often")
    parser.add_argument("--ballast", type=int, nargs="*", default=[0, 3], help="gigabytes that this process holds")
    parser.add_argument("--no-site", action="store_true", help="start the rival's interpreters with -S")
    options = parser.parse_args()
    PYTHON.extend(["-S"] * options.no_site)
    for gigabytes in options.ballast:
        ballast = b"x" * (gigabytes << 30)
        print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, holding {len(ballast) >> 30} GB")
        for kind in FAULT:
            compare(kind, options.rounds)
        del ballast


if __name__ == "__main__":
    main()
