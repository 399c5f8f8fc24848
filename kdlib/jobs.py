"""One run, from its configuration to its record, and in which order many of them and their artefacts are made."""

import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import torch

import kdlib
from kdlib import data, results, runner, stages, store
from kdlib.presets import METRICS
from kdlib.specs import all_of, data_of, path, teacher_of

COSTS = {"data": 0.0, "base": 30.0, "model": 8.0, "targets": 1.0, "answers": 8.0, "scores": 8.0}  # of making one, where a run costs 2


def execute(root: Path, labels: dict, config: dict, metric: str, keep: Path | None = None) -> None:
    """Do one run, or nothing if its record, and the model if it is to ``keep`` somewhere, is there. Safe beside others doing the same."""
    identifier = results.run_id(config)
    with store.lock(root, identifier):
        if not results.record_path(root, labels["preset"], identifier).exists() or (keep and not ((keep / "config.json").is_file() and any(keep.glob("*.safetensors")))):
            results.write_record(root, {"run_id": identifier, **labels, **_train_and_evaluate(root, identifier, config, METRICS[metric], keep)})
        shutil.rmtree(stages.checkpoints(root, identifier), ignore_errors=True)


@lru_cache(maxsize=32)
def _scores_of(root: Path, teacher: str, split: str) -> dict[str, torch.Tensor]:
    """What a teacher, a specification in JSON, says of a held-out set, token by token, read once for all the runs of a process."""
    known = stages.read_data(root, data_of(spec := json.loads(teacher)))
    rows = known.rows(split).select_columns(["input_ids", "labels"]).to_list()
    return kdlib.evaluate.token_scores(stages.open_model(root, spec)[0], rows, known.tokenizer, entropy=True)


def _train_and_evaluate(root: Path, identifier: str, config: dict, metric, keep: Path | None) -> dict:
    wall, cpu, spec, seen = time.perf_counter(), time.process_time(), data_of(config), []
    known, split, tuned = stages.read_data(root, spec), config["evaluate"]["on"], teacher_of(config)
    student, tokenizer = stages.open_model(root, config["start"], **stages.TRAINED)
    for number, phase in enumerate(config["phases"]):
        rows, loss = stages.tune(root, student, tokenizer, phase, spec, stages.checkpoints(root, identifier) / str(number))
        seen.append(rows)
    if keep:  # whole or not at all
        shutil.rmtree(work := keep.with_name(f".{keep.name}.unfinished"), ignore_errors=True)
        for part in (student, known.tokenizer):
            part.save_pretrained(work)
        shutil.rmtree(keep, ignore_errors=True)
        os.replace(work, keep)
    teacher = _scores_of(root, json.dumps(tuned), split) if tuned else None
    trained, clean = time.perf_counter(), known.rows(split, "clean")
    metrics, items = stages.score(student, known, split, teacher=teacher, clean=clean and clean.select_columns(["input_ids", "labels"]).to_list())
    metrics["train_loss"] = loss
    if tasks := config["evaluate"].get("tasks"):
        scored, more = kdlib.harness.harness(student, known.tokenizer, tasks)
        items["correct"] = [None] * len(items["id"])  # the benchmarks decide
        metrics, items = metrics | scored, {k: [*items[k], *more[k]] for k in more}
    if "/" in split:  # a domain's rows: what is left of the general skills?
        general, _ = stages.score(student, known, split.split("/")[1])
        metrics |= {f"general_{k}": general[k] for k in (metric.name, "nll")}
    if judged := next(filter(None, (stages.read_rows(root, phase["rows"], spec)[2] for phase in config["phases"])), None):
        metrics["label_accuracy"] = sum(judged) / len(judged)
    for name, model in (("untuned", config["start"]), ("teacher", tuned)):
        own = json.loads((stages.make(root, model) / "evaluation.json").read_text(encoding="utf-8"))[split] if model else {}
        if model and tasks:
            own |= json.loads((stages.make(root, {"of": model, "tasks": tasks}) / "evaluation.json").read_text(encoding="utf-8"))
        metrics |= {f"{name}_{k}": v for k, v in own.items()}
    lengths = [(n * len(row["input_ids"]), n * sum(t != data.IGNORE for t in row["labels"][1:]))
               for rows in seen for i, n in Counter(rows.order).items() for row in [data.Rows(rows.sets, [i])[0]]]
    below = {n: path(root, s) for n, s in all_of(json.dumps(config)).items() if n.startswith(("data", "base", "model"))}
    made, commits = {n: store.content_hash(folder) for n, folder in below.items()}, {k: v for f in below.values() for k, v in stages.commits_of(f).items()}
    provenance = {"metric": metric.name, "higher_is_better": metric.higher_is_better, **results.environment(), "artefacts": made, **({"commits": commits} if commits else {}),
                  **({"launch": launch} if (launch := runner.launch_settings()) else {}),
                  "device": str(student.device), "dtype": str(student.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
                  "wall_s": round(time.perf_counter() - wall, 2), "train_s": round(trained - wall, 2),
                  "cpu_s": round(time.process_time() - cpu, 2), "tokens": sum(n for n, _ in lengths),
                  "response_tokens": sum(n for _, n in lengths), "data_report": known.report,
                  "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)}
    return {"metrics": metrics, "items": items, "config": config, "provenance": provenance}


def _cost(name: str, spec: dict) -> float:
    rows = spec.get("rows") or (spec.get("phases") or [{}])[-1].get("rows") or [spec]
    return COSTS[name.split("-")[0]] / (8 if "/" in rows[0].get("set", "") else 1)  # of a domain, whose sets are small


def tasks(runs: list[tuple[dict, dict]], root: Path, metric: str, keep: dict[str, Path] | None = None) -> tuple[dict[partial, float], dict[partial, list[partial]]]:
    """What makes ``runs`` (labels, configuration) with their artefacts, and its cost, first what the longest chain of others waits for; and
    what each needs of the others. ``keep`` says by run id where a model is to be kept.
    """
    below = [all_of(json.dumps(config)) for _, config in runs]
    made = {name: partial(stages.make, root, spec) for found in below for name, spec in found.items() if not path(root, spec).is_dir()}
    costs = {task: _cost(name, task.args[1]) for name, task in made.items()}
    needs = {task: [made[name] for name in all_of(json.dumps(task.args[1])) if name in made] for task in made.values()}
    for (labels, config), found in zip(runs, below):
        costs[task := partial(execute, root, labels, config, metric, (keep or {}).get(results.run_id(config)))] = 2.0
        needs[task] = [made[name] for name in found if name in made]
    chain = dict(costs)
    for task in reversed(costs):  # where each stands behind what it needs
        for other in needs[task]:
            chain[other] = max(chain[other], costs[other] + chain[task])
    return {task: costs[task] for task in sorted(costs, key=lambda task: -chain[task])}, needs
