"""Run tasks with dependencies in parallel worker processes, each on one thread."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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


def compute(tasks: list[Task], workers: int = 0) -> None:
    """Do all ``tasks``, in their order as far as their needs allow, with a progress bar and an estimate of what is left.

    ``workers=0`` takes one per core, or one in all where an accelerator does the work. A task that fails stops the rest
    from starting; what was running finishes, and the error is raised.
    """
    import torch

    workers = min(workers or (1 if torch.accelerator.is_available() else len(os.sched_getaffinity(0))
                              if hasattr(os, "sched_getaffinity") else os.cpu_count()), len(tasks))
    waiting, done, running, failure = list(tasks), set(), {}, None
    started = time.monotonic()
    with (ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker) as pool,
          tqdm(total=1.0, file=_Stdout(), mininterval=1, bar_format="{desc}|{bar:30}| {elapsed}{postfix}") as bar):
        while (waiting and not failure) or running:
            ready = [] if failure else [t for t in waiting if done.issuperset(t.needs)][:workers - len(running)]
            for task in ready:
                waiting.remove(task)
                running[pool.submit(task.function, *task.arguments)] = task
            finished, _ = wait(running, timeout=20, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                try:
                    future.result()
                    done.add(task.key)
                except Exception as error:
                    failure = failure or error
            _show(bar, tasks, done, running.values(), started)
    if isinstance(failure, BrokenProcessPool):
        raise RuntimeError("A worker process died (killed, or out of memory); finished runs are kept, so run again to go on."
                           ) from failure
    if failure:
        raise failure


def _show(bar: tqdm, tasks: list[Task], done: set, running, started: float) -> None:
    # On average a running task is half done.
    total, part = sum(t.cost for t in tasks), sum(t.cost for t in tasks if t.key in done) + sum(t.cost for t in running) / 2
    bar.n = part / total if total else 1.0
    bar.set_description_str(f"{len(done)} of {len(tasks)} tasks, {bar.n:4.0%}", refresh=False)
    if 0 < bar.n < 1:
        left = (time.monotonic() - started) * (1 / bar.n - 1)
        bar.set_postfix_str(f"about {left / 60:.1f} min left", refresh=False)
    bar.refresh()


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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
