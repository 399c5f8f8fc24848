import gzip
import json
import math
import os
import random
import shutil

import pytest
from tiny import TINY, changed, plan

from kdlib import data, evaluate, models, results, stages, stats, store, study
from kdlib.presets import METHODS, PRESETS


def make(tmp_path, **parameters):
    return study.plan("data_budget", {"preset": "smoke", "results_dir": str(tmp_path / "results"), **parameters})


@pytest.mark.parametrize("parameters, message", [
    ({"preset": "big"}, r"preset='big' is not allowed; allowed: smoke, lab, realtext"),
    ({"preset": 3}, "preset=3 has type int"),
    ({"budgets": "100"}, r"budgets='100' has type str; allowed: a list of at least two different whole numbers"),
    ({"budgets": [0, 100]}, r"budgets=\[0, 100\] is not allowed; allowed: .* from 1 to 1600"),
    ({"budgets": [-5, 100]}, r"budgets=\[-5, 100\]"), ({"budgets": [100, 1601]}, r"budgets=\[100, 1601\].*1600, the rows of preset"),
    ({"budgets": [100, 100]}, "two different"), ({"budgets": [100, 200.0]}, r"200\.0\] is not allowed"),
    ({"budgets": [100]}, "at least two"),
    ({"seeds": [0]}, r"seeds=\[0\] is not allowed; allowed: a list of at least two .* because an interval needs two"),
    ({"seeds": [0, 0]}, "two different"), ({"seeds": [True, False]}, "whole numbers"), ({"seeds": 3}, "seeds=3 has type int"),
    ({"world_seed": -1}, "world_seed=-1"), ({"world_seed": "0"}, "world_seed='0' has type str"),
    ({"alpha": 0}, "alpha=0 is not allowed; allowed: a number above 0 and up to 1"), ({"alpha": "1e-1"}, "alpha='1e-1' has type str"),
    ({"temperature": 0.0}, "temperature=0.0"), ({"temperature": math.inf}, "temperature=inf is not allowed; allowed: a number from 0.01 to 100"),
    ({"temperature": 1e-40}, "temperature=1e-40 is not allowed"), ({"temperature": 10**400}, "temperature=1000"),
    ({"results_dir": " "}, "results_dir=' ' is not allowed"), ({"results_dir": "a\0b"}, "is not allowed; allowed: a folder as text"),
    ({"temperature": math.nan}, "temperature=nan"), ({"alpha": math.nan}, "alpha=nan"),
    ({"preset": "realtext", "world_seed": 7}, "world_seed=7 is not allowed; allowed: 0, because preset 'realtext' has one world"), ({"workers": -1}, "workers=-1"), ({"workers": True}, "workers=True has type bool"),
    ({"train_missing": "no"}, "train_missing='no' has type str; allowed: True or False"), ({"results_dir": 5}, "results_dir=5 has type int")])
def test_bad_parameters_are_named_before_anything_is_made(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **parameters)
    assert not (tmp_path / "results").exists()


def test_an_unknown_injected_name_is_refused():
    cells = ["preset = 'smoke'", "# Parameters\npreset = \"smoke\"\nbudget = [100, 200]\n"]
    with pytest.raises(ValueError, match=r"Unknown parameter 'budget' \(value \[100, 200\]\); allowed: preset, world_seed"):
        study.plan("data_budget", {"In": cells, "budget": [100, 200], "preset": "smoke"})


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds files of something else"):
        make(tmp_path)


def test_the_standard_design_has_the_presets_folder_and_others_their_own(tmp_path):
    standard, changed = make(tmp_path), make(tmp_path, alpha=0.5)
    assert standard.standard and standard.folder == standard.root / "smoke"
    assert not changed.standard and changed.folder.parent == standard.root / "smoke" / "variants"
    assert make(tmp_path, budgets=[1600, 100], seeds=[1, 0]).folder == standard.folder, "order does not matter"
    assert make(tmp_path, world_seed=1).folder != standard.folder != make(tmp_path, seeds=[0, 2]).folder
    assert set(standard.ids) & set(changed.ids) == {i for i, c in zip(standard.ids, standard.configs) if c["alpha"] == 0}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_runs_of_a_seed_are_paired(preset):
    configs = study.grid(preset, METHODS, preset.budgets, preset.seeds, 0)
    assert len({results.run_id(c) for c in configs}) == len(configs) == 2 * len(preset.budgets) * len(preset.seeds)
    for sft, kd in zip(configs[::2], configs[1::2]):
        assert sft["alpha"] == 0 and sft["teacher"] is None and kd["teacher"] is not None
        assert {k for k in sft if sft[k] != kd[k]} <= {"alpha", "temperature", "teacher", "learning_rate"}
    assert len({c["steps"] for c in configs}) == 1 and not {"workers", "results_dir", "preset", "experiment"} & set(configs[0])


def test_lab_and_realtext_are_as_large_as_promised():
    lab, real = PRESETS["lab"], PRESETS["realtext"]
    assert len(lab.budgets) >= 6 and len(lab.seeds) >= 5 and len(real.budgets) >= 4 and len(real.seeds) >= 3
    assert lab.sweep["world_seed"] != 0 and not set(real.sweep["seeds"]) & set(real.seeds)


def test_records_hold_what_the_dictionary_says(tiny_records):
    assert len(tiny_records) == 8
    for r in tiny_records:
        kd = r["method"] == "kd"
        assert {"accuracy", "accuracy_unseen", "accuracy_by_skill", "nll", "nll_clean", "ece", "train_loss"} <= set(r["metrics"])
        assert ({"teacher_nll", "teacher_entropy", "top1_agreement"} <= set(r["metrics"])) is kd
        assert r["teacher"] == ("base" if kd else None) and r["student"] == "nano" and r["preset"] == "tiny"
        p = r["provenance"]
        assert {"code_version", "code_dirty", "packages", "device", "dtype", "wall_s", "cpu_s", "tokens", "data_hash"} <= set(p)
        assert p["tokens"] > p["response_tokens"] > 0 and p["data_report"]["train"]["answer_tokens_cut"] == 0
        assert len(r["items"]["id"]) == len(r["items"]["correct"]) == 60
        assert p["metric"] == "accuracy" and p["higher_is_better"] is True and 100 < p["peak_memory_mib"] < 8000
        assert p["data_report"]["train"]["rows_not_used"] == 0 and 0 < p["data_report"]["train"]["distinct_prompts"] <= 200
    hashes = {(p["data_hash"], p["student_hash"]) for p in (r["provenance"] for r in tiny_records)}
    assert len(hashes) == 1 and len({r["provenance"]["teacher_hash"] for r in tiny_records if r["method"] == "kd"}) == 1
    assert len({json.dumps(r["metrics"]) for r in tiny_records}) == 8, "every run is another model"


def test_the_same_spec_gives_the_same_record(tiny_records, tmp_path):
    chosen = [r for r in tiny_records if r["budget"] == 20 and r["seed"] == 1]
    root = store.open_folder(tmp_path / "again")
    for wanted in chosen:
        stages.execute(root, "tiny", "data_budget", wanted["config"])
        again = results.read_record(results.record_path(root, "tiny", wanted["run_id"]))
        assert again["metrics"] == wanted["metrics"] and again["items"] == wanted["items"]
        for part in ("data_hash", "student_hash", "teacher_hash"):
            assert again["provenance"][part] == wanted["provenance"][part]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_teacher_and_untuned_student_are_scored_as_the_student_is(tiny_root, tiny_records, split):
    config = next(r["config"] for r in tiny_records if r["method"] == "kd")
    bundle = stages.read_data(tiny_root, config["data"])
    for name, kind, spec in zip(("untuned", "teacher"), ("base", "teacher"), stages.model_specs(config)):
        folder = store.artefact_path(tiny_root, kind, spec)
        model, tokenizer = models.load(folder)
        wanted = evaluate.evaluate(model, tokenizer, bundle.held[split], verify=bundle.verify)[0]
        assert json.loads((folder / "evaluation.json").read_text())[split] == wanted
        for r in tiny_records if split == "test" else ():
            own = {k: r["metrics"].get(f"{name}_{k}") for k in wanted}
            assert (own["accuracy_by_skill"] == wanted["accuracy_by_skill"]) is (name == "untuned" or r["method"] == "kd")
            assert r["metrics"]["untuned_nll"] > r["metrics"]["nll"]


def test_a_run_that_diverges_says_so_and_leaves_no_record(tiny_root, tiny_records, tmp_path, monkeypatch):
    from kdlib import trainer

    root = tmp_path / "copy"
    shutil.copytree(tiny_root, root)
    record = tiny_records[0]
    results.record_path(root, "tiny", record["run_id"]).unlink()
    monkeypatch.setattr(trainer, "train", lambda *_, **__: {"train_loss": math.nan})
    with pytest.raises(ValueError, match=f"Run {record['run_id']} diverged .training loss nan"):
        stages.execute(root, "tiny", "data_budget", record["config"])
    assert not results.record_path(root, "tiny", record["run_id"]).exists()


def test_a_run_trains_on_its_budget_and_no_more(tiny_root, monkeypatch):
    from kdlib import trainer

    seen = []
    monkeypatch.setattr(trainer, "train", lambda model, tokenizer, rows, **how: seen.append(rows) or {"train_loss": 0.0})
    configs = plan(tiny_root).configs
    for config in (configs[0], configs[1], configs[4]):  # SFT and KD at the small budget, SFT at the large one
        stages._train_and_evaluate(tiny_root, config)
    small, paired, large = [[tuple(r["input_ids"]) for r in rows] for rows in seen]
    assert small == paired and len(small) == TINY.steps * TINY.batch_size
    assert len(set(small)) <= 20 < len(set(large))
    bundle = stages._loaded(tiny_root, json.dumps(configs[0]["data"]))
    order = data.nested_order(bundle.skills, configs[0]["seed"])
    assert set(small) == {tuple(bundle.train[i]["input_ids"]) for i in order[:20]}


def test_nothing_is_trained_when_that_is_not_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"train_missing=False, but 8 of 8 runs are missing, the first of them [0-9a-f]{16}"):
        study.run(plan(tmp_path / "r", train_missing=False))


@pytest.mark.parametrize("part", ["data", "student", "teacher"])
def test_records_of_different_copies_are_not_mixed(tiny_records, tmp_path, part):
    root = store.open_folder(tmp_path / "mixed")
    for r in tiny_records:
        body = {k: v for k, v in r.items() if k != "checksum"}
        other = {f"{part}_hash": "another"} if r["method"] == "kd" and r["seed"] else {}
        results.write_record(root, {**body, "provenance": {**r["provenance"], **other}})
    with pytest.raises(ValueError, match=rf"more than one copy of the {part} \(their {part}_hash differs\)"):
        study.run(plan(root))


def test_runs_are_not_added_to_records_of_other_models(tiny_root, tiny_records, tmp_path):
    """Where floating point differs from machine to machine, the same specification makes other models."""
    shutil.copytree(tiny_root, tmp_path / "r")
    path = results.record_path(tmp_path / "r", "tiny", tiny_records[0]["run_id"])
    path.unlink()
    for r in tiny_records[1:]:
        results.record_path(tmp_path / "r", "tiny", r["run_id"]).unlink()
        body = {k: v for k, v in r.items() if k != "checksum"}
        results.write_record(tmp_path / "r", {**body, "provenance": {**r["provenance"], "student_hash": "another"}})
    with pytest.raises(ValueError, match="more than one copy of the student .*give a new results_dir"):
        study.run(plan(tmp_path / "r"))
    assert not path.exists(), "nothing was trained"


def test_records_of_other_data_than_those_at_hand_are_not_shown(tiny_root, tiny_records, tmp_path):
    shutil.copytree(tiny_root / ".cache", tmp_path / "r" / ".cache")
    store.write_atomic(tmp_path / "r" / store.MARKER, json.dumps(store.FORMAT))
    for r in tiny_records:
        body = {k: v for k, v in r.items() if k != "checksum"}
        results.write_record(tmp_path / "r", {**body, "provenance": {**r["provenance"], "data_hash": "of other files"}})
    with pytest.raises(ValueError, match="more than one copy of the data"):
        study.run(plan(tmp_path / "r", train_missing=False))


def test_damaged_claims_are_named_before_anything_is_trained(tmp_path):
    made = plan(tmp_path / "r")
    path = made.folder / "claims.json"
    store.write_atomic(path, '[{"claim": "C1a"')
    with pytest.raises(ValueError, match=rf"{path} is not a whole list of claims.*delete it and it is made again"):
        study.run(made)
    assert not (made.root / "tiny" / "runs").exists() and path.read_text() == '[{"claim": "C1a"'


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_every_teacher_is_tuned_on_all_of_the_training_data(preset):
    for teacher in preset.teachers.values():
        assert teacher["tuning"]["steps"] * teacher["tuning"]["batch_size"] >= preset.train_rows


def test_rates_between_the_sweeps_budgets_are_interpolated():
    preset = changed(TINY, learning_rate={"sft": {100: 1e-3, 400: 4e-3, 800: 1e-3}, "kd": {100: 2e-3}})
    assert [preset.rate("sft", b) for b in (1, 100, 200, 400, 800, 5000)] == [1e-3, 1e-3, 2e-3, 4e-3, 1e-3, 1e-3]
    assert preset.rate("sft", 566) == pytest.approx(2e-3, rel=0.01) and preset.rate("kd", 50) == preset.rate("kd", 5000) == 2e-3


def test_more_rows_than_the_data_has_is_said(tmp_path):
    greedy = changed(TINY, train_rows=5000)
    config = study.grid(greedy, METHODS, [20], [0], 0)[0]
    with pytest.raises(ValueError, match="train_rows=5000 is above the data; allowed: up to 200 rows"):
        stages.execute(store.open_folder(tmp_path / "r"), "tiny", "data_budget", config)


def text_preset(monkeypatch, folder):
    """Real text's preset at the size of seconds, and local files for it with words of our own."""
    words = "the a cat dog bird tree house river runs sleeps sings sees near under over big small red old day night".split()
    rng = random.Random(0)

    def sentence(n):
        return " ".join(rng.choices(words, k=n))

    def rows(n, kind):
        for i in range(n):
            turns = [sentence(rng.randint(3, 90)), sentence(rng.randint(1, 12)) + " é"]
            yield {"id": f"dolly-open_qa-{kind}{i}", "source": "dolly_15k",
                   "messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns)]}

    files = {"general_train.jsonl.gz": rows(160, "a"), "general_test.jsonl.gz": rows(30, "b"),
             "pretrain_books.jsonl.gz": ({"id": str(i), "text": sentence(300)} for i in range(40))}
    for name, content in files.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in content)
    monkeypatch.setenv("KDLIB_DATA", str(folder))
    real = PRESETS["realtext"]
    quick = {"steps": 5, "batch_size": 4, "block": 64}
    return changed(
        real, source={**real.source, "validation_rows": 10, "test_rows": 25}, train_rows=140, max_length=64, vocab_size=400,
        student={**real.student, **quick}, steps=4, batch_size=4, budgets=(10, 140),
        teachers={"base": {**real.teachers["base"], **quick, "tuning": {**real.teachers["base"]["tuning"], "steps": 3, "batch_size": 4}}})


def test_human_text_takes_the_same_path(tmp_path, monkeypatch):
    preset = text_preset(monkeypatch, tmp_path)
    configs = study.grid(preset, METHODS, preset.budgets, preset.seeds, 0)
    made = study.Plan(preset, "data_budget", tuple(configs), store.open_folder(tmp_path / "r"), True, True, 2)
    records = study.run(made)
    assert len(records) == 12 and {r["preset"] for r in records} == {"realtext"}
    for r in records:
        assert r["metrics"]["accuracy"] is None and "correct" not in r["items"] and len(r["items"]["id"]) <= 25
        bits = sum(r["items"]["nll"]) / math.log(2) / sum(r["items"]["bytes"])
        assert r["metrics"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4) and 0 < bits < 8
        report = r["provenance"]["data_report"]
        assert report["train"]["answer_tokens_cut"] == 0 and report["train"]["prompts_shortened"] > 0
        assert report["loading"]["rows_read"] == 160
    frame = results.frame(records)
    gaps = stats.paired_gaps(frame, preset.scored)
    wide = frame.pivot(index=["budget", "seed"], columns="method", values="bits_per_byte")
    assert gaps.gap.tolist() == pytest.approx((wide.sft - wide.kd).tolist())
    assert all(c["verdict"].startswith("exploratory") for c in stats.budget_claims(frame, preset.scored))


@pytest.mark.skipif("KDLIB_DATA" not in os.environ, reason="KDLIB_DATA names no folder with the real text")
def test_the_real_text_is_rendered_without_cutting_an_answer(tmp_path):
    preset = PRESETS["realtext"]
    config = study.grid(preset, METHODS, [100], [0], 0)[0]
    bundle = stages.read_data(store.open_folder(tmp_path / "r"), config["data"])
    tokenizer = bundle.tokenizer
    assert len(bundle.train) == preset.train_rows and len(tokenizer) == preset.vocab_size
    held = {tuple(r["input_ids"]) for split in bundle.held.values() for r in split}
    assert not held & {tuple(r["input_ids"]) for r in bundle.train}
    for split, rows in (("train", bundle.train), ("test", bundle.held["test"])):
        assert bundle.report[split]["answer_tokens_cut"] == 0
        for row in rows:
            assert len(row["input_ids"]) <= preset.max_length and row["labels"][-1] == tokenizer.eos_token_id
    for row in bundle.held["test"].select(range(50)):
        spoken = tokenizer.decode([t for t in row["labels"] if t != data.IGNORE][:-1])
        assert spoken == row["messages"][-1]["content"]


def test_the_sweep_crosses_rates_methods_budgets_and_seeds(tmp_path):
    planned = study.sweep_plan(TINY, tmp_path / "r")
    combos = {(c["learning_rate"], bool(c["alpha"]), c["budget"], c["seed"]) for c in planned.configs}
    assert combos == {(rate, kd, 20, 100) for rate in (1e-3, 2e-3) for kd in (True, False)}
    assert {c["split"] for c in planned.configs} == {"validation"} and {c["data"]["world_seed"] for c in planned.configs} == {900}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_no_sweep_run_is_a_reported_run(preset, tmp_path):
    reported = study.plan("data_budget", {"preset": preset.name, "results_dir": str(tmp_path / "r")})
    planned = study.sweep_plan(preset, tmp_path / "r")
    assert not set(planned.ids) & set(reported.ids)
    assert {c["split"] for c in reported.configs} == {"test"}
    assert not set(planned.seeds) & set(reported.seeds)


@pytest.mark.parametrize("name", ["lab", "realtext"])
def test_the_presets_rates_lie_inside_the_committed_sweeps_grid(name):
    preset, root = PRESETS[name], results.REPOSITORY / "results"
    planned = study.sweep_plan(preset, root)
    assert len(results.read_records(root, name, planned.ids)) == len(planned.ids), "the committed sweep is complete"
    rates = sorted(preset.sweep["learning_rates"])
    for method, choice in preset.learning_rate.items():
        assert list(choice) == preset.sweep["budgets"]
        assert rates[0] < min(choice.values()) <= max(choice.values()) < rates[-1], f"{method}'s rates lie inside the grid"
