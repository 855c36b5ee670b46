"""The rules of the house: the package is what the notebooks export, notebooks are clean, imports follow the chapters."""
import ast, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)]
TAGS = {"question", "derivation", "clear", "check", "fast", "measure", "answer"}
TEXT_MODULES = ["corpora", "pretokenization", "bpe", "tokenizer", "dataset"]
TRAINING_MODULES = TEXT_MODULES + ["layers", "transformer", "optimization", "accounting", "distributed", "training", "generation", "experiments", "grids", "samples", "leaderboard"]
chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path: Path):
    return pytest.importorskip("nbformat").read(path, as_version=4)


def module_name(nb) -> str | None:
    found = [m for c in nb.cells if c.cell_type == "code" for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", c.source, flags=re.M)]
    return found[0] if found else None


def test_export_is_fresh(tmp_path):
    pytest.importorskip("nbdev")
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "cs336_lm").mkdir()
    shutil.copy(ROOT / "cs336_lm" / "__init__.py", tmp_path / "cs336_lm")
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, check=True)
    fresh, committed = ({p.name: p.read_text() for p in (base / "cs336_lm").glob("*.py")} for base in (tmp_path, ROOT))
    assert sorted(fresh) == sorted(committed), "a module without a notebook, or a notebook never exported"
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"run nbdev_export: {stale} differ from their notebooks"


@chapter
def test_notebook_is_clean(path):
    clean_nb = pytest.importorskip("nbdev.clean").clean_nb
    nbformat = pytest.importorskip("nbformat")
    nb = read(path)
    nbformat.validate(nb)
    clean_nb(nb, allowed_metadata_keys={"kernelspec"}, allowed_cell_metadata_keys={"tags"})
    assert nbformat.writes(nb).strip() == path.read_text(encoding="utf-8").strip(), "run nbdev_clean"
    assert set(nb.metadata) == {"kernelspec"}


@chapter
def test_notebook_is_executed_without_error(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not [o for o in cell.outputs if o.output_type == "error"], cell.source


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_has_its_parts(path):
    nb = read(path)
    first = nb.cells[0]
    assert first.cell_type == "markdown" and re.fullmatch(r"# [^\n]+\n+> [^\n]+\s*", first.source), "first cell: title and > description"
    tags = [t for c in nb.cells for t in c.metadata.get("tags", [])]
    assert set(tags) <= TAGS, set(tags) - TAGS
    assert all(len(c.metadata.get("tags", [])) <= 1 for c in nb.cells), "one tag a cell"
    assert "question" in tags
    if module_name(nb): assert {"derivation", "check"} <= set(tags) and tags.count("check") >= 3


def imported_modules(source: str) -> set[str]:
    "Names of cs336_lm modules that a cell imports, at any depth."
    source = "\n".join(line for line in source.split("\n") if not line.lstrip().startswith(("%", "!")))
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cs336_lm."): found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "cs336_lm": found |= {a.name for a in node.names if a.name != "__version__"}
        elif isinstance(node, ast.Import): found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cs336_lm.")}
    return found


def test_reading_order_is_import_order():
    order = {module_name(read(p)): i for i, p in enumerate(CHAPTERS)}
    for i, path in enumerate(CHAPTERS):
        own = module_name(read(path))
        for cell in read(path).cells:
            if cell.cell_type != "code": continue
            for name in imported_modules(cell.source) - {own}:
                assert order.get(name, -1) < i and name in order, f"{path.name} imports {name}, which comes later"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_lazy():
    python("import sys, cs336_lm; heavy = {'torch', 'numpy', 'regex', 'matplotlib'} & set(sys.modules); assert not heavy, heavy")
    python("import cs336_lm; [getattr(cs336_lm, n) for n in cs336_lm.__all__]; assert callable(cs336_lm.train)")
    python("import cs336_lm\ntry: cs336_lm.nothing\nexcept AttributeError as e: assert 'nothing' in str(e)\nelse: raise SystemExit(1)")


def test_text_chapters_do_not_import_torch():
    python(f"import sys, importlib\nfor m in {TEXT_MODULES}: importlib.import_module('cs336_lm.' + m)\nassert 'torch' not in sys.modules")


def test_training_runs_without_notebook_and_command_line_packages():
    blocker = ("import sys, importlib, importlib.abc\n"
               "class Block(importlib.abc.MetaPathFinder):\n"
               "    def find_spec(self, name, path=None, target=None):\n"
               "        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb', 'tyro', 'jaxtyping', 'IPython', 'nbformat'}: raise ImportError(name)\n"
               "sys.meta_path.insert(0, Block())\n")
    python(blocker + f"for m in {TRAINING_MODULES}: importlib.import_module('cs336_lm.' + m)")


def test_readme_is_fresh():
    pytest.importorskip("nbconvert")
    subprocess.run([sys.executable, "tools/make_readme.py", "--check"], cwd=ROOT, check=True)


def test_package_data_and_version():
    import cs336_lm
    assert (ROOT / "cs336_lm" / "py.typed").exists()
    settings = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(), flags=re.M))
    assert cs336_lm.__version__ == settings["version"]
