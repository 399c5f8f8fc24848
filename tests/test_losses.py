import math

import pytest
import torch
import torch.nn.functional as F

from kdlib import losses
from kdlib.losses import KINDS, Head, Hidden, Objective, Sparse, distillation_loss, divergence, linear_distillation_loss

SETTINGS = [(kind, 0.5) for kind in KINDS] + [("jsd", b) for b in (0.0, 0.1, 0.9, 1.0)]
TEMPERATURES = (0.5, 1.0, 2.0)


def logits(n, v, seed=0, dtype=torch.float64, scale=2.0):
    return (scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def softmax(row, temperature=1.0):
    e = [math.exp(x / temperature) for x in row]
    return [x / sum(e) for x in e]


def kl(a, b):
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b) if x > 0)


def definition(student, teacher, kind, beta=0.5, skew=0.1, temperature=1.0):
    """One row's divergence from lists of logits, in plain Python."""
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    if kind == "total_variation":
        return sum(abs(a - b) for a, b in zip(p, q)) / 2
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(p, q)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(q, p)
    if kind == "skew_forward_kl":
        return kl(p, [skew * a + (1 - skew) * b for a, b in zip(p, q)])
    if kind == "skew_reverse_kl":
        return kl(q, [skew * b + (1 - skew) * a for a, b in zip(p, q)])
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def mixed(student, teacher, targets, alpha, temperature=1.0, **settings):
    """Σ (1−α)·CE + α·T²·D by the definition, a token at a time."""
    return sum((1 - alpha) * -math.log(softmax(s)[y]) + alpha * temperature**2 * definition(s, t, temperature=temperature, **settings)
               for s, t, y in zip(student.tolist(), teacher.tolist(), targets.tolist()))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_every_divergence_is_its_definition(kind, beta, temperature):
    s, t = logits(7, 11, 1), logits(7, 11, 2)
    found = divergence(s, t, kind, beta=beta, skew=0.3, temperature=temperature)
    wanted = [definition(a, b, kind, beta, 0.3, temperature) for a, b in zip(s.tolist(), t.tolist())]
    assert found.shape == (7,) and found.tolist() == pytest.approx(wanted, rel=1e-11)
    assert (found > 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_gradients_agree_with_finite_differences(kind, beta, temperature):
    s, t = logits(3, 5, 5).requires_grad_(), logits(3, 5, 6)
    assert torch.autograd.gradcheck(lambda x: divergence(x, t, kind, beta=beta, temperature=temperature), (s,))
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, torch.tensor([0, 4, 2]), t, alpha=0.4, kind=kind, beta=beta,
                                                                temperature=temperature, num_items=2), (s,))


@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_identical_models_have_no_divergence_and_no_gradient(kind, beta):
    s = logits(50, 13, 7, scale=6).requires_grad_()
    value = divergence(s, s.detach().clone(), kind, beta=beta, temperature=2.0)
    gradient, = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(value.detach(), torch.zeros(50, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-14, rtol=0)


def test_soft_cross_entropy_is_kl_plus_entropy_and_has_its_gradient():
    s, t = logits(20, 9, 1).requires_grad_(), logits(20, 9, 2)
    p = F.softmax(t, -1)
    soft = -(p * F.log_softmax(s, -1)).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    kl_rows = divergence(s, t)
    torch.testing.assert_close(soft, kl_rows + entropy)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), s)[0] for x in (soft, kl_rows)))
    assert (soft > kl_rows + 0.1).any(), "what is called KL here is not the soft cross-entropy"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_mix_is_its_definition(alpha, temperature):
    s, t, y = logits(7, 11, 1), logits(7, 11, 2), torch.arange(7)
    for kind in KINDS:
        loss = distillation_loss(s, y, t, alpha=alpha, temperature=temperature, kind=kind, num_items=5)
        assert loss.item() == pytest.approx(mixed(s, t, y, alpha, temperature, kind=kind) / 5, rel=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_t_squared_stands_in_the_gradient_and_not_just_in_the_value(temperature):
    s, t, y = logits(4, 9, 3).requires_grad_(), logits(4, 9, 4), torch.zeros(4, dtype=torch.long)
    gradient, = torch.autograd.grad(distillation_loss(s, y, t, alpha=1.0, temperature=temperature, num_items=1), s)
    torch.testing.assert_close(gradient, temperature * (F.softmax(s / temperature, -1) - F.softmax(t / temperature, -1)).detach())
    step = 1e-6
    moved = [distillation_loss(s.detach() + way * step * gradient, y, t, alpha=1.0, temperature=temperature, num_items=1)
             for way in (1, -1)]
    assert (moved[0] - moved[1]).item() / (2 * step) == pytest.approx(gradient.pow(2).sum().item(), rel=1e-6)


def test_a_token_that_cannot_come_adds_nothing():
    s, t = logits(6, 8, 1), logits(6, 8, 2)
    hidden = torch.tensor([[2, 5]])
    s8, t8 = (x.clone().index_fill_(1, hidden[0], -math.inf) for x in (s, t))
    keep = [0, 1, 3, 4, 6, 7]
    for kind, beta in SETTINGS:
        full, small = s8.clone().requires_grad_(), s[:, keep].clone().requires_grad_()
        values = divergence(full, t8, kind, beta=beta), divergence(small, t[:, keep], kind, beta=beta)
        torch.testing.assert_close(*values)
        gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, (full, small))]
        torch.testing.assert_close(gradients[0][:, keep], gradients[1])
        assert (gradients[0][:, hidden[0]] == 0).all()


def test_padded_columns_count_as_tokens_that_cannot_come():
    s, t, y = logits(6, 8, 1), logits(6, 12, 2), torch.arange(6)
    wide = torch.cat([s, logits(6, 3, 9)], 1).requires_grad_()
    small = s.clone().requires_grad_()
    padded = distillation_loss(wide, y, t, alpha=0.5, num_items=6, vocabulary=8)
    plain = distillation_loss(small, y, t[:, :8], alpha=0.5, num_items=6)
    torch.testing.assert_close(padded, plain)
    gradient, = torch.autograd.grad(padded, wide)
    torch.testing.assert_close(gradient[:, :8], torch.autograd.grad(plain, small)[0])
    assert (gradient[:, 8:] == 0).all()
    same = torch.cat([t[:, :8], torch.zeros(6, 4)], 1)
    assert distillation_loss(same, y, t, alpha=1.0, num_items=6, vocabulary=8).abs() < 1e-14, "zeros in padding would give 0.06"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
def test_low_precision_is_computed_in_float32(dtype, tolerance):
    s, t, y = logits(33, 257, 1, dtype), logits(33, 257, 2, dtype), torch.arange(33)
    loss = distillation_loss(s, y, t, alpha=0.5, kind="jsd", num_items=33)
    exact = distillation_loss(s.double(), y, t.double(), alpha=0.5, kind="jsd", num_items=33)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    low, high = s.clone().requires_grad_(), s.double().requires_grad_()
    distillation_loss(low, y, t, alpha=0.5, num_items=33).backward()
    distillation_loss(high, y, t.double(), alpha=0.5, num_items=33).backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.double(), high.grad, rtol=tolerance, atol=tolerance / 33)


@pytest.mark.parametrize("teacher", [True, False])
def test_no_response_token_gives_zero_loss_and_zero_gradient(teacher):
    s, y = torch.empty(0, 5, requires_grad=True), torch.empty(0, dtype=torch.long)
    loss = distillation_loss(s, y, torch.empty(0, 5) if teacher else None, alpha=float(teacher), num_items=0)
    loss.backward()
    assert loss.item() == 0 and s.grad.shape == (0, 5)
    w, h = torch.randn(5, 3, requires_grad=True), torch.empty(0, 3, requires_grad=True)
    loss = linear_distillation_loss(h, Head(w), y, torch.empty(0, 5) if teacher else None, alpha=float(teacher), num_items=0)
    loss.backward()
    assert loss.item() == 0 and (w.grad == 0).all()


def models(n=13, v=29, h=7, bias=True, dtype=torch.float64, **head):
    parts = [logits(n, h, 1, dtype, 1), logits(v, h, 2, dtype, 1), logits(1, v, 3, dtype)[0] if bias else None]
    student = [None if x is None else x.requires_grad_() for x in parts]
    teacher = Hidden(logits(n, h + 2, 4, dtype, 1), Head(logits(v, h + 2, 5, dtype, 1)))
    return student, lambda: Head(student[1], student[2], **head), teacher, torch.arange(n) % v


@pytest.mark.parametrize("chunk", [1, 4, 13, 100, None])
@pytest.mark.parametrize("bias, head", [(True, {}), (False, {"scale": 0.3}), (False, {"softcap": 2.0}), (True, {"scale": 3.0, "softcap": 5.0})])
@pytest.mark.parametrize("alpha, kind, temperature", [(0.0, "forward_kl", 1.0), (0.4, "jsd", 2.0), (1.0, "reverse_kl", 0.5)])
def test_chunks_change_neither_loss_nor_any_gradient(chunk, bias, head, alpha, kind, temperature):
    student, make, teacher, y = models(bias=bias, **head)
    settings = {"alpha": alpha, "kind": kind, "temperature": temperature, "num_items": 9, "vocabulary": 27}
    chunked = linear_distillation_loss(student[0], make(), y % 27, teacher, chunk_size=chunk, **settings)
    z = F.linear(student[0], student[1], student[2]) * head.get("scale", 1.0)
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    plain = distillation_loss(z, y % 27, teacher.states @ teacher.head.weight.T, **settings)
    torch.testing.assert_close(chunked, plain)
    inputs = [x for x in student if x is not None]
    for a, b in zip(torch.autograd.grad(3 * chunked, inputs), torch.autograd.grad(3 * plain, inputs)):
        torch.testing.assert_close(a, b)


def test_the_chunked_loss_of_half_precision_weights_accumulates_in_float32():
    student, make, teacher, y = models(n=300, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in student]
    settings = {"alpha": 0.5, "num_items": 300}
    linear_distillation_loss(student[0], make(), y, teacher, chunk_size=3, **settings).backward()
    twin = Hidden(teacher.states.double(), Head(teacher.head.weight.double()))
    linear_distillation_loss(exact[0], Head(*exact[1:]), y, twin, **settings).backward()
    for a, b in zip(student, exact):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.double() - b.grad).norm() < 0.02 * b.grad.norm()


def test_a_frozen_student_head_gets_no_gradient_and_no_buffer():
    student, make, teacher, y = models()
    student[1].requires_grad_(False)
    linear_distillation_loss(student[0], make(), y, teacher, alpha=1.0, num_items=1).backward()
    assert student[1].grad is None and student[0].grad is not None and student[2].grad is not None


def test_the_chunked_loss_says_that_it_differentiates_once():
    student, make, teacher, y = models()
    loss = linear_distillation_loss(student[0], make(), y, teacher, alpha=1.0, num_items=1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        loss.backward()


def sparse_of(t, k, temperature=1.0, renormalise=False):
    log_p = F.log_softmax(t / temperature, -1)
    top, ids = log_p.topk(k)
    tail = torch.log1p(-top.exp().sum(-1).clamp(max=1))
    return Sparse(ids, top - top.logsumexp(-1, keepdim=True), torch.full_like(tail, -math.inf)) if renormalise else Sparse(ids, top, tail)


def with_head(x, *rest, **settings):
    """:func:`distillation_loss` of logits in the form that takes hidden states: in chunks, its slope made by hand."""
    return linear_distillation_loss(x, Head(torch.eye(x.shape[1], dtype=x.dtype)), *rest, chunk_size=4, **settings)


FORMS = pytest.mark.parametrize("form", [distillation_loss, with_head], ids=["plain", "by hand"])


@pytest.mark.parametrize("alpha, temperature", [(1.0, 1.0), (1.0, 2.0), (0.4, 1.0), (0.4, 2.0), (0.0, 3.0)])
@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_the_slope_made_by_hand_is_the_plain_ones(kind, beta, alpha, temperature, monkeypatch):
    """In chunks of up to four rows, which a dense teacher's passes go over two by two."""
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", {"cpu": 2 * 13})
    s, t, y = logits(6, 13, 1, scale=4), logits(6, 13, 2, scale=4), torch.arange(6)
    drawn = torch.multinomial(F.softmax(t, -1), 20, replacement=True, generator=torch.Generator().manual_seed(0))
    sampled = Sparse(drawn, torch.full(drawn.shape, -math.log(20), dtype=t.dtype), torch.full((6,), -math.inf, dtype=t.dtype), s[:, 0])
    cut = t.clone()
    cut[1, 3] = cut[4, 12] = -math.inf
    for teacher in (t, sparse_of(t, 4, temperature), sparse_of(t, 4, temperature, True), sampled, cut):
        if kind != "forward_kl" and teacher is sampled:
            continue
        found = []
        for form in (distillation_loss, with_head):
            x = s.clone().requires_grad_()
            loss = form(x, y, teacher if alpha else None, alpha=alpha, kind=kind, beta=beta, temperature=temperature, num_items=3)
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
        if not found[0][0].isfinite():  # reverse KL from what the teacher rules out
            assert found[1][0] == found[0][0] == math.inf
            continue
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gap", [80.0, 92.0, 96.0, 100.0, 103.0, 110.0])
def test_what_a_very_sure_student_leaves_keeps_its_slope(gap):
    s = torch.zeros(2, 8)
    s[:, 0] = gap
    sparse = Sparse(torch.tensor([[0, 1]] * 2), torch.tensor([[0.6, 0.3]] * 2).log(), torch.tensor([0.1] * 2).log())
    wanted = torch.tensor([1 - 0.6, -0.3, *[-0.1 / 6] * 6]).expand(2, 8)
    x = s.requires_grad_()
    loss = with_head(x, torch.zeros(2, dtype=torch.long), sparse, num_items=1)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted, rtol=1e-3, atol=1e-4)
    assert loss.item() == pytest.approx(2 * (0.4 * gap + sum(p * math.log(p) for p in (0.6, 0.3)) + 0.1 * math.log(0.1 / 6)), rel=1e-4)


def with_bias(x, *rest, **settings):
    """As :func:`with_head`, but what −inf rules out is ruled out by the head's bias."""
    bias = torch.zeros(x.shape[1], dtype=x.dtype)
    bias[2] = -math.inf
    return linear_distillation_loss(x.masked_fill(x == -math.inf, 0), Head(torch.eye(x.shape[1], dtype=x.dtype), bias), *rest, **settings)


@pytest.mark.parametrize("form", [distillation_loss, with_bias], ids=["plain", "by hand"])
@pytest.mark.parametrize("alpha, temperature", [(1.0, 1.0), (0.5, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_a_token_that_neither_says_leaves_a_slope_though_the_bucket_is_empty(kind, beta, alpha, temperature, form):
    s, t = logits(4, 6, 1), logits(4, 6, 2)
    s[:, 2] = t[:, 2] = -math.inf
    x, (top, ids) = s.clone().requires_grad_(), F.log_softmax(t / temperature, -1).topk(5)
    teacher = Sparse(ids, top, torch.full((4,), -math.inf, dtype=t.dtype))
    loss = form(x, torch.zeros(4, dtype=torch.long), teacher, alpha=alpha, kind=kind, beta=beta, temperature=temperature, num_items=4)
    slope, = torch.autograd.grad(loss, x)
    kept = [0, 1, 3, 4, 5]
    y = s[:, kept].clone().requires_grad_()
    other = distillation_loss(y, torch.zeros(4, dtype=torch.long), t[:, kept], alpha=alpha, kind=kind, beta=beta, temperature=temperature, num_items=4)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(slope[:, kept], torch.autograd.grad(other, y)[0])
    assert not slope[:, 2].any()


@FORMS
@pytest.mark.parametrize("kind, plain", [("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_no_skew_is_the_plain_divergence_however_sure_the_models_are(kind, plain, form):
    found = []
    for name, skew in ((kind, 0.0), (plain, 0.1)):
        x = torch.tensor([[120.0, 0.0, 0.0]]).requires_grad_()
        loss = form(x, torch.tensor([0]), torch.tensor([[0.0, 0.0, 5.0]]), alpha=1.0, kind=name, skew=skew, num_items=1)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert found[0][0] == found[1][0] > 1 and torch.equal(found[0][1], found[1][1])
    assert found[0][1].any() == (plain == "forward_kl"), "the slope of reverse KL is below what single precision holds"


def test_where_no_gradient_is_wanted_none_is_made(monkeypatch):
    seen, real = [], losses._loss_and_slope
    monkeypatch.setattr(losses, "_loss_and_slope", lambda *given: seen.append(given[-1]) or real(*given))
    hidden, weight, y = logits(5, 4, 1).requires_grad_(), logits(9, 4, 2).requires_grad_(), torch.arange(5)
    with torch.no_grad():
        alone = linear_distillation_loss(hidden, Head(weight), y, num_items=5, alpha=0.0)
    assert alone == linear_distillation_loss(hidden, Head(weight), y, num_items=5, alpha=0.0) and seen == [False, True]


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_chunk_of_no_rows_is_refused(size):
    with pytest.raises(ValueError, match=rf"chunk_size={size} .*allowed: None or a whole number from 1"):
        linear_distillation_loss(logits(3, 4, 1), Head(logits(9, 4, 2)), torch.arange(3), num_items=3, alpha=0.0, chunk_size=size)


@FORMS
def test_a_target_that_is_no_token_is_an_error(form):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|index -100"):
        form(logits(3, 4, 1), torch.tensor([0, -100, 1]), alpha=0.0, num_items=3)


@pytest.mark.parametrize("rows, chunk, sizes", [(10, 4, [3, 3, 4]), (8, 4, [4, 4]), (3, 100, [3]), (10, None, [5, 5])])
def test_chunks_are_even_and_never_larger_than_asked(rows, chunk, sizes, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", {"cpu": 6 * 13})
    seen, real = [], losses._loss_and_slope
    monkeypatch.setattr(losses, "_loss_and_slope", lambda head, hidden, y, t, at, *rest: seen.append(at.stop - at.start) or real(head, hidden, y, t, at, *rest))
    x = logits(rows, 13, 1)
    linear_distillation_loss(x, Head(torch.eye(13, dtype=x.dtype)), torch.zeros(rows, dtype=torch.long), x, alpha=1.0, num_items=1, chunk_size=chunk)
    assert seen == sizes


def test_a_head_that_is_whole_is_not_sliced():
    """The gradient of a slice is a copy of all of it."""
    head = Head(torch.zeros(7, 3, requires_grad=True), torch.zeros(7))
    assert head.narrow(None) is head and head.narrow(7) is head
    cut = head.narrow(5)
    assert cut.weight.shape == (5, 3) and cut.bias.shape == (5,) and (cut.scale, cut.softcap) == (head.scale, head.softcap)


def test_half_precision_slopes_survive_where_the_loss_is_scaled_up():
    student, make, teacher, y = models()
    found = []
    for dtype in (torch.float64, torch.float16):
        hidden, head = student[0].detach().to(dtype).requires_grad_(), Head(student[1].detach().to(dtype))
        loss = linear_distillation_loss(hidden, head, y, Hidden(teacher.states.to(dtype), Head(teacher.head.weight.to(dtype))), num_items=10**6)
        (loss * 2**16).backward()
        found.append(hidden.grad.double())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02 * float(found[0].abs().max()))


def test_only_the_usual_objectives_are_made_by_hand(monkeypatch):
    s, t, y, seen = logits(6, 9, 1), logits(6, 9, 2), torch.arange(6), []
    monkeypatch.setattr(losses, "_row_losses", lambda *_: seen.append(1) or torch.zeros(4, requires_grad=True))
    for teacher in (t, sparse_of(t, 3), None):
        with_head(s, y, teacher, alpha=float(teacher is not None), num_items=1)
    with_head(s, y, sparse_of(t, 3, 2.0), alpha=1.0, kind="jsd", temperature=2.0, num_items=1)
    assert not seen
    with_head(s, y, t, alpha=1.0, kind="jsd", num_items=1)
    assert len(seen) == 2


@FORMS
@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_a_sparse_teacher_is_the_divergence_over_its_tokens_and_one_bucket(kind, beta, form):
    s, t, y = logits(6, 9, 1), logits(6, 9, 2), torch.arange(6)
    sparse = sparse_of(t, 4, 2.0)
    x = s.clone().requires_grad_()
    loss = form(x, y, sparse, alpha=1.0, kind=kind, beta=beta, temperature=2.0, num_items=1)
    coarse = 0.0
    for row in range(6):
        ids = sparse.ids[row].tolist()
        q, p = (softmax(z[row].tolist(), 2.0) for z in (s, t))
        parts = [[a[i] for i in ids] + [sum(a[i] for i in range(9) if i not in ids)] for a in (q, p)]
        coarse += 4 * definition(*[[math.log(v) for v in part] for part in parts], kind, beta)
    assert loss.item() == pytest.approx(coarse, rel=1e-10)
    if form is distillation_loss:
        assert torch.autograd.gradcheck(lambda z: distillation_loss(z, y, sparse, alpha=0.7, kind=kind, beta=beta, temperature=2.0, num_items=1), (x,))


@pytest.mark.parametrize("kind, beta", SETTINGS)
def test_a_sparse_teacher_with_every_token_is_the_whole_one(kind, beta):
    s, t, y = logits(6, 9, 1).requires_grad_(), logits(6, 9, 2), torch.arange(6)
    found = [distillation_loss(s, y, teacher, alpha=0.6, kind=kind, beta=beta, num_items=1) for teacher in (sparse_of(t, 8), t)]
    assert found[0].item() <= found[1].item() + 1e-12
    whole = [distillation_loss(s, y, teacher, alpha=0.6, kind=kind, beta=beta, num_items=1)
             for teacher in (Sparse(torch.arange(9).expand(6, 9), F.log_softmax(t, -1), torch.full((6,), -math.inf, dtype=t.dtype)), t)]
    torch.testing.assert_close(*whole)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in whole))


@FORMS
@pytest.mark.parametrize("kind, beta", SETTINGS)
@pytest.mark.parametrize("sure", [(0.0, 18.0), (18.0, 0.0), (25.0, 25.0)])
def test_a_bucket_keeps_its_digits_where_student_or_teacher_are_sure(kind, beta, sure, form):
    """In single precision one minus the mass of the top k has none left."""
    s, t = (logits(4, 50, i).float() for i in (1, 2))
    s[:, 3] += sure[0]
    t[:, 3] += sure[1]
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        x, y = s.to(dtype).requires_grad_(), t.to(dtype)
        top, ids = F.log_softmax(y, -1).topk(8)
        sparse = Sparse(ids, top, F.log_softmax(y, -1).scatter(1, ids, -math.inf).logsumexp(-1))
        loss = form(x, torch.arange(4), sparse, alpha=1.0, kind=kind, beta=beta, num_items=1)
        values.append(loss.double())
        slopes.append(torch.autograd.grad(loss, x)[0].double())
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


def test_a_truncated_divergence_has_a_gradient_where_its_plain_sum_is_negative():
    """Σ over the top k of p·log(p/q) can be negative; a clamp at zero would then stop learning."""
    s, t = torch.tensor([[2.0, 1.9, -3.0, -3.0]]), torch.tensor([[1.0, 0.9, 0.8, 0.8]])
    sparse = sparse_of(t, 2)
    p, q = F.softmax(t, -1), F.softmax(s, -1)
    assert (p * (p / q).log()).gather(1, sparse.ids).sum() < 0
    x = s.requires_grad_()
    loss = distillation_loss(x, torch.tensor([0]), sparse, alpha=1.0, num_items=1)
    loss.backward()
    assert loss > 0.1 and x.grad.abs().max() > 0.1


def test_the_loss_divides_by_the_given_count_so_splits_do_not_matter():
    s, t, y = logits(10, 6, 1), logits(10, 6, 2), torch.arange(10) % 6
    whole = distillation_loss(s, y, t, alpha=0.5, num_items=10)
    parts = [distillation_loss(s[a:b], y[a:b], t[a:b], alpha=0.5, num_items=10) for a, b in ((0, 1), (1, 4), (4, 10))]
    torch.testing.assert_close(sum(parts), whole)
    means = [distillation_loss(s[a:b], y[a:b], t[a:b], alpha=0.5, num_items=b - a) for a, b in ((0, 1), (1, 4), (4, 10))]
    assert abs(sum(means) / 3 - whole) > 1e-3, "a mean of means is another loss"


@pytest.mark.parametrize("settings, message", [
    ({"kind": "kl"}, "kind='kl' is not allowed; allowed: forward_kl, reverse_kl, jsd"), ({"beta": 1.5}, "beta=1.5 is not allowed; allowed: 0"),
    ({"beta": -0.1}, "beta=-0.1"), ({"skew": 1.0}, "skew=1.0 is not allowed"), ({"temperature": 0.0}, "temperature=0.0 is not allowed"),
    ({"temperature": math.inf}, "temperature=inf"), ({"temperature": math.nan}, "temperature=nan"), ({"alpha": 1.2}, "alpha=1.2 is not allowed"),
    ({"alpha": math.nan}, "alpha=nan"), ({"alpha": 0.5}, "asks for distillation, but there is no teacher")])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(2, 3), torch.tensor([0, 1]), None, num_items=2, **settings)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"student_logits \(2, 3\) and teacher_logits \(2, 4\) differ in shape"):
        divergence(logits(2, 3), logits(2, 4))
    student, make, teacher, y = models()
    with pytest.raises(ValueError, match="The student's head has 29 tokens and the teacher's 28; give the common vocabulary"):
        linear_distillation_loss(student[0], make(), y, Hidden(teacher.states, teacher.head.narrow(28)), alpha=1.0, num_items=1)


def test_an_objective_is_checked_when_it_is_made():
    assert Objective().kind == "forward_kl" and losses.KINDS[0] == "forward_kl"
    with pytest.raises(ValueError, match="kind='soft'"):
        Objective(kind="soft")


@pytest.mark.parametrize("rows", [3, 5])
def test_another_number_of_teacher_rows_is_refused(rows):
    """In chunks, a teacher with too many rows would be cut and one with a single row spread."""
    student, make, teacher, y = models()
    n = len(y)
    head = Head(teacher.head.weight.detach())
    states = teacher.states.detach()
    for given in (Hidden(states[:rows], head), Hidden(states[:1], head), Hidden(states, head).logits[:rows], sparse_of(Hidden(states, head).logits[:rows], 3)):
        with pytest.raises(ValueError, match=f"The student has {n} rows, targets and teacher {n} and [135]; each needs one a token"):
            linear_distillation_loss(student[0], make(), y, given, alpha=1.0, num_items=1, chunk_size=2)
    with pytest.raises(ValueError, match=f"targets and teacher {n - 1} and {n}"):
        distillation_loss(Hidden(states, head).logits, y[1:], Hidden(states, head).logits, num_items=1)


@pytest.mark.parametrize("settings", [{"alpha": "0.5"}, {"beta": None}, {"temperature": True}])
def test_a_setting_that_is_no_number_is_named(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} has type"):
        Objective(**settings)
