"""What a causal LM says: its hidden states or logits at chosen positions only, and its own answers."""

from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from itertools import accumulate
from unittest.mock import patch  # an attribute for a while, and then what was there

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kdlib.data import IGNORE
from kdlib.losses import Head, Hidden

torch.backends.cuda.enable_cudnn_sdp(False)  # which plans anew for every length: answers took ten times as long
ROWS = "sdpa_rows"  # an attention's name: torch's, which reads the rows of one sequence apart if told their lengths


def _rows_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA; where integers (1, 1, 1, rows) stand for the mask, causal within each of so many tokens of query, key and value."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not hasattr(attention_mask, "lengths"):  # one mask for all layers
        attention_mask.lengths = attention_mask.flatten().tolist()
    lengths, device = attention_mask.lengths, query.device
    kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    if at_once := kind in (torch.float16, torch.bfloat16) and not kwargs.get("dropout") and _varlen(device, kind, query.shape[-1]):
        if not hasattr(attention_mask, "bounds"):
            attention_mask.bounds = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32).to(device, non_blocking=True)
        bounds = attention_mask.bounds
        key, value = (x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        query, key, value = (x[0].transpose(0, 1).to(kind) for x in (query, key, value))
        return at_once(query, key, value, bounds, bounds, *[max(lengths)] * 2, scale=kwargs.get("scaling"), window_size=(-1, 0))[None], None
    rows = zip(*(x.split(lengths, 2) for x in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], 1), None


@lru_cache
def _varlen(device: torch.device, dtype: torch.dtype, width: int):
    """Torch's attention to many rows at once, if this device has it for heads of such a ``width`` and it says what SDPA says; else None."""
    if device.type != "cuda":
        return None
    x = torch.linspace(-1, 1, 5 * width, device=device, dtype=dtype).view(5, 1, width).sin().requires_grad_()
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    try:
        from torch.nn.attention.varlen import varlen_attn
        with torch.enable_grad():
            (found := varlen_attn(x, x, x, bounds, bounds, 3, 3, scale=1.0, window_size=(-1, 0))).sum().backward()
        apart = [F.scaled_dot_product_attention(*[part.transpose(0, 1)] * 3, is_causal=True, scale=1.0).transpose(0, 1) for part in x.split([2, 3])]
        return varlen_attn if _close(torch.cat(apart), found) else None
    except (ImportError, TypeError, RuntimeError):
        return None


AttentionInterface.register(ROWS, _rows_attention)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def taken(batch: dict) -> dict:
    """What a model takes of a batch."""
    found = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    rows = {"attention_mask": torch.as_tensor(batch["rows"]).cpu().int()[None, None, None]} if "rows" in batch else {}
    return found | rows | {"use_cache": False}


def response_rows(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """``(places, targets)``, both (N,): the positions whose next token is a response token, in (B, L) counted row by row and in that order, and
    those tokens. ``labels`` may be one wider.
    """
    if "places" in batch:
        return batch["places"], batch["targets"]
    nxt = torch.full_like(batch["input_ids"], IGNORE)
    found = batch["labels"][:, 1:]
    nxt[:, :found.shape[1]] = found
    nxt = nxt.flatten()
    places = (nxt != IGNORE).nonzero()[:, 0]
    return places, nxt[places]


def placed(batch: dict) -> dict:
    """``batch`` with what :func:`response_rows` says of it, before it moves to a GPU that would have to be waited for; what is read here stays."""
    here = {k: np.asarray(batch[k]) for k in ("rows", "example") if k in batch}
    return {**batch, **here, **dict(zip(("places", "targets"), response_rows(batch)))}


def at(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What ``hidden`` (B, L, H) is at ``places``: (N, H)."""
    return hidden.flatten(0, 1).index_select(0, places.to(hidden.device))


def response_logits(model, inputs: dict, places: torch.Tensor, wrapped=None) -> torch.Tensor:
    """Logits (N, V) at ``places``, which predict the response tokens, from the model's own forward with all that it does to them."""
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (at(args[0], places), *args[1:])):
        return (model if wrapped is None else wrapped)(**taken(inputs)).logits


def at_head(model, inputs: dict, places: torch.Tensor, compute, wrapped=None):
    """``compute(hidden)`` with the hidden states (N, H) that reach the LM head at ``places``, called inside the forward pass. There, parameters
    that ``wrapped`` shards are whole. What comes after the last attention is done at ``places`` alone, where known.
    """
    results, head, (feed_forward, norm) = [], model.get_output_embeddings(), _after_attention(model)

    def spread(few, like):
        return few.new_zeros(like.shape).flatten(0, 1).index_copy(0, places.to(few.device), few).view(like.shape)

    def forward(hidden):
        results.append(compute(at(hidden, places) if norm is None else hidden[0]))
        # A wrapper looks from the output for the parameters in use; the model may scale or cap what it takes for logits.
        return results[0].sum() * hidden.new_ones(1, 1, 1)

    with ExitStack() as stack:
        stack.enter_context(patch.object(head, "forward", forward))
        if norm is not None:
            dense, last = feed_forward.forward, norm.forward
            stack.enter_context(patch.object(feed_forward, "forward", lambda x: spread(dense(at(x, places)), x)))
            stack.enter_context(patch.object(norm, "forward", lambda x: last(at(x, places))[None]))
        (model if wrapped is None else wrapped)(**taken(inputs))
    return results[0]


def _after_attention(model) -> tuple:
    """The last layer's dense feed-forward part and the final norm in the layout of Llama; Nones elsewhere and if done twice."""
    decoder = model.get_decoder()
    layer, norm = (getattr(decoder, "layers", None) or [None])[-1], getattr(decoder, "norm", None)
    dense = getattr(layer, "_modules", {}).get("mlp")  # not through a wrapper that computes it twice
    known = norm is not None and type(dense).__name__.endswith("MLP") and not getattr(layer, "gradient_checkpointing", False)
    return (dense, norm) if known else (None, None)


@contextmanager
def _few_tokens(model):
    """Inputs of four tokens, and ``model`` in evaluation mode without gradients for a while."""
    training, ids = model.training, torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    model.eval()
    try:
        with torch.no_grad():
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    finally:
        model.train(training)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(a.abs().max()))


def linear_head(model) -> dict | None:
    """``scale`` and ``softcap`` with which :class:`~kdlib.losses.Head` gives the model's logits, as tried; None if it cannot."""
    module, config = model.get_output_embeddings(), model.config
    if type(module) is not torch.nn.Linear:
        return None
    found = {"scale": getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
             "softcap": getattr(config, "final_logit_softcapping", None)}
    head, large = Head(module.weight, module.bias, **found), torch.linspace(-99, 99, module.weight.shape[0]).to(module.weight)
    with _few_tokens(model) as inputs:
        places = torch.tensor([1, 3])
        own = response_logits(model, inputs, places)
        try:
            ours = at_head(model, inputs, places, lambda hidden: Hidden(hidden, head).logits).to(own.dtype)
        except (TypeError, ValueError, RuntimeError, IndexError):  # the layout of Llama by name alone
            return None
        with patch.object(module, "forward", lambda hidden: large.expand(*hidden.shape[:-1], -1)):
            shaped = model(**inputs, use_cache=False).logits[0]
    return found if _close(own, ours) and _close(shaped, head.shape(large).expand_as(shaped)) else None


def keeps_rows_apart(model) -> bool:
    """Whether rows that share a sequence do not read each other, to the bit, as packing needs; if so, its SDPA is taught to, for good."""
    config = model.config.get_text_config(decoder=True)
    if model.config._attn_implementation == "sdpa" and not any(getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")):
        model.set_attn_implementation(ROWS)
    same = [model.config._attn_implementation == ROWS]
    with _few_tokens(model) as inputs, suppress(TypeError, ValueError, RuntimeError, IndexError):
        row = (config.vocab_size - 1 - inputs["input_ids"]).clamp(min=0)  # the first ids are special, and padding may be nothing
        alone, marks = model(input_ids=row, use_cache=False).logits, torch.arange(4, device=row.device).repeat(2, 2)
        for told in ({"position_ids": marks}, {"position_ids": marks[:1], "rows": torch.tensor([4, 4])}):
            first, other = (model(**taken({"input_ids": torch.cat([before, row], 1).expand(len(told["position_ids"]), -1), **told})).logits[:, 4:]
                            for before in (row, row.flip(1)))
            same.append(torch.equal(first, other) and _close(alone.expand_as(first), first))
    if not (apart := len(same) == 3 and all(same)) and model.config._attn_implementation == ROWS:
        model.set_attn_implementation("sdpa")
    return apart


def _rms_norm(norm, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def fuse_norms(model) -> None:
    """Have torch's own RMS norm do those of ``model`` that say the same as it, for good: on a GPU one kernel, not six; on a processor in float32
    the same to the bit.
    """
    for norm in [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon") and "forward" not in vars(m)]:
        few = torch.linspace(-3, 3, len(norm.weight)).to(norm.weight)[None]
        with torch.no_grad():
            if _close(norm(few), _rms_norm(norm, few)):
                norm.forward = partial(_rms_norm, norm)


class _Room(DynamicLayer):
    """Keys and values of a layer in memory that is taken once, with room for so many more tokens; the plain layer copies all at every token."""

    def __init__(self, more: int):
        super().__init__()
        self.more = more

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values so far, the new ones behind."""
        past, whole = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [x.new_empty(*x.shape[:2], whole + self.more, x.shape[3]) for x in (key_states, value_states)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, past:whole] = new
        self.keys, self.values = (room[:, :, :whole] for room in self.room)
        return self.keys, self.values


def _cache(model, more: int) -> dict:
    """What tells ``model.generate`` to take :class:`_Room`; nothing unless every layer keeps all that it has seen."""
    cache = DynamicCache(config=model.config)
    if not model._supports_default_dynamic_cache() or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [_Room(more) for _ in cache.layers]
    return {"past_key_values": cache}


def answered_at_once(longest: int, width: int, device: str = "cuda") -> int:
    """How many rows of up to ``longest`` tokens are generated at once, where a token's keys and values take ``width`` bytes: on a processor up
    to 256 of 20,000 tokens, elsewhere up to 1024, which take hardly longer than one, of 2**17 tokens or what 8 GiB hold, while masks are small.
    """
    rows, tokens = (256, 20_000) if device == "cpu" else (min(1024, max(2**29 // longest, 2**17) // longest), max(2**17, 2**33 // width))
    return max(1, min(rows, tokens // longest))


@torch.no_grad()
def generate(model, prompts: list[list[int]], *, max_new_tokens: int, pad_token_id: int, eos_token_id: int, temperature: float = 0.0,
             batch_size: int | None = None, vocabulary: int | None = None) -> list[list[int]]:
    """Answers (token ids, with the end token if it came) to ``prompts``, greedy at temperature 0, else sampled, below ``vocabulary``."""
    answers, order = [[]] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    how["suppress_tokens"] = list(range(vocabulary or 10**9, model.get_output_embeddings().weight.shape[0])) or None
    inner = getattr(model, "get_base_model", lambda: model)()  # of adapters, which write to it
    longest = max(map(len, prompts), default=0) + max_new_tokens
    config = model.config.get_text_config(decoder=True)
    heads, few, dim = (getattr(config, n, None) for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    width = 2 * config.num_hidden_layers * (few or heads or 1) * (dim or config.hidden_size // (heads or 1)) * model.dtype.itemsize
    batch_size = batch_size or answered_at_once(longest, width, model.device.type)
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        ids, seen = (pad_sequence([torch.tensor(row(prompts[i])) for i in chunk], True, filler, "left").to(model.device)
                     for row, filler in ((list, pad_token_id or 0), (lambda p: [1] * len(p), 0)))
        with (patch.object(inner, "generation_config", GenerationConfig()),  # a model's top_p or penalties are not its distribution
              patch.object(model, "generation_config", GenerationConfig())):
            out = model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id,
                                 eos_token_id=eos_token_id, **_cache(model, max_new_tokens), **how)[:, ids.shape[1]:].tolist()
        for i, answer in zip(chunk, out):
            answers[i] = answer[:answer.index(eos_token_id) + 1] if eos_token_id in answer else answer
    return answers
