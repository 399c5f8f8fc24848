"""The notebooks' contract, and what they do when papermill runs them."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill.cli
import pytest
import torch
from click.testing import CliRunner
from tiny import pretend, sweep

from kdlib import data, lab, models, plots, presets, results, specs, stages, stats, store, study
from kdlib.presets import PRESETS

FOLDER = results.REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXPERIMENTS = [p for p in NOTEBOOKS if p.name[:2] in ("02", "03", "04")]


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def read(path):
    return nbformat.read(path, 4)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def tagged(nb, tag):
    return [c for c in nb.cells if tag in c.metadata.get("tags", [])]


def outputs(cells):
    return [o for c in cells for o in c.outputs]


def text_of(cells):
    return "".join(o.get("text", "") for o in outputs(cells))


def test_the_notebooks_are_there():
    assert [p.stem for p in NOTEBOOKS] == [
        "00_start_here", "01_losses", "02_data_budget", "03_teacher_strength", "04_two_stage_domain", "05_report", "06_your_own_models", "07_learning_rates"]


@by_name(NOTEBOOKS)
def test_form(path):
    nb = read(path)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5) and nb.metadata.kernelspec.name == "python3"
    assert len({c.id for c in nb.cells}) == len(nb.cells)
    assert "papermill" not in nb.metadata and "widgets" not in nb.metadata and not tagged(nb, "injected-parameters")
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert path.stat().st_size < 1_000_000
    sizes = sorted(len(c.source.splitlines()) for c in code(nb))
    assert sizes[len(sizes) // 2] <= 12 and sizes[-1] <= 30


@by_name(NOTEBOOKS)
def test_parameters_are_one_cell_of_annotated_scalars_and_lists(path):
    cell, = tagged(read(path), "parameters")
    found = ast.parse(cell.source).body
    assert found and all(isinstance(node, ast.AnnAssign) for node in found)
    for line in cell.source.splitlines():
        assert line.count("=") == 1 and "#" in line, "papermill shows one value and one comment a line"
    names = list(papermill.inspect_notebook(str(path)))
    assert names == [node.target.id for node in found]


@by_name(NOTEBOOKS)
def test_stored_outputs_are_of_one_clean_run(path):
    nb = read(path)
    assert [c.execution_count for c in code(nb)] == list(range(1, len(code(nb)) + 1))
    shown = outputs(code(nb))
    assert shown and not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\\\)", json.dumps([dict(o) for o in shown]))
    assert any("image/png" in o.get("data", {}) for o in shown), "a figure"


@by_name(EXPERIMENTS)
def test_experiments_follow_the_order(path):
    nb = read(path)
    headings = [line for c in nb.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("## ")]
    wanted = ["Design", "data", "loss", "Train", "Result", "Verdict", "limits", "Quiz"]
    at = [next(i for i, h in enumerate(headings) if w in h) for w in wanted]
    assert at == sorted(at) and "refute" in nb.cells[0].source
    texts = [c.source for c in nb.cells if c.cell_type == "markdown"]
    quiz, = [t for t in texts if t.startswith("## Quiz")]
    assert quiz.count("<details><summary>") == quiz.count("</details>") >= 3
    predicted = [i for i, c in enumerate(nb.cells) if c.cell_type == "markdown" and "Predict first" in c.source]
    figure = next(i for i, c in enumerate(nb.cells) if c.cell_type == "code" and "plots.save" in c.source)
    assert len(predicted) >= 2 and predicted[0] < figure and sum("ecide together first" in t for t in texts) == 1
    verdict, = tagged(nb, "verdict")
    assert "stats." in verdict.source and text_of([verdict])
    ignored = tagged(nb, "nbval-ignore-output")
    assert len(ignored) == 3 and "study.plan" in ignored[0].source and "study.run" in ignored[1].source and ignored[2:] == tagged(nb, "live")
    figures = [c for c in code(nb) if "plots.save" in c.source]
    assert len(figures) >= 3 and all(c.source.endswith("plt.show()") for c in figures)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in EXPERIMENTS], ids=lambda p: p.stem)
def test_other_notebooks_are_checked_too(path):
    nb = read(path)
    checked = [c for c in code(nb) if c.outputs and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    assert len(checked) >= 5


@by_name(NOTEBOOKS)
def test_every_figure_says_what_it_shows_and_every_cell_where_it_stands_on_slides(path):
    nb = read(path)
    drawn = [c for c in code(nb) if any("image/png" in o.get("data", {}) for o in c.outputs)]
    assert drawn and all(len(c.metadata.get("alt", "")) > 40 for c in drawn)
    kinds = [c.metadata.slideshow.slide_type for c in nb.cells]
    assert kinds[0] == "slide" and set(kinds) <= {"slide", "subslide", "fragment", "skip"} and "skip" in kinds
    assert all(c.metadata.slideshow.slide_type == "skip" for c in [*tagged(nb, "parameters"), *tagged(nb, "widget"), *tagged(nb, "live")])


@by_name(NOTEBOOKS)
def test_what_a_reader_opens_holds_no_widget_that_nothing_moves(path):
    nb = read(path)
    assert not [o for o in outputs(code(nb)) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert all("pip install ipywidgets" in text_of([c]) for c in tagged(nb, "widget"))


def test_where_kdlib_is_missing_the_clone_that_a_notebook_lies_in_is_installed(tmp_path, monkeypatch):
    """The cell that a notebook runs first on Colab, with the command that it gives to pip written down instead."""
    first = {next(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", []))
             for p in [*NOTEBOOKS, *(FOLDER / "exercises").glob("*.ipynb"), *(FOLDER / "exercises" / "solutions").glob("*.ipynb")]}
    cell, asked = first.pop(), []
    assert not first and cell.count("%pip install -q -e ") == 1
    cell = cell.replace('%pip install -q -e "{clone}"', "asked.append(clone)")
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(cell, {"asked": asked})
    assert not asked, "kdlib is there"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for folder in (FOLDER, FOLDER / "exercises" / "solutions"):
        monkeypatch.chdir(folder)
        exec(cell, {"asked": asked})
    assert asked == [results.REPOSITORY] * 2 and sys.path[0] == str(results.REPOSITORY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no clone of its repository is here; clone it"):
        exec(cell, {"asked": asked})


def test_notebooks_that_teach_by_moving_have_sliders():
    assert [p.stem[:2] for p in NOTEBOOKS if tagged(read(p), "widget")] == ["01", "06"]


def run(path, out, **parameters):
    return papermill.execute_notebook(str(path), str(out), parameters, progress_bar=False, log_output=False, kernel_name="python3")


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """Notebook 00 with its comparison trained live, from nothing, and kept."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, run(FOLDER / "00_start_here.ipynb", folder / "00.ipynb", live=True, live_dir=str(folder / "results"))


@pytest.fixture(scope="module")
def smoke(lived):
    """Notebook 02 with the smoke preset, on what notebook 00 trained."""
    folder, _ = lived
    return folder, run(FOLDER / "02_data_budget.ipynb", folder / "out.ipynb", preset="smoke", results_dir=str(folder / "results"))


def test_the_benchmark_of_caches_runs_and_its_record_is_of_the_lab_as_it_is(smoke, monkeypatch):
    monkeypatch.syspath_prepend(str(results.REPOSITORY / "tests" / "bench"))
    cache = importlib.import_module("cache")
    threads = torch.get_num_threads()
    found = cache.main("top 16, bucket", str(smoke[0] / "results"), most=200)
    torch.set_num_threads(threads)
    record = json.loads((results.REPOSITORY / "results" / "bench" / "x86_64-cpu-cache.json").read_text())
    kept = record["found"][found["form"]]
    assert kept["vocabulary"] == found["vocabulary"] == len(models.build_tokenizer(lab.vocabulary()))
    assert kept["bytes_per_token"] == found["bytes_per_token"] and found["loss"] < found["loss_of_live_teacher"], "a bucket never overstates"


def test_start_here_trains_its_comparison_live_and_keeps_it_if_asked(lived, smoke):
    (folder, first), where = lived, {"preset": "smoke", "results_dir": str(lived[0] / "results")}
    def answer(nb):
        return next(o.data["text/plain"] for o in outputs(code(nb)) if "interval over" in o.get("data", {}).get("text/plain", ""))

    assert "0 of 8 runs found" in text_of(code(first)) and re.search(r"C1a +world 0, 7 seeds +supported", answer(first))
    again = run(FOLDER / "00_start_here.ipynb", folder / "again.ipynb", **where, live=True, live_dir=where["results_dir"])
    shown = text_of(code(again))
    assert "0 of 8" not in shown and shown.count("8 of 8 runs found") == 2 and re.search(r"C1a +world 0, 2 seeds +exploratory", answer(again))
    live, = (c for c in code(again) if "live_dir or" in c.source)
    assert [o.data for o in live.outputs if "data" in o] == [o.data for c in code(first) if c.id == live.id for o in c.outputs if "data" in o] != []


def test_what_a_smoke_run_shows_is_what_it_recorded(smoke):
    folder, nb = smoke
    plan = study.plan("data_budget", {"preset": "smoke", "results_dir": str(folder / "results"), "train_missing": False})
    records = study.run(plan)
    frame = results.frame(records)
    assert len(frame) == 8 and set(frame.budget) == {100, 1600}
    loss = frame.groupby("method").nll.mean()
    assert loss["kd"] < loss["sft"] < 3.0, "both learned something, and soft targets predict better"
    assert frame.accuracy.max() > 0.05
    claims = stats.budget_claims(frame, plan.preset.scored)
    assert json.loads((plan.folder / "claims.json").read_text()) == claims
    shown = text_of(tagged(nb, "verdict"))
    for c in claims:
        assert f"{c['claim']}: {c['verdict']}." in shown and f"{c['estimate']:+.4f}" in shown
    assert all(c["verdict"].startswith("exploratory") for c in claims)
    made = {p.name for p in (plan.folder / "figures").iterdir()}
    assert made >= {f"{n}.{e}" for n in ("score_vs_budget", "gap_vs_budget", "skill_gaps") for e in ("png", "svg", "csv")}
    assert not [o for o in outputs(code(nb)) if o.get("name") == "stderr"]


def test_one_changed_parameter_gives_a_new_answer_beside_the_old(smoke):
    folder, _ = smoke
    before = (folder / "results" / "smoke" / "claims.json").read_bytes()
    nb = run(FOLDER / "02_data_budget.ipynb", folder / "changed.ipynb", preset="smoke", results_dir=str(folder / "results"),
             alpha=0.5)
    assert "exploratory" in text_of(tagged(nb, "verdict"))
    assert (folder / "results" / "smoke" / "claims.json").read_bytes() == before
    assert len(list((folder / "results" / "smoke" / "variants").glob("*/claims.json"))) == 1


@pytest.fixture(scope="module")
def smoke_teachers(smoke):
    """Notebook 03 beside 02, whose models and runs it shares."""
    folder, _ = smoke
    return folder, run(FOLDER / "03_teacher_strength.ipynb", folder / "03.ipynb", preset="smoke", results_dir=str(folder / "results"))


def test_teachers_are_compared_and_c2_needs_both_contrasts(smoke_teachers):
    folder, nb = smoke_teachers
    plan = study.plan("teacher_strength", {"preset": "smoke", "results_dir": str(folder / "results"), "train_missing": False})
    assert "8 of 20 runs found" in text_of(code(nb)), "SFT and KD from the base teacher are the runs of notebook 02"
    frame = results.frame(study.run(plan))
    claims = stats.teacher_claims(frame, plan.preset.scored)
    stored = {c["claim"]: c for c in results.read_claims(plan.folder)}
    assert [stored[c["claim"]] for c in claims] == claims and stored["C2"] == stats.together("C2", claims) and {"C1a", "C1b"} <= set(stored)
    shown = text_of(tagged(nb, "verdict"))
    assert all(f"{c['claim']}: {c['verdict']}. {c['contrast']}: {c['estimate']:+.4f}" in shown for c in claims)
    assert f"C2, which needs both: {stored['C2']['verdict']}" in shown
    table = pd.read_csv(plan.folder / "tables" / "teachers.csv").set_index("teacher")
    for name in ("weak", "base", "strong"):
        row = next(r for r in study.run(plan) if r["method"] == "kd" and r["teacher"] == name)
        for key in ("teacher_accuracy", "teacher_nll", "teacher_entropy", "teacher_ece"):
            assert table.loc[name, key] == pytest.approx(row["metrics"][key], rel=1e-4)
    made = {p.stem for p in (plan.folder / "figures").iterdir()}
    assert made >= {"gap_by_teacher", "gain_vs_advantage", "words_or_distributions"}


def test_the_strong_teacher_learned_what_verified_of_its_answers_and_its_words_teach(smoke_teachers):
    folder, _ = smoke_teachers
    plan = study.plan("teacher_strength", {"preset": "smoke", "results_dir": str(folder / "results"), "train_missing": False})
    records = study.run(plan)
    frame = results.frame(records)
    assert set(frame.arm) == {"sft", "kd weak", "kd base", "kd strong", "seq_kd strong"} and (frame.groupby("arm").size() == 4).all()
    config = next(r["config"] for r in records if r["method"] == "seq_kd")
    spec, (part,) = specs.data_of(config), config["phases"][0]["rows"]
    rows, _, right = stages.read_rows(plan.root, [part], spec)
    known, asked = stages.read_data(plan.root, spec), stages.read_rows(plan.root, [{"set": "train"}], spec)[0]
    assert len(rows) == len(asked) == len(right) == plan.preset.train_rows and [r["id"] for r in rows] == [r["id"] for r in asked]
    for row, prompt, fine, source in zip(rows, asked, right, known.rows("train")):
        start = next(i for i, t in enumerate(row["labels"]) if t != data.IGNORE)
        assert row["input_ids"][:start] == prompt["input_ids"][:start], "the same prompts"
        said = known.tokenizer.decode([t for t in row["labels"] if t != data.IGNORE], skip_special_tokens=True)
        assert known.verify(source, said) is fine
    assert frame[frame.method == "seq_kd"].label_accuracy.tolist() == pytest.approx([sum(right) / len(right)] * 4)
    assert frame[frame.method != "seq_kd"].label_accuracy.isna().all()
    strong = specs.teacher_of(config)
    (kept,) = strong["phases"][0]["rows"]
    chosen, _, judged = stages.read_rows(plan.root, [kept], spec)
    assert 0 < len(chosen) == sum(judged) < len(judged)
    assert [int(r["id"].split("/")[1]) for r in chosen] == [i for i, fine in enumerate(judged) if fine]
    wanted = json.loads((specs.path(plan.root, strong) / "evaluation.json").read_text())["test"]["accuracy"]
    assert set(frame[frame.teacher == "strong"].teacher_accuracy) == {wanted}


def test_two_stages_are_compared_with_every_recipe(smoke_teachers):
    folder, _ = smoke_teachers
    nb = run(FOLDER / "04_two_stage_domain.ipynb", folder / "04.ipynb", preset="smoke", results_dir=str(folder / "results"))
    plan = study.plan("two_stage_domain", {"preset": "smoke", "results_dir": str(folder / "results"), "train_missing": False})
    claims = stats.domain_claims(results.frame(study.run(plan)), plan.preset.scored)
    stored, shown = {c["claim"]: c for c in results.read_claims(plan.folder)}, text_of(tagged(nb, "verdict"))
    assert len(claims) == 5 and [stored[c["claim"]] for c in claims] == claims
    whole = stats.together("C3 market", claims)
    assert stored["C3 market"] == whole and f"C3 market, which needs all: {whole['verdict']}" in shown
    made = {p.stem for p in (plan.folder / "figures").iterdir()}
    assert made >= {"recipes_market", "pool_market", "two_stages_minus_others"}
    assert not [o for o in outputs(code(nb)) if o.get("name") == "stderr"]


@by_name(EXPERIMENTS)
def test_a_class_trains_live_what_it_chose(path, smoke_teachers, tmp_path, capsys, monkeypatch):
    cell, = tagged(read(path), "live")
    shown, names = [], {"pd": pd, "plt": plt, "plots": plots, "presets": presets, "results": results, "stats": stats, "study": study,
                        "recipes": presets.RECIPES, "display": lambda table: shown.append(table)}
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(cell.source, names)
    assert capsys.readouterr().out == "live is False: nothing is trained\n" and not shown and not list(tmp_path.iterdir())
    shutil.copytree(smoke_teachers[0] / "results", tmp_path / ".cache" / "kdlib-live")
    exec(cell.source.replace("live = False", "live = True"), names)
    assert "to train" in capsys.readouterr().out and list(shown[0].index) == names["changed"]["budgets"]
    if "chosen" in names:
        with pytest.raises(ValueError, match="chosen='nobody' has type str|chosen='nobody' is not allowed; allowed: weak, base or strong"):
            exec(re.sub('chosen = .+?  #', "chosen = 'nobody'  #", cell.source.replace("live = False", "live = True")), names)


def test_the_readmes_sweep_and_its_yaml_file_run_as_they_stand_there(smoke_teachers, tmp_path):
    """With values whose runs are there: what is new is the shell's part, not the training."""
    blocks = re.findall(r"```\n(.*?)```", (results.REPOSITORY / "README.md").read_text(encoding="utf-8"), re.S)
    recipes = [b for b in blocks if b.startswith(("for t in", "cat > mine.yaml"))]
    known = {"0.5 1 2 4": "1", "[50, 200, 800]": "[100, 1600]", "[0, 1, 2]": "[0, 1]", "reverse_kl": "forward_kl"}
    assert len(recipes) == 2 and all(old in "".join(recipes) for old in known)
    (tmp_path / "notebooks").symlink_to(FOLDER)
    shutil.copytree(smoke_teachers[0] / "results", tmp_path / "my-results")
    for block in recipes:
        for old, new in known.items():
            block = block.replace(old, new)
        subprocess.run(["sh", "-ec", block], cwd=tmp_path, check=True, capture_output=True,
                       env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"})
    for name, found in (("temperature-1", "20 of 20"), ("out", "8 of 8")):
        assert f"{found} runs found in smoke/runs; 0 to train" in text_of(code(read(tmp_path / f"{name}.ipynb")))


def test_the_readmes_recipe_for_a_cluster_trains_on_it(smoke, tmp_path):
    """As it stands there but for another grid, whose models are made: a relative folder, a cluster that was started before, and the notebook's kernel in between."""
    pytest.importorskip("ray")
    blocks = re.findall(r"```\n(.*?)```", (results.REPOSITORY / "README.md").read_text(encoding="utf-8"), re.S)
    block, = [b for b in blocks if b.startswith("ray start --head")]
    assert "-p preset smoke" in block
    block = block.replace("start --head ", "start --head --include-dashboard=false ").replace("-p preset smoke", "-p preset smoke -y '{budgets: [50, 100], seeds: [0, 1]}'")
    (tmp_path / "notebooks").symlink_to(FOLDER)
    shutil.copytree(smoke[0] / "results" / ".cache", store.open_folder(tmp_path / "my-results") / ".cache")
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(["sh", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(["ray", "stop", "--force"], env=environment, capture_output=True)
    assert len(list((tmp_path / "my-results" / "smoke" / "runs").glob("*.json"))) == 8
    assert "0 of 8 runs found in smoke/runs; 8 to train" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_the_report_draws_nothing_from_an_incomplete_grid(smoke_teachers, tmp_path):
    folder, _ = smoke_teachers
    shutil.copytree(folder / "results", tmp_path / "results")
    for i in study.plan("two_stage_domain", {"preset": "smoke", "results_dir": str(tmp_path / "results")}).ids:
        (tmp_path / "results" / "smoke" / "runs" / f"{i}.json").unlink(missing_ok=True)
    with pytest.raises(papermill.PapermillExecutionError) as refusal:
        run(FOLDER / "05_report.ipynb", tmp_path / "out.ipynb", preset="smoke", results_dir=str(tmp_path / "results"))
    for world, runs in ((1, 8), (1, 20), (1, 44), (0, 44)):
        assert f"{runs} of {runs} runs of world {world} are missing, and none may be trained (train_missing=False): all of them" in str(refusal.value)
    assert "make study PRESET=smoke WORLDS=0,1" in str(refusal.value)
    assert not (tmp_path / "results" / "smoke" / "report").exists()


@pytest.mark.parametrize("slope, base, word, at", [(0.3, -0.05, "from", 0.2), (-0.3, 0.15, "up to", 0.14 / 0.3)])
def test_the_report_finds_the_surface_that_is_there(slope, base, word, at, tmp_path):
    """Records that nobody trained, whose gap is linear in the advantage, whatever the budget, but for what seeds and worlds add."""
    root, teachers = store.open_folder(tmp_path / "results"), {"weak": 0.36, "base": 0.6, "strong": 0.9}
    rng = np.random.default_rng(0)
    noise = {(w, s, b): rng.normal(0, 0.002, 13) for w in (0, 1) for s in (0, 1) for b in (100, 1600, 32, 128)}
    for world in (0, 1):
        def accuracy(r):
            luck = noise[world, r["seed"], r["budget"]]
            if r["domain"]:
                return 0.3 + 0.1 * (r["method"] == "kd_then_sft") + luck[len(r["method"]) % 13]
            sft = (0.2 if r["budget"] == 100 else 0.35) + 0.01 * world
            gap = 0 if r["method"] == "sft" else slope * (teachers[r["teacher"]] - sft) + base
            return sft + gap + luck[len(r["method"]) + len(r["teacher"] or "")] * (r["method"] != "sft")
        pretend(root, PRESETS["smoke"], world, accuracy, teachers)
    nb = run(FOLDER / "05_report.ipynb", tmp_path / "out.ipynb", preset="smoke", results_dir=str(root))
    assert not [o for o in outputs(code(nb)) if o.get("name") == "stderr"]
    tables = {p.stem: pd.read_csv(p) for p in (root / "smoke" / "report" / "tables").glob("*.csv")}
    rule = tables["rule"]
    assert rule.distill.tolist() == [word, word] and rule.advantage.tolist() == pytest.approx([at, at], abs=0.02), "slope·at + base = δ"
    assert rule[["share above δ at the least", "share above δ at the most"]].to_numpy().tolist() == 2 * [[0.0, 1.0] if slope > 0 else [1.0, 0.0]]
    right = tables["rule_checked"].groupby("rule").right.mean()
    assert right["budget and advantage"] == right["advantage alone"] == 1 > right["one answer"]
    assert len(tables["cells"]) == 12 and tables["cells"].advantage.max() == pytest.approx(0.7, abs=0.01)
    claims = {(c["claim"], tuple(c["world_seeds"])): c for c in results.read_claims(root / "smoke")}
    assert claims["C1a", (0, 1)]["estimate"] == pytest.approx(slope * (0.6 - 0.28) + base, abs=0.003)
    assert claims["C2a", (0, 1)]["estimate"] == pytest.approx(slope * (0.9 - 0.355) + base, abs=0.003)
    assert claims["C2b", (0, 1)]["estimate"] == pytest.approx(slope * 0.3, abs=0.003)
    assert claims["C3 market − human_sft", (0, 1)]["estimate"] == pytest.approx(0.1, abs=0.005)
    assert claims["C2", (0, 1)]["estimate"] in (claims["C2a", (0, 1)]["estimate"], claims["C2b", (0, 1)]["estimate"])
    shown = text_of(code(nb))
    assert "the rule by budget and advantage is right in 100% of 12 cells" in shown and f"distill {word} an advantage of" in shown


def test_a_sweep_runs_what_is_missing_and_says_what_it_chose(smoke_teachers):
    folder, _ = smoke_teachers
    nb = run(FOLDER / "07_learning_rates.ipynb", folder / "07.ipynb", preset="smoke", results_dir=str(folder / "results"))
    assert "50 runs: rates [0.001, 0.002]" in text_of(code(nb)) and "runs shared with any reported result: 0" in text_of(code(nb))
    table = pd.read_csv(folder / "results" / "smoke" / "tables" / "lr_sweep.csv")
    records = study.run(sweep(PRESETS["smoke"], folder / "results"))
    frame = results.frame(records)
    first = {r["run_id"]: r["config"]["phases"][0]["learning_rate"] for r in records}
    for (part, method, stage, budget), rows in table.groupby(["part", "method", "stage", "budget"]):
        own = frame[(frame.method == method) & (frame.budget == budget) & (frame.domain.isna() == (part == "general"))]
        own = own.assign(first=own.run_id.map(first)).rename(columns={"learning_rate": "last"})
        own = own[own["last"] == 1e-3] if stage == "first" else own[own["first"] == 1e-3] if stage == "last" else own
        scores = own.groupby("first" if stage == "first" else "last").accuracy.mean()
        assert rows.set_index("learning_rate").score.to_dict() == pytest.approx(scores.to_dict(), rel=1e-4)
        best, = rows[rows.chosen].learning_rate
        assert best == scores[scores == scores.max()].index.min()
        assert f"{budget}: {best}" in text_of(tagged(nb, "verdict"))


def test_losses_with_other_parameters(tmp_path):
    nb = run(FOLDER / "01_losses.ipynb", tmp_path / "out.ipynb", temperature=3.0, alpha=0.2, rows=9, vocabulary=50)
    assert "by global count" in text_of(code(nb))


@pytest.mark.parametrize("name, arguments, message", [
    ("02_data_budget", ["-p", "preset", "smok"], "preset='smok' is not allowed; allowed: smoke, lab, realtext"),
    ("02_data_budget", ["-p", "budgets", "[100, 200]"], "budgets='[100, 200]' has type str; allowed: a list"),
    ("02_data_budget", ["-p", "preset", "smoke", "-y", "budgets: [0, 100]"], "budgets=[0, 100] is not allowed"),
    ("02_data_budget", ["-p", "preset", "smoke", "-y", "seeds: [3]"], "seeds=[3] is not allowed"),
    ("02_data_budget", ["-p", "sedes", "3"], "Unknown parameter 'sedes'"),
    ("03_teacher_strength", ["-y", "tasks: {gsm8k: {}}"], "tasks={'gsm8k': {}} is not allowed; allowed: {}, for preset 'lab' has no benchmarks"),
    ("06_your_own_models", ["-p", "student", "a"], "student='a', teacher='' and dataset='' go together; allowed: all three, or none"),
    ("04_two_stage_domain", ["-p", "preset", "smoke", "-y", "domains: [bank]"], "domains=['bank'] is not allowed; allowed: a list of market."),
    ("05_report", ["-p", "preset", "smoke", "-y", "worlds: [1]"], "worlds=[1] is not allowed; allowed: a list of at least two"),
    ("05_report", ["-y", "worlds: [0, a]"], "worlds=[0, 'a'] is not allowed; allowed: a list of at least two different whole numbers from 0"),
    ("05_report", ["-p", "preset", "realtext"], "preset='realtext' has one world, and this report compares several; allowed: smoke, lab"),
    ("07_learning_rates", ["-p", "preset", "huge"], "preset='huge' is not allowed; allowed: smoke, lab, realtext"),
    ("01_losses", ["-p", "alpha", "2"], "alpha=2"), ("00_start_here", ["-p", "preset", "smoke"], "train_missing=False"),
    ("00_start_here", ["-p", "live", "3"], "live=3 has type int; allowed: True or False"),
    ("00_start_here", ["-p", "live_dir", "3"], "live_dir=3 has type int; allowed: a folder as text")])
def test_bad_parameters_end_papermill_with_one_sentence(tmp_path, name, arguments, message):
    target = tmp_path / "results"
    where = [] if name[:2] in ("01", "06") else ["-p", "results_dir", str(target)]
    done = CliRunner().invoke(papermill.cli.papermill, [str(FOLDER / f"{name}.ipynb"), str(tmp_path / "out.ipynb"), *arguments, *where,
                                                        "--no-progress-bar", "-k", "python3", "--cwd", str(tmp_path)])
    assert done.exit_code != 0
    last = [line for line in str(done.exception).strip().splitlines() if "Error: " in line][-1]
    assert message in last
    assert not list(target.rglob("*.json")) or name == "00_start_here"


@pytest.mark.parametrize("environment, message", [
    ({"HF_HUB_OFFLINE": "1"}, "Neither the hub nor local data can be reached for 'Salesforce/wikitext'"),
    ({"KDLIB_DATA": "nowhere"}, "KDLIB_DATA='nowhere' has no file 'pretrain_books.jsonl.gz'; point KDLIB_DATA at")])
def test_without_data_realtext_says_both_remedies_before_it_trains(tmp_path, monkeypatch, environment, message):
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    for name, value in {"HF_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(papermill.PapermillExecutionError) as refusal:
        run(FOLDER / "02_data_budget.ipynb", tmp_path / "out.ipynb", preset="realtext", results_dir=str(tmp_path / "results"))
    last = [line for line in str(refusal.value).strip().splitlines() if "Error: " in line][-1]
    assert message in last and "hub" in last and "KDLIB_DATA" in last
    assert not (tmp_path / "results" / "realtext").exists()


def test_an_edited_record_ends_papermill_and_is_kept(smoke, tmp_path):
    folder, _ = smoke
    shutil.copytree(folder / "results", tmp_path / "results")
    plan = study.plan("data_budget", {"preset": "smoke", "results_dir": str(tmp_path / "results")})
    path = results.record_path(plan.root, "smoke", plan.ids[0])
    path.write_text(path.read_text().replace('"accuracy": 0', '"accuracy": 1', 1))
    edited, before = path.read_bytes(), sorted((plan.root / "smoke" / "runs").iterdir())
    with pytest.raises(papermill.PapermillExecutionError, match="was changed after it was written"):
        run(FOLDER / "02_data_budget.ipynb", tmp_path / "out.ipynb", preset="smoke", results_dir=str(tmp_path / "results"))
    assert path.read_bytes() == edited and sorted((plan.root / "smoke" / "runs").iterdir()) == before
