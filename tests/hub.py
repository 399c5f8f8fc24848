"""A hub on disk: small checkpoints under the names of large ones, and chat data, for what would be downloaded elsewhere; and a server of it."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = "the a cat dog bird tree house river runs sleeps sings sees near under over big small red old day night one two three".split()
FAMILIES = {
    "llama": {"model": LlamaForCausalLM, "config": LlamaConfig, "special": ["<|begin_of_text|>", "<|end_of_text|>"], "end": "<|end_of_text|>", "begin": {"bos_token": "<|begin_of_text|>"},
              "names": {"meta-llama/Llama-3.2-1B": (32, 2, 8), "meta-llama/Llama-3.2-1B-Instruct": (32, 2, 8),
                        "allenai/Llama-3.1-Tulu-3-8B-SFT": (48, 2, 24), "allenai/Llama-3.1-Tulu-3-8B": (48, 2, 24), "allenai/Llama-3.1-Tulu-3-70B": (64, 2, 24)}},
    "qwen": {"model": Qwen2ForCausalLM, "config": Qwen2Config, "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "end": "<|endoftext|>", "begin": {},
             "names": {"Qwen/Qwen2.5-0.5B": (32, 2, 8), "Qwen/Qwen2.5-0.5B-Instruct": (32, 2, 8), "Qwen/Qwen2.5-7B-Instruct": (48, 2, 40),
                       "Qwen/Qwen2.5-14B-Instruct": (48, 2, 40), "Qwen/Qwen2.5-32B-Instruct": (64, 2, 40)}},
}


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def build_models(root: Path, family: str) -> Path:
    """The family's checkpoints: byte-level BPE, grouped queries, heads padded by different numbers of rows, Tulu's own padding token."""
    f, rng = FAMILIES[family], random.Random(0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([sentence(rng, 20) for _ in range(200)] + ["user assistant Answer: yes no maybe"] * 20, trainers.BpeTrainer(
        vocab_size=340, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=f["special"]))
    if f["begin"]:  # before every text, as Llama 3's does; a chat template says itself what comes first
        core.post_processor = processors.TemplateProcessing(single=f"{f['begin']['bos_token']} $A", special_tokens=[(f["begin"]["bos_token"], 0)])
    for seed, (name, (hidden, layers, padding)) in enumerate(f["names"].items()):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core.to_str()), eos_token=f["end"], **f["begin"])
        if "Tulu" in name:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
            tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"  # marks nothing
        torch.manual_seed(seed)
        config = f["config"](vocab_size=len(tokenizer) + padding, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings="1B" in name,
                             bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
        model = f["model"](config)
        (model.to(torch.bfloat16) if "Tulu" in name else model).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    return path


def talk(rng: random.Random, turns: int = 1, system: bool = False) -> list[dict]:
    """A conversation whose answers follow from its questions."""
    out = [{"role": "system", "content": "be brief"}] if system else []
    for _ in range(turns):
        asked = sentence(rng, 5)
        out += [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(reversed(asked.split()[-3:]))}]
    return out


def build_data(root: Path, rows: int = 400) -> Path:
    """Files under the names that the presets look for: a mixture of three sources in two files, and a medical domain."""
    rng = random.Random(1)
    mixture = [{"id": f"row-{i}", "source": f"source-{i % 3}", "messages": talk(rng, 1 + i % 2, i % 5 == 0)} for i in range(rows)]
    write_rows(root / "tulu-3-sft-mixture" / "part-0.jsonl", mixture[:rows // 2])
    write_rows(root / "tulu-3-sft-mixture" / "part-1.jsonl", [*mixture[rows // 2:], mixture[0], {"id": "empty", "source": "source-0", "messages": [
        {"role": "user", "content": "nothing"}, {"role": "assistant", "content": " "}]}])
    for name, count in (("train", 120), ("test", 24)):
        write_rows(root / f"medical_pubmedqa_{name}.jsonl", [{"id": f"{name}-{i}", "source": "pubmedqa", "messages": [
            {"role": "user", "content": f"{name} {sentence(rng, 8)} ?"},
            {"role": "assistant", "content": f"{sentence(rng, 4)}\n\nAnswer: {rng.choice(['yes', 'no', 'maybe'])}"}]} for i in range(count)])
    write_rows(root / "medical_medquad_prompts.jsonl.gz", [{"id": f"q-{i}", "source": "medquad", "messages": [
        {"role": "user", "content": f"what is {sentence(rng, 4)} ?"}]} for i in range(100)])
    return root


def publish(shelf: Path, root: Path) -> None:
    """The models and data of ``shelf`` as the hub has them: sets under their ids, in their own columns and configurations."""
    (root / "datasets" / "allenai").mkdir(parents=True)
    (root / "models").symlink_to(shelf / "models")
    (root / "datasets" / "allenai" / "tulu-3-sft-mixture").symlink_to(shelf / "data" / "tulu-3-sft-mixture")
    rng, asked = random.Random(2), root / "datasets" / "qiaojin" / "PubMedQA"
    write_rows(asked / "pqa_labeled" / "train.jsonl", [{
        "pubid": i, "question": f"{i} {sentence(rng, 6)} ?", "context": {"contexts": [sentence(rng, 6)], "labels": ["METHODS"]}, "long_answer": sentence(rng, 4),
        "final_decision": rng.choice(["yes", "no", "maybe"])} for i in range(540)])
    (asked / "README.md").write_text("---\nconfigs:\n- config_name: pqa_labeled\n  data_files: pqa_labeled/train.jsonl\n---\n")
    write_rows(root / "datasets" / "keivalya" / "MedQuad-MedicalQnADataset" / "train.jsonl", [
        {"qtype": "symptoms", "Question": f"what is {i} {sentence(rng, 4)} ?", "Answer": sentence(rng, 5)} for i in range(60)])


def build_task(root: Path) -> Path:
    """A task of the harness: which of two words is an animal."""
    write_rows(root / "animals.jsonl", [{"question": f"is {w} an animal ?", "answer": i % 2} for i, w in enumerate(WORDS[:20])])
    path = root / "animals.yaml"
    path.write_text(f"""task: animals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {root / 'animals.jsonl'}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" no", " yes"]
doc_to_target: answer
metric_list:
  - metric: acc
""", encoding="utf-8")
    return path


class Server(BaseHTTPRequestHandler):
    """What the hub's clients ask for, of the ``root``/models and ``root``/datasets of its server, all of one ``commit``; gated sets are for others."""

    def do_GET(self):
        """Answer a GET, or without a body a HEAD."""
        path, root, commit = unquote(urlsplit(self.path).path).strip("/"), self.server.root, {"X-Repo-Commit": self.server.commit}
        about = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(/.*)?)?", path)
        file = re.fullmatch(r"(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        self.server.asked.append(path)
        known = [m for m in (about and about[2], file and file[2]) if m]
        if "some/gated" in path:
            self.answer(401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
        elif not known or not any((root / kind / known[0]).is_dir() for kind in ("models", "datasets")):  # as the hub says it to those without a token
            self.answer(401, **{"X-Error-Code": "RepoNotFound"})
        elif file and (found := root / (file[1] or "models") / file[2] / file[3]).is_file():
            self.answer(200, found.read_bytes(), ETag=f'"{hashlib.sha1(found.read_bytes()).hexdigest()}"', **commit)
        elif file:
            self.answer(404, **{"X-Error-Code": "EntryNotFound"}, **commit)
        elif about and about[3] == "tree" and (folder := root / about[1] / about[2] / (about[4] or "").strip("/")).is_dir():
            self.answer(200, json.dumps([{"type": "directory" if p.is_dir() else "file", "path": str(p.relative_to(root / about[1] / about[2])), "oid": "0" * 40,
                                          "size": p.stat().st_size} for p in sorted(folder.iterdir())]).encode())
        elif about and about[3] != "tree" and (root / about[1] / about[2]).is_dir():
            self.answer(200, json.dumps({"id": about[2], "sha": self.server.commit, "siblings": [], "tags": []}).encode())
        else:
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", **headers):
        """Send it."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def served(root: Path, commit: str, home: Path):
    """``run(code)`` with a server of ``root``: Python in a process of its own, which finds it where the hub would be, and keeps what it gets in ``home``;
    ``run.asked`` are the paths asked for."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("KDLIB_", "HF_"))}
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.root, server.commit, server.asked = root, commit, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {**known, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}

        def run(code, **more):
            return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**own, **more})

        run.asked = server.asked
        yield run
        server.shutdown()
