"""From parameters to run records: validated plans, run configurations, and the computing of those that are missing."""

import ast
from dataclasses import dataclass
from pathlib import Path

from kdlib import results, runner, store
from kdlib.presets import KINDS, METHODS, PRESETS, Preset, check

SPEC_VERSION = {"lab": 3, "text": 3}  # raised whenever a change of the code changes what a configuration computes
PARAMETERS = ("preset", "world_seed", "budgets", "seeds", "alpha", "kind", "temperature", "results_dir", "train_missing", "workers")


@dataclass(frozen=True)
class Plan:
    """A validated experiment: its preset, its runs, and where its results lie."""

    preset: Preset
    experiment: str
    configs: tuple
    root: Path
    standard: bool
    train_missing: bool
    workers: int

    ids = property(lambda self: [results.run_id(c) for c in self.configs], doc="The run ids, in the order of the grid.")
    budgets = property(lambda self: sorted({c["budget"] for c in self.configs}), doc="The budgets, smallest first.")
    seeds = property(lambda self: sorted({c["seed"] for c in self.configs}), doc="The seeds.")

    @property
    def folder(self) -> Path:
        """Where tables, figures and claims go: the preset's folder, or one of its own for a changed design."""
        home = self.root / self.preset.name
        return home if self.standard else home / "variants" / store.digest(sorted(self.ids), 8)


def check_names(namespace: dict, allowed) -> None:
    """Raise ValueError if a cell that papermill injected into the notebook with these ``globals()`` sets another name."""
    injected = [ast.parse(cell).body for cell in namespace.get("In", []) if cell.startswith("# Parameters")]
    for name in [t.id for body in injected for node in body for t in getattr(node, "targets", [])]:
        if name not in allowed:  # papermill itself only warns
            raise ValueError(f"Unknown parameter {name!r} (value {namespace.get(name)!r}); allowed: {', '.join(allowed)}.")


def plan(experiment: str, namespace: dict) -> Plan:
    """The plan that a notebook's ``globals()`` ask for, the rest by default; ValueError, in one sentence, if a parameter is wrong."""
    check_names(namespace, PARAMETERS)
    given = METHODS["kd"] | {n: namespace[n] for n in PARAMETERS if n in namespace}
    name = check("preset", given.get("preset", "lab"), str, ", ".join(PRESETS), lambda v: v in PRESETS)
    preset, size = PRESETS[name], PRESETS[name].train_rows

    def numbers(name, low, high, limit):
        def fine(value):
            return all(type(v) is int and low <= v <= high for v in value) and (not value or len(set(value)) == len(value) >= 2)

        allowed = f"a list of at least two different whole numbers from {low} to {limit}"
        return sorted(check(name, given.get(name, []), list, allowed, fine) or getattr(preset, name))

    budgets = numbers("budgets", 1, size, f"{size}, the rows of preset {name!r}")
    seeds = numbers("seeds", 0, 2**31, "2**31, because an interval needs two")
    one = preset.source["kind"] == "text"  # there is one world of real text
    worlds = f"0, because preset {name!r} has one world" if one else "a whole number from 0"
    world = check("world_seed", given.get("world_seed", 0), int, worlds, lambda v: v == 0 or (v > 0 and not one))
    alpha = check("alpha", given["alpha"], float, "a number above 0 and up to 1, the teacher's weight", lambda v: 0 < v <= 1)
    temperature = check("temperature", given["temperature"], float, "a number from 0.01 to 100", lambda v: 0.01 <= v <= 100)
    kind = check("kind", given.get("kind", KINDS[0]), str, ", ".join(KINDS), lambda v: v in KINDS)
    workers = check("workers", given.get("workers", 0), int, "a whole number from 0, where 0 takes every core", lambda v: v >= 0)
    train = check("train_missing", given.get("train_missing", True), bool, "True or False")
    folder = check("results_dir", given.get("results_dir", ""), str, "a folder as text, or '' for the repository's own",
                   lambda v: not v or (v.strip() and "\0" not in v))
    kd = {"alpha": float(alpha), "temperature": float(temperature), **({"kind": kind} if kind != KINDS[0] else {})}
    configs = grid(preset, {"sft": METHODS["sft"], "kd": kd}, budgets, seeds, world)
    standard = configs == grid(preset, METHODS, sorted(preset.budgets), sorted(preset.seeds), 0)
    root = store.open_folder(folder or results.REPOSITORY / "results")
    return Plan(preset, experiment, tuple(configs), root, standard, train, workers)


def grid(preset: Preset, methods: dict, budgets, seeds, world_seed: int, split: str = "test") -> list[dict]:
    """Run configurations: budget by budget, seed by seed, both methods side by side."""
    data = {"version": SPEC_VERSION[preset.source["kind"]], "source": preset.source, "train_rows": preset.train_rows,
            "max_length": preset.max_length, "vocab_size": preset.vocab_size, "world_seed": world_seed}
    return [{"data": data, "student": preset.student, "teacher": preset.teachers["base"] if objective["alpha"] else None,
             **objective, "budget": budget, "seed": seed, "steps": preset.steps, "batch_size": preset.batch_size,
             "length_window": preset.length_window, "learning_rate": preset.rate(method, budget), "split": split,
             "max_new_tokens": preset.max_new_tokens}
            for budget in budgets for seed in seeds for method, objective in methods.items()]


def run(plan: Plan) -> list[dict]:
    """The records of ``plan``, in grid order; what is missing is computed first. ValueError if it may not be, or copies differ."""
    results.read_claims(plan.folder)
    found = results.read_records(plan.root, plan.preset.name, plan.ids)
    have = {r["run_id"] for r in found}
    missing = [c for i, c in zip(plan.ids, plan.configs) if i not in have]
    at_hand = store.artefact_path(plan.root, "data", plan.configs[0]["data"])
    if at_hand.is_dir():
        _check_one_origin([*found, {"provenance": {"data_hash": store.content_hash(at_hand)}}], plan)
    print(f"{len(have)} of {len(plan.ids)} runs found in {plan.preset.name}/runs; {len(missing)} to train.")
    if missing and not plan.train_missing:
        raise ValueError(f"train_missing=False, but {len(missing)} of {len(plan.ids)} runs are missing, the first of them "
                         f"{results.run_id(missing[0])}; allowed: True, or a folder that holds them.")
    if missing:
        from kdlib import stages

        todo = stages.tasks(missing, plan.root, plan.preset.name, plan.experiment)
        if have:  # made elsewhere, perhaps, where the same specification gives other models
            runner.compute([t for t in todo if t.function is not stages.execute], plan.workers)
            _check_one_origin(found + [{"provenance": stages.hashes(plan.root, c)} for c in missing], plan)
        runner.compute(todo, plan.workers)
    records = results.read_records(plan.root, plan.preset.name, plan.ids)
    if len(records) != len(plan.ids):
        raise RuntimeError(f"{len(plan.ids) - len(records)} of {len(plan.ids)} runs are still missing; run again to go on.")
    _check_one_origin(records, plan)
    return records


def _check_one_origin(records: list[dict], plan: Plan) -> None:
    for part in ("data", "student", "teacher"):
        if len({r["provenance"].get(f"{part}_hash") for r in records} - {None}) > 1:
            raise ValueError(f"Runs of {plan.root / plan.preset.name / 'runs'} come from more than one copy of the {part} (their "
                             f"{part}_hash differs) and cannot be compared; give a new results_dir, and all of it is made here.")


def sweep_plan(preset: Preset, root: str | Path, train_missing: bool = True, workers: int = 0) -> Plan:
    """The runs of a preset's learning-rate sweep: every method over the same rates, on validation rows of an unreported world or seed."""
    s = preset.sweep
    flat = [Preset(**{**vars(preset), "learning_rate": {m: {1: rate} for m in METHODS}}) for rate in s["learning_rates"]]
    configs = [c for p in flat for c in grid(p, METHODS, s["budgets"], s["seeds"], s["world_seed"], split="validation")]
    return Plan(preset, "lr_sweep", tuple(configs), store.open_folder(root), True, train_missing, workers)
