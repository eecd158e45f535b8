"""The API reference is whole, its examples run, and no link in it or in a tracked Markdown file leads nowhere.

Each rule is a function over names, pages or files that lists what breaks it, and is shown here to catch what it is for.
(That an example gives what it says is checked where it stands: pytest runs the docstrings of `mpjax` as tests.)
"""

from __future__ import annotations

import doctest
import html.parser
import inspect
import re
import subprocess
import sys
import types
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mpjax

ROOT = Path(__file__).parent.parent


# The reference


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What `make docs` builds, without a warning from anybody."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "docs.reference", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """What a page offers to links, where its own lead, and which of its sections hold a docstring."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.documented: set[str] = set()
        self.links: list[str] = []
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given["id"]} if "id" in given else set()
        self.links += [given[key] for key in ("href", "src") if key in given]
        if tag in ("section", "div") and "id" in given:
            self._section = given["id"]
        elif given.get("class") == "docstring":
            self.documented.add(self._section)


def undocumented(page: Page, names: Iterable[str]) -> list[str]:
    """Names without an anchor of their own on the page, or without a docstring under it."""
    return [name for name in names if name not in page.anchors & page.documented]


def broken_links(folder: Path) -> list[str]:
    """Links of a built site that lead to no file or anchor in it; addresses elsewhere are not asked."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                continue
            if not target.is_file():
                wrong.append(f"{path.relative_to(folder)}: {link}: no such file")
            elif url.fragment and target in pages and url.fragment not in pages[target].anchors:
                wrong.append(f"{path.relative_to(folder)}: {link}: no such anchor")
    return wrong


def test_every_public_name_has_its_place_and_docstring(site):
    page = Page((site / "mpjax.html").read_text(encoding="utf-8"))
    assert undocumented(page, mpjax.__all__) == []
    losses = Page((site / "mpjax" / "losses.html").read_text(encoding="utf-8"))
    assert undocumented(losses, mpjax.losses.__all__) == []


def test_arguments_are_set_as_a_list_and_examples_as_code(site):
    text = (site / "mpjax.html").read_text(encoding="utf-8")
    assert "<li><strong>loss_fn:</strong>" in text and '<span class="gp">&gt;&gt;&gt; </span>' in text


def test_every_link_of_the_reference_leads_somewhere(site):
    assert broken_links(site) == []


def test_a_missing_name_a_missing_docstring_and_a_broken_link_are_found(tmp_path):
    text = (
        '<section id="told"><div class="docstring">What it is.</div></section><section id="bare"></section>'
        '<a href="#told"></a><a href="b.html#there"></a><a href="https://example.org/gone#x"></a>'
        '<a href="#lost"></a><a href="b.html#lost"></a><a href="c.html"></a>'
    )
    (tmp_path / "a.html").write_text(text)
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert undocumented(Page(text), ["told", "bare", "absent"]) == ["bare", "absent"]
    assert broken_links(tmp_path) == [
        "a.html: #lost: no such anchor",
        "a.html: b.html#lost: no such anchor",
        "a.html: c.html: no such file",
    ]


# Its examples


def documented_objects(names: dict[str, Any]) -> dict[str, Any]:
    """What must show how it is used: whatever can be called, and the functions of a module, but for exceptions.

    A module that can be called stands for its function of the same name.
    """
    found = {}
    for name, value in names.items():
        if isinstance(value, types.ModuleType) and callable(value):
            found[name] = vars(value)[value.__name__.rpartition(".")[2]]
        elif isinstance(value, types.ModuleType):
            found |= documented_objects({f"{name}.{inner}": getattr(value, inner) for inner in value.__all__})
        elif callable(value) and not (isinstance(value, type) and issubclass(value, BaseException)):
            found[name] = value
    return found


def without_example(objects: dict[str, Any]) -> list[str]:
    """Those whose own docstring, and not that of a base class, holds no example that is run."""
    wrong = []
    for name, value in objects.items():
        docstring = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        examples = doctest.DocTestParser().get_examples(docstring or "")
        if all(example.options.get(doctest.SKIP) for example in examples):
            wrong.append(name)
    return wrong


PUBLIC = {name: getattr(mpjax, name) for name in mpjax.__all__}


def test_every_public_name_that_can_be_called_has_an_example_that_runs():
    objects = documented_objects(PUBLIC)
    assert {"wrap", "losses.ctc", "Policy", "fit"} <= objects.keys()
    assert not {"losses", "LossScale", "__version__", "CheckpointError", "PrecisionWarning"} & objects.keys()
    assert without_example(objects) == []


def test_a_missing_example_is_found():
    class Base:
        """
        >>> 1
        1
        """

    class Bare(Base):
        pass

    def skipped():
        """
        >>> 1  # doctest: +SKIP
        1
        """

    def silent():
        pass

    objects = documented_objects(
        {"Base": Base, "Bare": Bare, "skipped": skipped, "silent": silent, "E": OSError, "n": 1}
    )
    assert without_example(objects) == ["Bare", "skipped", "silent"]


def unresolvable(objects: dict[str, Any]) -> list[str]:
    """Functions with an annotation that raises once it is evaluated, as editors, type hints and pdoc do."""
    wrong = []
    for name, value in objects.items():
        if inspect.isfunction(value):
            try:
                inspect.get_annotations(inspect.unwrap(value), eval_str=True)
            except Exception as error:
                wrong.append(f"{name}: {error}")
    return wrong


def test_every_annotation_of_a_public_function_can_be_evaluated():
    assert unresolvable(documented_objects(PUBLIC)) == []


def test_an_annotation_that_cannot_be_evaluated_is_found():
    def misspelt(x: Anny):  # noqa: F821
        pass

    assert unresolvable({"misspelt": misspelt}) == ["misspelt: name 'Anny' is not defined"]


# Markdown


class Link(NamedTuple):
    line: int
    target: str


def prose(text: str) -> str:
    """Markdown without its code, whose lines stay, so that they can be counted."""
    text = re.sub(r"^(```|~~~).*?^\1", lambda code: "\n" * code[0].count("\n"), text, flags=re.M | re.S)
    return re.sub(r"(`+)[^`].*?\1", lambda code: re.sub(r"[^\n]", "x", code[0]), text, flags=re.S)


def links_of(text: str) -> list[Link]:
    pattern = r"""\]\(\s*<?([^\s)>]+)|^\[[^\]]+\]:\s*<?([^\s>]+)|<(?:a|img)\s[^>]*?(?:href|src)="([^"]+)"""
    body = prose(text)
    return [Link(body.count("\n", 0, m.start()) + 1, m[1] or m[2] or m[3]) for m in re.finditer(pattern, body, re.M)]


def headings_of(text: str) -> set[str]:
    """The anchors that a code host gives to headings: small letters, no punctuation, hyphens for spaces, then -1, -2."""
    found: dict[str, int] = {}
    anchors = set()
    code_free = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    for title in re.findall(r"^#{1,6} +(.*?)[ #]*$", code_free, re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


def broken_markdown(root: Path, files: Iterable[Path]) -> list[str]:
    """Relative links that lead to no file, and anchors that lead to no heading."""
    wrong = []
    for path in files:
        for line, link in links_of(path.read_text(encoding="utf-8")):
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = path.parent / urllib.parse.unquote(url.path) if url.path else path
            where = f"{path.relative_to(root).as_posix()}:{line}: {link}"
            if not target.exists() or not target.resolve().is_relative_to(root.resolve()):
                wrong.append(f"{where}: no such file")
            elif url.fragment and target.suffix == ".md":
                if url.fragment not in headings_of(target.read_text(encoding="utf-8")):
                    wrong.append(f"{where}: no such heading")
    return wrong


def tracked_markdown(root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=root, capture_output=True)
    if listed.returncode == 0 and listed.stdout:
        return [root / name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]
    folders = ("docs", "experiments", "notebooks")  # a source distribution has no git
    return [*root.glob("*.md"), *(path for folder in folders for path in (root / folder).rglob("*.md"))]


def test_every_link_of_the_markdown_files_leads_somewhere():
    files = tracked_markdown(ROOT)
    assert {ROOT / "README.md", ROOT / "docs" / "coming_from.md"} <= set(files)
    assert sum(len(links_of(path.read_text(encoding="utf-8"))) for path in files) > 20
    assert broken_markdown(ROOT, files) == []


def test_a_broken_link_of_a_markdown_file_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# `A`, b & [c](d.md)!\n## Twice\n## Twice\n```sh\n# not a heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n[1](b.md#a-b--c) [2](b.md#twice-1) [3](#top) [4](https://example.org/x#y) `[5](code.md)`\n"
        "```\n[6](code.md)\n```\n[7](gone.md) ![8](gone.png)\n[9](b.md#not-a-heading) [10](#lost) [11](../out.md)\n[12]: gone.md\n"
    )
    assert broken_markdown(tmp_path, [page]) == [
        "a.md:6: gone.md: no such file",
        "a.md:6: gone.png: no such file",
        "a.md:7: b.md#not-a-heading: no such heading",
        "a.md:7: #lost: no such heading",
        "a.md:7: ../out.md: no such file",
        "a.md:8: gone.md: no such file",
    ]
