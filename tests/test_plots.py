import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from test_stats import ACC, BPB, runs

from kdlib import plots, stats
from kdlib.presets import ARMS

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def frame():
    return runs(lambda b, s: 0.05 - b / 2e4 + 0.003 * s * (1 if b > 200 else -1))


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in [*ax.texts, ax.title, *ax.get_xticklabels()]]


@pytest.mark.parametrize("experiment", ARMS)
def test_arms_of_a_figure_differ_in_colour_marker_and_line(experiment):
    looks = [plots.STYLE[" ".join(filter(None, arm))] for arm in ARMS[experiment]]
    for key in ("color", "marker", "label"):
        assert len({look[key] for look in looks}) == len(looks)
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == len(looks)
    assert plots.STYLE["kd"]["color"] == plots.STYLE["kd base"]["color"], "one look for the same arm in every figure"


def test_sft_and_kd_differ_in_greyscale():
    grey = [sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(plots.STYLE[arm]["color"]))) for arm in ("sft", "kd")]
    assert abs(grey[0] - grey[1]) > 0.1


def test_gaps_of_several_arms_have_a_line_and_a_name_each():
    gaps = stats.paired_gaps(frame(), ACC)
    both = pd.concat([gaps.assign(arm="kd weak"), gaps.assign(gap=gaps.gap + 0.1, arm="kd strong")])
    fig, plotted = plots.gap_vs_budget(both, ACC, arms=("kd weak", "kd strong"))
    assert set(plotted.arm) == {"kd weak", "kd strong"} and len(plotted) == 2 * len(gaps)
    assert {"KD, weak teacher", "KD, strong teacher", "better than SFT ↑", "worse ↓"} <= set(texts(fig))
    means = plotted.groupby("arm").mean_gap.mean()
    assert means["kd strong"] - means["kd weak"] == pytest.approx(0.1)


def test_interval_figure_draws_every_row_of_every_group():
    table = pd.DataFrame([(part, skill, g, g - 0.1, g + 0.2) for part, up in (("few", 0.0), ("many", 0.3)) for skill, g in (("add", up), ("sort", up - 0.2))],
                         columns=["part", "skill", "gap", "ci_low", "ci_high"])
    fig, plotted = plots.intervals(table, "gap", "skill", "part")
    ax, = fig.axes
    drawn = {(round(x, 6), round(y)) for line in ax.containers for x, y in zip(*line[0].get_data())}
    assert plotted is table and [t.get_text() for t in ax.get_yticklabels()] == ["sort", "add"]
    assert {(0.0, 1), (-0.2, 0), (0.3, 1), (0.1, 0)} == drawn


def test_score_figure_draws_means_intervals_and_every_seed():
    data = frame()
    fig, plotted = plots.score_vs_budget(data, ACC)
    for row in plotted.itertuples():
        found = stats.paired_interval(data[(data.method == row.method) & (data.budget == row.budget)].accuracy)
        assert (row.mean, row.ci_low, row.ci_high, row.n_seeds) == pytest.approx(found[:4])
    ax, = fig.axes
    dots = [tuple(p) for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes()) for p in c.get_offsets()]
    assert len(dots) == len(data) and {round(y, 9) for _, y in dots} == {round(y, 9) for y in data.accuracy}
    assert {"SFT", "KD", "100", "800"} <= set(texts(fig))
    assert ax.get_xlabel() == "training examples (log scale)" and ax.get_ylabel() == "accuracy (macro over skills)"


@pytest.mark.parametrize("metric", [ACC, BPB])
def test_gap_figure_draws_the_gap_table_and_a_zero_line(metric):
    data = frame().rename(columns={"accuracy": metric.name})
    gaps = stats.paired_gaps(data, metric)
    fig, plotted = plots.gap_vs_budget(gaps, metric)
    table = stats.gap_table(gaps).set_index("budget")
    assert len(plotted) == len(gaps) == 20
    for row in plotted.itertuples():
        assert row.mean_gap == table.gap[row.budget] and row.ci_low == table.ci_low[row.budget]
    ax, = fig.axes
    assert any(list(line.get_ydata()) == [0, 0] for line in ax.lines)
    assert {"better than SFT ↑", "worse ↓"} <= set(texts(fig)) and metric.gap_label == ax.get_ylabel()
    assert ("KD − SFT" if metric.higher_is_better else "SFT − KD") in ax.get_ylabel()


def test_reference_lines_are_the_teacher_and_the_untuned_student():
    low, high = frame().accuracy.agg(["min", "max"])
    for untuned, teacher, words in ((low - 0.4 * (high - low), high, {"teacher", "untuned student"}), (low, high + 2, {f"teacher: {high + 2:.3g} ↑", "untuned student"}),
                                    (low - 2, high, {"teacher", f"untuned student: {low - 2:.3g} ↓"})):
        fig, plotted = plots.score_vs_budget(frame().assign(untuned_accuracy=untuned, teacher_accuracy=teacher), ACC)
        assert set(plotted.untuned) == {untuned} and set(plotted.teacher) == {teacher} and words <= set(texts(fig))
        level = {line.get_ydata()[0] for line in fig.axes[0].lines if len(set(line.get_ydata())) == 1}
        assert {v for v in (untuned, teacher) if low - 1 < v < high + 1} == {untuned, teacher} & level


@pytest.mark.parametrize("metric", [ACC, BPB])
def test_nothing_is_cut_off_at_a_figures_edge(metric):
    data = frame().rename(columns={"accuracy": metric.name}).assign(**{f"teacher_{metric.name}": 0.9})
    leads = pd.DataFrame({"baseline": ["sft_then_kd", "human_sft"], "domain": "market", "gap": 0.0, "ci_low": -0.1, "ci_high": 0.1})
    long = f"{metric.label} in the market domain, two stages − baseline: mean and interval at Holm's level over seeds"
    for fig, _ in (plots.score_vs_budget(data, metric), plots.gap_vs_budget(stats.paired_gaps(data, metric), metric), plots.intervals(leads, long, "baseline", "domain")):
        fig.canvas.draw()
        drawn, whole = fig.get_tightbbox(fig.canvas.get_renderer()), fig.bbox_inches
        assert drawn.x0 > -0.01 and drawn.y0 > -0.01 and drawn.x1 < whole.x1 + 0.01 and drawn.y1 < whole.y1 + 0.01


def test_saved_files_repeat_to_the_byte(tmp_path):
    for name in ("a", "b"):
        fig, plotted = plots.score_vs_budget(frame(), ACC)
        plots.save(fig, plotted, tmp_path / name, "score")
    files = sorted(p.name for p in (tmp_path / "a" / "figures").iterdir())
    assert files == ["score.csv", "score.png", "score.svg"]
    for name in files:
        assert (tmp_path / "a" / "figures" / name).read_bytes() == (tmp_path / "b" / "figures" / name).read_bytes()
    assert len(pd.read_csv(tmp_path / "a" / "figures" / "score.csv")) == 8
