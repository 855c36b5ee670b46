"""Ours and the peers on the same file, in turn: time, CPU time, memory, and whether the merges agree.

    pip install -e '.[bench]'
    python benchmarks/tokenizers.py train --megabytes 100 --vocab 10000 32000 --threads 2 1 --repeats 5
    python benchmarks/tokenizers.py show

Every run is a fresh process; what it found is a line of `benchmarks/tokenizers.jsonl` (--rows for another file). A run
that stands there already is not made again, so the benchmark can be stopped at any time and goes on where it was.
The text is the first part of a corpus in the folder that CS336_DATA names. A peer that is not installed is left out,
with the reason. Import and compilation are measured apart, as "cold" seconds.
"""
import sys
sys.path.pop(0)  # this file has the name of a package that it imports

import argparse, hashlib, importlib.metadata, importlib.util, json, os, platform, statistics, subprocess, tempfile, time
from pathlib import Path

SPECIAL = "<|endoftext|>"
TRAINERS = {"ours": "cs336_lm", "gigabpe": "gigabpe", "gigatoken": "gigatoken", "rustbpe": "rustbpe", "hf": "tokenizers"}
SLOW = {"rustbpe", "hf"}  # run once, whatever --repeats says
# How each breaks ties: only trainers of one rule can agree on every merge.
TIES = {"ours": "greatest bytes", "gigabpe": "smallest ids", "gigatoken": "smallest ids", "rustbpe": "its own", "hf": "smallest ids"}


# -- one run, in a process of its own

def prepare(name: str, threads: int):
    "Import the trainer and, for ours, load its compiled code; a function of (path, vocab_size) that gives merges."
    if name == "ours":
        from cs336_lm import bpe
        if not bpe.merges_ready(): raise SystemExit("numba is missing")
        return lambda path, size: bpe.train_bpe(path, size, [SPECIAL], num_processes=threads)[1]
    if name == "gigatoken":
        import gigatoken
        return lambda path, size: gigatoken.train_bpe(path, size, [SPECIAL], separator=SPECIAL.encode())[1]
    if name == "gigabpe":
        import gigabpe
        return lambda path, size: gigabpe.train_bpe([str(path)], vocab_size=size, special_tokens=[SPECIAL],
                                                    pretokenizer="bytelevel", threads=threads)[1]
    if name == "rustbpe": return prepare_rustbpe()
    return prepare_hf()


def documents(path: Path):
    from cs336_lm.corpora import read_documents
    return read_documents(path, SPECIAL)


def prepare_rustbpe():
    import rustbpe
    from cs336_lm.pretokenization import PATTERN
    def train(path, size):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(documents(path), size - 1, pattern=PATTERN)  # it has no special tokens
        return []
    return train


def prepare_hf():
    import tokenizers
    def train(path, size):
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False)
        model.train_from_iterator(documents(path), trainer)
        return [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    return train


def memory(field: str) -> int:
    "Bytes that /proc/self/status gives for `field`; 0 where there is no such file."
    try: return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
    except (OSError, IndexError): return 0


def printable(merges) -> list[list[str]]:
    "Merges in GPT-2's printable alphabet, in which gigabpe and HF give them."
    shown = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b > 173]
    table = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in shown)}
    return [[part if isinstance(part, str) else "".join(table[b] for b in part) for part in merge] for merge in merges]


def run_one(name: str, path: Path, size: int, threads: int) -> dict:
    "Train once in this process: what was measured."
    started = time.perf_counter()
    train = prepare(name, threads)
    cold, base = time.perf_counter() - started, memory("RssAnon")
    wall, cpu = time.perf_counter(), time.process_time()
    merges = train(path, size)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    merges = printable(merges)
    return {"seconds": wall, "cpu_seconds": cpu, "cold_seconds": cold, "peak_bytes": memory("VmHWM"), "anonymous_bytes_before": base,
            "merges": len(merges), "first_merges": merges[:2000], "sha256": hashlib.sha256(json.dumps(merges).encode()).hexdigest()}


# -- all runs

def version(name: str) -> str | None:
    "The installed version, None if it is not."
    if importlib.util.find_spec(TRAINERS[name]) is None: return None
    try: return importlib.metadata.version(TRAINERS[name])
    except importlib.metadata.PackageNotFoundError: return "here"


def part_of_corpus(megabytes: int, folder: Path) -> Path:
    "The first documents of the web text, about so many megabytes."
    from cs336_lm.corpora import find_corpus
    path = folder / f"web-{megabytes}MB.txt"
    with open(find_corpus("web-488MB").train, "rb") as file: data = file.read(megabytes * 1_000_000)
    path.write_bytes(data[:data.rfind(SPECIAL.encode())])
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def train_all(args) -> None:
    for name in args.only:
        if version(name) is None: print(f"{name}: left out, the package {TRAINERS[name]} is not installed")
    names = [name for name in args.only if version(name)]
    with tempfile.TemporaryDirectory() as folder:
        path = part_of_corpus(args.megabytes, Path(folder))
        for size in args.vocab:
            for threads in args.threads:
                for turn in range(args.repeats):  # in turn, so that a busy minute hits all alike
                    for name in names:
                        if turn == 0 or name not in SLOW: train_row(args, name, path, size, threads, turn)


def train_row(args, name: str, path: Path, size: int, threads: int, turn: int) -> None:
    "Make one run, unless its row is there."
    key = {"task": "train", "name": name, "megabytes": args.megabytes, "vocab": size, "threads": threads, "turn": turn}
    if any(key.items() <= row.items() for row in read_rows(args.rows)): return
    few = {v: str(threads) for v in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    command = [sys.executable, __file__, "one", name, str(path), str(size), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | few)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
    row = key | {"version": version(name), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "load": round(os.getloadavg()[0], 1)} | found
    with open(args.rows, "a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")
    print(f"{name:10} {size:>6,} entries, {threads} thread(s):", f"{row['seconds']:.2f} s wall, {row['cpu_seconds']:.2f} s CPU" if "seconds" in row else row["error"], flush=True)


def agreement(row: dict, ours: dict) -> str:
    "Whether the merges are ours, or how many of the first 2,000 are."
    if row["sha256"] == ours["sha256"]: return "the same"
    if not row["merges"]: return "not given"
    same = next((k for k, (a, b) in enumerate(zip(row["first_merges"], ours["first_merges"])) if a != b), 2000)
    return f"first {same:,} the same"


def show(args) -> None:
    "Medians and ratios as a table."
    rows = [row for row in read_rows(args.rows) if "seconds" in row]
    print("| MB | entries | threads | trainer | wall s | CPU s | wall / ours | CPU / ours | peak MB | cold s | merges | ties | runs | load |\n|" + "---|" * 14)
    for setting in sorted({(r["megabytes"], r["vocab"], r["threads"]) for r in rows}):
        of = {n: [r for r in rows if r["name"] == n and (r["megabytes"], r["vocab"], r["threads"]) == setting] for n in TRAINERS}
        if not of["ours"]: continue
        middle = lambda n, field: statistics.median(r[field] for r in of[n])
        for n, found in of.items():
            if not found: continue
            wall, cpu = middle(n, "seconds"), middle(n, "cpu_seconds")
            print(f"| {setting[0]} | {setting[1]:,} | {setting[2]} | {n} {found[0]['version']} | {wall:.2f} | {cpu:.2f} | {wall / middle('ours', 'seconds'):.2f} |"
                  f" {cpu / middle('ours', 'cpu_seconds'):.2f} | {middle(n, 'peak_bytes') / 1e6:.0f} | {middle(n, 'cold_seconds'):.2f} |"
                  f" {agreement(found[0], of['ours'][0])} | {TIES[n]} | {len(found)} | {min(r['load'] for r in found)} to {max(r['load'] for r in found)} |")


def main() -> None:
    if sys.argv[1:2] == ["one"]: return print(json.dumps(run_one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["train", "show"])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--vocab", type=int, nargs="+", default=[10_000, 32_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    (train_all if args.task == "train" else show)(args)


if __name__ == "__main__": main()
