"Checkpoints under fire: every truncation, flipped bits, foreign files, and kill -9 at every point of a save."
import io, os, pickle, subprocess, sys, textwrap, zipfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

from cs336_lm.training import load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint


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
