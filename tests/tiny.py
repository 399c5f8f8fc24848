"""A study of seconds: ``python tests/tiny.py FOLDER [WORKERS]`` runs it, so that tests can kill it."""

import sys

import nbformat

from kdlib import presets, results, store, study
from kdlib.presets import PRESETS, Preset

SMOKE = PRESETS["smoke"]


def changed(preset: Preset, **settings) -> Preset:
    """``preset`` with other ``settings``."""
    return Preset(**{**vars(preset), **settings})


TINY = changed(
    SMOKE, name="tiny", source={"kind": "lab", "pretrain_lines": 2000, "pool_rows": 200, "test_rows": 40, "unseen_rows": 20, "annotated_rows": 30, "unlabelled_rows": 40,
                         "domain_rows": 15},
    train_rows=200, bases={name: {**base, "steps": 40} for name, base in SMOKE.bases.items()},
    teachers={name: {**t, "tuning": {"steps": 20, "learning_rate": 2e-3, "batch_size": 16}} for name, t in SMOKE.teachers.items()},
    steps=12, batch_size=8, budgets=(20, 200), seeds=(0, 1), max_new_tokens=6,
    sweep={"worlds": [900], "seeds": [100], "budgets": [20], "learning_rates": [1e-3, 2e-3]})


def plan(root, train_missing: bool = True, workers: int = 2, experiment: str = "data_budget") -> study.Plan:
    """The tiny study in ``root``."""
    runs = study.grid(TINY, experiment, 0)
    return study.Plan(TINY, tuple(runs), store.open_folder(root), True, train_missing, workers)


def sweep(preset: Preset, root) -> study.Plan:
    """The runs of the notebook on learning rates, as its own cell plans them."""
    notebook = nbformat.read(results.REPOSITORY / "notebooks" / "07_learning_rates.ipynb", 4)
    cell, = (c for c in notebook.cells if c.id == "07-05")
    reported = study.Plan(preset, tuple(study.grid(preset, "data_budget", 0)), store.open_folder(root), True, False, 0)
    names = {"reported": reported, "s": preset.sweep, "d": preset.domain, "train_missing": False, "workers": 0, "study": study, "presets": presets, "results": results}
    exec(cell.source, names)
    return names["plan"]


def pretend(root, preset: Preset, world: int, accuracy, teachers: dict[str, float]) -> None:
    """Records of all the preset's experiments in one world that nobody trained: ``accuracy(labels)``, and the ``teachers``' own."""
    for experiment in ("data_budget", "teacher_strength", "two_stage_domain"):
        for labels, config in study.grid(preset, experiment, world):
            metrics = {"accuracy": accuracy(labels), "nll": 1.0, "ece": 0.05, "general_accuracy": 0.1, "label_accuracy": 0.5, "untuned_accuracy": 0.0}
            if labels["teacher"]:
                own = {"accuracy": teachers[labels["teacher"]], "accuracy_unseen": 0.5, "nll": 0.9, "entropy": 0.7, "ece": 0.03}
                metrics |= {"top1_agreement": 0.8, **{f"teacher_{k}": v for k, v in own.items()}}
            results.write_record(root, {"run_id": results.run_id(config), **labels, "metrics": metrics, "items": {}, "config": config,
                                        "provenance": {"artefacts": {}}})


if __name__ == "__main__":
    study.run(plan(sys.argv[1], workers=int(sys.argv[2]) if len(sys.argv) > 2 else 2))
