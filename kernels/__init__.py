"""The loss of TraceLift, GRPO with one weight per token: functions that need no other file of this project.

    weight = token_weights(mask)                                  # (B,T), once for the whole optimizer step
    loss, logp, entropy, advantage = grpo_loss(logits, target, reward, seq, weight.flatten(), group_size)
    loss.backward()

reference.py   the maths in plain PyTorch, any device: the CPU path, and the oracle of the tests
grpo.py        grpo_loss and token_logp as fused Triton kernels, for CUDA
linear.py      the loss from hidden states and head, in chunks, so that the logits never exist whole
bench.py, sass.py      how fast (needs a GPU), and how many instructions (does not)

The functions here take the Triton kernels for tensors on CUDA and the reference for all others; backend() says which.
"""
import functools

from .linear import linear_grpo_loss
from .reference import group_advantage, grpo_loss_reference, token_weights
from .reference import token_logp as _token_logp_reference

__all__ = ["grpo_loss", "grpo_loss_reference", "linear_grpo_loss", "token_logp", "token_weights", "group_advantage",
           "backend"]


def grpo_loss(logits, *rows, **settings):
    """GRPO loss of M tokens -> loss (), logp (M,), entropy (M,), advantage (M,); arguments of grpo_loss_reference."""
    return (_triton().grpo_loss if _fused(logits) else grpo_loss_reference)(logits, *rows, **settings)


def token_logp(logits, target, temperature=1.0):
    """Log-probability of each target (M,) under logits (M,V) -> logp (M,), entropy (M,), in nats."""
    return (_triton().token_logp if _fused(logits) else _token_logp_reference)(logits, target, temperature)


def backend(device) -> str:
    """What runs on a device: "triton", or "reference" (CPU, or CUDA where triton is not installed)."""
    return "triton" if getattr(device, "type", device).startswith("cuda") and _triton() else "reference"


def _fused(logits):
    return getattr(logits, "is_cuda", False) and _triton() is not None


@functools.cache
def _triton():
    try:
        from . import grpo  # needs triton, which exists for Linux only; nothing else here does
    except ImportError:
        return None
    return grpo
