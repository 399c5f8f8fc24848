"""The lab world: a seeded, procedural instruction world in plain text, with a verifier for every answer.

Its ten skills follow Tulu 3: knowledge (recall, two_hop, classify), mathematics (add, subtract, count), reasoning (sort, reverse), another
language (translate), precise instructions (name). Two domains have their own, which only base text knows: a *market* (labels, cheaper,
ranking of goods) and a *clinic* (remedy, visit, plan for animals in towns). Annotators answer in several styles and slip at a stated rate.
Training never asks what the test and validation splits do; a third of the general phrasings are *unseen*.
"""

import random
import tomllib
import zlib
from collections import namedtuple
from functools import partialmethod
from itertools import permutations
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from kdlib.data import Corpus

TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
NAMES, TOWNS, LANDS, FOREIGN, LETTERS = (TEXT[k].split() for k in ("names", "towns", "lands", "foreign", "letters"))
WORDS = {kind: members.split() for kind, members in TEXT["words"].items()}
STYLES, STATEMENTS, PHRASINGS = TEXT["styles"], TEXT["statements"], TEXT["phrasings"]
DOMAINS = {name: tuple(skills) for name, skills in TEXT["domains"].items()}
SKILLS = tuple(skill for skill in PHRASINGS if not any(skill in own for own in DOMAINS.values()))
FILLER = frozenset(w for styles in STYLES.values() for style in styles for w in style.split() if w != "{a}")
SLIP_RATE, LARGEST = 0.2, 20


Question = namedtuple("Question", "key slots answer slip")  # key identifies the content, slots fill the phrasings, slip is plausible but wrong


class World:
    """Facts, dictionary and phrasings of one world seed."""

    def __init__(self, world_seed: int):
        rng = random.Random(f"world {world_seed}")
        self.world_seed = world_seed
        self.land = {town: LANDS[i % len(LANDS)] for i, town in enumerate(rng.sample(TOWNS, len(TOWNS)))}
        self.pools = {"town": TOWNS, **{r: WORDS[r] for r in ("job", "food", "colour")}}
        self.facts = {p: {r: rng.choice(pool) for r, pool in self.pools.items()} for p in NAMES}
        self.dictionary = dict(zip(WORDS["colour"] + WORDS["animal"] + ["big", "small"], rng.sample(FOREIGN, len(FOREIGN))))
        self.noun_first = rng.random() < 0.5
        self.unseen = {skill: set(rng.sample(range(6), 2)) for skill in SKILLS}
        goods = WORDS["food"] + WORDS["tool"]
        self.label = {w: rng.choice(WORDS["colour"]) for w in goods}
        self.price = {w: price for price, w in enumerate(rng.sample(goods, len(goods)))}
        self.cure = {w: (rng.choice(WORDS["colour"]), rng.choice(WORDS["job"])) for w in WORDS["animal"]}
        self.herb = {town: rng.choice(WORDS["food"]) for town in TOWNS}
        small = {"recall": [f"{p} {r}" for p in NAMES for r in self.pools], "two_hop": NAMES,
                 "classify": [w for members in WORDS.values() for w in members], "name": list(map(" ".join, permutations(WORDS, 3)))}
        self.bucket = {(skill, key): 10 * i // len(keys) for skill, keys in small.items() for i, key in enumerate(rng.sample(keys, len(keys)))}

    def _recall(self, rng):
        p, r = rng.choice(NAMES), rng.choice(list(self.pools))
        answer = self.facts[p][r]
        return Question(f"{p} {r}", {"p": p, "r": r}, answer, rng.choice([v for v in self.pools[r] if v != answer]))

    def _two_hop(self, rng):
        p = rng.choice(NAMES)
        town = self.facts[p]["town"]
        land = self.land[town]
        return Question(p, {"p": p, "town": town}, land, rng.choice([x for x in LANDS if x != land]))

    def _sum(self, rng, sign):
        a = rng.randint(0, LARGEST)
        b = rng.randint(0, LARGEST - a if sign > 0 else a)
        return self._number(rng, f"{a} {b}", {"a": a, "b": b}, a + sign * b)

    _add = partialmethod(_sum, sign=1)
    _subtract = partialmethod(_sum, sign=-1)

    def _number(self, rng, key, slots, value):
        near = [v for v in range(max(0, value - 3), min(LARGEST, value + 3) + 1) if v != value]
        return Question(key, slots, str(value), str(rng.choice(near)))

    def _letters(self, rng, change):
        letters = rng.sample(LETTERS, rng.choice((3, 4)))
        text, answer = " ".join(letters), " ".join(change(letters))
        wrong = answer.split()
        while " ".join(wrong) == answer:
            rng.shuffle(wrong)
        return Question(text, {"l": text}, answer, " ".join(wrong))

    _sort = partialmethod(_letters, change=sorted)
    _reverse = partialmethod(_letters, change=lambda letters: letters[::-1])

    def _count(self, rng):
        letters = [rng.choice(LETTERS[:4]) for _ in range(rng.randint(3, 5))]
        x, text = rng.choice(LETTERS[:4]), " ".join(letters)
        return self._number(rng, f"{x} {text}", {"x": x, "l": text}, letters.count(x))

    def _translate(self, rng):
        words = [rng.choice(WORDS["colour"]), rng.choice(WORDS["animal"])]
        if rng.random() < 0.5:
            words.insert(0, rng.choice(["big", "small"]))
        foreign = [self.dictionary[w] for w in (words[::-1] if self.noun_first else words)]
        wrong, text = list(foreign), " ".join(words)
        wrong[rng.randrange(len(wrong))] = rng.choice([f for f in self.dictionary.values() if f not in foreign])
        return Question(text, {"s": text}, " ".join(foreign), " ".join(wrong))

    def _classify(self, rng):
        kind = rng.choice(list(WORDS))
        w = rng.choice(WORDS[kind])
        return Question(w, {"w": w}, kind, rng.choice([k for k in WORDS if k != kind]))

    def _name(self, rng):
        kinds = rng.sample(list(WORDS), 3)
        answer = [rng.choice(WORDS[k]) for k in kinds]
        wrong = list(answer)
        wrong[rng.randrange(3)] = rng.choice(WORDS[rng.choice([k for k in WORDS if k not in kinds])])
        return Question(" ".join(kinds), dict(zip("cde", kinds)), " ".join(answer), " ".join(wrong))

    def _goods(self, rng, count, say):
        goods = rng.sample(list(self.price), count)
        answer, wrong = say(self, goods).split(), goods[::-1]
        while wrong == answer:
            wrong = say(self, rng.sample(list(self.price), count)).split()
        return Question(" ".join(goods), dict(zip("uvw", goods)), " ".join(answer), " ".join(wrong))

    _labels = partialmethod(_goods, count=2, say=lambda self, goods: " then ".join(self.label[w] for w in goods[::-1]))
    _cheaper = partialmethod(_goods, count=2, say=lambda self, goods: min(goods, key=self.price.get))
    _ranking = partialmethod(_goods, count=3, say=lambda self, goods: " ".join(sorted(goods, key=self.price.get)))

    def _animals(self, rng, count, say):
        animals, town = rng.sample(list(self.cure), count), rng.choice(TOWNS)
        answer, wrong = say(self, animals, town), ""
        while wrong in ("", answer):
            wrong = say(self, rng.sample(list(self.cure), count), rng.choice(TOWNS))
        return Question(" ".join([*animals, town]), {"t": town, **dict(zip("vw", animals))}, answer, wrong)

    _remedy = partialmethod(_animals, count=1, say=lambda self, animals, town: f"{self.cure[animals[0]][0]} {self.herb[town]}")
    _visit = partialmethod(_animals, count=1, say=lambda self, animals, town: f"{self.cure[animals[0]][1]} to {town}")
    _plan = partialmethod(_animals, count=2, say=lambda self, animals, town: " ".join([self.herb[town], *(self.cure[w][0] for w in animals)]))

    def verify(self, row: dict, response: str) -> bool:
        """True if ``response``, without its style, answers ``row`` (``skill``, ``answer``); any words of the kinds for ``name``."""
        words = [w for w in response.split() if w not in FILLER]
        wanted = row["answer"].split()
        if row["skill"] != "name":
            return words == wanted
        kind = {w: k for k, members in WORDS.items() for w in members}
        return [kind.get(w) for w in words] == [kind[w] for w in wanted]

    def split_of(self, skill: str, key: str) -> str:
        """The split a question belongs to, fixed by its content: 20% test, 10% validation, 70% train."""
        bucket = self.bucket.get((skill, key), zlib.crc32(f"{self.world_seed} {skill} {key}".encode()) % 10)
        return "test" if bucket < 2 else "validation" if bucket == 2 else "train"

    def example(self, skill: str, split: str, suite: str, rng: random.Random) -> dict:
        """One instruction row: ``messages`` with an annotator's answer, and what the verifier needs."""
        question = (draw := getattr(self, f"_{skill}"))(rng)
        while self.split_of(skill, question.key) != split:
            question = draw(rng)
        phrasing = rng.choice([i for i in range(6) if skill not in self.unseen or (i in self.unseen[skill]) == (suite == "unseen")])
        prompt = PHRASINGS[skill][phrasing].format(**question.slots)
        styles = STYLES[next((name for name, own in DOMAINS.items() if skill in own), "general")]
        style = rng.choices(list(styles), list(styles.values()))[0]
        slip = rng.random() < SLIP_RATE
        text = style.format(a=question.slip if slip else question.answer)
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
                "clean": style.format(a=question.answer), "answer": question.answer, "skill": skill, "suite": suite, "slip": slip}

    def mixture(self, split: str, suite: str, rows: int, *, distinct: bool = False, skills: tuple = SKILLS, draw: str = "") -> Dataset:
        """Instruction rows, ``skills`` in ``rows`` turns; with ``distinct`` no prompt comes twice, and a skill that runs dry gives no more."""
        rng, out, seen, dry = random.Random(f"{self.world_seed} {split} {suite}{draw}"), [], set(), set()
        for i in range(rows):
            skill = skills[i % len(skills)]
            for _ in range(200 * (skill not in dry)):
                row = self.example(skill, split, suite, rng)
                prompt = row["messages"][0]["content"]
                if not distinct or prompt not in seen:
                    seen.add(prompt)
                    out.append({"id": f"{suite}/{skill}/{i}", **row})
                    break
            else:
                dry.add(skill)
        return Dataset.from_list(out)

    def base_text(self, lines: int) -> list[str]:
        """Pre-training text: facts and worked examples of every split; one line in eight is a bare question, none held out."""
        rng, out = random.Random(f"{self.world_seed} base text"), []
        for _ in range(lines):
            skill = rng.choice(SKILLS if rng.random() < 0.75 else [skill for own in DOMAINS.values() for skill in own])
            if rng.random() < 0.125:
                out.append(self.example(skill, "train", "seen", rng)["messages"][0]["content"])
            else:
                question = getattr(self, f"_{skill}")(rng)
                out.append(rng.choice(STATEMENTS[skill]).format(**question.slots, answer=question.answer))
        return out


def vocabulary() -> list[str]:
    """Every word that any world can use, in a fixed order."""
    words = [*NAMES, *TOWNS, *LANDS, *FOREIGN, *LETTERS, *map(str, range(LARGEST + 1)), *"big small town land then to".split()]
    words += [*(w for kind, members in WORDS.items() for w in (kind, *members)), *sorted(FILLER)]
    words += [w for forms in (PHRASINGS, STATEMENTS) for ps in forms.values() for p in ps for w in p.split() if w[0] != "{"]
    return list(dict.fromkeys(words))


def verifier(world_seed: int):
    """``verify(row, reply)`` of one world."""
    return World(world_seed).verify


def corpus(world_seed: int, *, pretrain_lines: int, pool_rows: int, test_rows: int, unseen_rows: int, annotated_rows: int,
           unlabelled_rows: int, domain_rows: int) -> Corpus:
    """The lab world as a :class:`~kdlib.data.Corpus`. Beside train, validation and test, every domain has ``train`` (``annotated_rows``),
    ``pool`` (distinct prompts, ``unlabelled_rows`` turns of the skills, whose answers nobody is to see), ``validation`` and ``test``.
    """
    world = World(world_seed)
    sets = {"train": world.mixture("train", "seen", pool_rows)}
    for split in ("validation", "test"):
        sets[split] = concatenate_datasets([world.mixture(split, suite, rows, distinct=True)
                                            for suite, rows in (("seen", test_rows), ("unseen", unseen_rows))])
    for name, own in DOMAINS.items():
        sets[f"{name}/train"] = world.mixture("train", "seen", annotated_rows, skills=own, draw=name)
        sets[f"{name}/pool"] = world.mixture("train", "seen", unlabelled_rows, distinct=True, skills=own, draw=f"{name} pool")
        for split in ("validation", "test"):
            sets[f"{name}/{split}"] = world.mixture(split, "seen", domain_rows, distinct=True, skills=own, draw=name)
    return Corpus(pretrain=lambda: world.base_text(pretrain_lines), sets=sets, vocabulary=vocabulary())
