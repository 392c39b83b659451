"""The GRPO loss of hidden @ head.T, without ever holding all the logits: (M,V) logits are the widest tensor of a step.

Rows are taken in chunks. The logits of a chunk are written into one buffer, the loss reads them, its gradient
overwrites them (on CUDA), and two matrix products bring it to hidden and head while it is still there:

    z  = h @ W.T        (loss, dz) = loss(z)        dh = dz @ W        dW += dz.T @ h, in float32

The loss is that of grpo.py or reference.py, and the mathematics stand there: with rho = exp(logp - old), a row of
weight w has w (-min(rho A, clip(rho) A) + beta rho (exp(ref - logp) - (ref - logp) - 1)).

No logits are computed twice; in exchange dh (M,H) and dW (V,H) live from forward to backward, which only scales them.
The peak is those and one buffer of chunk * V logits (on a CPU a handful of float32 temporaries of that shape). To
compute the logits again in the backward, as cut cross-entropy does, is a fourth product and pays only for narrow H.
"""
import torch


def chunked_loss(loss_of_logits, hidden, weight_lm_head, target, reward, seq, weight, group_size, old_logp=None,
                 ref_logp=None, *, chunk=3072, **settings):
    """loss_of_logits of hidden @ weight_lm_head.T -> loss (), logp (M,), entropy (M,), advantage (M,).

    loss_of_logits  grpo_loss_triton or grpo_loss_reference; the other arguments and all settings are theirs.
    hidden          (M,H) float.
    weight_lm_head  (V,H) float of the same dtype. Gradients go to either or both, whichever requires them.
    chunk           rows whose logits exist at the same time.

    Padded rows cost nothing. The logits have the dtype of hidden, as those of a model's own head would. Differentiable
    once, not twice.
    """
    if not torch.is_grad_enabled():  # a Function cannot see no_grad() from inside; do not take gradients nobody wants
        hidden = hidden.detach()
        weight_lm_head = weight_lm_head.detach()
    live = weight.nonzero()[:, 0]
    per_row = (target, seq, weight, old_logp, ref_logp)

    def loss_of_rows(logits, rows):
        target, seq, weight, old_logp, ref_logp = (None if x is None else x[rows] for x in per_row)
        return loss_of_logits(logits, target, reward, seq, weight, group_size, old_logp, ref_logp, inplace=True,
                              **settings)

    return _Chunks.apply(hidden, weight_lm_head, live.split(chunk), loss_of_rows)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, chunks, loss_of_rows):
        want_hidden, want_head, *_ = ctx.needs_input_grad
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        dhidden = torch.zeros_like(hidden) if want_hidden else None
        dhead = torch.zeros_like(head, dtype=dtype) if want_head else None
        buffer = hidden.new_empty(len(chunks[0]), len(head))
        loss = hidden.new_zeros((), dtype=dtype)
        outputs = [hidden.new_zeros(len(hidden), dtype=dtype) for _ in ("logp", "entropy", "advantage")]
        for rows in chunks:
            h = hidden[rows]
            logits = torch.mm(h, head.T, out=buffer[:len(rows)]).detach()
            logits.requires_grad_(want_hidden or want_head)
            with torch.enable_grad():
                part, *values = loss_of_rows(logits, rows)
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
        if dhidden is not None:
            dhidden = (dhidden * grad).to(dhidden.dtype)
        if dhead is not None:                                          # rounded while scaled: no second float32 (V,H)
            dhead = torch.mul(dhead, grad, out=torch.empty_like(dhead, dtype=ctx.head_dtype))
        return dhidden, dhead, None, None


def _add_product(total, a, b):
    """total += a @ b in the dtype of total, float32 for 16-bit factors: a 16-bit sum of many chunks would lose bits."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)     # torch >= 2.11, CUDA only
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
