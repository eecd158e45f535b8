"""The house rules of the design, each a function over a root folder, each shown to catch what it is for."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "core": 0,
    "policy": 1,
    "numerics": 1,
    "wrap": 2,
    "train": 2,
    "store": 3,
    "measure": 3,
    "steer": 4,
    "cli": 5,
}

# What may be imported in one place only; `lazily`: there too only inside a function.
DOORS = {
    "flax": "mpjax.wrap",
    "flax.linen": "mpjax.wrap.linen",
    "flax.nnx": "mpjax.wrap.nnx",
    "orbax": "mpjax.store",
    "safetensors": "mpjax.store",
    "matplotlib": "mpjax.measure.plots",
}
LAZILY = {"matplotlib", "orbax"}

MAX_LINES = 300
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn", "tensorboardx": "tensorboardX"}
HELPERS = {"experiments._run", "experiments._data"}


class Import(NamedTuple):
    """One import statement: who imports what, where, and whether inside a function."""

    module: str
    target: str
    where: str
    lazy: bool


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name to file for every module of a package under `root`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, package: str) -> Iterator[Import]:
    """Every import in a package, lazy ones too. `from a import b` means a.b where that is a module or a door."""
    ours = modules(root, "mpjax") | modules(root, "experiments")
    for module, path in modules(root, package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        in_functions = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package_parts = (module if path.name == "__init__.py" else module.rpartition(".")[0]).split(".")
                    base = ".".join([*package_parts[: len(package_parts) - node.level + 1], *filter(None, [base])])
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    targets.append(inner if inner in ours or inner in DOORS else base)
            for target in targets:
                where = f"{path.relative_to(root).as_posix()}:{node.lineno}"
                yield Import(module, target, where, id(node) in in_functions)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def climbing_imports(root: Path) -> list[str]:
    """A wing imports itself and lower floors; wings of one floor never meet; `mpjax` itself is for the cli alone."""
    wrong = []
    for found in imports(root, "mpjax"):
        if found.module == "mpjax" or not inside(found.target, "mpjax"):
            continue
        wing = found.module.split(".")[1]
        target = found.target.partition(".")[2].partition(".")[0]
        if wing not in FLOORS:
            wrong.append(f"{found.where}: {wing!r} has no floor; give it one in FLOORS")
        elif not target:
            if wing != "cli":
                wrong.append(f"{found.where}: {wing} imports mpjax itself; import the room that is meant")
        elif wing != target and FLOORS[wing] <= FLOORS.get(target, 99):
            wrong.append(f"{found.where}: {wing} imports {found.target}, which is not on a lower floor")
    return wrong


def circles(root: Path) -> list[str]:
    """No circle among the modules of mpjax, imports inside functions counted."""
    graph: dict[str, set[str]] = {}
    for found in imports(root, "mpjax"):
        if found.module != "mpjax" and inside(found.target, "mpjax") and found.target != found.module:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"circle: {' <- '.join(error.args[1])}"]
    return []


def side_doors(root: Path) -> list[str]:
    """flax.linen, flax.nnx, orbax and matplotlib enter through one door each."""
    wrong = []
    for found in imports(root, "mpjax"):
        library = max((name for name in DOORS if inside(found.target, name)), key=len, default=None)
        if library and not inside(found.module, DOORS[library]):
            wrong.append(f"{found.where}: {found.target} enters through {DOORS[library]} only")
        elif library in LAZILY and not found.lazy:
            wrong.append(f"{found.where}: import {library} inside the function that needs it")
    return wrong


def undeclared_imports(root: Path) -> list[str]:
    """mpjax imports its runtime dependencies (and numpy, which jax brings); an extra's only inside functions."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        bare = [re.split(r"[\[<>=~!; ]", requirement)[0].lower() for requirement in requirements]
        return {IMPORT_NAMES.get(name, name) for name in bare}

    always = names(project["dependencies"]) | {"numpy", "mpjax"} | sys.stdlib_module_names
    extra = names([r for extra in project.get("optional-dependencies", {}).values() for r in extra])
    wrong = []
    for found in imports(root, "mpjax"):
        library = found.target.split(".")[0]
        if library in always or (found.lazy and library in extra):
            continue
        where = "an extra: import it inside a function" if library in extra else "no dependency in pyproject.toml"
        wrong.append(f"{found.where}: {library} is {where}")
    return wrong


def entangled_experiments(root: Path) -> list[str]:
    """An experiment imports mpjax, `_run`, `_data`, never another experiment; mpjax imports no experiment, no test.

    Of the helpers `_run` imports `_data`, and a package's rooms import one another.
    """
    wrong = []
    packages = {f"experiments.{path.parent.name}" for path in (root / "experiments").glob("*/__init__.py")}
    for found in imports(root, "experiments"):
        helper = next((name for name in HELPERS if inside(found.module, name)), None)
        own = next((name for name in packages if inside(found.module, name)), None)
        legal = own is not None and inside(found.target, own)
        legal |= helper != "experiments._data" and found.target in HELPERS
        if inside(found.target, "tests") or (inside(found.target, "experiments") and not legal):
            wrong.append(f"{found.where}: {found.module} imports {found.target}")
    for found in imports(root, "mpjax"):
        if inside(found.target, "experiments") or inside(found.target, "tests"):
            wrong.append(f"{found.where}: mpjax imports {found.target}")
    return wrong


def long_files(root: Path) -> list[str]:
    """No file under mpjax/ or experiments/ has more than 300 lines."""
    files = [*modules(root, "mpjax").values(), *modules(root, "experiments").values()]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [
        f"{path.relative_to(root)}: {n} lines; ask for a second room" for path, n in counts.items() if n > MAX_LINES
    ]


def missing_examples(root: Path) -> list[str]:
    """Each exported name is written in its room; functions and classes with an example (errors: a docstring)."""
    wrong = []
    rooms = modules(root, "mpjax")
    for name, room in exported(root, "_ROOMS").items():
        path = rooms.get(f"mpjax.{room}")
        body = ast.parse(path.read_text(encoding="utf-8")).body if path else []
        written = [node for node in body if name in names_of(node)]
        if not written:
            wrong.append(f"mpjax.{name} is not written in mpjax.{room}")
        for node in written:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node) or ""
                if not doc or (">>>" not in doc and not name.endswith(("Error", "Warning"))):
                    wrong.append(f"mpjax.{room}.{name} has no docstring with an example (>>>)")
    return wrong


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement of a module's body binds by writing something there."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def two_tongued_facade(root: Path) -> list[str]:
    """What `mpjax/__init__` fetches when asked is what it tells type checkers."""
    tree = ast.parse((root / "mpjax/__init__.py").read_text(encoding="utf-8"))
    told = {
        alias.asname: f"{node.module}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    fetched = {name: f"mpjax.{room}.{name}" for name, room in exported(root, "_ROOMS").items()}
    for name, room in exported(root, "_MODULES").items():
        # A package that can be called is told to type checkers as the function that it calls.
        fetched[name] = f"mpjax.{room}.{name}" if room == name else f"mpjax.{room}"
    return [f"mpjax.{name}: fetched and told differ" for name in sorted(dict(fetched.items() ^ told.items()))]


def exported(root: Path, table: str) -> dict[str, str]:
    """Public name to room, read from the tables in `mpjax/__init__`."""
    for node in ast.parse((root / "mpjax/__init__.py").read_text(encoding="utf-8")).body:
        if table in names_of(node):
            value = ast.literal_eval(node.value)
            return value if table == "_MODULES" else {name: room for room, names in value.items() for name in names}
    raise AssertionError(f"mpjax/__init__.py has no {table}")


# Written so that this file does not match itself.
LEAKS = re.compile(
    r"(?<![\w.~])/(?:root|work|home/[\w.-]+|Users/[\w.-]+)/"
    r"|index[-]url|:[/]/\S*/simple\b|^\s*registry\s*="
    r"|\b(?:py[p]i|np[m]js|conda[.]anaconda)\.(?:org|com)\b|python[h]osted",
    re.MULTILINE,
)


def leaks(root: Path) -> list[str]:
    """No path of one machine and no registry host stands in a file that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=root, capture_output=True
    )
    if listed.returncode == 0 and listed.stdout:
        files = [root / name for name in listed.stdout.decode().split("\0") if name]
    else:
        files = [
            path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    wrong = []
    for path in files:
        if not path.is_file() or (data := path.read_bytes()).count(b"\0"):
            continue
        text = data.decode("utf-8", errors="replace")
        for match in LEAKS.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            wrong.append(f"{path.relative_to(root)}:{line}: {match.group().strip()}")
    return wrong


RULES: list[tuple[Callable[[Path], list[str]], dict[str, str], str]] = [
    (climbing_imports, {"mpjax/core/a.py": "from mpjax.policy import rules"}, "core imports mpjax.policy"),
    (climbing_imports, {"mpjax/policy/a.py": "import mpjax.numerics.dot"}, "policy imports mpjax.numerics.dot"),
    (climbing_imports, {"mpjax/train/a.py": "def f():\n    from mpjax.wrap import linen"}, "train imports mpjax.wrap"),
    (climbing_imports, {"mpjax/train/a.py": "from ..store import checkpoint"}, "train imports mpjax.store"),
    (climbing_imports, {"mpjax/measure/a.py": "import mpjax"}, "imports mpjax itself"),
    (climbing_imports, {"mpjax/attic/a.py": "import mpjax.core"}, "'attic' has no floor"),
    (circles, {"mpjax/core/a.py": "import mpjax.core.b", "mpjax/core/b.py": "def f():\n    from . import a"}, "circle"),
    (side_doors, {"mpjax/train/a.py": "from flax import linen as nn"}, "flax.linen enters through mpjax.wrap.linen"),
    (side_doors, {"mpjax/wrap/linen/a.py": "from flax import nnx"}, "flax.nnx enters through mpjax.wrap.nnx"),
    (side_doors, {"mpjax/train/a.py": "import flax"}, "flax enters through mpjax.wrap only"),
    (side_doors, {"mpjax/train/a.py": "import orbax.checkpoint as ocp"}, "enters through mpjax.store"),
    (side_doors, {"mpjax/measure/table.py": "import matplotlib.pyplot"}, "enters through mpjax.measure.plots"),
    (side_doors, {"mpjax/measure/plots.py": "import matplotlib.pyplot"}, "inside the function"),
    (side_doors, {"mpjax/store/a.py": "import orbax.checkpoint as ocp"}, "inside the function"),
    (undeclared_imports, {"mpjax/core/a.py": "import torch"}, "torch is no dependency"),
    (undeclared_imports, {"mpjax/train/a.py": "import tensorboardX"}, "tensorboardX is an extra"),
    (
        entangled_experiments,
        {"experiments/a.py": "from experiments.b import model", "experiments/b.py": ""},
        "a imports",
    ),
    (entangled_experiments, {"experiments/a.py": "from experiments import b", "experiments/b.py": ""}, "a imports"),
    (entangled_experiments, {"experiments/_data.py": "import experiments.a", "experiments/a.py": ""}, "_data imports"),
    (
        entangled_experiments,
        {"experiments/_data/__init__.py": "from experiments import _run", "experiments/_run.py": ""},
        "_data imports experiments._run",
    ),
    (
        entangled_experiments,
        {"experiments/a.py": "from experiments._data import files", "experiments/_data/files.py": ""},
        "a imports experiments._data.files",
    ),
    (
        entangled_experiments,
        {"experiments/_run/a.py": "from experiments._data import files", "experiments/_data/files.py": ""},
        "_run.a imports experiments._data.files",
    ),
    (entangled_experiments, {"mpjax/core/a.py": "import experiments.a"}, "mpjax imports experiments"),
    (long_files, {"mpjax/core/a.py": "\n" * 301}, "301 lines"),
    (long_files, {"experiments/a.py": "\n" * 301}, "301 lines"),
    (missing_examples, {"mpjax/core/a.py": "def verb():\n    '''Does.'''"}, "mpjax.core.a.verb has no docstring"),
    (
        missing_examples,
        {"mpjax/core/a.py": "from mpjax.core.b import verb"},
        "mpjax.verb is not written in mpjax.core.a",
    ),
    (two_tongued_facade, {}, "mpjax.verb: fetched and told differ"),
    (leaks, {"README.md": "see " + "/" + "home/me/mpjax/README.md"}, "README.md:1"),
    (leaks, {"constraints.txt": "--index" + "-url x"}, "constraints.txt:1"),
    (leaks, {"pip.conf": "find = https:/" + "/host.example/simple"}, "pip.conf:1"),
    (leaks, {"uv.toml": "\nurl = 'files.python" + "hosted.org'"}, "uv.toml:2"),
]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "planted", "seen"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_it_would_be_seen(rule, planted, seen, tmp_path):
    ground = {
        "pyproject.toml": '[project]\ndependencies = ["jax>=0.10"]\noptional-dependencies = {extra = ["tensorboardX"]}',
        "mpjax/__init__.py": '_ROOMS = {"core.a": ("verb",)}\n_MODULES = {}\n',
        "mpjax/core/a.py": "def verb():\n    '''Does.\n\n    >>> verb()\n    '''",
    }
    if rule is not two_tongued_facade:
        ground["mpjax/__init__.py"] += "if TYPE_CHECKING:\n    from mpjax.core.a import verb as verb\n"
        write(tmp_path, ground)
        assert rule(tmp_path) == []
    write(tmp_path, ground | planted)
    (complaint, *more) = rule(tmp_path)
    assert seen in complaint and not more


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
