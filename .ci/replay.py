"""Recompute all that is made from the committed run records, train nothing, and say what differs by a byte.

Every experiment's notebook runs on a copy of the records, for every preset and reported world; then tables, figures, claims, what the
notebooks show and the README's numbers are compared with what is committed.
"""

import shutil
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


def jobs(root: Path) -> list[list[tuple[str, Path, dict]]]:
    """Notebooks with where their executed copy goes and their parameters: those of one inner list read nothing of each other."""
    first, then = [], []
    for name in sorted(p.parent.name for p in COMMITTED.glob("*/runs")):
        preset, home = PRESETS[name], root / name
        shutil.copytree(COMMITTED / name / "runs", home / "runs")
        asked = {"preset": name, "results_dir": str(root), "train_missing": False}
        for world in preset.worlds:
            folder = home / f"world-{world}" if world else home
            for experiment in study.PARAMETERS:
                notebook = next((p.name for p in NOTEBOOKS.glob(f"*_{experiment}.ipynb")), None)
                if notebook and not preset.lacks(experiment):
                    first.append((notebook, folder / "notebooks" / notebook, {**asked, "world_seed": world}))
        first.append(("07_learning_rates.ipynb", home / "notebooks" / "07_learning_rates.ipynb", asked))
        if not preset.lacks("two_stage_domain"):
            then.append(("05_report.ipynb", home / "notebooks" / "05_report.ipynb", {k: asked[k] for k in ("preset", "results_dir")}))
    return [first, then]


def execute(job: tuple[str, Path, dict]) -> None:
    notebook, target, parameters = job
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(NOTEBOOKS / notebook), str(target), parameters, progress_bar=False, log_output=False, kernel_name="python3")


def shown(path: Path) -> list[tuple[str, str, list]]:
    """What a notebook's cells print and show, those aside whose output is no result."""
    skipped = {"nbval-ignore-output", "injected-parameters", "data-text"}
    return [(c.id, "".join(o.get("text", "") for o in c.outputs), [o.data for o in c.outputs if "data" in o])
            for c in nbformat.read(path, 4).cells if c.cell_type == "code" and not skipped & set(c.metadata.get("tags", []))]


def differences(root: Path) -> list[str]:
    """What is missing, left over or other than what is committed."""
    found = []
    for name in sorted(p.name for p in root.iterdir() if (p / "runs").is_dir()):
        made, kept = ({p.relative_to(folder / name) for p in (folder / name).rglob("*") if p.is_file() and p.suffix != ".ipynb" and "runs" not in p.parts}
                      for folder in (root, COMMITTED))
        found += [f"results/{name}/{p} is committed, but nothing makes it" for p in sorted(kept - made)]
        found += [f"results/{name}/{p} is made, but not committed" for p in sorted(made - kept)]
        found += [f"results/{name}/{p} differs" for p in sorted(made & kept) if (root / name / p).read_bytes() != (COMMITTED / name / p).read_bytes()]
        for copy in sorted((COMMITTED / name).rglob("*.ipynb")):
            found += [f"{copy.relative_to(results.REPOSITORY)}, cell {cell[0]} shows something else"
                      for cell, again in zip(shown(copy), shown(root / name / copy.relative_to(COMMITTED / name)), strict=True) if cell != again]
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        if (again := root / "lab" / "notebooks" / notebook.name).exists():
            found += [f"notebooks/{notebook.name}, cell {cell[0]} shows something else"
                      for cell, other in zip(shown(notebook), shown(again), strict=True) if cell != other]
    readme = (results.REPOSITORY / "README.md").read_text(encoding="utf-8")
    shutil.copytree(COMMITTED / "bench", root / "bench")
    return found + (["README.md has other numbers"] if generated(readme, root) != readme else [])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        root = store.open_folder(Path(scratch) / "results")
        for stage in jobs(root):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(execute, stage))
        wrong = differences(root)
    print("\n".join(wrong) or "Every table, figure, claim, notebook and README number follows from the records, byte for byte.")
    sys.exit(bool(wrong))
