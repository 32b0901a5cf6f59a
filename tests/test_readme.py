"""README and docs: what they tell people to type is typed twice, and what they link to is there.

Small images and models stand in for people's own.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from sparsevit_cli import errors
from sparsevit_cli.cli import app
from sparsevit_cli.config.experiment import ModelSection
from sparsevit_cli.tasks import task
from test_cli import images_in
from tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
QUICK = ("profile.batch_sizes=[1]", "profile.seconds=0.01", "profile.rounds=6", "profile.max_spread=100.0",
         "export.formats=[]")  # fmt: skip
TAKES_NO_SETTINGS = ("models", "doctor", "config")


def typed_commands() -> Iterator[list[str]]:
    """Every `sparsevit ...` in the pages' shell blocks, as words."""
    for page in PAGES:
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                for command in re.split(r"&&|\|\||;", line.partition(" #")[0]):
                    words = shlex.split(command)
                    if words[:1] == ["sparsevit"]:
                        yield words[1:]


def listed_commands() -> list[str]:
    """The names in the README's table of commands."""
    table = README.read_text(encoding="utf-8").partition("## Commands")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]


def light(words: list[str]) -> list[str]:
    """The same command on small images, for a short time, and without a budget that such a model cannot keep."""
    words = ["64" if before == "--img-size" else word for before, word in zip(["", *words], words, strict=False)]
    words = [word.replace("--budget-latency", "--budget-macs") for word in words]
    return [*words, *(f"--set={setting}" for setting in QUICK)] if words[0] not in TAKES_NO_SETTINGS else words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder but for my.yaml and the images that it names."""
    folder = tmp_path_factory.mktemp("readme")
    loop = {"epochs": 1, "batch_size": 8, "eval_every": 1, "save_every": 1}
    images = images_in(folder / "images", ["cat", "dog", "owl"])
    data = {"source": "folder", "root": str(images)}
    write_tiny(folder, data=data, train=loop, adapt=loop, finetune=loop, search={"samples": None}).rename(
        folder / "my.yaml"
    )
    return folder


def type_twice(words: list[str]) -> None:
    """Type a command, and type it again. A busy machine may leave a profile unsteady: exit 8, with its rows written."""
    for _ in range(2):
        done = CliRunner().invoke(app, light(words), prog_name="sparsevit", catch_exceptions=False)
        assert done.exit_code in ((0, 8) if words[0] == "profile" else (0,)), f"{shlex.join(words)}: {done.output}"


def test_every_command_can_be_typed_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    real, small = task.build_model, {"embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}

    def build_small(section: ModelSection, outputs: int, **options: Any) -> nn.Module:
        named = section.embed_dim is None  # on the command line; my.yaml has a small one
        return real(section.model_copy(update=small) if named else section, outputs, **options)

    monkeypatch.setattr(task, "build_model", build_small)
    commands = list(typed_commands())
    assert {words[0] for words in commands} >= {"pretrain", "adapt", "search", "finetune", "profile", "export"}
    for words in commands:
        type_twice(words)
    typed = {words[0] for words in commands}
    for name in listed_commands():
        if name not in typed:
            options = ["--config", "my.yaml"] if name not in ("models", "doctor") else []
            type_twice([name, *options])
    report = json.loads((folder / "runs" / "tiny" / "run" / "metrics.json").read_text())
    assert report["validation_images"] == 36
    assert report["rows"][-1]["label"] == "winner, finetuned"
    exported = json.loads((folder / "runs" / "tiny" / "export" / "sparsity.json").read_text())
    assert exported["model"]["categories"] == ["cat", "dog", "owl"]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them: lower case, hyphens for blanks, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_script_is_there(page: Path) -> None:
    """`make target` at the start of a shell line or of code in a sentence, and `python path.py` anywhere."""
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`|&& )make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"\b(?:benchmarks|docs|examples|tests)/[\w/]+\.(?:py|yaml|md)\b", text):
        assert (ROOT / script).exists(), script


def test_messages_of_troubleshooting_are_ours() -> None:
    """What stands there in quotes is what people search for: every piece between dots is in the code."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r'"([^"]+)"', page)
    assert len(quoted) > 20
    for piece in (piece.strip() for text in quoted for piece in text.split("...")):
        assert piece in code, piece


def test_exit_codes_of_troubleshooting_are_those_of_the_errors() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    kinds = (kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code"))
    assert listed == {0, 75, 130, *kinds}


def test_the_readme_stays_a_front_door() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
