"""The parts of tests/gpu.sh, whose header says how to call them.

Each part runs in a process of its own, which is killed after LIMIT seconds: a part that fails, hangs or breaks its CUDA
context harms no other. Every number is on disk as soon as it is measured and stays there until the same part measures
it again on the same machine.
"""
import gc
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import torch  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
from data import UserError  # noqa: E402
from memory_table import GIB, QWEN, Shape, row  # noqa: E402

LIMIT = 480                                               # seconds of a part
WORK = ROOT / "runs" / "gpu"
PHASES = ("rollout", "reward", "update")

# ------------------------------------------------------------------------------------------------ 1. sizes


@dataclass(frozen=True)
class Size:
    """How large everything is: as in a training of a 0.5B model, or as small as it goes."""
    shape: Shape                                          # of the random model
    rows: tuple[int, ...]                                 # of a decoding batch
    prompt: int                                           # tokens of a prompt
    short: int                                            # new tokens; a decoded token costs the difference between
    long: int                                             #     a call with `long` and one with `short` of them
    problems: int                                         # of a training step
    group_size: int
    trace_tokens: int
    answer_tokens: int
    micro_tokens: int
    steps: int                                            # the first one warms up and is not counted


REAL = Size(QWEN["0.5B"], (8, 64, 256), 128, 32, 128, 8, 8, 256, 256, 4096, 3)
TOY = Size(Shape(600, 32, 2, 4, 2, 64, True), (2, 4), 12, 2, 6, 2, 2, 8, 8, 64, 2)


def synchronize() -> None:
    """Waits for the GPU; does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work) -> float:
    """Wall clock of work(), the GPU's part included."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def peak_gib() -> float | None:
    """The most memory that tensors held since the last call, GiB; None on a CPU, where nobody counts it."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


def random_model(shape: Shape, device, dtype):
    """A Qwen2 with random weights. Its speed is that of a trained one."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()


# ------------------------------------------------------------------------------------------------ 2. the JSON


class Report:
    """The record of one part in the JSON file: {outcome, machine, date, command, seconds, results}, where results are
    {title: {name: number}}."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def read(self) -> dict:
        """The records of all parts."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def entry(self) -> dict:
        """This part's record."""
        return self.read().get(self.part, {})

    def write(self, **changes) -> None:
        """Replaces keys of this part's record."""
        data.write_atomic(self.path, json.dumps(self.read() | {self.part: self.entry() | changes}, indent=1) + "\n")

    def begin(self, machine: dict, command: str) -> None:
        """Starts a record; it keeps the numbers that this part has measured on the same machine."""
        same = self.entry().get("machine") == machine
        self.write(outcome="begun", machine=machine, command=command, results=self.entry()["results"] if same else {},
                   date=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def add(self, title: str, **numbers) -> None:
        """Writes down what was measured."""
        self.write(results=self.entry()["results"] | {title: numbers})


def machine(dry: bool) -> dict:
    """The card and the versions that a number depends on."""
    found = {name: value for name, value in data.environment().items() if name != "gpu"}
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found |= {"cuda": torch.version.cuda, "driver": driver}
    if dry:
        return found | {"card": "no GPU: dry run on a CPU"}
    card = torch.cuda.get_device_properties(0)
    return found | {"card": card.name, "capability": f"{card.major}.{card.minor}",
                    "memory_gib": card.total_memory / GIB, "processors": card.multi_processor_count,
                    "cudnn": torch.backends.cudnn.version()}


def output_of(*command: str) -> str | None:
    """The first line that a command prints; None where it is not installed or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0] if done.returncode == 0 else None


def table(path: Path, part: str) -> str:
    """The record of a part as Markdown."""
    entry = Report(path, part).entry()
    columns = list(dict.fromkeys(name for numbers in entry["results"].values() for name in numbers))
    found = entry["machine"]
    lines = [f"**{part}**: {entry['outcome']}. {found['card']}, torch {found['torch']}, {entry['date']}, "
             f"`{entry['command']}`", "", row(["", *(name.replace("_", " ") for name in columns)]),
             "|---" * (1 + len(columns)) + "|"]
    for title, numbers in entry["results"].items():
        cells = [numbers.get(name) for name in columns]
        lines.append(row([title, *("" if x is None else f"{x:.4g}" if isinstance(x, float) else x for x in cells)]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 3. versions, tests


def versions(report: Report, size: Size, arguments: list[str]) -> None:
    """What is installed, and whether Triton can compile."""
    import kernels
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    limits = "--query-gpu=power.limit,clocks.max.sm,clocks.max.mem"
    device = executor.pick_device("cpu" if size is TOY else "cuda")
    report.add("versions", **report.entry()["machine"], compiler=output_of(os.environ.get("CC", "cc"), "--version"),
               python_header=header.exists(), limits=output_of("nvidia-smi", limits, "--format=csv,noheader"))
    try:
        kernels.check(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    report.add("kernels", backend=kernels.backend(device))


def gpu_tests(report: Report, size: Size, arguments: list[str]) -> None:
    """pytest tests/test_gpu.py. UserError where a test fails, or where on a GPU none passes."""
    file = WORK / "tests.xml"
    WORK.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_gpu.py", f"--junitxml={file}"],
                          cwd=ROOT)
    outcomes = []
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        outcomes.append("failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed")
        report.add(case.get("name"), outcome=outcomes[-1], seconds=float(case.get("time")))
    if done.returncode or size is REAL and "passed" not in outcomes:
        raise UserError(f"{outcomes.count('failed')} tests failed, {outcomes.count('passed')} passed")


# ------------------------------------------------------------------------------------------------ 4. kernels


def kernel_bench(report: Report, size: Size, arguments: list[str]) -> None:
    """tests/tools/bench_kernels.py, with fewer rows where the card has less than 70 GB free."""
    import bench_kernels as bench
    device, rows, vocabularies, hidden, repeats = torch.device("cpu"), 16, (1000,), 16, 1
    if size is REAL:
        rows = 32768 if torch.cuda.mem_get_info()[0] > 70e9 else 4096
        device, vocabularies, hidden, repeats = executor.pick_device("cuda"), (49152, 151936), 896, 20
    for dtype in (torch.float32, torch.bfloat16):
        report.add(f"error in {dtype}", **bench.errors(bench.step(min(rows, 512), vocabularies[0], dtype, device)))
    for V in vocabularies:
        found, copy = bench.times(rows, V, hidden, device, repeats)
        for title, numbers in (found | {"copy": {"gb_per_s": copy}}).items():
            report.add(f"{title}, {rows} rows of {V}", **numbers)


# ------------------------------------------------------------------------------------------------ 5. decoding


def decoding(report: Report, size: Size, arguments: list[str]) -> None:
    """Milliseconds per decoded token, all rows together, in each form in which a training decodes."""
    device = executor.pick_device("cpu" if size is TOY else "cuda")
    model = random_model(size.shape, device, torch.float32 if size is TOY else torch.bfloat16)
    for rows in size.rows:
        report.add(f"executor, {rows} rows", **per_token(model, size, rows))
        with mock.patch.object(executor, "GRAPHS", False):
            report.add(f"executor, step not captured, {rows} rows", **per_token(model, size, rows))
    executor.Lora(model, 16, 32.0)
    for rows in size.rows:
        report.add(f"planner with LoRA, {rows} rows", **per_token(model, size, rows))
    model = random_model(size.shape, device, torch.float32)
    for rows in size.rows:
        report.add(f"planner, float32 under autocast, {rows} rows", **per_token(model, size, rows))


def compiled_decoding(report: Report, size: Size, arguments: list[str]) -> None:
    """The executor with torch.compile, which no training uses. Last, since compiling may fail or take minutes."""
    device = executor.pick_device("cpu" if size is TOY else "cuda")
    model = random_model(size.shape, device, torch.float32 if size is TOY else torch.bfloat16)
    # inductor takes a minute on a slow CPU; the tracing before it is the same
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager" if size is TOY else "inductor")
    with mock.patch.object(executor, "GRAPHS", False):
        for rows in size.rows:
            report.add(f"executor, torch.compile, {rows} rows", **per_token(model, size, rows))


def per_token(model, size: Size, rows: int) -> dict:
    """Milliseconds per token that `generate` decodes for this many rows, seconds of the first call (compiling, loading)
    and the peak of memory. No row ends early: the EOS does not exist."""
    random_ids = random.Random(0)
    lengths = [size.prompt - r % 8 for r in range(rows)]                         # equal ones would need no mask
    prompts = [[random_ids.randrange(size.shape.vocab) for _ in range(length)] for length in lengths]
    uniforms = executor.uniform_numbers([f"row {r}" for r in range(rows)], size.long)

    def decode(new: int):
        with executor.autocast(model):                    # as executor.LM decodes
            executor.generate(model, prompts, max_new_tokens=new, temperature=1.0, eos_id=-1, uniforms=uniforms,
                              max_cache_tokens=rows * (size.prompt + size.long))

    first = seconds_of(lambda: decode(size.short))
    peak_gib()
    short = min(seconds_of(lambda: decode(size.short)) for _ in range(2))
    long = min(seconds_of(lambda: decode(size.long)) for _ in range(2))
    return {"ms_per_token": 1000 * (long - short) / (size.long - size.short), "first_call_s": first,
            "peak_gib": peak_gib()}


# ------------------------------------------------------------------------------------------------ 6. a training step


def training_step(report: Report, size: Size, arguments: list[str]) -> None:
    """Seconds and peak memory of each phase of a step, all weights and LoRA. Rewards are random numbers, so that every
    group has a spread and every micro-batch its backward pass; a random model ends no trace early. So this is the
    longest that a step of these settings takes. An argument is the folder of a model to use instead."""
    run_dir = WORK / ("dry-step" if size is TOY else "step")
    shutil.rmtree(run_dir, ignore_errors=True)
    make_run(run_dir, size, *arguments)
    for lora, checkpointing in itertools.product((0, 16), (1, 0)):
        title = ("LoRA" if lora else "all weights") + ("" if checkpointing else ", without checkpointing")
        flags = [f"--name=v{lora}{checkpointing}", f"--lora_rank={lora}", f"--checkpointing={checkpointing}"]
        gc.collect()
        try:
            steps = train_measured(size, run_dir, flags, keep=False)[1:]
        except torch.OutOfMemoryError as error:
            report.add(title, failed=first_line(error))
            continue
        numbers = {f"{phase}_s": statistics.mean(step[f"seconds_{phase}"] for step in steps) for phase in PHASES}
        numbers |= {f"{phase}_peak_gib": steps[-1][f"peak_gib_{phase}"] for phase in PHASES}
        report.add(title, **numbers, grad_norm=steps[-1]["grad_norm"], trace_tokens=steps[-1]["trace_tokens"])
    shutil.rmtree(run_dir)


def train_measured(size: Size, run_dir: Path, flags: list[str], keep: bool) -> list[dict]:
    """Trains as `python tracelift.py train` does. Returns the lines of metrics.jsonl, with the peak GiB of each phase.
    keep=False: without checkpoints and a planner at the end."""
    import tracelift
    s = data.parse_settings(tracelift.TrainSettings, step_flags(size, run_dir) + flags, "tracelift.py train")
    log, plain, coin, peaks = tracelift.TrainingLog, tracelift.TrainingLog.phase, random.Random(0), []

    def phase(self, name):
        synchronize()                                     # else a phase would pay for the one before it
        peaks.append(peak_gib())
        plain(self, name)

    luck = tracelift.Mode(lambda *_: coin.random(), needs=("runs", "uplift", "rm"))
    changes = [mock.patch.object(log, "phase", phase), mock.patch.dict(tracelift.REWARDS, tracelift=luck)]
    if not keep:
        changes += [mock.patch.object(log, name, lambda *_: None) for name in ("save_checkpoint", "save_planner")]
    for change in changes:
        change.start()
    try:
        folder = tracelift.train(s)
    finally:
        for change in changes:
            change.stop()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):                      # rollout, reward, update, write: peaks[0] is before the first
        line |= {f"peak_gib_{phase}": peaks[4 * i + j] for j, phase in enumerate(PHASES, 1)}
    return lines


def step_flags(size: Size, run_dir: Path) -> list[str]:
    """Flags of a training as run.sh's recipe for GSM8K has them."""
    sizes = asdict(size)
    names = ("problems_per_step", "group_size", "micro_tokens", "max_trace_tokens", "max_answer_tokens", "steps")
    flags = [f"--{name}={sizes[name.removeprefix('max_').removesuffix('_per_step')]}" for name in names]
    device = "cpu" if size is TOY else "cuda"
    return [*flags, f"--run_dir={run_dir}", f"--device={device}", "--warmup=1", "--learning_rate=1e-6"]


def make_run(run_dir: Path, size: Size, model_folder: str = "") -> None:
    """A run folder with school problems, a base model and a random reward model on it."""
    from rm import RubricRewardModel
    text = ("A book shop has {} shelves with {} books each. On Monday morning the owner sells {} of the books to a "
            "teacher, who wants them for a class. In the afternoon a truck brings 12 more. How many are there then?")
    groups = []
    for i in range(size.problems * size.steps):
        groups.append({"problem_id": f"p{i}", "source": "made", "task_type": "math", "reference_solution": "7",
                       "problem": text.format(3 + i % 7, 5 + i % 11, i % 9), "positive_pool": [], "negative_bank": []})
    data.write_groups(run_dir / "groups" / "train.jsonl", groups)
    base = Path(model_folder).resolve() if model_folder else run_dir / "base"
    device = executor.pick_device("cpu" if size is TOY else "cuda")
    if not model_folder:
        save_random_base(base, size.shape, [data.problem_of(group) for group in groups], device)
    (run_dir / "base").mkdir(exist_ok=True)
    record = {"model": str(base) if model_folder else ".", "chat_template_kwargs": {}}
    record["fingerprint"] = model_folder and data.fingerprint(str(base))
    (run_dir / "base" / "base.json").write_text(json.dumps(record))
    model, tokenizer = executor.load(str(base), device, torch.float32)
    RubricRewardModel(model.base_model, tokenizer, data.DIMENSIONS["math"]).to(device).save_pretrained(run_dir / "rm")


def save_random_base(folder: Path, shape: Shape, problems, device) -> None:
    """A random model with a tokenizer for the problems. Every id is a word, so that sampled traces are read in full. A
    Llama of the same widths: for Qwen2 transformers insists on Qwen2's own tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM
    texts = [data.OPEN, data.CLOSE, "Mia has 12 coins .\nShe buys 5 more , so she's got: 12 + 5 = 17 3 4 6 7 8 9 0 ?"]
    for problem in problems:
        texts += [data.planner_prompt(problem), data.executor_prompt(problem, ""), data.rm_text(problem, "")]
    missing = shape.vocab - len(executor.tiny_tokenizer(texts))
    letters = itertools.islice(itertools.product("bcdfghjklmnpqrstvwxz", repeat=4), missing)
    tokenizer = executor.tiny_tokenizer([*texts, *(" " + "".join(word) for word in letters)])
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config(LlamaConfig, **special))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ 7. the command

PARTS = {"versions": versions, "kernels": kernel_bench, "decoding": decoding, "step": training_step, "tests": gpu_tests,
         "compile": compiled_decoding}


def first_line(error) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def inside(part: str, dry: bool, path: Path, arguments: list[str]) -> int:
    """Runs a part in this process. Returns its exit code."""
    report, begin = Report(path, part), time.perf_counter()
    report.begin(machine(dry), " ".join(["tests/gpu.sh", *["dry"] * dry, part, *arguments]))
    outcome = "complete"
    try:
        PARTS[part](report, TOY if dry else REAL, arguments)
    except Exception as error:
        traceback.print_exc()
        outcome = f"failed: {first_line(error)}"
    report.write(outcome=outcome, seconds=time.perf_counter() - begin)
    return int(outcome != "complete")


def outside(part: str, dry: bool, path: Path, arguments: list[str]) -> bool:
    """Runs a part in a process of its own and prints its table. Whether it is complete."""
    words = [sys.executable, __file__, "inside", *["dry"] * dry, part, *arguments]
    child = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    report, outcome = Report(path, part), "stopped"
    try:
        outcome = f"failed: exit code {child.wait(LIMIT)}"
    except subprocess.TimeoutExpired:
        outcome = f"cut after {LIMIT} s"
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)          # and all that it started
        except ProcessLookupError:
            pass
        child.wait()
        if report.entry().get("outcome") == "begun":      # else it has said itself how it ended
            report.write(outcome=outcome)
    if report.entry():
        print(f"\n{table(path, part)}", flush=True)
    return child.returncode == 0


def main(argv: list[str]) -> None:
    """The command behind gpu.sh."""
    words = [word for word in argv if word not in ("inside", "dry")]
    dry = "dry" in argv
    path = WORK / "dry.json" if dry else ROOT / "tests" / "results" / "gpu.json"
    if argv[:1] == ["inside"]:
        sys.exit(inside(words[0], dry, path, words[1:]))
    if not dry and not torch.cuda.is_available():
        raise UserError("gpu.sh: torch sees no CUDA GPU here; tests/gpu.sh dry all tries the same paths on a CPU")
    parts = [(part, []) for part in (PARTS if words == ["all"] else words)]
    if words[:1] == ["step"] and len(words) == 2 and words[1] not in PARTS:
        parts = [("step", words[1:])]
    for part, _ in parts or [("", [])]:
        if part not in PARTS:
            raise UserError(f"gpu.sh: there is no part {part!r}; choose all, {', '.join(PARTS)}")
    failed = [part for part, arguments in parts if not outside(part, dry, path, arguments)]
    print(f"{path}: written")
    if failed:
        raise UserError(f"gpu.sh: not complete: {', '.join(failed)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    data.run_command(main)
