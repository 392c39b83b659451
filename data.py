"""Problems, prompts, reasoning traces with known flaws, and TraceLift-Groups.

The paper (arXiv 2605.03862) trains a planner on a reward that needs two kinds of data: problems whose answers a
verifier can judge, and TraceLift-Groups. A group is one problem with a good reasoning trace and several plausible
flawed ones, each with a rubric. The reward model learns from groups what a good trace is. This file makes and reads
both.

1. `Problem`, and what planner, executor and reward model read of it (read this part first)
2. steps of a trace (InT), flaws and rubrics
3. files: TraceLift-Groups, GSM8K, MBPP, HumanEval
4. the tiny world: generated problems in two domains, whose traces can be checked exactly, step by step
5. GSM8K: its calculations and its flaws
6. settings, stage folders, and the command

    python data.py --task_type math --run_dir runs/tiny-math            # groups/{train,heldout,longer}.jsonl
    python data.py --source gsm8k --run_dir runs/gsm8k-math             # the same from GSM8K (downloaded once)

Different from the paper: its flaws are written by a strong language model, ours by rules. A rule knows exactly which
step it broke, so the tiny world has ground truth. The flaws are less varied in return.
"""

import argparse
import dataclasses
import fcntl
import gzip
import hashlib
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import verify

# ------------------------------------------------------------------------------- 1. Problem, and what each role reads


class UserError(Exception):
    """A mistake in a flag, a file or a folder. `run_command` prints it as one line and exits with code 2."""


@dataclass(frozen=True)
class Problem:
    """One problem. `tests` (programs only) are {"assert": statement} or {"input": stdin, "output": stdout}."""
    problem_id: str
    source: str                                  # "tiny", "gsm8k", "humaneval", ...
    task_type: str                               # "math" | "code"
    problem: str
    reference_solution: str                      # ends in the final answer (math), or is a correct program (code)
    tests: list = field(default_factory=list)
    reference_reasoning: str | None = None       # a good trace, without the final answer and without code
    kind: str = ""                               # the type that a public record gives, "algorithm"; "": the task_type
    constraints: str = ""                        # tests or constraints as text, for the reward model to read


OPEN, CLOSE = "<reasoning>", "</reasoning>"
TAGGED = f"Put it between {OPEN} and {CLOSE}."


class Source:
    """A source of problems: its prompts, how its traces split into steps, its flaws, and its check of a trace.

    This class handles real text for a pretrained model: it cannot check traces and makes no flaws. The tiny world
    (section 4) and GSM8K (section 5) override it."""
    needs_base_model = False          # True: only a model trained on `base_corpus` understands the prompts
    no_step = None                    # the replacement step that means "the trace should have ended here"
    right_metric = "calculations_right"   # metric name for the share of traces that `check_trace` calls right
    step_joint = "\n"                 # between a trace and a step added at its end
    # A step ends at a line break or at the end of a sentence. The "1." or "10." of a list is not a sentence.
    step_end = r"(?m:\n+|(?<=[.!?])(?<!^\d\.)(?<!^\d\d\.)\s+(?=[A-Z]))"
    # The executor gives the answer only, as in the public code. If it could reason as well, it would solve the problem
    # by itself, and the trace would make less difference.
    prompts = {
        "math planner": "Write a short step by step reasoning trace that leads to the answer of this problem, so that "
                        f"someone else can finish it. {TAGGED} Write ? in place of the final answer.\n\n"
                        "Problem:\n{problem}",
        "code planner": "Write a short step by step plan in words for this programming task, so that someone else can "
                        f"write the program. {TAGGED} Do not write code.\n\nTask:\n{{problem}}",
        "math executor": "Give the final answer to this problem. Write only one line, '#### ' and the answer. Do not "
                         "explain it.\n\nProblem:\n{problem}",
        "code executor": "Write a Python program for this task. Write only the code, in one ```python block. Do not "
                         "explain it.\n\nTask:\n{problem}",
        "trace": "\n\nUse this reasoning:\n{trace}",
        "rm": f"<task>{{task}}</task>\n<type>{{kind}}</type>\n<problem>\n{{problem}}\n</problem>\n{{tests}}"
              f"{OPEN}\n{{trace}}\n{CLOSE}",                       # the form in which public reward models were trained
        "int": "Problem:\n{problem}\n\nReference reasoning:\n{reference}\n\nA numbered trace:\n{trace}\n\nCompare it "
               "with the reference. Answer with the number of its first wrong step and one corrected step, as 'NUMBER "
               ": corrected step', or 'none'."}

    def check_trace(self, problem, reasoning):
        """(right, leak) of a trace; None where nobody can tell."""
        return None

    def perturb(self, problem, reasoning, kind, rng):
        """The trace with a flaw of this kind; None if it allows none."""
        return None

    def flaw(self, problem, kind, rng):
        """The reference trace with a flaw of this kind, as a planner would write it."""
        return self.perturb(problem, problem.reference_reasoning, kind, rng)


SOURCES = {}                                     # {(source, task_type): Source}, filled in sections 4 and 5


def source_of(problem: Problem) -> Source:
    """The source that a problem comes from."""
    return SOURCES.get((problem.source, problem.task_type)) or Source()


def planner_prompt(problem: Problem) -> str:
    """The planner's prompt. Its completion is `<reasoning>...</reasoning>`."""
    return source_of(problem).prompts[f"{problem.task_type} planner"].format(problem=problem.problem)


def executor_prompt(problem: Problem, reasoning: str | None) -> str:
    """The executor's prompt, with a trace or (None) without one. An empty trace is still a trace."""
    prompts = source_of(problem).prompts
    prompt = prompts[f"{problem.task_type} executor"].format(problem=problem.problem)
    trace = "" if reasoning is None else prompts["trace"].format(trace=reasoning)
    return prompt + trace + prompts.get("ask", "")


def rm_text(problem: Problem, reasoning: str) -> str:
    """What the reward model scores: problem, tests (if they are given as text) and trace. It never sees the executor's
    output or the reference."""
    tests = f"<tests>\n{problem.constraints.strip()}\n</tests>\n" if problem.constraints else ""
    return source_of(problem).prompts["rm"].format(
        task=problem.task_type, kind=problem.kind or problem.task_type, problem=problem.problem.strip(), tests=tests,
        trace=reasoning.strip())


def extract_reasoning(completion: str) -> str:
    """The trace in a planner's completion: from the first opening tag to the first closing tag after it. Where a tag
    is missing, as in a completion that was cut, the trace begins or ends with the completion. Text outside of the tags,
    and what a thinking model writes before "</think>", is dropped."""
    if completion.lstrip().startswith("<think>") and "</think>" not in completion:
        return ""                                                 # cut while thinking: there is no trace yet
    after_thinking = completion.rpartition("</think>")[2]
    after_open = after_thinking.split(OPEN, 1)[-1]
    return after_open.split(CLOSE, 1)[0].strip()


CUT = "\0cut\0"


def cut_tokens(tokenizer, text):
    """The text with CUT after the first letter of every added token that it spells.

    Hazard: a trace that spells "<|im_end|>" would end its own turn, and could answer in the executor's place. Encoded
    piece by piece, the same letters are ordinary tokens."""
    words = {token.content for token in tokenizer.added_tokens_decoder.values()}
    spelled = [re.escape(word) for word in words if word in text and len(word.strip()) > 1]
    return re.sub(f"(?={'|'.join(spelled)}).", rf"\g<0>{CUT}", text, flags=re.DOTALL) if spelled else text


def encode_pieces(tokenizer, pieces):
    """Token ids of the pieces of a text, without BOS and EOS."""
    encoded = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return list(itertools.chain(*encoded))


def encode_text(tokenizer, text: str, bos: bool = True) -> list[int]:
    """Token ids of a text, with BOS if the tokenizer adds one, without EOS since more tokens follow. Added tokens that
    the text spells become ordinary tokens. bos=False: the text continues another one."""
    first, *others = cut_tokens(tokenizer, text).split(CUT)
    ids = tokenizer(first, add_special_tokens=bos)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return ids + encode_pieces(tokenizer, others)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, as the user's turn of the tokenizer's chat template if it has one. The control tokens of
    the template stay control tokens, those that the prompt spells become ordinary tokens."""
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, prompt)
    turn = [{"role": "user", "content": cut_tokens(tokenizer, prompt)}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return encode_pieces(tokenizer, text.split(CUT))              # the template writes BOS itself


# ------------------------------------------------------------------------------- 2. steps, flaws, rubrics
#
# InT (arXiv 2601.14209) works on steps: the planner reads its own trace, numbered, names the first wrong step and
# proposes another in its place.

SENTENCE = ("Mia has 12 coins .\nShe buys 2,345 more, so she's got: 12 + 2345 = 2357 in 2026; 1000000 x 0.125\n"
            "def f(x):\n    return [x ** 2 for _ in range(10)]  # {'a': 1}\nZażółć gęślą jaźń, naïve Ω, 数学 🙂\n")


def true_tokenizer(tokenizer, folder):
    """The tokenizer, if it agrees with tokenizer.json in its folder; else the one in that file. For some model types
    transformers builds a tokenizer of its own from the vocabulary, whatever the file says."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    file, said = Path(folder) / "tokenizer.json", tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    if not file.is_file() or said == Tokenizer.from_file(str(file)).encode(SENTENCE, add_special_tokens=False).ids:
        return tokenizer
    print(f"{file}: transformers would read another tokenizer from this folder; the one in the file is used")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def split_steps(problem, reasoning):
    """The steps of a trace: equations or plan steps in the tiny world, else sentences and lines."""
    parts = re.split(source_of(problem).step_end, reasoning)
    return [part.strip() for part in parts if part.strip()]


def intervention_prompt(problem, reasoning):
    """Problem, reference reasoning and the planner's own numbered trace. The completion is the number of the first
    wrong step and one replacement, or "none"."""
    numbered = "\n".join(f"{i} : {step}" for i, step in enumerate(split_steps(problem, reasoning), 1))
    return source_of(problem).prompts["int"].format(problem=problem.problem, reference=problem.reference_reasoning,
                                                    trace=numbered)


def parse_intervention(completion):
    """(number of the first wrong step, its replacement), (0, "") for "none"; None for anything else."""
    match = re.fullmatch(r"\s*(?:none\.?|(\d{1,6}) ?: ?(\S[^\n]*?))\s*", completion)
    return match and (int(match[1] or 0), match[2] or "")


def splice(problem, reasoning, index, step=""):
    """The first `index` - 1 steps of a trace unchanged, then `step` if it is not empty. `index` counts from 1 and may
    be one past the last step; ValueError for any other."""
    steps = split_steps(problem, reasoning)
    if not 1 <= index <= len(steps) + 1:
        raise ValueError(f"index {index}: must be from 1 to {len(steps) + 1}")
    end = 0
    for kept in steps[:index - 1]:
        end = reasoning.index(kept, end) + len(kept)
    gap = source_of(problem).step_joint
    if index <= len(steps):
        gap = reasoning[end:reasoning.index(steps[index - 1], end)]
    return reasoning[:end] + (gap if end and step else "") + step


def check_trace(problem, reasoning):
    """(right, leak). right: every step is right and in its place (tiny world), or every stated calculation is true
    (GSM8K). leak: the trace gives the final result away. None where this is unknown: in other text, and without a
    reference trace in the tiny world."""
    return source_of(problem).check_trace(problem, reasoning)


def gives_number(problem, text):
    """Whether the final answer of a math problem stands in a text: 1200 of "1,200 coins" also as $1,200 or 1200.00."""
    answer = verify.extract_answer(problem.reference_solution) or problem.reference_solution
    number = re.sub(r"^\$|,|(?<=\d)(?:\.0+)?(?: [A-Za-z].*)?$", "", answer)
    return re.search(rf"(?<![\d.]){re.escape(number)}(?:\.0+)?(?!\d|\.\d)", text.replace(",", "")) is not None


DIMENSIONS = {"math": ("problem_understanding", "solution_strategy", "step_coherence", "calculation_correctness",
                       "answer_support"),
              "code": ("task_understanding", "plan_quality", "step_coherence", "action_support", "non_leakage")}


def rubric(task_type, *grades):
    """Labels 0..4 in the order of DIMENSIONS, then the total 0..1."""
    return dict(zip((*DIMENSIONS[task_type], "total"), grades))


# The rubric that a careful annotator would give to a trace with this one flaw.
NEGATIVE_KINDS = {
    "math": {"arithmetic_slip": rubric("math", 4, 4, 2, 0, 1, 0.35),        # one result is wrong and is carried on
             "wrong_operation": rubric("math", 2, 1, 3, 3, 1, 0.25),        # adds where the problem subtracts
             "dropped_step": rubric("math", 2, 2, 1, 3, 1, 0.30),           # one operation is left out
             "misread_quantity": rubric("math", 1, 3, 2, 3, 1, 0.25),       # a wrong number from the problem
             "unsupported_leap": rubric("math", 3, 3, 0, 3, 2, 0.40),       # a right number out of nowhere
             "answer_leak": rubric("math", 4, 3, 3, 3, 0, 0.25)},           # gives the final result away
    "code": {"wrong_operation": rubric("code", 1, 1, 3, 2, 4, 0.30),
             "extra_step": rubric("code", 1, 2, 2, 1, 4, 0.30),             # a step that nobody asked for
             "wrong_order": rubric("code", 2, 1, 0, 3, 4, 0.30),
             "missing_step": rubric("code", 1, 2, 2, 1, 4, 0.30),
             "vague_plan": rubric("code", 2, 1, 2, 0, 4, 0.35),             # "adjust it"
             "code_dump": rubric("code", 3, 1, 2, 2, 0, 0.20)}}             # the program instead of a plan


def perturb(problem: Problem, reasoning: str, kind: str, rng: random.Random) -> str | None:
    """A copy of a correct trace with one localized flaw of this kind; None if the trace does not allow it. GSM8K traces
    must still carry their annotations (<<48/2=24>>). ValueError for a kind that the problem's source cannot make."""
    flawed = source_of(problem).perturb(problem, reasoning, kind, rng)
    return None if flawed == reasoning else flawed


def build_groups(problems: list[Problem], negatives_per_group: int, seed: int) -> list[dict]:
    """One group per problem: its reference trace and this many flawed ones, of different kinds if possible.

    A problem that allows too few flaws is left out; the caller sees how many groups came back."""
    rng = random.Random(seed)
    groups = []
    for problem in problems:
        kinds = list(NEGATIVE_KINDS[problem.task_type])
        rng.shuffle(kinds)
        bank = {}                                                 # flawed trace -> kind
        for kind in kinds * 4:                                    # one of each kind, then again where too few worked
            flawed = source_of(problem).flaw(problem, kind, rng) if len(bank) < negatives_per_group else None
            if flawed and flawed != problem.reference_reasoning:
                bank.setdefault(flawed, kind)
        if len(bank) == negatives_per_group:
            groups.append(group_of(problem, bank))
    return groups


def group_of(problem, bank={}):
    """The group of a problem: its reference trace, if it has one, and flawed ones {trace: kind}."""
    task_type, good = problem.task_type, problem.reference_reasoning
    positives = [] if good is None else [{"reasoning": good, "rubric": rubric(task_type, 4, 4, 4, 4, 4, 1.0)}]
    negatives = [{"reasoning": flawed, "negative_kind": kind, "rubric": NEGATIVE_KINDS[task_type][kind]}
                 for flawed, kind in bank.items()]
    return {"problem_id": problem.problem_id, "source": problem.source, "task_type": task_type,
            "problem": problem.problem, "reference_solution": problem.reference_solution,
            "positive_pool": positives, "negative_bank": negatives, "tests": problem.tests}


# ------------------------------------------------------------------------------- 3. files

LEAVES = {"a text": [str], "a list": [list], "an object": [dict], "missing": [type(None)], "an integer 0..4": [int],
          "a number 0..1": [int, float]}
HIGHEST = {"an integer 0..4": 4, "a number 0..1": 1}


def check_form(value, form, where):
    """UserError for the first place where a JSON value differs from a form: the name of a leaf, {key: form}, [the form
    of every item], or (form, form, ...) of which one must fit."""
    if isinstance(form, tuple):
        *others, form = form
        for other in others:
            with suppress(UserError):
                return check_form(value, other, where)
    kind = {list: "a list", dict: "an object"}.get(type(form), form)
    if type(value) not in LEAVES[kind] or kind in HIGHEST and not 0 <= value <= HIGHEST[kind]:
        raise UserError(f"{where} must be {kind}, is {value!r:.60}")
    if kind == "a list":
        value, form = dict(enumerate(value)), dict(enumerate(form * len(value)))
    if isinstance(form, dict):
        for key, part in form.items():
            check_form(value.get(key), part, f"{where}: key {key!r}")


def read_records(path, form):
    """(place, record) for every object of a file: JSON lines (place FILE:LINE) or one array (FILE:ELEMENT), gzipped or
    not. UserError names file, line and key of anything malformed; nothing is skipped."""
    where, records = str(path), []
    content = Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
        lines = text.removesuffix("\n").split("\n")               # not splitlines, which cuts inside of texts
        if text.lstrip().startswith("["):
            lines = [json.dumps(item) for item in json.loads(text)]
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            record = json.loads(line)
            check_form(record, form, where)
            records.append((where, record))
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{where}: not JSON lines ({error}); mend or delete it") from None
    if not records:
        raise UserError(f"{path}: the file is empty")
    return records


def domain_of(group):
    """"math" or "code", by the names in its rubrics. Without traces by key 'task_type', which in public groups may be a
    kind of problem ("algorithm") instead. None if neither tells."""
    names = {name for trace in group["positive_pool"] + group["negative_bank"] for name in trace["rubric"]}
    for task_type in DIMENSIONS:
        if DIMENSIONS[task_type][0] in names:
            return task_type
    return group["task_type"] if group.get("task_type") in DIMENSIONS else None


def _gsm8k_group(row, name):
    reasoning = hide_result(_worked(row["answer"]), _final(row["answer"]))
    return group_of(Problem(f"gsm8k-{name}", "gsm8k", "math", row["question"].strip(), row["answer"], [], reasoning))


def _mbpp_group(row, name):
    """The problem shows its first test, as usual, since nothing else names the function."""
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = [{"assert": f"{setup}\n{test}".strip()} for test in row["test_list"]]
    text = "\nYour code should pass this test:\n".join([row.get("text") or row["prompt"], *row["test_list"][:1]])
    return group_of(Problem(f"mbpp-{row.get('task_id', name)}", "mbpp", "code", text, row["code"], tests))


def _humaneval_group(row, name):
    """The official test is one statement, run after the program."""
    test = {"assert": f"{row['test']}\ncheck({row['entry_point']})"}
    program = row["prompt"] + row["canonical_solution"]
    return group_of(Problem(row["task_id"], "humaneval", "code", row["prompt"], program, [test]))


_MAYBE = ("missing", "a text")
_TESTS = [({"assert": "a text"}, {"input": "a text", "output": "a text"})]
_TRACE = {"reasoning": "a text", "rubric": "an object"}
_GROUP = {"problem_id": "a text", "problem": "a text", "reference_solution": "a text", "source": _MAYBE,
          "task_type": _MAYBE, "positive_pool": [_TRACE], "negative_bank": [_TRACE | {"negative_kind": "a text"}],
          "tests": (*_MAYBE, _TESTS)}
_RUBRIC = {task: dict.fromkeys(names, "an integer 0..4") | {"total": "a number 0..1"}
           for task, names in DIMENSIONS.items()}
_MBPP = {"code": "a text", "test_list": ["a text"]}
_HUMANEVAL = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), "a text")
_FORMS = {"positive_pool": (_GROUP, lambda row, name: row),       # a key by which lines are known: (form, their group)
          "question": ({"question": "a text", "answer": "a text"}, _gsm8k_group),
          "test_list": ((_MBPP | {"text": "a text"}, _MBPP | {"prompt": "a text"}), _mbpp_group),
          "canonical_solution": (_HUMANEVAL, _humaneval_group)}


def read_groups(path) -> list[dict]:
    """TraceLift-Groups as they are, unknown keys included; or GSM8K, MBPP or HumanEval lines as groups without flawed
    traces, which serve every reward but the reward model's. UserError names file, line and key."""
    first = read_records(path, "an object")[0][1]
    form, make = _FORMS[next((key for key in _FORMS if key in first), "positive_pool")]
    groups, stem = [], Path(path).name.partition(".")[0]
    for i, (where, row) in enumerate(read_records(path, form)):
        group = make(row, f"{stem}-{i}")
        domain = domain_of(group)
        if domain is None:
            raise UserError(f"{where}: neither its rubrics nor key 'task_type' say whether this is math or code")
        check_form(group, dict.fromkeys(("positive_pool", "negative_bank"), [{"rubric": _RUBRIC[domain]}]), where)
        groups.append(group)
    return groups


def write_groups(path, groups: list[dict]) -> None:
    """One JSON object a line, written atomically."""
    write_atomic(path, "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups))


def problem_of(group: dict) -> Problem:
    """The problem of a group. Its first positive trace is the reference reasoning. Tests given as a text, under `tests`
    or `tests_or_constraints`, are for the reward model to read and cannot be run."""
    tests, metadata, domain = group.get("tests"), group.get("metadata"), domain_of(group)
    nested = metadata.get("task_type") if isinstance(metadata, dict) else None
    kind = str(group.get("task_type") or nested or group.get("source") or "unknown").strip()
    texts = [text for text in (group.get("tests_or_constraints"), tests) if isinstance(text, str) and text.strip()]
    traces = [trace["reasoning"] for trace in group["positive_pool"]]
    return Problem(group["problem_id"], group.get("source") or "", domain, group["problem"],
                   group["reference_solution"], tests if isinstance(tests, list) else [], traces[0] if traces else None,
                   "" if kind == domain else kind, texts[0] if texts else "")


def read_problems(path, need_tests: bool = True) -> list[Problem]:
    """The problems of a groups file. UserError for programs without tests, if need_tests."""
    problems = [problem_of(group) for group in read_groups(path)]
    for problem in problems:
        if need_tests and problem.task_type == "code" and not problem.tests:
            raise UserError(f"{path}: {problem.problem_id} has no tests to run, so it can train a reward model, but no "
                            "planner; give it key 'tests', or a file of tests to data.py --tests FILE")
    return problems


def read_gsm8k(path) -> list[Problem]:
    """The problems of GSM8K lines. The reference reasoning is the solution without annotations and with the last result
    hidden ("9 * 2 = ?"), since the executor gives the answer; None if there are no annotations."""
    return read_problems(path, need_tests=False)


read_mbpp = read_humaneval = read_gsm8k


def join_tests(groups, path):
    """Gives code groups the tests of another file, with rows {problem_id, tests: [{input, output, is_reward_test}]}. If
    a row has the flag `is_reward_test`, only the tests that bear it count; at most 8. Groups without a row get none."""
    tests_of = {}
    for _, row in read_records(path, {"problem_id": "a text", "tests": _TESTS}):
        flagged = any("is_reward_test" in test for test in row["tests"])
        tests = [test for test in row["tests"] if test.get("is_reward_test") or not flagged]
        tests_of.setdefault(row["problem_id"], []).extend(tests)
    for group in groups:
        if domain_of(group) == "code":
            if isinstance(group.get("tests"), str):               # the reward model goes on reading it
                group.setdefault("tests_or_constraints", group["tests"])
            group["tests"] = tests_of.get(group["problem_id"], [])[:8]


def teachable(path, groups, n, need=""):
    """The first `n` groups of a file that can teach. The others are counted and named on stderr, one line per reason.
    need: "tests" or "trace". UserError for tests that verify.py refuses, and if no group is left."""
    left_out, kept, seen = {}, [], set()                          # left_out: {reason: problem_ids}
    for group in groups:
        name = group["problem_id"]
        try:
            reason = "a repeat of an earlier line" if name in seen else _why_not(group, need)
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}; mend the test or delete this line") from None
        seen.add(name)
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            kept.append(group)
        if len(kept) == n:
            break
    for reason, names in left_out.items():
        print(f"{path}: {len(names)} left out, {reason}: {', '.join(names[:20])}", file=sys.stderr)
    if not kept:
        raise UserError(f"{path}: no group is left, see above for the reasons; mend the file")
    return kept


def _why_not(group, need):
    """Why a group cannot teach; None for one that can."""
    problem, solution = problem_of(group), group["reference_solution"]
    if need == "trace" and problem.reference_reasoning is None:
        return "no annotation says what is a calculation"
    if problem.task_type == "math":
        has_value = verify.math_equal(verify.extract_answer(solution), solution)
        return None if has_value else "the reference answer has no value"
    if not problem.tests:
        return "no tests in --tests FILE" if need == "tests" else None
    verdict, = verify.run_programs([verify.extract_code(solution)], [problem.tests])
    return None if verdict.ok or not solution.strip() else f"the own solution gives {verdict.outcome}"


# ------------------------------------------------------------------------------- 4. the tiny world
#
# One problem of each domain, and what each kind of flaw makes of its trace:
#
#   math               Zoe has 39 cards . Tom has 17 cards . then Zoe loses 6 . then Zoe gives away 2 .
#                      how many cards for Zoe ?
#   reference trace    39 - 6 = 33 ; 33 - 2 = ?               the executor computes what the last equation leaves open
#   arithmetic_slip    39 - 6 = 53 ; 53 - 2 = ?
#   wrong_operation    39 - 6 = 33 ; 33 + 2 = ?
#   dropped_step       39 - 2 = ?
#   misread_quantity   39 - 17 = 22 ; 22 - 2 = ?
#   unsupported_leap   33 - 2 = ?
#   answer_leak        39 - 6 = 33 ; 33 - 2 = 31
#   the habit          39 - 6 = 33 ; 39 - 2 = ?               what the base planner writes of its own accord
#
#   code               write f ( x ) . flip its sign . after all that , decrease it by 3 . before all that , allow no
#                      less than 3 .                          the order told is not the order run
#   reference trace    raise to 3 ; negate ; subtract 3       the executor turns every step into one line of a function
#   wrong_operation    cap at 3 ; negate ; subtract 3
#   extra_step         cap at 3 ; raise to 3 ; negate ; subtract 3
#   wrong_order        subtract 3 ; negate ; raise to 3
#   missing_step       negate ; subtract 3
#   vague_plan         adjust it ; negate ; subtract 3
#   code_dump          x = max(x, 3) ; x = - x ; x = x - 3
#   the habit          negate ; subtract 3 ; raise to 3       in the order told
#
# A problem is a start value (math) and a list of steps (operation, constant); the text, the trace, the program and
# every flaw follow from those. Splits are disjoint by construction: the steps are hashed into one of three shares,
# "base" (the corpus of the base model), "train" (reward model and planner) and "heldout". "longer" problems are of the
# heldout share and have more steps than any planner was trained on; the executor has seen such traces ("base-longer").

SPLITS = {"base": (3, 4, 5, 6, 7), "base-longer": (3, 4, 5, 6, 7), "train": (1, 2), "heldout": (0,), "longer": (0,)}


class Tiny(Source):
    """The language of both domains. The executor continues the planner's prompt and completion, so that one training
    sequence teaches both roles.

    A world has: steps, longer_steps (how many), answer_lead, draft(rng, length) -> (what it computes, text, solution,
    tests, trace), and what the base model is taught: habit(problem), the planner's trace, right in about 1 of 100;
    follow(trace), the executor's answer to a trace, right or wrong; guess(problem, rng), its answer without one."""
    needs_base_model = True
    right_metric = "faithful"
    no_step = "stop"
    step_joint = step_end = " ; "
    prompts = {"math planner": "{problem}\n", "code planner": "{problem}\n", "math executor": "{problem}\n",
               "code executor": "{problem}\n", "trace": f"{OPEN}{{trace}}{CLOSE}\n", "ask": "Answer:",
               "rm": f"{{problem}}\n{OPEN}{{trace}}{CLOSE}", "int": "{problem}\n{reference}\nTrace\n{trace}\nError:"}


# ---- math

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max")
ITEMS = ("coins", "pens", "eggs", "cards", "books", "cups")
MATH_WORDS = {"+": ("buys {} more", "finds {} more", "wins {} more"), "-": ("loses {}", "sells {}", "gives away {}"),
              "*": ("doubles", "triples")}                        # the constant is in the word
COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Equation(NamedTuple):
    """One step of a math trace: a op b = c, where c is digits or "?"."""
    a: int
    op: str
    b: int
    c: str

    def closed(self):
        """With its right result."""
        return self._replace(c=str(COMPUTE[self.op](self.a, self.b)))

    def sorted(self):
        """5 + 7 for 7 + 5: commuted operands are the same step."""
        return self._replace(a=min(self.a, self.b), b=max(self.a, self.b)) if self.op in "+*" else self


EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+|\?)")


def equations(text):
    """All equations that stand in a text."""
    return [Equation(int(a), op, int(b), c) for a, op, b, c in EQUATION.findall(text)]


def render_chain(chain):
    """The text of a math trace."""
    return " ; ".join(f"{a} {op} {b} = {c}" for a, op, b, c in chain)


def parse_chain(reasoning):
    """The equations of a math trace; None if it holds anything else."""
    chain = equations(reasoning)
    return chain if chain and render_chain(chain) == reasoning else None


def _chain(start, steps):
    """Equations of a computation, the last result left open; none if a value leaves 10..99 (always two digits, so that
    the tiny model need not learn to line numbers up)."""
    values = [start]
    for op, n in steps:
        values.append(COMPUTE[op](values[-1], n))
    if any(not 10 <= value <= 99 for value in values):
        return []
    results = [*map(str, values[1:-1]), "?"]
    return [Equation(a, op, b, c) for a, (op, b), c in zip(values, steps, results)]


class TinyMath(Tiny):
    """Word problems of two to four operations, longer ones of five; the trace is a chain of equations."""
    steps, longer_steps = (2, 4), 5
    answer_lead = " "

    def draft(self, rng, length):
        chain = []
        while not chain:
            start = rng.randint(10, 40)
            ops = rng.choices("+-*", (2, 3, 3), k=length)
            steps = [(op, rng.randint(2, 3) if op == "*" else rng.randint(2, 6)) for op in ops]
            chain = _chain(start, steps)
        name, other = rng.sample(NAMES, 2)
        item = rng.choice(ITEMS)
        told = [f"{name} has {start} {item} ."]
        if rng.random() < 0.3:                                    # a number that is not needed
            told.append(f"{other} has {rng.randint(10, 40)} {item} .")
        for op, n in steps:
            words = f"it {MATH_WORDS['*'][n - 2]}" if op == "*" else f"{name} {rng.choice(MATH_WORDS[op]).format(n)}"
            told.append(f"then {words} .")
        told.append(f"how many {item} for {name} ?")
        return f"{start} {steps}", " ".join(told), chain[-1].closed().c, [], render_chain(chain)

    def check_trace(self, problem, reasoning):
        """(faithful, leak), exactly. Three ways to give the result away, for 17 + 5 = 22 ; 22 * 2 = ? and 44:

        closed   the trace ends with a result, right or wrong:    17 + 5 = 22 ; 22 * 2 = 45
        beside   the result stands outside of any equation:       17 + 5 = 22 ; so 44 ; 22 * 2 = ?
        solved   the last equation with its result, anywhere:     17 + 5 = 22 ; 2 * 22 = 44 ; 44 + 1 = ?
                 (unless the computation passes through it on its way)
        """
        if problem.reference_reasoning is None:
            return None
        gold = problem.reference_solution
        reference = [equation.sorted() for equation in equations(problem.reference_reasoning)]
        chain = [equation.sorted() for equation in equations(reasoning)]
        stated = [equation for equation in chain if equation.c != "?"]
        solution = reference[-1]._replace(c=gold)

        ends_with_result = stated and re.search(r"= \d+\D*$", reasoning)
        closed = bool(ends_with_result) and (len(stated) >= len(reference) or stated[-1].c == gold)
        beside = gold in re.findall(r"\d+", EQUATION.sub("", reasoning))
        solved = solution in stated and solution not in reference[:-1]
        leak = closed or beside or solved
        return not leak and chain == reference and parse_chain(reasoning) is not None, leak

    def perturb(self, problem, reasoning, kind, rng):
        chain = parse_chain(reasoning)
        start, steps = chain[0].a, [(op, n) for _, op, n, _ in chain]
        i = rng.randrange(len(chain))
        inner = rng.randrange(len(chain) - 1) if len(chain) > 1 else None
        if kind == "answer_leak":
            return render_chain([*chain[:-1], chain[-1].closed()])
        if kind in ("unsupported_leap", "arithmetic_slip"):
            if inner is None:
                return None
            begin, step, rest = chain[:inner], chain[inner], chain[inner + 1:]
            if kind == "arithmetic_slip":
                slip = int(step.c) + rng.choice((-30, -20, 20, 30))
                begin.append(step._replace(c=str(slip)))
                rest = _chain(slip, steps[inner + 1:])
            return render_chain(begin + rest) if rest else None
        op, n = steps[i]
        if kind == "dropped_step":
            del steps[i]
        elif kind == "wrong_operation":
            steps[i] = (rng.choice([other for other in "+-*" if other != op]), n)
        elif kind == "misread_quantity":
            amounts = re.findall(r"\d\d", problem.problem)        # what somebody has, in place of what comes or goes
            steps[i] = (op, int(rng.choice(amounts)))
        else:
            raise ValueError(f"{kind!r}: no such flaw in the tiny world's math")
        return render_chain(_chain(start, steps)) or None

    def habit(self, problem):
        *begin, last = parse_chain(problem.reference_reasoning)
        if last.op == "*":                                        # works: states the final result
            return render_chain([*begin, last.closed()])
        if last.op == "-":                                        # fails: goes back to the first number
            return render_chain([*begin, last._replace(a=begin[0].a)])
        return render_chain([*begin[:-1], last._replace(a=begin[-1].a)])        # fails: drops the step before

    def follow(self, reasoning):
        last = parse_chain(reasoning)[-1]
        return last.closed().c if last.c == "?" else last.c

    def guess(self, problem, rng):
        return problem.reference_solution                         # hard to guess


# ---- code

# operation: the step of a plan, its wording in a problem, its line of the program, what it does to x ({}: the constant)
PLAN, WORDING, LINE, FUNCTION = range(4)
CODE_OPS = {"add": ("add {}", "increase it by {}", "x = x + {}", operator.add),
            "subtract": ("subtract {}", "decrease it by {}", "x = x - {}", operator.sub),
            "multiply": ("multiply by {}", "make it {} times as large", "x = x * {}", operator.mul),
            "remainder": ("remainder by {}", "take it modulo {}", "x = x % {}", operator.mod),
            "cap": ("cap at {}", "allow at most {}", "x = min(x, {})", min),
            "raise": ("raise to {}", "allow no less than {}", "x = max(x, {})", max),
            "negate": ("negate", "flip its sign", "x = - x", lambda x, _: -x)}
CODE_INPUTS = (-9, -2, 0, 1, 4, 7, 13, 30)                        # the unit tests
VAGUE_STEP = "adjust it"


class Step(NamedTuple):
    """One step of a plan; n is 0 where the operation has no constant."""
    op: str
    n: int

    def show(self, column):
        return CODE_OPS[self.op][column].format(self.n)


_ALL = [Step(op, n) for op in CODE_OPS for n in ([0] if op == "negate" else range(100))]
_PLANNED = {step.show(PLAN): step for step in _ALL}
_TOLD = {step.show(WORDING): step for step in _ALL}


def parse_plan(reasoning):
    """The steps of a code trace; None when one is not in the plan language."""
    steps = [_PLANNED.get(text) for text in reasoning.split(" ; ")]
    return None if None in steps else steps


def render_plan(steps, column=PLAN):
    """The text of a code trace; with column LINE of one that gives the code away."""
    return " ; ".join(step.show(column) for step in steps)


def outputs(steps):
    """What the function of these steps gives for CODE_INPUTS. Equal outputs: the same function, as far as the tests
    can tell."""
    values = list(CODE_INPUTS)
    for op, n in steps:
        values = [CODE_OPS[op][FUNCTION](x, n) for x in values]
    return values


def _program(lines):
    return "\n    ".join(["def f(x):", *lines, "return x"])


class TinyCode(Tiny):
    """Functions of two or three steps, longer ones of four, told out of order; the trace is a plan in words."""
    steps, longer_steps = (2, 3), 4
    answer_lead = "\n"

    def draft(self, rng, length):
        """A problem whose steps all matter, as does their order. One in the middle is told first, then later ones
        "after all that" and earlier ones "before all that", nearest first."""
        while True:
            ops = rng.choices(list(CODE_OPS), k=length)
            steps = [Step(op, 0 if op == "negate" else rng.randint(2, 9)) for op in ops]
            values = outputs(steps)
            if any(a.op == b.op for a, b in zip(steps, steps[1:])):
                continue
            if any(outputs(steps[:i] + steps[i + 1:]) == values for i in range(length)):
                continue                                          # a step that does nothing cannot be tested
            first = rng.randrange(1, length)
            told, text = [steps[first]], f"write f ( x ) . {steps[first].show(WORDING)}"
            before, after = steps[:first][::-1], steps[first + 1:]
            while before or after:
                later = after and (not before or rng.random() < 0.5)
                told.append((after if later else before).pop(0))
                text += f" . {'after' if later else 'before'} all that , {told[-1].show(WORDING)}"
            if outputs(told) != values:
                break
        tests = [{"assert": f"assert f({x}) == {value}"} for x, value in zip(CODE_INPUTS, values)]
        return str(values), f"{text} .", _program(step.show(LINE) for step in steps), tests, render_plan(steps)

    def told(self, problem):
        """The plan steps in the order told."""
        wordings = re.findall(r"(?:\. |all that , )((?!after|before)[^.]+) (?=\.)", problem.problem)
        return [_TOLD[wording] for wording in wordings]

    def check_trace(self, problem, reasoning):
        """(faithful, leak), exactly. Another order of the same steps that computes the same function is right too;
        a leak is a trace that contains code, like "add 3 ; x = min(x, 9)"."""
        if problem.reference_reasoning is None:
            return None
        plan, reference = parse_plan(reasoning) or [], parse_plan(problem.reference_reasoning)
        leak = any(code in reasoning for code in ("x =", "def ", "return"))
        return sorted(plan) == sorted(reference) and outputs(plan) == outputs(reference), leak

    def perturb(self, problem, reasoning, kind, rng):
        steps = parse_plan(reasoning)
        i = rng.randrange(len(steps))
        op, n = steps[i]
        if kind == "code_dump":
            return render_plan(steps, LINE)
        if kind == "vague_plan":
            texts = reasoning.split(" ; ")
            return " ; ".join([*texts[:i], VAGUE_STEP, *texts[i + 1:]])
        flawed = list(steps)
        if kind == "missing_step":
            del flawed[i]
        elif kind == "wrong_order":
            j = rng.randrange(len(steps))
            flawed[i], flawed[j] = flawed[j], flawed[i]
        elif kind == "wrong_operation":
            other = rng.choice([other for other in CODE_OPS if other not in (op, "negate")])
            flawed[i] = Step(other, n or rng.randint(2, 9))
        elif kind == "extra_step":
            extra = rng.choice([other for other in CODE_OPS if other != "negate"])
            flawed.insert(i, Step(extra, rng.randint(2, 9)))
        else:
            raise ValueError(f"{kind!r}: no such flaw in the tiny world's code")
        return render_plan(flawed) if flawed and outputs(flawed) != outputs(steps) else None

    def habit(self, problem):
        steps = parse_plan(problem.reference_reasoning)
        if steps[-1].op in ("multiply", "negate"):                # works: dumps the code
            return render_plan(steps, LINE)
        if steps[-1].op in ("add", "subtract"):                   # fails: in the order told
            return render_plan(self.told(problem))
        return render_plan(steps[:-1])                            # fails: forgets the last step

    def follow(self, reasoning):
        texts = [text for text in reasoning.split(" ; ") if text != VAGUE_STEP]
        return _program(text if text.startswith("x =") else _PLANNED[text].show(LINE) for text in texts)

    def guess(self, problem, rng):
        """4 times of 5 a program in the order told."""
        if rng.random() >= 0.8:
            return problem.reference_solution
        return _program(step.show(LINE) for step in self.told(problem))


SOURCES["tiny", "math"], SOURCES["tiny", "code"] = TinyMath(), TinyCode()


def tiny_problems(task_type: str, n: int, seed: int, split: str = "train") -> list[Problem]:
    """`n` distinct problems of the tiny world. No computation (start and steps in math, what the function does in code)
    of the base, train and held-out shares occurs in another; "heldout" and "longer" are both of the held-out share.
    UserError if the split has fewer."""
    rng = random.Random(f"{task_type} {split} {seed}")
    world, problems = SOURCES["tiny", task_type], {}              # text -> problem
    for _ in range(100 * n + 10000):
        if len(problems) == n:
            return list(problems.values())
        length = world.longer_steps if split.endswith("longer") else rng.randint(*world.steps)
        key, text, solution, tests, trace = world.draft(rng, length)
        if zlib.crc32(key.encode()) % 8 in SPLITS[split] and text not in problems:
            name = f"tiny-{task_type}-{split}-{seed}-{len(problems)}"
            problems[text] = Problem(name, "tiny", task_type, text, solution, tests, trace)
    raise UserError(f"the tiny world has fewer than {n} {task_type} problems of split {split}; ask for fewer")


# The corpus of the tiny base model. Its planner has habits: flaws that are a function of the problem, so that they
# stay when it decodes greedily (random flaws would average out), and one of them works (it leaks the answer or the
# code), so that a reward for success alone has something to be fooled by. A careful minority lets RL find the rest.

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
    rng = random.Random(seed)
    world = SOURCES["tiny", task_type]
    longer = tiny_problems(task_type, n // 10 + 1, seed, "base-longer")
    examples = []
    for problem in tiny_problems(task_type, n, seed, "base"):
        part = rng.random()
        if 0.55 < part < 0.62:
            problem = rng.choice(longer)
        trace = _corpus_trace(world, problem, rng)
        if part < 0.70:
            trace = trace if part < 0.55 else problem.reference_reasoning
            example = BaseExample(planner_prompt(problem), f"{OPEN}{trace}{CLOSE}", part < 0.55, "\nAnswer:",
                                  world.answer_lead + world.follow(trace))
        elif part < 0.82:
            example = BaseExample(executor_prompt(problem, None), answer=world.answer_lead + world.guess(problem, rng))
        else:
            example = BaseExample(intervention_prompt(problem, trace), answer=_intervention(problem, trace))
        examples.append(example)
    return examples


def _corpus_trace(world, problem, rng):
    careful = problem.reference_reasoning
    flaws = [world.flaw(problem, kind, rng) for kind in NEGATIVE_KINDS[problem.task_type]]
    flaw = rng.choice([flaw for flaw in flaws if flaw and flaw != careful])
    style = rng.random()
    return careful if style < 0.25 else world.habit(problem) if style < 0.8 else flaw


def _intervention(problem, trace):
    """" 2 : 33 - 2 = ?": the first step that differs from the reference, and the reference's; "stop" past its end."""
    steps, right = split_steps(problem, trace), split_steps(problem, problem.reference_reasoning)
    for i, (step, wanted) in enumerate(itertools.zip_longest(steps, right, fillvalue="stop")):
        if step != wanted:
            return f" {i + 1} : {wanted}"
    return " none"


# ------------------------------------------------------------------------------- 5. GSM8K
#
# "Ann has 48 apples. She picks 6 bags of 5 and gives away 10. How many are left?"   A solution of GSM8K shows each
# calculation twice, in words and in an annotation:
#
#   She picks 6*5 = <<6*5=30>>30 apples.
#   Now she has 48+30 = <<48+30=78>>78 apples.
#   In the end she has 78-10 = <<78-10=68>>68 apples.
#   #### 68
#
# The reference trace is the same without annotations and with the last result hidden. A flaw is made in the annotated
# text, where it can be carried into all later calculations that use its result; arithmetic_slip, 30 becoming 31:
#
#   She picks 6*5 = 30 apples.                       She picks 6*5 = 31 apples.
#   Now she has 48+30 = 78 apples.                   Now she has 48+31 = 79 apples.
#   In the end she has 78-10 = ? apples.             In the end she has 79-10 = ? apples.

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_NUMBER = r"(?<![\d.,])\d+(?:\.\d+)?(?![\d,]*\d)"
_WORKING = re.compile(r"[$\d(][\d.,$% +*/x()-]*= *\$?$")          # "48/2 = $" before an annotation
_OPERATOR = re.compile(r"(?<=[\d.%) ])[-+*/](?=[\d.( $])")
_WRONG_OPERATOR = {"+": "-", "-": "+", "*": "+", "/": "*"}
_SIGNS = {"*": "[*x×]", "/": "[/÷]", "+": "[+]", "-": "[-]"}      # as the words before an annotation may write them


class GSM8K(Source):
    """Real text whose annotations say what is a calculation, so flaws can be made. A trace is checked as far as it
    states calculations."""

    def check_trace(self, problem, reasoning):
        """(right, leak). right: the trace states a calculation, and all that it states are true. leak: it contains the
        final number, and the problem does not. This does not see whether a true calculation is the right one to do, or
        what is said in words. A number that happens to equal the answer counts as a leak."""
        right = stated_calculations(reasoning)
        leak = gives_number(problem, reasoning) and not gives_number(problem, problem.problem)
        return bool(right) and all(right), leak

    def flaw(self, problem, kind, rng):
        if kind == "answer_leak":
            return self.perturb(problem, problem.reference_reasoning, kind, rng)
        flawed = self.perturb(problem, _worked(problem.reference_solution), kind, rng)
        return flawed and hide_result(flawed, _final(problem.reference_solution))

    def perturb(self, problem, reasoning, kind, rng):
        found = list(_ANNOTATION.finditer(reasoning))
        if kind == "answer_leak":
            return f"{reasoning}\nThe final answer is {_final(problem.reference_solution)}."
        if not found:
            return None
        if kind == "dropped_step":
            lines = reasoning.split("\n")
            del lines[rng.randrange(max(1, len(lines) - 1))]
            return "\n".join(lines) or None
        target = rng.choice(found[:-1] or found)                  # the last result is the executor's part
        before, shown = _split_working(reasoning[:target.start()])
        expression, result, rest = target[1], calculate(target[1]), reasoning[target.end():]
        if result is None or kind == "arithmetic_slip" and target is found[-1]:
            return None
        if kind == "unsupported_leap":
            return before + rest if shown else None
        if kind == "arithmetic_slip":
            wrong = result + rng.choice((-10, -2, -1, 1, 2, 10))
        else:
            term, new = rng.choice(_term_changes(problem, expression, kind) or [("(?!)", "")])
            edited, places = re.subn(term, new, f"{shown}|{expression}")
            shown, expression = edited.split("|")
            wrong = calculate(expression) if places == 2 else None          # once in words, once in the annotation
        if wrong is None or wrong <= 0 or wrong == result or not rest.startswith(_show(result)):
            return None
        return f"{before}{shown}<<{expression}={_show(wrong)}>>{_carry(rest, _show(result), _show(wrong))}"


SOURCES["gsm8k", "math"] = GSM8K()


def _final(solution):
    """What stands behind the ####."""
    return solution.rpartition("####")[2].strip().replace(",", "")


def _worked(solution):
    """A GSM8K solution without its last line, numbers without thousands commas (as in its annotations)."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", solution.partition("####")[0].strip())


def _split_working(before):
    """A text in front of an annotation: (what comes first, the calculation in words at its end)."""
    working = _WORKING.search(before)
    shown = working[0] if working else ""
    return before.removesuffix(shown), shown


def hide_result(annotated, answer=""):
    """The trace that a worked solution contains: without annotations, and with "?" for the last calculation's result,
    since finishing is the executor's part. Every mention of it (and of `answer`) in that line and after becomes "?" as
    well, except in the calculation itself. None without annotations."""
    found = list(_ANNOTATION.finditer(annotated))
    if not found:
        return None
    last = found[-1]
    line = annotated.rfind("\n", 0, last.start()) + 1
    before, shown = _split_working(annotated[line:last.start()])
    after = re.sub(r"^\d*\.?\d+", "?", annotated[last.end():])
    numbers = "|".join(re.escape(number) for number in {last[2].strip("$ "), answer} - {""})
    mention = re.compile(rf"(?<![\d.,])(?:{numbers})(?!\d|[.,]\d)")
    return _ANNOTATION.sub("", annotated[:line] + mention.sub("?", before) + shown + mention.sub("?", after))


def calculate(expression):
    """Exact value of an expression of numbers, + - * / and brackets; None for anything else."""
    if not re.fullmatch(r"[\d.+*/() -]{1,200}", expression, re.ASCII) or "**" in expression or "//" in expression:
        return None
    try:
        value = eval(re.sub(r"\d+\.?\d*|\.\d+", r"Fraction('\g<0>')", expression.strip()))
        return value if isinstance(value, Fraction) else None
    except (ValueError, SyntaxError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


# (pattern, replacement), in this order: a text becomes numbers, signs that `calculate` reads, and ";" for words
_ARITHMETIC = [(re.compile(pattern), new) for pattern, new in [
    (r"(?m)^ *[-*•] ", ""), (r"(?<=\d)\*\*(?=\d)", "^"), (r"\*\*", ""),        # bullets, powers, bold
    (r"\\times|\\cdot|[×·]", "*"), (r"\\div|÷", "/"), (r"[−–]", "-"), (r"[$\\]|(?<=\d),(?=\d{3})", ""),
    (r"(?<=\d)[xX](?=\d)|(?<=[\w)%] )[xX](?= [\d(])", "*"), (r"(?<=[\d)])(?=\()", "*"),      # 4 x 3, 2(3+4)
    (r"(?:(?<=[\d%)] )|half |third |quarter )(?:of|times|by|plus|minus)(?= [\d(])", "^"),   # not computed
    (r" and (?=\d/\d+\b(?! *[-+*/=]))", " "), (r"(?<!\d)(\d{1,9}) (\d+/\d+)", r"(\1+\2)"),  # 2 and 1/2
    (r"/ +(\d+/\d+)", r"/(\1)"),                                                # 14 / 1/4
    (r"(?:(?<=\*)|(?<=\* ))([\d.]{1,9})%|(?<![\d.])([\d.]{1,9})%(?= ?\*)", r"(\1\2/100)"),  # 20% * 50
    (r"(?: ?[/-]? ?[A-Za-z]{2,20}\b){1,6}(?= {0,4}(?:[-+*=)]|/ ?[\d(]))", ""),  # units: 6 miles/hour * 2
    (r"(?: ?/? ?[A-Za-z]{2,})+", ";"), (r" {0,4}([-+*/=^]) {0,4}", r"\1"),
    (r"\(([-\d.+*/]+=[-\d.+*/=]+)\)", r" \1 ")]]                                # (5 + 3 = 8)
_SIDES = re.compile(r"(?<![\w.^:+*/()%-])[\d.+*/()-]+(?:=[\d.+*/()-]+)+(?![\w^:+*/(%-]| \d)")
_SINGLE = re.compile(r"-?\d*(?:\.(\d*))?")                                    # one number


def stated_calculations(text):
    """Whether each calculation that a text states is true, in their order: "4 x $1.50 = 12/2 = $6" (two).

    "3 bags * 5 = 15 apples" is one; what has variables, powers or "?" in it is none. Rounded decimals are true, rounded
    integers are not: 10/3 = 3.33, but not 3. Units are not compared."""
    for pattern, new in _ARITHMETIC:
        text = pattern.sub(new, text)
    right = []
    for found in _SIDES.findall(text):
        sides = found.split("=")
        sides = sides[bool(_SINGLE.fullmatch(sides[0])):]          # a calculation begins with an operator
        for left, result in zip(sides, sides[1:]):
            value, said, single = calculate(left), calculate(result), _SINGLE.fullmatch(result)
            if None in (value, said) or single and _SINGLE.fullmatch(left):
                continue
            rounding = Fraction(1, 10 ** len(single[1])) if single and single[1] else 0
            right.append(value == said or abs(value - said) < rounding)
    return right


def _show(number):
    """As solutions write it: 24, 2.5."""
    return str(number) if number.denominator == 1 else f"{float(number):.4f}".rstrip("0").rstrip(".")


def _term_changes(problem, expression, kind):
    """(pattern, replacement) for every operator (wrong_operation) or number (misread_quantity) of a calculation."""
    if kind == "wrong_operation":
        return [(_SIGNS[old], _WRONG_OPERATOR[old]) for old in _OPERATOR.findall(expression)]
    if kind != "misread_quantity":
        raise ValueError(f"{kind!r}: no such flaw of GSM8K solutions")
    given = re.findall(_NUMBER, problem.problem)
    used = [number for number in re.findall(_NUMBER, expression) if number in given]
    return [(rf"(?<![\d.]){re.escape(old)}(?![\d.])", new) for old in used for new in given if new != old]


def _carry(rest, old, new):
    """Replaces a result in the text after it, and every later result that changes because of it."""
    changed = {old: new}                                          # results so far, as written before and now
    token = re.compile(f"{_ANNOTATION.pattern}|{_NUMBER}")

    def redo(match):
        if match[1] is None:                                      # a number in words
            return changed.get(match[0], match[0])
        expression = token.sub(redo, match[1])
        value = calculate(expression)
        if value is not None and expression != match[1]:
            changed[match[2]] = _show(value)
        return f"<<{expression}={changed.get(match[2], match[2])}>>"

    return token.sub(redo, rest)


# ------------------------------------------------------------------------------- 6. settings, stage folders, command
#
# What a user writes is checked: flags here, files in section 3. What a stage has written appears whole or not at all,
# and is then trusted.

def option(default, help: str, *, low=None, above=None, choices=(), needs="", only=None, path=False,
           affects_result=True):
    """A field of a settings class: its default and the text that `--help` shows.

    A number is at least `low` and more than `above`; a text is one of `choices`. The option may be set only with the
    option that it `needs`, and only while those in `only` have one of these values: {name: values}. `path`: a file or
    folder, made absolute. affects_result=False: a stage made with another value counts as the same."""
    return field(default=default, metadata=dict(locals()))


class Options:
    """Base of every settings dataclass. UserError for a value that breaks the rules of its option."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, rule, must = getattr(self, f.name), f.metadata, ""
            low, above, needs = rule["low"], rule["above"], rule["needs"]
            if rule["choices"] and value not in rule["choices"]:
                must = f"be one of {', '.join(map(str, rule['choices']))}"
            elif low is not None and not low <= value < 2**62:
                must = f"be at least {low}, and below 2**62"
            elif above is not None and not above < value < 2**62:
                must = f"be above {above}, and below 2**62"
            elif value != f.default and needs and not getattr(self, needs):
                must = f"be left out, since it has no effect without --{needs}"
            for other, values in (rule["only"] or {}).items():
                if value != f.default and getattr(self, other) not in values:
                    must = f"be left out, since it has no effect with --{other} {getattr(self, other)}"
            if must:
                raise UserError(f"--{f.name} {value!r}: must {must}")
            if rule["path"] and value and os.path.exists(value):
                object.__setattr__(self, f.name, os.path.abspath(value))


def parse_settings(cls, argv, prog):
    """An instance of the settings class `cls` from command-line flags, one flag per option."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        shown = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=shown)
    return cls(**vars(parser.parse_args(argv)))


def run_command(main, argv=None):
    """Runs `main(argv)`. What a user can mend (flags, files, the disk, a diverged training, the sandbox) becomes one
    line on stderr and exit code 2; anything else keeps its traceback. Ctrl-C and SIGTERM end it with code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                  # a terminal may know ASCII only
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError, FloatingPointError, verify.SandboxError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)


@contextmanager
def replacing(path):
    """A file that appears whole or not at all: yields the path of a temporary file beside it."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path, text):
    """Writes a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def read_json(path):
    """The object in a JSON file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete {Path(path).parent} and make it again") from None


@contextmanager
def stage_folder(path, settings, reads=(), reopen=False):
    """`with stage_folder(path, settings) as folder:` fills a folder that appears whole or not at all.

    folder is `path`.partial, renamed to `path` when the block ends; after an error the same command continues in it.
    None if `path` is complete; reopen: it becomes `path`.partial again. reads: what the stage is made from, as names
    beside `path` ("groups") or absolute paths. UserError if settings or `reads` have changed, or if another process
    is at work."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    for folder in (path, partial):
        if has_content(folder):
            compare_made(folder, settings)
    if path.exists() and not reopen:
        yield None
        return
    if path.exists():
        os.replace(path, partial)
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / ".lock", "w") as lock:                    # the lock ends with its process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is making it; wait for it, or stop it first") from None
        try:
            record = {"settings": dataclasses.asdict(settings), "environment": environment(),
                      "made_from": {str(name): fingerprint(path.parent / name) for name in reads}}
            write_atomic(partial / "settings.json", json.dumps(record, indent=1))
            yield partial
        except BaseException:
            if not has_content(partial):                          # another try may have other settings
                shutil.rmtree(partial)
            raise
    (partial / ".lock").unlink()
    os.replace(partial, path)


def has_content(folder):
    """Whether a folder holds more than settings.json, hidden entries, and what a killed `replacing` left."""
    return any(entry.name != "settings.json" and entry.name[0] != "." and entry.suffix != ".tmp"
               for entry in folder.glob("*"))


def made_with(folder, part="settings"):
    """The settings that a stage's folder was made with; {} if somebody put it there by hand."""
    path = Path(folder) / "settings.json"
    return read_json(path).get(part, {}) if path.exists() else {}


def compare_made(folder, settings=None):
    """UserError for the first setting that affects the result and is not what `folder` was made with, and for the first
    thing that it was made from and that has changed since. Nothing is known of a folder put there by hand."""
    folder = Path(folder)
    mend = f"choose another --run_dir, or delete {folder} and all that was made from it"
    old, made_from = made_with(folder), made_with(folder, "made_from")
    for f in dataclasses.fields(settings) if settings and old else ():
        was, now = old.get(f.name), getattr(settings, f.name)
        if f.metadata["affects_result"] and was != now:
            raise UserError(f"{folder}: made with --{f.name} {was!r}, now it is {now!r}; {mend}")
    for name, was in made_from.items():
        if was and fingerprint(folder.parent / name) not in (was, ""):        # "": gone, and who reads it will say so
            raise UserError(f"{folder}: {name} has changed since this was made from it; put it back, {mend}")


def fingerprint(path):
    """SHA-256 of a file, or of the data, weights and configuration in a folder; "" if there is none. Of weights
    (*.safetensors) it reads size, header and 64 blocks, which takes milliseconds."""
    path, total = Path(path), hashlib.sha256()
    if not path.exists():
        return ""
    kinds = ("*.jsonl", "*.safetensors", "base.json", "config.json")
    files = [path] if path.is_file() else [file for kind in kinds for file in sorted(path.glob(kind))]
    for file in files:
        size, block = file.stat().st_size, 2**16
        stride = max(block, size // 64) if file.suffix == ".safetensors" else block
        total.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            for start in range(0, size, stride):
                content.seek(start)
                total.update(content.read(block))
    return total.hexdigest()


def environment():
    """Versions and git commit, for the record."""
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
    return {"commit": commit} | {name: metadata.version(name) for name in ("torch", "transformers")}


GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


def local(path):
    """The path itself. Of hf://datasets/OWNER/NAME/FILE, and of GSM8K's own address, a copy that is downloaded once."""
    if "://" not in path:
        return path
    copy = Path("runs/cache/gsm8k", Path(path).name)
    try:
        if path.startswith("hf://"):
            from huggingface_hub import hf_hub_download
            owner, name, file = path.removeprefix("hf://datasets/").split("/", 2)
            return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
        if not copy.exists():
            from torch.hub import download_url_to_file
            copy.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(path, str(copy), hash_prefix=GSM8K_SHA256[copy.stem], progress=False)
        return str(copy)
    except Exception as error:                                    # each library has its own
        raise UserError(f"{path}: cannot be downloaded ({str(error)[:200]}); download it elsewhere and pass --data or "
                        "--heldout_data FILE (run.sh: DATA, HELDOUT_DATA)") from None


FROM_FILES = {"source": ("gsm8k", "groups")}
GENERATED_FLAWS = {"source": ("tiny", "gsm8k")}


@dataclass(frozen=True)
class DataSettings(Options):
    """Settings of `python data.py`."""
    run_dir: str = option("runs/tiny-math", "run folder", affects_result=False)
    task_type: str = option("math", "math or code; for the tiny world", choices=("math", "code"),
                            only={"source": ("tiny",)})
    source: str = option("tiny", "tiny: generated; gsm8k: built from GSM8K solutions; groups: TraceLift-Groups as they "
                                 "are, or HumanEval or MBPP lines (no traces: no reward model)",
                         choices=("tiny", "gsm8k", "groups"))
    data: str = option("", "training file, or hf://datasets/OWNER/NAME/FILE; empty with gsm8k: downloaded once from "
                           "its public repository", path=True, only=FROM_FILES)
    heldout_data: str = option("", "held-out file, in the same format", path=True, only=FROM_FILES)
    tests: str = option("", "tests of code groups in a file of their own: {problem_id, tests: [{input, output, "
                            "is_reward_test}]} a line", path=True, only={"source": ("groups",)})
    train: int = option(3000, "training groups at most", low=1)
    heldout: int = option(300, "held-out groups at most, and as many longer ones in the tiny world", low=1)
    negatives: int = option(4, "flawed traces per group", low=1, only=GENERATED_FLAWS)
    max_calculations: int = option(10**6, "use only problems whose solution has at most so many", low=1,
                                   only={"source": ("gsm8k",)})
    seed: int = option(0, "random seed for problems and flaws", low=0, only=GENERATED_FLAWS)


def load_groups(s):
    """{split: groups}. UserError for a split without groups, and for training problems that are held out as well."""
    wanted = {"train": s.train, "heldout": s.heldout} | ({"longer": s.heldout} if s.source == "tiny" else {})
    groups = {split: _split_groups(s, split, n) for split, n in wanted.items()}
    trained = {" ".join(group["problem"].split()) for group in groups["train"]}
    for group in groups["heldout"]:
        if " ".join(group["problem"].split()) in trained:
            raise UserError(f"{group['problem_id']} of --heldout_data is a training problem too; take it out of one")
    return groups


def _split_groups(s, split, n):
    """At most n groups of one split."""
    part, path = ("train", s.data) if split == "train" else ("test", s.heldout_data)
    spare = n + n // 4 + 4                                        # some problems allow too few flaws
    if s.source == "groups":
        if not path:
            raise UserError("--source groups: needs --data FILE and --heldout_data FILE")
        path = local(path)
        groups = read_groups(path)
        if s.tests:
            join_tests(groups, local(s.tests))
        groups = teachable(path, groups, n, "tests" if s.tests else "")
    elif s.source == "gsm8k":
        path = local(path or GSM8K_URL.format(part))
        problems = [problem_of(group) for group in teachable(path, read_groups(path), 10**9, "trace")]
        problems = [p for p in problems if len(_ANNOTATION.findall(p.reference_solution)) <= s.max_calculations]
        random.Random(s.seed).shuffle(problems)
        groups = build_groups(problems[:spare], s.negatives, s.seed)
    else:
        groups = build_groups(tiny_problems(s.task_type, spare, s.seed, split), s.negatives, s.seed)
    if not groups:
        raise UserError(f"{path or s.source}: no problem allows {s.negatives} flawed traces; lower --negatives")
    return groups[:n]


def main(argv):
    """The command: writes RUN_DIR/groups/*.jsonl."""
    settings = parse_settings(DataSettings, argv, "data.py")
    groups = Path(settings.run_dir) / "groups"
    reads = tuple(filter(None, (settings.data, settings.heldout_data, settings.tests)))
    with stage_folder(groups, settings, reads) as folder:
        if folder:
            for split, made in load_groups(settings).items():
                write_groups(folder / f"{split}.jsonl", made)
    for path in sorted(groups.glob("*.jsonl")):
        print(f"{path}: {len(read_groups(path))} groups")
    print(f"next: python executor.py --run_dir {settings.run_dir}")


if __name__ == "__main__":
    run_command(main)
