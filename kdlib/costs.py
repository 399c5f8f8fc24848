"""What a plan costs before anything is trained. Operations are those of matrix products, two a weight and token forward, twice that
backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), and of attention over the mean row. Padding is not counted.
"""

import json
import tomllib
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.format import EngFormatter

from kdlib import results, runner, specs

TABLE, MODELS = (tomllib.loads(Path(__file__).with_name(name).read_text("utf-8")) for name in ("costs.toml", "models.toml"))


def shape(spec: dict) -> pd.Series:
    """Widths and weights (costs.toml) of the Llama or Qwen2 that ``spec`` starts from. ValueError if nobody knows a hub model."""
    while "start" in spec:
        spec = spec["start"]
    if hub := spec.get("hub"):
        file, known = Path(hub, "config.json"), TABLE["shapes"]
        c = json.loads(file.read_text("utf-8")) if file.is_file() else known.get(hub.removesuffix("-Instruct"), {})
        if c.get("model_type") not in ("llama", "qwen2"):
            raise ValueError(f"The shape of {hub!r} is unknown; allowed: {', '.join(known)}, or a folder of a Llama or Qwen2.")
    else:
        c, words = MODELS["ladder"][spec["pretrain"]["model"]], TABLE["words"].get(spec["data"]["source"]["kind"])
        wide = -(-c["hidden_size"] * 8 // 48) * 16  # as models.build_model has it
        c = {"vocab_size": words or spec["data"]["vocab_size"], "intermediate_size": wide, **TABLE["ours"], **c}
    h, f, vocab, layers, heads = (c[name] for name in TABLE["sizes"])
    q, k = ((c.get("head_dim") or h // heads) * n for n in (heads, c.get("num_key_value_heads", heads)))
    body, small = layers * (2 * h * (q + k) + 3 * h * f), layers * (2 * h + (q + 2 * k) * (c["model_type"] == "qwen2")) + h
    weights = body + small + h * vocab * (2 - c.get("tie_word_embeddings", False))
    return pd.Series([h, f, q, k, layers, vocab, body, weights, 2 if hub else 4], TABLE["shape"], dtype=float)


def flops(s: pd.Series, rows: float, tokens: float, response: float, how: dict | None = None) -> float:
    """Of reading ``rows``, or of training on them by ``how``, a phase's ``training``, less adapters' own. A row's last token is a
    label alone; LM head and last feed-forward part see response tokens alone, as in :func:`~kdlib.inference.at_head`.
    """
    read, again, times = tokens - rows, bool(how and how.get("activation_checkpointing")), 1 if how is None else 3
    body, pairs = s.body * read - (not again) * 3 * s.h * s.f * (read - response), 2 * s.layers * s.q * (tokens / rows - 1) * read
    learnt, last = times - bool(how and how.get("lora")), s.layers * s.h * s.f * read  # frozen: no gradient; last: not done again
    return 2 * (learnt * (body + s.h * s.vocab * response) + times * pairs + again * (body + pairs - last))


def cache_bytes(s: pd.Series, form: str = "top_k", k: int = 64, dtype: str = "float16", **_) -> float:
    """Of a response token in a cache of such a teacher's, as ``bytes_per_token`` of :class:`~kdlib.teachers.Cached`."""
    size, ids = int(dtype[-2:]) // 8, 2 if s.vocab <= 2**16 else 4
    return {"full": s.vocab * size, "hidden": s.h * size, "top_k": k * (ids + size) + 4, "sampled": k * ids + 4}[form]


def memory(s: pd.Series, tokens: float, response: float, how: dict, ranks: int = 1) -> dict[str, float]:
    """Bytes to train on ``tokens`` at once: float32 weights (and autocast's copies), gradients and AdamW, shared by ``ranks``, less
    adapters' own; what layers keep for the backward pass; a chunk of the student's and the teacher's logits.
    """
    low, learnt = bool(how.get("bf16")), 0 if how.get("lora") else s.weights / ranks
    layer = tokens * ((26 if low else 24) * s.h + (4 if low else 8) * (s.q + s.k + 2 * s.f))
    kept = layer + 4 * s.h * s.layers * tokens if how.get("activation_checkpointing") else layer * s.layers
    return {"weights": (4 + 2 * low) * s.weights / ranks, "gradients": 4 * learnt, "AdamW": 8 * learnt,
            "activations": kept + 8 * s.h * tokens, "logits": 16 * min(response * s.vocab, 2**27)}


def _set(part: dict) -> str:
    """The name of a part's rows, of a teacher's answers another than of the annotators', by how many rows of theirs it was tuned on."""
    phases = part.get("said", {}).get("by", {}).get("phases", [{"rows": [{}]}])
    few = phases[-1]["rows"][-1].get("budget")
    return part["set"] + " said" * ("said" in part) + (f" after {few}" if few else "")


def _lengths(records: list[dict], usual=None):
    """By a set's name tokens and response tokens of a row: its mean in ``records``, by least squares as their runs mix sets, else that of the
    nearest set, else of all, else ``usual``.
    """
    mixed = [Counter() for _ in records]
    for r, counts in zip(records, mixed):
        for p in r["config"]["phases"]:
            counts.update({_set(part): p["steps"] * p["batch_size"] / len(p["rows"]) for part in p["rows"]})
    seen = pd.DataFrame([[r["provenance"][k] for k in TABLE["seen"]] for r in records], columns=TABLE["seen"])
    usual, rows = seen.sum() / sum(c.total() for c in mixed) if records else pd.Series(usual), pd.DataFrame(mixed).fillna(0)
    means = dict(zip(rows.columns, np.linalg.lstsq(rows, seen, rcond=None)[0] if records else ()))

    def length(name):
        said = [n for n in means if n.startswith(f"{name.split(' after ')[0].removesuffix(' said')} said")]
        near = (name, *said, f"{name.rpartition('/')[0]}/train".lstrip("/"))
        return next((means[n] for n in near if n in means), usual[TABLE["seen"]].to_numpy())

    return length


def _trained(spec: dict, length) -> np.ndarray:
    """Tokens, response tokens and operations of the training of a model or run."""
    total, s = np.zeros(3), shape(spec)
    for p in spec.get("phases") or [spec["pretrain"]]:
        n, parts = p["steps"] * p["batch_size"], [length(_set(part)) for part in p.get("rows", ())]
        t, r = n * np.mean(parts or [(p["block"], p["block"] - 1)], 0)
        dense = p.get("teacher") and p.get("cache", {"form": "hidden"})["form"] == "hidden"  # of which a step makes logits
        total += t, r, flops(s, n, t, r, p.get("training", {})) + (2 * shape(p["teacher"]).h * s.vocab * r if dense else 0)
    return total


def estimate(plan, missing: bool = False) -> pd.DataFrame:
    """Work by kind (costs.toml) of a plan's runs and all that they share, or of what is ``missing`` at its root. Rows are as long
    as in 64 records of the preset there, else as ``typical``, at last as ``max_length``: ``attrs`` says it, and the records' rate.
    """
    p, table = plan.preset, {work: np.zeros(6) for work in TABLE["work"]}
    files, typical, told = sorted(plan.root.glob(f"{p.name}/runs/*.json")), getattr(p, "typical", None), p.max_new_tokens
    records = [r for f in files[::len(files) // 64 + 1] if "tokens" in (r := results.read_record(f))["provenance"]]
    report = records[0]["provenance"]["data_report"] if records else {}
    length = _lengths(records, typical or dict.fromkeys(TABLE["seen"], p.max_length))
    places = ["", *(f"{name}/" for name in p.domain.get("names", ()))]
    held = [f"{d}{part}" for d in places for part in ("validation", "test")]
    stated = {f"{d}/{k}": v for d, own in p.source.get("domains", {}).items() for k, v in own.items()}
    sizes = {"annotated_rows": p.domain.get("rows"), "unlabelled_rows": p.domain.get("pool_rows"), **p.source, **stated}
    sizes = {k: v for k, v in sizes.items() if isinstance(v, int)} | {
        k: v["rows"] - v["rows_dropped"] for k, v in report.items() if "rows" in v} | {"train": p.train_rows}
    runs = [c for i, c in zip(plan.ids, plan.configs) if not (missing and results.record_path(plan.root, p.name, i).exists())]
    made = {name: s for c in runs for name, s in specs.all_of(json.dumps(c)).items() if not (missing and specs.path(plan.root, s).is_dir())}

    def rows_of(name):
        name = name.split(" said")[0]
        known = TABLE["rows"].get("/" * ("/" in name) + name.split("/")[-1], "")
        return sizes.get(name) or sizes.get(f"{name}_rows") or sizes.get(f"{name.rpartition('/')[0]}/{known}") or sizes.get(known) or p.train_rows

    sets, asked = [*held, *(f"{d}{part}" for d in places for part in ("train", "pool")[:1 + bool(d)])], set()
    for spec in [*(s for s in made.values() if "of" not in s), *runs]:
        if "source" in spec:
            table["source"] += 1, 0, 0, 0, 0, 16 * sum(rows_of(name) * length(name)[0] for name in sets)  # two whole numbers a token
            continue
        work, on = [w for w in table if w in spec][-1], [spec["evaluate"]["on"]] if "evaluate" in spec else specs.scored_on(spec, held)
        reads = [(w, spec, name, None) for name in on for w in ("scores", "replies")[:1 + bool(told)]]
        if work in ("by", "cache"):
            reads = [(work, spec.get("teacher", spec.get("by")), _set(part), part.get("only", part).get("budget")) for part in spec.get("rows", [spec])]
        elif work != "hub":
            table[work][1:4] += _trained(spec, length)
        if work == "evaluate" and (teacher := specs.teacher_of(spec)) and (once := json.dumps([teacher, on])) not in asked:
            reads += [("scores", teacher, *on, None)]
            asked.add(once)
        table[work] += 1, 0, 0, 0, 0, shape(spec).stored * shape(spec).weights if work in ("hub", "pretrain", "phases") else 0
        for w, model, name, budget in reads:
            s, (t, r), n = shape(model), length(name), budget or rows_of(name)
            t, r = (t - r * (t > r) + told, told) if w in ("by", "replies") else (t, r)
            kept = n * r * cache_bytes(s, **spec["cache"]) if w == "cache" else 0
            table[w] += w in ("scores", "replies"), n * t, n * r, flops(s, n, n * t, n * r), kept, kept + 16 * n * t * (w == "by")
    judged = [(c, c["evaluate"].get("tasks", {})) for c in runs] + [(s["of"], s["tasks"]) for s in made.values() if "of" in s]
    for spec, (name, how) in ((spec, task) for spec, tasks in judged for task in tasks.items() if task[0] in TABLE["benchmarks"]):
        known = TABLE["benchmarks"][name]
        n, s = min(how.get("limit") or known["documents"], known["documents"]), shape(spec)
        for w, t, r in (("asked", known["read"], 1), *[("answered", known["replied"], known["replied"])] * (known["replied"] > 0)):
            table[w] += 1, n * t, n * r, flops(s, n, n * t, n * r), 0, 0
    out = pd.DataFrame.from_dict(table, "index", columns=["count", *TABLE["seen"], "flops", "cache_bytes", "disk_bytes"])
    out.attrs = {"rows": f"means of {len(records)} records" if records else "typical" if typical else "max_length, an upper bound",
                 "row": np.max([length(_set(part)) for c in plan.configs for f in c["phases"] for part in f["rows"]], 0).tolist(),
                 "rate": check(records).attrs["rate"] if records else None,
                 "not counted": sorted({name for _, tasks in judged for name in tasks} - TABLE["benchmarks"].keys())}
    return out


def report(plan, ranks: int | None = None) -> None:
    """Print a plan's grid with the runs found, its work, the hours of each device, and the memory on each of ``ranks``, by default as many as
    the Accelerate configuration in KDLIB_LAUNCH shards over.
    """
    from kdlib.inference import answered_at_once  # with torch, which importing this does not need
    launched = runner.launch_settings()
    ranks = ranks or (launched["num_processes"] if launched.get("distributed_type") == "FSDP" else 1)
    p, whole, left, show = plan.preset, estimate(plan), estimate(plan, missing=True), EngFormatter(2, True)
    runs = pd.DataFrame([labels for labels, _ in plan.runs])
    runs["found"] = [results.record_path(plan.root, p.name, i).exists() for i in plan.ids]
    keys = [k for k in ("domain", "method", "teacher", "pool") if runs[k].notna().any()]
    grid = runs.fillna("").pivot_table("found", keys, "budget", lambda x: f"{x.sum()} of {len(x)}", "")
    names, speed = zip(*((name, TABLE["utilization"][at]) for name, at in TABLE["work"].values()))
    work = whole.assign(missing=left["count"]).astype({"count": int, "missing": int}).set_axis(names).query("count > 0")
    hours = {name: [d["memory"] / 1e9, *((w.flops / speed).sum() / d["peak"] / 3600 for w in (whole, left))]
             for name, d in TABLE["devices"].items()}
    if rate := whole.attrs["rate"]:
        hours["as in the records"] = [np.nan, *(w.flops.sum() / rate / 3600 for w in (whole, left))]
    phase, s, needs = plan.configs[0]["phases"][0], shape(plan.configs[0]), {}
    def at_once(how: dict) -> int:
        return min(how["batch_size"], how.get("training", {}).get("micro_batch") or how["batch_size"])

    scores = max(1, min(64, 2**28 // int(p.max_length * s.vocab)))
    for (name, row), again in product({"mean": whole.attrs["row"], "longest": [p.max_length] * 2}.items(), (False, True)):
        how = {**phase.get("training", {}), "activation_checkpointing": again}
        needs[f"student, {name} rows{', recomputed' * again}"] = memory(s, *np.multiply(at_once(phase), row), how, ranks)
    made = [s for c in plan.configs for s in specs.all_of(json.dumps(c)).values()]
    for title, heavy in (("a teacher's tuning, mean rows", [(s, f, whole.attrs["row"]) for s in made for f in s.get("phases", ())]),
                         ("pre-training", [(s, s["pretrain"], np.subtract(s["pretrain"]["block"], (0, 1))) for s in made if "pretrain" in s])):
        if heavy:
            every = [memory(shape(s), *np.multiply(at_once(how), row), how.get("training", {}), ranks) for s, how, row in heavy]
            needs[title] = max(every, key=lambda parts: sum(parts.values()))
    if taught := [shape(f["teacher"]) for c in plan.configs for f in c["phases"] if f["teacher"]]:
        big = max(taught, key=lambda s: s.weights)
        held, width = big.stored * big.weights / ranks, 2 * big.layers * big.k * big.stored
        answers = answered_at_once(p.max_length, width)
        needs[f"teacher, {answers} answers"] = {"weights": held, "keys and values": answers * width * p.max_length}
        needs[f"both, {scores} scores"] = {"weights": held + 4 * s.weights / ranks, "logits": 12 * scores * whole.attrs["row"][1] * s.vocab}
    needs = pd.DataFrame(needs).T.assign(all=lambda x: x.sum(axis=1))
    for title, frame, form in (
            (f"{runs.experiment[0]}, {p.name}: {runs.found.sum()} of {len(runs)} runs found, by budget", grid, show),
            (f"work, and what is missing of it; tokens of a row: {whole.attrs['rows']}", work, show),
            ("hours of one device", pd.DataFrame(hours, ["GB", "whole", "missing"]).T, "{:.3g}".format),
            (f"bytes on each of {ranks} devices that share the weights{f', for each of {plan.workers} workers' * (plan.workers > 1)}", needs, show)):
        print(title, frame.to_string(float_format=form, na_rep=""), sep="\n", end="\n\n")
    if kept := max((3 * memory(shape(c), 0, 0, f["training"])["gradients"] for c in [*plan.configs, *made] for f in c.get("phases", ())
                    if f.get("training", {}).get("save_steps", f["steps"]) < f["steps"]), default=0):
        print(f"checkpoints of what trains, each at most: {show(kept)} bytes of disk, twice that for the moment in which one replaces another", end="\n\n")
    measured = [results.read_record(f) for f in sorted((results.REPOSITORY / "results" / "lab" / "runs").glob("*.json"))[::12]]
    if measured:
        errors = check(measured)[["error", "worst"]].set_axis([*TABLE["seen"], "seconds", "memory"])
        print(f"relative errors of these formulas for {len(measured)} measured lab runs, median and worst")
        print(errors.to_string(float_format="{:.1%}".format))
    told = TABLE["utilization"]["generation"]
    print(f"generation at {told:.0%} of a device's peak is assumed, not measured; not counted: {', '.join(whole.attrs['not counted']) or 'nothing'}")


def check(records: list[dict]) -> pd.DataFrame:
    """How far off the formulas are for measured runs. Mean rows, one rate of operations (``attrs``), by experiment the memory
    that its processes have anyway, are from every second record, relative errors (``bias``: the median, ``error``: the median size, ``worst``) of the others.
    """
    what, records, found = [*TABLE["seen"], "train_s", "peak_memory_mib"], sorted(records, key=lambda r: r["run_id"]), []
    length = _lengths(records[::2])
    for r in records:
        phases, done = r["config"]["phases"], _trained(r["config"], length)
        step = phases[0]["batch_size"] / sum(p["steps"] * p["batch_size"] for p in phases)
        held = memory(shape(r["config"]), *done[:2] * step, phases[0].get("training", {}))
        found.append([*done, sum(held.values()) / 2**20])
    guess, real = (pd.DataFrame(rows, columns=what) for rows in (found, [[r["provenance"][k] for k in what] for r in records]))
    guess.train_s /= (rate := (guess / real).train_s[::2].median())
    anyway, which = (real - guess).peak_memory_mib, pd.Series([r["experiment"] for r in records])
    guess.peak_memory_mib += which.map(anyway[::2].groupby(which).median()).fillna(anyway[::2].median())
    off, table = (guess / real - 1)[1::2], {"measured": real[1::2].median(), "predicted": guess[1::2].median()}
    out = pd.DataFrame({**table, "bias": off.median(), "error": off.abs().median(), "worst": off.abs().max()})
    out.attrs["rate"] = float(rate)
    return out
