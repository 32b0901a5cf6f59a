"""What users install: a wheel that runs by itself, and versions that are written down completely."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])
RUN = (
    "import sys, sparsevit_cli\n"
    "from importlib.metadata import entry_points\n"
    "print(sparsevit_cli.__file__, file=sys.stderr)\n"
    "(command,) = entry_points(group='console_scripts', name='sparsevit')\n"
    "command.load()()\n"
)
"""`sparsevit` as its entry point runs it; tells on stderr which copy of the package that is."""


def normalised(name: str) -> str:
    """The one spelling of a distribution's name, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Version by distribution of a constraints file; every line of it is a comment or a pin."""
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if not line.startswith("#"))
    named = {normalised(name): version for name, version in found.items()}
    assert len(named) == len(found) > 0
    return named


def lower_bounds() -> dict[str, str]:
    """Lowest version by distribution of every requirement and extra; "" where pyproject.toml sets none."""
    matches = [re.match(r"([\w.-]+)(?:>=([\w.]+))?", requirement) for requirement in REQUIREMENTS]
    return {normalised(found[1]): found[2] or "" for found in matches if found}


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below `folder`, by its path there; none of compiled Python."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was unpacked, built offline, by the build backend that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_every_file_of_the_package_and_every_configuration(site: Path) -> None:
    found = contents(site / "sparsevit_cli")
    configurations = {f"configs/{name}": data for name, data in contents(REPOSITORY / "configs").items()}
    assert found == contents(REPOSITORY / "src" / "sparsevit_cli") | configurations
    kernels = {"kernels/cpp/library.cpp", "kernels/cpp/block.hpp", "kernels/triton/code.py"}
    assert {"configs/digits.yaml", *kernels} <= found.keys()


@pytest.mark.parametrize("arguments", [("--version",), ("config", "--json")])
def test_the_command_runs_from_the_wheel_alone(arguments: tuple[str, ...], site: Path, tmp_path: Path) -> None:
    """The wheel's copy stands before an editable install of this checkout."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[0] == str(site / "sparsevit_cli" / "__init__.py")
    if arguments == ("--version",):
        assert done.stdout == f"sparsevit {PROJECT['version']}\n"
    else:
        assert json.loads(done.stdout)["experiment"] == "digits"


def test_every_requirement_is_pinned() -> None:
    assert len(lower_bounds()) > 20
    assert not set(lower_bounds()) - set(pins("constraints.txt"))


def test_the_lowest_versions_are_those_that_the_requirements_allow() -> None:
    def numbers(version: str) -> str:
        return re.sub(r"(\.0)+$", "", version)

    bounds = {name: numbers(version) for name, version in lower_bounds().items() if version}
    assert {name: numbers(version) for name, version in pins("constraints-lowest.txt").items()} == bounds
