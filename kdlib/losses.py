"""Divergences and the distillation loss on response rows, from logits or, in chunks of rows, from hidden states.

A row is a response token to predict. Sums over rows are divided by the step's number of them, however a batch is split.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kdlib.presets import KINDS, check

CHUNK_ELEMENTS = {"cpu": 3 * 2**21}  # logits held at once by default; elsewhere 2**27, since wide products are what keeps a GPU busy
BLOCK_ELEMENTS = {"cpu": 2**18}  # of them taken through all passes at once, which stay in a processor's cache; elsewhere all
torch.zeros(1).exp().log().tanh()  # MKL picks its code in a first call, which must not be that of several threads at once


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Objective:
    """(1−α)·CE + α·T²·D(teacher, student) of a row, in nats. Raises ValueError on a setting that is not allowed.

    ``alpha`` is the teacher's weight; ``temperature`` T divides both models' logits in D, and T² keeps the soft gradient's
    size (Hinton et al. 2015, arXiv 1503.02531). With p the teacher and q the student, ``kind`` of D is

    * ``forward_kl``: KL(p ‖ q); ``reverse_kl``: KL(q ‖ p); ``total_variation``: ½·Σ|p − q|
    * ``jsd``: β·KL(p ‖ m) + (1−β)·KL(q ‖ m), m = β·p + (1−β)·q; ``beta`` 0 is forward, 1 reverse KL (GKD: arXiv 2306.13649)
    * ``skew_forward_kl``: KL(p ‖ λ·p + (1−λ)·q); ``skew_reverse_kl``: KL(q ‖ λ·q + (1−λ)·p); λ is ``skew`` (arXiv 2402.03898)
    """

    alpha: float = 1.0
    kind: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        check("alpha", self.alpha, float, "0 (supervised fine-tuning) to 1 (the teacher alone)", lambda v: 0 <= v <= 1)
        check("temperature", self.temperature, float, "a number from 0.01 to 100", lambda v: 0.01 <= v <= 100)
        check("kind", self.kind, str, ", ".join(KINDS), lambda v: v in KINDS)
        check("beta", self.beta, float, "0 (forward KL) to 1 (reverse KL)", lambda v: 0 <= v <= 1)
        check("skew", self.skew, float, "0 to 1, 1 excluded", lambda v: 0 <= v < 1)

    def with_teacher(self, teacher) -> "Objective":
        """Itself. Raises ValueError if it asks for a teacher and there is none."""
        if self.alpha > 0 and teacher is None:
            raise ValueError(f"alpha={self.alpha} asks for distillation, but there is no teacher; give a teacher or alpha=0.")
        return self

    @property
    def divergence(self) -> str:
        """``kind``, with the ends of the generalised JSD and of the skewed kinds under their own names."""
        ends = {"jsd": {0: "forward_kl", 1: "reverse_kl"}, "skew_forward_kl": {0: "forward_kl"}, "skew_reverse_kl": {0: "reverse_kl"}}
        return ends.get(self.kind, {}).get(self.beta if self.kind == "jsd" else self.skew, self.kind)


class Sparse(NamedTuple):
    """A teacher known on some tokens of each row: ``ids`` and ``log_probs`` (N, K), at the objective's temperature. ``log_tail`` (N,) is the
    log of the mass outside ``ids``, one bucket, or −inf; ``offset`` (N,) is added to a row's value.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    offset: torch.Tensor | None = None


class Head(NamedTuple):
    """From hidden states to logits: softcap·tanh(scale·(h·Wᵀ + b) / softcap), or without the cap if it is None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def linear(self, hidden: torch.Tensor) -> torch.Tensor:
        """h·Wᵀ + b, in the dtype of ``hidden`` (N, H)."""
        return F.linear(hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype))

    def shape(self, linear: torch.Tensor) -> torch.Tensor:
        """Logits from what :meth:`linear` gave, in float32 at least."""
        out = _wide(linear) if self.scale == 1 else _wide(linear) * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap

    def narrow(self, vocabulary: int | None) -> "Head":
        """The head of the first ``vocabulary`` tokens (None: all)."""
        if vocabulary in (None, len(self.weight)):  # a slice of all would copy its gradient
            return self
        return self._replace(weight=self.weight[:vocabulary], bias=None if self.bias is None else self.bias[:vocabulary])


class Hidden(NamedTuple):
    """A teacher as the hidden states (N, H) that its ``head`` turns into logits."""

    states: torch.Tensor
    head: Head

    logits = property(lambda self: self.head.shape(self.head.linear(self.states)), doc="The teacher's logits (N, V).")


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "forward_kl", *, beta: float = 0.5,
               skew: float = 0.1, temperature: float = 1.0) -> torch.Tensor:
    """D(teacher, student) of each row, shape (N,), in nats (total variation: between 0 and 1); zero for equal inputs.

    Both inputs have shape (N, V); −inf marks a token that cannot come. The kinds are those of :class:`Objective`. No T² here, and
    no gradient to the teacher. Raises ValueError if shapes differ or a setting is not allowed.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ in shape.")
    return _divergence(_wide(student_logits), teacher_logits, Objective(1.0, kind, beta, skew, temperature))


def distillation_loss(student_logits: torch.Tensor, targets: torch.Tensor, teacher: "torch.Tensor | Sparse | Hidden | None" = None, *,
                      num_items: int | torch.Tensor, vocabulary: int | None = None, **settings) -> torch.Tensor:
    """The sum over rows of (1−α)·CE + α·T²·D, divided by ``num_items``; a scalar in nats per token. ``student_logits`` (N, V); ``targets``
    (N,) token ids; ``teacher`` its logits (N, V), :class:`Sparse` or :class:`Hidden`; ``num_items`` the response tokens of the whole
    optimizer step; ``settings`` those of :class:`Objective`. Columns from ``vocabulary`` on count as −inf. No rows: zero loss and gradient.
    ValueError if a teacher is missing or shapes differ.
    """
    objective = Objective(**settings).with_teacher(teacher)
    logits = _wide(student_logits[:, :vocabulary])
    teacher = teacher.logits if isinstance(teacher, Hidden) else teacher
    teacher = teacher[:, :vocabulary] if torch.is_tensor(teacher) else teacher
    _check(logits, logits.shape[1], targets, teacher)
    return _row_losses(logits, targets, teacher, objective).sum() / torch.as_tensor(num_items).clamp(min=1)


def linear_distillation_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor, teacher=None, *, num_items: int | torch.Tensor,
                             vocabulary: int | None = None, chunk_size: int | None = None, **settings) -> torch.Tensor:
    """:func:`distillation_loss` from hidden states (N, H) and a :class:`Head`, holding at most ``chunk_size`` rows of each one's logits.
    Value and gradients (of hidden states, weight and bias) are those of the plain form. They are made in the forward pass, the weight's in
    place, so memory grows with the chunk, by default six million logits on a processor, and not with N × V.
    """
    check("chunk_size", 1 if chunk_size is None else chunk_size, int, "None or a whole number from 1", lambda v: v >= 1)
    objective, head = Objective(**settings).with_teacher(teacher), head.narrow(vocabulary)
    if isinstance(teacher, (Hidden, torch.Tensor)):
        teacher = teacher[:, :vocabulary] if torch.is_tensor(teacher) else teacher._replace(head=teacher.head.narrow(vocabulary))
    _check(hidden, len(head.weight), targets, teacher)
    where = hidden.device.type
    pieces = math.ceil(len(hidden) / (chunk_size or max(1, CHUNK_ELEMENTS.get(where, 2**27) // len(head.weight))))
    if torch.is_autocast_enabled(where):  # once here, since nothing inside the chunks may change its type
        hidden = hidden.to(low := torch.get_autocast_dtype(where))
        if isinstance(teacher, Hidden):
            teacher = Hidden(teacher.states.to(low), teacher.head._replace(weight=teacher.head.weight.to(low)))
    made_of = [x if x is None or torch.is_grad_enabled() else x.detach() for x in (hidden, head.weight, head.bias)]
    with torch.autocast(where, enabled=False):
        return _Chunked.apply(*made_of, head, targets, teacher, objective, pieces, 1 / max(float(num_items), 1))


def _check(rows, width: int, targets, teacher) -> None:
    given = [len(targets), *([] if teacher is None else [len(teacher if torch.is_tensor(teacher) else teacher[0])])]
    if set(given) != {len(rows)}:
        raise ValueError(f"The student has {len(rows)} rows, targets and teacher {' and '.join(map(str, given))}; each needs one a token.")
    theirs = len(teacher.head.weight) if isinstance(teacher, Hidden) else teacher.shape[1] if torch.is_tensor(teacher) else width
    if theirs != width:
        raise ValueError(f"The student's head has {width} tokens and the teacher's {theirs}; give the common vocabulary.")


def _row_losses(z, targets, teacher, o: Objective) -> torch.Tensor:
    """(1−α)·CE + α·T²·D of each row of logits ``z``."""
    hard = (1 - o.alpha) * -F.log_softmax(z, -1).gather(1, targets[:, None])[:, 0] if o.alpha < 1 else 0.0
    return hard + o.alpha * o.temperature**2 * _divergence(z, teacher, o) if o.alpha > 0 else hard


def _divergence(z, teacher, o: Objective) -> torch.Tensor:
    log_q = F.log_softmax(z / o.temperature if o.temperature != 1 else z, -1)
    if not isinstance(teacher, Sparse):
        return _between(log_q, F.log_softmax(_wide(teacher.detach()) / o.temperature, -1), o)
    others = log_q.scatter(1, teacher.ids, -math.inf)
    rest = others.masked_fill((others == -math.inf).all(-1, keepdim=True), -math.inf).logsumexp(-1)  # whose gradient is 0 then
    return _of_few(log_q.gather(1, teacher.ids), rest, teacher, o)


def _of_few(near, rest, teacher: Sparse, o: Objective) -> torch.Tensor:
    """D of each row from what student and teacher say of ``teacher.ids`` and of all others together."""
    log_p = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], -1).to(near.dtype)
    value = _between(torch.cat([near, rest[:, None]], -1), log_p, o)
    return value if teacher.offset is None else value + teacher.offset


def _between(log_q, log_p, o: Objective) -> torch.Tensor:
    """D of each row from log-probabilities (N, C)."""
    kind, p = o.divergence, log_p.exp()
    if kind == "forward_kl":
        return _kl(p, log_p, log_q)
    q = log_q.exp()
    if kind == "reverse_kl":
        return _kl(q, log_q, log_p)
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    share, by_p = {"jsd": (o.beta, o.beta), "skew_forward_kl": (o.skew, 1), "skew_reverse_kl": (1 - o.skew, 0)}[kind]
    log_mix = (share * p + (1 - share) * q).clamp(min=torch.finfo(q.dtype).tiny).log()
    return sum(w * _kl(a, log_a, log_mix) for w, a, log_a in ((by_p, p, log_p), (1 - by_p, q, log_q)) if w)


def _kl(a, log_a, log_b) -> torch.Tensor:
    """Σ a·(log a − log b); a token that cannot come adds nothing, neither to the value nor to a gradient."""
    return (a * (log_a - log_b).masked_fill(a == 0, 0)).sum(-1)


def _part(teacher, rows: slice):
    if isinstance(teacher, Hidden):
        return teacher._replace(states=teacher.states[rows]).logits
    return Sparse(*(x if x is None else x[rows] for x in teacher)) if isinstance(teacher, Sparse) else None if teacher is None else teacher[rows]


def _by_hand(z, targets, teacher, o: Objective) -> torch.Tensor:
    """The summed loss without T² of logits ``z``, which become its slope by z/T in a few passes; not finite where they cannot. A slope by log
    q becomes one by z as d log q_i / dz_j = [i = j] − q_j.
    """
    dense, soft, at = torch.is_tensor(teacher), o.alpha > 0, o.temperature if o.alpha > 0 else 1.0
    log_q = torch.log_softmax(z if at == 1 else z.div_(at), -1, out=z)
    said, loss = log_q.gather(1, targets[:, None]) if o.alpha < 1 else None, 0.0
    if soft and dense:
        log_p = F.log_softmax(_wide(teacher) if at == 1 else _wide(teacher) / at, -1)
        loss = o.alpha * (log_p - log_q).mul_(log_p.exp_()).sum()
        slope = log_q.exp_().sub_(log_p, alpha=o.alpha)
    elif soft:
        near = log_q.gather(1, teacher.ids)
        slope = log_q.exp_().scatter_(1, teacher.ids, 0)
        rest = slope.sum(-1).log()
        rest.masked_fill_((rest < -80) & (teacher.log_tail > rest), math.nan)  # too little to have digits
        with torch.enable_grad():
            loss = o.alpha * _of_few(near.requires_grad_(), rest.requires_grad_(), teacher, o).sum()
        by_near, by_rest = torch.autograd.grad(loss, (near, rest))
        loss, by_q = loss.detach(), 1 - o.alpha - (by_near.sum(-1) + by_rest)[:, None]
        slope.mul_(by_q + (by_rest / rest.exp()).nan_to_num_()[:, None])
        slope.scatter_(1, teacher.ids, near.exp() * by_q).scatter_add_(1, teacher.ids, by_near)
    else:
        slope = log_q.exp_()
    if o.alpha < 1:
        loss -= (1 - o.alpha) * said.sum()
        slope.scatter_add_(1, targets[:, None], torch.full_like(said, o.alpha - 1))
    return loss


def _loss_and_slope(head: Head, hidden, targets, teacher, rows: slice, o: Objective, wanted: bool) -> tuple:
    """The summed loss of the chunk ``rows`` and, if ``wanted``, its slope by what :meth:`Head.linear` gives."""
    at, dense = o.temperature if o.alpha > 0 else 1.0, o.alpha > 0 and not isinstance(teacher, Sparse)
    if head.softcap is None and (o.alpha in (0, 1) or at == 1) and not (dense and o.divergence != "forward_kl"):
        z, said = head.shape(head.linear(hidden[rows])), _part(teacher, rows)
        size = max(1, BLOCK_ELEMENTS.get(z.device.type, z.numel()) // z.shape[1]) if dense else len(z)
        blocks = [slice(start, start + size) for start in range(0, len(z), size)]
        loss = sum(_by_hand(z[block], targets[rows][block], _part(said, block), o) for block in blocks) * at**2
        if loss.isfinite():  # it is not where a token cannot come
            return loss, (z if at * head.scale == 1 else z.mul_(at * head.scale)).to(hidden.dtype)
    linear = head.linear(hidden[rows]).requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        loss = _row_losses(head.shape(linear), targets[rows], _part(teacher, rows), o).sum()
    return loss.detach(), torch.autograd.grad(loss, linear)[0] if wanted else None


class _Chunked(torch.autograd.Function):
    """``share`` of the summed loss of all rows; every gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, teacher, objective, pieces, share):
        grad_hidden = torch.empty_like(hidden) if (wanted := any(ctx.needs_input_grad[:3])) else None
        wide = _wide(weight[:0]).dtype
        fresh = torch.empty_like if len(hidden) and wide == hidden.dtype else torch.zeros_like
        grad_weight = fresh(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        head, total = head._replace(weight=weight.to(hidden.dtype)), _wide(hidden[:0]).new_zeros(())
        edges = [len(hidden) * i // (pieces or 1) for i in range(pieces + 1)]
        for rows in map(slice, edges, edges[1:]):
            loss, slope = _loss_and_slope(head, hidden, targets, teacher, rows, objective, wanted)
            total += loss
            if wanted:
                torch.mm(slope, head.weight, out=grad_hidden[rows])
            if grad_bias is not None:
                grad_bias.add_(slope.sum(0, dtype=grad_bias.dtype), alpha=share)
            if grad_weight is not None and wide == hidden.dtype:
                torch.addmm(grad_weight, slope.T, hidden[rows], out=grad_weight, beta=int(rows.start > 0), alpha=share)
            elif grad_weight is not None:
                grad_weight.add_(slope.T @ hidden[rows], alpha=share)
            del slope  # before the next chunk's logits
        ctx.made = [(g, like.dtype) for g, like in ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias)) if like is not None]
        ctx.share = share  # of hidden states' gradient only now, when a half-precision loss is scaled up
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        made, ctx.made = ctx.made, None  # scaled in place, so they serve one backward pass
        if made is None:
            raise RuntimeError("The chunked loss can be differentiated once; compute it anew for another backward pass.")
        factors = (grad * ctx.share, grad, grad)
        gradients = [None if g is None else g.mul_(f).to(dtype) for (g, dtype), f in zip(made, factors)]
        return (*gradients, *[None] * (9 - len(gradients)))
