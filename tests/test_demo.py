"""The demo end to end on a tiny corpus: what it writes, what it says, and that it does the same twice."""

import json, math

import pytest

from cs336_lm import corpora, experiments as ex
from cs336_lm.corpora import END_OF_TEXT, Corpus, parse_story, read_documents, write_stories
from cs336_lm.training import FolderLock, TrainResult, evaluate, load_model, open_rows
from cs336_lm.transformer import ModelConfig

TINY = dict(
    model=ModelConfig(vocab_size=300, context_length=64, d_model=16, num_layers=1, num_heads=2, d_ff=32),
    steps=4,
    warmup_steps=1,
    batch_size=4,
    eval_every=2,
    log_every=1,
    progress=False,
    vocab_size=300,
    num_samples=3,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    write_stories(folder / "train.txt", 40_000, 1)
    write_stories(folder / "valid.txt", 5_000, 2)
    return Corpus("stories", folder / "train.txt", folder / "valid.txt")


@pytest.fixture
def stories(monkeypatch, tiny_stories):
    monkeypatch.setitem(corpora.GENERATED, "stories", lambda folder: tiny_stories)
    return tiny_stories


def test_demo_on_stories(stories, tmp_path, capsys):
    log = ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    said, folder, m = capsys.readouterr().out, tmp_path / "runs" / "demo", log.measures
    for name in ("config.json", "log.jsonl", "report.json", "samples.txt", "loss.png", "loss.svg"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "report.json").read_text()) == m
    for number in (m["loss"], m["floor"], m["unigram"], m["trigram"]):
        assert f"{number:.3f}" in said
    assert "sampled sentences parse" in said and "earlier demo" not in said
    for name in ("loss.png", "samples.txt"):
        assert str(folder / name) in said
    assert all(f"{i} of 3  " in said for i in (1, 2, 3))

    # the floor and the loss by another road
    model, config, tokenizer = load_model(folder)
    documents = list(read_documents(stories.valid))
    nats = -sum(parse_story(text.strip("\n")).log_probability for text in documents)
    tokens = len(ex.open_tokens(ex.prepare("stories", 300, tmp_path / "data").valid.path))
    assert m["floor"] == pytest.approx(nats / tokens, rel=1e-9)
    rows = open_rows(
        tmp_path / "data" / "tokens" / "stories-by-stories-300" / "valid.npy", config, "documents", tokenizer
    )
    assert m["loss"] == pytest.approx(evaluate(model, rows)["loss"], rel=1e-5)
    assert m["excess"] == pytest.approx(m["loss"] - m["floor"]) and m["perplexity"] == pytest.approx(
        math.exp(m["loss"]), rel=1e-6
    )

    assert m["whole_stories"] == 0 <= m["parse_share"]

    # the same again: the earlier one goes when the new one is whole
    again = ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    assert "held an earlier demo: it is" in capsys.readouterr().out and [p.name for p in (tmp_path / "runs").iterdir()] == ["demo"]
    assert [s["loss"] for s in again.steps] == [s["loss"] for s in log.steps]
    assert {k: v for k, v in again.measures.items() if "seconds" not in k} == {
        k: v for k, v in m.items() if "seconds" not in k
    }

    # and into a record, from which the figure is drawn
    record = ex.read_log(ex.record_run(folder, tmp_path / "figures" / "runs"))
    assert record.measures == again.measures and str(tmp_path) not in record.path.read_text()
    assert all(p.stat().st_size > 1000 for p in ex.draw_figures(tmp_path / "figures", only="fig0_demo"))


def test_demo_on_any_text(tmp_path, capsys):
    text = tmp_path / "my text.txt"
    text.write_text("".join(f"The number {i} comes after {i - 1}. Its double is {2 * i}!\n\n" for i in range(500)))
    log = ex.demo(text, tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    said = capsys.readouterr().out
    assert log.name == "demo-my-text" and log.header["config"]["rows"] == "stream"
    assert (
        "floor" not in log.measures
        and "floor" not in said
        and "grammar" not in said
        and "unigram" in said
        and "training text" in said
    )
    assert {"loss", "unigram", "trigram", "longest_verbatim_words"} <= log.measures.keys()


def test_demo_tells_of_a_loss_that_rises_again():
    measures = dict(loss=2.0, best_loss=1.5, bits_per_byte=1.0, perplexity=7.4, unigram=3.0, trigram=2.5)
    assert any("by heart" in line for line in ex.loss_lines(measures))
    assert not any("by heart" in line for line in ex.loss_lines(measures | {"best_loss": 2.0}))


def test_demo_leaves_a_foreign_folder_alone(stories, tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="demo"):
        ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    assert (tmp_path / "runs" / "demo" / "thesis.tex").read_text() == "precious"


def test_demo_that_diverges_or_is_stopped(stories, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="diverged"):
        ex.demo(
            "stories",
            tmp_path / "data",
            runs_dir=tmp_path / "runs",
            **{**TINY, "max_lr": 1e30, "min_lr": 0.0, "steps": 20},
        )
    monkeypatch.setattr(
        ex, "train", lambda config, progress: TrainResult(tmp_path, "interrupted", "SIGINT", 2, None, None)
    )
    with pytest.raises(KeyboardInterrupt):
        ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)


def test_command_line_names_a_missing_text(tmp_path, capsys, monkeypatch):
    main = pytest.importorskip("cs336_lm.cli", exc_type=ImportError).main
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--corpus", "no such.txt"]) == 2
    assert "no such.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "texts, whole, long, copied",
    [
        (["a b c. d e f."], 1, 0, 0),
        (["x y z."], 0, 0, 0),
        (["once " + "very " * 31 + "long."], 1, 1, 1),
        (["never " + "very " * 31 + "long."], 0, 1, 0),
    ],
)
def test_copies_are_counted(tmp_path, texts, whole, long, copied):
    train = tmp_path / "train.txt"
    train.write_text(f"a b c. d e f.\n{END_OF_TEXT}\nonce {'very ' * 31}long.\n{END_OF_TEXT}\n")
    m = ex.text_measures(texts, train)
    assert (m["whole_samples_verbatim"], m["long_sentences"], m["long_sentences_verbatim"]) == (whole, long, copied)
    assert m["longest_verbatim"] == "" or m["longest_verbatim"] in train.read_text()


def test_an_empty_sample_is_counted_and_does_no_harm(tmp_path):
    train = tmp_path / "train.txt"
    train.write_text("a b c.")
    assert ex.text_measures(["", ""], train)["longest_verbatim_words"] == 0


def test_the_grammar_judges_stories_and_sentences(stories, tmp_path):
    prepared = ex.prepare("stories", 300, tmp_path / "data")
    true = [text for text, _ in zip(read_documents(stories.valid), range(4))]
    mixed = ". ".join([true[0].split(". ")[0], *true[1].split(". ")[1:]])  # begins as one story, goes on as another
    m = ex.story_measures([*true, mixed, "Not a story at all."], prepared, 1.0)
    assert (m["whole_stories"], m["sentences"]) == (4, sum(len(ex.split_sentences(t)) for t in [*true, mixed]) + 1)
    assert m["parse_share"] >= 1 - 3 / m["sentences"] and m["parse_share"] < 1


def test_demo_recipe_names():
    assert ex.demo_recipe("stories") is ex.RUNS["demo"]
    assert ex.demo_recipe("/x/My Text (2).txt").name == "demo-My-Text-2"
    assert ex.demo_recipe("tinystories-9MB").name == "demo-tinystories-9MB"
    assert ex.demo_recipe("...").name == "demo-text"


@pytest.mark.parametrize("wrong, said", [({"num_samples": 0}, "--samples"), ({"num_samples": -1}, "-1"), ({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size")])
def test_what_is_refused_or_interrupted_leaves_an_earlier_demo_as_it_is(tmp_path, monkeypatch, wrong, said):
    ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=said): ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **{**TINY, **wrong})
    assert {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before
    if wrong != {"steps": 0}: return
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(ex, "train_demo", stopped)
    with pytest.raises(KeyboardInterrupt): ex.demo("stories", tmp_path / "data", runs_dir=tmp_path / "runs", **TINY)
    assert (tmp_path / "runs" / "demo.old" / "report.json").is_file()


def test_an_earlier_demo_of_another_text_is_kept(tmp_path):
    for folder, word in (("a", "cat"), ("b", "dog")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.txt").write_text("".join(f"The {word} saw {n} birds. It ran home.\n\n" for n in range(300)))
        ex.demo(tmp_path / folder / "my.txt", tmp_path / "data", runs_dir=tmp_path / "runs", **{**TINY, "rows": "stream"})
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["demo-my", "demo-my.old"]


def test_a_demo_that_still_trains_elsewhere_is_not_moved(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    lock = FolderLock(tmp_path / "demo")
    if lock.handle is None: pytest.skip("this system has no such lock")
    with pytest.raises(OSError, match="another process trains"): ex.put_aside(tmp_path / "demo")
    lock.close()
    assert ex.put_aside(tmp_path / "demo") == tmp_path / "demo.old" and not (tmp_path / "demo").exists()
