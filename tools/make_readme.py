"""Make README.md from nbs/index.ipynb.

    python tools/make_readme.py           write it
    python tools/make_readme.py --check   exit 1 when it is stale
"""
import argparse, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by tools/make_readme.py; edit the notebook. -->\n\n"


def outputs_only(cell):
    "A cell whose code would only distract, as the Markdown that it printed."
    return nbformat.v4.new_markdown_cell("\n\n".join(o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})))


def readme(root: Path = ROOT) -> str:
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.cells = [outputs_only(c) if "#| echo: false" in c.source else c for c in nb.cells if not re.match(r"\s*#\s*\|\s*hide\b", c.source)]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\]\(\.\./", "](", body)            # links leave from the root, not from nbs/
    body = re.sub(r"\]\((\d\d[a-z]?_\w+\.ipynb)", r"](nbs/\1", body)
    return NOTE + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    target, text = ROOT / "README.md", readme()
    if not args.check: target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        print("README.md is not what nbs/index.ipynb says; run `make export`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
