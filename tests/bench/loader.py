"""Loading chat data at Tulu 3's size: ``python tests/bench/loader.py [ROWS]`` writes rows of such lengths, reads, renders and budgets them
in one process and in several, and notes seconds and the most memory of all processes. ``loader.py do FILE PROCESSES`` is one such run.
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

from kdlib import data, models, text

TULU = 939_343  # rows of its mixture
WORDS = [f"{a}{b}{c}" for a in ("ba", "de", "ki", "lo", "mu", "ra", "so", "tu", "vi", "ze") for b in ("n", "r", "s", "l", "") for c in ("a", "ed", "ing", "o", "is", "")]


def write(path: Path, rows: int) -> None:
    """JSON lines whose prompts and answers have log-normal lengths, with medians of 60 and 180 words and long tails, of twenty sources; one
    row in a hundred comes twice, one in five has two turns.
    """
    rng, lengths = random.Random(0), np.random.default_rng(0)
    asked, said = (np.minimum(2000, lengths.lognormal(np.log(median), 1.0, 2 * rows)).astype(int) + 1 for median in (60, 180))
    speech = [rng.choice(WORDS) for _ in range(200_000)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            turns = []
            for j in range(1 + (i % 5 == 0)):
                for role, count in (("user", asked[2 * i + j]), ("assistant", said[2 * i + j])):
                    start = rng.randrange(len(speech) - 2001)
                    turns.append({"role": role, "content": " ".join(speech[start:start + count])})
            line = json.dumps({"id": f"row-{i}", "source": f"source-{i % 20}", "messages": turns}) + "\n"
            file.write(line * (1 + (i % 100 == 0)))


def load(path: str, num_proc: int) -> None:
    """Filter, render and budget the rows of a file."""
    sample = (" ".join(WORDS[i:i + 20]) for i in range(0, len(WORDS), 20))
    tokenizer = models.build_tokenizer(None, list(sample) * 50, 2000)
    rows, report = text.conversations({"local": path}, num_proc)
    rendered, counts = data.render(rows.remove_columns(["prompt", "first"]), tokenizer, 4096, drop=True, num_proc=num_proc)
    budgets = data.nested_order(list(rendered["skill"]), 0)
    print(json.dumps({**report, **counts, "budgeted": len(budgets), **data.lengths(rendered.select(range(min(20_000, len(rendered)))))}))


def bench(rows: int) -> dict:
    """Seconds and memory of reading, filtering, rendering and budgeting rows as long as Tulu 3's, by rows and processes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for count, processes in ((rows // 10, (1, os.cpu_count())), (rows, (os.cpu_count(),))):
            write(path := Path(folder) / f"{count}.jsonl", count)
            for n in processes:
                row = watched([sys.executable, __file__, "do", str(path), str(n)])
                found[f"{count:,} rows, {n} processes"] = {**row, "rows_per_s": count / row["seconds"], "file_mib": path.stat().st_size / 2**20}
                print(count, n, found[f"{count:,} rows, {n} processes"], flush=True)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["do"]:
        load(sys.argv[2], int(sys.argv[3]))
    else:
        record_of("loader", bench.__doc__, lambda: bench(int(sys.argv[1]) if len(sys.argv) > 1 else TULU), threads=1)
