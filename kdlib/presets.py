"""The presets: one study at several sizes. A preset is data, in presets.toml or in the file of the same form that KDLIB_PRESETS names;
nothing else in kdlib knows its name.
"""

import copy
import os
import tomllib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# How a study is scored; delta is the smallest difference that matters, in the metric's own unit.
Metric = namedtuple("Metric", "name label gap_label higher_is_better delta")

TABLES = tomllib.loads(Path(__file__).with_name("experiments.toml").read_text("utf-8"))  # which explains them
KINDS, METHODS = tuple(TABLES["kinds"]), TABLES["methods"]
METRICS = {name: Metric(name, **metric) for name, metric in TABLES["metrics"].items()}
RECIPES = {name: tuple(tuple(stage.split()) for stage in stages) for name, stages in TABLES["recipes"].items()}
OPTIONAL = set(TABLES["optional"])
ARMS = {name: tuple((*arm.split(), None)[:2] for arm in arms) for name, arms in TABLES["arms"].items()}


def check(name: str, value, kind: type, allowed: str, ok=lambda value: True):
    """``value`` if it is of ``kind`` and ``ok``; else ValueError in one sentence with name, value and what is allowed."""
    if not isinstance(value, (float, int) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} has type {type(value).__name__}; allowed: {allowed}.")
    if not ok(value):
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}.")
    return value


class Preset(SimpleNamespace):
    """One size of the study: its ``name``, what presets.toml, which explains the fields, says of it, and ``scored``, the metric."""

    def lacks(self, experiment: str) -> list[str]:
        """The teachers that ``experiment`` needs and the preset has not, or its domains."""
        needed = {teacher for _, teacher in ARMS[experiment]} - {None} - OPTIONAL
        return sorted(needed - set(self.teachers)) if needed else [] if self.domain else ["domain"]

    def model(self, name: str) -> str:
        """What a base model or teacher is made of: a name of the ladder, or a hub id."""
        made = self.bases.get(name) or self.teachers[name]
        return made.get("model") or made.get("hub") or self.model(made["start"])

    @staticmethod
    def rate(choices: dict[int, float], budget: int) -> float:
        """The rate at ``budget`` by the sweep's ``choices``: log-log linear between, to three digits, constant beyond."""
        if len(choices) == 1:
            return float(*choices.values())
        budgets, rates = np.log(sorted(choices.items())).T
        return float(f"{np.exp(np.interp(np.log(budget), budgets, rates)):.3g}")


def _over(table: dict, changes: dict) -> dict:
    def alike(old, new):  # a model made otherwise has nothing of the old one
        return isinstance(old, dict) and isinstance(new, dict) and len({"hub", "start", "model"} & {*old, *new}) < 2

    both = {k: _over(table[k], v) if alike(table.get(k), v) else v for k, v in changes.items()}
    return {k: v for k, v in {**table, **both}.items() if v is not False or not isinstance(table.get(k), dict)}  # false takes a table away


def _read(name: str, table: dict) -> Preset:
    for kind, one in ((kind, one) for kind in ("bases", "teachers") for one in table[kind]):
        made = check(f"{kind}.{one} of preset {name!r}", table[kind][one], dict, "a table, or false to take away one that is there")
        table[kind][one] = {"revision": "main", **made} if "hub" in made else made
    shared = {"max_tokens": None, **table.pop("pretrain", {})}
    table["bases"] = {n: base if "hub" in base else {**shared, **base} for n, base in table["bases"].items()}
    domain = table.setdefault("domain", {})
    choices = [*table["learning_rate"].values(), *([*domain["learning_rate"].values(), domain["tuning"]["learning_rate"]] if domain else ())]
    for rates in (r for given in choices for r in (given if isinstance(given, list) else [given])):
        for budget in list(rates):
            rates[int(budget)] = rates.pop(budget)
    return Preset(name=name, scored=METRICS[table["metric"]], **table)


def _own(path: str, known: dict) -> dict:
    """The presets in a user's file, each ``like`` one that is ``known`` and with fields of theirs. ValueError, in one sentence, on others."""
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"KDLIB_PRESETS={path!r} cannot be read ({type(error).__name__}: {error}); allowed: a TOML file like kdlib/presets.toml.") from error
    fields = {"like", *(field for table in known.values() for field in table)}
    for name, table in tables.items():
        where = f"preset {name!r} of KDLIB_PRESETS={path!r}"
        if name in known or not isinstance(table, dict):
            raise ValueError(f"{where[0].upper()}{where[1:]} is {'one of kdlib' if name in known else 'no table'}; allowed: a table under a new name.")
        check(f"like of {where}", table.get("like"), str, ", ".join(known), known.__contains__)
        if unknown := table.keys() - fields:
            raise ValueError(f"{where[0].upper()}{where[1:]} has unknown {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(fields))}.")
    return tables


_TABLES, _FILE = {}, tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_DOMAINS = _FILE.pop("domains")
if _path := os.environ.get("KDLIB_PRESETS"):
    _FILE |= _own(_path, _FILE)
for _name, _table in _FILE.items():
    _TABLES[_name] = _over(_TABLES[_like], _table) if (_like := _table.pop("like", None)) else _table
    for _domain, _more in _TABLES[_name]["source"].get("domains", {}).items():
        _TABLES[_name]["source"]["domains"][_domain] = _over(_DOMAINS[_domain], _more)
PRESETS = {name: _read(name, copy.deepcopy(table)) for name, table in _TABLES.items()}
