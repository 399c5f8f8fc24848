import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kdlib import lab, models


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", models.LADDER)
def test_ladder_models_are_tied_llamas_of_their_shape(tokenizer, name):
    model, shape = models.build_model(name, tokenizer, 0), models.LADDER[name]
    h, layers = shape["hidden_size"], shape["num_hidden_layers"]
    assert model.config.model_type == "llama" and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ff = model.config.intermediate_size
    assert 8 / 3 * h <= ff < 8 / 3 * h + 16 and ff % 16 == 0
    assert sum(p.numel() for p in model.parameters()) == len(tokenizer) * h + layers * (4 * h * h + 3 * h * ff + 2 * h) + h


def test_the_seed_alone_decides_the_weights(tokenizer):
    torch.manual_seed(5)
    a = weights(models.build_model("nano", tokenizer, 0))
    torch.manual_seed(6)
    assert same(a, weights(models.build_model("nano", tokenizer, 0)))
    assert not same(a, weights(models.build_model("nano", tokenizer, 1)))


def test_an_unknown_name_is_refused_with_the_ladder(tokenizer):
    with pytest.raises(ValueError, match="model='giant' is not allowed; allowed: nano, micro, student"):
        models.build_model("giant", tokenizer, 0)


def test_saved_and_loaded_is_the_same_model_and_tokenizer(tokenizer, student, tmp_path):
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    model, loaded = models.load(tmp_path)
    assert same(weights(student), weights(model)) and not model.training
    assert isinstance(loaded, PreTrainedTokenizerFast) and loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template and loaded.padding_side == "left"
    ids = torch.tensor([loaded("what is 2 + 3 ?")["input_ids"]])
    assert torch.equal(student(ids).logits, model(ids).logits)


def test_word_level_tokens_are_words_and_specials_their_own(tokenizer):
    assert len(tokenizer) == len(lab.vocabulary()) + 6
    ids = tokenizer("<|user|> what is 2 <|end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "what", "is", "2", "<|end|>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_byte_level_bpe_round_trips_any_text():
    tokenizer = models.build_tokenizer(None, ["the cat sat on the mat"] * 50, 290)
    assert 262 < len(tokenizer) <= 290  # bytes, special tokens, merges
    for text in ("the cat", " the  cat\n\tsat", "naïve – ‘Ωmega’ 日本 🙂", "<b>&amp;</b>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat")


def test_a_prompt_is_the_start_of_its_conversation(tokenizer):
    chat = [{"role": "user", "content": "sort c a ."}, {"role": "assistant", "content": "a c"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[:len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
