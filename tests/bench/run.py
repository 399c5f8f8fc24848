"""Benchmarks of the engine: ``python tests/bench/run.py [ROUNDS [NAME …]]`` writes records under ``results/bench``, by device. A NAME
is a benchmark's, or an engine's, to time steps of those alone.

What is compared runs in processes of its own, in rounds that alternate, so that a busy machine hurts all alike; ratios are taken
within a round. Needs ``trl`` for the comparison with its GKD trainer and goes on without.
"""

import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from cache import FORMS

from kdlib import results, store

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} cpu"
MODELS = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
ENGINES = [*(("trl", "trl tokenized") if importlib.util.find_spec("trl") else ()), "live", "hidden", "top64", "sft"]
SIZES = ("large",) if CUDA else ("lab", "mid")
CHUNKS = ("chunked 16", "chunked 64", "chunked 256")
LOSSES = [(8192, 128256, 1.0), (8192, 128256, 0.25), (4096, 128256, 0.25), (8192, 32000, 0.25)] if CUDA else [
    (1024, 32000, 1.0), (1024, 32000, 0.25), (2048, 32000, 0.25), (2048, 8000, 0.25)]


def process(script: str, *arguments) -> dict:
    """The JSON that a benchmark script prints last."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    print(done.stdout.strip().splitlines()[-1], flush=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def alternating(script: str, names, rounds: int, *arguments) -> dict[str, list[dict]]:
    """What ``script NAME *arguments`` found in each round, by name; every round starts with another one."""
    found = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].append(process(script, name, *arguments))
    return found


def spread(values) -> dict:
    """Median, least and largest."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(above: list[dict], below: list[dict], key: str) -> dict:
    """The spread of a quotient that is taken round by round."""
    return spread(a[key] / b[key] for a, b in zip(above, below))


def matmul_rate() -> float:
    """Floating-point operations a second of a large square product, in the precision and on the threads of the benchmarks."""
    torch.set_num_threads(2)
    n, place = (8192, {"device": "cuda", "dtype": torch.bfloat16}) if CUDA else (2048, {})
    a, times = torch.randn(n, n, **place), []
    for _ in range(12):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[2:])


def steps(rounds: int, engines: list[str]) -> dict:
    """Step time and memory of every engine at every size, against TRL and against SFT, and the share of the matmul rate."""
    out = {}
    for size in SIZES:
        rate, found = matmul_rate(), alternating("step.py", engines, rounds, size)
        for engine, runs in found.items():
            flop = process("step.py", engine, size, "count")["flop"]
            row = {k: spread(r[k] for r in runs) for k in ("step_s", "memory_mib", "loss")}
            row |= {"flop_per_step": flop, "share_of_matmul_rate": spread(flop / r["step_s"] / rate for r in runs)}
            if "trl" in found and engine != "trl":
                row |= {"faster_than_trl": ratio(found["trl"], runs, "step_s"), "memory_of_trl": ratio(runs, found["trl"], "memory_mib")}
            if "sft" in found and engine in ("live", "hidden", "top64"):
                row["step_of_sft"] = ratio(runs, found["sft"], "step_s")
            out[f"{size}, {engine}"] = row
        out[f"{size}, matmul flop per s"] = rate
    return out


def batching(rounds: int) -> dict:
    """Mean time of a step with a live teacher by how batches are formed, against rows padded to the longest of their batch."""
    out = {}
    for size in SIZES:
        found = alternating("step.py", ("live padded", "live packed", "live grouped", "live grouped packed"), rounds, size)
        for way, runs in found.items():
            out[f"{size}, {way.removeprefix('live ')}"] = {
                "mean_step_s": spread(r["mean_step_s"] for r in runs), "faster_than_padded": ratio(found["live padded"], runs, "mean_step_s")}
    return out


def losses(rounds: int) -> dict:
    """Peak memory and time of the chunked loss against the naive form, over tokens, vocabulary and share of the response."""
    out = {}
    for tokens, vocabulary, share in LOSSES:
        found = alternating("loss.py", ("naive", "chunked", *CHUNKS), rounds, tokens, vocabulary, share)
        row = {f"{form}_{k}": spread(r[k] for r in found[form]) for form in ("naive", "chunked") for k in ("peak_mib", "seconds")}
        row |= {f"naive_over_chunked_{k}": ratio(found["naive"], found["chunked"], k) for k in ("peak_mib", "seconds")}
        row["relative_difference_of_loss"] = spread(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found["chunked"], found["naive"]))
        case = f"{tokens} tokens, vocabulary {vocabulary}, share {share}"
        out[case] = row
        for form in CHUNKS:
            out[f"{case}, {form} rows"] = {k: spread(r[k] for r in found[form]) for k in ("peak_mib", "seconds")}
    return out


def caches(rounds: int) -> dict:
    """Size, rates and error of every form of cache, on the smoke preset's trained models."""
    with tempfile.TemporaryDirectory() as folder:
        found = alternating("cache.py", list(FORMS), rounds, folder)
    return {form: {k: spread(r[k] for r in runs) if k.endswith("_per_s") else runs[0][k] for k in runs[0] if k != "form"}
            for form, runs in found.items()}


def record_of(name: str, about: str, bench, threads: int = 2) -> None:
    """Write the record of a benchmark, whose name and docstring these are, as it ends."""
    packages = {p: version(p).split("+")[0] for p in ("torch", "transformers", *(["trl"] if "trl" in ENGINES else []))}
    record = {"benchmark": name, "about": about, "device": DEVICE, "processor": (MODELS or [platform.processor()])[0], "threads": threads, "packages": packages,
              "environment": results.environment(), "found": bench()}
    path = results.REPOSITORY / "results" / "bench" / f"{DEVICE.replace(' ', '-').lower()}-{name}.json"
    store.write_atomic(path, json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(results.REPOSITORY)}")


def main(rounds: int = 5, *chosen: str) -> None:
    """Run everything, or what is ``chosen`` by name."""
    engines = [name for name in ENGINES if name in chosen]
    wanted = {*chosen} - {*engines} | {*(["steps"] if engines else [])}
    for name, bench in (("steps", partial(steps, engines=engines or ENGINES)), ("batching", batching), ("loss", losses), ("cache", caches)):
        if not wanted or name in wanted:
            record_of(name, getattr(bench, "func", bench).__doc__, partial(bench, rounds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
