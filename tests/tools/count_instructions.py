"""How many instructions a logit costs: compiles the kernels for sm_90 (no GPU needed) and counts their inner loops.

    python tests/tools/count_instructions.py

An H200 starts at most 128 instructions per SM and cycle (16 of ex2); while it reads an element of bf16 logits at full
bandwidth it has time for about 14 of them (forward). A kernel with more is slower than memory.
The row `plain` is the forward as one writes it first: x / temperature, tl.exp, a mask in every block.
"""
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"                     # the kernels have to be compiled, whoever calls
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import grpo  # noqa: E402


@triton.jit
def plain_forward(X, stride, LOGP, ENTROPY, tau, V: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp and entropy of a row in base e."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), -1e30, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + col, mask=col < V, other=-float("inf")).to(tl.float32) / tau
        new = tl.maximum(top, tl.max(x, 0))
        e = tl.exp(x - new)
        keep = tl.exp(top - new)
        total = total * keep + tl.sum(e, 0)
        weighted = weighted * keep + tl.sum(e * tl.maximum(x, -1e30), 0)
        top = new
    tl.store(LOGP + row, top + tl.log(total))
    tl.store(ENTROPY + row, top + tl.log(total) - weighted / total)


TYPES = {
    "X": "*bf16", "D": "*bf16", "TARGET": "*i64", "SEQ": "*i32", "stride": "i32", "stride2": "i32", "B": "i32",
    "G": "i32", "ddof": "i32", "clip_low": "fp32", "clip_high": "fp32", "beta": "fp32", "adv_eps": "fp32",
    "tau": "fp32",
}  # everything else is a pointer to float32


def compiled(kernel, num_warps: int, **constants):
    """The kernel compiled for sm_90, for aligned pointers and strides; .asm has ptx and cubin."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    aligned = {}
    for i, name in enumerate(names):
        if signature[name].startswith("*") or name.startswith("stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def disassembled(cubin: bytes) -> str:
    """The machine code as text, by the nvdisasm that comes with triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def longest_loop(text: str) -> list[str]:
    """The instructions between a label and a jump back to it, by name: those of the longest such stretch."""
    names, label, longest = [], {}, []
    for line in text.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line.strip()):
            label[found[1]] = len(names)
        found = re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?(\S+?)[ ;.]", line)
        if not found:
            continue
        names.append("MUFU.EX2" if "MUFU.EX2" in line else found[1])
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in label and len(names) - label[jump[1]] > len(longest):
            longest = names[label[jump[1]]:]
    return longest


def inner_loop(kernel, num_warps: int, **constants) -> Counter:
    """Instructions by name in the longest loop of the compiled kernel, per element."""
    cubin = compiled(kernel, num_warps, **constants).asm["cubin"]
    counts = Counter(longest_loop(disassembled(cubin)))
    per_thread = constants["BLOCK"] / (32 * num_warps)
    return Counter({name: count / per_thread for name, count in counts.items()})


def table(V: int = 151936) -> dict[str, Counter]:
    """inner_loop of the forward, the backward and the plain forward at the shipped block sizes."""
    common = {"V": V, "BLOCK": grpo.BLOCK}
    return {"forward": inner_loop(grpo._forward, grpo.FORWARD_WARPS, TAU=1.0, GROUP=8, SCALE=True, **common),
            "plain": inner_loop(plain_forward, grpo.FORWARD_WARPS, **common),
            "backward": inner_loop(grpo._backward, grpo.BACKWARD_WARPS, TAU=1.0, **common)}


if __name__ == "__main__":
    print(f"sm_90, bf16, V = 151936, BLOCK {grpo.BLOCK}, triton {triton.__version__}: instructions per element")
    for name, counts in table().items():
        most = ", ".join(f"{instruction} {count:.2f}" for instruction, count in counts.most_common(8))
        print(f"{name:9} {counts.total():5.1f}   of which ex2 {counts['MUFU.EX2']:.2f}   ({most}, ...)")
