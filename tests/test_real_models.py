"""What a pretrained model needs before GRPO can teach it: a cold start, and problems on which it sometimes succeeds.

    python -m pytest tests/test_real_models.py
"""
import json
import shutil
import zlib

import pytest
import torch

import data
import executor
import tracelift
import verify
from data import UserError

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")


def question(i):
    """One GSM8K line of two calculations, none like another."""
    a, b, c = 3 + i, 2 + i % 5, 1 + i % 3
    name = NAMES[i % len(NAMES)]
    text = f"{name} has {a} bags of {b} nuts and eats {c}. How many nuts has {name} now?"
    return {"question": text, "answer": f"There are {a}*{b} = <<{a}*{b}={a * b}>>{a * b} nuts in the bags.\n"
            f"Then {a * b}-{c} = <<{a * b}-{c}={a * b - c}>>{a * b - c} nuts are left.\n#### {a * b - c}"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(run folder with groups of 20 + 4 such problems, a random model whose tokenizer covers them)."""
    folder = tmp_path_factory.mktemp("real")
    files = [write(folder / "train.jsonl", map(question, range(20))),
             write(folder / "test.jsonl", map(question, range(20, 24)))]
    data.main(["--run_dir", str(folder / "run"), "--source", "gsm8k", "--train", "20", "--heldout", "4", "--negatives",
               "1",
               "--data", files[0], "--heldout_data", files[1]])
    groups = folder / "run" / "groups"
    problems = [p for split in ("train", "heldout") for p in data.read_problems(groups / f"{split}.jsonl")]
    texts = [text for p in problems for text in (data.planner_prompt(p), data.executor_prompt(p, p.reference_reasoning),
                                                 data.OPEN + p.reference_reasoning + data.CLOSE, "####")]
    tokenizer = executor.tiny_tokenizer(texts)
    torch.manual_seed(0)
    executor.tiny_model(len(tokenizer), hidden=32, layers=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "run", folder / "model"


@pytest.fixture
def run_dir(begun, tmp_path):
    return shutil.copytree(begun[0], tmp_path / "run")


def base_flags(run_dir, model, *more):
    return ["--run_dir", str(run_dir), "--model", str(model), "--device", "cpu", "--eval_problems", "2",
            "--max_answer_tokens", "4", *more]


COLD = ("--cold_start", "20", "--cold_epochs", "6", "--batch_size", "4", "--warmup", "2", "--cold_learning_rate",
        "1e-2")


# ---------------------------------------------------------------- cold start

def test_a_sequence_is_what_will_be_asked_and_what_should_be_answered(begun):
    """Prompts exactly as they are encoded later; no loss on them; loss on the answer and on its end."""
    _, tokenizer = executor.load(str(begun[1]), "cpu")
    problems = data.read_problems(begun[0] / "groups" / "train.jsonl")
    alone = 0
    for problem in problems:
        trace = problem.reference_reasoning
        (planner, wrote), (asked, finished) = executor.cold_sequences(tokenizer, problem, 0)
        prompt = data.encode_prompt(tokenizer, data.planner_prompt(problem))
        learned = tokenizer(f"<reasoning>{trace}</reasoning>")["input_ids"] + [tokenizer.eos_token_id]
        assert planner == prompt + learned[:-1] and wrote == [executor.IGNORE] * (len(prompt) - 1) + learned
        assert data.extract_reasoning(tokenizer.decode(learned, skip_special_tokens=True)) == trace
        assert "= ?" in trace
        answer = [label for label in finished if label != executor.IGNORE]
        number = tokenizer.decode(answer[:-1])
        assert verify.math_equal(verify.extract_answer(number), problem.reference_solution)
        prompts = [data.encode_prompt(tokenizer, data.executor_prompt(problem, t)) for t in (trace, None)]
        begins = [asked[:len(p)] == p and len(asked) == len(finished) == len(p) + len(answer) - 1 for p in prompts]
        assert begins.count(True) == 1
        alone += begins[1]
    assert 0 < alone < 10


def test_programs_are_answered_in_a_block(monkeypatch):
    monkeypatch.setattr(executor, "role_sequence", lambda tokenizer, prompt, completion: completion)
    problem = data.Problem("c", "mine", "code", "set x to 3", "x = 3", [{"assert": "assert x == 3"}], "Assign it.")
    wrote, finished = executor.cold_sequences(None, problem, 0)
    assert wrote == "<reasoning>Assign it.</reasoning>"
    assert verify.run_programs([verify.code_blocks(finished)], [problem.tests])[0].ok


def test_a_cold_start_is_learned_and_becomes_both_roles(begun, run_dir):
    """Its loss falls on problems that it has not seen; planner and executor are then the saved model."""
    executor.main(base_flags(run_dir, begun[1], *COLD))
    base = run_dir / "base"
    assert executor.base_of(run_dir) == str(base) and not (base / "progress.pt").exists()
    assert executor.base_record(run_dir)["train_loss"] > 0
    heldout = data.read_problems(run_dir / "groups" / "heldout.jsonl")
    losses = []
    for folder in begun[1], base:
        model, tokenizer = executor.load(str(folder), "cpu")
        sequences = [s for problem in heldout for s in executor.cold_sequences(tokenizer, problem, 0)]
        losses.append(executor.heldout_loss(executor.LM(model, tokenizer), sequences, batch_size=4))
    assert losses[1] < 0.6 * losses[0]
    with pytest.raises(UserError, match="--cold_start"):                  # another model would come out
        executor.main(base_flags(run_dir, begun[1], *COLD, "--cold_start", "19"))


@pytest.mark.parametrize("stop_at", ["training", "check"])
def test_a_stopped_cold_start_goes_on_bit_for_bit(begun, run_dir, tmp_path, monkeypatch, stop_at):
    """Weights, optimizer, order of the batches, the held-out minimum. A finished training is not done again."""
    undisturbed = shutil.copytree(run_dir, tmp_path / "other")
    executor.main(base_flags(undisturbed, begun[1], *COLD))
    saves, save = [], executor.save_progress

    def stop(*args):
        save(*args)
        saves.append(args)
        if len(saves) == 3 and stop_at == "training":
            raise KeyboardInterrupt

    def stop_check(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executor, "save_progress", stop)
        if stop_at == "check":
            patch.setattr(executor.Executor, "run", stop_check)
        executor.main(base_flags(run_dir, begun[1], *COLD))
    assert (run_dir / "base.partial" / "progress.pt").exists()
    steps, descend = [], executor.descend
    monkeypatch.setattr(executor, "descend", lambda *args: steps.append(1) or descend(*args))
    executor.main(base_flags(run_dir, begun[1], *COLD))
    assert 0 < len(steps) < 57 if stop_at == "training" else not steps
    for name in "model.safetensors", "base.json":
        assert (run_dir / "base" / name).read_bytes() == (undisturbed / "base" / name).read_bytes()


def without_traces(groups):
    groups[2]["positive_pool"] = []


def without_answer(groups):
    groups[1]["reference_solution"] = "who knows"


@pytest.mark.parametrize("damage, more, said", [
    (without_traces, COLD, r"train.jsonl: group gsm8k-train-\d+ has no reference trace"),
    (without_answer, COLD, r"train.jsonl: group gsm8k-train-\d+ .*no final answer"),
    (None, (*COLD, "--cold_start", "21"), "--cold_start 21: .*train.jsonl has 20 groups"),
    (None, ("--cold_epochs", "2"), "--cold_epochs .*has no effect without --cold_start"),
    (None, (*COLD, "--hidden", "64"), "--hidden .*has no effect with --model"),
    (None, ("--chat_template_kwargs", "[1"), "--chat_template_kwargs: must be a JSON object"),
    (None, ("--chat_template_kwargs", '{"think": true}'), "chat template has no think")])
def test_a_cold_start_that_cannot_be(begun, run_dir, damage, more, said):
    path = run_dir / "groups" / "train.jsonl"
    if damage:
        groups = data.read_groups(path)
        damage(groups)
        data.write_groups(path, groups)
    with pytest.raises(UserError, match=said):
        executor.main(base_flags(run_dir, begun[1], *more))
    assert not (run_dir / "base").exists()


def test_the_tiny_world_has_no_cold_start(tmp_path):
    data.main(["--run_dir", str(tmp_path), "--train", "3", "--heldout", "3"])
    with pytest.raises(UserError, match="--cold_start .*has no effect without --model"):
        executor.main(["--run_dir", str(tmp_path), "--cold_start", "2"])


def test_only_easy_problems(begun, tmp_path):
    """--max_calculations counts what a solution annotates."""
    hard = {"question": "Ina adds 1 and 2 and 3 and 4 nuts. How many?",
            "answer": "1+2=<<1+2=3>>3\n3+3=<<3+3=6>>6\n6+4=<<6+4=10>>10 nuts\n#### 10"}
    rows = [question(i) for i in range(3)] + [hard]
    train = write(tmp_path / "a.jsonl", rows)
    flags = ["--source", "gsm8k", "--heldout", "2", "--negatives", "1", "--data", train, "--heldout_data",
             write(tmp_path / "b.jsonl", map(question, range(3, 8)))]
    data.main([*flags, "--run_dir", str(tmp_path / "easy"), "--train", "3", "--max_calculations", "2"])
    kept = data.read_groups(tmp_path / "easy" / "groups" / "train.jsonl")
    assert sorted(group["problem"] for group in kept) == sorted(row["question"] for row in rows[:3])
    with pytest.raises(UserError, match="--max_calculations"):
        data.main(["--run_dir", str(tmp_path / "tiny"), "--max_calculations", "2"])


# ---------------------------------------------------------------- problems that can teach

@pytest.fixture
def based(begun, run_dir, monkeypatch):
    """A run with its base model. Random models never succeed: here an output passes now and then, and for some problems
    never or always."""
    executor.main(base_flags(run_dir, begun[1]))

    def lots(output, reference):
        number = int(reference.rpartition("#### ")[2])
        return number % 5 == 0 or number % 5 > 1 and zlib.crc32(output.encode()) % 2 == 0

    monkeypatch.setattr(verify, "extract_answer", lambda output: output)
    monkeypatch.setattr(verify, "math_equal", lots)
    return run_dir


def select_flags(run_dir, *more):
    return ["select", "--run_dir", str(run_dir), "--device", "cpu", "--problems", "14", "--group_size", "3",
            "--max_trace_tokens", "6", "--max_answer_tokens", "4", *more]


def kept_in(run_dir):
    return [group["problem_id"] for group in data.read_groups(run_dir / "selected" / "train.jsonl")]


def test_training_keeps_to_the_selection(based):
    flags = ["train", "--run_dir", str(based), "--device", "cpu", "--mode", "exec_only", "--steps", "2", "--warmup",
             "1",
             "--problems_per_step", "2", "--group_size", "3", "--max_trace_tokens", "6", "--max_answer_tokens", "4",
             "--save_every", "1", "--groups", "selected/train.jsonl"]
    with pytest.raises((UserError, OSError), match="selected/train.jsonl"):
        tracelift.main(flags)
    tracelift.main(select_flags(based))
    tracelift.main(flags)
    texts = {p.problem for p in data.read_problems(based / "selected" / "train.jsonl")}
    samples = (based / "planner-exec_only-seed0" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem"] for line in samples} <= texts


@pytest.mark.parametrize("more, said", [
    (("--lowest", "0.4", "--highest", "0.5"), "--lowest 0.4, --highest 0.5: no problem lies between"),
    (("--group_size", "1"), "group_size"), (("--lowest", "-1"), "lowest")])
def test_a_selection_that_cannot_be(based, more, said):
    with pytest.raises(UserError, match=said):
        tracelift.main(select_flags(based, *more))
    assert not (based / "selected").exists()


# ---------------------------------------------------------------- decoding

def test_the_head_is_not_copied_for_every_row(tiny):
    """torch's product of a slice of hidden states with the head is one product per row with its own copy of the head:
    64 rows of 49,152 tokens took 4 s in bfloat16, where 0.015 are enough, and 200 rows 11 GB."""
    _, model, tokenizer = tiny
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda layer,
                                                   args: seen.append((args[0].shape, args[0].is_contiguous())))
    try:
        executor.generate(model, [[5, 6, 7, 8], [5, 6, 7]], num_samples=2, max_new_tokens=2, temperature=0, eos_id=1)
    finally:
        hook.remove()
    assert [(tuple(shape), whole) for shape, whole in seen] == [((2, 1, 32), True), ((4, 1, 32), True)]
