"""Several processes: 1, 2 and 4 gloo ranks train the same planner; a rank that fails ends all."""
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

import data
import executor
import tracelift


def weights_of(folder):
    return executor.load(str(folder), "cpu", torch.float32)[0].state_dict()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(count, work, folder):
    port, here = free_port(), multiprocessing.get_context("fork")

    def begin(rank):
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port),
                       "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(count)}
        with open(folder / f"printed-{count}-{rank}", "w") as out, contextlib.redirect_stdout(out):
            with contextlib.redirect_stderr(out):
                work(rank)
    ranks = [here.Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode is not None, "a rank hangs"
    return [process.exitcode for process in ranks], [(folder / f"printed-{count}-{rank}").read_text() for rank in range(count)]


FLAGS = ("--device cpu --mode uplift_only --group_size 4 --num_runs 2 --max_trace_tokens 10 --max_answer_tokens 6 "
         "--learning_rate 5e-3 --warmup 1 --save_every 2 --micro_tokens 150 --problems_per_step 5 --steps 4").split()


@pytest.mark.parametrize("flags", ["", "--loss_aggregation grpo --beta 0.1 --inner_epochs 2", "--loss_aggregation dr_grpo --lora_rank 2"])
def test_the_same_however_many_share_it(run_dir, tmp_path, lottery, flags):
    folders = {}
    for count in 1, 2, 4:
        folders[count] = Path(shutil.copytree(run_dir, tmp_path / str(count)))

        def work(rank):
            data.run_command(tracelift.main, ["train", *FLAGS, *flags.split(), "--run_dir", str(folders[count])])
        codes, printed = fork(count, work, tmp_path)
        assert codes == [0] * count, printed
        assert "trained" in printed[0] and not any(printed[1:]), printed
    one, = folders[1].glob("planner-*")
    for count in 2, 4:
        got, = folders[count].glob("planner-*")
        for a, b in zip(lines(got), lines(one), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if "second" not in key:
                    assert a[key] == b[key] if b[key] is None else a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (key, a[key], b[key])
        want = weights_of(one)
        assert all(torch.allclose(x, want[name], atol=1e-4) for name, x in weights_of(got).items())


def test_resumed_with_another_number_of_ranks(run_dir, tmp_path, lottery):
    one = Path(shutil.copytree(run_dir, tmp_path / "one"))
    two = Path(shutil.copytree(run_dir, tmp_path / "two"))

    def work(folder, steps):
        return lambda rank: data.run_command(tracelift.main, ["train", *FLAGS, "--steps", steps, "--run_dir", str(folder)])
    for folder, count, steps in ((one, 1, "4"), (two, 2, "2"), (two, 4, "3"), (two, 1, "4")):
        codes, printed = fork(count, work(folder, steps), tmp_path)
        assert codes == [0] * count, printed
    want, got = (weights_of(next(folder.glob("planner-*"))) for folder in (one, two))
    assert all(torch.allclose(x, want[name], atol=1e-4) for name, x in got.items())


def test_a_rank_that_fails_ends_all(run_dir, tmp_path, monkeypatch, lottery):
    real, calls = tracelift.measure_rewards, []

    def fragile(*args, **more):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            raise data.UserError("the executor: this rank cannot")
        return real(*args, **more)
    monkeypatch.setattr(tracelift, "measure_rewards", fragile)
    codes, printed = fork(2, lambda rank: data.run_command(tracelift.main, ["train", *FLAGS, "--run_dir", str(run_dir)]), tmp_path)
    assert codes[1] == 2 and "error: the executor: this rank cannot" in printed[1] and codes[0] != 0
