"""Stops a run at random moments, again and again, and checks that it always ends with the same bits.

    python tests/tools/soak.py [STOPS [SEED]]             # 30 stops take some minutes on a core; Linux

A toy run is base model, reward model and two planners. Each start goes through its commands and is ended after a
random time by SIGKILL, SIGTERM or SIGINT; the next one continues. When a run gets through, its weights and metrics are
compared with those of a run that was never stopped, and a new one is begun. Fails at the first difference, traceback or
wrong exit code.
"""
import json
import os
import random
import shutil
import signal
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
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
import rm  # noqa: E402
import tracelift  # noqa: E402

TRAIN = ("train --device cpu --steps 12 --save_every 3 --problems_per_step 2 --group_size 4 --max_trace_tokens 12 "
         "--warmup 2")
COMMANDS = [(data, "--train 12 --heldout 5"),
            (executor, "--sequences 400 --hidden 32 --layers 2 --eval_problems 4 --max_answer_tokens 6 --device cpu"),
            (rm, "--max_groups 12 --epochs 4 --device cpu"),
            (tracelift, f"{TRAIN} --mode tracelift --max_answer_tokens 6"),
            (tracelift, f"{TRAIN} --mode rm_only --inner_epochs 2 --beta 0.1")]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(run_dir: Path, said: Path) -> int:
    """The commands in a process of their own (forked: importing torch takes longer than training). Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 99                                             # whatever is not a SystemExit
    tqdm.set_lock(threading.RLock())                      # else all share one, which a killed start may never give back
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for module, flags in COMMANDS:
            data.run_command(module.main, [*flags.split(), "--run_dir", str(run_dir)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)                                    # never back into the parent's code


def stop(pid: int, seconds: float, sent: signal.Signals) -> int:
    """Sends the signal after some seconds; to one that has ended in between it does nothing. Returns the exit code."""
    time.sleep(seconds)
    os.kill(pid, sent)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(run_dir: Path) -> dict:
    """{file: bytes of weights, or lines of metrics without what depends on the clock}."""
    found = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.glob("*/model.safetensors")}
    for path in run_dir.glob("planner-*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for name in [name for name in line if name.startswith(("seconds", "tokens_per_second"))]:
                del line[name]
        found[str(path.relative_to(run_dir))] = lines
    return found


def soak(stops: int = 30, seed: int = 0, *, folder: Path) -> None:
    """Prints what happened. AssertionError at the first fault."""
    rng, ended, equal, said = random.Random(seed), Counter(), 0, folder / "said.txt"
    begin = time.monotonic()
    _, status = os.waitpid(start(folder / "straight", said), 0)
    whole, wanted = time.monotonic() - begin, outcome(folder / "straight")
    assert status == 0 and len(wanted) == 6, said.read_text()
    while ended.total() < stops or not equal:
        pid, sent = start(folder / "run", said), rng.choice(SIGNALS)
        code = stop(pid, rng.uniform(0.2, whole), sent)
        text = said.read_text(errors="replace")
        assert code in (0, -sent if sent == signal.SIGKILL else 130), f"{sent.name}: exit code {code}\n{text}"
        assert "Traceback" not in text, f"{sent.name}\n{text}"
        if code:
            ended[sent.name] += 1
        else:
            found = outcome(folder / "run")
            for name, content in wanted.items():
                if isinstance(content, list):
                    for want, got in zip(content, found[name]):
                        assert got == want, f"{name}, after {ended.total()} stops: {dict(want.items() ^ got.items())}"
                assert found[name] == content, f"{name} differs after {ended.total()} stops"
            shutil.rmtree(folder / "run")
            equal += 1
    kinds = ", ".join(f"{n} {name}" for name, n in ended.items())
    print(f"{ended.total()} stops ({kinds}), seed {seed}; a straight run takes {whole:.0f} s here\n"
          f"{equal} runs got through, with the weights and metrics of the one that was never stopped")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        soak(*map(int, sys.argv[1:]), folder=Path(temporary))
