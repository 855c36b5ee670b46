"""Two processes train what one does: the same losses, checkpoints for any number of processes, a clean stop, a death."""
import json, os, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cs336_lm.corpora import END_OF_TEXT
from cs336_lm.dataset import encode_file
from cs336_lm.distributed import World
from cs336_lm.tokenizer import Tokenizer
from cs336_lm.training import TrainConfig, list_checkpoints, load_model, open_run, train
from cs336_lm.transformer import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")
WORKER = Path(__file__).parent / "training_worker.py"


def launch(jobs):
    "Two processes do the jobs one after the other; what rank 0 says of each."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, json.dumps(jobs)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: END_OF_TEXT.encode()}, [], [END_OF_TEXT])
    tokenizer.save(folder / "tokenizer")
    (folder / "text").write_text("".join("ab" * (i % 9) + "c" * (i % 7) + END_OF_TEXT for i in range(1, 60)))
    encode_file(tokenizer, folder / "text", folder / "ids.npy")
    model = ModelConfig(vocab_size=257, context_length=12, d_model=16, num_layers=2, num_heads=2, d_ff=32)
    return TrainConfig(name="one", train_tokens=folder / "ids.npy", valid_tokens=folder / "ids.npy", tokenizer=folder / "tokenizer",
                       model=model, batch_size=8, steps=20, max_lr=1e-2, min_lr=1e-3, warmup_steps=3, eval_every=10, eval_batch_size=5,
                       checkpoint_every=4, log_every=3, device="cpu", runs_dir=folder / "runs")


RUNS = {"ddp": {}, "ddp-muon": dict(optimizer="muon"), "ddp-documents": dict(rows="documents", micro_batch=2), "fsdp": dict(strategy="fsdp"),
        "fsdp-documents": dict(strategy="fsdp", rows="documents"), "stopped-ddp": {}, "stopped-fsdp": dict(strategy="fsdp")}


@pytest.fixture(scope="module")
def first(config):
    "All runs on two processes: five finished, two stopped by a signal to one process, one whose process 1 dies in step 14."
    jobs = [{"config": asdict(replace(config, name=name, **change)), "term_at": 13 if "stopped" in name else None}
            for name, change in RUNS.items()]
    return launch(jobs + [{"config": asdict(replace(config, name="dead", strategy="fsdp")), "kill_at": 14}])


def log(config, name):
    "The log's numbers that do not depend on the clock."
    lines = [json.loads(line) for line in (Path(config.runs_dir) / name / "log.jsonl").read_text().splitlines()]
    return [[r.get(k) for k in ("kind", "step", "tokens", "loss", "grad_norm", "lr", "weight_norm", "status")]
            + (r.get("block_rms") or []) for r in lines[1:]], lines[0]


def same(a, b):
    for x, y in zip(a, b, strict=True):
        for u, v in zip(x, y, strict=True): assert u == v or u == pytest.approx(v, rel=2e-4), (x, y)


@pytest.mark.parametrize("name", [name for name in RUNS if "stopped" not in name])
def test_two_processes_log_what_one_does(config, first, name):
    alone = replace(config, **{**RUNS[name], "micro_batch": 0}, name=f"{name}-alone")
    train(alone, progress=False)
    lines, header = log(config, name)
    same(lines, log(config, alone.name)[0])
    assert header["processes"] == 2 and header["parameters"] == log(config, alone.name)[1]["parameters"]
    ours, theirs = (load_model(Path(config.runs_dir) / n)[0] for n in (name, alone.name))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_process_stops_all_at_the_next_log_line(first):
    _, said = first
    for line in said:
        assert line["status"] == ("interrupted" if "stopped" in line["name"] else "finished")
        if "stopped" in line["name"]: assert line["reason"].endswith("at step 15")


def test_the_death_of_a_process_ends_the_job_and_the_log_can_go_on(config, first):
    done, said = first
    assert done.returncode != 0 and [line["name"] for line in said] == list(RUNS), "it never came to an end of the last run"
    assert "stops, as another rank has failed" in done.stderr or "Signal 9" in done.stderr or "SIGKILL" in done.stderr
    assert [p.name for p in list_checkpoints(Path(config.runs_dir) / "dead")] == ["step-0000012.shards", "step-0000008.shards"]


def test_what_stopped_goes_on_with_other_numbers_of_processes(config, first):
    "Shards on one process, one file on two processes with shards, shards on two; all end where the undisturbed run does."
    assert list_checkpoints(Path(config.runs_dir) / "stopped-fsdp")[0].name == "step-0000015.shards"
    assert load_model(Path(config.runs_dir) / "stopped-fsdp")[1] == config.model
    train(replace(config, name="stopped-fsdp"), resume=True, progress=False)
    done, said = launch([{"config": asdict(replace(config, name=name, strategy="fsdp")), "resume": True} for name in ("stopped-ddp", "dead")])
    assert done.returncode == 0 and [line["status"] for line in said] == ["finished"] * 2, done.stderr
    train(config, progress=False)
    for name in "stopped-fsdp", "stopped-ddp", "dead": same(log(config, name)[0], log(config, "one")[0])


def test_batches_that_cannot_be_shared_are_refused(config):
    for change, words in ({"batch_size": 7}, "batch_size 7 cannot be shared equally by 2 processes"), ({"micro_batch": 8}, "the 4 rows that each"):
        with pytest.raises(ValueError, match=words): open_run(replace(config, name="odd", **change), world=World(1, 2, 1, "cpu"))
    assert not (Path(config.runs_dir) / "odd").exists()
