"""The rubric reward model: how good is a reasoning trace, whatever came out of it?

A causal LM backbone reads problem + trace. The hidden state of the last token goes into five heads of five labels
(the rubric dimensions of arXiv 2605.03862, labels 0..4) and one total head. The score in [0, 1] that the reward uses is
half rubric (weighted mean of the expected labels / 4), half total head (sigmoid).

It is trained on TraceLift-Groups, with the good trace of a group above its flawed ones:

    loss = 1.0 * sum_d CE_d + 0.5 * Huber(sigmoid(total), gold) + 0.7 * rank(good over flawed)
           + nn_weight * rank(better over worse flawed, gold totals at least 0.15 apart)
    rank = mean over groups of the mean over a group's pairs of -logsigmoid(score_better - score_worse)

    python rm.py --run_dir runs/tiny-math        # groups/train.jsonl -> rm/, checked on groups/heldout.jsonl

With --lora_rank the backbone is frozen, in bfloat16 where executor.py computes in it, and an adapter and the heads
learn in float32. At the end the adapter is merged into the backbone's weights. bfloat16 may round away a change below
1/512 of a weight, so the merged model is what is measured.

Shapes: B traces (rows), T tokens, H hidden, D = 5 dimensions, L = 5 labels.
Folders and state-dict names are those of the public checkpoints. Their code keeps label values in non-persistent
buffers, which transformers 5 leaves uninitialised on loading. Here constants are made where they are used.
"""

import json
import math
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import executor
from data import Options, UserError, option

# ------------------------------------------------------------------------------------------------ 1. the model

class RubricRewardModel(nn.Module):
    """`model` (a backbone without LM head), `dimension_heads` (D of L labels), `total_head`, and its tokenizer."""
    num_labels = 5                                        # L

    def __init__(self, model, tokenizer, dimension_names, dimension_weights=None):
        super().__init__()
        hidden = model.config.get_text_config().hidden_size
        self.model, self.tokenizer = model, tokenizer
        self.context = min(executor.context_of(model), 10**6)
        self.dimension_names = list(dimension_names)
        D = len(self.dimension_names)
        self.dimension_weights = list(dimension_weights or [1.0 / D] * D)
        self.dimension_heads = nn.ModuleList(nn.Linear(hidden, self.num_labels) for _ in self.dimension_names)
        self.total_head = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask (B, T), padded on the right -> label logits (B, D, L), total logit (B,)."""
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state    # (B, T, H)
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]                 # (B, H)
        last = last.to(self.total_head.weight.dtype)
        labels = torch.stack([head(last) for head in self.dimension_heads], dim=1)                    # (B, D, L)
        return labels.float(), self.total_head(last).squeeze(-1).float()

    def scores(self, label_logits: torch.Tensor, total_logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Label logits (B, D, L) and total logit (B,) -> score (B,) in [0, 1], expected labels (B, D) in [0, 4]."""
        values = torch.arange(self.num_labels, device=label_logits.device, dtype=torch.float32)
        weights = torch.tensor(self.dimension_weights, device=label_logits.device)
        expected = label_logits.softmax(dim=-1) @ values                                              # (B, D)
        rubric = (expected * weights).sum(dim=-1) / weights.sum() / (self.num_labels - 1)
        return 0.5 * rubric + 0.5 * torch.sigmoid(total_logit), expected

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> ids and mask (B, T), right padding. A text beyond the context is cut, as in the public code. Training
        refuses problems that cannot fit; a trace may still be longer in this tokenizer than in the planner's."""
        rows = [torch.tensor(data.encode_text(self.tokenizer, text)[:self.context]) for text in texts]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return ids.to(self.model.device), mask.to(self.model.device)

    @torch.no_grad()
    def score(self, texts: list[str], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B,) in [0, 1] and expected labels (B, D) in [0, 4], on the CPU. FloatingPointError when not finite:
        a broken reward model must not become a reward."""
        # Each distinct text once: rows of a batch differ by rounding, and equal traces must get equal rewards.
        order = sorted(set(texts), key=lambda text: (len(text), text))
        parts = []
        for i in range(0, len(order), batch_size):
            with executor.autocast(self.model):
                outputs = self(*self.encode(order[i:i + batch_size]))
            parts.append(self.scores(*outputs))
        score, expected = (torch.cat(columns).cpu() for columns in zip(*parts))
        if not torch.isfinite(score).all():
            raise FloatingPointError("the reward model gave a score that is not finite")
        place = {text: i for i, text in enumerate(order)}
        rows = [place[text] for text in texts]
        return score[rows], expected[rows]

    def save_pretrained(self, folder) -> None:
        """config.json, model.safetensors and the tokenizer, under the names of the public checkpoints."""
        config = self.model.config.to_dict() | {
            "rm_dimension_names": self.dimension_names, "rm_dimension_weights": self.dimension_weights,
            "rm_num_labels": self.num_labels, "rm_use_total_head": True}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=1, default=str))
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder, device="cpu") -> "RubricRewardModel":
        """Loads a folder written by `save_pretrained`, or a public checkpoint. UserError for a missing or unexpected
        tensor: nothing is re-initialised. Heads are float32, and so is the backbone unless it was saved in bfloat16."""
        parts, state = read_checkpoint(folder)
        rm = cls(*parts)
        try:
            rm.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(f"{folder}: not a rubric reward model of this form: {error}") from None
        return rm.to(device).eval()


def read_checkpoint(folder):
    """(what RubricRewardModel is made of, state dict) of a folder. UserError for one without a rubric reward model of
    five labels and a total head."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    path = Path(folder) / "config.json"
    if not path.is_file():
        inside = [str(config.parent) for config in Path(folder).glob("*/config.json")]
        mend = f"move one of {', '.join(inside)} there" if inside else "run rm.py first, or put a public one there"
        raise UserError(f"{path}: no reward model here; {mend}")
    with executor.saying(f"{folder}: no rubric reward model can be loaded"):
        config = json.loads(path.read_text())
        if config["rm_num_labels"] != RubricRewardModel.num_labels or not config["rm_use_total_head"]:
            raise ValueError(f"needs rm_num_labels {RubricRewardModel.num_labels} and rm_use_total_head true")
        state = {}
        for shard in sorted(Path(folder).glob("*.safetensors")):
            state |= load_file(shard)
        kinds = {tensor.dtype for name, tensor in state.items() if name.startswith("model.")}
        dtype = torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        tokenizer = data.true_tokenizer(AutoTokenizer.from_pretrained(folder), folder)
        return (model, tokenizer, config["rm_dimension_names"], config["rm_dimension_weights"]), state


# ------------------------------------------------------------------------------------------------ 2. training


def batch_of(groups: list[dict], names: list[str], most: int, rng: random.Random | None):
    """The traces of some groups, with at most `most` flawed ones of each, drawn anew -> texts (B), labels (B, D) int64
    in the order of names, gold (B,) total of the rubric, positive (B,) bool, group (B,) int64."""
    texts, rows = [], []
    for g, group in enumerate(groups):
        good, flawed = group["positive_pool"], group["negative_bank"]
        if len(flawed) > most:
            flawed = [flawed[i] for i in sorted(rng.sample(range(len(flawed)), most))]
        for trace in good + flawed:
            texts.append(data.rm_text(data.problem_of(group), trace["reasoning"]))
            rubric = trace["rubric"]
            rows.append([*(rubric[name] for name in names), rubric["total"], trace in good, g])
    rows = torch.tensor(rows, dtype=torch.float32)
    D = len(names)
    return texts, rows[:, :D].long(), rows[:, D], rows[:, D + 1].bool(), rows[:, D + 2].long()


def rank_loss(score: torch.Tensor, above: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """-logsigmoid(score_better - score_worse), the mean over a group's pairs, then over groups that have any.
    score (B,); above (B, B) bool: row i should score above row j; group (B,) int."""
    better, worse = (above & (group[:, None] == group[None, :])).nonzero(as_tuple=True)
    loss = -F.logsigmoid(score[better] - score[worse])                                                # (pairs,)
    pairs = torch.bincount(group[better], minlength=1)                                                # of each group
    return (loss / pairs[group[better]]).sum() / (pairs > 0).sum().clamp(min=1)


def rm_loss(rm, label_logits, total_logit, labels, gold, positive, group, nn_weight: float = 0.0) -> torch.Tensor:
    """The loss of the header for a batch of whole groups. label_logits (B, D, L), total_logit (B,), labels (B, D),
    gold (B,), positive (B,) bool, group (B,) int."""
    score, _ = rm.scores(label_logits, total_logit)
    loss = sum(F.cross_entropy(label_logits[:, d], labels[:, d]) for d in range(labels.shape[1]))
    loss = loss + 0.5 * F.huber_loss(torch.sigmoid(total_logit), gold)
    good, flawed = positive, ~positive
    loss = loss + 0.7 * rank_loss(score, good[:, None] & flawed[None, :], group)
    if nn_weight:
        apart = gold[:, None] - gold[None, :] >= 0.15 - 1e-6              # 0.40 - 0.25 is a little less in float32
        loss = loss + nn_weight * rank_loss(score, flawed[:, None] & flawed[None, :] & apart, group)
    return loss


@torch.no_grad()
def measure_ranking(rm, groups: list[dict]) -> dict:
    """Held-out quality: pair_accuracy (positive above negative; ties count as wrong), pair_accuracy_KIND for each kind
    of flaw, group_accuracy (positive above every negative), total_mae, accuracy_DIMENSION of the rounded labels."""
    pairs, whole, error, hits, kinds = [], [], [], [], {}
    for group in groups:
        texts, labels, gold, positive, _ = batch_of([group], rm.dimension_names, 10**6, None)
        score, expected = rm.score(texts)
        beats = score[positive][:, None] > score[~positive][None, :]                                  # (P, negatives)
        pairs += beats.flatten().tolist()
        whole.append(beats.all().item())
        error += (score - gold).abs().tolist()
        hits.append(expected.round() == labels)
        for flawed, won in zip(group["negative_bank"], beats.T.tolist()):
            kinds.setdefault(f"pair_accuracy_{flawed['negative_kind']}", []).extend(won)
    metrics = {"pair_accuracy": pairs, "group_accuracy": whole, "total_mae": error} | kinds
    accuracy = torch.cat(hits).float().mean(dim=0).tolist()
    return ({"groups": len(groups)} | {name: statistics.fmean(values) for name, values in metrics.items()}
            | {f"accuracy_{name}": hit for name, hit in zip(rm.dimension_names, accuracy)})


@dataclass(frozen=True)
class RMSettings(Options):
    """Settings of `python rm.py`."""
    run_dir: str = option("runs/tiny-math", "run folder; holds groups/ and base/", affects_result=False)
    device: str = option("", "cuda, cpu, ...; empty: CUDA if available", affects_result=False)
    model: str = option("", "Hugging Face folder or name of the backbone; empty: the run's base model", path=True)
    epochs: float = option(2.0, "passes over the training groups", above=0)
    groups_per_batch: int = option(8, "groups in a batch, so that every pair is inside it", low=1)
    negatives_per_visit: int = option(4, "flawed traces of a group, drawn anew at each visit where it has more", low=1)
    learning_rate: float = option(1e-3, "AdamW; the tiny backbone wants more than a pretrained one", above=0)
    checkpointing: int = option(0, "1: recompute activations in the backward pass, for memory", choices=(0, 1),
                                affects_result=False)
    lora_rank: int = option(0, "0: train all weights; else an adapter of this rank on the frozen backbone, and the "
                               "heads", low=0)
    lora_alpha: float = option(32.0, "scale of the adapter: alpha / rank", above=0, needs="lora_rank")
    warmup: float = option(30.0, "steps of linear warm-up, below 1 a share of all; then linear decay to 0", low=0)
    nn_weight: float = option(0.0, "weight of pairs of two flawed traces; off in the paper's code too", low=0)
    max_groups: int = option(0, "use only this many training groups; 0: all", low=0)
    max_heldout: int = option(300, "check on this many held-out groups", low=1)
    seed: int = option(0, "random seed for the heads and the order of batches", low=0)


def check_groups(rm: RubricRewardModel, groups: list[dict]) -> None:
    """UserError, before hours of training, for a group that cannot be ranked or read."""
    for group in groups:
        where, domain = f"group {group['problem_id']}", set(data.DIMENSIONS[data.problem_of(group).task_type])
        if not group["positive_pool"] or not group["negative_bank"] or domain != set(rm.dimension_names):
            raise UserError(f"{where}: the reward model needs a good and a flawed trace in every group, all about "
                            f"{', '.join(rm.dimension_names)}; remove this group, or train planners without the reward "
                            "model: --mode exec_only or uplift_only (run.sh: MODES)")
        texts = batch_of([group], rm.dimension_names, 10**6, None)[0]
        longest = max(len(data.encode_text(rm.tokenizer, text)) for text in texts)
        if longest > rm.context:
            raise UserError(f"{where}: a trace and its problem are {longest} tokens, the model's context is "
                            f"{rm.context}; remove this group")


def train_reward_model(s: RMSettings, work: Path) -> None:
    """Trains the reward model of a run and saves it into `work`. A stopped training continues."""
    torch.manual_seed(s.seed)
    rng, device, path = random.Random(s.seed), executor.pick_device(s.device), Path(s.run_dir) / "groups"
    groups = data.read_groups(path / "train.jsonl")[:s.max_groups or None]
    names = data.DIMENSIONS[data.problem_of(groups[0]).task_type]
    backbone = s.model or executor.base_of(s.run_dir)
    base, tokenizer = executor.load(backbone, device, None if s.lora_rank else torch.float32)
    rm = RubricRewardModel(base.base_model, tokenizer, names).to(device)
    check_groups(rm, groups + data.read_groups(path / "heldout.jsonl")[:s.max_heldout])
    with tempfile.TemporaryDirectory() as folder:         # before hours: can this backbone be loaded again?
        with executor.saying(f"{backbone}: cannot be a reward model that is saved and loaded"):
            rm.save_pretrained(folder)
            RubricRewardModel.from_pretrained(folder)
    if s.checkpointing:
        executor.enable_checkpointing(base)
    lora = executor.Lora(rm.model, s.lora_rank, s.lora_alpha, seed=s.seed) if s.lora_rank else None
    optimizer = executor.adamw([p for p in rm.parameters() if p.requires_grad], s.learning_rate, weight_decay=0.01)
    total = max(1, math.ceil(len(groups) * s.epochs / s.groups_per_batch))
    warmup = round(s.warmup if s.warmup >= 1 else s.warmup * total)
    progress = work / "progress.pt"
    begin, losses = executor.load_progress(progress, rm, optimizer, (0, []))
    order = []
    for step in executor.progress_bar(range(total), desc="reward model"):
        while len(order) < s.groups_per_batch:
            order += rng.sample(groups, len(groups))
        visited, order = order[:s.groups_per_batch], order[s.groups_per_batch:]
        texts, *columns = batch_of(visited, names, s.negatives_per_visit, rng)
        if step < begin:                                  # of a stopped training: the same draws, nothing computed
            continue
        if step > begin and step % max(1, total // 10) == 0:
            executor.save_progress(progress, rm, optimizer, (step, losses))
        rm.train()
        with executor.autocast(rm.model):
            outputs = rm(*rm.encode(texts))
        loss = rm_loss(rm, *outputs, *(column.to(device) for column in columns), s.nn_weight)
        loss.backward()
        losses.append(loss.item())
        executor.descend(optimizer, s.learning_rate * executor.schedule(step, total, warmup), 1.0,
                         f"reward model, step {step}")
    if lora:
        lora.merge()
    with executor.saying(f"{work}: cannot be saved"):
        rm.save_pretrained(work)
    loss = statistics.fmean(losses[-20:])
    data.write_atomic(work / "trained.json", json.dumps({"steps": total, "train_loss": loss}))
    progress.unlink(missing_ok=True)


def main(argv) -> None:
    """The command: trains the reward model of a run."""
    s = data.parse_settings(RMSettings, argv, "rm.py")
    out = Path(s.run_dir) / "rm"
    if out.exists() and not (out / "settings.json").exists():
        print(f"{out}: a reward model that was put there, not trained here; it is used as it is")
        return
    with data.stage_folder(out, s, ["groups", "base"] + [s.model] * bool(s.model)) as work:
        if work:
            if not (work / "trained.json").exists():
                train_reward_model(s, work)
            rm = RubricRewardModel.from_pretrained(work, executor.pick_device(s.device))   # as trainings will load it
            heldout = data.read_groups(Path(s.run_dir) / "groups" / "heldout.jsonl")[:s.max_heldout]
            metrics = data.read_json(work / "trained.json") | measure_ranking(rm, heldout)
            data.write_atomic(work / "metrics.json", json.dumps(metrics, indent=1))
    metrics = data.read_json(out / "metrics.json")
    print(f"{out}: pair accuracy {metrics['pair_accuracy']:.3f}, group accuracy {metrics['group_accuracy']:.3f}, "
          f"MAE {metrics['total_mae']:.3f} on {metrics['groups']} held-out groups")
    print(f"next: python tracelift.py train --run_dir {s.run_dir} --mode tracelift")


if __name__ == "__main__":
    data.run_command(main)
