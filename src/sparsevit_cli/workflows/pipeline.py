"""run: every command in order, then one table of dense against sparse on this machine.

A step that is done is not done again, so a killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from operator import index
from typing import Any

from torch import Tensor, nn

from sparsevit_cli.atomic import write_json
from sparsevit_cli.data.shrunk import Scale, Shrunk, multiples
from sparsevit_cli.data.source import Categories, Data
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError, UnsteadyError
from sparsevit_cli.exporting import MANIFEST, check_packages
from sparsevit_cli.profiling.inputs import TORCH_DTYPE, example_input, placed
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import count_macs, macs_cost
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity
from sparsevit_cli.swin.geometry import patch_size, set_image_size, window_sizes
from sparsevit_cli.tasks.task import Metric, Score

from .evaluate import evaluate_checkpoint
from .export import export_settings, export_winner
from .profile import profile_model, profile_settings
from .search import budget_requests, is_searched, search
from .session import Session, Weights
from .training import (
    adapt,
    checked_plan,
    chosen_ratios,
    dense_weights,
    finetune,
    has_own_weights,
    pretrain,
    score,
    train_smaller_rival,
)
from .weights import trained_weights

RIVAL_SIZE = "size.json"
NEEDED = {"profile": ("profile.json",), "export": (MANIFEST,)}
"""Files without which a step is not done, whatever its numbers say."""
MOST_RIVALS = 9
"""Lower resolutions whose latency is measured, to find the one nearest to the winner's."""


@dataclass(frozen=True)
class PipelineRow:
    """One model of the closing table; speed-up against dense in the same interleaved measurement.

    Latency is None where it is not steady, speed-up where it or dense's is not.
    """

    label: str
    ratios: tuple[tuple[float, ...], ...] | None
    image_size: Size
    score: float
    gmacs: float
    latency_ms: float | None
    latency_ms_low: float | None
    latency_ms_high: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None


@dataclass(frozen=True)
class PipelineSummary:
    """The closing table and what was written."""

    folder: RunFolder
    metric: Metric
    about: Mapping[str, str]
    batch: int
    count: int
    rows: tuple[PipelineRow, ...]
    seconds: Mapping[str, float]
    written: tuple[str, ...]
    environment: Mapping[str, object]
    clock: str | None
    """Why latencies are missing; None where all are steady."""
    without_clock: bool
    """True where the search left a latency budget out, for the clock was not steady."""

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit run --json`."""
        return {
            "schema_version": 2, **self.about, **self.environment, "batch": self.batch, "validation_images": self.count,
            "rows": [asdict(row) for row in self.rows], "clock": self.clock,
            "searched_without_clock": self.without_clock, "seconds": self.seconds,
            "written": self.written,
        }  # fmt: skip


@dataclass(frozen=True)
class _Contender:
    """A model at its setting, with what it scored."""

    label: str
    model: nn.Module
    config: SparsityConfig
    size: Size
    score: Score


def run_pipeline(session: Session) -> PipelineSummary:
    """pretrain, adapt, search, finetune, evaluate, profile, export, and the closing table.

    Raises what the steps raise; typing the command again goes on.
    """
    _check_settings(session)
    folder = session.folder("run")
    seconds: dict[str, float] = {}
    if not has_own_weights(session):
        seconds["pretrain"] = pretrain(session).seconds
    seconds["adapt"] = adapt(session).seconds
    if session.config.finetune.ratios is None:
        _search(session)
    seconds["finetune"] = finetune(session).seconds
    contenders = _contenders(session, seconds)
    tuned_at = [list(stage) for stage in contenders[-1].config.ratios]
    tuned = {"ratios": tuned_at, "weights_sha256": trained_weights(session, "finetune", "sparsevit run").sha256}
    steps: tuple[tuple[str, Callable[[Session], object], Mapping[str, object]], ...] = (
        ("evaluate", evaluate_checkpoint, tuned),
        ("profile", profile_model, {"ratios": tuned_at, "settings": profile_settings(session), "steady": True}),
        ("export", export_winner, {**tuned, "settings": export_settings(session)}),
    )
    for command, step, wanted in steps:
        found = session.earlier(command).done(*NEEDED.get(command, ()))
        if session.fresh or any(found.get(name) != value for name, value in wanted.items()):
            step(session)
    return _summary(session, folder, contenders, seconds)


def _search(session: Session) -> None:
    """Search; by multiply-adds alone where the clock cannot be trusted and there is a budget of them."""
    if is_searched(session):
        if (session.earlier("search").read_result() or {}).get("without_clock"):
            typed = session.earlier("search").typed
            session.reporter.warn(f"the winner was found without a clock; on a quiet machine, type: {typed}")
        return
    try:
        search(session)
    except UnsteadyError as error:
        if session.config.search.budget_macs is None:
            do = "Set search.budget_macs too, to go on without a clock, or type the command again on a quiet machine."
            raise UnsteadyError(error.what, error.got, do) from error
        session.reporter.warn(f"the clock cannot be trusted now ({error.got})")
        session.reporter.warn(f"run: the budget of multiply-adds decides alone: {session.config.search.budget_macs}")
        search(session.replaced(fresh=False), without_clock=True)


def _check_settings(session: Session) -> None:
    """What the later steps would refuse, before hours of training and not after. Raises ConfigError."""
    config = session.config
    check_packages(config.export.formats)
    data = session.data()
    model = session.model(data.categories)
    sections = {"pretrain": config.train, "adapt": config.adapt, "finetune": config.finetune}
    if has_own_weights(session):
        del sections["pretrain"]
    for command, section in sections.items():
        checked_plan(session, command, section, model, data)
    if config.finetune.ratios is None:
        budget_requests(session)
    else:
        SparsityConfig.from_ratios(config.finetune.ratios, model_depths(model))


def _contenders(session: Session, seconds: dict[str, float]) -> list[_Contender]:
    """The models of the table, each scored on the validation data."""
    adapted, tuned = (trained_weights(session, name, "sparsevit run") for name in ("adapt", "finetune"))
    dense = dense_weights(session, "run")
    data = session.data(tuned)
    classes = tuned.categories
    dense_model, adapted_model, tuned_model = (session.model(classes, w).eval() for w in (dense, adapted, tuned))
    winner = chosen_ratios(session, model_depths(tuned_model), "sparsevit run", adapted.sha256)
    space = session.space(adapted_model, session.config.search.max_ratio)

    found = [
        _score(session, data, "dense (timm)", dense_model, space.dense),
        _score(session, data, "dense, our kernels", session.model(classes, dense).eval(), space.dense, exact=False),
    ]
    folder = _rival_folder(session, winner)
    rival, size = _smaller_rival(session, folder, dense, classes, tuned_model, winner)
    scale = Scale(session.img_size, size, patch_size(rival)[0])
    seconds["rival"] = train_smaller_rival(session, folder, rival, dense, scale).seconds
    label = f"dense at {size_text(size)}, our kernels"
    found.append(_score(session, data, label, rival.eval(), space.dense, size, exact=False))
    for config in _uniform_rivals(session, space, adapted_model, winner):
        label = f"uniform {config.ratios[0][0]:g}"
        found.append(_score(session, data, label, session.model(classes, adapted).eval(), config))
    found.append(_score(session, data, "winner, before finetuning", adapted_model, winner))
    found.append(_score(session, data, "winner, finetuned", tuned_model, winner))
    return found


def _score(
    session: Session, data: Data, label: str, model: nn.Module, config: SparsityConfig,
    size: Size | None = None, *, exact: bool = True,
) -> _Contender:  # fmt: skip
    set_sparsity(model, config, exact=exact)
    images = data.val if size is None else Shrunk(data.val, Scale(session.img_size, size))
    batches = -(-len(data.val) // session.config.data.eval_batch_size)
    with session.reporter.progress("score", batches) as progress:
        found = score(session, model, images, progress=progress, before_batch=_check(session))
    return _Contender(label, model, config, size or session.img_size, found)


def _check(session: Session) -> Callable[[], None]:
    return partial(session.stop.check, "run", "every finished step is saved")


def _uniform_rivals(
    session: Session, space: SearchSpace, model: nn.Module, winner: SparsityConfig
) -> list[SparsityConfig]:
    """The two uniform ratios whose multiply-adds stand next to the winner's, above and below."""
    macs = macs_cost(image_workload(model, (session.config.model.in_chans, *session.img_size)))
    uniform = [space.uniform(tenths / 10) for tenths in range(1, space.max_tenths + 1)]
    above = [config for config in uniform if macs(config) >= macs(winner)]
    below = [config for config in uniform if macs(config) < macs(winner)]
    return above[-1:] + below[:1]


def _rival_folder(session: Session, winner: SparsityConfig) -> RunFolder:
    """The rival's folder; that of another winner is set aside: its size stands for another latency."""
    earlier = session.earlier("rival")
    stale = _rival_size(earlier, winner) is None and earlier.path.exists()
    return session.replaced(fresh=session.fresh or stale).folder("rival")


def _rival_size(folder: RunFolder, winner: SparsityConfig) -> Size | None:
    """The size chosen for this winner; None where none was, or where the file does not say."""
    path = folder.path / RIVAL_SIZE
    try:
        with understood(path):
            document = read_json(path)
            height, width = map(index, document["img_size"])
            return (height, width) if document["winner"] == str(winner) and min(height, width) > 0 else None
    except CheckpointError:
        return None


def _smaller_rival(
    session: Session,
    folder: RunFolder,
    weights: Weights | None,
    classes: Categories,
    tuned: nn.Module,
    winner: SparsityConfig,
) -> tuple[nn.Module, Size]:
    """The dense model at the lower resolution whose latency is nearest to the winner's."""
    set_sparsity(tuned, winner)
    sizes = rival_sizes(session.img_size, patch_size(tuned)[0], max(window_sizes(tuned)[0]))
    chosen = _rival_size(folder, winner)
    if chosen is not None:  # measured again, noise could pick another one than was trained
        model = session.model(classes, weights)
        set_image_size(model, chosen)
        return model.eval(), chosen
    models = {size: session.model(classes, weights).eval() for size in sorted(sizes)}
    for size, model in models.items():
        set_image_size(model, size)
        set_sparsity(model, 0.0, exact=False)  # as fast as the winner's dense parts
    calls: dict[str, Any] = {"winner": _call(session, tuned, session.img_size)}
    calls |= {size_text(size): _call(session, model, size) for size, model in models.items()}
    latencies = _measure(session, calls, rounds=10)
    costs, cost, unit = {name: latency.median_ms for name, latency in latencies.items()}, "latency", "ms"
    if not all(latency.stable for latency in latencies.values()):
        shapes = {"winner": (tuned, session.img_size), **{size_text(s): (m, s) for s, m in models.items()}}
        channels = session.config.model.in_chans
        costs = {name: count_macs(model, (channels, *s)).gmacs for name, (model, s) in shapes.items()}
        cost, unit = "multiply-adds, for latencies are not steady", "GMACs"
    size = min(models, key=lambda size: abs(costs[size_text(size)] - costs["winner"]))
    session.reporter.say(
        f"run: the dense rival of equal {cost}, takes {size_text(size)} pixels "
        f"({costs[size_text(size)]:.3g} {unit}, the winner {costs['winner']:.3g} {unit})"
    )
    write_json(folder.path / RIVAL_SIZE, {"img_size": size, "winner": str(winner), "of_equal": cost})
    return models[size], size


def rival_sizes(img_size: Size, patch: int, window: int) -> set[Size]:
    """Sizes from a third of `img_size` up, in steps that fill whole windows of the first stage: no padding slows them.

    `patch` in pixels, `window` in patches. For 192 pixels, patches of 4 and windows of 4: 64, 80 ... 176.
    """
    unit = patch * window if min(img_size) >= 2 * patch * window else patch
    count = min(img_size) // unit
    numbers = range(max(1, -(-count // 3)), count)
    thinned = numbers[:: max(1, -(-len(numbers) // MOST_RIVALS))]
    return {multiples(img_size, number / count, unit) for number in thinned} - {img_size}


def _call(session: Session, model: nn.Module, size: Size) -> Any:
    measured = placed(model.eval(), session.device, TORCH_DTYPE[session.config.search.precision])
    return partial(measured, _images(session, measured, size))


def _images(session: Session, model: nn.Module, size: Size) -> Tensor:
    section = session.config.search
    image = (session.config.model.in_chans, *size)
    return example_input(model, image, section.batch_size, device=session.device, dtype=TORCH_DTYPE[section.precision])


def _measure(
    session: Session, calls: Mapping[str, Any], rounds: int = 30, patience: Patience | None = None
) -> dict[str, Latency]:
    latencies = measure_interleaved(
        calls, device=session.device, seconds=session.config.search.seconds, rounds=rounds,
        seed=session.config.seed, strict=False, max_spread=session.config.clock.max_spread,
        retries=session.config.clock.retries, patience=patience or session.patience, before_round=_check(session),
    )  # fmt: skip
    for name, latency in latencies.items():
        if not latency.stable:
            session.reporter.warn(f"not steady: latency of {name}, {latency.unsteady}")
    return latencies


def _summary(
    session: Session, folder: RunFolder, contenders: list[_Contender], seconds: Mapping[str, float]
) -> PipelineSummary:
    """Measure all contenders in one interleaved run, dense first: it is the reference."""
    calls = {c.label: _call(session, c.model, c.size) for c in contenders}
    latencies = _measure(
        session, calls, patience=Patience(session.config.clock.wait, session.config.clock.max_neighbour)
    )
    reference = latencies[contenders[0].label]
    rows = []
    for contender in contenders:
        latency = latencies[contender.label]
        image = (session.config.model.in_chans, *contender.size)
        rows.append(
            PipelineRow(
                label=contender.label,
                ratios=get_sparsity(contender.model).ratios,
                image_size=contender.size,
                score=contender.score.value,
                gmacs=count_macs(contender.model, image).gmacs,
                **_facts(latency, reference),
            )
        )
    written = [
        session.earlier("search").path / "winner.yaml",
        session.earlier("search").path / "pareto.png",
        session.earlier("finetune").path / "checkpoints",
        session.earlier("profile").path / "profile.json",
        session.earlier("export").path / "manifest.json",
        folder.result,
    ]
    summary = PipelineSummary(
        folder, session.task.metric, session.task.about(), session.config.search.batch_size,
        contenders[0].score.count, tuple(rows), seconds,
        tuple(str(path) for path in written if path.exists() or path == folder.result), session.environment,
        next((latency.unsteady for latency in latencies.values() if latency.unsteady), None),
        bool((session.earlier("search").read_result() or {}).get("without_clock")),
    )  # fmt: skip
    folder.set_aside(["metrics.json"], session.reporter)
    folder.write_result(summary.document())
    return summary


def _facts(latency: Latency, reference: Latency) -> dict[str, float | None]:
    """The latency's columns; those that are not steady are None."""
    known = {"latency_ms": latency.stable, "speedup": latency.stable and reference.stable}
    return {name: value if known[name.removesuffix("_low").removesuffix("_high")] else None
            for name, value in latency.as_row().items()}  # fmt: skip
