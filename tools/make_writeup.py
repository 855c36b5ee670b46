"""Make one page of the write-up (nbs/18_write_up.ipynb) with its figures: HTML in one file, and PDF where Chromium is installed.

    python tools/make_writeup.py                     run the chapter, write build/write_up.html and build/write_up.pdf
    python tools/make_writeup.py --stored            the outputs that are stored, without running it
    python tools/make_writeup.py --output my.html    another place

The page needs no network: figures are read out of the chapters' stored outputs, formulas are drawn here.
"""
import argparse, base64, html, io, json, os, re, shutil, subprocess, sys, tempfile
from functools import lru_cache
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "nbs" / "18_write_up.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-pdf-header-footer")
FONT_SIZE = 11   # points that formulas are drawn at; they are scaled with the text
SCALE = 1.1      # the formulas' letters are smaller than the text's
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", flags=re.S)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)", flags=re.S)
FIGURE = re.compile(r"\[Figure\]\(([\w.-]+\.ipynb)#([\w-]+)\)")
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; font: 16px/1.5 Georgia, 'DejaVu Serif', 'Noto Serif CJK SC', serif; color: #1a1a1a }
h1, h2, h3 { font-family: 'Helvetica Neue', Arial, sans-serif; line-height: 1.25; margin: 1.8em 0 .5em }
h2 { border-bottom: 1px solid #bbb; padding-bottom: .15em } h3 a { font-weight: normal; font-size: .8em }
blockquote { margin: 0 0 1.5em; color: #555 } a { color: #0b5394 } .anchor-link { display: none } img { max-width: 100% }
table { border-collapse: collapse; font-size: .8em; line-height: 1.35; margin: 1em 0; width: 100% }
th, td { border: 1px solid #ccc; padding: .25em .5em; text-align: left !important; vertical-align: top }
th { background: #f0f2f5 } td code { overflow-wrap: anywhere }
td:nth-child(3):nth-last-child(4) { min-width: 8.5em } img.formula { max-width: none }
pre { background: #f6f7f9; padding: .6em .8em; font-size: .72em; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere }
code { font-family: 'DejaVu Sans Mono', Menlo, 'Noto Sans Mono CJK SC', monospace; font-size: .88em } pre code { font-size: 1em }
img.formula { vertical-align: baseline } p.formula { text-align: center }
@page { size: A4; margin: 16mm 14mm }
@media print { body { font-size: 10.5pt; margin: 0; max-width: none; padding: 0 } tr, img { break-inside: avoid } h2, h3 { break-after: avoid } }
"""


@lru_cache(maxsize=None)
def formula(latex: str) -> str:
    "An image of a formula, in the text's size and on its line; ValueError where it cannot be drawn."
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser
    text, target = f"${' '.join(latex.split())}$", io.BytesIO()
    with matplotlib.rc_context({"mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "formula"}):
        font = FontProperties(size=FONT_SIZE)
        try: width, height, depth, *_ = MathTextParser("path").parse(text, dpi=72, prop=font)
        except ValueError as error: raise ValueError(f"cannot draw the formula {text}; write it in simpler LaTeX. {error}") from None
        figure = Figure(figsize=(width / 72, height / 72))
        figure.text(0, depth / height, text, fontproperties=font)
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    data, em = base64.b64encode(target.getvalue()).decode(), lambda points: f"{SCALE * points / FONT_SIZE:.3f}em"
    alt = html.escape(latex).replace("|", "&#124;").replace("\n", " ")
    return (f'<img class="formula" alt="{alt}" style="height:{em(height)};vertical-align:-{em(depth)}" '
            f'src="data:image/svg+xml;base64,{data}">')


def pieces(latex: str) -> list[str]:
    "A long sum cut before its plus signs, so that a line can end there; parts in braces or \\left ... \\right stay whole."
    parts = [""]
    for part in re.split(r"(?= \+ )", latex if len(latex) > 30 else ""):
        parts[-1] += part
        whole = parts[-1].count("{") == parts[-1].count("}") and parts[-1].count(r"\left") == parts[-1].count(r"\right")
        if whole: parts.append("")
    return [part.strip() for part in parts if part] or [latex]


def with_formulas(text: str) -> str:
    "Markdown whose formulas, outside code, are images."
    line = lambda latex: " ".join(map(formula, pieces(latex)))
    draw = lambda m: f'\n\n<p class="formula">{line(m[1])}</p>\n\n' if m[1] else line(m[2])
    return "".join(part if i % 2 else FORMULA.sub(draw, part) for i, part in enumerate(CODE.split(text)))


def figure(chapter: str, cell_id: str) -> str:
    "An image of the pictures that a cell of a chapter has stored; ValueError if there are none."
    cells = json.loads((CHAPTER.parent / chapter).read_text(encoding="utf-8"))["cells"]
    outputs = [out for cell in cells if cell.get("id") == cell_id for out in cell.get("outputs", [])]
    pictures = ["".join(out["data"]["image/png"]).replace("\n", "") for out in outputs if "image/png" in out.get("data", {})]
    if not pictures: raise ValueError(f"cell {cell_id} of {chapter} has no stored picture; run the chapter, then this again")
    return "\n".join(f'<img alt="figure of {chapter}" src="data:image/png;base64,{picture}">' for picture in pictures)


def rendered(text: str, notebooks: str) -> str:
    "Markdown with figures and formulas in it, and links that lead from the page to the folder of notebooks."
    text = with_formulas(text)
    text = FIGURE.sub(lambda m: figure(m[1], m[2]), text)
    return re.sub(r"\]\((\d\d[a-z]?_\w+\.ipynb)", rf"]({notebooks}/\1", text)


def selected(nb, notebooks: str):
    "The cells that a reader of the page needs: prose, and what answers and derivations print; no code and no checks."
    nb = nb.copy()
    nb.cells = [c.copy() for c in nb.cells if not {"check", "clear"} & set(c.metadata.get("tags", []))]
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = rendered(cell.source, notebooks)
        for out in cell.get("outputs", []):
            if "text/markdown" in out.get("data", {}): out.data["text/markdown"] = rendered(out.data["text/markdown"], notebooks)
    return nb


def page(nb, notebooks: str = "../nbs") -> str:
    "The whole page; `notebooks` is the way from it to the notebooks."
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(selected(nb, notebooks))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>The write-up</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f'<body>\n{body}\n</body></html>\n')


def write_pdf(source: Path, target: Path) -> str:
    "Print the page to PDF with Chromium; a sentence that says what came of it."
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None: return "No PDF: it needs Chromium or Chrome on the PATH, and none was found."
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run([browser, *FLAGS, f"--user-data-dir={profile}", f"--print-to-pdf={target}", source.as_uri()],
                              capture_output=True, text=True, timeout=300)
    if done.returncode or not target.is_file(): raise OSError(f"{browser} could not print {source}: {done.stderr.strip()[-500:]}")
    return f"Wrote {os.path.relpath(target)}"


def chapter(run: bool):
    "The notebook, its outputs made now or as they are stored."
    if not run: return nbformat.read(CHAPTER, as_version=4)
    sys.path.insert(0, str(Path(__file__).parent))
    import run_notebooks
    os.environ.update(run_notebooks.FIXED)
    return run_notebooks.run(CHAPTER, frozenset({"slow", "cuda", "notest"}), 900)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", action="store_true", help="use the stored outputs, do not run the chapter")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "write_up.html", help="the HTML file; the PDF stands beside it")
    args = parser.parse_args()
    way = Path(os.path.relpath(CHAPTER.parent, args.output.resolve().parent)).as_posix()
    text = page(chapter(run=not args.stored), way)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    print(f"Wrote {os.path.relpath(args.output)}")
    print(write_pdf(args.output.resolve(), args.output.resolve().with_suffix(".pdf")))
    return 0


if __name__ == "__main__": sys.exit(main())
