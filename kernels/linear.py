"""The GRPO loss of hidden @ head.T, without ever holding all the logits: (M,V) logits are the widest tensor of a step.

Rows are taken in chunks. The logits of a chunk are written into one buffer, grpo_loss reads them, its gradient
overwrites them (on CUDA), and two matrix products bring it to hidden and head while it is still there:

    z  = h @ W.T        (loss, dz) = grpo_loss(z)        dh = dz @ W        dW += dz.T @ h, in float32

No logits are computed twice; in exchange dh (M,H) and dW (V,H) live from forward to backward, which only scales them.
The peak is those and one buffer of chunk * V logits (on a CPU a handful of float32 temporaries of that shape). To
compute the logits again in the backward, as cut cross-entropy does, is a fourth product and pays only for narrow H.
"""
import torch

from .reference import FLOATS, _check_rows, _check_tensor, _require, _work_dtype


def linear_grpo_loss(hidden, weight_lm_head, target, reward, seq, weight, group_size, old_logp=None, ref_logp=None, *,
                     chunk=3072, **settings):
    """grpo_loss of hidden @ weight_lm_head.T. Same outputs, settings (all but inplace) and errors.

    hidden          (M,H) float.
    weight_lm_head  (V,H) float of the same dtype. Gradients go to either or both, whichever requires them.
    chunk           rows whose logits exist at the same time.

    Padded rows cost nothing. The logits have the dtype of hidden, as those of a model's own head would. Differentiable
    once, not twice.
    """
    _check_tensor("hidden", hidden, ("M", "H"), FLOATS)
    _check_tensor("weight_lm_head", weight_lm_head, ("V", hidden.shape[1]), (hidden.dtype,), hidden.device)
    _require(isinstance(chunk, int) and chunk > 0, "chunk", repr(chunk), "a positive int")
    _require("inplace" not in settings, "inplace", settings.get("inplace"), "left out: the logits are never yours")
    _check_rows(hidden, target, reward, seq, weight, old_logp, ref_logp)
    if not torch.is_grad_enabled():  # a Function cannot see no_grad() from inside; do not take gradients nobody wants
        hidden, weight_lm_head = hidden.detach(), weight_lm_head.detach()
    live = weight.detach().nonzero()[:, 0]
    chunks = live.split(chunk) if len(live) else [live]                # no live row: still check the settings
    return _Chunks.apply(hidden, weight_lm_head, chunks, (target, seq, weight, old_logp, ref_logp), reward, group_size,
                         settings)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, chunks, per_row, reward, group_size, settings):
        from . import grpo_loss
        work = _work_dtype(hidden)
        want_hidden, want_head, *_ = ctx.needs_input_grad
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        dhead = torch.zeros_like(head, dtype=work) if want_head else None
        buffer = hidden.new_empty(max(map(len, chunks)), len(head))
        loss = hidden.new_zeros((), dtype=work)
        outputs = [hidden.new_zeros(len(hidden), dtype=work) for _ in ("logp", "entropy", "advantage")]
        for rows in chunks:
            h = hidden[rows]
            logits = torch.mm(h, head.T, out=buffer[:len(rows)]).detach().requires_grad_(want_hidden or want_head)
            target, seq, weight, old_logp, ref_logp = (x if x is None else x[rows] for x in per_row)
            with torch.enable_grad():
                part, *values = grpo_loss(logits, target, reward, seq, weight, group_size, old_logp, ref_logp,
                                          inplace=True, **settings)
            loss += part.detach()
            for whole, value in zip(outputs, values):
                whole[rows] = value
            if logits.requires_grad:
                dlogits, = torch.autograd.grad(part, logits)           # on CUDA it lies where the logits lay
                if want_head:
                    _add_product(dhead, dlogits.T, h)
                if want_hidden:
                    dhidden[rows] = torch.mm(dlogits, head, out=h)     # h is a copy; out= is also safe under autocast
        ctx.head_dtype = head.dtype
        ctx.save_for_backward(dhidden, dhead)
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        dhidden, dhead = ctx.saved_tensors
        if dhead is not None:                                          # rounded while scaled: no second float32 (V,H)
            dhead = torch.mul(dhead, grad, out=torch.empty_like(dhead, dtype=ctx.head_dtype))
        return None if dhidden is None else (dhidden * grad).to(dhidden.dtype), dhead, *[None] * 5


def _add_product(total, a, b):
    """total += a @ b in the dtype of total, float32 for 16-bit factors: a 16-bit sum of many chunks would lose bits."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)     # torch >= 2.11, CUDA only
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
