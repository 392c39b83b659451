"""Right first, then fast: the fused kernels beside eager PyTorch, torch.compile and, where installed, Liger-Kernel.

    python tests/tools/bench_kernels.py                    32768 rows of 49152 and of 151936 logits in bf16: a GPU of 80 GB
    python tests/tools/bench_kernels.py --rows 4096        fits a card of 8 GB
    python tests/tools/bench_kernels.py --sweep            block sizes and warps instead of rivals
    python tests/tools/bench_kernels.py --out FILE.json    the numbers also as JSON

Errors are of an off-policy step with KL. Times are of an on-policy one, in which every row has a gradient whatever the
logits hold (clipped rows need no backward, and in-place ones overwrite the logits): medians of CUDA events after a
warm-up. A share is that of the bandwidth of a copy in the same run; peak is memory beyond the inputs. The linear loss
does part of its backward in the forward: look at its total. Without CUDA a few rows run in Triton's interpreter: their
errors are real (its fused multiply-adds round twice), their times mean nothing.
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
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels  # noqa: E402
from kernels import grpo  # noqa: E402

BLOCKS_AND_WARPS = [(2048, 1), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8)]
COLUMNS = [("forward", "forward ms", ".2f", 12), ("forward_share", "share", ".0%", 7),
           ("backward", "backward ms", ".2f", 13), ("backward_share", "share", ".0%", 7),
           ("total", "total ms", ".2f", 10), ("peak", "peak GB", ".2f", 9)]


# ------------------------------------------------------------------------------------------------------ 1. errors


def step(rows, V, dtype, device):
    """Arguments of the loss of one optimizer step; the last position of every sequence has weight 0, as in training."""
    g = torch.Generator(device).manual_seed(0)
    B = 64 if rows % 64 == 0 else 8                      # sequences
    T = rows // B
    mask = (torch.arange(T, device=device) < T - 1).expand(B, T)
    logits = torch.empty(rows, V, dtype=dtype, device=device)
    for part in logits.split(1024):                      # in parts: the random float32 would outgrow the card
        part.copy_(torch.randn(part.shape, generator=g, device=device) * 3)
    target = torch.randint(V, (rows,), generator=g, device=device)
    pairs = zip(logits.split(1024), target.split(1024))
    old = torch.cat([kernels.token_logp(x, t)[0] for x, t in pairs])
    old += torch.randn(rows, generator=g, device=device) * 0.2
    seq = torch.arange(B, device=device, dtype=torch.int32).repeat_interleave(T)
    reward = torch.rand(B, generator=g, device=device)
    weight = kernels.token_weights(mask).flatten()
    return dict(logits=logits, target=target, reward=reward, seq=seq, weight=weight, group_size=8, old_logp=old)


def errors(rows, V, dtype, device):
    """Largest errors of loss, log-prob and gradient (of its maximum) against float64 on the same inputs, with KL."""
    s = step(rows, V, dtype, device)
    noise = torch.randn(rows, generator=torch.Generator(device).manual_seed(1), device=device)
    s |= {"ref_logp": s["old_logp"] + 0.2 * noise, "beta": 0.1}
    exact = dict(s)
    for name in ("logits", "reward", "weight", "old_logp", "ref_logp"):
        exact[name] = s[name].double()
    x = s["logits"].requires_grad_()
    y = exact["logits"].requires_grad_()
    ours = grpo.grpo_loss_triton(**s)
    ours[0].backward()
    truth = kernels.grpo_loss_reference(**exact)
    truth[0].backward()
    live = s["weight"] > 0
    naive = x.detach().log_softmax(-1).gather(1, s["target"][:, None])[:, 0]
    return {"loss": largest(ours[0] - truth[0]), "logp": largest(ours[1] - truth[1]),
            "gradient": largest(x.grad - y.grad) / largest(y.grad),
            f"logp of torch.log_softmax in {dtype}": largest((naive - truth[1])[live])}


def largest(x):
    return x.double().abs().max().item()


# ------------------------------------------------------------------------------------------------------ 2. rivals


def eager(logits, target, reward, seq, weight, group_size, old_logp):
    """The loss as one writes it in PyTorch, the log-softmax in float32."""
    r = reward.view(-1, group_size)
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)
    A = A.flatten()[seq.long()]
    logq = torch.log_softmax(logits.float(), -1)
    logp = logq.gather(1, target[:, None])[:, 0]
    rho = (logp - (logp.detach() if old_logp is None else old_logp)).exp()
    with torch.no_grad():
        entropy = -(logq.exp() * logq).sum(-1)
    return -(weight * torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)).sum(), entropy


def liger(logits, target, reward, seq, weight, group_size, old_logp):
    """Liger-Kernel's Triton loss of the same tokens: it takes (B, L + 1, V) and drops each last position itself."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def cut(x):
        return None if x is None else x.view(len(reward), -1)[:, :-1].contiguous()

    advantage = kernels.group_advantage(reward, group_size)
    logits = logits.view(len(reward), -1, logits.shape[1])
    per_token, *_ = triton_grpo_loss(logits, cut(old_logp), None, cut(target), advantage, temperature=1.0, beta=0.0,
                                     eps_low=0.2, eps_high=0.2, inplace=True)
    return (per_token * cut(weight)).sum(), None


def liger_linear(hidden, head, target, reward, seq, weight, group_size, old_logp):
    """Liger-Kernel's chunked linear loss, one sequence a chunk, its default; it compiles its chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def shape(x):
        return None if x is None else x.view(len(reward), -1)

    advantage = kernels.group_advantage(reward, group_size)
    hidden = hidden.view(len(reward), -1, hidden.shape[1])
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    return loss(hidden, head, shape(target), shape((weight > 0).float()), advantage,
                old_per_token_logps=shape(old_logp))[0], None


# ------------------------------------------------------------------------------------------------------- 3. times


def clock(work, repeats):
    """Median milliseconds of work()."""
    if not CUDA:
        begin = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begin)
    times = []
    for _ in range(repeats + 3):                         # one wait at the end: the host stays ahead and is not timed
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times[3:])


def copy_bandwidth(x, repeats):
    """GB/s, read and written, of copying x."""
    other = torch.empty_like(x)
    return 2 * x.nbytes / clock(lambda: other.copy_(x), repeats) / 1e6


def measure(name, loss, leaves, repeats):
    """{"name", "forward", "total" in ms, "peak" in GB}; {"name", "failed"} for a rival. loss() -> (scalar, ...)."""
    def both():
        clear()
        torch.autograd.backward(loss()[0], inputs=leaves)

    def clear():
        for leaf in leaves:
            leaf.grad = None

    try:
        both()                                           # compiles
        clear()
        peak = peak_memory(both)
        return {"name": name, "forward": clock(loss, repeats), "total": clock(both, repeats), "peak": peak}
    except Exception as error:                           # a rival that is not installed, fails or outgrows the card
        if name.startswith("ours"):
            raise
        return {"name": name, "failed": f"{type(error).__name__}: {str(error)[:70]}".splitlines()[0]}
    finally:
        clear()


def peak_memory(work):
    """GB of GPU memory that work() needs beyond what is there."""
    if not CUDA:
        work()
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def compare(rows, V, H, device, repeats, sweep):
    """The results for one vocabulary, and the bandwidth of a copy in GB/s."""
    s = step(rows, V, torch.bfloat16, device)
    copy = copy_bandwidth(s["logits"], repeats)
    s["logits"].requires_grad_()
    s["old_logp"] = None                                 # on-policy
    results = sweep_blocks(s, repeats) if sweep else losses_of_logits(s, repeats)
    size = 2 * rows * V / 1e6                            # MB of logits
    for r in results:
        if "total" in r:
            r["backward"] = r["total"] - r["forward"]
            r["forward_share"] = size / r["forward"] / copy
            r["backward_share"] = 2 * size / r["backward"] / copy
    if not sweep:
        del s["logits"]
        results += losses_of_hidden_states(s, rows, V, H, device, max(1, repeats // 4))
    return results, copy


def sweep_blocks(s, repeats):
    results = []
    for block, warps in BLOCKS_AND_WARPS:
        grpo.BLOCK, grpo.FORWARD_WARPS, grpo.BACKWARD_WARPS = block, warps, warps
        name = f"ours, block {block}, {warps} warps"
        results.append(measure(name, lambda: grpo.grpo_loss_triton(**s, inplace=True), [s["logits"]], repeats))
    return results


def losses_of_logits(s, repeats):
    fused = torch.compile(eager, dynamic=False)
    rivals = {"ours, in place": lambda: grpo.grpo_loss_triton(**s, inplace=True),
              "ours": lambda: grpo.grpo_loss_triton(**s),
              "Liger-Kernel, in place": lambda: liger(**s),
              "torch.compile": lambda: fused(**s),
              "eager PyTorch": lambda: eager(**s)}
    return [measure(name, loss, [s["logits"]], repeats) for name, loss in rivals.items()]


def losses_of_hidden_states(s, rows, V, H, device, repeats):
    hidden = torch.randn(rows, H, device=device).bfloat16().mul_(H ** -0.25).requires_grad_()
    head = torch.randn(V, H, device=device).bfloat16().mul_(H ** -0.25).requires_grad_()
    results = []
    for chunk in (1024, 2048, 3072, 4096):
        name = f"ours, linear, {chunk} rows a chunk"
        loss = lambda: kernels.linear_grpo_loss(hidden, head, **s, chunk=chunk)  # noqa: E731
        results.append(measure(name, loss, [hidden, head], repeats))
    whole = lambda: kernels.grpo_loss(hidden @ head.T, **s, inplace=True)  # noqa: E731
    results.append(measure("linear, materialised", whole, [hidden, head], repeats))
    results.append(measure("linear, Liger-Kernel", lambda: liger_linear(hidden, head, **s), [hidden, head], repeats))
    with torch.no_grad():
        z = hidden @ head.T
        products = clock(lambda: (torch.mm(hidden, head.T, out=z), z @ head, z.T @ hidden), repeats)
    return [*results, {"name": "linear, its three products alone", "total": products}]


# ------------------------------------------------------------------------------------------------------- 4. table


def main():
    """Prints the table; writes the JSON where --out asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768 if CUDA else 16, help="a multiple of 8")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936] if CUDA else [1000])
    parser.add_argument("--hidden", type=int, default=896 if CUDA else 16)
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 1)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    if args.rows % 8 or args.rows // 8 < 2 or args.rows == 64:
        parser.error(f"--rows {args.rows}: must be a multiple of 8, at least 16, and not 64")
    device = torch.device("cuda" if CUDA else "cpu")
    machine = torch.cuda.get_device_name() if CUDA else f"interpreter on {platform.machine()}: times mean nothing"
    if not CUDA:
        kernels.backend = lambda device: "triton"        # linear_grpo_loss too runs on the interpreted kernels
    report = {"machine": machine, "torch": torch.__version__, "triton": grpo.triton.__version__, "rows": args.rows,
              "errors": {}, "tables": {}}
    print(f"{machine}, torch {report['torch']}, triton {report['triton']}")
    for dtype in (torch.float32, torch.bfloat16):
        gaps = errors(min(args.rows, 512), args.vocab[0], dtype, device)
        report["errors"][str(dtype)] = gaps
        print(f"{dtype}: largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in gaps.items()))
    for V in args.vocab:
        results, copy = compare(args.rows, V, args.hidden, device, args.repeats, args.sweep)
        report["tables"][V] = {"copy_GB_per_s": copy, "results": results}
        print_table(f"{args.rows} rows of {V} bf16 logits, copy {copy:.0f} GB/s", results)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{args.out}: written")


def print_table(title, results):
    print(f"\n{title}")
    print(" " * 34 + "".join(f"{head:>{width}}" for _, head, _, width in COLUMNS))
    for r in results:
        row = r.get("failed", "")
        for key, _, form, width in COLUMNS:
            if "failed" not in r:
                cell = format(r[key], form) if key in r else ""
                row += f"{cell:>{width}}"
        print(f"{r['name']:34}{row}")


if __name__ == "__main__":
    main()
