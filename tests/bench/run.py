"""Benchmarks of the engine: ``python tests/bench/run.py [ROUNDS]`` writes a record under ``results/bench``.

Every engine runs in a process of its own, in rounds that alternate, so that a busy machine hurts all alike; ratios are taken
within a round. Needs ``trl`` for the comparison with its GKD trainer and goes on without.
"""

import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from kdlib import results, store

HERE = Path(__file__).parent
ENGINES = ("trl", "live", "hidden", "top64", "sft")


def process(script: str, *arguments) -> dict:
    """The JSON that a benchmark script prints last."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> dict:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def steps(size: str, rounds: int) -> dict:
    """Step time and memory of every engine at a size, and how many times faster and leaner than TRL, and slower than SFT."""
    engines = [e for e in ENGINES if e != "trl" or importlib.util.find_spec("trl")]
    found = {e: [] for e in engines}
    for number in range(rounds):
        for engine in engines[number % len(engines):] + engines[:number % len(engines)]:
            found[engine].append(process("step.py", engine, size))
            print(size, engine, found[engine][-1], flush=True)
    out = {e: {k: spread([r[k] for r in runs]) for k in ("step_s", "memory_mib")} for e, runs in found.items()}
    for engine in engines:
        for other, name in (("trl", "faster_than_trl"), ("sft", "slower_than_sft")):
            if other in found and engine not in (other, "trl" if other == "sft" else ""):
                pairs = zip(found[other], found[engine])
                ratios = [a["step_s"] / b["step_s"] if other == "trl" else b["step_s"] / a["step_s"] for a, b in pairs]
                out[engine][name] = spread(ratios)
        if "trl" in found and engine != "trl":
            out[engine]["memory_of_trl"] = spread([b["memory_mib"] / a["memory_mib"] for a, b in zip(found["trl"], found[engine])])
    return out


def main(rounds: int = 5) -> None:
    """Run everything and write the record under the device's name."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()}-cpu"
    packages = {p: importlib.metadata.version(p) for p in ("torch", "transformers", *(["trl"] if importlib.util.find_spec("trl") else []))}
    record = {"device": device, "threads": 2, "packages": packages, "environment": results.environment(),
              "steps": {size: steps(size, rounds) for size in (("lab", "mid", "large") if cuda else ("lab", "mid"))}}
    path = results.REPOSITORY / "results" / "bench" / f"{device.replace(' ', '-').lower()}.json"
    store.write_atomic(path, json.dumps(record, indent=1) + "\n")
    print(f"written: {path.relative_to(results.REPOSITORY)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
