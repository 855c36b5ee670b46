"""Ours and the peers in turn on the same file: time, memory, and whether merges and ids are the same.

    pip install -e '.[bench]'
    python benchmarks/tokenizers.py run --text data/web_train.txt --gpt2 FOLDER --minutes 30
    python benchmarks/tokenizers.py run --only train ours,gigabpe 100MB --threads 1,2
    python benchmarks/tokenizers.py show
    python benchmarks/tokenizers.py record figures/runs/tokenizer-benchmark.json
    python benchmarks/tokenizers.py missing figures/runs/tokenizer-benchmark.json

Every row is a process of its own; what it found is a line of `--rows`. A row that stands there for this machine and
this code is not made again, so the benchmark can be stopped at any time and goes on where it was. `--only` takes words
that must all fit a row: task (line-train, check-count), name, size, vocabulary; a comma between words is "or". A peer
that is not installed is left out.

`record` puts the medians into a file that keeps what it has: a newer row takes the place of an older one of the same
setting and name, and each tells its own date, machine, commit and runs. So a few rows can be made again at any time;
times are only divided by each other where they are of one machine and text. `missing` tells which rows a record has not
(or with fewer runs, or of other code of ours).

- train: a file to merges. batch: documents (str) in memory to lists of ids. decode: an array of ids to bytes.
- encode: a file to a token file on the disk, the word cache empty. gigatoken gives arrays in memory, which are then
  written as .npy; `ids_seconds` is the time until it has them. tiktoken and HF get the file's documents in groups. Ours
  leaves out the text's SHA-256, which no peer takes (`encode_file(..., checksum=False)`); `sha256_seconds` is what that
  would cost.
- array: a text (bytes) in memory to an array of ids, one thread.
- short: `encode` of one string of 11 or of 450 characters, 10,000 distinct ones, one call each; of tiktoken
  `ordinary_seconds` too, which is its `encode_ordinary`: no search for special tokens.
- line: train and encode on a text of up to 2.2 GB in which new words keep coming. cold: import and compilation of ours.
- replay: a peer's merges on our counts. Trainers break ties differently, so their merges are not ours; but each merge
  of a right trainer is, at its turn, a most frequent pair. (gigabpe takes special tokens as text, and is counted so.)
- check: all of the text by ours against tiktoken and against the clear versions.

Import and compilation are left out of all rows but `cold`: ours has trained on 5 MB, or encoded one word many times
with the same tokenizer and 2 MB with another one, before; a peer has encoded one word many times. `anonymous` is the most private memory (RssAnon) that
a process had in its timed part, looked at 50 times a second; VmHWM, which counts mapped files, stands beside it.
`others` is how many processors other processes, or the machine's host, used meanwhile: above 0.25 a row is tried up to
three times, and the quietest try counts.
"""
import sys
sys.path.pop(0)  # this file has the name of a package that it imports

import argparse, ast, gc, hashlib, heapq, importlib.metadata, importlib.util, itertools, json, os, platform, random
import shutil, statistics, subprocess, tempfile, time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("cs336_lm") is None: sys.path.insert(0, str(ROOT))

SPECIAL = "<|endoftext|>"
PACKAGES = {"ours": "cs336_lm", "gigabpe": "gigabpe", "gigatoken": "gigatoken", "rustbpe": "rustbpe",
            "hf": "tokenizers", "tiktoken": "tiktoken"}
SLOW = {"rustbpe", "hf", "tiktoken"}  # one run, on the smallest file
TRAINERS, ENCODERS = ["ours", "gigabpe", "gigatoken", "rustbpe", "hf"], ["ours", "gigatoken", "tiktoken", "hf"]
TIES = {"ours": "the greatest pair of byte strings"} | dict.fromkeys(TRAINERS[1:], "the smallest pair of ids")
GPT2 = 50257
QUIET = 0.25  # processors that others may use while a row is timed
APART = "cold", "replay", "check"  # tasks that are no comparison of times
SHORT = (11, 450)
LINE_SIZES = (100, 200, 500, 1000, 2200)
WRITE_UP = {"train 10000": (2.2e9, 392), "train 32000": (11.9e9, 26135)}  # bytes and seconds, one thread
# task, vocabulary (None: any), characters, peers, at least, aim
TARGETS = [("train", 10000, None, TRAINERS[1:], 2.5, 3.5), ("train", 32000, None, TRAINERS[1:], 2.2, 3.0),
           ("encode", None, None, ["gigatoken"], 1.0, 1.3), ("array", None, None, ["gigatoken"], 1.0, 1.3),
           ("encode", None, None, ["tiktoken"], 10, None), ("encode", None, None, ["hf"], 40, None),
           ("decode", None, None, ENCODERS[1:], 4, None), ("short", None, 11, ["tiktoken"], 1.0, None),
           ("short", None, 450, ["tiktoken"], 2.0, None)]


# -- in the process of a row: trainers, functions of (path, vocab_size) that give merges

def prepare_trainer(name: str, threads: int, warm: Path) -> Callable:
    "Import the trainer, and let ours load its compiled code."
    return {"ours": train_ours, "gigabpe": train_gigabpe, "gigatoken": train_gigatoken, "rustbpe": train_rustbpe,
            "hf": train_hf}[name](threads, warm)


def train_ours(threads: int, warm: Path) -> Callable:
    from cs336_lm.bpe import train_bpe
    train = lambda path, size: train_bpe(path, size, [SPECIAL], num_processes=threads)[1]
    train(warm, 300)
    return train


def train_gigabpe(threads: int, warm: Path) -> Callable:
    import gigabpe
    return lambda path, size: gigabpe.train_bpe([str(path)], vocab_size=size, special_tokens=[SPECIAL],
                                                pretokenizer="bytelevel", threads=threads)[1]


def train_gigatoken(threads: int, warm: Path) -> Callable:
    import gigatoken
    return lambda path, size: gigatoken.train_bpe(path, size, [SPECIAL], separator=SPECIAL.encode())[1]


def train_rustbpe(threads: int, warm: Path) -> Callable:
    import rustbpe
    from cs336_lm.pretokenization import PATTERN
    def train(path, size):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(documents(path), size - 1, pattern=PATTERN)  # it has no special tokens
        return tokenizer
    return train


def train_hf(threads: int, warm: Path) -> Callable:
    import tokenizers
    def train(path, size):
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        model.train_from_iterator(documents(path), tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False))
        return model
    return train


def documents(path: Path) -> Iterator[str]:
    from cs336_lm.corpora import read_documents
    return read_documents(path, SPECIAL)


def as_bytes(merges) -> list[list[bytes]]:
    "The merges of any trainer as pairs of bytes. rustbpe tells its tokens only: what they were joined from follows."
    from cs336_lm.tokenizer import merge_by_rank, text_to_token
    if hasattr(merges, "get_mergeable_ranks"):
        ranks = {bytes(token): rank for token, rank in merges.get_mergeable_ranks()}
        return [list(parts_of(token, rank, ranks)) for token, rank in ranks.items() if len(token) > 1]
    if hasattr(merges, "to_str"): merges = json.loads(merges.to_str())["model"]["merges"]
    return [[part if isinstance(part, bytes) else text_to_token(part) for part in merge] for merge in merges]


def parts_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    "The two tokens of lower rank that a token was joined from: what the earlier merges make of it."
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def run_train(row: dict, files: dict) -> dict:
    train = prepare_trainer(row["name"], row["threads"], Path(files["warm"]))
    found, merges = timed(lambda: train(Path(files["text"]), row["vocab"]))
    merges = as_bytes(merges)
    if "merges" in files: Path(files["merges"]).write_text("\n".join(f"{a.hex()} {b.hex()}" for a, b in merges))
    return found | {"merges": len(merges), "sha256": hashlib.sha256(repr(merges).encode()).hexdigest()}


def read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    return [tuple(bytes.fromhex(part) for part in line.split(" ")) for line in path.read_text().splitlines()]


# -- encoders: functions of (path) that give all ids of the file, special tokens left out, as a flat array

def load_ours(folder: Path):
    from cs336_lm.tokenizer import Tokenizer
    return Tokenizer.load(folder)


def peer_tokenizer(name: str, folder: Path):
    "The same vocabulary in a peer's own form."
    if name == "tiktoken": return load_ours(folder).to_tiktoken()
    if name == "hf":
        import tokenizers
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    import gigatoken
    return gigatoken.Tokenizer(str(folder / "tokenizer.json"))


def ready_ours(folder: Path):
    "Ours with all code loaded and a word cache that knows one word. Little is encoded, as memory is measured after it."
    from cs336_lm.tokenizer import Tokenizer, load_encoder
    if not load_encoder(): raise SystemExit("ours needs numba: pip install numba")
    other, tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], [SPECIAL]), load_ours(folder)
    for encoder, text in ((other, "Some words, wasn't it? Größe, 日本語. " * 100), (tokenizer, " the" * 1000)):
        encoder.decode_bytes(np.array(encoder.encode(text), np.uint32))
        encoder.encode_batch([text, text])
    return tokenizer


def any_tokenizer(name: str, files: dict):
    folder = Path(files["tokenizer"])
    return ready_ours(folder) if name == "ours" else peer_tokenizer(name, folder)


def groups(path: Path, size: int = 2000) -> Iterator[list[str]]:
    docs = documents(path)
    while group := list(itertools.islice(docs, size)): yield group


def prepare_encoder(name: str, threads: int, files: dict) -> Callable:
    "A function of (path, output): write the token file; the time when the ids were in memory, or None."
    folder = Path(files["tokenizer"])
    if name == "ours":
        from cs336_lm.dataset import encode_file
        encode_file(ready_ours(folder), Path(files["warm"]), Path(files["output"] + ".warm.npy"), num_threads=threads)
        tokenizer = ready_ours(folder)  # a new one: that one's cache is warm
        return lambda path, output: encode_file(tokenizer, path, output, num_threads=threads, checksum=False) and None
    tokenizer = peer_tokenizer(name, folder)
    batch = batch_function(name, tokenizer, threads)
    batch([" the" * 10] * 2)  # what a first call sets up is not timed, as it is not of ours
    def encode(path, output):
        if name == "gigatoken":
            import awkward, gigatoken
            ids = tokenizer.encode_files(gigatoken.TextFileSource([path], separator=SPECIAL), parallel=threads > 1)
            ids = awkward.to_numpy(awkward.flatten(ids))
        else: ids = np.concatenate([flat(batch(group)) for group in groups(path)])
        ended = time.monotonic()
        np.save(output, ids.astype(np.uint16) if len(vocabulary(folder)) <= 1 << 16 else ids)
        return ended
    return encode


def batch_function(name: str, tokenizer, threads: int) -> Callable:
    "A function of a list of documents that gives a list of lists of ids."
    if name == "ours": return lambda texts: tokenizer.encode_batch(texts, num_threads=threads)
    if name == "gigatoken": return lambda texts: tokenizer.encode_batch_list(texts, parallel=threads > 1)
    if name == "tiktoken": return lambda texts: tokenizer.encode_ordinary_batch(texts, num_threads=threads)
    return lambda texts: [found.ids for found in tokenizer.encode_batch_fast(texts)]  # without the tokens' places


def flat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), np.uint32)


def vocabulary(folder: Path) -> dict[str, int]: return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def ids_hash(path: Path, special: int) -> dict:
    "How many ids a token file has without the special token, and their hash whatever their width."
    ids, digest, count = np.load(path, mmap_mode="r"), hashlib.sha256(), 0
    for start in range(0, len(ids), 1 << 22):
        part = ids[start:start + (1 << 22)].astype(np.uint32)
        part = part[part != special]
        digest.update(part.tobytes())
        count += len(part)
    return {"tokens": count, "sha256": digest.hexdigest()}


def run_encode(row: dict, files: dict) -> dict:
    encode, output = prepare_encoder(row["name"], row["threads"], files), Path(files["output"])
    found, ended = timed(lambda: encode(Path(files["text"]), output))
    if ended: found["ids_seconds"] = ended - found["start"]
    if row["name"] == "ours":
        began = time.perf_counter()
        with open(files["text"], "rb") as file: hashlib.file_digest(file, "sha256")
        found["sha256_seconds"] = time.perf_counter() - began
    return found | ids_hash(output, vocabulary(Path(files["tokenizer"]))[SPECIAL])


def run_batch(row: dict, files: dict) -> dict:
    texts = list(documents(Path(files["text"])))
    tokenizer = any_tokenizer(row["name"], files)
    batch = batch_function(row["name"], tokenizer, row["threads"])
    batch([" the" * 10])
    found, lists = timed(lambda: batch(texts))
    ids = flat(lists)
    return found | {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def run_array(row: dict, files: dict) -> dict:
    "Ours gives one array of the whole text, gigatoken an array of arrays of its documents' ids."
    folder, data = Path(files["tokenizer"]), Path(files["text"]).read_bytes()
    tokenizer = any_tokenizer(row["name"], files)
    def encode(data):
        if row["name"] == "ours": return tokenizer.encode_array(data)
        import gigatoken
        return tokenizer.encode_batch(gigatoken.BytesSource(data, separator=SPECIAL), parallel=False)
    encode(b" the" * 10)
    found, ids = timed(lambda: encode(data))
    if row["name"] == "gigatoken":
        import awkward
        ids = awkward.to_numpy(awkward.flatten(ids))
    ids = ids[ids != vocabulary(folder)[SPECIAL]].astype(np.uint32)
    return found | {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def run_decode(row: dict, files: dict) -> dict:
    "Ids to bytes: an array for ours and gigatoken; a list for tiktoken and HF, which take no other (HF makes a text)."
    name = row["name"]
    ids = np.load(files["ids"]).astype(np.uint32)
    tokenizer = any_tokenizer(name, files)
    if name in ("tiktoken", "hf"): ids = ids.tolist()
    decode = {"ours": getattr(tokenizer, "decode_bytes", None), "gigatoken": tokenizer.decode,
              "tiktoken": getattr(tokenizer, "decode_bytes", None),
              "hf": lambda ids: tokenizer.decode(ids, skip_special_tokens=False)}[name]
    decode(ids[:1000])
    found, text = timed(lambda: decode(ids))
    data = text.encode() if isinstance(text, str) else text
    return found | {"sha256": hashlib.sha256(data).hexdigest(), "right": data == Path(files["text"]).read_bytes()}


def run_short(row: dict, files: dict) -> dict:
    "Seconds of one call: the median of nine sets of 10,000 strings, all distinct, after one more set."
    name, width = row["name"], row["characters"]
    tokenizer = any_tokenizer(name, files)
    encode = (lambda text: tokenizer.encode(text).ids) if name == "hf" else tokenizer.encode
    sets = distinct_strings(Path(files["text"]), width, 10)
    gc.disable()
    measured, took = timed(lambda: each_set(encode, sets))
    digest = hashlib.sha256(repr([list(map(int, encode(string))) for string in sets[0]]).encode()).hexdigest()
    micro = [round(t * 1e6, 3) for t in took]
    found = {"seconds": statistics.median(took[1:]), "sets": micro, "sha256": digest, "others": measured["others"]}
    if name == "tiktoken": found["ordinary_seconds"] = statistics.median(each_set(tokenizer.encode_ordinary, sets)[1:])
    return found


def each_set(encode: Callable, sets: list[list[str]]) -> list[float]:
    "Seconds a string, of each set."
    took = []
    for strings in sets:
        began = time.perf_counter()
        for string in strings: encode(string)
        took.append((time.perf_counter() - began) / len(strings))
    return took


def distinct_strings(path: Path, width: int, sets: int) -> list[list[str]]:
    text, rng, found = "\n".join(itertools.islice(documents(path), 6000)), random.Random(336), {}
    while len(found) < sets * 10_000:
        start = rng.randrange(len(text) - width)
        found[text[start:start + width]] = None
    strings = list(found)
    return [strings[i::sets] for i in range(sets)]


# -- other rows

def run_line(row: dict, files: dict) -> dict:
    found = (run_train if row["of"] == "train" else run_encode)(row, files)
    return found | {"bytes": os.path.getsize(files["text"])}


def run_cold(row: dict, files: dict) -> dict:
    "What a first user waits for, and a second call beside it."
    found, warm = {"start": time.monotonic()}, Path(files["warm"])
    def lap(name, call):
        began = time.perf_counter()
        call()
        found[name] = time.perf_counter() - began
    def imports(): from cs336_lm import bpe, dataset, tokenizer  # noqa: F401
    lap("import", imports)
    from cs336_lm.bpe import train_bpe
    tokenizer, text = load_ours(Path(files["tokenizer"])), warm.read_text(encoding="utf-8")
    for turn in ("first", "second"): lap(f"{turn}_train_5MB", lambda: train_bpe(warm, 1000, [SPECIAL], num_processes=2))
    for turn in ("first", "second"): lap(f"{turn}_encode_5MB", lambda: tokenizer.encode(text))
    return found | {"seconds": time.monotonic() - found["start"], "stop": time.monotonic()}


def run_replay(row: dict, files: dict) -> dict:
    "How many of a peer's merges are, when their turn comes, a most frequent pair of the text."
    from cs336_lm import bpe
    from cs336_lm.pretokenization import count_pretokens
    specials = [] if row["name"] == "gigabpe" else [SPECIAL]  # gigabpe takes special tokens as text
    table = bpe.PairTable(count_pretokens(Path(files["text"]), specials, num_processes=2))
    heap, right, ids = [(-n, pair) for pair, n in table.counts.items()], 0, {bytes([b]): b for b in range(256)}
    heapq.heapify(heap)
    merges = read_merges(Path(files["merges"]))
    for new_id, (a, b) in enumerate(merges, start=256):
        pair = ids[a], ids[b]
        while heap and -heap[0][0] != (n := table.counts.get(heap[0][1], 0)):
            heapq.heapreplace(heap, (-n, heap[0][1])) if n else heapq.heappop(heap)
        right += bool(heap) and table.counts.get(pair, 0) == -heap[0][0]
        for born in bpe.merge_in_table(table, pair, new_id): heapq.heappush(heap, (-table.counts[born], born))
        table.counts.pop(pair, None)
        ids.setdefault(a + b, new_id)
    return {"seconds": 0.0, "merges": len(merges), "most_frequent": right}


def run_check(row: dict, files: dict) -> dict:
    return {"encode": check_encode, "count": check_count, "train": check_train}[row["of"]](row, files)


def check_encode(row: dict, files: dict) -> dict:
    "All ids of the text by ours against tiktoken's, block by block."
    from cs336_lm.dataset import encode_file
    tokenizer, text, output = load_ours(Path(files["tokenizer"])), Path(files["text"]), Path(files["output"])
    theirs, special = tokenizer.to_tiktoken(), vocabulary(Path(files["tokenizer"]))[SPECIAL]
    about = encode_file(tokenizer, text, output, num_threads=row["threads"])
    ids, at, different = np.load(output, mmap_mode="r"), 0, 0
    for block in text_blocks(text):
        parts = theirs.encode_ordinary_batch(block, num_threads=row["threads"])
        expected = np.concatenate([np.array([*part, special], np.int64) for part in parts])[:-1]
        found = ids[at:at + len(expected)].astype(np.int64)
        different += int((found != expected[:len(found)]).sum()) + len(expected) - len(found)
        at += len(expected) + 1  # the special token between two blocks
        assert at - 1 >= len(ids) or ids[at - 1] == special
    different += abs(len(ids) - (at - 1))  # one side has more
    return {"seconds": 0.0, "bytes": about.bytes, "ids": len(ids), "ids_compared": at - 1, "ids_different": different}


def text_blocks(path: Path, size: int = 1 << 25) -> Iterator[list[str]]:
    "The text between special tokens, blanks and empty pieces included, in lists of about `size` bytes."
    held = b""
    with open(path, "rb") as file:
        while part := file.read(size):
            *whole, held = (held + part).split(SPECIAL.encode())
            if whole: yield [piece.decode() for piece in whole]
    yield [held.decode()]


def check_count(row: dict, files: dict) -> dict:
    "The counts of all the text by compiled code and by the clear version, order included."
    from cs336_lm.pretokenization import count_pretokens, count_pretokens_clear
    fast = count_pretokens(files["text"], [SPECIAL], num_processes=row["threads"])
    clear = count_pretokens_clear(files["text"], [SPECIAL], num_processes=row["threads"])
    differ = sum(clear.get(word) != n for word, n in fast.items()) + len(clear.keys() - fast.keys())
    return {"seconds": 0.0, "bytes": os.path.getsize(files["text"]), "distinct": len(clear), "pretokens": clear.total(),
            "words_different": differ, "same_order": list(fast) == list(clear)}


def check_train(row: dict, files: dict) -> dict:
    "The merges of all the text by compiled code and by the clear trainer with its heap."
    from cs336_lm import bpe
    from cs336_lm.pretokenization import count_pretokens
    fast = bpe.train_bpe(files["text"], row["vocab"], [SPECIAL], num_processes=row["threads"])[1]
    counts = count_pretokens(files["text"], [SPECIAL], num_processes=row["threads"])
    clear = bpe._learn_merges(bpe.PairTable(counts), row["vocab"] - 257, False)
    different = sum(a != b for a, b in zip(fast, clear)) + abs(len(fast) - len(clear))
    return {"seconds": 0.0, "merges": len(clear), "merges_different": different}


def timed(call: Callable) -> tuple[dict, object]:
    "What a call took, and its result. VmHWM begins anew where the system lets it."
    gc.collect()
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass
    busy, cpu, start = busy_seconds(), time.process_time(), time.monotonic()
    result = call()
    stop = time.monotonic()
    wall, cpu = stop - start, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "start": start, "stop": stop, "hwm_bytes": memory("self", "VmHWM"),
            "others": max(0.0, busy_seconds() - busy - cpu) / wall}, result


def busy_seconds() -> float:
    "Seconds that all processors together have worked, or were taken away by the machine's host; 0 if nobody tells."
    try: user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except (OSError, ValueError): return 0.0
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def memory(process: int | str, field: str) -> int:
    "Bytes that /proc/PROCESS/status gives for `field`; 0 where there is no such file."
    try: return 1024 * int(Path(f"/proc/{process}/status").read_text().split(field + ":")[1].split()[0])
    except (OSError, IndexError): return 0


# -- the files that rows work on

class Files:
    "Makes what rows need, once, in the folder `work`."

    def __init__(self, text: Path, work: Path, gpt2: Path | None):
        if not text.is_file(): raise SystemExit(f"{text}: there is no such file. Say --text FILE, a UTF-8 text "
                                                f"whose documents are separated by {SPECIAL}.")
        self.text, self.work, self.gpt2, self.made = text, work, gpt2, set()
        work.mkdir(parents=True, exist_ok=True)

    def of(self, row: dict) -> dict:
        "The paths for a row."
        threads, name = row["threads"], row["name"]
        line = row["task"] == "line"
        found = {"text": self.line(row["size"]) if line else self.part(row["size"])}
        encodes = "encode" in (row["task"], row.get("of")) or row["task"] in ("array", "batch", "decode", "short")
        found["warm"] = self.part("2MB" if encodes else "5MB")
        if row["task"] not in ("train", "replay") and row.get("of") not in ("train", "count"):
            found["tokenizer"] = self.tokenizer(row["vocab"])
        if row["task"] == "decode": found["ids"] = self.ids(row["size"], row["vocab"])
        merges = self.work / f"merges-{name}-{row['size']}-{row['vocab']}-{threads}.txt"
        if row["task"] == "train" and row["turn"] == 0 or row["task"] == "replay": found["merges"] = merges
        return {key: str(path) for key, path in (found | {"output": self.work / "output.npy"}).items()}

    def part(self, size: str) -> Path:
        "The first documents of the text, about so many megabytes; all of it where it is not longer."
        want = int(size.removesuffix("MB")) * 1_000_000
        if self.text.stat().st_size <= want: return self.text
        path = self.work / f"text-{size}.txt"
        if not path.is_file():
            with open(self.text, "rb") as file: data = file.read(want)
            cut = data.rfind(SPECIAL.encode())
            write(path, data[:cut] if cut > 0 else data[:data.rfind(b"\n")])
        return path

    def tokenizer(self, vocab: int) -> Path:
        "A folder with a tokenizer, ours and tokenizer.json: GPT-2's own where given, else trained on the text."
        folder = self.work / f"tokenizer-{vocab}"
        if (folder / "tokenizer.json").is_file(): return folder
        print(f"making the tokenizer of {vocab:,} entries ...", flush=True)
        gpt2 = str(self.gpt2 or "") if vocab == GPT2 else ""
        child([sys.executable, __file__, "make", str(self.text), str(vocab), str(folder), gpt2])
        return folder

    def ids(self, size: str, vocab: int) -> Path:
        path = self.work / f"ids-{size}-{vocab}.npy"
        if not path.is_file():
            child([sys.executable, __file__, "ids", str(self.part(size)), str(self.tokenizer(vocab)), str(path)])
        return path

    def line(self, size: str) -> Path:
        "The text again and again, with numbered words mixed in."
        path, want = self.work / f"line-{size}.txt", int(size.removesuffix("MB")) * 1_000_000
        if path.is_file(): return path
        if shutil.disk_usage(self.work).free < 2 * want:
            raise SystemExit(f"{self.work} has too little room: {2 * want / 1e9:.1f} GB are needed. Say --work FOLDER.")
        print(f"writing {path} ...", flush=True)
        with open(path.with_suffix(".part"), "wb") as file:
            for block in numbered_text(self.text):
                file.write(block)
                if file.tell() >= want: break
        os.replace(path.with_suffix(".part"), path)
        return path


def write(path: Path, data: bytes) -> None:
    path.with_suffix(".part").write_bytes(data)
    os.replace(path.with_suffix(".part"), path)


def numbered_text(path: Path) -> Iterator[bytes]:
    "Documents of a text, over and over, each with a new word for every 700 bytes: 1.4 in a kilobyte, as web text has."
    numbers, separator = itertools.count(), SPECIAL.encode()
    while True:
        for block in text_blocks(path, 1 << 22):
            docs = [doc.encode() for doc in block]
            new = (b"".join(new_word(next(numbers)) for _ in range(len(doc) // 700)) for doc in docs)
            yield b"".join(doc + words + separator for doc, words in zip(docs, new))


def new_word(number: int) -> bytes:
    "A word that no other number has, in letters: digits would be cut off it."
    letters = []
    while number or not letters: number, digit = divmod(number, 26); letters.append(97 + digit)
    return b" qz" + bytes(letters)


def make_tokenizer(text: str, vocab: str, folder: str, gpt2: str) -> None:
    "In a process of its own: train, or load GPT-2's files under either of their names, and save."
    from cs336_lm.bpe import train_bpe
    from cs336_lm.tokenizer import Tokenizer
    if gpt2:
        names = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
        pair = next(((Path(gpt2) / a, Path(gpt2) / b) for a, b in names if (Path(gpt2) / a).is_file()), None)
        if pair is None: raise SystemExit(f"{gpt2} has neither of the pairs of files " + " and ".join(map(str, names)))
        tokenizer = Tokenizer.from_files(*pair, [SPECIAL])
    else:
        learned = train_bpe(text, int(vocab), [SPECIAL], num_processes=2)
        tokenizer = Tokenizer(*learned, [SPECIAL], trained_on=Path(text).name)
    tokenizer.save(folder)
    tokenizer.to_huggingface().save(str(Path(folder) / "tokenizer.json"))


def make_ids(text: str, folder: str, output: str) -> None:
    from cs336_lm.dataset import encode_file
    encode_file(load_ours(Path(folder)), text, output + ".part.npy", num_threads=2)
    os.replace(output + ".part.npy", output)


# -- all rows

def installed(name: str) -> str | None:
    "The version of what a name stands for, None if it is not installed."
    if importlib.util.find_spec(PACKAGES[name]) is None: return None
    try: return importlib.metadata.version(PACKAGES[name])
    except importlib.metadata.PackageNotFoundError: return "here"


def trains(row: dict) -> bool: return row["task"] in ("train", "replay") or row.get("of") in ("train", "count")


def code_hash(row: dict) -> str:
    "Names the code of ours that a row measures: chapters 3 and 4, or 2 to 6. Comments and docstrings are left out."
    folder = Path(importlib.util.find_spec("cs336_lm").origin).parent
    names = ("pretokenization", "bpe") if trains(row) else ("corpora", "pretokenization", "bpe", "tokenizer", "dataset")
    return hashlib.sha256("".join(bare_code(folder / f"{name}.py") for name in names).encode()).hexdigest()[:12]


def bare_code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node): del node.body[0]
    return ast.dump(tree)


def machine() -> str:
    try: cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    except (OSError, IndexError): cpu = platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu}, {usable} cores"


def all_rows(args) -> Iterator[dict]:
    "Every row there is, those to be compared next to each other, so that a busy minute hits all alike."
    sizes = [f"{n}MB" for n in args.sizes]
    cross = lambda *lists: itertools.product(*lists)
    def turns(task, names, size, **more):
        for turn in range(args.repeats):
            for name in names:
                if name not in SLOW or turn == 0 and size == sizes[0]:
                    yield {"task": task, "name": name, "size": size, **more, "turn": turn}
    def once(task, name, size, vocab, threads, **more):
        return {"task": task, **more, "name": name, "size": size, "vocab": vocab, "threads": threads, "turn": 0}
    for size, vocab, n in cross(sizes, args.vocab, args.threads):
        yield from turns("train", TRAINERS, size, vocab=vocab, threads=n)
    for size, vocab, n in cross(sizes, (32000, GPT2), args.threads):
        yield from turns("encode", ENCODERS, size, vocab=vocab, threads=n)
    for vocab in (32000, GPT2): yield from turns("array", ["ours", "gigatoken"], sizes[0], vocab=vocab, threads=1)
    for n in args.threads: yield from turns("batch", ENCODERS, sizes[0], vocab=32000, threads=n)
    for size in sizes: yield from turns("decode", ENCODERS, size, vocab=32000, threads=1)
    for vocab, width in cross((32000, GPT2), SHORT):
        yield from turns("short", ENCODERS, sizes[0], vocab=vocab, characters=width, threads=1)
    for turn in range(3): yield once("cold", "ours", "5MB", 32000, 2) | {"turn": turn}
    line = ("train", 10000), ("train", 32000), ("encode", 32000)
    for size, n, (of, vocab), turn in cross(args.line_sizes, args.threads, line, range(min(3, args.repeats))):
        yield once("line", "ours", f"{size}MB", vocab, n, of=of) | {"turn": turn}
    most = max(args.threads)
    for vocab, name in cross(args.vocab, TRAINERS): yield once("replay", name, sizes[0], vocab, most)
    for of in ("encode", "count", "train"): yield once("check", "ours", sizes[-1], 32000, most, of=of)


def fits(row: dict, only: list[str]) -> bool:
    words = {row["task"], f"{row['task']}-{row.get('of')}", row["name"], row["size"]}
    words |= {str(row["vocab"]), str(row.get("characters"))}
    return all(words & set(word.split(",")) for word in only)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_all(args) -> None:
    files, began = Files(args.text, args.work, args.gpt2), time.monotonic()
    versions = {name: installed(name) for name in PACKAGES}
    for name, version in versions.items():
        if not version: print(f"{name} is left out: pip install {PACKAGES[name]}")
    about = {"machine": machine(), "text": args.text.name}
    rows = [row for row in all_rows(args) if versions[row["name"]] and fits(row, args.only)]
    rows = [row | about | {"version": versions[row["name"]], "code": code_hash(row)} for row in rows]
    for row in rows:  # a peer's rows are good whatever the code of ours is
        if row["name"] != "ours" and row["task"] != "replay": del row["code"]
    done = [row for row in read_rows(args.rows) if "error" not in row and row.get("others", 0) <= args.redo]
    left = [row for row in rows if not any(row.items() <= old.items() for old in done)]
    print(f"{len(rows)} rows, {len(rows) - len(left)} of them done; {args.rows}", flush=True)
    for number, row in enumerate(left, start=1 + len(rows) - len(left)):
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            return print(f"stopped: {len(rows) - number + 1} rows are left")
        print(f"[{number}/{len(rows)}] {title(row)}: ", end="", flush=True)
        found = make_row(row, files, args.timeout)
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        with open(args.rows, "a", encoding="utf-8") as file: file.write(json.dumps(row | found) + "\n")
        print(result(found), flush=True)


def title(row: dict) -> str:
    task = f"{row['task']} {row['of']}" if "of" in row else row["task"]
    what = f"{row['characters']} characters" if "characters" in row else f"{row['threads']} thread(s)"
    return f"{task} {row['name']} {row['size']} {row['vocab']:,} {what}, run {row['turn'] + 1}".replace("  ", " ")


def result(found: dict) -> str:
    if "error" in found: return found["error"]
    seconds, names = found["seconds"], ("most_frequent", "merges")
    if not seconds: return str({key: value for key, value in found.items() if key in names or "different" in key})
    if "anonymous_bytes" not in found: return f"{seconds * 1e6:.2f} us"
    return f"{seconds:.2f} s {found['anonymous_bytes'] / 1e6:.0f} MB"


def make_row(row: dict, files: Files, timeout: float) -> dict:
    "Run one row in its process, up to three times if others keep the machine busy; what it found, or what went wrong."
    env = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    env |= {name: str(row["threads"]) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    tries = []
    try:
        command = [sys.executable, __file__, "one", json.dumps(row), json.dumps(files.of(row))]
        while len(tries) < (1 if row["task"] in APART else 2 if row["name"] in SLOW else 3):
            tries.append(cold(command, env, timeout) if row["task"] == "cold" else child(command, env, timeout))
            if tries[-1].get("others", 0) < QUIET: break
        found = min(tries, key=lambda one: one.get("others", 0)) | {"tries": len(tries)}
    except (subprocess.SubprocessError, OSError) as error: found = {"error": str(error)[-300:]}
    for output in files.work.glob("output*"): output.unlink()
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return found | {"load": round(os.getloadavg()[0], 1), "date": date} | commit()


@lru_cache(maxsize=1)
def commit() -> dict:
    "The commit of the working tree, with + where files differ from it; nothing where git does not tell."
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError): return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def cold(command: list[str], env: dict, timeout: float) -> dict:
    "A row with an empty folder for compiled code, and again with what the first one left there."
    with tempfile.TemporaryDirectory() as cache:
        empty, warm = (child(command, env | {"NUMBA_CACHE_DIR": cache}, timeout) for _ in range(2))
    return warm | {"empty": empty}


def child(command: list[str], env: dict | None = None, timeout: float = 3600) -> dict:
    "Run a command that prints a JSON object at last, and watch its memory; the object, memory added."
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process, seen, began = subprocess.Popen(command, stdout=out, stderr=err, env=env), [], time.monotonic()
        try:
            while process.poll() is None:
                seen.append((time.monotonic(), memory(process.pid, "RssAnon")))
                if time.monotonic() - began > timeout:
                    raise subprocess.SubprocessError(f"ran longer than {timeout:.0f} s")
                time.sleep(0.02)
        finally: process.kill()
        out.seek(0), err.seek(0)
        lines, errors = out.read().decode(errors="replace").splitlines(), err.read().decode(errors="replace").strip()
    if process.returncode: raise subprocess.SubprocessError(errors[-300:] or f"exit status {process.returncode}")
    found = json.loads(next((line for line in reversed(lines) if line.startswith("{")), "{}"))
    start, stop = found.pop("start", 0), found.pop("stop", 0)
    if stop:
        inside = [size for at, size in seen if start <= at <= stop]
        before = [size for at, size in seen if at <= start]
        found |= {"anonymous_bytes": max(inside + before[-1:], default=0), "anonymous_before": (before or [0])[-1]}
    return found


# -- tables

TASKS = "train", "encode", "array", "batch", "decode", "short", "line", "cold", "replay", "check"
SETTING = ("task", "of", "size", "vocab", "characters", "threads")
ORIGIN = ("machine", "text", "date", "commit", "code")  # where an entry of a record comes from
NOT_KEPT = {"turn", "load", "sha256", "sets", "seconds", "anonymous_before", "tries", "others", *ORIGIN}


def place(one: tuple) -> tuple:
    "Where a setting stands in the tables."
    task, of, size, *more = one
    return TASKS.index(task), of or "", int(size.removesuffix("MB")), [value or 0 for value in more]


def setting(row: dict) -> tuple: return tuple(row.get(field) for field in SETTING)


def medians(rows: list[dict]) -> list[dict]:
    "One entry for each setting and name, of the newest code: the median run, and whether the result is ours."
    rows = [row for row in rows if "error" not in row]
    newest = {trains(row): row["code"] for row in rows if "code" in row}
    rows = [row for row in rows if row.get("code") in (None, newest.get(trains(row)))]
    rows.sort(key=lambda row: row.get("others", 0))  # of a run that was made twice the quieter one counts
    rows, found = list({(setting(row), row["name"], row["turn"]): row for row in reversed(rows)}.values()), []
    for one in sorted(set(map(setting, rows)), key=place):
        of = [row for row in rows if setting(row) == one]
        ours = next((row.get("sha256") for row in of if row["name"] == "ours"), None)
        for name in PACKAGES:
            if runs := [row for row in of if row["name"] == name]: found.append(entry(runs, ours))
    return found


def entry(runs: list[dict], ours: str | None) -> dict:
    "Several runs of one row together: those that others left alone, if there are any."
    runs = [row for row in runs if row.get("others", 0) <= QUIET] or runs
    first, seconds = runs[0], [row["seconds"] for row in runs]
    found = {field: middle([row[field] for row in runs if field in row]) for field in first if field not in NOT_KEPT}
    found |= {"runs": len(runs), "seconds": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}
    if "sha256" in first:
        results = {row["sha256"][:12] for row in runs}
        found["result"] = results.pop() if len(results) == 1 else "differs from run to run"
        if ours: found["same_as_ours"] = found["result"] == ours[:12]
    newest = max(runs, key=lambda row: row["date"])
    found |= {field: newest[field] for field in ORIGIN if field in newest}
    return found | {"others": max(row.get("others", 0) for row in runs)}


def middle(values: list):
    "The median of what was measured, part by part; whether all are right; of anything else the first."
    if isinstance(values[0], dict): return {key: middle([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], bool): return all(values)
    measured = isinstance(values[0], (int, float)) and len(set(values)) > 1
    return statistics.median(values) if measured else values[0]


def beside_ours(table: list[dict]) -> Iterator[tuple[dict, dict[str, dict]]]:
    "Each entry of ours with the peers' entries of the same setting, machine and text."
    about = lambda t: (setting(t), t["machine"], t["text"])
    for ours in table:
        if ours["name"] == "ours":
            yield ours, {t["name"]: t for t in table if about(t) == about(ours) and t["name"] != "ours"}


def ratios(table: list[dict]) -> list[dict]:
    "For each goal and setting: the time of the quickest peer divided by ours."
    found = []
    for task, vocab, width, peers, least, aim in TARGETS:
        for ours, others in beside_ours(table):
            of = {name: t for name, t in others.items() if name in peers}
            right = ours["task"] == task and vocab in (None, ours["vocab"]) and width == ours.get("characters")
            if not right or not of: continue
            best = min(of, key=lambda name: of[name]["seconds"])
            about = {field: ours[field] for field in SETTING if field in ours}
            about["others"] = max(ours["others"], of[best]["others"])
            ratio = of[best]["seconds"] / ours["seconds"]
            if "cpu_seconds" in ours: about["cpu_ratio"] = of[best]["cpu_seconds"] / ours["cpu_seconds"]
            found.append(about | {"against": best, "ratio": ratio, "least": least, "aim": aim})
    return found


def lines(table: list[dict]) -> list[dict]:
    """Least squares through seconds and memory against bytes, and what the line says for the write-up's larger file.

    Points of another machine than the newest one's are left out."""
    found, of_line = [], [t for t in table if t["task"] == "line"]
    newest = max(of_line, key=lambda t: t["date"], default=None)
    of_line = [t for t in of_line if t["machine"] == newest["machine"]]
    for of, vocab, threads in dict.fromkeys((t["of"], t["vocab"], t["threads"]) for t in of_line):
        points = [(float(t["bytes"]), t["seconds"], t["anonymous_bytes"])
                  for t in of_line if (t["of"], t["vocab"], t["threads"]) == (of, vocab, threads)]
        if len(points) < 3: continue
        x, seconds, anonymous = np.array(sorted(points)).T
        slope, start = np.polyfit(x, seconds, 1)
        more, base = np.polyfit(x, anonymous, 1)
        found.append({"of": of, "vocab": vocab, "threads": threads, "points": np.array(sorted(points)).tolist(),
                      "seconds_per_GB": slope * 1e9, "seconds_at_0": start,
                      "worst_deviation": float(np.abs(seconds / (slope * x + start) - 1).max()),
                      "bytes_per_byte": more, "bytes_at_0": base,
                      "seconds_at_11.9GB": slope * 11.9e9 + start, "memory_at_11.9GB": more * 11.9e9 + base})
    return found


def read_here(args) -> list[dict]:
    "The rows of the machine that the newest row is of."
    rows = read_rows(args.rows)
    if not rows: raise SystemExit(f"{args.rows} has no rows: python benchmarks/tokenizers.py run")
    return [row for row in rows if row["machine"] == rows[-1]["machine"]]


def show(args) -> None:
    rows = read_here(args)
    table = medians(rows)
    print(f"{rows[-1]['machine']}, {rows[-1]['date'][:10]}, {rows[-1]['text']}\n")
    print("| task | size | entries | threads | name | median | MB/s | / ours | "
          "CPU / ours | anonymous MB | VmHWM MB | same | runs | others |")
    print("|" + "---|" * 14)
    for ours, others in beside_ours([t for t in table if t["task"] not in APART]):
        for t in [ours, *others.values()]: print(table_row(t, ours))
    print("\n| goal | against | ratio | of CPU time | at least | aim | others |\n|" + "---|" * 7)
    for r in ratios(table):
        goal = title(r | {"name": "", "turn": 0}).removesuffix(", run 1")
        cpu = f"{r['cpu_ratio']:.2f}" if "cpu_ratio" in r else ""
        wanted = f"{r['least']} | {r['aim'] or ''}"
        print(f"| {goal} | {r['against']} | {r['ratio']:.2f} | {cpu} | {wanted} | {r['others']:.2f} |")
    for t in table:
        if t["task"] in APART: print("\n" + json.dumps(rounded(t)))
    for line in lines(table): print("\nline", json.dumps(rounded(line)))


def table_row(t: dict, ours: dict) -> str:
    short, seconds = t["task"] == "short", t["seconds"]
    task = f"{t['task']} {t.get('of', t.get('characters', ''))}".strip()
    wall = f"{seconds * 1e6:.2f} us" if short else f"{seconds:.2f} s"
    speed = "" if short else f"{int(t['size'].removesuffix('MB')) / seconds:.0f}"
    memory = " | " if short else f"{t['anonymous_bytes'] / 1e6:.0f} | {t['hwm_bytes'] / 1e6:.0f}"
    name, same = f"{t['name']} {t['version']}", t.get("same_as_ours", "")
    cpu = f"{t['cpu_seconds'] / ours['cpu_seconds']:.2f}" if "cpu_seconds" in t else ""
    return (f"| {task} | {t['size']} | {t['vocab']:,} | {t['threads']} | {name} | {wall} | {speed} | "
            f"{seconds / ours['seconds']:.2f} | {cpu} | {memory} | {same} | {t['runs']} | {t['others']:.2f} |")


def recorded(path: Path) -> tuple[dict, list[dict]]:
    "A record and all of its entries."
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record, [t for part in ("rows", "line_rows", "cold", "replay", "check") for t in record.get(part, [])]


def merge_entries(old: list[dict], new: list[dict]) -> list[dict]:
    "All entries; of two with the same setting and name the newer one. Whether a result is ours is looked at anew."
    found = {}
    for t in sorted(old + new, key=lambda t: t["date"]): found[setting(t), t["name"]] = t
    for (of, name), t in found.items():
        ours = found.get((of, "ours"), {})
        if "result" in t and "result" in ours: t["same_as_ours"] = t["result"] == ours["result"]
    names = list(PACKAGES)
    return sorted(found.values(), key=lambda t: (place(setting(t)), names.index(t["name"])))


def record(args) -> None:
    "Put the medians into a JSON file that the chapters read, beside what it has already; ratios and lines from all."
    kept, old = recorded(args.output)
    rows = read_here(args) if not old or args.rows.is_file() else []
    table, of = merge_entries(old, medians(rows)), lambda *tasks: [t for t in table if t["task"] in tasks]
    by_date = sorted(table, key=lambda t: t["date"])
    newest, versions = by_date[-1], {t["name"]: t["version"] for t in by_date if "version" in t}
    content = {"machine": newest["machine"], "python": platform.python_version() if rows else kept["python"],
               "date": newest["date"][:10], "text": newest["text"],
               "code": {"training" if trains(t) else "encoding": t["code"] for t in by_date if "code" in t},
               "versions": kept.get("versions", {}) | versions, "ties": TIES, "write_up": WRITE_UP,
               "rows": of(*TASKS[:6]), "ratios": ratios(table), "line": lines(table), "line_rows": of("line"),
               "cold": of("cold"), "replay": of("replay"), "check": of("check")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, (json.dumps(rounded(content), indent=1) + "\n").encode())
    new = sum(t not in old for t in table)
    print(f"{args.output}: {len(table)} rows, {new} of them new, {len(content['ratios'])} ratios")


def missing(args) -> None:
    "Print the rows that a record has not, or with fewer runs than wanted, or of other code of ours than is here now."
    has = {(setting(t), t["name"]): t for t in recorded(args.output)[1]}
    wanted = {}
    for row in all_rows(args):
        if fits(row, args.only): wanted.setdefault((setting(row), row["name"]), []).append(row)
    for key, rows in wanted.items():
        t = has.get(key, {})
        runs, other = t.get("runs", 0), "code" in t and t["code"] != code_hash(rows[0])
        if runs < len(rows) or other:
            why = f"{runs} of {len(rows)} runs" + ", of other code" * other
            print(f"{title(rows[0]).removesuffix(', run 1')}: {why}")


def rounded(value):
    "The same with numbers of four digits."
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(v) for v in value]
    if isinstance(value, float): return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)
    return value


def numbers(text: str) -> list[int]: return [int(part) for part in text.split(",")]


def main() -> None:
    made = {"make": make_tokenizer, "ids": make_ids}
    if sys.argv[1:2] == ["one"]:
        row, files = map(json.loads, sys.argv[2:4])
        return print(json.dumps(globals()["run_" + row["task"]](row, files)), flush=True)
    if sys.argv[1:2] and sys.argv[1] in made: return made[sys.argv[1]](*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    run, shown, to_record, to_miss = (tasks.add_parser(name) for name in ("run", "show", "record", "missing"))
    folder = ROOT / "build" / "benchmark"
    for sub in (run, shown, to_record): sub.add_argument("--rows", type=Path, default=folder / "rows.jsonl")
    for sub in (to_record, to_miss): sub.add_argument("output", type=Path)
    data = Path(os.environ.get("CS336_DATA", ROOT / "data"))
    run.add_argument("--text", type=Path, default=data / "web_train.txt")
    run.add_argument("--work", type=Path, default=folder, help="folder for files that rows need")
    run.add_argument("--gpt2", type=Path, help="folder with GPT-2's two files; else 50,257 entries are trained")
    for sub in (run, to_miss):
        sub.add_argument("--sizes", type=numbers, default=[100, 488], help="megabytes of the text")
        sub.add_argument("--line-sizes", type=numbers, default=list(LINE_SIZES))
        sub.add_argument("--vocab", type=numbers, default=[10_000, 32_000])
        sub.add_argument("--threads", type=numbers, default=[2, 1])
        sub.add_argument("--repeats", type=int, default=5)
        sub.add_argument("--only", nargs="+", default=[])
    run.add_argument("--minutes", type=float, help="start no row after so many minutes")
    run.add_argument("--redo", type=float, default=float("inf"), help="also make rows whose `others` was above this")
    run.add_argument("--timeout", type=float, default=900, help="seconds for a row")
    args = parser.parse_args()
    try: {"run": run_all, "show": show, "record": record, "missing": missing}[args.task](args)
    except KeyboardInterrupt: raise SystemExit("\nstopped; the rows that are done stand in the file") from None
    except subprocess.SubprocessError as error: raise SystemExit(str(error)) from None


if __name__ == "__main__": main()
