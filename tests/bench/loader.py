"""Loading chat data at Tulu 3's size: ``python tests/bench/loader.py [ROWS]`` writes rows of such lengths, reads, filters, renders and budgets
them on one core and on all, a tenth of them, and all of them on all, and notes seconds, memory and what came out of it. ``loader.py do FILE
CORES`` is one such run.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from run import record_of
from study import watched

from kdlib import data, models, stages, store

TULU = 939_343  # rows of its mixture
TURNS = ((60, "user"), (180, "assistant"))  # median words


def words(number: int, rng: random.Random) -> list[str]:
    """Words of one to four syllables, common ones short."""
    parts = [f"{a}{b}" for a in "b d f g k l m n p r s t v st tr pl ch".split() for b in "a e i o u an er is on".split()]
    return list(dict.fromkeys("".join(rng.choices(parts, k=1 + i * 4 // number)) for i in range(number)))


def write(path: Path, rows: int, speech: list[str]) -> None:
    """JSON lines whose prompts and answers have log-normal lengths and long tails, of twenty sources; one row in a hundred comes twice, one in
    five has two turns, one in five hundred no answer.
    """
    rng, lengths = random.Random(0), np.random.default_rng(0)
    sizes = {role: np.minimum(4000, lengths.lognormal(np.log(median), 1.0, 2 * rows)).astype(int) + 1 for median, role in TURNS}
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            turns = []
            for j in range(1 + (i % 5 == 0)):
                for _, role in TURNS:
                    start = rng.randrange(len(speech) - 4001)
                    turns.append({"role": role, "content": " ".join(speech[start:start + sizes[role][2 * i + j]])})
            if i % 500 == 0:
                turns[-1]["content"] = ""
            line = json.dumps({"id": f"row-{i}", "source": f"source-{i % 20}", "messages": turns}) + "\n"
            file.write(line * (1 + (i % 100 == 1)))


def load(path: Path, cores: int) -> None:
    """The data artefact of a preset over ``path``, and an order of its rows; leaves what came out beside it, as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(cores))
    spec = {"version": 0, "source": {"kind": "text", "train": {"local": str(path)}, "test": {}, "validation_rows": 500, "test_rows": 500}, "train_rows": TULU,
            "max_length": 4096, "max_new_tokens": 1024, "vocab_size": 0, "world_seed": 0, "tokenizer": {"name": str(path.parent / "tokenizer")}}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        known = stages.read_data(root := store.open_folder(Path(folder) / "results"), spec)
        found = {**known.report["loading"]["train"], **{k: v for k, v in known.report["train"].items() if isinstance(v, (int, float))}}
        budgeted = len(data.nested_order(list(known.rows("train")["skill"]), 0))
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    (path.parent / "found.json").write_text(json.dumps({**found, "budgeted": budgeted, "artefact_mib": size / 2**20}))


def bench(rows: int) -> dict:
    """Seconds and memory of reading, filtering, rendering and budgeting rows as long as Tulu 3's, by rows and processor cores."""
    found, rng = {}, random.Random(1)
    known = words(60_000, rng)
    speech = rng.choices(known, weights=[1 / (i + 10) for i in range(len(known))], k=2_000_000)
    with tempfile.TemporaryDirectory() as folder:
        texts = [" ".join(speech[i:i + 200]) for i in range(0, 200_000, 200)]
        models.build_tokenizer(None, texts, 32_000).save_pretrained(Path(folder) / "tokenizer")
        for count, cores in ((rows // 10, (1, os.cpu_count())), (rows, (os.cpu_count(),))):
            write(path := Path(folder) / f"{count}.jsonl", count, speech)
            for n in cores:
                row = watched([sys.executable, __file__, "do", str(path), str(n)])
                told = json.loads((Path(folder) / "found.json").read_text())
                found[f"{count:,} rows, {n} cores"] = {**row, "rows_per_s": count / row["seconds"], "file_mib": path.stat().st_size / 2**20, **told}
                print(count, n, found[f"{count:,} rows, {n} cores"], flush=True)
            path.unlink()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["do"]:
        load(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        record_of("loader", bench.__doc__, lambda: bench(int(sys.argv[1]) if len(sys.argv) > 1 else TULU), threads=1)
