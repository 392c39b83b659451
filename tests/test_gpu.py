"""The compiled kernels, decoding and training on a real GPU. The other tests of this suite run on a CPU, the kernels in
Triton's interpreter, which is chosen once per process; so each test here is a script in a process of its own. Without
a GPU all are skipped.

    python -m pytest tests/test_gpu.py
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ROOT = Path(__file__).resolve().parent.parent
PRELUDE = """
import dataclasses, math, pathlib, sys, tempfile, warnings
import torch
sys.path.append("tests")
import bench_kernels as bench
import data, executor, gpu, kernels, memory_table, tracelift
from kernels import grpo
device = executor.pick_device("cuda")
# 28 million numbers, so that it is trained in bfloat16 as a real model is
SHAPE = memory_table.Shape(32000, 512, 4, 8, 2, 1536, True)
SIZE = dataclasses.replace(gpu.TOY, dry=False, shape=SHAPE, trace_tokens=24, answer_tokens=16)
"""


def on_gpu(script: str, memory_gb: float) -> None:
    """Runs the script; an assertion that fails in it fails here."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < memory_gb:
        pytest.skip(f"needs {memory_gb} GB of GPU memory, {free:.0f} are free")
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ 1. kernels


def test_triton_starts_and_is_chosen():
    on_gpu("""
kernels.check(device)
assert kernels.backend(device) == "triton" and bench.CUDA
""", 1)


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


# ------------------------------------------------------------------------------------------------ 2. decoding

PROMPTS = """
prompts = [[7 + 13 * i * j % 4000 for j in range(1, 5 + 11 * (i % 9))] for i in range(24)]
"""


def test_greedy_decoding_is_that_of_transformers():
    """In float64, where rounding decides no near tie."""
    on_gpu(PROMPTS + """
model = gpu.random_model(memory_table.Shape(4096, 256, 4, 8, 2, 512, True), device, torch.float64)
ours = executor.generate(model, prompts, max_new_tokens=40, temperature=0, eos_id=1)
for prompt, tokens in zip(prompts, ours.tokens):
    ids = torch.tensor([prompt], device=device)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                            eos_token_id=1, pad_token_id=0)
    assert theirs[0, len(prompt):].tolist() == tokens
""", 2)


def test_the_same_draws_give_the_tokens_that_a_cpu_gives():
    """In float64: what is sampled depends on the draws, not on the machine."""
    on_gpu(PROMPTS + """
model = gpu.random_model(memory_table.Shape(4096, 256, 4, 8, 2, 512, True), "cpu", torch.float64)
draws = executor.draws([f"row {r}" for r in range(3 * len(prompts))], 30)
runs = []
for where in torch.device("cpu"), device:
    runs.append(executor.generate(model.to(where), prompts, num_samples=3, max_new_tokens=30, temperature=1.0,
                                  eos_id=1, draws=draws))
assert runs[0].tokens == runs[1].tokens
for a, b in zip(runs[0].logprobs, runs[1].logprobs):
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-4
""", 2)


def test_scorer_agrees_with_sampler_within_rounding():
    """A sampled token's log-prob from single steps with cached keys, beside that from one pass over the whole
    sequence: both in bfloat16, the one batched in another way than the other. The logits are spread as those of a
    trained model, so that their rounding shows."""
    on_gpu(PROMPTS + """
for dtype in torch.float32, torch.bfloat16:              # planner under autocast; planner with LoRA
    model = gpu.random_model(SHAPE, device, dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5)
    assert executor.work_dtype(model) == torch.bfloat16
    draws = executor.draws([f"row {r}" for r in range(2 * len(prompts))], 30)
    with executor.autocast(model):
        out = executor.generate(model, prompts, num_samples=2, max_new_tokens=30, temperature=1.0, eos_id=1,
                                draws=draws)
    rows = [prompt + tokens for prompt, tokens in zip([p for p in prompts for _ in "12"], out.tokens)]
    starts = [len(prompt) - 1 for prompt in prompts for _ in "12"]
    ids = executor.pad(rows, 0, device)
    at = [r * ids.shape[1] + t for r, row in enumerate(rows) for t in range(starts[r], len(row) - 1)]
    at = torch.tensor(at, device=device)
    with torch.no_grad(), executor.autocast(model):
        logits = executor.token_logits(model, ids, at)
    scored = kernels.token_logp(logits, ids.flatten()[at + 1])[0]
    gap = (scored - torch.tensor(sum(out.logprobs, []), device=device)).abs()
    assert scored.std() > 0.5 and gap.mean() < 0.03 and gap.max() < 0.5, (dtype, gap.mean(), gap.max(), scored.std())
""", 3)


def test_logits_that_are_not_finite_are_an_error_that_the_gpu_survives():
    """torch.multinomial would have ended the CUDA context, and the checkpoint could not be written any more."""
    on_gpu("""
model = gpu.random_model(SHAPE, device, torch.bfloat16)
with torch.no_grad():
    model.get_input_embeddings().weight[5].fill_(float("nan"))
try:
    executor.generate(model, [[3, 5, 7]], max_new_tokens=4, temperature=1.0, eos_id=1, draws=executor.draws(["x"], 4))
    raise SystemExit("no error")
except FloatingPointError:
    pass
assert torch.ones(3, device=device).sum().item() == 3
""", 2)


def test_cudnn_does_not_choose_attention():
    on_gpu("""
assert not torch.backends.cuda.cudnn_sdp_enabled()
model = gpu.random_model(SHAPE, device, torch.bfloat16)
for make in gpu.decoding_pass, gpu.training_pass:
    assert gpu.backend_of(make(model, SHAPE, 4, 64)) != "CUDNN_ATTENTION"
""", 2)


# ------------------------------------------------------------------------------------------------ 3. training


def test_adamw_needs_no_copy_of_the_weights():
    """Fused, its peak is weights, gradients and two moments, as the table of memory has it."""
    on_gpu("""
before = torch.cuda.memory_allocated()
model = gpu.random_model(SHAPE, device, torch.float32)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer = executor.adamw(model.parameters(), 1e-4)
torch.cuda.reset_peak_memory_stats()
optimizer.step()
peak = torch.cuda.max_memory_allocated() - before
want = sum(memory_table.learning(memory_table.model_numbers(SHAPE)).values())
assert want <= peak <= 1.02 * want, (peak, want)
""", 2)


STEP = """
run_dir = pathlib.Path(tempfile.mkdtemp())
gpu.make_run(run_dir, SIZE, device, None)
"""


@pytest.mark.parametrize("flags", [["--checkpointing", "0"], ["--beta", "0.1", "--inner_epochs", "2"],
                                   ["--lora_rank", "4"]])
def test_a_training_in_bfloat16(flags):
    """Autocast, checkpointing, the linear loss, an adapter: all numbers are finite, a gradient arrives, what is scored
    is what was sampled, and memory is counted."""
    on_gpu(STEP + f"flags = {flags!r}" + """
with gpu.coin_as_verifier():
    steps = gpu.train_measured(gpu.step_flags(SIZE, run_dir, "x", device) + flags, keep=True)
assert len(steps) == SIZE.steps
for step in steps:
    assert all(math.isfinite(value) for value in step.values() if isinstance(value, float)), step
    assert step["sampler_gap"] < 0.03 and step["peak_gib_update"] > 0
assert max(step["grad_norm"] for step in steps) > 0
""", 3)


def test_a_micro_batch_waits_for_its_metrics_only():
    """Loss, entropy and sampler gap are read by the host, and the loss asks which rows count; no other operation of a
    micro-batch makes the host wait for the GPU."""
    on_gpu(STEP + """
planner, tokenizer = executor.load(executor.base_of(run_dir), device, torch.float32)
problems = data.read_problems(run_dir / "groups" / "train.jsonl")[:4]
batch = tracelift.rollout(planner, tokenizer, problems, 2, 1.0, 16, "waits")
reward = torch.arange(8.0) % 2
advantage = kernels.group_advantage(reward, 2)


def waits(rows):
    micro_tokens = rows * batch.ids.shape[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        tracelift.accumulate_gradient(planner, batch, reward, advantage, None, None, 2, micro_tokens, "dapo", 16,
                                      len(batch.target), len(batch.ids),
                                      temperature=1.0, clip_low=0.2, clip_high=0.2, beta=0.0, scale=True)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


waits(2)                                                 # compiles
one, four = waits(8), waits(2)
assert one > 0 and (four - one) / 3 <= 4, (one, four)
""", 3)


def test_the_tiny_world_from_end_to_end(tmp_path):
    """run.sh at toy size, in float32 on the GPU."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"SKIP_INSTALL": "1", "TASKS": "math", "RUN": str(tmp_path / "run"), "PATH": here,
                                "TRITON_INTERPRET": "0"}
    done = subprocess.run(["./run.sh", "smoke"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run-math" / "planner-tracelift-seed0" / "metrics.jsonl").read_text()
    assert log.count("\n") == 2 and "NaN" not in log and "Infinity" not in log
