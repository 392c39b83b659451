"""rm.py: what is saved is what scores, pooling sees the last token only, and the loss and metrics by hand.

    python -m pytest tests/test_rm.py
"""
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import executor
import rm as rm_module
from data import UserError
from rm import RMSettings, RubricRewardModel, Rows, draw_negatives, group_rows, measure_ranking, rank_loss, rm_loss

ROOT = Path(rm_module.__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups():
    return data.build_groups(data.tiny_problems("math", 8, 0), 4, 0)


@pytest.fixture(scope="module")
def texts(groups):
    """Of different lengths, or padding would not be tested."""
    found = [text for group in groups for text in group_rows(group, data.DIMENSIONS["math"]).texts]
    assert len({len(text.split()) for text in found}) > 3
    return found


@pytest.fixture(scope="module")
def tokenizer(texts):
    return executor.tiny_tokenizer(texts)


def make(tokenizer, names=data.DIMENSIONS["math"], weights=None):
    """A random model whose scores differ from text to text."""
    torch.manual_seed(0)
    model = RubricRewardModel(executor.tiny_model(len(tokenizer), 32, 1).base_model, tokenizer, names, weights)
    for head in (*model.dimension_heads, model.total_head):
        torch.nn.init.normal_(head.weight, std=0.3)                # scores well inside (0, 1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make(tokenizer)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---------------------------------------------------------------- saving and loading

def test_scores_survive_saving(model, folder, texts):
    """The public code kept its label values in buffers that loading leaves uninitialised: silent garbage. A tokenizer
    that transformers swaps for another while loading does the same."""
    before = model.score(texts)
    assert before[0].std() > 0.01, "the scores must differ, or this test sees nothing"
    again = RubricRewardModel.from_pretrained(folder, CPU)
    assert all(torch.equal(old, new) for old, new in zip(before, again.score(texts))), "bit for bit"
    assert [again.tokenizer(t)["input_ids"] for t in texts] == [model.tokenizer(t)["input_ids"] for t in texts]
    code = ("import sys, json, torch; torch.set_num_threads(1); from rm import RubricRewardModel as R\n"
            "s, d = R.from_pretrained(sys.argv[1], 'cpu').score(json.load(sys.stdin))\n"
            "print(json.dumps([s.tolist(), d.tolist()]))")
    fresh = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, input=json.dumps(texts), text=True,
                           capture_output=True, timeout=300)
    assert fresh.returncode == 0, fresh.stderr
    for old, new in zip(before, json.loads(fresh.stdout.splitlines()[-1])):
        torch.testing.assert_close(torch.tensor(new), old, atol=1e-6, rtol=0)


def test_public_names(folder):
    """Other projects read these folders: tensor names, shapes and config keys are those of the public checkpoints."""
    state = load_file(folder / "model.safetensors")
    heads = {f"dimension_heads.{i}.{part}" for i in range(5) for part in ("weight", "bias")}
    assert {name for name in state if not name.startswith("model.")} == heads | {"total_head.weight", "total_head.bias"}
    assert "model.embed_tokens.weight" in state and not any("lm_head" in name for name in state)
    assert state["dimension_heads.4.weight"].shape == (5, 32) and state["total_head.weight"].shape == (1, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["rm_dimension_names"] == list(data.DIMENSIONS["math"]) and config["rm_dimension_weights"] == [0.2] * 5
    assert config["rm_num_labels"] == 5 and config["rm_use_total_head"] is True and "model_type" in config


def test_dimension_weights_are_loaded_not_defaulted(tokenizer, texts, tmp_path):
    """Weights that fall back to the default on loading change every score."""
    uneven = make(tokenizer, weights=[5.0, 0.0, 0.0, 0.0, 1.0])
    before = uneven.score(texts)[0]
    assert (before - make(tokenizer).score(texts)[0]).abs().max() > 1e-3
    uneven.save_pretrained(tmp_path / "rm")
    torch.testing.assert_close(RubricRewardModel.from_pretrained(tmp_path / "rm", CPU).score(texts)[0], before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["total_head.weight", "dimension_heads.3.bias", "model.norm.weight"])
def test_missing_tensor_is_an_error(folder, name):
    """ignore_mismatched_sizes re-initialises heads in silence; a random head must never score."""
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        RubricRewardModel.from_pretrained(folder, CPU)


def test_unexpected_and_misshapen_tensors_are_errors(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"surprise": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="surprise"):
        RubricRewardModel.from_pretrained(folder, CPU)
    save_file(state | {"total_head.weight": torch.zeros(2, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="total_head"):
        RubricRewardModel.from_pretrained(folder, CPU)


@pytest.mark.parametrize("key", ["rm_dimension_names", "rm_dimension_weights", "rm_num_labels", "rm_use_total_head"])
def test_missing_config_key_is_an_error(folder, key):
    """A guessed default (labels, weights) would score, wrongly."""
    edit(folder / "config.json", lambda config: config.pop(key))
    with pytest.raises(UserError, match=key):
        RubricRewardModel.from_pretrained(folder, CPU)


@pytest.mark.parametrize("key, value", [("rm_num_labels", 4), ("rm_use_total_head", False)])
def test_checkpoints_of_another_kind_are_errors(folder, key, value):
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(UserError, match=key):
        RubricRewardModel.from_pretrained(folder, CPU)


def test_no_folder_and_no_weights_are_user_errors(folder, tmp_path):
    with pytest.raises(UserError, match="no reward model"):
        RubricRewardModel.from_pretrained(tmp_path / "nothing", CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError):
        RubricRewardModel.from_pretrained(folder, CPU)


def test_a_tokenizer_that_took_the_place_of_another_is_found(folder, monkeypatch):
    """As transformers does for some model types (Qwen2), without a word: every score would be of other text."""
    other = executor.tiny_tokenizer(["quite other words"])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: other)
    with pytest.raises(UserError, match="reads another tokenizer"):
        RubricRewardModel.from_pretrained(folder, CPU)


def test_sharded_folder_loads(model, folder, texts):
    """Public 7B checkpoints come in several files; taking the first one only must not pass."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for i in (0, 1):
        save_file({n: state[n] for n in names[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    torch.testing.assert_close(RubricRewardModel.from_pretrained(folder, CPU).score(texts)[0], model.score(texts)[0],
                               atol=1e-6, rtol=0)


# ---------------------------------------------------------------- pooling and scoring

def test_left_padding_is_refused(model):
    """Last-token pooling reads a pad under left padding and says nothing."""
    ids = torch.ones(2, 4, dtype=torch.long)
    model(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    for bad in ([0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]):
        with pytest.raises(ValueError, match="right"):
            model(ids, torch.tensor([[1, 1, 1, 1], bad]))


def test_pooling_reads_the_last_token_and_no_padding(model):
    """Off by one, pooling would read the first pad or the token before the last."""
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        labels, total = model(ids, mask)
        other = ids.clone()
        other[1, 2:] = 11                                          # what stands in the padding
        torch.testing.assert_close(model(other, mask)[1], total, atol=1e-6, rtol=0)
        alone = model(ids[1:, :2], mask[1:, :2])
        torch.testing.assert_close(alone[1][0], total[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[0][0], labels[1], atol=1e-5, rtol=0)
        last = ids.clone()
        last[1, 1] = 12                                            # the last token
        assert (model(last, mask)[1][1] - total[1]).abs() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_score_does_not_depend_on_the_batch(model, texts, batch_size):
    """score sorts by length: the order of the results must be that of the texts, whatever shares the batch."""
    alone = torch.cat([model.score([text])[0] for text in texts])
    torch.testing.assert_close(model.score(texts, batch_size)[0], alone, atol=1e-5, rtol=0)
    back, dimensions = model.score(texts[::-1], batch_size)
    torch.testing.assert_close(back.flip(0), alone, atol=1e-5, rtol=0)
    assert dimensions.shape == (len(texts), 5) and 0 <= dimensions.min() and dimensions.max() <= 4


def test_scores_by_hand(tokenizer):
    """Half rubric (weighted mean of expected labels / 4), half sigmoid of the total."""
    two = make(tokenizer, ("a", "b"), [3.0, 1.0])
    logits = torch.zeros(3, 2, 5)
    logits[1, 0, 4], logits[1, 1, 0] = 1e3, 1e3                    # certain: labels 4 and 0
    logits[2, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-30]).log()
    score, expected = two.scores(logits, torch.tensor([0.0, math.log(3), -1e3]))
    torch.testing.assert_close(expected, torch.tensor([[2.0, 2.0], [4.0, 0.0], [2.0, 2.0]]))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.5 * 0.75 + 0.5 * 0.75, 0.25]))


def test_a_score_that_is_not_finite_raises(tokenizer, texts):
    """NaN is not a reward, and neither is the 0.5 that the paper's code puts in its place."""
    broken = make(tokenizer)
    broken.total_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        broken.score(texts[:2])


def test_a_text_longer_than_the_context_is_an_error(model):
    """Truncation would score half a trace."""
    with pytest.raises(UserError, match="context"):
        model.score(["has " * 600])


PUBLIC = {"problem_id": "q", "source": "somewhere", "task_type": "algorithm", "problem": " Sum a list .\n", "reference_solution": "",
          "tests_or_constraints": "at most 9 numbers", "positive_pool": [], "negative_bank": []}
HAND_MADE = """<task>code</task>
<type>algorithm</type>
<problem>
Sum a list .
</problem>
<tests>
at most 9 numbers
</tests>
<reasoning>
add one by one
</reasoning>"""


def test_a_public_reward_model_reads_what_it_was_trained_on(tmp_path):
    """Trained on the public form, it scores a trace through rm_text as through the text written by hand."""
    rubric = dict.fromkeys(data.DIMENSIONS["code"], 4) | {"total": 1.0}
    trace = {"reasoning": "\nadd one by one ", "rubric": rubric}
    group = PUBLIC | {"positive_pool": [trace], "negative_bank": [trace | {"negative_kind": "x", "reasoning": "guess"}]}
    rows = group_rows(group, data.DIMENSIONS["code"])
    flawed = HAND_MADE.replace("add one by one", "guess")
    assert rows.texts == [HAND_MADE, flawed]
    public = make(executor.tiny_tokenizer([HAND_MADE, flawed]), data.DIMENSIONS["code"])
    ours, theirs = public.score(rows.texts), public.score([HAND_MADE, flawed])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and ours[0][0] != ours[0][1]


# ---------------------------------------------------------------- pairs and loss

def rank_by_hand(score, pairs_of_groups):
    """The mean over the pairs of a group, then over groups."""
    means = []
    for pairs in pairs_of_groups:
        losses = [math.log(1 + math.exp(score[worse] - score[better])) for better, worse in pairs]
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def test_every_group_counts_the_same_however_many_flawed_traces_it_has():
    """Over all pairs at once, a group with a large bank would count more than one with a small one."""
    score = torch.tensor([0.9, 0.2, 0.8, 0.5, 0.1, 0.6, 0.7])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])                    # group 0: one above three; 1: one above one; 2: alone
    above = torch.zeros(7, 7, dtype=torch.bool)
    above[0, 1:4] = above[4, 5] = True
    want = rank_by_hand(score.tolist(), [[(0, 1), (0, 2), (0, 3)], [(4, 5)]])
    assert rank_loss(score, above, group).item() == pytest.approx(want, abs=1e-6)
    above[0, 5] = above[4, 6] = True                               # of another group: no pair
    assert rank_loss(score, above, group).item() == pytest.approx(want, abs=1e-6)
    flat = rank_by_hand(score.tolist(), [[(0, 1), (0, 2), (0, 3), (4, 5)]])
    assert abs(flat - want) > 0.01, "or this test would see nothing"


def batch_of(positive, group):
    torch.manual_seed(1)
    B = len(positive)
    return (torch.randn(B, 5, 5, requires_grad=True), torch.randn(B, requires_grad=True), torch.randint(0, 5, (B, 5)),
            torch.linspace(1.0, 0.2, B), torch.tensor(positive), torch.tensor(group))


@pytest.mark.parametrize("nn_weight", [0.0, 0.3])
def test_loss_by_hand(model, nn_weight):
    """1.0 * sum_d CE_d + 0.5 * Huber + 0.7 * ranking (+ nn_weight * ranking of flawed traces), in scalars."""
    labels_logits, total, labels, gold, positive, group = args = batch_of([True, False, False, True, False], [0, 0, 0, 1, 1])
    B, weights = 5, [0.2] * 5
    score, ce, huber = [], 0.0, 0.0
    for b in range(B):
        rubric = 0.0
        for d in range(5):
            z = [math.exp(x) for x in labels_logits[b, d].tolist()]
            ce -= math.log(z[labels[b, d]] / sum(z)) / B
            rubric += weights[d] * sum(i * x for i, x in enumerate(z)) / sum(z) / 4
        s = 1 / (1 + math.exp(-total[b].item()))
        huber += 0.5 * (s - gold[b].item()) ** 2 / B               # errors are below 1: the quadratic part
        score.append(0.5 * rubric + 0.5 * s)
    want = ce + 0.5 * huber + 0.7 * rank_by_hand(score, [[(0, 1), (0, 2)], [(3, 4)]])
    want += nn_weight * rank_by_hand(score, [[(1, 2)]])
    assert rm_loss(model, *args, nn_weight=nn_weight).item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("high, low, counts", [(0.40, 0.25, True), (0.35, 0.20, True), (0.45, 0.30, True), (1.0, 0.85, True),
                                               (0.40, 0.26, False), (0.30, 0.30, False), (0.9, 0.1, True)])
@pytest.mark.parametrize("swap", [False, True])
def test_a_margin_of_exactly_015_counts(model, high, low, counts, swap):
    """The rubrics have gaps of 0.15; rounding must not make some of them count and others not."""
    labels_logits, total, labels, _, positive, group = batch_of([False, False], [0, 0])
    gold = torch.tensor([low, high] if swap else [high, low])
    with_pairs, without = (rm_loss(model, labels_logits, total, labels, gold, positive, group, nn_weight=w).item() for w in (1, 0))
    score = model.scores(labels_logits, total)[0].tolist()
    extra = rank_by_hand(score, [[(1, 0) if swap else (0, 1)]]) if counts else 0.0
    assert with_pairs - without == pytest.approx(extra, abs=1e-5)


def test_flawed_pairs_are_averaged_over_groups_too(model):
    """Four flawed traces of one group, two of another; good ones are in no pair of these."""
    args = list(batch_of([True, False, False, False, False, True, False, False], [0] * 5 + [1] * 3))
    args[3] = torch.tensor([1.0, 0.6, 0.4, 0.3, 0.2, 1.0, 0.5, 0.1])
    pairs = [[(1, 2), (1, 3), (1, 4), (2, 4)], [(6, 7)]]
    score = model.scores(*args[:2])[0].tolist()
    with_pairs, without = (rm_loss(model, *args, nn_weight=w).item() for w in (1, 0))
    assert with_pairs - without == pytest.approx(rank_by_hand(score, pairs), abs=1e-5)


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_a_batch_without_pairs_has_a_finite_loss(model, positive):
    """A mean over no pairs is NaN, and one NaN batch ends the training."""
    labels_logits, total, labels, gold, positive, group = batch_of(positive, [0, 1])
    loss = rm_loss(model, labels_logits, total, labels, gold, positive, group, nn_weight=0.5)
    loss.backward()
    assert loss.isfinite() and labels_logits.grad.isfinite().all() and total.grad.isfinite().all()


def test_ranking_raises_the_positive(model):
    """The sign: the gradient must push a positive up and its negative down."""
    labels_logits, total, labels, gold, positive, group = batch_of([True, False], [0, 0])
    without = torch.autograd.grad(rm_loss(model, labels_logits, total, labels, gold, positive, torch.tensor([0, 1])), total)[0]
    difference = torch.autograd.grad(rm_loss(model, labels_logits, total, labels, gold, positive, group), total)[0] - without
    assert difference[0] < 0 < difference[1]


# ---------------------------------------------------------------- held-out metrics

class Known:
    """A reward model whose score of a text is looked up."""
    dimension_names = data.DIMENSIONS["math"]

    def __init__(self, scores, labels):
        self.scores, self.labels = scores, labels

    def score(self, texts):
        found = [next(key for key in self.scores if f">{key}<" in text) for text in texts]
        return torch.tensor([self.scores[key] for key in found]), torch.tensor([self.labels[key] for key in found])


def group(name, positives, negatives):
    def rubric(total):
        return dict(zip(data.DIMENSIONS["math"], (4, 3, 2, 1, 0)), total=total)
    return {"problem_id": name, "source": "tiny", "task_type": "math", "problem": "a problem", "reference_solution": "1",
            "positive_pool": [{"reasoning": r, "rubric": rubric(t)} for r, t in positives],
            "negative_bank": [{"reasoning": r, "negative_kind": k, "rubric": rubric(t)} for r, k, t in negatives]}


def test_metrics_by_hand():
    """Ties count as wrong: a model that gives every trace one score must not look good."""
    scores = {"p": 0.9, "q": 0.5, "r": 0.9, "s": 0.8, "t": 0.1, "u": 0.7}
    labels = {key: [4.4, 3.4, 1.4, 1.0, 0.0] for key in scores} | {"t": [3.6, 2.4, 2.0, 1.0, 0.0]}
    found = measure_ranking(Known(scores, labels), [
        group("1", [("p", 1.0)], [("q", "slip", 0.4), ("r", "leak", 0.2)]),
        group("2", [("s", 1.0)], [("t", "slip", 0.3), ("u", "leak", 0.7)])])
    error = [-0.1, 0.1, 0.7, -0.2, -0.2, 0.0]
    assert found["groups"] == 2 and found["pair_accuracy"] == 0.75 and found["group_accuracy"] == 0.5
    assert found["total_mae"] == pytest.approx(sum(map(abs, error)) / 6, abs=1e-6)
    assert found["total_rmse"] == pytest.approx(math.sqrt(sum(e * e for e in error) / 6), abs=1e-6)
    assert found["pair_accuracy_by_kind"] == {"leak": 0.5, "slip": 1.0}
    accuracy = [found[f"accuracy_{d}"] for d in data.DIMENSIONS["math"]]
    assert accuracy == pytest.approx([1.0, 5 / 6, 1 / 6, 1.0, 1.0])


def test_a_group_needs_every_positive_above_every_negative():
    scores = {"p": 0.9, "q": 0.4, "r": 0.5}
    found = measure_ranking(Known(scores, {key: [0.0] * 5 for key in scores}),
                            [group("1", [("p", 1.0), ("q", 1.0)], [("r", "slip", 0.4)])])
    assert found["pair_accuracy"] == 0.5 and found["group_accuracy"] == 0.0
    assert found["pair_accuracy_by_kind"] == {"slip": 0.5}


@pytest.mark.parametrize("positives, negatives", [([("p", 1.0)], []), ([], [("p", "slip", 0.4)])])
def test_a_group_without_pairs_is_no_group(positives, negatives):
    """all() of nothing is True and the mean of nothing NaN: such a group must not count as ranked right."""
    with pytest.raises(UserError, match="g-7"):
        measure_ranking(Known({"p": 0.9}, {"p": [0.0] * 5}), [group("g-7", positives, negatives)])


# ---------------------------------------------------------------- training

BASE = ["--sequences", "64", "--hidden", "32", "--layers", "1", "--eval_problems", "2", "--max_answer_tokens", "4",
        "--device", "cpu"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder with groups and a base model that is close to random."""
    run_dir = tmp_path_factory.mktemp("runs") / "code"
    data.main(["--run_dir", str(run_dir), "--task_type", "code", "--train", "60", "--heldout", "60", "--negatives", "4"])
    executor.main(["--run_dir", str(run_dir), *BASE])
    return run_dir


@pytest.fixture
def copied(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "code"))


def settings(run_dir, **changes):
    small = dict(run_dir=str(run_dir), device="cpu", epochs=1.0, learning_rate=3e-3, warmup=2, max_heldout=60)
    return RMSettings(**{**small, **changes})


def train(s, folder):
    folder.mkdir(exist_ok=True)
    return rm_module.train_reward_model(s, folder)


def test_training_beats_chance_and_saves_what_it_measured(copied, capsys):
    """From a random backbone, held-out pairs come out clearly better than the 0.5 of guessing."""
    argv = ["--run_dir", str(copied), "--epochs", "12", "--learning_rate", "3e-3", "--max_heldout", "60", "--device", "cpu"]
    rm_module.main(argv)
    metrics = json.loads((copied / "rm" / "metrics.json").read_text())
    assert metrics["groups"] == 60 and metrics["pair_accuracy"] > 0.65, metrics
    said = capsys.readouterr().out
    assert f"{metrics['pair_accuracy']:.3f}" in said and f"next: python tracelift.py train --run_dir {copied}" in said
    heldout = data.read_groups(copied / "groups" / "heldout.jsonl")
    again = measure_ranking(RubricRewardModel.from_pretrained(copied / "rm", CPU), heldout)
    assert again == {key: metrics[key] for key in again}, "what was measured is what was saved"
    before = (copied / "rm" / "model.safetensors").stat().st_mtime_ns
    rm_module.main(argv)                                           # complete: skipped
    assert (copied / "rm" / "model.safetensors").stat().st_mtime_ns == before
    for flag, value in ("epochs", "1"), ("negatives_per_visit", "2"), ("nn_weight", "0.5"):
        with pytest.raises(UserError, match=flag):
            rm_module.main([*argv, f"--{flag}", value])


def losses_of(monkeypatch):
    """The losses of all later steps."""
    losses, real = [], rm_module.rm_loss
    monkeypatch.setattr(rm_module, "rm_loss", lambda *args: (losses.append(real(*args)), losses[-1])[1])
    return losses


def test_an_adapter_and_heads_learn_on_a_frozen_backbone(copied, monkeypatch):
    """The loss falls, pairs come out better than guessed, nothing but the adapted weights has changed, by no more than
    an adapter can; the folder is that of any reward model, and what was measured is what was saved."""
    losses, learned, adamw = losses_of(monkeypatch), [], executor.adamw
    monkeypatch.setattr(executor, "adamw", lambda p, *a, **k: (learned.extend(p), adamw(p, *a, **k))[1])
    rm_module.main(["--run_dir", str(copied), "--epochs", "12", "--learning_rate", "1e-2", "--max_heldout", "60",
                    "--device", "cpu", "--lora_rank", "4", "--lora_alpha", "16"])
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    metrics = json.loads((copied / "rm" / "metrics.json").read_text())
    assert metrics["pair_accuracy"] > 0.65, metrics
    base, after = load_file(copied / "base" / "model.safetensors"), load_file(copied / "rm" / "model.safetensors")
    before = {name: base[name] for name in after if name.startswith("model.")}
    assert {name for name in after if "head" not in name} == before.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if "proj" in name:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 4, name
        else:
            assert not change.any(), name
    assert sum(p.numel() for p in learned) == 26 * 33 + 4 * sum(sum(x.shape) for n, x in before.items() if "proj" in n)
    heldout = data.read_groups(copied / "groups" / "heldout.jsonl")
    again = measure_ranking(RubricRewardModel.from_pretrained(copied / "rm", CPU), heldout)
    assert again == {key: metrics[key] for key in again}


def test_a_backbone_in_bfloat16_is_trained_saved_and_loaded_in_it(prepared, tmp_path, monkeypatch):
    """As a large one is on a GPU: the adapter learns in float32, the heads stay in it, and nothing is loaded in float32
    that was saved in 16 bits."""
    monkeypatch.setattr(executor, "work_dtype", lambda model: torch.bfloat16)
    losses, learned, adamw = losses_of(monkeypatch), [], executor.adamw
    monkeypatch.setattr(executor, "adamw", lambda p, *a, **k: (learned.extend(p), adamw(p, *a, **k))[1])
    s = settings(prepared, lora_rank=4, epochs=4.0, learning_rate=1e-2, checkpointing=1)
    metrics = train(s, tmp_path / "rm")
    assert {p.dtype for p in learned} == {torch.float32} and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    state = load_file(tmp_path / "rm" / "model.safetensors")
    assert all(x.dtype == (torch.float32 if "head" in name else torch.bfloat16) for name, x in state.items())
    base = load_file(prepared / "base" / "model.safetensors")
    assert torch.equal(state["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16())
    loaded = RubricRewardModel.from_pretrained(tmp_path / "rm", CPU)
    assert loaded.model.dtype == torch.bfloat16 and loaded.total_head.weight.dtype == torch.float32
    again = measure_ranking(loaded, data.read_groups(prepared / "groups" / "heldout.jsonl"))
    assert again == {key: metrics[key] for key in again}
    exact = RubricRewardModel.from_pretrained(tmp_path / "rm", CPU).float()
    texts = [rows for g in data.read_groups(prepared / "groups" / "heldout.jsonl") for rows in group_rows(g, loaded.dimension_names).texts]
    apart = (loaded.score(texts)[0] - exact.score(texts)[0]).abs().max()
    assert 0 < apart < 0.02, "what 16 bits cost in a score"


def bank(flawed, good=1):
    names = [f"good {i}" for i in range(good)] + [f"flawed {i}" for i in range(flawed)]
    R = len(names)
    return Rows(names, torch.arange(R * 5).reshape(R, 5), torch.arange(R) / 10, torch.arange(R) < good)


def test_flawed_traces_are_drawn_anew_at_each_visit():
    """Good ones always, `most` flawed ones each time others, rows with their own labels; a small bank as it is."""
    rows, rng, seen = bank(6, good=2), random.Random(0), set()
    for _ in range(20):
        drawn = draw_negatives(rows, 2, rng)
        chosen = [rows.texts.index(text) for text in drawn.texts]
        assert chosen[:2] == [0, 1] and len(chosen) == len(set(chosen)) == 4 and drawn.positive.tolist() == [True, True, False, False]
        assert torch.equal(drawn.labels, rows.labels[chosen]) and torch.equal(drawn.gold, rows.gold[chosen])
        seen.add(tuple(chosen[2:]))
    assert len(seen) > 5 and {i for pair in seen for i in pair} == set(range(2, 8))
    again = [draw_negatives(rows, 2, random.Random(7)).texts for _ in range(2)]
    assert again[0] == again[1], "a function of the generator"
    for flawed in 1, 2:
        assert draw_negatives(bank(flawed), 2, rng).texts == bank(flawed).texts
    assert rows.texts == bank(6, good=2).texts, "the group itself stays whole"


def test_a_training_sees_all_flawed_traces_a_few_at_a_time(prepared, tmp_path, monkeypatch):
    """negatives_per_visit of each group in a step, drawn anew, and two trainings with one seed are one training."""
    visits, real = [], rm_module.rm_loss

    def spy(rm, label_logits, total_logit, labels, gold, positive, group, nn_weight):
        visits.append([(positive[group == g].tolist(), str(labels[group == g].tolist())) for g in range(int(group.max()) + 1)])
        return real(rm, label_logits, total_logit, labels, gold, positive, group, nn_weight)
    monkeypatch.setattr(rm_module, "rm_loss", spy)
    s = settings(prepared, epochs=4.0, max_groups=6, groups_per_batch=3, negatives_per_visit=2, max_heldout=3)
    metrics = [train(s, tmp_path / name) for name in "ab"]
    assert metrics[0] == metrics[1] and metrics[0]["steps"] == 8 == len(visits) / 2
    groups = [group for step in visits for group in step]
    assert all(positive == [True, False, False] for positive, _ in groups) and len({len(step) for step in visits}) == 1
    assert len({rubrics for _, rubrics in groups}) > 6, "of 4 flawed traces always the same 2"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    train(dataclasses.replace(s, seed=1), tmp_path / "c")
    other = load_file(tmp_path / "c" / "model.safetensors")
    assert not all(torch.equal(weights[0][name], other[name]) for name in other)


class Crash(Exception):
    pass


def crash(*args, **kwargs):
    raise Crash


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_long_texts_end_a_training_before_it_begins(copied, monkeypatch, split):
    """Held-out ones too: nothing is cut, and no hours are spent before that is known."""
    path = copied / "groups" / f"{split}.jsonl"
    groups = data.read_groups(path)
    groups[2]["negative_bank"][1]["reasoning"] += " ; negate" * 600
    data.write_groups(path, groups)
    monkeypatch.setattr(rm_module, "rm_loss", crash)
    with pytest.raises(UserError, match="context 512") as error:
        rm_module.main(["--run_dir", str(copied), "--device", "cpu"])
    assert "\n" not in str(error.value) and re.search(r"text of \d{3,} tokens", str(error.value))
    assert not list(copied.glob("rm*"))


def test_the_reward_model_is_saved_before_it_is_measured(copied, monkeypatch):
    """An error in measuring must not cost the training."""
    monkeypatch.setattr(rm_module, "measure_ranking", crash)
    with pytest.raises(Crash):
        rm_module.main(["--run_dir", str(copied), "--device", "cpu", "--epochs", "1"])
    assert not (copied / "rm").exists()
    saved = RubricRewardModel.from_pretrained(copied / "rm.partial", CPU)
    heldout = data.read_groups(copied / "groups" / "heldout.jsonl")[:5]
    assert 0 <= measure_ranking(saved, heldout)["pair_accuracy"] <= 1


def test_a_training_that_diverges_names_step_and_flag(prepared, tmp_path, monkeypatch):
    real, calls = rm_module.rm_loss, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(rm_module, "rm_loss", broken)
    with pytest.raises(FloatingPointError, match="step 2.*--learning_rate"):
        train(settings(prepared), tmp_path / "rm")
    assert not (tmp_path / "rm" / "model.safetensors").exists()


def test_math_and_code_in_one_run_are_refused(tmp_path):
    """Their rubrics have different dimensions; the heads would learn a mixture under one name."""
    mixed = [data.build_groups(data.tiny_problems(task, 2, 0), 2, 0)[0] for task in ("math", "code")]
    for split in ("train", "heldout"):
        data.write_groups(tmp_path / "groups" / f"{split}.jsonl", mixed)
    with pytest.raises(UserError, match="math and code"):
        train(settings(tmp_path), tmp_path / "rm")


def test_equal_texts_get_equal_scores(model, texts):
    """Bit for bit, wherever they stand: a group of equal traces must have no advantage, and rows of one batch differ by
    rounding."""
    many = [texts[i % 3] for i in range(40)] + texts[:7]
    score, dimensions = model.score(many)
    for text in set(many):
        rows = [i for i, other in enumerate(many) if other == text]
        assert len(set(score[rows].tolist())) == 1 and len(set(map(tuple, dimensions[rows].tolist()))) == 1
    assert len(set(score.tolist())) > 2
