"""What is wrong with a trace of the tiny world, by kind: the ground truth that InT's interventions are counted against.

A trace of the tiny world can be checked step by step, so the first wrong step is known exactly, and an intervention
that names it and mends it can be told from one that only happens to succeed.

    python tests/int_analysis.py runs/tiny-math          # after python tracelift.py int --run_dir runs/tiny-math

Reads groups/train.jsonl and int/interventions.jsonl. A row is a kind of flaw. "index right": the intervention names the
first wrong step. "step right": some faithful trace begins with the steps before it and the proposed one. "named" counts
every sampled intervention whose number is one of a step, "kept" the one that was chosen for a trace.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
from data import Problem, UserError, check_trace, parse_chain, parse_plan, splice, split_steps  # noqa: E402


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
    for i in range(1, len(steps) + 1):
        if not begins_right(problem, steps[:i]):
            return i
    return len(steps) + 1


def flaw_kind(problem: Problem, steps: list[str]) -> str:
    """What is wrong with the first wrong step of a tiny-world trace."""
    index = first_error(problem, steps)
    reference = split_steps(problem, problem.reference_reasoning)
    if index == 0:
        return "no error"
    if index > len(steps):
        return "missing at the end"
    if index > len(reference):
        return "superfluous at the end"
    step = steps[index - 1]
    if step in reference:
        return "out of place"                                     # a later step too early, or an earlier one again
    if problem.task_type == "math":
        parse, names = parse_chain, ("first number", "operation", "second number", "result")
    else:
        parse, names = parse_plan, ("operation", "constant")
    wrong, right = parse(step), parse(reference[index - 1])
    if wrong is None:
        return "no equation" if problem.task_type == "math" else "no plan step"                  # code, "adjust it"
    for name, a, b in zip(names, wrong[0], right[0]):
        if a != b:
            return f"wrong {name}"


def judged(problem: Problem, trace: str, proposal: dict) -> tuple[bool, bool]:
    """(index right, step right) of one intervention in a failed trace."""
    index_right = proposal["index"] == first_error(problem, split_steps(problem, trace))
    mended = splice(problem, trace, proposal["index"], proposal["step"])
    return index_right, index_right and begins_right(problem, split_steps(problem, mended))


def count(records: list[dict], problems: dict[str, Problem]) -> dict[str, dict[str, list[tuple[bool, bool]]]]:
    """{"named" or "kept": {kind of flaw, and "all": [(index right, step right), ...]}}, an entry an intervention."""
    found = {"named": {"all": []}, "kept": {"all": []}}
    for record in records:
        if record["left_out"]:
            continue
        problem, trace = problems[record["problem_id"]], record["trace"]
        steps = split_steps(problem, trace)
        kind = flaw_kind(problem, steps)
        named = [p for p in record["proposals"] if 1 <= p["index"] <= len(steps) + 1]
        kept = [record["chosen"]] if record["chosen"] else []
        for proposals, by_kind in ((named, found["named"]), (kept, found["kept"])):
            for proposal in proposals:
                times = proposal["times"] if by_kind is found["named"] else 1
                entries = [judged(problem, trace, proposal)] * times
                by_kind["all"] += entries
                by_kind.setdefault(kind, []).extend(entries)
    return found


def table(found: dict) -> str:
    """The counts as Markdown."""
    lines = ["| interventions | kind of flaw | n | index right | step right |", "|---|---|---|---|---|"]
    for which, by_kind in found.items():
        for kind in ["all", *sorted(by_kind.keys() - {"all"})]:
            n = len(by_kind[kind])
            shares = [f"{sum(entry[i] for entry in by_kind[kind]) / n:.2f}" if n else "" for i in (0, 1)]
            lines.append(f"| {which} | {kind} | {n} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def main(argv) -> None:
    """The command."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python tests/int_analysis.py RUN_DIR")
    run_dir = Path(argv[0])
    log = run_dir / "int" / "interventions.jsonl"
    if not log.exists():
        raise UserError(f"{log}: missing; run python tracelift.py int --run_dir {run_dir} first")
    problems = {p.problem_id: p for p in data.read_problems(run_dir / "groups" / "train.jsonl")}
    if any(p.source != "tiny" for p in problems.values()):
        raise UserError(f"{run_dir}: only traces of the tiny world can be checked step by step")
    records = data.read_records(log, {"problem_id": str, "trace": str}) if log.stat().st_size else []
    print(table(count([record for _, record in records], problems)))


if __name__ == "__main__":
    data.run_command(main)
