"""Write the README's claims table anew from the committed claims: ``python .ci/readme.py``."""

from pathlib import Path

from kdlib import results, store

START, END = "<!-- claims:start -->", "<!-- claims:end -->"


def generated(text: str, root: Path) -> str:
    """The README's text with what stands between its markers made anew."""
    head, rest = text.split(START)
    _, tail = rest.split(END)
    table = results.claims_table([p.parent for p in sorted(root.glob("*/claims.json"))])
    rows = [table.columns, ["---"] * len(table.columns), *table.values]
    return "\n".join([head + START, *(f"| {' | '.join(row)} |" for row in rows), END + tail])


if __name__ == "__main__":
    readme = results.REPOSITORY / "README.md"
    store.write_atomic(readme, generated(readme.read_text(encoding="utf-8"), results.REPOSITORY / "results"))
