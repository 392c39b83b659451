"""GRPO loss in plain PyTorch: slow, obvious, any dtype and device. It is the CPU path, and the oracle of grpo.py.

Letters: M rows (one row is one token, padded or packed alike), V vocabulary, H hidden, B sequences, T tokens of a
sequence, G traces of one problem. Sequence b belongs to problem b // G. For a row with weight w of sequence b:

    logp  = x[target] / tau - logsumexp(x / tau)                          tau = temperature, x = the row of logits
    A     = (r_b - mean r) / (std r + adv_eps)                            over the G rewards of the problem
    rho   = exp(logp - old)
    l     = -min(rho * A, clamp(rho, 1 - clip_low, 1 + clip_high) * A) + beta * (exp(ref - logp) - (ref - logp) - 1)
    loss  = sum of w * l over the rows

Source: arXiv 2605.03862 and its public code, which is token_weights "grpo", population std, adv_eps 1e-6, one update
per rollout (so rho = 1); its math trainer has the defaults of TRL ("dapo", ddof 1, adv_eps 1e-4).

Numbers: float32 inside, float64 when the logits are float64; a bfloat16 log-softmax over 152k tokens is off by 1e-2.
Rows of weight 0 are selected away, never multiplied by 0, because 0 * inf is NaN: whatever a padded row holds (NaN
logits, target -100), its outputs and gradients are 0. No function writes to its inputs. Wrong shapes, dtypes, devices
and settings are a ValueError that names the argument, what it was and what it must be.
Left out: speed. Each call makes several (M,V) temporaries, where a fused kernel reads the logits once.
"""
import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- the loss ----

def grpo_loss_reference(logits, target, reward, seq, weight, group_size, old_logp=None, ref_logp=None, *,
                        temperature=1.0, clip_low=0.2, clip_high=0.2, beta=0.0, adv_eps=1e-6, ddof=0, scale=True,
                        inplace=False):
    """GRPO loss of M tokens -> loss (), logp (M,), entropy (M,), advantage (M,). Only loss carries gradient, to logits.

    logits    (M,V) float, last stride 1, any row stride. Shift the targets, not the logits (a slice is a copy).
    target    (M,) int64. Outside [0,V) in a live row: loss, logp and that row's gradient are NaN.
    reward    (B,) float, of all sequences of the step also when logits are one micro-batch of it: groups may straddle
              micro-batches. A reward that is not finite is left out of its group and has A = 0.
    seq       (M,) int32 or int64: the sequence b of each row, in [0,B) where the row is live.
    weight    (M,) float, from token_weights. Carries mask and average: 0 means padding. The loss is a plain sum, so
              the losses of micro-batches add up to the loss of the step, without scaling.
    old_logp  (M,) float in nats, of the policy that sampled. None: on-policy, rho = 1, so l is -A and its gradient
              -A * dlogp (a live token of probability 0 then is NaN; with old_logp its rho is 0).
    ref_logp  (M,) float in nats, of the reference policy; needed if beta > 0, else not read.
    inplace   permission to overwrite logits. This implementation has no use for it and leaves logits as they are.

    logp and entropy are in nats, at the given temperature. Outputs of padded rows are 0.
    """
    _check_logits(logits, temperature)
    _check_rows(logits, target, reward, seq, weight, old_logp, ref_logp)
    _require(clip_low >= 0, "clip_low", clip_low, "at least 0")
    _require(clip_high >= 0, "clip_high", clip_high, "at least 0")
    _require(0 <= beta < float("inf"), "beta", beta, "at least 0 and finite")
    _require(beta == 0 or ref_logp is not None, "ref_logp", None, f"given, because beta is {beta}")

    work = _work_dtype(logits)
    live = weight.detach().nonzero()[:, 0]
    rows = lambda x: x.detach()[live].to(work)
    A = group_advantage(reward.to(torch.promote_types(reward.dtype, work)), group_size, adv_eps, ddof, scale)   # (B,)
    b = seq[live].long()
    outside = b[(b < 0) | (b >= len(A))]
    _require(len(outside) == 0, "seq", outside[:1].tolist(), f"in [0, {len(A)}) in live rows")
    A = A[b].to(work)                                                                       # (live rows,)
    logp, entropy = _logp_entropy(logits.index_select(0, live), target[live], temperature)

    rho = torch.exp(logp - (logp.detach() if old_logp is None else rows(old_logp)))
    loss = -torch.minimum(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    if beta > 0:
        gap = rows(ref_logp) - logp
        loss = loss + beta * (torch.expm1(gap) - gap)
    loss = (rows(weight) * loss).sum()

    dense = lambda x: x.new_zeros(len(logits)).index_copy(0, live, x)
    return loss, dense(logp.detach()), dense(entropy), dense(A)


# ---- its parts ----

def token_logp(logits, target, temperature=1.0):
    """Log-probability of each target, for old and reference policies and other losses -> logp, entropy (M,), in nats.

    logits (M,V) float, target (M,) int64; a target outside [0,V) gives NaN. logp carries gradient to logits, entropy is
    a metric and does not. There is no mask: leave padding out before the call if you differentiate.
    """
    _check_logits(logits, temperature)
    _check_tensor("target", target, (len(logits),), (torch.int64,), logits.device)
    return _logp_entropy(logits, target, temperature)


def _logp_entropy(logits, target, temperature):
    V = logits.shape[1]
    logq = torch.log_softmax(logits.to(_work_dtype(logits)) / temperature, dim=-1)          # (M,V)
    with torch.no_grad():  # clamp: a token of probability 0 adds 0 * -1e30, not 0 * -inf
        entropy = -(logq.exp() * logq.clamp(min=-1e30)).sum(-1)
    logp = logq.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
    outside = (target < 0) | (target >= V)
    return logp * torch.ones_like(logp).masked_fill(outside, float("nan")), entropy         # NaN in the gradient too


def group_advantage(reward, group_size, adv_eps=1e-6, ddof=0, scale=True):
    """A_i = (r_i - mean) / (std + adv_eps) within each run of group_size rewards -> (B,), float32 or float64.

    reward (B,) float, B divisible by group_size. std divides by max(n - ddof, 1): ddof 0 is the population one, 1 the
    sample one. scale=False leaves the division out (Dr. GRPO). n counts the finite rewards of the group; the others
    take no part and get A = 0. Rewards are measured from the row's own, so equal ones give exactly 0, where r - mean
    leaves rounding noise that a tiny std blows up to advantages near 1.
    """
    _check_tensor("reward", reward, ("B",), FLOATS)
    _require(isinstance(group_size, int) and group_size > 0, "group_size", repr(group_size), "a positive int")
    _require(len(reward) % group_size == 0, "reward", f"{len(reward)} rewards",
             f"a multiple of group_size = {group_size}")
    _require(adv_eps >= 0, "adv_eps", adv_eps, "at least 0")
    _require(isinstance(ddof, int) and ddof >= 0, "ddof", repr(ddof), "an int of at least 0")

    r = reward.detach().to(_work_dtype(reward)).view(-1, group_size)                        # (N,G)
    finite = r.isfinite()
    n = finite.sum(-1, keepdim=True)
    d = r[:, :, None] - r[:, None, :]                                                       # (N,G,G): own - other
    d = d.masked_fill(~(finite[:, :, None] & finite[:, None, :]), 0)
    A = d.sum(-1) / n.clamp(min=1)                                                          # own - mean
    if scale:
        spread = ((d - A[:, :, None]) ** 2).masked_fill(~finite[:, None, :], 0).sum(-1)
        std = (spread / (n - ddof).clamp(min=1)).sqrt()
        A = torch.where(A == 0, A, A / (std + adv_eps))                                     # also with adv_eps = 0
    return A.flatten()


def token_weights(mask, mode="dapo", max_len=None, num_tokens=None):
    """One weight per token that carries mask and average -> (B,T) float32, 0 where mask is 0.

    mask (B,T) of 0 and 1, bool or number: 1 where the token was sampled (the first EOS included), for ALL sequences of
    the optimizer step. Compute the weights once a step and slice them: B is then that of the step, and the sum over
    micro-batches is exact.

    "dapo"     m / num_tokens          every token counts the same; num_tokens = mask.sum() unless given (data parallel)
    "grpo"     m / (B * len_b)         every sequence counts the same
    "dr_grpo"  m / (B * max_len)       as a sum over tokens: max_len is the generation limit, not the longest sequence
    """
    _require(torch.is_tensor(mask) and mask.dim() == 2, "mask", getattr(mask, "shape", type(mask)), "a tensor (B,T)")
    m = (mask.detach() != 0).float()
    B = max(len(m), 1)
    if mode == "dapo":
        num_tokens = m.sum() if num_tokens is None else num_tokens
        _require(num_tokens > 0 or not m.any(), "num_tokens", num_tokens, "positive, the tokens of the whole step")
        return m / num_tokens if m.any() else m
    if mode == "grpo":
        return m / (B * m.sum(1, keepdim=True).clamp(min=1))
    _require(mode == "dr_grpo", "mode", repr(mode), "'dapo', 'grpo' or 'dr_grpo'")
    _require(max_len is not None and max_len > 0, "max_len", max_len, "positive, the generation limit, in mode dr_grpo")
    return m / (B * max_len)


# ---- input checks ----

def _work_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _require(ok, name, was, must):
    if not ok:
        raise ValueError(f"{name}: got {was}, must be {must}")


def _check_tensor(name, x, shape, dtypes, device=None):
    """shape holds a number where the size is fixed and a letter where it is free."""
    _require(torch.is_tensor(x), name, type(x).__name__, "a tensor")
    fits = x.dim() == len(shape) and all(isinstance(want, str) or want == size for want, size in zip(shape, x.shape))
    _require(fits, name, f"shape {tuple(x.shape)}", f"of shape ({', '.join(map(str, shape))})")
    _require(x.dtype in dtypes, name, x.dtype, "of dtype " + " or ".join(str(d).removeprefix("torch.") for d in dtypes))
    _require(device is None or x.device == device, name, f"on {x.device}", f"on {device} as the others are")


def _check_logits(logits, temperature):
    _check_tensor("logits", logits, ("M", "V"), FLOATS)
    V, stride = logits.shape[1], logits.stride(1)
    _require(V > 0, "logits", f"shape {tuple(logits.shape)}", "of at least one column")
    _require(stride == 1 or V == 1, "logits", f"last stride {stride}", "of last stride 1")
    _require(0 < temperature < float("inf"), "temperature", temperature, "positive and finite")


def _check_rows(first, target, reward, seq, weight, old_logp, ref_logp):
    M, device = len(first), first.device
    _check_tensor("target", target, (M,), (torch.int64,), device)
    _check_tensor("reward", reward, ("B",), FLOATS, device)
    _check_tensor("seq", seq, (M,), (torch.int32, torch.int64), device)
    for name, x in ("weight", weight), ("old_logp", old_logp), ("ref_logp", ref_logp):
        if x is not None or name == "weight":
            _check_tensor(name, x, (M,), FLOATS, device)
