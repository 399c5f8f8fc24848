"""From-scratch Llamas by name, their tokenizers (with a chat template that marks the assistant's tokens), and loading."""

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers  # whose parts come when they are first used
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdlib import store
from kdlib.presets import check

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or pickled weights would be asked of the hub in another form, from another commit
TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
LADDER, SPECIAL, ROLES, CHAT_TEMPLATE = (TEXT[k] for k in ("ladder", "special", "roles", "chat_template"))
REMEDIES = [(tuple(r["marks"]), r["say"]) for r in TEXT["remedies"]]


def build_tokenizer(vocabulary: list[str] | None, texts: Iterable[str] = (), vocab_size: int = 4096) -> "transformers.PreTrainedTokenizerFast":
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
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", chat_template=CHAT_TEMPLATE, **SPECIAL,
                                   extra_special_tokens=ROLES, clean_up_tokenization_spaces=False)


def build_model(name: str, tokenizer, seed: int, max_length: int = 512) -> "transformers.LlamaForCausalLM":
    """A freshly initialised model of the ladder; ``seed`` alone decides its weights. Raises ValueError on a name unknown."""
    check("model", name, str, ", ".join(LADDER), LADDER.__contains__)
    feed_forward = -(-LADDER[name]["hidden_size"] * 8 // 48) * 16  # 8/3 of it as in Llama, rounded up to a multiple of 16
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), intermediate_size=feed_forward, max_position_embeddings=max_length, tie_word_embeddings=True,
                         bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **LADDER[name])
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def tokens_of(tokenizer) -> dict[str, int]:
    """A tokenizer's tokens and their ids, but for a padding token that was added behind all others."""
    tokens, pad = tokenizer.get_vocab(), getattr(tokenizer, "pad_token", None)
    last = pad in tokens and tokens[pad] == max(tokens.values()) and pad != tokenizer.eos_token
    return {t: i for t, i in tokens.items() if not (last and t == pad)}


def size_of(tokenizer) -> int:
    """How many of a head's columns belong to tokens; padding, of the tokenizer or of the head, lies behind them."""
    return max(tokens_of(tokenizer).values()) + 1


def common_vocabulary(student, teacher, student_width: int, teacher_width: int) -> int:
    """The number of tokens that two tokenizers share, id by id, padding behind them aside, of heads as of tokenizers. ValueError, naming the
    first tokens, if they are unlike.
    """
    if student is None or teacher is None:
        raise ValueError("Distillation needs the tokenizers of student (processing_class) and teacher, to compare their tokens.")
    ours, theirs = tokens_of(student), tokens_of(teacher)
    ids = theirs | ours
    if odd := sorted((t for t in ids if ours.get(t) != theirs.get(t)), key=lambda t: (ids[t], t)):
        some = ", ".join(f"{t!r} ({ours.get(t)} and {theirs.get(t)})" for t in odd[:3])
        raise ValueError(f"Student and teacher need the same token ids, but {len(odd)} tokens differ, among them {some}.")
    if (size := size_of(student)) > min(student_width, teacher_width):
        raise ValueError(f"The tokenizer has {size} tokens, but the student's head {student_width} and the teacher's {teacher_width}.")
    return size


def device() -> torch.device | str:
    """The accelerator if there is one, else the processor."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"


def _local(name: str | Path) -> str:
    """The folder of a model: itself, or its copy under KDLIB_MODELS; else its hub id."""
    mirror = Path(os.environ.get("KDLIB_MODELS") or "/dev/null") / name
    return str(mirror if mirror.is_dir() else name)


def origin(name: str) -> dict[str, str] | None:
    """What tells the copy of a model under KDLIB_MODELS from others of its name: of every file its size and a hash of its first 16 MiB.
    None without such a copy.
    """
    folder = Path(_local(name))
    files = sorted(p for p in folder.glob("*") if p.is_file()) if "KDLIB_MODELS" in os.environ and str(folder) != name else ()
    return {f"{name}/{p.name}": f"{p.stat().st_size}-{store.file_hash(p, 2**24)}" for p in files} or None


def commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's revision was when it was last loaded here; None of a folder, and of what never was."""
    found = None if Path(_local(name)).is_dir() else try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _trusted(name: str | Path, trust: tuple) -> bool:
    return str(name) in {*trust, *os.environ.get("KDLIB_TRUST", "").split(",")}


def _reach(make, name: str | Path, revision: str | None, trust: tuple, **how):
    """``make.from_pretrained``; what goes wrong as one sentence with the remedy. Names in ``trust`` may run code and unpickle weights."""
    try:
        return make.from_pretrained(_local(name), revision=revision or "main", trust_remote_code=_trusted(name, trust), **how)
    except torch.OutOfMemoryError:  # no fault of the files
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        said, here = " ".join(str(error).split()), Path(_local(name)).is_dir()
        remedy = next((say for marks, say in REMEDIES if any(m in said.replace(str(name), "") for m in marks)), REMEDIES[-2 if here else -1][1]).format(name=name)
        what, why = f"{name!r}{f' at {revision!r}' if revision and not here else ''}", (said or "no reason given")[:160]
        raise ValueError(f"{what} cannot be loaded ({type(error).__name__}: {why}): {remedy}") from error


def load_tokenizer(name: str | Path, revision: str | None = None, template: str | None = None, trust: tuple = ()):
    """The tokenizer of a folder or hub id, which pads left. ``template`` names one of kdlib's chat templates, whose turns end as it says, in
    place of the tokenizer's own. ValueError if it cannot be had, or lacks the token that ends a turn.
    """
    tokenizer = _reach(transformers.AutoTokenizer, name, revision, trust, padding_side="left")
    if template is not None:
        chosen = TEXT["templates"][check("template", template, str, ", ".join(TEXT["templates"]), TEXT["templates"].__contains__)]
        if (end := chosen.get("end", tokenizer.eos_token)) not in tokenizer.get_vocab():
            raise ValueError(f"template={template!r} ends turns with {end!r}, which the tokenizer of {name!r} lacks; allowed: another template.")
        tokenizer.chat_template, tokenizer.eos_token = chosen["text"], end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks say what is padding, not the token
    return tokenizer


def configuration(name: str | Path, revision: str | None = None, trust: tuple = ()):
    """The configuration of a model's text part. ValueError if it is no causal LM, or adapters to one."""
    if (folder := Path(_local(name))).is_dir() and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} holds adapters to a model; allowed: a whole model, as peft's merge_and_unload makes it.")
    config = _reach(transformers.AutoConfig, name, revision, trust)
    made = [config.architectures] if isinstance(config.architectures, str) else config.architectures or [config.model_type]
    other = type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or any(not kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", config.model_type)) for kind in made)
    if (other or config.is_encoder_decoder or not getattr(config, "is_decoder", True)) and not _trusted(name, trust):
        raise ValueError(f"{name!r} is a {made[0]}; allowed: models that predict the next token (causal LMs).")
    return config.get_text_config()


def width(name: str | Path, revision: str | None = None) -> int:
    """The number of rows of a model's LM head, by its configuration."""
    return configuration(name, revision).vocab_size


def load(name: str | Path, revision: str | None = None, template: str | None = None, trust: tuple = (), device=device, **how):
    """``(model, tokenizer)`` of a folder that ``save_pretrained`` of both wrote, of its copy under KDLIB_MODELS, or of a hub id, on the
    accelerator if there is one; ``how`` as in ``from_pretrained``. Safetensors only, and no code of the model's own, but for names in
    ``trust`` or, with commas between, in KDLIB_TRUST. ValueError, with the remedy, if it cannot be had.
    """
    tokenizer, _ = load_tokenizer(name, revision, template, trust), configuration(name, revision, trust)
    model, found = _reach(transformers.AutoModelForCausalLM, name, revision, trust, use_safetensors=None if _trusted(name, trust) else True, output_loading_info=True, **how)
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(f"{name!r} lacks {len(lacking)} of its weights, {lacking[0]} among them, which would be drawn at random; copy it again, or give a causal LM.")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return (model if "device_map" in how else model.to(device() if callable(device) else device)).eval(), tokenizer
