"""tracelift.py: every part of the reward by hand, the loss against a textbook, resuming bit for bit, and the commands."""
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import executor  # noqa: E402
import rm as rm_module  # noqa: E402
import tracelift  # noqa: E402
from data import UserError  # noqa: E402
from executor import Completions, Executor, Run  # noqa: E402
from data import check_settings  # noqa: E402
from tracelift import EvalSettings, TrainSettings, combine, completion_logp, measure  # noqa: E402
from tracelift import policy_gradient, problems_at, rollout, table, train  # noqa: E402
from verify import SandboxError  # noqa: E402

torch.set_num_threads(1)
SMALL = ["--device", "cpu", "--max_answer_tokens", "6"]


def command(module, *argv):
    """What a command prints to stdout; run in this process, because importing torch takes longer than the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        data.run_command(module.main, [str(a) for a in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder up to the reward model, made by the commands themselves. The models are close to random."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    common = ["--preset", "smoke", "--run", run]
    said = [command(data, *common, "--train", 12, "--heldout", 5),
            command(executor, *common, *SMALL, "--sequences", 200, "--hidden", 32, "--layers", 2, "--eval_problems", 4),
            command(rm_module, *common, "--device", "cpu", "--max_groups", 12)]
    return run, said


@pytest.fixture
def run(prepared, tmp_path):
    return Path(shutil.copytree(prepared[0], tmp_path / "toy"))


@pytest.fixture
def lottery(monkeypatch):
    """Near-random models never succeed, and with rewards that are all 0 nothing would be trained or tested: here the
    a third of all outputs passes, as a function of the output."""
    real = Executor.run

    def drawn(self, problems, traces, repeats):
        ok = lambda run: zlib.crc32(run.output.encode()) % 3 == 0
        return [[Run(r.output, ok(r), float(ok(r))) for r in runs] for runs in real(self, problems, traces, repeats)]
    monkeypatch.setattr(Executor, "run", drawn)


@pytest.fixture(scope="module")
def models(prepared):
    """A random planner with preferences (at the usual initialisation its logits are nearly flat), a tokenizer, problems."""
    planner, tokenizer = executor.load(str(prepared[0] / "base"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for p in planner.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    groups = data.read_groups(prepared[0] / "groups" / "train.jsonl")
    return planner, tokenizer, [data.problem_of(g) for g in groups]


def settings(run="", **changes):
    small = dict(preset="smoke", device="cpu", steps=5, problems_per_step=2, group_size=4, repeats=2, learning_rate=5e-3, warmup=2,
                 micro_batch=3, max_trace_tokens=10, max_answer_tokens=6, save_every=2)
    return TrainSettings(**{**small, "run": str(run), **changes})


def weights_of(folder):
    return executor.load(str(folder), "cpu", torch.float32)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---------------------------------------------------------------- the reward

@pytest.mark.parametrize("mode, parts, total", [
    ("tracelift", dict(e2e=1.0, rm=0.8, with_trace=3, without_trace=1, repeats=3), 0.5 + 0.5 * 0.8 * 2 / 3),
    ("tracelift", dict(e2e=0.0, rm=0.8, with_trace=0, without_trace=2, repeats=4), -0.5 * 0.8 * 0.5),   # harm counts
    ("tracelift", dict(e2e=1.0, rm=0.9, with_trace=2, without_trace=2, repeats=3), 0.5),                # no uplift, no bonus
    ("tracelift", dict(e2e=1.0, rm=0.0, with_trace=3, without_trace=0, repeats=3), 0.5),                # no quality, no bonus
    ("tracelift", dict(e2e=1.0, rm=0.5, with_trace=2, without_trace=0, repeats=2, w_e=0.2, w_r=3.0), 1.7),
    ("exec_only", dict(e2e=-0.6, w_e=0.1), -0.6),
    ("rm_only", dict(rm=0.3, w_r=0.1), 0.3),
    ("uplift_only", dict(e2e=1.0, rm=0.0, with_trace=1, without_trace=3, repeats=4, w_e=0.4, w_r=0.6), 0.4 - 0.3),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=0, repeats=3), 0.5 + 0.12),    # more: +1
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=2, without_trace=3, repeats=3), 0.5 - 0.12),    # fewer: -1
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=0, without_trace=0, repeats=3), 0.5),           # ties
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=1, repeats=3), 0.5 + 0.06),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=2, without_trace=2, repeats=3), 0.5 + 0.12 * 2 / 3),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=3, without_trace=3, repeats=3), 0.5 + 0.12),
    ("tracelift-code", dict(e2e=0.5, rm=0.6, with_trace=1, without_trace=1, repeats=4), 0.5 + 0.12 / 4),
    ("tracelift-code", dict(e2e=1.0, rm=0.9, with_trace=3, without_trace=0, repeats=3), 1.0),           # clamped away
    ("tracelift-code", dict(e2e=1.0, rm=0.5, with_trace=0, without_trace=1, repeats=3), 0.9),           # a malus is not
    ("tracelift-code", dict(e2e=-1.0, rm=0.9, with_trace=3, without_trace=0, repeats=3), 0.0)])
def test_combine(mode, parts, total):
    assert combine(mode, **parts) == pytest.approx(total, abs=1e-12)


class Counted(Executor):
    """The real executor with its model taken out: trace texts say how many of their runs succeed."""

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), None, max_new_tokens=1)
        self.calls = []

    def run(self, problems, traces, repeats):
        self.calls.append(([p.problem_id for p in problems], traces, repeats))
        if traces is None:
            return [[Run("", i < 1, float(i < 1)) for i in range(repeats)] for _ in problems]       # 1 of K
        # "e w": the first run scores e, w of the others succeed
        return [[Run("", bool(int(t[0])), int(t[0]) / 2)] + [Run("", i < int(t[2]), 9.0) for i in range(repeats - 1)] for t in traces]


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


def test_measure_draws_e2e_apart_and_the_baseline_once_per_problem(pair):
    """The run that is rewarded for itself must not be one of the K that measure uplift; a baseline sampled again for
    each trace costs G times as much and gives traces of one problem different bars."""
    frozen, scores = Counted(), Scores()
    rewards, runs = measure(settings(mode="tracelift", repeats=3), frozen, scores, *pair)
    assert [r.e2e for r in rewards] == [0.5, 0.0, 0.5, 0.0, 0.5, 0.0]
    assert [r.with_trace for r in rewards] == [3, 0, 1, 2, 0, 3] and [r.without_trace for r in rewards] == [1] * 6
    assert [r.rm for r in rewards] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [r.uplift for r in rewards] == pytest.approx([2 / 3, -1 / 3, 0, 1 / 3, -1 / 3, 2 / 3])
    assert [r.total for r in rewards] == pytest.approx([0.5 * r.e2e + 0.5 * r.rm * r.uplift for r in rewards])
    assert [len(r) for r in runs] == [4] * 6
    p, q = pair[0][0].problem_id, pair[0][3].problem_id
    assert frozen.calls == [([p] * 3 + [q] * 3, pair[1], 4), ([p, q], None, 3)]
    assert all(problem.problem in text and trace in text for problem, trace, text in zip(*pair, scores.texts))
    measure(settings(mode="tracelift", repeats=3), frozen, scores, *pair)
    assert [traces for _, traces, _ in frozen.calls].count(None) == 1, "the executor is frozen: once for all steps"
    measure(settings(mode="tracelift", repeats=2), frozen, scores, *pair)
    assert frozen.calls[-1] == ([p, q], None, 2), "a baseline of other K is another measurement"


@pytest.mark.parametrize("mode, measured, repeats", [
    ("tracelift", {"e2e", "rm", "with_trace", "without_trace", "uplift"}, 4),
    ("tracelift-code", {"e2e", "rm", "with_trace", "without_trace", "uplift"}, 4),
    ("uplift_only", {"e2e", "with_trace", "without_trace", "uplift"}, 4),
    ("exec_only", {"e2e"}, 1), ("rm_only", {"rm"}, 0)])
def test_each_mode_measures_its_parts_only(pair, mode, measured, repeats):
    """Cost, and fairness: an exec_only planner that saw the reward model would be no baseline."""
    frozen = Counted() if "e2e" in measured else Untouchable()
    rewards, _ = measure(settings(mode=mode, repeats=3), frozen, Scores() if "rm" in measured else None, *pair)
    for reward in rewards:
        assert {k for k, v in dataclasses.asdict(reward).items() if v is not None} == measured | {"total"}
    if repeats:
        assert [n for _, traces, n in frozen.calls if traces] == [repeats]
        assert any(traces is None for _, traces, _ in frozen.calls) == ("without_trace" in measured)


@pytest.mark.parametrize("where, error", [("run", SandboxError), ("baseline", SandboxError), ("score", FloatingPointError)])
def test_a_failed_measurement_is_never_a_reward(pair, where, error):
    """The paper's code scores a failed call 0 (and a failed no-trace call then raises the uplift)."""
    frozen, scores = Counted(), Scores()

    def fail(*args, **kwargs):
        raise error("broken")
    setattr(scores if where == "score" else frozen, where, fail)
    with pytest.raises(error):
        measure(settings(mode="tracelift"), frozen, scores, *pair)


# ---------------------------------------------------------------- rollout

@pytest.fixture
def crafted(models, monkeypatch):
    """A rollout of chosen completions: closed, cut, nothing but EOS, closed but cut before EOS, empty, ..."""
    planner, tokenizer, problems = models
    eos, good = tokenizer.eos_token_id, problems[0].reference_reasoning
    ids = lambda text: tokenizer(text)["input_ids"] if text else []
    tokens = [ids(f"{data.OPEN}{good}{data.CLOSE}") + [eos], ids(data.OPEN + good), [eos], ids(good + data.CLOSE),
              ids(data.OPEN + data.CLOSE) + [eos], ids(data.OPEN) + [eos], ids(good), ids(good)[:1] + [eos]]
    made = Completions(tokens, [[0.0] * len(t) for t in tokens], [t[-1] == eos for t in tokens])
    monkeypatch.setattr(executor, "generate", lambda *args, **kwargs: made)
    two = sorted(problems, key=lambda p: len(p.problem))[::len(problems) - 1]                      # short and long
    return lambda tok=tokenizer: (rollout(planner, tok, two, settings(), None), tokens, two)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_mask_covers_the_sampled_tokens_and_nothing_else(models, crafted, pad_is_eos):
    """Off by one in T; EOS left out (stopping is never trained); pads taken for EOS, or EOS for a pad."""
    tokenizer = copy.deepcopy(models[1])
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
        assert executor.pad_id(tokenizer) == tokenizer.eos_token_id
    batch, tokens, two = crafted(tokenizer)
    assert [p.problem_id for p in batch.problems] == [p.problem_id for p in two for _ in range(4)]
    assert len({len(data.encode_prompt(tokenizer, data.planner_prompt(p))) for p in two}) == 2
    for b, (problem, sampled) in enumerate(zip(batch.problems, tokens)):
        prompt = data.encode_prompt(tokenizer, data.planner_prompt(problem))
        assert batch.ids[b, :len(prompt) + len(sampled)].tolist() == prompt + sampled
        assert batch.scored[b].nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(sampled)))
        assert batch.target[b][batch.scored[b]].tolist() == sampled
    assert batch.target[batch.scored].tolist() == sum(tokens, []), "rows of the loss are in sampling order"


def test_unclosed_completions_are_used_and_counted(models, crafted):
    """Neither an error nor repaired; an empty trace is an empty trace."""
    batch, _, _ = crafted()
    good = models[2][0].reference_reasoning
    assert batch.traces[:7] == [good, good, "", good, "", "", good] and good.startswith(batch.traces[7])
    assert batch.unclosed == 5


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_scored_logprobs_are_the_sampled_ones(models, temperature):
    """The sampler is the scorer: one temperature, positions aligned, whatever the micro-batch."""
    planner, tokenizer, problems = models
    s = settings(temperature=temperature, max_trace_tokens=20)
    batch = rollout(planner, tokenizer, problems[:4], s, torch.Generator().manual_seed(0))
    sampled = torch.tensor(sum(batch.completions.logprobs, []))
    torch.testing.assert_close(completion_logp(planner, batch, s), sampled, atol=1e-4, rtol=0)
    wrong = completion_logp(planner, batch, dataclasses.replace(s, temperature=1.0))
    assert (wrong - sampled).abs().mean() > 0.05, "or the temperature would go unnoticed"


# ---------------------------------------------------------------- the gradient

@pytest.fixture(scope="module")
def sampled(models):
    """A real rollout of 3 problems x 4 traces of different lengths, with rewards."""
    planner, tokenizer, problems = models
    batch = rollout(planner, tokenizer, problems[:3], settings(max_trace_tokens=24), torch.Generator().manual_seed(1))
    for b, tokens in enumerate(batch.completions.tokens):          # some short ones, whatever was sampled
        keep = max(1, len(tokens) - (b * 5) % 16)
        if keep < len(tokens):
            begin = int(batch.scored[b].nonzero()[0])
            batch.scored[b, begin + keep:] = False
            batch.completions.tokens[b] = tokens[:keep]
    assert len({len(t) for t in batch.completions.tokens}) > 2
    return batch, torch.tensor([1.0, 0.0, 0.3, 0.5, 0.2, 0.2, 0.9, -0.4, 0.0, 0.0, 0.0, 1.0])


def gradient(model, call):
    """The result of call(model) on a fresh copy, and the gradient it left, as one vector."""
    model = copy.deepcopy(model)
    result = call(model)
    return result, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def textbook(model, batch, reward, s, old=None, ref=None):
    """The loss of the header, token by token, with autograd; shares nothing with kernels/ or token_logits."""
    logp = torch.log_softmax(model(batch.ids).logits.float() / s.temperature, dim=-1)
    B, G, M = len(reward), s.group_size, sum(map(len, batch.completions.tokens))
    loss, at = 0.0, 0
    for b, tokens in enumerate(batch.completions.tokens):
        group = reward[b - b % G:b - b % G + G].tolist()
        A = reward[b].item() - sum(group) / G
        if s.scale == "std":
            A = A / (statistics.pstdev(group) + 1e-6)
        weight = {"dapo": 1 / M, "grpo": 1 / (B * len(tokens)), "dr_grpo": 1 / (B * s.max_trace_tokens)}[s.weights]
        begin = int(batch.scored[b].nonzero()[0])
        for t, token in enumerate(tokens):
            lp = logp[b, begin + t, token]
            ratio = (lp - (lp.detach() if old is None else old[at])).exp()
            part = -torch.minimum(ratio * A, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A)
            if s.beta:
                part = part + s.beta * ((ref[at] - lp).exp() - (ref[at] - lp) - 1)
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
    s = settings(max_trace_tokens=24, micro_batch=100, **CASES[case])
    noise = torch.Generator().manual_seed(2)
    logp = completion_logp(models[0], batch, s)
    old = logp + 0.3 * torch.randn(logp.shape, generator=noise) if case in ("old", "all") else None
    ref = logp + 0.5 * torch.randn(logp.shape, generator=noise) if s.beta else None
    want, slow = gradient(models[0], lambda m: textbook(m, batch, reward, s, old, ref))
    health, fast = gradient(models[0], lambda m: policy_gradient(m, batch, reward, s, old, ref))
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() < 1e-5 * slow.norm()
    assert health["loss"] == pytest.approx(want, abs=1e-5)
    for micro_batch in (1, 5):
        again, part = gradient(models[0], lambda m: policy_gradient(m, batch, reward, dataclasses.replace(s, micro_batch=micro_batch), old, ref))
        assert (part - fast).norm() < 1e-6 * fast.norm()
        assert again == pytest.approx(health, abs=1e-5), "metrics are of all micro-batches, not of the last"


FUSED = """
import pickle, sys
import kernels, tracelift
from kernels import grpo
planner, batch, reward, settings, old, ref = pickle.load(sys.stdin.buffer)
kernels.grpo_loss, calls = grpo.grpo_loss, []
for path in "triton", "linear":
    if path == "linear":                     # as on a GPU: the head's weights go to linear_grpo_loss
        kernels.backend = lambda device: "triton"
        kernels.linear_grpo_loss = lambda *a, f=kernels.linear_grpo_loss, **k: calls.append(1) or f(*a, **k)
    health = tracelift.policy_gradient(planner, batch, reward, settings, old, ref)
    sys.stdout.buffer.write(pickle.dumps((health, {n: p.grad for n, p in planner.named_parameters()})))
    planner.zero_grad(set_to_none=True)
assert len(calls) == 4                       # micro-batches
"""


def test_the_fused_paths_agree_with_the_reference(models, sampled):
    """One real training step by the Triton kernel and by its linear variant, in the interpreter (a process of its own,
    for the choice is made once): the same loss, metrics and gradients as on the reference path."""
    pytest.importorskip("triton")
    batch, reward = sampled
    s = settings(max_trace_tokens=24, micro_batch=3, temperature=0.9, beta=0.2, clip_low=0.1)
    old = completion_logp(models[0], batch, s) + 0.1
    planner = copy.deepcopy(models[0])
    work = pickle.dumps((planner, batch, reward, s, old, old - 0.3))
    done = subprocess.run([sys.executable, "-c", FUSED], input=work, capture_output=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr.decode()
    want = policy_gradient(planner, batch, reward, s, old, old - 0.3)
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
    health = policy_gradient(planner, batch, torch.full((12,), value), settings())
    assert all(p.grad is None for p in planner.parameters()), "not even a zero, which would move Adam's momentum"
    assert health["loss"] == 0 and health["entropy"] > 0
    s, logp = settings(beta=0.1), completion_logp(models[0], batch, settings())
    policy_gradient(planner, batch, torch.full((12,), value), s, None, logp - 0.5)
    assert sum(p.grad.norm() for p in planner.parameters()) > 1e-3, "the KL term has one whatever the rewards"


def test_groups_without_spread_cost_no_backward_pass(models, sampled, monkeypatch):
    """One group of three has spread: one backward pass of three, and the numbers of a step that makes all of them."""
    batch, passes, backward = sampled[0], [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: passes.append(1) or backward(loss))
    reward = torch.tensor([0.5] * 4 + [0.0, 1.0, 0.0, 0.0] + [1.0] * 4)
    (want, whole), all_at_once = gradient(models[0], lambda m: policy_gradient(m, batch, reward, settings(micro_batch=12))), len(passes)
    health, skipped = gradient(models[0], lambda m: policy_gradient(m, batch, reward, settings(micro_batch=4)))
    assert (all_at_once, len(passes)) == (1, 2)
    assert whole.norm() > 1e-3 and (skipped - whole).norm() < 1e-6 * whole.norm()
    assert health == pytest.approx(want, abs=1e-6)


def test_an_update_moves_probability_towards_the_better_traces(models, sampled):
    """The sign of everything."""
    batch, reward = sampled
    planner, s = copy.deepcopy(models[0]), settings(max_trace_tokens=24)
    before = completion_logp(planner, batch, s)
    policy_gradient(planner, batch, reward, s)
    with torch.no_grad():
        for p in planner.parameters():
            p -= 1e-3 * p.grad
    change = (completion_logp(planner, batch, s) - before).split([len(t) for t in batch.completions.tokens])
    groups = [reward[n:n + 4].tolist() for n in range(0, 12, 4)]
    advantage = [(r - statistics.mean(g)) / statistics.pstdev(g) for g in groups for r in g]
    assert sum(a * c.sum().item() for a, c in zip(advantage, change)) > 1e-3


def test_clipped_tokens_are_counted_and_pushed_no_further(models, sampled):
    """At ratio 1.5 good traces are clipped and bad ones are not; at 1 / 1.5 the other way round."""
    batch, reward = sampled
    s = settings(max_trace_tokens=24, clip_low=0.2, clip_high=0.2)
    lengths = [len(t) for t in batch.completions.tokens]
    better = [reward[b] > reward[b - b % 4:b - b % 4 + 4].mean() for b in range(12)]
    logp = completion_logp(models[0], batch, s)
    for shift, clipped in ((-math.log(1.5), better), (math.log(1.5), [not x for x in better])):
        health, grad = gradient(models[0], lambda m: policy_gradient(m, batch, reward, s, logp + shift))
        share = sum(n for n, c in zip(lengths, clipped) if c) / sum(lengths)
        assert 0 < share < 1 and health["clip_share"] == pytest.approx(share, abs=1e-6)
        _, free = gradient(models[0], lambda m: policy_gradient(m, batch, reward, dataclasses.replace(s, clip_low=9.0, clip_high=9.0), logp + shift))
        assert (grad - free).norm() > 0.05 * free.norm()
    assert policy_gradient(copy.deepcopy(models[0]), batch, reward, s, logp)["clip_share"] == 0


def test_kl_to_itself_is_zero(models, sampled):
    """beta must not pull on a planner that is still the reference."""
    batch, reward = sampled
    s = settings(max_trace_tokens=24, beta=0.7)
    ref = completion_logp(models[0], batch, s)
    health, grad = gradient(models[0], lambda m: policy_gradient(m, batch, reward, s, None, ref))
    _, free = gradient(models[0], lambda m: policy_gradient(m, batch, reward, dataclasses.replace(s, beta=0.0)))
    assert abs(health["kl"]) < 1e-6 and (grad - free).norm() < 1e-4 * free.norm()
    moved = policy_gradient(copy.deepcopy(models[0]), batch, reward, s, None, ref - 0.5)
    assert moved["kl"] == pytest.approx(math.exp(-0.5) + 0.5 - 1, abs=1e-4)


# ---------------------------------------------------------------- training

def test_problems_depend_on_seed_and_step_only():
    """Runs of other modes, and a resumed run, must see the same problems."""
    problems = list(range(7))
    s = settings(problems_per_step=3, seed=4)
    steps = [problems_at(problems, step, s) for step in range(7)]                 # 3 epochs
    assert problems_at(problems, 5, dataclasses.replace(s, mode="rm_only", name="x", group_size=2, steps=99)) == steps[5]
    flat = sum(steps, [])
    assert all(sorted(flat[i:i + 7]) == problems for i in (0, 7, 14)), "each epoch holds every problem once"
    assert flat[:7] != flat[7:14] and flat != sum((problems_at(problems, i, dataclasses.replace(s, seed=5)) for i in range(7)), [])
    assert sorted(problems_at(problems, 0, settings(problems_per_step=21))) == sorted(problems * 3), "fewer problems than N"


class Crash(Exception):
    pass


def crash_at(monkeypatch, call):
    """measure raises at its call-th call. Returns the function that takes this back."""
    real, calls = tracelift.measure, []

    def fragile(*args):
        calls.append(1)
        if len(calls) == call:
            raise Crash
        return real(*args)
    monkeypatch.setattr(tracelift, "measure", fragile)
    return lambda: monkeypatch.setattr(tracelift, "measure", real)


def without_seconds(records):
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]


@pytest.mark.parametrize("changes, call", [({}, 4), ({"inner_epochs": 2, "beta": 0.1, "save_every": 1}, 5),
                                           ({"save_every": 20}, 3),
                                           ({"lora_rank": 4, "inner_epochs": 2, "beta": 0.1}, 4)],
                         ids=["after a checkpoint", "with inner epochs and KL", "before the first checkpoint", "with LoRA"])
def test_an_interrupted_run_ends_like_a_straight_one(prepared, tmp_path, monkeypatch, lottery, changes, call):
    """A checkpoint without optimizer, generator, baselines or costs, or logs with lines twice, would show here."""
    straight, broken = (Path(shutil.copytree(prepared[0], tmp_path / name)) for name in ("straight", "broken"))
    want = train(settings(straight, **changes))
    mend = crash_at(monkeypatch, call)
    with pytest.raises(Crash):
        train(settings(broken, **changes))
    assert not (broken / want.name).exists(), "a folder of this name means a finished planner"
    mend()
    got = train(settings(broken, **changes))
    assert got == broken / want.name
    assert not same(weights_of(want), weights_of(straight / "base")), "nothing was trained: this test would see nothing"
    assert same(weights_of(got), weights_of(want))
    assert [line["step"] for line in lines(got)] == list(range(5))
    assert without_seconds(lines(got)) == without_seconds(lines(want))
    assert lines(got, "samples.jsonl") == lines(want, "samples.jsonl") != []
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir()), "no checkpoint is left"
    assert len({line["without_trace"] for line in lines(want)}) > 1 and any(line["grad_norm"] for line in lines(want))


def test_a_finished_planner_is_not_trained_again(run, monkeypatch, lottery):
    """run.sh repeats every command; another setting under the same name must not pass for this planner."""
    out = train(settings(run, steps=1))
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(tracelift, "measure", crash)
    assert train(settings(run, steps=1)) == out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for key, value in (("learning_rate", 1e-9), ("steps", 2), ("repeats", 3)):
        with pytest.raises(UserError, match=f"--{key} "):
            train(settings(run, **{"steps": 1, key: value}))


def crash(*args, **kwargs):
    raise Crash


def test_training_changes_the_planner_and_never_the_executor(run, monkeypatch, lottery):
    """Both start from one folder. Were they one object, the uplift's bar would move with the planner."""
    made = []

    class Spy(Executor):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            made.append((model, copy.deepcopy(model.state_dict())))
    monkeypatch.setattr(tracelift, "Executor", Spy)
    out = train(settings(run, steps=3))
    (model, before), = made
    assert same(before, model.state_dict()) and same(before, weights_of(run / "base"))
    assert not any(p.requires_grad for p in model.parameters())
    assert not same(weights_of(out), before)


def test_with_lora_one_backbone_is_planner_executor_and_reference(run, monkeypatch, lottery):
    """One copy of the weights in memory, which stay as they are; the executor's outputs do not change by a bit while
    the planner's do, and neither do the reference's; the checkpoint holds the adapter and nothing else."""
    made, seen, checkpoints = [], [], []

    class Spy(Executor):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            made.append((model, {name: x.clone() for name, x in model.state_dict().items()}))
    ids, real_measure, real_save, real_pg = torch.arange(20)[None], tracelift.measure, tracelift.save_checkpoint, policy_gradient

    def measured(settings, frozen, *args):
        with torch.no_grad():
            seen.append(("executor", frozen.model(ids).logits.clone()))
        return real_measure(settings, frozen, *args)

    def updated(planner, batch, reward, settings, old, ref):
        assert planner is made[0][0], "the planner is another copy"
        with torch.no_grad():
            seen.append(("planner", planner(ids).logits.clone()))
        return real_pg(planner, batch, reward, settings, old, ref)

    def saved(work, *args):
        real_save(work, *args)
        checkpoints.append(torch.load(work / "checkpoint.pt", weights_only=True))
    monkeypatch.setattr(tracelift, "Executor", Spy)
    monkeypatch.setattr(tracelift, "measure", measured)
    monkeypatch.setattr(tracelift, "policy_gradient", updated)
    monkeypatch.setattr(tracelift, "save_checkpoint", saved)
    out = train(settings(run, steps=3, lora_rank=2, beta=0.1, checkpointing=1))
    (model, before), = made
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if name in before)
    assert same(before, weights_of(run / "base")) and not same(weights_of(out), before)
    executor_logits, planner_logits = ([x for who, x in seen if who == name] for name in ("executor", "planner"))
    assert len(executor_logits) == 3 and all(torch.equal(x, executor_logits[0]) for x in executor_logits)
    assert torch.equal(planner_logits[0], executor_logits[0]) and not torch.equal(planner_logits[2], executor_logits[0])
    assert all(name.endswith((".lora_A", ".lora_B")) for name in checkpoints[0]["planner"]) and checkpoints[0]["planner"]
    assert lines(out)[0]["kl"] == 0 and lines(out)[-1]["kl"] > 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and not (out / "adapter_config.json").exists()
    for options in {"lora_rank": 2, "init": str(run / "base")}, {"init": str(out)}:
        with pytest.raises(UserError, match="--init does not go with LoRA"):
            train(settings(run, name="other", **options))


def test_an_adapter_is_evaluated_as_it_was_trained(run, lottery):
    """Not the merged weights, from which a low precision rounds small changes away; a broken adapter is an error."""
    out, ids = train(settings(run, mode="exec_only", steps=2, lora_rank=2, learning_rate=0.1)), torch.arange(20)[None]
    logits = lambda folder: tracelift.load_planner(folder, str(run / "base"), "cpu")[0](input_ids=ids).logits
    trained = executor.load(str(out), "cpu", torch.float32)[0](input_ids=ids).logits
    shutil.copy(run / "base" / "model.safetensors", out)
    assert torch.allclose(logits(out), trained, atol=1e-4) and not torch.allclose(logits(run / "base"), trained, atol=1e-2)
    assert torch.equal(logits(run / "base"), executor.load(str(run / "base"), "cpu")[0](input_ids=ids).logits)
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="adapter.*not an adapter"):
        logits(out)


def test_checkpointing_changes_no_number(run, lottery):
    """It recomputes, in training mode, and without the dropout that some models have there."""
    config = json.loads((run / "base" / "config.json").read_text())
    (run / "base" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    plain, recomputed = (lines(train(settings(run, steps=2, name=f"c{on}", checkpointing=on))) for on in (0, 1))
    assert plain[0]["grad_norm"] > 0
    for key in plain[0]:
        assert "seconds" in key or plain[1][key] is None or plain[1][key] == pytest.approx(recomputed[1][key], rel=1e-3), key


@pytest.mark.parametrize("options", [{"mode": "exec_only", "w_r": 0.3}, {"mode": "rm_only", "w_e": 1.0}, {"lora_alpha": 8.0}])
def test_settings_without_a_meaning_are_refused(run, options):
    with pytest.raises(UserError, match=f"--{list(options)[-1]} has no meaning"):
        train(settings(run, **options))


def test_programs_without_reference_traces(prepared, tmp_path):
    """The code preset from MBPP lines to the table, at toy size: no row for reference traces, no reward model needed."""
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(
            {"task_id": i, "text": "write f ( x ) .", "code": "", "test_list": ["assert f(1) == 1"]}) + "\n" for i in range(3)))
    run = tmp_path / "code"
    common = ["--preset", "code", "--run", run]
    command(data, *common, "--data", tmp_path / "train.jsonl", "--heldout_data", tmp_path / "heldout.jsonl", "--train", 3,
            "--heldout", 3)
    said = command(executor, *common, *SMALL, "--model", prepared[0] / "base", "--eval_problems", 2)
    assert "0.00 without a trace, no reference traces" in said
    out = train(settings(run, preset="code", mode="exec_only", steps=1, lora_rank=2, repeats=1))
    assert lines(out)[0]["program_runs"] == 8 and lines(out)[0]["faithful"] is None
    command(tracelift, "evaluate", *common, *SMALL, "--problems", 2, "--max_trace_tokens", 6)
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["no trace", "base planner", out.name] and results[out.name]["heldout T=0"]["success"] == 0
    with pytest.raises(UserError, match="mbpp-0.*good and a flawed trace"):
        rm_module.train(rm_module.RMSettings(run=str(run), device="cpu"))


def test_a_sandbox_failure_stops_training_and_logs_no_reward(run, monkeypatch, lottery):
    def fail(self, *args):
        raise SandboxError("no helper")
    monkeypatch.setattr(Executor, "baseline", fail)
    with pytest.raises(SandboxError):
        train(settings(run))
    assert not list(run.glob("planner-*/metrics.jsonl")) and not list(run.glob("planner-*/*.safetensors"))


def test_modes_share_problems_and_load_only_what_they_need(run, lottery):
    """exec_only runs without a reward model; unmeasured parts are null, not 0."""
    first = lines(train(settings(run, steps=2)), "samples.jsonl")
    shutil.rmtree(run / "rm")
    out = train(settings(run, steps=2, mode="exec_only"))
    assert [r["problem"] for r in lines(out, "samples.jsonl")] == [r["problem"] for r in first]
    assert [r["trace"] for r in lines(out, "samples.jsonl")] == [r["trace"] for r in first], "the same first rollout"
    for line in lines(out):
        assert line["rm"] is line["uplift"] is line["without_trace"] is None and line["reward"] == line["success"]
    with pytest.raises(UserError, match="rm.py"):
        train(settings(run, steps=2, mode="rm_only"))


def test_several_updates_per_rollout_move_the_ratio(run, lottery):
    """With one update the ratio is 1 and nothing can be clipped; with three the clip must act on old log-probs."""
    one = lines(train(settings(run, steps=2, name="one", learning_rate=3e-2, warmup=1)))
    three = lines(train(settings(run, steps=2, name="three", learning_rate=3e-2, warmup=1, inner_epochs=3)))
    assert all(line["clip_share"] is None for line in one) and any(line["clip_share"] > 0 for line in three)


def test_a_few_steps_raise_the_probability_of_what_is_rewarded(run, monkeypatch):
    """End to end, on a rigged reward: the share of tokens whose id has the parity that the base prefers less."""
    tokenizer = executor.load(str(run / "base"), "cpu")[1]
    prompt = torch.tensor([tokenizer(data.planner_prompt(data.problem_of(g)))["input_ids"][-12:]
                           for g in data.read_groups(run / "groups" / "heldout.jsonl")])

    @torch.no_grad()
    def probability(folder, parity):
        return executor.load(str(folder), "cpu")[0](prompt).logits[:, -1].softmax(-1)[:, parity::2].sum(-1).mean().item()
    parity = min((0, 1), key=lambda p: probability(run / "base", p))

    def rigged(s, frozen, rm, problems, traces):
        share = [statistics.mean([i % 2 == parity for i in tokenizer(t)["input_ids"]] or [0]) for t in traces]
        return [tracelift.Reward(None, None, None, None, None, float(x)) for x in share], [[] for _ in traces]
    monkeypatch.setattr(tracelift, "measure", rigged)
    out = train(settings(run, steps=20, group_size=8, mode="exec_only", learning_rate=1e-2, micro_batch=16))
    assert probability(out, parity) > probability(run / "base", parity) + 0.2
    reward = [line["reward"] for line in lines(out)]
    assert statistics.mean(reward[-5:]) > statistics.mean(reward[:3]) + 0.1


@pytest.mark.parametrize("key, value", [
    ("mode", "execonly"), ("steps", 0), ("group_size", 1), ("problems_per_step", 0), ("repeats", 0), ("temperature", 0.0),
    ("scale", "mad"), ("weights", "mean"), ("exec_score", "f1"), ("inner_epochs", 0), ("save_every", 0), ("micro_batch", 0),
    ("name", "a/b")])
def test_settings_that_cannot_work(run, key, value):
    """Named before anything is written: a run of hours must not end in a KeyError."""
    check_settings(settings(run))
    with pytest.raises(UserError, match=f"--{key} "):
        train(settings(run, **{key: value}))
    assert not list(run.glob("planner*")) and "planner" not in (run / "config.json").read_text()


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
    spent = {"executor_prompt_tokens": 1, "executor_tokens": 1000, "program_runs": 0, "planner_tokens": 1, "seconds": 60.0, "steps": 3}
    results = {"no trace": {"heldout T=0": {"problems": 9, "success": 0.125}},
               "base planner": {"heldout T=0": entry(0.25), "heldout T=1": entry(0.375)},
               "planner-my-seed-run-seed0": {"heldout T=0": entry(0.8), "heldout T=1": entry(0.5), "spent": spent},
               "planner-my-seed-run-seed1": {"heldout T=0": entry(0.6), "heldout T=1": entry(0.5), "spent": spent | {"seconds": 80.0}}}
    rows = rows_of(table(results))
    assert ["0.12" in row for row in rows["no trace"]] == [True, True]
    assert "0.25" in rows["base planner"][0] and "0.38" in rows["base planner"][1]
    greedy, hot = rows["my-seed-run"][:2]
    assert greedy[0] == "2" and greedy[1] == "0.70 ± 0.14" and hot[1] == "0.50 ± 0.00"
    assert any("70" in row for row in rows["my-seed-run"]), "seconds, mean over seeds"


def test_judge_by_hand(prepared):
    """right_for_wrong_reason: the executor succeeded on a trace that is not faithful."""
    problems = [data.problem_of(g) for g in data.read_groups(prepared[0] / "groups" / "heldout.jsonl")][:4]
    leaks = [p.reference_reasoning.replace("?", p.reference_solution) for p in problems]
    assert [data.check_trace(p, t) for p, t in zip(problems, leaks)] == [(False, True)] * 4

    class Fixed:
        def success(self, problems, traces, repeats):
            return [1, 0, 1, 1]
    good = [p.reference_reasoning for p in problems]
    found = tracelift.judge(Fixed(), problems, [good[0], good[1], leaks[2], "nonsense"])
    assert found == {"problems": 4, "success": 0.75, "faithful": 0.5, "right_for_wrong_reason": 0.5, "leak": 0.25}
    assert tracelift.judge(Fixed(), problems, None) == {"problems": 4, "success": 0.75}
    assert tracelift.judge(Fixed(), problems, None, 2) == {"problems": 2, "success": 0.75, "groups_without_spread": 0.5}


def test_evaluate_measures_each_planner_once(run, monkeypatch, lottery):
    """Rows, seeds and reuse: what results.json holds is not measured again, what is new is."""
    s = EvalSettings(preset="smoke", run=str(run), device="cpu", problems=4, max_trace_tokens=8, max_answer_tokens=6)
    for seed in (0, 1):
        train(settings(run, steps=1, mode="exec_only", seed=seed))
    (run / "planner-half-seed0.partial").mkdir()                    # an interrupted one is no row
    found = tracelift.evaluate(s)
    assert list(found) == ["no trace", "reference trace", "base planner", "planner-exec_only-seed0", "planner-exec_only-seed1"]
    splits = {"from", "heldout T=0", "longer T=0"}
    assert set(found["no trace"]) == splits and set(found["base planner"]) == splits | {"heldout T=1", "longer T=1"}
    assert found["reference trace"]["heldout T=0"]["faithful"] == 1.0
    assert found["planner-exec_only-seed1"]["spent"]["steps"] == 1
    assert json.loads((run / "results.json").read_text()) == found
    rows = rows_of((run / "results.md").read_text())
    assert len(rows["no trace"]) == len(rows["base planner"]) == 4 and rows["exec_only"][0][0] == "2" and "±" in rows["exec_only"][0][1]
    found["base planner"]["heldout T=0"]["success"] = 0.123         # a mark: measured again, it would go
    (run / "results.json").write_text(json.dumps(found))
    train(settings(run, steps=1, mode="rm_only"))
    again = tracelift.evaluate(s)
    assert again["base planner"] == found["base planner"] and list(again)[-1] == "planner-rm_only-seed0"
    with pytest.raises(UserError, match="--problems "):
        tracelift.evaluate(dataclasses.replace(s, problems=3))


def test_evaluation_is_reproducible(run, lottery):
    s = EvalSettings(preset="smoke", run=str(run), device="cpu", problems=4, max_trace_tokens=8, max_answer_tokens=6)
    first = tracelift.evaluate(s)
    (run / "results.json").unlink()
    assert tracelift.evaluate(s) == first


def test_inspect_shows_how_the_reward_comes_about(run, lottery):
    """The printed parts must give the printed total, and the advantages those of the totals."""
    s = EvalSettings(preset="smoke", run=str(run), device="cpu", traces=4, max_trace_tokens=8, max_answer_tokens=6, seed=1)
    text = tracelift.inspect(s)
    problem = data.problem_of(data.read_groups(run / "groups" / "heldout.jsonl")[1])
    assert problem.problem in text and problem.reference_reasoning in text
    assert all(text.count(name) == 4 for name in data.DIMENSIONS["math"])
    assert text.count("  e2e   ") == 4 and text.count("  uplift    '") + text.count('  uplift    "') == 4 * 3 and len(re.findall(r"^no trace", text, re.M)) == 3
    number = r"([-+]?[\d.]+)"
    found = re.findall(rf"{number} \* {number} \+ {number} \* {number} \* {number} = {number}\s+advantage {number}", text)
    found = [tuple(map(float, row)) for row in found]
    assert len(found) == 4
    for w_e, e2e, w_r, score, uplift, total, _ in found:
        assert w_e * e2e + w_r * score * uplift == pytest.approx(total, abs=0.006)
    order = sorted(found, key=lambda row: row[5])
    assert len({row[5] for row in found}) > 1, "rewards without spread show nothing; choose another seed"
    assert [row[6] for row in order] == sorted(row[6] for row in found)


def test_plot(tmp_path, monkeypatch):
    """Curves of all planners, whatever they do not measure; without matplotlib or curves an error says what to do."""
    drawn, fake = [], types.ModuleType("matplotlib.figure")
    axis = types.SimpleNamespace(plot=lambda y, label: drawn.append((label, y)), set=lambda **_: None,
                                 legend=lambda **_: None)
    fake.Figure = lambda **_: types.SimpleNamespace(
        subplots=lambda rows, columns: types.SimpleNamespace(flat=[axis] * rows * columns),
        savefig=lambda path, format: Path(path).write_bytes(b"png"))
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", fake)
    with pytest.raises(UserError, match="tracelift.py train --run"):
        tracelift.plot(tmp_path)
    keys = ("reward", "success", "faithful", "leak", "entropy", "groups_without_spread", "trace_tokens", "grad_norm")
    for name, steps in (("planner-a-seed0", 7), ("planner-b-seed0.partial", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(
            json.dumps({**dict.fromkeys(keys, float(i)), "leak": None}) + "\n" for i in range(steps)))
    assert tracelift.plot(tmp_path).read_bytes() == b"png" and not list(tmp_path.glob("*.partial/*.png"))
    assert len(drawn) == 2 * (len(keys) - 1)
    assert drawn[:2] == [("planner-a-seed0", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]), ("planner-b-seed0.partial", [0.0])]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        tracelift.plot(tmp_path)


# ---------------------------------------------------------------- InT

MATH = data.Problem("m", "tiny", "math", "text", "40", [], "17 + 5 = 22 ; 22 * 2 = 44 ; 44 - 4 = ?")
CODE = data.Problem("c", "tiny", "code", "text", "def f(x): pass", [], "add 3 ; subtract 2 ; cap at 9")
WRONG = {"m": "17 + 5 = 22 ; 22 * 3 = 66 ; 66 - 4 = ?", "c": "add 3 ; subtract 7 ; cap at 9"}


@pytest.mark.parametrize("problem, completion, verdict", [
    (MATH, "2 : 22 * 2 = 44", "proposed"), (CODE, "2 : subtract 2", "proposed"), (CODE, "3 : cap at 5", "proposed"),
    (MATH, "4 : 40 + 1 = ?", "proposed"),                             # one past the end: a step is missing there
    (MATH, "5 : 40 + 1 = ?", "index out of range"), (CODE, "0 : add 3", "index out of range"),
    (MATH, "2 : 22 * 3 = 66", "repeats the step"), (CODE, "2 : subtract 7", "repeats the step"),
    (MATH, "1 : 18 + 5 = 23", "empty prefix"), (CODE, "1 : negate", "empty prefix"),
    (CODE, "1 : add 3", "repeats the step"),
    (MATH, " none", "none: no error found"), (CODE, "I see no error", "not in the format"), (MATH, "", "not in the format"),
    (MATH, "4 : stop", "stop: no step")])
def test_sort_out(problem, completion, verdict):
    assert tracelift.sort_out(problem, WRONG[problem.problem_id], completion)[0] == verdict
    assert verdict in (*tracelift.VERDICTS, "proposed")


def test_the_first_step_is_kept_on_request():
    assert tracelift.sort_out(CODE, WRONG["c"], "1 : negate", "keep") == ("proposed", 1, "negate")


def test_choose():
    """At least as often as a resampled step, and at all; the most successful, then the most often sampled."""
    def p(text, verdict="proposed", times=1, success=0.0, resampled=0.0):
        return {"text": text, "verdict": verdict, "times": times, "success": success, "resampled": resampled}
    rows = [p("a", success=1 / 3, times=5), p("b", success=2 / 3), p("c", success=2 / 3, resampled=2 / 3, times=2),
            p("d", success=2 / 3, resampled=1.0), p("e", times=9), p("f", "empty prefix", 9, 1.0), p("g", "none: no error found", 9)]
    assert tracelift.choose(rows)["text"] == "c"
    assert [r["verdict"] for r in rows] == ["passed"] * 3 + ["succeeds less than a resampled step", "never succeeds",
                                                             "empty prefix", "none: no error found"]
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


def test_error_first_last_and_missing(tiny):
    steps = data.split_steps(CODE, WRONG["c"])
    assert [tracelift.through_the_error(CODE, WRONG["c"], i) for i in (1, 2, 3)] == [steps[0], " ; ".join(steps[:2]), WRONG["c"]]
    assert tracelift.through_the_error(CODE, WRONG["c"], 4) == WRONG["c"] + data.CLOSE, "it ended too early: the end is the error"


def test_count_by_hand():
    """Two failed traces: one intervention right, one at the wrong step; and traces that were left out."""
    def proposal(verdict, index, step, times=1, **more):
        return {"text": "", "verdict": verdict, "times": times, "index": index, "step": step, **more}
    good = proposal("passed", 2, "22 * 2 = 44", 3, success=1.0, resampled=0.0)
    bad = proposal("passed", 3, "cap at 8", 1, success=1.0, resampled=0.0)
    sources = {"intervention": 1.0, "error": 0.0, "resampled step": 0.5}
    record = lambda pid, proposals, chosen=None, left_out=None: {
        "problem_id": pid, "trace": WRONG[pid], "left_out": left_out, "proposals": proposals, "chosen": chosen,
        **({"success_from": sources} if chosen else {})}
    found = tracelift.count([record("m", [good, proposal("none: no error found", 0, "", 5)], good), record("c", [bad], bad),
                             record("c", [], left_out="cannot be split"), record("c", [], left_out="no reference reasoning")],
                            {"m": MATH, "c": CODE})
    assert found["failed_traces"] == 4 and found["with_intervention"] == 2 and found["interventions"] == 9
    assert found["left_out"] == {"cannot be split": 1, "no reference reasoning": 1} and found["success_from"] == sources
    assert found["verdicts"] == dict.fromkeys(tracelift.VERDICTS, 0) | {"none: no error found": 5, "passed": 4}
    assert found["ground_truth_named"]["all"] == {"n": 4, "index_right": 0.75, "step_right": 0.75}
    assert found["ground_truth_kept"]["wrong second number"] == {"n": 1, "index_right": 1.0, "step_right": 1.0}
    assert found["ground_truth_kept"]["wrong constant"] == {"n": 1, "index_right": 0.0, "step_right": 0.0}


@pytest.fixture
def scripted(monkeypatch):
    """A random planner names no error: here it always proposes to replace the second step, or writes nonsense."""
    real = tracelift.complete

    def texts(model, tokenizer, prompts, num_samples, temperature, s, generator):
        if temperature == getattr(s, "proposal_temperature", None):
            return None, ["2 : 22 * 2 = 44" if i % 2 else "nonsense" for i in range(len(prompts) * num_samples)]
        return real(model, tokenizer, prompts, num_samples, temperature, s, generator)
    monkeypatch.setattr(tracelift, "complete", texts)
    monkeypatch.setattr(data, "extract_reasoning", lambda text: "17 + 5 = 22 ; " + text[-20:])


def int_settings(run, **changes):
    return tracelift.IntSettings(**{**dict(preset="smoke", run=str(run), device="cpu", problems=6, group_size=4, proposals=2, repeats=1, epochs=2.0,
                                           max_trace_tokens=6, max_answer_tokens=6, batch_size=4, learning_rate=1e-2), **changes})


def test_int_stage(run, monkeypatch, lottery, scripted):
    """A stopped stage goes on with the interventions it has; a finished one is left alone; GRPO starts from its weights."""
    s = int_settings(run)
    with monkeypatch.context() as m:
        m.setattr(executor, "finetune", crash)
        with pytest.raises(Crash):
            tracelift.intervene(s)
    assert not (run / "int").exists()
    with monkeypatch.context() as m:
        m.setattr(tracelift, "collect", crash)
        out = tracelift.intervene(s)
        m.setattr(executor, "finetune", crash)
        assert tracelift.intervene(s) == out == run / "int"
    with pytest.raises(UserError, match="--repeats"):
        tracelift.intervene(int_settings(run, repeats=2))
    report, records = json.loads((out / "int.json").read_text()), lines(out, "interventions.jsonl")
    assert 0 < report["with_intervention"] == len([r for r in records if r["chosen"]]) < report["failed_traces"] == len(records)
    assert report["verdicts"]["not in the format"] * 2 == report["interventions"] == 2 * len(records)
    assert report["sequences"]["train"] > 0 < report["sequences"]["heldout"]
    assert report["heldout_loss"]["InT"] < report["heldout_loss"]["base"]
    failures = [sum(r["problem_id"] == g["problem_id"] for r in records) for g in data.read_groups(out / "hard.jsonl")]
    assert failures and min(failures) == 4 and len(failures) < len({r["problem_id"] for r in records}), "4 of 4 failed"
    assert not same(weights_of(out), weights_of(run / "base")) and not (run / "int.partial").exists()
    planner = train(settings(run, steps=1, mode="exec_only", init=str(out), learning_rate=1e-30, warmup=0))
    assert planner.name == "planner-exec_only-after-InT-seed0" and same(weights_of(planner), weights_of(out))
    evaluation = EvalSettings(preset="smoke", run=str(run), device="cpu", problems=2, max_trace_tokens=8, max_answer_tokens=6)
    found = tracelift.evaluate(evaluation)
    rows = rows_of(table(found))
    assert "InT" in rows and rows["exec_only after InT"][0][0] == "1"
    assert all("groups_without_spread" in found[name]["hard T=1"] for name in ("base planner", "InT", planner.name))
    found["base planner"]["hard T=1"]["success"] = 0.123            # a mark: measured again, it would go
    (run / "results.json").write_text(json.dumps(found))
    assert tracelift.evaluate(evaluation) == found


def test_int_uses_no_problem_without_reference(run, lottery, scripted):
    """Its failed traces are counted and teach nothing; without any intervention the planner stays the base planner."""
    path = run / "groups" / "train.jsonl"
    data.write_groups(path, [g | {"positive_pool": []} for g in data.read_groups(path)])
    out = tracelift.intervene(int_settings(run))
    report = json.loads((out / "int.json").read_text())
    assert report["left_out"]["no reference reasoning"] == report["failed_traces"] > 0 == report["interventions"]
    assert report["sequences"] == {"train": 0, "heldout": 0} and same(weights_of(out), weights_of(run / "base"))
    trained = train(settings(run, mode="exec_only"))                     # which reads no reference either
    assert all(line["faithful"] is None for line in lines(trained))


# ---------------------------------------------------------------- the commands

def test_all_commands_in_order(prepared, tmp_path, capsys):
    """data -> executor -> rm -> train -> evaluate -> inspect at toy size; each names the next one, and a second pass
    of a stage does nothing."""
    run, said = prepared
    for output, following in zip(said, ("executor.py", "rm.py", "tracelift.py train")):
        assert re.search(rf"^next: python {re.escape(following)} .*--run {re.escape(str(run))}", output, re.M), output
    run = Path(shutil.copytree(run, tmp_path / "toy"))
    common = ["--preset", "smoke", "--run", run, *SMALL, "--max_trace_tokens", 8]
    out = command(tracelift, "train", *common, "--mode", "tracelift")
    assert "next: python tracelift.py evaluate" in out
    planner = run / "planner-tracelift-seed0"
    assert [line["step"] for line in lines(planner)] == [0, 1] and (planner / "tokenizer.json").exists()
    assert out.endswith(command(tracelift, "train", *common, "--mode", "tracelift"))
    out = command(tracelift, "evaluate", *common, "--problems", 3)
    assert (run / "results.md").read_text().strip() in out and "next: python tracelift.py inspect" in out
    assert "tracelift" in rows_of(out) and set(json.loads((run / "results.json").read_text())) >= {"no trace", planner.name}
    assert "advantage" in command(tracelift, "inspect", *common, "--planner", planner.name)
    assert all(f'"{stage}"' in (run / "config.json").read_text() for stage in ("groups", "base", "rm", planner.name, "evaluate"))


def test_int_command(run):
    """A near-random planner names nothing: said, and GRPO can start from the folder all the same."""
    common = ["--preset", "smoke", "--run", run, *SMALL, "--max_trace_tokens", 8]
    out = command(tracelift, "int", *common, "--problems", 3)
    assert "no intervention was kept" in out and f"--init {run / 'int'}" in out.splitlines()[-1]
    assert "planner-tracelift-after-InT-seed0" in command(tracelift, "train", *common, "--init", run / "int", "--steps", 1)


@pytest.mark.parametrize("argv, names", [
    ([], "evaluate"), (["explain"], "explain"), (["train", "--preset", "huge"], "huge"), (["train", "--mode", "best"], "--mode"),
    (["train", "--modes", "tracelift"], "--modes"), (["train", "--steps", "many"], "--steps"), (["train"], "groups"),
    (["evaluate"], "base.json"), (["inspect"], "groups")])
def test_mistakes_on_the_command_line(tmp_path, capsys, argv, names):
    """One line that names the mistake, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        data.run_command(tracelift.main, argv + ["--run", str(tmp_path / "none")] * bool(argv))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "error: " in said[-1] and names in said[-1]


def test_a_mistake_in_a_real_process(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tracelift.py", "train", "--run", tmp_path / "none", "--group_size", "1"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: --group_size") and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="best"):
        combine("best", e2e=1.0)


def test_exec_only_leaves_a_given_reward_model_alone(pair):
    rewards, _ = measure(settings(mode="exec_only", repeats=3), Counted(), Untouchable(), *pair)
    assert rewards[0].rm is None


def test_a_cut_after_the_last_step_costs_little(run, monkeypatch, lottery):
    real = tracelift.os.replace

    def cut(source, target):
        if Path(target).name.startswith("planner-"):
            raise Crash
        real(source, target)
    monkeypatch.setattr(tracelift.os, "replace", cut)
    with pytest.raises(Crash):
        train(settings(run, steps=3))                              # a checkpoint after 2 of 3
    monkeypatch.setattr(tracelift.os, "replace", real)
    crash_at(monkeypatch, 2)                                       # one step may be repeated, not all
    assert [line["step"] for line in lines(train(settings(run, steps=3)))] == [0, 1, 2]


def test_a_planner_is_evaluated_with_its_own_tokenizer(run, monkeypatch, lottery):
    """--init may name a model of another vocabulary; its ids would mean other words, and nothing would say so."""
    vocabulary = executor.load(str(run / "base"), "cpu")[1].get_vocab()
    own = executor.tiny_tokenizer([" !", *(word for word in vocabulary if not re.match(r"<\w+>", word) or word == data.OPEN)])
    executor.tiny_model(len(own), 32, 1).save_pretrained(run / "other")
    own.save_pretrained(run / "other")
    train(settings(run, steps=1, init=str(run / "other")))
    real, prompts = executor.generate, []

    def spy(model, given, **options):
        if model.get_input_embeddings().num_embeddings == len(own):
            prompts.extend(own.batch_decode(given))
        return real(model, given, **options)
    monkeypatch.setattr(executor, "generate", spy)
    tracelift.evaluate(EvalSettings(preset="smoke", run=str(run), device="cpu", problems=3, max_trace_tokens=8, max_answer_tokens=6))
    assert len(own) != len(vocabulary) and prompts and all("how many" in prompt or "write" in prompt for prompt in prompts)


def test_a_planner_trained_again_is_measured_again(run, lottery):
    """Deleting the folder is what the error message advises for another setting."""
    s = EvalSettings(preset="smoke", run=str(run), device="cpu", problems=3, max_trace_tokens=8, max_answer_tokens=6)
    out = train(settings(run, steps=2, mode="exec_only"))
    tracelift.evaluate(s)
    shutil.rmtree(out)
    train(settings(run, steps=1, mode="exec_only"))
    found = tracelift.evaluate(s)
    assert found[out.name]["spent"]["steps"] == 1
    found = {name: entry | {"mark": 1} for name, entry in found.items()}
    (run / "results.json").write_text(json.dumps(found))
    assert tracelift.evaluate(s) == found
    os.utime(out)
    assert [name for name, entry in tracelift.evaluate(s).items() if "mark" not in entry] == [out.name]
    for changed in "groups/longer.jsonl", "base.json", "base":      # other problems or models: everything is stale
        (run / "results.json").write_text(json.dumps(found))
        os.utime(run / changed)
        assert not any("mark" in entry for entry in tracelift.evaluate(s).values()), changed


@pytest.mark.parametrize("key, value", [("beta", -1.0), ("clip_low", -0.1), ("learning_rate", -1.0), ("max_trace_tokens", 0),
                                        ("max_answer_tokens", 0), ("executor_temperature", -1.0), ("max_problems", -1)])
def test_more_settings_that_cannot_work(key, value):
    with pytest.raises(UserError, match=f"--{key} "):
        check_settings(settings(**{key: value}))


def test_an_unknown_device_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="nonsense"):
        executor.pick_device("nonsense")


def test_evaluating_no_problems_is_a_mistake_of_the_user(run):
    with pytest.raises(UserError, match="--problems "):
        tracelift.evaluate(EvalSettings(preset="smoke", run=str(run), device="cpu", problems=0))
