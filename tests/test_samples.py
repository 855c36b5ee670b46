"""Chapter 16: samples with numbers, copies found by several processes, the grammar's stories at the size of an experiment."""
import json, math, re, shutil, statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cs336_lm import experiments as ex, grids, samples as sa
from cs336_lm.corpora import END_OF_TEXT, parse_story, read_documents
from cs336_lm.dataset import encode_file
from cs336_lm.grids import copied, distinct, text_loss
from cs336_lm.optimization import cross_entropy
from cs336_lm.training import TrainConfig, load_model, train
from cs336_lm.transformer import ModelConfig, TransformerLM

TOY = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64, "context_length": 24}
SMALL = {"train": (3, 4_000, 1_000), "valid": (1, 4_000, 3)}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def grammar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grammar")
    return sa.prepare_grammar(folder, 2, ex.write_grammar_corpus(folder, SMALL))


@pytest.fixture(scope="module")
def run(grammar, tmp_path_factory):
    "A run of eight steps, its record and its folder."
    folder = tmp_path_factory.mktemp("runs")
    changes = dict(model=TOY, steps=8, warmup_steps=2, batch_size=4, eval_every=4, log_every=1, device="cpu")
    log = sa.run_grammar(0, grammar, runs_dir=folder / "runs", records=folder, samples=3, changes=changes)
    return log, folder / "runs" / log.name


def test_stories_read_from_their_beginning_cost_what_the_model_says_row_by_row(grammar):
    torch.manual_seed(3)
    model = TransformerLM(ModelConfig(**{**TOY, "context_length": 256}, vocab_size=grammar.tokenizer.vocab_size))
    nats = floor = tokens = 0
    for text in list(read_documents(grammar.corpus.valid))[:7]:
        ids = grammar.tokenizer.encode(END_OF_TEXT + text + END_OF_TEXT)
        assert len(ids) <= 257
        with torch.no_grad(): nats += cross_entropy(model(torch.tensor(ids[:-1])), torch.tensor(ids[1:])).item() * (len(ids) - 1)
        floor, tokens = floor - parse_story(text.strip()).log_probability, tokens + len(ids) - 1
    found = sa.read_whole(model, grammar.tokenizer, grammar.corpus.valid, most=7)
    assert (found["stories"], found["tokens"]) == (7, tokens)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5) and found["floor"] == pytest.approx(floor / tokens)


def test_encoding_by_tiktoken_gives_the_token_file(grammar, tmp_path):
    for text, made in ((grammar.corpus.train, grammar.train), (grammar.corpus.valid, grammar.valid)):
        again = encode_file(grammar.tokenizer, text, tmp_path / made.path.name, corpus_name="grammar")
        assert again.path.read_bytes() == made.path.read_bytes() and replace(again, path=made.path) == made


def test_what_was_prepared_is_what_prepare_makes(grammar, monkeypatch):
    monkeypatch.setitem(ex.GENERATED, "grammar", lambda folder: grammar.corpus)
    monkeypatch.setattr(ex, "train_bpe", None)  # nothing is made again
    monkeypatch.setattr(ex, "encode_file", None)
    again = ex.prepare("grammar", 10_000, grammar.tokenizer_dir.parent.parent)
    assert (again.tokenizer.sha256, again.train, again.valid) == (grammar.tokenizer.sha256, grammar.train, grammar.valid)


def test_the_grammars_run_keeps_the_models_table_and_knows_its_floor(grammar, run):
    log, folder = run
    assert log.name == "small-grammar-lr3e-3-seed0" and log.header["corpus"]["name"] == "grammar"
    assert log.header["config"]["model"]["vocab_size"] == 10_000 > grammar.tokenizer.vocab_size
    assert log.measures["excess"] == pytest.approx(log.measures["loss"] - log.measures["floor"]) and log.measures["floor"] > 0
    assert log.measures["read_whole"] == {}  # rows of 24 tokens hold no story
    assert load_model(folder)[1].vocab_size == 10_000


def test_the_record_of_samples_can_be_counted_again(grammar, run, tmp_path):
    log, folder = run
    prompts, samplings = ("", "The fox"), (sa.Sampling(0), sa.WRITE_UP)
    texts = grammar.corpus.train, grammar.corpus.valid
    path = sa.sample_run(folder, *texts, records=tmp_path, prompts=prompts, samplings=samplings, copies=3, tokens=30, device="cpu", processes=2)
    found = json.loads(path.read_text())
    assert path.name == f"{log.name}-samples.json" and found["run"] == log.name and found["step"] == 8
    assert [s["texts"] for s in found["settings"]] == [2, 6] and [len(s["samples"]) for s in found["settings"]] == [2, 2]
    model, config, tokenizer = load_model(folder)
    for setting in found["settings"]:
        for sample in setting["samples"]:
            documents = sample["text"].split(END_OF_TEXT)
            assert sample["tokens"] == 30
            again = copied(documents, read_documents(texts[0]))
            assert (sample["copied"] is None) == math.isnan(again) and (sample["copied"] is None or sample["copied"] == pytest.approx(again, abs=1e-4))
            twos = distinct(documents, 2)
            assert math.isnan(twos) or sample["distinct2"] == pytest.approx(twos, abs=1e-4)
    assert found["held_out"]["texts"] == 6 and found["held_out"]["tokens"] == 6 * config.context_length
    assert path.read_bytes() == sa.sample_run(folder, *texts, records=tmp_path / "again", prompts=prompts, samplings=samplings, copies=3, tokens=30,
                                              device="cpu", processes=1).read_bytes()


def test_the_loss_of_a_continuation_is_the_texts(grammar, run):
    model, config, tokenizer = load_model(run[1])
    start = [tokenizer.token_to_id(END_OF_TEXT)]
    texts = ["The old fox had a red kite.", "A hen", "One day the hen and the fox went to the mill to look for the bell and the drum."]
    ids = [tokenizer.encode(text) for text in texts]
    losses = sa.continuation_losses(model, [start] * 3, ids, batch_size=2)
    assert [len(l) for l in losses] == [min(len(i), config.context_length) for i in ids]
    for text, loss in zip(texts, losses): assert statistics.mean(loss) == pytest.approx(text_loss(model, tokenizer, [text]), rel=1e-4)
    split = sa.continuation_losses(model, [start + ids[0][:3]], [ids[0][3:]])[0]
    assert split == pytest.approx(losses[0][3:], rel=1e-3)


@given(st.lists(st.text(alphabet="ab <|é", max_size=12), max_size=8), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_parts_of_a_file_are_whole_documents(tmp_path_factory, documents, parts):
    path = tmp_path_factory.mktemp("t") / "text.txt"
    path.write_text(END_OF_TEXT.join(["x", *documents]))
    cut = [sa.read_part(path, part) for part in sa.document_parts(path, parts)]
    assert "".join(cut) == path.read_text() and all(text.endswith(END_OF_TEXT) for text in cut[:-1])


def test_several_processes_find_the_same_copies(tmp_path):
    words = [f"w{i % 7}" for i in range(400)]
    documents = [" ".join(words[i:i + 23]) for i in range(0, 400, 11)]
    (tmp_path / "t.txt").write_text(END_OF_TEXT.join(documents))
    samples = ["w1 w2 w3 w9 w4 w5 w6 w0 w1 w2", "", "w6 w0 w0 w1", " ".join(words[:60])]
    one, several = (sa.verbatim_in_file(samples, tmp_path / "t.txt", n) for n in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(one, several)) and one[0].tolist()[:3] == [3, 2, 1]
    assert sa.copied_share(one, 8) == pytest.approx(copied(samples, documents, 8)) and math.isnan(sa.copied_share(one[1:2]))


def test_the_module_is_a_command(run, grammar, tmp_path, capsys):
    words = f"{run[1]} --train-text {grammar.corpus.train} --valid-text {grammar.corpus.valid} --records {tmp_path} --copies 1 --tokens 4 --processes 1 --device cpu"
    assert sa.main(words.split()) == 0 and f"{run[0].name}-samples.json" in capsys.readouterr().out
    found = json.loads((tmp_path / f"{run[0].name}-samples.json").read_text())
    assert len(found["settings"]) == len(sa.SAMPLINGS) and [s["prompt"] for s in found["settings"][0]["samples"]] == list(sa.PROMPTS)


# --- the chapter, from made-up records

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "figures/runs"


def run_chapter(name: str, records: Path, monkeypatch) -> dict:
    "The names that a chapter defines, run with the records of another folder."
    pytest.importorskip("IPython")
    monkeypatch.chdir(ROOT / "nbs")
    space = {"__name__": "chapter"}
    for cell in json.loads(Path(name).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).replace('Path("../figures/runs")', f"Path({str(records)!r})")
        if cell["cell_type"] != "code" or re.search(r"^#\| *(slow|cuda|eval: *false)|^from cs336_lm.samples", source, flags=re.M): continue
        exec(compile(source, name, "exec"), space)
    return space


def made_up(records: Path, name: str, loss: float, entries: int = 10_000, corpus: str = "web-488MB", **measures) -> float:
    "A record like a real one with other numbers; its bits a byte."
    lines = [json.loads(line) for line in (REAL / "small-base-lr3e-3-seed0.jsonl").read_text().splitlines()]
    header, last = lines[0], [line for line in lines if line["kind"] == "eval"][-1]
    cell = grids.parse_name(name)
    header["name"], header["corpus"]["name"], header["tokenizer"]["vocab_size"] = name, corpus, entries
    header["config"] |= {"max_lr": cell.rate, "seed": cell.seed, "batch_size": cell.settings["batch_size"], "cosine_steps": cell.settings.get("cosine_steps")}
    header["config"]["model"] |= {k: v for k, v in vars(cell.settings["model"]).items() if k != "attention"}
    if entries == 32_000: header["tokens"] = {"train": 110_565_890, "valid": 1_422_357}
    bits = loss / math.log(2) * header["tokens"]["valid"] / sum(json.loads((REAL / "web-488MB-sources.json").read_text())["bytes"])
    last |= {"loss": loss, "bits_per_byte": bits}
    end = lines.pop()
    lines = [line for line in lines if line["kind"] != "measure"] + [{"kind": "measure", "name": k, "value": v} for k, v in ({"unigram_entropy": 7.2} | measures).items()]
    (records / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, end)))
    return bits


@pytest.fixture
def records(tmp_path):
    "The real records that the chapters start from."
    for pattern in ("demo.jsonl", "tinystories-9MB.jsonl", "small-[bns]*-lr*.jsonl", "small-post*.jsonl", "web-488MB-sources.json"):
        for path in REAL.glob(pattern): shutil.copy(path, tmp_path)
    return tmp_path


def test_the_web_chapter_answers_from_records_that_come(records, run, grammar, monkeypatch):
    chapter = run_chapter("16_openwebtext.ipynb", records, monkeypatch)
    assert "ending" in chapter["answer_main_experiment"]() and "ending" in chapter["some_texts"]()
    before = run_chapter("17_leaderboard.ipynb", records, monkeypatch)
    assert "ending" in before["answer_leaderboard"]() and "ending" in before["about_the_baseline"]() and "ending" in before["ninety_minutes"]()
    losses = {"small": 3.9, "full": 3.31}
    sources = json.loads((REAL / "web-488MB-sources.json").read_text())
    per_document = {"document_losses": [4.0 * (b - a) for a, b in zip(sources["starts"], [*sources["starts"][1:], sources["tokens"]])]}
    for seed in range(3): made_up(records, f"small-web32k-lr3e-3-seed{seed}", losses["small"] + seed / 100, 32_000, **per_document)
    made_up(records, "full-base-lr3e-3-seed0", 3.111)
    bits = made_up(records, "full-web32k-lr3e-3-seed0", losses["full"], 32_000, **per_document)
    made_up(records, "small-grammar-lr3e-3-seed0", 0.523, 1_119, "grammar", floor=0.5078)
    made_up(records, "full-writeup-lr1e-3-seed0", 3.222, 32_000)
    made_up(records, "full-writeup-lr3e-3-seed0", 3.2, 32_000)
    made = sa.sample_run(run[1], grammar.corpus.train, grammar.corpus.valid, records=records, copies=1, tokens=40, device="cpu", processes=1)
    for name in ("full-web32k-lr3e-3-seed0", "tinystories-9MB"): shutil.copy(made, records / f"{name}-samples.json")
    after = run_chapter("16_openwebtext.ipynb", records, monkeypatch)
    answer = after["answer_main_experiment"]()
    for told in ("3.310", f"{bits:.3f}", "above the 0.508", "0.015", "3.111"): assert told in answer, told
    assert "ending" not in answer
    assert "ending" not in after["losses_by_text"]() + after["answer_text"]() + after["numbers_table"]("tinystories-9MB")
    assert after["some_texts"]().count("\n\n>") == 9 and "python" in after["some_texts"]()
    assert after["by_source"]().count("|\n") >= 3 and after["explained"]().count("\n") >= 7


def test_the_ablations_tell_whether_the_gap_grows(records, monkeypatch):
    for path in records.glob("small-*context512*"): path.unlink()
    after = run_chapter("15_ablations.ipynb", records, monkeypatch)
    assert "ending" in after["told_long_context"]()
    for rate, low in (("1e-3", 4.1), ("3e-3", 3.9)):
        for seed in range(3 if rate == "3e-3" else 1):
            made_up(records, f"small-rope-context512-32k-lr{rate}-seed{seed}", low + seed / 500, 32_000)
            made_up(records, f"small-nope-context512-32k-lr{rate}-seed{seed}", low + 0.5 + seed / 490, 32_000)
    if not (records / "small-nope-lr3e-3-seed2.jsonl").is_file():
        made_up(records, "small-nope-lr3e-3-seed2", ex.read_record("small-nope-lr3e-3-seed0", records).evals[-1]["loss"])
    answer = run_chapter("15_ablations.ipynb", records, monkeypatch)["told_long_context"]()
    assert "ending" not in answer and "+0.500" in answer and "grows" in answer
    for seed in (1, 2): (records / f"small-nope-context512-32k-lr3e-3-seed{seed}.jsonl").unlink()
    assert "too few seeds" in run_chapter("15_ablations.ipynb", records, monkeypatch)["told_long_context"]()
