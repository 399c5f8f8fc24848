"""What a causal LM says: its hidden states or logits at chosen positions only, and its own answers."""

import torch
from torch import nn
from transformers import GenerationConfig

from kdlib.data import IGNORE
from kdlib.losses import Head, Hidden

INPUTS = ("input_ids", "attention_mask", "position_ids")


def response_rows(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(mask, targets)``: positions (B, L) whose next token is a response token, and those tokens (N,)."""
    nxt = torch.full_like(labels, IGNORE)
    nxt[:, :-1] = labels[:, 1:]
    mask = nxt != IGNORE
    return mask, nxt[mask]


def response_logits(model, inputs: dict, mask: torch.Tensor, wrapped=None) -> torch.Tensor:
    """Logits (N, V) that predict the response tokens; ``mask`` (B, L) marks the positions that predict one.

    The model's own forward runs as it is, so whatever it does to logits stays in force.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][mask], *args[1:]))
    try:
        return (wrapped or model)(**{k: inputs[k] for k in INPUTS if k in inputs}, use_cache=False).logits
    finally:
        handle.remove()


def at_head(model, inputs: dict, mask: torch.Tensor, compute, wrapped=None):
    """``compute(hidden)`` with the hidden states (N, H) that reach the LM head at ``mask``, called inside the forward pass.

    Inside it, parameters that a wrapper shards or synchronises (``wrapped``, if it is not ``model`` itself) are whole.
    """
    head, results = model.get_output_embeddings(), []
    own = vars(head).get("forward")  # of a library that hooks modules

    def forward(hidden):
        results.append(compute(hidden[mask]))
        # A wrapper looks from the output for the parameters in use; the model may scale or cap what it takes for logits.
        return results[0].sum() * hidden.new_ones(1, 1, 1)

    head.forward = forward
    try:
        (wrapped or model)(**{k: inputs[k] for k in INPUTS if k in inputs}, use_cache=False)
    finally:
        del head.forward
        vars(head).update({"forward": own} if own else {})
    return results[0]


@torch.no_grad()
def linear_head(model) -> dict | None:
    """``scale`` and ``softcap`` with which :class:`~kdlib.losses.Head` gives the model's own logits; None if it cannot.

    Read from the configuration and checked on a few tokens, so that any other model falls back to its own forward pass.
    """
    module, config = model.get_output_embeddings(), model.config
    if type(module) is not nn.Linear:
        return None
    found = {"scale": getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
             "softcap": getattr(config, "final_logit_softcapping", None)}
    ids = torch.arange(4, device=module.weight.device)[None] % config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mask = torch.ones_like(ids, dtype=torch.bool)
    training = model.training
    model.eval()
    try:
        own = response_logits(model, inputs, mask).float()
        ours = at_head(model, inputs, mask, lambda hidden: Hidden(hidden, Head(module.weight, module.bias, **found)).logits).float()
    finally:
        model.train(training)
    return found if torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())) else None


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, max_new_tokens: int, pad_token_id: int, eos_token_id: int, temperature: float = 0.0,
             batch_size: int = 256) -> list[list[int]]:
    """Answers (token ids, the end token included if it came) to ``prompts``, greedy at temperature 0, else sampled.

    Prompts of like length go together, padded on the left; keys and values are kept from token to token.
    """
    answers, order = [[]] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    habits = model.generation_config  # a model's top_p or penalties are not its distribution
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        width = max(len(prompts[i]) for i in chunk)
        ids = torch.tensor([[pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in chunk], device=model.device)
        seen = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=model.device)
        try:
            model.generation_config = GenerationConfig()
            out = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id,
                                 eos_token_id=eos_token_id, **how)[:, width:].tolist()
        finally:
            model.generation_config = habits
        for i, answer in zip(chunk, out):
            answers[i] = answer[:answer.index(eos_token_id) + 1] if eos_token_id in answer else answer
    return answers
