"""The artefacts that runs share: rendered data with its tokenizer, pre-trained base models, tuned teachers."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_from_disk
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from kdlib import data, evaluate, lab, models, store, teachers, text, trainer

disable_progress_bars()  # writing an artefact is a matter of milliseconds, and notebooks store what is printed
logging.disable_progress_bar()

SOURCES = {"lab": lab, "text": text}
path = store.artefact_path  # the folder of an artefact


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
    base, tuned = {"data": config["data"], "pretrain": config["student"]}, None
    if config["teacher"]:
        pretrain = {k: v for k, v in config["teacher"].items() if k != "tuning"}
        tuned = {"data": config["data"], "pretrain": pretrain, "tuning": config["teacher"]["tuning"]}
    return base, tuned


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
    how = spec["student"] if kind == "run" else spec["pretrain"]
    shape, length = models.LADDER[how["model"]], spec["data"]["max_length"] / 3
    step = 36.0 * shape["num_hidden_layers"] * shape["hidden_size"] ** 2
    if kind == "base":
        return step * how["steps"] * how["batch_size"] * how["block"]
    if kind == "teacher":
        return step * spec["tuning"]["steps"] * spec["tuning"]["batch_size"] * length
    return step * (spec["steps"] * spec["batch_size"] + 1000) * length


def make(root: str, kind: str, spec: dict) -> str:
    """Make an artefact unless it is there, and return its folder."""
    builders = {"data": _build_data, "base": _build_base, "teacher": _build_teacher, "targets": _build_targets}
    origin = _source(spec, "origin")() if kind == "data" else None
    return str(store.artefact(Path(root), kind, spec, lambda folder: builders[kind](Path(root), spec, folder), origin))


def _source(spec: dict, name: str) -> Callable:
    """``corpus`` or ``origin`` of the module that reads the data of ``spec``, with the source's own arguments."""
    source = {k: v for k, v in spec["source"].items() if k != "kind"}
    return partial(getattr(SOURCES[spec["source"]["kind"]], name), **source)


def _build_data(root: Path, spec: dict, folder: Path) -> None:
    corpus = _source(spec, "corpus")(spec["world_seed"])
    texts = corpus.pretrain() if corpus.vocabulary is None else ()
    tokenizer = models.build_tokenizer(corpus.vocabulary, texts, spec["vocab_size"])
    tokenizer.save_pretrained(folder / "tokenizer")
    report = {"loading": corpus.report}
    for split in ("train", "validation", "test"):
        rows = getattr(corpus, split)
        rendered, report[split] = data.render(rows, tokenizer, spec["max_length"])
        if split == "train":
            if len(rendered) < spec["train_rows"]:
                raise ValueError(f"train_rows={spec['train_rows']} is above the data; allowed: up to {len(rendered)} rows.")
            rendered = rendered.select(range(spec["train_rows"]))
        rendered.save_to_disk(folder / split)
        if "clean" in rows.column_names and split != "train":
            spoken = [[*m[:-1], {"role": "assistant", "content": c}] for m, c in zip(rendered["messages"], rendered["clean"])]
            clean, _ = data.render(Dataset.from_dict({"messages": spoken}), tokenizer, spec["max_length"])
            clean.save_to_disk(folder / f"{split}-clean")
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def read_data(root: Path, spec: dict) -> Bundle:
    """The data of ``spec``, made if missing."""
    folder = Path(make(str(root), "data", spec))
    train = load_from_disk(folder / "train")
    rows = [{"id": str(i), **r} for i, r in enumerate(train.select_columns(["input_ids", "labels"]).to_list())]
    clean = {s: load_from_disk(folder / f"{s}-clean").select_columns(["input_ids", "labels"]).to_list()
             for s in ("validation", "test") if (folder / f"{s}-clean").is_dir()}
    held = {s: load_from_disk(folder / s) for s in ("validation", "test")}
    return Bundle(train=rows, skills=list(train["skill"]), held=held, clean=clean,
                  verify=SOURCES[spec["source"]["kind"]].verifier(spec["world_seed"]),
                  report=json.loads((folder / "report.json").read_text(encoding="utf-8")),
                  tokenizer=models.load_tokenizer(folder / "tokenizer"))


def _build_base(root: Path, spec: dict, folder: Path) -> None:
    p = spec["pretrain"]
    tokenizer = models.load_tokenizer(Path(make(str(root), "data", spec["data"])) / "tokenizer")
    texts = _source(spec["data"], "corpus")(spec["data"]["world_seed"]).pretrain()
    blocks = data.pack(texts, tokenizer, p["block"], p["max_tokens"]).to_list()
    _train(models.build_model(p["model"], tokenizer, p["seed"]), blocks, tokenizer, p, folder)


def _build_teacher(root: Path, spec: dict, folder: Path) -> None:
    model, tokenizer = models.load(make(str(root), "base", {k: spec[k] for k in ("data", "pretrain")}), models.device())
    bundle = read_data(root, spec["data"])
    _train(model, bundle.train, tokenizer, {**spec["tuning"], "seed": 0}, folder)
    own = {}
    for split, rows in bundle.held.items():
        metrics, _ = evaluate.evaluate(model, tokenizer, rows, verify=bundle.verify)
        own[split] = {k: metrics[k] for k in ("accuracy", "accuracy_unseen", "bits_per_byte", "nll", "ece")}
    (folder / "evaluation.json").write_text(json.dumps(own), encoding="utf-8")


def _build_targets(root: Path, spec: dict, folder: Path) -> None:
    model, tokenizer = models.load(make(str(root), "teacher", spec["teacher"]), models.device())
    teachers.write_cache(folder, model, tokenizer, read_data(root, spec["teacher"]["data"]).train, **spec["cache"])


def fit(model, tokenizer, rows: list[dict], pool: list[int], how: dict, **objective) -> tuple[list[dict], float]:
    """Train ``model`` on those of ``rows`` whose numbers are in ``pool``, as ``how`` says. Returns (rows as seen, train loss)."""
    lengths = [len(r["input_ids"]) for r in rows]
    order = data.stream(pool, how["steps"], how["batch_size"], how["seed"], lengths, how.get("length_window", 1))
    seen, settings = [rows[i] for i in order], {k: how[k] for k in ("steps", "batch_size", "learning_rate", "seed")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return seen, trainer.train(model, tokenizer, seen, output_dir=scratch, **settings, **objective)["train_loss"]


def _train(model, rows: list[dict], tokenizer, how: dict, folder: Path) -> None:
    _, loss = fit(model, tokenizer, rows, list(range(len(rows))), how)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"train_loss": loss}), encoding="utf-8")
