"""The notebooks run, end in a picture, are more prose than code, and stand in step with the .py that people edit.

The address of the repository is a placeholder until there is one. It stands in `pyproject.toml`; badge and install cell of
each notebook repeat it, because Colab must find it there, and are held to it here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed; it comes with mpjax[notebooks]")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with mpjax[notebooks]")
pytest.importorskip("nbclient", reason="nbclient is not installed; it comes with mpjax[notebooks]")
pytest.importorskip("ipykernel", reason="ipykernel is not installed; it comes with mpjax[notebooks]")

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
MOST_CODE_CELLS = 15

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[str]:
    """The sources of a notebook's cells, from its .py or its .ipynb."""
    return [cell.source for cell in jupytext.read(path).cells if kind in (None, cell.cell_type)]


def prose(path: Path) -> str:
    """What is there to read: markdown without the targets of its links and images."""
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(cells(path, "markdown")))


# In a process of its own, so that the sockets and the event loop of the client are no matter of this suite.
EXECUTE = """
import sys
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

source, target, home = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=home + "/socket")
kernel.kernel_spec.argv[0] = sys.executable
NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": home}}).execute()
nbformat.write(notebook, target)
"""


@pytest.fixture(scope="session")
def fonts(tmp_path_factory) -> Path:
    """Where matplotlib keeps its list of fonts: made by the first notebook, which takes seconds, and read by the others."""
    return tmp_path_factory.mktemp("matplotlib")


def execute(source: Path, home: Path, fonts: Path, quick: dict[str, str]):
    """The committed notebook, run on one CPU device in a kernel of this interpreter; all else that it writes lies in `home`."""
    # What conftest sets for the tests is not what a reader has.
    ours = ("XLA_FLAGS", "MPLBACKEND", "JUPYTER_PATH", "PYTHONWARNINGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    places = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    env |= {name: str(home / name.lower()) for name in places}
    env |= quick  # prose and prints are those of any level
    env |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    env |= {"MPLCONFIGDIR": str(fonts), "TMPDIR": str(home)}
    done = home / "done.ipynb"
    command = [sys.executable, "-c", EXECUTE, str(source.with_suffix(".ipynb")), str(done), str(home)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return nbformat.read(done, as_version=4)


def outputs(cell) -> list:
    return cell.get("outputs", [])


def printed(notebook, stream: str = "stdout") -> str:
    found = [out for cell in notebook.cells for out in outputs(cell) if out.output_type == "stream"]
    return "".join(out.text for out in found if out.name == stream)


def ends_in_a_picture(notebook) -> bool:
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return any("image/png" in out.get("data", {}) for out in outputs(last))


def invented(prose: str, text: str) -> list[str]:
    """The numbers in the prose that the run did not print. Code in the prose is no number."""
    quoted = re.findall(r"(?<![\w.`])\d+(?:\.\d+)?%?(?![\w`])", re.sub(r"`[^`]*`", "", prose))
    return [number for number in quoted if not re.search(rf"(?<![\d.]){number}(?![\d.])", text)]


def formats_bear_out_their_story(text: str) -> None:
    rows = {name: [float(x) for x in rest] for name, *rest in re.findall(VANISHED, text, re.M)}
    assert rows["float16"][1] == 100 and rows["float16, scaled"][1] == rows["bfloat16"][1] == 0
    assert rows["float16, scaled"][2] < rows["bfloat16"][2] < rows["float16"][2]
    assert re.search(r"good step 2: (\S+)\ngood step 3: (?!\1\n)", text)
    assert "bfloat16   after a thousand updates: 1.0000" in text


def first_step_bears_out_its_story(text: str) -> None:
    losses = {(door, policy): (a, b) for door, policy, a, b in re.findall(LOSSES, text, re.M)}
    assert len(losses) == 4
    for policy in ("float32", "mixed_bfloat16"):
        (first, last), (also_first, also_last) = losses["Linen", policy], losses["NNX", policy]
        assert (first, last) == (also_first, also_last) and float(last) < float(first) / 5
    skipped = [int(x) for x in re.search(r"were skipped: \[([\d ]+)\]", text)[1].split()]
    assert skipped[0] == 0 and 60 in skipped and len(skipped) < 15
    assert "'params': True, 'mstate': True, 'opt_state': True, 'loss_scale': False" in text
    assert re.search(r"^reductions: \{'float32': \d+\}$", text, re.M)
    assert "NNXNet True float32" in text


def policies_bear_out_their_story(text: str) -> None:
    norms = dict(re.findall(r"^(\S.*?) +block/0/norm computes in (\w+);", text, re.M))
    assert norms == {"float32 island": "float32", "'**/norm'": "float16", "LayerNorm": "float16"}
    kept, whole = (float(x) for x in re.findall(r"of which bfloat16 holds ([\d.]+)%", text))
    assert kept == 100 and whole < 2
    refused = re.findall(r"^- rule (.*?) (matches no path|never acts|matches no module)", text, re.M)
    assert [why for _, why in refused] == ["matches no path", "never acts", "never acts", "matches no module"]
    assert re.search(r"^\*\*/up +2 modules", text, re.M) and re.search(r"^block +14 modules", text, re.M)
    assert re.search(r"^last +float32 island +float32", text, re.M)
    shares = {dtype: int(share) for dtype, share in re.findall(r"'(\w+)': '(\d+)%'", text)}
    assert shares["float32"] > 50 and min(shares.values()) > 10


def scales_bear_out_their_story(text: str) -> None:
    zero = {layer: int(share) for layer, share in re.findall(r"^(\w+) +gradient around .*: (\d+)%$", text, re.M)}
    assert zero["hidden_0"] > 95 and zero["hidden_1"] > 95 and zero["out"] < 5
    swept = re.findall(r"^scale 2\*\*(\d+) +vanished +(\d+)% +(.*)$", text, re.M)
    good = [int(exponent) for exponent, share, says in swept if share == "0" and says != "not finite"]
    assert int(swept[0][1]) > 80 and good == [12, 18, 24, 30] and swept[-1][2] == "not finite"
    ends = re.findall(r"^(float.*?) +loss \S+ -> (\S+), skipped (\d+), never moved: (\d+)%$", text, re.M)
    (_, full, *_), (_, unscaled, _, still), (_, dynamic, skips, moved) = ends
    assert float(unscaled) > 1.1 * float(full) and abs(float(dynamic) / float(full) - 1) < 0.05
    assert int(still) > 80 and moved == "0" and 10 < int(skips) < 30
    for part in ("params", "opt_state", "mstate", "step"):
        assert re.search(rf"^{part} +every byte as it was$", text, re.M)
    assert re.findall(r"^(\w+) +changed$", text, re.M) == ["attempt", "loss_scale"]
    assert re.findall(r"skipped (\d), the weight is now (\S+)", text) == [("1", "1.0"), ("0", "-inf")]


def files_bear_out_their_story(text: str) -> None:
    runs = re.findall(r"^attempts (\d+) to (\d+): (loss .*)$", text, re.M)
    assert [ends[:2] for ends in runs] == [("0", "29"), ("10", "29")] and runs[0][2] == runs[1][2]
    same, all_of_them = re.search(r"^(\d+) of (\d+) arrays are the same to the bit$", text, re.M).groups()
    assert same == all_of_them and int(same) > 10
    assert re.search(r"^CheckpointWarning: damaged: 20: .* has \d+ bytes, and had \d+; using step 10$", text, re.M)
    assert re.findall(r"^steps on disk: (.*)$", text, re.M) == ["[10, 20]", "[10, 20, 30]"]
    assert re.findall(r"^ params/head/kernel .* (bfloat16|int8) ", text, re.M) == ["bfloat16", "int8"]
    accuracies = [
        float(x) for x in re.findall(r"([\d.]+) after|accuracy [a-z0-9 ]*:? ?(0\.\d+)$", text, re.M) for x in x if x
    ]
    assert len(accuracies) == 4 and min(accuracies) > 0.9
    assert "the same logits as the model to the bit: True" in text
    rows = re.findall(r"^(\w+) +([\d,]+) bytes, logits change by ([\d.]+)%$", text, re.M)
    size = {name: int(n.replace(",", "")) for name, n, _ in rows}
    lost = {name: float(share) for name, _, share in rows}
    assert size["float32"] == 2 * size["bfloat16"] == 2 * size["float16"] > 3 * size["int8"] == 3 * size["float8_e4m3"]
    assert 0 == lost["float32"] < lost["float16"] < lost["bfloat16"] < lost["int8"] < lost["float8_e4m3"] < 10


def losses_are_found_where_the_prose_says(text: str) -> None:
    """What only holds on this machine; the rest is asserted in the notebook's own cells."""
    first, last, skipped = re.search(r"^loss (\S+) -> (\S+), skipped attempts: \[([\d, ]+)\]$", text, re.M).groups()
    assert float(last) < float(first) / 50 and skipped.startswith("0, 1, 2, ") and 5 < len(skipped.split()) < 15
    assert "the same to the bit: True" in text and "'grads_finite': 0.0" in text
    assert "blocks/ffn, iteration 2 of 4: integer_pow(float16) -> float16 made +inf" in text
    (spread,) = re.findall(r"^spread +(\S+) between seeds of the reference, (\S+) between differences$", text, re.M)
    assert float(spread[0]) > 2 * float(spread[1])
    assert re.search(r"^undecided with 3 seeds: about \d+ would do to show it equivalent", text, re.M)


VANISHED = r"^(bfloat16|float16|float16, scaled) +([\d.]+)% +([\d.]+)% +(\S+)$"
LOSSES = r"^(Linen|NNX) +(\S+) +loss (\S+) -> (\S+)$"
STORIES = {
    "01_formats": formats_bear_out_their_story,
    "02_first_mixed_step": first_step_bears_out_its_story,
    "03_policies_by_path": policies_bear_out_their_story,
    "04_where_it_underflows": losses_are_found_where_the_prose_says,
    "05_loss_scaling": scales_bear_out_their_story,
    "06_checkpoints_and_export": files_bear_out_their_story,
}


@pytest.mark.slow
@each
def test_it_runs_and_bears_out_its_prose(source, tmp_path, fonts, quick_environment):
    """One run for all that is asked of it: it is the dear part."""
    notebook = execute(source, tmp_path, fonts, quick_environment)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert printed(notebook, "stderr") == ""
    assert ends_in_a_picture(notebook)
    assert invented(prose(source), printed(notebook)) == []
    STORIES[source.stem](printed(notebook))


def test_an_invented_number_is_seen():
    assert invented("It stops at 256, at 99.5% of `12`, in float16.", "stops at 256\n9.5%") == ["99.5%"]


def test_there_are_notebooks():
    assert [path.stem for path in SOURCES] == list(STORIES)


@each
def test_the_pair_is_in_step_and_holds_no_outputs(source):
    """`make notebooks` makes the .ipynb from the .py."""
    made = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(made)
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in made.cells] == written
    assert not any(outputs(cell) or cell.get("execution_count") for cell in made.cells)


@each
def test_it_is_short_and_more_prose_than_code(source):
    code = cells(source, "code")
    assert 0 < len(code) <= MOST_CODE_CELLS
    assert len(prose(source)) >= sum(map(len, code))


@each
def test_badge_and_install_cell_have_the_address_of_the_project_file(source):
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    assert owner_and_name != REPOSITORY
    first = cells(source, "markdown")[0]
    (badge,) = re.findall(r"\]\((https://colab\.research\.google\.com/github/[^)]+)\)", first)
    target = source.with_suffix(".ipynb").relative_to(ROOT).as_posix()
    assert badge == f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{target}"
    install = cells(source, "code")[0]
    assert install == cells(SOURCES[0], "code")[0]
    assert f'"{REPOSITORY}"' in install
    everything = "\n".join(cells(source)) + source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert {found.rstrip('/"\\') for found in re.findall(r"https://github\.com/[^\s)\",]+", everything)} == {REPOSITORY}


def test_the_install_cell_does_nothing_where_mpjax_is_there(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    install = cells(SOURCES[0], "code")[0]
    exec(compile(install, "install", "exec"), {})
    assert calls == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(compile(install, "install", "exec"), {})
    clone, pip = calls
    assert clone[:2] == ["git", "clone"] and REPOSITORY in clone
    assert pip[-2:] == ["-e", f"{clone[-1]}[experiments]"] and sys.path[0] == clone[-1]
