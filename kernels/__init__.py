"""The loss of TraceLift, GRPO with one weight per token: six functions that need no other file of this project.

    weight = token_weights(mask)                                  # (B,T), once for the whole optimizer step
    loss, logp, entropy, advantage = grpo_loss(logits, target, reward, seq, weight.flatten(), group_size)
    loss.backward()

Everything here runs in plain PyTorch (reference.py, which also holds the maths), on any device.
"""
from .reference import group_advantage, grpo_loss_reference, linear_grpo_loss, token_logp, token_weights

BACKEND = "reference"  # the implementation behind grpo_loss, linear_grpo_loss and token_logp
grpo_loss = grpo_loss_reference

__all__ = ["grpo_loss", "grpo_loss_reference", "linear_grpo_loss", "token_logp", "token_weights", "group_advantage"]
