"""Right first, then fast: the Triton kernels beside eager PyTorch, torch.compile and, where installed, Liger-Kernel.

    python tests/tools/bench_kernels.py                    32768 rows of 49152 and of 151936 logits in bf16: a GPU of 80 GB
    python tests/tools/bench_kernels.py --rows 4096        fits a card of 8 GB
    python tests/tools/bench_kernels.py --sweep            block sizes instead of rivals

Errors are those of log-prob and gradient against float64 on the same inputs. Times are medians of CUDA events after a
warm-up, of the on-policy loss. A share is that of the bandwidth of a copy in the same run; peak is memory beyond the
inputs. Without CUDA a few rows run in Triton's interpreter: their errors are real, their times mean nothing.
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from kernels import grpo, reference  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
GROUP = 8


def step(rows: int, V: int, dtype) -> dict:
    """Arguments of advantage_logp for the tokens of 64 traces (8 where there are few rows)."""
    g = torch.Generator(DEVICE).manual_seed(0)
    B = 64 if rows % 64 == 0 else 8
    logits = torch.empty(rows, V, dtype=dtype, device=DEVICE)
    for part in logits.split(1024):                       # in parts: the random float32 would outgrow the card
        part.copy_(torch.randn(part.shape, generator=g, device=DEVICE) * 3)
    return {"logits": logits.requires_grad_(), "target": torch.randint(V, (rows,), generator=g, device=DEVICE),
            "reward": torch.rand(B, generator=g, device=DEVICE), "group_size": GROUP,
            "seq": torch.arange(B, device=DEVICE).repeat_interleave(rows // B)}


def errors(rows: int, V: int, dtype) -> dict:
    """Largest errors of log-prob, entropy, advantage and gradient (of its maximum) against float64."""
    s = step(rows, V, dtype)
    exact = s | {"logits": s["logits"].detach().double().requires_grad_(), "reward": s["reward"].double()}
    ours, truth = grpo.advantage_logp(**s), reference.advantage_logp(**exact)
    slope = torch.linspace(-1, 1, rows, device=DEVICE)
    (slope * ours[0]).sum().backward()
    (slope.double() * truth[0]).sum().backward()
    wanted = exact["logits"].grad
    plain = s["logits"].detach().log_softmax(-1).gather(1, s["target"][:, None])[:, 0]
    found = {name: largest(a - b) for name, a, b in zip(("logp", "entropy", "advantage"), ours, truth)}
    return found | {"gradient": largest(s["logits"].grad - wanted) / largest(wanted),
                    "logp_of_log_softmax_in_this_dtype": largest(plain - truth[0])}


def largest(x) -> float:
    return x.detach().double().abs().max().item()


# ---- what is compared: each takes the arguments and returns the on-policy loss, a sum over the rows


def ours(inplace: bool, logits, **s):
    logp, entropy, A = grpo.advantage_logp(logits, **s, inplace=inplace)
    return -((logp - logp.detach()).exp() * A).sum()


def eager(logits, **s):
    """As one writes it in PyTorch, the log-softmax in float32, entropy included."""
    logp, entropy, A = reference.advantage_logp(logits, **s)
    return -((logp - logp.detach()).exp() * A).sum()


def liger(logits, target, reward, seq, group_size):
    """Liger-Kernel's loss of the same tokens; it takes (B, L + 1, V) and leaves each last position out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    A = reference.group_advantage(reward, group_size)
    target = target.view(len(reward), -1)[:, :-1].contiguous()
    loss, *_ = triton_grpo_loss(logits.view(len(reward), -1, logits.shape[1]), None, None, target, A, temperature=1.0,
                                beta=0.0, eps_low=0.2, eps_high=0.2, inplace=True)
    return loss.sum()


# ---- times


def clock(work, repeats: int) -> float:
    """Median milliseconds of work()."""
    if not CUDA:
        begin = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begin)
    times = []
    for _ in range(repeats + 3):                          # one wait at the end: the host stays ahead and is not timed
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times[3:])


def copy_bandwidth(x, repeats: int) -> float:
    """GB/s, read and written, of copying x."""
    other = torch.empty_like(x)
    return 2 * x.nbytes / clock(lambda: other.copy_(x), repeats) / 1e6


def measure(loss, s: dict, copy: float, repeats: int) -> dict:
    """Milliseconds, shares of the bandwidth `copy`, and peak GB of a loss and its gradient."""
    def both():
        s["logits"].grad = None
        loss(**s).backward()

    both()                                                # compiles
    s["logits"].grad = None
    before = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
    forward, total = clock(lambda: loss(**s), repeats), clock(both, repeats)
    s["logits"].grad = None
    size = s["logits"].nbytes / 1e6                       # read once forward; read and written backward
    return {"forward_ms": forward, "forward_share": size / forward / copy, "backward_ms": total - forward,
            "backward_share": 2 * size / max(total - forward, 1e-6) / copy, "total_ms": total, "peak_gb": peak / 1e9}


def measure_all(rows: int, V: int, repeats: int = 20, sweep: bool = False):
    """Yields (title, {name: number}). A rival that fails is a row; ours failing is an error."""
    for dtype in (torch.float32, torch.bfloat16):
        yield f"error in {dtype}", errors(min(rows, 512), V, dtype)
    s = step(rows, V, torch.bfloat16)
    copy = copy_bandwidth(s["logits"].detach(), repeats)
    yield "copy", {"gb_per_s": copy}
    if sweep:
        for grpo.BLOCK in (1024, 2048, 4096, 8192, 16384):
            yield f"ours, block {grpo.BLOCK}", measure(lambda **s: ours(True, **s), s, copy, repeats)
        return
    yield "ours, in place", measure(lambda **s: ours(True, **s), s, copy, repeats)
    yield "ours", measure(lambda **s: ours(False, **s), s, copy, repeats)
    rivals = {"eager PyTorch": eager}
    if CUDA:
        rivals |= {"Liger-Kernel, in place": liger, "torch.compile": torch.compile(eager, dynamic=False)}
    for title, rival in rivals.items():
        try:
            yield title, measure(rival, s, copy, repeats)
        except Exception as error:                        # not installed, or it outgrows the card
            s["logits"].grad = None
            yield title, {"failed": f"{type(error).__name__}: {str(error)[:70]}".splitlines()[0]}


def main(argv=None) -> None:
    """Prints a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768 if CUDA else 16, help="a multiple of 64, or of 8 if small")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936] if CUDA else [1000])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args(argv)
    print(torch.cuda.get_device_name() if CUDA else "Triton's interpreter: times mean nothing", torch.__version__)
    for V in args.vocab:
        for title, numbers in measure_all(args.rows, V, sweep=args.sweep):
            cells = [f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in numbers.items()]
            print(f"{args.rows} x {V}, {title}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
