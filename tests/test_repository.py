"""What is committed agrees with itself: pins, layout, imports, records, and everything computed from them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from tiny import sweep

from kdlib import results, store, study
from kdlib.presets import PRESETS

ROOT = results.REPOSITORY
RESULTS = ROOT / "results"
STUDIES = ("lab", "realtext")


def lines(name):
    return [s.strip() for s in (ROOT / name).read_text().splitlines() if s.strip() and not s.startswith("#")]


def pins(requirements):
    found = dict(re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^;\s]+)", line).groups() for line in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}


def test_lock_pyproject_and_conda_environment_agree():
    lock = pins(lines(".requirements.lock"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = pins(project["dependencies"])
    assert wanted.items() <= lock.items()
    assert lock["torch"] == "2.13.0" and not [name for name in lock if name.startswith(("nvidia", "triton"))]
    conda = (ROOT / "environment.yml").read_text()
    assert "-r .requirements.lock" in conda and "-e ." in conda
    assert not re.search(r"==", conda), "versions stand in the lock alone"
    low, high = re.search(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    assert f"python>=3.{low},<3.{high}" in conda


def test_the_installed_packages_are_the_locked_ones():
    from importlib.metadata import version

    for name, locked in pins(lines(".requirements.lock")).items():
        assert version(name).split("+")[0] == locked, name


def test_the_layout_is_the_agreed_one():
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {p.split("/")[0] for p in tracked.stdout.split()}
    assert {p for p in top if not p.startswith(".")} == {
        "notebooks", "kdlib", "results", "tests", "environment.yml", "README.md", "pyproject.toml", "Makefile", "LICENSE",
        "CITATION.cff"}


def test_the_library_stays_slim():
    sizes = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "kdlib").glob("*.py")}
    assert sum(sizes.values()) <= 2500 and max(sizes.values()) <= 300, sizes


def test_reading_results_needs_no_torch():
    code = "import sys; from kdlib import results, stats, plots, study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def committed(name):
    return study.plan("data_budget", {"preset": name, "results_dir": str(RESULTS)})


@pytest.mark.parametrize("name", STUDIES)
def test_every_committed_record_is_whole_and_belongs_to_a_design(name):
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", f"results/{name}/runs"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    ids = {Path(p).stem for p in tracked.stdout.split()}  # a reader's own runs beside them do no harm
    assert ids == set(committed(name).ids) | set(sweep(PRESETS[name], RESULTS).ids)
    for r in results.read_records(RESULTS, name, sorted(ids)):
        assert r["provenance"]["code_dirty"] is False and len(r["provenance"]["code_version"]) == 40
        assert {"id", "suite", "nll", "bytes"} <= set(r["items"])


@pytest.mark.parametrize("name", STUDIES)
def test_tables_figures_and_claims_follow_from_the_records(name, tmp_path, monkeypatch):
    """The notebooks' own cells, on a copy of the records and without the two that look at the data."""
    shutil.copytree(RESULTS / name / "runs", store.open_folder(tmp_path) / name / "runs")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    for notebook in ("02_data_budget", "07_learning_rates"):
        namespace = {}
        for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
            if cell.cell_type == "code" and "bundle" not in cell.source:
                exec(cell.source, namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace |= {"preset": name, "results_dir": str(tmp_path), "train_missing": False}
    assert namespace["chosen"] == {m: PRESETS[name].learning_rate[m] for m in ("sft", "kd")}, "the preset holds what the committed sweep chose"
    stored, again = ({p.relative_to(root / name) for p in (root / name).rglob("*") if p.is_file() and "notebooks" not in p.parts}
                     for root in (RESULTS, tmp_path))
    assert stored == again
    compared = [p for p in stored if p.suffix in (".csv", ".json")]  # pictures depend on the fonts that a machine has
    assert len([p for p in compared if p.parts[0] == "figures"]) == 4
    for path in compared:
        assert (tmp_path / name / path).read_bytes() == (RESULTS / name / path).read_bytes(), path


@pytest.mark.parametrize("name", STUDIES)
def test_the_executed_copy_is_of_the_notebook_and_shows_the_committed_verdicts(name):
    copy, current = (nbformat.read(folder / "02_data_budget.ipynb", 4) for folder in (RESULTS / name / "notebooks", ROOT / "notebooks"))
    injected, = [c for c in copy.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert [c.source for c in copy.cells if c is not injected] == [c.source for c in current.cells]
    assert f'preset = "{name}"' in injected.source
    looked, = [c for c in copy.cells if "data-text" in c.metadata.get("tags", [])]
    assert bool(looked.outputs) is (name == "lab"), "real text belongs to its publishers"
    assert all(c.outputs for c in copy.cells if "plt.show()" in c.source)
    shown = "".join(o.get("text", "") for c in copy.cells if "verdict" in c.metadata.get("tags", []) for o in c.outputs)
    for c in json.loads((RESULTS / name / "claims.json").read_text()):
        assert (f"{c['claim']}: {c['verdict']}. {c['contrast']}: {c['estimate']:+.4f} [{c['ci_low']:+.4f}, {c['ci_high']:+.4f}], "
                f"{c['n_seeds']} seeds") in shown
    assert not [o for c in copy.cells for o in c.get("outputs", []) if o.output_type == "error"]


def test_the_readmes_claims_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / ".ci" / "readme.py"))["generated"](text, RESULTS) == text, "stale: run `make readme`"
    assert text.count("| lab | C1") == 2 and text.count("| realtext | C1") == 2


def test_the_lab_is_as_the_readme_puts_it():
    table = pd.read_csv(RESULTS / "lab" / "tables" / "data_budget.csv").sort_values("budget")
    assert (table.gap > 0).all() and {c["claim"]: c["verdict"] for c in results.read_claims(RESULTS / "lab")}["C1b"] == "inconclusive"
    by_skill = pd.read_csv(RESULTS / "lab" / "tables" / "by_skill.csv").set_index("skill")
    lead = by_skill.kd - by_skill.sft
    assert lead.idxmax() == "name" and lead["name"] > lead.sum() / 2
    assert by_skill.sft["name"] < 0.5 < by_skill.kd["name"] < by_skill.teacher["name"]


def test_the_readmes_files_and_make_targets_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)", text)) | {"study", "test", "smoke", "lab", "clean"}:
        assert re.search(rf"^{target}:", makefile, re.M), target
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link


def models_in(config):
    """A configuration, and every model's below it."""
    below = [config.get("start"), *(p["teacher"] for p in config.get("phases", ()))]
    return [config, *(m for b in below if b for m in models_in(b))]


def test_the_data_dictionary_knows_every_field():
    dictionary = (RESULTS / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([^`\n]+)`", dictionary.replace("```", "")))
    for name in STUDIES:
        for r in results.read_records(RESULTS, name, committed(name).ids):
            phases = [p for model in models_in(r["config"]) for p in model.get("phases", ())]
            for group in (r, r["metrics"], r["items"], r["provenance"], *models_in(r["config"]), *phases, *(part for p in phases for part in p["rows"])):
                assert set(group) <= words, set(group) - words
        for path in [*(RESULTS / name / "tables").glob("*.csv"), *(RESULTS / name / "figures").glob("*.csv")]:
            columns = {re.sub("_(kd|sft)$", "", c) for c in pd.read_csv(path).columns}
            assert columns <= words, columns - words
        for claim in json.loads((RESULTS / name / "claims.json").read_text()):
            assert set(claim) <= words


@pytest.mark.parametrize("path", sorted((RESULTS / "bench").glob("*.json")), ids=lambda p: p.stem)
def test_a_benchmark_says_where_and_how_often_it_measured(path):
    record, words = json.loads(path.read_text()), set(re.findall(r"`([^`\n]+)`", (RESULTS / "README.md").read_text(encoding="utf-8")))
    assert record["environment"]["code_dirty"] is False and record["packages"]["torch"] == "2.13.0" and record["device"]
    assert record["benchmark"] == path.stem.rpartition("-")[2] and len(record["found"]) > 4
    for row in record["found"].values():
        for name, value in (row if isinstance(row, dict) else {}).items():
            assert name in words, name
            if isinstance(value, dict):
                assert value["min"] <= value["median"] <= value["max"] and value["n"] >= 5


def test_nothing_names_a_machines_folders():
    tracked = subprocess.run(["git", "-C", str(ROOT), "grep", "-nIE", "(/work/|/root/|/home/[a-z]+/|/tmp/[a-z])", "--",
                              ".", ":!tests"], capture_output=True, text=True)
    assert tracked.returncode in (1, 128), tracked.stdout
