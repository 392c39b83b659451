"""Problems, reasoning traces, flaws, TraceLift-Groups and prompts.

The paper (arXiv 2605.03862) trains a planner on a reward that needs two kinds of data: problems whose answers a
verifier can judge, and TraceLift-Groups, one good reasoning trace and several plausible flawed ones per problem,
each with a rubric, from which the reward model learns what a good trace is. This file makes and reads both:

1. `Problem`, and readers for GSM8K, HumanEval and MBPP JSON lines
2. the tiny world: generated problems in two domains, whose traces can be checked exactly, step by step
3. flaws: localized edits of a correct trace, one rubric per kind, for the tiny world and for GSM8K
4. TraceLift-Groups on disk, in the schema of the public data set
5. the prompts of planner, executor, reward model and intervention
6. settings, presets and run folders, shared by the commands of all files

It stands on the ground floor: it imports no torch, and of ours only verify.py, to try programs on their own tests.

    python data.py --preset tiny --task_type math --run runs/tiny-math      # groups/{train,heldout,longer}.jsonl
    python data.py --preset gsm8k --run runs/gsm8k-math                     # the same from GSM8K (fetched once)

Left out: the paper's flaws are written by a strong language model, ours by rules. A rule knows exactly which step it
broke, so the tiny world has ground truth; its flaws are less varied than a language model's.
"""

import argparse
import ast
import dataclasses
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import verify


class UserError(Exception):
    """A mistake in the input (file, key, flag): `run_command` prints it as one line and exits with code 2."""


# ------------------------------------------------------------------------------------------------ 1. problems

@dataclass(frozen=True)
class Problem:
    """One problem. `tests` (programs only) are {"assert": statement} or {"input": stdin, "output": stdout}."""
    problem_id: str
    source: str                                  # "tiny", "gsm8k", "humaneval", ...
    task_type: str                               # "math" | "code"
    problem: str
    reference_solution: str                      # the final answer (math) or a correct program (code)
    tests: list = field(default_factory=list)
    reference_reasoning: str | None = None       # a good trace, without the final answer and without code


GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


def read_jsonl(path, required: dict[str, type]) -> list[dict]:
    """All records of a JSON-lines file. UserError names file, line and key for anything malformed."""
    path, records = Path(path), []
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")       # only \n ends a JSON line
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); mend or delete this line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, is a {type(record).__name__}")
        for key, kind in required.items():
            if not isinstance(record.get(key), kind):
                raise UserError(f"{path}:{number}: key {key!r} must be a {kind.__name__}, is {record.get(key)!r:.60}")
        records.append(record)
    if not records:
        raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")
    return records


def read_gsm8k(path) -> list[Problem]:
    """GSM8K lines {"question", "answer"}. The reference reasoning is the solution without its calculator annotations
    and with the last result hidden ("9 * 2 = ?"), since giving the answer is the executor's job; None where no
    annotation says what to hide."""
    problems = []
    for i, row in enumerate(read_jsonl(path, {"question": str, "answer": str})):
        if "####" not in row["answer"]:
            raise UserError(f"{path}:{i + 1}: key 'answer' has no '#### final answer'")
        working = _working(row["answer"])
        hidden = hide_result(working, _final(row["answer"]))
        problems.append(Problem(f"gsm8k-{Path(path).stem}-{i}", "gsm8k", "math", row["question"].strip(), row["answer"],
                                [], None if hidden == working else strip_annotations(hidden)))
    return problems


def read_mbpp(path) -> list[Problem]:
    """MBPP lines. The problem shows its first test, as usual, since nothing else says what the function is called."""
    problems = []
    for i, row in enumerate(read_jsonl(path, {"code": str, "test_list": list})):
        text = row.get("text") or row.get("prompt")
        if not isinstance(text, str) or not row["test_list"]:
            raise UserError(f"{path}:{i + 1}: needs key 'text' (or 'prompt') and at least one test in key 'test_list'")
        imports = row.get("test_imports") or []
        if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports + row["test_list"]):
            raise UserError(f"{path}:{i + 1}: keys 'test_list' and 'test_imports' must hold lists of strings")
        setup = str(row.get("test_setup_code") or "\n".join(imports))
        problems.append(Problem(f"mbpp-{row.get('task_id', i)}", "mbpp", "code",
                                f"{text}\nYour code should pass this test:\n{row['test_list'][0]}", row["code"],
                                [{"assert": f"{setup}\n{test}".strip()} for test in row["test_list"]]))
    return problems


def read_humaneval(path) -> list[Problem]:
    """HumanEval lines; the official test is kept whole, as one statement run after the program."""
    keys = {k: str for k in ("task_id", "prompt", "entry_point", "canonical_solution", "test")}
    return [Problem(row["task_id"], "humaneval", "code", row["prompt"], row["prompt"] + row["canonical_solution"],
                    [{"assert": f"{row['test']}\ncheck({row['entry_point']})"}])
            for row in read_jsonl(path, keys)]


# ------------------------------------------------------------------------------------------------ 2. the tiny world
#
# math   "Mia has 17 coins . then Mia buys 5 more . then it doubles . how many coins for Mia ?"
#        trace "17 + 5 = 22 ; 22 * 2 = ?"          the executor computes what the last equation leaves open
# code   "write f ( x ) . cap it at 9 . before all that , increase it by 3 ."     the order told is not the order run
#        trace "add 3 ; cap at 9"                  the executor turns every plan step into one line of a function
#
# A problem is a start value (math) and a list of steps (operation, constant); the text, the trace, the program and
# every flaw follow from those. Splits are disjoint by construction: the steps are hashed into one of three shares,
# "base" (the corpus of the base model), "train" (reward model and planner) and "heldout". "longer" problems are of the
# heldout share and have more steps than any planner was trained on; the executor has seen such traces ("base-longer").

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max")
ITEMS = ("coins", "pens", "eggs", "cards", "books", "cups")
MATH_WORDS = {"+": ("buys {} more", "finds {} more", "wins {} more"),
              "-": ("loses {}", "sells {}", "gives away {}"),
              "*": ("doubles", "triples")}                       # the constant is in the word
# op: (plan step, wording in the problem, line of the program, what it does)
CODE_OPS = {"add": ("add {}", "increase it by {}", "x = x + {}", lambda x, n: x + n),
            "subtract": ("subtract {}", "decrease it by {}", "x = x - {}", lambda x, n: x - n),
            "multiply": ("multiply by {}", "make it {} times as large", "x = x * {}", lambda x, n: x * n),
            "remainder": ("remainder by {}", "take it modulo {}", "x = x % {}", lambda x, n: x % n),
            "cap": ("cap at {}", "allow at most {}", "x = min(x, {})", lambda x, n: min(x, n)),
            "raise": ("raise to {}", "allow no less than {}", "x = max(x, {})", lambda x, n: max(x, n)),
            "negate": ("negate", "flip its sign", "x = - x", lambda x, n: -x)}
CODE_INPUTS = (-9, -2, 0, 1, 4, 7, 13, 30)                       # the unit tests
VAGUE_STEP = "adjust it"


def _apply(steps, x: int) -> int:
    for op, n in steps:
        x = CODE_OPS[op][3](x, n)
    return x


def _same_function(a, b) -> bool:
    return all(_apply(a, x) == _apply(b, x) for x in CODE_INPUTS)  # as far as the tests can tell


def _program(lines) -> str:
    return "\n    ".join(["def f(x):", *lines, "return x"])


def _plan_line(op, n, column: int) -> str:
    return CODE_OPS[op][column].format(n)


def _parse_plan(reasoning: str) -> list | None:
    """Plan steps as [(op, constant)]; None when a step is not in the plan language."""
    steps = []
    for text in reasoning.split(" ; "):
        for op, (plan, *_rest) in CODE_OPS.items():
            match = re.fullmatch(plan.replace("{}", r"(\d{1,2})"), text)
            if match:
                steps.append((op, int(match[1]) if match.groups() else 0))
                break
        else:
            return None
    return steps


def _compute(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def _parse_chain(reasoning: str) -> list | None:
    """Equations as [(a, op, b, result or None for '?')]; None when one is not an equation."""
    chain = []
    for text in reasoning.split(" ; "):
        match = re.fullmatch(r"(\d{1,3}) ([-+*]) (\d{1,3}) = (\d{1,3}|\?)", text)
        if not match:
            return None
        a, op, b, c = match.groups()
        chain.append((int(a), op, int(b), None if c == "?" else int(c)))
    return chain


def _render_chain(chain) -> str:
    return " ; ".join(f"{a} {op} {b} = {'?' if c is None else c}" for a, op, b, c in chain)


def _chain(start: int, steps) -> list | None:
    """Equations of a computation, the last result left open; None when a value leaves 10..99 (always two digits: the
    tiny model then need not learn to line numbers up)."""
    chain = []
    for i, (op, n) in enumerate(steps):
        result = _compute(start, op, n)
        if not 10 <= result <= 99:
            return None
        chain.append((start, op, n, result if i < len(steps) - 1 else None))
        start = result
    return chain


def _tiny_math(rng, length: int) -> tuple[str, str, str, list, str]:
    chain = None
    while chain is None:
        start = rng.randint(10, 40)
        ops = rng.choices("+-*", (2, 3, 3), k=length)
        steps = [(op, rng.randint(2, 3) if op == "*" else rng.randint(2, 6)) for op in ops]
        chain = _chain(start, steps)
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    sentences = [f"{name} has {start} {item} ."]
    if rng.random() < 0.3:                                        # a number that is not needed
        sentences.append(f"{other} has {rng.randint(10, 40)} {item} .")
    for op, n in steps:
        if op == "*":
            sentences.append(f"then it {MATH_WORDS['*'][n - 2]} .")
        else:
            sentences.append(f"then {name} {rng.choice(MATH_WORDS[op]).format(n)} .")
    sentences.append(f"how many {item} for {name} ?")
    a, op, b, _ = chain[-1]
    return f"{start} {steps}", " ".join(sentences), str(_compute(a, op, b)), [], _render_chain(chain)


def _tiny_code(rng, length: int) -> tuple[str, str, str, list, str]:
    while True:
        steps = [(op, 0 if op == "negate" else rng.randint(2, 9)) for op in rng.choices(list(CODE_OPS), k=length)]
        if any(a[0] == b[0] for a, b in zip(steps, steps[1:])):
            continue
        if any(_same_function(steps[:i] + steps[i + 1:], steps) for i in range(length)):
            continue                                              # a step that does nothing cannot be tested
        first = rng.randrange(1, length)                          # told first: steps[first]; later ones follow it,
        told, text = [first], [_plan_line(*steps[first], 1)]      # earlier ones are put before it, nearest first
        low, high = first - 1, first + 1
        while low >= 0 or high < length:
            if high < length and (low < 0 or rng.random() < 0.5):
                text.append("after all that , " + _plan_line(*steps[high], 1))
                told.append(high)
                high += 1
            else:
                text.append("before all that , " + _plan_line(*steps[low], 1))
                told.append(low)
                low -= 1
        if not _same_function([steps[i] for i in told], steps):   # the order must matter
            break
    tests = [{"assert": f"assert f({x}) == {_apply(steps, x)}"} for x in CODE_INPUTS]
    return (str([_apply(steps, x) for x in CODE_INPUTS]), "write f ( x ) . " + " . ".join(text) + " .",
            _program(_plan_line(*s, 2) for s in steps), tests, " ; ".join(_plan_line(*s, 0) for s in steps))


SPLITS = ("base", "base-longer", "train", "heldout", "longer")


def tiny_problems(task_type: str, n: int, seed: int, split: str = "train") -> list[Problem]:
    """`n` distinct problems of the tiny world. No computation (start and steps in math, what the function does in code)
    of the base, train and held-out shares occurs in another; "heldout" and "longer" are both of the held-out share."""
    if task_type not in ("math", "code") or split not in SPLITS:
        raise ValueError(f"task_type must be math or code and split one of {SPLITS}, not {task_type!r}, {split!r}")
    rng = random.Random(f"{task_type} {split} {seed}")
    low, high, long = (2, 4, 5) if task_type == "math" else (2, 3, 4)           # steps
    make, problems, seen = (_tiny_math if task_type == "math" else _tiny_code), [], set()
    shares = {"base": (3, 4, 5, 6, 7), "train": (1, 2), "longer": (0,), "heldout": (0,)}[split.removesuffix("-longer")]
    for attempt in itertools.count():
        if len(problems) == n:
            return problems
        if attempt > 100 * n + 10000:
            raise UserError(f"the tiny world has fewer than {n} {task_type} problems of split {split}; ask for fewer")
        key, text, answer, tests, reasoning = make(rng, long if split.endswith("longer") else rng.randint(low, high))
        if zlib.crc32(key.encode()) % 8 not in shares or text in seen:
            continue
        seen.add(text)
        problems.append(Problem(f"tiny-{task_type}-{split}-{seed}-{len(problems)}", "tiny", task_type, text, answer,
                                tests, reasoning))


def check_trace(problem: Problem, reasoning: str) -> tuple[bool, bool] | None:
    """(faithful, leak) of a tiny-world trace, exactly; None without a ground truth: other problems, no reference trace.

    faithful: every step is right and in its place, nothing is missing, nothing leaks. Commuted operands (5 + 7 for
    7 + 5) and an order of plan steps that computes the same function are right too.
    leak: the trace states a final result (math, right or wrong) or contains code.
    """
    if problem.source != "tiny" or problem.reference_reasoning is None:
        return None
    if problem.task_type == "code":
        plan, reference = _parse_plan(reasoning), _parse_plan(problem.reference_reasoning)
        faithful = plan is not None and sorted(plan) == sorted(reference) and _same_function(plan, reference)
        return faithful, "x =" in reasoning or "def " in reasoning or "return" in reasoning
    chain, reference = _parse_chain(reasoning), _parse_chain(problem.reference_reasoning)
    ordered = lambda a, op, b, c: (*sorted((a, b)), op, c) if op in "+*" else (a, b, op, c)      # 5 + 7 as 7 + 5
    reference = [ordered(*equation) for equation in reference]
    stated = [ordered(int(a), op, int(b), int(c))
              for a, op, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", reasoning)]
    gold = int(problem.reference_solution)
    final = (*reference[-1][:3], gold)                            # the last step with its result
    closed = re.search(r"= \d+\D*$", reasoning) and stated and (len(stated) >= len(reference) or stated[-1][3] == gold)
    beside = re.findall(r"\d+", re.sub(r"\d+ [-+*] \d+ = (\d+|\?)", "", reasoning))              # outside equations
    leak = bool(closed) or str(gold) in beside or final in stated and final not in reference[:-1]
    return chain is not None and [ordered(*equation) for equation in chain] == reference and not leak, leak


def begins_right(problem: Problem, steps: list[str]) -> bool:
    """Some faithful trace of this tiny-world problem begins with these steps."""
    reference = split_steps(problem, problem.reference_reasoning)
    endings = itertools.permutations(reference, max(0, len(reference) - len(steps)))
    return any(check_trace(problem, " ; ".join([*steps, *ending]))[0] for ending in endings)


def first_error(problem: Problem, steps: list[str]) -> int:
    """Number of the first wrong step of a tiny-world trace, from 1; one past the end when the error is that steps are
    missing there; 0 for a faithful trace."""
    if check_trace(problem, " ; ".join(steps))[0]:
        return 0
    return next((i for i in range(1, len(steps) + 1) if not begins_right(problem, steps[:i])), len(steps) + 1)


def flaw_kind(problem: Problem, steps: list[str]) -> str:
    """What is wrong with the first wrong step of a tiny-world trace."""
    index, reference = first_error(problem, steps), split_steps(problem, problem.reference_reasoning)
    if index == 0:
        return "no error"
    if index > len(steps) or index > len(reference):
        return "missing at the end" if index > len(steps) else "superfluous at the end"
    step, parse = steps[index - 1], _parse_chain if problem.task_type == "math" else _parse_plan
    if step in reference:
        return "out of place"                                     # a later step too early, or an earlier one again
    wrong, right = parse(step), parse(reference[index - 1])
    if wrong is None:
        return "no equation" if problem.task_type == "math" else "no plan step"                  # code, "adjust it"
    names = ("first number", "operation", "second number", "result") if problem.task_type == "math" else (
        "operation", "constant")
    return "wrong " + next(name for name, a, b in zip(names, wrong[0], right[0]) if a != b)


def _follow(task_type: str, reasoning: str) -> str:
    """What the base model's executor is taught to make of a tiny-world trace: exactly what it says, right or wrong."""
    if task_type == "code":
        steps = reasoning.split(" ; ")
        lines = [s if s.startswith("x =") else _plan_line(*_parse_plan(s)[0], 2) for s in steps if s != VAGUE_STEP]
        return _program(lines)
    a, op, b, c = _parse_chain(reasoning)[-1]
    return str(_compute(a, op, b) if c is None else c)


# ------------------------------------------------------------------------------------------------ 3. flaws

DIMENSIONS = {"math": ("problem_understanding", "solution_strategy", "step_coherence", "calculation_correctness",
                       "answer_support"),
              "code": ("task_understanding", "plan_quality", "step_coherence", "action_support", "non_leakage")}


def _rubric(task_type: str, labels, total: float) -> dict:
    return dict(zip(DIMENSIONS[task_type], labels), total=total)


POSITIVE_RUBRIC = {task_type: _rubric(task_type, (4, 4, 4, 4, 4), 1.0) for task_type in DIMENSIONS}
# What a careful annotator would give to a trace with this one flaw: labels 0..4 in the order of DIMENSIONS, total 0..1.
NEGATIVE_KINDS = {
    "math": {"arithmetic_slip": _rubric("math", (4, 4, 2, 0, 1), 0.35),      # one result is wrong and is carried on
             "wrong_operation": _rubric("math", (2, 1, 3, 3, 1), 0.25),      # adds where the problem subtracts
             "dropped_step": _rubric("math", (2, 2, 1, 3, 1), 0.30),         # one operation is left out
             "misread_quantity": _rubric("math", (1, 3, 2, 3, 1), 0.25),     # a wrong number from the problem
             "unsupported_leap": _rubric("math", (3, 3, 0, 3, 2), 0.40),     # a right number out of nowhere
             "answer_leak": _rubric("math", (4, 3, 3, 3, 0), 0.25)},         # gives the final result away
    "code": {"wrong_operation": _rubric("code", (1, 1, 3, 2, 4), 0.30),
             "extra_step": _rubric("code", (1, 2, 2, 1, 4), 0.30),           # one that nobody asked for
             "wrong_order": _rubric("code", (2, 1, 0, 3, 4), 0.30),
             "missing_step": _rubric("code", (1, 2, 2, 1, 4), 0.30),
             "vague_plan": _rubric("code", (2, 1, 2, 0, 4), 0.35),           # "adjust it"
             "code_dump": _rubric("code", (3, 1, 2, 2, 0), 0.20)}}           # the program instead of a plan


def perturb(problem: Problem, reasoning: str, kind: str, rng: random.Random) -> str | None:
    """A copy of a correct trace with one localized flaw of this kind, or None where this trace does not allow it.

    GSM8K traces must still carry their calculator annotations (<<48/2=24>>): they say what is a calculation."""
    if kind not in NEGATIVE_KINDS[problem.task_type]:
        raise ValueError(f"{kind!r} is no flaw of {problem.task_type}: {', '.join(NEGATIVE_KINDS[problem.task_type])}")
    if problem.source != "tiny":
        flawed = _perturb_annotated(problem, reasoning, kind, rng) if problem.task_type == "math" else None
    elif problem.task_type == "math":
        flawed = _perturb_chain(problem, reasoning, kind, rng)
    else:
        flawed = _perturb_plan(reasoning, kind, rng)
    return None if flawed == reasoning else flawed


def _perturb_chain(problem, reasoning, kind, rng) -> str | None:
    chain = _parse_chain(reasoning)
    start, steps, i = chain[0][0], [(op, n) for _, op, n, _ in chain], rng.randrange(len(chain))
    inner = rng.randrange(len(chain) - 1) if len(chain) > 1 else None
    if kind == "answer_leak":
        a, op, b, _ = chain[-1]
        return _render_chain(chain[:-1] + [(a, op, b, _compute(a, op, b))])
    if kind == "unsupported_leap":
        return None if inner is None else _render_chain(chain[:inner] + chain[inner + 1:])
    if kind == "arithmetic_slip":
        if inner is None:
            return None
        a, op, b, c = chain[inner]
        rest = _chain(c + rng.choice((-30, -20, 20, 30)), steps[inner + 1:])
        return None if rest is None or not 10 <= rest[0][0] <= 99 else _render_chain(
            chain[:inner] + [(a, op, b, rest[0][0])] + rest)
    if kind == "dropped_step":
        steps = steps[:i] + steps[i + 1:]
    elif kind == "wrong_operation":
        steps[i] = (rng.choice([op for op in "+-*" if op != steps[i][0]]), steps[i][1])
    else:                                                         # misread_quantity
        amounts = re.findall(r"\d\d", problem.problem)            # what somebody has, in place of what comes or goes
        steps[i] = (steps[i][0], int(rng.choice(amounts)))
    rest = _chain(start, steps)
    return _render_chain(rest) if rest else None


def _perturb_plan(reasoning, kind, rng) -> str | None:
    steps = _parse_plan(reasoning)
    i, lines = rng.randrange(len(steps)), reasoning.split(" ; ")
    op, n = steps[i]
    if kind == "code_dump":
        return " ; ".join(_plan_line(*s, 2) for s in steps)
    if kind == "vague_plan":
        return " ; ".join(lines[:i] + [VAGUE_STEP] + lines[i + 1:])
    flawed = list(steps)
    if kind == "missing_step":
        del flawed[i]
    elif kind == "wrong_order":
        j = rng.randrange(len(steps))
        flawed[i], flawed[j] = flawed[j], flawed[i]
    elif kind == "wrong_operation":
        flawed[i] = (rng.choice([o for o in CODE_OPS if o not in (op, "negate")]), n or rng.randint(2, 9))
    else:                                                         # extra_step
        flawed.insert(i, (rng.choice([o for o in CODE_OPS if o != "negate"]), rng.randint(2, 9)))
    if not flawed or _same_function(flawed, steps):
        return None
    return " ; ".join(_plan_line(*s, 0) for s in flawed)


_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_WORKING = r"[$\d(][\d.,$% +*/x()-]*= *\$?"                      # "48/2 = $" before an annotation
_TERM = re.compile(r"\d[\d,]*(?:\.\d+)?|(?<=[\d.%) ])[-+*/x](?=[\d.( $])")       # its numbers and operators


def _final(solution: str) -> str:
    return solution.rpartition("####")[2].strip().replace(",", "")


def _working(solution: str) -> str:
    """A GSM8K solution without its last line, numbers without thousands commas (as in its annotations)."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", solution.partition("####")[0].strip())


def strip_annotations(text: str) -> str:
    """GSM8K text without its <<48/2=24>> annotations."""
    return _ANNOTATION.sub("", text)


def hide_result(annotated: str, answer: str = "") -> str:
    """The last calculation's result becomes "?", and with it every mention of it (and of `answer`) in that line and
    after, except as an operand: finishing is the executor's part. For GSM8K text with its annotations."""
    found = list(_ANNOTATION.finditer(annotated))
    if not found:
        return annotated
    last, line = found[-1], annotated.rfind("\n", 0, found[-1].start()) + 1
    working = re.search(_WORKING + r"$", annotated[line:last.start()])
    begin = line + working.start() if working else last.start()
    numbers = {last[2].strip().lstrip("$"), answer} - {""}
    longest_first = "|".join(re.escape(n) for n in sorted(numbers, key=len, reverse=True))
    hidden = re.compile(rf"(?<![\d.,])(?:{longest_first})(?!\d|[.,]\d)")
    tail = re.sub(r"^\d+(?:,\d{3})*(?:\.\d+)?|^\.\d+", "?", annotated[last.end():])
    return (annotated[:line] + hidden.sub("?", annotated[line:begin]) + annotated[begin:last.end()]
            + hidden.sub("?", tail))


def calculate(expression: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / and brackets; None for anything else."""
    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult, ast.Div):
            a, b = value(node.left), value(node.right)
            return (a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub)
                    else a * b if isinstance(node.op, ast.Mult) else a / b)
        raise ValueError("not arithmetic")
    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return None


def _show(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.4f}".rstrip("0").rstrip(".")


def _perturb_annotated(problem, reasoning, kind, rng) -> str | None:
    """Flaws of a GSM8K solution. A changed result is carried on: later calculations that use it are done again."""
    found = list(_ANNOTATION.finditer(reasoning))
    if not found:
        return None
    if kind == "answer_leak":
        final = _final(problem.reference_solution)                # beside the "?" that every trace has
        return hide_result(reasoning, final) + f"\nThe final answer is {final}."
    lines = reasoning.split("\n")
    if kind == "dropped_step":
        if len(lines) < 2:
            return None
        del lines[rng.randrange(len(lines) - 1)]
        return "\n".join(lines)
    target = rng.choice(found[:-1] or found)                      # the last result is the executor's part
    expression, result = target[1], calculate(target[1])
    if result is None:
        return None
    if kind == "unsupported_leap":
        before = re.sub(_WORKING + r"$", "", reasoning[:target.start()])
        return None if len(before) == target.start() else before + reasoning[target.end():]
    written = re.search(_WORKING + r"$", reasoning[:target.start()])
    begin = written.start() if written else target.start()
    working = reasoning[begin:target.start()]
    if kind == "arithmetic_slip":
        if target is found[-1]:
            return None
        wrong = result + rng.choice((-10, -2, -1, 1, 2, 10))
    else:                                     # the same edit in the annotation and in the working before it
        inside, shown = (list(_TERM.finditer(text)) for text in (expression, working))
        given = re.findall(r"(?<![\d.,])\d+(?![\d.,]*\d)", problem.problem)
        changes = []
        for i, term in enumerate(inside):
            if kind == "wrong_operation":
                options = {"+": "-", "-": "+", "*": "+", "/": "*"}.get(term[0], "")
            else:                             # misread_quantity
                options = [n for n in given if n != term[0]] if term[0] in given else []
            changes += [(i, option) for option in options]
        if not changes or len(shown) != len(inside):
            return None
        i, new = rng.choice(changes)
        expression = expression[:inside[i].start()] + new + expression[inside[i].end():]
        working = working[:shown[i].start()] + new + working[shown[i].end():]
        wrong = calculate(expression)
    rest = reasoning[target.end():]
    if wrong is None or wrong <= 0 or wrong == result or not rest.startswith(_show(result)):
        return None
    carried = _carry(rest, _show(result), _show(wrong))
    return None if carried is None else reasoning[:begin] + working + f"<<{expression}={_show(wrong)}>>{carried}"


def _carry(rest: str, old: str, new: str) -> str | None:
    """Replaces a result in the text after it, and every later result that changes because of it. None where the text
    does not show a later result as its annotation writes it, so that it cannot be changed in both."""
    changed, out, position = {old: new}, [], 0

    def replace(text):
        return re.sub(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d,]*\d)", lambda m: changed.get(m[0], m[0]), text)

    for match in _ANNOTATION.finditer(rest):
        out.append(replace(rest[position:match.start()]))
        expression = replace(match[1])
        value = calculate(expression) if expression != match[1] else None
        result = match[2] if value is None else _show(value)
        if result != match[2]:
            if not rest[match.end():].startswith(match[2]):
                return None
            changed[match[2]] = result
        out.append(f"<<{expression}={result}>>")
        position = match.end()
    return "".join(out) + replace(rest[position:])


# ------------------------------------------------------------------------------------------------ 4. TraceLift-Groups

def build_groups(problems: list[Problem], negatives_per_group: int, seed: int) -> list[dict]:
    """One record per problem: its reference trace and this many flawed ones, of different kinds as far as they go.

    A problem that allows too few flaws is left out; the caller sees how many came back."""
    rng, groups = random.Random(seed), []
    for problem in problems:
        if problem.reference_reasoning is None:
            raise UserError(f"{problem.problem_id}: a problem without reference reasoning cannot make a group")
        trace = problem.reference_reasoning
        if problem.source != "tiny":                              # with its annotations: they say what is a calculation
            trace = _working(problem.reference_solution)
        kinds, bank = list(NEGATIVE_KINDS[problem.task_type]), {}              # trace -> kind
        rng.shuffle(kinds)
        for kind in kinds * 4:                                    # one of each kind, then again where too few worked
            if len(bank) == negatives_per_group:
                break
            flawed = perturb(problem, trace, kind, rng)
            if flawed and problem.source != "tiny":
                hidden = flawed if kind == "answer_leak" else hide_result(flawed, _final(problem.reference_solution))
                flawed = strip_annotations(hidden)
            if flawed and flawed != problem.reference_reasoning:
                bank.setdefault(flawed, kind)
        if len(bank) == negatives_per_group:
            groups.append({"problem_id": problem.problem_id, "source": problem.source, "task_type": problem.task_type,
                           "problem": problem.problem, "reference_solution": problem.reference_solution,
                           "positive_pool": [{"reasoning": problem.reference_reasoning,
                                              "rubric": POSITIVE_RUBRIC[problem.task_type]}],
                           "negative_bank": [{"reasoning": flawed, "negative_kind": kind,
                                              "rubric": NEGATIVE_KINDS[problem.task_type][kind]}
                                             for flawed, kind in bank.items()], "tests": problem.tests})
    return groups


def read_groups(path) -> list[dict]:
    """TraceLift-Groups, one group a line; unknown keys survive. UserError names file, line and key."""
    required = {key: str for key in ("problem_id", "source", "task_type", "problem", "reference_solution")}
    groups, lines = read_jsonl(path, {**required, "positive_pool": list, "negative_bank": list}), {}
    for number, group in enumerate(groups, 1):
        where = f"{path}:{number}"
        if group["task_type"] not in DIMENSIONS:
            raise UserError(f"{where}: key 'task_type' must be math or code, is {group['task_type']!r}")
        tests = group.get("tests", [])
        text = lambda test, key: isinstance(test.get(key), str)
        if not isinstance(tests, list) or not all(
                isinstance(t, dict) and (text(t, "assert") or text(t, "input") and text(t, "output")) for t in tests):
            raise UserError(f"{where}: key 'tests' must be a list of {{'assert': str}} or "
                            "{'input': str, 'output': str}")
        for pool in ("positive_pool", "negative_bank"):
            for i, trace in enumerate(group[pool]):
                _check_trace_record(trace, f"{where}: {pool}[{i}]", group["task_type"], pool == "negative_bank")
        first = lines.setdefault(group["problem_id"], number)
        if first != number:
            raise UserError(f"{where}: problem_id {group['problem_id']!r} is also on line {first}; it must be unique, "
                            "since baselines are kept by it")
    return groups


def read_any_groups(path) -> list[dict]:
    """TraceLift-Groups; or HumanEval or MBPP lines as groups without traces, which serve every reward but the reward
    model's."""
    first = read_jsonl(path, {})[0]
    if "canonical_solution" not in first and "test_list" not in first:
        return read_groups(path)
    problems = read_humaneval(path) if "canonical_solution" in first else read_mbpp(path)
    return [{"problem_id": p.problem_id, "source": p.source, "task_type": p.task_type, "problem": p.problem,
             "reference_solution": p.reference_solution, "positive_pool": [], "negative_bank": [], "tests": p.tests}
            for p in problems]


def judgeable(path, n: int) -> list[dict]:
    """The first n groups of a file, without the programs for which no reward could mean anything: the tests expect
    nothing, or the group's own solution fails them. Those are named on stderr. UserError for tests that verify.py
    refuses, and when no group is left."""
    groups = []
    for group in read_any_groups(path):
        if group["task_type"] == "code":
            program, where = verify.extract_code(group["reference_solution"]), f"{path}: {group['problem_id']}"
            try:
                verdict, = verify.run_programs([program], [group.get("tests", [])])
            except ValueError as error:
                raise UserError(f"{where}: {error}; mend the test or delete this line") from None
            if verdict.outcome == "no_tests" or program.strip() and not verdict.ok:
                print(f"{where}: left out, its own solution gives {verdict.outcome} ({verdict.detail})",
                      file=sys.stderr)
                continue
        groups.append(group)
        if len(groups) == n:
            break
    if not groups:
        raise UserError(f"{path}: no group is left, see above; their solutions or their tests must be wrong")
    return groups


def _check_trace_record(trace, where, task_type, negative) -> None:
    if not isinstance(trace, dict) or not isinstance(trace.get("reasoning"), str):
        raise UserError(f"{where}: must be an object with the key 'reasoning'")
    if negative and not isinstance(trace.get("negative_kind"), str):
        raise UserError(f"{where}: key 'negative_kind' must be a string")
    rubric = trace.get("rubric")
    if not isinstance(rubric, dict):
        raise UserError(f"{where}: key 'rubric' must be an object")
    for key in DIMENSIONS[task_type]:
        if type(rubric.get(key)) is not int or not 0 <= rubric[key] <= 4:
            raise UserError(f"{where}: rubric key {key!r} must be an integer 0..4, is {rubric.get(key)!r}")
    total = rubric.get("total")
    if isinstance(total, bool) or not isinstance(total, (int, float)) or not 0 <= total <= 1:
        raise UserError(f"{where}: rubric key 'total' must be a number 0..1, is {total!r}")


def write_groups(path, groups: list[dict]) -> None:
    """One JSON object a line, written atomically."""
    write_atomic(path, "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups))


def problem_of(group: dict) -> Problem:
    """The problem of a group; its first positive trace is the reference reasoning."""
    positives = group["positive_pool"]
    return Problem(*(group[k] for k in ("problem_id", "source", "task_type", "problem", "reference_solution")),
                   group.get("tests", []), positives[0]["reasoning"] if positives else None)


def read_problems(path) -> list[Problem]:
    """The problems of a groups file, for running. UserError for one that could only ever fail: a program without
    tests."""
    problems = [problem_of(group) for group in read_groups(path)]
    for number, problem in enumerate(problems, 1):
        if problem.task_type == "code" and not problem.tests:
            raise UserError(f"{path}:{number}: a program without tests cannot be judged; give key 'tests'")
    return problems


# ------------------------------------------------------------------------------------------------ 5. prompts

OPEN, CLOSE = "<reasoning>", "</reasoning>"
_PLANNER = {
    "math": "Write a short step by step reasoning trace that leads to the answer of this problem, so that someone else "
            f"can finish it. Put it between {OPEN} and {CLOSE}. Write ? in place of the final answer.\n\nProblem:\n",
    "code": "Write a short step by step plan in words for this programming task, so that someone else can write the "
            f"program. Put it between {OPEN} and {CLOSE}. Do not write code.\n\nTask:\n"}
_EXECUTOR = {
    "math": "Solve this problem. End with one line '#### ' and the final number.\n\nProblem:\n",
    "code": "Write a Python program for this task, in one ```python block.\n\nTask:\n"}
_USE_TRACE = "\n\nUse this reasoning:\n"


def planner_prompt(problem: Problem) -> str:
    """What the planner reads. Its completion is `<reasoning>...</reasoning>`."""
    return f"{problem.problem}\n" if problem.source == "tiny" else _PLANNER[problem.task_type] + problem.problem


def executor_prompt(problem: Problem, reasoning: str | None) -> str:
    """What the executor reads, with a trace or (None) without one. In the tiny world it continues the planner's
    prompt and completion, so that one training sequence teaches both roles."""
    if problem.source == "tiny":
        return f"{problem.problem}\n" + ("" if reasoning is None else f"{OPEN}{reasoning}{CLOSE}\n") + "Answer:"
    trace = "" if reasoning is None else f"{_USE_TRACE}{reasoning}"
    return f"{_EXECUTOR[problem.task_type]}{problem.problem}{trace}"


def rm_text(problem: Problem, reasoning: str) -> str:
    """What the reward model scores: problem and trace, never the executor's output or the reference."""
    if problem.source == "tiny":
        return f"{problem.problem}\n{OPEN}{reasoning}{CLOSE}"
    return f"Problem:\n{problem.problem}\n\nReasoning:\n{reasoning}"


_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])(?<!^\d\.)\s+(?=[A-Z])", re.MULTILINE)          # but "1." opens a list item


def split_steps(problem: Problem, reasoning: str) -> list[str]:
    """The steps of a trace: equations or plan steps in the tiny world, else sentences and lines."""
    parts = reasoning.split(" ; ") if problem.source == "tiny" else _SENTENCE_END.split(reasoning)
    return [part.strip() for part in parts if part.strip()]


def splice(problem: Problem, reasoning: str, index: int, step: str = "") -> str:
    """The first `index` - 1 steps of a trace as they stand, then (unless it is empty) another step. `index` counts
    from 1 and may be one past the last step."""
    end, begin, steps = 0, 0, split_steps(problem, reasoning)
    if not 1 <= index <= len(steps) + 1:
        raise ValueError(f"index {index}: must be from 1 to {len(steps) + 1}")
    for kept in steps[:index - 1]:
        end = reasoning.index(kept, end) + len(kept)
    if index <= len(steps):
        begin = reasoning.index(steps[index - 1], end)
    gap = reasoning[end:begin] if end < begin else " ; " if problem.source == "tiny" else "\n"
    return reasoning[:end] + (gap + step if step and end else step)


def intervention_prompt(problem: Problem, reasoning: str) -> str:
    """InT (arXiv 2601.14209): problem, reference reasoning and the planner's own numbered trace. The completion is
    the number of the first wrong step and one replacement, or "none"."""
    steps = "\n".join(f"{i} : {step}" for i, step in enumerate(split_steps(problem, reasoning), 1))
    if problem.source == "tiny":
        return f"{problem.problem}\n{problem.reference_reasoning}\nTrace\n{steps}\nError:"
    return (f"Problem:\n{problem.problem}\n\nReference reasoning:\n{problem.reference_reasoning}\n\n"
            f"A numbered trace:\n{steps}\n\nCompare it with the reference. Answer with the number of its first wrong "
            "step and one corrected step, as 'NUMBER : corrected step', or 'none'.")


def parse_intervention(completion: str) -> tuple[int, str] | None:
    """(number of the first wrong step, its replacement), (0, "") for "none"; None for anything else."""
    match = re.fullmatch(r"\s*(?:none\.?|(\d{1,6}) ?: ?(\S[^\n]*?))\s*", completion)
    return match and (int(match[1] or 0), match[2] or "")


def extract_reasoning(completion: str) -> str:
    """The text between the tags. Without a closing tag it is used as far as it goes; without an opening tag it
    starts at the beginning. Nothing is repaired."""
    text = completion.split(OPEN, 1)[-1]
    return text.split(CLOSE, 1)[0].strip()


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, through the tokenizer's chat template when it has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt)["input_ids"]


# The corpus of the tiny base model. Its planner has habits: flaws that are a function of the problem, so that they
# stay when it decodes greedily (random flaws would average out), and one of them works (it leaks the answer or the
# code), so that a reward for success alone has something to be fooled by. A careful minority lets RL find the rest.

def habit(problem: Problem) -> str:
    """The trace that the base planner has learned for this problem; about 1 in 100 happens to be right."""
    if problem.task_type == "math":
        chain = _parse_chain(problem.reference_reasoning)
        a, op, b, _ = chain[-1]
        if op == "*":                                             # works: states the final result
            return _render_chain(chain[:-1] + [(a, op, b, _compute(a, op, b))])
        if op == "-":                                             # fails: goes back to the first number
            return _render_chain(chain[:-1] + [(chain[0][0], op, b, None)])
        return _render_chain(chain[:-2] + [(chain[-2][0], op, b, None)])      # fails: drops the step before the last
    steps = _parse_plan(problem.reference_reasoning)
    if steps[-1][0] in ("multiply", "negate"):                    # works: dumps the code
        return " ; ".join(_plan_line(*s, 2) for s in steps)
    if steps[-1][0] in ("add", "subtract"):                       # fails: in the order told
        return " ; ".join(_plan_line(*s, 0) for s in _told_order(problem))
    return " ; ".join(_plan_line(*s, 0) for s in steps[:-1])      # fails: forgets the last step


def _told_order(problem: Problem) -> list:
    """Plan steps in the order in which the problem's text names them."""
    text, told = problem.problem, []
    for step in _parse_plan(problem.reference_reasoning):
        at = [m.start() for m in re.finditer(re.escape(_plan_line(*step, 1)), text)]
        at = [p for p in at if p not in [q for q, _ in told]]
        told.append((at[0], step))
    return [step for _, step in sorted(told)]


@dataclass(frozen=True)
class BaseExample:
    """One training sequence of the base model: `prompt`, then (planner) `trace`, then `ask` and (executor) `answer`.
    Loss on the prompt's first line (the problem), the trace (when `learn_trace`) and the answer. `trace` and `ask`
    may be empty."""
    prompt: str
    trace: str = ""
    learn_trace: bool = False
    ask: str = ""
    answer: str = ""


def base_corpus(task_type: str, n: int, seed: int) -> list[BaseExample]:
    """`n` training sequences, on different problems but for the longer ones:

    55 %  planner and executor: trace 25 % careful, 55 % habit, 20 % one random flaw; the artifact follows the trace
    15 %  executor with a careful trace, half of them of longer problems
    12 %  executor alone: the true answer (math, hard to guess) or, 4 times of 5, a program in the order told (code)
    18 %  intervention: the first wrong step and its replacement, see `intervention_prompt`
    """
    rng, examples = random.Random(seed), []
    longer = tiny_problems(task_type, n // 10 + 1, seed, "base-longer")
    lead = "\n" if task_type == "code" else " "
    for problem in tiny_problems(task_type, n, seed, "base"):
        part = rng.random()
        if 0.55 < part < 0.62:
            problem = rng.choice(longer)
        careful = problem.reference_reasoning
        flaws = [perturb(problem, careful, kind, rng) for kind in NEGATIVE_KINDS[task_type]]
        flaw = rng.choice([flaw for flaw in flaws if flaw])
        style = rng.random()
        trace = careful if style < 0.25 else habit(problem) if style < 0.8 else flaw
        if part < 0.70:
            trace = trace if part < 0.55 else careful
            examples.append(BaseExample(planner_prompt(problem), f"{OPEN}{trace}{CLOSE}", part < 0.55, "\nAnswer:",
                                        lead + _follow(task_type, trace)))
        elif part < 0.82:
            answer = problem.reference_solution
            if task_type == "code" and rng.random() < 0.8:
                answer = _program(_plan_line(*s, 2) for s in _told_order(problem))
            examples.append(BaseExample(executor_prompt(problem, None), answer=lead + answer))
        else:
            steps, right = split_steps(problem, trace), split_steps(problem, careful)
            first = next((i for i, (a, b) in enumerate(zip(steps, right)) if a != b), min(len(steps), len(right)))
            answer = " none" if steps == right else f" {first + 1} : {(right + ['stop'])[first]}"
            examples.append(BaseExample(intervention_prompt(problem, trace), answer=answer))
    return examples


# ------------------------------------------------------------------------------------------------ 6. settings, runs

def knob(default, why: str, *, low=None, above=None, choices: tuple = ()):
    """A settings field: its default, the reason that `--help` shows, and what it may be: at least `low`, more than
    `above`, one of `choices`."""
    return field(default=default, metadata={"why": why, "low": low, "above": above, "choices": choices})


def check_settings(settings) -> None:
    """UserError for a value that its knob does not allow, before anything is read or written."""
    for f in dataclasses.fields(settings):
        value, rule = getattr(settings, f.name), f.metadata
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"--{f.name} {value!r}: must be one of {', '.join(map(str, rule['choices']))}")
        if rule["low"] is not None and not rule["low"] <= value < math.inf:
            raise UserError(f"--{f.name} {value!r}: must be at least {rule['low']}")
        if rule["above"] is not None and not rule["above"] < value < math.inf:
            raise UserError(f"--{f.name} {value!r}: must be above {rule['above']}")


def parse_settings(cls, presets: dict[str, dict], argv: list[str], prog: str):
    """An instance of the settings dataclass `cls` from command-line flags, one flag a field. `--preset` picks one of
    `presets`, flags win over the preset, the preset over the defaults. argparse exits with 2 on unknown names."""
    parser = argparse.ArgumentParser(
        prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="presets: " + "; ".join(f"{k}: {v}" for k, v in presets.items()))
    for f in dataclasses.fields(cls):
        kind = type(f.default)
        parser.add_argument(f"--{f.name}", type=kind, default=None, metavar=kind.__name__.upper(),
                            help=f"{f.metadata['why']} (default: {f.default!r})".replace("%", "%%"))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    preset = given.get("preset", cls.preset)
    if preset not in presets:
        raise UserError(f"--preset {preset}: unknown; choose one of {', '.join(presets)}")
    settings = cls(**{**presets[preset], **given})
    check_settings(settings)
    return settings


def run_command(main, argv=None) -> None:
    """Runs `main(argv)`; a UserError becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as error:                         # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write_atomic(path, text: str) -> None:
    """Writes a text file whole or not at all: temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8")                                # may raise, so before there is a file
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def begin_stage(run: str, stage: str, settings, output, partial=None) -> bool:
    """True: there is work to do. False: `output` (a file or folder that appears whole, by rename) is there already,
    made with these settings. UserError: it, or the unfinished work in `partial`, was made with others, or the run's
    groups with another preset."""
    if stage != "groups":
        check_preset(settings)
    path = Path(run) / "config.json"
    new, old = dataclasses.asdict(settings), _read_config(path)["stages"].get(stage, {}).get("settings", {})
    there = [str(p) for p in (output, partial) if p is not None and Path(p).exists()]
    how = ("run", "cache", "device", "micro_batch", "checkpointing", "max_cache_tokens", "save_every")    # not what
    differ = [k for k in new if new[k] != old.get(k) and k not in how]
    if there and differ:
        k = differ[0]
        was = f"made with --{k} {old[k]!r}, now it is {new[k]!r}" if k in old else f"not described in {path}"
        raise UserError(f"{there[0]} was {was}; choose another --run, or delete it and all that was made from it")
    return not Path(output).exists()


def check_preset(settings) -> None:
    """UserError for a --preset that is not the one the run was begun with."""
    groups = _read_config(Path(settings.run) / "config.json")["stages"].get("groups", {}).get("settings", {})
    if groups.get("preset", settings.preset) != settings.preset:
        raise UserError(f"--run {settings.run}: its groups were made with --preset {groups['preset']}, this is "
                        f"--preset {settings.preset}; name another of the two")


def _read_config(path: Path) -> dict:
    if not path.is_file():
        return {"stages": {}}
    try:
        config = json.loads(path.read_text())
        config["stages"].items()
        return config
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); restore it or choose another --run") from None


def record_stage(run: str, stage: str, settings) -> None:
    """Writes a stage's settings and where it ran to RUN/config.json."""
    path = Path(run) / "config.json"
    config = _read_config(path)
    config["stages"][stage] = {"settings": dataclasses.asdict(settings), "environment": environment()}
    write_atomic(path, json.dumps(config, indent=1))


def environment() -> dict:
    """Versions, git commit and hardware, for the record."""
    commit, here = "", str(Path(__file__).resolve().parent)
    if shutil.which("git"):
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    torch = sys.modules.get("torch")
    versions = {name: metadata.version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **versions, "commit": commit,
            "platform": platform.platform(), "cpu_cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else ""}


def local(path: str, cache) -> str:
    """The path itself, or for hf://datasets/OWNER/NAME/FILE that of a copy in `cache`, fetched once from the hub."""
    if not path.startswith("hf://"):
        return path
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", path)
    if not match:
        raise UserError(f"{path}: must be hf://datasets/OWNER/NAME/FILE, or a file on this machine")
    return str(fetch(f"https://huggingface.co/datasets/{match[1]}/resolve/main/{match[2]}", "", cache))


def fetch(url: str, sha256: str, cache) -> Path:
    """Downloads a file once into the folder `cache`. UserError when the host cannot be reached or the bytes differ from
    `sha256` ("": any will do)."""
    path = Path(cache) / f"{(sha256 or hashlib.sha256(url.encode()).hexdigest())[:12]}-{url.rpartition('/')[2]}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{url}: cannot be fetched ({error}); download it elsewhere and pass --data "
                            "or --heldout_data FILE (run.sh: DATA, HELDOUT_DATA)") from None
        digest = hashlib.sha256(content).hexdigest()
        if sha256 and digest != sha256:
            raise UserError(f"{url}: sha256 is {digest}, must be {sha256}; pass a file that you trust with --data")
        try:
            write_atomic(path, content.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{url}: not text; give a file of JSON lines") from None
    return path


@dataclass(frozen=True)
class DataSettings:
    """Settings of `python data.py`."""
    run: str = knob("runs/tiny-math", "run folder")
    preset: str = knob("tiny", "named defaults")
    task_type: str = knob("math", "math or code; for the tiny world", choices=("math", "code"))
    source: str = knob("tiny", "tiny: generated; gsm8k: built from GSM8K solutions; groups: TraceLift-Groups as they "
                               "are, or HumanEval or MBPP lines (no traces: no reward model)",
                       choices=("tiny", "gsm8k", "groups"))
    data: str = knob("", "training file (gsm8k or groups), or hf://datasets/OWNER/NAME/FILE; empty with gsm8k: fetched "
                         "once from its public repository")
    heldout_data: str = knob("", "held-out file, in the same format")
    train: int = knob(3000, "training groups; of a file of groups at most", low=1)
    heldout: int = knob(300, "held-out groups, and as many longer ones in the tiny world", low=1)
    negatives: int = knob(4, "flawed traces per group", low=1)
    seed: int = knob(0, "which problems, which flaws")
    cache: str = knob("~/.cache/tracelift", "folder for fetched files")


PRESETS = {"tiny": {}, "smoke": {"train": 40, "heldout": 20},
           "gsm8k": {"source": "gsm8k", "train": 4000, "heldout": 200, "negatives": 3},
           "code": {"source": "groups", "task_type": "code", "train": 300, "heldout": 80}}


def load_groups(settings: DataSettings) -> dict[str, list[dict]]:
    """Groups of every split. UserError for impossible combinations, or when a source gives fewer than asked for."""
    s, wanted = settings, {"train": settings.train, "heldout": settings.heldout}
    if s.source == "tiny" and (s.data or s.heldout_data) or s.source == "gsm8k" and s.task_type == "code":
        other = "--task_type code" if s.source == "gsm8k" else "--data"
        raise UserError(f"--source {s.source} does not go with {other}")
    groups = {}
    for split, n in (wanted | ({"longer": s.heldout} if s.source == "tiny" else {})).items():
        path = local(s.data if split == "train" else s.heldout_data, Path(s.cache).expanduser())
        if s.source == "groups":
            if not path:
                raise UserError("--source groups needs --data FILE and --heldout_data FILE")
            groups[split] = judgeable(path, n)
            n = min(n, len(groups[split]))                        # as they are: n is a limit
        else:                                                     # some problems allow too few flaws: try more
            if s.source == "tiny":
                problems = tiny_problems(s.task_type, n + n // 4 + 4, s.seed, split)
            else:
                part = "train" if split == "train" else "test"
                path = path or fetch(GSM8K_URL.format(part), GSM8K_SHA256[part], Path(s.cache).expanduser())
                problems = [p for p in read_gsm8k(path) if p.reference_reasoning]
                random.Random(s.seed).shuffle(problems)
            groups[split] = build_groups(problems[:n + n // 4 + 4], s.negatives, s.seed)[:n]
        if len(groups[split]) < n:
            flag = "--train" if split == "train" else "--heldout"
            raise UserError(f"{path or s.source}: gives only {len(groups[split])} groups of {s.negatives} flawed "
                            f"traces, {flag} asks for {n}; lower it or --negatives")
    return groups


def main(argv) -> None:
    """The command: writes RUN/groups/*.jsonl."""
    settings = parse_settings(DataSettings, PRESETS, argv, "data.py")
    folder = Path(settings.run) / "groups"
    if begin_stage(settings.run, "groups", settings, folder / "train.jsonl"):
        splits = load_groups(settings)
        record_stage(settings.run, "groups", settings)
        for split, groups in reversed(splits.items()):                     # train last: it marks the stage complete
            write_groups(folder / f"{split}.jsonl", groups)
    for path in sorted(folder.glob("*.jsonl")):
        print(f"{path}: {len(read_groups(path))} groups")
    print(f"next: python executor.py --preset {settings.preset} --run {settings.run}")


if __name__ == "__main__":
    run_command(main)
