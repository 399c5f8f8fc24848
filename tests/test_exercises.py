"""The exercise sheets: solutions pass, stubs and usual mistakes get a sentence that helps, and nothing that an answer does is raised."""

import random
import re
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy import stats as scipy_stats

from kdlib.results import REPOSITORY

FOLDER = REPOSITORY / "notebooks" / "exercises"
SHEETS = sorted(FOLDER.glob("[1-5]_*.ipynb"))
GUIDE = FOLDER / "guide.ipynb"
sys.path.insert(0, str(FOLDER))
import checks  # noqa: E402

CALL = re.compile(r'^check\("(\w+)", (\w+)\)$', re.M)


def answers(path):
    """What the cells of a sheet define, by exercise, in one namespace."""
    names, found = {"np": np, "pd": pd, "torch": torch, "F": F, "scipy_stats": scipy_stats, "random": random}, {}
    for cell in nbformat.read(path, 4).cells:
        for name, variable in CALL.findall(cell.source) if cell.cell_type == "code" else ():
            exec(CALL.sub("", cell.source), names)
            found[name] = names[variable]
    return found


def by_sheet(paths=SHEETS):
    return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def test_there_are_five_sheets_with_solutions_and_every_check_has_its_exercise():
    assert len(SHEETS) == 5 and [p.name for p in SHEETS] == [p.name for p in sorted((FOLDER / "solutions").glob("*.ipynb"))]
    asked = [name for p in SHEETS for name in answers(p)]
    assert asked == list(checks.EXERCISES) and len(asked) >= 12
    assert asked == [name for p in SHEETS for name in answers(FOLDER / "solutions" / p.name)]


@by_sheet()
def test_a_sheet_says_difficulty_and_time_and_hints(path):
    texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown" and c.source.startswith("## ") and "★" in c.source]
    rows = re.findall(r"^\| (\d\.\d) \| (.+?) \| ([★☆]{3}) \| (\d+) min \|$", texts and nbformat.read(path, 4).cells[0].source, re.M)
    assert len(rows) == len(texts) == len(answers(path))
    assert [checks.EXERCISES[name].number for name in answers(path)] == [number for number, *_ in rows]
    for text, (number, title, stars, minutes) in zip(texts, rows):
        assert text.startswith(f"## {number} {title}\n\n{stars} · {minutes} min\n") and "<details><summary>Hint</summary>" in text


@by_sheet()
def test_every_solution_passes(path):
    for name, answer in answers(FOLDER / "solutions" / path.name).items():
        assert checks.diagnose(name, answer) == (True, "right."), name


@by_sheet()
def test_every_stub_fails_with_what_is_expected(path):
    for name, stub in answers(path).items():
        solved, message = checks.diagnose(name, stub)
        assert not solved and checks.EXERCISES[name].expects in message and "nothing is written yet" in message

def per_token(s, t, labels, T, a, reduce, keep=None, square=True):
    keep = labels != -100 if keep is None else keep
    ce = F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    kl = F.kl_div((s / T).log_softmax(-1), (t / T).log_softmax(-1), log_target=True, reduction="none").sum(-1) * (labels != -100)
    return reduce((1 - a) * ce + a * kl * (T * T if square else 1), keep)


def shares(n, skills):
    return {k: round(n * skills.count(k) / len(skills)) for k in set(skills)}


def anew(skills, n, seed):
    rng = random.Random(seed * 1000 + n)
    return [i for k, m in sorted(shares(n, skills).items()) for i in rng.sample([j for j, s in enumerate(skills) if s == k], m)]


def by_seed(budgets, gaps, x):
    return np.array([-np.polyfit(x(np.array(budgets)), g, 1)[0] for g in gaps])


def bucket(s, t, k, keep_rest, own_ids=False):
    p, q = t.softmax(-1), s.softmax(-1)
    ids = (q if own_ids else p).topk(k).indices
    a, b = p.gather(1, ids), q.gather(1, ids)
    out = (a * (a / b).log()).sum(1)
    return out + (1 - a.sum(1)) * ((1 - a.sum(1)) / (1 - b.sum(1))).log() if keep_rest else out


def decide(low, high, delta):
    return "supported" if low > 0 else "refuted" if high < 0 else "no meaningful difference" if max(-low, high) < delta else "inconclusive"


def cells(frame, by, how="mean"):
    return getattr(frame.groupby([by, "method"]).accuracy, how)().unstack()


GEN = "{% for m in messages %}<|{{ m.role }}|>BODY{% endfor %}"
WRONG = [  # written as a learner might, each with words of the diagnosis that it should get
    ("soften", lambda logits, temperature: torch.log_softmax(temperature * logits, dim=1), "multiplied"),
    ("soften", lambda logits, temperature: torch.softmax(logits / temperature, dim=1), "probabilities"),
    ("soften", lambda logits, temperature: torch.log_softmax(logits / temperature, dim=0), "dim 0"),
    ("soften", lambda logits, temperature: torch.log_softmax(logits, dim=1) / temperature, "after normalising"),
    ("forward_kl", lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1), "reverse KL"),
    ("forward_kl", lambda s, t: F.cross_entropy(s, t.softmax(-1), reduction="none"), "soft cross-entropy"),
    ("forward_kl", lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").mean(-1), "mean over the vocabulary"),
    ("forward_kl", lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1) / np.log(2), "bits"),
    ("forward_kl", lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"), "one number"),
    ("cache_bytes", lambda prompt_tokens, response_tokens, k: (prompt_tokens + response_tokens) * (6 * k + 4), "prompt tokens"),
    ("cache_bytes", lambda prompt_tokens, response_tokens, k: response_tokens * (2 * k + 4), "forgot the ids"),
    ("cache_bytes", lambda prompt_tokens, response_tokens, k: 6 * k * response_tokens, "mass of all other"),
    ("template", GEN.replace("BODY", "{{ m.content }}{{ eos_token }}"), "nothing is marked"),
    ("template", "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
     "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", "a space stands between"),
    ("template", GEN.replace("BODY", "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"), "every turn is marked"),
    ("template", GEN.replace("BODY", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"),
     "never learn to stop"),
    ("accumulated", lambda means, tokens, sequences: sum(means) / len(means), "mean of means"),
    ("accumulated", lambda means, tokens, sequences: np.average(means, weights=sequences), "sequences"),
    ("accumulated", lambda means, tokens, sequences: (means * tokens).sum(), "sum over tokens"),
    ("labels_of", lambda ids, turns: [t if any(a <= i < b for a, b in turns) else -100 for i, t in enumerate(ids)], "ends a turn"),
    ("labels_of", lambda ids, turns: [t if any(a <= i <= b for a, b in turns) else 0 for i, t in enumerate(ids)], "0 is a token"),
    ("labels_of", lambda ids, turns: ids, "learn the prompts"),
    ("next_token_loss", lambda logits, labels: F.cross_entropy(logits, labels), "its own token"),
    ("next_token_loss", lambda logits, labels: F.cross_entropy(logits, torch.roll(labels, -1)), "roll brings"),
    ("next_token_loss", lambda logits, labels: F.cross_entropy(logits[1:], labels[:-1]), "wrong way"),
    ("next_token_loss", lambda logits, labels: F.cross_entropy(logits[:-1], labels[1:], reduction="sum"), "this is the sum"),
    ("paired_interval", lambda kd, sft: scipy_stats.ttest_ind(kd, sft, equal_var=False).confidence_interval(), "independent"),
    ("paired_interval", lambda kd, sft: ((kd - sft).mean() - 1.96 * scipy_stats.sem(kd - sft), (kd - sft).mean() + 1.96 * scipy_stats.sem(kd - sft)), "1.96"),
    ("paired_interval", lambda kd, sft: scipy_stats.t.interval(0.95, len(kd) - 1, (kd - sft).mean(), np.std(kd - sft) / len(kd)**0.5), "ddof"),
    ("paired_interval", lambda kd, sft: scipy_stats.t.interval(0.95, len(kd) - 1, (sft - kd).mean(), scipy_stats.sem(sft - kd)), "sign"),
    ("holm", lambda p: np.clip(p * len(p), 0, 1), "Bonferroni"),
    ("holm", lambda p: scipy_stats.false_discovery_control(p), "Benjamini"),
    ("holm", lambda p: np.maximum.accumulate(np.minimum(1, np.sort(p) * np.arange(len(p), 0, -1))), "sorted"),
    ("holm", lambda p: p, "as they were"),
    ("batch_loss", lambda *c: per_token(*c, lambda x, keep: x.sum() / len(x)), "number of sequences"),
    ("batch_loss", lambda *c: per_token(*c, lambda x, keep: x.mean()), "masked ones included"),
    ("batch_loss", lambda *c: per_token(*c, lambda x, keep: (x.sum(1) / keep.sum(1)).mean()), "mean of every sequence"),
    ("batch_loss", lambda *c: per_token(*c, lambda x, keep: x.sum() / keep.sum(), square=False), "T² is missing"),
    ("batch_loss", lambda s, t, y, T, a: (1 - a) * F.cross_entropy(s.flatten(0, 1), y.flatten(), ignore_index=-100) + a * T * T * F.kl_div(
        (s / T).log_softmax(-1), (t / T).softmax(-1), reduction="none").sum(-1).mean(), "both need the mask"),
    ("batch_loss", lambda s, t, y, T, a: (1 - a) * F.cross_entropy(s.flatten(0, 1), y.flatten(), ignore_index=-100) + a * T * T * F.kl_div(
        (s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean"), "batchmean"),
    ("batch_loss", lambda s, t, y, T, a: per_token(s, t, y, T, 1 - a, lambda x, keep: x.sum() / keep.sum()), "wrong side"),
    ("gradient", lambda s, t, T: T * ((t / T).softmax(-1) - (s / T).softmax(-1)), "sign is wrong"),
    ("gradient", lambda s, t, T: ((s / T).softmax(-1) - (t / T).softmax(-1)) / T, "left out T²"),
    ("gradient", lambda s, t, T: T * T * ((s / T).softmax(-1) - (t / T).softmax(-1)), "inner derivative"),
    ("budget", lambda skills, n, seed: anew(skills, n, seed), "no part of the large"),
    ("budget", lambda skills, n, seed: [of[i % len(of)][i // len(of)] for of in [[random.Random(seed).sample(
        [j for j, s in enumerate(skills) if s == k], skills.count(k)) for k in sorted(set(skills))]] for i in range(n)], "ignore how often"),
    ("budget", lambda skills, n, seed: np.random.default_rng(seed).permutation(len(skills))[:n].tolist(), "leaves that to chance"),
    ("budget", lambda skills, n, seed: range(n), "first rows"),
    ("verdict", lambda low, high, d: "supported" if low > 0 else "refuted" if high < 0 else "no meaningful difference", "does not show that there is no"),
    ("verdict", lambda low, high, d: "supported" if low > 0 else "refuted" if high < 0 else "inconclusive", "is a finding"),
    ("verdict", lambda low, high, d: "no meaningful difference" if -d < low and high < d else decide(low, high, d), "supported all the same"),
    ("verdict", lambda low, high, d: decide(low - d if low > 0 else low, high + d if high < 0 else high, d), "not the bar"),
    ("fall_per_doubling", lambda b, g: by_seed(b, g, np.log), "factor e"),
    ("fall_per_doubling", lambda b, g: -by_seed(b, g, np.log2), "sign is wrong"),
    ("fall_per_doubling", lambda b, g: by_seed(b, g, lambda x: x), "per example"),
    ("top_k_kl", lambda s, t, k: bucket(s, t, k, keep_rest=False), "bucket is missing"),
    ("top_k_kl", lambda s, t, k: bucket(s, t, k, keep_rest=True, own_ids=True), "student's top k"),
    ("top_k_kl", lambda s, t, k: F.kl_div(*(x.gather(1, t.topk(k).indices).log_softmax(-1) for x in (s, t)), log_target=True, reduction="none").sum(1), "on both sides"),
    ("sampled_loss", lambda q, p, d: -(p.gather(1, d) * q.gather(1, d)).mean(1), "counts these twice"),
    ("sampled_loss", lambda q, p, d: -q.gather(1, d).sum(1), "this is the sum"),
    ("sampled_loss", lambda q, p, d: q.gather(1, d).mean(1), "sign is wrong"),
    ("shared_vocabulary", lambda t, v: t.log_softmax(-1)[:, :v], "cut after the softmax"),
    ("shared_vocabulary", lambda t, v: t[:, :v].softmax(-1), "probabilities"),
    ("shared_vocabulary", lambda t, v: t[:, :v], "these are logits"),
    ("mixture", lambda h, s, n: [([*h, *s] * n)[i] for i in range(n)], "swamps the small"),
    ("mixture", lambda h, s, n: [x for pair in zip(h, s) for x in pair], "smaller pool is used up"),
    ("mixture", lambda h, s, n: [(s, h)[i % 2][i // 2 % len((s, h)[i % 2])] for i in range(n)], "first turn"),
    ("needs_all", lambda found, d: decide(*(sum(x) / len(found) for x in zip(*found)), d), "average hides"),
    ("needs_all", lambda found, d: max((v := [decide(*i, d) for i in found]), key=lambda x: (v.count(x), [-ord(c) for c in x])), "majority"),
    ("needs_all", lambda found, d: decide(*min(found), d), "reaches far down"),
    ("needs_all", lambda found, d: "supported" if any(low > 0 for low, _ in found) else min((decide(*i, d) for i in found), key=["refuted", "inconclusive", "no meaningful difference"].index), "one win is not enough"),
    ("needs_all", lambda found, d: [decide(*i, d) for i in found][-1], "only the last"),
    ("needs_all", lambda found, d: min((decide(*i, d) for i in found), key=["refuted", "no meaningful difference", "inconclusive", "supported"].index), "a finding"),
    ("needs_all", lambda found, d: "supported" if all(low > 0 for low, _ in found) else "refuted", "as open as its weakest"),
    ("lead", lambda f: cells(f, "domain")["human_sft"] - cells(f, "domain")["kd_then_sft"], "sign is wrong"),
    ("lead", lambda f: cells(f, "budget")["kd_then_sft"] - cells(f, "budget")["human_sft"], "one number a budget"),
    ("lead", lambda f: cells(f, "domain", "max")["kd_then_sft"] - cells(f, "domain", "max")["human_sft"], "best run"),
]


def test_three_usual_mistakes_of_every_exercise_were_written():
    assert set(checks.EXERCISES) == {name for name, *_ in WRONG} and all(sum(n == name for n, *_ in WRONG) >= 3 for name in checks.EXERCISES)


@pytest.mark.parametrize("name, answer, words", WRONG, ids=[f"{n}-{w}" for n, _, w in WRONG])
def test_a_usual_mistake_is_named(name, answer, words):
    solved, message = checks.diagnose(name, answer)
    assert not solved and words in message


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_mistakes_are_told_apart(name):
    exercise = checks.EXERCISES[name]
    assert len(exercise.wrong) >= 3
    for message, mistake in exercise.wrong.items():
        named = mistake if exercise.see else lambda *given, mistake=mistake: mistake(**dict(zip(exercise.cases[0], given)))
        solved, said = checks.diagnose(name, named)
        assert not solved and said == message


def raises(*_, **__):
    raise RuntimeError("a\nlong  story")


PRINT = print  # Ray puts another in its place


@pytest.mark.parametrize("name", checks.EXERCISES)
@pytest.mark.parametrize("answer", [
    None, 3, "a", [], object(), float("nan"), raises, PRINT, lambda: None, lambda *a, **k: None, lambda *a, **k: "text", lambda *a, **k: [[1], [2, 3]],
    lambda *a, **k: {}, lambda *a, **k: torch.zeros(2, 3, 4), lambda *a, **k: float("nan"), lambda *a, **k: object(), lambda *a, **k: [None], "{% for %}", "{{ messages[9].x.y }}",
    lambda *a, **k: torch.zeros(3, dtype=torch.bfloat16), lambda *a, **k: [torch.zeros(2, requires_grad=True)], lambda *a, **k: sys.exit(1)], ids=range(22))
def test_no_answer_crashes_a_check(name, answer, capsys):
    checks.check(name, answer)
    *printed, said = capsys.readouterr().out.splitlines()
    assert said.startswith(f"✗ {checks.EXERCISES[name].number} {name}: ") and (answer is PRINT or not printed)


class Unspeakable(str):
    """What raises when it is compared, shown or hashed."""

    __eq__ = __hash__ = __str__ = __repr__ = raises


class UnspeakableError(Exception):
    __str__ = raises


def throws(*_, **__):
    raise UnspeakableError


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_not_even_an_answer_that_cannot_be_shown_crashes_a_check(name):
    for answer in (throws, Unspeakable(), lambda *a, **k: Unspeakable(), lambda *a, **k: [Unspeakable()]):
        solved, message = checks.diagnose(name, answer)
        assert not solved and (checks.EXERCISES[name].expects in message or message.startswith("not yet"))
    assert not checks.diagnose(Unspeakable(), raises)[0]


def test_a_series_in_another_order_is_the_same_and_a_large_array_is_shown_where_it_differs():
    assert checks.diagnose("lead", lambda frame: checks.EXERCISES["lead"].right(frame).iloc[::-1])[0]
    solved, message = checks.diagnose("soften", lambda logits, temperature: F.log_softmax(logits / temperature, -1) + 0.5 * (torch.arange(logits.shape[1]) == 2))
    assert not solved and " at [0, 2], where " in message


def test_a_name_that_is_no_exercise_is_said(capsys):
    for name in ("softn", None, []):
        checks.check(name, None)
        assert capsys.readouterr().out.startswith(f"✗ {name}: there is no such exercise; there are soften, ")


def test_rows_that_break_several_rules_at_once_get_all_of_them():
    solved, message = checks.diagnose("budget", lambda skills, n, seed: [len(skills) + i for i in range(n)])
    assert not solved and message == "not yet. What does not hold: no row twice, every skill in proportion, other rows with another seed."


def test_an_answer_cannot_spoil_the_cases():
    def spoils(logits, temperature):
        logits.zero_()
        return logits

    before = checks.EXERCISES["soften"].cases[0]["logits"].clone()
    assert not checks.diagnose("soften", spoils)[0] and torch.equal(checks.EXERCISES["soften"].cases[0]["logits"], before)


def test_the_guide_plans_two_lessons_that_fit_their_time():
    text = "\n".join(c.source for c in nbformat.read(GUIDE, 4).cells if c.cell_type == "markdown")
    minutes = {n: int(m) for p in SHEETS for n, m in re.findall(r"\| (\d\.\d) \|.*\| (\d+) min \|", nbformat.read(p, 4).cells[0].source)}
    for heading, whole in (("Ninety minutes", 90), ("Three hours", 180)):
        rows = re.findall(r"^\| (\d+)–(\d+) \| (.+?) \|", text.split(f"## {heading}")[1].split("## ")[0], re.M)
        times = [(int(a), int(b)) for a, b, _ in rows]
        assert times[0][0] == 0 and times[-1][1] == whole and all(a[1] == b[0] for a, b in zip(times, times[1:]))
        for (start, end), (*_, what) in zip(times, rows):
            asked = [n for first, _, last in re.findall(r"(\d\.\d)( to (\d\.\d))?", what) for n in minutes if first <= n <= (last or first)]
            assert sum(minutes[n] for n in asked) <= end - start, what
    for path in SHEETS:
        own = sum(m for n, m in minutes.items() if n[0] == path.name[0])
        assert re.search(rf"\| \[.+\]\({path.name}\) \| {own} \|", text), path.name
    assert text.split("## What students get wrong")[1].count('| "') >= 8
    assert all((FOLDER / target).exists() for target in re.findall(r"\]\(([\w./-]+)\)", text))


@pytest.mark.parametrize("path", [*SHEETS, *(FOLDER / "solutions" / p.name for p in SHEETS), GUIDE], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_sheets_are_stored_as_one_clean_run_that_any_viewer_opens(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)) and nb.metadata.keys() == {"kernelspec"}
    assert not [o for c in cells for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert nb.cells[0].source.startswith("# ") and not [c for c in nb.cells if "execution" in c.metadata]


def test_the_guides_records_are_whole_and_of_this_code():
    from kdlib import results, study

    for experiment, least in (("data_budget", 80), ("teacher_strength", 80), ("two_stage_domain", 160)):
        there = []
        for settings in ({}, {"temperature": 4.0}, {"alpha": 0.5})[:3 if experiment == "data_budget" else 1]:
            plan = study.plan(experiment, {"preset": "smoke", "results_dir": str(FOLDER / "expected"), "seeds": list(range(10)), "train_missing": False, **settings})
            there += results.read_records(plan.root, "smoke", plan.ids)
        assert len({r["run_id"] for r in there}) >= least, experiment


def test_what_the_guide_says_of_its_table_is_in_its_records():
    names = {"display": lambda *_: None}
    for cell in nbformat.read(GUIDE, 4).cells:
        if cell.id in ("g-02", "g-07", "g-08"):
            exec(cell.source.replace("pd.concat(", "table = pd.concat("), names)
    table = names["table"]
    ends = {metric: table[f"lead in {metric}"].str.extract(r"\((\S+) to (\S+)\)").astype(float) for metric in ("accuracy", "NLL")}
    holds_zero = (ends["accuracy"][0] <= 0) & (ends["accuracy"][1] >= 0)
    assert holds_zero.mean() > 0.8
    low, high = ends["NLL"][0], ends["NLL"][1]
    for cell in table.index.levels[0]:
        if cell.startswith(("02", "03")):
            assert low[cell, 100] > 0 and abs(low[cell, 1600]) < low[cell, 100]
            assert high[cell, 1600] < 0 if "strong" in cell or "temperature 4" in cell else low[cell, 1600] > 0
        else:
            means = table["lead in NLL"].str.split().str[0].astype(float)
            assert (means[cell] < 0).all()
    known = names["frames"]["teacher_strength"].groupby(["arm", "budget"])[["nll", "nll_clean", "teacher_accuracy", "teacher_nll", "teacher_ece"]].mean()
    strong, sft = known.loc["kd strong", 1600], known.loc["sft", 1600]
    assert strong.nll_clean > sft.nll_clean and sft.nll < strong.teacher_nll
    for other in ("kd weak", "kd base"):
        assert strong.teacher_accuracy > known.loc[other, 1600].teacher_accuracy and strong.teacher_ece > 2 * known.loc[other, 1600].teacher_ece
    assert names["frames"]["two_stage_domain"].label_accuracy.max() < 0.06
