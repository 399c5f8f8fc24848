"""What fixes the artefacts that runs share, and a run itself: specifications in JSON, whose hash is their name.

A *model* is ``{"data", "pretrain"}``, from random weights on, or ``{"start": model, "phases"}``; one ``{"data", "hub",
"revision"}`` is somebody else's, and only its own scores are an artefact. A *phase* trains ``steps`` batches on its ``rows``,
equally many of each *part*, by the settings of :class:`~kdlib.losses.Objective`, towards its ``teacher``, a model or None. A part
is ``{"set": name}``, perhaps with ``budget`` (so many of the set's rows, a prefix of the order that ``seed`` draws) and ``said``:
the model ``by`` whose own words, drawn at a ``temperature``, stand for the annotators' (with ``verified`` those alone that verify;
with ``only`` on a budget's prompts alone, with ``open`` none that was cut off is taught to end there). The targets of a part are
those of all the set's rows, with ``alone`` of the budget's. A run's configuration is a model's, and what is evaluated.
"""

import json
from functools import lru_cache
from pathlib import Path

from kdlib import store

EXACT = ("full", "hidden")  # forms of a cache of targets that hold all that a teacher says
CACHE = {"form": "hidden", "dtype": "float32"}  # of targets: exact, so that runs differ from live ones by rounding
KINDS = {"source": "data", "pretrain": "base", "hub": "base", "phases": "model", "cache": "targets", "by": "answers", "of": "scores"}  # of artefacts, by a key


def data_of(spec: dict) -> dict:
    """The specification of the data under a model or a run."""
    return first_of(spec)["data"]


def first_of(spec: dict) -> dict:
    """The specification of the model that a model or a run was first tuned from."""
    return first_of(spec["start"]) if "start" in spec else spec


def targets_of(phase: dict) -> dict:
    """What fixes the cache of what a phase's teacher says of its rows, whatever the budget, unless its rows stand ``alone``."""
    rows = [{k: v for k, v in part.items() if part.get("alone") or k not in ("budget", "seed")} for part in phase["rows"]]
    return {"teacher": phase["teacher"], "rows": rows, "cache": phase.get("cache", CACHE)}


def made_from(spec: dict) -> list[dict]:
    """The specifications of what an artefact or a run is made from directly."""
    phases = spec.get("phases", [])
    said = [part["said"] for rows in (spec.get("rows", []), *(p["rows"] for p in phases)) for part in rows if "said" in part]
    scored = [{"of": model, "tasks": tasks} for model in (spec["start"], teacher_of(spec)) if model] if (
        tasks := spec.get("evaluate", {}).get("tasks")) else []
    return [spec[k] for k in ("data", "start", "by", "teacher", "of") if k in spec] + said + [targets_of(p) for p in phases if p["teacher"]] + scored


def path(root: Path, spec: dict) -> Path:
    """Where an artefact lies, whether it exists or not."""
    return store.artefact_path(root, next(kind for key, kind in KINDS.items() if key in spec), spec)


def teacher_of(config: dict) -> dict | None:
    """The last teacher of a run, by its targets or by its words; None if it has none."""
    return ([None] + [t for p in config["phases"] for t in (p["teacher"], *(r.get("said", {}).get("by") for r in p["rows"])) if t])[-1]


def scored_on(spec: dict, held: list[str]) -> list[str]:
    """The ``held`` out sets that a model is scored on when it is made: all, or if it was tuned on a domain's rows that domain's."""
    domains = {part["set"].split("/")[0] for p in spec.get("phases", ()) for part in p["rows"] if "/" in part["set"]}
    return [name for name in held if not domains or name.split("/")[0] in domains]


@lru_cache(maxsize=None)
def all_of(config: str) -> dict[str, dict]:
    """By name, the specification of every artefact under a run (its configuration as JSON), after those it is made from."""
    out = {}
    for below in made_from(json.loads(config)):
        out |= all_of(json.dumps(below)) | {path(Path(), below).name: below}
    return out
