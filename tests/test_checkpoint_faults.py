"Checkpoints under fire: every truncation, flipped bits, foreign files, and kill -9 at every point of a save."
import io, json, os, pickle, subprocess, sys, textwrap, zipfile
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cs336_lm.corpora import END_OF_TEXT
from cs336_lm.dataset import encode_file
from cs336_lm.tokenizer import Tokenizer
from cs336_lm.training import (TrainConfig, list_checkpoints, load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint,
                               train)
from cs336_lm.transformer import ModelConfig


def network(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 5)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def checkpoint():
    file = io.BytesIO()
    save_checkpoint(*network(), 7, file, note="kept")
    return file.getvalue()


WHOLE = checkpoint()


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None)
def test_a_truncated_checkpoint_is_refused(size):
    with pytest.raises(ValueError, match="damaged or no checkpoint"): read_checkpoint(io.BytesIO(WHOLE[:size]))


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_refused_or_harmless(place, bit):
    "Some bytes of a zip carry nothing (padding, dates); any other flip must be noticed, by an error of the right kind."
    data = bytearray(WHOLE)
    data[place] ^= 1 << bit
    try: state = read_checkpoint(io.BytesIO(bytes(data)))
    except ValueError: return
    good = read_checkpoint(io.BytesIO(WHOLE))
    assert state["iteration"] == 7 and all(torch.equal(state["model"][k], good["model"][k]) for k in good["model"])


def test_every_bit_of_the_weights_is_guarded():
    model, _ = network()
    raw = model.weight.detach().numpy().tobytes()
    start = WHOLE.index(raw)
    for place in range(start, start + len(raw)):
        data = bytearray(WHOLE)
        data[place] ^= 1
        with pytest.raises(ValueError): read_checkpoint(io.BytesIO(bytes(data)))


class Bomb:
    "Unpickling it makes a folder, which shows that the file's code was run."
    def __init__(self, folder): self.folder = str(folder / "exploded")
    def __reduce__(self): return os.mkdir, (self.folder,)


FOREIGN = {"text": lambda p: p.write_text("once upon a time"), "empty": lambda p: p.write_bytes(b""),
           "zeros": lambda p: p.write_bytes(b"\0" * 1000), "list": lambda p: torch.save([1, 2], p),
           "weights alone": lambda p: torch.save({"model": {}}, p),
           "code": lambda p: torch.save({"model": Bomb(p.parent), "optimizer": {}, "iteration": 1}, p),
           "pickled code": lambda p: p.write_bytes(pickle.dumps({"model": Bomb(p.parent)})),
           "old format": lambda p: torch.save({"model": 1}, p, _use_new_zipfile_serialization=False)}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_refused_by_name_and_not_run(tmp_path, what):
    FOREIGN[what](path := tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt.*start the run anew") as caught: load_checkpoint(path, *network())
    assert str(path) in str(caught.value) and not (tmp_path / "exploded").exists()


def test_a_zip_of_something_else_a_folder_and_a_missing_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive: archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"a\.pt"): read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(OSError, match=str(tmp_path.name)): read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.pt"): read_checkpoint(tmp_path / "no.pt")


def test_a_newer_schema_is_not_misread():
    file = io.BytesIO()
    torch.save({"schema": 99, "model": {}, "optimizer": {}, "iteration": 1}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="schema 99"): read_checkpoint(file)


def test_another_models_checkpoint_leaves_the_model_as_it_was(tmp_path):
    save_checkpoint(*network(), 7, tmp_path / "x.pt")
    torch.manual_seed(3)
    for other in torch.nn.Linear(6, 4), torch.nn.Linear(6, 5, bias=False), torch.nn.Sequential(torch.nn.Linear(6, 5)):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"x\.pt does not fit"): load_checkpoint(tmp_path / "x.pt", other)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


KILLED = textwrap.dedent('''
    "Forks a child for each point of a save at which it kills itself with SIGKILL."
    import io, os, signal, sys
    from pathlib import Path
    import torch
    from cs336_lm.training import save_checkpoint

    torch.set_num_threads(1)
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain_save = torch.save

    def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)

    def half(state, file):  # a part of the bytes reaches the file
        plain_save(state, whole := io.BytesIO())
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        die()

    points = [("writing", torch, "save", half, 2), ("before the sync", os, "fsync", die, 2),
              ("before the rename", os, "replace", die, 2), ("writing over the only one", os, "replace", die, 1)]
    for name, module, attribute, deed, second in points:
        folder = Path(sys.argv[1]) / name / "checkpoints"
        child = os.fork()
        if not child:
            save_checkpoint(model, optimizer, 1, folder / "step-0000001.pt")
            setattr(module, attribute, deed)
            save_checkpoint(model, optimizer, 2, folder / f"step-{second:07d}.pt")
            os._exit(1)  # not reached
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
''')


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_kill_9_during_a_save_leaves_a_loadable_older_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted(p.name for p in tmp_path.iterdir())
    assert runs == ["before the rename", "before the sync", "writing", "writing over the only one"]
    for name in runs:
        file, state = newest_checkpoint(tmp_path / name)
        assert file.name == "step-0000001.pt" and state["iteration"] == 1
        load_checkpoint(file, *network())
        assert list(file.parent.glob("*.tmp")), "the killed save left its unfinished file, which nobody takes for a checkpoint"


HARNESS = textwrap.dedent('''
    "Trains in forked children that kill themselves, twenty times by a seeded schedule; then once to the end."
    import json, os, random, signal, sys
    from dataclasses import replace
    from pathlib import Path
    import torch
    from cs336_lm import corpora, training
    from cs336_lm.training import config_from_dict, list_checkpoints, step_of, train
    import torch._dynamo  # PyTorch loads it at the first optimizer step; once here rather than in every child

    torch.set_num_threads(1)
    config = config_from_dict(json.loads(sys.argv[1]))
    folder, reached = Path(config.runs_dir) / config.name, Path(config.runs_dir) / "reached"
    fsync, rename, save = os.fsync, os.replace, torch.save

    def die(): os.kill(os.getpid(), signal.SIGKILL)

    def at_checkpoint(number, deed):
        "`deed` replaces the rest of the work from the `number`th checkpoint on."
        count = [0]
        def counted(state, file):
            count[0] += 1
            if count[0] == number: deed(state, file)
            else: save(state, file)
        torch.save = counted

    def half(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)
        file.flush()
        die()

    def then_die_at(name, before):
        def deed(state, file):
            save(state, file)
            real = getattr(os, name)
            def fatal(*args, **kwargs):
                if not before: real(*args, **kwargs)
                die()
            setattr(os, name, fatal)
        return deed

    def in_the_log(number):
        "Half a line of the log is written."
        real, count = training._json_line, [0]
        def torn(record):
            count[0] += 1
            if count[0] < number: return real(record)
            with open(folder / "log.jsonl", "a") as file: file.write(real(record)[:20])
            die()
        training._json_line = torn

    def after_steps(number):
        real, count = training.next_step, [0]
        def step(run):
            real(run)
            count[0] += 1
            if count[0] == number: die()
        training.next_step = step

    KINDS = {"writing": lambda n: at_checkpoint(n, half),
             "before the sync": lambda n: at_checkpoint(n, then_die_at("fsync", True)),
             "before the rename": lambda n: at_checkpoint(n, then_die_at("replace", True)),
             "after the rename": lambda n: at_checkpoint(n, then_die_at("replace", False)),
             "in the log": lambda n: in_the_log(3 * n), "after steps": lambda n: after_steps(2 * n + 1)}

    chosen = random.Random(int(sys.argv[2]))
    schedule = [kind for kind in list(KINDS)[:4] for _ in range(3)] + ["in the log"] * 3 + ["after steps"] * 5
    chosen.shuffle(schedule)
    lost = []
    for kind in schedule + [None]:
        number, child = chosen.randint(1, 2), os.fork()
        if not child:
            real_step = training.next_step
            def noted(run):
                real_step(run)
                reached.write_text(str(run.step))
            training.next_step = noted
            if kind: KINDS[kind](number)
            train(config, resume=folder.exists(), progress=False)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == (signal.SIGKILL if kind else 0), (kind, status)
        steps = [step_of(p) for p in list_checkpoints(folder)]
        lost.append(int(reached.read_text()) - max(steps, default=0))
    print(json.dumps({"kills": len(schedule), "lost": lost, "schedule": schedule}))
''')


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(tmp_path):
    "Twelve of the kills are in the middle of saving a checkpoint, three in a line of the log, five in the training."
    tokenizer = Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: END_OF_TEXT.encode()}, [], [END_OF_TEXT])
    (tmp_path / "text").write_text("".join("ab" * (i % 9) + "c" * (i % 7) + END_OF_TEXT for i in range(1, 60)))
    encode_file(tokenizer, tmp_path / "text", tmp_path / "ids.npy")
    model = ModelConfig(vocab_size=257, context_length=8, d_model=8, num_layers=1, num_heads=1, d_ff=8)
    config = TrainConfig(name="killed", train_tokens=tmp_path / "ids.npy", valid_tokens=tmp_path / "ids.npy", model=model, batch_size=2,
                         steps=100, max_lr=1e-2, min_lr=1e-3, warmup_steps=3, eval_every=30, checkpoint_every=3, log_every=2,
                         keep_checkpoints=2, device="cpu", runs_dir=tmp_path / "runs")
    done = subprocess.run([sys.executable, "-c", HARNESS, json.dumps(asdict(config)), "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 20 and max(report["lost"]) <= config.checkpoint_every and sum(report["lost"]) > 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(replace(config, name="whole"), progress=False)
    torch.set_num_threads(threads)
    killed, good = (torch.load(list_checkpoints(tmp_path / "runs" / name)[0], weights_only=True) for name in ("killed", "whole"))
    for a, b in zip(killed["model"].values(), good["model"].values(), strict=True): assert torch.equal(a, b)
    for a, b in zip(killed["optimizer"]["state"].values(), good["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)
    logs = [[json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()] for name in ("killed", "whole")]
    kept = [[{k: r[k] for k in ("kind", "step", "tokens", "loss", "status") if k in r} for r in log] for log in logs]
    assert kept[0] == kept[1]
    assert not list((tmp_path / "runs" / "killed" / "checkpoints").glob("*.tmp"))
