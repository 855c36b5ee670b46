"Chapter 03: pieces against Hugging Face's pre-tokenizer, cuts and counts against the whole text, faults."
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import pretokenization
from cs336_lm.pretokenization import (count_pretokens, is_safe_cut, kinds_part, pretokenize, read_chunks,
                                      read_text, split_special)

settings.register_profile("book", deadline=None)
settings.load_profile("book")

# Characters that have been assigned since Unicode 3.2: on these all libraries' tables agree, whatever their age.
OLD = st.characters(exclude_categories=("Cs", "Cn")).filter(lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn")
# Few characters, so that contractions, runs of spaces and special tokens come up all the time.
DENSE = st.text(st.sampled_from("aslvert'1½ \n\t\u3000!|<>é日。😀\u0301"), max_size=40)
TEXT = st.one_of(DENSE, st.text(OLD, max_size=40))
# With each token often one that begins with it, so that the longest has something to win.
SPECIALS = st.lists(st.text(st.sampled_from("<|> a's"), min_size=1, max_size=4), max_size=3).flatmap(
    lambda tokens: st.sampled_from([tokens, tokens + [t + t for t in tokens], tokens + [t + "a" for t in tokens]]))


def split_by_hand(text, special_tokens):
    "At each place the longest special token that stands there, else one more character of ordinary text."
    parts, i = [], 0
    while i < len(text):
        token = max((t for t in special_tokens if text.startswith(t, i)), key=len, default=None)
        if token: parts.append((token, True))
        elif parts and not parts[-1][1]: parts[-1] = (parts[-1][0] + text[i], False)
        else: parts.append((text[i], False))
        i += len(token or text[i])
    return parts


def whole_counts(text, special_tokens):
    counts = Counter()
    for part, special in split_by_hand(text, special_tokens):
        if not special: counts.update(pretokenization.regex.findall(pretokenization.PATTERN, part))
    return Counter({piece.encode(): n for piece, n in counts.items()})


@given(TEXT)
@settings(max_examples=400)
def test_pieces_are_those_of_hugging_face(text):
    ByteLevel = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel
    theirs = [text[a:b] for _, (a, b) in ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str(text)]
    assert list(pretokenize(text)) == theirs


def test_pieces_of_each_old_character_between_others():
    ByteLevel = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel
    theirs = ByteLevel(add_prefix_space=False, use_regex=True)
    for code in range(0, 0x30000, 7):
        if unicodedata.ucd_3_2_0.category(chr(code)) in ("Cn", "Cs", "Co"): continue
        text = f"a{chr(code)}1 {chr(code)}!{chr(code)}"
        assert list(pretokenize(text)) == [text[a:b] for _, (a, b) in theirs.pre_tokenize_str(text)], hex(code)


@given(st.text())
def test_pieces_join_to_the_text(text): assert "".join(pretokenize(text)) == text


@given(TEXT, SPECIALS)
@settings(max_examples=300)
def test_split_special_by_hand(text, specials):
    parts = list(split_special(text, specials))
    assert parts == split_by_hand(text, specials)
    assert "".join(part for part, _ in parts) == text


def test_the_longest_special_token_wins():
    for specials in (["<e>", "<e><e>"], ["<e><e>", "<e>"]):
        assert list(split_special("a<e><e><e>", specials)) == [("a", False), ("<e><e>", True), ("<e>", True)]


@given(TEXT, TEXT)
@settings(max_examples=500)
def test_where_kinds_part_a_cut_changes_nothing(left, right):
    if left and right and kinds_part(left[-1], right[0]):
        assert [*pretokenize(left), *pretokenize(right)] == list(pretokenize(left + right))


@given(DENSE, SPECIALS)
@settings(max_examples=500)
def test_safe_cuts_keep_the_counts(text, specials):
    for cut in range(1, len(text)):
        if is_safe_cut(text, cut, specials):
            left, right = whole_counts(text[:cut], specials), whole_counts(text[cut:], specials)
            assert left + right == whole_counts(text, specials)


@given(TEXT, SPECIALS, st.integers(1, 30))
@settings(max_examples=300)
def test_counts_of_a_file_do_not_depend_on_chunks(tmp_path_factory, text, specials, chunk_bytes):
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(text.encode())
    assert count_pretokens(path, specials, chunk_bytes=chunk_bytes) == whole_counts(text, specials)


def test_chunks_stay_small_with_and_without_special_tokens(tmp_path):
    path = tmp_path / "text.txt"
    texts = "many words, no token at all. " * 3000, "<|endoftext|>" * 5000, "一二三，四五六。" * 5000, "word\n" * 9000
    for text in texts:
        path.write_text(text, encoding="utf-8")
        assert max(len(c.encode()) for c in read_chunks(path, ["<|endoftext|>"], 4096)) < 3 * 4096


def test_a_text_without_any_safe_place_is_one_chunk(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 20_000)
    assert list(read_chunks(path, [], 512)) == ["a" * 20_000]


def test_processes_give_the_same_counts_in_the_same_order(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"word{i % 700} isn't {i}<|endoftext|>\n" for i in range(4000)), encoding="utf-8")
    one = count_pretokens(path, ["<|endoftext|>"])
    monkeypatch.setattr(pretokenization, "MIN_PARALLEL_BYTES", 0)
    two = count_pretokens(path, ["<|endoftext|>"], num_processes=2, chunk_bytes=10_000)
    assert one == two and list(one) == list(two)


def test_a_small_file_starts_no_process(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("a few words")
    monkeypatch.setattr(pretokenization, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("a process was started"))
    assert count_pretokens(path, [], num_processes=8)[b" words"] == 1


def test_an_error_in_the_file_ends_the_processes_too(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"good words " * 1000 + b"\xff" + b" more" * 1000)
    monkeypatch.setattr(pretokenization, "MIN_PARALLEL_BYTES", 0)
    with pytest.raises(ValueError, match="at byte 11,000"): count_pretokens(path, [], num_processes=2, chunk_bytes=1000)


ODD_BYTES = st.lists(st.sampled_from(["é".encode(), b"a ", b"\xe3\x80", b"\xff", "😀".encode()])).map(b"".join)


@given(st.binary(max_size=40) | ODD_BYTES, st.integers(1, 9))
@settings(max_examples=400)
def test_invalid_utf8_is_named_with_its_place(tmp_path_factory, data, block_bytes):
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    path.write_bytes(data)
    try: expected = data.decode()
    except UnicodeDecodeError as error:
        message = f"bytes.txt is not UTF-8.*at byte {error.start:,};"
        with pytest.raises(ValueError, match=message): list(read_text(path, block_bytes))
    else: assert "".join(read_text(path, block_bytes)) == expected


def test_line_ends_and_byte_order_mark_are_kept(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree".encode())
    assert count_pretokens(path, []) == whole_counts("\ufeffone\r\ntwo\rthree", [])


def test_faults(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert count_pretokens(empty, ["<|endoftext|>"]) == {}
    empty.write_text("<|endoftext|>" * 3)
    assert count_pretokens(empty, ["<|endoftext|>"]) == {}
    with pytest.raises(FileNotFoundError, match="no.txt"): count_pretokens(tmp_path / "no.txt", [])
    with pytest.raises(OSError): count_pretokens(tmp_path, [])
    for wrong in ("<|endoftext|>", [""], [b"<|endoftext|>"]):
        with pytest.raises(ValueError): count_pretokens(empty, wrong)
    with pytest.raises(ValueError, match="num_processes"): count_pretokens(empty, [], num_processes=0)
    with pytest.raises(ValueError, match="chunk_bytes"): count_pretokens(empty, [], chunk_bytes=0)


def test_progress_reaches_the_end(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("å few words " * 1000, encoding="utf-8")
    count_pretokens(path, [], progress=True)
    assert "100%" in capsys.readouterr().err
    count_pretokens(path, [])
    assert capsys.readouterr().err == ""
