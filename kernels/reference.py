"""Group advantage, log-prob and entropy in plain PyTorch: the CPU path, and what the Triton kernels are tested against.
Copy this file alone: it needs torch.

M rows of logits (one row is one sampled token), V vocabulary, B traces, groups of G traces of one problem.
"""
import torch


def group_advantage(reward, group_size, scale=True, eps=1e-6):
    """Advantage (B,) of each trace within its group: (r - mean) / (std + eps), with the population std.

    reward (B,) float, finite; each run of group_size rewards is a group. scale=False leaves the division out (Dr. GRPO,
    arXiv 2503.20783). RuntimeError where B is not a multiple of group_size.
    """
    r = reward.detach().view(-1, group_size)                                   # (N, G)
    d = r - r[:, :1]          # from the group's first: equal rewards give exactly 0, where r - mean leaves rounding
    A = d - d.mean(1, keepdim=True)
    if scale:
        A = A / (A.square().mean(1, keepdim=True).sqrt() + eps)
    return A.flatten()


def token_logp(logits, target, temperature=1.0):
    """Log-prob and entropy (M,) of each target (M,) under logits (M, V), in nats. logp carries gradient to the logits.

    Computes in float32 (float64 for float64 logits): a bfloat16 log-softmax over 152k tokens is off by 1e-2.
    A target outside [0, V) gives NaN, in the gradient too.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logq = torch.log_softmax(logits / temperature, dim=-1)
    inside = target.clamp(0, logits.shape[1] - 1)
    logp = logq.gather(1, inside[:, None])[:, 0]
    entropy = -(logq.exp() * logq.clamp(min=-1e30)).sum(-1)                    # a probability of 0 adds 0, not 0 * inf
    return logp * torch.where(target == inside, 1.0, float("nan")), entropy.detach()


def advantage_logp(logits, target, reward, seq, group_size, temperature=1.0, scale=True):
    """Log-prob, entropy and advantage of each sampled token -> logp, entropy, A, (M,) each.

    logits (M, V), target (M,) int64, reward (B,), seq (M,) int: the trace of each row. Only logp carries gradient.
    """
    logp, entropy = token_logp(logits, target, temperature)
    A = group_advantage(reward.to(logp.dtype), group_size, scale)
    return logp, entropy, A.index_select(0, seq)                               # A[seq] would accept negative numbers
