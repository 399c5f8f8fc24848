import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from kdlib import results, stats
from kdlib.presets import METRICS

ACC, BPB = METRICS["accuracy"], METRICS["bits_per_byte"]


def runs(gap, budgets=(100, 200, 400, 800), seeds=range(5), metric="accuracy", base=0.5, preset="lab"):
    """A frame whose KD score is SFT's plus ``gap(budget, seed)``."""
    rows = [{"run_id": f"{m}{b}-{s}", "method": m, "budget": b, "seed": s, "world_seed": 0, "preset": preset,
             metric: base + 0.01 * s + (gap(b, s) if m == "kd" else 0)} for m, b, s in product(("kd", "sft"), budgets, seeds)]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_paired_interval_is_the_t_interval_of_the_textbook():
    d = [0.031, 0.012, 0.045, 0.008, 0.027]
    mean, se = sum(d) / 5, math.sqrt(sum((x - sum(d) / 5) ** 2 for x in d) / 4 / 5)
    i = stats.paired_interval(d)
    assert i.n == 5 and i.estimate == pytest.approx(mean)
    assert (i.low, i.high) == pytest.approx((mean - 2.776445 * se, mean + 2.776445 * se), rel=1e-6)
    assert i.p == pytest.approx(2 * scipy_stats.t.sf(mean / se, 4))


def test_rounding_is_no_spread():
    assert 0.1 + 0.2 != 0.3
    assert stats.paired_interval([0.1 + 0.2, 0.3]) == (0.3, 0.3, 0.3, 2, 0.0)


def test_nominal_coverage_is_reached_with_five_seeds():
    rng = np.random.default_rng(0)
    found = [stats.paired_interval(x) for x in rng.normal(1.0, 2.0, (4000, 5))]
    assert abs(np.mean([i.low <= 1.0 <= i.high for i in found]) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_equal_differences_have_no_width():
    assert stats.paired_interval([0.2, 0.2]) == (0.2, 0.2, 0.2, 2, 0.0)
    assert stats.paired_interval([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("few", [[], [0.1]])
def test_fewer_than_two_seeds_are_refused(few):
    with pytest.raises(ValueError, match=f"at least two seeds; {len(few)} given"):
        stats.paired_interval(few)


def test_holm_by_hand_and_monotone():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.02]) == [0.02]


@pytest.mark.parametrize("low, high, expected", [
    (0.001, 0.3, "supported"), (-0.3, -0.001, "refuted"), (-0.009, 0.009, "no meaningful difference"),
    (-0.011, 0.005, "inconclusive"), (-0.1, 0.1, "inconclusive"), (0.0, 0.02, "inconclusive"), (0.001, 0.009, "supported")])
def test_verdict_rule(low, high, expected):
    assert stats.verdict(low, high, 0.01, 5) == expected
    assert stats.verdict(low, high, 0.01, 4) == f"exploratory: {expected}"


def test_gaps_are_paired_by_seed_and_signed_so_that_above_zero_is_better():
    gaps = stats.paired_gaps(runs(lambda b, s: b / 1e4 + s), ACC)
    assert len(gaps) == 20
    for row in gaps.itertuples():
        assert row.gap == pytest.approx(row.budget / 1e4 + row.seed)
        assert row.run_ids == [f"kd{row.budget}-{row.seed}", f"sft{row.budget}-{row.seed}"]
    lower = stats.paired_gaps(runs(lambda b, s: -0.2, metric="bits_per_byte"), BPB)
    assert lower.gap.to_numpy() == pytest.approx(0.2)


def test_unpaired_and_doubled_runs_are_refused():
    frame = runs(lambda b, s: 0.1)
    with pytest.raises(ValueError, match=r"unpaired .*\(100, 3\)"):
        stats.paired_gaps(frame[frame.run_id != "kd100-3"], ACC)
    with pytest.raises(ValueError, match="several"):
        stats.paired_gaps(pd.concat([frame, frame[:1]]), ACC)


def test_the_contrasts_are_what_was_stated():
    frame = runs(lambda b, s: 0.08 - 0.02 * math.log2(b / 100) + 0.001 * s)
    few = stats.budget_claims(frame, ACC)[0]
    wanted = stats.paired_interval([0.07 + 0.001 * s for s in range(5)])
    assert [few[k] for k in ("estimate", "ci_low", "ci_high", "n_seeds")] == pytest.approx(wanted[:4], rel=1e-5)
    assert stats.budget_claims(frame, ACC)[1]["estimate"] == pytest.approx(0.02)


def test_claims_supported_and_refuted():
    noise = {s: 0.002 * (s - 2) for s in range(5)}
    good = stats.budget_claims(runs(lambda b, s: 0.08 - 0.02 * math.log2(b / 100) + noise[s] * (1 + b / 800)), ACC)
    assert [c["claim"] for c in good] == ["C1a", "C1b"] and [c["verdict"] for c in good] == ["supported"] * 2
    assert good[0]["estimate"] == pytest.approx(0.07) and good[0]["n_seeds"] == 5 and good[0]["world_seeds"] == [0]
    assert good[0]["run_ids"] == sorted(f"{m}{b}-{s}" for m in ("kd", "sft") for b in (100, 200) for s in range(5))
    assert len(good[1]["run_ids"]) == 40 and good[1]["delta"] == pytest.approx(0.01 / 3, rel=1e-5)
    bad = stats.budget_claims(runs(lambda b, s: -0.08 + 0.02 * math.log2(b / 100) + noise[s] * (1 + b / 800)), ACC)
    assert [c["verdict"] for c in bad] == ["refuted"] * 2


def test_claims_follow_the_metric_and_say_when_seeds_are_few():
    frame = runs(lambda b, s: -0.1 + 0.02 * math.log2(b / 100) + 1e-5 * b * s, seeds=range(3), metric="bits_per_byte", preset="realtext")
    found = stats.budget_claims(frame, BPB)
    assert [c["verdict"] for c in found] == ["exploratory: supported"] * 2
    assert found[0]["preset"] == "realtext" and "bits per byte of human answers (SFT − KD)" in found[0]["contrast"]


def test_gap_table_has_holm_over_budgets():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.01, (4, 5))
    gaps = stats.paired_gaps(runs(lambda b, s: 0.02 + noise[int(math.log2(b / 100)), s]), ACC)
    table = stats.gap_table(gaps)
    plain = [scipy_stats.ttest_1samp(gaps[gaps.budget == b].gap, 0).pvalue for b in table.budget]
    assert table.p_holm.tolist() == pytest.approx(stats.holm(plain)) and (table.n_seeds == 5).all()
    assert (table.ci_low < table.gap).all() and (table.gap < table.ci_high).all()


def of_items(scores: dict, skill, size=None, suite=None) -> list[dict]:
    """Records of one budget, a run each for the ``scores`` of its items by method and seed."""
    return [{"method": m, "items": {"id": list(range(len(skill))), "skill": list(skill), "suite": suite or ["seen"] * len(skill), "correct": list(values),
                                    "nll": [v * math.log(2) for v in values], "bytes": size or [1] * len(skill)}} for (m, _), values in scores.items()]


def test_item_interval_averages_seeds_first():
    scores = {(m, s): [float((m == "kd" and i < 6) or (m == "sft" and i < 3 and s == 0)) for i in range(10)]
              for m in ("kd", "sft") for s in (0, 1)}
    found = stats.item_interval(of_items(scores, ["add"] * 10), ACC)
    by_item = [0.5] * 3 + [1.0] * 3 + [0.0] * 4
    assert found.n == 10 and found.estimate == pytest.approx(np.mean(by_item))
    assert found[1:3] == pytest.approx(stats.paired_interval(by_item)[1:3])


def test_item_interval_pairs_items_by_name_whatever_their_order():
    scores = {("kd", 0): [1, 0, 1, 1, 0, 1], ("sft", 0): [0, 0, 1, 1, 0, 0]}
    records = of_items(scores, ["add"] * 3 + ["sort"] * 3)
    other = [records[0], {**records[1], "items": {k: v[::-1] for k, v in records[1]["items"].items()}}]
    assert stats.item_interval(other, ACC) == stats.item_interval(records, ACC)


def test_item_interval_leaves_the_unseen_suite_out():
    scores = {("kd", 0): [1, 0, 1, 1], ("sft", 0): [0, 0, 0, 0]}
    found = stats.item_interval(of_items(scores, ["add", "add", "sort", "sort"], suite=["seen", "seen", "seen", "unseen"]), ACC)
    assert found.n == 3 and found.estimate == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize("metric, n", [(ACC, 4), (BPB, 2)], ids=["accuracy", "bits"])
def test_item_interval_leaves_out_items_without_the_metric(metric, n):
    shared = {"id": list("abcdef"), "suite": ["seen"] * 6, "skill": list("sstuvv"), "bytes": [None] * 4 + [2, 6]}
    kd, sft = ({**shared, "correct": [right, right, 0.0, 1.0, None, None], "nll": [None] * 4 + [bits * math.log(2)] * 2}
               for right, bits in ((1.0, 1), (0.25, 2)))
    found = stats.item_interval([{"method": "kd", "items": kd}, {"method": "sft", "items": sft}], metric)
    assert found.estimate == pytest.approx(0.25) and found.n == n


def test_item_interval_of_bits_is_the_gap_in_bits_per_byte():
    bits = {("sft", 0): [30.0, 8.0, 100.0], ("kd", 0): [24.0, 9.0, 80.0]}
    assert stats.item_interval(of_items(bits, ["all"] * 3, [10, 4, 26]), BPB).estimate == pytest.approx((138 - 113) / 40)


@pytest.mark.parametrize("metric", [ACC, BPB], ids=["accuracy", "bits"])
def test_items_sum_up_to_the_metrics_gap(tiny_records, metric):
    gaps = stats.paired_gaps(results.frame(tiny_records), metric).groupby("budget").gap.mean()
    for budget, gap in gaps.items():
        found = stats.item_interval([r for r in tiny_records if r["budget"] == budget], metric)
        assert found.estimate == pytest.approx(gap, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("metric", [ACC, BPB], ids=["accuracy", "bits"])
def test_item_intervals_are_as_wide_as_the_bootstraps(metric):
    """Accuracy redraws items within skills of unequal size; bits per byte redraws answers of unequal length."""
    rng = np.random.default_rng(0)
    skill = np.repeat(["a", "b", "c"], [150, 50, 100])
    weight = np.ones(300) if metric is ACC else rng.integers(3, 400, 300).astype(float)
    chance = {"a": 0.9, "b": 0.2, "c": 0.5}
    if metric is ACC:
        scores = {m: 1.0 * (rng.random(300) < [chance[s] + lift for s in skill]) for m, lift in (("kd", 0.1), ("sft", 0.0))}
        size = np.array([300 / 3 / (skill == s).sum() for s in skill])
    else:
        scores, size = {"sft": weight * rng.normal(2.6, 0.4, 300)}, 1.0
        scores["kd"] = scores["sft"] - weight * rng.normal(0.2, 0.1, 300)
    found = stats.item_interval(of_items({(m, 0): v for m, v in scores.items()}, skill, list(weight)), metric)
    difference = size * (scores["kd"] - scores["sft"]) * (1 if metric.higher_is_better else -1)
    groups = [np.flatnonzero(skill == s) for s in "abc"] if metric is ACC else [np.arange(300)]
    draws = []
    for _ in range(4000):
        drawn = np.concatenate([rng.choice(g, len(g)) for g in groups])
        draws.append(difference[drawn].sum() / weight[drawn].sum())
    assert found.estimate == pytest.approx(difference.sum() / weight.sum())
    assert (found.high - found.low) / 2 == pytest.approx(1.968 * np.std(draws), rel=0.06)


def arms_frame(scores: dict, seeds=range(5), **labels) -> pd.DataFrame:
    """Runs with the accuracy ``scores[arm](budget, seed)``, at two budgets."""
    return pd.DataFrame([{"run_id": f"{arm} {b} {s} {labels}", "preset": "lab", "world_seed": 0, "arm": arm, "method": arm, "budget": b, "seed": s,
                          "pool": None, **labels, "accuracy": score(b, s)} for arm, score in scores.items() for b in (200, 400) for s in seeds])


def test_a_stronger_teacher_is_judged_at_the_largest_budget_by_two_contrasts():
    noise = np.random.default_rng(2).normal(0, 0.004, (3, 5))
    frame = arms_frame({"sft": lambda b, s: 0.5 + noise[0, s], "kd base": lambda b, s: 0.5 + 0.1 * (b == 200) + noise[1, s],
                        "kd strong": lambda b, s: 0.53 - 0.4 * (b == 200) + noise[2, s]})
    first, second = stats.teacher_claims(frame, ACC)
    wanted = scipy_stats.ttest_1samp(0.03 + noise[2] - noise[0], 0).confidence_interval(0.95)
    assert (first["claim"], second["claim"]) == ("C2a", "C2b") and first["verdict"] == second["verdict"] == "supported"
    assert [first["ci_low"], first["ci_high"]] == pytest.approx(list(wanted), rel=1e-4)
    assert "at budget 400" in first["contrast"] and first["n_seeds"] == 5 and len(first["run_ids"]) == 10
    with pytest.raises(ValueError, match="same seeds; unpaired"):
        stats.teacher_claims(frame.drop(frame[(frame.arm == "kd base") & (frame.seed == 3)].index), ACC)


def test_two_stages_must_lead_every_recipe_of_one():
    noise = np.random.default_rng(3).normal(0, 0.004, (6, 5))
    lead = {"human_sft": 0.2, "human_kd": 0.1, "synthetic_sft": 0.05, "synthetic_kd": 0.0, "mixture": -0.03}
    scores = {one: (lambda b, s, i=i, by=by: 0.5 - by + noise[i, s]) for i, (one, by) in enumerate(lead.items())}
    frame = arms_frame({"kd_then_sft": lambda b, s: 0.5 + noise[5, s], "kd_then_kd": lambda b, s: 0.1, **scores}, domain="clinic")
    smaller = frame[frame.method == "synthetic_kd"].assign(pool=100.0, accuracy=0.9, run_id=lambda f: f.run_id + " small")
    both = pd.concat([frame.assign(pool=frame.pool.where(~frame.method.str.contains("synthetic|then|mixture"), 900.0)), smaller])
    claims = stats.domain_claims(both, ACC)
    assert [c["claim"] for c in claims] == [f"C3 clinic − {one}" for one in lead]
    assert [c["verdict"] for c in claims] == ["supported"] * 3 + [claims[3]["verdict"], "refuted"] and claims[3]["verdict"] != "supported"
    p = [scipy_stats.ttest_1samp(by + noise[5] - noise[i], 0).pvalue for i, by in enumerate(lead.values())]
    for c, adjusted in zip(claims, stats.holm(p)):
        assert (adjusted <= 0.05) == (not c["ci_low"] <= 0 <= c["ci_high"]), "what Holm's procedure rejects"
    whole = stats.together("C3 clinic", claims)
    assert whole["claim"] == "C3 clinic" and whole["verdict"] == "refuted" and whole["estimate"] == claims[4]["estimate"]
    assert stats.together("C", claims[:3])["verdict"] == "supported"


def test_intervals_at_holms_levels_reject_what_holm_rejects():
    rng, rejected = np.random.default_rng(4), set()
    for _ in range(300):
        samples = {str(i): rng.normal(rng.choice([0, 0.8, 2]), 1, 6) for i in range(5)}
        levels, adjusted = stats.holm_levels(samples), stats.holm([scipy_stats.ttest_1samp(v, 0).pvalue for v in samples.values()])
        for (name, values), p in zip(samples.items(), adjusted):
            i = stats.paired_interval(values, levels[name])
            assert (p <= 0.05) == (not i.low <= 0 <= i.high)
            rejected.add(p <= 0.05)
    assert rejected == {True, False}


def test_over_worlds_the_world_is_a_random_effect():
    """The t interval of the worlds' means is that of a balanced one-way random-effects analysis of variance."""
    rng = np.random.default_rng(5)
    values = 0.05 + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.01, (3, 7))
    frame = [runs(lambda b, s, w=w: values[w, s], seeds=range(7)).assign(world_seed=w, run_id=lambda f, w=w: f.run_id + f" {w}") for w in range(3)]
    claims = [stats.budget_claims(f, ACC)[0] for f in frame]
    found = stats.over_worlds(claims)
    between = 7 * values.mean(1).var(ddof=1)  # the mean square between worlds
    half = scipy_stats.t.ppf(0.975, 2) * math.sqrt(between / values.size)
    assert (found["estimate"], found["ci_low"], found["ci_high"]) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), rel=1e-4)
    assert found["world_seeds"] == [0, 1, 2] and found["n_seeds"] == 7 and len(found["run_ids"]) == sum(len(c["run_ids"]) for c in claims)
    with pytest.raises(ValueError, match="one contrast over as many seeds each"):
        stats.over_worlds([claims[0], {**claims[1], "n_seeds": 6}])


def test_worlds_that_agree_by_luck_are_no_surer_than_their_seeds():
    values = np.array([[0.01, 0.05, 0.09], [0.02, 0.05, 0.08], [0.04, 0.05, 0.06]])
    frame = [runs(lambda b, s, w=w: values[w, s], seeds=range(3)).assign(world_seed=w, run_id=lambda f, w=w: f.run_id + f" {w}") for w in range(3)]
    alone = [stats.budget_claims(f, ACC)[0] for f in frame]
    found = stats.over_worlds([{**c, "level": 0.95} for c in alone], 0.99)
    error = math.sqrt(values.var(axis=1, ddof=1).sum() / 3 / 9)
    assert (found["ci_high"] - found["ci_low"]) / 2 == pytest.approx(scipy_stats.t.ppf(0.995, 2) * error, rel=1e-4)
    assert found["level"] == 0.99 and found["verdict"] == "exploratory: inconclusive"
