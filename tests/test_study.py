import gzip
import json
import math
import os
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
from datasets import load_from_disk
from tiny import SMOKE, TINY, changed, plan, sweep

from kdlib import costs, data, evaluate, jobs, models, results, specs, stages, stats, store, study, teachers
from kdlib.presets import ARMS, METRICS, OPTIONAL, PRESETS, RECIPES


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
    assert make(tmp_path, world_seed=7).folder != standard.folder != make(tmp_path, seeds=[0, 2]).folder
    assert set(standard.ids) & set(changed.ids) == {i for i, (run, _) in zip(standard.ids, standard.runs) if run["method"] == "sft"}
    other = make(tmp_path, world_seed=1)
    assert other.folder == standard.folder / "world-1"


@pytest.mark.parametrize("experiment", [e for e in ARMS if e != "two_stage_domain"])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_runs_of_a_seed_are_paired(preset, experiment):
    assert not preset.lacks(experiment)
    arms = sum(teacher not in OPTIONAL or teacher in preset.teachers for _, teacher in ARMS[experiment])
    runs = study.grid(preset, experiment, 0)
    assert len({results.run_id(c) for _, c in runs}) == len(runs) == arms * len(preset.budgets) * len(preset.seeds)
    for start in range(0, len(runs), arms):
        (labels, sft), *others = runs[start:start + arms]
        assert labels["method"] == "sft" and labels["teacher"] is None and sft["phases"][0]["teacher"] is None
        for other, config in others:
            (phase,), (plain,) = config["phases"], sft["phases"]
            assert {k for k in labels if labels[k] != other[k]} <= {"method", "teacher"} and config["start"] == sft["start"]
            assert {k for k in plain if plain[k] != phase[k]} <= {"alpha", "teacher", "learning_rate", "rows"}
            assert (phase["teacher"] is None) == (other["method"] == "seq_kd") == ("said" in phase["rows"][0])
            part = phase["rows"][0] | phase["rows"][0].get("said", {}).get("only", {})
            assert {k: part[k] for k in ("set", "budget", "seed")} == {k: v for k, v in plain["rows"][0].items() if k != "alone"}
    steps = {(labels["budget"], p["steps"]) for labels, c in runs for p in c["phases"]}
    assert len(steps) == len(preset.budgets) and (len({n for _, n in steps}) == 1 or all(n == math.ceil(2 * b / 128) for b, n in steps))
    assert set(runs[0][1]) == {"start", "phases", "evaluate"}, "nothing that cannot change the result"


@pytest.mark.parametrize("name", ["smoke", "lab"])
def test_recipes_of_a_domain_are_paired_and_train_as_many_steps(name):
    preset = PRESETS[name]
    d = preset.domain
    runs = study.grid(preset, "two_stage_domain", 0)
    middle, cells = d["budgets"][len(d["budgets"]) // 2], {}
    assert len({results.run_id(c) for _, c in runs}) == len(runs)
    for labels, config in runs:
        cells.setdefault((labels["domain"], labels["budget"], labels["seed"]), []).append((labels, config))
    assert len(cells) == len(d["names"]) * len(d["budgets"]) * len(d["seeds"])
    for (domain, budget, seed), cell in cells.items():
        full = [(r, c) for r, c in cell if r["pool"] in (None, max(d["pools"]))]
        assert [r["method"] for r, _ in full] == [recipe for recipe, _ in ARMS["two_stage_domain"]]
        assert {r["pool"] for r, _ in cell} == {None, *(d["pools"] if budget == middle else [max(d["pools"])])}
        teachers = set()
        for r, config in cell:
            assert sum(p["steps"] for p in config["phases"]) == d["steps"] and config["evaluate"]["on"] == f"{domain}/test"
            assert config["start"] == study.model_spec(preset, d["student"], 0) and all(p["seed"] == seed for p in config["phases"])
            rates = d["learning_rate"][r["method"]]
            for phase, choices in zip(config["phases"], rates if isinstance(rates, list) else [rates], strict=True):
                assert phase["learning_rate"] == preset.rate(choices, budget)
            for phase, (rows, method) in zip(config["phases"], RECIPES[r["method"]], strict=True):
                assert (phase["teacher"] is not None) == (method == "kd") == (phase["alpha"] == 1.0)
                for part, source in zip(phase["rows"], rows.split("+"), strict=True):
                    if source == "human":
                        assert part == {"set": f"{domain}/train", "budget": budget, "seed": seed}
                    else:
                        assert part["set"] == part["said"]["set"] == f"{domain}/pool" and part["budget"] == r["pool"]
                        teachers.add(json.dumps(part["said"]["by"]))
                teachers |= {json.dumps(phase["teacher"])} - {"null"}
        teacher = json.loads(teachers.pop())
        assert not teachers and teacher["start"] == study.model_spec(preset, d["teacher"], 0), "one teacher a cell"
        assert teacher["phases"][0]["rows"] == [{"set": f"{domain}/train", "budget": budget, "seed": seed}], "it sees what the student may see"


@pytest.mark.parametrize("parameters, message", [
    ({"domains": ["bank"]}, r"domains=\['bank'\] is not allowed; allowed: a list of market"),
    ({"budgets": [10, 201]}, "budgets=.* from 1 to 200"), ({"pools": [10, 401]}, r"pools=.* from 1 to 400, the prompts of a pool"),
    ({"pools": [100]}, "at least two different")])
def test_bad_domain_parameters_are_named(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        study.plan("two_stage_domain", {"preset": "smoke", "results_dir": str(tmp_path / "results"), **parameters})
    assert not (tmp_path / "results").exists()


def test_a_cache_that_is_not_exact_is_of_the_temperature(tmp_path):
    for at, wanted in ((1.0, {}), (2.0, {"temperature": 2.0})):
        made = study.plan("data_budget", {"preset": "paper", "temperature": at, "results_dir": str(tmp_path)})
        phases = [c["phases"][0] for labels, c in made.runs if labels["method"] == "kd"]
        assert all(p["cache"] == {"form": "top_k", "k": 64, "dtype": "float16", **wanted} for p in phases)
        assert all(specs.targets_of(p)["cache"] == p["cache"] for p in phases)


def test_what_a_preset_lacks(monkeypatch):
    assert all(p.lacks(e) == [] for p in PRESETS.values() for e in ARMS)
    bare = changed(SMOKE, teachers={"base": SMOKE.teachers["base"]}, domain={})
    assert [bare.lacks(e) for e in ("data_budget", "teacher_strength", "two_stage_domain")] == [[], ["strong", "weak"], ["domain"]]
    monkeypatch.setitem(study.PRESETS, "smoke", bare)
    for experiment, lack in (("teacher_strength", "no strong and no weak teacher"), ("two_stage_domain", "no domain")):
        with pytest.raises(ValueError, match=rf"preset='smoke' has {lack}; allowed: lab, realtext, realtext-gpu, paper, paper-qwen\."):
            study.plan(experiment, {"preset": "smoke"})


def test_the_words_of_a_domains_teacher_are_learned_and_what_is_forgotten_is_recorded(tmp_path):
    domain = {**SMOKE.domain, "names": ["clinic"], "budgets": [10, 30], "pools": [20, 40], "seeds": [0, 1], "steps": 8,
              "tuning": {"steps": 6, "learning_rate": {10: 1e-3}}}
    small = changed(TINY, domain=domain)
    runs = study.grid(small, "two_stage_domain", 0, [30], [0], arms=[(n, None) for n in ("human_sft", "synthetic_sft", "kd_then_sft")])
    weak = [({**labels}, {**config, "phases": [json.loads(json.dumps(p)) for p in config["phases"]]}) for labels, config in runs]
    for _, config in weak:  # the tiny strong teacher has nothing right to learn from
        text = json.dumps(config).replace(json.dumps(study.model_spec(small, "strong", 0)), json.dumps(study.model_spec(small, "base", 0)))
        config |= json.loads(text)
    records = study.run(study.Plan(small, tuple(weak), store.open_folder(tmp_path / "r"), True, True, 2))
    for r in records:
        assert r["domain"] == "clinic" and {"general_accuracy", "general_nll", "untuned_nll"} <= set(r["metrics"])
        assert set(r["items"]["skill"]) == {"remedy", "visit", "plan"}
        assert ("label_accuracy" in r["metrics"]) == (r["method"] != "human_sft") == (r["pool"] is not None)


def test_a_preset_without_its_largest_teacher_compares_the_others(tmp_path, monkeypatch):
    with_it = study.plan("teacher_strength", {"preset": "paper", "results_dir": str(tmp_path)})
    teachers = {n: t for n, t in PRESETS["paper"].teachers.items() if n != "large"}
    monkeypatch.setitem(PRESETS, "paper", changed(PRESETS["paper"], teachers=teachers))
    without = study.plan("teacher_strength", {"preset": "paper", "results_dir": str(tmp_path)})
    assert {r["teacher"] for r, _ in with_it.runs} - {r["teacher"] for r, _ in without.runs} == {"large"}
    assert set(without.ids) < set(with_it.ids) and without.standard


def test_a_teacher_that_fits_no_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.models, "load", lambda *_, **__: (SimpleNamespace(hf_device_map={"model": 0, "lm_head": "disk"}), None))
    spec = {**PRESETS["paper"].teachers["large"], "data": study.data_spec(PRESETS["paper"], 0)}
    with pytest.raises(ValueError, match="'allenai/Llama-3.1-Tulu-3-70B' does not fit on the . devices here; allowed: more of them"):
        stages.open_model(tmp_path, spec)


def test_teachers_are_made_from_what_they_say_they_are():
    preset = PRESETS["lab"]
    weak, base, strong = (study.model_spec(preset, name, 0) for name in ("weak", "base", "strong"))
    assert weak["start"] == study.model_spec(preset, "student", 0) and base["start"] == study.model_spec(preset, "teacher", 0)
    assert [m["phases"][0]["rows"] for m in (weak, base)] == [[{"set": "train"}]] * 2
    rounds = [strong, strong["start"]]
    assert rounds[-1]["start"] == base and preset.teachers["strong"]["rounds"] == len(rounds) >= 2
    for after in rounds:
        (part,), = [p["rows"] for p in after["phases"]]
        assert part["verified"] and part["said"]["by"] == after["start"] and part["said"]["temperature"] == 1.0
    assert len({p["said"]["seed"] for r in rounds for p in r["phases"][0]["rows"]}) == len(rounds)


def test_lab_and_realtext_are_as_large_as_promised():
    lab, real = PRESETS["lab"], PRESETS["realtext"]
    assert len(lab.budgets) >= 6 and len(lab.seeds) >= 5 and len(real.budgets) >= 4 and len(real.seeds) >= 3
    assert not set(lab.sweep["worlds"]) & set(lab.worlds) and not set(real.sweep["seeds"]) & set(real.seeds)
    gpu, words = PRESETS["realtext-gpu"], models.build_tokenizer([str(i) for i in range(PRESETS["realtext-gpu"].vocab_size)])
    assert models.build_model(gpu.model("student"), words, 0).num_parameters() >= 30e6 and min(len(gpu.seeds), len(gpu.domain["seeds"])) >= 5
    for sized in (lab, real, gpu):
        half = sized.domain["steps"] // 2 * sized.domain.get("batch_size", sized.batch_size)
        assert max(sized.budgets) <= sized.steps * sized.batch_size, "a budget is seen once at least"
        assert max(sized.domain["budgets"]) <= half, "as are a domain's annotations, in half of the steps"
        assert sized is lab or max(sized.domain["pools"]) <= half, "and its pool"
    for sized in (real, gpu):
        assert sized.source["domains"]["maths"]["unlabelled_rows"] == sized.domain["pool_rows"]
    assert max(max(rates.values()) for rates in gpu.learning_rate.values()) <= gpu.bases["student"]["learning_rate"], "small models bear higher rates"


def test_a_model_tuned_on_a_domain_is_scored_on_that_alone():
    held = ["test", "market/test", "market/validation", "markets/test"]
    for _, config in study.grid(TINY, "two_stage_domain", 0):
        assert specs.scored_on(specs.teacher_of(config) or config, held) == held[1:3] and specs.scored_on(config["start"], held) == held


def test_a_domain_may_have_batches_of_its_own():
    for size in (None, 3):
        preset = changed(TINY, domain={**TINY.domain, **({"batch_size": size} if size else {})})
        for labels, config in study.grid(preset, "two_stage_domain", 0):
            teacher = specs.teacher_of(config)
            own = {p["batch_size"] for p in [*config["phases"], *(teacher["phases"] if teacher else ())]}
            assert own == {size or TINY.batch_size}
        assert {p["batch_size"] for _, config in study.grid(preset, "data_budget", 0) for p in config["phases"]} == {TINY.batch_size}


def test_records_hold_what_the_dictionary_says(tiny_records):
    assert len(tiny_records) == 8
    for r in tiny_records:
        kd = r["method"] == "kd"
        assert {"accuracy", "accuracy_unseen", "accuracy_by_skill", "nll", "nll_clean", "ece", "train_loss"} <= set(r["metrics"])
        assert ({"teacher_nll", "teacher_entropy", "top1_agreement"} <= set(r["metrics"])) is kd
        assert r["teacher"] == ("base" if kd else None) and r["student"] == "nano" and r["preset"] == "tiny"
        p = r["provenance"]
        assert {"code_version", "code_dirty", "packages", "device", "dtype", "wall_s", "cpu_s", "tokens", "artefacts"} <= set(p)
        assert p["tokens"] > p["response_tokens"] > 0 and p["data_report"]["train"]["answer_tokens_cut"] == 0
        assert len(r["items"]["id"]) == len(r["items"]["correct"]) == 60
        assert p["metric"] == "accuracy" and p["higher_is_better"] is True and 100 < p["peak_memory_mib"] < 8000
        assert p["data_report"]["train"]["rows_not_used"] == 0 and 0 < p["data_report"]["train"]["distinct_prompts"] <= 200
    for method, kinds in (("sft", ["base", "data"]), ("kd", ["base", "base", "data", "model"])):
        found = {json.dumps(r["provenance"]["artefacts"]) for r in tiny_records if r["method"] == method}
        assert len(found) == 1 and sorted(n.split("-")[0] for n in json.loads(found.pop())) == kinds
    assert len({json.dumps(r["metrics"]) for r in tiny_records}) == 8, "every run is another model"


def labels_of(record):
    return {k: record[k] for k in results.KEYS if k != "run_id"}


def test_data_are_looked_at_where_they_are_made_or_as_a_world_is_drawn(tiny_root, tiny_records, tmp_path):
    root = store.open_folder(tmp_path / "new")
    assert [plan(root).trains, plan(root, train_missing=False).trains, plan(tiny_root).trains] == [True, False, False]
    spec = specs.data_of(plan(root).configs[0])
    drawn = stages.look(root, spec, False)
    assert not specs.path(root, spec).exists()
    made = stages.look(root, spec, True)
    assert specs.path(root, spec).is_dir() and drawn.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for name in ("train", "market/train", "market/pool"):
        assert list(drawn.rows(name)["messages"]) == list(made.rows(name)["messages"])
    with pytest.raises(FileNotFoundError, match=f"Nothing is to be trained, and the rows to train on are not in {root}"):
        stages.look(root, study.data_spec(PRESETS["realtext"], 0), False)


def test_the_same_spec_gives_the_same_record(tiny_records, tmp_path):
    chosen = [r for r in tiny_records if r["budget"] == 20 and r["seed"] == 1]
    root = store.open_folder(tmp_path / "again")
    for wanted in chosen:
        jobs.execute(root, labels_of(wanted), wanted["config"], "accuracy")
        again = results.read_record(results.record_path(root, "tiny", wanted["run_id"]))
        assert again["metrics"] == wanted["metrics"] and again["items"] == wanted["items"]
        assert again["provenance"]["artefacts"] == wanted["provenance"]["artefacts"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_teacher_and_untuned_student_are_scored_as_the_student_is(tiny_root, tiny_records, split):
    config = next(r["config"] for r in tiny_records if r["method"] == "kd")
    known = stages.read_data(tiny_root, specs.data_of(config))
    for name, spec in (("untuned", config["start"]), ("teacher", specs.teacher_of(config))):
        folder = specs.path(tiny_root, spec)
        model, tokenizer = models.load(folder)
        wanted = evaluate.evaluate(model, tokenizer, known.rows(split), verify=known.verify)[0]
        assert json.loads((folder / "evaluation.json").read_text())[split] == wanted
        for r in tiny_records if split == "test" else ():
            own = {k: r["metrics"].get(f"{name}_{k}") for k in wanted}
            assert (own["accuracy_by_skill"] == wanted["accuracy_by_skill"]) is (name == "untuned" or r["method"] == "kd")
            assert r["metrics"]["untuned_nll"] > r["metrics"]["nll"]


def test_a_teacher_that_says_nothing_right_cannot_be_tuned_on_its_words(tiny_root, tiny_records):
    spec = study.model_spec(TINY, "strong", 0)
    with pytest.raises(ValueError, match="Set 'train' has nothing to train on: no answer of its teacher verifies"):
        stages.make(tiny_root, spec)


def test_a_run_that_diverges_says_so_and_leaves_no_record(tiny_root, tiny_records, tmp_path, monkeypatch):
    from kdlib import trainer

    root = tmp_path / "copy"
    shutil.copytree(tiny_root, root)
    record = tiny_records[0]
    results.record_path(root, "tiny", record["run_id"]).unlink()
    monkeypatch.setattr(trainer, "train", lambda *_, **__: {"train_loss": math.nan})
    with pytest.raises(ValueError, match=r"Training diverged \(loss nan\) with .*'learning_rate'.*; allowed: settings that keep it finite"):
        jobs.execute(root, labels_of(record), record["config"], "accuracy")
    assert not results.record_path(root, "tiny", record["run_id"]).exists()


def test_a_run_killed_in_its_second_phase_goes_on_there(tiny_root, tmp_path, monkeypatch):
    from kdlib import trainer

    labels, config = plan(tiny_root).runs[0]
    phase = {**config["phases"][0], "training": {"save_steps": 5}}
    config, steps, step = {**config, "phases": [phase, {**phase, "seed": 1}]}, [], trainer.DistillationTrainer.training_step
    identifier, found = results.run_id(config), []
    for root, killed_at in ((tmp_path / "whole", None), (tmp_path / "killed", 20)):
        shutil.copytree(tiny_root, root)

        def counted(self, *args, **more):
            steps.append(self.state.global_step)
            if len(steps) == killed_at:
                raise KeyboardInterrupt
            return step(self, *args, **more)

        steps.clear()
        monkeypatch.setattr(trainer.DistillationTrainer, "training_step", counted)
        if killed_at:
            with pytest.raises(KeyboardInterrupt):
                jobs.execute(root, labels, config, "accuracy")
            assert {p.name: [c.name for c in p.iterdir()] for p in stages.checkpoints(root, identifier).iterdir()} == {"0": ["checkpoint-12"], "1": ["checkpoint-5"]}
        jobs.execute(root, labels, config, "accuracy")
        assert len(steps) == (20 + 7 if killed_at else 24) and not stages.checkpoints(root, identifier).exists()
        found.append(results.read_record(results.record_path(root, "tiny", identifier)))
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["items"] == found[1]["items"]


def test_a_run_trains_on_its_budget_and_no_more(tiny_root, monkeypatch):
    from kdlib import trainer

    seen = []
    monkeypatch.setattr(trainer, "train", lambda model, tokenizer, rows, **how: seen.append(rows) or {"train_loss": 0.0})
    configs = plan(tiny_root).configs
    for config in (configs[0], configs[1], configs[4]):  # SFT and KD at the small budget, SFT at the large one
        jobs._train_and_evaluate(tiny_root, "a-run", config, METRICS["accuracy"], None)
    small, paired, large = [[tuple(r["input_ids"]) for r in rows] for rows in seen]
    assert small == paired and len(small) == TINY.steps * TINY.batch_size
    assert len(set(small)) <= 20 < len(set(large))
    rows, (skills,), _ = stages.read_rows(tiny_root, [{"set": "train"}], specs.data_of(configs[0]))
    order = data.nested_order(skills, configs[0]["phases"][0]["seed"])
    assert set(small) == {tuple(rows[i]["input_ids"]) for i in order[:20]}


def test_small_budgets_may_have_targets_and_answers_of_their_own(tiny_root, tiny_records, tmp_path):
    root, apart = tmp_path / "copy", changed(TINY, alone=20)
    shutil.copytree(tiny_root, root)
    shared, own = (study.grid(preset, "data_budget", 0) for preset in (TINY, apart))
    same = {labels["budget"] for (labels, a), (_, b) in zip(shared, own) if a == b}
    assert same == {200}, "larger budgets share what there is"
    place = next(i for i, (labels, _) in enumerate(own) if (labels["method"], labels["budget"], labels["seed"]) == ("kd", 20, 0))
    jobs.execute(root, *own[place], "accuracy")
    found = [results.read_records(root, "tiny", [results.run_id(config)])[0]["metrics"] for _, config in (shared[place], own[place])]
    assert found[1]["nll"] == pytest.approx(found[0]["nll"], rel=1e-3) and found[1]["nll"] != found[1]["untuned_nll"]
    caches = [teachers.Cached(specs.path(root, specs.targets_of(config["phases"][0]))) for _, config in (shared[place], own[place])]
    assert [len(cache.place) for cache in caches] == [TINY.train_rows, 20] and caches[1].place.keys() < caches[0].place.keys()
    told = [costs.estimate(study.Plan(p, tuple(runs), root, True, True, 1)).loc["cache"] for p, runs in ((TINY, shared), (apart, own))]
    assert [t["count"] for t in told] == [1, 3] and told[1].response_tokens == pytest.approx(told[0].response_tokens * (200 + 2 * 20) / 200)
    labels, config = next(run for run in study.grid(apart, "teacher_strength", 0, arms=[("seq_kd", "base")]) if run[0]["budget"] == 20)
    part, = config["phases"][0]["rows"]
    asked = stages.read_data(root, specs.data_of(config)).rows("train")
    chosen = data.nested_order(list(asked["skill"]), labels["seed"])[:20]
    assert list(load_from_disk(stages.make(root, part["said"]))["id"]) == [asked[i]["id"] for i in chosen]
    assert "budget" not in part, "all that was said is trained on"


def test_nothing_is_trained_when_that_is_not_wanted_and_what_is_missing_is_named(tmp_path, tiny_records):
    missing = r"{} of 8 runs of world 0 are missing, and none may be trained \(train_missing=False\): {}; allowed: a results_dir"
    with pytest.raises(ValueError, match=missing.format(8, "all of them")):
        study.run(plan(tmp_path / "r", train_missing=False))
    for r in tiny_records:
        if r["method"] == "kd" and (r["budget"], r["seed"]) != (20, 1):
            results.write_record(tmp_path / "r", {k: v for k, v in r.items() if k != "checksum"})
    cells = r"method sft budget 20 \(2 seeds\), method kd teacher base budget 20 \(1 seed\), method sft budget 200 \(2 seeds\)"
    with pytest.raises(ValueError, match=missing.format(5, cells)):
        study.run(plan(tmp_path / "r", train_missing=False))


def forged(record, prefix):
    """``record`` with another content of the artefact whose name begins with ``prefix``."""
    found = {n: "another" if n.startswith(prefix) else h for n, h in record["provenance"]["artefacts"].items()}
    return {k: v for k, v in record.items() if k != "checksum"} | {"provenance": {**record["provenance"], "artefacts": found}}


@pytest.mark.parametrize("part", ["data", "base", "model"])
def test_records_of_different_copies_are_not_mixed(tiny_records, tmp_path, part):
    root = store.open_folder(tmp_path / "mixed")
    for r in tiny_records:
        results.write_record(root, forged(r, part if r["method"] == "kd" and r["seed"] else "nothing"))
    with pytest.raises(ValueError, match=rf"more than one copy of {part}-[0-9a-f]+, so they cannot be compared"):
        study.run(plan(root))


def test_runs_are_not_added_to_records_of_other_models(tiny_root, tiny_records, tmp_path):
    """Where floating point differs from machine to machine, the same specification makes other models."""
    shutil.copytree(tiny_root, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / ".cache")
    path = results.record_path(tmp_path / "r", "tiny", tiny_records[0]["run_id"])
    for r in tiny_records:
        results.record_path(tmp_path / "r", "tiny", r["run_id"]).unlink()
    for r in tiny_records[1:]:
        results.write_record(tmp_path / "r", forged(r, "base"))
    with pytest.raises(ValueError, match="more than one copy of base-.*give a new results_dir"):
        study.run(plan(tmp_path / "r"))
    assert not path.exists(), "nothing was trained"


def test_what_the_records_there_do_not_share_is_made_beside_the_runs(tiny_root, tmp_path, monkeypatch):
    shutil.copytree(tiny_root, tmp_path / "r")
    calls, made = [], plan(tmp_path / "r")
    monkeypatch.setattr(study.runner, "compute", lambda todo, *how: calls.append({t.func.__name__ for t in todo}))
    for run_id, config in zip(made.ids, made.configs):
        if config["phases"][0]["teacher"]:
            results.record_path(made.root, "tiny", run_id).unlink()
    shutil.rmtree(next((made.root / ".cache").glob("targets-*")))
    study.run(made)
    assert calls == [{"make", "execute"}], "no core waits for artefacts that runs of others do not need"
    for folder in (made.root / ".cache").glob("base-*"):
        shutil.rmtree(folder)
    calls.clear()
    study.run(made)
    assert calls == [{"make"}, {"make", "execute"}]


def test_what_takes_longest_is_begun_first_and_what_it_needs_before_it(tmp_path):
    preset, root = PRESETS["realtext-gpu"], store.open_folder(tmp_path / "r")
    runs = [run for e in ("teacher_strength", "two_stage_domain") for run in study.grid(preset, e, 0)]
    todo, needs = jobs.tasks(runs, root, preset.metric)
    at = {task: i for i, task in enumerate(todo)}
    assert all(at[other] < at[task] for task, others in needs.items() for other in others)
    made = [(specs.path(root, t.args[1]).name, '"set": "m' in json.dumps(t.args[1]), i) for t, i in at.items() if t.func is stages.make]
    strong, words = specs.path(root, study.model_spec(preset, "strong", 0)).name, {name for name, domain, _ in made if name.startswith("answers") and not domain}
    for kind, general in (("model", {strong}), ("answers", words)):
        place, = (i for name, _, i in made if name in general)
        domains = [i for name, domain, i in made if domain and name.startswith(kind)]
        assert len(domains) == 20 and place < min(domains), "a domain's sets are small"


def test_records_of_other_data_than_those_at_hand_are_not_shown(tiny_root, tiny_records, tmp_path):
    shutil.copytree(tiny_root / ".cache", tmp_path / "r" / ".cache")
    store.write_atomic(tmp_path / "r" / store.MARKER, json.dumps(store.FORMAT))
    for r in tiny_records:
        results.write_record(tmp_path / "r", forged(r, "data"))
    with pytest.raises(ValueError, match="more than one copy of data-"):
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
    for name in (n for n in ("weak", "base") if "tuning" in preset.teachers[n]):
        tuning = preset.teachers[name]["tuning"]
        assert tuning["steps"] * tuning.get("batch_size", preset.batch_size) >= preset.train_rows


def test_rates_between_the_sweeps_budgets_are_interpolated():
    three, one = {100: 1e-3, 400: 4e-3, 800: 1e-3}, {100: 2e-3}
    assert [TINY.rate(three, b) for b in (1, 100, 200, 400, 800, 5000)] == [1e-3, 1e-3, 2e-3, 4e-3, 1e-3, 1e-3]
    assert TINY.rate(three, 566) == pytest.approx(2e-3, rel=0.01) and TINY.rate(one, 50) == TINY.rate(one, 5000) == 2e-3


def test_more_rows_than_the_data_has_is_said(tmp_path):
    greedy = changed(TINY, train_rows=5000, budgets=[20, 300, 5000])
    root, runs = store.open_folder(tmp_path / "r"), {r["budget"]: (r, c) for r, c in study.grid(greedy, "data_budget", 0) if r["method"] == "sft"}
    with pytest.raises(ValueError, match="budget=300 is above set 'train'; allowed: up to 200 rows"):
        jobs.execute(root, *runs[300], "accuracy")
    jobs.execute(root, *runs[5000], "accuracy")  # the preset's own number of rows means all that there are
    assert results.read_records(root, "tiny", [results.run_id(runs[5000][1])])


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

    def checked(found):
        for i, row in enumerate(found):
            row["messages"][1]["content"] += f"\n\nAnswer: {i % 3}"
            yield row

    files = {"general_train.jsonl.gz": rows(160, "a"), "general_test.jsonl.gz": rows(30, "b"),
             "pretrain_books.jsonl.gz": ({"id": str(i), "text": sentence(300)} for i in range(40)),
             "math_gsm8k_train.jsonl.gz": checked(rows(80, "m")), "medical_medquad_prompts.jsonl.gz": rows(40, "q")}
    plain = {"math_gsm8k_test.jsonl": checked(rows(12, "n")), "medical_pubmedqa_train.jsonl": checked(rows(60, "p")),
             "medical_pubmedqa_test.jsonl": checked(rows(12, "o"))}
    for name, content in plain.items():
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")
    for name, content in files.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in content)
    monkeypatch.setenv("KDLIB_DATA", str(folder))
    real = PRESETS["realtext"]
    quick = {"steps": 5, "batch_size": 4, "block": 64}
    domains = {n: {**d, "validation_rows": 8, "annotated_rows": 30, "unlabelled_rows": 30, "test_rows": 10} for n, d in real.source["domains"].items()}
    tuning = {"learning_rate": 1e-3, "steps": 3, "batch_size": 4}
    return changed(
        real, source={**real.source, "validation_rows": 10, "test_rows": 25, "domains": domains}, train_rows=140, max_length=64, vocab_size=400,
        max_new_tokens=24, bases={name: {**base, **quick} for name, base in real.bases.items()}, steps=4, batch_size=4, budgets=(10, 140),
        teachers={name: {**t, "tuning": tuning} for name, t in real.teachers.items()},
        domain={**real.domain, "rows": 30, "pool_rows": 30, "budgets": [10, 20], "pools": [10, 20], "seeds": [0, 1], "steps": 4})


@pytest.mark.parametrize("experiment", ["teacher_strength", "two_stage_domain"])
def test_human_text_has_teachers_and_domains_too(tmp_path, monkeypatch, experiment):
    preset = text_preset(monkeypatch, tmp_path)
    runs = [run for run in study.grid(preset, experiment, 0) if run[0]["seed"] == 0 and run[0]["pool"] in (None, 20)]
    records = study.run(study.Plan(preset, tuple(runs), store.open_folder(tmp_path / "r"), True, True, 2))
    assert len(records) == len(runs) > 0
    if experiment == "teacher_strength":
        assert {r["teacher"] for r in records} == {None, "weak", "base", "strong"} and all(r["metrics"]["accuracy"] is None for r in records)
        words = next(r["config"] for r in records if r["method"] == "seq_kd")["phases"][0]["rows"][0]["said"]
        answers, end = load_from_disk(stages.make(store.open_folder(tmp_path / "r"), words)), stages.read_data(tmp_path / "r", specs.data_of(words["by"])).tokenizer.eos_token_id
        assert {"stop", "length"} == set(answers["finish_reason"])
        assert len(answers) == preset.train_rows and max(map(len, answers["input_ids"])) == preset.max_length
        for row in answers:
            assert row["finish_reason"] == "length" or len(row["input_ids"]) == preset.max_length or row["labels"][-1] == end
            assert row["finish_reason"] == "stop" or end not in row["labels"], "what is cut off has no end"
        return
    for r in records:
        m, asked = r["metrics"], r["items"]["correct"]
        assert m["accuracy"] == sum(asked) / len(asked) and 0 < m["bits_per_byte"] < 8 and 0 < m["general_bits_per_byte"] < 8
        judged = r["domain"] == "maths" and "synthetic" in str(RECIPES[r["method"]])  # the medical pool's answers nobody knows
        assert ("label_accuracy" in m) == judged and (not judged or 0 <= m["label_accuracy"] <= 1)


def test_human_text_takes_the_same_path(tmp_path, monkeypatch):
    preset = text_preset(monkeypatch, tmp_path)
    runs = study.grid(preset, "data_budget", 0)
    made = study.Plan(preset, tuple(runs), store.open_folder(tmp_path / "r"), True, True, 2)
    records = study.run(made)
    assert len(records) == 12 and {r["preset"] for r in records} == {"realtext"}
    for r in records:
        assert r["metrics"]["accuracy"] is None and "correct" not in r["items"] and len(r["items"]["id"]) <= 25
        bits = sum(r["items"]["nll"]) / math.log(2) / sum(r["items"]["bytes"])
        assert r["metrics"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4) and 0 < bits < 8
        report = r["provenance"]["data_report"]
        assert report["train"]["answer_tokens_cut"] == 0 and report["train"]["prompts_shortened"] > 0
        assert report["loading"]["train"]["rows_read"] == 160
    frame = results.frame(records)
    gaps = stats.paired_gaps(frame, preset.scored)
    wide = frame.pivot(index=["budget", "seed"], columns="method", values="bits_per_byte")
    assert gaps.gap.tolist() == pytest.approx((wide.sft - wide.kd).tolist())
    assert all(c["verdict"].startswith("exploratory") for c in stats.budget_claims(frame, preset.scored))


@pytest.mark.skipif("KDLIB_DATA" not in os.environ, reason="KDLIB_DATA names no folder with the real text")
def test_the_real_text_is_rendered_without_cutting_an_answer(tmp_path):
    preset = PRESETS["realtext"]
    spec, root = study.data_spec(preset, 0), store.open_folder(tmp_path / "r")
    known, (train, *_) = stages.read_data(root, spec), stages.read_rows(root, [{"set": "train"}], spec)
    assert len(train) == preset.train_rows and len(known.tokenizer) == preset.vocab_size
    held = {tuple(ids) for split in ("validation", "test") for ids in known.rows(split)["input_ids"]}
    assert not held & {tuple(r["input_ids"]) for r in train}
    for split in ("train", "test"):
        assert known.report[split]["answer_tokens_cut"] == 0
        for row in known.rows(split):
            assert len(row["input_ids"]) <= preset.max_length and row["labels"][-1] == known.tokenizer.eos_token_id
    for row in known.rows("test").select(range(50)):
        spoken = known.tokenizer.decode([t for t in row["labels"] if t != data.IGNORE][:-1])
        assert spoken == row["messages"][-1]["content"]


def test_the_sweep_crosses_rates_methods_budgets_and_seeds(tmp_path):
    planned = sweep(TINY, tmp_path / "r")
    combos = {(c["phases"][0]["learning_rate"], r["method"], r["teacher"], r["budget"], r["seed"]) for r, c in planned.runs if not r["domain"]}
    arms = (("sft", None), ("kd", "base"), ("seq_kd", "strong"))
    assert combos == {(rate, *arm, 20, 100) for rate in (1e-3, 2e-3) for arm in arms}
    recipes = {(tuple(p["learning_rate"] for p in c["phases"]), r["method"], r["domain"], r["budget"], r["seed"]) for r, c in planned.runs if r["domain"]}
    rates = {1: {(1e-3,), (2e-3,)}, 2: {(1e-3, 1e-3), (1e-3, 2e-3), (2e-3, 1e-3)}}  # of the last stage, then of the first: 1e-3 suits both
    assert recipes == {(rate, recipe, domain, budget, 100) for recipe, _ in ARMS["two_stage_domain"] for rate in rates[len(RECIPES[recipe])]
                       for domain in TINY.domain["names"] for budget in TINY.domain["budgets"]}
    assert len(planned.runs) == len(combos) + len(recipes) == len(set(planned.ids))
    assert {c["evaluate"]["on"] for c in planned.configs} == {"validation", "market/validation"}
    assert {r["world_seed"] for r, _ in planned.runs} == {specs.data_of(c)["world_seed"] for c in planned.configs} == {900}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_no_sweep_run_is_a_reported_run(preset, tmp_path):
    reported = study.plan("data_budget", {"preset": preset.name, "results_dir": str(tmp_path / "r")})
    planned = sweep(preset, tmp_path / "r")
    assert not set(planned.ids) & set(reported.ids)
    assert {c["evaluate"]["on"] for c in reported.configs} == {"test"}
    assert not set(planned.seeds) & set(reported.seeds)


@pytest.mark.parametrize("name", ["lab", "realtext"])
def test_the_presets_rates_lie_inside_the_committed_sweeps_grid(name):
    preset, root = PRESETS[name], results.REPOSITORY / "results"
    planned = sweep(preset, root)
    assert len(results.read_records(root, name, planned.ids)) == len(planned.ids), "the committed sweep is complete"
    for method, given in [*preset.learning_rate.items(), *preset.domain["learning_rate"].items()]:
        rates = sorted(preset.sweep["learning_rates"] if method in preset.learning_rate else preset.domain.get("sweep_rates", preset.sweep["learning_rates"]))
        *first, last = given if isinstance(given, list) else [given]
        lowest = min(preset.domain.get("last_stage_rates", rates)) if first else rates[0]
        for choice, low in [*((c, rates[0]) for c in first), (last, lowest)]:
            assert list(choice) == (preset.sweep["budgets"] if method in preset.learning_rate else preset.domain["budgets"])
            assert low < min(choice.values()) <= max(choice.values()) < rates[-1], f"{method}'s rates lie inside the grid"


def test_adapters_without_their_package_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    preset = changed(TINY, training={"lora": {"r": 4}})
    asked = study.Plan(preset, tuple(study.grid(preset, "data_budget", 0)), store.open_folder(tmp_path), True, True, 0)
    with pytest.raises(ValueError, match=r"^lora needs the package peft; pip install 'kdlib\[lora\]', or train all weights\.$"):
        study.run(asked)
    assert [p.name for p in tmp_path.iterdir()] == ["kdlib-results.json"]
