import errno
import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from kdlib import store


def test_a_digest_is_the_same_for_equal_values():
    assert store.digest({"b": [1, 2.5], "a": "é"}, 64) == hashlib.sha256('{"a":"é","b":[1,2.5]}'.encode()).hexdigest()
    assert store.digest({"a": 1, "b": (2,)}) == store.digest({"b": [2], "a": 1}) != store.digest({"a": 1, "b": [3]})
    with pytest.raises(ValueError):
        store.digest(float("nan"))


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    store.write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.json"]


def test_a_results_folder_is_new_or_ours(tmp_path):
    made = store.open_folder(tmp_path / "new")
    assert json.loads((made / store.MARKER).read_text()) == store.FORMAT
    (made / "lab").mkdir()
    assert store.open_folder(made) == made


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"results_dir='.*' holds files of something else .*give an empty or new folder"):
        store.open_folder(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_a_killed_opening_left_is_no_stranger(tmp_path):
    (tmp_path / f".{store.MARKER}.x1y2").write_text("")
    assert json.loads((store.open_folder(tmp_path) / store.MARKER).read_text()) == store.FORMAT


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(ValueError, match="results_dir='~nobody_at_all/x' cannot be written"):
        store.open_folder("~nobody_at_all/x")


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"results_dir='.*file/under' cannot be written \(Not a directory\)"):
        store.open_folder(tmp_path / "file" / "under")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)"),
                                   RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/3")])
def test_whoever_finds_the_disk_full_it_is_said_alike(tmp_path, error):
    with pytest.raises(OSError, match="The disk is full under .*; free some of it and run again: what was finished is kept"):
        with store.room_on_disk(tmp_path):
            raise error


def test_what_another_process_has_just_checked_is_not_read_again(tmp_path, monkeypatch):
    made = store.artefact(store.open_folder(tmp_path), "data", {"a": 1}, lambda folder: (folder / "x").write_text("1") and None)
    (made / "x").write_text("2")
    with pytest.raises(ValueError, match="is damaged: x does not have its hash"):
        store.check_files(made)
    monkeypatch.setattr(store, "checked_before", True)
    assert store.check_files(made) == made


def _slow_build(folder: Path) -> None:
    time.sleep(0.3)
    (folder / "who").write_text(str(os.getpid()))


def _make(root: str) -> str:
    return (store.artefact(Path(root), "thing", {"a": 1}, _slow_build) / "who").read_text()


def test_racing_processes_make_an_artefact_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_make, [str(tmp_path)] * 6, chunksize=1))) == 1


def test_a_failed_build_leaves_nothing_and_is_made_again(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        store.artefact(tmp_path, "thing", {"a": 1}, fail)
    assert not [p for p in (tmp_path / ".cache").glob("*thing*") if p.is_dir()]
    assert (store.artefact(tmp_path, "thing", {"a": 1}, _slow_build) / "who").is_file()


def test_what_a_killed_build_left_is_swept_away(tmp_path):
    path = store.artefact_path(tmp_path, "thing", {"a": 1})
    leftover = path.parent / f".{path.name}.unfinished"
    leftover.mkdir(parents=True)
    store.artefact(tmp_path, "thing", {"a": 1}, _slow_build)
    assert not leftover.exists() and path.is_dir()


def test_an_artefact_of_files_that_changed_is_refused_and_kept(tmp_path):
    path = store.artefact(tmp_path, "thing", {"a": 1}, _slow_build, {"rows.jsonl": "hash 1"})
    assert store.artefact(tmp_path, "thing", {"a": 1}, _slow_build, {"rows.jsonl": "hash 1"}) == path
    assert store.artefact(tmp_path, "thing", {"a": 1}, _slow_build) == path, "the files need not be there any more"
    with pytest.raises(ValueError, match=r"made from other files than rows.jsonl at hand; give each a results_dir"):
        store.artefact(tmp_path, "thing", {"a": 1}, _slow_build, {"rows.jsonl": "hash 2"})
    assert path.is_dir()


@pytest.mark.parametrize("damage", ["edit", "delete", "manifest"])
def test_a_damaged_artefact_is_refused_and_kept(tmp_path, damage):
    path = store.artefact(tmp_path, "thing", {"a": 1}, _slow_build)
    if damage == "edit":
        (path / "who").write_text("me")
    elif damage == "delete":
        (path / "who").unlink()
    else:
        (path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"Cached artefact {path} .*delete that folder and it is made again"):
        store.artefact(tmp_path, "thing", {"a": 1}, _slow_build)
    assert path.is_dir()


def test_of_processes_that_train_together_one_reads_what_all_have(tmp_path, monkeypatch):
    path = store.artefact(tmp_path, "thing", {"a": 1}, _slow_build)
    (path / "who").write_text("me")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert store.check_files(path) == path
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="is damaged: who does not have its hash"):
        store.check_files(path)


def test_the_content_hash_follows_the_content(tmp_path):
    one = store.artefact(tmp_path, "x", {"a": 1}, lambda f: (f / "v").write_text("1"))
    same = store.artefact(tmp_path, "x", {"a": 2}, lambda f: (f / "v").write_text("1"))
    other = store.artefact(tmp_path, "x", {"a": 3}, lambda f: (f / "v").write_text("2"))
    assert store.content_hash(one) == store.content_hash(same) != store.content_hash(other)


@pytest.mark.parametrize("content", ["{", '{"format": "kdlib results", "version": 99}'])
def test_a_marker_of_another_version_is_refused(tmp_path, content):
    (tmp_path / store.MARKER).write_text(content)
    with pytest.raises(ValueError, match="of another version"):
        store.open_folder(tmp_path)
