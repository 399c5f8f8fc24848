"""Three steps of distillation, to be launched by torchrun: ``two_processes.py FILE`` writes the weights from rank 0."""

import os
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from kdlib import data, lab, models
from kdlib.losses import Objective
from kdlib.teachers import Live
from kdlib.trainer import DistillationTrainer

torch.set_num_threads(1)
tokenizer = models.build_tokenizer(lab.vocabulary())
rows = data.render(lab.World(3).mixture("train", "seen", 48), tokenizer, 64)[0].to_list()
rows.sort(key=lambda r: len(r["labels"]))  # answers of one process are longer than those of the other
student, teacher = models.build_model("nano", tokenizer, seed=1), models.build_model("micro", tokenizer, seed=2)


def weights():
    return {k: v.clone().contiguous() for k, v in student.state_dict().items() if k != "lm_head.weight"}


with tempfile.TemporaryDirectory() as folder:
    processes = int(os.environ["WORLD_SIZE"])
    args = TrainingArguments(folder, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=3, optim="sgd",
                             learning_rate=0.1, max_grad_norm=0.0, per_device_train_batch_size=8 // processes,
                             gradient_accumulation_steps=2, train_sampling_strategy="sequential", remove_unused_columns=False)
    trainer = DistillationTrainer(model=student, args=args, processing_class=tokenizer, data_collator=data.Collator(0),
                                  train_dataset=rows, teacher=Live(teacher), objective=Objective(0.7))
    if args.process_index == 0:
        save_file(weights(), sys.argv[1] + ".start")
    trainer.train()
    if args.process_index == 0:
        save_file(weights(), sys.argv[1])
