"""Instructions that people wrote, from the hub or from local files, as a corpus.

A *source* says where rows are: ``local`` (JSON lines, Parquet, a folder of either or one that ``save_to_disk`` wrote), a path or a name under
``KDLIB_DATA`` if that is set, else ``hub`` with ``hub_config``, ``revision`` and ``split``. ``where`` picks local rows by their columns; ``prompt``
and ``answer`` (Jinja) make turns of a set's own columns; ``drop`` is a pattern cut out of them; ``unanswered`` keeps the prompts alone; and
``category_in_id`` finds in an id what budgets are stratified by, else it is ``category`` or ``source``.
"""

import gzip
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_dataset_builder, load_from_disk
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetGenerationError
from jinja2 import Environment, StrictUndefined, TemplateError, Undefined
from pyarrow import ArrowInvalid

from kdlib.data import Corpus, processes
from kdlib.presets import check
from kdlib.store import digest, file_hash, room_on_disk

FIELDS = ("local", "hub", "hub_config", "revision", "split", "where", "prompt", "answer", "drop", "category_in_id")
COLUMNS = (("instruction", "context", "response"), ("instruction", "input", "output"), ("prompt", None, "completion"))  # Dolly, Alpaca, TRL
FEATURES = Features({"messages": [{"role": Value("string"), "content": Value("string")}], **dict.fromkeys(("prompt", "whole", "first"), Value("int64")),
                     **dict.fromkeys(("id", "skill", "suite", "answer", "fate"), Value("string"))})
FINAL = re.compile(r"Answer: *(.+?)[\s.]*$")


class _Absent(StrictUndefined):
    """What a row lacks, which a template may ask for and not show."""

    __bool__ = Undefined.__bool__


_template = lru_cache(Environment(undefined=_Absent).from_string)  # which compiles


def check_source(source: dict) -> None:
    """ValueError unless ``source`` is one, as this module says."""
    check("source", source, dict, f"a source with local or hub, of the fields {', '.join(FIELDS)}", lambda v: v.keys() <= {*FIELDS} and (v.get("local") or v.get("hub")))
    check("source['where']", source.get("where", {}), dict, "values by the names of columns")
    for field in ("local", "hub", "hub_config", "revision", "split"):
        check(f"source[{field!r}]", "" if source.get(field) is None else source[field], str, "text")
    for field, compiled in (("prompt", _template), ("answer", _template), ("drop", re.compile), ("category_in_id", re.compile)):
        try:
            found = compiled(check(f"source[{field!r}]", source.get(field, ""), str, "text"))
            check(f"source[{field!r}]", source.get(field, "()"), str, "a pattern with a group", lambda v: field != "category_in_id" or not source.get(field) or found.groups)
        except (TemplateError, re.error) as error:
            raise ValueError(f"source[{field!r}]={source[field]!r} is not allowed ({error}); allowed: {'a Jinja template' if compiled is _template else 'a pattern'}.") from error


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # of this process; what is read lies there as Arrow files


def find(source: dict) -> Path | None:
    """The local path of a source; None if it is the hub's. FileNotFoundError if it is missing where it should be."""
    root, name = os.environ.get("KDLIB_DATA"), source.get("local")
    if name and (root or Path(name).is_absolute()):
        if (path := Path(root or "") / name).exists():
            return path
        raise FileNotFoundError(f"KDLIB_DATA={root!r} has no file {name!r}; point KDLIB_DATA at its folder, or unset it for the hub.")
    return None


def load_rows(source: dict) -> Dataset:
    """Rows of a source as they stand there, memory-mapped; of JSON lines each ``line`` and where it is (``at``). Raises if they cannot be had."""
    if path := find(source):
        files = sorted(str(p) for p in path.rglob("*") if p.is_file()) if path.is_dir() else [str(path)]
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved, part = load_from_disk(path), source.get("split", "train")
            if isinstance(saved, DatasetDict) and part not in saved:
                raise ValueError(f"split={part!r} is not in {path}; allowed: {', '.join(saved)}.")
            return saved[part] if isinstance(saved, DatasetDict) else saved
        tables, texts = ([f for f in files if re.search(kind, f)] for kind in (r"\.parquet$", r"\.jsonl?(\.gz)?$"))
        if bool(tables) == bool(texts):
            raise FileNotFoundError(f"{path} holds {'both kinds of' if tables else 'no'} data; allowed: .jsonl and .jsonl.gz, or .parquet, or a folder of either.")
        try:
            if tables:
                return load_dataset("parquet", data_files=tables, split="train", cache_dir=tempfile.mkdtemp(dir=_scratch().name))
            return Dataset.from_generator(_lines, gen_kwargs={"files": texts}, cache_dir=tempfile.mkdtemp(dir=_scratch().name))
        except (DatasetGenerationError, SchemaInferenceError, ArrowInvalid) as error:
            cause = error.__cause__ or error
            if isinstance(cause, SchemaInferenceError):
                raise ValueError(f"{path} has no rows; allowed: data with some.") from error
            if texts:
                raise cause
            why = f"{type(cause).__name__}: {cause}".split("\n")[0][:200]
            raise ValueError(f"{path} cannot be read as Parquet files of the same columns ({why}).") from error
    with _reached(source):
        return load_dataset(source["hub"], source.get("hub_config"), revision=source.get("revision"), split=source.get("split", "train"))


@contextmanager
def _reached(source: dict):
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds; the remedy is the same for all
        why, local = f"{type(error).__name__}: {error}".split("\n")[0][:200], source.get("local")
        raise FileNotFoundError(f"Neither the hub nor local data can be reached for {source.get('hub')!r} ({why}): connect to the internet (gated sets: "
                                f"`hf auth login`){f', or set KDLIB_DATA to a folder that holds {local!r}' if local else ''}.") from error


def _lines(files: list[str]):
    for path in files:
        number = 0
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield {"line": line, "at": f"{path}, line {number}"}
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # a broken archive ends before the line that it spoils
            raise ValueError(f"{path}, line {number + 1}: the archive is broken ({error}).") from error


def parse(row: dict, number: int, name: str) -> tuple[dict, str]:
    """A row, decoded if it is of JSON lines, and where it is. ValueError on a line that is no JSON object in UTF-8."""
    if row.keys() != {"line", "at"} or not isinstance(row["line"], bytes):
        return row, f"{name}, row {number + 1}"
    try:
        found = {**json.loads(row["line"].decode("utf-8"))}
        if b"\\ud" in row["line"].lower():  # half of a pair, perhaps, which UTF-8 has no bytes for
            json.dumps(found, ensure_ascii=False).encode()
        return found, row["at"]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{row['at']}: not a JSON object in UTF-8 ({error}).") from error


def to_messages(row: dict, where: str = "", source: dict | None = None) -> list[dict]:
    """The conversation of a row: ``messages``; or as ``source`` says; or ``instruction`` with ``response`` or ``output`` (and ``context`` or
    ``input``), or ``prompt`` with ``completion``. ValueError, naming row and place, if there is none.
    """
    messages, source = row.get("messages"), source or {}
    if messages is None and "prompt" in source:
        try:
            messages = [{"role": role, "content": _template(source[k]).render(row) if k in source else ""}
                        for k, role in (("prompt", "user"), ("answer", "assistant"))]
        except (TemplateError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{where}: row {row.get('id')!r} does not fit the source's templates ({error}); its columns are {', '.join(row)}.") from error
    for first, more, last in COLUMNS if messages is None else ():
        if messages is None and row.get(first) and row.get(last) is not None:
            parts = [row[first], row[last]]
            if isinstance(row[first], str):
                asked = [part for part in (row[first], row.get(more)) if part]
                asked = "\n\n".join(asked) if all(isinstance(part, str) for part in asked) else asked
                parts = [[{"role": role, "content": text}] for role, text in (("user", asked), ("assistant", row[last]))]
            messages = [*parts[0], *parts[1]]
    if messages is None:
        raise ValueError(f"{where}: row {row.get('id')!r} has no 'messages' and no 'instruction' or 'prompt' with an answer, but {sorted(row)}.")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {type(m.get(k)) for k in ("role", "content")} == {str} for m in messages):
        raise ValueError(f"{where}: row {row.get('id')!r} needs messages that are objects with texts 'role' and 'content'.")
    return [{"role": m["role"], "content": re.sub(source["drop"], "", m["content"]) if "drop" in source else m["content"]} for m in messages]


def _key(messages: list[dict]) -> int:
    said = json.dumps([[m["role"], m["content"].strip()] for m in messages]).encode()
    return int.from_bytes(blake2b(said, digest_size=8).digest(), "big", signed=True)


def _normal(row: dict, number: int, source: dict, name: str) -> dict:
    """One row as all of them are, its last line's answer, keys of prompt and whole, and whether it is kept."""
    row, where = parse(row, number, name)
    identifier, messages, fate, turns = str(row.get("id") or f"{name}-{number}"), [], "other", ()
    final = None
    if all(row.get(k) == v for k, v in source["where"].items()):
        messages, fate = to_messages(row, where, source), "kept"
        final = FINAL.search(messages[-1]["content"]) if messages else None  # kept of unanswered ones too, to count right labels
        if source.get("unanswered"):
            messages = [*(m for m in messages if m["role"] != "assistant"), {"role": "assistant", "content": ""}]
        elif not (last := max((i for i, m in enumerate(messages, 1) if m["role"] == "assistant"), default=0)):
            raise ValueError(f"{where}: row {identifier!r} has no assistant's turn, so there is nothing to learn from it.")
        else:
            messages = messages[:last]  # what nobody answers teaches nothing
            fate = "kept" if all(m["content"].strip() for m in messages if m["role"] == "assistant") else "empty"
        turns = [m["role"] for m in messages]
    opened = turns.index("user") if "user" in turns else 0  # a greeting asks nothing
    answered = turns.index("assistant", opened) if "assistant" in turns[opened:] else len(turns)
    found = source.get("category_in_id") and re.match(source["category_in_id"], identifier)
    kind = str(row.get("category") or (found and found[1]) or row.get("source") or "all")
    return {"id": identifier, "messages": messages, "skill": kind, "suite": "seen", "answer": final and final[1], "fate": fate,
            "prompt": _key([m for m in messages if m["role"] != "assistant"]), "whole": _key(messages),
            "first": _key([m for m in messages[:answered] if m["role"] != "assistant"])}


def conversations(source: dict, num_proc: int | None = None) -> tuple[Dataset, dict]:
    """Rows as ``id``, ``messages``, ``skill``, ``suite``, ``answer``, ``first``, a key of what is said before a user is first answered, and ``prompt``,
    of all that is said before or between answers, in an order drawn by it; no conversation twice, no id either. Also counts of what was
    left out. ValueError if nothing is left.
    """
    name, scratch = str(source.get("local") or source["hub"]), _scratch().name
    with room_on_disk(scratch):
        rows, where = load_rows(source), source.get("where", {}) if find(source) else {}
        rows = rows.map(_normal, with_indices=True, fn_kwargs={"source": {**source, "where": where}, "name": name}, remove_columns=rows.column_names,
                        num_proc=num_proc or processes(len(rows)), cache_file_name=tempfile.mktemp(".arrow", dir=scratch), features=FEATURES)
    fate, whole, prompt = (rows.with_format("numpy")[k][:] for k in ("fate", "whole", "prompt"))
    kept = np.flatnonzero(fate == "kept")
    first = kept[np.unique(whole[kept], return_index=True)[1]]
    if not len(first):
        wanted = " with " * bool(where) + ", ".join(f"{k}={v!r}" for k, v in where.items())
        raise ValueError(f"{name} has no row{wanted} among its {len(rows)} that says something; the study needs some.")
    report = {"rows_read": int((fate != "other").sum()), "empty_answers_dropped": int((fate == "empty").sum()), "duplicates_dropped": len(kept) - len(first)}
    rows = rows.select(first[np.lexsort((first, prompt[first]))]).remove_columns(["whole", "fate"])
    if len(set(ids := list(rows["id"]))) < len(ids):
        times, given = Counter(), set()
        for place, i in enumerate(ids):
            while ids[place] in given:
                times[i] += 1
                ids[place] = f"{i}#{times[i] + 1}"
            given.add(ids[place])
        rows = rows.remove_columns("id").add_column("id", ids)
    rows._fingerprint = digest([name, report, len(rows), int(prompt.sum())])  # of what was read, not of this code
    return rows, report


def split(train: dict, test: dict, *, validation_rows: int, test_rows: int) -> tuple[dict[str, Dataset], dict]:
    """``train``, ``validation`` and ``test`` without a prompt in common, and counts. ``test`` says how its source differs from training's; if by
    nothing that is at hand (another hub id or split, a local file while ``KDLIB_DATA`` is set), prompts are held out of that, at most one in
    twenty. Validation rows are training's, at most a quarter.
    """
    rows, report = conversations(train)
    own = test.keys() & {"hub", "split"} or (test and find(test))
    held = conversations({**train, **test})[0] if own else rows.select(range(len(rows) - some, len(rows)) if (some := min(test_rows, len(rows) // 20)) else [])
    tests = held.select(np.argsort([_key([{"role": "", "content": i}]) for i in held["id"]])[:test_rows]) if len(held) else held
    (prompts, taken), (firsts, heard) = ([r.with_format("numpy")[k][:] for r in (rows, held)] for k in ("prompt", "first"))
    free = np.flatnonzero(~np.isin(prompts, taken) & ~np.isin(firsts, heard))
    checks, rest = np.split(free, [min(validation_rows, len(free) // 4)])
    if not min(len(tests), len(checks)):
        raise ValueError(f"{train.get('local') or train['hub']} has {len(rows)} conversations with {len(np.unique(firsts))} different beginnings, of which "
                         f"{len(tests)} are left to test and {len(checks)} to validate (test_rows={test_rows}, validation_rows={validation_rows}); "
                         "allowed: 20 or more with beginnings of their own.")
    report["held_out_prompts_dropped"] = len(rows) - len(free)
    kept = rest[~np.isin(prompts[rest], prompts[checks]) & ~np.isin(firsts[rest], firsts[checks])]
    if dropped := len(rest) - len(kept):
        report["validation_prompts_dropped"] = dropped
    return {"train": rows.select(kept), "validation": rows.select(checks), "test": tests}, report


def corpus(world_seed: int, *, train: dict, test: dict, pretrain: dict | None = None, domains: dict | None = None, **sizes) -> Corpus:
    """Human-written instructions as a :class:`~kdlib.data.Corpus`; there is one such world, whatever ``world_seed``. ``sizes`` are those of
    :func:`split`. A domain of ``domains`` has a ``train`` and a ``test`` source too, and a ``pool`` of prompts whose answers nobody is to see:
    another source's, or the training prompts themselves, of which the first ``annotated_rows`` are annotated too.
    """
    sets, train_report = split(train, test, **sizes)
    report = {"train": train_report}
    for name, d in (domains or {}).items():
        own, report[name] = split(d["train"], d["test"], **{k: d[k] for k in ("validation_rows", "test_rows")})
        pool, held = conversations({**d.get("pool", d["train"]), "unanswered": True})[0], np.concatenate(
            [own[k].with_format("numpy")["prompt"][:] for k in ("validation", "test")])
        free = np.flatnonzero(~np.isin(pool.with_format("numpy")["prompt"][:], held))
        own |= {"train": own["train"].select(range(min(len(own["train"]), d["annotated_rows"]))), "pool": pool.select(free[-d["unlabelled_rows"]:])}
        sets |= {f"{name}/{k}": v for k, v in own.items()}
    return Corpus(pretrain=lambda: _plain(pretrain), sets={n: rows.remove_columns(["prompt", "first"]) for n, rows in sets.items()}, report=report)


def verifier(world_seed: int):
    """``verify(row, reply)``: whether a reply ends with the row's final ``Answer: …``; None where the row has none."""
    return lambda row, reply: (found := FINAL.search(reply.strip())) is not None and found[1] == row["answer"] if row["answer"] else None


def _parts(sources: dict) -> list[dict]:
    return [s for d in (sources, *sources.get("domains", {}).values()) for s in d.values() if isinstance(s, dict) and {"local", "hub"} & s.keys()]


def commits(**sources) -> dict[str, str]:
    """The commit of each data set, ``id@revision``, that :func:`corpus` reads from the hub with these arguments."""
    found = {}
    for s in _parts(sources):
        if "hub" in s and not find(s) and not Path(s["hub"]).is_dir():
            with _reached(s):
                found[f"{s['hub']}@{s.get('revision') or 'main'}"] = load_dataset_builder(s["hub"], s.get("hub_config"), revision=s.get("revision")).hash
    return found


def origin(**sources) -> dict[str, str] | None:
    """SHA-256 of the local files that :func:`corpus` reads with these arguments; None if it reads from the hub."""
    found = [(s["local"], path) for s in _parts(sources) if (path := find(s))]
    return {str(Path(name, p.relative_to(path))): file_hash(p) for name, path in found
            for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if p.is_file()} or None


def _plain(source: dict) -> list[str]:
    out, name = [], str(source.get("local") or source["hub"])
    for row, where in (parse(raw, i, name) for i, raw in enumerate(load_rows(source))):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{where} has no 'text'; its columns are {sorted(row)}.")
        out += [row["text"]] if row["text"].strip() else []
    return out
