"""tests/gpu.sh without a GPU: its parts at toy size, what it keeps when one fails, what it says. And the table of
memory, against the tensors of a small model."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import executor
import rm
from tests import gpu, memory_table
from tests.memory_table import QWEN, Shape

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"tied": Shape(300, 48, 3, 6, 2, 80, True), "untied": Shape(211, 32, 2, 4, 4, 56, False)}


@pytest.fixture(params=SMALL)
def small(request):
    """(shape, its model in float32)."""
    shape = SMALL[request.param]
    return shape, gpu.random_model(shape, "cpu", torch.float32)


def nbytes(tensors) -> int:
    """Bytes of tensors; one that comes twice counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------ 1. memory


def test_the_numbers_of_the_published_models():
    """As the files on the hub have them (their totals: 0.49, 1.54, 3.09 and 7.62 billion)."""
    counts = {name: memory_table.model_numbers(shape) for name, shape in QWEN.items()}
    assert counts == {"0.5B": 494_032_768, "1.5B": 1_543_714_304, "3B": 3_085_938_688, "7B": 7_615_616_512}


def test_weights_gradients_and_adamw(small):
    shape, model = small
    optimizer = executor.adamw(model.parameters(), 1e-3)
    model(input_ids=torch.arange(6)[None]).logits.square().sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    want = memory_table.learning(memory_table.model_numbers(shape))
    assert nbytes(parameters) == want["weights"]
    assert nbytes(p.grad for p in parameters) == want["gradients"]
    assert nbytes(moments) == want["AdamW"]
    counters = [state["step"] for state in optimizer.state.values()]             # all that AdamW keeps beside them
    assert sum(map(len, optimizer.state.values())) == len(moments) + len(counters)
    assert memory_table.memory(shape)["all weights"].items() >= want.items()


def test_the_executor_in_bfloat16(small):
    shape, model = small
    assert nbytes(model.bfloat16().parameters()) == memory_table.memory(shape)["all weights"]["executor"]


class Casts(TorchDispatchMode):
    """Counts the bytes of 16-bit copies of parameters made inside it."""

    def __init__(self, parameters):
        super().__init__()
        self.known, self.bytes = {id(p) for p in parameters}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and id(args[0]) in self.known:
            self.bytes += result.nbytes
        return result


def test_autocast_copies_each_linear_weight_once(small):
    """However many sequences are read inside the context."""
    shape, model = small
    counter = Casts(model.parameters())
    with counter, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            executor.token_hidden(model, torch.arange(12).view(2, 6), torch.arange(12))
    assert counter.bytes == memory_table.memory(shape)["all weights"]["autocast's copies"]


def test_an_adapter_and_its_copies(small):
    shape, model = small
    lora = executor.Lora(model.bfloat16(), rank=4, alpha=8.0)
    adapter = [p for p in model.parameters() if p.requires_grad]
    want = memory_table.memory(shape, rank=4)["LoRA"]
    assert nbytes(adapter) == nbytes(lora.state_dict().values()) == want["weights"]
    assert nbytes(p for p in model.parameters() if not p.requires_grad) == want["backbone"]
    counter = Casts(model.parameters())
    with counter, torch.autocast("cpu", torch.bfloat16):
        executor.token_hidden(model, torch.arange(12).view(2, 6), torch.arange(12))
    assert counter.bytes == want["autocast's copies"]


def test_a_reward_model(small, tiny):
    shape, model = small
    judge = rm.RubricRewardModel(model.base_model, tiny[2], data.DIMENSIONS["math"])
    parts = memory_table.memory(shape)
    assert nbytes(judge.parameters()) == parts["reward model loaded"]["weights"]
    assert parts["reward model trained"]["weights"] == parts["reward model loaded"]["weights"]
    ids = torch.arange(12).view(2, 6)
    counter = Casts(judge.parameters())
    with counter, torch.autocast("cpu", torch.bfloat16):
        judge(ids, torch.ones_like(ids))
    assert counter.bytes == parts["reward model trained"]["autocast's copies"]


def test_a_reward_model_with_an_adapter(small, tiny):
    """Before and after the adapter is merged: what is trained, and what is saved and loaded."""
    shape, model = small
    lora = executor.Lora(model.bfloat16().base_model, rank=4, alpha=8.0)
    judge = rm.RubricRewardModel(model.base_model, tiny[2], data.DIMENSIONS["math"])
    want = memory_table.memory(shape, rm_rank=4)["reward model of LoRA trained"]
    assert nbytes(p for p in judge.parameters() if p.requires_grad) == want["weights"]
    assert nbytes(p for p in judge.parameters() if not p.requires_grad) == want["backbone"]
    ids = torch.arange(12).view(2, 6)
    counter = Casts(judge.parameters())
    with counter, torch.autocast("cpu", torch.bfloat16):
        judge(ids, torch.ones_like(ids))
    assert counter.bytes == want["autocast's copies"]
    lora.merge()
    assert nbytes(judge.parameters()) == sum(memory_table.memory(shape)["reward model of LoRA loaded"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_and_values(small, dtype):
    """The layers of the decoder, filled, and what `cache_tokens` says of a budget."""
    shape, model = small
    model = model.to(dtype)
    cache = executor.read_prompts(model, [[5, 6, 7, 8], [9, 10]], slots=10)[1]
    held = [store for layer in cache.layers for store in layer.stores]
    assert len(held) == 2 * shape.layers
    assert nbytes(held) == memory_table.cache_bytes(shape, 2 * 10, dtype.itemsize)
    token = memory_table.cache_bytes(shape, 1, dtype.itemsize)
    assert executor.cache_tokens(model, 0.5) == memory_table.GIB // 2 // token


def test_the_table_adds_the_parts_up():
    """The row of Qwen2.5 3B by hand."""
    line = next(line for line in memory_table.table().splitlines() if line.startswith("| 3B |"))
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    everything = 3_085_938_688
    linear = 36 * (2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008)
    assert memory_table.linear_numbers(QWEN["3B"]) == linear
    assert cells[1] == f"{(16 * everything + 2 * linear + 2 * everything) / 2**30:.1f}"
    adapter = 36 * 16 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert cells[2] == f"{(18 * adapter + 2 * everything) / 2**30:.1f}"
    heads = 26 * 2049
    trained = 16 * (everything + heads) + 2 * (linear + heads)
    assert cells[3] == f"{4 * (everything + heads) / 2**30:.1f} / {trained / 2**30:.1f}"
    adapter = 2 * adapter + heads
    backbone = 2 * everything
    assert cells[4] == f"{(backbone + 4 * heads) / 2**30:.1f} / {(backbone + 18 * adapter) / 2**30:.1f}"
    assert cells[5] == "2.25"
    temporary = memory_table.memory(QWEN["3B"], fused=False)["all weights"]["AdamW's temporary"]
    assert temporary == 4 * everything


def test_the_readme_has_the_table():
    readme = (ROOT / "README.md").read_text()
    for line in memory_table.table().splitlines()[2:]:
        assert line in readme


# ------------------------------------------------------------------------------------------------ 2. parts


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the numbers go; nothing is written into the repository."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    return tmp_path / "gpu.json"


def entry(path: Path, part: str) -> dict:
    return json.loads(path.read_text())[part]


@pytest.mark.parametrize("part", ["versions", "attention", "decoding"])
def test_a_part_runs_at_toy_size(part, results, monkeypatch, capsys):
    """It is complete, and its table has a row for each thing measured. (The part step has a test of its own.)"""
    monkeypatch.setattr(gpu, "compiled_decoding", lambda *_: None)
    assert gpu.inside(part, gpu.TOY, results, []) == 0, capsys.readouterr().err
    done = entry(results, part)
    assert done["outcome"] == "complete" and done["command"] == f"tests/gpu.sh dry {part}"
    assert done["machine"]["card"] == "no GPU: dry run on a CPU" and done["date"] and done["machine"]["torch"]
    text = gpu.tables(results, [part])
    rows = {"versions": ["compiler", "python header", "driver", "cudnn", "triton"],
            "attention": ["cuDNN off, decoding, 2 rows", "cuDNN on, training, 2 sequences"],
            "decoding": ["executor, 2 rows", "planner with LoRA, 4 rows", "planner, float32 under autocast, 4 rows"]}
    for title in rows[part]:
        assert f"| {title} |" in text


@pytest.mark.slow
def test_compiled_decoding_is_measured(results):
    """In few graphs, without breaks; the model is as before afterwards."""
    report = gpu.Report(results, "decoding")
    report.begin({}, "")
    model = gpu.random_model(gpu.TOY.shape, "cpu", torch.float32)
    plain = model.forward
    gpu.compiled_decoding(report, model, replace(gpu.TOY, rows=(2,)))
    found = report.results["executor, torch.compile, 2 rows"]
    assert 0 < found["graphs"] < 5 and found["breaks"] == 0 and model.forward == plain


def test_compiled_decoding_may_fail(results, monkeypatch):
    """A compiler that does not work is a result and no end of the part."""

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    report = gpu.Report(results, "decoding")
    report.begin({}, "")
    monkeypatch.setattr(gpu, "per_token", broken)
    gpu.compiled_decoding(report, gpu.random_model(gpu.TOY.shape, "cpu", torch.float32), gpu.TOY)
    assert report.results["executor, torch.compile"] == {"failed": "RuntimeError: no compiler"}
    assert "no compiler" in gpu.decoding_table(report.results, {})


def test_the_coin_gives_every_step_a_gradient(results):
    """And is gone afterwards."""
    import verify
    assert gpu.inside("step", gpu.TOY, results, []) == 0
    for title in ("all weights", "LoRA"):
        found = entry(results, "step")["results"][title]
        assert found["grad_norm"] > 0 and found["trace_tokens"] == gpu.TOY.trace_tokens
        assert all(found[phase]["seconds"] > 0 and found[phase]["peak_gib"] is None for phase in gpu.PHASES)
        assert f"| {title} |" in gpu.tables(results)
    assert verify.math_equal("1", "2") is False and not (gpu.WORK / "dry-step").exists()


def test_peaks_belong_to_their_phase(results, monkeypatch):
    """As CUDA would count them: the peak since the phase began."""
    import tracelift
    clock = iter(range(1, 1000))
    monkeypatch.setattr(gpu, "peak_gib", lambda: float(next(clock)))
    run_dir = gpu.WORK / "peaks"
    gpu.make_run(run_dir, gpu.TOY, torch.device("cpu"), None)
    plain = tracelift.TrainingRun
    steps = gpu.train_measured(gpu.step_flags(gpu.TOY, run_dir, "x", torch.device("cpu")), keep=False)
    assert [[step[f"peak_gib_{phase}"] for phase in gpu.PHASES] for step in steps] == [[1, 2, 3], [4, 5, 6]]
    assert tracelift.TrainingRun is plain


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_in_a_process_of_its_own(part):
    """As a person calls it, subprocesses and run.sh included."""
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "SKIP_INSTALL": "1"}
    done = subprocess.run(["tests/gpu.sh", "dry", part], cwd=ROOT, env=os.environ | here, capture_output=True,
                          text=True)
    assert done.returncode == 0 and f"**{part}**: complete" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ 3. what is kept


def fail_after_one_number(report, size, arguments):
    report.add(first=1)
    raise RuntimeError("the second\nfails")


def test_a_part_that_fails_leaves_all_numbers(results, monkeypatch, capsys):
    """Those of the others, and its own so far; called again on the same machine it keeps them, on another it does
    not."""
    monkeypatch.setitem(gpu.PARTS, "good", (lambda report, *_: report.add(a=1), lambda results, _: f"a {results['a']}"))
    monkeypatch.setitem(gpu.PARTS, "bad", (fail_after_one_number, lambda results, _: str(results)))
    assert gpu.inside("good", gpu.TOY, results, []) == 0 and gpu.inside("bad", gpu.TOY, results, ["x"]) == 1
    assert entry(results, "good")["results"] == {"a": 1}
    bad = entry(results, "bad")
    assert bad["results"] == {"first": 1} and bad["command"] == "tests/gpu.sh dry bad x"
    assert bad["outcome"] == "failed: RuntimeError: the second fails"
    text = gpu.tables(results)
    assert "a 1" in text and "failed: RuntimeError: the second fails" in text
    report = gpu.Report(results, "bad")
    assert report.begin(bad["machine"], "again") and report.results == {"first": 1}
    assert not report.begin({"card": "another"}, "again") and report.results == {}
    good = gpu.Report(results, "good")
    assert not good.begin(entry(results, "good")["machine"], "anew") and good.results == {}


def test_a_part_that_takes_too_long_is_cut_with_all_it_started(results, monkeypatch, tmp_path):
    """The child has begun its record and started a process of its own, and sleeps."""
    report = gpu.Report(results, "step")
    script, pid = tmp_path / "sleeps.py", tmp_path / "pid"
    script.write_text("import pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
                      f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\ntime.sleep(600)\n")
    report.begin(gpu.machine(gpu.TOY), "x")
    report.add(model="random")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "LIMIT", 4)
    assert gpu.outside("step", gpu.TOY, results, []) is False
    cut = entry(results, "step")
    assert cut["outcome"].startswith("cut after 4 s") and cut["results"] == {"model": "random"}
    state = Path(f"/proc/{pid.read_text()}/stat")                                 # gone, or a zombie that nobody reaps
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_child_that_dies_before_its_record_leaves_the_old_one(results, monkeypatch, tmp_path):
    gpu.Report(results, "versions").begin(dict.fromkeys(gpu.machine(gpu.TOY), "x"), "old")
    gpu.Report(results, "versions").write(outcome="complete", seconds=1.0)
    script = tmp_path / "dies.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.outside("versions", gpu.TOY, results, []) is False
    assert entry(results, "versions")["outcome"] == "complete"


def test_the_time_of_a_stage_survives_a_second_call(results):
    """Where the stage, complete, is skipped in a moment."""
    report = gpu.Report(results, "tiny")
    report.begin({}, "")
    for seconds in (40.0, 1.5):
        gpu.put_stage(report, "rm.py", seconds)
    assert report.results["stages"] == {"rm.py": 40.0}


# ------------------------------------------------------------------------------------------------ 4. the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    done = subprocess.run(["tests/gpu.sh", "attention"], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "SKIP_INSTALL": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("error: gpu.sh: torch sees no CUDA GPU here; tests/gpu.sh dry all tries the same paths at "
                           "toy size on a CPU\n")


def test_words_become_parts():
    assert [part for part, _ in gpu.split_arguments(["all"])] == [p for p in gpu.PARTS if p != "train"]
    assert gpu.split_arguments(["tests", "step"]) == [("tests", []), ("step", [])]
    assert gpu.split_arguments(["step", "some/model"]) == [("step", ["some/model"])]
    assert gpu.split_arguments(["train", "m", "--lora_rank", "16"]) == [("train", ["m", "--lora_rank", "16"])]
    for words in ([], ["nothing"], ["tests", "model/folder"]):
        with pytest.raises(data.UserError, match="gpu.sh: .* part"):
            gpu.split_arguments(words)


def test_train_wants_a_model_and_data(monkeypatch):
    for arguments, given in ([], "file"), (["model"], ""):
        monkeypatch.setenv("DATA", given)
        monkeypatch.setenv("HELDOUT_DATA", given)
        with pytest.raises(data.UserError, match="DATA=train.jsonl HELDOUT_DATA=test.jsonl tests/gpu.sh train MODEL"):
            gpu.training_inputs(replace(gpu.TOY, dry=False), arguments)


def test_made_problems_are_gsm8k_lines(tmp_path):
    """With annotations that data.py understands, and right."""
    lines = [gpu.word_problem(i) for i in range(5)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a, _ in lines))
    problems = data.read_gsm8k(file)
    for problem, (text, _, answer) in zip(problems, lines):
        assert problem.problem == text and problem.reference_solution.endswith(f"#### {answer}")
        assert problem.reference_reasoning.count("=") == 3 and problem.reference_reasoning.count("?") == 1
