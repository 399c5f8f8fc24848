"""The distillation loss on response rows.

Rows are response positions: ``logits`` has shape (N, V), one row for each token that the student has to predict.
Nothing here averages. Sums over rows are divided by the global number of response tokens, so that splitting a batch
over micro-batches or devices never changes the gradient.
"""

import math

import torch
import torch.nn.functional as F


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher ‖ student) of each row at ``temperature``; shape (N,), in nats, zero for equal inputs.

    Both inputs have shape (N, V). Computed in float32 at least. Hinton et al. 2015 (arXiv 1503.02531), without their T²,
    which belongs to the mix with cross-entropy. Raises ValueError if shapes differ or ``temperature`` is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} "
                         "differ in shape; both must be (rows, vocabulary) over the same vocabulary.")
    check_temperature(temperature)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(teacher_logits.to(wide) / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.to(wide) / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def distillation_loss(student_logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None = None, *,
                      alpha: float, temperature: float = 1.0, num_items: int | torch.Tensor) -> torch.Tensor:
    """(1−α)·CE + α·T²·KL(teacher ‖ student), summed over rows and divided by ``num_items``; a scalar in nats per token.

    ``student_logits`` and ``teacher_logits``: (N, V); ``targets``: (N,) token ids; ``num_items``: response tokens of the
    whole optimizer step. T² stands in the value and so in the gradient (Hinton et al. 2015, section 2). With no rows the
    loss is zero and its gradient is zero. Raises ValueError if ``alpha`` is outside [0, 1] or a teacher is missing.
    """
    check_alpha(alpha)
    if alpha > 0 and teacher_logits is None:
        raise ValueError(f"alpha={alpha} asks for distillation, but there are no teacher logits; give a teacher or alpha=0.")
    total = student_logits.sum() * 0.0
    if len(targets):
        wide = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
        if alpha < 1:
            total = total + (1 - alpha) * F.cross_entropy(wide, targets, reduction="sum")
        if alpha > 0:
            total = total + alpha * temperature**2 * forward_kl(wide, teacher_logits, temperature).sum()
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha``, the weight of the teacher, lies in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must lie between 0 (supervised fine-tuning) and 1 (the teacher alone).")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be above 0 and finite.")
