"""Right first, then fast: the fused kernels beside eager PyTorch and the memory's floor.

    python tests/tools/bench_kernels.py                  32768 rows of 49152 and of 151936 bf16 logits: a GPU of 80 GB
    python tests/tools/bench_kernels.py --rows 4096      fits a card of 8 GB
    python tests/tools/bench_kernels.py --out FILE.json  the numbers also as JSON

Times are medians. A floor is the time in which a copy, measured in the same run, moves the bytes that must be moved: a
forward reads 2 bytes per logit, a backward reads 2 and writes 2; the floor of the head is its three matrix products.
Peak is memory beyond the inputs. Without CUDA a few rows run in Triton's interpreter, and times mean nothing.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                 # before triton is imported
sys.path.insert(0, str(next(p for p in Path(__file__).resolve().parents if (p / "kernels").is_dir())))
from kernels import grpo, reference  # noqa: E402


def step(rows, V, dtype, device):
    """Arguments of advantage_logp: 8 traces of equal length, one group."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, V, dtype=dtype, device=device)
    for part in logits.split(1024):                      # in parts: the random float32 would outgrow the card
        part.copy_(torch.randn(part.shape, generator=g, device=device) * 3)
    target = torch.randint(V, (rows,), generator=g, device=device)
    seq = torch.arange(rows, device=device) * 8 // rows
    return dict(logits=logits, target=target, reward=torch.rand(8, generator=g, device=device), seq=seq, group_size=8)


def loss_of(function, s, **options):
    """The on-policy loss, in which every row has a gradient."""
    logp, _, A = function(**s, **options)
    return -(A * logp).sum() / len(logp)


def errors(s):
    """Largest errors against float64 on the same inputs: of the gradient as a share of its maximum."""
    x = s["logits"].requires_grad_()
    y = x.detach().double().requires_grad_()
    ours = grpo.advantage_logp(**s)
    truth = reference.advantage_logp(**{**s, "logits": y})
    for logp, _, A in (ours, truth):
        (A * logp).sum().backward()
    gaps = [(a - b).abs().max().item() for a, b in zip((*ours, x.grad), (*truth, y.grad))]
    gaps[3] /= y.grad.abs().max().item()
    return dict(zip(("logp", "entropy", "A", "gradient"), gaps))


def clock(work, repeats, prepare=tuple):
    """Median milliseconds of work(*prepare())."""
    times = []
    for _ in range(repeats + 3 if CUDA else 1):
        given = prepare()
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work(*given)
        if CUDA:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:] or times)


def peak(work):
    """GB of GPU memory that work() needs beyond what is there."""
    before = torch.cuda.memory_allocated()               # 0 without CUDA
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def head_in_pieces(hidden, head, s, rows=3072):
    """The walk's loop: the head sees some rows at a time and hands their gradient to one leaf."""
    leaf = hidden.detach().requires_grad_()
    for part in torch.arange(len(leaf), device=leaf.device).split(rows):
        own = {**s, "logits": leaf[part] @ head.T, "target": s["target"][part], "seq": s["seq"][part]}
        loss_of(grpo.advantage_logp, own, inplace=True).backward()
    return leaf.grad


def times(rows, V, H, device, repeats):
    """{name: {"ms", "floor", "peak"}} for one vocabulary, and the GB/s of a copy."""
    s = step(rows, V, torch.bfloat16, device)
    other = torch.empty_like(s["logits"])
    copy = 2 * other.nbytes / clock(lambda: other.copy_(s["logits"]), repeats) / 1e6
    del other
    logits = s["logits"].requires_grad_()
    read = logits.nbytes / copy / 1e6
    found = {}
    for name, function, options in (("", grpo.advantage_logp, {"inplace": True}),
                                    ("eager ", reference.advantage_logp, {})):
        forward = lambda: loss_of(function, s, **options)  # noqa: E731
        backward = lambda loss: torch.autograd.grad(loss, logits)  # noqa: E731
        try:
            found[name + "forward"] = {"ms": clock(forward, repeats), "floor": read, "peak": peak(forward)}
            found[name + "backward"] = {"ms": clock(backward, repeats, lambda: (forward(),)), "floor": 2 * read,
                                        "peak": peak(lambda: backward(forward()))}
        except torch.cuda.OutOfMemoryError:              # the float32 temporaries of eager PyTorch
            found[name + "backward"] = {"failed": "out of memory"}
    del logits, s["logits"]
    hidden, head = (torch.randn(n, H, device=device).bfloat16().mul_(H ** -0.25) for n in (rows, V))
    z = hidden[:3072] @ head.T
    products = rows / len(z) * clock(lambda: (hidden[:3072] @ head.T, z @ head, z.T @ hidden[:3072]), repeats)
    del z
    head.requires_grad_()
    pieces = lambda: head_in_pieces(hidden, head, s)  # noqa: E731
    found["head, in pieces"] = {"ms": clock(pieces, repeats // 4), "floor": products, "peak": peak(pieces)}
    return found, copy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768 if CUDA else 16, help="a multiple of 8")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936] if CUDA else [1000])
    parser.add_argument("--hidden", type=int, default=896 if CUDA else 16)
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 1)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    machine = torch.cuda.get_device_name() if CUDA else f"interpreter on {platform.machine()}: times mean nothing"
    report = {"machine": machine, "torch": torch.__version__, "triton": grpo.triton.__version__, "rows": args.rows,
              "errors": {}, "copy": {}, "times": {}}
    print(f"{machine}, torch {report['torch']}, triton {report['triton']}")
    for dtype in (torch.float32, torch.bfloat16):
        gaps = report["errors"][str(dtype)[6:]] = errors(step(min(args.rows, 512), args.vocab[0], dtype, device))
        print(f"{str(dtype)[6:]}: largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in gaps.items()))
    for V in args.vocab:
        found, report["copy"][V] = times(args.rows, V, args.hidden, device, args.repeats)
        report["times"][V] = found
        print(f"\n{args.rows} rows of {V} bf16 logits, copy {report['copy'][V]:.0f} GB/s")
        print(f"{'':20}{'ms':>8}{'floor':>8}{'peak GB':>9}")
        for name, r in found.items():
            print(f"{name:20}" + (r.get("failed") or f"{r['ms']:8.2f}{r['floor']:8.2f}{r['peak']:9.2f}"))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
