"""Tokens per second of `executor.generate` beside transformers' own `generate`, on the executor's work of one step.

    python tests/tools/bench_decoding.py --model FOLDER                   # the defaults: two problems of a training step
    python tests/tools/bench_decoding.py --model FOLDER --shared 150      # prompts of a problem begin with 150 equal tokens
    python tests/tools/bench_decoding.py --problems 8 --new_tokens 64     # a whole step; without a model a small random one

Greedily, so that all can be compared: in float32 every output must be equal. Methods take turns within one process,
`--rounds` times; the table gives medians and ranges.
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
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
from data import UserError, knob  # noqa: E402


@dataclass(frozen=True)
class BenchSettings:
    """Settings of this command."""
    model: str = knob("", "Hugging Face folder or name; empty: a small random model, whose table only shows the form")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    dtype: str = knob("float32", "of the weights", choices=("float32", "bfloat16"))
    threads: int = knob(1, "of the CPU", low=1)
    problems: int = knob(2, "N; each is run with its traces and without", low=1)
    traces: int = knob(8, "G, traces per problem", low=1)
    repeats: int = knob(3, "K, outputs of each prompt", low=1)
    shared: int = knob(0, "tokens at the beginning that the prompts of a problem have in common", low=0)
    shortest: int = knob(60, "tokens of a prompt beyond those, at least", low=1)
    longest: int = knob(145, "and at most; uniform, random tokens", low=1)
    new_tokens: int = knob(48, "of every output; no end of sequence, so nothing is won by early ends", low=2)
    single: int = knob(9, "outputs timed with one call each; all of them would take too long", low=1)
    rounds: int = knob(3, "repetitions of all methods in turn", low=1)
    other: str = knob("", "another file with a function `generate` to compare with")


def peak_bytes(device: torch.device, reset: bool = False) -> int:
    """Most memory in use since the last reset: of the device, or on Linux of this process; 0 where nothing tells."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def hardware(device: torch.device) -> str:
    """The card's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def make_prompts(s: BenchSettings, vocabulary: int) -> list[list[int]]:
    """1 + G prompts for each problem."""
    rng = random.Random(0)

    def words(count):
        return [rng.randrange(10, vocabulary) for _ in range(count)]

    prompts = []
    for _ in range(s.problems):
        beginning = words(s.shared)
        prompts += [beginning + words(rng.randint(s.shortest, s.longest)) for _ in range(1 + s.traces)]
    return prompts


def transformers_generate(model, rows: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Outputs of transformers, all rows in one padded batch."""
    P = max(map(len, rows))
    ids = torch.tensor([[0] * (P - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return out[:, P:].tolist()


def ours(module, model, prompts, s: BenchSettings) -> list[list[int]]:
    out = module.generate(model, prompts, num_samples=s.repeats, max_new_tokens=s.new_tokens, temperature=0, eos_id=-1)
    return out.tokens


def import_file(path: str):
    spec = importlib.util.spec_from_file_location("other", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["other"] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def bench(s: BenchSettings) -> str:
    """A Markdown table. UserError when an output in float32 differs (lower precisions decide near ties by chance)."""
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    device, dtype = executor.pick_device(s.device), getattr(torch, s.dtype)
    if s.model:
        model = executor.load(s.model, device, dtype)[0]
    else:
        model = executor.tiny_model(8192, 256, 6).to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    prompts = make_prompts(s, model.config.vocab_size)
    every = [prompt for prompt in prompts for _ in range(s.repeats)]
    some = every[::max(1, len(every) // s.single)][:s.single]
    methods = {                                            # name: rows, and what decodes them
        "transformers, one call per output": (some, lambda: [transformers_generate(model, [row], s.new_tokens)[0]
                                                             for row in some]),
        "transformers, one batch": (every, lambda: transformers_generate(model, every, s.new_tokens)),
        "executor.generate": (every, lambda: ours(executor, model, prompts, s))}
    if s.other:
        other = import_file(s.other)
        methods[s.other] = (every, lambda: ours(other, model, prompts, s))
    for _, run in methods.values():                        # first calls allocate, compile and plan
        run()
    rates, peaks, wanted = {name: [] for name in methods}, dict.fromkeys(methods, 0), {}
    equal = dict.fromkeys(methods, 1.0)                    # share of outputs like those of the methods before
    for _ in tqdm(range(s.rounds), desc="bench", mininterval=5):
        for name, (rows, run) in methods.items():
            before = peak_bytes(device, reset=True)
            begin = time.perf_counter()
            outputs = run()
            rates[name].append(len(rows) * s.new_tokens / (time.perf_counter() - begin))
            peaks[name] = max(peaks[name], peak_bytes(device) - before)
            differ = sum(wanted.setdefault(tuple(row), out) != out for row, out in zip(rows, outputs))
            equal[name] = min(equal[name], 1 - differ / len(rows))
            if differ and model.dtype == torch.float32:
                raise UserError(f"{name}: {differ} of {len(rows)} outputs differ from those before")
    return table(s, model, prompts, methods, rates, equal, peaks)


def table(s: BenchSettings, model, prompts, methods, rates, equal, peaks) -> str:
    lengths = [len(prompt) for prompt in prompts]
    best = statistics.median(rates["executor.generate"])
    lines = [f"{s.model or 'a small random model'}, {s.dtype}, on {hardware(model.device)}, {s.threads} threads; "
             f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {s.shared} of them in common within "
             f"a problem; {s.repeats} outputs of {s.new_tokens} tokens each; {s.rounds} rounds", "",
             "| decoder | outputs timed | equal | tokens/s, median (range) | ours against it | peak, no weights |",
             "|---" * 6 + "|"]
    for name, rate in rates.items():
        middle = statistics.median(rate)
        lines.append(f"| {name} | {len(methods[name][0])} | {equal[name]:.2f} | {middle:,.0f} ({min(rate):,.0f} to "
                     f"{max(rate):,.0f}) | {best / middle:.2f} x | {peaks[name] / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def main(argv) -> None:
    print(bench(data.parse_settings(BenchSettings, argv, "tests/bench_decoding.py")))


if __name__ == "__main__":
    data.run_command(main)
