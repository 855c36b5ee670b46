"""Chapter 13: torn and damaged logs, figures of equal bytes, preparation that reuses by hash, yardsticks by brute force."""

import json, math, os, re, subprocess, sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cs336_lm import experiments as ex, leaderboard  # noqa: F401: it and what it imports add their figures
from cs336_lm.corpora import END_OF_TEXT
from cs336_lm.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


def header(name="toy", **changes) -> dict:
    return {
        "kind": "header",
        "schema": 1,
        "name": name,
        "config": {"train_tokens": "/far/away/tokens/train.npy", "steps": 3, "runs_dir": "/far/away/runs"},
        "corpus": {"name": "toy corpus", "bytes": 1000, "documents": 3, "sha256": 64 * "a"},
        "tokenizer": {},
        "tokens": {"train": 300, "valid": 30},
        "parameters": 1234,
        "device": "cpu",
        "versions": {},
        "commit": "0123456789",
        "started": "2026-11-23T10:00:00+00:00",
        **changes,
    }


def rows(n=30) -> list[dict]:
    steps = [
        {
            "kind": "step",
            "step": s,
            "tokens": 10 * s,
            "seconds": 0.5 * s,
            "loss": 5 / s,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 20,
            "mfu": None,
        }
        for s in range(1, n + 1)
    ]
    evals = [
        {
            "kind": "eval",
            "step": s,
            "tokens": 10 * s,
            "seconds": 0.5 * s,
            "split": "valid",
            "loss": 5.5 / s,
            "bits_per_byte": 1.0,
            "perplexity": 2.0,
            "logit_std": 1.0,
        }
        for s in (n // 2, n)
    ]
    return [
        header(),
        *sorted(steps + evals, key=lambda r: (r["step"], r["kind"])),
        {"kind": "end", "status": "finished", "reason": None},
    ]


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def log(tmp_path):
    return ex.read_log(write(tmp_path / "runs" / "toy" / "log.jsonl", rows()))


# logs


def test_reads_a_log_and_its_folder(log):
    assert (log.name, log.status, log.torn, len(log.steps), len(log.evals)) == ("toy", "finished", False, 30, 2)
    assert ex.read_log(log.path.parent) == log
    assert (
        ex.column(log.steps, "loss")[1] == 2.5
        and np.isnan(ex.column(log.steps, "mfu")).all()
        and np.isnan(ex.column(log.steps, "no such")).all()
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_log_cut_anywhere_reads_up_to_the_cut(tmp_path_factory, data):
    whole = "".join(json.dumps(r) + "\n" for r in rows(4)).encode()
    first = whole.index(b"\n")
    cut = data.draw(st.integers(first, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    path.write_bytes(whole[:cut])
    log = ex.read_log(path)
    complete = [line for line in whole.split(b"\n")[:-1] if whole.index(line) + len(line) <= cut]
    assert 1 + len(log.steps) + len(log.evals) + bool(log.end) == len(complete)
    assert log.torn == (cut not in {i + d for i in range(len(whole)) if whole[i : i + 1] == b"\n" for d in (0, 1)})
    assert log.status == ("finished" if log.end else "unfinished")


def test_a_cut_inside_a_character_is_torn_too(tmp_path):
    data = "".join(
        json.dumps(r, ensure_ascii=False) + "\n"
        for r in [header(), {"kind": "end", "status": "diverged", "reason": "é"}]
    ).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(data[: data.index("é".encode()) + 1])
    assert ex.read_log(path).torn


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "does not begin with a header"),
        ([{"kind": "step", "step": 1}], "does not begin with a header"),
        ([header(schema=2)], "schema 2"),
        ([header(), {"step": 1}], "line 2"),
        ([header(), [1, 2]], "line 2"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, lines, said):
    with pytest.raises(ValueError, match=said) as error:
        ex.read_log(write(tmp_path / "x.jsonl", lines))
    assert "x.jsonl" in str(error.value)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", rows(5))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 4"):
        ex.read_log(path)


def test_a_missing_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing here"):
        ex.read_log(tmp_path / "nothing here")
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        ex.read_log(tmp_path)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(2, 600))
def test_thin_keeps_the_ends_and_the_order(n, most):
    all_rows = [{"step": i} for i in range(n)]
    kept = [r["step"] for r in ex.thin(all_rows, most)]
    assert len(kept) == min(n, most) and kept[0] == 0 and kept[-1] == n - 1 and kept == sorted(set(kept))


def test_record_is_thinned_without_paths_and_with_measures(tmp_path, log):
    (log.path.parent / "report.json").write_text(json.dumps({"floor": 1.5}))
    path = ex.record_run(log.path.parent, tmp_path / "records", most_steps=10)
    record = ex.read_log(path)
    assert path.name == "toy.jsonl" and "far/away" not in path.read_text()
    assert record.header["config"] == {"train_tokens": "train.npy", "steps": 3, "runs_dir": "runs"}
    assert (
        len(record.steps) == 10
        and record.evals == log.evals
        and record.end == log.end
        and record.measures == {"floor": 1.5}
    )
    assert all(step in log.steps for step in record.steps)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds[0] == "header" and kinds[-1] == "end"


# figures


def test_figures_have_units_labels_and_name_their_log(log):
    figure = ex.plot_loss([log], "seconds", lines={"floor": 0.1})
    (ax,) = figure.axes
    assert "seconds" in ax.get_xlabel() and "nats" in ax.get_ylabel() and ax.get_title()
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["training", "validation", "floor: 0.10"]
    assert (
        "toy corpus" in figure.get_supxlabel()
        and "toy.jsonl" in figure.get_supxlabel()
        and "aaaaaaaa" in figure.get_supxlabel()
    )
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), ex.column(log.steps, "seconds"))
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), ex.column(log.evals, "loss"))


def test_unknown_axis_and_unknown_figure(log, tmp_path):
    with pytest.raises(ValueError, match="'hours'"):
        ex.plot_loss([log], "hours")
    with pytest.raises(ValueError, match="'fig99'.*fig0_demo"):
        ex.draw_figures(tmp_path, only="fig99")
    with pytest.raises(FileNotFoundError, match="demo"):
        ex.draw_figures(tmp_path, only="fig0_demo")


def test_every_figure_is_drawn_from_records_of_the_catalogue_or_pending():
    pending = ex.pending_figures(ROOT / "figures" / "runs")
    for name, recipe in ex.FIGURES.items():
        assert recipe.runs and {run.removesuffix("-checkpoints") for run in (*recipe.runs, *recipe.more)} <= set(ex.RUNS), name
        assert (ROOT / "figures" / f"{name}.png").is_file() == (name not in pending), f"run make figures: {name}"
        if name not in pending:
            assert [log.name for log in ex.figure_logs(recipe, ROOT / "figures" / "runs")][: len(recipe.runs)] == list(recipe.runs)
    assert not {"fig0_demo", "tinystories-9MB"} & pending.keys()


def test_same_bytes_in_another_process_with_other_settings(tmp_path):
    records = ROOT / "figures" / "runs"
    here = ex.draw_figures(tmp_path / "here", records=records)
    code = (
        "import matplotlib; matplotlib.rcParams.update({'font.size': 30, 'axes.facecolor': 'red', 'svg.hashsalt': 'x'});"
        "from cs336_lm.experiments import draw_figures; import cs336_lm.leaderboard;"
        f"draw_figures({str(tmp_path / 'there')!r}, records={str(records)!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77", "MPLBACKEND": "svg"},
    )
    assert len(here) == 2 * (len(ex.FIGURES) - len(ex.pending_figures(records)))
    for path in here:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_settings_around_a_figure_do_not_reach_it(tmp_path, log):
    plain = ex.save_figure(ex.plot_loss([log]), tmp_path / "plain")
    with matplotlib.rc_context({"axes.facecolor": "red", "lines.markersize": 20, "savefig.bbox": "tight"}):
        styled = ex.save_figure(ex.plot_loss([log]), tmp_path / "styled")
    assert [p.read_bytes() for p in plain] == [p.read_bytes() for p in styled]


def test_command_line_draws_the_same_bytes(tmp_path):
    cli = pytest.importorskip("cs336_lm.cli", exc_type=ImportError)
    for run in (ROOT / "figures" / "runs").glob("*.jsonl"):
        write(tmp_path / "cli" / "runs" / run.name, [json.loads(line) for line in run.read_text().splitlines()])
    assert cli.main(["figures", "--directory", str(tmp_path / "cli")]) == 0
    for path in ex.draw_figures(tmp_path / "function", records=ROOT / "figures" / "runs"):
        assert path.read_bytes() == (tmp_path / "cli" / path.name).read_bytes()


def test_pictures_carry_no_date_and_no_program(tmp_path, log):
    png, svg = ex.save_figure(ex.plot_loss([log]), tmp_path / "figure")
    assert b"Software" not in png.read_bytes() and png.read_bytes()[:4] == b"\x89PNG"
    assert not re.search(r"<dc:date>|Matplotlib v", svg.read_text())


def test_colours_differ_also_in_grey():
    grey = sorted(0.299 * int(c[1:3], 16) + 0.587 * int(c[3:5], 16) + 0.114 * int(c[5:7], 16) for c in ex.PALETTE[:3])
    assert len(set(ex.PALETTE)) == len(ex.PALETTE) and min(np.diff(grey)) > 8


# the catalogue and preparation


def test_recipes_are_valid(tmp_path, prepared):
    for name, recipe in ex.RUNS.items():
        config = ex.run_config(recipe, prepared, tmp_path)
        assert isinstance(config, TrainConfig) and config.name == name == recipe.name and recipe.about
        assert config.model.vocab_size == prepared.tokenizer.vocab_size
    with pytest.raises(ValueError, match="no run 'nosuch'.*demo"):
        ex.run_experiment("nosuch", tmp_path)


def write_text(path: Path, word: str = "times", n: int = 200) -> Path:
    path.write_text(
        "".join(f"{i} {word} {i} is {i * i}, and {i} and {i} is {2 * i}.\n{END_OF_TEXT}\n" for i in range(n))
    )
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return ex.prepare(write_text(folder / "text.txt"), 300, folder / "data")


def stamps(p: ex.Prepared) -> list[int]:
    return [path.stat().st_mtime_ns for path in (p.tokenizer_dir / "vocab.json", p.train.path, p.valid.path)]


def test_prepare_makes_what_it_says(prepared):
    assert prepared.tokenizer.vocab_size == 300 and prepared.tokenizer.trained_on == prepared.corpus.name
    assert prepared.train.documents + prepared.valid.documents == 200 and prepared.valid.documents >= 1
    text = prepared.corpus.train.read_text()
    ids = ex.open_tokens(prepared.train.path, prepared.tokenizer.sha256)
    assert prepared.tokenizer.decode(ids) == text


def test_prepare_reuses_and_mends(tmp_path):
    text = write_text(tmp_path / "text.txt")
    again = lambda size=300: ex.prepare(text, size, tmp_path / "data")
    made = again()
    first = stamps(made)
    assert stamps(again()) == first

    made.train.path.write_bytes(made.train.path.read_bytes()[:-1])  # wrong size
    second = stamps(again())
    assert [a == b for a, b in zip(first, second)] == [True, False, True]

    made.valid.path.with_suffix(".json").unlink()  # no description
    third = stamps(again())
    assert [a == b for a, b in zip(second, third)] == [True, True, False]

    (made.tokenizer_dir / "merges.txt").write_text("rubbish\n")  # a damaged tokenizer: the same one is made again
    sha = made.tokenizer.sha256
    mended = again()
    assert mended.tokenizer.sha256 == sha and stamps(mended)[0] != third[0] and stamps(mended)[1:] == third[1:]

    smaller = again(280)
    assert smaller.tokenizer.vocab_size == 280 and smaller.tokenizer_dir != made.tokenizer_dir


def test_prepare_notices_another_text_of_the_same_name(tmp_path):
    text = write_text(tmp_path / "text.txt")
    before = ex.prepare(text, 300, tmp_path / "data")
    write_text(text, "multiplied by")
    after = ex.prepare(text, 300, tmp_path / "data")
    assert before.tokenizer.sha256 != after.tokenizer.sha256 and b"multiplied" in after.tokenizer.decode_bytes(
        ex.open_tokens(after.train.path)
    )
    assert after.train.tokenizer["sha256"] == after.tokenizer.sha256


def test_prepare_with_the_tokenizer_of_another_corpus(tmp_path):
    a, b = write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt", "multiplied by")
    own, other = ex.prepare(b, 300, tmp_path / "data"), ex.prepare(b, 300, tmp_path / "data", tokenizer_corpus=a)
    assert other.tokenizer.trained_on == "a" and other.corpus.name == "b" and other.train.path != own.train.path
    assert other.train.tokens != own.train.tokens


def test_prepare_encodes_a_changed_text_again_though_the_tokenizer_stays(tmp_path):
    a, b = write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt")
    before = ex.prepare(b, 300, tmp_path / "data", tokenizer_corpus=a)
    write_text(b, "multiplied by")
    after = ex.prepare(b, 300, tmp_path / "data", tokenizer_corpus=a)
    assert after.tokenizer.sha256 == before.tokenizer.sha256 and after.train.path == before.train.path
    assert b"multiplied" in after.tokenizer.decode_bytes(ex.open_tokens(after.train.path))


# yardsticks


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 7),
    st.integers(1, 4),
    st.lists(st.integers(0, 6), min_size=1, max_size=60),
    st.lists(st.integers(0, 6), min_size=1, max_size=20),
)
def test_ngram_losses_equal_counting(vocab_size, order, learn, held):
    learn, held = [t % vocab_size for t in learn], [t % vocab_size for t in held]
    fast = ex.ngram_losses(np.array(learn), np.array(held), vocab_size, 0, order)
    for n in range(1, order + 1):
        model = ex.NgramModel(learn, n, vocab_size, 0)
        terms = [model.probability(h, w) for h, w in ex.histories(held, n, 0)]
        assert fast[n - 1] == pytest.approx(-np.mean(np.log(terms)), abs=1e-10)
        for h, _ in ex.histories(held, n, 0):
            assert sum(model.probability(h, w) for w in range(vocab_size)) == pytest.approx(1)


def test_unigram_loss_is_the_entropy_where_texts_are_alike():
    tokens = np.random.default_rng(0).choice(4, 200_000, p=[0.5, 0.25, 0.125, 0.125])
    losses = ex.ngram_losses(tokens[:150_000], tokens[150_000:], 4, 0)
    assert losses[0] == pytest.approx(1.75 * math.log(2), abs=0.01) and losses[2] == pytest.approx(
        losses[0], abs=0.01
    )  # order does not help


def test_trigram_finds_what_two_tokens_decide():
    rng = np.random.default_rng(0)
    tokens = list(rng.integers(0, 8, 2))
    for _ in range(30_000):
        tokens.append((tokens[-1] + 3 * tokens[-2] + rng.integers(0, 2)) % 8)
    losses = ex.ngram_losses(
        np.array(tokens[:25_000], dtype=np.uint16), np.array(tokens[25_000:], dtype=np.uint16), 8, 0
    )
    assert losses[2] == pytest.approx(math.log(2), abs=0.03) and losses[0] > 1.9


def test_too_high_an_order_is_refused():
    with pytest.raises(ValueError, match="order 5"):
        ex.ngram_losses(np.zeros(3), np.zeros(3), 50_000, 0, 5)


words = st.lists(st.sampled_from(["a", "b", "c", "a,", "é"]), max_size=14).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(words, min_size=1, max_size=4), st.lists(words, max_size=5), st.integers(1, 30))
def test_verbatim_runs_equal_text_search(samples, documents, batch_words):
    found = ex.verbatim_runs(samples, documents, batch_words)
    padded = [f" {d} " for d in documents]
    for sample, lengths in zip(samples, found, strict=True):
        sample = sample.split()
        assert len(lengths) == len(sample)
        for i, length in enumerate(lengths):
            stands = lambda n: any(f" {' '.join(sample[i : i + n])} " in d for d in padded)
            assert length == max((n for n in range(1, len(sample) - i + 1) if stands(n)), default=0)


def test_verbatim_runs_do_not_cross_documents():
    assert ex.verbatim_runs(["a b c d"], ["x a b", "c d y"])[0].tolist() == [2, 1, 2, 1]
    assert ex.verbatim_runs(["a b", "c d"], ["a b c d"])[0].tolist() == [2, 1]


# the experiment log


def test_experiment_log_lists_every_record(tmp_path):
    write(
        tmp_path / "b.jsonl",
        [
            header("later", started="2026-12-01T00:00:00+00:00"),
            {"kind": "end", "status": "diverged", "reason": "loss nan at step 3"},
        ],
    )
    write(tmp_path / "a.jsonl", rows(6))
    table = ex.experiment_log(tmp_path).splitlines()
    assert len(table) == 4 and table[0].count("|") == table[2].count("|") == table[3].count("|")
    assert (
        "toy" in table[2]
        and "0123456" in table[2]
        and "0.917" in table[2]
        and "2026-11-23 10:00" in table[2]
        and "finished" in table[2]
    )
    assert "later" in table[3] and "diverged: loss nan at step 3" in table[3]


def test_the_experiment_log_ends_with_the_failures_of_workers(tmp_path):
    write(tmp_path / "a.jsonl", rows(6))
    (tmp_path / "worker-0.log").write_text(
        "05:50:22 0 small-batch9: RuntimeError: Triton Error [CUDA]: invalid argument\n"
        "2026-12-01 05:50:23 0 small-batch8: OutOfMemoryError: too much: 9 GB\n"
        "05:51:21 0 small-batch3: loss 3.8309, 43.6 s\n05:51:22 0 stopped between two cells\n"
    )
    table = ex.experiment_log(tmp_path).splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert table[3].startswith("| small-batch9 |") and table[3].endswith("| failed: RuntimeError: Triton Error [CUDA]: invalid argument |")
    assert table[4].startswith("| small-batch8 |") and "too much: 9 GB" in table[4]


def test_the_experiment_log_passes_by_what_is_no_run(tmp_path, log):
    records = tmp_path / "records"
    records.mkdir()
    (records / "toy.jsonl").write_bytes(log.path.read_bytes())
    (records / "speeds.jsonl").write_text('{"batch": 64, "tokens_per_second": 1.0}\n')
    assert len(ex.experiment_log(records).splitlines()) == 3
