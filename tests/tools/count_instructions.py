"""How many instructions a logit costs: compiles the kernels for sm_90 (no GPU needed) and counts their inner loops.

    python tests/tools/count_instructions.py

An H200 starts at most 128 instructions per SM and cycle (16 of ex2); while it reads an element of bf16 logits at full
bandwidth it has time for about 14 of them (forward). A kernel with more is slower than memory.
"""
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"                      # the kernels have to be compiled, whoever calls
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import grpo  # noqa: E402

TYPES = {"X": "*bf16", "DX": "*bf16", "TARGET": "*i64", "SEQ": "*i64", "stride": "i32", "dstride": "i32", "B": "i32",
         "G": "i32"}                                      # all else is a pointer to float32


def compiled(kernel, num_warps: int, **constants):
    """The kernel compiled for sm_90, for aligned pointers and strides; .asm has ptx and cubin."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name].startswith("*") or name.endswith("stride")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def longest_loop(cubin: bytes) -> list[str]:
    """The names of the instructions between a label and a jump back to it: those of the longest such stretch."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
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


def table(V: int = 151936) -> dict[str, Counter]:
    """Instructions by name per element, of forward and backward as they are launched."""
    found, common = {}, {"V": V, "BLOCK": grpo.BLOCK, "C": math.log2(math.e)}
    for kernel, num_warps, more in ((grpo._forward, 4, {"GROUP": 8, "SCALE": True}), (grpo._backward, 8, {})):
        counts = Counter(longest_loop(compiled(kernel, num_warps, **common, **more).asm["cubin"]))
        per_thread = grpo.BLOCK / (32 * num_warps)
        found[kernel.__name__] = Counter({name: count / per_thread for name, count in counts.items()})
    return found


if __name__ == "__main__":
    print(f"sm_90, bf16, V = 151936, BLOCK {grpo.BLOCK}, triton {triton.__version__}: instructions per element")
    for name, counts in table().items():
        most = ", ".join(f"{instruction} {count:.2f}" for instruction, count in counts.most_common(8))
        print(f"{name:10} {counts.total():5.1f}   of which ex2 {counts['MUFU.EX2']:.2f}   ({most}, ...)")
