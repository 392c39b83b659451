"""The work behind tests/gpu.sh, whose header says what the parts are and how to call them.

Each part runs in a process of its own, which is stopped after LIMIT seconds: a part that fails, hangs or breaks its
CUDA context takes no other with it. A part writes its numbers as they come; one that was cut short keeps them and goes
on when it is called again.
"""
import dataclasses
import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
import memory_table  # noqa: E402
from data import UserError  # noqa: E402
from memory_table import GIB, Shape, row  # noqa: E402

LIMIT = 470                                               # seconds; a part is made for less
WORK = ROOT / "runs" / "gpu"
RESULTS = ROOT / "tests" / "results" / "gpu.json"
DRY_RESULTS = WORK / "dry.json"


# ------------------------------------------------------------------------------------------------ 1. sizes


@dataclass(frozen=True)
class Size:
    """How large everything is: as in a training of a 0.5B model, or as small as it goes."""
    dry: bool
    shape: Shape                                          # of the random model
    rows: tuple[int, ...]                                 # of a decoding batch
    prompt: int                                           # tokens of a prompt
    short: int                                            # new tokens; a decoded token costs the difference between
    long: int                                             #     a call with `long` and one with `short` of them
    sequences: int                                        # of a training pass
    new_shapes: int                                       # how many of each kind are timed in the part attention
    problems: int                                         # of a training step
    group_size: int
    trace_tokens: int
    answer_tokens: int
    micro_tokens: int
    steps: int                                            # of the part step; the first one warms up


REAL = Size(False, memory_table.QWEN["0.5B"], (8, 64, 256), 128, 32, 128, 8, 12, 8, 8, 256, 256, 4096, 3)
TOY = Size(True, Shape(600, 32, 2, 4, 2, 64, True), (2, 4), 12, 2, 6, 2, 3, 2, 2, 8, 8, 64, 2)


def synchronize() -> None:
    """Waits until the GPU has done what it was asked for; CPUs do it at once."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work) -> float:
    """Wall clock of work(), the GPU's part included."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin


def reset_peak() -> None:
    """From here on `peak_gib` counts anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """The most memory that tensors held since `reset_peak`, GiB; None on a CPU, where nobody counts it."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def release() -> None:
    """Gives memory back that no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_of(size: Size) -> torch.device:
    """The GPU, set up as trainings set it up; the CPU when dry."""
    return executor.pick_device("cpu" if size.dry else "cuda")


def random_model(shape: Shape, device, dtype):
    """A Qwen2 of this shape with random weights, in evaluation mode. Its speed is that of trained ones."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()


# ------------------------------------------------------------------------------------------------ 2. the JSON


def machine(size: Size) -> dict:
    """The card and the versions that a number depends on."""
    found = data.environment()
    del found["gpu"]
    found |= {"triton": version_of("triton"), "driver": driver(), "cuda": torch.version.cuda, "cudnn": None}
    if size.dry:
        return found | {"card": "no GPU: dry run on a CPU"}
    card = torch.cuda.get_device_properties(0)
    found["cudnn"] = torch.backends.cudnn.version()
    found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory_gib": card.total_memory / GIB}
    return found | {"processors": card.multi_processor_count}


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    asked = ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if asked:
        return asked.splitlines()[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d[\d.]*", file.read_text()) if file.exists() else None
    return found and found[0]


def ask(command: list[str]) -> str | None:
    """What a command prints; None where it is not installed or fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


class Report:
    """The numbers of one part in the JSON, on disk as soon as they are there."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def read(self) -> dict:
        """All parts so far."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    @property
    def entry(self) -> dict:
        """This part's record."""
        return self.read().get(self.part, {})

    @property
    def results(self) -> dict:
        """This part's numbers so far."""
        return self.entry.get("results", {})

    def write(self, **changes) -> None:
        """Replaces keys of this part's record."""
        everything = self.read()
        everything[self.part] = everything.get(self.part, {}) | changes
        data.write_atomic(self.path, json.dumps(everything, indent=1) + "\n")

    def begin(self, found: dict, command: str) -> bool:
        """Starts the record. True where it continues one that was cut short on the same machine."""
        old = self.entry
        goes_on = bool(old) and old["outcome"] != "complete" and old["machine"] == found
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results = old["results"] if goes_on else {}
        self.write(outcome="begun", machine=found, date=date, command=command, results=results)
        return goes_on

    def add(self, **numbers) -> None:
        """Puts numbers down."""
        self.write(results=self.results | numbers)


# ------------------------------------------------------------------------------------------------ 3. versions, tests


def versions(report: Report, size: Size, arguments: list[str]) -> None:
    """What is installed, and whether Triton can compile."""
    device = device_of(size)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    told = ask([compiler, "--version"]) if compiler else None
    limits = "--query-gpu=power.limit,clocks.max.sm,clocks.max.mem"
    report.add(compiler=told and told.partition("\n")[0],
               python_header=str(header) if header.exists() else f"missing: {header}",
               limits=ask(["nvidia-smi", limits, "--format=csv,noheader"]))
    import kernels
    try:
        kernels.check(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    report.add(kernels=kernels.backend(device))


def versions_table(results: dict, found: dict) -> str:
    lines = [row(["", ""]), "|---|---|"]
    for key, value in (found | results).items():
        lines.append(row([key.replace("_", " "), "none" if value is None else value]))
    return "\n".join(lines)


def gpu_tests(report: Report, size: Size, arguments: list[str]) -> None:
    """pytest tests/test_gpu.py. Raises where a test fails, or where on a GPU none passes."""
    file = WORK / "tests.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_gpu.py", f"--junitxml={file}"],
                          cwd=ROOT)
    cases, counts = {}, {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[outcome] += 1
        cases[case.get("name")] = {"outcome": outcome, "seconds": float(case.get("time"))}
    report.add(**counts, cases=cases)
    if done.returncode or not size.dry and not counts["passed"]:
        raise UserError(f"{counts['failed']} tests failed, {counts['passed']} passed")


def gpu_tests_table(results: dict, found: dict) -> str:
    lines = [row(["tests/test_gpu.py", "outcome", "seconds"]), "|---|---|---|"]
    for name, case in results.get("cases", {}).items():
        lines.append(row([f"`{name}`", case["outcome"], f"{case['seconds']:.1f}"]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 4. attention


def attention(report: Report, size: Size, arguments: list[str]) -> None:
    """What a pass costs whose shape was never seen before, beyond the same pass again, with cuDNN's attention off (as
    trainings have it) and on, on one layer of the model; and which kind of attention was chosen."""
    device = device_of(size)
    shape = dataclasses.replace(size.shape, layers=1)
    model = random_model(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    passes = {f"decoding, {size.rows[-2]} rows": decoding_pass, f"training, {size.sequences} sequences": training_pass}
    length = size.prompt
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for title, make in passes.items():
            rows = size.rows[-2] if make is decoding_pass else size.sequences
            seconds_of(make(model, shape, rows, length))                          # libraries load
            first, again = [], []
            for length in range(length + 1, length + 1 + size.new_shapes):        # no length comes twice
                work = make(model, shape, rows, length)
                first.append(seconds_of(work))
                again.append(seconds_of(work))
            found = {"backend": backend_of(make(model, shape, rows, length))}
            found |= {"first_ms": 1000 * statistics.median(first), "worst_first_ms": 1000 * max(first)}
            found |= {"again_ms": 1000 * statistics.median(again)}
            report.add(**{f"cuDNN {'on' if cudnn else 'off'}, {title}": found})
    torch.backends.cuda.enable_cudnn_sdp(False)


@torch.no_grad()
def decoding_pass(model, shape: Shape, rows: int, length: int):
    """A function that reads one token for each row, in a cache that holds length - 1."""
    prompts = [[(7 * r + t) % shape.vocab for t in range(length - 1 - r % 2)] for r in range(rows)]
    prompts.sort(key=len, reverse=True)
    cache, mask, position = executor.read_prompts(model, prompts, length)[1:]
    mask[:, -1] = 1
    token = torch.ones(rows, 1, dtype=torch.long, device=mask.device)

    @torch.no_grad()
    def work():
        executor.read(model, token, position[:, None], mask, cache)
        for layer in cache.layers:
            layer.filled -= 1                             # again into the same slot
    return work


def training_pass(model, shape: Shape, rows: int, length: int):
    """A function that takes sequences forward and backward, without the head."""
    ids = torch.arange(rows * length, device=model.device).view(rows, length) % shape.vocab
    at = torch.arange(rows * length, device=model.device)

    def work():
        executor.token_hidden(model, ids, at).float().square().mean().backward()
        model.zero_grad()
    return work


def backend_of(work) -> str:
    """The kind of attention that torch chooses for the last call of it in work()."""
    functional, chosen = torch.nn.functional, []
    plain = functional.scaled_dot_product_attention

    def watched(*args, **settings):
        chosen.append(torch._fused_sdp_choice(*args, **settings))
        return plain(*args, **settings)

    functional.scaled_dot_product_attention = watched
    try:
        work()
    finally:
        functional.scaled_dot_product_attention = plain
    return torch.nn.attention.SDPBackend(chosen[-1]).name if chosen else "not torch's"


def attention_table(results: dict, found: dict) -> str:
    lines = [row(["", "attention", "a new shape, ms", "the worst, ms", "the same again, ms"]), "|---" * 5 + "|"]
    for name, r in results.items():
        lines.append(row([name, r["backend"], f"{r['first_ms']:.2f}", f"{r['worst_first_ms']:.2f}",
                          f"{r['again_ms']:.2f}"]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 5. decoding


def decoding(report: Report, size: Size, arguments: list[str]) -> None:
    """Milliseconds per decoded token, for all rows together, in each form in which a training decodes."""
    device = device_of(size)
    cuda = device.type == "cuda"
    model = random_model(size.shape, device, torch.bfloat16 if cuda else torch.float32)
    for rows in size.rows:
        report.add(**{f"executor, {rows} rows": per_token(model, size, rows)})
    compiled_decoding(report, model, size)
    lora = executor.Lora(model, 16, 32.0)
    for rows in size.rows:
        report.add(**{f"planner with LoRA, {rows} rows": per_token(model, size, rows)})
    del model, lora
    release()
    planner = random_model(size.shape, device, torch.float32)
    with executor.autocast(planner):
        for rows in size.rows:
            report.add(**{f"planner, float32 under autocast, {rows} rows": per_token(planner, size, rows)})


def compiled_decoding(report: Report, model, size: Size) -> None:
    """The executor with its forward pass compiled. A failure is a result: the mode is not used in training."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    plain = model.forward
    # inductor takes a minute on a slow CPU; the tracing before it is the same
    model.forward = torch.compile(plain, dynamic=True, backend="eager" if size.dry else "inductor")
    try:
        for rows in size.rows:
            found = per_token(model, size, rows)
            graphs = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
            report.add(**{f"executor, torch.compile, {rows} rows": found | graphs})
    except Exception as error:
        traceback.print_exc()
        report.add(**{"executor, torch.compile": {"failed": first_line(error)}})
    finally:
        model.forward = plain


def per_token(model, size: Size, rows: int) -> dict:
    """Milliseconds per token that `generate` decodes for this many rows, of the first call in all (compiling, loading)
    and the peak of memory. No row ends early: the EOS does not exist."""
    random_ids = random.Random(0)
    lengths = [size.prompt - r % 8 for r in range(rows)]                         # equal ones would need no mask
    prompts = [[random_ids.randrange(size.shape.vocab) for _ in range(length)] for length in lengths]
    draws = executor.draws([f"row {r}" for r in range(rows)], size.long)

    def decode(new: int):
        executor.generate(model, prompts, max_new_tokens=new, temperature=1.0, eos_id=-1, draws=draws,
                          max_cache_tokens=rows * (size.prompt + size.long))

    first = seconds_of(lambda: decode(size.short))
    reset_peak()
    short = min(seconds_of(lambda: decode(size.short)) for _ in range(2))
    long = min(seconds_of(lambda: decode(size.long)) for _ in range(2))
    return {"ms_per_token": 1000 * (long - short) / (size.long - size.short), "first_call_s": first,
            "peak_gib": peak_gib()}


def decoding_table(results: dict, found: dict) -> str:
    lines = [row(["", "ms per decoded token", "tokens per second", "first call, s", "peak GiB", ""]), "|---" * 6 + "|"]
    for name, r in results.items():
        if "failed" in r:
            lines.append(row([name, "failed", "", "", "", r["failed"]]))
            continue
        rows = int(re.search(r"(\d+) rows", name)[1])
        note = f"{r['graphs']} graphs, {r['breaks']} breaks" if "graphs" in r else ""
        rate = 1000 * rows / r["ms_per_token"] if r["ms_per_token"] > 0 else float("nan")
        lines.append(row([name, f"{r['ms_per_token']:.2f}", f"{rate:,.0f}", f"{r['first_call_s']:.1f}",
                          cell(r["peak_gib"], ".2f"), note]))
    return "\n".join(lines)


def cell(value, form: str) -> str:
    """A number in a table; empty where it was not measured."""
    return "" if value is None else format(value, form)


# ------------------------------------------------------------------------------------------------ 6. kernels


def kernel_bench(report: Report, size: Size, arguments: list[str]) -> None:
    """tests/bench_kernels.py, with fewer rows where the card has less than 70 GB free."""
    file = WORK / "kernels.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "tests/bench_kernels.py", "--out", str(file)]
    if not size.dry and torch.cuda.mem_get_info()[0] < 70e9:
        command += ["--rows", "4096"]
    subprocess.run(command, cwd=ROOT, check=True)
    report.add(**json.loads(file.read_text()))


KERNEL_COLUMNS = {"forward": ".2f", "forward_share": ".0%", "backward": ".2f", "backward_share": ".0%",
                  "total": ".2f", "peak": ".2f"}


def kernel_bench_table(results: dict, found: dict) -> str:
    lines = []
    for V, one in results.get("tables", {}).items():
        lines += [f"{results['rows']} rows of {V} bfloat16 logits; a copy runs at {one['copy_GB_per_s']:.0f} GB/s", ""]
        lines += [row(["", "forward ms", "of the copy", "backward ms", "of the copy", "total ms", "peak GB"])]
        lines += ["|---" * 7 + "|"]
        for r in one["results"]:
            cells = [cell(r.get(key), form) for key, form in KERNEL_COLUMNS.items()]
            if "failed" in r:
                cells[0] = r["failed"]
            lines.append(row([r["name"], *cells]))
        lines.append("")
    return "\n".join(lines).rstrip()


# ------------------------------------------------------------------------------------------------ 7. the tiny world


def tiny_world(task: str):
    """The part that runs the recipe of run.sh for one domain of the tiny world."""

    def tiny(report: Report, size: Size, arguments: list[str]) -> None:
        """Seconds of each stage, and the table. Called again after it was cut, it goes on: complete stages are kept."""
        run = WORK / ("dry-tiny" if size.dry else "tiny")
        folder = run.with_name(f"{run.name}-{task}")
        if not report.results and folder.exists():
            shutil.rmtree(folder)
        here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"    # run.sh calls python3
        modes = "exec_only" if size.dry else "exec_only tracelift"
        environment = os.environ | {"SKIP_INSTALL": "1", "TASKS": task, "RUN": str(run), "SEEDS": "0", "MODES": modes}
        environment |= {"PRESET": "tiny", "INT": "0", "PATH": here}
        command = ["./run.sh", "smoke"] if size.dry else ["./run.sh"]
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        stage, begin, lines = "", 0.0, []
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            started = re.match(r"\d\d:\d\d:\d\d +python (.*) --run_dir", line)
            ended = line.startswith(f"== {task}")
            if started or ended:
                if stage:
                    put_stage(report, stage, time.perf_counter() - begin)
                stage, begin = started[1] if started else "", time.perf_counter()
        if child.wait():
            raise UserError(f"run.sh failed; see {folder}/log.txt")
        for log in sorted(folder.glob("planner-*/metrics.jsonl")):                # right also after a stop
            last = json.loads(log.read_text().splitlines()[-1])
            report.add(**{f"seconds of the steps, {log.parent.name}": last["seconds"]})
        report.add(table=(folder / "results.md").read_text())

    return tiny


def put_stage(report: Report, stage: str, seconds: float) -> None:
    """A stage that was complete before takes a moment only: its first time stands."""
    stages = report.results.get("stages", {})
    stages[stage] = max(seconds, stages.get(stage, 0.0))
    report.add(stages=stages)


def tiny_table(results: dict, found: dict) -> str:
    lines = [row(["stage", "seconds"]), "|---|---|"]
    for stage, seconds in results.get("stages", {}).items():
        lines.append(row([f"`{stage}`", f"{seconds:.0f}"]))
    for name, value in results.items():
        if name.startswith("seconds of"):
            lines.append(row([name, f"{value:.0f}"]))
    return "\n".join([*lines, "", results.get("table", "")]).rstrip()


# ------------------------------------------------------------------------------------------------ 8. a training step


def measured_run(tracelift, keep: bool):
    """The training run of tracelift.py, with peaks of memory beside the seconds of each phase. keep: with checkpoints
    and a planner at the end."""

    class MeasuredRun(tracelift.TrainingRun):
        peaks: list[dict] = []                            # one a step

        def phase(self, name):
            synchronize()                                 # else a phase would pay for the one before it
            if self.running:
                self.peaks[-1][self.running] = peak_gib()
            if name == "rollout":
                self.peaks.append({})
            reset_peak()
            super().phase(name)

        def save_checkpoint(self):
            if keep:
                super().save_checkpoint()

        def save_planner(self):
            if keep:
                super().save_planner()

    MeasuredRun.peaks = []
    return MeasuredRun


PHASES = ("rollout", "reward", "update")
SHOWN_SIZES = ("problems", "group_size", "trace_tokens", "answer_tokens", "micro_tokens")


def train_measured(flags: list[str], keep: bool) -> list[dict]:
    """Trains as `python tracelift.py train FLAGS` does. Returns the lines of metrics.jsonl, those of this call with
    the peak GiB of each phase."""
    import tracelift
    s = data.parse_settings(tracelift.TrainSettings, flags, "tracelift.py train")
    plain = tracelift.TrainingRun
    tracelift.TrainingRun = measured_run(tracelift, keep)
    try:
        folder = tracelift.train(s)
        peaks = tracelift.TrainingRun.peaks
    finally:
        tracelift.TrainingRun = plain
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, peak in zip(lines[len(lines) - len(peaks):], peaks):
        line |= {f"peak_gib_{phase}": peak.get(phase) for phase in PHASES}
    return lines


def training_step(report: Report, size: Size, arguments: list[str]) -> None:
    """Seconds and peak memory of each phase of a step, all weights and LoRA. The executor's verdicts are replaced by
    those of a coin, so that every group has a spread and every micro-batch its backward pass; a random model ends no
    trace early. So this is the longest that a step of these settings takes."""
    device = device_of(size)
    run_dir = WORK / ("dry-step" if size.dry else "step")
    shutil.rmtree(run_dir, ignore_errors=True)
    try:
        make_run(run_dir, size, device, arguments[0] if arguments else None)
        variants = {"all weights": [], "all weights, without checkpointing": ["--checkpointing", "0"],
                    "LoRA": ["--lora_rank", "16"],
                    "LoRA, without checkpointing": ["--lora_rank", "16", "--checkpointing", "0"]}
        sizes = {key: getattr(size, key) for key in SHOWN_SIZES}
        report.add(model=arguments[0] if arguments else "random", **sizes)
        with coin_as_verifier():
            for i, (title, flags) in enumerate(variants.items()):
                release()
                try:
                    steps = train_measured(step_flags(size, run_dir, f"v{i}", device) + flags, keep=False)
                except torch.OutOfMemoryError as error:
                    report.add(**{title: {"failed": first_line(error)}})
                    continue
                report.add(**{title: summary_of(steps[1:])})
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def make_run(run_dir: Path, size: Size, device, model_folder: str | None) -> None:
    """A run folder with real text problems, a base model and a random reward model on it."""
    from rm import RubricRewardModel
    texts = [word_problem(i) for i in range(size.problems * size.steps)]
    groups = []
    for i, (text, _, answer) in enumerate(texts):
        groups.append({"problem_id": f"p{i}", "source": "made", "task_type": "math", "problem": text,
                       "reference_solution": answer, "positive_pool": [], "negative_bank": []})
    data.write_groups(run_dir / "groups" / "train.jsonl", groups)
    base = Path(model_folder).resolve() if model_folder else run_dir / "base"
    if not model_folder:
        save_random_base(base, size.shape, [data.problem_of(group) for group in groups], device)
    data.write_atomic(run_dir / "base" / "base.json", json.dumps({"model": str(base)}))
    model, tokenizer = executor.load(str(base), device, torch.float32)
    rm = RubricRewardModel(model.base_model, tokenizer, data.DIMENSIONS["math"]).to(device)
    rm.save_pretrained(run_dir / "rm")
    del model, rm
    release()


def save_random_base(folder: Path, shape: Shape, problems, device) -> None:
    """A random model with a tokenizer for the problems. A Llama of the same widths: for Qwen2 transformers insists on
    Qwen2's own tokenizer, whose file is not here. Every id is a word, so that sampled traces are read in full."""
    from transformers import LlamaConfig, LlamaForCausalLM
    texts = [data.SENTENCE, data.OPEN, data.CLOSE, "1 2 3 4 5 6 7 8 9 0 = + ?"]
    for problem in problems:
        texts += [data.planner_prompt(problem), data.executor_prompt(problem, ""), data.rm_text(problem, "")]
    missing = shape.vocab - len(executor.tiny_tokenizer(texts))
    filler = itertools.islice(itertools.product("bcdfghjklmnpqrstvwxz", repeat=4), missing)
    tokenizer = executor.tiny_tokenizer([*texts, *(" " + "".join(letters) for letters in filler)])
    known, config = shape.config().to_dict(), {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "tie_word_embeddings", "max_position_embeddings"):
        config[key] = known[key]
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config, pad_token_id=tokenizer.pad_token_id))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_problem(i: int) -> tuple[str, str, str]:
    """(text, solution with GSM8K's annotations, answer) of a school problem, in the length that GSM8K has."""
    numbers = random.Random(i)
    shelves, books, bought = (numbers.randint(3, 19) for _ in range(3))
    sold = numbers.randint(2, 8)
    all_books = shelves * books
    left = all_books - sold
    end = left + bought
    text = (f"A book shop in the old town has {shelves} shelves, and on each of them stand {books} books. On Monday "
            f"morning the owner sells {sold} of the books to a teacher, who wants them for a class. In the afternoon "
            f"a truck arrives and brings {bought} more books, which the owner puts on the shelves at once. How many "
            "books are on the shelves in the evening?")
    solution = (f"The shop has {shelves}*{books}=<<{shelves}*{books}={all_books}>>{all_books} books.\n"
                f"After the teacher's visit {all_books}-{sold}=<<{all_books}-{sold}={left}>>{left} are left.\n"
                f"In the evening there are {left}+{bought}=<<{left}+{bought}={end}>>{end} books.\n#### {end}")
    return text, solution, str(end)


@contextmanager
def coin_as_verifier():
    """Inside it every second answer is right, drawn anew, whatever it says."""
    import verify
    plain, coin = verify.math_equal, random.Random(0)

    def toss(found, truth):
        return coin.random() < 0.5

    verify.math_equal = toss
    try:
        yield
    finally:
        verify.math_equal = plain


def step_flags(size: Size, run_dir: Path, name: str, device) -> list[str]:
    """Flags of a training as run.sh's recipe for GSM8K has them."""
    settings = {"run_dir": run_dir, "device": device.type, "name": name, "steps": size.steps, "warmup": 1}
    settings |= {"problems_per_step": size.problems, "group_size": size.group_size, "micro_tokens": size.micro_tokens}
    settings |= {"max_trace_tokens": size.trace_tokens, "max_answer_tokens": size.answer_tokens}
    settings |= {"learning_rate": 1e-6, "checkpointing": 1}
    return [f"--{key}={value}" for key, value in settings.items()]


def summary_of(steps: list[dict]) -> dict:
    """Mean seconds and largest peak of each phase over steps."""
    found = {}
    for phase in PHASES:
        peaks = [step[f"peak_gib_{phase}"] for step in steps]
        found[phase] = {"seconds": statistics.mean(step[f"seconds_{phase}"] for step in steps),
                        "peak_gib": None if None in peaks else max(peaks)}
    found["grad_norm"] = steps[-1]["grad_norm"]
    found["trace_tokens"] = statistics.mean(step["trace_tokens"] for step in steps)
    return found


def training_step_table(results: dict, found: dict) -> str:
    head = ["", *(f"{phase}, s" for phase in PHASES), "step, s", *(f"{phase}, peak GiB" for phase in PHASES)]
    lines = []
    if "problems" in results:
        sizes = ", ".join(f"{key.replace('_', ' ')} {results[key]}" for key in SHOWN_SIZES)
        lines = [f"{results['model']} model, reward model of the same size, {sizes}; verdicts by a coin", ""]
    lines += [row(head), "|---" * len(head) + "|"]
    for title, r in results.items():
        if not isinstance(r, dict):
            continue
        if "failed" in r:
            lines.append(row([title, r["failed"], *[""] * (len(head) - 2)]))
            continue
        seconds = [r[phase]["seconds"] for phase in PHASES]
        lines.append(row([title, *(f"{s:.1f}" for s in seconds), f"{sum(seconds):.1f}",
                          *(cell(r[phase]["peak_gib"], ".2f") for phase in PHASES)]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 9. a real training


def training(report: Report, size: Size, arguments: list[str]) -> None:
    """A short GRPO training of a model folder on the problems of DATA and HELDOUT_DATA. More flags are those of
    `tracelift.py train`. Cut short, the same command goes on from the last checkpoint."""
    folder, data_file, heldout_file, flags = training_inputs(size, arguments)
    run_dir = WORK / f"{'dry-' if size.dry else ''}train-{folder.name}"
    if size.dry:
        shutil.rmtree(run_dir, ignore_errors=True)
    train, heldout = (4, 2) if size.dry else (400, 80)
    source = os.environ.get("SOURCE", "gsm8k")
    device = device_of(size)
    command(["data.py", "--source", source, "--data", data_file, "--heldout_data", heldout_file, "--train", train,
             "--heldout", heldout, "--negatives", 1, "--run_dir", run_dir])
    seconds = command(["executor.py", "--model", folder, "--eval_problems", heldout, "--device", device.type,
                       "--max_answer_tokens", size.answer_tokens, "--run_dir", run_dir])
    base = json.loads((run_dir / "base" / "base.json").read_text())
    known = report.results.get("executor_check", {"seconds": 0.0})                # complete before: takes a moment
    report.add(model=folder.name, flags=" ".join(flags),
               executor_check=base | {"seconds": max(seconds, known["seconds"])})
    usual = step_flags(size, run_dir, "", device) + ["--mode", "exec_only", "--save_every", "5"]
    if not size.dry:
        usual += ["--steps", "10", "--warmup", "5"]
    if asked_mode(usual + flags) not in ("exec_only", "uplift_only"):
        command(["rm.py", "--epochs", 1, "--groups_per_batch", 2, "--learning_rate", 2e-5, "--max_heldout", 40,
                 "--device", device.type, "--run_dir", run_dir])
    with coin_as_verifier() if size.dry else nullcontext():                     # a toy is never right: no gradient
        steps = train_measured(usual + flags, keep=True)
    report.add(steps=[{key: step.get(key) for key in STEP_COLUMNS} for step in steps])


def training_inputs(size: Size, arguments: list[str]) -> tuple[Path, Path, Path, list[str]]:
    """(model folder, DATA, HELDOUT_DATA, more flags); dry without a folder makes all three."""
    flags = arguments[1:]
    if size.dry and not arguments:
        files = [WORK / "dry-data" / f"{split}.jsonl" for split in ("train", "heldout")]
        for at, file in enumerate(files):
            lines = []
            for i in range(8):
                text, solution, _ = word_problem(100 * at + i)
                lines.append(json.dumps({"question": text, "answer": solution}) + "\n")
            data.write_atomic(file, "".join(lines))
        folder = WORK / "dry-model"
        shutil.rmtree(folder, ignore_errors=True)
        save_random_base(folder, size.shape, data.read_gsm8k(files[0]) + data.read_gsm8k(files[1]), "cpu")
        return folder, *files, flags
    if not arguments or not os.environ.get("DATA") or not os.environ.get("HELDOUT_DATA"):
        raise UserError("train: DATA=train.jsonl HELDOUT_DATA=test.jsonl tests/gpu.sh train MODEL_FOLDER")
    return Path(arguments[0]).resolve(), Path(os.environ["DATA"]), Path(os.environ["HELDOUT_DATA"]), flags


def asked_mode(flags: list[str]) -> str:
    """The reward that the flags ask for."""
    import tracelift
    return data.parse_settings(tracelift.TrainSettings, flags, "tracelift.py train").mode


def command(words: list) -> float:
    """Runs a command of the repository; returns its seconds."""
    words = [sys.executable, *map(str, words)]
    begin = time.perf_counter()
    if subprocess.run(words, cwd=ROOT).returncode:
        raise UserError(f"failed: {' '.join(words[1:])}")
    return time.perf_counter() - begin


STEP_COLUMNS = {"step": "d", "success": ".2f", "reward": ".2f", "groups_without_spread": ".2f", "entropy": ".2f",
                "sampler_gap": ".4f", "grad_norm": ".2f", "trace_tokens": ".0f", "truncated": ".2f",
                "seconds_rollout": ".1f", "seconds_reward": ".1f", "seconds_update": ".1f", "peak_gib_rollout": ".1f",
                "peak_gib_reward": ".1f", "peak_gib_update": ".1f"}


def training_table(results: dict, found: dict) -> str:
    """A row a step."""
    lines = []
    if "executor_check" in results:
        check = results["executor_check"]
        given = "unknown" if check["reference_trace"] is None else f"{check['reference_trace']:.2f}"
        lines = [f"{results['model']}: executor success {check['no_trace']:.2f} without a trace, {given} with the "
                 f"reference trace, on {check['problems']} problems in {check['seconds']:.0f} s. More flags: "
                 f"{results['flags'] or 'none'}", ""]
    lines += [row(name.replace("_", " ") for name in STEP_COLUMNS), "|---" * len(STEP_COLUMNS) + "|"]
    for step in results.get("steps", []):
        lines.append(row(cell(step[key], form) for key, form in STEP_COLUMNS.items()))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ 10. the command

PARTS = {"versions": (versions, versions_table), "tests": (gpu_tests, gpu_tests_table),
         "attention": (attention, attention_table), "decoding": (decoding, decoding_table),
         "kernels": (kernel_bench, kernel_bench_table), "step": (training_step, training_step_table),
         "tiny": (tiny_world("math"), tiny_table), "tiny-code": (tiny_world("code"), tiny_table),
         "train": (training, training_table)}
ALONE = ("step", "train")                                 # parts that may be followed by arguments of their own


def tables(path: Path, only: list[str] = ()) -> str:
    """The tables of the parts in the JSON, as Markdown."""
    everything, lines = Report(path, "").read(), []
    for part, (_, table_of) in PARTS.items():
        if part not in everything or only and part not in only:
            continue
        entry = everything[part]
        found = entry["machine"]
        versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "torch", "triton", "transformers"))
        took = f", {entry['seconds']:.0f} s" if entry["outcome"] == "complete" else ""
        lines += [f"**{part}**: {entry['outcome']}{took}. {found['card']}, {versions}, commit {found['commit'][:7]}, "
                  f"{entry['date']}, `{entry['command']}`", "", table_of(entry["results"], found), ""]
    return "\n".join(lines)


def first_line(error) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def inside(part: str, size: Size, path: Path, arguments: list[str]) -> int:
    """Runs a part in this process. Returns its exit code."""
    report = Report(path, part)
    words = ["tests/gpu.sh", *(["dry"] if size.dry else []), part, *arguments]
    report.begin(machine(size), " ".join(words))
    begin = time.perf_counter()
    try:
        PARTS[part][0](report, size, arguments)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        report.write(outcome=f"failed: {first_line(error)}", seconds=time.perf_counter() - begin)
        return 1
    report.write(outcome="complete", seconds=time.perf_counter() - begin)
    return 0


def outside(part: str, size: Size, path: Path, arguments: list[str]) -> bool:
    """Runs a part in a process of its own and prints its table. Whether it is complete."""
    command = [sys.executable, __file__, "inside", "dry" if size.dry else "real", part, *arguments]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    report, why = Report(path, part), ""
    try:
        child.wait(LIMIT)
        why = f"failed: exit code {child.returncode}"
    except subprocess.TimeoutExpired:
        why = f"cut after {LIMIT} s; the same command goes on or begins again"
    finally:
        stop(child)
        if report.entry.get("outcome") == "begun":        # else it has said itself how it ended
            report.write(outcome=why or "stopped")
    print(f"\n{tables(path, [part])}", flush=True)
    return child.returncode == 0


def stop(child) -> None:
    """Ends a child and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def split_arguments(words: list[str]) -> list[tuple[str, list[str]]]:
    """[(part, its arguments)]. UserError for a name that is no part."""
    if not words:
        raise UserError(f"gpu.sh: name a part: all, tables, {', '.join(PARTS)}; or dry and a part")
    if words == ["all"]:
        return [(part, []) for part in PARTS if part != "train"]
    if words[0] in ALONE and not set(words[1:]) & set(PARTS):
        return [(words[0], words[1:])]
    for word in words:
        if word not in PARTS:
            raise UserError(f"gpu.sh: there is no part {word}; choose all, tables, {', '.join(PARTS)}")
    return [(word, []) for word in words]


def main(argv: list[str]) -> None:
    """The command behind gpu.sh."""
    if argv[:1] == ["inside"]:
        size, path = (TOY, DRY_RESULTS) if argv[1] == "dry" else (REAL, RESULTS)
        sys.exit(inside(argv[2], size, path, argv[3:]))
    dry = argv[:1] == ["dry"]
    words = argv[1:] if dry else argv
    size, path = (TOY, DRY_RESULTS) if dry else (REAL, RESULTS)
    if words == ["tables"]:
        print(tables(path) or f"{path}: no numbers yet")
        return
    parts = split_arguments(words) + ([("train", [])] if dry and words == ["all"] else [])
    if not dry and not torch.cuda.is_available():
        raise UserError("gpu.sh: torch sees no CUDA GPU here; tests/gpu.sh dry all tries the same paths at toy size "
                        "on a CPU")
    failed = [part for part, arguments in parts if not outside(part, size, path, arguments)]
    print(f"{path}: written")
    if failed:
        raise UserError(f"gpu.sh: not complete: {', '.join(failed)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    data.run_command(main)
