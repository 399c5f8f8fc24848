"""Distillation in processes that torchrun or accelerate starts: ``two_processes.py FOLDER MODE…``, a file in ``FOLDER`` a mode.

``trained`` writes the weights after three steps, ``own`` the same on the answers of a student that is sure of its words, so that
samples are the same everywhere, ``sharded`` the gradient of one batch with a student in FSDP2 shards. ``MODE-start`` holds the first weights.
"""

import os
import sys
import tempfile

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from kdlib import data, lab, models
from kdlib.losses import Objective
from kdlib.teachers import Live
from kdlib.trainer import DistillationTrainer

torch.set_num_threads(1)
tokenizer = models.build_tokenizer(lab.vocabulary())
rows = data.render(lab.World(3).mixture("train", "seen", 48), tokenizer, 64)[0].to_list()
rows.sort(key=lambda r: len(r["labels"]))  # answers of one process are longer than those of the other
size = 8 // int(os.environ["WORLD_SIZE"])


def save(tensors, file):
    whole = {k: getattr(v, "full_tensor", lambda v=v: v)().clone() for k, v in tensors if k != "lm_head.weight"}
    if os.environ["RANK"] == "0":
        save_file(whole, file)


def run(mode, folder, scratch):
    own = mode == "own"
    student, teacher = models.build_model("nano", tokenizer, seed=1), models.build_model("micro", tokenizer, seed=2)
    args = TrainingArguments(scratch, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=3, optim="sgd",
                             learning_rate=1e-7 if own else 0.1, max_grad_norm=0.0, per_device_train_batch_size=size,
                             gradient_accumulation_steps=2, train_sampling_strategy="sequential", remove_unused_columns=False)
    if own:
        student.model.norm.weight.data *= 1e4
    trainer = DistillationTrainer(model=student, args=args, processing_class=tokenizer, data_collator=data.Collator(0),
                                  train_dataset=rows, teacher=Live(teacher, tokenizer), objective=Objective(1.0 if own else 0.7),
                                  lmbda=float(own), max_new_tokens=6)
    if mode != "sharded":
        save(student.state_dict().items(), f"{folder}/{mode}-start")
        trainer.train()
        return save(student.state_dict().items(), f"{folder}/{mode}")
    if size < 8:
        for part in (*student.model.layers, student):
            fully_shard(part)
    count = torch.tensor(sum(t != data.IGNORE for r in rows[:8] for t in r["labels"]))
    mine = rows[args.process_index * size:][:size]
    trainer.compute_loss(student, data.Collator(0)(mine), num_items_in_batch=count).backward()
    save(((k, p.grad) for k, p in student.named_parameters()), f"{folder}/{mode}")


for mode in sys.argv[2:]:
    with tempfile.TemporaryDirectory() as scratch:
        run(mode, sys.argv[1], scratch)
