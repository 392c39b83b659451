"""kernels/: values and gradients against a float64 textbook written here in scalars, and the edges. Tests of
`implementation` run the plain PyTorch reference and the Triton kernels, the latter in Triton's interpreter, without a
GPU; others say which of the two they are about.

    python -m pytest tests/test_kernels.py
"""
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels
from kernels import group_advantage, reference

try:
    from kernels import grpo as fused
except ImportError:                                      # triton exists for Linux only
    fused = None

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")
needs_triton = pytest.mark.skipif(fused is None, reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")    # numpy's, on NaN inputs


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def implementation(request, monkeypatch):
    """kernels.reference or kernels.grpo; the functions of kernels run on it too."""
    monkeypatch.setattr(kernels, "backend", lambda device: request.param)
    return fused if request.param == "triton" else reference


def policy_loss(logp, A, weight, old, ref, clip_low, clip_high, beta):
    """The loss of the walk: what the kernels are for."""
    rho = torch.exp(logp - (logp.detach() if old is None else old))
    loss = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    if ref is not None:
        gap = ref - logp
        loss = loss + beta * rho * (torch.expm1(gap) - gap)
    return (weight * loss).sum()


# ---- the textbook: one row at a time, one scalar at a time, sharing nothing with kernels/ ----

def textbook(logits, target, reward, seq, weight, group_size, old, ref, temperature, scale, clip_low, clip_high, beta):
    """(loss, dloss/dlogits, logp, entropy, A) in float64; the gradient by the closed form, not by autograd."""
    M, V = logits.shape
    reward = reward.double().tolist()
    loss, dlogits = 0.0, torch.zeros(M, V, dtype=torch.float64)
    rows = []
    for i in range(M):
        z = [x / temperature for x in logits[i].double().tolist()]
        lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
        p = [math.exp(x - lse) for x in z]
        logp = z[target[i]] - lse
        first = int(seq[i]) // group_size * group_size
        group = reward[first:first + group_size]
        spread = statistics.pstdev(group) + 1e-6 if scale else 1.0
        A = (reward[seq[i]] - statistics.fmean(group)) / spread
        rho = math.exp(logp - float(old[i])) if old is not None else 1.0
        clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
        value = -min(rho * A, clipped * A)
        slope = -A * rho if rho * A <= clipped * A else 0.0
        if ref is not None:
            gap = float(ref[i]) - logp
            value += beta * rho * (math.exp(gap) - gap - 1)
            slope -= beta * rho * gap
        w = float(weight[i])
        loss += w * value
        for j in range(V):
            dlogits[i, j] = w * slope / temperature * (float(j == target[i]) - p[j])
        rows.append((logp, -sum(q * math.log(q) for q in p if q > 0), A))
    return loss, dlogits, *torch.tensor(rows, dtype=torch.float64).T


def batch(dtype=torch.float64, M=7, N=2, G=3, V=11, seed=0):
    """M sampled tokens of N * G traces, some of which have several and some none."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(M, V, generator=g, dtype=torch.float64).mul(2).to(dtype)
    return dict(logits=logits, target=torch.randint(V, (M,), generator=g), reward=torch.rand(N * G, generator=g),
                seq=torch.randint(N * G, (M,), generator=g).sort().values, group_size=G)


def run(function, rows, pull=None, **options):
    """(logp, entropy, A, gradient) where sum(logp * pull) is what is differentiated."""
    leaf = rows["logits"].detach().clone().requires_grad_()
    logp, entropy, A = function(**{**rows, "logits": leaf}, **options)
    logp.backward(torch.ones_like(logp) if pull is None else pull)
    return logp.detach(), entropy, A, leaf.grad


# ---- values and gradients ----

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [True, False])
def test_loss_and_gradient_match_the_textbook(implementation, dtype, off_policy, beta, temperature, scale):
    b = batch(dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.linspace(0.05, 0.3, 7, dtype=work)
    own = (b["logits"].double() / temperature).log_softmax(-1)[torch.arange(7), b["target"]].to(work)
    old = own + torch.tensor([0.05, -0.5, 0.5, 0.02, -0.3, 0.4, -0.02], dtype=work) if off_policy else None
    ref = own - torch.linspace(-1, 1, 7, dtype=work) if beta else None
    loss_settings = dict(clip_low=0.1, clip_high=0.3, beta=beta)
    leaf = b["logits"].clone().requires_grad_()
    rows = implementation.advantage_logp(**{**b, "logits": leaf}, temperature=temperature, scale=scale)
    loss = policy_loss(rows[0], rows[2], weight, old, ref, **loss_settings)
    loss.backward()
    want_loss, want_grad, *want = textbook(**b, weight=weight, old=old, ref=ref, temperature=temperature, scale=scale,
                                           **loss_settings)
    tolerance = dict(rtol=1e-9, atol=1e-11) if work == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(loss.item(), want_loss, **tolerance)
    for got, expected, learns in zip(rows, want, (True, False, False)):
        assert got.dtype == work and got.requires_grad == learns
        torch.testing.assert_close(got.detach().double(), expected, **tolerance)
    # a gradient in 16 bits is the float32 one, rounded once (float16: down to its subnormal spacing)
    bf16 = 2 ** -7 if implementation is fused else 2 ** -8           # the interpreter truncates where a GPU rounds
    rtol, atol = {torch.bfloat16: (bf16, 2e-6), torch.float16: (2 ** -10, 2e-6)}.get(dtype, tolerance.values())
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), want_grad, rtol=rtol, atol=atol)


def test_gradcheck(implementation):
    b = batch(M=4, V=7)
    logits = b.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: implementation.advantage_logp(x, **b, temperature=0.7)[0], logits)


def test_gradient_of_any_function_of_logp(implementation):
    """Any incoming gradient, also one number seen many times, and one that is not dense in memory."""
    b = batch()
    p = b["logits"].softmax(-1)
    onehot = torch.nn.functional.one_hot(b["target"], 11)
    for pull in torch.linspace(-2, 2, 7).double(), torch.ones(()).double().expand(7), torch.randn(14).double()[::2]:
        grad = run(implementation.advantage_logp, b, pull)[3]
        torch.testing.assert_close(grad, pull[:, None] * (onehot - p))
        assert grad.sum(-1).abs().max() < 1e-14


def test_token_logp_is_a_distribution(implementation):
    logits = torch.randn(1, 6, dtype=torch.float64).expand(6, 6).contiguous().requires_grad_()
    logp, entropy = kernels.token_logp(logits, torch.arange(6), temperature=1.7)
    assert logp.exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(entropy[0], torch.distributions.Categorical(logits=logits[0] / 1.7).entropy().detach())
    assert logp.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("offset", [0.0, -60.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_over_many_blocks(implementation, dtype, offset):
    """Against float64 on the same inputs, over 12 blocks of the kernel whose maximum rises. A bfloat16 log-softmax is
    off by 1e-2 here."""
    g = torch.Generator().manual_seed(0)
    M, V = 4, 49152
    b = dict(logits=(torch.randn(M, V, generator=g) * 3 + torch.linspace(-6, 6, V) + offset).to(dtype),
             target=torch.tensor([5, 4095, 4096, V - 1]), reward=torch.rand(M), seq=torch.arange(M), group_size=4)
    got = run(implementation.advantage_logp, b)
    want = run(reference.advantage_logp, {**b, "logits": b["logits"].double()})
    for x, y, tolerance in zip(got, want, (1e-5, 5e-5, 1e-5, 1e-5 if dtype == torch.float32 else 2 ** -7)):
        assert (x - y).abs().max() <= tolerance


def test_a_large_vocabulary_whose_last_block_is_not_full(implementation):
    b = batch(torch.bfloat16, M=2, V=151936)
    b["target"] = torch.tensor([5, 151935])
    got = run(implementation.advantage_logp, b)
    want = run(reference.advantage_logp, {**b, "logits": b["logits"].double()})
    assert (got[0] - want[0]).abs().max() <= 1e-5 and (got[1] - want[1]).abs().max() <= 1e-4


# ---- the advantage ----

@pytest.mark.parametrize("group_size", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("scale", [True, False])
def test_advantage_is_centred_and_affine_invariant_and_0_for_equal_rewards(implementation, group_size, scale):
    """r - mean of equal rewards is rounding noise; noise / (tiny std + eps) is an advantage of up to 1."""
    g = torch.Generator().manual_seed(group_size)
    r = torch.randn(24, generator=g)
    equal = [torch.full((24,), x) for x in (0.0, 0.1, 1e6 + 0.1, -1e-8, 1 / 3)]
    reward = torch.cat([r, 5 * r - 100, *equal])
    M = len(reward)
    zeros = torch.zeros(M, dtype=torch.int64)
    A = implementation.advantage_logp(torch.zeros(M, 2), zeros, reward, torch.arange(M), group_size, scale=scale)[2]
    groups = r.double().view(-1, group_size)
    want = groups - groups.mean(1, keepdim=True)
    if scale:
        want = want / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    torch.testing.assert_close(A[:24].double(), want.flatten(), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(A[24:48], A[:24] * (1 if scale else 5), rtol=2e-3, atol=1e-4)
    assert (A[48:] == 0).all() and (group_size == 1) == (A[:24] == 0).all()
    torch.testing.assert_close(group_advantage(reward, group_size, scale), A, rtol=2e-5, atol=2e-6)


def test_advantage_takes_the_type_of_logp_and_no_gradient(implementation):
    b = batch()
    b["reward"].requires_grad_()                         # float32 beside float64 logits
    A = implementation.advantage_logp(**b)[2]
    want = group_advantage(b["reward"].double(), 3)[b["seq"]]
    assert A.dtype == torch.float64 and not A.requires_grad and not want.requires_grad
    torch.testing.assert_close(A, want)
    exact = implementation.advantage_logp(**{**b, "reward": torch.tensor([1, 0, 0, 0, 1, 1])})[2]      # integers
    torch.testing.assert_close(exact, group_advantage(torch.tensor([1., 0, 0, 0, 1, 1]).double(), 3)[b["seq"]])


def test_a_reward_that_is_not_finite_is_loud_in_its_group_alone():
    A = group_advantage(torch.tensor([1.0, NAN, 0.0, 2.0, 5.0, 5.0]), 3)
    assert A[:3].isnan().all() and A[3:].isfinite().all()


# ---- edges of the rows ----

def test_micro_batches_are_exact(implementation):
    """Groups straddle them; rewards are those of the step."""
    b = batch()
    whole = run(implementation.advantage_logp, b)
    for cut in (slice(0, 1), slice(1, 5), slice(5, 7)):
        part = run(implementation.advantage_logp, {**b, **{k: b[k][cut] for k in ("logits", "target", "seq")}})
        assert all(torch.equal(x, y[cut]) for x, y in zip(part, whole))


def test_no_rows(implementation):
    b = {**batch(M=0), "reward": torch.rand(6)}
    got = run(implementation.advantage_logp, b)
    assert [x.shape for x in got] == [(0,), (0,), (0,), (0, 11)]


@pytest.mark.parametrize("target", [-1, -100, 11, 10 ** 12])
def test_a_target_outside_the_vocabulary_is_nan_not_a_fault(implementation, target):
    b = batch()
    want = run(implementation.advantage_logp, b)
    b["target"][2] = target
    logp, _, _, grad = run(implementation.advantage_logp, b)
    rest = torch.arange(7) != 2
    assert logp[2].isnan() and grad[2].isnan().all()
    assert torch.equal(logp[rest], want[0][rest]) and torch.equal(grad[rest], want[3][rest])


@pytest.mark.parametrize("seq", [-1, 6, 2 ** 31])
def test_a_trace_that_does_not_exist_is_loud(implementation, seq):
    b = batch()
    b["seq"][2] = seq
    if implementation is reference:
        with pytest.raises(IndexError):
            implementation.advantage_logp(**b)
        return
    logp, _, A, _ = run(implementation.advantage_logp, b)                # to raise would wait for the GPU
    assert A[2].isnan() and A.isnan().sum() == 1 and logp.isfinite().all()


def test_forbidden_tokens_have_logit_minus_infinity(implementation):
    """The whole first block of the kernel, and a sampled token of probability 0, which a later loss may ignore."""
    b = batch(torch.float32, V=5137)
    narrow = {**b, "logits": b["logits"][:, 5000:].contiguous(), "target": b["target"] % 137}
    b["logits"][:, :5000] = -INF
    b["target"] = narrow["target"] + 5000
    got, want = run(implementation.advantage_logp, b), run(implementation.advantage_logp, narrow)
    for x, y in zip(got[:3], want[:3]):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(got[3][:, 5000:], want[3])
    assert (got[3][:, :5000] == 0).all() and want[3].abs().sum() > 0
    b["target"][0] = 3
    logp, _, _, grad = run(implementation.advantage_logp, b, pull=torch.tensor([0.0, 1, 1, 1, 1, 1, 1]))
    assert logp[0] == -INF and (grad[0] == 0).all()


def test_any_row_stride_and_an_odd_or_padded_vocabulary(implementation):
    b = batch(V=137)
    wide = torch.randn(7, 160, dtype=torch.float64, requires_grad=True)
    narrow = wide[:, :137]
    assert narrow.stride() == (160, 1)
    logp = implementation.advantage_logp(**{**b, "logits": narrow})[0]
    logp.sum().backward()
    want = run(implementation.advantage_logp, {**b, "logits": narrow.detach().contiguous()})
    assert torch.equal(logp, want[0]) and torch.equal(wide.grad[:, :137], want[3])
    assert (wide.grad[:, 137:] == 0).all()


def test_vocabulary_of_one(implementation):
    logp, entropy, _, grad = run(implementation.advantage_logp, batch(V=1))
    assert (logp == 0).all() and (entropy == 0).all() and (grad == 0).all()


def test_a_row_of_nan_logits_is_loud(implementation):
    b = batch()
    b["logits"][0, 3] = NAN
    logp, _, _, grad = run(implementation.advantage_logp, b)
    assert logp[0].isnan() and grad[0].isnan().all() and logp[1:].isfinite().all() and grad[1:].isfinite().all()


def test_no_input_is_written(implementation):
    b = batch()
    before = {k: v.clone() for k, v in b.items() if torch.is_tensor(v)}
    leaf = b["logits"].requires_grad_()
    implementation.advantage_logp(**b)[0].sum().backward()
    assert all(torch.equal(b[k].detach(), v) for k, v in before.items()) and leaf.grad.abs().sum() > 0


# ---- what only the fused kernels have ----

@needs_triton
def test_rows_beyond_two_gigabytes():
    """Row 2 begins at element 2.2e9 > 2^31. The pages between the rows are never touched, so this takes no memory."""
    data = torch.randn(3, 137, generator=torch.Generator().manual_seed(0)).bfloat16()
    far = torch.empty(2_200_000_137, dtype=torch.bfloat16).as_strided((3, 137), (1_100_000_000, 1))
    far.copy_(data)
    rows = (torch.tensor([5, 6, 7]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 1]), 2)
    near, leaf = data.clone().requires_grad_(), far.detach().requires_grad_()
    want, got = fused.advantage_logp(near, *rows), fused.advantage_logp(leaf, *rows, inplace=True)
    assert torch.equal(got[0], want[0]) and want[0].unique().numel() == 3
    want[0].sum().backward(), got[0].sum().backward()
    assert torch.equal(far, near.grad) and near.grad.abs().max(1).values.min() > 0


@needs_triton
def test_in_place(monkeypatch):
    """The gradient lies where the logits lay, and whoever uses the logits again gets an error instead of it."""
    b = batch(torch.float32)
    *want, want_grad = run(fused.advantage_logp, b)
    leaf = b["logits"].clone().requires_grad_()
    logits = leaf * 1                                    # as the head of a model would give them
    square = (logits ** 2).sum()                         # its backward needs the logits
    total = fused.advantage_logp(**{**b, "logits": logits}, inplace=True)[0].sum()
    torch.testing.assert_close(total, want[0].sum())
    total.backward(retain_graph=True)
    assert torch.equal(logits.detach(), want_grad) and torch.equal(leaf.grad, want_grad)
    for again in total, square:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")     # the public function works in place on CUDA
    logits = leaf * 1
    kernels.advantage_logp(**{**b, "logits": logits})[0].sum().backward()
    torch.testing.assert_close(logits.detach(), run(fused.advantage_logp, {**b, "logits": leaf})[3])


@needs_triton
def test_no_second_derivative():
    b = batch()
    leaf = b["logits"].requires_grad_()
    logp = fused.advantage_logp(**b)[0].sum()
    first, = torch.autograd.grad(logp * logp, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_triton
def test_rows_of_any_stride_and_int32_traces():
    b = batch()
    want = run(fused.advantage_logp, b)
    spread = {k: b[k].repeat_interleave(2)[::2] for k in ("target", "reward", "seq")}
    assert not spread["target"].is_contiguous()
    for other in spread, {"seq": b["seq"].int()}:
        assert all(torch.equal(x, y) for x, y in zip(run(fused.advantage_logp, {**b, **other}), want))


@needs_triton
@pytest.mark.parametrize("name, change, inplace", [
    ("logits", lambda b: b["logits"].T.contiguous().T, False),
    ("logits", lambda b: b["logits"][:1].expand(7, 11), True),
    ("target", lambda b: b["target"][1:], False),
    ("seq", lambda b: b["seq"][:, None], False),
    ("seq", lambda b: b["seq"][:3], False),
    ("reward", lambda b: b["reward"][:5], False),
])
def test_what_would_be_wrong_in_silence_is_refused(name, change, inplace):
    b = batch()
    with pytest.raises(ValueError, match=name):
        fused.advantage_logp(**{**b, name: change(b)}, inplace=inplace)


def test_rewards_that_are_not_whole_groups_are_refused(implementation):
    with pytest.raises((ValueError, RuntimeError)):
        implementation.advantage_logp(**{**batch(), "reward": torch.rand(5)})


# ---- what runs where ----

def test_the_environment_chooses_the_backend(monkeypatch):
    assert kernels.backend("cpu") == "reference" and kernels.backend(torch.device("cuda", 0)) == "triton"
    monkeypatch.setenv("TRACELIFT_KERNELS", "reference")
    assert kernels.backend("cuda") == "reference"
    kernels.check("cuda")                                # nothing to run, so no GPU either
    monkeypatch.setenv("TRACELIFT_KERNELS", "refrence")
    with pytest.raises(ValueError, match="^TRACELIFT_KERNELS=refrence: must be 'reference'"):
        kernels.backend("cpu")


def check_fails(monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    with pytest.raises(RuntimeError) as caught:
        kernels.check("cpu")
    message = str(caught.value)
    assert "\n" not in message and "TRACELIFT_KERNELS=reference" in message
    return message


@needs_triton
def test_check_runs_the_kernels_on_this_thread(monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    launches, threads = [], []
    real, backward = torch.autograd.grad, fused._AdvantageLogp.backward
    monkeypatch.setattr(fused._AdvantageLogp, "backward", lambda *a: launches.append("backward") or backward(*a))
    monkeypatch.setattr(torch.autograd, "grad",
                        lambda *a: threads.append(torch._C._is_multithreading_enabled()) or real(*a))
    kernels.check("cpu")
    assert launches == ["backward"] and threads == [False, False]
    assert torch._C._is_multithreading_enabled()


@needs_triton
@pytest.mark.parametrize("failure", [
    RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["gcc", "main.c"])], ids=["no compiler", "no Python.h"])
def test_triton_that_cannot_compile_is_found_by_check(monkeypatch, failure):
    class Kernel:                                        # kernel[grid](...)
        def __getitem__(self, grid):
            raise failure

    monkeypatch.setattr(fused, "_forward", Kernel())
    message = check_fails(monkeypatch)
    assert " ".join(str(failure).split()) in message and "C compiler and Python.h" in message


@needs_triton
@pytest.mark.parametrize("place", range(4), ids=["logp", "entropy", "A", "gradient"])
def test_kernels_that_compute_nonsense_are_found_by_check(monkeypatch, place):
    real = fused.advantage_logp

    def wrong(logits, *rows, **options):
        logp, entropy, A = real(logits, *rows, **options)
        steeper = 1.01 * logp - 0.01 * logp.detach()
        broken = (logp + 0.01, entropy, A), (logp, entropy + 0.01, A), (logp, entropy, -A), (steeper, entropy, A)
        return broken[place]

    monkeypatch.setattr(fused, "advantage_logp", wrong)
    assert "not close" in check_fails(monkeypatch)


@pytest.mark.parametrize("line, reason", [
    (None, "import of triton halted"),
    ("raise OSError('libcuda.so.1: wrong version\\nof something')", "libcuda.so.1: wrong version of something"),
    ("import a_part_of_triton", "No module named 'a_part_of_triton'"),
])
def test_triton_that_is_missing_or_broken_is_found_by_check(monkeypatch, tmp_path, line, reason):
    monkeypatch.delitem(sys.modules, "kernels.grpo", raising=False)
    monkeypatch.delattr(kernels, "grpo", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    if line is None:
        monkeypatch.setitem(sys.modules, "triton", None)             # import triton: ModuleNotFoundError
    else:
        (tmp_path / "triton.py").write_text(line + "\n")
        monkeypatch.syspath_prepend(tmp_path)
    assert reason in check_fails(monkeypatch)
    reference.advantage_logp(**batch())                              # needs no triton


@needs_triton
def test_each_file_copied_alone(tmp_path):
    code = """if 1:
        import sys, torch
        import grpo, reference
        assert "kernels" not in sys.modules
        rows = (torch.arange(6), torch.tensor([0., 1.]), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
        logits = torch.randn(6, 9)
        torch.testing.assert_close(grpo.advantage_logp(logits, *rows), reference.advantage_logp(logits, *rows))"""
    for name in "reference.py", "grpo.py":
        (tmp_path / name).write_text((ROOT / "kernels" / name).read_text())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


# ---- compiled for an H100 or H200, without one ----

COMPILE = """if 1:
    import json
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from kernels import grpo

    TYPES = {"X": "*bf16", "DX": "*bf16", "TARGET": "*i64", "SEQ": "*i64", "stride": "i32", "dstride": "i32",
             "B": "i32", "G": "i32"}                                 # everything else is a pointer to float32

    def ptx(kernel, num_warps, **constants):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if signature[name].startswith("*") or name.endswith("stride")}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values, aligned)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]

    common = {"V": 4 * grpo.BLOCK, "C": 1.4426950408889634, "BLOCK": grpo.BLOCK}
    print(json.dumps([ptx(grpo._forward, 4, GROUP=8, SCALE=True, **common), ptx(grpo._backward, 8, **common)]))
"""


@needs_triton
def test_compiled_code_reads_128_bits_at_once_and_has_one_ex2_per_logit():
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    for ptx, num_warps, extra in zip(json.loads(done.stdout), (4, 8), (1, 0)):
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        per_thread = fused.BLOCK // (32 * num_warps)     # logits of a block
        assert sum(".v4.b32" in line for line in loads) == per_thread // 8, loads
        assert sum(".b16" in line for line in loads) <= 1, loads             # x[target]
        assert "st.global.v4.b32" in ptx or extra                            # the gradient
        assert ptx.count("ex2.approx.ftz.f32") == per_thread + extra         # extra: when the maximum moves
        assert ".f64" not in ptx


@needs_triton
def test_the_benchmark_runs_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run bench_kernels.py itself")
    bench = next((ROOT / "tests").rglob("bench_kernels.py"))
    done = subprocess.run([sys.executable, bench, "--rows", "8", "--vocab", "32", "--hidden", "8", "--out", "b.json"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "b.json").read_text())
    assert "times mean nothing" in done.stdout and "times mean nothing" in report["machine"]
    assert report["errors"]["float32"]["logp"] <= 1e-5 and report["errors"]["bfloat16"]["logp"] <= 1e-5
    assert {"forward", "backward", "head, in pieces", "eager forward", "eager backward"} <= report["times"]["32"].keys()
