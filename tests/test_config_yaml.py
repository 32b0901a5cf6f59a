"""The YAML contract: what is read, what is refused and where, and that writing and reading agree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.config import yaml_loader
from sparsevit_cli.config.yaml_loader import MAX_BYTES, dump_yaml, parse_yaml, read_yaml
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.winner import read_winner, write_winner

PARSERS = sorted({getattr(yaml, "CSafeLoader", yaml.SafeLoader), yaml.SafeLoader}, key=lambda parser: parser.__name__)


@pytest.fixture(params=PARSERS, ids=lambda parser: parser.__name__)
def _parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: libyaml's is missing on some platforms."""
    monkeypatch.setattr(yaml_loader, "_PARSER", request.param)


def parse(text: str | bytes) -> object:
    return parse_yaml(text.encode() if isinstance(text, str) else text, "x.yaml").data


SCALARS = {
    "1e-4": 1e-4,
    "1E5": 1e5,
    "1.5e+3": 1500.0,
    ".6": 0.6,
    "2.": 2.0,
    "-0.5": -0.5,
    "17": 17,
    "-3": -3,
    "+3": 3,
    "017": 17,
    "0o17": 15,
    "0x1F": 31,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "no": "no",
    "yes": "yes",
    "on": "on",
    "Off": "Off",
    "y": "y",
    "12:30": "12:30",
    "1:30:00": "1:30:00",
    "2024-01-01": "2024-01-01",
    "2024-01-01T10:00:00Z": "2024-01-01T10:00:00Z",
    "1_000": "1_000",
    "0b11": "0b11",
    "1e": "1e",
    "=": "=",
    "<<": "<<",
    "os:system": "os:system",
    "50ms": "50ms",
    "70%": "70%",
    "'5'": "5",
    '"true"': "true",
    "''": "",
    "äöü 漢字 🙂": "äöü 漢字 🙂",
}


@pytest.mark.usefixtures("_parser")
@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=SCALARS)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    read = parse(f"key: {text}\n")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)  # type: ignore[index]


ALIAS_BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
# name -> (content, line, column, words of the message)
REFUSED: dict[str, tuple[str | bytes, int, int, str]] = {
    "python object tag": ("a: !!python/object/apply:os.system ['true']\n", 1, 4, "tags"),
    "python name tag": ("a: !!python/name:os.system\n", 1, 4, "tags"),
    "python module tag": ("a: !!python/module:antigravity\n", 1, 4, "tags"),
    "own tag": ("a: 1\nb: !thing 5\n", 2, 4, "tags"),
    "plain tag": ("a: !!str 5\n", 1, 4, "tags"),
    "tag of a mapping": ("a: !!map {b: 1}\n", 1, 4, "tags"),
    "tagged key": ("!!str a: 5\n", 1, 1, "tags"),
    "alias bomb": (ALIAS_BOMB, 1, 5, "anchors"),
    "anchor": ("a: 1\nb: &x 5\n", 2, 4, "anchors"),
    "alias": ("a: *x\n", 1, 4, "aliases"),
    "merge key": ("a: {b: 1}\nc:\n  <<: *a\n", 3, 7, "aliases"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", 3, 1, "a stands here twice, first at x.yaml:1:1"),
    "duplicate nested key": ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4, 3, "b stands here twice, first at x.yaml:2:3"),
    "duplicate quoted key": ("a: 1\n'a': 3\n", 2, 1, "twice"),
    "duplicate section": ("a: {b: 1}\na: {c: 1}\n", 2, 1, "twice"),
    "list as key": ("? [1, 2]\n: 3\n", 1, 3, "name is expected"),
    "mapping as key": ("{{a: 1}: 2}\n", 1, 2, "name is expected"),
    "two documents": ("a: 1\n---\nb: 2\n", 2, 1, "second document"),
    "deep flow": ("[" * 10_000, 1, 22, "20 levels"),
    "deep mappings": ("{a: " * 10_000, 1, 85, "20 levels"),
    "deep blocks": ("- " * 10_000, 1, 43, "20 levels"),
    "many values": ("[" + "1," * 20_000 + "1]", 1, 20_000, "10000 values"),
    "10 MB": (b"a: 1\n" * 2_000_000, 1, 1, "1024 KiB"),
    "NUL": ("a: 1\nb: x\0y\n", 2, 5, "U+0000"),
    "bell": ("a: \a\n", 1, 4, "U+0007"),
    "escape sequence": ("a: \x1b[31mred\n", 1, 4, "U+001B"),
    "not UTF-8": (b"a: 1\nb: \xff\xfe\n", 2, 4, "0xff is not UTF-8"),
    "Latin-1": ("a: Bücher\n".encode("latin-1"), 1, 5, "UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), 1, 1, "UTF-8"),
    "tab indent": ("a:\n\tb: 1\n", 2, 1, "YAML"),
    "unclosed list": ("a: [1, 2\n", 2, 1, "YAML"),
    "unclosed quote": ("a: 'x\n", 2, 1, "YAML"),
    "colon in text": ("a: b: c\n", 1, 5, "YAML"),
    "infinity": ("a: .inf\n", 1, 4, "not a finite number"),
    "not a number": ("a: 1\nb: .nan\n", 2, 4, "not a finite number"),
    "overflow": ("a: 1e999\n", 1, 4, "not a finite number"),
    "long number": (f"a: {'9' * 5000}\n", 1, 4, "too long"),
    "empty": ("", 1, 1, "empty"),
    "comment only": ("# nothing\n", 1, 1, "empty"),
}


@pytest.mark.usefixtures("_parser")
@pytest.mark.parametrize(("content", "line", "column", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_file_line_and_column(content: str | bytes, line: int, column: int, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(content)
    assert refused.value.what == f"x.yaml:{line}:{column}"
    assert words in refused.value.got
    assert refused.value.exit_code == 2
    assert len(str(refused.value)) < 400


@pytest.mark.usefixtures("_parser")
@pytest.mark.parametrize("escape", [r'"\ud800"', r'"\U00110000"', r'"\UFFFFFFFF"', r'"\xZZ"'])
def test_impossible_characters_are_refused(escape: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml:2"):
        parse(f"a: 1\nb: {escape}\n")


@pytest.mark.usefixtures("_parser")
def test_nineteen_levels_and_a_byte_order_mark_are_fine() -> None:
    value = parse("\ufeff" + "[" * 20 + "]" * 20)
    for _ in range(19):
        assert isinstance(value, list)
        (value,) = value
    assert value == []


def test_places_point_at_keys_and_items() -> None:
    document = parse_yaml(b"a:\n  b: 1\n  c: [2,\n    3]\n", "x.yaml")
    assert document.places[("a", "b")] == "x.yaml:2:3"
    assert document.places[("a", "c")] == "x.yaml:3:3"
    assert document.places[("a", "c", 1)] == "x.yaml:4:5"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "big.yaml", Path("nul\0byte"), Path("x" * 5000)):
        with pytest.raises(ConfigError) as refused:
            read_yaml(path)
        assert refused.value.what.startswith(str(path).replace("\0", r"\x00")[:50])


@given(st.one_of(st.text(), st.text("ab:-[]{},'\"\n #&*!|>?%@~0.e"), st.text().map(repr)))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parser in PARSERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yaml_loader, "_PARSER", parser)
            message = refusal(text.encode("utf-8", "surrogatepass"))
        assert message.isprintable()


@given(st.binary())
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    message = refusal(content)
    assert message == "" or message.startswith("x.yaml")


def refusal(content: bytes) -> str:
    """Message of the ConfigError, empty where the content was read."""
    try:
        parse(content)
    except ConfigError as refused:
        return str(refused)
    return ""


TEXTS = st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(sorted(SCALARS))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_back(value: object) -> None:
    text = dump_yaml(value)  # type: ignore[arg-type]
    for parser in PARSERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yaml_loader, "_PARSER", parser)
            again = parse(text)
        assert again == value
        assert repr(again) == repr(value), "same types, and -0.0 stays"


@given(st.floats(allow_nan=False, allow_infinity=False) | TEXTS)
def test_yaml_1_1_readers_agree_on_what_is_written(value: object) -> None:
    again = yaml.safe_load(dump_yaml({"key": value}))["key"]  # type: ignore[dict-item]
    assert again == value
    assert not isinstance(value, float) or math.copysign(1, again) == math.copysign(1, value)


def test_a_winner_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Its values are texts of devices and of people, and may be one object in two places, which YAML would name."""
    shared, config = [0.5, 1e-5], SparsityConfig.from_ratios([[0.1], [0.2]])
    about = {"device": {"name": "1e-4"}, "note": "no: 12:30 #1", "first": shared, "second": shared, "path": "~"}
    write_winner(tmp_path / "winner.yaml", config, about)
    again, rest = read_winner(tmp_path / "winner.yaml")
    assert again == config
    assert rest == {"ratios": [[0.1], [0.2]], **about}
