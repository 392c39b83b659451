"""What is wrong with a trace of the tiny world, by kind: the ground truth that InT's interventions are counted against.

A trace of the tiny world can be checked step by step, so the first wrong step is known exactly, and an intervention
that names it and mends it can be told from one that only happens to succeed.
"""
import itertools

from data import Problem, check_trace, parse_chain, parse_plan, split_steps


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
