"""Recompute all that is made from the committed run records, train nothing, and say what differs by a byte.

Every notebook runs on a copy of the records, for every preset and reported world; then tables, figures, claims, what the notebooks show
and the README's tables are compared with what is committed. Cells that train (tagged `trains`) are left out.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
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
        if not preset.lacks("two_stage_domain"):
            then.append(("05_report.ipynb", home / "notebooks" / "05_report.ipynb", shown))
    last = [("00_start_here.ipynb", root / "lab" / "notebooks" / "00_start_here.ipynb", {"results_dir": str(root)}),
            ("01_losses.ipynb", root / "lab" / "notebooks" / "01_losses.ipynb", {})]
    return [first, then, last]


def execute(job: tuple[str, Path, dict]) -> None:
    """Run a notebook, but for the cells that train."""
    notebook, target, parameters = job
    target.parent.mkdir(parents=True, exist_ok=True)
    asked = nbformat.read(NOTEBOOKS / notebook, 4)
    asked.cells = [c for c in asked.cells if "trains" not in c.metadata.get("tags", [])]
    nbformat.write(asked, target)
    papermill.execute_notebook(str(target), str(target), parameters, progress_bar=False, log_output=False, kernel_name="python3")


def shown(path: Path) -> list[tuple[str, str, list]]:
    """What a notebook's cells print and show, those aside whose output is no result."""
    skipped = {"nbval-ignore-output", "injected-parameters", "data-text", "trains"}
    return [(c.id, "".join(o.get("text", "") for o in c.outputs), [o.data for o in c.outputs if "data" in o])
            for c in nbformat.read(path, 4).cells if c.cell_type == "code" and not skipped & set(c.metadata.get("tags", []))]


def differences(root: Path) -> list[str]:
    """What ``root`` lacks, has besides, or has other than what is committed."""
    kept = {p for p in tracked() if len(p.parts) > 1 and not {"runs", "bench"} & set(p.parts)}
    made = {p.relative_to(root) for p in root.rglob("*") if p.is_file() and not {"runs", "bench", ".cache"} & set(p.parts) and p.parent != root}
    copies, pages = ({p for p in files if p.suffix == ".ipynb"} for files in (kept, made))
    found = [f"results/{p} is committed, but nothing makes it" for p in sorted(kept - made)]
    found += [f"results/{p} is made, but not committed" for p in sorted(made - kept - pages)]
    found += [f"results/{p} differs" for p in sorted(made & kept - copies) if (root / p).read_bytes() != (COMMITTED / p).read_bytes()]
    stored = [(COMMITTED / p, root / p) for p in sorted(copies & made)]
    stored += [(p, again) for p in sorted(NOTEBOOKS.glob("*.ipynb")) if (again := root / "lab" / "notebooks" / p.name).exists()]
    for old, new in stored:
        for cell, again in zip(shown(old), shown(new), strict=True):
            if cell != again:
                found.append(f"{old.relative_to(results.REPOSITORY)} shows something else in cell {cell[0]}")
    readme = (results.REPOSITORY / "README.md").read_text(encoding="utf-8")
    return found + (["README.md has other numbers"] if generated(readme, root) != readme else [])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        root = store.open_folder(Path(scratch) / "results")
        for stage in jobs(root):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(execute, stage))
        shutil.copytree(COMMITTED / "bench", root / "bench")
        wrong = differences(root)
    print("\n".join(wrong) or "Every table, figure, claim, notebook and README number follows from the records, byte for byte.")
    sys.exit(bool(wrong))
