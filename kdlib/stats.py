"""Paired statistics over seeds (the unit, never the test item), the contrasts, and the rule from an interval to a verdict."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from kdlib.presets import ARMS, RECIPES, Metric

DECISIVE_SEEDS = 5


class Interval(NamedTuple):
    """A mean with its t interval; ``p`` is the two-sided paired-t p-value."""

    estimate: float
    low: float
    high: float
    n: int
    p: float


def paired_interval(differences, level: float = 0.95) -> Interval:
    """The paired-t interval of the mean of ``differences`` (one a seed, or an item). Raises ValueError on fewer than two."""
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


def lead(metric: Metric, arm: str, baseline: str, where: str = "") -> str:
    """What a gap of ``arm`` over ``baseline`` is, in words: above zero, ``arm`` is better."""
    first, second = (arm, baseline) if metric.higher_is_better else (baseline, arm)
    return f"{metric.label.split(' (')[0]}{where}, {first} − {second}"


def paired_gaps(frame: pd.DataFrame, metric: Metric, arm: str = "kd", baseline: str = "sft", by: str = "method") -> pd.DataFrame:
    """``budget, seed, gap, run_ids``: arm minus baseline (values of ``by``) by seed, above zero if better. ValueError unless paired."""
    keys = ["budget", "seed"]
    if frame.duplicated([by, *keys]).any():
        raise ValueError(f"Contrasts need one run per {by}, budget and seed; some have several.")
    sides = [frame[frame[by] == m].set_index(keys).sort_index() for m in (arm, baseline)]
    if len(unpaired := sides[0].index.symmetric_difference(sides[1].index)):
        raise ValueError(f"Contrasts need {arm} and {baseline} of the same seeds; unpaired (budget, seed): {', '.join(map(str, unpaired[:5]))}.")
    gap = (sides[0][metric.name] - sides[1][metric.name]) * (1 if metric.higher_is_better else -1)
    return _rounded(gap).rename("gap").reset_index().assign(run_ids=list(map(list, zip(sides[0].run_id, sides[1].run_id))))


def item_interval(records: list[dict], metric: Metric, method: str = "kd", baseline: str = "sft") -> Interval:
    """The gap of one budget's ``records`` with test items as the unit: how far other items, not other training runs, could move it."""
    column, scale = ("correct", 1.0) if metric.name == "accuracy" else ("nll", 1 / np.log(2))
    above, below = (pd.DataFrame([dict(zip(r["items"]["id"], r["items"][column])) for r in records if r["method"] == m],
                                 dtype=float).mean() for m in (method, baseline))  # over seeds, item by item; None is left out
    item = pd.DataFrame({k: records[0]["items"][k] for k in ("skill", "suite", "bytes")}, index=records[0]["items"]["id"])
    item = item.assign(gap=(above - below) * scale * (1 if metric.higher_is_better else -1)).dropna(subset=["gap"])
    if metric.name == "accuracy":  # a mean over skills of the seen suite, so items vary about their skill's mean
        by_skill = (item := item[item.suite == "seen"]).groupby("skill").gap
        residual = (item.gap - by_skill.transform("mean")) * len(item) / by_skill.ngroups / by_skill.transform("size")
        return paired_interval(by_skill.mean().mean() + residual)
    ratio = item.gap.sum() / item.bytes.sum()  # of sums, so about itself times their bytes (Cochran 1977, section 6.3)
    return paired_interval(ratio + (item.gap - ratio * item.bytes) / item.bytes.mean())


def gap_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """One row a budget: mean paired gap, interval, seeds, Holm-adjusted p over the budgets."""
    found = [(budget, *paired_interval(g.gap)) for budget, g in gaps.groupby("budget")]
    table = pd.DataFrame(found, columns=["budget", "gap", "ci_low", "ci_high", "n_seeds", "p_holm"])
    return table.assign(p_holm=holm(table.p_holm))  # not adjusted before


def claim(name: str, contrast: str, differences, delta: float, gaps: pd.DataFrame, frame: pd.DataFrame, level: float = 0.95) -> dict:
    """A claim decided by ``differences``, one a seed, of the runs behind ``gaps``; numbers to six digits, the same on any machine."""
    i = paired_interval(differences, level)
    estimate, low, high, delta = (float(f"{v:.6g}") for v in (*i[:3], delta))
    return {"claim": name, "preset": frame.preset.iloc[0], "world_seeds": sorted(map(int, frame.world_seed.unique())),
            "contrast": contrast, "estimate": estimate, "ci_low": low, "ci_high": high, "level": level, "n_seeds": i.n, "delta": delta,
            "verdict": verdict(low, high, delta, i.n), "weakest": None, "run_ids": sorted({r for pair in gaps.run_ids for r in pair})}


def budget_claims(frame: pd.DataFrame, metric: Metric) -> list[dict]:
    """C1a and C1b of one world: KD leads at the two smallest budgets, and its lead falls with the budget."""
    gaps = paired_gaps(frame, metric)
    budgets = sorted(gaps.budget.unique())
    small = gaps[gaps.budget.isin(budgets[:2])]
    slopes = gaps.groupby("seed")[["budget", "gap"]].apply(lambda g: np.polyfit(np.log2(g.budget), g.gap, 1)[0])
    faded = metric.delta / float(np.log2(budgets[-1] / budgets[0]))  # so that over the whole grid, δ matters
    return [claim("C1a", f"mean {metric.gap_label} at budgets {budgets[0]} and {budgets[1]}", small.groupby("seed").gap.mean(),
                  metric.delta, small, frame),
            claim("C1b", f"fall of the {metric.gap_label} per doubling of the budget", -slopes, faded, gaps, frame)]


def teacher_claims(frame: pd.DataFrame, metric: Metric) -> list[dict]:
    """C2 of one world by its two contrasts at the largest budget: KD from the strong teacher leads SFT, and KD from the base teacher."""
    claims, largest = [], frame[frame.budget == frame.budget.max()]
    for number, baseline, words in (("C2a", "sft", "SFT"), ("C2b", "kd base", "KD from the base teacher")):
        gaps = paired_gaps(largest, metric, "kd strong", baseline, "arm")
        contrast = f"{lead(metric, 'KD from the strong teacher', words)}, at budget {frame.budget.max()}"
        claims.append(claim(number, contrast, gaps.gap, metric.delta, gaps, frame))
    return claims


def domain_claims(frame: pd.DataFrame, metric: Metric) -> list[dict]:
    """C3 of one world, with the largest pool: two stages lead every recipe of one stage, as a mean over budgets, at Holm's levels."""
    claims, frame = [], frame[frame.pool.isna() | (frame.pool == frame.pool.max())]
    for domain, runs in frame.groupby("domain"):
        gaps = {one: paired_gaps(runs, metric, "kd_then_sft", one) for one, _ in ARMS["two_stage_domain"] if len(RECIPES[one]) == 1}
        by_seed = {f"C3 {domain} − {one}": g.groupby("seed").gap.mean() for one, g in gaps.items()}
        levels = holm_levels(by_seed)
        for (name, values), (one, g) in zip(by_seed.items(), gaps.items()):
            contrast = f"{lead(metric, 'kd_then_sft', one, f' in the {domain} domain')}, mean over budgets"
            claims.append(claim(name, contrast, values, metric.delta, g, runs, levels[name]))
    return claims


def holm_levels(samples: dict) -> dict[str, float]:
    """The level of each name's interval over its differences, so that those without zero are what Holm's procedure rejects."""
    p, levels, step = {name: paired_interval(values).p for name, values in samples.items()}, {}, len(samples)
    for name in sorted(p, key=p.get):
        levels[name] = 1 - 0.05 / step
        step -= p[name] <= 0.05 / step  # the first that is not rejected ends it
    return levels


def together(name: str, claims: list[dict]) -> dict:
    """A claim that holds where all of ``claims`` do, as the weakest of them: refuted if one is."""
    order = ("refuted", "inconclusive", "no meaningful difference", "supported")
    weakest = min(claims, key=lambda c: (order.index(c["verdict"].split(": ")[-1]), c["ci_low"]))
    return {**weakest, "claim": name, "weakest": weakest["claim"]}


def over_worlds(claims: list[dict], level: float = 0.95) -> dict:
    """One claim over several worlds, a random effect: the t interval of their means, whose variance holds worlds' and seeds' (Searle, Casella &
    McCulloch 1992, section 3.6) and counts as no less than the seeds' alone (Knapp & Hartung 2003). ValueError on unlike claims.
    """
    if len({(c["contrast"], c["n_seeds"]) for c in claims}) > 1:
        raise ValueError("Worlds are compared by one contrast over as many seeds each; some differ.")
    t, first, means = scipy_stats.t, claims[0], np.array([c["estimate"] for c in claims])
    own = [(c["ci_high"] - c["ci_low"]) / 2 / t.ppf((1 + c["level"]) / 2, c["n_seeds"] - 1) for c in claims]  # standard errors
    half = t.ppf((1 + level) / 2, len(means) - 1) * (max(means.var(ddof=1), np.square(own).mean()) / len(means)) ** 0.5
    estimate, low, high = (float(f"{v:.6g}") for v in means.mean() + np.array([0, -half, half]))
    return {**first, "world_seeds": sorted(w for c in claims for w in c["world_seeds"]), "estimate": estimate,
            "ci_low": low, "ci_high": high, "level": level, "verdict": verdict(low, high, first["delta"], first["n_seeds"]),
            "run_ids": sorted({r for c in claims for r in c["run_ids"]})}
