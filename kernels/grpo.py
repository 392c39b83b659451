"""The GRPO loss as two Triton kernels: group advantage, log-prob, entropy, clipped surrogate and KL in one pass over
the logits, their gradient in another. Copy it alone: it needs torch and triton >= 3.6 (on a CPU, TRITON_INTERPRET=1).

    target, seq = ids.roll(-1, 1).flatten(), torch.arange(B).repeat_interleave(T)        # ids (B,T)
    weight = mask.flatten() / mask.sum()                 # mask (B,T): 1 where the next token was sampled
    loss, logp, entropy, advantage = grpo_loss_triton(logits, target, reward, seq, weight, group_size=8, old_logp=old)

M rows (one row is one token), V vocabulary, B sequences, groups of G sequences. For a row x of sequence b, weight w,
C = log2(e) / temperature, m the running maximum of x (from -1e30 up, so that a first block of -inf is harmless):

    s   = sum 2^(x C - m C)      logp = ln 2 * ((x[target] - m) C - log2 s)      p = 2^(x C - m C) / s
    A   = -mu / (sqrt(sum (d - mu)^2 / max(n - ddof, 1)) + adv_eps)     d = r - r_b of the n finite rewards, mu = mean d
    rho = exp(logp - old)        l = -min(rho A, clip(rho) A) + beta rho (exp(ref - logp) - (ref - logp) - 1)
    loss = sum w l               dl/dlogp = -A rho [rho A <= clip(rho) A] + beta rho (logp - ref)
    dx  = w dl/dlogp (onehot - p) / temperature

rho is alive in both terms, so that the second has the gradient of the reverse KL (arXiv 2512.02556). Measured from the
row's own reward, equal ones give exactly 0; r - mean leaves noise, which a tiny std blows up. Each row works out its
group again, so groups may straddle micro-batches. The backward knows nothing of PPO: it gets m, s and w dl/dlogp.

Bytes per bf16 element: 2 read by the forward, 2 read and 2 written by the backward; 10.1 instructions in either inner
loop (sm_90, python tests/count_instructions.py). fp32 inside (fp64 for fp64 logits), no atomics: equal inputs, equal
bits. Compiled again for another dtype, V, temperature, power of two above G, optional argument, alignment of logits.
"""
import torch
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
BLOCK, FORWARD_WARPS, BACKWARD_WARPS = 4096, 4, 8     # fixed: autotuning would run the in-place kernel several times

# ------------------------------------------------------------------------------------------------- 1. the kernels


@triton.jit
def _online(x, top, total, weighted, C: tl.constexpr):
    """Takes a block into top = m, total = s and weighted = sum d 2^d, where d = (x - m) C."""
    new = tl.maximum(top, tl.max(x, 0))
    d = x * C - new * C
    e = tl.exp2(d)
    shift = (top - new) * C
    keep = tl.exp2(shift)
    weighted = keep * (weighted + total * shift) + tl.sum(e * tl.maximum(d, -1e30), 0)  # 0 * -inf is NaN
    return new, keep * total + tl.sum(e, 0), weighted


@triton.jit
def _advantage(R, b, B, G, adv_eps, ddof, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """A of sequence b from the rewards R of its group; NaN for a sequence that does not exist."""
    inside = (b >= 0) & (b < B)
    i = tl.arange(0, GROUP)
    r = tl.load(R + b // G * G + i, mask=(i < G) & inside, other=float("nan"))
    own = tl.load(R + b, mask=inside, other=0.0)
    finite = tl.abs(r) < float("inf")
    n = tl.maximum(tl.sum(finite.to(tl.int32), 0), 1)
    d = tl.where(finite, r - own, 0.0)
    A = -tl.sum(d, 0) / n
    if SCALE:
        squares = tl.where(finite, (d + A) * (d + A), 0.0)
        variance = tl.sum(squares, 0) / tl.maximum(n - ddof, 1)
        A = tl.where(A == 0, 0.0, A / (tl.sqrt(variance) + adv_eps))
    A = tl.where(tl.abs(own) < float("inf"), A, 0.0)
    return tl.where(inside, A, float("nan"))


@triton.jit(do_not_specialize=["B", "G", "ddof"], do_not_specialize_on_alignment=["TARGET", "SEQ", "W", "OLD", "REF"])
def _forward(X, stride, TARGET, LOGP, ENTROPY, TOP, TOTAL, LOSS, ADV, COEF, R, SEQ, W, OLD, REF, B, G, clip_low,
             clip_high, beta, adv_eps, ddof, V: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr,
             GROUP: tl.constexpr, SCALE: tl.constexpr):
    """One row: log-prob, entropy, and m and s for the backward; with rewards R also loss, advantage and w dl/dlogp."""
    row = tl.program_id(0).to(tl.int64)      # 32768 x 151936 elements are 2.3 x 2^31
    dtype: tl.constexpr = LOGP.dtype.element_ty
    w = 1.0 if R is None else tl.load(W + row)
    if w == 0:
        return  # padding: the outputs hold zeros already

    C: tl.constexpr = LOG2E / TAU
    X += row * stride
    col = tl.arange(0, BLOCK)
    top = tl.full((), -1e30, dtype)
    total = tl.full((), 0.0, dtype)
    weighted = tl.full((), 0.0, dtype)
    for start in range(0, V // BLOCK * BLOCK, BLOCK):
        x = tl.load(X + start + col).to(dtype)
        top, total, weighted = _online(x, top, total, weighted, C)
    if V % BLOCK:
        x = tl.load(X + V // BLOCK * BLOCK + col, mask=col < V % BLOCK, other=-float("inf"))
        top, total, weighted = _online(x.to(dtype), top, total, weighted, C)

    target = tl.load(TARGET + row)
    inside = (target >= 0) & (target < V)
    x = tl.load(X + target, mask=inside, other=float("nan")).to(dtype)
    d = tl.fma(x, tl.full((), C, dtype), -top * C)                # rounded as in the loop, so that it cancels
    logp = (d - tl.log2(total)) * LN2
    tl.store(LOGP + row, logp)
    tl.store(ENTROPY + row, (tl.log2(total) - weighted / total) * LN2)
    tl.store(TOP + row, top)
    tl.store(TOTAL + row, tl.where(inside, total, float("nan")))

    if R is not None:
        A = _advantage(R, tl.load(SEQ + row), B, G, adv_eps, ddof, GROUP, SCALE).to(dtype)
        old = logp if OLD is None else tl.load(OLD + row).to(dtype)
        rho = tl.exp2((logp - old) * LOG2E)
        plain = rho * A
        clipped = tl.minimum(tl.maximum(rho, 1 - clip_low), 1 + clip_high) * A
        loss = -tl.where(plain > clipped, clipped, plain)         # a NaN of plain comes through
        slope = -tl.where(plain > clipped, 0.0, plain)
        if REF is not None:
            gap = tl.load(REF + row).to(dtype) - logp
            loss += beta * rho * (tl.exp2(gap * LOG2E) - gap - 1)
            slope -= beta * rho * gap
        tl.store(LOSS + row, w.to(dtype) * loss)
        tl.store(ADV + row, A)
        tl.store(COEF + row, w.to(dtype) * slope)


@triton.jit
def _backward(X, stride, TARGET, TOP, TOTAL, COEF, D, stride2, V: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr):
    """One row of D = coef (onehot - p) / temperature. D may be X."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride
    D += row * stride2
    col = tl.arange(0, BLOCK)
    C: tl.constexpr = LOG2E / TAU
    k = tl.load(COEF + row) / TAU
    if k == 0:                                       # padding and rows without gradient
        for start in range(0, V, BLOCK):
            tl.store(D + start + col, tl.zeros((BLOCK,), D.dtype.element_ty), mask=start + col < V)
        return
    target = tl.load(TARGET + row)
    top = tl.load(TOP + row)
    scale = k / tl.load(TOTAL + row)
    for start in range(0, V, BLOCK):
        x = tl.load(X + start + col, mask=start + col < V, other=0.0).to(k.dtype)
        minus_kp = -scale * tl.exp2(x * C - top * C)
        dx = tl.where(start + col == target, k + minus_kp, minus_kp)
        tl.store(D + start + col, dx.to(D.dtype.element_ty), mask=start + col < V)


# ----------------------------------------------------------------------------------------------- 2. the functions

NO_LOSS = dict(R=None, SEQ=None, W=None, OLD=None, REF=None, B=0, G=1, clip_low=0.0, clip_high=0.0, beta=0.0,
               adv_eps=0.0, ddof=0, GROUP=1, SCALE=False)


def grpo_loss_triton(logits, target, reward, seq, weight, group_size, old_logp=None, ref_logp=None, *, temperature=1.0,
                     clip_low=0.2, clip_high=0.2, beta=0.0, adv_eps=1e-6, ddof=0, scale=True, inplace=False):
    """GRPO loss of M tokens -> loss (), logp (M,), entropy (M,), advantage (M,), in nats. Only loss carries gradient.

    logits (M,V) float on CUDA, last stride 1; V a multiple of 16, or all accesses are 16-bit ones. target (M,) int64:
    shift the targets, not the logits (a slice is a copy), with weight 0 at the last position. reward (B,) float, of all
    sequences of the step, each run of group_size a group; one that is not finite takes no part and has A = 0. seq (M,)
    int32 or int64, the sequence of each row. weight (M,) float, mask and average in one; the loss is a plain sum, so
    micro-batches add up. old_logp, ref_logp (M,) float or None: on-policy (rho = 1), no KL. ddof=1: sample std;
    scale=False: no division by it (Dr. GRPO). inplace=True: the gradient overwrites logits, a second use then raises.
    A row of weight 0 is not read; its outputs and gradient are 0. In others a target outside [0,V), a seq outside [0,B)
    or, on-policy or with KL, a token of probability 0 gives NaN: raising would wait for the GPU. What would read or
    write beyond a tensor is an AssertionError.
    """
    _assert_logits(logits, target, inplace)
    for rows in (seq, weight, old_logp, ref_logp):
        assert rows is None or rows.shape == target.shape, "seq, weight, old_logp and ref_logp must be (M,)"
    assert not seq.is_floating_point() and weight.is_floating_point(), "seq must be integers, weight floats"
    assert reward.dim() == 1 and reward.is_floating_point(), "reward must be (B,) floats"
    assert len(reward) % group_size == 0, "reward must hold whole groups"
    assert beta == 0 or ref_logp is not None, "beta needs ref_logp"

    dtype = torch.promote_types(logits.dtype, torch.float32)
    reward = reward.detach().to(torch.promote_types(reward.dtype, dtype))
    loss_arguments = dict(
        R=reward.contiguous(), SEQ=seq.contiguous(), W=_dense(weight), OLD=_dense(old_logp),
        REF=_dense(ref_logp) if beta else None, B=len(reward), G=group_size, clip_low=float(clip_low),
        clip_high=float(clip_high), beta=float(beta), adv_eps=float(adv_eps), ddof=ddof,
        GROUP=triton.next_power_of_2(group_size), SCALE=bool(scale))
    return _Rows.apply(logits, target.contiguous(), float(temperature), inplace, loss_arguments)


def token_logp_triton(logits, target, temperature=1.0):
    """Log-prob of each target (M,) under logits (M,V), with gradient to logits, and entropy -> logp, entropy (M,).

    In nats. There is no mask: leave padding out. A target outside [0,V) gives NaN.
    """
    _assert_logits(logits, target)
    return _Rows.apply(logits, target.contiguous(), float(temperature), False, NO_LOSS)


def _assert_logits(logits, target, inplace=False):
    assert logits.is_cuda or triton.knobs.runtime.interpret, "logits must be on CUDA"
    assert logits.dim() == 2 and logits.is_floating_point(), "logits must be (M, V) floats"
    M, V = logits.shape
    assert V > 0 and (V == 1 or logits.stride(1) == 1), "logits must have V > 0 and last stride 1"
    assert not inplace or logits.stride(0) >= V, "rows of logits must not overlap if inplace"
    assert target.shape == (M,) and target.dtype == torch.int64, "target must be (M,) int64"


def _dense(rows):
    return None if rows is None else rows.detach().contiguous()


class _Rows(torch.autograd.Function):
    """The kernels under autograd. The first output carries gradient: the loss or, without a reward, logp."""

    @staticmethod
    def forward(ctx, logits, target, temperature, inplace, loss_arguments):
        M, V = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        outputs = [logits.new_zeros(M, dtype=dtype) for _ in range(7)]
        logp, entropy, top, total, loss, advantage, coef = outputs
        constants = dict(V=V, TAU=temperature, BLOCK=min(BLOCK, triton.next_power_of_2(V)))
        with torch.cuda.device_of(logits):
            _forward[(M,)](logits, logits.stride(0), target, *outputs, **loss_arguments, **constants,
                           num_warps=FORWARD_WARPS)
        ctx.inplace = inplace
        ctx.constants = constants
        if loss_arguments["R"] is None:
            ctx.save_for_backward(logits, target, top, total, None)
            ctx.mark_non_differentiable(entropy)
            return logp, entropy
        ctx.save_for_backward(logits, target, top, total, coef)
        ctx.mark_non_differentiable(logp, entropy, advantage)
        return loss.sum(), logp, entropy, advantage

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, target, top, total, coef = ctx.saved_tensors
        coef = grad.contiguous() if coef is None else coef * grad
        dlogits = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        with torch.cuda.device_of(logits):
            _backward[(len(logits),)](logits, logits.stride(0), target, top, total, coef, dlogits, dlogits.stride(0),
                                      **ctx.constants, num_warps=BACKWARD_WARPS)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)     # whoever still needs the logits gets an error
        return dlogits, None, None, None, None
