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
