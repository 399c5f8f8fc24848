"""Write the README's tables anew from what is committed under results: ``python .ci/readme.py``."""

from pathlib import Path

import pandas as pd

from kdlib import results, store


def markdown(head, rows) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def claims(root: Path) -> str:
    """The verdicts on all claims."""
    table = results.claims_table([p.parent for p in sorted(root.glob("*/claims.json"))])
    return markdown(table.columns, table.values)


def skills(root: Path) -> str:
    """What each verdict of the lab owes to one skill."""
    table, lines = pd.read_csv(root / "lab" / "tables" / "without_skill.csv"), []
    for claim in results.read_claims(root / "lab"):
        rows = table[(table.claim == claim["claim"]) & (table.verdict != claim["verdict"])]
        changes = [f"*{r.verdict}* without `{r.left_out}` ({r.estimate:+.4f} [{r.ci_low:+.4f}, {r.ci_high:+.4f}])"
                   for r in rows.itertuples()]
        least = table[table.claim == claim["claim"]].sort_values("estimate").iloc[0]
        stays = (f"stays so whichever is left out; least without `{least.left_out}` ({least.estimate:+.4f} "
                 f"[{least.ci_low:+.4f}, {least.ci_high:+.4f}])")
        lines.append(f"* {claim['claim']} is *{claim['verdict']}* over all skills, and "
                     f"{'would be ' + ', '.join(changes) if changes else stays}.")
    return "\n".join(lines)


def generated(text: str, root: Path) -> str:
    """The README's text with what stands between its markers made anew."""
    for name, make in (("claims", claims), ("skills", skills)):
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start in text:
            head, rest = text.split(start)
            _, tail = rest.split(end)
            text = f"{head}{start}\n{make(root)}\n{end}{tail}"
    return text


if __name__ == "__main__":
    readme = results.REPOSITORY / "README.md"
    store.write_atomic(readme, generated(readme.read_text(encoding="utf-8"), results.REPOSITORY / "results"))
