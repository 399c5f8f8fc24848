"""Instructions that people wrote, from a hub dataset or from local JSON lines, as a corpus."""

import gzip
import json
import os
import re
import zlib
from pathlib import Path

from datasets import Dataset, load_dataset

from kdlib.data import Corpus


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a UTF-8 JSON-lines file, plain or gzip. Raises ValueError with file and line on a malformed row."""
    opener = gzip.open if str(path).endswith(".gz") else open
    rows, number = [], 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        line = number if isinstance(error, json.JSONDecodeError) else number + 1
        raise ValueError(f"{path}, line {line}: not a JSON line in UTF-8 ({error}).") from error
    return rows


def load_rows(source: dict) -> list[dict]:
    """Rows of one source: the local file under ``KDLIB_DATA`` if that is set, else the hub id.

    ``source`` has ``local`` (file name), ``hub`` (dataset id) with an optional ``hub_config``, and ``where`` (column =
    value, for the local file). Raises FileNotFoundError naming both remedies.
    """
    root = os.environ.get("KDLIB_DATA")
    if root:
        path = Path(root) / source["local"]
        if not path.is_file():
            raise FileNotFoundError(f"KDLIB_DATA={root!r} has no file {source['local']!r}; point KDLIB_DATA at the folder "
                                    f"that holds it, or unset it to load {source['hub']!r} from the hub.")
        rows = read_jsonl(path)
        return [r for r in rows if all(r.get(k) == v for k, v in source.get("where", {}).items())]
    try:
        rows = load_dataset(source["hub"], source.get("hub_config"), split="train")
    except Exception as error:  # the hub's client raises many kinds; the remedy is the same for all
        raise FileNotFoundError(
            f"Neither the hub nor local data can be reached for {source['hub']!r} ({type(error).__name__}): connect to the "
            f"internet (or log in), or set KDLIB_DATA to a folder that holds {source['local']!r}.") from error
    return [{"id": f"{source['hub']}-{i}", **row} for i, row in enumerate(rows)]


def to_messages(row: dict) -> list[dict]:
    """The conversation of a row: ``messages``, or ``instruction``/``context``/``response`` (Dolly's columns)."""
    if row.get("messages"):
        return row["messages"]
    if not row.get("response"):
        raise ValueError(f"Row {row.get('id')!r} has neither 'messages' nor 'instruction' and 'response'; "
                         f"its columns are {sorted(row)}.")
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("context")) if part)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["response"]}]


def corpus(world_seed: int, *, pretrain: dict, train: dict, test: dict, validation_rows: int, test_rows: int) -> Corpus:
    """Human-written instructions as a :class:`~kdlib.data.Corpus`; there is one such world, whatever ``world_seed``.

    Exact duplicates of a prompt are dropped, and so is every training row whose prompt is held out. Where the ``test``
    source cannot be had (the hub has no such split), one row in twenty is held out, chosen by a hash of its prompt.
    Validation rows come from the training source.
    """
    raw = load_rows(train)
    pool = _conversations(raw, train.get("category_in_id"))
    if test.get("hub") or os.environ.get("KDLIB_DATA"):
        held = _conversations(load_rows(test), test.get("category_in_id"))
    else:
        held = {p: r for p, r in pool.items() if zlib.crc32(p.encode()) % 20 == 0}
    overlap = pool.keys() & held.keys()
    rows = [pool[p] for p in sorted(pool.keys() - overlap, key=lambda p: zlib.crc32(p.encode()))]
    tests = sorted(held.values(), key=lambda r: zlib.crc32(r["id"].encode()))[:test_rows]
    report = {"rows_read": len(raw), "duplicate_prompts_dropped": len(raw) - len(pool), "held_out_prompts_dropped": len(overlap)}
    return Corpus(pretrain=lambda: [row["text"] for row in load_rows(pretrain) if row["text"].strip()],
                  train=Dataset.from_list(rows[validation_rows:]),
                  validation=Dataset.from_list(rows[:validation_rows]), test=Dataset.from_list(tests), report=report)


def _conversations(rows: list[dict], category_in_id: str | None) -> dict[str, dict]:
    out: dict[str, dict] = {}
    for row in rows:
        messages = to_messages(row)
        found = category_in_id and re.match(category_in_id, str(row["id"]))
        kind = str(row.get("category") or (found and found[1]) or row.get("source") or "all")
        out.setdefault(messages[0]["content"].strip(), {"id": str(row["id"]), "messages": messages, "skill": kind, "suite": "seen"})
    return out


def verifier(world_seed: int) -> None:
    """None: free text has no answer that a rule could check, so it is scored by likelihood."""
