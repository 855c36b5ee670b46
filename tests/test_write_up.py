"""Chapter 18: every claim has a row that computes its verdict, answers follow the configuration, no result is typed, the page renders.

Chapters are run here as plain code, cell by cell, so that a test can change a preset under them.
"""
import ast, contextlib, importlib.util, io, itertools, json, math, re, warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("IPython")
pytest.importorskip("sympy")

from cs336_lm.transformer import PRESETS, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CHAPTER = NBS / "18_write_up.ipynb"
LISTED = json.loads((NBS / "18_claims.json").read_text(encoding="utf-8"))
CLAIMS, TRIALS = ([claim for claim in LISTED if (claim["kind"] == "trial") == trial] for trial in (False, True))


def cells(path: Path) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"]), "tag": (c["metadata"].get("tags") or [""])[0]} for c in found]


def definitions(source: str) -> str:
    "Only what a cell defines: what it asserts, prints and draws is left out."
    kept = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    return ast.unparse(ast.Module([node for node in ast.parse(source).body if isinstance(node, kept)], []))


def run_chapter(path: Path, monkeypatch, checks: bool = True) -> tuple[dict, dict[str, str]]:
    "The names that a chapter defines, and what each of its code cells prints or displays, run from nbs/ as a notebook is."
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.chdir(NBS)
    printed, space = {}, {"__name__": "__main__"}
    text_of = lambda value: getattr(value, "data", None) or str(value)
    monkeypatch.setattr("IPython.display.display", lambda *values, **_: print(*map(text_of, values), sep="\n"))
    for cell in cells(path):
        if cell["cell_type"] != "code" or re.search(r"^#\| *(slow|cuda|eval: *false)", cell["source"], flags=re.M): continue
        source = cell["source"] if checks or cell["tag"] not in ("check", "measure") else definitions(cell["source"])
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(source, f"{path.name} {cell['id']}", "exec"), space)
        printed[cell["id"]] = out.getvalue()
    return space, printed


@pytest.fixture(scope="module")
def book():
    "Chapter 18, run once with all its checks."
    with pytest.MonkeyPatch.context() as monkeypatch: return run_chapter(CHAPTER, monkeypatch)


@pytest.fixture
def in_nbs(monkeypatch): monkeypatch.chdir(NBS)


def table_rows(text: str) -> list[list[str]]:
    "The rows of all Markdown tables with six columns, without their heads."
    rows = [re.split(r"(?<!\\) \| ", line.strip()[2:-2]) for line in text.split("\n") if line.startswith("| ")]
    return [row for row in rows if len(row) == 6 and row[0] != "claim" and row[0] != "---"]


# --- the errata

def test_each_claim_has_one_row_and_each_row_is_shown(book):
    space, printed = book
    assert len(CLAIMS) > 100 and len(TRIALS) == 17 and len({claim["id"] for claim in LISTED}) == len(LISTED)
    assert set(space["ROWS"]) == {claim["id"] for claim in CLAIMS}
    assert {*space["TRIALS"], "5.9 loss"} == {claim["id"] for claim in TRIALS}
    assert {claim["id"].split()[0] for claim in CLAIMS} == {"1.1", "1.2", "2.1", "2.2", "2.3", "3.1", "4.1", "4.2"}
    assert {claim["id"].split()[0] for claim in TRIALS} == {"5.2", "5.3", "5.5", "5.6", "5.7", "5.8", "5.9"}
    stored = "\n".join("".join(out.get("data", {}).get("text/markdown", [])) + "\n" for cell in cells(CHAPTER) for out in cell.get("outputs", []))
    for text in ("\n".join(printed.values()), stored):
        rows = table_rows(text)
        assert [row[0] for row in rows] == [claim["claim"] for claim in LISTED]
        assert all(re.match(r"agrees|\*\*differs\*\*|tie|not measured here", row[3]) and (row[4].strip("`")) for row in rows)


def test_a_row_gives_the_write_ups_value_again_or_says_that_nothing_does(book, in_nbs):
    space, _ = book
    unexplained = []
    for claim in CLAIMS:
        again = space["ROWS"][claim["id"]].again
        if again == "unexplained": unexplained.append(claim["id"])
        elif claim["kind"] == "measured": assert space["value_of"](again, "2025") == claim["value"]
        else: assert space["same"](claim, space["value_of"](again, "2025")), claim
    explained_away = {"4.2 constant"} | {claim["id"] for claim in CLAIMS if claim["kind"] == "measured" and claim["id"] not in ("2.1 slowest", "2.2 longest")}
    assert set(unexplained) == explained_away


def test_verdicts_that_the_issue_names(book, in_nbs):
    judged = book[0]["judged"]
    wrong = ["1.1 print", "1.1 print inside", "1.2 smaller", "1.2 misdecodes", "1.2 bit 5 excludes", "2.3 below one", "2.3 pile",
             "3.1 parameters", "3.1 memory", "3.1 flops", "3.1 long", "4.1 ten", "4.1 diverges", "4.2 total", "4.2 peak", "4.2 slope",
             "4.2 constant", "4.2 batch", "4.2 step", "4.2 days"]
    right = ["1.1 chr", "1.2 example", "1.2 ffff", "3.1 layers", "3.1 lm head", "3.1 bottleneck", "4.1 hundred", "4.2 act total"]
    assert all(judged(name)[1].startswith("**differs**") for name in wrong), [(n, judged(n)) for n in wrong]
    assert all(judged(name)[1].startswith("agrees") for name in right), [(n, judged(n)) for n in right]


def test_numbers_by_an_independent_calculation(book, in_nbs):
    V, T, d, L, H = 50_257, 1_024, 1_600, 48, 25
    parameters = {"2025": 2 * V * d + L * (4 * d * d + 3 * d * 6_400 + 2 * d) + d, "2026": 2 * V * d + L * (4 * d * d + 3 * d * 4_288 + 2 * d) + d}
    width, listed = {"2025": 6_400, "2026": 4_288}, {"2025": 2, "2026": 4}
    flops = lambda e, n=T: n * L * (8 * d * d + 4 * n * d + 6 * d * width[e]) + 2 * n * d * V
    slope = {e: 4 * (L * (8 * T * d + 2 * H * T * T + listed[e] * T * width[e]) + T * d + 2 * T * V) / 1e9 for e in width}
    expected = {"3.1 parameters": {e: parameters[e] / 1e8 for e in width}, "3.1 memory": {e: 4 * parameters[e] / 1e9 for e in width},
                "3.1 short": {e: flops(e) / 1e12 for e in width}, "3.1 long": {e: flops(e, 16_384) / 1e14 for e in width},
                "3.1 short attention_core": {e: 100 * 4 * T * T * d * L / flops(e) for e in width},
                "4.2 slope": slope, "4.2 constant": {e: 16 * parameters[e] / 1e9 for e in width},
                "4.2 batch": {e: (80 - 16 * parameters[e] / 1e9) // slope[e] for e in width},
                "4.2 days": {e: 400_000 * 1_024 * 3 * flops(e) / (rate / 2) / 86_400 for e, rate in (("2025", 19.5e12), ("2026", 495e12))},
                "2.3 pile": {"": 825e9 / 8e4 / 3_600}}
    for name, values in expected.items():
        found = book[0]["judged"](name)[0]
        assert {e: float(v) for e, v in found.items()} == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("index", [0, 6, 40, 60, 90, -1])
def test_a_changed_claim_changes_its_verdict(book, in_nbs, index):
    space, claim = book[0], CLAIMS[index]
    values, _ = space["judged"](claim["id"])
    other = {"number": lambda v: str(float(v) * 2 + 1), "truth": lambda v: not v, "formula": lambda v: f"({v}) + B", "text": lambda v: v + "x"}
    after = space["verdict"]({**claim, "value": other[claim["kind"]](claim["value"])}, values)
    assert after == "**differs**"


def test_the_list_holds_facts_and_not_the_text():
    for claim in LISTED:
        assert set(claim) == {"id", "claim", "value", "unit", "kind"} and claim["claim"].isascii() or "你好" in claim["claim"]
        assert claim["kind"] in {"number", "order", "truth", "text", "formula", "measured", "trial"}


# --- section 5: judges over recorded runs

BASE_MODEL = asdict(ModelConfig())


def grid_run(variant: str, rate: float, seed: int, loss: float = 3.0, *, bits: float = 1.0, tau: float = 0.2, rough: float = 0.05,
             fall: float = 3.0, diverged: bool = False, batch: int = 64, **model) -> SimpleNamespace:
    "A run of 400 logged steps: a warm-up of 20 that falls by `fall`, then an exponential of time constant `tau` with a saw of height `rough` on it."
    def loss_at(i): return 10 - fall * (i - 1) / 19 if i <= 20 else 3 + 4 * math.exp(-i / 400 / tau) + (rough if i % 4 < 2 else -rough)
    header = {"config": {"warmup_steps": 20, "log_every": 1, "batch_size": batch, "model": BASE_MODEL | model}, "corpus": {"name": "some-text"}}
    log = SimpleNamespace(header=header, steps=[{"step": i, "tokens": 1000 * i, "loss": loss_at(i)} for i in range(1, 401)])
    return SimpleNamespace(variant=variant, rate=rate, seed=seed, log=log, loss=math.inf if diverged else loss,
                           bits_per_byte=math.inf if diverged else bits, diverged=diverged)


def world(s: int, seeds: int = 3) -> list[SimpleNamespace]:
    "Runs in which every claim of section 5 holds (s = 1), the opposite holds (-1), or only chance between the seeds is seen (0)."
    runs, size, keys = [], 0.0005 if s else 0.02, itertools.count(1)

    def add(variant, rate, loss=3.0, *, tau=0.2, rough=0.05, fall=3.0, bits=1.0, **rest):
        key = next(keys)
        for seed in range(seeds):
            chance = size * (key % 7) * (seed - 1) if seeds == 3 else 0.0     # of mean zero over three seeds
            runs.append(grid_run(variant, rate, seed, loss + chance, tau=tau + chance / 20, rough=rough + chance / 20,
                                 fall=fall + chance, bits=bits + chance, **rest))

    rates, best = (1e-3, 3e-3, 1e-2), {1: 1e-2, -1: 1e-3, 0: 3e-3}[s]
    for i, rate in enumerate(rates): add("base", rate, 3.0 if rate == best or not s else 3.2, fall=3 + 0.5 * s * i)
    add("base", 3e-2, diverged=True)
    for rate in (*rates, 3e-2):
        add("no-rmsnorm", rate, 3 + 0.3 * s + (rate != 1e-3) * abs(s), diverged=rate > {1: 3e-3, -1: 3e-2, 0: 1e-2}[s])
        add("no-rmsnorm-cosine800", rate, 3.0, diverged=rate > {1: 1e-2, -1: 3e-3, 0: 1e-2}[s])
    for variant in ("post-norm", "silu"): add(variant, best, 3 + 0.3 * s, tau=0.2 + 0.06 * s)
    add("nope", best, 3 + 0.3 * s, bits=1.1, position="none")
    add("rope-context512-32k", 1e-3, context_length=512)
    add("nope-context512-32k", 1e-3, bits=1.1 + 0.1 * s, context_length=512, position="none")
    for doublings, batch in ((1, 128), (2, 256)):
        add(f"batch{batch}", best, 3 + 0.3 * (s == -1), tau=0.2 + 0.03 * s * doublings, rough=0.05 - 0.01 * s * doublings, batch=batch)
    for batch, finest in ((8, {1: 1e-3, -1: 1e-2, 0: 3e-3}[s]), (512, {1: 1e-2, -1: 1e-3, 0: 3e-3}[s])):
        for rate in rates: add(f"batch{batch}", rate, 3.0 if rate == finest else 4.0, batch=batch)
    return runs


BY_FIT = "5.3 rate"  # judged by a parabola's minimum, which these worlds, best at the first or last rate, have not


@pytest.mark.parametrize("s, word", [(1, "agrees"), (-1, "**differs**"), (0, "tie")])
def test_the_best_rate_of_a_batch_is_judged_by_the_fitted_minimum(book, s, word):
    rates, runs = (1e-3, 3e-3, 1e-2), []
    for variant, batch, at in (("base", 64, 3e-3), ("batch512", 512, 3e-3 * 10 ** (0.2 * s))):
        for seed in range(3):
            minimum = at * 10 ** (0.02 * (seed - 1) * (1 if batch == 64 else -1))
            runs += [grid_run(variant, rate, seed, 3 + math.log10(rate / minimum) ** 2, batch=batch) for rate in rates]
    assert book[0]["tried"](BY_FIT, runs)[1] == word
    border = [run for run in runs if run.variant == "base" or run.rate < 1e-2]
    assert book[0]["tried"](BY_FIT, border)[1] == "not measured here yet"


@pytest.mark.parametrize("s, word", [(1, "agrees"), (-1, "**differs**"), (0, "tie")])
def test_judges_of_section_5_can_say_each_verdict(book, s, word):
    space, logs = book[0], world(s)
    verdicts = {name: space["tried"](name, logs) for name in space["TRIALS"] if name != BY_FIT}
    assert {name: verdict for name, (_, verdict) in verdicts.items()} == dict.fromkeys(verdicts, word), verdicts
    assert all("3 seeds" in here for here, _ in verdicts.values())


def test_two_seeds_and_no_record_give_no_verdict(book):
    space = book[0]
    for logs in (world(1, seeds=2), []):
        assert {space["tried"](name, logs)[1] for name in space["TRIALS"]} == {"not measured here yet"}
    assert {space["tried"](name, [])[0] for name in space["TRIALS"]} == {"no record"}


@pytest.mark.parametrize("missing", ["base", "no-rmsnorm", "post-norm", "nope", "rope-context512-32k", "batch128"])
def test_a_missing_variant_leaves_only_its_claims_open(book, missing):
    space = book[0]
    logs = [run for run in world(1) if run.variant != missing]
    open_claims = {name for name in space["TRIALS"] if space["tried"](name, logs)[1] == "not measured here yet"}
    about = {"no-rmsnorm": {"5.5 rate", "5.5 cosine", "5.5 slow"}, "post-norm": {"5.6 faster", "5.6 lower"}, "nope": {"5.7 better", "5.7 web"},
             "rope-context512-32k": {"5.7 web"}, "batch128": {"5.3 noise", "5.3 early", "5.3 passes", "5.3 alike"}, "base": set(space["TRIALS"]) - {"5.5 cosine"}}
    assert open_claims == about[missing] | {BY_FIT}


def test_answers_to_experiments_fill_in_from_runs(book, monkeypatch, in_nbs):
    space, ablations = book[0], ["layer_norm_ablation", "pre_norm_ablation", "no_pos_emb", "swiglu_ablation"]
    others = ["learning_rate", "batch_size_experiment"]
    for name in ("LOGS", "FULL"): monkeypatch.setitem(space, name, [])
    assert space["SHORT"]["main_experiment"]() == ""
    assert all(space["SHORT"][name]() == "" for name in ablations + others)
    monkeypatch.setitem(space, "LOGS", world(1))
    for name in ablations + others: assert not space["is_pending"](name) and "400,000 tokens of some-text" in space["short_answer"](name)
    assert all("ends above the base: +0.300 nats a token" in space["short_answer"](name) for name in ablations)
    assert "At the base's, 3 of 3 seeds diverge." in space["short_answer"]("layer_norm_ablation")
    assert "Of 4 rates from 0.001 to 0.03, 0.01 ends lowest, at 3.000" in space["short_answer"]("learning_rate")
    assert re.search("batch 8 3.*batch 64 3.*batch 256 3", space["short_answer"]("batch_size_experiment"))
    monkeypatch.setitem(space, "LOGS", world(1) + [grid_run("batch2048", 1e-3, 0, 6.6, batch=2048)])
    assert "2048" not in space["short_answer"]("batch_size_experiment")  # for speed and memory only
    monkeypatch.setitem(space, "LOGS", world(1))
    monkeypatch.setitem(space, "FULL", [grid_run("base", 3e-3, 0, 3.1, bits=1.2), grid_run("web32k", 3e-3, 0, 3.6, bits=1.1, vocab_size=32_000)])
    assert re.search("32,000 entries end at 3.600.*1.100 bits.*10,000 entries end at 3.100.*1.200", space["short_answer"]("main_experiment"))
    monkeypatch.setitem(space, "LOGS", world(0))
    assert all("ties with the base" in space["short_answer"](name) for name in ablations)
    monkeypatch.setitem(space, "LOGS", world(1, seeds=2))
    assert all(space["SHORT"][name]() == "" for name in ablations)


def test_recorded_files_are_judged(book, tmp_path):
    space, wanted = book[0], ["5.8 faster", "5.8 lower"]
    for run in world(-1):
        if run.variant not in ("base", "silu") or run.rate != 1e-3: continue
        rows = [{"kind": "header", "schema": 1, "name": "x", **run.log.header}, *({"kind": "step", **row} for row in run.log.steps),
                {"kind": "eval", "step": 400, "tokens": 400_000, "seconds": 1.0, "split": "valid", "loss": run.loss, "bits_per_byte": 1.0},
                {"kind": "end", "status": "finished", "reason": None}]
        name = f"small-{run.variant}-lr1e-3-seed{run.seed}"
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, **({"name": name} if "config" in row else {})}) + "\n" for row in rows))
    logs = space["grid_logs"](tmp_path)
    assert len(logs) == 6 and [space["tried"](name, logs)[1] for name in wanted] == ["**differs**"] * 2
    assert space["tried"]("5.8 lower", logs)[0].startswith("-0.300 nats (") and space["tried"]("5.6 lower", logs)[1] == "not measured here yet"


def test_the_web_models_loss_is_judged_on_its_own_text_alone(book, tmp_path, monkeypatch, in_nbs):
    space = book[0]
    monkeypatch.setitem(space, "RECORDS", tmp_path)
    claim = next(claim for claim in TRIALS if claim["id"] == "5.9 loss")
    assert space["web_loss"](claim) == ("no record", "not measured here yet")
    for corpus, loss, verdict in (("web-488MB", 3.6, "not measured here"), ("owt", 3.73, "agrees"), ("owt", 3.9, "**differs**")):
        header = {"kind": "header", "schema": 1, "name": "x", "config": {"model": asdict(PRESETS["writeup-openwebtext"])}, "corpus": {"name": corpus}}
        rows = [header, {"kind": "eval", "step": 1, "tokens": 1, "seconds": 1.0, "split": "valid", "loss": loss}]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        here, found = space["web_loss"](claim)
        assert found == verdict and f"{loss:.2f} nats" in here


# --- the answers follow the configuration

CHANGES = [lambda config: replace(config, d_ff=config.d_ff + 64), lambda config: replace(config, num_layers=config.num_layers + 1)]
change_presets = pytest.mark.parametrize("change", CHANGES, ids=["d_ff", "num_layers"])


def apply(change, monkeypatch):
    for name in [name for name in PRESETS if name.startswith("gpt2-")]: monkeypatch.setitem(PRESETS, name, change(PRESETS[name]))


@change_presets
def test_short_answers_and_errata_follow_a_preset(book, in_nbs, change, monkeypatch):
    space = book[0]
    names = ["transformer_accounting", "adamw_accounting"]
    numbers = lambda text: re.findall(r"\d[\d,.]*\d", text)
    before, rows = {n: space["short_answer"](n) for n in names}, {c["id"]: space["judged"](c["id"])[0] for c in CLAIMS}
    apply(change, monkeypatch)
    for name in names:
        for old, new in zip(before[name].split("\n\n"), space["short_answer"](name).split("\n\n")):     # an edition each
            assert sum(a != b for a, b in zip(numbers(old), numbers(new), strict=True)) >= 5, (old, new)
    dependent = [name for name, row in space["ROWS"].items() if re.search(r"gpt2\(|line\(E", row.here) and CLAIMS_BY_ID[name]["kind"] == "number"]
    dependent = [name for name in dependent if not name.endswith(("bytes", "batch", "layers"))]
    assert len(dependent) > 20
    for name in dependent: assert space["judged"](name)[0] != rows[name], name
    others = [c["id"] for c in CLAIMS if c["id"][0] in "12"]
    assert all(space["judged"](name)[0] == rows[name] for name in others)


CLAIMS_BY_ID = {claim["id"]: claim for claim in CLAIMS}
ACCOUNTING = NBS / "10_accounting.ipynb"


@pytest.fixture(scope="module")
def accounting():
    with pytest.MonkeyPatch.context() as monkeypatch: return run_chapter(ACCOUNTING, monkeypatch, checks=False)[1]


@change_presets
def test_chapter_10s_answers_follow_a_preset(accounting, change, monkeypatch):
    apply(change, monkeypatch)
    after = run_chapter(ACCOUNTING, monkeypatch, checks=False)[1]
    answers = [c["id"] for c in cells(ACCOUNTING) if c["tag"] == "answer" and accounting.get(c["id"], "").strip()]
    symbolic = [cell for cell in answers if re.search(r"^ +A = ", accounting[cell], flags=re.M)]      # the formulas have letters only
    assert len(answers) >= 5 and len(symbolic) == 1
    for cell in answers: assert (accounting[cell] == after[cell]) == (cell in symbolic), accounting[cell]


# --- no result is typed

NUMBER = re.compile(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?")


def long_numbers(text: str) -> set[float]:
    "Numbers of three or more significant digits that stand in a text."
    found = set()
    for match in NUMBER.findall(text):
        digits = re.sub(r"e.*|[,_.]", "", match).strip("0")
        if len(digits) >= 3: found.add(float(match.replace(",", "").replace("_", "").rstrip(".")))
    return found


def typed(source: str) -> set[float]:
    "Numbers of three or more significant digits in a cell's code: literals and the words of its strings, no format specifications."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue): node.format_spec = None
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return set().union(*(long_numbers(value if isinstance(value, str) else repr(value)) for value in constants), set())


# What the handout gives: editions, a batch, the longer context, the cards; a corpus's name; and what the write-up says, which an answer may quote.
GIVEN = {2025, 2026, 1024, 16384, 19.5, 495, 488, 0xFF, 86400} | set().union(*(long_numbers(str(claim["value"])) for claim in CLAIMS))


@pytest.mark.parametrize("name", ["01_unicode", "09_optimization", "10_accounting"])
def test_no_result_is_typed_in_an_answer(name):
    for cell in cells(NBS / f"{name}.ipynb"):
        if cell["tag"] != "answer": continue
        if cell["cell_type"] == "markdown": assert not long_numbers(re.sub(r"\]\(.*?\)", "]", cell["source"])) - GIVEN, cell["source"]
        else: assert not typed(cell["source"]) - GIVEN, cell["source"]


def test_no_result_is_typed_in_a_short_answer(book, in_nbs):
    "No number of a short answer stands in the code that makes it, unless it is given."
    space = book[0]
    results = set().union(*(long_numbers(space["short_answer"](name)) for name in space["SHORT"]))
    makers = [c["source"] for c in cells(CHAPTER) if c["cell_type"] == "code" and re.search(r"^@short|^def \w+_answer", c["source"], flags=re.M)]
    assert len(makers) >= 8 and len(results) > 20
    for source in makers: assert not typed(source) & results - GIVEN, source


def test_no_row_of_the_errata_types_its_result(book, in_nbs):
    space = book[0]
    for name, row in space["ROWS"].items():
        values = space["judged"](name)[0].values()
        assert not typed(row.here) & {float(v) for v in values if isinstance(v, (int, float))}, row.here
        assert not re.fullmatch(r"[-\d._e'\"]+|True|False", row.here), row.here


def test_the_check_for_typed_results_can_fail():
    assert typed('print("XL has 2,127,057,600 parameters")') == {2127057600}
    assert typed('print(f"{name}: {2_127_057_600:,} and 66.91 %")') == {2127057600, 66.91}
    assert typed("share = 0.6691") and not typed("print(f'{total / 1e9:.2f} GB in {80} GB')")
    assert long_numbers("a batch of 12, 4.51 TFLOP, 6,584 days") == {4.51, 6584}


# --- gathering

def test_every_problem_is_answered_or_pending(book, in_nbs):
    space, printed = book
    text = "\n".join(printed.values())
    assert len(space["ASKED"]) == 18
    for problem in space["ASKED"]:
        row = next(line for line in text.split("\n") if line.startswith(f"| {problem} | "))
        if problem in space["ANSWERS"]: assert f"[derivation]({space['ANSWERS'][problem][0].name})" in row
        else: assert row.endswith("| pending |")
        assert ("*Pending" in row) == space["is_pending"](problem)
    for edition in ("**2025:**", "**2026:**"): assert text.count(edition) >= 4
    assert "not measured here" in space["short_answer"]("leaderboard")


def test_a_pending_answer_fills_in_by_itself(book, tmp_path, in_nbs):
    gather, shown = book[0]["gather"], "validation loss 1.41"
    chapter = tmp_path / "14_learning_rate.ipynb"
    output = {"output_type": "stream", "name": "stdout", "text": [shown]}
    chapter.write_text(json.dumps({"cells": [
        {"cell_type": "markdown", "metadata": {"tags": ["answer"]}, "source": ["### Answer: learning_rate, batch_size_experiment"]},
        {"cell_type": "code", "metadata": {"tags": ["answer"]}, "source": ["print(best)"], "outputs": [output]},
        {"cell_type": "code", "metadata": {"tags": ["answer"]}, "id": "abc", "source": ["plot()"],
         "outputs": [{"output_type": "display_data", "data": {"image/png": "xx"}}]}]}))
    found = gather(chapter)
    assert set(found) == {"learning_rate", "batch_size_experiment"} and shown in found["learning_rate"]
    assert "[Figure](14_learning_rate.ipynb#abc)" in found["learning_rate"]


def test_what_is_measured_is_read_from_records(book, tmp_path, monkeypatch, in_nbs):
    space = book[0]
    record = json.loads((ROOT / "figures" / "runs" / "bpe-tinystories-9MB-10000.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(space, "RECORDS", tmp_path)
    assert "Pending" in space["short_answer"]("train_bpe_tinystories") and "not measured here" in space["short_answer"]("train_bpe_tinystories")
    (tmp_path / "bpe-tinystories-10000.json").write_text(json.dumps({**record, "corpus": "tinystories", "longest_bytes": 4321}))
    answer = space["short_answer"]("train_bpe_tinystories")
    assert "4321 bytes" in answer and "not measured here" not in answer


def test_stored_outputs_are_fresh(book):
    "The chapters' answers as they are now stand in the stored outputs."
    stored = {c["id"]: c for c in cells(CHAPTER)}
    for cell, text in book[1].items():
        outs = ["".join(out.get("text", out.get("data", {}).get("text/markdown", ""))) for out in stored[cell].get("outputs", [])]
        assert "\n".join(outs).strip() == text.strip(), "run tools/run_notebooks.py nbs/18_write_up.ipynb"


# --- the page

@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("nbconvert")
    spec = importlib.util.spec_from_file_location("make_writeup", ROOT / "tools" / "make_writeup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_whole_and_needs_no_network(tool):
    text = tool.page(tool.chapter(run=False))
    assert not re.search(r"<(?:script|link|iframe)|\ssrc=\"(?!data:)|url\(|@import", text)
    prose = re.sub(r"<(pre|code).*?</\1>|<style.*?</style>|<[^>]+>", "", text, flags=re.S)
    assert "$" not in prose and "\\frac" not in prose and "[Figure]" not in prose
    links = re.findall(r'href="(?!#|https?:)([^"#]+)', text)
    assert links and all((ROOT / "build" / link).resolve().is_file() for link in links)
    assert text.count("<table") >= 9 and text.count('alt="figure of') >= 3
    assert sum(text.count(f"<td{style}>{claim['claim'].split('`')[0].split('$')[0]}") > 0 for claim in CLAIMS for style in [""]) > 90


def test_formulas(tool):
    assert tool.with_formulas("a $x^2$ and `$y$` cost $5").count("<img") == 1
    assert tool.pieces("12 L d^{2} + 2 V d + d \\left(2 L + 1\\right)") == ["12 L d^{2}", "+ 2 V d", "+ d \\left(2 L + 1\\right)"]
    with pytest.raises(ValueError, match="nosuch"): tool.formula(r"\nosuch{x}")
    with pytest.raises(ValueError, match="no stored picture"): tool.figure("01_unicode.ipynb", "nothing")


def test_pdf_is_skipped_with_a_sentence_where_there_is_no_browser(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    assert tool.write_pdf(tmp_path / "a.html", tmp_path / "a.pdf").startswith("No PDF: ")
