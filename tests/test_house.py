"""The house: the stdlib-`inspect` trap, floors, packages, the README's commands, a light command line."""

import ast
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rollsight.inspect.models import open_model
from rollsight.jobs.cli import app

ROOT = Path(__file__).parent.parent
FLOORS = ("inspect", "synth", "jobs")  # each may import itself and those before it
HEAVY = ("torch", "zarr", "onnxruntime", "pyarrow", "scipy", "kornia", "numpy", "jinja2")
TERMINAL = ("rich", "typer", "click")
# The folder `inspect` has a name of the standard library, and no __init__.py: that is the known exception.
SHADOWS = {"inspect"}
# A path of the machine that a file was written on.
MACHINE_PATH = re.compile(rb"(?<![\w.])/(?:(?:home|root|work)/|tmp/w\b)")


def modules() -> dict[str, Path]:
    """Every module of the three floors by its import name."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("rollsight", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The names that a file imports, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This Python, started in the root of the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_inspect_is_the_standard_library_from_the_root_of_the_repository():
    done = python("-c", "import inspect; inspect.signature; print(inspect.__file__)")

    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(sysconfig.get_path("stdlib"))


def test_pytest_starts_as_a_module_from_the_root_of_the_repository():
    done = python("-m", "pytest", "--version")

    assert done.returncode == 0, done.stderr


def test_the_folder_inspect_is_no_package_of_its_own():
    assert not (ROOT / "inspect" / "__init__.py").exists()


def test_no_module_takes_a_name_of_the_standard_library():
    names = {part for path in MODULES.values() for part in path.relative_to(ROOT).with_suffix("").parts}

    assert names & sys.stdlib_module_names <= SHADOWS | {"__main__"}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up_a_floor(module):
    own = FLOORS.index(module.split(".")[1])

    upper = [
        name for name in imports(MODULES[module]) if name.split(".")[1:2] and name.startswith("rollsight.")
    ]
    assert [name for name in upper if FLOORS.index(name.split(".")[1]) > own] == []


def test_no_imports_run_in_a_circle():
    """Leave out modules that need nothing left, or that nothing left needs: what stays is the circles."""
    needs = {name: set(imports(path)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while True:
        needed = {name for used in needs.values() for name in used}
        kept = {
            name: used & needs.keys()
            for name, used in needs.items()
            if used & needs.keys() and name in needed
        }
        if kept == needs:
            break
        needs = kept

    assert needs == {}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("rollsight.jobs")])
def test_only_jobs_prints(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }

    assert "print" not in called
    assert {name.split(".")[0] for name in imports(MODULES[module])}.isdisjoint(TERMINAL)


def test_pyproject_lists_every_nested_package_and_its_folder():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in MODULES.values()}
    expected = {".".join(("rollsight", *folder.parts)): folder.as_posix() for folder in folders}

    assert sorted(setuptools["packages"]) == sorted(expected)
    assert setuptools["package-dir"] == expected


def test_every_command_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands

    assert len(commands) >= 8
    assert [name for name in commands if not re.search(rf"\binspect {name}\b", readme)] == []


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each option and argument of a command and of those under it, with the command's name."""
    yield from ((" ".join(path), option) for option in command.params)
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, (*path, name))


def test_every_seed_is_one_that_every_generator_of_random_numbers_takes():
    """numpy refuses a seed below 0 with a traceback."""
    seeds = [(name, option) for name, option in options(typer.main.get_command(app)) if option.name == "seed"]

    assert {"train", "weak", "labels split", "jobs retrain", "synth fit"} <= {name for name, _ in seeds}
    assert [name for name, option in seeds if (option.min, option.max) != (0, 2**32 - 1)] == []


def test_help_answers_in_half_a_second():
    command = Path(sys.executable).parent / "inspect"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([command, "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)

    assert min(seconds) < 0.5


def test_the_command_line_imports_nothing_heavy():
    done = python(
        "-c", "import sys, rollsight.jobs.cli; print(*{name.split('.')[0] for name in sys.modules})"
    )

    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_no_file_holds_a_path_of_the_machine_it_was_written_on():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]

    # Binary files too: an ONNX graph can carry the source paths of its exporter.
    assert len(files) > 30
    assert [str(path) for path in files if MACHINE_PATH.search(path.read_bytes())] == []


def test_the_shipped_model_is_small_and_its_card_says_on_what_and_how_well(tmp_path):
    model = open_model("default", tmp_path)

    assert sum(path.stat().st_size for path in model.folder.iterdir()) <= 20e6
    assert any("licence" in note for note in model.card.notes)
    assert any(metric["split"] == "test" for metric in model.card.metrics)
    for metric in model.card.metrics:
        for value, low, high in metric["figures"].values():
            assert 0 <= low <= value <= high <= 1
    assert all(source["digest"] and source["groups"] for source in model.card.trained_on)


def test_every_local_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))

    assert "docs/page.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []
