"""An HTML edition of the notebooks as they are stored: one page each and an index. FOLDER is where it goes."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from readme import claims

from kdlib import results, store

NOTEBOOKS = sorted((results.REPOSITORY / "notebooks").glob("*.ipynb"))


def title(notebook) -> str:
    """The heading that a notebook starts with."""
    return notebook.cells[0].source.split("\n")[0].removeprefix("# ")


def page(notebook) -> str:
    """A notebook as HTML: exercises folded, links to other notebooks turned to their pages."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^\*\*Exercise\.\*\*\s*(.+?)(?=\n\n|\Z)", r"<details><summary>Exercise</summary>\n\n\1\n\n</details>",
                                 cell.source, flags=re.M | re.S)
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.html)", cell.source)
    body, _ = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(
        notebook, {"metadata": {"name": title(notebook)}})
    return body


def way(i: int) -> str:
    """Links from page ``i`` to the index and its neighbours."""
    near = [(NOTEBOOKS[i - 1], "←") if i else None, (NOTEBOOKS[i + 1], "→") if i + 1 < len(NOTEBOOKS) else None]
    return " · ".join(["[Index](index.html)", *(f"[{arrow} {p.stem}]({p.stem}.html)" for p, arrow in filter(None, near))])


def build(folder: Path) -> None:
    """Write all pages."""
    rows = []
    for i, path in enumerate(NOTEBOOKS):
        notebook = nbformat.read(path, 4)
        rows.append(f"* **[{title(notebook)}]({path.stem}.html)**")
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(way(i)))
        store.write_atomic(folder / f"{path.stem}.html", page(notebook))
    text = ["# When does knowledge distillation help a small language model, and when does it fail?",
            "A study in the open: notebooks, run records, and verdicts that follow from them.", "## Notebooks", "\n".join(rows),
            "## Claims", claims(results.REPOSITORY / "results")]
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n\n".join(text))])
    store.write_atomic(folder / "index.html", page(index))


if __name__ == "__main__":
    build(target := Path(sys.argv[1]))
    print(f"{len(NOTEBOOKS) + 1} pages; open {target / 'index.html'}")
