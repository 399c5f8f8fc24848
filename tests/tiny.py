"""A study of seconds: ``python tests/tiny.py FOLDER [WORKERS]`` runs it, so that tests can kill it."""

import sys

from kdlib import store, study
from kdlib.presets import METHODS, PRESETS, Preset

SMOKE = PRESETS["smoke"]


def changed(preset: Preset, **settings) -> Preset:
    """``preset`` with other ``settings``."""
    return Preset(**{**vars(preset), **settings})


TINY = changed(
    SMOKE, name="tiny", source={"kind": "lab", "pretrain_lines": 2000, "pool_rows": 200, "test_rows": 40, "unseen_rows": 20},
    train_rows=200, student={**SMOKE.student, "steps": 40},
    teachers={"base": {**SMOKE.teachers["base"], "steps": 40, "tuning": {"steps": 20, "learning_rate": 2e-3, "batch_size": 16}}},
    steps=12, batch_size=8, budgets=(20, 200), seeds=(0, 1), max_new_tokens=6,
    sweep={"world_seed": 900, "seeds": [100], "budgets": [20], "learning_rates": [1e-3, 2e-3]})


def plan(root, train_missing: bool = True, workers: int = 2) -> study.Plan:
    """The tiny study in ``root``."""
    configs = study.grid(TINY, METHODS, TINY.budgets, TINY.seeds, 0)
    return study.Plan(TINY, "data_budget", tuple(configs), store.open_folder(root), True, train_missing, workers)


if __name__ == "__main__":
    study.run(plan(sys.argv[1], workers=int(sys.argv[2]) if len(sys.argv) > 2 else 2))
