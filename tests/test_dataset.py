"""Chapter 6: token files and their descriptions, batches by counting, damaged files, sampling."""
import json
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import dataset as chapter
from cs336_lm.bpe import train_bpe_from_counts
from cs336_lm.corpora import describe_file
from cs336_lm.dataset import (IGNORE_INDEX, TokenFile, bytes_per_token, document_evaluation_batches, document_starts,
                              encode_file, evaluation_batches, get_batch, get_document_batch, id_arrays, open_tokens,
                              read_token_file, reservoir_sample, sample_documents, token_dtype, write_npy)
from cs336_lm.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
END = "<|endoftext|>"
TEXT = END.join(f"Tale {n}: the fox's café, " + "and the owl, " * (n % 7) + "🙂\r\n" for n in range(40))
VOCAB, MERGES = train_bpe_from_counts(Counter([b" the", b" fox", b" owl", b"the", b" and"] * 3), 256 + 10 + 1, [END])
tokenizer = Tokenizer(VOCAB, MERGES, [END], trained_on="tales")
quick = settings(deadline=None, max_examples=60)


@pytest.fixture
def encoded(tmp_path):
    (tmp_path / "tales.txt").write_bytes(TEXT.encode())
    return encode_file(tokenizer, tmp_path / "tales.txt", tmp_path / "tales.npy")


# ---- token files

def test_ids_and_description(encoded, tmp_path):
    ids = tokenizer.encode(TEXT)
    tokens = open_tokens(tmp_path / "tales.npy", tokenizer.sha256)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.tolist() == ids
    assert np.load(tmp_path / "tales.npy").tolist() == ids and tokenizer.decode(tokens) == TEXT
    with pytest.raises(ValueError): tokens[0] = 1  # read-only
    corpus = {"name": "tales.txt", "bytes": len(TEXT.encode()), "documents": 40,
              "sha256": describe_file(tmp_path / "tales.txt")["sha256"]}
    maker = {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "trained_on": "tales"}
    expected = TokenFile(tmp_path / "tales.npy", "uint16", len(ids), corpus["bytes"], 40, corpus, maker)
    assert encoded == expected == read_token_file(tmp_path / "tales.npy")
    assert json.loads((tmp_path / "tales.json").read_text())["path"] == "tales.npy"  # no folder: the pair may be moved
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tales.json", "tales.npy", "tales.txt"]


@pytest.mark.parametrize("pays", [False, True], ids=["clear", "compiled"])
def test_without_a_checksum_all_else_is_the_same(encoded, tmp_path, monkeypatch, pays):
    monkeypatch.setattr(chapter, "pays", lambda size: pays)
    other = encode_file(tokenizer, tmp_path / "tales.txt", tmp_path / "other.npy", checksum=False)
    assert other == read_token_file(tmp_path / "other.npy")
    assert other.corpus == encoded.corpus | {"sha256": None} and other.tokens == encoded.tokens
    assert (tmp_path / "other.npy").read_bytes() == (tmp_path / "tales.npy").read_bytes()
    assert open_tokens(tmp_path / "other.npy", tokenizer.sha256).tolist() == tokenizer.encode(TEXT)


@pytest.mark.parametrize("blank", [b" \n", b"", b"\t\x0b\x0c\r"])
def test_blank_pieces_are_no_documents(tmp_path, blank):
    path = tmp_path / "a.txt"
    path.write_bytes(END.encode().join([blank, b"one", blank, blank + b"two" + blank, blank]))
    for size in range(1, 30):
        counter = chapter.DocumentCounter()
        data = path.read_bytes()
        for start in range(0, len(data), size): counter.add(data[start:start + size])
        assert counter.finish() == describe_file(path)["documents"] == 2


def test_name_of_the_corpus_and_bar(tmp_path, capsys):
    (tmp_path / "tales.txt").write_bytes(TEXT.encode())
    target = str(tmp_path / "new" / "a.npy")
    named = encode_file(tokenizer, tmp_path / "tales.txt", target, corpus_name="tales-1kB", progress=True)
    assert named.corpus["name"] == "tales-1kB" and (tmp_path / "new" / "a.npy").is_file()
    assert "encode" in capsys.readouterr().err


def test_blocks_of_the_file_do_not_show(tmp_path, monkeypatch):
    (tmp_path / "tales.txt").write_bytes(TEXT.encode())
    read = chapter.read_text
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(chapter, "read_text", lambda path, size=size: read(path, size))
        encode_file(tokenizer, tmp_path / "tales.txt", tmp_path / "tales.npy")
        assert open_tokens(tmp_path / "tales.npy").tolist() == tokenizer.encode(TEXT)


@pytest.mark.parametrize("size, name", [(1, "uint16"), (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32"),
                                        (2**32, "uint32")])
def test_dtype_holds_the_largest_id(size, name):
    dtype = token_dtype(size)
    assert dtype.name == name
    assert np.concatenate(list(id_arrays([0, size - 1], dtype))).tolist() == [0, size - 1]


def test_dtype_faults():
    for size in (0, -1, 2**32 + 1):
        with pytest.raises(ValueError, match="vocab_size"): token_dtype(size)
    for bad in (65_536, -1):
        with pytest.raises(ValueError, match=f"Id {bad} does not fit"): list(id_arrays([1, bad], np.dtype(np.uint16)))


def test_large_vocabulary_is_stored_in_32_bits(tmp_path):
    sparse = Tokenizer({**VOCAB, 70_000: b"owls"}, [], [END, "owls"])
    (tmp_path / "a.txt").write_text("an owls", encoding="utf-8")
    encode_file(sparse, tmp_path / "a.txt", tmp_path / "a.npy")
    tokens = open_tokens(tmp_path / "a.npy", sparse.sha256)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [97, 110, 32, 70_000]


@quick
@given(st.lists(st.integers(0, 65_535), max_size=200), st.integers(1, 50))
def test_npy_is_what_numpy_writes(tmp_path_factory, ids, length):
    folder = tmp_path_factory.mktemp("npy")
    assert write_npy(folder / "a.npy", np.dtype("<u2"), id_arrays(iter(ids), np.dtype("<u2"), length)) == len(ids)
    np.save(folder / "b.npy", np.array(ids, dtype="<u2"))
    assert (folder / "a.npy").read_bytes() == (folder / "b.npy").read_bytes()


def test_failure_leaves_no_half_file(encoded, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good text " * 9 + b"\xff")
    with pytest.raises(ValueError, match="bad.txt.*90"):
        encode_file(tokenizer, tmp_path / "bad.txt", tmp_path / "bad.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "tales.json", "tales.npy", "tales.txt"]
    # An old pair stays whole until the new one is.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="bad.txt"):
        encode_file(tokenizer, tmp_path / "bad.txt", tmp_path / "tales.npy")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    open_tokens(tmp_path / "tales.npy", tokenizer.sha256)


def test_an_old_description_never_stands_beside_new_ids(encoded, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text(f"another tale{END}")
    def broken(about): raise OSError("no space left")
    monkeypatch.setattr(chapter, "write_sidecar", broken)
    with pytest.raises(OSError, match="no space"): encode_file(tokenizer, tmp_path / "other.txt", tmp_path / "tales.npy")
    with pytest.raises(FileNotFoundError, match="tales.json"): open_tokens(tmp_path / "tales.npy", tokenizer.sha256)


@pytest.mark.parametrize("text, output", [("a.json", "a.npy"), ("a.npy", "a.npy")])
def test_an_input_is_never_written_over(tmp_path, text, output):
    (tmp_path / text).write_text(f"a tale{END}")
    with pytest.raises(ValueError, match=f"{text} would be written over.*another name"): encode_file(tokenizer, tmp_path / text, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == [text] and (tmp_path / text).read_text() == f"a tale{END}"


def test_a_json_that_is_no_description_is_kept(tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "a.txt").write_text(f"a tale{END}")
    kept = (tmp_path / "vocab.json").read_bytes()
    with pytest.raises(ValueError, match="vocab.json is no description.*vocab.npy another name"):
        encode_file(tokenizer, tmp_path / "a.txt", tmp_path / "vocab.npy")
    assert (tmp_path / "vocab.json").read_bytes() == kept and not (tmp_path / "vocab.npy").exists()


def test_streams_of_another_kind_are_refused():
    for stream in (np.zeros((20, 5), np.int64), np.zeros(20)):
        with pytest.raises(ValueError, match="flat array of whole numbers"): get_batch(stream, 2, 3)


def test_a_batch_by_seed():
    stream = np.arange(100)
    for seed in (0, 1):
        x, y = get_batch(stream, 8, 5, rng=seed)
        again, _ = get_batch(stream, 8, 5, rng=np.random.default_rng(seed))
        assert torch.equal(x, again)


def test_input_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        encode_file(tokenizer, tmp_path / "nowhere.txt", tmp_path / "a.npy")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt is empty"):
        encode_file(tokenizer, tmp_path / "empty.txt", tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text(f"a{END}b")
    with pytest.raises(ValueError, match=".npy"): encode_file(tokenizer, tmp_path / "a.txt", tmp_path / "a.bin")
    with pytest.warns(UserWarning, match="no special token"):
        encode_file(Tokenizer(VOCAB, MERGES), tmp_path / "a.txt", tmp_path / "a.npy")
    (tmp_path / "only.txt").write_text(END * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode_file(tokenizer, tmp_path / "only.txt", tmp_path / "a.npy").documents == 0
    assert open_tokens(tmp_path / "a.npy").tolist() == [tokenizer.token_to_id(END)] * 3


def test_another_tokenizer_is_refused(encoded, tmp_path):
    other = Tokenizer(VOCAB, MERGES[:-1], [END])
    with pytest.raises(ValueError, match="another tokenizer.*tales") as caught:
        open_tokens(tmp_path / "tales.npy", other.sha256)
    assert "tales.npy" in str(caught.value) and other.sha256[:12] in str(caught.value)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:130], lambda data: data[:50],
                                    lambda data: b"", lambda data: data + b"\0", lambda data: b"a story",
                                    lambda data: b"\x80\x04K\x01."])
def test_damaged_npy(encoded, tmp_path, change):
    path = tmp_path / "tales.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="tales.npy"): open_tokens(path)


@pytest.mark.parametrize("array", [np.zeros((3, 4), dtype=np.uint16), np.zeros(5), np.array([True, False])])
def test_arrays_that_are_no_token_files(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="a.npy holds .* flat array of integers"): open_tokens(tmp_path / "a.npy")


@pytest.mark.parametrize("change, message", [
    (lambda text: text[:40], "line [23]: damaged JSON"),
    (lambda text: text.replace('"tokens"', '"tokenz"'), "does not describe"),
    (lambda text: "[1]", "does not describe"),
    (lambda text: text.replace('"tokens": ', '"tokens": 9'), "do not belong together"),
    (lambda text: text.replace('"uint16"', '"uint32"'), "do not belong together"),
    (lambda text: text.replace(f'"sha256": "{tokenizer.sha256}"', '"sha": ""'), "does not name the tokenizer"),
])
def test_damaged_description(encoded, tmp_path, change, message):
    path = tmp_path / "tales.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message): open_tokens(tmp_path / "tales.npy", tokenizer.sha256)


def test_files_of_others_open_unless_the_tokenizer_is_asked_for(encoded, tmp_path):
    shutil.copy(tmp_path / "tales.npy", tmp_path / "theirs.npy")
    assert len(open_tokens(tmp_path / "theirs.npy")) == encoded.tokens
    with pytest.raises(FileNotFoundError, match="theirs.json"): open_tokens(tmp_path / "theirs.npy", tokenizer.sha256)
    with pytest.raises(FileNotFoundError, match="nothing.npy"): open_tokens(tmp_path / "nothing.npy")
    for array in (np.arange(5, dtype=np.int64), np.zeros(0, dtype=np.uint16)):
        np.save(tmp_path / "own.npy", array)
        assert open_tokens(tmp_path / "own.npy").tolist() == array.tolist()


# ---- random batches

def test_get_batch_starts_are_uniform():
    "Two-sided chi-squared: 93 cells, so mean 92 and standard deviation about 13.6."
    stream, rng = np.arange(100), np.random.default_rng(0)
    starts = torch.cat([get_batch(stream, 32, 7, "cpu", rng)[0][:, 0] for _ in range(600)]).numpy()
    counts = np.bincount(starts)
    assert len(counts) == 93 and starts.min() == 0
    assert 92 - 5 * 13.6 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 92 + 5 * 13.6


@quick
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_get_batch_shift_and_shape(context, batch, extra, seed):
    stream = np.arange(1000, 1000 + context + 1 + extra, dtype=np.uint16)
    x, y = get_batch(stream, batch, context, rng=np.random.default_rng(seed))
    assert x.shape == y.shape == (batch, context) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y) and torch.equal(x[:, 1:], y[:, :-1]) and x.is_contiguous() and y.is_contiguous()
    assert int(x.min()) >= 1000 and int(y.max()) <= stream[-1]
    again = get_batch(stream, batch, context, rng=np.random.default_rng(seed))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)


def test_get_batch_from_a_file_and_faults(encoded, tmp_path):
    tokens = open_tokens(tmp_path / "tales.npy")
    mapped, loaded = (get_batch(ids, 4, 16, rng=np.random.default_rng(3)) for ids in (tokens, np.array(tokens)))
    assert torch.equal(mapped[0], loaded[0]) and torch.equal(mapped[1], loaded[1])
    x, y = get_batch(np.arange(8), 3, 7)  # exactly one window
    assert x.tolist() == [list(range(7))] * 3 and y.tolist() == [list(range(1, 8))] * 3
    x[0, 0] = 99
    assert y[0, 0] == 1  # memory of their own
    with pytest.raises(ValueError, match="7 ids; context_length 7 needs at least 8"): get_batch(np.arange(7), 3, 7)
    with pytest.raises(ValueError, match="context_length"): get_batch(np.arange(7), 3, 0)
    with pytest.raises((RuntimeError, AssertionError)): get_batch(np.arange(100), 3, 7, "cuda:99")
    assert not torch.equal(get_batch(np.arange(10_000), 8, 4)[0], get_batch(np.arange(10_000), 8, 4)[0])


# The id 0 separates documents.
streams = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(lambda ids: np.array(ids, dtype=np.uint16))


@quick
@given(streams, st.integers(1, 12))
def test_document_starts(stream, block):
    starts = document_starts(stream, 0, block)
    assert starts.tolist() == [i for i in range(len(stream)) if i == 0 or stream[i - 1] == 0]


@quick
@given(streams, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_document_rows(stream, context, seed):
    starts = document_starts(stream, 0)
    x, y = get_document_batch(stream, starts, 6, context, 0, rng=np.random.default_rng(seed))
    chosen = starts[np.random.default_rng(seed).integers(len(starts), size=6)]
    for start, inputs, targets in zip(chosen, x.tolist(), y.tolist()):
        document = stream[start:].tolist()
        document = document[:document.index(0) + 1] if 0 in document else document
        kept = document[:context]
        assert targets == kept + [IGNORE_INDEX] * (context - len(kept))
        assert inputs == [0] + kept[:-1] + [0] * (context - len(kept))


def test_document_batch_chooses_uniformly_and_faults():
    stream = np.array([n for document in range(1, 9) for n in (document, 0)], dtype=np.uint16)
    starts = document_starts(stream, 0)
    x, _ = get_document_batch(stream, starts, 16_000, 4, 0, rng=np.random.default_rng(0))
    counts = np.bincount(x[:, 1].numpy())[1:]
    assert len(counts) == 8 and abs(counts - 2_000).max() < 5 * (16_000 / 8 * 7 / 8) ** 0.5
    some = get_document_batch(stream, starts[2:4], 50, 4, 0)[0][:, 1]
    assert set(some.tolist()) == {3, 4}
    with pytest.raises(ValueError, match="no documents"): get_document_batch(stream, starts[:0], 2, 4, 0)
    with pytest.raises(ValueError, match="context_length"): get_document_batch(stream, starts, 2, 0, 0)


# ---- evaluation: every target once

def targets(batches, size, context):
    "(input, target) pairs in order; shapes, types and padding looked at on the way."
    found, rows = [], []
    for x, y in batches:
        assert x.shape == y.shape and x.shape[1] == context and 1 <= len(x) <= size
        assert x.dtype == y.dtype == torch.int64
        rows.append(len(x))
        mask = y != IGNORE_INDEX
        assert (mask.cumprod(dim=1).bool() == mask).all() and mask[:, 0].all()  # padding only at the end of a row
        found += list(zip(x[mask].tolist(), y[mask].tolist()))
    assert all(count == size for count in rows[:-1])
    return found


@quick
@given(streams.filter(lambda stream: len(stream) > 1), st.integers(1, 5), st.integers(1, 45))
def test_stream_evaluation_counts_every_target_once(stream, size, context):
    ids = stream.tolist()
    assert targets(evaluation_batches(stream, size, context), size, context) == list(zip(ids, ids[1:]))


@quick
@given(streams, st.integers(1, 5), st.integers(1, 45))
def test_document_evaluation_counts_every_target_once(stream, size, context):
    ids = stream.tolist()
    found = targets(document_evaluation_batches(stream, size, context, 0), size, context)
    assert found == list(zip([0] + ids, ids))


def test_evaluation_faults():
    for ids in ([], [1]):
        with pytest.raises(ValueError, match="needs at least 2"): evaluation_batches(np.array(ids), 2, 4)
    with pytest.raises(ValueError, match="needs at least 1"): document_evaluation_batches(np.array([]), 2, 4, 0)
    with pytest.raises(ValueError, match="batch_size"): get_batch(np.arange(9), 0, 4)
    with pytest.raises(ValueError, match="batch_size"): evaluation_batches(np.arange(9), 0, 4)
    with pytest.raises(ValueError, match="context_length"): evaluation_batches(np.arange(9), 1, 0)


# ---- sampling and measuring

def test_every_set_is_equally_likely():
    rng, trials = np.random.default_rng(1), 6_000
    counts = Counter(tuple(sorted(reservoir_sample(range(5), 2, rng))) for _ in range(trials))
    assert len(counts) == 10 and max(abs(n - trials / 10) for n in counts.values()) < 5 * (trials * 0.1 * 0.9) ** 0.5


def test_sample_documents(tmp_path):
    (tmp_path / "a.txt").write_text(END.join(f"tale {n}" for n in range(50)) + END + "\n", encoding="utf-8")
    found = sample_documents(tmp_path / "a.txt", 10, seed=4)
    assert found == sample_documents(tmp_path / "a.txt", 10, seed=4) != sample_documents(tmp_path / "a.txt", 10, seed=5)
    assert len(set(found)) == 10 and all(document.startswith("tale ") for document in found)
    assert sorted(sample_documents(tmp_path / "a.txt", 50)) == sorted(f"tale {n}" for n in range(50))
    with pytest.raises(ValueError, match="50 documents, 51"): sample_documents(tmp_path / "a.txt", 51)


@quick
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_bytes_per_token(texts):
    ratio = bytes_per_token(tokenizer, texts)
    assert ratio == sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts) >= 1


def test_bytes_per_token_of_nothing():
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no text"): bytes_per_token(tokenizer, texts)
