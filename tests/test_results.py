import json
import runpy

import pandas as pd
import pytest

from kdlib import results


@pytest.fixture
def record():
    config = {"phases": [{"learning_rate": 0.001}]}
    return {"run_id": results.run_id(config), "experiment": "data_budget", "preset": "lab", "method": "kd", "teacher": "base",
            "student": "nano", "domain": None, "pool": None, "budget": 20, "seed": 1, "world_seed": 0,
            "metrics": {"accuracy": 0.25, "accuracy_unseen": 0.5, "accuracy_by_skill": {"add": 0.5, "sort": 0.0}},
            "items": {"id": ["a", "b", "c"], "suite": ["seen", "seen", "unseen"], "skill": ["add", "sort", "add"], "correct": [1, 0, 1], "nll": [1.0, 2.0, 3.0],
                      "bytes": [3, 5, 7]},
            "config": config, "provenance": {"artefacts": {}}}


def test_a_record_reads_back_as_written(tmp_path, record):
    results.write_record(tmp_path, record)
    path = results.record_path(tmp_path, "lab", record["run_id"])
    read = results.read_record(path)
    assert {k: v for k, v in read.items() if k != "checksum"} == record
    assert results.read_records(tmp_path, "lab", ["absent", record["run_id"]]) == [read]


def test_a_record_is_never_written_over(tmp_path, record):
    results.write_record(tmp_path, record)
    path = results.record_path(tmp_path, "lab", record["run_id"])
    before = path.read_bytes()
    results.write_record(tmp_path, {**record, "seed": 7})
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[:len(text) // 2], r"is not a file of whole JSON \(truncated\?\)"),
    (lambda text: "", "is not a file of whole JSON"),
    (lambda text: text.replace("0.25", "0.95"), "was changed after it was written"),
    (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "items"}), "lacks items"),
    (lambda text: text.replace("0.25", "NaN"), "was changed after it was written"), (lambda text: "[]", "lacks run_id")])
def test_a_damaged_record_is_named_and_left_alone(tmp_path, record, damage, message):
    results.write_record(tmp_path, record)
    path = results.record_path(tmp_path, "lab", record["run_id"])
    path.write_text(damage(path.read_text()))
    left = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path}.*{message}.*delete it and the run is computed again"):
        results.read_records(tmp_path, "lab", [record["run_id"]])
    assert path.read_bytes() == left


def test_a_folder_in_a_records_place_is_named(tmp_path, record):
    path = results.record_path(tmp_path, "lab", record["run_id"])
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"Run record {path} is not a file of whole JSON"):
        results.read_records(tmp_path, "lab", [record["run_id"]])


def test_a_record_under_another_runs_name_is_refused(tmp_path, record):
    results.write_record(tmp_path, record)
    path = results.record_path(tmp_path, "lab", record["run_id"])
    other = path.rename(path.with_name("0123456789abcdef.json"))
    with pytest.raises(ValueError, match="does not belong under that name"):
        results.read_record(other)


def test_frames(record):
    other = {**record, "method": "sft", "metrics": {**record["metrics"], "accuracy": 0.1}}
    frame = results.frame([other, record])
    assert frame.method.tolist() == ["kd", "sft"] and frame.accuracy.tolist() == [0.25, 0.1]
    assert "accuracy_by_skill" not in frame and frame.learning_rate.tolist() == [0.001] * 2


def test_environment_names_code_packages_and_machine():
    found = results.environment()
    assert found["packages"]["torch"].startswith("2.13.0") and found["cpus"] >= 1 and found["python"].startswith("3.")
    assert found["code_version"] is None or (len(found["code_version"]) == 40 and isinstance(found["code_dirty"], bool))


def claim(name, estimate=0.1, world=0, preset="lab"):
    return {"claim": name, "preset": preset, "world_seeds": [world], "contrast": "a contrast", "estimate": estimate, "ci_low": 0.05,
            "ci_high": 0.15, "level": 0.95, "n_seeds": 5, "delta": 0.01, "verdict": "supported", "weakest": None, "run_ids": ["r"]}


def test_claims_replace_only_their_own(tmp_path):
    folder = tmp_path / "lab"
    results.write_claims([claim("C1b"), claim("C1a")], folder)
    results.write_claims([claim("C1a", 0.2), claim("C1a", 0.3, world=1)], folder)
    found = json.loads((folder / "claims.json").read_text())
    assert [(c["claim"], c["world_seeds"], c["estimate"]) for c in found] == [("C1a", [0], 0.2), ("C1a", [1], 0.3), ("C1b", [0], 0.1)]


@pytest.mark.parametrize("content", ["[{", '{"claim": "C1a"}', '["C1a"]', '[{"claim": "C1a", "world_seeds": [0]}]'])
def test_damaged_claims_are_named_and_kept(tmp_path, content):
    (tmp_path / "claims.json").write_text(content)
    for call in (lambda: results.write_claims([claim("C1a")], tmp_path), lambda: results.read_claims(tmp_path)):
        with pytest.raises(ValueError, match=f"{tmp_path / 'claims.json'} is not a whole list of claims"):
            call()
    assert (tmp_path / "claims.json").read_text() == content


def test_readme_table_is_made_from_the_claims(tmp_path):
    generated_readme = runpy.run_path(str(results.REPOSITORY / ".ci" / "readme.py"))["generated"]
    weakest = claim("C3 clinic − mixture")
    results.write_claims([claim("C1a"), weakest, {**weakest, "claim": "C3 clinic", "weakest": weakest["claim"]}], tmp_path / "lab")
    results.write_claims([{**claim("C1a", 0.2), "world_seeds": [0, 1]}], tmp_path / "lab")
    results.write_claims([claim("C1a", 0.3, world=1)], tmp_path / "lab" / "world-1")
    results.write_claims([claim("C1a", preset="realtext")], tmp_path / "realtext")
    text = generated_readme("before\n<!-- claims:start -->\nstale\n<!-- claims:end -->\nafter\n", tmp_path)
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| claim | contrast | world 0 | world 1 | worlds 0, 1 |" in text and "**realtext**" in text
    one, other, both = (f"supported<br>+0.{n}000 [+0.0500, +0.1500]" for n in (1, 3, 2))
    assert f"| C1a | a contrast | {one} | {other} | {both} |" in text
    whole, = [line for line in text.splitlines() if line.startswith("| C3")]
    assert whole.startswith("| C3 clinic | accuracy in the clinic domain, ") and "| supported<br>− mixture: +0.1000 [+0.0500, +0.1500] |  |  |" in whole
    assert generated_readme(text, tmp_path) == text


def test_tables_repeat_to_the_byte(tmp_path):
    table = pd.DataFrame({"a": [1 / 3, 2.0], "b": ["x", "y"]})
    results.write_table(table, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == b"a,b\n0.333333,x\n2,y\n"
