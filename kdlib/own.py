"""Distillation of your own models on your own data, in one call: :func:`distill`."""

import json
import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCardData

from kdlib import jobs, models, results, runner, stages, stats, store, study, teachers, text, trainer
from kdlib.losses import Objective
from kdlib.presets import METRICS, Preset, check

HUB_ID = re.compile(r"(?!\.|.*\.(jsonl?|gz|parquet)$)[\w.-]+(/[\w.-]+)?")  # what looks like one
CARD = """# {student}, distilled from {teacher}

Trained by kdlib {version} on {rows:,} conversations of `{dataset}`: {alpha:g} of the loss is {kind} to `{teacher}`, at temperature {temperature:g}.

Held-out human answers, {label}, mean over {n} paired seeds: KD {kd:.4f}, SFT on the same rows {sft:.4f}, untuned {untuned:.4f}.
SFT − KD: {gap:+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]. This model is the one of seed {seed}.

Settings: {settings}
"""


def source_of(dataset: str | Path | dict, revision: str | None = None, split: str = "train") -> dict:
    """The source (:mod:`kdlib.text`) that ``dataset`` names: a file or folder, a name under KDLIB_DATA or on the hub. ValueError if it is none."""
    if isinstance(dataset, dict):
        text.check_source(dataset)
        if not (local := dataset.get("local")) or (here := Path(os.path.expanduser(local))).exists():
            return dataset | ({"local": str(here.resolve())} if local else {})
        check("source['local']", local, str, "a path that is there, or a name under KDLIB_DATA", lambda v: "hub" in dataset or os.environ.get("KDLIB_DATA"))
        return dataset
    name = str(check("dataset", dataset, (str, Path), "a hub id, a .jsonl or .parquet file, a folder of them, or a source", lambda v: str(v).strip()))
    here, mirrored = Path(os.path.expanduser(name)), Path(os.environ.get("KDLIB_DATA") or "/dev/null") / name
    found = next((place for place in (here, mirrored) if place.exists()), None)
    check("split", split, str, "train, of a file or folder of rows", lambda v: v == "train" or not found or (found / "dataset_dict.json").is_file())
    if found == here:
        return {"local": str(here.resolve())} | ({"split": split} if split != "train" else {})
    if not found and not HUB_ID.fullmatch(name):
        raise ValueError(f"dataset={name!r} is not there; allowed: a file or folder that is, or a hub id.")
    return {"hub": name, "revision": revision, "split": split} | ({"local": name} if found else {})


def _plain(value) -> bool:
    try:
        return bool(json.dumps(value))
    except TypeError:
        return False


def _model(name: str, value) -> str:
    """The folder or hub id of a model. ValueError if it can be neither."""
    said = str(check(name, value, (str, Path), "a folder or hub id", lambda v: str(v).strip()))
    if (here := Path(os.path.expanduser(said))).is_dir():
        return str(here)
    return check(name, said, str, "a folder that is there, or a hub id", lambda v: HUB_ID.fullmatch(v))


def stamp(name: str) -> str | None:
    """What stands for the revision of a model in a folder: its files."""
    files = sorted(p for p in Path(name).rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja", ".bin")) if Path(name).is_dir() else []
    return store.digest([[p.name, store.file_hash(p)] for p in files]) if files else None


def distill(student: str | Path, teacher: str | Path, dataset: str | Path | dict, output_dir: str | Path, *, student_revision: str | None = None,
            teacher_revision: str | None = None, revision: str | None = None, split: str = "train", template: str | None = None,
            max_length: int = 1024, epochs: float = 1, batch_size: int = 16, learning_rate: float | dict = 1e-5, seeds: Sequence[int] = (0, 1, 2),
            validation_rows: int = 50, test_rows: int = 200, cache: dict | None = None, training: dict | None = None, alpha: float = 1.0,
            kind: str = "forward_kl", temperature: float = 1.0, workers: int = 1) -> SimpleNamespace:
    """Tune ``student`` on ``dataset`` by SFT and by KD from ``teacher``, with ``seeds`` that pair them, compare them on held-out rows, and save
    the KD model of the first seed under ``output_dir/models``, with a model card, for plain ``transformers``.

    Models are folders, or hub ids with their revisions; the dataset is a hub id with ``revision`` and ``split``, a JSON-lines or Parquet file, a
    folder of them, or a source of :mod:`kdlib.text`. Both models read the same tokens, in chat ``template`` (tulu, chatml; None: the student's
    own, which must mark what the assistant says), prompts shortened to half of ``max_length``; rows longer than that then are left out.
    ``learning_rate`` is one for both or ``{"sft": …, "kd": …}``; ``cache`` and ``training`` are as in presets.toml. All that is finished in
    ``output_dir`` is kept, so a call that was stopped goes on. Returns ``model`` (its folder), ``frame`` (one row a run), ``gap`` (an
    :class:`~kdlib.stats.Interval` of SFT − KD in bits per byte) and ``records``. ValueError, before any training, on what does not fit.
    """
    source, metric = source_of(dataset, revision, split), METRICS["bits_per_byte"]
    into = os.path.expanduser(check("output_dir", output_dir, (str, Path), "a folder"))
    if (read := text.find(source)) and read.is_dir() and Path(into).resolve().is_relative_to(read.resolve()):
        raise ValueError(f"output_dir={str(output_dir)!r} lies in the dataset's folder, of which it would become a part; allowed: another.")
    student, teacher = (_model(name, value) for name, value in (("student", student), ("teacher", teacher)))
    seeds = check("seeds", list(seeds) if isinstance(seeds, Sequence) else seeds, list, "at least two different whole numbers from 0 to 2**32 - 1",
                  lambda v: all(type(s) is int and 0 <= s < 2**32 for s in v) and len(set(v)) == len(v) >= 2)
    check("epochs", epochs, float, "a number above 0", lambda v: 0 < v < math.inf)
    for name, value, low in (("batch_size", batch_size, 1), ("max_length", max_length, 16), ("validation_rows", validation_rows, 1),
                             ("test_rows", test_rows, 1), ("workers", workers, 0)):
        check(name, value, int, f"a whole number from {low}", lambda v: v >= low)
    rates = learning_rate if isinstance(learning_rate, dict) else {"sft": learning_rate, "kd": learning_rate}
    check("learning_rate", learning_rate, object, "a number, or one for sft and one for kd", lambda _: rates.keys() == {"sft", "kd"})
    for rate in rates.values():
        check("learning_rate", rate, float, "a number above 0", lambda v: 0 < v < math.inf)
    check("training", training or {}, dict, "settings of kdlib.trainer.train or TrainingArguments", lambda v: all(type(k) is str for k in v) and _plain(v))
    ranks = runner.launch_settings().get("num_processes", 0)
    trainer.check_training(batch_size, ranks, **(training or {}))
    objective = vars(Objective(alpha=alpha, kind=kind, temperature=temperature))
    cache = {"form": "top_k", **check("cache", cache, dict, "settings as in presets.toml")} if cache else {"form": "top_k", "k": 64, "dtype": "float16"}
    root = store.open_folder(output_dir, "output_dir")
    pair = [(name, stamp(name) or at) for name, at in ((student, student_revision), (teacher, teacher_revision))]
    tokens = models.common_vocabulary(*(models.load_tokenizer(*at, template) for at in pair), *(models.width(*at) for at in pair))
    teachers.check_cache(tokens, kind, **cache)
    ours = models.load(*pair[0], template, device="cpu")[0]  # now, since what the teacher says comes first, and may take hours
    trainer.check_training(batch_size, ranks, ours, **(training or {}))
    del ours
    preset = Preset(name="own", source={"kind": "text", "train": source, "test": {}, "validation_rows": validation_rows, "test_rows": test_rows},
                    train_rows=10**9, max_length=max_length, prompt_length=max_length // 2, max_new_tokens=min(128, max_length // 2), vocab_size=0,
                    batch_size=batch_size, seeds=seeds,
                    bases={"student": dict(zip(("hub", "revision"), pair[0]))}, teachers={"base": dict(zip(("hub", "revision"), pair[1]))},
                    tokenizer={**dict(zip(("name", "revision"), pair[0])), "template": template}, domain={}, worlds=[0], metric=metric.name,
                    learning_rate={m: {1: rates[m]} for m in ("sft", "kd")}, training=training or {}, cache=cache)
    reports = json.loads((stages.make(root, study.data_spec(preset, 0)) / "report.json").read_text(encoding="utf-8"))
    left = {name: reports[name]["rows"] - reports[name]["rows_dropped"] for name in ("train", "validation", "test")}
    if empty := [name for name, n in left.items() if not n]:
        raise ValueError(f"max_length={max_length} leaves no row of {' and '.join(empty)}, for all are longer; allowed: more.")
    longest = max(reports[name]["tokens_most"] for name in left)
    for name, at in (("student", pair[0]), ("teacher", pair[1])):
        if 0 < (most := getattr(models.configuration(*at), "max_position_embeddings", None) or 0) < longest:
            raise ValueError(f"{name}={at[0]!r} reads {most} tokens, and some rows have {longest}; allowed: max_length up to {most}.")
    preset.budgets, report = [rows := left["train"]], reports["train"]
    print(f"{rows:,} rows to train on, {report['prompts_shortened']:,} with a shortened prompt; {report['rows_dropped']:,} longer than {max_length} tokens left out. "
          f"Held out: {left['test']:,}, with {reports['test']['rows_dropped']:,} too long.")
    preset.steps = math.ceil(epochs * rows / batch_size)
    runs = study.grid(preset, "data_budget", 0, kd={k: objective[k] for k in ("alpha", "kind", "temperature")})
    first = next(config for labels, config in runs if (labels["method"], labels["seed"]) == ("kd", seeds[0]))
    folder = root / "models" / results.run_id(first)
    todo, needs = jobs.tasks(runs, root, metric.name, {results.run_id(first): folder})
    runner.compute(todo, workers, needs)
    records = results.read_records(root, "own", [results.run_id(c) for _, c in runs])
    frame = results.frame(records)
    gap, means = stats.paired_interval(stats.paired_gaps(frame, metric).gap), frame.groupby("method")[metric.name].mean()
    rates = {method: preset.rate(rate, rows) for method, rate in preset.learning_rate.items()}
    settings = {"steps": preset.steps, "batch_size": batch_size, "learning_rate": rates, "max_length": max_length, **preset.training}
    about = ModelCardData(base_model=student, library_name="transformers", pipeline_tag="text-generation", datasets=[source["hub"]] if "hub" in source else None,
                          tags=["knowledge-distillation", "kdlib"])
    card = CARD.format(student=student, teacher=teacher, dataset=source.get("local") or source["hub"], rows=rows, alpha=alpha, kind=kind.replace("_", " "), label=metric.label,
                       temperature=temperature, n=gap.n, kd=means.kd, sft=means.sft, untuned=frame[f"untuned_{metric.name}"].iloc[0], low=gap.low,
                       gap=gap.estimate, high=gap.high, seed=seeds[0], version=version("kdlib"), settings=json.dumps(settings))
    store.write_atomic(folder / "README.md", f"---\n{about.to_yaml()}\n---\n{card}")
    return SimpleNamespace(model=folder, frame=frame, gap=gap, records=records)
