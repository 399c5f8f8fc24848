"""DistillationTrainer: ``transformers.Trainer`` with a teacher; supervised fine-tuning is ``alpha=0``."""

import json
import math
import os
import random
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from unittest.mock import patch  # an attribute for a while, and then what was there

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from kdlib import inference
from kdlib.data import IGNORE, Collator, Rows, stretches
from kdlib.losses import Head, Objective, distillation_loss, linear_distillation_loss
from kdlib.presets import check
from kdlib.teachers import Live

FIXED = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "gradient_accumulation_steps", "seed", "train_sampling_strategy",
         "remove_unused_columns", "num_train_epochs", "eval_strategy", "label_smoothing_factor", "save_strategy")  # of TrainingArguments, which train sets


def _collate(collator, rows: list) -> dict:
    return inference.placed(collator(rows))


class DistillationTrainer(Trainer):
    """Trainer for (1−α)·CE + α·T²·D(teacher, student) over response tokens.

    Takes what ``transformers.Trainer`` takes, and ``teacher``, targets of :mod:`kdlib.teachers`, with an :class:`~kdlib.losses.Objective`.
    On-policy distillation (Agarwal et al. 2024, arXiv 2306.13649): a share ``lmbda`` of the batches takes the student's own samples for
    answers, of at most ``max_new_tokens``, and a live teacher's word on them. Losses are means over the response tokens of the whole
    optimizer step, on all devices. Batches are by default :class:`~kdlib.data.Collator`'s, packed where the model keeps rows apart. The model's
    attention and RMS norms are torch's from then on, where those say the same.
    ValueError before training on what does not fit.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, teacher=None, objective: Objective | None = None, lmbda: float = 0.0, max_new_tokens: int = 128,
                 chunk_size: int | None = None, **kwargs):
        if teacher is not None and not hasattr(teacher, "prepare"):
            raise ValueError(f"teacher is a {type(teacher).__name__}; allowed: kdlib.teachers.Live(model, tokenizer), or Cached(folder).")
        objective = (objective or Objective(alpha=float(teacher is not None))).with_teacher(teacher)
        if not 0 <= lmbda <= 1 or (lmbda and (objective.alpha < 1 or not isinstance(teacher, Live))):
            raise ValueError(f"lmbda={lmbda!r} is not allowed; allowed: 0 to 1, and above 0 only with alpha=1 and a live teacher, "
                             "because nobody else can judge the student's own answers.")
        check("chunk_size", 1 if chunk_size is None else chunk_size, int, "None or a whole number from 1", lambda v: v >= 1)
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor or self.compute_loss_func or self.args.n_gpu > 1:
            raise ValueError(f"label_smoothing_factor={self.args.label_smoothing_factor}, compute_loss_func={self.compute_loss_func} and "
                             f"n_gpu={self.args.n_gpu} do not go with this loss; allowed: 0, None, and one device a process (torchrun).")
        if type(self.data_collator) is DataCollatorWithPadding:  # the Trainer's default, which pads no labels
            self.data_collator = Collator(self.processing_class.pad_token_id, pack=True)
        readers = [self.model, *([teacher.model] if isinstance(teacher, Live) and objective.alpha > 0 else [])]
        if getattr(self.data_collator, "pack", False) and (  # the first two take batches apart row by row
                lmbda or self.compute_metrics or not all(map(inference.keeps_rows_apart, readers))):
            self.data_collator = replace(self.data_collator, pack=False)
        inference.fuse_norms(self.model)
        self.model_accepts_loss_kwargs = True  # whatever the model, the step's response tokens are counted
        self.lmbda, self.max_new_tokens = lmbda, max_new_tokens
        self.objective, self.chunk_size, self.teacher = objective, chunk_size, teacher if objective.alpha > 0 else None
        self.linear, self.vocabulary = inference.linear_head(self.model), None
        if self.teacher is not None:
            self.args.remove_unused_columns &= isinstance(teacher, Live)  # others need the ids of the examples
            held = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            rows = chain.from_iterable(d.once() if isinstance(d, Rows) else d or () for d in (self.train_dataset, *held))
            self.vocabulary = self.teacher.prepare(self.model, self.processing_class, rows, objective, self.args.device)

    def _get_dataloader(self, dataset, *args, **kwargs):
        cut = self.accelerator.dispatch_batches or isinstance(dataset, IterableDataset)  # by rows, for several processes
        collate = self.data_collator if cut and self.accelerator.num_processes > 1 else partial(_collate, self.data_collator)
        with patch.object(self, "data_collator", collate):
            return super()._get_dataloader(dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, some with the student's own answers, and their response tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.lmbda == 0:
            return batches, count
        draw = random.Random(f"on-policy {self.args.seed} {self.state.global_step}")  # the same on every device and after a resume
        batches = [self.own_answers(b) if draw.random() < self.lmbda else b for b in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def own_answers(self, batch: dict) -> dict:
        """``batch`` with the last answer of each row replaced by a sample of the student's; nothing after its end token."""
        if "position_ids" in batch:
            raise ValueError("On-policy distillation needs one conversation a row; allowed: a collator that does not pack.")
        model, tokenizer, prompts = self.accelerator.unwrap_model(self.model), self.processing_class, []
        for ids, labels, seen in zip(*(batch[k].tolist() for k in ("input_ids", "labels", "attention_mask"))):
            start = next((start for start, _ in reversed(stretches(labels)) if labels[start] != IGNORE), len(ids))
            prompts.append([t for t, real in zip(ids[:start], seen) if real])
        model.eval()
        answers = inference.generate(model, prompts, max_new_tokens=self.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                                     eos_token_id=tokenizer.eos_token_id, temperature=1.0, vocabulary=self.vocabulary)
        model.train()
        rows = [{"input_ids": p + a, "labels": [IGNORE] * len(p) + a} for p, a in zip(prompts, answers)]
        return send_to_device(inference.placed(Collator(tokenizer.pad_token_id)(rows)), batch["input_ids"].device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch as its share of the optimizer step's mean over response tokens."""
        places, targets = inference.response_rows(inputs)
        teacher = self.teacher.targets(inputs, places) if self.teacher is not None else None
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        how = {"num_items": count, "vocabulary": self.vocabulary, **vars(self.objective)}
        bare = model if model is self.model else self.accelerator.unwrap_model(model)
        if return_outputs:  # whole, which metrics expect
            logits = model(**inference.taken(inputs)).logits
            wider = inputs["labels"].shape[1] - logits.shape[1]
            return distillation_loss(inference.at(logits, places), targets, teacher, **how), {"logits": F.pad(logits, (0, 0, 0, wider))}
        if self.linear is None:
            loss = distillation_loss(inference.response_logits(bare, inputs, places, model), targets, teacher, **how)
        else:
            module = bare.get_output_embeddings()
            loss = inference.at_head(bare, inputs, places, lambda hidden: linear_distillation_loss(
                hidden, Head(module.weight, module.bias, **self.linear), targets, teacher, chunk_size=self.chunk_size, **how), model)
        return loss * (self.accelerator.num_processes if self.args.average_tokens_across_devices and num_items_in_batch is not None else 1)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The response tokens of an optimizer step on all devices, those that :meth:`compute_loss` finds."""
        count = sum(len(inference.response_rows(batch)[1]) for batch in batch_samples)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            return int(self.accelerator.gather(torch.tensor(count, device=device)).sum())
        return count

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One batch of an evaluation; the loss alone where nobody asks for logits, so that they are never held whole."""
        if not prediction_loss_only and "position_ids" in inputs:
            raise ValueError("Predictions need one conversation a row; allowed: a collator that does not pack.")
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, out = (self.compute_loss(model, inputs), {}) if prediction_loss_only else self.compute_loss(model, inputs, True)
        count = len(inference.response_rows(inputs)[1])
        self.tally += torch.stack([loss * count, torch.full_like(loss, count)]).double()
        return loss, out.get("logits"), inputs["labels"] if out else None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's, but its loss is a mean over response tokens. Rows that several devices repeat, to have as many, count again."""
        self.tally = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        out = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self.tally).tolist()
        out.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return out


def peft():
    """The package that ``lora`` needs. ValueError with its install line if it is missing."""
    try:
        import peft
        return peft
    except ImportError as error:
        raise ValueError("lora needs the package peft; pip install 'kdlib[lora]', or train all weights.") from error


def check_training(batch_size: int, ranks: int = 0, model=None, /, warmup: float = 0.05, micro_batch: int | None = None, lora: dict | None = None, **arguments) -> tuple:
    """Processes, parts of a batch on each, and the adapters' configuration, of settings as :func:`train` takes them. ValueError if it would not,
    of ``model`` or of ``ranks`` processes, if told.
    """
    ranks, known = ranks or int(os.environ.get("WORLD_SIZE", 1)), {f.name for f in fields(TrainingArguments)}
    for odd, why in ((arguments.keys() & {*FIXED}, "the call itself sets"), (arguments.keys() - known, "nobody knows")):
        if odd:
            raise ValueError(f"training has {', '.join(sorted(odd))}, which {why}; allowed: warmup, micro_batch, lora, or what else TrainingArguments takes.")
    for name, kinds, value in (("lr_scheduler_type", SchedulerType, "linear"), ("optim", OptimizerNames, "adamw_torch")):
        check(name, arguments.get(name, value), str, ", ".join(found := [kind.value for kind in kinds]), found.__contains__)
    check("warmup", warmup, float, "a share of the steps, from 0 to 1", lambda v: 0 <= v <= 1)
    for name, value in (("micro_batch", micro_batch or batch_size), ("save_steps", arguments.get("save_steps", 1))):
        check(name, value, int, "a whole number from 1", lambda v: v >= 1)
    parts = math.ceil(batch_size / ranks / (micro_batch or batch_size))
    if batch_size % (ranks * parts):
        raise ValueError(f"batch_size={batch_size} does not split over {ranks} processes into {parts} equal parts; allowed: a multiple of both.")
    try:
        adapters = None if lora is None else peft().LoraConfig(task_type="CAUSAL_LM", **lora)
        if adapters and model is not None:
            peft().get_peft_model(model, adapters).unload()
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={lora!r} is not allowed ({str(error).splitlines()[0]}); allowed: settings of peft.LoraConfig that fit the model.") from error
    return ranks, parts, adapters


class _LogsAsItSaves(TrainerCallback):
    """A checkpoint's state knows the losses of all steps before it."""

    def on_step_end(self, args, state, control, **_):
        control.should_log |= control.should_save


def _checkpoint(folder: str | Path) -> Path | None:
    """The last checkpoint in ``folder`` that is whole, its state having been written last."""
    for state in sorted(Path(folder).glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime, reverse=True):
        with suppress(ValueError):
            json.loads(state.read_text(encoding="utf-8"))
            return state.parent
    return None


def train(model, tokenizer, rows: list[dict], *, steps: int, batch_size: int, learning_rate: float, seed: int, output_dir: str | Path,
          teacher=None, objective: Objective | None = None, warmup: float = 0.05, micro_batch: int | None = None, lora: dict | None = None,
          save_to: str | Path | None = None, **arguments) -> dict:
    """Train ``model`` in place on ``rows`` in the order given, ``batch_size`` a step, and return the final log. ``rows`` holds ``steps *
    batch_size`` dicts with ``input_ids``, ``labels`` and, for a cached teacher, ``id``. AdamW; linear warm-up over the share ``warmup`` of
    the steps, then linear decay to zero. A loss that is not finite is logged as it is. A device takes at most ``micro_batch`` rows at once.
    ``lora`` (of ``peft.LoraConfig``) trains adapters, which are merged at the end. ``save_to`` is where the model goes, whole. Further
    ``arguments`` go to ``TrainingArguments``: with ``save_steps`` among them and fewer than ``steps``, ``output_dir`` has a checkpoint after every
    so many steps and after the last, from which the same call goes on.
    """
    ranks, parts, adapters = check_training(batch_size, warmup=warmup, micro_batch=micro_batch, lora=lora, **arguments)
    whole = model
    if adapters is not None:
        set_seed(seed)  # adapters are drawn here
        model = peft().get_peft_model(model, adapters)
    there = torch.accelerator.is_available()
    usual = {"lr_scheduler_type": "linear", "warmup_steps": round(warmup * steps), "weight_decay": 0.0, "report_to": [], "logging_strategy": "no",
             "disable_tqdm": True, "use_cpu": not there, "dataloader_pin_memory": there, "accelerator_config": {"non_blocking": torch.cuda.is_available()},
             "logging_nan_inf_filter": False}  # which would wait for the device at every step, and hide that a loss diverged
    if saves := arguments.get("save_steps", steps) < steps:
        usual["save_total_limit"] = 1
    fixed = (str(output_dir), steps, batch_size // ranks // parts, learning_rate, parts, seed, "sequential", False, 1, "no", 0, "steps" if saves else "no")
    args = TrainingArguments(**dict(zip(FIXED, fixed)), **{**usual, **arguments})
    if args.n_gpu > 1:  # one device a process: KDLIB_LAUNCH starts more processes
        args._n_gpu = 1
    trainer = DistillationTrainer(model=model, args=args, train_dataset=rows, data_collator=Collator(tokenizer.pad_token_id, pack=True),
                                  processing_class=tokenizer, teacher=teacher, objective=objective, callbacks=[_LogsAsItSaves()])
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.train(_checkpoint(output_dir) if saves else None).metrics
    if saves:  # the Trainer's own is of the steps since it went on
        losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
        metrics["train_loss"] = sum(loss * (step - before) for (step, loss), (before, _) in zip(losses, [(0, 0), *losses])) / steps
    if ranks > 1:  # each knows its own rows' loss
        metrics["train_loss"] = float(trainer.accelerator.reduce(torch.tensor(metrics["train_loss"], device=args.device), "mean"))
    if lora is not None:
        model.merge_and_unload()  # into the very modules of the model given
    if save_to is not None:
        trainer.model, trainer.model_wrapped = (whole, whole) if lora is not None else (trainer.model, trainer.model_wrapped)
        trainer.save_model(str(save_to))
    whole.eval()
    return metrics
