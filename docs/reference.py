"""The API reference: one page for `mpjax`, one for `mpjax.losses`, built from their docstrings by pdoc.

    make docs                                 # or: python -m docs.reference docs/site

pdoc reads a package by its source, and this one fetches its names lazily. So three things are told to it: where a name
that is neither function nor class has its docstring, that `mpjax.wrap` is a function in the shape of a package, and under
which name users reach `losses`. A warning of pdoc stops the build.
"""

from __future__ import annotations

import sys
import types
import typing
import warnings
from pathlib import Path

import pdoc

import mpjax


def pages() -> dict[str, pdoc.doc.Module]:
    """The documentation of each public module, by the name under which users reach it."""
    values = {name: getattr(mpjax, name) for name in mpjax.__all__}
    for value in values.values():
        resolve_fields(value)
    top = pdoc.doc.Module(mpjax)
    top.submodules = [under_its_public_name(name, value) for name, value in values.items() if is_plain_module(value)]
    top.members = {name: top.members.get(name) or outside_pdocs_rules(name, values[name]) for name in mpjax.__all__}
    for name, member in top.members.items():
        if not member.docstring and name in mpjax._HOME:
            room = pdoc.doc.Module.from_name(f"mpjax.{mpjax._HOME[name]}")
            member.docstring = room.members[name].docstring
    return {page.modulename: page for page in (top, *top.submodules)}


def is_plain_module(value: object) -> bool:
    return isinstance(value, types.ModuleType) and not callable(value)


def under_its_public_name(name: str, module: types.ModuleType) -> pdoc.doc.Module:
    page = pdoc.doc.Module(module)
    page.modulename = page.fullname = f"mpjax.{name}"
    return page


def outside_pdocs_rules(name: str, value: types.ModuleType) -> pdoc.doc.Doc:
    """A public name that is a module, which pdoc leaves out of the page of its package."""
    if not is_plain_module(value):
        return pdoc.doc.Function("mpjax", name, vars(value)[name], (value.__name__, name))
    docstring = f"{pdoc.doc.Module(value).docstring}\n\nIts functions have a page of their own: `mpjax.{name}`."
    nothing = pdoc.doc.empty
    return pdoc.doc.Variable(
        "mpjax", name, docstring=docstring, annotation=nothing, default_value=nothing, taken_from=("mpjax", name)
    )


def resolve_fields(value: object) -> None:
    """The annotations of a NamedTuple's constructor, which has no module in which pdoc could look them up."""
    if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
        value.__new__.__annotations__ = typing.get_type_hints(value)


def build(folder: Path) -> None:
    """Writes the site into a folder.

    The source of each function is left out: most of the time of a build, and of a page's size, goes into colouring it.
    """
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"mpjax {mpjax.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\b")
        modules = pages()
        for name, page in modules.items():
            file = folder / f"{name.replace('.', '/')}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(pdoc.render.html_module(page, modules), encoding="utf-8")
        (folder / "index.html").write_text(pdoc.render.html_index(modules), encoding="utf-8")
        (folder / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
