import pytest
from tiny import TINY

from kdlib import results, study, sweep
from kdlib.presets import PRESETS


def record(method, rate, budget, score, metric):
    return {"run_id": "r", "experiment": "lr_sweep", "preset": "x", "method": method, "teacher": None, "student": "s",
            "budget": budget, "seed": 100, "world_seed": 900, "metrics": {metric: score}, "config": {"learning_rate": rate}}


def test_the_sweep_crosses_rates_methods_budgets_and_seeds(tmp_path):
    planned = sweep.plan(TINY, tmp_path / "r")
    combos = {(c["learning_rate"], bool(c["alpha"]), c["budget"], c["seed"]) for c in planned.configs}
    assert combos == {(rate, kd, 20, 100) for rate in (1e-3, 2e-3) for kd in (True, False)}
    assert {c["split"] for c in planned.configs} == {"validation"} and {c["data"]["world_seed"] for c in planned.configs} == {900}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_no_sweep_run_is_a_reported_run(preset, tmp_path):
    reported = study.plan("data_budget", {"preset": preset.name, "results_dir": str(tmp_path / "r")})
    planned = sweep.plan(preset, tmp_path / "r")
    assert not set(planned.ids) & set(reported.ids)
    assert {c["split"] for c in reported.configs} == {"test"}
    assert not set(planned.seeds) & set(reported.seeds)


def test_at_each_budget_the_best_mean_score_is_chosen_and_of_equals_the_smaller_rate():
    scores = {("kd", 1e-3): (0.2, 0.6), ("kd", 2e-3): (0.5, 0.5), ("sft", 1e-3): (0.4, 0.4), ("sft", 2e-3): (0.3, 0.5)}
    acc = [record(m, r, b, s, "accuracy") for (m, r), pair in scores.items() for b, s in zip((20, 200), pair)]
    assert sweep.chosen(acc, PRESETS["lab"]) == {"kd": {20: 2e-3, 200: 1e-3}, "sft": {20: 1e-3, 200: 2e-3}}
    tied = [record("kd", r, 20, s, "accuracy") for r, s in ((2e-3, 0.5), (1e-3, 0.4), (1e-3, 0.6), (2e-3, 0.5))]
    assert sweep.chosen(tied, PRESETS["lab"]) == {"kd": {20: 1e-3}}
    bits = [record(m, r, b, s, "bits_per_byte") for (m, r), pair in scores.items() for b, s in zip((20, 200), pair)]
    assert sweep.chosen(bits, PRESETS["realtext"]) == {"kd": {20: 1e-3, 200: 2e-3}, "sft": {20: 2e-3, 200: 1e-3}}
    assert sweep.table(acc, PRESETS["lab"]).n_runs.tolist() == [1] * 8 and sweep.table(tied, PRESETS["lab"]).n_runs.tolist() == [2] * 2


def test_main_runs_what_is_missing_and_writes_the_table(tiny_preset, tmp_path, capsys):
    root = tmp_path / "r"
    sweep.main("tiny", str(root), 2)
    table = (root / "tiny" / "tables" / "lr_sweep.csv").read_text()
    assert table.startswith("method,budget,learning_rate,score,n_runs,chosen\n") and table.count("\n") == 5 and table.count("True") == 2
    assert "chosen: {" in capsys.readouterr().out


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(ValueError, match="preset='huge' is not allowed"):
        sweep.main("huge", str(tmp_path / "r"))


@pytest.mark.parametrize("name", ["lab", "realtext"])
def test_the_presets_rates_are_what_the_committed_sweep_chose(name):
    preset, root = PRESETS[name], results.REPOSITORY / "results"
    planned = sweep.plan(preset, root)
    records = results.read_records(root, name, planned.ids)
    assert len(records) == len(planned.ids), "the committed sweep is complete"
    assert preset.learning_rate == sweep.chosen(records, preset)
    rates = sorted(preset.sweep["learning_rates"])
    for method, choice in preset.learning_rate.items():
        assert list(choice) == preset.sweep["budgets"]
        assert rates[0] < min(choice.values()) <= max(choice.values()) < rates[-1], f"{method}'s rates lie inside the grid"
