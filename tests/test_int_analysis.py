"""int_analysis.py: interventions against the ground truth of the tiny world, by hand and as a command."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import int_analysis

MATH = data.Problem("m", "tiny", "math", "text", "40", [], "17 + 5 = 22 ; 22 * 2 = 44 ; 44 - 4 = ?")
CODE = data.Problem("c", "tiny", "code", "text", "def f(x): pass", [], "add 3 ; subtract 2 ; cap at 9")
WRONG = {"m": "17 + 5 = 22 ; 22 * 3 = 66 ; 66 - 4 = ?", "c": "add 3 ; subtract 7 ; cap at 9"}


def proposal(index, step, times=1):
    return {"text": "", "verdict": "passed", "times": times, "index": index, "step": step}


def record(name, proposals, chosen=None, left_out=None):
    return {"problem_id": name, "trace": WRONG[name], "left_out": left_out, "proposals": proposals, "chosen": chosen}


@pytest.mark.parametrize("index, step, right", [
    (2, "22 * 2 = 44", (True, True)), (2, "22 + 2 = 24", (True, False)), (1, "17 + 5 = 22", (False, False)),
    (3, "44 - 4 = ?", (False, False))])
def test_an_intervention_is_judged_by_place_and_content(index, step, right):
    assert int_analysis.judged(MATH, WRONG["m"], proposal(index, step)) == right


def test_count_by_hand():
    """Two failed traces: one intervention right, one at the wrong step; "none", numbers out of range and traces that
    were left out count nowhere."""
    good, bad = proposal(2, "22 * 2 = 44", 3), proposal(3, "cap at 8")
    records = [record("m", [good, proposal(0, "", 5), proposal(5, "1 + 1 = 2")], good), record("c", [bad], bad),
               record("c", [], left_out="cannot be split")]
    found = int_analysis.count(records, {"m": MATH, "c": CODE})
    right, wrong = (True, True), (False, False)
    assert found["named"] == {"all": [right] * 3 + [wrong], "wrong second number": [right] * 3, "wrong constant": [wrong]}
    assert found["kept"] == {"all": [right, wrong], "wrong second number": [right], "wrong constant": [wrong]}
    rows = int_analysis.table(found).splitlines()
    assert "| named | all | 4 | 0.75 | 0.75 |" in rows and "| kept | wrong constant | 1 | 0.00 | 0.00 |" in rows
    assert "| kept | all | 0 |  |  |" in int_analysis.table(int_analysis.count([], {})).splitlines()


def test_the_command(tmp_path):
    """As a process of its own, from another folder."""
    groups = data.build_groups(data.tiny_problems("math", 3, 0), 2, 0)
    data.write_groups(tmp_path / "groups" / "train.jsonl", groups)
    flawed = groups[0]["negative_bank"][0]["reasoning"]
    made = {"problem_id": groups[0]["problem_id"], "trace": flawed, "left_out": None, "proposals": [], "chosen": None}
    data.write_atomic(tmp_path / "int" / "interventions.jsonl", json.dumps(made) + "\n")
    file = Path(int_analysis.__file__).resolve()
    done = subprocess.run([sys.executable, file, tmp_path], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "| named | all | 0 |" in done.stdout, done.stderr


@pytest.mark.parametrize("argv, names", [([], "usage"), (["--help"], "usage"), (["nowhere"], "nowhere/int/interventions.jsonl")])
def test_mistakes_are_one_line(argv, names, capsys):
    with pytest.raises(SystemExit) as stop:
        data.run_command(int_analysis.main, argv)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and names in said[0]
