"""Models and decoding: sample from a causal LM with cached keys and values, and run it as the frozen executor.

The executor turns problem + trace (or the problem alone) into an artifact, an answer or a program, that verify.py
judges. It never learns: uplift = success with a trace - success without is measured with the same weights from the
first training step to the last.

Shapes: N prompts, R rows (all samples of all prompts), P tokens of the longest prompt, L slots, V vocabulary,
B sequences, T tokens, M selected positions, H hidden, K executor runs.

Sections 1 and 2 are to be read. 3 to 8 (checks, scoring and supervised training, loading, LoRA, an executor on a
server, the tiny base model) are there to look things up in. Sections 1 and 3, the decoder, need nothing of ours: copy
them, imports included.

    python executor.py --run_dir runs/tiny-math                            # trains the tiny base model
    python executor.py --run_dir runs/gsm8k-math --model Qwen/Qwen2.5-0.5B-Instruct

Left out: paged caches, a pool of rows that new prompts join, several GPUs, captured graphs.
"""

# ---------------------------------------------------------------------------------------------------- 1. decoding

import itertools
import math
import random
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

PASS = 4096                                       # tokens that one forward pass over the prompts reads at most
# Forward passes call their cache past_key_values up to transformers 5.23 and cache from then on, as their outputs do.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class Completions:
    """Samples in prompt-major order: those of prompt 0, those of prompt 1, ..."""
    tokens: list[list[int]]                      # EOS included when it was sampled
    logprobs: list[list[float]]                  # of each token, under the sampling temperature


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer, (R, heads, L slots, width), in slots that are allocated once.

    Prompts are padded on the left, so all of them end in the same slot, and token t of every row goes to the same
    slot as well. The attention mask of the batch says which slots are padding.
                        slot  0 1 2 3 | 4 5 6
                   prompt A   . a a a | x x .          '.' nothing there
                   prompt B   b b b b | y y .
    """

    def __init__(self, slots: int):
        super().__init__()
        self.slots, self.filled, self.stores = slots, 0, []

    def update(self, keys, values, *_, **__):
        """Called by attention: stores (R, heads, T, width) behind what is there, returns all of it."""
        if not self.stores:
            # Zeros: a masked slot has weight 0, and 0 times the NaN of fresh memory would be NaN. In the dtype of the
            # values: under autocast they have that of the computation, while keys come in float32.
            for new in (keys, values):
                self.stores.append(values.new_zeros(*new.shape[:2], self.slots, new.shape[3]))
        start, self.filled = self.filled, self.filled + keys.shape[2]
        for store, new in zip(self.stores, (keys, values)):
            store[:, :, start:self.filled] = new
        return [store[:, :, :self.filled] for store in self.stores]

    def get_seq_length(self) -> int:
        return self.filled

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Row rows[i] becomes row i, for any number of rows."""
        self.stores = [store[rows] for store in self.stores]


def empty_cache(model, slots: int) -> DynamicCache:
    """Our layers where attention sees everything; transformers' own for windows, convolutions, recurrent states."""
    cache = DynamicCache(config=model.config)
    cache.layers = [SlotLayer(slots) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def read(model, ids, position, mask, cache) -> torch.Tensor:
    """Logits (R, V) after ids (R, T), whose keys and values are stored. They see the slots where mask (R, width) is 1,
    up to their own."""
    # The last position as an index, not as a number of positions: models take a slice for that, whose product with the
    # head copies the head for every row on a CPU (torch's matmul does not fold it), gigabytes and seconds in bfloat16.
    last = torch.arange(ids.shape[1] - 1, ids.shape[1], device=ids.device)
    output = model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=last,
                   **{CACHE: cache})
    return output.logits[:, -1]


def read_prompts(model, prompts: list[list[int]], slots: int):
    """Reads prompts, longest first, into an empty cache of that many slots. Returns the logits (N, V) of what follows,
    the cache, the mask (N, slots) and the position (N,) of the next token. Padded with id 0, on the left: any id would
    do, since the mask hides it."""
    device = model.get_input_embeddings().weight.device
    P = len(prompts[0])
    ids = torch.tensor([[0] * (P - len(prompt)) + prompt for prompt in prompts], device=device)          # (N, P)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    position = torch.arange(P, device=device) - (P - length)[:, None]             # the first token of each is at 0
    mask = torch.zeros(len(prompts), slots, dtype=torch.long, device=device)
    mask[:, :P] = position >= 0                                                   # 0: padding, nobody looks at it
    cache = empty_cache(model, slots)
    # Some columns of all rows at a time, which bounds the memory; all P at once for models with convolutions or
    # recurrences, which would forget the columns before.
    steady = all(type(layer) in (SlotLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    columns = max(1, PASS // len(prompts)) if steady else P
    for start in range(0, P, columns):
        end = min(start + columns, P)
        logits = read(model, ids[:, start:end], position[:, start:end].clamp(min=0), mask[:, :end], cache)
    return logits, cache, mask, length                                            # positions count from 0


def sample(logits: torch.Tensor, temperature: float, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token (R,) and its log-prob (R,) under this temperature, from logits (R, V). draw (R,) in [0, 1): the token
    is where the cumulative probability passes it, so a row's tokens depend on its own numbers alone. Temperature 0
    takes the most likely token and reports its log-prob at temperature 1."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1)
    else:
        mass = logp.exp().cumsum(dim=-1, dtype=torch.float64)                     # float32 sums could rise and fall
        point = draw.double() * mass[:, -1]                                       # below the end, which may not be 1
        token = torch.searchsorted(mass, point[:, None], right=True)[:, 0]        # so never a token of probability 0
        token = token.clamp(max=logits.shape[-1] - 1)                             # NaN: found by `generate`
    return token, logp.gather(-1, token[:, None])[:, 0]


def draws(names: list[str], count: int) -> torch.Tensor:
    """(len(names), count) numbers in [0, 1), float64. Row i is a function of names[i] alone, on every machine. (Not
    torch's generator: on the CPU it keeps 32 bits of a seed.)"""
    numbers = torch.zeros(len(names), count, dtype=torch.float64)
    for row, name in zip(numbers, names):
        rng = random.Random(name)
        row[:] = torch.tensor([rng.random() for _ in range(count)], dtype=torch.float64)
    return numbers


def batches(prompts, samples: list[int], new: int, max_cache_tokens: int, equal_lengths: bool = False):
    """Numbers of the prompts, longest first, in lists whose cache (rows times slots) stays under the limit; a prompt
    that exceeds it on its own makes a list of its own."""
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


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, num_samples: int | list[int] = 1, max_new_tokens: int = 64,
             temperature: float = 1.0, eos_id: int | list[int], draws: torch.Tensor | None = None, generator=None,
             max_cache_tokens: int = 65536) -> Completions:
    """Samples completions of prompts (lists of token ids), `num_samples` of each, or num_samples[n] of prompt n.

    Batch by batch, in four phases:
      read    every prompt once, padded on the left, so that all of them end in the same slot
      copy    its keys and values to each of its samples: equal tokens at equal positions have equal keys. Samples
              part at the first token where their own random numbers differ enough, and store their own keys from there
      decode  one token for all rows at a time, into the same slot in every row
      leave   rows that are done go once they are a quarter of the batch

                        read            copy                 decode               leave
          prompt A    . a a a      . a a a |  . .        . a a a | x E        b b b b | y y
          prompt B    b b b b      . a a a |  . .        . a a a | z E        b b b b | y v
                                   b b b b |  . .        b b b b | y y
                                   b b b b |  . .        b b b b | y v        E: end of sequence

    draws (R, >= max_new_tokens) in [0, 1) are the rows' own random numbers, one per token: what a row becomes depends,
    but for rounding, neither on the batch nor on its place in it. Without them they are drawn from `generator`
    beforehand; at temperature 0 there is no need of either. Any id of `eos_id` ends a row. A batch has at most
    `max_cache_tokens` rows x slots, or one prompt.
    ValueError for arguments that make no sense, ContextError for a prompt whose completion would not fit the context,
    FloatingPointError for logits that are not finite."""
    samples = [num_samples] * len(prompts) if isinstance(num_samples, int) else list(num_samples)
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    first_row = [0, *itertools.accumulate(samples)]                              # of each prompt in the result
    R = first_row[-1]
    if temperature == 0:
        draws = torch.zeros(R, max_new_tokens)
    elif draws is None and generator is not None:
        draws = torch.rand(R, max_new_tokens, dtype=torch.float64, generator=generator, device=generator.device)
    check_arguments(model, prompts, samples, max_new_tokens, temperature, draws)
    device = model.get_input_embeddings().weight.device
    result = Completions([[] for _ in range(R)], [[] for _ in range(R)])

    # Set by `load` on a model whose logits padding would change: then a batch has prompts of one length.
    alone = getattr(model, "decode_alone", False)
    for batch in batches(prompts, samples, max_new_tokens, max_cache_tokens, alone):
        # 1. Read every prompt once, whatever the number of its samples.
        P = len(prompts[batch[0]])
        logits, cache, mask, position = read_prompts(model, [prompts[n] for n in batch], P + max_new_tokens)

        # 2. Copy: each sample of a prompt gets its own keys and values. place: where a row goes in the result.
        place = [first_row[n] + s for n in batch for s in range(samples[n])]
        rows = torch.tensor([i for i, n in enumerate(batch) for _ in range(samples[n])], device=device)
        cache.reorder_cache(rows)
        logits, mask, position = logits[rows], mask[rows], position[rows]
        draw = draws[place].to(device)                                            # (R, max_new_tokens)

        # 3. Decode one token for all rows at a time.
        done = [False] * len(place)
        for step in range(max_new_tokens):
            token, logp = sample(logits, temperature, draw[:, step])
            told = torch.stack([token.double(), logp.double()]).tolist()          # where the host waits for the device
            for row, (t, log) in enumerate(zip(*told)):
                if done[row]:
                    continue
                if not math.isfinite(log):
                    raise FloatingPointError("the model's logits are not finite; its weights are damaged, or too large "
                                             "for its dtype")
                result.tokens[place[row]].append(int(t))
                result.logprobs[place[row]].append(log)
                done[row] = int(t) in ends
            if all(done) or step == max_new_tokens - 1:
                break

            # 4. Rows that are done leave once they are a quarter of the batch: moving the others costs a few steps.
            stay = [row for row, over in enumerate(done) if not over]
            if len(stay) <= 0.75 * len(done):
                rows = torch.tensor(stay, device=device)
                cache.reorder_cache(rows)
                token, mask, position, draw = token[rows], mask[rows], position[rows], draw[rows]
                place = [place[row] for row in stay]
                done = [False] * len(stay)
            mask[:, P + step] = 1
            logits = read(model, token[:, None], position[:, None], mask[:, :P + step + 1], cache)
            position = position + 1
        del cache                                                                 # before the next is allocated
    return result


# ---------------------------------------------------------------------------------------- 2. the frozen executor

import data
import verify
from data import Problem, UserError

CACHE_GIB = 4.0                                   # of keys and values in one batch


@dataclass(frozen=True)
class Run:
    """One executor run: its output, whether the verifier accepted it, and its score (1 or 0, or a partial score of
    `verify.exec_score` for programs)."""
    output: str
    ok: bool
    score: float


class Executor:
    """A frozen LM that reads problem + trace and writes the artifact; the verifier judges it.

    `spent` counts what that cost: prompt tokens, generated tokens, program runs. Errors of the model or of the
    sandbox are raised, never scored; a program that kills or hangs its helper is tried on a new one, and has then
    failed."""

    def __init__(self, model, tokenizer, *, max_new_tokens: int, temperature: float = 0.7, exec_score: str = "binary",
                 seed: int = 0, max_cache_gib: float = CACHE_GIB):
        self.tokenizer = tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.exec_score, self.seed = exec_score, seed
        self.spent = {"executor_prompt_tokens": 0, "executor_tokens": 0, "program_runs": 0}
        self._baseline = {}                       # (problem_id, K): successes of K runs without a trace
        if model is not None:                     # None: it is on a server, section 7
            self.model = freeze(model)
            self.eos_ids = eos_ids(model, tokenizer)
            self.max_cache_tokens = cache_tokens(model, max_cache_gib)

    def run(self, problems: list[Problem], traces: list[str | None] | None, repeats: int | list[int],
            when: str = "") -> list[list[Run]]:
        """Independent runs of every problem with its trace (None: without), `repeats` of each, or repeats[n] of
        problem n, in one call of `generate`. [problem][repeat]. `when` names the occasion, such as a training step:
        the same runs at another time draw other numbers. Runs without a trace are remembered as the problem's baseline.
        UserError for a prompt that exceeds the context."""
        traces = [None] * len(problems) if traces is None else traces
        repeats = [repeats] * len(problems) if isinstance(repeats, int) else repeats
        names = self._names(problems, traces, repeats, when)
        texts = [data.executor_prompt(p, t) for p, t in zip(problems, traces)]
        prompts = [data.encode_prompt(self.tokenizer, text) for text in texts]
        outputs = self._write(prompts, repeats, names)
        self.spent["executor_prompt_tokens"] += sum(map(len, prompts))
        repeated = [p for p, K in zip(problems, repeats) for _ in range(K)]
        judged = iter(self._judge(repeated, outputs))
        runs = [list(itertools.islice(judged, K)) for K in repeats]
        for problem, trace, own in zip(problems, traces, runs):
            if trace is None:
                self._baseline[problem.problem_id, len(own)] = sum(run.ok for run in own)
        return runs

    def _write(self, prompts, repeats, names) -> list[str]:
        """What the executor writes in repeats[n] runs of prompt n, each with the random numbers of its own name."""
        try:
            completions = generate(self.model, prompts, num_samples=repeats, max_new_tokens=self.max_new_tokens,
                                   temperature=self.temperature, eos_id=self.eos_ids,
                                   draws=draws(names, self.max_new_tokens), max_cache_tokens=self.max_cache_tokens)
        except ContextError as error:
            raise UserError(f"the executor: {error}") from None
        self.spent["executor_tokens"] += sum(map(len, completions.tokens))
        return decode_text(self.tokenizer, completions.tokens)

    def _names(self, problems, traces, repeats, when: str) -> list[str]:
        """What the random numbers of each run are a function of. A problem's traces are its samples 0, 1, ...; a run
        without a trace serves all steps, so no step is in its name."""
        names, seen = [], {}
        for problem, trace, K in zip(problems, traces, repeats, strict=True):
            name = f"alone {self.seed} {problem.problem_id}"
            if trace is not None:
                sample = seen.get(problem.problem_id, problem.first_sample)
                seen[problem.problem_id] = sample + 1
                name = f"run {self.seed} {when} {problem.problem_id} {sample}"
            names += [f"{name} {k}" for k in range(K)]
        return names

    def _judge(self, problems: list[Problem], outputs: list[str]) -> list[Run]:
        codes = [verify.code_blocks(o) for p, o in zip(problems, outputs) if p.task_type == "code"]
        verdicts = verify.run_programs(codes, [p.tests for p in problems if p.task_type == "code"],
                                       fail_fast=self.exec_score == "binary")
        self.spent["program_runs"] += len(codes)
        runs, verdicts = [], iter(verdicts)
        for problem, output in zip(problems, outputs):
            if problem.task_type == "code":
                verdict = next(verdicts)
                ok, score = verdict.ok, verify.exec_score(verdict, self.exec_score)
            else:
                ok = verify.math_equal(verify.extract_answer(output), problem.reference_solution)
                score = float(ok)
            runs.append(Run(output, ok, score))
        return runs

    def success(self, problems, traces, repeats, when: str = "") -> list[int]:
        """How many of the runs succeed, for every problem. Arguments of `run`."""
        return [sum(run.ok for run in runs) for runs in self.run(problems, traces, repeats, when)]

    def run_with_baseline(self, problems: list[Problem], traces: list[str], repeats: int,
                          when: str = "") -> tuple[list[list[Run]], list[int]]:
        """1 + `repeats` runs with each trace, and each problem's success count of `repeats` runs without one, all in
        one call of `generate`. The executor is frozen, so one count without a trace serves a problem's whole group and
        all later steps: only problems that have none yet are run."""
        new = self._without_baseline(problems, repeats)
        counts = [1 + repeats] * len(problems) + [repeats] * len(new)
        runs = self.run(problems + new, traces + [None] * len(new), counts, when)
        return runs[:len(problems)], [self._baseline[p.problem_id, repeats] for p in problems]

    def baseline(self, problems: list[Problem], repeats: int) -> list[int]:
        """Success counts of `repeats` runs without a trace, measured where they are not known yet."""
        self.run(self._without_baseline(problems, repeats), None, repeats)
        return [self._baseline[p.problem_id, repeats] for p in problems]

    def _without_baseline(self, problems, repeats: int) -> list[Problem]:
        new = {p.problem_id: p for p in problems if (p.problem_id, repeats) not in self._baseline}
        return list(new.values())

    def state(self) -> dict:
        """What a checkpoint needs: the baselines measured so far and the costs."""
        return {"baseline": dict(self._baseline), "spent": dict(self.spent)}

    def load_state(self, state: dict) -> None:
        """Restores `state`."""
        self._baseline, self.spent = dict(state["baseline"]), dict(state["spent"])


# ------------------------------------------------------------------------------------ 3. checks of the decoder

class ContextError(ValueError):
    """A prompt and its new tokens exceed the positions that the model knows."""


def context_of(model) -> float:
    """How many positions a model knows; inf without a limit. A window of attention is none. The original length of
    longrope is one: beyond it other frequencies hold, for the whole batch (transformers, modeling_rope_utils.py)."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):                                           # it may differ by kind of layer
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(filter(None, limits), default=math.inf)


def check_arguments(model, prompts, samples, new: int, temperature: float, draws) -> None:
    """The errors of `generate`, before anything is computed."""
    if len(samples) != len(prompts) or new < 1 or temperature < 0 or not all([*samples, *prompts]):
        raise ValueError("prompts must not be empty, num_samples be one number >= 1 or one for each prompt, "
                         "max_new_tokens >= 1, temperature >= 0")
    if draws is None or len(draws) != sum(samples) or draws.shape[1] < new:
        raise ValueError("draws: one number per row and new token is needed at a temperature > 0, or a generator")
    check_context(model, prompts, new)


def check_context(model, prompts, new: int) -> None:
    """ContextError for a prompt that leaves no room for `new` tokens."""
    longest = max(map(len, prompts), default=0)
    if longest + new > context_of(model):
        raise ContextError(f"a prompt of {longest} tokens and {new} new ones exceed the model's context of "
                           f"{context_of(model)}; shorten the problems or lower the number of new tokens")


# -------------------------------------------------------------------- 4. scoring and supervised training

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from data import knob

IGNORE = -100


def pad(rows: list[list[int]], value: int, device) -> torch.Tensor:
    """(B, longest) from lists of ids, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def pad_id(tokenizer) -> int:
    """The id to pad with; masks never look at it, so EOS serves where there is no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def token_hidden(model, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Last hidden states (M, H) at the positions `at` (M,) int64 of ids.flatten(), from ids (B, T). Right padding needs
    no mask under causal attention. (Positions instead of a boolean mask: on CUDA the host would wait for its count.)"""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[at]


def token_logits(model, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Logits (M, V) at these positions only: the vocabulary is the widest part of a small model, and most positions
    are prompt. Models that scale or cap their logits (`check_head`) compute all of them. Arguments of
    `token_hidden`."""
    if getattr(model, "plain_head", True):
        return model.get_output_embeddings()(token_hidden(model, ids, at))
    return model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[at]


def sequence_loss(model, rows: list[tuple[list[int], list[int]]], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the labels of some (ids, labels)."""
    device = model.get_input_embeddings().weight.device
    ids = pad([row[0] for row in rows], pad_id, device)                           # (B, T)
    labels = pad([row[1] for row in rows], IGNORE, "cpu").flatten()
    at = (labels != IGNORE).nonzero()[:, 0]                                       # (M,), found without the device
    logits = token_logits(model, ids, at.to(device)).float()
    return F.cross_entropy(logits, labels[at].to(device))


@torch.no_grad()
def heldout_loss(model, sequences, *, batch_size: int, pad_id: int) -> float:
    """Mean cross-entropy over all labels of all (ids, labels), in evaluation mode."""
    model.eval()
    loss, count = 0.0, 0
    for i in range(0, len(sequences), batch_size):
        batch = sequences[i:i + batch_size]
        labels = sum(label != IGNORE for row in batch for label in row[1])
        with autocast(model):
            loss += labels * sequence_loss(model, batch, pad_id).item()
        count += labels
    return loss / count


SMALL = 20_000_000                                # parameters


def work_dtype(model) -> torch.dtype:
    """What matrix products are computed in: bfloat16 on CUDA and on CPUs with instructions for it (avx512_bf16, amx),
    float32 elsewhere, and for small models, which gain nothing from 16 bits."""
    large = sum(p.numel() for p in model.parameters()) > SMALL
    return fast_dtype(model.device) if large else torch.float32


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32. (Not Apple's: nothing was tried there.)"""
    able = getattr(torch.cpu, "get_capabilities", dict)()                         # not in every torch
    on_cpu = device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if on_cpu or device.type == "cuda" else torch.float32


def autocast(model):
    """Matrix products in `work_dtype`, over float32 weights in training, so that small updates are not rounded away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=work_dtype(model) == torch.bfloat16)


def adamw(parameters, lr: float, **options) -> torch.optim.AdamW:
    """AdamW, fused on CUDA: there the plain one makes temporary copies of all its tensors."""
    parameters = list(parameters)
    if parameters[0].is_cuda:
        options["fused"] = True
    return torch.optim.AdamW(parameters, lr=lr, **options)


def schedule(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to 0 over `total` steps."""
    return min((step + 1) / max(1, warmup), (total - step) / max(1, total - warmup))


def without_dropout(model) -> None:
    """Sets every dropout of a model to 0, so that training mode, which checkpointing needs, computes what evaluation
    does: the policy that is scored has to be the one that was sampled."""
    for part in (model.config, *model.modules()):
        for key, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in key or key == "p" and isinstance(part, torch.nn.Dropout)):
                setattr(part, key, 0.0)


def enable_checkpointing(model) -> None:
    """Activations are recomputed in the backward pass, in training mode, without dropout. UserError for a model that
    cannot, or whose training mode computes something else (router noise)."""
    name = model.config.model_type
    without_dropout(model)
    # Older versions of transformers call it gradient_checkpointing_enable; that name goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{name} models cannot recompute activations ({_first_line(error)}); train without "
                        "--checkpointing") from None
    ids = _some_ids(model, 16)[None]
    was_training, logits = model.training, []
    with torch.no_grad():
        for mode in (False, True, True):
            model.train(mode)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float())
    model.train(was_training)
    evaluation, *training = logits
    if any(_distance(evaluation, x) > 1e-3 for x in training):     # the same kernels, in every dtype
        raise UserError(f"{name} models compute something else in training mode than in evaluation; train without "
                        "--checkpointing")
    model.recomputes_activations = True


def finetune(model, sequences: list[tuple[list[int], list[int]]], *, epochs: float, batch_size: int,
             learning_rate: float, warmup: int, seed: int, pad_id: int, title: str = "finetune", heldout=(),
             checkpointing: bool = False, checkpoint: Path | None = None) -> float:
    """Supervised training on (ids, labels); labels[t] is what follows ids[t], IGNORE where there is no loss.
    Batches hold sequences of similar length. Learning rate: linear warm-up, then linear decay to 0. With `heldout`
    sequences their loss is measured at the start and ten times on the way; two measurements without a new minimum end
    the training early, and the model keeps the weights of the minimum. `checkpointing` is for memory. With `checkpoint`,
    a file, a stopped training goes on from the last tenth.
    Returns the mean loss of the last tenth. FloatingPointError, with the step, for a loss or gradient that is not
    finite; UserError for a checkpoint that cannot be read."""
    if not sequences:
        raise ValueError("sequences: there must be at least one")
    if checkpointing:
        enable_checkpointing(model)
    optimizer = adamw(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = max(1, round(len(sequences) * epochs / batch_size))
    begin, losses, best, since, weights = 0, [], None, 0, None
    if checkpoint and checkpoint.exists():
        begin, losses, best, since, weights = load_progress(checkpoint, model, optimizer)
    batches = itertools.islice(training_order(sequences, batch_size, seed), begin, None)
    bar = tqdm(range(begin, total + 1 if heldout else total), initial=begin, total=total, desc=title, mininterval=5)
    for step in bar:
        tenth = step % max(1, total // 10) == 0
        if checkpoint and tenth and step > begin:
            save_progress(checkpoint, model, optimizer, (step, losses, best, since, weights))
        if heldout and (tenth or step == total):
            held = heldout_loss(model, heldout, batch_size=batch_size, pad_id=pad_id)
            if not math.isfinite(held):
                raise FloatingPointError(f"{title}, step {step}: the held-out loss is not finite; {DIVERGED}")
            since += 1
            if best is None or held < best:
                best, since, weights = held, 0, {k: v.clone() for k, v in model.state_dict().items()}
            if since == 2 or step == total:
                model.load_state_dict(weights)
                break
        model.train()
        with autocast(model):
            loss = sequence_loss(model, next(batches), pad_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, total, warmup)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            raise FloatingPointError(f"{title}, step {step}: the loss or its gradient is not finite; {DIVERGED}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    check_alive(model.eval(), f"{title}, after step {step}")
    last = losses[-max(1, total // 10):]
    return sum(last) / len(last)


def training_order(sequences, batch_size: int, seed: int):
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


def save_progress(path: Path, model, optimizer, progress: tuple) -> None:
    """Weights, optimizer and some plain values, as one file, atomically. OSError for a full disk."""
    temporary = path.with_suffix(".tmp")
    try:
        with saving(path.parent):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_progress(path: Path, model, optimizer) -> tuple:
    """Restores what `save_progress` wrote; returns the plain values. UserError for a file that cannot be read."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["progress"]
    except Exception as error:                                     # torch's and pickle's are of all kinds
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); delete it to begin again") from None


DIVERGED = "the training diverged, begin again with a lower --learning_rate"


@torch.no_grad()
def check_alive(model, where: str) -> None:
    """FloatingPointError where the last update left a model that tells nothing: whoever loads it later would be told
    that its weights are damaged. (Norms turn weights that are large enough into logits of 0.)"""
    largest = model(input_ids=_some_ids(model, 8)[None], use_cache=False).logits.abs().max().item()
    if not 0 < largest < math.inf:
        raise FloatingPointError(f"{where}: the model's logits are not finite, or all 0; {DIVERGED}")


# ---------------------------------------------------------------------------- 5. loading and its checks

DRIVER = Path("/proc/driver/nvidia/version")


def pick_device(device: str = "") -> torch.device:
    """The named device, or CUDA when there is one, else the CPU. UserError for one that is not there, and for a machine
    with a GPU that torch does not see: hours on the CPU in its place would be a surprise."""
    if not device and DRIVER.exists() and not torch.cuda.is_available():
        driver = re.search(r"\d+\.\d[\d.]*", DRIVER.read_text())
        raise UserError(f"the NVIDIA driver {driver[0] if driver else ''} is there, but torch {torch.__version__} for "
                        f"CUDA {torch.version.cuda} sees no GPU; PyPI's torch needs driver 580 or newer: update it, or "
                        "install torch from download.pytorch.org/whl/ for an older CUDA, or give --device cpu")
    try:
        found = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device}: cannot be used ({_first_line(error)}); leave it out, or give cpu") from None
    if found.type == "meta":
        raise UserError("--device meta: holds no numbers; leave it out, or give cpu")
    if found.type == "cuda":
        torch.cuda.set_device(found)
        # torch prefers cuDNN's attention on Hopper and newer (aten/native/transformers/cuda/sdp_utils.cpp, priority
        # order), which builds and keeps a plan for every exact shape; here every token is a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def load(path_or_name: str, device=None, dtype=None):
    """(model, tokenizer) of any Hugging Face causal LM, a local folder or a name on the hub, in evaluation mode.
    Default dtype: `work_dtype`. UserError that names what is missing or why a model cannot be used."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()                                 # one bar per loaded tensor tells nobody anything
    device = pick_device() if device is None else torch.device(device)
    tokenizer = load_tokenizer(path_or_name)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype or fast_dtype(device), output_loading_info=True)
    except ImportError as error:
        raise UserError(f"{path_or_name}: needs a library that is not installed ({_first_line(error)}); install it, or "
                        "choose a model that is not quantised") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path_or_name}: no causal LM can be loaded ({_first_line(error)}); a folder must hold "
                        "config.json and model.safetensors") from None
    except Exception as error:                                     # whatever a damaged config.json leads to
        raise UserError(f"{path_or_name}: no causal LM can be loaded ({_first_line(error)})") from None
    if report["missing_keys"]:                                     # transformers would initialise them at random
        raise UserError(f"{path_or_name}: the weights lack {sorted(report['missing_keys'])[0]}; the file is incomplete")
    model = model.to(device).eval()
    if dtype is None and model.dtype != work_dtype(model):
        return load(path_or_name, device, work_dtype(model))
    size = len(model.get_input_embeddings().weight)
    if len(tokenizer) > size:
        raise UserError(f"{path_or_name}: the tokenizer has {len(tokenizer)} tokens, the model's embedding table "
                        f"{size}; they do not belong together")
    check_decoding(model, path_or_name)
    return model, tokenizer


def load_tokenizer(path_or_name: str):
    """The tokenizer of a model. UserError for one that cannot be used, or that is not the one in the folder."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    except Exception as error:                                     # tokenizers raises Exception itself
        raise UserError(f"{path_or_name}: no tokenizer can be loaded ({_first_line(error)}); --model or --init must be "
                        "a Hugging Face folder with tokenizer.json, or a name on a hub that can be reached") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path_or_name}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
    try:
        data.encode_prompt(tokenizer, data.SENTENCE)
        data.encode_prompt(tokenizer, data.SENTENCE + tokenizer.eos_token)         # cut up, around the user's text
    except Exception as error:                                     # a template is a program of its own
        raise UserError(f"{path_or_name}: the tokenizer's chat template cannot render one user message "
                        f"({_first_line(error)})") from None
    data.check_tokenizer(tokenizer, path_or_name)
    return tokenizer


def _first_line(error) -> str:
    return str(error).strip().split("\n")[0][:200]


def freeze(model):
    """The model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a text: what the tokenizer and the model's generation_config name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return sorted({id for id in [tokenizer.eos_token_id, *named] if id is not None})


def decode_text(tokenizer, rows: list[list[int]]) -> list[str]:
    """Texts of rows of ids, letter by letter: the clean-up of spaces turns ' '.join(a) into ''.join(a), and the verdict
    with it."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
def cache_tokens(model, gib: float) -> int:
    """How many tokens of keys and values fit into `gib` GiB: measured on 64, since no formula knows all kinds of
    attention. States of a fixed size per row count as if no row were longer."""
    count = int(min(64, context_of(model)))
    with autocast(model):
        _, cache, *_ = read_prompts(model, [_some_ids(model, count).tolist()], count)
    held = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for part in parts:
                if torch.is_tensor(part):
                    held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return max(1, int(gib * 2**30 * count / sum(held.values())))


def _some_ids(model, count: int) -> torch.Tensor:
    """(count,) ids from the middle of the table: the first are often reserved."""
    table = model.get_input_embeddings().weight
    return (torch.arange(count, device=table.device) + len(table) // 2) % len(table)


def _distance(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference between two sets of logits, in units of the largest logit."""
    return float((wanted - found).abs().max() / wanted.abs().max())


@contextmanager
def in_float32(model):
    """The model with its 16-bit weights in float32 inside, if it is small enough for that; they come back exactly."""
    parameters = list(model.parameters())
    kinds = {p.dtype for p in parameters}
    small = sum(p.numel() for p in parameters) < 2**31 and kinds <= {torch.bfloat16, torch.float16, torch.float32}
    halves = [(p, p.dtype) for p in parameters if small and p.dtype != torch.float32]
    try:
        for p, _ in halves:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in halves:
            p.data = p.data.to(dtype)


@torch.no_grad()
def check_decoding(model, name: str) -> None:
    """UserError for a model that a cache does not fit. One whose answer depends on the padding beside a prompt gets
    `decode_alone`: its prompts are decoded in groups of equal length. Judged in float32, where the model is small
    enough for that, since the rounding of 16 bits would hide what a wrong mask does."""
    kind, ids = model.config.model_type, _some_ids(model, 12).tolist()
    prompts = [ids, ids[:5]]

    def plain(prompt):                                             # (1, 4, V): after each of the last four tokens
        return model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[:, -4:].float()

    def decoded(some):                                             # (prompts, 4, V), the steps of `generate`
        slots = len(some[0])
        logits, cache, mask, position = read_prompts(model, [prompt[:-3] for prompt in some], slots)
        rows = torch.tensor([*range(len(some)), 0], device=mask.device)        # one more sample of the first prompt
        cache.reorder_cache(rows)
        logits, mask, position = [logits[rows]], mask[rows], position[rows]
        for t in (-3, -2, -1):
            mask[:, t] = 1
            token = torch.tensor([[some[row][t]] for row in rows.tolist()], device=mask.device)
            logits.append(read(model, token, position[:, None], mask[:, :slots + t + 1], cache))
            position = position + 1
        return torch.stack(logits, dim=1)[:-1].float()

    with in_float32(model):
        exact = all(p.dtype == torch.float32 for p in model.parameters())
        try:
            wanted = torch.cat([plain(prompt) for prompt in prompts])
            lone = torch.cat([decoded([prompt]) for prompt in prompts])
            padded = decoded(prompts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                                 # whatever a model that needs something else raises
            raise UserError(f"{name}: {kind} models cannot be decoded here ({type(error).__name__}: "
                            f"{_first_line(error)})") from error
    if not torch.isfinite(wanted).all():
        raise UserError(f"{name}: the logits are not finite; the weights are damaged, or too large for {model.dtype}")
    rounding = _distance(wanted, lone)
    if not rounding < (1e-3 if exact else 0.1):
        raise UserError(f"{name}: {kind} models cannot be decoded here: with cached keys and values the logits differ "
                        f"by {rounding:.2g} of the largest")
    # Sparse attention chooses among more keys than these few: what it does with padding would not show.
    plain_layers = (SlotLayer, DynamicSlidingWindowLayer)
    sparse = any(isinstance(layer, DynamicLayer) and type(layer) not in plain_layers
                 and not isinstance(layer, LinearAttentionCacheLayerMixin) for layer in empty_cache(model, 1).layers)
    if sparse or not _distance(wanted, padded) < (1e-3 if exact else 0.01 + 2 * rounding):
        model.decode_alone = True
        print(f"{name}: padding may change what {kind} models compute; prompts are decoded in groups of equal length")


@torch.no_grad()
def check_head(model) -> bool:
    """Whether the logits are the head applied to the last hidden states. They are not where a model scales or caps them
    (Gemma 2, Granite, Cohere): then `token_logits` takes them from the model's own forward pass."""
    ids = _some_ids(model, 16)[None]
    full = model(input_ids=ids, use_cache=False).logits[0].float()
    rounding = 1e-3 if model.dtype == torch.float32 else 0.03
    model.plain_head = True
    try:
        ours = token_logits(model, ids, torch.arange(16, device=ids.device)).float()
        model.plain_head = ours.shape == full.shape and _distance(full, ours) <= rounding
    except (RuntimeError, AttributeError, TypeError):              # a layer between hidden states and head
        model.plain_head = False
    return model.plain_head


def base_of(run_dir) -> str:
    """The base model of a run, planner and executor in one: the folder or name that `python executor.py` recorded."""
    folder = Path(run_dir) / "base"
    model = _base_record(run_dir)["model"]
    return str(folder) if model == "." else str(model)


def _base_record(run_dir) -> dict:
    folder = Path(run_dir) / "base"
    if not folder.is_dir():
        raise UserError(f"{folder}: no base model yet; run python executor.py --run_dir {run_dir} first")
    return data.read_json(folder / "base.json", f"delete {folder} and run python executor.py --run_dir {run_dir} again",
                          "model")


def load_for(run_dir, path_or_name, device=None, dtype=None):
    """`load` for a run: all its prompts are made with the template arguments that `python executor.py` recorded."""
    model, tokenizer = load(str(path_or_name), device, dtype)
    set_template_arguments(tokenizer, _base_record(run_dir).get("chat_template_kwargs") or {})
    return model, tokenizer


def tokenizer_for(run_dir, path_or_name):
    """The tokenizer that `load_for` gives, without the model."""
    tokenizer = load_tokenizer(str(path_or_name))
    set_template_arguments(tokenizer, _base_record(run_dir).get("chat_template_kwargs") or {})
    return tokenizer


def set_template_arguments(tokenizer, arguments: dict) -> None:
    """Puts arguments into the chat template itself, so that every prompt has them, and planners are saved with them."""
    for name, value in arguments.items():
        assignment = "{%- set " + f"{name} = {json.dumps(value)}" + " %}"
        if isinstance(tokenizer.chat_template, str) and assignment not in tokenizer.chat_template:
            tokenizer.chat_template = assignment + tokenizer.chat_template


@contextmanager
def saving(folder):
    """Inside it models and tokenizers are saved: what each library says of a full disk becomes OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:                                     # SafetensorError, RuntimeError, Exception itself
        raise OSError(f"{folder}: cannot be saved ({_first_line(error)}); if the disk is full make room on it, then "
                      "the same command goes on") from None


# --------------------------------------------------------------------------------------------------- 6. LoRA

class Lora:
    """A low-rank adapter (arXiv 2106.09685) on a frozen model: y = W x + alpha / rank * B A x, in which only A (rank,
    in) and B (out, rank) learn; B starts at 0. They are parameters of the linear layers themselves and a hook adds
    their part, so no name in the model changes; with the adapter off it is the model that it was, bit for bit."""

    def __init__(self, model, rank: int, alpha: float, targets=(), seed: int = 0):
        """`targets`: last names of the layers ("q_proj", ...); empty: every linear layer but the head."""
        self.model, self.rank, self.alpha, self.active = freeze(model), rank, alpha, True
        head, draw = model.get_output_embeddings(), torch.Generator().manual_seed(seed)     # a backbone has no head
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
                       and layer is not head and (not targets or name.rpartition(".")[2] in targets)}
        self.targets = sorted({name.rpartition(".")[2] for name in self.layers})
        if not self.layers or set(targets) - set(self.targets):
            raise UserError(f"LoRA: {model.config.model_type} has no torch.nn.Linear layers "
                            f"{sorted(set(targets) - set(self.targets)) or ''}")
        self.hooks = []
        for layer in self.layers.values():
            wide, device = layer.in_features, layer.weight.device
            A = (2 * torch.rand(rank, wide, generator=draw) - 1) / math.sqrt(wide)
            layer.lora_A = torch.nn.Parameter(A.to(device))
            layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
            self.hooks.append(layer.register_forward_hook(self._add))
        with torch.no_grad():                                      # a layer that is no plain matrix shows now
            model(input_ids=_some_ids(model, 4)[None], use_cache=False)

    @property
    def share(self) -> float:
        """Share of the model's weights that lie in adapted layers. In most mixtures of experts it is small: their
        experts are no linear layers of their own."""
        adapted = sum(layer.weight.numel() for layer in self.layers.values())
        added = sum(x.numel() for x in self.state_dict().values())
        return adapted / (sum(p.numel() for p in self.model.parameters()) - added)

    def _add(self, layer, inputs, output):
        if not torch.is_tensor(output):
            name = next(name for name, other in self.layers.items() if other is layer)
            raise UserError(f"LoRA: layer {name} ({type(layer).__name__}) returns a {type(output).__name__}; name the "
                            "layers to adapt without it")
        if self.active:
            part = F.linear(F.linear(inputs[0].to(layer.lora_A.dtype), layer.lora_A), layer.lora_B)
            return output + (self.alpha / self.rank * part).to(output.dtype)

    @contextmanager
    def off(self):
        """The bare model inside: frozen executor and reference policy."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def _merged(self, layer) -> torch.Tensor:
        """The layer's weight with its adapter's part added, rounded once, to the dtype that it has."""
        delta = self.alpha / self.rank * layer.lora_B.detach() @ layer.lora_A.detach()
        return (layer.weight + delta).to(layer.weight.dtype)

    def merge(self) -> None:
        """The adapter becomes part of the weights, as `save` writes them, and is gone: a plain model is left."""
        with torch.no_grad():
            for layer, hook in zip(self.layers.values(), self.hooks):
                layer.weight.copy_(self._merged(layer))
                del layer.lora_A, layer.lora_B
                hook.remove()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A and B of every layer under the names that peft gives them."""
        return {f"base_model.model.{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").detach()
                for name, layer in self.layers.items() for x in "AB"}

    def save(self, folder, base: str) -> None:
        """The merged model as a plain Hugging Face folder, in the model's dtype (bfloat16 rounds small changes away);
        the exact adapter in its subfolder adapter/, for `load` and for peft."""
        merged = {name: x.cpu() for name, x in self.model.state_dict().items()           # not a second model on the GPU
                  if not name.endswith((".lora_A", ".lora_B"))}
        for name, layer in self.layers.items():
            merged[f"{name}.weight"] = self._merged(layer).detach().cpu()
        self.model.save_pretrained(folder, state_dict=merged)
        (Path(folder) / "adapter").mkdir(exist_ok=True)
        save_file({name: x.cpu().contiguous() for name, x in self.state_dict().items()},
                  Path(folder) / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.rank,
                  "lora_alpha": self.alpha, "target_modules": self.targets, "lora_dropout": 0.0, "bias": "none",
                  "fan_in_fan_out": False, "inference_mode": True}
        data.write_atomic(Path(folder) / "adapter" / "adapter_config.json", json.dumps(config, indent=1))

    @classmethod
    def load(cls, model, folder) -> "Lora":
        """The adapter of a folder, ours or peft's, on its base model. UserError for one that does not match."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            saved = load_file(folder / "adapter_model.safetensors")
            for key, plain in {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {},
                               "alpha_pattern": {}}.items():
                if config.get(key, plain) != plain:
                    raise UserError(f"{folder}/adapter_config.json: {key} {config[key]!r} is not plain LoRA")
            lora = cls(model, config["r"], config["lora_alpha"], config["target_modules"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder}: not an adapter (adapter_config.json, adapter_model.safetensors): "
                            f"{error!r}") from None
        lora.load_state_dict(saved, folder)
        return lora

    def load_state_dict(self, saved: dict, where) -> None:
        """Takes over what `state_dict` gave. UserError names the first layer that does not match."""
        own = self.state_dict()
        for name in sorted(own.keys() | saved.keys()):
            ours, theirs = (tuple(x[name].shape) if name in x else None for x in (own, saved))
            if ours != theirs:
                raise UserError(f"{where}: the adapter does not match the model: {name} is {theirs}, must be {ours}")
            own[name].copy_(saved[name])


# ------------------------------------------------------------------------ 7. the frozen executor on a server

import http.client
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace

IN_FLIGHT = 64                                    # requests at once
PAUSES = (1, 2, 4, 8, 16, 32, 64)                 # seconds before each new try, where the trouble may pass
TIME_LIMIT = 600.0                                # seconds for one try; twice that, no new one begins
KEY = "EXECUTOR_API_KEY"                          # the variable of the environment that holds the server's key
# Digits, code, and letters that few vocabularies hold: other tokenizers cut it into more or fewer tokens.
SAMPLE = "Mia has 12345 coins .\n\tdef f(x): return x ** 2  # Żółw, 東京, straightforwardness"


class ServerError(OSError):
    """A server that cannot be reached, fails again and again, or answers something else than was asked. `status` is
    that of HTTP where it refused the request."""
    status = None


class _Trouble(Exception):
    """What may pass: worth another try, after at least `wait` seconds."""
    wait = 0.0


def split_url(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of http://HOST:PORT/v1. UserError for another form, and for one that may hold
    secrets, since settings.json shows it."""
    if re.search("[@?#]", url):
        raise UserError("--executor: must be http://HOST:PORT/v1 without user, password or query, since settings.json "
                        f"shows it; the server's key is read from the environment, {KEY}")
    form = r"(https?)://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?((?:/[\w.~%-]+)*)/?"
    found = re.fullmatch(form, url, re.ASCII)
    port = int(found[3] or {"http": 80, "https": 443}[found[1]]) if found else 0
    if not 0 < port < 2**16:
        raise UserError(f"--executor {url!r}: must be http://HOST:PORT/v1, or https")
    return found[1], found[2], port, found[4]


def check_server_flags(url: str, name: str) -> None:
    """UserError for flags that name no server, before anything is read or written."""
    if bool(url) != bool(name):
        raise UserError("--executor and --executor_model go together: a server's URL, and the name of the model there")
    if url:
        split_url(url)


class Server:
    """A client of a server that speaks JSON over HTTP; several threads may ask at the same time. The key goes into the
    header of the requests and nowhere else."""

    def __init__(self, url: str):
        self.url, (self.scheme, self.host, self.port, self.path) = url, split_url(url)
        self._key = os.environ.get(KEY, "").strip()
        if not re.fullmatch("[!-~]*", self._key):
            raise UserError(f"{KEY}: must be letters, digits and signs, without spaces or line ends")
        self._stopped, self._told = threading.Event(), False
        self._connections = set()

    def clean(self, said: str) -> str:
        """One line of what a server says, without the key, which it may repeat; cut behind that, not within a key."""
        for form in (self._key, repr(self._key)[1:-1]):
            said = said.replace(form, "(key)") if form else said
        return " ".join(said.split())[:400]

    def error(self, reason: str) -> ServerError:
        """An error that names this server."""
        return ServerError(f"the executor's server {self.url}: {self.clean(reason)}")

    def begin(self) -> None:
        """Begins a round of requests; the last one may have been hung up."""
        self._stopped.clear()
        self._told = False

    def hang_up(self) -> None:
        """Ends the requests of all threads with an error."""
        self._stopped.set()
        for connection in list(self._connections):
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)         # wakes the thread that reads from it
            except (OSError, AttributeError):                      # closed, or not open yet: that one sees the event
                pass

    def ask(self, path: str, body: dict | None = None, *, most: int = 2**22, pauses=()) -> dict:
        """The JSON object, of at most `most` bytes, that answers a GET or, with a body, a POST. What may pass (429,
        5xx, dropped connections, silence, damaged JSON) is tried again after each of `pauses` seconds, later where
        Retry-After says so. ServerError for the rest, and in the end."""
        end = time.monotonic() + 2 * TIME_LIMIT
        for tries, pause in enumerate((*pauses, math.inf), 1):
            try:
                return self._try(path, body, most)
            except _Trouble as trouble:
                pause = max(pause, trouble.wait)
                if time.monotonic() + pause > end or self._stopped.is_set():
                    raise self.error(f"{trouble}, tries: {tries}") from None
                if not self._told:                                 # once a round, not for each request
                    self._told = True
                    tqdm.write(f"{self.error(str(trouble))}; tries again in {pause:.0f} s", file=sys.stderr)
            self._stopped.wait(pause)

    def _try(self, path: str, body: dict | None, most: int) -> dict:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        limit, content = 30.0, b""                                 # seconds to connect, and for a GET
        connection = kind(self.host, self.port, timeout=limit)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._connections.add(connection)
        try:
            connection.connect()
            if self._stopped.is_set():
                raise ConnectionError("hung up")
            limit = TIME_LIMIT if body else limit
            end = time.monotonic() + limit
            connection.sock.settimeout(limit)                      # of each piece, so the sum has a limit of its own
            connection.request("POST" if body else "GET", self.path + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            while len(content) <= most and (piece := response.read1(2**16)):
                content += piece
                if time.monotonic() > end:
                    raise TimeoutError
        except TimeoutError:
            raise _Trouble(f"no answer in {limit:g} s") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _Trouble(f"no answer ({type(error).__name__}: {error})") from None
        finally:
            self._connections.discard(connection)
            connection.close()
        if len(content) > most:
            raise self.error(f"its answer is longer than {most:,} bytes")
        if response.status != 200:
            raise self._refusal(path, response, content)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            kind = response.headers.get_content_type()
            raise _Trouble(f"its answer of {len(content):,} bytes ({kind}) is no JSON, or cut off") from None
        if not isinstance(answer, dict):
            raise self.error("its answer is no JSON object")
        return answer

    def _refusal(self, path: str, response, content: bytes) -> Exception:
        """The error for a status that is not 200."""
        said = f"{path} answers {response.status} {response.reason}"
        try:                                                       # {"error": {"message"}}, {"message"}, {"detail"}
            found = json.loads(content)
            found = found.get("error", found)
            found = found.get("message") or found.get("detail") if isinstance(found, dict) else found
            said += f" ({found})" if found else ""
        except (ValueError, RecursionError, AttributeError):       # a proxy's page, say
            pass
        if response.status in (408, 425, 429) or response.status >= 500:
            trouble = _Trouble(said)
            wait = response.headers.get("Retry-After", "").strip()
            trouble.wait = float(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0.0
            return trouble
        if response.status in (401, 403):
            said += f"; put its key into the environment, {KEY}"
        if response.status == 404 and path == "/models":
            said += "; the URL of most servers ends in /v1"
        refusal = self.error(said)
        refusal.status = response.status
        return refusal


def without_weights(path_or_name: str) -> SimpleNamespace:
    """What `context_of` and `eos_ids` read of a model: its config and generation_config."""
    from transformers import AutoConfig, GenerationConfig
    try:
        config = AutoConfig.from_pretrained(path_or_name)
    except Exception as error:                                     # whatever a damaged config.json leads to
        raise UserError(f"{path_or_name}: its config.json cannot be read ({_first_line(error)})") from None
    try:
        generation = GenerationConfig.from_pretrained(path_or_name)
    except OSError:                                                # there is none
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)


class ServedExecutor(Executor):
    """The frozen executor on a server with OpenAI's /v1/completions, such as vLLM or SGLang. It has to serve the run's
    base model, whose tokenizer and config are all that is loaded here.

    Prompts go out as the ids that the executor in process would read: as text, a trace that spells control tokens could
    leave its place. Outputs come back as the server's own decoding, without special tokens (a SentencePiece tokenizer
    may leave a space in front that it drops here). Output k of a prompt has seed + k, as vLLM counts for n > 1, and the
    seed is a function of the name that in process the draws are a function of: a run is as repeatable as the server.
    What a server does not answer, or answers with something else than was asked, is ServerError and no output."""

    def __init__(self, url: str, name: str, base: str, tokenizer, **options):
        """Options of `Executor`. UserError for a server that does not have the model, or takes no ids."""
        super().__init__(None, tokenizer, **options)
        self.server, self.name = Server(url), name
        self.model = without_weights(base)
        self.eos_ids = eos_ids(self.model, tokenizer)
        self._find_model()
        self._check_ids()
        self.several = self._takes_n()
        print(f"executor: {name} on {url}" + ("" if self.several else ", a request for each run"))

    def _find_model(self) -> None:
        models = self.server.ask("/models").get("data")
        known = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        names = [str(model.get("id")) for model in known]
        if self.name not in names:
            serves = self.server.clean(", ".join(names)) or "no model"
            raise UserError(f"--executor_model {self.name}: {self.server.url} serves {serves}")
        limit = known[names.index(self.name)].get("max_model_len")
        if type(limit) is int:                                     # the server may keep to a shorter context
            self.model.config.get_text_config().max_position_embeddings = min(limit, context_of(self.model))

    def _check_ids(self) -> None:
        """UserError for a server that does not read the ids that it is sent, or has another tokenizer, as far as its
        counts tell."""
        ids, reason = data.encode_text(self.tokenizer, SAMPLE), ""
        body = self._body(ids, 1, 0) | {"max_tokens": 8}
        try:
            answer = self.server.ask("/completions", body)
            read = _count(answer, "prompt_tokens")
            if read != len(ids):
                reason = f"{self.server.url} has read {read} tokens where {len(ids)} were sent"
        except ServerError as error:
            if error.status not in (400, 422):
                raise
            reason = str(error)
        if reason:
            raise UserError(f"{reason}; a server must take token ids, as vLLM and SGLang do: as text, a trace that "
                            "spells control tokens could leave its place")
        outputs, tokens = self._outputs_in(answer, body)
        if not outputs[0] and tokens == body["max_tokens"]:
            raise UserError(f"{self.server.url}: counts {tokens} tokens and returns no text; start it with its "
                            "tokenizer")
        try:
            answer = self.server.ask("/completions", body | {"prompt": SAMPLE})
        except ServerError as error:
            if error.status is None:
                raise
            return                                                 # it takes ids only
        theirs, ours = _count(answer, "prompt_tokens"), len(self.tokenizer(SAMPLE)["input_ids"])
        if abs(theirs - ours) > 1:                                 # a BOS may be in one of them only
            raise UserError(f"{self.server.url}: cuts a text into {theirs} tokens, the run's base model into {ours}; "
                            "the server must serve the run's base model")

    def _takes_n(self) -> bool:
        """Whether one request may ask for several outputs. vLLM refuses it where they are greedy."""
        body = self._body(data.encode_text(self.tokenizer, SAMPLE), 2, 0) | {"max_tokens": 1}
        try:
            answer = self.server.ask("/completions", body)
        except ServerError as error:
            if error.status not in (400, 422):
                raise
            return False
        if isinstance(answer.get("choices"), list) and len(answer["choices"]) == 1:
            return False
        self._outputs_in(answer, body)
        return True

    def _body(self, prompt: list[int], n: int, seed: int) -> dict:
        """The request for n outputs. It names all that shapes the distribution: what it left out, servers would take
        from the model's generation_config (that of Qwen2.5 has top_p, top_k and a repetition penalty)."""
        return {"model": self.name, "prompt": prompt, "n": n, "seed": seed, "max_tokens": self.max_new_tokens,
                "temperature": self.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                "stop_token_ids": self.eos_ids, "skip_special_tokens": True}

    def _write(self, prompts, repeats, names) -> list[str]:
        try:
            check_context(self.model, prompts, self.max_new_tokens)
        except ContextError as error:
            raise UserError(f"the executor: {error}") from None
        bodies, row = [], 0
        for prompt, K in zip(prompts, repeats):
            seed = random.Random(names[row]).getrandbits(30)       # some servers keep 31 bits
            row += K
            if self.several and self.temperature > 0:
                bodies.append(self._body(prompt, K, seed))
            else:
                bodies += [self._body(prompt, 1, seed + k) for k in range(K)]
        self.server.begin()
        pool = ThreadPoolExecutor(max(1, min(IN_FLIGHT, len(bodies))))
        waiting = [pool.submit(self._ask, body) for body in bodies]
        try:
            for one in as_completed(waiting):
                one.result()                                       # the first error ends them all
        except BaseException:
            self.server.hang_up()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        answers = [one.result() for one in waiting]
        self.spent["executor_tokens"] += sum(tokens for _, tokens in answers)
        return [output for outputs, _ in answers for output in outputs]

    def _ask(self, body: dict) -> tuple[list[str], int]:
        most = 2**16 + 2**10 * body["n"] * body["max_tokens"]      # bytes; hardly any token has a hundred
        answer = self.server.ask("/completions", body, most=most, pauses=PAUSES)
        return self._outputs_in(answer, body)

    def _outputs_in(self, answer: dict, body: dict) -> tuple[list[str], int]:
        """The outputs that answer a request, and their tokens in all. ServerError for anything but what was asked. An
        output may be empty: then the model has ended it at once."""
        n, most, choices = body["n"], body["max_tokens"], answer.get("choices")
        if answer.get("model") != self.name:
            raise self.server.error(f"answers for the model {answer.get('model')!r}, asked for {self.name}")
        if not isinstance(choices, list) or len(choices) != n or not all(isinstance(x, dict) for x in choices):
            count = len(choices) if isinstance(choices, list) else "no"
            raise self.server.error(f"answers with {count} outputs, asked for {n}")
        by_index = {str(choice.get("index")): choice for choice in choices}
        if by_index.keys() != set(map(str, range(n))):
            raise self.server.error(f"numbers {n} outputs {', '.join(by_index)}")
        choices = [by_index[str(k)] for k in range(n)]
        for choice in choices:
            if choice.get("finish_reason") not in ("stop", "length"):
                raise self.server.error(f"an output ended for the reason {choice.get('finish_reason')!r}")
            if not isinstance(choice.get("text"), str):
                raise self.server.error(f"an output is no text but {type(choice.get('text')).__name__}")
        full = sum(choice["finish_reason"] == "length" for choice in choices)
        tokens, read = _count(answer, "completion_tokens"), _count(answer, "prompt_tokens")
        if not full * most + n - full <= tokens <= n * most:       # one that ends has at least its end
            raise self.server.error(f"counts {tokens} tokens in {n} outputs, {full} of them cut at {most}")
        if read != len(body["prompt"]):
            raise self.server.error(f"has read {read} tokens of a prompt of {len(body['prompt'])}")
        return [choice["text"] for choice in choices], tokens


def _count(answer: dict, key: str) -> int:
    """A number of tokens in an answer; -1 where there is none."""
    usage = answer.get("usage")
    number = usage.get(key) if isinstance(usage, dict) else None
    return number if type(number) is int else -1


# ---------------------------------------------------------- 8. the tiny base model, cold start, and the command

_TINY_TOKEN = r"</?reasoning>|\n *| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]"


def tiny_tokenizer(texts: list[str]):
    """A word-level tokenizer whose words are all that occur in `texts`, digits one by one, leading space included, so
    that decoding restores the text exactly."""
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
    """A randomly initialised decoder of the Llama architecture; head and embedding are tied. (Not Qwen2: for that
    model type transformers 5 replaces whatever tokenizer the folder holds by Qwen2's own, without a word. And not
    the usual initial spread of 0.02, with which so narrow a model takes several times as long to learn to copy.)"""
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * hidden, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=None, eos_token_id=1, pad_token_id=0))


def base_sequence(tokenizer, example: data.BaseExample) -> tuple[list[int], list[int]]:
    """(ids, labels) of one base training sequence. labels[t] is the token to predict after ids[t], or IGNORE. The
    problem's own text is learned too: its repeated names teach the model to copy, long before arithmetic does.

    Planner and executor share the sequence. After `</reasoning>` the planner has to stop, while the sequence goes on
    with the executor's prompt: so the label there is EOS although the next input token is not."""
    encode = lambda text: tokenizer(text)["input_ids"] if text else []
    eos = tokenizer.eos_token_id
    prompt, trace, ask, answer = map(encode, (example.prompt, example.trace, example.ask, example.answer))
    ids = prompt + trace + ask + answer
    labels = [IGNORE] * (len(ids) - len(answer) - 1) + answer + [eos]
    text = len(encode(example.prompt.partition("\n")[0]))
    labels[:text - 1] = ids[1:text]
    if example.learn_trace:
        labels[len(prompt) - 1:len(prompt) + len(trace)] = trace + [eos]
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"a word of {example} is not in the tiny vocabulary")
    return ids, labels


@dataclass(frozen=True)
class BaseSettings:
    """Settings of `python executor.py`."""
    run_dir: str = knob("runs/tiny-math", "run folder; holds groups/", affects_result=False)
    model: str = knob("", "Hugging Face folder or name, for planner and executor; empty: train the tiny base model")
    chat_template_kwargs: str = knob("", "arguments of the model's chat template for all prompts of the run, a JSON "
                                         "object such as '{\"enable_thinking\": false}'")
    cold_start: int = knob(0, "train the model on the reference traces of this many training groups first, in both "
                              "roles; 0: take it as it is", low=0)
    cold_epochs: float = knob(1.0, "of the cold start, at most; the held-out loss may stop it", above=0)
    cold_learning_rate: float = knob(1e-4, "peak of the cold start, AdamW", above=0)
    checkpointing: int = knob(0, "1: recompute activations in the cold start, for memory", choices=(0, 1),
                              affects_result=False)
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one", affects_result=False)
    hidden: int = knob(128, "width of the tiny model; a multiple of 8", low=8)
    layers: int = knob(4, "depth of the tiny model", low=1)
    sequences: int = knob(52000, "of the tiny corpus, one problem each, one epoch", low=1)
    batch_size: int = knob(16, "sequences per step, also of the cold start", low=1)
    learning_rate: float = knob(2e-3, "peak of the tiny model, AdamW", above=0)
    warmup: int = knob(100, "steps of linear warm-up, also of the cold start; then linear decay to 0", low=0)
    seed: int = knob(0, "corpus, initial weights, order, executor runs of the check")
    eval_problems: int = knob(300, "held-out problems for the check at the end", low=1)
    executor_temperature: float = knob(0.7, "of the executor in the check", low=0)
    max_answer_tokens: int = knob(64, "longest executor output in the check", low=1)
    max_cache_gib: float = knob(CACHE_GIB, "keys and values of one decoding batch, in GiB", above=0,
                                affects_result=False)


def role_sequence(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """(ids, labels) of one turn: the prompt as it will be encoded when a model is asked, no loss on it; loss on the
    completion and on the token that ends it."""
    ids = data.encode_prompt(tokenizer, prompt)
    labels = [IGNORE] * (len(ids) - 1)
    learned = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids + learned[:-1], labels + learned


ALONE = 0.12                                      # of the executor's examples are without a trace


def cold_sequences(tokenizer, problem: Problem, seed: int) -> list[tuple[list[int], list[int]]]:
    """What a model learns of one problem before it becomes planner and frozen executor: to write the reference trace,
    whose last result is hidden, and to finish it. Now and then the executor has no trace, since without one it must
    answer in the same form."""
    trace = problem.reference_reasoning
    if problem.task_type == "code":
        answer = f"```python\n{problem.reference_solution}\n```"
    else:
        answer = f"#### {verify.extract_answer(problem.reference_solution)}"
    alone = random.Random(f"{seed} {problem.problem_id}").random() < ALONE
    return [role_sequence(tokenizer, data.planner_prompt(problem), data.OPEN + trace + data.CLOSE),
            role_sequence(tokenizer, data.executor_prompt(problem, None if alone else trace), answer)]


def cold_start(s: BaseSettings, arguments: dict, folder: Path) -> None:
    """Trains the given model on the first --cold_start training groups, but for a twentieth of them (50 at most),
    whose loss says when to stop; saves it as a Hugging Face folder, in float32, and cold_start.json. UserError for a
    group without a reference trace or an answer, and for one that exceeds the context."""
    path = Path(s.run_dir) / "groups" / "train.jsonl"
    problems = data.read_problems(path, need_tests=False)[:s.cold_start]
    if len(problems) < s.cold_start:
        raise UserError(f"--cold_start {s.cold_start}: {path} holds {len(problems)} groups; lower it")
    model, tokenizer = load(s.model, pick_device(s.device), torch.float32)
    set_template_arguments(tokenizer, arguments)
    learned = []
    for problem in problems:
        where = f"{path}: group {problem.problem_id}"
        if problem.reference_reasoning is None:
            raise UserError(f"{where} has no reference trace (positive_pool), which --cold_start learns from; leave "
                            "--cold_start out, or use groups with traces")
        if problem.task_type == "math" and verify.extract_answer(problem.reference_solution) is None:
            raise UserError(f"{where}: reference_solution has no final answer; mend it, or leave --cold_start out")
        learned.append(cold_sequences(tokenizer, problem, s.seed))
        longest = max(len(ids) for ids, _ in learned[-1])
        if longest > context_of(model):
            raise UserError(f"{where}: problem, trace and answer are {longest} tokens, the model's context is "
                            f"{context_of(model)}; leave the group out, or lower --cold_start")
    held = min(50, len(learned) // 20)
    train, heldout = ([sequence for pair in part for sequence in pair] for part in (learned[held:], learned[:held]))
    check_warmup(s, s.cold_epochs * len(train))
    checkpoint = folder / "checkpoint.pt"
    loss = finetune(model, train, heldout=heldout, epochs=s.cold_epochs, batch_size=s.batch_size,
                    learning_rate=s.cold_learning_rate, warmup=s.warmup, seed=s.seed, pad_id=pad_id(tokenizer),
                    title="cold start", checkpointing=bool(s.checkpointing), checkpoint=checkpoint)
    with saving(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    data.write_atomic(folder / "cold_start.json", json.dumps({
        "from": s.model, "groups": len(learned) - held, "heldout_groups": held, "train_loss": loss}, indent=1))
    checkpoint.unlink(missing_ok=True)


def check_warmup(s: BaseSettings, sequences: float) -> None:
    """UserError for a warm-up that somebody made longer than the training."""
    steps = max(1, round(sequences / s.batch_size))
    if s.warmup > steps and s.warmup != BaseSettings.warmup:
        raise UserError(f"--warmup {s.warmup} is longer than the training, {steps} steps; lower it")


def train_base(s: BaseSettings, heldout: list[Problem], folder: Path) -> float:
    """Trains the tiny base model from nothing and saves it as a Hugging Face folder. Returns the final loss."""
    check_warmup(s, s.sequences)
    if s.hidden % 8:
        raise UserError(f"--hidden {s.hidden}: must be a multiple of 8, for 4 attention heads of even width")
    torch.manual_seed(s.seed)
    corpus = data.base_corpus(heldout[0].task_type, s.sequences, s.seed)
    tokenizer = tiny_tokenizer([e.prompt + e.trace + e.ask + e.answer for e in corpus])
    model = tiny_model(len(tokenizer), s.hidden, s.layers).to(pick_device(s.device))
    check_answers_fit(model, tokenizer, heldout, s.max_answer_tokens)
    sequences = [base_sequence(tokenizer, example) for example in corpus]
    loss = finetune(model, sequences, epochs=1, batch_size=s.batch_size, learning_rate=s.learning_rate,
                    warmup=s.warmup, seed=s.seed, pad_id=tokenizer.pad_token_id, title="base model")
    with saving(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return loss


def check_answers_fit(model, tokenizer, problems: list[Problem], new: int) -> None:
    """UserError, before anything is trained, for a problem that leaves no room for its answer."""
    for problem in problems:
        for trace in (None, problem.reference_reasoning):
            length = len(data.encode_prompt(tokenizer, data.executor_prompt(problem, trace)))
            if length + new > context_of(model):
                raise UserError(f"{problem.problem_id}: the executor's prompt of {length} tokens and --max_answer_tokens "
                                f"{new} exceed the model's context of {context_of(model)}; lower it, or leave the "
                                "problem out")


def template_arguments(s: BaseSettings) -> dict:
    """--chat_template_kwargs, checked on the model's own template. UserError for what it does not know."""
    if not s.chat_template_kwargs:
        return {}
    flag = f"--chat_template_kwargs {s.chat_template_kwargs}"
    try:
        arguments = json.loads(s.chat_template_kwargs)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"{flag}: no JSON object; give it as '{{\"enable_thinking\": false}}'")
    template = load_tokenizer(s.model).chat_template if s.model else None
    for name, value in arguments.items():
        if type(value) not in (bool, int, float, str) or not name.isidentifier():
            raise UserError(f"{flag}: {name} must be a name with true, false, a number or a text")
        if not isinstance(template, str) or name not in template:
            raise UserError(f"{flag}: the chat template of {s.model or 'the tiny world'} has no {name}; leave it out")
    return arguments


def make_base(s: BaseSettings, folder: Path) -> None:
    """Fills the stage folder: the tiny base model, or nothing for a pretrained one; and what its executor can do."""
    heldout = data.read_problems(Path(s.run_dir) / "groups" / "heldout.jsonl", need_tests=False)[:s.eval_problems]
    tiny = data.needs_base_model(heldout[0])
    if tiny and s.model:
        raise UserError(f"{s.run_dir}/groups are of the tiny world, whose prompts are bare problems: leave out --model")
    if not tiny and not s.model:
        raise UserError(f"{s.run_dir}/groups are not of the tiny world: give a pretrained model with --model")
    idle = {"with --model": ("hidden", "layers", "sequences", "learning_rate")} if s.model else {}
    if s.model and not s.cold_start:
        idle["with --model but no --cold_start"] = ("batch_size", "warmup")
    if not s.cold_start:
        idle["without --cold_start"] = ("cold_epochs", "cold_learning_rate", "checkpointing")
    if tiny:
        idle["in the tiny world, whose model is trained from nothing"] = ("cold_start",)
    for why, flags in idle.items():
        for flag in flags:
            if getattr(s, flag) != getattr(BaseSettings, flag):
                raise UserError(f"--{flag} has no effect {why}; leave it out")
    arguments = template_arguments(s)
    trained = tiny or s.cold_start > 0
    record = {"model": "." if trained else s.model, "problems": len(heldout), "chat_template_kwargs": arguments}
    if tiny:
        record["train_loss"] = train_base(s, heldout, folder)
    elif s.cold_start:
        if not (folder / "cold_start.json").exists():              # else it was stopped in the check below
            cold_start(s, arguments, folder)
    model, tokenizer = load(str(folder) if trained else s.model, pick_device(s.device), torch.float32 if tiny else None)
    set_template_arguments(tokenizer, arguments)
    check_answers_fit(model, tokenizer, heldout, s.max_answer_tokens)
    frozen = Executor(model, tokenizer, max_new_tokens=s.max_answer_tokens, temperature=s.executor_temperature,
                      seed=s.seed, max_cache_gib=s.max_cache_gib)
    record |= {"no_trace": None, "reference_trace": None}
    references = [p.reference_reasoning for p in heldout]
    if all(p.tests or p.task_type == "math" for p in heldout):     # groups for the reward model may have no tests
        record["no_trace"] = sum(frozen.success(heldout, None, 1)) / len(heldout)
        if None not in references:                                 # HumanEval and MBPP come without traces
            record["reference_trace"] = sum(frozen.success(heldout, references, 1, "base")) / len(heldout)
    data.write_atomic(folder / "base.json", json.dumps(record, indent=1))


def main(argv) -> None:
    """The command: the base model of a run, trained or checked, and what its executor can do."""
    s = data.parse_settings(BaseSettings, argv, "executor.py")
    base = Path(s.run_dir) / "base"
    read = ["groups/heldout.jsonl"] + (["groups/train.jsonl"] if s.cold_start else [])
    with data.stage_folder(base, s, data.fingerprints(s.run_dir, *read)) as folder:
        if folder is not None:
            make_base(s, folder)
    record = data.read_json(base / "base.json", f"delete {base} and give the same command again", "model", "problems",
                            "no_trace", "reference_trace")
    print(f"{base}/base.json: {record['model']}; executor success on {record['problems']} held-out problems:")
    for key in ("no_trace", "reference_trace"):
        print(f"  {key.replace('_', ' ')}: " + ("not measured" if record[key] is None else f"{record[key]:.2f}"))
    print(f"next: python rm.py --run_dir {s.run_dir}")


if __name__ == "__main__":
    data.run_command(main)
