"""The README's figure: success and leak over the steps of training, one line per reward, a band over its seeds.

    python tests/plot_curves.py runs/tiny-math runs/tiny-code --out tests/results/curves.svg

Reads planner-MODE-seedS/metrics.jsonl of finished and of running trainings; a step without the metric (heldout_success
is measured every --eval_every steps) is left out. Needs matplotlib, which nothing else here does. Lines are means over
seeds of running means of 5 measurements; the band goes from the lowest to the highest seed.
"""
import argparse
import json
import re
import sys
from pathlib import Path

COLORS = {"exec_only": "#c2571a", "tracelift": "#1f6f8b"}


def measured(log: Path, metric: str) -> dict[int, float]:
    """{step: value} of a log. The half line at the end of a running or stopped training is no line yet."""
    values = {}
    for number, line in enumerate(log.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if record.get(metric) is not None:
                values[int(record["step"]) + 1] = float(record[metric])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{log}:{number}: damaged ({error!r}); delete this line") from None
    return values


def curves(run_dir: Path, metric: str) -> dict[str, list[dict[int, float]]]:
    """{reward: one curve {step: running mean of 5 measurements} per seed}."""
    found: dict[str, list[dict[int, float]]] = {}
    for log in sorted(run_dir.glob("planner-*/metrics.jsonl")):
        match = re.fullmatch(r"planner-(.+)-seed\d+(\.partial)?", log.parent.name)
        values = measured(log, metric)
        if match and values:
            seen, curve = list(values.values()), {}
            for i, step in enumerate(values):
                window = seen[max(0, i - 4):i + 1]
                curve[step] = sum(window) / len(window)
            found.setdefault(match[1], []).append(curve)
    return found


def draw(axis, run_dir: Path, metric: str) -> int:
    """One panel. Returns the number of curves in it."""
    found = curves(run_dir, metric)
    for number, (reward, seeds) in enumerate(found.items()):
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        columns = [[seed[step] for seed in seeds] for step in steps]
        color = COLORS.get(reward, f"C{number + 2}")
        axis.plot(steps, [sum(c) / len(c) for c in columns], color=color, label=reward)
        axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, lw=0)
    axis.set(title=f"{run_dir.name}: {metric}", xlabel="step", ylim=(0, 1))
    axis.grid(alpha=0.3)
    return sum(map(len, found.values()))


def main(argv) -> int:
    """Draws the panels; 2 and one line on stderr where there is nothing to draw, or no matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    parser.add_argument("--metrics", nargs="+", default=["success", "leak"])
    args = parser.parse_args(argv)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("error: needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    matplotlib.rcParams["svg.hashsalt"] = "curves"                      # equal inputs, equal bytes
    columns = len(args.run_dirs) * len(args.metrics)
    figure = Figure(figsize=(3.4 * columns, 2.9), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    panels = [(run_dir, metric) for run_dir in args.run_dirs for metric in args.metrics]
    try:
        drawn = [draw(axis, run_dir, metric) for axis, (run_dir, metric) in zip(axes, panels)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not all(drawn):
        empty = panels[drawn.index(0)]
        print(f"error: {empty[0]}: no planner-*/metrics.jsonl with {empty[1]}; train one first", file=sys.stderr)
        return 2
    axes[0].legend(fontsize="small", loc="lower right")
    figure.savefig(args.out, format=args.out.suffix[1:] or "svg", metadata={"Date": None} if args.out.suffix == ".svg" else None)
    print(f"{args.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
