"""The engine's own `train` on several processes against one: the same losses at the same whole batch, and the death of a rank.

    python benchmarks/distributed_training.py --tokens T.npy                     2 GPUs by NCCL (or 2 CPU processes by gloo)
    python benchmarks/distributed_training.py --tokens T.npy --record FILE.json  also put what was found into that record, under "engine"
    python benchmarks/distributed_training.py --tokens T.npy --speed             instead: tokens a second, compiled, 256 rows a rank

A plain program: it starts torchrun itself, three times. One process trains with the whole batch; `--ranks` processes do the same with
DDP and with FSDP2, in float32 and (on GPUs) bfloat16; then a rank is killed between two steps, once under each, and the run is resumed:
under DDP on as many processes, under FSDP2, from its shards, on one. Neither compiled code nor chapter 09b's kernels: FSDP2 has not the same.
"""
import sys
sys.path.pop(0)  # this folder, whose files have the names of other modules
import argparse, json, os, re, signal, subprocess, tempfile, time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from cs336_lm import training
from cs336_lm.distributed import processes
from cs336_lm.training import TrainConfig, config_from_dict, device_name, list_checkpoints, train
from cs336_lm.transformer import ModelConfig

CUDA = torch.cuda.is_available()
MODEL = ModelConfig() if CUDA else ModelConfig(context_length=32, d_model=32, num_layers=2, num_heads=2, d_ff=64)
STEPS, EVERY, KILLED_AT = 40, 10, 25
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # nats, of any step's loss


def base(tokens: Path, valid: Path, runs: Path) -> TrainConfig:
    return TrainConfig(name="base", train_tokens=tokens, valid_tokens=valid, model=MODEL, batch_size=64 if CUDA else 8, steps=STEPS, max_lr=1e-3 if CUDA else 3e-2, min_lr=1e-4,
                       warmup_steps=5, eval_every=0, checkpoint_every=EVERY, keep_checkpoints=0, log_every=1, compile="off", kernels="off", runs_dir=runs)


def short_copy(tokens: Path, folder: Path, count: int = 65_536) -> Path:
    "A token file of the first tokens, to evaluate on."
    about = json.loads(tokens.with_suffix(".json").read_text())
    ids = np.load(tokens, mmap_mode="r")[:count]
    np.save(folder / "valid.npy", ids)
    about |= {"path": "valid.npy", "tokens": len(ids), "bytes": max(1, about["bytes"] * len(ids) // about["tokens"])}
    (folder / "valid.json").write_text(json.dumps(about))
    return folder / "valid.npy"


def work(jobs: list[dict]) -> None:
    "What each process does: train the jobs' runs one after the other; a job may say at which step rank 1 kills itself."
    plain_step = training.next_step
    if not CUDA: torch.set_num_threads(1)
    with processes("auto", timeout=60) as world:
        for job in jobs:
            def step(run, job=job):
                plain_step(run)
                if world.rank == 1 and run.step == job.get("kill_at"): os.kill(os.getpid(), signal.SIGKILL)
            training.next_step = step
            train(config_from_dict(job["config"]), resume=job.get("resume", False), progress=False)


def start(jobs: list[dict], ranks: int) -> subprocess.Popen:
    "The processes that do the jobs; they write into a file, which a full pipe would not let them do."
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if "--shutdown-timeout" in (Path(torch.__file__).parent / "distributed/run.py").read_text(): launcher += ["--shutdown-timeout", "10"]
    said = tempfile.TemporaryFile("w+")
    process = subprocess.Popen([*launcher, str(Path(__file__).resolve()), "--jobs", json.dumps(jobs)], stdout=said, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "4" if CUDA else "1"})
    process.said = said
    return process


def finish(process: subprocess.Popen, expect_failure: bool = False) -> str:
    "What the processes have said; ends this program where they did not end as expected."
    status = process.wait()
    process.said.seek(0)
    said = process.said.read()
    if (status != 0) != expect_failure: sys.exit(f"the processes ended with status {status}:\n{said[-6_000:]}")
    return said


def curve(config: TrainConfig) -> list[float]:
    "The loss of every step in a run's log, and last its validation loss."
    records = [json.loads(line) for line in (Path(config.runs_dir) / config.name / "log.jsonl").read_text().splitlines()]
    assert records[-1]["status"] == "finished", f"{config.name}: {records[-1]}"
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, STEPS + 1)), f"{config.name}: steps are missing in its log"
    return losses + [r["loss"] for r in records if r["kind"] == "eval"][-1:]


def furthest(a: list[float], b: list[float]) -> float: return max(abs(x - y) for x, y in zip(a, b, strict=True))


def ended(said: str, config: TrainConfig, seconds: float) -> dict:
    "What a killed job leaves: what torchrun says of the first failure, and the checkpoints."
    cause = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", said, re.S)
    assert cause, f"torchrun names no cause:\n{said[-3_000:]}"
    return {"rank": int(cause[1]), "exitcode": int(cause[2]), "seconds_to_the_end": round(seconds, 1),
            "others_say": any("as another rank has failed" in line for line in said.splitlines()),
            "checkpoints": [p.name for p in list_checkpoints(Path(config.runs_dir) / config.name)]}


def losses_and_deaths(basis: TrainConfig, ranks: int) -> dict:
    precisions = ("fp32", "bf16") if CUDA else ("fp32",)
    one = {p: replace(basis, name=f"one-{p}", precision=p) for p in precisions}
    in_parts = {p: replace(c, name=f"parts-{p}", micro_batch=c.batch_size // ranks) for p, c in one.items()}
    many = {(s, p): replace(basis, name=f"{s}-{p}", precision=p, strategy=s) for p in precisions for s in ("ddp", "fsdp")}
    last = precisions[-1]
    killed = {s: replace(many[s, last], name=f"killed-{s}", keep_checkpoints=2) for s in ("ddp", "fsdp")}
    job = lambda config, **more: {"config": asdict(config), **more}
    found = {"ranks": ranks, "batch_size": basis.batch_size, "steps": STEPS, "curves": {}, "apart": {}, "in_parts": {}, "killed": {}}

    alone = start([job(c) for c in (*one.values(), *in_parts.values())], 1)
    began = time.time()
    said = finish(start([*(job(c) for c in many.values()), job(killed["ddp"], kill_at=KILLED_AT)], ranks), expect_failure=True)
    found["killed"]["ddp"] = ended(said, killed["ddp"], time.time() - last_line(killed["ddp"]))
    finish(alone)
    print(f"one process, and {ranks} with DDP and FSDP2: {time.time() - began:.0f} s", flush=True)

    said = finish(start([job(killed["ddp"], resume=True), job(killed["fsdp"], kill_at=KILLED_AT)], ranks), expect_failure=True)
    found["killed"]["fsdp"] = ended(said, killed["fsdp"], time.time() - last_line(killed["fsdp"]))
    print(f"DDP resumed, FSDP2 killed: {time.time() - began:.0f} s", flush=True)
    finish(start([job(killed["fsdp"], resume=True)], 1))

    for p in precisions:
        found["curves"][p] = {"one": curve(one[p])} | {s: curve(many[s, p]) for s in ("ddp", "fsdp")}
        found["apart"][p] = {s: furthest(found["curves"][p]["one"], found["curves"][p][s]) for s in ("ddp", "fsdp")}
        found["in_parts"][p] = furthest(found["curves"][p]["one"], curve(in_parts[p]))
        print(f"{p} one process from itself, the batch in parts: {found['in_parts'][p]:.1e}", flush=True)
        for s, apart in found["apart"][p].items(): print(f"{p} {s:5} loss {curve(one[p])[0]:.3f} -> {curve(one[p])[-2]:.3f}, furthest from one process {apart:.1e}", flush=True)
    for s, config in killed.items():
        death = found["killed"][s]
        death["apart"], death["resumed_on"] = furthest(curve(config), curve(many[s, last])), ranks if s == "ddp" else 1
        print(f"{s:5} rank {death['rank']} killed in step {KILLED_AT} (exit code {death['exitcode']}), the job ended within {death['seconds_to_the_end']} s; left {', '.join(death['checkpoints'])}; "
              f"resumed on {death['resumed_on']}, furthest from the undisturbed run {death['apart']:.1e}", flush=True)
    return found


def complaints(found: dict) -> Iterator[str]:
    "What is not as it must be."
    for p, apart in found["apart"].items():
        limit = TOLERANCE[p]
        for s, nats in apart.items():
            if not nats < limit: yield f"{p} {s}: {nats} nats from one process, more than {limit}"
    for s, death in found["killed"].items():  # in the last precision
        if not death["apart"] < limit: yield f"{s}, resumed: {death['apart']} nats from the undisturbed run, more than {limit}"
        if (death["rank"], death["exitcode"]) != (1, -signal.SIGKILL): yield f"{s}: torchrun blames rank {death['rank']}, exit code {death['exitcode']}"
        if len(death["checkpoints"]) != 2 or str(KILLED_AT // EVERY * EVERY) not in death["checkpoints"][0]: yield f"{s}: left {death['checkpoints']}"


def last_line(config: TrainConfig) -> float:
    "When the killed run's log was last written to; its steps then went on for a moment at most."
    return (Path(config.runs_dir) / config.name / "log.jsonl").stat().st_mtime


def speed(basis: TrainConfig, ranks: int) -> dict:
    "Tokens a second of the second half of a run, all ranks together, as `cs336 train` runs them."
    rows, found = 256 if CUDA else 8, {}
    fast = replace(basis, steps=200 if CUDA else STEPS, log_every=10, compile="auto", kernels="auto")
    runs = {"one": (1, replace(fast, name="fast-one", batch_size=rows)),
            **{s: (ranks, replace(fast, name=f"fast-{s}", batch_size=rows * ranks, strategy=s)) for s in ("ddp", "fsdp")}}
    for name, (count, config) in runs.items():
        finish(start([{"config": asdict(config)}], count))
        records = [json.loads(line) for line in (Path(config.runs_dir) / config.name / "log.jsonl").read_text().splitlines()]
        lines = [r for r in records if r["kind"] == "step" and r["step"] >= config.steps // 2]
        found[name] = {"rows_a_rank": rows, "tokens_per_second": (lines[-1]["tokens"] - lines[0]["tokens"]) / (lines[-1]["seconds"] - lines[0]["seconds"])}
        print(f"{name:5} {rows} rows a rank, compiled: {found[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, help="token file of at most 10,000 different ids")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if CUDA else 2)
    parser.add_argument("--record", type=Path, help="JSON file; what it holds besides stays")
    parser.add_argument("--speed", action="store_true", help="only measure tokens a second")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs: return work(json.loads(args.jobs))
    if not args.tokens or not args.tokens.is_file(): parser.error(f"no token file {args.tokens}; make one with cs336 encode")
    if args.ranks < 2: parser.error(f"--ranks {args.ranks}: at least 2, on GPUs at most as many as there are")
    with tempfile.TemporaryDirectory() as folder:
        basis = base(args.tokens.resolve(), short_copy(args.tokens, Path(folder)), Path(folder) / "runs")
        found = {"speed": speed(basis, args.ranks)} if args.speed else losses_and_deaths(basis, args.ranks)
    if args.record: put_into(args.record, found)
    if not args.speed and (wrong := list(complaints(found))): sys.exit("\n".join(wrong))


def put_into(file: Path, found: dict) -> None:
    "Add what was found to a record; what it holds besides stays."
    record = json.loads(file.read_text()) if file.is_file() else {}
    about = {"device": device_name(torch.device("cuda" if CUDA else "cpu")), "torch": torch.__version__, "date": date.today().isoformat()}
    record["engine"] = record.get("engine", {}) | about | found
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__": main()
