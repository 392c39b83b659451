"""Where the time of a training step goes, and how near that is to what the machine can do.

    python tests/tools/bench_step.py --run_dir runs/smollm2-math --planner planner-exec_only-seed0

Seconds are those of metrics.jsonl. The limit beside them: the floating point operations of a phase's matrix products,
at the speed that a matrix product of that size reaches on this machine now. Reading P tokens through W weights takes
2 P W operations, a gradient twice as many more. Attention, sampling, the optimizer and memory traffic are not in the
limit. Measure on the machine of the training, with nothing else at work.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
import tracelift  # noqa: E402
from data import UserError, option  # noqa: E402

PHASES = ("rollout", "reward", "update")


@dataclass(frozen=True)
class StepSettings(data.Options):
    """Settings of this command."""
    run_dir: str = option("runs/smollm2-math", "run folder")
    planner: str = option("planner-exec_only-seed0", "folder of a training in it, finished or .partial")
    first: int = option(5, "steps that are left out: the first ones measure baselines", low=1)
    device: str = option("", "cuda, cpu, ...; empty: CUDA if available")


def speed(rows: int, model, dtype, seconds: float = 2.0) -> float:
    """Operations per second of (rows, hidden) @ (hidden, intermediate)."""
    config = model.config.get_text_config()
    left = torch.randn(rows, config.hidden_size, device=model.device, dtype=dtype)
    right = torch.randn(config.hidden_size, config.intermediate_size, device=model.device, dtype=dtype)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(20):
            product = left @ right
        product[0, 0].item()                              # waits for a GPU
        count += 20
    return 2 * left.numel() * right.shape[1] * count / (time.perf_counter() - begin)


def operations(now: dict, before: dict, prompts: int, body: int, head: int, G: int, rm_tokens: float) -> dict:
    """{phase: (operations on many tokens at once, those of decoding)} of a step; body, head: the weights of a dense
    model that every token passes, and those of its head; prompts: tokens of the planner's prompts."""
    costs = ("planner_tokens", "executor_prompt_tokens", "executor_tokens")
    sampled, read, wrote = (now[name] - before[name] for name in costs)
    update = body * (prompts * G + sampled) + head * sampled
    backward = 1 - now["groups_without_spread"]
    return {"rollout": (2 * body * prompts, 2 * (body + head) * sampled),
            "reward": (2 * body * (read + rm_tokens), 2 * (body + head) * wrote),
            "update": ((2 + 4 * backward) * update, 0)}


def report(s: StepSettings) -> str:
    """The table."""
    folder = Path(s.run_dir) / s.planner
    known, rm_tokens = data.made_with(folder), 0.0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < s.first + 2:
        raise UserError(f"{folder}/metrics.jsonl: {len(lines)} steps; --first {s.first} needs {s.first + 2}")
    model, tokenizer = executor.load_for(s.run_dir, executor.base_of(s.run_dir), executor.pick_device(s.device))
    table, dtype = model.get_input_embeddings().weight, executor.work_dtype(model)
    tied = model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    body = sum(p.numel() for p in model.parameters()) - table.numel() * (1 if tied else 2)
    problems, G = data.read_problems(Path(s.run_dir) / known["groups"]), known["group_size"]
    rows = known["problems_per_step"] * G
    many, few = speed(2048, model, dtype), speed(rows, model, dtype)
    spent, limit = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    steps = range(s.first, len(lines))
    for i in steps:
        chosen = tracelift.problems_of_step(problems, i, known["problems_per_step"], known["seed"])
        prompts = sum(len(data.encode_prompt(tokenizer, data.planner_prompt(p))) for p in chosen)
        if "rm" in tracelift.REWARDS[known["mode"]].needs:
            texts = sum(len(data.encode_text(tokenizer, data.rm_text(p, ""))) for p in chosen)
            rm_tokens = texts * G + lines[i]["trace_tokens"] * rows
        needed = operations(lines[i], lines[i - 1], prompts, body, table.numel(), G, rm_tokens)
        for phase, (together, decoded) in needed.items():
            spent[phase] += lines[i][f"seconds_{phase}"] / len(steps)
            limit[phase] += (together / many + decoded / few) / len(steps)
    shown = [f"{s.planner}, steps {s.first} to {len(lines) - 1}, {dtype}; matrix products reach {many / 1e9:.0f} "
             f"GFLOP/s with 2048 rows, {few / 1e9:.0f} with {rows}", "", "| phase | seconds a step | limit | share |",
             "|---" * 4 + "|"]
    for phase in spent:
        shown.append(f"| {phase} | {spent[phase]:.1f} | {limit[phase]:.1f} | {limit[phase] / spent[phase]:.0%} |")
    return "\n".join(shown)


if __name__ == "__main__":
    data.run_command(lambda argv: print(report(data.parse_settings(StepSettings, argv, "bench_step.py"))))
