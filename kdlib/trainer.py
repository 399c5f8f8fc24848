"""DistillationTrainer: ``transformers.Trainer`` with a teacher; supervised fine-tuning is ``alpha=0``."""

import contextlib
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from kdlib.data import IGNORE, Collator
from kdlib.losses import check_alpha, check_temperature, distillation_loss


@contextlib.contextmanager
def head_rows(model, mask: torch.Tensor):
    """Let only the hidden states of the positions in ``mask`` (B, L) through the LM head: logits become (N, V).

    The model's own forward runs as it is, so logit scale, soft-capping and any wrapper's hooks stay in force.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][mask], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def response_logits(model, inputs: dict, mask: torch.Tensor, unwrapped=None) -> torch.Tensor:
    """Logits (N, V) that predict the response tokens; ``mask`` (B, L) marks the positions that predict one."""
    with head_rows(unwrapped or model, mask):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits


def response_rows(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(mask, targets)``: positions (B, L) whose next token is a response token, and those tokens (N,)."""
    nxt = torch.full_like(labels, IGNORE)
    nxt[:, :-1] = labels[:, 1:]
    mask = nxt != IGNORE
    return mask, nxt[mask]


class DistillationTrainer(Trainer):
    """Trainer for (1−α)·CE + α·T²·KL(teacher ‖ student) over response tokens.

    Takes what ``transformers.Trainer`` takes, and ``teacher`` (a causal LM over the same vocabulary, frozen here),
    ``alpha`` and ``temperature``. The sum over response tokens is divided by their number in the whole optimizer step,
    over accumulation steps and devices. Raises ValueError before training on a bad α or temperature, a missing teacher,
    or vocabularies of different width.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, teacher=None, alpha: float = 0.0, temperature: float = 1.0, **kwargs):
        check_alpha(alpha)
        if alpha > 0 and teacher is None:
            raise ValueError(f"alpha={alpha} asks for distillation, but teacher is None; give a teacher or alpha=0.")
        check_temperature(temperature)
        super().__init__(*args, **kwargs)
        if alpha > 0:
            widths = [m.get_output_embeddings().weight.shape[0] for m in (self.model, teacher)]
            if widths[0] != widths[1]:
                raise ValueError(f"The student predicts {widths[0]} tokens and the teacher {widths[1]}; "
                                 "both need the same vocabulary.")
            teacher.requires_grad_(False).eval().to(self.args.device)
        self.teacher, self.alpha, self.temperature = teacher, alpha, temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch as its share of the optimizer step's mean over response tokens."""
        mask, targets = response_rows(inputs["labels"])
        logits = response_logits(model, inputs, mask, self.accelerator.unwrap_model(model))
        teacher_logits = None
        if self.alpha > 0:
            with torch.no_grad():
                teacher_logits = response_logits(self.teacher, inputs, mask)
        num_items = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = distillation_loss(logits, targets, teacher_logits, alpha=self.alpha, temperature=self.temperature,
                                 num_items=num_items)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss


def train(model, rows: list[dict], *, pad_token_id: int, steps: int, batch_size: int, learning_rate: float, seed: int,
          output_dir: str | Path, teacher=None, alpha: float = 0.0, temperature: float = 1.0, warmup: float = 0.05,
          weight_decay: float = 0.0, **arguments) -> dict:
    """Train ``model`` in place on ``rows`` in the order given, ``batch_size`` a step, and return the final log.

    ``rows`` holds ``steps * batch_size`` dicts with ``input_ids`` and ``labels``. Linear warm-up over the share
    ``warmup`` of the steps, then linear decay to zero; AdamW. Further ``arguments`` go to ``TrainingArguments``.
    """
    args = TrainingArguments(
        output_dir=str(output_dir), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        lr_scheduler_type="linear", warmup_steps=round(warmup * steps), weight_decay=weight_decay, seed=seed,
        train_sampling_strategy="sequential", remove_unused_columns=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=torch.accelerator.is_available(), **arguments)
    trainer = DistillationTrainer(model=model, args=args, train_dataset=rows, data_collator=Collator(pad_token_id),
                                  teacher=teacher, alpha=alpha, temperature=temperature)
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.train().metrics
    model.eval()
    return metrics
