"""kernels/: values and gradients against a float64 textbook written here in scalars, and the edges of the loss. Tests
marked @both run the plain PyTorch reference and the Triton kernels, the latter in Triton's interpreter, without a GPU.

    python -m pytest tests/test_kernels.py
"""
import functools
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels
from kernels import group_advantage, grpo_loss, linear_grpo_loss, token_logp, token_weights

try:
    from kernels import grpo as fused
except ImportError:                                      # triton exists for Linux only
    fused = None

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["reference", "triton"])
def implementation(request, monkeypatch):
    """Lets the functions of kernels run on one of the two."""
    if request.param == "triton":
        if fused is None:
            pytest.skip("triton is not installed")
        monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    return request.param


both = pytest.mark.usefixtures("implementation")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")    # numpy's, on NaN inputs


# ---- the textbook: one row at a time, one scalar at a time, sharing nothing with kernels/ ----

def textbook(logits, target, reward, seq, weight, group_size, old_logp=None, ref_logp=None, temperature=1.0,
             clip_low=0.2, clip_high=0.2, beta=0.0, adv_eps=1e-6, ddof=0, scale=True):
    """(loss, dloss/dlogits, logp, entropy, advantage) in float64; the gradient by the closed form, not by autograd."""
    M, V = logits.shape
    reward = reward.double().tolist()
    loss, dlogits = 0.0, torch.zeros(M, V, dtype=torch.float64)
    logps, entropies, advantages = [], [], []
    for i in range(M):
        w, t = float(weight[i]), int(target[i])
        if w == 0:
            logps.append(0.0), entropies.append(0.0), advantages.append(0.0)
            continue
        z = [x / temperature for x in logits[i].double().tolist()]
        lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
        p = [math.exp(x - lse) for x in z]
        logp = z[t] - lse
        first = int(seq[i]) // group_size * group_size
        group = reward[first:first + group_size]
        spread = statistics.stdev(group) if ddof else statistics.pstdev(group)
        A = (reward[int(seq[i])] - statistics.fmean(group)) / (spread + adv_eps if scale else 1.0)
        rho = math.exp(logp - float(old_logp[i])) if old_logp is not None else 1.0
        clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
        value, slope = -min(rho * A, clipped * A), -A * rho if rho * A <= clipped * A else 0.0
        if beta:
            gap = float(ref_logp[i]) - logp
            value += beta * rho * (math.exp(gap) - gap - 1)
            slope += beta * rho * -gap
        loss += w * value
        dlogits[i] = torch.tensor([w * slope * ((j == t) - p[j]) / temperature for j in range(V)], dtype=torch.float64)
        logps.append(logp), advantages.append(A)
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    as_row = lambda x: torch.tensor(x, dtype=torch.float64)
    return loss, dlogits, as_row(logps), as_row(entropies), as_row(advantages)


def batch(dtype=torch.float64, mode="dapo", N=2, G=3, T=3, V=11, seed=0, old=True, ref=True, spread=2.0):
    """A padded step of N * G sequences: sequence b has 1 to T tokens, padding has weight 0 and target -100."""
    g = torch.Generator().manual_seed(seed)
    B = N * G
    mask = torch.arange(T) < torch.tensor([1 + (b + 1) % T for b in range(B)])[:, None]
    logits = (torch.randn(B * T, V, generator=g, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(V, (B * T,), generator=g).masked_fill(~mask.flatten(), -100)
    logp = torch.log_softmax(logits.double(), -1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    noise = lambda: torch.randn(B * T, generator=g, dtype=torch.float64) * 0.5
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(logits=logits, target=target, reward=torch.randn(B, generator=g, dtype=torch.float64).to(work),
                seq=torch.arange(B, dtype=torch.int32).repeat_interleave(T), group_size=G,
                weight=token_weights(mask, mode, max_len=T).flatten(),
                old_logp=(logp + noise()).to(work) if old else None,
                ref_logp=(logp + noise()).to(work) if ref else None)


def run(batch, **settings):
    logits = batch["logits"].detach().clone().requires_grad_()
    out = grpo_loss(**{**batch, "logits": logits}, **settings)
    out[0].backward()
    return out, logits.grad


# ---- value and gradient ----

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [True, False])
@both
def test_matches_the_textbook(dtype, old, beta, temperature, scale, implementation):
    b = batch(dtype, "grpo", old=old, T=2, N=1 if implementation == "triton" else 2)     # the interpreter is slow
    settings = dict(temperature=temperature, beta=beta, scale=scale, clip_low=0.1, clip_high=0.3)
    (loss, *rows), grad = run(b, **settings)
    want_loss, want_grad, *want_rows = textbook(**b, **settings)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    tol = dict(rtol=1e-10, atol=1e-12) if work == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    if work == torch.float64 and implementation == "triton":
        tol = dict(rtol=1e-7, atol=1e-7)                 # its settings (beta, clip) stay float32
    assert loss.dtype == work and loss.shape == () and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), torch.tensor(want_loss, dtype=torch.float64), **tol)
    for got, want in zip(rows, want_rows):
        assert got.dtype == work and not got.requires_grad
        torch.testing.assert_close(got.double(), want, **tol)
    # a gradient in 16 bits is the float32 one, rounded once (float16: down to its subnormal spacing)
    bf16 = 2 ** -7 if implementation == "triton" else 2 ** -8        # the interpreter truncates where a GPU rounds
    rtol, atol = {torch.bfloat16: (bf16, 2e-6), torch.float16: (2 ** -10, 2e-6)}.get(dtype, tol.values())
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mode, ddof, adv_eps", [("dapo", 1, 1e-4), ("grpo", 0, 1e-6), ("dr_grpo", 1, 0.5)])
@both
def test_weights_ddof_and_eps(mode, ddof, adv_eps):
    b = batch(mode=mode)
    out, grad = run(b, ddof=ddof, adv_eps=adv_eps)
    want = textbook(**b, ddof=ddof, adv_eps=adv_eps)
    assert out[0].item() == pytest.approx(want[0], abs=1e-7)
    torch.testing.assert_close(out[3], want[4])
    torch.testing.assert_close(grad, want[1])


@both
def test_float32_rewards_beside_float64_logits():
    b = batch()
    b["reward"] = b["reward"].float()
    torch.testing.assert_close(run(b)[0][3], textbook(**b)[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("A_sign, rho, moves", [(1, 1.5, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.5, True),
                                                (1, 1.1, True), (-1, 0.9, True)])
@both
def test_clip_stops_the_gradient_only_on_the_far_side(A_sign, rho, moves):
    logits = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    target, one = torch.tensor([2]), torch.ones(1, dtype=torch.float64)
    old = token_logp(logits, target)[0].detach() - math.log(rho)
    loss, _, _, A = grpo_loss(logits, target, torch.tensor([A_sign, -A_sign]).double(), torch.tensor([0]), one, 2, old)
    loss.backward()
    assert A.sign().item() == A_sign
    p = logits.detach().softmax(-1)
    want = -A * rho * (torch.tensor([0., 0., 1.]) - p) if moves else torch.zeros_like(p)
    torch.testing.assert_close(logits.grad, want)
    assert loss.item() == pytest.approx(-min(rho * A.item(), min(max(rho, 0.8), 1.2) * A.item()))


@both
def test_on_policy_is_off_policy_with_its_own_logp():
    b = batch(old=False)
    own = grpo_loss(**b)[1]
    on, off = run(b), run({**b, "old_logp": own})
    torch.testing.assert_close(on[0][0], off[0][0])
    torch.testing.assert_close(on[1], off[1])
    assert on[0][0].item() == pytest.approx(-(b["weight"] * on[0][3]).sum().item())          # value -A


@both
def test_gradcheck_of_the_three_functions(implementation):
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=implementation == "triton")
    b = batch(N=1, G=2, T=2, V=7)
    # gradcheck compares with finite differences: keep old_logp well inside the clip range, away from its corners
    logp, rest = token_logp(b["logits"], b["target"].clamp(min=0))[0], {k: v for k, v in b.items() if k != "logits"}
    rest["old_logp"] = logp + torch.tensor([0.05, 0.5, -0.5, -0.1], dtype=torch.float64)
    logits = b["logits"].requires_grad_()
    assert gradcheck(lambda x: grpo_loss(x, **rest, beta=0.2, temperature=0.9)[0], logits)
    assert gradcheck(lambda x: token_logp(x, torch.tensor([0, 6, 3, 3]), 0.7)[0], logits)
    hidden, head = torch.randn(4, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    rest["old_logp"] = token_logp(hidden @ head.T, b["target"].clamp(min=0))[0] + 0.05
    hidden.requires_grad_(), head.requires_grad_()
    assert gradcheck(lambda h, w: linear_grpo_loss(h, w, **rest, beta=0.2, chunk=3)[0], (hidden, head))


@both
def test_gradient_rows_sum_to_zero_and_are_not_zero():
    _, grad = run(batch(), beta=0.1)
    assert grad.abs().sum() > 0.1 and grad.sum(-1).abs().max() < 1e-14


def test_only_logits_get_a_gradient_and_no_input_is_written():
    b = batch()
    for name in "reward", "weight", "old_logp", "ref_logp":
        b[name].requires_grad_()
    b["logits"].requires_grad_()
    before = {k: v.detach().clone() for k, v in b.items() if torch.is_tensor(v)}
    loss, *rows = grpo_loss(**b, beta=0.1, inplace=True)  # a permission, not used here
    loss.backward()
    assert b["logits"].grad.abs().sum() > 0 and not any(r.requires_grad for r in rows)
    assert all(b[name].grad is None for name in ("reward", "weight", "old_logp", "ref_logp"))
    assert all(torch.equal(b[k], v) and b[k]._version == 0 for k, v in before.items() if k != "target")
    assert torch.equal(b["target"], before["target"])


@both
def test_large_vocabulary_in_bfloat16_keeps_float32_precision():
    logits = (torch.randn(2, 151936, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    target = torch.tensor([5, 151935])
    logp, entropy = token_logp(logits, target)
    want = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), want[[0, 1], target], rtol=0, atol=5e-5)         # in bfloat16: 1e-2
    torch.testing.assert_close(entropy.double(), -(want.exp() * want).sum(-1), rtol=0, atol=2e-4)


@both
def test_token_logp_is_a_distribution_and_its_logp_is_differentiable():
    logits = torch.randn(1, 6, dtype=torch.float64).expand(6, 6).contiguous().requires_grad_()
    logp, entropy = token_logp(logits, torch.arange(6), temperature=1.7)
    assert logp.exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(entropy[0], torch.distributions.Categorical(logits=logits[0] / 1.7).entropy())
    assert logp.requires_grad and not entropy.requires_grad


# ---- KL ----

def every_token(old=None, seed=0, V=7, temperature=0.7):
    """(logits (V,), reference (V,) log-probs, rows): one row for each token of a vocabulary. Its weight is the token's
    probability under the policy that sampled, so that the sum over the rows is the expectation over sampled tokens.
    Rewards are equal, so that the KL alone is left."""
    g = torch.Generator().manual_seed(seed)
    logits, other, third = torch.randn(3, V, generator=g, dtype=torch.float64) * 1.5
    reference = other.log_softmax(-1)
    sampler = ((logits if old is None else third) / temperature).log_softmax(-1)
    rows = dict(target=torch.arange(V), reward=torch.ones(1, dtype=torch.float64),
                seq=torch.zeros(V, dtype=torch.int32), weight=sampler.exp(), group_size=1,
                old_logp=None if old is None else sampler, ref_logp=reference, beta=1.0, temperature=temperature)
    return logits.requires_grad_(), reference, rows


@pytest.mark.parametrize("old", [None, "another policy"], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("seed", range(3))
@both
def test_the_kl_term_is_the_reverse_kl(old, seed, implementation):
    """Expected value and expected gradient over sampled tokens are those of KL(policy || reference), also where the
    tokens come from an older policy. Without the live ratio the gradient would be that of KL(reference || policy)."""
    logits, reference, rows = every_token(old, seed)
    loss = grpo_loss(logits.expand(7, 7).contiguous(), **rows)[0]
    grad, = torch.autograd.grad(loss, logits)
    logp = (logits / rows["temperature"]).log_softmax(-1)
    reverse = (logp.exp() * (logp - reference)).sum()
    forward = (reference.exp() * (reference - logp)).sum()
    want, = torch.autograd.grad(reverse, logits, retain_graph=True)
    wrong, = torch.autograd.grad(forward, logits)
    tolerance = 1e-12 if implementation == "reference" else 1e-6
    torch.testing.assert_close(loss, reverse.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)
    assert (grad - wrong).norm() > 0.1 * grad.norm() > 0.01


@pytest.mark.parametrize("old", [None, "another policy"], ids=["on-policy", "off-policy"])
@both
def test_the_linear_loss_has_the_same_kl(old):
    logits, _, rows = every_token(old)
    grad, = torch.autograd.grad(grpo_loss(logits.expand(7, 7).contiguous(), **rows)[0], logits)
    head = logits.detach()[:, None].clone().requires_grad_()                       # (V, 1): hidden states of 1
    linear_grpo_loss(torch.ones(7, 1, dtype=torch.float64), head, **rows, chunk=3)[0].backward()
    torch.testing.assert_close(head.grad[:, 0], grad, rtol=1e-6, atol=1e-6)


@both
def test_gradient_of_one_kl_row():
    """beta rho (logp - ref), also where exp(ref - logp) is large."""
    logits = torch.tensor([[1.0, -20.0, 0.5]], dtype=torch.float64, requires_grad=True)
    target, one = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
    logp = token_logp(logits, target)[0].detach()
    grpo_loss(logits, target, one, torch.tensor([0]), one, 1, logp - 0.5, logp + 3, beta=0.5)[0].backward()
    want = 0.5 * math.exp(0.5) * -3 * (torch.tensor([0.0, 1.0, 0.0]) - logits.detach().softmax(-1))
    torch.testing.assert_close(logits.grad, want)


@pytest.mark.filterwarnings("ignore::FutureWarning")     # of trl's own calls
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_loss_and_gradient_equal_those_of_trl(loss_type, off_policy, request, tmp_path):
    """Its trainer on a tiny model: loss with KL, and the gradient of every weight."""
    trl = pytest.importorskip("trl", minversion="1.10", reason="compares with trl >= 1.10, which is not installed")
    from datasets import Dataset
    folder, _, tokenizer = request.getfixturevalue("tiny")
    B, P, T = 4, 3, 5                                    # sequences, tokens of a prompt, tokens of a completion
    args = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=B,
                          gradient_accumulation_steps=1, num_generations=B, beta=0.3, temperature=0.9, epsilon=0.1,
                          epsilon_high=0.3, loss_type=loss_type)
    trainer = trl.GRPOTrainer(str(folder), lambda completions, **_: [0.0] * len(completions), args,
                              Dataset.from_list([{"prompt": "a"}] * B), processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1      # what its training loop sets
    model = trainer.model.train()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer), (B, P + T), generator=g)
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4])[:, None]
    logits = model(ids).logits[:, P - 1:-1].reshape(B * T, -1)
    target = ids[:, P:].flatten()
    own = token_logp(logits.detach(), target, 0.9)[0]
    old = own + 0.3 * torch.randn(B * T, generator=g) if off_policy else None
    ref = own + 0.5 * torch.randn(B * T, generator=g)
    reward = torch.tensor([1.0, 0.0, 0.5, 1.0])
    weight = token_weights(mask, loss_type).flatten()
    seq = torch.arange(B).repeat_interleave(T)
    ours, *_, A = grpo_loss(logits, target, reward, seq, weight, B, old, ref, temperature=0.9, clip_low=0.1,
                            clip_high=0.3, beta=0.3, ddof=1, adv_eps=1e-4)
    weights = [w for w in model.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(ours, weights)
    inputs = {"prompt_ids": ids[:, :P], "prompt_mask": torch.ones(B, P, dtype=torch.int64),
              "completion_ids": ids[:, P:], "completion_mask": mask.long(), "advantages": A[::T],
              "old_per_token_logps": None if old is None else old.view(B, T), "ref_per_token_logps": ref.view(B, T),
              "num_items_in_batch": mask.sum()}
    theirs = trainer._compute_loss(model, inputs)
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(gradients, torch.autograd.grad(theirs, weights)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert max(x.abs().max() for x in gradients) > 1e-3


# ---- advantage ----

@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 + 0.1, -1e-8, 1 / 3])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("adv_eps", [1e-8, 0.0])
def test_equal_rewards_give_exactly_zero(value, scale, adv_eps):
    """r - mean(r) is rounding noise here, and noise / (tiny std + 1e-8) is an advantage of up to 1."""
    A = group_advantage(torch.full((14,), value), 7, adv_eps=adv_eps, scale=scale)
    assert torch.equal(A, torch.zeros(14))


def test_advantage_is_shift_and_scale_invariant_and_centred():
    r = torch.tensor([0.0, 1.0, 0.25, 0.5, 3.0, 3.0, 3.0, -1.0], dtype=torch.float64)
    A = group_advantage(r, 4, adv_eps=0.0)
    torch.testing.assert_close(group_advantage(r * 5 - 100, 4, adv_eps=0.0), A)
    torch.testing.assert_close(A.view(2, 4).mean(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(A.view(2, 4).std(1, correction=0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(group_advantage(r, 4, scale=False)[:4], r[:4] - r[:4].mean())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_leaves_its_group(bad):
    A = group_advantage(torch.tensor([1.0, bad, 0.0, 0.0, 2.0, 5.0, 5.0, 2.0]), 4)
    want = group_advantage(torch.tensor([1.0, 0.0, 0.0]), 3)
    assert A[1] == 0 and torch.equal(A[[0, 2, 3]], want) and A[0] > 1
    torch.testing.assert_close(A[4:], torch.tensor([-1.0, 1.0, 1.0, -1.0]))                   # the other group
    assert torch.equal(group_advantage(torch.tensor([bad, bad, 3.0, bad]), 4), torch.zeros(4))
    assert torch.equal(group_advantage(torch.tensor([bad, bad]), 2, ddof=1), torch.zeros(2))


@both
def test_a_lone_trace_has_nothing_to_compare_with():
    assert torch.equal(group_advantage(torch.tensor([3.0, -1.0]), 1, ddof=1), torch.zeros(2))
    A = group_advantage(torch.tensor([3.0, -1.0]), 2, adv_eps=0.0, ddof=2)                      # max(n - ddof, 1) = 1
    torch.testing.assert_close(A, torch.tensor([1.0, -1.0]) / math.sqrt(2))
    b = batch()
    (loss, *_), grad = run({**b, "group_size": 1})
    assert loss == 0 and grad.abs().sum() == 0


@both
def test_equal_or_broken_rewards_give_no_gradient():
    b = batch()
    for reward in torch.full((6,), 0.1), torch.full((6,), NAN):
        (loss, *_), grad = run({**b, "reward": reward.double()})
        assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


# ---- padding and other edges of the rows ----

@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@both
def test_what_a_padded_row_holds_does_not_matter(poison):
    b = batch()
    dead = b["weight"] == 0
    assert dead.any() and not dead.all()
    want, want_grad = run(b, beta=0.1)
    poisoned = {k: v.clone() if torch.is_tensor(v) else v for k, v in b.items()}
    for name in "logits", "old_logp", "ref_logp":
        poisoned[name][dead] = poison
    poisoned["target"][dead], poisoned["seq"][dead] = 10 ** 9, -7
    got, grad = run(poisoned, beta=0.1)
    assert all(torch.equal(x, y) for x, y in zip(got, want)) and torch.equal(grad, want_grad)
    assert (grad[dead] == 0).all() and all((x[dead] == 0).all() for x in got[1:])


@pytest.mark.parametrize("M", [0, 4])
@both
def test_a_step_without_live_tokens(M):
    logits = torch.full((M, 5), NAN, requires_grad=True)
    rows = dict(target=torch.full((M,), -100), reward=torch.rand(2), seq=torch.zeros(M, dtype=torch.int32),
                weight=torch.zeros(M), group_size=2)
    loss, *out = grpo_loss(logits, **rows)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(M, 5))
    assert all(torch.equal(x, torch.zeros(M)) for x in out)
    hidden, head = torch.full((M, 3), NAN, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss, *out = linear_grpo_loss(hidden, head, **rows)
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros(M, 3)) and torch.equal(head.grad, torch.zeros(5, 3))


@pytest.mark.parametrize("target", [-1, -100, 11, 10 ** 12])
@pytest.mark.parametrize("old", [True, False])
@both
def test_a_target_outside_the_vocabulary_is_loud(target, old):
    b = batch(old=old)
    live = int(b["weight"].nonzero()[1])
    b["target"][live] = target
    (loss, logp, _, _), grad = run(b)
    assert loss.isnan() and logp[live].isnan() and grad[live].isnan().all()
    rest = torch.arange(len(logp)) != live
    assert logp[rest].isfinite().all() and grad[rest].isfinite().all()
    x = b["logits"].clone().requires_grad_()
    logp = token_logp(x, b["target"])[0]
    logp[b["weight"] > 0].sum().backward()
    assert logp[live].isnan() and x.grad[live].isnan().all()


@pytest.mark.parametrize("old", [True, False])
@both
def test_forbidden_tokens_with_logit_minus_infinity(old):
    b = batch(torch.float32, V=5137, old=old, T=2)
    allowed = b["logits"][:, 5000:].clone()
    b["logits"][:, :5000] = -INF
    narrow = {**b, "logits": allowed, "target": b["target"] % 137}
    (want, want_grad), (got, grad) = run(narrow), run({**b, "target": narrow["target"] + 5000})
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(grad[:, 5000:], want_grad)
    assert (grad[:, :5000] == 0).all() and grad[:, 5000:].abs().sum() > 0


@both
def test_any_row_stride_and_odd_vocabulary():
    wide = torch.randn(18, 160, dtype=torch.float64, requires_grad=True)
    b = batch(V=137)
    b["logits"] = wide[:, :137]
    assert b["logits"].stride() == (160, 1)
    loss = grpo_loss(**b, beta=0.1)[0]
    loss.backward()
    want, want_grad = run({**b, "logits": wide[:, :137].contiguous()}, beta=0.1)
    assert torch.equal(loss, want[0]) and torch.equal(wide.grad[:, :137], want_grad)
    assert (wide.grad[:, 137:] == 0).all() and want_grad.abs().sum() > 0


@both
def test_a_live_row_of_nan_logits_is_loud():
    b = batch()
    b["logits"][0, 3] = NAN
    (loss, logp, _, _), grad = run(b)
    assert b["weight"][0] > 0 and loss.isnan() and logp[0].isnan() and grad[0].isnan().all()


@both
def test_vocabulary_of_one():
    b = batch(V=1)
    (loss, logp, entropy, _), grad = run({**b, "old_logp": None})
    assert loss.isfinite() and (logp == 0).all() and (entropy == 0).all() and (grad == 0).all()


@both
def test_reference_log_probs_are_not_read_without_beta():
    b = batch()
    assert torch.equal(grpo_loss(**b)[0], grpo_loss(**{**b, "ref_logp": torch.full_like(b["ref_logp"], NAN)})[0])
    assert not torch.equal(grpo_loss(**b)[0], grpo_loss(**b, beta=0.1)[0])


# ---- weights and micro-batches ----

def test_token_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    m = mask.float()
    torch.testing.assert_close(token_weights(mask), m / 4)
    torch.testing.assert_close(token_weights(mask, "dapo", num_tokens=40), m / 40)
    torch.testing.assert_close(token_weights(mask.bool(), "grpo"), m / torch.tensor([[9.], [3.], [1.]]))
    torch.testing.assert_close(token_weights(mask, "dr_grpo", max_len=10), m / 30)
    for mode, options in ("dapo", dict(num_tokens=4)), ("grpo", dict(num_sequences=3)), ("dr_grpo", dict(num_sequences=3)):
        whole = token_weights(mask, mode, max_len=10)
        parts = [token_weights(mask[rows], mode, max_len=10, **options) for rows in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(torch.cat(parts), whole)                    # data parallel
    for mode in "dapo", "grpo", "dr_grpo":
        for empty in torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(2, 0):
            assert torch.equal(token_weights(empty, mode, max_len=3, num_tokens=0), empty)
    assert torch.equal(token_weights(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("mode", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("size", [1, 4, 7])  # 4, 7: cut through sequences
@both
def test_micro_batches_add_up_to_the_step(mode, size):
    b = batch(mode=mode)
    want, want_grad = run(b, beta=0.1)
    logits, total = b["logits"].clone().requires_grad_(), 0.0
    for start in range(0, len(logits), size):
        cut = {k: v if k in ("reward", "group_size") else v[start:start + size] for k, v in b.items()}
        loss = grpo_loss(**{**cut, "logits": logits[start:start + size]}, beta=0.1)[0]
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(want[0].item(), abs=1e-12)
    assert torch.equal(logits.grad, want_grad)


# ---- the linear variant ----

def linear_case(dtype=torch.float64, H=4, V=11, seed=3):
    b = batch(dtype, V=V)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(b.pop("logits")), H, generator=g, dtype=torch.float64).to(dtype)
    head = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype)
    own = token_logp(hidden @ head.T, b["target"].clamp(min=0))[0].detach()
    for name in "old_logp", "ref_logp":                  # near the policy, as after an update or two
        b[name] = own + 0.3 * torch.randn(len(own), generator=g).to(own.dtype)
    return hidden, head, b


@pytest.mark.parametrize("chunk, frozen", [(1, ""), (7, ""), (7, "head"), (7, "hidden"), (4096, "")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@both
def test_linear_equals_materialised(chunk, frozen, dtype):
    hidden, head, b = linear_case(dtype)
    settings = dict(beta=0.1, temperature=0.8, clip_low=0.1, clip_high=0.3, ddof=1, adv_eps=1e-4)
    grads, outs = [], []
    for linear in True, False:
        h, w = hidden.clone().requires_grad_(frozen != "hidden"), head.clone().requires_grad_(frozen != "head")
        out = linear_grpo_loss(h, w, **b, **settings, chunk=chunk) if linear else grpo_loss(h @ w.T, **b, **settings)
        (3 * out[0]).backward()  # the incoming gradient counts
        outs.append(out), grads.append((h.grad, w.grad))
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(outs[0], outs[1]):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)
        assert got.requires_grad == want.requires_grad
    for got, want, name in zip(grads[0], grads[1], ("hidden", "head")):
        assert (got is None) == (want is None) == (frozen == name)
        if got is not None:
            assert got.dtype == dtype and got.abs().sum() > 0
            torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@both
def test_linear_ignores_padded_hidden_states():
    hidden, head, b = linear_case()
    dirty = hidden.masked_fill((b["weight"] == 0)[:, None], NAN).requires_grad_()
    clean, w1, w2 = hidden.clone().requires_grad_(), head.clone().requires_grad_(), head.clone().requires_grad_()
    linear_grpo_loss(dirty, w1, **b)[0].backward()
    linear_grpo_loss(clean, w2, **b)[0].backward()
    assert torch.equal(dirty.grad, clean.grad) and torch.equal(w1.grad, w2.grad) and w1.grad.abs().sum() > 0


def test_linear_without_grad_and_without_second_derivatives(monkeypatch):
    hidden, head, b = linear_case()
    hidden.requires_grad_()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("took a gradient that nobody wants"))
        quiet = linear_grpo_loss(hidden, head, **b)
    loss = linear_grpo_loss(hidden, head, **b)[0]
    assert not quiet[0].requires_grad and torch.equal(quiet[0], loss)
    first, = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_linear_sums_the_head_gradient_in_float32():
    """A sum of 256 chunks in bfloat16 would lose what is below 2^-8 of it."""
    g = torch.Generator().manual_seed(0)
    M, H, V = 256, 4, 8
    hidden, head = (torch.randn(n, H, generator=g).bfloat16() for n in (M, V))
    b = dict(target=torch.randint(V, (M,), generator=g), reward=torch.tensor([0.0, 1.0]), seq=torch.ones(M).int(),
             weight=torch.full((M,), 1 / M), group_size=2)
    grads = []
    for dtype in torch.bfloat16, torch.float64:
        w = head.to(dtype, copy=True).requires_grad_()
        linear_grpo_loss(hidden.to(dtype), w, **b, chunk=1)[0].backward()
        grads.append(w.grad.double())
    assert (grads[0] - grads[1]).norm() < 3e-3 * grads[1].norm()


@both
def test_linear_under_autocast():
    """Plain float32 tensors, whose products autocast would make bfloat16 behind our back."""
    hidden, head, b = linear_case(torch.float32)
    grads = []
    for on in False, True:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            linear_grpo_loss(h, w, **b)[0].backward()
        grads.append((h.grad, w.grad))
    for a, c in zip(*grads):
        torch.testing.assert_close(a, c, rtol=3e-2, atol=3e-2)


def test_linear_never_holds_more_than_one_chunk_of_logits():
    class Tallest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if torch.is_tensor(x) and x.dim() == 2 and x.shape[1] == 11:
                    self.rows = max(self.rows, x.shape[0])
            return out

    hidden, head, b = linear_case()
    hidden.requires_grad_(), head.requires_grad_()
    with Tallest() as seen:
        linear_grpo_loss(hidden, head, **b, chunk=6)[0].backward()
    assert seen.rows == 6
    with Tallest() as seen:
        grpo_loss(hidden @ head.T, **b)[0].backward()
    assert seen.rows == len(hidden) > 6  # the probe does see them


# ---- bad input ----

def ok():
    return {**batch(torch.float32), "beta": 0.1}


BAD_ROWS = {
    "target is a list": ("target", lambda b: b["target"].tolist(), "got list, must be a tensor"),
    "target int32": ("target", lambda b: b["target"].int(), "got torch.int32, must be of dtype int64"),
    "target short": ("target", lambda b: b["target"][1:], r"got shape \(17,\), must be of shape \(18\)"),
    "target dense": ("target", lambda b: b["target"].view(6, 3), r"got shape \(6, 3\), must be of shape \(18\)"),
    "seq float": ("seq", lambda b: b["seq"].float(), "got torch.float32, must be of dtype int32 or int64"),
    "seq short": ("seq", lambda b: b["seq"][:3], r"got shape \(3,\), must be of shape \(18\)"),
    "seq beyond B": ("seq", lambda b: b["seq"] + 1, r"got \[6\], must be in \[0, 6\)"),
    "seq negative": ("seq", lambda b: b["seq"] - 1, r"got \[-1\], must be in \[0, 6\)"),
    "weight is a mask": ("weight", lambda b: b["weight"] != 0, "got torch.bool, must be of dtype float16"),
    "weight dense": ("weight", lambda b: b["weight"].view(6, 3), r"got shape \(6, 3\)"),
    "weight missing": ("weight", lambda b: None, "got NoneType, must be a tensor"),
    "weight elsewhere": ("weight", lambda b: b["weight"].to("meta"), "got on meta, must be on cpu"),
    "reward int": ("reward", lambda b: b["reward"].long(), "got torch.int64"),
    "reward dense": ("reward", lambda b: b["reward"].view(2, 3), r"got shape \(2, 3\), must be of shape \(B\)"),
    "reward count": ("reward", lambda b: b["reward"][:5], "got 5 rewards, must be a multiple of group_size = 3"),
    "reward elsewhere": ("reward", lambda b: b["reward"].to("meta"), "got on meta, must be on cpu"),
    "group_size 0": ("group_size", lambda b: 0, "got 0, must be a positive int"),
    "group_size float": ("group_size", lambda b: 3.0, "got 3.0, must be a positive int"),
    "old_logp short": ("old_logp", lambda b: b["old_logp"][1:], r"got shape \(17,\)"),
    "ref_logp int": ("ref_logp", lambda b: b["ref_logp"].long(), "got torch.int64"),
    "ref_logp missing": ("ref_logp", lambda b: None, "got None, must be given, because beta is 0.1"),
    "temperature 0": ("temperature", lambda b: 0.0, "got 0.0, must be positive and finite"),
    "temperature NaN": ("temperature", lambda b: NAN, "got nan, must be positive and finite"),
    "clip_low": ("clip_low", lambda b: -0.1, "got -0.1, must be at least 0"),
    "clip_high": ("clip_high", lambda b: NAN, "got nan, must be at least 0"),
    "beta": ("beta", lambda b: -1.0, "got -1.0, must be at least 0 and finite"),
    "adv_eps": ("adv_eps", lambda b: -1e-6, "got -1e-06, must be at least 0"),
    "ddof": ("ddof", lambda b: -1, "got -1, must be an int of at least 0"),
}
BAD_LOGITS = {
    "one row": (lambda x: x[0], r"got shape \(11,\), must be of shape \(M, V\)"),
    "dense": (lambda x: x.view(6, 3, 11), r"got shape \(6, 3, 11\), must be of shape \(M, V\)"),
    "int": (lambda x: x.long(), "got torch.int64, must be of dtype float16 or bfloat16 or float32 or float64"),
    "transposed": (lambda x: x.T.contiguous().T, "got last stride 18, must be of last stride 1"),
    "a number": (lambda x: x[0, 0], r"got shape \(\), must be of shape \(M, V\)"),
    "no vocabulary": (lambda x: x[:, :0], r"got shape \(18, 0\), must be of at least one column"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_and_settings_are_named(case):
    name, change, message = BAD_ROWS[case]
    good = ok()
    grpo_loss(**good)
    bad = {**good, name: change(good)}
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        grpo_loss(**bad)
    logits = bad.pop("logits")
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        linear_grpo_loss(logits[:, :4].contiguous(), torch.randn(11, 4), **bad)


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_bad_logits_are_named(case):
    change, message = BAD_LOGITS[case]
    good = ok()
    logits = change(good.pop("logits"))
    with pytest.raises(ValueError, match=f"^logits: {message}"):
        grpo_loss(logits, **good)
    with pytest.raises(ValueError, match=f"^logits: {message}"):
        token_logp(logits, good["target"])


@pytest.mark.parametrize("call, message", [
    (lambda h, w, b: linear_grpo_loss(h[0], w, **b), r"hidden: got shape \(4,\), must be of shape \(M, H\)"),
    (lambda h, w, b: linear_grpo_loss(h, w[:, 1:], **b),
     r"weight_lm_head: got shape \(11, 3\), must be of shape \(V, 4"),
    (lambda h, w, b: linear_grpo_loss(h, w.float(), **b), "weight_lm_head: got torch.float32, must be of dtype f"),
    (lambda h, w, b: linear_grpo_loss(h, w, **b, chunk=0), "chunk: got 0, must be a positive int"),
    (lambda h, w, b: token_logp(h, b["target"][1:]), r"target: got shape \(17,\), must be of shape \(18\)"),
    (lambda h, w, b: token_logp(h, b["target"], -1.0), "temperature: got -1.0"),
    (lambda h, w, b: group_advantage(b["reward"], 4), "reward: got 6 rewards, must be a multiple of group_size = 4"),
    (lambda h, w, b: group_advantage(b["reward"].tolist(), 2), "reward: got list"),
    (lambda h, w, b: token_weights(b["weight"]), r"mask: got shape \(18,\), must be of shape \(B, T\)"),
    (lambda h, w, b: token_weights(torch.ones(2, 3), "mean"), "mode: got 'mean', must be 'dapo', 'grpo' or 'dr_grpo'"),
    (lambda h, w, b: token_weights(torch.ones(2, 3), "dr_grpo"), "max_len: got None"),
    (lambda h, w, b: token_weights(torch.ones(2, 3), "dr_grpo", max_len=0), "max_len: got 0"),
    (lambda h, w, b: token_weights(torch.ones(2, 3), num_tokens=0), "num_tokens: got 0, must be positive"),
    (lambda h, w, b: token_weights(torch.ones(2, 3), "grpo", num_sequences=1), "num_sequences: got 1, must be the seq"),
])
def test_other_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(*linear_case())


@pytest.fixture
def triton_only():
    if fused is None:
        pytest.skip("triton is not installed")


@pytest.fixture
def no_launch(triton_only, monkeypatch):
    """The functions of kernels take the Triton kernels, any launch of which is a TypeError."""
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(fused, "_forward", None)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_and_settings_never_reach_the_kernels(case, no_launch):
    name, change, message = BAD_ROWS[case]
    if case.startswith(("seq beyond", "seq negative")):
        pytest.skip("to know this would be to wait for the GPU; see the test of NaN below")
    good = ok()
    bad = {**good, name: change(good)}
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        grpo_loss(**bad)
    logits = bad.pop("logits")
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        linear_grpo_loss(logits[:, :4].contiguous(), torch.randn(11, 4), **bad)


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_bad_logits_never_reach_the_kernels(case, no_launch):
    change, message = BAD_LOGITS[case]
    good = ok()
    logits = change(good.pop("logits"))
    for call in (lambda: grpo_loss(logits, **good), lambda: token_logp(logits, good["target"])):
        with pytest.raises(ValueError, match=f"^logits: {message}"):
            call()


@pytest.mark.parametrize("case", ["target short", "target int32", "seq float", "seq short", "weight dense", 
                                  "reward dense", "reward count", "old_logp short", "ref_logp missing"])
def test_the_kernels_alone_refuse_what_would_read_beyond_a_tensor(case, triton_only, monkeypatch):
    name, change, _ = BAD_ROWS[case]
    good = ok()
    monkeypatch.setattr(fused, "_forward", None)
    with pytest.raises(AssertionError, match=name):
        fused.grpo_loss_triton(**{**good, name: change(good)})


def test_the_fused_kernel_wants_cuda(triton_only, monkeypatch):
    monkeypatch.setattr(fused.triton.knobs.runtime, "interpret", False)
    with pytest.raises(AssertionError, match="logits must be on CUDA"):
        fused.grpo_loss_triton(**ok())


# ---- what only the fused kernels have ----

@pytest.mark.parametrize("group_size", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("settings", [{}, {"ddof": 1, "adv_eps": 1e-4}, {"ddof": 2}, {"scale": False},
                                      {"adv_eps": 0.0}], ids=str)
def test_advantage_in_the_kernel(group_size, settings, triton_only):
    """Equal rewards (of which r - mean is noise), non-finite ones, and the affine invariance, row by row."""
    g = torch.Generator().manual_seed(group_size)
    reward = torch.cat([torch.randn(24, generator=g), 5 * torch.randn(24, generator=g) - 100,
                        torch.full((24,), 1e6 + 0.1), torch.full((24,), 0.1),
                        torch.tensor([1.0, NAN, 0.0, INF, 2.0, -INF] * 4)])
    seq = torch.cat([torch.arange(0, len(reward), 5), torch.arange(96, 102)])
    M = len(seq)
    target = torch.zeros(M, dtype=torch.int64)
    A = fused.grpo_loss_triton(torch.zeros(M, 2), target, reward, seq, torch.ones(M), group_size, **settings)[3]
    torch.testing.assert_close(A, group_advantage(reward, group_size, **settings)[seq], rtol=2e-6, atol=1e-6)
    assert (A[(seq >= 48) & (seq < 96)] == 0).all() and (group_size == 1 or A[seq < 48].abs().min() > 0)


@pytest.mark.parametrize("seq", [-1, 6, 2 ** 31 - 1])
def test_a_sequence_that_does_not_exist_is_loud(seq, triton_only):
    b = batch()
    b["seq"][0] = seq
    x = b["logits"].requires_grad_()
    loss, logp, _, A = fused.grpo_loss_triton(**b)
    loss.backward()
    assert b["weight"][0] > 0 and loss.isnan() and A[0].isnan() and x.grad[0].isnan().all() and logp[0].isfinite()
    assert x.grad[1:].isfinite().all() and A[1:].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, -60.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_over_many_blocks(dtype, offset, triton_only):
    """Against float64 on the same inputs, over 12 blocks whose maximum rises: error of loss and log-prob <= 1e-5, of
    the gradient <= 1e-5 of its maximum (bfloat16: one rounding of the gradient)."""
    g = torch.Generator().manual_seed(0)
    M, V = 4, 49152
    logits = (torch.randn(M, V, generator=g) * 3 + torch.linspace(-6, 6, V) + offset).to(dtype)
    b = dict(target=torch.randint(V, (M,), generator=g), reward=torch.rand(M, generator=g), seq=torch.arange(M),
             weight=torch.full((M,), 1 / M), group_size=4)
    logp = logits.double().log_softmax(-1)[torch.arange(M), b["target"]]
    b["old_logp"] = logp.float() + torch.tensor([.1, -.1, .3, -.3])
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, want = fused.grpo_loss_triton(x, **b), kernels.grpo_loss_reference(y, **b)
    got[0].backward(), want[0].backward()
    assert (got[0] - want[0]).abs() <= 1e-5 and (got[1] - want[1]).abs().max() <= 1e-5
    assert (got[2] - want[2]).abs().max() <= 5e-5
    assert (x.grad - y.grad).abs().max() <= (1e-5 if dtype == torch.float32 else 2 ** -7) * y.grad.abs().max()


def test_rows_beyond_two_gigabytes(triton_only):
    """Row 2 begins at element 2.2e9 > 2^31. The pages between the rows are never touched, so this takes no memory."""
    data = torch.randn(3, 137, generator=torch.Generator().manual_seed(0)).bfloat16()
    far = torch.empty(2_200_000_137, dtype=torch.bfloat16).as_strided((3, 137), (1_100_000_000, 1))
    far.copy_(data)
    b = dict(target=torch.tensor([5, 6, 7]), reward=torch.tensor([0.0, 1.0]), seq=torch.tensor([0, 1, 1]),
             weight=torch.ones(3), group_size=2)
    near, leaf = data.clone().requires_grad_(), far.detach().requires_grad_()
    want, got = fused.grpo_loss_triton(near, **b), fused.grpo_loss_triton(leaf, **b, inplace=True)
    assert torch.equal(got[1], want[1]) and want[1].unique().numel() == 3
    want[0].backward(), got[0].backward()
    assert torch.equal(far, near.grad) and near.grad.abs().min(1).values.max() > 0


def test_in_place(triton_only):
    """The gradient lies where the logits lay, and whoever uses the logits again gets an error instead of it."""
    b = batch(torch.float32)
    (want, *_), want_grad = run(b)
    x = b["logits"].clone().requires_grad_()
    logits = x * 1                                       # as the head of a model would give them
    before = logits.detach().clone()
    loss = fused.grpo_loss_triton(**{**b, "logits": logits})[0]
    loss.backward(retain_graph=True)
    assert torch.equal(logits, before)                   # not without being asked
    x.grad = None
    square = (logits ** 2).sum()                         # its backward needs the logits
    loss = fused.grpo_loss_triton(**{**b, "logits": logits}, inplace=True)[0]
    torch.testing.assert_close(loss, want)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), want_grad)
    torch.testing.assert_close(x.grad, want_grad)
    for again in loss, square:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()
    rows = torch.zeros(1, 4).expand(3, 4).requires_grad_()
    rest = (torch.zeros(3, dtype=torch.int64), torch.rand(2), torch.zeros(3, dtype=torch.int32), torch.ones(3), 2)
    with pytest.raises(ValueError, match="^logits: got row stride 0, must be of row stride at least 4 if inplace"):
        grpo_loss(rows, *rest, inplace=True)
    with pytest.raises(AssertionError, match="logits"):
        fused.grpo_loss_triton(rows, *rest, inplace=True)


def test_inputs_of_any_stride(triton_only):
    """As columns of wider tensors, and an incoming gradient that is one number seen many times."""
    b = batch(torch.float32)
    want, want_grad = run(b, beta=0.1)
    spread = {k: x.repeat_interleave(2)[::2] if torch.is_tensor(x) and x.dim() == 1 else x for k, x in b.items()}
    assert not spread["target"].is_contiguous()
    x = b["logits"].clone().requires_grad_()
    got = fused.grpo_loss_triton(**{**spread, "logits": x}, beta=0.1)
    got[0].backward()
    for a, c in zip((*got, x.grad), (*want, want_grad)):
        torch.testing.assert_close(a, c)
    x, y = (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    target = torch.tensor([1, 9, 4, 9, 0])[::2]
    fused.token_logp_triton(x, target)[0].sum().backward()
    kernels.token_logp(y, target)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_no_second_derivative(triton_only):
    x = torch.randn(2, 5, requires_grad=True)
    logp = fused.token_logp_triton(x, torch.tensor([1, 2]))[0].sum()
    first, = torch.autograd.grad(logp * logp, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_token_logp_backward_takes_any_row_gradient(triton_only):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    target, pull = torch.tensor([0, 8, 3, 3, 1]), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    (fused.token_logp_triton(logits, target, 0.7)[0] * pull).sum().backward()
    got, logits.grad = logits.grad, None
    (kernels.token_logp(logits, target, 0.7)[0] * pull).sum().backward()
    torch.testing.assert_close(got, logits.grad)
    assert (got[2] == 0).all() and got.abs().sum() > 1


# ---- what runs where ----

def test_cpu_tensors_take_the_reference(monkeypatch, triton_only):
    assert kernels.backend("cpu") == "reference" and kernels.backend(torch.device("cuda", 0)) == "triton"
    monkeypatch.setattr(fused, "_forward", None)
    grpo_loss(**ok()), token_logp(torch.zeros(1, 2), torch.tensor([1]))
    kernels.check("cpu")                                 # nothing to run


def test_the_reference_on_cuda_only_for_the_asking(monkeypatch):
    monkeypatch.setenv("TRACELIFT_KERNELS", "reference")
    assert kernels.backend("cuda") == "reference"
    kernels.check("cuda")                                # nothing to run, so no GPU either
    monkeypatch.setenv("TRACELIFT_KERNELS", "triton")
    with pytest.raises(ValueError, match="^TRACELIFT_KERNELS: got 'triton', must be 'reference' or not set"):
        kernels.backend("cpu")


@pytest.fixture
def unloaded(monkeypatch):
    """kernels.grpo will be imported anew, from the triton that the test puts in place."""
    monkeypatch.delitem(sys.modules, "kernels.grpo", raising=False)
    monkeypatch.delattr(kernels, "grpo", raising=False)


def one_line(call) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "TRACELIFT_KERNELS=reference" in message
    return message


def test_triton_that_is_not_installed(unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)     # import triton: ModuleNotFoundError
    for call in (lambda: kernels.backend("cuda"), lambda: kernels.check(torch.device("cuda", 0))):
        assert one_line(call).startswith("Triton is not installed (pip install triton)")
    assert kernels.backend("cpu") == "reference"
    grpo_loss(**ok())


@pytest.mark.parametrize("line, reason", [
    ("raise OSError('libcuda.so.1: wrong version\\nof something')",
     "OSError: libcuda.so.1: wrong version of something"),
    ("import a_part_of_triton", "ModuleNotFoundError: No module named 'a_part_of_triton'"),
    ("from math import jit", "ImportError: cannot import name 'jit' from 'math'"),
])
def test_triton_that_cannot_be_imported(unloaded, monkeypatch, tmp_path, line, reason):
    (tmp_path / "triton.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    for call in (lambda: kernels.backend("cuda"), lambda: kernels.check("cuda")):
        assert one_line(call).startswith(f"Triton is broken: {reason}")


@pytest.mark.parametrize("failure, reason", [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
     "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."),
    (subprocess.CalledProcessError(1, ["gcc", "main.c"]),
     "CalledProcessError: Command '['gcc', 'main.c']' returned non-zero exit status 1"),
])
def test_triton_that_cannot_compile_is_found_by_check(triton_only, monkeypatch, failure, reason):
    class Launch:                                        # kernel[grid](...)
        def __getitem__(self, grid):
            raise failure

    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    with torch.no_grad():
        kernels.check("cpu")                             # the interpreter can
    monkeypatch.setattr(fused, "_forward", Launch())
    message = one_line(lambda: kernels.check("cpu"))
    assert message.startswith(f"Triton cannot run on cpu: {reason}") and "Python.h" in message


def test_kernels_that_compute_nonsense_are_found_by_check(triton_only, monkeypatch):
    monkeypatch.setattr(kernels, "backend", lambda device: "triton")
    monkeypatch.setattr(fused, "token_logp_triton", lambda logits, target: (logits[:, 0], None))
    assert one_line(lambda: kernels.check("cpu")).startswith("Triton computes on cpu [0.0, 1.0] instead of [-2.77")


def test_each_file_copied_alone(tmp_path, triton_only):
    """reference.py, grpo.py and linear.py into empty folders: each needs no other."""
    code = """if 1:
        import sys, torch
        from grpo import grpo_loss_triton
        from linear import chunked_loss
        from reference import grpo_loss_reference
        assert "kernels" not in sys.modules
        hidden, head = torch.randn(6, 4), torch.randn(9, 4)
        rows = (torch.arange(6), torch.tensor([0., 1.]), torch.tensor([0, 0, 0, 1, 1, 1]), torch.full((6,), 1 / 6), 2)
        losses = [grpo_loss_reference(hidden @ head.T, *rows), grpo_loss_triton(hidden @ head.T, *rows),
                  chunked_loss(grpo_loss_triton, hidden, head, *rows, chunk=4)]
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0])"""
    for name in "reference.py", "grpo.py", "linear.py":
        (tmp_path / name[:-3]).mkdir()
        (tmp_path / name[:-3] / name).write_text((ROOT / "kernels" / name).read_text())
    paths = os.pathsep.join(str(folder) for folder in tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


# ---- the commands ----

@pytest.fixture(scope="module")
def machine_code():
    """What count_instructions.py counts, and facts about the PTX; compiled for sm_90 in a process of its own."""
    if fused is None:
        pytest.skip("triton is not installed")
    code = """if 1:
        import json, re
        from count_instructions import compiled, grpo, table
        counts = {name: {**c, "all": c.total()} for name, c in table(4096 * 4).items()}
        ptx = {"forward": compiled(grpo._forward, 4, V=16384, BLOCK=4096, TAU=1.0, GROUP=8, SCALE=True),
               "backward": compiled(grpo._backward, 8, V=16384, BLOCK=4096, TAU=1.0)}
        print(json.dumps([counts, {name: kernel.asm["ptx"] for name, kernel in ptx.items()}]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_instructions_per_element(machine_code):
    counts, _ = machine_code
    assert counts["forward"]["MUFU.EX2"] <= 1.1 and counts["backward"]["MUFU.EX2"] <= 1.1
    assert counts["forward"]["all"] <= 11 and counts["backward"]["all"] <= 11
    assert counts["plain"]["all"] > 1.5 * counts["forward"]["all"]      # what exp2, one FMA and no mask are good for


def test_compiled_code_reads_128_bits_at_once_and_has_no_float64(machine_code):
    for name, ptx in machine_code[1].items():
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        wide = [line for line in loads if ".v4.b32" in line]
        assert len(wide) >= (4 if name == "forward" else 2), loads
        assert sum(".b16" in line for line in loads) <= 1, loads              # x[target]
        assert "st.global.v4.b32" in ptx or name == "forward"
        assert ".f64" not in ptx and "ex2.approx.ftz.f32" in ptx


def test_the_benchmark_runs_without_a_gpu(tmp_path, monkeypatch, capsys, triton_only):
    import bench_kernels as bench
    if bench.CUDA:
        pytest.skip("this machine has a GPU: run python tests/bench_kernels.py")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)      # compiles for half a minute
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(kernels, "backend", kernels.backend)             # main replaces it
    monkeypatch.setattr(sys, "argv", ["bench", "--vocab", "32", "--hidden", "8", "--out", str(tmp_path / "b.json")])
    bench.main()
    report = json.loads((tmp_path / "b.json").read_text())
    assert "times mean nothing" in capsys.readouterr().out and "times mean nothing" in report["machine"]
    errors = report["errors"]
    assert max(errors["torch.float32"].values()) <= 1e-5 and errors["torch.bfloat16"]["logp"] <= 1e-5
    results = {r["name"]: r for r in report["tables"]["32"]["results"]}
    assert results["Liger-Kernel, in place"]["failed"].startswith(("ImportError", "ModuleNotFoundError"))
    assert {"forward", "backward"} <= results["ours, in place"].keys() and "failed" not in results["eager PyTorch"]
    losses = {name: loss().item() for name, loss in bench_losses(bench).items()}
    assert losses["eager"] == pytest.approx(losses["ours"], abs=1e-6)         # the rivals do the same work
    with pytest.raises(ZeroDivisionError):                                    # ours failing is no row of a table
        bench.measure("ours", lambda: 1 / 0, [], 1)


def bench_losses(bench):
    s = bench.step(16, 32, torch.float32, torch.device("cpu"))
    return {"eager": lambda: bench.eager(**s)[0], "ours": lambda: fused.grpo_loss_triton(**s)[0]}


def test_public_names(triton_only):
    assert set(kernels.__all__) == {"grpo_loss", "grpo_loss_reference", "linear_grpo_loss", "token_logp",
                                    "token_weights", "group_advantage", "backend", "check"}
    assert all(getattr(kernels, name).__doc__ for name in kernels.__all__)
    same = [inspect.signature(f) for f in (kernels.reference.grpo_loss_reference, fused.grpo_loss_triton)]
    assert same[0] == same[1]
