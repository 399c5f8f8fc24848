import copy
import pickle
from functools import partial

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kdlib import inference
from kdlib.losses import Head, Hidden

SIZE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
OPENAI = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {  # the configuration, and whether what comes after the last attention is known
    "Llama": (SIZE, True), "Qwen2": (SIZE, True), "Qwen3": (SIZE, True), "Mistral": ({**SIZE, "sliding_window": 4}, True),
    "Gemma2": ({**SIZE, "final_logit_softcapping": 3.0, "sliding_window": 4, "query_pre_attn_scalar": 8}, True),
    "Granite": ({**SIZE, "logits_scaling": 4.0, "embedding_multiplier": 2.0}, True),
    "Cohere": ({**SIZE, "logit_scale": 0.3}, True), "Phi3": (SIZE, True), "Olmo2": (SIZE, True),
    "Mixtral": ({**SIZE, "num_local_experts": 2}, False), "GPT2": (OPENAI, False), "GPTNeoX": (SIZE, False)}
OTHERS = {"RecurrentGemma": {**SIZE, "num_hidden_layers": 3, "attention_window_size": 4}, "Mamba": {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2},
          "Rwkv": {"vocab_size": 60, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}}


def model_of(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(OTHERS.get(family) or FAMILIES[family][0]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    return model


def batch_of():
    ids = torch.arange(3, 27).reshape(2, 12) % 60
    seen = torch.ones_like(ids)
    seen[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": seen}, torch.tensor([2, 3, 7, 10, 13, 20])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reaches_the_head_gives_the_models_own_logits_and_gradients(family):
    model, (inputs, places) = model_of(family), batch_of()
    found, head = inference.linear_head(model), model.get_output_embeddings()
    assert found is not None and (inference._after_attention(model)[1] is not None) == FAMILIES[family][1]
    weight = torch.randn(len(places), 60, generator=torch.Generator().manual_seed(1))
    ways = (lambda: model(**inputs).logits.flatten(0, 1)[places], lambda: inference.response_logits(model, inputs, places),
            lambda: inference.at_head(model, inputs, places, lambda hidden: Hidden(hidden, Head(head.weight, head.bias, **found)).logits))
    logits = [way() for way in ways]
    slopes = [torch.autograd.grad((values * weight).sum(), list(model.parameters()), allow_unused=True) for values in logits]
    for other in (1, 2):
        torch.testing.assert_close(logits[0], logits[other], rtol=1e-4, atol=1e-5)
        for a, b in zip(slopes[0], slopes[other]):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-7)
    assert not any("forward" in vars(m) for m in model.modules()), "nothing is left behind"


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_sequence_are_as_alone_where_the_model_can(family):
    model = model_of(family)
    taught = model.config._attn_implementation == "sdpa" and not getattr(model.config, "sliding_window", None)
    ids, marks, lengths = torch.arange(5, 18)[None], torch.tensor([[*range(5), *range(8)]]), torch.tensor([5, 8])
    apart = torch.cat([model(input_ids=part).logits[0] for part in ids.split(lengths.tolist(), 1)])
    slopes = torch.autograd.grad(apart.square().sum(), list(model.parameters()), allow_unused=True)
    if not inference.keeps_rows_apart(model):
        assert not taught or not torch.allclose(model(input_ids=ids, position_ids=marks, use_cache=False).logits[0], apart, rtol=1e-3, atol=1e-4)
        return
    assert taught
    for told in ({}, {"rows": lengths}):
        together = model(**inference.taken({"input_ids": ids, "position_ids": marks, **told})).logits[0]
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        for a, b in zip(slopes, torch.autograd.grad(together.square().sum(), list(model.parameters()), allow_unused=True)):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-7)


@pytest.mark.parametrize("family, settings", [
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}), ("Mistral", {"sliding_window": 6}), ("Llama4Text", {"attention_chunk_size": 6}),
    ("Phimoe", {"sliding_window": 6, "num_local_experts": 2}), ("Doge", {}), ("Bloom", {})])
def test_fresh_models_whose_rows_would_read_each_other_are_refused(family, settings):
    """Convolutions read across the border, a little; a window that only the mask knows would be lost; others add to masks."""
    torch.manual_seed(0)
    size = {k: v for k, v in SIZE.items() if family != "Bloom" or k == "vocab_size"}
    config = getattr(transformers, f"{family}Config")(**size, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if family != "Bloom" else None)
    before = model.config._attn_implementation
    assert not inference.keeps_rows_apart(model) and model.config._attn_implementation == before


def test_an_attention_that_reads_rows_apart_says_the_same_elsewhere_and_is_not_saved():
    plain, taught, (inputs, _) = model_of("Qwen3"), model_of("Qwen3"), batch_of()
    assert inference.keeps_rows_apart(taught) and "sdpa_rows" not in taught.config.to_json_string()
    torch.testing.assert_close(plain(**inputs).logits, taught(**inputs).logits, rtol=0, atol=0)
    how = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 2}
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    assert inference.generate(plain, prompts, **how) == inference.generate(taught, prompts, **how)


@pytest.mark.parametrize("half", [torch.bfloat16, None])
def test_rows_are_read_at_once_where_torch_can(monkeypatch, half):
    """On CUDA; here by a plain function of the same arguments as torch's."""
    def at_once(query, key, value, starts, others, longest, long, *, scale, window_size):
        assert window_size == (-1, 0) and longest == long == int(starts.diff().max()) and starts is others and starts.dtype == torch.int32
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.shape == key.shape == value.shape
        rows = zip(*(x.transpose(0, 1).tensor_split(starts[1:-1].long(), 1) for x in (query, key, value)))
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=scale) for row in rows], 1).transpose(0, 1)

    assert inference._varlen(torch.device("cpu"), torch.bfloat16, 8) is None and not torch.backends.cuda.cudnn_sdp_enabled()
    model, asked = model_of("Qwen3").to(half or torch.float32), []
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert inference.keeps_rows_apart(model)
    batch = {"input_ids": torch.arange(5, 12)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "rows": torch.tensor([3, 4])}
    with torch.autocast("cpu", enabled=half is None):  # under which rotation leaves wider queries and keys
        apart = model(**inference.taken(batch)).logits
        monkeypatch.setattr(inference, "_varlen", lambda *about: (asked.append(about), at_once)[1])
        together = model(**inference.taken(batch)).logits
    assert asked and {about[1] for about in asked} == {torch.bfloat16}
    torch.testing.assert_close(together, apart, rtol=2e-2, atol=2e-2)


def test_a_model_that_ignores_positions_does_not_keep_rows_apart():
    class Deaf(LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    assert not inference.keeps_rows_apart(Deaf(model_of("Llama").config))
    assert inference.keeps_rows_apart(model_of("Llama"))


@pytest.mark.parametrize("change", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.5}])
def test_a_head_is_not_trusted_on_its_configuration(change):
    """Small logits pass through a cap of 30 as if there were none, so a few tokens would not show it."""
    model = model_of("Llama")
    for name, value in change.items():
        setattr(model.config, name, value)  # Llama has no such thing
    assert inference.linear_head(model) is None


@pytest.mark.parametrize("by", ["transformers", "a wrapper"])
def test_layers_that_are_computed_twice_are_left_as_they_are(by):
    model, (inputs, places) = model_of("Llama"), batch_of()
    twice = copy.deepcopy(model).train()
    if by == "transformers":
        twice.gradient_checkpointing_enable()
    else:
        twice.model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, twice.model.layers))
    slopes = []
    for m in (model, twice):
        m.train()
        inference.at_head(m, inputs, places, lambda hidden: hidden.square().sum()).backward()
        slopes.append([p.grad for p in m.model.parameters()])
    for a, b in zip(*slopes):
        torch.testing.assert_close(a, b)


def test_an_architecture_that_has_the_names_alone_uses_its_own_forward_pass():
    config = transformers.GptOssConfig(**SIZE, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    model, (inputs, places) = transformers.AutoModelForCausalLM.from_config(config).eval(), batch_of()
    assert inference.linear_head(model) is None and not any("forward" in vars(m) for m in model.modules())
    torch.testing.assert_close(inference.response_logits(model, inputs, places), model(**inputs).logits.flatten(0, 1)[places])


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_keys_and_values_that_are_kept_in_place_change_no_digit(family, monkeypatch):
    model = model_of(family)
    prompts = [[5, 9, 13], [7, 7], [20, 30, 40, 50, 6, 8]]
    kept = inference._cache(model, 4)
    assert bool(kept) == (family not in ("Mistral", "Gemma2", *OTHERS))
    how = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 59, "temperature": 1.0}
    found = []
    for cache in (inference._cache, lambda *_: {}):
        monkeypatch.setattr(inference, "_cache", cache)
        torch.manual_seed(0)
        found.append(inference.generate(model, prompts, **how))
    assert found[0] == found[1] and max(map(len, found[0])) == 6
    if kept:
        steps = torch.arange(3, 12).reshape(1, 9), torch.arange(20, 29).reshape(1, 9)
        plain = None
        for ids in torch.cat(steps).split([6, 1, 1, 1], 1):
            ours, theirs = model(input_ids=ids, **kept), model(input_ids=ids, past_key_values=plain, use_cache=True)
            plain = theirs.past_key_values
            assert torch.equal(ours.logits, theirs.logits)
        assert kept["past_key_values"].get_seq_length() == 9


@pytest.mark.parametrize("family, fused", [("Llama", 5), ("Qwen3", 9), ("Mixtral", 5), ("Gemma2", 0), ("GPT2", 0)])
def test_norms_done_at_once_change_no_digit(family, fused):
    before, (inputs, places) = model_of(family), batch_of()
    inference.fuse_norms(after := copy.deepcopy(before))
    assert sum("forward" in vars(module) for module in after.modules()) == fused
    values, slopes = zip(*((logits, torch.autograd.grad(logits.flatten(0, 1)[places].logsumexp(-1).sum(), list(model.parameters())))
                           for model in (before, copy.deepcopy(after)) for logits in [model(**inputs).logits]))
    assert torch.equal(*values) and all(map(torch.equal, *slopes))
    half = [model.bfloat16()(**inputs).logits.detach().float() for model in (before, after)]
    torch.testing.assert_close(*half, rtol=0.05, atol=0.05 * float(half[0].abs().max()))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_with_norms_done_at_once_has_its_own_weights(again):
    inference.fuse_norms(model := model_of("Llama"))
    other, (inputs, _) = again(model), batch_of()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        assert not model(**inputs).logits.any() and other(**inputs).logits.any()


def test_a_norm_of_another_formula_or_that_somebody_changed_is_left_alone():
    class PlusOneRMSNorm(LlamaRMSNorm):
        def forward(self, hidden):
            return super().forward(hidden) * (1 + 1 / self.weight)

    model = torch.nn.ModuleList([PlusOneRMSNorm(8), LlamaRMSNorm(8), LlamaRMSNorm(8)])
    model[1].forward = theirs = model[1].forward
    inference.fuse_norms(model)
    assert "forward" not in vars(model[0]) and model[1].forward is theirs and isinstance(model[2].forward, partial)


@pytest.mark.parametrize("family, width", [("Llama", 2 * 2 * 2 * 8 * 4), ("GPT2", 2 * 2 * 4 * 8 * 4), ("Mamba", 2 * 2 * 32 * 4)])
def test_as_many_rows_are_generated_at_once_as_their_keys_and_values_leave_room(family, width, monkeypatch):
    seen, model, real = [], model_of(family), inference.answered_at_once
    monkeypatch.setattr(inference, "answered_at_once", lambda *told: seen.append(told) or real(*told))
    inference.generate(model, [[5, 6], [7]], max_new_tokens=3, pad_token_id=0, eos_token_id=2)
    assert seen == [(5, width, "cpu")]


@pytest.mark.parametrize("longest, width, device, rows", [
    (16, 1, "cpu", 256), (320, 1, "cpu", 62), (10**6, 1, "cpu", 1), (100, 2**17, "cuda", 1024), (512, 2**17, "cuda", 256), (512, 2**15, "cuda", 512),
    (4096, 2**10, "cuda", 32), (2**18, 2**20, "cuda", 1)])
def test_rows_generated_at_once(longest, width, device, rows):
    assert inference.answered_at_once(longest, width, device) == rows
