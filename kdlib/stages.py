"""The artefacts that runs share (rendered data with its tokenizer, base models, tuned teachers), and what one run does."""

import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from kdlib import data, evaluate, lab, models, results, store, teachers, text, trainer
from kdlib.losses import Objective
from kdlib.presets import METRICS
from kdlib.runner import Task

disable_progress_bars()  # writing an artefact is a matter of milliseconds, and notebooks store what is printed
logging.disable_progress_bar()

SOURCES = {"lab": lab, "text": text}


@dataclass
class Bundle:
    """Rendered data, as a run uses it: ``train`` as a list of rows, ``held`` and ``clean`` by split."""

    train: list[dict]
    skills: list[str]
    held: dict[str, Dataset]
    clean: dict[str, list[dict]]
    verify: Callable | None
    report: dict
    tokenizer: PreTrainedTokenizerFast


def model_specs(config: dict) -> tuple[dict, dict | None]:
    """What fixes the student's initial weights, and the tuned teacher's (None without one)."""
    teacher = dict(config["teacher"] or {})
    tuned = {"data": config["data"], "tuning": teacher.pop("tuning"), "pretrain": teacher} if teacher else None
    return {"data": config["data"], "pretrain": config["student"]}, tuned


def target_spec(tuned: dict) -> dict:
    """What fixes the cache of a tuned teacher's targets, of an exact form, so that runs differ from live ones by rounding."""
    return {"teacher": tuned, "cache": {"form": "hidden", "dtype": "float32"}}


def needed(config: dict) -> list[tuple[str, dict]]:
    """``(kind, spec)`` of every artefact a run needs, each after those it is made from."""
    base, tuned = model_specs(config)
    teacher = [("base", {k: tuned[k] for k in base}), ("teacher", tuned), ("targets", target_spec(tuned))] if tuned else []
    return [("data", config["data"]), *teacher, ("base", base)]


def cost(kind: str, spec: dict) -> float:
    """Rough work in parameter-tokens, forward and backward, for the progress estimate."""
    if kind == "data":
        return 0.0
    if kind == "targets":  # a forward pass alone, a third of a step's work
        return cost("teacher", {**spec["teacher"], "tuning": {"steps": spec["teacher"]["data"]["train_rows"], "batch_size": 1}}) / 3
    shape = models.LADDER[(spec["student"] if kind == "run" else spec["pretrain"])["model"]]
    how = {"run": spec, "base": spec.get("pretrain"), "teacher": spec.get("tuning")}[kind]
    rows = how["steps"] * how["batch_size"] + (1000 if kind == "run" else 0)  # of which a thousand for the evaluation
    return 36.0 * shape["num_hidden_layers"] * shape["hidden_size"] ** 2 * rows * how.get("block", spec["data"]["max_length"] / 3)


def make(root: Path, kind: str, spec: dict) -> Path:
    """Make an artefact unless it is there, and return its folder."""
    builders = {"data": _build_data, "base": _build_base, "teacher": _build_teacher, "targets": _build_targets}
    origin = _source(spec, "origin")() if kind == "data" else None
    return store.artefact(root, kind, spec, lambda folder: builders[kind](root, spec, folder), origin)


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
    for split in ("train", "validation", "test"):
        rows = getattr(corpus, split)
        rendered, report[split] = data.render(rows, tokenizer, spec["max_length"], drop=True)
        if split == "train":
            if len(rendered) < spec["train_rows"]:
                raise ValueError(f"train_rows={spec['train_rows']} is above the data; allowed: up to {len(rendered)} rows.")
            report[split]["rows_not_used"] = len(rendered) - spec["train_rows"]
            rendered = rendered.select(range(spec["train_rows"]))
        elif "clean" in rows.column_names:
            spoken = [[*m[:-1], {"role": "assistant", "content": c}] for m, c in zip(rendered["messages"], rendered["clean"])]
            clean, _ = data.render(Dataset.from_dict({"messages": spoken}), tokenizer, spec["max_length"], drop=True)
            clean.save_to_disk(folder / f"{split}-clean")
        report[split]["distinct_prompts"] = len({json.dumps(m[:-1]) for m in rendered["messages"]})
        rendered.save_to_disk(folder / split)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def read_data(root: Path, spec: dict) -> Bundle:
    """The data of ``spec``, made if missing."""
    folder = make(root, "data", spec)
    train = load_from_disk(folder / "train")
    rows = [{"id": str(i), **r} for i, r in enumerate(train.select_columns(["input_ids", "labels"]).to_list())]
    clean = {s: load_from_disk(folder / f"{s}-clean").select_columns(["input_ids", "labels"]).to_list()
             for s in ("validation", "test") if (folder / f"{s}-clean").is_dir()}
    held, world = {s: load_from_disk(folder / s) for s in ("validation", "test")}, getattr(SOURCES[spec["source"]["kind"]], "World", None)
    return Bundle(train=rows, skills=list(train["skill"]), held=held, clean=clean,
                  verify=world(spec["world_seed"]).verify if world else None,
                  report=json.loads((folder / "report.json").read_text(encoding="utf-8")),
                  tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", padding_side="left"))


def _build_base(root: Path, spec: dict, folder: Path) -> None:
    p, bundle = spec["pretrain"], read_data(root, spec["data"])
    texts = _source(spec["data"], "corpus")(spec["data"]["world_seed"]).pretrain()
    blocks = data.pack(texts, bundle.tokenizer, p["block"], p["max_tokens"]).to_list()
    _train(models.build_model(p["model"], bundle.tokenizer, p["seed"]), blocks, bundle, p, folder)


def _build_teacher(root: Path, spec: dict, folder: Path) -> None:
    model, _ = models.load(make(root, "base", {k: spec[k] for k in ("data", "pretrain")}), models.device())
    bundle = read_data(root, spec["data"])
    _train(model, bundle.train, bundle, {**spec["tuning"], "seed": 0}, folder)


def _build_targets(root: Path, spec: dict, folder: Path) -> None:
    model, tokenizer = models.load(make(root, "teacher", spec["teacher"]), models.device())
    teachers.write_cache(folder, model, tokenizer, read_data(root, spec["teacher"]["data"]).train, **spec["cache"])


def fit(model, tokenizer, rows: list[dict], pool: list[int], how: dict, **objective) -> tuple[list[dict], float]:
    """Train ``model`` on those of ``rows`` whose numbers are in ``pool``, as ``how`` says. Returns (rows as seen, train loss)."""
    lengths = [len(r["input_ids"]) for r in rows]
    order = data.stream(pool, how["steps"], how["batch_size"], how["seed"], lengths, how.get("length_window", 1))
    seen, settings = [rows[i] for i in order], {k: how[k] for k in ("steps", "batch_size", "learning_rate", "seed")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return seen, trainer.train(model, tokenizer, seen, output_dir=scratch, **settings, **objective)["train_loss"]


def _train(model, rows: list[dict], bundle: Bundle, how: dict, folder: Path) -> None:
    fit(model, bundle.tokenizer, rows, list(range(len(rows))), how)
    model.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    own = {split: evaluate.evaluate(model, bundle.tokenizer, held, verify=bundle.verify)[0] for split, held in bundle.held.items()}
    (folder / "evaluation.json").write_text(json.dumps(own), encoding="utf-8")


def tasks(configs: list[dict], root: Path, preset: str, experiment: str) -> list[Task]:
    """Artefacts and runs as tasks with what each waits for, and a cost in parameter-tokens for the progress estimate."""
    out = {}
    for config in configs:
        needs = []
        for kind, spec in needed(config):
            key = f"{kind}-{store.digest(spec)}"
            out.setdefault(key, Task(key, make, (root, kind, spec), tuple(needs),
                                     0.0 if store.artefact_path(root, kind, spec).is_dir() else cost(kind, spec)))
            needs = [n for n in needs if not n.startswith("data")] + [key]
        key = results.run_id(config)
        out[key] = Task(key, execute, (root, preset, experiment, config), tuple(needs), cost("run", config))
    return list(out.values())


def execute(root: Path, preset: str, experiment: str, config: dict) -> None:
    """Do one run, or nothing if its record is there. Safe beside other processes doing the same."""
    identifier = results.run_id(config)
    with store.lock(root, identifier):
        if not results.record_path(root, preset, identifier).exists():
            record = _train_and_evaluate(root, config)
            results.write_record(root, {"run_id": identifier, "experiment": experiment, "preset": preset, **record})


def hashes(root: Path, config: dict) -> dict:
    """Content hashes of the artefacts of a run."""
    base, tuned = model_specs(config)
    specs = (("data", "data", config["data"]), ("student", "base", base), ("teacher", "teacher", tuned))
    return {f"{name}_hash": store.content_hash(store.artefact_path(root, kind, spec)) if spec else None for name, kind, spec in specs}


@lru_cache(maxsize=2)
def _loaded(root: Path, spec: str) -> Bundle:
    return read_data(root, json.loads(spec))


def _train_and_evaluate(root: Path, config: dict) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    bundle = _loaded(root, json.dumps(config["data"]))
    base, tuned = model_specs(config)
    student, tokenizer = models.load(make(root, "base", base), models.device())
    teacher = models.load(make(root, "teacher", tuned), models.device())[0] if tuned else None
    targets = teachers.Cached(make(root, "targets", target_spec(tuned)), teacher) if tuned else None
    pool = data.nested_order(bundle.skills, config["seed"])[:config["budget"]]
    objective = Objective(**{f.name: config[f.name] for f in fields(Objective) if f.name in config})
    rows, loss = fit(student, tokenizer, bundle.train, pool, config, teacher=targets, objective=objective)
    if not math.isfinite(loss):
        raise ValueError(f"Run {results.run_id(config)} diverged (training loss {loss}); allowed: settings that keep it finite.")
    trained, split = time.perf_counter(), config["split"]
    metrics, items = evaluate.evaluate(student, tokenizer, bundle.held[split], verify=bundle.verify, clean=bundle.clean.get(split),
                                       max_new_tokens=config["max_new_tokens"], teacher=teacher)
    metrics["train_loss"] = loss
    for name, kind, spec in (("untuned", "base", base), ("teacher", "teacher", tuned)):
        if spec:
            own = json.loads((store.artefact_path(root, kind, spec) / "evaluation.json").read_text(encoding="utf-8"))[split]
            metrics |= {f"{name}_{k}": v for k, v in own.items()}
    metric = METRICS["accuracy" if bundle.verify else "bits_per_byte"]
    provenance = {"metric": metric.name, "higher_is_better": metric.higher_is_better, **results.environment(),
                  **hashes(root, config), "device": str(student.device), "dtype": str(student.dtype).removeprefix("torch."),
                  "threads": torch.get_num_threads(), "wall_s": round(time.perf_counter() - wall, 2),
                  "train_s": round(trained - wall, 2), "cpu_s": round(time.process_time() - cpu, 2),
                  "tokens": sum(len(r["input_ids"]) for r in rows),
                  "response_tokens": sum(t != data.IGNORE for r in rows for t in r["labels"][1:]), "data_report": bundle.report,
                  "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)}
    return {"method": "kd" if config["alpha"] else "sft", "teacher": "base" if tuned else None,
            "student": config["student"]["model"], "budget": config["budget"], "seed": config["seed"],
            "world_seed": config["data"]["world_seed"], "metrics": metrics, "items": items, "config": config, "provenance": provenance}
