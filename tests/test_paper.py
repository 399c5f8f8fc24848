"""The way of the paper preset, from a hub on disk to claims, and what goes wrong on it."""

import errno
import json
import re
import shutil

import hub
import pandas as pd
import papermill
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kdlib import data, evaluate, jobs, models, results, specs, stages, stats, store, study, teachers

CONFIGURATIONS = results.REPOSITORY / "kdlib" / "accelerate"

# Accelerate shards on accelerators alone; a file says what became of the parameters; and all processes die at a step, if told.
SHARDING = """
import os, torch
from accelerate import Accelerator, optimizer, state
begin, prepare, step, left = state.AcceleratorState.__init__, Accelerator.prepare, optimizer.AcceleratedOptimizer.step, [int(os.environ.get("KDLIB_DIES", 0))]
def stepped(self, *args, **more):
    left[0] -= 1
    if left[0] == 0:
        os._exit(1)
    return step(self, *args, **more)
def init(self, *args, **more):
    if state.PartialState(cpu=True).distributed_type == state.DistributedType.MULTI_CPU and "ACCELERATE_USE_FSDP" in os.environ:
        state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU
    begin(self, *args, **more)
def prepared(self, *args, **more):
    found = prepare(self, *args, **more)
    for model in (m for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, torch.nn.Module)):
        with open(os.environ["KDLIB_TOLD"] + os.environ["RANK"], "w") as file:
            file.write(" ".join(sorted({f"{type(p).__name__}-{p.numel() // getattr(p, 'to_local', lambda p=p: p)().numel()}" for p in model.parameters()})))
    return found
state.AcceleratorState.__init__, Accelerator.prepare, optimizer.AcceleratedOptimizer.step = init, prepared, stepped
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Models of both families, data, and a benchmark of our own, and nothing else within reach."""
    root = tmp_path_factory.mktemp("hub")
    for family in hub.FAMILIES:
        hub.build_models(root / "models", family)
    hub.build_data(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("KDLIB_MODELS", root / "models"), ("KDLIB_DATA", root / "data"), ("HF_HUB_OFFLINE", "1")):
            patch.setenv(name, str(value))
        yield root, str(hub.build_task(root))


def few(preset, task, root, **more):
    return study.plan("data_budget", {"preset": preset, "budgets": [64, 128], "seeds": [0, 1], "tasks": {task: {}}, "results_dir": str(root), **more})


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Models that have learned nothing do not end their answers; here, unlike in the notebook's kernel, they are stopped soon."""
    for name in ("paper", "paper-qwen"):
        monkeypatch.setattr(study.PRESETS[name], "max_new_tokens", 8)


@pytest.fixture(scope="module")
def executed(shelf, tmp_path_factory):
    """Notebook 02 with the preset; two of its runs are trained by two processes at a time."""
    out = tmp_path_factory.mktemp("paper")
    plan = few("paper", shelf[1], out / "results")
    launched = [results.record_path(plan.root, "paper", i) for i, (labels, _) in zip(plan.ids, plan.runs) if (labels["budget"], labels["seed"]) == (128, 1)]
    for configuration in ("", str(CONFIGURATIONS / "processors.yaml")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KDLIB_LAUNCH", configuration)
            for record in launched if configuration else ():
                record.unlink()
            papermill.execute_notebook(str(results.REPOSITORY / "notebooks" / "02_data_budget.ipynb"), str(out / "out.ipynb"), {
                "preset": "paper", "budgets": [64, 128], "seeds": [0, 1], "tasks": {shelf[1]: {}}, "results_dir": str(out / "results"), "workers": 2},
                progress_bar=False, log_output=False, kernel_name="python3")
    return plan


def test_the_notebook_makes_the_records_claims_and_figures_of_any_preset(executed):
    records = study.run(executed)
    assert len(records) == 8 and {r["config"]["start"]["hub"] for r in records} == {"meta-llama/Llama-3.2-1B"}
    for r in records:
        (phase,), m = r["config"]["phases"], r["metrics"]
        assert phase["steps"] == 2 * r["budget"] // 128 and phase["training"]["bf16"] is True
        asked = [c for c, skill in zip(r["items"]["correct"], r["items"]["skill"]) if skill == "animals"]
        assert len(asked) == 20 and m["accuracy"] == pytest.approx(sum(asked) / 20) and set(asked) <= {0.0, 1.0}
        assert r["provenance"]["metric"] == "accuracy" and 0 < m["bits_per_byte"] < 8
        assert (m["teacher_nll"] > 0) if r["method"] == "kd" else "teacher_nll" not in m
        if r["method"] == "kd":
            assert len(teachers.Cached(specs.path(executed.root, specs.targets_of(phase))).place) == r["budget"], "no more than is asked for"
    claims = {c["claim"] for c in results.read_claims(executed.folder)}
    assert {"C1a", "C1b"} <= claims and executed.folder.parent.name == "variants"
    assert (executed.folder / "figures" / "gap_vs_budget.png").is_file()
    gap = stats.item_interval([r for r in records if r["budget"] == 128], executed.preset.scored)
    means = pd.DataFrame([{"method": r["method"], "accuracy": r["metrics"]["accuracy"]} for r in records if r["budget"] == 128]).groupby("method").accuracy.mean()
    assert gap.n == 20 and gap.estimate == pytest.approx(means.kd - means.sft)


@pytest.fixture(scope="module")
def alone(shelf, tmp_path_factory):
    """A short KD run in float32, to compare digits, by one process: its labels, configuration and record."""
    root = store.open_folder(tmp_path_factory.mktemp("alone"))
    labels, config = next(run for run in few("paper", shelf[1], root).runs if run[0]["method"] == "kd" and run[0]["budget"] == 128)
    own = json.loads(json.dumps(config | {"evaluate": {"on": "test"}}))
    own["phases"][0] |= {"training": {"micro_batch": 8, "save_steps": 2}, "steps": 6, "batch_size": 32, "learning_rate": 1e-2}
    own["start"]["data"]["max_new_tokens"] = own["phases"][0]["teacher"]["data"]["max_new_tokens"] = 8
    jobs.execute(root, labels, own, "accuracy")
    return labels, own, results.read_record(results.record_path(root, "paper", results.run_id(own)))


@pytest.mark.parametrize("configuration", ["processors", "fsdp"])
def test_two_processes_train_as_one_does(alone, tmp_path, monkeypatch, configuration):
    (labels, own, record), root = alone, store.open_folder(tmp_path / "together")
    here = yaml.safe_load((CONFIGURATIONS / f"{configuration}.yaml").read_text()) | {"num_processes": 2, "use_cpu": True}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    monkeypatch.setenv("KDLIB_LAUNCH", str(tmp_path / "here.yaml"))
    (tmp_path / "sitecustomize.py").write_text(SHARDING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KDLIB_TOLD", str(tmp_path / "parameters-"))
    if configuration == "fsdp":  # stopped on its way, it goes on from there
        monkeypatch.setenv("KDLIB_DIES", "4")
        with pytest.raises(RuntimeError):
            jobs.execute(root, labels, own, "accuracy")
        assert [p.name for p in (stages.checkpoints(root, results.run_id(own)) / "0FSDP").iterdir()] == ["checkpoint-2"]
    monkeypatch.setenv("KDLIB_DIES", "6" if configuration == "fsdp" else "0")  # of six steps two are done, and one of none loads the optimizer
    jobs.execute(root, labels, own, "accuracy")
    assert not list((root / ".cache").glob("training-*"))
    kinds = {"fsdp": "DTensor-2", "processors": "Parameter-1"}
    assert [p.read_text() for p in sorted(tmp_path.glob("parameters-*"))] == [kinds[configuration]] * 2, "halves of what is sharded, on both"
    together = results.read_record(results.record_path(root, "paper", results.run_id(own)))
    one, two = record["metrics"], together["metrics"]
    moved = abs(one["nll"] - one["untuned_nll"])  # little: the teacher is a fresh model, almost uniform
    assert moved > 1e-3 and abs(two["nll"] - one["nll"]) < 0.02 * moved
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
    assert record["provenance"]["tokens"] == together["provenance"]["tokens"]
    assert "launch" not in record["provenance"] and together["provenance"]["launch"] == here
    if configuration == "processors":
        with pytest.raises(RuntimeError, match="batch_size=33 does not split over 2 processes"):  # so there are two
            jobs.execute(root, labels, own | {"phases": [own["phases"][0] | {"batch_size": 33}]}, "accuracy")


def test_teachers_and_domains_take_the_same_way_through_their_notebooks(shelf, tmp_path):
    """With a preset of one's own, whose runs are shorter."""
    (tmp_path / "small.toml").write_text('[small]\nlike = "paper"\nmax_new_tokens = 8\nbatch_size = 16\nteachers.weak.tuning = { steps = 4, learning_rate = 1e-2 }\ndomain = { steps = 4, batch_size = 8 }\n')
    asked, found = {"preset": "small", "budgets": [16, 32], "seeds": [0, 1], "tasks": {shelf[1]: {}}, "results_dir": str(tmp_path / "results")}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_PRESETS", str(tmp_path / "small.toml"))
        for experiment, notebook, more in (("teacher_strength", "03_teacher_strength", {}), ("two_stage_domain", "04_two_stage_domain", {"pools": [20, 40]})):
            papermill.execute_notebook(str(results.REPOSITORY / "notebooks" / f"{notebook}.ipynb"), str(tmp_path / f"{notebook}.ipynb"), {**asked, **more, "workers": 2},
                                       progress_bar=False, log_output=False, kernel_name="python3")
    for r in (results.read_record(p) for p in (tmp_path / "results" / "small" / "runs").glob("*.json")):
        m, items = r["metrics"], r["items"]
        found[r["experiment"], r["method"], r["teacher"], r["budget"], r["seed"], r["pool"]] = r
        assert {"animals"} < set(items["skill"]) and m["accuracy"] == pytest.approx(sum(c for c in items["correct"] if c is not None) / 20)
        assert m["train_loss"] > 0 and (r["method"] in ("sft", "seq_kd", "human_sft", "synthetic_sft") or m["teacher_nll"] > 0)
        assert ("general_nll" in m) == (r["experiment"] == "two_stage_domain") == r["config"]["evaluate"]["on"].startswith("medical/")
        assert {p["batch_size"] for p in r["config"]["phases"]} == {8 if r["domain"] else 16}
    assert len(found) == (6 * 4) + (8 * 4 + 6 * 2), "arms by budgets and seeds, and a smaller pool at the larger budget"
    claims = {c["claim"] for p in (tmp_path / "results" / "small").rglob("claims.json") for c in json.loads(p.read_text())}
    assert {"C2a", "C2b", "C2"} <= claims and any(c.startswith("C3 medical") for c in claims)
    tuned = next(p for p in (tmp_path / "results" / ".cache").glob("model-*") if (p / "evaluation.json").is_file())
    model, _ = models.load(tuned)
    assert model.dtype == torch.bfloat16 and not list((tmp_path / "results" / ".cache").glob("training-*"))
    known, own = stages.read_data(tmp_path / "results", specs.data_of(r["config"])), json.loads((tuned / "evaluation.json").read_text())
    name = next(iter(own))
    assert stages.score(model, known, name)[0]["nll"] == pytest.approx(own[name]["nll"], rel=1e-6), "read again it is the same model"
    said = (tmp_path / "04_two_stage_domain.ipynb").read_text()
    assert re.search(r"nats per token of human answers on general test rows after tuning in a domain, \d+\.\d{3} to \d+\.\d{3}; before it, not known", said)


def test_qwen_takes_the_same_way(shelf, tmp_path):
    plan = few("paper-qwen", shelf[1], tmp_path)
    labels, config = next(run for run in plan.runs if run[0]["method"] == "kd")
    student, teacher = (models.load(name)[0] for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct"))
    assert student.config.vocab_size != teacher.config.vocab_size
    jobs.execute(plan.root, labels, config, "accuracy")
    record, = results.read_records(plan.root, "paper-qwen", [results.run_id(config)])
    said = stages.read_data(plan.root, config["start"]["data"]).rows("train")[0]
    spoken = [t for t in said["labels"] if t != data.IGNORE]
    tokenizer = models.load_tokenizer("Qwen/Qwen2.5-0.5B", template="chatml")
    assert tokenizer.decode(spoken).count("<|im_end|>") == sum(m["role"] == "assistant" for m in said["messages"])
    assert record["metrics"]["teacher_nll"] > 0 and record["metrics"]["train_loss"] > 0
    fits = next(r for r in stages.read_data(plan.root, config["start"]["data"]).rows("train") if len(r["messages"]) > 2)
    asked = tokenizer.apply_chat_template(fits["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert fits["labels"][-1] == data.IGNORE and evaluate.prompt(fits) == asked, "though the template goes on after an answer"


def test_a_dry_run_says_what_it_takes_and_does_nothing(shelf, tmp_path):
    nb = papermill.execute_notebook(str(results.REPOSITORY / "notebooks" / "02_data_budget.ipynb"), str(tmp_path / "out.ipynb"), {
        "preset": "paper", "results_dir": str(tmp_path / "results"), "dry_run": True}, progress_bar=False, log_output=False, kernel_name="python3")
    said = "".join(o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs)
    assert "0 of 70 runs found" in said and "H100" in said and not list((tmp_path / "results").rglob("runs/*.json"))


def test_a_tokenizer_may_have_one_more_token_to_pad_with_and_no_other(shelf):
    student, tulu = (models.load_tokenizer(n) for n in ("meta-llama/Llama-3.2-1B", "allenai/Llama-3.1-Tulu-3-8B-SFT"))
    assert len(tulu) == len(student) + 1 and models.common_vocabulary(student, tulu, 348, 365) == len(student)
    qwen = models.load_tokenizer("Qwen/Qwen2.5-0.5B")
    with pytest.raises(ValueError, match=r"need the same token ids, but \d+ tokens differ, among them '<\|begin_of_text\|>' \(0 and None\)"):
        models.common_vocabulary(student, qwen, 348, 348)
    tulu.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="tokens differ, among them '<pad>'"):
        models.common_vocabulary(student, tulu, 348, 365)


def test_another_model_of_the_same_name_is_not_taken_for_the_one_that_results_are_of(shelf, tmp_path, monkeypatch):
    name = "meta-llama/Llama-3.2-1B"
    assert models.origin("nobody/nothing") is models.commit("nobody/nothing") is models.commit(name) is None and f"{name}/model.safetensors" in models.origin(name)
    monkeypatch.setenv("KDLIB_MODELS", str(tmp_path / "models"))
    shutil.copytree(shelf[0] / "models" / name, tmp_path / "models" / name)
    plan = few("paper", shelf[1], tmp_path / "results")
    start = plan.configs[0]["start"]
    monkeypatch.setattr(stages, "_build_model", lambda root, spec, folder: (folder / "evaluation.json").write_text("{}"))  # that takes its time
    assert stages.make(plan.root, start) == stages.make(plan.root, start)
    model, _ = models.load(name)
    next(model.parameters()).data += 1
    model.save_pretrained(tmp_path / "models" / name)
    with pytest.raises(ValueError, match=r"base-\w+ was made from other files than .*model\.safetensors.* at hand; give each a results_dir"):
        stages.make(plan.root, start)
    monkeypatch.delenv("KDLIB_MODELS")
    assert models.origin(name) is None


@pytest.mark.parametrize("spoil, message", [
    ("absent", "'some/absent' cannot be loaded .*connect to the internet, or set KDLIB_MODELS to a folder that holds some/absent"),
    ("pickled", "it has no safetensors file, and pickled weights are not opened unless its name is in `trust` or KDLIB_TRUST"),
    ("truncated", r"'some/truncated' cannot be loaded \(SafetensorError: .*its folder is there, but a file in it is missing, damaged"),
    ("of-other-sizes-401", "cannot be loaded .*its folder is there, but a file in it is missing, damaged"),
    ("unreadable", "cannot be loaded .*its folder is there, but a file in it is missing, damaged"),
    ("code", "it needs code of its own, which is not run unless its name is in `trust` or KDLIB_TRUST")])
def test_models_that_cannot_be_had_are_named_with_the_remedy(shelf, tmp_path, monkeypatch, spoil, message):
    monkeypatch.setenv("KDLIB_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE does at the start, for it tries for long
    folder, name = tmp_path / "some" / spoil, f"some/{spoil}"
    if spoil != "absent":
        model, tokenizer = models.load(shelf[0] / "models" / "meta-llama/Llama-3.2-1B")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if spoil == "pickled":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    weights = folder / "model.safetensors"
    if spoil == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if spoil in ("of-other-sizes-401", "unreadable"):
        config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 96}
        (folder / "config.json").write_text(json.dumps(config) if spoil != "unreadable" else "{")
    if spoil == "code":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ValueError, match=message):
        models.load(name)
    if spoil == "pickled":
        assert torch.equal(models.load(name, trust=(name,))[0].lm_head.weight, model.lm_head.weight)
        monkeypatch.setenv("KDLIB_TRUST", f"other/one,{name}")
        assert torch.equal(models.load(name)[0].lm_head.weight, model.lm_head.weight)


def test_models_and_data_come_from_the_hub_and_records_say_at_which_commits(shelf, tmp_path):
    """Over HTTP, as the hub's own clients ask for them; then the hub has other commits under the same names."""
    hub.publish(shelf[0], tmp_path / "hub")
    (tmp_path / "small.toml").write_text('[small]\nlike = "paper"\nmax_new_tokens = 8\nbatch_size = 16\n')
    code = f"""
from kdlib import jobs, results, study
plan = study.plan("data_budget", {{"preset": "small", "budgets": [32, 64], "seeds": [0, 1], "tasks": {{{shelf[1]!r}: {{}}}}, "results_dir": {str(tmp_path / "results")!r}}})
jobs.execute(plan.root, *next(run for run in plan.runs if run[0]["method"] == "kd" and run[0]["seed"] == SEED), "accuracy")"""
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        with hub.served(tmp_path / "hub", commit, tmp_path / "home") as run:
            done = run(code.replace("SEED", str(seed)), KDLIB_PRESETS=str(tmp_path / "small.toml"))
        assert done.returncode == 0, done.stderr
        weights = [path for path in run.asked if path.endswith(".safetensors")]
        assert {path.split("/")[3] for path in weights} == ({commit} if commit[0] == "a" else set()), "the second time, what the study began with"
    records = [results.read_record(p) for p in (tmp_path / "results" / "small" / "runs").glob("*.json")]
    assert len(records) == 2
    for r in records:
        assert r["provenance"]["commits"] == dict.fromkeys(
            (f"{name}@main" for name in ("meta-llama/Llama-3.2-1B", "allenai/Llama-3.1-Tulu-3-8B-SFT", "allenai/tulu-3-sft-mixture",
                                         "qiaojin/PubMedQA", "keivalya/MedQuad-MedicalQnADataset")), "a" * 40)
        report = r["provenance"]["data_report"]
        assert report["loading"]["train"]["rows_read"] == 402 and report["medical/test"]["rows"] == 40 and report["medical/pool"]["rows"] == 60


def test_a_model_of_the_hub_that_is_pickled_or_not_there_is_told_apart(shelf, tmp_path):
    pickled = tmp_path / "hub" / "models" / "some" / "pickled"
    shutil.copytree(shelf[0] / "models" / "meta-llama/Llama-3.2-1B", pickled)
    torch.save(models.load(pickled)[0].state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    code = """
from kdlib import models
for name in ("some/pickled", "some/absent"):
    try:
        models.load(name)
    except ValueError as error:
        print(error)"""
    with hub.served(tmp_path / "hub", "401" + "a" * 37, tmp_path / "home") as run:
        done = run(code)
    pickled, absent = done.stdout.splitlines()
    assert "it has no safetensors file, and pickled weights are not opened unless its name is in `trust` or KDLIB_TRUST" in pickled, done.stderr
    assert "no such model is known there, or it is private; check its id" in absent


@pytest.mark.parametrize("code, message", [
    ("from kdlib import models; models.load_tokenizer('some/gated')",
     r"ValueError: 'some/gated' cannot be loaded .*it is gated; ask for access on its page and log in with `hf auth login`, or set KDLIB_MODELS to a folder that holds some/gated"),
    ("from kdlib import text; text.load_rows({'hub': 'some/gated', 'local': 'its-rows'})",
     r"FileNotFoundError: Neither the hub nor local data can be reached for 'some/gated' .*\(gated sets: `hf auth login`\), or set KDLIB_DATA to a folder that holds 'its-rows'")])
def test_what_is_gated_is_named_with_both_remedies(tmp_path, code, message):
    with hub.served(tmp_path, "0" * 40, tmp_path / "home") as run:
        done = run(code)
    assert done.returncode == 1 and re.fullmatch(message + r".*\.", done.stderr.strip().splitlines()[-1]), done.stderr


def test_a_template_that_marks_nothing_is_refused(shelf):
    tulu = models.load_tokenizer("allenai/Llama-3.1-Tulu-3-8B-SFT")
    with pytest.raises(ValueError, match="The chat template of '.*' marks no assistant tokens; allowed: a template of kdlib's .tulu, chatml., or one with {% generation %} around"):
        data.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tulu)
    with pytest.raises(ValueError, match="has no chat template; allowed: a template of kdlib's"):
        data.encode([{"role": "user", "content": "a"}], models.load_tokenizer("meta-llama/Llama-3.2-1B"))
    with pytest.raises(ValueError, match=r"template='chatml' ends turns with '<\|im_end\|>', which the tokenizer of 'meta-llama"):
        models.load_tokenizer("meta-llama/Llama-3.2-1B", template="chatml")


def test_a_full_disk_while_caching_is_said_and_what_was_cached_is_kept(shelf, tmp_path, monkeypatch):
    plan = few("paper", shelf[1], tmp_path)
    config = next(c for labels, c in plan.runs if labels["method"] == "kd")
    spec = specs.targets_of(config["phases"][0])
    spec["cache"] = {**spec["cache"], "shard_rows": 20}
    whole, written = data.Dataset.save_to_disk, []

    def full(self, folder, **how):
        if "shard" in str(folder):
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(folder)
        return whole(self, folder, **how)

    monkeypatch.setattr(data.Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match="The disk is full under .*; free some of it and run again: what was finished is kept"):
        stages.make(plan.root, spec)
    monkeypatch.setattr(data.Dataset, "save_to_disk", whole)
    place = specs.path(plan.root, spec)
    kept = {p: p.stat().st_mtime_ns for p in place.with_name(f".{place.name}.unfinished").glob("shard-*/manifest.json")}
    assert len(kept) == 2 and not place.exists()
    made = stages.make(plan.root, spec)
    assert len(list(made.glob("shard-*"))) > 2 and {(made / p.parent.name / p.name).stat().st_mtime_ns for p in kept} == set(kept.values())


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGURATIONS.glob("*.yaml")))
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file
    found = load_config_from_file(str(CONFIGURATIONS / name))
    assert found.num_processes >= 2 and found.main_training_function == "main"


def test_low_rank_adapters_are_merged_into_the_model_that_is_evaluated(shelf, tmp_path):
    plan = few("paper", shelf[1], tmp_path)
    labels, config = plan.runs[0]
    own = json.loads(json.dumps(config))
    own["phases"][0] |= {"learning_rate": 1e-2, "training": {"lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}}
    jobs.execute(plan.root, labels, own, "accuracy", keep=tmp_path / "kept")
    record, = results.read_records(plan.root, "paper", [results.run_id(own)])
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert not [n for n in kept.state_dict() if "lora" in n] and record["metrics"]["nll"] < record["metrics"]["untuned_nll"]
