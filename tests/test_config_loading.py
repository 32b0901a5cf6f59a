"""Loading experiments: wrong ones are told precisely, right ones survive writing, comparing and hashing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from sparsevit_cli.config import loading
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.fields import Fields
from sparsevit_cli.config.loading import (
    config_differences,
    dump_config,
    load_config,
    packaged_config_path,
    section_hash,
)
from sparsevit_cli.config.overrides import apply_overrides
from sparsevit_cli.config.tasks import experiment_type
from sparsevit_cli.config.validation import validate
from sparsevit_cli.config.yaml_loader import parse_yaml
from sparsevit_cli.errors import ConfigError

EXPERIMENT = experiment_type()
KNOWN = Fields.of(EXPERIMENT)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> ExperimentConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load(text, tmp_path, overrides)
    assert refused.value.exit_code == 2
    for jargon in ("pydantic", "Value error", "Input should", "function-after", "ctx", "extra_forbidden"):
        assert jargon not in str(refused.value)
    return refused.value


# content -> (field path or file:line:column, words of the message: value, allowed, nearest key)
WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    # unknown keys
    "search: {popultion: 32}": ("search.popultion", ("32", "x.yaml:1:10", "search.population?")),
    "serach: {population: 32}": ("serach", ("search?",)),
    "population: 32": ("population", ("32", "search.population?")),
    "train: {learning-rate: 1}\nlr: 1": ("train.learning-rate", ("unknown", "lr: unknown", "train.lr or adapt.lr")),
    "data: {digits: {cluter: 0.1}}": ("data.digits.cluter", ("0.1", "data.digits.clutter?")),
    "search: {batch-size: 2}": ("search.batch-size", ("search.batch_size?",)),
    "train: {lr_min: 0}": ("train.lr_min", ("train.min_lr?",)),
    "zzz: 1": ("zzz", ("Known here: experiment, seed,",)),
    "train: {curriculum: [{img_size: 8, epochs: 1, epoch: 2}]}": ("train.curriculum[0].epoch", ("epochs?",)),
    # wrong types
    'search: {population: "32"}': ("search.population", ('"32"', "whole number of at least 2", "without quotes")),
    "search: {population: many}": ("search.population", ('"many"', "whole number of at least 2")),
    "search: {population: 1e2}": ("search.population", ("100.0", "whole number")),
    "search: {population: true}": ("search.population", ("true", "whole number")),
    "search: {budget_latency: 50}": ("search.budget_latency", ("50", "text, or null", "`50ms`")),
    "model: {pretrained: yes}": ("model.pretrained", ('"yes"', "`true` or `false`", "Write true.")),
    "model: {depths: 2}": ("model.depths", ("2", "list of whole numbers of at least 1, or null")),
    "model: {img_size: [224, 224, 3]}": ("model.img_size", ("[224, 224, 3]", "list of 2 whole numbers")),
    "model: [swin]": ("model", ('["swin"]', "section of settings")),
    "search:\n  # population: 3\n": ("search", ("null", "remove the line")),
    "data: {source: folder, root: x, mean: [0.5, x, 0.5]}": ("data.mean[1]", ('"x"', "number")),
    "profile: {ratios: [[x]]}": ("profile.ratios", ('[["x"]]', "list of lists of numbers from 0 to 0.8")),
    "- model\n": ("x.yaml:1:1", ('["model"]', "section:")),
    # ranges and choices
    "search: {population: 1}": ("search.population", ("1", "of at least 2")),
    "adapt: {lr: 0}": ("adapt.lr", ("0", "number above 0")),
    "data: {source: folder, root: x, search_fraction: 1}": ("data.search_fraction", ("1", "above 0 and below 1")),
    "adapt: {max_ratio: 0.9}": ("adapt.max_ratio", ("0.9", "from 0 to 0.8")),
    "search: {max_ratio: 0}": ("search.max_ratio", ("0", "from 0.1 to 0.8")),
    "adapt: {check_ratios: [0.3, 0.35]}": ("adapt.check_ratios[1]", ("0.35", "0, 0.1 ... 0.8", "nearest tenth")),
    "export: {opset: 99}": ("export.opset", ("99", "from 18 to 25")),
    "train: {precision: fp8}": ("train.precision", ('"fp8"', "`fp32`, `bf16` or `fp16`")),
    "export: {formats: [onnx, tflite]}": ("export.formats[1]", ('"tflite"', "`onnx`, `pt2` or `openvino`")),
    "profile: {batch_sizes: []}": ("profile.batch_sizes", ("[]", "non-empty list")),
    "seed: -1": ("seed", ("-1", "of at least 0")),
    "seed: 99999999999999999999": ("seed", ("99999999999999999999", "below 2147483648")),
    "device: gpu": ("device", ('"gpu"', "`cuda:N`")),
    "experiment: ../../etc": ("experiment", ('"../../etc"', "at most 64 letters")),
    "model: {name: resnet50}": ("model.name", ('"resnet50"', "`swin_*`")),
    "data: {source: folder, root: x, augment: {auto_augment: rnd-m9}}": (
        "data.augment.auto_augment",
        ('"rnd-m9"', "augmix"),
    ),
    'data: {source: folder, root: "a\\u0007b"}': ("data.root", ("control character '\\x07'",)),
    "train: {curriculum: [{epochs: 1}]}": ("train.curriculum[0].img_size", ("missing", "from 1 to 16384")),
    # conflicts
    "search: {population: 10, parents: 20}": ("search", ("parents 20 is above population 10",)),
    "data: {source: folder}": ("data.root", ("missing", "holds the train and val folders")),
    "data: {source: timm, root: x}": ("data.dataset", ("missing", "`torch/cifar10`")),
    "data: {root: photos}": ("data.root", ("unknown", "set data.source: it is a setting of folder and timm")),
    "data: {source: folder, root: x, digits: {}}": ("data.digits", ("unknown", "it is a setting of digits")),
    "data: {source: photos}": ("data.source", ("'photos'", "`digits`, `folder` or `timm`")),
    "task: {name: segmenting}": ("task.name", ("there is no task 'segmenting'", "classification", "--task")),
    "data: {source: folder, root: x, mean: [0.5]}": ("data", ("mean has 1 channels and std has 3",)),
    "data: {digits: {digit_min: 30}}": ("data.digits", ("digit_min 30 is above digit_max 24",)),
    "train: {batch_size: 10, accumulation: 4}": ("train", ("batch_size 10 is not a multiple of accumulation 4",)),
    "finetune: {lr: 1.0e-7}": ("finetune", ("min_lr 1e-06 is above lr 1e-07",)),
    "finetune: {ratios: [[0.2, 0.1]]}": ("finetune.ratios", ("[0.2, 0.1] decreases", "Try [0.1, 0.2]")),
    "profile: {ratios: [[0.2, 0.1]]}": ("profile.ratios", ("[0.2, 0.1] decreases", "Try [0.1, 0.2]")),
    "model: {checkpoint: a.pth, pretrained: true}": ("model", ("checkpoint and pretrained are both set",)),
    "model: {checkpoint: 'https://x.y/a.pth'}": ("model", ("not a local path",)),
    "model: {depths: [2, 2], num_heads: [1]}": ("model", ("[2, 2] and num_heads [1] differ",)),
}


@pytest.mark.parametrize(("text", "what", "words"), [(text, *told) for text, told in WRONG.items()], ids=list(WRONG))
def test_wrong_experiments_are_told_precisely(text: str, what: str, words: tuple[str, ...], tmp_path: Path) -> None:
    error = refusal(text, tmp_path)
    assert error.what == (f"{tmp_path}/x.yaml:1:1" if what == "x.yaml:1:1" else what)
    assert all(word in str(error) for word in words), str(error)
    assert f"{tmp_path / 'x.yaml'}:" in str(error), "where it stands"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file") as refused:
        load_config(tmp_path / "absent.yaml")
    assert refused.value.exit_code == 2


def test_all_faults_are_told_in_the_order_of_the_file_up_to_ten(tmp_path: Path) -> None:
    error = refusal("search: {popultion: 3}\nmodel: {in_chans: 0}\nadapt: {lr: x}\ndata: {source: folder}\n", tmp_path)
    assert error.what == "search.popultion"
    assert [other.split(":")[0] for other in error.others] == ["model.in_chans", "adapt.lr", "data.root"]

    many = refusal("search: {" + ", ".join(f"x{n}: 1" for n in range(14)) + "}", tmp_path)
    assert len(many.others) == 9 + 1
    assert many.others[-1] == "and 4 more"


def test_long_and_invisible_values_are_shown_short_and_escaped(tmp_path: Path) -> None:
    error = refusal('device: "\\u202egpu' + "x" * 100_000 + '"\n"k\\u0085": 1', tmp_path)
    assert len(str(error)) < 1000
    assert "\\u202e" in str(error)
    assert "\u202e" not in str(error)
    assert len(str(refusal(f"finetune: {{ratios: [[{'0.8, ' * 5000} 0]]}}", tmp_path))) < 1000
    assert len(str(refusal(f"model: {{pretrained: true, checkpoint: 'a://{'x' * 5000}'}}", tmp_path))) < 1000
    assert len(str(refusal("{" + ", ".join(f"{'k' * 500}{n}: {'v' * 500}" for n in range(99)) + "}", tmp_path))) < 5000


def test_unsaid_settings_keep_their_defaults_and_numbers_their_type(tmp_path: Path) -> None:
    assert load("{}", tmp_path) == EXPERIMENT()
    config = load("adapt: {epochs: 3, lr: 1e-4}\nmodel: {img_size: [256, 704]}\nexperiment: no", tmp_path)
    assert (config.adapt.epochs, config.adapt.lr, config.model.img_size) == (3.0, 1e-4, (256, 704))
    assert isinstance(config.adapt.epochs, float)
    assert config.experiment == "no"


def test_relative_paths_stay_as_they_are(tmp_path: Path) -> None:
    config = load("data: {source: folder, root: ../photos}\nmodel: {checkpoint: ./a.pth}", tmp_path)
    assert (config.data.root, config.model.checkpoint) == ("../photos", "./a.pth")


# --- overrides ---------------------------------------------------------------------------------------


def test_overrides_replace_add_and_nest(tmp_path: Path) -> None:
    overrides = (
        "search.population=32",
        "search.population=64",
        "finetune.ratios=[[.6],[0]]",
        "data.digits.clutter=1e-1",
        "experiment=a-b",
        "model.checkpoint=null",
        " search.budget_latency = 70%",
        "model.img_size=[256, 704]",
        "train.curriculum=[{img_size: 28, epochs: 2}, {img_size: [256, 704], epochs: 1}]",
    )
    config = load("search: {population: 16, parents: 8}\nmodel: {checkpoint: a.pth}", tmp_path, overrides)
    assert (config.search.population, config.search.parents) == (64, 8)
    assert config.finetune.ratios == ((0.6,), (0.0,))
    assert config.data.digits.clutter == 0.1
    assert (config.experiment, config.model.checkpoint, config.search.budget_latency) == ("a-b", None, "70%")
    assert config.model.img_size == (256, 704)
    assert config.train.curriculum[0].epochs == 2.0


def test_a_curriculum_ends_at_the_full_size(tmp_path: Path) -> None:
    for name in ("train", "adapt", "finetune"):
        text = f"{name}: {{curriculum: [{{img_size: 28, epochs: 2}}]}}"
        with pytest.raises(ConfigError, match=rf"{name}.curriculum ends at 28 pixels, model.img_size is 224"):
            load(text, tmp_path)
        assert load(f"{text}\nmodel: {{img_size: 28}}", tmp_path).model.img_size == 28


def test_an_override_can_mend_the_file(tmp_path: Path) -> None:
    assert load("finetune: {ratios: [[x], [y]]}", tmp_path, ("finetune.ratios=[[0.1]]",)).finetune.ratios == ((0.1,),)


WRONG_OVERRIDES: dict[str, tuple[str, tuple[str, ...]]] = {
    "search.popultion=3": ("search.popultion", ("search.population?",)),
    "serach.population=3": ("serach.population", ("search?",)),
    "lr=3": ("lr", ("train.lr or adapt.lr or finetune.lr?",)),
    "search.population.x=3": ("search.population.x", ("search.population is not a section",)),
    "train.curriculum.0.epochs=3": ("train.curriculum.0.epochs", ("train.curriculum as a whole",)),
    "search=3": ("search", ("one by one",)),
    "search={population: 3}": ("search", ("one by one",)),
    "search.population": ("--set search.population", ("no =", "search.population=32")),
    "=3": ("--set =3", ("no field name",)),
    "search..population=3": ("--set search..population=3", ("between dots",)),
    "search.population=": ("search.population", ("no value", "null")),
    "search.population= ": ("search.population", ("no value",)),
    "search.population=-3": ("search.population", ("-3", "of at least 2")),
    "search.parents=101": ("search", ("parents 101 is above population 100",)),
    "finetune.ratios=[[.6],[0]": ("finetune.ratios", ("YAML",)),
    "finetune.ratios=0.6": ("finetune.ratios", ("0.6", "list of lists")),
    "data.root=!!python/name:os.system": ("data.root", ("tags",)),
    "data.root=*.png": ("data.root", ("alias",)),
    "data.root=a\udcffb": ("data.root", ("UTF-8",)),
    "data.root=1\n---\n2": ("data.root", ("second document",)),
    "\x1b[31m=3": (r"\x1b[31m", ("unknown",)),
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_wrong_overrides_are_told_precisely(override: str, tmp_path: Path) -> None:
    what, words = WRONG_OVERRIDES[override]
    error = refusal("seed: 1\n", tmp_path, (override,))
    assert error.what in (what, f"--set {override.strip()}", f"--set {override}")
    assert all(word in str(error) for word in words), str(error)
    if error.what != "search":  # a conflict is told of the section
        assert "--set" in str(error)
    assert "x.yaml" not in str(error)


def test_an_override_below_something_that_is_no_section(tmp_path: Path) -> None:
    error = refusal("search: 3", tmp_path, ("search.population=4",))
    assert error.what == "search"
    assert "3" in error.got
    assert "x.yaml:1:1" in error.got
    assert refusal("[1]", tmp_path, ("search.population=4",)).what.endswith("x.yaml:1:1")


@given(st.text(max_size=40) | st.text("search.population=[]{}'-1", max_size=40))
def test_any_override_is_applied_or_refused(override: str) -> None:
    document = parse_yaml(b"{}", "x.yaml")
    try:
        assert apply_overrides(document, (override,)).data != {}
        message = ""
    except ConfigError as refused:
        message = str(refused)
    assert message.isprintable()
    assert document.data == {}, "the given document is not touched"


# --- nothing is imported -----------------------------------------------------------------------------

IMPORT_NAMES = [
    "os:system",
    "builtins:exec",
    "../evil.py:x",
    "evil:run",
    "__import__('evil').run",
    "torch.hub",
    "evil.entry_point",
    "https://evil.example/x.py",
    "hf-hub:evil/model",
    "local-dir:evil",
]

_IMPORTS_SCRIPT = """
import json, pathlib, sys
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.errors import ConfigError

path = pathlib.Path("x.yaml")
def attempt(text):
    path.write_text(text)
    try:
        load_config(path)
    except ConfigError as error:
        return str(error)

attempt("search: {popultion: 1, population: x}")  # whatever is imported late by a message, is now
attempt("a: [")
seen = []
sys.addaudithook(lambda event, args: seen.append(str(args[:1])) if event in ("import", "exec", "compile",
    "socket.connect", "subprocess.Popen", "os.system") else None)
for text in json.loads(sys.stdin.read()):
    attempt(text)
assert seen == [], seen
assert not pathlib.Path("canary").exists()
heavy = {"torch", "timm", "numpy", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_no_value_of_an_experiment_imports_or_runs_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('canary', 'w')\ndef run(): open('canary', 'w')\n")
    texts = []
    for section, fields in EXPERIMENT().model_dump(mode="json").items():
        for name in IMPORT_NAMES:
            if isinstance(fields, dict):
                texts += [json.dumps({section: dict.fromkeys(fields, name)}), json.dumps({section: {name: 1}})]
                texts += [f"{section}: !!python/name:{name} x"]
            else:
                texts.append(json.dumps({section: name}))
    texts += [json.dumps({name: 1}) for name in IMPORT_NAMES]
    for section, field in (("data", "root"), ("data", "dataset"), ("model", "checkpoint"), ("train", "optimizer")):
        texts += [json.dumps({section: {field: name}}) for name in IMPORT_NAMES]
    _run_in_a_fresh_interpreter(_IMPORTS_SCRIPT, texts, tmp_path)


def test_wrong_experiments_are_decided_without_torch(tmp_path: Path) -> None:
    script = _IMPORTS_SCRIPT.replace("attempt(text)\nassert", "assert attempt(text), text\nassert")
    assert script != _IMPORTS_SCRIPT
    _run_in_a_fresh_interpreter(script, list(WRONG), tmp_path)


def _run_in_a_fresh_interpreter(script: str, texts: list[str], folder: Path) -> None:
    command = [sys.executable, "-c", script]
    run = subprocess.run(
        command, input=json.dumps(texts), cwd=folder, text=True, capture_output=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr


# --- the packaged experiments ------------------------------------------------------------------------


def test_packaged_experiments_are_there() -> None:
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert {"digits.yaml", "smoke.yaml"} <= names


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")) or [None], ids=lambda path: path and path.name)
def test_every_packaged_experiment_loads(path: Path | None) -> None:
    assert path is not None, "no YAML in configs/"
    config = load_config(path)
    assert load_config(packaged_config_path(path.name)) == config


def test_no_path_means_the_packaged_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_install(tmp_path, monkeypatch)
    (tmp_path / "repo" / "configs").mkdir()
    (tmp_path / "repo" / "configs" / "digits.yaml").write_text("seed: 1")
    assert load_config(None, ["search.population=50"]).seed == 1

    (tmp_path / "repo" / "src" / "sparsevit_cli" / "configs").mkdir()
    (tmp_path / "repo" / "src" / "sparsevit_cli" / "configs" / "digits.yaml").write_text("seed: 2")
    assert load_config(None).seed == 2, "a wheel carries its own"


def test_an_absent_packaged_experiment_lists_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_install(tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as refused:
        packaged_config_path("digits.yaml")
    repo = tmp_path / "repo"
    for place in (repo / "configs", repo / "src" / "sparsevit_cli" / "configs"):
        assert str(place / "digits.yaml") in refused.value.got


def _fake_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "repo" / "src" / "sparsevit_cli" / "config" / "loading.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(loading, "__file__", os.fspath(module))


# --- dump, differences, hash -------------------------------------------------------------------------

# Fields whose values also obey a rule that JSON schema does not carry.
RATIOS = st.integers(0, 8).map(lambda tenths: tenths / 10)
STAGES = st.lists(st.lists(RATIOS, min_size=1, max_size=3).map(sorted), min_size=1, max_size=4)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "check_ratios": st.lists(RATIOS, max_size=3),
    "max_ratio": st.integers(1, 8).map(lambda tenths: tenths / 10),
    "ratios": st.none() | STAGES,
}
PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20) | st.sampled_from(
    ["no", "1e-4", "12:30", "null", "~", "*", "a: b", "# x", "0o7", "", " ", "'", '"', "- a", "1_000", "2024-01-01"]
)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema allows, without the rules that validators add."""
    if "anyOf" in schema:
        return st.one_of([values_of(choice) for choice in schema["anyOf"]])
    schema = KNOWN.resolved(schema)
    if "properties" in schema:
        fields = {
            name: SPECIAL[name] if name in SPECIAL else values_of(child) for name, child in schema["properties"].items()
        }
        required = {name: fields[name] for name in schema.get("required", ())}
        return st.fixed_dictionaries(
            required, optional={name: values for name, values in fields.items() if name not in required}
        )
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        fixed = len(schema.get("prefixItems", ()))
        items = values_of(schema["prefixItems"][0] if fixed else schema["items"])
        return st.lists(items, min_size=fixed or schema.get("minItems", 0), max_size=fixed or 3)
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1e6 if schema["type"] == "number" else 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    simple: dict[str, st.SearchStrategy[Any]] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(low, high - ("exclusiveMaximum" in schema) if high is not None else 2**40),
        "number": st.floats(
            low,
            high,
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
            allow_nan=False,
            allow_infinity=False,
        ),
        "string": st.from_regex(schema["pattern"], fullmatch=True)
        if "pattern" in schema
        else PLAIN_TEXT.filter(lambda text: len(text) >= schema.get("minLength", 0)),
    }
    return simple[schema["type"]]


@st.composite
def experiments(draw: st.DrawFn) -> ExperimentConfig:
    """Valid experiments; sections that contradict themselves are left out."""
    sections: dict[str, Any] = {}
    for name, schema in KNOWN.schema["properties"].items():
        value = draw(values_of(schema))
        try:
            EXPERIMENT.model_validate_json(json.dumps({name: value}))
        except ValidationError:
            continue
        sections[name] = value
    assume(sections)
    return EXPERIMENT.model_validate_json(json.dumps(sections))


@settings(suppress_health_check=list(HealthCheck), max_examples=60)
@given(experiments())
def test_a_dumped_experiment_loads_equal(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig) -> None:
    text = dump_config(config)
    again = load(text, tmp_path_factory.mktemp("dump"))
    assert again == config
    assert dump_config(again) == text
    assert section_hash(again, *EXPERIMENT.model_fields) == section_hash(config, *EXPERIMENT.model_fields)
    assert config_differences(config, again) == []


def test_nothing_unvalidated_is_made_of_an_experiment() -> None:
    config = EXPERIMENT.model_validate({"train": {"curriculum": ({"img_size": 224, "epochs": 1.0},)}})
    assert config.model_copy(update={"seed": 3}) == EXPERIMENT.model_validate({**dict(config), "seed": 3})
    assert config.model_copy() == config
    with pytest.raises(ValidationError, match="ends at 224"):
        config.model_copy(update={"model": config.model.model_copy(update={"img_size": 192})})
    with pytest.raises(ValidationError, match="greater"):
        config.train.model_copy(update={"lr": -1.0})
    with pytest.raises(ValidationError, match="rate"):
        config.train.model_copy(update={"rate": 1.0})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.population=0xFFFFFFFFFFFFFFFFFF", "too long for a whole number"),
        (f"profile.batch_sizes={[1] * 9900}", "more than 10000 values"),
        ("search.budget_macs=" + "a" * (1 << 20), "larger than"),
        ("search.budget_macs=" + "a\ufeff" * 180_000, "larger than"),
    ],
    ids=["hex", "values", "long", "escapes"],
)
def test_what_could_not_be_read_again_is_not_written(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        dump_config(load("{}", tmp_path, (override,)))
    assert told in str(refused.value)
    assert len(str(refused.value)) < 1000


TRICKY = [
    "1e-4", "1e5", "-1E+2", "0x1F", "0o17", "017", "1_000", "12:30", "no", "on", "y", "~", "''", '""', "' '", "null",
    "'null'", "2024-01-01", "{}", "[]", "[1e-4, .5]", "50ms", "70%", "3.", ".5", "+1", "-0.0", "5e-324", "1e308", "=",
    "<<", "a: b", "a #b", "'a #b'", "- a", "%a", "'@a'", "'`a'", '"\\t"', '"\\e"', '"a\\u2028b"', '"\\ufeffa"', "ä",
    '"\\U0001F600"', '"\\ud800"', "a\u0301", "\ufeff", "'a\u2028b'", "a\u00a0", "x" * 5000, f"'x{' y' * 900}'",
]  # fmt: skip
FIELDS = ["output", "data.root", "data.train_split", "model.checkpoint", "search.budget_macs", "experiment", "seed",
          "train.lr", "train.epochs", "train.clip_grad", "model.img_size", "profile.image_sizes", "profile.ratios",
          "adapt.check_ratios", "data.mean", "device", "model.name", "train.optimizer"]  # fmt: skip


@given(st.sampled_from(FIELDS), st.text(max_size=20) | st.sampled_from(TRICKY))
def test_any_override_that_is_taken_is_read_again_as_it_was(field: str, value: str) -> None:
    overrides = ("data.source=folder", "data.root=x", f"{field}={value}")
    try:
        config = load_config(packaged_config_path("images.yaml"), overrides)
    except ConfigError:
        return
    again = validate(parse_yaml(dump_config(config).encode(), "x.yaml"))
    assert again == config
    assert repr(again) == repr(config), "the same types"


def test_a_dump_holds_every_setting_and_no_comment() -> None:
    text = dump_config(EXPERIMENT())
    assert "#" not in text
    assert "\n  lr: 1.0e-05\n" in text
    assert "  batch_sizes: [1, 4]\n" in text
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == [
        "task",
        "model",
        "data",
        "train",
        "adapt",
        "search",
        "finetune",
        "profile",
        "clock",
        "export",
        "run",
    ]


def test_differences_name_the_field_and_both_values(tmp_path: Path) -> None:
    old = EXPERIMENT()
    new = load("search: {population: 32, seconds: 1}\noutput: elsewhere\nmodel: {img_size: [8, 9]}", tmp_path)
    assert config_differences(old, new) == [
        'output: "runs" -> "elsewhere"',
        "model.img_size: 224 -> [8, 9]",
        "search.population: 100 -> 32",
        "search.seconds: 0.3 -> 1.0",
    ]
    assert config_differences(old, new, ignore={"output", "search.seconds", "model"}) == [
        "search.population: 100 -> 32"
    ]
    assert config_differences(old, new, ignore={"search", "model.img_size"}) == ['output: "runs" -> "elsewhere"']
    with pytest.raises(AssertionError):
        config_differences(old, new, ignore={"serach"})


def test_every_difference_is_listed(tmp_path: Path) -> None:
    changed = "data: {digits: {clutter: 0.1}}\nsearch: {population: 9, parents: 3, generations: 2, mutation: 0.2}"
    changed += "\nadapt: {epochs: 1, lr: 1, distill: 1, keep: 3}\nseed: 5\nexport: {opset: 18, latency: false}"
    lines = config_differences(EXPERIMENT(), load(changed, tmp_path))
    assert len(lines) == 12
    assert lines[-1] == "export.latency: true -> false"


def test_a_hash_follows_its_sections_only() -> None:
    old = EXPERIMENT()
    new = old.model_copy(update={"search": old.search.model_copy(update={"population": 32}), "seed": 3})
    assert section_hash(old, "model", "data") == section_hash(new, "data", "model", "data.workers")
    assert section_hash(old, "search") != section_hash(new, "search")
    assert section_hash(old, "search.parents") == section_hash(new, "search.parents")
    assert section_hash(old, "seed") != section_hash(new, "seed")
    assert section_hash(new, "seed") == "7b6a8cf4d01be513fc5b3adf0c1a70087550709c315ad98f141cad2cea1c6728"
    for wrong in ((), ("serach",)):
        with pytest.raises(AssertionError):
            section_hash(old, *wrong)


def test_a_new_setting_at_its_default_changes_no_hash() -> None:
    """Yesterday's checkpoints and ledgers are not refused because a version knows more settings."""
    old = load_config(packaged_config_path())
    section = type(old.train)
    grown = create_model("Grown", __base__=section, new_setting=(float, 0.5), new_list=(tuple[int, ...], (1, 2)))
    experiment = create_model("Experiment", __base__=type(old), train=(grown, ...))
    new = experiment.model_validate({**dict(old), "train": dict(old.train)})
    assert section_hash(new, "train", "model", "data") == section_hash(old, "train", "model", "data")
    changed = experiment.model_validate({**dict(old), "train": {**dict(old.train), "new_setting": 0.6}})
    assert section_hash(changed, "train") != section_hash(old, "train")
    phase = type(old.train.curriculum[0])
    later = create_model("Later", __base__=phase, new_setting=(float, 0.5))
    grown = create_model("Grown", __base__=section, curriculum=(tuple[later, ...], ()))  # type: ignore[valid-type]
    experiment = create_model("Experiment", __base__=type(old), train=(grown, ...))
    phases = tuple(dict(each) for each in old.train.curriculum)
    new = experiment.model_validate({**dict(old), "train": {**dict(old.train), "curriculum": phases}})
    assert section_hash(new, "train") == section_hash(old, "train")
    assert section_hash(old, "model", ignore=("model.weight_init",)) == section_hash(
        old.model_copy(update={"model": old.model.model_copy(update={"weight_init": "timm"})}), "model"
    )


def float_fields(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from float_fields(field.annotation, (*path, name))
        elif "float" in str(field.annotation) or "float" in str(field.metadata):
            yield (*path, name), field


FLOATS = dict(float_fields(EXPERIMENT))


@pytest.mark.parametrize("path", FLOATS, ids=".".join)
def test_every_number_fits_float32(path: tuple[str, ...]) -> None:
    assert len(FLOATS) > 60
    for number in ("1e39", "1e300", "1e-39", "1e-320", "-1e39"):
        value = f"[{number}, {number}, {number}]" if path[-1] in ("mean", "std") else number
        if path[-1] in ("ratios", "check_ratios"):
            value = f"[[{number}]]" if path[-1] == "ratios" else f"[{number}]"
        with pytest.raises(ConfigError) as error:
            load_config(None, [f"{'.'.join(path)}={value}"])
        assert error.value.what.startswith(".".join(path))
