"""The results as one picture, SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

mpl.use("agg")

from matplotlib.figure import Figure

from benchmarks.cases import OURS
from benchmarks.phases import REST
from benchmarks.report import Results, short_kernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.measure import Series

_INK: Final = "#1f2933"
_QUIET: Final = "#7b8794"
_GRID: Final = "#e4e7eb"
_OURS: Final = "#0b7285"
_OURS_LIGHT: Final = "#99d1da"
_THEIRS: Final = "#adb5bd"
# Cold for what is ours, warm for what is crun's, grey for the rest.
_PHASE_COLOURS: Final = (
    "#c5f6fa", "#66d9e8", "#3bc9db", "#0c8599", "#0b7285", "#ffd8a8", "#ff922b", "#b2f2bb",
    "#69db7c", "#2f9e44", "#d0bfff", "#9775fa", "#dee2e6",
)  # fmt: skip
_STYLE: Any = {  # the keys are a type of 300 literals
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _QUIET,
    "ytick.color": _INK,
    "svg.hashsalt": "unisandbox",
}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write bench.svg and bench.png; the paths. What was not measured has no panel."""
    with mpl.rc_context(_STYLE):
        figure = _figure(results)
        written = [directory / "bench.svg", directory / "bench.png"]
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=150)
    return written


def _figure(results: Results) -> Figure:
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.25, 1.0, 1.0))
    _bars(figure.add_subplot(grid[0, 0]), results, "first", "Create to the first result of /bin/true, ms")
    _bars(figure.add_subplot(grid[0, 1]), results, "again", "Another run of /bin/true, ms")
    _phases(figure.add_subplot(grid[1, :]), results)
    _scaling(figure.add_subplot(grid[2, 0]), results)
    _aims(figure.add_subplot(grid[2, 1]), results)
    host = results.host
    figure.suptitle(
        f"unisandbox {host['unisandbox']} against the bare tools: Linux {short_kernel(host)}, {host['cpus']} CPUs, "
        f"Python {host['python']}",
        x=0.012,
        ha="left",
        fontsize=11,
    )
    return figure


def _bars(axes: Axes, results: Results, case: str, title: str) -> None:
    """Medians as bars, p10 to p90 as lines."""
    axes.set_title(title)
    outcome = results.outcomes.get(case)
    if outcome is None:
        _nothing(axes)
        return
    shown = {name: series for name, series in outcome.series.items() if ": " not in name}
    names = sorted(shown, key=lambda name: shown[name].median, reverse=True)
    medians = [shown[name].median for name in names]
    colours = [_OURS if name == OURS else _OURS_LIGHT if name.startswith(OURS) else _THEIRS for name in names]
    places = range(len(names))
    axes.barh(places, medians, color=colours, height=0.62)
    for place, name in zip(places, names, strict=True):
        series = shown[name]
        low, high = series.quantile(10), series.quantile(90)
        axes.plot([low, high], [place, place], color=_INK, linewidth=0.9, alpha=0.65, solid_capstyle="butt")
        axes.text(max(series.median, high), place, f"  {series.median:.1f}", va="center", fontsize=8, color=_INK)
    axes.set_yticks(list(places), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(shown[name].quantile(90) for name in names) * 1.14)
    axes.xaxis.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _phases(axes: Axes, results: Results) -> None:
    """One stacked bar."""
    axes.set_title("Where the time from create to the first result goes, ms (medians of exclusive times)")
    if not results.phases:
        _nothing(axes)
        return
    left = 0.0
    whole = sum(series.median for series in results.phases.values())
    handles, labels = [], []
    for (name, series), colour in zip(results.phases.items(), _PHASE_COLOURS, strict=True):
        bar = axes.barh([0], [series.median], left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.5)
        if series.median > whole * 0.035:
            dark = colour in {"#0c8599", "#0b7285", "#2f9e44", "#9775fa"}
            axes.text(
                left + series.median / 2,
                0,
                f"{series.median:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else _INK,
            )
        handles.append(bar)
        labels.append(f"{'the rest' if name == REST else name} ({series.median:.2f})")
        left += series.median
    axes.set_xlim(0, whole)
    axes.set_ylim(-0.4, 0.4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=8,
        handlelength=1.0, handleheight=1.0,
    )  # fmt: skip


def _scaling(axes: Axes, results: Results) -> None:
    """Sandboxes at the same time: milliseconds for each."""
    axes.set_title("Many at the same time, ms for each")
    lines: dict[str, list[tuple[int, Series]]] = {}
    for name, outcome in results.outcomes.items():
        if name.startswith("parallel-"):
            for label, series in outcome.series.items():
                lines.setdefault(label, []).append((int(name.partition("-")[2]), series))
    if not lines:
        _nothing(axes)
        return
    style = {OURS: (_OURS, "-", "o"), f"{OURS} with remove": (_OURS, "--", "o"), "crun run": ("#e8590c", "-", "s")}
    for label, points in lines.items():
        colour, line, marker = style.get(label, (_QUIET, "-", "D"))
        numbers = [number for number, _ in points]
        each = [series.median / number for number, series in points]
        spread = [[s.quantile(10) / n for n, s in points], [s.quantile(90) / n for n, s in points]]
        axes.plot(numbers, each, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        axes.fill_between(numbers, spread[0], spread[1], color=colour, alpha=0.10, linewidth=0)
    highest = max(series.quantile(90) / number for points in lines.values() for number, series in points)
    axes.set_ylim(0, highest * 1.35)
    axes.set_xticks(sorted({number for points in lines.values() for number, _ in points}))
    axes.set_xlabel("at the same time")
    axes.yaxis.grid(color=_GRID)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")


def _aims(axes: Axes, results: Results) -> None:
    """Each aim as a part of its limit."""
    axes.set_title("Aims, as a part of the limit")
    aims = list(reversed(results.aims()))
    if not aims:
        _nothing(axes)
        return
    parts = [(aim.value or 0.0) / aim.limit for aim in aims]
    axes.barh(range(len(aims)), parts, color=[_OURS if aim.reached else "#e8590c" for aim in aims], height=0.55)
    axes.axvline(1.0, color=_INK, linewidth=1.0, linestyle=":")
    for place, (aim, part) in enumerate(zip(aims, parts, strict=True)):
        text = f"{aim.value:.2f} {aim.unit} of {aim.limit:g}"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(part + 0.04, place, text, va="center", fontsize=8, bbox=behind)
    axes.set_yticks(range(len(aims)), [aim.name for aim in aims])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(1.0, *parts) * 1.55)
    axes.spines["left"].set_visible(False)


def _nothing(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", color=_QUIET)
