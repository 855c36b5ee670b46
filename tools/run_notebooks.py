"""Run the notebooks in order and store their outputs, or check that the stored outputs still hold.

    python tools/run_notebooks.py                     run every notebook in nbs/, write the outputs back
    python tools/run_notebooks.py nbs/04_bpe.ipynb    only this one
    python tools/run_notebooks.py --check             run, write nothing, fail where a text output differs
    python tools/run_notebooks.py --flagged slow      also run the cells flagged `#| slow` (or cuda)

Cells with `#| eval: false` or a flag of settings.ini's `tst_flags` are not run and keep what was recorded.
"""
import argparse, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
# What would change an output from one run or machine to the next is fixed here.
FIXED = {"PYTHONHASHSEED": "0", "COLUMNS": "100", "OMP_NUM_THREADS": "2", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
         "TQDM_DISABLE": "1", "NO_COLOR": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "JUPYTER_PLATFORM_DIRS": "1"}


class _Runner(NotebookClient):
    "Executes a notebook cell by cell, leaving skipped cells as they are."
    skipped_flags: frozenset = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and self._skips(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

    def _skips(self, source: str) -> bool:
        directives = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", source, flags=re.M)
        return any(d.replace(" ", "") == "eval:false" or d in self.skipped_flags for d in directives)


def join_streams(nb) -> None:
    """Make one output of consecutive chunks of the same stream, which arrive cut at random places.

    A line that says "compiling ... (once; ...)" depends on what was compiled before, and goes."""
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        joined = []
        for out in cell.outputs:
            if out.get("name") == "stderr":
                out.text = re.sub(r"^compiling .*\(once; .*\n", "", out.text, flags=re.M)
                if not out.text: continue
            if joined and out.output_type == "stream" == joined[-1].output_type and out.name == joined[-1].name:
                joined[-1].text += out.text
            else: joined.append(out)
        cell.outputs = joined


def run(path: Path, skipped: frozenset, timeout: int):
    "The executed and cleaned notebook, as it should stand on disk."
    nb = nbformat.read(path, as_version=4)
    client = _Runner(nb, timeout=timeout, kernel_name="python3", extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}})
    client.skipped_flags = skipped
    client.execute()
    join_streams(nb)
    clean_nb(nb, allowed_metadata_keys={"kernelspec"}, allowed_cell_metadata_keys={"tags"})
    return nb


def texts(cell) -> list[str]:
    "The text a reader sees under a cell; pictures are left out, since their bytes follow the font library."
    return [o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain", "")
            for o in cell.get("outputs", []) if "image/png" not in o.get("data", {})]


def differences(old, new) -> list[str]:
    found = []
    for a, b in zip(old.cells, new.cells):
        if a.cell_type == "code" and texts(a) != texts(b):
            found.append(f"cell {a.get('id')}: stored {texts(a)!r:.300} but now {texts(b)!r:.300}")
        pictures = [sum("image/png" in o.get("data", {}) for o in c.get("outputs", [])) for c in (a, b)]
        if pictures[0] != pictures[1]: found.append(f"cell {a.get('id')}: stored {pictures[0]} pictures but now {pictures[1]}")
    return found


def process(path: Path, args, skipped: frozenset) -> str | None:
    "Run one notebook; the trouble found, or None."
    started = time.perf_counter()
    old = nbformat.read(path, as_version=4)
    try: new = run(path, skipped, args.timeout)
    except CellExecutionError as error: return f"{path.name}: {error}"
    print(f"{path.name:32s} {time.perf_counter() - started:6.1f} s", flush=True)
    if args.check:
        found = differences(old, new)
        return f"{path.name}: outputs changed\n  " + "\n  ".join(found) if found else None
    tmp = path.with_suffix(".ipynb.tmp")
    nbformat.write(new, tmp)
    tmp.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a text output differs")
    parser.add_argument("--flagged", default="", metavar="FLAGS", help="flags whose cells are run too, several with commas")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a cell may take")
    parser.add_argument("--workers", type=int, default=1, help="notebooks run side by side")
    args = parser.parse_args()
    missing = [p for p in args.notebooks if not p.is_file()]
    if missing: parser.error(f"no such notebook: {missing[0]}")
    os.environ.update(FIXED)
    skipped = frozenset(get_config(path=ROOT).tst_flags.split()) - set(args.flagged.split(","))
    paths = args.notebooks or sorted((ROOT / "nbs").glob("*.ipynb"))
    with ThreadPoolExecutor(args.workers) as pool:
        troubles = [t for t in pool.map(lambda p: process(p.resolve(), args, skipped), paths) if t]
    for t in troubles: print(t, file=sys.stderr)
    print(f"{len(paths) - len(troubles)} notebooks good, {len(troubles)} bad")
    return bool(troubles)


if __name__ == "__main__": sys.exit(main())
