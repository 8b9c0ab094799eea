"""Every kind of source gives the same documents; what is wrong with one is said with its file and line."""

import bz2
import gzip
import json
import logging
import lzma

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tbjax.training import data
from tbjax.training.data.constructors import kind_of
from tbjax.training.data.encoder import Encoder, in_pieces
from tests.training.vocabulary import byte_tokenizer

TEXTS = ["The first of them.", "Der zweite: größer.", "三つ目", "and\nthe last"]
SIZES = {"seq_len": 16, "batch_size": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def texts_of(dataset, tokenizer):
    """The documents as texts, their end tokens taken off."""
    corpus = dataset.corpus
    parts = [corpus.read(corpus.offsets[n], corpus.offsets[n + 1]).ids for n in range(len(corpus.lengths))]
    assert all(part[-1] == tokenizer.eos_token_id for part in parts)
    return [tokenizer.decode(part[:-1]) for part in parts]


def write_lines(path, lines, opened=open):
    with opened(path, "wb") as file:
        file.writelines(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
    return path


# What can be read.


def test_every_kind_of_source_gives_the_same_documents(tmp_path, tokenizer):
    rows = [{"text": text, "number": n} for n, text in enumerate(TEXTS)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    write_lines(tmp_path / "a.jsonl", map(json.dumps, rows))
    write_lines(tmp_path / "crlf.jsonl", [b"\xef\xbb\xbf", *(json.dumps(row).encode() + b"\r\n\r\n" for row in rows)])
    for suffix, opened in (("gz", gzip.open), ("bz2", bz2.open), ("xz", lzma.open)):
        write_lines(tmp_path / f"a.jsonl.{suffix}", map(json.dumps, rows), opened)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    hugging_face = datasets.Dataset.from_list(rows)
    hugging_face.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=hugging_face).save_to_disk(tmp_path / "splits")
    named = "a.parquet a.arrow stream.arrow a.jsonl crlf.jsonl a.jsonl.gz a.jsonl.bz2 a.jsonl.xz array.json"
    sources = [tmp_path / name for name in (*named.split(), "texts", "texts/*.txt", "saved", "splits")]
    sources += [hugging_face, hugging_face.to_iterable_dataset(), TEXTS, rows, [tmp_path / "a.jsonl"]]
    for source in sources:
        made = data.load(source, tokenizer, **SIZES)
        assert texts_of(made, tokenizer) == TEXTS, source


def test_text_is_cut_into_documents_as_asked(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n \nthree\n\nfour")
    made = {kind: data.text(path, tokenizer, documents=kind, **SIZES) for kind in ("file", "line", "paragraph")}
    assert texts_of(made["file"], tokenizer) == ["one\r\ntwo\n\n \nthree\n\nfour"]
    assert texts_of(made["line"], tokenizer) == ["one", "two", "three", "four"]
    assert texts_of(made["paragraph"], tokenizer) == ["one\r\ntwo", "three", "four"]
    with pytest.raises(ValueError, match="documents='page' is unknown"):
        data.text(path, tokenizer, documents="page", **SIZES)


def test_a_pattern_takes_its_files_in_order(tmp_path, tokenizer):
    for name in ("b/2", "a/1", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts_of(data.load(f"{tmp_path}/**/*.txt", tokenizer, **SIZES), tokenizer) == ["a/1", "b/1", "b/2"]


def test_of_a_table_only_the_columns_of_the_text_are_read(tmp_path, tokenizer):
    table = pyarrow.table({"picture": [b"\x00"], "text": ["seen"], "title": ["also"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    made = datasets.Dataset(table).cast_column("picture", datasets.Image())  # which fails when it is decoded
    for source in (tmp_path / "a.parquet", made):
        assert texts_of(data.load(source, tokenizer, **SIZES), tokenizer) == ["seen"]
        assert texts_of(data.load(source, tokenizer, field="title", **SIZES), tokenizer) == ["also"]
    with pytest.raises(data.BadRecord, match=r"row 0: field 'body' is missing: there are 'picture', 'text', 'title'"):
        data.load(tmp_path / "a.parquet", tokenizer, field="body", **SIZES)


def test_tokens_come_from_files_of_every_form(tmp_path):
    ids = np.arange(1, 301)
    np.save(tmp_path / "a.npy", ids.astype(np.uint32))
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    ids.astype(np.uint32).tofile(tmp_path / "wide.bin")
    np.save(tmp_path / "rows.npy", ids.reshape(3, 100))
    theirs = data.tokens(ids, **SIZES).corpus
    for name, options in {"a.npy": {}, "a.bin": {}, "wide.bin": {"dtype": "uint32"}}.items():
        ours = data.load(tmp_path / name, **SIZES, **options).corpus
        assert ours.fingerprint == theirs.fingerprint
        assert isinstance(ours.shards[0].ids, np.memmap)
    assert data.load(tmp_path / "rows.npy", **SIZES).corpus.lengths.tolist() == [100, 100, 100]
    wide = data.tokens(tmp_path / "wide.bin", vocabulary=100_000, **SIZES)
    assert wide.corpus.fingerprint == theirs.fingerprint
    several = data.tokens([tmp_path / "a.npy", tmp_path / "a.bin"], **SIZES).corpus
    assert several.lengths.tolist() == [300, 300]
    assert several.read(310, 312).ids.tolist() == [11, 12]
    # `end` ends a document, and is its last token.
    assert data.tokens(ids, end=100, **SIZES).corpus.lengths.tolist() == [100, 200]
    assert data.tokens(ids, end=300, **SIZES).corpus.lengths.tolist() == [300]
    assert data.tokens([[1, 2], [3]], **SIZES).corpus.lengths.tolist() == [2, 1]


def test_written_tokens_are_the_documents_again(tmp_path, tokenizer):
    source = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "Hi."}]
    direct = data.load(source, tokenizer, **SIZES)
    folder = data.write_tokens(source, tokenizer, tmp_path / "tokens")
    written = data.load(folder, **SIZES)
    assert written.corpus.fingerprint == direct.corpus.fingerprint
    assert written.corpus.vocabulary == len(tokenizer)
    for row in range(len(direct.rows)):
        np.testing.assert_array_equal(written.rows[row].targets, direct.rows[row].targets)
    with pytest.raises(FileExistsError, match="folder of their own"):
        data.write_tokens(source, tokenizer, folder)
    with pytest.raises(TypeError, match="seq_len: batches are made when"):
        data.write_tokens(source, tokenizer, tmp_path / "other", seq_len=8)
    with (folder / "ids.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"ids.bin: it holds \d+ ids"):
        data.load(folder, **SIZES)


def test_long_texts_go_through_the_tokenizer_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr("tbjax.training.data.encoder.TOGETHER", 7)
    texts = ["one two\nthree four\n\nfive", "x" * 30, "", "six"]
    ids = [document.ids.tolist() for document in Encoder(tokenizer).documents(texts)]
    assert [tokenizer.decode(each[:-1]) for each in ids] == texts
    assert list(in_pieces("one two\nthree four", 9)) == ["one two\n", "three", " four"]


def test_a_document_begins_as_the_tokenizer_begins_it(tokenizer):
    import tokenizers

    begun = byte_tokenizer(bos_token="<begin>")
    begun.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begun.bos_token_id)]
    )
    (document,) = Encoder(begun).documents(["ab"])
    assert begun.convert_ids_to_tokens(document.ids) == ["<begin>", "a", "b", "<end>"]
    (document,) = Encoder(byte_tokenizer(bos_token="<begin>")).documents(["ab"])
    assert tokenizer.convert_ids_to_tokens(document.ids)[0] == "a"


def test_the_reference_of_python_is_a_corpus(tokenizer):
    topics = data.python_topics()
    assert sum(map(len, topics)) > 300_000
    made = data.records(topics, tokenizer, **SIZES | {"seq_len": 512})
    assert made.efficiency > 0.99
    assert "documents" in repr(made)


# What cannot.

BAD_LINES = {
    "not JSON": ('{"text": "a"', "not JSON: .* at column 13"),
    "not an object": ('["a"]', "a record must be a JSON object, this is an array"),
    "no such field": ('{"body": "a"}', "field 'text' is missing: there are 'body'"),
    "another type": ('{"text": 17}', r"field 'text' must be a string, this is 17 \(int\)"),
    "nothing": ('{"text": null}', "field 'text' must be a string, this is None"),
    "empty": ('{"text": "  "}', "field 'text' is empty"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8 at byte 11 of the line"),
    "half a character": (r'{"text": "\ud800"}', "field 'text' holds half of a surrogate pair"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_or_left_out(tmp_path, tokenizer, caplog, line, message):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "good"}', "", line, '{"text": "too"}'])
    with pytest.raises(data.BadRecord, match=f"a.jsonl, line 3: {message}"):
        data.jsonl(path, tokenizer, **SIZES)
    with caplog.at_level(logging.WARNING):
        made = data.jsonl(path, tokenizer, on_bad="skip", **SIZES)
    assert texts_of(made, tokenizer) == ["good", "too"]
    assert made.skipped == 1
    assert f"bad records left out: 1. The first of them: {path}, line 3: " in caplog.text


def test_what_is_bad_elsewhere_is_named_too(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xe9 fine\n")
    with pytest.raises(data.BadRecord, match=r"a.txt, line 2: not UTF-8 at byte 5 of the line"):
        data.text(tmp_path / "a.txt", tokenizer, **SIZES)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(data.BadRecord, match=r"empty.txt: the text is empty"):
        data.text(tmp_path / "empty.txt", tokenizer, **SIZES)
    rows = [{"text": "a"}, {"text": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(data.BadRecord, match=r"a.parquet, row 1: field 'text' must be a string"):
        data.parquet(tmp_path / "a.parquet", tokenizer, **SIZES)
    with pytest.raises(data.BadRecord, match=r"datasets.Dataset, row 1: field 'text' must be"):
        data.hugging_face(datasets.Dataset.from_list(rows), tokenizer, **SIZES)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(data.BadRecord, match=r"broken.parquet: it cannot be read as Parquet"):
        data.parquet(tmp_path / "broken.parquet", tokenizer, **SIZES)
    (tmp_path / "broken.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(data.BadRecord, match=r"broken.arrow: it cannot be read as Arrow"):
        data.arrow(tmp_path / "broken.arrow", tokenizer, **SIZES)
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n{"text" "b"}]')
    with pytest.raises(data.BadRecord, match=r"broken.json, line 2: not JSON"):
        data.jsonl(tmp_path / "broken.json", tokenizer, **SIZES)


def test_when_nothing_is_left_that_is_said(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": ""}'])
    with pytest.raises(ValueError, match=r"a.jsonl: there is no document"):
        data.jsonl(path, tokenizer, on_bad="skip", **SIZES)
    with pytest.raises(ValueError, match="on_bad='ignore' is unknown"):
        data.jsonl(path, tokenizer, on_bad="ignore", **SIZES)


def test_what_to_learn_is_asked_for_where_it_cannot_be_told(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ['{"body": "a", "title": "b"}'])
    with pytest.raises(ValueError, match="line 1: what to learn cannot be told from the fields 'body', 'title'"):
        data.jsonl(path, tokenizer, **SIZES)
    assert texts_of(data.jsonl(path, tokenizer, field="body", **SIZES), tokenizer) == ["a"]
    with pytest.raises(ValueError, match="'body', 'title' cannot be learned together"):
        data.jsonl(path, tokenizer, field="body", messages="title", **SIZES)
    with pytest.raises(ValueError, match="both prompt= and completion="):
        data.jsonl(path, tokenizer, prompt="title", **SIZES)


def test_ids_outside_the_vocabulary_are_named_with_their_place(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([5, 6, 70, 8], np.uint16))
    with pytest.raises(ValueError, match=r"a.npy: id 70 at place 2 is outside the vocabulary of 64"):
        data.tokens(path, vocabulary=64, **SIZES)
    with pytest.raises(ValueError, match="array: id -1 at place 0"):
        data.tokens(np.array([-1, 2]), vocabulary=64, **SIZES)


def test_ids_that_are_too_many_to_look_at_first_are_looked_at_when_they_are_read(monkeypatch):
    monkeypatch.setattr("tbjax.training.data.corpus.CHECKED", 2)
    made = data.tokens(np.array([5, 6, 70, 8]), vocabulary=64, **SIZES)
    with pytest.raises(ValueError, match="array: id 70 at place 2"):
        next(iter(made.share(0, 1)))


def test_files_that_hold_no_ids_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"a.npy: token ids are integers .* not float64\[3\]"):
        data.tokens(tmp_path / "a.npy", **SIZES)
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="its 3 bytes are no whole number of uint16 ids"):
        data.tokens(tmp_path / "a.bin", **SIZES)
    np.save(tmp_path / "pickled.npy", np.array([{}, 1]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickled.npy: it is no array of numbers"):
        data.tokens(tmp_path / "pickled.npy", **SIZES)


def test_sources_that_are_not_there_are_named(tmp_path, tokenizer):
    for source in ("gone.jsonl", "gone/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="gone"):
            data.load(str(tmp_path / source), tokenizer, **SIZES)
    with pytest.raises(FileNotFoundError, match=r"no-such-owner/no-such-data: .* hub"):
        data.load("no-such-owner/no-such-data", tokenizer, **SIZES)
    (tmp_path / "mixed").mkdir()
    with pytest.raises(ValueError, match="mixed: the folder holds nothing that is known as data"):
        data.load(tmp_path / "mixed", tokenizer, **SIZES)
    with pytest.raises(FileNotFoundError, match=r"holds no file that ends in .jsonl"):
        data.jsonl(tmp_path / "mixed", tokenizer, **SIZES)
    (tmp_path / "mixed" / "a.txt").touch()
    (tmp_path / "mixed" / "a.bin").touch()
    with pytest.raises(ValueError, match="mixed: the folder holds text and tokens"):
        data.load(tmp_path / "mixed", tokenizer, **SIZES)
    (tmp_path / "a.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such file or folder, and it is no data set's"):
        data.load(tmp_path / "nowhere", tokenizer, **SIZES)
    with pytest.raises(ValueError, match=r"cannot be told from its ending '.csv'"):
        data.load(tmp_path / "a.csv", tokenizer, **SIZES)
    with pytest.raises(TypeError, match="int is no data"):
        data.load(3, tokenizer, **SIZES)
    with pytest.raises(ValueError, match="read as records, which needs a tokenizer"):
        data.load(["a"], **SIZES)


def test_a_name_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kind_of("roneneldan/TinyStories") == kind_of("wikitext") == "hugging_face"
    assert kind_of("a/b.jsonl") == "jsonl"


def test_a_split_is_asked_for_where_there_are_several(tmp_path, tokenizer):
    one, other = (datasets.Dataset.from_list([{"text": text}]) for text in ("one", "other"))
    both = datasets.DatasetDict(train=one, test=other)
    with pytest.raises(ValueError, match=r"several splits: say which with split= \(train, test\)"):
        data.hugging_face(both, tokenizer, **SIZES)
    with pytest.raises(ValueError, match="no split 'dev': it has train, test"):
        data.hugging_face(both, tokenizer, split="dev", **SIZES)
    assert texts_of(data.load(both, tokenizer, split="test", **SIZES), tokenizer) == ["other"]
