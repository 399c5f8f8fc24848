"""Instructions that people wrote, from a hub dataset or from local JSON lines, as a corpus."""

import gzip
import json
import os
import re
import zlib
from pathlib import Path

from datasets import Dataset, load_dataset

from kdlib.data import Corpus
from kdlib.store import file_hash


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a UTF-8 JSON-lines file, plain or gzip. Raises ValueError with file and line on a malformed row."""
    rows, number = [], 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append({**json.loads(line.decode("utf-8"))})
    except (ValueError, TypeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        number += not isinstance(error, (ValueError, TypeError))  # a broken archive ends before the line that it spoils
        raise ValueError(f"{path}, line {number}: not a JSON object in UTF-8 ({error}).") from error
    return rows


def load_rows(source: dict) -> list[dict]:
    """Rows of a source: ``local`` under ``KDLIB_DATA`` if set, columns as in ``where``, else ``hub``; raises if it has none."""
    if root := os.environ.get("KDLIB_DATA"):
        path = Path(root) / source["local"]
        if not path.is_file():
            raise FileNotFoundError(f"KDLIB_DATA={root!r} has no file {source['local']!r}; point KDLIB_DATA at its folder, or unset it for the hub.")
        rows, where = read_jsonl(path), source.get("where", {})
        if kept := [r for r in rows if all(r.get(k) == v for k, v in where.items())]:
            return kept
        raise ValueError(f"{path} has no row with {', '.join(f'{k}={v!r}' for k, v in where.items())} among its {len(rows)}; the study needs some.")
    try:
        rows = load_dataset(source["hub"], source.get("hub_config"), split="train")
    except Exception as error:  # the hub's client raises many kinds; the remedy is the same for all
        raise FileNotFoundError(f"Neither the hub nor local data can be reached for {source['hub']!r} ({type(error).__name__}): connect to the "
                                f"internet (or log in), or set KDLIB_DATA to a folder that holds {source['local']!r}.") from error
    return [{"id": f"{source['hub']}-{i}", **row} for i, row in enumerate(rows)]


def to_messages(row: dict, where: str = "") -> list[dict]:
    """The conversation of a row: ``messages``, or ``instruction``/``context``/``response`` (Dolly's columns). ValueError, from ``where``."""
    if messages := row.get("messages"):
        fine = isinstance(messages, list) and all(isinstance(m, dict) and {type(m.get(k)) for k in ("role", "content")} == {str} for m in messages)
        if not fine or not any(m["role"] == "assistant" for m in messages):
            raise ValueError(f"{where}Row {row.get('id')!r}: messages must be objects with texts 'role' and 'content', one of them an assistant's.")
        return messages
    if not row.get("instruction") or not row.get("response"):
        raise ValueError(f"{where}Row {row.get('id')!r} has no 'messages' and no 'instruction' with 'response', but {sorted(row)}.")
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("context")) if part)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["response"]}]


def corpus(world_seed: int, *, pretrain: dict, train: dict, test: dict, validation_rows: int, test_rows: int) -> Corpus:
    """Human-written instructions as a :class:`~kdlib.data.Corpus`; there is one such world, whatever ``world_seed``. Rows whose prompt (all
    that is said before or between the answers) came before or is held out are dropped. Where there is no ``test`` source, one row in twenty
    is held out, by a hash of its prompt. Validation rows come from the training source.
    """
    pool, read = _conversations(train)
    apart = test.get("hub") or os.environ.get("KDLIB_DATA")
    held = _conversations(test)[0] if apart else {p: r for p, r in pool.items() if zlib.crc32(p.encode()) % 20 == 0}
    overlap = pool.keys() & held.keys()
    rows = [pool[p] for p in sorted(pool.keys() - overlap, key=lambda p: zlib.crc32(p.encode()))]
    tests = sorted(held.values(), key=lambda r: zlib.crc32(r["id"].encode()))[:test_rows]
    report = {"rows_read": read, "duplicate_prompts_dropped": read - len(pool), "held_out_prompts_dropped": len(overlap)}
    sets = {"train": rows[validation_rows:], "validation": rows[:validation_rows], "test": tests}
    return Corpus(pretrain=lambda: _plain(pretrain), sets={n: Dataset.from_list(r) for n, r in sets.items()}, report=report)


def origin(**source) -> dict[str, str] | None:
    """SHA-256 of the local files that :func:`corpus` reads with these arguments; None if it reads from the hub."""
    root = os.environ.get("KDLIB_DATA")
    paths = [Path(root) / source[part]["local"] for part in ("pretrain", "train", "test")] if root else []
    return {p.name: file_hash(p) for p in paths if p.is_file()} or None


def _plain(source: dict) -> list[str]:
    rows = load_rows(source)
    if odd := next((i for i, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)), 0):
        name = source["local" if os.environ.get("KDLIB_DATA") else "hub"]
        raise ValueError(f"{name}, row {odd} has no 'text'; its columns are {sorted(rows[odd - 1])}.")
    return [row["text"] for row in rows if row["text"].strip()]


def _conversations(source: dict) -> tuple[dict[str, dict], int]:
    """Rows by prompt, the first of each, and how many were read."""
    rows, out = load_rows(source), {}
    for row in rows:
        messages = to_messages(row, f"{source['local' if os.environ.get('KDLIB_DATA') else 'hub']}: ")
        found = source.get("category_in_id") and re.match(source["category_in_id"], str(row.get("id")))
        kind = str(row.get("category") or (found and found[1]) or row.get("source") or "all")
        prompt = "\n".join(m["content"].strip() for m in messages if m["role"] != "assistant")
        out.setdefault(prompt, {"id": str(row.get("id")), "messages": messages, "skill": kind, "suite": "seen"})
    return out, len(rows)
