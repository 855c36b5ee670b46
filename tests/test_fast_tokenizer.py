"""Chapters 5 and 6, fast versions: equal to the clear ones on any text, lazy, bounded, safe when things go wrong."""
import os
import pickle
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import dataset, tokenizer as chapter
from cs336_lm.corpora import describe_file
from cs336_lm.dataset import encode_clear, encode_file, open_tokens
from cs336_lm.pretokenization import pretokenize
from cs336_lm.tokenizer import ByteLevelBPE, FastEncoder, Tokenizer, join_tokens, merge_by_rank
from test_tokenizer import END, MEMORY_PROGRAM, MERGES, SAMPLE, SPECIALS, VOCAB, nested, plain, random_lines, tricky

pytest.importorskip("numba")
ROOT = Path(__file__).resolve().parent.parent
LARGE_IDS = {(id * 7919) % 100_003: token for id, token in VOCAB.items()}  # any order, gaps, above 65,535
large = Tokenizer(LARGE_IDS, MERGES, [END, "ab", " \n"])
TOKENIZERS = [plain, nested, large, Tokenizer(VOCAB, MERGES), Tokenizer({id: bytes([id]) for id in range(256)}, [])]
edge_words = st.sampled_from(["internationalisation", "a" * 15, "b" * 16, "the" * 16, "x" * 49, "日本語" * 7, "'", " "])
texts = st.one_of(st.lists(st.one_of(tricky, edge_words), max_size=6).map("".join), st.text())


@pytest.fixture(scope="module", autouse=True)
def loaded():
    assert chapter.load_encoder()


def clear(tokenizer, text): return ByteLevelBPE.encode(tokenizer, text)


def encoder_of_small_blocks(tokenizer, size):
    "An encoder whose benches hold `size` bytes, so that a text is cut wherever it may be."
    encoder = FastEncoder(tokenizer)
    for _ in range(4):
        bench = encoder.take()
        bench.make_room(size)
        encoder.free.append(bench)
    return encoder


def in_blocks(encoder, text): return [id for array in encoder.arrays(text) for id in array.tolist()]


# ---- equal to the clear version

@settings(deadline=None, max_examples=250)
@given(texts, st.sampled_from(TOKENIZERS))
def test_encoding(text, tokenizer):
    assert tokenizer.fast.encode(text) == clear(tokenizer, text)


@settings(deadline=None, max_examples=150)
@given(texts, st.sampled_from(TOKENIZERS), st.integers(8, 60))
def test_blocks_cut_anywhere(text, tokenizer, size):
    assert in_blocks(encoder_of_small_blocks(tokenizer, size), text) == clear(tokenizer, text)


@settings(deadline=None, max_examples=100)
@given(st.lists(texts, max_size=8), st.sampled_from(TOKENIZERS), st.integers(1, 4), st.integers(1, 40))
def test_batches_and_threads(batch, tokenizer, num_threads, load_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "FAST_CHARS", 0)
        patch.setattr(chapter, "LOAD_CHARS", load_chars)  # a group of texts is a quarter of it
        assert tokenizer.encode_batch(batch, num_threads) == [clear(tokenizer, text) for text in batch]


@settings(deadline=None, max_examples=150)
@given(st.lists(texts, max_size=6), st.sampled_from(TOKENIZERS), st.integers(1, 12), st.integers(1, 9))
def test_streams_with_large_pieces_among_small_ones(pieces, tokenizer, large_piece, block_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "LARGE_PIECE", large_piece)
        patch.setattr(chapter, "FAST_CHARS", 0)
        ids = list(tokenizer.encode_iterable(pieces, block_chars=block_chars))
    assert ids == clear(tokenizer, "".join(pieces))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, len(VOCAB) - 1), max_size=80),
       st.sampled_from(["list", "<u2", "<u4", "i8", "u8", "iter"]), st.integers(1, 30))
def test_decoding(ids, kind, block):
    given_ids = ids if kind == "list" else iter(ids) if kind == "iter" else np.array(ids, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "FAST_CHARS", 0)
        patch.setattr(chapter, "FAST_IDS", 0)
        patch.setattr(chapter, "DECODE_BLOCK", block)
        patch.setattr(chapter, "DECODE_IDS", block)
        assert plain.decode_bytes(given_ids) == b"".join(VOCAB[id] for id in ids)


@pytest.mark.parametrize("bad", [len(VOCAB), -1, 10**9, 2**63, 2**70])
@pytest.mark.parametrize("tokenizer", [plain, large], ids=["dense", "sparse"])
def test_ids_out_of_range(tokenizer, bad):
    good = list(tokenizer.vocab)[:60]
    if bad in tokenizer.vocab: return
    with pytest.raises(ValueError, match=f"Id {bad} "): tokenizer.decode(good + [bad])
    if -2**63 <= bad < 2**63:
        with pytest.raises(ValueError, match=f"Id {bad} "): tokenizer.decode(np.array(good + [bad]))


LONG_TOKENS = {256 + n: bytes(range(65, 65 + width)) * 3 for n, width in enumerate((5, 6, 16, 40, 86))}  # 15 to 258 bytes


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.sampled_from([*LONG_TOKENS, 65, 66]), st.integers(0, 260)), max_size=60), st.integers(1, 200))
def test_decoding_tokens_of_fifteen_bytes_and_more(ids, block):
    vocab = {id: bytes([id]) for id in range(256)} | LONG_TOKENS
    table = chapter.token_table(vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "DECODE_BLOCK", block)
        assert chapter.decode_array(table, np.array(ids, np.uint16)).getvalue() == b"".join(vocab[id] for id in ids)


def test_text_of_malformed_bytes_is_the_clear_versions():
    ids = [0xE2, 0x82, 65, 0xFF] * 100
    assert plain.decode(ids) == plain.decode(np.array(ids)) == ByteLevelBPE.decode(plain, ids)


def test_an_id_in_a_gap_and_an_empty_token():
    gap = next(id for id in range(10**5) if id not in LARGE_IDS)
    with pytest.raises(ValueError, match=f"Id {gap} "): large.decode([next(iter(LARGE_IDS))] * 60 + [gap])
    empty = Tokenizer(VOCAB | {len(VOCAB): b""}, MERGES)
    assert empty.decode([65, len(VOCAB), 66] * 40) == "AB" * 40


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.tuples(*[st.integers(0, chapter.NO_ID - 1)] * 2), st.integers(0, chapter.NO_RANK - 1), max_size=300),
       st.lists(st.tuples(*[st.integers(0, 9)] * 2), max_size=20))
def test_every_pair_has_its_rank_and_no_other_has_one(ranks, others):
    pairs, shifts = chapter.pair_table(ranks)
    for (left, right), rank in ranks.items(): assert chapter.find_rank(pairs, shifts, left, right) == rank
    for pair in others: assert chapter.find_rank(pairs, shifts, *pair) == ranks.get(pair, chapter.NO_RANK)
    for left, right in ranks: assert chapter.find_rank(pairs, shifts, chapter.NO_ID, right) == chapter.NO_RANK


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**64 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_vector_code_does_what_its_twins_do(low, high, place):
    def stored(put_ids, copy_16, highest_bit):
        narrow, wide, text = np.zeros(12, np.uint16), np.zeros(8, np.uint32), np.arange(48, dtype=np.uint8)
        for out in (narrow, wide): put_ids(out, place, np.uint64(low), np.uint64(high))
        copy_16(text, 2 * place, text, 31 - place)  # far apart, as in use
        return narrow.tolist(), wide.tolist(), text.tolist(), highest_bit(np.uint64(high))

    assert stored(*COMPILED) == stored(*list(chapter.STORE_TWINS.values())[:3])


def test_compiled_code_sees_the_parts_that_python_sees():
    import numba
    part_of = chapter.part_of
    arrays = [np.arange(n, dtype=dtype) for n, dtype in ((0, np.uint8), (7, np.uint16), (90, np.int64), (1, np.int32))]
    room = chapter.lay_out([*arrays, (5, np.uint32)])

    def seen(k, dtype):
        compiled_part = numba.njit(lambda room, k: part_of(room, k, dtype).copy())
        return [compiled_part(room, k), chapter.STORE_TWINS["part_of"](room, k, dtype)]

    for k, expected in enumerate([*arrays, np.zeros(5, np.uint32)]):
        for found in seen(k, expected.dtype.type):
            assert found.dtype == expected.dtype and found.tolist() == expected.tolist()


@pytest.fixture(scope="module", autouse=True)
def compiled_stores(loaded):
    "Callable from Python what only compiled code may call."
    import numba
    put_ids, copy_16, highest_bit = chapter.put_ids, chapter.copy_16, chapter.highest_bit
    COMPILED.extend([numba.njit(lambda out, n, low, high: put_ids(out, n, low, high)),
                     numba.njit(lambda a, i, b, k: copy_16(a, i, b, k)), numba.njit(lambda mask: highest_bit(mask))])


COMPILED = []
STATE = np.full((2, 64), chapter.NO_OFFER, np.int32)


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(12)), st.text(alphabet="ab", min_size=1, max_size=chapter.SHORT_WORD))
def test_merges_in_any_order(order, word):
    pairs = [(a.encode(), b.encode()) for a in ("a", "b", "ab", "aa") for b in ("a", "b", "ba")]
    merges = [pairs[k] for k in order]
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(t for a, b in merges for t in (a, b, a + b))])
    tokenizer = Tokenizer(dict(enumerate(tokens)), [*merges, merges[0]])  # one twice: the first counts
    tables, data = chapter.merge_tables(tokenizer), np.frombuffer(word.encode() + bytes(64), np.uint8)
    alive = int(chapter.merge_short(data, 0, len(word), tables, *STATE))
    short = [STATE[1, place] for place in range(64) if alive >> place & 1]
    parts, long_count = chapter.merge_long(data, 0, len(word), tables)
    expected = [tokenizer.token_to_id(token) for token in merge_by_rank(word.encode(), tokenizer._ranks)]
    assert short == parts[:long_count].tolist() == expected


@pytest.mark.parametrize("unit", ["a", "ab", "=", "你", " ", "\n", "<|endof", "'l", "the"])
def test_long_words(unit):
    text = unit * (40_000 // len(unit)) + "x y"
    assert in_blocks(encoder_of_small_blocks(nested, 1 << 10), text) == clear(nested, text)


def test_a_word_of_a_megabyte():
    text = "".join(np.random.default_rng(0).choice(list("abthe"), size=1_000_000))
    ids = plain.encode(text)
    assert plain.decode(ids) == text and len(ids) < 900_000
    assert ids[:1_000] == clear(plain, text[:10_000])[:1_000]


def test_many_words_in_a_small_cache():
    encoder = FastEncoder(plain)
    encoder.rows = 2
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("abcdeé日"), size=size)) for size in rng.integers(1, 60, size=300)]
    text = " ".join(rng.choice(words, size=5_000))
    assert encoder.encode(text) == encoder.encode(text) == clear(plain, text)


def test_on_web_text():
    "Several megabytes of real text, where the folder CS336_DATA has it."
    path = Path(os.environ.get("CS336_DATA", "nowhere")) / "web_valid.txt"
    if not path.is_file(): pytest.skip(f"needs {path}")
    with open(path, encoding="utf-8", newline="") as file: text = file.read(2_000_000)
    for tokenizer in (plain, nested): assert tokenizer.encode(text) == clear(tokenizer, text)
    assert plain.decode(plain.encode(text)) == text


# ---- lazy, and without numba

def python(code: str, *arguments) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


START = """
    import sys
    from cs336_lm.tokenizer import ByteLevelBPE, Tokenizer
    from cs336_lm import dataset
    tokenizer = Tokenizer({id: bytes([id]) for id in range(256)}, [])
"""


def test_short_calls_do_not_import_numba(tmp_path):
    (tmp_path / "a.txt").write_text("short " * 10_000)
    python(START + """
    assert tokenizer.decode(tokenizer.encode("short " * 10_000)) == "short " * 10_000
    list(tokenizer.encode_iterable(["short "] * 100_000)), tokenizer.encode_batch(["short"] * 100)
    dataset.encode_file(tokenizer, sys.argv[1] + "/a.txt", sys.argv[1] + "/a.npy")
    assert "numba" not in sys.modules
    """, tmp_path)


def test_a_short_text_never_compiles_for_wide_ids():
    wide = Tokenizer(LARGE_IDS, MERGES)
    assert wide.encode("the fox") == clear(wide, "the fox") and "fast" not in vars(wide)
    assert wide.fast and wide.encode("the fox") == clear(wide, "the fox") and wide.encode("") == [] == plain.encode("")


def test_without_numba_the_clear_version_serves(tmp_path):
    (tmp_path / "a.txt").write_text("long " * 250_000)
    out = python(START.replace("import sys\n", "import sys\n    sys.modules['numba'] = None\n", 1) + """
    text = "long " * 250_000
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.fast is None
    assert tokenizer.encode_batch([text[:5]] * 3, 2) == [tokenizer.encode(text[:5])] * 3
    print(dataset.encode_file(tokenizer, sys.argv[1] + "/a.txt", sys.argv[1] + "/a.npy", num_threads=2).tokens)
    """, tmp_path)
    assert int(out) == 1_250_000


def test_uncompiled_it_is_the_same_program():
    "The marked functions as plain Python."
    python(START + """
    import numpy as np, warnings
    from cs336_lm.tokenizer import FastEncoder, decode_array, id_array
    warnings.simplefilter("ignore")  # numbers that wrap round
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"a", b"b"), (b"ab", b"ab")]
    vocab = dict(enumerate([*(bytes([id]) for id in range(256)), *(a + b for a, b in merges)]))
    tokenizer = Tokenizer(vocab, merges, ["<|end|>", "<|end|><"])
    text = "the  the<|end|><<|end|>, 'll they'll " + "ab" * 40 + " é日本語" * 3 + " internationalisation" * 2
    encoder = FastEncoder(tokenizer)
    for _ in range(2): assert encoder.encode(text) == ByteLevelBPE.encode(tokenizer, text)
    assert decode_array(tokenizer._token_table, id_array(tokenizer.encode(text))).getvalue().decode() == text
    assert "numba" not in sys.modules
    """)


@pytest.mark.parametrize("gap", [0, 70_000], ids=["16 bits", "32 bits"])
def test_plain_twins_stay_inside_their_arrays(gap):
    "Blocks of few bytes, each filled to its end: in plain Python a load or a store too far is an IndexError."
    python(START + f"    gap = {gap}" + """
    import random, warnings
    from cs336_lm import tokenizer as chapter
    warnings.simplefilter("ignore")  # numbers that wrap round
    chapter.BLOCK_BYTES, chapter.CACHE_ROWS, chapter.DECODE_BLOCK = 24, 8, 8
    merges = [(b"a", b"b"), (b"ab", b"ab"), (b" ", b"ab")]
    tokens = [*(bytes([id]) for id in range(256)), *(a + b for a, b in merges)]
    tokenizer = Tokenizer({gap + id: token for id, token in enumerate(tokens)}, merges, ["<e>"])
    encoder, rng = chapter.FastEncoder(tokenizer), random.Random(0)
    for size in [*range(1, 30)] * 3:
        text = "".join(rng.choices(["a", "b", " ", "ab", "1", "!", "é", "x" * 15, "y" * 17, "<e>"], k=size))[:size]
        ids = [id for array in encoder.arrays(text) for id in array.tolist()]
        assert ids == ByteLevelBPE.encode(tokenizer, text)
        table = chapter.token_table({id: token * 9 for id, token in tokenizer.vocab.items()})
        assert chapter.decode_array(table, chapter.id_array(ids)).getvalue() == b"".join(tokenizer.vocab[id] * 9 for id in ids)
    assert "numba" not in sys.modules
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
def test_streaming_needs_no_new_memory_where_the_compiled_code_is_loaded(tmp_path):
    plain.save(tmp_path / "tokenizer")
    text = random_lines(10**7, np.random.default_rng(0))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    load = "    assert tokenizer.encode('a b ' * (1 << 18))\n"
    program, ids = MEMORY_PROGRAM.replace("    count = total", load + "    count = total"), clear(plain, text)
    out = python(program, tmp_path / "tokenizer", tmp_path / "text.txt", "stream")
    assert out.split() == [str(len(ids)), str(sum(ids))]


def test_vocabularies_that_only_the_clear_version_serves():
    for vocab in ({0: b"a", 1: b"b"}, {2**33 + id: bytes([id]) for id in range(256)}):
        tokenizer = Tokenizer(vocab, [])
        assert tokenizer.fast is None and tokenizer.decode(tokenizer.encode("ab" * 100)) == "ab" * 100
    with pytest.raises(ValueError, match="b'x' is not in the vocabulary"):
        Tokenizer({0: b"a"}, []).encode("a" * 100 + "x")


def test_faults_of_texts():
    with pytest.raises(ValueError, match="U.DFFF"): plain.encode("a" * 100 + "\udfff")
    with pytest.raises(ValueError, match="U.D800"): plain.encode_batch(["a" * 100, "\ud800" * 100], 2)
    with pytest.raises(ValueError, match="num_threads"): plain.encode_batch(["a"], 0)
    assert plain.encode_batch([]) == [] and plain.encode_batch(["", "a"]) == [[], [97]]
    assert plain.encode("after the faults " * 10) == clear(plain, "after the faults " * 10)


def test_in_order_stops_after_a_fault():
    asked = []

    def items():
        for item in range(1_000):
            asked.append(item)
            yield item

    with pytest.raises(ZeroDivisionError):
        for _ in chapter.in_order(lambda item: 1 // (item - 5), items(), 3): pass
    assert len(asked) < 20
    assert list(chapter.in_order(lambda item: -item, range(50), 4)) == [-item for item in range(50)]


# ---- files

TALES = END.join(f"Tale {n}: the fox's café, " + "and the owl, " * (n % 7) + "🙂\r\n" + "=" * (n % 90)
                 for n in range(400))


@pytest.fixture
def small_blocks(monkeypatch):
    "Files of any size take the fast way, in blocks of 64 bytes."
    monkeypatch.setattr(chapter, "FAST_CHARS", 0)
    monkeypatch.setattr(chapter, "BLOCK_BYTES", 64)
    monkeypatch.setattr(chapter, "CACHE_ROWS", 64)


def fresh(tokenizer): return Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("tokenizer", [plain, nested, large], ids=["plain", "nested", "large"])
def test_files(tmp_path, small_blocks, num_threads, tokenizer):
    (tmp_path / "a.txt").write_bytes(TALES.encode())
    about = encode_file(fresh(tokenizer), tmp_path / "a.txt", tmp_path / "a.npy", num_threads=num_threads)
    assert open_tokens(tmp_path / "a.npy", tokenizer.sha256).tolist() == clear(tokenizer, TALES)
    assert about.corpus == describe_file(tmp_path / "a.txt") and about.tokens == len(clear(tokenizer, TALES))
    assert about.dtype == ("uint32" if tokenizer is large else "uint16")
    expected, _ = encode_clear(tokenizer, tmp_path / "a.txt", tmp_path / "b.npy", np.dtype(about.dtype), None, False)
    assert expected == about.corpus and (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@settings(deadline=None, max_examples=40)
@given(texts.filter(bool), st.integers(1, 3), st.integers(8, 80))
def test_any_file(tmp_path_factory, text, num_threads, block):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in (("FAST_CHARS", 0), ("BLOCK_BYTES", block), ("CACHE_ROWS", 64)):
            patch.setattr(chapter, name, value)
        about = encode_file(fresh(nested), folder / "a.txt", folder / "a.npy", num_threads=num_threads)
    assert open_tokens(folder / "a.npy").tolist() == clear(nested, text)
    assert about.corpus == describe_file(folder / "a.txt")


def test_documents_are_counted_where_their_separator_is_ordinary_text(tmp_path, small_blocks):
    (tmp_path / "a.txt").write_text(f"{END} one {END}\n{END}two" * 30)
    with pytest.warns(UserWarning, match="no special token"):
        about = encode_file(Tokenizer(VOCAB, MERGES), tmp_path / "a.txt", tmp_path / "a.npy", num_threads=2)
    assert about.corpus == describe_file(tmp_path / "a.txt") and about.documents == 60


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\xc0\x80"])
@pytest.mark.parametrize("before", [0, 1, 63, 64, 700])
@pytest.mark.parametrize("after", [b"", b" more text, and on" * 30])
def test_invalid_utf8_has_the_clear_versions_message(tmp_path, small_blocks, bad, before, after):
    (tmp_path / "bad.txt").write_bytes((b"good text " * 70)[:before] + bad + after)
    messages = []
    for num_threads in (None, 1, 3):
        with pytest.raises(ValueError) as caught:
            where = tmp_path / "bad.txt", tmp_path / "a.npy"
            if num_threads is None: encode_clear(plain, *where, np.dtype("u2"), None, False)
            else: encode_file(fresh(plain), *where, num_threads=num_threads)
        messages.append(str(caught.value))
    assert messages == messages[:1] * 3 and f"at byte {before:,};" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_of_two_faults_the_first_is_told(tmp_path, small_blocks):
    (tmp_path / "bad.txt").write_bytes(b"good " * 50 + b"\xff" + b" good" * 50 + b"\xff" + b" good" * 50)
    for _ in range(10):
        with pytest.raises(ValueError, match="at byte 250;"):
            encode_file(fresh(plain), tmp_path / "bad.txt", tmp_path / "a.npy", num_threads=4)


def test_bytes_that_are_no_text_at_all_do_not_fill_the_memory(tmp_path, small_blocks):
    (tmp_path / "bad.txt").write_bytes(b"\xff" * 100_000)
    with pytest.raises(ValueError, match="at byte 0;"):
        encode_file(fresh(plain), tmp_path / "bad.txt", tmp_path / "a.npy")


@pytest.mark.parametrize("size", [100, 10**6])
def test_a_file_that_changes_while_it_is_read(tmp_path, small_blocks, monkeypatch, size):
    path = tmp_path / "a.txt"
    path.write_bytes(TALES.encode())
    read = dataset.BlockReader.next_block

    def change(reader, bench):
        if reader.blocks >= 3: os.truncate(path, size)
        return read(reader, bench)

    monkeypatch.setattr(dataset.BlockReader, "next_block", change)
    with pytest.raises(OSError, match="changed from .* bytes while it was read"): encode_file(fresh(plain), path, tmp_path / "a.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_interrupted_run_leaves_nothing(tmp_path, small_blocks, monkeypatch, error, num_threads):
    (tmp_path / "a.txt").write_bytes(TALES.encode())

    def stop(*_): raise error

    monkeypatch.setattr(dataset.tqdm, "update", stop)
    with pytest.raises(error if isinstance(error, type) else OSError):
        encode_file(fresh(plain), tmp_path / "a.txt", tmp_path / "a.npy", num_threads=num_threads)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_full_disk(tmp_path):
    (tmp_path / "a.txt").write_text("the fox " * 200_000)
    out = python(START + """
    import resource, signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    assert tokenizer.fast
    try: dataset.encode_file(tokenizer, sys.argv[1] + "/a.txt", sys.argv[1] + "/a.npy", num_threads=2)
    except OSError as error: print(error)
    """, tmp_path)
    assert "too large" in out and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    tokenizer, peaks = fresh(plain), []
    for times in (1, 30, 120):
        (tmp_path / "a.txt").write_bytes((SAMPLE * 150 + END).encode() * times)
        tokenizer.fast.free.clear()
        tracemalloc.start()
        encode_file(tokenizer, tmp_path / "a.txt", tmp_path / "a.npy", num_threads=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.15 * peaks[1] and peaks[2] < 100e6
    assert (tmp_path / "a.txt").stat().st_size > 10e6
    whole = open_tokens(tmp_path / "a.npy", tokenizer.sha256)
    assert np.array_equal(whole, np.tile(clear(plain, SAMPLE * 150 + END), 120))


def test_arrays_of_ids():
    for tokenizer, dtype in ((plain, np.uint16), (large, np.uint32)):
        for text in ("", "a", SAMPLE):
            ids = tokenizer.encode_array(text)
            assert ids.dtype == dtype and ids.tolist() == clear(tokenizer, text) == tokenizer.encode_array(text.encode()).tolist()
    with pytest.raises(UnicodeDecodeError): plain.encode_array(b"good \xff")


def test_ids_and_ranks_at_the_limits():
    for top in (chapter.NO_ID - 1, chapter.NO_ID):
        tokenizer = Tokenizer({id: bytes([id]) for id in range(256)} | {top: b"ab"}, [(b"a", b"b")], ["<x>"][:top < chapter.NO_ID - 1])
        assert (tokenizer.fast is None) == (top == chapter.NO_ID)
        assert tokenizer.encode("ab" * 50 + "ba") == [top] * 50 + [98, 97]


def test_a_tokenizer_travels_without_its_caches():
    assert plain.fast and plain.decode(plain.encode(SAMPLE)) == SAMPLE
    packed = pickle.dumps(plain)
    other = pickle.loads(packed)
    assert other.sha256 == plain.sha256 and other.trained_on == plain.trained_on and "fast" not in vars(other)
    assert other.encode(SAMPLE) == clear(plain, SAMPLE) and len(packed) < 100_000


# ---- executors

@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool: yield pool


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed (extra: dask)")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client: yield client.get_executor()


@pytest.mark.parametrize("name", ["processes", "dask"])
@pytest.mark.parametrize("tokenizer", [plain, large], ids=["plain", "large"])
def test_any_executor_gives_the_same_file(name, tokenizer, request, tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "FAST_CHARS", 0)
    monkeypatch.setattr(dataset, "SHARD_BYTES", 3_000)
    monkeypatch.setattr(dataset, "SHARDS_AHEAD", 3)
    (tmp_path / "a.txt").write_bytes(TALES.encode())
    about = encode_file(tokenizer, tmp_path / "a.txt", tmp_path / "a.npy", executor=request.getfixturevalue(name))
    alone = encode_file(tokenizer, tmp_path / "a.txt", tmp_path / "b.npy", num_threads=1)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes() and about.corpus == alone.corpus
    assert open_tokens(tmp_path / "a.npy", tokenizer.sha256).tolist() == clear(tokenizer, TALES)


class Immediate:
    "An executor that works at once, in this process, and remembers what it was asked."

    def __init__(self): self.futures = []

    def submit(self, function, *arguments):
        future = Future()
        try: future.set_result(function(*arguments))
        except Exception as error: future.set_exception(error)
        self.futures.append(future)
        return future


def test_an_executor_tells_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "FAST_CHARS", 0)
    monkeypatch.setattr(dataset, "SHARD_BYTES", 3_000)
    path = tmp_path / "a.txt"
    path.write_bytes(b"good words " * 1_000 + b"\xff" + b" more words" * 1_000 + b"\xfe")
    with pytest.raises(ValueError, match="a.txt is not UTF-8: .* at byte 11,000;"):
        encode_file(plain, path, tmp_path / "a.npy", executor=Immediate())
    path.write_bytes(TALES.encode())
    describe = dataset.describe_files

    def then_shrink(*arguments):
        about = describe(*arguments)
        os.truncate(path, 9_000)
        return about

    monkeypatch.setattr(dataset, "describe_files", then_shrink)
    with pytest.raises(OSError, match="changed from .* bytes while it was read"):
        encode_file(plain, path, tmp_path / "a.npy", executor=Immediate())
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("way", ["clear", "threads", "processes"])
def test_several_files_one_behind_the_other(tmp_path, monkeypatch, small_blocks, way):
    monkeypatch.setattr(dataset, "SHARD_BYTES", 3_000)
    if way == "clear": monkeypatch.setattr(dataset, "pays", lambda size: False)
    texts = [TALES[:5_001], "", TALES[5_001:5_003], TALES[5_003:] + END, "an end" + END]
    paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts): path.write_text(text, encoding="utf-8", newline="")
    (tmp_path / "all.txt").write_text("".join(texts), encoding="utf-8", newline="")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        about = encode_file(fresh(plain), paths, tmp_path / "a.npy", num_threads=2, executor=pool if way == "processes" else None)
    alone = [id for text in texts for id in clear(plain, text)]
    assert open_tokens(tmp_path / "a.npy").tolist() == alone != clear(plain, "".join(texts))
    assert about.corpus == describe_file(tmp_path / "all.txt", "0.txt and 4 more") and about.documents == about.corpus["documents"]
    paths[3].write_bytes(b"good " * 2_000 + b"\xff")
    with pytest.raises(ValueError, match="3.txt is not UTF-8: invalid start byte at byte 10,000;"):
        encode_file(fresh(plain), paths, tmp_path / "a.npy", num_threads=2)
    with pytest.raises(ValueError, match="no file is given"): encode_file(plain, [], tmp_path / "b.npy")


def test_a_fault_far_in_a_text_is_named_by_its_place():
    data = b"good " * 400_000 + b"\xff" + b" good" * 9
    with pytest.raises(UnicodeDecodeError) as caught: fresh(plain).encode_array(data)
    assert (caught.value.start, caught.value.reason) == (2_000_000, "invalid start byte")


@pytest.mark.parametrize("size", [64, 65, 66, 67, 100])
def test_the_reason_of_a_fault_is_the_clear_ones_wherever_blocks_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(chapter, "BLOCK_BYTES", size)
    for place in range(40, 80):
        (tmp_path / "bad.txt").write_bytes(b"word " * 40)
        with open(tmp_path / "bad.txt", "r+b") as file: file.seek(place); file.write("日".encode()[:2])
        with pytest.raises(ValueError) as expected: encode_clear(plain, [str(tmp_path / "bad.txt")], tmp_path / "a.npy", np.dtype("u2"), None, False)
        monkeypatch.setattr(dataset, "pays", lambda size: True)
        with pytest.raises(ValueError) as found: encode_file(fresh(plain), tmp_path / "bad.txt", tmp_path / "a.npy")
        assert str(found.value) == str(expected.value)


def test_an_executor_is_not_asked_too_far_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_BYTES", 1_000)
    monkeypatch.setattr(dataset, "SHARDS_AHEAD", 4)
    (tmp_path / "a.txt").write_bytes(TALES.encode())
    executor, asked = Immediate(), []
    bar = dataset.byte_bar(0, False)
    for ids in dataset.encode_shards(plain, executor, dataset.whole_files(tmp_path / "a.txt"), np.dtype("u2"), bar):
        asked.append(len(executor.futures))
    assert asked[:3] == [4, 5, 6] and len(asked) == len(executor.futures) > 10


def test_no_pretoken_of_the_sample_is_lost():
    "The compiled pieces are those of chapter 3, so that equality above is not that of two empty lists."
    assert len(list(pretokenize(SAMPLE))) > 200 and len(plain.fast.encode(SAMPLE)) > 200
    assert join_tokens(VOCAB, plain.fast.encode(SAMPLE)).decode() == SAMPLE and SPECIALS[0] == END
