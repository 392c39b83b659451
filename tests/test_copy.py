"""Every row of README's "Copy a piece", copied alone into an empty folder and run there; and the public names.

A name that a piece takes from a file which is not there is an error.
"""
import ast
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"data", "executor", "kernels", "rm", "tracelift", "verify"}

# ---------------------------------------------------------------- cutting pieces out


def section(file: str, number: int) -> str:
    """A section of a file, from its banner line to the next one."""
    text = (ROOT / file).read_text()
    banners = {int(match[1]): match.start() for match in re.finditer(r"^# -{20,} (\d+)\. .*$", text, re.M)}
    return text[banners[number]:banners[number + 1]]


def imports(file: str, standard: bool = False) -> str:
    """All imports of a file that do not name a file of ours; standard: those of the standard library alone."""
    found = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            root = (getattr(node, "module", None) or node.names[0].name).partition(".")[0]
            if root not in OURS and (root in sys.stdlib_module_names or not standard):
                found.append(ast.unparse(node))
    return "\n".join(found) + "\n\n"


def definitions(file: str, *names: str) -> str:
    """Functions and classes of a file."""
    nodes = {getattr(node, "name", ""): node for node in ast.parse((ROOT / file).read_text()).body}
    return "\n\n".join(ast.unparse(nodes[name]) for name in names) + "\n"


BESIDE = "import data\nfrom data import UserError\n\n"        # in the folder, as the row says
LORA = "`Lora`, `freeze`, `saying` of executor.py"
POLICY_LOSS = "`policy_loss` of tracelift.py"
DECODER, JUDGE, REWARD = "sections 1 and 3 of executor.py", "section 1 of rm.py", "section 1 of tracelift.py"
PIECES = {DECODER: lambda: section("executor.py", 1) + section("executor.py", 3),
          LORA: lambda: imports("executor.py") + BESIDE + definitions("executor.py", "saying", "freeze", "Lora"),
          JUDGE: lambda: imports("rm.py") + BESIDE + "import executor\n\n" + section("rm.py", 1),
          POLICY_LOSS: lambda: "import torch\n\n\n" + definitions("tracelift.py", "policy_loss"),
          REWARD: lambda: imports("tracelift.py", standard=True) + section("tracelift.py", 1)}
FILES = {"kernels/": ["kernels"], LORA: ["data.py", "verify.py"], JUDGE: ["data.py", "verify.py", "executor.py"]}

# ---------------------------------------------------------------- what each piece does

LOSS = """
import torch
torch.manual_seed(0)
logits = torch.randn(5, 37, requires_grad=True)
target, seq, reward = torch.tensor([1, 2, 3, 4, 36]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0.0])
x = logits.detach().clone().requires_grad_()
want = torch.log_softmax(x / 0.7, dim=-1)[range(5), target]
wanted_A = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]) / (1 + 2e-6)
(wanted_A * want).sum().backward()
def check(module):
    logits.grad = None
    logp, entropy, A = module.advantage_logp(logits, target, reward, seq, 2, temperature=0.7)
    (A * logp).sum().backward()
    for found, wanted in (logp, want), (A, wanted_A), (logits.grad, x.grad):
        assert torch.allclose(found, wanted, atol=1e-5) and wanted.abs().sum() > 0.1
    assert (entropy > 0).all()
"""

MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import piece
def fresh():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=32, initializer_range=0.5)).eval()
model = fresh()
"""

RUNS = {
    "kernels/grpo.py": LOSS + "import grpo\ncheck(grpo)",
    "kernels/reference.py": LOSS + """
import reference
check(reference)
assert torch.allclose(reference.token_logp(logits, target, 0.7)[0], want, atol=1e-5)
assert reference.group_advantage(torch.tensor([1.0, 0.0, 2.0, 2.0]), 2).tolist()[2:] == [0, 0]
""",
    "kernels/": LOSS + "import kernels\ncheck(kernels)\nassert kernels.backend('cpu') == 'reference'",
    POLICY_LOSS: """
import torch
from piece import policy_loss
logp = torch.tensor([-1.0, -2.0], requires_grad=True)
A, weight = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
policy_loss(logp, A, weight, None, None, 0.2, 0.2, 0.0).backward()
assert logp.grad.tolist() == [-0.5, 0.5]
old = logp.detach() - 1                                   # rho is e: above the clip where A > 0
logp.grad = None
policy_loss(logp, A, weight, old, None, 0.2, 0.2, 0.0).backward()
assert logp.grad[0] == 0 and logp.grad[1] > 1
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
    DECODER: MODEL + """
prompts = [[3, 4, 5, 6], [7, 8], [9]]
greedy = piece.generate(model, prompts, max_new_tokens=5, temperature=0, eos_id=39)
for prompt, tokens in zip(prompts, greedy.tokens):
    ids = torch.tensor([prompt])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=39,
                          pad_token_id=0)
    assert want[0, len(prompt):].tolist() == tokens, (want, tokens)
names = [f"{prompt} {sample}" for prompt in range(3) for sample in range(2)]
uniforms = piece.uniform_numbers(names, 5)
some = [piece.generate(model, prompts, num_samples=2, max_new_tokens=5, eos_id=39, uniforms=uniforms,
                       max_cache_tokens=limit) for limit in (1, 10000)]
assert some[0].tokens == some[1].tokens and len(some[0].tokens) == 6 and max(map(max, some[0].logprobs)) < 0
""",
    LORA: MODEL + """
ids = torch.arange(9)[None]
before = model(ids).logits
lora = piece.Lora(model, 2, 4.0)
assert torch.equal(model(ids).logits, before), "B starts at 0"
model(ids).logits.square().mean().backward()
for layer in lora.layers.values():
    layer.lora_B.data -= layer.lora_B.grad
changed = model(ids).logits
assert not torch.allclose(changed, before) and all(layer.weight.grad is None for layer in lora.layers.values())
with lora.off():
    assert torch.equal(model(ids).logits, before)
lora.save("merged", "base")
assert torch.allclose(LlamaForCausalLM.from_pretrained("merged")(ids).logits, changed, atol=1e-4)
again = fresh()
piece.Lora.load(again, "merged/adapter")
assert torch.allclose(again(ids).logits, changed, atol=1e-5)
""",
    JUDGE: """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
import piece
ids = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "good": 3, "bad": 4, "trace": 5}
words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
backbone = LlamaModel(LlamaConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=32))
rm = piece.RubricRewardModel(backbone, tokenizer, ["clear", "right"]).eval()
texts = ["good trace", "a bad trace of more words", "trace"]
score, dimensions = rm.score(texts)
assert score.shape == (3,) and dimensions.shape == (3, 2) and 0 <= score.min() and score.max() <= 1 and score.std() > 0
rm.save_pretrained("folder")
again = piece.RubricRewardModel.from_pretrained("folder", torch.device("cpu")).score(texts)
assert torch.equal(again[0], score) and torch.equal(again[1], dimensions)
""",
    REWARD: """
import piece
r = piece.Reward(e2e=1.0, rm=0.8, with_trace=3, without_trace=1, uplift=2 / 3, num_runs=3)
totals = {name: mode.total(r, 0.5, 0.5) for name, mode in piece.REWARDS.items()}
assert abs(totals["tracelift"] - (0.5 + 0.5 * 0.8 * 2 / 3)) < 1e-12
assert totals["exec_only"] == 1 and totals["rm_only"] == 0.8
assert abs(totals["uplift_only"] - (0.5 + 0.5 * 2 / 3)) < 1e-12 and totals["tracelift-code"] == 1
piece.REWARDS["mine"] = piece.Mode(lambda r, w_e, w_r: r.e2e * r.rm, needs=("runs", "rm"))
assert piece.REWARDS["mine"].total(r, 0, 0) == 0.8
"""}

# ---------------------------------------------------------------- running them


def lay_out(folder: Path, row: str) -> None:
    """Puts what a row takes into an empty folder."""
    folder.mkdir(parents=True)
    for name in FILES.get(row, [] if row in PIECES else [row.strip("`")]):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    if row in PIECES:
        (folder / "piece.py").write_text(PIECES[row]())
    (folder / "run.py").write_text(RUNS[row])


STANDARD = ("`verify.py`", REWARD)                        # need no installed package


@pytest.mark.parametrize("row", [row for row in RUNS if row not in STANDARD])
def test_a_copied_piece_runs_alone(row, tmp_path, monkeypatch):
    """In this process, which forgets what it knows of the repository: importing torch anew would take longer."""
    if row == "kernels/grpo.py":
        pytest.importorskip("triton")
    lay_out(tmp_path / "piece", row)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path / "piece")
    others = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests", ROOT / "tests" / "tools")]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "piece"), *others])
    try:
        runpy.run_path("run.py")
    finally:
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("row", STANDARD)
def test_a_copied_piece_runs_on_the_standard_library(tmp_path, row):
    """-S: no installed package can be imported."""
    lay_out(tmp_path / "piece", row)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "run.py"], cwd=tmp_path / "piece", capture_output=True, text=True,
                          env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_row_of_the_readme_has_a_piece_here():
    """A row that is added without a test would promise what nobody tried."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Copy a piece"):].partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.split(" | ")[1].strip() for line in table]
    assert [row.strip("`") for row in rows] == [row.strip("`") for row in RUNS]


# ---------------------------------------------------------------- public names

NAMES = {"data": "Problem perturb check_trace NEGATIVE_KINDS build_groups read_groups write_groups read_gsm8k "
                 "read_humaneval tiny_problems planner_prompt executor_prompt rm_text extract_reasoning UserError",
         "verify": "extract_answer math_equal extract_code Verdict run_programs exec_score",
         "executor": "load generate Completions Executor",
         "rm": "RubricRewardModel",
         "tracelift": "Reward REWARDS Mode policy_loss train evaluate inspect",
         "kernels": "advantage_logp token_logp group_advantage backend check",
         "data.Problem": "problem_id source task_type problem reference_solution tests reference_reasoning",
         "verify.Verdict": "outcome passed total detail ok",
         "executor.Completions": "tokens logprobs",
         "executor.Executor": "run success baseline",
         "rm.RubricRewardModel": "from_pretrained save_pretrained score",
         "data.NEGATIVE_KINDS": "math code",
         "tracelift.REWARDS": "tracelift tracelift-code exec_only rm_only uplift_only",
         "tracelift.Reward": "e2e rm with_trace without_trace uplift total"}
ARGUMENTS = {"data.perturb": "problem reasoning kind rng", "data.build_groups": "problems negatives_per_group seed",
             "data.tiny_problems": "task_type n seed", "data.rm_text": "problem reasoning",
             "data.executor_prompt": "problem reasoning", "verify.math_equal": "prediction reference",
             "verify.run_programs": "programs tests timeout memory_mb workers", "verify.exec_score": "verdict style",
             "executor.load": "path_or_name device dtype",
             "executor.generate": "model prompts num_samples max_new_tokens temperature eos_id generator "
                                  "max_cache_tokens",
             "kernels.advantage_logp": "logits target reward seq group_size temperature scale",
             "tracelift.policy_loss": "logp A weight old ref clip_low clip_high beta"}


def public(name: str):
    """A module, or what it defines."""
    module, _, own = name.partition(".")
    found = importlib.import_module(module)
    return getattr(found, own) if own else found


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_there(name):
    """Other projects use these."""
    found = public(name)
    known = found if isinstance(found, dict) else {*dir(found), *getattr(found, "__dataclass_fields__", ())}
    assert set(NAMES[name].split()) <= set(known)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_public_functions_keep_their_arguments(name):
    assert set(ARGUMENTS[name].split()) <= set(inspect.signature(public(name)).parameters)
