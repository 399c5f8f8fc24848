"""Paired statistics over seeds (the unit, never the test item), the contrasts, and the rule from an interval to a verdict."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from kdlib.presets import Metric

DECISIVE_SEEDS = 5


class Interval(NamedTuple):
    """A mean with its t interval; ``p`` is the two-sided paired-t p-value."""

    estimate: float
    low: float
    high: float
    n: int
    p: float


def paired_interval(differences, level: float = 0.95) -> Interval:
    """The paired-t interval of the mean of ``differences`` (one a seed). Raises ValueError on fewer than two."""
    if len(d := _rounded(np.asarray(differences, dtype=float))) < 2:
        raise ValueError(f"An interval needs at least two seeds; {len(d)} given.")
    if np.ptp(d) == 0:
        return Interval(*[float(d[0])] * 3, len(d), float(d[0] == 0))
    test = scipy_stats.ttest_1samp(d, 0.0)
    return Interval(*_rounded(np.array([d.mean(), *test.confidence_interval(level)])).tolist(), len(d), float(test.pvalue))


def _rounded(values):
    return values.round(12) + 0.0  # the last digits differ from processor to processor and are no spread; no minus zero


def holm(p_values) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)].tolist()


def verdict(low: float, high: float, delta: float, n_seeds: int) -> str:
    """supported, refuted, no meaningful difference or inconclusive; exploratory with fewer than five seeds."""
    inside = "no meaningful difference" if -delta < low and high < delta else "inconclusive"
    found = "supported" if low > 0 else "refuted" if high < 0 else inside
    return found if n_seeds >= DECISIVE_SEEDS else f"exploratory: {found}"


def paired_gaps(frame: pd.DataFrame, metric: Metric, method: str = "kd", baseline: str = "sft") -> pd.DataFrame:
    """``budget, seed, gap, run_ids``: method minus baseline by seed, above zero if better. ValueError unless runs are paired."""
    keys = ["budget", "seed"]
    if frame.duplicated(["method", *keys]).any():
        raise ValueError("Contrasts need one run per method, budget and seed; some have several.")
    sides = [frame[frame.method == m].set_index(keys).sort_index() for m in (method, baseline)]
    if len(unpaired := sides[0].index.symmetric_difference(sides[1].index)):
        raise ValueError(f"Contrasts need {method} and {baseline} runs of the same seeds; unpaired (budget, seed): "
                         f"{', '.join(map(str, unpaired[:5]))}.")
    gap = (sides[0][metric.name] - sides[1][metric.name]) * (1 if metric.higher_is_better else -1)
    return _rounded(gap).rename("gap").reset_index().assign(run_ids=list(map(list, zip(sides[0].run_id, sides[1].run_id))))


def item_interval(records: list[dict], metric: Metric, method: str = "kd", baseline: str = "sft") -> Interval:
    """The gap of one budget's ``records`` with test items as the unit: how far other items, not other training runs, could move it."""
    column, scale = ("correct", 1.0) if metric.name == "accuracy" else ("nll", 1 / np.log(2))
    above, below = (pd.DataFrame([dict(zip(r["items"]["id"], r["items"][column])) for r in records if r["method"] == m]).mean()
                    for m in (method, baseline))  # over seeds, item by item
    first = pd.DataFrame({k: records[0]["items"][k] for k in ("skill", "suite", "bytes")}, index=records[0]["items"]["id"])
    item = first.assign(gap=(above - below) * scale * (1 if metric.higher_is_better else -1), weight=1)
    if metric.name == "accuracy":  # a mean over skills of the seen suite, so items vary about their skill's mean
        item = item[item.suite == "seen"]
        by_skill = item.groupby("skill").gap
        share, mean = len(item) / by_skill.ngroups / by_skill.transform("size"), by_skill.transform("mean")
        item, residual, strata = item.assign(gap=share * item.gap), share * (item.gap - mean), by_skill.ngroups
    else:  # a ratio of sums, so about the ratio times their bytes (the delta method: Cochran 1977, sections 5.3 and 6.3)
        item = item.assign(weight=item.bytes)
        residual, strata = item.gap - item.gap.sum() / item.weight.sum() * item.weight, 1
    n, estimate = len(item), float(item.gap.sum() / item.weight.sum())
    error = float(np.sqrt(n * (residual**2).sum() / (n - strata)) / item.weight.sum())
    half = float(scipy_stats.t.ppf(0.975, n - strata)) * error
    p = 2 * float(scipy_stats.t.sf(abs(estimate) / error, n - strata)) if error else float(estimate == 0)
    return Interval(estimate, estimate - half, estimate + half, n, p)


def gap_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """One row a budget: mean paired gap, interval, seeds, Holm-adjusted p over the budgets."""
    found = [(budget, *paired_interval(g.gap)) for budget, g in gaps.groupby("budget")]
    table = pd.DataFrame(found, columns=["budget", "gap", "ci_low", "ci_high", "n_seeds", "p_holm"])
    return table.assign(p_holm=holm(table.p_holm))  # not adjusted before


def fading(gaps: pd.DataFrame) -> pd.Series:
    """C1b, one number a seed: minus the least-squares slope of the gap on log2(budget); above zero the gap fades."""
    return gaps.groupby("seed")[["budget", "gap"]].apply(lambda g: -np.polyfit(np.log2(g.budget), g.gap, 1)[0])


def budget_claims(frame: pd.DataFrame, metric: Metric) -> list[dict]:
    """Claims C1a and C1b of one world, decided by their pre-stated contrasts; numbers to six digits, the same on any machine."""
    gaps = paired_gaps(frame, metric)
    budgets = sorted(gaps.budget.unique())
    small = gaps[gaps.budget.isin(budgets[:2])]
    faded = metric.delta / float(np.log2(budgets[-1] / budgets[0]))  # so that over the whole grid, δ matters
    contrasts = [("C1a", f"mean {metric.gap_label} at budgets {budgets[0]} and {budgets[1]}", small.groupby("seed").gap.mean(),
                  metric.delta, small),
                 ("C1b", f"fall of the {metric.gap_label} per doubling of the budget", fading(gaps), faded, gaps)]
    claims = []
    for claim, contrast, differences, delta, used in contrasts:
        i = paired_interval(differences)
        estimate, low, high, delta = (float(f"{v:.6g}") for v in (*i[:3], delta))
        claims.append({"claim": claim, "preset": frame.preset.iloc[0], "world_seeds": sorted(map(int, frame.world_seed.unique())),
                       "contrast": contrast, "estimate": estimate, "ci_low": low, "ci_high": high, "n_seeds": i.n,
                       "delta": delta, "verdict": verdict(low, high, delta, i.n),
                       "run_ids": sorted(r for pair in used.run_ids for r in pair)})
    return claims
