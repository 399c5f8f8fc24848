"""One process, one form of cache: ``python tests/bench/cache.py FORM`` prints bytes per token, rates, and the error it brings.

The teacher and the student are the smoke preset's, trained on the lab world in ``FOLDER`` (made there if missing), so that the
distributions are those of real models. Write rates include the teacher's forward pass; read rates are of shuffled batches.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.utils import send_to_device

from kdlib import data, inference, models, stages, store, study, teachers
from kdlib.losses import Hidden, Objective, distillation_loss
from kdlib.presets import PRESETS

FORMS = {
    "full float32": {"form": "full", "dtype": "float32"}, "full float16": {"form": "full"},
    "hidden float32": {"form": "hidden", "dtype": "float32"}, "hidden float16": {"form": "hidden"},
    "top 16, bucket": {"form": "top_k", "k": 16}, "sampled 16": {"form": "sampled", "k": 16}}


def batches_of(rows, size=32):
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return [data.Collator(0)([rows[i] for i in order[start:start + size]]) for start in range(0, len(rows), size)]


def gradient(student, source, batches):
    """``(loss, gradient of the student's weights)`` of all ``batches`` together, and response tokens."""
    student.zero_grad()
    total = count = 0
    for batch in batches:
        places, targets = inference.response_rows(batch)
        loss = distillation_loss(inference.response_logits(student, batch, places), targets, source.targets(batch, places), num_items=1)
        loss.backward()
        total, count = total + loss.item(), count + len(targets)
    return total / count, torch.cat([p.grad.flatten() for p in student.parameters()]) / count, count


def main(name: str, folder: str, most: int | None = None) -> dict:
    torch.set_num_threads(2)
    root, (base, tuned) = store.open_folder(folder), (study.model_spec(PRESETS["smoke"], n, 0) for n in ("student", "base"))
    rows, *_ = stages.read_rows(root, [{"set": "train"}], stages.data_of(base))
    rows = rows[:most]
    (student, tokenizer), (teacher, _) = (models.load(stages.make(root, spec)) for spec in (base, tuned))
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        made = teachers.write_cache(place + "/cache", teacher, tokenizer, rows, **FORMS[name])
        written = time.perf_counter() - began
        size = sum(p.stat().st_size for p in Path(made).rglob("*") if p.is_file())
        cached, live = teachers.Cached(made), teachers.Live(teacher, tokenizer)
        for source in (cached, live):
            source.prepare(student, tokenizer, rows, Objective(), student.device)
        batches = [send_to_device(b, student.device) for b in batches_of(rows)]
        where = [inference.response_rows(b)[0] for b in batches]
        began = time.perf_counter()
        for batch, places in zip(batches, where):
            found = cached.targets(batch, places)
            found = found.logits if isinstance(found, Hidden) else found
        read = time.perf_counter() - began
        exact, wanted, tokens = gradient(student, live, batches)
        loss, got, _ = gradient(student, cached, batches)
    return {"form": name, "tokens": tokens, "vocabulary": len(tokenizer), "bytes_per_token": cached.bytes_per_token,
            "bytes_on_disk_per_token": size / tokens, "written_tokens_per_s": tokens / written, "read_tokens_per_s": tokens / read,
            "loss": loss, "loss_of_live_teacher": exact, "relative_error_of_gradient": float((got - wanted).norm() / wanted.norm())}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3])))
