"""What all tests share: repository and tests/tools on sys.path, one thread, no network, a tiny random model on disk."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                       # before transformers is imported: no test may reach the hub
os.environ["TRITON_INTERPRET"] = "1"                     # before triton is: its own functions read it only then
os.environ.setdefault("OMP_NUM_THREADS", "1")            # for the processes that tests start
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "tools")]

import pytest  # noqa: E402
import torch  # noqa: E402

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
    import data
    import executor
    corpus = data.base_corpus("math", 300, 0) + data.base_corpus("code", 300, 0)
    tokenizer = executor.tiny_tokenizer([e.prompt + e.trace + e.ask + e.answer for e in corpus])
    torch.manual_seed(0)
    model = executor.tiny_model(len(tokenizer), hidden=32, layers=2).eval()
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer
