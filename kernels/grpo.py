"""Two Triton kernels for GRPO. The forward reads each row of logits once and gives the log-prob of the sampled token,
the entropy and the group advantage; the backward turns dloss/dlogp into dloss/dlogits. Copy this file alone: it needs
torch and triton >= 3.6. Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1).

    logp, entropy, A = advantage_logp(logits, target, reward, seq, group_size=8)
    loss = -(weight * A * logp).sum()               # or any other function of logp
    loss.backward()

M rows, one per sampled token; V vocabulary; B traces; groups of G traces. For a row x of trace b, with
C = log2(e) / temperature and m the largest x so far:

    s    = sum 2^(x C - m C)                  lse     = m C + log2 s                       p = 2^(x C - lse)
    logp = ln 2 (x[target] C - lse)           entropy = ln 2 (log2 s - sum d 2^d / s)      d = x C - m C
    A    = -mu / (sqrt(mean (r - r_b - mu)^2) + 1e-6)                                      mu = mean (r - r_b)
    dx   = dlogp (onehot - p) / temperature

Rewards are measured from the row's own, so equal rewards give exactly 0; r - mean leaves rounding noise, which a tiny
std makes large. One program per row; it computes its group's A again (G numbers beside V). A row is 2 V bytes of
bfloat16: 2 V are read forward, 2 V read and 2 V written backward, over the logits themselves if inplace. Float32 inside
(float64 for float64 logits), no atomics: equal inputs give equal bits. A new dtype, V, temperature, scale or power of
two above G compiles again; a new M, B or stride does not.
"""
import torch
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
BLOCK, FORWARD_WARPS, BACKWARD_WARPS = 4096, 4, 8       # fixed: autotuning would run the in-place kernel several times


@triton.jit(do_not_specialize=["B", "G"])
def _forward(X, stride, TARGET, R, SEQ, LOGP, ENTROPY, LSE, ADVANTAGE, B, G, V: tl.constexpr, TAU: tl.constexpr,
             BLOCK: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                 # 32768 rows of 151936 logits are 2.3 x 2^31
    dtype: tl.constexpr = LOGP.dtype.element_ty
    C: tl.constexpr = LOG2E / TAU
    X += row * stride
    col = tl.arange(0, BLOCK)
    top = tl.full((), -1e30, dtype)                     # m; finite, so that a first block of -inf is harmless
    total = tl.full((), 0.0, dtype)                     # sum of 2^d
    weighted = tl.full((), 0.0, dtype)                  # sum of d 2^d, for the entropy
    for start in range(0, V, BLOCK):
        x = tl.load(X + start + col, mask=start + col < V, other=-float("inf")).to(dtype)
        new = tl.maximum(top, tl.max(x, 0))
        d = x * C - new * C
        e = tl.exp2(d)
        shift = (top - new) * C
        keep = tl.exp2(shift)
        weighted = keep * (weighted + total * shift) + tl.sum(e * tl.maximum(d, -1e30), 0)      # 0 * -inf is NaN
        total = keep * total + tl.sum(e, 0)
        top = new

    target = tl.load(TARGET + row)
    x = tl.load(X + target, mask=(target >= 0) & (target < V), other=float("nan")).to(dtype)    # NaN, not a fault
    d = tl.fma(x, tl.full((), C, dtype), -top * C)      # rounded as in the loop, so that the rounding cancels
    size = tl.log2(total)
    tl.store(LOGP + row, (d - size) * LN2)
    tl.store(ENTROPY + row, (size - weighted / total) * LN2)
    tl.store(LSE + row, top * C + size + 0 * x)         # NaN where x is: the gradient is loud too

    if R is not None:
        seq = tl.load(SEQ + row).to(tl.int64)
        inside = (seq >= 0) & (seq < B)
        i = tl.arange(0, GROUP)
        r = tl.load(R + seq // G * G + i, mask=(i < G) & inside, other=0.0)
        own = tl.load(R + seq, mask=inside, other=float("nan"))
        d = tl.where(i < G, r - own, 0.0)
        A = -tl.sum(d, 0) / G
        if SCALE:
            square = tl.where(i < G, (d + A) * (d + A), 0.0)
            A = A / (tl.sqrt(tl.sum(square, 0) / G) + 1e-6)
        tl.store(ADVANTAGE + row, A)


@triton.jit
def _backward(X, stride, TARGET, LSE, DLOGP, DX, dstride, V: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = LSE.dtype.element_ty
    C: tl.constexpr = LOG2E / TAU
    X += row * stride
    DX += row * dstride
    target, lse = tl.load(TARGET + row), tl.load(LSE + row)
    slope = tl.load(DLOGP + row) / TAU
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(X + col, mask=col < V, other=0.0).to(dtype)
        minus = -slope * tl.exp2(x * C - lse)
        dx = tl.where(col == target, slope + minus, minus)
        tl.store(DX + col, dx.to(DX.dtype.element_ty), mask=col < V)            # DX may be X


def _require(ok, message):
    """What would read beyond a tensor, or be wrong in silence. The rest is torch's and Triton's to say."""
    if not ok:
        raise ValueError(message)


class _AdvantageLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, reward, seq, group_size, temperature, scale, inplace):
        M, V = logits.shape
        _require(logits.stride(1) == 1, "logits: the last stride must be 1")
        _require(not inplace or logits.stride(0) >= V, "logits: rows must not overlap if inplace")
        _require(target.shape == (M,), "target: must hold one token per row of logits")
        _require(temperature > 0, "temperature: must be positive")
        B = 0
        if reward is not None:
            B = len(reward)
            _require(seq.shape == (M,), "seq: must hold one trace per row of logits")
            _require(B % group_size == 0, f"reward: {B} numbers are not whole groups of {group_size}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp, entropy, lse, A = (logits.new_empty(M, dtype=dtype) for _ in range(4))
        ctx.constants = dict(V=V, TAU=float(temperature), BLOCK=min(BLOCK, triton.next_power_of_2(V)))
        with torch.cuda.device_of(logits):
            _forward[(M,)](logits, logits.stride(0), target, reward, seq, logp, entropy, lse, A, B, group_size,
                           GROUP=triton.next_power_of_2(group_size), SCALE=scale, **ctx.constants,
                           num_warps=FORWARD_WARPS)
        ctx.save_for_backward(logits, target, lse)
        ctx.inplace = inplace
        ctx.mark_non_differentiable(entropy, A)
        return logp, entropy, A

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, *_):
        logits, target, lse = ctx.saved_tensors
        dlogits = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        with torch.cuda.device_of(logits):
            _backward[(len(logits),)](logits, logits.stride(0), target, lse, dlogp.contiguous(), dlogits,
                                      dlogits.stride(0), **ctx.constants, num_warps=BACKWARD_WARPS)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)      # whoever still needs the logits gets an error
        return dlogits, None, None, None, None, None, None, None


def advantage_logp(logits, target, reward, seq, group_size, temperature=1.0, scale=True, inplace=False):
    """Log-prob, entropy and advantage of M sampled tokens -> logp, entropy, A, (M,) each, in nats.

    logits    (M, V) float on CUDA, last stride 1. Pad V to a multiple of 16, or all accesses are 16-bit ones. Shift the
              targets, not the logits (a slice is a copy).
    target    (M,) int64. Outside [0, V): NaN in logp and gradient; to raise would wait for the GPU.
    reward    (B,) float, finite, of all traces of the step; each run of group_size is a group. logits may be a
              micro-batch: groups may straddle them.
    seq       (M,) int: the trace of each row. Outside [0, B): A is NaN.
    scale     False: no division by the std (Dr. GRPO).
    inplace   the gradient overwrites logits, and a later use of them in autograd raises.

    Only logp carries gradient, to the logits, once. ValueError for wrong shapes and strides.
    """
    reward = reward.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    return _AdvantageLogp.apply(logits, target.contiguous(), reward, seq.contiguous(), group_size, temperature, scale,
                                inplace)


def token_logp(logits, target, temperature=1.0):
    """Log-prob, which carries gradient, and entropy (M,) of each target (M,) under logits (M, V)."""
    return _AdvantageLogp.apply(logits, target.contiguous(), None, None, 1, temperature, False, False)[:2]
