"""Presets: what kdlib's own say of themselves, and a user's."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdlib import presets

TEXT = Path(presets.__file__).with_suffix(".toml").read_text("utf-8")


def test_every_setting_of_the_papers_presets_says_whose_it_is():
    said = re.split(r"(?m)^\[paper\]", TEXT)[1].splitlines()
    settings = [line for line in said if re.match(r"[\w.]+ = ", line) and not line.startswith(("about = ", "like = "))]
    assert len(settings) > 60
    for line in settings:
        assert re.search(r"# .*\b(paper|Tulu 3|ours)\b", line), line


def test_a_preset_of_ones_own_is_like_another_but_for_what_it_says(tmp_path):
    (tmp_path / "mine.toml").write_text('[mine]\nlike = "paper"\nseeds = [5, 6]\nbases.student = { hub = "me/small" }\nlearning_rate.kd = { 10 = 1e-3 }\n')
    code = "import json; from kdlib import presets; print(json.dumps({n: vars(p) for n, p in presets.PRESETS.items()}, default=str))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "KDLIB_PRESETS": str(tmp_path / "mine.toml")}, capture_output=True, text=True)
    found = json.loads(done.stdout)
    mine, paper = found.pop("mine"), json.loads(json.dumps(vars(presets.PRESETS["paper"]), default=str))
    assert found == json.loads(json.dumps({n: vars(p) for n, p in presets.PRESETS.items()}, default=str)), "the others stay"
    assert (mine["seeds"], mine["bases"]["student"]) == ([5, 6], {"hub": "me/small", "revision": "main"})
    assert mine["learning_rate"] == {**paper["learning_rate"], "kd": {"1000": 1e-5, "10": 1e-3}}
    assert {k for k in paper if mine[k] != paper[k]} == {"name", "seeds", "bases", "learning_rate"}


def test_false_takes_a_table_away_and_else_is_a_value():
    known = {"teachers": {"base": {"hub": "a"}, "large": {"hub": "b"}}, "training": {"bf16": True}}
    changes = {"teachers": {"large": False}, "training": {"bf16": False}}
    assert presets._over(known, changes) == {"teachers": {"base": {"hub": "a"}}, "training": {"bf16": False}}
    hub = presets._read("mine", presets._over(copy.deepcopy(presets._TABLES["paper"]), {"teachers": {"weak": {"hub": "a/b"}, "base": {"hub": "c/d"}}}))
    assert hub.teachers["weak"] == {"hub": "a/b", "revision": "main"} == {**hub.teachers["base"], "hub": "a/b"}
    with pytest.raises(ValueError, match="teachers.large of preset 'mine'=False has type bool; allowed: a table, or false to take away one that is there"):
        presets._read("mine", presets._over(copy.deepcopy(presets._TABLES["lab"]), {"teachers": {"large": False}}))


@pytest.mark.parametrize("said, message", [
    ('[lab]\nlike = "paper"', "Preset 'lab' of KDLIB_PRESETS='.*' is one of kdlib; allowed: a table under a new name"),
    ("mine = 3", "Preset 'mine' of .* is no table; allowed: a table under a new name"),
    ("[mine]", r"like of preset 'mine' of .*=None has type NoneType; allowed: smoke, lab"),
    ('[mine]\nlike = "papr"', "'papr' is not allowed; allowed: smoke, lab"),
    ('[mine]\nlike = "paper"\nseedz = [1]', "Preset 'mine' of .* has unknown seedz; allowed: about, alone"),
    ("[mine", r"KDLIB_PRESETS='.*mine.toml' cannot be read \(TOMLDecodeError: .*allowed: a TOML file like kdlib/presets.toml"), (None, "FileNotFoundError")])
def test_a_file_of_presets_that_is_wrong_is_named(tmp_path, said, message):
    if said is not None:
        (tmp_path / "mine.toml").write_text(said)
    with pytest.raises(ValueError, match=message):
        presets._own(str(tmp_path / "mine.toml"), {n: vars(p) for n, p in presets.PRESETS.items()})
