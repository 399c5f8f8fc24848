"""Run records: one JSON file a run, written once, checked at every reading; and the tidy tables made from them."""

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import pandas as pd

from kdlib import store

REPOSITORY = Path(__file__).resolve().parents[1]
KEYS = tuple("run_id experiment preset method teacher student domain pool budget seed world_seed".split())
FIELDS = (*KEYS, "metrics", "items", "config", "provenance", "checksum")
CLAIM_FIELDS = tuple("claim preset world_seeds contrast estimate ci_low ci_high level n_seeds delta verdict weakest run_ids".split())
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy", "pandas", "scipy")

run_id = store.digest  # of a run's configuration, which holds only what can change the result


def record_path(root: Path, preset: str, identifier: str) -> Path:
    """Where the record of a run lies under a results folder."""
    return root / preset / "runs" / f"{identifier}.json"


def write_record(root: Path, record: dict) -> None:
    """Seal ``record`` with its checksum and write it atomically, one top-level key a line; never over an existing one."""
    if (path := record_path(root, record["preset"], record["run_id"])).exists():
        return
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        leftover.unlink()
    plain = json.loads(json.dumps(record, allow_nan=False))
    sealed = {**plain, "checksum": store.digest(plain, 64)}
    body = ",\n".join(f" {json.dumps(k)}: {json.dumps(sealed[k], allow_nan=False)}" for k in FIELDS)
    store.write_atomic(path, "{\n" + body + "\n}\n")


def read_record(path: Path) -> dict:
    """A run record. Raises ValueError, naming the file, if it is truncated, edited, incomplete or misnamed."""
    remedy = "restore it, or delete it and the run is computed again."
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: f"{name}, which no record has")
    except (OSError, ValueError) as error:
        raise ValueError(f"Run record {path} is not a file of whole JSON (truncated?); {remedy}") from error
    if missing := [f for f in FIELDS if not isinstance(record, dict) or f not in record]:
        raise ValueError(f"Run record {path} lacks {', '.join(missing)}; {remedy}")
    if record["checksum"] != store.digest({k: v for k, v in record.items() if k != "checksum"}, 64):
        raise ValueError(f"Run record {path} was changed after it was written (its checksum does not match); {remedy}")
    if record["run_id"] != path.stem or record["run_id"] != run_id(record["config"]):
        raise ValueError(f"Run record {path} does not belong under that name (its run_id is {record['run_id']}); {remedy}")
    return record


def read_records(root: Path, preset: str, ids: list[str]) -> list[dict]:
    """The records of ``ids`` that exist, in that order."""
    return [read_record(p) for p in (record_path(root, preset, i) for i in ids) if p.exists()]


def frame(records: list[dict]) -> pd.DataFrame:
    """One row a run: its keys, its scalar metrics, ``arm`` (method and teacher) and the last ``learning_rate``, sorted by them."""
    rows = [{**{k: r[k] for k in KEYS}, "arm": " ".join(filter(None, (r["method"], r["teacher"]))),
             **{k: v for k, v in r["metrics"].items() if not isinstance(v, dict)},
             "learning_rate": r["config"]["phases"][-1]["learning_rate"]} for r in records]
    return pd.DataFrame(rows).sort_values(["arm", "budget", "seed"], ignore_index=True)


@lru_cache(maxsize=1)
def environment() -> dict:
    """Code version, dirty flag, packages and machine: the part of the provenance that all runs of a process share."""
    def git(*arguments):
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = {p: importlib.metadata.version(p) for p in PACKAGES}
    for extra in ("lm_eval", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[extra] = importlib.metadata.version(extra)
    commit = git("rev-parse", "HEAD") if (REPOSITORY / ".git").exists() else None
    return {"code_version": commit, "code_dirty": bool(git("status", "--porcelain", "--", "kdlib")) if commit else None,
            "packages": packages, "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count()}


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A table as CSV with six significant digits, so that the same records give the same bytes."""
    store.write_atomic(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_claims(folder: Path) -> list[dict]:
    """The claims in a folder's ``claims.json``, none if there is no such file. Raises ValueError if it is damaged."""
    path = folder / "claims.json"
    try:
        claims = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if any(c.keys() != set(CLAIM_FIELDS) for c in claims):
            raise ValueError("a claim lacks a field")
        return sorted(claims, key=lambda c: (c["claim"], c["world_seeds"]))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole list of claims; restore it, or delete it and it is made again from the records.") from error


def write_claims(claims: list[dict], folder: Path) -> None:
    """Put ``claims`` into a folder's ``claims.json``, in place of earlier ones on the same claim and worlds."""
    with store.lock(folder, "claims"):
        merged = {(c["claim"], tuple(c["world_seeds"])): c for c in [*read_claims(folder), *claims]}
        store.write_atomic(folder / "claims.json", json.dumps([merged[k] for k in sorted(merged)], indent=1) + "\n")
