"""Chapter 18: every claim has a row that computes its verdict, answers follow the configuration, no result is typed, the page renders.

Chapters are run here as plain code, cell by cell, so that a test can change a preset under them.
"""
import ast, contextlib, importlib.util, io, json, re, warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("IPython")
pytest.importorskip("sympy")

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CHAPTER = NBS / "18_write_up.ipynb"
CLAIMS = json.loads((NBS / "18_claims.json").read_text(encoding="utf-8"))


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
    assert len(CLAIMS) > 100 and len({claim["id"] for claim in CLAIMS}) == len(CLAIMS)
    assert set(space["ROWS"]) == {claim["id"] for claim in CLAIMS}
    assert {claim["id"].split()[0] for claim in CLAIMS} == {"1.1", "1.2", "2.1", "2.2", "2.3", "3.1", "4.1", "4.2"}
    stored = "\n".join("".join(out.get("data", {}).get("text/markdown", [])) + "\n" for cell in cells(CHAPTER) for out in cell.get("outputs", []))
    for text in ("\n".join(printed.values()), stored):
        rows = table_rows(text)
        assert [row[0] for row in rows] == [claim["claim"] for claim in CLAIMS]
        assert all(re.match(r"agrees|\*\*differs\*\*|not measured here", row[3]) and (row[4].strip("`")) for row in rows)


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
    for claim in CLAIMS:
        assert set(claim) == {"id", "claim", "value", "unit", "kind"} and claim["claim"].isascii() or "你好" in claim["claim"]
        assert claim["kind"] in {"number", "order", "truth", "text", "formula", "measured"}


# --- the answers follow the configuration

CHANGES = [lambda config: replace(config, d_ff=config.d_ff + 64), lambda config: replace(config, num_layers=config.num_layers + 1)]
change_presets = pytest.mark.parametrize("change", CHANGES, ids=["d_ff", "num_layers"])


def apply(change, monkeypatch):
    from cs336_lm.transformer import PRESETS
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

def test_every_problem_is_answered_or_pending(book):
    space, printed = book
    text = "\n".join(printed.values())
    assert len(space["ASKED"]) == 18
    for problem in space["ASKED"]:
        row = next(line for line in text.split("\n") if line.startswith(f"| {problem} | "))
        if problem in space["ANSWERS"]: assert f"[derivation]({space['ANSWERS'][problem][0].name})" in row
        else: assert "*Pending: no chapter answers this yet.*" in row and row.endswith("| pending |")
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
