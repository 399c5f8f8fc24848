"""One process, one engine: ``python tests/bench/step.py ENGINE SIZE [count]`` prints a JSON line with time and memory of a step.

ENGINE is trl (its GKD trainer, off-policy, from conversations, to which its collator applies the chat template at every step),
"trl tokenized" (the same from rows that were tokenized before, as all others are), live, hidden (an exact cache), top64 (a cache
of 64 tokens) or sft. Every engine gets the same models, conversations and batches, in float32 on two threads, or in bfloat16
where there is a GPU. Models are as sure of their words as trained ones, which decides how a truncated teacher is used. Caches are
written by another process, so that their readers' memory is their own. ENGINE may go on with how batches are formed: "live
padded" (rows padded to the longest), "live grouped" (neighbours in length, padded) or "live grouped packed". With ``count`` the
floating-point operations of a step are counted instead, in three steps with plain attention, whose operations can be counted.
"""

import json
import multiprocessing
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

CACHES = {"hidden": {"form": "hidden", "dtype": "float32"}, "top64": {"form": "top_k", "k": 64}}
SIZES = {  # the tokenizer adds six special tokens to the vocabulary
    "lab": {"vocabulary": 506, "student": (3, 96), "teacher": (4, 160), "rows": 32, "prompt": (6, 16), "answer": (4, 10), "steps": 60},
    "mid": {"vocabulary": 31994, "student": (4, 256), "teacher": (6, 512), "rows": 8, "prompt": (64, 192), "answer": (32, 96), "steps": 9},
    "large": {"vocabulary": 128250, "student": (16, 2048), "teacher": (32, 4096), "rows": 8, "prompt": (512, 768), "answer": (256, 256),
              "steps": 9},
}


def model(shape, tokenizer, seed):
    """A Llama of (layers, width) from random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = shape
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3 // 16 * 16,
                         num_hidden_layers=layers, num_attention_heads=max(4, width // 64), max_position_embeddings=2048,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with torch.no_grad():
        made.model.norm.weight.mul_(12)
    return made


def conversations(size, steps):
    """The same seeded random words for every engine."""
    rng = random.Random(0)

    def words(span):
        return " ".join(f"w{rng.randrange(size['vocabulary'])}" for _ in range(rng.randint(*span)))

    return [[{"role": "user", "content": words(size["prompt"])}, {"role": "assistant", "content": words(size["answer"])}]
            for _ in range(steps * size["rows"])]


def memory(anew: bool = False) -> float:
    """Peak memory in MiB, of the process or of a GPU's tensors: since it began, or with ``anew`` from now on (on Linux)."""
    if torch.cuda.is_available():
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if anew and status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def inputs(name: str, steps: int):
    """``(tokenizer, conversations, rows)``, the same in every process."""
    from kdlib import data, models

    tokenizer = models.build_tokenizer([f"w{i}" for i in range(SIZES[name]["vocabulary"])])
    messages = conversations(SIZES[name], steps)
    return tokenizer, messages, [dict(zip(("id", "input_ids", "labels"), (str(i), *data.encode(m, tokenizer))))
                                 for i, m in enumerate(messages)]


def write(folder: str, engine: str, name: str, steps: int) -> None:
    """The cache of the teacher of a size."""
    from kdlib import teachers

    torch.set_num_threads(2)
    tokenizer, _, rows = inputs(name, steps)
    teachers.write_cache(folder, model(SIZES[name]["teacher"], tokenizer, 2), tokenizer, rows, **CACHES[engine])


def main(engine: str, name: str, count: str = "") -> dict:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback

    from kdlib import data, losses, teachers, trainer

    torch.set_num_threads(2)
    engine, *forming = engine.split()
    size = SIZES[name]
    steps = 3 if count else size["steps"]
    tokenizer, messages, rows = inputs(name, steps)
    if engine == "trl":
        import trl.experimental.gkd as gkd
    baseline, marks = memory(anew=True), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    student = model(size["student"], tokenizer, 1)
    teacher = model(size["teacher"], tokenizer, 2) if engine in ("trl", "live") else None
    with tempfile.TemporaryDirectory() as folder:
        common = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": size["rows"], "learning_rate": 1e-4,
                  "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 0,
                  "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "bf16": torch.cuda.is_available(),
                  "use_cpu": not torch.cuda.is_available()}
        if engine == "trl":
            from datasets import Dataset

            args = gkd.GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0, max_length=1024, gradient_checkpointing=False)
            ready = [{"prompt": "", "input_ids": r["input_ids"], "completion_mask": [int(t != data.IGNORE) for t in r["labels"]]}
                     for r in rows]
            made = gkd.GKDTrainer(model=student, teacher_model=teacher, args=args, processing_class=tokenizer,
                                  train_dataset=Dataset.from_list(ready) if forming else Dataset.from_dict({"messages": messages}))
        else:
            source = None
            if engine in CACHES:
                writer = multiprocessing.get_context("spawn").Process(target=write, args=(f"{folder}/cache", engine, name, steps))
                writer.start()
                writer.join()
                source = teachers.Cached(f"{folder}/cache")
            elif engine == "live":
                source = teachers.Live(teacher, tokenizer)
            if "grouped" in forming:
                alike = sorted(rows, key=lambda r: len(r["input_ids"]))
                batches = [alike[i:i + size["rows"]] for i in range(0, len(alike), size["rows"])]
                random.Random(0).shuffle(batches)
                rows = [row for batch in batches for row in batch]
            made = trainer.DistillationTrainer(
                model=student, args=trainer.TrainingArguments(**common, remove_unused_columns=False), train_dataset=rows,
                data_collator=data.Collator(tokenizer.pad_token_id, pack=not forming or "packed" in forming), teacher=source,
                processing_class=tokenizer, objective=losses.Objective(alpha=0.0 if engine == "sft" else 1.0))
        made.add_callback(Clock)
        if count:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                made.train()
            return {"engine": engine, "size": name, "flop": counter.get_total_flops() / steps}
        loss = made.train().training_loss
    times = [b - a for a, b in zip(marks[2:], marks[3:])]
    return {"engine": engine, "size": name, "step_s": statistics.median(times), "mean_step_s": statistics.mean(times),
            "memory_mib": memory() - baseline, "loss": loss}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
