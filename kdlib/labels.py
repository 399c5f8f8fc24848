"""A teacher's answers at scale, from an OpenAI-compatible server (vLLM, ``transformers serve``): many at once, and each kept."""

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from kdlib import data, presets, store, teachers

TOKEN = {"token": Value("string"), "logprob": Value("float64"), "bytes": List(Value("uint8"))}
SAID = {"logprobs": List({**TOKEN, "top_logprobs": List(TOKEN)}), "finish_reason": Value("string")}
LEAST = {"max_new_tokens": 1, "temperature": 0.0, "top_logprobs": 0, "seed": 0, "concurrency": 1, "max_retries": 0, "timeout": 1e-3}


def _text(content) -> str:
    """What an answer says, a text or a list of parts of which some have one; nothing else that servers tell of it."""
    return "".join(part.get("text") or "" for part in content) if isinstance(content, list) else content or ""


def _tokens(found) -> list[dict] | None:
    return found and [{**{k: t.get(k) for k in TOKEN}, "top_logprobs": [{k: o.get(k) for k in TOKEN} for o in t.get("top_logprobs") or ()]} for t in found]


def label(folder: str | Path, rows: Dataset | list[dict], *, base_url: str, model: str, max_new_tokens=1024, temperature=0.0,
          top_logprobs=0, concurrency=16, max_retries=5, timeout=600.0, api_key: str | None = None, seed=0) -> Dataset:
    """``rows`` (``id``, ``messages``) with ``model``'s text as the last answer, ``finish_reason``, and ``logprobs`` (nats, by token
    in OpenAI's form) or None. ``folder``/answers.jsonl keeps what comes, a next call asks for the rest; empty answers stay, counted
    in print, and so do those of prompts too long for the server (``finish_reason`` refused). ``timeout`` in seconds; ``api_key`` or
    OPENAI_API_KEY. ValueError on a bad input, RuntimeError if a request fails.
    """
    given, folder, api_key = locals(), Path(folder), (api_key or os.getenv("OPENAI_API_KEY") or "none").strip()
    presets.check("base_url", base_url, str, "one like 'http://localhost:8000/v1'", lambda v: v.startswith(("http:", "https:")))
    for name, low in LEAST.items():  # the first four of which decide what is said
        presets.check(name, given[name], type(low), f"{low} to {10**6}", lambda v: low <= v <= 10**6)
    try:
        from openai import AsyncOpenAI, BadRequestError
    except ImportError as error:
        raise ValueError("label asks through the openai package, which is missing; pip install 'kdlib[serve]'.") from error
    def prompt(row: dict) -> list[dict]:
        turns = [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]  # a table fills gaps with None
        return turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns
    more = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
    rows = (rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))).with_format(None)
    presets.check("columns of rows", rows.column_names, list, "id and messages, of one row or more", {"id", "messages"}.issubset)
    asked = rows.select_columns(["id", "messages"])
    hashes = {str(r["id"]): store.digest(p) for r in asked if (p := prompt(r)) and p[-1].get("role") in ("user", "tool")}
    if lack := len(rows) - len(hashes):
        raise ValueError(f"{lack} of {len(rows)} rows lack an id of their own, or messages with a user's turn to answer.")
    with store.room_on_disk(folder):
        teachers._write(folder, {n: given[n] for n in ("model", *list(LEAST)[:4])} | {"rows": store.digest([*hashes.items()])}, {})
    with store.room_on_disk(folder), store.lock(folder, "write"), open(folder / "answers.jsonl", "a+b") as file, ThreadPoolExecutor(1) as pool:
        places, end = {}, file.seek(0)
        for line in file:
            with suppress(ValueError, KeyError, TypeError):  # of a line that a kill cut short
                places[str(json.loads(line[:-1])["id"])], end = file.tell() - len(line), file.tell()
        file.truncate(end)
        queue = (asked[i] for i in tqdm([i for i, key in enumerate(hashes) if key not in places], file=sys.stdout))
        async def work(client: AsyncOpenAI) -> None:
            with closing(queue):  # of all, who begin no more after an error
                for row in queue:
                    call = partial(client.chat.completions.create,  # a server may have a top_p of its own; seeds tell draws apart
                        model=model, messages=prompt(row), max_tokens=max_new_tokens, temperature=temperature, top_p=1.0, **more,
                        seed=data.example_key((seed, row["id"])) % 2**31)
                    try:
                        said = (await call()).choices[0].model_dump(exclude_none=True, warnings=False)
                    except BadRequestError as error:  # a prompt too long for the server stays so
                        if not any(words in str(error).lower() for words in ("context length", "too long", "maximum length")):
                            raise
                        said = {"message": {"content": ""}, "finish_reason": "refused"}
                    row["messages"] = [*prompt(row), {"role": "assistant", "content": _text(said["message"].get("content"))}]
                    row |= {"logprobs": _tokens(said.get("logprobs", {}).get("content")), "finish_reason": said.get("finish_reason")}
                    file.write(line := json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")  # halves of pairs have no bytes
                    places[str(row["id"])] = file.seek(0, os.SEEK_END) - len(line)  # which flushes
        async def ask() -> list:
            async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout) as client:
                return await asyncio.gather(*(work(client) for _ in range(concurrency)), return_exceptions=True)
        with closing(queue):  # and a thread, as the caller's may run a loop
            if error := next((e for e in pool.submit(lambda: asyncio.run(ask())).result() if e), None):
                if isinstance(error, OSError):  # the disk's, not the server's
                    raise error
                why = f"{type(error).__name__}: {error} {error.__cause__ or getattr(error, 'body', None) or ''}".split()
                raise RuntimeError(f"{base_url=} fails as {model=} ({' '.join(why)[:300]}); {len(places)} of {len(rows)} answers "
                                   f"are in {folder}: check base_url, model, api_key, server; run again to go on.") from error
        rows = rows.map(lambda row: file.seek(places[str(row["id"])]) >= 0 and json.loads(file.readline()),
                        features=Features({**rows.features, **SAID}), cache_file_name=str(folder / "answers.arrow"),
                        new_fingerprint=store.digest([rows._fingerprint, store.file_hash(file.name)]), load_from_cache_file=False)
    print(f"{sum(not m[-1]['content'].strip() for m in rows['messages'])} of {len(rows)} answers in {folder} are empty.")
    return rows
