"""From parameters to run records: validated plans, run configurations, and the computing of those that are missing."""

import ast
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import kdlib
from kdlib import results, runner, store
from kdlib.presets import ARMS, KINDS, METHODS, OPTIONAL, PRESETS, RECIPES, Preset, check
from kdlib.specs import EXACT

SPEC_VERSION = {"lab": 5, "text": 5, "hub": 6}  # of data with a tokenizer of the hub, else by source; raised whenever a change of the code changes what a configuration computes
SHARED = ("preset", "world_seed", "budgets", "seeds", "results_dir", "train_missing", "dry_run", "workers")
PARAMETERS = {**dict.fromkeys(ARMS, (*SHARED, "tasks", "alpha", "kind", "temperature")), "two_stage_domain": (*SHARED, "tasks", "domains", "pools")}


@dataclass(frozen=True)
class Plan:
    """A validated experiment: its preset, its runs (labels and configuration), and where its results lie."""

    preset: Preset
    runs: tuple
    root: Path
    standard: bool
    train_missing: bool
    workers: int

    configs = property(lambda self: [c for _, c in self.runs], doc="The runs' configurations, in the order of the grid.")
    ids = property(lambda self: [results.run_id(c) for c in self.configs], doc="The run ids, in that order.")
    budgets = property(lambda self: sorted({r["budget"] for r, _ in self.runs}), doc="The budgets, smallest first.")
    seeds = property(lambda self: sorted({r["seed"] for r, _ in self.runs}), doc="The seeds.")
    domains = property(lambda self: sorted({r["domain"] for r, _ in self.runs} - {None}), doc="The domains, none in general runs.")

    @property
    def trains(self) -> bool:
        """Whether running it trains: some run has no record, and may be trained."""
        return self.train_missing and not all(results.record_path(self.root, self.preset.name, i).exists() for i in self.ids)

    @property
    def folder(self) -> Path:
        """Where tables, figures and claims go: the preset's folder, one in it for another world, or one of its own for a changed design."""
        home, world = self.root / self.preset.name, self.runs[0][0]["world_seed"]
        return (home / f"world-{world}" if world else home) if self.standard else home / "variants" / store.digest(sorted(self.ids), 8)


def check_names(namespace: dict, allowed) -> None:
    """Raise ValueError if a cell that papermill injected into the notebook with these ``globals()`` sets another name."""
    injected = [ast.parse(cell).body for cell in namespace.get("In", []) if cell.startswith("# Parameters")]
    for name in [t.id for body in injected for node in body for t in getattr(node, "targets", [])]:
        if name not in allowed:  # papermill itself only warns
            raise ValueError(f"Unknown parameter {name!r} (value {namespace.get(name)!r}); allowed: {', '.join(allowed)}.")


def plan(experiment: str, namespace: dict) -> Plan:
    """The plan that a notebook's ``globals()`` ask for, the rest by default; ValueError, in one sentence, if a parameter is wrong. A dry run
    prints what the plan would take, and ends there (SystemExit).
    """
    check_names(namespace, PARAMETERS[experiment])
    given = {n: namespace[n] for n in PARAMETERS[experiment] if n in namespace}
    name = check("preset", given.get("preset", "lab"), str, ", ".join(PRESETS), lambda v: v in PRESETS)
    preset, general = PRESETS[name], experiment != "two_stage_domain"
    allowed = "tasks of the harness by name, each with a table of settings" if hasattr(preset, "tasks") else f"{{}}, for preset {name!r} has no benchmarks"
    if check("tasks", given.get("tasks", {}), dict, allowed, lambda v: not v or (hasattr(preset, "tasks") and all(type(t) is dict for t in v.values()))):
        everywhere = dict.fromkeys(preset.domain["names"], given["tasks"])
        preset = Preset(**{**vars(preset), **({"tasks": given["tasks"]} if general else {"domain": {**preset.domain, "tasks": everywhere}})})
    if lacking := preset.lacks(experiment):
        able = ", ".join(n for n, p in PRESETS.items() if not p.lacks(experiment))
        raise ValueError(f"preset={name!r} has no {' and no '.join(lacking)}{' teacher' if general else ''}; allowed: {able}.")
    size, usual = (preset.train_rows, vars(preset)) if general else (preset.domain["rows"], preset.domain)

    def numbers(name, low, high, limit):
        allowed = f"a list of at least two different whole numbers from {low} to {limit}"
        return sorted(check(name, given.get(name, []), list, allowed, lambda vs: all(type(v) is int and low <= v <= high for v in vs) and (
            not vs or len(set(vs)) == len(vs) >= 2)) or usual[name])

    budgets = numbers("budgets", 1, size, f"{size}, the rows of preset {name!r}")
    seeds = numbers("seeds", 0, 2**31, "2**31, because an interval needs two")
    allowed = f"0, because preset {name!r} has one world" if (one := len(preset.worlds) == 1) else "a whole number from 0"
    world = check("world_seed", given.get("world_seed", 0), int, allowed, lambda v: v == 0 or (v > 0 and not one))
    workers = check("workers", given.get("workers", 0), int, "a whole number from 0, where 0 takes every core", lambda v: v >= 0)
    train, dry = (check(n, given.get(n, usual), bool, "True or False") for n, usual in (("train_missing", True), ("dry_run", False)))
    folder = check("results_dir", given.get("results_dir", ""), str, "a folder as text, or '' for the repository's own",
                   lambda v: not v or (v.strip() and "\0" not in v))
    if general:
        alpha = check("alpha", given.get("alpha", 1.0), float, "a number above 0 and up to 1, the teacher's weight", lambda v: 0 < v <= 1)
        kind = check("kind", given.get("kind", KINDS[0]), str, ", ".join(KINDS), lambda v: v in KINDS)
        at = check("temperature", given.get("temperature", 1.0), float, "a number from 0.01 to 100", lambda v: 0.01 <= v <= 100)
        chosen = {"kd": {"alpha": float(alpha), "temperature": float(at), **({"kind": kind} if kind != KINDS[0] else {})}}
    else:
        domains = check("domains", given.get("domains", []), list, f"a list of {', '.join(usual['names'])}", lambda v: all(n in usual["names"] for n in v))
        chosen = {"domains": domains, "pools": numbers("pools", 1, usual["pool_rows"], f"{usual['pool_rows']}, the prompts of a pool")}
    runs = grid(preset, experiment, world, budgets, seeds, **chosen)
    made = Plan(preset, tuple(runs), store.open_folder(folder or results.REPOSITORY / "results"),
                runs == grid(PRESETS[name], experiment, world) and world in preset.worlds, train, workers or getattr(preset, "workers", 0))
    if dry:
        from kdlib import costs
        costs.report(made)
        raise SystemExit(0)
    return made


def data_spec(preset: Preset, world_seed: int) -> dict:
    """What fixes the data of a preset in one world."""
    spec = {"version": SPEC_VERSION["hub" if hasattr(preset, "tokenizer") else preset.source["kind"]], "source": preset.source, "train_rows": preset.train_rows,
            "max_length": preset.max_length, "max_new_tokens": preset.max_new_tokens, "vocab_size": preset.vocab_size, "world_seed": world_seed}
    return spec | {k: vars(preset)[k] for k in ("tokenizer", "prompt_length") if hasattr(preset, k)}


def model_spec(preset: Preset, name: str, world_seed: int) -> dict:
    """What fixes a base model or teacher of a preset: tuned on all training rows, or in rounds on what it says that verifies."""
    given = preset.bases.get(name) or preset.teachers[name]
    if "hub" in given:
        return {"data": data_spec(preset, world_seed), **given}
    if name in preset.bases:
        return {"data": data_spec(preset, world_seed), "pretrain": given}
    teacher = given
    made = model_spec(preset, teacher["start"], world_seed)
    for draw in range(teacher.get("rounds", 1)):
        part = _said(preset, "train", made, temperature=1.0, seed=draw) | {"verified": True} if "rounds" in teacher else {"set": "train"}
        made = {"start": made, "phases": [_phase(preset, [part], **{**METHODS["sft"], "seed": 0, **teacher["tuning"]})]}
    return made


def _said(preset: Preset, name: str, model: dict, **how) -> dict:
    return {"set": name, "said": {"by": model, "set": name, "temperature": 0.0, "seed": 0, **how}}


def _phase(preset: Preset, rows: list[dict], teacher: dict | None = None, **how) -> dict:
    own = {k: vars(preset)[k] for k in ("training", *(("cache",) if teacher else ())) if k in vars(preset)}
    if "cache" in own and own["cache"]["form"] not in EXACT and how["temperature"] != 1:  # which then holds for that temperature alone
        own["cache"] = {**own["cache"], "temperature": how["temperature"]}
    return {"rows": rows, "teacher": teacher, "batch_size": preset.batch_size, **own, **how}


def grid(preset: Preset, experiment: str, world: int, budgets=None, seeds=None, domains=None, pools=None, kd: dict | None = None,
         split: str = "test", rate: tuple | None = None, arms=None) -> list[tuple[dict, dict]]:
    """Runs of an experiment, as labels and configuration: its :data:`~kdlib.presets.ARMS` side by side; by default the preset's grid. In a
    domain, the teacher is tuned on the same human answers before it answers the pool's prompts; the arms that read those run with the largest
    of ``pools``, and at the middle budget with all. ``rate`` holds a learning rate for every stage, instead of the preset's.
    """
    d = preset.domain if experiment == "two_stage_domain" else {}
    usual, size, runs = d or {**vars(preset), "names": (None,), "pools": (None,)}, {"batch_size": d.get("batch_size", preset.batch_size)}, []
    budgets, seeds, domains, pools = (sorted(set(given or usual[k])) for given, k in (
        (budgets, "budgets"), (seeds, "seeds"), (domains, "names"), (pools, "pools")))
    able = [arm for arm in arms or ARMS[experiment] if d or arm[1] not in OPTIONAL or arm[1] in preset.teachers]
    for domain, budget, seed, pool, (method, name) in product(domains, budgets, seeds, pools, able):
        prefix = {"budget": budget, "seed": seed}
        alone = not d and budget <= getattr(preset, "alone", 0)
        human = {"set": f"{domain}/train" if d else "train", **prefix, **({"alone": True} if alone else {})}
        teacher = model_spec(preset, name, world) if (name := d.get("teacher", name)) else None
        if d:
            tuning = {**METHODS["sft"], **size, **d["tuning"], "learning_rate": preset.rate(d["tuning"]["learning_rate"], budget), "seed": seed}
            teacher = {"start": teacher, "phases": [_phase(preset, [human], **tuning)]}
        said = _said(preset, f"{domain}/pool" if d else "train", teacher, **getattr(preset, "answers", {}), **({"only": prefix} if alone else {}))
        said |= {} if alone else {**prefix, "budget": pool or budget}
        stages, parts = RECIPES[method], {"human": human, "synthetic": said}
        reads = d and any("synthetic" in rows for rows, _ in stages)
        if pool != pools[-1] and not (reads and budget == budgets[len(budgets) // 2]):
            continue
        phases, chosen = [], usual["learning_rate"][method]
        steps = math.ceil(usual["epochs"] * budget / size["batch_size"]) if "epochs" in usual else usual["steps"] // len(stages)
        rates = rate or [preset.rate(of_stage, budget) for of_stage in (chosen if isinstance(chosen, list) else [chosen])]
        for (rows, how), at in zip(stages, rates, strict=True):
            phases.append(_phase(preset, [parts[part] for part in rows.split("+")], teacher if how == "kd" else None, seed=seed, learning_rate=at,
                                 steps=steps, **size, **{**METHODS[how], **(kd if how == "kd" and kd else {})}))
        labels = {"experiment": experiment, "preset": preset.name, "world_seed": world, "student": preset.model("student"),
                  "method": method, "teacher": name, "domain": domain, "pool": pool if reads else None, "budget": budget, "seed": seed}
        scored = {"on": f"{domain}/{split}" if d else split}
        tasks = d.get("tasks", {}).get(domain) if d else getattr(preset, "tasks", None)
        scored |= {"tasks": tasks} if tasks and split == "test" else {}
        runs.append((labels, {"start": model_spec(preset, d.get("student", "student"), world), "phases": phases, "evaluate": scored}))
    return runs


def run(plan: Plan) -> list[dict]:
    """The records of ``plan``, in grid order; what is missing is computed first. ValueError if it may not be, or copies differ."""
    results.read_claims(plan.folder)
    found = results.read_records(plan.root, plan.preset.name, plan.ids)
    have = {r["run_id"] for r in found}
    missing = [run for i, run in zip(plan.ids, plan.runs) if i not in have]
    print(f"{len(have)} of {len(plan.ids)} runs found in {plan.preset.name}/runs; {len(missing)} to train.")
    _check_one_origin(plan, found)
    if missing and not plan.train_missing:
        absent = Counter(" ".join(f"{k} {r[k]}" for k in ("domain", "method", "teacher", "pool", "budget") if r[k]) for r, _ in missing)
        which = ", ".join(f"{cell} ({n} seed{'s' * (n > 1)})" for cell, n in absent.items()) if have else "all of them"
        raise ValueError(f"{len(missing)} of {len(plan.ids)} runs of world {missing[0][0]['world_seed']} are missing, and none may be trained "
                         f"(train_missing=False): {which}; allowed: a results_dir that holds them, which `make study` or their notebook fills.")
    if missing:
        from kdlib import jobs, stages
        for asked in {json.dumps(c["evaluate"]["tasks"]) for c in plan.configs if "tasks" in c["evaluate"]}:
            kdlib.harness.check_tasks(json.loads(asked))
        if any(phase.get("training", {}).get("lora") is not None for _, config in missing for phase in config["phases"]):
            kdlib.trainer.peft()
        runner.launch_settings()  # ValueError if they are none
        todo, needs = jobs.tasks(missing, plan.root, plan.preset.metric)
        theirs = {name for r in found for name in r["provenance"]["artefacts"]}  # made elsewhere, perhaps, where the same specification gives others
        if again := {t: cost for t, cost in todo.items() if t.func is stages.make and stages.path(plan.root, t.args[1]).name in theirs}:
            runner.compute(again, plan.workers, needs)
            _check_one_origin(plan, found)
        runner.compute(todo, plan.workers, needs)
        found = results.read_records(plan.root, plan.preset.name, plan.ids)
        _check_one_origin(plan, found)
    return found


def _check_one_origin(plan: Plan, records: list[dict]) -> None:
    """Raise ValueError if one artefact has other content in one of ``records`` than in another, or than at hand."""
    known: dict = {}
    for r in records:
        for name, content in r["provenance"]["artefacts"].items():
            here = plan.root / ".cache" / name
            known.setdefault(name, store.content_hash(here) if here.is_dir() else content)
            if known[name] != content:
                raise ValueError(f"Runs in {plan.root / plan.preset.name} come from more than one copy of {name}, so they cannot be compared; "
                                 "give a new results_dir, and all of it is made here.")
