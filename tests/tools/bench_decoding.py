"""Tokens per second of `executor.generate` beside transformers' own `generate`, on the executor's work of one step.

    python tests/tools/bench_decoding.py --model FOLDER                   # two problems of a training step
    python tests/tools/bench_decoding.py --model FOLDER --shared 150      # prompts of a problem share 150 tokens
    python tests/tools/bench_decoding.py --problems 8 --new_tokens 64     # a whole step; a small random model

Greedily, so that in float32 all outputs must be equal. The methods take turns within one process; the table gives
medians and ranges.
"""
import importlib.util
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
from data import UserError, option  # noqa: E402


@dataclass(frozen=True)
class BenchSettings(data.Options):
    """Settings of this command."""
    model: str = option("", "Hugging Face folder or name; empty: a small random model, whose table only shows the form")
    device: str = option("", "cuda, cpu, ...; empty: CUDA if available")
    dtype: str = option("float32", "of the weights", choices=("float32", "bfloat16"))
    threads: int = option(1, "of the CPU", low=1)
    problems: int = option(2, "N; each is run with its traces and without", low=1)
    traces: int = option(8, "G, traces per problem", low=1)
    num_runs: int = option(3, "K, outputs of each prompt", low=1)
    shared: int = option(0, "tokens at the beginning that the prompts of a problem have in common", low=0)
    shortest: int = option(60, "tokens of a prompt beyond those, at least", low=1)
    longest: int = option(145, "and at most; uniform, random tokens", low=1)
    new_tokens: int = option(48, "of every output; there is no end of sequence, so no row ends early", low=2)
    single: int = option(9, "outputs timed with one call each; all of them would take too long", low=1)
    rounds: int = option(3, "repetitions of all methods in turn", low=1)
    other: str = option("", "another executor.py to compare with")


def make_prompts(s: BenchSettings, vocabulary: int) -> list[list[int]]:
    """1 + G prompts for each problem."""
    rng, prompts = random.Random(0), []
    for _ in range(s.problems):
        beginning = [rng.randrange(10, vocabulary) for _ in range(s.shared)]
        for _ in range(1 + s.traces):
            length = rng.randint(s.shortest, s.longest)
            prompts.append(beginning + [rng.randrange(10, vocabulary) for _ in range(length)])
    return prompts


def transformers_generate(model, rows: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Outputs of transformers, all rows in one padded batch."""
    P = max(map(len, rows))
    ids = torch.tensor([[0] * (P - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return out[:, P:].tolist()


def ours(module, model, prompts, s: BenchSettings) -> list[list[int]]:
    return module.generate(model, prompts, num_samples=s.num_runs, max_new_tokens=s.new_tokens, temperature=0,
                           eos_id=-1).tokens


def import_file(path: str):
    spec = importlib.util.spec_from_file_location("other", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["other"] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def bench(s: BenchSettings) -> str:
    """A Markdown table. UserError where an output in float32 differs (lower precisions decide near ties by chance)."""
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    device, dtype = executor.pick_device(s.device), getattr(torch, s.dtype)
    if s.model:
        model = executor.load(s.model, device, dtype)[0]
    else:
        model = executor.tiny_model(8192, 256, 6).to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    prompts = make_prompts(s, model.config.vocab_size)
    every = [prompt for prompt in prompts for _ in range(s.num_runs)]
    some = every[::max(1, len(every) // s.single)][:s.single]
    methods = {                                            # name: rows, and what decodes them
        "executor.generate": (every, lambda: ours(executor, model, prompts, s)),
        "transformers, one batch": (every, lambda: transformers_generate(model, every, s.new_tokens)),
        "transformers, one call per output": (some, lambda: [transformers_generate(model, [row], s.new_tokens)[0]
                                                             for row in some])}
    if s.other:
        other = import_file(s.other)
        methods[s.other] = (every, lambda: ours(other, model, prompts, s))
    wanted = {tuple(row): out for row, out in zip(every, methods["executor.generate"][1]())}
    rates, equal = {name: [] for name in methods}, {}
    for _ in range(1 + s.rounds):                          # the first calls allocate, compile and plan
        for name, (rows, decode) in methods.items():
            begin = time.perf_counter()
            outputs = decode()
            rates[name].append(len(rows) * s.new_tokens / (time.perf_counter() - begin))
            equal[name] = sum(wanted[tuple(row)] == out for row, out in zip(rows, outputs)) / len(rows)
            if equal[name] < 1 and model.dtype == torch.float32:
                raise UserError(f"{name}: a share of {1 - equal[name]:.3f} of its outputs differs from ours")
    lines = [f"{s.model or 'a small random model'}, {s.dtype}, {device}, {s.threads} threads; {len(prompts)} prompts, "
             f"{s.num_runs} outputs of {s.new_tokens} tokens each; {s.rounds} rounds", "",
             "| decoder | outputs | equal to ours | tokens/s, median (range) |", "|---|---|---|---|"]
    for name, (_, *rate) in rates.items():
        lines.append(f"| {name} | {len(methods[name][0])} | {equal[name]:.2f} | {statistics.median(rate):,.0f} "
                     f"({min(rate):,.0f} to {max(rate):,.0f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    data.run_command(lambda argv: print(bench(data.parse_settings(BenchSettings, argv, "bench_decoding.py"))))
