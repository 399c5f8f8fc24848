"""Labels from real servers: ``transformers serve`` with a tiny model, and one that says and fails as a test has it."""

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate

import pytest
import torch
from datasets import Dataset

from kdlib import data, evaluate, labels, models, specs, stages, store
from kdlib.labels import label

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package)

ASKED = [{"id": f"r{i}", "skill": "sum", "messages": [{"role": "user", "content": f"what is {i} plus {i} ?"}]} for i in range(12)]
ANSWERED = [{**r, "messages": [*r["messages"], {"role": "assistant", "content": "an annotator's"}]} for r in ASKED]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """``transformers serve`` with a tiny Llama: how to ask it, the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = models.build_tokenizer(None, [f"what is {a} plus {a} ? {b}" for a in range(12) for b in range(30)], 300)
    model = models.build_model("nano", tokenizer, seed=2).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # far from ties
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=9).close()
                break
            except OSError:
                assert process.poll() is None, f"{command} ended"
                time.sleep(0.1)
        yield {"base_url": f"http://127.0.0.1:{port}/v1", "model": str(folder), "max_new_tokens": 6, "max_retries": 1}, model, tokenizer
    finally:
        process.kill()
        process.wait()


class Scripted(BaseHTTPRequestHandler):
    """Does to a request what ``server.reply(body, how often it came)`` says: a status, a text, and more of the choice."""

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        server.bodies.append(body)
        server.flying.append(1)
        time.sleep(0.02)
        status, text, *more = server.reply(body, sum(b["messages"] == body["messages"] for b in server.bodies))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **dict(*more)}
        content = json.dumps({"object": "chat.completion", "choices": [choice], "error": {"message": text}}).encode()
        server.flying.append(-1)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def scripted():
    """A server that can be told what to say; it says ``So:`` and the question."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.bodies, server.flying, server.reply = [], [], echo
        server.how = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "max_retries": 3}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def echo(body, times):
    return 200, f"So: {body['messages'][-1]['content']}"


def said(rows):
    return [m[-1]["content"] for m in rows["messages"]]


def lines(folder):
    return (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)


def test_the_answers_are_the_models_own_and_an_unfinished_file_is_gone_on_with(served, tmp_path, capsys):
    how, model, tokenizer = served
    whole = label(tmp_path, Dataset.from_list(ANSWERED), **how, top_logprobs=2)
    own = evaluate.replies(model, tokenizer, [r["messages"] for r in ASKED], 6)[0]
    assert said(whole) == own and len(set(own)) > 6
    assert [{**r, "messages": r["messages"][:-1]} for r in whole.select_columns(["id", "skill", "messages"])] == ASKED
    assert whole["logprobs"][:] == [None] * 12 and set(whole["finish_reason"]) <= {"length", "stop"}
    assert f"of 12 answers in {tmp_path} are empty." in capsys.readouterr().out
    kept = lines(tmp_path)
    for end in (40, -1):
        (tmp_path / "answers.jsonl").write_bytes(b"".join(kept[:7]) + kept[7][:end])
        assert label(tmp_path, ASKED, **how, top_logprobs=2).to_list() == whole.to_list()
        assert lines(tmp_path)[:7] == kept[:7] and sorted(lines(tmp_path)) == sorted(kept)


def test_a_server_that_has_no_such_model_and_one_that_is_not_there_are_named(served, tmp_path):
    for name, value, why in (("model", "other", "BadRequestError: .*pinned to"), ("base_url", "http://127.0.0.1:1/v1", "APIConnectionError")):
        with pytest.raises(RuntimeError, match=rf"base_url='.*' fails as model='.*' \({why}.*\); 0 of 12 answers are in .*: check base"):
            label(tmp_path / name, ASKED, **{**served[0], name: value})


def test_what_fails_for_a_while_is_tried_again_and_logprobs_are_kept(scripted, tmp_path):
    tops = [{"token": "a", "logprob": -0.1, "bytes": [97]}, {"token": "token_id:7", "logprob": -2.5, "bytes": None}]
    listed = [{**tops[1], "top_logprobs": tops}, {**tops[0], "top_logprobs": []}]
    scripted.reply = lambda body, times: ((500, 429, 503)[times - 1], "busy") if times < 4 else (200, "ab", {"logprobs": {"content": listed}})
    rows = label(tmp_path, ASKED, **scripted.how, top_logprobs=2)
    assert rows["logprobs"][:] == [listed] * 12 and said(rows) == ["ab"] * 12 and len(scripted.bodies) == 48
    assert all(b["logprobs"] is True and b["top_logprobs"] == 2 and b["max_tokens"] == 1024 for b in scripted.bodies)


@pytest.mark.parametrize("status, tries", [(500, 4), (401, 1)])
def test_a_failure_for_good_ends_with_a_sentence_and_loses_nothing(scripted, tmp_path, status, tries):
    scripted.reply = lambda body, times: (status, "out of\norder") if body["messages"] == ASKED[1]["messages"] else echo(body, times)
    with pytest.raises(RuntimeError, match=rf"\(\w+: Error code: {status} - out of order.*\); [1-9] of 12 answers .*; run again to go on"):
        label(tmp_path, ASKED, **scripted.how, concurrency=2)
    kept, scripted.reply, before = lines(tmp_path), echo, len(scripted.bodies)
    assert 1 <= len(kept) < 11 and before == len(kept) + tries, "the other finishes what it began, and begins no more"
    assert said(label(tmp_path, ASKED, **scripted.how)) == [f"So: {r['messages'][0]['content']}" for r in ASKED]
    assert lines(tmp_path)[:len(kept)] == kept and len(scripted.bodies) == before + 12 - len(kept)


def test_many_requests_are_under_way_but_no_more_than_asked_for_also_inside_a_loop(scripted, tmp_path):
    async def inside():
        return label(tmp_path, ASKED, **scripted.how, concurrency=4, temperature=0.7, seed=5)

    assert len(asyncio.run(inside())) == 12 and max(accumulate(scripted.flying)) == 4
    assert len({b["seed"] for b in scripted.bodies}) == 12 and {(b["temperature"], b["top_p"]) for b in scripted.bodies} == {(0.7, 1.0)}


def test_empty_answers_stay_and_are_counted_and_a_tables_gaps_are_not_sent(scripted, tmp_path, capsys):
    scripted.reply = lambda body, times: (200, None if len(body["messages"]) == 1 else "7")
    named = [{"role": "system", "content": "Sum.", "name": "s"}, *ASKED[0]["messages"]]
    rows = label(tmp_path, Dataset.from_list([{"id": 0, "messages": named}, {"id": 1, "messages": ASKED[3]["messages"]}]), **scripted.how)
    assert said(rows) == ["7", ""] and rows["id"][:] == [0, 1] and "1 of 2 answers" in capsys.readouterr().out
    assert sorted((b["messages"] for b in scripted.bodies), key=len) == [ASKED[3]["messages"], named]


def test_what_servers_say_besides_an_answer_is_left_out(scripted, tmp_path):
    told = {"tool_calls": [], "reasoning_content": "hm", "annotations": []}
    answers = ("plain", [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}], "half \ud83d of a pair", None)

    def reply(body, times):
        number = int(body["messages"][-1]["content"].split()[2]) % 4
        return 200, None, {"message": {"role": "assistant", "content": answers[number], **told},
                           "logprobs": {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": [], "token_id": 7}]}}

    scripted.reply = reply
    rows = label(tmp_path, ASKED, **scripted.how)
    assert said(rows) == ["plain", "in parts", "half ? of a pair", ""] * 3 and all(m[-1].keys() == {"role", "content"} for m in rows["messages"])
    assert rows["logprobs"][0] == [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}]
    asked = len(scripted.bodies)
    assert said(label(tmp_path, ASKED, **scripted.how)) == said(rows) and len(scripted.bodies) == asked


def test_a_full_disk_is_not_taken_for_the_servers_fault(scripted, tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __iter__(self):
            return iter(self.file)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(labels, "open", lambda *a: Full(open(*a)), raising=False)
    with pytest.raises(OSError, match=f"The disk is full under {tmp_path}; free some of it and run again"):
        label(tmp_path, ASKED, **scripted.how)
    monkeypatch.undo()
    assert len(label(tmp_path, ASKED, **scripted.how)) == 12


def test_a_folder_of_other_settings_is_refused_and_bad_ones_are_named(scripted, tmp_path, monkeypatch):
    label(tmp_path, ASKED, **scripted.how)
    other = [*ASKED[:11], {**ASKED[11], "messages": [{"role": "user", "content": "else"}]}]
    for name, value in (("model", "n"), ("max_new_tokens", 5), ("temperature", 1.0), ("top_logprobs", 1), ("seed", 2), ("rows", other)):
        with pytest.raises(ValueError, match=f"was made with another {name}; give a folder of its own"):
            label(tmp_path, **{"rows": ASKED, **scripted.how, name: value})
    for name, value in (("base_url", "ftp://x"), ("concurrency", 0), ("timeout", 0), ("max_new_tokens", 1.5), ("temperature", -1)):
        with pytest.raises(ValueError, match=f"^{name}={value!r} .*; allowed: "):
            label(tmp_path / "b", ASKED, **{**scripted.how, name: value})
    for rows in ([], [{"text": "x"}]):
        with pytest.raises(ValueError, match="columns of rows=.* is not allowed; allowed: id and messages, of one row or more"):
            label(tmp_path / "b", rows, **scripted.how)
    for rows in ([ASKED[0], ASKED[0]], [ASKED[0], {"id": "s", "messages": [{"role": "system", "content": "x"}]}]):
        with pytest.raises(ValueError, match="^1 of 2 rows lack an id of their own, or messages with a user's turn to answer"):
            label(tmp_path / "b", rows, **scripted.how)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"the openai package, which is missing; pip install 'kdlib\[serve\]'"):
        label(tmp_path / "b", ASKED, **scripted.how)
    assert len(scripted.bodies) == 12 and not (tmp_path / "b").exists()


def words_of(folder, tmp_path):
    """A results folder and the specification of the answers of the model in ``folder`` to a small set, as the paper's presets have it."""
    rows = [{"id": f"r{i}", "source": "a", "messages": [{"role": "user", "content": f"what is {i} plus {i} ?"}, {"role": "assistant", "content": "7"}]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = {"kind": "text", "train": {"local": str(tmp_path / "rows.jsonl")}, "test": {}, "validation_rows": 5, "test_rows": 5}
    known = {"version": 1, "source": source, "train_rows": 40, "max_length": 64, "max_new_tokens": 6, "vocab_size": 0, "world_seed": 0,
             "tokenizer": {"name": folder, "revision": None, "template": None}}
    return store.open_folder(tmp_path / "results"), {"by": {"hub": folder, "revision": None, "data": known}, "set": "train", "temperature": 0.0, "seed": 0, "open": True}


def test_a_teacher_behind_a_server_says_what_it_says_here(served, tmp_path, monkeypatch):
    how, folder = served[0], served[0]["model"]
    root, spec = words_of(folder, tmp_path)
    here = stages.read_rows(root, [{"set": "train", "said": spec}], spec["by"]["data"])[0][:]
    monkeypatch.setenv("KDLIB_SERVER", how["base_url"])
    (tmp_path / "apart").mkdir()
    there = stages.read_rows(store.open_folder(tmp_path / "apart" / "results"), [{"set": "train", "said": spec}], spec["by"]["data"])[0][:]
    assert len(here) == 40 and here == there and len({tuple(r["input_ids"]) for r in here}) == 40


def test_of_what_a_server_refuses_nothing_is_learned_and_a_stopped_stage_goes_on(served, scripted, tmp_path, monkeypatch):
    def reply(body, times):
        number = int(body["messages"][-1]["content"].split()[2])
        if number == numbers[20] and broken:
            return 401, "no more"
        return ((400, "the prompt is too long") if number % 10 == 3 else (200, "5 6", {"finish_reason": "length"}) if number % 10 == 4 else (200, "5"))

    root, spec = words_of(served[0]["model"], tmp_path)
    known, broken, scripted.reply = stages.read_data(root, spec["by"]["data"]), True, reply
    numbers = [int(m[0]["content"].split()[2]) for m in known.rows("train")["messages"]]
    monkeypatch.setenv("KDLIB_SERVER", scripted.how["base_url"])
    with pytest.raises(RuntimeError, match=r"base_url='.*' fails as model='.*' \(.*\); [1-9]\d? of 40 answers are in .*: check base_url"):
        stages.make(root, spec)
    broken = False
    rows = stages.read_rows(root, [{"set": "train", "said": spec}], spec["by"]["data"])[0][:]
    assert len(scripted.bodies) == 40 + 1, "what had been answered is not asked for again"
    end = known.tokenizer.eos_token_id
    for number, row in zip(numbers, rows, strict=True):
        learned = [t for t in row["labels"] if t != data.IGNORE]
        said = known.tokenizer.decode(learned, skip_special_tokens=True).strip()
        assert (said, end in learned) == {3: ("", False), 4: ("5 6", False)}.get(number % 10, ("5", True)), row
    assert specs.path(root, spec).is_dir()
