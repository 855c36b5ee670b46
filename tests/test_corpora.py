"Documents, files written whole, the split of any text, and downloads from a server that does everything wrong."
import gzip, hashlib, io, os, random, re, stat, subprocess, sys, threading, time, warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import corpora
from cs336_lm.corpora import (END_OF_TEXT, Corpus, corpus_names, data_dir, describe_file, download, fetch_file, find_corpus,
                              gunzip, read_documents, read_pieces, split_text_file, write_aside)

ODD_TEXT = st.text(st.sampled_from("ab<|endoftext|> \n\té猫🏃\x00\u2028"), max_size=60)


# ---------------------------------------------------------------- documents

@settings(deadline=None, max_examples=150)
@given(parts=st.lists(ODD_TEXT, max_size=5), size=st.integers(1, 50))
def test_pieces_are_those_of_split_whatever_the_chunks(parts, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "t.txt"
    data = END_OF_TEXT.join(parts).encode()
    path.write_bytes(data)
    found = list(read_pieces(path, END_OF_TEXT.encode(), size))
    assert [p for _, p in found] == data.split(END_OF_TEXT.encode())
    assert all(data[o:o + len(p)] == p for o, p in found)
    assert list(read_documents(path)) == [p.decode() for _, p in found if p.strip()]


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=40).map(lambda b: bytes(x % 3 + 97 for x in b)), sep=st.sampled_from([b"a", b"aa", b"aba", b"abab"]),
       size=st.integers(1, 9))
def test_separators_that_overlap_themselves(data, sep, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("overlap") / "t"
    path.write_bytes(data)
    assert [p for _, p in read_pieces(path, sep, size)] == data.split(sep)


def test_reading_holds_one_document_not_the_file(tmp_path):
    path = tmp_path / "big.txt"
    with open(path, "wb") as f:
        for n in range(3000): f.write(b"word " * 2000 + END_OF_TEXT.encode())
    code = ("import sys, tracemalloc; from cs336_lm.corpora import read_documents, describe_file\n"
            "tracemalloc.start(); n = sum(1 for _ in read_documents(sys.argv[1])); describe_file(sys.argv[1])\n"
            "print(n, tracemalloc.get_traced_memory()[1])")
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 3000 and int(out[1]) < 8e6 < path.stat().st_size


def test_a_long_document_without_separator_is_read_in_linear_time(tmp_path):
    class Counting(bytearray):
        looked = 0
        def find(self, what, start=0):
            Counting.looked += len(self) - start
            return super().find(what, start)
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * 200_000)
    original, corpora.bytearray = bytearray, Counting
    try: assert [len(p) for _, p in read_pieces(path, b"<sep>", 1000)] == [200_000]
    finally: del corpora.bytearray
    assert original is bytearray and Counting.looked < 2 * 200_000


@pytest.mark.parametrize("before, bad", [(b"abc", b"\xff"), ("é猫".encode() + END_OF_TEXT.encode() + b"x", b"\xed\xa0\x80"), (b"", b"\xc3")])
def test_invalid_utf8_is_named_with_its_offset(tmp_path, before, bad):
    path = tmp_path / "bad.txt"
    path.write_bytes(before + bad)
    with pytest.raises(ValueError, match=rf"bad\.txt.* 0x{bad[0]:02x} at offset {len(before)} "): list(read_documents(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError): list(read_documents(tmp_path / "none.txt"))
    with pytest.raises(IsADirectoryError): list(read_documents(tmp_path))
    with pytest.raises(ValueError, match="separator"): list(read_documents(tmp_path / "none.txt", ""))


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(ODD_TEXT, max_size=4))
def test_describe_file_equals_hashlib_and_counting(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("described") / "t.txt"
    data = END_OF_TEXT.join(parts).encode()
    path.write_bytes(data)
    assert describe_file(path, "mine") == {"name": "mine", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
                                           "documents": sum(1 for p in data.split(END_OF_TEXT.encode()) if p.strip())}
    assert describe_file(path)["name"] == "t.txt"


def test_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("CS336_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("CS336_DATA", "")
    assert data_dir() == Path("data")
    monkeypatch.setenv("CS336_DATA", "~/texts")
    assert data_dir() == Path.home() / "texts"


def test_importing_is_light():
    code = "import sys, cs336_lm.corpora; print([m for m in ('torch', 'numpy', 'tyro', 'matplotlib', 'tqdm', 'nbdev') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- write_aside

def test_write_aside_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "deep" / "a.bin"
    with write_aside(path) as f:
        f.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), write_aside(path) as f:
        f.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    with write_aside(path, "w") as f: f.write("é\n")
    assert path.read_bytes() == "é\n".encode()


def test_write_aside_syncs_before_it_renames(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync " + ("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with write_aside(tmp_path / "a") as f: f.write(b"x")
    assert done == ["sync file", "rename", "sync folder"]


def test_write_aside_keeps_links_and_permissions_and_honours_the_umask(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with write_aside(link, "w") as f: f.write("new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    old = os.umask(0o027)
    try:
        with write_aside(tmp_path / "fresh", "w") as f: f.write("x")
    finally: os.umask(old)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


def test_write_aside_refuses_what_a_rename_cannot_replace(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"), write_aside(tmp_path): pass
    with pytest.raises(OSError, match="regular"), write_aside("/dev/null"): pass
    with pytest.raises(ValueError, match="mode"), write_aside(tmp_path / "a", "ab"): pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), write_aside(tmp_path / "file" / "below"): pass


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "shared"
    def write(letter):
        for _ in range(20):
            with write_aside(path) as f: f.write(letter * 50_000)
    threads = [threading.Thread(target=write, args=(c,)) for c in (b"a", b"b", b"c")]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(path.read_bytes())) == 1 and path.stat().st_size == 50_000 and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- any text file

def sides(corpus): return [[d.strip() for d in read_documents(p)] for p in (corpus.train, corpus.valid)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<\ufeff"), min_size=1).filter(lambda s: s.encode().strip()),
                min_size=2, max_size=40))
def test_split_of_documents_loses_nothing_and_leaks_nothing(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("split")
    (folder / "my.txt").write_text(END_OF_TEXT.join(documents), encoding="utf-8", newline="")
    kept = [d.encode().strip() for d in documents]
    if len(set(kept)) < 2:
        with pytest.raises(ValueError, match="one document"): split_text_file(folder / "my.txt", folder)
        return
    corpus = split_text_file(folder / "my.txt", folder)
    train, valid = ([p.strip() for _, p in read_pieces(path, END_OF_TEXT.encode()) if p.strip()] for path in (corpus.train, corpus.valid))
    assert train and valid and not set(train) & set(valid)
    assert sorted(train + valid) == sorted(kept)


def test_side_of_a_document_depends_on_its_text_alone(tmp_path):
    documents = [f"document {n} " + "word " * (n % 7) for n in range(300)]
    shuffled = random.Random(0).sample(documents, 300)
    for name, docs in (("a.txt", documents), ("b.txt", shuffled)): (tmp_path / name).write_text(END_OF_TEXT.join(docs))
    a, b = (sides(split_text_file(tmp_path / name, tmp_path)) for name in ("a.txt", "b.txt"))
    assert set(a[1]) == set(b[1]) and a[1] != b[1]
    share = sum(map(len, a[1])) / sum(map(len, a[0] + a[1]))
    assert 0.09 < share < 0.12


def test_running_text_is_held_out_at_the_end(tmp_path):
    for newline in ("\n", "\r\n"):
        book = (2 * newline).join(f"{n} " + "lorem ipsum " * 60 for n in range(50)) + newline
        (tmp_path / "book.txt").write_bytes(book.encode())
        train, valid = sides(split_text_file(tmp_path / "book.txt", tmp_path))
        assert [int(d.split()[0]) for d in train + valid] == list(range(50)) and 4 <= len(valid) <= 6


def test_short_paragraphs_stay_together_and_lines_stand_in_for_them(tmp_path):
    (tmp_path / "play.txt").write_text("\n\n".join(f"SPEAKER {n}:\nIndeed, my lord." for n in range(400)))
    train, valid = sides(split_text_file(tmp_path / "play.txt", tmp_path))
    assert all(500 <= len(d) < 600 for d in train) and "\n\n".join(train + valid).count("SPEAKER") == 400
    (tmp_path / "lines.txt").write_text("\n".join(f"line {n} of a file without blank lines" for n in range(400)))
    train, valid = sides(split_text_file(tmp_path / "lines.txt", tmp_path))
    assert len(train) > 10 and "\n".join(train + valid).count("line ") == 400
    (tmp_path / "two.txt").write_text("one\ntwo")
    assert sides(split_text_file(tmp_path / "two.txt", tmp_path)) == [["one"], ["two"]]


def test_split_is_done_once_and_again_when_the_text_changes(tmp_path):
    (tmp_path / "t.txt").write_text(f"\ufeffone{END_OF_TEXT}two{END_OF_TEXT}three", encoding="utf-8")
    first = split_text_file(tmp_path / "t.txt", tmp_path / "out")
    assert "\ufeff" not in first.train.read_text() + first.valid.read_text()
    stamp = first.train.stat().st_mtime_ns
    assert split_text_file(tmp_path / "t.txt", tmp_path / "out") == first and first.train.stat().st_mtime_ns == stamp
    first.valid.unlink()
    assert split_text_file(tmp_path / "t.txt", tmp_path / "out").valid.is_file()
    (tmp_path / "t.txt").write_text(f"one{END_OF_TEXT}two{END_OF_TEXT}four", encoding="utf-8")
    assert split_text_file(tmp_path / "t.txt", tmp_path / "out").train != first.train


@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b" \n\t\n", "empty"), (END_OF_TEXT.encode() * 3, "empty"), (b"one line", "one line"),
    (b"one" + END_OF_TEXT.encode() + b"\n", "one line"), (b"one" + END_OF_TEXT.encode() + b" one ", "one document"),
    ("a\nb".encode("utf-16"), "0xff at offset 0"), (b"a\nb\xe9\nc", "0xe9 at offset 3"), (b"a\n\0b\nc", "NUL byte at offset 2")])
def test_what_cannot_be_split_says_why_and_writes_nothing(tmp_path, content, said):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error: split_text_file(tmp_path / "bad.txt", tmp_path / "out")
    assert "bad.txt" in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- find_corpus

def test_find_corpus_by_name_path_and_registration(tmp_path, monkeypatch):
    monkeypatch.setenv("CS336_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cs336 data download owt"): find_corpus("owt")
    with pytest.raises(FileNotFoundError, match="corpora: .*tinystories-9MB"): find_corpus("tinystoris")
    with pytest.raises(IsADirectoryError): find_corpus(tmp_path)
    for name in ("tinystories_train.txt", "tinystories_valid.txt"): (tmp_path / name).write_text("x")
    assert find_corpus("tinystories-9MB") == Corpus("tinystories-9MB", tmp_path / "tinystories_train.txt", tmp_path / "tinystories_valid.txt")
    (tmp_path / "my.txt").write_text("one\ntwo\nthree")
    assert find_corpus("my.txt").name == "my" and find_corpus(tmp_path / "my.txt", tmp_path / "x").train.parent == tmp_path / "x"
    monkeypatch.setitem(corpora.GENERATED, "made", lambda folder: Corpus("made", folder / "a", folder / "b"))
    assert find_corpus("made").train == tmp_path / "a" and "made" in corpus_names()


def test_numbered_parts_are_joined_between_documents(tmp_path):
    (tmp_path / "web_valid.txt").write_text("held out")
    texts = [f"doc {n}" for n in range(12)]
    for n, text in enumerate(texts): (tmp_path / f"web_train_{n}.txt").write_text(text + (f"\n{END_OF_TEXT}\n" if n % 2 else ""))
    (tmp_path / "web_train_notes.txt").write_text("not a part")
    corpus = find_corpus("web-488MB", tmp_path)
    assert [d.strip() for d in read_documents(corpus.train)] == texts
    corpus.train.unlink()
    (tmp_path / "web_train_3.txt").unlink()
    with pytest.raises(FileNotFoundError, match="parts"): find_corpus("web-488MB", tmp_path)


# ---------------------------------------------------------------- downloads

class Site:
    "What the server has and how badly it behaves; it notes what it was asked."
    def __init__(self, body):
        self.body, self.etag, self.modified = body, '"v1"', None
        self.ranges = True           # serves ranges
        self.honours_if_range = True
        self.limit = None            # bytes a connection before it hangs up; None: all
        self.length = True           # announces Content-Length; a number: that one
        self.chunked = False
        self.sha256 = self.linked_size = None  # published on a redirect, as the hub does
        self.statuses = []           # answers of the next requests instead of the file
        self.content_type = "text/plain"
        self.asked = []
        self.on_request = lambda number: None


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        site = self.server.site
        if site.sha256 and not self.path.startswith("/storage"):
            self.send_response(302)
            self.send_header("Location", "/storage" + self.path)
            self.send_header("X-Linked-ETag", f'"{site.sha256}"')
            if site.linked_size is not None: self.send_header("X-Linked-Size", str(site.linked_size))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        site.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        site.on_request(len(site.asked))
        if site.statuses and (code := site.statuses.pop(0)):
            self.send_response(code)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_file(site)

    def send_file(self, site):
        start, wanted = 0, self.headers.get("Range")
        version = site.etag or site.modified
        unchanged = self.headers.get("If-Range") in (None, version) or not site.honours_if_range
        if wanted and site.ranges and unchanged: start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if start and start >= len(site.body):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", site.content_type)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
        if site.etag: self.send_header("ETag", site.etag)
        if site.modified: self.send_header("Last-Modified", site.modified)
        body = site.body[start:]
        sent = body if site.limit is None else body[:site.limit]
        if site.chunked: self.send_header("Transfer-Encoding", "chunked")
        elif site.length: self.send_header("Content-Length", str(len(body) if site.length is True else site.length - start))
        self.end_headers()
        try:
            if not site.chunked: return self.wfile.write(sent)
            for i in range(0, len(sent), 700): self.wfile.write(b"%x\r\n%s\r\n" % (len(sent[i:i + 700]), sent[i:i + 700]))
            if len(sent) == len(body): self.wfile.write(b"0\r\n\r\n")
        except OSError: pass  # the client has left


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.site = True, Site(TEXT)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


TEXT = b"".join(b"Story %d is about %d.\n<|endoftext|>\n" % (n, n * n % 991) for n in range(400))
QUICK = dict(progress=False, pause=0, timeout=5)


pytestmark = pytest.mark.filterwarnings("ignore:.*publishes no SHA-256")


def fetch(server, path, name="/file.txt", **options): return fetch_file(server.url + name, path, **{**QUICK, **options})


def left(folder): return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name, suffix", [("tinystories", ""), ("owt", ".gz")])
def test_download_official(server, tmp_path, name, suffix, monkeypatch):
    server.site.body = gzip.compress(TEXT) if suffix else TEXT
    monkeypatch.setenv("CS336_DOWNLOAD_URL", server.url + "/")
    corpus = download(name, tmp_path / "d", **QUICK)
    assert corpus.train.read_bytes() == corpus.valid.read_bytes() == TEXT and len(left(tmp_path / "d")) == 2
    assert find_corpus(name, tmp_path / "d") == corpus
    where = {"tinystories": "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
             "owt": "/datasets/stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz"}[name]
    assert (where, None, None) in server.site.asked
    asked = len(server.site.asked)
    download(name, tmp_path / "d", base_url="http://127.0.0.1:9", **QUICK)  # there already: nothing is asked
    assert len(server.site.asked) == asked


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("version", ["etag", "modified", "hash"])
@pytest.mark.parametrize("chunked", [False, True])
def test_every_connection_breaks_and_the_file_is_whole(server, tmp_path, gz, version, chunked):
    site, body = server.site, gzip.compress(TEXT) if gz else TEXT
    site.body, site.limit, site.chunked = body, len(body) // 5, chunked
    if version != "etag": site.etag = None
    if version == "modified": site.modified = "Mon, 02 Nov 2026 10:00:00 GMT"
    if version == "hash": site.sha256 = hashlib.sha256(body).hexdigest()
    checked = fetch(server, tmp_path / "f.txt", "/f.txt.gz" if gz else "/f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT and left(tmp_path) == ["f.txt"]
    assert len(site.asked) == -(-len(body) // site.limit) and checked["sha256"] == site.sha256


def test_a_gzip_member_resumes_in_the_middle_and_members_join(server, tmp_path):
    halves = TEXT[:7000], b"", TEXT[7000:]
    server.site.body = b"".join(gzip.compress(h) for h in halves) + bytes(20)  # gzip pads with zeros
    server.site.limit = 97
    fetch(server, tmp_path / "f.txt", "/f.txt.gz")
    assert (tmp_path / "f.txt").read_bytes() == TEXT


def test_a_later_program_goes_on_where_this_one_stopped(server, tmp_path):
    site = server.site
    site.limit, site.statuses = 3000, [None, 503, 503, 503]
    with pytest.raises(OSError, match="503.*run the same again"): fetch(server, tmp_path / "f.txt", tries=3)
    assert left(tmp_path) == ["f.txt.part", "f.txt.part.json"] and (tmp_path / "f.txt.part").read_bytes() == TEXT[:3000]
    site.limit = None
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT and site.asked[-1][1:] == ("bytes=3000-", '"v1"')


def test_ctrl_c_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    server.site.limit, server.site.body = 2000, gzip.compress(TEXT, 0)
    def pressed(seconds): raise KeyboardInterrupt
    monkeypatch.setattr(corpora.time, "sleep", pressed)
    with pytest.raises(KeyboardInterrupt): fetch(server, tmp_path / "f.txt", "/f.txt.gz")
    assert left(tmp_path) == ["f.txt.part", "f.txt.part.json"] and (tmp_path / "f.txt.part").stat().st_size == 2000
    monkeypatch.undo()
    server.site.limit = None
    fetch(server, tmp_path / "f.txt", "/f.txt.gz")
    assert (tmp_path / "f.txt").read_bytes() == TEXT and server.site.asked[-1][1] == "bytes=2000-"


@pytest.mark.parametrize("honours", [True, False])
@pytest.mark.parametrize("gz", [True, False])
def test_a_file_that_changed_meanwhile_starts_over(server, tmp_path, honours, gz):
    site, new = server.site, TEXT.replace(b"Story", b"Novel")
    pack = gzip.compress if gz else bytes
    site.body, site.honours_if_range = pack(TEXT), honours
    site.limit = len(site.body) // 5
    def change(number):
        if number == 3: site.body, site.etag, site.limit = pack(new), '"v2"', None
    site.on_request = change
    fetch(server, tmp_path / "f.txt", "/f.txt.gz" if gz else "/f.txt")
    assert (tmp_path / "f.txt").read_bytes() == new


def test_a_changed_hash_starts_over_even_where_the_version_is_the_same(server, tmp_path):
    site, new = server.site, TEXT.replace(b"Story", b"Novel")
    site.limit, site.sha256 = 1000, hashlib.sha256(TEXT).hexdigest()
    def change(number):
        if number == 2: site.body, site.sha256, site.limit = new, hashlib.sha256(new).hexdigest(), None
    site.on_request = change
    with pytest.raises(OSError, match="SHA-256"): fetch(server, tmp_path / "f.txt")  # the redirect of request 2 was old
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == new


def test_a_server_that_ignores_ranges(server, tmp_path):
    site = server.site
    site.ranges, site.limit = False, 1000
    with pytest.raises(OSError, match="broke off 3 times and cannot send the rest"): fetch(server, tmp_path / "f.txt", tries=3)
    def recover(number): site.limit = None
    site.on_request = recover
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT


def test_without_any_version_a_part_is_never_continued(server, tmp_path):
    site = server.site
    site.etag, site.limit = None, 1000
    def recover(number): site.limit = None if number == 3 else 1000
    site.on_request = recover
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT and all(r is None for _, r, _ in site.asked)
    site.etag = 'W/"weak"'
    site.asked.clear()
    fetch(server, tmp_path / "g.txt")
    assert (tmp_path / "g.txt").read_bytes() == TEXT and all(r is None for _, r, _ in site.asked)


def test_announced_more_than_there_is(server, tmp_path):
    server.site.length = len(TEXT) + 500
    with pytest.raises(OSError, match="f.txt"): fetch(server, tmp_path / "f.txt", tries=3)
    assert not (tmp_path / "f.txt").exists()


def test_announced_less_than_there_is(server, tmp_path):
    site = server.site
    site.length = len(TEXT) - 500  # nobody can notice from the outside, unless something is published
    site.sha256 = hashlib.sha256(TEXT).hexdigest()
    with pytest.raises(OSError, match="SHA-256.*removed"): fetch(server, tmp_path / "f.txt")
    site.linked_size = len(TEXT)
    with pytest.raises(OSError, match=f"{len(TEXT):,}"): fetch(server, tmp_path / "f.txt")
    site.sha256, site.body = None, gzip.compress(TEXT)
    site.length = len(site.body) - 4
    with pytest.raises(OSError, match="end in the middle"): fetch(server, tmp_path / "f.txt", "/f.gz")
    assert not (tmp_path / "f.txt").exists()


def test_corrupted_gzip_is_refused_and_not_resumed(server, tmp_path):
    good = gzip.compress(TEXT)
    (tmp_path / "f.txt").write_text("the old file")
    for place in (0, 1, len(good) // 2, len(good) - 6, len(good) - 2):
        server.site.body = good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1:]
        with pytest.raises(OSError, match="gzip.*removed"): fetch(server, tmp_path / "f.txt", "/f.gz")
        assert (tmp_path / "f.txt").read_text() == "the old file" and not (tmp_path / "f.txt.part").exists()
    server.site.body = good
    fetch(server, tmp_path / "f.txt", "/f.gz")
    assert (tmp_path / "f.txt").read_bytes() == TEXT


def test_what_could_not_be_checked_is_said(server, tmp_path, recwarn):
    with pytest.warns(UserWarning, match="f.txt.* no SHA-256; checked: size$"): fetch(server, tmp_path / "f.txt")
    server.site.body, server.site.chunked = gzip.compress(TEXT), True
    with pytest.warns(UserWarning, match="no SHA-256; checked: gzip checksum$"): fetch(server, tmp_path / "g.txt", "/g.gz")
    server.site.sha256 = hashlib.sha256(server.site.body).hexdigest()
    recwarn.clear()
    assert fetch(server, tmp_path / "h.txt", "/h.gz")["sha256"] and not recwarn.list


def test_a_damaged_byte_is_found_by_the_published_hash(server, tmp_path):
    server.site.sha256 = hashlib.sha256(TEXT).hexdigest()
    server.site.body = TEXT[:500] + b"X" + TEXT[501:]
    with pytest.raises(OSError, match="SHA-256.*removed"): fetch(server, tmp_path / "f.txt")
    assert not (tmp_path / "f.txt").exists() and not (tmp_path / "f.txt.part").exists()


def test_a_damaged_part_or_note_starts_over(server, tmp_path):
    (tmp_path / "f.txt.part").write_bytes(b"?" * 100)
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT
    (tmp_path / "g.txt.part").write_bytes(TEXT[:100])
    (tmp_path / "g.txt.part.json").write_text('{"size": 3, "who": ')
    fetch(server, tmp_path / "g.txt")
    (tmp_path / "h.txt.part").write_bytes(TEXT + b"too long")
    (tmp_path / "h.txt.part.json").write_text('{"size": %d, "version": "\\"v1\\"", "sha256": null}' % len(TEXT))
    fetch(server, tmp_path / "h.txt")
    assert (tmp_path / "g.txt").read_bytes() == (tmp_path / "h.txt").read_bytes() == TEXT


def test_a_complete_part_needs_no_server(tmp_path):
    (tmp_path / "f.txt.part").write_bytes(gzip.compress(TEXT))
    size = (tmp_path / "f.txt.part").stat().st_size
    (tmp_path / "f.txt.part.json").write_text('{"size": %d, "version": "\\"v1\\"", "sha256": null}' % size)
    fetch_file("http://127.0.0.1:9/f.gz", tmp_path / "f.txt", **QUICK)
    assert (tmp_path / "f.txt").read_bytes() == TEXT and left(tmp_path) == ["f.txt"]


@pytest.mark.parametrize("code, tries", [(404, 1), (403, 1), (500, 3), (429, 3)])
def test_answers_that_are_no_file(server, tmp_path, code, tries):
    server.site.statuses = [code] * 10
    with pytest.raises(OSError, match=f"f.txt.*{code} "): fetch(server, tmp_path / "f.txt", tries=3)
    assert len(server.site.asked) == tries


def test_a_login_page_is_not_the_file(server, tmp_path):
    server.site.content_type = "text/html; charset=utf-8"
    with pytest.raises(OSError, match="web page"): fetch(server, tmp_path / "f.txt")
    assert not (tmp_path / "f.txt").exists()


def test_offline_is_one_sentence_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.time, "sleep", lambda s: pytest.fail("offline should not wait"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError) as error: download("tinystories", tmp_path, base_url="http://127.0.0.1:9", progress=False)
    said = str(error.value)
    assert "\n" not in said and "refused" in said and "CS336_DOWNLOAD_URL" in said and said.count(". ") == 0
    with pytest.raises(OSError, match="there.invalid"): download("owt", tmp_path, base_url="http://there.invalid", progress=False)


def test_a_stalled_connection_is_given_up_and_resumed(server, tmp_path):
    site = server.site
    def stall(number):
        if number == 1: site.limit = 2000
        if number == 2: time.sleep(0.6)
        if number > 2: site.limit = None
    site.on_request = stall
    fetch(server, tmp_path / "f.txt", timeout=0.2)
    assert (tmp_path / "f.txt").read_bytes() == TEXT and len(site.asked) >= 3


def test_a_network_that_was_there_is_waited_for(server, tmp_path, monkeypatch):
    ask, calls = corpora._ask, []
    def unplugged(url, *args):
        calls.append(url)
        with corpora._network(url):
            if 2 <= len(calls) <= 4: raise URLError(OSError(101, "Network is unreachable"))
        return ask(url, *args)
    monkeypatch.setattr(corpora, "_ask", unplugged)
    server.site.limit = 5000
    fetch(server, tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_bytes() == TEXT and len(calls) == 3 + -(-len(TEXT) // 5000)


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "f.txt.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another program"): fetch(server, tmp_path / "f.txt")


def test_unknown_name_and_unwritable_folder(server, tmp_path):
    with pytest.raises(ValueError, match="tinystories and owt"): download("stories", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError): download("owt", tmp_path / "file", base_url=server.url, **QUICK)


def test_the_bar_shows_the_whole_and_counts_only_new_bytes(server, tmp_path, monkeypatch):
    import tqdm
    bars = []
    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO())
            bars.append(self)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    server.site.limit, server.site.statuses = 3000, [None, 404]
    with pytest.raises(OSError): fetch(server, tmp_path / "f.txt", progress=True)
    server.site.limit = None
    fetch(server, tmp_path / "f.txt", progress=True)
    assert [(b.initial, b.n, b.total) for b in bars] == [(0, 3000, len(TEXT)), (3000, len(TEXT), len(TEXT))]


@settings(deadline=None, max_examples=60)
@given(members=st.lists(st.binary(max_size=300), min_size=1, max_size=3), size=st.integers(1, 50), cut=st.integers(1, 30))
def test_gunzip_equals_the_standard_library(members, size, cut):
    packed = b"".join(gzip.compress(m) for m in members)
    chunks = [packed[i:i + size] for i in range(0, len(packed), size)]
    assert b"".join(gunzip(chunks)) == gzip.decompress(packed) == b"".join(members)
    last = gzip.compress(members[-1])
    with pytest.raises(OSError): list(gunzip([packed[:len(packed) - min(cut, len(last) - 1)]]))


# ---- a held-out tenth

def shares(path, folder):
    corpus = corpora.split_text_file(path, folder)
    sizes = [p.stat().st_size for p in (corpus.train, corpus.valid)]
    return sizes[1] / sum(sizes)


@pytest.mark.parametrize("text", [
    "Header\n" * 80 + "\n" + "".join(f"Line {n} of a running text without blank lines.\n" for n in range(20_000)),
    "".join(f"Line {n} of the text.\n" + "\n" * (n == 10_000) for n in range(20_000)),
    "".join(f"Line {n} of the text.\n" for n in range(20_000)) + END_OF_TEXT + "\n",
    END_OF_TEXT + "".join(f"Line {n} of the text.\n" for n in range(20_000))])
def test_a_running_text_gives_up_a_tenth_whatever_its_blank_lines(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.05 < shares(tmp_path / "a.txt", tmp_path) < 0.15
    corpus = corpora.split_text_file(tmp_path / "a.txt", tmp_path)
    lines = [line for p in (corpus.train, corpus.valid) for line in p.read_text().replace(END_OF_TEXT, "").splitlines() if line.strip()]
    assert lines == [line for line in text.replace(END_OF_TEXT, "").splitlines() if line.strip()]


@pytest.mark.parametrize("variant", range(8))
def test_a_document_much_longer_than_a_tenth_is_learned_from(tmp_path, variant):
    texts = [f"Document {n} of variant {variant}, short." for n in range(9)] + [f"A long one, {variant}. " * 3_000]
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert shares(tmp_path / "a.txt", tmp_path) < 0.2


def test_a_share_far_from_a_tenth_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("short" + END_OF_TEXT + "long " * 9_000)
    with pytest.warns(UserWarning, match="a.txt: .*% of it are held out"): corpora.split_text_file(tmp_path / "a.txt", tmp_path)


def test_only_equal_documents_or_one_line_are_refused_for_what_they_are(tmp_path):
    for text, said in ((f"same{END_OF_TEXT}same", "only one document, 2 times over"), ("one line", "only one line"), ("a\rb\rc", r"only one line.*\\r alone is none")):
        (tmp_path / "a.txt").write_bytes(text.encode())
        with pytest.raises(ValueError, match=said): corpora.split_text_file(tmp_path / "a.txt", tmp_path)
    (tmp_path / "a.txt").write_bytes("wide".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16|not UTF-8"): corpora.split_text_file(tmp_path / "a.txt", tmp_path)


def test_a_byte_order_mark_alone_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + END_OF_TEXT.encode() + END_OF_TEXT.join(f"Document {n}." for n in range(50)).encode())
    corpus = corpora.split_text_file(tmp_path / "a.txt", tmp_path)
    assert sum(corpora.describe_file(p)["documents"] for p in (corpus.train, corpus.valid)) == 50


def test_no_gzip_data_at_all_are_refused():
    for chunks in ([], [b""], [b"\0" * 10]):
        with pytest.raises(OSError, match="no gzip data"): list(corpora.gunzip(chunks))


def test_parts_that_come_after_the_joining_are_noticed(tmp_path):
    (tmp_path / "web_valid.txt").write_text("held out")
    for n in range(2): (tmp_path / f"web_train_{n}.txt").write_text(f"Document {n}{END_OF_TEXT}")
    corpora.find_corpus("web-488MB", tmp_path)
    (tmp_path / "web_train_2.txt").write_text(f"Document 2{END_OF_TEXT}")
    with pytest.raises(ValueError, match="more than it has: delete it"): corpora.find_corpus("web-488MB", tmp_path)
    (tmp_path / "web_train.txt").unlink()
    (tmp_path / "web_train_02.txt").write_text(f"Document 2{END_OF_TEXT}")
    with pytest.raises(ValueError, match="two parts of web_train.txt with one number"): corpora.find_corpus("web-488MB", tmp_path)
