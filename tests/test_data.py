import copy
import random

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from kdlib import data, models

IGNORE = data.IGNORE


@pytest.fixture(scope="module")
def bpe():
    return models.build_tokenizer(None, ["the cat sat on the mat and the dog ran to the door"] * 20, 300)


def talk(*turns):
    return [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 4, turns)]


def test_only_the_assistants_words_and_end_token_are_labels(tokenizer):
    ids, labels = data.encode(talk("what is 2 + 3 ?", "it is 5 .", "sort c a .", "a c"), tokenizer)
    texts = [(tokenizer.decode(ids[start:end]), labels[start] != IGNORE) for start, end in data.stretches(labels)]
    assert texts == [("<|user|> what is 2 + 3 ? <|end|> <|assistant|>", False), ("it is 5 . <|end|>", True),
                     ("<|user|> sort c a . <|end|> <|assistant|>", False), ("a c <|end|>", True)]
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels))


def test_system_turns_are_rendered_and_not_learned(bpe):
    ids, labels = data.encode([{"role": "system", "content": "be kind"}, *talk("cat", "dog")], bpe)
    assert "".join(bpe.decode([t]) for t, label in zip(ids, labels) if label != IGNORE) == "dog<|end|>"


def test_a_template_without_a_generation_mark_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer,
                                   chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="generation"):
        data.encode(talk("a", "b"), bare)


def test_a_template_that_refuses_a_row_is_named_with_it(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ValueError, match="The chat template refuses row 0, whose turns are of system, user: no system turns"):
        data.render(Dataset.from_list([{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]), tokenizer, 64)


def test_a_conversation_without_an_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="assistant turn"):
        data.encode(talk("a"), tokenizer)


def test_shortening_cuts_the_middle_of_the_prompt_and_never_the_answer():
    rng = random.Random(0)
    for _ in range(300):
        stretches = [(rng.random() < 0.5, rng.randint(1, 40)) for _ in range(rng.randint(1, 5))]
        labels = [i if answer else IGNORE for i, (answer, n) in enumerate(stretches) for _ in range(n)]
        ids = list(range(len(labels)))
        limit, asked = rng.randint(5, 90), labels.count(IGNORE)
        cut = data.shorten_prompt(ids, labels, limit)
        if asked <= limit:
            assert cut == (ids, labels)
        elif cut is not None:
            assert cut[1].count(IGNORE) == limit
            assert [t for t, label in zip(*cut) if label != IGNORE] == [t for t, label in zip(ids, labels) if label != IGNORE]
            gone = sorted(set(ids) - set(cut[0]))
            ends = [0, *(j for j in range(1, len(ids)) if (labels[j] == IGNORE) != (labels[j - 1] == IGNORE)), len(ids)]
            for start, end in zip(ends, ends[1:]):
                own = [i for i in gone if start <= i < end]
                assert own == list(range(own[0], own[-1] + 1)) if own else True, "one piece of each"
                assert not own or (own[0] - start >= 4 and end - own[-1] > 4), "its head and its tail stay"
            longest = max((e - s for s, e in zip(ends, ends[1:]) if labels[s] == IGNORE), default=0)
            assert len({next(s for s in reversed(ends) if s <= i) for i in gone}) == 1 or asked - limit > longest - 8, "others only if need be"
        else:
            spare = sum(max(0, e - s - 8) for s, e in data.stretches(labels) if labels[s] == IGNORE)
            assert asked - limit > spare


def test_a_shortened_prompt_does_not_tell_how_long_the_answer_is(bpe):
    asked, answers = "cat " * 80, ["ran", "the door", "dog " * 14]
    rendered, _ = data.render(Dataset.from_dict({"messages": [talk(asked, a) for a in answers]}), bpe, 64, prompt_length=24)
    prompts = {tuple(t for t, label in zip(r["input_ids"], r["labels"]) if label == IGNORE) for r in rendered}
    assert len(prompts) == 1 and len(prompts.pop()) == 24 and len({len(r["input_ids"]) for r in rendered}) == 3
    left, report = data.render(Dataset.from_dict({"messages": [talk("cat", "dog " * 30), talk(asked, "dog " * 14)]}), bpe, 48, drop=True, prompt_length=40)
    assert report["rows_dropped"] == 1 and len(left[0]["input_ids"]) < 48, "an answer may have what a short prompt leaves"


def test_render_counts_what_it_did(bpe):
    answers = ["ran", "dog " * 60, "the door"]
    rows = Dataset.from_dict({"id": list("abc"), "messages": [talk("cat " * 80, answers[0]), talk("cat", answers[1]),
                                                              talk("mat", answers[2])]})
    with pytest.raises(ValueError, match=r"max_length=40 would cut the answer of row \d+, which has \d+ tokens, \d+ of them answer"):
        data.render(rows, bpe, 40)
    rendered, report = data.render(rows, bpe, 40, drop=True)
    assert list(rendered["id"]) == ["a", "c"]
    full = len(data.encode(rows[0]["messages"], bpe)[0])
    assert report["rows"] == 3 and report["rows_dropped"] == 1 and report["prompts_shortened"] == 1
    answer = len(bpe(answers[0])["input_ids"]) + 1
    assert report["prompt_tokens_cut"] == full - answer - 20 and len(rendered[0]["input_ids"]) == 20 + answer and report["answer_tokens_cut"] == 0
    assert report["response_tokens"] == sum(t != IGNORE for labels in rendered["labels"] for t in labels)
    for i, wanted in enumerate(("ran", "the door")):
        spoken = [t for t in rendered[i]["labels"] if t != IGNORE]
        assert bpe.decode(spoken) == wanted + "<|end|>"


def test_several_processes_render_what_one_does(bpe):
    rows = Dataset.from_dict({"id": [str(i) for i in range(30)], "messages": [talk("cat " * (3 * i + 1), "dog " * (i + 1)) for i in range(30)]})
    (one, counts), (several, same) = (data.render(rows, bpe, 60, drop=True, num_proc=n) for n in (None, 2))
    assert counts == same and 0 < counts["rows_dropped"] < 30 and several.column_names == one.column_names and several.to_list() == one.to_list()
    assert data.lengths(one) == data.lengths(several)
    sizes = [len(r["labels"]) for r in one]
    assert data.lengths(one)["tokens"] == sum(sizes) and data.lengths(one)["tokens_most"] == max(sizes)
    assert data.lengths(one)["response_share"] == round(sum(t != IGNORE for r in one for t in r["labels"]) / sum(sizes), 4)
    assert data.lengths(one.select([]))["tokens"] == 0


def test_pack_keeps_every_token_in_order(bpe):
    texts = ["the cat", "sat", "on the mat"] * 20
    blocks = data.pack(texts, bpe, 8)
    flat = [t for text in texts for t in [*bpe(text)["input_ids"], bpe.eos_token_id]]
    assert [t for b in blocks["input_ids"] for t in b] == flat[:len(flat) // 8 * 8]
    assert blocks["labels"] == blocks["input_ids"]


def test_budgets_are_nested_and_spread_over_skills():
    skills = [f"skill{i % 4}" for i in range(400)]
    order = data.nested_order(skills, seed=3)
    assert sorted(order) == list(range(400))
    for budget in (20, 100, 200):
        counts = {s: sum(skills[i] == s for i in order[:budget]) for s in set(skills)}
        assert all(abs(n - budget / 4) <= 2 for n in counts.values()), counts
    assert order == data.nested_order(skills, 3) != data.nested_order(skills, 4)


def test_budgets_of_many_small_categories_are_ordered_in_a_moment():
    class Site(str):
        looked_at, __hash__ = 0, str.__hash__

        def __eq__(self, other):
            Site.looked_at += 1
            return str.__eq__(self, other)

    assert sorted(data.nested_order([Site(i % 1000) for i in range(2000)], seed=0)) == list(range(2000))
    assert Site.looked_at < 10_000, "a pass for each category would be two million"


def test_rows_that_come_again_are_given_once():
    rows = data.Rows([("a", [{"x": i} for i in range(3)], [0, 2]), ("b", [{"x": 9}], [0])], order=[2, 0, 2, 2])
    assert [r["id"] for r in rows] == ["b/0", "a/0", "b/0", "b/0"] and [r["id"] for r in rows.once()] == ["a/0", "b/0"]


@pytest.mark.parametrize("reason, ids", [("stop", [1, 2, 3, 4, 5, 6, 7]), ("length", [1, 2, 3, 4, 5, 6]), (None, [1, 2, 3, 4, 5, 6, 7])])
def test_of_a_teachers_answer_only_its_own_words_are_learnt(reason, ids):
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, 2, -100, -100, 5, 6, 7], **({"finish_reason": reason} if reason else {})}
    assert data.own_words(row, 10, True if reason else False) == {"input_ids": ids, "labels": [-100, -100, -100, -100, 5, 6, 7][:len(ids)]}
    assert data.own_words(row, 5, False)["labels"] == [-100, -100, -100, -100, 5]


def test_stream_passes_over_all_rows_before_it_repeats_one():
    order = data.stream([[4, 8, 15, 16, 23]], steps=5, batch_size=3, seed=0)
    assert len(order) == 15 and all(sorted(order[i:i + 5]) == [4, 8, 15, 16, 23] for i in (0, 5, 10))
    assert order != data.stream([[4, 8, 15, 16, 23]], 5, 3, seed=1)


def test_pools_take_turns_whatever_their_size():
    order = data.stream([[1, 2], list(range(10, 40))], steps=6, batch_size=4, seed=0)
    assert all(i in (1, 2) for i in order[::2]) and len(set(order[1::2])) == 12 and min(order[1::2]) >= 10
    assert order[::2].count(1) == order[::2].count(2) == 6


def test_collator_pads_on_the_right_and_masks_the_padding():
    batch = data.Collator(9)([{"input_ids": [1, 2, 3, 4], "labels": [IGNORE, 2, 3, 4]}, {"input_ids": [5, 6], "labels": [5, 6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 9, 9]], "a last token predicts nothing"
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3, 4], [IGNORE, 6, IGNORE, IGNORE]], "nothing predicts a first token"
    assert batch["labels"].dtype == torch.long


def test_packing_loses_no_token_and_starts_positions_anew():
    lengths = (1, 2, 3, 5, 2, 1, 6, 4)
    rows = [{"id": str(n), "input_ids": [10 * n + i + 10 for i in range(k)], "labels": [IGNORE] + [10 * n + i + 10 for i in range(1, k)]}
            for n, k in enumerate(lengths)]
    batch = data.Collator(0, pack=True)(rows)
    assert "attention_mask" not in batch and batch["input_ids"].numel() < len(rows) * 5
    keys, found = [data.example_key(r["id"]) for r in rows], []
    for ids, labels, positions in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "position_ids"))):
        starts = [i for i, p in enumerate(positions) if p == 0 and ids[i]] + [len(ids)]
        for a, b in zip(starts, starts[1:]):
            own = [t for t in ids[a:b] if t]
            assert positions[a:a + len(own)] == list(range(len(own)))
            found.append((own, [t for t in labels[a + 1:a + 1 + len(own)] if t != IGNORE]))
    order = [rows[keys.index(k)] for k in batch["example"].tolist()]
    assert found == [(r["input_ids"][:max(1, len(r["input_ids"]) - 1)], r["labels"][1:]) for r in order] and len(order) == len(rows)
    assert (batch["labels"] != IGNORE).sum() == sum(k - 1 for k in lengths)


def rows_of(lengths):
    return [{"input_ids": [n + 1] * k, "labels": [IGNORE] + [n + 1] * (k - 1)} for n, k in enumerate(lengths)]


def test_rows_share_sequences_where_that_saves_a_tenth_of_the_tokens():
    for lengths in ([3] * 4, [70] * 4, [70, 69, 68], [3]):
        batch = data.Collator(0, pack=True)(rows_of(lengths))
        assert batch["input_ids"].shape == (len(lengths), max(lengths) - 1) and "attention_mask" in batch
    for seed in range(20):
        lengths = [random.Random(f"{seed} {i}").randint(2, 40) for i in range(random.Random(seed).randint(2, 33))]
        padded, packed = (data.Collator(0, pack)(rows_of(lengths)) for pack in (False, True))
        assert packed["input_ids"].shape[1] <= 2 * (max(lengths) - 1) and packed["input_ids"].numel() <= padded["input_ids"].numel()
    assert packed["input_ids"].numel() < 0.8 * padded["input_ids"].numel()


def test_long_rows_share_one_sequence_without_padding():
    batch = data.Collator(0, pack=True)(rows_of([5, 90, 41]))
    assert batch["rows"].tolist() == [89, 40, 4] and batch["input_ids"].shape == (1, 133) and batch["labels"].shape == (1, 134)
    assert batch["position_ids"].tolist() == [[*range(89), *range(40), *range(4)]]
    assert batch["input_ids"].tolist() == [[2] * 89 + [3] * 40 + [1] * 4]
    assert batch["labels"].tolist() == [[IGNORE] + [2] * 89 + [3] * 40 + [1] * 4]


@pytest.mark.parametrize("row", [{"input_ids": [1, 2, 3], "labels": [IGNORE, 2]}, {"input_ids": [], "labels": []}, {"input_ids": [1, 2]}])
def test_rows_without_a_label_for_each_token_are_refused(row):
    """Packed, they would shift the labels of all rows behind them."""
    with pytest.raises(ValueError, match=r"Every row needs input_ids and as many labels; one has \d and \d"):
        data.Collator(0, pack=True)([{"input_ids": [1, 2], "labels": [IGNORE, 2]}, row])
