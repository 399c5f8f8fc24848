import gzip
import json

import pytest

from kdlib import text

DOLLY = [{"instruction": f"Say {i}", "context": "in French" if i % 2 else "", "response": f"answer {i}", "category": "open_qa"}
         for i in range(200)]


def write(path, rows, opener=open):
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


def test_json_lines_plain_and_gzip_read_the_same(tmp_path):
    rows = [{"a": "ü"}, {"a": 2}]
    assert text.read_jsonl(write(tmp_path / "x.jsonl", rows)) == rows
    assert text.read_jsonl(write(tmp_path / "x.jsonl.gz", rows, gzip.open)) == rows


@pytest.mark.parametrize("content, line", [(b'{"a": 1}\n{"a": \n', 2), (b'{"a": 1}\n{"a": 2}\n{"a": "\xff"}\n', 3),
                                           (b'{"a": 1}\n\n[1, 2]\n', 3)])
def test_a_malformed_line_is_named(tmp_path, content, line):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line {line}: not a JSON object"):
        text.read_jsonl(tmp_path / "bad.jsonl")


def test_a_truncated_gzip_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", DOLLY, gzip.open)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz, line \d+"):
        text.read_jsonl(path)


def test_local_rows_are_filtered(folder):
    assert len(text.load_rows(local("train.jsonl.gz", where={"source": "mine"}))) == 81
    assert len(text.load_rows(local("train.jsonl.gz"))) == 101


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


def test_corpus_keeps_held_out_prompts_out_of_training(folder):
    corpus = text.corpus(0, pretrain=local("plain.jsonl"), train=local("train.jsonl.gz", where={"source": "mine"},
                                                                       category_in_id=r"set-(\w+)-"),
                         test=local("test.jsonl", where={"source": "mine"}), validation_rows=10, test_rows=15)
    prompts = {s: {m[0]["content"] for m in corpus.sets[s]["messages"]} for s in ("train", "validation", "test")}
    assert {s: len(p) for s, p in prompts.items()} == {"train": 60, "validation": 10, "test": 15}
    assert not prompts["train"] & prompts["validation"]
    held = {f"Ask {i}" for i in range(70, 90)}
    assert not (prompts["train"] | prompts["validation"]) & held and prompts["test"] <= held
    assert corpus.report == {"rows_read": 81, "duplicate_prompts_dropped": 1, "held_out_prompts_dropped": 10}
    assert corpus.pretrain() == ["It was a night.", "It was a day."]
    assert set(corpus.sets["train"]["skill"]) == {"open_qa"} and corpus.vocabulary is None


def test_corpus_from_a_hub_id_holds_out_one_prompt_in_twenty(hub):
    source = {"hub": hub, "local": "x.jsonl", "where": {"source": "dolly_15k"}}
    corpus = text.corpus(0, pretrain={"hub": hub, "local": "x"}, train=source, test={"local": "y.jsonl"}, validation_rows=20,
                         test_rows=500)
    assert 1 <= len(corpus.sets["test"]) <= 25 and len(corpus.sets["train"]) + len(corpus.sets["test"]) + 20 == 200
    assert set(corpus.sets["train"]["skill"]) == {"open_qa"}
    again = text.corpus(0, pretrain={"hub": hub, "local": "x"}, train=source, test={"local": "y.jsonl"}, validation_rows=20,
                        test_rows=500)
    assert again.sets["train"].to_list() == corpus.sets["train"].to_list() and again.sets["test"].to_list() == corpus.sets["test"].to_list()


@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "messages must be objects"),
    ({"messages": "a"}, "messages must be objects"), ({"messages": ["a"]}, "messages must be objects"),
    ({"messages": [{"role": "user", "content": "a"}]}, "one of them an assistant's"),
    ({"response": "a"}, "no 'messages' and no 'instruction' with 'response'")])
def test_a_row_without_a_conversation_is_named_with_its_file(folder, row, message):
    write(folder / "odd.jsonl", [{"id": "fine", "messages": messages(1)}, {"id": "x", **row}])
    with pytest.raises(ValueError, match=rf"odd\.jsonl: Row 'x'.*{message}"):
        text.corpus(0, pretrain=local("plain.jsonl"), train=local("odd.jsonl"), test=local("test.jsonl"), validation_rows=1, test_rows=1)


def test_plain_rows_without_text_are_named(folder):
    corpus = text.corpus(0, pretrain=local("test.jsonl"), train=local("train.jsonl.gz"), test=local("test.jsonl"),
                         validation_rows=1, test_rows=1)
    with pytest.raises(ValueError, match=r"test\.jsonl, row 1 has no 'text'; its columns are \['id', 'messages', 'source'\]"):
        corpus.pretrain()


def test_a_source_without_a_matching_row_is_named(folder):
    with pytest.raises(ValueError, match=r"test\.jsonl has no row with source='dolly' among its 20"):
        text.load_rows(local("test.jsonl", where={"source": "dolly"}))


def test_rows_that_share_a_system_prompt_are_not_duplicates(folder):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"id": i, "messages": [system, *messages(i)]} for i in range(6)]
    turn = {"id": "again", "messages": [*rows[0]["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]}
    write(folder / "system.jsonl", [*rows, rows[0], turn])
    corpus = text.corpus(0, pretrain=local("plain.jsonl"), train=local("system.jsonl"), test=local("test.jsonl"),
                         validation_rows=1, test_rows=1)
    assert corpus.report["duplicate_prompts_dropped"] == 1 and len(corpus.sets["train"]) == 6
