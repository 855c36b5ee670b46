"""Chapter 5: encoding, streams and files; against `tiktoken`, `tokenizers`, `transformers`; by faults."""
import json
import os
import subprocess
import sys
import textwrap
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import tokenizer as chapter
from cs336_lm.bpe import train_bpe_from_counts
from cs336_lm.pretokenization import PATTERN, pretokenize
from cs336_lm.tokenizer import (BYTE_TO_CHAR, Tokenizer, merge_by_rank, merge_in_order, merge_with_heap, settled_parts,
                                text_to_token, token_to_text)

END = "<|endoftext|>"
SAMPLE = """Once upon a time, there was a little fox who couldn't sleep. "You'll see," said the owl, "we've got
all night!" The fox didn't see. It's 1999, or 2024; they'd walk 12 miles, and I'm told they're walking still.

  The moon (a thin, thin moon) rose over the hills -- café, naïve, 東京, 你好, 🙂🙂 ...\tand\r\n\r\nthat was that.
""" * 3
counts = Counter(word.encode() for word in pretokenize(SAMPLE))
VOCAB, MERGES = train_bpe_from_counts(counts, 256 + 150 + 1, [END])
VOCAB_IDS = {token: id for id, token in VOCAB.items()}
plain = Tokenizer(VOCAB, MERGES, [END])
SPECIALS = [END, "<|a|>", "<|a|><|b|>", "|><", "aba", "ab", "'l", " \n", "é"]
nested = Tokenizer(VOCAB, MERGES, SPECIALS)
BEGINNINGS = chapter.proper_beginnings(SPECIALS)
quick = settings(deadline=None, max_examples=150)
# Text that hits the dangerous places often: apostrophes, white space, parts of special tokens, bytes of one character.
fragments = st.sampled_from([*SPECIALS, "<|", "|>", "<|endof", "'", "l", "ll", "'ll", "'ve", "'v", "re", " ", "  ",
                             "\n", "\r\n", "\t", "\u00a0", "a", "b", "the", " the", "12", "!", "?!",
                             "é", "🙂", "你好", "\x00", "\u0301", "ǅ"])
tricky = st.lists(st.one_of(fragments, st.text(max_size=3)), max_size=25).map("".join)
# The same of characters that stand in the Unicode tables of all libraries: those that Unicode 3.2 had.
known = st.characters(exclude_categories=("Cs", "Cn")).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
shared = st.lists(st.one_of(fragments, st.text(known, max_size=3)), max_size=25).map("".join)


@st.composite
def text_and_pieces(draw):
    "A text and the same text cut at arbitrary places, empty pieces among them."
    text = draw(tricky)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


# ---- encoding and decoding

def test_the_handouts_example():
    vocab = dict(enumerate([b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"]))
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    tokenizer = Tokenizer(vocab, merges)
    assert tokenizer.encode("the cat ate") == [9, 7, 1, 5, 10, 3]
    assert tokenizer.decode([9, 7, 1, 5, 10, 3]) == "the cat ate"
    with pytest.raises(ValueError, match="b'x'"): tokenizer.encode("the x")


@quick
@given(st.one_of(tricky, st.text()))
def test_round_trip(text):
    for tokenizer in (plain, nested): assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(tricky)
def test_by_the_definition(text):
    "Ids from nothing but `split` on the special tokens, the pattern, and the merges replayed in order."
    ids = []
    for number, part in enumerate(text.split(END)):
        if number: ids.append(plain.token_to_id(END))
        for word in pretokenize(part): ids += [VOCAB_IDS[token] for token in merge_in_order(word.encode(), MERGES)]
    assert plain.encode(text) == ids


@quick
@given(st.binary(max_size=40).map(lambda data: bytes(b"ab c"[byte % 4] for byte in data)), st.integers(0, 2**32 - 1))
def test_three_ways_to_merge(word, seed):
    rng = np.random.default_rng(seed)
    counts = Counter(bytes(rng.choice(list(b"ab c"), size=9).tolist()) for _ in range(12))
    _, merges = train_bpe_from_counts(counts, 256 + 20, [])
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert merge_in_order(word, merges) == merge_by_rank(word, ranks) == merge_with_heap(word, ranks)


@quick
@given(st.text(alphabet="ab", max_size=40), st.permutations(range(12)))
def test_merges_in_any_order_agree_between_scan_and_heap(text, order):
    pairs = [(a.encode(), b.encode()) for a in ("a", "b", "ab", "aa") for b in ("a", "b", "ba")]
    ranks = {pairs[k]: rank for rank, k in enumerate(order)}
    assert merge_by_rank(text.encode(), ranks) == merge_with_heap(text.encode(), ranks)


def test_special_tokens_longest_wins_and_missing_ones_are_appended():
    tokenizer = Tokenizer(VOCAB, MERGES, [END, "<|a|>", "<|a|><|b|>"])
    a, ab = len(VOCAB), len(VOCAB) + 1
    assert tokenizer.token_to_id(END) == len(VOCAB) - 1 and tokenizer.vocab_size == len(VOCAB) + 2
    assert tokenizer.encode("<|a|><|b|><|a|>") == [ab, a] and tokenizer.vocab[ab] == b"<|a|><|b|>"
    assert tokenizer.encode(END + END) == [len(VOCAB) - 1] * 2
    assert VOCAB == dict(tokenizer.vocab.items() - {(a, b"<|a|>"), (ab, b"<|a|><|b|>")})  # the caller's is as it was
    assert len(Tokenizer(VOCAB, MERGES).encode(END)) > 1  # not named, so ordinary text
    assert Tokenizer(VOCAB, MERGES, ["a"]).encode("a") == [ord("a")]
    assert Tokenizer({0: b"a", 5: b"b"}, [], ["<s>"]).vocab_size == 7


def test_a_merge_that_stands_there_twice_counts_where_it_stands_first():
    vocab = dict(enumerate([b"a", b"b", b"c", b"ab", b"bc"]))
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"b")]
    assert Tokenizer(vocab, merges).encode("abc") == [3, 2]
    assert merge_in_order(b"abc", merges) == [b"ab", b"c"]


@pytest.mark.parametrize("word", ["cd", "abcd", "abcdabcd", "cdcdcdcdcd"])
def test_merges_after_one_that_stands_there_twice_count(word):
    merges = [(b"a", b"b"), (b"a", b"b"), (b"a", b"b"), (b"c", b"d")]
    made = Tokenizer(dict(enumerate([*(bytes([b]) for b in range(256)), b"ab", b"cd"])), merges)
    expected = [made.token_to_id(token) for token in merge_in_order(word.encode(), merges)]
    for merge in (merge_by_rank, merge_with_heap): assert [made.token_to_id(t) for t in merge(word.encode(), made._ranks)] == expected
    assert made.encode(word) == expected


def test_decode_malformed_bytes_and_foreign_ids():
    e_acute = [plain.token_to_id(bytes([byte])) for byte in "é".encode()]
    assert plain.decode(e_acute) == "é" and plain.decode(e_acute[:1]) == "\ufffd"
    assert plain.decode(e_acute[1:] + [97]) == "\ufffda"
    assert plain.decode([]) == "" and plain.decode(np.array(plain.encode("a fox"), dtype=np.uint16)) == "a fox"
    assert plain.decode(iter(plain.encode("a fox"))) == "a fox"
    for bad in (len(VOCAB), -1, 10**9):
        with pytest.raises(ValueError, match=f"Id {bad} "): plain.decode([1, bad])


@quick
@given(st.lists(st.integers(0, 256 + 100), max_size=30))
def test_any_ids_decode_and_invalid_bytes_give_replacement_characters(ids):
    assert plain.decode(ids) == b"".join(VOCAB[id] for id in ids).decode("utf-8", errors="replace")


def test_cache_stays_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(chapter, "CACHE_SLOTS", 7)  # so that nearly every word throws out another
    small = Tokenizer(VOCAB, MERGES, [END])
    text = " ".join(f"word{i % 37}" for i in range(300)) + " " + "x" * 5000
    expected = [VOCAB_IDS[token] for word in pretokenize(text) for token in merge_in_order(word.encode(), MERGES)]
    assert small.encode(text) == small.encode(text) == expected
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(small.encode, [text] * 8)) == [expected] * 8
    assert len(small._cache) == 7
    assert all(len(key) <= chapter.CACHE_CHARS and len(ids) <= chapter.CACHE_IDS for key, ids in small._cache)


def test_no_pretoken_equals_a_placeholder_of_the_cache():
    for key, _ in chapter.new_cache()[::97]: assert len(list(pretokenize(key))) > 1


# ---- streams

@settings(deadline=None, max_examples=400)
@given(text_and_pieces(), st.integers(1, 9))
def test_pieces_change_nothing(case, block_chars):
    text, pieces = case
    for tokenizer in (plain, nested):
        assert list(tokenizer.encode_iterable(pieces, block_chars=block_chars)) == tokenizer.encode(text)


@quick
@given(tricky, tricky)
def test_settled_parts_hold_for_every_continuation(text, rest):
    settled, held = settled_parts(text, SPECIALS, BEGINNINGS)
    assert "".join(part for part, _ in settled) + held == text
    assert list(chapter.text_parts(text + rest, SPECIALS))[:len(settled)] == settled


@pytest.mark.parametrize("text", ["you'll", "they've", "we're", "a  \n\n b", "a <|endoftext|> b", "<|a|><|b|>",
                                  "<|a|><|", "\n\n\nb", "🙂'", "x "])
def test_every_single_cut(text):
    for cut in range(len(text) + 1):
        assert list(nested.encode_iterable([text[:cut], text[cut:]], block_chars=1)) == nested.encode(text)
    assert list(nested.encode_iterable(text, block_chars=1)) == nested.encode(text)
    assert list(nested.encode_iterable(iter([text]))) == nested.encode(text)


@pytest.mark.parametrize("unit", ["a", "ab", "=", "你", " ", "\n", "<|endof", "<|a|>", "'l", "'"])
def test_long_pieces_without_a_break(unit):
    text = unit * (60_000 // len(unit)) + "x y"
    whole = nested.encode(text)
    assert nested.decode(whole) == text
    assert list(nested.encode_iterable([text])) == whole
    assert list(nested.encode_iterable(text)) == whole  # one character a piece


def test_stream_is_lazy():
    def endless():
        while True: yield "all work and no play "
    stream = plain.encode_iterable(endless())
    assert plain.decode([next(stream) for _ in range(1000)]).startswith("all work and no play all work")
    assert list(plain.encode_iterable([])) == list(plain.encode_iterable(["", ""])) == []


MEMORY_PROGRAM = """
    import resource, sys
    from cs336_lm.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(sys.argv[1])
    count = total = 0
    with open(sys.argv[2], encoding="utf-8") as file, open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (resident + 1_000_000, -1))
        for id in tokenizer.encode_iterable(file) if sys.argv[3] == "stream" else tokenizer.encode(file.read()):
            count += 1
            total += id
    print(count, total)
"""


def run_with_little_memory(folder, text, how):
    plain.save(folder / "tokenizer")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    arguments = [sys.executable, "-c", textwrap.dedent(MEMORY_PROGRAM), folder / "tokenizer", folder / "text.txt", how]
    nothing_compiled = os.environ | {"NUMBA_CACHE_DIR": str(folder / "no compiled code")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=nothing_compiled)
    assert not (folder / "no compiled code").exists(), "something was compiled"
    return done


def random_lines(pool, rng):
    return "".join(" ".join(f"w{n:x}" for n in rng.integers(pool, size=12)) + "\n" for _ in range(8_000))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
@pytest.mark.parametrize("pool", [500, 10**7], ids=["few words", "ever new words"])
def test_streaming_needs_no_new_memory(tmp_path, pool):
    "With the address space limited to what is resident and 1 MB more, which is less than what is mapped already."
    text = random_lines(pool, np.random.default_rng(0))
    done, ids = run_with_little_memory(tmp_path, text, "stream"), plain.encode(text)
    assert done.stdout.split() == [str(len(ids)), str(sum(ids))], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
def test_the_memory_limit_bites(tmp_path):
    done = run_with_little_memory(tmp_path, random_lines(500, np.random.default_rng(0)), "at once")
    assert done.returncode and "MemoryError" in done.stderr


# ---- files and peers

def test_byte_mapping_is_gpt2s():
    assert len(set(BYTE_TO_CHAR.values())) == 256
    assert token_to_text(b" the\n\x00\xad\xff") == "ĠtheĊĀŃÿ" and text_to_token("ĠtheĊĀŃÿ") == b" the\n\x00\xad\xff"
    transformers_table = pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()
    assert transformers_table == BYTE_TO_CHAR


@pytest.mark.parametrize("tokenizer", [plain, nested], ids=["plain", "nested"])
def test_save_and_load(tokenizer, tmp_path):
    tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, trained_on="a fox")
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for name in ("vocab", "merges", "special_tokens"): assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.trained_on == "a fox" and loaded.sha256 == tokenizer.sha256
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"merges.txt", "meta.json", "special_tokens.json", "vocab.json"}
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    other = Tokenizer.from_files(tmp_path / "vocab.json", str(tmp_path / "merges.txt"), [END])
    assert other.encode(SAMPLE + END) == plain.encode(SAMPLE + END)


def test_files_of_others_load(tmp_path):
    "Windows line ends, no version line, a part that begins with #, a special token written as it is, ids in any order."
    order = [0, 300, *range(1, 256), 257, 256]
    tokens = [*(bytes([byte]) for byte in range(256)), b"##", b"th", "<|im début|>".encode()]
    names = [*map(token_to_text, tokens[:-1]), "<|im début|>"]
    (tmp_path / "v.json").write_text(json.dumps(dict(zip(names, order))), encoding="ascii")
    (tmp_path / "m.txt").write_bytes(b"# #\r\nt h\r\n\r\n")
    tokenizer = Tokenizer.from_files(tmp_path / "v.json", tmp_path / "m.txt", ["<|im début|>"])
    assert tokenizer.vocab == dict(zip(order, tokens)) and tokenizer.merges == [(b"#", b"#"), (b"t", b"h")]
    assert tokenizer.vocab_size == 301 and len(tokenizer.vocab) == 259


def test_hash_names_what_the_tokenizer_does():
    same = Tokenizer(dict(reversed(VOCAB.items())), iter(MERGES), [END], trained_on="elsewhere")
    assert same.sha256 == plain.sha256 and len(plain.sha256) == 64
    others = [Tokenizer(VOCAB, MERGES[:-1], [END]), Tokenizer(VOCAB, MERGES), nested,
              Tokenizer({id + 1: token for id, token in VOCAB.items()}, MERGES, [END])]
    assert len({tokenizer.sha256 for tokenizer in [plain, *others]}) == 5


@quick
@given(shared)
def test_against_tiktoken(text):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: id for id, token in VOCAB.items() if token != END.encode()}
    encoding = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(VOCAB) - 1})
    assert encoding.encode(text, allowed_special="all") == plain.encode(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    plain.save(folder)
    return folder


@pytest.fixture(scope="module")
def hf(saved):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer(str(saved / "vocab.json"), str(saved / "merges.txt"))
    theirs.add_special_tokens([END])
    return theirs


@quick
@given(shared)
def test_against_tokenizers(hf, text):
    assert hf.encode(text).ids == plain.encode(text)


def test_against_transformers(saved):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(saved))
    text = f"{END}{SAMPLE}{END} café"
    assert theirs.encode(text) == plain.encode(text)
    assert len(theirs) == plain.vocab_size and theirs.eos_token_id == plain.token_to_id(END)


def test_loading_what_tokenizers_trained(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([SAMPLE], vocab_size=350, min_frequency=1, special_tokens=[END], show_progress=False)
    theirs.save_model(str(tmp_path))
    assert Tokenizer.load(tmp_path).encode(SAMPLE) == theirs.encode(SAMPLE).ids
    ours = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", [END])
    assert ours.encode(SAMPLE + END) == theirs.encode(SAMPLE + END).ids


# ---- faults

def damage(folder, name, change):
    plain.save(folder)
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("name, change, message", [
    ("vocab.json", lambda data: data[:len(data) // 2], "line 1: damaged JSON"),
    ("vocab.json", lambda data: b"", "line 1: damaged JSON"),
    ("vocab.json", lambda data: b"{\n" + data[1:50] + b"\xff\n", "line 2: damaged JSON .not UTF-8"),
    ("vocab.json", lambda data: b'["a"]', "one JSON object"),
    ("vocab.json", lambda data: data.replace(b": 65,", b': "65",'), "one JSON object"),
    ("vocab.json", lambda data: data.replace(b'"A": 65, ', b""), "byte b'A' .'A'. is missing, 1 of 256"),
    ("vocab.json", lambda data: data.replace(b": 65,", b": 66,"), "id 66 has two tokens"),
    ("vocab.json", lambda data: data.replace(b'"A": 65', b'"A": 65, "A": 9999'), "'A' stands there twice"),
    ("merges.txt", lambda data: data + "x Ġzzz\n".encode(), f"line {len(MERGES) + 2}: merge .* b' zzz' is not in"),
    ("merges.txt", lambda data: data + b"q q\n", f"line {len(MERGES) + 2}: merge .* b'qq' is not in the vocabulary"),
    ("merges.txt", lambda data: data.rstrip().rsplit(b" ", 1)[0], f"line {len(MERGES) + 1}: .* not two tokens"),
    ("merges.txt", lambda data: data.replace(b"\n", b"\n#version: 0.2\n", 1), "line 2: merge b'#version:'"),
    ("merges.txt", lambda data: b"#version: 0.2\n\xff \xfe\n", "line 2: not UTF-8"),
    ("special_tokens.json", lambda data: b'["<|endof', "line 1: damaged JSON"),
    ("special_tokens.json", lambda data: b'{"a": 1}', "JSON list"),
    ("special_tokens.json", lambda data: b'[""]', "none of them empty"),
    ("meta.json", lambda data: data.replace(b'"sha256": "', b'"sha256": "0'), "do not fit together"),
])
def test_damaged_files(tmp_path, name, change, message):
    path = damage(tmp_path, name, change)
    with pytest.raises(ValueError, match=message) as caught: Tokenizer.load(tmp_path)
    assert (path.name in str(caught.value)), caught.value


def test_missing_files(tmp_path):
    plain.save(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt is missing"): Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"): Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError): plain.save(tmp_path / "file")


@pytest.mark.parametrize("vocab, merges, specials, message", [
    ({b"a": 0}, [], None, "maps ids"),
    ({0: "a"}, [], None, "maps ids"),
    ({-1: b"a"}, [], None, "maps ids"),
    ({0: b"a", 1: b"a"}, [], None, "b'a' twice, as ids 0 and 1"),
    ({0: b"a", 1: b"b"}, [(b"a", b"b")], None, "b'ab' is not in the vocabulary"),
    ({0: b"a", 1: b"ab"}, [(b"a", b"b")], None, "b'b' is not in the vocabulary"),
    ({0: b"a", 1: b""}, [(b"a", b"")], None, "b'' is not in the vocabulary"),
    ({0: b"a"}, [], [""], "special token"),
    ({0: b"a"}, [], END, "list of strings"),
])
def test_parts_that_do_not_fit(vocab, merges, specials, message):
    with pytest.raises(ValueError, match=message): Tokenizer(vocab, merges, specials)


def test_bad_text_and_tokens():
    with pytest.raises(ValueError, match="U.D800"): plain.encode("a\ud800")
    with pytest.raises(ValueError, match="'nonsense' is not a token"): plain.token_to_id("nonsense")


# ---- in other libraries

def other_libraries_ids(tokenizer, text):
    "From tiktoken and tokenizers, given our tokenizer."
    pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    yield tokenizer.to_tiktoken().encode(text, allowed_special=set(tokenizer.special_tokens), disallowed_special=())
    yield tokenizer.to_huggingface().encode(text).ids


SHUFFLED = {id * 3 + 5: token for id, token in VOCAB.items()}  # ids with gaps, the special token in no special place
others = [plain, Tokenizer(SHUFFLED, MERGES, [END]), Tokenizer(VOCAB, MERGES, [END, "<|im start|>", "ab", "\n\n"])]


@settings(deadline=None, max_examples=60)
@given(shared, st.sampled_from(others))
def test_conversions_give_the_same_ids(text, tokenizer):
    text += "<|im start|>abc\n\n"
    for ids in other_libraries_ids(tokenizer, text): assert ids == tokenizer.encode(text)


def test_conversions_round_trip(tmp_path):
    text = SAMPLE + END + "naïve"
    for ids in other_libraries_ids(plain, text): assert plain.decode(ids) == text
    assert plain.to_tiktoken("mine").name == "mine" and plain.to_tiktoken().decode(plain.encode(text)) == text
    theirs = plain.to_huggingface()
    assert theirs.decode(plain.encode(text), skip_special_tokens=False) == text
    theirs.save(str(tmp_path / "tokenizer.json"))
    loaded = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(text).ids == plain.encode(text) and loaded.get_vocab_size() == plain.vocab_size


def test_longest_special_token_wins_at_hugging_face_and_tiktoken_is_refused():
    pytest.importorskip("tokenizers"), pytest.importorskip("tiktoken")
    tokenizer = Tokenizer(VOCAB, MERGES, [END, "<|a|>", "<|a|><|b|>"])
    text = "x<|a|><|b|><|a|> <|a|><|"
    assert tokenizer.to_huggingface().encode(text).ids == tokenizer.encode(text)
    with pytest.raises(ValueError, match="begins"): tokenizer.to_tiktoken()


def test_a_special_token_that_was_not_named_stays_text():
    pytest.importorskip("tiktoken")
    tokenizer = Tokenizer(VOCAB, MERGES)
    assert tokenizer.to_tiktoken().encode(END, disallowed_special=()) == tokenizer.encode(END)
    assert tokenizer.to_tiktoken().decode([VOCAB_IDS[END.encode()]]) == END


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("tokens, merges, specials, message", [
    ([*BYTES, b"bc", b"ab", b"abc"], [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")], [], "b'abc' never comes up"),
    ([*BYTES, b"bc", b"ab"], [(b"a", b"b"), (b"b", b"c")], [], "larger than that of"),
    ([*BYTES[1:], b"ab"], [(b"a", b"b")], [], r"byte b'\\x00' is not in the vocabulary"),
    ([*BYTES, b"\xc3("], [], [], "it is no text"),
    (BYTES, [], ["<", "<|"], "begins"),
])
def test_tiktoken_is_refused_where_its_ids_would_differ(tokens, merges, specials, message):
    pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match=message): Tokenizer(dict(enumerate(tokens)), merges, specials).to_tiktoken()


def test_hugging_face_is_refused_where_it_could_not_tell_tokens_apart():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="is how the files write the token"):
        Tokenizer(VOCAB, MERGES, ["é"]).to_huggingface()
    with pytest.raises(ValueError, match="not in the vocabulary"): Tokenizer({0: b"a"}, []).to_huggingface()


def join_by_bytes(word, ids):
    parts = [word[i:i + 1] for i in range(len(word))]
    while found := [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]:
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(12)), st.lists(st.text(alphabet="ab", max_size=12), min_size=8, max_size=8))
def test_a_list_that_is_let_through_joins_by_bytes(order, words):
    "Whatever the order of merges: refused, or the same tokens by the other library's rule."
    pairs = [(a.encode(), b.encode()) for a in ("a", "b", "ab", "aa") for b in ("a", "b", "ba")]
    merges = []
    for k in order:  # only lists a training could write: parts before wholes
        made = {b"a", b"b"} | {x + y for x, y in merges}
        if set(pairs[k]) <= made and pairs[k][0] + pairs[k][1] not in made: merges.append(pairs[k])
    tokenizer = Tokenizer(dict(enumerate([*BYTES, *(x + y for x, y in merges)])), merges)
    try: ids = chapter.mergeable_ranks(tokenizer)
    except ValueError: return
    for word in words: assert join_by_bytes(word.encode(), ids) == merge_by_rank(word.encode(), tokenizer._ranks)


def test_conversions_without_the_libraries(monkeypatch):
    for name, convert in (("tiktoken", plain.to_tiktoken), ("tokenizers", plain.to_huggingface)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"pip install {name}"): convert()


# ---- the view

class Parsed(HTMLParser):
    "What a browser would make of a page: elements with their attributes, and the text of each span."

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.shown = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "span": self.shown.append("")

    def handle_data(self, data): self.shown[-1] += data
    def handle_comment(self, data): raise AssertionError(data)
    def handle_decl(self, data): raise AssertionError(data)
    def unknown_decl(self, data): raise AssertionError(data)
    def handle_pi(self, data): raise AssertionError(data)


hostile = st.lists(st.sampled_from(["<script>alert(1)</script>",
    '"', "'", "><img src=x onerror=alert(1)>", "</span>", "<!--",
    "-->", "&lt;", "&#60;", "&", "\x00", "\u202e", "\ud7ff", "<![CDATA[", "<?x", "$a$", "`", "</div>", "\n", END, "é"]),
    max_size=12).map("".join)


@quick
@given(st.one_of(hostile, tricky))
def test_no_text_injects_markup(text):
    for tokenizer in (plain, nested):
        view, ids = tokenizer.show(text), tokenizer.encode(text)
        page = Parsed(view._repr_html_())
        tokens = [tokenizer.vocab[id] for id in ids]
        assert [tag for tag, _ in page.elements if tag != "br"] == ["div"] + ["span"] * len(ids)
        assert all(set(about) <= {"class", "style", "title"} for _, about in page.elements)
        assert page.shown == [chapter.visible(token) for token in tokens]
        titles = [about["title"] for tag, about in page.elements if tag == "span"]
        assert titles == [f"id {id}: {token!r}" for id, token in zip(ids, tokens)]
        assert repr(view) == "|".join(page.shown) and all(char.isprintable() for char in repr(view))


def test_view_is_limited_and_shows_halves_of_characters():
    view = plain.show("a\tb é" * 50, limit=3)
    assert view.left_out == len(plain.encode("a\tb é" * 50)) - 3
    assert f"and {view.left_out:,} more" in repr(view) and "more tokens" in view._repr_html_()
    bare = Tokenizer(dict(enumerate(BYTES)), [])
    assert repr(bare.show("é\n")) == r"\xc3|\xa9|\n" and bare.show("é\n")._repr_html_().count("<br>") == 1
    assert repr(bare.show("")) == ""


# ---- ordinary mistakes

@pytest.mark.parametrize("call, kind, message", [
    (lambda: plain.encode(b"the"), TypeError, "str, not bytes: decode"), (lambda: plain.encode(["the"]), TypeError, "str, not list"),
    (lambda: plain.encode_batch("the"), TypeError, "list of texts"), (lambda: list(plain.encode_iterable(["abc"], block_chars=0)), ValueError, "at least 1, not 0"),
    (lambda: list(plain.encode_iterable(["abc"], block_chars=-5)), ValueError, "at least 1, not -5"),
    (lambda: plain.decode(5), TypeError, r"write \[5\]"), (lambda: plain.decode(np.array(5)), TypeError, "flat list"),
    (lambda: plain.decode(np.zeros((200, 2), int)), ValueError, "row by row"), (lambda: plain.decode_bytes([[1], [2]]), ValueError, "row by row"),
    (lambda: Tokenizer(VOCAB, MERGES, ["\ud800"]), ValueError, "lone surrogate")])
def test_mistakes_are_told(call, kind, message):
    with pytest.raises(kind, match=message): call()


def test_an_empty_token_does_not_go_to_tiktoken():
    pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match="empty token, id"): Tokenizer(VOCAB | {len(VOCAB): b""}, MERGES).to_tiktoken()


def test_special_tokens_that_a_file_writes_as_they_are(tmp_path):
    plain.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocab["‹début>"] = vocab["<é>"] = None
    for number, name in enumerate(("‹début>", "<é>"), start=len(VOCAB)): vocab[name] = number
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    made = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", ["‹début>", "<é>"])
    assert made.encode("‹début>a<é>") == [len(VOCAB), plain.token_to_id(b"a"), len(VOCAB) + 1] and made.vocab_size == len(VOCAB) + 2


def test_a_folder_that_was_not_finished_is_refused(tmp_path, monkeypatch):
    original, written = chapter.write_aside, []
    def breaks(path, mode="wb"):
        if len(written) == 3: raise KeyboardInterrupt
        written.append(path.name)
        return original(path, mode)
    monkeypatch.setattr(chapter, "write_aside", breaks)
    with pytest.raises(KeyboardInterrupt): Tokenizer(VOCAB, MERGES, [END]).save(tmp_path)
    assert written[0] == "special_tokens.json"
    with pytest.raises(ValueError, match="not a whole tokenizer.*Save the tokenizer again"): Tokenizer.load(tmp_path)
