"""Where the time of a training step goes, and how near that is to what the machine can do.

    python tests/tools/bench_step.py --run_dir runs/smollm2-math --planner planner-exec_only-seed0

Seconds of rollout, reward and update are those that the training has written down. The limit beside them: the floating
point operations of the phase's matrix products, at the speed that a matrix product of that size reaches on this machine
now. Reading P tokens through W weights takes 2 P W operations, a gradient twice as many more. Attention, sampling, the
optimizer and memory traffic are not in the limit. Measure on the machine of the training, with nothing else at work.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import executor  # noqa: E402
import tracelift  # noqa: E402
from data import UserError, knob  # noqa: E402


@dataclass(frozen=True)
class StepSettings:
    """Settings of this script."""
    run_dir: str = knob("runs/smollm2-math", "run folder")
    planner: str = knob("planner-exec_only-seed0", "folder of a training in it, finished or .partial")
    first: int = knob(5, "steps that are left out: the first ones measure baselines", low=0)
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")


@dataclass
class Weights:
    """Sizes of a model: weights that every token passes, and those of the head; hidden and widest layer."""
    body: int
    head: int
    hidden: int
    wide: int


def weights_of(model) -> Weights:
    """Counts a dense model."""
    table = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    every = sum(p.numel() for p in model.parameters())
    tied = model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    return Weights(every - table.numel() * (1 if tied else 2), table.numel(), config.hidden_size,
                   config.intermediate_size)


def speed(rows: int, w: Weights, dtype, device, seconds: float = 2.0) -> float:
    """Operations per second of (rows, hidden) @ (hidden, wide)."""
    left = torch.randn(max(1, rows), w.hidden, device=device, dtype=dtype)
    right = torch.randn(w.hidden, w.wide, device=device, dtype=dtype)
    for _ in range(3):
        left @ right
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(20):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 20
    return 2 * left.numel() * w.wide * count / (time.perf_counter() - begin)


def operations(lines: list[dict], i: int, prompt_tokens: int, w: Weights, group_size: int, rm_tokens: float) -> dict:
    """{phase: (operations on many tokens at once, those of decoding)} of step i."""
    now, before = lines[i], lines[i - 1]
    grown = {key: now[key] - before[key] for key in ("planner_tokens", "executor_prompt_tokens", "executor_tokens")}
    sampled, read, wrote = grown.values()
    update = w.body * (prompt_tokens * group_size + sampled) + w.head * sampled
    backward = 1 - now["groups_without_spread"]
    return {"rollout": (2 * w.body * prompt_tokens, 2 * (w.body + w.head) * sampled),
            "reward": (2 * w.body * (read + rm_tokens), 2 * (w.body + w.head) * wrote),
            "update": ((2 + 4 * backward) * update, 0)}


def report(s: StepSettings) -> str:
    """The table."""
    run_dir = Path(s.run_dir)
    folder = run_dir / s.planner
    known = data.read_settings(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < s.first + 2:
        raise UserError(f"{folder}/metrics.jsonl: {len(lines)} steps; --first {s.first} needs {s.first + 2}")
    device = executor.pick_device(s.device)
    model, tokenizer = executor.load_for(run_dir, executor.base_of(run_dir), device)
    w, dtype = weights_of(model), executor.work_dtype(model)
    where = "selected" if known["selected"] else "groups"
    problems = data.read_problems(run_dir / where / "train.jsonl")[:known["max_problems"] or None]
    rows = known["problems_per_step"] * known["group_size"]
    many, few = speed(2048, w, dtype, device), speed(rows, w, dtype, device)
    needs = tracelift.REWARDS[known["mode"]].needs
    spent, limit = dict.fromkeys(("rollout", "reward", "update"), 0.0), dict.fromkeys(("rollout", "reward", "update"), 0.0)
    steps = range(s.first, len(lines))
    for i in steps:
        chosen = tracelift.problems_of_step(problems, i, known["problems_per_step"], known["seed"])
        prompts = sum(len(data.encode_prompt(tokenizer, data.planner_prompt(p))) for p in chosen)
        judged = 0
        if "rm" in needs:
            texts = sum(len(data.encode_text(tokenizer, data.rm_text(p, ""))) for p in chosen)
            judged = texts * known["group_size"] + lines[i]["trace_tokens"] * rows
        for phase, (together, decoded) in operations(lines, i, prompts, w, known["group_size"], judged).items():
            spent[phase] += lines[i][f"seconds_{phase}"]
            limit[phase] += together / many + decoded / few
    shown = [f"{s.planner}, steps {s.first} to {len(lines) - 1}, {dtype}; matrix products reach {many / 1e9:.0f} GFLOP/s "
             f"with 2048 rows, {few / 1e9:.0f} with {rows}", "", "| phase | seconds a step | limit | share |",
             "|---|---|---|---|"]
    for phase in spent:
        shown.append(f"| {phase} | {spent[phase] / len(steps):.1f} | {limit[phase] / len(steps):.1f} | "
                     f"{limit[phase] / spent[phase]:.0%} |")
    return "\n".join(shown)


if __name__ == "__main__":
    data.run_command(lambda argv: print(report(data.parse_settings(StepSettings, argv, "bench_step.py"))))
