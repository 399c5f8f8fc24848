"""An HTML edition of the notebooks as they are stored: a page each, the exercise sheets' too, and an index; or with ``slides`` the notebooks as
slides. What is not in it, such as solutions, is not linked. FOLDER [slides]
"""

import base64
import html
import os
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, SlidesExporter
from readme import claims

from kdlib import results, store

HOME = results.REPOSITORY / "notebooks"
NOTEBOOKS, SHEETS = sorted(HOME.glob("*.ipynb")), sorted((HOME / "exercises").glob("[1-9]_*.ipynb"))
READABLE = 0.7  # of its width a figure keeps on a phone; a wider one is moved sideways
STYLE = """<style>
main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
.jp-RenderedHTMLCommon a:is(:link, :visited) { text-decoration: underline; }
.jp-RenderedHTMLCommon a.anchor-link:is(:link, :visited) { text-decoration: none; color: #595959; }
.jp-RenderedImage img { max-width: 100%; height: auto; }
.wide, pre, .jp-RenderedImage { max-width: 100%; overflow-x: auto; }
.jp-Cell, .jp-OutputArea-output { max-width: 100%; min-width: 0; }
.highlight .c1, .highlight .c { color: #4a6a6a; } .highlight .o, .highlight .ow { color: #7a2ca8; }
.highlight :is(.m, .mi, .mf, .mb, .mh, .mo) { color: #00605c; }
@media (max-width: 40rem) { main, .jp-Cell { padding-left: 0.3rem; padding-right: 0.3rem; } }
</style>"""


def title(notebook) -> str:
    """The heading that a notebook starts with."""
    return notebook.cells[0].source.split("\n")[0].removeprefix("# ")


def page(notebook, source: Path, near: str = "", exporter=HTMLExporter, of: list = (*NOTEBOOKS, *SHEETS), **how) -> str:
    """A notebook as HTML: exercises folded, a table of contents, links to pages of the edition, what figures show in words."""
    notebook.cells = [cell for cell in notebook.cells if not cell.id.endswith("-clone")]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^\*\*Exercise\.\*\*\s*(.+?)(?=\n\n|\Z)", r"<details><summary>Exercise</summary>\n\n\1\n\n</details>",
                                 cell.source, flags=re.M | re.S)
    body, _ = exporter(exclude_input_prompt=True, exclude_output_prompt=True, **how).from_notebook_node(notebook, {"metadata": {"name": title(notebook)}})
    shown = iter([(c.metadata["alt"], int.from_bytes(base64.b64decode(o.data["image/png"][:32])[16:20]))
                  for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})])
    body = re.sub(r'alt="No description has been provided for this image"', lambda _: (
        'alt="{}" style="min-width: {:.0f}px"'.format(html.escape((figure := next(shown))[0]), READABLE * figure[1])), body)
    there = {p.resolve() for p in of}
    body = re.sub(r'<a [^>]*?href="([^":#]+)\.ipynb"[^>]*>(.*?)</a>', lambda m: f'<a href="{m[1]}.html">{m[2]}</a>' if (
        source.parent / f"{m[1]}.ipynb").resolve() in there else m[2], body, flags=re.S)
    body = re.sub(r"<table\b.*?</table>", lambda m: f'<div class="wide" tabindex="0" role="region" aria-label="Table">{m[0]}</div>', body, flags=re.S)
    body = re.sub(r"<pre\b(?![^>]*tabindex)", '<pre tabindex="0"', body)
    parts = "".join(f'<li><a href="#{at}">{text.strip()}</a></li>' for at, text in re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', body, re.S))
    found = f'<p>{near}</p><nav aria-label="On this page"><ul>{parts}</ul></nav>' if near else ""
    return body.replace("</head>", f"{STYLE}</head>", 1).replace("</h1>", f"</h1>{found}", 1)


def way(i: int) -> str:
    """Links from page ``i`` to the index and its neighbours."""
    pages = [*NOTEBOOKS, *SHEETS]
    to = [os.path.relpath(p.with_suffix(".html"), pages[i].parent).replace(os.sep, "/") for p in (HOME / "index.ipynb", *pages)]
    near = [(i - 1, "←")] * (i > 0) + [(i + 1, "→")] * (i + 1 < len(pages))
    return " · ".join([f'<a href="{to[0]}">Index</a>', *(f'<a href="{to[k + 1]}">{arrow} {pages[k].stem}</a>' for k, arrow in near)])


def build(folder: Path) -> int:
    """Write all pages, and say how many."""
    rows = []
    for i, path in enumerate([*NOTEBOOKS, *SHEETS]):
        notebook, where = nbformat.read(path, 4), path.relative_to(HOME).with_suffix(".html").as_posix()
        rows.append(f"* **[{title(notebook)}]({where})**")
        store.write_atomic(folder / where, page(notebook, path, way(i), template_name="lab"))
    text = ["# When does knowledge distillation help a small language model, and when does it fail?",
            "A study in the open: notebooks, run records, and verdicts that follow from them.",
            "## Notebooks", "\n".join(rows[:len(NOTEBOOKS)]), "## Exercises", "\n".join(rows[len(NOTEBOOKS):]),
            "## Claims", claims(results.REPOSITORY / "results")]
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n\n".join(text))])
    store.write_atomic(folder / "index.html", page(index, HOME / "index.ipynb", template_name="lab"))
    return len(rows) + 1


def slides(folder: Path) -> int:
    """Write every notebook as slides, figures and tables without the code that draws them, and say how many."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if any({"image/png", "text/html"} & o.get("data", {}).keys() for o in cell.get("outputs", ())):
                cell.metadata["transient"] = {"remove_source": True}
        made = page(notebook, path, exporter=SlidesExporter, of=NOTEBOOKS, reveal_scroll=True)
        store.write_atomic(folder / path.with_suffix(".html").name, made)
    return len(NOTEBOOKS)


if __name__ == "__main__":
    target, *form = sys.argv[1:]
    print(f"{(slides if form == ['slides'] else build)(Path(target))} pages in {target}")
