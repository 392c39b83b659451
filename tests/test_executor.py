"""executor.py: decoding against transformers' own, the frozen executor against canned outputs, supervised training.

    python -m pytest tests/test_executor.py
    python -m pytest tests/test_executor.py -m slow          # every family that the installed transformers has
"""
import copy
import dataclasses
import json
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import data
import executor
import rm
import verify
from data import BaseExample, Problem, UserError
from executor import IGNORE, LM, Completions, Executor, base_sequence, finetune, generate, sample, uniform_numbers

V, PAD = 40, 0
EXAMPLE = BaseExample("Mia has 7 .\n", "<reasoning>7 + 5 = ?</reasoning>", True, "\nAnswer:", " 12")
DIGITS = "0123456789 0 1 2 3 4 5 6 7 8 9"
PROMPTS = [[5, 9, 3, 22, 7, 8, 30], [11], [4, 4, 17], [29, 6, 13, 2], [12, 35]]     # ragged, not in order of length


def random_model(kind, context=64):
    """Wide initial weights: the logits differ by more than rounding, so greedy choices are no coin tosses."""
    torch.manual_seed(3)
    config, cls = (Qwen2Config, Qwen2ForCausalLM) if kind == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    return cls(config(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      intermediate_size=48, max_position_embeddings=context, initializer_range=0.4, bos_token_id=None,
                      eos_token_id=None, pad_token_id=PAD)).eval()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


@torch.no_grad()
def reference(model, prompt, steps):
    """Greedy continuation by transformers, one prompt at a time, without padding and without an EOS."""
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps,
                          pad_token_id=PAD)[0, len(prompt):].tolist()


@torch.no_grad()
def score(model, prompt, tokens, temperature=1.0):
    """Log-probs of `tokens` after `prompt`, from one forward pass without cache or padding."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def an_eos(rows):
    """A token at which the rows end at many different steps, some of them never."""
    ends = lambda t: {row.index(t) if t in row else -1 for row in rows}
    return max(range(V), key=lambda t: len(ends(t)))


def greedy(model, prompts, **options):
    return generate(model, prompts, **{"temperature": 0, "max_new_tokens": 12, "eos_id": -1, **options})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def words():
    return executor.tiny_tokenizer([EXAMPLE.prompt + EXAMPLE.trace + EXAMPLE.ask + EXAMPLE.answer, DIGITS])


def small(words, hidden=16, layers=1):
    """A random LM of that tokenizer, the same each time."""
    torch.manual_seed(0)
    return LM(executor.tiny_model(len(words), hidden, layers), words)


# ---------------------------------------------------------------- decoding


def test_greedy_equals_transformers(model):
    """Positions, masks and cache of ragged, left-padded prompts are right when every token is; then the same with EOS
    ids that end the rows at different steps: each is kept, and nothing comes after it."""
    whole = [reference(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in whole}) == len(PROMPTS)      # else nothing could be mixed up
    assert greedy(model, PROMPTS).tokens == whole
    eos = an_eos(whole)
    for ends in ({eos}, {eos, whole[1][2]}):
        cut = [row[:min((row.index(e) + 1 for e in ends if e in row), default=12)] for row in whole]
        assert len({len(row) for row in cut}) > 2
        stopped = greedy(model, PROMPTS, eos_id=list(ends))
        assert stopped.tokens == cut and [len(row) for row in stopped.logprobs] == [len(row) for row in cut]
    assert greedy(model, PROMPTS, eos_id=eos).tokens == greedy(model, PROMPTS, eos_id=[eos]).tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_scored_ones(model, temperature):
    """The sampler is the scorer: the same temperature in both, also for rows that went on after others had stopped."""
    eos = 7
    out = generate(model, PROMPTS, num_samples=8, max_new_tokens=10, temperature=temperature, eos_id=eos,
                   generator=seeded())
    assert len({len(tokens) for tokens in out.tokens}) > 2
    for i, (tokens, logprobs) in enumerate(zip(out.tokens, out.logprobs)):
        assert logprobs == pytest.approx(score(model, PROMPTS[i // 8], tokens, temperature), abs=1e-4)
        assert eos not in tokens[:-1] and (tokens[-1] == eos or len(tokens) == 10)


def test_samples_are_prompt_major_and_differ(llama):
    """Those of prompt 0, then those of prompt 1, whatever the order of decoding; as many of each as asked for."""
    single = greedy(llama, PROMPTS).tokens
    assert greedy(llama, PROMPTS, num_samples=3).tokens == [row for row in single for _ in range(3)]
    counts = [2, 1, 4, 1, 3]
    assert greedy(llama, PROMPTS, num_samples=counts).tokens == [row for row, S in zip(single, counts)
                                                                 for _ in range(S)]
    out = generate(llama, PROMPTS, num_samples=6, max_new_tokens=6, eos_id=-1, generator=seeded())
    for n in range(len(PROMPTS)):
        assert len({tuple(row) for row in out.tokens[n * 6:n * 6 + 6]}) > 1


def test_uniform_numbers_are_a_function_of_the_key():
    """On every machine and in every order. Old trainings depend on them."""
    rows = uniform_numbers(["run 0 1 gsm8k-7 0 2", "b", "a" * 99], 5)
    assert rows.dtype == torch.float64 and rows.shape == (3, 5) and rows.min() >= 0 and rows.max() < 1
    assert torch.equal(uniform_numbers(["b"], 3)[0], rows[1, :3])
    assert rows[0, 0].item() == random.Random("run 0 1 gsm8k-7 0 2").random()
    assert uniform_numbers([], 4).shape == (0, 4)


def test_what_a_row_becomes_depends_on_its_own_numbers_alone(llama):
    """Not on the batch, not on its place in it, not on the limit of the cache, not on any generator."""
    names = [f"{n} {s}" for n in range(len(PROMPTS)) for s in range(3)]
    options = {"max_new_tokens": 9, "eos_id": 7, "temperature": 0.8}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = generate(llama, PROMPTS, num_samples=3, uniforms=uniform_numbers(names, 9), **options)
    assert torch.equal(torch.get_rng_state(), state) and len({tuple(row) for row in whole.tokens}) > 10
    for limit in (1, 60):
        assert generate(llama, PROMPTS, num_samples=3, uniforms=uniform_numbers(names, 12), max_cache_tokens=limit,
                        **options).tokens == whole.tokens
    for n in (4, 1):
        own = uniform_numbers(names[3 * n + 1:3 * n + 2], 9)
        assert generate(llama, [PROMPTS[n]], uniforms=own, **options).tokens == [whole.tokens[3 * n + 1]]


@torch.no_grad()
def test_sampled_frequencies_are_the_probabilities_of_the_model(llama):
    """Of whole sequences of two tokens, by chi-square: what `generate` samples is the softmax of what the model says,
    in both steps, with the temperature, for two prompts decoded together."""
    temperature, count, model = 1.5, 4000, random_model("llama")
    model.lm_head.weight.data[8:] = 0
    bias = torch.full((V,), -1e9).index_fill(0, torch.arange(8), 0)
    model.lm_head.bias = torch.nn.Parameter(bias)                  # eight tokens are possible
    prompts = PROMPTS[2:4]
    out = generate(model, prompts, num_samples=count, max_new_tokens=2, temperature=temperature, eos_id=-1,
                   uniforms=uniform_numbers([f"frequencies {i}" for i in range(2 * count)], 2), max_cache_tokens=10**6)
    for n, prompt in enumerate(prompts):
        first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        second = (model(torch.tensor([prompt + [t] for t in range(8)])).logits[:, -1] / temperature).softmax(-1)
        wanted = (first[:8, None] * second[:, :8]).flatten().double() * count
        found = torch.zeros(64, dtype=torch.float64)
        for a, b in out.tokens[n * count:(n + 1) * count]:
            found[8 * a + b] += 1
        likely = wanted >= 5                                       # the usual condition of the test
        rest = torch.stack([found[~likely].sum(), wanted[~likely].sum()])
        chi = ((found - wanted)[likely] ** 2 / wanted[likely]).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
        freedom = int(likely.sum())
        assert freedom > 20 and chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)


def test_a_small_cache_changes_nothing(llama, monkeypatch):
    """Many batches or one: the same results in the same places, and no cache beyond the limit but for one prompt."""
    shapes, real = [], executor.StaticCacheLayer.reorder_cache
    monkeypatch.setattr(executor.StaticCacheLayer, "reorder_cache",
                        lambda self, rows: (shapes.append((len(rows), self.slots)), real(self, rows))[1])
    whole = greedy(llama, PROMPTS, num_samples=2)
    for limit in (1, 60, 1024):
        del shapes[:]
        assert greedy(llama, PROMPTS, num_samples=2, max_cache_tokens=limit).tokens == whole.tokens
        assert all(rows * slots <= limit or rows == 2 for rows, slots in shapes), shapes
        assert len({slots for _, slots in shapes}) > 1 or limit == 1024


def forwards(model, monkeypatch):
    """The shapes of all later forward passes."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **k: (shapes.append(tuple(k["input_ids"].shape)), forward(**k))[1])
    return shapes


def test_one_prefill_for_all_samples_and_finished_rows_leave(llama, monkeypatch):
    """What makes K runs cheap: a prompt is read once however many samples follow. Finished rows leave as soon as they
    are a quarter of the batch, and nothing is decoded once all have finished."""
    shapes = forwards(llama, monkeypatch)
    whole = greedy(llama, PROMPTS).tokens
    del shapes[:]
    out = greedy(llama, PROMPTS, num_samples=4, max_new_tokens=10, eos_id=an_eos(whole))
    assert shapes[0] == (len(PROMPTS), 7) and {width for _, width in shapes[1:]} == {1}
    rows, wanted = 20, []
    for step in range(1, 10):
        alive = sum(len(t) > step for t in out.tokens)
        rows = alive if alive <= 0.75 * rows else rows
        wanted += [rows] if alive else []
    assert [rows for rows, _ in shapes[1:]] == wanted and len(set(wanted)) > 1
    del shapes[:]
    greedy(llama, PROMPTS[:1], num_samples=3, eos_id=whole[0][0])
    assert shapes == [(1, 7)]                                      # EOS at once


@pytest.mark.parametrize("temperature, eos", [(0, -1), (0.8, [7, 9, 20, 33])])
def test_a_captured_step_computes_the_same(llama, monkeypatch, temperature, eos):
    """With a stand-in for the CUDA graph: fixed tensors, all slots, and a bias that hides the empty ones."""
    options = {"num_samples": 3, "temperature": temperature, "eos_id": eos, "max_new_tokens": 20,
               "uniforms": uniform_numbers([str(i) for i in range(15)], 20)}
    wanted, replays, captures = greedy(llama, PROMPTS, **options), [], []

    def capture(run):
        output = run().clone()
        captures.append(output.shape)
        return lambda: replays.append(output.copy_(run())), output
    monkeypatch.setattr(executor, "capture", capture)
    monkeypatch.setattr(executor, "decoding_step", executor.captured_step)
    found = greedy(llama, PROMPTS, **options)
    assert found.tokens == wanted.tokens and len(replays) == max(map(len, wanted.tokens)) - 1 + len(captures)
    for ours, theirs in zip(found.logprobs, wanted.logprobs):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("damage", ["raises", "differs"])
def test_a_capture_that_fails_is_said_once(llama, monkeypatch, capsys, damage):
    """Or that computes something else. Decoding goes on without, from the same slot."""
    wanted, real = greedy(llama, PROMPTS, max_new_tokens=6), executor.decoding_step

    def capture(run):
        output = run()
        if damage == "raises":
            raise ValueError("operation not permitted\nwhen stream is capturing")
        return lambda: None, output + 0.1

    class OnCuda(torch.Tensor):
        is_cuda = True
    monkeypatch.setattr(executor, "capture", capture)
    monkeypatch.setattr(executor, "GRAPHS", True)
    monkeypatch.setattr(executor, "decoding_step", lambda model, cache, mask, first: real(
        model, cache, mask.as_subclass(OnCuda), first))
    for _ in range(2):
        assert greedy(llama, PROMPTS, max_new_tokens=6).tokens == wanted.tokens
    said = capsys.readouterr().out
    assert said.startswith("decoding goes on without captured steps: ") and said.count("\n") == 1


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_samples": [1, 2]}, {"temperature": -0.1},
                                     {"prompts": [[1], []]}])
def test_bad_arguments(llama, options):
    with pytest.raises(ValueError, match="prompts that are not empty"):
        greedy(llama, **{"prompts": PROMPTS, **options})


def test_the_context_is_not_overrun(llama):
    """Beyond it the positions were never trained and the output is noise that looks like an answer."""
    assert greedy(llama, [[1] * 60], max_new_tokens=4).tokens
    with pytest.raises(executor.ContextError, match="61 tokens.*4 new.*64"):
        greedy(llama, [[1], [1] * 61], max_new_tokens=4)


def test_what_counts_as_context():
    """Not a window; longrope's original length, beyond which a batch is computed with other
    frequencies; the tokens up to which sparse attention sees all."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "intermediate_size": 8, "max_position_embeddings": 64}
    assert executor.context_of(LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))) == 32
    assert executor.context_of(LlamaForCausalLM(LlamaConfig(**sizes))) == 64
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, num_key_value_heads=1,
                                                                         sliding_window=5))
    assert executor.context_of(mistral) == 64
    sparse = tiny_of("deepseek_v32", index_topk=32, num_key_value_heads=4), tiny_of("doge", keep_window_size=32)
    assert [executor.context_of(model) for model in sparse] == [32, 32]
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    assert executor.context_of(bloom) == float("inf")


LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


def drawn(logits, temperature, seed=0):
    return sample(logits, temperature, torch.rand(len(logits), dtype=torch.float64, generator=seeded(seed)))


@pytest.mark.parametrize("draw, wanted", [(0.0, 0), (0.149, 0), (0.151, 1), (0.649, 1), (0.651, 2), (0.699, 2),
                                          (0.701, 3), (0.999, 3)])
def test_a_token_is_the_inverse_of_the_cumulative_distribution(draw, wanted):
    token, logp = sample(LOGITS, 1.0, torch.tensor([draw]))
    assert token.tolist() == [wanted] and torch.allclose(logp, LOGITS[0, wanted])


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_no_draw_gives_an_impossible_token(draw):
    """The least and the greatest number of `draws`: the first and the last token of positive probability."""
    logits = torch.full((3, 50000), -float("inf"))
    logits[:, 7:40001] = torch.randn(3, 39994, generator=seeded())
    token, logp = sample(logits, 1.0, torch.full((3,), draw, dtype=torch.float64))
    assert torch.isfinite(logp).all() and token.tolist() == [7 if draw == 0 else 40000] * 3


def test_low_precision_logits_are_normalised_in_float32():
    """bf16 log-softmax is off by 1e-2; ratios would be off by percents."""
    logits = torch.randn(4, 5000, generator=seeded()).bfloat16()
    token, logp = drawn(logits, 1.0)
    exact = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert logp.dtype == torch.float32 and torch.allclose(logp.double(), exact, atol=1e-5)


# ---------------------------------------------------------------- families

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads":
         2, "intermediate_size": 48, "max_position_embeddings": 128, "sliding_window": 5, "attention_chunk_size": 5,
         "head_dim": 8, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "vocab_size_per_layer_input":
         64, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "ffn_dim": 48, "word_embed_proj_dim": 32,
         "init_std": 0.4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim":
         8, "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
         "mamba_d_state": 8, "mamba_d_ssm": 64, "state_size": 8, "mamba_chunk_size": 8, "mamba_num_heads": 4,
         "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "embedding_size": 32,
         "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "decoder_layers": 2, "encoder_layers": 2,
         "d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
OWN = {"deepseek_v3": {"num_key_value_heads": 4}, "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
       "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
       "gemma4_text": {"num_kv_shared_layers": 0}, "bamba": {"attn_layer_indices": [1, 3]},
       "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
       "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1}}
# full attention; windows shorter than the prompt; eager; latent keys; convolutions, recurrent states
FAMILIES = ["qwen3", "gpt2", "opt", "phi3", "olmo3", "cohere2", "gemma2", "gemma3_text", "mistral", "gpt_oss",
            "deepseek_v3",
            "lfm2", "qwen3_next", "falcon_h1", "granitemoehybrid", "jamba"]
RAGGED = [[5, 9, 3, 22, 7, 8, 30, 13, 2, 44, 10, 9], [11], [4, 4, 17], [29, 6, 13, 2, 50, 51, 3]]
COUNTS = [2, 1, 3, 1]


def tiny_of(kind, **sizes):
    """A tiny random model of a family of transformers, with wide weights, so that greedy choices are no coin tosses.
    Sizes that are None are left to the family; one that needs other sizes raises whatever it raises."""
    config_class = type(transformers.CONFIG_MAPPING[kind]().get_text_config())
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    given = {**SIZES, **OWN.get(kind, {}), **sizes}
    given = {k: v for k, v in given.items() if k in known and v is not None}
    config = config_class(**given, eos_token_id=None, is_decoder=True)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() < 5e6
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    for p in model.parameters():
        if p.dim() > 1 and p.std() < 0.1:
            torch.nn.init.normal_(p, std=0.3)
        elif p.dim() == 1 and p.numel() and p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.1)
    return model


def compare_family(model, whole, **options):
    """Greedy rows against `whole`, those of transformers one prompt at a time: ragged, several samples, prompts read
    in one pass and in many, rows that leave."""
    wanted = [row for row, S in zip(whole, COUNTS) for _ in range(S)]
    eos = max(range(64), key=lambda t: len({row.index(t) if t in row else -1 for row in whole}))
    cut = [row[:row.index(eos) + 1] if eos in row else row for row in wanted]
    assert greedy(model, RAGGED, num_samples=COUNTS, max_new_tokens=10, **options).tokens == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "PREFILL_TOKENS", 15)
        out = greedy(model, RAGGED, num_samples=COUNTS, max_new_tokens=10, eos_id=eos, **options)
    assert out.tokens == cut
    for row, (prompt, tokens) in enumerate(zip([p for p, S in zip(RAGGED, COUNTS) for _ in range(S)], cut)):
        assert out.logprobs[row] == pytest.approx(score(model, prompt, tokens), abs=2e-3)


def compare_gradient(model):
    """Of the loss over ragged rows, padded on the right, against that of each row alone, by the model's own forward."""
    lm = LM(model, executor.tiny_tokenizer(["a"]))
    rows = [(ids, ids[1:] + [IGNORE]) for ids in RAGGED if len(ids) > 1]
    count = sum(len(ids) - 1 for ids, _ in rows)
    grads = []
    for padded in (True, False):
        model.zero_grad()
        if padded:
            loss = executor.sequence_loss(lm, rows)
        else:
            loss = sum(F.cross_entropy(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0],
                                       torch.tensor(labels),
                                       ignore_index=IGNORE, reduction="sum") for ids, labels in rows) / count
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-6)


@torch.no_grad()
def compare_score(model, folder):
    """A reward model on this backbone: ragged rows, padded on the right, against each row alone and its heads on the
    last hidden state that transformers gives of the whole model; then saved and loaded."""
    tokenizer = executor.tiny_tokenizer(["a b"])
    judge = rm.RubricRewardModel(model.base_model, tokenizer, ["clear", "right"]).eval()
    for head in (*judge.dimension_heads, judge.total_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    ids = executor.pad(RAGGED, PAD, "cpu")
    mask = executor.pad([[1] * len(row) for row in RAGGED], 0, "cpu")
    labels, total = judge(ids, mask)
    assert labels.std() > 0.05 and total.std() > 0.05, "or nothing could be mixed up"
    for n, row in enumerate(RAGGED):
        alone = torch.tensor([row])
        last = model(input_ids=alone, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1]
        wanted = torch.stack([head(last) for head in judge.dimension_heads], dim=1), judge.total_head(last)[0]
        for found in (labels[n:n + 1], total[n:n + 1]), judge(alone, torch.ones_like(alone)):
            assert all(torch.allclose(f, w, atol=1e-4 * float(labels.abs().max())) for f, w in zip(found, wanted))
    judge.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:                    # of Qwen2 transformers would build its own
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: tokenizer)
        again = rm.RubricRewardModel.from_pretrained(folder)(ids, mask)
    assert torch.equal(again[0], labels) and torch.equal(again[1], total)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_decode_and_score_as_transformers_does(kind, capsys, tmp_path):
    model = tiny_of(kind)
    assert executor.check_decoding(model) is False and not capsys.readouterr().out
    whole = [reference(model, prompt, 10) for prompt in RAGGED]
    assert len({tuple(row) for row in whole}) == len(RAGGED)
    compare_family(model, whole)
    compare_gradient(model)
    compare_score(model, tmp_path)


def test_a_family_that_looks_at_padding_is_decoded_in_equal_lengths(capsys):
    """Bart's decoder takes its positions from the cache."""
    model = tiny_of("bart")
    assert LM(model, executor.tiny_tokenizer(["a"])).equal_lengths and "equal length" in capsys.readouterr().out
    compare_family(model, [reference(model, prompt, 10) for prompt in RAGGED], equal_lengths=True)


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "recurrent_gemma"])
def test_families_that_keep_their_state_elsewhere_are_refused_by_name(kind):
    with pytest.raises(UserError, match=f"{kind} models cannot be decoded here"):
        executor.check_decoding(tiny_of(kind))


@pytest.mark.slow
def test_every_family_of_the_installed_transformers(capsys, tmp_path):
    """Equal, equal without padding, or refused by name: nothing is wrong in silence. Prints the matrix, of decoding,
    then of the scores of a reward model on each backbone that decodes."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    matrix = {"equal": [], "equal without padding": [], "refused": [], "wrong in silence": [], "no tiny model": [],
              "score equal": [], "score refused": [], "score wrong in silence": []}
    for kind in sorted(names):
        whole = None
        for sizes in ({}, {"head_dim": None}, {"num_key_value_heads": 4}, {"num_key_value_heads": None},
                      {"head_dim": None, "num_key_value_heads": 4}, {"num_experts_per_tok": 1}):
            try:
                model = tiny_of(kind, **sizes)
                whole = [reference(model, prompt, 10) for prompt in RAGGED]
                break
            except Exception:                                      # these sizes do not fit this family
                continue
        if whole is None or len({tuple(row) for row in whole}) < len(RAGGED):
            matrix["no tiny model"].append(kind)
            continue
        try:
            equal = executor.check_decoding(model)
        except UserError:
            matrix["refused"].append(kind)
            continue
        try:
            compare_family(model, whole, equal_lengths=equal)
            matrix["equal without padding" if equal else "equal"].append(kind)
        except AssertionError as error:
            matrix["wrong in silence"].append(f"{kind} {str(error)[:300]}")
        try:
            compare_score(model, tmp_path / kind)
            matrix["score equal"].append(kind)
        except AssertionError as error:
            matrix["score wrong in silence"].append(f"{kind} {str(error)[:300]}")
        except Exception as error:                                 # loud, when the reward model is made or loaded
            matrix["score refused"].append(f"{kind} ({error!r:.80})")
    with capsys.disabled():
        for outcome, kinds in matrix.items():
            print(f"\n{outcome} ({len(kinds)}): {', '.join(kinds)}")
    assert len(matrix["equal"]) > 100 and not matrix["wrong in silence"]
    assert len(matrix["score equal"]) > 100 and not matrix["score wrong in silence"]


# ---------------------------------------------------------------- scoring and supervised training


@pytest.mark.parametrize("kind, plain", [("llama", True), ("qwen3", True), ("phi3", True), ("gemma2", False),
                                         ("granite", False), ("cohere2", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_scored_as_the_model_computes_them(kind, plain, dtype):
    """At the selected positions, in their order, from rows padded on the right. Gemma caps its logits, Granite and
    Cohere scale them: then they come from the model's own forward pass."""
    model = tiny_of(kind, logits_scaling=2.0).to(dtype)
    model.get_output_embeddings().weight.data *= 20                # a cap of 30 shows
    lm = LM(model, executor.tiny_tokenizer(["a"]))
    assert lm.plain_head == plain
    ids = executor.pad(RAGGED, PAD, "cpu")
    positions = torch.tensor([12 * n + t for n, row in enumerate(RAGGED)
                              for t in range(max(0, len(row) - 2), len(row))])
    with torch.no_grad():
        hidden = lm.hidden(ids, positions)
        wanted = torch.cat([model(torch.tensor([row])).logits[0, -2:] for row in RAGGED])
        assert torch.allclose(lm.head(hidden), wanted, atol=1e-3 if dtype == torch.float32 else 1.0)
        assert torch.equal(lm.hidden(ids, positions.flip(0)), hidden.flip(0)) and len(lm.head(hidden[:0])) == 0


def test_checkpointing_leaves_no_noise_in_training():
    """The policy that is scored has to be the one that was sampled. Dropout goes, a noisy router is refused."""
    model, ids = tiny_of("opt", dropout=0.5, attention_dropout=0.5, layerdrop=0.5), torch.tensor(RAGGED[:1])
    model.add_module("other", torch.nn.Dropout(0.5))
    wanted = model(ids).logits
    executor.enable_checkpointing(model)
    assert torch.equal(model.train()(ids).logits, wanted) and torch.equal(model.other(torch.ones(9)), torch.ones(9))
    with pytest.raises(UserError, match="phimoe models compute something else in training"):
        executor.enable_checkpointing(tiny_of("phimoe", num_key_value_heads=4, router_jitter_noise=0.3))


@pytest.mark.parametrize("device, parameters, native, wanted", [
    ("cuda", 10**9, True, torch.bfloat16), ("cuda", 10**6, True, torch.float32), ("cuda", 10**9, False, torch.float32),
    ("cpu", 10**9, False, torch.float32), ("cpu", 10**9, True, torch.bfloat16), ("cpu", 10**6, True, torch.float32)])
def test_what_matrix_products_are_computed_in(device, parameters, native, wanted, monkeypatch):
    """bfloat16 where the hardware multiplies it (a T4 does not). The tiny world is float32 everywhere."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)

    class Model:
        def parameters(self):
            return [torch.empty(parameters, device="meta")]
    Model.device = torch.device(device)
    assert executor.work_dtype(Model()) == wanted


def test_heldout_loss_is_a_mean_over_tokens(words):
    """However the sequences fall into batches."""
    lm = small(words)
    sequences = [base_sequence(words, EXAMPLE), base_sequence(words, BaseExample("Mia .\n", "", False, "", " 1"))] * 2
    whole = executor.sequence_loss(lm, sequences).item()
    for size in (1, 3, 4):
        assert executor.heldout_loss(lm, sequences, batch_size=size) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("broken", [0, 3])
def test_a_training_that_diverges_says_where_and_what_to_do(words, broken):
    lm, sequences = small(words), [base_sequence(words, EXAMPLE)] * 8
    lm.model.model.norm.register_forward_hook(
        lambda layer, args, output, count=iter(range(99)): output * float("nan") if next(count) >= broken else None)
    with pytest.raises(FloatingPointError, match=f"finetune, step {broken}: .* not finite; .*delete .* lower --learn"):
        finetune(lm, sequences, epochs=1, batch_size=1, learning_rate=1e-3, warmup=1, seed=0)
    assert all(torch.isfinite(p).all() for p in lm.model.parameters())


def test_finetune_teaches_both_roles_and_where_to_stop(words):
    """Eight sequences learned by heart (but for the number in the first line): the loss falls, the planner stops
    after its closing tag, the executor after its answer. A label off by one position, or an EOS
    out of the loss, fails here."""
    examples = [BaseExample(f"Mia has {a} .\n", f"<reasoning>{a} + {b} = ?</reasoning>", True, "\nAnswer:", f" {a + b}")
                for a, b in ((1, 5), (2, 3), (3, 3), (4, 5), (5, 2), (6, 1), (7, 2), (8, 1))]
    sequences = [base_sequence(words, e) for e in examples]
    before = json.dumps(sequences)
    lm = small(words, 32, 2)
    model = lm.model

    @torch.no_grad()
    def loss():
        return sum(F.cross_entropy(model(torch.tensor([ids])).logits[0], torch.tensor(labels),
                                   ignore_index=IGNORE).item()
                   for ids, labels in sequences) / len(sequences)
    first = loss()
    last = finetune(lm, sequences, epochs=120, batch_size=4, learning_rate=8e-3, warmup=10, seed=0)
    assert loss() < 0.3 < 2 < first and last < 0.3
    assert not model.training and json.dumps(sequences) == before
    read = lambda prompt: words.batch_decode(generate(model, [words(prompt)["input_ids"]], temperature=0,
                                                      max_new_tokens=12,
                                                      eos_id=words.eos_token_id).tokens)[0]
    for e in examples:
        assert read(e.prompt) == e.trace + "<eos>"
        assert read(e.prompt + e.trace + e.ask) == e.answer + "<eos>"


def test_finetune_stops_early_and_keeps_the_best_weights(words, monkeypatch):
    """Held-out sequences that say the opposite: their loss falls while the model learns the words, then rises."""
    say = lambda answer: base_sequence(words, BaseExample("Mia has 1 .\n", "", False, "Answer:", answer))
    learn, held = [say(" 1")] * 4, [say(" 1"), say(" 5")]
    run = lambda heldout: finetune(lm, learn, epochs=200, batch_size=4, learning_rate=8e-3, warmup=10, seed=0,
                                   heldout=heldout)
    measure = lambda: executor.heldout_loss(lm, held, 1)
    lm = small(words)
    start = copy.deepcopy(lm.model.state_dict())
    first = measure()
    run(())
    overfit = measure()
    lm.model.load_state_dict(start)
    run(held)
    best = measure()
    assert best < first and best < overfit and not lm.model.training
    lm.model.load_state_dict(start)                                # a training that can only harm changes nothing
    real, calls = executor.heldout_loss, []
    monkeypatch.setattr(executor, "heldout_loss", lambda *args: calls.append(1) or real(*args))
    finetune(lm, [say(" 5")], epochs=20, batch_size=1, learning_rate=1.0, warmup=0, seed=0, heldout=held)
    assert len(calls) == 3, "at the start, and two without a new minimum"
    assert measure() == pytest.approx(first)


@pytest.mark.parametrize("kind", ["", "heldout"])
@pytest.mark.parametrize("stop_at", [1, 10])
def test_a_stopped_training_goes_on_bit_for_bit(words, tmp_path, monkeypatch, stop_at, kind):
    """Weights, optimizer, order of the batches, the minimum of the held-out loss. A finished one returns at once."""
    sequences = [base_sequence(words, BaseExample(f"Mia has {a} .\n", "", False, "Answer:", f" {a}")) for a in range(9)]
    run = lambda progress: finetune(lm, sequences, epochs=9, batch_size=4, learning_rate=3e-3, warmup=2, seed=0,
                                    heldout=sequences[:2] if kind == "heldout" else (), progress=progress)
    lm = small(words)
    wanted, weights = run(None), copy.deepcopy(lm.model.state_dict())
    saves, save = [], executor.save_progress

    def stop(*args):
        save(*args)
        saves.append(args)
        if len(saves) == stop_at:
            raise KeyboardInterrupt
    monkeypatch.setattr(executor, "save_progress", stop)
    lm = small(words)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "progress.pt")
    steps, real = [], executor.descend
    monkeypatch.setattr(executor, "descend", lambda *args: steps.append(1) or real(*args))
    lm = small(words)
    assert run(tmp_path / "progress.pt") == wanted and len(steps) == 20 - 2 * stop_at
    assert all(torch.equal(x, weights[name]) for name, x in lm.model.state_dict().items())


# ---------------------------------------------------------------- loading


def without_eos(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))


def with_tensors(change):
    """Damage to the file of weights."""
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


def larger_tokenizer(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


def raising_template(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")


@pytest.mark.parametrize("damage, words", [
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"), (without_eos, "EOS"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "config.json|tokenizer"),
    (lambda f: (f / "config.json").write_text("{"), "config|tokenizer"), (shutil.rmtree, "tokenizer"),
    (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "causal LM"),
    (with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)})), "model.norm.weight|causal LM"),
    (with_tensors(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "the weights lack model.layers.0.mlp"),
    (larger_tokenizer, "the tokenizer has more tokens"),
    (raising_template, "chat template .*no users here")])
def test_load_says_what_is_wrong(tiny, tmp_path, damage, words):
    """One line that names the folder; never a traceback from the depths, never a random model."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny[0], folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        executor.load(str(folder), "cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


class Careless(LlamaForCausalLM):
    """A model that looks at padding."""
    def forward(self, attention_mask=None, **given):
        return super().forward(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask),
                               **given)


class Forgetful(LlamaForCausalLM):
    """A model that ignores its cache."""
    def forward(self, cache=None, past_key_values=None, attention_mask=None, **given):
        return super().forward(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_tried(model, dtype, capsys):
    """On every model, in 16 bits as strictly: with padding and cache against the same tokens alone."""
    before = copy.deepcopy(model).to(dtype)
    assert executor.check_decoding(before) is False
    assert all(torch.equal(p, q.to(dtype)) and p.dtype == dtype for p,
               q in zip(before.parameters(), model.parameters()))
    damaged = random_model("llama").to(dtype)
    damaged.__class__ = Careless
    assert executor.check_decoding(damaged) and "groups of equal length" in capsys.readouterr().out
    damaged.__class__ = Forgetful
    with pytest.raises(UserError, match="llama models cannot be decoded here: .*a cache changes"):
        executor.check_decoding(damaged)
    damaged.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        executor.check_decoding(damaged)


def test_every_end_that_model_or_tokenizer_names():
    class Words:
        eos_token_id = 7
    class Model:
        generation_config = transformers.GenerationConfig(eos_token_id=[9, 7, 3])
    assert executor.eos_ids(Model, Words) == [3, 7, 9]
    Model.generation_config = transformers.GenerationConfig(eos_token_id=2)
    assert executor.eos_ids(Model, Words) == [2, 7]
    Model.generation_config = None
    assert executor.eos_ids(Model, Words) == [7]


def test_texts_are_decoded_letter_by_letter(tiny):
    """A tokenizer whose settings clean up spaces would join what ' ' joins."""
    tokenizer = executor.tiny_tokenizer(["' '.join(a) , it 's . n't"])
    tokenizer.clean_up_tokenization_spaces = True
    text = "' '.join(a) , it 's ."
    assert executor.decode_text(tokenizer, [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]) == [text]


def test_cache_tokens_are_measured(model):
    """2 layers, keys and values, 2 heads of 8, float32; half of it in bfloat16."""
    token = 2 * 2 * 2 * 8 * 4
    assert executor.cache_tokens(model, 1.0) == 2**30 // token
    assert executor.cache_tokens(copy.deepcopy(model).bfloat16(), 1.0) == 2 * 2**30 // token
    assert executor.cache_tokens(model, 1e-12) == 1
    assert executor.cache_tokens(random_model("llama", context=20), 1.0) == 2**30 // token
    for kind in ("mistral", "falcon_h1", "deepseek_v3"):           # windows, recurrent states, latent keys: something
        assert 10**4 < executor.cache_tokens(tiny_of(kind), 1.0) < 10**8


def test_a_gpu_that_torch_does_not_see_is_no_silent_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert executor.pick_device().type == "cpu"
    (tmp_path / "version").write_text("NVRM version: 535.161.08")
    with pytest.raises(UserError, match="--device cpu"):
        executor.pick_device()
    assert executor.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device nowhere"):
        executor.pick_device("nowhere")


def test_base_of_a_run(tiny, tmp_path):
    """A folder or a name. Weights that were replaced are noticed."""
    base = tmp_path / "base" / "base.json"
    with pytest.raises(UserError, match="executor.py --run_dir"):
        executor.base_of(tmp_path)
    for model, wanted in ((".", str(tmp_path / "base")), ("Qwen/x", "Qwen/x")):
        data.write_atomic(base, json.dumps({"model": model}))
        assert executor.base_of(tmp_path) == wanted
    folder = str(shutil.copytree(tiny[0], tmp_path / "model"))
    record = {"model": folder, "fingerprint": data.fingerprint(folder), "chat_template_kwargs": {}}
    data.write_atomic(base, json.dumps(record))
    executor.load_for(tmp_path, folder, "cpu")
    weights = load_file(f"{folder}/model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights have changed"):
        executor.load_for(tmp_path, folder, "cpu")


# ---------------------------------------------------------------- LoRA

IDS = torch.tensor([[5, 9, 3, 22, 7, 8, 30]])


def adapted(model, seed=1, **options):
    """(model, adapter) of a copy, with an adapter that does something."""
    model = copy.deepcopy(model)
    lora = executor.Lora(model, **{"rank": 3, "alpha": 6.0, **options})
    with torch.no_grad():
        for layer in lora.layers.values():
            layer.lora_B.normal_(0, 0.1, generator=seeded(seed))
    return model, lora


@torch.no_grad()
def test_an_adapter_is_what_the_formula_says(model):
    """y = W x + alpha / rank * B A x in every linear layer but the head; at first nothing, off exactly nothing."""
    bare, fresh = model(IDS).logits, copy.deepcopy(model)
    lora = executor.Lora(fresh, 3, 6.0)
    assert torch.equal(fresh(IDS).logits, bare)
    assert len(lora.layers) == 14
    changed, lora = adapted(model)
    merged = copy.deepcopy(model)
    for name, layer in merged.named_modules():
        if name in lora.layers:
            layer.weight += 2.0 * lora.layers[name].lora_B @ lora.layers[name].lora_A
    assert torch.allclose(changed(IDS).logits, merged(IDS).logits, atol=1e-4)
    assert not torch.allclose(changed(IDS).logits, bare, atol=0.1)
    with lora.off():
        assert torch.equal(changed(IDS).logits, bare)
    with pytest.raises(RuntimeError), lora.off():
        raise RuntimeError
    assert not torch.equal(changed(IDS).logits, bare), "an error inside must not leave it off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_adds_in_the_dtype_of_its_layer(model, dtype):
    """With or without autocast, on weights of either dtype."""
    changed, lora = adapted(copy.deepcopy(model).to(dtype))
    plain = changed(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = changed(IDS).logits
    assert plain.dtype == dtype and torch.allclose(plain.float(), mixed.float(), atol=0.1 * plain.abs().max().item())


def test_only_the_adapter_learns_also_with_checkpointing(model):
    """The gradients do not depend on recomputation, and nothing but A and B has one."""
    grads = []
    for checkpointing in (False, True):
        changed, lora = adapted(model)
        if checkpointing:
            executor.enable_checkpointing(changed)
            changed.train()
        F.cross_entropy(changed(IDS, use_cache=False).logits[0], IDS[0]).backward()
        grads.append({name: p.grad for name, p in changed.named_parameters() if p.grad is not None})
        assert len(grads[-1]) == 2 * 14 and all(name.endswith((".lora_A", ".lora_B")) for name in grads[-1])
    assert all(g.abs().max() > 0 and torch.allclose(g, grads[1][name], atol=1e-6) for name, g in grads[0].items())


@pytest.mark.parametrize("kind", ["tied", "own", "bfloat16"])
@torch.no_grad()
def test_save_merges_and_keeps_the_adapter_for_peft(tiny, model, tmp_path, kind):
    """A plain folder that anyone loads, tied head or not, and beside it what peft reads: these names, these shapes."""
    base = copy.deepcopy(tiny[1] if kind == "tied" else model).to(torch.bfloat16
                                                                  if kind == "bfloat16" else torch.float32)
    changed, lora = adapted(base)
    want, atol = changed(IDS).logits.float(), 1e-4 if kind != "bfloat16" else 1.0
    lora.save(tmp_path, "some/base")
    plain = type(base).from_pretrained(tmp_path, dtype=base.dtype).eval()
    for merged in (plain, changed):
        assert torch.allclose(merged(IDS).logits.float(), want, atol=atol)
        assert merged.state_dict().keys() == base.state_dict().keys() and merged.dtype == base.dtype
    config, tensors = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), load_file(
        tmp_path / "adapter" / "adapter_model.safetensors")
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 3,
                                                                                             6.0)
    assert config["base_model_name_or_path"] == "some/base" and "q_proj" in config["target_modules"]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert len(tensors) == 2 * 14 and tensors[name.format("A")].shape == (3, base.config.intermediate_size)
    assert tensors[name.format("B")].shape == (32, 3)
    again = copy.deepcopy(base)
    executor.Lora.load(again, tmp_path / "adapter")
    assert torch.allclose(again(IDS).logits.float(), want, atol=0 if kind != "bfloat16" else atol)


def test_an_adapter_that_does_not_match_is_an_error(llama, tmp_path):
    """It names the folder; half an adapter would be a model that nobody trained."""
    adapted(llama)[1].save(tmp_path, "base")
    folder = tmp_path / "adapter"
    sizes = {"hidden_size": 16, "num_attention_heads": 2}, {"num_hidden_layers": 3}
    for size in sizes:
        other = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "head_dim": None, **size}))
        with pytest.raises(UserError, match="adapter: not an adapter of this model"):
            executor.Lora.load(other, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="adapter: not an adapter"):
        executor.Lora.load(copy.deepcopy(llama), folder)


# ---------------------------------------------------------------- the frozen executor

MATH = [Problem(f"m{i}", "tiny", "math", f"Mia has {i} coins .", str(20 + i), [], "1 + 1 = ?") for i in range(2)]
CODE = Problem("c", "tiny", "code", "write f ( x ) .", "", [{"assert": "assert f(1) == 2"},
                                                            {"assert": "assert f(2) == 3"}])
RIGHT, HALF, BROKEN = "\ndef f(x):\n    return x + 1", "\ndef f(x):\n    return 2", "\ndef f(x:"


@pytest.fixture
def canned(tiny, monkeypatch):
    """canned(outputs) -> (Executor, calls): these outputs instead of decoding, a list per call of generate. One that
    ends in ~ was cut."""
    texts = [DIGITS, RIGHT, HALF, BROKEN, *(data.executor_prompt(p, p.reference_reasoning) for p in [*MATH, CODE])]
    tokenizer = executor.tiny_tokenizer(texts)

    def make(*outputs, **options):
        calls, queue = [], list(outputs)

        def fake(model, prompts, *, num_samples, **given):
            if not prompts:
                return Completions([], [])
            calls.append({"prompts": prompts, "num_samples": num_samples, **given})
            ends = {None: [], True: [tokenizer.eos_token_id]}
            tokens = [tokenizer(text.rstrip("~"))["input_ids"] + ends["~" not in text or None] for text in queue.pop(0)]
            assert len(tokens) == sum(num_samples) and len(num_samples) == len(prompts)
            return Completions(tokens, [[0.0] * len(t) for t in tokens])
        monkeypatch.setattr(executor, "check_decoding", lambda model: False)
        frozen = Executor(tiny[1], tokenizer, max_new_tokens=9, **options)
        monkeypatch.setattr(executor, "generate", fake)
        return frozen, calls
    return make


def test_success_counts(canned):
    """Of answers and programs, in the order of the problems. All tests of a program must pass. A partial score shapes
    the score only."""
    frozen, _ = canned([RIGHT, HALF, " 20", " 21", BROKEN, RIGHT])
    runs = frozen.run([CODE, MATH[0], CODE], ["a", "b", "c"], 2)
    assert [[run.ok for run in row] for row in runs] == [[True, False], [True, False], [False, True]]
    assert [[run.score for run in row] for row in runs] == [[1, 0], [1, 0], [0, 1]]
    assert runs[0][0].output == RIGHT and runs[1][0].output == " 20"
    assert frozen.spent["program_runs"] == 4
    frozen, calls = canned([" 20", " 21", " 20", " 21", " 20", " 21"])
    assert frozen.success(MATH, ["a", "b"], 3) == [2, 2] and frozen.success([], None, 2) == frozen.baseline([], 2) == []
    assert calls[0]["num_samples"] == [3, 3] and len(calls[0]["prompts"]) == 2 and calls[0]["max_new_tokens"] == 9
    frozen, _ = canned([HALF, RIGHT], exec_score="pass_rate")
    [[half, right]] = frozen.run([CODE], ["a"], 2)
    assert (half.ok, half.score, right.ok, right.score) == (False, 0.5, True, 1.0)


def test_prompts_with_and_without_a_trace(canned):
    """Uplift compares these two; a baseline that sees the trace would be no baseline."""
    frozen, calls = canned([" 1"], [" 1"])
    frozen.success(MATH[:1], ["1 + 1 = ?"], 1)
    frozen.success(MATH[:1], None, 1)
    given, alone = (frozen.tokenizer.decode(call["prompts"][0]) for call in calls)
    assert given == data.executor_prompt(MATH[0], "1 + 1 = ?") and alone == data.executor_prompt(MATH[0], None)


def test_baseline_is_measured_once_per_problem(canned):
    """Also when a problem is there twice, comes again, or comes among new ones; another K is another measurement."""
    frozen, calls = canned([" 20", " 1"], [" 21", " 21"], [" 20"])
    assert frozen.baseline([MATH[0], MATH[0]], 2) == [1, 1]
    assert frozen.baseline([MATH[1], MATH[0], MATH[1]], 2) == [2, 1, 2]
    assert frozen.baseline(MATH, 2) == [1, 2] and len(calls) == 2
    assert frozen.baseline(MATH[:1], 1) == [1] and len(calls) == 3
    assert [len(call["prompts"]) for call in calls] == [1, 1, 1]
    again, calls = canned()
    again.baselines = dict(frozen.baselines)                             # a resumed run measures nothing again
    assert again.baseline(MATH, 2) == [1, 2] and not calls and not any(again.spent.values())


def test_traces_and_baselines_in_one_call(canned):
    """1 + K runs of each trace and, for problems without a baseline, K runs alone: one call of generate."""
    outputs = [" 20", " 20", " 1", " 20", " 1", " 1", " 21", " 21", " 21", " 20", " 1", " 21", " 21"]
    frozen, calls = canned(outputs, [" 20", " 20", " 20"])
    problems = [MATH[0], MATH[0], MATH[1]]
    runs, baseline = frozen.run_with_baseline(problems, ["a", "b", "c"], 2, "7")
    assert [[run.ok for run in row] for row in runs] == [[True, True, False], [True, False, False], [True, True, True]]
    assert baseline == [1, 1, 2] and len(calls) == 1 and calls[0]["num_samples"] == [3, 3, 3, 2, 2]
    wanted = [f"run 0 7 {id} {sample} {k}" for id, sample in (("m0", 0), ("m0", 1), ("m1", 0)) for k in range(3)]
    wanted += [f"alone 0 {id} {k}" for id in ("m0", "m1") for k in range(2)]
    assert torch.equal(calls[0]["uniforms"], uniform_numbers(wanted, 9))
    runs, baseline = frozen.run_with_baseline(MATH[:1], ["a"], 2, "8")
    assert baseline == [1] and calls[1]["num_samples"] == [3] and len(calls) == 2
    assert frozen.baseline(MATH, 2) == [1, 2] and len(calls) == 2


def test_the_executor_stops_at_every_end_and_keeps_to_its_memory(canned, tiny):
    frozen, calls = canned([" 20"], max_cache_gib=1e-3)
    assert frozen.success(MATH[:1], None, 1) == [1]
    assert calls[0]["eos_id"] == executor.eos_ids(tiny[1], frozen.tokenizer)
    assert calls[0]["max_cache_tokens"] == executor.cache_tokens(tiny[1], 1e-3) < executor.cache_tokens(tiny[1], 4.0)


def test_a_trace_without_room_is_a_failed_run(tiny):
    """It gets no output and the others keep their random numbers. A problem without room is the user's error."""
    problems = data.tiny_problems("math", 2, 0)
    frozen = Executor(tiny[1], tiny[2], max_new_tokens=6, exec_score="pass_rate")
    traces = [p.reference_reasoning for p in problems]
    wanted = frozen.run(problems, traces, 2, "1")
    spent = dict(frozen.spent)
    runs = frozen.run([problems[0], problems[0], problems[1]], [traces[0], "Mia " * 600, traces[1]], 2, "1")
    assert [runs[0], runs[2]] == wanted and runs[1] == [executor.Run("", False, 0.0, True)] * 2
    assert all(count == 2 * spent[name] for name, count in frozen.spent.items())
    with pytest.raises(UserError, match="tiny.*: the executor's prompt of .* tokens and 6 new ones exceed its context"):
        frozen.success([dataclasses.replace(problems[0], problem=" Mia" * 600)], None, 1)


def test_cut_outputs_are_marked(canned):
    frozen, _ = canned([" 20", " 20 2~", " 20~"])
    assert [(run.ok, run.truncated) for run in frozen.run(MATH[:1], None, 3)[0]] == [(True, False), (False, True),
                                                                                     (True, True)]


def test_a_damaged_executor_is_not_blamed_on_the_planner(tiny):
    model = copy.deepcopy(tiny[1])
    frozen = Executor(model, tiny[2], max_new_tokens=3)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the frozen executor .*not finite"):
        frozen.success(data.tiny_problems("math", 1, 0), None, 1)


def test_spent_counts_every_token_once(canned):
    """Prompts once each (one prefill), completions with their EOS, programs only for programs."""
    frozen, calls = canned([" 20", " 1", " 21", " 2"], [RIGHT])
    frozen.success(MATH, ["a", "b"], 2)
    assert frozen.spent == {"executor_prompt_tokens": sum(map(len, calls[0]["prompts"])), "program_runs": 0,
                            "executor_tokens": 3 + 2 + 3 + 2}
    frozen.success([CODE], None, 1)
    assert frozen.spent["executor_prompt_tokens"] == sum(len(p) for call in calls for p in call["prompts"])
    assert frozen.spent["program_runs"] == 1


@pytest.mark.parametrize("broken", ["run_programs", "generate"])
def test_errors_of_the_machinery_are_never_scores(canned, monkeypatch, broken):
    """A failed no-trace call that scored 0 would RAISE uplift. It is raised, and nothing wrong stays in the cache."""
    frozen, _ = canned([RIGHT], [RIGHT])
    with monkeypatch.context() as patch:
        def fail(*_, **__):
            raise verify.SandboxError("no fork today")
        patch.setattr(verify if broken == "run_programs" else executor, broken, fail)
        with pytest.raises(verify.SandboxError, match="no fork today"):
            frozen.success([CODE], ["a"], 1)
        with pytest.raises(verify.SandboxError):
            frozen.baseline([CODE], 1)
    frozen, _ = canned([RIGHT])
    assert frozen.baseline([CODE], 1) == [1]


# ---------------------------------------------------------------- the tiny base model


def test_tiny_tokenizer_restores_every_text(tiny):
    """A space lost between code and line would break every program; digits are single tokens."""
    _, _, tokenizer = tiny
    for task_type in ("math", "code"):
        for split in ("heldout", "longer"):
            for p in data.tiny_problems(task_type, 25, 1, split):
                text = data.executor_prompt(p, p.reference_reasoning) + "\n" + p.reference_solution
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
                assert tokenizer.batch_decode([ids + [tokenizer.eos_token_id]], skip_special_tokens=True) == [text]
    assert len(tokenizer(" 47")["input_ids"]) == 2
    assert len(tokenizer(data.CLOSE)["input_ids"]) == 1
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def targets(tokenizer, example):
    """[(text before, text to predict)] of every position with a loss."""
    ids, labels = base_sequence(tokenizer, example)
    assert len(ids) == len(labels)
    return [(tokenizer.decode(ids[:t + 1]), tokenizer.decode([label])) for t, label in enumerate(labels)
            if label != IGNORE]


def test_base_sequence_labels(words):
    """The planner learns its trace and then EOS, although the sequence goes on; the executor its answer and EOS. What
    is only given (the rest of the prompt, a careful trace, the question) is out of the loss; the first line, the
    problem's text, is in it."""
    problem = [("Mia", " has"), ("Mia has", " 7"), ("Mia has 7", " .")]
    planner = [(EXAMPLE.prompt + a, b) for a, b in [
        ("", "<reasoning>"), ("<reasoning>", "7"), ("<reasoning>7", " +"), ("<reasoning>7 +", " 5"),
        ("<reasoning>7 + 5", " ="),
        ("<reasoning>7 + 5 =", " ?"), ("<reasoning>7 + 5 = ?", "</reasoning>"), (EXAMPLE.trace, "<eos>")]]
    asked = EXAMPLE.prompt + EXAMPLE.trace + EXAMPLE.ask
    answer = [(asked, " 1"), (asked + " 1", "2"), (asked + " 12", "<eos>")]
    assert targets(words, EXAMPLE) == problem + planner + answer
    given = BaseExample(EXAMPLE.prompt, EXAMPLE.trace, False, EXAMPLE.ask, EXAMPLE.answer)
    assert targets(words, given) == problem + answer
    longer = BaseExample(EXAMPLE.prompt + "7 + 5 = ?\nAnswer:", "", False, "", " 12")
    assert targets(words, longer) == problem + [(longer.prompt + a, b) for a,
                                                b in (("", " 1"), (" 1", "2"), (" 12", "<eos>"))]
    assert words.eos_token_id not in base_sequence(words, EXAMPLE)[0]           # it is a label, never an input


def test_the_pieces_of_a_sequence_tokenize_like_the_whole(tiny):
    """Training joins pieces, sampling reads whole prompts: the ids must be the same, or the model meets at sampling
    time what it never saw."""
    _, _, tokenizer = tiny
    encode = lambda text: tokenizer(text)["input_ids"]
    for task_type in ("math", "code"):
        for e in data.base_corpus(task_type, 100, 0):
            ids, _ = base_sequence(tokenizer, e)
            for whole in (e.prompt, e.prompt + e.trace + e.ask, e.prompt + e.trace + e.ask + e.answer):
                assert ids[:len(encode(whole))] == encode(whole)
            assert len(ids) == len(encode(whole))


# ---------------------------------------------------------------- the command


def test_the_command_trains_checks_and_is_skipped_when_done(tmp_path, capsys):
    """The whole stage at toy size; a second call must not train again, and the stage before must have run."""
    run = tmp_path / "run"
    arguments = ["--run_dir", str(run), "--sequences", "64", "--hidden", "16", "--layers", "1", "--eval_problems", "2",
                 "--device", "cpu"]
    data.main(["--run_dir", str(run), "--train", "3", "--heldout", "3"])
    executor.main(arguments)
    record = json.loads((run / "base" / "base.json").read_text())
    assert record["model"] == "." and record["problems"] == 2
    assert all(0 <= record[name] <= 1 for name in ("no_trace", "reference_trace", "executor_truncated"))
    executor.load(executor.base_of(run), "cpu")
    stamp = (run / "base" / "model.safetensors").stat().st_mtime_ns
    assert (record["executor_truncated"] > 0.05) == ("--max_answer_tokens" in capsys.readouterr().out)
    executor.main(arguments)
    assert (run / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.splitlines()[-1] == f"next: python rm.py --run_dir {run}"
    with pytest.raises(UserError, match="--hidden"):
        executor.main([*arguments, "--hidden", "32"])
    shutil.rmtree(run / "base")
    groups = run / "groups" / "train.jsonl"
    data.write_groups(groups, [group | {"negative_bank": []} for group in data.read_groups(groups)])
    executor.main(arguments)
    assert "--mode exec_only" in capsys.readouterr().out, "a reward model needs flawed traces"
    shutil.rmtree(run / "base")
    with pytest.raises(UserError, match="leave out --model"):
        executor.main(["--run_dir", str(run), "--model", "x"])

