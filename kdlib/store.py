"""Files that survive a kill: canonical hashes, atomic writes, a results folder of our own, content-addressed artefacts."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

MARKER = "kdlib-results.json"
FORMAT = {"format": "kdlib results", "version": 1}
checked_before = False  # True in a process for which another has just looked at all artefacts


def digest(value, length: int = 16) -> str:
    """The first ``length`` hex digits of a SHA-256 that is the same for equal values: JSON with sorted keys and no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_hash(path: str | Path, first: int | None = None) -> str:
    """SHA-256 of a file's bytes, or the ``first`` of them, in hex; read once by a process as long as the file stays as it is."""
    about = os.stat(path)
    return _file_hash(str(path), first, about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(maxsize=100_000)
def _file_hash(path: str, first: int | None, *about: int) -> str:
    with open(path, "rb") as file:
        return (hashlib.sha256(file.read(first)) if first else hashlib.file_digest(file, "sha256")).hexdigest()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) so that ``path`` holds the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def open_folder(path: str | Path, name: str = "results_dir") -> Path:
    """``path`` as a results folder: made if new, taken if it has our marker; ValueError, by ``name``, if unwritable or somebody else's."""
    try:
        path = Path(path).expanduser().resolve()
        marker = path / MARKER
        path.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            strangers = [p for p in path.iterdir() if p.name != ".gitignore" and not p.name.startswith(f".{MARKER}.")]
            if strangers and not marker.is_file():  # another runner may have made it just now
                raise ValueError(f"{name}={str(path)!r} holds files of something else (no {MARKER}); give an empty or new folder.")
            write_atomic(marker, json.dumps(FORMAT) + "\n")
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the second where a ~user has no home
        raise ValueError(f"{name}={str(path)!r} cannot be written ({getattr(error, 'strerror', error)}); give a folder that can.") from error
    if (found := marker.read_text(encoding="utf-8").strip()) != json.dumps(FORMAT):
        raise ValueError(f"{name}={str(path)!r} has a {MARKER} of another version ({found!r}); allowed: {FORMAT!r}.")
    return path


def lock(root: Path, name: str) -> FileLock:
    """An inter-process lock; the operating system frees it when its holder dies."""
    folder = root / ".cache" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def artefact_path(root: Path, kind: str, spec: dict) -> Path:
    """Where the artefact made from ``spec`` lies, whether it exists or not."""
    return root / ".cache" / f"{kind}-{digest(spec)}"


@contextmanager
def room_on_disk(folder: str | Path):
    """What fails in it since the disk of ``folder`` is full does so as OSError in one sentence."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(said in str(error) for said in ("os error 28", "PytorchStreamWriter"))  # safetensors, torch.save
        if not full or "The disk is full" in str(error):  # said already
            raise
        raise OSError(errno.ENOSPC, f"The disk is full under {folder}; free some of it and run again: what was finished is kept.") from error


def fill(path: Path, build: Callable[[Path], None], resumes: bool = False, **about) -> None:
    """Make ``path`` with ``build(folder)`` and a manifest of ``about`` and hashes, whole or not at all; the caller holds a lock. A build that
    ``resumes`` finds in its folder what a killed one left. OSError, in one sentence, on a full disk.
    """
    work = path.with_name(f".{path.name}.unfinished")
    if not resumes or path.is_dir():
        shutil.rmtree(work, ignore_errors=True)
    if path.is_dir():
        return
    try:
        with room_on_disk(path.parent):
            work.mkdir(exist_ok=True)
            build(work)
            files = {str(p.relative_to(work)): file_hash(p) for p in sorted(work.rglob("*")) if p.is_file()}
            write_atomic(work / "manifest.json", json.dumps({**about, "files": files}, indent=1))
            os.replace(work, path)
    finally:
        if not resumes:
            shutil.rmtree(work, ignore_errors=True)


def artefact(root: Path, kind: str, spec: dict, build: Callable[[Path], None], origin: dict | None = None, resumes: bool = False) -> Path:
    """The folder that ``build(folder)`` fills for ``spec``, once. ValueError if it or ``origin``, its sources' hashes, changed."""
    path = artefact_path(root, kind, spec)
    with lock(root, path.name):
        fill(path, build, resumes, spec=spec, origin=origin)
    found = manifest(path)
    if origin and found["origin"] and found["origin"] != origin:
        raise ValueError(f"Cached artefact {path} was made from other files than {', '.join(origin)} at hand; give each a results_dir.")
    return check_files(path)


def check_files(path: Path) -> Path:
    """``path``, a folder whose files have the hashes in its manifest. Raises ValueError, naming the file, if one has not. Processes that train
    together leave the reading to the one that starts them, or to the first of them.
    """
    reads = not checked_before and os.environ.get("LOCAL_RANK", "0") == "0"
    for name, wanted in manifest(path)["files"].items():
        if not (path / name).is_file() or (reads and file_hash(path / name) != wanted):
            raise ValueError(f"Cached artefact {path} is damaged: {name} does not have its hash; delete that folder and it is made again.")
    return path


def manifest(path: Path) -> dict:
    """The manifest of an artefact folder. Raises ValueError if it is missing or unreadable."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return {"origin": found.get("origin"), "files": dict(found["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Cached artefact {path} has no readable manifest.json; delete that folder and it is made again.") from error


def content_hash(path: Path) -> str:
    """One hash over all files of an artefact, for provenance, but for commits.json, which says where it came from and not what it is."""
    return digest({name: found for name, found in manifest(path)["files"].items() if name != "commits.json"})
