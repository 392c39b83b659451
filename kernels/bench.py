"""Right first, then fast: the fused kernels beside eager PyTorch, torch.compile and, where installed, Liger-Kernel.

    python -m kernels.bench                    32768 rows of 49152 and of 151936 logits in bf16: a GPU of 80 GB
    python -m kernels.bench --rows 4096        fits a card of 8 GB
    python -m kernels.bench --sweep            block sizes and warps instead of rivals

Errors are of an off-policy step. Times are of an on-policy one, in which every row has a gradient whatever the logits
hold (clipped rows need no backward, and in-place ones overwrite the logits): medians of CUDA events after a warm-up. A
share is that of the bandwidth of a copy in the same run; peak is memory beyond the inputs. The linear loss does part of
its backward in the forward: look at its total. The numbers go to kernels/bench.json. Without CUDA a few rows run in
Triton's interpreter: their errors are real (its fused multiply-adds round twice), their times mean nothing.
"""
import argparse
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"                 # before triton is imported
import kernels  # noqa: E402
from kernels import grpo  # noqa: E402


def step(rows, V, dtype, device):
    """grpo_loss arguments of one optimizer step; the last position of every sequence has weight 0, as in training."""
    g = torch.Generator(device).manual_seed(0)
    B = 64 if rows % 64 == 0 else 8                      # sequences
    T = rows // B
    mask = (torch.arange(T, device=device) < T - 1).expand(B, T)
    logits = torch.empty(rows, V, dtype=dtype, device=device)
    for part in logits.split(1024):                      # in parts: the random float32 would outgrow the card
        part.copy_(torch.randn(part.shape, generator=g, device=device) * 3)
    target = torch.randint(V, (rows,), generator=g, device=device)
    old = torch.cat([kernels.token_logp(x, t)[0] for x, t in zip(logits.split(1024), target.split(1024))])
    old += torch.randn(rows, generator=g, device=device) * 0.2
    return dict(logits=logits, target=target, reward=torch.rand(B, generator=g, device=device),
                seq=torch.arange(B, device=device, dtype=torch.int32).repeat_interleave(T),
                weight=kernels.token_weights(mask).flatten(), group_size=8, old_logp=old)


def errors(rows, V, dtype, device):
    """Largest errors of loss, log-prob and gradient (of its maximum) against float64 on the same inputs."""
    s = step(rows, V, dtype, device)
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in s.items()}
    x, y = s["logits"].requires_grad_(), exact["logits"].requires_grad_()
    ours, truth = grpo.grpo_loss(**s), kernels.grpo_loss_reference(**exact)
    ours[0].backward(), truth[0].backward()
    gap = lambda a, b: (a.double() - b).abs().max().item()
    naive = s["logits"].detach().log_softmax(-1).gather(1, s["target"][:, None])[:, 0]
    return {"loss": gap(ours[0], truth[0]), "logp": gap(ours[1], truth[1]),
            "gradient": gap(x.grad, y.grad) / y.grad.abs().max().item(),
            f"logp of torch.log_softmax in {dtype}": gap(*(v[s["weight"] > 0] for v in (naive, truth[1])))}


def eager(logits, target, reward, seq, weight, group_size, old_logp):
    """The loss as one writes it in PyTorch, the log-softmax in float32."""
    r = reward.view(-1, group_size)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)).flatten()[seq.long()]
    logq = torch.log_softmax(logits.float(), -1)
    logp = logq.gather(1, target[:, None])[:, 0]
    rho = (logp - (logp.detach() if old_logp is None else old_logp)).exp()
    with torch.no_grad():
        entropy = -(logq.exp() * logq).sum(-1)
    return -(weight * torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)).sum(), entropy


def liger(logits, target, reward, seq, weight, group_size, old_logp):
    """Liger-Kernel's Triton loss of the same tokens: it takes (B, L + 1, V) and drops each last position itself."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    cut = lambda x: None if x is None else x.view(len(reward), -1)[:, :-1].contiguous()
    per_token = triton_grpo_loss(logits.view(len(reward), -1, logits.shape[1]), cut(old_logp), None, cut(target),
                                 kernels.group_advantage(reward, group_size), temperature=1.0, beta=0.0, eps_low=0.2,
                                 eps_high=0.2, inplace=True)[0]
    return (per_token * cut(weight)).sum(), None


def liger_linear(hidden, head, target, reward, seq, weight, group_size, old_logp):
    """Liger-Kernel's chunked linear loss, one sequence a chunk, its default; it compiles its chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    shape = lambda x: None if x is None else x.view(len(reward), -1)
    return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
                hidden.view(len(reward), -1, hidden.shape[1]), head, shape(target), shape((weight > 0).float()),
                kernels.group_advantage(reward, group_size), old_per_token_logps=shape(old_logp))[0], None


def clock(work, repeats):
    """Median milliseconds of work()."""
    if not CUDA:
        begin = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - begin)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for begin, end in events:                            # one wait at the end: the host stays ahead and is not timed
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events[3:])


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
        before = torch.cuda.memory_allocated() if CUDA else 0
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if CUDA else 0.0
        return {"name": name, "forward": clock(loss, repeats), "total": clock(both, repeats), "peak": peak}
    except Exception as error:                           # a rival that is not installed, fails or outgrows the card
        if name.startswith("ours"):
            raise
        return {"name": name, "failed": f"{type(error).__name__}: {str(error)[:70]}".splitlines()[0]}
    finally:
        clear()


def compare(rows, V, H, device, repeats, sweep):
    """The results for one vocabulary, and the bandwidth of a copy in GB/s."""
    s = step(rows, V, torch.bfloat16, device)
    copy = copy_bandwidth(s["logits"], repeats)
    s["logits"].requires_grad_()
    s["old_logp"] = None
    at = functools.partial(measure, leaves=[s["logits"]], repeats=repeats)
    if sweep:
        results = []
        for block, warps in [(2048, 1), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8)]:
            grpo.BLOCK, grpo.FORWARD_WARPS, grpo.BACKWARD_WARPS = block, warps, warps
            results.append(at(f"ours, block {block}, {warps} warps", lambda: grpo.grpo_loss(**s, inplace=True)))
    else:
        fused = torch.compile(eager, dynamic=False)
        results = [at("ours, in place", lambda: grpo.grpo_loss(**s, inplace=True)),
                   at("ours", lambda: grpo.grpo_loss(**s)), at("Liger-Kernel, in place", lambda: liger(**s)),
                   at("torch.compile", lambda: fused(**s)), at("eager PyTorch", lambda: eager(**s))]
    for r in results:
        if "total" in r:
            r["backward"], size = r["total"] - r["forward"], 2 * rows * V / 1e6
            r |= {"forward_share": size / r["forward"] / copy, "backward_share": 2 * size / r["backward"] / copy}
    if sweep:
        return results, copy
    del s["logits"]
    hidden, head = (torch.randn(n, H, device=device).bfloat16().mul_(H ** -0.25).requires_grad_() for n in (rows, V))
    at = functools.partial(measure, leaves=[hidden, head], repeats=max(1, repeats // 4))
    results += [at(f"ours, linear, {n} rows a chunk", lambda: kernels.linear_grpo_loss(hidden, head, **s, chunk=n))
                for n in (1024, 2048, 3072, 4096)]
    results += [at("linear, materialised", lambda: kernels.grpo_loss(hidden @ head.T, **s, inplace=True)),
                at("linear, Liger-Kernel", lambda: liger_linear(hidden, head, **s))]
    with torch.no_grad():
        z = hidden @ head.T
        products = clock(lambda: (torch.mm(hidden, head.T, out=z), z @ head, z.T @ hidden), max(1, repeats // 4))
    return [*results, {"name": "linear, its three products alone", "total": products}], copy


def main():
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768 if CUDA else 16, help="a multiple of 8")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936] if CUDA else [1000])
    parser.add_argument("--hidden", type=int, default=896 if CUDA else 16)
    parser.add_argument("--repeats", type=int, default=20 if CUDA else 1)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", default=str(Path(__file__).with_name("bench.json")))
    args = parser.parse_args()
    if args.rows % 8 or args.rows // 8 < 2 or args.rows == 64:
        parser.error(f"--rows {args.rows}: must be a multiple of 8, at least 16, and not 64")
    device = torch.device("cuda" if CUDA else "cpu")
    machine = torch.cuda.get_device_name() if CUDA else f"interpreter on {platform.machine()}: times mean nothing"
    if not CUDA:
        kernels.grpo_loss = grpo.grpo_loss               # linear_grpo_loss too runs on the interpreted kernels
    report = {"machine": machine, "torch": torch.__version__, "triton": grpo.triton.__version__, "rows": args.rows,
              "errors": {str(dtype): errors(min(args.rows, 512), args.vocab[0], dtype, device)
                         for dtype in (torch.float32, torch.bfloat16)}, "tables": {}}
    print(f"{machine}, torch {report['torch']}, triton {report['triton']}")
    for dtype, gap in report["errors"].items():
        print(f"{dtype}: largest error against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in gap.items()))
    for V in args.vocab:
        results, copy = compare(args.rows, V, args.hidden, device, args.repeats, args.sweep)
        report["tables"][V] = {"copy_GB_per_s": copy, "results": results}
        print(f"\n{args.rows} rows of {V} bf16 logits, copy {copy:.0f} GB/s\n"
              f"{'':34}{'forward ms':>12}{'share':>7}{'backward ms':>13}{'share':>7}{'total ms':>10}{'peak GB':>9}")
        for r in results:
            cell = lambda key, form, width: f"{format(r[key], form) if key in r else '':>{width}}"
            print(f"{r['name']:34}" + r.get("failed", cell("forward", ".2f", 12) + cell("forward_share", ".0%", 7)
                  + cell("backward", ".2f", 13) + cell("backward_share", ".0%", 7) + cell("total", ".2f", 10)
                  + cell("peak", ".2f", 9)))
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{args.out}: written")


if __name__ == "__main__":
    main()
