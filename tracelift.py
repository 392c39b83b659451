"""TraceLift: train a reasoning planner with executor-grounded rewards (arXiv 2605.03862).

A planner writes a reasoning trace. A frozen executor turns problem + trace into an answer or a program, and the
verifier judges it. A reward for success alone also pays for traces that are right for the wrong reason. TraceLift
therefore multiplies the score of a rubric reward model by what the trace was worth to the executor:

    uplift_i = mean_k success(problem, trace_i) - mean_k success(problem, no trace)     in [-1, 1], K runs each
    r_i      = w_e * e2e_i + w_r * rm_i * uplift_i                                      e2e_i: one more run with trace_i
    A_i      = (r_i - mean r) / (std r + eps)                                           over the G traces of a problem
    loss     = mean over the step's sampled tokens of -min(rho A, clip(rho) A) + beta KL    rho = exp(logp - old_logp)

Letters: N problems, G traces of each, B = N * G traces of a step, K executor runs, T tokens, M sampled tokens, H
hidden, V vocabulary; b and m are a micro-batch's share of B and M.

What differs from textbook GRPO: sampling and scoring use one temperature; every token of a step has the same weight,
and the tokens are counted before micro-batches are cut; equal rewards give an advantage of exactly 0; there is no KL
by default; with one update per rollout rho is 1, so the clip has no effect. What differs from the paper is in the
README.

The walk, top-down: this file to the fence; data.py, section 1 (what each role reads); rm.py, the model; executor.py,
sections 1 and 2 (decoding, the frozen executor); kernels/reference.py (advantage and log-prob).

    python tracelift.py int      --run_dir runs/tiny-math            # optional warm start; then train --init .../int
    python tracelift.py select   --run_dir runs/gsm8k-math           # then train --groups selected/train.jsonl
    python tracelift.py train    --run_dir runs/tiny-math --mode tracelift --seed 0      # or with torchrun
    python tracelift.py evaluate --run_dir runs/tiny-math            # every planner of the run -> results.md
    python tracelift.py inspect  --run_dir runs/tiny-math            # a problem's traces, rewards and tokens
"""

import copy
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import executor
import kernels
from data import Options, Problem, UserError, option
from executor import LM, Executor, Run
from rm import RubricRewardModel

# ------------------------------------------------------------------------------------------ 1. the reward


@dataclass
class Reward:
    """One trace's reward and its parts; None where the mode does not measure a part. e2e uses its own run, separate
    from the K runs behind uplift, so one lucky run cannot raise both."""
    e2e: float | None = None           # score of one executor run with the trace: 0 or 1, or a program's partial score
    rm: float | None = None            # the reward model's score of the trace, 0..1
    with_trace: int | None = None      # successes of K more runs with the trace
    without_trace: int | None = None   # successes of K runs without a trace
    uplift: float | None = None        # (with_trace - without_trace) / K
    total: float | None = None
    num_runs: int = 1                  # K
    text: str = ""                     # the trace, for rewards that look at it
    trace_tokens: int = 0              # its length


def product(r: Reward, w_e: float, w_r: float) -> float:
    """The paper's reward: quality multiplies measured usefulness, so neither earns without the other. Hazard: with
    uplift < 0, better quality costs. Example, w_e = w_r = 0.5: e2e 1, rm 0.9, 3 of 3 runs right with the trace and 1 of
    3 without give 0.5 * 1 + 0.5 * 0.9 * (3 - 1) / 3 = 0.8."""
    return w_e * r.e2e + w_r * r.rm * r.uplift


def product_for_code(r: Reward, w_e: float, w_r: float) -> float:
    """The public code's variant for programs: clamp(e2e + 0.2 * rm * coeff, 0, 1). coeff is 1 with more successes with
    the trace than without, -1 with fewer; on a tie it is the share of runs that succeeded, but 0.5 for one of three.
    With e2e = 1 the clamp removes a positive bonus: a passing trace gains nothing by being good."""
    if r.with_trace > r.without_trace:
        coeff = 1.0
    elif r.with_trace < r.without_trace:
        coeff = -1.0
    elif (r.with_trace, r.num_runs) == (1, 3):
        coeff = 0.5
    else:
        coeff = r.with_trace / r.num_runs
    return min(1.0, max(0.0, r.e2e + 0.2 * r.rm * coeff))


def success_alone(r: Reward, w_e: float, w_r: float) -> float:
    """The baseline that the product is compared with."""
    return r.e2e


def quality_alone(r: Reward, w_e: float, w_r: float) -> float:
    """The reward model's score, whatever the executor makes of the trace."""
    return r.rm


def success_and_uplift(r: Reward, w_e: float, w_r: float) -> float:
    """The product without quality."""
    return w_e * r.e2e + w_r * r.uplift


@dataclass(frozen=True)
class Mode:
    """A reward function and what it needs measured. A new mode is one function and one line of REWARDS."""
    total: Callable[[Reward, float, float], float]
    needs: tuple[str, ...]        # of "runs" (executor runs with the trace), "uplift" (K more, and K without), "rm"
    weighted: bool = False        # uses w_e and w_r


REWARDS = {"tracelift": Mode(product, needs=("runs", "uplift", "rm"), weighted=True),
           "tracelift-code": Mode(product_for_code, needs=("runs", "uplift", "rm")),
           "exec_only": Mode(success_alone, needs=("runs",)),
           "rm_only": Mode(quality_alone, needs=("rm",)),
           "uplift_only": Mode(success_and_uplift, needs=("runs", "uplift"), weighted=True)}
UPLIFT = [name for name, mode in REWARDS.items() if "uplift" in mode.needs]
WEIGHTED = [name for name, mode in REWARDS.items() if mode.weighted]
EXECUTED = [name for name, mode in REWARDS.items() if "runs" in mode.needs]

# ------------------------------------------------------------------------------------------ 2. settings


@dataclass(frozen=True)
class Place(Options):
    """What all commands share."""
    run_dir: str = option("runs/tiny-math", "run folder; holds groups/, base/ and rm/", affects_result=False)
    device: str = option("", "cuda, cpu, ...; empty: CUDA if available", affects_result=False)
    seed: int = option(0, "random seed for sampling and shuffling", low=0)


@dataclass(frozen=True)
class Settings(Place):
    """How traces are sampled and executed: shared by `train`, `int` and `select`."""
    max_trace_tokens: int = option(80, "longest planner completion; a longer one is cut there", low=1)
    executor_temperature: float = option(0.7, "temperature of the executor", low=0)
    max_answer_tokens: int = option(64, "longest executor output", low=1)
    max_cache_gib: float = option(executor.CACHE_GIB, "keys and values of one decoding batch, GiB", above=0,
                                  affects_result=False)
    executor: str = option("", "http://HOST:PORT/v1 of a server that runs the executor; empty: in process",
                           needs="executor_model", affects_result=False)
    executor_model: str = option("", "name of the run's base model on that server", needs="executor")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of `python tracelift.py train`."""
    # what
    mode: str = option("tracelift", "reward: " + ", ".join(REWARDS), choices=tuple(REWARDS))
    name: str = option("", "the planner is saved as planner-NAME-seedSEED; empty: the mode")
    init: str = option("", "folder of the model that the planner starts from; empty: the run's base model", path=True)
    groups: str = option("groups/train.jsonl", "training problems, a file in the run folder; or selected/train.jsonl")
    # sampling
    steps: int = option(80, "rollouts, each followed by inner_epochs updates; may grow later", low=1,
                        affects_result=False)
    problems_per_step: int = option(12, "N", low=1)
    group_size: int = option(8, "G, traces per problem", low=2)
    temperature: float = option(1.0, "temperature of the planner, in sampling and in scoring", above=0)
    truncated: str = option("use", "traces cut at max_trace_tokens; use: train on them; mask: leave their tokens out "
                                   "of the loss", choices=("use", "mask"))
    # reward
    num_runs: int = option(3, "K, executor runs behind each success rate; the paper's 3", low=1, only={"mode": UPLIFT})
    w_e: float = option(0.5, "weight of end-to-end success", low=0, only={"mode": WEIGHTED})
    w_r: float = option(0.5, "weight of rm * uplift", low=0, only={"mode": WEIGHTED})
    exec_score: str = option("binary", "score of a program", choices=("binary", "pass_rate", "coderl", "hybrid"))
    # loss
    scale: str = option("std", "std: divide advantages by the group's spread; none: do not (Dr. GRPO)",
                        choices=("std", "none"))
    loss_aggregation: str = option("dapo", "dapo: mean over the step's tokens; grpo: over each trace's, then over "
                                           "traces; dr_grpo: as grpo, with max_trace_tokens as every length",
                                   choices=("dapo", "grpo", "dr_grpo"))
    clip_low: float = option(0.2, "PPO clip below 1", low=0, only={"inner_epochs": range(2, 1000)})
    clip_high: float = option(0.2, "PPO clip above 1", low=0, only={"inner_epochs": range(2, 1000)})
    beta: float = option(0.0, "weight of the KL to the starting planner; 0 keeps no reference policy in memory", low=0)
    # optimizer
    inner_epochs: int = option(1, "updates per rollout", low=1)
    learning_rate: float = option(3e-4, "AdamW, constant after warm-up; for the tiny model", above=0)
    warmup: int = option(5, "steps of linear warm-up", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    # memory
    micro_tokens: int = option(16384, "tokens per forward and backward pass, padding included; the gradient is the "
                                      "same up to rounding", low=1, affects_result=False)
    checkpointing: int = option(0, "1: recompute activations in the backward pass", choices=(0, 1),
                                affects_result=False)
    lora_rank: int = option(0, "0: train all weights of a copy of the base model; else an adapter of this rank on the "
                               "one model that is also executor and reference", low=0)
    lora_alpha: float = option(32.0, "scale of the adapter: alpha / rank", above=0, needs="lora_rank")
    # run
    save_every: int = option(20, "steps between checkpoints", low=1, affects_result=False)
    eval_every: int = option(0, "steps between greedy evaluations on eval_problems held-out problems; 0: none", low=0,
                             only={"mode": EXECUTED}, affects_result=False)
    eval_problems: int = option(50, "held-out problems of these", low=1, needs="eval_every", affects_result=False)


# ------------------------------------------------------------------------------------------ 3. rollout


@dataclass
class Trace:
    """One sampled trace, from the rollout to the log."""
    problem: Problem
    text: str | None              # what the executor and the reward model read; None: no trace at all
    prompt: list[int]             # ids that the planner read
    tokens: list[int]             # ids that it sampled; the last one is EOS unless the trace was cut
    logprobs: list[float]         # of each token when it was sampled
    closed: bool = True           # the completion has a </reasoning>; otherwise all of it is the trace
    cut: bool = False             # at max_trace_tokens
    reward: Reward | None = None
    runs: list[Run] | None = None         # executor runs; run 0 is e2e, the other K belong to uplift

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.tokens)


def rollout(planner: LM, problems: list[Problem], group_size: int, temperature: float, rng_key: str, s: Settings,
            begun: list[list[int]] | None = None) -> list[Trace]:
    """B = N * G traces, G = `group_size` for each of N problems, in problem-major order. A trace's random numbers
    depend on rng_key, the problem and the trace's number only, not on the batch around it. begun (N): ids that the
    planner continues (InT)."""
    begun = begun or [[]] * len(problems)
    prompts = [data.encode_prompt(planner.tokenizer, data.planner_prompt(problem)) for problem in problems]
    rng_keys = [f"trace {rng_key} {problem.problem_id} {g}" for problem in problems for g in range(group_size)]
    sampled = planner.generate([prompt + ids for prompt, ids in zip(prompts, begun)], group_size, s.max_trace_tokens,
                               temperature, rng_keys, s.max_cache_gib)
    rows = [begun[b // group_size] + tokens for b, tokens in enumerate(sampled.tokens)]
    traces = []
    for b, text in enumerate(executor.decode_text(planner.tokenizer, rows)):
        n, tokens = b // group_size, sampled.tokens[b]
        traces.append(Trace(problems[n], data.extract_reasoning(text), prompts[n], tokens, sampled.logprobs[b],
                            closed=data.CLOSE in text.rpartition("</think>")[2],
                            cut=tokens[-1] not in planner.eos_ids))
    return traces


# ------------------------------------------------------------------------------------------ 4. measuring the reward


def measure_rewards(traces: list[Trace], frozen: Executor | None, rm: RubricRewardModel | None, s: TrainSettings,
                    rng_key: str) -> None:
    """Sets the reward and the executor runs of each of B traces.

    A step with uplift costs B prompts with a trace, 1 + K outputs each, and one prompt without a trace, K outputs, for
    each problem that is new: the executor is frozen, so one baseline serves the whole training. Hazard: its error stays
    as long. With K = 3 and a true rate of 0.1, 27 % of problems get a baseline of 1/3 or more.

    A failure to measure (sandbox, reward model, executor) is never a reward: it raises, and training stops. UserError
    for a reward function that does not return a finite float."""
    mode, K = REWARDS[s.mode], s.num_runs
    problems, texts = [t.problem for t in traces], [t.text for t in traces]
    scores, without, runs = ([None] * len(traces) for _ in range(3))
    if "rm" in mode.needs:                                # reads problem and trace, never the executor's output
        scores = rm.score([data.rm_text(problem, text) for problem, text in zip(problems, texts)])[0].tolist()
    if "uplift" in mode.needs:
        runs, without = frozen.run_with_baseline(problems, texts, K, rng_key)
    elif "runs" in mode.needs:
        runs = frozen.run(problems, texts, 1, rng_key)
    for t, own, score, baseline in zip(traces, runs, scores, without):
        t.runs = own or []
        t.reward = r = Reward(rm=score, without_trace=baseline, num_runs=K, text=t.text, trace_tokens=len(t.tokens))
        if own:
            r.e2e = own[0].score
        if baseline is not None:                          # uplift counts successes even if e2e is a partial score
            r.with_trace = sum(run.ok for run in own[1:])
            r.uplift = (r.with_trace - baseline) / K
        r.total = mode.total(r, s.w_e, s.w_r)
        if type(r.total) is not float or not math.isfinite(r.total):
            raise UserError(f"--mode {s.mode}: its reward function returned {r.total!r}; it must be a finite float")


# ------------------------------------------------------------------------------------------ 5. the update


@dataclass
class MicroBatch:
    """b sequences, and their m sampled tokens in the form that the loss takes.

        ids         p0 p1 p2 t0 t1 E  .        p prompt, t sampled, E end of sequence, . padding
        loss_mask    -  -  x  x  x -  -        the logits at x predict ...
        target       -  -  t0 t1 E  -  -       ... this token: the shift by one

    The mask comes from sampled lengths, never from ids, since the padding may equal a real token. Padding is on the
    right, where causal attention does not look (decoding pads on the left). E is in the loss, so stopping is learned.
    Tokens after </reasoning> are in the loss too, though nobody reads them."""
    ids: torch.Tensor             # (b, T) prompt + completion
    positions: torch.Tensor       # (m,) int64, the x in ids.flatten()
    target: torch.Tensor          # (m,) int64
    seq_idx: torch.Tensor         # (m,) int64, which of the B traces; a micro-batch may cut through a group
    weight: torch.Tensor          # (m,) weight of the token in the loss of the whole step
    sampled_logp: torch.Tensor    # (m,) log-prob of the target when it was sampled
    learns: bool                  # whether to run backward; False if every A is 0 and beta is 0
    old_logp: torch.Tensor | None = None    # (m,) under the policy that sampled; None: that is still the planner
    ref_logp: torch.Tensor | None = None    # (m,) under the reference policy; None: no KL


def micro_batches(traces: list[Trace], advantage: torch.Tensor, s: TrainSettings,
                  ranks: "Ranks") -> tuple[list[MicroBatch], int]:
    """Cuts traces into micro-batches of at most s.micro_tokens, longest first, so there is little padding. Traces
    without advantage come last, in micro-batches that need no backward pass. Also returns M, the tokens in the loss of
    the whole step, of all processes: counted before the cut, so the gradient does not depend on it."""
    used = [b for b, t in enumerate(traces) if s.truncated == "use" or not t.cut]
    M = sum(ranks.exchange(sum(len(traces[b].tokens) for b in used)))
    B = s.problems_per_step * s.group_size
    batches = []
    for learns in (True, False):
        order = sorted((b for b in used if bool(advantage[b]) == learns), key=lambda b: -traces[b].length)
        while order:
            T = traces[order[0]].length
            size = max(1, s.micro_tokens // T)
            chosen, order = order[:size], order[size:]
            ids, rows = [], []
            for i, b in enumerate(chosen):
                tokens = traces[b].tokens
                ids.append(traces[b].prompt + tokens + [0] * (T - traces[b].length))
                first = i * T + len(traces[b].prompt) - 1                 # the last prompt token predicts the first one
                divisor = {"dapo": M, "grpo": B * len(tokens), "dr_grpo": B * s.max_trace_tokens}[s.loss_aggregation]
                for k, (token, logp) in enumerate(zip(tokens, traces[b].logprobs)):
                    rows.append((first + k, token, b, 1 / divisor, logp))
            tensors = [torch.tensor(column, device=advantage.device) for column in (ids, *zip(*rows))]
            batches.append(MicroBatch(*tensors, learns=learns or s.beta > 0))
    return batches, M


def policy_loss(logp, A, weight, old, ref, clip_low: float, clip_high: float, beta: float) -> torch.Tensor:
    """GRPO's loss of m tokens (arXiv 2402.03300, eq. 3); tensors are (m,). A sum, since the weights divide already,
    and over a part of the tokens at a time: a loss that couples the tokens of a trace (GSPO) does not fit.

    old None: on-policy, so rho is 1 and its derivative is that of logp. ref None: no KL."""
    rho = torch.exp(logp - (logp.detach() if old is None else old))
    loss = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    if ref is not None:
        gap = ref - logp
        loss = loss + beta * rho * (torch.expm1(gap) - gap)               # d/dlogp: rho * (logp - ref), the reverse KL's
    return (weight * loss).sum()


HEAD_ROWS = 3072                  # tokens whose logits exist at one time: (m, V) is the widest tensor of a step. (Models
                                  # without a plain head, such as Gemma 2, make all logits of a micro-batch.)


def accumulate_gradient(planner: LM, batch: MicroBatch, reward: torch.Tensor, s: TrainSettings) -> dict:
    """Adds a micro-batch's gradient to the planner's .grad. reward (B,). Returns sums over its tokens, see
    `token_health`."""
    columns = []
    planner.model.train(bool(s.checkpointing))                            # recomputes activations in training mode only
    with torch.set_grad_enabled(batch.learns):
        hidden = planner.hidden(batch.ids, batch.positions)                                    # (m, H)
        leaf = hidden.detach().requires_grad_(batch.learns)               # each piece's backward stops here
        for rows in torch.arange(len(leaf), device=leaf.device).split(HEAD_ROWS):
            logits = planner.head(leaf[rows])                                                  # (rows, V)
            logp, entropy, A = kernels.advantage_logp(logits, batch.target[rows], reward, batch.seq_idx[rows],
                                                      s.group_size, s.temperature, s.scale == "std")
            old, ref = (x if x is None else x[rows] for x in (batch.old_logp, batch.ref_logp))
            loss = policy_loss(logp, A, batch.weight[rows], old, ref, s.clip_low, s.clip_high, s.beta)
            if batch.learns:
                loss.backward()
            columns.append((loss.detach()[None], logp.detach(), entropy, A))
        if batch.learns:
            hidden.backward(leaf.grad)                                    # through the trunk, once
    planner.model.eval()
    loss, logp, entropy, A = (torch.cat(column) for column in zip(*columns))
    health = token_health(batch, logp, entropy, A, s) | {"loss": loss.sum()}
    if batch.old_logp is None:
        batch.old_logp = logp                                             # later updates measure rho from here
    return health


def token_health(batch: MicroBatch, logp, entropy, A, s: TrainSettings) -> dict:
    """Health metrics, summed over m tokens. entropy: of the next-token distribution. sampler_gap: |scored - sampled
    log-prob|; it shows a mismatch of sampler and scorer, and grows with later updates of a rollout. clip_share: tokens
    whose gradient the clip stops. kl: estimate of KL(planner || reference)."""
    health = {"entropy": entropy, "sampler_gap": (logp - batch.sampled_logp).abs()}
    rho = torch.ones_like(logp)
    if batch.old_logp is not None:
        rho = (logp - batch.old_logp).exp()
        health["clip_share"] = (rho < 1 - s.clip_low) & (A < 0) | (rho > 1 + s.clip_high) & (A > 0)
    if batch.ref_logp is not None:
        gap = batch.ref_logp - logp
        health["kl"] = rho * (torch.expm1(gap) - gap)
    return {name: values.sum() for name, values in health.items()}        # no .item(): the host would wait


@torch.no_grad()
def completion_logp(model: LM, batch: MicroBatch, temperature: float) -> torch.Tensor:
    """Log-probs (m,) of a micro-batch's targets under a model, at the sampling temperature."""
    hidden = model.hidden(batch.ids, batch.positions)                                          # (m, H)
    pieces = zip(hidden.split(HEAD_ROWS), batch.target.split(HEAD_ROWS))
    return torch.cat([kernels.token_logp(model.head(rows), target, temperature)[0] for rows, target in pieces])


# ------------------------------------------------------------------------------------------ 6. the training loop


def train(s: TrainSettings) -> Path:
    """Trains one planner with GRPO and returns its folder: model, tokenizer, metrics.jsonl, samples.jsonl.

    A stopped training continues from its last checkpoint, to the same end: problems are a function of seed and step; the
    random numbers of a trace of seed, step, problem and g; those of an executor run also of k, and without a trace of
    seed, problem and k alone. An error stops training; the steps since the last checkpoint are made again.

    A step with N = 12, G = 8, K = 3:                                             LoRA's adapter
        planner      12 prompts, 96 outputs; then each update scores 96 sequences   on
        executor     96 prompts, 384 outputs; 1 prompt, 3 outputs per new problem   off
        reward model 96 texts                                                       -
        reference    scores 96 sequences if beta > 0                                off
    """
    with training_folder(s) as (work, out, ranks):
        if work is None:
            return out                                                    # it is there already
        # With LoRA planner, executor and reference share one model; it is the base model while the adapter is off.
        problems, planner, frozen, rm, lora = load_training(s)
        base_model = lora.off if lora else nullcontext
        reference = copy.deepcopy(planner) if s.beta and not lora else planner
        learning = [p for p in planner.model.parameters() if p.requires_grad]                  # LoRA: the adapter's
        optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), weight_decay=0.0, fused=learning[0].is_cuda)
        with TrainingLog(work, planner, optimizer, frozen, base_model, ranks, s) as log:       # restores a checkpoint
            for step in log.steps():
                # 1. Rollout: the planner writes G traces for each of N problems.
                log.phase("rollout")
                own = ranks.share(problems_of_step(problems, step, s.problems_per_step, s.seed))
                traces = rollout(planner, own, s.group_size, s.temperature, f"{s.seed} {step}", s)

                # 2. Reward: the executor tries every trace (1 + K runs; exec_only: one) and, once in the whole
                #    training, the problem alone (K runs); the verifier judges its outputs; the reward model reads
                #    problem and trace.
                log.phase("reward")
                with base_model():                                        # else the executor would run with the adapter
                    measure_rewards(traces, frozen, rm, s, rng_key=str(step))
                reward = torch.tensor([t.reward.total for t in traces], device=planner.device)     # (B,)

                # 3. Advantage: better or worse than the other traces of the same problem? All equal: exactly 0. Here it
                #    only sets aside traces without gradient; the loss computes A from `reward`, in the fused kernel.
                advantage = kernels.group_advantage(reward, s.group_size, s.scale == "std")        # (B,)

                # 4. Update: raise the log-probs of sampled tokens where A > 0, lower them where A < 0.
                log.phase("update")
                batches, M = micro_batches(traces, advantage, s, ranks)   # M divides the loss of the whole step
                if s.beta > 0:
                    with base_model():
                        for batch in batches:
                            batch.ref_logp = completion_logp(reference, batch, s.temperature)
                lr = s.learning_rate * min(1.0, (step + 1) / max(1, s.warmup))
                for _ in range(s.inner_epochs):
                    health = [accumulate_gradient(planner, batch, reward, s) for batch in batches]
                    ranks.sum_gradients(learning)
                    norm = executor.descend(optimizer, lr, s.grad_clip, f"step {step}")        # clip, step, zero_grad
                    log.update(health, M, lr, norm)

                # 5. Write metrics, and every save_every steps samples and a checkpoint.
                log.write(step, traces)
            log.save_planner(lora)
    print(f"{out}: trained\nnext: python tracelift.py evaluate --run_dir {s.run_dir}")
    return out


def problems_of_step(problems: list[Problem], step: int, problems_per_step: int, seed: int) -> list[Problem]:
    """The N problems of a step: a seeded shuffle per epoch; a remainder that fills no step is skipped. It depends on
    the step alone, so a resumed run and runs of other modes see the same problems."""
    epoch, i = divmod(step, len(problems) // problems_per_step)
    shuffled = random.Random(f"{seed} {epoch}").sample(problems, len(problems))
    return shuffled[i * problems_per_step:(i + 1) * problems_per_step]


# =====================================================================================================================
# You have read the method. What follows runs it on disk, measures it and warm-starts it; each part can be read alone.
# =====================================================================================================================

# ------------------------------------------------------------------------------------------ 7. a training run on disk


@contextmanager
def training_folder(s: TrainSettings):
    """(folder to fill, folder of the planner, ranks). The first is None if the planner is complete; a planner of fewer
    steps continues. Only rank 0 writes. UserError for settings that do not go together, before anything is written."""
    ranks, folder = Ranks(), nullcontext()
    out = Path(s.run_dir) / f"planner-{s.name or s.mode}-seed{s.seed}"
    if not re.fullmatch(r"[\w.+-]*", s.name):                             # it stands in a table and in a path
        raise UserError(f"--name {s.name!r}: use letters, digits, and . + - _")
    if s.w_e == s.w_r == 0:
        raise UserError("--w_e 0 --w_r 0: the reward would always be 0; raise one of them")
    done = data.made_with(out).get("steps", s.steps)
    if s.steps < done:
        raise UserError(f"--steps {s.steps}: {out} has {done} steps already; choose another --name")
    if ranks.rank == 0:
        reads = ["base", s.groups.split("/")[0]] + ["rm"] * ("rm" in REWARDS[s.mode].needs) + [s.init] * bool(s.init)
        folder = data.stage_folder(out, s, reads, reopen=s.steps > done)
    with folder as work:
        work = ranks.exchange(work)[0]                                    # from here on there is something to read
        if work and ranks.rank == 0:
            (work / "results.json").unlink(missing_ok=True)               # of the planner with fewer steps
            print(f"{work}: training; it becomes {out} at the end. Watch it: tail -f {work}/metrics.jsonl")
        yield work, out, ranks


def load_roles(s: Settings, folder: str = "", needs: tuple[str, ...] = ("runs",), rank: int = 0):
    """(planner, frozen executor, reward model, adapter). None for an executor or reward model that is not needed, and
    without a new adapter (rank 0).

    The planner of this folder (empty: the base model) in float32. A planner with an adapter is the base model in its
    own dtype with the adapter beside it: merged into bfloat16 most of the adapter would be rounded away. The executor:
    the base model in process, or on a server; with a new adapter the planner's own model, whose adapter can be switched
    off."""
    device, base = executor.pick_device(s.device), executor.base_of(s.run_dir)
    with executor.saying(f"the kernels on {device}"):
        kernels.check(device)
    if rank and folder:
        raise UserError("--init does not go with --lora_rank: an adapter sits on the base model, which is the executor")
    adapter, frozen, rm, lora = Path(folder or base) / "adapter", None, None, None
    own, dtype = (base, None) if rank or adapter.is_dir() else (folder or base, torch.float32)
    planner = LM(*executor.load_for(s.run_dir, own, device, dtype))
    if "runs" in needs:
        options = {"max_new_tokens": s.max_answer_tokens, "temperature": s.executor_temperature, "seed": s.seed,
                   "exec_score": getattr(s, "exec_score", "binary")}
        if s.executor_model:
            frozen = executor.ServedExecutor(s.executor, s.executor_model, base, planner.tokenizer, **options)
        else:
            loaded = (planner.model, planner.tokenizer) if rank else executor.load_for(s.run_dir, base, device)
            frozen = Executor(*loaded, max_cache_gib=s.max_cache_gib, **options)
    if "rm" in needs:
        rm = RubricRewardModel.from_pretrained(f"{s.run_dir}/rm", device)
    if rank:
        lora = executor.Lora(planner.model, rank, s.lora_alpha, seed=s.seed)
    elif adapter.is_dir():
        executor.Lora.load(planner.model, adapter)
    if getattr(s, "checkpointing", 0):
        executor.enable_checkpointing(planner.model)
    return planner, frozen, rm, lora


def load_training(s: TrainSettings):
    """(problems to train on, then the roles of `load_roles`). UserError for too few problems for a step, or for ones
    that do not fit a role."""
    planner, frozen, rm, lora = load_roles(s, s.init, REWARDS[s.mode].needs, s.lora_rank)
    problems, ranks = data.read_problems(Path(s.run_dir) / s.groups), Ranks().count
    if not ranks <= s.problems_per_step <= len(problems):
        raise UserError(f"--problems_per_step {s.problems_per_step}: must be at least {ranks}, the processes, and at "
                        f"most {len(problems)}, the training problems")
    if rm and set(rm.dimension_names) != set(data.DIMENSIONS[problems[0].task_type]):
        raise UserError(f"{s.run_dir}/rm judges {', '.join(rm.dimension_names)}: not for {problems[0].task_type}")
    check_lengths(problems, s, s.max_trace_tokens, planner, frozen, rm)
    return problems, planner, frozen, rm, lora


def check_lengths(problems: list[Problem], s: Settings, trace_tokens: int, planner: LM, frozen: Executor | None,
                  rm: RubricRewardModel | None = None) -> None:
    """UserError, before hours of work, for a problem that does not fit a role's context, counted in its own tokens."""
    readers = [(planner, data.planner_prompt, 0), (frozen, lambda p: data.executor_prompt(p, ""), s.max_answer_tokens),
               (rm, lambda p: data.rm_text(p, ""), 0)]
    for role, text_of, more in readers:
        for problem in problems if role else ():
            length = len(data.encode_prompt(role.tokenizer, text_of(problem))) + trace_tokens + more
            if length > role.context:
                raise UserError(f"{problem.problem_id}: problem, trace and answer are up to {length} tokens, the "
                                f"context of {type(role).__name__} is {role.context}; lower --max_trace_tokens or "
                                "--max_answer_tokens, or leave the problem out")


@dataclass
class TrainingLog:
    """What a training writes: metrics.jsonl, samples.jsonl, checkpoints, at the end the planner. A new one restores the
    last checkpoint; Ctrl-C and SIGTERM during rollout or reward write another.

    A checkpoint holds what training has changed: the weights that learn, the optimizer's state, the executor's
    baselines, the costs, the logs. Not in it: the frozen models, the settings (settings.json) and random generators,
    since random numbers are a function of seed, step, problem and sample."""
    work: Path
    planner: LM
    optimizer: torch.optim.Optimizer
    frozen: Executor | None
    base_model: Callable              # a context in which a LoRA planner's model is the executor
    ranks: "Ranks"
    s: TrainSettings

    def __post_init__(self):
        saved = {"steps": 0, "spent": {}, "logs": {"metrics.jsonl": "", "samples.jsonl": ""}}
        if (self.work / "checkpoint.pt").exists():
            saved = torch.load(self.work / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.planner.model.load_state_dict(saved["planner"], strict=False)    # LoRA: the adapter alone
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.frozen:
                self.frozen.baselines = saved["baselines"]
        self.done, self.spent, self.times = saved["steps"], Counter(saved["spent"]), []
        for name, text in saved["logs"].items():
            self.append(name, text, "w")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is FloatingPointError and len(self.times) == 1:           # in the rollout: the planner's logits
            raise FloatingPointError(f"step {self.done}: {error}; {executor.DIVERGED}") from None
        if kind is KeyboardInterrupt and 0 < len(self.times) < 3:         # in rollout or reward, not amid an update
            if self.frozen:
                self.frozen.baselines = self.baselines                    # the step measures its own again
            self.save_checkpoint()

    def steps(self):
        """The steps that are left, behind a progress bar."""
        done, total = self.done, self.s.steps
        if done > total:
            raise UserError(f"--steps {total}: {self.work} has {done} steps already; choose another --name")
        self.bar = executor.progress_bar(range(done, total), initial=done, total=total, desc=self.work.stem,
                                         disable=self.ranks.rank > 0)
        for step in self.bar:
            self.updates, self.times = [], []
            self.baselines = dict(self.frozen.baselines) if self.frozen else {}
            yield step

    def phase(self, name: str) -> None:
        """A phase begins: rollout, reward, update, write."""
        self.times.append(time.perf_counter())
        self.bar.set_postfix_str(name, refresh=sys.stderr.isatty())

    def update(self, health: list[dict], M: int, lr: float, norm: float) -> None:
        """Notes an update: the sums that `accumulate_gradient` returned become means over the M tokens."""
        means = self.ranks.sum(health)
        means |= {name: total / M for name, total in means.items() if name != "loss"}
        self.updates.append({"entropy": None, "sampler_gap": None} | means | {"grad_norm": norm, "learning_rate": lr})

    def write(self, step: int, traces: list[Trace]) -> None:
        """Adds a step's line of metrics, and every save_every steps a group to read and a checkpoint."""
        s, self.done = self.s, step + 1
        self.phase("write")
        traces = sum(self.ranks.exchange(traces), [])
        line = {"step": step} | self.metrics(traces)
        if step == 0 and line["reward_spread"] and not 1e-5 < line["reward_spread"] < 1e15:
            print("the rewards of a group differ by too little or too much for float32: nothing is learned; scale them")
        last = self.done == s.steps
        if s.eval_every and self.ranks.rank == 0 and (last or self.done % s.eval_every == 0):
            line["heldout_success"] = greedy_success(self.planner, self.frozen, self.base_model, s)
        self.append("metrics.jsonl", json.dumps(line) + "\n")
        for t in traces[:s.group_size] if step % s.save_every == 0 else ():
            outputs = [run.output for run in t.runs]
            sample = {"step": step, "problem": t.problem.problem, **asdict(t.reward), "outputs": outputs}
            self.append("samples.jsonl", json.dumps(sample) + "\n")
        if last or self.done % s.save_every == 0:
            self.save_checkpoint()

    def metrics(self, traces: list[Trace]) -> dict:
        """Means of `facts` over the step's traces and of `update` over its updates; the seconds of rank 0; what the
        training has spent so far, on all ranks. Ranks also share the baselines that each has measured."""
        totals = [t.reward.total for t in traces]
        groups = [totals[i:i + self.s.group_size] for i in range(0, len(totals), self.s.group_size)]
        line = {"reward": statistics.fmean(totals)} | average([facts(t) for t in traces]) | average(self.updates)
        line["groups_without_spread"] = statistics.fmean(max(g) == min(g) for g in groups)     # no gradient
        line["reward_spread"] = statistics.fmean(map(statistics.pstdev, groups))               # inside a group
        seconds = [after - at for at, after in zip(self.times, self.times[1:])]
        line |= zip(("seconds_rollout", "seconds_reward", "seconds_update"), seconds)
        self.spent.update(planner_tokens=sum(len(t.tokens) for t in traces), seconds=sum(seconds))
        if self.frozen:
            self.spent.update(self.ranks.sum([self.frozen.spent]))
            self.frozen.spent = dict.fromkeys(self.frozen.spent, 0)
            for known in self.ranks.exchange(self.frozen.baselines):
                self.frozen.baselines |= known
        return line | self.spent

    def append(self, name: str, text: str, mode: str = "a") -> None:
        """Adds text to a log; mode "w" replaces what is there."""
        if self.ranks.rank == 0:
            with open(self.work / name, mode) as log:
                log.write(text)

    def save_checkpoint(self) -> None:
        """Writes checkpoint.pt, whole or not at all."""
        if self.ranks.rank == 0:
            learning = {name: p.detach() for name, p in self.planner.model.named_parameters() if p.requires_grad}
            state = {"steps": self.done, "planner": learning, "optimizer": self.optimizer.state_dict(),
                     "spent": dict(self.spent), "baselines": self.frozen and self.frozen.baselines,
                     "logs": {path.name: path.read_text() for path in self.work.glob("*.jsonl")}}
            path = self.work / "checkpoint.pt"
            with data.replacing(path) as temporary, executor.saying(f"{path}: cannot be saved"):
                torch.save(state, temporary)

    def save_planner(self, lora) -> None:
        """Model and tokenizer as a Hugging Face folder; with LoRA the merged model, and the adapter beside it."""
        executor.check_alive(self.planner.model, f"step {self.done - 1}")
        if self.ranks.rank == 0:
            executor.save(self.planner, self.work, lora, executor.base_of(self.s.run_dir))


def facts(t: Trace) -> dict:
    """What is known of a trace, as numbers; None where the mode or the data does not tell."""
    right, leak = t.text is not None and data.check_trace(t.problem, t.text) or (None, None)
    r, runs = t.reward or Reward(), t.runs
    success = runs[0].ok if runs else None
    return {
        "success": success,                                               # of the one run that is e2e
        "e2e": r.e2e,                                                     # its score: partial for programs
        "uplift": r.uplift,                                               # success with minus without the trace
        "rm": r.rm,                                                       # reward model score
        "without_trace": r.without_trace and r.without_trace / r.num_runs,     # what uplift subtracts
        data.source_of(t.problem).right_metric: right,                    # every step, or calculation, is right
        "right_for_wrong_reason": None if right is None else success and not right,
        "leak": leak,                                                     # states the final result, or the code
        "unclosed": not t.closed,                                         # no </reasoning>
        "truncated": t.cut,                                               # cut at max_trace_tokens
        "executor_truncated": statistics.fmean(run.truncated for run in runs) if runs else None,
        "trace_tokens": len(t.tokens)}


def average(rows: list[dict]) -> dict:
    """Means over the rows in which a number is known; None where none is. The last row has all names."""
    means = {}
    for name in rows[-1]:
        known = [float(row[name]) for row in rows if row.get(name) is not None]
        means[name] = statistics.fmean(known) if known else None
    return means


def execute(frozen: Executor, traces: list[Trace], rng_key: str, num_runs: int = 1) -> None:
    """Sets the executor runs of each trace, without a reward."""
    runs = frozen.run([t.problem for t in traces], [t.text for t in traces], num_runs, rng_key)
    for t, own in zip(traces, runs):
        t.runs = own


def greedy_success(planner: LM, frozen: Executor, base_model: Callable, s: TrainSettings) -> float:
    """Success on a few held-out problems, greedy in both roles; its cost is not counted."""
    problems = data.read_problems(Path(s.run_dir) / "groups" / "heldout.jsonl")[:s.eval_problems]
    greedy = copy.copy(frozen)
    greedy.temperature, greedy.spent = 0.0, dict(frozen.spent)
    traces = rollout(planner, problems, 1, 0.0, "eval", s)
    with base_model():                                                    # as in `train`
        execute(greedy, traces, "eval")
    return statistics.fmean(t.runs[0].ok for t in traces)


# ---- several processes
#
# `torchrun --nproc_per_node=R tracelift.py train ...` starts R equal processes, the ranks, which share --run_dir. Each
# takes its share of a step's problems from rollout to gradient. Groups stay whole, so rewards and advantages need no
# other rank. Ranks exchange the number of tokens that the loss is divided by, the gradients, which are summed, and what
# rank 0 writes. Weights and optimizer state are whole on every rank and stay equal: all begin with the same and take
# the same steps.


class Ranks:
    """The processes that train one planner. Without torchrun there is one, rank 0 of 1. All ranks must call `exchange`,
    and what uses it, in the same order."""

    def __init__(self):
        self.rank, self.count = 0, 1
        if dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def exchange(self, value) -> list:
        """The values of all ranks, in their order, on every rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, counts: list[dict]) -> dict:
        """Sums over the dicts of all ranks, by name."""
        total = Counter()
        for count in sum(self.exchange(counts), []):
            total.update({name: float(value) for name, value in count.items()})
        return dict(total)

    def share(self, problems: list[Problem]) -> list[Problem]:
        """This rank's part of a step's problems."""
        return problems[self.rank::self.count]

    def sum_gradients(self, parameters: list) -> None:
        """Every gradient becomes the sum over all ranks. If no rank has a gradient all stay None, so the optimizer
        leaves weights and momentum alone."""
        learns = self.exchange(any(p.grad is not None for p in parameters))
        for p in parameters if self.count > 1 and any(learns) else ():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


@contextmanager
def torchrun():
    """Connects the ranks if torchrun has started this process; only rank 0 prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    backend, day = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timedelta(days=1)
    try:
        dist.init_process_group(backend, timeout=day)                     # a rank may evaluate while the others wait
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is set, but the processes do not find each other ({error}); start them with "
                        "torchrun, or unset it") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ 8. evaluation, inspect


@dataclass(frozen=True)
class EvalSettings(Place):
    """Settings of `python tracelift.py evaluate`. Lengths, executor and its temperature are those of the training."""
    problems: int = option(300, "held-out problems per row", low=1)
    samples: int = option(1, "traces per problem at temperature 1; more than one adds pass@k", low=1)
    executor: str = option("", "URL of the executor's server, if it is not the one of the training",
                           affects_result=False)


@dataclass(frozen=True)
class InspectSettings(Place):
    """Settings of `python tracelift.py inspect`."""
    traces: int = option(3, "traces to show", low=2)
    planner: str = option("", "folder name of a planner in the run; empty: the base model")
    problem: str = option("", "a problem of your own; empty: a held-out one, chosen by the seed")
    executor: str = option("", "URL of the executor's server, if it is not the one of the training")


def planners_of(run_dir) -> list[Path]:
    """The folders of the trained planners; not planner-NAME-seedSEED.partial, which is in training."""
    return sorted(Path(run_dir).glob("planner-*-seed*[0-9]"))


def trained_with(folder: Path, s: EvalSettings | InspectSettings) -> TrainSettings:
    """How a planner was trained, at this place and with this seed. Base model and InT: as the run's first planner."""
    made = [data.made_with(path) for path in (folder, *planners_of(s.run_dir))]
    known = next((settings for settings in made if "mode" in settings), {})
    known |= {"run_dir": s.run_dir, "device": s.device, "seed": s.seed}
    return TrainSettings(**known | {"executor": s.executor or known.get("executor", "")})


def evaluate(s: EvalSettings) -> list[dict]:
    """Measures every planner of a run on held-out problems, greedy and at temperature 1, beside the base planner, the
    reference traces and no trace. What a folder's results.json holds is not measured again. Writes results.md."""
    run_dir, rows = Path(s.run_dir), []
    for folder in tqdm([run_dir / "base", *run_dir.glob("int"), *planners_of(run_dir)], desc="evaluate"):
        data.compare_made(folder)
        path, how = folder / "results.json", trained_with(folder, s)
        settings = {f.name: getattr(how, f.name) for f in fields(how)
                    if f.name not in ("seed", "name") and (f.metadata["affects_result"] or f.name == "steps")}
        asked = {"problems": s.problems, "samples": s.samples, "seed": s.seed, "settings": settings}
        known = data.read_json(path) if path.exists() else {}
        if known.get("asked") != asked:
            known = {"asked": asked, "rows": measure(folder, how, s)}
            data.write_atomic(path, json.dumps(known, indent=1))
        rows += [asked | row for row in known["rows"]]
    data.write_atomic(run_dir / "results.md", table(rows))
    cut = max(row["executor_truncated"] or 0 for row in rows)
    if cut > 0.05:
        print(f"up to {cut:.0%} of a row's executor outputs were cut and count as failures: raise --max_answer_tokens")
    print(f"{table(rows)}{run_dir}/results.md: written\nnext: python tracelift.py inspect --run_dir {run_dir}")
    return rows


def measure(folder: Path, how: TrainSettings, s: EvalSettings) -> list[dict]:
    """The rows of one folder: one for each split and temperature; for the base model also those without a planner."""
    planner, frozen, *_ = load_roles(how, "" if folder.name == "base" else str(folder))
    name, rows = {"base": "base planner", "int": "InT"}.get(folder.name, how.name or how.mode), []
    for path in sorted(folder.parent.glob("groups/[hl]*.jsonl")):                              # heldout, longer
        problems = data.read_problems(path)[:s.problems]
        check_lengths(problems, how, how.max_trace_tokens, planner, frozen)
        sets = {(name, T): rollout(planner, problems, samples, T, f"{s.seed} {path.stem} T={T}", how)
                for T, samples in ((0, 1), (1, s.samples))}
        if folder.name == "base":
            sets["no trace", ""] = [Trace(p, None, [], [], []) for p in problems]
            if all(p.reference_reasoning for p in problems):
                sets["reference trace", ""] = [Trace(p, p.reference_reasoning, [], [], []) for p in problems]
        for (source, T), traces in sets.items():
            execute(frozen, traces, f"{path.stem} T={T or 0}")
            n = len(traces) // len(problems)
            right = [sum(t.runs[0].ok for t in traces[i:i + n]) for i in range(0, len(traces), n)]
            row = {f"pass@{k}": statistics.fmean(pass_at(k, n, r) for r in right) for k in POWERS if k <= n}
            row |= {"split": f"{path.stem} ({len(problems)})", "T": str(T), "traces": source}
            rows.append(row | average([facts(t) for t in traces]))
    return rows


def pass_at(k: int, n: int, right: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right, from n of which `right` are
    (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


POWERS = [2 ** i for i in range(1, 10)]           # the k of pass@k
METRICS = ("success", "faithful", "calculations_right", "right_for_wrong_reason", "leak", "unclosed",
           "executor_truncated", *(f"pass@{k}" for k in POWERS))


def table(rows: list[dict]) -> str:
    """Markdown: a row per split, temperature, planner name and settings: the mean over seeds, for several also ± their
    sample standard deviation."""
    usual, groups = {}, {}
    for row in rows:
        first = usual.setdefault(row["traces"], row["settings"])          # other settings under a name: another row
        flags = [f" --{name} {value}" for name, value in row["settings"].items() if value != first[name]]
        groups.setdefault((row["split"], row["T"], row["traces"] + "".join(flags)), []).append(row)
    columns = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    lines = [["split", "T", "traces from", "seeds", *columns], ["---"] * (4 + len(columns))]
    for key in sorted(groups, key=lambda key: key[:2]):
        known = [[row[name] for row in groups[key] if row.get(name) is not None] for name in columns]
        lines.append([*key, str(len(groups[key])), *map(spread, known)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: list[float]) -> str:
    """The mean, as "0.81", or for several seeds "0.81 ± 0.02"; nothing where nothing was measured."""
    mean = f"{statistics.fmean(values):.2f}" if values else ""
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def inspect(s: InspectSettings) -> str:
    """A problem and its traces, from the executor's runs to the advantage, and one trace token by token, as text for a
    person to read, beside what computed it. For a problem of your own: traces and outputs."""
    run_dir = Path(s.run_dir)
    problems = data.read_problems(run_dir / "groups" / "heldout.jsonl")
    problem, folder = problems[s.seed % len(problems)], run_dir / (s.planner or "base")
    if not folder.is_dir():
        raise UserError(f"--planner {s.planner}: there is no folder {folder}; name one that is there, or leave it out")
    if s.problem:
        problem = replace(problem, problem=s.problem, reference_solution="", reference_reasoning=None, tests=[])
    how, needs = trained_with(folder, s), ["runs"] + ["rm"] * (run_dir / "rm").is_dir()        # HumanEval has no rm/
    planner, frozen, rm, _ = load_roles(how, s.planner and str(folder), needs)
    if not s.planner:
        how = replace(how, mode="tracelift")                              # the base model was trained with no reward
    traces = rollout(planner, [problem], s.traces, how.temperature, f"{s.seed} inspect", how)
    shown = [("problem", problem.problem)]
    if s.problem:
        execute(frozen, traces, "inspect")
        for t in traces:
            shown += [("trace", t.text), ("  executor", t.runs[0].output.strip())]
    else:
        shown += reward_lines(traces, frozen, rm, how) + token_lines(planner, traces[0], how)
    text = "\n".join(f"{name:42}{value}" for name, value in shown)
    print(text)
    return text


def reward_lines(traces: list[Trace], frozen: Executor, rm, how: TrainSettings) -> list[tuple]:
    """Every part of the rewards of one group, then reward and advantage as the planner's own mode computes them;
    without a reward model uplift_only stands in for a mode that needs one."""
    own = how.mode if rm or "rm" not in REWARDS[how.mode].needs else "uplift_only"
    mode, parts = REWARDS[own], "tracelift" if rm else "uplift_only"
    measure_rewards(traces, frozen, rm, TrainSettings(mode=parts, num_runs=how.num_runs), "inspect")
    totals = [mode.total(t.reward, how.w_e, how.w_r) for t in traces]
    advantage = kernels.group_advantage(torch.tensor(totals), len(traces), how.scale == "std")
    alone, = frozen.run([traces[0].problem], None, how.num_runs)
    shown = [("no trace    [Executor.run, verify]", run) for run in alone]
    for t, total, A in zip(traces, totals, advantage):
        r = t.reward
        uplift = f"({r.with_trace} with - {r.without_trace} without) / {r.num_runs} = {r.uplift:+.2f}"
        truth = data.check_trace(t.problem, t.text)
        shown += [("", ""), ("trace", t.text), ("  right, leak    [data.check_trace]", truth)]
        shown += [("  e2e, then K    [Executor.run, verify]", run) for run in t.runs]
        shown.append(("  uplift    [measure_rewards]", uplift))
        if rm:
            labels = rm.score([data.rm_text(t.problem, t.text)])[1][0]
            named = ", ".join(f"{name} {label:.1f}" for name, label in zip(rm.dimension_names, labels))
            shown.append(("  rm    [RubricRewardModel.score]", f"{r.rm:.2f}: {named}"))
        shown += [(f"  reward    [{mode.total.__name__}]", f"{total:.3f}")]
        shown += [("  advantage    [kernels.group_advantage]", f"{A:+.2f}")]
    return shown


def token_lines(planner: LM, t: Trace, how: TrainSettings) -> list[tuple]:
    """The tokens of a trace that are in the loss: log-prob when sampled and when scored."""
    (batch,), _ = micro_batches([t], torch.ones(1, device=planner.device), replace(how, truncated="use"), Ranks())
    scored = completion_logp(planner, batch, how.temperature)
    shown = [("", ""), ("tokens of the first trace", "log-prob sampled, scored    [rollout, completion_logp]")]
    for token, old, new in zip(t.tokens, t.logprobs, scored):
        shown.append((repr(planner.tokenizer.decode([token])), f"{old:8.3f}{new:9.3f}"))
    return shown


# ------------------------------------------------------------------------------------------ 9. InT
#
# A warm start for the planner (arXiv 2601.14209). A reward on a whole trace also punishes the right steps before the
# first wrong one. Checking against a reference is easier than solving, so the planner names the first wrong step of its
# own failed trace and proposes another. It then learns (its own steps before) + (that step), and nothing after it.


@dataclass(frozen=True)
class IntSettings(Settings):
    """Settings of `python tracelift.py int`."""
    problems: int = option(200, "training problems to sample traces of", low=1)
    group_size: int = option(8, "traces per problem", low=2)
    proposals: int = option(16, "interventions sampled for each failed trace; the best one that passes is kept", low=1)
    proposal_temperature: float = option(0.7, "temperature of the interventions", low=0)
    num_runs: int = option(3, "K, executor runs behind each success rate", low=1)
    temperature: float = option(1.0, "temperature of the planner's traces and continuations", above=0)
    epochs: float = option(4.0, "passes of fine-tuning; the weights of the lowest held-out loss are kept", above=0)
    batch_size: int = option(16, "sequences per step of fine-tuning", low=1)
    learning_rate: float = option(3e-4, "peak of fine-tuning, AdamW; for the tiny model", above=0)
    checkpointing: int = option(0, "1: recompute activations in the backward pass", choices=(0, 1),
                                affects_result=False)


def intervene(s: IntSettings) -> Path:
    """The stage: collects interventions and fine-tunes the planner on them. Returns its folder: model, tokenizer,
    interventions.json."""
    out = Path(s.run_dir) / "int"
    with data.stage_folder(out, s, ("groups", "base")) as work:
        if work:
            problems = data.read_problems(Path(s.run_dir) / "groups" / "train.jsonl")[:s.problems]
            planner, frozen, *_ = load_roles(s)
            check_lengths(problems, s, 3 * s.max_trace_tokens, planner, frozen)   # an intervention reads two traces
            records = in_pieces(work / "interventions.json", problems,
                                lambda some: intervene_on(planner, frozen, s, some))
            sequences, heldout = int_sequences(planner.tokenizer, records, problems, s.seed)
            if sequences:
                executor.finetune(planner, sequences, heldout=heldout, epochs=s.epochs, seed=s.seed, warmup=10,
                                  title="InT", learning_rate=s.learning_rate, batch_size=s.batch_size,
                                  progress=work / "progress.pt")
            executor.save(planner, work)
            (work / "progress.pt").unlink(missing_ok=True)
            print(f"{len(records)} failed traces have an intervention that helps")
    print(f"{out}: made\nnext: python tracelift.py train --run_dir {s.run_dir} --init {out} --name tracelift-after-InT")
    return out


PIECE = 32                        # problems whose work a stopped stage may lose


def in_pieces(path: Path, problems: list[Problem], work: Callable[[list[Problem]], list]) -> list:
    """The records that `work` returns for PIECE problems at a time, joined. The file keeps them, a list for each piece,
    so a stopped stage continues."""
    pieces = data.read_json(path) if path.exists() else []
    for i in tqdm(range(PIECE * len(pieces), len(problems), PIECE), desc=path.stem):
        pieces.append(work(problems[i:i + PIECE]))
        data.write_atomic(path, json.dumps(pieces, indent=1))
    return sum(pieces, [])


def intervene_on(planner: LM, frozen: Executor, s: IntSettings, problems: list[Problem]) -> list[dict]:
    """One record for each trace that fails in all K executor runs and that an intervention can save. The planner
    proposes some and continues from each; the most successful one in K runs is kept, then the most often proposed."""
    K, tokenizer, by_id = s.num_runs, planner.tokenizer, {p.problem_id: p for p in problems}
    traces = rollout(planner, problems, s.group_size, s.temperature, f"{s.seed} int", s)
    execute(frozen, traces, "int", K)
    failed = [t for t in traces if t.problem.reference_reasoning and not any(run.ok for run in t.runs)]
    prompts = [data.encode_prompt(tokenizer, data.intervention_prompt(t.problem, t.text)) for t in failed]
    rng_keys = [f"intervention {s.seed} {t.problem.problem_id} {i} {k}" for i, t in enumerate(failed)
                for k in range(s.proposals)]
    said = planner.generate(prompts, s.proposals, s.max_trace_tokens, s.proposal_temperature, rng_keys, s.max_cache_gib)
    texts = executor.decode_text(tokenizer, said.tokens)
    records = []
    for i, t in enumerate(failed):
        sampled = Counter(map(data.parse_intervention, texts[i * s.proposals:(i + 1) * s.proposals]))
        for step, times in sampled.items():
            if step and may_mend(t.problem, t.text, *step):
                mended = data.OPEN + data.splice(t.problem, t.text, *step)
                records.append({"problem_id": t.problem.problem_id, "trace": t.text, "times": times, "mended": mended})
    begun = [data.encode_text(tokenizer, record["mended"], bos=False) for record in records]
    tried = [by_id[record["problem_id"]] for record in records]
    traces = rollout(planner, tried, K, s.temperature, f"{s.seed} mended", s, begun)
    execute(frozen, traces, "mended")
    best = {}
    for i, record in enumerate(records):
        record["success"] = statistics.fmean(t.runs[0].ok for t in traces[i * K:(i + 1) * K])
    for record in sorted(records, key=lambda r: (r["success"], r["times"])):
        if record["success"]:
            best[record["problem_id"], record["trace"]] = record
    return list(best.values())


def may_mend(problem: Problem, trace: str, index: int, step: str) -> bool:
    """Whether an intervention names a step of the trace and a different text for it that gives away neither the final
    answer nor a program: such steps would succeed most, and teach the planner to do the executor's work."""
    steps, truth = data.split_steps(problem, trace), data.check_trace(problem, step)
    if not 1 <= index <= len(steps) + 1 or step in steps[index - 1:index] or step == data.source_of(problem).no_step:
        return False
    if truth:
        return not truth[1]
    return "```" not in step if problem.task_type == "code" else not data.gives_number(problem, step)


def int_sequences(tokenizer, records: list[dict], problems: list[Problem], seed: int) -> tuple[list, list]:
    """(ids, labels) for training and held out, of the interventions: no loss on the prompt, none on what comes after
    the step, so none on a token that ends the trace. A tenth of the problems is held out."""
    by_id, parts = {p.problem_id: p for p in problems}, ([], [])
    for record in records:
        prompt = data.encode_prompt(tokenizer, data.planner_prompt(by_id[record["problem_id"]]))
        learned = data.encode_text(tokenizer, record["mended"], bos=False)
        labels = [executor.IGNORE] * (len(prompt) - 1) + learned
        held = random.Random(f"{seed} {record['problem_id']}").random() < 0.1
        parts[held].append((prompt + learned[:-1], labels))
    return parts


# ------------------------------------------------------------------------------------------ 10. problems that can teach
#
# A group whose traces all fail, or all succeed, has no advantage. Where the planner seldom succeeds most groups are
# like that. So its success is measured once on many problems, and training uses those where it varies.


@dataclass(frozen=True)
class SelectSettings(Settings):
    """Settings of `python tracelift.py select`."""
    problems: int = option(200, "training problems to try, the last ones: a cold start learns from the first", low=1)
    group_size: int = option(8, "traces per problem, one executor run each", low=2)
    temperature: float = option(1.0, "temperature of the planner", above=0)
    lowest: float = option(0.1, "least success of a problem that is kept", low=0)
    highest: float = option(0.9, "largest success of one", low=0)


def select(s: SelectSettings) -> Path:
    """Tries the base planner on training problems and writes those whose success lies between the bounds to
    RUN_DIR/selected/train.jsonl; all successes to tries.json. UserError when no problem is left."""
    out, groups = Path(s.run_dir) / "selected", Path(s.run_dir) / "groups" / "train.jsonl"

    def attempt(some: list[Problem]) -> list:
        traces = rollout(planner, some, s.group_size, s.temperature, f"{s.seed} select", s)
        execute(frozen, traces, "select")
        return [(t.problem.problem_id, t.runs[0].ok) for t in traces]

    with data.stage_folder(out, s, ("groups", "base")) as work:
        if work:
            problems = data.read_problems(groups)[-s.problems:]
            planner, frozen, *_ = load_roles(s)
            check_lengths(problems, s, s.max_trace_tokens, planner, frozen)
            tries = Counter()
            for name, ok in in_pieces(work / "tries.json", problems, attempt):
                tries[name] += ok / s.group_size
            kept = [g for g in data.read_groups(groups) if s.lowest <= tries.get(g["problem_id"], -1) <= s.highest]
            if not kept:
                raise UserError(f"--lowest {s.lowest:g}, --highest {s.highest:g}: no problem lies between; delete "
                                f"{work} and give other bounds")
            data.write_groups(work / "train.jsonl", kept)
            print(f"{len(kept)} of {len(tries)} problems kept, mean success {statistics.fmean(tries.values()):.3f}")
    print(f"{out}: made\nnext: python tracelift.py train --run_dir {s.run_dir} --groups selected/train.jsonl")
    return out


# ------------------------------------------------------------------------------------------ 11. commands


COMMANDS = {"train": (TrainSettings, train), "int": (IntSettings, intervene), "select": (SelectSettings, select),
            "evaluate": (EvalSettings, evaluate), "inspect": (InspectSettings, inspect)}


def main(argv) -> None:
    """The commands train, int, select, evaluate and inspect."""
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        raise UserError(f"tracelift.py {name}: choose {', '.join(COMMANDS)}; each has --help")
    settings, command = COMMANDS[name]
    s = data.parse_settings(settings, argv[1:], f"tracelift.py {name}")
    with torchrun():
        command(s)


if __name__ == "__main__":
    data.run_command(main)
