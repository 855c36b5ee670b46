"The command line: its help, its options, its mistakes, and the whole road from a download to a verdict."
import dataclasses, functools, hashlib, json, os, re, shlex, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cs336_lm import cli
from cs336_lm.cli import COMMANDS, main

SMALL = ("--model.vocab-size 300 --model.context-length 32 --model.d-model 32 --model.num-layers 1 --model.num-heads 2 "
         "--model.d-ff 64 --device cpu").split()
STORIES = "".join(f"Cat {n} saw {n * n % 37} birds. It ran home and told cat {n + 1}.\n<|endoftext|>\n" for n in range(400))


def run(line, **options):
    "The finished process of `python -m cs336_lm.cli LINE`."
    words = line if isinstance(line, list) else shlex.split(line)
    return subprocess.run([sys.executable, "-m", "cs336_lm.cli", *words], capture_output=True, text=True, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty working folder, data folder in it, and no proxies."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CS336_DATA", "data")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "CS336_DOWNLOAD_URL"): monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def hub():
    "A server with the hub's TinyStories paths; `hub.asked` are the paths asked for; after `hub.limit` bytes it stalls."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            hub.asked.append(self.path)
            body = {"TinyStoriesV2-GPT4-train.txt": STORIES, "TinyStoriesV2-GPT4-valid.txt": STORIES[:2000]}[self.path.rpartition("/")[2]].encode()
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("X-Linked-ETag", hashlib.sha256(body).hexdigest())  # as the hub does on its redirect
            if start: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[start:hub.limit])
            if hub.limit is not None: hub.released.wait(30)
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.asked, hub.limit, hub.released, hub.daemon_threads = [], None, threading.Event(), True
    hub.url = f"http://127.0.0.1:{hub.server_port}"
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield hub
    hub.released.set()
    hub.shutdown()
    hub.server_close()


# ---------------------------------------------------------------- help

@pytest.mark.parametrize("line", ["", "-h", "--help", "data", "data --help", *(f"{name} --help" for name in COMMANDS)])
def test_help_at_every_level(line, capsys):
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert "usage: cs336" in out and "examples:\n  cs336 " in out and not err
    if not line: assert all(name in out for name in COMMANDS)


def test_every_promised_command_is_there():
    promised = {"data", "bpe", "encode", "train", "generate", "account", "figures", "demo", "reproduce", "experiment"}
    assert promised == {name.split()[0] for name in COMMANDS}


def test_the_examples_in_the_help_are_valid(folder):
    examples = [line for spec in COMMANDS.values() for line in spec.examples.splitlines()] + cli.EXAMPLES.splitlines()
    lines = [line.split("   ")[0] for line in map(str.strip, examples) if line.startswith("cs336 ")]
    assert len(lines) > 20
    for line in lines:
        name, arguments = cli._find_command(shlex.split(line)[1:])
        if "--resume" in arguments: continue  # that needs a run
        assert isinstance(cli._parse(name, arguments), functools.partial), line


def test_every_setting_of_the_dataclasses_is_an_option(capsys):
    from cs336_lm.training import TrainConfig
    from cs336_lm.transformer import ModelConfig
    main(["train", "--help"])
    out = capsys.readouterr().out
    for prefix, kind in (("--", TrainConfig), ("--model.", ModelConfig)):
        for field in dataclasses.fields(kind):
            if field.name != "model": assert prefix + field.name.replace("_", "-") + " " in out or prefix + field.name.replace("_", "-") + "\n" in out


def test_presets_give_the_defaults_and_options_change_them(folder):
    presets = cli._train_presets()
    for name, preset in presets.items():
        parsed = cli._parse("train", [f"--preset={name}"])
        assert (parsed.args + tuple(parsed.keywords.values()))[0] == preset
    parsed = cli._parse("train", ["--preset", "openwebtext", "--max-lr", "0.01", "--model.norm", "post", "--betas", "0.8", "0.9"])
    config = (parsed.args + tuple(parsed.keywords.values()))[0]
    expected = presets["openwebtext"]
    assert config == dataclasses.replace(expected, max_lr=0.01, betas=(0.8, 0.9), model=dataclasses.replace(expected.model, norm="post"))
    seen = {name: p.steps * p.batch_size * p.model.context_length for name, p in presets.items()}
    assert seen == {"tinystories": 327_680_000, "tinystories-low-resource": 40_960_000, "openwebtext": 327_680_000,
                    "writeup-openwebtext": 327_680_000}


def test_help_and_text_commands_do_not_load_torch():
    probe = ("import sys; from cs336_lm.cli import main; code = main(sys.argv[1:])\n"
             "sys.exit(code or 3 * any(m in sys.modules for m in ('torch', 'matplotlib', 'nbdev', 'jaxtyping')))")
    for line in ("--help", "data list", "bpe --help", "encode --help", "generate --help", "data download --help"):
        done = subprocess.run([sys.executable, "-c", probe, *line.split()], capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)


def test_version(capsys):
    from cs336_lm import __version__
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes

MISTAKES = {  # command line: what its one line must say
    "tran": "did you mean 'train'",
    "data downlod tinystories": "did you mean 'data download'",
    "frobnicate": "choose one of",
    "data download tinystoriez": "'tinystoriez'",
    "data download tinystories --base-url http://127.0.0.1:9": "Connection refused",
    "data download tinystories --base-url not-a-url": "not-a-url",
    "data make none.txt": "none.txt",
    "data make latin1.txt": "latin1.txt is not UTF-8 text: byte 0xeb at offset 2 ",
    "data make empty.txt": "empty.txt is empty",
    "data make .": "folder",
    "data make stories extra": "'extra' is one word too many",
    "data describe none.txt": "none.txt",
    "bpe none.txt": "none.txt",
    "bpe latin1.txt": "latin1.txt",
    "bpe empty.txt": "empty.txt",
    "bpe tinystories": "cs336 data download tinystories",
    "bpe note.txt --vocab-size 10": "10",
    "bpe note.txt --vocab-size ten": "--vocab-size takes a whole number, not 'ten'",
    "bpe note.txt --vocab-size": "--vocab-size",
    "bpe note.txt --vocab-sice 300": "perhaps you meant --vocab-size",
    "bpe note.txt --vocab-size 257 --output note.txt/tok": "note.txt",
    "bpe note.txt --vocab-size 258 --special-tokens a a": "a",
    "encode note.txt": "missing: --tokenizer",
    "encode note.txt --tokenizer none": "none",
    "encode note.txt --tokenizer tok --output ids.txt": "ids.txt",
    "encode latin1.txt --tokenizer tok": "latin1.txt",
    "train --preset tinystory": "'tinystory'",
    "train --rows diagonal": "diagonal",
    "train --batch-size 0": "batch_size is 0",
    "train --batch-size 8 --micro-batch 3": "micro_batch is 3, but must divide batch_size, 8",
    "train --strategy zero": "'zero'",
    "train --max-lr fast": "--max-lr takes a number, not 'fast'",
    "train --model.num-heads 7": "num_heads=7",
    "train --name a/b": "a/b",
    "train --train-tokens none.npy --valid-tokens none.npy --tokenizer tok": "none.npy",
    "train --resume none": "none",
    "train --train-tokens note.txt --valid-tokens note.txt --tokenizer tok": "note.txt",
    "generate": "missing",
    "generate none": "none",
    "generate note.txt": "note.txt",
    "generate .": "no checkpoint",
    "generate note.txt --temperature -1": "-1",
    "generate note.txt --top-p 2": "top_p is 2",
    "generate note.txt --top-k 0": "top_k is 0",
    "generate note.txt --top-k 2.5": "--top-k takes a whole number, not '2.5'",
    "generate note.txt --samples 0": "samples is 0",
    "account": "missing: --preset",
    "account --preset gpt3": "'gpt3'",
    "account --preset demo --batch-size 0": "batch_size",
    "account --preset demo --context-length -5": "-5",
    "reproduce --low-resource --base-url http://127.0.0.1:9": "Connection refused",
    "reproduce --steps 0": "steps is 0",
}


@pytest.fixture
def texts(folder):
    (folder / "latin1.txt").write_bytes("Zoë sat.\n".encode("latin1") * 9)
    (folder / "empty.txt").write_text("")
    (folder / "note.txt").write_text("just a text of words\n" * 200)
    from cs336_lm.tokenizer import Tokenizer
    Tokenizer({i: bytes([i]) for i in range(256)}, []).save(folder / "tok")
    return folder


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(line, texts, capsys):
    before = sorted(p.name for p in texts.iterdir())
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("cs336: ") and err.count("\n") == 1 and MISTAKES[line] in err, err
    assert not set("│╭╰") & set(err) and "---" not in err and "[Errno" not in err
    assert "1 of 3" in out or not out
    assert {p.name for p in texts.iterdir()} - set(before) <= {"data"}


@pytest.mark.parametrize("columns, encoding", [("20", "ascii"), ("300", "utf-8")])
def test_mistakes_read_the_same_in_any_terminal(columns, encoding, folder):
    environment = os.environ | {"COLUMNS": columns, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    done = run("generate runs/x --promt hello", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cs336: there is no option --promt; perhaps you meant --prompt; see: cs336 generate --help.\n"


def test_unwritable_output(texts, capsys):
    if os.geteuid() == 0: pytest.skip("root may write everywhere")
    (texts / "locked").mkdir(mode=0o500)
    assert main("bpe note.txt --vocab-size 257 --output locked/tok".split()) == 2
    assert "No permission" in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    def broken(arguments): raise ZeroDivisionError
    monkeypatch.setitem(cli.COMMANDS, "data list", dataclasses.replace(COMMANDS["data list"], build=broken))
    with pytest.raises(ZeroDivisionError): main(["data", "list"])


def test_warnings_are_one_line_too(texts, capsys):
    assert main("bpe note.txt --vocab-size 5000 --output new --processes 1".split()) == 0
    err = capsys.readouterr().err
    assert err.startswith("cs336: note: ") and err.count("\n") == 1 and "5,000" in err


def test_a_closed_pipe_is_no_error(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "cs336_lm.cli", "data", "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


# ---------------------------------------------------------------- Ctrl-C

def interrupt_when(process, happened, seconds=60):
    "Send Ctrl-C once `happened()`; exit code and stderr."
    end = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None or time.monotonic() > end: pytest.fail(f"ended too early: {process.communicate()}")
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=seconds)
    return process.returncode, err


def start(line): return subprocess.Popen([sys.executable, "-m", "cs336_lm.cli", *shlex.split(line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_in_a_download(folder, hub):
    hub.limit = 1000
    process = start(f"data download tinystories --base-url {hub.url}")
    code, err = interrupt_when(process, lambda: (folder / "data/TinyStoriesV2-GPT4-valid.txt.part.json").exists())
    assert (code, err) == (130, "cs336: interrupted.\n")
    hub.limit = None
    hub.released.set()
    assert main(["data", "download", "tinystories", "--base-url", hub.url]) == 0
    assert (folder / "data/TinyStoriesV2-GPT4-train.txt").read_text() == STORIES


def test_ctrl_c_in_training_and_resume(folder, capsys):
    (folder / "s.txt").write_text(STORIES)
    assert main("bpe s.txt --vocab-size 300 --output tok --processes 1".split()) == 0
    assert main("encode s.txt --tokenizer tok --output s.npy".split()) == 0
    line = "train --name r --train-tokens s.npy --valid-tokens s.npy --tokenizer tok --steps 100000 --batch-size 2 " + " ".join(SMALL)
    process = start(line + " --log-every 1 --eval-every 0")
    log = folder / "runs/r/log.jsonl"
    code, err = interrupt_when(process, lambda: log.exists() and log.read_text().count('"step"') > 5)
    assert (code, err) == (130, "cs336: interrupted; to go on: cs336 train --resume runs/r.\n")
    capsys.readouterr()
    assert main(line.split()) == 2
    assert "--resume" in capsys.readouterr().err


# ---------------------------------------------------------------- commands

def test_data_commands(folder, capsys):
    (folder / "my.txt").write_text(STORIES)
    assert main("data make my.txt".split()) == 0
    sides = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [s[0] for s in sides] == ["train", "valid"] and all(Path(s[-1]).stat().st_size == int(s[1].replace(",", "")) for s in sides)
    assert main("data describe my.txt".split()) == 0
    from cs336_lm.corpora import describe_file
    assert json.loads(capsys.readouterr().out) == describe_file("my.txt")
    assert main("data list".split()) == 0
    assert "cs336 data download tinystories" in capsys.readouterr().out


def test_the_road_step_by_step(folder, hub, capsys):
    for line in (f"data download tinystories --base-url {hub.url}", "bpe tinystories --vocab-size 300 --processes 1",
                 "encode tinystories --tokenizer data/tokenizers/tinystories-300"):
        assert main(line.split()) == 0, capsys.readouterr().err
    from cs336_lm.dataset import read_token_file
    ids = "data/tokens/tinystories-by-tinystories-300"
    tokens = read_token_file(f"{ids}/train.npy")
    assert tokens.corpus["name"] == "tinystories" and tokens.tokenizer["trained_on"] == "tinystories" and tokens.documents == 400
    line = [*f"train --name s --train-tokens {ids}/train.npy --valid-tokens {ids}/valid.npy".split(), *SMALL,
            *"--tokenizer data/tokenizers/tinystories-300 --steps 4 --warmup-steps 1 --batch-size 4".split()]
    capsys.readouterr()
    assert main(line) == 0
    assert "validation loss" in capsys.readouterr().out
    assert (folder / "runs/s/samples.txt").read_text().count("\n<|endoftext|>\n") == 2
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "runs/s", "--prompt", "Cat é", "--max-new-tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and all(t.startswith("Cat é") for t in texts)
    assert main("generate runs/s --samples 2 --temperature 0 --max-new-tokens 4".split()) == 0
    first, second = capsys.readouterr().out.split("<|endoftext|>\n")
    assert first == second
    assert main("bpe tinystories --vocab-size 280 --output other --processes 1".split()) == 0
    capsys.readouterr()
    assert main([*line, "--name", "t", "--tokenizer", "other"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert main("generate runs/s --tokenizer none".split()) == 2
    assert main(["generate", "runs/s", "--prompt", "\udcff"]) == 2
    assert main("train --resume runs/s".split()) == 0


@pytest.mark.parametrize("preset", ["gpt2-xl-2025", "gpt2-small-two-matrix", "demo"])
def test_account(preset, capsys):
    from cs336_lm.accounting import account
    assert main(f"account --preset {preset} --batch-size 3 --context-length 512 --json".split()) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == json.loads(json.dumps(account(preset, batch_size=3, context_length=512)))
    assert {"parameters", "parameter_bytes", "forward_flops", "forward_share", "adamw", "train_seconds_50pct"} <= numbers.keys()
    assert main(f"account --preset {preset} --batch-size 3 --context-length 512".split()) == 0
    assert f"{numbers['parameters']:,}" in capsys.readouterr().out


def test_reproduce_from_the_download_to_the_verdict(folder, hub, capsys, monkeypatch):
    line = ["reproduce", "--low-resource", "--steps", "5", "--batch-size", "4", "--base-url", hub.url, *SMALL]
    assert main(line) == 1  # five steps do not reach 2.00
    out, err = capsys.readouterr()
    assert not err and all(f"{n} of 3  " in out for n in (1, 2, 3))
    tokens = 5 * 4 * 32
    assert f"the target of 2.00 was not reached, with {tokens} tokens (the handout: 40,960,000)" in out
    records = [json.loads(r) for r in (folder / "runs/reproduce-tinystories-low-resource/log.jsonl").read_text().splitlines()]
    assert records[0]["corpus"]["name"] == "tinystories" and records[-1] == {"kind": "end", "status": "finished", "reason": None}
    assert [r for r in records if r["kind"] == "eval"][-1]["step"] == 5
    assert (folder / "runs/reproduce-tinystories-low-resource/samples.txt").exists()

    asked, made = len(hub.asked), {p: p.stat().st_mtime_ns for p in (folder / "data").rglob("*") if p.is_file()}
    monkeypatch.setitem(cli.TARGETS, "tinystories-low-resource", (50.0, tokens))
    assert main(line) == 0  # everything is there; only the verdict is given again
    assert f"the target of 50.00 was reached, with {tokens} tokens\n" in capsys.readouterr().out
    assert len(hub.asked) == asked and made == {p: p.stat().st_mtime_ns for p in (folder / "data").rglob("*") if p.is_file()}

    (folder / "data/tokens/tinystories-by-tinystories-300/train.npy").write_bytes(b"torn")
    assert main(line) == 0  # a damaged stage is done again, and the run goes on with equal data
    assert main([*line, "--batch-size", "8"]) == 2  # but not with other settings
    assert "batch_size" in capsys.readouterr().err


def test_targets_are_the_handouts():
    assert cli.TARGETS == {"tinystories": (1.45, 327_680_000), "tinystories-low-resource": (2.00, 40_960_000)}
    for loss, code in ((1.45, 0), (1.4501, 1), (float("nan"), 1), (0.1, 0)):
        assert cli._verdict(loss, 327_680_000, *cli.TARGETS["tinystories"])[0] == code


def test_demo_and_figures_call_chapter_13(folder, capsys, monkeypatch):
    from cs336_lm import experiments
    calls = []
    monkeypatch.setattr(experiments, "demo", lambda *args, **options: calls.append((args, options)))
    assert main("demo".split()) == 0 and main("demo --corpus my.txt --steps 40 --samples 2".split()) == 0
    assert calls == [(("stories",), {"num_samples": 50, "progress": False}),
                     (("my.txt",), {"num_samples": 2, "progress": False, "steps": 40, "warmup_steps": 2})]
    assert main("figures --only fig99".split()) == 2 and "fig99" in capsys.readouterr().err
    assert main("figures".split()) == 2  # no records in this folder
    assert "figures" in capsys.readouterr().err


def test_ctrl_c_in_the_demo(folder, capsys, monkeypatch):
    from cs336_lm import experiments
    def stopped(*args, **options): raise KeyboardInterrupt("stopped at step 3")
    monkeypatch.setattr(experiments, "demo", stopped)
    assert main(["demo"]) == 130 and capsys.readouterr().err == "cs336: interrupted; stopped at step 3.\n"


def test_what_comes_after_ctrl_c_is_an_interruption(folder, capsys, monkeypatch):
    from cs336_lm import experiments
    def library(*args, **options):
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: raise RuntimeError("no compiled object yet") from None
    monkeypatch.setattr(experiments, "demo", library)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["demo"]) == 130 and capsys.readouterr().err == "cs336: interrupted.\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.setattr(experiments, "demo", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError): main(["demo"])  # a fault of the program keeps its traceback
    finally: signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- nothing is lost, and mistakes come early

@pytest.fixture
def trained(folder, capsys):
    "A tokenizer, tokens and a run of three steps."
    (folder / "s.txt").write_text(STORIES)
    assert main("bpe s.txt --vocab-size 300 --output tok --processes 1".split()) == 0
    assert main("encode s.txt --tokenizer tok --output s.npy".split()) == 0
    line = "train --name r --train-tokens s.npy --valid-tokens s.npy --tokenizer tok --steps 3 --warmup-steps 1 --batch-size 2 " + " ".join(SMALL)
    assert main(line.split()) == 0
    capsys.readouterr()
    return line


def test_encode_never_removes_its_input(folder, trained, capsys):
    (folder / "notes.json").write_text(STORIES)
    assert main("encode notes.json --tokenizer tok --output notes.npy".split()) == 2
    assert "would be written over" in capsys.readouterr().err and (folder / "notes.json").read_text() == STORIES


def test_another_tokenizer_than_the_runs_is_refused(folder, trained, capsys):
    assert main("bpe s.txt --vocab-size 290 --output other --processes 1".split()) == 0
    assert main("generate runs/r --tokenizer other".split()) == 2
    assert "trained with another tokenizer" in capsys.readouterr().err
    assert main("generate runs/r --tokenizer tok --max-new-tokens 3".split()) == 0


@pytest.mark.parametrize("output, said", [("s.txt", "is a file"), ("s.txt/tok", "leads through one")])
def test_bpe_looks_at_its_output_before_it_works(folder, capsys, monkeypatch, output, said):
    from cs336_lm import bpe
    monkeypatch.setattr(bpe, "train_bpe", lambda *args, **options: pytest.fail("worked first"))
    (folder / "s.txt").write_text(STORIES)
    assert main(f"bpe s.txt --vocab-size 300 --output {output}".split()) == 2 and said in capsys.readouterr().err


def test_bpe_that_fails_leaves_no_folder_and_one_that_replaces_says_so(folder, capsys):
    (folder / "s.txt").write_text(STORIES)
    assert main("bpe s.txt --vocab-size 10 --output new".split()) == 2 and not (folder / "new").exists()
    for said in ("", "note: tok held a tokenizer; it is replaced.\n"):
        capsys.readouterr()
        assert main("bpe s.txt --vocab-size 300 --output tok --processes 1".split()) == 0 and capsys.readouterr().err == f"cs336: {said}" * bool(said)


@pytest.mark.parametrize("output, said", [("s.txt/a.npy", "leads through"), ("s.txt/deep/a.npy", "leads through")])
def test_encode_looks_at_its_output_before_it_works(folder, trained, capsys, monkeypatch, output, said):
    from cs336_lm import dataset
    monkeypatch.setattr(dataset, "encode_file", lambda *args, **options: pytest.fail("worked first"))
    for text in ("s.txt", "stories"):
        monkeypatch.setattr(cli, "find_corpus", lambda name: cli.Corpus(name, folder / "s.txt", folder / "s.txt"))
        assert main(f"encode {text} --tokenizer tok --output {output}".split()) == 2 and said in capsys.readouterr().err


def test_what_fails_removes_the_folders_it_made_and_no_others(folder, capsys, monkeypatch):
    (folder / "s.txt").write_text(STORIES)
    (folder / "mine").mkdir()
    for output in ("mine", "mine/new/deep", "new/deep"):
        assert main(f"bpe s.txt --vocab-size 10 --output {output}".split()) == 2 and "10" in capsys.readouterr().err
    assert sorted(p.name for p in folder.rglob("*")) == ["mine", "s.txt"]
    monkeypatch.chdir(folder / "mine")
    assert main("bpe ../s.txt --vocab-size 10 --output .".split()) == 2 and "vocab_size" in capsys.readouterr().err


def test_a_run_without_checkpoints_finishes(folder, trained, capsys):
    assert main(trained.replace("--name r", "--name none --keep-checkpoints 0").split()) == 0
    assert "no checkpoint is kept, so there are no samples" in capsys.readouterr().err


def test_a_model_much_wider_than_its_tokenizer_is_told(folder, trained, capsys):
    assert main(trained.replace("--name r", "--name wide").replace("--model.vocab-size 300", "--model.vocab-size 500").split()) == 0
    assert "500 ids, its tokenizer only 300" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    ("train --resume runs/r --preset openwebtext", "leave --preset out"), ("train --resume runs/r --name other", "leave --name out"),
    ("train --samples -1", "--samples is -1"), ("reproduce --device foo", "foo"), ("reproduce --name r", "was .* and is now"),
    ("reproduce --base-url nonsense", "https://"), ("data download tinystories --base-url nonsense", "https://"),
    ("experiment status --figures nowhere", "no records of runs in nowhere"), ("account --preset gpt2-xl-2026 --context-length 1.5", "a whole number"),
    ("reproduce --model.num-heads 3", "^cs336: (?!Error parsing)"), ("train --resume runs/r --runs_dir other", "leave --runs-dir out"),
    ("experiment status --figures tok", "no records of runs in tok"), ("experiment run foo", "outside them: demo,"),
    ("bpe --special-tokens <|x|> s.txt --vocab-size 300", "--special-tokens takes all words .* name the text before it")])
def test_more_mistakes(folder, trained, capsys, monkeypatch, line, said):
    monkeypatch.setattr(cli, "download", lambda *args, **options: pytest.fail("worked first"))
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count("\n") == 1, err


def test_the_list_names_every_run_that_can_be_run(capsys):
    from cs336_lm.experiments import RUNS
    from cs336_lm.grids import GRIDS, parse_name
    assert main(["experiment", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*GRIDS, *(name for name in RUNS if parse_name(name) is None)]
    for name in listed:
        assert main(["experiment", "list", name]) == 0
        assert capsys.readouterr().out.splitlines() == ([cell.name for cell in GRIDS[name].cells] if name in GRIDS else [name])


def test_every_command_knows_the_same_corpora(folder):
    probe = ("import sys; from cs336_lm import cli; before = cli.corpus_names(), 'torch' in sys.modules\n"
             "import cs336_lm.experiments; print(before == (cli.corpus_names(), False) and 'grammar' in before[0])")
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("flag", ["--low-resource", "--low_resource"])  # tyro takes both
def test_low_resource_means_it_however_it_is_spelled(flag):
    chosen = cli._parse("reproduce", [flag]).keywords
    assert chosen["name"] == "reproduce-tinystories-low-resource" and chosen["steps"] == 2_500


def test_an_interrupted_run_outside_the_grids_is_an_interruption(folder, capsys, monkeypatch):
    from types import SimpleNamespace
    from cs336_lm import experiments
    asked = []
    def stopped(name, **options): return asked.append(name) or SimpleNamespace(status="interrupted")
    monkeypatch.setattr(experiments, "run_experiment", stopped)
    assert main("experiment run demo tinystories-9MB".split()) == 130 and asked == ["demo"]
    assert "interrupted in demo" in capsys.readouterr().err

