"""Recompute all that is made from the committed run records, train nothing, and say what differs by a byte.

Every notebook runs on a copy of the records, for every preset and reported world; then tables, figures, claims, what the notebooks show
and the README's tables are compared with what is committed. Nothing is asked of the hub, and no text of others is needed: what shows some is
not compared.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError
from readme import generated

from kdlib import results, store, study
from kdlib.presets import PRESETS

NOTEBOOKS = results.REPOSITORY / "notebooks"
COMMITTED = results.REPOSITORY / "results"


def tracked() -> list[Path]:
    """The files under results that are committed; a reader's own beside them do not count."""
    done = subprocess.run(["git", "-C", str(COMMITTED), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError("A replay compares with what is committed, so it needs a git checkout of the repository.")
    return [Path(name) for name in done.stdout.split("\0") if name]


def jobs(root: Path) -> list[list[tuple[str, Path, dict]]]:
    """Notebooks with where their executed copy goes and their parameters: those of one inner list read nothing of each other."""
    records, first, then = [p for p in tracked() if "runs" in p.parts], [], []
    for path in records:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(COMMITTED / path, root / path)
    for name in sorted({p.parts[0] for p in records}):
        preset, home = PRESETS[name], root / name
        asked = {"preset": name, "results_dir": str(root), "train_missing": False}
        for world in preset.worlds:
            folder = home / f"world-{world}" if world else home
            for experiment in study.PARAMETERS:
                notebook = next((p.name for p in NOTEBOOKS.glob(f"*_{experiment}.ipynb")), None)
                if notebook and not preset.lacks(experiment):
                    first.append((notebook, folder / "notebooks" / notebook, {**asked, "world_seed": world}))
        first.append(("07_learning_rates.ipynb", home / "notebooks" / "07_learning_rates.ipynb", asked))
        shown = {k: asked[k] for k in ("preset", "results_dir")}
        if len(preset.worlds) > 1:
            then.append(("05_report.ipynb", home / "notebooks" / "05_report.ipynb", shown))
    last = [("00_start_here.ipynb", root / "lab" / "notebooks" / "00_start_here.ipynb", {"results_dir": str(root)}),
            ("01_losses.ipynb", root / "lab" / "notebooks" / "01_losses.ipynb", {})]
    return [first, then, last]


def execute(job: tuple[str, Path, dict]) -> None:
    """Run a notebook, once more if its kernel's word is waited for in vain."""
    notebook, target, parameters = job
    target.parent.mkdir(parents=True, exist_ok=True)
    for tries_left in (1, 0):
        try:
            papermill.execute_notebook(str(NOTEBOOKS / notebook), str(target), parameters, progress_bar=False, log_output=False, kernel_name="python3",
                                       execution_timeout=240)
            return
        except CellTimeoutError:
            if not tries_left:
                raise


def shown(path: Path) -> dict[str, tuple]:
    """What a notebook's cells say, print and show, the outputs aside that are no result."""
    skipped, cells = {"nbval-ignore-output", "data-text"}, {}
    for c in nbformat.read(path, 4).cells:
        tags = set(c.metadata.get("tags", []))
        if "injected-parameters" not in tags:
            outputs = [] if c.cell_type == "markdown" or skipped & tags else c.outputs
            cells[c.id] = c.source, "".join(o.get("text", "") for o in outputs), [o.data for o in outputs if "data" in o]
    return cells


def differences(root: Path) -> list[str]:
    """What ``root`` lacks, has besides, or has other than what is committed."""
    kept = {p for p in tracked() if len(p.parts) > 1 and not {"runs", "bench"} & set(p.parts)}
    made = {p.relative_to(root) for p in root.rglob("*") if p.is_file() and not {"runs", "bench", ".cache"} & set(p.parts) and p.parent != root}
    stored = {root / p: COMMITTED / p for p in made if p.suffix == ".ipynb"}
    stored |= {again: p for p in NOTEBOOKS.glob("*.ipynb") if (again := root / "lab" / "notebooks" / p.name) in stored}
    made -= {p.relative_to(root) for p, old in stored.items() if old.parent == NOTEBOOKS}
    found = [f"results/{p} is committed, but nothing makes it" for p in sorted(kept - made)]
    found += [f"results/{p} is made, but not committed" for p in sorted(made - kept)]
    for p in sorted(made & kept):
        if not (COMMITTED / p).exists():
            found.append(f"results/{p} is committed, but not there")
        elif p.suffix != ".ipynb" and (root / p).read_bytes() != (COMMITTED / p).read_bytes():
            found.append(f"results/{p} differs")
    for new, old in sorted(stored.items()):
        if old.exists():
            was, now, name = shown(old), shown(new), old.relative_to(results.REPOSITORY)
            found += [f"{name} shows something else in cell {cell}" for cell in {**was, **now} if was.get(cell) != now.get(cell)]
    readme = (results.REPOSITORY / "README.md").read_text(encoding="utf-8")
    return found + (["README.md has other numbers"] if generated(readme, root) != readme else [])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("KDLIB_DATA", None)
    with tempfile.TemporaryDirectory() as scratch:
        root = store.open_folder(Path(scratch) / "results")
        for stage in jobs(root):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(execute, stage))
        shutil.copytree(COMMITTED / "bench", root / "bench")
        wrong = differences(root)
    print("\n".join(wrong) or "Every table, figure, claim, notebook and README number follows from the records, byte for byte.")
    sys.exit(bool(wrong))
