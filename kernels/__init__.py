"""The loss of TraceLift, GRPO with one weight per token: functions that need no other file of this project.

    weight = token_weights(mask)                                  # (B,T), once for the whole optimizer step
    loss, logp, entropy, advantage = grpo_loss(logits, target, reward, seq, weight.flatten(), group_size)
    loss.backward()

reference.py   the maths in plain PyTorch, any device: the CPU path, and the oracle of the tests
grpo.py        the same as fused Triton kernels, for CUDA
linear.py      either from hidden states and head, in chunks, so that the logits never exist whole
README.md      the contract: shapes, errors, memory, numbers

The functions here check their arguments, then take the Triton kernels on CUDA and the reference elsewhere. A wrong
shape, dtype, device or setting is a ValueError that names the argument, what it was and what it must be.
"""
import os

import torch

from . import linear, reference

__all__ = ["grpo_loss", "grpo_loss_reference", "linear_grpo_loss", "token_logp", "token_weights", "group_advantage",
           "backend", "check"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# -------------------------------------------------------------------------------------------- 1. public functions


def grpo_loss(logits, *rows, **settings):
    """GRPO loss of M tokens -> loss (), logp (M,), entropy (M,), advantage (M,); arguments of grpo_loss_reference.

    inplace=True lets the kernels write the gradient over logits (M,V).
    """
    _check_logits(logits)
    loss = _loss_of(logits.device)
    _check_loss(loss, logits, *rows, **settings)
    return loss(logits, *rows, **settings)


def grpo_loss_reference(logits, *rows, **settings):
    """The same in plain PyTorch on any device. Arguments: reference.grpo_loss_reference."""
    _check_logits(logits)
    _check_loss(reference.grpo_loss_reference, logits, *rows, **settings)
    return reference.grpo_loss_reference(logits, *rows, **settings)


def linear_grpo_loss(hidden, weight_lm_head, *rows, chunk=3072, **settings):
    """grpo_loss of logits = hidden (M,H) @ weight_lm_head (V,H).T, of which at most chunk rows exist at a time.

    Same outputs and settings, all but inplace: the logits are never yours. Gradients go to hidden and head, whichever
    require them.
    """
    _check_tensor("hidden", hidden, ("M", "H"), FLOATS)
    _check_tensor("weight_lm_head", weight_lm_head, ("V", hidden.shape[1]), (hidden.dtype,), hidden.device)
    _require(isinstance(chunk, int) and chunk > 0, "chunk", repr(chunk), "a positive int")
    _require("inplace" not in settings, "inplace", settings.get("inplace"), "left out: the logits are never yours")
    loss = _loss_of(hidden.device)
    _check_loss(loss, hidden, *rows, **settings)
    return linear.chunked_loss(loss, hidden, weight_lm_head, *rows, chunk=chunk, **settings)


def token_logp(logits, target, temperature=1.0):
    """Log-probability of each target (M,) under logits (M,V) -> logp (M,), entropy (M,), in nats.

    logp carries gradient to logits. A target outside [0,V) gives NaN.
    """
    _check_logits(logits)
    _check_tensor("target", target, (len(logits),), (torch.int64,), logits.device)
    _check_settings({"temperature": temperature})
    if backend(logits.device) == "triton":
        return _triton().token_logp_triton(logits, target, temperature)
    return reference.token_logp_reference(logits, target, temperature)


def group_advantage(reward, group_size, adv_eps=1e-6, ddof=0, scale=True):
    """Advantage (B,) of each reward (B,) among the group_size rewards of its problem. See reference.group_advantage."""
    _check_groups(reward, group_size)
    _check_settings({"adv_eps": adv_eps, "ddof": ddof})
    return reference.group_advantage(reward, group_size, adv_eps, ddof, scale)


def token_weights(mask, mode="dapo", max_len=None, num_tokens=None, num_sequences=None):
    """One weight per token, (B,T) like mask, that carries mask and average. See reference.token_weights."""
    _check_tensor("mask", mask, ("B", "T"))
    if mode == "dapo" and num_tokens is not None:
        _require(num_tokens > 0 or not mask.any(), "num_tokens", num_tokens, "positive, the tokens of the whole step")
    if mode == "dr_grpo":
        _require(max_len is not None and max_len > 0, "max_len", max_len,
                 "positive, the generation limit, in mode dr_grpo")
    _require(num_sequences is None or num_sequences >= len(mask), "num_sequences", num_sequences,
             f"the sequences of the whole step, of which mask has {len(mask)}")
    return reference.token_weights(mask, mode, max_len, num_tokens, num_sequences)


# ---------------------------------------------------------------------------------------------- 2. what runs where

WAY_OUT = "mend it, or set TRACELIFT_KERNELS=reference for plain PyTorch, which is slower and needs more memory"


def backend(device) -> str:
    """What runs on a device: "triton" on CUDA, "reference" elsewhere and where TRACELIFT_KERNELS=reference asks for it.

    RuntimeError, one line with the reason, on CUDA where Triton cannot be imported: there is no silent fallback.
    """
    asked = os.environ.get("TRACELIFT_KERNELS", "")
    _require(asked in ("", "reference"), "TRACELIFT_KERNELS", repr(asked), "'reference' or not set")
    if torch.device(device).type != "cuda" or asked == "reference":
        return "reference"
    _triton()
    return "triton"


def check(device) -> None:
    """Compiles the kernels and runs them on one row, where backend(device) is "triton". Call it before long work.

    RuntimeError, one line with the reason and the way out: Triton missing, no C compiler, no Python.h, wrong driver.
    """
    if backend(device) == "reference":
        return
    grpo = _triton()
    try:
        logits = torch.zeros(1, 16, device=device, requires_grad=True)
        target = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.enable_grad():
            logp, _ = grpo.token_logp_triton(logits, target)
            logp.sum().backward()
        got = [logp.item(), logits.grad[0, 0].item()]
    except Exception as error:  # a missing compiler is a RuntimeError, a missing header a CalledProcessError, ...
        raise RuntimeError(f"Triton cannot run on {device}: {_reason(error)}. It needs a C compiler and the headers of "
                           f"Python (Python.h): {WAY_OUT}") from error
    want = [-2.7725887, 0.9375]  # -log 16 and 1 - 1/16
    if not torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-5):
        raise RuntimeError(f"Triton computes on {device} {got} instead of {want}: {WAY_OUT}")


def _loss_of(device):
    if backend(device) == "triton":
        return _triton().grpo_loss_triton
    return reference.grpo_loss_reference


def _triton():
    """The module grpo, which needs triton; nothing else here does."""
    try:
        from . import grpo
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise RuntimeError(f"Triton is broken: {_reason(error)}: {WAY_OUT}") from error
        raise RuntimeError(f"Triton is not installed (pip install triton): {WAY_OUT}") from error
    except Exception as error:  # an OSError or AttributeError of a library that does not fit the others
        raise RuntimeError(f"Triton is broken: {_reason(error)}: {WAY_OUT}") from error
    return grpo


def _reason(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---------------------------------------------------------------------------------------- 3. checks of arguments


def _require(ok, name, was, must):
    if not ok:
        raise ValueError(f"{name}: got {was}, must be {must}")


def _check_tensor(name, x, shape, dtypes=None, device=None):
    """shape holds a number where the size is fixed and a letter where it is free."""
    _require(torch.is_tensor(x), name, type(x).__name__, "a tensor")
    fits = x.dim() == len(shape)
    for want, size in zip(shape, x.shape):
        fits = fits and (isinstance(want, str) or want == size)
    _require(fits, name, f"shape {tuple(x.shape)}", f"of shape ({', '.join(map(str, shape))})")
    if dtypes is not None:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        _require(x.dtype in dtypes, name, x.dtype, f"of dtype {names}")
    _require(device is None or x.device == device, name, f"on {x.device}", f"on {device} as the others are")


def _check_logits(logits):
    _check_tensor("logits", logits, ("M", "V"), FLOATS)
    V, stride = logits.shape[1], logits.stride(1)
    _require(V > 0, "logits", f"shape {tuple(logits.shape)}", "of at least one column")
    _require(stride == 1 or V == 1, "logits", f"last stride {stride}", "of last stride 1")


def _check_groups(reward, group_size, device=None):
    _check_tensor("reward", reward, ("B",), FLOATS, device)
    _require(isinstance(group_size, int) and group_size > 0, "group_size", repr(group_size), "a positive int")
    _require(len(reward) % group_size == 0, "reward", f"{len(reward)} rewards",
             f"a multiple of group_size = {group_size}")


def _check_loss(loss, first, target, reward, seq, weight, group_size, old_logp=None, ref_logp=None, **settings):
    """loss: the function that will run. first: logits (M,V) or hidden states (M,H), whose M rows the others share."""
    M, device = len(first), first.device
    _check_tensor("target", target, (M,), (torch.int64,), device)
    _check_tensor("seq", seq, (M,), (torch.int32, torch.int64), device)
    _check_tensor("weight", weight, (M,), FLOATS, device)
    _check_groups(reward, group_size, device)
    if old_logp is not None:
        _check_tensor("old_logp", old_logp, (M,), FLOATS, device)
    if ref_logp is not None:
        _check_tensor("ref_logp", ref_logp, (M,), FLOATS, device)
    _check_settings(settings)
    beta = settings.get("beta", 0)
    _require(beta == 0 or ref_logp is not None, "ref_logp", None, f"given, because beta is {beta}")
    if settings.get("inplace"):
        row, size = first.stride(0), first.shape[1]
        _require(row >= size, "logits", f"row stride {row}", f"of row stride at least {size} if inplace")
    if loss is reference.grpo_loss_reference:  # the kernels give NaN instead: to know it here would wait for the GPU
        live = seq[weight != 0]
        outside = live[(live < 0) | (live >= len(reward))]
        _require(len(outside) == 0, "seq", outside[:1].tolist(), f"in [0, {len(reward)}) in live rows")


def _check_settings(settings):
    """Only what is given needs it: the defaults are right."""
    temperature, beta, ddof = settings.get("temperature", 1), settings.get("beta", 0), settings.get("ddof", 0)
    _require(0 < temperature < float("inf"), "temperature", temperature, "positive and finite")
    _require(0 <= beta < float("inf"), "beta", beta, "at least 0 and finite")
    _require(isinstance(ddof, int) and ddof >= 0, "ddof", repr(ddof), "an int of at least 0")
    for name in ("clip_low", "clip_high", "adv_eps"):
        value = settings.get(name, 0)
        _require(value >= 0, name, value, "at least 0")
