"""Your own models and data in one call."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdlib
from kdlib import results, stats


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    hub.build_models(root / "models", "llama")
    hub.build_data(root / "data")
    return root


def call(shelf, output_dir, **more):
    models, student = shelf / "models", "meta-llama/Llama-3.2-1B"
    settings = {"template": "tulu", "max_length": 128, "batch_size": 16, "learning_rate": {"sft": 1e-3, "kd": 2e-3}, "seeds": [0, 1], "test_rows": 20}
    given = {"output_dir": output_dir, "dataset": shelf / "data" / "tulu-3-sft-mixture", "teacher": models / "allenai/Llama-3.1-Tulu-3-8B-SFT", **settings, **more}
    return kdlib.distill(**{"student": models / student, **given})


@pytest.fixture(scope="module")
def done(shelf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "distilled"
    return call(shelf, folder), folder


def test_both_methods_are_compared_on_paired_seeds(done):
    found, _ = done
    assert sorted(zip(found.frame.method, found.frame.seed)) == [("kd", 0), ("kd", 1), ("sft", 0), ("sft", 1)]
    rates = {r["method"]: r["config"]["phases"][0]["learning_rate"] for r in found.records}
    assert rates == {"sft": 1e-3, "kd": 2e-3} and {r["config"]["phases"][0]["steps"] for r in found.records} == {-(-found.frame.budget[0] // 16)}
    wide = found.frame.pivot(index="seed", columns="method", values="bits_per_byte")
    assert found.gap == stats.paired_interval(wide.sft - wide.kd)
    assert (found.frame[found.frame.method == "sft"].bits_per_byte < found.frame.untuned_bits_per_byte.iloc[0]).all()


def test_plain_transformers_loads_the_model_and_its_card_says_what_was_measured(done):
    found, folder = done
    assert found.model.parent == folder / "models"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(found.model), AutoTokenizer.from_pretrained(found.model)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a cat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    card = (found.model / "README.md").read_text(encoding="utf-8")
    means = found.frame.groupby("method").bits_per_byte.mean()
    for said in (f"KD {means.kd:.4f}", f"SFT on the same rows {means.sft:.4f}", f"{found.gap.estimate:+.4f}", "base_model: ", "library_name: transformers"):
        assert said in card


def test_a_second_call_trains_nothing_and_finds_the_same(done, shelf):
    found, folder = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json") if "runs" in p.parts or "manifest" in p.name}
    again = call(shelf, folder)
    assert again.frame.equals(found.frame) and before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("change, message", [
    ({"seeds": [0]}, r"seeds=\[0\] is not allowed; allowed: at least two different whole numbers"),
    ({"epochs": 0}, "epochs=0 is not allowed; allowed: a number above 0"),
    ({"learning_rate": {"sft": 1e-3}}, r"learning_rate=\{'sft': 0.001\} is not allowed; allowed: a number, or one for sft and one for kd"),
    ({"seeds": 3}, "seeds=3 has type int"), ({"seeds": ["a", "b"]}, r"seeds=\['a', 'b'\] is not allowed"), ({"seeds": [-1, 0]}, r"seeds=\[-1, 0\] is not"),
    ({"batch_size": 4.5}, "batch_size=4.5 has type float; allowed: a whole number from 1"), ({"batch_size": 0}, "batch_size=0 is not allowed"),
    ({"max_length": 8}, "max_length=8 is not allowed; allowed: a whole number from 16"), ({"validation_rows": 0}, "validation_rows=0 is not allowed"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 is not allowed; allowed: a number above 0"), ({"learning_rate": "x"}, "learning_rate='x' has type str"),
    ({"training": {"nonsense": 1}}, "training has nonsense, which nobody knows; allowed: warmup, micro_batch, lora"), ({"training": 3}, "training=3 has type int"), ({"training": {"save_steps": 0.5}}, "save_steps=0.5 has type float; allowed: a whole number from 1"),
    ({"training": {"max_steps": 5, "nonsense": 1}}, "training has max_steps, which the call itself sets"), ({"training": {"batch_size": 4, "model": 1, "ranks": 2}}, "training has batch_size, model, ranks, which nobody"),
    ({"training": {"optim": "nope"}}, "optim='nope' is not allowed; allowed: adamw_torch"), ({"training": {"lr_scheduler_type": "nope"}}, "lr_scheduler_type='nope' is not .*cosine"),
    ({"training": {"lora": {"r": 4, "target_modules": ["nope"]}}}, r"lora=.*'nope'.* is not allowed .*peft.LoraConfig that fit the model"), ({"training": {1: 2}}, r"training=\{1: 2\} is not"),
    ({"training": {"lora": {"target_modules": {"q_proj"}}}}, "training=.* is not allowed; allowed: settings of kdlib"), ({"student": "./none"}, "student='./none' is not allowed"),
    ({"dataset": {"local": "none.jsonl"}}, r"source\['local'\]='none.jsonl' is not allowed; allowed: a path that is there"), ({"dataset": {"hub": 3}}, r"source\['hub'\]=3 has type int"),
    ({"dataset": {"hub": "a/b", "category_in_id": ".*"}}, r"source\['category_in_id'\]='\.\*' is not allowed; allowed: a pattern with a group"), ({"output_dir": 3}, "output_dir=3 has type int"), ({"training": {"micro_batch": 3}}, "batch_size=16 does not split over 1 processes into 6"),
    ({"training": {"warmup": "a"}}, "warmup='a' has type str"), ({"training": {"lora": {"rr": 3}}}, r"lora=\{'rr': 3\} is not allowed .*peft.LoraConfig"),
    ({"learning_rate": {"sft": 1.0, "kd": 1.0, "dk": 1.0}}, "'dk': 1.0} is not allowed; allowed: a number, or one for sft"), ({"learning_rate": float("inf")}, "learning_rate=inf is not"),
    ({"epochs": float("inf")}, "epochs=inf is not allowed"), ({"seeds": [0, 2**33]}, r"seeds=\[0, 8589934592\] is not allowed"),
    ({"split": "valid"}, "split='valid' is not allowed; allowed: train, of a file or folder of rows"), ({"dataset": ""}, "dataset='' is not allowed; allowed: a hub id"),
    ({"dataset": [{"messages": []}]}, r"dataset=\[.*\] has type list; allowed: a hub id"), ({"dataset": "none.jsonl"}, "dataset='none.jsonl' is not there; allowed: a file or folder that is"),
    ({"dataset": {}}, r"source=\{\} is not allowed; allowed: a source with local or hub"), ({"dataset": {"hub": "a/b", "wher": {}}}, "is not allowed; allowed: a source with .* of the fields local, hub"),
    ({"dataset": {"hub": "a/b", "drop": "("}}, r"source\['drop'\]='\(' is not allowed .*a pattern"), ({"dataset": {"hub": "a/b", "prompt": "{{ a"}}, r"source\['prompt'\]='\{\{ a' is not .*a Jinja"),
    ({"student": "no/such/model"}, "student='.*no/such/model' is not allowed; allowed: a folder that is there, or a hub id"),
    ({"cache": {"form": "nope"}}, "form='nope' is not allowed; allowed: full, hidden, top_k, sampled"), ({"cache": {"fort": "full"}}, "cache has no fort; allowed: form"),
    ({"cache": {"k": 10**6}}, r"k=1000000 is not allowed; allowed: 1 to \d+"),
    ({"cache": {"form": "sampled"}, "kind": "reverse_kl"}, "kind='reverse_kl' with a sampled cache would be biased"),
    ({"alpha": 2.0}, "alpha=2.0 is not allowed"), ({"template": "vicuna"}, "template='vicuna' is not allowed; allowed: tulu, chatml"),
    ({"template": None}, "The tokenizer of '.*Llama-3.2-1B' has no chat template; allowed: a template of kdlib's"),
    ({"template": None, "student": "TULU"}, "The chat template of '.*Tulu-3-8B' marks no assistant tokens; allowed: a template of kdlib's")])
def test_what_does_not_fit_is_said_before_any_training(shelf, tmp_path, monkeypatch, change, message):
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    change = {**change, **({"student": shelf / "models" / "allenai/Llama-3.1-Tulu-3-8B"} if change.get("student") == "TULU" else {})}
    with pytest.raises(ValueError, match=message):
        call(shelf, **{"output_dir": tmp_path / "out", **change})
    assert not list(tmp_path.rglob("runs/*.json"))


def test_processes_that_cannot_share_a_batch_are_refused_first(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_LAUNCH", str(results.REPOSITORY / "kdlib" / "accelerate" / "processors.yaml"))
    with pytest.raises(ValueError, match="batch_size=9 does not split over 2 processes into 1 equal parts"):
        call(shelf, tmp_path / "out", batch_size=9)
    monkeypatch.setenv("KDLIB_LAUNCH", "/nope.yaml")
    with pytest.raises(ValueError, match="KDLIB_LAUNCH='/nope.yaml' is no Accelerate configuration that can be read"):
        call(shelf, tmp_path / "out")
    monkeypatch.delenv("KDLIB_LAUNCH")
    monkeypatch.setenv("KDLIB_DATA", str(shelf / "data"))
    for change, message in (({"split": "test"}, "split='test' is not allowed; allowed: train, of a file"),
                            ({"output_dir": shelf / "data" / "tulu-3-sft-mixture" / "out"}, "output_dir='.*' lies in the dataset's folder")):
        with pytest.raises(ValueError, match=message):
            call(shelf, **{"output_dir": tmp_path / "out", "dataset": "tulu-3-sft-mixture", **change})


def test_rows_that_no_model_reads_and_models_that_are_none_are_refused(shelf, tmp_path):
    words, student = " ".join(hub.WORDS), shelf / "models" / "meta-llama/Llama-3.2-1B"
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": words}]} for i in range(60)]
    long = hub.write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(ValueError, match="max_length=16 leaves no row of train and validation and test, for all are longer; allowed: more"):
        call(shelf, tmp_path / "a", dataset=long, max_length=16)
    with pytest.raises(ValueError, match="output_dir='.*' lies in the dataset's folder"):
        call(shelf, shelf / "data" / "tulu-3-sft-mixture" / "out")
    assert not (shelf / "data" / "tulu-3-sft-mixture" / "out").exists()

    def spoilt(name, **config):
        shutil.copytree(student, tmp_path / name)
        (file := tmp_path / name / "config.json").write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp_path / name

    lacking = spoilt("lacking")
    tensors = load_file(lacking / "model.safetensors")
    tensors.pop(gone := next(name for name in tensors if "layers.1" in name))
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    (adapters := tmp_path / "adapters").mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    for file in student.glob("token*"):
        shutil.copy(file, adapters)
    for model, message in ((spoilt("short", max_position_embeddings=20), "student='.*short' reads 20 tokens, and some rows have [0-9]+; allowed: max_length up to 20"),
                           (spoilt("unmarked", model_type="bert", architectures=None), "unmarked' is a bert; allowed: models that predict the next"),
                           (spoilt("masked", architectures=["LlamaForSequenceClassification"]), "masked' is a LlamaForSequenceClassification; allowed: models that predict the next"),
                           (lacking, f"lacking' lacks 1 of its weights, {gone} among them"), (adapters, "adapters' holds adapters to a model; allowed: a whole model")):
        with pytest.raises(ValueError, match=message):
            call(shelf, tmp_path / "b", student=model)
    assert not list(tmp_path.rglob("targets-*")), "before the teacher was asked"


def test_a_script_without_a_main_guard_goes_on_and_a_half_written_model_is_written_anew(done, shelf, tmp_path):
    found, folder = done
    shutil.copytree(folder, tmp_path / "out")
    (model := tmp_path / "out" / "models" / found.model.name).joinpath("model.safetensors").unlink()
    for record in list((tmp_path / "out" / "own" / "runs").glob("*.json"))[:1]:
        record.unlink()
    (tmp_path / "plain.py").write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_own import call
print(call(Path({str(shelf)!r}), {str(tmp_path / "out")!r}).gap.n)
""")
    done = subprocess.run([sys.executable, str(tmp_path / "plain.py")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2", done.stdout + done.stderr
    mine, theirs = (AutoModelForCausalLM.from_pretrained(m).state_dict() for m in (model, found.model))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs) and len(list((tmp_path / "out" / "own" / "runs").glob("*.json"))) == 4


def test_a_part_of_a_saved_dataset_is_the_one_asked_for(shelf, tmp_path):
    rows = {name: Dataset.from_list([{"id": f"{name}-{i}", "prompt": f"{name} {i}", "completion": hub.WORDS[i % 5]} for i in range(60)]) for name in ("train", "more")}
    DatasetDict(rows).save_to_disk(tmp_path / "saved")
    found = call(shelf, tmp_path / "out", dataset=tmp_path / "saved", split="more", epochs=0.1, validation_rows=3, test_rows=3)
    assert {i.split("-")[0] for i in found.records[0]["items"]["id"]} == {"more"}


def test_a_temperature_is_the_caches_too_and_a_copy_of_the_hubs_data_is_taken(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(shelf / "data"))
    models = shelf / "models"
    found = kdlib.distill(str(models / "meta-llama/Llama-3.2-1B"), str(models / "allenai/Llama-3.1-Tulu-3-8B-SFT"), "tulu-3-sft-mixture", tmp_path, template="tulu",
                          max_length=64, epochs=0.02, seeds=[0, 1], test_rows=5, validation_rows=5, temperature=2.0, learning_rate=1.2345e-5)
    assert {r["config"]["phases"][0].get("cache", {}).get("temperature") for r in found.records} == {None, 2.0}
    card = (found.model / "README.md").read_text(encoding="utf-8")
    assert "datasets:\n- tulu-3-sft-mixture\n" in card and '"learning_rate": {"sft": 1.2345e-05, "kd": 1.2345e-05}' in card
    assert {r["config"]["phases"][0]["learning_rate"] for r in found.records} == {1.2345e-5}


def test_a_long_prompt_is_shortened_to_half_and_a_row_that_is_still_too_long_is_counted(shelf, tmp_path, capsys):
    words = " ".join(hub.WORDS)
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"{i} {words * (4 if i % 2 else 1)}"}, {"role": "assistant", "content": words if i else words * 9}]} for i in range(60)]
    data = hub.write_rows(tmp_path / "long.jsonl", rows)
    models = shelf / "models"
    found = kdlib.distill(str(models / "meta-llama/Llama-3.2-1B"), str(models / "allenai/Llama-3.1-Tulu-3-8B-SFT"), str(data), tmp_path / "long", template="tulu",
                          max_length=160, epochs=0.1, seeds=[0, 1], test_rows=3, validation_rows=3)
    report = found.records[0]["provenance"]["data_report"]["train"]
    assert report["rows_dropped"] <= 1 and report["prompts_shortened"] > 10 and report["tokens_most"] <= 160
    assert f"{report['prompts_shortened']} with a shortened prompt; {report['rows_dropped']} longer than 160 tokens left out" in capsys.readouterr().out


def test_models_of_other_tokens_are_refused(shelf, tmp_path):
    hub.build_models(shelf / "models", "qwen")
    with pytest.raises(ValueError, match="need the same token ids"):
        kdlib.distill(str(shelf / "models" / "meta-llama/Llama-3.2-1B"), str(shelf / "models" / "Qwen/Qwen2.5-7B-Instruct"), "any/set", tmp_path / "x")
