"""The rubric reward model: how good is a reasoning trace, whatever came out of it?

A causal LM backbone reads problem + trace; the hidden state of the last token goes into five heads of five labels
(the rubric dimensions of arXiv 2605.03862, labels 0..4) and one total head. The score that the reward uses is half
rubric (the weighted mean of the expected labels / 4), half total head (sigmoid), in [0, 1].

It is trained on TraceLift-Groups, each group with its good trace above its flawed ones:

    loss = 1.0 * sum_d CE_d + 0.5 * Huber(sigmoid(total), gold) + 0.7 * mean -logsigmoid(score_pos - score_neg)
           + nn_weight * the same over pairs of flawed traces whose gold totals differ by more than 0.15

    python rm.py --preset tiny --run runs/tiny-math        # groups/train.jsonl -> rm/, checked on groups/heldout.jsonl

Shapes: B traces (rows), T tokens, H hidden, D = 5 dimensions, L = 5 labels.
Folders and state-dict names are those of the public checkpoints. Their code keeps the label values in non-persistent
buffers, which transformers 5 leaves uninitialised on loading; here constants are made in forward.
"""

import itertools
import json
import math
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import data
import executor
from data import UserError, knob

NUM_LABELS = 5


class RubricRewardModel(nn.Module):
    """`model` (a backbone without LM head), `dimension_heads` (D of L labels), `total_head`, and its tokenizer."""

    def __init__(self, model, tokenizer, dimension_names, dimension_weights=None):
        super().__init__()
        hidden = model.config.hidden_size
        self.model, self.tokenizer = model, tokenizer
        self.dimension_names = list(dimension_names)
        D = len(self.dimension_names)
        self.dimension_weights = list(dimension_weights or [1.0 / D] * D)
        if len(self.dimension_weights) != D:
            raise UserError(f"rm_dimension_weights has {len(self.dimension_weights)} numbers for {D} dimension names")
        self.dimension_heads = nn.ModuleList(nn.Linear(hidden, NUM_LABELS) for _ in self.dimension_names)
        self.total_head = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask (B, T), padded on the right -> label logits (B, D, L), total logit (B,)."""
        if not bool((mask[:, 0] == 1).all()) or bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ValueError("mask: rows must be non-empty and padded on the right; last-token pooling depends on it")
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state    # (B, T, H)
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]                 # (B, H)
        last = last.to(self.total_head.weight.dtype)
        labels = torch.stack([head(last) for head in self.dimension_heads], dim=1)                    # (B, D, L)
        return labels.float(), self.total_head(last).squeeze(-1).float()

    def combine(self, label_logits: torch.Tensor, total_logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Label logits (B, D, L) and total logit (B,) -> score (B,) in [0, 1], expected labels (B, D) in [0, 4]."""
        values = torch.arange(NUM_LABELS, device=label_logits.device, dtype=torch.float32)
        weights = torch.tensor(self.dimension_weights, device=label_logits.device)
        expected = label_logits.softmax(dim=-1) @ values                                              # (B, D)
        rubric = (expected * weights).sum(dim=-1) / weights.sum() / (NUM_LABELS - 1)
        return 0.5 * rubric + 0.5 * torch.sigmoid(total_logit), expected

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> ids and mask (B, T), right padding. UserError for a text that exceeds the context."""
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        context = getattr(self.model.config, "max_position_embeddings", None)
        for text, row in zip(texts, rows):
            if not row or context and len(row) > context:
                raise UserError(f"the reward model cannot read a text of {len(row)} tokens (context {context}): "
                                f"{text[:80]!r}")
        device = self.total_head.weight.device
        ids = executor.pad(rows, executor.pad_id(self.tokenizer), device)
        length = torch.tensor([len(row) for row in rows], device=device)
        return ids, (torch.arange(ids.shape[1], device=device) < length[:, None]).long()

    @torch.no_grad()
    def score(self, texts: list[str], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B,) in [0, 1] and expected labels (B, D) in [0, 4], on the CPU. FloatingPointError when not finite:
        a broken reward model must not become a reward."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        score, dimensions = torch.zeros(len(texts)), torch.zeros(len(texts), len(self.dimension_names))
        for i in range(0, len(order), batch_size):
            part = order[i:i + batch_size]
            total, expected = self.combine(*self(*self.encode([texts[j] for j in part])))
            score[part], dimensions[part] = total.cpu(), expected.cpu()
        if not torch.isfinite(score).all():
            raise FloatingPointError("the reward model gave a score that is not finite")
        return score, dimensions

    def save_pretrained(self, folder, metrics: dict | None = None) -> None:
        """config.json, model.safetensors, the tokenizer and metrics.json, written beside and then renamed: an
        unfinished folder never has the name of a finished one."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        config = self.model.config.to_dict() | {
            "rm_dimension_names": self.dimension_names, "rm_dimension_weights": self.dimension_weights,
            "rm_num_labels": NUM_LABELS, "rm_use_total_head": True}
        (temporary / "config.json").write_text(json.dumps(config, indent=1, default=str))
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(temporary)
        if metrics is not None:
            (temporary / "metrics.json").write_text(json.dumps(metrics, indent=1))
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    @classmethod
    def from_pretrained(cls, folder, device=None) -> "RubricRewardModel":
        """Loads a folder written by `save_pretrained` or a public checkpoint. Strict: a missing or unexpected tensor
        is an error, nothing is re-initialised."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no reward model here (config.json is missing); run rm.py first")
        try:
            raw = json.loads((folder / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{folder}/config.json: not JSON ({error})") from None
        for key in ("rm_dimension_names", "rm_dimension_weights", "rm_num_labels", "rm_use_total_head"):
            if key not in raw:
                raise UserError(f"{folder}/config.json: key {key!r} is missing; this is not a rubric reward model")
        if raw["rm_num_labels"] != NUM_LABELS or not raw["rm_use_total_head"]:
            raise UserError(f"{folder}/config.json: needs rm_num_labels {NUM_LABELS} and rm_use_total_head true")
        try:
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32,
                                          attn_implementation="sdpa")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no backbone or tokenizer can be loaded ({error})") from None
        rm, state = cls(model, tokenizer, raw["rm_dimension_names"], raw["rm_dimension_weights"]), {}
        try:
            for shard in sorted(folder.glob("*.safetensors")):
                state.update(load_file(shard))
            rm.load_state_dict(state, strict=True)
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        return rm.to(executor.pick_device() if device is None else device).eval()


# ------------------------------------------------------------------------------------------------ training

def group_rows(group: dict, names: list[str]) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """One group -> texts (R), labels (R, D) int64 in the order of `names`, gold totals (R,), positive (R,) bool;
    positives come first."""
    problem = data.problem_of(group)
    if not group["positive_pool"] or not group["negative_bank"]:
        raise UserError(f"group {problem.problem_id}: the reward model needs a good and a flawed trace in every group; "
                        "remove this group from groups/*.jsonl, or, if none has traces (HumanEval, MBPP), train only "
                        "planners without it: --mode exec_only or uplift_only (run.sh: MODES, and no INT)")
    traces = [(t, True) for t in group["positive_pool"]] + [(t, False) for t in group["negative_bank"]]
    if set(names) != set(data.DIMENSIONS[problem.task_type]):
        raise UserError(f"group {problem.problem_id} is about {problem.task_type}, the reward model about "
                        f"{', '.join(names)}")
    return ([data.rm_text(problem, t["reasoning"]) for t, _ in traces],
            torch.tensor([[t["rubric"][d] for d in names] for t, _ in traces]),
            torch.tensor([float(t["rubric"]["total"]) for t, _ in traces]),
            torch.tensor([positive for _, positive in traces]))


def pairs(gold: torch.Tensor, positive: torch.Tensor, group: torch.Tensor, negatives: bool, gap: float = 0.15):
    """Row indices (better, worse) of all pairs inside a group: positive over negative, or, with `negatives`, the
    higher over the lower of two negatives whose gold totals differ by more than `gap`."""
    same = group[:, None] == group[None, :]
    if negatives:
        chosen = ~positive[:, None] & ~positive[None, :] & (gold[:, None] - gold[None, :] > gap)
    else:
        chosen = positive[:, None] & ~positive[None, :]
    return (same & chosen).nonzero(as_tuple=True)


def rm_loss(rm, label_logits, total_logit, labels, gold, positive, group, nn_weight: float = 0.0) -> torch.Tensor:
    """The loss of the header for a batch of whole groups. label_logits (B, D, L), total_logit (B,), labels (B, D),
    gold (B,), positive (B,) bool, group (B,) int."""
    score, _ = rm.combine(label_logits, total_logit)
    loss = sum(F.cross_entropy(label_logits[:, d], labels[:, d]) for d in range(labels.shape[1]))
    loss = loss + 0.5 * F.huber_loss(torch.sigmoid(total_logit), gold)
    for weight, negatives in ((0.7, False), (nn_weight, True)):
        better, worse = pairs(gold, positive, group, negatives)
        if weight and len(better):                                 # a mean over no pairs would be NaN
            loss = loss - weight * F.logsigmoid(score[better] - score[worse]).mean()
    return loss


@torch.no_grad()
def evaluate(rm, groups: list[dict]) -> dict:
    """Held-out quality: pair_accuracy (positive above negative), group_accuracy (positive above every negative; ties
    count as wrong), total_mae, total_rmse, accuracy_<dimension>. Also pair accuracy per kind of flaw."""
    right, group_right, error, hits, by_kind = [], [], [], [], {}
    rows = [group_rows(group, rm.dimension_names) for group in groups]
    scores, expected = rm.score([text for texts, *_ in rows for text in texts])
    at = 0
    for group, (texts, labels, gold, positive) in zip(groups, rows):
        score, dims = scores[at:at + len(texts)], expected[at:at + len(texts)]
        at += len(texts)
        beats = score[positive][:, None] > score[~positive][None, :]                                  # (P, N)
        right.append(beats.flatten())
        group_right.append(float(beats.all()))
        error.append(score - gold)
        hits.append((dims.round().long() == labels).float())
        for trace, won in zip(group["negative_bank"], beats.float().mean(dim=0).tolist()):
            by_kind.setdefault(trace["negative_kind"], []).append(won)
    right, error, hits = torch.cat(right).float(), torch.cat(error), torch.cat(hits).mean(dim=0)
    return {"groups": len(groups), "pair_accuracy": right.mean().item(),
            "group_accuracy": sum(group_right) / len(group_right),
            "total_mae": error.abs().mean().item(), "total_rmse": error.square().mean().sqrt().item(),
            **{f"accuracy_{d}": hit for d, hit in zip(rm.dimension_names, hits.tolist())},
            "pair_accuracy_by_kind": {kind: sum(won) / len(won) for kind, won in sorted(by_kind.items())}}


@dataclass(frozen=True)
class RMSettings:
    """Settings of `python rm.py`."""
    run: str = knob("runs/tiny-math", "run folder; holds groups/ and base.json")
    preset: str = knob("tiny", "named defaults")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    epochs: float = knob(2.0, "passes over the training groups", above=0)
    groups_per_batch: int = knob(8, "whole groups in a batch, so that every pair is inside it", low=1)
    learning_rate: float = knob(1e-3, "AdamW; the tiny backbone wants more than a pretrained one", above=0)
    warmup: int = knob(30, "steps of linear warm-up; then linear decay to 0", low=0)
    nn_weight: float = knob(0.0, "weight of pairs of two flawed traces; off in the paper's code too", low=0)
    max_groups: int = knob(0, "use only this many training groups; 0: all", low=0)
    max_heldout: int = knob(300, "check on this many held-out groups", low=1)
    seed: int = knob(0, "heads, order of batches")


PRESETS = {"tiny": {}, "smoke": {"epochs": 1.0, "max_heldout": 20},
           **dict.fromkeys(("gsm8k", "code"), {"epochs": 1.0, "groups_per_batch": 2, "learning_rate": 2e-5,
                                               "max_heldout": 100})}


def train(settings: RMSettings) -> dict:
    """Trains the reward model of a run and saves it with metrics.json. Returns the held-out metrics."""
    torch.manual_seed(settings.seed)
    groups = data.read_groups(Path(settings.run) / "groups" / "train.jsonl")
    groups = groups[:settings.max_groups or None]
    heldout = data.read_groups(Path(settings.run) / "groups" / "heldout.jsonl")[:settings.max_heldout]
    tasks = {group["task_type"] for group in groups + heldout}
    if len(tasks) > 1:
        raise UserError(f"{settings.run}/groups: holds both math and code, whose rubrics differ; use one run for each")
    names = data.DIMENSIONS[tasks.pop()]
    rows = [group_rows(group, names) for group in groups + heldout][:len(groups)]       # all are checked before hours
    device = executor.pick_device(settings.device)
    base, tokenizer = executor.load(executor.base_of(settings.run), device, torch.float32)
    rm = RubricRewardModel(base.base_model, tokenizer, names).to(device)
    optimizer = torch.optim.AdamW(rm.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    total = max(1, math.ceil(len(rows) * settings.epochs / settings.groups_per_batch))
    rng, order, losses = random.Random(settings.seed), [], []
    bar = tqdm(range(total), desc="reward model", mininterval=5)
    rm.train()
    for step in bar:
        while len(order) < settings.groups_per_batch:
            order += rng.sample(range(len(rows)), len(rows))
        batch, order = [rows[i] for i in order[:settings.groups_per_batch]], order[settings.groups_per_batch:]
        labels, gold, positive = (torch.cat([r[k] for r in batch]).to(device) for k in (1, 2, 3))
        group = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(r[0]) for r in batch])).to(device)
        for g in optimizer.param_groups:
            g["lr"] = settings.learning_rate * executor.schedule(step, total, settings.warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = rm(*rm.encode(list(itertools.chain(*(r[0] for r in batch)))))
        loss = rm_loss(rm, *outputs, labels, gold, positive, group, settings.nn_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    metrics = {"steps": total, "train_loss": sum(losses[-20:]) / len(losses[-20:]), **evaluate(rm.eval(), heldout)}
    data.record_stage(settings.run, "rm", settings)
    rm.save_pretrained(Path(settings.run) / "rm", metrics)
    return metrics


def main(argv) -> None:
    """The command: trains the reward model of a run."""
    settings = data.parse_settings(RMSettings, PRESETS, argv, "rm.py")
    out = Path(settings.run) / "rm"
    if data.begin_stage(settings.run, "rm", settings, out):
        train(settings)
    metrics = json.loads((out / "metrics.json").read_text())
    print(f"{out}: pair accuracy {metrics['pair_accuracy']:.3f}, group accuracy {metrics['group_accuracy']:.3f}, "
          f"MAE {metrics['total_mae']:.3f} on {metrics['groups']} held-out groups")
    print(f"next: python tracelift.py train --preset {settings.preset} --run {settings.run} --mode tracelift")


if __name__ == "__main__":
    data.run_command(main)
