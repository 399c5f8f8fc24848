"""Public tasks: the real harness on tasks of our own, against sums by hand and what the harness itself reports."""

import functools
import json
import socket
import sys

import datasets
import pytest
import torch
import yaml

from kdlib import models, stats
from kdlib.harness import check_tasks, harness
from kdlib.presets import METRICS

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
WORDS = ["red", "blue sky", "two", "seven", "a dog", "grass", "on the hill"]
ROWS = [{"q": f"what is {i} and {i % 5}", "c": [WORDS[(i + k) % 7] for k in (0, 2, 3)], "gold": i % 3} for i in range(21)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No connection is made, and the index of built-in tasks, which takes seconds, is left out."""
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("The network was used."))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path=None, include_defaults=False: TaskManager(include_path=include_path, include_defaults=False))


@pytest.fixture(scope="module")
@torch.no_grad()
def given():
    """A tokenizer and two models with sharpened weights, so that their answers differ, and end here and there."""
    bpe = models.build_tokenizer(None, [f"{r['q']} {' '.join(r['c'])}" for r in ROWS], 400)
    pair = [models.build_model("nano", bpe, seed).eval() for seed in (1, 2)]
    ends = torch.zeros(len(bpe)).index_fill_(0, torch.tensor(bpe.eos_token_id), 6.0)
    for model in pair:
        model.lm_head.register_forward_hook(lambda *args: args[-1] + ends)
        [weight.mul_(16) for weight in model.parameters() if weight.ndim > 1]
    return bpe, *pair


def asked(bpe, row) -> str:
    return bpe.apply_chat_template([{"role": "user", "content": row["q"] + " ?"}], tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def greedy(model, bpe, row, most=6) -> str:
    """Six tokens one after the other, without cache or padding."""
    ids = start = bpe.encode(asked(bpe, row))
    while len(ids) < len(start) + most and ids[-1] != bpe.eos_token_id:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return bpe.decode(ids[len(start):], skip_special_tokens=True)


@pytest.fixture(scope="module")
def own(given, tmp_path_factory):
    """The path of a task: two of multiple choice, a group of both, and one of generation that half asks for what a model says."""
    (bpe, model, _), root = given, tmp_path_factory.mktemp("tasks")

    def write(name, rows, metrics, **settings):
        data = {"data_files": {"test": str(root / f"{name}.jsonl")}, "cache_dir": str(root / "cache")}
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (root / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "fewshot_split": "test",
            "doc_to_text": "{{q}} ?", "metric_list": metrics, **settings}))

    said = [{**r, "a": greedy(model, bpe, r) if i % 2 else "seven"} for i, r in enumerate(ROWS)]
    for name, rows in (("choice", ROWS), ("few", ROWS[::4])):
        write(name, rows, ["acc", "acc_norm"], output_type="multiple_choice", doc_to_choice="c", doc_to_target="gold")
    write("said", said, ["exact_match"], output_type="generate_until", doc_to_target="a", num_fewshot=0,
          generation_kwargs={"max_gen_toks": 6, "do_sample": False, "until": []})
    group = {"group": "both", "task": ["choice", "few"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (root / "both.yaml").write_text(yaml.safe_dump(group))
    return lambda name: str(root / f"{name}.yaml")


@torch.no_grad()
def test_choices_are_those_of_the_likelihood_by_hand(given, own):
    bpe, model, _ = given
    (metrics, items), expected = harness(model, bpe, {own("choice"): {}}), []
    for row in ROWS:
        start, scores = len(bpe.encode(asked(bpe, row))), []
        for choice in row["c"]:
            ids = torch.tensor(bpe.encode(asked(bpe, row) + choice))
            log_q = model(ids[None]).logits[0].double().log_softmax(-1)
            scores.append(float(log_q[start - 1:-1].gather(1, ids[start:, None]).sum()))
        expected.append(float(max(range(3), key=scores.__getitem__) == row["gold"]))
    assert items["correct"] == expected and 0 < sum(expected) < 21
    assert metrics == {"accuracy": sum(expected) / 21, "accuracy_by_skill": {"choice": sum(expected) / 21}}
    assert items["id"] == [f"choice/choice/{i}" for i in range(21)] and items["nll"] == items["bytes"] == [None] * 21


def test_answers_are_greedy_and_free_of_the_models_habits(given, own, monkeypatch):
    bpe, model, _ = given
    expected = [float(i % 2 or greedy(model, bpe, row) == "seven") for i, row in enumerate(ROWS)]
    monkeypatch.setattr(habits := model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(model.config, "eos_token_id", 7)
    assert harness(model, bpe, {own("said"): {}}, batch_size=5)[1]["correct"] == expected and 0 < sum(expected) < 21
    assert model.generation_config is habits
    fewer = [float(greedy(model, bpe, row, 2) == (greedy(model, bpe, row) if i % 2 else "seven")) for i, row in enumerate(ROWS)]
    assert harness(model, bpe, {own("said"): {"max_gen_toks": 2}})[1]["correct"] == fewer != expected


def test_a_group_pools_its_documents_as_the_harness_does(given, own):
    bpe, model, _ = given
    metrics, items = harness(model, bpe, {own("both"): {"num_fewshot": 1}, own("few"): {"metric": "acc_norm,none"}}, seed=5)
    manager = TaskManager(include_path=own("both")[:-9], include_defaults=False)
    both, few = (lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": model, "tokenizer": bpe}, tasks=[name], num_fewshot=shots, fewshot_random_seed=5,
        apply_chat_template=True, bootstrap_iters=0, task_manager=manager) for name, shots in (("both", 1), ("few", 0)))
    skills = metrics["accuracy_by_skill"]
    assert skills == pytest.approx({"both": both["results"]["both"]["acc,none"], "few": few["results"]["few"]["acc_norm,none"]})
    assert metrics["accuracy"] == pytest.approx(sum(skills.values()) / 2) and skills["both"] != skills["few"]
    assert dict(zip(items["id"], items["correct"])) == {
        f"{skill}/{part}/{s['doc_id']}": s[metric] for skill, found, metric in (("both", both, "acc"), ("few", few, "acc_norm"))
        for part, samples in found["samples"].items() for s in samples}


def test_two_models_are_paired_by_document(given, own, capfd):
    bpe, *pair = given
    tasks = {own("said"): {"limit": 9}, own("both"): {"num_fewshot": 2}}
    (one, first), (two, second), again = (harness(model, bpe, tasks) for model in (*pair, pair[0]))
    assert again == (one, first) == tuple(json.loads(json.dumps(again))) and capfd.readouterr() == ("", "")
    assert first["id"] == second["id"] and len(set(first["id"])) == 9 + 27 and first["correct"] != second["correct"]
    i = stats.item_interval([{"method": m, "items": items} for m, items in (("kd", first), ("sft", second))], METRICS["accuracy"])
    assert i.estimate == pytest.approx(one["accuracy"] - two["accuracy"]) and i.n == 36 and i.low < i.high


def test_what_would_fail_after_training_fails_before_in_one_sentence(given, own, tmp_path, monkeypatch):
    bpe, model, _ = given

    def refuses(message, tasks, call=check_tasks):
        with pytest.raises(ValueError, match=message) as error:
            call(tasks)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    good, bad, text = own("choice"), {}, open(own("choice")).read()
    for name, new in {"torn": "task: [x", "lone": "process_results: !function absent.f", "twin": "task: odd",
                      "lost": text.replace("choice.j", "lost.j"), "odd": "process_results: !function own.f"}.items():
        bad[name] = str(tmp_path / f"{name}.yaml")
        open(bad[name], "w").write(f"{text}\ntask: {name}\n{new}\n")
    (tmp_path / "own.py").write_text("def f(doc, results):\n    return {'acc': 7.5}\n")
    cases = [
        ("tasks={} is not", {}), (r"'gsm9k'\] cannot .* a name that `lm_eval ls tasks` shows, or a sound .yaml", {"gsm9k": {}}),
        (r"torn.yaml'\] cannot .*ParserError.*sound .yaml", {bad["torn"]: {}}), ("lost.jsonl.*; connect, or", {bad["lost"]: {}}),
        (r"'absent'.*; pip install 'kdlib\[eval\]'", {bad["lone"]: {}}), (r"limit'\]=0 .*: a whole number", {good: {"limit": 0}}),
        (r"max_gen_toks'\]=0 .*: a whole number from 1", {good: {"max_gen_toks": 0}}),
        ("={'shots': 2} .*: num_fewshot, limit, max_gen_toks, metric", {good: {"shots": 2}}), ("Sample larger", {good: {"num_fewshot": 21}}),
        ("='f1' .*: acc,none, acc_norm,none", {good: {"metric": "f1"}}), ("twin.yaml' .* no other", {bad["twin"]: {}}),
        ("=3 .*: 0, as said says", {own("said"): {"num_fewshot": 3}}), ("='choice' .* no other", {good: {}, "choice": {}})]
    for message, tasks in cases:
        refuses(message, tasks)
    refuses(r"metric of odd=\[7.5, 7.5\] is not allowed; allowed: 0 to 1", {bad["odd"]: {}}, functools.partial(harness, model, bpe))
    monkeypatch.setattr(bpe, "chat_template", None)
    refuses("tokenizer.chat_template=None is not allowed; allowed: a template", {}, functools.partial(harness, model, bpe))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", TaskManager)
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("group : theirs\ntask: [gsm8k]\n")
    refuses(r"absent.yaml'\] cannot .*KeyError.*allowed: a name that `lm_eval ls tasks` shows, or a sound .yaml", {str(tmp_path / "absent.yaml"): {}, str(theirs): {}})
    for name in ("gsm8k", str(theirs)):
        refuses(rf"tasks\['{name}'\] cannot .*'openai/gsm8k'.*; connect, or give a .yaml with data_files", {name: {}, str(theirs): {}})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuses(r"'gsm8k'.*lm_eval.*; pip install 'kdlib\[eval\]'", {"gsm8k": {}})
