"""The documentation is true: tutorials and examples run, no public name is missing, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
import tutorials

import jaxsrn

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = sorted(DOCS.rglob("*.md"))
TUTORIALS = sorted(tutorials.TUTORIALS.glob("*.py"))
MODULES = sorted(module.name for module in pkgutil.iter_modules(jaxsrn.__path__) if not module.name.startswith("_"))
# A link in Markdown, or the source of an image, without its anchor.
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    outputs = tutorials.run(path)
    assert any(printed for printed, _ in outputs)


def test_text_and_code_of_a_tutorial_are_told_apart():
    source = '"""# Title\n\nAbout."""\n\nx = 1\n\n# Text\n# and more.\n\n\n# A comment of code.\ny = 2\n\nprint(x)\n'
    found = tutorials.blocks(source)
    assert [block.is_text for block in found] == [True, False, True, False]
    assert found[0].source == "# Title\n\nAbout."
    assert found[2].source == "Text\nand more."
    # Line numbers are those of the file, for messages of errors.
    lines = source.split("\n")
    assert all(lines[block.line - 1 :] for block in found)


def test_recorded_tables_have_no_tags():
    """What looks like a tag of HTML, as `<G, K>`, is not shown outside of code."""
    tables = [*RESULTS.glob("*.md"), *(ROOT / "examples").glob("*/*.md"), *PAGES]
    tags = [
        f"{path.name}: {line}"
        for path in tables
        for line in path.read_text().split("\n")
        if line.startswith("|") and re.search(r"<[A-Za-z]", re.sub(r"`[^`]*`", "", line))
    ]
    assert not tags


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "index.md"], ids=lambda path: path.stem)
def test_snippets_run_as_they_are(path, pytestconfig):
    """In a process of their own, with JAX's default configuration and no line added; warnings count as in this one."""
    snippets = code_blocks(path)
    assert snippets
    filters = [*pytestconfig.getini("filterwarnings"), *(pytestconfig.getoption("pythonwarnings") or [])]
    python = [sys.executable, *(f"-W{each}" for each in filters)]
    for snippet in snippets:
        done = subprocess.run([*python, "-c", snippet], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


PACKAGE = Path(jaxsrn.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize(
    "name", [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in WITH_EXAMPLES]
)
def test_examples_in_docstrings(name):
    # As users have it: without the strict numerics of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.attempted
    assert not outcome.failed


def public_names() -> set[str]:
    names = {f"jaxsrn.{name}" for name in jaxsrn.__all__ if name not in MODULES}
    for module in MODULES:
        loaded = importlib.import_module(f"jaxsrn.{module}")
        # What is in `jaxsrn` itself is documented there.
        own = [name for name in loaded.__all__ if getattr(jaxsrn, name, None) is not getattr(loaded, name)]
        names |= {f"jaxsrn.{module}.{name}" for name in own}
    return names


def test_no_public_name_is_missing_from_the_reference():
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = re.findall(r"^::: (jaxsrn[\w.]*)$", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(set(documented))
    assert set(documented) == public_names()


def test_no_public_name_is_that_of_a_file():
    """The reference, which is made without importing the library, would show the file in place of the name."""
    paths = [PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py") for name in public_names()]
    assert not [path for path in paths if path.exists()]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md", "docs"])
def test_links_lead_somewhere(name):
    """To files of the checkout: `docs/_tools/hooks.py` leads them to the pages that are made of such files."""
    for page in [*PAGES, *TUTORIALS] if name == "docs" else [ROOT / name]:
        targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
        missing = [target for target in targets if not (page.parent / target).exists()]
        assert not missing, page


def test_every_recorded_table_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [path.name for path in RESULTS.glob("*.md") if f"performance/{path.name}" not in menu]


def test_every_tutorial_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [path.stem for path in TUTORIALS if f"tutorials/{path.stem}.md" not in menu]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
