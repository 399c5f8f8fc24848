"""An HTML edition of the notebooks as they are stored: a page each, the course's too, and an index. FOLDER is where it goes."""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from readme import claims

from kdlib import results, store

HOME = results.REPOSITORY / "notebooks"
NOTEBOOKS = [p for where in ("", "exercises", "exercises/solutions") for p in sorted((HOME / where).glob("*.ipynb"))]
STYLE = """<style>
main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
.jp-RenderedHTMLCommon a { text-decoration: underline; }
.jp-RenderedHTMLCommon a.anchor-link { text-decoration: none; color: #595959; }
.jp-RenderedImage img, .jp-RenderedHTMLCommon img { max-width: 100%; height: auto; }
.jp-RenderedHTMLCommon table { display: block; max-width: 100%; overflow-x: auto; margin-left: 0; }
.jp-Cell, .jp-OutputArea-output { max-width: 100%; }
.jp-OutputArea-output pre, .highlight pre { overflow-x: auto; }
.highlight .c1, .highlight .c, .highlight .cm { color: #4a6a6a; } .highlight .o, .highlight .ow { color: #7a2ca8; }
@media (max-width: 40rem) { .jp-Cell { padding-left: 0; padding-right: 0; } main { padding: 0 0.4rem; } }
</style>"""


def title(notebook) -> str:
    """The heading that a notebook starts with."""
    return notebook.cells[0].source.split("\n")[0].removeprefix("# ")


def contents(notebook) -> str:
    """Links to the parts of a notebook."""
    parts = [line.removeprefix("## ") for c in notebook.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("## ")]
    return "\n".join(f"* [{part}](#{re.sub(r'[$\\\\^{}`*]', '', part).replace(' ', '-')})" for part in parts)


def page(notebook) -> str:
    """A notebook as HTML: exercises folded, links to other notebooks turned to their pages, what scrolls within reach of a keyboard."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^\*\*Exercise\.\*\*\s*(.+?)(?=\n\n|\Z)", r"<details><summary>Exercise</summary>\n\n\1\n\n</details>",
                                 cell.source, flags=re.M | re.S)
            cell.source = re.sub(r"\]\(([\w./-]+)\.ipynb\)", r"](\1.html)", cell.source)
    body, _ = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(
        notebook, {"metadata": {"name": title(notebook)}})
    body = re.sub(r"<(table|pre)\b(?![^>]*tabindex)", r'<\1 tabindex="0"', body.replace("</head>", f"{STYLE}</head>", 1))
    return re.sub(r"<th></th>", "<td></td>", body)


def way(i: int) -> str:
    """Links from page ``i`` to the index and its neighbours."""
    def to(path):
        return os.path.relpath(path, NOTEBOOKS[i].parent).replace(os.sep, "/")

    near = [(NOTEBOOKS[i - 1], "←") if i else None, (NOTEBOOKS[i + 1], "→") if i + 1 < len(NOTEBOOKS) else None]
    return " · ".join([f"[Index]({to(HOME / 'index.html')})", *(f"[{arrow} {p.stem}]({to(p)})" for p, arrow in filter(None, near))])


def build(folder: Path) -> None:
    """Write all pages."""
    rows = []
    for i, path in enumerate(NOTEBOOKS):
        notebook, where = nbformat.read(path, 4), path.relative_to(HOME).with_suffix(".html").as_posix()
        rows.append(f"{'  ' * where.count('/')}* **[{title(notebook)}]({where})**")
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(f"{way(i)}\n\n{contents(notebook)}"))
        store.write_atomic(folder / where, page(notebook))
    text = ["# When does knowledge distillation help a small language model, and when does it fail?",
            "A study in the open: notebooks, run records, and verdicts that follow from them.", "## Notebooks", "\n".join(rows),
            "## Claims", claims(results.REPOSITORY / "results")]
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n\n".join(text))])
    store.write_atomic(folder / "index.html", page(index))


if __name__ == "__main__":
    build(target := Path(sys.argv[1]))
    print(f"{len(NOTEBOOKS) + 1} pages; open {target / 'index.html'}")
