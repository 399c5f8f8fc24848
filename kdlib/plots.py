"""The study's figures. Every function returns ``(figure, plotted)``, the frame that was drawn; intervals are t intervals at 95%."""

import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import NullLocator

from kdlib import results, stats, store
from kdlib.presets import Metric

STYLE = {"sft": {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "SFT"},  # apart in greyscale too
         "kd": {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "KD"}}
GAP = {"color": "#333333", "marker": "D", "linestyle": "-"}
OPTIONS = {"svg.hashsalt": "kdlib", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
           "grid.alpha": 0.3, "figure.constrained_layout.use": True}


axes = matplotlib.rc_context(OPTIONS)(lambda width=6.4, height=4.0: plt.subplots(figsize=(width, height)))


def _budget_axis(ax, budgets) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(budgets), [f"{b:,}" for b in budgets])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training examples (log scale)")


def score_vs_budget(frame: pd.DataFrame, metric: Metric):
    """Score against budget, one line a method: mean and t interval over seeds, seeds as dots."""
    fig, ax = axes()
    tables, ends = [], []
    for method, runs in frame.groupby("method", sort=False):
        style = STYLE[method]
        found = [(method, b, *stats.paired_interval(g[metric.name])[:4]) for b, g in runs.groupby("budget")]
        table = pd.DataFrame(found, columns=["method", "budget", "mean", "ci_low", "ci_high", "n_seeds"])
        mean, shift = table["mean"], 0.97 if method == "sft" else 1.03
        ax.errorbar(table.budget * shift, mean, [mean - table.ci_low, table.ci_high - mean], capsize=3, markersize=6,
                    **{k: v for k, v in style.items() if k != "label"})
        ax.scatter(runs.budget * shift**2.5, runs[metric.name], s=9, color=style["color"], alpha=0.45, linewidths=0)
        ends.append((mean.iloc[-1], style["label"], style["color"]))
        tables.append(table)
    for column, name in (("untuned", "untuned student"), ("teacher", "teacher")):
        if (values := frame.get(f"{column}_{metric.name}", pd.Series(dtype=float)).dropna()).size:
            ax.axhline(values.iloc[0], color="0.5", linewidth=1, linestyle=":")
            ends.append((values.iloc[0], name, "0.4"))
            tables = [table.assign(**{column: values.iloc[0]}) for table in tables]
    low, high = ax.get_ylim()
    lowest = -1.0
    for y, name, colour in sorted(ends):  # names beside the lines' right ends, moved apart where they would overlap
        lowest = max((y - low) / (high - low), lowest + 0.055)
        ax.annotate(name, (1.01, lowest), xycoords="axes fraction", va="center", color=colour,
                    fontweight="normal" if colour == "0.4" else "bold")
    _budget_axis(ax, sorted(frame.budget.unique()))
    ax.set_ylabel(metric.label + ("" if metric.higher_is_better else "\n(lower is better)"))
    ax.set_title(f"{metric.label[0].upper()}{metric.label[1:]} by data budget:\n"
                 f"mean, 95% interval, {frame.seed.nunique()} seeds (dots)", fontsize=10, loc="left")
    return fig, pd.concat(tables, ignore_index=True)


def gap_vs_budget(gaps: pd.DataFrame, metric: Metric):
    """The paired gap against budget: mean with paired-t interval, every seed's difference a dot, zero line, ±δ band."""
    fig, ax = axes()
    table = stats.gap_table(gaps)
    ax.axhspan(-metric.delta, metric.delta, color="0.88", zorder=0)
    ax.axhline(0, color="0.3", linewidth=1)
    ax.scatter(gaps.budget * 1.08, gaps.gap, s=12, color=STYLE["kd"]["color"], alpha=0.6, linewidths=0)
    ax.errorbar(table.budget, table.gap, [table.gap - table.ci_low, table.ci_high - table.gap], capsize=3, markersize=6, **GAP)
    for text, lift in (("KD better ↑", 7), ("SFT better ↓", -7)):
        ax.annotate(text, (1.01, 0), xytext=(0, lift), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", fontsize=9, color="0.3")
    _budget_axis(ax, table.budget)
    ax.set_ylabel(metric.gap_label)
    ax.set_title(f"Paired gap by data budget: mean, 95% interval, {table.n_seeds.min()} seeds (dots);\n"
                 f"in the grey band, ±δ = {metric.delta:g}, a gap does not matter", fontsize=10, loc="left")
    return fig, gaps[["budget", "seed", "gap"]].merge(table.rename(columns={"gap": "mean_gap"}), on="budget")


def save(fig, plotted: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a figure as PNG and SVG and the plotted frame as CSV under ``folder/figures``; the same data, the same bytes."""
    target = folder / "figures"
    results.write_table(plotted, target / f"{name}.csv")
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with matplotlib.rc_context(OPTIONS), io.BytesIO() as buffer:
            fig.savefig(buffer, format=form, dpi=150, metadata=metadata)
            store.write_atomic(target / f"{name}.{form}", buffer.getvalue())
