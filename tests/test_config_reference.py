"""The reference page agrees with the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevit_cli.config import reference
from sparsevit_cli.config.fields import Fields
from sparsevit_cli.config.reference import REFERENCE_PATH, main, render_reference
from sparsevit_cli.config.tasks import all_types


def test_the_page_is_up_to_date() -> None:
    assert REFERENCE_PATH.read_text(encoding="utf-8") == render_reference()


def test_every_field_has_a_row_with_a_sentence() -> None:
    page = render_reference()

    def check(fields: Fields, path: tuple[str, ...], suffix: str) -> None:
        for name in fields.resolved(fields.at(path) or {})["properties"]:
            schema = fields.at((*path, name))
            assert schema is not None
            if fields.is_section(schema):
                ending = suffix if (*path, name)[0] == "data" else ""
                assert f"\n## `{'.'.join((*path, name))}`{ending}\n" in page
                check(fields, (*path, name), suffix)
                continue
            assert schema["description"].endswith((".", "`"))
            assert f"| `{name}` | " in page
            assert f" | {schema['description']} |\n" in page

    for source, kind in all_types().items():
        check(Fields.of(kind), (), f", source `{source}`")
    assert "\n## `train.curriculum`, each item\n" in page
    assert "| `ratios` | list of lists of numbers from 0 to 0.8 in steps of 0.1, or null | `null` | Ratios" in page
    assert (
        "| `img_size` | whole number from 1 to 16384, or list of 2 whole numbers from 1 to 16384 | required |" in page
    )


def test_what_another_task_has_instead_stands_under_its_name() -> None:
    page = render_reference().partition("\n## Task `instances`\n")[2].partition("\n## Task ")[0]
    assert "| `fpn_channels` |" in page
    assert "| `embed_dim` |" not in page, "it is the same as above"
    assert "Not in `model` of task `instances`: `num_classes`." in page
    assert "\n## `data.augment`, source `coco`, task `instances`\n" in page
    assert "\n## `data`, source `digits`, task `instances`\n" in page


def test_check_notices_an_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(reference, "REFERENCE_PATH", page)
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    assert main() == 1
    assert "outdated" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["reference"])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    assert main() == 0
    page.write_text("old")
    assert main() == 1
