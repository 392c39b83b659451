"""TraceLift: train a reasoning planner with executor-grounded rewards (arXiv 2605.03862).

A planner writes a reasoning trace. A frozen executor turns problem + trace into an artifact, an answer or a program;
the verifier says whether it is right. Success alone also pays for traces that are right for the wrong reason. So the
reward has a second part, in which the score of a rubric reward model *multiplies* what the trace was worth to the
executor:

    uplift_i = mean_k success(problem, trace_i) - mean_k success(problem, no trace)     in [-1, 1], K runs each
    r_i      = w_e * e2e_i + w_r * rm_i * uplift_i                                      e2e_i: one more run with trace_i
    A_i      = (r_i - mean r) / (std r + eps)                                           over the G traces of a problem
    loss     = mean over the step's sampled tokens of -min(rho A, clip(rho) A) + beta KL    rho = exp(logp - logp_old)

Letters: N problems, G traces of each, B = N * G traces of a step, K executor runs, T tokens, M sampled tokens, H
hidden, V vocabulary.

What differs from textbook GRPO: the sampler's temperature is the scorer's; all tokens of a step count the same, and
their number is taken before micro-batches are cut; equal rewards give an advantage of exactly 0; there is no KL by
default; with one update per rollout rho is 1, so clip and ratio have no effect. What differs from the paper is in the
README.

The walk, top-down: this file to the fence; data.py, section 1 (what each role reads); rm.py, the model; executor.py,
sections 1 and 2 (decoding, the frozen executor); kernels/reference.py (advantage and loss).

    python tracelift.py int      --run_dir runs/tiny-math            # optional warm start; then train --init .../int
    python tracelift.py select   --run_dir runs/gsm8k-math           # optional; then train --selected 1
    python tracelift.py train    --run_dir runs/tiny-math --mode tracelift --seed 0      # several GPUs: section 6
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
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Callable

import torch
from tqdm import tqdm

import data
import executor
import kernels
import verify
from data import Problem, UserError, knob
from executor import Completions, Executor, Run
from rm import RubricRewardModel

# ------------------------------------------------------------------------------------------ 1. the reward


@dataclass(frozen=True)
class Reward:
    """The parts of one trace's reward beside the scalar; None where the mode does not measure a part. e2e is a run of
    its own: what pays for success must not also decide whether the trace was worth it."""
    e2e: float | None             # score of one executor run with the trace; success, or a program's partial score
    rm: float | None              # the reward model's score of the trace, 0..1
    with_trace: int | None        # successes of K more runs with the trace
    without_trace: int | None     # successes of K runs without a trace
    uplift: float | None          # (with_trace - without_trace) / K
    total: float | None = None
    repeats: int = 1              # K


def product(r: Reward, w_e: float, w_r: float) -> float:
    """The paper's reward: quality multiplies measured usefulness, so neither earns without the other. By default
    w_e = w_r = 0.5: e2e 1, rm 0.9, 3 of 3 runs right with the trace and 1 of 3 without give
    0.5 * 1 + 0.5 * 0.9 * (3 - 1) / 3 = 0.8."""
    return w_e * r.e2e + w_r * r.rm * r.uplift


def product_for_code(r: Reward, w_e: float, w_r: float) -> float:
    """The public code's variant for programs: clamp(e2e + 0.2 * rm * coeff, 0, 1). coeff: 1 with more successes with
    the trace than without, -1 with fewer; on a tie the share of runs that succeeded, but 0.5 for one of three (theirs
    too). With e2e = 1 the clamp removes a positive bonus: a passing trace gains nothing by being good."""
    if r.with_trace > r.without_trace:
        coeff = 1.0
    elif r.with_trace < r.without_trace:
        coeff = -1.0
    elif (r.with_trace, r.repeats) == (1, 3):
        coeff = 0.5
    else:
        coeff = r.with_trace / r.repeats
    return min(1.0, max(0.0, r.e2e + 0.2 * r.rm * coeff))


def success_alone(r: Reward, w_e: float, w_r: float) -> float:
    """What the product is compared with: success, whatever the trace is like."""
    return r.e2e


def quality_alone(r: Reward, w_e: float, w_r: float) -> float:
    """The reward model's score, whatever the executor makes of the trace."""
    return r.rm


def success_and_uplift(r: Reward, w_e: float, w_r: float) -> float:
    """The product without its quality; success itself is in it all the same."""
    return w_e * r.e2e + w_r * r.uplift


@dataclass(frozen=True)
class Mode:
    """A reward function and what has to be measured for it. A new mode is one function and one line of REWARDS,
    which is all that flags, training and run.sh know of modes."""
    total: Callable[[Reward, float, float], float]
    needs: tuple[str, ...]        # of "runs" (executor runs with the trace), "uplift" (K more, and K without), "rm"
    weighted: bool = False        # w_e and w_r have an effect


REWARDS = {"tracelift": Mode(product, needs=("runs", "uplift", "rm"), weighted=True),
           "tracelift-code": Mode(product_for_code, needs=("runs", "uplift", "rm")),
           "exec_only": Mode(success_alone, needs=("runs",)),
           "rm_only": Mode(quality_alone, needs=("rm",)),
           "uplift_only": Mode(success_and_uplift, needs=("runs", "uplift"), weighted=True)}

# ------------------------------------------------------------------------------------------ 2. settings


@dataclass(frozen=True)
class Settings:
    """What `train` and `int` share."""
    run_dir: str = knob("runs/tiny-math", "run folder; holds groups/, base/ and rm/", affects_result=False)
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one", affects_result=False)
    seed: int = knob(0, "of all sampling, and of every order", low=0)
    max_trace_tokens: int = knob(80, "longest planner completion; a cut one is used as far as it goes", low=1)
    executor_temperature: float = knob(0.7, "of the executor", low=0)
    max_answer_tokens: int = knob(64, "longest executor output", low=1)
    max_cache_gib: float = knob(executor.CACHE_GIB, "keys and values of one decoding batch, GiB", above=0,
                                affects_result=False)
    executor: str = knob("", "http://HOST:PORT/v1 of a server that runs the executor; empty: in process",
                         affects_result=False)
    executor_model: str = knob("", "name of the run's base model on that server")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of `python tracelift.py train`."""
    # what
    mode: str = knob("tracelift", "reward: " + ", ".join(REWARDS), choices=tuple(REWARDS))
    name: str = knob("", "the planner is saved as planner-NAME-seedSEED; empty: the mode")
    init: str = knob("", "model that the planner starts from; empty: the run's base model")
    # sampling
    steps: int = knob(80, "rollouts, each followed by inner_epochs updates; may grow later", low=1,
                      affects_result=False)
    problems_per_step: int = knob(12, "N", low=1)
    group_size: int = knob(8, "G, traces per problem; the advantage compares them", low=2)
    temperature: float = knob(1.0, "of the planner, in sampling and in scoring", above=0)
    truncated: str = knob("use", "traces cut at the limit; use: as far as they go; mask: their tokens are not learned",
                          choices=("use", "mask"))
    selected: int = knob(0, "1: train on the problems that `tracelift.py select` kept", choices=(0, 1))
    max_problems: int = knob(0, "train on this many problems only; 0: all", low=0)
    # reward
    repeats: int = knob(3, "K, executor runs behind each success rate; the paper's 3", low=1)
    w_e: float = knob(0.5, "weight of end-to-end success", low=0)
    w_r: float = knob(0.5, "weight of rm * uplift", low=0)
    exec_score: str = knob("binary", "score of a program", choices=("binary", "pass_rate", "coderl", "hybrid"))
    # loss
    scale: str = knob("std", "std: divide advantages by the group's spread; none: do not (Dr. GRPO)",
                      choices=("std", "none"))
    weights: str = knob("dapo", "of tokens; dapo: mean over the step's tokens", choices=("dapo", "grpo", "dr_grpo"))
    clip_low: float = knob(0.2, "PPO clip below 1; without effect unless inner_epochs > 1", low=0)
    clip_high: float = knob(0.2, "PPO clip above 1", low=0)
    beta: float = knob(0.0, "weight of the KL to the starting planner; 0 keeps no reference policy in memory", low=0)
    # optimizer
    inner_epochs: int = knob(1, "updates per rollout", low=1)
    learning_rate: float = knob(3e-4, "AdamW, constant after warm-up; for the tiny model", above=0)
    warmup: int = knob(5, "steps of linear warm-up", low=0)
    grad_clip: float = knob(1.0, "largest gradient norm", above=0)
    # memory
    micro_tokens: int = knob(16384, "tokens per forward and backward, padding included; the gradient is the same up to "
                                    "rounding", low=1, affects_result=False)
    checkpointing: int = knob(0, "1: recompute activations in the backward pass", choices=(0, 1), affects_result=False)
    lora_rank: int = knob(0, "0: train all weights of a copy of the base; else an adapter of this rank on the one base "
                             "model that is executor and reference too", low=0)
    lora_alpha: float = knob(32.0, "the adapter's part is scaled by alpha / rank", above=0)
    # run
    save_every: int = knob(20, "steps between checkpoints; a stopped run continues from the last one", low=1,
                           affects_result=False)
    eval_every: int = knob(0, "steps between greedy evaluations on eval_problems held-out problems; 0: none", low=0,
                           affects_result=False)
    eval_problems: int = knob(50, "held-out problems of these", low=1, affects_result=False)


# ------------------------------------------------------------------------------------------ 3. rollout


@dataclass
class Batch:
    """B = N * G sampled traces in problem-major order, and their M tokens as the loss wants them.

        ids      p0 p1 p2 t0 t1 E  .        p prompt, t sampled, E end of sequence, . padding
        scored    -  -  x  x  x -  -        the logits at x predict ...
        target   -  -  t0 t1 E  -  -        ... this token; kept where scored, M of them

    What is scored follows from the lengths sampled, never from ids: the padding may be a real token, E for one. It
    stands behind all that is scored, where causal attention does not look. E is in the loss, so that stopping is
    learned; so is what was sampled after </reasoning>, though no one reads it. A completion that was cut at the limit
    has no E; its tokens are in the loss like all others, unless --truncated mask leaves them out."""
    problems: list[Problem]       # (B) each problem G times
    traces: list[str]             # (B) what the executor and the reward model read
    closed: list[bool]            # (B) the completion has a </reasoning>; without one the trace is all of it
    truncated: list[bool]         # (B) cut at the limit: no E
    completions: Completions      # tokens, and their log-probs when they were sampled
    lengths: list[int]            # (B) tokens of prompt + completion
    ids: torch.Tensor             # (B, T) prompt + completion, padded on the right
    scored: torch.Tensor          # (B, T) bool, on the CPU
    at: torch.Tensor              # (M,) int64, the scored places of ids.flatten()
    target: torch.Tensor          # (M,) int64
    sequence: torch.Tensor        # (M,) int64, the b of each token
    sampled: torch.Tensor         # (M,) log-probs of the targets when they were sampled


def rollout(planner, tokenizer, problems: list[Problem], group_size: int, temperature: float, max_trace_tokens: int,
            when: str, max_cache_tokens: int = 65536, learn_truncated: bool = True) -> Batch:
    """`group_size` traces for each of N problems. `when` names the random numbers: what is drawn for a problem is a
    function of `when`, the problem and the sample's number, not of the batch around it."""
    prompts = [data.encode_prompt(tokenizer, data.planner_prompt(problem)) for problem in problems]
    names = sample_names(problems, group_size, when)
    completions, texts = complete(planner, tokenizer, prompts, group_size, temperature, max_trace_tokens, names,
                                  max_cache_tokens)
    ends = executor.eos_ids(planner, tokenizer)
    truncated = [tokens[-1] not in ends for tokens in completions.tokens]

    prompt_of = [prompt for prompt in prompts for _ in range(group_size)]                      # of each of the B
    rows = [prompt + tokens for prompt, tokens in zip(prompt_of, completions.tokens)]
    ids = executor.pad(rows, executor.pad_id(tokenizer), "cpu")                                # (B, T)
    scored = torch.zeros(ids.shape, dtype=torch.bool)
    sampled = []
    for b, prompt in enumerate(prompt_of):
        if learn_truncated or not truncated[b]:
            scored[b, len(prompt) - 1:len(rows[b]) - 1] = True            # the last prompt token predicts the first
            sampled += completions.logprobs[b]
    at = scored.flatten().nonzero().squeeze(1)                                                 # (M,), see the picture
    target = ids.flatten()[at + 1]
    sequence = at // ids.shape[1]
    device = planner.device
    return Batch(problems=[problem for problem in problems for _ in range(group_size)],
                 traces=[data.extract_reasoning(text) for text in texts],
                 closed=[data.CLOSE in text.rpartition("</think>")[2] for text in texts], truncated=truncated,
                 completions=completions, lengths=[len(row) for row in rows], ids=ids.to(device), scored=scored,
                 at=at.to(device), target=target.to(device), sequence=sequence.to(device),
                 sampled=torch.tensor(sampled, device=device))


def complete(planner, tokenizer, prompts: list[list[int]], num_samples: int, temperature: float, max_tokens: int,
             names: list[str], max_cache_tokens: int) -> tuple[Completions, list[str]]:
    """Completions by the planner, also as text, in prompt-major order."""
    try:
        with executor.autocast(planner):                                  # as in scoring: the sampler is the scorer
            completions = executor.generate(planner, prompts, num_samples=num_samples, max_new_tokens=max_tokens,
                                            temperature=temperature, eos_id=executor.eos_ids(planner, tokenizer),
                                            draws=executor.draws(names, max_tokens), max_cache_tokens=max_cache_tokens)
    except executor.ContextError as error:
        raise UserError(f"the planner: {error} (--max_trace_tokens)") from None
    return completions, executor.decode_text(tokenizer, completions.tokens)


# ------------------------------------------------------------------------------------------ 4. measuring the reward


def measure_rewards(problems: list[Problem], traces: list[str], frozen: Executor, rm: RubricRewardModel | None,
                    mode: str, repeats: int, w_e: float, w_r: float,
                    when: str = "") -> tuple[list[Reward], list[list[Run]]]:
    """Rewards of B traces (problems[i] belongs to traces[i]) and the executor runs behind them: run 0 is e2e, the other
    K are the uplift's.

    A step of a mode with uplift costs N * G prompts with a trace, of 1 + K outputs each, and one prompt without, of K
    outputs, for each of its problems that has none yet: the executor is frozen, so once is enough for the whole
    training. N = 10, G = 4, K = 2: 50 prompts and 140 outputs at first, 40 and 120 when the problems come again.

    What could not be measured is no reward: a sandbox that cannot start (SandboxError), a reward model that is not
    finite, an executor that fails end the training, with its last checkpoint. No program can end its helper process;
    one that is lost all the same is replaced, and when several are lost in a row, that is SandboxError too."""
    needs = REWARDS[mode].needs
    scores: list = [None] * len(traces)
    without: list = [None] * len(traces)
    runs: list = [[] for _ in traces]
    if "rm" in needs:                                     # it reads problem and trace, never what the executor wrote
        texts = [data.rm_text(problem, trace) for problem, trace in zip(problems, traces)]
        scores = rm.score(texts)[0].tolist()
    if "uplift" in needs:
        runs, without = frozen.run_with_baseline(problems, traces, repeats, when)
    elif "runs" in needs:
        runs = frozen.run(problems, traces, 1, when)
    rewards = []
    for own, score, baseline in zip(runs, scores, without):
        e2e = own[0].score if own else None
        with_trace, uplift = None, None
        if baseline is not None:                          # uplift counts successes also where e2e is a partial score
            with_trace = sum(run.ok for run in own[1:])
            uplift = (with_trace - baseline) / repeats
        parts = Reward(e2e, score, with_trace, baseline, uplift, repeats=repeats)
        rewards.append(replace(parts, total=REWARDS[mode].total(parts, w_e, w_r)))
    return rewards, runs


# ------------------------------------------------------------------------------------------ 5. training


def train(s: TrainSettings) -> Path:
    """Trains one planner with GRPO and returns its folder: model, tokenizer, metrics.jsonl, samples.jsonl.

    `run` (TrainingRun, behind the fence) holds the roles planner, executor and rm, the problems, and what lies on disk:
    steps() are those that are left, log() writes metrics and checkpoints."""
    with training_run(s) as run:
        for step in run.steps():
            # 1. Rollout: the planner writes G traces for each of N problems.
            run.phase("rollout")
            problems = run.share(problems_of_step(run.problems, step, s.problems_per_step, s.seed))
            batch = rollout(run.planner, run.tokenizer, problems, s.group_size, s.temperature, s.max_trace_tokens,
                            when=f"{s.seed} {step}", max_cache_tokens=run.max_cache_tokens,
                            learn_truncated=s.truncated == "use")

            # 2. Reward: the executor tries every trace (1 + K runs) and, once in the whole training, the problem alone
            #    (K runs); the verifier judges what it wrote; the reward model reads problem and trace.
            run.phase("reward")
            with run.base_model():                                        # LoRA: the adapter is off
                rewards, runs = measure_rewards(batch.problems, batch.traces, run.executor, run.rm, s.mode, s.repeats,
                                                s.w_e, s.w_r, when=str(step))
            reward = torch.tensor([r.total for r in rewards])                                  # (B,)

            # 3. Advantage: better or worse than the other traces of the same problem? All equal: exactly 0. (The loss
            #    takes rewards, and works the same out for each token; here it tells what has no gradient at all.)
            advantage = kernels.group_advantage(reward, s.group_size, scale=s.scale == "std")  # (B,)

            # 4. Update: raise the log-probs of sampled tokens where A > 0, lower them where A < 0.
            run.phase("update")
            num_tokens = run.num_tokens(batch)                            # M; several processes: those of all
            old, ref = run.old_and_reference_logp(batch)                  # None: on-policy (rho is 1); no KL
            updates = []
            for _ in range(s.inner_epochs):
                health = accumulate_gradient(
                    run.planner, batch, reward, advantage, old, ref, s.group_size, s.micro_tokens, s.weights,
                    s.max_trace_tokens, num_tokens, s.problems_per_step * s.group_size, temperature=s.temperature,
                    clip_low=s.clip_low, clip_high=s.clip_high, beta=s.beta, scale=s.scale == "std")
                health["grad_norm"] = run.update_weights(step)
                updates.append(health)

            # 5. Write it down.
            run.log(step, batch, rewards, runs, updates)
    return planner_folder(s)


def problems_of_step(problems: list[Problem], step: int, problems_per_step: int, seed: int) -> list[Problem]:
    """The N problems of a step: epochs of a seeded shuffle, a function of the step alone, so that a resumed run and
    runs of other modes see the same problems. Where an epoch ends, one may come twice."""
    chosen = []
    for i in range(step * problems_per_step, (step + 1) * problems_per_step):
        epoch, place = divmod(i, len(problems))
        if not chosen or place == 0:
            shuffled = random.Random(f"{seed} {epoch}").sample(problems, len(problems))
        chosen.append(shuffled[place])
    return chosen


def accumulate_gradient(planner, batch: Batch, reward: torch.Tensor, advantage: torch.Tensor,
                        old: torch.Tensor | None, ref: torch.Tensor | None, group_size: int, micro_tokens: int,
                        weights: str, max_len: int, num_tokens: int, num_sequences: int, *, temperature: float,
                        clip_low: float, clip_high: float, beta: float, scale: bool) -> dict:
    """Adds the gradient of one update to planner's .grad. Returns means over the M tokens: loss (their weighted sum),
    entropy of the next-token distribution, sampler_gap, and None where not measured: kl, the estimate of KL(planner ||
    reference), and clip_share, of tokens where the clip stops the gradient. reward, advantage (B,); old, ref: log-probs
    (M,) or None.

    Log-probs are scored at the temperature of sampling. sampler_gap, the mean absolute difference between them and
    those of the sampler, is where a mismatch of the two would show (from the second update of a rollout on it holds the
    planner's own way, too).

    The loss takes all B rewards, not advantages: each token works out its own group from them, so a micro-batch may cut
    through a group. The advantages here only tell which micro-batches have no gradient, and so no backward pass: those
    where all are 0, without KL. Where no group has spread, .grad stays None, and the optimizer, with its momentum,
    leaves the planner as it is.

    num_tokens and num_sequences are M and B of the whole step. Where several processes share it, a batch is only a part
    of them, and so are the gradient and the means, which add up over the processes."""
    device = batch.ids.device
    weight = kernels.token_weights(batch.scored, weights, max_len, num_tokens, num_sequences)  # (B, T)
    weight = weight[batch.scored].to(device)                                                   # (M,)
    reward = reward.to(device)
    health = Health(num_tokens, clip_low, clip_high)
    planner.train(getattr(planner, "recomputes_activations", False))      # which works in training mode only
    for part in micro_batches(batch, micro_tokens, first=advantage != 0):
        has_tokens = batch.scored[part.rows].any(dim=1)                   # no: cut, and --truncated mask
        learns = bool(has_tokens.any()) and (beta > 0 or bool((advantage[part.rows] * has_tokens).any()))
        own_old = None if old is None else old[part.tokens]
        own_ref = None if ref is None else ref[part.tokens]
        with torch.set_grad_enabled(learns):
            loss, logp, entropy, A = loss_of_part(
                planner, part, reward, weight[part.tokens], group_size, own_old, own_ref,
                temperature=temperature, clip_low=clip_low, clip_high=clip_high, beta=beta, scale=scale)
        if learns:
            loss.backward()
        health.add(loss, logp, entropy, A, batch.sampled[part.tokens], own_old, own_ref)
    planner.eval()
    return health.means()


def loss_of_part(planner, part: "Part", reward, weight, group_size: int, old, ref, **settings):
    """kernels.grpo_loss of the planner's logits (m, V) at the m tokens of a micro-batch (`Part`, section 6). Where the
    fused kernel runs and the head is a plain matrix, the logits are never held whole."""
    rows = (part.target, reward, part.sequence, weight, group_size, old, ref)
    head = planner.get_output_embeddings()
    plain = getattr(planner, "plain_head", True) and type(head) is torch.nn.Linear and head.bias is None
    if kernels.backend(part.ids.device) == "triton" and plain:
        work = executor.work_dtype(planner)                               # the head's product as autocast would do it
        with executor.autocast(planner):
            hidden = executor.token_hidden(planner, part.ids, part.at)                         # (m, H)
        return kernels.linear_grpo_loss(hidden.to(work), head.weight.to(work), *rows, **settings)
    with executor.autocast(planner):
        logits = executor.token_logits(planner, part.ids, part.at)
    return kernels.grpo_loss(logits, *rows, inplace=True, **settings)


# =====================================================================================================================
# You have read the method. What follows runs it on disk, measures it and warm-starts it; each part can be read alone.
# =====================================================================================================================

# ------------------------------------------------------------------------------------------ 6. a training run on disk


def planner_folder(s: TrainSettings) -> Path:
    """RUN_DIR/planner-NAME-seedSEED; NAME is the mode, with -after-InT for a planner that starts from RUN_DIR/int."""
    run_dir = Path(s.run_dir)
    after = "-after-InT" if s.init and Path(s.init).resolve() == (run_dir / "int").resolve() else ""
    return run_dir / f"planner-{s.name or s.mode + after}-seed{s.seed}"


def check_shared(s: Settings) -> None:
    """UserError for settings that `train`, `int` and `select` share, before anything is read or written."""
    data.check_settings(s)
    executor.check_server_flags(s.executor, s.executor_model)


def check_train(s: TrainSettings) -> None:
    """UserError for settings that do not go together, or have no effect: whoever sets them expects one."""
    check_shared(s)
    if "/" in s.name:
        raise UserError(f"--name {s.name!r}: must be a plain name")
    if s.warmup > s.steps:
        raise UserError(f"--warmup {s.warmup} is longer than the training, --steps {s.steps}; lower it")
    if s.init and (s.lora_rank or (Path(s.init) / "adapter").exists()):
        raise UserError("--init does not go with LoRA: a new adapter sits on the base model, which the executor is "
                        "too, and the merged weights of an old one may be rounded to bfloat16")
    mode = REWARDS[s.mode]
    with_mode = f"with --mode {s.mode}"
    without_effect = {"w_e": (not mode.weighted, with_mode), "w_r": (not mode.weighted, with_mode),
                      "repeats": ("uplift" not in mode.needs, with_mode),
                      "executor_temperature": ("runs" not in mode.needs, with_mode),
                      "exec_score": ("runs" not in mode.needs, with_mode),
                      "clip_low": (s.inner_epochs == 1, "with one update per rollout (--inner_epochs 1): rho is 1"),
                      "clip_high": (s.inner_epochs == 1, "with one update per rollout (--inner_epochs 1): rho is 1"),
                      "lora_alpha": (s.lora_rank == 0, "without --lora_rank"),
                      "eval_problems": (s.eval_every == 0, "without --eval_every")}
    for flag, (idle, why) in without_effect.items():
        if idle and getattr(s, flag) != getattr(TrainSettings, flag):
            raise UserError(f"--{flag} has no effect {why}; leave it out")


@contextmanager
def training_run(s: TrainSettings):
    """A training, begun or continued; without steps where its planner is there already. Saved when the block ends."""
    ranks = Ranks()
    check_train(s)
    if s.problems_per_step < ranks.count:
        raise UserError(f"--problems_per_step {s.problems_per_step}: fewer than the {ranks.count} processes of "
                        "torchrun, of which each takes whole problems; raise it, or lower --nproc_per_node")
    inputs = inputs_of(s)
    out = planner_folder(s)
    finished, folder = "", nullcontext()
    if ranks.rank == 0:                                                   # it alone writes
        finished = reopen(out, s, inputs)
        folder = data.stage_folder(out, s, inputs)
    with folder as work:
        work = ranks.exchange(work)[0]                                    # from here on there is something to read
        try:
            run = TrainingRun(s, work, ranks)
            if work is not None:
                ranks.check_equal(inputs, run.state["step"], run.planner)
        except BaseException:
            if finished:                                                  # it cannot go on: it stays what it was
                data.write_atomic(work / "settings.json", finished)
                os.replace(work, out)
            raise
        if finished:
            (work / "results.json").unlink(missing_ok=True)
        try:
            yield run
            if work is not None and ranks.rank == 0:
                run.save_planner()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {run.saved()}") from None
        except FloatingPointError as error:
            # What can no longer be computed is the planner: all else is as it was when it was loaded and tried.
            diverged = "logits" in str(error) and run.state["step"] > 0
            if diverged:
                error = f"after step {run.state['step'] - 1}: the planner's logits are not finite; {executor.DIVERGED}"
            raise FloatingPointError(f"{error}; {run.saved()}") from None
        except (OSError, verify.SandboxError) as error:
            raise type(error)(f"{error}; {run.saved()}") from error


def inputs_of(s: TrainSettings) -> dict[str, str]:
    """Fingerprints of what a training reads: made anew with other settings, it would be another training."""
    names = ["groups/train.jsonl", "base/base.json"]
    if s.selected:
        names.append("selected/train.jsonl")
    if "rm" in REWARDS[s.mode].needs:
        names += ["rm/config.json", "rm/metrics.json"]                    # none beside one that was put there
    inputs = data.fingerprints(s.run_dir, *names)
    if s.init and (Path(s.init) / "settings.json").is_file():
        inputs["--init"] = data.fingerprint(Path(s.init) / "settings.json")
    return inputs


def check_selection(run_dir: Path) -> None:
    """UserError for a selection that is missing, or was made with another base model or other problems."""
    folder = run_dir / "selected"
    if not (folder / "selected.json").exists():
        raise UserError(f"--selected 1: {folder} is not there yet; run python tracelift.py select --run_dir {run_dir} "
                        "first, or leave the flag out")
    data.compare_inputs(folder, data.fingerprints(run_dir, "groups/train.jsonl", "base/base.json"))


def reopen(out: Path, s: TrainSettings, inputs: dict[str, str]) -> str:
    """Makes a finished training, whose last checkpoint is kept, an unfinished one where more steps are asked for.
    Returns the settings.json that it had, "" where it stays as it is."""
    if not out.exists():
        return ""
    data.compare_made(out, s, inputs)
    done = data.read_settings(out).get("steps")
    if type(done) is not int:
        raise UserError(f"{out}/settings.json: damaged (steps is {done!r}); give another --name, or delete {out}")
    refuse_fewer_steps(s, done)
    if s.steps > done:
        if not (out / "checkpoint.pt").exists():
            raise UserError(f"--steps {s.steps}: {out}/checkpoint.pt is gone, so its training cannot go on; give "
                            "another --name")
        had = (out / "settings.json").read_text(encoding="utf-8")
        os.replace(out, out.with_name(out.name + ".partial"))
        return had
    return ""


def refuse_fewer_steps(s: TrainSettings, done: int) -> None:
    """UserError: the planner of fewer steps is gone."""
    if s.steps < done:
        raise UserError(f"--steps {s.steps}: {planner_folder(s)} was trained for {done} already; give another --name")


class TrainingRun:
    """The roles of one training (planner, executor, reference policy, reward model), its logs and its checkpoint."""

    def __init__(self, s: TrainSettings, work: Path | None, ranks: "Ranks"):
        self.s, self.work, self.ranks = s, work, ranks
        if work is None:
            return
        self.device = ranks.pick_device(s.device)
        try:
            kernels.check(self.device)
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from None
        run_dir = Path(s.run_dir)
        if s.selected:
            check_selection(run_dir)
        folder = run_dir / ("selected" if s.selected else "groups")
        self.problems = data.read_problems(folder / "train.jsonl")[:s.max_problems or None]
        self.heldout = []
        if s.eval_every:
            self.heldout = data.read_problems(run_dir / "groups" / "heldout.jsonl")[:s.eval_problems]
        if s.exec_score != "binary" and self.problems[0].task_type == "math":
            raise UserError(f"--exec_score {s.exec_score} scores programs; the problems of {run_dir} are math")
        self.load_roles(executor.base_of(run_dir))
        self.rm = None
        if "rm" in REWARDS[s.mode].needs:
            self.rm = RubricRewardModel.from_pretrained(run_dir / "rm", self.device)
            if set(self.rm.dimension_names) != set(data.DIMENSIONS[self.problems[0].task_type]):
                raise UserError(f"{run_dir}/rm judges {', '.join(self.rm.dimension_names)}: it is not for "
                                f"{self.problems[0].task_type}")
        readers = who_reads(self.planner, self.tokenizer, self.executor if "runs" in REWARDS[s.mode].needs else None, s)
        if self.rm:
            readers.append(Reader(self.rm.model, self.rm.tokenizer, data.encode_text, lambda p: data.rm_text(p, ""),
                                  s.max_trace_tokens, "--max_trace_tokens"))
        check_lengths(self.problems + self.heldout, readers)
        self.optimizer = executor.adamw(trained(self.planner).values(), s.learning_rate, betas=(0.9, 0.95),
                                        weight_decay=0.0)
        self.state = {"step": 0, "seconds": 0.0, "planner_tokens": 0}
        if (work / "checkpoint.pt").exists():
            self.load_checkpoint()
        elif ranks.rank == 0:                                             # nothing to continue from: begin afresh
            for name in LOGS:
                (work / name).write_text("")
        self.running, self.seconds = "", {}
        print(f"{work.stem}: on {self.device}, loss by the {kernels.backend(self.device)} kernels")

    def load_roles(self, base: str) -> None:
        """The planner, a copy of the base model or of --init; the frozen executor; with KL the reference policy. With
        LoRA they are one model, which is the base model while the adapter is off; an executor on a server is none of
        them."""
        s = self.s
        self.base, self.lora, loaded = base, None, None
        if s.lora_rank:
            self.planner, self.tokenizer = loaded = executor.load_for(s.run_dir, base, self.device)
        else:
            self.planner, self.tokenizer = executor.load_for(s.run_dir, s.init or base, self.device, torch.float32)
        executor.check_head(self.planner)
        self.reference = self.planner
        if s.beta and not s.lora_rank:
            self.reference = executor.freeze(copy.deepcopy(self.planner))
        self.executor = frozen_executor(s.run_dir, self.device, s, s.exec_score, loaded)
        if s.lora_rank:
            self.lora = executor.Lora(self.planner, s.lora_rank, s.lora_alpha, seed=s.seed)
            print(f"LoRA: the adapted layers hold {self.lora.share:.0%} of the model's weights")
        self.max_cache_tokens = executor.cache_tokens(self.planner, s.max_cache_gib)
        if s.checkpointing:
            executor.enable_checkpointing(self.planner)

    def base_model(self):
        """Inside it, the planner of a LoRA training is the base model again."""
        return self.lora.off() if self.lora else nullcontext()

    def steps(self):
        """The steps that are left, under a progress bar; sets the learning rate of each."""
        if self.work is None:
            return
        begin, end = self.state["step"], self.s.steps
        self.bar = tqdm(range(begin, end), initial=begin, total=end, desc=self.work.stem, mininterval=5,
                        disable=self.ranks.rank > 0)
        for step in self.bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.s.learning_rate * min(1.0, (step + 1) / max(1, self.s.warmup))
            self.seconds = {}
            yield step

    def share(self, problems: list[Problem]) -> list[Problem]:
        """Of a step's N problems those that this process tries: all, unless torchrun has started several."""
        return self.ranks.share(problems, self.s.group_size)

    def num_tokens(self, batch: Batch) -> int:
        """Tokens in the loss of a step, whose mean it is: M, of all processes."""
        return sum(self.ranks.exchange(len(batch.target)))

    def phase(self, name: str) -> None:
        """From here on the time counts for this phase."""
        now = time.perf_counter()
        if self.running:
            self.seconds[f"seconds_{self.running}"] = now - self.since
        self.running, self.since = name, now

    def old_and_reference_logp(self, batch: Batch):
        """Log-probs (M,) of the sampling policy, where more than one update makes it differ, and, for the KL, of the
        reference policy; None where they are not needed."""
        s, old, ref = self.s, None, None
        if s.inner_epochs > 1:
            old = completion_logp(self.planner, batch, s.temperature, s.micro_tokens)
        if s.beta > 0:
            with self.base_model():
                ref = completion_logp(self.reference, batch, s.temperature, s.micro_tokens)
        return old, ref

    def update_weights(self, step: int) -> float:
        """One step of the optimizer. Returns the gradient's norm before clipping. FloatingPointError when it is not
        finite. Several processes take the same step, with the gradient of all."""
        self.ranks.sum_gradients(trained(self.planner).values())
        norm = torch.nn.utils.clip_grad_norm_(self.planner.parameters(), self.s.grad_clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite; {executor.DIVERGED}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, step: int, batch: Batch, rewards: list[Reward], runs: list, updates: list[dict]) -> None:
        """One line of metrics, and about every save_every steps a group to read and a checkpoint. Of several processes
        the first writes, what all have measured, and evaluates, while the others begin the next step; the seconds are
        its own, those of the update with its waiting for the others' rollouts."""
        self.phase("")
        s, state = self.s, self.state
        outcomes = self.ranks.join(outcomes_of(batch, rewards, runs))
        updates = self.ranks.add_up(updates)
        self.ranks.pool(self.executor, batch.problems)
        state["step"] = step + 1
        if self.ranks.rank > 0:
            return
        spent = sum(self.seconds.values())
        tokens = sum(o.tokens for o in outcomes)
        state["seconds"] += spent
        state["planner_tokens"] += tokens
        line = {"step": step, **summarize(outcomes, s.group_size)}
        line |= {key: mean(update[key] for update in updates) for key in updates[0]}
        line |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "tokens_per_second": tokens / spent,
                 **self.executor.spent, "planner_tokens": state["planner_tokens"], "ranks": self.ranks.count,
                 "seconds": state["seconds"], **self.seconds}
        last = step + 1 == s.steps
        if s.eval_every and ((step + 1) % s.eval_every == 0 or last):
            line["heldout_success"] = self.heldout_success()
        append_jsonl(self.work / "metrics.jsonl", [line])
        if step % s.save_every == 0:
            append_jsonl(self.work / "samples.jsonl", samples(step, outcomes[:s.group_size]))
        if (step + 1) % s.save_every == 0 or last:
            self.save_checkpoint()
        shown = {key: line[key] for key in ("reward", "success", "uplift") if line[key] is not None}
        self.bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items()})

    def heldout_success(self) -> float:
        """Success on a few held-out problems, greedy in both roles; what that costs is not counted."""
        s = self.s
        batch = rollout(self.planner, self.tokenizer, self.heldout, 1, 0.0, s.max_trace_tokens, "eval",
                        self.max_cache_tokens)
        greedy = copy.copy(self.executor)                                 # not a new one, which would freeze an adapter
        greedy.temperature, greedy.spent = 0.0, dict(greedy.spent)
        with self.base_model():
            return mean(greedy.success(self.heldout, batch.traces, 1))

    def save_checkpoint(self) -> None:
        """What training has changed, atomically: the weights that learn (with LoRA the adapter's), the optimizer's
        state, the executor's baselines and costs, the number of the step, time and tokens spent, and how long the logs
        are. Not in it: the frozen models, the settings, which lie in settings.json, and generators, since random
        numbers are a function of seed, step, problem and sample."""
        logs = {}
        for name in LOGS:                                                 # on disk before the checkpoint counts on them
            with open(self.work / name, "a") as f:
                os.fsync(f.fileno())
                logs[name] = os.path.getsize(self.work / name)
        saved = {"planner": {name: p.detach() for name, p in trained(self.planner).items()},
                 "optimizer": self.optimizer.state_dict(), "executor": self.executor.state(), "state": self.state,
                 "logs": logs}
        temporary = self.work / "checkpoint.tmp"
        try:
            with data.naming(temporary), open(temporary, "wb") as f:
                torch.save(saved, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.work / "checkpoint.pt")
        except RuntimeError as error:                                     # torch's word for a full disk
            raise OSError(f"{temporary}: cannot be written ({str(error).splitlines()[0]})") from None
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self) -> None:
        """Restores a checkpoint and cuts the logs back to it. UserError for one that cannot be read or does not fit."""
        path = self.work / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, parameter in trained(self.planner).items():
                    parameter.copy_(saved["planner"][name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.executor.load_state(self.ranks.own_part(saved["executor"]))
            self.state, logs = saved["state"], saved["logs"]
            refuse_fewer_steps(self.s, self.state["step"])
        except UserError:
            raise
        except Exception as error:                                        # torch's and pickle's are of all kinds
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path}: cannot be read ({reason}); delete it to begin again") from None
        if self.ranks.rank > 0:
            return
        for name, size in logs.items():
            have = os.path.getsize(self.work / name) if (self.work / name).exists() else 0
            if have < size:
                print(f"{self.work / name}: {size - have} bytes shorter than its checkpoint says; goes on without them",
                      file=sys.stderr)
                drop_half_line(self.work / name)
            else:
                os.truncate(self.work / name, size)

    def saved(self) -> str:
        """What a stop leaves, for a message."""
        if self.work is None or not (self.work / "checkpoint.pt").exists():
            return "nothing is saved yet; the same command begins again"
        return f"{self.work}/checkpoint.pt holds the last saved step; the same command goes on from there"

    def save_planner(self) -> None:
        """Model and tokenizer as a Hugging Face folder; of a LoRA training merged, and its adapter."""
        executor.check_alive(self.planner, f"step {self.state['step'] - 1}")
        with executor.saving(self.work):
            if self.lora:
                self.lora.save(self.work, self.base)
            else:
                self.planner.save_pretrained(self.work)
            self.tokenizer.save_pretrained(self.work)


@dataclass
class Reader:
    """A model that reads texts about problems, and how many tokens a trace and its own output may add."""
    model: torch.nn.Module
    tokenizer: object
    encode: Callable[[object, str], list[int]]
    text_of: Callable[[Problem], str]
    more: int
    flag: str


def who_reads(planner, tokenizer, frozen: Executor | None, s: Settings, traces: int = 1) -> list[Reader]:
    """Planner and executor; a trace may be `traces` times as long as a completion."""
    more = traces * s.max_trace_tokens
    readers = [Reader(planner, tokenizer, data.encode_prompt, data.planner_prompt, more, "--max_trace_tokens")]
    return readers + [executor_reads(frozen, s, more)] if frozen else readers


def executor_reads(frozen: Executor, s: Settings, trace: int) -> Reader:
    """The executor, which may also be on a server; a trace has at most `trace` tokens."""
    return Reader(frozen.model, frozen.tokenizer, data.encode_prompt, lambda p: data.executor_prompt(p, ""),
                  trace + s.max_answer_tokens, "--max_trace_tokens or --max_answer_tokens")


def check_lengths(problems: list[Problem], readers: list[Reader]) -> None:
    """UserError, before anything is sampled or trained, for a problem that a model could not read to its end."""
    for reader in readers:
        context = executor.context_of(reader.model)
        for problem in problems:
            length = len(reader.encode(reader.tokenizer, reader.text_of(problem))) + reader.more
            if length > context:
                raise UserError(f"{problem.problem_id}: its prompt and {reader.more} more tokens are {length}, the "
                                f"context of the model that reads it is {context}; lower {reader.flag} or leave the "
                                "problem out")


def frozen_executor(run_dir, device, s: Settings, exec_score: str = "binary", loaded=None) -> Executor:
    """The executor as the settings want it: on a server, or the base model (`loaded`, where it is there already)."""
    options = {"max_new_tokens": s.max_answer_tokens, "temperature": s.executor_temperature, "exec_score": exec_score,
               "seed": s.seed}
    base = executor.base_of(run_dir)
    if s.executor_model:
        tokenizer = executor.tokenizer_for(run_dir, base)
        return executor.ServedExecutor(s.executor, s.executor_model, base, tokenizer, **options)
    model, tokenizer = loaded or executor.load_for(run_dir, base, device)
    return Executor(model, tokenizer, max_cache_gib=s.max_cache_gib, **options)


def trained(planner) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn: all, or those of the adapter."""
    return {name: p for name, p in planner.named_parameters() if p.requires_grad}


def sample_names(problems: list[Problem], num_samples: int, when: str) -> list[str]:
    """A name for the random numbers of each sample. A problem that comes again in a step counts on."""
    seen, names = Counter(), []
    for problem in problems:
        for _ in range(num_samples):
            number = problem.first_sample + seen[problem.problem_id]
            names.append(f"trace {when} {problem.problem_id} {number}")
            seen[problem.problem_id] += 1
    return names


@dataclass
class Part:
    """One micro-batch: b sequences of a batch, of similar length, and their m scored tokens. Names as in Batch."""
    rows: torch.Tensor            # (b,) which of the B, on the CPU
    ids: torch.Tensor             # (b, T), T of the longest of them
    tokens: torch.Tensor          # (m,) which of the M
    at: torch.Tensor              # (m,) into ids.flatten()
    target: torch.Tensor          # (m,)
    sequence: torch.Tensor        # (m,) numbers among the B, since a micro-batch may cut through a group


def micro_batches(batch: Batch, micro_tokens: int, first: torch.Tensor | None = None) -> list[Part]:
    """Pieces of a batch, as `cut_by_tokens` cuts them. All at once, and sorted out on the CPU: between two pieces the
    host would wait for a GPU."""
    number = batch.scored.flatten().cumsum(dim=0).view_as(batch.scored) - 1      # (B, T): which of the M, where scored
    parts = []
    for chunk in cut_by_tokens(batch.lengths, micro_tokens, first):
        rows, longest = torch.tensor(chunk), max(batch.lengths[b] for b in chunk)
        scored = batch.scored[rows, :longest]
        places = (rows, number[rows, :longest][scored], scored.flatten().nonzero()[:, 0])
        own, tokens, at = [place.to(batch.ids.device, non_blocking=True) for place in places]
        parts.append(Part(rows, batch.ids[own, :longest], tokens, at, batch.target[tokens], batch.sequence[tokens]))
    return parts


def cut_by_tokens(lengths: list[int], micro_tokens: int, first=None) -> list[list[int]]:
    """Numbers of sequences of these lengths (B), in lists of at most `micro_tokens` tokens, padding included, or of one
    sequence. Long ones come before short ones, so that little is padding; those of `first` (B,) bool before all others,
    so that the rest makes pieces without gradient."""
    first = torch.zeros(len(lengths)) if first is None else first
    chunks, longest = [[]], 0
    for b in sorted(range(len(lengths)), key=lambda b: (not first[b], -lengths[b])):
        if chunks[-1] and max(longest, lengths[b]) * (len(chunks[-1]) + 1) > micro_tokens:
            chunks.append([])
            longest = 0
        chunks[-1].append(b)
        longest = max(longest, lengths[b])
    return [sorted(chunk) for chunk in chunks]


class Health:
    """What `accumulate_gradient` returns, added up over micro-batches."""

    def __init__(self, tokens: int, clip_low: float, clip_high: float):
        self.tokens, self.clip_low, self.clip_high = max(1, tokens), clip_low, clip_high
        self.loss, self.sums = 0.0, {"entropy": 0.0, "sampler_gap": 0.0, "kl": None, "clip_share": None}

    def add(self, loss, logp, entropy, A, sampled, old, ref) -> None:
        """All but the loss are rows (m,) of a micro-batch; old and ref may be None."""
        rho = torch.ones_like(logp) if old is None else (logp - old).exp()
        self.loss = self.loss + loss.detach().double()                    # on the device: no wait per micro-batch
        self._add("entropy", entropy)
        self._add("sampler_gap", (logp - sampled).abs())
        if ref is not None:
            gap = ref - logp
            self._add("kl", rho * (torch.expm1(gap) - gap))               # rho: the tokens came from the older policy
        if old is not None:
            self._add("clip_share", (rho < 1 - self.clip_low) & (A < 0) | (rho > 1 + self.clip_high) & (A > 0))

    def _add(self, name: str, values: torch.Tensor) -> None:
        self.sums[name] = (self.sums[name] or 0.0) + values.sum().double() / self.tokens

    def means(self) -> dict:
        """{metric: mean over the tokens, None where not measured}; of the loss the sum, whose weights are the mean."""
        return {name: None if x is None else float(x) for name, x in {"loss": self.loss, **self.sums}.items()}


@torch.no_grad()
def completion_logp(model, batch: Batch, temperature: float, micro_tokens: int) -> torch.Tensor:
    """Log-probs (M,) of the scored tokens under a model, at the sampling temperature."""
    found = torch.zeros_like(batch.sampled)
    for part in micro_batches(batch, micro_tokens):
        with executor.autocast(model):
            logits = executor.token_logits(model, part.ids, part.at)                           # (m, V)
        found[part.tokens] = kernels.token_logp(logits, part.target, temperature)[0]
    return found


def mean(values) -> float | None:
    """The mean of the values that were measured; None when none was."""
    values = [float(v) for v in values if v is not None]
    return sum(values) / len(values) if values else None


@dataclass
class Outcome:
    """What became of one trace, to be written down."""
    problem: Problem
    trace: str
    closed: bool                  # as in Batch, like `truncated`
    truncated: bool
    tokens: int                   # of the completion
    reward: Reward
    runs: list[Run]


def outcomes_of(batch: Batch, rewards: list[Reward], runs: list[list[Run]]) -> list[Outcome]:
    """One record for each of the B traces."""
    lengths = map(len, batch.completions.tokens)
    columns = (batch.problems, batch.traces, batch.closed, batch.truncated, lengths, rewards, runs)
    return [Outcome(*row) for row in zip(*columns, strict=True)]


def summarize(outcomes: list[Outcome], group_size: int) -> dict:
    """Metrics of a step over its B traces; None where the mode or the data does not tell."""
    rewards = [o.reward for o in outcomes]
    totals = [r.total for r in rewards]
    groups = [totals[i:i + group_size] for i in range(0, len(totals), group_size)]
    baselines = [r.without_trace / r.repeats for r in rewards if r.without_trace is not None]
    checks = [c for c in (data.check_trace(o.problem, o.trace) for o in outcomes) if c is not None]
    right_metric = data.source_of(outcomes[0].problem).right_metric       # faithful in the tiny world
    return {
        "reward": mean(totals),
        "success": mean(o.runs[0].ok if o.runs else None for o in outcomes),   # of the one run that is e2e
        "e2e": mean(r.e2e for r in rewards),                              # its score: partial for programs
        "uplift": mean(r.uplift for r in rewards),                        # success with minus without the trace
        "rm": mean(r.rm for r in rewards),                                # reward model score
        "without_trace": mean(baselines),                                 # the success that uplift subtracts
        right_metric: mean(right for right, _ in checks),                 # every step, or calculation that it states
        "leak": mean(leak for _, leak in checks),                         # states the final result, or the code
        "groups_without_spread": mean(max(g) == min(g) for g in groups),  # all rewards equal: no gradient
        "reward_spread": mean(statistics.pstdev(g) for g in groups),      # standard deviation inside a group
        "unclosed": mean(not o.closed for o in outcomes),                 # no </reasoning>
        "truncated": mean(o.truncated for o in outcomes),                 # cut at the limit
        "trace_tokens": mean(o.tokens for o in outcomes),
        "longest_trace": max(o.tokens for o in outcomes)}


def samples(step: int, group: list[Outcome]) -> list[dict]:
    """A problem's group, for a person to read."""
    return [{"step": step, "problem": o.problem.problem, "trace": o.trace, **asdict(o.reward),
             "outputs": [run.output for run in o.runs]} for o in group]


LOGS = ("metrics.jsonl", "samples.jsonl")


def drop_half_line(path: Path) -> None:
    """Ends a log, which a power cut may have left in the middle of a line, after its last whole one."""
    text = path.read_bytes() if path.exists() else b""
    path.write_bytes(text[:text.rfind(b"\n") + 1])


def append_jsonl(path: Path, records: list[dict]) -> None:
    """Appends records; a reader of a running training sees whole lines."""
    with data.naming(path), open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r) + "\n" for r in records))


# ---- several processes
#
# `torchrun --nproc_per_node=R tracelift.py train ...` starts R equal processes, the ranks, also on several machines.
# Each takes its share of a step's problems from rollout to gradient. Groups stay whole, so rewards and advantages need
# nobody else; what goes from rank to rank in a step is the number of tokens that the loss is divided by, the gradients,
# which are summed, and what rank 0 writes down. Weights and optimizer state are whole on every rank, and stay equal:
# all ranks begin with the same and take the same steps. What is drawn depends on seed, step, problem and sample, not on
# the rank. A rank that fails says why and ends; torchrun, or a connection that closes, stops the others.

import torch.distributed as dist

BUCKET = 2**24                    # numbers of a gradient that are summed at a time: 64 MiB in float32
PATIENCE = 5                      # seconds in which torchrun stops a process after another one has ended


class Ranks:
    """The processes that train one planner. Without torchrun there is one, rank 0 of 1, which talks to nobody.

    What all ranks have to call, and in the same order: exchange, and whatever uses it."""

    def __init__(self):
        self.rank, self.count = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def exchange(self, value) -> list:
        """The values of all ranks, in their order, on every rank. Small ones: they are pickled."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            with self.together():
                dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self):
        """For what needs all ranks. ConnectionError where one is gone, unless torchrun, which knows whose fault it is,
        stops this process first."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(PATIENCE)
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"rank {self.rank}: another rank failed or cannot be reached ({reason})") from None

    def join(self, rows: list) -> list:
        """The lists of all ranks, one behind the other."""
        return [row for rows in self.exchange(rows) for row in rows]

    def share(self, problems: list[Problem], group_size: int) -> list[Problem]:
        """This rank's part of a step's problems, neighbours; the parts differ by one at most. Where a problem comes
        twice in the step, its samples are counted over all ranks, since their numbers decide what is drawn."""
        begin = len(problems) * self.rank // self.count
        end = len(problems) * (self.rank + 1) // self.count
        before = Counter(p.problem_id for p in problems[:begin])
        return [replace(p, first_sample=before[p.problem_id] * group_size) for p in problems[begin:end]]

    def pick_device(self, asked: str) -> torch.device:
        """executor.pick_device, but for each rank of a machine another GPU."""
        if self.count > 1:
            if ":" in asked:
                raise UserError(f"--device {asked}: would be the same for all processes of torchrun; leave it out")
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            if asked != "cpu" and torch.cuda.is_available():
                if local >= torch.cuda.device_count():
                    raise UserError(f"rank {self.rank}: no GPU is left for it, this machine has "
                                    f"{torch.cuda.device_count()}; lower --nproc_per_node")
                asked = f"cuda:{local}"
        return executor.pick_device(asked)

    def check_equal(self, inputs: dict[str, str], step: int, planner) -> None:
        """UserError where ranks begin with different things, as machines do that have a run folder each."""
        norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float64).item() for p in trained(planner).values()]
        size = math.fsum(norms)
        for rank, (their_inputs, their_step, their_size) in enumerate(self.exchange((inputs, step, size))):
            if (their_inputs, their_step) != (inputs, step) or not math.isclose(their_size, size, rel_tol=1e-6):
                raise UserError(f"rank {rank} has read other files than rank {self.rank}: --run_dir must be one folder "
                                "that all machines share")

    def sum_gradients(self, parameters) -> None:
        """Every parameter's gradient becomes the sum over all ranks, BUCKET numbers at a time. On a rank without one
        (no group with spread, an expert that no token went to) it counts as 0; without one on any rank it stays None,
        so that the optimizer leaves weight and momentum alone."""
        if self.count == 1:
            return
        parameters = list(parameters)
        has_one = self.exchange([p.grad is not None for p in parameters])
        pieces = []
        for parameter, has in zip(parameters, zip(*has_one)):
            if any(has):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                pieces += parameter.grad.view(-1).split(BUCKET)
        for bucket in buckets(pieces, BUCKET):
            total = torch.cat(bucket)
            with self.together():
                dist.all_reduce(total)
            for piece, summed in zip(bucket, total.split([len(piece) for piece in bucket])):
                piece.copy_(summed)

    def add_up(self, updates: list[dict]) -> list[dict]:
        """The health of each update over all ranks, whose means are over the tokens of all, so that they add up; the
        norm is that of the summed gradient already."""
        first, *others = self.exchange(updates)
        for other in others:
            for own, more in zip(first, other):
                for name in own.keys() - {"grad_norm"}:
                    own[name] = None if own[name] is None else own[name] + more[name]
        return first

    def pool(self, frozen: Executor, problems: list[Problem]) -> None:
        """After a step, baselines that one rank's executor has measured are known to all; the costs of all are counted
        on rank 0, whose checkpoint serves any number of ranks."""
        state, ids = frozen.state(), {p.problem_id for p in problems}
        new = {name: count for name, count in state["baseline"].items() if name[0] in ids}
        others = self.exchange((new, state["spent"]))
        for baseline, _ in reversed(others):                              # measured twice in a step: the lowest rank's
            state["baseline"] |= baseline
        state["spent"] = {name: sum(spent[name] for _, spent in others) for name in state["spent"]}
        frozen.load_state(self.own_part(state))

    def own_part(self, state: dict) -> dict:
        """Of an executor's state what this rank goes on with: all baselines, but costs on rank 0 only."""
        spent = {name: count if self.rank == 0 else 0 for name, count in state["spent"].items()}
        return {**state, "spent": spent}


def buckets(pieces: list[torch.Tensor], limit: int):
    """Lists of neighbouring pieces, together of at most `limit` numbers."""
    bucket, size = [], 0
    for piece in pieces:
        if bucket and size + len(piece) > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += len(piece)
    if bucket:
        yield bucket


@contextmanager
def torchrun():
    """Ranks that have found each other, where torchrun has started this process; else the only one. Rank 0 speaks for
    all: of the others only a line on why one of them failed is seen, and only if rank 0 did not fail too."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"WORLD_SIZE is set, but the processes do not find each other ({reason}); start them with "
                        "torchrun, or unset it") from None
    ranks = Ranks()
    with open(os.devnull, "w") as nothing, redirect_stdout(sys.stdout if ranks.rank == 0 else nothing):
        try:
            try:
                yield ranks
            except Exception:
                if ranks.rank > 0:
                    time.sleep(PATIENCE)              # rank 0 may have ended with the same line, which is enough
                    print(file=sys.stderr)            # rank 0's progress bar may be on this line
                raise
        except KeyboardInterrupt:
            if ranks.rank > 0:
                sys.exit(130)
            raise
    dist.destroy_process_group()


def settings_of_rank_0(ranks: Ranks, argv: list[str]) -> TrainSettings | None:
    """Rank 0 reads the command line for all, so that a mistake in it is said once; the others then get None."""
    s = None
    try:
        if ranks.rank == 0:
            s = data.parse_settings(TrainSettings, argv, "tracelift.py train")
    finally:
        s = ranks.exchange(s)[0]
    return s


# ------------------------------------------------------------------------------------------ 7. evaluation, inspect


@dataclass(frozen=True)
class EvalSettings:
    """Settings of `python tracelift.py evaluate`. Lengths, the executor and its temperature are those that a planner
    was trained with."""
    run_dir: str = knob("runs/tiny-math", "run folder", affects_result=False)
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one", affects_result=False)
    seed: int = knob(0, "of the sampling", low=0)
    problems: int = knob(300, "held-out problems per row", low=1)
    executor: str = knob("", "URL of the executor's server, where it is not the one of the training",
                         affects_result=False)


@dataclass(frozen=True)
class InspectSettings:
    """Settings of `python tracelift.py inspect`."""
    run_dir: str = knob("runs/tiny-math", "run folder")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    seed: int = knob(0, "which problem, and the sampling", low=0)
    traces: int = knob(3, "to show", low=2)
    planner: str = knob("", "folder name of a planner in the run; empty: the base model")
    executor: str = knob("", "URL of the executor's server, where it is not the one of the training")


def sampling_settings(folder: Path, run_dir: Path) -> Settings:
    """How a planner's traces and the executor's outputs were drawn in its training. For the base model: as for the
    run's first planner, else as in its own check."""
    folders = [folder]
    if folder == run_dir / "base":
        folders = [*sorted(run_dir.glob("planner-*-seed*[0-9]")), folder]
    made = [path for path in folders if (path / "settings.json").exists()]
    known = data.read_settings(made[0]) if made else {}
    names = {f.name for f in fields(Settings)} - {"run_dir", "device", "seed"}
    return known_settings(Settings, {name: known[name] for name in names if name in known}, made[0] if made else folder)


def with_server(made: list[Settings], url: str) -> list[Settings]:
    """The settings of trainings, where they have a server with another URL of it. UserError where none has one."""
    executor.check_server_flags(url, url)
    if url and not any(how.executor_model for how in made):
        raise UserError("--executor has no effect: what is measured here was trained with an executor in process; "
                        "leave it out")
    return [replace(how, executor=url) if url and how.executor_model else how for how in made]


def known_settings(cls, known: dict, folder: Path):
    """An instance of a settings class with values from a settings.json. UserError for one that no flag could have."""
    try:
        found = cls(**known)
        data.check_settings(found)
    except (TypeError, UserError) as error:
        raise UserError(f"{folder}/settings.json: damaged ({error}); mend it, or delete {folder}") from None
    return found


def load_planner(folder, run_dir, device):
    """(model, tokenizer) of a planner in float32, or of one with an adapter as it was trained, on the base model:
    merged into bfloat16 weights most of a small adapter would be rounded away."""
    adapter = Path(folder) / "adapter"
    if not adapter.is_dir():
        return executor.load_for(run_dir, folder, device, torch.float32)
    model, tokenizer = executor.load_for(run_dir, executor.base_of(run_dir), device)
    executor.Lora.load(model, adapter)
    return model, tokenizer


def evaluate(s: EvalSettings) -> dict[str, dict]:
    """Measures every planner of a run on held-out problems, greedy and at temperature 1, beside the base planner, the
    reference traces and no trace. A folder whose results.json tells of the same settings, problems and base model is
    measured already. Writes results.md."""
    data.check_settings(s)
    run_dir, device = Path(s.run_dir), executor.pick_device(s.device)
    base = executor.base_of(run_dir)
    splits = {}
    for split in ("heldout", "longer"):
        path = run_dir / "groups" / f"{split}.jsonl"
        if split == "heldout" or path.exists():
            splits[split] = data.read_problems(path)[:s.problems]
    planners = sorted(run_dir.glob("planner-*-seed*[0-9]"))
    for folder in planners:
        data.read_settings(folder)                                        # without them nobody knows how it was trained
    read = data.fingerprints(run_dir, *(f"groups/{split}.jsonl" for split in splits), "base/base.json")
    folders = [run_dir / "base", *sorted(run_dir.glob("int")), *planners]
    made = with_server([sampling_settings(folder, run_dir) for folder in folders], s.executor)
    results, loaded = {}, None
    for folder, how in zip(tqdm(folders, desc="evaluate"), made):
        where = {"run_dir": "", "device": "", "executor": ""}              # no matter where
        asked = {"problems": s.problems, "seed": s.seed, **asdict(replace(how, **where)), "inputs": read}
        known = read_results(folder, asked)
        if known is None:
            if not how.executor_model:
                loaded = loaded or executor.load_for(run_dir, base, device)
            frozen = frozen_executor(run_dir, device, replace(how, seed=s.seed), loaded=loaded)
            for problems in splits.values():
                check_lengths(problems, [executor_reads(frozen, how, how.max_trace_tokens)])
            rows = {}
            if folder.name == "base":
                rows["no trace"] = {f"{name} T=0": success_of(frozen, problems, None, name)
                                    for name, problems in splits.items()}
                if all(p.reference_reasoning for problems in splits.values() for p in problems):
                    rows["reference trace"] = {
                        f"{name} T=0": success_of(frozen, problems, [p.reference_reasoning for p in problems], name)
                        for name, problems in splits.items()}
            name = {"base": "base planner", "int": "InT"}.get(folder.name, folder.name)
            own = base if folder.name == "base" else folder
            rows[name] = evaluate_planner(own, run_dir, device, splits, frozen, how, s.seed)
            if folder in planners:
                rows[name]["cost"] = training_cost(folder / "metrics.jsonl")
            known = {"settings": asked, "rows": rows}
            data.write_atomic(folder / "results.json", json.dumps(known, indent=1))
        results |= known["rows"]
    data.write_atomic(run_dir / "results.md", table(results))
    return results


def read_results(folder: Path, asked: dict) -> dict | None:
    """What an evaluation with these settings left in a folder; None where there is none."""
    path = folder / "results.json"
    if not path.exists():
        return None
    known = data.read_json(path, "delete it and evaluate again", "settings", "rows")
    rows = known["rows"]
    if not (isinstance(rows, dict) and rows and all(isinstance(row, dict) and row for row in rows.values())):
        raise UserError(f"{path}: damaged (rows is {rows!r:.40}); delete it and evaluate again")
    return known if known["settings"] == asked else None


def training_cost(log: Path) -> dict:
    """COSTS of a whole training, from the last line of its metrics.jsonl."""
    try:
        last = json.loads(log.read_text().splitlines()[-1])
        return {key: last["step"] + 1 if key == "steps" else last[key] for key in COSTS}
    except FileNotFoundError:
        raise UserError(f"{log}: missing, so nobody knows what that training cost; put it back, or delete {log.parent}"
                        ) from None
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{log}: its last line is damaged ({error!r}); delete that line") from None


def evaluate_planner(folder, run_dir: Path, device, splits: dict[str, list[Problem]], frozen: Executor, how: Settings,
                     seed: int) -> dict:
    """Measures one planner on every split, greedy and at temperature 1."""
    planner, tokenizer = load_planner(folder, run_dir, device)
    for problems in splits.values():
        check_lengths(problems, who_reads(planner, tokenizer, frozen, how))
    limit = executor.cache_tokens(planner, how.max_cache_gib)
    found = {}
    for split, problems in splits.items():
        for temperature in (0.0, 1.0):
            key = f"{split} T={temperature:g}"
            batch = rollout(planner, tokenizer, problems, 1, temperature, how.max_trace_tokens, f"{seed} {key}", limit)
            found[key] = success_of(frozen, problems, batch.traces, key)
            found[key]["unclosed"] = mean(not closed for closed in batch.closed)
    return found


def success_of(frozen: Executor, problems: list[Problem], traces: list[str] | None, when: str) -> dict:
    """success of one executor run a problem, and where `data.check_trace` can tell (tiny world, GSM8K) faithful or
    calculations_right, in the tiny world right_for_wrong_reason, and leak, as shares of the traces."""
    success = frozen.success(problems, traces, 1, when)
    found = {"problems": len(problems), "success": mean(success)}
    checks = [data.check_trace(problem, trace) for problem, trace in zip(problems, traces or [])]
    if checks and None not in checks:
        right_metric = data.source_of(problems[0]).right_metric
        found[right_metric] = mean(right for right, _ in checks)
        if right_metric == "faithful":                                    # right calculations alone are no reason
            found["right_for_wrong_reason"] = mean(ok and not right for ok, (right, _) in zip(success, checks))
        found["leak"] = mean(leak for _, leak in checks)
    return found


METRICS = ("success", "faithful", "calculations_right", "right_for_wrong_reason", "leak", "unclosed")
COSTS = ("steps", "planner_tokens", "executor_prompt_tokens", "executor_tokens", "program_runs", "seconds")


def table(results: dict[str, dict]) -> str:
    """Results as Markdown: a table of METRICS per split and temperature, one row per planner name (mean over seeds and,
    with several, ± their sample standard deviation), then what training each planner cost."""
    names: dict[str, list[dict]] = {}
    for row, entry in results.items():
        name = row.removeprefix("planner-").rpartition("-seed")[0] or row
        names.setdefault(name.replace("-after-InT", " after InT"), []).append(entry)
    lines = []
    for key in sorted(key for key in results["base planner"] if " T=" in key):
        metrics = [m for m in METRICS if any(m in entry.get(key, {}) for entry in results.values())]
        split, temperature = key.split(" T=")
        count = results["base planner"][key]["problems"]
        how = "greedy" if temperature == "0" else f"sampled at temperature {temperature}"
        lines += [f"{split} problems ({count}), traces {how}:", ""]
        lines += [markdown_row(["traces from", "seeds", *(m.replace("_", " ") for m in metrics)])]
        lines += ["|---" * (len(metrics) + 2) + "|"]
        for name, entries in names.items():
            measured = [e[key if key in e else f"{split} T=0"] for e in entries]       # no planner: nothing is sampled
            seeds = len(entries) if "cost" in entries[0] else ""
            lines.append(markdown_row([name, seeds, *(spread([m.get(x) for m in measured]) for x in metrics)]))
        lines.append("")
    lines += ["cost of training (mean over seeds):", ""]
    lines += [markdown_row(["reward", *(c.replace("_", " ") for c in COSTS)]), "|---" * (len(COSTS) + 1) + "|"]
    for name, entries in names.items():
        if "cost" in entries[0]:
            lines.append(markdown_row([name, *(f"{mean(e['cost'][c] for e in entries):,.0f}" for c in COSTS)]))
    return "\n".join(lines) + "\n"


def markdown_row(cells) -> str:
    """| a | b |"""
    return "| " + " | ".join(map(str, cells)) + " |"


def spread(values: list) -> str:
    """The mean, as "0.81", or for several seeds "0.81 ± 0.02" (sample standard deviation)."""
    if any(v is None for v in values):
        return ""
    return f"{mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def inspect(s: InspectSettings) -> str:
    """One held-out problem and its traces, from the executor's runs to the advantage, and one trace token by token, as
    text for a person to read. At the end of a line stands what computed it."""
    data.check_settings(s)
    run_dir, device = Path(s.run_dir), executor.pick_device(s.device)
    problems = data.read_problems(run_dir / "groups" / "heldout.jsonl")
    problem = problems[s.seed % len(problems)]
    base = executor.base_of(run_dir)
    folder = run_dir / (s.planner or "base")
    if not folder.is_dir():
        raise UserError(f"--planner {s.planner}: there is no folder {folder}; leave it out, or name one that is there")
    how = replace(with_server([sampling_settings(folder, run_dir)], s.executor)[0], seed=s.seed)
    planner, own_tokenizer = load_planner(folder if s.planner else base, run_dir, device)
    frozen = frozen_executor(run_dir, device, how)
    check_lengths([problem], who_reads(planner, own_tokenizer, frozen, how))
    rm, mode = None, "uplift_only"                                        # HumanEval and MBPP have no reward model
    if (run_dir / "rm").exists():
        rm, mode = RubricRewardModel.from_pretrained(run_dir / "rm", device), "tracelift"
    usual = reward_settings(folder)
    batch = rollout(planner, own_tokenizer, [problem], s.traces, usual.temperature, how.max_trace_tokens,
                    f"{s.seed} inspect")
    rewards, runs = measure_rewards(batch.problems, batch.traces, frozen, rm, mode, usual.repeats, usual.w_e, usual.w_r,
                                    "inspect")
    advantage = kernels.group_advantage(torch.tensor([r.total for r in rewards]), s.traces,
                                        scale=usual.scale == "std").tolist()

    def show(run: Run) -> str:
        return f"{run.output.strip()!r} {'right' if run.ok else 'wrong'}"

    lines = [f"problem      {problem.problem}", f"reference    {problem.reference_reasoning}"]
    lines += [f"no trace     {show(run)}" for run in frozen.run([problem], None, usual.repeats)[0]]
    lines[-1] += "    [Executor.run, verify]"
    for i, (trace, r) in enumerate(zip(batch.traces, rewards)):
        lines += ["", f"trace {i}      {trace}"]
        if data.check_trace(problem, trace):
            right, leak = data.check_trace(problem, trace)
            name = data.source_of(problem).right_metric.replace("_", " ")
            lines += [f"  truth      {name}: {right}, leak: {leak}    [data.check_trace]"]
        lines += [f"  e2e        {show(runs[i][0])}    [Executor.run, verify]"]
        lines += [f"  with it    {show(run)}" for run in runs[i][1:]]
        lines += [f"  uplift     ({r.with_trace} with - {r.without_trace} without) / {r.repeats} = {r.uplift:+.2f}"
                  "    [measure_rewards]"]
        quality = ""
        if rm:
            labels = rm.score([data.rm_text(problem, trace)])[1][0].tolist()
            named = ", ".join(f"{name} {label:.1f}" for name, label in zip(rm.dimension_names, labels))
            lines += [f"  rm         {r.rm:.2f}: {named}    [RubricRewardModel.score]"]
            quality = f" * {r.rm:.2f}"
        lines += [f"  reward     {usual.w_e:g} * {r.e2e:g} + {usual.w_r:g}{quality} * {r.uplift:+.2f} = {r.total:.3f}"
                  f"    [{REWARDS[mode].total.__name__}]",
                  f"  advantage  {advantage[i]:+.2f}    [kernels.group_advantage]"]
    return "\n".join(lines + [""] + token_lines(planner, own_tokenizer, batch, advantage, usual.temperature))


def reward_settings(folder: Path) -> TrainSettings:
    """Weights, runs and temperature that a planner was trained with; defaults for one that was not trained here, and
    for what its mode does not use."""
    known = data.read_settings(folder) if (folder / "settings.json").exists() else {}
    if "mode" not in known:
        return TrainSettings()
    names = ("repeats", "w_e", "w_r", "temperature", "scale")
    return known_settings(TrainSettings, {name: known[name] for name in names if name in known}, folder)


def token_lines(planner, tokenizer, batch: Batch, advantage: list[float], temperature: float) -> list[str]:
    """The tokens of the first trace: whether their log-prob is in the loss, with which weight and advantage."""
    weight = kernels.token_weights(batch.scored)[batch.scored].tolist()
    scored = completion_logp(planner, batch, temperature, batch.ids.numel()).tolist()
    tokens = batch.completions.tokens[0]
    prompt = int(batch.scored[0].nonzero()[0]) + 1
    lines = [f"trace 0, token by token ({len(scored)} tokens of {len(batch.ids)} traces are in the loss):",
             f"{'token':18}{'in loss':>9}{'weight':>10}{'A':>8}{'log-prob sampled':>19}{'scored':>9}",
             f"{f'{prompt} of the prompt':18}{'no':>9}"]
    for i, token in enumerate(tokens):
        text = repr(tokenizer.decode([token]))
        lines.append(f"{text:18}{'yes':>9}{weight[i]:>10.5f}{advantage[0]:>+8.2f}"
                     f"{batch.completions.logprobs[0][i]:>19.3f}{scored[i]:>9.3f}")
    padding = batch.ids.shape[1] - prompt - len(tokens)
    return lines + [f"{f'{padding} of padding':18}{'no':>9}    [Batch, kernels.token_weights, kernels.token_logp]"]


# ------------------------------------------------------------------------------------------ 8. InT
#
# A warm start for the planner (arXiv 2601.14209): reward on a whole trace also punishes the right steps before the
# first wrong one. Checking against a reference is easier than solving, so the planner itself names the first wrong step
# of its failed trace and proposes another step; it learns (its own steps before) + (that step), and nothing after it.


@dataclass(frozen=True)
class IntSettings(Settings):
    """Settings of `python tracelift.py int`."""
    problems: int = knob(200, "training problems to sample traces of", low=1)
    group_size: int = knob(8, "traces per problem", low=2)
    proposals: int = knob(16, "interventions sampled for each failed trace; the best one that passes is kept", low=1)
    proposal_temperature: float = knob(0.7, "of the interventions", low=0)
    first_step: str = knob("keep", "interventions in the first step, whose prefix is empty: keep or drop",
                           choices=("keep", "drop"))
    answers: str = knob("drop", "interventions that state the final answer: drop or keep", choices=("drop", "keep"))
    repeats: int = knob(3, "K, executor runs behind each success rate", low=1)
    temperature: float = knob(1.0, "of the planner's traces and continuations", above=0)
    epochs: float = knob(4.0, "of fine-tuning, at most; the held-out loss may stop it", above=0)
    batch_size: int = knob(16, "sequences per step of fine-tuning", low=1)
    learning_rate: float = knob(3e-4, "peak of fine-tuning, AdamW; for the tiny model", above=0)
    checkpointing: int = knob(0, "1: recompute activations in the backward pass", choices=(0, 1), affects_result=False)


VERDICTS = ("not in the format", "none: no error found", "index out of range", "stop: no step", "repeats the step",
            "empty prefix", "states the answer", "never succeeds", "succeeds less than a resampled step", "passed")


@dataclass
class Collector:
    """Who takes part in collecting interventions."""
    planner: torch.nn.Module
    tokenizer: object
    frozen: Executor
    s: IntSettings

    def write(self, prompts: list[list[int]], num_samples: int, temperature: float, names: list[str]):
        """Completions of the planner: (tokens, texts)."""
        s = self.s
        limit = executor.cache_tokens(self.planner, s.max_cache_gib)
        completions, texts = complete(self.planner, self.tokenizer, prompts, num_samples, temperature,
                                      s.max_trace_tokens, names, limit)
        return completions.tokens, texts

    def success_from(self, problems: list[Problem], beginnings: list[str], when: str, known: dict) -> list[float]:
        """Success of the frozen executor on traces that the planner continues from these beginnings, K of them each.
        Every beginning is measured once: `known` {(problem_id, beginning): success} is read and filled."""
        K = self.s.repeats
        new = {(p.problem_id, b): p for p, b in zip(problems, beginnings) if (p.problem_id, b) not in known}
        begun = [begin_trace(self.tokenizer, beginning) for _, beginning in new]
        prompts = [data.encode_prompt(self.tokenizer, data.planner_prompt(problem)) for problem in new.values()]
        names = [f"continue {self.s.seed} {when} {name} {k}" for name in new for k in range(K)]
        tokens, _ = self.write([p + b for p, b in zip(prompts, begun)], K, self.s.temperature, names)
        whole = [begun[i // K] + continuation for i, continuation in enumerate(tokens)]       # decoded together
        traces = [data.extract_reasoning(text) for text in executor.decode_text(self.tokenizer, whole)]
        repeated = [problem for problem in new.values() for _ in range(K)]
        ok = self.frozen.success(repeated, traces, 1, f"continue {when}")
        for i, name in enumerate(new):
            known[name] = sum(ok[i * K:(i + 1) * K]) / K
        return [known[p.problem_id, b] for p, b in zip(problems, beginnings)]


def begin_trace(tokenizer, beginning: str) -> list[int]:
    """Token ids of the beginning of a completion. Control tokens that it spells are letters, as in every prompt."""
    text, template = data.OPEN + beginning, getattr(tokenizer, "chat_template", None)
    if not template:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return data.encode_letters(tokenizer, text, str(template))


def states_answer(problem: Problem, step: str) -> bool:
    """Whether a step gives the final answer (math) or the program (code) away. InT's paper wants it out: the executor
    would only have to copy it."""
    truth = data.check_trace(problem, step)
    if truth is not None:
        return truth[1]
    if problem.task_type == "code":
        return "```" in step or re.search(r"^\s*(def|return|import) ", step, re.MULTILINE) is not None
    return data.gives_number(problem, step)


def sort_out(problem: Problem, trace: str, completion: str, first_step: str = "keep",
             answers: str = "drop") -> tuple[str, int, str]:
    """(verdict, index, step) of one intervention, as far as its text tells. "proposed" ones are tried out next."""
    steps, parsed = data.split_steps(problem, trace), data.parse_intervention(completion)
    if parsed is None:
        return "not in the format", 0, ""
    index, step = parsed
    if index == 0 and not step:
        return "none: no error found", 0, ""
    if not 1 <= index <= len(steps) + 1:
        return "index out of range", index, step
    if data.is_no_step(problem, step):                                       # right or wrong, there is nothing to learn
        return "stop: no step", index, step
    if index <= len(steps) and step == steps[index - 1]:
        return "repeats the step", index, step
    if index == 1 and first_step == "drop":
        return "empty prefix", index, step
    if answers == "drop" and states_answer(problem, step):           # else these succeed most, and are chosen
        return "states the answer", index, step
    return "proposed", index, step


def choose(proposals: list[dict]) -> dict | None:
    """Of the proposals that succeed at least as often as a resampled step, and at all: the most successful, then the
    most often sampled one. The verdict of the others becomes what speaks against them. (0 of K is at least as often
    as 0 of K, but most interventions that get there are wrong.)"""
    for p in proposals:
        if p["verdict"] == "proposed" and p["success"] == 0:
            p["verdict"] = "never succeeds"
        elif p["verdict"] == "proposed":
            worse = p["success"] < p["resampled"]
            p["verdict"] = "succeeds less than a resampled step" if worse else "passed"
    passed = [p for p in proposals if p["verdict"] == "passed"]
    return max(passed, key=lambda p: (p["success"], p["times"])) if passed else None


def failed_traces(c: Collector, problems: list[Problem]) -> list[dict]:
    """One record for each trace without success in K executor runs."""
    s, records = c.s, []
    limit = executor.cache_tokens(c.planner, s.max_cache_gib)
    for i in tqdm(range(0, len(problems), 50), desc="traces"):
        batch = rollout(c.planner, c.tokenizer, problems[i:i + 50], s.group_size, s.temperature, s.max_trace_tokens,
                        f"{s.seed} int", limit)
        runs = c.frozen.run(batch.problems, batch.traces, s.repeats, "int")
        for problem, trace, own in zip(batch.problems, batch.traces, runs):
            if any(run.ok for run in own):
                continue
            reason = None
            if not data.split_steps(problem, trace):
                reason = "cannot be split"
            elif problem.reference_reasoning is None:
                reason = "no reference reasoning"
            records.append({"problem_id": problem.problem_id, "problem": problem.problem, "trace": trace,
                            "reference": problem.reference_reasoning, "left_out": reason, "proposals": [],
                            "chosen": None})
    return records


def collect(c: Collector, problems: list[Problem]) -> list[dict]:
    """The failed traces with their interventions and the one that was chosen."""
    s, by_id, known = c.s, {p.problem_id: p for p in problems}, {}
    records = failed_traces(c, problems)
    asked = [r for r in records if not r["left_out"]]
    prompts = [data.intervention_prompt(by_id[r["problem_id"]], r["trace"]) for r in asked]
    names = [f"intervention {s.seed} {i} {k}" for i in range(len(asked)) for k in range(s.proposals)]
    prompts = [data.encode_prompt(c.tokenizer, prompt) for prompt in prompts]
    _, texts = c.write(prompts, s.proposals, s.proposal_temperature, names)
    for i in tqdm(range(0, len(asked), 50), desc="interventions"):
        tried = []                                                        # (problem, trace, proposal), to try out
        for j, record in enumerate(asked[i:i + 50], i):
            problem = by_id[record["problem_id"]]
            sampled = Counter(text.strip() for text in texts[j * s.proposals:(j + 1) * s.proposals])
            for text, times in sampled.items():
                verdict, index, step = sort_out(problem, record["trace"], text, s.first_step, s.answers)
                proposal = {"text": text, "times": times, "verdict": verdict, "index": index, "step": step}
                record["proposals"].append(proposal)
                if verdict == "proposed":
                    tried.append((problem, record["trace"], proposal))
        of = [problem for problem, _, _ in tried]
        mended = [data.splice(p, trace, x["index"], x["step"]) for p, trace, x in tried]
        cut = [data.splice(p, trace, x["index"]) for p, trace, x in tried]
        success = c.success_from(of, mended, f"{i} mended", known)
        resampled = c.success_from(of, cut, f"{i} cut", known)
        for (_, _, proposal), a, b in zip(tried, success, resampled):
            proposal |= {"success": a, "resampled": b}
        for record in asked[i:i + 50]:
            record["chosen"] = choose(record["proposals"])
    measure_again(c, records, by_id)
    return records


def measure_again(c: Collector, records: list[dict], by_id: dict[str, Problem]) -> None:
    """Success from the chosen interventions, from the wrong step itself and from a resampled one, in new samples: the
    choice favoured the lucky."""
    chosen = [(by_id[r["problem_id"]], r, r["chosen"]) for r in records if r["chosen"]]
    of, known = [problem for problem, _, _ in chosen], {}
    beginnings = {"intervention": [data.splice(p, r["trace"], x["index"], x["step"]) for p, r, x in chosen],
                  "error": [through_the_error(p, r["trace"], x["index"]) for p, r, x in chosen],
                  "resampled step": [data.splice(p, r["trace"], x["index"]) for p, r, x in chosen]}
    for name, begun in beginnings.items():
        for (_, record, _), value in zip(chosen, c.success_from(of, begun, f"again {name}", known)):
            record.setdefault("success_from", {})[name] = value


def through_the_error(problem: Problem, trace: str, index: int) -> str:
    """The first `index` steps of a trace; where it ends too early, the whole trace with its end."""
    steps = data.split_steps(problem, trace)
    return trace + data.CLOSE if index > len(steps) else data.splice(problem, trace, index, steps[index - 1])


def count_interventions(records: list[dict]) -> dict:
    """What became of failed traces and of interventions."""
    kept = [r for r in records if r["chosen"]]
    verdicts = Counter({name: 0 for name in VERDICTS})
    for record in records:
        for proposal in record["proposals"]:
            verdicts[proposal["verdict"]] += proposal["times"]
    reasons = Counter(r["left_out"] for r in records if r["left_out"])
    return {"failed_traces": len(records), "left_out": dict(reasons), "with_intervention": len(kept),
            "in_the_first_step": sum(r["chosen"]["index"] == 1 for r in kept),
            "interventions": sum(verdicts.values()), "verdicts": dict(verdicts),
            "success_from": {name: mean(r["success_from"][name] for r in kept)
                             for name in ("intervention", "error", "resampled step")}}


def int_sequence(tokenizer, problem: Problem, beginning: str) -> tuple[list[int], list[int]]:
    """(ids, labels) to learn the beginning of a trace: no loss on the prompt, none on what comes after the beginning,
    so none on a token that ends the trace."""
    prompt = data.encode_prompt(tokenizer, data.planner_prompt(problem))
    trace = begin_trace(tokenizer, beginning)
    return prompt + trace[:-1], [executor.IGNORE] * (len(prompt) - 1) + trace


def int_sequences(tokenizer, records: list[dict], by_id: dict[str, Problem], seed: int) -> tuple[list, list]:
    """Training and held-out sequences of the chosen interventions; whole problems are held out, a tenth of them."""
    chosen = [r for r in records if r["chosen"]]
    ids = sorted({r["problem_id"] for r in chosen})
    ids = random.Random(seed).sample(ids, len(ids))
    held = set(ids[:max(1, len(ids) // 10)] if len(ids) > 1 else [])
    train, heldout = [], []
    for r in chosen:
        problem = by_id[r["problem_id"]]
        learned = data.splice(problem, r["trace"], r["chosen"]["index"], r["chosen"]["step"])
        part = heldout if r["problem_id"] in held else train
        part.append(int_sequence(tokenizer, problem, learned))
    return train, heldout


def intervene(s: IntSettings) -> Path:
    """The stage: collects interventions and fine-tunes the planner on them. Returns its folder: model, tokenizer,
    interventions.jsonl, int.json."""
    check_shared(s)
    run_dir = Path(s.run_dir)
    inputs = data.fingerprints(run_dir, "groups/train.jsonl", "base/base.json")
    with data.stage_folder(run_dir / "int", s, inputs) as work:
        if work is not None:
            learn_interventions(s, run_dir, work)
    return run_dir / "int"


def learn_interventions(s: IntSettings, run_dir: Path, work: Path) -> None:
    """Fills the folder of the stage."""
    device = executor.pick_device(s.device)
    problems = data.read_problems(run_dir / "groups" / "train.jsonl")[:s.problems]
    base, by_id = executor.base_of(run_dir), {p.problem_id: p for p in problems}
    planner, tokenizer = executor.load_for(run_dir, base, device, torch.float32)
    executor.check_head(planner)
    frozen = frozen_executor(run_dir, device, s)
    readers = who_reads(planner, tokenizer, frozen, s, traces=2)          # a beginning, and what continues it
    more = 3 * s.max_trace_tokens                                         # the trace, its numbers, the answer
    readers.append(replace(readers[0], text_of=lambda p: data.intervention_prompt(p, ""), more=more))
    check_lengths(problems, readers)
    if (work / "int.json").exists():                                      # a stopped stage: only fine-tuning is missing
        report, records = read_interventions(work)
    else:
        begin = time.perf_counter()
        records = collect(Collector(planner, tokenizer, frozen, s), problems)
        report = count_interventions(records) | frozen.spent | {"seconds": time.perf_counter() - begin}
        data.write_atomic(work / "interventions.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        data.write_atomic(work / "int.json", json.dumps(report))
    train_part, heldout = int_sequences(tokenizer, records, by_id, s.seed)
    common = {"batch_size": s.batch_size, "pad_id": executor.pad_id(tokenizer)}
    before = executor.heldout_loss(planner, heldout, **common) if heldout else None
    if s.checkpointing:
        executor.enable_checkpointing(planner)
    if train_part:
        executor.finetune(planner, train_part, heldout=heldout, epochs=s.epochs, seed=s.seed, warmup=10, title="InT",
                          learning_rate=s.learning_rate, **common)
    after = executor.heldout_loss(planner, heldout, **common) if heldout else None
    report |= {"sequences": {"train": len(train_part), "heldout": len(heldout)},
               "heldout_loss": {"base": before, "InT": after}}
    with executor.saving(work):
        planner.save_pretrained(work)
        tokenizer.save_pretrained(work)
    data.write_atomic(work / "int.json", json.dumps(report, indent=1))


def read_interventions(work: Path) -> tuple[dict, list[dict]]:
    """What `collect` left in the folder of a stopped stage."""
    mend = f"delete {work} to collect again"
    report = data.read_json(work / "int.json", mend, "failed_traces", "with_intervention")
    wanted = {"problem_id": str, "trace": str, "proposals": list}
    try:
        records = data.read_records(work / "interventions.jsonl", wanted) if report["failed_traces"] else []
    except UserError as error:
        raise UserError(f"{error}; {mend}") from None
    if len(records) != report["failed_traces"]:
        raise UserError(f"{work}/interventions.jsonl: {len(records)} of {report['failed_traces']} lines are there; "
                        f"{mend}")
    return report, [record for _, record in records]


# ------------------------------------------------------------------------------------------ 9. problems that can teach
#
# A group whose traces all fail, or all succeed, has no advantage. Where the planner seldom succeeds that is most
# groups: so its success is measured once on many problems, and training keeps to those where it varies.


@dataclass(frozen=True)
class SelectSettings(Settings):
    """Settings of `python tracelift.py select`."""
    problems: int = knob(200, "training problems to try, the last ones: a cold start learns from the first", low=1)
    group_size: int = knob(8, "traces per problem, one executor run each", low=2)
    temperature: float = knob(1.0, "of the planner", above=0)
    lowest: float = knob(0.1, "least success of a problem that is kept", low=0, affects_result=False)
    highest: float = knob(0.9, "largest success of one; other bounds need no new traces", low=0, affects_result=False)


def select(s: SelectSettings) -> dict:
    """Tries the base planner on training problems and keeps those whose success lies between the bounds, for
    `train --selected 1`. Held-out problems are in another file. Returns the record, RUN_DIR/selected/selected.json.
    UserError when none is left."""
    check_shared(s)
    run_dir = Path(s.run_dir)
    out = run_dir / "selected"
    with data.stage_folder(out, s, data.fingerprints(run_dir, "groups/train.jsonl", "base/base.json")) as work:
        if work is not None:
            try_problems(s, run_dir, work)
    tries = [record for _, record in data.read_records(out / "tries.jsonl", {"problem_id": str, "successes": int})]
    rates = {record["problem_id"]: record["successes"] / s.group_size for record in tries}
    kept = [name for name, rate in rates.items() if s.lowest <= rate <= s.highest]
    record = {"problems": len(rates), "lowest": s.lowest, "highest": s.highest, "kept": len(kept),
              "below": sum(rate < s.lowest for rate in rates.values()),
              "above": sum(rate > s.highest for rate in rates.values()),
              "with_spread": sum(0 < rate < 1 for rate in rates.values()), "success": mean(rates.values())}
    if not kept:
        raise UserError(f"--lowest {s.lowest:g}, --highest {s.highest:g}: no problem of {len(rates)} lies between them, "
                        f"{record['below']} lie below and {record['above']} above; give other bounds")
    groups = {group["problem_id"]: group for group in data.read_groups(run_dir / "groups" / "train.jsonl")}
    data.write_groups(out / "train.jsonl", [groups[name] for name in kept])
    data.write_atomic(out / "selected.json", json.dumps(record, indent=1))
    return record


def try_problems(s: SelectSettings, run_dir: Path, work: Path) -> None:
    """Writes tries.jsonl, a line a problem; goes on behind the lines that a stopped try has left."""
    log, path = work / "tries.jsonl", run_dir / "groups" / "train.jsonl"
    drop_half_line(log)
    problems = data.read_problems(path)
    if len(problems) < s.problems:
        raise UserError(f"--problems {s.problems}: {path} holds {len(problems)}; lower it")
    problems, device, base = problems[-s.problems:], executor.pick_device(s.device), executor.base_of(run_dir)
    planner, tokenizer = executor.load_for(run_dir, base, device, torch.float32)
    frozen = frozen_executor(run_dir, device, s)
    check_lengths(problems, who_reads(planner, tokenizer, frozen, s))
    limit = executor.cache_tokens(planner, s.max_cache_gib)
    done = {json.loads(line)["problem_id"] for line in log.read_text().splitlines()}
    left = [problem for problem in problems if problem.problem_id not in done]
    for i in tqdm(range(0, len(left), 8), desc="select"):
        some = left[i:i + 8]
        batch = rollout(planner, tokenizer, some, s.group_size, s.temperature, s.max_trace_tokens, f"{s.seed} select",
                        limit)
        ok = frozen.success(batch.problems, batch.traces, 1, "select")
        successes = [sum(ok[n * s.group_size:(n + 1) * s.group_size]) for n in range(len(some))]
        append_jsonl(log, [{"problem_id": problem.problem_id, "successes": n} for problem, n in zip(some, successes)])


# ------------------------------------------------------------------------------------------ 10. commands


def main(argv) -> None:
    """The commands train, int, select, evaluate and inspect."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"tracelift.py {command} is one process; start it without torchrun")
    if command == "train":
        with torchrun() as ranks:
            s = settings_of_rank_0(ranks, rest)
            if s is not None:
                print(f"{train(s)}: trained\nnext: python tracelift.py evaluate --run_dir {s.run_dir}")
    elif command == "int":
        s = data.parse_settings(IntSettings, rest, "tracelift.py int")
        folder = intervene(s)
        report = data.read_json(folder / "int.json", f"delete {folder} and give the same command again", "sequences",
                                "with_intervention", "failed_traces")
        print("\n".join(f"{key}: {json.dumps(value)}" for key, value in report.items()))
        if not report["sequences"]["train"]:
            print("no intervention was kept: this planner is the base planner")
        print(f"{folder}: {report['with_intervention']} of {report['failed_traces']} failed traces with an intervention"
              f"\nnext: python tracelift.py train --run_dir {s.run_dir} --init {folder}")
    elif command == "select":
        s = data.parse_settings(SelectSettings, rest, "tracelift.py select")
        r = select(s)
        print(f"{s.run_dir}/selected: {r['kept']} of {r['problems']} problems kept, {r['below']} below --lowest, "
              f"{r['above']} above --highest; success {r['success']:.3f}, {r['with_spread']} with spread\n"
              f"next: python tracelift.py train --run_dir {s.run_dir} --selected 1")
    elif command == "evaluate":
        s = data.parse_settings(EvalSettings, rest, "tracelift.py evaluate")
        print(table(evaluate(s)))
        print(f"{s.run_dir}/results.md: written, results.json in each folder\n"
              f"next: python tracelift.py inspect --run_dir {s.run_dir}")
    elif command == "inspect":
        print(inspect(data.parse_settings(InspectSettings, rest, "tracelift.py inspect")))
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise UserError(f"tracelift.py {command}: choose train, int, select, evaluate or inspect; each has --help")


if __name__ == "__main__":
    data.run_command(main)
