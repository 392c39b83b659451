"""Stops a training at random moments, again and again, and checks that it always ends with the same weights and metrics.

    python tests/tools/soak.py --starts 100                  # Linux; as root also with a full disk, on a small tmpfs

Each start trains a toy planner for 20 steps, with checkpoints every 3, and is ended after a random time by one of:
SIGKILL, SIGTERM, SIGINT, a full disk, a log that lost its end (SIGKILL and a truncated metrics.jsonl, as after a power
cut). One that gets through before that does not count as one of --starts; its planner is compared with one that was
never stopped, and a new one is begun. Of logs that lost lines, only the lines that are there are compared. Fails at the
first traceback, difference, wrong exit status, ending without its one line, or loss of more than the steps since the
last checkpoint. What a start says goes to a file outside of the small disk, which is full at times.
"""
import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
import rm  # noqa: E402
import tracelift  # noqa: E402

STEPS, SAVE_EVERY = 20, 3
TRAIN = ["train", "--device", "cpu", "--mode", "rm_only", "--steps", STEPS, "--save_every", SAVE_EVERY,
         "--problems_per_step", 2, "--group_size", 4, "--max_trace_tokens", 12, "--warmup", 2]
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "truncated log")


def prepare(run_dir: Path) -> None:
    """Groups, a toy base model, a toy reward model."""
    common = ["--run_dir", run_dir]
    base = ["--sequences", 200, "--hidden", 32, "--layers", 2, "--eval_problems", 4, "--max_answer_tokens", 6]
    for module, argv in ((data, ["--train", 12, "--heldout", 5]), (executor, base), (rm, ["--max_groups", 12])):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main([str(a) for a in [*argv, *common]])


def start(run_dir: Path, said: Path) -> int:
    """A training in a process of its own (forked: importing torch takes longer than the training). Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99                                                             # whatever is no SystemExit
    signal.signal(signal.SIGINT, signal.SIG_DFL)                          # until the command says what it does
    tqdm.set_lock(threading.RLock())                  # else all share one, which a killed start may never give back
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        data.run_command(tracelift.main, [str(a) for a in [*TRAIN, "--run_dir", run_dir]])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:                                                              # never back into the parent's code
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finish(pid: int, seconds: float) -> int | None:
    """Its exit status, when it ends within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return None


def kept(folder: Path) -> list[dict]:
    """Its metrics, without those that depend on the clock."""
    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        lines.append({k: v for k, v in record.items() if "seconds" not in k and k != "tokens_per_second"})
    return lines


def stop(pid: int, kind: str, disk: Path, partial: Path, rng: random.Random) -> int:
    """Ends a training in one of the ways. Returns its exit status."""
    filler = disk / "filler"
    if kind == "full disk":
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
            while True:
                f.write(b"0" * 4096)
        status = finish(pid, 120)
        filler.unlink()
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert status is not None, "a full disk ends a training, or it ends without one; this one hangs"
        return status
    sent = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind, signal.SIGKILL)
    os.kill(pid, sent)
    _, status = os.waitpid(pid, 0)
    log = partial / "metrics.jsonl"
    if kind == "truncated log" and log.exists() and log.stat().st_size:
        os.truncate(log, rng.randrange(log.stat().st_size))
    return status


def check_ending(kind: str, status: int, text: str) -> None:
    """AssertionError for a traceback, another exit status than this ending has, or not one line that says why."""
    assert "Traceback" not in text, text
    said = [line for line in text.replace("\r", "\n").splitlines() if line.startswith(("error:", "stopped"))]
    code = os.waitstatus_to_exitcode(status)
    wanted = {"SIGTERM": (130,), "SIGINT": (130,), "full disk": (2,)}.get(kind, (-signal.SIGKILL,))
    if kind == "SIGTERM" and code == -signal.SIGTERM or kind == "SIGINT" and code == -signal.SIGINT:
        return                                                            # before the command had begun
    assert code in (0, *wanted), f"exit status {code}\n{text}"            # 0: it was through already
    assert len(said) == (code in (2, 130)), f"exit status {code}\n{text}"


def lost_steps(partial: Path) -> int:
    """Steps that were logged after the last checkpoint, and will be made again. Not the number of lines, of which a log
    may have lost some."""
    if not (partial / "metrics.jsonl").exists():
        return 0
    whole = (partial / "metrics.jsonl").read_text().split("\n")[:-1]
    logged = json.loads(whole[-1])["step"] + 1 if whole else 0
    saved = 0
    if (partial / "checkpoint.pt").exists():
        saved = torch.load(partial / "checkpoint.pt", weights_only=True)["state"]["step"]
    return max(0, logged - saved)


def soak(starts: int, seed: int, disk: Path, said: Path, kinds: tuple[str, ...]) -> None:
    """Prints the table. AssertionError at the first fault."""
    rng, ended, equal = random.Random(seed), Counter(), 0
    run_dir = disk / "run"
    prepare(run_dir)
    out = run_dir / "planner-rm_only-seed0"
    partial = out.with_name(out.name + ".partial")
    whole = math.inf
    for _ in range(3):                                                    # the first is slower than all that follow
        begin = time.monotonic()
        os.waitpid(start(run_dir, said), 0)
        whole = min(whole, time.monotonic() - begin)
        assert out.exists(), said.read_text()
        straight, weights = kept(out), load_file(out / "model.safetensors")
        shutil.rmtree(out)
    log_lost, worst, number, made_again = False, 0, 0, Counter()
    while sum(ended[kind] for kind in kinds) < starts:
        number += 1
        pid, kind = start(run_dir, said), rng.choice(kinds)
        status = finish(pid, rng.uniform(0.1, 1.0) * whole)
        stopped = status is None
        if stopped:
            status = stop(pid, kind, disk, partial, rng)
            log_lost |= kind == "truncated log"
        text = said.read_text(errors="replace")
        try:
            check_ending(kind if stopped else "", status, text)
        except AssertionError as fault:
            raise AssertionError(f"start {number}, {kind}: {fault}") from None
        assert stopped or status == 0, f"start {number}: exit status {status}\n{text}"
        assert not list(partial.glob("*.tmp")) or kind not in ("full disk", "SIGTERM", "SIGINT"), f"start {number}, {kind}"
        ended[kind if not out.exists() else "got through"] += 1
        if partial.exists() and kind != "truncated log":
            lost = lost_steps(partial)
            worst = max(worst, lost)
            made_again[lost] += 1
            assert worst <= SAVE_EVERY, f"start {number}, {kind}: {worst} steps lost"
        if out.exists():
            found, mine = kept(out), load_file(out / "model.safetensors")
            assert all(torch.equal(weights[name], mine[name]) for name in weights), f"start {number}: weights differ"
            assert found == straight or log_lost and all(line in straight for line in found), f"start {number}: metrics"
            shutil.rmtree(out)
            equal, log_lost = equal + 1, False
    print(f"{number} starts, {starts} of them stopped, seed {seed}; a straight training takes {whole:.1f} s here")
    print("steps made again: " + ", ".join(f"{lost} after {n} stops" for lost, n in sorted(made_again.items())))
    print("| ended by | times |\n|---|---|")
    print("\n".join(f"| {kind} | {ended[kind]} |" for kind in [*kinds, "got through"]))
    print(f"{equal} planners, stopped on average {starts / max(1, equal):.1f} times each, have the weights and "
          "metrics of the one that was never stopped; no traceback")


def main(argv) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100, help="that are stopped")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disk, other = Path(tempfile.mkdtemp(prefix="soak-")), Path(tempfile.mkdtemp(prefix="soak-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True)
    kinds = KINDS
    if mounted.returncode:
        print("no tmpfs can be mounted here (not root?): without full disks", file=sys.stderr)
        kinds = tuple(kind for kind in KINDS if kind != "full disk")
    try:
        soak(args.starts, args.seed, disk, other / "said.txt", kinds)
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", disk], check=True)
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(other, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
