"""The compiled kernels, captured decoding and training on a real GPU. The other tests of this suite run them in Triton's interpreter, which is chosen
once per process; so each test here is a script in a process of its own. Without a GPU all are skipped.

    python -m pytest tests/test_gpu.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PRELUDE = """
import statistics, sys, torch
sys.path.append("tests")
import bench_kernels as bench
import kernels
from kernels import grpo
assert bench.CUDA
device = torch.device("cuda")
"""


def on_gpu(script: str, memory_gb: float) -> None:
    """Runs the script; an assertion that fails in it fails here."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < memory_gb:
        pytest.skip(f"needs {memory_gb} GB of GPU memory, {free:.0f} are free")
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_errors_against_float64():
    on_gpu("""
for V in 4096, 49152, 5137:
    for dtype, limit in (torch.float32, 1e-5), (torch.bfloat16, 2 ** -8), (torch.float16, 2 ** -10):
        gap = bench.errors(256, V, dtype, device)
        assert gap["loss"] <= 1e-5 and gap["logp"] <= 1e-5 and gap["gradient"] <= limit, (V, dtype, gap)
""", 2)


def test_padding_and_reruns_are_exact():
    """The same bits again, and NaN in padded rows does not come out."""
    on_gpu("""
s = bench.step(2048, 49152, torch.bfloat16, device)
dead = s["weight"] == 0
runs = []
for poison in False, False, True:
    x = s["logits"].clone()
    if poison:
        x[dead] = float("nan")
    out = grpo.grpo_loss_triton(**{**s, "logits": x.requires_grad_()}, beta=0.1, ref_logp=s["old_logp"] - 0.1)
    out[0].backward()
    runs.append([*out, x.grad])
for other in runs[1:]:
    assert all(torch.equal(a, b) for a, b in zip(runs[0], other))
assert dead.any() and (runs[0][-1][dead] == 0).all() and runs[0][-1].abs().sum() > 0
""", 2)


def test_rows_beyond_2_to_the_31_elements():
    on_gpu("""
M, V = 14336, 151936
x = torch.zeros(M, V, dtype=torch.bfloat16, device=device)
x[-1].copy_(torch.randn(V, device=device))
assert x.numel() > 2 ** 31
target = torch.full((M,), 7, device=device)
logp = grpo.token_logp_triton(x, target)[0]
want = x[-1].double().log_softmax(-1)
assert (logp[-1] - want[7]).abs() < 1e-4 and (logp[0] + torch.tensor(float(V)).log()).abs() < 1e-4
weight = torch.zeros(M, device=device)
weight[-1] = 1
loss = grpo.grpo_loss_triton(x.requires_grad_(), target, torch.tensor([0.0, 1.0], device=device),
                      torch.ones(M, dtype=torch.int32, device=device), weight, 2, inplace=True)[0]
loss.backward()
want = (want.exp() - torch.nn.functional.one_hot(target[-1], V)).float()
assert (x.grad[-1].float() - want).abs().max() < 1e-2 and (x.grad[:-1] == 0).all() and x.grad[-1, 7] < -0.9
""", 12)


def test_memory_and_the_linear_variant():
    """In place, the peak is that of the logits; the linear variant agrees and needs at most a sixth of it."""
    on_gpu("""
M, V, H = 32768, 49152, 256
s = bench.step(M, V, torch.bfloat16, device)
del s["logits"]
hidden, head = (torch.randn(n, H, device=device).bfloat16().mul_(0.2).requires_grad_() for n in (M, V))
grads, peaks = [], []
for loss in (lambda: kernels.grpo_loss(hidden @ head.T, **s, inplace=True),
             lambda: kernels.linear_grpo_loss(hidden, head, **s)):
    loss()[0].backward()                                 # compiles
    hidden.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = loss()
    out[0].backward()
    peaks.append(torch.cuda.max_memory_allocated() - before)
    grads.append((out[0].detach(), hidden.grad.float(), head.grad.float()))
    hidden.grad = head.grad = None
    del out
for a, b in zip(*grads):
    assert (a - b).norm() <= 2e-2 * a.norm(), (a - b).norm() / a.norm()
logits, gradients = 2 * M * V, 2 * V * H + 2 * M * H
assert peaks[0] <= 1.05 * logits + 2 * gradients, peaks
assert 6 * peaks[1] <= peaks[0], peaks
""", 14)


def test_share_of_the_copy_bandwidth():
    """Forward >= 84 % and backward >= 90 % of a copy's bandwidth, on a GPU of the Hopper generation or later."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the shares are promised for sm_90 and later")
    on_gpu("""
s = bench.step(8192, 151936, torch.bfloat16, device)
copy = bench.copy_bandwidth(s["logits"], 20)
s["logits"].requires_grad_()
s["old_logp"] = None                                     # on-policy: no row is clipped, so all are read
r = bench.measure("ours", lambda: grpo.grpo_loss_triton(**s, inplace=True), [s["logits"]], 20)
size = s["logits"].nbytes / 1e6
backward = r["total"] - r["forward"]
assert size / r["forward"] >= 0.84 * copy and 2 * size / backward >= 0.90 * copy, (r, copy)
""", 12)


def test_graphs_decode_like_plain_steps():
    """In float64, where shapes padded to a few decide no near tie. The second call replays what the first captured."""
    on_gpu("""
import executor
torch.manual_seed(0)
model = executor.tiny_model(4096, 256, 4).to(device, torch.float64).eval()
prompts = [[7 + 13 * i * j % 4000 for j in range(1, 5 + 11 * (i % 9))] for i in range(24)]
run = lambda memory: executor.generate(model, prompts, num_samples=3, max_new_tokens=40, temperature=0, eos_id=1,
                                       memory=memory).tokens
plain, memory = run(None), {}
assert run(memory) == plain and run(memory) == plain
assert executor._can_capture(model)
assert any(cache.graphs for cache in memory.values() if isinstance(cache, executor.Cache))
""", 2)


@pytest.mark.parametrize("options", [["--beta", "0.1", "--inner_epochs", "2"], ["--lora_rank", "4", "--checkpointing", "1"]])
def test_training_runs_on_the_gpu(tmp_path, options):
    """Every stage at toy size: bfloat16 executor, graphs, autocast, the linear loss. That nothing raises, that all
    numbers are finite and a gradient arrives; the values are checked on the CPU. rm_only, since this base model never
    succeeds, and without spread there is no backward pass."""
    root = Path(__file__).resolve().parent.parent
    for command in (["data.py"], ["executor.py"], ["rm.py"], ["tracelift.py", "train", "--mode", "rm_only", *options],
                    ["tracelift.py", "evaluate"]):
        done = subprocess.run([sys.executable, *command, "--preset", "smoke", "--run", tmp_path], cwd=root, text=True,
                              capture_output=True, env={**os.environ, "TRITON_INTERPRET": "0"})
        assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "planner-rm_only-seed0" / "metrics.jsonl").read_text()
    assert log.count("\n") == 2 and "NaN" not in log and "Infinity" not in log
    assert all(json.loads(line)["grad_norm"] > 0 for line in log.splitlines())
