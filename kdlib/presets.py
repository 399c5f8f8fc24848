"""The presets: one study at several sizes. A preset is data, in presets.toml; nothing else in kdlib knows its name."""

import math
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


class Metric(NamedTuple):
    """How a study is scored. ``delta`` is the smallest difference that matters, in the metric's own unit."""

    name: str
    label: str
    higher_is_better: bool
    delta: float

    @property
    def gap_label(self) -> str:
        """A gap whose sign is such that above zero KD is better, in words."""
        return f"gap in {self.label.split(' (')[0]} ({'KD − SFT' if self.higher_is_better else 'SFT − KD'})"


METRICS = {"accuracy": Metric("accuracy", "accuracy (macro over skills)", True, 0.01),
           "bits_per_byte": Metric("bits_per_byte", "bits per byte of human answers", False, 0.01)}

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")  # of divergence
METHODS = {"sft": {"alpha": 0.0, "temperature": 1.0},  # alpha is the weight of the teacher in the loss; everything else is equal
           "kd": {"alpha": 1.0, "temperature": 1.0}}


def check(name: str, value, kind: type, allowed: str, ok=lambda value: True):
    """``value`` if it is of ``kind`` and ``ok``; else ValueError in one sentence with name, value and what is allowed."""
    if not isinstance(value, (float, int) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} has type {type(value).__name__}; allowed: {allowed}.")
    if not ok(value):
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}.")
    return value


class Preset(SimpleNamespace):
    """One size of the study: its ``name`` and what presets.toml says of it.

    ``source`` says what data (``kind`` names a loader of :mod:`kdlib.stages`; its first ``train_rows`` rows are used),
    ``student`` and ``teachers`` which models and how they are pre-trained and teachers tuned, ``steps`` × ``batch_size`` what every
    run trains, in batches of like length within ``length_window`` of them, ``learning_rate`` what the ``sweep`` chose.
    """

    @property
    def scored(self) -> Metric:
        """The metric that decides."""
        return METRICS[self.metric]

    def rate(self, method: str, budget: int) -> float:
        """The rate for ``method`` at ``budget``: the sweep's choices, log-log linear between, constant beyond, to three digits."""
        points = sorted(self.learning_rate[method].items())
        low = max((p for p in points if p[0] <= budget), default=points[0])
        high = min((p for p in points if p[0] >= budget), default=points[-1])
        way = math.log(budget / low[0]) / math.log(high[0] / low[0]) if low[0] < high[0] else 0.0
        return float(f"{low[1] * (high[1] / low[1]) ** way:.3g}")


def _read(name: str, table: dict) -> Preset:
    shared = {"max_tokens": None, **table.pop("pretrain")}
    table["student"] = {**shared, **table["student"]}
    table["teachers"] = {n: {**shared, **t} for n, t in table["teachers"].items()}
    table["learning_rate"] = {m: {int(b): rate for b, rate in rates.items()} for m, rates in table["learning_rate"].items()}
    return Preset(name=name, **table)


PRESETS = {name: _read(name, table) for name, table in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")).items()}
