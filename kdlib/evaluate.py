"""Evaluation of one model on held-out rows: verified accuracy, likelihood, calibration, and the teacher beside it."""

import math

import pandas as pd
import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from kdlib.data import IGNORE, Collator, stretches
from kdlib.inference import generate, placed, response_logits, response_rows
from kdlib.models import size_of


def replies(model, tokenizer, asked: list[list], max_new_tokens: int, temperature: float = 0.0) -> tuple[list[str], list[str]]:
    """What the model answers to ``asked``, conversations that end with a user turn or prompts in token ids, as text; and why each answer ends:
    ``stop``, or ``length`` where ``max_new_tokens`` were not enough.
    """
    prompts = [c if isinstance(c[0], int) else tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in asked]
    answers = generate(model, prompts, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                       eos_token_id=tokenizer.eos_token_id, temperature=temperature, vocabulary=size_of(tokenizer))
    return tokenizer.batch_decode(answers, skip_special_tokens=True), ["stop" if tokenizer.eos_token_id in a else "length" for a in answers]


def prompt(row: dict) -> list:
    """What a row asks before its last answer: in token ids, as shortened in training, if it is rendered; else the conversation."""
    if "input_ids" not in row:
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    return row["input_ids"][:next(start for start, _ in reversed(stretches(row["labels"])) if row["labels"][start] != IGNORE)]


def accuracy(model, tokenizer, rows: Dataset, verify, max_new_tokens: int) -> list[int | None]:
    """1 for every row whose greedy reply verifies, else 0; None where a row has no answer to check."""
    asked = [i for i, answer in enumerate(rows["answer"]) if answer is not None]
    said = dict(zip(asked, replies(model, tokenizer, [prompt(row) for row in rows.select(asked)], max_new_tokens)[0]))
    known = rows.remove_columns(["messages", "input_ids", "labels"])
    return [int(verify(row, said[i])) if i in said else None for i, row in enumerate(known)]


@torch.inference_mode()
def token_scores(model, rendered: list[dict], tokenizer, *, entropy: bool = False) -> dict[str, torch.Tensor]:
    """By response token: ``row``, ``nll`` and, if asked for, ``entropy`` (nats), the likeliest token ``guess``, its ``confidence``, ``correct``,
    all among the tokens that there are: what a head wider than them says of the rest only some methods teach.
    """
    collate, parts = Collator(tokenizer.pad_token_id), []
    size = max([size_of(tokenizer), *(max(r["labels"]) + 1 for r in rendered)])  # an answer may speak of the padding token
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]["input_ids"]))
    longest = max((len(r["input_ids"]) for r in rendered), default=1)
    at_once = max(1, min(64, 2**28 // (longest * model.config.get_text_config().vocab_size)))  # rows whose logits are held at once
    for start in range(0, len(order), at_once):
        chunk = order[start:start + at_once]
        batch = placed(collate([rendered[i] for i in chunk]))
        rows = torch.tensor(chunk)[batch["places"] // batch["input_ids"].shape[1]]
        places, targets = response_rows(batch := send_to_device(batch, model.device))
        log_q = torch.log_softmax(response_logits(model, batch, places)[:, :size].float(), -1)
        best, guess = log_q.max(-1)
        part = {"row": rows, "nll": -log_q.gather(1, targets[:, None])[:, 0], "confidence": best.exp(), "guess": guess,
                "correct": (guess == targets).float()}
        if entropy:
            part["entropy"] = -(log_q.exp() * log_q).nan_to_num().sum(-1)
        parts.append(part)
    scores = {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}
    by_row = scores["row"].argsort(stable=True)
    return {k: v[by_row] for k, v in scores.items()}


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017, arXiv 1706.04599); between 0 and 1."""
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (correct - confidence).double())
    return float(gap.abs().sum() / len(confidence))


def bits_per_byte(nll: list[float], answers: list[str]) -> float:
    """Summed ``nll`` (nats per answer, its end token included) over the answers' UTF-8 bytes, in bits."""
    return sum(nll) / math.log(2) / sum(len(a.encode()) for a in answers)


def evaluate(model, tokenizer, rows: Dataset, *, verify=None, max_new_tokens: int = 16, clean: list[dict] | None = None,
             teacher: dict[str, torch.Tensor] | None = None) -> tuple[dict, dict]:
    """``(metrics, items)`` of a model on rendered held-out ``rows``, ``clean`` with faultless answers; items hold a value a row.

    ``teacher`` is what :func:`token_scores` says of a teacher on the same rows, entropy included.
    """
    metrics: dict = {"accuracy": None, "accuracy_unseen": None}
    items: dict = {k: list(rows[k]) for k in ("id", "suite", "skill")}
    if verify and any(answer is not None for answer in rows["answer"]):
        items["correct"] = accuracy(model, tokenizer, rows, verify, max_new_tokens)
        means = pd.Series(items["correct"], dtype=float).groupby([items["suite"], items["skill"]]).mean().dropna()
        for suite, name in (("seen", "accuracy"), ("unseen", "accuracy_unseen")):
            if parts := means.get(suite, pd.Series()).to_dict():
                metrics |= {name: sum(parts.values()) / len(parts), f"{name}_by_skill": parts}
    scores = token_scores(model, rows.select_columns(["input_ids", "labels"]).to_list(), tokenizer)
    if not scores["confidence"].isfinite().all():
        raise ValueError("The model gives no finite probabilities: it has diverged; allowed: a smaller learning_rate.")
    nll = torch.zeros(len(rows)).index_add_(0, scores["row"], scores["nll"]).tolist()
    answers = ["".join(m["content"] for m in ms if m["role"] == "assistant") for ms in rows["messages"]]
    items |= {"nll": [round(v, 4) for v in nll], "bytes": [len(a.encode()) for a in answers]}
    own = {skill: [i for i, s in enumerate(items["skill"]) if s == skill] for skill in sorted(set(items["skill"]))}
    by_skill = {skill: bits_per_byte([nll[i] for i in places], [answers[i] for i in places]) for skill, places in own.items()}
    metrics |= {"nll": float(scores["nll"].mean()), "bits_per_byte": bits_per_byte(nll, answers), "bits_per_byte_by_skill": by_skill,
                "top1": float(scores["correct"].mean()), "ece": calibration_error(scores["confidence"], scores["correct"])}
    if clean is not None:
        metrics["nll_clean"] = float(token_scores(model, clean, tokenizer)["nll"].mean())
    if teacher is not None:
        metrics |= {"teacher_nll": float(teacher["nll"].mean()), "top1_agreement": float((teacher["guess"] == scores["guess"]).float().mean()),
                    "teacher_entropy": float(teacher["entropy"].mean())}
    return metrics, items
