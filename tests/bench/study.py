"""What a whole study takes: ``python tests/bench/study.py PRESET`` runs ``make study`` from nothing, notebook by notebook, in one world,
and notes the seconds and the most memory that all its processes hold together; ``reading`` runs every notebook and solution on the committed
results; ``live`` the cells that a class changes.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import nbformat
import psutil
from run import record_of

from kdlib import results
from kdlib.presets import PRESETS

ROOT = results.REPOSITORY


def watched(command: list[str], **environment: str) -> dict:
    """Seconds of ``command``, and the peaks in MiB of the memory of it and of all that it starts, shared pages counted once: of all, and of all
    but files that are mapped, which the system takes back when it needs room.
    """
    began, most, own = time.perf_counter(), 0, 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, **environment}) as process:
        while process.poll() is None:
            held = Counter()
            for member in [top := psutil.Process(process.pid), *top.children(recursive=True)]:
                with suppress(psutil.Error, OSError):  # it has just ended
                    lines = (line.split() for line in Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()[1:])
                    held.update({name: int(kib) for name, kib, *_ in lines})
            most, own = max(most, held["Pss:"]), max(own, held["Pss_Anon:"] + held["Pss_Shmem:"])
            time.sleep(1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return {"seconds": time.perf_counter() - began, "peak_mib": most / 2**10, "own_peak_mib": own / 2**10}


def study(preset: str) -> dict:
    """Seconds and memory of every experiment of a preset, each on what those before it left, and of all together."""
    notebooks = sorted((ROOT / "notebooks").glob("0[2-4]_*.ipynb"))
    with tempfile.TemporaryDirectory() as out:
        able = subprocess.run([sys.executable, ".ci/experiments.py", preset, "0", out, *(f"notebooks/{n.name}" for n in notebooks)],
                              cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        found = {n: watched(["make", "study", f"PRESET={preset}", f"OUT={out}", f"EXPERIMENTS={n}"]) for n in able}
    return found | {"whole": {"seconds": sum(r["seconds"] for r in found.values()), "peak_mib": max(r["peak_mib"] for r in found.values())}}


def executed(notebook: Path, out: str, tag: str | None = None, **environment: str) -> dict:
    """Seconds and memory of "Run All" of a notebook, from its first cell's start to its last one's end, or of its cells with a ``tag``."""
    row = watched([sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", out, str(notebook)], **environment)
    cells = [c for c in nbformat.read(Path(out) / notebook.name, 4).cells if c.cell_type == "code" and c.source]
    chosen = [c.metadata.execution for c in cells if tag is None or tag in c.metadata.get("tags", [])]
    times = [datetime.fromisoformat(when) for c in chosen for when in (c["iopub.status.busy"], c["shell.execute_reply"])]
    return row | {"seconds": (max(times) - min(times)).total_seconds()}


def reading() -> dict:
    """Seconds and memory of "Run All" of every notebook, and of the exercises' solutions, on the committed results."""
    with tempfile.TemporaryDirectory() as out:
        paths = [p for where in ("*.ipynb", "exercises/guide.ipynb", "exercises/solutions/*.ipynb") for p in sorted((ROOT / "notebooks").glob(where))]
        return {p.relative_to(ROOT).as_posix(): executed(p, out) for p in paths}


def live() -> dict:
    """Seconds and memory of the cells that a class changes, each from nothing, and again with another setting."""
    found, changes = {}, {
        "02": [("from nothing", "", ""), ("another temperature", '"temperature": 1.0', '"temperature": 4.0'), ("other budgets", "[100, 1600]", "[200, 800]")],
        "03": [("from nothing", "", ""), ("another teacher", 'chosen = "strong"', 'chosen = "weak"')],
        "04": [("from nothing", "", ""), ("other recipes", '"kd_then_sft", "sft_then_kd"', '"mixture", "synthetic_kd"')]}
    for number, settings in changes.items():
        path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
        with tempfile.TemporaryDirectory() as home:
            for name, usual, other in settings:
                notebook = nbformat.read(path, 4)
                cell, = (c for c in notebook.cells if "live" in c.metadata.get("tags", []))
                assert usual in cell.source
                cell.source = cell.source.replace("live = False", "live = True")
                cell.source = cell.source.replace(usual, other) if usual else cell.source
                nbformat.write(notebook, copy := Path(home) / path.name)
                (Path(home) / "out").mkdir(exist_ok=True)
                found[f"notebooks/{path.name}, {name}"] = executed(copy, f"{home}/out", "live", HOME=home)
    return found


if __name__ == "__main__":
    what, others = sys.argv[1] if len(sys.argv) == 2 else "", {"reading": reading, "live": live}
    if what not in (*PRESETS, *others):
        sys.exit(f"What to time is {what!r}; allowed: {', '.join([*PRESETS, *others])}.")
    record_of(f"study_{what}" if what in PRESETS else what, (others.get(what) or study).__doc__, others.get(what) or (lambda: study(what)), threads=1)
