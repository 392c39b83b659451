"""The rubric reward model: how good is a reasoning trace, whatever came out of it?

A causal LM backbone reads problem + trace; the hidden state of the last token goes into five heads of five labels
(the rubric dimensions of arXiv 2605.03862, labels 0..4) and one total head. The score that the reward uses is half
rubric (the weighted mean of the expected labels / 4), half total head (sigmoid), in [0, 1].

It is trained on TraceLift-Groups, each group with its good trace above its flawed ones:

    loss = 1.0 * sum_d CE_d + 0.5 * Huber(sigmoid(total), gold) + 0.7 * rank(good over flawed)
           + nn_weight * rank(better over worse flawed, gold totals at least 0.15 apart)
    rank = mean over groups of the mean over a group's pairs of -logsigmoid(score_better - score_worse)

    python rm.py --run_dir runs/tiny-math        # groups/train.jsonl -> rm/, checked on groups/heldout.jsonl

With --lora_rank the backbone is frozen, in bfloat16 where executor.py computes in it, and an adapter and the heads
learn in float32. At the end the adapter is added to the backbone's weights, which bfloat16 rounds to 8 bits: a change
of a weight by less than 1/512 of it can be lost. So it is measured after that, as it is saved and loaded.

Shapes: B traces (rows), T tokens, H hidden, D = 5 dimensions, L = 5 labels.
Folders and state-dict names are those of the public checkpoints. Their code keeps the label values in non-persistent
buffers, which transformers 5 leaves uninitialised on loading; here constants are made where they are used.
"""

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import executor
from data import UserError, knob

# ------------------------------------------------------------------------------------------------ 1. the model

NUM_LABELS = 5


class RubricRewardModel(nn.Module):
    """`model` (a backbone without LM head), `dimension_heads` (D of L labels), `total_head`, and its tokenizer."""

    def __init__(self, model, tokenizer, dimension_names, dimension_weights=None):
        super().__init__()
        hidden = model.config.get_text_config().hidden_size
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

    def scores(self, label_logits: torch.Tensor, total_logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Label logits (B, D, L) and total logit (B,) -> score (B,) in [0, 1], expected labels (B, D) in [0, 4]."""
        values = torch.arange(NUM_LABELS, device=label_logits.device, dtype=torch.float32)
        weights = torch.tensor(self.dimension_weights, device=label_logits.device)
        expected = label_logits.softmax(dim=-1) @ values                                              # (B, D)
        rubric = (expected * weights).sum(dim=-1) / weights.sum() / (NUM_LABELS - 1)
        return 0.5 * rubric + 0.5 * torch.sigmoid(total_logit), expected

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> ids and mask (B, T), right padding. UserError for a text beyond the context: nothing is cut."""
        rows = [data.encode_text(self.tokenizer, text) for text in texts]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for text, row in zip(texts, rows):
            if not row or context and len(row) > context:
                raise UserError(f"the reward model cannot read a text of {len(row)} tokens (context {context}): "
                                f"{text[:80]!r}")
        device = self.total_head.weight.device
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)          # 0 where masked
        length = torch.tensor([len(row) for row in rows], device=device)
        return ids, (torch.arange(ids.shape[1], device=device) < length[:, None]).long()

    @torch.no_grad()
    def score(self, texts: list[str], batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (B,) in [0, 1] and expected labels (B, D) in [0, 4], on the CPU. FloatingPointError when not finite:
        a broken reward model must not become a reward."""
        # Each distinct text once: the rows of a batch differ by rounding, and equal traces must get equal rewards.
        order = sorted(set(texts), key=lambda text: (len(text), text))
        place = {text: i for i, text in enumerate(order)}
        score, dimensions = torch.zeros(len(order)), torch.zeros(len(order), len(self.dimension_names))
        for i in range(0, len(order), batch_size):
            label_logits, total_logit = self(*self.encode(order[i:i + batch_size]))
            total, expected = self.scores(label_logits, total_logit)
            score[i:i + batch_size], dimensions[i:i + batch_size] = total.cpu(), expected.cpu()
        if not torch.isfinite(score).all():
            raise FloatingPointError("the reward model gave a score that is not finite")
        rows = [place[text] for text in texts]
        return score[rows], dimensions[rows]

    def save_pretrained(self, folder) -> None:
        """config.json, model.safetensors and the tokenizer."""
        save_folder(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder, device="cpu") -> "RubricRewardModel":
        """A folder written by `save_pretrained`, or a public checkpoint. Strict: a missing or unexpected tensor is a
        UserError, nothing is re-initialised."""
        return load_folder(cls, Path(folder)).to(device).eval()


# ------------------------------------------------------------------------------------------------ 2. its folder


def save_folder(rm: RubricRewardModel, folder: Path) -> None:
    """Writes the folder, under the names of the public checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    config = rm.model.config.to_dict() | {
        "rm_dimension_names": rm.dimension_names, "rm_dimension_weights": rm.dimension_weights,
        "rm_num_labels": NUM_LABELS, "rm_use_total_head": True}
    data.write_atomic(folder / "config.json", json.dumps(config, indent=1, default=str))
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in rm.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rm.tokenizer.save_pretrained(folder)


def read_config(folder: Path) -> dict:
    """config.json of a reward model. UserError for what is missing."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no reward model here (config.json is missing); run rm.py first")
    config = data.read_json(path, "this is not a rubric reward model; delete the folder and run rm.py again",
                            "rm_dimension_names", "rm_dimension_weights", "rm_num_labels", "rm_use_total_head")
    names, weights = config["rm_dimension_names"], config["rm_dimension_weights"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: rm_dimension_names must be a list of texts, is {names!r:.60}")
    if weights and not (isinstance(weights, list) and all(isinstance(w, int | float) for w in weights)):
        raise UserError(f"{path}: rm_dimension_weights must be a list of numbers, is {weights!r:.60}")
    if config["rm_num_labels"] != NUM_LABELS or not config["rm_use_total_head"]:
        raise UserError(f"{path}: needs rm_num_labels {NUM_LABELS} and rm_use_total_head true")
    return config


def load_folder(cls, folder: Path) -> RubricRewardModel:
    """Reads the folder, on the CPU. Heads are float32, and so is the backbone, unless it was saved in bfloat16: of 7B a
    float32 copy would take 28 GB beside the planner instead of 14."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    config, state = read_config(folder), {}
    try:
        for shard in sorted(folder.glob("*.safetensors")):
            state.update(load_file(shard))
    except SafetensorError as error:
        raise _misfit(folder, error) from None
    kinds = {tensor.dtype for name, tensor in state.items() if name.startswith("model.")}
    dtype = torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32
    try:
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:                                            # tokenizers raises Exception itself
        raise UserError(f"{folder}: no backbone or tokenizer can be loaded ({' '.join(str(error).split())[:200]}); "
                        "delete the folder and run rm.py again") from None
    data.check_tokenizer(tokenizer, folder)
    rm = cls(model, tokenizer, config["rm_dimension_names"], config["rm_dimension_weights"])
    try:
        rm.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _misfit(folder, error) from None
    return rm


def _misfit(folder, error) -> UserError:
    return UserError(f"{folder}: the weights do not fit ({' '.join(str(error).split())[:300]}); delete the folder and "
                     "run rm.py again")


# ------------------------------------------------------------------------------------------------ 3. training


@dataclass
class Rows:
    """The traces of one group, good ones first, as the loss wants them."""
    texts: list[str]              # (R)
    labels: torch.Tensor          # (R, D) int64, in the order of the model's dimension names
    gold: torch.Tensor            # (R,) total of the rubric
    positive: torch.Tensor        # (R,) bool


def group_rows(group: dict, names: list[str]) -> Rows:
    """One group, whole. UserError for one without a good or a flawed trace, or about another domain."""
    problem = data.problem_of(group)
    if not group["positive_pool"] or not group["negative_bank"]:
        raise UserError(f"group {problem.problem_id}: the reward model needs a good and a flawed trace in every group; "
                        "remove this group from groups/*.jsonl, or, if none has traces (HumanEval, MBPP), train only "
                        "planners without it: --mode exec_only or uplift_only (run.sh: MODES, and no INT)")
    if set(names) != set(data.DIMENSIONS[problem.task_type]):
        raise UserError(f"group {problem.problem_id} is about {problem.task_type}, the reward model about "
                        f"{', '.join(names)}")
    traces = group["positive_pool"] + group["negative_bank"]
    rubrics = [trace["rubric"] for trace in traces]
    positive = [True] * len(group["positive_pool"]) + [False] * len(group["negative_bank"])
    return Rows([data.rm_text(problem, trace["reasoning"]) for trace in traces],
                torch.tensor([[rubric[name] for name in names] for rubric in rubrics]),
                torch.tensor([float(rubric["total"]) for rubric in rubrics]), torch.tensor(positive))


def draw_negatives(rows: Rows, most: int, rng: random.Random) -> Rows:
    """The group with `most` of its flawed traces, drawn anew at each visit; whole where it has no more."""
    flawed = [i for i, positive in enumerate(rows.positive.tolist()) if not positive]
    if len(flawed) <= most:
        return rows
    good = len(rows.texts) - len(flawed)
    kept = [*range(good), *sorted(rng.sample(flawed, most))]
    return Rows([rows.texts[i] for i in kept], rows.labels[kept], rows.gold[kept], rows.positive[kept])


def rank_loss(score: torch.Tensor, above: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """-logsigmoid(score_better - score_worse): the mean over the pairs of a group, then over the groups that have any.
    score (B,); above (B, B) bool: this row belongs above that one; group (B,) int."""
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
    """Held-out quality: pair_accuracy (positive above negative), group_accuracy (positive above every negative; ties
    count as wrong), total_mae, total_rmse, accuracy_<dimension>. Also pair accuracy per kind of flaw."""
    right, group_right, error, hits, by_kind = [], [], [], [], {}
    rows = [group_rows(group, rm.dimension_names) for group in groups]
    scores, expected = rm.score([text for group in rows for text in group.texts])
    at = 0
    for group, own in zip(groups, rows):
        end = at + len(own.texts)
        score, dimensions = scores[at:end], expected[at:end]
        at = end
        beats = score[own.positive][:, None] > score[~own.positive][None, :]                          # (P, N)
        right.append(beats.flatten())
        group_right.append(float(beats.all()))
        error.append(score - own.gold)
        hits.append((dimensions.round().long() == own.labels).float())
        for trace, won in zip(group["negative_bank"], beats.float().mean(dim=0).tolist()):
            by_kind.setdefault(trace["negative_kind"], []).append(won)
    right, error, hits = torch.cat(right).float(), torch.cat(error), torch.cat(hits).mean(dim=0)
    return {"groups": len(groups), "pair_accuracy": right.mean().item(),
            "group_accuracy": sum(group_right) / len(group_right),
            "total_mae": error.abs().mean().item(), "total_rmse": error.square().mean().sqrt().item(),
            **{f"accuracy_{name}": hit for name, hit in zip(rm.dimension_names, hits.tolist())},
            "pair_accuracy_by_kind": {kind: sum(won) / len(won) for kind, won in sorted(by_kind.items())}}


@torch.no_grad()
def check_backbone(rm: RubricRewardModel) -> None:
    """UserError, before anything is trained, for a backbone that could not be loaded again (an encoder or a pooler
    belongs to it), or in which the padding behind a text changes its score."""
    from transformers import AutoModel
    refused = f"{rm.model.config.model_type} models cannot be the backbone of a reward model"
    try:
        with torch.device("meta"):                                        # names, no numbers
            wanted = AutoModel.from_config(rm.model.config).state_dict()
    except ValueError:
        raise UserError(f"{refused}: transformers has no base model of theirs") from None
    differ = sorted(wanted.keys() ^ rm.model.state_dict().keys())
    if differ:
        raise UserError(f"{refused}: transformers would load it with other weights, such as {differ[0]}")
    ids = executor._some_ids(rm.model, 12).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with executor.in_float32(rm.model):
        rounding = 1e-3 if rm.model.dtype == torch.float32 else 0.1       # of one that is too large for float32
        alone, padded = rm(ids[1:, :5], mask[1:, :5])[0], rm(ids, mask)[0][1:]
    if not executor._distance(alone, padded) < rounding:
        raise UserError(f"{refused}: padding behind a text changes what they compute")


@dataclass(frozen=True)
class RMSettings:
    """Settings of `python rm.py`."""
    run_dir: str = knob("runs/tiny-math", "run folder; holds groups/ and base/", affects_result=False)
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one", affects_result=False)
    epochs: float = knob(2.0, "passes over the training groups", above=0)
    groups_per_batch: int = knob(8, "groups in a batch, so that every pair is inside it", low=1)
    negatives_per_visit: int = knob(4, "flawed traces of a group, drawn anew at each visit where it has more", low=1)
    learning_rate: float = knob(1e-3, "AdamW; the tiny backbone wants more than a pretrained one", above=0)
    checkpointing: int = knob(0, "1: recompute activations in the backward pass, for memory", choices=(0, 1),
                              affects_result=False)
    lora_rank: int = knob(0, "0: train all weights; else an adapter of this rank on the frozen base, and the heads",
                          low=0)
    lora_alpha: float = knob(32.0, "the adapter's part is scaled by alpha / rank", above=0)
    warmup: int = knob(30, "steps of linear warm-up; then linear decay to 0", low=0)
    nn_weight: float = knob(0.0, "weight of pairs of two flawed traces; off in the paper's code too", low=0)
    max_groups: int = knob(0, "use only this many training groups; 0: all", low=0)
    max_heldout: int = knob(300, "check on this many held-out groups", low=1)
    seed: int = knob(0, "heads, order of batches", low=0)


def train_reward_model(s: RMSettings, work: Path) -> dict:
    """Trains the reward model of a run and saves it into `work`, with metrics.json. Returns the held-out metrics."""
    if s.lora_alpha != RMSettings.lora_alpha and not s.lora_rank:
        raise UserError("--lora_alpha has no effect without --lora_rank; leave it out")
    torch.manual_seed(s.seed)
    folder = Path(s.run_dir) / "groups"
    groups = data.read_groups(folder / "train.jsonl")[:s.max_groups or None]
    heldout = data.read_groups(folder / "heldout.jsonl")[:s.max_heldout]
    tasks = {data.problem_of(group).task_type for group in groups + heldout}
    if len(tasks) > 1:
        raise UserError(f"{folder}: holds both math and code, whose rubrics differ; use one run for each")
    names = data.DIMENSIONS[tasks.pop()]
    rows = [group_rows(group, names) for group in groups + heldout]      # all are checked before hours
    device = executor.pick_device(s.device)
    base, tokenizer = executor.load(executor.base_of(s.run_dir), device, None if s.lora_rank else torch.float32)
    if s.checkpointing:
        executor.enable_checkpointing(base)
    rm = RubricRewardModel(base.base_model, tokenizer, names).to(device)
    del base                                                              # its head: 2 GiB at 7B
    check_backbone(rm)
    if s.lora_rank:
        lora = executor.Lora(rm.model, s.lora_rank, s.lora_alpha, seed=s.seed)
        print(f"LoRA: the adapted layers hold {lora.share:.0%} of the backbone's weights")
    for group, own in zip(groups + heldout, rows):
        try:
            rm.encode(own.texts)
        except UserError as error:
            raise UserError(f"group {group['problem_id']}: {error}; remove it from {folder}, or take a base model with a "
                            "longer context (executor.py --model)") from None
    rows = rows[:len(groups)]
    learning = [p for p in rm.parameters() if p.requires_grad]
    optimizer = executor.adamw(learning, s.learning_rate, weight_decay=0.01)
    total = max(1, math.ceil(len(rows) * s.epochs / s.groups_per_batch))
    if s.warmup > total and s.warmup != RMSettings.warmup:
        raise UserError(f"--warmup {s.warmup} is longer than the training, {total} steps; lower it")
    rng, order, losses = random.Random(s.seed), [], []
    bar = tqdm(range(total), desc="reward model", mininterval=5)
    rm.train()
    for step in bar:
        while len(order) < s.groups_per_batch:
            order += rng.sample(range(len(rows)), len(rows))
        batch = [draw_negatives(rows[i], s.negatives_per_visit, rng) for i in order[:s.groups_per_batch]]
        order = order[s.groups_per_batch:]
        labels = torch.cat([own.labels for own in batch]).to(device)
        gold = torch.cat([own.gold for own in batch]).to(device)
        positive = torch.cat([own.positive for own in batch]).to(device)
        sizes = torch.tensor([len(own.texts) for own in batch])
        group = torch.repeat_interleave(torch.arange(len(batch)), sizes).to(device)
        for parameters in optimizer.param_groups:
            parameters["lr"] = s.learning_rate * executor.schedule(step, total, s.warmup)
        with executor.autocast(rm.model):
            outputs = rm(*rm.encode(list(itertools.chain(*(own.texts for own in batch)))))
        loss = rm_loss(rm, *outputs, labels, gold, positive, group, s.nn_weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(rm.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            raise FloatingPointError(f"reward model, step {step}: the loss or its gradient is not finite; "
                                     f"{executor.DIVERGED}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    if s.lora_rank:
        lora.merge()
    try:
        rm.eval().score(rows[0].texts[:1])
    except FloatingPointError as error:
        raise FloatingPointError(f"reward model, after step {total - 1}: {error}; {executor.DIVERGED}") from None
    with executor.saving(work):                                           # before it is measured: an error there must
        rm.save_pretrained(work)                                          # not cost the training
    metrics = {"steps": total, "train_loss": sum(losses[-20:]) / len(losses[-20:])}
    metrics |= measure_ranking(rm, heldout)
    data.write_atomic(work / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def main(argv) -> None:
    """The command: trains the reward model of a run."""
    s = data.parse_settings(RMSettings, argv, "rm.py")
    out = Path(s.run_dir) / "rm"
    if (out / "config.json").exists() and not (out / "settings.json").exists():
        print(f"{out}: a reward model that was put there, not trained here; it is used as it is")
        return
    inputs = data.fingerprints(s.run_dir, "groups/train.jsonl", "groups/heldout.jsonl", "base/base.json")
    with data.stage_folder(out, s, inputs) as work:
        if work is not None:
            train_reward_model(s, work)
    metrics = data.read_json(out / "metrics.json", f"delete {out} and give the same command again", "pair_accuracy",
                             "group_accuracy", "total_mae", "groups")
    print(f"{out}: pair accuracy {metrics['pair_accuracy']:.3f}, group accuracy {metrics['group_accuracy']:.3f}, "
          f"MAE {metrics['total_mae']:.3f} on {metrics['groups']} held-out groups")
    print(f"next: python tracelift.py train --run_dir {s.run_dir} --mode tracelift")


if __name__ == "__main__":
    data.run_command(main)
