"The benchmark of tokenizers on a text of a few kilobytes: rows, resuming, and what goes wrong."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = "It was a text of 7 words, wasn't it? Größe, 日本語 and more.\n" * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    (path / "text.txt").write_text("<|endoftext|>".join([DOCUMENT] * 30), encoding="utf-8")
    return path


def bench(*arguments, expect: int = 0, **env) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "tokenizers.py"), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(folder: Path, *only, **more) -> str:
    few = "--repeats", 1, "--sizes", 1, "--vocab", 280, "--threads", 1
    return bench("run", "--text", folder / "text.txt", "--work", folder, "--rows", folder / "rows.jsonl", *few, "--only", *only, **more)


def test_rows_are_made_once_and_recorded(folder):
    assert "1 rows, 0 of them done" in run(folder, "train", "ours")
    assert "1 rows, 1 of them done" in run(folder, "train", "ours")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["merges"] == 23 and rows[0]["seconds"] > 0
    shown = bench("show", "--rows", folder / "rows.jsonl")
    assert "| train | 1MB | 280 | 1 | ours" in shown
    bench("record", folder / "record.json", "--rows", folder / "rows.jsonl")
    record = json.loads((folder / "record.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["ours"] and record["machine"] in rows[0]["machine"]


def test_peers_are_compared(folder):
    pytest.importorskip("rustbpe")
    run(folder, "train,replay", "ours,rustbpe")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    replayed = {row["name"]: (row["most_frequent"], row["merges"]) for row in rows if row["task"] == "replay"}
    assert replayed == {"ours": (23, 23), "rustbpe": (23, 23)}


def test_a_missing_peer_is_named(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import importlib.util as u; f = u.find_spec\n"
                                               "u.find_spec = lambda n, *a: None if n == 'gigabpe' else f(n, *a)\n")
    said = run(folder, "train", "gigabpe", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "gigabpe is left out: pip install gigabpe" in said and "0 rows" in said


def test_faults_are_told_in_a_line(folder):
    said = bench("run", "--text", folder / "no.txt", "--rows", folder / "rows.jsonl", expect=1)
    assert said.startswith(f"{folder / 'no.txt'}: there is no such file") and said.count("\n") == 1
    assert "has no rows" in bench("show", "--rows", folder / "none.jsonl", expect=1)


def made_up(name: str, seconds: float, date: str, **more) -> dict:
    "A row as `run` leaves it."
    return {"task": "train", "name": name, "size": "100MB", "vocab": 10000, "threads": 1, "turn": 0, "machine": "a machine, 2 cores",
            "text": "text.txt", "version": "1", "code": "c0de", "seconds": seconds, "cpu_seconds": seconds, "anonymous_bytes": 5_000_000,
            "hwm_bytes": 9_000_000, "others": 0.0, "sha256": "ab" * 32, "date": date, "commit": "abc1234", "load": 0.1, "tries": 1} | more


def record(path: Path, *rows: dict) -> dict[tuple, dict]:
    "What the record has after these rows, made in a file of their own, were put into it."
    of_rows = path.with_suffix(".jsonl")
    of_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench("record", path, "--rows", of_rows)
    made = json.loads(path.read_text())
    return made | {(t["name"], t["task"], t["size"]): t for part in ("rows", "line_rows", "cold") for t in made[part]}


def test_a_record_keeps_what_it_has(tmp_path):
    path, peer = tmp_path / "record.json", made_up("gigabpe", 3.0, "2026-01-02T00:00:00Z", version="2", sha256="cd" * 32)
    first = record(path, *(made_up("ours", 1.0 + turn, f"2026-01-01T00:00:0{turn}Z", turn=turn) for turn in range(3)), peer)
    ours = first["ours", "train", "100MB"]
    assert (ours["seconds"], ours["runs"], ours["date"], ours["commit"]) == (2.0, 3, "2026-01-01T00:00:02Z", "abc1234")
    assert [r["ratio"] for r in first["ratios"]] == [1.5] and first["versions"] == {"ours": "1", "gigabpe": "2"}

    newer = made_up("ours", 1.5, "2026-01-03T00:00:00Z", commit="def5678", code="other")
    second = record(path, newer, made_up("ours", 7.0, "2026-01-03T00:00:01Z", size="488MB", commit="def5678", code="other"))
    assert second["gigabpe", "train", "100MB"] == first["gigabpe", "train", "100MB"], "what was not made again stays as it was"
    ours = second["ours", "train", "100MB"]
    assert (ours["seconds"], ours["runs"], ours["commit"], ours["code"]) == (1.5, 1, "def5678", "other")
    assert second["ours", "train", "488MB"]["machine"] == "a machine, 2 cores" and [r["ratio"] for r in second["ratios"]] == [2.0]

    third = record(path, made_up("ours", 9.0, "2025-12-31T00:00:00Z"))
    assert third == second, "an older row takes nobody's place"

    fourth = record(path, made_up("gigabpe", 2.5, "2026-01-04T00:00:00Z", machine="another machine, 4 cores"))
    assert fourth["gigabpe", "train", "100MB"]["machine"] == fourth["machine"] == "another machine, 4 cores"
    assert fourth["ratios"] == [] and fourth["ours", "train", "100MB"]["machine"] == "a machine, 2 cores"


def test_results_are_compared_whenever_they_were_made(tmp_path):
    path, encode = tmp_path / "record.json", dict(task="encode", vocab=32000)
    record(path, made_up("ours", 1.0, "2026-01-01T00:00:00Z", **encode))
    for sha256, same in (("ab" * 32, True), ("cd" * 32, False)):
        made = record(path, made_up("tiktoken", 9.0, "2026-01-02T00:00:00Z", **encode, sha256=sha256))
        assert made["tiktoken", "encode", "100MB"]["same_as_ours"] is same


def test_medians_reach_into_the_parts_of_a_row(tmp_path):
    cold = [made_up("ours", 1.0, f"2026-01-01T00:00:0{turn}Z", task="cold", size="5MB", turn=turn, right=turn != 2,
                    **{"import": turn / 10, "empty": {"import": float(turn), "seconds": 20.0}}) for turn in range(3)]
    found = record(tmp_path / "record.json", *cold)["ours", "cold", "5MB"]
    assert found["import"] == 0.1 and found["empty"] == {"import": 1.0, "seconds": 20.0} and found["runs"] == 3 and found["right"] is False


def test_lines_go_through_points_of_several_sittings(tmp_path):
    path = tmp_path / "record.json"
    point = lambda size, seconds, day: made_up("ours", seconds, f"2026-01-0{day}T00:00:00Z", task="line", of="train", size=f"{size}MB", bytes=size * 10**6)
    assert record(path, point(100, 1.0, 1), point(200, 2.0, 1))["line"] == []
    line, = record(path, point(1000, 10.0, 2))["line"]
    assert len(line["points"]) == 3 and line["seconds_per_GB"] == pytest.approx(10, rel=1e-3)
    line, = record(path, point(1000, 20.0, 3))["line"]
    assert [seconds for _, seconds, _ in sorted(line["points"])] == [1, 2, 20]


def test_a_record_tells_what_it_lacks(tmp_path):
    path, few = tmp_path / "record.json", ("--sizes", 100, "--vocab", 10000, "--threads", 1, "--repeats", 2, "--only", "train", "ours,gigabpe,hf")
    said = bench("missing", path, *few).splitlines()
    assert said == ["train ours 100MB 10,000 1 thread(s): 0 of 2 runs", "train gigabpe 100MB 10,000 1 thread(s): 0 of 2 runs",
                    "train hf 100MB 10,000 1 thread(s): 0 of 1 runs"]
    rows = [made_up(name, 1.0, "2026-01-01T00:00:00Z", turn=turn) for name in ("ours", "hf") for turn in range(2)]
    for row in rows:
        if row["name"] != "ours": del row["code"]
    record(path, *rows)
    assert bench("missing", path, *few).splitlines() == ["train ours 100MB 10,000 1 thread(s): 2 of 2 runs, of other code",
                                                         "train gigabpe 100MB 10,000 1 thread(s): 0 of 2 runs"]


def test_rows_tell_their_commit(folder):
    run(folder, "train", "ours")
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    told = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if told.returncode: pytest.skip("no git here")
    assert told.stdout.startswith(row["commit"].rstrip("+")) and len(row["commit"]) > 6
