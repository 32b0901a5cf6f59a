"""The command line: parse, call one workflow, print. torch is imported by the workflows, not by `--help`."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .atomic import told_of
from .errors import (
    ResourceError,
    StoppedError,
    ThreePartError,
    first_line,
    in_one_line,
    is_out_of_memory,
    stopped_by,
)
from .stopping import stop_on_signals

if TYPE_CHECKING:
    from .config.overrides import Override
    from .console import ConsoleReporter
    from .workflows.session import Session

app = typer.Typer(
    name="sparsevit",
    help=(
        "Make a timm Swin Transformer faster on large images by skipping attention windows (SparseViT, CVPR 2023). "
        "Order of work: check-data, pretrain, adapt, search, finetune, profile, export; `run` does all of it. "
        "Without --config the packaged digits experiment is used."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[str | None, typer.Option("--config", "-c", help="Experiment YAML; default: the packaged digits.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override a field: search.population=32.")]
TaskFile = Annotated[
    str | None, typer.Option("--task", help="Your own task, path/file.py:Class; its code is run. Default: task.name.")
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of all run folders; default: runs.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, mps, cuda or cuda:N.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Every random draw is a function of it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, sizes and estimated time; write nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show library warnings, and tracebacks of errors.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set an earlier run of this command aside and start anew.")]
BudgetLatency = Annotated[
    str | None, typer.Option("--budget-latency", help="Latency per batch: 50ms, or 70% of the dense model.")
]
BudgetMacs = Annotated[
    str | None, typer.Option("--budget-macs", help="Multiply-adds per image: 3G, 450M, or 60% of the dense model.")
]
Ratios = Annotated[
    str | None,
    typer.Option("--ratios", help="0.6 everywhere, [[.6],[0],[.2,.4,.5],[0]] per stage and pair, or a winner.yaml."),
]
WeightsOf = Annotated[
    str | None,
    typer.Option(
        "--weights", help="pretrain, adapt, finetune, best, a file or a folder of weights; default: the last one done."
    ),
]


@dataclass(frozen=True)
class Options:
    """The flags that every command has."""

    config: str | None
    overrides: tuple[str | Override, ...]
    task: str | None
    json: bool
    dry_run: bool
    verbose: bool
    fresh: bool


FIELD_OF = {
    "budget_latency": "search.budget_latency", "budget_macs": "search.budget_macs", "runtime": "profile.runtimes",
}  # fmt: skip
"""Fields of flags that are not named as their field is."""


def _options(
    config: str | None, set_: Sequence[str] | None, as_json: bool, dry_run: bool, verbose: bool, fresh: bool,
    task: str | None, **fields: str | int | list[str] | None,
) -> Options:  # fmt: skip
    """Flags such as --seed set their field, and come after every --set."""
    from .config.overrides import Override

    typed = [
        Override.flag(f"--{name.replace('_', '-')}", FIELD_OF.get(name, name), value)
        for name, value in fields.items()
        if value is not None
    ]
    return Options(config, (*(set_ or ()), *typed), task, as_json, dry_run, verbose, fresh)


def _run(
    command: str, options: Options, work: Callable[[Session], Any], show: Callable[[Any], None],
    *, refuse: Callable[[Any], None] = lambda result: None, several: str | None = None, **flags: str | None,
) -> None:  # fmt: skip
    """One command: a session, its workflow, and the result as a table or as JSON; `refuse` may raise after that.

    `several` are the budgets of one search. They and `flags` matter to its plan.
    """
    from .config.loading import load_config
    from .console import ConsoleReporter, print_json, print_lines
    from .search.budget import parse_budgets, parse_several

    reporter = ConsoleReporter(verbose=options.verbose)
    told = {"to_go_on": "Type the command without --fresh to go on."} if options.fresh else {}
    with (
        _reported(reporter, options.verbose),
        stop_on_signals(**told) as stop,  # before torch is loaded, which takes seconds
        _library_talk(reporter, options.verbose),
    ):
        overrides = (*options.overrides, *_task_typed(options.task, options.overrides))
        config = load_config(_config_path(options.config), overrides, is_packaged=options.task is None)
        latency, macs = config.search.budget_latency, config.search.budget_macs
        parse_budgets(latency, macs)  # refused before torch is loaded
        budgets = parse_several(several, latency=latency, macs=macs) if several is not None else {}
        from .kernels.cache import keep_compilers_private
        from .profiling.memory import reuse_freed_memory
        from .workflows.session import Session

        reuse_freed_memory()
        keep_compilers_private()
        stop.check(f"sparsevit {command}", "nothing was begun")
        session = Session(config, reporter, stop, ("sparsevit", *sys.argv[1:]), options.fresh)
        if options.dry_run:
            from .workflows.plan import plan_of

            plan = plan_of(session, command, budgets=tuple(budgets), **flags)
            print_json({"plan": plan.lines}) if options.json else print_lines(*plan.lines)
            plan.refuse_incomplete()
            return
        with _together(session, command, reporter) as ours, closing(ours.locks):
            result = work(ours)
        if ours.ranks.is_first:
            print_json(as_document(result)) if options.json else show(result)
            refuse(result)


@contextmanager
def _together(session: Session, command: str, reporter: ConsoleReporter) -> Iterator[Session]:
    """The session among the processes that torchrun started; all but the first one talk of their errors alone.

    Raises ConfigError for a command that one process does.
    """
    from .errors import ConfigError
    from .profiling.device import resolve_device
    from .ranks import joined, started_together

    if started_together() > 1 and command not in SHARED:
        got = f"{started_together()} processes were started, and only {', '.join(SHARED)} share their work"
        raise ConfigError(f"sparsevit {command}", got, "Start it once, without torchrun.")
    with joined(lambda: resolve_device(session.config.device)) as ranks:
        if not ranks.is_first:
            reporter.quiet = True
        yield session.replaced(ranks=ranks)


SHARED = ("pretrain", "adapt", "finetune")
"""Commands that several processes do together."""


def _task_typed(typed: str | None, overrides: Sequence[str | Override]) -> tuple[Override, ...]:
    """The override that names a user's task, whose file is run now. Raises ConfigError beside another name."""
    if typed is None:
        return ()
    from .config.overrides import Override
    from .errors import ConfigError
    from .tasks.task import load_task

    if any(isinstance(each, str) and each.replace(" ", "").startswith("task.name=") for each in overrides):
        raise ConfigError("--task", "--set task.name names a task too", "Leave one of them out.")
    return (Override.flag("--task", "task.name", load_task(typed)),)


def _config_path(typed: str | None) -> Path | None:
    from .config.paths import as_path

    return None if typed is None else as_path(typed, "--config")


def as_document(result: Any) -> Mapping[str, object]:
    """A frozen result as plain JSON values; it may say how itself (`document`)."""
    if hasattr(result, "document"):
        return dict(result.document())
    return {"schema_version": 2, **_plain(asdict(result))}


def _plain(value: Any) -> Any:
    from .sparsity import SparsityConfig

    if isinstance(value, SparsityConfig):
        return value.ratios
    if isinstance(value, Mapping):
        if set(value) == {"tenths"}:  # asdict of a SparsityConfig
            return SparsityConfig(value["tenths"]).ratios
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# -- before training ---------------------------------------------------------------------------------------------


@app.command("check-data")
def check_data(
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Read so many samples of each split; default: all.")
    ] = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Read the data as the task will: counts, what is wrong, duplicates between splits, and a picture of 16 samples."""
    from .views import show_data_check

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)
    work = _workflow("check_data", "check_data", samples=samples)
    _run("check-data", options, work, show_data_check, refuse=methodcaller("refuse_unusable"))


# -- training ---------------------------------------------------------------------------------------------------


@app.command()
def pretrain(
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Train a dense model: from scratch, from timm's weights or from a checkpoint file. Resumes."""
    from .views import show_training

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)
    _run("pretrain", options, _workflow("training", "pretrain"), show_training)


@app.command()
def adapt(
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Train on with random sparsity, so that the search can compare configurations. Resumes."""
    from .views import show_training

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)
    _run("adapt", options, _workflow("training", "adapt"), show_training)


@app.command()
def finetune(
    ratios: Ratios = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Train the adapted weights on at the winner's ratios, or at --ratios. Resumes."""
    from .views import show_training

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)
    _run("finetune", options, _workflow("training", "finetune", ratios=ratios), show_training)


# -- search, evaluation, measurement, export --------------------------------------------------------------------


@app.command()
def search(
    budget_latency: BudgetLatency = None, budget_macs: BudgetMacs = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Several winners: 40ms,35ms,30ms, or 3G,2G; winner.yaml is the first one's."),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Several winners: for 90, 80, 70, 60 and 50 % of dense too.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Score block pairs one by one instead; a table and a plot.")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option("--workers", help="Score candidates elsewhere: local:4, or tcp://HOST:PORT of a Dask scheduler."),
    ] = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Find the most accurate sparsity configuration within a budget; writes winner.yaml. Resumes, reuses its ledger."""
    from .search.budget import SHARES
    from .views import show_search, show_sensitivity

    typed = budget_latency is not None or budget_macs is not None
    if sensitivity and workers is not None:
        raise typer.BadParameter("--sensitivity and --workers exclude each other")
    if sum((budgets is not None, pareto, sensitivity)) > 1 or (budgets is not None and typed):
        raise typer.BadParameter("--budgets, --pareto and --sensitivity, or --budgets and a budget, exclude each other")
    cleared = ("search.budget_latency=null", "search.budget_macs=null") if typed else ()  # typed replace the file's
    options = _options(
        config, (*cleared, *(set_ or ())), as_json, dry_run, verbose, fresh, task, output=output, device=device,
        seed=seed, budget_latency=budget_latency, budget_macs=budget_macs,
    )  # fmt: skip
    if sensitivity:
        _run("search", options, _workflow("sensitivity", "measure_sensitivity"), show_sensitivity)
    elif pareto or budgets is not None:
        work = _workflow("front", "search_front", budgets=budgets, workers=workers)
        _run("search", options, work, show_search, several=SHARES if budgets is None else budgets)
    else:
        _run("search", options, _workflow("search", "search", workers=workers), show_search)


@app.command()
def evaluate(
    weights: WeightsOf = None, ratios: Ratios = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="openvino, onnxruntime or torch: score the exported file of it in --weights, the folder of an export "
            "(default: this experiment's).",
        ),
    ] = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Score trained weights at given ratios, or an exported file as it is, on the validation data."""
    from .views import show_evaluation

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)

    work = _workflow("evaluate", "evaluate", weights=weights, ratios=ratios, runtime=runtime)
    _run("evaluate", options, work, show_evaluation, runtime=runtime)


@app.command()
def profile(
    model: Annotated[str | None, typer.Option("--model", help="timm model name; needs no data, no training.")] = None,
    img_size: Annotated[
        str | None, typer.Option("--img-size", help="Pixels, e.g. 672, 256x704, or a list 448,672.")
    ] = None,
    ratios: Ratios = None,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals", help="Against the best dense timm: fused, compiled, in other runtimes, smaller; and an oracle."
        ),
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="Where models run: torch, onnxruntime, openvino, or several with commas."),
    ] = None,
    latency_table: Annotated[
        str | None,
        typer.Option("--latency-table", help="Measure the search's latency table instead, and write it to this file."),
    ] = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Measure dense against sparse on this machine, interleaved: latency, multiply-adds, memory, time per stage."""
    from .views import show_profile, show_rivals, show_table

    runtimes = None if runtime is None else runtime.replace(" ", "").split(",")
    options = _options(
        config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed, runtime=runtimes
    )

    command, name, show = ("rivals", "measure_rivals", show_rivals) if rivals else (
        "profile", "profile_model", show_profile
    )  # fmt: skip
    what: dict[str, Any] = {"model": model, "img_size": img_size, "ratios": ratios}
    if latency_table is not None:
        work = _workflow("table", "measure_table", path=latency_table, rivals=rivals, runtime=runtime, **what)
        _run("profile", options, work, show_table, **{**what, "ratios": "0"}, latency_table=latency_table)
        return
    _run(command, options, _workflow(command, name, **what), show, refuse=methodcaller("refuse_unsteady"), **what)


@app.command()
def export(
    weights: WeightsOf = None, ratios: Ratios = None,
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """Write ONNX and .pt2 files, checked against PyTorch first, and safetensors + sparsity.json.

    Window pruning skips computation: weights and file sizes do not shrink.
    """
    from .views import show_export

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)

    _run("export", options, _workflow("export", "export_winner", weights=weights, ratios=ratios), show_export)


@app.command()
def run(
    config: Config = None, set_: Set = None, task: TaskFile = None, output: Output = None, device: Device = None,
    seed: Seed = None,
    as_json: Json = False, dry_run: DryRun = False, verbose: Verbose = False, fresh: Fresh = False,
) -> None:  # fmt: skip
    """All in order: pretrain, adapt, search, finetune, evaluate, profile, export; ends with one table. Resumes."""
    from .views import show_pipeline

    options = _options(config, set_, as_json, dry_run, verbose, fresh, task, output=output, device=device, seed=seed)
    _run("run", options, _workflow("pipeline", "run_pipeline"), show_pipeline)


# -- what surrounds them ----------------------------------------------------------------------------------------


@app.command()
def models(as_json: Json = False) -> None:
    """List the timm models that can be made sparse; every one is tested against timm."""
    from .console import ConsoleReporter, print_json

    with _reported(ConsoleReporter(), False):
        from .models import support_table
        from .views import show_models

        found = support_table()
        print_json({"models": [asdict(model) for model in found]}) if as_json else show_models(found)


@app.command("config")
def config_command(config: Config = None, set_: Set = None, task: TaskFile = None, as_json: Json = False) -> None:
    """Print the resolved configuration: defaults, YAML and overrides together."""
    from .config.loading import dump_config, load_config
    from .console import ConsoleReporter, print_json, write_stdout

    with _reported(ConsoleReporter(), False):
        typed = set_ or ()
        resolved = load_config(_config_path(config), (*typed, *_task_typed(task, typed)), is_packaged=task is None)
        print_json(resolved.model_dump(mode="json")) if as_json else write_stdout(dump_config(resolved))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print device, versions and missing extras, ready to paste into a bug report."""
    from .console import ConsoleReporter, print_json, print_lines

    with _reported(ConsoleReporter(), False):
        from .workflows.doctor import examine

        found = examine()
        print_json(found) if as_json else print_lines(*(f"{name}: {value}" for name, value in found.items()))


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"sparsevit {__version__}")
        raise typer.Exit


def _workflow(module: str, name: str, **flags: str | int | None) -> Callable[[Session], Any]:
    def work(session: Session) -> Any:
        import importlib

        function = getattr(importlib.import_module(f".workflows.{module}", __package__), name)
        session.stop.check(
            f"sparsevit {module.replace('_', '-')}", "nothing was begun"
        )  # a signal that came while libraries loaded
        return function(session, **flags)

    return work


# -- from exception to message and exit code --------------------------------------------------------------------


@contextmanager
def _reported(reporter: ConsoleReporter, verbose: bool) -> Iterator[None]:
    """Tell whatever ends the block, and exit with its code."""
    try:
        yield
    except (typer.Exit, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise typer.Exit(_tell(error, reporter, verbose)) from error


def _tell(error: BaseException, reporter: ConsoleReporter, verbose: bool) -> int:
    """The one table from exception to message and exit code; behind it the last resort."""
    told = _told_of(error)
    if told is None:
        where = _keep_traceback(error, reporter)
        kind, _, text = in_one_line(error).partition(": ")
        do = f"Please report it with {where} and what `sparsevit doctor` prints. What was saved is whole."
        told = ThreePartError(f"unexpected {kind}", text or "without a text", do)
    if not told.is_told:
        reporter.error(told)
    if verbose:
        reporter.console.print_exception()
    return told.exit_code


def _told_of(error: BaseException) -> ThreePartError | None:
    if isinstance(error, ThreePartError):
        return error
    stopped = stopped_by(error)
    if isinstance(stopped, KeyboardInterrupt):
        do = "What was saved is whole. Type the same command to go on."
        return StoppedError("stopped", "by Ctrl-C", do, interrupted=True)
    if stopped is not None:
        return stopped
    if is_out_of_memory(error):
        got = first_line(error) or "the machine ran out of it"
        return ResourceError("memory", got, "Lower batch sizes or image sizes.")
    return told_of(error) if isinstance(error, OSError) else None


def _keep_traceback(error: BaseException, reporter: ConsoleReporter) -> Path | str:
    """Write the traceback into the run folder, or a temporary file; where neither can be written it is printed."""
    text = f"sparsevit-cli {__version__}, Python {sys.version}, {' '.join(sys.argv)}\n"
    text += "".join(traceback.format_exception(error))
    for place in (reporter.folder, None):  # None: the system's folder for temporary files
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(".txt", "traceback-", place)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(name)
    for line in text.splitlines():
        reporter.say(line)
    return "the traceback above"


@contextmanager
def _library_talk(reporter: ConsoleReporter, verbose: bool) -> Iterator[None]:
    """Our log records become warnings of the reporter; Python warnings are shown with --verbose alone."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                reporter.warn(record.getMessage(), always=True)
            else:
                reporter.say(record.getMessage())

    log, handler = logging.getLogger(__package__), Forward()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if verbose else "ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


def main() -> None:
    """Entry point of `sparsevit`."""
    from .console import ConsoleReporter, keep_streams, let_streams_go

    keep_streams()
    try:
        app(prog_name="sparsevit")
    except (Exception, KeyboardInterrupt, StoppedError) as error:
        sys.exit(_tell(error, ConsoleReporter(), verbose=False))
    finally:
        let_streams_go()


if __name__ == "__main__":
    main()
