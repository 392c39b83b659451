"""GRPO loss in plain PyTorch: slow, obvious, any dtype and device. It is the CPU path, and the oracle of the kernels.

Letters: M rows (one row is one token, padded or packed alike), V vocabulary, B sequences, T tokens of a sequence,
G traces of one problem. Sequence b belongs to problem b // G. For a row with weight w of sequence b:

    logp  = x[target] / tau - logsumexp(x / tau)                          tau = temperature, x = the row of logits
    A     = (r_b - mean r) / (std r + adv_eps)                            over the G rewards of the problem
    rho   = exp(logp - old)                                               on-policy 1, with a derivative
    l     = -min(rho A, clamp(rho, 1 - clip_low, 1 + clip_high) A) + beta rho (exp(ref - logp) - (ref - logp) - 1)
    loss  = sum of w l over the rows

The term with beta has the derivative beta rho (logp - ref) in logp, which over sampled tokens is that of the reverse
KL(policy || reference). Without rho it would be that of the forward one, on-policy too.

Sources: arXiv 2605.03862 and its public code, which is token_weights "grpo", population std, adv_eps 1e-6, one update
per rollout (so rho = 1); its math trainer has the defaults of TRL ("dapo", ddof 1, adv_eps 1e-4). The term with beta
is that of DeepSeek-V3.2, arXiv 2512.02556.

Numbers: float32 inside, float64 when the logits are float64; a bfloat16 log-softmax over 152k tokens is off by 1e-2.
Rows of weight 0 are selected away, never multiplied by 0, because 0 * inf is NaN: whatever a padded row holds (NaN
logits, target -100), its outputs and gradients are 0. No function writes to its inputs.
Left out: speed (several (M,V) temporaries a call, where a fused kernel reads the logits once) and the checks of
arguments, which stand once in __init__.py.
"""
import torch

# ---------------------------------------------------------------------------------------------------- 1. the loss


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
              -A * dlogp. A live token of probability 0 then is NaN, as it is with KL; else its rho is 0.
    ref_logp  (M,) float in nats, of the reference policy; needed if beta > 0, else not read.
    inplace   permission to overwrite logits. This implementation has no use for it and leaves logits as they are.

    logp and entropy are in nats, at the given temperature. Outputs of padded rows are 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    live = weight.nonzero()[:, 0]
    logp, entropy = token_logp_reference(logits.index_select(0, live), target[live], temperature)

    reward = reward.to(torch.promote_types(reward.dtype, dtype))
    A = group_advantage(reward, group_size, adv_eps, ddof, scale)              # (B,)
    A = _take(A, seq[live].long(), dtype)                                      # (live rows,)

    old = logp.detach() if old_logp is None else _take(old_logp, live, dtype)
    rho = torch.exp(logp - old)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(rho * A, clipped * A)
    if beta > 0:
        gap = _take(ref_logp, live, dtype) - logp
        loss = loss + beta * rho * (torch.expm1(gap) - gap)
    loss = (_take(weight, live, dtype) * loss).sum()

    padded = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    logp = padded.index_copy(0, live, logp.detach())
    entropy = padded.index_copy(0, live, entropy)
    A = padded.index_copy(0, live, A)
    return loss, logp, entropy, A


def _take(x, rows, dtype):
    return x.detach()[rows].to(dtype)


# --------------------------------------------------------------------------------------------------- 2. its parts


def token_logp_reference(logits, target, temperature=1.0):
    """Log-probability of each target, for old and reference policies and other losses -> logp, entropy (M,), in nats.

    logits (M,V) float, target (M,) int64; a target outside [0,V) gives NaN. logp carries gradient to logits, entropy is
    a metric and does not. There is no mask: leave padding out before the call if you differentiate.
    """
    V = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logq = torch.log_softmax(logits / temperature, dim=-1)                     # (M,V)
    logp = logq.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
    outside = (target < 0) | (target >= V)
    logp = logp * torch.ones_like(logp).masked_fill(outside, float("nan"))     # NaN in the gradient too
    with torch.no_grad():
        entropy = -(logq.exp() * logq.clamp(min=-1e30)).sum(-1)                # a probability of 0 adds 0, not 0 * inf
    return logp, entropy


def group_advantage(reward, group_size, adv_eps=1e-6, ddof=0, scale=True):
    """A_i = (r_i - mean) / (std + adv_eps) within each run of group_size rewards -> (B,), float32 or float64.

    reward (B,) float, B divisible by group_size. std divides by max(n - ddof, 1): ddof 0 is the population one, 1 the
    sample one. scale=False leaves the division out (Dr. GRPO). n counts the finite rewards of the group; the others
    take no part and get A = 0. Rewards are measured from the row's own, so equal ones give exactly 0, where r - mean
    leaves rounding noise that a tiny std blows up to advantages near 1.
    """
    r = reward.detach().to(torch.promote_types(reward.dtype, torch.float32))
    r = r.view(-1, group_size)                                                 # (N,G)
    finite = r.isfinite()
    n = finite.sum(-1, keepdim=True)
    both = finite[:, :, None] & finite[:, None, :]
    d = r[:, :, None] - r[:, None, :]                                          # (N,G,G): own - other
    d = d.masked_fill(~both, 0)
    A = d.sum(-1) / n.clamp(min=1)                                             # own - mean
    if scale:
        squares = (d - A[:, :, None]) ** 2
        variance = squares.masked_fill(~finite[:, None, :], 0).sum(-1) / (n - ddof).clamp(min=1)
        A = torch.where(A == 0, A, A / (variance.sqrt() + adv_eps))            # 0 also with adv_eps = 0
    return A.flatten()


def token_weights(mask, mode="dapo", max_len=None, num_tokens=None, num_sequences=None):
    """One weight per token that carries mask and average -> (B,T) float32, 0 where mask is 0.

    mask (B,T) of 0 and 1, bool or number: 1 where the token was sampled (the first EOS included), for ALL sequences of
    the optimizer step. Compute the weights once a step and slice them: B is then that of the step, and the sum over
    micro-batches is exact.

    "dapo"     m / num_tokens          every token counts the same
    "grpo"     m / (B * len_b)         every sequence counts the same
    "dr_grpo"  m / (B * max_len)       as a sum over tokens: max_len is the generation limit, not the longest sequence

    Data parallel, mask holds one process's sequences of the step: num_tokens and num_sequences (B) are those of all
    processes, so that their losses and gradients add up to those of the step. Default: those of mask.
    """
    m = (mask.detach() != 0).float()
    B = num_sequences or max(len(m), 1)
    if mode == "dapo":
        num_tokens = m.sum() if num_tokens is None else num_tokens
        return m / num_tokens if m.any() else m
    if mode == "grpo":
        return m / (B * m.sum(1, keepdim=True).clamp(min=1))
    if mode == "dr_grpo":
        return m / (B * max_len)
    raise ValueError(f"mode: got {mode!r}, must be 'dapo', 'grpo' or 'dr_grpo'")
