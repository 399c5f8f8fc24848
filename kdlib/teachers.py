"""Teacher targets behind one interface: a live model, or a cache of what it said about every training example.

``prepare(student, tokenizer, dataset, objective, device)`` checks before training all that can be checked and returns the common
vocabulary; ``targets(inputs, places)`` are a batch's teacher rows at ``places`` (:func:`kdlib.inference.response_rows`) as :mod:`kdlib.losses` takes them.

A cache is a folder of Arrow shards with manifests, read by example id, never by order. Its forms: ``full``, all logits; ``hidden``, what the
teacher's LM head reads and that head once, as exact and smaller in large vocabularies; ``top_k``, the k largest log-probabilities and the
rest in one bucket, which never overstates the divergence; ``sampled``, k drawn tokens, unbiased in forward KL (arXiv 2503.16870).
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets, load_from_disk
from safetensors.torch import load_file, save_file

from kdlib import inference, models, store
from kdlib.data import Collator, example_key
from kdlib.evaluate import prompt, replies
from kdlib.losses import Head, Hidden, Objective, Sparse
from kdlib.presets import check
from kdlib.specs import EXACT

USUAL = {"form": "top_k", "k": 64, "dtype": "float16", "seed": 0, "shard_rows": 1000, "batch_size": 32}  # of a cache
ALLOWED = {"form": (*EXACT, "top_k", "sampled"), "dtype": ("float16", "float32")}


class Live:
    """A frozen causal LM beside the student, with its tokenizer."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.linear = model, tokenizer, None

    def prepare(self, student, tokenizer, dataset, objective: Objective, device) -> int:
        """Freeze the teacher, move it to ``device`` and return the number of common tokens. Raises ValueError if it does not fit."""
        if self.model is student:
            raise ValueError("The teacher is the student itself; give a copy, which stays as it is.")
        if len(places := set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            raise ValueError(f"The teacher lies on {len(places)} devices; allowed: one on the student's, or a cache that write_cache makes of this one.")
        self.model.requires_grad_(False).eval().to(device)
        self.linear = inference.linear_head(self.model)
        widths = [m.get_output_embeddings().weight.shape[0] for m in (student, self.model)]
        return models.common_vocabulary(tokenizer, self.tokenizer, *widths)

    @torch.no_grad()
    def targets(self, inputs: dict, places: torch.Tensor) -> Hidden | torch.Tensor:
        """Hidden states with their head, or logits where the head is not one matrix."""
        if self.linear is None:
            return inference.response_logits(self.model, inputs, places)
        module = self.model.get_output_embeddings()
        return Hidden(inference.at_head(self.model, inputs, places, lambda hidden: hidden), Head(module.weight, module.bias, **self.linear))


def weights_hash(model) -> str:
    """SHA-256 over a model's configuration and the names, shapes and bytes of its weights."""
    passing = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")  # set by saving and loading
    config = {k: v for k, v in model.config.to_dict().items() if k not in passing}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        sha.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _identity(tokenizer) -> dict:
    if tokenizer is None:
        raise ValueError("A cached teacher needs the student's tokenizer (processing_class), to compare it with its own.")
    return {"tokenizer": store.digest(tokenizer.get_vocab()), "template": store.digest(tokenizer.chat_template)}


def check_cache(vocabulary: int, kind: str = "forward_kl", **cache) -> None:
    """ValueError unless :func:`write_cache` takes these settings with so many tokens, and an objective's ``kind`` what comes of them."""
    if unknown := cache.keys() - USUAL.keys():
        raise ValueError(f"cache has no {', '.join(sorted(unknown))}; allowed: {', '.join(USUAL)}.")
    given = {**USUAL, **cache}
    for name in ("form", "dtype"):
        check(name, given[name], str, ", ".join(ALLOWED[name]), ALLOWED[name].__contains__)
    most = vocabulary if given["form"] == "top_k" else 2**16
    check("k", given["k"], int, f"1 to {most}", lambda v: given["form"] in EXACT or 1 <= v <= most)
    for name, low in (("seed", 0), ("shard_rows", 1), ("batch_size", 1)):
        check(name, given[name], int, f"a whole number from {low}", lambda v: v >= low)
    if given["form"] == "sampled" and kind != "forward_kl":
        raise ValueError(f"kind={kind!r} with a sampled cache would be biased; allowed: forward_kl.")


@torch.no_grad()
def write_cache(folder: str | Path, model, tokenizer, rows: Sequence[dict], *, form: str = "top_k", k: int = 64,
                temperature: float = 1.0, dtype: str = "float16", seed: int = 0, shard_rows: int = 1000, batch_size: int = 32) -> Path:
    """Cache what ``model`` says about the response tokens of rendered ``rows`` (``id``, ``input_ids``, ``labels``), in ``dtype``. A killed
    writer goes on after its whole shards. ValueError on a bad setting, rows of one id, or if ``folder`` holds something else.
    """
    folder, tokens = Path(folder), models.tokens_of(tokenizer)
    vocabulary = models.size_of(tokenizer)
    check_cache(vocabulary, form=form, k=k, dtype=dtype, seed=seed, shard_rows=shard_rows, batch_size=batch_size)
    read = [(str(r.get("id")), len(r["labels"]), store.digest([r["input_ids"], r["labels"]])) for r in rows]
    if len({name for name, *_ in read}) != len(rows):
        raise ValueError("Rows need ids of their own to be found again; some share one, or have none.")
    spec = {"teacher": weights_hash(model), **_identity(tokenizer), "vocabulary": vocabulary, "form": form, "dtype": dtype, "rows": store.digest(read)}
    if form not in EXACT:
        spec |= {"k": k, "temperature": Objective(temperature=temperature).temperature, **({"seed": seed} if form == "sampled" else {})}
    parts = {"vocabulary": lambda work: store.write_atomic(work / "vocabulary.json", json.dumps(tokens))}
    if form == "hidden":
        if (linear := inference.linear_head(model)) is None:
            raise ValueError("form='hidden' needs a teacher whose logits are one matrix times its hidden states; allowed: another form.")
        head = model.get_output_embeddings()
        spec |= {"width": head.in_features, "linear": linear}
        tensors = {n: v.detach().cpu().contiguous() for n in ("weight", "bias") if (v := getattr(head, n)) is not None}
        parts["head"] = lambda work: save_file(tensors, work / "head.safetensors")
    longest, numbers = max((length for _, length, _ in read), default=0), {"full": vocabulary, "hidden": spec.get("width")}.get(form, k)
    spec["shard_rows"] = shard_rows = max(1, min(shard_rows, (2**31 - 1) // max(1, longest * numbers)))  # which Arrow's lists hold
    build = partial(_write_shard, model=model, tokenizer=tokenizer, spec=spec, batch_size=batch_size)
    return _write(folder, spec, parts | _shards(rows, shard_rows, build))


def write_answers(folder: str | Path, model, tokenizer, rows: Dataset | list[dict], *, max_new_tokens: int, temperature: float = 0.0,
                  seed: int = 0, shard_rows: int = 1000, finish_reason: bool = False) -> Dataset:
    """``rows`` (``id``, ``messages``) with ``model``'s own text for the last answer of each, greedy at temperature 0, else sampled, and if asked
    for with its ``finish_reason``, ``stop`` or ``length``. It reads rendered rows (``input_ids``, ``labels``, which the answers leave behind)
    as training does, others whole. Fine-tuning on them is sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947). ``folder`` is
    written as a cache's.
    """
    for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("shard_rows", shard_rows, 1), ("seed", seed, 0)):
        check(name, value, int, f"a whole number from {low}", lambda v: v >= low)
    check("temperature", temperature, float, "a number from 0", lambda v: v >= 0)
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    check("columns of rows", rows.column_names if len(rows) else [], list, "id and messages, of one row or more", {"id", "messages"}.issubset)
    asked = rows.select_columns(["id", "messages"])
    if empty := [r["id"] for r in asked if not r["messages"] or not prompt({"messages": r["messages"]})]:
        raise ValueError(f"Row {empty[0]!r} asks nothing; allowed: messages with somebody's turn before the answer.")
    spec = {"teacher": weights_hash(model), **_identity(tokenizer), "rows": store.digest([store.digest([r["id"], r["messages"]]) for r in asked]),
            "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "shard_rows": shard_rows, **({"finish_reason": True} if finish_reason else {})}

    def build(work: Path, rows: list[dict], number: int) -> None:
        torch.manual_seed(seed * 1_000_003 + number)
        said, why = replies(model, tokenizer, [prompt(r) for r in rows], max_new_tokens, temperature)
        own = [{"messages": [*prompt({"messages": r["messages"]}), {"role": "assistant", "content": text}], **({"finish_reason": end} if finish_reason else {})}
               for r, text, end in zip(rows, said, why)]
        kept = [{k: v for k, v in r.items() if k not in ("input_ids", "labels")} for r in rows]
        Dataset.from_list([{**r, **more} for r, more in zip(kept, own)]).save_to_disk(work)

    folder = _write(Path(folder), spec, parts := _shards(rows, shard_rows, build))
    return concatenate_datasets([load_from_disk(store.check_files(folder / name)) for name in parts])


def _shards(rows: Sequence[dict], size: int, build: Callable) -> dict[str, Callable[[Path], None]]:
    def shard(work: Path, number: int) -> None:  # read when it is its turn
        span = range(number * size, min(len(rows), (number + 1) * size))
        build(work, rows=[rows[i] for i in span], number=number)

    return {f"shard-{i:05d}": partial(shard, number=i) for i in range(math.ceil(len(rows) / size))}


def _write(folder: Path, spec: dict, parts: dict[str, Callable[[Path], None]]) -> Path:
    """Fill ``folder``, which is of ``spec`` or new, with those ``parts`` that are not whole in it yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with store.lock(folder, "write"):
        if not (folder / "spec.json").exists():
            if [p for p in folder.iterdir() if not p.name.startswith(".")]:
                raise ValueError(f"folder={str(folder)!r} holds files of something else; give an empty or new folder.")
            store.write_atomic(folder / "spec.json", json.dumps(spec, indent=1))
        if differs := [n for n, v in _read_spec(folder).items() if spec.get(n) != v]:
            raise ValueError(f"The cache in {folder} was made with another {', '.join(differs)}; give a folder of its own.")
        for name, build in parts.items():
            store.fill(folder / name, build)
        if parts:
            store.write_atomic(folder / "complete.json", json.dumps({"shards": len(parts.keys() - {"head", "vocabulary"}), "spec": store.digest(spec)}))
    return folder


def _read_spec(folder: Path) -> dict:
    try:
        return json.loads((folder / "spec.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"The cache in {folder} has no readable spec.json; give a new folder and write it anew.") from error


def _write_shard(work: Path, model, tokenizer, spec: dict, batch_size: int, rows: list[dict], number: int) -> None:
    generator = torch.Generator().manual_seed(spec.get("seed", 0) * 1_000_003 + number)
    collate, out = Collator(tokenizer.pad_token_id), [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    wide = 1 if spec["form"] == "hidden" else spec["vocabulary"]
    while left := len(order):
        longest = len(rows[order[min(batch_size, left) - 1]]["input_ids"])
        chunk = [order.pop(0) for _ in range(max(1, min(batch_size, left, 2**29 // (longest * wide))))]  # whose logits are held at once
        batch = inference.placed(collate([rows[i] for i in chunk]))
        counts = (batch["places"] // batch["input_ids"].shape[1]).bincount(minlength=len(chunk)).tolist()
        parts = {n: v.cpu().split(counts) for n, v in _pack(model, send_to_device(batch, model.device), spec, generator).items()}
        for place, i in enumerate(chunk):
            out[i] = {n: v[place].flatten().numpy() for n, v in parts.items()}
    keys = {"key": [example_key(r["id"]) for r in rows], "tokens": [store.digest([r["input_ids"], r["labels"]]) for r in rows]}
    Dataset.from_dict({**keys, **{n: [o[n] for o in out] for n in out[0]}}).save_to_disk(work, num_shards=1)


def _pack(model, batch, spec: dict, generator) -> dict:
    places, _ = inference.response_rows(batch)
    kind, small = getattr(torch, spec["dtype"]), torch.uint16 if spec["vocabulary"] <= 2**16 else torch.int32
    if spec["form"] == "hidden":
        return {"hidden": inference.at_head(model, batch, places, lambda hidden: hidden).to(kind)}
    logits = inference.response_logits(model, batch, places)[:, :spec["vocabulary"]].float()
    if spec["form"] == "full":
        return {"logits": logits.to(kind)}
    log_p = torch.log_softmax(logits / spec["temperature"], -1)
    if spec["form"] == "sampled":
        ids = torch.multinomial(log_p.exp().cpu(), spec["k"], replacement=True, generator=generator)
        return {"ids": ids.to(small), "entropy": -(log_p.exp() * log_p).nan_to_num().sum(-1)}
    top, ids = log_p.topk(spec["k"])
    return {"ids": ids.to(small), "log_probs": top.to(kind), "log_tail": log_p.scatter(1, ids, -math.inf).logsumexp(-1)}


class Cached:
    """A cache that :func:`write_cache` made, memory-mapped. ValueError as it opens if unfinished, damaged, or not of ``teacher``."""

    def __init__(self, folder: str | Path, teacher=None):
        self.folder, self.spec, self.head = Path(folder), _read_spec(Path(folder)), None
        if teacher is not None and weights_hash(teacher) != self.spec["teacher"]:
            raise ValueError(f"The cache in {folder} was made by another teacher; write one of this teacher in a new folder.")
        if not (done := self.folder / "complete.json").is_file():
            raise ValueError(f"The cache in {folder} is unfinished; write it again and it goes on where it stopped.")
        if self.spec["form"] == "hidden":
            self.head = load_file(store.check_files(self.folder / "head") / "head.safetensors")
        store.check_files(self.folder / "vocabulary")
        self.shards, self.place, k = [], {}, self.spec.get("k")
        self.widths = {"logits": self.spec["vocabulary"], "hidden": self.spec.get("width"), "ids": k, "log_probs": k, "entropy": 1, "log_tail": 1}
        if (complete := json.loads(done.read_text())).get("spec") != store.digest(self.spec):
            raise ValueError(f"The cache in {folder} was changed after it was written (spec.json); write it anew in a new folder.")
        folders = (store.check_files(self.folder / f"shard-{i:05d}") for i in range(complete["shards"]))
        for number, batch in enumerate(b for folder in folders for b in load_from_disk(folder).data.to_batches()):
            columns = dict(zip(batch.schema.names, batch.columns))  # as they lie in the file, which is in pieces if large, not a copy
            arrays = {n: (c.offsets.to_numpy(), c.values.to_numpy()) for n, c in columns.items() if n in self.widths}
            rows = zip(columns["key"].to_pylist(), columns["tokens"].to_pylist())
            self.place |= {key: (number, i, tokens) for i, (key, tokens) in enumerate(rows)}
            self.shards.append(arrays)
        self.bytes_per_token = sum(self.widths[n] * values.itemsize for arrays in self.shards[:1] for n, (_, values) in arrays.items())

    def prepare(self, student, tokenizer, dataset, objective: Objective, device) -> int:
        """Check the cache against everything it depends on and return its vocabulary. Raises ValueError with the reason."""
        spec, where = self.spec, f"the cache in {self.folder}"
        template, tokens = _identity(tokenizer)["template"], json.loads((self.folder / "vocabulary" / "vocabulary.json").read_text("utf-8"))
        width = student.get_output_embeddings().weight.shape[0]
        size = models.common_vocabulary(tokenizer, SimpleNamespace(get_vocab=lambda: tokens), width, spec["vocabulary"])
        if template != spec["template"]:
            raise ValueError(f"T{where[1:]} was made with another template; write it anew.")
        if spec["form"] not in EXACT and objective.temperature != spec["temperature"]:
            raise ValueError(f"temperature={objective.temperature} but {where} has {spec['temperature']}; allowed: that, or an exact cache.")
        check_cache(spec["vocabulary"], objective.divergence, **{k: spec[k] for k in ("form", "k") if k in spec})
        for row in dataset:
            found = self.place.get(example_key(row.get("id")))
            if found is None or found[2] != store.digest([row["input_ids"], row["labels"]]):
                what = "has no" if found is None else "holds other tokens for"
                raise ValueError(f"T{where[1:]} {what} example {row.get('id')!r}; write it anew for these data.")
        self.head = self.head and {n: v.to(device) for n, v in self.head.items()}
        return size

    def targets(self, inputs: dict, places: torch.Tensor) -> Sparse | Hidden | torch.Tensor:
        """The rows of a batch that names its examples (``example``, as the collator does)."""
        if "example" not in inputs:
            raise ValueError("A cached teacher needs batches that name their examples; allowed: kdlib.data.Collator.")
        found, device = [self.place[key] for key in inputs["example"].tolist()], places.device

        def column(name):
            parts = [(self.shards[shard][name], row) for shard, row, _ in found]
            flat = np.concatenate([values[offsets[row]:offsets[row + 1]] for (offsets, values), row in parts])
            held = torch.from_numpy(flat).view(-1, self.widths[name])
            return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)  # the first is not waited for

        if self.spec["form"] == "full":
            return column("logits")
        if self.spec["form"] == "hidden":
            head = Head(self.head["weight"], self.head.get("bias"), **self.spec["linear"])
            return Hidden(column("hidden").to(head.weight.dtype), head)
        ids = column("ids").long()
        if self.spec["form"] == "top_k":
            return Sparse(ids, column("log_probs").float(), column("log_tail")[:, 0])
        log_k = math.log(self.spec["k"])
        alike = torch.full(ids.shape, -log_k, device=device)
        return Sparse(ids, alike, torch.full_like(alike[:, 0], -math.inf), log_k - column("entropy")[:, 0])
