"""The README's walk is whole: what it calls stands in it, but for a few names that say all."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = "# You have read the method."
FILES = ("tracelift.py", "data.py", "rm.py", "executor.py", "verify.py", "kernels/__init__.py", "kernels/reference.py",
         "kernels/grpo.py")
MOST = 10


def in_the_walk(file: str, text: str) -> set[int]:
    """The numbers of the lines that a reader of the walk sees."""
    lines = text.splitlines()
    if file == "tracelift.py":
        return set(range(1, next(i for i, line in enumerate(lines, 1) if line.startswith(FENCE))))
    if file == "kernels/reference.py":
        return set(range(1, len(lines) + 1))
    if file == "rm.py":
        model = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "RubricRewardModel")
        return set(range(model.lineno, model.end_lineno + 1))
    begin = {int(match[1]): text.count("\n", 0, match.start()) + 1
             for match in re.finditer(r"^# -{20,} (\d+)\. ", text, re.M)}
    end = {"data.py": begin.get(2), "executor.py": begin.get(3)}.get(file)
    return set(range(begin[1], end)) if end else set()


def stored(node: ast.AST) -> set[str]:
    """The parameters and variables of a node."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.arg):
            found.add(part.arg)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
    return found


def names_outside_of_the_walk() -> set[str]:
    """MODULE.NAME of what the walk uses and our files define outside of it. Methods of objects are not seen."""
    inside, outside, uses = set(), set(), set()
    for file in FILES:
        text = (ROOT / file).read_text()
        tree, seen = ast.parse(text), in_the_walk(file, text)
        module = "kernels" if file.startswith("kernels") else file.removesuffix(".py")
        imported = {alias.name: f"{node.module}.{alias.name}" for node in tree.body if isinstance(node, ast.ImportFrom)
                    for alias in node.names}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = {getattr(node, "name", "")}.union(*map(stored, targets))
            (inside if node.lineno in seen else outside).update(f"{module}.{name}" for name in names)
            if node.lineno not in seen:
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                    uses.add(f"{part.value.id}.{part.attr}")
                elif isinstance(part, ast.Name) and part.id not in stored(node):
                    uses.add(imported.get(part.id, f"{module}.{part.id}"))
    return uses & outside - inside


def test_the_walk_calls_little_that_stands_elsewhere():
    found = sorted(names_outside_of_the_walk())
    print(f"{len(found)} names: {', '.join(found)}")
    assert 0 < len(found) <= MOST, found
