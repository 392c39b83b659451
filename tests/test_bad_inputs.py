"""Bad inputs, one after the other: flags, files, folders, full disks, signals. Each ends a command with exit code 2
(130 for signals) and one line that names what is wrong and how to mend it; no traceback, and nothing half written."""
import contextlib
import dataclasses
import fcntl
import gzip
import json
import math
import os
import re
import resource
import shutil
import signal
import threading
from pathlib import Path

import plot_curves
import pytest
import torch

import data
import executor
import rm
import tracelift
import verify

HERE = {"data": data, "executor": executor, "rm": rm}
SMALL = {
    "data": "--train 6 --heldout 4 --negatives 2",
    "executor": "--device cpu --sequences 48 --hidden 16 --layers 1 --eval_problems 2 --max_answer_tokens 5",
    "rm": "--device cpu --epochs 1 --groups_per_batch 3",
    "train": "--device cpu --mode rm_only --steps 2 --warmup 1 --problems_per_step 2 --group_size 3 --max_trace_tokens "
             "6 --max_answer_tokens 5 --save_every 1",
    "int": "--device cpu --problems 2 --group_size 2 --proposals 2 --repeats 1 --epochs 1 --max_trace_tokens 6 "
           "--max_answer_tokens 5",
    "evaluate": "--device cpu --problems 2",
    "inspect": "--device cpu --traces 2"}
PLANNER = "planner-rm_only-seed0"


def call(command: str, argv: list[str]) -> None:
    """A command as its file runs it; SystemExit says how it ended."""
    if command in HERE:
        data.run_command(HERE[command].main, argv)
    else:
        data.run_command(tracelift.main, [command, *argv])


def arguments(command: str, run_dir: Path, more="") -> list[str]:
    """The toy flags, and those of a case, which may name files in run_dir as RUN/file."""
    more = more.split() if isinstance(more, str) else list(more)
    return [*SMALL[command].split(), "--run_dir", str(run_dir), *(word.replace("RUN", str(run_dir)) for word in more)]


@pytest.fixture(autouse=True)
def signals_come_back():
    """A command sets its own handlers, for the rest of its process."""
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with everything in it, at toy size."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        for command in ("data", "executor", "rm", "int", "train", "evaluate"):
            call(command, arguments(command, run_dir))
    return run_dir


@pytest.fixture
def run_dir(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def contents(folder: Path) -> dict:
    """{file: what is in it}, without folders, links and the clock's part of settings.json."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def ends(capsys, command: str, argv: list[str], code: int = 2) -> str:
    """Runs a command that has to fail. Returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(command, argv)
    said = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert end.value.code == code, said
    assert not any("Traceback" in line for line in said), said
    beginning = re.compile("stopped" if code == 130 else r"error: |[\w. ]+: error: ")              # argparse's own too
    wanted = [line for line in said if beginning.match(line)]
    assert len(wanted) == 1, said
    return wanted[0]


def check(capsys, command, argv, words, folder: Path, code: int = 2) -> None:
    """...and the line has all these words, and no file is there that was not, none is changed or gone."""
    before = contents(folder)
    line = ends(capsys, command, argv, code)
    assert all(word in line for word in words), line
    after = contents(folder)
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    assert before == after


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize("command, more, words", [
    ("data", "--task_type physics", ["--task_type", "math, code"]),
    ("data", "--train 0", ["--train 0", "at least 1"]),
    ("data", "--negatives -2", ["--negatives -2", "at least 1"]),
    ("data", "--train many", ["--train", "invalid int value"]),
    ("data", "--sead 1", ["unrecognized arguments: --sead 1"]),
    ("data", "--seed 36893488147419103232", ["--seed 36893488147419103232", "64 bits"]),
    ("data", "--source gsm8k --task_type code", ["--source gsm8k", "--task_type code"]),
    ("data", "--heldout_data x.jsonl", ["--source tiny", "--heldout_data"]),
    ("data", "--source groups", ["--data FILE", "--heldout_data FILE"]),
    ("data", "--tests x.jsonl", ["--tests", "--source groups"]),
    ("data", "--source groups --negatives 3 --data a --heldout_data b", ["--negatives", "no effect", "leave it out"]),
    ("data", "--source groups --data hf://owner --negatives 4 --heldout_data b",
     ["hf://owner", "hf://datasets/OWNER/NAME"]),
    ("data", ["--run_dir", ""], ["--run_dir", "name a folder"]),
    ("data", "--negatives 40", ["--negatives", "lower it"]),
    ("executor", "--hidden 20", ["--hidden 20", "multiple of 8"]),
    ("executor", "--learning_rate nan", ["--learning_rate nan", "above 0"]),
    ("executor", "--max_cache_gib 0", ["--max_cache_gib", "above 0"]),
    ("executor", "--max_cache_gib 1e200", ["--max_cache_gib", "at most"]),
    ("executor", "--warmup 4", ["--warmup 4", "3 steps", "lower it"]),
    ("executor", "--max_answer_tokens 505", ["--max_answer_tokens 505", "context of 512", "lower it"]),
    ("executor", "--model RUN/nowhere", ["leave out --model"]),
    ("executor", "--device toaster", ["--device toaster", "cpu"]),
    ("executor", "--device cuda:31", ["--device cuda:31", "cpu"]),
    ("executor", "--device meta", ["--device meta", "cpu"]),
    ("executor", ["--chat_template_kwargs", "{"], ["--chat_template_kwargs {", "JSON object"]),
    ("executor", ["--chat_template_kwargs", '{"quiet": true}'], ["tiny world has no quiet", "leave it out"]),
    ("executor", ["--chat_template_kwargs", '{"a b": 1}'], ["a b must be a name"]),
    ("rm", "--epochs 0", ["--epochs 0.0", "above 0"]),
    ("rm", "--epochs 1e250", ["--epochs 1e+250", "at most"]),
    ("rm", "--seed -1", ["--seed -1", "at least 0"]),
    ("rm", "--lora_alpha 64", ["--lora_alpha", "--lora_rank", "leave it out"]),
    ("rm", "--warmup 77", ["--warmup 77", "2 steps", "lower it"]),
    ("train", "--mode praise", ["--mode 'praise'", "exec_only"]),
    ("train", "--name a/b", ["--name 'a/b'", "plain name"]),
    ("train", "--warmup 3", ["--warmup 3", "--steps 2", "lower it"]),
    ("train", "--w_r 0.9", ["--w_r", "rm_only", "leave it out"]),
    ("train", "--clip_high 0.28", ["--clip_high", "--inner_epochs 1", "leave it out"]),
    ("train", "--repeats 5", ["--repeats", "rm_only", "leave it out"]),
    ("train", "--executor_temperature 0", ["--executor_temperature", "rm_only", "leave it out"]),
    ("train", "--lora_alpha 64", ["--lora_alpha", "--lora_rank", "leave it out"]),
    ("train", "--eval_problems 7", ["--eval_problems", "--eval_every", "leave it out"]),
    ("train", "--mode exec_only --exec_score hybrid", ["--exec_score hybrid", "math"]),
    ("train", "--group_size 1", ["--group_size 1", "at least 2"]),
    ("train", "--temperature inf", ["--temperature inf", "above 0"]),
    ("train", "--name new --max_trace_tokens 511", ["tiny-", "--max_trace_tokens", "512"]),
    ("train", "--name new --init RUN/nowhere", ["RUN/nowhere", "tokenizer"]),
    ("train", "--lora_rank 2 --init RUN/int", ["--init", "LoRA"]),
    ("train", "--steps 1", ["--steps 1", "2 already", "--name"]),
    ("train", "--group_size 4", ["--group_size 3", "4", "--run_dir"]),
    ("int", "--first_step skip", ["--first_step 'skip'", "keep, drop"]),
    ("int", "--learning_rate 0.1", ["--learning_rate 0.0003", "0.1", "delete"]),
    ("evaluate", "--problems 0", ["--problems 0", "at least 1"]),
    ("evaluate", "--max_trace_tokens 9", ["unrecognized arguments: --max_trace_tokens 9"]),
    ("inspect", "--traces 1", ["--traces 1", "at least 2"]),
    ("inspect", "--planner planner-x-seed0", ["planner-x-seed0", "folder"]),
    ("analyse", "", ["analyse", "train, int, select, evaluate or inspect"]),
    ("", "", ["train, int, select, evaluate or inspect"])], ids=lambda x: " ".join(x) if isinstance(x, list) else str(x))
def test_flags(run_dir, capsys, command, more, words):
    if command in ("data", "executor", "rm", "int") and "delete" not in words:        # as if it were not made yet
        shutil.rmtree(run_dir / {"data": "groups", "executor": "base"}.get(command, command))
    SMALL.setdefault(command, "")
    argv = arguments(command, run_dir, more)
    check(capsys, command, argv, [word.replace("RUN", str(run_dir)) for word in words], run_dir)


# ---------------------------------------------------------------- files of problems and groups

def group(**changes) -> dict:
    made = data.build_groups(data.tiny_problems("math", 5, 3), 2, 0)[0]
    return made | changes


def flawed(change) -> bytes:
    changed = json.loads(json.dumps(group()))
    change(changed)
    return json.dumps(changed).encode()


@pytest.mark.parametrize("content, words", [
    (None, ["no such file"]), (b"", ["empty"]), (b"PAR1\x15\x04", ["parquet", "to_json"]), (b"[" * 80000,
                                                                                            ["mine.jsonl:1", "nested"]),
    (b'{"problem_id": %s}' % (b"7" * 5000), ["mine.jsonl:1", "cannot be read"]),
    (b'{"problem_id": "\\udc80"}', ["mine.jsonl:1", "surrogate"]), (json.dumps(group()).encode() + b'\n{"problem',
                                                                    ["mine.jsonl:2", "not JSON"]),
    (b'"text"', ["mine.jsonl:1", "must be a JSON object"]), (b'{"problem_id": 4}',
                                                             ["mine.jsonl:1", "'problem_id' must be a str"]),
    (b"\xe9t\xe9", ["mine.jsonl", "UTF-8"]), (gzip.compress(b'{"a": 1}' * 99)[:30], ["mine.jsonl", "cannot be read"]),
    (json.dumps(group()).encode() + b"\n" + json.dumps(group(problem="another")).encode(),
     ["mine.jsonl:2", "problem_id", "unique"]),
    (flawed(lambda g: g["positive_pool"][0]["rubric"].update(total=1.5)), ["mine.jsonl:1", "'total'", "0..1"]),
    (flawed(lambda g: g["negative_bank"][1]["rubric"].update(step_coherence=9)),
     ["mine.jsonl:1", "step_coherence", "0..4"]),
    (flawed(lambda g: g.update(negative_bank=3)), ["mine.jsonl:1", "'negative_bank' must be a list"]),
    (flawed(lambda g: g.update(tests=[{"in": 1}])), ["mine.jsonl:1", "'tests'"]),
    (b'{"task_id": "T/1", "canonical_solution": "return 1"}', ["mine.jsonl:1", "prompt"])],
    ids=range(17))
def test_files_of_groups(tmp_path, capsys, content, words):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "other.jsonl").write_text(json.dumps(group(problem_id="m9", problem="Something else ?")))
    argv = ["--source", "groups", "--data", str(path), "--heldout_data", str(tmp_path / "other.jsonl"), "--run_dir",
            str(tmp_path / "run")]
    check(capsys, "data", argv, words, tmp_path)


def test_a_training_problem_that_is_held_out(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(json.dumps(group()))
    argv = ["--source", "groups", "--data", str(tmp_path / "mine.jsonl"), "--heldout_data",
            str(tmp_path / "mine.jsonl")]
    check(capsys, "data", [*argv, "--run_dir", str(tmp_path / "run")], ["held out", "--data"], tmp_path)


# ---------------------------------------------------------------- files and folders of a run

def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 3 // 5])


def record(path: str, **changes):
    """Damage: other values in a JSON file; None takes a key away."""
    def damage(run_dir):
        found = json.loads((run_dir / path).read_text())
        for key, value in changes.items():
            part, _, name = key.rpartition("__")
            inside = found[part] if part else found
            inside[name] = value
            if value is None:
                del inside[name]
        (run_dir / path).write_text(json.dumps(found))
    return damage


def text(path: str, content: str | bytes):
    def damage(run_dir):
        (run_dir / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return damage


def gone(*paths: str):
    def damage(run_dir):
        for path in paths:
            shutil.rmtree(run_dir / path) if (run_dir / path).is_dir() else (run_dir / path).unlink()
    return damage


def longer(split: str, where: str):
    """Damage: one text of 700 words more."""
    def damage(run_dir):
        path = run_dir / "groups" / f"{split}.jsonl"
        groups = data.read_groups(path)
        if where == "problem":
            groups[1]["problem"] += " coins" * 700
        else:
            groups[1]["negative_bank"][0]["reasoning"] += " + 5" * 350
        data.write_groups(path, groups)
    return damage


def both(*damages):
    def damage(run_dir):
        for one in damages:
            one(run_dir)
    return damage


HALF = {name: lambda run_dir, name=name: half(run_dir / name) for name in (
    "groups/train.jsonl", "groups/heldout.jsonl", "base/base.json", "base/settings.json", "base/model.safetensors",
    "base/config.json", "base/tokenizer.json", "base/tokenizer_config.json", "rm/config.json", "rm/model.safetensors",
    "rm/tokenizer.json", "rm/settings.json", "rm/metrics.json", "int/int.json", f"{PLANNER}/settings.json",
    f"{PLANNER}/checkpoint.pt", f"{PLANNER}/results.json", f"{PLANNER}/metrics.jsonl", f"{PLANNER}/model.safetensors")}
NEW = "--name new"
FILES = [
    ("executor", gone("base", "groups/heldout.jsonl"), "", ["groups/heldout.jsonl", "no such file"]),
    ("executor", both(gone("base"), HALF["groups/heldout.jsonl"]), "",
     ["groups/heldout.jsonl:", "mend or delete this line"]),
    ("executor", HALF["base/base.json"], "", ["base/base.json", "damaged", "delete"]),
    ("executor", HALF["base/settings.json"], "", ["base/settings.json", "damaged", "delete"]),
    ("executor", text("base/settings.json", '{"settings": []}'), "", ["base/settings.json", "damaged", "--run_dir"]),
    ("executor", longer("heldout", "problem"), "", ["groups/heldout.jsonl has changed", "delete"]),
    ("executor", both(gone("base"), longer("heldout", "problem")), "",
     ["tiny-", "--max_answer_tokens", "512", "leave the problem out"]),
    ("rm", gone("rm", "base"), "", ["no base model yet", "executor.py --run_dir"]),
    ("rm", gone("rm", "base/base.json"), "", ["base/base.json", "missing", "executor.py --run_dir"]),
    ("rm", both(gone("rm"), HALF["base/base.json"]), "", ["base/base.json", "damaged", "executor.py --run_dir"]),
    ("rm", both(gone("rm"), text("base/base.json", "[1]")), "", ["base/base.json", "damaged", "executor.py --run_dir"]),
    ("rm", both(gone("rm"), text("base/base.json", b"\xff\xfe")), "",
     ["base/base.json", "damaged", "executor.py --run_dir"]),
    ("rm", both(gone("rm"), HALF["base/model.safetensors"]), "", ["run/base", "no causal LM can be loaded"]),
    ("rm", both(gone("rm"), HALF["base/tokenizer.json"]), "", ["run/base", "tokenizer"]),
    ("rm", both(gone("rm"), HALF["base/tokenizer_config.json"]), "", ["run/base", "tokenizer"]),
    ("rm", both(gone("rm"), record("base/config.json", hidden_size="wide")), "", ["run/base"]),
    ("rm", both(gone("rm"), longer("heldout", "trace")), "", ["group tiny-", "context 512", "remove it"]),
    ("rm", both(gone("rm"), longer("train", "trace")), "", ["group tiny-", "context 512", "--model"]),
    ("rm", HALF["rm/metrics.json"], "", ["rm/metrics.json", "damaged", "delete"]),
    ("rm", gone("rm/metrics.json"), "", ["rm/metrics.json", "missing", "delete"]),
    ("rm", record("rm/settings.json", settings=None), "", ["rm/settings.json", "damaged", "delete"]),
    ("rm", longer("train", "problem"), "", ["groups/train.jsonl has changed", "delete"]),
    ("train", gone("groups/train.jsonl"), NEW, ["groups/train.jsonl", "no such file"]),
    ("train", gone("rm"), NEW, ["run/rm", "rm.py"]),
    ("train", HALF["rm/config.json"], NEW, ["rm/config.json", "damaged", "rm.py"]),
    ("train", record("rm/config.json", rm_dimension_names=5), NEW, ["rm/config.json", "rm_dimension_names must be"]),
    ("train", record("rm/config.json", rm_dimension_weights=["a"] * 5), NEW,
     ["rm/config.json", "rm_dimension_weights must be"]),
    ("train", HALF["rm/model.safetensors"], NEW, ["run/rm", "weights do not fit", "rm.py"]),
    ("train", HALF["rm/tokenizer.json"], NEW, ["run/rm", "tokenizer"]),
    ("train", HALF[f"{PLANNER}/settings.json"], "", [f"{PLANNER}/settings.json", "damaged", "delete"]),
    ("train", HALF[f"{PLANNER}/settings.json"], "--steps 3", [f"{PLANNER}/settings.json", "damaged", "delete"]),
    ("train", record(f"{PLANNER}/settings.json", settings__steps="two"), "",
     [f"{PLANNER}/settings.json", "damaged", "delete"]),
    ("train", HALF[f"{PLANNER}/checkpoint.pt"], "--steps 3", ["checkpoint.pt", "cannot be read", "delete it"]),
    ("train", text(f"{PLANNER}/checkpoint.pt", b"\0" * 300), "--steps 3",
     ["checkpoint.pt", "cannot be read", "delete it"]),
    ("train", lambda r: torch.save([1, 2], r / PLANNER / "checkpoint.pt"), "--steps 3",
     ["checkpoint.pt", "cannot be read", "delete it"]),
    ("train", gone(f"{PLANNER}/checkpoint.pt"), "--steps 3", ["--steps 3", "checkpoint.pt is gone", "--name"]),
    ("train", record("base/base.json", no_trace=0.77), "--steps 3", ["base/base.json has changed", "delete"]),
    ("train", record("rm/metrics.json", total_mae=0.77), "", ["rm/metrics.json has changed", "delete"]),
    ("train", longer("train", "problem"), NEW, ["tiny-", "--max_trace_tokens", "512", "leave the problem out"]),
    ("train", longer("heldout", "problem"), NEW + " --eval_every 1",
     ["tiny-", "--max_trace_tokens", "leave the problem out"]),
    ("int", HALF["int/int.json"], "", ["int/int.json", "damaged", "delete"]),
    ("int", both(gone("int"), longer("train", "problem")), "",
     ["tiny-", "--max_trace_tokens", "leave the problem out"]),
    ("int", both(gone("int"), text("base/base.json", "{}")), "", ["base/base.json", "damaged", "model"]),
    ("evaluate", HALF[f"{PLANNER}/results.json"], "", [f"{PLANNER}/results.json", "damaged", "delete it"]),
    ("evaluate", record(f"{PLANNER}/results.json", rows={"x": 3}), "",
     [f"{PLANNER}/results.json", "damaged", "delete it"]),
    ("evaluate", both(gone(f"{PLANNER}/results.json"), HALF[f"{PLANNER}/metrics.jsonl"]), "",
     ["metrics.jsonl", "last line", "delete that line"]),
    ("evaluate", both(gone(f"{PLANNER}/results.json"), text(f"{PLANNER}/metrics.jsonl", '{"step": 1}\n')), "",
     ["metrics.jsonl", "last line", "delete that line"]),
    ("evaluate", gone(f"{PLANNER}/results.json", f"{PLANNER}/metrics.jsonl"), "",
     ["metrics.jsonl", "missing", "delete"]),
    ("evaluate", gone(f"{PLANNER}/settings.json"), "", [f"{PLANNER}/settings.json", "missing"]),
    ("evaluate", record(f"{PLANNER}/settings.json", settings__max_trace_tokens="8"), "",
     [f"{PLANNER}/settings.json", "damaged", "delete"]),
    ("evaluate", gone("groups/heldout.jsonl"), "", ["groups/heldout.jsonl", "no such file"]),
    ("evaluate", both(gone("base/results.json"), longer("longer", "problem")), "",
     ["tiny-", "--max_trace_tokens", "leave the problem out"]),
    ("evaluate", both(gone(f"{PLANNER}/results.json"), HALF[f"{PLANNER}/model.safetensors"]), "",
     [PLANNER, "no causal LM can be loaded"]),
    ("inspect", HALF["rm/config.json"], "", ["rm/config.json", "rm.py"]),
    ("inspect", HALF["base/config.json"], "", ["run/base"]),
    ("inspect", longer("heldout", "problem"), "--seed 1", ["tiny-", "--max_trace_tokens", "leave the problem out"]),
    ("inspect", HALF[f"{PLANNER}/settings.json"], f"--planner {PLANNER}", [f"{PLANNER}/settings.json", "damaged"]),
    ("inspect", record(f"{PLANNER}/settings.json", settings__temperature=[1]), f"--planner {PLANNER}",
     [f"{PLANNER}/settings.json", "damaged"])]


@pytest.mark.parametrize("command, damage, more, words", FILES, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(FILES)])
def test_files_of_a_run(run_dir, capsys, command, damage, more, words):
    damage(run_dir)
    check(capsys, command, arguments(command, run_dir, more), words, run_dir)


def test_a_log_in_the_figure(run_dir):
    """Half a line at the end is a training at work; elsewhere it is damage."""
    log = run_dir / PLANNER / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 2, "rm": 0.')
    assert len(plot_curves.curves(run_dir, "rm")["rm_only"][0]) == 2
    assert plot_curves.curves(run_dir, "heldout_success") == {}
    log.write_text('{"step": 2, "rm": 0.\n' + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: damaged .*delete this line"):
        plot_curves.curves(run_dir, "rm")


@pytest.mark.parametrize("command", ["data", "executor", "rm", "train", "int", "evaluate", "inspect"])
@pytest.mark.parametrize("what", ["a file", "below a file", "not there"])
def test_run_folders_that_are_none(tmp_path, capsys, command, what):
    if command == "data" and what == "not there":
        return                                                           # that is how a run begins
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / {"a file": "file", "below a file": "file/run", "not there": "run"}[what]
    check(capsys, command, arguments(command, folder), [str(tmp_path)], tmp_path)


def test_a_folder_that_another_process_is_making(run_dir, capsys):
    other = run_dir / "planner-new-seed0.partial"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    check(capsys, "train", arguments("train", run_dir, NEW),
          ["planner-new-seed0.partial", "another process", "stop it first"], run_dir)
    assert other.is_dir()
    os.close(lock)
    call("train", arguments("train", run_dir, NEW))
    assert not other.exists()


# ---------------------------------------------------------------- trainings that diverge

def scripted_interventions(run_dir: Path) -> None:
    """A stopped InT stage, which has only its fine-tuning left."""
    shutil.move(run_dir / "int", run_dir / "int.partial")
    records = []
    for g in data.read_groups(run_dir / "groups" / "train.jsonl")[:2]:
        trace = g["positive_pool"][0]["reasoning"]
        records.append({"problem_id": g["problem_id"], "trace": trace, "proposals": [], "left_out": None,
                        "chosen": {"index": 1, "step": trace.split(" ; ")[0]}})
    record("int.partial/int.json", failed_traces=2)(run_dir)
    (run_dir / "int.partial" / "interventions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize("command", ["executor", "rm", "train", "int"])
@pytest.mark.parametrize("when", ["at once", math.inf, 3e38])
def test_a_training_that_diverges(run_dir, capsys, monkeypatch, command, when):
    """In the loss, or only in the last update, in which norms may turn infinity into 0: step and flag are named, and
    there is no model that somebody would later find damaged."""
    if when == 3e38 and command in ("rm", "int"):
        return                                           # scores that are all alike; and InT keeps the weights before
    if command == "int":
        scripted_interventions(run_dir)
        record("int.partial/settings.json", settings__learning_rate=1e11)(run_dir)
    elif command != "train":
        shutil.rmtree(run_dir / {"executor": "base", "rm": "rm"}[command])
    if when == "at once":
        of, name = {"rm": (rm, "rm_loss"), "train": (tracelift.kernels, "grpo_loss")}.get(command, (executor,
                                                                                                    "sequence_loss"))
        real = getattr(of, name)

        def broken(*args, **options):
            found = real(*args, **options)
            if isinstance(found, tuple):
                return found[0] * float("nan") + 0 * found[1].sum(), *found[1:]
            return found * float("nan")
        monkeypatch.setattr(of, name, broken)
        monkeypatch.setattr(tracelift.kernels, "group_advantage", lambda reward, *args,
                            **options: torch.ones_like(reward))
    else:
        real_step = torch.optim.AdamW.step

        def step(self, *args, **options):
            real_step(self, *args, **options)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.fill_(when)
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
    more = {"int": "--learning_rate 1e11", "train": NEW + " --steps 1",
            "executor": "--sequences 16 --batch_size 16"}.get(command, "--epochs 0.4")
    line = ends(capsys, command, arguments(command, run_dir, more))
    assert "step" in line and "--learning_rate" in line and "weights are damaged" not in line, line
    made = run_dir / {"executor": "base", "rm": "rm", "int": "int", "train": "planner-new-seed0"}[command]
    assert not made.exists()
    assert command == "int" or not (made.with_name(made.name + ".partial") / "model.safetensors").exists()


def test_interventions_that_are_damaged(run_dir, capsys):
    scripted_interventions(run_dir)
    log = run_dir / "int.partial" / "interventions.jsonl"
    half(log)
    for _ in "half a line", "a line is missing":
        line = ends(capsys, "int", arguments("int", run_dir))
        assert "interventions.jsonl" in line and "delete" in line
        log.write_bytes(log.read_bytes().partition(b"\n")[0] + b"\n")
    half(run_dir / "int.partial" / "int.json")
    line = ends(capsys, "int", arguments("int", run_dir))
    assert "int.json" in line and "damaged" in line and "delete" in line


# ---------------------------------------------------------------- full disks

@contextlib.contextmanager
def room_for(size: int):
    """No file may grow beyond `size` bytes: write() fails as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [100, 3000])
@pytest.mark.parametrize("command, folder",
                         [("data", "groups"), ("executor", "base"), ("rm", "rm"), ("train", "planner-new-seed0"),
                          ("int", "int")])
def test_a_full_disk(run_dir, capsys, command, folder, size):
    """At the first file, or at the model: one line; with room again the same command gets through."""
    if (run_dir / folder).exists():
        shutil.rmtree(run_dir / folder)
    argv = arguments(command, run_dir, NEW if command == "train" else "")
    with room_for(size):
        line = ends(capsys, command, argv)
    assert str(run_dir / folder) in line and ("make room" in line or "same command" in line), line
    partial = run_dir / f"{folder}.partial"
    assert not (run_dir / folder).exists() and (size > 100 or not partial.exists())
    assert not [p for p in run_dir.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]
    call(command, argv)
    assert (run_dir / folder).exists() and not partial.exists()


@pytest.mark.parametrize("size", [100, 1200, 8000])
def test_a_full_disk_while_results_are_written(run_dir, capsys, size):
    gone("base/results.json", "results.md")(run_dir)
    with room_for(size):
        line = ends(capsys, "evaluate", arguments("evaluate", run_dir)) if size < 8000 else ""
    assert size == 8000 or "make room" in line
    assert not list(run_dir.rglob(".*"))


# ---------------------------------------------------------------- signals

WHERE = {"data": (data, "build_groups"), "executor": (executor, "sequence_loss"), "rm": (rm, "rm_loss"),
         "train": (tracelift, "measure_rewards"), "int": (tracelift, "failed_traces"),
         "evaluate": (tracelift, "evaluate_planner"), "inspect": (tracelift, "measure_rewards")}


@pytest.mark.parametrize("command", WHERE)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(run_dir, capsys, monkeypatch, command, number):
    """One line and exit code 130, and the same command gets through. The signal comes twice: somebody is impatient."""
    made = {"data": "groups", "executor": "base", "rm": "rm", "int": "int", "train": "planner-new-seed0"}.get(command)
    if made and (run_dir / made).exists():
        shutil.rmtree(run_dir / made)
    gone(f"{PLANNER}/results.json")(run_dir)
    of, name = WHERE[command]
    real, calls = getattr(of, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == (2 if command in ("executor", "train") else 1):
            try:
                os.kill(os.getpid(), number)
                real(*args, **options)
            finally:
                os.kill(os.getpid(), number)
        return real(*args, **options)
    argv = arguments(command, run_dir, NEW if command == "train" else "")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as m:
        m.setattr(of, name, interrupted)
        line = ends(capsys, command, argv, code=130)
    assert "same command" in line and (command != "train" or "checkpoint.pt holds" in line)
    assert not [p for p in run_dir.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]
    assert not made or not (run_dir / made).exists()
    call(command, argv)
    assert not made or (run_dir / made).exists()


def test_a_ctrl_c_that_the_shell_wants_ignored(monkeypatch, capsys):
    """A job in the background of a shell script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    data.run_command(lambda argv: os.kill(os.getpid(), signal.SIGINT), [])
    assert threading.current_thread() is threading.main_thread() and capsys.readouterr().err == ""


# ---------------------------------------------------------------- what else a machine may say

@pytest.mark.parametrize("error, words", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried"),
     ["can't allocate", "--micro_tokens"]), (MemoryError(), ["out of memory", "--max_cache_gib"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), ["CUDA out of memory", "--micro_tokens"]),
    (verify.SandboxError("no\nsandbox"), ["no sandbox"]), (OSError(28, "No space left on device", "x.pt"),
                                                           ["x.pt", "make room"]),
    (PermissionError(13, "Permission denied", "runs"),
     ["runs", "--run_dir"]), (FloatingPointError("step 3: no number"), ["step 3"])])
def test_errors_of_the_machine(capsys, monkeypatch, error, words):
    def fail(argv):
        raise error
    monkeypatch.setitem(HERE, "broken", type("broken", (), {"main": staticmethod(fail)}))
    line = ends(capsys, "broken", [])
    assert all(word in line for word in words), line


def test_an_error_of_ours_stays_a_traceback():
    """Only what a user can mend is one line."""
    with pytest.raises(RuntimeError, match="a fault of ours"):
        data.run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("a fault of ours")), [])


# ---------------------------------------------------------------- template arguments

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
            "{% if thinking is defined and not thinking %}<done>{% endif %}")


def test_template_arguments_reach_every_prompt_of_a_run(run_dir, tmp_path, monkeypatch):
    """Planner, executor, InT, evaluation, and planners that are saved: the template itself has them."""
    chat = tmp_path / "chat"
    shutil.copytree(run_dir / "base", chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("base", "int", "rm", PLANNER):
        shutil.rmtree(run_dir / name)
    monkeypatch.setattr(data, "needs_base_model", lambda problem: False)
    argv = ["--run_dir", str(run_dir), "--device", "cpu", "--model", str(chat), "--eval_problems", "2",
            "--max_answer_tokens", "5"]
    executor.main([*argv, "--chat_template_kwargs", '{"thinking": false}'])
    real, seen = data.encode_prompt, []

    def spy(tokenizer, prompt, *more):
        if not prompt.startswith(data.SENTENCE):                       # of `load`, about the template itself
            seen.append(tokenizer.chat_template)
        return real(tokenizer, prompt, *more)
    monkeypatch.setattr(data, "encode_prompt", spy)
    rm.main(arguments("rm", run_dir))
    for command in ("int", "train", "evaluate", "inspect"):
        tracelift.main([command, *arguments(command, run_dir)])
        assert set(seen) == {"{%- set thinking = false %}" + TEMPLATE}, command
        seen.clear()
    saved = executor.load(str(run_dir / PLANNER), "cpu")[1]
    turn = saved.apply_chat_template([{"role": "user", "content": "Mia"}], tokenize=False, add_generation_prompt=True)
    assert turn == "<|user|>Mia<|assistant|><done>"
    with pytest.raises(data.UserError, match="has no mood"):
        executor.main([*argv, "--run_dir",
                       str(Path(shutil.copytree(run_dir / "groups", tmp_path / "more" / "groups")).parent),
                       "--chat_template_kwargs", '{"mood": 1}'])


def test_a_beginning_that_spells_control_tokens():
    """InT has the planner continue its own trace, which may spell the end of a turn."""
    from test_data import chat_tokenizer
    for tokenizer in (chat_tokenizer(), chat_tokenizer(None)):
        beginning = "add 2 .<|end|>\n<|start|>assistant\n#### 4"
        ids = tracelift.begin_trace(tokenizer, beginning)
        assert not [i for i in ids if i < 3] and tokenizer.decode(ids) == data.OPEN + beginning
