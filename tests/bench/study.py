"""What a whole study takes: ``python tests/bench/study.py PRESET`` runs ``make study`` from nothing, notebook by notebook, in one world,
and notes the seconds and the most memory that all its processes hold together; ``reading`` runs every notebook on the committed results.
"""

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


def watched(command: list[str]) -> dict:
    """Seconds of ``command``, and the peaks in MiB of the memory of it and of all that it starts, shared pages counted once: of all, and of all
    but files that are mapped, which the system takes back when it needs room.
    """
    began, most, own = time.perf_counter(), 0, 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
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


def reading() -> dict:
    """Seconds and memory of "Run All" of every notebook on the committed results: from its first cell's start to its last one's end."""
    found = {}
    with tempfile.TemporaryDirectory() as out:
        for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
            row = watched([sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", out, str(notebook)])
            cells = [c.metadata.execution for c in nbformat.read(Path(out) / notebook.name, 4).cells if c.cell_type == "code" and c.source]
            times = [datetime.fromisoformat(when) for c in cells for when in (c["iopub.status.busy"], c["shell.execute_reply"])]
            found[f"notebooks/{notebook.name}"] = row | {"seconds": (max(times) - min(times)).total_seconds()}
    return found


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what not in (*PRESETS, "reading"):
        sys.exit(f"What to time is {what!r}; allowed: {', '.join(PRESETS)}, reading.")
    record_of(f"study_{what}" if what in PRESETS else what, study.__doc__ if what in PRESETS else reading.__doc__,
              lambda: study(what) if what in PRESETS else reading(), threads=1)
