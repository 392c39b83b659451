"""Models and decoding: load or train a causal LM, sample from it with a KV cache, run it as the frozen executor.

The executor turns problem + trace (or the problem alone) into an artifact, an answer or a program, that verify.py
judges. It never learns: uplift = success with a trace - success without is measured with the same weights from the
first training step to the last.

Shapes: B rows, T tokens, V vocabulary, N prompts, S samples per prompt, K executor runs.

    python executor.py --preset tiny --run runs/tiny-math                     # trains the tiny base model
    python executor.py --preset gsm8k --run runs/gsm8k-math --model Qwen/Qwen2.5-0.5B-Instruct

    python executor.py bench --model FOLDER                                   # our decoder beside transformers' own;
                                                                              # settings: bench --help

Left out: paged caches, a pool of rows that new prompts join, several GPUs. Decoding is a plain loop that a reader can
step through; CUDA graphs only replay one step of it.
"""

import json
import math
import os
import random
import re
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import verify
from data import Problem, UserError, knob

# ------------------------------------------------------------------------------------------------ models


def pick_device(device: str = "") -> torch.device:
    """The named device, or CUDA when there is one, else the CPU. UserError for one that is not there."""
    try:
        found = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used ({_first_line(error)})") from None
    if found.type == "cuda":
        torch.cuda.set_device(found)                               # streams and graphs go to the current device
    return found


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
    model = model.to(device).eval()
    check_decoding(model, path_or_name)
    return model, tokenizer


def check_decoding(model, name: str) -> None:
    """UserError for a model that our cache does not fit, or whose answer depends on the padding beside a prompt: a
    padded row in a cache is compared with the same tokens alone."""
    table = model.get_input_embeddings().weight
    ids, device = [(len(table) // 2 + i) % len(table) for i in range(8)], table.device    # the first are often reserved
    cache = Cache(2, 10, device)
    try:
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids[:4]], device=device)).logits[0, 2:].float()            # (2, V)
            first = cache.prefill(model, [ids, ids[:3]], 0, 1, 8, worth=99, limit=99)[1]
            cache.token[:], cache.slot[:], cache.position[:, 0] = ids[3], 8, torch.tensor([8, 3])
            cache.visible[:, 8] = True
            padded = torch.stack([first, cache.step(model, 2, 9)[1]]).float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{name}: {model.config.model_type} models cannot be decoded here "
                        f"({_first_line(error)})") from error
    if not torch.isfinite(alone).all():
        raise UserError(f"{name}: the logits are not finite; the weights are damaged, or too large for {model.dtype}")
    slack = (1e-3 if model.dtype == torch.float32 else 0.2) * float(alone.abs().max())
    if not torch.allclose(alone, padded, rtol=0, atol=slack):
        raise UserError(f"{name}: the logits of a padded row differ by {float((alone - padded).abs().max()):.2g} from "
                        f"those of the row alone; {model.config.model_type} models mask padding wrongly")


def _first_line(error) -> str:
    return str(error).strip().split("\n")[0][:200]


def freeze(model):
    """The model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def without_dropout(model) -> None:
    """Sets every dropout of a model to 0, so that training mode, which checkpointing needs, computes what evaluation
    does: the policy that is scored has to be the one that was sampled."""
    for part in (model.config, *model.modules()):
        for key, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in key or key == "p" and isinstance(part, torch.nn.Dropout)):
                setattr(part, key, 0.0)


def token_hidden(model, ids: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    """Last hidden states (M, H) at the selected positions. ids (B, T), select (B, T) bool. Right padding needs no mask
    under causal attention."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[select]


def token_logits(model, ids: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    """Logits (M, V) at the selected positions only: the vocabulary is the widest part of a small model, and most
    positions are prompt. Arguments of `token_hidden`."""
    return model.get_output_embeddings()(token_hidden(model, ids, select))


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


# ------------------------------------------------------------------------------------------------ LoRA

class Lora:
    """A low-rank adapter (arXiv 2106.09685) on a frozen model: y = W x + alpha / rank * B A x, in which only A (rank,
    in) and B (out, rank) learn; B starts at 0. They are parameters of the linear layers themselves and a hook adds
    their part, so no name in the model changes; with the adapter off it is the model that it was, bit for bit."""

    def __init__(self, model, rank: int, alpha: float, targets=(), seed: int = 0):
        """`targets`: last names of the layers ("q_proj", ...); empty: every linear layer but the head."""
        self.model, self.rank, self.alpha, self.active = freeze(model), rank, alpha, True
        head, draw = model.get_output_embeddings(), torch.Generator().manual_seed(seed)
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
                       and layer is not head and (not targets or name.rpartition(".")[2] in targets)}
        self.targets = sorted({name.rpartition(".")[2] for name in self.layers})
        if not self.layers or set(targets) - set(self.targets):
            raise UserError(f"LoRA: {model.config.model_type} has no torch.nn.Linear layers "
                            f"{sorted(set(targets) - set(self.targets)) or ''}")
        for layer in self.layers.values():
            wide, device = layer.in_features, layer.weight.device
            A = (2 * torch.rand(rank, wide, generator=draw) - 1) / math.sqrt(wide)
            layer.lora_A = torch.nn.Parameter(A.to(device))
            layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
            layer.register_forward_hook(self._add)

    def _add(self, layer, inputs, output):
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A and B of every layer under the names that peft gives them."""
        return {f"base_model.model.{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").detach()
                for name, layer in self.layers.items() for x in "AB"}

    def save(self, folder, base: str) -> None:
        """The merged model as a plain Hugging Face folder, in the model's dtype (bfloat16 rounds small changes away);
        the exact adapter in its subfolder adapter/, for `load` and for peft."""
        merged = {name: x for name, x in self.model.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
        for name, layer in self.layers.items():
            delta = self.alpha / self.rank * layer.lora_B.detach() @ layer.lora_A.detach()
            merged[f"{name}.weight"] = (layer.weight + delta).to(layer.weight.dtype)
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
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
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


# ------------------------------------------------------------------------------------------------ decoding

@dataclass
class Completions:
    """Samples in prompt-major order: sample s of prompt n is number n * num_samples + s."""
    tokens: list[list[int]]                      # EOS included when it was sampled
    logprobs: list[list[float]]                  # of each token, under the sampling temperature, before top-p
    finished: list[bool]                         # EOS was sampled before max_new_tokens


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token and its log-prob for each row of logits (B, V). Temperature 0 takes the most likely token and
    reports its log-prob at temperature 1. On CUDA only top_p < 1 makes the host wait."""
    logits = logits.float() / (temperature or 1.0)
    weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()                       # probabilities times `total`
    total = weight.sum(dim=-1, keepdim=True)
    if temperature == 0:
        token = weight.argmax(dim=-1, keepdim=True)
    else:
        kept, index = weight, None
        if top_p < 1:                                      # mostly few tokens hold top_p of the mass: no sort of all
            kept, index = weight.topk(min(64, weight.shape[-1]), dim=-1)
            if (kept.sum(dim=-1, keepdim=True) < top_p * total).any():
                kept, index = weight.sort(dim=-1, descending=True)
            before = kept.cumsum(dim=-1) - kept
            kept = torch.where(before < top_p * total, kept, 0.0)                     # the first token always stays
        mass = kept.cumsum(dim=-1, dtype=torch.float64)    # CUDA adds in parallel: float32 sums would rise and fall
        point = torch.rand(len(mass), 1, device=mass.device, generator=generator) * mass[:, -1:]      # below the end
        token = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[-1] - 1)
        token = token if index is None else index.gather(-1, token)
    return token.squeeze(-1), (weight.gather(-1, token) / total).log().squeeze(-1)


class Cache:
    """The memory of one batch: R rows of L preallocated slots. Prompts end side by side, new tokens follow. A forward
    pass stores its keys and values through `update`, which transformers' attention calls."""

    def __init__(self, rows: int, slots: int, device, store: dict | None = None, room: int = 0):
        """`store` holds keys and values, `room` slots in all, of caches that are used one after the other."""
        self.layers, self.graphs = [], {}
        self.store, self.room = {} if store is None else store, max(room, rows * slots)
        self.visible = torch.zeros(rows, slots, dtype=torch.bool, device=device)      # slots that hold a row's tokens
        self.token, self.position = torch.zeros(2, rows, 1, dtype=torch.long, device=device)      # the step's input
        self.slot = torch.zeros(1, dtype=torch.long, device=device)                   # where the step is stored

    def update(self, keys, values, layer: int, *_, **__):
        """Stores keys and values (B, H, T, D) of one layer; returns all that the pass may look at, (B, H, width, D)."""
        if layer == len(self.layers):                                                 # zeros, since 0 * NaN is NaN
            (R, L), (H, D) = self.visible.shape, (keys.shape[1], keys.shape[3])
            for which in "keys", "values":
                if (layer, which) not in self.store:
                    self.store[layer, which] = values.new_zeros(self.room * H * D)
            self.layers.append([self.store[layer, which][:R * L * H * D].view(R, H, L, D)
                                for which in ("keys", "values")])
        seen = []
        for store, new in zip(self.layers[layer], (keys, values)):
            part = store[self.rows].unflatten(0, (len(new), -1))                      # (B, copies, H, L, D), a view
            new = new[:, None].to(part.dtype)                                         # keys can be wider under autocast
            part.index_copy_(3, self.at, new.expand_as(part[:, :, :, :new.shape[3]]))
            seen.append(part[:, 0, :, :self.width])
        return seen

    def get_seq_length(self, *_) -> int:
        return self.width

    def read(self, model, ids, position, rows: slice, at, width: int) -> torch.Tensor:
        """Logits (B, V) after ids (B, T), which are stored in the slots `at` of `rows`, the same number of adjacent
        rows for each sequence. They see the first `width` slots, as far as visible and not after their own."""
        self.rows, self.at, self.width = rows, at, width
        slots, visible = torch.arange(width, device=at.device), self.visible[rows].unflatten(0, (len(ids), -1))[:, 0]
        mask = visible[:, None, None, :width] & (slots <= at[:, None]) | (slots == at[:, None])   # (B, 1, T, width)
        return model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=self, use_cache=True,
                     logits_to_keep=1).logits[:, -1]

    def prefill(self, model, prompts: list[list[int]], first: int, copies: int, end: int, worth: int, limit: int):
        """Reads prompts (longest first) into the rows from `first` on, `copies` rows each, so that they end before slot
        `end`; about `limit` tokens a pass, and the common beginning once where that saves `worth` tokens. Returns the
        logits (B, V) of what follows."""
        device, start, logits = self.slot.device, end - len(prompts[0]), []
        P, slots = shared(*prompts), torch.arange(end, device=device)
        P = P if P * (len(prompts) - 1) >= worth else 0
        if P:
            rows, at = slice(first, first + len(prompts) * copies), slots[start:start + P]
            self.visible[rows, start:start + P] = True
            self.read(model, torch.tensor([prompts[0][:P]], device=device), slots[None, :P], rows, at, start + P)
        while prompts:
            size = max(1, limit // (len(prompts[0]) - P))
            part, prompts = prompts[:size], prompts[size:]
            ids = pad([prompt[P:] for prompt in part], 0, device, left=True)          # (b, W)
            length = torch.tensor([[len(prompt)] for prompt in part], device=device)
            rows, at = slice(first, first + len(part) * copies), slots[end - ids.shape[1]:]
            own = (slots >= end - length + P) | (slots >= start) & (slots < start + P)           # (b, end)
            self.visible[rows, :end] = own.repeat_interleave(copies, dim=0)
            logits.append(self.read(model, ids, (at - end + length).clamp(min=0), rows, at, end))
            first = rows.stop
        return torch.cat(logits)

    def step(self, model, rows: int, width: int) -> torch.Tensor:
        """Logits (rows, V) after the next token of each row. With static shapes (all slots are read) the launches of a
        step are captured on CUDA once per number of rows and then replayed; not under autocast, whose casts of the
        weights would be replayed too, out of date."""
        run = lambda: self.read(model, self.token[:rows], self.position[:rows], slice(0, rows), self.slot, width)
        if not self.slot.is_cuda or width < self.visible.shape[1] or torch.is_autocast_enabled("cuda"):
            return run()
        if rows not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                                           # a step may be run again
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = self.store.setdefault("pool", torch.cuda.graph_pool_handle())      # logits are read before the next
            with torch.cuda.graph(graph, pool=pool):
                self.graphs[rows] = graph, run()
        graph, logits = self.graphs[rows]
        graph.replay()
        return logits

    def keep(self, order: torch.Tensor) -> None:
        """Row order[i] becomes row i."""
        for x in (self.visible, self.position, *(x for layer in self.layers for x in layer)):
            x[:len(order)] = x[order]


CACHE = 65536                                     # tokens of keys and values in one batch
LIMIT = 1024, 16384                               # tokens in one pass of the prefill, on the CPU and on CUDA
WORTH = 128, 4096                                 # tokens that a common beginning must save to deserve its own pass


def shared(*prompts: list[int]) -> int:
    """How many first tokens the prompts have in common, leaving each at least one of its own."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def _chunks(prompts, worth: int, fits) -> list[list[int]]:
    """Numbers of the prompts in lists, longest first: those whose common beginning saves `worth` tokens, and all the
    others. n prompts of at most `end` tokens make a list where fits(n, end)."""
    common = lambda run: shared(prompts[run[0]], prompts[run[-1]])                    # of all, since they are sorted
    saved = lambda run: common(run) * (len(run) - 1)
    runs, chunks = [], []
    for n in sorted(range(len(prompts)), key=lambda n: prompts[n]):
        longer = runs[-1] + [n] if runs else [n]
        if len(longer) > 1 and 3 * common(longer) >= len(prompts[n]) and saved(longer) >= saved(runs[-1]):
            runs[-1] = longer
        else:
            runs.append([n])
    rest = [n for run in runs if saved(run) < worth for n in run]
    for run in [rest] + [run for run in runs if saved(run) >= worth]:
        run.sort(key=lambda n: -len(prompts[n]))
        while run:
            size = next((n for n in range(len(run), 1, -1) if fits(n, len(prompts[run[0]]))), 1)
            chunks.append(run[:size])
            run = run[size:]
    return sorted(chunks, key=lambda chunk: -len(prompts[chunk[0]]))


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, num_samples: int = 1, max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 1.0, eos_id: int, pad_id: int = 0, generator=None,
             max_cache_tokens: int = CACHE, memory: dict | None = None) -> Completions:
    """Samples `num_samples` completions of each prompt (lists of token ids) with a KV cache.

    Prompts are decoded in batches whose cache stays under `max_cache_tokens` positions, if that is enough for one
    prompt. With `memory`, a dict that the caller keeps for one model in one precision, shapes are padded to a few, so
    that batches and calls share keys, values and, on CUDA, captured graphs; clear it to free them. Reproducible from
    `generator` (of the model's device). `pad_id` is of no consequence: no mask lets padding be seen. UserError when a
    prompt and its completion do not fit the context, or the cache the memory; FloatingPointError for logits that are
    not finite."""
    if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"num_samples {num_samples} and max_new_tokens {max_new_tokens} must be >= 1, temperature "
                         f"{temperature} >= 0, top_p {top_p} in (0, 1]")
    if any(not prompt for prompt in prompts):
        raise ValueError("prompts: every prompt needs at least one token")
    limits = [getattr(model.config, key, None) for key in ("max_position_embeddings", "sliding_window")]
    longest, context = max(map(len, prompts), default=0), min(filter(None, limits), default=0)
    if context and longest + max_new_tokens > context:
        raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of "
                        f"{context}; shorten the problems or lower max_new_tokens")
    total, device = len(prompts) * num_samples, model.get_input_embeddings().weight.device
    result = Completions([[]] * total, [[]] * total, [False] * total)
    limit, worth = LIMIT[device.type == "cuda"], WORTH[device.type == "cuda"]
    static = memory is not None
    shape = lambda n, end: (_rows(n * num_samples), 128 * math.ceil((end + max_new_tokens) / 128)) if static else (
        n * num_samples, end + max_new_tokens)                                        # of the cache for n prompts
    fits = lambda n, end: math.prod(shape(n, end)) <= max_cache_tokens
    chunks = _chunks(prompts, worth, fits)
    while chunks:
        parts, end = chunks[:1], len(prompts[chunks[0][0]])
        while len(parts) < len(chunks) and fits(sum(map(len, chunks[:len(parts) + 1])), end):
            parts.append(chunks[len(parts)])
        chunks, batch = chunks[len(parts):], sum(parts, [])
        place = [n * num_samples + s for n in batch for s in range(num_samples)]      # in the result, of each row
        cache, logits = None, []                                                      # frees the last batch's cache
        cache = _allocate(model, shape(len(batch), end), memory, max_cache_tokens)
        for part in parts:
            logits.append(cache.prefill(model, [prompts[n] for n in part], num_samples * sum(map(len, logits)),
                                        num_samples, end, worth, limit))
        length = torch.tensor([len(prompts[n]) for n in batch], device=device)
        tokens, logprobs = _decode(model, cache, torch.cat(logits).repeat_interleave(num_samples, dim=0),
                                   length.repeat_interleave(num_samples), end, max_new_tokens, temperature, top_p,
                                   eos_id, generator, static)
        for i, row, logp in zip(place, tokens.tolist(), logprobs.tolist()):
            stop = row.index(eos_id) + 1 if eos_id in row else max_new_tokens
            result.tokens[i], result.logprobs[i], result.finished[i] = row[:stop], logp[:stop], eos_id in row
            if not all(map(math.isfinite, logp[:stop])):
                raise FloatingPointError(f"prompt {i // num_samples}: the model's logits are not finite; its weights "
                                         "are damaged, or too large for its dtype")
    return result


def _rows(count: int) -> int:
    """The next power of two, at least 8."""
    return max(8, 1 << (count - 1).bit_length())


def _allocate(model, shape: tuple[int, int], memory: dict | None, max_cache_tokens: int) -> Cache:
    """A cache of (rows, slots), with its keys and values in `memory` if there is one. UserError when it cannot fit."""
    config, weight, slots = model.config.get_text_config(), model.get_input_embeddings().weight, math.prod(shape)
    if memory and slots <= memory["room"]:
        if shape not in memory:
            memory[shape] = Cache(*shape, weight.device, memory["store"], memory["room"])
        memory[shape].visible.zero_()
        return memory[shape]
    if memory is not None:
        memory.clear()
        slots = max(slots, max_cache_tokens)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cast = weight.is_cuda and torch.is_autocast_enabled("cuda")
    size = torch.get_autocast_dtype("cuda").itemsize if cast else weight.element_size()
    need, free = slots * 2 * config.num_hidden_layers * heads * width * size, free_bytes(weight.device)
    if need > free:
        raise UserError(f"the KV cache of {slots:,} tokens needs {need:,} bytes, {need - free:,} more than are free; "
                        f"lower --max_cache_tokens (now {max_cache_tokens:,}); one batch has {shape[0]} rows of "
                        f"{shape[1]} tokens: if that is one prompt, lower its samples or its new tokens")
    cache = Cache(*shape, weight.device, room=slots)
    if memory is not None:
        memory.update({"room": slots, "store": cache.store, shape: cache})
    return cache


def free_bytes(device: torch.device) -> float:
    """Memory that can still be allocated on a device; inf where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


def _decode(model, cache, logits, length, end, new, temperature, top_p, eos_id, generator, static):
    """Everything after the prefill: tokens and log-probs, both (rows, new), meaningless behind a row's first EOS. The
    host looks at the device only to see who has finished, on CUDA every 8 tokens. Finished rows leave once they are a
    quarter of the batch (with static shapes: once the next smaller number of rows is enough)."""
    R, device, check = len(cache.visible), logits.device, 8 if logits.is_cuda else 1
    row = torch.arange(R, device=device)
    done = row >= len(length)                                                         # padding of static shapes
    logits = logits[row.clamp(max=len(length) - 1)]
    cache.position.zero_()[:len(length), 0] = length
    cache.visible[:, end:] = True                                                     # as far as they are written
    tokens, logprobs = torch.zeros(R, new, dtype=torch.long, device=device), torch.zeros(R, new, device=device)
    for step in range(new):
        token, logp = sample(logits, temperature, top_p, generator)
        tokens[row, step], logprobs[row, step] = token, logp
        done |= token == eos_id
        if step == new - 1:
            break
        if step % check == check - 1:
            alive = R - int(done.sum())
            if not alive:
                break
            size = _rows(alive) if static else alive
            if size <= 0.75 * R:
                order = done.long().argsort(stable=True)[:size]
                cache.keep(order)
                R, row, done, token = size, row[order], done[order], token[order]
        cache.token[:R, 0] = token
        cache.slot.fill_(end + step)
        logits = cache.step(model, R, cache.visible.shape[1] if static else end + step + 1)
        cache.position += 1
    return tokens, logprobs


# ------------------------------------------------------------------------------------------------ the frozen executor

@dataclass(frozen=True)
class Run:
    """One executor run: its output, whether the verifier accepted it, and its score (1 or 0, or a partial score of
    `verify.exec_score` for programs)."""
    output: str
    ok: bool
    score: float


def _can_capture(model) -> bool:
    """Whether a step may go into a CUDA graph: not where the rotary embedding depends on the length reached."""
    rope = str(getattr(model.config, "rope_parameters", ""))
    return getattr(model, "_can_compile_fullgraph", False) and not re.search("'(dynamic|longrope)'", rope)


class Executor:
    """A frozen LM that reads problem + trace and writes the artifact; the verifier judges it.

    `spent` counts what that cost: prompt tokens, generated tokens, program runs. Errors of the model or of the
    sandbox are raised, never scored."""

    def __init__(self, model, tokenizer, *, max_new_tokens: int, temperature: float = 0.7, exec_score: str = "binary",
                 generator=None, max_cache_tokens: int = CACHE):
        self.model, self.tokenizer, self.generator = freeze(model), tokenizer, generator
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.exec_score, self.max_cache_tokens = exec_score, max_cache_tokens
        self.spent = {"executor_prompt_tokens": 0, "executor_tokens": 0, "program_runs": 0}
        self._baseline: dict[tuple[str, int], int] = {}
        graphs = next(model.parameters()).is_cuda and _can_capture(model)
        self.memory = {} if graphs else None               # for `generate`; under LoRA all runs have the adapter off

    def run(self, problems: list[Problem], traces: list[str] | None, repeats: int) -> list[list[Run]]:
        """`repeats` independent runs for every problem with its trace (None: without). [problem][repeat]."""
        traces = traces if traces is not None else [None] * len(problems)
        if len(traces) != len(problems):
            raise ValueError(f"traces: {len(traces)} for {len(problems)} problems, must be one each")
        if not problems:
            return []
        prompts = [data.encode_prompt(self.tokenizer, data.executor_prompt(p, t)) for p, t in zip(problems, traces)]
        completions = generate(self.model, prompts, num_samples=repeats, max_new_tokens=self.max_new_tokens,
                               temperature=self.temperature, eos_id=self.tokenizer.eos_token_id,
                               generator=self.generator, max_cache_tokens=self.max_cache_tokens, memory=self.memory)
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
    max_cache_tokens: int = knob(CACHE, "tokens of keys and values in one decoding batch", low=1)


PRESETS = {"tiny": {}, "smoke": {"sequences": 640, "hidden": 64, "layers": 2, "eval_problems": 16},
           "gsm8k": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "eval_problems": 100, "max_answer_tokens": 256},
           "code": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "eval_problems": 80, "max_answer_tokens": 384}}


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


@dataclass(frozen=True)
class BenchSettings:
    """Settings of `python executor.py bench`."""
    preset: str = knob("full", "full: the executor's workload of one training step; small: a quarter of the problems")
    model: str = knob("", "Hugging Face folder or name; empty: a small random model, whose table only shows the form")
    device: str = knob("", "cuda, cpu, ...; empty: CUDA when there is one")
    problems: int = knob(8, "N; each is also run without a trace", low=1)
    traces: int = knob(8, "G, traces per problem", low=1)
    repeats: int = knob(3, "K, executor runs of each prompt", low=1)
    prompt_tokens: int = knob(250, "mean length of a prompt with a trace, random tokens; 45 % are the problem", low=8)
    new_tokens: int = knob(64, "length of every output; no EOS, so nothing is won by early ends", low=2)
    single: int = knob(9, "runs to time with one call each; all of them would take too long", low=1)
    rounds: int = knob(3, "interleaved repetitions", low=1)


BENCH_PRESETS = {"full": {}, "small": {"problems": 2}}


def peak_bytes(device: torch.device, reset: bool = False) -> int:
    """Most memory in use since the last reset: of the device, or on Linux of this process; 0 where nothing tells."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        return 0


@torch.no_grad()
def bench(settings: BenchSettings) -> str:
    """Tokens per second and peak memory of `generate` beside transformers' own, greedily, on the executor's workload.
    A Markdown table; UserError when an output in float32 differs (lower precisions decide near ties by chance)."""
    s, rng, device = settings, random.Random(0), pick_device(settings.device)
    torch.manual_seed(0)
    model = load(s.model, device)[0] if s.model else tiny_model(8192, 256, 6).to(device).eval()
    model.generation_config.eos_token_id = None
    memory = {} if device.type == "cuda" and _can_capture(model) else None
    words = lambda share: [rng.randrange(10, model.config.vocab_size) for _ in range(round(share * s.prompt_tokens))]
    prompts = []
    for problem in (words(0.45) for _ in range(s.problems)):
        prompts += [problem] + [problem + words(rng.uniform(0.35, 0.75)) for _ in range(s.traces)]

    def theirs(rows):
        ids = pad(rows, 0, device, left=True)
        mask = pad([[1] * len(row) for row in rows], 0, device, left=True)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=s.new_tokens, pad_token_id=0)
        return out[:, ids.shape[1]:].tolist()

    def ours():
        return generate(model, prompts, num_samples=s.repeats, max_new_tokens=s.new_tokens, temperature=0, eos_id=-1,
                        memory=memory).tokens

    every, some = [p for p in prompts for _ in range(s.repeats)], prompts[::math.ceil(len(prompts) / s.single)]
    methods = {"generate, one call per run": (some, lambda: [theirs([p])[0] for p in some]),
               # num_return_sequences repeats the rows just so, but refuses to decode greedily
               f"generate, one batch, num_return_sequences={s.repeats}": (every, lambda: theirs(every)),
               "executor.generate": (every, ours)}
    rates, peaks, wanted = {name: [] for name in methods}, dict.fromkeys(methods, 0), {}
    equal = dict.fromkeys(methods, 1.0)                    # share of outputs like those of the methods before
    for _ in tqdm(range(s.rounds), desc="bench", mininterval=5):
        for name, (rows, run) in methods.items():
            if memory is not None:
                memory.clear()                             # ours must not count as theirs
            before = peak_bytes(device, reset=True)
            if device.type == "cuda":                      # warm up; ours captures its graphs
                run()
            begin = time.perf_counter()
            outputs = run()
            rates[name].append(len(rows) * s.new_tokens / (time.perf_counter() - begin))
            peaks[name] = max(peaks[name], peak_bytes(device) - before)
            differ = sum(wanted.setdefault(tuple(row), out) != out for row, out in zip(rows, outputs))
            equal[name] = min(equal[name], 1 - differ / len(rows))
            if differ and model.dtype == torch.float32:
                raise UserError(f"{name}: {differ} of {len(rows)} outputs differ from those before")
    best, lengths = statistics.median(rates["executor.generate"]), [len(p) for p in prompts]
    lines = [f"{s.model or 'a small random model'}, {str(model.dtype)[6:]} on {device}, {torch.get_num_threads()} "
             f"threads; {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {s.repeats} outputs of "
             f"{s.new_tokens} tokens each; {s.rounds} rounds", "",
             "| decoder | outputs timed | equal | tokens/s, median (range) | ours against it | peak, no weights |",
             "|---" * 6 + "|"]
    for name, rate in rates.items():
        middle = statistics.median(rate)
        lines.append(f"| {name} | {len(methods[name][0])} | {equal[name]:.2f} | {middle:,.0f} ({min(rate):,.0f} to "
                     f"{max(rate):,.0f}) | {best / middle:.1f} x | {peaks[name] / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def main(argv) -> None:
    """The command: the base model of a run, trained or checked, and what its executor can do."""
    if argv[:1] == ["bench"]:
        print(bench(data.parse_settings(BenchSettings, BENCH_PRESETS, argv[1:], "executor.py bench")))
        return
    settings = data.parse_settings(BaseSettings, PRESETS, argv, "executor.py")
    run = Path(settings.run)
    if data.begin_stage(run, "base", settings, run / "base.json"):
        heldout = data.read_problems(run / "groups" / "heldout.jsonl")[:settings.eval_problems]
        record, tiny = {"model": settings.model or "base", "problems": len(heldout)}, heldout[0].source == "tiny"
        if bool(settings.model) == tiny:
            raise UserError(f"{run}/groups are of the tiny world, whose prompts are bare problems: leave out --model"
                            if tiny else
                            f"{run}/groups are not of the tiny world: give a pretrained model with --model")
        if tiny:
            record["train_loss"] = train_base(settings, heldout[0].task_type, run / "base")
        device = pick_device(settings.device)
        model, tokenizer = load(settings.model or str(run / "base"), device)
        check_head(model)                                          # training would refuse it, much later
        frozen = Executor(model, tokenizer, max_new_tokens=settings.max_answer_tokens,
                          temperature=settings.executor_temperature, max_cache_tokens=settings.max_cache_tokens,
                          generator=torch.Generator(device).manual_seed(settings.seed))
        for key, traces in (("no_trace", None), ("reference_trace", [p.reference_reasoning for p in heldout])):
            known = traces is None or None not in traces                   # HumanEval and MBPP come without traces
            record[key] = sum(frozen.success(heldout, traces, 1)) / len(heldout) if known else None
        data.record_stage(run, "base", settings)
        data.write_atomic(run / "base.json", json.dumps(record, indent=1))
    record = json.loads((run / "base.json").read_text())
    given = "no reference traces" if record["reference_trace"] is None else (
        f"{record['reference_trace']:.2f} with the reference trace")
    print(f"{run}/base.json: {record['model']}, executor success on {record['problems']} held-out problems "
          f"{record['no_trace']:.2f} without a trace, {given}")
    print(f"next: python rm.py --preset {settings.preset} --run {settings.run}")


if __name__ == "__main__":
    data.run_command(main)
