"""Bad inputs: flags, files, folders, full disks, signals. Each ends a command with exit code 2 (130 for signals) and
one line that names what is wrong; no traceback, and nothing half written. Malformed lines of data files are in
test_data.py."""
import contextlib
import fcntl
import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

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
    "int": "--device cpu --problems 2 --group_size 2 --proposals 2 --num_runs 1 --epochs 1 --max_trace_tokens 6 "
           "--max_answer_tokens 5",
    "evaluate": "--device cpu --problems 2",
    "inspect": "--device cpu --traces 2"}
PLANNER = "planner-rm_only-seed0"
MADE = {"data": "groups", "executor": "base", "rm": "rm", "int": "int", "train": "planner-new-seed0"}


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
    """A command sets its own handler, for the rest of its process."""
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
    """{file: what is in it}"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def ends(capsys, command: str, argv: list[str], code: int = 2) -> str:
    """Runs a command that has to fail. Returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(command, argv)
    said = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert end.value.code == code, said
    wanted = [line for line in said if "error: " in line or code == 130 and "stopped" in line]
    assert len(wanted) == 1, said
    return wanted[0]


def check(capsys, command, argv, words, folder: Path) -> None:
    """...and the line has all these words, and no file is there that was not, none is changed or gone."""
    before = contents(folder)
    line = ends(capsys, command, argv)
    assert all(word in line for word in words), line
    assert before == contents(folder)


def damaged(name: str, content: bytes | None = None):
    """Damage: a file cut at half, or with other content."""
    def damage(run_dir):
        path = run_dir / name
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if content is None else content)
    return damage


def gone(*names: str):
    def damage(run_dir):
        for name in names:
            shutil.rmtree(run_dir / name) if (run_dir / name).is_dir() else (run_dir / name).unlink()
    return damage


def longer(split: str):
    """Damage: one problem of 700 words more."""
    def damage(run_dir):
        path = run_dir / "groups" / f"{split}.jsonl"
        groups = data.read_groups(path)
        groups[1]["problem"] += " coins" * 700
        data.write_groups(path, groups)
    return damage


def both(*damages):
    def damage(run_dir):
        for one in damages:
            one(run_dir)
    return damage


NEW = "--name new"
CASES = [  # command, flags, what happened to the run before, words of the line
    ("data", "--task_type physics", None, ["--task_type", "math, code"]),
    ("data", "--train 0", None, ["--train 0", "at least 1"]),
    ("data", "--train many", None, ["--train", "invalid int value"]),
    ("data", "--sead 1", None, ["unrecognized arguments: --sead 1"]),
    ("data", "--seed 36893488147419103232", None, ["--seed 36893488147419103232"]),
    ("data", "--source gsm8k --task_type code", None, ["--source gsm8k", "--task_type", "left out"]),
    ("data", "--source groups", None, ["--negatives 2", "--source groups", "left out"]),
    ("data", "--source groups --negatives 4", None, ["--data FILE", "--heldout_data FILE"]),
    ("data", "--source groups --negatives 4 --data RUN/none --heldout_data RUN/none", None, ["RUN/none"]),
    ("data", "--source groups --negatives 4 --data hf://owner --heldout_data b", None, ["hf://owner", "cannot be"]),
    ("data", "--negatives 40", None, ["--negatives"]),
    ("executor", "--learning_rate nan", None, ["--learning_rate nan", "above 0"]),
    ("executor", "--max_answer_tokens 505", None, ["--max_answer_tokens", "512"]),
    ("executor", "--model RUN/nowhere", None, ["--model"]),
    ("executor", "--device toaster", None, ["--device toaster"]),
    ("executor", ["--chat_template_kwargs", "{"], None, ["--chat_template_kwargs"]),
    ("executor", "", gone("base", "groups/heldout.jsonl"), ["groups/heldout.jsonl"]),
    ("executor", "", both(gone("base"), damaged("groups/heldout.jsonl")), ["groups/heldout.jsonl:"]),
    ("executor", "", longer("heldout"), ["groups has changed", "delete"]),
    ("executor", "", both(gone("base"), longer("heldout")), ["tiny-", "512"]),
    ("rm", "--seed -1", None, ["--seed -1", "at least 0"]),
    ("rm", "", gone("rm", "base"), ["executor.py"]),
    ("rm", "", both(gone("rm"), damaged("base/tokenizer.json")), ["run/base", "tokenizer"]),
    ("train", "--mode praise", None, ["--mode 'praise'", "exec_only"]),
    ("train", "--name a/b", None, ["--name 'a/b'"]),
    ("train", "--w_r 0.9", None, ["--w_r", "rm_only"]),
    ("train", "--clip_high 0.28", None, ["--clip_high", "--inner_epochs"]),
    ("train", "--lora_alpha 64", None, ["--lora_alpha", "--lora_rank", "left out"]),
    ("train", "--group_size 1", None, ["--group_size 1", "at least 2"]),
    ("train", "--group_size 4", None, ["--group_size 3", "4", "--run_dir"]),
    ("train", "--temperature inf", None, ["--temperature inf", "above 0"]),
    ("train", NEW + " --max_trace_tokens 511", None, ["--max_trace_tokens", "512"]),
    ("train", NEW + " --init RUN/nowhere", None, ["RUN/nowhere"]),
    ("train", NEW, gone("rm"), ["run/rm", "rm.py"]),
    ("train", NEW, damaged("rm/model.safetensors"), ["run/rm"]),
    ("train", NEW, damaged("rm/config.json"), ["run/rm"]),
    ("train", NEW, longer("train"), ["tiny-", "--max_trace_tokens", "512"]),
    ("train", "", damaged("base/base.json", b'{"model": "other"}'), ["base has changed", "delete"]),
    ("int", "--learning_rate 0.1", None, ["--learning_rate", "0.1", "delete"]),
    ("evaluate", "", gone("groups/heldout.jsonl"), ["groups", "changed"]),
    ("inspect", "--traces 1", None, ["--traces 1", "at least 2"]),
    ("inspect", "--planner planner-x-seed0", None, ["planner-x-seed0"])]


@pytest.mark.parametrize("command, more, damage, words", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_one_line_and_nothing_written(run_dir, capsys, command, more, damage, words):
    if damage:
        damage(run_dir)
    elif command in MADE and "delete" not in words and (run_dir / MADE[command]).exists():
        shutil.rmtree(run_dir / MADE[command])                      # as if it were not made yet
    check(capsys, command, arguments(command, run_dir, more), [word.replace("RUN", str(run_dir)) for word in words], run_dir)


@pytest.mark.parametrize("command", SMALL)
@pytest.mark.parametrize("what", ["a file", "below a file", "not there"])
def test_run_folders_that_are_none(tmp_path, capsys, command, what):
    if command == "data" and what == "not there":
        return                                                       # that is how a run begins
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / {"a file": "file", "below a file": "file/run", "not there": "run"}[what]
    check(capsys, command, arguments(command, folder), [str(tmp_path)], tmp_path)


def test_a_folder_that_another_process_is_making(run_dir, capsys):
    other = run_dir / "planner-new-seed0.partial"
    other.mkdir()
    with open(other / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(capsys, "train", arguments("train", run_dir, NEW), ["planner-new-seed0.partial", "another process"], run_dir)
    call("train", arguments("train", run_dir, NEW))
    assert not other.exists()


@pytest.mark.parametrize("command", ["executor", "rm", "train"])
def test_a_training_that_diverges(run_dir, capsys, monkeypatch, command):
    """Step and flag are named, and there is no model that somebody would later find damaged."""
    shutil.rmtree(run_dir / MADE[command], ignore_errors=True)
    real_step = torch.optim.AdamW.step

    def step(self, *args, **options):
        real_step(self, *args, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.inf)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    line = ends(capsys, command, arguments(command, run_dir, NEW if command == "train" else ""))
    assert "step" in line and "--learning_rate" in line, line
    assert not (run_dir / MADE[command]).exists()


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
@pytest.mark.parametrize("command", MADE)
def test_a_full_disk(run_dir, capsys, command, size):
    """At the first file, or at the model: one line; with room again the same command gets through."""
    made = run_dir / MADE[command]
    shutil.rmtree(made, ignore_errors=True)
    argv = arguments(command, run_dir, NEW if command == "train" else "")
    with room_for(size):
        ends(capsys, command, argv)
    assert not made.exists()
    assert not [p for p in run_dir.rglob("*") if p.suffix == ".tmp"]
    call(command, argv)
    assert made.exists() and not made.with_name(made.name + ".partial").exists()


WHERE = {"data": (data, "build_groups"), "executor": (executor, "adamw"), "rm": (executor, "adamw"),
         "train": (tracelift, "measure_rewards"), "inspect": (tracelift, "measure_rewards")}


@pytest.mark.parametrize("command", WHERE)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(run_dir, capsys, monkeypatch, command, number):
    """One line and exit code 130, and the same command gets through."""
    made = run_dir / MADE.get(command, "nothing")
    shutil.rmtree(made, ignore_errors=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = arguments(command, run_dir, NEW if command == "train" else "")
    with monkeypatch.context() as m:
        m.setattr(*WHERE[command], lambda *args, **options: os.kill(os.getpid(), number))
        assert "same command" in ends(capsys, command, argv, code=130)
    assert not made.exists()
    call(command, argv)


@pytest.mark.parametrize("error", [verify.SandboxError("no\nx.pt"), OSError(28, "No space left on device", "x.pt"),
                                   data.UserError("x.pt"), FloatingPointError("x.pt: no number")])
def test_what_a_user_can_mend_is_one_line(capsys, monkeypatch, error):
    monkeypatch.setattr(data, "main", lambda argv: (_ for _ in ()).throw(error))
    line = ends(capsys, "data", [])
    assert line.startswith("error: ") and "x.pt" in line


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault of ours"):
        data.run_command(lambda argv: (_ for _ in ()).throw(RuntimeError("a fault of ours")), [])


def test_template_arguments_reach_every_prompt_of_a_run(run_dir, tmp_path, monkeypatch):
    """Planner, executor, evaluation, and planners that are saved: the template itself has them."""
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                "{% if thinking is defined and not thinking %}<done>{% endif %}")
    chat = Path(shutil.copytree(run_dir / "base", tmp_path / "chat"))
    (chat / "chat_template.jinja").write_text(template)
    gone("base", "int", "rm", PLANNER)(run_dir)
    monkeypatch.setattr(data.Tiny, "needs_base_model", False)
    executor.main(["--run_dir", str(run_dir), "--device", "cpu", "--model", str(chat), "--eval_problems", "2",
                   "--max_answer_tokens", "5", "--chat_template_kwargs", json.dumps({"thinking": False})])
    real, seen = data.encode_prompt, set()

    def spy(tokenizer, prompt, *more):
        seen.add(tokenizer.chat_template)
        return real(tokenizer, prompt, *more)
    rm.main(arguments("rm", run_dir))
    for command in ("train", "evaluate"):
        with monkeypatch.context() as m:
            m.setattr(data, "encode_prompt", spy)
            tracelift.main([command, *arguments(command, run_dir)])
        assert "{%- set thinking = false %}" + template in seen, command
        seen.clear()
    saved = executor.load(str(run_dir / PLANNER), "cpu")[1]
    turn = saved.apply_chat_template([{"role": "user", "content": "Mia"}], tokenize=False, add_generation_prompt=True)
    assert turn == "<|user|>Mia<done>"
