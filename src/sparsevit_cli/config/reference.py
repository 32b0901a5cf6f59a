"""docs/configuration.md, made from the schema: `python -m sparsevit_cli.config.reference [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .fields import Fields, JsonSchema, dotted
from .tasks import DEFAULT_TASK, KINDS, fields_by_source
from .yaml_loader import FieldPath

REFERENCE_PATH = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"

_INTRODUCTION = """\
# Configuration

One YAML file describes one experiment: `sparsevit <command> --config experiment.yaml`. Without `--config` the
packaged digits experiment is used. Every field has a default, so a file holds only what differs; `{}` is a
complete file. The resolved experiment, defaults included, is saved in each run folder.

`--set section.field=value` replaces one value, as often as wanted; the last one of a field wins. The value is read
as in the file: `--set search.population=32`, `--set 'finetune.ratios=[[0.6],[0]]'`, `--set data.root=null`.
Order: defaults, then the file, then `--set`, then the other flags.

Relative paths (`data.root`, `model.checkpoint`, `output`) start at the current directory, not at the file.

Unknown settings, wrong types, values out of range and settings that contradict each other end the command with
exit code 2 before anything starts, up to ten of them told at once. The YAML is read strictly:

- Scalars follow YAML 1.2: `1e-4` is a number; `yes`, `no`, `on`, `off`, `12:30` and `2024-01-01` are text;
  only `true` and `false` are truth values. Numbers are finite.
- A whole number may stand for a number (`epochs: 30`), nothing else is converted: `"30"` and `30.0` are no whole
  numbers.
- A key that stands twice, anchors, aliases, tags, a second document, more than 1 MiB, more than 20 levels and more
  than 10,000 values are errors. Files are UTF-8.
- No value can name code: nothing in a file is imported or executed.

`task.name` and `data.source` say which settings an experiment has: the `data` section has a table per source. The
tables are those of task `classification`; what another task has instead stands at the end, under its name.

This page is generated from `src/sparsevit_cli/config/experiment.py` and the modules of the tasks beside it, by
`python -m sparsevit_cli.config.reference`.
"""


def render_reference() -> str:
    """The reference page as Markdown: one table per section with field, allowed values, default and meaning."""
    kinds = fields_by_source(DEFAULT_TASK)
    fields = next(iter(kinds.values()))
    page = _tables(fields, fields.schema, (), "")
    data = _data_tables(kinds)
    first = next(number for number, table in enumerate(page) if table.startswith("\n## `data`"))
    last = max(number for number, table in enumerate(page) if table.startswith("\n## `data"))
    others = [_other_task(name, fields) for name, kind in KINDS.items() if kind.home and name != DEFAULT_TASK]
    return _INTRODUCTION + "".join([*page[:first], *data, *page[last + 1 :], *others])


DATA: FieldPath = ("data",)
"""The section that differs from source to source."""
OF_TASKS = ("task", "model", "train", "adapt", "finetune")
"""The sections that differ from task to task, besides `data`."""


def _data_tables(kinds: Mapping[str, Fields], task: str = "") -> list[str]:
    """The tables of `data`, source by source."""
    return [
        table
        for source, each in kinds.items()
        for table in _tables(each, _section(each, DATA), DATA, f", source `{source}`{task}")
    ]


def _other_task(name: str, default: Fields) -> str:
    """What a task has instead of the settings of the default one: rows that differ, settings that it lacks."""
    kinds, ending = fields_by_source(name), f", task `{name}`"
    fields = next(iter(kinds.values()))
    tables = [f"\n## Task `{name}`\n\nSettings that differ from those above.\n"]
    for section in OF_TASKS:
        ours, theirs = (_rows(each, _section(each, (section,))) for each in (fields, default))
        rows = [row for key, row in ours.items() if theirs.get(key) != row]
        lacks = [f"`{key}`" for key in theirs if key not in ours]
        if rows:
            tables.append(_table(f"`{section}`{ending}", _described(fields, _section(fields, (section,))), rows))
        if lacks:
            tables.append(f"\nNot in `{section}` of task `{name}`: {', '.join(lacks)}.\n")
        inside = fields.resolved(_section(fields, (section,)))["properties"]
        for key, child in inside.items():
            if fields.is_section(child) and default.at((section, key)) is None:
                tables += _tables(fields, child, (section, key), ending)
    return "".join([*tables, *_data_tables(kinds, ending)])


def _section(fields: Fields, path: FieldPath) -> JsonSchema:
    section = fields.at(path)
    assert section is not None
    return section


def main() -> int:
    """Write the page, or with --check compare it: 0 equal or written, 1 outdated."""
    parser = argparse.ArgumentParser(prog="python -m sparsevit_cli.config.reference", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    page = render_reference()
    if not parser.parse_args().check:
        REFERENCE_PATH.write_text(page, encoding="utf-8")
        print(REFERENCE_PATH)
        return 0
    if REFERENCE_PATH.is_file() and REFERENCE_PATH.read_text(encoding="utf-8") == page:
        return 0
    print(f"{REFERENCE_PATH} is outdated. Run: python -m sparsevit_cli.config.reference", file=sys.stderr)
    return 1


def _tables(fields: Fields, schema: JsonSchema, path: FieldPath, suffix: str) -> list[str]:
    """The section's table and those of the sections within it; `suffix` ends their titles."""
    sentence = _described(fields, schema)
    resolved = fields.resolved(schema)
    sections = []
    for name, child in resolved["properties"].items():
        items = fields.resolved(child).get("items", {})
        if fields.is_section(child):
            sections += _tables(fields, child, (*path, name), suffix)
        elif fields.is_section(items):
            sections += _tables(fields, items, (*path, name), f", each item{suffix}")
    title = f"`{dotted(path)}`{suffix}" if path else "Top level"
    return [_table(title, sentence, list(_rows(fields, schema).values())), *sections]


def _described(fields: Fields, schema: JsonSchema) -> str:
    """A section's sentence, in one line."""
    described = fields.resolved({"$ref": schema["$ref"]}) if "$ref" in schema else schema
    return " ".join(described["description"].split())


def _rows(fields: Fields, schema: JsonSchema) -> dict[str, str]:
    """A row per setting of a section; sections within it have tables of their own."""
    schema = fields.resolved(schema)
    return {
        name: _row(fields, name, child, required=name in schema.get("required", ()))
        for name, child in schema["properties"].items()
        if not fields.is_section(child)
    }


def _table(title: str, sentence: str, rows: Sequence[str]) -> str:
    head = f"\n## {title}\n\n{sentence}\n\n"
    return head + "| Field | Allowed | Default | Meaning |\n|---|---|---|---|\n" + "".join(rows)


def _row(fields: Fields, name: str, schema: JsonSchema, *, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(schema['default'])}`"
    cells = (f"`{name}`", fields.allowed(schema), default, schema["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
