"""Every row of README's "Copy a piece", copied alone into an empty folder and run there; and the public names.

    python -m pytest tests/test_copy.py

The pieces run in processes that know nothing of this repository: a name that a piece takes from another file is an
error there. Those that need torch share one process, since importing it takes longer than all of them; what one piece
imported from its folder is forgotten before the next.
"""
import ast
import builtins
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import tracelift

ROOT = Path(tracelift.__file__).resolve().parent
OURS = {"data", "executor", "kernels", "rm", "tracelift", "verify"}

# ---------------------------------------------------------------- cutting pieces out


def section(file: str, number: int) -> str:
    """A section of a file, from its banner line to the next one."""
    text = (ROOT / file).read_text()
    banners = list(re.finditer(r"^# -{20,} (\d+)\. .*$", text, re.M))
    numbers = [int(banner[1]) for banner in banners]
    begin = banners[numbers.index(number)].start()
    end = banners[numbers.index(number) + 1].start()
    return text[begin:end]


def imports(file: str) -> str:
    """All imports of a file that do not name a file of ours."""
    found = []
    for node in ast.parse((ROOT / file).read_text()).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        if modules and not {module.partition(".")[0] for module in modules} & OURS:
            found.append(ast.unparse(node))
    return "\n".join(found) + "\n\n"


def definitions(file: str, *names: str) -> str:
    """Functions and classes of a file as they stand."""
    text = (ROOT / file).read_text()
    lines, found = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "".join(lines[begin - 1:node.end_lineno])
    return "\n\n".join(found[name] for name in names) + "\n"


def leaks(source: str) -> set[str]:
    """Names that a piece uses and neither defines nor imports."""
    tree = ast.parse(source)
    known, used = set(dir(builtins)), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
        elif isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
    return used - known


def copy_files(folder: Path, *names: str) -> None:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


# ---------------------------------------------------------------- the pieces

LOSS = """
import math, torch
torch.manual_seed(0)
logits = torch.randn(6, 37, requires_grad=True)
target, seq = torch.tensor([1, 2, 3, 4, 5, 36]), torch.tensor([0, 0, 1, 1, 1, 1])
reward, weight = torch.tensor([1.0, 0.0]), torch.tensor([0.2] * 5 + [0.0])
x = logits.detach().clone().requires_grad_()
logp = torch.log_softmax(x / 0.7, dim=-1)[range(6), target]
A = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0]) / (1 + 2e-6)
want = -(weight * A * (logp - logp.detach()).exp()).sum()
want.backward()
def check(loss, gradient, wanted):
    assert abs(loss.item() - want.item()) < 1e-5, (loss, want)
    assert torch.allclose(gradient, wanted, atol=1e-5) and wanted.abs().sum() > 0.1
"""

RUNS = {
    "kernels/grpo.py": LOSS + """
import grpo
grpo.grpo_loss_triton(logits, target, reward, seq, weight, 2, temperature=0.7)[0].backward()
check(grpo.grpo_loss_triton(logits, target, reward, seq, weight, 2, temperature=0.7)[0], logits.grad, x.grad)
found, entropy = grpo.token_logp_triton(logits.detach(), target, 0.7)
assert torch.allclose(found, logp.detach(), atol=1e-5) and (entropy > 0).all()
""",
    "kernels/reference.py": LOSS + """
import reference
loss, *_ = reference.grpo_loss_reference(logits, target, reward, seq, weight, 2, temperature=0.7)
loss.backward()
check(loss, logits.grad, x.grad)
assert reference.group_advantage(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2).tolist()[2:] == [0, 0]
assert reference.token_weights(torch.tensor([[0, 1, 1], [0, 0, 1]])).sum() == 1
""",
    "kernels/": LOSS + """
import kernels
loss, *_ = kernels.grpo_loss(logits, target, reward, seq, weight, 2, temperature=0.7)
loss.backward()
check(loss, logits.grad, x.grad)
head, hidden = torch.randn(37, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
whole = kernels.grpo_loss(hidden @ head.T, target, reward, seq, weight, 2)[0]
want = whole.detach()
wanted = torch.autograd.grad(whole, [hidden, head])
loss = kernels.linear_grpo_loss(hidden, head, target, reward, seq, weight, 2, chunk=4)[0]
for gradient, w in zip(torch.autograd.grad(loss, [hidden, head]), wanted):
    check(loss, gradient, w)
assert kernels.backend("cpu") == "reference" and set(kernels.__all__) <= set(dir(kernels))
""",
    "`verify.py`": """
import verify
assert verify.math_equal(verify.extract_answer("so\\n#### 1,234"), "1234") and not verify.math_equal("3", "4")
import sys
if sys.platform == "linux":
    program = verify.extract_code("Here:\\n```python\\ndef f(x):\\n    return x + 1\\n```")
    tests = [[{"assert": "assert f(1) == 2"}], [{"assert": "assert f(1) == 3"}]]
    verdicts = verify.run_programs([program, program], tests)
    assert [verdict.outcome for verdict in verdicts] == ["passed", "failed_test"], verdicts
    assert [verify.exec_score(verdict, "coderl") for verdict in verdicts] == [1, -0.3]
""",
    "sections 1 and 3 of executor.py": """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import piece
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=64, initializer_range=0.5)).eval()
prompts = [[3, 4, 5, 6], [7, 8], [9]]
greedy = piece.generate(model, prompts, max_new_tokens=5, temperature=0, eos_id=39)
for prompt, tokens in zip(prompts, greedy.tokens):
    ids = torch.tensor([prompt])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=39, pad_token_id=0)
    assert want[0, len(prompt):].tolist() == tokens, (want, tokens)
names = [f"{prompt} {sample}" for prompt in range(3) for sample in range(2)]
some = [piece.generate(model, prompts, num_samples=2, max_new_tokens=5, eos_id=39, draws=piece.draws(names, 5),
                       max_cache_tokens=limit) for limit in (1, 10000)]
assert some[0].tokens == some[1].tokens and len(some[0].tokens) == 6 and max(map(max, some[0].logprobs)) < 0
""",
    "`Lora`, `freeze`, `_some_ids` of executor.py": """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import piece
torch.manual_seed(0)
def fresh():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=32)).eval()
model, ids = fresh(), torch.arange(9)[None]
before = model(ids).logits
lora = piece.Lora(model, 2, 4.0)
assert torch.equal(model(ids).logits, before), "B starts at 0"
model(ids).logits.square().mean().backward()
for layer in lora.layers.values():
    layer.lora_B.data -= 10 * layer.lora_B.grad
changed = model(ids).logits
assert not torch.allclose(changed, before) and all(layer.weight.grad is None for layer in lora.layers.values())
with lora.off():
    assert torch.equal(model(ids).logits, before)
lora.save("merged", "base")
assert torch.allclose(LlamaForCausalLM.from_pretrained("merged")(ids).logits, changed, atol=1e-5)
again = fresh()
piece.Lora.load(again, "merged/adapter")
assert torch.allclose(again(ids).logits, changed, atol=1e-6)
""",
    "sections 1 and 2 of rm.py": """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
import piece
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "good": 3, "bad": 4, "trace": 5}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
backbone = LlamaModel(LlamaConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
rm = piece.RubricRewardModel(backbone, tokenizer, ["clear", "right"]).eval()
texts = ["good trace", "a bad trace of more words", "trace"]
score, dimensions = rm.score(texts)
assert score.shape == (3,) and dimensions.shape == (3, 2) and 0 <= score.min() and score.max() <= 1 and score.std() > 0
rm.save_pretrained("folder")
again = piece.RubricRewardModel.from_pretrained("folder", torch.device("cpu")).score(texts)
assert torch.equal(again[0], score) and torch.equal(again[1], dimensions)
""",
    "section 1 of tracelift.py": """
import piece
r = piece.Reward(e2e=1.0, rm=0.8, with_trace=3, without_trace=1, uplift=2 / 3, repeats=3)
totals = {name: mode.total(r, 0.5, 0.5) for name, mode in piece.REWARDS.items()}
assert abs(totals["tracelift"] - (0.5 + 0.5 * 0.8 * 2 / 3)) < 1e-12 and totals["exec_only"] == 1 and totals["rm_only"] == 0.8
assert abs(totals["uplift_only"] - (0.5 + 0.5 * 2 / 3)) < 1e-12 and totals["tracelift-code"] == 1
piece.REWARDS["mine"] = piece.Mode(lambda r, w_e, w_r: r.e2e * r.rm, needs=("runs", "rm"))
assert piece.REWARDS["mine"].total(r, 0, 0) == 0.8
"""}


def pieces() -> dict[str, str]:
    """Row of README's table -> the source of its file piece.py, for rows that are no whole files."""
    return {"sections 1 and 3 of executor.py": section("executor.py", 1) + section("executor.py", 3),
            "`Lora`, `freeze`, `_some_ids` of executor.py": imports("executor.py") + DATA
            + definitions("executor.py", "Lora", "freeze", "_some_ids"),
            "sections 1 and 2 of rm.py": imports("rm.py") + DATA + section("rm.py", 1) + section("rm.py", 2),
            "section 1 of tracelift.py": standard(imports("tracelift.py")) + section("tracelift.py", 1)}


def standard(lines: str) -> str:
    """Those imports that are of the standard library."""
    kept = [line for line in lines.splitlines() if line and line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    return "\n".join(kept) + "\n\n"


DATA = "import data\nfrom data import UserError\n\n"          # with data.py and verify.py beside the piece, as the row says
WITH = {"`Lora`, `freeze`, `_some_ids` of executor.py": ("data.py", "verify.py"),
        "sections 1 and 2 of rm.py": ("data.py", "verify.py")}


def lay_out(folder: Path, row: str) -> None:
    """Puts what a row takes into an empty folder."""
    folder.mkdir(parents=True)
    if row in ("kernels/grpo.py", "kernels/reference.py"):
        shutil.copy(ROOT / row, folder)
    elif row == "kernels/":
        copy_files(folder, "kernels")
    elif row == "`verify.py`":
        copy_files(folder, "verify.py")
    else:
        (folder / "piece.py").write_text(pieces()[row])
        copy_files(folder, *WITH.get(row, ()))
    (folder / "run.py").write_text(RUNS[row])


HOST = """
import json, os, sys, traceback
import torch, transformers, safetensors.torch
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
results, path = {}, list(sys.path)
for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.path[:] = [folder, *path]
    try:
        exec(compile(open("run.py").read(), os.path.join(folder, "run.py"), "exec"), {"__name__": "__main__"})
        results[folder] = ""
    except BaseException:
        results[folder] = traceback.format_exc()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(folder + os.sep):
            del sys.modules[name]
print("RESULTS" + json.dumps(results))
"""
WITH_TORCH = [row for row in RUNS if row not in ("`verify.py`", "section 1 of tracelift.py")]


def clean_environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{row: what went wrong, "" for nothing} of all rows that need torch."""
    folders = {}
    for i, row in enumerate(WITH_TORCH):
        folders[row] = tmp_path_factory.mktemp("copies") / f"piece-{i}"
        lay_out(folders[row], row)
    done = subprocess.run([sys.executable, "-c", HOST, *map(str, folders.values())], capture_output=True, text=True,
                          env=clean_environment(), cwd=tmp_path_factory.mktemp("empty"), timeout=600)
    assert "RESULTS" in done.stdout, done.stderr
    results = json.loads(done.stdout.rpartition("RESULTS")[2])
    return {row: results[str(folder)] for row, folder in folders.items()}


@pytest.mark.parametrize("row", WITH_TORCH)
def test_a_copied_piece_runs_alone(ran, row):
    if row == "kernels/grpo.py":
        pytest.importorskip("triton")
    assert not ran[row], ran[row]


@pytest.mark.parametrize("row", ["`verify.py`", "section 1 of tracelift.py"])
def test_a_copied_piece_runs_on_the_standard_library(tmp_path, row):
    """-S: no installed package can be imported."""
    lay_out(tmp_path / "piece", row)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    for argv in ["-c", probe], ["run.py"]:
        done = subprocess.run([sys.executable, "-S", *argv], cwd=tmp_path / "piece", capture_output=True, text=True,
                              env=clean_environment(), timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row", [row for row in RUNS if row in pieces()])
def test_a_piece_takes_nothing_from_elsewhere(row):
    """Names that are neither defined nor imported in the piece, those in annotations too."""
    assert not leaks(pieces()[row])


def test_leaks_are_found():
    assert leaks("import os\ndef f(a, *b):\n    c = a\n    return [os, b, c, d] + [e for e in g(k=1)]") == {"d", "g"}


def test_every_row_of_the_readme_has_a_piece_here():
    """A row that is added without a test would promise what nobody tried."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Copy a piece"):].partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.split(" | ")[1].strip() for line in table]
    assert [row.strip("`") for row in rows] == [row.strip("`") for row in RUNS]


# ---------------------------------------------------------------- public names

NAMES = {"data": "Problem perturb NEGATIVE_KINDS build_groups read_groups write_groups read_gsm8k read_humaneval tiny_problems "
                 "planner_prompt executor_prompt rm_text extract_reasoning",
         "verify": "extract_answer math_equal extract_code Verdict run_programs exec_score",
         "executor": "load generate Completions Executor",
         "rm": "RubricRewardModel",
         "tracelift": "Reward REWARDS train evaluate inspect",
         "kernels": "grpo_loss linear_grpo_loss token_logp token_weights group_advantage grpo_loss_reference backend check"}
MEMBERS = {"data.Problem": "problem_id source task_type problem reference_solution tests reference_reasoning",
           "verify.Verdict": "outcome passed total detail ok",
           "executor.Completions": "tokens logprobs",
           "executor.Executor": "success baseline",
           "rm.RubricRewardModel": "from_pretrained save_pretrained score",
           "tracelift.Reward": "e2e rm with_trace without_trace uplift total"}
ARGUMENTS = {"data.perturb": "problem reasoning kind rng", "data.build_groups": "problems negatives_per_group seed",
             "data.tiny_problems": "task_type n seed", "data.rm_text": "problem reasoning",
             "data.executor_prompt": "problem reasoning", "verify.math_equal": "prediction reference",
             "verify.run_programs": "programs tests timeout memory_mb workers", "verify.exec_score": "verdict style",
             "executor.load": "path_or_name device dtype",
             "executor.generate": "model prompts num_samples max_new_tokens temperature eos_id generator max_cache_tokens"}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_import(module):
    """Other projects import these."""
    for name in NAMES[module].split():
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize("name", MEMBERS)
def test_public_types_keep_their_members(name):
    module, _, kind = name.partition(".")
    cls = getattr(importlib.import_module(module), kind)
    known = set(dir(cls)) | set(getattr(cls, "__dataclass_fields__", ()))
    assert set(MEMBERS[name].split()) <= known


@pytest.mark.parametrize("name", ARGUMENTS)
def test_public_functions_keep_their_arguments(name):
    module, _, function = name.partition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    assert set(ARGUMENTS[name].split()) <= set(parameters)


def test_rewards_and_kinds_keep_their_names():
    assert {"tracelift", "tracelift-code", "exec_only", "rm_only", "uplift_only"} <= set(tracelift.REWARDS)
    assert set(data.NEGATIVE_KINDS) == {"math", "code"} and all(data.NEGATIVE_KINDS.values())
