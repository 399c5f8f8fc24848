"""Chat data: render with a loss mask, subset by budget, batch.

A dataset here is an ordinary ``datasets.Dataset`` with a ``messages`` column. :func:`render` turns it into
``input_ids`` and ``labels`` (-100 outside assistant turns) with the tokenizer's own chat template.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset

IGNORE = -100


@dataclass
class Corpus:
    """What a study trains and tests on; the lab world and real text take the same form.

    ``pretrain()`` gives the plain text lines for base models. ``train``, ``validation`` and ``test`` have ``id``,
    ``messages`` and ``skill``; held-out rows may add ``suite`` and ``clean`` (the same answer without a slip).
    ``vocabulary`` lists the words of a closed vocabulary (else a BPE is trained); ``report`` counts what loading left out.
    """

    pretrain: Callable[[], list[str]]
    train: Dataset
    validation: Dataset
    test: Dataset
    vocabulary: list[str] | None = None
    report: dict = field(default_factory=dict)


def encode(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """``(input_ids, labels)`` of one conversation; labels are -100 outside the assistant's turns.

    Raises ValueError if the chat template marks no generation, so that a loss over nothing cannot pass unseen.
    """
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = out["assistant_masks"]
    if not any(mask):
        raise ValueError("The chat template marks no assistant tokens: it needs {% generation %} around the assistant's "
                         "content, and the conversation an assistant turn.")
    return out["input_ids"], [t if m else IGNORE for t, m in zip(out["input_ids"], mask)]


def marked_text(ids: list[int], labels: list[int], tokenizer) -> str:
    """A row as text with every stretch that is in the loss between ⟦ and ⟧."""
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (labels[i] == IGNORE) != (labels[start] == IGNORE):
            text = tokenizer.decode(ids[start:i])
            parts.append(text if labels[start] == IGNORE else f"⟦{text}⟧")
            start = i
    return " ".join(parts)


def shorten_prompt(ids: list[int], labels: list[int], max_length: int) -> tuple[list[int], list[int]] | None:
    """Fit a row into ``max_length`` tokens by cutting the middle of its longest prompt stretch; None if that is not enough.

    Answer tokens are never cut. The middle goes because the head holds the role and the instruction, and the tail the
    turn's end.
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids, labels
    start, end, i = 0, 0, 0
    while i < len(labels):
        j = i
        while j < len(labels) and labels[j] == IGNORE:
            j += 1
        if j - i > end - start:
            start, end = i, j
        i = max(j, i + 1)
    keep = end - start - excess
    if keep < 8:
        return None
    cut = slice(start + (keep + 1) // 2, start + (keep + 1) // 2 + excess)
    ids, labels = list(ids), list(labels)
    del ids[cut], labels[cut]
    return ids, labels


def render(dataset: Dataset, tokenizer, max_length: int) -> tuple[Dataset, dict]:
    """Add ``input_ids`` and ``labels``; rows whose answer alone does not fit are dropped. Returns (dataset, report).

    The report counts rows, rows with a shortened prompt, prompt tokens cut, rows dropped, and response tokens.
    """
    rows, report = [], dict.fromkeys(("prompts_shortened", "prompt_tokens_cut", "answer_tokens_cut", "rows_dropped",
                                      "response_tokens"), 0) | {"rows": len(dataset)}
    for i, messages in enumerate(dataset["messages"]):
        full, labels = encode(messages, tokenizer)
        fitted = shorten_prompt(full, labels, max_length)
        if fitted is None:
            report["rows_dropped"] += 1
            continue
        response = sum(t != IGNORE for t in fitted[1])
        report["prompts_shortened"] += len(fitted[0]) < len(full)
        report["prompt_tokens_cut"] += len(full) - len(fitted[0])
        report["answer_tokens_cut"] += sum(t != IGNORE for t in labels) - response
        report["response_tokens"] += response
        rows.append((i, *fitted))
    kept = dataset.select([i for i, _, _ in rows])
    kept = kept.add_column("input_ids", [ids for _, ids, _ in rows]).add_column("labels", [ls for _, _, ls in rows])
    return kept, report


def pack(texts: list[str], tokenizer, block: int, max_tokens: int | None = None) -> Dataset:
    """Plain text as blocks of ``block`` tokens with an end token after each text; every token is a label."""
    flat: list[int] = []
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
    groups: dict[str, list[int]] = {}
    for i, skill in enumerate(skills):
        groups.setdefault(skill, []).append(i)
    placed = []
    for rows in groups.values():
        rng.shuffle(rows)
        placed += [((j + rng.random()) / len(rows), i) for j, i in enumerate(rows)]
    return [i for _, i in sorted(placed)]


def stream(rows: list[int], steps: int, batch_size: int, seed: int, lengths: list[int] | None = None, window: int = 1) -> list[int]:
    """``steps * batch_size`` row numbers: shuffled passes over ``rows``, one after another; the order a training run sees.

    With ``window`` above 1, batches are formed from neighbours in length within each ``window`` batches, and those batches
    shuffled: less padding, the same rows.
    """
    rng = random.Random(f"stream {seed}")
    needed, order = steps * batch_size, []
    while len(order) < needed:
        order += rng.sample(rows, len(rows))
    del order[needed:]
    if window > 1:
        for start in range(0, needed, window * batch_size):
            part = sorted(order[start:start + window * batch_size], key=lambda i: lengths[i])
            batches = [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
            rng.shuffle(batches)
            order[start:start + window * batch_size] = [i for batch in batches for i in batch]
    return order


def example_key(identifier: str) -> int:
    """A 63-bit key of an example's id, so that a batch can name its examples in a tensor."""
    return int.from_bytes(hashlib.blake2b(str(identifier).encode(), digest_size=8).digest(), "big") >> 1


def bins(lengths: list[int], width: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``width``: longest first, each into the first bin with room."""
    room: list[int] = []
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((j for j, r in enumerate(room) if r >= lengths[i]), len(room))
        if place == len(room):
            room.append(width)
            out.append([])
        room[place] -= lengths[i]
        out[place].append(i)
    return out


@dataclass
class Collator:
    """Batches of ``input_ids`` and ``labels``, padded on the right to the longest row.

    With ``pack``, rows share sequences of twice that length where it saves a tenth: ``position_ids`` start anew with each
    row, and no row sees another. Rows with an ``id`` add ``example``, in the order in which they stand.
    """

    pad_token_id: int
    pack: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = [len(r["input_ids"]) for r in rows]
        width, places = max(lengths), [[i] for i in range(len(rows))]
        packed = bins(lengths, 2 * width) if self.pack else places
        if shared := 2 * len(packed) <= 0.9 * len(rows):
            width, places = 2 * width, packed
        columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids" if shared else "attention_mask": []}
        for place in places:
            ids, labels, marks = [], [], []
            for i in place:
                ids += rows[i]["input_ids"]
                labels += [IGNORE, *rows[i]["labels"][1:]]  # nothing before a row predicts its first token
                marks += range(lengths[i]) if shared else [1] * lengths[i]
            rest = width - len(ids)
            for column, part, filler in zip(columns.values(), (ids, labels, marks), (self.pad_token_id, IGNORE, 0)):
                column.append(part + [filler] * rest)
        batch = {name: torch.tensor(column) for name, column in columns.items()}
        if "id" in rows[0]:
            batch["example"] = torch.tensor([example_key(rows[i]["id"]) for place in places for i in place])
        return batch
