"""Chapter 14: names and grids, runs of a toy grid with interruption and failure, statistics, sources, figures."""
import json, math, os, signal, statistics, subprocess, sys, tarfile, threading, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cs336_lm import experiments as ex, grids as gr
from cs336_lm.corpora import END_OF_TEXT, FILES
from cs336_lm.dataset import document_starts, open_tokens
from cs336_lm.generation import generate
from cs336_lm.training import (TrainParts, evaluate, initial_model, learning_rate, load_model, open_rows, read_checkpoint,
                               train)
from cs336_lm.transformer import PRESETS, ModelConfig, TransformerLM

ROOT = Path(__file__).resolve().parent.parent
TOY = {"steps": 8, "warmup_steps": 2, "batch_size": 4, "eval_every": 4, "log_every": 1, "device": "cpu",
       "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64, "context_length": 24}}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "Sixty short documents, a tokenizer of 300 entries, token files."
    folder = tmp_path_factory.mktemp("data")
    text = END_OF_TEXT.join(f"\nLamp {n}\n\nLamp {n} is a lamp. It stood {n * n % 37} years in house {n % 7}.\n" for n in range(60))
    (folder / "lamps.txt").write_text(text)
    return ex.prepare(folder / "lamps.txt", 300, folder)


def sources_of(prepared) -> dict:
    valid = open_tokens(prepared.valid.path)
    starts = document_starts(valid, prepared.tokenizer.token_to_id(END_OF_TEXT))
    return {"tokenizer": prepared.tokenizer.sha256, "valid": prepared.valid.corpus["sha256"], "tokens": len(valid), "starts": starts.tolist(), "sources": ["even", "odd"],
            "source": [i % 2 for i in range(len(starts))], "bytes": [50] * len(starts)}


@pytest.fixture(scope="module")
def toy_runs(prepared, tmp_path_factory):
    "Records of two variants with two seeds, made by one set of parts."
    folder, parts = tmp_path_factory.mktemp("toy"), TrainParts()
    for variant in ("base", "silu"):
        for seed in (0, 1):
            gr.run_cell(gr.Cell("small", variant, 1e-2, seed), prepared, runs_dir=folder / "runs", records=folder / "records",
                        sources=sources_of(prepared), parts=parts, progress=False, changes=TOY)
    return folder


def write_record(folder: Path, cell: gr.Cell, loss: float, status="finished", last=None, unigram=7.2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    s = cell.settings
    header = {"kind": "header", "schema": 1, "name": cell.name, "config": {"batch_size": s["batch_size"]}, "device": "cpu",
              "corpus": {"name": "toy", "bytes": 10**6, "sha256": "0" * 64}}
    curve = [{"kind": "step", "step": k, "tokens": k * 1000, "seconds": k / 9, "loss": loss + 5 / k, "tokens_per_second": 9e3}
             for k in range(1, 41)]
    for row in curve[-4:] if last is not None else (): row["loss"] = last
    rows = [header, *curve, {"kind": "eval", "step": 40, "tokens": 40_000, "seconds": 5.0, "loss": loss, "bits_per_byte": 1.0},
            {"kind": "measure", "name": "unigram_entropy", "value": unigram}, {"kind": "end", "status": status, "reason": None}]
    (folder / f"{cell.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- names and grids

@given(st.sampled_from(list(gr.VARIANTS)), st.floats(1e-6, 9), st.integers(0, 99), st.sampled_from(list(gr.BUDGETS)))
def test_names_lead_back_to_cells(variant, rate, seed, budget):
    cell = gr.Cell(budget, variant, float(f"{rate:.1e}"), seed)
    assert gr.parse_name(cell.name) == cell and gr.grid_name(budget, variant, cell.rate, seed) == cell.name
    ex.TrainConfig(name=cell.name, train_tokens="a", valid_tokens="b", **cell.settings)  # a name and settings that can be meant


@pytest.mark.parametrize("name", ["demo", "small-base-lr0.003-seed0", "small-base-lr3.00e-3-seed0", "huge-base-lr3e-3-seed0",
                                  "small-none-lr3e-3-seed0", "small-base-lr3e-3-seed0.jsonl"])
def test_other_names_are_no_cells(name): assert gr.parse_name(name) is None


def test_the_catalogue_holds_what_the_grids_promise():
    rates = gr.GRIDS["learning_rate"].rates
    assert len(rates) >= 8 and min(rates) == 1e-4 and set(gr.ABLATION_RATES) <= set(rates) and len(gr.ABLATION_RATES) >= 5
    for grid in gr.GRIDS.values(): assert set(grid.runs) <= set(ex.RUNS)
    assert gr.Cell("full", "base", 3e-3, 0).tokens == 327_680_000
    with pytest.raises(ValueError, match="none of"): gr.Cell("small", "bass", 1e-3, 0)


# ---- pairing

def test_variants_start_alike_and_see_the_same_rows(prepared):
    sizes = dict(vocab_size=50, d_model=16, num_layers=2, num_heads=2, context_length=8)
    base = initial_model(ModelConfig(**sizes, d_ff=64), 3).state_dict()
    for change in ({"norm": "none"}, {"norm": "post"}, {"position": "none"}, {"ffn": "silu", "d_ff": 96}):
        other = initial_model(ModelConfig(**{**sizes, "d_ff": 64, **change}), 3).state_dict()
        shared = [k for k in other if k in base and base[k].shape == other[k].shape]
        assert "layers.1.attn.q_proj.weight" in shared and "lm_head.weight" in shared
        assert all(torch.equal(base[k], other[k]) for k in shared), change
    assert not torch.equal(base["lm_head.weight"], initial_model(ModelConfig(**sizes, d_ff=64), 4).state_dict()["lm_head.weight"])
    torch.manual_seed(3)  # the handout's own model is drawn as ever
    assert all(torch.equal(v, base[k]) for k, v in TransformerLM(ModelConfig(**sizes, d_ff=64)).state_dict().items())


def test_the_cosine_may_end_early_and_only_within_the_run():
    config = ex.TrainConfig(name="a", train_tokens="a", valid_tokens="b", **gr.Cell("small", "no-rmsnorm-cosine800", 1e-3, 0).settings)
    rates = [learning_rate(config, step) for step in (50, 100, 450, 799, 800, 801, 2_500)]
    np.testing.assert_allclose(rates[:3], [5e-4, 1e-3, 5.5e-4])
    assert rates[3] > rates[4] == rates[5] == rates[6] == config.min_lr
    for steps in (100, 2_501):
        with pytest.raises(ValueError, match=f"cosine_steps is {steps}"): replace(config, cosine_steps=steps)


# ---- a toy grid

def test_a_run_that_keeps_no_checkpoint_writes_none(prepared, tmp_path):
    config = gr.cell_config(gr.Cell("small", "base", 1e-3, 0), prepared, tmp_path, TOY | {"keep_checkpoints": 0, "checkpoint_every": 2})
    result = train(config, progress=False)
    assert result.status == "finished" and result.checkpoint is None and not list(result.folder.glob("checkpoints/*"))


def test_a_cell_leaves_a_small_record_and_is_the_same_through_shared_parts(prepared, toy_runs, tmp_path):
    again = gr.run_cell(gr.Cell("small", "silu", 1e-2, 1), prepared, runs_dir=tmp_path, records=tmp_path / "records",
                        sources=sources_of(prepared), progress=False, changes=TOY)
    kept = ex.read_record(again.cell.name, toy_runs / "records")
    assert column(again.log.steps) == column(kept.steps) and again.log.evals[-1]["loss"] == kept.evals[-1]["loss"]
    assert again.log.measures == kept.measures and kept.status == "finished" and str(tmp_path) not in again.log.path.read_text()
    assert not list((tmp_path / again.cell.name).glob("checkpoints/*"))
    assert {"logit_std", "weight_norm", "block_rms"} <= kept.evals[-1].keys()


def column(rows, name="loss"): return [row[name] for row in rows]


def test_losses_by_document_add_up_and_agree_with_documents_read_alone(prepared):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=prepared.tokenizer.vocab_size, **{**TOY["model"], "context_length": 400})
    model, rows, sources = TransformerLM(config), None, sources_of(prepared)
    rows = open_rows(prepared.valid.path, config)
    sums = gr.document_losses(model, rows, sources["starts"], batch_size=3)
    total = evaluate(model, rows)["loss"] * (len(rows.tokens) - 1)
    assert math.isclose(sum(sums), total, rel_tol=1e-5) and len(sums) == len(sources["starts"])
    first = torch.tensor(rows.tokens[:sources["starts"][1]].astype(np.int64))[None]  # one row holds all: no cut within it
    alone = torch.nn.functional.cross_entropy(model(first[:, :-1])[0], first[0, 1:], reduction="sum").item()
    assert math.isclose(sums[0], alone, rel_tol=1e-4)


def test_source_losses_weigh_by_tokens(prepared, toy_runs):
    sources, log = sources_of(prepared), ex.read_record("small-base-lr1e-2-seed0", toy_runs / "records")
    found = gr.source_losses(log, sources)
    assert found["all"]["documents"] == found["even"]["documents"] + found["odd"]["documents"]
    assert math.isclose(found["all"]["loss"] * found["all"]["tokens"], sum(found[s]["loss"] * found[s]["tokens"] for s in ("even", "odd")))
    assert abs(found["all"]["loss"] - log.evals[-1]["loss"]) < 0.05  # the first token is no target
    only = gr.source_losses(log, sources, [i == 0 for i in range(len(sources["starts"]))])
    assert set(only) == {"even", "all"} and only["all"]["tokens"] == sources["starts"][1]
    assert gr.source_losses(replace(log, measures={}), sources) == {}
    other = replace(log, measures=log.measures | {"document_starts": [i // 2 for i in sources["starts"]]})
    assert gr.source_losses(other, sources)["all"]["tokens"] == log.header["tokens"]["valid"]  # of another tokenizer


def test_an_interrupted_cell_is_given_back_and_goes_on(prepared, tmp_path, monkeypatch):
    cell, queue = gr.Cell("small", "base", 1e-2, 0), gr.Queue([[gr.Grid("", ("base",), (1e-2,), (0,), 0)]], tmp_path / "rec", tmp_path / "claims")
    changes = TOY | {"steps": 400, "log_every": 5}
    timer = threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert gr.work(queue, lambda *_: prepared, gr.Pace(), runs_dir=tmp_path / "runs", changes=changes, say=lambda _: None) == 0
    timer.join()
    assert queue.is_open(cell) and not list((tmp_path / "rec").glob("*.jsonl"))
    assert gr.work(queue, lambda *_: prepared, gr.Pace(), runs_dir=tmp_path / "runs", changes=changes, say=lambda _: None) == 1
    log = ex.read_record(cell.name, tmp_path / "rec")
    assert log.status == "finished" and log.steps[-1]["step"] == 400 and column(log.steps, "step") == sorted(column(log.steps, "step"))


def test_a_failing_cell_is_passed_by_and_the_clock_is_kept(prepared, tmp_path, monkeypatch):
    grid, said, ran = gr.Grid("", ("base",), (1e-3, 3e-3, 1e-2), (0,), 0), [], gr.run_cell
    queue = gr.Queue([[grid]], tmp_path / "rec", tmp_path / "claims")
    def failing(cell, *args, **kwargs):
        if cell.rate == 3e-3: raise ValueError("not enough memory")
        return ran(cell, *args, **kwargs)
    monkeypatch.setattr(gr, "run_cell", failing)
    args = dict(runs_dir=tmp_path / "runs", changes=TOY, say=said.append)
    assert gr.work(queue, lambda *_: prepared, gr.Pace(time.monotonic() + 1.0), **args) == 0 and "no time" in said[-1]
    assert gr.work(queue, lambda *_: prepared, gr.Pace(), **args) == 2
    with pytest.raises(KeyboardInterrupt), gr.stopping_at(time.monotonic() + 0.05): time.sleep(5)
    time.sleep(0.1)  # and no longer
    assert any("not enough memory" in line for line in said) and not queue.is_done(grid.cells[1])


def test_the_module_runs_workers_packs_records_and_skips_what_is_known(prepared, tmp_path):
    folder, corpus = tmp_path / "data", "web-488MB"  # under this name as on a machine that has the token files only
    by = f"{corpus}-10000"
    for source, target in ((prepared.tokenizer_dir, folder / "tokenizers" / by), (prepared.train.path.parent, folder / "tokens" / f"{corpus}-by-{by}")):
        target.parent.mkdir(parents=True)
        target.symlink_to(source)
    changes = json.dumps(TOY | {"cosine_steps": 6})
    command = [sys.executable, "-m", "cs336_lm.grids", "cosine800", "--directory", str(folder), "--records", str(tmp_path / "rec"),
               "--known", str(tmp_path / "known"), "--runs-dir", str(tmp_path / "runs"), "--gpus", "2", "--set", changes,
               "--archive", str(tmp_path / "out.tar.xz")]
    known = gr.GRIDS["cosine800"].cells[2:9]
    for cell in known: write_record(tmp_path / "known", cell, 4.0)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    made = {p.stem for p in (tmp_path / "rec").glob("*.jsonl")}
    assert made >= {c.name for c in gr.GRIDS["cosine800"].cells} - {c.name for c in known} and not made & {c.name for c in known}
    assert any(name.endswith("seed2") for name in made), "the third seed at the best rate"
    with tarfile.open(tmp_path / "out.tar.xz") as tar: assert made <= {Path(n).stem for n in tar.getnames()}


# ---- what comes next

def test_stages_run_first_seeds_first_and_third_seeds_only_where_all_is_known(tmp_path):
    grid = gr.GRIDS["ablations"]
    assert [c.seed for c in next(gr.stages([grid], list))] == [0] * 25
    for cell in grid.cells: write_record(tmp_path, cell, 4 + abs(math.log10(cell.rate / (1e-3 if cell.variant == "nope" else 1e-2))))
    write_record(tmp_path, gr.Cell("small", "base", 5.6e-3, 0), 1.0)  # of the other grid: not this one's rate
    more = gr.more_cells(grid, gr.grid_logs(tmp_path))
    assert {(c.variant, c.rate, c.seed) for c in more} == {(v, 1e-3 if v == "nope" else 1e-2, 2) for v in grid.variants}
    (tmp_path / f"{gr.Cell('small', 'silu', 3e-2, 1).name}.jsonl").unlink()
    assert "silu" not in {c.variant for c in gr.more_cells(grid, gr.grid_logs(tmp_path))}


def test_two_queues_never_take_the_same_cell_and_stay_apart(tmp_path):
    group = [[gr.GRIDS["ablations"]]]
    queues = [gr.Queue(group, tmp_path / "rec", tmp_path / "claims") for _ in range(2)]
    first = [q.take() for q in queues]
    assert first[0].variant != first[1].variant
    queues[0].give_back(first[0])
    assert queues[0].take() == first[0]
    taken = [*first, *iter(queues[0].take, None), *iter(queues[1].take, None)]
    assert len(taken) == len({c.name for c in taken}) == 50


# ---- statistics

losses = st.dictionaries(st.integers(0, 4), st.floats(2, 9), min_size=3)


@given(losses, losses)
def test_the_interval_is_students(a, b):
    d, common = gr.paired_difference(a, b), sorted(a.keys() & b.keys())
    x = np.array([a[s] - b[s] for s in common])
    if len(x) < 2 or x.std() < 1e-6: return
    # how much of Student's density lies between the ends of the interval, by summing it up
    n, t = len(x) - 1, (d.high - x.mean()) / (x.std(ddof=1) / math.sqrt(len(x)))
    u = np.linspace(-t, t, 200_001)
    density = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2)) * (1 + u**2 / n) ** (-(n + 1) / 2)
    assert abs(np.trapezoid(density, u) - 0.95) < 1e-5 and math.isclose(d.mean, (d.low + d.high) / 2, abs_tol=1e-9)
    assert (d.verdict == "tie") == (len(x) > 2 and d.low <= 0 <= d.high)
    back = gr.paired_difference(b, a)
    assert {"higher": "lower", "lower": "higher"}.get(d.verdict, d.verdict) == back.verdict


def test_verdicts():
    shifted = lambda by: {s: 3 + s / 10 + by for s in range(3)}
    assert gr.paired_difference(shifted(0.1), shifted(0)).verdict == "higher"
    assert gr.paired_difference(shifted(0), shifted(0)).verdict == "tie"
    assert gr.paired_difference({0: 3.0}, {0: 2.0}).verdict == gr.paired_difference({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.1}).verdict == "no claim"
    assert gr.paired_difference({0: 3.0}, {1: 2.0}).verdict == "no claim"
    assert gr.paired_difference({0: math.inf, 1: 3.0, 2: 3.0}, shifted(0)).verdict == "diverged"


def test_what_counts_as_diverged(tmp_path):
    def judged(**kinds):
        write_record(tmp_path, cell := gr.Cell("small", "base", 1e-3, 0), **kinds)
        return gr.is_diverged(ex.read_record(cell.name, tmp_path))
    assert not judged(loss=4.0) and not judged(loss=4.0, last=7.1)
    assert judged(loss=4.0, last=7.3) and judged(loss=4.0, status="diverged") and judged(loss=math.nan)
    assert not judged(loss=4.0, last=7.3, unigram=8.0)


def test_variants_are_compared_at_rates_that_both_have(tmp_path):
    for seed in range(3):
        for rate, base, nope in ((1e-3, 4.2, 4.3), (3e-3, 4.1, 4.5), (5.6e-3, 3.0, None)):
            write_record(tmp_path, gr.Cell("small", "base", rate, seed), base + seed / 100)
            if nope: write_record(tmp_path, gr.Cell("small", "nope", rate, seed), nope + seed / 100)
    logs = gr.grid_logs(tmp_path)
    assert gr.best_rate(logs, "base") == 5.6e-3 and gr.best_rate(logs, "nope") == 1e-3
    assert math.isclose(gr.compare_variants(logs, "nope").mean, 0.2) and gr.compare_variants(logs, "nope").seeds == (0, 1, 2)
    assert math.isclose(gr.compare_variants(logs, "nope", rate=3e-3).mean, 0.4)
    assert gr.compare_variants(logs, "silu") is None and gr.best_rate(logs, "silu") is None
    write_record(tmp_path, gr.Cell("small", "base", 3e-2, 0), 8.0, last=9.0)
    assert gr.largest_stable_rate(gr.grid_logs(tmp_path)) == (5.6e-3, 3e-2)


# ---- the text

def test_overlap_of_a_copy_is_one_and_of_other_text_none(prepared):
    train = open_tokens(prepared.train.path)
    valid = np.concatenate([train[100:180], np.arange(60, dtype=train.dtype) % 256])
    found = gr.overlaps(train, valid, np.array([0, 80]), block=50)
    assert found[0] == 1.0 and found[1] == 0.0
    assert gr.overlaps(train, valid[:10], np.array([0])) == [0.0]  # shorter than a run


def test_validation_is_described_from_the_corpus(prepared, tmp_path):
    paths = gr.describe_validation(prepared, tmp_path)
    sources, duplicates = (json.loads(p.read_text()) for p in paths)
    assert len(sources["starts"]) == len(sources["bytes"]) == len(duplicates["overlap"]) == prepared.valid.documents
    assert {gr.SOURCES[i] for i in sources["source"]} == {"encyclopedia"} and sum(sources["train_documents"].values()) == prepared.train.documents
    assert gr.read_sources(prepared.corpus.name, tmp_path / "nothing", tmp_path) == sources


# ---- sharpness and noise along a run; samples

def test_sharpness_and_noise_along_a_run(prepared, tmp_path):
    cell = gr.Cell("small", "base", 1e-2, 0)
    log = gr.analyse_cell(cell, prepared, runs_dir=tmp_path, records=tmp_path, points=2, rows=4, noise_batches=4, iterations=5, device="cpu", changes=TOY)
    points = log.measures["points"]
    assert [p["step"] for p in points] == [4, 8] and log.name == f"{cell.name}-checkpoints" == ex.read_record(log.name, tmp_path).name
    for point in points: assert point["sharpness"] > 0 and point["adam_sharpness"] > 0
    assert not gr.plot_edge([log, log]).axes[0].get_legend() is None
    checkpoint = read_checkpoint(next((tmp_path / f"{cell.name}-checkpoints" / "checkpoints").glob("*8.pt")))
    model, _, _ = load_model(tmp_path / f"{cell.name}-checkpoints")
    names = [name for name, _ in model.named_parameters()]
    i, scales = names.index("lm_head.weight"), gr.adam_scales(checkpoint, model)
    v = checkpoint["optimizer"]["state"][i]["exp_avg_sq"] / (1 - 0.95**8)
    assert torch.allclose(scales[i], (v.sqrt() + 1e-8) ** -0.5) and all(s.shape == p.shape for s, p in zip(scales, model.parameters()))
    found = [p["noise_scale"] for p in points if p["noise_scale"] is not None]
    assert not found or gr.critical_batch(log) == found[-1] * 24


def test_a_grid_is_not_taken_for_a_folder(tmp_path):
    with pytest.raises(SystemExit, match="took 'ablations,cosine800' for one"): gr.main(["--records", str(tmp_path / "r"), "--known", str(tmp_path), "ablations,cosine800"])
    assert not list(tmp_path.iterdir())


def test_a_run_of_muon_is_not_analysed(prepared, tmp_path):
    with pytest.raises(ValueError, match="small-muon-lr1e-2-seed0 is trained by muon"): gr.analyse_cell(gr.Cell("small", "muon", 1e-2, 0), prepared, runs_dir=tmp_path, records=tmp_path, changes=TOY)
    assert not list(tmp_path.iterdir())


def test_loss_of_a_text_is_the_models(prepared):
    torch.manual_seed(1)
    model = TransformerLM(ModelConfig(vocab_size=prepared.tokenizer.vocab_size, **TOY["model"]))
    ids = [prepared.tokenizer.token_to_id(END_OF_TEXT), *prepared.tokenizer.encode("Lamp 3 is")]
    logits = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], dim=-1)
    by_hand = -statistics.mean(logits[i, token].item() for i, token in enumerate(ids[1:]))
    assert math.isclose(gr.text_loss(model, prepared.tokenizer, ["Lamp 3 is", ""]), by_hand, rel_tol=1e-5)
    assert math.isnan(gr.text_loss(model, prepared.tokenizer, [""]))


# ---- figures

GRID_FIGURES = ["fig1_learning_rate", "fig2_batch_size", "fig3_no_rmsnorm", "fig4_post_norm", "fig5_nope", "fig6_silu", "ablation_grid"]


def test_figures_of_grids_are_pending_then_drawn_alike_twice(tmp_path):
    records = tmp_path / "runs"
    assert set(ex.pending_figures(records)) == set(ex.FIGURES) and ex.draw_figures(tmp_path) == []
    for grid in (gr.GRIDS[name] for name in ("learning_rate", "ablations", "cosine800", "batch_size")):
        for cell in grid.cells:
            diverged = cell.rate > 2e-2
            if cell.seed == 0: write_record(records, cell, 4 + abs(math.log10(cell.rate / 3e-3)), last=9.0 if diverged else None)
    assert not set(ex.pending_figures(records)) & set(GRID_FIGURES)
    drawn = lambda: {p.name: p.read_bytes() for p in ex.draw_figures(tmp_path, only=["fig1_learning_rate", "fig3_no_rmsnorm"])}
    first = drawn()
    assert len(first) == 4 and drawn() == first
    write_record(records, gr.Cell("small", "base", 3e-3, 1), 4.05)  # a further seed is drawn where it is recorded
    assert drawn()["fig1_learning_rate.png"] != first["fig1_learning_rate.png"]
    for name in ("fig2_batch_size", "ablation_grid"): assert ex.FIGURES[name].plot(ex.figure_logs(ex.FIGURES[name], records)).axes
    (records / f"{gr.Cell('small', 'nope', 1e-3, 0).name}.jsonl").unlink()
    assert ex.pending_figures(records)["fig5_nope"] == ["small-nope-lr1e-3-seed0"]
    with pytest.raises(FileNotFoundError, match="small-nope-lr1e-3-seed0"): ex.draw_figures(tmp_path, only="fig5_nope")


@settings(max_examples=30)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.integers(1, 12))
def test_smoothing_keeps_constants_and_bounds(values, width):
    values = np.array(values)
    found = gr.smoothed(values, width)
    assert len(found) == len(values) and values.min() - 1e-9 <= found.min() and found.max() <= values.max() + 1e-9


# ---- the command

def test_the_command_runs_a_cell_on_official_data_once_and_counts_it(prepared, tmp_path, monkeypatch, capsys):
    from cs336_lm.cli import main
    monkeypatch.setattr(gr, "prepare_cells", lambda corpus, vocab_size, **_: calls.append((corpus, vocab_size)) or prepared)
    monkeypatch.setattr(gr, "cell_config", lambda cell, prepared, runs_dir, changes=None, real=gr.cell_config: real(cell, prepared, runs_dir, TOY | changes))
    calls, line = [], f"experiment run small-nope-lr1e-2-seed0 --data official --device cpu --figures {tmp_path} --runs-dir {tmp_path / 'runs'}".split()
    assert main(line) == 0 and main(line) == 0 and calls == [("tinystories", 10_000)]
    assert "1 recorded already, 0 to run" in capsys.readouterr().out
    assert ex.read_record("small-nope-lr1e-2-seed0", tmp_path / "runs-official").status == "finished"
    assert main(["experiment", "status", "--data", "official", "--figures", str(tmp_path)]) == 0 == main(["experiment", "list"])
    out = capsys.readouterr().out
    assert "ablations          1 of 50 recorded" in out and all(name in out for name in gr.GRIDS)
    assert main(["experiment", "list", "cosine800"]) == 0 and capsys.readouterr().out.split() == list(gr.GRIDS["cosine800"].runs)


@pytest.mark.parametrize("line", ["experiment run small-base", "experiment list ablation", "experiment runs", "experiment run --data owt a", "experiment run"])
def test_mistakes_of_the_command_are_one_line(line, capsys):
    from cs336_lm.cli import main
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "Traceback" not in err
