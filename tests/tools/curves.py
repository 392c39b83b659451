"""Success and leak over the steps of training, as SVG, without any package.

    python tests/tools/curves.py runs/tiny-math runs/tiny-code >tests/results/curves.svg
"""
import html
import json
import re
import sys
from pathlib import Path

COLORS = ("#c2571a", "#1f6f8b", "#6b4f9e", "#4d7c2a", "#a8324a", "#707070")
WIDTH, HEIGHT = 220, 150                                  # pixels of a panel inside its axes


def svg_curves(run_dirs, metrics=("success", "leak")) -> str:
    """A panel for each run folder and metric, a color for each planner. A line is the mean over the planner's seeds of
    running means of 5 steps; its band reaches from the lowest to the highest seed."""
    paths = [path for run_dir in run_dirs for path in sorted(Path(run_dir).glob("planner-*/metrics.jsonl"))]
    name_of = {path: re.sub(r"^planner-|-seed\d+(\.partial)?$", "", path.parent.name) for path in paths}
    names = sorted(set(name_of.values()))
    parts, left = [], 40
    for run_dir in run_dirs:
        for metric in metrics:
            title = html.escape(f"{Path(run_dir).name}: {metric}")
            parts.append(f'<g transform="translate({left} 30)"><text y="-10">{title}</text>'
                         f'<text x="{WIDTH}" y="{HEIGHT + 30}" text-anchor="end">step</text>')
            seeds = {name: [] for name in names}
            for path in paths:
                if path.parent.parent == Path(run_dir):
                    seeds[name_of[path]].append(running_means(path, metric))
            steps = max([1, *(len(curve) for curves in seeds.values() for curve in curves)])
            for value in (0, 0.5, 1):
                y = HEIGHT * (1 - value)
                parts.append(f'<path d="M0 {y}H{WIDTH}" stroke="#ddd"/>'
                             f'<text x="-6" y="{y + 4}" text-anchor="end">{value}</text>')
            for tick in (1, steps):
                x = WIDTH * tick / steps
                parts.append(f'<text x="{x:.0f}" y="{HEIGHT + 16}" text-anchor="middle">{tick}</text>')
            for name, curves in seeds.items():
                columns = list(zip(*filter(None, curves)))                # a column holds one step of all seeds
                x = [WIDTH * (i + 1) / steps for i in range(len(columns))]
                lines = []
                for statistic in (min, max, lambda column: sum(column) / len(column)):
                    y = [HEIGHT * (1 - statistic(column)) for column in columns]
                    lines.append([f"{a:.1f},{b:.1f}" for a, b in zip(x, y)])
                low, high, mean = lines
                color = COLORS[names.index(name) % len(COLORS)]
                parts.append(f'<polygon points="{" ".join(low + high[::-1])}" fill="{color}" fill-opacity="0.2"/>'
                             f'<polyline points="{" ".join(mean)}" fill="none" stroke="{color}" stroke-width="1.6"/>')
            parts.append("</g>")
            left += WIDTH + 50
    for i, name in enumerate(names):
        color = COLORS[i % len(COLORS)]
        parts.append(f'<text x="{40 + 150 * i}" y="{HEIGHT + 85}" fill="{color}">{html.escape(name)}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{HEIGHT + 100}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def running_means(path: Path, metric: str) -> list[float]:
    """One value a step; none where a line lacks the metric. A running training's half last line is left out."""
    values = [json.loads(line).get(metric) for line in path.read_text().split("\n")[:-1]]
    values = [float(value) for value in values if value is not None]
    return [sum(values[max(0, i - 4):i + 1]) / len(values[max(0, i - 4):i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    print(svg_curves(sys.argv[1:]), end="")
