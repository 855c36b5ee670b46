"""Edit a notebook as text: percent cells in a .py file, the notebook's outputs and cell ids kept where a cell is unchanged.

    python tools/notebook_text.py out nbs/04_bpe.ipynb bpe.txt.py     notebook to text
    python tools/notebook_text.py in  bpe.txt.py nbs/04_bpe.ipynb     text to notebook (made if it is not there)

A cell starts with `# %% tags=["check"]` or `# %% [markdown]`.
"""
import argparse
from pathlib import Path

import jupytext, nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbdev.clean import clean_nb

FORMAT = {"extension": ".py", "format_name": "percent"}


def to_text(notebook: Path, text: Path) -> None:
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata["jupytext"] = {"cell_metadata_filter": "tags,-all", "notebook_metadata_filter": "-all"}
    text.write_text(jupytext.writes(nb, FORMAT), encoding="utf-8")


def to_notebook(text: Path, notebook: Path) -> None:
    nb = jupytext.reads(text.read_text(encoding="utf-8"), FORMAT)
    if notebook.exists(): nb = combine_inputs_with_outputs(nb, nbformat.read(notebook, as_version=4), FORMAT)
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nb.nbformat, nb.nbformat_minor = 4, 5
    clean_nb(nb, allowed_metadata_keys={"kernelspec"}, allowed_cell_metadata_keys={"tags"})
    for cell in nb.cells: cell.setdefault("id", nbformat.v4.new_code_cell().id)
    tmp = notebook.with_suffix(".ipynb.tmp")
    nbformat.write(nb, tmp)
    tmp.replace(notebook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=["out", "in"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    if not args.source.is_file(): parser.error(f"no such file: {args.source}")
    (to_text if args.direction == "out" else to_notebook)(args.source, args.target)


if __name__ == "__main__": main()
