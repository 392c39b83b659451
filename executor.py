"""Models and decoding: load or train a causal LM, sample from it with a KV cache, run it as the frozen executor.

The executor turns problem + trace (or the problem alone) into an artifact, an answer or a program, that verify.py
judges. It never learns: uplift = success with a trace - success without is measured with the same weights from the
first training step to the last.

Shapes: B rows, T tokens, V vocabulary, N prompts, S samples per prompt, K executor runs.

    python executor.py --preset tiny --run runs/tiny-math                     # trains the tiny base model
    python executor.py --preset gsm8k --run runs/gsm8k-math --model Qwen/Qwen2.5-0.5B-Instruct

Left out: paged caches, captured graphs, several GPUs. Decoding is a plain loop that a reader can step through.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import data
import verify
from data import Problem, UserError, knob

# ------------------------------------------------------------------------------------------------ models


def pick_device(device: str = "") -> torch.device:
    """The named device, or CUDA when there is one, else the CPU. UserError for one that is not there."""
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used ({_first_line(error)})") from None


def load(path_or_name: str, device=None, dtype=None):
    """(model, tokenizer) of any Hugging Face causal LM, a local folder or a name on the hub. Default dtype: bfloat16
    on CUDA, float32 elsewhere. UserError for what is missing: weights, tokenizer, EOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()                                 # one bar per loaded tensor tells nobody anything
    device = pick_device() if device is None else torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{path_or_name}: no tokenizer can be loaded ({_first_line(error)}); --model must be a Hugging "
                        "Face folder with tokenizer.json, or a name on a hub that can be reached") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path_or_name}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path_or_name, dtype=dtype, attn_implementation="sdpa",
                                                             output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path_or_name}: no causal LM can be loaded ({_first_line(error)}); the folder must hold "
                        "config.json and model.safetensors") from None
    if report["missing_keys"]:                                     # transformers would initialise them at random
        raise UserError(f"{path_or_name}: the weights lack {sorted(report['missing_keys'])[0]}; the file is incomplete")
    return model.to(device).eval(), tokenizer


def _first_line(error) -> str:
    return str(error).strip().split("\n")[0][:200]


def freeze(model):
    """The model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def token_hidden(model, ids: torch.Tensor, select: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states (M, H) at the selected positions. ids (B, T), select (B, T) bool. Right padding needs no mask
    under causal attention."""
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[select]


def token_logits(model, ids: torch.Tensor, select: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (M, V) at the selected positions only: the vocabulary is the widest part of a small model, and most
    positions are prompt. Arguments of `token_hidden`."""
    return model.get_output_embeddings()(token_hidden(model, ids, select, mask))


def check_head(model) -> None:
    """UserError for a model whose logits are not its head applied to its last hidden state (Gemma 2 and Granite scale
    or cap them): `token_logits` would score another distribution than the one that was sampled."""
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        full = model(input_ids=ids).logits[0].float()
        ours = token_logits(model, ids, torch.ones_like(ids).bool()).float()
    if not torch.allclose(full, ours, rtol=1e-3, atol=1e-3 * float(full.abs().max())):
        raise UserError(f"{model.config.model_type} models change the logits after their head; train another kind")


def pad(rows: list[list[int]], value: int, device, left: bool = False) -> torch.Tensor:
    """(B, longest) from lists of ids."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill)], device=device)


# ------------------------------------------------------------------------------------------------ decoding

@dataclass
class Completions:
    """Samples in prompt-major order: sample s of prompt n is number n * num_samples + s."""
    tokens: list[list[int]]                      # EOS included when it was sampled
    logprobs: list[list[float]]                  # of each token, under the sampling temperature, before top-p
    finished: list[bool]                         # EOS was sampled before max_new_tokens


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token and its log-prob for each row of logits (B, V). Temperature 0 takes the most likely token and
    reports its log-prob at temperature 1."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1)
    else:
        probs = logp.exp()
        if top_p < 1:
            ordered, index = probs.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0      # the first token always stays
            probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
        token = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, num_samples: int = 1, max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 1.0, eos_id: int, pad_id: int, generator=None,
             max_cache_tokens: int = 65536) -> Completions:
    """Samples `num_samples` completions of each prompt (lists of token ids) with a KV cache.

    Prompts are sorted by length and decoded in batches whose cache stays under `max_cache_tokens` positions.
    Reproducible from `generator` (of the model's device). UserError when a prompt and its completion do not fit the
    model's context."""
    if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"num_samples {num_samples} and max_new_tokens {max_new_tokens} must be >= 1, temperature "
                         f"{temperature} >= 0, top_p {top_p} in (0, 1]")
    if any(not prompt for prompt in prompts):
        raise ValueError("prompts: every prompt needs at least one token")
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if context and longest + max_new_tokens > context:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
                        f"{context}; shorten the problems or lower max_new_tokens")
    total = len(prompts) * num_samples
    result = Completions([[] for _ in range(total)], [[] for _ in range(total)], [False] * total)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    while order:
        width = len(prompts[order[0]]) + max_new_tokens
        batch = order[:max(1, max_cache_tokens // (width * num_samples))]
        order = order[len(batch):]
        rows = [n * num_samples + s for n in batch for s in range(num_samples)]
        _decode(model, [prompts[n] for n in batch], rows, result, num_samples, max_new_tokens, temperature, top_p,
                eos_id, pad_id, generator)
    return result


def _decode(model, prompts, rows, result, num_samples, max_new_tokens, temperature, top_p, eos_id, pad_id, generator):
    """One batch: `rows[i]` is the place in `result` of batch row i."""
    from transformers import DynamicCache
    device = model.get_input_embeddings().weight.device
    ids = pad(prompts, pad_id, device, left=True)                                     # (N, T)
    length = torch.tensor([len(p) for p in prompts], device=device)
    mask = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - length[:, None]).long()
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                   logits_to_keep=1).logits[:, -1]                                    # one prefill per prompt
    if num_samples > 1:                                                               # then S rows per prompt
        cache.batch_repeat_interleave(num_samples)
        logits, mask, length = (x.repeat_interleave(num_samples, dim=0) for x in (logits, mask, length))
    for step in range(max_new_tokens):
        token, logp = sample(logits, temperature, top_p, generator)
        alive = []
        for i, (row, t, lp) in enumerate(zip(rows, token.tolist(), logp.tolist())):
            result.tokens[row].append(t)
            result.logprobs[row].append(lp)
            if t == eos_id:
                result.finished[row] = True
            else:
                alive.append(i)
        if not alive or step == max_new_tokens - 1:
            return
        if len(alive) < len(rows):                                                    # finished rows leave the batch
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            rows, token, mask, length = [rows[i] for i in alive], token[keep], mask[keep], length[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=(length + step)[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]


# ------------------------------------------------------------------------------------------------ the frozen executor

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
    sandbox are raised, never scored."""

    def __init__(self, model, tokenizer, *, max_new_tokens: int, temperature: float = 0.7, top_p: float = 1.0,
                 exec_score: str = "binary", generator=None):
        self.model, self.tokenizer, self.generator = freeze(model), tokenizer, generator
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.exec_score = exec_score
        self.spent = {"executor_prompt_tokens": 0, "executor_tokens": 0, "program_runs": 0}
        self._baseline: dict[tuple[str, int], int] = {}

    def run(self, problems: list[Problem], traces: list[str] | None, repeats: int) -> list[list[Run]]:
        """`repeats` independent runs for every problem with its trace (None: without). [problem][repeat]."""
        traces = traces if traces is not None else [None] * len(problems)
        if len(traces) != len(problems):
            raise ValueError(f"traces: {len(traces)} for {len(problems)} problems, must be one each")
        if not problems:
            return []
        prompts = [data.encode_prompt(self.tokenizer, data.executor_prompt(p, t)) for p, t in zip(problems, traces)]
        completions = generate(self.model, prompts, num_samples=repeats, max_new_tokens=self.max_new_tokens,
                               temperature=self.temperature, top_p=self.top_p, eos_id=self.tokenizer.eos_token_id,
                               pad_id=pad_id(self.tokenizer), generator=self.generator)
        self.spent["executor_prompt_tokens"] += sum(map(len, prompts))
        self.spent["executor_tokens"] += sum(map(len, completions.tokens))
        outputs = self.tokenizer.batch_decode(completions.tokens, skip_special_tokens=True)
        repeated = [p for p in problems for _ in range(repeats)]
        runs = self._judge(repeated, outputs)
        return [runs[i:i + repeats] for i in range(0, len(runs), repeats)]

    def _judge(self, problems, outputs) -> list[Run]:
        runs: list = [None] * len(outputs)
        programs = [i for i, p in enumerate(problems) if p.task_type == "code"]
        verdicts = verify.run_programs([verify.extract_code(outputs[i]) for i in programs],
                                       [problems[i].tests for i in programs]) if programs else []
        self.spent["program_runs"] += len(programs)
        for i, verdict in zip(programs, verdicts):
            runs[i] = Run(outputs[i], verdict.ok, verify.exec_score(verdict, self.exec_score))
        for i, problem in enumerate(problems):
            if problem.task_type == "math":
                ok = verify.math_equal(verify.extract_answer(outputs[i]), problem.reference_solution)
                runs[i] = Run(outputs[i], ok, float(ok))
        return runs

    def state(self) -> dict:
        """What a checkpoint needs: the baselines measured so far and the costs."""
        return {"baseline": dict(self._baseline), "spent": dict(self.spent)}

    def load_state(self, state: dict) -> None:
        """Restores `state`."""
        self._baseline, self.spent = dict(state["baseline"]), dict(state["spent"])

    def success(self, problems: list[Problem], traces: list[str] | None, repeats: int) -> list[int]:
        """How many of `repeats` runs succeed, for every problem."""
        return [sum(run.ok for run in runs) for runs in self.run(problems, traces, repeats)]

    def baseline(self, problems: list[Problem], repeats: int) -> list[int]:
        """`success` without a trace. The executor is frozen, so one measurement per problem serves its whole group
        and all later steps."""
        new = {p.problem_id: p for p in problems if (p.problem_id, repeats) not in self._baseline}
        for problem, count in zip(new.values(), self.success(list(new.values()), None, repeats) if new else []):
            self._baseline[problem.problem_id, repeats] = count
        return [self._baseline[p.problem_id, repeats] for p in problems]


def pad_id(tokenizer) -> int:
    """The id to pad with; masks never look at it, so EOS serves where there is no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


# ------------------------------------------------------------------------------------------------ the tiny base model

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


IGNORE = -100


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


def schedule(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to 0 over `total` steps."""
    return min((step + 1) / max(1, warmup), (total - step) / max(1, total - warmup))


def sequence_loss(model, rows: list[tuple[list[int], list[int]]], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy of the labels of some (ids, labels)."""
    device = model.get_input_embeddings().weight.device
    ids, labels = pad([r[0] for r in rows], pad_id, device), pad([r[1] for r in rows], IGNORE, device)
    learn = labels != IGNORE
    return F.cross_entropy(token_logits(model, ids, learn).float(), labels[learn])


@torch.no_grad()
def heldout_loss(model, sequences, *, batch_size: int, pad_id: int) -> float:
    """Mean over batches of `sequence_loss`, without learning."""
    model.eval()
    batches = [sequences[i:i + batch_size] for i in range(0, len(sequences), batch_size)]
    return sum(sequence_loss(model, batch, pad_id).item() for batch in batches) / len(batches)


def finetune(model, sequences: list[tuple[list[int], list[int]]], *, epochs: float, batch_size: int,
             learning_rate: float, warmup: int, seed: int, pad_id: int, title: str = "finetune", heldout=()) -> float:
    """Supervised training on (ids, labels); labels[t] is what follows ids[t], IGNORE where there is no loss.
    Batches hold sequences of similar length. Learning rate: linear warm-up, then linear decay to 0. With `heldout`
    sequences their loss is measured at the start and ten times on the way; two measurements without a new minimum end
    the training early, and the model keeps the weights of the minimum. Returns the mean loss of the last tenth."""
    if not sequences:
        raise ValueError("sequences: there must be at least one")
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total, losses, batches, best, since = max(1, round(len(sequences) * epochs / batch_size)), [], [], None, 0
    bar = tqdm(range(total + 1 if heldout else total), desc=title, mininterval=5)
    for step in bar:
        if heldout and (step % max(1, total // 10) == 0 or step == total):
            held, since = heldout_loss(model, heldout, batch_size=batch_size, pad_id=pad_id), since + 1
            if best is None or held < best:
                best, since, weights = held, 0, {k: v.clone() for k, v in model.state_dict().items()}
            if since == 2 or step == total:
                model.load_state_dict(weights)
                break
        model.train()
        if not batches:                                            # shuffle, sort windows by length, cut, shuffle
            order, window = rng.sample(range(len(sequences)), len(sequences)), 32 * batch_size
            for i in range(0, len(order), window):
                part = sorted(order[i:i + window], key=lambda j: len(sequences[j][0]))
                batches += [part[k:k + batch_size] for k in range(0, len(part), batch_size)]
            rng.shuffle(batches)
        loss = sequence_loss(model, [sequences[j] for j in batches.pop()], pad_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, total, warmup)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    model.eval()
    last = losses[-max(1, total // 10):]
    return sum(last) / len(last)


# ------------------------------------------------------------------------------------------------ command

@dataclass(frozen=True)
class BaseSettings:
    """Settings of `python executor.py`."""
    run: str = knob("runs/tiny-math", "run folder; holds groups/")
    preset: str = knob("tiny", "named defaults")
    model: str = knob("", "Hugging Face folder or name, for planner and executor; empty: train the tiny base model")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    hidden: int = knob(128, "width of the tiny model; a multiple of 8", low=8)
    layers: int = knob(4, "depth of the tiny model", low=1)
    sequences: int = knob(52000, "of the tiny corpus, one problem each, one epoch", low=1)
    batch_size: int = knob(16, "sequences per step", low=1)
    learning_rate: float = knob(2e-3, "peak, AdamW", above=0)
    warmup: int = knob(100, "steps of linear warm-up; then linear decay to 0", low=0)
    seed: int = knob(0, "corpus, initial weights, order")
    eval_problems: int = knob(300, "held-out problems for the check at the end", low=1)
    executor_temperature: float = knob(0.7, "of the executor in the check", low=0)
    max_answer_tokens: int = knob(64, "longest executor output in the check", low=1)


PRESETS = {"tiny": {}, "smoke": {"sequences": 640, "hidden": 64, "layers": 2, "eval_problems": 16},
           "gsm8k": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "eval_problems": 100, "max_answer_tokens": 256}}


def base_of(run) -> str:
    """The base model of a run, planner and executor in one: the folder or name that `python executor.py` recorded."""
    path = Path(run) / "base.json"
    if not path.is_file():
        raise UserError(f"{path}: no base model yet; run python executor.py --run {run} first")
    try:
        model = json.loads(path.read_text())["model"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it and run python executor.py again") from None
    return str(Path(run) / "base") if model == "base" else model


def train_base(settings: BaseSettings, task_type: str, folder: Path) -> float:
    """Trains the tiny base model from nothing and saves it as a Hugging Face folder. Returns the final loss."""
    if settings.hidden % 8:
        raise UserError(f"--hidden {settings.hidden}: must be a multiple of 8, for 4 attention heads of even width")
    torch.manual_seed(settings.seed)
    corpus = data.base_corpus(task_type, settings.sequences, settings.seed)
    tokenizer = tiny_tokenizer([e.prompt + e.trace + e.ask + e.answer for e in corpus])
    model = tiny_model(len(tokenizer), settings.hidden, settings.layers).to(pick_device(settings.device))
    loss = finetune(model, [base_sequence(tokenizer, e) for e in corpus], epochs=1, batch_size=settings.batch_size,
                    learning_rate=settings.learning_rate, warmup=settings.warmup, seed=settings.seed,
                    pad_id=tokenizer.pad_token_id, title="base model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def main(argv) -> None:
    """The command: the base model of a run, trained or checked, and what its executor can do."""
    settings = data.parse_settings(BaseSettings, PRESETS, argv, "executor.py")
    run = Path(settings.run)
    if data.begin_stage(run, "base", settings, run / "base.json"):
        heldout = data.read_problems(run / "groups" / "heldout.jsonl")[:settings.eval_problems]
        record = {"model": settings.model or "base", "problems": len(heldout)}
        if not settings.model:
            if {p.source for p in heldout} != {"tiny"}:
                raise UserError(f"{run}/groups are not of the tiny world: give a pretrained model with --model")
            record["train_loss"] = train_base(settings, heldout[0].task_type, run / "base")
        device = pick_device(settings.device)
        model, tokenizer = load(settings.model or str(run / "base"), device)
        frozen = Executor(model, tokenizer, max_new_tokens=settings.max_answer_tokens,
                          temperature=settings.executor_temperature,
                          generator=torch.Generator(device).manual_seed(settings.seed))
        for key, traces in (("no_trace", None), ("reference_trace", [p.reference_reasoning for p in heldout])):
            record[key] = sum(frozen.success(heldout, traces, 1)) / len(heldout)
        data.record_stage(run, "base", settings)
        data.write_atomic(run / "base.json", json.dumps(record, indent=1))
    record = json.loads((run / "base.json").read_text())
    print(f"{run}/base.json: {record['model']}, executor success on {record['problems']} held-out problems "
          f"{record['no_trace']:.2f} without a trace, {record['reference_trace']:.2f} with the reference trace")
    print(f"next: python rm.py --preset {settings.preset} --run {settings.run}")


if __name__ == "__main__":
    data.run_command(main)
