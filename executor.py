"""Models and decoding: sample from a causal LM with a key/value cache, and run it as the frozen executor.

The executor turns problem + trace (or the problem alone) into an artifact, an answer or a program, which verify.py
judges. It never learns. Uplift is success with a trace minus success without one, measured with the same weights from
the first training step to the last.

Shapes: N prompts, R rows (all samples of all prompts), P tokens of the longest prompt, L slots, V vocabulary,
B sequences, T tokens, m selected positions, H hidden, K executor runs.

Read sections 1 and 2. Sections 3 to 8 (captured steps, supervised training, judging and loading, LoRA, an executor on
a server, the tiny base model) are for reference. Sections 1 and 3 are the decoder. They need no other file of ours.

    python executor.py --run_dir runs/tiny-math                            # trains the tiny base model
    python executor.py --run_dir runs/gsm8k-math --model Qwen/Qwen2.5-0.5B-Instruct

Left out: paged caches, continuous batching, several GPUs.
"""

# ---------------------------------------------------------------------------------------------------- 1. decoding

import itertools
import math
import os
import random
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

PREFILL_TOKENS = 4096                             # most tokens in one forward pass over prompts
# transformers renames the argument `past_key_values` to `cache` after 5.23, and the field of its outputs with it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class Completions:
    """Samples in prompt-major order: those of prompt 0, then those of prompt 1, ..."""
    tokens: list[list[int]]                      # ends with EOS where one was sampled
    logprobs: list[list[float]]                  # of each token, under the sampling temperature


class StaticCacheLayer(DynamicLayer):
    """Keys and values of one attention layer, (R, heads, L slots, width), allocated once.

    Prompts are padded on the left, so all of them end in the same slot, and token t of every row has the same slot.
    The attention mask of the batch says which slots are padding.
                        slot  0 1 2 3 | 4 5 6
                   prompt A   . a a a | x x .          '.' is empty
                   prompt B   b b b b | y y .
    """

    def __init__(self, slots: int):
        super().__init__()
        self.slots, self.filled, self.stores = slots, 0, []
        self.next_slot = None                     # (1,) int64 on the device, in a captured step

    def update(self, keys, values, *_, **__):
        """Attention calls this. Appends (R, heads, T, width) and returns everything stored so far, or all slots in a
        captured step."""
        if self.next_slot is not None:
            for store, new in zip(self.stores, (keys, values)):
                store.index_copy_(2, self.next_slot, new.to(store.dtype))
            return self.stores
        if not self.stores:
            # Zeros, because a masked slot has weight 0 and 0 * NaN is NaN. In the dtype of the values, because under
            # autocast rotary embeddings return keys in float32.
            for new in (keys, values):
                self.stores.append(values.new_zeros(*new.shape[:2], self.slots, new.shape[3]))
        start, self.filled = self.filled, self.filled + keys.shape[2]
        for store, new in zip(self.stores, (keys, values)):
            store[:, :, start:self.filled] = new
        return [store[:, :, :self.filled] for store in self.stores]

    def get_seq_length(self):
        return self.filled

    def reorder_cache(self, rows):
        """Row rows[i] becomes row i. The number of rows may change."""
        self.stores = [store[rows] for store in self.stores]


def empty_cache(model, slots):
    """Static layers for full attention. Windows, convolutions and recurrent states keep transformers' own layers."""
    cache = DynamicCache(config=model.config)
    cache.layers = [StaticCacheLayer(slots) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def forward(model, ids, position, mask, cache):
    """Appends ids (R, T) to the cache and returns the logits (R, V) after the last one. Each token sees the slots up
    to its own where mask (R, slots so far) is 1. A mask (R, 1, 1, L) is added to the attention scores instead."""
    # An index, not the number 1: for a number models take a slice, and on a CPU torch would then multiply with one
    # copy of the head for every row (gigabytes, seconds).
    last = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
    output = model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=last,
                   **{CACHE: cache})
    return output.logits[:, -1]


def prefill(model, prompts, slots):
    """Reads prompts, longest first, into a new cache. Returns the logits (N, V) of the next token, the cache, the mask
    (N, slots) and the position (N,) of the next token."""
    device = model.get_input_embeddings().weight.device
    P = len(prompts[0])
    ids = torch.tensor([[0] * (P - len(prompt)) + prompt for prompt in prompts], device=device)          # (N, P)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    position = torch.arange(P, device=device) - (P - length)[:, None]             # 0 at each prompt's first token
    mask = torch.zeros(len(prompts), slots, dtype=torch.long, device=device)
    mask[:, :P] = position >= 0                                                   # padding (id 0) is never seen
    cache = empty_cache(model, slots)
    # Reading a few columns at a time bounds the memory. Convolutions and recurrent states would forget the earlier
    # columns, so models that have them read all columns at once.
    attention_only = all(type(layer) in (StaticCacheLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    columns = max(1, PREFILL_TOKENS // len(prompts)) if attention_only else P
    for start in range(0, P, columns):
        end = min(start + columns, P)
        logits = forward(model, ids[:, start:end], position[:, start:end].clamp(min=0), mask[:, :end], cache)
    return logits, cache, mask, length                                            # the next position is the prompt's length


def sample(logits, temperature, uniform):
    """Next token (R,) and its log-prob (R,) under this temperature, from logits (R, V) and uniform (R,) in [0, 1).
    The token is the first whose cumulative probability exceeds the row's uniform number. Temperature 0 takes the most
    likely token and reports its log-prob at temperature 1."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1)
    else:
        mass = logp.exp().cumsum(dim=-1, dtype=torch.float64)                     # float32 sums may decrease
        point = uniform.double() * mass[:, -1]                                    # the total may differ from 1
        token = torch.searchsorted(mass, point[:, None], right=True)[:, 0]        # never a token of probability 0
        token = token.clamp(max=logits.shape[-1] - 1)                             # NaN: `generate` raises
    return token, logp.gather(-1, token[:, None])[:, 0]


def uniform_numbers(rng_keys: list[str], count: int) -> torch.Tensor:
    """(len(rng_keys), count) float64 in [0, 1). Row i depends on rng_keys[i] alone, on every machine. (A CPU generator
    of torch uses only 32 bits of its seed.)"""
    rows = [[rng.random() for _ in range(count)] for rng in map(random.Random, rng_keys)]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rng_keys), count)


def batches(prompts, samples, new, max_cache_tokens, equal_lengths):
    """Yields batches of prompt indices, longest prompt first, with rows x slots <= max_cache_tokens. A prompt that
    exceeds the limit alone is a batch of its own."""
    batch, rows, longest = [], 0, 0
    for n in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
        full = (rows + samples[n]) * (longest + new) > max_cache_tokens
        if batch and (full or equal_lengths and len(prompts[n]) < longest):
            yield batch
            batch, rows = [], 0
        if not batch:
            longest = len(prompts[n])
        batch.append(n)
        rows += samples[n]
    if batch:
        yield batch


def record(result, out_index, done, ends, tokens, logprobs):
    """Appends tokens and logprobs, (R, look) lists, to the rows that are not done yet, up to the end of each."""
    for row, pairs in enumerate(map(zip, tokens, logprobs)):
        for token, logp in pairs:
            if done[row]:
                break
            if not math.isfinite(logp):
                raise FloatingPointError("the model's logits are not finite; its weights are damaged, or too large for "
                                         "its dtype")
            result.tokens[out_index[row]].append(int(token))
            result.logprobs[out_index[row]].append(logp)
            done[row] = int(token) in ends


class ContextError(ValueError):
    """A prompt and its new tokens exceed the positions that the model knows."""


def context_of(model) -> float:
    """The longest sequence that a model may read, inf without a limit. Attention windows are not a limit."""
    config = model.config.get_text_config()
    # Beyond the last two, attention is sparse: decoding would select other keys than scoring.
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "index_topk", "keep_window_size")]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):                                           # may differ by kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            # Beyond its original length longrope changes the frequencies of the whole batch.
            limits.append(part["original_max_position_embeddings"])
    return min(filter(None, limits), default=math.inf)


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, num_samples: int | list[int] = 1, max_new_tokens: int = 64,
             temperature: float = 1.0, eos_id: int | list[int], uniforms: torch.Tensor | None = None, generator=None,
             max_cache_tokens: int = 65536, equal_lengths: bool = False) -> Completions:
    """Samples completions of prompts (lists of token ids): `num_samples` of each, or num_samples[n] of prompt n.

    Each batch has four phases:
      prefill   reads every prompt once, padded on the left, so that all prompts end in the same slot
      copy      gives each sample its own copy of the prompt's keys and values
      decode    adds one token to all rows at a time, in the same slot of every row
      leave     removes finished rows once they are a quarter of the batch (on CUDA a half)

                        prefill         copy                 decode               leave
          prompt A    . a a a      . a a a |  . .        . a a a | x E        b b b b | y y
          prompt B    b b b b      . a a a |  . .        . a a a | z E        b b b b | y v
                                   b b b b |  . .        b b b b | y y
                                   b b b b |  . .        b b b b | y v        E: end of sequence

    uniforms (R, >= max_new_tokens) in [0, 1) holds each row's random numbers, one per token. So a row does not depend
    on the rest of its batch, except for rounding. Without `uniforms`, `generator` draws them, or torch's own. At
    temperature 0 nothing is drawn. Every id of `eos_id` ends a row. equal_lengths: a batch holds prompts of one length.
    Raises ValueError for impossible arguments, ContextError for a prompt that leaves no room for its completion and
    FloatingPointError for logits that are not finite."""
    samples = [num_samples] * len(prompts) if isinstance(num_samples, int) else list(num_samples)
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    first_row = [0, *itertools.accumulate(samples)]                               # of each prompt in the result
    R = first_row[-1]
    if temperature < 0 or len(samples) != len(prompts) or not all([*prompts, *samples]):
        raise ValueError("needs a temperature >= 0, prompts that are not empty, and samples of each")
    longest, context = max(map(len, prompts), default=0), context_of(model)
    if longest + max_new_tokens > context:
        raise ContextError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
                           f"{context}; shorten the problems or lower the number of new tokens")
    device = model.get_input_embeddings().weight.device
    if temperature == 0:
        uniforms = torch.zeros(R, max_new_tokens)
    elif uniforms is None:
        source = generator.device if generator else device
        uniforms = torch.rand(R, max_new_tokens, dtype=torch.float64, generator=generator, device=source)
    result = Completions([[] for _ in range(R)], [[] for _ in range(R)])

    for batch in batches(prompts, samples, max_new_tokens, max_cache_tokens, equal_lengths):
        # 1. Prefill: read every prompt once, whatever the number of its samples.
        P = len(prompts[batch[0]])
        logits, cache, mask, position = prefill(model, [prompts[n] for n in batch], P + max_new_tokens)

        # 2. Copy. out_index[row] is the row's place in the result.
        out_index = [first_row[n] + s for n in batch for s in range(samples[n])]
        rows = torch.tensor([i for i, n in enumerate(batch) for _ in range(samples[n])], device=device)
        cache.reorder_cache(rows)
        logits, mask, position = logits[rows], mask[rows], position[rows]
        uniform = uniforms[out_index].to(device)                                  # (R, max_new_tokens)

        # 3. Decode. The host reads `read_every` tokens at a time. Tokens after the end of a row are dropped.
        read_every, shrink_at = (8, 0.5) if device.type == "cuda" else (1, 0.75)
        done, step, unread = [False] * len(out_index), None, []
        for t in range(max_new_tokens):
            token, logp = sample(logits, temperature, uniform[:, t])
            unread.append(torch.stack([token.double(), logp.double()]))
            last = t == max_new_tokens - 1
            if len(unread) == read_every or last:
                on_host, unread = torch.stack(unread, dim=-1).tolist(), []        # (2, R, read): the host waits here
                record(result, out_index, done, ends, *on_host)
                if all(done) or last:
                    break

                # 4. Leave. Compacting the batch costs the time of a few steps, and on CUDA a new graph.
                stay = [row for row, over in enumerate(done) if not over]
                if len(stay) <= shrink_at * len(done):
                    rows = torch.tensor(stay, device=device)
                    cache.reorder_cache(rows)
                    token, mask, position, uniform = token[rows], mask[rows], position[rows], uniform[rows]
                    out_index = [out_index[row] for row in stay]
                    done, step = [False] * len(stay), None
            mask[:, P + t] = 1
            step = step or decoding_step(model, cache, mask, P + t)               # section 3
            logits = step(token, position, P + t)
            position = position + 1
        del cache, step                                                           # before the next one is allocated
    return result


# ------------------------------------------------------------------------------- 2. the model and the frozen executor

import data
import verify
from data import Problem, UserError

CACHE_GIB = 4.0                                   # of keys and values in one batch
SMALL = 20_000_000                                # parameters


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a text: those of the tokenizer and of the model's generation_config."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


def decode_text(tokenizer, rows: list[list[int]]) -> list[str]:
    """Texts of rows of ids. The clean-up of spaces would turn ' '.join(a) into ''.join(a)."""
    if not rows:                                  # older versions of transformers decode no rows as one
        return []
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def freeze(model):
    """Puts the model into evaluation mode and turns its gradients off."""
    return model.eval().requires_grad_(False)


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32. (T4 and V100 only emulate it.)"""
    able = False
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = {"avx512_bf16", "amx_bf16"} & {name for name, has in torch.cpu.get_capabilities().items() if has}
    return torch.bfloat16 if able else torch.float32


def work_dtype(model) -> torch.dtype:
    """The dtype of matrix products: `fast_dtype`, but float32 for small models, which gain nothing from 16 bits."""
    large = sum(p.numel() for p in model.parameters()) > SMALL
    return fast_dtype(model.device) if large else torch.float32


def autocast(model):
    """Matrix products in `work_dtype`. Trained weights stay float32, so small updates are not rounded away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=work_dtype(model) == torch.bfloat16)


class LM:
    """A causal LM with its tokenizer, and what `examine` finds out about it once: `context` is the longest sequence,
    `equal_lengths` says that a batch must hold prompts of one length, `plain_head` says that the logits are the head
    applied to the last hidden states, and `tokens_per_gib` tokens of keys and values fit into one GiB."""

    def __init__(self, model, tokenizer):
        """UserError for a model that cannot be decoded with cached keys and values."""
        self.model, self.tokenizer = model, tokenizer
        self.device = model.get_input_embeddings().weight.device
        self.eos_ids = eos_ids(model, tokenizer)
        self.context, self.equal_lengths, self.plain_head, self.tokens_per_gib = examine(model)       # section 5

    def generate(self, prompts: list[list[int]], num_samples: int | list[int], max_new_tokens: int, temperature: float,
                 rng_keys: list[str], max_cache_gib: float = CACHE_GIB) -> Completions:
        """Runs `generate` with one rng key per row. UserError for a prompt that leaves no room for its completion."""
        try:
            with autocast(self.model):                            # as in `hidden`, so sampled and scored log-probs agree
                return generate(self.model, prompts, num_samples=num_samples, max_new_tokens=max_new_tokens,
                                temperature=temperature, eos_id=self.eos_ids, equal_lengths=self.equal_lengths,
                                uniforms=uniform_numbers(rng_keys, max_new_tokens),
                                max_cache_tokens=max(1, int(max_cache_gib * self.tokens_per_gib)))
        except ContextError as error:
            raise UserError(str(error)) from None

    def hidden(self, ids, positions):
        """Last hidden states (m, H) at positions (m,) of ids.flatten(), from ids (B, T) padded on the right. Causal
        attention needs no mask for that. Without a plain head, returns the logits (m, V) instead."""
        with autocast(self.model):
            if self.plain_head:
                output = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            else:
                output = self.model(input_ids=ids, use_cache=False).logits
        return output.flatten(0, 1)[positions]

    def head(self, hidden):
        """Logits (rows, V) of some rows of `hidden`."""
        if not self.plain_head:
            return hidden
        with autocast(self.model):
            return self.model.get_output_embeddings()(hidden)


@dataclass(frozen=True)
class Run:
    """One executor run."""
    output: str
    ok: bool                                      # the verifier accepts the output
    score: float                                  # 1 or 0, or for programs a partial score of `verify.exec_score`
    truncated: bool                               # the output was cut at max_new_tokens, or had no room at all


NO_ROOM = Run("", ok=False, score=0.0, truncated=True)


class Executor:
    """A frozen LM that reads problem + trace and writes the artifact, which the verifier judges.

    `spent` counts prompt tokens, generated tokens and program runs. Errors of the model and of the sandbox are raised.
    They are never scores."""

    def __init__(self, model, tokenizer, *, max_new_tokens: int, temperature: float = 0.7, exec_score: str = "binary",
                 seed: int = 0, max_cache_gib: float = CACHE_GIB):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature, self.max_cache_gib = max_new_tokens, temperature, max_cache_gib
        self.exec_score, self.seed = exec_score, seed
        self.spent = {"executor_prompt_tokens": 0, "executor_tokens": 0, "program_runs": 0}
        self.baselines = {}                       # (problem_id, K): successes of K runs without a trace
        if model is not None:                     # None: the model is on a server, section 7
            self.lm = LM(freeze(model), tokenizer)
            self.context = self.lm.context

    def run(self, problems: list[Problem], traces: list[str | None] | None, num_runs: int | list[int],
            rng_key: str = "") -> list[list[Run]]:
        """Independent runs of every problem with its trace (None: without one): `num_runs` of each, or num_runs[n] of
        problem n, as [problem][run]. `rng_key` names the occasion, such as a training step, so that the same run draws
        new random numbers later. A trace that leaves no room for an output is a failed run. UserError for a problem
        that leaves none without a trace."""
        traces = [None] * len(problems) if traces is None else traces
        num_runs = [num_runs] * len(problems) if isinstance(num_runs, int) else num_runs
        keys = self._rng_keys(problems, traces, num_runs, rng_key)
        runs = [[NO_ROOM] * K for K in num_runs]
        prompts, chosen = [], []
        for n, (problem, trace) in enumerate(zip(problems, traces)):
            prompt = data.encode_prompt(self.tokenizer, data.executor_prompt(problem, trace))
            if len(prompt) + self.max_new_tokens <= self.context:
                prompts.append(prompt)
                chosen.append(n)
            elif trace is None:
                raise UserError(f"{problem.problem_id}: the executor's prompt of {len(prompt)} tokens and "
                                f"{self.max_new_tokens} new ones exceed its context of {self.context}; leave the "
                                "problem out, or lower --max_answer_tokens")
        outputs = self._write(prompts, [num_runs[n] for n in chosen], [key for n in chosen for key in keys[n]])
        self.spent["executor_prompt_tokens"] += sum(map(len, prompts))
        tried = [problems[n] for n in chosen for _ in runs[n]]
        judged = iter(judge(tried, outputs, self.exec_score))                     # by verify.py: section 5
        self.spent["program_runs"] += sum(problem.task_type == "code" for problem in tried)
        for n in chosen:
            runs[n] = list(itertools.islice(judged, num_runs[n]))
        for problem, trace, own in zip(problems, traces, runs):
            if trace is None:
                self.baselines[problem.problem_id, len(own)] = sum(run.ok for run in own)
        return runs

    def _rng_keys(self, problems, traces, num_runs, rng_key):
        """The rng key of each run. A problem's traces are its samples 0, 1, ... A run without a trace serves all steps,
        so its key does not name the step."""
        keys, seen = [], {}
        for problem, trace, K in zip(problems, traces, num_runs, strict=True):
            key = f"alone {self.seed} {problem.problem_id}"
            if trace is not None:
                sample = seen.get(problem.problem_id, 0)
                seen[problem.problem_id] = sample + 1
                key = f"run {self.seed} {rng_key} {problem.problem_id} {sample}"
            keys.append([f"{key} {k}" for k in range(K)])
        return keys

    def _write(self, prompts, num_runs, rng_keys):
        """(output, truncated) of num_runs[n] runs of prompt n, in prompt-major order."""
        try:
            tokens = self.lm.generate(prompts, num_runs, self.max_new_tokens, self.temperature, rng_keys,
                                      self.max_cache_gib).tokens
        except FloatingPointError as error:                        # the UserError names the model
            raise UserError(f"the frozen executor {self.model.name_or_path}: {error}") from None
        self.spent["executor_tokens"] += sum(map(len, tokens))
        texts = decode_text(self.tokenizer, tokens)
        return [(text, row[-1] not in self.lm.eos_ids) for text, row in zip(texts, tokens)]

    def success(self, problems, traces, num_runs, rng_key: str = "") -> list[int]:
        """The number of successful runs of every problem. Arguments of `run`."""
        return [sum(run.ok for run in runs) for runs in self.run(problems, traces, num_runs, rng_key)]

    def run_with_baseline(self, problems: list[Problem], traces: list[str], num_runs: int,
                          rng_key: str = "") -> tuple[list[list[Run]], list[int]]:
        """1 + `num_runs` runs with each trace, and each problem's success count of `num_runs` runs without one, in one
        call of `generate`. The executor is frozen, so one count without a trace serves a problem's whole group and all
        later steps. A problem that has one is not run again."""
        new = self._without_baseline(problems, num_runs)
        counts = [1 + num_runs] * len(problems) + [num_runs] * len(new)
        runs = self.run(problems + new, traces + [None] * len(new), counts, rng_key)
        return runs[:len(problems)], [self.baselines[p.problem_id, num_runs] for p in problems]

    def baseline(self, problems: list[Problem], num_runs: int) -> list[int]:
        """Success counts of `num_runs` runs without a trace, measured where they are not known yet."""
        self.run(self._without_baseline(problems, num_runs), None, num_runs)
        return [self.baselines[p.problem_id, num_runs] for p in problems]

    def _without_baseline(self, problems, num_runs):
        new = {p.problem_id: p for p in problems if (p.problem_id, num_runs) not in self.baselines}
        return list(new.values())


# ----------------------------------------------------------------------------------------- 3. captured steps

GRAPHS = os.environ.get("TRACELIFT_GRAPHS") != "0"        # capture decoding steps on CUDA


def decoding_step(model, cache, mask, first):
    """A function (token (R,), position (R,), slot) -> logits (R, V) that appends one token to each row. `first` is its
    first slot. mask[:, slot] must be 1 by then."""
    global GRAPHS
    if GRAPHS and mask.is_cuda and all(type(layer) is StaticCacheLayer for layer in cache.layers):
        try:
            return captured_step(model, cache, mask, first)
        except Exception as error:                # whatever the model or a library raises in capture
            GRAPHS = False
            print(f"decoding goes on without captured steps: {error!r:.200}")
            for layer in cache.layers:
                layer.filled, layer.next_slot = first, None
    return lambda token, position, slot: forward(model, token[:, None], position[:, None], mask[:, :slot + 1], cache)


def captured_step(model, cache, mask, first):
    """`decoding_step` as a CUDA graph: one launch per token instead of about a thousand. A graph reads and writes fixed
    tensors. So attention sees all slots, and a bias hides the empty ones. RuntimeError where the first replay differs
    from an ordinary step."""
    rows, slots = mask.shape
    token, position = torch.zeros(2, rows, 1, dtype=torch.long, device=mask.device)
    next_slot = torch.full((1,), first, device=mask.device)
    for layer in cache.layers:                    # trials write to the first slot; the first token overwrites them
        layer.filled, layer.next_slot = first, None
    wanted = forward(model, token, position, mask[:, :first + 1], cache)
    for layer in cache.layers:
        layer.next_slot = next_slot
    # The width is a multiple of eight. torch would copy a bias of another width in every layer.
    bias = cache.layers[0].stores[0].new_zeros(rows, 1, 1, slots + -slots % 8)[..., :slots]
    bias.masked_fill_(mask[:, None, None] == 0, torch.finfo(bias.dtype).min)

    def run():
        bias.index_fill_(3, next_slot, 0.0)
        return forward(model, token, position, bias, cache)

    def step(new_token, new_position, slot):
        token.copy_(new_token[:, None])
        position.copy_(new_position[:, None])
        next_slot.fill_(slot)
        replay()
        return logits

    replay, logits = capture(run)
    replay()
    if not alike(wanted, logits, 1e-3 if bias.dtype == torch.float32 else 0.05):
        raise RuntimeError("a captured step computes something else")
    return step


def capture(run):
    """(replay, output): replay() repeats on the GPU what run() launches, and overwrites `output`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):                 # libraries choose their kernels and allocate their workspaces
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def alike(wanted, found, tolerance):
    """Whether no two numbers differ by more than `tolerance` times the largest wanted one."""
    return bool((wanted - found).abs().max() <= tolerance * wanted.abs().max())


# ------------------------------------------------------------------------------------ 4. supervised training

import copy
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.utils import logging

from data import option

IGNORE = -100
DIVERGED = ("the training diverged; delete this stage's folder (.partial), because its saved weights may be on the way "
            "there, and begin again with a lower --learning_rate")


def pad(rows, value, device):
    """(B, longest) from lists of ids, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def pad_id(tokenizer):
    """The id to pad with. EOS serves where there is no pad token, because no loss and no mask looks at padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def sequence_loss(lm, rows):
    """Mean cross-entropy over the labels of some (ids, labels)."""
    ids = pad([row[0] for row in rows], pad_id(lm.tokenizer), lm.device)          # (B, T)
    labels = pad([row[1] for row in rows], IGNORE, "cpu").flatten()
    positions = (labels != IGNORE).nonzero()[:, 0]                                # (m,), found without the device
    logits = lm.head(lm.hidden(ids, positions.to(lm.device))).float()
    return F.cross_entropy(logits, labels[positions].to(lm.device))


@torch.no_grad()
def heldout_loss(lm, sequences, batch_size):
    """Mean cross-entropy over all labels of all (ids, labels), in evaluation mode."""
    lm.model.eval()
    loss, count = 0.0, 0
    for i in range(0, len(sequences), batch_size):
        batch = sequences[i:i + batch_size]
        labels = sum(label != IGNORE for _, row in batch for label in row)
        loss += labels * sequence_loss(lm, batch).item()
        count += labels
    return loss / count


def adamw(parameters, lr: float, **options) -> torch.optim.AdamW:
    """AdamW, fused on CUDA, where the plain one makes temporary copies of all its tensors."""
    parameters = list(parameters)
    return torch.optim.AdamW(parameters, lr=lr, fused=parameters[0].is_cuda, **options)


def descend(optimizer, lr: float, max_norm: float, where: str) -> float:
    """One optimizer step with the gradient clipped to `max_norm`. Returns the norm before clipping. FloatingPointError
    where it is not finite; the weights are then unchanged."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"{where}: the gradient is not finite; {DIVERGED}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def schedule(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to 0 over `total` steps."""
    return min((step + 1) / max(1, warmup), (total - step) / max(1, total - warmup))


def enable_checkpointing(model):
    """Recomputes activations in the backward pass. That needs training mode, so dropout is set to 0: the policy that is
    scored must be the one that was sampled. UserError where training mode still computes something else."""
    for part in (model.config, *model.modules()):
        for key, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in key or key == "p" and isinstance(part, torch.nn.Dropout)):
                setattr(part, key, 0.0)
    # Older versions of transformers call it gradient_checkpointing_enable.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with saying("--checkpointing 1"), torch.no_grad():
        enable({"use_reentrant": False})
        ids = _some_ids(model, 16)[None]
        training, evaluation = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False))
        if not alike(evaluation, training, 1e-3):
            raise UserError(f"--checkpointing 1: {model.config.model_type} models compute something else in training")


def progress_bar(steps, **options) -> tqdm:
    """tqdm on a terminal. Elsewhere a line every minute."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 60, "maxinterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
    return tqdm(steps, **options)


def save_progress(path, model, optimizer, values):
    """Saves weights, optimizer and some plain values of a training, whole or not at all."""
    with data.replacing(path) as temporary, saying(f"{path}: cannot be saved"):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "values": values}, temporary)


def load_progress(path, model, optimizer, values):
    """Restores what `save_progress` saved and returns its values. Where nothing is saved, returns `values`."""
    if path is None or not path.exists():
        return values
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["values"]


def finetune(lm: LM, sequences: list[tuple[list[int], list[int]]], *, epochs: float, batch_size: int,
             learning_rate: float, warmup: int, seed: int, title: str = "finetune", heldout=(),
             checkpointing: bool = False, progress: Path | None = None) -> float:
    """Supervised training on (ids, labels). labels[t] follows ids[t], or is IGNORE where there is no loss. Batches hold
    sequences of similar length. Linear warm-up, then linear decay to 0. Returns the mean loss of the last tenth.

    heldout: sequences whose loss is measured at the start and ten times on the way. Two measurements without a new
    minimum end the training, and the model keeps the weights of the minimum.
    progress: a file written ten times on the way. A stopped training goes on from it, bit for bit. A finished one
    returns at once. FloatingPointError for a gradient that is not finite."""
    model = lm.model
    if checkpointing:
        enable_checkpointing(model)
    optimizer = adamw(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = max(1, round(len(sequences) * epochs / batch_size))
    begin, losses, best, since, weights = load_progress(progress, model, optimizer, (0, [], math.inf, 0, None))
    batches = itertools.islice(training_order(sequences, batch_size, seed), begin, None)
    for step in (bar := progress_bar(range(begin, total + 1), initial=begin, total=total, desc=title)):
        tenth = step % max(1, total // 10) == 0 or step == total
        if tenth and progress and step > begin:
            save_progress(progress, model, optimizer, (step, losses, best, since, weights))
        if tenth and heldout:
            loss, since = heldout_loss(lm, heldout, batch_size), since + 1
            if loss < best:
                best, since, weights = loss, 0, {name: x.clone() for name, x in model.state_dict().items()}
            if since == 2:
                break
        if step == total:
            break
        model.train()
        loss = sequence_loss(lm, next(batches))
        loss.backward()
        losses.append(loss.item())
        descend(optimizer, learning_rate * schedule(step, total, warmup), 1.0, f"{title}, step {step}")
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    if weights:
        model.load_state_dict(weights)
    check_alive(model.eval(), title)
    last = losses[-max(1, total // 10):]
    return sum(last) / len(last)


def training_order(sequences, batch_size, seed):
    """Batches without end, epoch after epoch: shuffle, sort windows by length, cut, shuffle."""
    rng, window = random.Random(seed), 32 * batch_size
    while True:
        order, batches = rng.sample(range(len(sequences)), len(sequences)), []
        for i in range(0, len(order), window):
            part = sorted(order[i:i + window], key=lambda j: len(sequences[j][0]))
            batches += [part[k:k + batch_size] for k in range(0, len(part), batch_size)]
        rng.shuffle(batches)
        while batches:
            yield [sequences[j] for j in batches.pop()]


@torch.no_grad()
def check_alive(model, where):
    """FloatingPointError where the last update left a model that says nothing. (Norm layers turn weights that are too
    large into logits of 0.) Otherwise the next stage would report damaged weights."""
    largest = model(input_ids=_some_ids(model, 8)[None], use_cache=False).logits.abs().max().item()
    if not 0 < largest < math.inf:
        raise FloatingPointError(f"{where}: the model's logits are not finite, or all 0; {DIVERGED}")


# ------------------------------------------------------------------------------------ 5. judging, loading and examining

logging.disable_progress_bar()                    # one for the tensors of each model that is loaded or saved
DRIVER = "/proc/driver/nvidia/version"            # exists where there is an NVIDIA GPU


@contextmanager
def saying(what: str):
    """Whatever a library raises inside, about a model, a file or a device of the user, becomes one line that begins
    with `what`. (Their errors have no common class. tokenizers raises Exception itself.)"""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error


def pick_device(device: str = "") -> torch.device:
    """The named device, or CUDA where there is one, else the CPU. UserError for one that cannot be used, and for a GPU
    that torch does not see."""
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and os.path.exists(DRIVER):
            raise UserError(f"torch {torch.__version__} sees no GPU, but there is an NVIDIA driver; install a torch "
                            "that fits it, or give --device cpu")
    with saying(f"--device {device}"):
        found = torch.empty(0, device=device).device
    if found.type == "cuda":
        torch.cuda.set_device(found)
        # torch prefers cuDNN's attention on Hopper and newer. It builds a plan for every exact shape, and in decoding
        # every token is a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def load(path_or_name: str, device=None, dtype=None):
    """(model, tokenizer) of any Hugging Face causal LM, from a local folder or by its name on the hub, in evaluation
    mode. The default dtype is `work_dtype`. UserError for one that cannot be used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = pick_device() if device is None else torch.device(device)
    with saying(f"{path_or_name}: no tokenizer, or its chat template cannot render one user message"):
        tokenizer = data.true_tokenizer(AutoTokenizer.from_pretrained(path_or_name), path_or_name)
        data.encode_prompt(tokenizer, "Mia has 12 coins .")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path_or_name}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
    with saying(f"{path_or_name}: no causal LM"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype or fast_dtype(device), output_loading_info=True)
    if report["missing_keys"]:                                     # transformers would initialise them at random
        raise UserError(f"{path_or_name}: the weights lack {min(report['missing_keys'])}; the file is incomplete")
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        raise UserError(f"{path_or_name}: the tokenizer has more tokens than the model's embedding table")
    model = model.to(device).eval()
    if dtype is None and model.dtype != work_dtype(model):
        return load(path_or_name, device, work_dtype(model))
    return model, tokenizer


def _some_ids(model, count):
    """(count,) ids from the middle of the vocabulary. The first ids are often reserved."""
    table = model.get_input_embeddings().weight
    return (torch.arange(count, device=table.device) + len(table) // 2) % len(table)


def judge(problems, outputs, exec_score: str) -> list[Run]:
    """The verifier's verdicts on (text, truncated) outputs, one per problem."""
    codes = [verify.code_blocks(text) for p, (text, _) in zip(problems, outputs) if p.task_type == "code"]
    tests = [p.tests for p in problems if p.task_type == "code"]
    verdicts = iter(verify.run_programs(codes, tests, fail_fast=exec_score == "binary"))
    runs = []
    for problem, (text, truncated) in zip(problems, outputs):
        if problem.task_type == "code":
            verdict = next(verdicts)
            ok, score = verdict.ok, verify.exec_score(verdict, exec_score)
        else:
            ok = verify.math_equal(verify.extract_answer(text), problem.reference_solution)
            score = float(ok)
        runs.append(Run(text, ok, score, truncated))
    return runs


def examine(model):
    """(context, equal_lengths, plain_head, tokens_per_gib) of an `LM`. UserError for one that cannot be decoded."""
    return context_of(model), check_decoding(model), check_head(model), cache_tokens(model, 1.0)


@torch.no_grad()
def check_decoding(model):
    """Compares log-probs of `generate` with those of one pass over the whole sequence. Returns whether a batch must
    hold prompts of one length, because padding changes what the model computes. UserError for a model that a cache
    does not fit."""
    name = f"{model.name_or_path}: {model.config.model_type} models"
    exact = model.num_parameters() < 2**31
    if exact and model.dtype != torch.float32:                     # rounding of 16 bits would hide a wrong mask
        model = copy.deepcopy(model).float()
    ids, new = _some_ids(model, 8).tolist(), 4
    prompts = [ids, ids[:3]]

    def error(equal_lengths):                                      # relative to the largest logit
        out = generate(model, prompts, num_samples=2, max_new_tokens=new, temperature=0, eos_id=-1,
                       equal_lengths=equal_lengths)                # two samples of each: is every state copied?
        errors = []
        for row, tokens in enumerate(out.tokens):
            whole = torch.tensor([prompts[row // 2] + tokens], device=model.device)
            logits = model(input_ids=whole, use_cache=False).logits[0, -new - 1:-1].float().cpu()
            logp = logits.log_softmax(-1)[range(new), tokens]
            errors.append((logp - torch.tensor(out.logprobs[row])).abs().max() / logits.abs().max())
        return torch.stack(errors).max().item()

    limit = 1e-3 if exact else 0.1
    with saying(f"{name} cannot be decoded here"):
        alone, padded = error(equal_lengths=True), error(equal_lengths=False)
        if not alone < limit:                                      # NaN, too
            raise ValueError(f"a cache changes log-probs by {alone:.2g} of the largest logit")
    if padded < limit:
        return False
    print(f"{name} see padding; prompts are decoded in groups of equal length")
    return True


@torch.no_grad()
def check_head(model):
    """Whether the logits are the head applied to the last hidden states. Gemma 2, Granite and Cohere scale or cap
    them."""
    given = {"input_ids": _some_ids(model, 16)[None], "use_cache": False}
    try:
        ours = model.get_output_embeddings()(model.base_model(**given).last_hidden_state)
        return alike(model(**given).logits, ours, 1e-3 if model.dtype == torch.float32 else 0.03)
    except (RuntimeError, AttributeError, TypeError):              # a layer between hidden states and head
        return False


@torch.no_grad()
def cache_tokens(model, gib):
    """How many tokens of keys and values fit into `gib` GiB. Measured on 64 tokens, because no formula covers all
    kinds of attention. A state of fixed size per row counts as if no row were longer."""
    count = int(min(64, context_of(model)))
    with autocast(model):
        _, cache, *_ = prefill(model, [_some_ids(model, count).tolist()], count)
    held = {}                                                      # bytes of each storage, which tensors may share
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if torch.is_tensor(x):
                    held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return max(1, int(gib * 2**30 * count / sum(held.values())))


def base_record(run_dir) -> dict:
    """What `python executor.py` recorded about the base model of a run."""
    path = Path(run_dir) / "base" / "base.json"
    if not path.exists():
        raise UserError(f"{path}: no base model yet; run python executor.py --run_dir {run_dir} first")
    return data.read_json(path)


def base_of(run_dir) -> str:
    """The base model of a run, planner and executor in one: a folder or a name."""
    model = base_record(run_dir)["model"]
    return str(Path(run_dir) / "base") if model == "." else model


def load_for(run_dir, path_or_name, device=None, dtype=None):
    """`load` for a run. All its prompts have the template arguments that `python executor.py` recorded. UserError where
    the weights of its base model were replaced."""
    record = base_record(run_dir)
    if str(path_or_name) == record["model"] and data.fingerprint(path_or_name) != record["fingerprint"]:
        raise UserError(f"{path_or_name}: its weights have changed since {run_dir}/base was made; put them back, or "
                        "choose another --run_dir")
    model, tokenizer = load(str(path_or_name), device, dtype)
    set_template_arguments(tokenizer, record["chat_template_kwargs"])
    return model, tokenizer


def set_template_arguments(tokenizer, arguments):
    """Writes arguments into the chat template itself, so that every prompt has them and planners are saved with
    them."""
    for name, value in arguments.items():
        if name not in (tokenizer.chat_template or ""):
            raise UserError(f"--chat_template_kwargs: the chat template has no {name}; leave it out")
        assignment = "{%- set " + f"{name} = {json.dumps(value)}" + " %}"
        if assignment not in tokenizer.chat_template:
            tokenizer.chat_template = assignment + tokenizer.chat_template


# --------------------------------------------------------------------------------------------------- 6. LoRA

class Lora:
    """A low-rank adapter (arXiv 2106.09685) on a frozen model: y = W x + alpha / rank * B A x. Only A (rank, in) and B
    (out, rank) learn, and B starts at 0. A and B are parameters of the linear layers and a hook adds their part, so no
    name in the model changes. With the adapter off, the model is bit for bit the one it was."""

    def __init__(self, model, rank: int, alpha: float, seed: int = 0):
        """Adapts every linear layer but the head."""
        self.model, self.rank, self.scale, self.active = freeze(model), rank, alpha / rank, True
        head, draw = model.get_output_embeddings(), torch.Generator().manual_seed(seed)     # a backbone has no head
        self.layers = {name: layer for name, layer in model.named_modules()
                       if isinstance(layer, torch.nn.Linear) and layer is not head}
        self.hooks = []
        for layer in self.layers.values():
            A = (2 * torch.rand(rank, layer.in_features, generator=draw) - 1) / math.sqrt(layer.in_features)
            layer.lora_A = torch.nn.Parameter(A.to(layer.weight.device))
            layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
            self.hooks.append(layer.register_forward_hook(self._add))

    def _add(self, layer, inputs, output):
        if self.active:
            x = inputs[0]
            if not torch.is_autocast_enabled(x.device.type):       # which casts in F.linear
                x = x.to(layer.lora_A.dtype)
            part = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
            return torch.add(output, part.to(output.dtype), alpha=self.scale)

    @contextmanager
    def off(self):
        """The bare model inside: frozen executor and reference policy."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    @torch.no_grad()
    def merge(self):
        """Adds the adapter to the weights, rounded once to their dtype, and removes it."""
        for layer, hook in zip(self.layers.values(), self.hooks):
            layer.weight += self.scale * layer.lora_B @ layer.lora_A
            del layer.lora_A, layer.lora_B
            hook.remove()

    def state_dict(self):
        """A and B of every layer, under the names that peft gives them."""
        return {f"base_model.model.{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").detach()
                for name, layer in self.layers.items() for x in "AB"}

    def save(self, folder, base: str):
        """Writes the exact adapter into the subfolder adapter/, for `load` and for peft. Then merges it and writes the
        model as a plain Hugging Face folder in its dtype (bfloat16 rounds small changes away)."""
        adapter = Path(folder) / "adapter"
        adapter.mkdir(parents=True, exist_ok=True)
        save_file({name: x.cpu().contiguous() for name, x in self.state_dict().items()},
                  adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({name.rpartition(".")[2] for name in self.layers})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.rank,
                  "lora_alpha": self.scale * self.rank, "target_modules": targets, "lora_dropout": 0.0, "bias": "none"}
        (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1))
        self.merge()
        self.model.save_pretrained(folder)

    @classmethod
    def load(cls, model, folder) -> "Lora":
        """The adapter of a folder, on its base model. UserError for one that does not match."""
        with saying(f"{folder}: not an adapter of this model"):
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
            saved = load_file(Path(folder) / "adapter_model.safetensors")
            lora = cls(model, config["r"], config["lora_alpha"])
            own = lora.state_dict()
            if saved.keys() != own.keys():
                raise ValueError("it adapts other layers")
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        return lora


# ------------------------------------------------------------------------ 7. the frozen executor on a server

import time
import urllib.error
import urllib.request
import warnings
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

from transformers import AutoConfig, GenerationConfig

IN_FLIGHT = 64                                    # requests at once
PAUSES = (1, 2, 4, 8, 16, 32, 64)                 # seconds before each new try, where the trouble may pass
TIME_LIMIT = 600.0                                # seconds without a byte, and the longest Retry-After
KEY = "EXECUTOR_API_KEY"                          # the variable of the environment that holds the server's key
# Other tokenizers cut these digits, code and rare letters into more or fewer tokens.
SAMPLE = "Mia has 12345 coins .\n\tdef f(x): return x ** 2  # Żółw, 東京, straightforwardness"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))      # the key is for the server alone


def without_key(text):
    """The text without the server's key, which a server may repeat."""
    key = os.environ.get(KEY) or "(key)"
    return text.replace(key, "(key)").replace(json.dumps(key)[1:-1], "(key)")


class ServerError(OSError):
    """A server that cannot be reached, fails again and again, or answers something else than was asked."""

    def __init__(self, url, said):
        super().__init__(f"the executor's server {url}: {' '.join(without_key(said).split())[:400]}")


def ask_server(url, body=None, pauses=()):
    """The answer to a GET or, with a body, to a POST. Trouble that may pass (429, 5xx, dropped connections, silence,
    damaged JSON) is tried again after each pause, or later where Retry-After says so. Else ServerError."""
    request = urllib.request.Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    if KEY in os.environ:
        request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY]}")
    for pause in (*pauses, None):
        wait = ""
        try:
            with DIRECT.open(request, timeout=TIME_LIMIT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            wait = error.headers.get("Retry-After", "")
            said = f"{error.code} {error.reason} {error.read().decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                pause = None                                       # the same request would fail again
        except (OSError, HTTPException, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
        error = ServerError(url, said)
        if pause is None:
            raise error
        warnings.warn(f"{error}; tries again", stacklevel=2)       # Python prints each one once
        time.sleep(max(pause, min(int(wait), TIME_LIMIT) if wait.isdecimal() else 0))


class ServedExecutor(Executor):
    """The frozen executor on a server with OpenAI's /v1/completions, such as vLLM, SGLang or llama.cpp. The server must
    have the run's base model. Only its tokenizer and config are loaded here.

    Prompts are sent as token ids: as text, a trace that spells control tokens could leave its place. Each run is one
    request, whose seed depends on the run's rng key, so a run is as repeatable as the server. An answer to anything but
    what was asked is a ServerError, never an output."""

    def __init__(self, url, name, base, tokenizer, **options):
        """Options of `Executor`. UserError or ServerError for a server that does not have the model, or takes no
        ids."""
        super().__init__(None, tokenizer, **options)
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url):
            raise UserError("--executor: must be http://HOST:PORT/v1, without user, password or query, because it is "
                            f"saved; the server's key is read from the environment, {KEY}")
        self.url, self.name, config = url.rstrip("/"), name, AutoConfig.from_pretrained(base)
        try:
            generation = GenerationConfig.from_pretrained(base)
        except OSError:                                            # there is none
            generation = GenerationConfig.from_model_config(config)
        self.model = SimpleNamespace(config=config, generation_config=generation)
        models = {model["id"]: model for model in ask_server(f"{self.url}/models").get("data") or []}
        if name not in models:
            raise UserError(f"--executor_model {name}: {url} serves {without_key(', '.join(models)) or 'no model'}")
        self.context = min(context_of(self.model), models[name].get("max_model_len") or math.inf)
        self._ask(data.encode_text(tokenizer, SAMPLE), 0)          # does it take ids, and know as many tokens?
        print(f"executor: {name} on {url}")

    def _write(self, prompts, num_runs, rng_keys):
        requests = [prompt for prompt, K in zip(prompts, num_runs) for _ in range(K)]
        seeds = [random.Random(key).getrandbits(30) for key in rng_keys]       # some servers keep 31 bits
        with ThreadPool(IN_FLIGHT) as pool:                        # an error leaves at once, whatever is in flight
            jobs = zip(range(len(requests)), requests, seeds)
            answers = sorted(pool.imap_unordered(lambda job: (job[0], *self._ask(*job[1:])), jobs))
        self.spent["executor_tokens"] += sum(tokens for _, _, _, tokens in answers)
        return [(text, truncated) for _, text, truncated, _ in answers]

    def _ask(self, prompt, seed):
        """(output, truncated, tokens) of one run. The request names everything that shapes the distribution. Servers
        take the rest from the model's generation_config (that of Qwen2.5 has top_p, top_k and a repetition
        penalty)."""
        most = self.max_new_tokens
        body = {"model": self.name, "prompt": prompt, "n": 1, "seed": seed, "max_tokens": most,
                "stop_token_ids": eos_ids(self.model, self.tokenizer), "skip_special_tokens": True,
                "temperature": self.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        answer = ask_server(f"{self.url}/completions", body, PAUSES)
        try:
            choice, = answer["choices"]
            text, reason, wrote = choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]
            right = answer["model"] == self.name and answer["usage"]["prompt_tokens"] == len(prompt)
            right &= isinstance(text, str)
            right &= wrote == most if reason == "length" else reason == "stop" and 0 < wrote <= most
        except (TypeError, ValueError, KeyError):
            right = False
        if not right:
            raise ServerError(self.url, f"asked for one output of {self.name} after {len(prompt)} token ids, it says "
                                        f"{json.dumps(answer)}")
        return without_key(text), reason == "length", wrote


# ---------------------------------------------------------- 8. the tiny base model, cold start, and the command

_TINY_TOKEN = r"</?reasoning>|\n *| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]"
ALONE = 0.12                                      # share of the executor's cold-start examples without a trace


def tiny_tokenizer(texts: list[str]):
    """A word-level tokenizer of all words in `texts`. Digits are single tokens. A leading space belongs to its word, so
    decoding restores the text exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = sorted({word for text in texts for word in re.findall(_TINY_TOKEN, text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>"] + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TINY_TOKEN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def tiny_model(vocab_size: int, hidden: int, layers: int):
    """A random decoder of the Llama architecture with tied head and embedding. (Not Qwen2, whose tokenizer transformers
    5 puts in place of the folder's. Not the usual initial spread of 0.02, with which so narrow a model takes several
    times as long to learn to copy.)"""
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * hidden, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=None, eos_token_id=1, pad_token_id=0))


def base_sequence(tokenizer, example):
    """(ids, labels) of one base training sequence. labels[t] is the token to predict after ids[t], or IGNORE. The first
    line, the problem's own text, is learned too: its repeated names teach the model to copy.

    Planner and executor share the sequence. After `</reasoning>` the planner must stop, while the sequence goes on with
    the executor's prompt. So the label there is EOS, although the next input token is not."""
    texts = (example.prompt, example.trace, example.ask, example.answer, example.prompt.partition("\n")[0])
    prompt, trace, ask, answer, text = (tokenizer(text)["input_ids"] if text else [] for text in texts)
    eos = tokenizer.eos_token_id
    ids = prompt + trace + ask + answer
    labels = [IGNORE] * (len(ids) - len(answer) - 1) + answer + [eos]
    labels[:len(text) - 1] = ids[1:len(text)]
    if example.learn_trace:
        labels[len(prompt) - 1:len(prompt) + len(trace)] = trace + [eos]
    return ids, labels


@dataclass(frozen=True)
class BaseSettings(data.Options):
    """Settings of `python executor.py`."""
    run_dir: str = option("runs/tiny-math", "run folder; holds groups/", affects_result=False)
    model: str = option("", "Hugging Face folder or name, for planner and executor; empty: train the tiny base model")
    chat_template_kwargs: str = option("{}", "arguments of the model's chat template for all prompts of the run, as a "
                                             "JSON object: '{\"enable_thinking\": false}'", needs="model")
    cold_start: int = option(0, "first train the model on the reference traces of this many training groups, in both "
                                "roles; 0: take it as it is", low=0, needs="model")
    cold_epochs: float = option(1.0, "of the cold start, at most; the held-out loss may end it", above=0,
                                needs="cold_start")
    cold_learning_rate: float = option(1e-4, "peak of the cold start, AdamW", above=0, needs="cold_start")
    checkpointing: int = option(0, "1: recompute activations in the cold start, for memory", choices=(0, 1),
                                needs="cold_start", affects_result=False)
    device: str = option("", "cuda, cpu, ...; empty: CUDA where there is one", affects_result=False)
    hidden: int = option(128, "width of the tiny model; a multiple of 8", low=8, only={"model": ("",)})
    layers: int = option(4, "depth of the tiny model", low=1, only={"model": ("",)})
    sequences: int = option(52000, "of the tiny corpus, one problem each, one epoch", low=1, only={"model": ("",)})
    batch_size: int = option(16, "sequences per step, also of the cold start", low=1)
    learning_rate: float = option(2e-3, "peak of the tiny model, AdamW", above=0, only={"model": ("",)})
    warmup: int = option(100, "steps of linear warm-up, also of the cold start; then linear decay to 0", low=0)
    seed: int = option(0, "seed of corpus, initial weights, order and the executor runs of the check")
    eval_problems: int = option(300, "held-out problems for the check at the end", low=1)
    executor_temperature: float = option(0.7, "of the executor in the check", low=0)
    max_answer_tokens: int = option(64, "longest executor output in the check", low=1)
    max_cache_gib: float = option(CACHE_GIB, "keys and values of one decoding batch, in GiB", above=0,
                                  affects_result=False)


def role_sequence(tokenizer, prompt, completion):
    """(ids, labels) of one turn. The prompt is encoded as it will be when a model is asked, without loss. The loss is
    on the completion and the token that ends it."""
    ids = data.encode_prompt(tokenizer, prompt)
    learned = data.encode_text(tokenizer, completion, bos=False) + [tokenizer.eos_token_id]
    return ids + learned[:-1], [IGNORE] * (len(ids) - 1) + learned


def cold_sequences(tokenizer, problem, seed):
    """What a model learns from one problem before it becomes planner and frozen executor: to write the reference trace,
    whose last result is hidden, and to finish it. Sometimes the executor has no trace, because without one it must
    answer in the same form."""
    trace = problem.reference_reasoning
    answer = f"#### {verify.extract_answer(problem.reference_solution)}"
    if problem.task_type == "code":
        answer = f"```python\n{problem.reference_solution}\n```"
    alone = random.Random(f"{seed} {problem.problem_id}").random() < ALONE
    return [role_sequence(tokenizer, data.planner_prompt(problem), data.OPEN + trace + data.CLOSE),
            role_sequence(tokenizer, data.executor_prompt(problem, None if alone else trace), answer)]


def cold_training(s, arguments):
    """The model of --model and the arguments of its `finetune`. The training groups are those of --cold_start. A
    twentieth of them (50 at most) is held out and says when to stop. UserError for groups that cannot be learned
    from."""
    path = Path(s.run_dir) / "groups" / "train.jsonl"
    problems = data.read_problems(path, need_tests=False)[:s.cold_start]
    if len(problems) < s.cold_start:
        raise UserError(f"--cold_start {s.cold_start}: {path} has {len(problems)} groups; lower it")
    for problem in problems:
        answered = problem.task_type == "code" or verify.extract_answer(problem.reference_solution) is not None
        if problem.reference_reasoning is None or not answered:
            raise UserError(f"--cold_start: {path}: group {problem.problem_id} has no reference trace (positive_pool), "
                            "or no final answer")
    lm = LM(*load(s.model, pick_device(s.device), torch.float32))
    set_template_arguments(lm.tokenizer, arguments)
    held = 2 * min(50, len(problems) // 20)
    rows = [row for problem in problems for row in cold_sequences(lm.tokenizer, problem, s.seed)]
    return lm, {"sequences": rows[held:], "heldout": rows[:held], "epochs": s.cold_epochs, "title": "cold start",
                "learning_rate": s.cold_learning_rate, "checkpointing": bool(s.checkpointing)}


def tiny_training(s, task_type):
    """The tiny base model with random weights and the arguments of its `finetune`."""
    torch.manual_seed(s.seed)
    corpus = data.base_corpus(task_type, s.sequences, s.seed)
    tokenizer = tiny_tokenizer([e.prompt + e.trace + e.ask + e.answer for e in corpus])
    with saying(f"--hidden {s.hidden}"):
        lm = LM(tiny_model(len(tokenizer), s.hidden, s.layers).to(pick_device(s.device)), tokenizer)
    return lm, {"sequences": [base_sequence(tokenizer, example) for example in corpus], "epochs": 1,
                "learning_rate": s.learning_rate, "title": "base model"}


def save(lm, folder, lora=None, base=""):
    """Writes model and tokenizer as a Hugging Face folder; with an adapter as `Lora.save` does. UserError for a full
    disk."""
    with saying(f"{folder}: cannot be saved"):
        if lora:
            lora.save(folder, base)
        else:
            lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)


def make_base(s, folder):
    """Fills the stage folder with the trained base model, if one is trained, and with what its executor can do."""
    groups, progress = Path(s.run_dir) / "groups", folder / "progress.pt"
    heldout = data.read_problems(groups / "heldout.jsonl", need_tests=False)[:s.eval_problems]
    tiny = data.source_of(heldout[0]).needs_base_model
    if tiny == bool(s.model):
        raise UserError(f"{groups}: the tiny world trains its own base model: leave out --model; all else needs one")
    with saying("--chat_template_kwargs: must be a JSON object"):
        arguments = dict(json.loads(s.chat_template_kwargs))
    model = os.path.abspath(s.model) if os.path.isdir(s.model) else s.model
    record = {"model": model, "fingerprint": model and data.fingerprint(model), "problems": len(heldout),
              "chat_template_kwargs": arguments}
    if tiny or s.cold_start:
        lm, options = tiny_training(s, heldout[0].task_type) if tiny else cold_training(s, arguments)
        for problem in heldout:                                    # before minutes of training
            asked = len(data.encode_prompt(lm.tokenizer, data.executor_prompt(problem, problem.reference_reasoning)))
            if asked + s.max_answer_tokens > lm.context:
                raise UserError(f"{problem.problem_id}: {asked} tokens and --max_answer_tokens {s.max_answer_tokens} "
                                f"exceed the model's context of {lm.context}; lower it, or leave the problem out")
        loss = finetune(lm, batch_size=s.batch_size, warmup=s.warmup, seed=s.seed, progress=progress, **options)
        save(lm, folder)
        record |= {"model": ".", "train_loss": loss}
        model = str(folder)
    loaded, tokenizer = load(model, pick_device(s.device), torch.float32 if tiny else None)
    set_template_arguments(tokenizer, arguments)
    frozen = Executor(loaded, tokenizer, max_new_tokens=s.max_answer_tokens, temperature=s.executor_temperature,
                      seed=s.seed, max_cache_gib=s.max_cache_gib)
    record |= {"no_trace": None, "reference_trace": None, "executor_truncated": None}
    if all(p.tests or p.task_type == "math" for p in heldout):     # groups for the reward model may have no tests
        runs = frozen.run(heldout, None, 1)
        record["no_trace"] = sum(run.ok for run, in runs) / len(runs)
        references = [p.reference_reasoning for p in heldout]
        if None not in references:                                 # HumanEval and MBPP come without traces
            helped = frozen.run(heldout, references, 1, "base")
            record["reference_trace"] = sum(run.ok for run, in helped) / len(helped)
            runs += helped
        record["executor_truncated"] = sum(run.truncated for run, in runs) / len(runs)
    data.write_atomic(folder / "base.json", json.dumps(record, indent=1))
    progress.unlink(missing_ok=True)


def main(argv):
    """The command: trains or checks the base model of a run."""
    s = data.parse_settings(BaseSettings, argv, "executor.py")
    base = Path(s.run_dir) / "base"
    with data.stage_folder(base, s, reads=("groups",)) as folder:
        if folder is not None:
            make_base(s, folder)
    record = base_record(s.run_dir)
    print(f"{base}/base.json: {base_of(s.run_dir)}; executor success on {record['problems']} held-out problems:")
    for key in ("no_trace", "reference_trace", "executor_truncated"):
        print(f"  {key.replace('_', ' ')}: " + ("not measured" if record[key] is None else f"{record[key]:.2f}"))
    if (record["executor_truncated"] or 0) > 0.05:
        print("  more than 5 % of the outputs were cut and count as failures: raise --max_answer_tokens")
    first = data.read_groups(Path(s.run_dir) / "groups" / "train.jsonl")[0]
    # A reward model needs flawed traces. Without them, success alone is the reward.
    then = "rm.py --run_dir {}" if first["negative_bank"] else "tracelift.py train --run_dir {} --mode exec_only"
    print("next: python " + then.format(s.run_dir))


if __name__ == "__main__":
    data.run_command(main)
