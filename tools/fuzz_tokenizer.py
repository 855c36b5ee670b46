"""Random texts through the fast and the clear versions of chapters 3 to 6: counts, merges, ids, decoding, files.

    python tools/fuzz_tokenizer.py --seconds 600 --seed 336 --record figures/runs/fuzz.json
    python tools/fuzz_tokenizer.py --engine compiled --seconds 60
    python tools/fuzz_tokenizer.py --engine plain --seconds 60 --mutate tie

Three engines. `compiled` is what users get. `plain` runs the same functions as Python (NUMBA_DISABLE_JIT) and tells
which of their lines it has seen. `atheris` (pip install atheris) lets libFuzzer look for texts that reach new lines of
those. Without --engine all of them run, and each planted mutation must be found: a copy of the package with one change.
The same seed gives the same texts. A difference is shown with the shortest text that was found to show it; the exit
status is then 1.
"""
import argparse, ast, importlib.util, json, os, platform, random, re, shutil, subprocess, sys, tempfile, threading
import time, warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("pretokenization", "bpe", "tokenizer", "dataset")
# name: module, what stands there once, and what is to stand there
MUTATIONS = {
    "class": ("pretokenization", 'table[ord(" ")], table[ord("\'")] = SPACE, QUOTE',
              'table[ord(" ")], table[ord("\'")], table[0x0E46] = SPACE, QUOTE, OTHER'),
    "border": ("pretokenization", "kinds_part_at(text, cut, size, tables): return cut",
               "kinds_part_at(text, cut, size, tables): return cut - 1"),
    "tie": ("bpe", "return order > 0", "return order < 0"),
    "surrogate": ("pretokenization", "if code < least or 0xD800 <= code < 0xE000 or", "if code < least or"),
    "rank": ("tokenizer", "for k in range(16, width + 1): best", "for k in range(17, width + 1): best"),
    "cache": ("tokenizer", "return cache[at] ^ low | (cache[at + np.uint64(1)] ^ high) << np.uint64(4) == np.uint64(0)",
              "return cache[at] == low"),
    "decode": ("tokenizer", "if id >= known: return ~place, n", "if id > known: return ~place, n"),
}


# -- texts

ODD = list("aslvertdm'1½Ⅷ٣ \t\n\r\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff!|<>é日。😀\u0301ー") + [
    "'s", "'ll", "'re", "  ", "\r\n", "<|endoftext|>", "<|end", "|>", "👩\u200d👧", " 'tis", "don't", "…’s"]


class Texts:
    "An endless row of odd texts; it also goes through all code points in their order."

    def __init__(self, seed: int):
        self.rng, self.at, self.edges = random.Random(seed), 0, class_edges()

    def next(self) -> str:
        kinds = (self.dense, self.anywhere, self.row_of_characters, self.at_edges, self.long_words, self.words,
                 self.alike)
        parts = [self.rng.choice(kinds)() for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        return "".join(parts)

    def some(self, items: list, most: int) -> str: return "".join(self.rng.choices(items, k=self.rng.randint(0, most)))

    def dense(self) -> str: return self.some(self.rng.sample(ODD, self.rng.randint(1, len(ODD))), 60)

    def anywhere(self) -> str:
        most = self.rng.choice((0xFF, 0x7FF, 0xFFFF, 0x10FFFF))
        codes = [self.rng.randint(0, most) for _ in range(self.rng.randint(1, 40))]
        return "".join(chr(c) for c in codes if is_character(c))

    def row_of_characters(self) -> str:
        between, start = self.rng.choice(("", "", " ", "a", "1", "'", "a ")), self.at
        self.at = (self.at + 300) % 0x32400  # what comes after is hardly assigned
        return between.join(chr(c) for c in range(start, start + 300) if is_character(c))

    def at_edges(self) -> str:
        near = [c + self.rng.randint(-1, 1) for c in self.rng.choices(self.edges, k=20)]
        return "".join(chr(c) for c in near if 0 <= c < 0x110000 and is_character(c))

    def long_words(self) -> str:
        piece = self.rng.choice(["a", "ab", "é", "日本", "1", "!", " ", "ab ", "😀"])
        width = self.rng.choice((7, 15, 16, 31, 48, 49, 63, 300)) + self.rng.randint(-1, 1)
        return piece * width + self.some(ODD, 3)

    def alike(self) -> str:
        "Words with the same beginning."
        stem = self.rng.choice(("aaaaaaaa", "abababab", "aaaaaaaaaaaa"))
        return "".join(stem + self.some(list("ab"), 4) + self.rng.choice(" \n,") for _ in range(self.rng.randint(2, 9)))

    def words(self) -> str:
        letters = self.rng.choice(("ab", "abcdefgh", "aé日'", "ab12"))
        words = [self.some(list(letters), 9) for _ in range(self.rng.randint(1, 8))]
        ends = " ", " ", "\n", "'s ", ", "
        return "".join(self.rng.choice(words) + self.rng.choice(ends) for _ in range(self.rng.randint(1, 60)))

    def special_tokens(self) -> list[str]:
        if self.rng.random() < 0.4: return ["<|endoftext|>"]
        tokens = [self.some(list("<|> a'sé"), 4) for _ in range(self.rng.randint(0, 4))]
        tokens += [token + self.rng.choice("a>") for token in tokens if self.rng.random() < 0.3]
        return list(dict.fromkeys(token for token in tokens if token))


def is_character(code: int) -> bool: return not 0xD800 <= code < 0xE000


def class_edges() -> list[int]:
    "Where the class of a code point, as the pattern sees it, is another than that of the one before."
    import regex
    every = "".join(chr(c) if is_character(c) else "!" for c in range(0x110000))
    return [place for match in regex.finditer(r"\p{L}+|\p{N}+|\s+", every) for place in match.span()]


# -- checks: functions of a case that return None, or what is different

class Case:
    "A text with everything that is chosen at random beside it."

    def __init__(self, texts: Texts, text: str, number: int, folder: Path):
        rng = random.Random(f"{number} {texts.rng.random()}")
        self.text, self.specials, self.path = text, texts.special_tokens(), folder / "text.txt"
        self.rng_seed = rng.random()
        self.threads, self.chunk = rng.choice((1, 1, 1, 1, 2, 3)), rng.choice((1, 7, 40, 1000, 1 << 20))
        self.merges, self.block = rng.randint(0, rng.choice((40, 300))), rng.choice((16, 64, 1000, 1 << 19))
        self.rows = rng.choice((2, 16, 256, 1 << 16))

    def rng(self) -> random.Random: return random.Random(self.rng_seed)


def without_warnings(call: Callable, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def outcome(call: Callable, *args, **kwargs):
    """The result of a call, or the kind and words of its error.

    A decoder's reason is left out: it says "unexpected end" where a chunk ends right behind the fault."""
    try: return without_warnings(call, *args, **kwargs)
    except (ValueError, OSError) as error:
        return type(error).__name__, re.sub(r"(not UTF-8): [\w ]+ (at)", r"\1 \2", str(error))


class Checks:
    "The fast functions beside the clear ones, on one case."

    def __init__(self):
        from cs336_lm import bpe, dataset, pretokenization, tokenizer
        self.bpe, self.dataset, self.pre, self.tok = bpe, dataset, pretokenization, tokenizer
        self.tokenizers, self.made, self.pool = [], 0, ThreadPoolExecutor(2)
        always_compiled(self.pre, self.bpe, self.tok)
        self.pre.compiled_ready()

    def scan(self, case: Case):
        "The scanners' pieces: 64 bytes at a time, and step by step."
        import numpy as np
        data, tables = case.text.encode(), self.pre.scan_tables(tuple(case.specials))
        text, clear = np.frombuffer(data + b"'ll" + bytes(77), np.uint8), []
        for part, is_special in self.pre.split_special(case.text, case.specials):
            clear += [(part, True)] if is_special else [(piece, False) for piece in self.pre.pretokenize(part)]
        for scanner, kind in ((self.pre.find_starts, np.int32), (self.pre.find_pieces, np.int64)):
            starts = np.zeros(len(data) + 66, kind)
            found = starts[:scanner(text, len(data), tables, starts) + 1].tolist()
            places = [start if start >= 0 else ~start for start in found]
            pieces = [(data[a:b].decode(), start < 0) for start, a, b in zip(found, places, places[1:])]
            if differs := differ(pieces, clear): return f"{scanner.__name__}: {differs}"

    def count(self, case: Case):
        case.path.write_bytes(case.text.encode())
        fast = self.pre.count_pretokens(case.path, case.specials, num_processes=case.threads, chunk_bytes=case.chunk)
        clear = self.pre.count_text(case.text, case.specials)
        return differ([(word.decode(), n) for word, n in fast.items()], list(clear.items()))

    def shards(self, case: Case):
        "Ranges of the file, counted by an executor's workers; the text four times, as it is looked through in windows."
        text = 4 * case.text
        case.path.write_bytes(text.encode())
        fast = self.pre.count_words(case.path, case.specials, executor=self.pool, shard_bytes=case.chunk).counter()
        clear = self.pre.count_text(text, case.specials)
        return differ({word.decode(): n for word, n in fast.items()}, dict(clear))

    def train(self, case: Case):
        if not case.text: return None
        case.path.write_bytes(case.text.encode())
        counts = {word.encode(): n for word, n in self.pre.count_text(case.text, case.specials).items()}
        size = 256 + len(case.specials) + case.merges
        fast = outcome(self.bpe.train_bpe, case.path, size, case.specials, num_processes=case.threads)
        return differ(fast, outcome(self.bpe.train_bpe_naive, counts, size, case.specials))

    def encode(self, case: Case):
        tokenizer = self.tokenizer(case)
        fast, clear = outcome(tokenizer.encode, case.text), outcome(self.clear_ids, tokenizer, case.text)
        if found := differ(fast, clear): return found
        half = len(case.text) // 2
        texts = [case.text[:half], case.text, case.text[half:]]
        fast = tokenizer.encode_batch(texts, num_threads=case.threads)
        return differ(fast, [self.clear_ids(tokenizer, text) for text in texts])

    def stream(self, case: Case):
        tokenizer, rng = self.tokenizer(case), case.rng()
        cuts = sorted(rng.randint(0, len(case.text)) for _ in range(rng.randint(0, 5)))
        pieces = [case.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(case.text)])]
        fast = list(tokenizer.encode_iterable(pieces, block_chars=rng.choice((1, 5, 1024))))
        return differ(fast, self.clear_ids(tokenizer, case.text))

    def decode(self, case: Case):
        import numpy as np
        tokenizer, rng = self.tokenizer(case), case.rng()
        ids = self.clear_ids(tokenizer, case.text)
        if found := differ(tokenizer.decode_bytes(np.array(ids, np.int64)), case.text.encode()): return found
        size = tokenizer.vocab_size
        ids = [rng.choice(ids or [0]) for _ in ids] + rng.choice(([], [], [size], [-1], [size + 5]))
        fast = outcome(tokenizer.decode_bytes, np.array(ids, np.int64))
        return differ(fast, outcome(self.tok.join_tokens, tokenizer.vocab, ids))

    def file(self, case: Case):
        if not case.text: return None
        import numpy as np
        tokenizer, output = self.tokenizer(case), case.path.with_suffix(".npy")
        case.path.write_bytes(case.text.encode())
        self.dataset.SHARD_BYTES = case.chunk
        how = dict(executor=self.pool) if case.threads == 3 else dict(num_threads=case.threads)
        about = without_warnings(self.dataset.encode_file, tokenizer, case.path, output, **how)
        found = differ(np.load(output).tolist(), self.clear_ids(tokenizer, case.text))
        return found or differ(about.bytes, len(case.text.encode()))

    def not_utf8(self, case: Case):
        "Bytes changed at random: the same error at the same place, and nothing under the output's name."
        data, rng = bytearray(case.text.encode()), case.rng()
        for _ in range(rng.randint(1, 3)):
            if data: data[rng.randrange(len(data))] = rng.choice((0x80, 0xC0, 0xE3, 0xED, 0xA0, 0xF4, 0xFF, 0x41))
        data += rng.choice((b"", b"\xe3\x81", b"\xf0", b"\xed\xa0\x80"))
        if not data: return None
        case.path.write_bytes(data)
        clear = outcome(self.pre.count_pretokens_clear, case.path, case.specials)
        fast = outcome(self.pre.count_pretokens, case.path, case.specials, num_processes=case.threads,
                       chunk_bytes=case.chunk)
        if found := differ(fast, clear): return found
        tokenizer, output = self.tokenizer(case), case.path.with_suffix(".npy")
        output.unlink(missing_ok=True)
        done = outcome(self.dataset.encode_file, tokenizer, case.path, output, num_threads=case.threads)
        if isinstance(clear, tuple): return differ((done, output.exists()), (clear, False))
        return None if output.exists() else f"{done}: no output for a good file"

    def clear_ids(self, tokenizer, text: str) -> list[int]:
        "By the definition of the clear chapter, without its cache."
        ids = []
        for part, is_special in self.tok.text_parts(text, tokenizer.special_tokens):
            tokens = [part.encode()] if is_special else self.tok.merge_by_rank(part.encode(), tokenizer._ranks)
            ids += [tokenizer._ids[token] for token in tokens]
        return ids

    def tokenizer(self, case: Case):
        """One of a few tokenizers with merges of earlier texts, so that word caches fill; each is replaced in the end.

        At times, with none left, the encoder's blocks and word caches get other sizes."""
        rng = case.rng()
        if self.made % 10 in (0, 9):
            self.tokenizers, self.tok.BLOCK_BYTES, self.tok.CACHE_ROWS = [], case.block, case.rows
        if len(self.tokenizers) < 4 or rng.random() < 0.02:
            self.tokenizers, self.made = [*self.tokenizers[-3:], self.new_tokenizer(case, rng)], self.made + 1
        return self.tokenizers[rng.randrange(len(self.tokenizers))]

    def new_tokenizer(self, case: Case, rng: random.Random):
        "Half of the vocabularies are trained; half join any two tokens, as no trainer would. Ids may be shuffled."
        words = Counter(re.findall(r"\S+|\s+", case.text + " the cat's hat, 日本語 aaaa")).items()
        counts = {word.encode(): n for word, n in words}
        vocab, merges = without_warnings(self.bpe.train_bpe_naive, counts, 256 + case.merges, [])
        few = [b"a", b"b", b" ", b"'", b"s", b"\xe6"]
        if rng.random() < 0.5: merges = any_merges(rng, list(vocab.values())[-40:] + few)
        tokens = list(dict.fromkeys([bytes([b]) for b in range(256)] + [a + b for a, b in merges]))
        ids = list(range(len(tokens)))
        if rng.random() < 0.5: rng.shuffle(ids)
        shift = rng.choice((0, 0, 70_000))
        made = self.tok.Tokenizer({id + shift: token for id, token in zip(ids, tokens)}, merges, case.specials)
        if made.fast is None: raise AssertionError("the compiled encoder refuses to serve: it failed its own trial")
        return made


def any_merges(rng: random.Random, tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    "Merges of any two tokens that there are by then; some may stand there more than once."
    merges, made = [], {bytes([b]) for b in range(256)}
    if rng.random() < 0.7:  # tokens of up to 64 bytes
        merges = [(b"a" * n, b"a" * n) for n in (1, 2, 4, 8, 16, 32)]
        merges += [(b"a", b"b"), (b"ab", b"ab"), (b"abab", b"abab")]
        made |= {left + right for left, right in merges}
    for _ in range(rng.randint(1, 40)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        again = merges and rng.random() < 0.1
        if again: left, right = rng.choice(merges)
        if again or {left, right} <= made and len(left + right) < 30 and (left, right) not in merges:
            merges.append((left, right))
            tokens.append(left + right)
            made.add(left + right)
    return merges


def differ(fast, clear) -> str | None:
    if fast == clear: return None
    if isinstance(fast, list) and isinstance(clear, list):
        at = next((i for i, (a, b) in enumerate(zip(fast, clear)) if a != b), min(len(fast), len(clear)))
        return f"entry {at} of {len(fast)} and {len(clear)}: {fast[at:at + 3]!r} for {clear[at:at + 3]!r}"
    return f"{str(fast)[:200]} for {str(clear)[:200]}"


LEAST_SIZES = "MIN_COMPILED_BYTES", "MIN_COMPILED_WORD_BYTES", "LOAD_CHARS", "FAST_CHARS", "FAST_IDS", "LARGE_PIECE"


def always_compiled(*modules) -> None:
    "Let compiled code serve texts of any size."
    for module in modules:
        for name in LEAST_SIZES:
            if hasattr(module, name): setattr(module, name, 1 if name == "LARGE_PIECE" else 0)


NAMES = ("scan", "count", "shards", "train", "encode", "stream", "decode", "file", "not_utf8")


def failure(checks: Checks, name: str, case: Case) -> str | None:
    try: return getattr(checks, name)(case)
    except Exception as error: return f"{type(error).__name__}: {error}"


def shortest(checks: Checks, name: str, case: Case, seconds: float = 5) -> str:
    "A shorter text that fails too, found by leaving parts out."
    stop, text, start = time.monotonic() + seconds, case.text, 0
    width = max(1, len(text) // 2)
    while width and time.monotonic() < stop:
        case.text = text[:start] + text[start + width:]
        if failure(checks, name, case): text = case.text
        else: start += width
        if start >= len(text): start, width = 0, width // 2
    return text


# -- engines: each in a process of its own

def run_engine(engine: str, seed: int, seconds: float) -> dict:
    "Compare for so many seconds; what was done, and the first difference."
    seen = Seen() if engine == "plain" else None
    checks, texts, executions = Checks(), Texts(seed), Counter()
    if seen: seen.start()
    found, began, number, size = None, time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        while found is None and (time.monotonic() - began < seconds or not number):
            number += 1
            case = Case(texts, texts.next(), number, Path(folder))
            size += len(case.text.encode())
            for name in NAMES:
                executions[name] += 1
                if found := failure(checks, name, case):
                    found = {"check": name, "text_number": number, "said": found, "text": shortest(checks, name, case),
                             "special_tokens": case.specials}
                    break
            if number == 1: began = time.monotonic()  # the first text has waited for the compiler
    about = {"texts": number, "bytes": size, "executions": executions.total(), "by_check": dict(executions),
             "seconds": round(time.monotonic() - began, 1), "different": found}
    return about | ({"coverage": seen.coverage()} if seen else {})


class Seen:
    "Which lines of the compiled functions have run, as Python."

    def __init__(self):
        self.files, self.lines = {}, set()
        for module in MODULES:
            path = importlib.util.find_spec(f"cs336_lm.{module}").origin
            self.files[path] = module, compiled_lines(Path(path))

    def start(self) -> None:
        sys.settrace(self.call)
        threading.settrace(self.call)

    def call(self, frame, event, argument): return self.line if frame.f_code.co_filename in self.files else None

    def line(self, frame, event, argument):
        if event == "line": self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line

    def coverage(self) -> dict:
        "For each module the lines of compiled functions: how many there are, how many ran, which did not."
        sys.settrace(None)
        found = {}
        for path, (module, lines) in self.files.items():
            ran = {n for file, n in self.lines if file == path} & lines
            text = Path(path).read_text(encoding="utf-8").splitlines()
            not_run = [text[n - 1].strip() for n in sorted(lines - ran)]
            if lines: found[module] = {"lines": len(lines), "ran": len(ran), "not_run": not_run}
        return found


def compiled_lines(path: Path) -> set[int]:
    "The lines with code inside functions that are marked @compiled."
    source = path.read_text(encoding="utf-8")
    marked = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
              and any("compiled" in ast.unparse(decorator) for decorator in node.decorator_list)]
    inside = {n for node in marked for n in range(node.body[0].lineno, node.end_lineno + 1)}
    functions = [code for code in codes(compile(source, str(path), "exec")) if code.co_name != "<module>"]
    return {line for code in functions for _, _, line in code.co_lines() if line in inside}


def codes(code) -> Iterator:
    yield code
    for inner in code.co_consts:
        if hasattr(inner, "co_lines"): yield from codes(inner)


def run_atheris(seed: int, seconds: float) -> None:
    "libFuzzer chooses the text and the seed of the rest; it ends the process."
    import atheris
    with atheris.instrument_imports(include=[f"cs336_lm.{module}" for module in MODULES]):
        checks = Checks()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    texts = Texts(seed)
    def one(data: bytes):
        provider = atheris.FuzzedDataProvider(data)
        texts.rng.seed(provider.ConsumeIntInRange(0, 1 << 16))
        case = Case(texts, provider.ConsumeUnicodeNoSurrogates(200), 0, folder)
        for name in NAMES:
            if found := failure(checks, name, case):
                found = {"check": name, "said": found, "text": case.text, "special_tokens": case.specials}
                print(json.dumps(found), flush=True)
                os._exit(77)
    options = f"-max_total_time={int(seconds)}", f"-seed={seed}", "-print_final_stats=1", "-max_len=600"
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def engine_process(engine: str, seed: int, seconds: float, package: Path = ROOT) -> dict:
    "Run an engine in a process that imports the package from `package`."
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    if engine != "compiled": env["NUMBA_DISABLE_JIT"] = "1"
    if package != ROOT: env["NUMBA_CACHE_DIR"] = str(package / "cache")
    command = [sys.executable, __file__, "--inside", engine, "--seed", str(seed), "--seconds", str(seconds)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if engine == "atheris": return atheris_result(done, lines, seconds)
    if done.returncode or not lines: raise SystemExit(f"the engine {engine} broke off: {done.stderr.strip()[-500:]}")
    return json.loads(lines[-1])


def atheris_result(done, lines: list[str], seconds: float) -> dict:
    number = lambda pattern: int((re.findall(pattern, done.stderr) or ["0"])[-1])
    found = json.loads(lines[-1]) if done.returncode == 77 and lines else None
    if found is None and "number_of_executed_units" not in done.stderr:
        raise SystemExit(f"atheris broke off: {done.stderr.strip()[-500:]}")
    texts = number(r"number_of_executed_units: (\d+)")
    return {"texts": texts, "executions": texts * len(NAMES), "seconds": seconds, "different": found,
            "edges_covered": number(r"cov: (\d+)")}


def mutated(name: str, folder: Path) -> Path:
    "A copy of the package with one change."
    module, old, new = MUTATIONS[name]
    shutil.copytree(ROOT / "cs336_lm", folder / "cs336_lm", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "cs336_lm" / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise SystemExit(f"the mutation {name} fits {source.count(old)} places of {module}.py, not one: see MUTATIONS")
    path.write_text(source.replace(old, new), encoding="utf-8")
    return folder


def find_mutation(name: str, engine: str, seed: int, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        done = engine_process(engine, seed, seconds, mutated(name, Path(folder)))
    (module, old, new), found = MUTATIONS[name], done["different"]
    return {"module": module, "instead_of": old, "planted": new, "engine": engine, "caught": found is not None,
            "executions": done["executions"], "by": found and found["check"]}


def show(engine: str, done: dict) -> None:
    found = f"DIFFERENT: {json.dumps(done['different'])}" if done["different"] else "no difference"
    print(f"{engine}: {done['executions']:,} executions on {done['texts']:,} texts in {done['seconds']:.0f} s, {found}")
    for module, lines in done.get("coverage", {}).items():
        print(f"  {module}: {lines['ran']} of {lines['lines']} compiled lines ran", flush=True)


SHARES = {"compiled": 0.6, "plain": 0.25, "atheris": 0.15}


def run(args) -> int:
    "The engines one after the other, then the mutations; 0 if all is as it should be."
    engines = [args.engine] if args.engine else [e for e in SHARES if e != "atheris" or importlib.util.find_spec(e)]
    parts = {engine: SHARES[engine] / sum(SHARES[e] for e in engines) for engine in engines}
    done, mutations = {}, {}
    for engine in engines:
        done[engine] = engine_process(engine, args.seed, args.seconds * parts[engine])
        show(engine, done[engine])
    for name in [] if args.engine else MUTATIONS:
        found = mutations[name] = find_mutation(name, "compiled", args.seed, 120)
        verdict = f"caught by {found['by']}" if found["caught"] else "MISSED"
        print(f"{name}: {verdict} after {found['executions']:,} executions", flush=True)
    about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(), "seed": args.seed}
    about |= {field: round(sum(d[field] for d in done.values())) for field in ("executions", "seconds")}
    text = json.dumps(about | {"engines": done, "mutations": mutations}, indent=1) + "\n"
    if args.record: args.record.write_text(text, encoding="utf-8")
    good = not any(d["different"] for d in done.values()) and all(m["caught"] for m in mutations.values())
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=336)
    parser.add_argument("--engine", choices=["compiled", "plain", "atheris"], help="only this one, and no mutations")
    parser.add_argument("--mutate", choices=list(MUTATIONS), help="plant this one; the exit status is 0 if it is found")
    parser.add_argument("--record", type=Path, help="write what was done to this JSON file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside == "atheris": run_atheris(args.seed, args.seconds)
    if args.inside: print(json.dumps(run_engine(args.inside, args.seed, args.seconds)))
    elif args.mutate:
        found = find_mutation(args.mutate, args.engine or "compiled", args.seed, args.seconds)
        print(json.dumps(found, indent=1))
        return int(not found["caught"])
    else: return run(args)
    return 0


if __name__ == "__main__": sys.exit(main())
