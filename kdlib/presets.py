"""The presets: one study at several sizes. A preset is data; nothing else in kdlib knows its name."""

import math
from dataclasses import dataclass
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


METRICS = {
    "accuracy": Metric("accuracy", "accuracy (macro over skills)", True, 0.01),
    "bits_per_byte": Metric("bits_per_byte", "bits per byte of human answers", False, 0.01),
}

METHODS = {  # alpha is the weight of the teacher in the loss; everything else is equal
    "sft": {"alpha": 0.0, "temperature": 1.0},
    "kd": {"alpha": 1.0, "temperature": 1.0},
}


@dataclass(frozen=True)
class Preset:
    """One size of the study.

    ``source`` says what data (``kind`` names a loader of :mod:`kdlib.stages`; its first ``train_rows`` rows are used),
    ``student`` and ``teachers`` which models and how they are pre-trained (a teacher is then tuned on all of the training
    data), ``steps`` × ``batch_size`` what every run trains, ``learning_rate`` what the sweep chose for each method at each
    budget it tried. ``sweep`` is that sweep: its own worlds and seeds, scored on validation rows. Batches are formed from rows of like
    length within ``length_window`` batches.
    """

    name: str
    about: str
    source: dict
    train_rows: int
    max_length: int
    vocab_size: int
    max_new_tokens: int
    student: dict
    teachers: dict
    steps: int
    batch_size: int
    length_window: int
    learning_rate: dict
    budgets: tuple
    seeds: tuple
    metric: str
    sweep: dict

    @property
    def scored(self) -> Metric:
        """The metric that decides."""
        return METRICS[self.metric]

    @property
    def many_worlds(self) -> bool:
        """Whether ``world_seed`` draws another world; real text has one."""
        return self.source["kind"] != "text"

    def rate(self, method: str, budget: int) -> float:
        """The peak learning rate of ``method`` at ``budget``: the sweep's choices, interpolated where it did not look.

        Linear in the logarithms of both, constant beyond the ends, to three significant digits.
        """
        points = sorted(self.learning_rate[method].items())
        low = max((p for p in points if p[0] <= budget), default=points[0])
        high = min((p for p in points if p[0] >= budget), default=points[-1])
        way = math.log(budget / low[0]) / math.log(high[0] / low[0]) if low[0] < high[0] else 0.0
        return float(f"{low[1] * (high[1] / low[1]) ** way:.3g}")


def _pretrain(model: str, steps: int, learning_rate: float = 3e-3, batch_size: int = 48, block: int = 48, max_tokens=None) -> dict:
    return {"model": model, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "block": block,
            "max_tokens": max_tokens, "seed": 0}


SMOKE = Preset(
    name="smoke", about="a tiny grid of the lab world for tests",
    source={"kind": "lab", "pretrain_lines": 20000, "pool_rows": 1600, "test_rows": 200, "unseen_rows": 60},
    train_rows=1600, max_length=64, vocab_size=0, max_new_tokens=10,
    student=_pretrain("nano", 500, batch_size=24),
    teachers={"base": {**_pretrain("micro", 500, batch_size=24),
                       "tuning": {"steps": 200, "learning_rate": 2e-3, "batch_size": 32}}},
    steps=100, batch_size=16, length_window=1, learning_rate={"sft": {100: 2e-3}, "kd": {100: 2e-3}}, budgets=(100, 1600), seeds=(0, 1),
    metric="accuracy", sweep={"world_seed": 900, "seeds": [100], "budgets": [100, 1600], "learning_rates": [1e-3, 2e-3]})

LAB = Preset(
    name="lab", about="the lab world on a laptop's processor",
    source={"kind": "lab", "pretrain_lines": 200000, "pool_rows": 16000, "test_rows": 600, "unseen_rows": 300},
    train_rows=16000, max_length=64, vocab_size=0, max_new_tokens=12,
    student=_pretrain("student", 1000),
    teachers={"base": {**_pretrain("teacher", 1600), "tuning": {"steps": 800, "learning_rate": 1e-3, "batch_size": 32}}},
    steps=400, batch_size=32, length_window=1,
    learning_rate={"sft": {200: 2e-3, 800: 1e-3, 3200: 1e-3, 12800: 1e-3}, "kd": {200: 4e-3, 800: 1e-3, 3200: 1e-3, 12800: 1e-3}},
    budgets=(200, 400, 800, 1600, 3200, 6400, 12800), seeds=(0, 1, 2, 3, 4, 5, 6),
    metric="accuracy", sweep={"world_seed": 900, "seeds": [100, 101, 102], "budgets": [200, 800, 3200, 12800],
                              "learning_rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]})

_DOLLY = {"where": {"source": "dolly_15k"}, "category_in_id": r"dolly-(\w+)-"}

REALTEXT = Preset(
    name="realtext", about="instructions and answers that people wrote, models pre-trained here on plain English",
    source={"kind": "text",
            "pretrain": {"hub": "Salesforce/wikitext", "hub_config": "wikitext-103-raw-v1", "local": "pretrain_books.jsonl.gz"},
            "train": {"hub": "databricks/databricks-dolly-15k", "local": "general_train.jsonl.gz", **_DOLLY},
            "test": {"local": "general_test.jsonl.gz", **_DOLLY},
            "validation_rows": 300, "test_rows": 500},
    train_rows=12000, max_length=256, vocab_size=4096, max_new_tokens=0,
    student=_pretrain("text-student", 600, batch_size=16, block=256, max_tokens=4_000_000),
    teachers={"base": {**_pretrain("text-teacher", 600, batch_size=16, block=256, max_tokens=4_000_000),
                       "tuning": {"steps": 750, "learning_rate": 1e-3, "batch_size": 16, "length_window": 8}}},
    steps=200, batch_size=16, length_window=8,
    learning_rate={"sft": {100: 0.000125, 300: 0.00025, 1000: 0.002, 3200: 0.004}, "kd": {100: 0.004, 300: 0.004, 1000: 0.004, 3200: 0.004}},
    budgets=(100, 300, 1000, 3200), seeds=(0, 1, 2),
    metric="bits_per_byte", sweep={"world_seed": 0, "seeds": [100], "budgets": [100, 300, 1000, 3200],
                                     "learning_rates": [6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]})

PRESETS = {p.name: p for p in (SMOKE, LAB, REALTEXT)}
