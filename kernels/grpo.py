"""Two Triton kernels for GRPO. The forward reads each row of logits once and gives the log-prob of the sampled token,
the entropy and the group advantage; the backward turns dloss/dlogp into dloss/dlogits. Copy this file alone: it needs
torch and triton >= 3.6. Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1).

    logp, entropy, A = advantage_logp(logits, target, reward, seq, group_size=8)
    loss = -(weight * A * logp).sum()               # or any other function of logp
    loss.backward()

M rows, one per sampled token; V vocabulary; B traces; groups of G traces. For a row x of trace b, with
C = log2(e) / temperature and m the largest x so far:

    s    = sum 2^(x C - m C)            lse     = m C + log2 s                       p = 2^(x C - lse)
    logp = ln 2 (x[target] C - lse)     entropy = ln 2 (lse - C sum p x)
    A    = -mean d / (sqrt(mean d^2 - (mean d)^2) + 1e-6)                            d = r - r_b over the group
    dx   = dlogp (onehot - p) / temperature

Rewards are measured from the row's own, so equal rewards give exactly 0; r - mean leaves rounding noise, which a tiny
std makes large. One program per row; it computes its group's A again (G numbers beside V). A row is 2 V bytes of
bfloat16: 2 V are read forward, 2 V read and 2 V written backward, over the logits themselves if inplace. Float32 inside
(float64 for float64 logits), no atomics: equal inputs give equal bits. A new dtype, V, temperature, scale or power of
two above G compiles again; a new M, B or stride does not.
"""
import math

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
BLOCK = 4096                        # fixed: autotuning would run the in-place kernel several times


@triton.jit
def _forward(X, stride, TARGET, R, SEQ, LOGP, ENTROPY, LSE, ADVANTAGE, B, G, V: tl.constexpr, C: tl.constexpr,
             BLOCK: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                 # 32768 rows of 151936 logits are 2.3 x 2^31
    dtype: tl.constexpr = LOGP.dtype.element_ty
    X += row * stride
    top = tl.full((), -1e30, dtype)                     # m; finite, so that a first block of -inf is harmless
    total = tl.full((), 0.0, dtype)                     # s
    weighted = total                                    # sum of x 2^(x C - m C), for the entropy
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(X + col, mask=col < V, other=-float("inf")).to(dtype)
        new = tl.maximum(top, tl.max(x, 0))
        e = tl.exp2(x * C - new * C)
        keep = tl.exp2((top - new) * C)
        total = keep * total + tl.sum(e, 0)
        weighted = keep * weighted + tl.sum(e * tl.maximum(x, -1e30), 0)        # 0 * -inf is NaN
        top = new
    target = tl.load(TARGET + row)
    inside = (target >= 0) & (target < V)
    x = tl.load(X + target, mask=inside).to(dtype)
    lse = top * C + tl.log2(total)
    tl.store(ENTROPY + row, (lse - weighted / total * C) * LN2)
    lse = tl.where(inside, lse, float("nan"))           # NaN in logp and gradient, not a fault
    tl.store(LSE + row, lse)
    tl.store(LOGP + row, (x * C - lse) * LN2)

    seq = tl.load(SEQ + row)
    inside = (seq >= 0) & (seq < B)
    own = tl.load(R + seq, mask=inside, other=float("nan"))
    i = tl.arange(0, GROUP)
    d = tl.load(R + seq // G * G + i, mask=(i < G) & inside, other=own) - own
    A = -tl.sum(d, 0) / G
    if SCALE:
        A /= tl.sqrt(tl.sum(d * d, 0) / G - A * A) + 1e-6                       # no cancellation: one d is 0
    tl.store(ADVANTAGE + row, A)


@triton.jit
def _backward(X, stride, TARGET, LSE, DLOGP, DX, dstride, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    X += row * stride
    DX += row * dstride
    target = tl.load(TARGET + row)
    lse = tl.load(LSE + row)
    slope = tl.load(DLOGP + row)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(X + col, mask=col < V, other=0.0).to(lse.dtype)
        p = tl.exp2(x * C - lse)
        dx = slope * tl.where(col == target, 1 - p, -p)
        tl.store(DX + col, dx, mask=col < V)            # DX may be X


class _AdvantageLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, reward, seq, group_size, temperature, scale, inplace):
        M, V = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp, entropy, lse, A = (logits.new_empty(M, dtype=dtype) for _ in range(4))
        ctx.constants = dict(V=V, C=math.log2(math.e) / temperature, BLOCK=min(BLOCK, triton.next_power_of_2(V)))
        with torch.cuda.device_of(logits):                      # autograd does it for the backward
            _forward[(M,)](logits, logits.stride(0), target, reward.to(dtype).contiguous(), seq, logp, entropy, lse, A,
                           len(reward), group_size, GROUP=triton.next_power_of_2(group_size), SCALE=scale,
                           **ctx.constants, num_warps=4)
        ctx.save_for_backward(logits, target, lse)
        ctx.temperature = temperature
        ctx.inplace = inplace
        ctx.mark_non_differentiable(entropy, A)
        return logp, entropy, A

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, *_):
        logits, target, lse = ctx.saved_tensors
        dlogits = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        _backward[(len(logits),)](logits, logits.stride(0), target, lse, dlogp / ctx.temperature, dlogits,
                                  dlogits.stride(0), **ctx.constants, num_warps=8)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)      # whoever still needs the logits gets an error
        return dlogits, *[None] * 7


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
    if logits.stride(1) != 1 or inplace and logits.stride(0) < logits.shape[1]:
        raise ValueError("logits: need last stride 1 and, if inplace, rows that do not overlap")
    if not target.shape == seq.shape == logits.shape[:1] or len(reward) % group_size:
        raise ValueError("target, seq: need one number per row of logits; reward: needs whole groups")
    return _AdvantageLogp.apply(logits, target.contiguous(), reward, seq.contiguous(), group_size, temperature, scale,
                                inplace)
