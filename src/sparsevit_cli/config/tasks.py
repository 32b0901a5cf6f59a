"""What each task adds to the sections of an experiment. No torch: a task's code is named here and loaded elsewhere.

A configuration is validated against one concrete type, made for the task and the data source that it names. So every
error, override and line of the reference page speaks of settings that this experiment really has.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import Field, create_model

from sparsevit_cli.errors import ConfigError, in_one_line, pass_on

from . import classification, instances, semantic
from .experiment import DataSection, ExperimentConfig, Section
from .fields import Fields, one_of
from .kind import Kind
from .yaml_loader import Document, Value

ENTRY_POINTS = "sparsevit_cli.tasks"
"""Group under which an installed package offers tasks: name -> class."""
DEFAULT_TASK = "classification"


KINDS: dict[str, Kind] = {
    "classification": classification.KIND,
    "instances": instances.KIND,
    "semantic": semantic.KIND,
}
"""The tasks that come with the package, and those that this process was told of (`add_task`)."""

_classes: dict[str, Any] = {}


def add_task(task: Any) -> None:
    """Make a class with `name` and `kind` known to this process. Raises ConfigError for a name that is taken."""
    name = task.name
    if name in KINDS and _classes.get(name) is not task and KINDS[name].home is not None:
        raise ConfigError("task", f"the name {name!r} is taken", "Give your task another name.")
    KINDS[name] = task.kind
    _classes[name] = task
    _TYPES.clear()


def task_class(name: str) -> Any:
    """The class of a task, loaded now. Raises ConfigError for an unknown name."""
    kind = kind_of(name)
    if kind.home is not None:
        module, _, attribute = kind.home.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return _classes[name]


def kind_of(name: str) -> Kind:
    """The sections of a task. One that an installed package offers is loaded for it. Raises ConfigError."""
    if name not in KINDS:
        offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if name not in offered:
            known = ", ".join(sorted({*KINDS, *offered}))
            do = "Give a known one, or type --task path/file.py:Class on the command line."
            raise ConfigError("task.name", f"there is no task {name!r}; there are: {known}", do)
        try:
            offered_task = offered[name].load()
        except Exception as error:  # an installed package may raise anything
            pass_on(error)
            got = f"the package that offers {name!r} cannot be loaded ({in_one_line(error)})"
            raise ConfigError("task.name", got, "Install it again, or ask who wrote it.") from error
        if getattr(offered_task, "name", None) != name or not isinstance(getattr(offered_task, "kind", None), Kind):
            got = f"the package that offers {name!r} gives no task of that name"
            raise ConfigError("task.name", got, "Ask who wrote it: the entry point's name is the task's.")
        add_task(offered_task)
    return KINDS[name]


def experiment_type(task: str = DEFAULT_TASK, source: str | None = None) -> type[ExperimentConfig]:
    """The type of an experiment of `task` whose data come from `source` (None, or an unknown one: the default source).

    Raises ConfigError for an unknown task.
    """
    kind = kind_of(task)
    chosen = source if source is not None and source in kind.sources else next(iter(kind.sources))
    if (task, chosen) not in _TYPES:
        _TYPES[task, chosen] = _made(task, kind, kind.sources[chosen])
    return _TYPES[task, chosen]


_TYPES: dict[tuple[str, str], type[ExperimentConfig]] = {}


def _made(name: str, kind: Kind, data: type[DataSection]) -> type[ExperimentConfig]:
    """ExperimentConfig with the sections of one task and one source."""
    sections: dict[str, type[Section]] = {
        "task": kind.task, "model": kind.model, "train": kind.train, "adapt": kind.adapt, "finetune": kind.finetune,
        "data": data,
    }  # fmt: skip
    fields: dict[str, Any] = {}
    for section, made_of in sections.items():
        shared = ExperimentConfig.model_fields[section]
        needs = any(each.is_required() for each in made_of.model_fields.values())
        default = ... if needs else made_of(**({"name": name} if section == "task" else {}))
        fields[section] = (made_of, Field(default, description=shared.description))
    return create_model("ExperimentConfig", __base__=ExperimentConfig, __doc__=ExperimentConfig.__doc__, **fields)


def all_types(task: str | None = None) -> dict[str, type[ExperimentConfig]]:
    """The types of `task` (None: the default one) by the name of the source."""
    name = task or DEFAULT_TASK
    return {source: experiment_type(name, source) for source in kind_of(name).sources}


def fields_by_source(task: str | None) -> dict[str, Fields]:
    """The fields of `all_types`: made for messages and the reference page, not for a configuration without faults."""
    return {source: Fields.of(kind) for source, kind in all_types(task).items()}


def own_value(document: Mapping[str, Any], section: str, name: str) -> str | None:
    """A text in a section of a document that nobody has validated yet; None if there is none."""
    found = document.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def type_of(document: Document) -> type[ExperimentConfig]:
    """The type that a document asks for by `task.name` and `data.source`. Raises ConfigError for unknown ones."""
    assert isinstance(document.data, dict)
    task, data = own_value(document.data, "task", "name") or DEFAULT_TASK, document.data.get("data")
    written: Value = data.get("source") if isinstance(data, dict) else None

    def place(*path: str) -> str:
        return f" ({document.places[path]})" if path in document.places else ""

    try:
        known = list(kind_of(task).sources)
    except ConfigError as fault:
        raise ConfigError(fault.what, f"{fault.got}{place('task', 'name')}", fault.do) from fault
    if written is not None and written not in known:
        got = f"{written!r:.80} is not allowed{place('data', 'source')}; allowed: {one_of(known)}"
        raise ConfigError("data.source", got, "Change it. Meaning: Where samples come from.")
    return experiment_type(task, own_value(document.data, "data", "source"))
