"""The clock of a run and the records of a race, against brute force; the rule for size and text; the figure's bytes."""
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from cs336_lm import leaderboard as lb
from cs336_lm.experiments import FIGURES, RunLog, figure_logs, pending_figures, save_figure

RECORDS = Path(__file__).resolve().parent.parent / "figures" / "runs"
points = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=8, unique_by=lambda p: p[0])


def run(name: str, evals: list[tuple[float, float]], start: float = 0.0) -> RunLog:
    "A log whose first step begins at `start`, with (seconds after it, bits a byte) evaluations after one at token 0."
    steps = [{"seconds": start + 40, "tokens": 64, "tokens_per_second": 1.6}, {"seconds": start + 41, "tokens": 128, "tokens_per_second": 64.0}]
    made = [{"seconds": start + t + 39, "tokens": 64, "bits_per_byte": b} for t, b in sorted(evals)]
    return RunLog(Path(name), {"name": name}, steps, [{"seconds": 0.0, "tokens": 0, "bits_per_byte": 20.0}, *made], {}, None, False)


def test_the_clock_leaves_out_what_came_before_the_first_step():
    for start in (0.0, 33.5):  # the first step took 40 s of which 39 were compiling
        seconds, bits = lb.clock(run("a", [(2, 1.5), (9, 1.25)], start))
        assert np.allclose(seconds, [2, 9]) and bits.tolist() == [1.5, 1.25]


def test_a_log_without_training_has_an_empty_clock():
    log = RunLog(Path("a"), {"name": "a"}, [], [{"seconds": 1.0, "tokens": 0, "bits_per_byte": 3.0}], {}, None, False)
    assert [len(x) for x in lb.clock(log)] == [0, 0] and lb.bits_at(log, 1e9) is None and lb.race_records([log]) == []


def test_a_run_of_one_step_has_a_clock():
    log = run("a", [(1, 2.0)])
    seconds, _ = lb.clock(RunLog(log.path, log.header, log.steps[:1], log.evals, {}, None, False))
    assert np.allclose(seconds, [40.0])  # nothing later tells how long a step takes


@given(st.lists(points, min_size=1, max_size=4), st.integers(0, 70))
def test_records_are_the_lowest_that_any_run_had_reached(runs, seconds):
    logs = [run(f"run{i}", evals) for i, evals in enumerate(runs)]
    reached = [bits for evals in runs for t, bits in evals if t <= seconds]
    records = [bits for t, bits, _ in lb.race_records(logs) if t <= seconds + 1e-6]
    assert (records[-1] if records else None) == (min(reached) if reached else None)
    assert records == sorted(records, reverse=True) and len(set(records)) == len(records)


@given(points, st.integers(0, 70))
def test_bits_at_is_the_last_evaluation_by_then(evals, seconds):
    ended = [bits for t, bits in sorted(evals) if t <= seconds]
    assert lb.bits_at(run("a", evals), seconds + 1e-6) == (ended[-1] if ended else None)


def test_of_a_models_full_runs_the_lowest_is_drawn():
    names = ["full-writeup-muon-lr1e-2-seed0", "full-writeup-muon-lr3e-3-seed0", "full-base-lr3e-3-seed0", "small-base-lr3e-3-seed0", "full-no-rmsnorm-lr3e-4-seed0", "demo"]
    logs = [run(name, [(2, 2.0), (5, bits)]) for name, bits in zip(names, (1.5, 1.25, 1.4, 1.1, 1.0, 0.9))]
    logs.append(run("full-writeup-muon-lr1e-2-seed1", [(2, 2.0), (5, None)]))  # diverged
    assert [log.name for log in lb.best_racers(logs)] == ["full-base-lr3e-3-seed0", "full-writeup-muon-lr3e-3-seed0"]


@given(st.floats(1e6, 1e30))
def test_the_rule_spends_the_budget(flops):
    parameters, tokens = lb.compute_optimal(flops)
    assert math.isclose(6 * parameters * tokens, flops, rel_tol=1e-9) and math.isclose(tokens, 20 * parameters)


@pytest.mark.parametrize("flops", [0, -1.0, math.nan])
def test_the_rule_wants_a_positive_budget(flops):
    with pytest.raises(ValueError, match="above 0"): lb.compute_optimal(flops)


def test_the_figure_is_the_same_twice(tmp_path):
    assert "leaderboard" not in pending_figures(RECORDS)
    recipe = FIGURES["leaderboard"]
    logs = figure_logs(recipe, RECORDS)
    drawn = [[p.read_bytes() for p in save_figure(recipe.plot(logs), tmp_path / str(i))] for i in (0, 1)]
    assert drawn[0] == drawn[1]
    corpora = {log.header["corpus"]["name"] for log in logs}
    assert corpora == {"web-488MB"}, "only runs on one text race"
