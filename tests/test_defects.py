"""Fifteen defects that distillation systems have shipped, through the trainer where it has a part: a test is named for what it prevents."""

import copy
import math

import pytest
import torch
from transformers import TrainingArguments

from kdlib import data, losses, models
from kdlib.inference import response_rows
from kdlib.losses import Objective, Sparse, distillation_loss
from kdlib.teachers import Cached, Live, write_cache
from kdlib.trainer import DistillationTrainer


@pytest.fixture
def learner(student, teacher, rows, tokenizer, tmp_path):
    """Makes a trainer by plain gradient descent, so that a wrong scale shows in the weights."""
    def make(*, source=None, alpha=1.0, temperature=1.0, train=rows, batch_size=8, collate=None, **arguments):
        args = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, optim="sgd",
                                 learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=1,
                                 per_device_train_batch_size=batch_size, remove_unused_columns=False,
                                 **{"train_sampling_strategy": "sequential", **arguments})
        return DistillationTrainer(model=copy.deepcopy(student), args=args, processing_class=tokenizer, train_dataset=train,
                                   data_collator=collate or data.Collator(tokenizer.pad_token_id), teacher=source or Live(teacher, tokenizer),
                                   objective=Objective(alpha, temperature=temperature))

    return make


def batch_of(rows, n=8):
    return data.Collator(0)([rows[i] for i in range(n)])


def step(made):
    """How far one step of training moved each weight."""
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.train()
    return {k: v - before[k] for k, v in made.model.state_dict().items()}


def same(a, b, rtol=1e-4):
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=rtol, atol=1e-7)
    assert max(v.abs().max() for v in a.values()) > 1e-4, "something moved"


def test_01_t_squared_in_the_reported_loss_but_not_in_the_gradient(learner, rows):
    made, batch = learner(temperature=2.0), batch_of(rows)
    weight = made.model.model.norm.weight
    slope, = torch.autograd.grad(made.compute_loss(made.model, batch), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 0.01
            values.append(made.compute_loss(made.model, batch).item())
            weight -= sign * 0.01
    assert (values[0] - values[1]) / 0.02 == pytest.approx(slope.sum().item(), rel=0.01)


def test_02_a_mean_loss_scaled_once_more_by_the_tokens(learner, rows):
    once, twice = [rows[i] for i in range(8)], [rows[i % 8] for i in range(16)]
    same(step(learner(train=once)), step(learner(train=twice, batch_size=16)))


def test_03_padded_columns_that_count_as_zeros(student, rows, learner, tokenizer):
    wider = copy.deepcopy(student)
    wider.resize_token_embeddings(len(tokenizer) + 35, mean_resizing=False)
    with torch.no_grad():
        wider.get_output_embeddings().weight[len(tokenizer):] = 3.0
    made = learner(source=Live(wider, tokenizer))
    assert made.compute_loss(made.model, batch_of(rows)).item() == pytest.approx(0, abs=1e-6)


def test_04_chunks_over_the_wrong_axis(learner, rows, monkeypatch):
    seen, real = [], losses._by_hand
    monkeypatch.setattr(losses, "_by_hand", lambda z, *rest: seen.append(len(z)) or real(z, *rest))
    made, batch = learner(), batch_of(rows)
    made.chunk_size = 7
    made.compute_loss(made.model, batch)
    count = len(response_rows(batch)[1])
    assert sum(seen) == count > 14 and len(seen) == math.ceil(count / 7) and max(seen) <= 7


def test_05_a_label_mask_that_is_not_shifted(learner, rows):
    made, row = learner(alpha=0.5), rows[0]
    first = next(i for i, y in enumerate(row["labels"]) if y != -100)
    with torch.no_grad():
        logits = made.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        truth = made.teacher.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    places = torch.arange(first - 1, len(row["labels"]) - 1)  # from the last token of the prompt to the one before the last
    targets = torch.tensor(row["labels"])[places + 1]
    hard, soft = torch.nn.functional.cross_entropy(logits[places], targets), losses.divergence(logits[places], truth[places]).mean()
    by_hand = 0.5 * hard + 0.5 * soft
    torch.testing.assert_close(made.compute_loss(made.model, data.Collator(0)([row])), by_hand)


def test_06_padding_after_the_end_in_the_loss(learner, rows):
    made, batch = learner(alpha=0.5), batch_of(rows)
    longer = {k: torch.nn.functional.pad(v, (0, 9), value=-100 if k == "labels" else 0) for k, v in batch.items() if k != "example"}
    torch.testing.assert_close(made.compute_loss(made.model, batch), made.compute_loss(made.model, longer))


def test_07_targets_looked_up_by_order(learner, rows, teacher, tokenizer, tmp_path):
    named = [{"id": f"r{i}", **{k: rows[i][k] for k in ("input_ids", "labels")}} for i in range(48)]
    cached = Cached(write_cache(tmp_path / "cache", teacher, tokenizer, named, form="full", dtype="float32", shard_rows=20))
    shuffled = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 3, "train": named}
    same(step(learner(**shuffled)), step(learner(source=cached, **shuffled)))


def test_08_a_truncated_divergence_clamped_where_it_is_negative():
    student, p = torch.tensor([[3.0, 2.9, -3.0, -3.0]]), torch.tensor([0.3, 0.3, 0.2, 0.2])
    assert (p[:2] * (p[:2].log() - student.log_softmax(-1)[0, :2])).sum() < 0
    stored = Sparse(torch.tensor([[0, 1]]), p[None, :2].log(), torch.tensor([0.4]).log())
    loss = distillation_loss(student.requires_grad_(), torch.tensor([0]), stored, num_items=1)
    assert loss > 0 and torch.autograd.grad(loss, student)[0].abs().max() > 0.1


def test_09_a_soft_cross_entropy_called_a_divergence(learner, student, rows, tokenizer):
    made = learner(source=Live(copy.deepcopy(student), tokenizer))
    assert made.compute_loss(made.model, batch_of(rows)).item() == pytest.approx(0, abs=1e-6)


def test_10_a_gradient_multiplied_by_the_number_of_micro_batches(learner):
    same(step(learner(batch_size=8)), step(learner(batch_size=2, gradient_accumulation_steps=4)))


def test_11_vocabularies_of_one_width_with_other_ids(learner, teacher):
    words = ["one", "two", *(f"w{i}" for i in range(teacher.config.vocab_size - 8))]
    other = models.build_tokenizer(words)
    assert len(other) == teacher.config.vocab_size
    token = r"'\w+' \(\w+ and \w+\)"
    with pytest.raises(ValueError, match=rf"need the same token ids, but \d+ tokens differ, among them {token}, {token}"):
        learner(source=Live(teacher, other))


def test_12_division_by_zero_without_response_tokens(learner, rows):
    made, batch = learner(alpha=0.5), batch_of(rows)
    batch["labels"][:] = -100
    loss = made.compute_loss(made.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in made.model.parameters())


def test_13_truncation_that_cuts_the_instruction_or_the_answer(tokenizer):
    prompt, answer = list(range(10, 90)), list(range(100, 120))
    ids, labels = data.shorten_prompt(prompt + answer, [-100] * 80 + answer, 40)
    assert len(ids) == 60 and ids[:20] == prompt[:20] and ids[20:40] == prompt[-20:] and ids[40:] == labels[40:] == answer
    assert data.shorten_prompt(prompt[:10] + answer, [-100] * 10 + answer, 5) is None, "dropped and counted, not cut"


def test_14_a_mean_of_means_over_micro_batches(learner, rows):
    uneven = sorted((rows[i] for i in range(48)), key=lambda r: sum(y != -100 for y in r["labels"]))
    uneven = [*uneven[:4], *uneven[-4:]]
    lengths = [sum(y != -100 for r in part for y in r["labels"]) for part in (uneven[:4], uneven[4:])]
    assert lengths[1] > 1.5 * lengths[0]
    same(step(learner(train=uneven)), step(learner(train=uneven, batch_size=4, gradient_accumulation_steps=2)))


def test_15_a_teacher_behind_another_chat_template(learner, rows, teacher, tokenizer, tmp_path):
    named = [{"id": f"r{i}", **{k: rows[i][k] for k in ("input_ids", "labels")}} for i in range(8)]
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    cached = Cached(write_cache(tmp_path / "cache", teacher, other, named))
    with pytest.raises(ValueError, match="was made with another template; write it anew"):
        learner(source=cached, train=named)
