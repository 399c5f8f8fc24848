"""Evaluation on public tasks by EleutherAI's lm-evaluation-harness, an optional extra: ``pip install 'kdlib[eval]'``."""

import os
import re
from functools import cache
from pathlib import Path
from unittest.mock import patch

from transformers import GenerationConfig

from kdlib.presets import check

OWN = Path(__file__).with_name("tasks")  # of kdlib's, beside the harness's


@cache
def _manager(kind: type, folders: tuple[Path, ...], files: tuple, **which):
    """The harness's TaskManager of its own tasks, which are thousands, if asked for, and those in ``folders``, whose ``files`` are as they are."""
    return kind(include_path=[*folders], **which)


@patch.multiple("sys", stderr=open(os.devnull, "w"), stdout=open(os.devnull, "w"))  # progress and warnings
def check_tasks(tasks: dict[str, dict]) -> dict[str, dict]:
    """``{subtask: (lm_eval's Task, metric)}`` of each of ``tasks`` by name; ValueError before training on what would fail after."""
    found, keys = {}, ("num_fewshot", "limit", "max_gen_toks", "metric")
    for task, settings in check("tasks", tasks, dict, "settings by the name of a task, of one or more", len).items():
        shots, limit, longest, metric = map(check(what := f"tasks[{task!r}]", settings, dict, ", ".join(keys), {*keys}.issuperset).get, keys)
        for key, value, least in zip(keys, (shots, limit, longest), (0, 1, 1)):
            check(f"{what}[{key!r}]", least if value is None else value, int, f"a whole number from {least}", lambda v: v >= least)
        try:
            from lm_eval import evaluator_utils, tasks as known
            folders = (OWN, *(Path(t).parent for t in tasks if t.endswith(".yaml")))
            alone = all(Path(t).is_file() and not re.search(r"^\W*group\W*:", Path(t).read_text("utf-8"), re.M) for t in tasks)  # a group may name the harness's
            manager = _manager(known.TaskManager, folders, tuple((f, f.stat().st_mtime_ns) for folder in folders for f in sorted(folder.glob("*.y*ml"))),
                               include_defaults=not alone)
            name = next((n for n, entry in manager.task_index.items() if entry.yaml_path == Path(task)), task)
            for part in (parts := manager.load([name])["tasks"]).values():
                part.set_config("num_fewshot", own if (own := part.config.num_fewshot) == 0 or shots is None else shots)
                part.set_fewshot_seed(0)
                part.build_all_requests(limit=1)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            todo = ("pip install 'kdlib[eval]'" if isinstance(error, ImportError) else "connect, or give a .yaml with data_files" if
                    isinstance(error, OSError) else "allowed: a name that `lm_eval ls tasks` shows, or a sound .yaml file's path")
            raise ValueError(f"{what} cannot be prepared ({why}); {todo}.") from error
        found[check("task", name, str, "a name no other task or file has", (manager.task_index.keys() - found).__contains__)] = {}
        for n, part in parts.items():
            check(f"{what}['num_fewshot']", shots or 0, int, f"0, as {n} says", {0, part.config.num_fewshot}.__contains__)
            means = [f"{m},{f.name}" for f in part._filters for m, how in part.aggregation().items() if how is evaluator_utils.mean]
            found[name][n] = part, check(f"{what}['metric']", metric or [*means, ""][0], str, ", ".join(means), means.__contains__)
    return found


@patch.multiple("sys", stderr=open(os.devnull, "w"), stdout=open(os.devnull, "w"))
def harness(model, tokenizer, tasks: dict[str, dict], *, batch_size: int | None = None, seed: int = 0) -> tuple[dict, dict]:
    """``(metrics, items)`` as of :mod:`kdlib.evaluate`, of ``model`` as it is in memory on public ``tasks`` in the chat template.

    ``tasks`` has by name of a task or group of the harness, or path of a task's .yaml, its settings, all optional: ``num_fewshot``;
    ``limit``, the first documents of each subtask; ``max_gen_toks``, tokens of an answer, else the task's own number or 256; ``metric``,
    ``"name,filter"``, else the first that is a mean over documents. An item is a document, its ``correct`` that metric, 0 to 1; accuracy is
    their mean by task (in a group, over the documents of all its subtasks), then over tasks. Seeds the global generators. Raises ValueError,
    one sentence, as :func:`check_tasks` does.
    """
    check("tokenizer.chat_template", tokenizer.chat_template, object, "a template, in which tasks are asked", bool)
    rows, means, found, lm = [], {}, check_tasks(tasks), {"pretrained": model, "tokenizer": tokenizer, "softmax_dtype": "float32",
                                                   "add_bos_token": False}  # as in training, where the template says all
    from lm_eval.evaluator import TaskManager, simple_evaluate
    batch_size = batch_size or (8 if model.device.type == "cpu" else 32)
    plain = {"generation_config": GenerationConfig(eos_token_id=tokenizer.eos_token_id)}  # without a model's penalties
    with (patch.multiple(model, **plain), patch.multiple(getattr(model, "get_base_model", lambda: model)(), **plain),
          patch("lm_eval.evaluator.add_env_info")):  # which asks the system about itself at every call
        for (name, parts), settings in zip(found.items(), tasks.values()):
            said = simple_evaluate(
                model="hf", model_args=lm, batch_size=batch_size, tasks=[part for part, _ in parts.values()], bootstrap_iters=0,
                limit=settings.get("limit"), gen_kwargs={k: v for k, v in settings.items() if k == "max_gen_toks"}, apply_chat_template=True,
                task_manager=TaskManager(include_defaults=False),
                **{f"{k}random_seed": seed for k in ("", "numpy_", "torch_", "fewshot_")})["samples"]
            own = [(f"{name}/{n}/{s['doc_id']}", "seen", name, float(s[m]), None, None) for n, (_, metric) in parts.items()
                   for s in said[n] for m in s["metrics"] if f"{m},{s['filter']}" == metric]
            check(f"metric of {name}", [r[3] for r in own if not 0 <= r[3] <= 1][:2], list, "0 to 1", lambda odd: own and not odd)
            rows, means[name] = rows + own, sum(r[3] for r in own) / len(own)
    items = dict(zip(("id", "suite", "skill", "correct", "nll", "bytes"), map(list, zip(*rows))))
    return {"accuracy": sum(means.values()) / len(means), "accuracy_by_skill": means}, items
