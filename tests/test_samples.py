"""Chapter 16: samples with numbers, copies found by several processes, the grammar's stories at the size of an experiment."""
import json, math, statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cs336_lm import experiments as ex, samples as sa
from cs336_lm.corpora import END_OF_TEXT, read_documents
from cs336_lm.dataset import encode_file
from cs336_lm.grids import copied, distinct, text_loss
from cs336_lm.training import TrainConfig, load_model, train
from cs336_lm.transformer import ModelConfig

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
