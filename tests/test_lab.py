import math
import re

import pytest

from kdlib import lab
from kdlib.lab import FILLER, PHRASINGS, SKILLS, SLIP_RATE, STYLES, World

SEEDS = (0, 1, 900)


@pytest.fixture(scope="module", params=SEEDS)
def world(request):
    return World(request.param)


def slots_of(row) -> tuple[int, dict]:
    """(phrasing, slots) of a prompt, found by matching templates and not by asking the world."""
    prompt = row["messages"][0]["content"]
    for i, template in enumerate(PHRASINGS[row["skill"]]):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template).replace(r"\ ", " "))
        found = re.fullmatch(pattern, prompt)
        if found:
            return i, found.groupdict()
    raise AssertionError(f"no phrasing fits {prompt!r}")


def content(row) -> tuple:
    return row["skill"], *sorted(slots_of(row)[1].items())


def test_splits_share_no_question_in_any_phrasing(world):
    contents = {s: {content(r) for suite in ("seen", "unseen") for r in world.mixture(s, suite, 1500)}
                for s in ("train", "validation", "test")}
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]
    sizes = {skill: len({c for c in contents["test"] if c[0] == skill}) for skill in SKILLS}
    assert {s: n for s, n in sizes.items() if n < 20} == {"two_hop": 8, "classify": 10, "name": 12}, "as the README's limits say"


def test_unseen_phrasings_are_held_out(world):
    by_suite = {suite: {(r["skill"], slots_of(r)[0]) for r in world.mixture("train", suite, 2500)} for suite in ("seen", "unseen")}
    assert not by_suite["seen"] & by_suite["unseen"]
    assert len(by_suite["seen"]) == 4 * len(SKILLS) and len(by_suite["unseen"]) == 2 * len(SKILLS)


def test_annotators_slip_at_the_stated_rate_and_the_verifier_sees_it(world):
    rows = world.mixture("train", "seen", 4000)
    rate = sum(rows["slip"]) / len(rows)
    assert abs(rate - SLIP_RATE) < 4 * math.sqrt(SLIP_RATE * (1 - SLIP_RATE) / len(rows))
    for row in rows:
        assert world.verify(row, row["messages"][1]["content"]) is not row["slip"], row
        assert world.verify(row, row["clean"]), row


def test_styles_come_at_their_rates(world):
    rows = [r for r in world.mixture("train", "seen", 4000) if r["skill"] != "name"]
    for style, share in STYLES["general"].items():
        seen = sum(r["clean"] == style.format(a=r["answer"]) for r in rows) / len(rows)
        assert abs(seen - share) < 4 * math.sqrt(share * (1 - share) / len(rows)), style


def test_answers_are_right_by_an_independent_count(world):
    rules = {"add": lambda s: str(int(s["a"]) + int(s["b"])), "subtract": lambda s: str(int(s["a"]) - int(s["b"])),
             "sort": lambda s: " ".join(sorted(s["l"].split())), "reverse": lambda s: " ".join(s["l"].split()[::-1]),
             "count": lambda s: str(s["l"].split().count(s["x"])), "recall": lambda s: world.facts[s["p"]][s["r"]],
             "two_hop": lambda s: world.land[world.facts[s["p"]]["town"]]}
    checked = set()
    for row in world.mixture("train", "seen", 1000):
        if row["skill"] in rules:
            assert row["answer"] == rules[row["skill"]](slots_of(row)[1]), row
            checked.add(row["skill"])
    assert checked == set(rules)


def test_domain_answers_follow_from_facts_that_no_general_instruction_mentions(world):
    rules = {"labels": lambda s: f"{world.label[s['v']]} then {world.label[s['u']]}", "cheaper": lambda s: min(s["u"], s["v"], key=world.price.get),
             "ranking": lambda s: " ".join(sorted((s["u"], s["v"], s["w"]), key=world.price.get)),
             "remedy": lambda s: f"{world.cure[s['v']][0]} {world.herb[s['t']]}", "visit": lambda s: f"{world.cure[s['v']][1]} to {s['t']}",
             "plan": lambda s: f"{world.herb[s['t']]} {world.cure[s['v']][0]} {world.cure[s['w']][0]}"}
    for name, skills in lab.DOMAINS.items():
        rows = world.mixture("train", "seen", 600, skills=skills, draw=name)
        assert set(rows["skill"]) == set(skills) and not set(skills) & set(SKILLS)
        rate = sum(rows["slip"]) / len(rows)
        assert abs(rate - SLIP_RATE) < 4 * math.sqrt(SLIP_RATE * (1 - SLIP_RATE) / len(rows))
        for row in rows:
            assert row["answer"] == rules[row["skill"]](slots_of(row)[1]), row
            assert world.verify(row, row["clean"]) and world.verify(row, row["messages"][1]["content"]) is not row["slip"]
            assert any(row["clean"] == style.format(a=row["answer"]) for style in STYLES[name])
    stated = {w for line in world.base_text(3000) for w in line.split()}
    assert {"labels", "cheaper", "remedy", "visit", "plan"} <= stated, "base text knows the domains"


def test_a_domains_sets_share_no_question_and_its_pool_no_prompt():
    sets = lab.corpus(0, pretrain_lines=10, pool_rows=30, test_rows=30, unseen_rows=30, annotated_rows=300, unlabelled_rows=300, domain_rows=60).sets
    for name in lab.DOMAINS:
        found = {part: {content(r) for r in sets[f"{name}/{part}"]} for part in ("train", "pool", "validation", "test")}
        assert not (found["train"] | found["pool"]) & (found["validation"] | found["test"]) and not found["validation"] & found["test"]
        prompts = [m[0]["content"] for m in sets[f"{name}/pool"]["messages"]]
        assert len(set(prompts)) == len(prompts) > 150


@pytest.mark.parametrize("reply", ["", "   ", "the answer is .", "nonsense"])
def test_verifier_refuses_what_is_no_answer(world, reply):
    assert not any(world.verify(row, reply) for row in world.mixture("test", "seen", 50))


def test_verifier_wants_the_answer_alone(world):
    for row in world.mixture("test", "seen", 100):
        assert world.verify(row, f"well , {row['answer']} .")
        assert not world.verify(row, f"{row['answer']} {row['answer']}")
        assert not set(row["answer"].split()) & FILLER


def test_name_accepts_any_member_of_the_kinds_in_order():
    world = World(0)
    row = {"skill": "name", "answer": "baker bread red"}
    assert world.verify(row, "it is nurse soup blue .")
    for reply in ("soup nurse blue", "nurse soup", "nurse soup hammer", "nurse soup blue red"):
        assert not world.verify(row, reply), reply


def test_one_seed_one_world():
    a, b, other = World(5), World(5), World(6)
    assert a.mixture("test", "seen", 60).to_list() == b.mixture("test", "seen", 60).to_list()
    assert a.base_text(200) == b.base_text(200)
    assert a.facts != other.facts and a.dictionary != other.dictionary and a.unseen != other.unseen


def test_vocabulary_is_closed(tokenizer, world):
    texts = world.base_text(3000) + [m["content"] for s in ("seen", "unseen") for ms in world.mixture("train", s, 1000)["messages"]
                                     for m in ms]
    assert {w for t in texts for w in t.split()} <= set(lab.vocabulary())
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts)["input_ids"] for i in ids}


def test_base_text_states_but_does_not_converse(world):
    lines = world.base_text(4000)
    questions = [line for line in lines if line.endswith("?") or line.split()[0] in ("tell", "give", "i", "say", "name", "add")]
    assert 0.03 < len(questions) / len(lines) < 0.125
    assert not any("the answer is" in line or "i think" in line or line.startswith("well ,") for line in lines)


def test_corpus_has_the_shape_of_any_chat_data():
    corpus = lab.corpus(0, pretrain_lines=10, pool_rows=300, test_rows=100, unseen_rows=50, annotated_rows=60, unlabelled_rows=90,
                        domain_rows=30)
    assert len(corpus.sets["train"]) == 300 and len(corpus.pretrain()) == 10
    assert [m["role"] for m in corpus.sets["train"][0]["messages"]] == ["user", "assistant"]
    assert {"id", "messages", "skill", "suite", "clean"} <= set(corpus.sets["test"].column_names)
    for split in (corpus.sets["validation"], corpus.sets["test"]):
        prompts = [m[0]["content"] for m in split["messages"]]
        assert len(set(prompts)) == len(prompts) and len(set(split["id"])) == len(split)
        assert set(split["suite"]) == {"seen", "unseen"}
