"""Checks of the exercise sheets: ``check(name, answer)`` says whether an answer is right, or which mistake would give what it gives.

An answer is run on small cases and compared with the right one's results; where they differ, with those of known mistakes.
"""

import copy
import inspect
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats as scipy_stats

from kdlib import losses, stats
from kdlib.data import IGNORE, nested_order
from kdlib.models import build_tokenizer


class Exercise(NamedTuple):
    """``right`` on ``cases`` (arguments by name) gives what ``expects`` describes; ``wrong`` are mistakes by what to say of them. ``see`` turns an
    answer and a case into what is compared, by default the function's result, ``kind`` is what an answer has to be.
    """

    number: str
    expects: str
    right: object
    cases: list[dict]
    wrong: dict[str, object]
    see: Callable | None = None
    kind: str = "function"


EXERCISES: dict[str, Exercise] = {}


def check(name: str, answer) -> None:
    """Print whether ``answer`` solves the exercise, and if it does not, the likely mistake."""
    right, message = diagnose(name, answer)
    number = f"{EXERCISES[name].number} " if type(name) is str and name in EXERCISES else ""
    print(f"{'✓' if right else '✗'} {number}{name}: {message}")


def solved(name: str, answer) -> bool:
    """Whether ``answer`` solves exercise ``name``; nothing is printed."""
    return diagnose(name, answer)[0]


def diagnose(name: str, answer) -> tuple[bool, str]:
    """Whether ``answer`` solves exercise ``name``, and what to say of it; nothing that an answer does is raised."""
    if type(name) is not str or name not in EXERCISES:
        return False, f"there is no such exercise; there are {', '.join(EXERCISES)}."
    try:
        return _judged(EXERCISES[name], answer)
    except Exception:  # an answer may hold what raises when it is compared or shown
        return False, f"what it gives cannot be compared. Expected: {EXERCISES[name].expects}."


def _judged(task: Exercise, answer) -> tuple[bool, str]:
    if answer is None:
        return False, f"nothing is written yet. Expected: {task.expects}."
    if task.kind == "function" and not callable(answer) or task.kind == "text" and not isinstance(answer, str):
        return False, f"a {task.kind} is wanted, not {_named(answer)}. Expected: {task.expects}."
    seen, see = [], task.see or (lambda answer, case: answer(*case.values()))  # whatever a learner calls the arguments
    for case in task.cases:
        try:
            seen.append(see(answer, copy.deepcopy(case)))
        except (Exception, SystemExit) as error:  # whatever a learner's code does
            return False, f"your {task.kind} raises {type(error).__name__}: {_short(error)}. Expected: {task.expects}."
        if seen[-1] is None:
            return False, f"nothing is written yet, or `return` is missing. Expected: {task.expects}."
    wanted = _results(task, task.right)
    if all(_same(got, want) for got, want in zip(seen, wanted)):
        return True, "right."
    for message, mistake in task.wrong.items():
        if all(_same(got, other) for got, other in zip(seen, _results(task, mistake))):
            return False, message
    for got, want in zip(seen, wanted):
        if difference := _unlike(got, want):
            return False, f"{difference}. Expected: {task.expects}."
    got, want, case = next((g, w, c) for g, w, c in zip(seen, wanted, task.cases) if not _same(g, w))
    if isinstance(want, dict):
        return False, f"not yet. What does not hold: {', '.join(k if want[k] is True else f'{k}, {got[k]!r} instead of {want[k]!r}' for k in want if got[k] != want[k])}."
    return False, f"not yet, and not by a mistake that is known here. With {_shown(case)} it gives {_contrast(got, want)}."


def _results(task: Exercise, answer) -> list:
    return [(task.see or (lambda answer, case: answer(**case)))(answer, copy.deepcopy(case)) for case in task.cases]


def _plain(value):
    """Numbers as an array of doubles; else None."""
    try:
        value = [_plain(v) for v in value] if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value) else value
        value = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else value
        found = np.asarray(value.to_numpy() if isinstance(value, (pd.Series, pd.DataFrame)) else value)
        return None if found.dtype.kind not in "biuf" else found.astype(float)
    except Exception:  # rows of unequal lengths, or what no array holds
        return None


def _unlike(got, want) -> str:
    """How ``got`` differs from ``want`` in kind or shape; empty if it does not."""
    if isinstance(want, str):
        return "" if isinstance(got, str) else f"it gives {_named(got)}, not text"
    if isinstance(want, dict):
        return "" if isinstance(got, dict) and got.keys() == want.keys() else f"it gives {_named(got)}"
    a, b = _plain(got), _plain(want)
    if a is None:
        return f"it gives {_named(got)}, not numbers"
    return "" if a.shape == b.shape else f"it gives {'one number' if a.shape == () else f'shape {a.shape}'}, not {'one number' if b.shape == () else f'shape {b.shape}'}"


def _same(got, want) -> bool:
    if isinstance(want, (str, dict)):
        return got == want
    a, b = _plain(got), _plain(want)
    return a is not None and a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-6)


def _named(value) -> str:
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' or type(value).__name__ == 'ndarray' else 'a'} {type(value).__name__}"


def _short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:117] + "…"


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} = {_shown(v)}" for k, v in value.items())
    if (numbers := _plain(value)) is None:
        return _short(repr(value))
    if numbers.size > 12:
        return f"an array of shape {numbers.shape}"
    return _short(np.array2string(numbers, precision=4, separator=", ").replace("\n", ""))


def _contrast(got, want) -> str:
    """Both in whole if they are short, else the first place where they differ."""
    a, b = _plain(got), _plain(want)
    if b is None or b.size <= 12:
        return f"{_shown(got)}, where {_shown(want)} is right"
    at = tuple(int(i) for i in np.argwhere(~np.isclose(a, b, rtol=1e-4, atol=1e-6))[0])
    return f"{a[at]:.4g} at {list(at)}, where {b[at]:.4g} is right"


def exercise(name: str, number: str, expects: str, **parts) -> None:
    """Enter an exercise."""
    EXERCISES[name] = Exercise(number, expects, **parts)


def _logits(*shape, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Sheet 1: the loss

_PAIR = [{"student_logits": _logits(4, 7, seed=1), "teacher_logits": _logits(4, 7, seed=2)}, {"student_logits": _logits(1, 3, seed=3), "teacher_logits": _logits(1, 3, seed=4)}]

exercise("soften", "1.1", "log-probabilities of shape (N, V)", right=lambda logits, temperature: F.log_softmax(logits / temperature, -1),
         cases=[{"logits": _logits(3, 5, seed=5), "temperature": 2.0}, {"logits": _logits(5, 4, seed=6), "temperature": 0.5}], wrong={
    "you multiplied by the temperature; a higher temperature has to flatten the distribution, so divide by it.": lambda logits, temperature: F.log_softmax(logits * temperature, -1),
    "these are probabilities; take their logarithm (log_softmax does both, and stays exact where a probability is tiny).": lambda logits, temperature: F.softmax(logits / temperature, -1),
    "you normalised over the rows (dim 0); every row is one token to predict, so normalise over the vocabulary, the last dimension.": lambda logits, temperature: F.log_softmax(logits / temperature, 0),
    "you divided the log-probabilities by the temperature after normalising, so the probabilities do not sum to one; divide the logits.": lambda logits, temperature: F.log_softmax(logits, -1) / temperature,
    "the temperature changes nothing in your function; divide the logits by it.": lambda logits, temperature: F.log_softmax(logits, -1),
    "these are logits still; log_softmax makes log-probabilities of them.": lambda logits, temperature: logits / temperature,
    "two things: divide by the temperature instead of multiplying, and take the logarithm.": lambda logits, temperature: F.softmax(logits * temperature, -1)})


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def _both(student_logits, teacher_logits, temperature=1.0):
    return F.log_softmax(teacher_logits / temperature, -1), F.log_softmax(student_logits / temperature, -1)


exercise("forward_kl", "1.2", "one divergence a row, in nats, shape (N,)", right=lambda student_logits, teacher_logits: losses.divergence(student_logits, teacher_logits), cases=_PAIR, wrong={
    "this is the reverse KL: the expectation has to be under the teacher's probabilities.": lambda student_logits, teacher_logits: _kl(*_both(student_logits, teacher_logits)[::-1]),
    "this is the soft cross-entropy; subtract the teacher's entropy, so that equal models have a divergence of zero.": lambda student_logits, teacher_logits: -(F.softmax(teacher_logits, -1) * F.log_softmax(student_logits, -1)).sum(-1),
    "you took the mean over the vocabulary; a divergence is a sum over it, else a larger vocabulary would have a smaller loss.": lambda student_logits, teacher_logits: _kl(*_both(student_logits, teacher_logits)) / student_logits.shape[-1],
    "this is in bits; the loss is in nats, so use the natural logarithm.": lambda student_logits, teacher_logits: _kl(*_both(student_logits, teacher_logits)) / math.log(2),
    "the sign is wrong: KL(p ‖ q) is the expectation of log p − log q, which is never below zero.": lambda student_logits, teacher_logits: -_kl(*_both(student_logits, teacher_logits))})


def _batch(student_logits, teacher_logits, labels, temperature, alpha, power=2, at=1.0, kl_at=None, kl=_kl):
    """Sums over the tokens in the loss, of (1 − α)·CE + α·T²·KL."""
    learned = labels != IGNORE
    p, q = _both(student_logits[learned], teacher_logits[learned], kl_at or temperature)
    ce = F.cross_entropy(student_logits[learned] / at, labels[learned], reduction="none")
    return ((1 - alpha) * ce + alpha * temperature**power * kl(p, q)).sum(), learned


def _per_token(**c):
    total, learned = _batch(**c)
    return total / learned.sum()


def _unmasked_kl(per, student_logits, teacher_logits, labels, temperature, alpha):
    """The cross-entropy of what has a label, and the divergence of everything, divided by ``per`` of its shape (B, L)."""
    kl = _kl(*_both(student_logits, teacher_logits, temperature))
    ce = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    return (1 - alpha) * ce + alpha * temperature**2 * kl.sum() / per(*kl.shape)


def _batch_case(seed, rows, length, temperature, alpha):
    labels = torch.randint(0, 6, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels[:, :2], labels[0, :length - 2] = IGNORE, IGNORE
    return {"student_logits": _logits(rows, length, 6, seed=seed), "teacher_logits": _logits(rows, length, 6, seed=seed + 1), "labels": labels,
            "temperature": temperature, "alpha": alpha}


exercise("batch_loss", "1.3", "one number, the loss of the batch", right=_per_token,
         cases=[_batch_case(10, 3, 8, 2.0, 0.7), _batch_case(20, 2, 6, 1.5, 0.2)], wrong={
    "you divided by the number of sequences; the loss is per token, else it grows with the length of the answers.": lambda **c: _batch(**c)[0] / len(c["labels"]),
    "you divided by all tokens, masked ones included; only tokens with a label other than −100 are learned.": lambda **c: _batch(**c)[0] / c["labels"].numel(),
    "you took the mean of every sequence and then the mean of those, which gives a token of a short answer more weight.": lambda **c: torch.stack([
        _per_token(**{**c, **{k: c[k][i:i + 1] for k in ("student_logits", "teacher_logits", "labels")}}) for i in range(len(c["labels"]))]).mean(),
    "T² is missing: without it the soft targets count less and less as the temperature rises.": lambda **c: _per_token(**c, power=0),
    "you multiplied by T; it takes T² to make up for the gradient, which shrinks by T twice.": lambda **c: _per_token(**c, power=1),
    "α is on the wrong side: it is the teacher's weight, and 1 − α that of the labels.": lambda **c: _per_token(**{**c, "alpha": 1 - c["alpha"]}),
    "you softened the cross-entropy too; the temperature belongs to the divergence, labels are learned at temperature 1.": lambda **c: _per_token(**c, at=c["temperature"]),
    "the divergence has to be between softened distributions; you took it at temperature 1.": lambda **c: _per_token(**c, kl_at=1.0),
    "this has the reverse KL in it: the expectation has to be under the teacher's probabilities.": lambda **c: _per_token(**c, kl=lambda p, q: _kl(q, p)),
    "the cross-entropy is over the tokens with a label, but the divergence over all; both need the mask.": lambda **c: _unmasked_kl(lambda rows, length: rows * length, **c),
    "the divergence is summed over all tokens, masked ones too, and divided by sequences; reduction='batchmean' divides by the first dimension alone. Pick the "
    "tokens with a label first.": lambda **c: _unmasked_kl(lambda rows, length: rows, **c),
    "this is the sum over tokens; divide by the number of tokens with a label.": lambda **c: _batch(**c)[0]})


def _slope(student_logits, teacher_logits, temperature, power=1, at=None):
    p, q = (x.exp() for x in _both(student_logits, teacher_logits, at or temperature))
    return temperature**power * (q - p)


exercise("gradient", "1.4", "the gradient by the student's logits, shape (N, V)", right=_slope, cases=[{**c, "temperature": t} for c, t in zip(_PAIR, (2.0, 3.0))], wrong={
    "the sign is wrong: where the student gives a token too much, its logit has to come down, so the gradient is positive there.": lambda **c: -_slope(**c),
    "you left out T²: with it, one T stays of the two, for the logits are divided by T once.": lambda **c: _slope(**c, power=-1),
    "you forgot the inner derivative: the logits are divided by T, which takes one T of T² away.": lambda **c: _slope(**c, power=2),
    "T·(q − p) is right, but p and q have to be the softened distributions, with the logits divided by T.": lambda **c: _slope(**c, at=1.0),
    "q − p is the gradient of the plain KL of logits that nothing divides; both T² and the division by T leave a trace.": lambda **c: _slope(**c, power=0),
    "this is the gradient of the mean over rows; multiply by the number of rows, for every row's own loss is meant.": lambda **c: _slope(**c) / len(c["student_logits"])})


# Sheet 2: masks and templates

def _labels(input_ids, turns, end=1, last=False, filler=IGNORE):
    out = [filler] * len(input_ids)
    for start, stop in turns[-1:] if last else turns:
        for i in range(start, min(stop + end, len(input_ids))):
            out[i] = input_ids[i]
    return out


_TURNS = [{"input_ids": [11, 12, 13, 2, 14, 15, 2, 11, 16, 2, 14, 17, 18, 2], "turns": [(5, 6), (11, 13)]}, {"input_ids": [11, 9, 2, 14, 8, 7, 6, 2, 5], "turns": [(4, 7)]}]
exercise("labels_of", "2.1", "a list of as many labels as there are tokens", right=_labels, cases=_TURNS, wrong={
    "the token that ends a turn has to be learned too; without it the student never learns to stop.": lambda **c: _labels(**c, end=0),
    "you learn only the last turn; every assistant's turn of a conversation is in the loss.": lambda **c: _labels(**c, last=True),
    "you learn the prompts too; tokens outside the assistant's turns get −100.": lambda input_ids, turns: list(input_ids),
    "0 is a token of the vocabulary and would be learned; what is not in the loss gets −100.": lambda **c: _labels(**c, filler=0),
    "this is the complement: the assistant's tokens keep their ids, all others get −100.": lambda input_ids, turns: [
        t if kept == IGNORE else IGNORE for t, kept in zip(input_ids, _labels(input_ids, turns))],
    "the labels are moved by one; a label stands at its own token's place, and the loss does the shift.": lambda input_ids, turns: [*_labels(input_ids, turns)[1:], IGNORE],
    "the labels are moved by one to the right; a label stands at its own token's place, and the loss does the shift.": lambda input_ids, turns: [IGNORE, *_labels(input_ids, turns)[:-1]],
    "one token too many: after the token that ends the turn somebody else speaks.": lambda **c: _labels(**c, end=2)})


def _next(logits, labels):
    kept, wanted = logits[:-1], labels[1:]
    return F.cross_entropy(kept, wanted, ignore_index=IGNORE, reduction="sum"), wanted


def _row(length, seed, prompt=2):
    labels = torch.randint(0, 5, (length,), generator=torch.Generator().manual_seed(seed))
    labels[:prompt], labels[4] = IGNORE, IGNORE
    return {"logits": _logits(length, 5, seed=seed), "labels": labels}


exercise("next_token_loss", "2.2", "one number, the mean over the tokens in the loss", cases=[_row(9, 30), _row(6, 40), _row(7, 50, prompt=0)],
         right=lambda logits, labels: (lambda total, wanted: total / (wanted != IGNORE).sum())(*_next(logits, labels)), wrong={
    "you compared every position with its own token, which the model has just read; position i predicts token i + 1.": lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=IGNORE),
    "you shifted the wrong way: drop the last row of the logits and the first label.": lambda logits, labels: F.cross_entropy(logits[1:], labels[:-1], ignore_index=IGNORE),
    "roll brings the first label round to the end, where nothing is left to predict; cut it off instead.": lambda logits, labels: F.cross_entropy(logits, labels.roll(-1), ignore_index=IGNORE),
    "this is the sum; divide by the number of tokens in the loss.": lambda logits, labels: _next(logits, labels)[0],
    "you divided by all tokens; those with label −100 are not in the loss.": lambda logits, labels: _next(logits, labels)[0] / (len(labels) - 1)})

_TALK = [{"role": "user", "content": "good morning"}, {"role": "assistant", "content": "hello there"}, {"role": "user", "content": "who are you"}, {"role": "assistant", "content": "a student"}]
_TOKENIZER = build_tokenizer(sorted({w for m in _TALK for w in m["content"].split()}))
_TURN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}%s{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"


def _read(template, case):
    """What a template writes, and which words of it are learned."""
    tokenizer = copy.copy(_TOKENIZER)
    tokenizer.chat_template = template
    out = tokenizer.apply_chat_template(case["messages"], return_dict=True, return_assistant_tokens_mask="generation" in template)
    masks = out.get("assistant_masks", [0] * len(out["input_ids"]))
    return {"text": tokenizer.apply_chat_template(case["messages"], tokenize=False), "learned": tokenizer.decode([t for t, m in zip(out["input_ids"], masks) if m])}


exercise("template", "2.3", "text in Jinja that writes <|role|>, the content and the end token of every message", kind="text", see=_read, cases=[{"messages": _TALK}],
         right=_TURN.replace("%s", "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"), wrong={
    "nothing is marked as the assistant's, so nothing would be learned; put {% generation %} … {% endgeneration %} around what it says.": _TURN.replace("%s", "{{ m['content'] + eos_token }}"),
    "the end token stands outside {% generation %}: the student would never learn to stop.": _TURN.replace("%s", "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"),
    "the role stands inside {% generation %}: the student would learn to write it, but it is given with the prompt.":
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endgeneration %}{% else %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "every turn is marked, the user's too; only the assistant's words are to be learned.": "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}",
    "every turn ends with a line break, which becomes part of the text; nothing stands between the parts.": _TURN.replace("%s", "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}").replace(
        "{% endfor %}", "{{ '\\n' }}{% endfor %}"),
    "a space stands between role and content; nothing stands between the parts.": _TURN.replace("%s", "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}").replace("'|>' }}", "'|> ' }}"),
    "there is no end token after the turns, so where one ends cannot be seen.": _TURN.replace("%s", "{% generation %}{{ m['content'] }}{% endgeneration %}").replace("m['content'] + eos_token", "m['content']")})

exercise("accumulated", "2.4", "one number, the loss of the whole step", cases=[
    {"means": torch.tensor([2.0, 1.0, 0.5]), "tokens": torch.tensor([10, 40, 200]), "sequences": torch.tensor([4, 4, 2])},
    {"means": torch.tensor([3.0, 0.5]), "tokens": torch.tensor([5, 45]), "sequences": torch.tensor([2, 3])}],
         right=lambda means, tokens, sequences: (means * tokens).sum() / tokens.sum(), wrong={
    "a mean of means: a micro-batch of few tokens then weighs as much as one of many. Sum over tokens first, and divide once.": lambda means, tokens, sequences: means.mean(),
    "you weighed by sequences; every mean is over tokens, so weigh by tokens.": lambda means, tokens, sequences: (means * sequences).sum() / sequences.sum(),
    "this is the sum over tokens; divide by the number of tokens of all micro-batches.": lambda means, tokens, sequences: (means * tokens).sum(),
    "this is the sum of means; it grows with the number of micro-batches.": lambda means, tokens, sequences: means.sum()})


# Sheet 3: budgets and variance

def _budget(answer, case):
    """What a choice of rows is like; answers differ, so their properties are compared."""
    skills, sizes = case["skills"], (4, 12, 24)
    if answer(list(skills), 4, 0) is None:
        return None
    draws = [{n: [int(i) for i in answer(list(skills), n, seed)] for n in sizes} for seed in range(8)]  # one seed may be in proportion by luck
    share = {kind: skills.count(kind) / len(skills) for kind in skills}
    return {"as many rows as asked": all(len(rows) == n for chosen in draws for n, rows in chosen.items()),
            "no row twice": all(len(set(rows)) == len(rows) and set(rows) <= set(range(len(skills))) for chosen in draws for rows in chosen.values()),
            "nested": all(set(chosen[4]) <= set(chosen[12]) <= set(chosen[24]) for chosen in draws),
            "every skill in proportion": all(abs(sum(i in range(len(skills)) and skills[i] == kind for i in rows) - n * share[kind]) <= 1.01
                                             for chosen in draws for n, rows in chosen.items() for kind in share),
            "other rows with another seed": len({tuple(sorted(chosen[12])) for chosen in draws}) > 1,
            "the same rows with the same seed": [int(i) for i in answer(list(skills), 12, 0)] == draws[0][12]}


def _anew(skills, n, seed):
    rng, kinds = random.Random(f"{seed} {n}"), sorted(set(skills))
    rows = {k: [i for i, s in enumerate(skills) if s == k] for k in kinds}
    return [i for k in kinds for i in rng.sample(rows[k], round(n * len(rows[k]) / len(skills)))]


exercise("budget", "3.1", "a list of n row numbers", see=_budget, cases=[{"skills": ["add", "sort"] * 12 + ["name"] * 24}], right=lambda skills, n, seed: nested_order(skills, seed)[:n], wrong={
    "the small budgets are no part of the large ones, so a step from one to the next changes which rows are seen, too. Fix one order a seed and take its first n.": _anew,
    "the skills are not in proportion: a plain permutation leaves that to chance, and equally many rows of each skill ignore how often each occurs. Spread every skill evenly over the order.": lambda skills, n, seed: random.Random(seed).sample(range(len(skills)), len(skills))[:n],
    "the seed changes nothing: seeds have to draw different rows, or the interval does not cover the luck of the draw.": lambda skills, n, seed: nested_order(skills, 0)[:n],
    "the same call gives other rows every time; draw from random.Random(seed), so that a run can be repeated.": lambda skills, n, seed: nested_order(skills, random.random())[:n],
    "these are the first rows as they stand in the file; draw them by the seed, every skill in proportion.": lambda skills, n, seed: list(range(n)),
    "rows come twice; draw without putting back.": lambda skills, n, seed: [nested_order(skills, seed)[i // 2] for i in range(n)]})


def _interval(differences, quantile=None, ddof=1, root=True):
    d = np.asarray(differences, float)
    half = (quantile or scipy_stats.t.ppf(0.975, len(d) - 1)) * d.std(ddof=ddof) / (len(d)**0.5 if root else 1)
    return np.array([d.mean() - half, d.mean() + half])


def _unpaired(kd, sft):
    found = scipy_stats.ttest_ind(kd, sft, equal_var=False).confidence_interval()
    return np.array([found.low, found.high])


_SCORES = [{"kd": np.array([0.61, 0.52, 0.70, 0.58, 0.66]), "sft": np.array([0.57, 0.50, 0.64, 0.57, 0.60])}, {"kd": np.array([0.31, 0.40, 0.35]), "sft": np.array([0.33, 0.37, 0.36])}]
exercise("paired_interval", "3.2", "two numbers, the low and the high end of the 95% interval of KD − SFT", cases=_SCORES, right=lambda kd, sft: _interval(kd - sft), wrong={
    "you treated the two methods as independent; a seed gives both the same rows and start, so take the difference seed by seed first.": _unpaired,
    "1.96 is the normal quantile; with so few seeds take Student's t with n − 1 degrees of freedom, which is wider.": lambda kd, sft: _interval(kd - sft, 1.96),
    "the standard deviation is that of a whole population; of a sample divide by n − 1 (ddof=1).": lambda kd, sft: _interval(kd - sft, ddof=0),
    "this is the spread of single seeds; the mean's standard error is smaller by a factor of √n.": lambda kd, sft: _interval(kd - sft, root=False),
    "the sign is wrong: KD minus SFT is above zero where KD is better.": lambda kd, sft: _interval(sft - kd)})


def _verdict(low, high, delta):
    return stats.verdict(low, high, delta, stats.DECISIVE_SEEDS)


exercise("verdict", "3.3", "'supported', 'refuted', 'no meaningful difference' or 'inconclusive'", right=_verdict,
         cases=[dict(zip(("low", "high", "delta"), c)) for c in ((0.02, 0.05, 0.01), (0.002, 0.03, 0.01), (-0.04, -0.02, 0.01), (-0.008, 0.006, 0.01), (-0.03, 0.05, 0.01), (-0.005, 0.02, 0.01), (0.002, 0.008, 0.01), (-0.008, -0.002, 0.01))], wrong={
    "an interval with zero in it does not show that there is no difference: it may hold large ones, too. That needs the whole interval inside ±δ.":
        lambda low, high, delta: "supported" if low > 0 else "refuted" if high < 0 else "no meaningful difference",
    "δ is not the bar for 'supported': a low end above zero is enough; δ says when nothing that matters is left.":
        lambda low, high, delta: "supported" if low > delta else "refuted" if high < -delta else "no meaningful difference" if -delta < low and high < delta else "inconclusive",
    "you ask for ±δ first; a small difference that is surely above zero is supported all the same. The first rule that fits counts.":
        lambda low, high, delta: "no meaningful difference" if -delta < low and high < delta else "supported" if low > 0 else "refuted" if high < 0 else "inconclusive",
    "you never say 'no meaningful difference': an interval inside ±δ is a finding.": lambda low, high, delta: "supported" if low > 0 else "refuted" if high < 0 else "inconclusive",
    "the middle of an interval decides nothing; its ends do.": lambda low, high, delta: "supported" if low + high > 2 * delta else "refuted" if low + high < -2 * delta else "no meaningful difference",
    "refuted and supported are swapped: above zero KD is better, as the claim says.": lambda low, high, delta: {"supported": "refuted", "refuted": "supported"}.get(
        found := _verdict(low, high, delta), found)})


def _falls(budgets, gaps, log=np.log2, sign=-1):
    return sign * np.array([np.polyfit(log(np.asarray(budgets, float)), g, 1)[0] for g in np.asarray(gaps)])


exercise("fall_per_doubling", "3.4", "one number a seed, above zero where the gap falls", right=_falls, cases=[
    {"budgets": [200, 400, 1600, 6400], "gaps": np.array([[0.10, 0.12, 0.05, 0.01], [0.08, 0.07, 0.06, -0.01], [0.11, 0.10, 0.02, 0.02]])}, {"budgets": [100, 200, 800], "gaps": np.array([[0.3, 0.1, 0.2], [0.1, 0.2, 0.0]])}], wrong={
    "the natural logarithm gives the fall by a factor e; per doubling it is log2.": lambda budgets, gaps: _falls(budgets, gaps, np.log),
    "log10 gives the fall by a factor ten; per doubling it is log2.": lambda budgets, gaps: _falls(budgets, gaps, np.log10),
    "the sign is wrong: a fall is above zero where the gap gets smaller as the budget grows.": lambda budgets, gaps: _falls(budgets, gaps, sign=1),
    "this is the fall per example; regress on log2 of the budget.": lambda budgets, gaps: _falls(budgets, gaps, lambda b: b),
    "the first and the last budget alone throw away what lies between; fit a line through all.": lambda budgets, gaps: (gaps[:, 0] - gaps[:, -1]) / np.log2(budgets[-1] / budgets[0]),
    "you averaged over seeds first; one slope a seed is needed, for the seeds are what the interval is over.": lambda budgets, gaps: np.full(len(gaps), _falls(budgets, gaps.mean(0, keepdims=True))[0])})


# Sheet 4: teachers and caches

exercise("cache_bytes", "4.1", "one number, in bytes", cases=[{"prompt_tokens": 3000, "response_tokens": 1000, "k": 64}, {"prompt_tokens": 10, "response_tokens": 7, "k": 16}],
         right=lambda prompt_tokens, response_tokens, k: response_tokens * (k * (4 + 2) + 4), wrong={
    "prompt tokens are in no loss, so nothing of them is stored.": lambda prompt_tokens, response_tokens, k: (prompt_tokens + response_tokens) * (k * 6 + 4),
    "you forgot the ids: a probability without its token says nothing.": lambda prompt_tokens, response_tokens, k: response_tokens * (k * 2 + 4),
    "you forgot the mass of all other tokens, four bytes a token.": lambda prompt_tokens, response_tokens, k: response_tokens * k * 6,
    "a log-probability in float16 takes two bytes, not four.": lambda prompt_tokens, response_tokens, k: response_tokens * (k * 8 + 4),
    "the mass of all other tokens is one number a token, not one for each of the k.": lambda prompt_tokens, response_tokens, k: response_tokens * k * 10})


def _buckets(student_logits, teacher_logits, k, by=None, tail=True, renormalise=False):
    p, q = _both(student_logits, teacher_logits)
    ids = (p if by is None else by(student_logits)).topk(k, -1).indices
    a, b = p.gather(-1, ids), q.gather(-1, ids)
    if renormalise:
        a, b = F.log_softmax(a, -1), F.log_softmax(b, -1) if renormalise == "both" else b
    value = (a.exp() * (a - b)).sum(-1)
    if tail:
        rest, other = (torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-7)) for x in (a, b))
        value = value + rest.exp() * (rest - other)
    return value


_TOP = [{"student_logits": _logits(4, 9, seed=51, scale=1.0), "teacher_logits": _logits(4, 9, seed=52, scale=1.0), "k": 3}, {"student_logits": _logits(2, 12, seed=53, scale=1.0), "teacher_logits": _logits(2, 12, seed=54, scale=1.0), "k": 5}]
exercise("top_k_kl", "4.2", "one divergence a row, shape (N,)", right=_buckets, cases=_TOP, wrong={
    "you renormalised the top k on both sides: how much the student gives to all other tokens is then nobody's concern. Keep their mass as one more bucket.": lambda **c: _buckets(**c, tail=False, renormalise="both"),
    "you renormalised the teacher's top k but not the student's: the student is then told that all other tokens never come.": lambda **c: _buckets(**c, tail=False, renormalise="teacher"),
    "the bucket is missing: without the term of all other tokens the sum is no divergence and can be below zero.": lambda **c: _buckets(**c, tail=False),
    "you took the student's top k; the cache was written before the student was trained, so it holds the teacher's.": lambda **c: _buckets(**c, by=lambda student: student),
    "this is the divergence over the whole vocabulary, which a cache of k does not hold.": lambda student_logits, teacher_logits, k: losses.divergence(student_logits, teacher_logits)})


def _draws(seed, rows, width, draws):
    p = F.softmax(_logits(rows, width, seed=seed), -1)
    return {"student_log_probs": F.log_softmax(_logits(rows, width, seed=seed + 1), -1), "teacher_probs": p, "drawn": torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))}


def _drawn(c):
    return c["student_log_probs"].gather(-1, c["drawn"])


exercise("sampled_loss", "4.3", "one estimate a row, shape (N,)", cases=[_draws(61, 4, 6, 16), _draws(71, 2, 5, 8)], right=lambda **c: -_drawn(c).mean(-1), wrong={
    "the draws already come as often as the teacher's probabilities say; to weigh them by those again counts these twice.": lambda **c: -(c["teacher_probs"].gather(-1, c["drawn"]) * _drawn(c)).mean(-1),
    "you weighed the draws by the teacher's probabilities, made to sum to one: the draws already come in proportion, so a plain mean is unbiased.": lambda **c: (lambda w: -(w / w.sum(-1, keepdim=True) * _drawn(c)).sum(-1))(c["teacher_probs"].gather(-1, c["drawn"])),
    "this is the sum over the draws; it grows with their number.": lambda **c: -_drawn(c).sum(-1),
    "a token that was drawn twice counts twice; you counted distinct tokens once.": lambda **c: torch.stack([-q[d.unique()].mean() for q, d in zip(c["student_log_probs"], c["drawn"])]),
    "the sign is wrong: a loss is minus a log-probability.": lambda **c: _drawn(c).mean(-1)})

exercise("shared_vocabulary", "4.4", "log-probabilities of shape (N, vocabulary)", cases=[{"teacher_logits": _logits(3, 8, seed=81), "vocabulary": 6}, {"teacher_logits": _logits(2, 10, seed=82), "vocabulary": 9}],
         right=lambda teacher_logits, vocabulary: F.log_softmax(teacher_logits[:, :vocabulary], -1), wrong={
    "you cut after the softmax, so what the teacher gave to padding is lost and the rest does not sum to one; cut the logits first.": lambda teacher_logits, vocabulary: F.log_softmax(teacher_logits, -1)[:, :vocabulary],
    "the padding stands at the end: the first tokens are those that both models know.": lambda teacher_logits, vocabulary: F.log_softmax(teacher_logits[:, -vocabulary:], -1),
    "these are logits; normalise what is left.": lambda teacher_logits, vocabulary: teacher_logits[:, :vocabulary],
    "you kept the width and set the padding to −inf; the student's rows are only as wide as the shared vocabulary.": lambda teacher_logits, vocabulary: F.log_softmax(teacher_logits.index_fill(
        -1, torch.arange(vocabulary, teacher_logits.shape[-1]), -math.inf), -1),
    "these are probabilities; take their logarithm.": lambda teacher_logits, vocabulary: F.softmax(teacher_logits[:, :vocabulary], -1),
    "two things: cut the logits before the softmax, and take the logarithm.": lambda teacher_logits, vocabulary: F.softmax(teacher_logits, -1)[:, :vocabulary]})


# Sheet 5: two stages

def _turns(human, synthetic, n):
    return [(human, synthetic)[i % 2][i // 2 % len((human, synthetic)[i % 2])] for i in range(n)]


exercise("mixture", "5.1", "a list of n rows", right=_turns, see=lambda answer, case: None if (rows := answer(*case.values())) is None else " ".join(map(str, rows)),
         cases=[{"human": ["h0", "h1"], "synthetic": [f"s{i}" for i in range(5)], "n": 10}, {"human": ["h0", "h1", "h2"], "synthetic": ["s0"], "n": 7}], wrong={
    "you put the pools one behind the other: the large one swamps the small. Let them take turns, each starting over when it is used up.": lambda human, synthetic, n: [[*human, *synthetic][i % (len(human) + len(synthetic))] for i in range(n)],
    "you stop when the smaller pool is used up; start it over instead.": lambda human, synthetic, n: [r for pair in zip(human, synthetic) for r in pair][:n],
    "you begin with a synthetic row; the human ones have the first turn.": lambda human, synthetic, n: _turns(synthetic, human, n),
    "all human rows come first and then all synthetic ones: those are two stages, not a mixture.": lambda human, synthetic, n: [*(human[i % len(human)] for i in range((n + 1) // 2)), *(synthetic[i % len(synthetic)] for i in range(n // 2))]})


def _step_down(p_values, monotone=True, unsort=True):
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    out = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    out = np.maximum.accumulate(out) if monotone else out
    return out[np.argsort(order)] if unsort else out


exercise("holm", "5.2", "as many numbers as p-values, in the same order", right=lambda p_values: np.array(stats.holm(p_values)), cases=[
    {"p_values": np.array([0.03, 0.001, 0.02, 0.025, 0.6])}, {"p_values": np.array([0.04, 0.01, 0.35, 0.03])}, {"p_values": np.array([0.6, 0.7, 0.02])}], wrong={
    "this is Bonferroni's correction, every p times their number; Holm's factor falls by one with each step, which rejects more.": lambda p_values: np.minimum(1, p_values * len(p_values)),
    "this is Benjamini and Hochberg's, which bounds the share of false findings and not the chance of one.": lambda p_values: scipy_stats.false_discovery_control(p_values),
    "an adjusted p may not be smaller than that of a smaller p: take the running maximum.": lambda p_values: _step_down(p_values, monotone=False),
    "the values are right but sorted; give them back in the order of the p-values.": lambda p_values: _step_down(p_values, unsort=False),
    "some are above one, which no probability is.": lambda p_values: (lambda order: np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))[np.argsort(order)])(np.argsort(p_values)),
    "these are the p-values as they were; five comparisons give five chances to be wrong.": lambda p_values: p_values})


def _all(intervals, delta):
    return stats.together("", [{"claim": "", "verdict": _verdict(low, high, delta), "ci_low": low} for low, high in intervals])["verdict"]


def _by_mean(intervals, delta):
    return _verdict(*np.mean(intervals, axis=0), delta)


def _least(*order):
    """The verdict of a learner who puts the four in this order, the weakest first."""
    return lambda intervals, delta: min((_verdict(*i, delta) for i in intervals), key=order.index)


def _majority(intervals, delta):
    found = [_verdict(low, high, delta) for low, high in intervals]
    return max(sorted(set(found)), key=found.count)


exercise("needs_all", "5.3", "the verdict of a claim that says 'better than every one of them'", right=_all, cases=[{"intervals": i, "delta": 0.01} for i in (
    [(0.02, 0.04), (0.01, 0.05), (0.03, 0.06)], [(0.08, 0.1), (-0.05, -0.02), (0.07, 0.12)], [(0.02, 0.04), (-0.01, 0.03), (0.05, 0.09)], [(-0.008, 0.004), (0.02, 0.05)], [(-0.03, 0.02), (-0.06, -0.04)],
    [(-0.03, 0.02), (-0.02, -0.015)], [(-0.008, 0.004), (-0.02, 0.03)], [(-0.02, -0.012), (0.03, 0.05)], [(0.02, 0.03), (-0.08, 0.01)], [(0.02, 0.03), (0.03, 0.05), (-0.02, 0.03), (-0.03, 0.04)])], wrong={
    "an average hides the baseline that wins; the claim holds only if every comparison does.": _by_mean,
    "a majority is not all: one better baseline refutes 'better than every one'.": _majority,
    "one win is not enough: every comparison has to be supported.": _least("supported", "no meaningful difference", "inconclusive", "refuted"),
    "one win is not enough: every comparison has to be supported; and where none is, the weakest decides.": lambda intervals, delta: "supported" if any(low > 0 for low, _ in intervals) else _all(intervals, delta),
    "'no meaningful difference' is a finding, 'inconclusive' is none: with both, the whole is inconclusive.": _least("refuted", "no meaningful difference", "inconclusive", "supported"),
    "'refuted' is the weakest of the four, then 'inconclusive', then 'no meaningful difference'; you have another order.": _least("supported", "inconclusive", "no meaningful difference", "refuted"),
    "the lowest interval need not have the weakest verdict: a wide one reaches far down and decides nothing. Judge each, then compare verdicts.": lambda intervals, delta: _verdict(*min(intervals), delta),
    "only the last comparison counts in your function.": lambda intervals, delta: _verdict(*intervals[-1], delta),
    "only the first comparison counts in your function; does it return from within the loop?": lambda intervals, delta: _verdict(*intervals[0], delta),
    "where no comparison is refuted but one is open, nothing is refuted: the claim is as open as its weakest part.": lambda intervals, delta: "supported" if all(low > 0 for low, _ in intervals) else "refuted",
    "a baseline that is better, interval and all, refutes the claim; you left it open.": lambda intervals, delta: "supported" if all(low > 0 for low, _ in intervals) else "inconclusive"})


def _arms(seed):
    rng = np.random.default_rng(seed)
    rows = [(d, b, s, m) for d in ("clinic", "market") for b in (64, 256) for s in range(3) for m in ("human_sft", "kd_then_sft", "mixture")]
    return {"frame": pd.DataFrame(rows, columns=["domain", "budget", "seed", "method"]).assign(accuracy=rng.random(len(rows)).round(3)).sample(frac=1, random_state=seed)}


def _lead(frame, first="kd_then_sft", second="human_sft", by="domain"):
    means = frame.groupby([by, "method"]).accuracy.mean().unstack()
    return means[first] - (means[second] if second else means.drop(columns=first).mean(axis=1))


exercise("lead", "5.4", "one number a domain", right=_lead, cases=[_arms(1), _arms(2)],
         see=lambda answer, case: found.sort_index() if isinstance(found := answer(*case.values()), pd.Series) else found, wrong={
    "the sign is wrong: two stages minus the human annotations alone.": lambda frame: -_lead(frame),
    "you compared with the mean of all other recipes; the question is about human annotations alone.": lambda frame: _lead(frame, second=None),
    "this is one number a budget; average over budgets, and keep the domains apart.": lambda frame: _lead(frame, by="budget"),
    "you took the best run of each; the mean over budgets and seeds is meant, for luck is no finding.": lambda frame: (lambda m: m["kd_then_sft"] - m["human_sft"])(frame.groupby(["domain", "method"]).accuracy.max().unstack()),
    "you compared with the mixture; the baseline here is human_sft.": lambda frame: _lead(frame, second="mixture")})
