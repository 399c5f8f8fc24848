import copy
import math

import pytest
import torch
from datasets import Dataset

from kdlib import data, evaluate, lab
from kdlib.inference import generate


@pytest.fixture(scope="module")
def held(tokenizer):
    world = lab.World(3)
    return data.render(world.mixture("test", "seen", 30), tokenizer, 64)[0]


def each_token(model, row):
    """Log-probabilities (float64) at the positions before each response token, and those tokens; one row, no padding."""
    with torch.no_grad():
        log_q = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    spots = [j for j in range(1, len(row["labels"])) if row["labels"][j] != -100]
    return log_q[[j - 1 for j in spots]], [row["labels"][j] for j in spots]


def test_token_scores_equal_row_by_row_sums(student, held, tokenizer):
    rows = held.select_columns(["input_ids", "labels"]).to_list()
    scores = evaluate.token_scores(student, rows, tokenizer, entropy=True)
    at = 0
    for i, row in enumerate(rows):
        log_q, targets = each_token(student, row)
        part = slice(at, at + len(targets))
        at += len(targets)
        assert (scores["row"][part] == i).all()
        picked = torch.arange(len(targets)), torch.tensor(targets)
        expected = {"nll": -log_q[picked], "confidence": log_q.exp().amax(-1), "guess": log_q.argmax(-1),
                    "correct": log_q.argmax(-1) == picked[1], "entropy": -(log_q.exp() * log_q).sum(-1)}
        for name, values in expected.items():
            torch.testing.assert_close(scores[name][part].double(), values.double(), rtol=1e-4, atol=1e-5)
    assert at == len(scores["row"])


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55, 1.0])
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    # Ten bins: 0.5-0.6 holds two (accuracy 1, confidence .55); 0.9-1.0 holds three (2/3 against 2.9/3).
    assert evaluate.calibration_error(confidence, correct, bins=10) == pytest.approx((2 * 0.45 + abs(2 - 2.9)) / 5, abs=1e-6)
    sure = torch.ones(4)
    assert evaluate.calibration_error(sure, sure) == 0 and evaluate.calibration_error(sure, 1 - sure) == 1


def test_a_model_that_has_diverged_is_named(student, tokenizer, held):
    with torch.no_grad():
        for weight in student.parameters():
            weight.fill_(math.nan)
    with pytest.raises(ValueError, match="no finite probabilities: it has diverged; allowed: a smaller learning_rate"):
        evaluate.evaluate(student, tokenizer, held)


def test_bits_per_byte_by_hand():
    assert evaluate.bits_per_byte([8 * math.log(2), 4 * math.log(2)], ["abc", "é🙂"]) == pytest.approx(12 / 9)


def test_batched_generation_equals_one_at_a_time(teacher, tokenizer, held):
    conversations = [m[:-1] for m in held["messages"]]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in conversations]
    assert len({len(p) for p in prompts}) > 3
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt):], skip_special_tokens=True))
    assert evaluate.replies(teacher, tokenizer, conversations, 5)[0] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_is_the_models_distribution_and_not_its_habits(teacher, tokenizer, held, temperature):
    prompts = [ids[:4] for ids in held["input_ids"][:12]]
    how = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 1, "temperature": temperature}
    torch.manual_seed(5)
    plain = generate(teacher, prompts, **how)
    teacher.generation_config.update(top_p=0.01, repetition_penalty=5.0, temperature=0.2, do_sample=True)
    habits = teacher.generation_config
    torch.manual_seed(5)
    assert generate(teacher, prompts, **how) == plain and teacher.generation_config is habits
    with pytest.raises(Exception):
        generate(teacher, [[10**6]], **how)
    assert teacher.generation_config is habits, "after an error too"


def test_accuracy_asks_the_verifier_about_each_row(student, tokenizer, held, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **how: [tokenizer(f"it is {a} .")["input_ids"] for a in held["answer"]])
    assert evaluate.accuracy(student, tokenizer, held, lab.World(3).verify, 4) == [1] * len(held)
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **how: asked.extend(prompts) or prompts)
    assert sum(evaluate.accuracy(student, tokenizer, held, lab.World(3).verify, 4)) == 0
    assert asked == [tokenizer.apply_chat_template(m[:-1], add_generation_prompt=True, return_dict=True)["input_ids"] for m in held["messages"]]


def test_columns_of_a_head_behind_the_tokens_count_for_nothing(student, held, tokenizer):
    wide, rows = copy.deepcopy(student), held.select_columns(["input_ids", "labels"]).to_list()
    wide.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        wide.get_output_embeddings().weight[len(tokenizer):] = 40 * student.get_output_embeddings().weight[5]
    narrow, found = (evaluate.token_scores(model, rows, tokenizer, entropy=True) for model in (student, wide))
    assert all(torch.equal(narrow[k], found[k]) for k in narrow)
    asked = [evaluate.prompt(row) for row in rows[:8]]
    assert evaluate.replies(wide, tokenizer, asked, 4) == evaluate.replies(student, tokenizer, asked, 4)


def test_evaluate_reports_both_suites_and_keeps_items(teacher, student, tokenizer):
    world = lab.World(3)
    rows = [*world.mixture("test", "seen", 20), *world.mixture("test", "unseen", 10)]
    held, _ = data.render(Dataset.from_list(rows), tokenizer, 64)
    clean, _ = data.render(Dataset.from_list([{"messages": [r["messages"][0], {"role": "assistant", "content": r["clean"]}]}
                                              for r in rows]), tokenizer, 64)
    known = evaluate.token_scores(teacher, held.select_columns(["input_ids", "labels"]).to_list(), tokenizer, entropy=True)
    metrics, items = evaluate.evaluate(student, tokenizer, held, verify=lambda row, reply: row["skill"] in ("add", "sort"),
                                       max_new_tokens=2, clean=clean.to_list(), teacher=known)
    assert metrics["accuracy"] == pytest.approx(0.2) and metrics["accuracy_unseen"] == pytest.approx(0.2)
    assert metrics["accuracy_by_skill"]["add"] == 1 and metrics["accuracy_by_skill"]["name"] == 0
    assert items["correct"] == [int(r["skill"] in ("add", "sort")) for r in rows]
    assert items["id"] == [r["id"] for r in rows] and items["suite"] == ["seen"] * 20 + ["unseen"] * 10
    sums = [-each_token(student, row)[0].gather(1, torch.tensor(each_token(student, row)[1])[:, None]).sum().item() for row in held]
    assert items["nll"] == pytest.approx(sums, abs=1e-3)
    tokens = sum(t != -100 for labels in held["labels"] for t in labels)
    assert metrics["nll"] == pytest.approx(sum(sums) / tokens, rel=1e-4)
    answers = [r["messages"][1]["content"] for r in rows]
    assert items["bytes"] == [len(a) for a in answers]
    assert metrics["bits_per_byte"] == pytest.approx(sum(sums) / math.log(2) / sum(map(len, answers)), rel=1e-4)
    assert 0 <= metrics["ece"] <= 1 and metrics["nll_clean"] != metrics["nll"]
    said, theirs = ([each_token(model, row) for row in held] for model in (student, teacher))
    agree = [q.argmax(-1) == p.argmax(-1) for (q, _), (p, _) in zip(said, theirs)]
    assert metrics["top1_agreement"] == pytest.approx(float(torch.cat(agree).double().mean()), abs=1e-3)
    assert metrics["teacher_entropy"] == pytest.approx(float(torch.cat([-(p.exp() * p).sum(-1) for p, _ in theirs]).mean()), rel=1e-4)
    assert metrics["teacher_nll"] == pytest.approx(float(torch.cat([-p[range(len(t)), t] for p, t in theirs]).mean()), rel=1e-4)


def test_without_a_verifier_accuracy_is_null(student, tokenizer, held):
    metrics, items = evaluate.evaluate(student, tokenizer, held)
    assert metrics["accuracy"] is None and "correct" not in items and metrics["bits_per_byte"] > 0
    assert "teacher_nll" not in metrics and "nll_clean" not in metrics
