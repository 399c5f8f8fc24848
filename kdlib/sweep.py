"""The learning-rate sweep: every method over the same rates, scored on validation rows of a world that is not reported."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from kdlib import results, store, study
from kdlib.presets import METHODS, PRESETS, Preset


def plan(preset: Preset, root: str | Path, workers: int = 0) -> study.Plan:
    """The runs of a preset's sweep, with results under ``root``."""
    s = preset.sweep
    configs = [config for rate in s["learning_rates"]
               for config in study.grid(replace(preset, learning_rate={m: {1: rate} for m in METHODS}), METHODS, s["budgets"],
                                        s["seeds"], s["world_seed"], split="validation")]
    return study.Plan(preset, "lr_sweep", tuple(configs), store.open_folder(root), True, True, workers)


def table(records: list[dict], preset: Preset) -> pd.DataFrame:
    """Mean ``score`` over seeds by method, budget and rate; ``chosen``: each method's best at a budget, of equals the smallest."""
    metric, keys = preset.scored, ["method", "budget"]
    means = results.frame(records).groupby([*keys, "learning_rate"])[metric.name].agg(score="mean", n_runs="size").reset_index()
    ranked = means.sort_values(["score", "learning_rate"], ascending=[not metric.higher_is_better, True])
    means["chosen"] = means.index.isin(ranked.groupby(keys).head(1).index)
    return means


def chosen(records: list[dict], preset: Preset) -> dict[str, dict[int, float]]:
    """The learning rate of each method at each budget that the sweep's records choose."""
    found = table(records, preset)
    return {m: dict(zip(g.budget.tolist(), g.learning_rate.tolist())) for m, g in found[found.chosen].groupby("method")}


def main(preset: str, root: str, workers: int = 0) -> None:
    """Run what is missing of a preset's sweep, write its table, and say whether the preset holds what it chose."""
    sweep = plan(PRESETS[study.check("preset", preset, str, ", ".join(PRESETS), lambda v: v in PRESETS)], root, workers)
    records = study.run(sweep)
    found = table(records, sweep.preset)
    results.write_table(found, sweep.folder / "tables" / "lr_sweep.csv")
    print(found.to_string(index=False))
    print(f"chosen: {chosen(records, sweep.preset)}; the preset has {sweep.preset.learning_rate}.")
