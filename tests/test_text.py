import errno
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from kdlib import data, text
from kdlib.presets import PRESETS

DOMAINS = PRESETS["realtext"].source["domains"]

DOLLY = [{"instruction": f"Say {i}", "context": "in French" if i % 2 else "", "response": f"answer {i}", "category": "open_qa"}
         for i in range(200)]


def write(path, rows, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    return path


def messages(i):
    return [{"role": "user", "content": f"Ask {i}"}, {"role": "assistant", "content": f"ü answer {i}"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Local data as a user would lay it out: plain and gzip JSON lines."""
    rows = [{"id": f"set-open_qa-{i}", "source": "mine" if i < 80 else "other", "messages": messages(i)} for i in range(100)]
    write(tmp_path / "train.jsonl.gz", [*rows, {**rows[0], "id": "again"}], gzip.open)
    write(tmp_path / "test.jsonl", [{"id": f"t-{i}", "source": "mine", "messages": messages(i)} for i in range(70, 90)])
    write(tmp_path / "plain.jsonl", [{"text": "It was a night."}, {"text": " "}, {"text": "It was a day."}])
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set that the real hub loader reads, in Dolly's columns, and no local folder."""
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "data.jsonl", DOLLY)
    write(tmp_path / "pre.jsonl", [{"text": "plain"}])
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "hub")


def local(name, **more):
    return {"local": name, "hub": "someone/something", **more}


def rows_of(source):
    return [text.parse(row, i, "x")[0] for i, row in enumerate(text.load_rows(source))]


def test_json_lines_parquet_and_folders_read_the_same(tmp_path):
    rows = [{"id": str(i), "messages": messages(i)} for i in range(5)]
    write(tmp_path / "x.jsonl", rows)
    write(tmp_path / "x.jsonl.gz", rows, gzip.open)
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for name, part in (("one", rows[:2]), ("two", rows[2:])):
        write(tmp_path / "folder" / f"{name}.jsonl", part)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows), "odd": Dataset.from_list(rows[:1])}).save_to_disk(tmp_path / "parts")
    found = [text.conversations({"local": str(tmp_path / name)})[0].to_list() for name in ("x.jsonl", "x.jsonl.gz", "x.parquet", "folder", "saved", "parts")]
    assert len(found[0]) == 5 and all(f == found[0] for f in found)
    assert len(text.load_rows({"local": str(tmp_path / "parts"), "split": "odd"})) == 1
    with pytest.raises(ValueError, match="split='test' is not in .*parts; allowed: train, odd"):
        text.load_rows({"local": str(tmp_path / "parts"), "split": "test"})


def test_files_that_hold_no_rows_or_unlike_ones_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "mixed" / "y.jsonl", [{"messages": messages(0)}])
    Dataset.from_list([{"messages": messages(1)}]).to_parquet(tmp_path / "mixed" / "x.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and so on")
    for name, column in (("a", "messages"), ("b", "prompt")):
        (tmp_path / "unlike").mkdir(exist_ok=True)
        Dataset.from_dict({column: ["x"]}).to_parquet(tmp_path / "unlike" / f"{name}.parquet")
    Dataset.from_dict({"line": ["x"], "at": ["y"]}).to_parquet(tmp_path / "odd.parquet")
    for name, kind, message in (("empty.jsonl", ValueError, "empty.jsonl has no rows"), ("mixed", FileNotFoundError, "mixed holds both kinds of data"),
                                ("broken.parquet", ValueError, "broken.parquet cannot be read as Parquet files"),
                                ("unlike", ValueError, "unlike cannot be read as Parquet files of the same columns"),
                                ("odd.parquet", ValueError, r"odd.parquet, row 1: row None has no 'messages'")):
        with pytest.raises(kind, match=message):
            text.conversations({"local": str(tmp_path / name)})


@pytest.mark.parametrize("ids", [["a", "a", "a#2", "a"], ["a#2", "a", "a"], ["a", "b", "a", "a"]])
def test_ids_are_made_different_whatever_they_are(tmp_path, ids):
    write(tmp_path / "x.jsonl", [{"id": i, "messages": messages(n)} for n, i in enumerate(ids)])
    found = text.conversations({"local": str(tmp_path / "x.jsonl")})[0]["id"]
    assert len(set(found)) == len(ids) and {i.split("#")[0] for i in found} == {i.split("#")[0] for i in ids}


def test_a_full_disk_where_data_are_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "x.jsonl", [{"messages": messages(0)}])
    monkeypatch.setattr(text, "load_rows", lambda source: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=rf"The disk is full under {text._scratch().name}; free some"):
        text.conversations({"local": str(tmp_path / "x.jsonl")})


def test_many_processes_give_the_same_rows(folder):
    once, twice = (text.conversations(local("train.jsonl.gz"), num_proc=n) for n in (1, 2))
    assert once[0].to_list() == twice[0].to_list() and once[1] == twice[1]


@pytest.mark.parametrize("content, line", [(b'{"a": 1}\n{"a": \n', 2), (b'{"a": 1}\n{"a": 2}\n{"a": "\xff"}\n', 3),
                                           (b'{"a": 1}\n\n[1, 2]\n', 3), (b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n', 2)])
def test_a_malformed_line_is_named(tmp_path, content, line):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line {line}: not a JSON object"):
        rows_of({"local": str(tmp_path / "bad.jsonl")})
    (tmp_path / "whole.jsonl").write_bytes(json.dumps({"messages": messages(0)}).encode() + b"\n" + b'{"messages"\n')
    with pytest.raises(ValueError, match=r"whole\.jsonl, line 2: not a JSON object"):
        text.conversations({"local": str(tmp_path / "whole.jsonl")})


def test_a_truncated_gzip_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", DOLLY, gzip.open)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz, line \d+: the archive is broken"):
        text.load_rows({"local": str(path)})


def test_local_rows_are_filtered_and_no_conversation_comes_twice(folder):
    some, report = text.conversations(local("train.jsonl.gz", where={"source": "mine"}))
    assert report == {"rows_read": 81, "empty_answers_dropped": 0, "duplicates_dropped": 1} and len(some) == 80
    assert len(text.conversations(local("train.jsonl.gz"))[0]) == 100


def test_a_missing_local_file_names_both_remedies(folder):
    with pytest.raises(FileNotFoundError, match=r"has no file 'absent.jsonl'.*KDLIB_DATA.*for the hub"):
        text.load_rows(local("absent.jsonl"))


@pytest.mark.parametrize("gone", ["train.jsonl.gz", "test.jsonl", "plain.jsonl"])
def test_each_missing_file_is_named(folder, gone):
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no file '{gone}'; point KDLIB_DATA at its folder"):
        text.corpus(0, pretrain=local("plain.jsonl"), train=local("train.jsonl.gz"), test={"local": "test.jsonl"}, validation_rows=1,
                    test_rows=1).pretrain()


def test_the_origin_is_the_local_files_content(folder, monkeypatch):
    source = {"pretrain": local("plain.jsonl"), "train": local("train.jsonl.gz"), "test": {"local": "test.jsonl"}}
    first = text.origin(**source, validation_rows=1)
    assert list(first) == ["plain.jsonl", "train.jsonl.gz", "test.jsonl"] and first == text.origin(**source)
    write(folder / "plain.jsonl", [{"text": "It was a dark night."}])
    assert {n for n in first if first[n] != text.origin(**source)[n]} == {"plain.jsonl"}
    for name in ("a", "b"):
        (folder / name).mkdir()
        write(folder / name / "rows.jsonl", [{"text": name}])
    both = text.origin(train=local("a"), test=local("b/rows.jsonl"))
    assert list(both) == ["a/rows.jsonl", "b/rows.jsonl"] and len(set(both.values())) == 2, "equal names in two folders"
    monkeypatch.delenv("KDLIB_DATA")
    assert text.origin(**source) is None


def test_an_unreachable_hub_names_both_remedies(hub, tmp_path):
    gone = str(tmp_path / "gone" / "away" / "far")
    with pytest.raises(FileNotFoundError, match=r"Neither the hub nor local data.*internet.*KDLIB_DATA.*'rows.jsonl'"):
        text.load_rows({"hub": gone, "local": "rows.jsonl"})


def test_dolly_columns_become_messages():
    assert text.to_messages(DOLLY[1]) == [{"role": "user", "content": "Say 1\n\nin French"},
                                          {"role": "assistant", "content": "answer 1"}]
    assert text.to_messages({"messages": messages(1), "response": "other"}) == messages(1)
    with pytest.raises(ValueError, match="no 'messages' and no"):
        text.to_messages({"id": 7, "prompt": "a"})


@pytest.mark.parametrize("row", [
    {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.\n\n1 2", "completion": "3"},
    {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}], "completion": [{"role": "assistant", "content": "3"}]},
    {"messages": [{"role": "user", "content": "Add.\n\n1 2", "name": None}, {"role": "assistant", "content": "3"}]}])
def test_other_columns_become_the_same_messages(row):
    assert text.to_messages(row) == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]


def test_a_template_that_names_no_column_is_refused():
    source = {"prompt": "Q: {{ question }} {{ contxt }}", "answer": "{{ answer }}"}
    row = {"id": "r7", "question": "why", "context": "c", "answer": "so"}
    with pytest.raises(ValueError, match=r"here: row 'r7' does not fit the source's templates \('contxt' is undefined\); its columns are id, question, context, answer"):
        text.to_messages(row, "here", source)
    optional = "{{ question }}{% if contxt %} {{ contxt }}{% endif %}{{ more or '' }}?"
    assert text.to_messages(row, "here", {**source, "prompt": optional})[0] == {"role": "user", "content": "why?"}, "what is asked for may lack"
    assert text.to_messages(row, "here", {**source, "prompt": "{{ question }}?"})[0] == {"role": "user", "content": "why?"}


def test_the_hubs_columns_of_the_domains_become_what_the_local_copies_hold():
    maths, medical = DOMAINS["maths"]["train"], PRESETS["paper"].source["domains"]["medical"]["train"]
    row = {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24.\n#### 24"}
    asked, said = (m["content"] for m in text.to_messages(row, source=maths))
    assert asked.startswith("How many?\n\nSolve the problem step by step") and said == "He has 48/2 = 24.\n\nAnswer: 24"
    row = {"question": "Does it help?", "context": {"contexts": ["It did.", "Much."], "labels": ["BACKGROUND", "RESULTS"]},
           "long_answer": "It helps.", "final_decision": "yes"}
    asked, said = (m["content"] for m in text.to_messages(row, source=medical))
    assert asked.startswith("Background: It did.\nResults: Much.\n\nQuestion: Does it help?\n\nAnswer from the abstract above")
    for known in (row, {"messages": text.to_messages(row, source=medical)}):  # the hub's row, and a copy that holds the whole prompt
        alone, same = (m["content"] for m in text.to_messages(known, source=DOMAINS["medical"]["train"]))
        assert alone.startswith("Does it help?\n\ngive a short conclusion, then end with") and same == said, "the question without the abstract"
    assert said == "It helps.\n\nAnswer: yes" and text.verifier(0)({"answer": "yes"}, "So it is.\n\nAnswer: yes.\n") is True
    assert text.verifier(0)({"answer": "yes"}, "Answer: no") is False and text.verifier(0)({"answer": None}, "Answer: no") is None


def test_corpus_keeps_held_out_prompts_out_of_training(folder):
    corpus = text.corpus(0, pretrain=local("plain.jsonl"), train=local("train.jsonl.gz", where={"source": "mine"},
                                                                       category_in_id=r"set-(\w+)-"),
                         test=local("test.jsonl", where={"source": "mine"}), validation_rows=10, test_rows=15)
    prompts = {s: {m[0]["content"] for m in corpus.sets[s]["messages"]} for s in ("train", "validation", "test")}
    assert {s: len(p) for s, p in prompts.items()} == {"train": 60, "validation": 10, "test": 15}
    assert not prompts["train"] & prompts["validation"]
    held = {f"Ask {i}" for i in range(70, 90)}
    assert not (prompts["train"] | prompts["validation"]) & held and prompts["test"] <= held
    assert corpus.report == {"train": {"rows_read": 81, "empty_answers_dropped": 0, "duplicates_dropped": 1, "held_out_prompts_dropped": 10}}
    assert corpus.pretrain() == ["It was a night.", "It was a day."]
    assert set(corpus.sets["train"]["skill"]) == {"open_qa"} and corpus.vocabulary is None


def test_corpus_from_a_hub_id_holds_out_one_prompt_in_twenty(hub):
    source = {"hub": hub, "local": "x.jsonl", "where": {"source": "dolly_15k"}}
    corpus = text.corpus(0, pretrain={"hub": hub, "local": "x"}, train=source, test={"local": "y.jsonl"}, validation_rows=20,
                         test_rows=500)
    assert len(corpus.sets["test"]) == 10 and len(corpus.sets["train"]) + len(corpus.sets["test"]) + 20 == 200
    assert set(corpus.sets["train"]["skill"]) == {"open_qa"}
    again = text.corpus(0, pretrain={"hub": hub, "local": "x"}, train=source, test={"local": "y.jsonl"}, validation_rows=20,
                        test_rows=500)
    assert again.sets["train"].to_list() == corpus.sets["train"].to_list() and again.sets["test"].to_list() == corpus.sets["test"].to_list()


@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "needs messages that are objects"),
    ({"messages": "a"}, "needs messages that are objects"), ({"messages": ["a"]}, "needs messages that are objects"),
    ({"messages": [{"role": "user", "content": "a"}]}, "has no assistant's turn"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "needs messages that are objects"),
    ({"response": "a"}, "no 'messages' and no 'instruction' or 'prompt' with an answer")])
def test_a_row_without_a_conversation_is_named_with_its_file(folder, row, message):
    write(folder / "odd.jsonl", [{"id": "fine", "messages": messages(1)}, {"id": "x", **row}])
    with pytest.raises(ValueError, match=rf"odd\.jsonl, line 2: row 'x'.*{message}"):
        text.corpus(0, pretrain=local("plain.jsonl"), train=local("odd.jsonl"), test=local("test.jsonl"), validation_rows=1, test_rows=1)


def test_plain_rows_without_text_are_named(folder):
    corpus = text.corpus(0, pretrain=local("test.jsonl"), train=local("train.jsonl.gz"), test=local("test.jsonl"),
                         validation_rows=1, test_rows=1)
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1 has no 'text'; its columns are \['id', 'messages', 'source'\]"):
        corpus.pretrain()


def test_a_source_without_a_matching_row_is_named(folder):
    with pytest.raises(ValueError, match=r"test\.jsonl has no row with source='dolly' among its 20"):
        text.conversations(local("test.jsonl", where={"source": "dolly"}))


def test_rows_that_share_a_system_prompt_are_not_duplicates(folder):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"id": i, "messages": [system, *messages(i)]} for i in range(6)]
    turn = {"id": "again", "messages": [*rows[0]["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]}
    write(folder / "system.jsonl", [*rows, rows[0], turn])
    corpus = text.corpus(0, pretrain=local("plain.jsonl"), train=local("system.jsonl"), test=local("test.jsonl"),
                         validation_rows=1, test_rows=1)
    assert corpus.report["train"]["duplicates_dropped"] == 1 and len(corpus.sets["train"]) == 6


def test_what_opens_a_conversation_is_all_that_comes_before_a_user_is_answered(folder):
    def opened(i, greeting=True):
        said = [{"role": "system", "content": "Be brief."}, *([{"role": "assistant", "content": "Hello!"}] if greeting else [])]
        return said + [{"role": "user", "content": f"Ask {i % 40}"}, {"role": "assistant", "content": f"So {i}."}]

    write(folder / "greeted.jsonl", [{"id": i, "messages": [*opened(i), {"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": "No."}]}
                                     for i in range(400)])
    sets, report = text.split(local("greeted.jsonl"), {}, validation_rows=20, test_rows=20)
    begun = {name: {m[2]["content"] for m in rows["messages"]} for name, rows in sets.items()}
    assert all(len(b) > 0 for b in begun.values())
    assert not begun["train"] & begun["validation"] and not begun["test"] & (begun["train"] | begun["validation"])
    assert len(sets["train"]) + 20 + report["held_out_prompts_dropped"] + report["validation_prompts_dropped"] == 400
    write(folder / "one.jsonl", [{"id": i, "messages": opened(0)[:-1] + [{"role": "assistant", "content": f"So {i}."}]} for i in range(100)])
    for name, own in (("one.jsonl", "100 conversations with 1 different beginnings"), ("few.jsonl", "12 conversations with 12 different")):
        write(folder / "few.jsonl", [{"id": i, "messages": opened(i)} for i in range(12)])
        with pytest.raises(ValueError, match=f"{name} has {own}.*are left to test and .*; allowed: 20 or more with beginnings of their own"):
            text.split(local(name), {}, validation_rows=2, test_rows=5)


def test_budgets_are_stratified_by_category_by_the_id_or_by_source(tmp_path):
    rows = [{"id": f"s-{'ab'[i % 2]}-{i}", "source": f"source-{i % 3}", "messages": messages(i)} for i in range(12)]
    write(tmp_path / "x.jsonl", rows)
    write(tmp_path / "y.jsonl", [{**r, "category": f"kind-{i % 4}"} for i, r in enumerate(rows)])
    for name, more, kinds in (("x", {}, {f"source-{i}" for i in range(3)}), ("y", {}, {f"kind-{i}" for i in range(4)}),
                              ("x", {"category_in_id": r"s-(\w)-"}, {"a", "b"})):
        found, _ = text.conversations({"local": str(tmp_path / f"{name}.jsonl"), **more})
        first = [found["skill"][i] for i in data.nested_order(list(found["skill"]), 0)[:len(kinds)]]
        assert set(found["skill"]) == kinds == set(first), "as many of each"


def test_a_row_that_answers_nothing_is_left_out_and_counted(folder):
    empty = {"id": "e", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]}
    write(folder / "some.jsonl", [empty, *({"id": str(i), "messages": messages(i)} for i in range(3))])
    write(folder / "none.jsonl", [empty])
    rows, report = text.conversations(local("some.jsonl"))
    assert len(rows) == 3 and report["empty_answers_dropped"] == 1
    with pytest.raises(ValueError, match="none.jsonl has no row among its 1 that says something"):
        text.conversations(local("none.jsonl"))


def test_a_domain_has_annotations_and_a_pool_without_answers(folder):
    write(folder / "own.jsonl", [{"id": str(i), "messages": [{"role": "user", "content": f"own {i}"}, {"role": "assistant", "content": f"so.\n\nAnswer: {i}"}]}
                                 for i in range(80)])
    write(folder / "own_test.jsonl", [{"id": f"t{i}", "messages": [{"role": "user", "content": f"own {i}"}, {"role": "assistant", "content": f"Answer: {i}"}]}
                                      for i in range(20)])
    write(folder / "asked.jsonl", [{"id": f"q{i}", "messages": [{"role": "user", "content": f"asked {i}"}]} for i in range(30)])
    d = {"train": local("own.jsonl"), "test": local("own_test.jsonl"), "validation_rows": 10, "test_rows": 15, "annotated_rows": 20, "unlabelled_rows": 25}
    sets = text.corpus(0, train=local("train.jsonl.gz"), test=local("test.jsonl"), validation_rows=5, test_rows=5,
                       domains={"own": d, "other": {**d, "pool": local("asked.jsonl")}}).sets
    prompts = {name: {m[-2]["content"] for m in rows["messages"]} for name, rows in sets.items()}
    assert {n: len(p) for n, p in prompts.items() if "/" in n} == {
        "own/train": 20, "own/validation": 10, "own/test": 15, "own/pool": 25, "other/train": 20, "other/validation": 10, "other/test": 15, "other/pool": 25}
    for name in ("own", "other"):
        held = prompts[f"{name}/test"] | prompts[f"{name}/validation"]
        assert not held & (prompts[f"{name}/train"] | prompts[f"{name}/pool"])
        assert {m[-1]["content"] for m in sets[f"{name}/pool"]["messages"]} == {""}
    assert all(p.startswith("asked") for p in prompts["other/pool"]) and sets["own/train"][0]["answer"].isdigit()
    assert {*sets["train"]["answer"]} == {None} and None not in sets["own/pool"]["answer"]  # to count right labels, for nobody to learn
