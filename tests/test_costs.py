"""Formulas against counters, files, models themselves and committed records; ``pytest -s`` prints the errors."""

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMOKE, changed, plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from kdlib import costs, data, inference, losses, models, results, specs, store, study, teachers, trainer
from kdlib.presets import PRESETS

LAB, PUBLISHED = PRESETS["lab"], {  # on the models' cards
    "meta-llama/Llama-3.2-1B": 1_235_814_400, "meta-llama/Llama-3.2-3B": 3_212_749_824, "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496, "Qwen/Qwen2.5-0.5B": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen/Qwen2.5-14B": 14_770_033_664}
GQA = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
AGAIN = {"activation_checkpointing": True}


def shape_of(folder, **config):
    """The shape of a Llama that a local folder describes."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return costs.shape({"data": {}, "hub": str(folder), "revision": "main"})


@pytest.fixture
def gqa(tokenizer, tmp_path):
    """A small model with grouped queries, heads of their own width and two embeddings, and its shape."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GQA, vocab_size=len(tokenizer), pad_token_id=0)), shape_of(tmp_path, **GQA, vocab_size=len(tokenizer))


@pytest.fixture
def named(rows):
    return [{"id": str(i), **r} for i, r in enumerate(rows.select_columns(["input_ids", "labels"]).to_list())]


def sizes(row):
    return 1, len(row["input_ids"]), sum(t != data.IGNORE for t in row["labels"][1:])


def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose operations can be counted
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", costs.TABLE["shapes"])
def test_weights_are_those_of_the_model_itself(name):
    given = costs.TABLE["shapes"][name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config({"llama": LlamaConfig, "qwen2": Qwen2Config}[given["model_type"]](**given))
    assert costs.shape({"start": {"data": {}, "hub": name}, "phases": []}).weights == sum(p.numel() for p in model.parameters())


def test_weights_are_those_that_are_published_and_those_of_the_ladder(tokenizer, gqa):
    assert {name: costs.shape({"hub": name}).weights for name in PUBLISHED} == PUBLISHED
    assert gqa[1].weights == gqa[0].num_parameters()
    for preset, name, base in ((LAB, "student", "student"), (LAB, "base", "teacher"), (SMOKE, "strong", "micro")):
        assert costs.shape(study.model_spec(preset, name, 0)).weights == models.build_model(base, tokenizer, 0).num_parameters()
    with pytest.raises(ValueError, match=r"^The shape of 'nobody/nothing' is unknown; allowed: meta-llama/Llama-3.2-1B, .*\.$"):
        costs.shape({"data": {}, "hub": "nobody/nothing"})


def test_operations_of_a_forward_pass_are_counted_exactly(gqa, named):
    model, s = gqa
    for row in named[:8]:
        batch, n = data.Collator(0)([row]), len(row["input_ids"]) - 1
        places, _ = inference.response_rows(batch)
        with torch.no_grad():
            assert counted(lambda: inference.at_head(model, batch, places, lambda h: h @ model.lm_head.weight.T)) == costs.flops(s, *sizes(row))
            assert counted(lambda: model(input_ids=batch["input_ids"])) == costs.flops(s, 1, n + 1, n), "with the logits of all"


@pytest.mark.parametrize("how, near", [({}, 0), (AGAIN, 0), ({"lora": {"r": 1, "target_modules": "all-linear"}}, 0.02)])
def test_operations_of_training_steps_are_counted(gqa, named, tokenizer, tmp_path, how, near):
    """Of ten steps, without what a trainer tries before it begins."""
    model, s = gqa
    if "lora" in how:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**how["lora"], task_type="CAUSAL_LM"))
    settings = {"batch_size": 1, "learning_rate": 1e-3, "seed": 0, "output_dir": tmp_path, "objective": losses.Objective(0.0),
                "activation_checkpointing": how == AGAIN}
    few, more = (counted(lambda: trainer.train(copy.deepcopy(model), tokenizer, named[:n], steps=n, **settings)) for n in (2, 12))
    told = sum(costs.flops(s, *sizes(r), how) for r in named[2:12])
    print(f"training {how}: {told / (more - few) - 1:+.4f}")
    assert told == pytest.approx(more - few, rel=near, abs=0)


def test_operations_of_a_step_of_the_lab_are_those_counted_but_for_padding(named, tokenizer, teacher, tmp_path):
    student, steps = models.build_model("student", tokenizer, 0), {"steps": 1, "batch_size": 32}
    cached = teachers.Cached(teachers.write_cache(tmp_path / "cache", teacher, tokenizer, named, **specs.CACHE))
    phase = {"rows": [{"set": "train"}], "teacher": study.model_spec(SMOKE, "base", 0), **steps}
    few, more = (counted(lambda: trainer.train(student, tokenizer, named[:16 * n], steps=n, batch_size=16, learning_rate=1e-3, seed=0,
                                               output_dir=tmp_path, teacher=cached)) for n in (1, 3))
    mean = [sum(x) / 32 for x in list(zip(*map(sizes, named[16:])))[1:]]
    off = costs._trained({"start": study.model_spec(LAB, "student", 0), "phases": [phase]}, lambda name: mean)[2] / (more - few) - 1
    print(f"a packed step of the lab: {off:+.4f}")
    assert -0.1 < off < -0.01


@pytest.mark.parametrize("name, tolerance", [("nvidia-h200-steps", 0.03), ("x86_64-cpu-steps", 0.09)])
def test_operations_are_those_of_the_benchmarks(name, tolerance, tmp_path):
    """Counted when steps were timed: on a GPU by code whose last feed-forward part saw all tokens, in the lab with padding."""
    bench = runpy.run_path(str(Path(__file__).with_name("bench") / "step.py"))
    found = json.loads((results.REPOSITORY / "results" / "bench" / f"{name}.json").read_text())["found"]
    for size in (measured := [n.split(", ")[0] for n in found if n.endswith(", sft")]):
        given = bench["SIZES"][size]
        shapes = {who: shape_of(tmp_path, hidden_size=given[who][1], num_hidden_layers=given[who][0], vocab_size=given["vocabulary"] + 6,
                                intermediate_size=given[who][1] * 8 // 3 // 16 * 16, num_attention_heads=max(4, given[who][1] // 64))
                  for who in ("student", "teacher")}
        said = [[len(m["content"].split()) for m in c] for c in bench["conversations"](given, 3)]
        n, t, r = len(said), sum(p + a + 4 for p, a in said), sum(a + 1 for _, a in said)  # roles and ends of turns
        told = {"sft": costs.flops(shapes["student"], n, t, r, {}) / 3}
        told["live"] = told["sft"] + costs.flops(shapes["teacher"], n, t, r) / 3
        for engine, value in told.items():
            print(f"{name}, {size}, {engine}: {value / found[f'{size}, {engine}']['flop_per_step'] - 1:+.4f}")
            assert value == pytest.approx(found[f"{size}, {engine}"]["flop_per_step"], rel=tolerance)
    assert measured


@pytest.mark.parametrize("how", [{"form": "full"}, {"form": "hidden", "dtype": "float32"}, {"form": "top_k", "k": 5}, {"form": "sampled", "k": 7},
                                 {"form": "top_k", "dtype": "float32"}])
def test_a_cache_takes_the_bytes_that_were_told(how, gqa, named, tokenizer, tmp_path):
    folder = teachers.write_cache(tmp_path / "cache", gqa[0], tokenizer, named, **how)
    assert teachers.Cached(folder).bytes_per_token == (told := costs.cache_bytes(gqa[1], **how))
    rest = (folder / "shard-00000" / "data-00000-of-00001.arrow").stat().st_size - told * sum(sizes(r)[2] for r in named)
    assert rest == pytest.approx(75 * len(named), rel=0.5), "of each row its key, its digest and where it begins"


@pytest.mark.parametrize("how", [{}, {"bf16": True}, AGAIN, {"bf16": True, **AGAIN}])
def test_memory_of_activations_is_what_layers_keep(how, gqa):
    model, s = gqa
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.train().parameters()}
    copies = {shape for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.T.shape)}  # of weights, by autocast
    if "activation_checkpointing" in how:
        model.activation_checkpointing_enable()

    def keep(x):
        if x.untyped_storage().data_ptr() not in own and x.shape not in copies:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x  # so that nothing else takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in how):
        model.model(torch.randint(250, (16, 64)), use_cache=False)
    told, found = costs.memory(s, 16 * 64, 16 * 64, how)["activations"], sum(n for n, _ in kept.values())
    if "activation_checkpointing" in how:  # the one layer at a time that a backward pass makes again
        told -= 16 * 64 * (26 * 48 + 4 * 256 if "bf16" in how else 24 * 48 + 8 * 256)
    print(f"activations {how}: {told / found - 1:+.4f}")
    assert told == pytest.approx(found, rel=0.02)


def test_memory_follows_its_parts():
    s, states = costs.shape({"hub": "meta-llama/Llama-3.2-1B"}), ("weights", "gradients", "AdamW")
    whole, half, low = (costs.memory(s, 4096, 1024, how, ranks) for how, ranks in (({}, 1), ({}, 2), ({"bf16": True}, 1)))
    assert sum(whole[k] for k in states) == 16 * s.weights == 2 * sum(half[k] for k in states)
    assert whole["activations"] == half["activations"] > low["activations"] > costs.memory(s, 4096, 1024, AGAIN)["activations"] > 0
    assert costs.memory(s, 4096, 1024, {"lora": {"r": 8}})["AdamW"] == 0 and costs.memory(s, 9**9, 9**9, {})["logits"] == 16 * 2**27


@pytest.mark.parametrize("name, every, most", [("lab", 8, [0.015, 0.03, 0.2, 0.1]), ("realtext", 1, [0.025, 0.03, 0.2, 0.12])])
def test_what_is_told_is_what_committed_runs_recorded(name, every, most):
    files = sorted((results.REPOSITORY / "results" / name / "runs").glob("*.json"))[::every]
    found = costs.check(records := [results.read_record(f) for f in files])
    print(f"\n{name}, {len(files)} records, {found.attrs}\n{found.round(3)}")
    assert (found.error < most).all() and (found.worst.iloc[:2] < [0.1, 0.25]).all()
    for r in sorted(records, key=lambda r: r["run_id"])[1::2]:
        r["provenance"] |= {k: 2 * r["provenance"][k] for k in ("tokens", "train_s")}
    found = costs.check(records)
    assert found.error["tokens"] > 0.45 and found.bias["train_s"] < -0.4


def test_a_finished_study_cost_what_is_told(tiny_root, tiny_records):
    there = plan(tiny_root)
    whole, left = costs.estimate(there), costs.estimate(there, missing=True)
    assert (left == 0).all(axis=None) and whole["count"]["evaluate"] == 8
    for key in costs.TABLE["seen"]:
        assert whole[key]["evaluate"] == pytest.approx(sum(r["provenance"][key] for r in tiny_records))
    spec, = (s for s in specs.all_of(json.dumps(there.configs[-1])).values() if "cache" in s)
    kept = sum(values.nbytes for shard in teachers.Cached(specs.path(there.root, spec)).shards for _, values in shard.values())
    print(f"the tiny study's cache: {whole.cache_bytes['cache'] / kept - 1:+.4f}")
    assert whole.cache_bytes["cache"] == pytest.approx(kept, rel=0.1)


def test_costs_grow_as_their_causes_do(tmp_path):
    root = store.open_folder(tmp_path / "r")

    def told(**settings):
        preset = changed(SMOKE, **settings)
        return costs.estimate(study.Plan(preset, tuple(study.grid(preset, "data_budget", 0)), root, True, True, 0))

    base, longer, seeds, typical = told(), told(steps=200), told(seeds=[0, 1, 2, 3]), told(typical={"tokens": 16, "response_tokens": 5})
    assert base.tokens["evaluate"] == 8 * 100 * 16 * 64 and base.attrs["rows"].startswith("max_length") and typical.attrs["rows"] == "typical"
    assert base.cache_bytes["cache"] == 1600 * 64 * 96 * 4 and base.tokens["pretrain"] == 2 * 500 * 24 * 48
    assert longer.flops["evaluate"] == 2 * base.flops["evaluate"] == seeds.flops["evaluate"] and longer.flops["cache"] == base.flops["cache"]
    assert all(x["count"][["cache", "phases", "pretrain"]].tolist() == [1, 1, 2] for x in (base, seeds)), "what is shared, once"
    assert typical.response_tokens["evaluate"] == 8 * 100 * 16 * 5 and (typical.flops <= base.flops).all()


@pytest.fixture
def paper(tmp_path):
    """A plan with models of the hub and caches of their own, whether stages knows them yet or not."""
    preset = changed(SMOKE, name="paper", typical={"tokens": 400, "response_tokens": 250}, max_length=2048, train_rows=100_000, domain={},
                     source={"kind": "text", "test_rows": 1000}, max_new_tokens=0)
    start, big = ({"data": {**study.data_spec(preset, 0), "version": 0}, "hub": name, "revision": "main"}
                  for name in ("meta-llama/Llama-3.2-1B", "allenai/Llama-3.1-Tulu-3-8B-SFT"))
    how = {"steps": 1000, "batch_size": 64, "cache": {"form": "top_k", "k": 64, "dtype": "float16"}, "training": {"bf16": True, **AGAIN}}
    runs = [({"experiment": "data_budget", "domain": None, "method": method, "teacher": teacher and "base", "pool": None, "budget": budget},
             {"start": start, "phases": [{"rows": [{"set": "train", "budget": budget, "seed": 0}], "teacher": teacher, **how}], "evaluate": {"on": "test", "tasks": {"gsm8k": {}, "mmlu": {"limit": 100}, "riddles": {}}}})
            for method, teacher in (("sft", None), ("kd", big)) for budget in (1000, 100_000)]
    return study.Plan(preset, tuple(runs), store.open_folder(tmp_path / "results"), False, True, 0)


def test_a_plan_of_hub_models_is_told_by_hand(paper):
    table, s, big = costs.estimate(paper), *(costs.shape({"hub": n}) for n in ("meta-llama/Llama-3.2-1B", "allenai/Llama-3.1-Tulu-3-8B"))
    assert table.cache_bytes["cache"] == 100_000 * 250 * (64 * (4 + 2) + 4) and table.disk_bytes["hub"] == 2 * (s.weights + big.weights)
    assert table.flops["evaluate"] == 4 * costs.flops(s, 64_000, 64_000 * 400, 64_000 * 250, AGAIN)
    assert table.flops["cache"] == pytest.approx(2 * (4e7 * 7e9 + 2.5e7 * 0.5e9), rel=0.03), "two a weight and token, of head and body"
    maths, many = (costs.TABLE["benchmarks"][n] for n in ("gsm8k", "mmlu"))
    assert table["count"]["asked"] == 2 * (4 + 2) and table["count"]["answered"] == 4 + 2, "students and, once, the models before"
    assert table.tokens["asked"] == 6 * (maths["documents"] * maths["read"] + 100 * many["read"])
    assert table.tokens["answered"] == 6 * maths["documents"] * maths["replied"] and table.attrs["not counted"] == ["riddles"]


@pytest.mark.parametrize("which, texts", [
    ("smoke", ["data_budget, smoke: 0 of 8 runs found", "0 of 2", "max_length, an upper bound", "base pre-training", "not counted: nothing", "teacher's tuning"]),
    ("lab", ["98 of 98 runs found", "7 of 7", "means of 64 records", "as in the records"]),
    ("paper", ["data_budget, paper: 0 of 4 runs found", "a row: typical", "hub models", "9.70G", "benchmarks' prompts", "not counted: riddles"])])
def test_a_report_is_printed(which, texts, paper, tmp_path, capsys):
    given = {"preset": which, "results_dir": str(tmp_path / "x") if which == "smoke" else ""}
    costs.report(paper if which == "paper" else study.plan("data_budget", given), ranks=2)
    shown = capsys.readouterr().out
    assert not [t for t in (*texts, "H100 SXM", "hours of one", "bytes on each of 2", "recomputed", "answers", "students' runs", "flops", "cache_bytes",
                           "disk_bytes", "weights", "AdamW", "all", "relative errors of these formulas for", "is assumed, not measured") if t not in shown], shown


def test_a_launch_configuration_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "odd.yaml").write_text("- 1")
    for name in ("nope.yaml", "odd.yaml"):
        monkeypatch.setenv("KDLIB_LAUNCH", str(tmp_path / name))
        for dry in (True, False):
            with pytest.raises(ValueError, match=rf"KDLIB_LAUNCH='.*{name}' is no Accelerate configuration that can be read"):
                study.run(study.plan("data_budget", {"preset": "smoke", "results_dir": str(tmp_path / "x"), "dry_run": dry}))


def test_data_take_disk_and_a_teacher_reads_held_out_rows_once(tmp_path):
    plan = study.plan("data_budget", {"preset": "smoke", "results_dir": str(tmp_path)})
    table, p = costs.estimate(plan), plan.preset
    rows = p.train_rows + 2 * p.source["test_rows"] + len(p.domain["names"]) * (p.source["annotated_rows"] + p.source["unlabelled_rows"] + 2 * p.source["domain_rows"])
    assert table.disk_bytes["source"] == 16 * p.max_length * rows
    more = costs.estimate(study.plan("data_budget", {"preset": "smoke", "results_dir": str(tmp_path), "seeds": [0, 1, 2, 3]}))
    runs = more["count"]["evaluate"] - table["count"]["evaluate"]
    assert runs == 8 and more["count"]["scores"] - table["count"]["scores"] == runs, "of the students alone"


def test_lengths_are_those_of_the_sets_that_runs_mix():
    def run(tokens, *parts):
        return {"config": {"phases": [{"steps": 5, "batch_size": 2, "rows": list(parts)}]}, "provenance": {"tokens": tokens, "response_tokens": tokens / 2}}

    human, said = {"set": "a/train"}, {"set": "a/pool", "said": {}}
    taught = {"set": "c/pool", "said": {"by": {"phases": [{"rows": [{"set": "c/train", "budget": 8}]}]}}}
    length = costs._lengths([run(100, human), run(300, human, said), run(200, {"set": "train"}), run(400, taught)])
    wanted = {"c/pool said after 8": 40, "c/pool said after 9": 40, "c/pool": 40,
              "a/train": 10, "a/pool said": 50, "a/pool": 50, "a/test": 10, "train": 20, "test": 20, "b/test": 25}
    assert all(length(name) == pytest.approx([n, n / 2]) for name, n in wanted.items())
    table = costs.estimate(study.plan("two_stage_domain", {"preset": "realtext"}))
    record = results.read_record(next((results.REPOSITORY / "results" / "realtext" / "runs").glob("*.json")))
    kept = {name: told["rows"] - told["rows_dropped"] for name, told in record["provenance"]["data_report"].items() if "rows" in told}
    rows = sum(kept[f"{d}/pool"] * said + kept[f"{d}/train"] * human for d, said, human in (("maths", 86, 105), ("medical", 76, 95)))
    assert table["count"]["cache"] == 36 and table["response_tokens"]["cache"] == pytest.approx(6 * 2 * rows, rel=0.03), "six teachers in each, alone and mixed"


def test_importing_costs_needs_no_torch():
    code = "import sys; from kdlib import costs; costs.shape({'hub': 'Qwen/Qwen2.5-7B'}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=results.REPOSITORY).returncode == 0
