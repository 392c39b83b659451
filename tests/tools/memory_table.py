"""GPU memory of a training, computed from the shapes of its model: the table of the README.

    python tests/tools/memory_table.py

Counted is what lives from step to step, or through a whole phase: weights, gradients, AdamW's two moments, the 16-bit
copies of the weights that autocast makes for a forward pass, an adapter, keys and values. Not counted: activations,
logits, CUDA's own context. tests/test_gpu_script.py compares each part with the tensors that a small model really has.

Where the parts come from:
  planner    float32 weights (tracelift.py loads them so unless there is an adapter), gradients and AdamW in float32
  copies     autocast casts a weight once and keeps the cast until its context ends (torch, autocast_mode.cpp,
             cached_cast): for all linear layers under the head; the embedding is looked up in float32
  AdamW      fused on CUDA, so that the update needs no temporary copy of all weights (`fused=False` counts one)
  executor   bfloat16, frozen; with LoRA it is the planner's own backbone
  rm         backbone without head; trained with LoRA it is frozen, saved and loaded in bfloat16, its heads in float32
"""
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2                                  # bytes of a number


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen2 architecture: queries, keys and values have a bias, nothing else; two norms a layer."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool                                            # the head is the embedding

    def config(self):
        """The same as a configuration of transformers."""
        from transformers import Qwen2Config
        return Qwen2Config(vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
                           num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
                           intermediate_size=self.intermediate, tie_word_embeddings=self.tied,
                           max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6)


# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json, and -1.5B, -3B, -7B
QWEN = {"0.5B": Shape(151936, 896, 24, 14, 2, 4864, True),
        "1.5B": Shape(151936, 1536, 28, 12, 2, 8960, True),
        "3B": Shape(151936, 2048, 36, 16, 2, 11008, True),
        "7B": Shape(152064, 3584, 28, 28, 4, 18944, False)}


def linear_layers(s: Shape) -> list[tuple[int, int, bool]]:
    """(inputs, outputs, whether it has a bias) of the linear layers of one block."""
    query, key = (s.hidden, s.hidden, True), (s.hidden, s.hidden // s.heads * s.kv_heads, True)
    output, up, down = (s.hidden, s.hidden, False), (s.hidden, s.intermediate, False), (s.intermediate, s.hidden, False)
    return [query, key, key, output, up, up, down]        # values are as wide as keys, the gate as what it opens


def linear_numbers(s: Shape) -> int:
    """Numbers in the linear layers of all blocks, biases included."""
    return s.layers * sum(i * o + o * bias for i, o, bias in linear_layers(s))


def backbone_numbers(s: Shape) -> int:
    """Numbers in everything but the head: embedding, blocks, norms."""
    norms = (2 * s.layers + 1) * s.hidden
    return s.vocab * s.hidden + linear_numbers(s) + norms


def model_numbers(s: Shape) -> int:
    """Numbers in a causal LM; a tied head is counted once."""
    head = 0 if s.tied else s.vocab * s.hidden
    return backbone_numbers(s) + head


def adapter_numbers(s: Shape, rank: int) -> int:
    """Numbers in A (rank, inputs) and B (outputs, rank) of every linear layer but the head."""
    return s.layers * rank * sum(i + o for i, o, _ in linear_layers(s))


def reward_heads_numbers(s: Shape, dimensions: int = 5, labels: int = 5) -> int:
    """Numbers in the heads of a rubric reward model, which sit on a backbone: labels for each dimension, a total."""
    return (dimensions * labels + 1) * (s.hidden + 1)


def cache_bytes(s: Shape, tokens: int, number: int = BFLOAT16) -> int:
    """Bytes of the keys and values of this many tokens, all layers together."""
    return 2 * s.layers * s.kv_heads * (s.hidden // s.heads) * number * tokens


def learning(numbers: int, fused: bool = True) -> dict[str, int]:
    """Bytes that belong to trained float32 weights: themselves, their gradients, AdamW's two moments, and, unless it
    is fused, one temporary copy."""
    parts = {"weights": FLOAT32 * numbers, "gradients": FLOAT32 * numbers, "AdamW": 2 * FLOAT32 * numbers}
    if not fused:
        parts["AdamW's temporary"] = FLOAT32 * numbers
    return parts


def memory(s: Shape, rank: int = 16, fused: bool = True, rm_rank: int = 32) -> dict[str, dict[str, int]]:
    """Bytes, part by part: of a training of all weights, of one with an adapter, of a reward model that is loaded and
    of one that is trained, with all weights or an adapter, and of one token's keys and values."""
    executor = BFLOAT16 * model_numbers(s)
    copies = BFLOAT16 * linear_numbers(s)
    adapter = adapter_numbers(s, rank)
    judge = backbone_numbers(s) + reward_heads_numbers(s)
    judge_copies = copies + BFLOAT16 * reward_heads_numbers(s)
    judge_adapted = adapter_numbers(s, rm_rank) + reward_heads_numbers(s)
    judge_backbone = BFLOAT16 * backbone_numbers(s)
    return {
        "all weights": learning(model_numbers(s), fused) | {"autocast's copies": copies, "executor": executor},
        "LoRA": learning(adapter, fused) | {"autocast's copies": BFLOAT16 * adapter, "backbone": executor},
        "reward model loaded": {"weights": FLOAT32 * judge},
        "reward model trained": learning(judge, fused) | {"autocast's copies": judge_copies},
        "reward model of LoRA loaded": {"backbone": judge_backbone, "heads": FLOAT32 * reward_heads_numbers(s)},
        "reward model of LoRA trained": learning(judge_adapted, fused) | {"autocast's copies": BFLOAT16 * judge_adapted,
                                                                          "backbone": judge_backbone},
        "keys and values of a token": {"bfloat16": cache_bytes(s, 1)}}


def table(rank: int = 16, rm_rank: int = 32) -> str:
    """The README's table, as Markdown. GiB, all of it computed. All weights: planner, gradient and AdamW in float32,
    copies by autocast, bfloat16 executor. LoRA: bfloat16 backbone, adapter with gradient and AdamW."""
    head = ["Qwen2.5", "all weights", f"`--lora_rank {rank}`", "reward model: loaded / trained",
            f"the same, `--lora_rank {rm_rank}`", "cache, 65,536 tokens"]
    lines = [row(head), "|---" * len(head) + "|"]
    for name, shape in QWEN.items():
        parts = memory(shape, rank, rm_rank=rm_rank)
        gib = {title: f"{sum(own.values()) / GIB:.1f}" for title, own in parts.items()}
        token = cache_bytes(shape, 1)
        judge = f"{gib['reward model loaded']} / {gib['reward model trained']}"
        adapted = f"{gib['reward model of LoRA loaded']} / {gib['reward model of LoRA trained']}"
        lines.append(row([name, gib["all weights"], gib["LoRA"], judge, adapted, f"{65536 * token / GIB:.2f}"]))
    return "\n".join(lines) + "\n"


def row(cells) -> str:
    """| a | b |"""
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print(f"GiB, computed by tests/{Path(__file__).name}, not measured:\n\n{table()}", end="")
