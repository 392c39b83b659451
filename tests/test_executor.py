"""executor.py: decoding against transformers' own, the frozen executor against canned outputs, the tiny base model.

    python -m pytest tests/test_executor.py
"""
import copy
import dataclasses
import json
import os
import random
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import data
import executor
import verify
from data import BaseExample, Problem, UserError
from executor import IGNORE, Completions, Executor, base_sequence, finetune, generate, sample, token_logits

V, PAD = 40, 0
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
    return generate(model, prompts, **{"temperature": 0, "max_new_tokens": 12, "eos_id": -1, "pad_id": PAD, **options})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- decoding

def test_greedy_equals_transformers(model):
    """Positions, masks and cache of ragged, left-padded prompts are right when every token is; then the same with an
    EOS that ends the rows at different steps: it is kept, flagged, and nothing comes after it."""
    whole = [reference(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in whole}) == len(PROMPTS)      # else nothing could be mixed up
    free = greedy(model, PROMPTS)
    assert free.tokens == whole and free.finished == [False] * len(PROMPTS)
    eos = an_eos(whole)
    cut = [row[:row.index(eos) + 1] if eos in row else row for row in whole]
    assert len({len(row) for row in cut}) > 2
    stopped = greedy(model, PROMPTS, eos_id=eos)
    assert stopped.tokens == cut
    assert stopped.finished == [eos in row for row in whole]
    assert [len(row) for row in stopped.logprobs] == [len(row) for row in cut]


def test_padding_does_not_change_results(model):
    """A row in a batch and the same row alone: the same tokens, the same log-probs."""
    together = greedy(model, PROMPTS)
    for n, prompt in enumerate(PROMPTS):
        alone = greedy(model, [prompt])
        assert together.tokens[n] == alone.tokens[0]
        assert together.logprobs[n] == pytest.approx(alone.logprobs[0], abs=1e-4)
        assert together.logprobs[n] == pytest.approx(score(model, prompt, together.tokens[n]), abs=1e-4)
    for pad in (1, 39):                                            # masks never look at the pad id
        assert greedy(model, PROMPTS, pad_id=pad).tokens == together.tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_equal_scored_ones(model, temperature):
    """The sampler is the scorer: the same temperature in both, also for rows that went on after others had stopped."""
    eos = 7
    out = generate(model, PROMPTS, num_samples=8, max_new_tokens=10, temperature=temperature, eos_id=eos, pad_id=PAD,
                   generator=seeded())
    assert any(out.finished) and not all(out.finished)
    for i, (tokens, logprobs) in enumerate(zip(out.tokens, out.logprobs)):
        assert logprobs == pytest.approx(score(model, PROMPTS[i // 8], tokens, temperature), abs=1e-4)
        assert out.finished[i] == (tokens[-1] == eos) and eos not in tokens[:-1]
        assert out.finished[i] or len(tokens) == 10


def test_samples_are_prompt_major_and_differ(llama):
    """Sample s of prompt n is number n * num_samples + s, whatever the order of decoding."""
    single = greedy(llama, PROMPTS).tokens
    assert greedy(llama, PROMPTS, num_samples=3).tokens == [row for row in single for _ in range(3)]
    out = generate(llama, PROMPTS, num_samples=6, max_new_tokens=6, eos_id=-1, pad_id=PAD, generator=seeded())
    for n in range(len(PROMPTS)):
        assert len({tuple(row) for row in out.tokens[n * 6:n * 6 + 6]}) > 1


def test_sampling_is_reproducible_from_the_generator(llama):
    """And from nothing else: the global generator neither matters nor moves."""
    runs = []
    for seed, world in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(world)
        state = torch.get_rng_state()
        runs.append(generate(llama, PROMPTS, num_samples=2, eos_id=-1, pad_id=PAD, max_new_tokens=8, generator=seeded(seed)))
        assert torch.equal(state, torch.get_rng_state())
    assert runs[0] == runs[1] and runs[0].tokens != runs[2].tokens


@pytest.mark.parametrize("static", [False, True])
def test_a_small_cache_changes_nothing(llama, monkeypatch, static):
    """Many batches or one: the same results in the same places, and no cache beyond the limit but for one prompt."""
    shapes, real = [], executor.Cache
    monkeypatch.setattr(executor, "Cache", lambda rows, slots, *a, **k: (shapes.append((rows, slots)), real(rows, slots, *a, **k))[1])
    whole = greedy(llama, PROMPTS, num_samples=2)
    for limit in (1, 60, 1024):
        del shapes[:]
        small = greedy(llama, PROMPTS, num_samples=2, max_cache_tokens=limit, memory={} if static else None)
        assert small.tokens == whole.tokens and small.finished == whole.finished
        assert all(rows * slots <= limit or rows == (8 if static else 2) for rows, slots in shapes), shapes
        assert len(shapes) >= (1 if static or limit == 1024 else 2)


def test_a_prefill_reads_few_tokens_at_a_time(llama, monkeypatch):
    """Activations are bounded: a pass has LIMIT tokens at most, or one prompt."""
    whole, shapes = greedy(llama, PROMPTS), forwards(llama, monkeypatch)
    monkeypatch.setattr(executor, "LIMIT", (8, 8))
    assert greedy(llama, PROMPTS).tokens == whole.tokens
    prefill = [(b, t) for b, t in shapes if (b, t) != (len(PROMPTS), 1)]
    assert len(prefill) > 1 and all(b * t <= 8 or b == 1 for b, t in prefill)


def test_no_query_is_masked_out_entirely(llama, monkeypatch):
    """A row of padding looks at itself: a softmax over nothing is NaN on some devices."""
    masks, forward = [], llama.forward
    monkeypatch.setattr(llama, "forward", lambda *a, **k: (masks.append(k["attention_mask"]), forward(*a, **k))[1])
    greedy(llama, PROMPTS, num_samples=3, memory={})
    assert masks and all(mask.any(dim=-1).all() for mask in masks)


def forwards(model, monkeypatch):
    """The shapes of all later forward passes."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (shapes.append(tuple((k.get("input_ids") if a == () else a[0]).shape)),
                                                          forward(*a, **k))[1])
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


# Three problems with several traces each and one without (a prompt that is the beginning of others), one lone prompt,
# and one that is there twice: everything that sharing a beginning has to keep apart.
def families():
    draw = random.Random(5)
    words = lambda n: [draw.randrange(V) for _ in range(n)]
    problems = [words(n) for n in (24, 30, 18)]
    prompts = [p + words(n) for p in problems for n in (0, 9, 14, 5, 11, 7)] + [words(21)]
    prompts += [prompts[2]]
    draw.shuffle(prompts)
    return prompts


@pytest.mark.parametrize("copies", [1, 3])
def test_a_shared_beginning_is_read_once_and_changes_nothing(model, monkeypatch, copies):
    """Prompts with a common beginning, equal prompts and lone ones together: each as if it were alone."""
    prompts = families()
    wanted = [reference(model, prompt, 6) for prompt in prompts]
    shapes = forwards(model, monkeypatch)
    monkeypatch.setattr(executor, "WORTH", (10, 10))
    out = greedy(model, prompts, max_new_tokens=6, num_samples=copies)
    assert out.tokens == [row for row in wanted for _ in range(copies)]
    assert sum(b * t for b, t in shapes[:-5]) < 0.75 * sum(map(len, prompts)), "the beginnings were read again and again"
    for n in (0, 7):
        assert out.logprobs[n * copies] == pytest.approx(score(model, prompts[n], out.tokens[n * copies]), abs=1e-4)
    small = greedy(model, prompts, max_new_tokens=6, num_samples=copies, max_cache_tokens=150 * copies)   # a family is cut
    assert small.tokens == out.tokens


def test_equal_prompts_are_read_once(llama, monkeypatch):
    """All but the last token, which gives the logits."""
    shapes = forwards(llama, monkeypatch)
    monkeypatch.setattr(executor, "WORTH", (10, 10))
    out = greedy(llama, [list(range(1, 31))] * 4, max_new_tokens=2)
    assert shapes == [(1, 29), (4, 1), (4, 1)] and len({tuple(t) for t in out.tokens}) == 1


@pytest.mark.parametrize("worth", [None, (10, 10)])
def test_static_shapes_change_nothing(model, monkeypatch, worth):
    """The way of CUDA, here without capture: few shapes, one store of keys and values for all of them, and the same
    results as without, also for rows that leave, and after other calls have left their keys and values behind."""
    memory, eos = {}, an_eos([reference(model, prompt, 12) for prompt in PROMPTS])
    if worth:
        monkeypatch.setattr(executor, "WORTH", worth)
    shapes = forwards(model, monkeypatch)
    for prompts in (PROMPTS, families(), PROMPTS[:2], [PROMPTS[0] * 5]):
        for options in ({"num_samples": 3}, {"num_samples": 3, "eos_id": eos}, {"max_cache_tokens": 70}):
            static = greedy(model, prompts, memory=memory, **options)
            free = greedy(model, prompts, **options)
            assert static.tokens == free.tokens and static.finished == free.finished
            assert sum(static.logprobs, []) == pytest.approx(sum(free.logprobs, []), abs=1e-4)
    del shapes[:]
    greedy(model, PROMPTS, memory=memory, num_samples=7, eos_id=eos)
    assert {rows for rows, width in shapes if width == 1} <= {64, 32, 16, 8}
    caches = {key: cache for key, cache in memory.items() if isinstance(key, tuple)}
    assert (64, 128) in caches and all(cache.visible.shape == key for key, cache in caches.items())
    heads, width = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    for cache in caches.values():
        assert all(x.untyped_storage().data_ptr() in {y.untyped_storage().data_ptr() for y in memory["store"].values()}
                   for layer in cache.layers for x in layer)
    assert all(x.numel() == memory["room"] * heads * width for x in memory["store"].values()) and memory["room"] == executor.CACHE


def test_what_an_earlier_call_left_is_not_seen(model, monkeypatch):
    """Also not by the pass that reads a common beginning, in front of which other prompts had tokens before."""
    draw, memory = random.Random(3), {}
    words = lambda n: [draw.randrange(V) for _ in range(n)]
    monkeypatch.setattr(executor, "WORTH", (10, 10))
    greedy(model, [words(40) for _ in range(6)], memory=memory)
    common = words(20)
    prompts = [words(40)] + [common + words(2) for _ in range(5)]
    again, fresh = greedy(model, prompts, memory=memory), greedy(model, prompts)
    assert again.tokens == fresh.tokens and sum(again.logprobs, []) == pytest.approx(sum(fresh.logprobs, []), abs=1e-4)


def test_a_store_that_is_too_small_is_replaced(llama):
    """One prompt may need more than the limit; then there is one store again, not two."""
    memory = {}
    for prompts, room in ((PROMPTS, 1024), ([[1] * 30], 1024), (PROMPTS * 3, 1024)):
        assert greedy(llama, prompts, memory=memory, max_cache_tokens=500).tokens == greedy(llama, prompts).tokens
        assert memory["room"] == room
    greedy(llama, PROMPTS, memory=memory, max_cache_tokens=500, num_samples=9)
    assert memory["room"] == 2048 and len(memory["store"]) == 2 * 2
    assert {key for key in memory if isinstance(key, tuple)} == {(16, 128)}


SMOLLM2 = os.environ.get("TRACELIFT_MODEL", "")


@pytest.mark.skipif(not SMOLLM2, reason="TRACELIFT_MODEL names no folder of a pretrained model")
def test_greedy_equals_transformers_on_a_pretrained_model():
    """Real weights, chat prompts of a real tokenizer, ragged, with a shared problem; fp32."""
    model, tokenizer = executor.load(SMOLLM2, "cpu", torch.float32)
    model.generation_config.eos_token_id = None
    problems = data.tiny_problems("math", 2, 0, "longer")
    problems = [dataclasses.replace(p, source="gsm8k") for p in problems]
    prompts = [data.encode_prompt(tokenizer, data.executor_prompt(p, t)) for p in problems
               for t in (None, p.reference_reasoning, "count them")]
    out = greedy(model, prompts, max_new_tokens=16, num_samples=2)
    assert out.tokens == [row for prompt in prompts for row in [reference(model, prompt, 16)] * 2]
    sampled = generate(model, prompts[:3], max_new_tokens=8, temperature=0.7, eos_id=-1, generator=seeded())
    for prompt, tokens, logprobs in zip(prompts, sampled.tokens, sampled.logprobs):
        assert logprobs == pytest.approx(score(model, prompt, tokens, 0.7), abs=1e-4)


def test_logits_that_are_not_finite_are_an_error(llama):
    """A broken model must not become a reward of 0."""
    broken = copy.deepcopy(llama)
    broken.model.norm.weight.data[3] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(FloatingPointError, match="prompt [0-4].*not finite"):
            greedy(broken, PROMPTS, temperature=temperature, top_p=0.9 if temperature else 1.0, eos_id=7, generator=seeded())


def test_a_cache_that_does_not_fit_says_how_much_is_missing(llama, monkeypatch):
    """Before it is allocated, in bytes, with the setting to lower."""
    need = 5 * 2 * (7 + 12) * 2 * 2 * 2 * 8 * 4                    # rows, slots, K and V, layers, heads, width, float32
    assert 2**20 < executor.free_bytes(torch.device("cpu"))
    monkeypatch.setattr(executor, "free_bytes", lambda device: need)
    assert greedy(llama, PROMPTS, num_samples=2).tokens
    monkeypatch.setattr(executor, "free_bytes", lambda device: need - 1000)
    with pytest.raises(UserError, match=rf"{need:,} bytes, 1,000 more.*--max_cache_tokens \(now 65,536\).*10 rows of 19"):
        greedy(llama, PROMPTS, num_samples=2)


@pytest.mark.parametrize("static", [False, True])
def test_the_memory_of_a_batch_is_free_for_the_next(llama, monkeypatch, static):
    """Room for one cache and a half is enough for many batches, and for calls that share a memory."""
    alive, real = weakref.WeakSet(), executor.Cache

    def made(*args, **kwargs):
        alive.add(cache := real(*args, **kwargs))
        return cache
    used = lambda: sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                        for cache in alive for layer in cache.layers for x in layer}.values())
    token = 2 * 2 * 2 * 8 * 4                                      # K and V, layers, heads, width, float32
    limit = 1024 if static else 40
    monkeypatch.setattr(executor, "Cache", made)
    monkeypatch.setattr(executor, "free_bytes", lambda device: 1.5 * limit * token - used())
    memory = {} if static else None
    for prompts in (PROMPTS, PROMPTS * 4):
        assert greedy(llama, prompts, max_cache_tokens=limit, memory=memory).tokens
    if static:
        with pytest.raises(UserError, match="more than are free"):
            greedy(llama, PROMPTS, max_cache_tokens=2 * limit, num_samples=9, memory=memory)


def test_a_window_of_attention_counts_as_context():
    """Our masks know no window: beyond it they would let a token see what the model never saw."""
    model = random_model("llama")
    model.config.sliding_window = 20
    assert greedy(model, [[1] * 16], max_new_tokens=4).tokens
    with pytest.raises(UserError, match="17 tokens.*4 new.*20"):
        greedy(model, [[1] * 17], max_new_tokens=4)


def test_max_new_tokens_cuts(llama):
    """A cut row is not finished; a row whose very last token is EOS is."""
    whole = [reference(llama, prompt, 12) for prompt in PROMPTS]
    assert greedy(llama, PROMPTS, max_new_tokens=1).tokens == [row[:1] for row in whole]
    for n, row in enumerate(whole):
        end = row.index(row[4])                                    # stops at the first row[4]
        exact = greedy(llama, [PROMPTS[n]], max_new_tokens=end + 1, eos_id=row[4])
        assert exact.tokens == [row[:end + 1]] and exact.finished == [True]
        if end:
            short = greedy(llama, [PROMPTS[n]], max_new_tokens=end, eos_id=row[4])
            assert short.tokens == [row[:end]] and short.finished == [False]


def test_no_prompts_no_completions(llama):
    assert greedy(llama, []) == Completions([], [], [])


def test_generate_leaves_its_inputs_and_the_gradients_alone(llama):
    prompts = [list(p) for p in PROMPTS]
    greedy(llama, prompts, num_samples=2)
    assert prompts == PROMPTS and all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0},
                                     {"top_p": 1.1}])
def test_bad_arguments(llama, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        greedy(llama, PROMPTS, **options)


def test_empty_prompts_are_refused(llama):
    with pytest.raises(ValueError, match="prompt"):
        greedy(llama, [[1], []])


def test_the_context_is_not_overrun(llama):
    """Beyond it the positions were never trained and the output is noise that looks like an answer."""
    assert greedy(llama, [[1] * 60], max_new_tokens=4).tokens
    with pytest.raises(UserError, match="61 tokens.*4 new.*64"):
        greedy(llama, [[1], [1] * 61], max_new_tokens=4)


LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize("top_p, allowed", [(1.0, {0, 1, 2, 3}), (0.9, {0, 1, 3}), (0.6, {1, 3}), (0.4, {1}), (1e-9, {1})])
def test_top_p(top_p, allowed):
    """The smallest set of most likely tokens that reaches top_p, never an empty one. The log-prob is the one before
    the cut, and the caller's logits stay as they are."""
    logits = LOGITS.repeat(500, 1)
    token, logp = sample(logits, 1.0, top_p, seeded())
    assert set(token.tolist()) == allowed
    assert torch.allclose(logp, LOGITS[0][token]) and torch.equal(logits, LOGITS.repeat(500, 1))


@pytest.mark.parametrize("top_p, allowed", [(0.5, 1), (0.9, 7), (0.999, 500)])
def test_top_p_of_a_wide_vocabulary(top_p, allowed):
    """Few tokens hold the mass, so that the 64 best are enough, or many do, so that they are not: the same rule."""
    probs = torch.full((1000,), 0.15 / 994)
    probs[torch.arange(300, 306)] = torch.tensor([0.6, 0.05, 0.05, 0.05, 0.05, 0.05])
    if top_p == 0.999:
        probs[:] = 0.001 / 500
        probs[100:600] = 0.999 / 500 + 1e-6
    token, _ = sample((probs / probs.sum()).log().repeat(6000, 1), 1.0, top_p, seeded())
    ordered = probs.sort(descending=True).values / probs.sum()
    wanted = int((ordered.cumsum(0) - ordered < top_p).sum())
    assert len(set(token.tolist())) <= wanted + 1 and set(token.tolist()) <= set(probs.argsort(descending=True)[:wanted + 1].tolist())
    assert (token == 300).float().mean() > 0.55 or top_p == 0.999
    assert len(set(token.tolist())) >= 0.9 * min(wanted, allowed)

@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_no_draw_gives_an_impossible_token(monkeypatch, top_p, draw):
    """The least and the greatest number that torch.rand can give: the first and the last token of positive probability."""
    logits = torch.full((3, 50000), -float("inf"))
    logits[:, 7:40001] = torch.randn(3, 39994, generator=seeded())
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, draw))
    token, logp = sample(logits, 1.0, top_p, None)
    assert torch.isfinite(logp).all()
    if top_p == 1:
        assert token.tolist() == [7 if draw == 0 else 40000] * 3


def test_temperature_shapes_the_samples():
    """0.5 squares the odds: 0.25 : 0.09 : 0.0225 : 0.0025. Temperature 0 is the mode, its log-prob at temperature 1."""
    token, logp = sample(LOGITS.repeat(20000, 1), 0.5, 1.0, seeded())
    share = torch.bincount(token, minlength=4) / 20000
    wanted = torch.tensor([0.0225, 0.25, 0.0025, 0.09]) / 0.365
    assert torch.allclose(share, wanted, atol=0.015) and torch.allclose(logp, wanted.log()[token], atol=1e-5)
    token, logp = sample(LOGITS, 0, 1.0, None)
    assert token.tolist() == [1] and torch.allclose(logp, LOGITS[0, 1])


def test_low_precision_logits_are_normalised_in_float32():
    """bf16 log-softmax is off by 1e-2; ratios would be off by percents."""
    logits = torch.randn(4, 5000, generator=seeded()).bfloat16()
    token, logp = sample(logits, 1.0, 1.0, seeded())
    exact = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert logp.dtype == torch.float32 and torch.allclose(logp.double(), exact, atol=1e-5)


# ---------------------------------------------------------------- batches

def test_pad():
    rows = [[1, 2, 3], [4]]
    assert executor.pad(rows, 9, "cpu").tolist() == [[1, 2, 3], [4, 9, 9]]
    assert executor.pad(rows, 9, "cpu", left=True).tolist() == [[1, 2, 3], [9, 9, 4]]
    assert rows == [[1, 2, 3], [4]]


def test_what_may_be_captured():
    """Rotary embeddings that depend on the length reached look at a tensor in each step, which no graph can."""
    can = lambda kind: executor._can_capture(LlamaForCausalLM(LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
                         "short_factor": [1.0] * 4, "long_factor": [1.0] * 4})))
    assert can("default") and not can("dynamic") and not can("longrope")


def test_without_dropout():
    """Modules, attributes of layers that use the functional form, and the config."""
    from transformers import OPTConfig, OPTForCausalLM
    model = OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16,
                                     word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5))
    model.add_module("other", torch.nn.Dropout(0.5))
    run = lambda: model(torch.arange(9)[None]).logits
    assert not torch.equal(model.train()(torch.arange(9)[None]).logits, run())
    executor.without_dropout(model)
    assert torch.equal(run(), run()) and torch.equal(run(), model.eval()(torch.arange(9)[None]).logits)
    assert torch.equal(model.train().other(torch.ones(9)), torch.ones(9))


def test_token_logits_are_those_of_the_model(model):
    """Right padding without a mask does not reach back under causal attention; selected rows come in row-major order."""
    ids = executor.pad(PROMPTS, PAD, "cpu")
    select = torch.zeros_like(ids, dtype=torch.bool)
    for n, prompt in enumerate(PROMPTS):
        select[n, max(0, len(prompt) - 2):len(prompt)] = True
    with torch.no_grad():
        got = token_logits(model, ids, select)
        wanted = torch.cat([model(torch.tensor([p])).logits[0, max(0, len(p) - 2):] for p in PROMPTS])
        assert token_logits(model, ids, torch.zeros_like(select)).shape == (0, V)
    assert got.shape == (int(select.sum()), V)
    assert torch.allclose(got, wanted, atol=1e-4)


# ---------------------------------------------------------------- loading

def test_load_gives_back_what_was_saved(tiny):
    folder, model, tokenizer = tiny
    loaded, words = executor.load(str(folder), "cpu")
    assert not loaded.training and loaded.dtype == torch.float32
    assert words.eos_token_id == tokenizer.eos_token_id and words.get_vocab() == tokenizer.get_vocab()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    text = data.tiny_problems("code", 1, 0)[0].problem
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]            # no other tokenizer took its place
    assert words.decode(words(text)["input_ids"]) == text


def without_eos(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "mlp" in name))
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_wrong_shape(folder):
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage, words", [
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer"),
    (without_eos, "EOS"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config|tokenizer"),
    (shutil.rmtree, "tokenizer"),
    pytest.param(lambda f: (f / "model.safetensors").write_bytes(b"cut"), "model.safetensors"),
    pytest.param(with_a_wrong_shape, "model.norm.weight|causal LM"),
    pytest.param(without_a_tensor, "mlp|causal LM"),          # else random weights, silently
], ids=["no-tokenizer", "no-eos", "no-weights", "no-config", "bad-config", "no-folder", "cut-weights", "wrong-shape", "no-tensor"])
def test_load_says_what_is_missing(tiny, tmp_path, damage, words):
    """One line that names the folder and the mend; never a traceback from the depths, never a random model."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny[0], folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        executor.load(str(folder), "cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


class Careless(LlamaForCausalLM):
    """A model that looks at padding."""
    def forward(self, attention_mask=None, **given):
        return super().forward(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **given)


class Leaky(LlamaForCausalLM):
    """A model that looks at one place too many."""
    def forward(self, attention_mask=None, **given):
        if attention_mask is not None:
            attention_mask = attention_mask.clone()
            attention_mask[..., -1, -5] = True
        return super().forward(attention_mask=attention_mask, **given)


@pytest.mark.parametrize("damage, words", [(lambda m: m.model.norm.weight.data.fill_(float("nan")), "not finite"),
                                           (lambda m: setattr(m, "__class__", Careless), "mask padding wrongly"),
                                           (lambda m: setattr(m, "__class__", Leaky), "mask padding wrongly")])
def test_load_tries_decoding(model, damage, words):
    """Once, on every model: a padded row in our cache against the same tokens alone."""
    executor.check_decoding(model, "folder")
    damaged = copy.deepcopy(random_model("llama"))
    damage(damaged)
    with pytest.raises(UserError, match=f"folder: .*{words}"):
        executor.check_decoding(damaged, "folder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 8, 3000])
def test_load_accepts_sound_models(dtype, size):
    """Whatever the precision, and however small the vocabulary."""
    torch.manual_seed(size)
    config = LlamaConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                         initializer_range=0.3)
    executor.check_decoding(LlamaForCausalLM(config).eval().to(dtype), "folder")


def test_a_model_without_keys_and_values_is_refused():
    """Our cache speaks to attention only; a recurrent model would fail somewhere in the depths."""
    from transformers import MambaConfig, MambaForCausalLM
    mamba = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(UserError, match="mamba models"):
        executor.check_decoding(mamba, "folder")


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
    assert lora.targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"] and len(lora.layers) == 14
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


def test_only_the_adapter_learns_also_with_checkpointing(model):
    """The gradients do not depend on recomputation, and nothing but A and B has one."""
    grads = []
    for checkpointing in (False, True):
        changed, lora = adapted(model, targets=("q_proj", "down_proj"))
        if checkpointing:
            changed.gradient_checkpointing_enable({"use_reentrant": False})
            changed.train()
        F.cross_entropy(token_logits(changed, IDS, torch.ones_like(IDS).bool()), IDS[0]).backward()
        grads.append({name: p.grad for name, p in changed.named_parameters() if p.grad is not None})
        assert len(grads[-1]) == 2 * 2 * 2 and all(name.endswith((".lora_A", ".lora_B")) for name in grads[-1])
    assert all(g.abs().max() > 0 and torch.allclose(g, grads[1][name], atol=1e-6) for name, g in grads[0].items())


def test_save_merged_and_for_peft(tiny, model, tmp_path):
    """A plain folder that anyone loads, tied head or not, and beside it what peft reads: these names, these shapes."""
    from safetensors.torch import load_file
    for kind, base in (("tied", tiny[1]), ("own", model)):
        folder = tmp_path / kind
        changed, lora = adapted(base)
        before = {name: x.clone() for name, x in changed.state_dict().items()}
        lora.save(folder, "some/base")
        assert all(torch.equal(x, before[name]) for name, x in changed.state_dict().items()), "saving must not merge in place"
        plain = type(base).from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.allclose(plain(IDS).logits, changed(IDS).logits, atol=1e-4)
        assert plain.state_dict().keys() == base.state_dict().keys()
        config, tensors = json.loads((folder / "adapter" / "adapter_config.json").read_text()), load_file(
            folder / "adapter" / "adapter_model.safetensors")
        assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 3, 6.0)
        assert config["base_model_name_or_path"] == "some/base" and "q_proj" in config["target_modules"]
        assert len(tensors) == 2 * 14
        wide = base.config.intermediate_size
        name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
        assert tensors[name.format("A")].shape == (3, wide) and tensors[name.format("B")].shape == (32, 3)
        again = copy.deepcopy(base)
        executor.Lora.load(again, folder / "adapter")
        with torch.no_grad():
            assert torch.equal(again(IDS).logits, changed(IDS).logits)


def test_peft_and_we_read_each_other(model, tmp_path):
    """The adapter means the same to peft (which nothing else here needs), in both directions."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    changed, lora = adapted(model)
    lora.save(tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    want = changed(IDS).logits
    assert torch.allclose(theirs(IDS).logits, want, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(model)
    executor.Lora.load(again, tmp_path / "theirs")
    assert torch.allclose(again(IDS).logits, want, atol=1e-6)


def test_an_adapter_that_does_not_match_is_an_error(llama, tmp_path):
    """It names the folder and the tensor; half an adapter would be a model that nobody trained."""
    adapted(llama)[1].save(tmp_path, "base")
    folder = tmp_path / "adapter"
    other = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48))
    with pytest.raises(UserError, match=r"adapter.*down_proj.lora_B.weight is \(32, 3\), must be \(16, 3\)"):
        executor.Lora.load(other, folder)
    deeper = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="layers.2.*is None"):
        executor.Lora.load(deeper, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (({"target_modules": ["query"]}, "query"), ({"r": None}, "not an adapter"), ({"use_dora": True}, "use_dora"),
                          ({"bias": "all"}, "bias")):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            executor.Lora.load(copy.deepcopy(llama), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="not an adapter"):
        executor.Lora.load(copy.deepcopy(llama), folder)
    with pytest.raises(UserError, match="nothing"):
        executor.Lora(copy.deepcopy(llama), 3, 6.0, ("q_proj", "nothing"))


# ---------------------------------------------------------------- the frozen executor

MATH = [Problem(f"m{i}", "tiny", "math", f"Mia has {i} coins .", str(20 + i), [], "1 + 1 = ?") for i in range(2)]
CODE = Problem("c", "tiny", "code", "write f ( x ) .", "", [{"assert": "assert f(1) == 2"}, {"assert": "assert f(2) == 3"}])
RIGHT, HALF, BROKEN = "\ndef f(x):\n    return x + 1", "\ndef f(x):\n    return 2", "\ndef f(x:"


@pytest.fixture
def canned(tiny, monkeypatch):
    """canned(outputs) -> (Executor, calls): decoding is replaced by these outputs, one list per call of generate."""
    texts = [DIGITS, RIGHT, HALF, BROKEN, *(data.executor_prompt(p, p.reference_reasoning) for p in [*MATH, CODE])]
    tokenizer = executor.tiny_tokenizer(texts)

    def make(*outputs, **options):
        calls, queue = [], list(outputs)

        def fake(model, prompts, *, num_samples, **given):
            calls.append({"prompts": prompts, "num_samples": num_samples, **given})
            tokens = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in queue.pop(0)]
            assert len(tokens) == len(prompts) * num_samples
            return Completions(tokens, [[0.0] * len(t) for t in tokens], [True] * len(tokens))
        monkeypatch.setattr(executor, "generate", fake)
        return Executor(tiny[1], tokenizer, max_new_tokens=9, **options), calls
    return make


def test_success_counts_of_answers(canned):
    """Counts go to the problem they belong to; EOS and the leading space are no part of an answer."""
    frozen, calls = canned([" 20", " 21", " 20", " 21", " 20", " 21"])
    assert frozen.success(MATH, ["a", "b"], 3) == [2, 2]
    assert calls[0]["num_samples"] == 3 and len(calls[0]["prompts"]) == 2 and calls[0]["max_new_tokens"] == 9
    frozen, _ = canned([" 20", " 20", "", " 21"])
    assert frozen.success(MATH, None, 2) == [2, 1]


def test_success_counts_of_programs(canned):
    """All tests must pass. A failing program is a score of 0, and a mixed batch keeps its order."""
    frozen, _ = canned([RIGHT, HALF, " 20", " 21", BROKEN, RIGHT])
    runs = frozen.run([CODE, MATH[0], CODE], ["a", "b", "c"], 2)
    assert [[run.ok for run in row] for row in runs] == [[True, False], [True, False], [False, True]]
    assert [[run.score for run in row] for row in runs] == [[1, 0], [1, 0], [0, 1]]
    assert runs[0][0].output == RIGHT and runs[1][0].output == " 20"
    assert frozen.spent["program_runs"] == 4


def test_partial_scores_do_not_count_as_success(canned):
    """exec_score shapes the score only; success, and so uplift, stays all or nothing."""
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
    again.load_state(frozen.state())                               # a resumed run measures nothing again
    assert again.baseline(MATH, 2) == [1, 2] and not calls and again.spent == frozen.spent


def test_state_is_a_copy(canned):
    """A checkpoint in memory must not change when training goes on."""
    frozen, _ = canned([" 20"], [" 21"])
    frozen.baseline(MATH[:1], 1)
    state, spent = frozen.state(), dict(frozen.spent)
    frozen.baseline(MATH[1:], 1)
    assert len(state["baseline"]) == 1 and state["spent"] == spent != frozen.spent


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


def test_no_problems_no_runs(tiny):
    """A step whose groups were all filtered asks for nothing and gets nothing."""
    frozen = Executor(tiny[1], tiny[2], max_new_tokens=4)
    assert frozen.success([], None, 2) == [] and frozen.success([], [], 2) == [] and frozen.baseline([], 2) == []


def test_the_executor_decodes_for_real(tiny):
    """Without stubs: frozen weights, reproducible from its generator, counts in range."""
    _, model, tokenizer = tiny
    problems = data.tiny_problems("math", 3, 0)
    outputs = []
    for _ in range(2):
        frozen = Executor(model, tokenizer, max_new_tokens=4, generator=seeded(5))
        outputs.append(frozen.run(problems, [p.reference_reasoning for p in problems], 2))
        assert not any(p.requires_grad for p in frozen.model.parameters()) and not frozen.model.training
    assert outputs[0] == outputs[1] and [len(row) for row in outputs[0]] == [2, 2, 2]
    model.requires_grad_(True)


def test_pad_id_falls_back_to_eos():
    class Words:
        eos_token_id, pad_token_id = 7, None
    assert executor.pad_id(Words) == 7
    Words.pad_token_id = 0                                         # 0 is an id, not "none"
    assert executor.pad_id(Words) == 0


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


EXAMPLE = BaseExample("Mia has 7 .\n", "<reasoning>7 + 5 = ?</reasoning>", True, "\nAnswer:", " 12")


@pytest.fixture(scope="module")
def words():
    return executor.tiny_tokenizer([EXAMPLE.prompt + EXAMPLE.trace + EXAMPLE.ask + EXAMPLE.answer, DIGITS])


def targets(tokenizer, example):
    """[(text before, text to predict)] of every position with a loss."""
    ids, labels = base_sequence(tokenizer, example)
    assert len(ids) == len(labels)
    return [(tokenizer.decode(ids[:t + 1]), tokenizer.decode([label])) for t, label in enumerate(labels) if label != IGNORE]


def test_base_sequence_labels(words):
    """The planner learns its trace and then EOS, although the sequence goes on; the executor its answer and EOS. What
    is only given (the rest of the prompt, a careful trace, the question) is out of the loss; the first line, the
    problem's text, is in it."""
    problem = [("Mia", " has"), ("Mia has", " 7"), ("Mia has 7", " .")]
    planner = [(EXAMPLE.prompt + a, b) for a, b in [
        ("", "<reasoning>"), ("<reasoning>", "7"), ("<reasoning>7", " +"), ("<reasoning>7 +", " 5"), ("<reasoning>7 + 5", " ="),
        ("<reasoning>7 + 5 =", " ?"), ("<reasoning>7 + 5 = ?", "</reasoning>"), (EXAMPLE.trace, "<eos>")]]
    asked = EXAMPLE.prompt + EXAMPLE.trace + EXAMPLE.ask
    answer = [(asked, " 1"), (asked + " 1", "2"), (asked + " 12", "<eos>")]
    assert targets(words, EXAMPLE) == problem + planner + answer
    given = BaseExample(EXAMPLE.prompt, EXAMPLE.trace, False, EXAMPLE.ask, EXAMPLE.answer)
    assert targets(words, given) == problem + answer
    longer = BaseExample(EXAMPLE.prompt + "7 + 5 = ?\nAnswer:", "", False, "", " 12")
    assert targets(words, longer) == problem + [(longer.prompt + a, b) for a, b in (("", " 1"), (" 1", "2"), (" 12", "<eos>"))]
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


def test_a_word_outside_the_vocabulary_is_an_error(words):
    with pytest.raises(ValueError, match="zebra"):
        base_sequence(words, BaseExample("zebra", "", False, "", " 12"))


def test_finetune_teaches_both_roles_and_where_to_stop(words):
    """Eight sequences learned by heart (but for the number in the first line): the loss falls, the planner stops after its closing tag, the executor after
    its answer. A label off by one position, or an EOS out of the loss, fails here."""
    examples = [BaseExample(f"Mia has {a} .\n", f"<reasoning>{a} + {b} = ?</reasoning>", True, "\nAnswer:", f" {a + b}")
                for a, b in ((1, 5), (2, 3), (3, 3), (4, 5), (5, 2), (6, 1), (7, 2), (8, 1))]
    sequences = [base_sequence(words, e) for e in examples]
    before = json.dumps(sequences)
    torch.manual_seed(0)
    model = executor.tiny_model(len(words), 32, 2)

    @torch.no_grad()
    def loss():
        return sum(F.cross_entropy(model(torch.tensor([ids])).logits[0], torch.tensor(labels), ignore_index=IGNORE).item()
                   for ids, labels in sequences) / len(sequences)
    first = loss()
    last = finetune(model, sequences, epochs=120, batch_size=4, learning_rate=8e-3, warmup=10, seed=0, pad_id=0)
    assert loss() < 0.3 < 2 < first and last < 0.3
    assert not model.training and json.dumps(sequences) == before
    read = lambda prompt: words.batch_decode(generate(model, [words(prompt)["input_ids"]], temperature=0, max_new_tokens=12,
                                                      eos_id=words.eos_token_id, pad_id=0).tokens)[0]
    for e in examples:
        assert read(e.prompt) == e.trace + "<eos>"
        assert read(e.prompt + e.trace + e.ask) == e.answer + "<eos>"


def test_finetune_is_reproducible_and_its_batch_ignores_padding(words):
    """The same seed gives the same weights; a batch of ragged sequences has the loss of its tokens, not of its pads."""
    sequences = [base_sequence(words, EXAMPLE), base_sequence(words, BaseExample("Mia .\n", "", False, "", " 1"))]

    def train(rows, pad_id):
        torch.manual_seed(0)
        model = executor.tiny_model(len(words), 16, 1)
        value = finetune(model, rows, epochs=1, batch_size=2, learning_rate=1e-3, warmup=1, seed=0, pad_id=pad_id)
        return value, torch.cat([p.detach().flatten() for p in model.parameters()])
    value, weights = train(sequences, 0)
    again, same = train(sequences, 0)
    assert value == again and torch.equal(weights, same)
    assert train(sequences, 5)[0] == pytest.approx(value, abs=1e-6)
    torch.manual_seed(0)
    model = executor.tiny_model(len(words), 16, 1)
    with torch.no_grad():
        each = [F.cross_entropy(model(torch.tensor([ids])).logits[0], torch.tensor(labels), ignore_index=IGNORE, reduction="sum")
                for ids, labels in sequences]
    count = sum(label != IGNORE for _, labels in sequences for label in labels)
    assert value == pytest.approx(sum(each).item() / count, abs=1e-4)


def test_finetune_stops_early_and_keeps_the_best_weights(words, monkeypatch):
    """Held-out sequences that say the opposite: their loss falls while the model learns the words, then rises."""
    say = lambda answer: base_sequence(words, BaseExample("Mia has 1 .\n", "", False, "Answer:", answer))
    learn, held = [say(" 1")] * 4, [say(" 1"), say(" 5")]
    run = lambda heldout: finetune(model, learn, epochs=200, batch_size=4, learning_rate=8e-3, warmup=10, seed=0, pad_id=0,
                                   heldout=heldout)
    measure = lambda: executor.heldout_loss(model, held, batch_size=1, pad_id=0)
    torch.manual_seed(0)
    model = executor.tiny_model(len(words), 16, 1)
    start = copy.deepcopy(model.state_dict())
    first = measure()
    run(())
    overfit = measure()
    model.load_state_dict(start)
    run(held)
    best = measure()
    assert best < first and best < overfit and not model.training
    model.load_state_dict(start)                                   # a training that can only harm changes nothing
    real, calls = executor.heldout_loss, []
    monkeypatch.setattr(executor, "heldout_loss", lambda *args, **more: calls.append(1) or real(*args, **more))
    finetune(model, [say(" 5")], epochs=20, batch_size=1, learning_rate=1.0, warmup=0, seed=0, pad_id=0, heldout=held)
    assert len(calls) == 3, "at the start, and two without a new minimum"
    assert measure() == pytest.approx(first)


# ---------------------------------------------------------------- the command

def test_base_of_a_run(tmp_path):
    with pytest.raises(UserError, match="base.json.*executor.py"):
        executor.base_of(tmp_path)
    (tmp_path / "base.json").write_text('{"model": "base"}')
    assert executor.base_of(tmp_path) == str(tmp_path / "base")
    (tmp_path / "base.json").write_text('{"model": "Qwen/x"}')
    assert executor.base_of(tmp_path) == "Qwen/x"


def test_the_command_trains_checks_and_is_skipped_when_done(tmp_path, capsys):
    """The whole stage at toy size; a second call must not train again, and the stage before must have run."""
    run = str(tmp_path / "run")
    arguments = ["--run", run, "--sequences", "64", "--hidden", "16", "--layers", "1", "--eval_problems", "2", "--device", "cpu"]
    with pytest.raises(UserError, match="heldout.jsonl"):
        executor.main([*arguments, "--run", str(tmp_path / "empty")])
    data.main(["--run", run, "--train", "3", "--heldout", "3"])
    executor.main(arguments)
    record = json.loads((tmp_path / "run" / "base.json").read_text())
    assert record["model"] == "base" and record["problems"] == 2
    assert 0 <= record["no_trace"] <= 1 and 0 <= record["reference_trace"] <= 1
    executor.load(executor.base_of(run), "cpu")
    stamp = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    executor.main(arguments)
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert "rm.py" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="--hidden"):
        executor.main([*arguments, "--hidden", "32"])


def test_bench_prints_one_table(tiny, monkeypatch):
    """Three decoders, the same outputs; and one that decodes something else is found out."""
    small = executor.BenchSettings(problems=1, traces=2, repeats=2, prompt_tokens=20, new_tokens=3, single=2, rounds=2, device="cpu")
    lines = executor.bench(small).splitlines()
    assert "random model" in lines[0] and "2 rounds" in lines[0] and len(lines) == 7
    assert [line.split(" | ")[1:3] for line in lines[4:]] == [["2", "1.00"], ["6", "1.00"], ["6", "1.00"]]
    assert "| 1.0 x |" in lines[6]
    assert str(tiny[0]) in executor.bench(dataclasses.replace(small, model=str(tiny[0])))
    real = executor.generate
    monkeypatch.setattr(executor, "generate", lambda model, prompts, **k: real(model, [p[:-1] for p in prompts], **k))
    with pytest.raises(UserError, match="executor.generate: [1-6] of 6 outputs differ"):
        executor.bench(small)


def test_free_and_peak_memory_are_measured():
    """A block of 64 MiB is seen, and forgotten after a reset."""
    cpu = torch.device("cpu")
    before = executor.peak_bytes(cpu, reset=True)
    block = torch.ones(2**24)
    assert executor.peak_bytes(cpu) - before > 2**25
    del block
    executor.peak_bytes(cpu, reset=True)
    assert executor.peak_bytes(cpu) - before < 2**25
