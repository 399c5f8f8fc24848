"""Your own models and data in one call."""

import hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdlib
from kdlib import stats


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    hub.build_models(root / "models", "llama")
    hub.build_data(root / "data")
    return root


def call(shelf, output_dir, student="meta-llama/Llama-3.2-1B", **more):
    models = shelf / "models"
    settings = {"template": "tulu", "max_length": 128, "batch_size": 16, "learning_rate": {"sft": 1e-3, "kd": 2e-3}, "seeds": [0, 1], "test_rows": 20}
    return kdlib.distill(str(models / student), str(models / "allenai/Llama-3.1-Tulu-3-8B-SFT"), str(shelf / "data" / "tulu-3-sft-mixture"),
                         output_dir, **{**settings, **more})


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
    ({"learning_rate": {"sft": 1e-3}}, r"learning_rate=\{'sft': 0.001\} lacks kd; allowed: a number, or one for sft and one for kd"),
    ({"seeds": 3}, "seeds=3 has type int"), ({"seeds": ["a", "b"]}, r"seeds=\['a', 'b'\] is not allowed"), ({"seeds": [-1, 0]}, r"seeds=\[-1, 0\] is not"),
    ({"batch_size": 4.5}, "batch_size=4.5 has type float; allowed: a whole number from 1"), ({"batch_size": 0}, "batch_size=0 is not allowed"),
    ({"max_length": 8}, "max_length=8 is not allowed; allowed: a whole number from 16"), ({"validation_rows": 0}, "validation_rows=0 is not allowed"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 is not allowed; allowed: a number above 0"), ({"learning_rate": "x"}, "learning_rate='x' has type str"),
    ({"training": {"nonsense": 1}}, r"training=\{'nonsense': 1\} is not allowed; allowed: settings of"),
    ({"cache": {"form": "nope"}}, "form='nope' is not allowed; allowed: full, hidden, top_k, sampled"), ({"cache": {"fort": "full"}}, "cache has no fort; allowed: form"),
    ({"cache": {"k": 10**6}}, r"k=1000000 is not allowed; allowed: 1 to \d+"),
    ({"cache": {"form": "sampled"}, "kind": "reverse_kl"}, "kind='reverse_kl' with a sampled cache would be biased"),
    ({"alpha": 2.0}, "alpha=2.0 is not allowed"), ({"template": "vicuna"}, "template='vicuna' is not allowed; allowed: tulu, chatml"),
    ({"template": None}, "The tokenizer of '.*Llama-3.2-1B' has no chat template; allowed: a template of kdlib's"),
    ({"template": None, "student": "allenai/Llama-3.1-Tulu-3-8B"}, "The chat template of '.*Tulu-3-8B' marks no assistant tokens; allowed: a template of kdlib's")])
def test_what_does_not_fit_is_said_before_any_training(shelf, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        call(shelf, tmp_path / "out", **change)
    assert not list(tmp_path.rglob("runs/*.json"))


def test_a_temperature_is_the_caches_too_and_a_copy_of_the_hubs_data_is_taken(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(shelf / "data"))
    models = shelf / "models"
    found = kdlib.distill(str(models / "meta-llama/Llama-3.2-1B"), str(models / "allenai/Llama-3.1-Tulu-3-8B-SFT"), "tulu-3-sft-mixture", tmp_path, template="tulu",
                          max_length=64, epochs=0.02, seeds=[0, 1], test_rows=5, validation_rows=5, temperature=2.0, learning_rate=1.2345e-5)
    assert {r["config"]["phases"][0].get("cache", {}).get("temperature") for r in found.records} == {None, 2.0}
    card = (found.model / "README.md").read_text(encoding="utf-8")
    assert "datasets: [tulu-3-sft-mixture]" in card and '"learning_rate": {"sft": 1.23e-05, "kd": 1.23e-05}' in card
    assert {r["config"]["phases"][0]["learning_rate"] for r in found.records} == {1.23e-5}


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
