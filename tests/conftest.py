"""What all tests share: the repository and tests/tools on sys.path, one thread, no network, a tiny random model on disk,
and a run folder of toy size."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                       # before transformers is imported: no test may reach the hub
os.environ["TRITON_INTERPRET"] = "1"                     # before triton is: its own functions read it only then
os.environ.setdefault("OMP_NUM_THREADS", "1")            # for the processes that tests start
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

import contextlib  # noqa: E402
import io  # noqa: E402
import shutil  # noqa: E402
import zlib  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import executor  # noqa: E402
import rm as rm_module  # noqa: E402
import verify  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    """Long tests run with `-m slow` only. A call that a library is about to drop fails the test that makes it."""
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with -m slow")
    config.addinivalue_line("filterwarnings", "error::FutureWarning")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder, model, tokenizer): a random tiny model whose vocabulary covers both domains of the tiny world."""
    corpus = data.base_corpus("math", 300, 0) + data.base_corpus("code", 300, 0)
    tokenizer = executor.tiny_tokenizer([e.prompt + e.trace + e.ask + e.answer for e in corpus])
    torch.manual_seed(0)
    model = executor.tiny_model(len(tokenizer), hidden=32, layers=2).eval()
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


TOY = {data: "--train 12 --heldout 5",
       executor: "--sequences 200 --hidden 32 --layers 2 --eval_problems 4 --device cpu --max_answer_tokens 6",
       rm_module: "--epochs 1 --max_heldout 5 --device cpu"}


def command(module, *argv) -> str:
    """Runs a command in this process. Returns what it printed."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out):
        data.run_command(module.main, [str(a) for a in argv])
    out.seek(0)
    return out.read()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A run folder of toy size: groups, base model, reward model. Tests copy it: `run_dir`."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    for module, flags in TOY.items():
        command(module, *flags.split(), "--run_dir", run_dir)
    return run_dir


@pytest.fixture
def run_dir(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "toy"))


def draw_lots(m):
    """A verdict that depends on the executor's output alone: an untrained executor then succeeds now and then."""
    m.setattr(verify, "extract_answer", lambda output: output)
    m.setattr(verify, "math_equal", lambda output, reference: zlib.crc32(output.encode()) % 3 == 0)


@pytest.fixture
def lottery(monkeypatch):
    draw_lots(monkeypatch)
