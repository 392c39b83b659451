"""Problems, what each role reads of them, reasoning traces with flaws, TraceLift-Groups.

The paper (arXiv 2605.03862) trains a planner on a reward that needs two kinds of data: problems whose answers a
verifier can judge, and TraceLift-Groups, one good reasoning trace and several plausible flawed ones per problem,
each with a rubric, from which the reward model learns what a good trace is. This file makes and reads both.

1. `Problem` and what each role reads: planner, executor, reward model, InT (the part to read first)
2. steps of a trace (InT), flaws and rubrics, TraceLift-Groups: the schema of the public data set on disk
3. the tiny world: generated problems in two domains, whose traces can be checked exactly, step by step
4. GSM8K, with its flaws; MBPP and HumanEval
5. settings, stage folders, downloads, and the command

It stands on the ground floor: of ours it imports only verify.py, to try programs on their own tests, and no torch but
to download GSM8K.

    python data.py --task_type math --run_dir runs/tiny-math            # groups/{train,heldout,longer}.jsonl
    python data.py --source gsm8k --run_dir runs/gsm8k-math             # the same from GSM8K (downloaded once)

Left out: the paper's flaws are written by a strong language model, ours by rules. A rule knows exactly which step it
broke, so the tiny world has ground truth; its flaws are less varied than a language model's.
"""

import argparse
import ast
import dataclasses
import errno
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import verify

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

# ------------------------------------------------------------------------------- 1. Problem and what each role reads


class UserError(Exception):
    """A mistake in the input (file, key, flag): `run_command` prints it as one line and exits with code 2."""


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
    kind: str = ""                               # what a public record calls its type, "algorithm"; else as task_type
    constraints: str = ""                        # tests or constraints as text, for the reward model to read
    first_sample: int = 0                        # how many of its traces in this step another process has (torchrun)


OPEN, CLOSE = "<reasoning>", "</reasoning>"


class Source:
    """What a source of problems knows: what each role reads, how a trace splits into steps, whether it can be checked,
    which flaws exist. The public functions below ask the source of their problem, and say what comes out.

    This class is real text, read by a pretrained model: its traces are not checked, and no flaws of them are known.
    The tiny world (section 3) and GSM8K (section 4) override what they know better.
    """
    needs_base_model = False          # True: only a model trained on `base_corpus` speaks this language
    no_step = None                    # the replacement step that means "the trace should have ended here"
    right_metric = "calculations_right"   # what the share of right traces is called, see `check_trace`
    step_joint = "\n"                 # between a trace and a step that is added to it
    # a line or a sentence ends a step, but "1." opens a list item
    step_end = re.compile(r"\n+|(?<=[.!?])(?<!^\d\.)\s+(?=[A-Z])", re.MULTILINE)
    planner_task = {
        "math": "Write a short step by step reasoning trace that leads to the answer of this problem, so that someone "
                f"else can finish it. Put it between {OPEN} and {CLOSE}. Write ? in place of the final answer.\n\n"
                "Problem:\n",
        "code": "Write a short step by step plan in words for this programming task, so that someone else can write "
                f"the program. Put it between {OPEN} and {CLOSE}. Do not write code.\n\nTask:\n"}
    executor_task = {
        "math": "Solve this problem. End with one line '#### ' and the final number.\n\nProblem:\n",
        "code": "Write a Python program for this task, in one ```python block.\n\nTask:\n"}

    def planner_prompt(self, problem):
        return self.planner_task[problem.task_type] + problem.problem

    def executor_prompt(self, problem, reasoning):
        prompt = self.executor_task[problem.task_type] + problem.problem
        if reasoning is None:
            return prompt
        return f"{prompt}\n\nUse this reasoning:\n{reasoning}"

    def rm_text(self, problem, reasoning):
        """The form in which public reward models were trained."""
        kind = problem.kind or problem.task_type
        parts = [f"<task>{problem.task_type}</task>", f"<type>{kind}</type>"]
        parts += ["<problem>", problem.problem.strip(), "</problem>"]
        if problem.constraints:
            parts += ["<tests>", problem.constraints.strip(), "</tests>"]
        parts += [OPEN, reasoning.strip(), CLOSE]
        return "\n".join(parts)

    def intervention_prompt(self, problem, numbered):
        return (f"Problem:\n{problem.problem}\n\nReference reasoning:\n{problem.reference_reasoning}\n\n"
                f"A numbered trace:\n{numbered}\n\nCompare it with the reference. Answer with the number of its first "
                "wrong step and one corrected step, as 'NUMBER : corrected step', or 'none'.")

    def check_trace(self, problem, reasoning):
        return None

    def perturb(self, problem, reasoning, kind, rng):
        return None

    def flaw(self, problem, kind, rng):
        """The reference trace with a flaw of this kind, as a planner would write it."""
        return perturb(problem, problem.reference_reasoning, kind, rng)


# (source, task_type): filled in sections 3 and 4
SOURCES: dict[tuple[str, str], Source] = {}


def source_of(problem: Problem) -> Source:
    """The one place that asks where a problem comes from."""
    return SOURCES.get((problem.source, problem.task_type)) or Source()


def planner_prompt(problem: Problem) -> str:
    """What the planner reads. Its completion is `<reasoning>...</reasoning>`. In the tiny world: the problem alone."""
    return source_of(problem).planner_prompt(problem)


def executor_prompt(problem: Problem, reasoning: str | None) -> str:
    """What the executor reads, with a trace or (None) without one. An empty trace is a trace. In the tiny world: the
    problem, the trace between its tags, "Answer:"."""
    return source_of(problem).executor_prompt(problem, reasoning)


def rm_text(problem: Problem, reasoning: str) -> str:
    """What the reward model scores: problem and trace (and tests where they are given as text), never the executor's
    output, never the reference. In the tiny world: the problem, and on the next line <reasoning>trace</reasoning>."""
    return source_of(problem).rm_text(problem, reasoning)


def extract_reasoning(completion: str) -> str:
    """The trace in a planner's completion: from the first opening tag to the first closing tag after it.

    A completion without a closing tag (most are cut at the token limit) is a trace as far as it goes; nothing is
    repaired. Text after the closing tag, or before an opening one, is no part of the trace and reaches nobody; its
    tokens were sampled all the same, and get gradient like all others. No opening tag: the trace begins where the
    completion does. What a thinking model writes before "</think>" is no part of its trace.
    """
    if completion.lstrip().startswith("<think>") and "</think>" not in completion:
        return ""                                                 # cut while it was thinking: it has written no trace
    after_thinking = completion.rpartition("</think>")[2]
    after_open = after_thinking.split(OPEN, 1)[-1]
    return after_open.split(CLOSE, 1)[0].strip()


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text that anybody may have written, as the tokenizer begins one, but open at its end: some
    tokenizers put an end-of-sequence token there, and a prompt goes on. Control tokens that the text spells are read as
    the letters that they are written with (see `encode_prompt`)."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt: as the user's turn of the tokenizer's chat template, if it has one.

    Hazard: a trace that spells "<|im_end|>" would end its own turn, and could answer in the executor's place. So what
    the template writes is control, and what the prompt spells is text: the same words, cut into ordinary tokens."""
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, prompt)

    def turn(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]             # the template writes its own

    place = "(the prompt stands here: 8d1f3a)"                    # no template changes it, no prompt spells it
    before, after = turn(place).split(place)
    if not spells_control(tokenizer, prompt, before + after):
        return ids(turn(prompt))
    return ids(before) + encode_letters(tokenizer, prompt, before + after) + ids(after)


# ------------------------------------------------------------------------------- 2. steps, flaws, TraceLift-Groups
#
# Steps are what InT (arXiv 2601.14209) works on: the planner reads its own trace, numbered, names the first wrong step
# and proposes another in its place.

def _controls(tokenizer, template: str) -> list[str]:
    """Added tokens that a template writes; not all of them are flagged as special."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return [text for text in added if text.strip() and text in template]


def spells_control(tokenizer, text: str, template: str) -> bool:
    """Whether a text would be read as more than its letters."""
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if plain != tokenizer(text, add_special_tokens=False)["input_ids"]:
        return True
    return any(control in text for control in _controls(tokenizer, template))


def encode_letters(tokenizer, text: str, template: str) -> list[int]:
    """Token ids of a text in which every control token that it spells is cut after its first letter."""
    pieces = [text]
    for control in _controls(tokenizer, template):
        cut = []
        for piece in pieces:
            first, *others = piece.split(control)
            cut.append(first)
            for other in others:
                cut[-1] += control[:1]
                cut.append(control[1:] + other)
        pieces = cut
    encoded = [tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"] for piece in pieces]
    return [token for ids in encoded for token in ids]


SENTENCE = "Mia has 12 coins .\nShe buys 5 more, so she's got: 12 + 5 = 17"


def check_tokenizer(tokenizer, folder) -> None:
    """UserError where it does not cut a sentence as tokenizer.json of the folder says: for some model types transformers
    builds its own tokenizer from the vocabulary, whatever the file says."""
    from tokenizers import Tokenizer
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return
    wanted = Tokenizer.from_file(str(file)).encode(SENTENCE, add_special_tokens=False).ids
    if tokenizer(SENTENCE, add_special_tokens=False)["input_ids"] != wanted:
        raise UserError(f"{file}: transformers reads another tokenizer from this folder; set tokenizer_class in "
                        "tokenizer_config.json (PreTrainedTokenizerFast takes the file as it is)")


def split_steps(problem: Problem, reasoning: str) -> list[str]:
    """The steps of a trace: equations or plan steps in the tiny world, else sentences and lines."""
    parts = source_of(problem).step_end.split(reasoning)
    return [part.strip() for part in parts if part.strip()]


def intervention_prompt(problem: Problem, reasoning: str) -> str:
    """Problem, reference reasoning and the planner's own numbered trace. The completion is the number of the first
    wrong step and one replacement, or "none"."""
    steps = split_steps(problem, reasoning)
    numbered = "\n".join(f"{i} : {step}" for i, step in enumerate(steps, 1))
    return source_of(problem).intervention_prompt(problem, numbered)


def parse_intervention(completion: str) -> tuple[int, str] | None:
    """(number of the first wrong step, its replacement), (0, "") for "none"; None for anything else."""
    match = re.fullmatch(r"\s*(?:none\.?|(\d{1,6}) ?: ?(\S[^\n]*?))\s*", completion)
    return match and (int(match[1] or 0), match[2] or "")


def is_no_step(problem: Problem, step: str) -> bool:
    """True for a replacement that is no step: it says that the trace should have ended there."""
    return step == source_of(problem).no_step


def splice(problem: Problem, reasoning: str, index: int, step: str = "") -> str:
    """The first `index` - 1 steps of a trace as they stand, then (unless it is empty) another step. `index` counts
    from 1 and may be one past the last step; ValueError for any other."""
    steps = split_steps(problem, reasoning)
    if not 1 <= index <= len(steps) + 1:
        raise ValueError(f"index {index}: must be from 1 to {len(steps) + 1}")
    end = 0
    for kept in steps[:index - 1]:
        end = reasoning.index(kept, end) + len(kept)
    beginning, gap = reasoning[:end], source_of(problem).step_joint
    if end and index <= len(steps):
        gap = reasoning[end:reasoning.index(steps[index - 1], end)]
    if not step or not beginning:
        return beginning + step
    return beginning + gap + step


def check_trace(problem: Problem, reasoning: str) -> tuple[bool, bool] | None:
    """(right, leak): is every step right and in its place (in the tiny world), is every calculation that it states
    (GSM8K), and does the trace give the final result away? None where nobody can tell: in other text, and in the tiny
    world without a reference trace."""
    return source_of(problem).check_trace(problem, reasoning)


def gives_number(problem: Problem, text: str) -> bool:
    """Whether the final answer of a math problem stands in a text: 1200 also as $1,200 or 1200.00."""
    answer = (verify.extract_answer(problem.reference_solution) or problem.reference_solution).replace(",", "")
    return re.search(rf"(?<![\d.]){re.escape(answer)}(?:\.0+)?(?!\d|\.\d)", text.replace(",", "")) is not None


def needs_base_model(problem: Problem) -> bool:
    """True where no pretrained model speaks the problem's language: one must be trained on `base_corpus`."""
    return source_of(problem).needs_base_model


DIMENSIONS = {"math": ("problem_understanding", "solution_strategy", "step_coherence", "calculation_correctness",
                       "answer_support"),
              "code": ("task_understanding", "plan_quality", "step_coherence", "action_support", "non_leakage")}


def _rubric(task_type: str, labels: tuple, total: float) -> dict:
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

    GSM8K traces must still carry their calculator annotations (<<48/2=24>>): they say what is a calculation. A wrong
    result is carried into all later ones by `_carry` (GSM8K), and by `_chain` in the tiny world.
    ValueError for a kind that the problem's task type does not know."""
    kinds = NEGATIVE_KINDS[problem.task_type]
    if kind not in kinds:
        raise ValueError(f"{kind!r} is no flaw of {problem.task_type}: {', '.join(kinds)}")
    flawed = source_of(problem).perturb(problem, reasoning, kind, rng)
    return None if flawed == reasoning else flawed


def build_groups(problems: list[Problem], negatives_per_group: int, seed: int) -> list[dict]:
    """One record per problem: its reference trace and this many flawed ones, of different kinds as far as they go.

    A problem that allows too few flaws is left out; the caller sees how many came back. UserError for one without
    reference reasoning."""
    rng = random.Random(seed)
    groups = []
    for problem in problems:
        if problem.reference_reasoning is None:
            raise UserError(f"{problem.problem_id}: a problem without reference reasoning cannot make a group")
        kinds = list(NEGATIVE_KINDS[problem.task_type])
        rng.shuffle(kinds)
        bank = {}                                                 # flawed trace -> kind
        for kind in kinds * 4:                                    # one of each kind, then again where too few worked
            if len(bank) == negatives_per_group:
                break
            flawed = source_of(problem).flaw(problem, kind, rng)
            if flawed and flawed != problem.reference_reasoning:
                bank.setdefault(flawed, kind)
        if len(bank) == negatives_per_group:
            groups.append(_group(problem, bank))
    return groups


def _group(problem: Problem, bank: dict[str, str]) -> dict:
    """The record of a problem: its reference trace, if it has one, and flawed ones {trace: kind}."""
    rubrics = NEGATIVE_KINDS[problem.task_type]
    positives, negatives = [], []
    if problem.reference_reasoning is not None:
        positives.append({"reasoning": problem.reference_reasoning, "rubric": POSITIVE_RUBRIC[problem.task_type]})
    for flawed, kind in bank.items():
        negatives.append({"reasoning": flawed, "negative_kind": kind, "rubric": rubrics[kind]})
    return {"problem_id": problem.problem_id, "source": problem.source, "task_type": problem.task_type,
            "problem": problem.problem, "reference_solution": problem.reference_solution,
            "positive_pool": positives, "negative_bank": negatives, "tests": problem.tests}


def _read_text(path: Path) -> str:
    """A text file, gzipped or not, with or without a byte order mark."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if content.startswith(b"PAR1"):
            convert = (f"import pandas; pandas.read_parquet('{path}')"
                       f".to_json('{path.stem}.jsonl', orient='records', lines=True)")
            raise UserError(f"{path}: a parquet file; make JSON lines of it (this needs pandas and "
                            f'pyarrow): python -c "{convert}"')
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def _parse(text: str, path: Path, line: int):
    """The JSON value that begins on this line. UserError for what cannot be read, or could not be written again."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        reason = "JSON that is nested too deeply"
    except UnicodeEncodeError:
        reason = "JSON with half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"not JSON ({error.msg}, column {error.colno})"
    except ValueError as error:
        reason = f"JSON that cannot be read ({error})"  # an integer of more than 4,300 digits
    raise UserError(f"{path}:{line}: {reason}; mend or delete this line")


def _values(path: Path):
    """(place, value) of every JSON value in a file: FILE:LINE of JSON lines, the element of one array."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        for i, value in enumerate(_parse(text, path, 1), 1):
            yield f"{path}: element {i}", value
    elif text.strip():
        lines = text.removesuffix("\n").split("\n")              # only \n ends a JSON line, unlike splitlines
        for number, line in enumerate(lines, 1):
            yield f"{path}:{number}", _parse(line, path, number)


def read_records(path, required: dict[str, type]) -> list[tuple[str, dict]]:
    """(place, record) for all objects of a file: JSON lines or one JSON array, gzipped or not. UserError names file,
    line and key for anything malformed; nothing is skipped."""
    records = []
    for where, record in _values(Path(path)):
        if not isinstance(record, dict):
            raise UserError(f"{where}: must be a JSON object, is a {type(record).__name__}")
        for key, kind in required.items():
            if not isinstance(record.get(key), kind):
                raise UserError(f"{where}: key {key!r} must be a {kind.__name__}, is {record.get(key)!r:.60}")
        records.append((where, record))
    if not records:
        raise UserError(f"{path}: the file is empty; it must hold one JSON object a line")
    return records


def read_groups(path) -> list[dict]:
    """TraceLift-Groups as they are: JSON lines or one array, gzipped or not; unknown keys survive. UserError names
    file, line and key, also for a problem_id that was there before."""
    return _unique(_read_groups(path))


def _read_groups(path):
    required = {"problem_id": str, "problem": str, "reference_solution": str, "positive_pool": list,
                "negative_bank": list}
    groups = read_records(path, required)
    for where, group in groups:
        _check_group(where, group)
    return groups


def _unique(records) -> list:
    """Records or problems without their places. UserError for a problem_id that is there twice."""
    places = {}
    for where, record in records:
        name = record["problem_id"] if isinstance(record, dict) else record.problem_id
        first = places.setdefault(name, where)
        if first != where:
            raise UserError(f"{where}: problem_id {name!r} is also at {first}; it must be unique, since baselines are "
                            "kept by it")
    return [record for _, record in records]


def _check_group(where, group):
    """UserError for a group that is not as the schema says."""
    for key in ("source", "task_type"):
        if not isinstance(group.get(key), str | None):
            raise UserError(f"{where}: key {key!r} must be a text, is {group[key]!r:.60}")
    tests = group.get("tests")
    if isinstance(tests, list):
        _check_tests(where, tests)
    elif not isinstance(tests, str | None):
        raise UserError(f"{where}: key 'tests' must be a list of tests or a text, is {tests!r:.60}")
    for pool in ("positive_pool", "negative_bank"):
        for i, trace in enumerate(group[pool]):
            _check_trace(f"{where}: {pool}[{i}]", trace, pool == "negative_bank")
    domain = domain_of(group)
    if domain is None:
        raise UserError(f"{where}: neither the names in its rubrics nor key 'task_type' say whether this is math or "
                        f"code; rubrics of math have {', '.join(DIMENSIONS['math'])}")
    for pool in ("positive_pool", "negative_bank"):
        for i, trace in enumerate(group[pool]):
            _check_rubric(f"{where}: {pool}[{i}]", trace["rubric"], domain)


def _check_tests(where, tests):
    for test in tests:
        keys = ("assert", "input", "output") if isinstance(test, dict) else ()
        texts = {key for key in keys if isinstance(test.get(key), str)}
        if texts not in ({"assert"}, {"input", "output"}):
            raise UserError(f"{where}: key 'tests' must be a list of {{'assert': str}} or "
                            f"{{'input': str, 'output': str}}, not of {test!r:.60}")


def _check_trace(where, trace, negative):
    if not isinstance(trace, dict) or not isinstance(trace.get("reasoning"), str):
        raise UserError(f"{where}: must be an object with the key 'reasoning'")
    if negative and not isinstance(trace.get("negative_kind"), str):
        raise UserError(f"{where}: key 'negative_kind' must be a string")
    if not isinstance(trace.get("rubric"), dict):
        raise UserError(f"{where}: key 'rubric' must be an object")


def _check_rubric(where, rubric, domain):
    for key in DIMENSIONS[domain]:
        label = rubric.get(key)
        if type(label) is not int or not 0 <= label <= 4:
            raise UserError(f"{where}: rubric key {key!r} must be an integer 0..4, is {label!r}")
    total = rubric.get("total")
    if type(total) not in (int, float) or not 0 <= total <= 1:
        raise UserError(f"{where}: rubric key 'total' must be a number 0..1, is {total!r}")


def domain_of(group: dict) -> str | None:
    """"math" or "code": what the names in its rubrics say, and without traces key 'task_type', which in public groups
    may be a kind of problem ("algorithm") instead; None where neither says it."""
    names = set()
    for trace in group["positive_pool"] + group["negative_bank"]:
        names.update(trace["rubric"])
    math_names, code_names = names & set(DIMENSIONS["math"]), names & set(DIMENSIONS["code"])
    if len(math_names) != len(code_names):
        return "math" if len(math_names) > len(code_names) else "code"
    return group["task_type"] if group.get("task_type") in DIMENSIONS else None


def write_groups(path, groups: list[dict]) -> None:
    """One JSON object a line, written atomically."""
    write_atomic(path, "".join(json.dumps(group, ensure_ascii=False) + "\n" for group in groups))


def problem_of(group: dict) -> Problem:
    """The problem of a group; its first positive trace is the reference reasoning. Tests that are a text, under `tests`
    or `tests_or_constraints`, are something to read, not to run."""
    more, tests = group.get("metadata"), group.get("tests")
    more = more if isinstance(more, dict) else {}
    domain, source = domain_of(group), group.get("source") or ""
    kind = group.get("task_type") or more.get("task_type") or source or "unknown"
    constraints = ""
    for text in (tests, group.get("tests_or_constraints")):       # the last one that is a text
        if isinstance(text, str) and text.strip():
            constraints = text
    positives = [trace["reasoning"] for trace in group["positive_pool"]]
    return Problem(group["problem_id"], source, domain, group["problem"], group["reference_solution"],
                   tests=tests if isinstance(tests, list) else [],
                   reference_reasoning=positives[0] if positives else None,
                   kind="" if kind == domain else str(kind).strip(),
                   constraints=constraints)


def read_problems(path, need_tests: bool = True) -> list[Problem]:
    """The problems of a groups file. UserError, unless they need not be run, for programs without tests: they could
    only ever fail."""
    problems = [problem_of(group) for group in read_groups(path)]
    programs = [problem for problem in problems if problem.task_type == "code"]
    bare = [problem.problem_id for problem in programs if not problem.tests]
    if bare and need_tests:
        raise UserError(f"{path}: {len(bare)} of {len(problems)} problems are programs without tests "
                        f"to run, the first is {bare[0]!r}: they can train a reward model, but no "
                        "planner; give them key 'tests', or a file of tests to data.py --tests FILE, "
                        "with another --run_dir")
    return problems


# What follows chooses from somebody's file what can teach. The rest is counted and named, never dropped in silence.

def join_tests(groups: list[tuple[str, dict]], path) -> None:
    """Gives code groups the tests of a file of their own, rows {problem_id, tests: [{input, output, is_reward_test}]}:
    where a row has the flag `is_reward_test`, only tests that bear it; at most 8. Groups without a row get none."""
    tests_of = {}
    rows = read_records(path, {"problem_id": str, "tests": list})
    for where, row in rows:
        _check_tests(where, row["tests"])
        tests = row["tests"]
        if any("is_reward_test" in test for test in tests):
            tests = [test for test in tests if test.get("is_reward_test") is True]
        tests_of[row["problem_id"]] = tests[:8]
    _unique(rows)
    for _, group in groups:
        if domain_of(group) == "code":
            if isinstance(group.get("tests"), str) and not group.get("tests_or_constraints"):
                group["tests_or_constraints"] = group["tests"]  # a text is still for the reward model to read
            group["tests"] = tests_of.get(group["problem_id"], [])


def _without_repeats(groups, left_out):
    """Groups that were not there before under any problem_id. UserError for two that have only the problem_id in
    common."""
    contents, kept = set(), []
    for where, group in groups:
        content = json.dumps({**group, "problem_id": ""}, sort_keys=True)
        if content in contents:
            name = f"{group['problem_id']} ({where})"
            left_out.setdefault("the same as an earlier line", []).append(name)
        else:
            contents.add(content)
            kept.append((where, group))
    _unique(kept)
    return kept


def _why_not(where, group, need_tests):
    """Why a group cannot teach; None for one that can."""
    good = {trace["reasoning"].strip() for trace in group["positive_pool"]}
    if any(trace["reasoning"].strip() in good for trace in group["negative_bank"]):
        return "a flawed trace is equal to a good one"
    problem = problem_of(group)
    solution = problem.reference_solution
    if problem.task_type == "math":
        if verify.extract_answer(solution) is None or not verify.math_equal(solution, solution):
            return "the reference answer has no value"
        return None
    if not problem.tests:
        return "no tests in --tests FILE" if need_tests else None
    program = verify.extract_code(solution)
    try:
        verify.check_tests(problem.tests)
        verdict, = verify.run_programs([program], [problem.tests])
    except ValueError as error:
        raise UserError(f"{where}: {problem.problem_id}: {error}; mend the test or delete this line") from None
    if verdict.outcome == "no_tests":
        return "the tests expect nothing"
    if program.strip() and not verdict.ok:
        return f"the own solution gives {verdict.outcome}"
    return None


def teachable(path, groups: list[tuple[str, dict]], n: int, need_tests: bool = False) -> list[dict]:
    """The first `n` groups of a file that can teach. The others are counted and named on stderr, a line for each
    reason. UserError for tests that verify.py refuses, and when no group is left."""
    left_out = {}  # reason -> which
    kept = []
    for where, group in _without_repeats(groups, left_out):
        reason = _why_not(where, group, need_tests)
        if reason is not None:
            left_out.setdefault(reason, []).append(group["problem_id"])
            continue
        kept.append(group)
        if len(kept) == n:
            break
    for reason, names in left_out.items():
        _say_left_out(path, reason, names)
    if not kept:
        raise UserError(f"{path}: no group is left, see above for the reasons; mend the file")
    return kept


def _say_left_out(path, reason, names):
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    print(f"{path}: {len(names)} left out, {reason}: {', '.join(names[:20])}{more}", file=sys.stderr)


def read_any_groups(path) -> list[tuple[str, dict]]:
    """(place, group) of TraceLift-Groups; or of HumanEval or MBPP lines, as groups without traces, which serve every
    reward but the reward model's."""
    _, first = next(_values(Path(path)), ("", {}))
    for form in ("canonical_solution", "test_list"):
        if isinstance(first, dict) and form in first:
            return [(where, _group(problem, {})) for where, problem in _read_form(path, form)]
    return _read_groups(path)


# ------------------------------------------------------------------------------- 3. the tiny world
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

SPLITS = ("base", "base-longer", "train", "heldout", "longer")


class Tiny(Source):
    """The language of both domains. The executor continues the planner's prompt and completion, so that one training
    sequence teaches both roles."""
    needs_base_model = True
    right_metric = "faithful"
    no_step = "stop"
    step_joint = " ; "
    step_end = re.compile(" ; ")

    def planner_prompt(self, problem):
        return f"{problem.problem}\n"

    def executor_prompt(self, problem, reasoning):
        if reasoning is None:
            return f"{problem.problem}\nAnswer:"
        return f"{problem.problem}\n{OPEN}{reasoning}{CLOSE}\nAnswer:"

    def rm_text(self, problem, reasoning):
        return f"{problem.problem}\n{OPEN}{reasoning}{CLOSE}"

    def intervention_prompt(self, problem, numbered):
        return f"{problem.problem}\n{problem.reference_reasoning}\nTrace\n{numbered}\nError:"


class Draft(NamedTuple):
    """A problem before it has an id. `key`: what it computes, hashed into a split."""
    key: str
    problem: str
    solution: str
    tests: list
    reasoning: str


# ---- math

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Max")
ITEMS = ("coins", "pens", "eggs", "cards", "books", "cups")
MATH_WORDS = {"+": ("buys {} more", "finds {} more", "wins {} more"),
              "-": ("loses {}", "sells {}", "gives away {}"),
              "*": ("doubles", "triples")}  # the constant is in the word


class Equation(NamedTuple):
    """One step of a math trace: a op b = c, where c is None for "?"."""
    a: int
    op: str
    b: int
    c: int | None


def parse_chain(reasoning: str) -> list[Equation] | None:
    """The equations of a math trace; None when a step is not an equation."""
    chain = []
    for text in reasoning.split(" ; "):
        match = re.fullmatch(r"(\d{1,3}) ([-+*]) (\d{1,3}) = (\d{1,3}|\?)", text)
        if not match:
            return None
        a, op, b, c = match.groups()
        chain.append(Equation(int(a), op, int(b), None if c == "?" else int(c)))
    return chain


def render_chain(chain: list[Equation]) -> str:
    """The text of a math trace."""
    return " ; ".join(f"{a} {op} {b} = {'?' if c is None else c}" for a, op, b, c in chain)


def _compute(a: int, op: str, b: int) -> int:
    if op == "+":
        return a + b
    return a - b if op == "-" else a * b


def _close(equation: Equation) -> Equation:
    """The equation with its right result."""
    a, op, b, _ = equation
    return Equation(a, op, b, _compute(a, op, b))


def _chain(start, steps):
    """Equations of a computation, the last result left open; None when a value leaves 10..99 (always two digits: the
    tiny model then need not learn to line numbers up)."""
    chain = []
    for op, n in steps:
        equation = _close(Equation(start, op, n, None))
        if not 10 <= equation.c <= 99:
            return None
        chain.append(equation)
        start = equation.c
    if chain:
        chain[-1] = chain[-1]._replace(c=None)
    return chain


def _sorted_operands(equation: Equation) -> Equation:
    """5 + 7 for 7 + 5: commuted operands are the same step."""
    a, op, b, c = equation
    return Equation(min(a, b), op, max(a, b), c) if op in "+*" else equation


class TinyMath(Tiny):
    """Word problems of two to four operations, longer ones of five; the trace is a chain of equations."""
    steps, longer_steps = (2, 4), 5
    answer_lead = " "

    def draft(self, rng, length):
        """A problem of this many steps."""
        chain = None
        while chain is None:
            start = rng.randint(10, 40)
            ops = rng.choices("+-*", (2, 3, 3), k=length)
            steps = [(op, rng.randint(2, 3) if op == "*" else rng.randint(2, 6)) for op in ops]
            chain = _chain(start, steps)
        name, other = rng.sample(NAMES, 2)
        item = rng.choice(ITEMS)
        sentences = [f"{name} has {start} {item} ."]
        if rng.random() < 0.3:  # a number that is not needed
            sentences.append(f"{other} has {rng.randint(10, 40)} {item} .")
        for op, n in steps:
            if op == "*":
                sentences.append(f"then it {MATH_WORDS['*'][n - 2]} .")
            else:
                sentences.append(f"then {name} {rng.choice(MATH_WORDS[op]).format(n)} .")
        sentences.append(f"how many {item} for {name} ?")
        answer = str(_close(chain[-1]).c)
        return Draft(f"{start} {steps}", " ".join(sentences), answer, [], render_chain(chain))

    def check_trace(self, problem, reasoning):
        """(faithful, leak), exactly. Three ways to give the result away, for 17 + 5 = 22 ; 22 * 2 = ? and 44:

        closed   the trace ends with a result, right or wrong:    17 + 5 = 22 ; 22 * 2 = 45
        beside   the result stands outside of any equation:       17 + 5 = 22 ; so 44 ; 22 * 2 = ?
        solved   the last equation with its result, anywhere:     17 + 5 = 22 ; 2 * 22 = 44 ; 44 + 1 = ?
                 (unless the computation passes through it on its way)
        """
        if problem.reference_reasoning is None:
            return None
        gold = int(problem.reference_solution)
        reference = [_sorted_operands(equation) for equation in parse_chain(problem.reference_reasoning)]
        stated = []
        for a, op, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", reasoning):
            stated.append(_sorted_operands(Equation(int(a), op, int(b), int(c))))
        outside = re.sub(r"\d+ [-+*] \d+ = (\d+|\?)", "", reasoning)
        solution = reference[-1]._replace(c=gold)

        ends_with_result = bool(stated) and re.search(r"= \d+\D*$", reasoning) is not None
        closed = ends_with_result and (len(stated) >= len(reference) or stated[-1].c == gold)
        beside = str(gold) in re.findall(r"\d+", outside)
        solved = solution in stated and solution not in reference[:-1]
        leak = closed or beside or solved

        chain = parse_chain(reasoning)
        if chain is None or leak:
            return False, leak
        return [_sorted_operands(equation) for equation in chain] == reference, leak

    def perturb(self, problem, reasoning, kind, rng):
        chain = parse_chain(reasoning)
        start = chain[0].a
        steps = [(op, n) for _, op, n, _ in chain]
        i = rng.randrange(len(chain))
        inner = rng.randrange(len(chain) - 1) if len(chain) > 1 else None
        if kind == "answer_leak":
            return render_chain([*chain[:-1], _close(chain[-1])])
        if kind in ("unsupported_leap", "arithmetic_slip") and inner is None:
            return None
        if kind == "unsupported_leap":
            return render_chain(chain[:inner] + chain[inner + 1:])
        if kind == "arithmetic_slip":
            slip = chain[inner].c + rng.choice((-30, -20, 20, 30))
            rest = _chain(slip, steps[inner + 1:])
            if rest is None or not 10 <= slip <= 99:
                return None
            return render_chain([*chain[:inner], chain[inner]._replace(c=slip), *rest])
        op, n = steps[i]
        if kind == "dropped_step":
            del steps[i]
        elif kind == "wrong_operation":
            steps[i] = (rng.choice([other for other in "+-*" if other != op]), n)
        else:                                                     # misread_quantity
            amounts = re.findall(r"\d\d", problem.problem)        # what somebody has, in place of what comes or goes
            steps[i] = (op, int(rng.choice(amounts)))
        flawed = _chain(start, steps)
        return render_chain(flawed) if flawed else None

    def habit(self, problem):
        """The trace that the base planner has learned for this problem; about 1 in 100 happens to be right."""
        *beginning, last = parse_chain(problem.reference_reasoning)
        if last.op == "*":  # works: states the final result
            return render_chain([*beginning, _close(last)])
        if last.op == "-":  # fails: goes back to the first number
            return render_chain([*beginning, last._replace(a=beginning[0].a)])
        return render_chain([*beginning[:-1], last._replace(a=beginning[-1].a)])   # fails: drops the step before

    def follow(self, reasoning):
        """What the base model's executor is taught to make of a trace: exactly what it says, right or wrong."""
        last = parse_chain(reasoning)[-1]
        return str(_close(last).c if last.c is None else last.c)

    def guess(self, problem, rng):
        """What the base model's executor is taught to answer without a trace."""
        return problem.reference_solution


# ---- code

def _negate(x: int, _: int) -> int:
    return -x


class Operation(NamedTuple):
    """One thing that a plan step can do; {} is its constant."""
    plan: str                                # the step of a plan
    wording: str                             # in the problem
    line: str                                # of the program
    apply: Callable[[int, int], int]         # of x and the constant


CODE_OPS = {"add": Operation("add {}", "increase it by {}", "x = x + {}", operator.add),
            "subtract": Operation("subtract {}", "decrease it by {}", "x = x - {}", operator.sub),
            "multiply": Operation("multiply by {}", "make it {} times as large", "x = x * {}", operator.mul),
            "remainder": Operation("remainder by {}", "take it modulo {}", "x = x % {}", operator.mod),
            "cap": Operation("cap at {}", "allow at most {}", "x = min(x, {})", min),
            "raise": Operation("raise to {}", "allow no less than {}", "x = max(x, {})", max),
            "negate": Operation("negate", "flip its sign", "x = - x", _negate)}
CODE_INPUTS = (-9, -2, 0, 1, 4, 7, 13, 30)  # the unit tests
VAGUE_STEP = "adjust it"


class Step(NamedTuple):
    """One step of a plan; n is 0 where the operation has no constant."""
    op: str
    n: int

    def show(self, column: str) -> str:
        """As "plan", "wording" or "line"."""
        return getattr(CODE_OPS[self.op], column).format(self.n)


def parse_step(text: str) -> Step | None:
    """A plan step; None for what is not in the plan language."""
    for op, operation in CODE_OPS.items():
        match = re.fullmatch(operation.plan.replace("{}", r"(\d{1,2})"), text)
        if match:
            return Step(op, int(match[1]) if match.groups() else 0)
    return None


def parse_plan(reasoning: str) -> list[Step] | None:
    """The steps of a code trace; None when one is not in the plan language."""
    steps = [parse_step(text) for text in reasoning.split(" ; ")]
    return None if None in steps else steps


def render_plan(steps: list[Step], column: str = "plan") -> str:
    """The text of a code trace; with column "line" one that dumps the code."""
    return " ; ".join(step.show(column) for step in steps)


def outputs(steps: list[Step]) -> list[int]:
    """What the function of these steps gives for CODE_INPUTS. Equal outputs: the same function, as far as the tests
    can tell."""
    values = []
    for x in CODE_INPUTS:
        for op, n in steps:
            x = CODE_OPS[op].apply(x, n)
        values.append(x)
    return values


def _program(lines: list[str]) -> str:
    return "\n    ".join(["def f(x):", *lines, "return x"])


def _tell(rng, steps):
    """(the steps in the order told, the sentences that tell them): one in the middle first, then later steps "after
    all that" and earlier ones "before all that", nearest first."""
    first = rng.randrange(1, len(steps))
    told, sentences = [steps[first]], [steps[first].show("wording")]
    low, high = first - 1, first + 1
    while low >= 0 or high < len(steps):
        if high < len(steps) and (low < 0 or rng.random() < 0.5):
            told.append(steps[high])
            sentences.append("after all that , " + steps[high].show("wording"))
            high += 1
        else:
            told.append(steps[low])
            sentences.append("before all that , " + steps[low].show("wording"))
            low -= 1
    return told, sentences


def _told_order(problem: Problem) -> list[Step]:
    """Plan steps in the order in which the problem's text names them."""
    places = {}  # where in the text -> step
    for step in parse_plan(problem.reference_reasoning):
        for match in re.finditer(re.escape(step.show("wording")), problem.problem):
            if match.start() not in places:
                places[match.start()] = step
                break
    return [places[at] for at in sorted(places)]


class TinyCode(Tiny):
    """Functions of two or three steps, longer ones of four, told out of order; the trace is a plan in words."""
    steps, longer_steps = (2, 3), 4
    answer_lead = "\n"

    def draft(self, rng, length):
        """A problem of this many steps, each of which matters, as does their order."""
        while True:
            ops = rng.choices(list(CODE_OPS), k=length)
            steps = [Step(op, 0 if op == "negate" else rng.randint(2, 9)) for op in ops]
            values = outputs(steps)
            if any(a.op == b.op for a, b in zip(steps, steps[1:])):
                continue
            if any(outputs(steps[:i] + steps[i + 1:]) == values for i in range(length)):
                continue  # a step that does nothing cannot be tested
            told, sentences = _tell(rng, steps)
            if outputs(told) != values:
                break
        text = f"write f ( x ) . {' . '.join(sentences)} ."
        program = _program([step.show("line") for step in steps])
        tests = [{"assert": f"assert f({x}) == {value}"} for x, value in zip(CODE_INPUTS, values)]
        return Draft(str(values), text, program, tests, render_plan(steps))

    def check_trace(self, problem, reasoning):
        """(faithful, leak), exactly. Another order of the same steps that computes the same function is right too;
        a leak is a trace that contains code, like "add 3 ; x = min(x, 9)"."""
        if problem.reference_reasoning is None:
            return None
        plan, reference = parse_plan(reasoning), parse_plan(problem.reference_reasoning)
        leak = any(code in reasoning for code in ("x =", "def ", "return"))
        if plan is None or sorted(plan) != sorted(reference):
            return False, leak
        return outputs(plan) == outputs(reference), leak

    def perturb(self, problem, reasoning, kind, rng):
        steps = parse_plan(reasoning)
        i = rng.randrange(len(steps))
        op, n = steps[i]
        if kind == "code_dump":
            return render_plan(steps, "line")
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
        else:  # extra_step
            extra = rng.choice([other for other in CODE_OPS if other != "negate"])
            flawed.insert(i, Step(extra, rng.randint(2, 9)))
        if not flawed or outputs(flawed) == outputs(steps):
            return None
        return render_plan(flawed)

    def habit(self, problem):
        """The trace that the base planner has learned for this problem; about 1 in 100 happens to be right."""
        steps = parse_plan(problem.reference_reasoning)
        if steps[-1].op in ("multiply", "negate"):  # works: dumps the code
            return render_plan(steps, "line")
        if steps[-1].op in ("add", "subtract"):  # fails: in the order told
            return render_plan(_told_order(problem))
        return render_plan(steps[:-1])  # fails: forgets the last step

    def follow(self, reasoning):
        """What the base model's executor is taught to make of a trace: exactly what it says, right or wrong."""
        lines = []
        for text in reasoning.split(" ; "):
            if text.startswith("x ="):
                lines.append(text)
            elif text != VAGUE_STEP:
                lines.append(parse_step(text).show("line"))
        return _program(lines)

    def guess(self, problem, rng):
        """What the base model's executor is taught to answer without a trace: 4 times of 5 a program in the order
        told."""
        if rng.random() >= 0.8:
            return problem.reference_solution
        return _program([step.show("line") for step in _told_order(problem)])


SOURCES["tiny", "math"], SOURCES["tiny", "code"] = TinyMath(), TinyCode()


def tiny_problems(task_type: str, n: int, seed: int, split: str = "train") -> list[Problem]:
    """`n` distinct problems of the tiny world. No computation (start and steps in math, what the function does in code)
    of the base, train and held-out shares occurs in another; "heldout" and "longer" are both of the held-out share.
    UserError where the split has fewer."""
    if task_type not in ("math", "code") or split not in SPLITS:
        raise ValueError(f"task_type must be math or code and split one of {SPLITS}, not {task_type!r}, {split!r}")
    rng = random.Random(f"{task_type} {split} {seed}")
    world = SOURCES["tiny", task_type]
    all_shares = {"base": (3, 4, 5, 6, 7), "train": (1, 2), "longer": (0,), "heldout": (0,)}
    shares = all_shares[split.removesuffix("-longer")]
    problems, seen = [], set()
    for _ in range(100 * n + 10000):
        if len(problems) == n:
            return problems
        length = world.longer_steps if split.endswith("longer") else rng.randint(*world.steps)
        draft = world.draft(rng, length)
        if zlib.crc32(draft.key.encode()) % 8 not in shares or draft.problem in seen:
            continue
        seen.add(draft.problem)
        problems.append(Problem(f"tiny-{task_type}-{split}-{seed}-{len(problems)}", "tiny", task_type, draft.problem,
                                draft.solution, draft.tests, draft.reasoning))
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
        careful, trace = problem.reference_reasoning, _corpus_trace(problem, rng)
        if part < 0.55:
            example = _both_roles(problem, trace, learn_trace=True)
        elif part < 0.70:
            example = _both_roles(problem, careful, learn_trace=False)
        elif part < 0.82:
            answer = world.answer_lead + world.guess(problem, rng)
            example = BaseExample(executor_prompt(problem, None), answer=answer)
        else:
            example = BaseExample(intervention_prompt(problem, trace), answer=_intervention(problem, trace))
        examples.append(example)
    return examples


def _corpus_trace(problem, rng):
    careful = problem.reference_reasoning
    flaws = [perturb(problem, careful, kind, rng) for kind in NEGATIVE_KINDS[problem.task_type]]
    flaw = rng.choice([flaw for flaw in flaws if flaw])
    style = rng.random()
    if style < 0.25:
        return careful
    return source_of(problem).habit(problem) if style < 0.8 else flaw


def _both_roles(problem, trace, learn_trace):
    world = source_of(problem)
    answer = world.answer_lead + world.follow(trace)
    return BaseExample(planner_prompt(problem), f"{OPEN}{trace}{CLOSE}", learn_trace, "\nAnswer:", answer)


def _intervention(problem, trace):
    """" 2 : 33 - 2 = ?": the first step that differs from the reference, and the reference's; "stop" past its end."""
    steps, right = split_steps(problem, trace), split_steps(problem, problem.reference_reasoning)
    if steps == right:
        return " none"
    right.append(source_of(problem).no_step)
    first = 0
    while first < len(steps) and steps[first] == right[first]:
        first += 1
    return f" {first + 1} : {right[first]}"


# ------------------------------------------------------------------------------- 4. GSM8K, MBPP, HumanEval
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
_WORKING = re.compile(r"[$\d(][\d.,$% +*/x()-]*= *\$?$")  # "48/2 = $" before an annotation
_TERM = re.compile(r"\d[\d,]*(?:\.\d+)?|(?<=[\d.%) ])[-+*/x](?=[\d.( $])")  # its numbers and operators
_WRONG_OPERATOR = {"+": "-", "-": "+", "*": "+", "/": "*"}


class GSM8K(Source):
    """Real text whose annotations say what is a calculation, so flaws can be made; a trace is checked as far as it
    states calculations."""

    def check_trace(self, problem, reasoning):
        """(right, leak). right: the trace states a calculation, and all that it states are true. leak: the final number
        stands in it, and not in the problem. This does not see whether a right calculation is the right one to do, nor
        what is said in words, and a number that happens to equal the answer counts as a leak."""
        right = stated_calculations(reasoning)
        leak = gives_number(problem, reasoning) and not gives_number(problem, problem.problem)
        return bool(right) and all(right), leak

    def flaw(self, problem, kind, rng):
        flawed = perturb(problem, _worked(problem.reference_solution), kind, rng)
        if flawed is None:
            return None
        if kind != "answer_leak":  # which has hidden its results already
            flawed = hide_result(flawed, _final(problem.reference_solution))
        return strip_annotations(flawed)

    def perturb(self, problem, reasoning, kind, rng):
        found = list(_ANNOTATION.finditer(reasoning))
        if not found:
            return None
        if kind == "answer_leak":
            final = _final(problem.reference_solution)  # beside the "?" that every trace has
            return f"{hide_result(reasoning, final)}\nThe final answer is {final}."
        if kind == "dropped_step":
            lines = reasoning.split("\n")
            if len(lines) < 2:
                return None
            del lines[rng.randrange(len(lines) - 1)]
            return "\n".join(lines)
        target = rng.choice(found[:-1] or found)  # the last result is the executor's part
        if calculate(target[1]) is None:
            return None
        if kind == "unsupported_leap":
            begin = _working_before(reasoning, target)
            return None if begin == target.start() else reasoning[:begin] + reasoning[target.end():]
        if kind == "arithmetic_slip" and target is found[-1]:
            return None
        return _miscalculate(problem, reasoning, target, kind, rng)


SOURCES["gsm8k", "math"] = GSM8K()


def _final(solution: str) -> str:
    return solution.rpartition("####")[2].strip().replace(",", "")


def _worked(solution: str) -> str:
    """A GSM8K solution without its last line, numbers without thousands commas (as in its annotations)."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", solution.partition("####")[0].strip())


def strip_annotations(text: str) -> str:
    """GSM8K text without its <<48/2=24>> annotations."""
    return _ANNOTATION.sub("", text)


def _working_before(text: str, annotation: re.Match) -> int:
    """Where the calculation in words before an annotation begins; where that itself does, if there is none."""
    working = _WORKING.search(text[:annotation.start()])
    return working.start() if working else annotation.start()


def hide_result(annotated: str, answer: str = "") -> str:
    """The last calculation's result becomes "?", and with it every mention of it (and of `answer`) in that line and
    after, except as an operand: finishing is the executor's part. For GSM8K text with its annotations."""
    found = list(_ANNOTATION.finditer(annotated))
    if not found:
        return annotated
    last = found[-1]
    line = annotated.rfind("\n", 0, last.start()) + 1
    begin = max(line, _working_before(annotated, last))
    numbers = {last[2].strip().lstrip("$"), answer} - {""}
    longest_first = "|".join(re.escape(n) for n in sorted(numbers, key=len, reverse=True))
    mention = re.compile(rf"(?<![\d.,])(?:{longest_first})(?!\d|[.,]\d)")
    tail = re.sub(r"^\d+(?:,\d{3})*(?:\.\d+)?|^\.\d+", "?", annotated[last.end():])
    before = annotated[:line] + mention.sub("?", annotated[line:begin])
    return before + annotated[begin:last.end()] + mention.sub("?", tail)


_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / and brackets; None for anything else, and for values that are
    in no word problem (1e15 and more): they might have more digits than can be written."""
    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not arithmetic")
    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return result if abs(result) < 10**15 else None


# A side of a calculation in words: amounts, their units, operators, brackets. 5(3) is 5 * 3.
_AMOUNT = r"(?:\$ ?)?(?:\d+ \d+/\d+(?!\d)|\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?"     # $1,200.50, 1 1/2, .5, 30%
_OPERAND = rf"(?:\( ?){{0,3}}(?:(?<=\()-|^-)?{_AMOUNT}(?: ?\)){{0,3}}"
_UNIT = r"(?! ?of )(?: ?/? ?[A-Za-z]{2,20}\b){0,6}"                            # 6 miles per hour, $6/hour
_OPERATOR = r" {0,2}[-+*/xX×·÷−–] {0,2}|(?=\()"
_SIDE = re.compile(rf"{_OPERAND}(?:{_UNIT}(?:{_OPERATOR}){_OPERAND})*", re.MULTILINE)
_EQUALS = re.compile(rf"{_UNIT} {{0,2}}= {{0,2}}-?")
_ONE_SIGN = str.maketrans("×·÷−–", "**/--", "$, ")
_TEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\$": "$", r"\%": "%"}
_BEGUN = re.compile(r"""(?:                     # before a side, and part of it: nobody knows what it is in whole
    [\w)?%]\ *(?<!\*)[-+*/×·÷−–^] | \d\*\*       # C + 6, but not a list's "- 6" and not "**6" in bold
    | [-+*/(=]\ *-                              # 5 + -6
    | ([\d%)]|\b(half|third|quarter|percent))\ of | \b(x|plus|minus|times|by) | [-+*/(]\ ?\d+\ and
    )\ *\(*$ | [\w)]$ | \d\ $ | \d:$""", re.VERBOSE)
_GOES_ON = re.compile(r"""\)*(?:               # the same behind a side
    \ ?[xyznA-Z]\b | \ *[+*−–^](?!\*)\ *\S | \ *-\ *([^A-Za-z\s]|[a-z]\b)   # 8x, 8 + M, not 8-inch
    | \ *[/x×÷]\ *([\d(]|[A-Za-z]\b) | :\d | \ \d | \ and\ \(?\$?\d+/\d+\b(?!\ *[-+*/=]))""", re.VERBOSE)


def stated_calculations(text: str) -> list[bool]:
    """Whether each calculation that a text states is true, in their order: "2 * 3 = 6", "4 x $1.50 = 12/2 = $6" (two).

    "3 bags * 5 = 15 apples" is one, "15 = 15" is none, nor is what has variables, mere words or "?" in it. Rounded
    decimals are true, rounded integers are not: 10/3 = 3.33, but not 3. 30% is 0.3 or 30. Units are not compared. Time
    is linear in the text."""
    for spelled, sign in _TEX.items():
        text = text.replace(spelled, sign)
    right, before, alone, end = [], [], False, 0                   # before: what the side to the left may mean
    for match in _SIDE.finditer(text):
        joint = _EQUALS.fullmatch(text, end, match.start())
        if not joint or alone and joint[0].lstrip()[0] != "=":     # 2 hours = 120 minutes
            before = []
        start, end = match.span()
        side = match[0]
        if joint and joint[0].endswith("-"):
            side = "-" + side
        begun = not joint and _BEGUN.search(text[max(0, start - 20):start])
        cut = begun or _GOES_ON.match(text, end) or len(side) > 200
        readings = [] if cut else _readings(side)
        if before and readings:
            right.append(any(a == b or abs(a - b) < max(x, y) for a, x in before for b, y in readings))
        alone = re.fullmatch(_AMOUNT, side) is not None
        before = [] if alone and not before else readings          # a calculation begins with an operator
    return right


def _readings(side: str) -> list[tuple[Fraction, Fraction]]:
    """What a side may mean: values, each with the distance that rounding may have moved it. Empty for what cannot be
    computed."""
    side = re.sub(r"(?<![A-Za-z])[xX](?![A-Za-z])", "*", side)
    side = re.sub(r" ?/? ?[A-Za-z]+", "", side)                    # units
    side = re.sub(r"/ +(\d+/\d+)", r"/(\1)", side)                # 14 / 1/4 is 14 / (1/4)
    side = re.sub(r"(\d+) (\d+/\d+)", r"(\1+\2)", side).translate(_ONE_SIGN)
    side = re.sub(r"(?<=[\d)])(?=\()", "*", side)
    extra = side.count("(") - side.count(")")                      # of a bracket around the whole: (5 + 3 = 8)
    side = side.removeprefix("(" * extra).removesuffix(")" * -extra)
    alone = re.fullmatch(r"-?\d*(\.?)(\d*)%?", side)
    place = Fraction(1, 10 ** len(alone[2])) if alone and alone[1] else Fraction(0)
    readings = [(calculate(side.replace("%", "")), place)]
    if "%" in side:
        place = (place or int(alone is not None)) / Fraction(100)  # 2/3 = 67%
        readings.append((calculate(re.sub(r"(\d*\.?\d+)%", r"(\1/100)", side)), place))
    return [(value, place) for value, place in readings if value is not None]


def _show(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.4f}".rstrip("0").rstrip(".")


def _miscalculate(problem, reasoning, target, kind, rng):
    """A wrong result at the annotation `target`, carried on: later calculations that use it are done again."""
    expression, result = target[1], calculate(target[1])
    begin = _working_before(reasoning, target)
    working = reasoning[begin:target.start()]
    if kind == "arithmetic_slip":
        wrong = result + rng.choice((-10, -2, -1, 1, 2, 10))
    else:
        edited = _edit_term(problem, expression, working, kind, rng)
        if edited is None:
            return None
        expression, working = edited
        wrong = calculate(expression)
    rest = reasoning[target.end():]
    if wrong is None or wrong <= 0 or wrong == result or not rest.startswith(_show(result)):
        return None
    carried = _carry(rest, _show(result), _show(wrong))
    if carried is None:
        return None
    return f"{reasoning[:begin]}{working}<<{expression}={_show(wrong)}>>{carried}"


def _edit_term(problem, expression, working, kind, rng):
    """One operator (wrong_operation) or number (misread_quantity) changed, in the annotation and in the words before
    it; None where they do not show the same terms."""
    inside, shown = list(_TERM.finditer(expression)), list(_TERM.finditer(working))
    given = re.findall(r"(?<![\d.,])\d+(?![\d.,]*\d)", problem.problem)
    changes = []  # (number of the term, what to put there)
    for i, term in enumerate(inside):
        if kind == "wrong_operation" and term[0] in _WRONG_OPERATOR:
            changes.append((i, _WRONG_OPERATOR[term[0]]))
        elif kind == "misread_quantity" and term[0] in given:
            changes += [(i, number) for number in given if number != term[0]]
    if not changes or len(shown) != len(inside):
        return None
    i, new = rng.choice(changes)
    return _replace(expression, inside[i], new), _replace(working, shown[i], new)


def _replace(text: str, match: re.Match, new: str) -> str:
    return text[:match.start()] + new + text[match.end():]


def _carry(rest, old, new):
    """Replaces a result in the text after it, and every later result that changes because of it. None where the text
    does not show a later result as its annotation writes it, so that it cannot be changed in both."""
    changed = {old: new}  # results so far, as written before and now
    number = re.compile(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d,]*\d)")

    def replace(text):
        return number.sub(lambda match: changed.get(match[0], match[0]), text)

    carried, position = "", 0
    for match in _ANNOTATION.finditer(rest):
        carried += replace(rest[position:match.start()])
        expression = replace(match[1])
        value = calculate(expression) if expression != match[1] else None
        result = match[2] if value is None else _show(value)
        if result != match[2]:
            if not rest[match.end():].startswith(match[2]):
                return None
            changed[match[2]] = result
        carried += f"<<{expression}={result}>>"
        position = match.end()
    return carried + replace(rest[position:])


def _gsm8k_problem(row, where, name):
    if "####" not in row["answer"]:
        raise UserError(f"{where}: key 'answer' has no '#### final answer'")
    worked = _worked(row["answer"])
    hidden = hide_result(worked, _final(row["answer"]))
    reasoning = None if hidden == worked else strip_annotations(hidden)
    return Problem(f"gsm8k-{name}", "gsm8k", "math", row["question"].strip(), row["answer"], [], reasoning)


def _mbpp_problem(row, where, name):
    text = row.get("text") or row.get("prompt")
    if not isinstance(text, str) or not row["test_list"]:
        raise UserError(f"{where}: needs key 'text' (or 'prompt') and at least one test in key 'test_list'")
    imports = row.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports + row["test_list"]):
        raise UserError(f"{where}: keys 'test_list' and 'test_imports' must hold lists of strings")
    setup = str(row.get("test_setup_code") or "\n".join(imports))
    tests = [{"assert": f"{setup}\n{test}".strip()} for test in row["test_list"]]
    text = f"{text}\nYour code should pass this test:\n{row['test_list'][0]}"
    task_id = name if row.get("task_id") is None else row["task_id"]
    return Problem(f"mbpp-{task_id}", "mbpp", "code", text, row["code"], tests)


def _humaneval_problem(row, where, name):
    test = {"assert": f"{row['test']}\ncheck({row['entry_point']})"}
    program = row["prompt"] + row["canonical_solution"]
    return Problem(row["task_id"], "humaneval", "code", row["prompt"], program, [test])


_FORMS = {  # a key that only this form has -> (the keys that it needs, a line to a problem)
    "question": (dict.fromkeys(("question", "answer"), str), _gsm8k_problem),
    "test_list": ({"code": str, "test_list": list}, _mbpp_problem),
    "canonical_solution": (dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str),
                           _humaneval_problem)}


def _read_form(path, form):
    """(place, problem) for every line of a file."""
    required, make = _FORMS[form]
    stem = Path(path).name.partition(".")[0]
    records = read_records(path, required)
    return [(where, make(row, where, f"{stem}-{i}")) for i, (where, row) in enumerate(records)]


def read_gsm8k(path) -> list[Problem]:
    """GSM8K lines {"question", "answer"}. The reference reasoning is the solution without its calculator annotations
    and with the last result hidden ("9 * 2 = ?"), since giving the answer is the executor's job; None where no
    annotation says what to hide."""
    return _unique(_read_form(path, "question"))


def read_mbpp(path) -> list[Problem]:
    """MBPP lines. The problem shows its first test, as usual, since nothing else says what the function is called."""
    return _unique(_read_form(path, "test_list"))


def read_humaneval(path) -> list[Problem]:
    """HumanEval lines; the official test is kept whole, as one statement run after the program."""
    return _unique(_read_form(path, "canonical_solution"))


# ------------------------------------------------------------------------------- 5. settings, stage folders, command

def knob(default, why: str, *, low=None, above=None, choices: tuple = (), affects_result: bool = True):
    """A settings field: its default, the reason that `--help` shows, and what it may be: at least `low`, more than
    `above`, one of `choices`. A knob that only says where, how fast or in how much memory does not affect the result:
    a stage that was made with another value of it is still the same."""
    rules = {"why": why, "low": low, "above": above, "choices": choices, "affects_result": affects_result}
    return field(default=default, metadata=rules)


def check_settings(settings) -> None:
    """UserError for a value that its knob does not allow, before anything is read or written."""
    for f in dataclasses.fields(settings):
        value, rule = getattr(settings, f.name), f.metadata
        if isinstance(value, int) and not -2**63 <= value < 2**63:     # more than a seed can hold
            raise UserError(f"--{f.name} {value}: must fit 64 bits, below {2**63}")
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"--{f.name} {value!r}: must be one of {', '.join(map(str, rule['choices']))}")
        if rule["low"] is not None and not rule["low"] <= value < math.inf:
            raise UserError(f"--{f.name} {value!r}: must be at least {rule['low']}")
        if rule["above"] is not None and not rule["above"] < value < math.inf:
            raise UserError(f"--{f.name} {value!r}: must be above {rule['above']}")
        if isinstance(value, float) and value > 1e12:                  # so that no number of steps exceeds 64 bits
            raise UserError(f"--{f.name} {value!r}: must be at most 1e12")


def parse_settings(cls, argv: list[str], prog: str):
    """An instance of the settings dataclass `cls` from command-line flags, one flag a field. argparse exits with 2 on
    unknown names, UserError names a value that is not allowed."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        kind = type(f.default)
        reason = f"{f.metadata['why']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=kind, default=f.default, metavar=kind.__name__.upper(), help=reason)
    settings = cls(**vars(parser.parse_args(argv)))
    check_settings(settings)
    if not settings.run_dir.strip():
        raise UserError("--run_dir '': must name a folder; is a variable of your shell empty?")
    return settings


def run_command(main, argv=None) -> None:
    """Runs `main(argv)`. A mistake of the user, a full disk, numbers that are not finite, too little memory or a
    sandbox that cannot start become one line on stderr and exit code 2; SIGTERM and Ctrl-C end it like an error, so
    that nothing is left half done, with exit code 130."""
    _stop_on_signals()
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:                                            # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except OSError as error:
        _fail(f"{error}{_mend(error)}")
    except (UserError, FloatingPointError, verify.SandboxError) as error:
        _fail(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|n't allocate|not enough mem", str(error)):
            raise
        first = (str(error) or "out of memory").splitlines()[0]
        _fail(f"{first}; in decoding lower --max_cache_gib, in training --micro_tokens, or use --checkpointing 1 or "
              "--lora_rank; or take a smaller model")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped; give the same command again", file=sys.stderr)
        sys.exit(130)


def _stop_on_signals() -> None:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt, once: a second one would end what the first began to put in order.
    A Ctrl-C that the shell wants ignored (a job in the background) stays ignored."""
    def stop(*_):
        for number in caught:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return
    caught = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        caught.append(signal.SIGINT)
    for number in caught:
        signal.signal(number, stop)


def _fail(error) -> None:
    """One line, whatever line ends a library put into its message."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def _mend(error: OSError) -> str:
    """What to do about an error of the system, where its number tells."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room on the disk, then the same command goes on"
    if error.errno is not None:
        return "; mend or move this path, or choose another --run_dir"
    return ""


def write_atomic(path, text: str) -> None:
    """Writes a text file whole or not at all: temporary file, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode("utf-8")  # may raise, so before there is a file
    with naming(path), tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        try:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


@contextmanager
def naming(path):
    """Errors of the system inside name this file; that of a full disk, for one, names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def stage_folder(path, settings, inputs: dict[str, str] | None = None):
    """A folder that appears whole or not at all: `with stage_folder(path, settings) as folder:`

    folder is None where `path` is there already, complete and made with equal settings: nothing to do. Otherwise it is
    `path`.partial, with settings.json inside, to be filled; it is renamed to `path` when the block ends without error.
    After an error it stays, for the stage to continue from (unless the block put nothing into it). UserError when
    `path` or `path`.partial was made with other settings that affect the result, or from other `inputs`: {what the
    stage reads: its `fingerprint`}; or while another process is at work on it.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    _refuse_old_run(path.parent)
    if path.exists():
        compare_made(path, settings, inputs or {})
        yield None
        return
    partial.mkdir(parents=True, exist_ok=True)
    with _only_writer(partial):
        try:
            if path.exists():                                     # finished by another process since we looked
                raise UserError(f"{path}: another process has just made it; give the same command again")
            if _has_content(partial):
                compare_made(partial, settings, inputs or {})
            for left in partial.glob(".*"):                       # by a `write_atomic` that was killed
                left.unlink()
            record = {"settings": dataclasses.asdict(settings), "inputs": inputs or {}, "environment": environment()}
            write_atomic(partial / "settings.json", json.dumps(record, indent=1))
            yield partial
        except BaseException:
            if not _has_content(partial):                         # another try may then have other settings
                shutil.rmtree(partial, ignore_errors=True)
            raise
        os.replace(partial, path)


@contextmanager
def _only_writer(partial: Path):
    """Locks a folder: two processes that write the same logs would spoil both. The lock is on the folder itself, leaves
    no file behind, and ends with its process."""
    if fcntl is None:                                             # Windows
        yield
        return
    folder = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is making it; wait for it, or stop it first") from None
        except OSError:                                           # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def _has_content(partial: Path) -> bool:
    """Something besides its settings, and besides what `write_atomic` leaves when it is killed."""
    if not partial.exists():
        return False
    files = [p for p in partial.iterdir() if p.name != "settings.json" and not p.name.startswith(".")]
    return any(p.is_dir() or p.stat().st_size for p in files)     # logs may be there and empty


def _refuse_old_run(run_dir: Path) -> None:
    config = run_dir / "config.json"
    if config.is_file() and '"stages"' in config.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{config}: this folder has another layout, one config.json for all stages; "
                        "choose another --run_dir")


def compare_made(folder, settings, inputs: dict[str, str]) -> None:
    """UserError for the first setting that affects the result, or input, that is not what `folder` was made with."""
    old = read_settings(folder)
    for f in dataclasses.fields(settings):
        new = getattr(settings, f.name)
        if not f.metadata["affects_result"] or old.get(f.name) == new:
            continue
        was = f"--{f.name} {old[f.name]!r}" if f.name in old else f"no --{f.name}"
        raise UserError(f"{folder}: made with {was}, now it is {new!r}; choose another --run_dir, or delete {folder} "
                        "and all that was made from it")
    compare_inputs(folder, inputs)


def compare_inputs(folder, inputs: dict[str, str]) -> None:
    """UserError for the first input that is not what `folder` was made from."""
    for name, content in _read_record(folder, "inputs").items():
        if inputs.get(name, content) != content:
            raise UserError(f"{folder}: {name} has changed since this was made from it; put it back, choose another "
                            f"--run_dir, or delete {folder} and all that was made from it")


def read_settings(folder) -> dict:
    """The settings that a stage's folder was made with. UserError when they are missing or damaged."""
    return _read_record(folder, "settings")


def _read_record(folder, part: str) -> dict:
    mend = f"choose another --run_dir, or delete {folder}"
    found = read_json(Path(folder) / "settings.json", mend, part)[part]
    if not isinstance(found, dict):
        raise UserError(f"{folder}/settings.json: damaged (key {part!r} is no object); {mend}")
    return found


def read_json(path, mend: str, *keys: str) -> dict:
    """The object in a JSON file that a stage has written. UserError that ends in `mend` for a file that is missing,
    damaged, or without one of the keys."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {mend}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {mend}") from None
    lacks = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacks or not isinstance(found, dict):
        raise UserError(f"{path}: damaged (no object with the key {', '.join(lacks)}); {mend}")
    return found


def fingerprint(path) -> str:
    """SHA-256 of a file, or of the *.jsonl files in a folder, with their names. UserError when nothing is there."""
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise UserError(f"{path}: no such file, or a folder without *.jsonl; make it first")
    total = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        total.update(f"{file.name} {len(content)}\n".encode() + content)
    return total.hexdigest()


def fingerprints(run_dir, *names: str) -> dict[str, str]:
    """The `inputs` of a stage: {name: `fingerprint`} of these files of a run. One that is missing is left out: whoever
    reads it says so better."""
    return {name: fingerprint(Path(run_dir) / name) for name in names if (Path(run_dir) / name).is_file()}


def environment() -> dict:
    """Versions, git commit and hardware, for the record."""
    here = str(Path(__file__).resolve().parent)
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip()
    torch = sys.modules.get("torch")
    versions = {name: metadata.version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else ""
    return {"python": platform.python_version(), **versions, "commit": commit, "platform": platform.platform(),
            "cpu_cores": os.cpu_count(), "gpu": gpu}


GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


@contextmanager
def _downloading(name: str):
    """One line for whatever keeps a file from being downloaded."""
    try:
        yield
    except Exception as error:          # no network, no such file, wrong bytes: each library has its own errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be downloaded ({reason}); download it elsewhere and pass --data or "
                        "--heldout_data FILE (run.sh: DATA, HELDOUT_DATA)") from None


def gsm8k_file(part: str, cache) -> Path:
    """GSM8K's "train" or "test" file, downloaded once into the folder `cache`; other bytes are refused."""
    path = Path(cache).expanduser() / "gsm8k" / f"{part}.jsonl"
    if not path.exists():
        from torch.hub import download_url_to_file
        url = GSM8K_URL.format(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _downloading(url):
            download_url_to_file(url, str(path), hash_prefix=GSM8K_SHA256[part], progress=False)
    return path


def local(path: str) -> str:
    """The path itself, or for hf://datasets/OWNER/NAME/FILE that of a copy, downloaded once from the hub."""
    if not path.startswith("hf://"):
        return path
    match = re.fullmatch(r"hf://datasets/([^/]+/[^/]+)/(.+)", path)
    if not match:
        raise UserError(f"{path}: must be hf://datasets/OWNER/NAME/FILE, or a file on this machine")
    from huggingface_hub import hf_hub_download
    with _downloading(path):
        return hf_hub_download(match[1], match[2], repo_type="dataset")


@dataclass(frozen=True)
class DataSettings:
    """Settings of `python data.py`."""
    run_dir: str = knob("runs/tiny-math", "run folder", affects_result=False)
    task_type: str = knob("math", "math or code; for the tiny world", choices=("math", "code"))
    source: str = knob("tiny", "tiny: generated; gsm8k: built from GSM8K solutions; groups: TraceLift-Groups as they "
                               "are, or HumanEval or MBPP lines (no traces: no reward model)",
                       choices=("tiny", "gsm8k", "groups"))
    data: str = knob("", "training file (gsm8k or groups), or hf://datasets/OWNER/NAME/FILE; empty with gsm8k: "
                         "downloaded once from its public repository")
    heldout_data: str = knob("", "held-out file, in the same format")
    tests: str = knob("", "tests of code groups in a file of their own: {problem_id, tests: [{input, output, "
                          "is_reward_test}]} a line")
    train: int = knob(3000, "training groups; of a file of groups at most", low=1)
    heldout: int = knob(300, "held-out groups, and as many longer ones in the tiny world", low=1)
    negatives: int = knob(4, "flawed traces per group", low=1)
    max_calculations: int = knob(0, "gsm8k: only problems whose solution has at most so many; 0: all", low=0)
    seed: int = knob(0, "which problems, which flaws")
    cache: str = knob("~/.cache/tracelift", "folder for downloaded files", affects_result=False)


def load_groups(settings: DataSettings) -> dict[str, list[dict]]:
    """Groups of every split. UserError for impossible combinations, when a source gives fewer than asked for, and for
    training problems that are held out as well."""
    s = settings
    if s.source == "gsm8k" and s.task_type == "code":
        raise UserError("--source gsm8k does not go with --task_type code")
    if s.source == "tiny" and (s.data or s.heldout_data):
        raise UserError("--source tiny does not go with --data or --heldout_data")
    if s.source == "groups" and not (s.data and s.heldout_data):
        raise UserError("--source groups needs --data FILE and --heldout_data FILE")
    if s.source != "groups" and s.tests:
        raise UserError(f"--tests goes with --source groups only, not with {s.source}")
    for flag in ("negatives", "seed"):
        if s.source == "groups" and getattr(s, flag) != getattr(DataSettings, flag):
            raise UserError(f"--{flag} has no effect with --source groups, which are taken as they are; leave it out")
    if s.source != "gsm8k" and s.max_calculations:
        raise UserError("--max_calculations goes with --source gsm8k only; leave it out")
    wanted = {"train": s.train, "heldout": s.heldout}
    if s.source == "tiny":
        wanted["longer"] = s.heldout
    groups = {split: _split_groups(s, split, n) for split, n in wanted.items()}
    trained = _ids_by_text(groups["train"])
    held_out = _ids_by_text(groups["heldout"] + groups.get("longer", []))
    both = sorted(trained.keys() & held_out.keys())
    if both:
        example = f"{trained[both[0]]!r} as {held_out[both[0]]!r}"
        raise UserError(f"{len(both)} training problems are also held out, {example} among them: take them out of "
                        "--data or of --heldout_data")
    return groups


def _ids_by_text(groups):
    """{text of a problem, however it is spaced: its problem_id}"""
    return {" ".join(group["problem"].split()): group["problem_id"] for group in groups}


def _split_groups(s, split, n):
    """n groups of one split; of a file of groups, which are taken as they are, at most n."""
    path = local(s.data if split == "train" else s.heldout_data)
    if s.source == "groups":
        groups = read_any_groups(path)
        if s.tests:
            join_tests(groups, local(s.tests))
        return teachable(path, groups, n, need_tests=bool(s.tests))
    some_more = n + n // 4 + 4  # some problems allow too few flaws
    if s.source == "tiny":
        problems = tiny_problems(s.task_type, some_more, s.seed, split)
    else:
        path = path or gsm8k_file("train" if split == "train" else "test", s.cache)
        problems = _annotated_problems(path)
        if s.max_calculations:
            problems = [p for p in problems if len(_ANNOTATION.findall(p.reference_solution)) <= s.max_calculations]
        random.Random(s.seed).shuffle(problems)
    groups = build_groups(problems[:some_more], s.negatives, s.seed)[:n]
    if len(groups) < n:
        flag = "--train" if split == "train" else "--heldout"
        raise UserError(f"{path or s.source}: gives only {len(groups)} groups of {s.negatives} flawed traces, {flag} "
                        f"asks for {n}; lower it or --negatives")
    return groups


def _annotated_problems(path) -> list[Problem]:
    """The problems of a GSM8K file that can teach and whose annotations say what is a calculation."""
    rows = [(where, _group(problem, {})) for where, problem in _read_form(path, "question")]
    problems = [problem_of(group) for group in teachable(path, rows, len(rows))]
    bare = [problem.problem_id for problem in problems if problem.reference_reasoning is None]
    if bare:
        _say_left_out(path, "no annotation says what is a calculation", bare)
    return [problem for problem in problems if problem.reference_reasoning is not None]


def main(argv) -> None:
    """The command: writes RUN_DIR/groups/*.jsonl."""
    settings = parse_settings(DataSettings, argv, "data.py")
    groups = Path(settings.run_dir) / "groups"
    files = {"--data": settings.data, "--heldout_data": settings.heldout_data, "--tests": settings.tests}
    inputs = {flag: fingerprint(file) for flag, file in files.items() if Path(file).is_file()}
    with stage_folder(groups, settings, inputs) as folder:
        if folder:
            for split, made in load_groups(settings).items():
                write_groups(folder / f"{split}.jsonl", made)
    for path in sorted(groups.glob("*.jsonl")):
        print(f"{path}: {len(read_groups(path))} groups")
    print(f"next: python executor.py --run_dir {settings.run_dir}")


if __name__ == "__main__":
    run_command(main)
