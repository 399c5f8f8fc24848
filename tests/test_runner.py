import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from tiny import plan

from kdlib import results, runner, study

SCRIPT = Path(__file__).with_name("tiny.py")


def _note(folder: str, name: str) -> None:
    time.sleep(0.05)
    (Path(folder) / name).write_text(str(os.getpid()))


def _fail(message: str) -> None:
    raise ValueError(message)


def _tell(path: str) -> None:
    Path(path).write_text(os.environ.get("KDLIB_DATA", "nothing"))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def task(folder, name, cost=1.0):
    return {partial(_note, str(folder), name): cost}


def test_processes_share_the_work(tmp_path, capsys):
    tasks = {t: cost for i in range(12) for t, cost in task(tmp_path, f"x{i}").items()}
    runner.compute(tasks, workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(t.args[1] for t in tasks)
    assert len({p.read_text() for p in tmp_path.iterdir()}) == 2, "two processes"
    said = capsys.readouterr()
    assert "12 of 12 tasks, 100%" in said.out and " left" in said.out and not said.err


def test_what_others_wait_for_goes_before_what_was_ready_earlier(tmp_path):
    (first, then), late = (next(iter(task(tmp_path, name))) for name in ("first", "then")), [next(iter(task(tmp_path, f"late {i}"))) for i in range(3)]
    runner.compute(dict.fromkeys([first, then, *late], 1.0), workers=1, needs={then: [first]})
    done = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert [p.name for p in done] == ["first", "then", "late 0", "late 1", "late 2"]


def test_workers_have_the_environment_of_now(tmp_path, monkeypatch):
    for value in ("one", "two", None):
        monkeypatch.setenv("KDLIB_DATA", value) if value else monkeypatch.delenv("KDLIB_DATA")
        runner.compute({partial(_tell, str(tmp_path / "said")): 1.0}, workers=1)
        assert (tmp_path / "said").read_text() == (value or "nothing")


def _tell_gpus(folder: str, name: str) -> None:
    time.sleep(0.3)
    (Path(folder) / name).write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}")


@pytest.mark.parametrize("workers, launch, seen", [(3, "", ["3", "3", "5"]), (1, "", ["3,5"]), (2, "processors.yaml", ["3,5", "3,5"])])
def test_of_several_gpus_each_of_several_workers_sees_its_own(tmp_path, monkeypatch, workers, launch, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("KDLIB_LAUNCH", launch and str(results.REPOSITORY / "kdlib" / "accelerate" / launch))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    runner.compute({partial(_tell_gpus, str(tmp_path), f"x{i}"): 1.0 for i in range(9)}, workers=workers)
    assert sorted(gpus for _, gpus in {tuple(p.read_text().split()) for p in tmp_path.iterdir()}) == seen


def test_a_launch_and_a_cluster_do_not_go_together(monkeypatch):
    monkeypatch.setenv("KDLIB_LAUNCH", "any.yaml")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match="KDLIB_LAUNCH='any.yaml' and RAY_ADDRESS='auto' do not go together, .*; allowed: one of them"):
        runner.launch_settings()


@pytest.mark.parametrize("there", [True, False])
def test_a_worker_gives_an_accelerators_memory_back_after_a_task(monkeypatch, there):
    done = []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: there)
    monkeypatch.setattr("torch.accelerator.empty_cache", lambda: done.append("emptied"))
    runner._do(lambda: done.append("task"))
    assert done == ["task", "emptied"][:1 + there]


def test_the_bar_weighs_tasks_by_their_cost(tmp_path, capsys):
    runner.compute(task(tmp_path, "light", 1.0) | task(tmp_path, "heavy", 3.0), workers=1)
    said = capsys.readouterr().out
    assert "1 of 2 tasks,  25%" in said and "2 of 2 tasks, 100%" in said


def test_a_failure_stops_the_rest_and_keeps_what_is_done(tmp_path):
    tasks = task(tmp_path, "a") | {partial(_fail, "no such luck"): 1.0} | {partial(_note, str(tmp_path), f"later{i}"): 1.0 for i in range(9)}
    with pytest.raises(ValueError, match="no such luck"):
        runner.compute(tasks, workers=1)
    done = {p.name for p in tmp_path.iterdir()}
    assert "a" in done and "later8" not in done, "what was begun is finished, the rest is not begun"


def test_a_worker_that_dies_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="A worker process died .*finished runs are kept, so run again"):
        runner.compute(task(tmp_path, "a") | {_die: 1.0}, workers=1)
    assert (tmp_path / "a").exists()


def test_who_ends_with_another_outlives_it_by_little():
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    bound = "import os, sys, time\nfrom kdlib import runner\nrunner.end_with(int(sys.argv[1]))\nprint('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(waits) as other, subprocess.Popen([sys.executable, "-c", bound, str(other.pid)], stdout=subprocess.PIPE) as mine:
        assert mine.stdout.readline() and mine.poll() is None
        other.kill()
        other.wait()
        assert mine.wait(timeout=20) == 1


def test_launched_processes_that_fail_say_why_and_where_all_they_said_is(tmp_path, monkeypatch):
    (tmp_path / "spoilt.py").write_text("print('before')\nraise ValueError('no such luck')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    configuration = str(results.REPOSITORY / "kdlib" / "accelerate" / "processors.yaml")
    with pytest.raises(RuntimeError, match=r"Training with KDLIB_LAUNCH='.*processors.yaml' failed: .*ValueError: no such luck \(all it said: (.*)\)") as failure:
        runner.launch(configuration, "spoilt")
    log, = tmp_path.glob("kdlib-launch-*.log")
    assert str(log) in str(failure.value) and "before" in log.read_text()


def test_a_launch_starts_as_many_processes_as_its_configuration_says(tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("import os, pathlib\nrank = os.environ['RANK']\npathlib.Path(__file__).with_name(f'rank-{rank}').write_text(os.environ['WORLD_SIZE'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner.launch(str(results.REPOSITORY / "kdlib" / "accelerate" / "processors.yaml"), "told")
    assert {p.name: p.read_text() for p in tmp_path.glob("rank-*")} == {"rank-0": "2", "rank-1": "2"}


def _die_once(folder: str) -> None:
    if not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        _die()
    _note(folder, "survived")


@pytest.fixture
def cluster(monkeypatch):
    """A Ray of two workers on this machine, who can import what these tests define."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    yield ray
    ray.shutdown()


def test_ray_does_a_task_again_whose_worker_was_killed_with_the_drivers_settings(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", "one")  # which the cluster was started without
    told = {partial(_tell, str(tmp_path / "told")): 1.0}
    runner.compute(task(tmp_path, "a") | task(tmp_path, "b") | {partial(_die_once, str(tmp_path)): 1.0} | task(tmp_path, "c") | told)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "died", "survived", "told"}
    assert (tmp_path / "told").read_text() == "one"
    assert not cluster.is_initialized()


def test_a_study_on_ray_with_a_worker_killed_has_the_same_numbers(cluster, tiny_records, tmp_path):
    root, killed = tmp_path / "ray", []

    def kill():
        while not killed:
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or ())
                if line.startswith("ray::") and "lambda" in line and list(root.glob("tiny/runs/*.json")):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    assert numbers(study.run(plan(root))) == numbers(tiny_records)
    assert killed


def test_without_ray_its_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS asks for Ray, which is missing; pip install 'kdlib\[cluster\]'"):
        runner.compute({})


def start(root):
    return subprocess.Popen([sys.executable, str(SCRIPT), str(root)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            start_new_session=True)


def numbers(records):
    return [(r["run_id"], r["metrics"], r["items"]) for r in records]


def workers_of(group: int) -> list[int]:
    def belongs(process):
        try:
            return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [p.pid for p in psutil.process_iter() if belongs(p)]


def test_killed_at_any_moment_it_goes_on_with_the_same_numbers(tiny_root, tiny_records, tmp_path):
    root, runs = tmp_path / "killed", tmp_path / "killed" / "tiny" / "runs"
    states = []
    for wanted in ("base-", 1, 4):  # while a base model is made, after the first record, half way
        process = start(root)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            done = list(runs.glob("[0-9a-f]*.json"))
            making = list((root / ".cache").glob(".base-*")) if root.exists() else []
            if (making if isinstance(wanted, str) else len(done) >= wanted):
                break
            time.sleep(0.01)
        assert process.poll() is None, "killed while it was running"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):
            if not workers_of(process.pid):
                break
            time.sleep(0.1)
        assert not workers_of(process.pid), "no worker outlives its parent"
        states.append({p.name: p.read_bytes() for p in runs.glob("[0-9a-f]*.json")})
    assert len(states[0]) == 0 and 1 <= len(states[1]) < 8 and 4 <= len(states[2]) < 8
    records = study.run(plan(root))
    assert numbers(records) == numbers(tiny_records)
    for state in states:
        assert all((runs / name).read_bytes() == content for name, content in state.items()), "a record is written once"
    assert len(list(runs.glob("*.json"))) == 8


def test_two_runners_share_one_folder(tiny_records, tmp_path):
    root = tmp_path / "shared"
    pair = [start(root), start(root)]
    assert [p.wait(timeout=300) for p in pair] == [0, 0], [p.stderr.read() for p in pair]
    assert numbers(study.run(plan(root, train_missing=False))) == numbers(tiny_records)
    assert len(list((root / ".cache").glob("base-*"))) == 2 and not list((root / ".cache").glob(".*-*"))


def test_resuming_computes_only_what_is_missing(tiny_root, tiny_records, tmp_path, monkeypatch):
    root = tmp_path / "partial"
    shutil.copytree(tiny_root, root)
    gone = [results.record_path(root, "tiny", tiny_records[i]["run_id"]) for i in (2, 5)]
    for path in gone:
        path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in (root / "tiny" / "runs").glob("*.json")}
    assert numbers(study.run(plan(root))) == numbers(tiny_records)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()) and all(p.exists() for p in gone)


def test_a_damaged_model_stops_the_run_and_spares_the_records(tiny_root, tiny_records, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tiny_root, root)
    results.record_path(root, "tiny", tiny_records[0]["run_id"]).unlink()
    for path in (root / ".cache").glob("base-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"spam")
    with pytest.raises(ValueError, match="is damaged: model.safetensors does not have its hash"):
        study.run(plan(root, workers=1))
    assert len(list((root / "tiny" / "runs").glob("*.json"))) == 7
