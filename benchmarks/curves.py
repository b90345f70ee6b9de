"""Joins reports of `sfumato eval` in one picture: accuracy against tokens per forward, a curve per label.

    python -m benchmarks.curves --out docs/images/words "teacher=A/report.json" "student:d3llm=B/report.json"

A label may name one algorithm of its report behind a colon; without one, every algorithm is drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_MARKERS = "osD^vPXhd*"


def curves(argument: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (label, points by rising TPF) of one argument."""
    label, _, path = argument.partition("=")
    name, _, only = label.partition(":")
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    found = []
    for curve in report["curves"]:
        if only and curve["algorithm"] != only:
            continue
        points = [point for point in curve["points"] if point["tpf"] is not None]
        shown = name if only else f"{name}, {curve['algorithm']}"
        found.append((shown, sorted(points, key=lambda point: float(point["tpf"]))))
    return found


def draw(title: str, drawn: list[tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    """Write out.png and out.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "sfumato"
    figure, axes = pyplot.subplots(figsize=(10.0, 5.0))
    colours = pyplot.get_cmap("tab20").colors
    for index, (label, points) in enumerate(drawn):
        # Strong colours first, then the pale ones of the same map.
        colour = colours[2 * index % 20 + 2 * index // 20]
        x, y = [point["tpf"] for point in points], [point["accuracy"] for point in points]
        low = [point["accuracy"] - point["accuracy_low"] for point in points]
        high = [point["accuracy_high"] - point["accuracy"] for point in points]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(x, y, label=label, marker=marker, color=colour, linewidth=1.3, markersize=5)
        axes.errorbar(x, y, yerr=[low, high], color=colour, alpha=0.3, fmt="none", linewidth=0.8)
    axes.set_xlabel("tokens per forward (TPF)")
    axes.set_ylabel("exact answers, percent (95 % interval)")
    axes.set_title(title)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(
            out.with_suffix(f".{kind}"), dpi=130, metadata={"Date": None} if kind == "svg" else None
        )


def table(drawn: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """Return the points as a markdown table."""
    lines = ["| curve | setting | exact answers | TPF |", "| --- | --- | --- | --- |"]
    for label, points in drawn:
        for point in points:
            setting = f"{point['parameter']} {point['value']}"
            lines.append(f"| {label} | {setting} | {point['accuracy']:.1f} % | {point['tpf']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="LABEL[:ALGORITHM]=REPORT")
    parser.add_argument("--title", default="Accuracy against parallelism")
    parser.add_argument("--out", type=Path, required=True, help="picture without its ending")
    options = parser.parse_args()
    drawn = [curve for argument in options.reports for curve in curves(argument)]
    draw(options.title, drawn, options.out)
    print(table(drawn))


if __name__ == "__main__":
    main()
