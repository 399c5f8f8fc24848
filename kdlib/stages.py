"""The artefacts that runs share (rendered data, models, teachers' answers and targets), made when they are asked for; specs.py says what fixes them."""

import gc
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset, load_from_disk

import kdlib
from kdlib import data, lab, models, runner, store, text
from kdlib.losses import Objective
from kdlib.specs import data_of, first_of, path, scored_on, targets_of

SOURCES = {"lab": lab, "text": text}
TRAINED = {"dtype": torch.float32}  # whatever the dtype of the file, since small steps vanish in bfloat16


def open_model(root: Path, spec: dict, **how):
    """``(model, tokenizer)`` of a model's specification: the hub's, or an artefact, made if need be. ``how`` goes to :func:`kdlib.models.load`."""
    if "hub" not in spec:
        return models.load(make(root, spec), **how)
    spread = {"device_map": "auto"} if not how and torch.accelerator.device_count() > 1 else {}  # a teacher may need all devices
    known = next(iter(commits_of(path(root, spec)).values()), None)  # when these results began; the revision may have moved since
    model, tokenizer = models.load(spec["hub"], known or spec["revision"], spec["data"]["tokenizer"]["template"], **spread, **how)
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
        raise ValueError(f"{spec['hub']!r} does not fit on the {torch.accelerator.device_count()} devices here; allowed: more of them, or a smaller model.")
    return model, tokenizer


def commits_of(folder: Path) -> dict[str, str]:
    """The commits of an artefact made from the hub's, by ``id@revision``; none of others."""
    file = folder / "commits.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def make(root: Path, spec: dict) -> Path:
    """Make an artefact, and all that it is made from, unless it is there, and return its folder."""
    build = {"data": _build_data, "base": _build_model, "model": _build_model, "targets": _build_targets, "answers": _build_answers,
             "scores": _build_scores}
    kind, near = path(root, spec).name.split("-")[0], [spec, *(spec[k] for k in ("start", "by", "teacher", "of") if spec.get(k))]
    origin = _source(spec, "origin")() if "source" in spec else next((models.origin(s["hub"]) for s in near if "hub" in s), None)
    made = store.artefact(root, kind, spec, partial(build[kind], root, spec), origin, resumes=kind in ("targets", "answers"))
    shutil.rmtree(checkpoints(root, made.name), ignore_errors=True)
    return made


def _source(spec: dict, name: str) -> Callable:
    """``corpus`` or ``origin`` of the module that makes the data of ``spec``, with the source's own arguments."""
    source = {k: v for k, v in spec["source"].items() if k != "kind"}
    return partial(getattr(SOURCES[spec["source"]["kind"]], name, lambda **_: None), **source)  # what is drawn has no origin


def corpus_of(spec: dict) -> data.Corpus:
    """The corpus of the data that ``spec`` fixes, as its source gives it."""
    return _source(spec, "corpus")(spec["world_seed"])


def tokenizer_of(spec: dict, corpus: data.Corpus):
    """The tokenizer of the data that ``spec`` fixes: somebody's, or built from the corpus."""
    if "tokenizer" in spec:
        return models.load_tokenizer(**spec["tokenizer"])
    return models.build_tokenizer(corpus.vocabulary, corpus.pretrain() if corpus.vocabulary is None else (), spec["vocab_size"])


def room(spec: dict) -> dict:
    """How :func:`kdlib.data.render` fits rows of the data that ``spec`` fixes: all that is not answered gets what a reply leaves free, or
    ``prompt_length``, however long the answers are.
    """
    return {"max_length": spec["max_length"], "prompt_length": spec.get("prompt_length", spec["max_length"] - spec["max_new_tokens"]), "drop": True}


def _build_data(root: Path, spec: dict, folder: Path) -> None:
    commits = _source(spec, "commits")() or {}
    corpus = corpus_of(spec)
    tokenizer = tokenizer_of(spec, corpus)
    tokenizer.save_pretrained(folder / "tokenizer")
    _write_commits(folder, commits | (_commit(spec["tokenizer"]["name"], spec["tokenizer"]["revision"]) if "tokenizer" in spec else {}))
    report, render = {"loading": corpus.report}, partial(data.render, tokenizer=tokenizer, **room(spec))
    for name, rows in corpus.sets.items():
        rendered, report[name] = render(rows)
        if name == "train":
            report[name]["rows_not_used"] = max(0, len(rendered) - spec["train_rows"])
            rendered = rendered.select(range(min(len(rendered), spec["train_rows"])))
        elif "clean" in rows.column_names:
            spoken = [[*m[:-1], {"role": "assistant", "content": c}] for m, c in zip(rendered["messages"], rendered["clean"])]
            clean, _ = render(Dataset.from_dict({"messages": spoken}))
            clean.save_to_disk(folder / "clean" / name)
        report[name]["distinct_prompts"] = len({hash(json.dumps(m[:-1])) for m in rendered["messages"]})
        if corpus.report:  # what is drawn has no long rows, and answers of its own
            ends = Counter(answer for answer in rendered["answer"] if answer is not None)
            report[name] |= data.lengths(rendered) | ({"commonest_answer": round(max(ends.values()) / ends.total(), 4)} if ends else {})
        rendered.save_to_disk(folder / "sets" / name, num_proc=data.processes(len(rendered)))
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _commit(name: str, revision: str | None) -> dict[str, str | None]:
    return {f"{name}@{revision or 'main'}": models.commit(name, revision)}


def _write_commits(folder: Path, found: dict[str, str | None]) -> None:
    """Keep what the hub's revisions were: :func:`open_model` goes on with them, and records name them."""
    if known := {name: commit for name, commit in found.items() if commit}:
        (folder / "commits.json").write_text(json.dumps(known), encoding="utf-8")


def read_data(root: Path, spec: dict) -> SimpleNamespace:
    """``tokenizer``, ``report``, ``longest`` reply, ``verify`` (None: nobody can), ``rows(name)`` and ``rows(name, "clean")`` (no slips, or None)."""
    folder, source = make(root, spec), SOURCES[spec["source"]["kind"]]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tokenizer = models.load_tokenizer(folder / "tokenizer")
    return SimpleNamespace(
        report=report, held=[name for name in report if name.endswith(("validation", "test"))], tokenizer=tokenizer,
        verify=source.verifier(spec["world_seed"]), longest=spec["max_new_tokens"],
        rows=lambda name, kind="sets": load_from_disk(folder / kind / name) if (folder / kind / name).is_dir() else None)


def look(root: Path, spec: dict, needed: bool) -> SimpleNamespace:
    """``tokenizer`` and ``rows(name)`` with ``messages``, to look at: the data artefact's, which is made if it is ``needed`` anyway; else as a
    world is drawn. FileNotFoundError of other data, which may be large.
    """
    if needed or path(root, spec).is_dir():
        return read_data(root, spec)
    if hasattr(SOURCES[spec["source"]["kind"]], "origin"):
        raise FileNotFoundError(f"Nothing is to be trained, and the rows to train on are not in {root}.")
    corpus = corpus_of(spec)
    return SimpleNamespace(tokenizer=tokenizer_of(spec, corpus), rows=corpus.sets.__getitem__)


@lru_cache(maxsize=8)
def _listed(folder: Path) -> tuple[Sequence[dict], list[str], list[bool | None] | None]:
    found = load_from_disk(folder)
    judged, rows = list(found["verified"]) if "verified" in found.column_names else None, found.select_columns(["input_ids", "labels"])
    return rows.to_list() if len(rows) < 50_000 else rows, list(found["skill"]), judged  # many stay in their files


def read_rows(root: Path, parts: list[dict], spec: dict) -> tuple[data.Rows, list[list[str]], list[bool | None]]:
    """The rows of the parts of a phase, whatever their budgets, their skills by part, and which of the first answers judged verify."""
    sets, found, judged = [], [], []
    for part in parts:
        rows, skills, right = _listed(make(root, part["said"]) if "said" in part else make(root, spec) / "sets" / part["set"])
        if not (kept := [i for i in range(len(rows)) if not part.get("verified") or right[i]]):
            raise ValueError(f"Set {part['set']!r} has nothing to train on: no answer of its teacher verifies.")
        sets.append((part["set"], rows, kept))
        found.append([skills[i] for i in kept])
        judged = judged or [r for r in right or () if r is not None]
    return data.Rows(sets), found, judged


def checkpoints(root: Path, name: str) -> Path:
    """Where the trainings of a run or model ``name`` keep what they need to go on, phase by phase, until it is finished."""
    return root / ".cache" / f"training-{name}"


def tune(root: Path, model, tokenizer, phase: dict, spec: dict, at: Path, save_to: Path | None = None) -> tuple[data.Rows, float]:
    """Train ``model`` as ``phase`` says on data of ``spec``, with checkpoints under ``at``. Returns the rows as seen and the loss. With an
    Accelerate configuration in KDLIB_LAUNCH, in as many processes as that says; ``save_to`` is where those leave the model.
    """
    rows, skills, _ = read_rows(root, phase["rows"], spec)
    pools = _pools(phase["rows"], skills, spec)
    targets = kdlib.teachers.Cached(make(root, targets_of(phase))) if phase["teacher"] else None
    if os.environ.get("KDLIB_LAUNCH") and save_to is None:
        return data.Rows(rows.sets, _order(pools, phase)), _launch(root, model, tokenizer, phase, spec, at)
    at = at.with_name(f"{at.name}{runner.launch_settings().get('distributed_type', '')}")  # whose checkpoints others cannot read
    return fit(model, tokenizer, rows.sets, pools, phase, at, teacher=targets, save_to=save_to,
               objective=Objective(**{f.name: phase[f.name] for f in fields(Objective) if f.name in phase}))


def _pools(parts: list[dict], skills: list[list[str]], spec: dict) -> list[list[int]]:
    """The numbers of the rows that the budgets of ``parts`` leave, part by part."""
    pools, start = [], 0
    for part, own in zip(parts, skills):
        if (budget := part.get("budget", 0)) > len(own) and budget != spec["train_rows"]:  # which means all that there are
            raise ValueError(f"budget={budget} is above set {part['set']!r}; allowed: up to {len(own)} rows.")
        chosen = data.nested_order(own, part["seed"])[:budget] if budget else range(len(own))
        pools.append([start + i for i in chosen])
        start += len(own)
    return pools


def _order(pools: list[list[int]], how: dict) -> list[int]:
    return data.stream(pools, how["steps"], how["batch_size"], how["seed"])


def fit(model, tokenizer, sets: list[tuple], pools: list[list[int]], how: dict, at: Path, **objective) -> tuple[data.Rows, float]:
    """Train on those rows of ``sets`` that ``pools`` number, equally many of each. Returns rows as seen and loss; ValueError if not finite."""
    seen = data.Rows(sets, _order(pools, how))
    settings = {k: how[k] for k in ("steps", "batch_size", "learning_rate", "seed")}
    with store.room_on_disk(at.parent):
        loss = kdlib.trainer.train(model, tokenizer, seen, output_dir=at, **settings, **how.get("training", {}), **objective)["train_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"Training diverged (loss {loss}) with {settings}; allowed: settings that keep it finite.")
    return seen, loss


def _launch(root: Path, model, tokenizer, phase: dict, spec: dict, at: Path) -> float:
    """:func:`tune` in the processes that ``accelerate launch`` starts; ``model`` takes over what they made."""
    scratch = at.with_name(f"{at.name}-launch")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        model.to("cpu").save_pretrained(scratch / "before")
        tokenizer.save_pretrained(scratch / "before")
        (scratch / "job.json").write_text(json.dumps([str(root), phase, spec, str(at), os.getpid()]), encoding="utf-8")
        gc.collect()
        if torch.accelerator.is_available():  # what this process has freed is theirs
            torch.accelerator.empty_cache()
        runner.launch(os.environ["KDLIB_LAUNCH"], "kdlib.stages", str(scratch))
        model.load_state_dict(models.load(scratch / "after", device="cpu")[0].state_dict())
        model.to(models.device()).eval()
        return json.loads((scratch / "loss.json").read_text())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build_model(root: Path, spec: dict, folder: Path) -> None:
    known, name = read_data(root, data_of(spec)), path(root, spec).name
    if p := spec.get("pretrain"):
        texts = corpus_of(spec["data"]).pretrain()
        blocks = data.pack(texts, known.tokenizer, p["block"], p["max_tokens"]).to_list()
        model, every = models.build_model(p["model"], known.tokenizer, p["seed"]).to(models.device()), range(len(blocks))
        fit(model, known.tokenizer, [("text", blocks, every)], [list(every)], p, checkpoints(root, name) / "0")
    else:
        model, _ = open_model(root, spec.get("start", spec), **({} if "hub" in spec else TRAINED))
        for number, phase in enumerate(spec.get("phases", ())):
            tune(root, model, known.tokenizer, phase, data_of(spec), checkpoints(root, name) / str(number))
        if "hub" in first_of(spec) and any(p.get("training", {}).get("bf16") for p in spec.get("phases", ())):  # as such models are kept and read
            for weight in model.parameters():  # not model.to, which would round rotary frequencies too
                weight.data = weight.data.to(torch.bfloat16)
    if "hub" in spec:
        _write_commits(folder, _commit(spec["hub"], spec["revision"]))
    else:
        model.save_pretrained(folder)
        known.tokenizer.save_pretrained(folder)
    own = {held: score(model, known, held)[0] for held in scored_on(spec, known.held)}
    (folder / "evaluation.json").write_text(json.dumps(own), encoding="utf-8")


def score(model, known: SimpleNamespace, name: str, **more) -> tuple[dict, dict]:
    return kdlib.evaluate.evaluate(model, known.tokenizer, known.rows(name), verify=known.verify, max_new_tokens=known.longest, **more)


def _build_answers(root: Path, spec: dict, folder: Path) -> None:
    known, by = read_data(root, data_of(spec["by"])), spec["by"]
    how = {"max_new_tokens": known.longest, "temperature": spec["temperature"], "seed": spec["seed"]}
    rows = known.rows(spec["set"])
    if part := spec.get("only"):
        rows = rows.select(_pools([{**part, "set": spec["set"]}], [list(rows["skill"])], data_of(by))[0])
    if (server := os.environ.get("KDLIB_SERVER")) and "hub" in by:
        said = kdlib.labels.label(folder / "said", rows.remove_columns(["input_ids", "labels"]), base_url=server, model=by["hub"], concurrency=128, **how)
    else:
        said = kdlib.teachers.write_answers(folder / "said", *_speaking(open_model(root, by), known), rows, **how, finish_reason=spec.get("open", False))
    if known.verify:
        said = said.add_column("verified", [known.verify(row, row["messages"][-1]["content"]) for row in said])
    fit = room(data_of(by))
    rendered, _ = data.render(said, known.tokenizer, **fit | ({"max_length": 10**9} if spec.get("open") else {}))
    if spec.get("open") or any(sum(m["role"] == "assistant" for m in ms) > 1 for ms in rendered["messages"]):
        rendered = rendered.map(data.own_words, fn_kwargs={"max_length": fit["max_length"], "open": spec.get("open", False)})
    rendered.save_to_disk(folder)
    shutil.rmtree(folder / "said")


def _build_targets(root: Path, spec: dict, folder: Path) -> None:
    known, under = read_data(root, data_of(spec["teacher"])), data_of(spec["teacher"])
    model, tokenizer = _speaking(open_model(root, spec["teacher"]), known)
    models.common_vocabulary(known.tokenizer, tokenizer, *[model.get_output_embeddings().weight.shape[0]] * 2)  # else all is for nothing
    rows, skills, _ = read_rows(root, spec["rows"], under)
    order = [i for pool in _pools(spec["rows"], skills, under) for i in pool]
    kdlib.teachers.write_cache(folder, model, tokenizer, data.Rows(rows.sets, order), **spec["cache"])


def _speaking(opened: tuple, known: SimpleNamespace) -> tuple:
    """A model and its tokenizer, which renders conversations as the data's does."""
    opened[1].chat_template, opened[1].eos_token = known.tokenizer.chat_template, known.tokenizer.eos_token
    return opened


def _build_scores(root: Path, spec: dict, folder: Path) -> None:
    scored, _ = kdlib.harness.harness(*open_model(root, spec["of"]), spec["tasks"])
    (folder / "evaluation.json").write_text(json.dumps(scored), encoding="utf-8")


if __name__ == "__main__":  # one of the processes that _launch starts
    where = Path(sys.argv[1])
    base, wanted, about, at, parent = json.loads((where / "job.json").read_text(encoding="utf-8"))
    runner.end_with(parent)
    store.checked_before = True
    _, final = tune(Path(base), *models.load(where / "before", device="cpu"), wanted, about, Path(at), where / "after")
    store.write_atomic(where / "loss.json", json.dumps(final))
