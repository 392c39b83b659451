"""tracelift.py: the gradient against a textbook loss, resume bit for bit, growing, LoRA, the commands, one-line errors."""
import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import data
import executor
import kernels
import tracelift
from data import UserError
from executor import LM, Completions
from tracelift import (IntSettings, Ranks, Reward, TrainSettings, accumulate_gradient, completion_logp, measure_rewards,
                       micro_batches, problems_of_step, rollout, train)

from conftest import command, draw_lots


@pytest.fixture(scope="module")
def models(prepared):
    planner = LM(*executor.load(str(prepared / "base"), "cpu", torch.float32))
    generator = torch.Generator().manual_seed(0)
    for p in planner.model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    return planner, data.read_problems(prepared / "groups" / "train.jsonl")


def settings(run_dir="", **changes):
    small = dict(device="cpu", steps=5, problems_per_step=2, group_size=4, num_runs=2, learning_rate=5e-3, warmup=2,
                 micro_tokens=90, max_trace_tokens=10, max_answer_tokens=6, save_every=2, run_dir=str(run_dir))
    changed = small | changes
    if "uplift" not in tracelift.REWARDS[changed.get("mode", "tracelift")].needs:
        del changed["num_runs"]
    return TrainSettings(**changed)


def weights_of(folder):
    return executor.load(str(folder), "cpu", torch.float32)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def untimed(records):
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


# ---------------------------------------------------------------- the gradient

@pytest.fixture(scope="module")
def sampled(models):
    planner, problems = models
    with pytest.MonkeyPatch.context() as m:
        real = LM.generate

        def uneven(*args):
            made = real(*args)
            keep = [max(1, len(tokens) - (b * 5) % 16) for b, tokens in enumerate(made.tokens)]
            return Completions(*([row[:k] for row, k in zip(rows, keep)] for rows in (made.tokens, made.logprobs)))
        m.setattr(LM, "generate", uneven)
        traces = rollout(planner, problems[:3], 4, 1.0, "1 0", settings(max_trace_tokens=24))
    assert len({len(t.tokens) for t in traces}) > 2
    return traces, torch.tensor([1.0, 0.0, 0.3, 0.5, 0.2, 0.2, 0.9, -0.4, 0.0, 0.0, 0.0, 1.0])


def batches_of(traces, reward, s):
    return micro_batches(traces, kernels.group_advantage(reward, 4, s.scale == "std"), s, Ranks())


def loss_settings(micro_tokens=9999, **changes):
    return settings(max_trace_tokens=24, problems_per_step=3, micro_tokens=micro_tokens, **changes)


def textbook(model, traces, reward, old, ref, s, learned):
    """The loss token by token, from the formulas of the header."""
    B, G, M = len(reward), 4, sum(len(traces[b].tokens) for b in learned)
    loss = 0.0
    for b in learned:
        t = traces[b]
        logp = torch.log_softmax(model(torch.tensor([t.prompt + t.tokens])).logits[0].float() / s.temperature, dim=-1)
        group = reward[b - b % G:b - b % G + G].tolist()
        A = reward[b].item() - sum(group) / G
        if s.scale == "std":
            A = A / (statistics.pstdev(group) + 1e-6)
        weight = {"dapo": 1 / M, "grpo": 1 / (B * len(t.tokens)), "dr_grpo": 1 / (B * 24)}[s.loss_aggregation]
        for i, token in enumerate(t.tokens):
            lp = logp[len(t.prompt) - 1 + i, token]
            ratio = (lp - (lp.detach() if old is None else old[b][i])).exp()
            part = -torch.minimum(ratio * A, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A)
            if s.beta:
                part = part + s.beta * ratio * ((ref[b][i] - lp).exp() - (ref[b][i] - lp) - 1)
            loss = loss + weight * part
    loss.backward()
    return loss.item()


def gradient(planner, call):
    planner = copy.deepcopy(planner)
    result = call(planner)
    return result, torch.cat([p.grad.flatten() for p in planner.model.parameters() if p.grad is not None])


CASES = {"on-policy": {}, "temperature": dict(temperature=0.7), "grpo": dict(loss_aggregation="grpo"),
         "dr_grpo": dict(loss_aggregation="dr_grpo", scale="none"), "old": dict(inner_epochs=2, clip_low=0.1, clip_high=0.3),
         "kl": dict(beta=0.5), "masked": dict(truncated="mask"),
         "all": dict(beta=0.2, loss_aggregation="grpo", temperature=1.4, inner_epochs=2, clip_low=0.3)}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_textbook_one_however_it_is_cut(models, sampled, case, monkeypatch):
    traces, reward = sampled
    for b, t in enumerate(traces):
        monkeypatch.setattr(t, "cut", b in (0, 4, 5, 6, 7, 9))
    learned = [b for b in range(12) if case != "masked" or not traces[b].cut]
    noise = torch.Generator().manual_seed(2)
    shift = [torch.randn(2, len(t.tokens), generator=noise) for t in traces]
    results = []
    for micro_tokens, head_rows in ((9999, 9999), (1, 7), (200, 5)):
        monkeypatch.setattr(tracelift, "HEAD_ROWS", head_rows)
        s = loss_settings(micro_tokens, **CASES[case])
        batches, M = batches_of(traces, reward, s)
        assert M == sum(len(traces[b].tokens) for b in learned)
        old, ref = {}, {}
        for batch in batches:
            logp = completion_logp(models[0], batch, s.temperature)
            if s.inner_epochs == 2:
                batch.old_logp = torch.zeros_like(logp)
            if s.beta:
                batch.ref_logp = torch.zeros_like(logp)
            for b in batch.seq_idx.unique().tolist():
                own = batch.seq_idx == b
                assert batch.target[own].tolist() == traces[b].tokens == batch.ids.flatten()[batch.positions + 1][own].tolist()
                assert batch.sampled_logp[own].tolist() == pytest.approx(traces[b].logprobs)
                old[b], ref[b] = logp[own] + 0.3 * shift[b][0], logp[own] + 0.5 * shift[b][1]
                if s.inner_epochs == 2:
                    batch.old_logp[own] = old[b]
                if s.beta:
                    batch.ref_logp[own] = ref[b]
        assert sorted(old) == learned
        want, slow = gradient(models[0], lambda lm: textbook(lm.model, traces, reward, old if s.inner_epochs == 2 else None,
                                                              ref, s, learned))
        health, fast = gradient(models[0], lambda lm: [accumulate_gradient(lm, batch, reward, s) for batch in batches])
        assert slow.norm() > 1e-3
        assert (fast - slow).norm() < 1e-5 * slow.norm()
        means = {name: sum(float(h[name]) for h in health) for name in health[0]}
        assert means["loss"] == pytest.approx(want, abs=1e-5)
        assert 0 <= means["entropy"] / M < 6
        results.append(means)
    for means in results[1:]:
        assert means == pytest.approx(results[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_scored_logprobs_are_the_sampled_ones(models, temperature):
    planner, problems = models
    traces = rollout(planner, problems[:4], 4, temperature, "0 0", settings(max_trace_tokens=20))
    for micro_tokens in 1, 200, 9999:
        batches, _ = batches_of(traces, torch.zeros(16), settings(micro_tokens=micro_tokens, problems_per_step=4))
        for batch in batches:
            torch.testing.assert_close(completion_logp(planner, batch, temperature), batch.sampled_logp, atol=1e-4, rtol=0)


def test_equal_rewards_give_exactly_no_gradient(models, sampled):
    planner, reward = copy.deepcopy(models[0]), torch.full((12,), 1 / 3)
    s = loss_settings(200)
    batches, _ = batches_of(sampled[0], reward, s)
    health = [accumulate_gradient(planner, batch, reward, s) for batch in batches]
    assert all(p.grad is None for p in planner.model.parameters())
    assert all(h["loss"] == 0 and h["entropy"] > 0 for h in health)


def test_a_problems_traces_depend_on_nothing_around_it(models):
    planner, (p, q, r, *_) = models

    def of(problem, problems, rng_key="0 0", **more):
        traces = rollout(planner, problems, 4, 1.0, rng_key, settings(**more))
        return [t.tokens for t in traces if t.problem is problem]
    alone = of(q, [q])
    assert of(q, [p, q]) == of(q, [r, q, p]) == of(q, [r, q, p], max_cache_gib=1e-5) == alone
    assert len({tuple(t) for t in alone}) == 4 and of(q, [q], "0 1") != alone


def test_a_step_never_holds_a_problem_twice_and_an_epoch_holds_all(models):
    problems = models[1][:12]
    steps = [problems_of_step(problems, step, 4, seed=3) for step in range(6)]
    assert all(len({p.problem_id for p in own}) == 4 for own in steps)
    for epoch in steps[:3], steps[3:]:
        assert {p.problem_id for own in epoch for p in own} == {p.problem_id for p in problems}
    assert steps[:3] != steps[3:]


# ---------------------------------------------------------------- the reward

@pytest.mark.parametrize("value", [1, True, None, math.nan, math.inf, torch.tensor(1.0)])
def test_a_reward_that_is_not_a_finite_float_names_its_mode(models, monkeypatch, value):
    planner, problems = models
    traces = rollout(planner, problems[:1], 2, 1.0, "x", settings())
    monkeypatch.setitem(tracelift.REWARDS, "exec_only", tracelift.Mode(lambda r, w_e, w_r: value, needs=()))
    with pytest.raises(UserError, match="--mode exec_only"):
        measure_rewards(traces, None, None, settings(mode="exec_only"), "0")


@pytest.mark.parametrize("mode, e2e, rm, with_trace, without, want", [
    ("tracelift", 1.0, 0.9, 3, 1, 0.8), ("tracelift", 0.0, 0.5, 0, 3, -0.25), ("tracelift", 1.0, 0.8, 2, 2, 0.5),
    ("exec_only", 1.0, None, None, None, 1.0), ("rm_only", None, 0.7, None, None, 0.7), ("uplift_only", 1.0, None, 3, 0, 1.0),
    ("tracelift-code", 0.5, 1.0, 2, 1, 0.7), ("tracelift-code", 0.5, 1.0, 0, 1, 0.3), ("tracelift-code", 1.0, 1.0, 3, 0, 1.0),
    ("tracelift-code", 0.0, 1.0, 0, 1, 0.0), ("tracelift-code", 0.5, 1.0, 1, 1, 0.6), ("tracelift-code", 0.5, 1.0, 2, 2, 0.5 + 0.4 / 3)])
def test_rewards_by_hand(mode, e2e, rm, with_trace, without, want):
    uplift = None if with_trace is None else (with_trace - without) / 3
    r = Reward(e2e=e2e, rm=rm, with_trace=with_trace, without_trace=without, uplift=uplift, num_runs=3)
    assert tracelift.REWARDS[mode].total(r, 0.5, 0.5) == pytest.approx(want)


def test_a_reward_of_ones_own_sees_the_trace(models, monkeypatch):
    planner, problems = models
    traces = rollout(planner, problems[:2], 2, 1.0, "x", settings())
    short = tracelift.Mode(lambda r, w_e, w_r: 1.0 / r.trace_tokens + len(r.text), needs=())
    monkeypatch.setitem(tracelift.REWARDS, "exec_only", short)
    measure_rewards(traces, None, None, settings(mode="exec_only"), "0")
    assert [t.reward.total for t in traces] == [1 / len(t.tokens) + len(t.text) for t in traces]


# ---------------------------------------------------------------- a training on disk

class Crash(Exception):
    pass


@contextlib.contextmanager
def crash_at(call, error=Crash, module=tracelift, name="measure_rewards"):
    real, calls = getattr(module, name), []

    def fragile(*args, **more):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, name, fragile)
        yield


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_equal_runs(got, want):
    assert same(weights_of(got), weights_of(want))
    assert untimed(lines(got)) == untimed(lines(want))
    assert files(got) == files(want)


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    made = {}

    def of(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("straight") / "toy"))
            with pytest.MonkeyPatch.context() as m:
                draw_lots(m)
                made[key] = train(settings(folder, **changes))
        return made[key]
    return of


@pytest.mark.parametrize("changes, call", [({}, 4), ({"inner_epochs": 2, "beta": 0.1, "save_every": 1}, 5),
                                           ({"save_every": 20}, 3), ({"truncated": "mask"}, 4),
                                           ({"lora_rank": 4, "inner_epochs": 2, "beta": 0.1}, 4)])
def test_an_interrupted_run_ends_like_a_straight_one(run_dir, straight, lottery, changes, call):
    want = straight(**changes)
    with pytest.raises(Crash), crash_at(call):
        train(settings(run_dir, **changes))
    assert not (run_dir / want.name).exists()
    torch.manual_seed(1234)
    random.seed(1234)
    got = train(settings(run_dir, **changes))
    assert not same(weights_of(want), weights_of(run_dir / "base"))
    assert_equal_runs(got, want)
    assert [line["step"] for line in lines(got)] == list(range(5)) and any(line["grad_norm"] for line in lines(want))


def test_a_damaged_log_comes_back(run_dir, straight, lottery):
    """Longer, half, or missing: the checkpoint holds the log."""
    for damage in (b'{"step": 4, "reward": 99.0}\n{"step": 5, "rew', b"", None):
        run = Path(shutil.copytree(run_dir, run_dir.with_name(f"toy{damage}"[:8].replace("/", "")), dirs_exist_ok=True))
        with pytest.raises(Crash), crash_at(5):
            train(settings(run))
        log = run / "planner-tracelift-seed0.partial" / "metrics.jsonl"
        log.write_bytes(damage) if damage is not None else log.unlink()
        assert_equal_runs(train(settings(run)), straight())
        shutil.rmtree(run)


def test_sigkill_again_and_again_ends_like_a_straight_run(run_dir, straight, tmp_path):
    """A process killed at random moments; the same command until it gets through."""
    want, rng, kills = straight(save_every=3, steps=40), random.Random(0), 0
    with pytest.MonkeyPatch.context() as m:
        draw_lots(m)
        while True:
            pid = os.fork()
            if pid == 0:
                code = 99
                torch.set_num_threads(1)                # renews torch's thread pool, which a fork leaves stale
                tqdm.set_lock(threading.RLock())        # else all share one, which a killed child may never give back
                try:
                    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                        train(settings(run_dir, save_every=3, steps=40))
                    code = 0
                finally:
                    os._exit(code)
            end = time.monotonic() + rng.uniform(0.1, 1.2) * (1 + kills / 20)        # a busy machine gets through, too
            status = None
            while time.monotonic() < end and status is None:
                done, st = os.waitpid(pid, os.WNOHANG)
                status = st if done else None
                time.sleep(0.002)
            if status is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                assert kills < 60
                continue
            assert status == 0
            break
    assert kills >= 2, "choose shorter times"
    assert_equal_runs(run_dir / want.name, want)


def test_a_finished_planner_is_not_trained_again(run_dir, monkeypatch, lottery):
    out = train(settings(run_dir, steps=1))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(settings(run_dir, steps=1)) == out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    for key, value in (("learning_rate", 1e-9), ("num_runs", 3), ("truncated", "mask")):
        with pytest.raises(UserError, match=f"--{key} "):
            train(settings(run_dir, **{"steps": 1, key: value}))
        with pytest.raises(UserError, match=f"--{key} "):
            train(settings(run_dir, **{"steps": 2, key: value}))
    for key, value in (("micro_tokens", 1), ("save_every", 7), ("max_cache_gib", 1.0)):
        assert train(settings(run_dir, **{"steps": 1, key: value})) == out


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}])
def test_steps_may_grow(run_dir, straight, lottery, changes):
    for steps in 1, 3, 5:
        out = train(settings(run_dir, steps=steps, warmup=1, save_every=1, **changes))
        assert len(lines(out)) == steps
    with pytest.raises(UserError, match="--steps 3: .* 5 steps already"):
        train(settings(run_dir, steps=3, warmup=1, **changes))
    assert same(weights_of(out), weights_of(straight(warmup=1, **changes)))
    assert untimed(lines(out)) == untimed(lines(straight(warmup=1, **changes)))


def test_fewer_steps_than_a_stopped_training_has_made_are_refused(run_dir, lottery):
    with pytest.raises(Crash), crash_at(5):
        train(settings(run_dir))
    with pytest.raises(UserError, match="--steps 3"):
        train(settings(run_dir, steps=3))


@pytest.mark.parametrize("name", ["groups/train.jsonl", "base/model.safetensors", "rm/model.safetensors"])
def test_what_it_was_made_from_must_stay(run_dir, lottery, name):
    with pytest.raises(Crash), crash_at(4):
        train(settings(run_dir))
    path = run_dir / name
    if path.suffix == ".jsonl":
        path.write_text(path.read_text().replace("coins", "cents"))
    else:
        tensors = executor.load_file(path)
        executor.save_file({key: tensor + 0.01 for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name.split("/")[0]):
        train(settings(run_dir))


def test_a_mistake_leaves_nothing(run_dir, lottery):
    for changes, words in (({"problems_per_step": 13}, "--problems_per_step 13"), ({"max_trace_tokens": 600}, "context .* 512"),
                           ({"lora_rank": 2, "init": "x"}, "--init"), ({"groups": "selected/train.jsonl"}, "selected/train.jsonl")):
        with pytest.raises((UserError, OSError), match=words):
            train(settings(run_dir, **changes))
        assert not list(run_dir.glob("planner*"))
    for key, value in (("group_size", 1), ("temperature", 0.0), ("learning_rate", float("nan")), ("lora_alpha", 8.0),
                       ("executor", "http://x/v1")):
        with pytest.raises(UserError, match=f"--{key} "):
            settings(run_dir, **{key: value})


def test_with_lora_the_executor_stays(run_dir, lottery, monkeypatch):
    seen, ids, real = [], torch.arange(20)[None], tracelift.measure_rewards

    def measured(traces, frozen, *args, **more):
        with torch.no_grad():
            seen.append(frozen.model(ids).logits.clone())
        return real(traces, frozen, *args, **more)
    monkeypatch.setattr(tracelift, "measure_rewards", measured)
    out = train(settings(run_dir, steps=3, lora_rank=2, beta=0.1, checkpointing=1))
    assert all(torch.equal(x, seen[0]) for x in seen) and not same(weights_of(out), weights_of(run_dir / "base"))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["planner"]
    assert saved and all(name.endswith((".lora_A", ".lora_B")) for name in saved)
    assert abs(lines(out)[0]["kl"]) < 1e-6 and lines(out)[-1]["kl"] != 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_training_that_diverges_stops(run_dir, monkeypatch, lottery):
    real, steps = executor.descend, []

    def descend(optimizer, *args):
        steps.append(1)
        if len(steps) == 4:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.nan)
        return real(optimizer, *args)
    monkeypatch.setattr(executor, "descend", descend)
    with pytest.raises(FloatingPointError, match="step 3.*--learning_rate"):
        train(settings(run_dir))
    saved = torch.load(run_dir / "planner-tracelift-seed0.partial" / "checkpoint.pt", weights_only=True)
    assert saved["steps"] == 2


@pytest.mark.parametrize("module, name, call", [(tracelift, "measure_rewards", 4), (executor, "decode_text", 8)])
def test_ctrl_c_saves_first(run_dir, straight, lottery, module, name, call):
    """Before the executor's runs of a step, and after them: their cost is not counted twice."""
    with pytest.raises(KeyboardInterrupt), crash_at(call, KeyboardInterrupt, module, name):
        train(settings(run_dir, save_every=20))
    saved = torch.load(run_dir / "planner-tracelift-seed0.partial" / "checkpoint.pt", weights_only=True)
    assert saved["steps"] == 3
    assert_equal_runs(train(settings(run_dir, save_every=20)), straight(save_every=20))


def test_what_a_training_writes(run_dir, lottery, capsys):
    """Sums over the whole training, the clip of later updates, held-out success, a group to read; where it all lies."""
    out = train(settings(run_dir, steps=3, inner_epochs=2, clip_low=1e-6, clip_high=1e-6, eval_every=2, eval_problems=2))
    assert f"{out}.partial: training" in capsys.readouterr().out
    first, second, third = lines(out)
    assert third["clip_share"] > 0 and third["planner_tokens"] > second["planner_tokens"] > first["planner_tokens"]
    assert ["heldout_success" in line for line in lines(out)] == [False, True, True]
    samples = lines(out, "samples.jsonl")
    assert [line["step"] for line in samples] == [0] * 4 + [2] * 4 and len({line["problem"] for line in samples[:4]}) == 1
    assert all(len(line["outputs"]) == 3 and 0 <= line["rm"] <= 1 and line["text"] is not None for line in samples)


def test_rewards_that_float32_cannot_tell_apart_are_told(run_dir, lottery, monkeypatch, capsys):
    tiny = tracelift.Mode(lambda r, w_e, w_r: 1 + 1e-12 * r.trace_tokens + 1e-12 * len(r.text), needs=("runs",))
    monkeypatch.setitem(tracelift.REWARDS, "exec_only", tiny)
    train(settings(run_dir, steps=1, mode="exec_only"))
    assert "scale them" in capsys.readouterr().out


def test_rm_only_needs_no_executor(run_dir, monkeypatch):
    monkeypatch.setattr(tracelift, "Executor", None)
    out = train(settings(run_dir, steps=2, mode="rm_only"))
    assert lines(out)[0]["rm"] is not None and lines(out)[0]["success"] is None
    with pytest.raises(UserError, match="--eval_every"):
        settings(run_dir, mode="rm_only", eval_every=1)


def test_a_step_of_cut_traces_has_no_entropy(run_dir, lottery):
    out = train(settings(run_dir, steps=1, max_trace_tokens=1, truncated="mask"))
    assert lines(out)[0]["truncated"] == 1 and lines(out)[0]["entropy"] is None
    assert same(weights_of(out), weights_of(run_dir / "base"))


def test_a_few_steps_raise_what_is_rewarded(run_dir, monkeypatch):
    def rigged(traces, *args, **more):
        for t in traces:
            t.reward, t.runs = Reward(total=float(statistics.mean(i % 2 == 0 for i in t.tokens))), []
    monkeypatch.setattr(tracelift, "measure_rewards", rigged)
    out = train(settings(run_dir, steps=20, group_size=8, mode="exec_only", learning_rate=1e-2))
    total = [line["reward"] for line in lines(out)]
    assert statistics.mean(total[-5:]) > statistics.mean(total[:3]) + 0.1


# ---------------------------------------------------------------- the commands

SMALL = ["--problems_per_step", 2, "--group_size", 4, "--max_trace_tokens", 8, "--max_answer_tokens", 6]


def test_commands_from_training_to_table(run_dir, lottery):
    common = ["--run_dir", run_dir, "--device", "cpu"]
    out = command(tracelift, "train", *common, *SMALL, "--steps", 2)
    assert "trained" in out and "next: python tracelift.py evaluate" in out
    command(tracelift, "train", *common, *SMALL, "--steps", 2, "--mode", "exec_only", "--seed", 1, "--lora_rank", 2)
    command(tracelift, "train", *common, *SMALL, "--steps", 2, "--seed", 1, "--learning_rate", 1e-5)
    out = command(tracelift, "evaluate", *common, "--problems", 3, "--samples", 4)
    assert out.count("| tracelift | 1 |") == 4 == out.count("| tracelift --learning_rate 1e-05 | 1 |"), "never averaged"
    assert "| no trace |" in out and "| reference trace |" in out and "pass@4" in out
    results = run_dir / "planner-tracelift-seed0" / "results.json"
    results.write_text(results.read_text().replace('"success": ', '"success": 0.123, "x": '))
    assert "0.12" in command(tracelift, "evaluate", *common, "--problems", 3, "--samples", 4), "measured once"
    assert "0.12" not in command(tracelift, "evaluate", *common, "--problems", 2)
    command(tracelift, "train", *common, *SMALL, "--steps", 3)
    assert not results.exists(), "of the planner with fewer steps"
    (run_dir / "base" / "base.json").write_text((run_dir / "base" / "base.json").read_text() + " ")
    with pytest.raises(SystemExit):
        command(tracelift, "evaluate", *common, "--problems", 3)


def test_pass_at_k_is_unbiased():
    ok = [True, False, False, True, False]
    pairs = [ok[i] or ok[j] for i in range(5) for j in range(i)]
    assert tracelift.pass_at(2, 5, 2) == pytest.approx(statistics.mean(pairs))
    assert tracelift.pass_at(3, 5, 0) == 0 and tracelift.pass_at(5, 5, 1) == 1


@pytest.mark.parametrize("mode, total", [("tracelift", "product"), ("exec_only", "success_alone")])
def test_inspect_shows_the_planners_own_reward(run_dir, lottery, mode, total):
    common = ["--run_dir", run_dir, "--device", "cpu"]
    command(tracelift, "train", *common, *SMALL, "--steps", 1, "--mode", mode)
    out = command(tracelift, "inspect", *common, "--planner", f"planner-{mode}-seed0")
    assert f"[{total}]" in out and "answer_support" in out and "uplift" in out and out.count("  advantage") == 3
    assert "ok=True" in out and "with - " in out and "[completion_logp]" not in out and "completion_logp" in out
    out = command(tracelift, "inspect", *common, "--problem", "Mia has 5 pens . how many pens for Mia ?", "--traces", 2)
    assert out.count("trace") == 2 == out.count("executor") and "ok=" not in out


def test_select_keeps_problems_that_can_teach(run_dir, monkeypatch, lottery):
    common = ["--run_dir", run_dir, "--device", "cpu"]
    flags = [*common, "--problems", 12, "--group_size", 4, *SMALL[4:]]
    monkeypatch.setattr(tracelift, "PIECE", 5)
    with pytest.raises(Crash), crash_at(2, name="execute"):
        command(tracelift, "select", *flags)
    with crash_at(3, name="execute"):                                     # 5 of 12 problems are done: two pieces
        command(tracelift, "select", *flags)
    tries = {}
    for name, ok in sum(json.loads((run_dir / "selected" / "tries.json").read_text()), []):
        tries[name] = tries.get(name, 0) + ok / 4
    varied = sorted(name for name, rate in tries.items() if 0.1 <= rate <= 0.9)
    kept = data.read_problems(run_dir / "selected" / "train.jsonl")
    assert varied == sorted(p.problem_id for p in kept) and 2 <= len(varied) < 12 == len(tries)
    command(tracelift, "train", *common, *SMALL, "--steps", 2, "--groups", "selected/train.jsonl")
    samples = lines(run_dir / "planner-tracelift-seed0", "samples.jsonl")
    assert {line["problem"] for line in samples} <= {p.problem for p in kept}


def test_int_stage(run_dir, monkeypatch, lottery):
    """A scripted planner proposes a mended second step, nonsense, or the answer."""
    answers = {p.problem: p.reference_solution for p in data.read_problems(run_dir / "groups" / "train.jsonl")}
    real, said = LM.generate, ("nonsense", "2 : 22 * 2 = 44", "2 : so {}")

    def written(self, prompts, num_samples, max_new_tokens, temperature, rng_keys, max_cache_gib):
        if not rng_keys or not rng_keys[0].startswith("intervention"):
            return real(self, prompts, num_samples, max_new_tokens, temperature, rng_keys, max_cache_gib)
        texts = []
        for i in range(len(prompts) * num_samples):
            text = self.tokenizer.decode(prompts[i // num_samples])
            problem = next(p for p in answers if text.startswith(p))
            texts.append(said[i % 3].format(answers[problem]))
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        return Completions(ids, [[0.0] * len(row) for row in ids])
    monkeypatch.setattr(LM, "generate", written)
    monkeypatch.setattr(data, "extract_reasoning", lambda text: "17 + 5 = 22 ; " + text[-20:])
    s = IntSettings(run_dir=str(run_dir), device="cpu", problems=6, group_size=4, proposals=3, num_runs=1, epochs=2.0,
                    max_trace_tokens=6, max_answer_tokens=6, batch_size=4, learning_rate=1e-2)
    with pytest.raises(Crash), crash_at(1, module=executor, name="finetune"):
        tracelift.intervene(s)
    with monkeypatch.context() as m:
        m.setattr(tracelift, "intervene_on", None)                        # a stopped stage has only to learn
        out = tracelift.intervene(s)
    records = sum(json.loads((out / "interventions.json").read_text()), [])
    assert records and all(r["success"] > 0 for r in records)
    assert all(r["mended"].endswith(" ; 22 * 2 = 44") for r in records), "never the answer nor nonsense"
    assert not same(weights_of(out), weights_of(run_dir / "base"))
    planner = train(settings(run_dir, steps=1, mode="exec_only", init=str(out), learning_rate=1e-30, warmup=0,
                             name="after-InT"))
    assert same(weights_of(planner), weights_of(out))


@pytest.mark.parametrize("argv, words", [
    ([], "choose train"), (["explain"], "explain"), (["train", "--mode", "best"], "--mode"), (["train"], "base"),
    (["evaluate"], "base"), (["inspect"], "heldout.jsonl"), (["int"], "train.jsonl"), (["train", "--name", "a/b"], "--name"),
    (["train", "--w_e", "0", "--w_r", "0"], "--w_e 0"), (["train", "--mode", "exec_only", "--w_r", "1"], "--w_r"),
    (["train", "--clip_low", "0.1"], "--clip_low"), (["train", "--executor", "http://x/v1"], "--executor_model"),
    (["train", "--group_size", "1"], "--group_size"), (["train", "--learning_rate", "nan"], "--learning_rate"),
    (["train", "--lora_alpha", "8"], "--lora_rank")])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        data.run_command(tracelift.main, argv + ["--run_dir", str(tmp_path / "none")] * bool(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "error: " in said[-1] and words in said[-1], said
    assert not list((tmp_path / "none").rglob("*.*"))
