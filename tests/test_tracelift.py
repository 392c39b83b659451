"""tracelift.py: every part of the reward by hand, the loss against a textbook, resuming bit for bit, and the commands.

    python -m pytest tests/test_tracelift.py
"""
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import data
import executor
import kernels
import rm as rm_module
import tracelift
import verify
from data import UserError, check_settings
from executor import Completions, Executor, Run
from tracelift import EvalSettings, InspectSettings, IntSettings, Reward, TrainSettings
from tracelift import (accumulate_gradient, completion_logp, measure_rewards, micro_batches, problems_of_step, rollout, table,
                       train)
from verify import SandboxError

ROOT = Path(tracelift.__file__).resolve().parent
SMALL = ["--device", "cpu", "--max_answer_tokens", "6"]
TOY = {"data.py": "--train 12 --heldout 5",                          # the recipe smoke of run.sh, smaller still
       "executor.py": "--sequences 200 --hidden 32 --layers 2 --eval_problems 4 --device cpu --max_answer_tokens 6",
       "rm.py": "--epochs 1 --max_heldout 5 --device cpu"}


def command(module, *argv):
    """What a command prints to stdout; run in this process, because importing torch takes longer than the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        data.run_command(module.main, [str(a) for a in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder up to the reward model, made by the commands themselves. The models are close to random."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    said = [command(module, *TOY[name].split(), "--run_dir", run_dir)
            for name, module in (("data.py", data), ("executor.py", executor), ("rm.py", rm_module))]
    return run_dir, said


@pytest.fixture
def run_dir(prepared, tmp_path):
    return Path(shutil.copytree(prepared[0], tmp_path / "toy"))


def draw_lots(m):
    """Near-random models never succeed, and with rewards that are all 0 nothing would be trained or tested: with this,
    a third of all outputs passes, as a function of the output."""
    m.setattr(verify, "extract_answer", lambda output: output)
    m.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)


@pytest.fixture
def lottery(monkeypatch):
    draw_lots(monkeypatch)


@pytest.fixture(scope="module")
def models(prepared):
    """A random planner with preferences (at the usual initialisation its logits are nearly flat), a tokenizer, problems."""
    planner, tokenizer = executor.load(str(prepared[0] / "base"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for p in planner.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    return planner, tokenizer, data.read_problems(prepared[0] / "groups" / "train.jsonl")


def settings(run_dir="", **changes):
    small = dict(device="cpu", steps=5, problems_per_step=2, group_size=4, repeats=2, learning_rate=5e-3, warmup=2,
                 micro_tokens=90, max_trace_tokens=10, max_answer_tokens=6, save_every=2, run_dir=str(run_dir))
    small |= changes
    if small["steps"] < small["warmup"] and "warmup" not in changes:
        small["warmup"] = small["steps"]
    if small.get("mode") in ("exec_only", "rm_only") and "repeats" not in changes:
        del small["repeats"]                                          # refused, since it has no effect there
    return TrainSettings(**small)


def weights_of(folder):
    return executor.load(str(folder), "cpu", torch.float32)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---------------------------------------------------------------- the reward

def parts(e2e=None, rm=None, with_trace=None, without_trace=None, repeats=1):
    uplift = None if with_trace is None else (with_trace - without_trace) / repeats
    return Reward(e2e, rm, with_trace, without_trace, uplift, repeats=repeats)


@pytest.mark.parametrize("mode, measured, weights, total", [
    ("tracelift", dict(e2e=1.0, rm=0.8, with_trace=3, without_trace=1, repeats=3), {}, 0.5 + 0.5 * 0.8 * 2 / 3),
    ("tracelift", dict(e2e=0.0, rm=0.8, with_trace=0, without_trace=2, repeats=4), {}, -0.5 * 0.8 * 0.5),  # harm counts
    ("tracelift", dict(e2e=1.0, rm=0.9, with_trace=2, without_trace=2, repeats=3), {}, 0.5),     # no uplift, no bonus
    ("tracelift", dict(e2e=1.0, rm=0.0, with_trace=3, without_trace=0, repeats=3), {}, 0.5),     # no quality, no bonus
    ("tracelift", dict(e2e=1.0, rm=0.5, with_trace=2, without_trace=0, repeats=2), dict(w_e=0.2, w_r=3.0), 1.7),
    ("exec_only", dict(e2e=-0.6), dict(w_e=0.1), -0.6),
    ("rm_only", dict(rm=0.3), dict(w_r=0.1), 0.3),
    ("uplift_only", dict(e2e=1.0, rm=0.0, with_trace=1, without_trace=3, repeats=4), dict(w_e=0.4, w_r=0.6), 0.4 - 0.3),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=0, repeats=3), {}, 0.5 + 0.12),    # more: +1
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=2, without_trace=3, repeats=3), {}, 0.5 - 0.12),    # fewer: -1
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=0, without_trace=0, repeats=3), {}, 0.5),           # ties
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=1, repeats=3), {}, 0.5 + 0.06),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=2, without_trace=2, repeats=3), {}, 0.5 + 0.12 * 2 / 3),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=3, without_trace=3, repeats=3), {}, 0.5 + 0.12),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=1, repeats=4), {}, 0.5 + 0.12 / 4),
    ("tracelift-code", dict(e2e=1.0, rm=0.9, with_trace=3, without_trace=0, repeats=3), {}, 1.0),        # clamped away
    ("tracelift-code", dict(e2e=1.0, rm=0.5, with_trace=0, without_trace=1, repeats=3), {}, 0.9),        # a malus is not
    ("tracelift-code", dict(e2e=-1.0, rm=0.9, with_trace=3, without_trace=0, repeats=3), {}, 0.0)])
def test_rewards_by_hand(mode, measured, weights, total):
    w = {"w_e": 0.5, "w_r": 0.5} | weights
    assert tracelift.REWARDS[mode].total(parts(**measured), **w) == pytest.approx(total, abs=1e-12)


class Counted(Executor):
    """The real executor with its model taken out: trace texts say how many of their runs succeed."""

    def __init__(self):
        self.calls, self._baseline, self.spent = [], {}, {}

    def run(self, problems, traces, repeats, when=""):
        traces = [None] * len(problems) if traces is None else traces
        repeats = [repeats] * len(problems) if isinstance(repeats, int) else repeats
        if problems:
            self.calls.append(([p.problem_id for p in problems], list(traces), list(repeats), when))
        made = []
        for problem, trace, K in zip(problems, traces, repeats, strict=True):
            if trace is None:                                         # one of K
                made.append([Run("", k < 1, float(k < 1)) for k in range(K)])
                self._baseline[problem.problem_id, K] = 1
            else:                                                     # "e w": run 0 scores e / 2, w of the others succeed
                first = Run("", bool(int(trace[0])), int(trace[0]) / 2)
                made.append([first] + [Run("", k < int(trace[2]), 9.0) for k in range(K - 1)])
        return made


class Scores:
    """A reward model that scores 0.1, 0.2, ... in the order of the texts."""

    def __init__(self):
        self.texts = []

    def score(self, texts):
        self.texts += texts
        return torch.arange(1, len(texts) + 1) / 10, torch.zeros(len(texts), 5)


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"{name} was used and must not be")


@pytest.fixture(scope="module")
def pair(models):
    p, q = models[2][:2]
    return [p, p, p, q, q, q], ["1 3", "0 0", "1 1", "0 2", "1 0", "0 3"]


def measured_by(frozen, scores, pair, mode, repeats=3, when=""):
    return measure_rewards(*pair, frozen, scores, mode, repeats, 0.5, 0.5, when)


def test_e2e_is_drawn_apart_and_the_baseline_once_per_problem(pair):
    """The run that is rewarded for itself must not be one of the K that measure uplift; a baseline sampled again for
    each trace costs G times as much and gives traces of one problem different bars."""
    frozen, scores = Counted(), Scores()
    rewards, runs = measured_by(frozen, scores, pair, "tracelift", when="7")
    assert [r.e2e for r in rewards] == [0.5, 0.0, 0.5, 0.0, 0.5, 0.0]
    assert [r.with_trace for r in rewards] == [3, 0, 1, 2, 0, 3] and [r.without_trace for r in rewards] == [1] * 6
    assert [r.rm for r in rewards] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [r.uplift for r in rewards] == pytest.approx([2 / 3, -1 / 3, 0, 1 / 3, -1 / 3, 2 / 3])
    assert [r.total for r in rewards] == pytest.approx([0.5 * r.e2e + 0.5 * r.rm * r.uplift for r in rewards])
    assert [len(r) for r in runs] == [4] * 6 and {r.repeats for r in rewards} == {3}
    p, q = pair[0][0].problem_id, pair[0][3].problem_id
    (problems, traces, counts, when), = frozen.calls
    assert when == "7" and sorted(zip(problems, map(str, traces), counts)) == sorted(
        [*zip([p] * 3 + [q] * 3, pair[1], [4] * 6), (p, "None", 3), (q, "None", 3)]), "all in one call"
    assert all(problem.problem in text and trace in text for problem, trace, text in zip(*pair, scores.texts))
    measured_by(frozen, scores, pair, "tracelift", when="8")
    assert None not in frozen.calls[-1][1], "the executor is frozen: once for all steps"
    measured_by(frozen, scores, pair, "tracelift", 2)
    alone = [(name, K) for names, traces, repeats, _ in frozen.calls[1:] for name, trace, K in zip(names, traces, repeats)
             if trace is None]
    assert sorted(alone) == sorted([(p, 2), (q, 2)]), "a baseline of other K is another measurement"


@pytest.mark.parametrize("mode, measured, repeats", [
    ("tracelift", {"e2e", "rm", "with_trace", "without_trace", "uplift"}, 4),
    ("tracelift-code", {"e2e", "rm", "with_trace", "without_trace", "uplift"}, 4),
    ("uplift_only", {"e2e", "with_trace", "without_trace", "uplift"}, 4),
    ("exec_only", {"e2e"}, 1), ("rm_only", {"rm"}, 0)])
def test_each_mode_measures_its_parts_only(pair, mode, measured, repeats):
    """Cost, and fairness: an exec_only planner that saw the reward model would be no baseline."""
    frozen = Counted() if "e2e" in measured else Untouchable()
    scores = Scores() if "rm" in measured else Untouchable()
    rewards, runs = measured_by(frozen, scores, pair, mode)
    for reward in rewards:
        values = dataclasses.asdict(reward)
        assert {name for name in values if values[name] is not None} - {"repeats"} == measured | {"total"}
    assert [len(own) for own in runs] == [repeats] * 6
    if repeats:
        traces = [trace for call in frozen.calls for trace in call[1]]
        assert (None in traces) == ("without_trace" in measured)


@pytest.mark.parametrize("where, error", [("run", SandboxError), ("score", FloatingPointError)])
def test_a_failed_measurement_is_never_a_reward(pair, where, error):
    """The paper's code scores a failed call 0 (and a failed no-trace call then raises the uplift)."""
    frozen, scores = Counted(), Scores()

    def fail(*args, **kwargs):
        raise error("broken")
    setattr(scores if where == "score" else frozen, where, fail)
    with pytest.raises(error):
        measured_by(frozen, scores, pair, "tracelift")


def test_a_new_mode_is_one_function_and_one_line(pair, monkeypatch):
    monkeypatch.setitem(tracelift.REWARDS, "both", tracelift.Mode(lambda r, w_e, w_r: r.e2e * r.rm, needs=("runs", "rm")))
    rewards, runs = measured_by(Counted(), Scores(), pair, "both")
    assert [r.total for r in rewards] == pytest.approx([0.05, 0, 0.15, 0, 0.25, 0]) and [len(r) for r in runs] == [1] * 6


@pytest.fixture(scope="module")
def frozen(prepared, models):
    """A real executor, of the model with preferences."""
    return lambda **more: Executor(copy.deepcopy(models[0]), models[1], **{"max_new_tokens": 6, "seed": 3, **more})


def test_modes_see_the_same_e2e_draws(frozen, models):
    """Else exec_only and tracelift would differ by luck, too. e2e is run 0, whatever is measured beside it."""
    problems = [p for p in models[2][:3] for _ in range(2)]
    traces = [f"{i} + {i} = ?" for i in range(6)]
    alone = measure_rewards(problems, traces, frozen(), None, "exec_only", 3, 0.5, 0.5, "4")[1]
    for K in 2, 3:
        beside = measure_rewards(problems, traces, frozen(), Scores(), "tracelift", K, 0.5, 0.5, "4")[1]
        assert [own[0].output for own in beside] == [own[0].output for own in alone]
    later = measure_rewards(problems, traces, frozen(), None, "exec_only", 3, 0.5, 0.5, "5")[1]
    assert [own[0].output for own in later] != [own[0].output for own in alone], "another step, other draws"
    assert len({run.output for own in beside for run in own}) > 12, "runs and samples draw apart"


# ---------------------------------------------------------------- rollout

def rolled(planner, tokenizer, problems, *, G=4, temperature=1.0, length=10, when="0 0", **more):
    return rollout(planner, tokenizer, problems, G, temperature, length, when, **more)


@pytest.fixture
def crafted(models, monkeypatch):
    """A rollout of chosen completions: closed, cut, nothing but EOS, closed but cut before EOS, empty, ..."""
    planner, tokenizer, problems = models
    eos, good = tokenizer.eos_token_id, problems[0].reference_reasoning

    def ids(text):
        return tokenizer(text)["input_ids"] if text else []
    tokens = [ids(f"{data.OPEN}{good}{data.CLOSE}") + [eos], ids(data.OPEN + good), [eos], ids(good + data.CLOSE),
              ids(data.OPEN + data.CLOSE) + [eos], ids(data.OPEN) + [eos], ids(good), ids(good)[:1] + [eos]]
    logprobs = [[-(b + 0.01 * t) for t in range(len(row))] for b, row in enumerate(tokens)]
    monkeypatch.setattr(executor, "generate", lambda *args, **kwargs: Completions(tokens, logprobs))
    two = sorted(problems, key=lambda p: len(p.problem))[::len(problems) - 1]                      # short and long
    return lambda tok=tokenizer, **more: (rolled(planner, tok, two, **more), tokens, logprobs, two)


@pytest.mark.parametrize("learn_truncated", [True, False])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_loss_covers_the_sampled_tokens_and_nothing_else(models, crafted, pad_is_eos, learn_truncated):
    """Off by one in T; EOS left out (stopping is never trained); pads taken for EOS, or EOS for a pad."""
    tokenizer = copy.deepcopy(models[1])
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
        assert executor.pad_id(tokenizer) == tokenizer.eos_token_id
    batch, tokens, logprobs, two = crafted(tokenizer, learn_truncated=learn_truncated)
    assert [p.problem_id for p in batch.problems] == [p.problem_id for p in two for _ in range(4)]
    assert len({len(data.encode_prompt(tokenizer, data.planner_prompt(p))) for p in two}) == 2
    assert batch.truncated == [False, True, False, True, False, False, True, False]
    T, learned = batch.ids.shape[1], [b for b in range(8) if learn_truncated or not batch.truncated[b]]
    places = []
    for b, (problem, sampled) in enumerate(zip(batch.problems, tokens)):
        prompt = data.encode_prompt(tokenizer, data.planner_prompt(problem))
        assert batch.ids[b, :len(prompt) + len(sampled)].tolist() == prompt + sampled
        own = list(range(len(prompt) - 1, len(prompt) - 1 + len(sampled))) if b in learned else []
        assert batch.scored[b].nonzero()[:, 0].tolist() == own
        places += [b * T + t for t in own]
    assert batch.at.tolist() == places and batch.sequence.tolist() == [at // T for at in places]
    assert batch.target.tolist() == sum((tokens[b] for b in learned), []), "rows of the loss are in sampling order"
    assert batch.sampled.tolist() == pytest.approx(sum((logprobs[b] for b in learned), []))


@pytest.mark.parametrize("micro_tokens", [1, 60, 130, 9999])
def test_parts_hold_every_token_once(crafted, micro_tokens):
    """A token lost at an edge, or one of another sequence, and the gradient is of other text."""
    batch = crafted(learn_truncated=False)[0]
    first = torch.tensor([False, True] * 4)
    for parts in micro_batches(batch, micro_tokens), micro_batches(batch, micro_tokens, first):
        for part in parts:
            lengths = [batch.lengths[b] for b in part.rows.tolist()]
            assert part.ids.shape == (len(lengths), max(lengths)), "not padded beyond its own longest"
            assert part.ids.numel() <= micro_tokens or len(lengths) == 1
            assert torch.equal(part.ids, batch.ids[part.rows, :max(lengths)])
            assert torch.equal(part.ids.flatten()[part.at + 1], part.target) and len(part.at) == len(part.sequence)
            assert torch.equal(part.rows[part.at // max(lengths)], part.sequence)
            for name in "target", "sequence":
                assert torch.equal(getattr(part, name), getattr(batch, name)[part.tokens])
        assert sorted(b for part in parts for b in part.rows.tolist()) == list(range(8))
        assert sorted(i for part in parts for i in part.tokens.tolist()) == list(range(len(batch.target)))
    assert (len(parts) == 1) == (micro_tokens == 9999)
    kinds = [set(first[part.rows].tolist()) for part in parts]            # such as {True}, {True, False}, {False}
    assert sorted(kinds, key=lambda kind: (False in kind) + (True not in kind)) == kinds and kinds.count({True, False}) <= 1
    one = micro_batches(batch, 9999)[0]
    assert torch.equal(one.ids, batch.ids) and torch.equal(one.at, batch.at), "all in one: the batch as it is"


def test_parts_are_sorted_by_length(crafted):
    """Else most of a micro-batch is padding."""
    batch = crafted()[0]
    lengths = [batch.lengths[b] for part in micro_batches(batch, 1) for b in part.rows.tolist()]
    assert lengths == sorted(batch.lengths, reverse=True) and len(set(lengths)) > 2


def test_unclosed_completions_are_used_and_counted(models, crafted):
    """Neither an error nor repaired; an empty trace is an empty trace. A completion that ends by itself without the
    tag is not a cut one: two metrics."""
    batch = crafted()[0]
    good = models[2][0].reference_reasoning
    assert batch.traces[:7] == [good, good, "", good, "", "", good] and good.startswith(batch.traces[7])
    assert batch.closed == [True, False, False, True, True, False, False, False]
    unmeasured = [Reward(None, None, None, None, None, 0.0)] * 8
    metrics = tracelift.summarize(tracelift.outcomes_of(batch, unmeasured, [[]] * 8), 4)
    assert metrics["unclosed"] == 5 / 8 and metrics["truncated"] == 3 / 8
    lengths = [len(tokens) for tokens in batch.completions.tokens]
    assert metrics["longest_trace"] == max(lengths) and metrics["trace_tokens"] == pytest.approx(statistics.mean(lengths))


def test_any_end_that_the_model_knows_is_an_end(models, crafted):
    """Chat models end a turn with another token than a text; taken for a cut, every trace would be masked."""
    planner = copy.deepcopy(models[0])
    last = crafted()[1][1][-1]
    planner.generation_config.eos_token_id = [last, models[1].eos_token_id]
    two = sorted(models[2], key=lambda p: len(p.problem))[::len(models[2]) - 1]
    assert rolled(planner, models[1], two).truncated == [False, False, False, True, False, False, False, False]


def test_a_problems_traces_depend_on_nothing_around_it(models):
    """Draws are a function of seed, step, problem and sample: the same traces in any batch, on any number of
    processes."""
    planner, tokenizer, (p, q, r, *_) = models

    def of(problem, problems, **more):
        batch = rolled(planner, tokenizer, problems, **more)
        return [t for owner, t in zip(batch.problems, batch.completions.tokens) if owner is problem]
    alone = of(q, [q])
    assert of(q, [p, q]) == of(q, [r, q, p]) == of(q, [r, q, p], max_cache_tokens=100) == alone
    assert of(q, [p, q], G=2) == alone[:2], "nor on the other samples"
    assert len({tuple(t) for t in alone}) == 4, "samples draw apart"
    assert of(q, [q], when="0 1") != alone != of(q, [q], when="1 0"), "another step or seed, other draws"
    assert of(p, [p]) != alone
    again = of(q, [q, q])
    assert again[:4] == alone and all(t not in alone for t in again[4:]), "a problem that comes again counts on"


def test_names_of_the_draws_in_a_training(run_dir, monkeypatch, lottery):
    """The contract: trace SEED STEP PROBLEM SAMPLE for the planner; run SEED STEP PROBLEM SAMPLE RUN with a trace and
    alone SEED PROBLEM RUN without, once for all steps."""
    seen, real = [], executor.draws

    def spy(names, count):
        seen.append((list(names), count))
        return real(names, count)
    monkeypatch.setattr(executor, "draws", spy)
    train(settings(run_dir, seed=5, steps=2, repeats=1, group_size=2))
    problems = data.read_problems(run_dir / "groups" / "train.jsonl")
    expected = []
    for step in range(2):
        ids = [p.problem_id for p in problems_of_step(problems, step, 2, 5)]
        expected.append(({f"trace 5 {step} {i} {g}" for i in ids for g in range(2)}, 10))
        runs = {f"run 5 {step} {i} {g} {k}" for i in ids for g in range(2) for k in range(2)}
        expected.append((runs | {f"alone 5 {i} 0" for i in ids}, 6))
    seen = [(set(names), count) for names, count in seen if names]
    assert seen == expected


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_scored_logprobs_are_the_sampled_ones(models, temperature):
    """The sampler is the scorer: one temperature, positions aligned, whatever the micro-batch."""
    planner, tokenizer, problems = models
    batch = rolled(planner, tokenizer, problems[:4], temperature=temperature, length=20)
    assert batch.sampled.tolist() == sum(batch.completions.logprobs, [])
    for micro_tokens in 1, 150, 9999:
        torch.testing.assert_close(completion_logp(planner, batch, temperature, micro_tokens), batch.sampled, atol=1e-4, rtol=0)
    wrong = completion_logp(planner, batch, 1.0, 9999)
    assert (wrong - batch.sampled).abs().mean() > 0.05, "or the temperature would go unnoticed"


# ---------------------------------------------------------------- the gradient

@pytest.fixture(scope="module")
def sampled(models):
    """A real rollout of 3 problems x 4 traces of different lengths, with rewards."""
    planner, tokenizer, problems = models
    real = executor.generate

    def uneven(*args, **options):                                     # some short ones, whatever was sampled
        made = real(*args, **options)
        keep = [max(1, len(tokens) - (b * 5) % 16) for b, tokens in enumerate(made.tokens)]
        return Completions(*([row[:k] for row, k in zip(rows, keep)] for rows in (made.tokens, made.logprobs)))
    executor.generate = uneven
    try:
        batch = rolled(planner, tokenizer, problems[:3], length=24, when="1 0")
    finally:
        executor.generate = real
    assert len({len(t) for t in batch.completions.tokens}) > 2
    return batch, torch.tensor([1.0, 0.0, 0.3, 0.5, 0.2, 0.2, 0.9, -0.4, 0.0, 0.0, 0.0, 1.0])


def advantages(reward, scale="std"):
    return kernels.group_advantage(reward, 4, scale=scale == "std")


def accumulated(planner, batch, reward, old=None, ref=None, *, micro_tokens=9999, weights="dapo", scale="std", **changes):
    """accumulate_gradient as `train` calls it."""
    loss = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0} | changes
    return accumulate_gradient(planner, batch, reward, advantages(reward, scale), old, ref, 4, micro_tokens, weights, 24,
                               len(batch.target), len(batch.ids), scale=scale == "std", **loss)


def gradient(model, call):
    """The result of call(model) on a fresh copy, and the gradient it left, as one vector."""
    model = copy.deepcopy(model)
    result = call(model)
    return result, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def textbook(model, batch, reward, old=None, ref=None, *, weights="dapo", scale="std", temperature=1.0, clip_low=0.2,
             clip_high=0.2, beta=0.0):
    """The loss of the header, token by token, with autograd; shares nothing with kernels/ or token_logits."""
    logp = torch.log_softmax(model(batch.ids).logits.float() / temperature, dim=-1)
    B, G, M = len(reward), 4, int(batch.scored.sum())
    loss, at = 0.0, 0
    for b, tokens in enumerate(batch.completions.tokens):
        if not batch.scored[b].any():
            continue
        group = reward[b - b % G:b - b % G + G].tolist()
        A = reward[b].item() - sum(group) / G
        if scale == "std":
            A = A / (statistics.pstdev(group) + 1e-6)
        weight = {"dapo": 1 / M, "grpo": 1 / (B * len(tokens)), "dr_grpo": 1 / (B * 24)}[weights]
        begin = int(batch.scored[b].nonzero()[0])
        for t, token in enumerate(tokens):
            lp = logp[b, begin + t, token]
            ratio = (lp - (lp.detach() if old is None else old[at])).exp()
            part = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
            if beta:
                part = part + beta * ratio * ((ref[at] - lp).exp() - (ref[at] - lp) - 1)
            loss, at = loss + weight * part, at + 1
    loss.backward()
    return loss.item()


CASES = {"on-policy": {}, "temperature": dict(temperature=0.7), "grpo": dict(weights="grpo"),
         "dr_grpo": dict(weights="dr_grpo", scale="none"), "old": dict(clip_low=0.1, clip_high=0.3),
         "kl": dict(beta=0.5), "all": dict(beta=0.2, weights="grpo", temperature=1.4, clip_low=0.3)}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_textbook_one_whatever_the_micro_batch(models, sampled, case):
    """Divided by the tokens of the step, counted before micro-batching; groups may straddle micro-batches."""
    batch, reward = sampled
    options = CASES[case]
    noise = torch.Generator().manual_seed(2)
    logp = completion_logp(models[0], batch, options.get("temperature", 1.0), 9999)
    old = logp + 0.3 * torch.randn(logp.shape, generator=noise) if case in ("old", "all") else None
    ref = logp + 0.5 * torch.randn(logp.shape, generator=noise) if "beta" in options else None
    want, slow = gradient(models[0], lambda m: textbook(m, batch, reward, old, ref, **options))
    health, fast = gradient(models[0], lambda m: accumulated(m, batch, reward, old, ref, **options))
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() < 1e-5 * slow.norm()
    assert health["loss"] == pytest.approx(want, abs=1e-5)
    for micro_tokens in (1, 200):
        again, part = gradient(models[0], lambda m: accumulated(m, batch, reward, old, ref, micro_tokens=micro_tokens, **options))
        assert (part - fast).norm() < 3e-6 * fast.norm()
        assert again == pytest.approx(health, abs=1e-5), "metrics are of all micro-batches, not of the last"


def masked(batch, truncated):
    """The batch that --truncated mask makes of these cut traces: their tokens are in no part of the loss."""
    scored, keep = batch.scored.clone(), ~torch.tensor(truncated)[batch.sequence]
    scored[torch.tensor(truncated)] = False
    return dataclasses.replace(batch, truncated=truncated, scored=scored, at=batch.at[keep], target=batch.target[keep],
                               sequence=batch.sequence[keep], sampled=batch.sampled[keep])


@pytest.mark.parametrize("weights", ["dapo", "grpo"])
def test_cut_traces_left_out_of_the_loss(models, sampled, weights):
    """Their rewards stay in the group's mean, their tokens have no part in the gradient; a micro-batch of cut ones only
    is nothing."""
    batch, reward = sampled
    cut = masked(batch, [b in (0, 4, 5, 6, 7, 9) for b in range(12)])
    want, slow = gradient(models[0], lambda m: textbook(m, cut, reward, weights=weights))
    assert slow.norm() > 1e-3
    for micro_tokens in (1, 150, 9999):
        health, fast = gradient(models[0], lambda m: accumulated(m, cut, reward, weights=weights, micro_tokens=micro_tokens))
        assert (fast - slow).norm() < 1e-5 * slow.norm() and health["loss"] == pytest.approx(want, abs=1e-5)
        assert 0 < health["entropy"] < 5 and health["sampler_gap"] < 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_all_traces_cut_teach_nothing(models, sampled, beta):
    """Not even a gradient of zeros, with which AdamW's momentum and weight decay would move the planner."""
    batch = masked(sampled[0], [True] * 12)
    planner, nothing = copy.deepcopy(models[0]), torch.zeros(0)
    assert completion_logp(planner, batch, 1.0, 200).shape == (0,)
    health = accumulated(planner, batch, sampled[1], nothing, nothing if beta else None, micro_tokens=200, beta=beta)
    assert all(p.grad is None for p in planner.parameters())
    assert health["loss"] == health["entropy"] == health["sampler_gap"] == health["clip_share"] == 0


FUSED = """
import pickle, sys
import kernels, tracelift
planner, batch, arguments, options = pickle.load(sys.stdin.buffer)
fused = {name: getattr(kernels, name) for name in ("grpo_loss", "linear_grpo_loss")}
kernels.backend = lambda device: "triton"
calls = []
for path in "triton", "linear":
    planner.plain_head = path == "linear"            # a head that is no plain matrix: its logits are made whole
    kernels.grpo_loss = lambda *a, **k: calls.append("triton") or fused["grpo_loss"](*a, **k)
    kernels.linear_grpo_loss = lambda *a, **k: calls.append("linear") or fused["linear_grpo_loss"](*a, **k)
    health = tracelift.accumulate_gradient(planner, batch, *arguments, **options)
    sys.stdout.buffer.write(pickle.dumps((health, {n: p.grad for n, p in planner.named_parameters()})))
    planner.zero_grad(set_to_none=True)
parts = len(tracelift.micro_batches(batch, arguments[5]))
assert parts > 2 and calls == ["triton"] * parts + ["linear"] * parts, calls
"""


def test_the_fused_paths_agree_with_the_reference(models, sampled):
    """One real training step by the Triton kernel and by its linear variant, in the interpreter (a process of its own,
    for the choice is made once): the same loss, metrics and gradients as on the reference path."""
    pytest.importorskip("triton")
    batch = masked(sampled[0], [b not in (0, 3, 6) for b in range(12)])          # the interpreter is slow
    reward = sampled[1]
    options = dict(temperature=0.9, beta=0.2, clip_low=0.1, clip_high=0.2, scale=True)
    old = completion_logp(models[0], batch, 0.9, 9999) + 0.1
    planner = copy.deepcopy(models[0])
    arguments = (reward, advantages(reward), old, old - 0.3, 4, 3 * max(batch.lengths), "dapo", 24, len(batch.target),
                 len(batch.ids))
    work = pickle.dumps((planner, batch, arguments, options))
    done = subprocess.run([sys.executable, "-c", FUSED], input=work, capture_output=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr.decode()
    want = accumulate_gradient(planner, batch, *arguments, **options)
    results = io.BytesIO(done.stdout)
    for _ in "triton", "linear":
        health, grads = pickle.load(results)
        assert health == pytest.approx(want, abs=1e-6)
        for name, p in planner.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
    assert max(p.grad.abs().max() for p in planner.parameters()) > 1e-2


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_no_gradient(models, sampled, value):
    """Rounding noise divided by a tiny spread makes advantages of up to 1."""
    planner, batch = copy.deepcopy(models[0]), sampled[0]
    health = accumulated(planner, batch, torch.full((12,), value))
    assert all(p.grad is None for p in planner.parameters()), "not even a zero, which would move Adam's momentum"
    assert health["loss"] == 0 and health["entropy"] > 0
    logp = completion_logp(models[0], batch, 1.0, 9999)
    accumulated(planner, batch, torch.full((12,), value), None, logp - 0.5, beta=0.1)
    assert sum(p.grad.norm() for p in planner.parameters()) > 1e-3, "the KL term has one whatever the rewards"


def test_groups_without_spread_cost_no_backward_pass(models, sampled, monkeypatch):
    """One group of three has spread: one backward pass of three, and the numbers of a step that makes all of them."""
    batch, passes, backward = sampled[0], [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: passes.append(1) or backward(loss))
    reward = torch.tensor([0.5] * 4 + [0.0, 1.0, 0.0, 0.0] + [1.0] * 4)
    (want, whole), all_at_once = gradient(models[0], lambda m: accumulated(m, batch, reward)), len(passes)
    health, skipped = gradient(models[0], lambda m: accumulated(m, batch, reward, micro_tokens=1))
    assert (all_at_once, len(passes)) == (1, 1 + 4)
    assert whole.norm() > 1e-3 and (skipped - whole).norm() < 1e-6 * whole.norm()
    assert health == pytest.approx(want, abs=1e-6)


def test_the_advantage_of_the_loop_is_the_losss(run_dir, monkeypatch, lottery):
    """The loop computes it for the reader and to skip backward passes, the loss from the rewards again: were they two,
    what is skipped would not be what is zero."""
    seen, real_update, real_loss = [], tracelift.accumulate_gradient, kernels.grpo_loss

    def update(planner, batch, reward, advantage, *rest, **options):
        seen.append((advantage, []))
        return real_update(planner, batch, reward, advantage, *rest, **options)

    def loss(logits, target, reward, sequence, *rest, **options):
        result = real_loss(logits, target, reward, sequence, *rest, **options)
        seen[-1][1].append((sequence, result[3]))
        return result
    monkeypatch.setattr(tracelift, "accumulate_gradient", update)
    monkeypatch.setattr(kernels, "grpo_loss", loss)
    for scale in "std", "none":
        train(settings(run_dir, name=scale, steps=3, scale=scale))
    assert len(seen) == 6 and sum(bool(advantage.any()) for advantage, _ in seen) >= 2
    for advantage, found in seen:
        for sequence, A in found:
            torch.testing.assert_close(A, advantage[sequence], atol=1e-6, rtol=1e-6)
        assert sorted(set(torch.cat([sequence for sequence, _ in found]).tolist())) == list(range(8))


def test_an_update_moves_probability_towards_the_better_traces(models, sampled):
    """The sign of everything."""
    batch, reward = sampled
    planner = copy.deepcopy(models[0])
    before = completion_logp(planner, batch, 1.0, 9999)
    accumulated(planner, batch, reward)
    with torch.no_grad():
        for p in planner.parameters():
            p -= 1e-3 * p.grad
    change = (completion_logp(planner, batch, 1.0, 9999) - before).split([len(t) for t in batch.completions.tokens])
    groups = [reward[n:n + 4].tolist() for n in range(0, 12, 4)]
    advantage = [(r - statistics.mean(g)) / statistics.pstdev(g) for g in groups for r in g]
    assert sum(a * c.sum().item() for a, c in zip(advantage, change)) > 1e-3


def test_clipped_tokens_are_counted_and_pushed_no_further(models, sampled):
    """At ratio 1.5 good traces are clipped and bad ones are not; at 1 / 1.5 the other way round."""
    batch, reward = sampled
    lengths = [len(t) for t in batch.completions.tokens]
    better = [reward[b] > reward[b - b % 4:b - b % 4 + 4].mean() for b in range(12)]
    logp = completion_logp(models[0], batch, 1.0, 9999)
    for shift, clipped in ((-math.log(1.5), better), (math.log(1.5), [not x for x in better])):
        health, grad = gradient(models[0], lambda m: accumulated(m, batch, reward, logp + shift))
        share = sum(n for n, c in zip(lengths, clipped) if c) / sum(lengths)
        assert 0 < share < 1 and health["clip_share"] == pytest.approx(share, abs=1e-6)
        _, free = gradient(models[0], lambda m: accumulated(m, batch, reward, logp + shift, clip_low=9.0, clip_high=9.0))
        assert (grad - free).norm() > 0.05 * free.norm()
    assert accumulated(copy.deepcopy(models[0]), batch, reward, logp)["clip_share"] == 0


def test_kl_to_itself_is_zero(models, sampled):
    """beta must not pull on a planner that is still the reference."""
    batch, reward = sampled
    ref = completion_logp(models[0], batch, 1.0, 9999)
    health, grad = gradient(models[0], lambda m: accumulated(m, batch, reward, None, ref, beta=0.7))
    _, free = gradient(models[0], lambda m: accumulated(m, batch, reward))
    assert abs(health["kl"]) < 1e-6 and (grad - free).norm() < 1e-4 * free.norm()
    moved = accumulated(copy.deepcopy(models[0]), batch, reward, None, ref - 0.5, beta=0.7)
    assert moved["kl"] == pytest.approx(math.exp(-0.5) + 0.5 - 1, abs=1e-4)


def test_the_kl_term_pulls_back_to_the_reference(models, sampled):
    """Its derivative in a log-prob is beta (logp - ref), the reverse KL's, on-policy too."""
    batch = sampled[0]
    logp = completion_logp(models[0], batch, 1.0, 9999)
    ref = logp + 0.5 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(3))
    _, fast = gradient(models[0], lambda m: accumulated(m, batch, torch.zeros(12), None, ref, beta=0.4))

    def plain(model):
        logits = model(batch.ids).logits.flatten(0, 1)[batch.at]
        chosen = torch.log_softmax(logits, dim=-1).gather(1, batch.target[:, None])[:, 0]
        (0.4 * (chosen.detach() - ref) * chosen).mean().backward()
    _, slow = gradient(models[0], plain)
    assert slow.norm() > 1e-3 and (fast - slow).norm() < 1e-4 * slow.norm()


def test_the_sampler_gap_tells_a_mismatch(models, sampled):
    """Rounding of float32 where all is well; another temperature, and it shows."""
    batch, reward = sampled
    assert 0 <= accumulated(copy.deepcopy(models[0]), batch, reward, micro_tokens=200)["sampler_gap"] < 1e-5
    assert accumulated(copy.deepcopy(models[0]), batch, reward, temperature=0.8)["sampler_gap"] > 0.05


# ---------------------------------------------------------------- training

def test_problems_depend_on_seed_and_step_only():
    """Runs of other modes, and a resumed run, must see the same problems."""
    problems = list(range(7))
    steps = [problems_of_step(problems, step, 3, 4) for step in range(7)]                 # 3 epochs
    flat = sum(steps, [])
    assert all(sorted(flat[i:i + 7]) == problems for i in (0, 7, 14)), "each epoch holds every problem once"
    assert flat[:7] != flat[7:14] and flat != sum((problems_of_step(problems, i, 3, 5) for i in range(7)), [])
    assert problems_of_step(problems, 5, 3, 4) == steps[5] and problems_of_step(problems, 0, 9, 4) == flat[:9]
    assert sorted(problems_of_step(problems, 0, 21, 4)) == sorted(problems * 3), "fewer problems than N"


class Crash(Exception):
    pass


def crash(*args, **kwargs):
    raise Crash


@contextlib.contextmanager
def crash_at(call, error=Crash, name="measure_rewards"):
    """Inside, a function of tracelift raises at its call-th call."""
    real, calls = getattr(tracelift, name), []

    def fragile(*args, **more):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tracelift, name, fragile)
        yield


def untimed(records):
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


def assert_equal_runs(got, want):
    """Weights, metrics and samples, bit for bit; and nothing else lies in the folder."""
    assert same(weights_of(got), weights_of(want))
    assert untimed(lines(got)) == untimed(lines(want))
    assert lines(got, "samples.jsonl") == lines(want, "samples.jsonl") != []
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir())


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """Folders of trainings that nothing interrupted, by their settings: several tests compare with the same ones."""
    made = {}

    def of(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder = Path(shutil.copytree(prepared[0], tmp_path_factory.mktemp("straight") / "toy"))
            with pytest.MonkeyPatch.context() as m:
                draw_lots(m)
                made[key] = train(settings(folder, **changes))
        return made[key]
    return of


@pytest.mark.parametrize("changes, call", [({}, 4), ({"inner_epochs": 2, "beta": 0.1, "save_every": 1}, 5),
                                           ({"save_every": 20}, 3), ({"truncated": "mask"}, 4),
                                           ({"lora_rank": 4, "inner_epochs": 2, "beta": 0.1}, 4)],
                         ids=["after a checkpoint", "with inner epochs and KL", "before the first checkpoint",
                              "truncated ones masked", "with LoRA"])
def test_an_interrupted_run_ends_like_a_straight_one(run_dir, straight, lottery, changes, call):
    """A checkpoint without optimizer, baselines or costs, or logs with lines twice, would show here. Generators are no
    part of it: those of torch and random stand elsewhere when the training goes on."""
    want = straight(**changes)
    with pytest.raises(Crash), crash_at(call):
        train(settings(run_dir, **changes))
    assert not (run_dir / want.name).exists(), "a folder of this name means a finished planner"
    torch.manual_seed(1234)
    random.seed(1234)
    got = train(settings(run_dir, **changes))
    assert got == run_dir / want.name
    assert not same(weights_of(want), weights_of(run_dir / "base")), "nothing was trained: this test would see nothing"
    assert_equal_runs(got, want)
    assert [line["step"] for line in lines(got)] == list(range(5))
    assert len({line["without_trace"] for line in lines(want)}) > 1 and any(line["grad_norm"] for line in lines(want))


def values_in(x):
    """All leaves of nested dicts and lists."""
    if isinstance(x, (dict, list, tuple)):
        return itertools.chain(*(values_in(v) for v in (x.values() if isinstance(x, dict) else x)))
    return [x]


def test_a_checkpoint_holds_no_generator(straight):
    """What the next step depends on and nothing else: random numbers are a function of seed, step, problem, sample."""
    saved = torch.load(straight() / "checkpoint.pt", weights_only=True)
    assert set(saved) == {"planner", "optimizer", "executor", "state", "logs"}
    assert set(saved["state"]) == {"step", "seconds", "planner_tokens"} and saved["state"]["step"] == 5
    assert set(saved["executor"]) == {"baseline", "spent"} and saved["executor"]["baseline"]
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0], "a policy is not shrunk"
    tensors = [x for x in values_in(saved) if torch.is_tensor(x)]
    assert tensors and all(x.is_floating_point() for x in tensors), "the state of a generator is bytes"


def test_a_finished_planner_is_not_trained_again(run_dir, monkeypatch, lottery):
    """run.sh repeats every command; another setting under the same name must not pass for this planner."""
    out = train(settings(run_dir, steps=1))
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(tracelift, "measure_rewards", crash)
    assert train(settings(run_dir, steps=1)) == out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for key, value in (("learning_rate", 1e-9), ("repeats", 3), ("truncated", "mask")):
        with pytest.raises(UserError, match=f"--{key} "):
            train(settings(run_dir, **{"steps": 1, key: value}))
    for key, value in (("micro_tokens", 1), ("save_every", 7), ("max_cache_gib", 1.0)):
        assert train(settings(run_dir, **{"steps": 1, key: value})) == out, "where, how fast, in how much memory"


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "LoRA"])
def test_steps_may_grow(run_dir, straight, lottery, changes):
    """A longer training is the shorter one continued, bit for bit; its old evaluation goes."""
    for steps in 1, 3, 5:
        out = train(settings(run_dir, steps=steps, warmup=1, **changes))
        assert not (out / "results.json").exists() and len(lines(out)) == steps
        (out / "results.json").write_text("{}")
    (out / "results.json").unlink()
    assert_equal_runs(out, straight(warmup=1, **changes))


def test_fewer_steps_are_refused(run_dir, straight, lottery):
    """Weights of 3 steps cannot be had from those of 5: one would take the longer training for the shorter one."""
    out = Path(shutil.copytree(straight(warmup=1), run_dir / straight().name))
    with pytest.raises(UserError, match=r"--steps 3\b.* 5 "):
        train(settings(run_dir, steps=3, warmup=1))
    assert out.exists() and len(lines(out)) == 5


def test_a_grown_training_is_as_long_as_it_is(run_dir, lottery):
    """Grown from 1 to 3 steps, it is one of 3: asked for 2, or for 1, it must not say that it is there."""
    for steps in 1, 3:
        out = train(settings(run_dir, steps=steps, warmup=1))
    for steps in 2, 1:
        with pytest.raises(UserError, match=rf"--steps {steps}\b.* 3 "):
            train(settings(run_dir, steps=steps, warmup=1))
    assert out.exists() and len(lines(out)) == 3 and data.read_settings(out)["steps"] == 3


def test_more_steps_with_other_settings_leave_the_planner_alone(run_dir, lottery):
    """A finished planner must not become an unfinished one by a command that is refused."""
    out = train(settings(run_dir, steps=1))
    (out / "results.json").write_text("{}")
    with pytest.raises(UserError, match="--learning_rate "):
        train(settings(run_dir, steps=2, warmup=1, learning_rate=1e-9))
    assert out.exists() and (out / "results.json").exists()


def test_fewer_steps_than_a_stopped_training_has_made_are_refused(run_dir, stopped):
    """Its checkpoint is of 4 steps: saved as a planner of 3, its numbers would be another training's."""
    with pytest.raises(UserError, match=r"--steps 3\b"):
        train(settings(run_dir, steps=3))
    assert not (run_dir / "planner-tracelift-seed0").exists() and (stopped / "checkpoint.pt").exists()


def test_more_steps_without_a_checkpoint_are_refused(run_dir, lottery):
    """Someone may have deleted it, for it is three times as large as the model: hours must not be repeated unasked."""
    out = train(settings(run_dir, steps=1))
    log = (out / "metrics.jsonl").read_bytes()
    (out / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="checkpoint"):
        train(settings(run_dir, steps=2, warmup=1))
    assert (out / "metrics.jsonl").read_bytes() == log


def test_a_training_goes_on_with_the_problems_that_it_began_with(run_dir, stopped):
    path = run_dir / "groups" / "train.jsonl"
    data.write_groups(path, data.read_groups(path)[::-1])
    with pytest.raises(UserError, match="groups/train.jsonl has changed"):
        train(settings(run_dir))


def test_a_second_process_at_the_same_training_is_refused(run_dir, monkeypatch, lottery):
    """Two writers of one log spoil both; the first goes on."""
    real, said = tracelift.measure_rewards, []

    def meanwhile(*args, **more):
        if not said:
            with pytest.raises(UserError, match="another process") as error:
                train(settings(run_dir))
            said.append(str(error.value))
        return real(*args, **more)
    monkeypatch.setattr(tracelift, "measure_rewards", meanwhile)
    assert len(lines(train(settings(run_dir)))) == 5 and said


# ---- logs, checkpoints and disks that are not what they should be

@pytest.fixture
def stopped(run_dir, lottery):
    """A training of 5 steps that stopped after 4, with a checkpoint after 4."""
    with pytest.raises(Crash), crash_at(5):
        train(settings(run_dir))
    return run_dir / "planner-tracelift-seed0.partial"


def test_a_longer_log_is_cut(run_dir, stopped, straight, capsys):
    """Lines of steps after the checkpoint, which come again; the last of them only half written."""
    with open(stopped / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "reward": 99.0}\n{"step": 5, "rew')
    got = train(settings(run_dir))
    assert_equal_runs(got, straight())
    assert "shorter" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("damage", ["half a line", "two lines", "missing"])
def test_a_shorter_log_is_said_in_one_line(run_dir, stopped, straight, capsys, name, damage):
    """After a power cut: no bytes of zero, no traceback, no half line in the middle; the weights are what they are."""
    log, whole = stopped / name, (stopped / name).read_bytes()
    kept = whole.splitlines(keepends=True)[:-1 if damage == "half a line" else -2]
    if damage == "missing":
        kept = []
        log.unlink()
    else:
        log.write_bytes(b"".join(kept) + (b'{"half' if damage == "half a line" else b""))
    got = train(settings(run_dir))
    said = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert len(said) == 1 and "shorter" in said[0], said
    found = (got / name).read_bytes()
    assert found.startswith(b"".join(kept)) and len(found.splitlines()) == len(kept) + len(
        (straight() / name).read_bytes().splitlines()) - len(whole.splitlines())
    lines(got, name)
    assert same(weights_of(got), weights_of(straight()))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", b"\x00" * 4000, "half", "other keys", "other model"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(run_dir, stopped, damage):
    path = stopped / "checkpoint.pt"
    if damage == "half":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif damage == "other keys":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "other model":
        saved = torch.load(path, weights_only=True)
        saved["planner"]["model.norm.weight"] = torch.zeros(3)
        torch.save(saved, path)
    else:
        path.write_bytes(damage)
    log = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        train(settings(run_dir))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "delete" in str(error.value)
    assert (stopped / "metrics.jsonl").read_bytes() == log, "nothing is thrown away before someone decides"


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: write() fails as on a full disk, with an OSError."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_at_a_checkpoint(run_dir, straight, monkeypatch, lottery):
    """One line, the checkpoint before it stays, no temporary file; with room again it ends like a straight run."""
    real, calls = tracelift.TrainingRun.save_checkpoint, []

    def save(run):
        calls.append(1)
        with full_disk(20000 if len(calls) == 2 else 10**9):
            real(run)
    monkeypatch.setattr(tracelift.TrainingRun, "save_checkpoint", save)
    with pytest.raises((UserError, OSError), match="checkpoint.pt holds the last saved step") as error:
        train(settings(run_dir))
    assert "\n" not in str(error.value)
    work = run_dir / "planner-tracelift-seed0.partial"
    assert torch.load(work / "checkpoint.pt", weights_only=True)["state"]["step"] == 2
    assert not list(work.glob("*.tmp"))
    assert_equal_runs(train(settings(run_dir)), straight())


def test_a_full_disk_at_the_end(run_dir, straight, monkeypatch, lottery):
    """The planner's own save, after the last checkpoint: one line, and the next try has only that to do."""
    real = tracelift.TrainingRun.save_planner

    def save(run):
        with full_disk(20000):
            real(run)
    with monkeypatch.context() as m:
        m.setattr(tracelift.TrainingRun, "save_planner", save)
        with pytest.raises((UserError, OSError)):
            train(settings(run_dir))
    assert not (run_dir / "planner-tracelift-seed0").exists()
    monkeypatch.setattr(tracelift, "measure_rewards", crash)
    assert_equal_runs(train(settings(run_dir)), straight())


@pytest.mark.parametrize("call, left", [(1, "nothing is saved yet"), (4, "checkpoint.pt holds the last saved step")])
def test_ctrl_c_says_what_is_saved(run_dir, lottery, call, left):
    with pytest.raises(KeyboardInterrupt, match="stopped; .*same command") as stop, crash_at(call, KeyboardInterrupt):
        train(settings(run_dir))
    assert left in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_training_that_diverges_stops(run_dir, monkeypatch, lottery, broken):
    """Not "weights are damaged" at the next rollout: it names the step and the flag, and keeps the last checkpoint."""
    real = tracelift.accumulate_gradient
    calls = []

    def update(planner, *args, **options):
        health = real(planner, *args, **options)
        calls.append(1)
        if len(calls) == 4:
            if broken == "loss":
                health["loss"] = float("nan")
            planner.get_input_embeddings().weight.grad = torch.full_like(planner.get_input_embeddings().weight, math.nan)
        return health
    monkeypatch.setattr(tracelift, "accumulate_gradient", update)
    with pytest.raises((UserError, FloatingPointError)) as error:
        train(settings(run_dir))
    assert all(part in str(error.value) for part in ("step 3", "--learning_rate", "checkpoint.pt holds"))
    work = run_dir / "planner-tracelift-seed0.partial"
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 2 and all(x.isfinite().all() for x in saved["planner"].values())


def test_a_cut_after_the_last_step_costs_little(run_dir, monkeypatch, lottery):
    """Between the last checkpoint and the folder's rename: no step is repeated."""
    with monkeypatch.context() as m:
        m.setattr(tracelift.TrainingRun, "save_planner", crash)
        with pytest.raises(Crash):
            train(settings(run_dir, steps=3))
    monkeypatch.setattr(tracelift, "measure_rewards", crash)
    assert [line["step"] for line in lines(train(settings(run_dir, steps=3)))] == [0, 1, 2]


# ---- roles

def spied_executors(monkeypatch):
    """[(model, its weights at that time)] of every executor that is made from now on."""
    made, real = [], Executor.__init__

    def init(self, model, *args, **kwargs):
        made.append((model, {name: x.clone() for name, x in model.state_dict().items()}))
        real(self, model, *args, **kwargs)
    monkeypatch.setattr(Executor, "__init__", init)
    return made


def test_training_changes_the_planner_and_never_the_executor(run_dir, monkeypatch, lottery):
    """Both start from one folder. Were they one object, the uplift's bar would move with the planner."""
    made = spied_executors(monkeypatch)
    out = train(settings(run_dir, steps=3))
    (model, before), = made
    assert same(before, model.state_dict()) and same(before, weights_of(run_dir / "base"))
    assert not any(p.requires_grad for p in model.parameters())
    assert not same(weights_of(out), before)


def test_with_lora_one_backbone_is_planner_executor_and_reference(run_dir, monkeypatch, lottery):
    """One copy of the weights in memory, which stay as they are; the executor's outputs do not change by a bit while
    the planner's do, and neither do the reference's; the checkpoint holds the adapter and nothing else."""
    made, seen, ids = spied_executors(monkeypatch), [], torch.arange(20)[None]
    real_measure, real_update = tracelift.measure_rewards, tracelift.accumulate_gradient

    def measured(problems, traces, frozen, *args, **more):
        with torch.no_grad():
            seen.append(("executor", frozen.model(ids).logits.clone()))
        return real_measure(problems, traces, frozen, *args, **more)

    def updated(planner, *args, **options):
        assert planner is made[0][0], "the planner is another copy"
        with torch.no_grad():
            seen.append(("planner", planner(ids).logits.clone()))
        return real_update(planner, *args, **options)
    monkeypatch.setattr(tracelift, "measure_rewards", measured)
    monkeypatch.setattr(tracelift, "accumulate_gradient", updated)
    out = train(settings(run_dir, steps=3, lora_rank=2, beta=0.1, checkpointing=1))
    (model, before), = made
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if name in before)
    assert same(before, weights_of(run_dir / "base")) and not same(weights_of(out), before)
    executor_logits, planner_logits = ([x for who, x in seen if who == name] for name in ("executor", "planner"))
    assert len(executor_logits) == 3 and all(torch.equal(x, executor_logits[0]) for x in executor_logits)
    assert torch.equal(planner_logits[0], executor_logits[0]) and not torch.equal(planner_logits[2], executor_logits[0])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["planner"]
    assert saved and all(name.endswith((".lora_A", ".lora_B")) for name in saved)
    assert lines(out)[0]["kl"] == 0 and lines(out)[-1]["kl"] > 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and not (out / "adapter_config.json").exists()
    for options in {"lora_rank": 2, "init": str(run_dir / "base")}, {"init": str(out)}:
        with pytest.raises(UserError, match="--init does not go with LoRA"):
            train(settings(run_dir, name="other", **options))


def test_an_adapter_is_evaluated_as_it_was_trained(run_dir, lottery):
    """Not the merged weights, from which a low precision rounds small changes away; a broken adapter is an error."""
    out = train(settings(run_dir, mode="exec_only", steps=2, lora_rank=2, learning_rate=0.1))
    ids = torch.arange(20)[None]

    def logits(folder):
        return tracelift.load_planner(folder, run_dir, "cpu")[0](input_ids=ids).logits
    trained = executor.load(str(out), "cpu", torch.float32)[0](input_ids=ids).logits
    shutil.copy(run_dir / "base" / "model.safetensors", out)
    assert torch.allclose(logits(out), trained, atol=1e-4) and not torch.allclose(logits(run_dir / "base"), trained, atol=1e-2)
    assert torch.equal(logits(run_dir / "base"), executor.load(str(run_dir / "base"), "cpu")[0](input_ids=ids).logits)
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="adapter.*not an adapter"):
        logits(out)


def test_checkpointing_changes_no_number(run_dir, lottery):
    """It recomputes, in training mode, and without the dropout that some models have there."""
    config = json.loads((run_dir / "base" / "config.json").read_text())
    (run_dir / "base" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    plain, recomputed = (untimed(lines(train(settings(run_dir, steps=2, name=f"c{on}", checkpointing=on)))) for on in (0, 1))
    assert plain[0]["grad_norm"] > 0
    for a, b in zip(plain, recomputed):
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_the_starting_planner_may_be_another_model(run_dir, lottery):
    """--init: its weights, not the base's."""
    torch.manual_seed(1)
    tokenizer = executor.load(str(run_dir / "base"), "cpu")[1]
    other = executor.tiny_model(len(tokenizer), 16, 1)
    other.save_pretrained(run_dir / "other")
    tokenizer.save_pretrained(run_dir / "other")
    out = train(settings(run_dir, steps=1, mode="exec_only", init=str(run_dir / "other"), learning_rate=1e-30, warmup=0))
    got, want = weights_of(out), weights_of(run_dir / "other")
    assert all(torch.allclose(got[name], want[name], rtol=0, atol=1e-20) for name in want)


def test_modes_share_problems_and_load_only_what_they_need(run_dir, lottery):
    """exec_only runs without a reward model; unmeasured parts are null, not 0."""
    first = lines(train(settings(run_dir, steps=2)), "samples.jsonl")
    shutil.rmtree(run_dir / "rm")
    out = train(settings(run_dir, steps=2, mode="exec_only"))
    own = lines(out, "samples.jsonl")
    assert [r["problem"] for r in own] == [r["problem"] for r in first]
    assert [r["trace"] for r in own] == [r["trace"] for r in first], "the same first rollout"
    assert [r["outputs"] for r in own] == [r["outputs"][:1] for r in first] and [r["e2e"] for r in own] == [r["e2e"] for r in first]
    for line in lines(out):
        assert line["rm"] is line["uplift"] is line["without_trace"] is None and line["reward"] == line["success"]
    with pytest.raises(UserError, match="rm.py"):
        train(settings(run_dir, steps=2, mode="rm_only"))


def test_metrics_of_a_step(straight):
    """What README's table of symptoms names is in every line, and finite; the learning rate is the warm-up's."""
    found = lines(straight())
    for line in found:
        for key in ("reward", "success", "uplift", "rm", "without_trace", "faithful", "leak", "groups_without_spread",
                    "reward_spread", "unclosed", "truncated", "trace_tokens", "longest_trace", "loss", "entropy",
                    "sampler_gap", "grad_norm", "learning_rate", "tokens_per_second", "planner_tokens",
                    "executor_prompt_tokens", "executor_tokens", "seconds", "seconds_rollout", "seconds_reward",
                    "seconds_update"):
            assert math.isfinite(line[key]), key
        assert line["kl"] is None and line["clip_share"] is None, "not measured, which is not 0"
        assert 0 <= line["sampler_gap"] < 1e-5, "float32: the sampler is the scorer"
    assert [line["learning_rate"] for line in found] == pytest.approx([2.5e-3] + [5e-3] * 4)
    assert all(a["planner_tokens"] < b["planner_tokens"] for a, b in zip(found, found[1:]))
    groups = lines(straight(), "samples.jsonl")
    assert [len(r["outputs"]) for r in groups] == [3] * 12, "1 + K runs of each trace"
    assert [r["step"] for r in groups] == [0] * 4 + [2] * 4 + [4] * 4, "one group every save_every steps"


def test_traces_that_are_cut_are_not_learned_on_request(run_dir, lottery):
    """At a limit of 2 tokens all are cut: with mask the planner stays as it is, bit for bit, and nothing is NaN."""
    used = train(settings(run_dir, steps=2, name="use", max_trace_tokens=2))
    cut = train(settings(run_dir, steps=2, name="mask", max_trace_tokens=2, truncated="mask"))
    assert all(line["truncated"] == 1 and line["grad_norm"] > 0 for line in lines(used)), "choose another seed"
    for line in lines(cut):
        assert line["truncated"] == 1 and line["loss"] == line["grad_norm"] == line["entropy"] == 0
        assert line["reward_spread"] > 0
    assert same(weights_of(cut), weights_of(run_dir / "base")) and not same(weights_of(used), weights_of(run_dir / "base"))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["all weights", "LoRA"])
def test_validation_does_not_change_the_training(run_dir, straight, lottery, changes):
    """Greedy, on held-out problems, now and then: weights and every other metric are those of a training without."""
    want = straight(**changes)
    got = train(settings(run_dir, eval_every=2, eval_problems=3, **changes))
    found = lines(got)
    assert [line["step"] for line in found if "heldout_success" in line] == [1, 3, 4], "every second step and the last"
    assert all(line.pop("heldout_success", 0) in (0, 1 / 3, 2 / 3, 1) for line in found)
    assert same(weights_of(got), weights_of(want)) and not same(weights_of(got), weights_of(run_dir / "base"))
    assert untimed(found) == untimed(lines(want)) and lines(got, "samples.jsonl") == lines(want, "samples.jsonl")


def test_validation_is_greedy_with_both_roles(run_dir, monkeypatch, lottery):
    """Once with the planner and once with the executor, which for LoRA is the base model again."""
    asked, real = [], executor.generate

    def spy(model, prompts, *, temperature, max_new_tokens, **more):
        with torch.no_grad():
            asked.append((temperature, max_new_tokens, len(prompts), model(torch.arange(9)[None]).logits.sum().item()))
        return real(model, prompts, temperature=temperature, max_new_tokens=max_new_tokens, **more)
    monkeypatch.setattr(executor, "generate", spy)
    train(settings(run_dir, steps=1, warmup=0, eval_every=1, eval_problems=3, lora_rank=2, learning_rate=0.1, mode="exec_only"))
    greedy = [call for call in asked if call[0] == 0]
    assert [call[:3] for call in greedy] == [(0, 10, 3), (0, 6, 3)] and greedy[0][3] != greedy[1][3]
    assert greedy[1][3] == next(call[3] for call in asked if call[1] == 6), "the executor of the reward"


def test_several_updates_per_rollout_move_the_ratio(run_dir, lottery):
    """With one update the ratio is 1 and nothing can be clipped; with three the clip must act on old log-probs."""
    one = lines(train(settings(run_dir, steps=2, name="one", learning_rate=3e-2, warmup=1)))
    three = lines(train(settings(run_dir, steps=2, name="three", learning_rate=3e-2, warmup=1, inner_epochs=3)))
    assert all(line["clip_share"] is None for line in one) and any(line["clip_share"] > 0 for line in three)


def test_training_uses_nothing_that_is_to_go(run_dir, lottery):
    """Warnings of today are errors of tomorrow's libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        train(settings(run_dir, steps=2, inner_epochs=2, beta=0.1, checkpointing=1))


def test_a_few_steps_raise_the_probability_of_what_is_rewarded(run_dir, monkeypatch):
    """End to end, on a rigged reward: the share of tokens whose id has the parity that the base prefers less."""
    tokenizer = executor.load(str(run_dir / "base"), "cpu")[1]
    prompt = torch.tensor([tokenizer(data.planner_prompt(p))["input_ids"][-12:]
                           for p in data.read_problems(run_dir / "groups" / "heldout.jsonl")])

    @torch.no_grad()
    def probability(folder, parity):
        return executor.load(str(folder), "cpu")[0](prompt).logits[:, -1].softmax(-1)[:, parity::2].sum(-1).mean().item()
    parity = min((0, 1), key=lambda p: probability(run_dir / "base", p))

    def rigged(problems, traces, *args, **more):
        share = [statistics.mean([i % 2 == parity for i in tokenizer(t)["input_ids"]] or [0]) for t in traces]
        return [Reward(None, None, None, None, None, float(x)) for x in share], [[] for _ in traces]
    monkeypatch.setattr(tracelift, "measure_rewards", rigged)
    out = train(settings(run_dir, steps=20, group_size=8, mode="exec_only", learning_rate=1e-2, micro_tokens=600))
    assert probability(out, parity) > probability(run_dir / "base", parity) + 0.2
    reward = [line["reward"] for line in lines(out)]
    assert statistics.mean(reward[-5:]) > statistics.mean(reward[:3]) + 0.1


def test_a_sandbox_failure_stops_training_and_logs_no_reward(run_dir, monkeypatch, lottery):
    def fail(self, *args):
        raise SandboxError("no helper")
    monkeypatch.setattr(Executor, "run", fail)
    with pytest.raises((SandboxError, UserError)):
        train(settings(run_dir))
    assert not any(log.read_text() for log in run_dir.glob("planner-*/metrics.jsonl"))
    assert not list(run_dir.glob("planner-*/*.safetensors"))


def test_programs_without_reference_traces(prepared, tmp_path):
    """From MBPP lines to the table, at toy size: no row for reference traces, no reward model needed."""
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(
            {"task_id": f"{split}-{i}", "text": f"write f ( x ) for {split} {i} .", "code": "",
             "test_list": [f"assert f({i}) == 1"]}) + "\n" for i in range(3)))
    run_dir = tmp_path / "code"
    command(data, "--run_dir", run_dir, "--source", "groups", "--task_type", "code", "--data", tmp_path / "train.jsonl",
            "--heldout_data", tmp_path / "heldout.jsonl")
    said = command(executor, "--run_dir", run_dir, *SMALL, "--model", prepared[0] / "base", "--eval_problems", 2)
    assert "no trace: 0.00" in said and "reference trace: not measured" in said
    out = train(settings(run_dir, mode="exec_only", steps=1, lora_rank=2))
    assert lines(out)[0]["program_runs"] == 8 and lines(out)[0]["calculations_right"] is None
    command(tracelift, "evaluate", "--run_dir", run_dir, "--device", "cpu", "--problems", 2)
    rows = set(rows_of((run_dir / "results.md").read_text()))
    assert {"no trace", "base planner", "exec_only"} <= rows and "reference trace" not in rows
    assert json.loads((out / "results.json").read_text())["rows"][out.name]["heldout T=0"]["success"] == 0
    with pytest.raises(UserError, match="mbpp-train-0.*good and a flawed trace"):
        rm_module.main(["--run_dir", str(run_dir), "--device", "cpu"])


# ---- settings

@pytest.mark.parametrize("key, value", [
    ("mode", "execonly"), ("steps", 0), ("group_size", 1), ("problems_per_step", 0), ("repeats", 0), ("temperature", 0.0),
    ("scale", "mad"), ("weights", "mean"), ("exec_score", "f1"), ("inner_epochs", 0), ("save_every", 0), ("micro_tokens", 0),
    ("name", "a/b"), ("truncated", "drop"), ("eval_every", -1), ("eval_problems", 0), ("beta", -1.0), ("clip_low", -0.1),
    ("learning_rate", -1.0), ("max_trace_tokens", 0), ("max_answer_tokens", 0), ("executor_temperature", -1.0),
    ("max_problems", -1), ("seed", -1), ("max_cache_gib", 0.0)])
def test_settings_that_cannot_work(run_dir, key, value):
    """Named before anything is written: a run of hours must not end in a KeyError."""
    check_settings(settings(run_dir))
    with pytest.raises(UserError, match=f"--{key} "):
        train(settings(run_dir, warmup=0, **{key: value}))
    assert not list(run_dir.glob("planner*"))


@pytest.mark.parametrize("options, reason", [
    ({"mode": "exec_only", "w_r": 0.3}, "--mode exec_only"), ({"mode": "exec_only", "w_e": 0.3}, "--mode exec_only"),
    ({"mode": "rm_only", "w_e": 1.0}, "--mode rm_only"), ({"mode": "tracelift-code", "w_r": 1.0}, "--mode tracelift-code"),
    ({"mode": "exec_only", "repeats": 2}, "--mode exec_only"), ({"mode": "rm_only", "repeats": 2}, "--mode rm_only"),
    ({"mode": "rm_only", "executor_temperature": 0.5}, "--mode rm_only"),
    ({"mode": "rm_only", "exec_score": "coderl"}, "--mode rm_only"),
    ({"clip_low": 0.1}, "--inner_epochs 1"), ({"clip_high": 0.3}, "--inner_epochs 1"), ({"lora_alpha": 8.0}, "--lora_rank"),
    ({"eval_problems": 3}, "--eval_every"),
    ({"exec_score": "pass_rate"}, "math"), ({"warmup": 9}, "--steps 5")],
    ids=lambda x: "" if isinstance(x, str) else " ".join(map(str, x.values())))
def test_flags_without_effect_are_refused_with_their_reason(run_dir, options, reason):
    """Whoever sets a flag expects an effect, and would report a number that it has no part in."""
    flag = list(options)[-1]
    with pytest.raises(UserError) as error:
        train(settings(run_dir, **options))
    assert str(error.value).startswith(f"--{flag} ") and reason in str(error.value)
    assert not list(run_dir.glob("planner*"))


@pytest.mark.parametrize("options", [
    {"mode": "uplift_only", "w_r": 0.3, "repeats": 2}, {"inner_epochs": 2, "clip_low": 0.1, "clip_high": 0.3},
    {"lora_rank": 2, "lora_alpha": 8.0}, {"eval_every": 5, "eval_problems": 3}, {"mode": "rm_only", "w_e": 0.5, "repeats": 3}, {"warmup": 5}])
def test_flags_with_an_effect_are_not_refused(options):
    """And a default that is spelt out changes nothing."""
    tracelift.check_train(settings(**options))


def test_rm_only_planners_are_evaluated_with_the_answer_length_that_they_name():
    """evaluate takes it from the planner's own settings, so it has an effect, and the recipes of run.sh name it."""
    tracelift.check_train(settings(mode="rm_only", max_answer_tokens=256))


@pytest.fixture
def lengthen(run_dir):
    """lengthen(split, T): gives the fourth problem of a split a text of which the planner's prompt has T tokens; its id."""
    tokenizer = executor.load(str(run_dir / "base"), "cpu")[1]

    def change(split, length):
        path = run_dir / "groups" / f"{split}.jsonl"
        groups = data.read_groups(path)
        prompt = data.encode_prompt(tokenizer, data.planner_prompt(data.problem_of(groups[3])))
        groups[3]["problem"] += " how" * (length - len(prompt))
        data.write_groups(path, groups)
        assert len(data.encode_prompt(tokenizer, data.planner_prompt(data.problem_of(groups[3])))) == length
        return groups[3]["problem_id"]
    return change


@pytest.mark.parametrize("split, options", [("train", {}), ("train", {"mode": "rm_only"}), ("heldout", {"eval_every": 2})])
def test_lengths_are_checked_before_anything_is_trained(run_dir, monkeypatch, lengthen, split, options):
    """One long problem would end the training in its middle, and again at every resume."""
    long = lengthen(split, 473)
    monkeypatch.setattr(tracelift, "rollout", crash)
    with pytest.raises(UserError) as error:
        train(settings(run_dir, max_trace_tokens=40, **options))
    assert all(part in str(error.value) for part in (long, "513", "512", "--max_trace_tokens"))
    assert not list(run_dir.glob("planner*")), "nothing is left that another try would stumble over"


@pytest.mark.parametrize("length, fits", [(466, True), (467, False)])
def test_a_length_that_just_fits_is_not_refused(run_dir, monkeypatch, lengthen, length, fits):
    """The executor's prompt has two tags and "\nAnswer:" more than the planner's, then 40 tokens of trace, 1 of answer."""
    lengthen("train", length)
    monkeypatch.setattr(tracelift, "rollout", crash)
    with pytest.raises(Crash if fits else UserError):
        train(settings(run_dir, mode="exec_only", max_trace_tokens=40, max_answer_tokens=1))


def test_the_executor_reads_more_than_the_planner(run_dir, monkeypatch, lengthen):
    """Prompt, trace and answer."""
    long = lengthen("train", 490)
    monkeypatch.setattr(tracelift, "rollout", crash)
    with pytest.raises(UserError, match=f"{long}.*512.*--max_answer_tokens"):
        train(settings(run_dir, mode="exec_only", max_trace_tokens=10, max_answer_tokens=30))
    with pytest.raises(Crash):
        train(settings(run_dir, mode="rm_only", max_trace_tokens=10))


def test_the_reward_model_may_have_the_shortest_context(run_dir, monkeypatch):
    config = json.loads((run_dir / "rm" / "config.json").read_text())
    (run_dir / "rm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    monkeypatch.setattr(tracelift, "rollout", crash)
    with pytest.raises(UserError, match=r"40; lower --max_trace_tokens"):
        train(settings(run_dir, max_trace_tokens=25))
    with pytest.raises(Crash):
        train(settings(run_dir, mode="exec_only", max_trace_tokens=25))


@pytest.mark.parametrize("argv, split, length", [(["evaluate"], "heldout", 440), (["int"], "train", 440), (["int"], "train", 400)])
def test_lengths_are_checked_in_evaluation_and_in_int_too(run_dir, lengthen, capsys, argv, split, length):
    """One line, not the traceback of a ValueError after an hour of sampling: not even where only an intervention's
    prompt, or a continued trace, is too long."""
    long = lengthen(split, length)
    with pytest.raises(SystemExit) as stop:
        command(tracelift, *argv, "--run_dir", run_dir, "--device", "cpu")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "context" in said
    assert long in said or argv == ["evaluate"] and "the executor" in said           # which runs without traces first


# ---------------------------------------------------------------- evaluation

def rows_of(markdown):
    """{first cell: list of all rows with that cell}, numbers as text."""
    found = {}
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            found.setdefault(cells[0], []).append(cells[1:])
    return found


def test_table_by_hand():
    """Means and sample deviations over seeds; rows without a planner stand in both tables."""
    def entry(success, **more):
        return {"problems": 9, "success": success, "faithful": 0.5, "right_for_wrong_reason": 0.25, "leak": 0.0, "unclosed": 0.0, **more}
    cost = {"executor_prompt_tokens": 1, "executor_tokens": 1000, "program_runs": 0, "planner_tokens": 1, "seconds": 60.0, "steps": 3}
    results = {"no trace": {"heldout T=0": {"problems": 9, "success": 0.125}},
               "base planner": {"heldout T=0": entry(0.25), "heldout T=1": entry(0.375)},
               "planner-my-seed-run-seed0": {"heldout T=0": entry(0.8), "heldout T=1": entry(0.5), "cost": cost},
               "planner-my-seed-run-seed1": {"heldout T=0": entry(0.6), "heldout T=1": entry(0.5), "cost": cost | {"seconds": 80.0}}}
    rows = rows_of(table(results))
    assert ["0.12" in row for row in rows["no trace"]] == [True, True]
    assert "0.25" in rows["base planner"][0] and "0.38" in rows["base planner"][1]
    greedy, hot = rows["my-seed-run"][:2]
    assert greedy[0] == "2" and greedy[1] == "0.70 ± 0.14" and hot[1] == "0.50 ± 0.00"
    assert any("70" in row for row in rows["my-seed-run"]), "seconds, mean over seeds"


def test_success_by_hand(prepared):
    """right_for_wrong_reason: the executor succeeded on a trace that is not faithful."""
    problems = data.read_problems(prepared[0] / "groups" / "heldout.jsonl")[:4]
    leaks = [p.reference_reasoning.replace("?", p.reference_solution) for p in problems]
    assert [data.check_trace(p, t) for p, t in zip(problems, leaks)] == [(False, True)] * 4

    class Fixed:
        def success(self, problems, traces, repeats, when):
            return [1, 0, 1, 1]
    good = [p.reference_reasoning for p in problems]
    found = tracelift.success_of(Fixed(), problems, [good[0], good[1], leaks[2], "nonsense"], "")
    assert found == {"problems": 4, "success": 0.75, "faithful": 0.5, "right_for_wrong_reason": 0.5, "leak": 0.25}
    assert tracelift.success_of(Fixed(), problems, None, "") == {"problems": 4, "success": 0.75}


def test_calculations_right_by_hand():
    """On GSM8K under its own name, which the table shows; a right calculation is no right reason."""
    problems = [dataclasses.replace(REAL, problem_id=f"r{i}") for i in range(4)]
    traces = ["1,200 + 34 = ?", "1,200 + 34 = 1234", "600 * 2 = 1200 eggs.", "600 * 2 = 1300"]

    class Fixed:
        def success(self, problems, traces, repeats, when):
            return [1, 0, 1, 1]
    found = tracelift.success_of(Fixed(), problems, traces, "")
    assert found == {"problems": 4, "success": 0.75, "calculations_right": 0.5, "leak": 0.25}
    row = rows_of(table({"base planner": {"heldout T=0": found}}))["traces from"][0]
    assert row == ["seeds", "success", "calculations right", "leak"]
    mixed = [problems[0], dataclasses.replace(REAL, source="mine")]
    assert tracelift.success_of(Fixed(), mixed, traces[:2], "").keys() == {"problems", "success"}, "not of half of them"
    batch = SimpleNamespace(problems=mixed, traces=traces[1:3], closed=[True] * 2, truncated=[False] * 2,
                            completions=Completions([[1]] * 2, [[0.0]] * 2))
    outcomes = tracelift.outcomes_of(batch, [Reward(None, None, None, None, None, 0.0)] * 2, [[]] * 2)
    found = tracelift.summarize(outcomes, 2)
    assert found["calculations_right"] == found["leak"] == 1.0 and "faithful" not in found


def evaluation(run_dir, **changes):
    return EvalSettings(**{"run_dir": str(run_dir), "device": "cpu", "problems": 3, **changes})


def mark(folder):
    """Writes into a folder's results; measured again, the mark would go."""
    path = folder / "results.json"
    found = json.loads(path.read_text())
    for row in found["rows"].values():
        row["heldout T=0"]["success"] = 0.123
    path.write_text(json.dumps(found))


def marked(found):
    return {name for name, row in found.items() if row["heldout T=0"]["success"] == 0.123}


def test_evaluate_measures_each_planner_once(run_dir, lottery):
    """Rows, seeds and reuse: what a folder's results.json holds is not measured again, what is new is."""
    s = evaluation(run_dir)
    folders = [train(settings(run_dir, steps=1, mode="exec_only", seed=seed)) for seed in (0, 1)]
    (run_dir / "planner-half-seed0.partial").mkdir()                # an interrupted one is no row
    found = tracelift.evaluate(s)
    assert list(found) == ["no trace", "reference trace", "base planner", "planner-exec_only-seed0", "planner-exec_only-seed1"]
    splits = {"heldout T=0", "longer T=0"}
    assert set(found["no trace"]) == splits and set(found["base planner"]) == splits | {"heldout T=1", "longer T=1"}
    assert found["reference trace"]["heldout T=0"]["faithful"] == 1.0
    assert found["planner-exec_only-seed1"]["cost"]["steps"] == 1
    kept = json.loads((folders[1] / "results.json").read_text())
    assert kept["rows"] == {"planner-exec_only-seed1": found["planner-exec_only-seed1"]} and kept["settings"]["problems"] == 3
    rows = rows_of((run_dir / "results.md").read_text())
    assert len(rows["no trace"]) == len(rows["base planner"]) == 4 and rows["exec_only"][0][0] == "2" and "±" in rows["exec_only"][0][1]
    for folder in [run_dir / "base", *folders]:
        mark(folder)
    train(settings(run_dir, steps=1, mode="uplift_only"))
    again = tracelift.evaluate(s)
    assert marked(again) == set(found) and list(again)[-1] == "planner-uplift_only-seed0"
    assert not marked(tracelift.evaluate(evaluation(run_dir, problems=2))), "of other problems: another measurement"


def test_a_planner_trained_again_or_further_is_measured_again(run_dir, lottery):
    """Deleting the folder is what the error message advises for another setting; more steps make another planner."""
    s = evaluation(run_dir)
    out = train(settings(run_dir, steps=2, mode="exec_only"))
    tracelift.evaluate(s)
    mark(out)
    mark(run_dir / "base")
    train(settings(run_dir, steps=3, mode="exec_only", warmup=2))
    found = tracelift.evaluate(s)
    assert out.name not in marked(found) and "base planner" in marked(found) and found[out.name]["cost"]["steps"] == 3
    mark(out)
    shutil.rmtree(out)
    train(settings(run_dir, steps=1, mode="exec_only"))
    found = tracelift.evaluate(s)
    assert found[out.name]["cost"]["steps"] == 1 and out.name not in marked(found)


def test_evaluation_is_reproducible(run_dir, lottery):
    """And a function of its seed."""
    out = train(settings(run_dir, steps=1, mode="exec_only"))         # whose lengths are small
    first = tracelift.evaluate(evaluation(run_dir))
    again = {}
    for seed in 0, 1:
        for folder in run_dir / "base", out:
            (folder / "results.json").unlink()
        again[seed] = tracelift.evaluate(evaluation(run_dir, seed=seed))
    assert again[0] == first != again[1]


def spied_generate(monkeypatch):
    """[(max_new_tokens, temperature)] of every call from now on."""
    asked, real = [], executor.generate

    def spy(model, prompts, *, max_new_tokens, temperature, **more):
        asked.append((max_new_tokens, temperature))
        return real(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, **more)
    monkeypatch.setattr(executor, "generate", spy)
    return asked


def test_a_planner_is_evaluated_as_it_was_trained(run_dir, monkeypatch, lottery):
    """Lengths and the executor's temperature come from the planner's own settings: no flag to forget."""
    train(settings(run_dir, steps=1, mode="exec_only", max_trace_tokens=7, max_answer_tokens=5, executor_temperature=0.0))
    train(settings(run_dir, steps=1, mode="uplift_only", max_trace_tokens=9, max_answer_tokens=4, executor_temperature=0.3))
    asked = spied_generate(monkeypatch)
    tracelift.evaluate(evaluation(run_dir))
    assert set(asked) == {(7, 0.0), (7, 1.0), (5, 0.0), (9, 0.0), (9, 1.0), (4, 0.3)}
    base = json.loads((run_dir / "base" / "results.json").read_text())["settings"]
    assert (base["max_trace_tokens"], base["max_answer_tokens"], base["executor_temperature"]) == (7, 5, 0.0), "comparable"
    asked.clear()
    tracelift.inspect(InspectSettings(run_dir=str(run_dir), device="cpu", planner="planner-uplift_only-seed0"))
    assert set(asked) == {(9, 1.0), (4, 0.3)}
    for name in "max_trace_tokens", "max_answer_tokens", "executor_temperature":
        assert not any(name in {f.name for f in dataclasses.fields(cls)} for cls in (EvalSettings, InspectSettings)), name


def test_a_planner_is_evaluated_with_its_own_tokenizer(run_dir, monkeypatch, lottery):
    """--init may name a model of another vocabulary; its ids would mean other words, and nothing would say so."""
    vocabulary = executor.load(str(run_dir / "base"), "cpu")[1].get_vocab()
    own = executor.tiny_tokenizer([" !", *(word for word in vocabulary if not re.match(r"<\w+>", word) or word == data.OPEN)])
    executor.tiny_model(len(own), 32, 1).save_pretrained(run_dir / "other")
    own.save_pretrained(run_dir / "other")
    train(settings(run_dir, steps=1, init=str(run_dir / "other")))
    real, prompts = executor.generate, []

    def spy(model, given, **options):
        if model.get_input_embeddings().num_embeddings == len(own):
            prompts.extend(own.batch_decode(given))
        return real(model, given, **options)
    monkeypatch.setattr(executor, "generate", spy)
    tracelift.evaluate(evaluation(run_dir))
    assert len(own) != len(vocabulary) and prompts and all("how many" in prompt for prompt in prompts)


@pytest.mark.parametrize("name, text, says", [
    ("results.json", "{", "delete it"), ("results.json", '{"rows": {}}', "delete it"), ("results.json", "[1]", "delete it"),
    ("results.json", "\udcff", "delete it"), ("metrics.jsonl", '{"step": 0}\n{"step": 1, "rew', "delete that line"),
    ("metrics.jsonl", "", "damaged"), ("metrics.jsonl", "7\n", "damaged"), ("metrics.jsonl", "\udcff\n", "damaged"),
    ("metrics.jsonl", '{"step": 0}\n', "damaged"), ("settings.json", "{", "damaged")])
def test_damaged_files_of_a_planner_are_one_line(run_dir, lottery, name, text, says):
    """Half a line, an empty file: the path and what to do, no traceback."""
    out = train(settings(run_dir, steps=1, mode="exec_only"))
    (out / name).write_text(text, errors="surrogateescape")          # \udcff: a byte that is no UTF-8
    with pytest.raises(UserError, match=re.escape(str(out / name)) + ".*" + says) as error:
        tracelift.evaluate(evaluation(run_dir))
    assert "\n" not in str(error.value)


def test_evaluating_no_problems_is_a_mistake_of_the_user(run_dir):
    with pytest.raises(UserError, match="--problems "):
        tracelift.evaluate(evaluation(run_dir, problems=0))


# ---------------------------------------------------------------- inspect

@pytest.fixture(scope="module")
def inspected(prepared):
    with pytest.MonkeyPatch.context() as m:
        draw_lots(m)
        text = tracelift.inspect(InspectSettings(run_dir=str(prepared[0]), device="cpu", traces=4, seed=1))
    return text, data.read_problems(prepared[0] / "groups" / "heldout.jsonl")[1]


NUMBER = r"([-+]?[\d.]+)"


def test_inspect_shows_every_part_of_the_reward(inspected):
    """The printed parts must give the printed total, and the advantages those of the totals."""
    text, problem = inspected
    assert problem.problem in text and problem.reference_reasoning in text
    assert all(text.count(name) == 4 for name in data.DIMENSIONS["math"])
    assert len(re.findall(r"^no trace .*(?:right|wrong)", text, re.M)) == 3 and text.count("  truth ") == 4
    found = []
    for block in text.split("\ntrace ")[1:5]:
        assert len(re.findall(r"^  e2e .*(?:right|wrong)", block, re.M)) == 1
        with_it = re.findall(r"^  with it .*(right|wrong)", block, re.M)
        uplift = re.search(rf"uplift +\((\d) with - (\d) without\) / 3 = {NUMBER}", block).groups()
        assert len(with_it) == 3 and with_it.count("right") == int(uplift[0])
        assert len(re.findall(r"^no trace .*right", text, re.M)) == int(uplift[1])
        assert (int(uplift[0]) - int(uplift[1])) / 3 == pytest.approx(float(uplift[2]), abs=0.006)
        total = re.search(rf"reward +{NUMBER} \* {NUMBER} \+ {NUMBER} \* {NUMBER} \* {NUMBER} = {NUMBER}", block).groups()
        w_e, e2e, w_r, score, lift, reward = map(float, total)
        assert w_e * e2e + w_r * score * lift == pytest.approx(reward, abs=0.006) and lift == float(uplift[2])
        assert e2e == len(re.findall(r"^  e2e .*right", block, re.M))
        assert float(re.search(rf"rm +{NUMBER}: ", block)[1]) == score
        found.append((reward, float(re.search(rf"advantage +{NUMBER}", block)[1])))
    rewards = [reward for reward, _ in found]
    assert len(set(rewards)) > 1, "rewards without spread show nothing; choose another seed"
    spread, middle = statistics.pstdev(rewards), statistics.mean(rewards)
    assert [A for _, A in found] == pytest.approx([(r - middle) / spread for r in rewards], abs=0.02)


def test_inspect_ends_with_one_trace_token_by_token(inspected):
    """Which tokens are in the loss, with which weight, advantage and log-prob."""
    text, problem = inspected
    head, *rows = text[text.index("trace 0, token by token"):].splitlines()[0:1] + text[text.index("trace 0, token by token"):].splitlines()[2:]
    count = int(re.search(r"\((\d+) tokens of 4 traces", head)[1])
    prompt, *tokens, padding = rows
    assert re.match(r"\d+ of the prompt +no", prompt) and re.match(r"\d+ of padding +no", padding)
    trace = re.search(r"^trace 0      (.*)", text, re.M)[1]
    advantage = float(re.search(rf"advantage +{NUMBER}", text)[1])
    spelled = ""
    for row in tokens:
        token, inside, weight, A, sampled, scored = re.fullmatch(
            rf"('.*'|\".*\") +(yes) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}", row).groups()
        spelled += token[1:-1]
        assert float(weight) == pytest.approx(1 / count, abs=1e-5) and float(A) == advantage
        assert float(sampled) == pytest.approx(float(scored), abs=0.002) and float(sampled) < 0
    assert 0 < len(tokens) <= count and trace.strip() in spelled.replace("<eos>", "")


# ---------------------------------------------------------------- InT

MATH = data.Problem("m", "tiny", "math", "text", "40", [], "17 + 5 = 22 ; 22 * 2 = 44 ; 44 - 4 = ?")
CODE = data.Problem("c", "tiny", "code", "text", "def f(x): pass", [], "add 3 ; subtract 2 ; cap at 9")
REAL = data.Problem("r", "gsm8k", "math", "text", "so 1,200 + 34 = 1234.\n#### 1,234", [], "First add them.\nThe sum is ?.")
PLAN = data.Problem("p", "mbpp", "code", "text", "def f(x): return x", [], "Take x.\nGive it back.")
WRONG = {"m": "17 + 5 = 22 ; 22 * 3 = 66 ; 66 - 4 = ?", "c": "add 3 ; subtract 7 ; cap at 9", "r": "Add 1.\nAdd 2.",
         "p": "Take y.\nGive it back."}


@pytest.mark.parametrize("problem, completion, verdict", [
    (MATH, "2 : 22 * 2 = 44", "proposed"), (CODE, "2 : subtract 2", "proposed"), (CODE, "3 : cap at 5", "proposed"),
    (MATH, "4 : 62 + 1 = ?", "proposed"),                             # one past the end: a step is missing there
    (MATH, "5 : 62 + 1 = ?", "index out of range"), (CODE, "0 : add 3", "index out of range"),
    (MATH, "2 : 22 * 3 = 66", "repeats the step"), (CODE, "2 : subtract 7", "repeats the step"),
    (CODE, "1 : add 3", "repeats the step"),
    (MATH, "1 : 18 + 5 = 23", "proposed"), (CODE, "1 : negate", "proposed"),          # the first step, kept by default
    (MATH, " none", "none: no error found"), (CODE, "I see no error", "not in the format"), (MATH, "", "not in the format"),
    (MATH, "4 : stop", "stop: no step"),
    (MATH, "3 : 44 - 4 = 40", "states the answer"), (MATH, "2 : so 40", "states the answer"),
    (CODE, "2 : x = x - 2", "states the answer"),
    (REAL, "2 : The sum is 1234.", "states the answer"), (REAL, "2 : It is 1,234 .", "states the answer"),
    (REAL, "2 : It is 1234.5 or 51234.", "proposed"), (REAL, "2 : It is 12,345.", "proposed"),
    (PLAN, "1 : ```return x```", "states the answer"), (PLAN, "1 : def f(x):", "states the answer"),
    (PLAN, "1 : Return x, as it is.", "proposed")])
def test_sort_out(problem, completion, verdict):
    assert tracelift.sort_out(problem, WRONG[problem.problem_id], completion)[0] == verdict
    assert verdict in (*tracelift.VERDICTS, "proposed")


def test_what_is_dropped_may_be_chosen():
    assert tracelift.sort_out(CODE, WRONG["c"], "1 : negate", first_step="drop")[0] == "empty prefix"
    assert tracelift.sort_out(MATH, WRONG["m"], "3 : 44 - 4 = 40", answers="keep") == ("proposed", 3, "44 - 4 = 40")
    assert IntSettings().first_step == "keep" and IntSettings().answers == "drop"


def test_choose():
    """At least as often as a resampled step, and at all; the most successful, then the most often sampled."""
    def p(text, verdict="proposed", times=1, success=0.0, resampled=0.0):
        return {"text": text, "verdict": verdict, "times": times, "success": success, "resampled": resampled}
    rows = [p("a", success=1 / 3, times=5), p("b", success=2 / 3), p("c", success=2 / 3, resampled=2 / 3, times=2),
            p("d", success=2 / 3, resampled=1.0), p("e", times=9), p("f", "states the answer", 9, 1.0), p("g", "none: no error found", 9)]
    assert tracelift.choose(rows)["text"] == "c"
    assert [r["verdict"] for r in rows] == ["passed"] * 3 + ["succeeds less than a resampled step", "never succeeds",
                                                             "states the answer", "none: no error found"]
    assert tracelift.choose([]) is None and tracelift.choose(rows[3:]) is None


@pytest.mark.parametrize("problem", [MATH, CODE], ids=["math", "code"])
def test_int_learns_prefix_and_step_and_no_end(tiny, problem):
    """Loss on the planner's own steps and the replacement only: not on the prompt, the wrong step, what follows, or an end."""
    _, _, tokenizer = tiny
    problem = dataclasses.replace(problem, problem=data.tiny_problems(problem.task_type, 1, 0, "base")[0].problem)
    learned = data.splice(problem, WRONG[problem.problem_id], 2, data.split_steps(problem, problem.reference_reasoning)[1])
    ids, labels = tracelift.int_sequence(tokenizer, problem, learned)
    prompt = tokenizer(data.planner_prompt(problem))["input_ids"]
    assert len(ids) == len(labels) and ids[:len(prompt)] == prompt and labels[:len(prompt) - 1] == [executor.IGNORE] * (len(prompt) - 1)
    target = labels[len(prompt) - 1:]
    assert tokenizer.decode(target) == data.OPEN + learned and ids[len(prompt):] == target[:-1]
    assert tokenizer.eos_token_id not in target


def test_error_first_last_and_missing():
    steps = data.split_steps(CODE, WRONG["c"])
    assert [tracelift.through_the_error(CODE, WRONG["c"], i) for i in (1, 2, 3)] == [steps[0], " ; ".join(steps[:2]), WRONG["c"]]
    assert tracelift.through_the_error(CODE, WRONG["c"], 4) == WRONG["c"] + data.CLOSE, "it ended too early: the end is the error"


class Pieces:
    """A tokenizer like SentencePiece's: the space of a first word is lost in decoding."""
    eos_token_id, pad_token_id, chat_template = 0, 0, None

    def __init__(self):
        self.words = ["<eos>"]

    def __call__(self, text, add_special_tokens=True, **_):
        found = re.findall(r" ?[^ ]+", text)
        self.words += [word for word in found if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in found]}

    def batch_decode(self, rows, **_):
        return ["".join(self.words[i] for i in row if i).removeprefix(" ") for row in rows]


def test_beginning_and_continuation_are_decoded_together(monkeypatch):
    """Decoded apart, the space between them is lost and the executor reads "22; 22"."""
    pieces, read = Pieces(), []
    continuation = pieces(" ; 22 * 2 = ?" + data.CLOSE)["input_ids"]

    class Reads:
        def success(self, problems, traces, repeats, when):
            read.append((problems, traces, repeats, when))
            return [1, 0, 1, 1, 0, 0][:len(traces)]
    collector = tracelift.Collector(None, pieces, Reads(), IntSettings(repeats=3))
    asked = []

    def write(self, prompts, num_samples, temperature, names):
        asked.append((prompts, num_samples, temperature, names))
        return [continuation] * (len(prompts) * num_samples), None
    monkeypatch.setattr(tracelift.Collector, "write", write)
    known = {}
    rates = collector.success_from([MATH, MATH, CODE], ["17 + 5 = 22", "17 + 5 = 22", "add 3"], "x", known)
    assert rates == pytest.approx([2 / 3, 2 / 3, 1 / 3]) and len(known) == 2, "every beginning once"
    (problems, traces, repeats, when), = read
    assert traces == ["17 + 5 = 22 ; 22 * 2 = ?"] * 3 + ["add 3 ; 22 * 2 = ?"] * 3 and repeats == 1
    assert [p.problem_id for p in problems] == ["m"] * 3 + ["c"] * 3 and len(asked[0][0]) == 2
    assert len(set(asked[0][3])) == 6, "every continuation draws apart"
    assert collector.success_from([MATH], ["17 + 5 = 22"], "y", known) == rates[:1] and not read[1:] or not read[-1][1]


@pytest.fixture
def scripted(monkeypatch):
    """A random planner names no error: here it proposes to replace the second step, states the answer, or writes
    nonsense, in turn."""
    real = tracelift.complete
    said = "nonsense", "2 : 22 * 2 = 44", "2 : so {}"

    def written(planner, tokenizer, prompts, num_samples, temperature, max_tokens, names, max_cache_tokens):
        if not names or not names[0].startswith("intervention"):
            return real(planner, tokenizer, prompts, num_samples, temperature, max_tokens, names, max_cache_tokens)
        texts = [said[i % 3].format(answers[prompt_of(tokenizer, prompts[i // num_samples])])
                 for i in range(len(prompts) * num_samples)]
        return Completions([[0]] * len(texts), [[0.0]] * len(texts)), texts
    answers = {}

    def prompt_of(tokenizer, ids):
        text = tokenizer.decode(ids)
        return next(problem for problem in answers if text.startswith(problem))
    monkeypatch.setattr(tracelift, "complete", written)
    monkeypatch.setattr(data, "extract_reasoning", lambda text: "17 + 5 = 22 ; " + text[-20:])
    return answers


def int_settings(run_dir, **changes):
    small = dict(run_dir=str(run_dir), device="cpu", problems=6, group_size=4, proposals=3, repeats=1, epochs=2.0,
                 max_trace_tokens=6, max_answer_tokens=6, batch_size=4, learning_rate=1e-2)
    return IntSettings(**{**small, **changes})


def test_int_stage(run_dir, monkeypatch, lottery, scripted):
    """A stopped stage goes on with the interventions it has; a finished one is left alone; GRPO starts from its weights."""
    scripted |= {p.problem: p.reference_solution for p in data.read_problems(run_dir / "groups" / "train.jsonl")}
    s = int_settings(run_dir)
    with monkeypatch.context() as m:
        m.setattr(executor, "finetune", crash)
        with pytest.raises(Crash):
            tracelift.intervene(s)
    assert not (run_dir / "int").exists()
    with monkeypatch.context() as m:
        m.setattr(tracelift, "collect", crash)
        out = tracelift.intervene(s)
        m.setattr(executor, "finetune", crash)
        assert tracelift.intervene(s) == out == run_dir / "int"
    for changed in {"repeats": 2}, {"answers": "keep"}, {"first_step": "drop"}:
        with pytest.raises(UserError, match=f"--{list(changed)[0]}"):
            tracelift.intervene(int_settings(run_dir, **changed))
    report, records = json.loads((out / "int.json").read_text()), lines(out, "interventions.jsonl")
    assert 0 < report["with_intervention"] == len([r for r in records if r["chosen"]]) < report["failed_traces"] == len(records)
    assert report["interventions"] == 3 * len(records)
    assert report["verdicts"]["not in the format"] == report["verdicts"]["states the answer"] == len(records)
    assert not any(r["chosen"] and "so" in r["chosen"]["step"] for r in records)
    assert report["sequences"]["train"] > 0 < report["sequences"]["heldout"]
    assert report["heldout_loss"]["InT"] < report["heldout_loss"]["base"]
    assert not same(weights_of(out), weights_of(run_dir / "base")) and not (run_dir / "int.partial").exists()
    planner = train(settings(run_dir, steps=1, mode="exec_only", init=str(out), learning_rate=1e-30, warmup=0))
    assert planner.name == "planner-exec_only-after-InT-seed0" and same(weights_of(planner), weights_of(out))
    found = tracelift.evaluate(evaluation(run_dir, problems=2))
    rows = rows_of(table(found))
    assert "InT" in rows and rows["exec_only after InT"][0][0] == "1"
    assert json.loads((out / "results.json").read_text())["settings"]["max_trace_tokens"] == 6, "its own settings"
    mark(out)
    assert marked(tracelift.evaluate(evaluation(run_dir, problems=2))) == {"InT"}


def test_int_is_reproducible(run_dir, tmp_path, lottery, scripted):
    """Draws are named, so the same interventions are found again; another seed finds others."""
    scripted |= {p.problem: p.reference_solution for p in data.read_problems(run_dir / "groups" / "train.jsonl")}
    found = []
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        own = Path(shutil.copytree(run_dir, tmp_path / name))
        out = tracelift.intervene(int_settings(own, seed=seed, problems=3))
        found.append((lines(out, "interventions.jsonl"), weights_of(out)))
        torch.manual_seed(99)
    assert found[0][0] == found[1][0] != found[2][0] and same(found[0][1], found[1][1])


def test_int_uses_no_problem_without_reference(run_dir, lottery, scripted):
    """Its failed traces are counted and teach nothing; without any intervention the planner stays the base planner."""
    path = run_dir / "groups" / "train.jsonl"
    data.write_groups(path, [g | {"positive_pool": []} for g in data.read_groups(path)])
    out = tracelift.intervene(int_settings(run_dir))
    report = json.loads((out / "int.json").read_text())
    assert report["left_out"]["no reference reasoning"] == report["failed_traces"] > 0 == report["interventions"]
    assert report["sequences"] == {"train": 0, "heldout": 0} and same(weights_of(out), weights_of(run_dir / "base"))
    trained = train(settings(run_dir, mode="exec_only"))                 # which reads no reference either
    assert all(line["faithful"] is None for line in lines(trained))


def test_count_by_hand():
    """Two failed traces with an intervention, and two that were left out."""
    def proposal(verdict, times):
        return {"text": "", "verdict": verdict, "times": times, "index": 2, "step": "negate"}
    sources = {"intervention": 1.0, "error": 0.0, "resampled step": 0.5}

    def record(proposals, chosen=None, left_out=None):
        return {"problem_id": "c", "trace": WRONG["c"], "left_out": left_out, "proposals": proposals, "chosen": chosen,
                **({"success_from": sources} if chosen else {})}
    good = proposal("passed", 3)
    found = tracelift.count_interventions([
        record([good, proposal("none: no error found", 5)], good), record([proposal("passed", 1)], good),
        record([], left_out="cannot be split"), record([], left_out="no reference reasoning")])
    assert found["failed_traces"] == 4 and found["with_intervention"] == 2 and found["interventions"] == 9
    assert found["left_out"] == {"cannot be split": 1, "no reference reasoning": 1} and found["success_from"] == sources
    assert found["verdicts"] == dict.fromkeys(tracelift.VERDICTS, 0) | {"none: no error found": 5, "passed": 4}


# ---------------------------------------------------------------- the commands

def test_all_commands_in_order(prepared, run_dir):
    """data -> executor -> rm -> train -> evaluate -> inspect at toy size; each names the next one, and a second pass
    of a stage does nothing."""
    for output, following in zip(prepared[1], ("executor.py", "rm.py", "tracelift.py train")):
        assert re.search(rf"^next: python {re.escape(following)} .*--run_dir {re.escape(str(prepared[0]))}", output, re.M), output
    common = ["--run_dir", run_dir, "--steps", 2, "--warmup", 1, "--problems_per_step", 2, "--group_size", 4, *SMALL,
              "--max_trace_tokens", 8]
    out = command(tracelift, "train", *common, "--mode", "tracelift")
    assert "next: python tracelift.py evaluate" in out
    planner = run_dir / "planner-tracelift-seed0"
    assert [line["step"] for line in lines(planner)] == [0, 1] and (planner / "tokenizer.json").exists()
    assert out.endswith(command(tracelift, "train", *common, "--mode", "tracelift"))
    out = command(tracelift, "evaluate", "--run_dir", run_dir, "--device", "cpu", "--problems", 3)
    assert (run_dir / "results.md").read_text().strip() in out and "next: python tracelift.py inspect" in out
    assert "tracelift" in rows_of(out) and planner.name in json.loads((planner / "results.json").read_text())["rows"]
    assert "advantage" in command(tracelift, "inspect", "--run_dir", run_dir, "--device", "cpu", "--planner", planner.name)
    seen = {p.name for p in run_dir.iterdir() if not p.name.startswith(".")}
    assert seen == {"groups", "base", "rm", planner.name, "results.md"}
    assert all((run_dir / stage / "settings.json").exists() for stage in ("groups", "base", "rm", planner.name))


def test_int_command(run_dir):
    """A near-random planner names nothing: said, and GRPO can start from the folder all the same."""
    out = command(tracelift, "int", "--run_dir", run_dir, *SMALL, "--max_trace_tokens", 8, "--problems", 3, "--group_size", 2)
    assert "no intervention was kept" in out and f"--init {run_dir / 'int'}" in out.splitlines()[-1]
    out = command(tracelift, "train", "--run_dir", run_dir, *SMALL, "--init", run_dir / "int", "--steps", 1, "--warmup", 1,
                  "--group_size", 2, "--problems_per_step", 2, "--max_trace_tokens", 8)
    assert "planner-tracelift-after-InT-seed0" in out


RECORD = """#!/bin/bash
# In place of python3: writes its arguments down, and the table that run.sh shows at its end. Asked with a program on
# stdin whether a reward model is needed, it answers.
if [ "$1" = - ]; then
  case "$*" in *tracelift*|*rm_only*) echo 1 ;; *) echo 0 ;; esac
  exit
fi
line=$(printf '%s\\t' "$@")
echo "$line" >> "$RECORD"                        # in one write: two domains run side by side
while [ $# -gt 1 ]; do
  if [ "$1" = --run_dir ]; then mkdir -p "$2"; echo table > "$2/results.md"; fi
  shift
done
"""


@pytest.mark.parametrize("environment, argument", [
    ({}, None), ({"INT": "1", "SEEDS": "0 1"}, None), ({}, "smoke"), ({"MODES": "rm_only uplift_only"}, None),
    ({"PRESET": "gsm8k", "INT": "1", "COLD_START": "1200"}, None), ({"PRESET": "smollm2", "INT": "1"}, None),
    ({"PRESET": "gsm8k", "MODES": "exec_only rm_only uplift_only tracelift"}, None),
    ({"PRESET": "code", "MODES": "exec_only", "DATA": "a b.jsonl", "HELDOUT_DATA": "h.jsonl"}, None),
    ({"PRESET": "code", "MODES": "rm_only", "DATA": "a b.jsonl", "HELDOUT_DATA": "h.jsonl"}, None),
    ({"PRESET": "paper-math", "DATA": "t", "HELDOUT_DATA": "h", "MODES": "tracelift"}, None),
    ({"MODES": "uplift_only exec_only"}, None),
    ({"PRESET": "paper-code", "DATA": "t", "HELDOUT_DATA": "h", "TESTS": "x"}, None)],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else x)
def test_every_command_of_a_recipe_is_one_that_its_file_accepts(tmp_path, environment, argument):
    """A flag that is gone, or one that a mode refuses, would end a run of hours at that stage."""
    (tmp_path / "python3").write_text(RECORD)
    (tmp_path / "python3").chmod(0o755)
    env = {**os.environ, **environment, "SKIP_INSTALL": "1", "RUN": str(tmp_path / "run"), "RECORD": str(tmp_path / "record"),
           "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "run.sh", *[argument] * bool(argument)], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {"data.py": data.DataSettings, "executor.py": executor.BaseSettings, "rm.py": rm_module.RMSettings,
              "train": TrainSettings, "int": IntSettings, "select": tracelift.SelectSettings, "evaluate": EvalSettings}
    seen = []
    for line in (tmp_path / "record").read_text().splitlines():
        file, *argv = line.rstrip("\t").split("\t")
        stage = argv.pop(0) if file == "tracelift.py" else file
        parsed = data.parse_settings(stages[stage], argv, stage)
        assert parsed.run_dir.startswith(str(tmp_path / "run"))
        if stage == "train":
            tracelift.check_train(parsed)
        seen.append(stage)
    modes = environment.get("MODES", "exec_only tracelift").split()
    assert seen.count("train") >= len(modes) or environment.get("PRESET") == "paper-code"
    assert ("rm.py" in seen) == any(mode in ("tracelift", "rm_only", "tracelift-code") for mode in modes)
    assert ("int" in seen) == ("INT" in environment) and seen[-1] == "evaluate"
    assert ("select" in seen) == (environment.get("PRESET") == "smollm2")
    assert "--cold_start\t1200" in (tmp_path / "record").read_text() or "COLD_START" not in environment


def test_run_sh_asks_first_whether_it_can_run(tmp_path):
    """With the real interpreter: a mode that is not there is named before the first stage."""
    env = {**os.environ, "SKIP_INSTALL": "1", "RUN": str(tmp_path / "run"), "MODES": "exec_only best",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "run.sh"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--mode 'best'" in done.stderr and "exec_only" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, names", [
    ([], "evaluate"), (["explain"], "explain"), (["train", "--preset", "tiny"], "--preset"), (["train", "--mode", "best"], "--mode"),
    (["train", "--modes", "tracelift"], "--modes"), (["train", "--steps", "many"], "--steps"), (["train"], "groups"),
    (["train", "--run", "x"], "--run"), (["evaluate", "--max_trace_tokens", "9"], "--max_trace_tokens"),
    (["evaluate"], "base"), (["inspect"], "groups"), (["int"], "groups"), (["plot"], "plot")])
def test_mistakes_on_the_command_line(tmp_path, capsys, argv, names):
    """One line that names the mistake, exit code 2, no traceback; and nothing is left behind."""
    with pytest.raises(SystemExit) as stop:
        data.run_command(tracelift.main, argv + ["--run_dir", str(tmp_path / "none")] * bool(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "error: " in said[-1] and names in said[-1]
    assert not list((tmp_path / "none").glob("*"))


def test_a_mistake_in_a_real_process(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tracelift.py", "train", "--run_dir", tmp_path / "none", "--group_size", "1"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: --group_size") and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


def test_inspecting_a_planner_that_is_not_there(run_dir, capsys):
    with pytest.raises(SystemExit) as stop:
        command(tracelift, "inspect", "--run_dir", run_dir, "--device", "cpu", "--planner", "planner-x-seed0")
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"{run_dir}/planner-x-seed0" in said[-1]


def test_a_run_folder_of_another_layout_is_refused(run_dir):
    """One config.json for all stages: half of its settings would be missed."""
    (run_dir / "config.json").write_text('{"stages": {"groups": {}}}')
    for act in (lambda: train(settings(run_dir)), lambda: tracelift.intervene(int_settings(run_dir))):
        with pytest.raises(UserError, match="config.json.*--run_dir"):
            act()


def test_an_unknown_device_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="nonsense"):
        executor.pick_device("nonsense")
