"""tests/gpu.sh without a GPU: its parts at toy size, and what it keeps when one fails. And the README's table of
memory, against the tensors of a small model."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import executor
import gpu
import memory_table
import rm
from memory_table import QWEN, Shape

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"tied": Shape(300, 48, 3, 6, 2, 80, True), "untied": Shape(211, 32, 2, 4, 4, 56, False)}
HERE = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "SKIP_INSTALL": "1"}

# ------------------------------------------------------------------------------------------------ 1. memory


def nbytes(tensors) -> int:
    """Bytes of tensors; one that comes twice counts once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class Casts(TorchDispatchMode):
    """Counts the bytes of 16-bit copies of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.known, self.bytes = {id(p) for p in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and id(args[0]) in self.known:
            self.bytes += result.nbytes
        return result


def measured(model, run, head) -> dict[str, int]:
    """What training a model holds: weights that learn, frozen ones, gradients, moments, copies by autocast. head: what
    follows `run`; the head's copy does not last."""
    ids = torch.arange(12).view(2, 6)
    with Casts(model) as casts, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):                                # each weight is copied once, however often it is used
            run(ids)
    head(run(ids)).float().square().sum().backward()
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = executor.adamw(learns, 1e-3)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = {"weights": learns, "backbone": [p for p in model.parameters() if not p.requires_grad],
             "gradients": [p.grad for p in learns], "AdamW": moments}
    return {name: nbytes(tensors) for name, tensors in found.items()} | {"copies": casts.bytes}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("role", ["all weights", "LoRA", "rm trained", "rm with LoRA trained"])
def test_a_training_holds_what_the_table_says(shape, role, tiny):
    model = gpu.random_model(shape, "cpu", torch.float32)
    if "LoRA" in role:
        lora = executor.Lora(model.bfloat16().base_model if "rm" in role else model.bfloat16(), 4, 8.0)
    want = memory_table.memory(shape, rank=4, rm_rank=4)[role] | {"backbone": 0}
    if "rm" in role:
        judge = rm.RubricRewardModel(model.base_model, tiny[2], data.DIMENSIONS["math"])
        found = measured(judge, lambda ids: judge(ids, torch.ones_like(ids)),
                         lambda outputs: torch.cat([x.flatten() for x in outputs]))
        if "LoRA" in role:
            want["backbone"] = memory_table.memory(shape, rm_rank=4)[role]["backbone"]
            lora.merge()
        loaded = memory_table.memory(shape)[role.replace("trained", "loaded")]
        assert nbytes(judge.parameters()) == sum(loaded.values())
    else:
        found = measured(model, lambda ids: model.base_model(ids).last_hidden_state, model.get_output_embeddings())
        if role == "LoRA":
            want["backbone"] = memory_table.memory(shape)[role]["backbone"]
        else:
            assert nbytes(model.bfloat16().parameters()) == want.pop("executor")
    assert found == want


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keys_and_values(shape):
    """Those of the decoder, filled, and what `cache_tokens` says of a budget."""
    model = gpu.random_model(shape, "cpu", torch.bfloat16)
    cache = executor.prefill(model, [[5, 6, 7, 8], [9, 10]], slots=10)[1]
    held = [store for layer in cache.layers for store in layer.stores]
    assert nbytes(held) == memory_table.cache_bytes(shape, 2 * 10)
    assert executor.cache_tokens(model, 0.5) == memory_table.GIB // 2 // memory_table.cache_bytes(shape, 1)


def test_the_readme_has_the_table():
    """For models of the published sizes: 0.49, 1.54, 3.09 and 7.62 billion."""
    found = [memory_table.model_numbers(s) for s in QWEN.values()]
    assert found == [494_032_768, 1_543_714_304, 3_085_938_688, 7_615_616_512]
    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in memory_table.table().splitlines()[2:])


# ------------------------------------------------------------------------------------------------ 2. the parts


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the numbers go; nothing is written into the repository."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    return tmp_path / "gpu.json"


@pytest.mark.parametrize("part, title, name", [
    ("versions", "versions", "torch"), ("kernels", "head, in pieces, 16 rows of 1000", "ms"),
    ("decoding", "planner with LoRA, 4 rows", "ms_per_token"), ("step", "LoRA, without checkpointing", "update_s"),
    pytest.param("compile", "executor, torch.compile, 2 rows", "first_call_s", marks=pytest.mark.slow),
    pytest.param("tests", "test_triton_starts_and_is_chosen", "outcome", marks=pytest.mark.slow)])
def test_a_part_runs_at_toy_size(part, title, name, results, monkeypatch):
    assert gpu.inside(part, True, results, []) == 0
    done = json.loads(results.read_text())[part]
    assert done["outcome"] == "complete" and done["command"] == f"tests/gpu.sh dry {part}"
    assert done["machine"]["card"] == "no GPU: dry run on a CPU" and done["machine"]["torch"] and done["date"]
    assert done["results"][title][name] and f"| {title} |" in gpu.table(results, part)
    if part == "step":
        assert all(numbers["grad_norm"] > 0 for numbers in done["results"].values()) and not list(gpu.WORK.iterdir())


def test_peaks_belong_to_their_phase(results, monkeypatch):
    """A phase has the peak since it began."""
    counter = iter(range(1000))
    monkeypatch.setattr(gpu, "peak_gib", lambda: float(next(counter)))
    gpu.make_run(gpu.WORK / "peaks", gpu.TOY)
    steps = gpu.train_measured(gpu.TOY, gpu.WORK / "peaks", [], keep=False)
    assert [[step[f"peak_gib_{phase}"] for phase in gpu.PHASES] for step in steps] == [[1, 2, 3], [5, 6, 7]]


def test_numbers_are_kept(results, monkeypatch):
    """Those of a part that fails, and those of other parts; a second try on another machine begins anew."""
    def fails(report, size, arguments):
        report.add("first", a=len(report.entry()["results"]))
        raise RuntimeError("the second\nfails")

    monkeypatch.setitem(gpu.PARTS, "bad", fails)
    assert gpu.inside("versions", True, results, []) == 0
    for _ in range(2):
        assert gpu.inside("bad", True, results, ["x"]) == 1
    record = json.loads(results.read_text())
    assert record["versions"]["outcome"] == "complete" and record["bad"]["results"] == {"first": {"a": 1}}
    assert record["bad"]["outcome"] == "failed: RuntimeError: the second fails"
    monkeypatch.setattr(gpu, "machine", lambda dry: {"card": "another", "torch": "x"})
    gpu.inside("bad", True, results, [])
    assert json.loads(results.read_text())["bad"]["results"] == {"first": {"a": 0}}


def test_a_part_that_takes_too_long_is_cut_with_all_it_started(results, monkeypatch, tmp_path):
    script, pid = tmp_path / "sleeps.py", tmp_path / "pid"
    script.write_text("import pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
                      f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\ntime.sleep(600)\n")
    report = gpu.Report(results, "step")
    report.begin(gpu.machine(True), "x")
    report.add("first", a=1)
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "LIMIT", 4)
    assert gpu.outside("step", True, results, []) is False
    assert report.entry()["outcome"].startswith("cut after 4 s") and report.entry()["results"] == {"first": {"a": 1}}
    state, end = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":      # a zombie: nobody reaps it
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("words, said", [
    ("decoding", "torch sees no CUDA GPU here"), ("dry nothing", "no part 'nothing'"), ("dry", "choose all, versions")])
def test_what_cannot_be_done_is_one_line(words, said):
    if words == "decoding" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(["tests/gpu.sh", *words.split()], cwd=ROOT, env=os.environ | HERE, capture_output=True,
                          text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
