"""Run tasks with dependencies in parallel worker processes, each on one thread."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import NamedTuple

from tqdm import tqdm


class Task(NamedTuple):
    """``function(*arguments)``, to be called once the tasks named in ``needs`` are done; ``cost`` weighs the estimate."""

    key: str
    function: Callable
    arguments: tuple
    needs: tuple
    cost: float


def compute(tasks: list[Task], workers: int = 0, executor: str = "processes") -> None:
    """Do all ``tasks``, in their order as far as their needs allow, with a progress bar and an estimate of what is left.

    ``executor`` is "processes" on this machine, or "ray" for a Ray cluster (the one that RAY_ADDRESS names, or a local one)
    whose machines share the results folder. ``workers=0`` takes one per core, or one in all where an accelerator does the
    work; on Ray as many as the cluster has. A task that fails stops the rest from starting; what was running finishes, and
    the error is raised. A worker of Ray's that dies is replaced and its task done again.
    """
    waiting, done, running, failure = list(tasks), set(), {}, None
    bar = tqdm(total=sum(t.cost for t in tasks) or 1, file=_Stdout(), smoothing=0, mininterval=0,
               bar_format="{desc}, {percentage:3.0f}%|{bar:30}| {elapsed}, about {remaining} left")
    with EXECUTORS[executor](workers) as pool, bar:
        while (waiting and not failure) or running:
            for task in [] if failure else [t for t in waiting if done.issuperset(t.needs)][:pool.workers - len(running)]:
                waiting.remove(task)
                try:
                    running[pool.submit(task.function, *task.arguments)] = task
                except BrokenProcessPool as error:
                    failure = failure or error
            for future in wait(running, timeout=20, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    future.result()
                    done.add(task.key)
                    bar.update(task.cost)
                except Exception as error:
                    failure = failure or error
            bar.set_description_str(f"{len(done)} of {len(tasks)} tasks")
    if isinstance(failure, BrokenProcessPool):
        raise RuntimeError("A worker process died (killed, or out of memory); finished runs are kept, so run again to go on."
                           ) from failure
    if failure:
        raise failure


class Processes(ProcessPoolExecutor):
    """Worker processes on this machine, each on one thread."""

    def __init__(self, workers: int):
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = workers or (1 if torch.accelerator.is_available() else cores)
        super().__init__(self.workers, multiprocessing.get_context("spawn"), _start_worker)


class Ray(Executor):
    """A Ray cluster as an executor. Raises ValueError if Ray is not installed."""

    def __init__(self, workers: int):
        try:
            import ray
        except ImportError as error:
            raise ValueError("executor='ray' needs Ray; install kdlib[cluster].") from error
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address=address, num_cpus=None if address else workers or None, ignore_reinit_error=True, log_to_driver=False)
        self.ray, self.workers = ray, workers or int(ray.cluster_resources()["CPU"])

    def submit(self, function, *arguments):
        """A ``concurrent.futures.Future`` of ``function(*arguments)``."""
        return self.ray.remote(max_retries=3)(_on_ray).remote(function, arguments).future()

    def shutdown(self, **_):
        """Leave the cluster."""
        self.ray.shutdown()


EXECUTORS = {"processes": Processes, "ray": Ray}


def _on_ray(function, arguments):
    _be_quiet()
    return function(*arguments)


class _Stdout:
    """Standard output, looked up at each write: notebooks replace it, and stored outputs must not hold standard error."""

    def write(self, text: str) -> None:
        print(text, end="")

    def flush(self) -> None:
        print(end="", flush=True)


def _start_worker() -> None:
    """One thread, no advice on standard error, and an end of its own when the parent is killed."""
    parent = multiprocessing.parent_process()

    def follow():
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _be_quiet()


def _be_quiet() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
