"""Every command of the README, and every recipe of run.sh: the flags that stages get are flags that they take."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import executor
import rm
import tracelift

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"data.py": data.DataSettings, "executor.py": executor.BaseSettings, "rm.py": rm.RMSettings}
# Instead of Python: notes the command and does nothing. run.sh asks it whether a mode needs a reward model: yes.
STUB = """#!/usr/bin/env bash
case $1$MODES in -best) exec {python} "$@" ;; -*) echo True; exit ;; esac
printf '%s\\n' "$*" >>"$COMMANDS"
"""


def readme_lines() -> list[str]:
    """The lines of its bash blocks, continued ones as one."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.partition(" #")[0].strip() for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def check(command: str) -> None:
    """Parses the flags of a stage as the stage would."""
    script, *argv = shlex.split(command)
    if script.startswith("tests/"):
        assert (ROOT / script).is_file()
    elif script == "tracelift.py":
        data.parse_settings(tracelift.COMMANDS[argv[0]][0], argv[1:], command)
    else:
        data.parse_settings(SETTINGS[script], argv, command)


def stages_of(arguments: list[str], tmp_path, **environment) -> list[str]:
    """The commands that run.sh would give, in an empty run folder."""
    stub, commands = tmp_path / "bin" / "python3", tmp_path / "commands"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    known = {"SKIP_INSTALL": "1", "MODES": "", "PATH": f"{stub.parent}:{os.environ['PATH']}", "COMMANDS": str(commands),
             "RUN": str(tmp_path / "run")}
    for name in ("tiny-math", "tiny-code", "run-math", "run-code"):           # a stage that does nothing writes no table
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.md").write_text("")
    done = subprocess.run(["bash", "run.sh", *arguments], cwd=ROOT, env=os.environ | known | environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return commands.read_text().splitlines()


RUNS = [line for line in readme_lines() if line.endswith("./run.sh") or line.endswith("./run.sh smoke")]


@pytest.mark.parametrize("line", RUNS)
def test_run_sh_of_the_readme(line, tmp_path):
    *variables, _ = shlex.split(line)
    for command in stages_of([], tmp_path, **dict(v.split("=", 1) for v in variables)):
        check(command)


@pytest.mark.parametrize("preset", ["tiny", "smollm2", "gsm8k", "code", "paper-math", "paper-code"])
def test_recipes(preset, tmp_path):
    more = {"DATA": "a.jsonl", "HELDOUT_DATA": "b.jsonl"} if preset not in ("tiny", "smollm2") else {}
    warm = "0" if preset == "paper-math" else "1"                             # it trains an adapter
    commands = stages_of([], tmp_path, PRESET=preset, INT=warm, SEEDS="0 1", **more)
    stages = [" ".join(command.split()[:2]) for command in commands]
    assert {"data.py", "executor.py", "rm.py"} <= {stage.split()[0] for stage in stages}
    assert ("tracelift.py int" in stages) == (warm == "1") and stages.count("tracelift.py train") >= 4
    for command in commands:
        check(command)


def test_single_commands_of_the_readme():
    lines = [re.sub(r"^(python|torchrun \S+) ", "", line) for line in readme_lines()]
    ours = [line for line in lines if line.split(" ")[0] in (*SETTINGS, "tracelift.py")]
    assert len(ours) >= 3
    for line in ours:
        check(line)


@pytest.mark.parametrize("environment, said", [({"PRESET": "huge"}, "PRESET"), ({"MODES": "best"}, "MODES"),
                                               ({"PRESET": "paper-math", "INT": "1"}, "INT")])
def test_what_run_sh_refuses(environment, said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        stages_of([], tmp_path, **environment)
