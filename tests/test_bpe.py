"Chapter 04: merges against the clear version, an oracle by text replacement, and Hugging Face's trainer; faults."
import json
import re
import subprocess
import sys
import warnings
from collections import Counter

import pytest
from hypothesis import assume, given, settings, strategies as st

from cs336_lm.bpe import (PairTable, count_pairs, descending_key, merge_in_table, merge_pair, train_bpe,
                          train_bpe_from_counts, train_bpe_naive)

settings.register_profile("book", deadline=None)
settings.load_profile("book")

HANDOUT = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
SPECIAL = "<|endoftext|>"
# Two letters make runs and ties; any bytes make everything else.
def words_of(letters): return st.lists(st.sampled_from(letters), min_size=1, max_size=10).map(bytes)


COUNTS = st.one_of(st.dictionaries(words_of(b"ab"), st.integers(1, 3), max_size=8),
                   st.dictionaries(words_of(b"abcd \xc3\xa9\xff\x00"), st.integers(1, 9), max_size=12),
                   st.dictionaries(st.binary(min_size=1, max_size=12), st.integers(1, 5), max_size=10))


@pytest.fixture(autouse=True)
def _allow_small_texts():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text has no more pairs")
        yield


def test_handout_example():
    listed = "s t, e st, o w, l ow, w est, n e, ne west, w i, wi d, wid est, low e, lowe r"
    expected = [tuple(merge.encode().split()) for merge in listed.split(", ")]
    for train in (train_bpe_naive, train_bpe_from_counts): assert train(HANDOUT, 256 + 12)[1] == expected


@given(COUNTS, st.integers(0, 60))
@settings(max_examples=500)
def test_quick_equals_naive(counts, num_merges):
    assert train_bpe_from_counts(counts, 256 + num_merges) == train_bpe_naive(counts, 256 + num_merges)


def merges_by_replacement(counts, num_merges):
    "BPE on hex digits with text replacement, as Sennrich et al. have it: shares nothing with the module."
    text = {" ".join(f"{b:02x}" for b in word): n for word, n in counts.items()}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for word, n in text.items():
            symbols = word.split()
            for pair in zip(symbols, symbols[1:]): pairs[pair] += n
        if not pairs: break
        top = max(pairs.values())
        a, b = max((bytes.fromhex(a), bytes.fromhex(b)) for (a, b), n in pairs.items() if n == top)
        merges.append((a, b))
        text = {re.sub(rf"(?<!\S){a.hex()} {b.hex()}(?!\S)", a.hex() + b.hex(), word): n for word, n in text.items()}
    return merges


@given(COUNTS)
@settings(max_examples=200)
def test_against_replacement_in_text(counts):
    assert train_bpe_from_counts(counts, 256 + 40)[1] == merges_by_replacement(counts, 40)


@given(COUNTS)
def test_properties_of_a_vocabulary(counts):
    vocab, merges = train_bpe_from_counts(counts, 256 + 40 + 1, [SPECIAL])
    assert list(vocab) == list(range(len(vocab))) and len(vocab) == 256 + len(merges) + 1
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [vocab[256 + k] for k in range(len(merges))] == [a + b for a, b in merges]
    assert vocab[len(vocab) - 1] == SPECIAL.encode() and len(set(vocab.values())) == len(vocab)
    # A shorter training is the beginning of a longer one.
    assert train_bpe_from_counts(counts, 256 + 10)[1] == merges[:10]


@given(COUNTS, st.integers(1, 30))
def test_table_is_kept_up_to_date(counts, num_merges):
    "After any merges the kept counts are those of a fresh count, every place is indexed, and old pairs' counts fell."
    table, ids = PairTable(counts), {bytes([b]): b for b in range(256)}
    for a, b in train_bpe_from_counts(counts, 256 + num_merges)[1]:
        before = dict(table.counts)
        ids[a + b] = new = len(ids)
        born = merge_in_table(table, (ids[a], ids[b]), new)
        fresh = Counter()
        for word, n in zip(table.words, table.weights):
            for pair in zip(word, word[1:]): fresh[pair] += n
        assert {p: n for p, n in table.counts.items() if n} == fresh
        assert all(w in table.places[p] for w, word in enumerate(table.words) for p in zip(word, word[1:]))
        assert all(n <= before[p] for p, n in table.counts.items() if p not in born)


@given(st.lists(st.binary(max_size=6)))
def test_descending_key_turns_the_order_round(strings):
    assert sorted(strings, key=descending_key) == sorted(strings, reverse=True)


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(0, 2), st.integers(0, 2))
def test_merge_pair_against_text(word, a, b):
    assert "".join(map(str, merge_pair(word, (a, b), "x"))) == "".join(map(str, word)).replace(f"{a}{b}", "x")


# -- Hugging Face's trainer. Among equal counts it takes the pair of smallest ids, not of the greatest strings, so the
# -- two may part at the first tie: up to there every merge must be the same, and without ties all of them.

def first_tie(counts, num_merges):
    "How many merges are made before one is chosen among equals."
    words = {tuple(bytes([b]) for b in word): n for word, n in counts.items()}
    for done in range(num_merges):
        pairs = count_pairs(words).most_common(2)
        if not pairs or len(pairs) == 2 and pairs[0][1] == pairs[1][1]: return done
        pair = pairs[0][0]
        words = {tuple(merge_pair(w, pair, pair[0] + pair[1])): n for w, n in words.items()}
    return num_merges


def hugging_face_merges(text, num_merges):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + num_merges, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    decode = tokenizers.decoders.ByteLevel()  # from its printable alphabet back to bytes; only ASCII text is used here
    return [tuple(decode.decode([part]).encode() for part in merge) for merge in merges]


def text_of(counts): return "\n".join(word.decode() for word, n in counts.items() for _ in range(n))


WORDS = st.lists(st.sampled_from(b"abcde"), min_size=1, max_size=7).map(bytes)


@given(st.dictionaries(WORDS, st.integers(1, 200), min_size=2, max_size=8))
@settings(max_examples=60)
def test_hugging_face_agrees_until_the_first_tie(counts):
    same = first_tie(counts, 12)
    assume(same >= 2)
    assert hugging_face_merges(text_of(counts), 12)[:same] == train_bpe_from_counts(counts, 256 + 12)[1][:same]


def test_hugging_face_agrees_on_a_text_without_ties(tmp_path):
    "Letters k of a chain occur 3^k times more often, so no two pairs ever have the same count."
    counts = {bytes([97 + k, 98 + k]): 3 ** k for k in range(8)}
    path = tmp_path / "text.txt"
    path.write_text(text_of(counts))
    assert first_tie(counts, 8) == 8
    assert train_bpe(path, 264, [])[1] == hugging_face_merges(path.read_text(), 8) == train_bpe_naive(counts, 264)[1]


# -- files

def test_special_tokens_take_no_part(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(f"end of text{SPECIAL}end of text{SPECIAL}" * 20)
    vocab, merges = train_bpe(path, 280, [SPECIAL, "<|pad|>"])
    with_plain = train_bpe_naive(Counter({b"end": 40, b" of": 40, b" text": 40}), 278)
    assert merges == with_plain[1] and not any(b"<|" in a + b for a, b in merges)
    assert list(vocab.values())[-2:] == [SPECIAL.encode(), b"<|pad|>"]


def test_result_does_not_depend_on_processes(tmp_path, monkeypatch):
    from cs336_lm import pretokenization
    path = tmp_path / "text.txt"
    path.write_text("".join(f"word{i % 300} isn't {i}\n" for i in range(30_000)))
    one = train_bpe(path, 600, [SPECIAL])
    monkeypatch.setattr(pretokenization, "MIN_PARALLEL_BYTES", 0)
    assert train_bpe(str(path), 600, [SPECIAL], num_processes=2) == one


def test_too_small_a_text_warns(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab")
    with pytest.warns(UserWarning, match="257 entries, not 1,000"): vocab, merges = train_bpe(path, 1000, [])
    assert merges == [(b"a", b"b")] and len(vocab) == 257
    path.write_text(SPECIAL)
    with pytest.warns(UserWarning, match="257 entries"): assert train_bpe(path, 300, [SPECIAL])[1] == []


def test_faults(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text")
    for args, message in (((10, []), "vocab_size 10 is too small.*256"), ((256, [SPECIAL]), "at least 257"),
                          ((300, [SPECIAL, SPECIAL]), "more than once"), ((300, SPECIAL), "list of strings"),
                          ((300, [""]), "special token"), ((300, ["a"]), "one byte"), ((300.0, []), "whole number"),
                          (("300", []), "whole number")):
        with pytest.raises(ValueError, match=message): train_bpe(path, *args)
    with pytest.raises(FileNotFoundError, match="no.txt"): train_bpe(tmp_path / "no.txt", 300, [])
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="text.txt is empty"): train_bpe(path, 300, [])
    path.write_bytes(b"a" * 5000 + b"\xff")
    with pytest.raises(ValueError, match="text.txt is not UTF-8.*byte 5,000"): train_bpe(path, 300, [])


def test_smallest_vocabulary_is_the_bytes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text")
    assert train_bpe(path, 257, [SPECIAL]) == ({b: bytes([b]) for b in range(256)} | {256: SPECIAL.encode()}, [])


def test_progress_is_shown_only_if_wanted(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("some more text " * 50)
    train_bpe(path, 260, [], progress=True)
    assert "learn merges" in capsys.readouterr().err
    train_bpe(path, 260, [])
    assert capsys.readouterr().err == ""


def test_training_imports_no_torch(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some more text " * 50)
    code = f"import sys, cs336_lm.bpe as b; b.train_bpe({str(path)!r}, 260, []); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
