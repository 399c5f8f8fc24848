"""The artefacts that runs share (rendered data, models, teachers' answers and targets), and what one run does.

What fixes an artefact is its specification, in JSON. A *model* is ``{"data", "pretrain"}``, from random weights on, or ``{"start": model,
"phases"}``. A *phase* trains ``steps`` batches on its ``rows``, equally many of each *part*, by the settings of
:class:`~kdlib.losses.Objective`, towards its ``teacher``, a model or None. A part is ``{"set": name}``, perhaps with ``budget`` (so many
of the set's rows, a prefix of the order that ``seed`` draws) and ``said``: the model ``by`` whose own words, drawn at a ``temperature``,
stand for the annotators' (with ``verified`` those alone that verify). A run's configuration is a model's, and what is evaluated.
"""

import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from kdlib import data, evaluate, lab, models, results, store, teachers, text, trainer
from kdlib.losses import Objective
from kdlib.presets import METRICS

disable_progress_bars()  # writing an artefact is a matter of milliseconds, and notebooks store what is printed
logging.disable_progress_bar()

SOURCES = {"lab": lab, "text": text}
CACHE = {"form": "hidden", "dtype": "float32"}  # of targets: exact, so that runs differ from live ones by rounding
COSTS = {"data": 0.0, "base": 30.0, "model": 8.0, "targets": 1.0, "answers": 8.0}  # of making one, where a run costs 2
KINDS = {"source": "data", "pretrain": "base", "phases": "model", "cache": "targets", "by": "answers"}  # of artefacts, by a key


def data_of(spec: dict) -> dict:
    """The specification of the data under a model or a run."""
    return data_of(spec["start"]) if "start" in spec else spec["data"]


def targets_of(phase: dict) -> dict:
    """What fixes the cache of what a phase's teacher says of its rows, whatever the budget."""
    rows = [{k: v for k, v in part.items() if k not in ("budget", "seed")} for part in phase["rows"]]
    return {"teacher": phase["teacher"], "rows": rows, "cache": CACHE}


def made_from(spec: dict) -> list[dict]:
    """The specifications of what an artefact or a run is made from directly."""
    phases = spec.get("phases", [])
    said = [part["said"] for rows in (spec.get("rows", []), *(p["rows"] for p in phases)) for part in rows if "said" in part]
    return [spec[k] for k in ("data", "start", "by", "teacher") if k in spec] + said + [targets_of(p) for p in phases if p["teacher"]]


def path(root: Path, spec: dict) -> Path:
    """Where an artefact lies, whether it exists or not."""
    return store.artefact_path(root, next(kind for key, kind in KINDS.items() if key in spec), spec)


def make(root: Path, spec: dict) -> Path:
    """Make an artefact, and all that it is made from, unless it is there, and return its folder."""
    build = {"data": _build_data, "base": _build_model, "model": _build_model, "targets": _build_targets, "answers": _build_answers}
    kind, origin = path(root, spec).name.split("-")[0], _source(spec, "origin")() if "source" in spec else None
    return store.artefact(root, kind, spec, partial(build[kind], root, spec), origin)


def _source(spec: dict, name: str) -> Callable:
    """``corpus`` or ``origin`` of the module that makes the data of ``spec``, with the source's own arguments."""
    source = {k: v for k, v in spec["source"].items() if k != "kind"}
    return partial(getattr(SOURCES[spec["source"]["kind"]], name, lambda **_: None), **source)  # what is drawn has no origin


def _build_data(root: Path, spec: dict, folder: Path) -> None:
    corpus = _source(spec, "corpus")(spec["world_seed"])
    texts = corpus.pretrain() if corpus.vocabulary is None else ()
    tokenizer = models.build_tokenizer(corpus.vocabulary, texts, spec["vocab_size"])
    tokenizer.save_pretrained(folder / "tokenizer")
    report = {"loading": corpus.report}
    for name, rows in corpus.sets.items():
        rendered, report[name] = data.render(rows, tokenizer, spec["max_length"], drop=True)
        if name == "train":
            if len(rendered) < spec["train_rows"]:
                raise ValueError(f"train_rows={spec['train_rows']} is above the data; allowed: up to {len(rendered)} rows.")
            report[name]["rows_not_used"] = len(rendered) - spec["train_rows"]
            rendered = rendered.select(range(spec["train_rows"]))
        elif "clean" in rows.column_names:
            spoken = [[*m[:-1], {"role": "assistant", "content": c}] for m, c in zip(rendered["messages"], rendered["clean"])]
            clean, _ = data.render(Dataset.from_dict({"messages": spoken}), tokenizer, spec["max_length"], drop=True)
            clean.save_to_disk(folder / "clean" / name)
        report[name]["distinct_prompts"] = len({json.dumps(m[:-1]) for m in rendered["messages"]})
        rendered.save_to_disk(folder / "sets" / name)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def read_data(root: Path, spec: dict) -> SimpleNamespace:
    """``tokenizer``, ``report``, ``longest`` reply, ``verify`` (None: nobody can), ``rows(name)`` and ``rows(name, "clean")`` (no slips, or None)."""
    folder, world = make(root, spec), getattr(SOURCES[spec["source"]["kind"]], "World", None)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", padding_side="left")
    return SimpleNamespace(
        report=report, held=[name for name in report if name.endswith(("validation", "test"))], tokenizer=tokenizer,
        verify=world(spec["world_seed"]).verify if world else None, longest=spec["max_new_tokens"],
        rows=lambda name, kind="sets": load_from_disk(folder / kind / name) if (folder / kind / name).is_dir() else None)


@lru_cache(maxsize=8)
def _listed(folder: Path) -> tuple[list[dict], list[str], list[bool] | None]:
    found = load_from_disk(folder)
    judged = list(found["verified"]) if "verified" in found.column_names else None
    return found.select_columns(["input_ids", "labels"]).to_list(), list(found["skill"]), judged


def read_rows(root: Path, part: dict, spec: dict) -> tuple[list[dict], list[str], list[bool] | None]:
    """The rows of a part of a phase, whatever its budget, their skills, and which of a teacher's answers verify (None: not judged)."""
    rows, skills, right = _listed(make(root, part["said"]) if "said" in part else make(root, spec) / "sets" / part["set"])
    if not (kept := [i for i in range(len(rows)) if not part.get("verified") or right[i]]):
        raise ValueError(f"Set {part['set']!r} has nothing to train on: no answer of its teacher verifies.")
    return [{"id": f"{part['set']}/{i}", **rows[i]} for i in kept], [skills[i] for i in kept], right


def tune(root: Path, model, tokenizer, phase: dict, spec: dict, teacher=None) -> tuple[list[dict], float]:
    """Train ``model`` as ``phase`` says on data of ``spec``. Returns the rows as seen and the loss."""
    rows, pools = [], []
    for part in phase["rows"]:
        more, skills, _ = read_rows(root, part, spec)
        if part.get("budget", 0) > len(more):
            raise ValueError(f"budget={part['budget']} is above set {part['set']!r}; allowed: up to {len(more)} rows.")
        chosen = data.nested_order(skills, part["seed"])[:part["budget"]] if "budget" in part else range(len(more))
        pools.append([len(rows) + i for i in chosen])
        rows += more
    targets = teachers.Cached(make(root, targets_of(phase)), teacher) if phase["teacher"] else None
    return fit(model, tokenizer, rows, pools, phase, teacher=targets,
               objective=Objective(**{f.name: phase[f.name] for f in fields(Objective) if f.name in phase}))


def fit(model, tokenizer, rows: list[dict], pools: list[list[int]], how: dict, **objective) -> tuple[list[dict], float]:
    """Train on those of ``rows`` that ``pools`` number, equally many of each. Returns rows as seen and loss; ValueError if not finite."""
    seen = [rows[i] for i in data.stream(pools, how["steps"], how["batch_size"], how["seed"])]
    settings = {k: how[k] for k in ("steps", "batch_size", "learning_rate", "seed")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        loss = trainer.train(model, tokenizer, seen, output_dir=scratch, **settings, **objective)["train_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"Training diverged (loss {loss}) with {settings}; allowed: settings that keep it finite.")
    return seen, loss


def _build_model(root: Path, spec: dict, folder: Path) -> None:
    known = read_data(root, data_of(spec))
    if p := spec.get("pretrain"):
        texts = _source(spec["data"], "corpus")(spec["data"]["world_seed"]).pretrain()
        blocks = data.pack(texts, known.tokenizer, p["block"], p["max_tokens"]).to_list()
        model = models.build_model(p["model"], known.tokenizer, p["seed"])
        fit(model, known.tokenizer, blocks, [list(range(len(blocks)))], p)
    else:
        model, _ = models.load(make(root, spec["start"]))
        for phase in spec["phases"]:
            tune(root, model, known.tokenizer, phase, data_of(spec))
    model.save_pretrained(folder)
    known.tokenizer.save_pretrained(folder)
    own = {name: _score(model, known, name)[0] for name in known.held}
    (folder / "evaluation.json").write_text(json.dumps(own), encoding="utf-8")


def _score(model, known: SimpleNamespace, name: str, **more) -> tuple[dict, dict]:
    return evaluate.evaluate(model, known.tokenizer, known.rows(name), verify=known.verify, max_new_tokens=known.longest, **more)


def _build_answers(root: Path, spec: dict, folder: Path) -> None:
    (model, tokenizer), known = models.load(make(root, spec["by"])), read_data(root, data_of(spec["by"]))
    how = {"max_new_tokens": known.longest, "temperature": spec["temperature"], "seed": spec["seed"]}
    with tempfile.TemporaryDirectory() as scratch:
        said = teachers.write_answers(scratch, model, tokenizer, known.rows(spec["set"]).remove_columns(["input_ids", "labels"]), **how)
        if known.verify:
            said = said.add_column("verified", [known.verify(row, row["messages"][-1]["content"]) for row in said])
        data.render(said, tokenizer, data_of(spec["by"])["max_length"], drop=True)[0].save_to_disk(folder)


def _build_targets(root: Path, spec: dict, folder: Path) -> None:
    model, tokenizer = models.load(make(root, spec["teacher"]))
    rows = [row for part in spec["rows"] for row in read_rows(root, part, data_of(spec["teacher"]))[0]]
    teachers.write_cache(folder, model, tokenizer, rows, **spec["cache"])


def teacher_of(config: dict) -> dict | None:
    """The last teacher of a run, by its targets or by its words; None if it has none."""
    return ([None] + [t for p in config["phases"] for t in (p["teacher"], *(r.get("said", {}).get("by") for r in p["rows"])) if t])[-1]


def execute(root: Path, labels: dict, config: dict) -> None:
    """Do one run, or nothing if its record is there. Safe beside other processes doing the same."""
    identifier = results.run_id(config)
    with store.lock(root, identifier):
        if not results.record_path(root, labels["preset"], identifier).exists():
            results.write_record(root, {"run_id": identifier, **labels, **_train_and_evaluate(root, config)})


def _train_and_evaluate(root: Path, config: dict) -> dict:
    wall, cpu, spec, seen = time.perf_counter(), time.process_time(), data_of(config), []
    known, split, tuned = read_data(root, spec), config["evaluate"]["on"], teacher_of(config)
    student, tokenizer = models.load(make(root, config["start"]))
    teacher = models.load(make(root, tuned))[0] if tuned else None
    for phase in config["phases"]:
        rows, loss = tune(root, student, tokenizer, phase, spec, teacher)
        seen += rows
    trained, clean = time.perf_counter(), known.rows(split, "clean")
    metrics, items = _score(student, known, split, teacher=teacher, clean=clean and clean.select_columns(["input_ids", "labels"]).to_list())
    metrics["train_loss"] = loss
    if "/" in split:  # a domain's rows: what is left of the general skills?
        general, _ = _score(student, known, split.split("/")[1])
        metrics |= {f"general_{k}": general[k] for k in ("accuracy", "nll")}
    if judged := [r for phase in config["phases"] for part in phase["rows"] if (r := read_rows(root, part, spec)[2])]:
        metrics["label_accuracy"] = sum(judged[0]) / len(judged[0])
    for name, model in (("untuned", config["start"]), ("teacher", tuned)):
        own = json.loads((path(root, model) / "evaluation.json").read_text(encoding="utf-8"))[split] if model else {}
        metrics |= {f"{name}_{k}": v for k, v in own.items()}
    metric = METRICS["accuracy" if known.verify else "bits_per_byte"]
    made = {n: store.content_hash(path(root, s)) for n, (_, s) in all_of(json.dumps(config)).items() if n.startswith(("data", "base", "model"))}
    provenance = {"metric": metric.name, "higher_is_better": metric.higher_is_better, **results.environment(), "artefacts": made,
                  "device": str(student.device), "dtype": str(student.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
                  "wall_s": round(time.perf_counter() - wall, 2), "train_s": round(trained - wall, 2),
                  "cpu_s": round(time.process_time() - cpu, 2), "tokens": sum(len(r["input_ids"]) for r in seen),
                  "response_tokens": sum(t != data.IGNORE for r in seen for t in r["labels"][1:]), "data_report": known.report,
                  "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)}
    return {"metrics": metrics, "items": items, "config": config, "provenance": provenance}


@lru_cache(maxsize=None)
def all_of(config: str) -> dict[str, tuple[int, dict]]:
    """By name, every artefact under a run (its configuration as JSON), after those it is made from, and its depth (1: from nothing)."""
    out = {}
    for below in made_from(json.loads(config)):
        deeper = all_of(json.dumps(below))
        out |= deeper | {path(Path(), below).name: (1 + max((d for d, _ in deeper.values()), default=0), below)}
    return out


def tasks(runs: list[tuple[dict, dict]], root: Path) -> dict[partial, float]:
    """What makes ``runs`` (labels, configuration) with their artefacts, and its cost, the least deep first, so that few wait for another."""
    found, deep = {}, []
    for labels, config in runs:
        found |= (below := all_of(json.dumps(config)))
        deep.append((1 + max(d for d, _ in below.values()), partial(execute, root, labels, config), 2.0))
    deep += [(d, partial(make, root, spec), COSTS[name.split("-")[0]]) for name, (d, spec) in found.items() if not path(root, spec).is_dir()]
    return {task: cost for _, task, cost in sorted(deep, key=lambda entry: entry[0])}
