"The compiled versions inside chapters 03 and 04 against the clear ones: Unicode, threads, chunk sizes, faults."
import importlib.util
import itertools
import multiprocessing
import platform
import subprocess
import sys
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

pytest.importorskip("numba")
import numpy as np

from cs336_lm import bpe, pretokenization as pre
from cs336_lm.bpe import PairTable, learn_merges_compiled, pack_words, train_bpe, train_bpe_from_counts, train_bpe_naive
from cs336_lm.pretokenization import count_pretokens, count_pretokens_clear, count_words, pretokenize, split_special

settings.register_profile("book", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("book")
SPECIAL = "<|endoftext|>"

DENSE = st.text(st.sampled_from("aslvert'1½ \n\t\u0085\u3000!|<>é日。😀\u0301"), max_size=60)
TEXT = st.one_of(DENSE, st.text(max_size=60), st.text(st.characters(max_codepoint=0x2FF), max_size=60))
SPECIALS = st.lists(st.text(st.sampled_from("<|> a'sé"), min_size=1, max_size=4), max_size=4).flatmap(
    lambda tokens: st.sampled_from([tokens, tokens + [t + t for t in tokens], tokens + [t + "a" for t in tokens]]))
# Many words, long and short, so that tables grow.
WORDY = st.lists(st.sampled_from(["we'll ", "un" * 12, "日本語" * 6, " a", "\n\n", "'s", "<e>", "0" * 15, "0" * 16, "é!"]) |
                 st.integers(0, 10**20).map(str), max_size=60).map("".join)


@pytest.fixture(scope="module", autouse=True)
def _compiled(): assert bpe.merges_ready()


@pytest.fixture
def always_compiled(monkeypatch):
    for module, name in ((pre, "MIN_COMPILED_BYTES"), (bpe, "MIN_COMPILED_BYTES"), (bpe, "MIN_COMPILED_WORD_BYTES")):
        monkeypatch.setattr(module, name, 0)


@pytest.fixture(scope="module")
def twins():
    """The chapter's module a second time, with the plain twins in the place of the vector code, all bounds checked.

    Not cached on disk: there the two would take each other's place."""
    import numba
    spec = importlib.util.spec_from_file_location("twins_of_pretokenization", pre.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.vector_code = lambda: {}["no vector code here"]
    module._compile = numba.njit(nogil=True, boundscheck=True)
    assert module.load_compiled()
    return module


def scan(text: str, specials=(), find_pieces=None) -> list[tuple[str, bool]]:
    "The pieces in a buffer of the least size, with letters of a contraction after the text's end."
    data, find_pieces = text.encode(), find_pieces or pre.find_starts
    padded, starts = np.frombuffer(data + b"'ll\xe3" * 16, np.uint8), np.full(len(data) + 65, -7, np.int32)
    tables = pre.scan_tables(tuple(specials))
    count = find_pieces(padded, len(data), tables, starts[:-1])
    assert count >= 0 and starts[-1] == -7, "written past the room that was asked for"
    places = [s if s >= 0 else ~s for s in starts[:count + 1].tolist()]
    return [(data[a:b].decode(), starts[k] < 0) for k, (a, b) in enumerate(itertools.pairwise(places))]


def clear_scan(text: str, specials=()) -> list[tuple[str, bool]]:
    return [(piece, special) for part, special in split_special(text, specials)
            for piece in ([part] if special else pretokenize(part))]


@given(TEXT | WORDY, SPECIALS)
@settings(max_examples=400)
def test_pieces_are_those_of_the_pattern(text, specials):
    assert scan(text, specials) == clear_scan(text, specials)
    assert scan(text, specials, pre.find_pieces) == clear_scan(text, specials)


# Long enough for several blocks; each part comes to lie across a block's end.
LONG = st.lists(st.sampled_from(["a", "an", "'ll", "'s", "'", " ", "  ", "\n", "1", "!", "é", "日", "😀", "\u0085", "\u3000", "<e>", "|"]) |
                st.text(max_size=2), min_size=40, max_size=200).map("".join)


@given(LONG, SPECIALS | st.just(["<e>", "s<e>"]), st.integers(0, 64))
@settings(max_examples=400)
def test_pieces_across_blocks(text, specials, before):
    text = "x" * before + text
    assert scan(text, specials) == clear_scan(text, specials)


@given(TEXT | LONG, SPECIALS)
@settings(max_examples=200)
def test_twins_of_the_vector_code(twins, text, specials):
    assert scan(text, specials, twins.find_starts) == clear_scan(text, specials)


@given(TEXT | LONG, SPECIALS)
@settings(max_examples=60)
def test_twins_in_plain_python(twins, text, specials):
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        for name, function in list(vars(twins).items()):
            if hasattr(function, "py_func"): patch.setattr(twins, name, function.py_func)
        assert scan(text, specials, twins.find_starts) == scan(text, specials, twins.find_pieces) == clear_scan(text, specials)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the plain twin may serve elsewhere")
def test_vector_code_is_in_use():
    assert all(getattr(pre, name) is code for name, code in pre.vector_code().items())


def test_vector_code_that_fails_or_lies_gives_way_to_its_twin(twins, monkeypatch):
    wrong = twins._compile(lambda text, i: (np.uint64(0),) * 6)
    for code in (lambda: {}["none"], lambda: {"block_masks": wrong}, lambda: {"lowest_bit": lambda: 0}):
        monkeypatch.setattr(twins, "vector_code", code)
        twins._choose_twins()
        assert all(getattr(twins, name).py_func is twin for name, twin in twins.TWINS.items())


def test_a_scanner_without_room_says_so(twins):
    text, tables, starts = np.zeros(100, np.uint8), pre.scan_tables(()), np.zeros(100, np.int32)
    for find_starts in (pre.find_starts, twins.find_starts):
        assert find_starts(text, 36, tables, starts) == 1
        for short in ((text, 37, tables, np.zeros(200, np.int32)), (text, 36, tables, starts[:99])):
            with pytest.raises(ValueError, match="no room"): find_starts(*short)


@pytest.mark.parametrize("around", ["a{}1", "\n{} {}'s"])
def test_every_code_point(around):
    text = "".join(around.replace("{}", chr(c)) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    expected = list(pretokenize(text))
    same = [piece for piece, _ in scan(text)] == expected == [piece for piece, _ in scan(text, (), pre.find_pieces)]
    assert same  # not in one line: pytest would print millions of pieces


@given(st.binary(max_size=12) | st.lists(st.sampled_from([b"\xe3", b"y" * 61, b"\x81", b"\xf4", b"\x90", b"a", b"\xed\xa0", "😀".encode()])).map(b"".join))
@settings(max_examples=400)
def test_not_utf8_is_found_where_python_finds_it(data):
    starts, padded, tables = np.zeros(len(data) + 64, np.int32), np.frombuffer(data + b"\x81" * 64, np.uint8), pre.scan_tables(("\x81",))
    try: fault = len(data.decode()) * 0
    except UnicodeDecodeError as error: fault = ~error.start
    for find in (pre.find_starts, pre.find_pieces): assert min(0, find(padded, len(data), tables, starts)) == fault


@given(TEXT | WORDY, SPECIALS, st.integers(1, 3), st.integers(1, 40) | st.just(1 << 20))
@settings(max_examples=200)
def test_counts_in_files(tmp_path, text, specials, threads, chunk_bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    words = count_words(path, specials, num_threads=threads, chunk_bytes=chunk_bytes)
    assert list(words.counter().items()) == list(count_pretokens_clear(path, specials).items())
    assert count_words(path, specials, num_threads=threads, in_order=False).counter() == words.counter()


@given(TEXT | WORDY | LONG, SPECIALS, st.integers(1, 60))
@settings(max_examples=100)
def test_twins_count_alike(tmp_path, twins, text, specials, chunk_bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    words = twins.count_words(path, specials, num_threads=2, chunk_bytes=chunk_bytes)
    assert list(words.counter().items()) == list(count_pretokens_clear(path, specials).items())


# -- executors

@given(TEXT | WORDY | LONG, SPECIALS, st.integers(1, 60))
@settings(max_examples=150)
def test_shards_of_an_executor(tmp_path, text, specials, shard_bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    with ThreadPoolExecutor(2) as executor: words = count_words(path, specials, executor=executor, shard_bytes=shard_bytes)
    assert list(words.counter().items()) == list(count_pretokens_clear(path, specials).items())


def test_shards_are_as_many_as_wanted(tmp_path):
    path = tmp_path / "text.txt"
    for text in ("many words, no token at all. " * 3000, "<|endoftext|>" * 5000, "一二三，四五六。" * 5000, "word\n" * 9000):
        path.write_text(text, encoding="utf-8")
        shards = [(part.begin, part.end) for part in pre.safe_shards(pre.whole_files(path), ["<|endoftext|>"], 4096)]
        assert len(shards) > path.stat().st_size // 4500
        assert [0, *(end for _, end in shards)] == [*(begin for begin, _ in shards), path.stat().st_size]
        assert max(end - begin for begin, end in shards) < 2 * 4096
    path.write_text("a" * 20_000)
    assert list(pre.safe_shards(pre.whole_files(path), [], 512)) == pre.whole_files(path)


@pytest.fixture(scope="module")
def some_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "text.txt"
    path.write_text("".join(f"{n % 977} words, isn't{n}<|endoftext|>\n" for n in range(20_000)))
    return path


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool: yield pool


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed (extra: dask)")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client: yield client.get_executor()


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(3) as pool: yield pool


@pytest.mark.parametrize("name", ["threads", "processes", "dask"])
def test_any_executor_gives_the_same_merges(name, request, some_text, always_compiled, monkeypatch):
    executor = request.getfixturevalue(name)
    monkeypatch.setitem(pre.count_words.__kwdefaults__, "shard_bytes", 100_000)
    assert train_bpe(some_text, 800, [SPECIAL], executor=executor) == train_bpe(some_text, 800, [SPECIAL])
    assert list(count_pretokens(some_text, [SPECIAL], executor=executor).items()) == \
        list(count_pretokens_clear(some_text, [SPECIAL]).items())


# -- several files

@pytest.fixture(scope="module")
def some_files(some_text):
    "The text in files that end behind a special token, as small as one document and as large as most of it."
    text, files, begin = some_text.read_text(), [], 0
    for number, part in enumerate((0.0, 0.0001, 0.3, 0.301, 0.9, 1.0)):
        end = text.rindex("\n", 0, int(part * len(text))) + 1 if 0 < part < 1 else int(part * len(text))
        files.append(some_text.with_name(f"part-{number}.txt"))
        files[-1].write_text(text[begin:end])
        begin = end
    assert files[0].stat().st_size == 0 and b"".join(file.read_bytes() for file in files) == some_text.read_bytes()
    return files


@pytest.mark.parametrize("name", [None, "threads", "processes", "dask"])
def test_several_files_are_their_text(name, request, some_text, some_files, always_compiled, monkeypatch):
    "The same counts in the same order and the same merges as one file, in threads and by any executor."
    how = {"executor": request.getfixturevalue(name)} if name else {"num_processes": 3}
    monkeypatch.setitem(pre.count_words.__kwdefaults__, "shard_bytes", 100_000)
    monkeypatch.setitem(pre.count_words.__kwdefaults__, "chunk_bytes", 10_000)
    expected = list(count_pretokens_clear(some_text, [SPECIAL]).items())
    assert list(count_pretokens(some_files, [SPECIAL], **how).items()) == expected
    assert train_bpe(some_files, 800, [SPECIAL], **how) == train_bpe(some_text, 800, [SPECIAL])


def test_several_files_by_the_clear_version(some_text, some_files, monkeypatch):
    expected = count_pretokens_clear(some_text, [SPECIAL])
    assert list(count_pretokens_clear(map(str, some_files), [SPECIAL]).items()) == list(expected.items())
    assert train_bpe(some_files, 400, [SPECIAL]) == train_bpe_from_counts(expected, 400, [SPECIAL])
    monkeypatch.setattr(pre, "MIN_PARALLEL_BYTES", 0)
    in_processes = count_pretokens_clear(some_files, [SPECIAL], num_processes=2, chunk_bytes=100_000)
    assert list(in_processes.items()) == list(expected.items())


@given(st.lists(TEXT | WORDY, min_size=1, max_size=5), SPECIALS, st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=150)
def test_no_piece_crosses_the_end_of_a_file(tmp_path, texts, specials, threads, chunk_bytes):
    paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts): path.write_bytes(text.encode())
    expected = list(sum((count_pretokens_clear(path, specials) for path in paths), pre.Counter()).items())
    assert list(count_pretokens_clear(paths, specials, chunk_bytes=chunk_bytes).items()) == expected
    assert list(count_words(paths, specials, num_threads=threads, chunk_bytes=chunk_bytes).counter().items()) == expected
    with ThreadPoolExecutor(2) as executor:
        words = count_words(paths, specials, executor=executor, shard_bytes=chunk_bytes)
    assert list(words.counter().items()) == expected


def test_faults_of_several_files(tmp_path, always_compiled):
    good, first, second = (tmp_path / name for name in ("good.txt", "first.txt", "second.txt"))
    good.write_text("good words " * 1000), first.write_bytes(b"a" * 90 + b"\xff"), second.write_bytes(b"\xff")
    for count in (count_words, count_pretokens_clear):
        with pytest.raises(ValueError, match="first.txt is not UTF-8: .* at byte 90;"): count([good, first, second], [], chunk_bytes=100)
        with pytest.raises(FileNotFoundError, match="no.txt"): count([good, tmp_path / "no.txt"], [])
        with pytest.raises(ValueError, match="no file is given"): count([], [])
        with pytest.raises(TypeError, match="os.PathLike"): count([good, 3], [])
        with pytest.raises(TypeError): count(3, [])
    with pytest.raises(ValueError, match="no file is given"): train_bpe([], 300, [])
    for path in (first, second): path.write_bytes(b"")
    with pytest.raises(ValueError, match="first.txt, .*second.txt is empty"): train_bpe([first, second], 300, [])
    assert len(train_bpe([first, good, second], 258, [])[1]) == 2


def test_a_later_file_that_changes(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths: path.write_text("some words " * 100)
    original = pre._next_chunk
    def and_change(reader):
        pre.os.truncate(paths[2], 11)
        return original(reader)
    monkeypatch.setattr(pre, "_next_chunk", and_change)
    for threads in (1, 2):
        with pytest.raises(OSError, match="2.txt changed from 1,100 to 11 bytes"): count_words(paths, [], num_threads=threads)
        paths[2].write_text("some words " * 100)


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    paths = [tmp_path / f"{number}.txt" for number in range(200)]
    for path in paths: path.write_text("some words ")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, pre.os.listdir("/proc/self/fd"))) if pre.os.path.isdir("/proc/self/fd") else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try: assert count_words(paths, [], num_threads=3).counter()[b"some"] == 200
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- reading at a place

def test_without_preadv_it_is_read_under_a_lock(some_text, monkeypatch):
    expected = list(count_pretokens_clear(some_text, [SPECIAL]).items())
    assert not hasattr(pre.os, "preadv") or pre._read_some is not pre._seek_and_read
    monkeypatch.setattr(pre, "_read_some", pre._seek_and_read)
    assert list(count_words(some_text, [SPECIAL], num_threads=3, chunk_bytes=5000).counter().items()) == expected


def test_short_reads_are_no_error(some_text, monkeypatch):
    "A read may give fewer bytes than were asked for though the file has more."
    expected, original = list(count_pretokens_clear(some_text, [SPECIAL]).items()), pre._read_some
    monkeypatch.setattr(pre, "_read_some", lambda file, view, at: original(file, view[:1 + len(view) // 3], at))
    assert list(count_words(some_text, [SPECIAL], num_threads=3, chunk_bytes=5000).counter().items()) == expected


def test_a_failing_disk_is_an_ordinary_error(some_text, monkeypatch):
    calls, original = [], pre._read_some
    def fail_later(*args):
        calls.append(args)
        if len(calls) > 20: raise OSError(5, "Input/output error")
        return original(*args)
    monkeypatch.setattr(pre, "_read_some", fail_later)
    for threads in (1, 3):
        calls.clear()
        with pytest.raises(OSError, match="Input/output error"):
            count_words(some_text, [SPECIAL], num_threads=threads, chunk_bytes=5000)


def test_an_executor_tells_faults(tmp_path, processes, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good words " * 10_000 + b"\xff" + b" more words" * 10_000 + b"\xfe")
    with pytest.raises(ValueError, match="text.txt is not UTF-8: .* at byte 110,000;"):
        count_words(path, [], executor=processes, shard_bytes=50_000)
    path.write_text("some words " * 10_000)
    original = pre.cut_files
    def shrinking(*args):
        for shard in original(*args):
            with open(path, "r+b") as file: file.truncate(80_000)
            yield shard
    monkeypatch.setattr(pre, "cut_files", shrinking)
    with pytest.raises(OSError, match="changed from 110,000 to 80,000 bytes"):
        count_words(path, [], executor=processes, shard_bytes=30_000)


def test_an_interrupt_cancels_what_an_executor_has_not_begun(some_text):
    class Never(Executor):
        def __init__(self): self.futures = []
        def submit(self, *args):
            self.futures.append(Future())
            if len(self.futures) == 3: raise KeyboardInterrupt
            return self.futures[-1]
    executor = Never()
    with pytest.raises(KeyboardInterrupt): count_words(some_text, [], executor=executor, shard_bytes=10_000)
    assert [future.cancelled() for future in executor.futures] == [True, True, False]


def test_tables_grow(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n}, {'long' * 5}{'abcdefghij'[n % 10] * (n % 4000)} {n % 7}\n" for n in range(30_000)))
    expected = list(count_pretokens_clear(path, []).items())
    for threads in (1, 3): assert list(count_words(path, [], num_threads=threads).counter().items()) == expected


@pytest.mark.parametrize("copies", [1, 3])
def test_a_table_takes_others_in(tmp_path, copies, monkeypatch):
    "Small tables that grow while they absorb, several times; words that are in both and words that are in one."
    expected, table, grown, original = pre.Counter(), pre.WordTable((1, 1, 1)), [], pre.WordTable.make_room
    monkeypatch.setattr(pre.WordTable, "make_room", lambda self, *room: (grown.append(self is table), original(self, *room)))
    for part in range(4):
        path = tmp_path / f"{part}.txt"
        path.write_text("".join(f"{n % 977} x{n + 2000 * part}\n {'long' * 5}{n % 701 + 99 * part}{'!' * (n % 300)}" for n in range(3000)) * copies)
        words = pre._count_parts(pre.whole_files(path), (), 1, 1000)
        table.absorb(*(words.rows() if part % 2 else (words.short, words.long, words.store, words.used)))
        expected += count_pretokens_clear(path, [])
        assert pre.words_of(table, False).counter() == expected
    assert sum(grown) > 2


def test_a_word_larger_than_a_chunk(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("start " + "日" * 400_000 + "<e>" + "b" * 900_000 + " end")
    words = count_words(path, ["<e>"], num_threads=2, chunk_bytes=1000).counter()
    assert words == {b"start": 1, (" " + "日" * 400_000).encode(): 1, b"b" * 900_000: 1, b" end": 1}


def test_a_text_that_cannot_be_cut_is_refused_in_time(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("good words " + "a" * 100_000)
    monkeypatch.setattr(pre, "LARGEST_CHUNK", 50_000)
    with pytest.raises(ValueError, match="text.txt has no place where it may be cut in 50,000 bytes from byte 1,000 on"):
        count_words(path, [], chunk_bytes=1000)
    assert list(pre.safe_shards(pre.whole_files(path), [], 20_000)) == pre.whole_files(path)


def test_chunks_stay_small(tmp_path):
    path = tmp_path / "text.txt"
    for text in ("many words, no token at all. " * 3000, "<|endoftext|>" * 5000, "一二三，四五六。" * 5000, "word\n" * 9000):
        path.write_text(text, encoding="utf-8")
        reader = pre._ChunkReader(pre.whole_files(path), ("<|endoftext|>",), 4096, False)
        sizes = [chunk.end - chunk.begin for chunk in iter(lambda: pre._next_chunk(reader), None)]
        reader.close()
        assert max(sizes) < 2 * 4096 and sum(sizes) == path.stat().st_size


# -- choosing

def test_a_large_file_is_counted_by_compiled_code(tmp_path, monkeypatch, always_compiled):
    path = tmp_path / "text.txt"
    path.write_text("a few words, a few\n" * 500)
    monkeypatch.setattr(pre, "count_pretokens_clear", lambda *_, **__: pytest.fail("not the compiled version"))
    assert count_pretokens(path, [], num_processes=2)[b" few"] == 1000
    for name in ("num_processes", "chunk_bytes"):
        with pytest.raises(ValueError, match=name): count_pretokens(path, [], **{name: 0})


def run(code: str, *arguments) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_small_call_does_not_import_numba(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some more text " * 9000)
    run("import sys, cs336_lm.bpe as b; b.train_bpe(sys.argv[1], 260, [], num_processes=2); assert 'numba' not in sys.modules", path)


def test_without_numba_the_clear_version_serves(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some more text " * 5000)
    print(run("import sys; sys.modules['numba'] = None\n"
              "import cs336_lm.pretokenization as p, cs336_lm.bpe as b\n"
              "p.MIN_COMPILED_BYTES = b.MIN_COMPILED_BYTES = b.MIN_COMPILED_WORD_BYTES = 0\n"
              "assert not p.compiled_ready() and p.count_pretokens(sys.argv[1], [])[b' text'] == 5000\n"
              "assert b.train_bpe(sys.argv[1], 258, [])[1] == [(b'x', b't'), (b't', b'e')]", path))


def test_who_waits_for_the_compiler_is_told(capsys, monkeypatch):
    import time
    monkeypatch.setattr(pre, "_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(pre, "load_compiled", lambda: time.sleep(0.1))
    pre._tell.cache_clear()
    for _ in range(2): pre.compiled_ready.__wrapped__()
    assert capsys.readouterr().err.count("compiling") == 1
    monkeypatch.undo()
    pre._tell.cache_clear()
    pre.compiled_ready.__wrapped__()
    assert capsys.readouterr().err == ""


def test_progress_reaches_the_end(tmp_path, capsys, always_compiled):
    path = tmp_path / "text.txt"
    path.write_text("å few words " * 1000, encoding="utf-8")
    count_pretokens(path, [], progress=True, chunk_bytes=1000)
    assert "100%" in capsys.readouterr().err
    count_pretokens(path, [])
    assert capsys.readouterr().err == ""


# -- faults

@given(st.lists(st.sampled_from([b"good words. ", b"\xff", b"\xe3\x81", "日本".encode(), b"<e>", b"'"]), max_size=30), st.integers(1, 3))
@settings(max_examples=100)
def test_the_first_fault_of_the_file_is_told(tmp_path, parts, threads):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(parts))
    try: b"".join(parts).decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"text.txt is not UTF-8: .* at byte {error.start:,};"):
            count_words(path, ["<e>"], num_threads=threads, chunk_bytes=9)
    else: assert count_words(path, ["<e>"], num_threads=threads, chunk_bytes=9).counter() == count_pretokens_clear(path, ["<e>"])


def message(call, *args, **kwargs) -> str:
    try: call(*args, **kwargs)
    except ValueError as error: return str(error)
    return "no error"


# Whole characters, and all that may be wrong with one: cut off, a byte too many, too long, a surrogate, too large.
BROKEN = [b"\x80", b"\xc3", b"\xe3", b"\xe3\x81", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80",
          b"\xed", b"\xf4\x90\x80\x80", b"\xf4", b"\xf5", b"\xff", b"\xf0\x9f\x98A", b"\xe3A", b"\xe3\xe3\x81\x82"]


@pytest.mark.parametrize("after", [b"", b"<e>", b"<e>" * 20, b" words after it" * 4, "é".encode() * 20])
def test_a_fault_is_told_as_by_the_clear_version(tmp_path, after):
    "Place and reason, wherever a chunk or a shard ends: also right behind the fault, before a special token."
    path, messages = tmp_path / "text.txt", set()
    with ThreadPoolExecutor(1) as executor:
        for broken, before in itertools.product(BROKEN, range(0, 12)):
            path.write_bytes(b"<e>" * 5 + b"x" * before + broken + after)
            expected = message(count_pretokens_clear, path, ["<e>"])
            assert "is not UTF-8" in expected
            messages.add(expected.split(" at byte")[0])
            for size in (1, 4, 9, 14, 20, 27):
                assert message(count_words, path, ["<e>"], chunk_bytes=size) == expected
                assert message(count_words, path, ["<e>"], executor=executor, shard_bytes=size) == expected
    assert len(messages) == (3 if after == b"" else 2)  # the file's end is told only where it is


@given(st.lists(st.sampled_from([*BROKEN, b"good words. ", "日本".encode(), b"<e>", b"<e>", b"'"]), max_size=30), st.integers(1, 40),
       st.integers(1, 3))
@settings(max_examples=300)
def test_any_fault_is_told_as_by_the_clear_version(tmp_path, parts, chunk_bytes, threads):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(parts))
    expected = message(count_pretokens_clear, path, ["<e>"])
    assert message(count_pretokens_clear, path, ["<e>"], chunk_bytes=chunk_bytes) == expected
    assert message(count_words, path, ["<e>"], num_threads=threads, chunk_bytes=chunk_bytes) == expected


def test_bytes_without_any_character_are_not_all_read(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff" * 1_000_000)
    read, original = [], pre.read_at
    monkeypatch.setattr(pre, "read_at", lambda file, view, at: (read.append(len(view)), original(file, view, at))[1])
    with pytest.raises(ValueError, match="at byte 0;"): count_words(path, [], chunk_bytes=1000)
    assert sum(read) < 1100
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match="at byte 0;"):
        count_words(path, [], executor=executor, shard_bytes=10_000)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("new_size", [15_000, 300_000])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, threads, new_size):
    path = tmp_path / "text.txt"
    path.write_text("some words " * 10_000)
    original = pre._next_chunk
    def and_change(reader):
        found = original(reader)
        with open(path, "r+b") as file: file.truncate(new_size)
        return found
    monkeypatch.setattr(pre, "_next_chunk", and_change)
    with pytest.raises(OSError, match=f"changed from 110,000 to {new_size:,} bytes"):
        count_words(path, [], num_threads=threads, chunk_bytes=10_000)


def test_faults(tmp_path, always_compiled):
    path = tmp_path / "empty.txt"
    path.touch()
    assert count_pretokens(path, ["<e>"]) == {}
    path.write_text("<e>" * 3)
    assert count_pretokens(path, ["<e>"]) == {}
    with pytest.raises(FileNotFoundError, match="no.txt"): count_pretokens(tmp_path / "no.txt", [])
    with pytest.raises(OSError): count_pretokens(tmp_path, [])
    for wrong in ("<e>", [""], [b"<e>"]):
        with pytest.raises(ValueError): count_pretokens(path, wrong)


def test_an_interrupt_ends_all_threads(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("some words " * 100_000)
    calls = []
    def interrupt(self, *_):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
    monkeypatch.setattr(pre.WordTable, "count", interrupt)
    with pytest.raises(KeyboardInterrupt): count_words(path, [], num_threads=2, chunk_bytes=1000)
    assert len(calls) < 100


# -- merges

def words_of(letters): return st.lists(st.sampled_from(letters), max_size=12).map(bytes)


COUNTS = st.one_of(st.dictionaries(words_of(b"ab"), st.integers(0, 3), max_size=8),
                   st.dictionaries(words_of(b"abcd \xc3\xa9\xff\x00"), st.integers(1, 9), max_size=12),
                   st.dictionaries(words_of(b"ab") | st.binary(max_size=40), st.integers(1, 5) | st.integers(1, 2**52), max_size=10))


def quick(counts, num_merges):
    return bpe._learn_merges(PairTable({word: n for word, n in counts.items() if n > 0}), num_merges, False)


@given(COUNTS, st.integers(0, 80), st.none() | st.integers(1, 20) | st.integers(1, 2**53))
@settings(max_examples=600)
def test_merges_are_those_of_the_clear_version(counts, num_merges, watermark):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merges = learn_merges_compiled(pack_words(counts), num_merges, watermark=watermark)
        assert merges == train_bpe_naive(counts, 256 + num_merges)[1]


def made_up_words(how_many: int) -> dict[bytes, int]:
    rng = np.random.default_rng(0)
    words = {bytes(rng.choice(list(b"abcdefghi '\xe6\x97"), size=n)) for n in rng.integers(1, 9, how_many)}
    return {word: 1 + 1000 // rank for rank, word in enumerate(sorted(words), 1)}


def test_arrays_grow(monkeypatch):
    counts, grown, original = made_up_words(15_000), [], bpe._make_room
    monkeypatch.setattr(bpe, "_make_room", lambda index, *more: (grown.append(more[1] > 0), original(index, *more)))
    monkeypatch.setattr(bpe, "FIRST_PAIRS", 64)
    expected = quick(counts, 6_000)
    for watermark in (1, 7, 100_000, 10**9): assert learn_merges_compiled(pack_words(counts), 6_000, watermark=watermark) == expected
    assert {False, True} == set(grown), "room for counting all pairs, and for what merges add"


def test_long_words_and_long_entries():
    "Runs make overlapping pairs and entries whose first eight bytes are the same."
    counts = {b"a" * 3000: 2, b"ab" * 700: 3, bytes(range(256)) * 4: 1, b"a" * 17: 5, b"aaaaaaaab": 4}
    assert learn_merges_compiled(pack_words(counts), 400) == quick(counts, 400)


def test_large_counts():
    counts = {b"abc": 2**40, b"bcd": 2**40 + 1, b"xyz": 3 * 2**50}
    assert learn_merges_compiled(pack_words(counts), 6) == quick(counts, 6)


@given(WORDY, st.integers(1, 3))
@settings(max_examples=60)
def test_training_from_a_file(tmp_path, text, threads):
    path = tmp_path / "text.txt"
    path.write_bytes((text or "a").encode())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clear = train_bpe(path, 320, ["<e>"])
        for name in ("MIN_COMPILED_BYTES", "MIN_COMPILED_WORD_BYTES"): patch.setattr(bpe, name, 0)
        assert train_bpe(path, 320, ["<e>"], num_processes=threads) == clear


def test_training_chooses_by_size(tmp_path, monkeypatch, always_compiled):
    path = tmp_path / "text.txt"
    path.write_text("the cat ate the rat " * 100)
    monkeypatch.setattr(bpe, "_learn_merges", lambda *_: pytest.fail("not the compiled version"))
    assert len(train_bpe(path, 262, [])[1]) == len(train_bpe_from_counts({b"newest": 3, b"widest": 1}, 262)[1]) == 6
    with pytest.raises(ValueError, match="must be at least 1"): train_bpe(path, 262, [], num_processes=0)
    path.write_bytes(b"a" * 5000 + b"\xff")
    with pytest.raises(ValueError, match="text.txt is not UTF-8.*byte 5,000"): train_bpe(path, 300, [])
    with pytest.warns(UserWarning, match="no more pairs"): assert train_bpe_from_counts({}, 300)[1] == []


def test_bar_of_the_merges(tmp_path, capsys, always_compiled):
    train_bpe_from_counts({b"newest": 3, b"widest": 1}, 262, progress=True)
    assert "100%" in capsys.readouterr().err


def test_ctrl_c_while_code_compiles_does_not_break_the_session(tmp_path):
    (tmp_path / "text.txt").write_text("some text" * 5000)
    code = ("import sys; from cs336_lm import pretokenization as p; original = p.vector_code\n"
            "def interrupted(): raise KeyboardInterrupt\n"
            "p.vector_code = interrupted\n"
            "try: p.load_compiled()\nexcept KeyboardInterrupt: print('interrupted')\n"
            "p.vector_code = original\n"
            "assert p.load_compiled() and not p._twins and not p._marked\n"
            "p.MIN_COMPILED_BYTES = 0\n"
            "print(p.count_pretokens(sys.argv[1], []) == p.count_pretokens_clear(sys.argv[1], []))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "text.txt"], capture_output=True, text=True)
    assert done.stdout == "interrupted\nTrue\n", done.stderr


def test_merges_that_make_a_special_token_are_refused():
    with pytest.raises(ValueError, match="merges make b'ab', which is a special token"): bpe.train_bpe_from_counts({b"ab": 3}, 258, ["ab"])
    with pytest.raises(ValueError, match="lone surrogate"): bpe.train_bpe_from_counts({b"ab": 3}, 258, ["\ud800"])
