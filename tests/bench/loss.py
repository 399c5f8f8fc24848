"""One process, one form of the loss: ``python tests/bench/loss.py FORM TOKENS VOCABULARY SHARE`` prints memory and time.

Forward KL of a student to a teacher from their hidden states, with all gradients. Naive: every position through both heads, whole
distributions, then the mask. Chunked: the positions of the response, ``SHARE`` of all, through ``linear_distillation_loss``; "chunked 64" in chunks of 64 rows.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from step import memory

from kdlib.losses import Head, Hidden, linear_distillation_loss


def naive(hidden, weight, mask, targets, states, head, rows):
    log_q = F.log_softmax(F.linear(hidden, weight).float(), -1)
    log_p = F.log_softmax(head.linear(states).float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[mask].sum() / mask.sum()


def chunked(hidden, weight, mask, targets, states, head, rows):
    return linear_distillation_loss(hidden[mask], Head(weight), targets[mask], Hidden(states[mask], head), num_items=mask.sum(),
                                    chunk_size=rows)


def main(form: str, tokens: int, vocabulary: int, share: float) -> dict:
    torch.set_num_threads(2)
    cuda = torch.cuda.is_available()
    place = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    sizes = (2048, 4096) if cuda else (256, 512)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(**place)

    weight, other = (drawn(vocabulary, width).requires_grad_(i == 0) for i, width in enumerate(sizes))
    hidden, states = (drawn(tokens, width).mul_(width ** 0.5).requires_grad_(i == 0) for i, width in enumerate(sizes))
    mask = (torch.rand(tokens, generator=generator) < share).to(hidden.device)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(hidden.device)
    start = memory(anew=True)
    began = time.perf_counter()
    name, _, rows = form.partition(" ")
    compute = {"naive": naive, "chunked": chunked}[name]
    loss = compute(hidden, weight, mask, targets, states, Head(other), int(rows) if rows else None)
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - began
    return {"form": form, "tokens": tokens, "vocabulary": vocabulary, "share": share, "peak_mib": memory() - start, "seconds": seconds,
            "loss": value, "gradient_norm": float(weight.grad.float().norm())}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
