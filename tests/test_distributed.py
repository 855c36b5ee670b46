"""Chapter 10b: two processes train the model that one does, and a job that dies says why and goes on."""
import json, os, pickle, shutil, subprocess, sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from cs336_lm import distributed as d
from cs336_lm.accounting import count_parameters, memory_bytes
from cs336_lm.dataset import IGNORE_INDEX
from cs336_lm.transformer import PRESETS, ModelConfig, TransformerLM

sys.path.insert(0, str(Path(__file__).parent))
import distributed_worker as worker

WORKER = Path(worker.__file__)


def launch(folder: Path, end: str) -> subprocess.CompletedProcess:
    "Two processes by torchrun."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, folder, end]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "What both ranks found, how the job ended, and its folder."
    folder = tmp_path_factory.mktemp("job")
    model, optimizer, _ = worker.alone(last=worker.SAVED)
    d.save_shards(folder / "one", model, optimizer, worker.SAVED)  # by one process, for two
    done = launch(folder, "die")
    files = [folder / f"found-{rank}.json" for rank in (0, 1)]
    assert all(f.exists() for f in files), done.stderr
    return [json.loads(f.read_text()) for f in files], done, folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b) -> None: np.testing.assert_allclose(a, b, rtol=2e-5)


def test_curves_equal_one_process(job):
    (found, other), _, _ = job
    for kind in ("ddp", "micro", "fsdp", "call_ddp", "call_fsdp"):
        close(found[kind], found["alone"])
        assert found[kind] == other[kind], "ranks must see the same losses and norms, or they decide differently"
    assert found["ddp_apart"] < 1e-4 and found["fsdp_apart"] < 1e-4
    np.testing.assert_allclose(found["tied"], found["tied_alone"], rtol=1e-4)


def test_ranks_hold_and_send_what_the_arithmetic_says(job):
    found, _, _ = job
    assert sum(f["held"] for f in found) == pytest.approx(1) and all(abs(f["held"] - 0.5) < 0.01 for f in found)
    for kind, stage in (("ddp", 0), ("fsdp", 3)):
        expected = d.sent_bytes(worker.EVEN, 2, stage, compute_bytes=4)
        assert found[0]["sent"][kind] == pytest.approx(expected), kind


def test_sharded_checkpoint_goes_on_exactly(job):
    (found, _), _, _ = job
    assert found["resumed"] == found["fsdp"][worker.SAVED:] and found["resumed_apart"] == 0
    close(found["to_ddp"], found["alone"][worker.SAVED:])
    close(found["from_one"], found["alone"][worker.SAVED:])


def test_single_file_state_to_ranks_and_back(job):
    (found, _), _, folder = job
    for kind in ("fsdp", "ddp"):
        assert found[f"spread_{kind}"] == 0
        close(found[f"after_spread_{kind}"], found["after"])
    state = torch.load(folder / "gathered.pt", weights_only=True)
    model, optimizer, _ = worker.alone()
    same_state(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, 1e-4)


def same_state(state: dict, expected: dict, tolerance: float) -> None:
    "The entries `model` and `optimizer`, keys and settings exactly, tensors within a tolerance."
    a, b = state["optimizer"], expected["optimizer"]
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    pairs = [(state["model"][k], v) for k, v in expected["model"].items()]
    pairs += [(a["state"][i][k], v) for i, values in b["state"].items() for k, v in values.items()]
    assert state["model"].keys() == expected["model"].keys()
    for x, y in pairs: torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_killed_rank_ends_the_job_and_is_named(job):
    _, done, _ = job
    assert done.returncode != 0
    cause = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in cause and "SIGKILL" in cause


def test_killed_job_resumes_on_one_process(job):
    (found, _), _, folder = job
    model = TransformerLM(worker.CONFIG)
    optimizer = worker.adamw(model)
    state = d.load_shards(folder / "step-3", model, optimizer)
    assert state["iteration"] == worker.SAVED and state["config"] == {"d_model": 32}
    close(worker.steps(model, optimizer, d.World(), worker.SAVED + 1, worker.STEPS), found["alone"][worker.SAVED:])


def test_merged_file_equals_the_run_on_one_process(job, tmp_path):
    _, _, folder = job
    d.merge_shards(folder / "step-3", tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=True)
    model, optimizer, _ = worker.alone(last=worker.SAVED)
    same_state(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, 1e-4)
    assert state["iteration"] == worker.SAVED and state["numbers"].tolist() == [0, 1, 2] and "files" not in state


def test_every_rank_learns_of_a_failure(job):
    (first, second), _, _ = job
    assert first["votes"] == second["votes"] == [True, False]
    assert first["failures"]["on_rank_0"] == "ValueError: no such file"
    assert second["failures"]["on_rank_0"] == "PeerError: rank 0: ValueError: no such file"
    assert first["failures"]["damaged"] == second["failures"]["damaged"]
    assert "__1_0.distcp is damaged" in first["failures"]["damaged"]


def test_full_disk_on_one_rank_is_one_line_on_all_and_leaves_nothing(job):
    for found in job[0]:
        assert "rank 1: OSError: [Errno 28] No space left on device" in found["failures"]["full"] and "\n" not in found["failures"]["full"]
        assert found["failures"]["left"] == []


def test_raising_rank_is_named_in_a_line(tmp_path):
    done = launch(tmp_path, "raise")
    assert done.returncode != 0
    assert "rank 1 of 2 failed: ValueError: the third row is not a row" in done.stderr.splitlines()
    assert "ValueError: the third row is" in done.stderr.split("Root Cause")[1]
    assert "rank 0 of 2 failed" not in done.stderr


@pytest.fixture
def saved(tmp_path) -> Path:
    "A checkpoint folder that one process wrote."
    model = TransformerLM(worker.CONFIG)
    d.save_shards(tmp_path / "one", model, worker.adamw(model), 7)
    return tmp_path / "one"


def test_one_process_writes_and_replaces(saved):
    before = sorted(saved.parent.iterdir())
    model = worker.fresh()
    d.save_shards(saved, model, optimizer := worker.adamw(model), 8, note="second")
    assert sorted(saved.parent.iterdir()) == before
    other = TransformerLM(worker.CONFIG)
    state = d.load_shards(saved, other, worker.adamw(other))
    assert (state["iteration"], state["note"]) == (8, "second") and worker.furthest(other.state_dict(), model.state_dict()) == 0


@pytest.mark.parametrize("breaks_at", [1, 2, 3, 4])
def test_interrupted_save_keeps_the_old_folder(saved, monkeypatch, breaks_at):
    original, calls = d.os.replace, []
    def broken(*args):
        calls.append(args)
        if len(calls) == breaks_at: raise KeyboardInterrupt
        original(*args)
    monkeypatch.setattr(d.os, "replace", broken)
    model = TransformerLM(worker.CONFIG)
    with pytest.raises(KeyboardInterrupt) if breaks_at <= 3 else nullcontext(): d.save_shards(saved, model, worker.adamw(model), 8)
    assert d.read_shards(saved)["iteration"] == (7 if breaks_at <= 3 else 8) and [p.name for p in saved.parent.iterdir()] == ["one"]


def test_a_folder_that_a_kill_left_aside_gets_its_name_back(saved):
    aside = saved.with_name(saved.name + d.OLD)
    saved.rename(aside)
    d.bring_back(aside)
    assert d.read_shards(saved)["iteration"] == 7
    shutil.copytree(saved, aside)
    d.bring_back(aside)  # the new one is there
    assert aside.exists() and saved.exists()
    model = TransformerLM(worker.CONFIG)
    d.save_shards(saved, model, worker.adamw(model), 8)
    assert d.read_shards(saved)["iteration"] == 8 and not aside.exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.pt"])
def test_any_damage_is_found(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[data.index(b"iteration") if name == "state.pt" else len(data) // 2] ^= 0xFF  # not in a zip's padding
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.* damaged.*take another checkpoint"): d.read_shards(saved)
    (saved / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError)): d.read_shards(saved)


def test_no_folder_and_another_model(saved):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"): d.read_shards(saved / "nothing")
    model = TransformerLM(ModelConfig(vocab_size=66, context_length=12, d_model=32, num_layers=2, num_heads=2, d_ff=48))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the model: model.token_embeddings.weight has shape \(65, 32\) there"):
        d.load_shards(saved, model, worker.adamw(model))
    assert worker.furthest(model.state_dict(), before) == 0


class Evil:
    def __reduce__(self): return os.system, ("echo evil",)


def test_index_runs_no_code(saved):
    for payload in (Evil(), {"a": [Evil()]}):
        (saved / ".metadata").write_bytes(pickle.dumps(payload))
        with pytest.raises(pickle.UnpicklingError, match="system, which no index of tensors needs"): d._read_index(saved)
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata  # its values would be unpickled freely
    (saved / ".metadata").write_bytes(pickle.dumps({"model.x": BytesStorageMetadata()}))
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata"): d._read_index(saved)


@given(st.integers(1, 12), st.integers(1, 12))
def test_slices_share_a_batch(size, share):
    rows = np.arange(size * share)
    parts = [rows[d.rank_slice(len(rows), d.World(rank, size))] for rank in range(size)]
    assert np.concatenate(parts).tolist() == rows.tolist() and {len(p) for p in parts} == {share}
    if size > 1:
        with pytest.raises(ValueError, match=f"batch_size {len(rows) + 1} cannot be shared"): d.rank_slice(len(rows) + 1, d.World(0, size))


@given(st.integers(1, 5), st.integers(0, 11))
def test_dealt_batches_are_each_seen_once(size, number):
    cards = [(torch.full((1, 3), i), torch.full((1, 3), i)) for i in range(number)]
    hands = [[int(y[0, 0]) for _, y in d.deal_batches(cards, d.World(rank, size))] for rank in range(size)]
    assert len({len(h) for h in hands}) == 1
    assert sorted(i for h in hands for i in h if i != IGNORE_INDEX) == list(range(number))


def test_world_from_the_environment():
    good = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert d.read_world("cpu", good) == d.World(3, 4, 1, "cpu") and not d.read_world("cpu", good).writes
    assert d.read_world("mps", {}) == d.World(device="mps") and d.World().writes
    assert d.read_world("mps", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).device == "mps"
    for bad in ({"RANK": "0"}, good | {"RANK": "4"}, good | {"WORLD_SIZE": "-1"}):
        with pytest.raises(ValueError, match="start the processes with torchrun"): d.read_world("cpu", bad)
    for device in ("mps", "cuda:1", "tpu"):
        with pytest.raises(ValueError, match="each its own GPU"): d.read_world(device, good)


def test_alone_nothing_is_connected():
    with d.processes("cpu") as world:
        assert world == d.World(device="cpu") and not torch.distributed.is_initialized()
        model = TransformerLM(worker.CONFIG)
        assert d.distribute_model(model, world) is model and d.any_rank(True) and d.on_rank_0(lambda: 3) == 3
        assert d.sum_over_ranks(torch.tensor(2.0)) == 2 == d.mean_over_ranks(torch.tensor(2.0))
    with pytest.raises(ValueError, match="strategy is 'tp'"): d.distribute_model(model, world, "tp")


@pytest.mark.parametrize("preset", ["gpt2-xl-2026", "writeup-openwebtext", "tinystories"])
def test_plan_arithmetic(preset):
    config = PRESETS[preset]
    total, memory = sum(count_parameters(config).values()), memory_bytes(config)
    block, rest = d.unit_parameters(config)
    model = TransformerLM(config, device="meta")
    assert block == sum(p.numel() for p in model.layers[0].parameters()) and config.num_layers * block + rest == total
    whole = d.rank_bytes(config, 8, 0, 1, compute_bytes=4)
    assert {k: whole[k] for k in ("parameters", "gradients", "optimizer_state")} == {k: memory[k] for k in ("parameters", "gradients", "optimizer_state")}
    for part, first in (("optimizer_state", 1), ("gradients", 2), ("parameters", 3)):
        for stage in range(4): assert d.rank_bytes(config, 8, stage, 1)[part] == memory[part] / (8 if stage >= first else 1)
    assert sum(d.sent_bytes(config, 1, 3).values()) == 0
    with pytest.raises(ValueError, match="stage must be"): d.rank_bytes(config, 8, 4, 1)


def test_plan_fits_and_says_when_it_does_not():
    config = PRESETS["gpt2-xl-2026"]
    for gpus in (8, 64):
        for stage in range(4):
            plan = d.plan_step(config, d.Cluster(gpus), stage, 512)
            assert plan.micro_batch * plan.micro_steps * gpus == 512
            assert sum(plan.held.values()) <= 0.9 * 80e9
            low, high = plan.step_seconds
            assert 0 < low <= high <= 2 * low
    with pytest.raises(ValueError, match="one row needs .* take a higher stage or more GPUs"): d.plan_step(config, d.Cluster(8, memory=24e9), 0, 512)
    assert d.plan_step(config, d.Cluster(8, memory=24e9), 3, 512).micro_batch >= 1


def test_an_index_may_name_members_of_enumerations_and_nothing_else_by_getattr():
    import enum, os
    from cs336_lm.distributed import _enum_member
    class Colour(enum.Enum): RED = 1
    assert _enum_member(Colour, "RED") is Colour.RED
    for owner, name in ((os, "system"), (Colour, "__class__"), (Colour, "mro")):
        with pytest.raises(pickle.UnpicklingError): _enum_member(owner, name)
