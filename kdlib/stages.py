"""The artefacts that runs share: rendered data with its tokenizer, pre-trained base models, tuned teachers."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_from_disk
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from kdlib import data, evaluate, lab, models, store, teachers, text, trainer

disable_progress_bars()  # writing an artefact is a matter of milliseconds, and notebooks store what is printed
logging.disable_progress_bar()

SOURCES = {"lab": lab, "text": text}


@dataclass
class Bundle:
    """Rendered data, as a run uses it: ``train`` as a list of rows, ``held`` and ``clean`` by split."""

    train: list[dict]
    lengths: list[int]
    skills: list[str]
    held: dict[str, Dataset]
    clean: dict[str, list[dict]]
    verify: Callable | None
    report: dict


def model_specs(config: dict) -> tuple[dict, dict | None]:
    """What fixes the student's initial weights, and the tuned teacher's (None without one)."""
    base = {"data": config["data"], "pretrain": config["student"]}
    if config["teacher"] is None:
        return base, None
    pretrain = {k: v for k, v in config["teacher"].items() if k != "tuning"}
    return base, {"data": config["data"], "pretrain": pretrain, "tuning": config["teacher"]["tuning"]}


def target_spec(tuned: dict) -> dict:
    """What fixes the cache of a tuned teacher's targets, of an exact form, so that runs differ from live ones by rounding."""
    return {"teacher": tuned, "cache": {"form": "hidden", "dtype": "float32"}}


def needed(config: dict) -> list[tuple[str, dict]]:
    """``(kind, spec)`` of every artefact a run needs, each after those it is made from."""
    base, tuned = model_specs(config)
    teacher = [("base", {k: tuned[k] for k in ("data", "pretrain")}), ("teacher", tuned), ("targets", target_spec(tuned))] if tuned else []
    return [("data", config["data"]), *teacher, ("base", base)]


def cost(kind: str, spec: dict) -> float:
    """Rough work in parameter-tokens, forward and backward, for the progress estimate."""
    def size(pretrain):
        shape = models.LADDER[pretrain["model"]]
        return 12 * shape["num_hidden_layers"] * shape["hidden_size"] ** 2

    if kind == "data":
        return 0.0
    if kind == "base":
        return 3.0 * size(spec["pretrain"]) * spec["pretrain"]["steps"] * spec["pretrain"]["batch_size"] * spec["pretrain"]["block"]
    tuned = spec["teacher"] if kind == "targets" else spec
    length = tuned["data"]["max_length"] / 3
    if kind == "targets":
        return size(tuned["pretrain"]) * tuned["data"]["train_rows"] * length
    if kind == "teacher":
        return 3.0 * size(spec["pretrain"]) * spec["tuning"]["steps"] * spec["tuning"]["batch_size"] * length
    return 3.0 * size(spec["student"]) * (spec["steps"] * spec["batch_size"] + 1000) * length


def path(root: Path, kind: str, spec: dict) -> Path:
    """The folder of an artefact."""
    return store.artefact_path(root, kind, spec)


def make(root: str, kind: str, spec: dict) -> str:
    """Make an artefact unless it is there, and return its folder."""
    builders = {"data": _build_data, "base": _build_base, "teacher": _build_teacher, "targets": _build_targets}
    origin = None
    if kind == "data":
        module, source = _source(spec)
        origin = module.origin(**source)
    return str(store.artefact(Path(root), kind, spec, lambda folder: builders[kind](Path(root), spec, folder), origin))


def _source(spec: dict):
    return SOURCES[spec["source"]["kind"]], {k: v for k, v in spec["source"].items() if k != "kind"}


def _corpus(spec: dict) -> data.Corpus:
    module, source = _source(spec)
    return module.corpus(spec["world_seed"], **source)


def _build_data(root: Path, spec: dict, folder: Path) -> None:
    corpus = _corpus(spec)
    texts = corpus.pretrain() if corpus.vocabulary is None else ()
    tokenizer = models.build_tokenizer(corpus.vocabulary, texts, spec["vocab_size"])
    tokenizer.save_pretrained(folder / "tokenizer")
    report = {"loading": corpus.report}
    for split in ("train", "validation", "test"):
        rows: Dataset = getattr(corpus, split)
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
    clean = {s: load_from_disk(folder / f"{s}-clean").select_columns(["input_ids", "labels"]).to_list()
             for s in ("validation", "test") if (folder / f"{s}-clean").is_dir()}
    verify = SOURCES[spec["source"]["kind"]].verifier(spec["world_seed"])
    rows = [{"id": str(i), **r} for i, r in enumerate(train.select_columns(["input_ids", "labels"]).to_list())]
    return Bundle(train=rows, lengths=[len(r["input_ids"]) for r in rows], skills=list(train["skill"]),
                  held={s: load_from_disk(folder / s) for s in ("validation", "test")}, clean=clean, verify=verify,
                  report=json.loads((folder / "report.json").read_text(encoding="utf-8")))


def data_and_tokenizer(root: Path, spec: dict) -> tuple[Bundle, PreTrainedTokenizerFast]:
    """The data of ``spec`` with its tokenizer, made if missing."""
    return read_data(root, spec), models.load_tokenizer(path(root, "data", spec) / "tokenizer")


def _build_base(root: Path, spec: dict, folder: Path) -> None:
    p = spec["pretrain"]
    tokenizer = models.load_tokenizer(Path(make(str(root), "data", spec["data"])) / "tokenizer")
    blocks = data.pack(_corpus(spec["data"]).pretrain(), tokenizer, p["block"], p["max_tokens"]).to_list()
    model = models.build_model(p["model"], tokenizer, p["seed"])
    _train(model, blocks, tokenizer, p, folder)


def _build_teacher(root: Path, spec: dict, folder: Path) -> None:
    base = make(str(root), "base", {"data": spec["data"], "pretrain": spec["pretrain"]})
    model, tokenizer = models.load(base, models.device())
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


def _train(model, rows: list[dict], tokenizer, how: dict, folder: Path) -> None:
    order = data.stream(list(range(len(rows))), how["steps"], how["batch_size"], how["seed"],
                        [len(r["input_ids"]) for r in rows], how.get("length_window", 1))
    scratch = tempfile.mkdtemp()
    try:
        log = trainer.train(model, tokenizer, [rows[i] for i in order], steps=how["steps"],
                            batch_size=how["batch_size"], learning_rate=how["learning_rate"], seed=how["seed"], output_dir=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    models.save(model, tokenizer, folder)
    (folder / "training.json").write_text(json.dumps({"train_loss": log["train_loss"]}), encoding="utf-8")
