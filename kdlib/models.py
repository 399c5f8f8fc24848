"""From-scratch Llamas by name, their tokenizers (with a chat template that marks the assistant's tokens), and loading."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdlib.presets import check

TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
LADDER, SPECIAL, ROLES, CHAT_TEMPLATE = (TEXT[k] for k in ("ladder", "special", "roles", "chat_template"))


def build_tokenizer(vocabulary: list[str] | None, texts: Iterable[str] = (), vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a closed ``vocabulary``, or without one a byte-level BPE trained on ``texts``."""
    special = [*SPECIAL.values(), *ROLES]
    if vocabulary is not None:
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + vocabulary)}, SPECIAL["unk_token"]))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", chat_template=CHAT_TEMPLATE, **SPECIAL,
                                   extra_special_tokens=ROLES, clean_up_tokenization_spaces=False)


def build_model(name: str, tokenizer, seed: int, max_length: int = 512) -> LlamaForCausalLM:
    """A freshly initialised model of the ladder; ``seed`` alone decides its weights. Raises ValueError on a name unknown."""
    check("model", name, str, ", ".join(LADDER), LADDER.__contains__)
    feed_forward = -(-LADDER[name]["hidden_size"] * 8 // 48) * 16  # 8/3 of it as in Llama, rounded up to a multiple of 16
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=feed_forward, max_position_embeddings=max_length, tie_word_embeddings=True,
                         bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **LADDER[name])
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def common_vocabulary(student, teacher, student_width: int, teacher_width: int) -> int:
    """The number of tokens that two tokenizers share, id by id; heads may be padded beyond. ValueError, naming tokens, if unlike."""
    if student is None or teacher is None:
        raise ValueError("Distillation needs the tokenizers of student (processing_class) and teacher, to compare their tokens.")
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    ids = theirs | ours
    if odd := sorted((t for t in ids if ours.get(t) != theirs.get(t)), key=lambda t: (ids[t], t)):
        some = ", ".join(f"{t!r} ({ours.get(t)} and {theirs.get(t)})" for t in odd[:3])
        raise ValueError(f"Student and teacher need the same token ids, but {len(odd)} tokens differ, among them {some}.")
    if (size := max(ours.values()) + 1) > min(student_width, teacher_width):
        raise ValueError(f"The tokenizer has {size} tokens, but the student's head {student_width} and the teacher's {teacher_width}.")
    return size


def load(path: str | Path):
    """``(model, tokenizer)`` from a folder that ``save_pretrained`` of both wrote, on the accelerator if there is one; safetensors only."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True).to(device).eval(), tokenizer
