"""Fixtures: small real models, a small lab corpus, and one tiny study that several tests read."""

import os

import pytest
import torch
from tiny import TINY, plan

from kdlib import data, lab, models, study

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of kernels too: threads that wait for a core another test has take many times as long
SLOWEST = ("test_notebooks.py", "test_repository.py", "test_paper.py", "test_study.py", "test_runner.py", "test_trainer.py", "06_your_own_models.ipynb", "test_own.py", "test_labels.py")


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that two processes end together."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def tokenizer():
    """The lab's word-level tokenizer."""
    return models.build_tokenizer(lab.vocabulary())


@pytest.fixture(scope="session")
def rows(tokenizer):
    """48 rendered lab rows, of unequal lengths."""
    return data.render(lab.World(3).mixture("train", "seen", 48), tokenizer, 64)[0]


@pytest.fixture
def student(tokenizer):
    """A fresh nano model."""
    return models.build_model("nano", tokenizer, seed=1).eval()


@pytest.fixture
def teacher(tokenizer):
    """A fresh micro model with sharpened weights, so that its distributions are far from uniform."""
    model = models.build_model("micro", tokenizer, seed=2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return model


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A results folder with a finished tiny study."""
    root = tmp_path_factory.mktemp("tiny") / "results"
    study.run(plan(root))
    return root


@pytest.fixture(scope="session")
def tiny_records(tiny_root):
    """The records of the tiny study, in grid order."""
    return study.run(plan(tiny_root, train_missing=False))


@pytest.fixture
def tiny_preset(monkeypatch):
    """The tiny preset under its name, for code that looks presets up."""
    monkeypatch.setitem(study.PRESETS, "tiny", TINY)
    return TINY
