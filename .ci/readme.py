"""Write the README's tables anew from what is committed under results; with a results folder, print its claims instead."""

import json
import sys
from pathlib import Path

import pandas as pd

from kdlib import lab, plots, results, store
from kdlib.costs import check
from kdlib.presets import PRESETS

NAMES = {"trl": "TRL's GKD trainer", "trl tokenized": "the same, tokenized before", "live": "kdlib, live teacher",
         "hidden": "kdlib, exact cache", "top64": "kdlib, cache of the top 64", "sft": "kdlib, SFT"}


WHOLE = {"C2": "KD from the strong teacher at the largest budget: the weaker of C2a and C2b",
         "C3": "{} in the {} domain, {}: the weakest"}
STAGES = ("KD on synthetic then SFT on human data", "each recipe of one stage")
TOPICS = {"C1a": "KD leads where data are few", "C1b": "its lead fades with more", "C2": "a stronger teacher restores it", "C3": "two stages win in domains"}


def markdown(head, rows) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def claims(root: Path) -> str:
    """The verdicts, one table a preset: one row a claim, one column a world, and all worlds together."""
    tables = []
    for preset in sorted({p.relative_to(root).parts[0] for p in (*root.glob("*/claims.json"), *root.glob("*/world-*/claims.json"))}):
        files = [p for p in (root / preset / "claims.json", *(root / preset).glob("world-*/claims.json")) if p.exists()]
        found = {(c["claim"], tuple(c["world_seeds"])): c for p in files for c in results.read_claims(p.parent)}
        worlds = sorted({w for _, w in found}, key=lambda w: (len(w), w))
        names = [name for name in dict.fromkeys(name for name, _ in sorted(found)) if " − " not in name]  # those are parts of C3
        rows = [[name, contrast(next(c for (n, _), c in found.items() if n == name)), *(cell(found.get((name, w))) for w in worlds)] for name in names]
        if rows:
            titles = [f"world {w[0]}" if len(w) == 1 else f"worlds {', '.join(map(str, w))}" for w in worlds]
            tables.append(f"**{preset}**\n\n" + markdown(["claim", "contrast", *titles], rows))
    return "\n\n".join(tables)


def contrast(claim: dict) -> str:
    """What a claim's row estimates."""
    name, *domain = claim["claim"].split()
    metric = PRESETS[claim["preset"]].scored
    sides = " minus ".join(STAGES if metric.higher_is_better else STAGES[::-1])
    return WHOLE[name].format(metric.label.split(" (")[0], *domain, sides) if name in WHOLE else claim["contrast"]


def together(root: Path) -> str:
    """The lab, over its worlds, beside real text: one row a claim, C3 domain by domain."""
    found = {(p.parent.name, c["claim"], tuple(c["world_seeds"])): c for p in root.glob("*/claims.json") for c in results.read_claims(p.parent)}

    def of(preset, claim):
        whole = {n: c for (p, n, w), c in found.items() if p == preset and n.startswith(claim) and " − " not in n and w == tuple(PRESETS[preset].worlds)}
        return "<br>".join(f"{n.removeprefix(claim).strip()}: {cell(c)}".removeprefix(": ") for n, c in sorted(whole.items()) if n == claim or claim == "C3")

    rows = [[f"{claim}: {topic}", of("lab", claim), of("realtext", claim)] for claim, topic in TOPICS.items()]
    return markdown(["claim", "lab, worlds " + ", ".join(map(str, PRESETS["lab"].worlds)), "real text"], rows)


def cell(claim: dict | None) -> str:
    """Verdict, estimate and interval of a claim; where it has parts, which one is the weakest."""
    if claim is None:
        return ""
    part = f"{claim['weakest'].removeprefix(claim['claim']).strip()}: " if claim["weakest"] else ""
    return f"{claim['verdict']}<br>{part}{claim['estimate']:+.4f} [{claim['ci_low']:+.4f}, {claim['ci_high']:+.4f}]"


def skills(root: Path) -> str:
    """What each verdict of the lab's world 0 owes to one skill."""
    table, lines = pd.read_csv(root / "lab" / "tables" / "without_skill.csv"), []
    for claim in results.read_claims(root / "lab"):
        rows = table[(table.claim == claim["claim"]) & (table.verdict != claim["verdict"])]
        if claim["world_seeds"] != [0] or claim["claim"] not in set(table.claim):
            continue
        changes = [f"*{r.verdict}* without `{r.left_out}` ({r.estimate:+.4f} [{r.ci_low:+.4f}, {r.ci_high:+.4f}])"
                   for r in rows.itertuples()]
        least = table[table.claim == claim["claim"]].sort_values("estimate").iloc[0]
        stays = (f"stays so whichever is left out; least without `{least.left_out}` ({least.estimate:+.4f} "
                 f"[{least.ci_low:+.4f}, {least.ci_high:+.4f}])")
        lines.append(f"* {claim['claim']} is *{claim['verdict']}* over all skills, and "
                     f"{'would be ' + ', '.join(changes) if changes else stays}.")
    return "\n".join(lines)


def seeds(root: Path) -> str:
    """How many paired seeds decide, and the smallest difference that matters, by preset and claim."""
    claims = [(p.parent.name, c) for p in root.glob("*/claims.json") for c in results.read_claims(p.parent)]
    found = sorted({(preset, c["claim"][:2], c["n_seeds"]) for preset, c in claims})
    delta = sorted({(preset, "C1b" if c["claim"] == "C1b" else "else", f"{c['delta']:.2g}") for preset, c in claims})
    return "Paired seeds: " + "; ".join(f"{preset} {claim} {n}" for preset, claim, n in found) + ". δ: " + "; ".join(
        f"{preset} {claim} {value}" for preset, claim, value in delta) + "."


def teachers(root: Path) -> str:
    """The lab's teachers: means over the worlds."""
    means = pd.read_csv(root / "lab" / "report" / "tables" / "teachers.csv").groupby("teacher").mean().loc[["weak", "base", "strong"]]
    names = {"teacher_accuracy": "accuracy", "teacher_nll": "NLL (nats a token)", "teacher_entropy": "entropy (nats)", "teacher_ece": "calibration error"}
    return markdown(["teacher", *names.values()], [[row.Index, *(f"{getattr(row, k):.3f}" for k in names)] for row in means.itertuples()])


def found(root: Path) -> str:
    """What the report's tables say, in sentences."""
    cells, rule, checked, told, teacher, best, reverse = (pd.read_csv(root / "lab" / "report" / "tables" / f"{name}.csv") for name in (
        "cells", "rule", "rule_checked", "domain_teachers", "teachers", "best_teacher", "reversed_order"))
    delta, preset = PRESETS["lab"].scored.delta, PRESETS["lab"]
    students, kept = (pd.concat([pd.read_csv(folder / "tables" / f"{name}.csv") for folder in worlds(root)]) for name in ("students", "forgotten"))
    student, kept = students.groupby("arm").accuracy.mean(), kept.drop(columns=["domain", "budget"])
    largest = cells[cells.budget == cells.budget.max()].groupby("teacher").gap.mean()
    score = teacher.groupby("teacher").teacher_accuracy.mean()
    labels = told.groupby("budget").label_accuracy.mean()
    lines = [f"the mean gap (KD − SFT) is above δ in {(cells.gap > delta).sum()} and below −δ in {(cells.gap < -delta).sum()} of {len(cells)} cells of world, "
             f"teacher and budget, from {cells.gap.min():+.3f} to {cells.gap.max():+.3f}; its 95% interval over seeds, not adjusted, lies above zero in "
             f"{(cells.ci_low > 0).sum()}",
             f"at {cells.budget.max():,} examples, in means over worlds, SFT students are right {student.sft:.1%} of the time; KD adds " + ", ".join(
                 f"{largest[t]:+.3f} from the {t} teacher ({score[t]:.1%} right)" for t in ("weak", "base", "strong")),
             f"of {best.cells.sum()} pairs of world and budget, which are not independent, the best teacher, by its students' mean, is " + ", ".join(f"{r.teacher} in {r.cells}" for r in best.itertuples()),
             f"students take {preset.steps:,} steps; the weak teacher is the same base model after {preset.teachers['weak']['tuning']['steps']:,} steps of SFT on all "
             f"{preset.train_rows:,} rows, and {score.weak:.1%} right where KD from the strong teacher gives {student['kd strong']:.1%}",
             f"with {' / '.join(f'{b:,}' for b in labels.index)} human annotations {' / '.join(f'{v:.0%}' for v in labels)} of the domain teachers' labels "
             f"are right; annotators are in {1 - lab.SLIP_RATE:.0%}",
             f"the reversed order in domains leads the mixture by {reverse.gap.min():+.3f} to {reverse.gap.max():+.3f}, its 95% interval lies above zero in "
             f"{(reverse.ci_low > 0).sum()} of {len(reverse)} domains and worlds",
             f"general accuracy is {score[preset.domain['student']]:.1%} before a domain's tuning, and by recipe {kept.mean().min():.1%} to {kept.mean().max():.1%} after it"]
    for (word, _), g in rule.assign(run=(rule.distill != rule.distill.shift()).cumsum()).groupby(["distill", "run"], sort=False):
        where = ", ".join(f"{r[0]:,} ({r[1]:.2f} to {r[2]:.2f})" for r in g[["budget", "least advantage", "most advantage"]].itertuples(index=False))
        at = "" if g.advantage.isna().all() else f" {' / '.join(f'{a:.2f}' for a in g.advantage)} (of the fits to resampled worlds and seeds " \
            f"{g['share above δ at the least'].min():.0%} say 'distill' at the least of those advantages, {g['share above δ at the most'].max():.0%} at the most)"
        lines.append(f"the rule, by examples (and measured advantage of the teacher over the SFT student): with {where} distill {word}{at}")
    left = checked[checked.rule == "budget and advantage"]
    error = ((left.error**2 * left.cells).sum() / left.cells.sum())**0.5
    lines.append(f"that rule is right in {(rule.right * rule.cells).sum():.0f} of the {rule.cells.sum()} cells it was fitted to; fitted without a world, in "
                 f"{(left.right * left.cells).sum():.0f} of {left.cells.sum()} cells of the worlds left out, with a root mean squared error of {error:.3f}")
    if (cells.gap > delta).nunique() == 1:
        lines.append(f"every measured gap lies on the same side of δ: one answer for all is right in {len(cells)} of {len(cells)} cells, and no threshold is established")
    return "\n".join(f"* {line[0].upper()}{line[1:]}." for line in lines)


def worlds(root: Path) -> list[Path]:
    """Where the tables of the lab's worlds lie."""
    return [root / "lab" / (f"world-{w}" if w else "") for w in PRESETS["lab"].worlds]


def recipes(root: Path) -> str:
    """Accuracy of every recipe by human annotations: the mean over the lab's domains and worlds."""
    every = pd.concat(pd.read_csv(folder / "tables" / "recipes.csv") for folder in worlds(root))
    means = every.drop(columns="domain").groupby("budget").mean()
    return markdown(["recipe", *(f"{b:,} annotations" for b in means.index)],
                    [[plots.STYLE[name]["label"], *(f"{v:.3f}" for v in means[name])] for name in means])


def costs(root: Path) -> str:
    """Time and memory of whole studies, of reading the notebooks, and of what a class changes."""
    rows, brief = [], {"reading": "\"Run All\" of a notebook on the committed results", "live": "a live cell, from nothing or with a setting changed"}
    for path in (p for name in ("study_*", *brief) for p in sorted(root.glob(f"bench/*-{name}.json"))):
        record = json.loads(path.read_text(encoding="utf-8"))
        found, preset = dict(record["found"]), record["benchmark"].removeprefix("study_")
        whole, cores = found.pop("whole", None), record["environment"]["cpus"]
        memory = f"{max(r['peak_mib'] for r in found.values()) / 1024:.1f} GiB"
        if whole is None:
            rows.append([brief[preset], str(cores), f"{min(r['seconds'] for r in found.values()):.0f} to "
                         f"{max(r['seconds'] for r in found.values()):.0f} s", memory])
        else:
            command = {"smoke": "`make smoke`", "lab": "`make study`"}.get(preset, f"`make study PRESET={preset}`")
            parts = ", ".join(f"{name.split('/')[1][:2]} {r['seconds'] / 60:.1f}" for name, r in found.items())
            rows.append([command, str(cores), f"{whole['seconds'] / 60:.1f} min ({parts})", memory])
    return markdown(["command", "processor cores", "measured from nothing (by notebook)", "most memory"], rows)


def engine(root: Path) -> str:
    """Time and memory of a training step, one row an engine, device and size; of fewer than three rounds all that was seen."""
    def seen(value, unit, digits, times=1):
        low, middle, high = (f"{value[k] * times:,.{digits}f}" for k in ("min", "median", "max"))
        return f"{middle}{unit}" if value["n"] >= 3 or low == high else f"{low} to {high}{unit}"

    rows = []
    for path in sorted(root.glob("bench/*-steps.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, row in record["found"].items():
            size, kind = name.split(", ")
            if kind in NAMES:
                ratios = [seen(row[k], "×", 2) if k in row else "" for k in ("faster_than_trl", "memory_of_trl", "step_of_sft")]
                rows.append([record["device"], size, NAMES[kind], seen(row["step_s"], " ms", 0, 1000), *ratios])
    return markdown(["device", "size", "engine", "a step", "faster than TRL", "memory of TRL's", "time of an SFT step"], rows)


def caches(root: Path) -> str:
    """What each form of cache takes, and what it does to the loss and its gradient."""
    rows = []
    for path in sorted(root.glob("bench/*-cache.json")):
        for form, row in json.loads(path.read_text(encoding="utf-8"))["found"].items():
            rows.append([form, f"{row['bytes_per_token']:,.0f}", f"{row['loss'] / row['loss_of_live_teacher'] - 1:+.2%}",
                         f"{row['relative_error_of_gradient']:.2%}"])
    return markdown(["form of cache", "bytes a response token", "error of the loss", "of its gradient"], rows)


def batching(root: Path) -> str:
    """How many times faster a step is by how its batch is formed."""
    rows = []
    for path in sorted(root.glob("bench/*-batching.json")):
        for case, row in json.loads(path.read_text(encoding="utf-8"))["found"].items():
            size, way = case.split(", ")
            rows.append([size, way, f"{row['faster_than_padded']['median']:.2f}×"])
    return markdown(["size", "rows of a batch", "faster than padded"], rows)


def plans(root: Path) -> str:
    """How far off the formulas of a plan are for measured runs, by preset."""
    names, rows = {"tokens": "tokens", "response_tokens": "response tokens", "train_s": "seconds of training", "peak_memory_mib": "memory of a process"}, []
    for preset in sorted(p.parent.name for p in root.glob("*/runs")):
        found = [results.read_record(p) for p in sorted((root / preset / "runs").glob("*.json"))]
        for name, row in check(found).iterrows():
            rows.append([preset, names[name], f"{row.error:.1%}", f"{row.worst:.0%}"])
    return markdown(["runs of", "quantity", "median error", "largest"], rows)


def loader(root: Path) -> str:
    """Time and memory of loading chat data at Tulu 3's size."""
    rows = []
    for path in sorted(root.glob("bench/*-loader.json")):
        for case, row in json.loads(path.read_text(encoding="utf-8"))["found"].items():
            rows.append([case.replace(", 1 cores", ", 1 core"), f"{row['budgeted']:,}", f"{row['seconds'] / 60:.1f} min", f"{row['rows_per_s']:,.0f}", f"{row['own_peak_mib'] / 1024:.1f} GiB",
                         f"{row['peak_mib'] / 1024:.1f} GiB"])
    return markdown(["rows of a file, processor cores", "rows left to train on", "time", "rows a second", "memory", "with mapped files"], rows)


def losses(root: Path) -> str:
    """Peak memory of the loss."""
    rows = []
    for path in sorted(root.glob("bench/*-loss.json")):
        found = json.loads(path.read_text(encoding="utf-8"))["found"]
        for case, row in found.items():
            if "naive_peak_mib" in row:
                rows.append([case, *(f"{row[f'{form}_peak_mib']['median']:,.0f} MiB" for form in ("naive", "chunked")),
                             *(f"{found[f'{case}, chunked {n} rows']['peak_mib']['median']:,.0f} MiB" for n in (16, 64, 256))])
    return markdown(["loss over", "naive", "in chunks", "of 16 rows", "of 64", "of 256"], rows)


BLOCKS = {"together": together, "claims": claims, "seeds": seeds, "found": found, "skills": skills, "teachers": teachers, "recipes": recipes, "costs": costs, "engine": engine,
          "caches": caches, "batching": batching, "losses": losses, "plans": plans, "loader": loader}


def generated(text: str, root: Path) -> str:
    """The README's text with what stands between its markers made anew."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start in text:
            head, rest = text.split(start)
            _, tail = rest.split(end)
            text = f"{head}{start}\n{make(root)}\n{end}{tail}"
    return text


if __name__ == "__main__" and sys.argv[1:]:
    print(claims(Path(sys.argv[1])))
elif __name__ == "__main__":
    readme = results.REPOSITORY / "README.md"
    store.write_atomic(readme, generated(readme.read_text(encoding="utf-8"), results.REPOSITORY / "results"))
