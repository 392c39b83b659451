"""GPU memory of a training, computed from the shapes of its model: the table of the README.

    python tests/tools/memory_table.py

Counted is what lives from step to step, or through a whole phase; activations, logits and CUDA's own context are not.
tests/test_gpu_script.py compares each part with the tensors of a small model.

  planner    float32 weights, unless there is an adapter; gradients and AdamW in float32. AdamW is fused on CUDA, so the
             update needs no temporary copy of all weights
  copies     autocast casts the weight of a linear layer once and keeps the cast until its context ends
  executor   bfloat16, frozen; with LoRA it is the planner's own backbone
  rm         backbone without head; trained with LoRA it is frozen, saved and loaded in bfloat16, its heads in float32
"""
from dataclasses import dataclass

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

    def config(self, kind=None, **more):
        """The same as a configuration of transformers: Qwen2's, or another kind with its names."""
        from transformers import Qwen2Config
        return (kind or Qwen2Config)(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.intermediate,
            tie_word_embeddings=self.tied, max_position_embeddings=32768, rms_norm_eps=1e-6, **more)


# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json, and -1.5B, -3B, -7B
QWEN = {"0.5B": Shape(151936, 896, 24, 14, 2, 4864, True),
        "1.5B": Shape(151936, 1536, 28, 12, 2, 8960, True),
        "3B": Shape(151936, 2048, 36, 16, 2, 11008, True),
        "7B": Shape(152064, 3584, 28, 28, 4, 18944, False)}


def linear_layers(s: Shape) -> list[tuple[int, int, bool]]:
    """(inputs, outputs, whether it has a bias) of the linear layers of one block."""
    key, up = (s.hidden, s.hidden // s.heads * s.kv_heads, True), (s.hidden, s.intermediate, False)
    query, output, down = (s.hidden, s.hidden, True), (s.hidden, s.hidden, False), (s.intermediate, s.hidden, False)
    return [query, key, key, output, up, up, down]        # values are as wide as keys, the gate as what it opens


def linear_numbers(s: Shape) -> int:
    """Numbers in the linear layers of all blocks, biases included."""
    return s.layers * sum(i * o + o * bias for i, o, bias in linear_layers(s))


def backbone_numbers(s: Shape) -> int:
    """Numbers in everything but the head: embedding, blocks, norms."""
    return s.vocab * s.hidden + linear_numbers(s) + (2 * s.layers + 1) * s.hidden


def model_numbers(s: Shape) -> int:
    """Numbers in a causal LM; a tied head is counted once."""
    return backbone_numbers(s) + (0 if s.tied else s.vocab * s.hidden)


def adapter_numbers(s: Shape, rank: int) -> int:
    """Numbers in A (rank, inputs) and B (outputs, rank) of every linear layer but the head."""
    return s.layers * rank * sum(i + o for i, o, _ in linear_layers(s))


def cache_bytes(s: Shape, tokens: int, number: int = BFLOAT16) -> int:
    """Bytes of the keys and values of this many tokens, all layers together."""
    return 2 * s.layers * s.kv_heads * (s.hidden // s.heads) * number * tokens


def learning(numbers: int) -> dict[str, int]:
    """Bytes that belong to trained float32 weights."""
    return {"weights": FLOAT32 * numbers, "gradients": FLOAT32 * numbers, "AdamW": 2 * FLOAT32 * numbers}


def memory(s: Shape, rank: int = 16, rm_rank: int = 32) -> dict[str, dict[str, int]]:
    """Bytes, part by part: of a training of all weights, of one with an adapter, and of a reward model that is loaded
    or trained, with all weights or an adapter. Its heads have five labels for each of five dimensions, and a total."""
    executor, copies = BFLOAT16 * model_numbers(s), BFLOAT16 * linear_numbers(s)
    adapter, rm_adapter = adapter_numbers(s, rank), adapter_numbers(s, rm_rank)
    backbone, heads = backbone_numbers(s), (5 * 5 + 1) * (s.hidden + 1)
    return {
        "all weights": learning(model_numbers(s)) | {"copies": copies, "executor": executor},
        "LoRA": learning(adapter) | {"copies": BFLOAT16 * adapter, "backbone": executor},
        "rm loaded": {"weights": FLOAT32 * (backbone + heads)},
        "rm trained": learning(backbone + heads) | {"copies": copies + BFLOAT16 * heads},
        "rm with LoRA loaded": {"backbone": BFLOAT16 * backbone, "heads": FLOAT32 * heads},
        "rm with LoRA trained": learning(rm_adapter + heads) | {"copies": BFLOAT16 * (rm_adapter + heads),
                                                                "backbone": BFLOAT16 * backbone}}


def table() -> str:
    """The README's table, as Markdown, in GiB."""
    head = ["Qwen2.5", "all weights", "`--lora_rank 16`", "reward model: loaded / trained",
            "the same, `--lora_rank 32`", "cache, 65,536 tokens"]
    lines = [row(head), "|---" * len(head) + "|"]
    for name, shape in QWEN.items():
        gib = {title: f"{sum(parts.values()) / GIB:.1f}" for title, parts in memory(shape).items()}
        lines.append(row([name, gib["all weights"], gib["LoRA"], f"{gib['rm loaded']} / {gib['rm trained']}",
                          f"{gib['rm with LoRA loaded']} / {gib['rm with LoRA trained']}",
                          f"{cache_bytes(shape, 65536) / GIB:.2f}"]))
    return "\n".join(lines) + "\n"


def row(cells) -> str:
    """| a | b |"""
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    print(f"GiB, computed, not measured:\n\n{table()}", end="")
