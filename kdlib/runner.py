"""Do tasks in parallel: in worker processes here, each on one thread, or on a Ray cluster."""

import gc
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, ProcessPoolExecutor, wait
from functools import partial
from unittest.mock import patch  # an attribute for a while, and then what was there

import psutil
import yaml
from tqdm import tqdm

MAIN = threading.Lock()


def compute(tasks: dict[Callable, float], workers: int = 0, needs: dict[Callable, list[Callable]] | None = None) -> None:
    """Do all ``tasks``, begun in their order when what they ``need`` of them is done, with an estimate by their costs. In processes here, one
    per core with ``workers=0`` (with an accelerator, one), or on the Ray cluster that RAY_ADDRESS names. A task that fails stops the rest from
    starting; what runs finishes, and the error is raised.
    """
    waiting, futures = {task: {*(needs or {}).get(task, ())} & tasks.keys() for task in tasks}, {}
    bar = tqdm(desc=f"0 of {len(tasks)} tasks", total=sum(tasks.values()) or 1, file=sys.stdout, mininterval=0, smoothing=0,
               bar_format="{desc}, {percentage:3.0f}%|{bar:30}| {elapsed}, about {remaining} left")
    with (Ray() if os.environ.get("RAY_ADDRESS") else _processes(workers)) as pool, bar:
        try:
            while waiting or futures:
                with MAIN, patch.multiple(sys.modules["__main__"], create=True, __file__=None, __spec__=None):  # or workers would run a caller's script again
                    ready = [task for task, lacking in waiting.items() if not lacking]
                    for task in ready[:getattr(pool, "room", len(tasks)) - len(futures)]:
                        del waiting[task]
                        futures[pool.submit(partial(_do, task))] = task
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    future.result()
                    done = futures.pop(future)
                    for lacking in waiting.values():
                        lacking.discard(done)
                    bar.set_description_str(f"{len(tasks) - len(waiting) - len(futures)} of {len(tasks)} tasks", refresh=False)
                    bar.update(tasks[done])
        except BrokenExecutor as error:
            raise RuntimeError("A worker process died (killed? out of memory?); finished runs are kept, so run again to go on.") from error
        finally:
            wait([future for future in futures if not future.cancel()])


def _do(task: Callable) -> None:
    """Do a task, and keep none of an accelerator's memory, which other workers share."""
    import torch
    task()
    if torch.accelerator.is_available():
        gc.collect()
        torch.accelerator.empty_cache()


def _processes(workers: int) -> ProcessPoolExecutor:
    """Workers that a server of forks makes, which has imported all that they need; with an accelerator, whose state no fork may share, afresh.
    Of several GPUs each of several workers sees one alone, and the only one all.
    """
    import torch
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    afresh = torch.accelerator.is_available() or "forkserver" not in multiprocessing.get_all_start_methods()
    (context := multiprocessing.get_context("spawn" if afresh else "forkserver")).set_forkserver_preload(["kdlib.jobs", "kdlib.trainer", "transformers.models.llama.modeling_llama"])
    workers, gpus = workers or (1 if torch.accelerator.is_available() else cores), torch.cuda.device_count()
    known, own = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus))), context.SimpleQueue()
    for i in range(workers):
        own.put(known.split(",")[i % gpus] if min(workers, gpus) > 1 and not launch_settings() else None)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (dict(os.environ), own))
    pool.room = workers  # tasks that are given it at once, so that an early one that becomes ready late is not behind all others
    return pool


def _start_worker(environment: dict, gpus) -> None:
    os.environ.update(environment)  # the server's may be older
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    if (own := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
    end_with(multiprocessing.parent_process().pid)
    _quiet()


def end_with(process: int) -> None:
    """End this process soon after that of this number has ended, however it did."""
    def watch():
        while psutil.pid_exists(process):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _quiet() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging
    from kdlib import jobs, trainer  # noqa: F401
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    gc.freeze()  # what is imported stays, so that no collection of garbage looks through it again


def launch_settings() -> dict:
    """What the Accelerate configuration that KDLIB_LAUNCH names says, nothing if it names none. ValueError if it cannot be read, or beside
    RAY_ADDRESS.
    """
    if not (name := os.environ.get("KDLIB_LAUNCH")):
        return {}
    if cluster := os.environ.get("RAY_ADDRESS"):
        raise ValueError(f"KDLIB_LAUNCH={name!r} and RAY_ADDRESS={cluster!r} do not go together, for a cluster's task has one GPU; allowed: one of them.")
    try:
        with open(name, encoding="utf-8") as file:
            return {**yaml.safe_load(file)}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"KDLIB_LAUNCH={name!r} is no Accelerate configuration that can be read ({type(error).__name__}); allowed: a YAML file like "
                         "those in kdlib/accelerate.") from error


def launch(configuration: str, module: str, *arguments: str) -> None:
    """Run a module in the processes that an Accelerate ``configuration`` asks for. RuntimeError if it fails, naming a file with all it said."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration, "--tee", "3",
               "--main_process_port", "0"]  # a free one, so that two that start together do not meet
    with tempfile.NamedTemporaryFile("w+", prefix="kdlib-launch-", suffix=".log", delete=False) as log, tempfile.TemporaryDirectory() as each:
        done = subprocess.run([*command, "--log_dir", each, "-m", module, *arguments], stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        said = [re.sub(r"^\[\w+\]:", "", line) for line in log.read().splitlines()]  # --tee keeps lines whole, behind the process that wrote them
    if done.returncode:
        why = ([line for line in said if "Error: " in line] or said or ["it said nothing"])[0].strip()
        raise RuntimeError(f"Training with KDLIB_LAUNCH={configuration!r} failed: {why} (all it said: {log.name})")
    os.unlink(log.name)


class Ray(Executor):
    """The Ray cluster that RAY_ADDRESS names, over one results folder; a dead worker's task is done again, up to three times."""

    def __init__(self):
        try:
            import ray
        except ImportError as error:
            raise ValueError("RAY_ADDRESS asks for Ray, which is missing; pip install 'kdlib[cluster]', or unset it.") from error
        ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        devices = int(ray.cluster_resources().get("GPU", 0))
        task = ray.remote(num_cpus=1, num_gpus=min(devices, 1), max_retries=3)
        known = {name: value for name, value in os.environ.items() if name.startswith(("KDLIB_", "HF_", "OPENAI_"))}  # which no worker of a running cluster has
        remote = task(lambda packed: os.environ.update(known) or _quiet() or pickle.loads(packed)())
        self.submit = lambda function: remote.remote(ray.cloudpickle.dumps(function)).future()
        self.shutdown = lambda **_: ray.shutdown()
