"""The study's figures. Every function returns ``(figure, plotted)``, the frame that was drawn; intervals are t intervals at 95%."""

import io
import tomllib
from pathlib import Path
from textwrap import fill

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import NullLocator

from kdlib import results, stats, store
from kdlib.presets import Metric

LOOKS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
GROUPS = [("#222222", "s", "#222222"), ("#222222", "o", "white"), ("#888888", "^", "#888888"), ("#555555", "v", "white"), ("#AAAAAA", "D", "#AAAAAA")]
STYLE = {arm: dict(zip(("color", "marker", "linestyle", "label"), look)) for arm, look in LOOKS.items()}
OPTIONS = {"svg.hashsalt": "kdlib", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
           "grid.alpha": 0.3, "figure.constrained_layout.use": True}

axes = matplotlib.rc_context(OPTIONS)(lambda width=6.4, height=4.0: plt.subplots(figsize=(width, height)))


def lines(ax, runs: pd.DataFrame, value: str, by: str, x: str, label: str, looks: dict) -> tuple[pd.DataFrame, list]:
    """One line for each value of ``by`` in ``looks``: mean and t interval over seeds, seeds as dots. Returns what is drawn, and names."""
    tables, ends, arms = [], [], [arm for arm in looks if arm in set(runs[by])]
    for place, arm in enumerate(arms):
        look, own = looks[arm], runs[runs[by] == arm]
        found = [(arm, at, *stats.paired_interval(g[value])[:4]) for at, g in own.groupby(x)]
        table = pd.DataFrame(found, columns=[by, x, "mean", "ci_low", "ci_high", "n_seeds"])
        mean, shift = table["mean"], 1.25 ** ((place - (len(arms) - 1) / 2) / max(4, len(arms)))
        ax.errorbar(table[x] * shift, mean, [mean - table.ci_low, table.ci_high - mean], capsize=3, markersize=6, **look)
        ax.scatter(own[x] * shift * 1.03, own[value], s=9, color=look["color"], alpha=0.45, linewidths=0)
        ends.append((mean.iloc[-1], look))
        tables.append(table)
    ticks = sorted(runs[x].dropna().unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{b:,.0f}" for b in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    return pd.concat(tables, ignore_index=True), ends


def _names(ax, ends: list[tuple]) -> None:
    """A key (height, look) beside the lines' right ends: dash, marker and name, moved apart where they would overlap."""
    (low, high), lowest = ax.get_ylim(), -1.0
    for y, look in sorted((end for end in ends if end[1]["label"]), key=lambda end: end[0]):
        lowest = max((y - low) / (high - low), lowest + 0.06)
        ax.plot([1.01, 1.04, 1.07], [lowest] * 3, transform=ax.transAxes, clip_on=False, markersize=5, markevery=[1], **look)
        ax.annotate(look["label"], (1.085, lowest), xycoords="axes fraction", va="center", color=look["color"],
                    fontweight="normal" if look["color"] == "0.4" else "bold")


def score_vs_budget(frame: pd.DataFrame, metric: Metric, by: str = "method", x: str = "budget", label: str = "training examples (log scale)"):
    """Score against ``x``, one line for each value of ``by``; dotted lines for the untuned student and for a teacher that all share, or where
    they are far off their values with an arrow.
    """
    fig, ax = axes()
    table, ends = lines(ax, frame, metric.name, by, x, label, STYLE)
    middle, spread = (frame[metric.name].max() + frame[metric.name].min()) / 2, frame[metric.name].max() - frame[metric.name].min()
    for column, name in (("untuned", "untuned student"), ("teacher", "teacher")):
        if len(values := frame.get(f"{column}_{metric.name}", pd.Series(dtype=float)).dropna().unique()) == 1:
            table[column] = value = values[0]
            if abs(value - middle) > spread:  # it would leave the lines half of the figure or less
                above = value > middle
                ax.annotate(f"{name}: {value:.3g} {'↑' if above else '↓'}", (0.01, 0.97 if above else 0.03), xycoords="axes fraction", va="center", color="0.4", fontsize=9)
                continue
            ax.axhline(value, color="0.5", linewidth=1, linestyle=":")
            ends.append((value, {"label": name, "color": "0.4", "linestyle": ":"}))
    _names(ax, ends)
    ax.set_ylabel(metric.label + ("" if metric.higher_is_better else "\n(lower is better)"))
    ax.set_title(f"{metric.label[0].upper()}{metric.label[1:]}:\nmean, 95% interval, {frame.seed.nunique()} seeds (dots)", fontsize=10, loc="left")
    return fig, table


def gap_vs_budget(gaps: pd.DataFrame, metric: Metric, arms: tuple = ()):
    """Paired gaps against budget, one line for each of ``arms`` (column ``arm``), by default KD's alone: zero line and ±δ band besides."""
    fig, ax = axes()
    ax.axhspan(-metric.delta, metric.delta, color="0.88", zorder=0)
    ax.axhline(0, color="0.3", linewidth=1)
    looks, own = {a: STYLE[a] for a in arms or ["gap"]}, gaps if arms else gaps.assign(arm="gap")
    table, ends = lines(ax, own, "gap", "arm", "budget", "training examples (log scale)", looks)
    for text, height in (("better than SFT ↑", 0.97), ("worse ↓", 0.03)):
        ax.annotate(text, (0.99, height), xycoords="axes fraction", ha="right", va="center", fontsize=9, color="0.3")
    _names(ax, ends)
    ax.set_ylabel(metric.gap_label)
    ax.set_title(f"Paired gap by data budget: mean, 95% interval, {table.n_seeds.min()} seeds (dots);\n"
                 f"in the grey band, ±δ = {metric.delta:g}, a gap does not matter", fontsize=10, loc="left")
    return fig, own[["arm", "budget", "seed", "gap"]].merge(table.rename(columns={"mean": "mean_gap"}), on=["arm", "budget"])


def intervals(table: pd.DataFrame, label: str, row: str, group: str, delta: float = 0.0):
    """Estimates (``gap, ci_low, ci_high``) as dots with intervals, one line of the figure a ``row``, its groups side by side."""
    order = table[table[group] == table[group].iloc[0]].sort_values("gap")[row].tolist()
    fig, ax = axes(6.4, 1.4 + 0.36 * len(order))
    ax.axvspan(-delta, delta, color="0.88", zorder=0)
    ax.axvline(0, color="0.3", linewidth=1)
    for place, (name, sub) in enumerate(table.groupby(group, sort=False)):
        color, marker, face = GROUPS[place % len(GROUPS)]
        sub, up = sub.set_index(row).loc[order], 0.26 * ((table[group].nunique() - 1) / 2 - place)
        ax.errorbar(sub.gap, [i + up for i in range(len(order))], xerr=[sub.gap - sub.ci_low, sub.ci_high - sub.gap], capsize=2,
                    linestyle="none", label=name, color=color, marker=marker, markerfacecolor=face)
    ax.set_yticks(range(len(order)), [STYLE.get(s, {"label": s.replace("_", " ")})["label"] for s in order])
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)
    fig.supxlabel("\n".join(fill(line, 84) for line in label.split("\n")), fontsize=9)
    return fig, table


def save(fig, plotted: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG and the plotted frame as CSV under ``folder/figures``; the same data, the same bytes."""
    target = folder / "figures"
    results.write_table(plotted, target / f"{name}.csv")
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with matplotlib.rc_context(OPTIONS), io.BytesIO() as buffer:
            fig.savefig(buffer, format=form, dpi=150, metadata=metadata)
            store.write_atomic(target / f"{name}.{form}", buffer.getvalue())
