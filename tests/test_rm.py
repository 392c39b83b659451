"""rm.py: what is saved is what scores, pooling sees the last token only, the loss and metrics by hand, training."""
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import executor
import rm as rm_module
from data import UserError
from rm import RubricRewardModel, batch_of, measure_ranking, rank_loss, rm_loss

from conftest import command

NAMES = data.DIMENSIONS["math"]


@pytest.fixture(scope="module")
def groups():
    return data.build_groups(data.tiny_problems("math", 8, 0), 4, 0)


@pytest.fixture(scope="module")
def texts(groups):
    found = batch_of(groups, NAMES, 99, None)[0]
    assert len({len(text.split()) for text in found}) > 3, "or padding would not be tested"
    return found


def make(texts, names=NAMES, weights=None):
    """A random model whose scores differ from text to text."""
    tokenizer = executor.tiny_tokenizer(texts)
    torch.manual_seed(0)
    model = RubricRewardModel(executor.tiny_model(len(tokenizer), 32, 1).base_model, tokenizer, names, weights)
    for head in (*model.dimension_heads, model.total_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(texts):
    return make(texts)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


# ---------------------------------------------------------------- saving and loading

def test_scores_survive_saving(texts, tmp_path):
    """The public code kept its label values in buffers that loading leaves uninitialised. Uneven dimension weights
    must not become the default ones."""
    model = make(texts, weights=[5.0, 0.0, 0.0, 0.0, 1.0])
    before = model.score(texts)
    assert before[0].std() > 0.01 and (before[0] - make(texts).score(texts)[0]).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "rm")
    again = RubricRewardModel.from_pretrained(tmp_path / "rm")
    assert all(torch.equal(old, new) for old, new in zip(before, again.score(texts)))


def test_public_names(folder):
    """Other projects read these folders: tensor names, shapes and config keys are those of the public checkpoints."""
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    heads = {f"dimension_heads.{i}.{part}" for i in range(5) for part in ("weight", "bias")}
    assert {name for name in state if not name.startswith("model.")} == heads | {"total_head.weight", "total_head.bias"}
    assert "model.embed_tokens.weight" in state and state["dimension_heads.4.weight"].shape == (5, 32)
    assert config["rm_dimension_names"] == list(NAMES) and config["rm_dimension_weights"] == [0.2] * 5
    assert config["rm_num_labels"] == 5 and config["rm_use_total_head"] is True and "model_type" in config


@pytest.mark.parametrize("change, words", [
    (lambda state, config: state.pop("total_head.weight"), "total_head"),
    (lambda state, config: state.pop("model.norm.weight"), "model.norm"),
    (lambda state, config: state.update(surprise=torch.zeros(1)), "surprise"),
    (lambda state, config: state.update({"total_head.weight": torch.zeros(2, 32)}), "total_head"),
    (lambda state, config: config.update(rm_num_labels=4), "rm_num_labels"),
    (lambda state, config: config.update(rm_use_total_head=False), "rm_use_total_head"),
    (lambda state, config: config.pop("rm_dimension_names"), "rm_dimension_names"),
    (lambda state, config: config.pop("rm_dimension_weights"), "rm_dimension_weights")])
def test_nothing_is_guessed_or_initialised_anew(folder, change, words):
    """A random head or a default weight would score, wrongly."""
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        RubricRewardModel.from_pretrained(folder)


def test_no_folder_no_weights_and_several_files(model, folder, texts, tmp_path):
    with pytest.raises(UserError, match="no reward model"):
        RubricRewardModel.from_pretrained(tmp_path / "nothing")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError):
        RubricRewardModel.from_pretrained(folder)
    for i in (0, 1):                                               # as public 7B checkpoints come
        save_file({name: state[name] for name in sorted(state)[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    assert torch.equal(RubricRewardModel.from_pretrained(folder).score(texts)[0], model.score(texts)[0])


# ---------------------------------------------------------------- pooling and scoring

def test_pooling_reads_the_last_token_and_no_padding(model):
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded, last = ids.clone(), ids.clone()
    padded[1, 2:], last[1, 1] = 11, 12
    with torch.no_grad():
        labels, total = model(ids, mask)
        torch.testing.assert_close(model(padded, mask)[1], total, atol=1e-6, rtol=0)
        alone = model(ids[1:, :2], mask[1:, :2])
        torch.testing.assert_close(alone[1][0], total[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[0][0], labels[1], atol=1e-5, rtol=0)
        assert (model(last, mask)[1][1] - total[1]).abs() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_score_depends_on_its_text_only(model, texts, batch_size):
    """Whatever its place and its batch; equal texts bit for bit, or equal traces would have an advantage."""
    alone = torch.cat([model.score([text])[0] for text in texts])
    torch.testing.assert_close(model.score(texts, batch_size)[0], alone, atol=1e-5, rtol=0)
    score, labels = model.score(texts[::-1] + texts, batch_size)
    torch.testing.assert_close(score[:len(texts)].flip(0), alone, atol=1e-5, rtol=0)
    assert torch.equal(score[:len(texts)].flip(0), score[len(texts):]) and len(set(score.tolist())) > 2
    assert labels.shape == (2 * len(texts), 5) and 0 <= labels.min() and labels.max() <= 4


def test_scores_by_hand(texts):
    """Half rubric (weighted mean of expected labels / 4), half sigmoid of the total."""
    two = make(texts, ("a", "b"), [3.0, 1.0])
    logits = torch.zeros(3, 2, 5)
    logits[1, 0, 4], logits[1, 1, 0] = 1e3, 1e3                    # certain: labels 4 and 0
    logits[2, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 1e-30]).log()
    score, expected = two.scores(logits, torch.tensor([0.0, math.log(3), -1e3]))
    torch.testing.assert_close(expected, torch.tensor([[2.0, 2.0], [4.0, 0.0], [2.0, 2.0]]))
    torch.testing.assert_close(score, torch.tensor([0.5, 0.5 * 0.75 + 0.5 * 0.75, 0.25]))


def test_a_score_that_is_not_finite_raises(texts):
    """NaN is not a reward, and neither is the 0.5 that the paper's code puts in its place."""
    broken = make(texts)
    broken.total_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        broken.score(texts[:2])


def test_what_exceeds_the_context_is_cut(model):
    """A trace may have more tokens when it is read than when it was sampled. That must not end a training."""
    texts = ["has " * 600, "has " * 700]
    ids, mask = model.encode(texts)
    assert ids.shape == (2, 512) and mask.all() and len(set(model.score(texts)[0].tolist())) == 1


def test_public_groups_are_read_as_public_reward_models_were_trained():
    rubric = dict.fromkeys(data.DIMENSIONS["code"], 4) | {"total": 1.0}
    group = {"problem_id": "q", "source": "somewhere", "task_type": "algorithm", "problem": " Sum a list .\n",
             "reference_solution": "", "tests_or_constraints": "at most 9 numbers",
             "positive_pool": [{"reasoning": "\nadd one by one ", "rubric": rubric}],
             "negative_bank": [{"reasoning": "guess", "rubric": rubric, "negative_kind": "x"}]}
    form = ("<task>code</task>\n<type>algorithm</type>\n<problem>\nSum a list .\n</problem>\n<tests>\nat most 9 numbers\n"
            "</tests>\n<reasoning>\n{}\n</reasoning>")
    assert batch_of([group], data.DIMENSIONS["code"], 9, None)[0] == [form.format("add one by one"), form.format("guess")]


# ---------------------------------------------------------------- loss and metrics by hand

def rank_by_hand(score, pairs_of_groups):
    """The mean over the pairs of a group, then over groups."""
    means = [sum(math.log(1 + math.exp(score[worse] - score[better])) for better, worse in pairs) / len(pairs)
             for pairs in pairs_of_groups]
    return sum(means) / len(means)


def test_every_group_counts_the_same_however_many_flawed_traces_it_has():
    score = torch.tensor([0.9, 0.2, 0.8, 0.5, 0.1, 0.6, 0.7])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])                    # group 2 has no pair
    above = torch.zeros(7, 7, dtype=torch.bool)
    above[0, 1:6] = above[4, 5:] = True                            # pairs of two groups count for nothing
    want = rank_by_hand(score.tolist(), [[(0, 1), (0, 2), (0, 3)], [(4, 5)]])
    assert rank_loss(score, above, group).item() == pytest.approx(want, abs=1e-6)


def random_batch(positive, group, gold=None):
    torch.manual_seed(1)
    B = len(positive)
    gold = torch.linspace(1.0, 0.2, B) if gold is None else torch.tensor(gold)
    return (torch.randn(B, 5, 5, requires_grad=True), torch.randn(B, requires_grad=True), torch.randint(0, 5, (B, 5)),
            gold, torch.tensor(positive), torch.tensor(group))


@pytest.mark.parametrize("nn_weight", [0.0, 0.3])
def test_loss_by_hand(model, nn_weight):
    """1.0 * sum_d CE_d + 0.5 * Huber + 0.7 * ranking (+ nn_weight * ranking of flawed traces), in scalars."""
    logits, total, labels, gold, positive, group = args = random_batch([True, False, False, True, False], [0, 0, 0, 1, 1])
    B, score, ce, huber = 5, [], 0.0, 0.0
    for b in range(B):
        rubric = 0.0
        for d in range(5):
            z = [math.exp(x) for x in logits[b, d].tolist()]
            ce -= math.log(z[labels[b, d]] / sum(z)) / B
            rubric += 0.2 * sum(i * x for i, x in enumerate(z)) / sum(z) / 4
        p = 1 / (1 + math.exp(-total[b].item()))
        huber += 0.5 * (p - gold[b].item()) ** 2 / B               # errors are below 1: the quadratic part
        score.append(0.5 * rubric + 0.5 * p)
    want = ce + 0.5 * huber + 0.7 * rank_by_hand(score, [[(0, 1), (0, 2)], [(3, 4)]])
    want += nn_weight * rank_by_hand(score, [[(1, 2)]])
    assert rm_loss(model, *args, nn_weight=nn_weight).item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("gold, pairs", [
    ([0.40, 0.25], [(0, 1)]), ([0.35, 0.20], [(0, 1)]), ([0.85, 1.0], [(1, 0)]), ([0.40, 0.26], []), ([0.3, 0.3], []),
    ([0.6, 0.4, 0.3, 0.2], [(0, 1), (0, 2), (0, 3), (1, 3)])])
def test_flawed_traces_015_apart_are_a_pair(model, gold, pairs):
    """The rubrics have gaps of exactly 0.15; rounding must not make some of them count and others not."""
    args = random_batch([False] * len(gold), [0] * len(gold), gold)
    score = model.scores(*args[:2])[0].tolist()
    extra = rm_loss(model, *args, nn_weight=1).item() - rm_loss(model, *args, nn_weight=0).item()
    assert extra == pytest.approx(rank_by_hand(score, [pairs]) if pairs else 0.0, abs=1e-5)


@pytest.mark.parametrize("positive", [[True, True], [False, False]])
def test_a_batch_without_pairs_has_a_finite_loss(model, positive):
    args = random_batch(positive, [0, 1])
    loss = rm_loss(model, *args, nn_weight=0.5)
    loss.backward()
    assert loss.isfinite() and args[0].grad.isfinite().all() and args[1].grad.isfinite().all()


class Known:
    """A reward model whose score of a text is looked up."""
    dimension_names = NAMES

    def __init__(self, scores, labels):
        self.scores, self.labels = scores, labels

    def score(self, texts):
        found = [next(key for key in self.scores if f">{key}<" in text.replace("\n", "")) for text in texts]
        return torch.tensor([self.scores[key] for key in found]), torch.tensor([self.labels[key] for key in found])


def group_of(name, positives, negatives):
    def rubric(total):
        return dict(zip(NAMES, (4, 3, 2, 1, 0)), total=total)
    return {"problem_id": name, "source": "somewhere", "task_type": "math", "problem": "a problem",
            "reference_solution": "1", "positive_pool": [{"reasoning": r, "rubric": rubric(t)} for r, t in positives],
            "negative_bank": [{"reasoning": r, "negative_kind": k, "rubric": rubric(t)} for r, k, t in negatives]}


def test_metrics_by_hand():
    """Ties count as wrong: a model that gives every trace one score must not look good. A group is right if each of
    its positives stands above each of its negatives."""
    scores = {"p": 0.9, "q": 0.5, "r": 0.9, "s": 0.8, "t": 0.1, "u": 0.7, "v": 0.6, "w": 0.3, "x": 0.4}
    labels = {key: [4.4, 3.4, 1.4, 1.0, 0.0] for key in scores} | {"t": [3.6, 2.4, 2.0, 1.0, 0.0]}
    found = measure_ranking(Known(scores, labels), [
        group_of("1", [("p", 0.9)], [("q", "slip", 0.5), ("r", "leak", 0.2)]),
        group_of("2", [("s", 0.8)], [("t", "slip", 0.3), ("u", "leak", 0.7)]),
        group_of("3", [("v", 0.6), ("w", 0.3)], [("x", "slip", 0.4)])])
    assert found["groups"] == 3 and found["pair_accuracy"] == pytest.approx(4 / 6) and found["group_accuracy"] == pytest.approx(1 / 3)
    assert found["pair_accuracy_slip"] == 0.75 and found["pair_accuracy_leak"] == 0.5
    assert found["total_mae"] == pytest.approx((0.7 + 0.2) / 9, abs=1e-6)
    assert [found[f"accuracy_{name}"] for name in NAMES] == pytest.approx([1.0, 8 / 9, 1 / 9, 1.0, 1.0])


# ---------------------------------------------------------------- training

def test_flawed_traces_are_drawn_anew_at_each_visit(groups):
    rng, seen = random.Random(0), set()
    for _ in range(20):
        texts, labels, gold, positive, group = batch_of(groups[:2], NAMES, 2, rng)
        assert positive.tolist() == [True, False, False] * 2 and group.tolist() == [0, 0, 0, 1, 1, 1]
        seen.add(tuple(texts[1:3]))
    every, labels, gold, positive, _ = batch_of(groups[:1], NAMES, 10**6, rng)
    assert len(seen) > 5 and {text for pair in seen for text in pair} == set(every[1:])
    rubric = groups[0]["negative_bank"][0]["rubric"]
    assert labels[1].tolist() == [rubric[name] for name in NAMES] and gold[1].item() == pytest.approx(rubric["total"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder with groups and a base model that is close to random."""
    run_dir = tmp_path_factory.mktemp("runs") / "code"
    command(data, *f"--run_dir {run_dir} --task_type code --train 60 --heldout 60".split())
    command(executor, *f"--run_dir {run_dir} --sequences 64 --hidden 32 --layers 1 --eval_problems 2 --max_answer_tokens 4 "
            "--device cpu".split())
    return run_dir


@pytest.fixture
def run_dir(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "code"))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("flags", ["--learning_rate 3e-3", "--learning_rate 1e-2 --lora_rank 4 --lora_alpha 16"])
def test_training_beats_chance_and_measures_what_it_saved(run_dir, flags):
    """From a random backbone. With an adapter only the adapted matrices change, by no more than an adapter can."""
    flags = f"--run_dir {run_dir} --device cpu --epochs 12 --max_heldout 60 {flags}".split()
    out = command(rm_module, *flags)
    metrics = json.loads((run_dir / "rm" / "metrics.json").read_text())
    assert metrics["groups"] == 60 and metrics["pair_accuracy"] > 0.65, metrics
    assert f"{metrics['pair_accuracy']:.3f}" in out and f"next: python tracelift.py train --run_dir {run_dir}" in out
    loaded = RubricRewardModel.from_pretrained(run_dir / "rm")
    again = measure_ranking(loaded, data.read_groups(run_dir / "groups" / "heldout.jsonl"))
    assert again == {key: metrics[key] for key in again}
    after, base = weights_of(run_dir / "rm"), weights_of(run_dir / "base")
    if "--lora_rank" in flags:
        for name in (name for name in after if name.startswith("model.")):
            change = after[name] - base[name]
            assert torch.linalg.matrix_rank(change, rtol=1e-4) in range(1, 5) if "proj" in name else not change.any(), name
    stamp = (run_dir / "rm" / "model.safetensors").stat().st_mtime_ns
    command(rm_module, *flags)                                     # complete: skipped
    assert (run_dir / "rm" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit):
        command(rm_module, *flags, "--nn_weight", "0.5")


def test_a_backbone_in_bfloat16_is_trained_saved_and_loaded_in_it(run_dir, monkeypatch):
    """As a large one is on a GPU: adapter and heads learn in float32, and the heads stay in it."""
    monkeypatch.setattr(executor, "work_dtype", lambda model: torch.bfloat16)
    command(rm_module, *f"--run_dir {run_dir} --device cpu --epochs 1 --lora_rank 4 --checkpointing 1".split())
    state, base = weights_of(run_dir / "rm"), weights_of(run_dir / "base")
    assert all(x.dtype == (torch.float32 if "head" in name else torch.bfloat16) for name, x in state.items())
    assert torch.equal(state["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16())
    loaded = RubricRewardModel.from_pretrained(run_dir / "rm")
    assert loaded.model.dtype == torch.bfloat16 and loaded.total_head.weight.dtype == torch.float32


class Crash(Exception):
    pass


def crash_at(monkeypatch, call, value=None):
    """At this call rm_loss fails, or its loss is multiplied by `value`."""
    real, calls = rm_module.rm_loss, []

    def fragile(*args):
        calls.append(1)
        if len(calls) == call and value is None:
            raise Crash
        return real(*args) * (value if len(calls) == call else 1)
    monkeypatch.setattr(rm_module, "rm_loss", fragile)


FLAGS = "--device cpu --epochs 2 --groups_per_batch 6 --negatives_per_visit 2 --max_heldout 5 --warmup 2".split()


def test_a_stopped_training_ends_like_a_straight_one(run_dir, tmp_path):
    straight = Path(shutil.copytree(run_dir, tmp_path / "straight"))
    command(rm_module, *FLAGS, "--run_dir", straight)
    with pytest.MonkeyPatch.context() as m, pytest.raises(Crash):
        crash_at(m, 12)
        command(rm_module, *FLAGS, "--run_dir", run_dir)
    assert not (run_dir / "rm").exists()
    torch.manual_seed(7)
    command(rm_module, *FLAGS, "--run_dir", run_dir)
    assert same(weights_of(run_dir / "rm"), weights_of(straight / "rm"))
    assert json.loads((run_dir / "rm" / "metrics.json").read_text()) == json.loads((straight / "rm" / "metrics.json").read_text())
    assert not list((run_dir / "rm").glob("progress*"))


def test_an_error_in_measuring_does_not_cost_the_training(run_dir, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(TypeError):
        m.setattr(rm_module, "measure_ranking", None)
        command(rm_module, *FLAGS, "--run_dir", run_dir)
    monkeypatch.setattr(rm_module, "train_reward_model", None)
    assert "pair accuracy" in command(rm_module, *FLAGS, "--run_dir", run_dir)


def test_a_training_that_diverges_names_step_and_flag(run_dir, monkeypatch, capsys):
    crash_at(monkeypatch, 3, value=math.nan)
    with pytest.raises(SystemExit):
        command(rm_module, *FLAGS, "--run_dir", run_dir)
    said = capsys.readouterr().err
    assert "step 2" in said and "--learning_rate" in said and not (run_dir / "rm").exists()


def long_trace(groups):
    groups[2]["negative_bank"][1]["reasoning"] += " ; negate" * 600


def no_flaw(groups):
    groups[2]["negative_bank"] = []


def other_domain(groups):
    groups[2:3] = data.build_groups(data.tiny_problems("math", 1, 0), 2, 0)


@pytest.mark.parametrize("change, words", [(long_trace, "context is 512"), (no_flaw, "flawed trace"), (other_domain, "group")])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_groups_that_cannot_be_ranked_or_read_end_it_before_it_begins(run_dir, monkeypatch, capsys, split, change, words):
    path = run_dir / "groups" / f"{split}.jsonl"
    groups = data.read_groups(path)
    change(groups)
    data.write_groups(path, groups)
    (run_dir / "base" / "settings.json").unlink()                  # else the base model is not of these groups
    crash_at(monkeypatch, 1)
    with pytest.raises(SystemExit):
        command(rm_module, *FLAGS, "--run_dir", run_dir)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said and groups[2]["problem_id"] in said and not list(run_dir.glob("rm*"))


def test_a_public_reward_model_is_used_as_it_is(run_dir, model):
    model.save_pretrained(run_dir / "rm")
    assert "used as it is" in command(rm_module, *FLAGS, "--run_dir", run_dir)
