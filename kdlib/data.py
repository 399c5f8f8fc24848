"""Chat data, a ``datasets.Dataset`` with ``messages``: render with a loss mask, subset by budget, batch."""

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from jinja2 import TemplateError
from transformers.utils import logging

IGNORE = -100
disable_progress_bars()  # notebooks store what is printed
logging.disable_progress_bar()


@dataclass
class Corpus:
    """Data of a study: rows with ``id``, ``messages``, ``skill``, ``suite``, perhaps ``clean`` (the answer without a slip)."""

    pretrain: Callable[[], list[str]]  # gives the plain text lines for base models
    sets: dict[str, Dataset]  # by name: train, validation, test
    vocabulary: list[str] | None = None  # the words of a closed vocabulary; without one a BPE is trained
    report: dict = field(default_factory=dict)  # counts of what loading left out


def encode(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """``(input_ids, labels)``; labels are -100 outside the assistant's turns. Raises ValueError if nothing would be learned."""
    named = f" of {tokenizer.name_or_path!r}" if tokenizer.name_or_path else ""
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer{named} has no chat template; allowed: a template of kdlib's (tulu, chatml), or a tokenizer with one.")
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    if not any(out["assistant_masks"]):
        raise ValueError(f"The chat template{named} marks no assistant tokens; allowed: a template of kdlib's (tulu, chatml), or one with "
                         "{% generation %} around what an assistant turn says.")
    return out["input_ids"], [t if m else IGNORE for t, m in zip(out["input_ids"], out["assistant_masks"])]


def stretches(labels: list[int]) -> list[tuple[int, int]]:
    """``(start, end)`` of every longest run of tokens that are all in the loss or all outside it."""
    starts = [i for i in range(len(labels)) if i == 0 or (labels[i] == IGNORE) != (labels[i - 1] == IGNORE)]
    return list(zip(starts, [*starts[1:], len(labels)]))


def shorten_prompt(ids: list[int], labels: list[int], prompt_length: int) -> tuple[list[int], list[int]] | None:
    """Leave a row ``prompt_length`` tokens outside the loss, by cutting the middles of its prompt stretches, the longest first; None if that is
    not enough. What is cut does not depend on the answer, whose length a prompt would tell otherwise.
    """
    while (excess := labels.count(IGNORE) - prompt_length) > 0:
        prompts = [s for s in stretches(labels) if labels[s[0]] == IGNORE]
        start, end = max(prompts, key=lambda s: s[1] - s[0], default=(0, 0))
        keep = max(8, end - start - excess)  # of it, the head for the role and the instruction, and the tail for the turn's end
        if (excess := end - start - keep) <= 0:
            return None
        cut = start + (keep + 1) // 2
        ids, labels = ids[:cut] + ids[cut + excess:], labels[:cut] + labels[cut + excess:]
    return ids, labels


def own_words(row: dict, max_length: int, open: bool) -> dict:
    """A row with its last answer alone to learn, for earlier ones are others'; if ``open`` without the end of one that did not come to it, and
    so with nothing to learn of one that a server refused; read again, words may be more tokens than they were said in.
    """
    first, last = [(start, end) for start, end in stretches(row["labels"]) if row["labels"][start] != IGNORE][-1]
    end = min(max_length, last - 1 if open and row["finish_reason"] in ("length", "refused", "content_filter") else len(row["labels"]))
    return {"input_ids": row["input_ids"][:end], "labels": ([IGNORE] * first + row["labels"][first:])[:end]}


def processes(rows: int) -> int | None:
    """How many processes are worth starting for so many rows, on the cores that this one may use; None for none beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, rows // 20_000, 16) if rows > 40_000 and cores > 1 else None  # each holds a tokenizer of its own


def _fit(messages: list[dict], i: int, tokenizer, max_length: int, prompt_length: int, drop: bool) -> dict:
    try:
        full, labels = encode(messages, tokenizer)
    except TemplateError as error:
        raise ValueError(f"The chat template refuses row {i}, whose turns are of {', '.join(m['role'] for m in messages)}: {error}.") from error
    fitted = shorten_prompt(full, labels, prompt_length)
    if (fitted := fitted if fitted and len(fitted[0]) <= max_length else None) is None and not drop:
        raise ValueError(f"max_length={max_length} would cut the answer of row {i}, which has {len(full)} tokens, "
                         f"{sum(t != IGNORE for t in labels)} of them answer; allowed: more, or drop=True to leave it out.")
    ids, kept = fitted or ([], [])
    return {"input_ids": ids, "labels": kept, "cut": len(full) - len(ids), "said": sum(t != IGNORE for t in kept),
            "lost": sum(t != IGNORE for t in labels) - sum(t != IGNORE for t in kept)}


def render(dataset: Dataset, tokenizer, max_length: int, drop: bool = False, num_proc: int | None = None,
           prompt_length: int | None = None) -> tuple[Dataset, dict]:
    """Add ``input_ids`` and ``labels``, prompts shortened to ``prompt_length`` tokens (None: half of ``max_length``); also counts. A row that is
    still longer than ``max_length``, for its answer is never cut, is a ValueError, or with ``drop`` left out. Many rows are worked on by
    ``num_proc`` processes, by default one a core, and lie in files, not in memory.
    """
    how, counts = {"tokenizer": tokenizer, "max_length": max_length, "prompt_length": prompt_length or max_length // 2, "drop": drop}, ("cut", "said", "lost")
    if many := num_proc or len(dataset) > 40_000:
        short = {**dict.fromkeys(("input_ids", "labels"), List(Value("int32"))), **dict.fromkeys(counts, Value("int32"))}
        done = dataset.map(_fit, with_indices=True, input_columns="messages", fn_kwargs=how, num_proc=num_proc or processes(len(dataset)),
                           features=Features({**dataset.features, **short}), load_from_cache_file=False)
        cut, said, lost = (done.with_format("numpy")[k][:] for k in counts)
    else:
        done = [_fit(messages, i, **how) for i, messages in enumerate(dataset["messages"])]
        done = {k: [row[k] for row in done] for k in ("input_ids", "labels", *counts)}
        cut, said, lost = (np.array(done[k], dtype=int) for k in counts)
    kept = np.flatnonzero(said > 0).tolist()
    report = {"prompts_shortened": int((cut[kept] > 0).sum()), "prompt_tokens_cut": int(cut[kept].sum()), "answer_tokens_cut":
              int(lost[kept].sum()), "rows_dropped": len(dataset) - len(kept), "response_tokens": int(said.sum()), "rows": len(dataset)}
    if many:
        return done.remove_columns(list(counts)).select(kept), report
    rows = dataset.select(kept)
    for name in ("input_ids", "labels"):
        rows = rows.add_column(name, [done[name][i] for i in kept])
    return rows, report


def lengths(rendered: Dataset) -> dict:
    """Tokens of a rendered row, as quantiles, and the share of all tokens that are in the loss."""
    sizes, said = np.zeros(0, dtype=int), 0
    for part in rendered.select_columns("labels").with_format("arrow").iter(10_000):
        labels = part["labels"].combine_chunks()
        sizes, said = np.append(sizes, labels.value_lengths().to_numpy()), said + int((labels.flatten().to_numpy() != IGNORE).sum())
    middle, high = np.percentile(sizes, [50, 95]) if len(sizes) else (0, 0)
    return {"tokens": int(sizes.sum()), "tokens_median": int(middle), "tokens_p95": int(high), "tokens_most": int(sizes.max(initial=0)),
            "response_share": round(float(said / max(1, sizes.sum())), 4)}


def pack(texts: list[str], tokenizer, block: int, max_tokens: int | None = None) -> Dataset:
    """Plain text as blocks of ``block`` tokens with an end token after each text; every token is a label."""
    flat = []
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start:start + 1000], add_special_tokens=False)["input_ids"]:
            flat += ids + [tokenizer.eos_token_id]
        if max_tokens and len(flat) >= max_tokens:
            break
    blocks = [flat[i:i + block] for i in range(0, len(flat) - block + 1, block)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def nested_order(skills: list[str], seed: int) -> list[int]:
    """A seeded order of the rows, skills spread evenly, whose prefixes are the nested budgets of one seed."""
    rng = random.Random(f"budget {seed}")
    placed = []
    by_skill = {}
    for i, skill in enumerate(skills):
        by_skill.setdefault(skill, []).append(i)
    for rows in by_skill.values():
        rng.shuffle(rows)
        placed += [((j + rng.random()) / len(rows), i) for j, i in enumerate(rows)]
    return [i for _, i in sorted(placed)]


def stream(pools: list[list[int]], steps: int, batch_size: int, seed: int) -> list[int]:
    """``steps * batch_size`` row numbers: shuffled passes over each of ``pools``, which take turns; the order a training run sees."""
    rng = random.Random(f"stream {seed}")
    needed = steps * batch_size
    passes = [[row for _ in range(0, needed, len(pool) * len(pools)) for row in rng.sample(pool, len(pool))] for pool in pools]
    return [row for turn in zip(*passes) for row in turn][:needed]


def example_key(identifier: str) -> int:
    """A 63-bit key of an example's id, so that a batch can name its examples in a tensor."""
    return int.from_bytes(hashlib.blake2b(str(identifier).encode(), digest_size=8).digest(), "big") >> 1


class Rows(Sequence):
    """Rendered rows of several ``sets`` (name, rows, numbers of those that count) under ids of their own, read when asked for, in ``order``."""

    def __init__(self, sets: list[tuple[str, Sequence, Sequence[int]]], order: Sequence[int] | None = None):
        self.sets, self.order = sets, range(sum(len(kept) for *_, kept in sets)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def once(self) -> "Rows":
        """Those that come, each once."""
        return Rows(self.sets, sorted({*self.order}))

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        number = self.order[place]
        for name, rows, kept in self.sets:
            if number < len(kept):
                return {"id": f"{name}/{kept[number]}", **rows[kept[number]]}
            number -= len(kept)


@dataclass
class Collator:
    """Batches of ``input_ids`` (B, L), ``labels`` (B, L + 1; a row's last token is a label only) and ``example``, the rows' ids. With
    ``pack`` rows share sequences where that saves a tenth of all tokens, and ``position_ids`` start anew in each: rows of up to 63 tokens two
    by two, longer ones all in one without padding, for which ``rows`` are their lengths.
    """

    pad_token_id: int
    pack: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        for ids, labels in ((r["input_ids"], r.get("labels", ())) for r in rows):
            if not 0 < len(ids) == len(labels):
                raise ValueError(f"Every row needs input_ids and as many labels; one has {len(ids)} and {len(labels)}.")
        lengths = [max(1, len(r["input_ids"]) - 1) for r in rows]
        longer = sorted(range(len(rows)), key=lambda i: -lengths[i])
        pairs = [list({a, b}) for a, b in zip(longer[:-(-len(rows) // 2)], longer[::-1])]  # the longest with the shortest
        order = [] if not self.pack else [longer] if max(lengths) >= 64 else pairs
        width = max((sum(lengths[i] for i in place) for place in order), default=0)
        if not (shared := 0 < len(order) * width <= 0.9 * len(rows) * max(lengths)):
            order, width = [[i] for i in range(len(rows))], max(lengths)
        marks = "position_ids" if shared else "attention_mask"
        batch = {"rows": torch.tensor([lengths[i] for i in order[0]])} if shared and len(order) == 1 else {}
        for name, shift, filler, part in (  # nothing predicts a row's first token
                ("input_ids", 0, self.pad_token_id or 0, lambda i: rows[i]["input_ids"][:lengths[i]]),
                ("labels", 1, IGNORE, lambda i: [*rows[i]["labels"][1:]] or IGNORE),
                (marks, 0, 0, lambda i: range(lengths[i]) if shared else 1)):
            filled = np.full((len(order), width + shift), filler)
            for line, place in zip(filled, order):
                start = shift
                for i in place:
                    line[start:(start := start + lengths[i])] = part(i)
            batch[name] = torch.from_numpy(filled)
        if "id" in rows[0]:
            batch["example"] = torch.tensor([example_key(rows[i]["id"]) for place in order for i in place])
        return batch
