"""The wide part of GRPO's loss: log-prob, entropy and group advantage of sampled tokens. The loss itself is seven lines
of plain PyTorch on what these functions return (tracelift.policy_loss). Nothing here needs another file of the project.

reference.py   the maths in plain PyTorch: any device, and what the kernels are tested against
grpo.py        the same as fused Triton kernels, for CUDA
README.md      shapes, memory, bytes moved, what has been tested where
"""
import os

import torch

from . import reference
from .reference import group_advantage

__all__ = ["advantage_logp", "token_logp", "group_advantage", "backend", "check"]
MEND = "Mend it, or set TRACELIFT_KERNELS=reference for plain PyTorch, which is slower and needs more memory"


def advantage_logp(logits, target, reward, seq, group_size, temperature=1.0, scale=True):
    """Log-prob, entropy (in nats) and advantage of M sampled tokens -> logp, entropy, A, (M,) each.

    logits (M, V), last stride 1; target (M,) int64; reward (B,), each run of group_size a group; seq (M,) int64: the
    trace of each row. Only logp carries gradient, to the logits. On CUDA the gradient overwrites the logits: autograd
    raises where something else still needs them. A target outside [0, V) gives NaN.
    """
    if backend(logits.device) == "reference":
        return reference.advantage_logp(logits, target, reward, seq, group_size, temperature, scale)
    return _triton().advantage_logp(logits, target, reward, seq, group_size, temperature, scale, inplace=True)


def token_logp(logits, target, temperature=1.0):
    """Log-prob and entropy (M,) of each target (M,) under logits (M, V), in nats; logp carries gradient."""
    if backend(logits.device) == "reference":
        return reference.token_logp(logits, target, temperature)
    return _triton().token_logp(logits, target, temperature)


def backend(device) -> str:
    """What runs on a device: "triton" on CUDA unless TRACELIFT_KERNELS=reference, "reference" elsewhere."""
    asked = os.environ.get("TRACELIFT_KERNELS", "")
    if asked not in ("", "reference"):
        raise ValueError(f"TRACELIFT_KERNELS={asked}: must be 'reference' or not set")
    return "triton" if torch.device(device).type == "cuda" and not asked else "reference"


def check(device) -> None:
    """Compiles the kernels and compares them with the reference, where backend(device) is "triton".

    RuntimeError, one line, where Triton is missing or cannot compile, or where the numbers differ.
    """
    if backend(device) == "reference":
        return
    target, reward = torch.tensor([7, 4500], device=device), torch.tensor([1.0, 0.25], device=device)
    results = []
    try:
        for function in (reference.advantage_logp, advantage_logp):
            logits = torch.linspace(-9, 9, 10000, device=device).view(2, 5000).requires_grad_()
            # on this thread: a process whose Triton broke on a thread of autograd's can abort at exit
            with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
                logp, entropy, A = function(logits, target, reward, target // 4500, 2)
                logp.sum().backward()
            results.append(torch.cat([logp.detach(), entropy, A, logits.grad.flatten()]))
        same = torch.allclose(*results, rtol=1e-4, atol=1e-5)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RuntimeError(f"Triton cannot run on {device}: {reason}. It needs a C compiler and Python.h. {MEND}") from error
    if not same:
        raise RuntimeError(f"the Triton kernels compute wrong numbers on {device}. {MEND}")


def _triton():
    """The module grpo. Only it imports triton, which a machine without CUDA need not have."""
    try:
        from . import grpo
    except Exception as error:
        raise RuntimeError(f"Triton cannot be imported ({type(error).__name__}: {error}). {MEND}") from error
    return grpo
