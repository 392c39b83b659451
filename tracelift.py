"""TraceLift: train a reasoning planner with executor-grounded rewards (arXiv 2605.03862), in one file.

A planner writes a trace; a frozen executor turns problem + trace into an artifact; the verifier says whether it is
right. Success alone also rewards traces that are right for the wrong reason, so the reward has a second part, in
which the rubric reward model's score of the trace *multiplies* the uplift the trace gave to the same executor:

    uplift_i = mean_k success(problem, trace_i) - mean_k success(problem, no trace)         in [-1, 1], K runs each
    r_i      = w_e * e2e_i + w_r * rm_i * uplift_i                                          e2e_i: one more run
    A_i      = (r_i - mean r) / (std r + eps)                                               over the G traces
    loss     = mean over all tokens of the step of -min(rho A, clip(rho) A) + beta * KL

Read `train` from top to bottom; it follows one step from problems to gradient.

    python tracelift.py int      --preset tiny --run runs/tiny-math       # optional warm start; train --init .../int
    python tracelift.py train    --preset tiny --run runs/tiny-math --mode tracelift --seed 0
    python tracelift.py evaluate --preset tiny --run runs/tiny-math       # every planner of the run -> results.md
    python tracelift.py inspect  --preset tiny --run runs/tiny-math       # one problem, its traces and their rewards
    python tracelift.py plot     --run runs/tiny-math                     # curves.png, where there is matplotlib

Letters: N problems, G traces per problem, B = N * G traces of a step, K executor runs, T tokens, M completion tokens,
V vocabulary. Left out: several GPUs, vLLM, an asynchronous rollout.
"""

import copy
import json
import math
import os
import random
import shutil
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import executor
import kernels
from data import Problem, UserError, knob
from executor import Executor
from rm import RubricRewardModel

# ------------------------------------------------------------------------------------------------ reward

MODES = ("tracelift", "tracelift-code", "exec_only", "rm_only", "uplift_only")
RM_MODES = ("tracelift", "tracelift-code", "rm_only")
UPLIFT_MODES = ("tracelift", "tracelift-code", "uplift_only")


@dataclass(frozen=True)
class Reward:
    """The parts of one trace's reward beside the scalar; None where the mode does not measure a part."""
    e2e: float | None             # score of one executor run with the trace, drawn apart from the K uplift runs
    rm: float | None              # reward model score, 0..1
    with_trace: int | None        # successes of K runs with the trace
    without_trace: int | None     # successes of K runs without a trace
    uplift: float | None          # (with_trace - without_trace) / K
    total: float


def combine(mode: str, *, e2e=None, rm=None, with_trace=None, without_trace=None, repeats: int = 1,
            w_e: float = 0.5, w_r: float = 0.5) -> float:
    """The scalar reward of one trace.

    `tracelift`       w_e * e2e + w_r * rm * uplift
    `tracelift-code`  clamp(e2e + 0.2 * rm * coeff, 0, 1), the public code's variant for programs. coeff: 1 with more
                      successes with the trace than without, -1 with fewer; on a tie 0 when none of the K runs
                      succeeded, 1 when all did, else 0.5 for one of three and the share for other counts. With
                      e2e = 1 the clamp removes a positive bonus: among passing traces the reward model has no say.
    `exec_only`       e2e                 `rm_only`  rm                `uplift_only`  w_e * e2e + w_r * uplift
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    if mode == "exec_only":
        return e2e
    if mode == "rm_only":
        return rm
    if mode == "tracelift-code":
        if with_trace != without_trace:
            coeff = 1.0 if with_trace > without_trace else -1.0
        else:
            coeff = 0.5 if (with_trace, repeats) == (1, 3) else with_trace / repeats
        return min(1.0, max(0.0, e2e + 0.2 * rm * coeff))
    uplift = (with_trace - without_trace) / repeats
    if mode == "uplift_only":
        return w_e * e2e + w_r * uplift
    return w_e * e2e + w_r * rm * uplift


def measure(settings, frozen: Executor, rm, problems: list[Problem], traces: list[str]) -> tuple[list[Reward], list]:
    """Rewards of the traces (problems[i] belongs to traces[i]), and the executor runs behind them. Only the parts
    that the mode needs are measured. Failures of executor, sandbox or reward model are raised, never scored."""
    mode, K, n = settings.mode, settings.repeats, len(traces)
    uses_rm, uses_uplift = mode in RM_MODES, mode in UPLIFT_MODES
    scores = rm.score([data.rm_text(p, t) for p, t in zip(problems, traces)])[0].tolist() if uses_rm else [None] * n
    runs = [[] for _ in traces] if mode == "rm_only" else frozen.run(problems, traces, 1 + K if uses_uplift else 1)
    baseline = frozen.baseline(problems, K) if uses_uplift else [None] * n
    rewards = []
    for i in range(n):
        e2e = runs[i][0].score if runs[i] else None               # the first run is e2e, the other K are the uplift's
        with_trace = sum(run.ok for run in runs[i][1:]) if uses_uplift else None
        uplift = (with_trace - baseline[i]) / K if uses_uplift else None
        total = combine(mode, e2e=e2e, rm=scores[i], with_trace=with_trace, without_trace=baseline[i], repeats=K,
                        w_e=settings.w_e, w_r=settings.w_r)
        rewards.append(Reward(e2e, scores[i], with_trace, baseline[i], uplift, total))
    return rewards, runs


# ------------------------------------------------------------------------------------------------ settings

@dataclass(frozen=True)
class Settings:
    """What the commands share."""
    run: str = knob("runs/tiny-math", "run folder; holds groups/, base.json and rm/")
    preset: str = knob("tiny", "named defaults, those that the run was begun with")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    seed: int = knob(0, "of all sampling, and of every order")
    executor_temperature: float = knob(0.7, "of the executor", low=0)
    max_trace_tokens: int = knob(80, "longest planner completion; a cut one counts as unclosed", low=1)
    max_answer_tokens: int = knob(64, "longest executor output", low=1)
    max_cache_tokens: int = knob(executor.CACHE, "tokens of keys and values in one decoding batch", low=1)


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of `python tracelift.py train`."""
    mode: str = knob("tracelift", "reward: " + ", ".join(MODES), choices=MODES)
    name: str = knob("", "the planner is saved as planner-NAME-seedSEED; empty: the mode, with -after-InT for --init "
                     "RUN/int")
    init: str = knob("", "model that the planner starts from; empty: the run's base model")
    steps: int = knob(80, "rollouts, each followed by inner_epochs updates", low=1)
    problems_per_step: int = knob(12, "N", low=1)
    group_size: int = knob(8, "G, traces per problem; the advantage compares them", low=2)
    repeats: int = knob(3, "K, executor runs behind each success rate; the paper's 3", low=1)
    w_e: float = knob(0.5, "weight of end-to-end success", low=0)
    w_r: float = knob(0.5, "weight of rm * uplift", low=0)
    exec_score: str = knob("binary", "score of a program", choices=("binary", "pass_rate", "coderl", "hybrid"))
    learning_rate: float = knob(3e-4, "AdamW, constant after warm-up; for the tiny model", above=0)
    warmup: int = knob(5, "steps of linear warm-up", low=0)
    clip_low: float = knob(0.2, "PPO clip below 1; matters only with inner_epochs > 1", low=0)
    clip_high: float = knob(0.2, "PPO clip above 1", low=0)
    beta: float = knob(0.0, "weight of the KL to the starting planner; 0 keeps no reference policy in memory", low=0)
    scale: str = knob("std", "std: divide advantages by the group's spread; none: do not (Dr. GRPO)",
                      choices=("std", "none"))
    weights: str = knob("dapo", "of tokens; dapo: mean over the step's tokens", choices=("dapo", "grpo", "dr_grpo"))
    inner_epochs: int = knob(1, "updates per rollout", low=1)
    micro_batch: int = knob(96, "sequences per forward and backward; the gradient does not depend on it", low=1)
    grad_clip: float = knob(1.0, "largest gradient norm", above=0)
    lora_rank: int = knob(0, "0: train all weights of a copy of the base; else an adapter of this rank on the one base "
                             "model that is executor and reference too", low=0)
    lora_alpha: float = knob(32.0, "the adapter's part is scaled by alpha / rank", above=0)
    checkpointing: int = knob(0, "1: recompute activations in the backward pass, for memory", choices=(0, 1))
    temperature: float = knob(1.0, "of the planner, in sampling and in scoring", above=0)
    max_problems: int = knob(0, "train on this many problems only; 0: all", low=0)
    save_every: int = knob(20, "steps between checkpoints; a stopped run continues from the last one", low=1)


@dataclass(frozen=True)
class EvalSettings(Settings):
    """Settings of `python tracelift.py evaluate` and `inspect`; `plot` takes --run."""
    problems: int = knob(300, "held-out problems per row", low=1)
    traces: int = knob(3, "inspect: traces to show", low=2)
    planner: str = knob("", "inspect: folder name of the planner in the run; empty: the base model")


TRAIN_PRESETS = {
    "tiny": {},
    "smoke": {"steps": 2, "problems_per_step": 2, "group_size": 4},
    "gsm8k": {"steps": 100, "problems_per_step": 8, "group_size": 8, "learning_rate": 1e-6, "micro_batch": 8,
              "max_trace_tokens": 256, "max_answer_tokens": 256, "warmup": 10, "checkpointing": 1}}
EVAL_PRESETS = {"tiny": {}, "smoke": {"problems": 16},
                "gsm8k": {"problems": 200, "max_trace_tokens": 256, "max_answer_tokens": 256}}
TRAIN_PRESETS["code"] = {**TRAIN_PRESETS["gsm8k"], "max_answer_tokens": 384}
EVAL_PRESETS["code"] = {**EVAL_PRESETS["gsm8k"], "problems": 80, "max_answer_tokens": 384}


# ------------------------------------------------------------------------------------------------ rollout and loss

@dataclass
class Rollout:
    """B = N * G sampled traces in problem-major order, and their tokens as the loss wants them."""
    problems: list[Problem]       # (B) each problem G times
    completions: executor.Completions
    traces: list[str]
    unclosed: int                 # completions without </reasoning>; used as far as they go
    ids: torch.Tensor             # (B, T) prompt + completion, padded on the right
    scored: torch.Tensor          # (B, T) bool: the position whose logits predict a sampled token. Taken from the
    target: torch.Tensor          # (B, T) int64: that token                lengths sampled, not guessed from ids


def rollout(planner, tokenizer, problems: list[Problem], settings, generator) -> Rollout:
    """Samples group_size traces for each of N problems."""
    prompts = [data.encode_prompt(tokenizer, data.planner_prompt(p)) for p in problems]
    c, texts = complete(planner, tokenizer, prompts, settings.group_size, settings.temperature, settings, generator)
    prompt_of, device = [prompt for prompt in prompts for _ in range(settings.group_size)], planner.device
    ids = executor.pad([p + t for p, t in zip(prompt_of, c.tokens)], executor.pad_id(tokenizer), device)
    target = ids.roll(-1, dims=1)                                        # position t predicts token t + 1
    start = torch.tensor([len(p) - 1 for p in prompt_of], device=device)[:, None]
    length = torch.tensor([len(t) for t in c.tokens], device=device)[:, None]
    position = torch.arange(ids.shape[1], device=device)[None]
    scored = (position >= start) & (position < start + length)
    return Rollout([p for p in problems for _ in range(settings.group_size)], c,
                   [data.extract_reasoning(t) for t in texts], sum(data.CLOSE not in t for t in texts),
                   ids, scored, target)


def complete(model, tokenizer, prompts: list[list[int]], num_samples: int, temperature: float, settings,
             generator) -> tuple[executor.Completions, list[str]]:
    """Completions by the planner, also as text, in prompt-major order."""
    with autocast(model.device):                                         # as in scoring: the sampler is the scorer
        c = executor.generate(model, prompts, num_samples=num_samples, max_new_tokens=settings.max_trace_tokens,
                              temperature=temperature, eos_id=tokenizer.eos_token_id, generator=generator,
                              max_cache_tokens=settings.max_cache_tokens)
    return c, tokenizer.batch_decode(c.tokens, skip_special_tokens=True)


@torch.no_grad()
def completion_logp(model, batch: Rollout, settings) -> torch.Tensor:
    """Log-probs (M,) of the sampled tokens under a model, at the sampling temperature."""
    parts = []
    for rows in torch.arange(len(batch.ids)).split(settings.micro_batch):
        with autocast(batch.ids.device):
            logits = executor.token_logits(model, batch.ids[rows], batch.scored[rows])
        parts.append(kernels.token_logp(logits, batch.target[rows][batch.scored[rows]], settings.temperature)[0])
    return torch.cat(parts)


def autocast(device: torch.device):
    """bfloat16 matrix products on CUDA over float32 weights, so that small updates are not rounded away."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def policy_gradient(planner, batch: Rollout, reward: torch.Tensor, settings, old_logp=None, ref_logp=None) -> dict:
    """Adds the gradient of one update to planner's .grad and returns loss, entropy, KL and clip share of all tokens
    (None where not measured). reward (B,); old_logp and ref_logp (M,) or None (on-policy; no KL). Without KL, a
    micro-batch whose advantages are all 0 has no backward pass; where no group has spread, .grad stays None and the
    optimizer leaves the planner as it is."""
    token_weight = kernels.token_weights(batch.scored, settings.weights, max_len=settings.max_trace_tokens)   # (B, T)
    totals = {"loss": 0.0, "entropy": 0.0, "kl": None if ref_logp is None else 0.0,
              "clip_share": None if old_logp is None else 0.0}
    moves = kernels.group_advantage(reward, settings.group_size) != 0                          # (B,)
    M, at = int(batch.scored.sum()), 0
    for rows in torch.arange(len(batch.ids)).split(settings.micro_batch):
        chosen = batch.scored[rows]                                                            # (b, T)
        learns = settings.beta > 0 or bool(moves[rows].any())            # else the gradient is 0: only measure
        with torch.set_grad_enabled(learns):
            with autocast(batch.ids.device):
                hidden = executor.token_hidden(planner, batch.ids[rows], chosen)               # (m, H)
            m = slice(at, at + len(hidden))
            at += len(hidden)
            old, ref = (None if x is None else x[m] for x in (old_logp, ref_logp))
            loss, logp, entropy, advantage = head_loss(
                planner, hidden, batch.target[rows][chosen], reward,
                rows.to(reward.device)[:, None].expand_as(chosen)[chosen], token_weight[rows][chosen],
                settings.group_size, old, ref, temperature=settings.temperature, clip_low=settings.clip_low,
                clip_high=settings.clip_high, beta=settings.beta, scale=settings.scale == "std")
        if learns:
            loss.backward()
        totals["loss"] += loss.item()
        totals["entropy"] += entropy.sum().item() / M
        if ref is not None:
            totals["kl"] += (torch.expm1(ref - logp) - (ref - logp)).sum().item() / M
        if old is not None:
            ratio = (logp - old).exp()
            cut = (ratio < 1 - settings.clip_low) & (advantage < 0) | (ratio > 1 + settings.clip_high) & (advantage > 0)
            totals["clip_share"] += cut.sum().item() / M
    return totals


def head_loss(planner, hidden, *rows, **settings):
    """kernels.grpo_loss of the planner's head on hidden (m, H). Where the fused kernel runs and the head is a plain
    matrix, the (m, V) logits are never held whole."""
    head = planner.get_output_embeddings()
    if kernels.backend(hidden.device) == "triton" and type(head) is torch.nn.Linear and head.bias is None:
        work = torch.bfloat16 if hidden.is_cuda else hidden.dtype        # the head's product as autocast would do it
        return kernels.linear_grpo_loss(hidden.to(work), head.weight.to(work), *rows, **settings)
    with autocast(hidden.device):
        logits = head(hidden)
    return kernels.grpo_loss(logits, *rows, inplace=True, **settings)


# ------------------------------------------------------------------------------------------------ training

def train(settings: TrainSettings) -> Path:
    """Trains one planner with GRPO and returns its folder: model, tokenizer, metrics.jsonl, samples.jsonl."""
    data.check_settings(settings)
    if "/" in settings.name:
        raise UserError(f"--name {settings.name!r}: must be a plain name")
    used = {"w_e": settings.mode in ("tracelift", "uplift_only"), "w_r": settings.mode in ("tracelift", "uplift_only"),
            "lora_alpha": settings.lora_rank > 0}
    for flag, value in used.items():
        if not value and getattr(settings, flag) != getattr(TrainSettings, flag):
            why = "without --lora_rank" if flag == "lora_alpha" else f"with --mode {settings.mode}"
            raise UserError(f"--{flag} has no meaning {why}; leave it out")
    run = Path(settings.run)
    after = "-after-InT" if settings.init and Path(settings.init).resolve() == (run / "int").resolve() else ""
    name = f"planner-{settings.name or settings.mode + after}-seed{settings.seed}"
    out, work = run / name, run / f"{name}.partial"
    if not data.begin_stage(run, name, settings, out, work / "checkpoint.pt"):
        return out
    device = executor.pick_device(settings.device)
    problems = data.read_problems(run / "groups" / "train.jsonl")[:settings.max_problems or None]
    base = executor.base_of(run)
    if settings.init and (settings.lora_rank or (Path(settings.init) / "adapter").exists()):
        raise UserError("--init does not go with LoRA: a new adapter sits on the base model, which the executor is "
                        "too, and the merged weights of an old one may be rounded to bfloat16")
    planner, tokenizer = executor.load(settings.init or base, device, None if settings.lora_rank else torch.float32)
    executor.check_head(planner)
    shared = settings.lora_rank > 0                                      # one model, three roles
    reference = planner if shared or not settings.beta else executor.freeze(copy.deepcopy(planner))
    sampling = torch.Generator(device).manual_seed(settings.seed)
    frozen = Executor(*(planner, tokenizer) if shared else executor.load(base, device), generator=sampling,
                      max_new_tokens=settings.max_answer_tokens, temperature=settings.executor_temperature,
                      exec_score=settings.exec_score, max_cache_tokens=settings.max_cache_tokens)
    lora = executor.Lora(planner, settings.lora_rank, settings.lora_alpha, seed=settings.seed) if shared else None
    bare = lora.off if lora else nullcontext                             # inside it the planner is the base model again
    if settings.checkpointing:
        executor.without_dropout(planner)                                # it works in training mode only
        planner.gradient_checkpointing_enable({"use_reentrant": False})
    rm = RubricRewardModel.from_pretrained(run / "rm", device) if settings.mode in RM_MODES else None
    optimizer = torch.optim.AdamW(trained(planner).values(), lr=settings.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    state = {"step": 0, "seconds": 0.0, "planner_tokens": 0}
    if (work / "checkpoint.pt").exists():
        state = load_checkpoint(work, planner, optimizer, frozen, sampling)
    else:                                                                # nothing to continue from: begin afresh
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        data.record_stage(settings.run, name, settings)
    print(f"{name}: on {device}, loss by the {kernels.backend(device)} kernels")
    bar = tqdm(range(state["step"], settings.steps), initial=state["step"], total=settings.steps, desc=name,
               mininterval=5)
    for step in bar:
        clock, updates = Clock(), []
        with clock("rollout"):                                           # 1. N problems, G traces each
            planner.eval()
            batch = rollout(planner, tokenizer, problems_at(problems, step, settings), settings, sampling)
        with clock("reward"), bare():                                    # 2. execute, verify, score, combine
            rewards, runs = measure(settings, frozen, rm, batch.problems, batch.traces)
            reward = torch.tensor([r.total for r in rewards], device=device)                   # (B,)
        with clock("update"):                                            # 3. advantages and loss, inside kernels
            old = completion_logp(planner, batch, settings) if settings.inner_epochs > 1 else None
            with bare():
                ref = completion_logp(reference, batch, settings) if settings.beta > 0 else None
            planner.train(bool(settings.checkpointing))
            for _ in range(settings.inner_epochs):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup))
                health = policy_gradient(planner, batch, reward, settings, old, ref)
                norm = torch.nn.utils.clip_grad_norm_(planner.parameters(), settings.grad_clip)
                if not math.isfinite(norm):
                    raise FloatingPointError(f"step {step}: the gradient is not finite; lower --learning_rate")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                updates.append({**health, "grad_norm": norm.item()})
        state["step"], state["seconds"] = step + 1, state["seconds"] + clock.total()           # 4. write it down
        state["planner_tokens"] += sum(map(len, batch.completions.tokens))
        line = {"step": step, **summarize(rewards, runs, batch, settings),
                **{key: mean(update[key] for update in updates) for key in updates[0]}, **frozen.spent,
                **{key: state[key] for key in ("planner_tokens", "seconds")}, **clock.seconds}
        append_jsonl(work / "metrics.jsonl", [line])
        if step % settings.save_every == 0:
            append_jsonl(work / "samples.jsonl", samples(step, rewards, batch, runs, settings))
        if (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
            save_checkpoint(work, planner, optimizer, frozen, sampling, state)
        bar.set_postfix({k: f"{line[k]:.2f}" for k in ("reward", "success", "uplift") if line[k] is not None})
    lora.save(work, base) if lora else planner.save_pretrained(work)
    tokenizer.save_pretrained(work)
    os.replace(work, out)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return out


def trained(planner) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn: all, or those of the adapter."""
    return {name: p for name, p in planner.named_parameters() if p.requires_grad}


def problems_at(problems: list[Problem], step: int, settings) -> list[Problem]:
    """The N problems of a step: epochs of a seeded shuffle, a function of the step alone, so that a resumed run and
    runs of other modes see the same problems."""
    first, last = step * settings.problems_per_step, (step + 1) * settings.problems_per_step
    shuffled = {epoch: random.Random(f"{settings.seed} {epoch}").sample(problems, len(problems))
                for epoch in range(first // len(problems), (last - 1) // len(problems) + 1)}
    return [shuffled[i // len(problems)][i % len(problems)] for i in range(first, last)]


class Clock:
    """Seconds per phase: `with clock("rollout"): ...`"""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        begin = time.perf_counter()
        yield
        self.seconds[f"seconds_{phase}"] = time.perf_counter() - begin

    def total(self) -> float:
        return sum(self.seconds.values())


def mean(values) -> float | None:
    """The mean of the values that were measured; None when none was."""
    values = [float(v) for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summarize(rewards: list[Reward], runs: list, batch: Rollout, settings) -> dict:
    """Metrics of a step over its B traces; the README's glossary says what each means."""
    G = settings.group_size
    totals = [r.total for r in rewards]
    groups = [totals[i:i + G] for i in range(0, len(totals), G)]
    checks = [c for c in map(data.check_trace, batch.problems, batch.traces) if c is not None]
    return {"reward": mean(totals), "success": mean(r[0].ok if r else None for r in runs),
            "e2e": mean(r.e2e for r in rewards), "uplift": mean(r.uplift for r in rewards),
            "rm": mean(r.rm for r in rewards), "without_trace": mean(
                None if r.without_trace is None else r.without_trace / settings.repeats for r in rewards),
            "faithful": mean(c[0] for c in checks), "leak": mean(c[1] for c in checks),
            "groups_without_spread": mean(max(g) == min(g) for g in groups),
            "reward_spread": mean(statistics.pstdev(g) for g in groups), "unclosed": batch.unclosed / len(rewards),
            "trace_tokens": mean(map(len, batch.completions.tokens))}


def samples(step: int, rewards, batch: Rollout, runs, settings) -> list[dict]:
    """The first problem's group, for a person to read."""
    return [{"step": step, "problem": batch.problems[i].problem, "trace": batch.traces[i], **asdict(rewards[i]),
             "outputs": [run.output for run in runs[i]]} for i in range(settings.group_size)]


def append_jsonl(path: Path, records: list[dict]) -> None:
    """Appends records; a reader of a running training sees whole lines."""
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r) + "\n" for r in records))


def save_checkpoint(work: Path, planner, optimizer, frozen: Executor, generator, state: dict) -> None:
    """All that the next step depends on, atomically, with the lengths of the logs at this point."""
    logs = {name: (work / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    with open(work / "checkpoint.tmp", "wb") as f:
        torch.save({"planner": {name: p.detach() for name, p in trained(planner).items()},
                    "optimizer": optimizer.state_dict(), "state": state, "logs": logs,
                    "generator": generator.get_state(), "executor": frozen.state()}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")


def load_checkpoint(work: Path, planner, optimizer, frozen: Executor, generator) -> dict:
    """Restores a checkpoint and cuts the logs back to it. Returns the training state."""
    saved = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in trained(planner).items():
            parameter.copy_(saved["planner"][name])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    frozen.load_state(saved["executor"])
    for name, size in saved["logs"].items():
        os.truncate(work / name, size)
    return saved["state"]


# ------------------------------------------------------------------------------------------------ InT
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
    first_step: str = knob("drop", "interventions in the first step, whose prefix is empty: drop or keep",
                           choices=("drop", "keep"))
    repeats: int = knob(3, "K, executor runs behind each success rate", low=1)
    temperature: float = knob(1.0, "of the planner's traces and continuations", above=0)
    epochs: float = knob(4.0, "of fine-tuning, at most; the held-out loss may stop it", above=0)
    batch_size: int = knob(16, "sequences per step of fine-tuning", low=1)
    learning_rate: float = knob(3e-4, "peak of fine-tuning, AdamW; for the tiny model", above=0)


INT_PRESETS = {"tiny": {}, "smoke": {"problems": 8, "group_size": 2, "proposals": 2, "repeats": 1, "epochs": 1.0},
               "gsm8k": {"problems": 200, "group_size": 4, "proposals": 8, "max_trace_tokens": 256,
                         "max_answer_tokens": 256, "epochs": 2.0, "learning_rate": 1e-5}}
INT_PRESETS["code"] = {**INT_PRESETS["gsm8k"], "max_answer_tokens": 384}


VERDICTS = ("not in the format", "none: no error found", "index out of range", "stop: no step", "repeats the step",
            "empty prefix", "never succeeds", "succeeds less than a resampled step", "passed")


def sort_out(problem: Problem, trace: str, completion: str, first_step: str = "drop") -> tuple[str, int, str]:
    """(verdict, index, step) of one intervention, as far as its text tells. "proposed" ones are tried out next."""
    steps, parsed = data.split_steps(problem, trace), data.parse_intervention(completion)
    if parsed is None:
        return "not in the format", 0, ""
    index, step = parsed
    if index == 0 and not step:
        return "none: no error found", 0, ""
    if not 1 <= index <= len(steps) + 1:
        return "index out of range", index, step
    if problem.source == "tiny" and step == "stop":                     # right or wrong, there is no step to learn
        return "stop: no step", index, step
    if index <= len(steps) and step == steps[index - 1]:
        return "repeats the step", index, step
    if index == 1 and first_step == "drop":
        return "empty prefix", index, step
    return "proposed", index, step


def choose(proposals: list[dict]) -> dict | None:
    """Of the proposals that succeed at least as often as a resampled step, and at all: the most successful, then the
    most often sampled one. The verdict of the others becomes what speaks against them. (0 of K is at least as often
    as 0 of K, but most interventions that get there are wrong.)"""
    for p in proposals:
        if p["verdict"] == "proposed":
            p["verdict"] = ("never succeeds" if p["success"] == 0 else
                            "succeeds less than a resampled step" if p["success"] < p["resampled"] else "passed")
    passed = [p for p in proposals if p["verdict"] == "passed"]
    return max(passed, key=lambda p: (p["success"], p["times"])) if passed else None


def success_from(known: dict, problems: list[Problem], beginnings: list[str], planner, tokenizer, frozen: Executor,
                 settings) -> list[float]:
    """Success of the frozen executor on traces that the planner continues from these beginnings, `repeats` of them
    each. Every beginning is measured once: `known` {(problem_id, beginning): success} is read and filled."""
    s, K = settings, settings.repeats
    new = {(p.problem_id, b): p for p, b in zip(problems, beginnings) if (p.problem_id, b) not in known}
    prompts = [data.encode_prompt(tokenizer, data.planner_prompt(p)) + begin_trace(tokenizer, b)
               for (_, b), p in new.items()]
    _, texts = complete(planner, tokenizer, prompts, K, s.temperature, s, frozen.generator)
    traces = [data.extract_reasoning(data.OPEN + b + texts[i * K + k])
              for i, (_, b) in enumerate(new) for k in range(K)]
    ok = frozen.success([p for p in new.values() for _ in range(K)], traces, 1)
    known.update({key: sum(ok[i * K:(i + 1) * K]) / K for i, key in enumerate(new)})
    return [known[p.problem_id, b] for p, b in zip(problems, beginnings)]


def begin_trace(tokenizer, beginning: str) -> list[int]:
    """Token ids of the beginning of a completion."""
    return tokenizer(data.OPEN + beginning, add_special_tokens=False)["input_ids"]


def int_sequence(tokenizer, problem: Problem, beginning: str) -> tuple[list[int], list[int]]:
    """(ids, labels) to learn the beginning of a trace: no loss on the prompt, none on what comes after the beginning,
    so none on a token that ends the trace."""
    prompt = data.encode_prompt(tokenizer, data.planner_prompt(problem))
    trace = begin_trace(tokenizer, beginning)
    return prompt + trace[:-1], [executor.IGNORE] * (len(prompt) - 1) + trace


def collect(planner, tokenizer, frozen: Executor, problems: list[Problem], settings) -> list[dict]:
    """One record for each failed trace (no success in K executor runs) with its interventions and the one that was
    chosen."""
    s, generator, records, by_id = settings, frozen.generator, [], {p.problem_id: p for p in problems}
    for i in tqdm(range(0, len(problems), 50), desc="traces"):
        batch = rollout(planner, tokenizer, problems[i:i + 50], s, generator)
        runs = frozen.run(batch.problems, batch.traces, s.repeats)
        for problem, trace, r in zip(batch.problems, batch.traces, runs):
            if not any(run.ok for run in r):
                reason = ("cannot be split" if not data.split_steps(problem, trace) else
                          "no reference reasoning" if problem.reference_reasoning is None else None)
                records.append({"problem_id": problem.problem_id, "problem": problem.problem, "trace": trace,
                                "reference": problem.reference_reasoning, "left_out": reason, "proposals": [],
                                "chosen": None})
    asked = [r for r in records if not r["left_out"]]
    prompts = [data.intervention_prompt(by_id[r["problem_id"]], r["trace"]) for r in asked]
    _, texts = complete(planner, tokenizer, [data.encode_prompt(tokenizer, p) for p in prompts], s.proposals,
                        s.proposal_temperature, s, generator)
    known, models = {}, (planner, tokenizer, frozen, s)
    for i in tqdm(range(0, len(asked), 50), desc="interventions"):
        tried = []                                                      # (problem, trace, proposal), to try out
        for j, record in enumerate(asked[i:i + 50], i):
            problem = by_id[record["problem_id"]]
            for text, times in Counter(t.strip() for t in texts[j * s.proposals:(j + 1) * s.proposals]).items():
                verdict, index, step = sort_out(problem, record["trace"], text, s.first_step)
                record["proposals"].append({"text": text, "times": times, "verdict": verdict, "index": index,
                                            "step": step})
                if verdict == "proposed":
                    tried.append((problem, record["trace"], record["proposals"][-1]))
        of = [problem for problem, _, _ in tried]
        success = success_from(known, of, [data.splice(p, t, x["index"], x["step"]) for p, t, x in tried], *models)
        resampled = success_from(known, of, [data.splice(p, t, x["index"]) for p, t, x in tried], *models)
        for (_, _, proposal), a, b in zip(tried, success, resampled):
            proposal |= {"success": a, "resampled": b}
        for record in asked[i:i + 50]:
            record["chosen"] = choose(record["proposals"])
    known = {}                                                          # measured again: the choice favoured the lucky
    chosen = [(by_id[r["problem_id"]], r, r["chosen"]) for r in records if r["chosen"]]
    beginnings = {"intervention": [data.splice(p, r["trace"], x["index"], x["step"]) for p, r, x in chosen],
                  "error": [through_the_error(p, r["trace"], x["index"]) for p, r, x in chosen],
                  "resampled step": [data.splice(p, r["trace"], x["index"]) for p, r, x in chosen]}
    for name, texts in beginnings.items():
        for (_, record, _), value in zip(chosen, success_from(known, [p for p, _, _ in chosen], texts, *models)):
            record.setdefault("success_from", {})[name] = value
    return records


def through_the_error(problem: Problem, trace: str, index: int) -> str:
    """The first `index` steps of a trace; where it ends too early, the whole trace with its end."""
    steps = data.split_steps(problem, trace)
    return trace + data.CLOSE if index > len(steps) else data.splice(problem, trace, index, steps[index - 1])


def count(records: list[dict], problems: dict[str, Problem]) -> dict:
    """What became of failed traces and of interventions, and, where there is ground truth, how right they were."""
    proposals = [p for r in records for p in r["proposals"]]
    kept = [r for r in records if r["chosen"]]
    total = lambda name: sum(p["times"] for p in proposals if p["verdict"] == name)
    out = {"failed_traces": len(records),
           "left_out": {name: sum(r["left_out"] == name for r in records)
                        for name in ("cannot be split", "no reference reasoning")},
           "with_intervention": len(kept), "interventions": sum(p["times"] for p in proposals),
           "verdicts": {name: total(name) for name in VERDICTS},
           "success_from": {name: mean(r["success_from"][name] for r in kept)
                            for name in ("intervention", "error", "resampled step")}}
    truth = {"named": [], "kept": []}                                   # (kind of flaw, index right, step right)
    for r in records:
        problem = problems[r["problem_id"]]
        if problem.source != "tiny" or r["left_out"]:
            continue
        steps = data.split_steps(problem, r["trace"])
        first, kind = data.first_error(problem, steps), data.flaw_kind(problem, steps)
        right = lambda p: (kind, p["index"] == first, p["index"] == first and data.begins_right(
            problem, data.split_steps(problem, data.splice(problem, r["trace"], p["index"], p["step"]))))
        truth["kept"] += [right(r["chosen"])] if r["chosen"] else []
        truth["named"] += [right(p) for p in r["proposals"] if 1 <= p["index"] <= len(steps) + 1
                           for _ in range(p["times"])]
    for name, rows in truth.items():
        kinds = ["all"] + sorted({kind for kind, _, _ in rows})
        of = {k: [(i, s) for kind, i, s in rows if k in (kind, "all")] for k in kinds}
        out[f"ground_truth_{name}"] = {k: {"n": len(v), "index_right": mean(i for i, _ in v),
                                           "step_right": mean(s for _, s in v)} for k, v in of.items() if v}
    return out


def intervene(settings: IntSettings) -> Path:
    """The stage: collects interventions and fine-tunes the planner on them. Returns its folder: model, tokenizer,
    interventions.jsonl, int.json, and for `evaluate` hard.jsonl: the problems on which 7 of 8 traces or more failed."""
    data.check_settings(settings)
    s, run = settings, Path(settings.run)
    out, work = run / "int", run / "int.partial"
    if not data.begin_stage(s.run, "int", s, out, work):
        return out
    device = executor.pick_device(s.device)
    groups = run / "groups" / "train.jsonl"
    problems = data.read_problems(groups)[:s.problems]
    base, by_id = executor.base_of(run), {p.problem_id: p for p in problems}
    planner, tokenizer = executor.load(base, device, torch.float32)
    executor.check_head(planner)
    frozen = Executor(*executor.load(base, device), max_new_tokens=s.max_answer_tokens,
                      temperature=s.executor_temperature, max_cache_tokens=s.max_cache_tokens,
                      generator=torch.Generator(device).manual_seed(s.seed))
    work.mkdir(exist_ok=True)
    data.record_stage(s.run, "int", s)
    if (work / "int.json").exists():                                    # a stopped stage: only fine-tuning is missing
        report = json.loads((work / "int.json").read_text())
        records = [json.loads(line) for line in (work / "interventions.jsonl").read_text().splitlines()]
    else:
        begin, records = time.perf_counter(), collect(planner, tokenizer, frozen, problems, s)
        report = count(records, by_id) | frozen.spent | {"seconds": time.perf_counter() - begin}
        data.write_atomic(work / "interventions.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        failures = Counter(r["problem_id"] for r in records)
        data.write_groups(work / "hard.jsonl", [g for g in data.read_groups(groups)[:s.problems] if g["positive_pool"]
                                                and failures[g["problem_id"]] >= 7 / 8 * s.group_size])
        data.write_atomic(work / "int.json", json.dumps(report))
    chosen = [(by_id[r["problem_id"]], r["trace"], r["chosen"]) for r in records if r["chosen"]]
    ids = sorted({p.problem_id for p, _, _ in chosen})
    ids = random.Random(s.seed).sample(ids, len(ids))
    held = set(ids[:max(1, len(ids) // 10)] if len(ids) > 1 else [])    # whole problems are held out
    sequences = {"train": [], "heldout": []}
    for p, trace, x in chosen:
        learned = data.splice(p, trace, x["index"], x["step"])
        sequences["heldout" if p.problem_id in held else "train"].append(int_sequence(tokenizer, p, learned))
    common = {"batch_size": s.batch_size, "pad_id": executor.pad_id(tokenizer)}
    loss = lambda: executor.heldout_loss(planner, sequences["heldout"], **common) if held else None
    before = loss()
    if sequences["train"]:
        executor.finetune(planner, sequences["train"], heldout=sequences["heldout"], epochs=s.epochs, seed=s.seed,
                          learning_rate=s.learning_rate, warmup=10, title="InT", **common)
    report |= {"sequences": {part: len(rows) for part, rows in sequences.items()},
               "heldout_loss": {"base": before, "InT": loss()}}
    planner.save_pretrained(work)
    tokenizer.save_pretrained(work)
    data.write_atomic(work / "int.json", json.dumps(report, indent=1))
    os.replace(work, out)
    return out


# ------------------------------------------------------------------------------------------------ evaluation

def load_planner(folder, base: str, device):
    """(model, tokenizer) of a planner in float32, or of one with an adapter as it was trained, on the base model:
    merged into bfloat16 weights most of a small adapter would be rounded away."""
    adapter = Path(folder) / "adapter"
    if not adapter.is_dir():
        return executor.load(folder, device, torch.float32)
    model, tokenizer = executor.load(base, device)
    executor.Lora.load(model, adapter)
    return model, tokenizer


def evaluate(settings: EvalSettings) -> dict:
    """Measures every planner of a run on held-out problems, greedy and at temperature 1, and writes results.json and
    results.md. Rows that results.json holds are measured again only if planner, base model or problems changed."""
    data.check_settings(settings)
    run, device = Path(settings.run), executor.pick_device(settings.device)
    data.begin_stage(settings.run, "evaluate", settings, run / "results.json")
    base = executor.base_of(run)
    files = {split: run / "groups" / f"{split}.jsonl" for split in ("heldout", "longer")}
    files["hard"] = run / "int" / "hard.jsonl"                           # hard for the base planner, GROUP traces each
    splits = {split: data.read_problems(path)[:settings.problems] for split, path in files.items()
              if split == "heldout" or path.exists() and path.stat().st_size}
    planners = sorted(p for p in run.glob("planner-*-seed*") if (p / "config.json").exists() and p.suffix != ".partial")
    path = run / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    results = {}
    model, tokenizer = executor.load(base, device)
    frozen = Executor(model, tokenizer, max_new_tokens=settings.max_answer_tokens,
                      temperature=settings.executor_temperature, max_cache_tokens=settings.max_cache_tokens)
    rows = [("no trace", None, ""), ("reference trace", None, ""), ("base planner", base, "")]
    if any(p.reference_reasoning is None for problems in splits.values() for p in problems):
        rows.pop(1)                                                      # HumanEval and MBPP come without traces
    rows += [("InT", run / "int", "")] if (run / "int").exists() else []
    rows += [(p.name, p, p / "metrics.jsonl") for p in planners]
    for name, folder, log in tqdm(rows, desc="evaluate"):
        made_from = map(Path, (*files.values(), run / "base.json", base, folder or base))
        entry = {"from": {p.name: p.stat().st_mtime_ns for p in made_from if p.exists()}}
        entry |= {"spent": training_cost(log)} if log else {}
        if name in known and entry.items() <= known[name].items():       # measured before, and nothing is newer
            results[name] = known[name]
            continue
        planner = None                                                   # free the last one before the next comes
        planner, own_tokenizer = load_planner(folder, base, device) if folder else (None, None)
        for split, problems in splits.items():
            group_size = GROUP if split == "hard" and planner else 1
            problems = [p for p in problems for _ in range(group_size)]
            for temperature in (1.0,) if group_size > 1 else (0.0, 1.0) if planner else (0.0,):
                frozen.generator = torch.Generator(device).manual_seed(settings.seed)
                traces, unclosed = None, {}
                if planner:
                    traces, unclosed = write_traces(planner, own_tokenizer, problems, temperature, settings,
                                                    frozen.generator)
                elif name == "reference trace":
                    traces = [p.reference_reasoning for p in problems]
                entry[f"{split} T={temperature:g}"] = judge(frozen, problems, traces, group_size) | unclosed
        results[name] = entry
        data.record_stage(settings.run, "evaluate", settings)
        data.write_atomic(path, json.dumps({**known, **results}, indent=1))
    data.write_atomic(path, json.dumps(results, indent=1))
    data.write_atomic(run / "results.md", table(results))
    return results


def training_cost(log: Path) -> dict:
    """COSTS of a whole training, from the last line of its metrics.jsonl."""
    last = json.loads(log.read_text().splitlines()[-1])
    return {key: last["step"] + 1 if key == "steps" else last[key] for key in COSTS}


def write_traces(planner, tokenizer, problems, temperature, settings, generator) -> tuple[list[str], dict]:
    """One trace for each problem, and {"unclosed": share that was not closed}."""
    prompts = [data.encode_prompt(tokenizer, data.planner_prompt(p)) for p in problems]
    _, texts = complete(planner, tokenizer, prompts, 1, temperature, settings, generator)
    return [data.extract_reasoning(t) for t in texts], {"unclosed": mean(data.CLOSE not in t for t in texts)}


def judge(frozen: Executor, problems: list[Problem], traces: list[str] | None, group_size: int = 1) -> dict:
    """success, and in the tiny world faithful, right_for_wrong_reason and leak, as shares of the traces; with groups of
    traces of one problem also the share of groups that all succeed or all fail."""
    success = frozen.success(problems, traces, 1)
    found = {"problems": len(problems) // group_size, "success": mean(success)}
    if group_size > 1:
        groups = [success[i:i + group_size] for i in range(0, len(success), group_size)]
        found["groups_without_spread"] = mean(max(g) == min(g) for g in groups)
    checks = [data.check_trace(p, t) for p, t in zip(problems, traces)] if traces else []
    if None in checks or not checks:
        return found
    return found | {"faithful": mean(f for f, _ in checks), "leak": mean(l for _, l in checks),
                    "right_for_wrong_reason": mean(bool(s) and not f for s, (f, _) in zip(success, checks))}


METRICS = ("success", "faithful", "right_for_wrong_reason", "leak", "unclosed", "groups_without_spread")
GROUP = 8                                                               # traces for each hard problem
COSTS = ("steps", "planner_tokens", "executor_prompt_tokens", "executor_tokens", "program_runs", "seconds")


def table(results: dict) -> str:
    """results.json as Markdown: a table of the measured METRICS per split and temperature, one row per planner name
    (mean over seeds and, with several, ± their sample standard deviation), then what training each planner cost."""
    names: dict[str, list[dict]] = {}
    for row, entry in results.items():
        names.setdefault(row.removeprefix("planner-").rpartition("-seed")[0] or row, []).append(entry)
    lines = []
    for key in sorted(key for key in results["base planner"] if " T=" in key):
        metrics = [m for m in METRICS if any(m in entry.get(key, {}) for entry in results.values())]
        split, temperature = key.split(" T=")
        count = next(e[key]["problems"] for e in results.values() if key in e)
        how = "greedy" if temperature == "0" else f"sampled at temperature {temperature}"
        lines += [f"{split} problems ({count}), traces {how}:", "",
                  "| traces from | seeds | " + " | ".join(m.replace("_", " ") for m in metrics) + " |",
                  "|---" * (len(metrics) + 2) + "|"]
        for name, entries in names.items():
            measured = [e[key if key in e else f"{split} T=0"] for e in entries]   # no planner: nothing is sampled
            cells = [spread([m.get(metric) for m in measured]) for metric in metrics]
            name = name.replace("-after-InT", " after InT")
            lines.append(f"| {name} | {len(entries) if 'spent' in entries[0] else ''} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["cost of training (mean over seeds):", "",
              "| reward | " + " | ".join(c.replace("_", " ") for c in COSTS) + " |", "|---" * (len(COSTS) + 1) + "|"]
    for name, entries in names.items():
        if "spent" in entries[0]:
            cells = [f"{mean(e['spent'][c] for e in entries):,.0f}" for c in COSTS]
            lines.append(f"| {name.replace('-after-InT', ' after InT')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list) -> str:
    """The mean, as "0.81", or for several seeds "0.81 ± 0.02" (sample standard deviation)."""
    if any(v is None for v in values):
        return ""
    return f"{mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def inspect(settings: EvalSettings) -> str:
    """One held-out problem and its traces, from the executor's runs to the advantage, as text for a person to read."""
    data.check_preset(settings)
    run, device = Path(settings.run), executor.pick_device(settings.device)
    problems = data.read_problems(run / "groups" / "heldout.jsonl")
    problem, generator = problems[settings.seed % len(problems)], torch.Generator(device).manual_seed(settings.seed)
    base, tokenizer = executor.load(executor.base_of(run), device)
    folder = run / settings.planner if settings.planner else executor.base_of(run)
    planner, own_tokenizer = load_planner(folder, executor.base_of(run), device)
    rm = RubricRewardModel.from_pretrained(run / "rm", device)
    frozen = Executor(base, tokenizer, max_new_tokens=settings.max_answer_tokens,
                      temperature=settings.executor_temperature, max_cache_tokens=settings.max_cache_tokens,
                      generator=generator)
    step = TrainSettings(mode="tracelift", group_size=settings.traces, max_trace_tokens=settings.max_trace_tokens)
    batch = rollout(planner, own_tokenizer, [problem], step, generator)
    rewards, runs = measure(step, frozen, rm, batch.problems, batch.traces)
    alone = frozen.run([problem], None, step.repeats)[0]
    dimensions = rm.score([data.rm_text(problem, t) for t in batch.traces])[1].tolist()
    advantages = kernels.group_advantage(torch.tensor([r.total for r in rewards]), step.group_size).tolist()

    show = lambda r: f"{r.output.strip()!r} {'right' if r.ok else 'wrong'}"
    lines = [f"problem     {problem.problem}", f"reference   {problem.reference_reasoning}"]
    lines += [f"no trace    {show(r)}" for r in alone]
    for i, (trace, reward) in enumerate(zip(batch.traces, rewards)):
        check = data.check_trace(problem, trace)
        lines += ["", f"trace       {trace}" + (f"    (faithful: {check[0]}, leak: {check[1]})" if check else "")]
        lines += [f"  e2e       {show(runs[i][0])}"] + [f"  uplift    {show(r)}" for r in runs[i][1:]]
        lines += ["  rubric    " + ", ".join(f"{n} {d:.1f}" for n, d in zip(rm.dimension_names, dimensions[i])),
                  f"  uplift    ({reward.with_trace} with - {reward.without_trace} without) / {step.repeats}"
                  f" = {reward.uplift:+.2f}",
                  f"  reward    {step.w_e:g} * {reward.e2e:g} + {step.w_r:g} * {reward.rm:.2f} * {reward.uplift:+.2f}"
                  f" = {reward.total:.3f}      advantage {advantages[i]:+.2f}"]
    return "\n".join(lines)


def plot(run) -> Path:
    """Draws the training curves of every planner of a run, finished or not, into curves.png: means of 5 steps.
    UserError without matplotlib, which nothing else needs, or without a curve."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("tracelift.py plot needs matplotlib: pip install matplotlib") from None
    logs, path = sorted(Path(run).glob("planner-*/metrics.jsonl")), Path(run) / "curves.png"
    if not logs:
        raise UserError(f"{run}: no planner-*/metrics.jsonl to plot; run python tracelift.py train --run {run} first")
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(2, 4).flat
    for axis, key in zip(axes, ("reward", "success", "faithful", "leak", "entropy", "groups_without_spread",
                                "trace_tokens", "grad_norm")):
        for log in logs:
            values = [json.loads(line)[key] for line in log.read_text().splitlines()]
            if None not in values:                                       # what this mode or domain does not measure
                axis.plot([mean(values[max(0, i - 4):i + 1]) for i in range(len(values))], label=log.parent.name)
        axis.set(title=key, xlabel="step")
    axes[0].legend(fontsize="small")
    figure.savefig(path.with_suffix(".partial"), format="png")
    os.replace(path.with_suffix(".partial"), path)
    return path


# ------------------------------------------------------------------------------------------------ commands

def main(argv) -> None:
    """The commands train, int, evaluate, inspect and plot."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "train":
        settings = data.parse_settings(TrainSettings, TRAIN_PRESETS, rest, "tracelift.py train")
        print(f"{train(settings)}: trained")
        print(f"next: python tracelift.py evaluate --preset {settings.preset} --run {settings.run}")
    elif command == "int":
        settings = data.parse_settings(IntSettings, INT_PRESETS, rest, "tracelift.py int")
        folder = intervene(settings)
        report = json.loads((folder / "int.json").read_text())
        print("\n".join(f"{key}: {json.dumps(value)}" for key, value in report.items()))
        if not report["sequences"]["train"]:
            print("no intervention was kept: this planner is the base planner")
        print(f"{folder}: {report['with_intervention']} of {report['failed_traces']} failed traces with an intervention"
              f"\nnext: python tracelift.py train --preset {settings.preset} --run {settings.run} --init {folder}")
    elif command == "evaluate":
        settings = data.parse_settings(EvalSettings, EVAL_PRESETS, rest, "tracelift.py evaluate")
        print(table(evaluate(settings)))
        print(f"{settings.run}/results.json, {settings.run}/results.md: written\n"
              f"next: python tracelift.py inspect --preset {settings.preset} --run {settings.run}")
    elif command == "inspect":
        print(inspect(data.parse_settings(EvalSettings, EVAL_PRESETS, rest, "tracelift.py inspect")))
    elif command == "plot":
        print(f"{plot(data.parse_settings(EvalSettings, EVAL_PRESETS, rest, 'tracelift.py plot').run)}: written")
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise UserError(f"tracelift.py {command}: choose train, int, evaluate, inspect or plot; each has --help")


if __name__ == "__main__":
    data.run_command(main)
