"""The presets: one study at several sizes. A preset is data, in presets.toml; nothing else in kdlib knows its name."""

import copy
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
        """The rate at ``budget`` by the sweep's ``choices``: log-log linear between, constant beyond, to three digits."""
        budgets, rates = np.log(sorted(choices.items())).T
        return float(f"{np.exp(np.interp(np.log(budget), budgets, rates)):.3g}")


def _over(table: dict, changes: dict) -> dict:
    both = {k: _over(table[k], v) if isinstance(table.get(k), dict) and isinstance(v, dict) else v for k, v in changes.items()}
    return {**table, **both}


def _read(name: str, table: dict) -> Preset:
    shared = {"max_tokens": None, **table.pop("pretrain", {})}
    table["bases"] = {n: base if "hub" in base else {**shared, **base} for n, base in table["bases"].items()}
    domain = table.setdefault("domain", {})
    choices = [*table["learning_rate"].values(), *([*domain["learning_rate"].values(), domain["tuning"]["learning_rate"]] if domain else ())]
    for rates in (r for given in choices for r in (given if isinstance(given, list) else [given])):
        for budget in list(rates):
            rates[int(budget)] = rates.pop(budget)
    return Preset(name=name, scored=METRICS[table["metric"]], **table)


_TABLES, _FILE = {}, tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_DOMAINS = _FILE.pop("domains")
for _name, _table in _FILE.items():
    _TABLES[_name] = _over(_TABLES[_like], _table) if (_like := _table.pop("like", None)) else _table
    for _domain, _own in _TABLES[_name]["source"].get("domains", {}).items():
        _TABLES[_name]["source"]["domains"][_domain] = _over(_DOMAINS[_domain], _own)
PRESETS = {name: _read(name, copy.deepcopy(table)) for name, table in _TABLES.items()}
