import json
import math

import datasets
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kdlib import data, evaluate, inference, lab, models, teachers
from kdlib.losses import Hidden, Objective, distillation_loss
from kdlib.teachers import EXACT, Cached, Live, write_answers, write_cache

KD = Objective(alpha=1.0)


@pytest.fixture(scope="module")
def examples(rows):
    """Rendered rows as a trainer gets them, with ids."""
    return [{"id": f"row {i}", "input_ids": r["input_ids"], "labels": r["labels"]} for i, r in enumerate(rows)]


def cache(folder, teacher, tokenizer, examples, **how):
    return Cached(write_cache(folder, teacher, tokenizer, examples, **{"shard_rows": 20, **how}))


def rows_of(source, student, tokenizer, examples, objective=KD, chosen=(3, 0, 47, 20, 21)):
    """``(teacher rows, student logits, targets)`` of a batch in an order of its own."""
    batch = data.Collator(0)([examples[i] for i in chosen])
    places, targets = inference.response_rows(batch)
    vocabulary = source.prepare(student, tokenizer, examples, objective, "cpu")
    found = source.targets(batch, places)
    if isinstance(found, Hidden):
        found = found.logits
    return found, inference.response_logits(student, batch, places).detach().requires_grad_(), targets, vocabulary


def loss_and_gradient(source, student, tokenizer, examples, objective=KD):
    found, logits, targets, vocabulary = rows_of(source, student, tokenizer, examples, objective)
    loss = distillation_loss(logits, targets, found, num_items=10, vocabulary=vocabulary, **vars(objective))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "reverse_kl"])
def test_exact_caches_equal_the_live_teacher(student, teacher, tokenizer, examples, tmp_path, kind, temperature):
    objective = Objective(alpha=0.7, kind=kind, temperature=temperature)
    live = loss_and_gradient(Live(teacher, tokenizer), student, tokenizer, examples, objective)
    for form in EXACT:
        whole = cache(tmp_path / form, teacher, tokenizer, examples, form=form, dtype="float32")
        for a, b in zip(live, loss_and_gradient(whole, student, tokenizer, examples, objective)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    most = cache(tmp_path / "top", teacher, tokenizer, examples, k=len(tokenizer) - 1, temperature=temperature, dtype="float32")
    for a, b in zip(live, loss_and_gradient(most, student, tokenizer, examples, objective)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_bucket_never_overstates_and_more_tokens_come_closer(student, teacher, tokenizer, examples, tmp_path):
    live, _ = loss_and_gradient(Live(teacher, tokenizer), student, tokenizer, examples)
    found = [loss_and_gradient(cache(tmp_path / str(k), teacher, tokenizer, examples, k=k, dtype="float32"), student, tokenizer, examples)[0]
             for k in (2, 8, 64)]
    assert found[0] < found[1] < found[2] <= live + 1e-5 and live - found[2] < 0.5 * (live - found[0])


def test_sampling_is_unbiased_in_loss_and_gradient(student, teacher, tokenizer, examples, tmp_path):
    live = loss_and_gradient(Live(teacher, tokenizer), student, tokenizer, examples)
    draws = [loss_and_gradient(cache(tmp_path / str(s), teacher, tokenizer, examples, form="sampled", k=16, seed=s), student, tokenizer, examples)
             for s in range(40)]
    losses = torch.stack([d[0] for d in draws])
    assert abs(losses.mean() - live[0]) < 4 * losses.std() / math.sqrt(len(draws))
    mean = torch.stack([d[1] for d in draws]).mean(0)
    noise = torch.stack([d[1] for d in draws]).std(0).norm() / math.sqrt(len(draws))
    assert (mean - live[1]).norm() < 2 * noise


def test_targets_are_found_by_id_whatever_the_order(student, teacher, tokenizer, examples, tmp_path):
    made = cache(tmp_path / "c", teacher, tokenizer, examples, form="full", dtype="float32")
    shuffled = cache(tmp_path / "d", teacher, tokenizer, examples[::-1], form="full", dtype="float32")
    torch.testing.assert_close(*(rows_of(c, student, tokenizer, examples)[0] for c in (made, shuffled)))
    assert len(made.shards) == 3 and made.bytes_per_token == 4 * len(tokenizer)


def test_a_killed_writer_goes_on_and_the_cache_is_the_same(student, teacher, tokenizer, examples, tmp_path, monkeypatch):
    whole = cache(tmp_path / "whole", teacher, tokenizer, examples, form="sampled", k=8)
    written, real = [], teachers._write_shard

    def fail_at_the_third(work, **rest):
        written.append(rest["number"])
        if rest["number"] == 2 and len(written) == 3:
            (work / "half").write_text("x")
            raise KeyboardInterrupt
        real(work, **rest)

    monkeypatch.setattr(teachers, "_write_shard", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "cut", teacher, tokenizer, examples, form="sampled", k=8)
    with pytest.raises(ValueError, match="is unfinished; write it again and it goes on"):
        Cached(tmp_path / "cut")
    again = cache(tmp_path / "cut", teacher, tokenizer, examples, form="sampled", k=8)
    assert written == [0, 1, 2, 2]
    for a, b in zip(rows_of(whole, student, tokenizer, examples)[0], rows_of(again, student, tokenizer, examples)[0]):
        torch.testing.assert_close(a, b)


def test_a_shard_holds_no_more_numbers_than_arrows_lists(teacher, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "_write", lambda folder, spec, parts: (spec["shard_rows"], len(parts) - 1))
    rows = [{"id": i, "input_ids": [1] * 40_000, "labels": [1] * 40_000} for i in range(20)]
    assert [write_cache(tmp_path, teacher, tokenizer, rows, form="sampled", k=k) for k in (50, 6000, 65_536)] == [(1000, 1), (8, 3), (1, 20)]


def test_every_mismatch_is_refused_with_its_reason(student, teacher, tokenizer, examples, tmp_path):
    made = cache(tmp_path / "c", teacher, tokenizer, examples, k=4)

    def refused(message, tokenizer=tokenizer, rows=examples, objective=KD, source=made):
        with pytest.raises(ValueError, match=message):
            source.prepare(student, tokenizer, rows, objective, "cpu")

    other = models.build_tokenizer(["a", "b"])
    refused("need the same token ids, but [0-9]+ tokens differ, among them .a. .6 and", tokenizer=other)
    refused("needs the student's tokenizer", tokenizer=None)
    changed = models.build_tokenizer(None, ["x"])
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ messages }}", **models.SPECIAL)
    refused("was made with another (tokenizer|template)", tokenizer=changed)
    refused("has no example 'new'", rows=[{**examples[0], "id": "new"}])
    refused("holds other tokens for example 'row 0'", rows=[{**examples[1], "id": "row 0"}])
    refused("temperature=2.0 but the cache .* has 1.0; allowed: that, or an exact cache", objective=Objective(temperature=2.0))
    refused("kind='jsd' with a sampled cache would be biased", objective=Objective(kind="jsd"),
            source=cache(tmp_path / "s", teacher, tokenizer, examples, form="sampled", k=4))
    with pytest.raises(ValueError, match="was made with another teacher; give a folder of its own"):
        cache(tmp_path / "c", student, tokenizer, examples, k=4)


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "vocabulary"])
def test_a_damaged_cache_is_refused(teacher, tokenizer, examples, tmp_path, damage):
    folder = write_cache(tmp_path / "c", teacher, tokenizer, examples, k=4, shard_rows=20)
    path = next((folder / "shard-00001").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "vocabulary":
        path = folder / "vocabulary" / "vocabulary.json"
        path.write_text(path.read_text().replace("6", "7", 1))
    else:
        (folder / "spec.json").write_text("{")
    with pytest.raises(ValueError, match="no readable spec.json" if damage == "manifest" else f"is damaged: {path.name}"):
        Cached(folder)


@pytest.mark.parametrize("how, message", [({"form": "zip"}, "form='zip' is not allowed; allowed: full, hidden, top_k, sampled"),
                                          ({"k": 0}, "k=0 is not allowed"), ({"k": 10**6}, "k=1000000"), ({"dtype": "int8"}, "dtype='int8'"),
                                          ({"temperature": 0.0}, "temperature=0.0")])
def test_bad_settings_are_named(teacher, tokenizer, examples, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        write_cache(tmp_path / "c", teacher, tokenizer, examples, **how)
    assert not list(tmp_path.glob("c/shard*"))


def test_examples_that_share_an_id_are_refused(teacher, tokenizer, examples, tmp_path):
    with pytest.raises(ValueError, match="some share one"):
        write_cache(tmp_path / "c", teacher, tokenizer, [examples[0], examples[0]])


@pytest.fixture(scope="module")
def asked():
    """Conversations with annotators' answers."""
    return lab.World(3).mixture("train", "seen", 48)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_teachers_answers_stand_in_the_place_of_the_annotators(teacher, tokenizer, asked, tmp_path, temperature):
    how = {"max_new_tokens": 8, "temperature": temperature, "shard_rows": 20}
    answered = write_answers(tmp_path / "a", teacher, tokenizer, asked, **how)
    assert [m[:-1] for m in answered["messages"]] == [m[:-1] for m in asked["messages"]]
    assert answered["id"] == asked["id"] and answered["answer"] == asked["answer"]
    assert answered["messages"] == write_answers(tmp_path / "b", teacher, tokenizer, asked, **how)["messages"], "one seed, one text"
    said = [m[-1]["content"] for m in answered["messages"]]
    if temperature:
        other = write_answers(tmp_path / "c", teacher, tokenizer, asked, **how, seed=1)
        assert said != [m[-1]["content"] for m in other["messages"]]
    else:
        assert said == evaluate.replies(teacher, tokenizer, [m[:-1] for m in asked["messages"]], 8)[0]
        alone = Dataset.from_list([{**r, "messages": r["messages"][:-1]} for r in asked])
        assert write_answers(tmp_path / "alone", teacher, tokenizer, alone, **how)["messages"] == answered["messages"], "prompts that nobody has answered"
    assert len(data.render(answered, tokenizer, 64)[0]) == len(asked), "the path that annotators' rows take"


def test_answers_are_to_prompts_as_training_reads_them(teacher, tokenizer, asked, tmp_path, monkeypatch):
    long = asked.map(lambda r: {"messages": [{"role": "user", "content": " ".join([r["messages"][-2]["content"]] * 9)}, r["messages"][-1]]})
    rendered, report = data.render(long, tokenizer, 40, drop=True)
    assert report["prompts_shortened"] == len(rendered) > 40
    read, real = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, **how: read.extend(prompts) or real(model, prompts, **how))
    answered = write_answers(tmp_path / "a", teacher, tokenizer, rendered, max_new_tokens=8)
    for change, message in (({"shard_rows": 0}, "shard_rows=0 is not allowed; allowed: a whole number from 1"), ({"temperature": -1.0}, "temperature=-1.0 is not"),
                            ({"max_new_tokens": 0}, "max_new_tokens=0 is not"), ({"rows": [{"id": "r", "messages": [{"role": "assistant", "content": "a"}]}]}, "Row 'r' asks nothing; allowed: messages with"), ({"rows": rendered.select([])}, r"columns of rows=\[\] is not allowed; allowed: id and messages")):
        with pytest.raises(ValueError, match=message):
            write_answers(tmp_path / "b", teacher, tokenizer, **{"rows": rendered, "max_new_tokens": 8, **change})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="theirs' holds files of something else; give an empty or new folder"):
        write_answers(tmp_path / "theirs", teacher, tokenizer, rendered, max_new_tokens=8)
    assert read == [[t for t, label in zip(r["input_ids"], r["labels"]) if label == data.IGNORE] for r in rendered]
    assert set(answered.column_names) == set(rendered.column_names) - {"input_ids", "labels"}, "which were of the annotators' answers"
    assert [m[:-1] for m in answered["messages"]] == [m[:-1] for m in rendered["messages"]], "told whole"


def test_answers_are_kept_by_shards_and_not_mixed(student, teacher, tokenizer, asked, tmp_path, monkeypatch):
    real, calls = teachers.replies, []

    def fail_at_the_third(*given):
        calls.append(len(given[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(teachers, "replies", fail_at_the_third)
    how = {"max_new_tokens": 8, "temperature": 1.0, "shard_rows": 20}
    with pytest.raises(KeyboardInterrupt):
        write_answers(tmp_path / "cut", teacher, tokenizer, asked, **how)
    again = write_answers(tmp_path / "cut", teacher, tokenizer, asked, **how)
    assert calls == [20, 20, 8, 8]
    assert again["messages"] == write_answers(tmp_path / "whole", teacher, tokenizer, asked, **how)["messages"]
    with pytest.raises(ValueError, match="was made with another teacher; give a folder of its own"):
        write_answers(tmp_path / "cut", student, tokenizer, asked, **how)
    with pytest.raises(ValueError, match="was made with another temperature"):
        write_answers(tmp_path / "cut", teacher, tokenizer, asked, **{**how, "temperature": 0.0})


def test_a_cache_is_mapped_and_not_copied(teacher, tokenizer, examples, tmp_path):
    folder = write_cache(tmp_path / "cache", teacher, tokenizer, examples, form="full", dtype="float32")
    before = pa.total_allocated_bytes()
    opened = Cached(folder)
    size = sum(values.nbytes for arrays in opened.shards for _, values in arrays.values())
    assert size > 100_000 and pa.total_allocated_bytes() - before < size / 10


def test_a_shard_that_arrow_keeps_in_pieces_is_read_whole(student, teacher, tokenizer, examples, tmp_path, monkeypatch):
    whole = cache(tmp_path / "whole", teacher, tokenizer, examples, form="hidden", dtype="float32")
    monkeypatch.setattr(datasets.config, "MAX_ROW_GROUP_SIZE", "10KB")
    pieces = cache(tmp_path / "pieces", teacher, tokenizer, examples, form="hidden", dtype="float32")
    assert len(pieces.shards) > 2 * len(whole.shards)
    for a, b in zip(rows_of(whole, student, tokenizer, examples)[0], rows_of(pieces, student, tokenizer, examples)[0]):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="shard_rows=0 is not allowed; allowed: a whole number from 1"):
        write_cache(tmp_path / "none", teacher, tokenizer, examples, shard_rows=0)


def test_another_configuration_is_another_teacher(teacher, tokenizer, examples, tmp_path):
    write_cache(tmp_path / "cache", teacher, tokenizer, examples)
    teacher.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ValueError, match="was made with another teacher"):
        write_cache(tmp_path / "cache", teacher, tokenizer, examples)


def test_a_cache_of_another_teacher_is_refused(student, teacher, tokenizer, examples, tmp_path):
    folder = write_cache(tmp_path / "cache", teacher, tokenizer, examples, k=4)
    assert Cached(folder, teacher).spec == Cached(folder).spec
    with pytest.raises(ValueError, match="was made by another teacher; write one of this teacher in a new folder"):
        Cached(folder, student)


def test_an_edited_manifest_is_refused(teacher, tokenizer, examples, tmp_path):
    folder = write_cache(tmp_path / "cache", teacher, tokenizer, examples)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "temperature": 2.0}))
    with pytest.raises(ValueError, match=r"was changed after it was written \(spec.json\)"):
        Cached(folder)


def test_rows_without_a_target_each_are_refused(student, teacher, tokenizer, examples, tmp_path):
    found, logits, targets, _ = rows_of(cache(tmp_path / "c", teacher, tokenizer, examples), student, tokenizer, examples)
    short = found._replace(ids=found.ids[:-1], log_probs=found.log_probs[:-1], log_tail=found.log_tail[:-1])
    with pytest.raises(ValueError, match="each needs one a token"):
        distillation_loss(logits, targets, short, num_items=1)


def test_ids_that_read_the_same_are_refused(teacher, tokenizer, examples, tmp_path):
    twins = [{**examples[0], "id": 1}, {**examples[1], "id": "1"}]
    with pytest.raises(ValueError, match="Rows need ids of their own"):
        write_cache(tmp_path / "twins", teacher, tokenizer, twins)


def test_a_saved_and_loaded_teacher_is_the_same_one(student, teacher, tokenizer, examples, tmp_path):
    folder = write_cache(tmp_path / "cache", teacher, tokenizer, Dataset.from_list(examples), k=4)
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert Cached(folder, loaded).prepare(student, tokenizer, examples, KD, "cpu") == len(tokenizer)


def test_rows_and_batches_without_names_are_refused(student, teacher, tokenizer, examples, tmp_path):
    nameless = [{k: r[k] for k in ("input_ids", "labels")} for r in examples]
    with pytest.raises(ValueError, match="some share one, or have none"):
        write_cache(tmp_path / "none", teacher, tokenizer, nameless)
    made = cache(tmp_path / "c", teacher, tokenizer, examples, k=4)
    with pytest.raises(ValueError, match="has no example None"):
        made.prepare(student, tokenizer, nameless, KD, "cpu")
    batch = data.Collator(0)(nameless[:4])
    with pytest.raises(ValueError, match="needs batches that name their examples; allowed: kdlib.data.Collator"):
        made.targets(batch, inference.response_rows(batch)[0])
