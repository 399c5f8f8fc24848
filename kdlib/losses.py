"""Divergences and the distillation loss on response rows, from logits or, in chunks of rows, from hidden states.

Rows are response positions: ``logits`` has shape (N, V), one row for each token that the student has to predict. Nothing
here averages. Sums over rows are divided by the global number of response tokens, so that splitting a batch over
micro-batches or devices never changes the gradient.

Every loss here is a function of the student's probabilities q. With h = q · ∂D/∂q, its gradient with respect to logits taken
at temperature T is (h − q · Σh) / T; that one rule serves all kinds, with the teacher's whole distribution or a part of it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
CHUNK_ELEMENTS = 2**22  # logits held at once by default


@dataclass(frozen=True)
class Objective:
    """(1−α)·CE + α·T²·D(teacher, student) of a row, in nats.

    ``alpha`` is the teacher's weight and ``temperature`` T divides both models' logits in D (Hinton et al. 2015, arXiv
    1503.02531: T² keeps the soft gradient's size). With p the teacher and q the student, ``kind`` of D is

    ================== ===============================================================================================
    forward_kl         KL(p ‖ q)
    reverse_kl         KL(q ‖ p)
    jsd                β·KL(p ‖ m) + (1−β)·KL(q ‖ m), m = β·p + (1−β)·q; ``beta`` 0 is forward and 1 reverse KL, as in GKD
                       (Agarwal et al. 2024, arXiv 2306.13649)
    skew_forward_kl    KL(p ‖ λ·p + (1−λ)·q), λ = ``skew`` (Ko et al. 2024, arXiv 2402.03898)
    skew_reverse_kl    KL(q ‖ λ·q + (1−λ)·p)
    total_variation    ½·Σ|p − q|
    ================== ===============================================================================================

    Raises ValueError on an unknown kind or a number out of range.
    """

    alpha: float = 1.0
    kind: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r} must lie between 0 (supervised fine-tuning) and 1 (the teacher alone).")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0 and finite.")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not a divergence; allowed: {', '.join(KINDS)}.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta!r} must lie between 0 (forward KL) and 1 (reverse KL).")
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew={self.skew!r} must lie between 0 and 1, 1 excluded.")


class Sparse(NamedTuple):
    """A teacher known on some tokens of each row: ``ids`` and ``log_probs`` (N, K), at the objective's temperature.

    ``log_tail`` (N,) is the log of the mass outside ``ids``, which the divergence compares as one bucket; −inf where
    ``log_probs`` sum to one. ``offset`` (N,), if given, is added to each row's value: it holds no gradient.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    offset: torch.Tensor | None = None

    def __getitem__(self, rows):
        return Sparse(*(None if part is None else part[rows] for part in tuple(self)))


class Head(NamedTuple):
    """From hidden states to logits: softcap·tanh(scale·(h·Wᵀ + b) / softcap), or without the cap if it is None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) of ``hidden`` (N, H), in float32 at least."""
        out = _wide(F.linear(hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype)))
        if self.scale != 1:
            out = out * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap

    def narrow(self, vocabulary: int) -> "Head":
        """The head of the first ``vocabulary`` tokens."""
        return self._replace(weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary])


class Hidden(NamedTuple):
    """A teacher as the hidden states (N, H) that its ``head`` turns into logits."""

    states: torch.Tensor
    head: Head


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "forward_kl", *, beta: float = 0.5,
               skew: float = 0.1, temperature: float = 1.0) -> torch.Tensor:
    """D(teacher, student) of each row, shape (N,), in nats (total variation: between 0 and 1); zero for equal inputs.

    Both inputs have shape (N, V); −inf marks a token that cannot come. The kinds are those of :class:`Objective`. No T² here.
    The gradient flows to the student only. Raises ValueError if shapes differ or a setting is not allowed.
    """
    objective = Objective(1.0, kind, beta, skew, temperature)
    _check_shapes(student_logits, teacher_logits)
    return _Rows.apply(student_logits, lambda z, slope: _dense(z, teacher_logits, objective, slope))


def distillation_loss(student_logits: torch.Tensor, targets: torch.Tensor, teacher: "torch.Tensor | Sparse | Hidden | None" = None, *,
                      num_items: int | torch.Tensor, vocabulary: int | None = None, **settings) -> torch.Tensor:
    """The sum over rows of (1−α)·CE + α·T²·D, divided by ``num_items``; a scalar in nats per token.

    ``student_logits`` (N, V); ``targets`` (N,) token ids; ``teacher`` its logits (N, V), :class:`Sparse` or :class:`Hidden` targets;
    ``num_items`` the response tokens of the whole optimizer step; ``settings`` those of :class:`Objective`. Columns from
    ``vocabulary`` on are padding, in the loss as if their logits were −inf. No rows: loss and gradient are zero. Raises
    ValueError if a teacher is missing or shapes differ.
    """
    objective = Objective(**settings)
    _check_teacher(objective, teacher)
    logits = student_logits[:, :vocabulary]
    if isinstance(teacher, Hidden):
        teacher = teacher.head.logits(teacher.states)
    if isinstance(teacher, torch.Tensor):
        teacher = teacher[:, :vocabulary]
        _check_shapes(logits, teacher)
    losses = _Rows.apply(logits, lambda z, slope: _mixed(z, targets, teacher, objective, slope))
    return losses.sum() / _count(num_items, losses)


def linear_distillation_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor, teacher=None, *,
                             num_items: int | torch.Tensor, vocabulary: int | None = None, chunk_size: int | None = None,
                             **settings) -> torch.Tensor:
    """:func:`distillation_loss` from hidden states (N, H) and a :class:`Head`, never holding more than ``chunk_size`` rows of logits.

    Value and gradients (of hidden states, weight and bias) are those of the plain form. ``teacher`` is :class:`Hidden`,
    :class:`Sparse` or logits. Gradients are made in the forward pass, the weight's in place, so memory grows with the chunk
    and not with N × V. By default a chunk has about four million logits.
    """
    objective = Objective(**settings)
    _check_teacher(objective, teacher)
    if vocabulary:
        head = head.narrow(vocabulary)
        if isinstance(teacher, Hidden):
            teacher = teacher._replace(head=teacher.head.narrow(vocabulary))
        elif isinstance(teacher, torch.Tensor):
            teacher = teacher[:, :vocabulary]
    width = teacher.head.weight.shape[0] if isinstance(teacher, Hidden) else getattr(teacher, "shape", (0, 0))[-1]
    if width and width != head.weight.shape[0]:
        raise ValueError(f"The student's head has {head.weight.shape[0]} tokens and the teacher's {width}; give the common vocabulary.")
    chunk = chunk_size or max(1, CHUNK_ELEMENTS // head.weight.shape[0])
    total = _Chunked.apply(hidden, head.weight, head.bias, head, targets, teacher, objective, chunk)
    return total / _count(num_items, total)


def _count(num_items, like):
    return torch.as_tensor(num_items, device=like.device).clamp(min=1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_shapes(student_logits, teacher_logits) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} "
                         "differ in shape; both must be (rows, vocabulary) over the same vocabulary.")


def _check_teacher(objective: Objective, teacher) -> None:
    if objective.alpha > 0 and teacher is None:
        raise ValueError(f"alpha={objective.alpha} asks for distillation, but there is no teacher; give one or alpha=0.")


def _terms(log_q, log_p, kind: str, beta: float, skew: float):
    """``(D of each row, h = q · ∂D/∂q)`` from log-probabilities (N, C); where a probability is zero it adds nothing."""
    q, p = log_q.exp(), log_p.exp()

    def mean_log_ratio(weight, ratio):
        return (weight * ratio.masked_fill_(weight == 0, 0)).sum(-1)

    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return mean_log_ratio(p, log_p - log_q), -p
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        h = q * (log_q - log_p).masked_fill_(q == 0, 0)
        return h.sum(-1), h
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2, q * (q - p).sign() / 2
    share = {"jsd": beta, "skew_forward_kl": skew, "skew_reverse_kl": 1 - skew}[kind]
    mix = share * p + (1 - share) * q
    log_mix = mix.log()
    if kind == "skew_forward_kl":
        return mean_log_ratio(p, log_p - log_mix), -(1 - skew) * (p * q / mix).masked_fill_(mix == 0, 0)
    h = q * (log_q - log_mix).masked_fill_(q == 0, 0)
    if kind == "skew_reverse_kl":
        return h.sum(-1), h - skew * (q * q / mix).masked_fill_(mix == 0, 0)
    return beta * mean_log_ratio(p, log_p - log_mix) + (1 - beta) * h.sum(-1), (1 - beta) * h


def _dense(z, teacher_logits, o: Objective, want_slope: bool):
    """Divergence of each row and, if wanted, its gradient with respect to ``z`` (N, V)."""
    log_q = F.log_softmax(z / o.temperature if o.temperature != 1 else z, -1)
    log_p = F.log_softmax(_wide(teacher_logits) / o.temperature, -1)
    value, h = _terms(log_q, log_p, o.kind, o.beta, o.skew)
    if not want_slope:
        return value, None
    total = h.sum(-1, keepdim=True)
    return value, h.sub_(log_q.exp_().mul_(total)).div_(o.temperature)


def _sparse(z, teacher: Sparse, o: Objective, want_slope: bool):
    """As :func:`_dense`, over the teacher's tokens and one bucket for the rest."""
    log_q = F.log_softmax(z / o.temperature if o.temperature != 1 else z, -1)
    near = log_q.gather(1, teacher.ids)
    rest = (1 - near.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(near.dtype).tiny)
    log_p = torch.cat([_wide(teacher.log_probs).to(near.dtype), teacher.log_tail[:, None].to(near.dtype)], -1)
    value, h = _terms(torch.cat([near, rest.log()], -1), log_p, o.kind, o.beta, o.skew)
    if teacher.offset is not None:
        value = value + teacher.offset
    if not want_slope:
        return value, None
    per_rest = h[:, -1:] / rest
    slope = log_q.exp_().mul_(per_rest - h.sum(-1, keepdim=True))
    return value, slope.scatter_add_(1, teacher.ids, h[:, :-1] - near.exp() * per_rest).div_(o.temperature)


def _mixed(z, targets, teacher, o: Objective, want_slope: bool):
    """(1−α)·CE + α·T²·D of each row, and its gradient with respect to ``z``."""
    losses, slope = z.new_zeros(len(z)), None
    if o.alpha > 0:
        divergence_of = _sparse if isinstance(teacher, Sparse) else _dense
        value, slope = divergence_of(z, teacher, o, want_slope)
        weight = o.alpha * o.temperature**2
        losses = losses + weight * value
        if want_slope and weight != 1:
            slope.mul_(weight)
    if o.alpha < 1:
        log_q = F.log_softmax(z, -1)
        losses = losses - (1 - o.alpha) * log_q.gather(1, targets[:, None])[:, 0]
        if want_slope:
            hard = log_q.exp_().mul_(1 - o.alpha)
            hard.scatter_add_(1, targets[:, None], hard.new_full((len(z), 1), o.alpha - 1))
            slope = hard if slope is None else slope.add_(hard)
    return losses, slope


class _Rows(torch.autograd.Function):
    """Row losses with their gradient, from ``rows(z, want_slope) -> (losses, slope)``."""

    @staticmethod
    def forward(ctx, logits, rows):
        losses, slope = rows(_wide(logits), ctx.needs_input_grad[0])
        ctx.save_for_backward(slope)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx, grad):
        slope, = ctx.saved_tensors
        return (grad[:, None] * slope).to(ctx.dtype), None


class _Chunked(torch.autograd.Function):
    """The summed loss of all rows; every gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, teacher, objective, chunk):
        wanted = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight[:0]).dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(bias[:0]).dtype) if ctx.needs_input_grad[2] else None
        small = grad_weight is not None and grad_weight.dtype != hidden.dtype
        part = torch.empty_like(weight, dtype=hidden.dtype) if small else None
        near = weight.to(hidden.dtype)
        total = _wide(hidden[:0]).new_zeros(())
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = head.logits(hidden[rows])
            given = teacher
            if isinstance(teacher, Hidden):
                given = teacher.head.logits(teacher.states[rows])
            elif teacher is not None:
                given = teacher[rows]
            losses, slope = _mixed(z, targets[rows], given, objective, wanted)
            total += losses.sum()
            if not wanted:
                continue
            if head.softcap is not None:
                slope.mul_(1 - (z / head.softcap) ** 2)
            if head.scale != 1:
                slope.mul_(head.scale)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, near, out=grad_hidden[rows])
            if small:
                grad_weight += torch.mm(slope.T, hidden[rows], out=part)
            elif grad_weight is not None:
                grad_weight.addmm_(slope.T, hidden[rows])
        ctx.made = [(g, like.dtype) for g, like in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias)) if like is not None]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        made, ctx.made = ctx.made, None  # scaled in place, so they serve one backward pass
        if made is None:
            raise RuntimeError("The chunked loss can be differentiated once; compute it anew for another backward pass.")
        gradients = [None if g is None else g.mul_(grad).to(dtype) for g, dtype in made]
        return (*gradients, *[None] * (8 - len(gradients)))
