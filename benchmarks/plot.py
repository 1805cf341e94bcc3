"""`python -m benchmarks.plot`: draws the newest result of each benchmark into docs/pictures/.

A picture without a result does not change. Needs matplotlib: pip install -e '.[bench]'.
"""

import statistics
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.gpu.workloads import Row
from benchmarks.support.record import ROOT, read_results

PICTURES = ROOT / "docs" / "pictures"
PARTS = (
    "schedule",
    "plan",
    "apply",
    "text",
    "encode",
)  # of a step; older results have no "plan"

Result = dict[str, Any]


def draw_engine(result: Result) -> None:
    """Stacked parts of a step, and the target."""
    _, axes = plt.subplots(figsize=(7, 3.2))
    rows = result["figures"]["runs"]
    labels = [f"{row['sequences']} sequences" for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["ms_per_step"].get(part, 0.0) for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, without the model (dashed: target for 256 sequences)")
    axes.legend(frameon=False, loc="upper right")
    _save("engine", result, axes)


def draw_http_path(result: Result) -> None:
    """Age of tokens on arrival at growing rates, one line for each number of streams."""
    _, axes = plt.subplots(figsize=(7, 3.2))
    runs = result["figures"]["runs"]
    for streams in sorted({run["streams"] for run in runs}):
        mine = [run for run in runs if run["streams"] == streams]
        rates = [run["tokens_per_s"] / 1000 for run in mine]
        for name, style in (("age_ms_p50", "o-"), ("age_ms_p99", "o--")):
            axes.plot(rates, [run[name] for run in mine], style, label=f"{streams} streams, {name[-3:]}")
    axes.axvline(25, color="black", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("thousand tokens a second that arrived (dashed: target)")
    axes.set_ylabel("ms from step to socket")
    axes.legend(frameon=False)
    _save("http_path", result, axes)


def draw_serve(result: Result) -> None:
    """Tokens a second by number of streams, a bar for each server."""
    _, axes = plt.subplots(figsize=(7, 3.2))
    runs, servers = result["figures"]["runs"], result["figures"]["servers"]
    streams = sorted({run["streams"] for run in runs})
    width = 0.8 / len(servers)
    for number, server in enumerate(servers):
        medians = [
            statistics.median(run["tok_s"] for run in runs if (run["server"], run["streams"]) == (server, count))
            for count in streams
        ]
        places = [place + (number - (len(servers) - 1) / 2) * width for place in range(len(streams))]
        axes.bar_label(axes.bar(places, medians, width, label=server), fmt="%.0f")
    axes.set_xticks(range(len(streams)), [f"{count} stream{'s' if count > 1 else ''}" for count in streams])
    axes.set_ylabel("tokens a second")
    axes.legend(frameon=False)
    _save("serve", result, axes)


def draw_endless(result: Result) -> None:
    """Memory and time per token along the stream."""
    _, axes = plt.subplots(figsize=(7, 3.2))
    rows = result["figures"]["rows"]
    tokens = [row["tokens"] / 1000 for row in rows]
    times_ms, memory_mib = ([row[name] for row in rows] for name in ("ms_per_token_median", "resident_mib"))
    axes.plot(tokens, times_ms, color="C0")
    axes.set_ylim(0, 2 * max(times_ms))
    axes.set_xlabel(f"thousand tokens of one stream ({result['figures']['model']} model)")
    axes.set_ylabel("ms a token (median)", color="C0")
    memory = axes.twinx()
    memory.plot(tokens, memory_mib, color="C1")
    memory.set_ylim(0, 1.3 * max(memory_mib))
    memory.set_ylabel("resident MiB", color="C1")
    memory.spines["top"].set_visible(False)
    _save(f"endless-{result['figures']['model']}", result, axes)


def draw_gpu(runs: list[Result]) -> None:
    """Ratio of the newest figure of every work to the peer's, and which targets are met."""
    result, results = runs[-1], {}
    for run in runs:
        results |= {work: figures for work, figures in run["figures"]["results"].items() if "error" not in figures}
    rows = list(
        {(fields["work"], fields["key"]): Row(**fields) for run in runs for fields in run["figures"]["rows"]}.values()
    )
    shown = [
        (row, measured, ratio)
        for row in rows
        if (measured := results.get(row.work, {}).get(row.key)) and (ratio := row.ratio(measured)) is not None
    ]
    _, axes = plt.subplots(figsize=(7, 0.3 * len(shown) + 0.8))
    colors = ["C0" if row.target is None or row.is_met(measured) else "C1" for row, measured, _ in shown]
    labels = [f"{row.work}, {row.unit}" for row, _, _ in shown]
    bars = axes.barh(range(len(shown)), [ratio for *_, ratio in shown], color=colors)
    axes.bar_label(
        bars,
        [f"{measured:,.0f}" if measured >= 1000 else f"{measured:.3g}" for _, measured, _ in shown],
        fontsize=7,
        padding=2,
    )
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"times as good as noted of {result['figures']['peer']} (orange: our own target is not met)", fontsize=8
    )
    _save("gpu", result, axes, result["device"]["gpu"])


def _save(name: str, result: Result, axes: Axes, machine: str | None = None) -> None:
    """Write the picture, with its title and machine."""
    device = result["device"]
    machine = f"{device['cores']} cores of {device['cpu']}" if machine is None else machine
    axes.set_title(f"{result['taken_at'][:10]}, {machine}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    PICTURES.mkdir(exist_ok=True)
    file = PICTURES / f"{name}.svg"
    axes.figure.savefig(file, bbox_inches="tight", metadata={"Date": None})  # the same results give the same file
    plt.close()
    print(f"drawn: {file.relative_to(ROOT)}")


def main() -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "stellarbyte"
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, for small, readable files
    draw: dict[str, Callable[[Result], None]] = {
        "engine": draw_engine,
        "http_path": draw_http_path,
        "serve": draw_serve,
    }
    for benchmark, draw_newest in draw.items():
        for result in read_results(benchmark)[-1:]:
            draw_newest(result)
    if runs := read_results("gpu"):
        draw_gpu(runs)
    for result in {result["figures"]["model"]: result for result in read_results("endless")}.values():
        draw_endless(result)


if __name__ == "__main__":
    main()
