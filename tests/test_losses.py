import math

import pytest
import torch
import torch.nn.functional as F

from kdlib.losses import distillation_loss, forward_kl


def logits(n, v, seed=0, dtype=torch.float64, scale=2.0):
    return (scale * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def softmax(row, temperature):
    e = [math.exp(x / temperature) for x in row]
    return [x / sum(e) for x in e]


def naive(student, teacher, targets, alpha, temperature):
    """(1-α)·CE + α·T²·KL(p ‖ q), by the definition, a token at a time."""
    total = 0.0
    for s, t, target in zip(student.tolist(), teacher.tolist(), targets.tolist()):
        p, q = softmax(t, temperature), softmax(s, temperature)
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        total += (1 - alpha) * -math.log(softmax(s, 1.0)[target]) + alpha * temperature**2 * kl
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_is_the_definition(alpha, temperature):
    s, t, y = logits(7, 11, 1), logits(7, 11, 2), torch.arange(7)
    loss = distillation_loss(s, y, t, alpha=alpha, temperature=temperature, num_items=5)
    assert loss.item() == pytest.approx(naive(s, t, y, alpha, temperature) / 5, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradient_has_the_closed_form_with_one_t(temperature):
    # T² in the loss leaves T·(q − p): one T is spent on the chain rule.
    s, t = logits(4, 9, 3).requires_grad_(), logits(4, 9, 4)
    loss = distillation_loss(s, torch.zeros(4, dtype=torch.long), t, alpha=1.0, temperature=temperature, num_items=1)
    gradient, = torch.autograd.grad(loss, s)
    expected = temperature * (F.softmax(s / temperature, -1) - F.softmax(t / temperature, -1))
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-12)


def test_gradient_agrees_with_finite_differences():
    s, t = logits(3, 5, 5).requires_grad_(), logits(3, 5, 6)
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, torch.tensor([0, 4, 2]), t, alpha=0.4, temperature=2.0, num_items=3), (s,))


def test_forward_kl_is_a_divergence_with_mean_over_the_teacher():
    s, t = logits(50, 13, 7), logits(50, 13, 8)
    kl = forward_kl(s, t)
    assert kl.shape == (50,) and (kl > 0).all()
    torch.testing.assert_close(forward_kl(t, t), torch.zeros(50, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(kl, F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1))
    assert not torch.allclose(kl, forward_kl(t, s))


def test_shifted_logits_are_the_same_distribution():
    s, t = logits(5, 7, 9), logits(5, 7, 10)
    torch.testing.assert_close(forward_kl(s + 100, t - 50, 2.0), forward_kl(s, t, 2.0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_types_are_summed_in_float32(dtype, tolerance):
    s, t, y = logits(64, 1001, 11), logits(64, 1001, 12), torch.arange(64)
    exact = distillation_loss(s, y, t, alpha=0.5, temperature=2.0, num_items=64)
    narrow = distillation_loss(s.to(dtype), y, t.to(dtype), alpha=0.5, temperature=2.0, num_items=64)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(exact.item(), rel=tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_no_rows_give_zero_and_a_zero_gradient(alpha):
    s = torch.empty(0, 5, requires_grad=True)
    loss = distillation_loss(s, torch.empty(0, dtype=torch.long), torch.empty(0, 5), alpha=alpha, num_items=0)
    loss.backward()
    assert loss.item() == 0 and s.grad is not None and s.grad.shape == (0, 5)


def test_a_split_with_the_global_count_adds_up():
    s, t, y = logits(10, 6, 13), logits(10, 6, 14), torch.arange(10) % 6
    args = {"alpha": 0.6, "temperature": 1.5, "num_items": torch.tensor(10)}
    parts = [distillation_loss(s[i], y[i], t[i], **args) for i in (slice(0, 3), slice(3, 3), slice(3, 10))]
    torch.testing.assert_close(sum(parts), distillation_loss(s, y, t, **args))


@pytest.mark.parametrize("change, message", [
    ({"alpha": 1.5}, r"alpha=1.5 must lie between 0 .* and 1"), ({"alpha": -0.1}, "alpha=-0.1"),
    ({"temperature": 0.0}, "temperature=0.0 must be above 0"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"teacher_logits": None}, "alpha=0.5 asks for distillation.*give a teacher or alpha=0"),
    ({"teacher_logits": logits(3, 4)}, r"\(3, 5\) and teacher_logits \(3, 4\) differ in shape")])
def test_bad_input_is_named(change, message):
    given = {"teacher_logits": logits(3, 5), "alpha": 0.5, "num_items": 3, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(3, 5), torch.zeros(3, dtype=torch.long), **given)
