import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from kdlib import data, inference, models, trainer
from kdlib.inference import response_logits, response_rows
from kdlib.losses import Objective
from kdlib.teachers import Cached, Live, write_cache


def batch_of(rows, n=8, start=0):
    return data.Collator(0)([rows[i] for i in range(start, start + n)])


def full_logits(model, batch):
    """Every position through the head: the plain way."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def distance(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def fit(model, rows, tmp_path, tokenizer, *, steps=3, batch_size=8, teacher=None, alpha=0.0, temperature=1.0, **more):
    model = copy.deepcopy(model)
    trainer.train(model, tokenizer, [rows[i] for i in range(steps * batch_size)], steps=steps, teacher=teacher and Live(teacher, tokenizer),
                  objective=Objective(alpha, temperature=temperature),
                  **{"batch_size": batch_size, "learning_rate": 1e-3, "seed": 0, "output_dir": tmp_path, **more})
    return weights(model)


def test_rows_are_those_that_predict_a_response_token():
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, 8]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": labels}
    places, targets = response_rows(batch)
    assert places.tolist() == [0, 1, 6]
    assert targets.tolist() == [5, 6, 8]  # a label at position 0 has no position before it
    wider, wanted = response_rows({"input_ids": batch["input_ids"][:, :3], "labels": labels})
    assert wider.tolist() == [0, 1, 5] and torch.equal(wanted, targets), "a last token that is a label only"


def test_only_response_rows_reach_the_head_and_are_the_plain_ones(student, rows, tokenizer):
    batch, seen = batch_of(rows), []
    handle = student.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    places, targets = response_rows(batch)
    logits = response_logits(student, batch, places)
    handle.remove()
    assert seen == [(len(targets), 64)] and logits.shape[0] == len(targets) < batch["attention_mask"].sum()
    torch.testing.assert_close(logits, full_logits(student, batch).flatten(0, 1)[places])
    assert not student.lm_head._forward_pre_hooks, "nothing is left behind"


def loss_of(student, batch, tmp_path, num_items=None, source=None, **objective):
    made = trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[], use_cpu=True),
                                       processing_class=source and source.tokenizer, teacher=source,
                                       objective=Objective(**{"alpha": 0.0, **objective}))
    return made.compute_loss(student, batch, num_items_in_batch=num_items)


def test_alpha_zero_is_the_models_own_cross_entropy(student, rows, tmp_path, tokenizer):
    batch = batch_of(rows)
    loss = loss_of(student, batch, tmp_path)
    usual = {"labels": batch["labels"][:, :-1], "shift_labels": batch["labels"][:, 1:].contiguous()}
    torch.testing.assert_close(loss, student(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **usual).loss)


@pytest.mark.parametrize("alpha, temperature", [(1.0, 1.0), (1.0, 2.0), (0.3, 3.0)])
def test_loss_and_gradient_equal_the_naive_form(student, teacher, rows, tmp_path, alpha, temperature, tokenizer):
    batch = batch_of(rows)
    loss = loss_of(student, batch, tmp_path, num_items=77, source=Live(teacher, tokenizer), alpha=alpha, temperature=temperature)
    grads = torch.autograd.grad(loss, list(student.parameters()))
    total = 0.0
    s, t = full_logits(student, batch), full_logits(teacher, batch).detach()
    for i in range(len(s)):
        for j in range(s.shape[1]):
            y = batch["labels"][i, j + 1]
            if y != -100:
                q, p = log_softmax(s[i, j] / temperature, -1), log_softmax(t[i, j] / temperature, -1)
                kl = kl_div(q, p, log_target=True, reduction="sum")
                total = total + alpha * temperature**2 * kl - (1 - alpha) * log_softmax(s[i, j], -1)[y]
    naive = total / 77
    torch.testing.assert_close(loss, naive)
    for a, b in zip(grads, torch.autograd.grad(naive, list(student.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def usual(tokenizer):
    """The collator that everybody uses: labels as wide as inputs, and padding on the side of the tokenizer."""
    plain = DataCollatorForSeq2Seq(tokenizer)
    return lambda rows: plain([{k: r[k] for k in ("input_ids", "labels")} for r in rows])


def test_sft_trains_as_the_plain_trainer_does(student, rows, tmp_path, tokenizer):
    # Plain gradient descent: Adam's first steps blow rounding up to the learning rate.
    ours = fit(student, rows, tmp_path, tokenizer, optim="sgd", learning_rate=0.1)
    plain = copy.deepcopy(student)
    args = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd", seed=0,
                             lr_scheduler_type="linear", train_sampling_strategy="sequential", remove_unused_columns=False,
                             report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    Trainer(model=plain, args=args, train_dataset=[rows[i] for i in range(24)], data_collator=usual(tokenizer)).train()
    assert distance(ours, weights(student)) > 1e-3
    assert distance(ours, weights(plain)) < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_micro_batches_change_nothing_though_their_answers_differ_in_length(student, teacher, rows, tmp_path, alpha, tokenizer):
    by_length = sorted(range(24), key=lambda i: sum(t != -100 for t in rows[i]["labels"]))
    ordered = [rows[i] for step in range(3) for pair in range(step, 12, 3) for i in by_length[2 * pair:2 * pair + 2]]
    counts = [sum(t != -100 for r in ordered[s:s + 2] for t in r["labels"]) for s in range(0, 8, 2)]
    assert len(set(counts)) > 2
    # Plain gradient descent: Adam would hide a wrong scale.
    options = {"alpha": alpha, "teacher": teacher if alpha else None, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole = fit(student, ordered, tmp_path, tokenizer, **options)
    split = fit(student, ordered, tmp_path, tokenizer, micro_batch=2, **options)
    assert distance(whole, weights(student)) > 1e-3
    assert distance(whole, split) < 1e-6


@pytest.mark.parametrize("form", ["live", "hidden"])
def test_packing_and_the_side_of_padding_change_nothing(student, teacher, rows, tmp_path, tokenizer, form):
    examples = [{"id": str(i), "input_ids": r["input_ids"], "labels": r["labels"]} for i, r in enumerate(rows)]
    source = Live(teacher, tokenizer) if form == "live" else Cached(
        write_cache(tmp_path / "cache", teacher, tokenizer, examples, form="hidden", dtype="float32"))
    padded, packed = (data.Collator(0, pack)(examples[:16]) for pack in (False, True))
    assert "position_ids" in packed and packed["input_ids"].numel() < padded["input_ids"].numel()
    left = copy.deepcopy(padded)
    for i, n in enumerate(padded["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask", "labels"):
            left[name][i] = left[name][i].roll(padded["input_ids"].shape[1] - n)
    made = trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[], use_cpu=True), teacher=source,
                                       objective=Objective(0.7), processing_class=tokenizer, train_dataset=examples)
    batches = [padded, packed, left, *([] if form == "hidden" else [usual(tokenizer)(examples[:16])])]
    losses = [made.compute_loss(student, batch, num_items_in_batch=50) for batch in batches]
    gradients = [torch.autograd.grad(loss, list(student.parameters())) for loss in losses]
    for other in range(1, len(batches)):
        torch.testing.assert_close(losses[0], losses[other])
        for a, b in zip(gradients[0], gradients[other]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_order_of_a_batch_changes_nothing(student, teacher, rows, tmp_path, tokenizer):
    examples = [{"id": str(i), **{k: r[k] for k in ("input_ids", "labels")}} for i, r in enumerate(rows)][:16]
    source = Cached(write_cache(tmp_path / "cache", teacher, tokenizer, examples, k=8))
    learner = made(student, examples, tmp_path, tokenizer, teacher=source)
    found = []
    for batch in (examples, examples[::-1], examples[5:] + examples[:5]):
        loss = learner.compute_loss(learner.model, data.Collator(0, pack=True)(batch), num_items_in_batch=50)
        found.append([loss, *torch.autograd.grad(loss, list(learner.model.parameters()))])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_are_packed_by_default_and_only_where_they_stay_apart(student, teacher, rows, tmp_path, tokenizer, monkeypatch):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    for apart, lmbda in ((True, 0.0), (False, 0.0), (True, 1.0)):
        monkeypatch.setattr(trainer.inference, "keeps_rows_apart", lambda _: apart)
        learner = trainer.DistillationTrainer(model=student, args=args, processing_class=tokenizer, train_dataset=rows, lmbda=lmbda,
                                              teacher=Live(teacher, tokenizer), objective=Objective(), max_new_tokens=2)
        assert learner.data_collator.pack == (apart and not lmbda)
        learner.train()


def test_packed_batches_give_no_predictions(student, rows, tmp_path, tokenizer):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    held = [rows[i] for i in range(9)]
    with pytest.raises(ValueError, match="Predictions need one conversation a row; allowed: a collator that does not pack"):
        trainer.DistillationTrainer(model=student, args=args, processing_class=tokenizer).predict(held)
    made = trainer.DistillationTrainer(model=student, args=args, processing_class=tokenizer, data_collator=data.Collator(0))
    assert len(made.predict(held).predictions) == 9


def test_the_step_counts_the_tokens_that_its_loss_sums(tokenizer, tmp_path, rows):
    """Also for a model whose name does not tell the Trainer that its loss shifts labels, and where a first token has a label."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None))
    whole = [{"input_ids": rows[i]["input_ids"], "labels": rows[i]["input_ids"]} for i in range(8)]
    learner = made(model, whole, tmp_path, tokenizer)
    learner.data_collator = usual(tokenizer)
    batches, count = learner.get_batch_samples(iter(learner.get_train_dataloader()), 1, learner.args.device)
    assert count == len(inference.response_rows(batches[0])[1]) <= sum(len(r["input_ids"]) for r in whole) - 1
    assert learner.get_batch_samples(iter([]), 1, learner.args.device) == ([], 0), "where data end without saying so before"


class _Asked(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: numbers, and shapes, that depend on values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        chosen = [x for x in args[1] if torch.is_tensor(x)] if "index" in str(func) and isinstance(args[1], (list, tuple)) else []
        self.count += any(n in str(func) for n in ("_local_scalar_dense", "nonzero", "masked_select")) or any(x.dtype == torch.bool for x in chosen)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [None, "live", "top_k"])
def test_a_step_asks_the_device_for_one_number(student, teacher, tmp_path, tokenizer, form, monkeypatch):
    """Whether the loss is finite. Where several processes share a GPU, each question costs a turn of all others."""
    examples = [{"id": str(i), "input_ids": [*range(6 + 6 * i, 76)], "labels": [-100] * 20 + [*range(26 + 6 * i, 76)]} for i in range(8)]
    source = None if form is None else Live(teacher, tokenizer) if form == "live" else Cached(write_cache(tmp_path / "c", teacher, tokenizer, examples))
    asked, before, told, place, step = _Asked(), [], [], inference.placed, trainer.DistillationTrainer.training_step

    def on_the_host(batch):
        known = asked.count
        made, asked.count = place(batch), known
        return made

    def counted(*args):
        before.append(asked.count)
        told.append(args[0].args)
        return step(*args)

    monkeypatch.setattr(inference, "placed", on_the_host)
    monkeypatch.setattr(trainer.DistillationTrainer, "training_step", counted)
    with asked:
        trainer.train(student, tokenizer, [examples[i % 8] for i in range(32)], steps=4, batch_size=8, learning_rate=1e-3, seed=0, output_dir=tmp_path,
                      teacher=source, objective=Objective(float(form is not None)))
    assert [b - a for a, b in zip(before, before[1:])] == [1, 1, 1] and not told[0].logging_nan_inf_filter
    assert told[0].accelerator_config.non_blocking is torch.cuda.is_available() <= told[0].dataloader_pin_memory


def test_an_evaluations_loss_is_the_mean_over_tokens_however_it_is_batched(student, teacher, rows, tmp_path, tokenizer):
    held = sorted((rows[i] for i in range(13)), key=lambda r: len(r["labels"]))
    found = [made(student, held, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), per_device_eval_batch_size=size).evaluate(held)["eval_loss"]
             for size in (3, 13)]
    batch = batch_of(held, 13)
    whole = loss_of(student, batch, tmp_path, num_items=int((batch["labels"] != -100).sum()), source=Live(teacher, tokenizer), alpha=1.0)
    assert found == pytest.approx([whole.item()] * 2, rel=1e-5)


def test_an_evaluation_holds_no_logits_unless_metrics_want_them_whole(student, teacher, rows, tmp_path, tokenizer, monkeypatch):
    batches, seen = [rows[i] for i in range(16)], []
    learner = made(student, batches, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), per_device_eval_batch_size=16)
    expected = learner.evaluate(batches)["eval_loss"]
    learner.compute_metrics = lambda p: seen.append(p) or {"rows": len(p.predictions)}
    found = learner.evaluate(batches)
    logits, labels = torch.from_numpy(seen[0].predictions), torch.from_numpy(seen[0].label_ids)
    assert found["eval_rows"] == 16 and found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits[:, :-1], full_logits(learner.model, batch_of(rows, 16)), rtol=1e-4, atol=1e-5)
    assert labels.shape == logits.shape[:2], "so that logits[:, :-1] predict labels[:, 1:], as everywhere"
    monkeypatch.setattr(learner.model.lm_head, "forward", lambda _: 1 / 0)  # never called where the loss alone is wanted
    learner.compute_metrics = None
    assert learner.evaluate(batches)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_equal_to_the_student_teaches_nothing(student, rows, tmp_path, tokenizer):
    after = fit(student, rows, tmp_path, tokenizer, teacher=copy.deepcopy(student), alpha=1.0, temperature=2.0, optim="sgd",
                learning_rate=0.1)
    assert distance(after, weights(student)) < 1e-6


def test_the_teacher_is_frozen_and_unchanged(student, teacher, rows, tmp_path, tokenizer):
    before = weights(teacher)
    teacher.train()
    fit(student, rows, tmp_path, tokenizer, teacher=teacher, alpha=1.0)
    assert distance(before, weights(teacher)) == 0
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_distillation_moves_the_student_towards_the_teacher(student, teacher, rows, tmp_path, tokenizer):
    def divergence(model):
        batch = batch_of(rows)
        places, _ = response_rows(batch)
        with torch.no_grad():
            q, p = (log_softmax(response_logits(m, batch, places), -1) for m in (model, teacher))
        return kl_div(q, p, log_target=True, reduction="batchmean").item()

    before, learner = divergence(student), copy.deepcopy(student)
    trainer.train(learner, tokenizer, [rows[i % 8] for i in range(160)], steps=20, batch_size=8, learning_rate=1e-2, seed=0,
                  output_dir=tmp_path, teacher=Live(teacher, tokenizer), objective=Objective())
    assert divergence(learner) < before / 2


def test_the_same_seed_gives_the_same_weights(student, teacher, rows, tmp_path, tokenizer):
    options = {"teacher": teacher, "alpha": 0.5}
    assert distance(fit(student, rows, tmp_path, tokenizer, **options), fit(student, rows, tmp_path, tokenizer, **options)) == 0


@pytest.mark.parametrize("adapters", [{}, {"lora": {"r": 4, "target_modules": "all-linear"}}])
def test_a_killed_training_goes_on_from_its_last_whole_checkpoint_to_the_same_digits(student, teacher, rows, tmp_path, tokenizer, monkeypatch, adapters):
    if adapters:
        pytest.importorskip("peft")
    losses, steps, step = [], [], trainer.DistillationTrainer.training_step

    def trained(folder, killed_at=None):
        def kill(self, *args, **more):
            if self.state.global_step == killed_at:
                raise KeyboardInterrupt
            steps.append(self.state.global_step)
            return step(self, *args, **more)

        steps.clear()
        monkeypatch.setattr(trainer.DistillationTrainer, "training_step", kill)
        learner = copy.deepcopy(student)
        losses.append(trainer.train(learner, tokenizer, [rows[i] for i in range(42)], steps=7, batch_size=6, learning_rate=1e-2, seed=0, output_dir=folder,
                                    teacher=Live(teacher, tokenizer), objective=Objective(0.5), save_steps=2, use_cpu=True, **adapters)["train_loss"])
        return weights(learner)

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", killed_at=5)
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["checkpoint-4"], "no older ones"
    (torn := tmp_path / "killed" / "checkpoint-6").mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 6,')
    after = trained(tmp_path / "killed")
    assert steps == [4, 5, 6] and distance(after, whole) == 0 < distance(whole, weights(student))
    again = trained(tmp_path / "killed")
    assert not steps and distance(again, whole) == 0 and losses[0] == losses[1] == losses[2]
    without = trainer.train(copy.deepcopy(student), tokenizer, [rows[i] for i in range(42)], steps=7, batch_size=6, learning_rate=1e-2, seed=0, use_cpu=True,
                            output_dir=tmp_path / "none", teacher=Live(teacher, tokenizer), objective=Objective(0.5), **adapters)
    assert losses[0] == pytest.approx(without["train_loss"], rel=1e-6) and not list((tmp_path / "none").iterdir())


def test_a_batch_without_responses_gives_zero(student, teacher, rows, tmp_path, tokenizer):
    batch = batch_of(rows, 2)
    batch["labels"][:] = -100
    loss = loss_of(student, batch, tmp_path, source=Live(teacher, tokenizer), alpha=0.5)
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def made(model, rows, folder, tokenizer, teacher=None, **arguments):
    """A DistillationTrainer over ``rows`` in their order, by plain gradient descent."""
    more = {n: arguments.pop(n) for n in ("lmbda", "max_new_tokens") if n in arguments}
    args = TrainingArguments(folder, report_to=[], use_cpu=True, per_device_train_batch_size=8, train_sampling_strategy="sequential",
                             remove_unused_columns=False, disable_tqdm=True, **{"learning_rate": 1e-3, "save_strategy": "no", **arguments})
    return trainer.DistillationTrainer(model=copy.deepcopy(model), args=args, processing_class=tokenizer, train_dataset=rows,
                                       data_collator=data.Collator(0), teacher=teacher, objective=Objective(1.0 if teacher else 0.0), **more)


@pytest.mark.parametrize("lmbda, form", [(0.0, "live"), (0.5, "live"), (0.0, "sampled")])
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_for_bit(student, teacher, rows, tmp_path, tokenizer, lmbda, form):
    rows = [{"id": str(i), **{k: r[k] for k in ("input_ids", "labels")}} for i, r in enumerate(rows)]
    source = Live(teacher, tokenizer) if form == "live" else Cached(write_cache(tmp_path / "cache", teacher, tokenizer, rows, form=form, k=8))
    options = {"max_steps": 6, "lmbda": lmbda, "max_new_tokens": 4, "teacher": source}
    whole = made(student, rows, tmp_path / "whole", tokenizer, **options)
    whole.train()
    half = made(student, rows, tmp_path / "half", tokenizer, save_strategy="steps", save_steps=3, **options)
    half.train()
    resumed = made(student, rows, tmp_path / "half", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert distance(weights(whole.model), weights(student)) > 1e-3
    assert distance(weights(whole.model), weights(half.model)) == 0 == distance(weights(whole.model), weights(resumed.model))


def test_on_policy_answers_are_the_students_and_nothing_after_their_end(student, teacher, rows, tmp_path, tokenizer):
    learner = made(student, rows, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), lmbda=1.0, max_new_tokens=40)
    with torch.no_grad():
        learner.model.lm_head.weight[tokenizer.eos_token_id] *= 30  # so that some answers end early
    batch, end = batch_of(rows), tokenizer.eos_token_id
    torch.manual_seed(3)
    own = learner.own_answers(batch)
    prompts = [[t for t, y in zip(r["input_ids"], r["labels"]) if y == -100] for r in rows.select(range(8)).to_list()]
    lengths = set()
    for ids, mask, labels, prompt in zip(*(own[k].tolist() for k in ("input_ids", "attention_mask", "labels")), prompts):
        n = sum(mask)
        answer = [t for t in labels if t != -100]
        assert ids[:n] == (prompt + answer)[:-1] and mask == [1] * n + [0] * (len(ids) - n)
        assert labels == [-100] * len(prompt) + answer + [-100] * (len(ids) - n)
        assert end not in answer[:-1] and (answer[-1] == end or len(answer) == 40)
        lengths.add(len(answer))
    assert len(lengths) > 1 and min(lengths) < 40


def test_on_policy_prompts_hold_no_padding(student, teacher, rows, tmp_path, tokenizer):
    learner = made(student, rows, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), lmbda=1.0, max_new_tokens=4)
    batch = batch_of(rows)
    left = {k: torch.nn.functional.pad(v, (5, 0), value=-100 if k == "labels" else 0) for k, v in batch.items() if k != "example"}
    answers = []
    for given in (batch, left):
        torch.manual_seed(3)
        answers.append(learner.own_answers(given))
    assert all(torch.equal(answers[0][k], answers[1][k]) for k in answers[0])


def test_a_cached_teacher_takes_the_usual_arguments_and_knows_the_evaluation_rows(student, teacher, rows, tmp_path, tokenizer):
    named = [{"id": f"r{i}", **{k: rows[i][k] for k in ("input_ids", "labels")}} for i in range(24)]
    cached = Cached(write_cache(tmp_path / "cache", teacher, tokenizer, named[:16]))
    args = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    how = {"args": args, "processing_class": tokenizer, "data_collator": data.Collator(0), "teacher": cached, "objective": Objective(1.0)}
    learner = trainer.DistillationTrainer(model=student, train_dataset=named[:16], eval_dataset=named[:16], **how)
    learner.train()
    assert 0 < learner.evaluate()["eval_loss"] < 100
    for held in (named[16:], {"a": named[:8], "b": named[16:]}):
        with pytest.raises(ValueError, match="has no example 'r16'"):
            trainer.DistillationTrainer(model=student, train_dataset=named[:16], eval_dataset=held, **how)


def test_a_hook_on_the_head_outlives_the_loss(student, rows, tmp_path, tokenizer):
    calls, plain = [], student.lm_head.forward
    student.lm_head.forward = lambda hidden: calls.append(1) or plain(hidden)
    loss_of(student, batch_of(rows), tmp_path)
    before = len(calls)
    full_logits(student, batch_of(rows))
    assert len(calls) == before + 1


def test_the_on_policy_share_is_that_of_the_batches(student, teacher, rows, tmp_path, tokenizer, monkeypatch):
    counts = {}
    for lmbda in (0.0, 0.4, 1.0):
        learner = made(student, [rows[i % 48] for i in range(400)], tmp_path, tokenizer, teacher=Live(teacher, tokenizer), lmbda=lmbda, max_steps=50)
        asked = []
        monkeypatch.setattr(learner, "own_answers", lambda batch: asked.append(1) or batch)
        learner.train()
        counts[lmbda] = len(asked)
    assert counts[0.0] == 0 and counts[1.0] == 50 and 10 <= counts[0.4] <= 30


def test_packed_batches_and_on_policy_answers_do_not_mix(student, teacher, rows, tmp_path, tokenizer):
    learner = made(student, rows, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), lmbda=1.0)
    with pytest.raises(ValueError, match="one conversation a row; allowed: a collator that does not pack"):
        learner.own_answers(data.Collator(0, pack=True)([rows[i] for i in range(16)]))


MODES = ("trained", "own", "sharded")
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node={}", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes={}", "--num_machines=1", "--mixed_precision=no",
                   "--dynamo_backend=no", "--main_process_port=0"]}


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory):
    """What ``two_processes.py`` wrote: by starter, number of processes and mode."""
    folder, script, found = tmp_path_factory.mktemp("processes"), Path(__file__).with_name("two_processes.py"), {}
    for starter, processes, modes in (("torchrun", 1, MODES), ("torchrun", 2, MODES), ("accelerate", 2, MODES[:1])):
        (into := folder / f"{starter}-{processes}").mkdir()
        done = subprocess.run([sys.executable, "-m", *(word.format(processes) for word in LAUNCHERS[starter]), str(script), str(into), *modes],
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found |= {(starter, processes, file.name): load_file(file) for file in into.iterdir()}
    return found


@pytest.mark.parametrize("mode, starter", [("trained", "torchrun"), ("own", "torchrun"), ("trained", "accelerate")])
def test_two_processes_train_as_one(in_processes, mode, starter):
    """Plain gradient descent over answers of unequal length: a wrong count or scale would show in the weights."""
    one, two = in_processes["torchrun", 1, mode], in_processes[starter, 2, mode]
    moved = distance(one, in_processes["torchrun", 1, f"{mode}-start"])
    assert moved > 1e-3 and distance(one, two) < (1e-6 if mode == "trained" else 1e-5 * moved)


def test_a_student_in_shards_has_the_gradient_of_a_whole_one(in_processes):
    one, two = in_processes["torchrun", 1, "sharded"], in_processes["torchrun", 2, "sharded"]
    assert one.keys() == two.keys() and max(g.abs().max() for g in one.values()) > 1e-2 and distance(one, two) < 1e-6


def test_half_precision_trains_close_to_full(student, teacher, rows, tmp_path, tokenizer):
    how = {"teacher": teacher, "alpha": 0.5, "optim": "sgd", "learning_rate": 0.1, "use_cpu": True}
    exact, half = (fit(student, rows, tmp_path, tokenizer, **how, bf16=bf16) for bf16 in (False, True))
    assert all(v.dtype == torch.float32 for v in half.values())
    assert 0 < distance(exact, half) < 0.05 * distance(exact, weights(student))


def test_low_rank_adapters_start_where_their_seed_says_whatever_came_before(student, rows, tmp_path, tokenizer):
    pytest.importorskip("peft")
    found = []
    for before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(before)
        found.append(fit(student, rows, tmp_path, tokenizer, learning_rate=1e-2, seed=seed, use_cpu=True, lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}))
    assert distance(found[0], found[1]) == 0 < distance(found[0], weights(student)) and distance(found[0], found[2]) > 0


def test_low_rank_adapters_learn_and_nothing_else_does(student, teacher, rows, tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(student), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    learner = made(adapted, rows, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), max_steps=4, learning_rate=1e-2)
    assert learner.linear is not None, "the fast path"
    before = weights(learner.model)
    learner.train()
    moved = {k for k, v in weights(learner.model).items() if not torch.equal(v, before[k])}
    assert moved and all("lora_" in k for k in moved)
    batch = batch_of(rows)
    places, _ = response_rows(batch)
    whole = learner.model.merge_and_unload()
    torch.testing.assert_close(response_logits(whole, batch, places), full_logits(whole, batch).flatten(0, 1)[places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"objective": Objective(0.5)}, "no teacher; give a teacher or alpha=0"), ({"lmbda": 2.0}, "lmbda=2.0 is not allowed"),
    ({"lmbda": 0.5}, "lmbda=0.5 .* only with alpha=1 and a live teacher")])
def test_bad_options_are_named_before_training(student, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[]), **options)


def test_tokenizers_that_differ_are_refused(student, tokenizer, tmp_path):
    fewer = models.build_tokenizer(["a", "b"])
    for theirs, message in ((fewer, "need the same token ids, but .* tokens differ, among them"), (None, "needs the tokenizers of student")):
        with pytest.raises(ValueError, match=message):
            trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[]), objective=Objective(),
                                        processing_class=tokenizer, teacher=Live(models.build_model("nano", fewer, 0), theirs))
    with pytest.raises(ValueError, match="teacher is a LlamaForCausalLM; allowed: kdlib.teachers.Live"):
        trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[]), processing_class=tokenizer, teacher=copy.deepcopy(student))
    spread = Live(copy.deepcopy(student), tokenizer)
    spread.model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="The teacher lies on 2 devices; allowed: one on the student's, or a cache"):
        spread.prepare(student, tokenizer, [], Objective(), "cpu")
    with pytest.raises(ValueError, match="The teacher is the student itself"):
        trainer.DistillationTrainer(model=student, args=TrainingArguments(tmp_path, report_to=[]), objective=Objective(),
                                    processing_class=tokenizer, teacher=Live(student, tokenizer))


def test_a_teacher_given_alone_teaches(student, teacher, rows, tmp_path, tokenizer):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    how = {"model": student, "args": args, "processing_class": tokenizer}
    assert trainer.DistillationTrainer(**how, teacher=Live(teacher, tokenizer)).objective == Objective(1.0)
    assert trainer.DistillationTrainer(**how).objective.alpha == 0


def test_the_usual_arguments_mean_what_they_mean_to_the_trainer(student, teacher, rows, tmp_path, tokenizer):
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    mine = DataCollatorForSeq2Seq(tokenizer)
    learner = trainer.DistillationTrainer(student, args, mine, rows, processing_class=tokenizer, teacher=Live(teacher, tokenizer))
    assert learner.data_collator is mine
    learner.train()  # the rows have columns of text, which the Trainer leaves out
    with pytest.raises(ValueError, match="chunk_size=-1 is not allowed; allowed: None or a whole number from 1"):
        trainer.DistillationTrainer(student, TrainingArguments(tmp_path, report_to=[], use_cpu=True), processing_class=tokenizer, chunk_size=-1)
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1, .* do not go with this loss"):
        trainer.DistillationTrainer(model=student, args=args, processing_class=tokenizer)


def test_a_student_padded_beyond_the_tokenizer_never_says_what_no_teacher_knows(student, teacher, rows, tmp_path, tokenizer):
    student.resize_token_embeddings(len(tokenizer) + 35)
    with torch.no_grad():
        student.lm_head.weight[len(tokenizer):] += 1.0  # which it would like to say
    learner = made(student, rows, tmp_path, tokenizer, teacher=Live(teacher, tokenizer), lmbda=1.0, max_new_tokens=8, max_steps=2)
    assert learner.own_answers(batch_of(rows))["input_ids"].max() < len(tokenizer)
    learner.train()


def test_samples_leave_the_habits_of_an_adapted_model_alone(student, tokenizer):
    peft = pytest.importorskip("peft")
    student.generation_config.top_k = 7
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    inference.generate(adapted, [[7, 8]], max_new_tokens=2, pad_token_id=0, eos_token_id=1, temperature=1.0)
    assert adapted.merge_and_unload().generation_config.top_k == 7
