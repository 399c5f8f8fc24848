"""Compute the runs that a preset's experiments lack, in one pool, so that none of them waits for the last run of another:
PRESET WORLDS OUT WORKERS NOTEBOOK …
"""

import sys
from dataclasses import replace

from kdlib import study


def together(preset: str, worlds: str, out: str, workers: str, *notebooks: str) -> study.Plan | None:
    """One plan of all their runs, each once; None if there is nothing to train."""
    names = [name for name in study.PARAMETERS if any(n.endswith(f"_{name}.ipynb") for n in notebooks)]
    how = {"preset": preset, "results_dir": out, "workers": int(workers) if workers.isdigit() else workers}
    plans = [study.plan(name, {**how, "world_seed": int(world)}) for world in worlds.split(",") for name in names]
    runs = {i: run for plan in plans for i, run in zip(plan.ids, plan.runs)}
    return replace(plans[0], runs=tuple(runs.values())) if any(plan.trains for plan in plans) else None


if __name__ == "__main__":
    sys.tracebacklimit = 0
    if plan := together(*sys.argv[1:]):
        try:
            study.run(plan)
        except Exception as error:  # of one run, perhaps, and every notebook says what it lacks itself
            print(f"{type(error).__name__}: {error}\nThe notebooks go on with what is there.", file=sys.stderr)
