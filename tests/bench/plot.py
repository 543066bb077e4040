"""Draws what sleep and wake cost by size and by number of blocks, from the results of `scripts/bench scale`.

Usage: plot.py RESULTS.json PICTURE.svg
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

SHOWN = {
    "first sleep": "first sleep",
    "sleep again, unchanged": "sleep again, nothing changed",
    "wake": "wake",
}


def series(rows, what, key):
    """Median seconds by `key`."""
    found = {}
    for row in rows:
        if row["what"] == what:
            found.setdefault(row[key], []).append(row["seconds"])
    return sorted((x, sorted(values)[len(values) // 2]) for x, values in found.items())


def draw(axes, rows, key, label):
    for what, name in SHOWN.items():
        points = series(rows, what, key)
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, which="major", linewidth=0.3)


def main():
    source, target = sys.argv[1:]
    with open(source) as file:
        results = json.load(file)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    draw(left, results["by_size"], "gib", "GiB in blocks of 32 MiB")
    total = max(row.get("gib", 0) for row in results["by_blocks"])
    draw(right, results["by_blocks"], "blocks", f"blocks, {total:g} GiB in all")
    left.set_ylabel("seconds")
    left.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Sleep and wake on {results['machine']['gpu']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target)


if __name__ == "__main__":
    main()
