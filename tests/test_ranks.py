"""Training over several processes: what one process computes, however many share it; and how they end.

    python -m pytest tests/test_ranks.py
    python -m pytest tests/test_ranks.py -m slow         # torchrun itself, LoRA, signals

The quick tests fork: a process that torchrun starts imports torch first, for seconds."""
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

import data
import executor
import tracelift
import verify
from executor import Executor
from tracelift import Ranks, problems_of_step, sample_names

ROOT = Path(tracelift.__file__).resolve().parent
FLAGS = ("--device cpu --mode uplift_only --group_size 4 --repeats 2 --max_trace_tokens 10 --max_answer_tokens 6 "
         "--learning_rate 5e-3 --warmup 1 --save_every 2 --micro_tokens 99").split()


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """A run folder of 12 problems whose base model is random."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    with contextlib.redirect_stdout(io.StringIO()):
        data.main(["--run_dir", str(run_dir), "--train", "12", "--heldout", "5"])
    shutil.copytree(tiny[0], run_dir / "base")
    (run_dir / "base" / "base.json").write_text('{"model": "."}')
    return run_dir


@pytest.fixture
def run_dir(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "toy"))


@pytest.fixture(autouse=True)
def lottery(monkeypatch):
    """Random models never succeed: a third of all outputs passes, as a function of the output."""
    monkeypatch.setattr(verify, "extract_answer", lambda output: output)
    monkeypatch.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(count, work, folder):
    """work(rank) in `count` processes, with the variables that torchrun sets. Returns their exit codes, what they
    printed, and what work returned."""
    port, here = free_port(), multiprocessing.get_context("fork")

    def begin(rank):
        torch.set_num_threads(1)      # renews torch's pool: two threads that find it stale at once after a fork break it
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port),
                       "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(count)}
        with open(folder / f"printed-{count}-{rank}", "w") as out, contextlib.redirect_stdout(out):
            with contextlib.redirect_stderr(out):
                found = work(rank)
        torch.save(found, folder / f"found-{count}-{rank}")
    ranks = [here.Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode is not None, "a rank hangs"
    printed = [(folder / f"printed-{count}-{rank}").read_text() for rank in range(count)]
    found = [folder / f"found-{count}-{rank}" for rank in range(count)]
    found = [torch.load(path, weights_only=False) if path.exists() else None for path in found]
    return [process.exitcode for process in ranks], printed, found


def train_and_watch(run_dir, *flags):
    """`tracelift.py train`, in this process. Returns what the first step showed: traces with their rewards, and the
    gradient before clipping."""
    seen = {}
    join, sum_gradients = Ranks.join, Ranks.sum_gradients

    def watched_join(self, rows):
        rows = join(self, rows)
        seen.setdefault("outcomes", rows)
        return rows

    def watched_sum(self, parameters):
        parameters = list(parameters)
        sum_gradients(self, parameters)
        seen.setdefault("gradient", [None if p.grad is None else p.grad.clone() for p in parameters])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Ranks, "join", watched_join)
        m.setattr(Ranks, "sum_gradients", watched_sum)
        data.run_command(tracelift.main, ["train", *FLAGS, "--run_dir", str(run_dir), *flags])
    return seen


def alone(run_dir, *flags):
    """The same as one process, and quietly."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train_and_watch(run_dir, *flags)


def lines(run_dir, name="metrics.jsonl"):
    folder, = run_dir.glob("planner-*")
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(run_dir):
    folder, = run_dir.glob("planner-*")
    return executor.load(str(folder), "cpu", torch.float32)[0].state_dict()


def assert_same_metrics(got, want, but=()):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for key in a.keys() - set(but):
            if "second" not in key and key != "ranks":
                same = a[key] == b[key] if b[key] is None else a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
                assert same, (key, a[key], b[key])


# ---------------------------------------------------------------- one step

@pytest.mark.parametrize("flags", ["", pytest.param("--weights grpo --beta 0.1 --inner_epochs 2", marks=pytest.mark.slow),
                                   pytest.param("--weights dr_grpo --lora_rank 2", marks=pytest.mark.slow),
                                   pytest.param("--truncated mask --inner_epochs 2", marks=pytest.mark.slow)])
def test_a_step_is_the_same_however_many_share_it(prepared, tmp_path, flags):
    """Five problems of three, so that shares are uneven and the same problem is on two ranks: its samples count over
    all of them. The baseline of such a problem is measured twice, which is all that may differ."""
    flags = f"--steps 1 --problems_per_step 5 --max_problems 3 {flags}".split()
    one = Path(shutil.copytree(prepared, tmp_path / "1"))
    want = alone(one, *flags)
    scale = max(g.abs().max() for g in want["gradient"] if g is not None)
    assert scale > 1e-4 and len({o.reward.total for o in want["outcomes"]}) > 2
    assert len({o.problem.problem_id for o in want["outcomes"][::4]}) == 3
    for count in 2, 4:
        folder = Path(shutil.copytree(prepared, tmp_path / str(count)))
        codes, printed, found = fork(count, lambda rank: train_and_watch(folder, *flags), tmp_path)
        assert codes == [0] * count, printed
        for seen in found:
            for got, expected in zip(seen["outcomes"], want["outcomes"], strict=True):
                assert dataclasses.replace(got, problem=expected.problem) == expected
                assert got.problem.problem_id == expected.problem.problem_id
            for got, expected in zip(seen["gradient"], want["gradient"], strict=True):
                assert (got is None) == (expected is None)
                assert got is None or (got - expected).abs().max() <= 1e-5 * scale
        costs = ("executor_prompt_tokens", "executor_tokens")
        assert_same_metrics(lines(folder), lines(one), but=costs)
        assert lines(folder)[0]["ranks"] == count and all(lines(folder)[0][c] >= lines(one)[0][c] for c in costs)
        assert lines(folder, "samples.jsonl") == lines(one, "samples.jsonl")
        assert "trained" in printed[0] and not any(printed[1:]), "rank 0 speaks"


def as_rank(rank, count):
    ranks = Ranks()
    ranks.rank, ranks.count = rank, count
    return ranks


def test_shares_are_the_step(prepared, tiny):
    """In its order, with the names that one process would draw with; the sizes differ by one at most."""
    problems = data.read_problems(prepared / "groups" / "train.jsonl")[:4]
    frozen = Executor(tiny[1], tiny[2], max_new_tokens=1)

    def names(problems):
        repeated = [p for p in problems for _ in range(3)]
        return sample_names(problems, 3, "0 0"), frozen._names(repeated, [""] * len(repeated), [2] * len(repeated), "0")
    for N, count in ((4, 4), (5, 2), (7, 3), (9, 8), (12, 5)):
        step = problems_of_step(problems, 1, N, seed=0)
        shares = [as_rank(rank, count).share(step, 3) for rank in range(count)]
        assert [p.problem_id for share in shares for p in share] == [p.problem_id for p in step]
        sizes = [len(share) for share in shares]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        for kind in range(2):
            assert [name for share in shares for name in names(share)[kind]] == names(step)[kind]
    assert as_rank(0, 1).share(step, 3) == step


def test_gradients_are_summed_where_a_rank_has_none(tmp_path, monkeypatch):
    """A group without spread leaves a rank without gradients: the others' count all the same. Where no rank has one it
    stays None, else AdamW's momentum would move the weight. Buckets cut through and join parameters."""
    monkeypatch.setattr(tracelift, "BUCKET", 4)
    shapes = [(3,), (2, 5), (), (1,), (2,), (3,)]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    gradients[0][1] = gradients[1][2] = gradients[0][5] = gradients[1][5] = None

    def work(rank):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter, gradient in zip(parameters, gradients[rank]):
            parameter.grad = None if gradient is None else gradient.clone()
        with tracelift.torchrun() as ranks:
            ranks.sum_gradients(parameters)
        return [p.grad for p in parameters]
    codes, printed, found = fork(2, work, tmp_path)
    assert codes == [0, 0], printed
    for own in found:
        for got, a, b in zip(own, *gradients):
            given = [g for g in (a, b) if g is not None]
            assert got is None if not given else torch.equal(got, sum(given[1:], given[0]))


def test_buckets_by_hand():
    pieces = [torch.zeros(n) for n in (3, 1, 1, 4, 2, 2, 1)]
    assert [[len(p) for p in b] for b in tracelift.buckets(pieces, 4)] == [[3, 1], [1], [4], [2, 2], [1]]
    assert list(tracelift.buckets([], 4)) == []


def test_baselines_go_to_all_and_costs_to_rank_0(monkeypatch, prepared, tiny):
    """Else each rank would measure them again, a resumed training with more ranks too, and costs would count twice."""
    problems = data.read_problems(prepared / "groups" / "train.jsonl")[:3]
    p, q, r = (problem.problem_id for problem in problems)
    said = [({(p, 2): 1, (q, 2): 1}, {"executor_tokens": 5}), ({(q, 2): 2, (r, 2): 0}, {"executor_tokens": 7})]
    for rank in range(2):
        frozen = Executor(tiny[1], tiny[2], max_new_tokens=1)
        own = {("of a step before", 2): 2, **said[rank][0]}
        frozen.load_state({"baseline": own, "spent": said[rank][1]})
        ranks = as_rank(rank, 2)
        asked = []
        monkeypatch.setattr(ranks, "exchange", lambda value: asked.append(value) or said)
        ranks.pool(frozen, problems[:2] if rank == 0 else problems[1:])
        assert asked == [said[rank]]
        assert frozen.state() == {"baseline": {("of a step before", 2): 2, (p, 2): 1, (q, 2): 1, (r, 2): 0},
                                  "spent": {"executor_tokens": 12 if rank == 0 else 0}}


# ---------------------------------------------------------------- four steps

@pytest.mark.parametrize("legs", [[(1, 2), (2, 4)], pytest.param([(2, 1), (4, 3), (1, 4)], marks=pytest.mark.slow)])
def test_four_steps_resumed_with_another_number_of_ranks(prepared, tmp_path, legs):
    """Weights, metrics and costs of a training that one process made at a stretch, up to rounding. Four problems a
    step, so that none comes twice in one."""
    straight = Path(shutil.copytree(prepared, tmp_path / "straight"))
    folder = Path(shutil.copytree(prepared, tmp_path / "shared"))
    flags = "--problems_per_step 4 --steps".split()
    alone(straight, *flags, "4")
    begin, ranks = 0, []
    for count, steps in legs:
        if count == 1:
            alone(folder, *flags, str(steps))
        else:
            codes, printed, _ = fork(count, lambda rank: train_and_watch(folder, *flags, str(steps)), tmp_path)
            assert codes == [0] * count, printed
        ranks += [count] * (steps - begin)
        begin = steps
    assert [line["ranks"] for line in lines(folder)] == ranks
    assert_same_metrics(lines(folder), lines(straight))
    assert lines(folder, "samples.jsonl")[:4] == lines(straight, "samples.jsonl")[:4]
    want = weights(straight)
    assert all(torch.allclose(x, want[name], atol=1e-4) for name, x in weights(folder).items())
    saved, expected = (torch.load(next(d.glob("planner-*")) / "checkpoint.pt", weights_only=True)
                       for d in (folder, straight))
    assert saved["executor"] == expected["executor"] and len(expected["executor"]["baseline"]) == 12


# ---------------------------------------------------------------- ends

def test_a_rank_that_fails_ends_all(run_dir, tmp_path, monkeypatch):
    """Its line is printed, rank 0 says what is saved, and nobody waits."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)                        # there is no torchrun to wait for
    real, calls = tracelift.measure_rewards, []

    def fragile(*args, **more):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            raise data.UserError("the executor: this rank cannot")
        return real(*args, **more)
    monkeypatch.setattr(tracelift, "measure_rewards", fragile)
    flags = ("--steps", "4", "--problems_per_step", "2")
    codes, printed, _ = fork(2, lambda rank: train_and_watch(run_dir, *flags), tmp_path)
    assert codes == [2, 2]
    assert printed[1] == "\nerror: the executor: this rank cannot\n"
    assert printed[0].splitlines()[-1].startswith("error: rank 0: another rank failed or cannot be reached")
    assert "checkpoint.pt holds the last saved step" in printed[0].splitlines()[-1]
    assert len(lines(run_dir)) == 2


@pytest.mark.parametrize("flags, message", [
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--problems_per_step 1", "--problems_per_step 1: fewer than the 2 processes of torchrun"),
    ("--device cpu:0", "--device cpu:0: would be the same for all processes")])
def test_a_mistake_is_said_once(run_dir, tmp_path, monkeypatch, flags, message):
    """By rank 0; torchrun then stops the other, which here only fails to reach it."""
    monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    codes, printed, _ = fork(2, lambda rank: train_and_watch(run_dir, "--steps", "1", *flags.split()), tmp_path)
    assert codes[0] == 2 and printed[0].count("error: ") == 1 and message in printed[0]
    assert printed[1] == "" and not list(run_dir.glob("planner*"))


def test_ranks_that_read_other_files(run_dir, tmp_path, monkeypatch):
    """Machines that do not share the run folder would train with what they have."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def work(rank):
        folder = run_dir
        if rank == 1:
            monkeypatch.setattr(tracelift, "inputs_of", lambda s: {"groups/train.jsonl": "another"})
        return train_and_watch(folder, "--steps", "1", "--problems_per_step", "2")
    codes, printed, _ = fork(2, work, tmp_path)
    assert codes == [2, 2] and "error: rank 1 has read other files than rank 0: --run_dir must be one" in printed[0]


def test_only_training_is_shared(monkeypatch, run_dir, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in "int", "evaluate", "inspect":
        with pytest.raises(SystemExit):
            data.run_command(tracelift.main, [command, "--run_dir", str(run_dir)])
        assert capsys.readouterr().err == f"error: tracelift.py {command} is one process; start it without torchrun\n"
    with pytest.raises(SystemExit):
        data.run_command(tracelift.main, ["train", "--run_dir", str(run_dir)])      # no torchrun: RANK is missing
    assert "WORLD_SIZE is set, but the processes do not find each other" in capsys.readouterr().err


def test_gpus_are_shared_out(monkeypatch):
    """A GPU each; more processes than GPUs, or one GPU for all, is a mistake."""
    picked = []
    monkeypatch.setattr(executor, "pick_device", lambda device: picked.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, asked in ((0, ""), (5, "cuda"), (1, "cpu")):                          # rank 5 is the second of machine 3
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        as_rank(rank, 6).pick_device(asked)
    as_rank(0, 1).pick_device("cuda:1")
    assert picked == ["cuda:0", "cuda:1", "cpu", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(data.UserError, match="rank 2: no GPU is left for it, this machine has 2; lower --nproc_per_node"):
        as_rank(2, 3).pick_device("")
    with pytest.raises(data.UserError, match="--device cuda:1: would be the same"):
        as_rank(0, 3).pick_device("cuda:1")


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert verify._cores() == 16
    for count, cores in (("8", 2), ("5", 3), ("99", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        assert verify._cores() == cores


# ---------------------------------------------------------------- torchrun itself

@pytest.fixture
def torchrun():
    """Starts the command. What a failed test leaves running is stopped, and torchrun stops its ranks."""
    started = []

    def start(count, run_dir, *flags, script="tracelift.py"):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}",
                   f"--master_port={free_port()}", str(script), "train", *FLAGS, "--run_dir", str(run_dir), *flags]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--eval_every 1", "--lora_rank 2 --eval_every 2"])
def test_the_command(torchrun, run_dir, flags):
    """As the README has it: trained, said once, and evaluated without torchrun."""
    flags = ["--steps", "2", "--problems_per_step", "3", *flags.split()]
    for _ in range(2):                                                              # the second time it is there
        process = torchrun(2, run_dir, *flags)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0 and out.count(": trained") == 1, err
    assert [line["ranks"] for line in lines(run_dir)] == [2, 2] and "heldout_success" in lines(run_dir)[-1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        data.run_command(tracelift.main, ["evaluate", "--run_dir", str(run_dir), "--problems", "2", "--device", "cpu"])
    assert "| uplift_only |" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_torchrun_says_what_is_saved(torchrun, run_dir, number):
    """Ctrl-C and SIGTERM reach all ranks through torchrun. Then one process goes on."""
    flags = ["--problems_per_step", "2", "--save_every", "1"]
    process = torchrun(2, run_dir, "--steps", "100000", *flags)
    log = run_dir / "planner-uplift_only-seed0.partial" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0 and err.count("stopped; ") == 1, err
    assert "checkpoint.pt holds the last saved step" in err
    state = torch.load(log.with_name("checkpoint.pt"), weights_only=True)["state"]
    steps = str(state["step"] + 1)
    alone(run_dir, "--steps", steps, *flags)
    assert len(lines(run_dir)) == int(steps)


FRAGILE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, tracelift
real, calls = tracelift.rollout, []

def fragile(*args, **more):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] in sys.argv[-1]:
        raise data.UserError("this rank cannot")
    return real(*args, **more)

tracelift.rollout = fragile
data.run_command(tracelift.main, sys.argv[1:-1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["1", "01"])
def test_a_rank_that_fails_under_torchrun(torchrun, run_dir, tmp_path, fails):
    """Its line is printed; if all fail alike, that of rank 0 is, and on a busy machine now and then another's. The
    others are stopped, long before the half hour after which a collective gives up."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    process = torchrun(2, run_dir, "--steps", "9", "--problems_per_step", "2", fails, script=tmp_path / "fragile.py")
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0 and 1 <= err.count("error: this rank cannot") <= len(fails), err
    assert ("checkpoint.pt holds the last saved step" in err) == (fails == "1") and "another rank" not in err
    assert len((run_dir / "planner-uplift_only-seed0.partial" / "metrics.jsonl").read_text().splitlines()) == 2
