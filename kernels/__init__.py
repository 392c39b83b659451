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


def advantage_logp(logits, target, reward, seq, group_size, temperature=1.0, scale=True):
    """Log-prob, entropy (in nats) and advantage of M sampled tokens -> logp, entropy, A, (M,) each.

    logits (M, V), last stride 1; target (M,) int64; reward (B,), each run of group_size a group; seq (M,) int64: the
    trace of each row. Only logp carries gradient. A target outside [0, V) gives NaN.

    On CUDA the backward overwrites the logits with their gradient; autograd raises if something else still needs them.
    """
    if backend(logits.device) == "triton":
        from . import grpo  # needs triton, which a machine without CUDA need not have
        return grpo.advantage_logp(logits, target, reward, seq, group_size, temperature, scale, inplace=True)
    return reference.advantage_logp(logits, target, reward, seq, group_size, temperature, scale)


def token_logp(logits, target, temperature=1.0):
    """The same without rewards -> logp, entropy (M,)."""
    return advantage_logp(logits, target, logits.new_zeros(1), torch.zeros_like(target), 1, temperature)[:2]


def backend(device) -> str:
    """What runs on a device: "triton" on CUDA, unless TRACELIFT_KERNELS=reference; "reference" elsewhere."""
    asked = os.environ.get("TRACELIFT_KERNELS") or "triton"
    if asked not in ("triton", "reference"):
        raise ValueError(f"TRACELIFT_KERNELS={asked}: must be 'reference', or not set")
    return asked if torch.device(device).type == "cuda" else "reference"


def check(device):
    """Compares the kernels with the reference on tiny input, if backend(device) is "triton". Call it before long work.

    RuntimeError of one line where Triton is missing or cannot compile, or where the numbers differ.
    """
    if backend(device) == "reference":
        return
    row = torch.arange(2, device=device)
    logits = torch.linspace(-9, 9, 10000, device=device, requires_grad=True)
    results = []
    try:
        for function in (reference.advantage_logp, advantage_logp):
            # on this thread: a process whose Triton failed on a thread of autograd's can abort at exit
            with torch.autograd.set_multithreading_enabled(False):
                found = function(logits.view(2, 5000), row, row, row, 2)
                results.append(found + torch.autograd.grad(found[0].sum(), logits))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"the Triton kernels fail on {device}: {reason}. They need triton, a C compiler and "
                           "Python.h. TRACELIFT_KERNELS=reference does without: slower, more memory") from error
