"""What the verifier costs, beside plain subprocesses in the same run; what forks cost; its memory over 10,000 programs.

    python tests/bench_verifier.py [--rounds 5] [--ballast 0 3] [--memory] [--no-site]

Every program is distinct and has four stdin tests; the rival is one subprocess per test that stops at the first failed
one, bare and with a limit set by preexec_fn, which makes Python fork the whole trainer.  Programs per second depend on
what else the machine does, so the ratios are taken round by round, the rivals one after the other, and shown with their
spread.  --no-site starts the rival's interpreters with -S, the quickest start there is: a lower bound for the ratios.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import verify  # noqa: E402

TESTS = [{"input": str(i), "output": str(i + 1)} for i in range(4)]
PYTHON = [sys.executable]
NUMBERS = itertools.count()  # makes every program distinct
FAULT = {"passing": 1, "failing": 2}  # what is added to the input, where 1 is right


def program(kind: str) -> str:
    return f"print(int(input()) + {FAULT[kind]})  # {next(NUMBERS)}"


def helpers(kind: str, count: int, tests=TESTS, fail_fast: bool = True) -> None:
    programs = [program(kind) for _ in range(count)]
    verdicts = verify.run_programs(programs, [tests] * count, fail_fast=fail_fast)
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


def rate(work, *arguments, count: int) -> float:
    started = time.monotonic()
    work(arguments[0], count, *arguments[1:])
    return count / (time.monotonic() - started)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"


def compare(kind: str, rounds: int) -> None:
    plain, forking, all_tests, rates = [], [], [], []
    for _ in range(rounds):
        rates.append(rate(helpers, kind, count=200))
        bare = rate(subprocesses, kind, count=24)
        plain.append(rates[-1] / bare)
        all_tests.append(rate(lambda k, n: helpers(k, n, fail_fast=False), kind, count=100) / bare)
        forking.append(rate(helpers, kind, count=200) / rate(lambda k, n: subprocesses(k, n, no_core), kind, count=12))
    print(f"  {kind}: {statistics.median(rates):.0f} programs/s; beside one subprocess per test {spread(plain)}, "
          f"where every test counts {spread(all_tests)}; with preexec_fn {spread(forking)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="each ratio is measured so often")
    parser.add_argument("--ballast", type=int, nargs="*", default=[0, 3], help="gigabytes that this process holds")
    parser.add_argument("--memory", action="store_true", help="also run 10,000 programs and print this process's memory")
    parser.add_argument("--no-site", action="store_true", help="start the rival's interpreters with -S")
    options = parser.parse_args()
    PYTHON.extend(["-S"] * options.no_site)
    missing = set(verify.WALLS) - set(verify.layers())
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, walls missing: {missing or 'none'}")
    for gigabytes in options.ballast:
        ballast = b"x" * (gigabytes << 30)
        started = time.monotonic()
        for _ in range(20):
            os.waitpid(os.fork() or os._exit(0), 0)
        fork = (time.monotonic() - started) / 20
        print(f"holding {len(ballast) >> 30} GB, a fork of this process takes {1000 * fork:.1f} ms")
        for kind in FAULT:
            compare(kind, options.rounds)
        del ballast
    for done in range(0, 10_001 if options.memory else 0, 2_000):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(f"after {done:6,} more programs (1 test each): {pages * 4 / 1024:.1f} MiB in this process", flush=True)
        if done < 10_000:
            helpers("passing", 2_000, TESTS[:1])


if __name__ == "__main__":
    main()
