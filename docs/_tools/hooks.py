"""What `mkdocs build` does beyond its plugins: tutorials and recorded tables become pages, formulas become MathML.

Formulas are converted when the pages are built, so that they need neither scripts nor a network to be read.
"""

from __future__ import annotations

import html
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

TOOLS = Path(__file__).parent
DOCS = TOOLS.parent
ROOT = DOCS.parent
# Where recorded tables and pictures are, and the folders in which their pages are.
PAPERS = ("zheng2025", "sedghi2019", "grishina2024", "guo_ye2019")
NETWORKS = ("analyze_resnet50", "lipschitz_constants")
RECORDED = {"performance": ROOT / "benchmarks" / "results"}
RECORDED |= {f"experiments/{name}": ROOT / "examples" / name for name in PAPERS + NETWORKS}
STUDIES = ("compare_optimizers", "norms_in_training", "sanyal2020", "srn_gan", "stable_recurrence")
RECORDED |= {f"studies/{study}": ROOT / "examples" / study for study in STUDIES}
FOLDER_OF = {source: folder for folder, source in RECORDED.items()}

# Tables, and code of up to 120 columns, get the room of the table of contents.
_WIDE = "---\nhide: [toc]\n---\n\n"
# Spaces within numbers, at which cells of tables are not to break: before units, in intervals and spreads, in p-values.
_WITHIN_NUMBERS = re.compile(
    r"(?<=\d) (?=(?:to -?\d|± |(?:ms|s|min|GB|MB)\b))|(?<=\d to) (?=-?\d)|(?<=±) (?=\d)|(?<=\(p) (?==)|(?<=\(p =) "
)
# Code, formulas and tags, which stay as they are, or a number that is not to break at the sign of its exponent.
_EXPONENTS = re.compile(r"<(pre|code|math)\b.*?</\1>|<[^>]*>|(?P<number>\d[\d.]*e-\d+)", flags=re.DOTALL)


def _tutorials():
    spec = importlib.util.spec_from_file_location("tutorials", TOOLS / "tutorials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_files(files, config):
    """Adds a page for each tutorial and each recorded table, with their pictures."""
    tutorials = _tutorials()
    paths = sorted(tutorials.TUTORIALS.glob("*.py"))
    # Two at a time: most of their time they compile, each on one core.
    with ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(tutorials.page, paths))
    for path, text in zip(paths, pages, strict=True):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=_WIDE + text))
        for picture in (tutorials.CACHE / path.stem).glob("*.png"):
            name = f"tutorials/{path.stem}/{picture.name}"
            files.append(File.generated(config, name, content=picture.read_bytes()))
    for folder, source in RECORDED.items():
        for path in (*source.glob("*.md"), *source.glob("*.png")):
            head = _WIDE.encode() if path.suffix == ".md" else b""
            files.append(File.generated(config, f"{folder}/{path.name}", content=head + path.read_bytes()))
    return files


# The target of a link or picture in Markdown, without its anchor.
_TARGET = re.compile(r"(?<=\]\()[^)#\s]+")


def _as_page(target: str, page: str) -> str:
    """A link from a page to a tutorial or a recorded file, as a link to the page that is made of it."""
    path = Path(os.path.normpath((DOCS / page).parent / target))
    if path.parent in FOLDER_OF:
        made = DOCS / FOLDER_OF[path.parent] / path.name
    elif path.parent == DOCS / "tutorials" and path.stem != Path(page).stem:
        made = path.with_suffix(".md")
    else:
        return target
    return os.path.relpath(made, (DOCS / page).parent)


def on_page_markdown(markdown, page, config, files):
    """Links lead to files of the checkout, where the pages are read too, and become links between pages here."""
    return _TARGET.sub(lambda target: _as_page(target[0], page.file.src_uri), markdown)


# The converter takes for operators what are names, leaves no space around functions, and lets bars stretch.
_SPACE = '<mspace width="0.17em" />'
_FUNCTION = "<mi>(?:arccos|cos|sin|log)</mi>"
_BETTER = {
    r"<mrow><mo>(max|min)</mo></mrow>": r"<mi>\1</mi>",
    r"<mo>((?!max|min|sup)[a-zA-Z]{2,})</mo>": r"<mi>\1</mi>",
    rf"(?<=</m[in]>)(?=(?:<msup>)?{_FUNCTION})": _SPACE,
    rf"({_FUNCTION}|<msup>{_FUNCTION}<mn>2</mn></msup>)(?=<m[in]>)(?!<mn>2</mn></msup>)": rf"\1{_SPACE}",
    r"<mo>(&#x02016;|&#x0007C;)</mo>": r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
}


def mathml(latex: str, display: bool) -> str:
    """A formula as MathML; one that cannot be read raises an error, which stops the build."""
    # The converter has no place for the number of an equation.
    latex = re.sub(r"\\tag\{(.*?)\}", r"\\quad \\text{(\1)}", latex)
    formula = latex2mathml.converter.convert(latex, display="block" if display else "inline")
    for pattern, better in _BETTER.items():
        formula = re.sub(pattern, better, formula)
    return formula


def on_page_content(content, page, config, files):
    """Converts the formulas that `pymdownx.arithmatex` has marked, and keeps the numbers of tables whole."""
    content = re.sub(r"<td.*?</td>", lambda cell: _WITHIN_NUMBERS.sub("\u00a0", cell[0]), content, flags=re.DOTALL)

    def converted(match):
        return mathml(html.unescape(match["latex"]).strip()[2:-2], display=match["tag"] == "div")

    marked = r'<(?P<tag>span|div) class="arithmatex">(?P<latex>.*?)</(?P=tag)>'
    content = re.sub(marked, converted, content, flags=re.DOTALL)
    content = _EXPONENTS.sub(lambda m: f'<span class="number">{m[0]}</span>' if m["number"] else m[0], content)
    # A formula and the sign after it stay on one line.
    return re.sub(r"</math>(?=[.,;:)])", "</math>\u2060", content)
