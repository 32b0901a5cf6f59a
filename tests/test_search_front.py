"""Several budgets from one ledger, and the sensitivity of block pairs, on a tiny adapted model."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparsevit_cli.cli import app
from sparsevit_cli.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    MeasurementError,
    NonFiniteError,
    NothingToScoreError,
    UnsteadyError,
)
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.search import LatencyRecord, LatencyTable
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import set_sparsity
from sparsevit_cli.tasks.classification.task import Classification
from sparsevit_cli.winner import read_winner
from sparsevit_cli.workflows import search as search_module
from sparsevit_cli.workflows.front import search_front
from sparsevit_cli.workflows.scores import GROUP, Images, Scores
from sparsevit_cli.workflows.search import SearchSummary, opened_search, search
from sparsevit_cli.workflows.sensitivity import measure_sensitivity
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import adapt, finetune, pretrain
from tiny import tiny_config, train_in, write_tiny

CHILD = Path(__file__).with_name("search_child.py")


def session_in(runs: Path, **sections: object) -> Session:
    return Session(tiny_config(output=str(runs), **sections), SilentReporter())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("adapted"), session_in, pretrain, adapt)


@pytest.fixture
def runs(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the adapted folder; its model scores at once, by its ratios."""

    def metric(config: SparsityConfig) -> float:
        return 90 - sum((3 + stage) * ratio**2 for stage, ratios in enumerate(config.ratios) for ratio in ratios)

    def score(self: Scores, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        return {config: metric(config) for config in configs}

    monkeypatch.setattr(Scores, "score", score)
    return shutil.copytree(adapted, tmp_path / "runs")


def test_several_budgets_leave_a_winner_each_and_pay_once(runs: Path) -> None:
    session = session_in(runs)
    summary = search_front(session, budgets="80%, 60%,0.0001G")
    folder = summary.folder.path
    found = [(summary.winner, summary.feasibility[0].limit, folder / "winner.yaml")]
    found += [(other.finalist, other.budget.limit, other.path) for other in summary.others]
    assert [path.name for *_, path in found] == ["winner.yaml", "winner-60percent.yaml", "winner-0.0001G.yaml"]
    for finalist, limit, path in found:
        config, about = read_winner(path)
        assert config == finalist.config
        assert finalist.gmacs * 1e9 <= limit
        assert about["budget"] == {"macs": limit}
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["ratios"] for row in rows}) == len(rows)
    assert len(rows) == summary.evaluated + sum(other.evaluated for other in summary.others)
    assert not (folder / "informed.json").exists()
    session.locks.close()
    session = session_in(runs)
    again = search(session)  # of the configuration's 70 %
    assert again.evaluated < len(rows)
    session.locks.close()
    assert not list(folder.glob("winner-*"))  # with the earlier results


def front_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "pareto.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sparser_winner_that_scores_higher_wins_the_wider_budget_too(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping helps this model; the search for 80 % looks at what keeps most within it, and so does not see that."""
    monkeypatch.setattr(
        Scores, "score", lambda _, configs, images: {config: sum(map(sum, config.ratios)) for config in configs}
    )
    summary = search_front(session_in(runs), budgets="80%,60%")
    other = summary.others[0]
    assert summary.winner == other.finalist == summary.finalists[-1]
    assert summary.winner.within_budget
    for name in ("winner.yaml", "winner-60percent.yaml"):
        assert read_winner(summary.folder.path / name)[0] == summary.winner.config
    assert read_winner(summary.folder.path / "winner.yaml")[1]["budget"]["macs"] == summary.feasibility[0].limit
    row = front_in(summary.folder.path)[-1]
    assert row["winner_of"] == f"{summary.feasibility[0].budget}; {other.budget}"


@pytest.mark.parametrize("skipping_helps", [False, True])
def test_dense_within_budget_is_told_only_if_it_wins(
    runs: Path, monkeypatch: pytest.MonkeyPatch, skipping_helps: bool
) -> None:
    if skipping_helps:
        by_ratios = lambda _, configs, images: {config: sum(map(sum, config.ratios)) for config in configs}  # noqa: E731
        monkeypatch.setattr(Scores, "score", by_ratios)
    summary = search_front(session_in(runs), budgets="100%,80%")
    assert summary.winner.config.is_dense is not skipping_helps
    assert summary.note.endswith("" if skipping_helps else "nothing to prune")
    assert bool(summary.note) is not skipping_helps


def test_the_folder_of_a_search_may_be_a_link_to_a_local_disk(runs: Path, tmp_path: Path) -> None:
    """The ledger needs one; workers on other machines need the folder of adapt alone."""
    local, link = tmp_path / "local", runs / "tiny" / "search"
    local.mkdir()
    link.symlink_to(local)
    session = session_in(runs)
    winner = search(session).winner
    session.locks.close()
    assert (local / "ledger.sqlite").exists()
    assert read_winner(link / "winner.yaml")[0] == winner.config
    session = session_in(runs).replaced(fresh=True)
    assert search(session).winner.config == winner.config
    session.locks.close()
    assert not link.is_symlink()
    assert (runs / "tiny" / "search.old-001" / "winner.yaml").samefile(local / "winner.yaml")


def test_pareto_takes_shares_of_dense_and_leaves_out_what_cannot_be_reached(runs: Path) -> None:
    session = session_in(runs, search={"max_ratio": 0.5})
    summary = search_front(session)
    told = " ".join(session.reporter.warnings)  # type: ignore[attr-defined]
    names = [other.path.name for other in summary.others]
    assert names[:3] == ["winner-90percent.yaml", "winner-80percent.yaml", "winner-70percent.yaml"]
    assert "winner-50percent.yaml" not in names
    assert "the budget 50% is left out" in told
    assert all(other.path.is_file() for other in summary.others)
    scores = [other.finalist.score for other in summary.others]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_budgets_that_make_no_front_are_refused_before_anything_is_evaluated(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scores, "score", pytest.fail)
    for budgets, error in (("30ms,3G", ConfigError), ("50 apples", ConfigError), ("80%,1%", BudgetError)):
        session = session_in(runs)
        with pytest.raises(error):
            search_front(session, budgets=budgets)
        session.locks.close()


@pytest.mark.parametrize("left", [1, 3])
def test_a_killed_front_goes_on_with_what_it_was_informed_by(
    runs: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second budget is informed by the first one; after a kill in it, by the same and not by its own results."""

    def told(path: Path) -> list[list[str]]:
        folder = path / "tiny" / "search"
        names = ("winner.yaml", "winner-60percent.yaml")
        rows = [row[:1] + row[1:2] for row in csv.reader((folder / "history.csv").open())]
        return [*rows, *([str(read_winner(folder / name)[0])] for name in names)]

    straight = runs.with_name("straight")
    shutil.copytree(runs, straight)
    session = session_in(straight)
    summary = search_front(session, budgets="80%,60%")
    session.locks.close()
    score, done = Scores.score, 0
    stopped_after = summary.evaluated + summary.others[0].evaluated - left
    assert stopped_after > 0

    def stopping(self: Scores, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        nonlocal done
        if done >= stopped_after:
            raise KeyboardInterrupt
        done += len(configs)
        return score(self, configs, images)

    monkeypatch.setattr(Scores, "score", stopping)
    session = session_in(runs)
    with pytest.raises(KeyboardInterrupt):
        search_front(session, budgets="80%,60%")
    session.locks.close()
    monkeypatch.setattr(Scores, "score", score)
    session = session_in(runs)
    search_front(session, budgets="80%,60%")
    session.locks.close()
    assert told(runs) == told(straight)


class Clock:
    """In the place of the latencies of a search: a table of which `clock` may say something else."""

    elsewhere = measured_in = ""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        pair = tuple(10.0 - tenths for tenths in range(space.max_tenths + 1))
        pairs = tuple((pair,) * count for count in space.pairs)
        self.made = LatencyTable(1.0, pairs, (0.0,) * len(pairs), {})
        self.dense_ms = self.made.predict(space.dense)

    def clock(self, config: SparsityConfig) -> float:
        return self.made.predict(config)

    def measure(self, configs: Sequence[SparsityConfig]) -> dict[SparsityConfig, LatencyRecord]:
        return {config: LatencyRecord(*[self.clock(config)] * 3) for config in configs}

    def table(self, known: object) -> LatencyTable:
        return self.made


def timed(runs: Path, monkeypatch: pytest.MonkeyPatch, clock: type[Clock]) -> Session:
    monkeypatch.setattr(search_module, "latencies_of_search", lambda session, model, space, *_: clock(space))
    return session_in(runs, search={"budget_macs": None, "budget_latency": "80%"})


def test_a_latency_that_is_out_of_reach_is_refused_before_the_table_is_measured(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "table", pytest.fail)
    with pytest.raises(BudgetError, match=r"0\.1 ms is below"):
        search_front(timed(runs, monkeypatch, Clock), budgets="80%,0.1ms")


@pytest.mark.parametrize("budgets", ["80%,60%,70%", None])
def test_a_budget_that_the_clock_does_not_confirm_costs_no_other_its_winner(
    runs: Path, budgets: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stalling(Clock):
        """What the table takes for faster than 65 % of dense is not; the sparsest of all is."""

        def clock(self, config: SparsityConfig) -> float:
            ms = super().clock(config)
            is_slow = self.space.sparsest != config and ms < 0.65 * self.dense_ms
            return 0.66 * self.dense_ms if is_slow else ms

    session = timed(runs, monkeypatch, Stalling)
    with nullcontext() if budgets is None else pytest.raises(MeasurementError, match="the fastest of"):
        search_front(session, budgets=budgets)
    assert "the budget 60% is left out" in " ".join(session.reporter.warnings)  # type: ignore[attr-defined]
    folder = session.earlier("search").path
    assert (folder / "winner.yaml").is_file()
    assert (folder / "winner-70percent.yaml").is_file()
    assert not (folder / "winner-60percent.yaml").exists()
    assert any(row["winner_of"] for row in front_in(folder))


def test_winners_found_before_the_clock_became_unsteady_are_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed(Clock):
        """Somebody else needs the machine as soon as something faster than 70 % of dense is measured."""

        def clock(self, config: SparsityConfig) -> float:
            ms = super().clock(config)
            if config not in (self.space.middle, self.space.sparsest) and ms < 0.7 * self.dense_ms:
                raise UnsteadyError("search", "something else runs", "Wait.")
            return ms

    session = timed(runs, monkeypatch, Disturbed)
    with pytest.raises(UnsteadyError):
        search_front(session, budgets="80%,75%,60%,50%")
    folder = session.earlier("search").path
    assert [path.name for path in folder.glob("winner*")] == ["winner.yaml", "winner-75percent.yaml"]
    assert (folder / "informed.json").exists()  # the search is not done


def stopped_at_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is stopped before anything is scored."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Scores, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(session)


def test_a_search_after_another_adaptation_is_not_informed_by_the_earlier_one(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger and informed.json stay when adapt is done anew, and tell nothing of the new weights."""
    session = session_in(runs)
    measure_sensitivity(session)
    session.locks.close()
    stopped_at_once(session, monkeypatch)
    session.locks.close()
    assert (session.earlier("search").path / "informed.json").exists()
    session = Session(tiny_config(output=str(runs), adapt={"lr": 2e-4}), SilentReporter(), fresh=True)
    adapt(session)
    session.locks.close()
    session = session_in(runs, adapt={"lr": 2e-4})
    summary = search(session)
    assert summary.asked == summary.evaluated > 0
    session.locks.close()


def test_informed_by_a_ledger_that_was_removed_is_informed_by_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(runs)
    measure_sensitivity(session)
    stopped_at_once(session, monkeypatch)
    for path in session.earlier("search").path.glob("ledger.sqlite*"):
        path.unlink()
    summary = search(session)
    assert summary.asked == summary.evaluated > 0
    session.locks.close()


def test_every_winner_can_be_finetuned(runs: Path, tmp_path: Path) -> None:
    session = session_in(runs)
    summary = search_front(session, budgets="80%,60%")
    session.locks.close()
    first, second = str(summary.folder.path / "winner.yaml"), str(summary.others[0].path)

    def finetuned(ratios: str | None, *, fresh: bool = False) -> tuple[bool, Path]:
        session = Session(tiny_config(output=str(runs)), SilentReporter(), fresh=fresh)
        try:
            done = finetune(session, ratios=ratios)
        finally:
            session.locks.close()
        return done.already_done, done.folder.path

    def ratios_in(path: Path) -> object:
        return json.loads((path / "sparsity.json").read_text())["ratios"]

    _, folder = finetuned(second)
    assert SparsityConfig.from_ratios(ratios_in(folder)) == summary.others[0].finalist.config
    assert finetuned(second) == (True, folder)
    with pytest.raises(ConfigError, match=r"finetune\.ratios.*--fresh"):
        finetuned(first)
    finetuned(first, fresh=True)
    assert SparsityConfig.from_ratios(ratios_in(folder)) == summary.winner.config
    kept = folder.with_name("finetune.old-001")
    assert SparsityConfig.from_ratios(ratios_in(kept)) == summary.others[0].finalist.config
    foreign = tmp_path / "foreign.yaml"
    text = Path(second).read_text()
    foreign.write_text(text.replace(read_winner(Path(second))[1]["checkpoint_sha256"], "f" * 64))
    with pytest.raises(CheckpointError, match="other adapted weights"):
        finetuned(str(foreign))


# -- the race ---------------------------------------------------------------------------------------------------

RACE = {
    "strategy": "evolution", "population": 8, "parents": 4, "generations": 1, "max_evaluations": 16,
    "samples": 20, "racers": 8, "finalists": 2, "budget_macs": "80%",
}  # fmt: skip


class ImageByImage:
    """In the place of `Scores.score`: whether a candidate is right about an image is drawn, worse ones less often."""

    def __init__(self, left: int = 10**9) -> None:
        self.left, self.images = left, 0
        self.asked: list[tuple[SparsityConfig, str]] = []

    def is_right(self, config: SparsityConfig, image: int) -> bool:
        loss = sum((1 + stage) * tenths**2 for stage, genes in enumerate(config.tenths) for tenths in genes)
        return Random(f"{image}").random() > 0.002 * loss + 0.1 * Random(f"{image} {config}").random()

    def mean(self, config: SparsityConfig, images: Sequence[int]) -> float:
        return 100 * sum(self.is_right(config, image) for image in images) / len(images)

    def score(self, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        if self.left < len(configs):
            raise KeyboardInterrupt
        self.left -= len(configs)
        self.images += len(configs) * images.count
        self.asked += [(config, images.name) for config in configs]
        numbers = range(250) if images.numbers is None else images.numbers
        assert len(set(numbers)) == images.count
        return {config: self.mean(config, numbers) for config in configs}


def raced(runs: Path, monkeypatch: pytest.MonkeyPatch, fake: ImageByImage, **section: object) -> SearchSummary:
    monkeypatch.setattr(Scores, "score", lambda _, configs, images: fake.score(configs, images))
    session = session_in(runs, search=RACE | section)
    try:
        return search(session)
    finally:
        session.locks.close()


def test_a_race_forwards_few_images_and_finalists_get_the_score_of_all(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ImageByImage()
    summary = raced(runs, monkeypatch, fake)
    assert summary.asked == 16
    assert [finalist.score for finalist in summary.finalists] == [
        pytest.approx(fake.mean(finalist.config, range(250)), abs=1e-9) for finalist in summary.finalists
    ]
    raced_most = 8 * 20 + 4 * 2 * 20 + 2 * 2 * 20  # laps 1, 2 and 3, and 4 and 5
    assert summary.images == fake.images <= 16 * 20 + raced_most + 2 * 250
    assert summary.images < 16 * 20 + 8 * 250
    record = json.loads((summary.folder.path / "metrics.json").read_text())
    assert record["images"] == summary.images
    row = front_in(summary.folder.path)[-1]
    assert (row["ratios"], float(row["top1"])) == (str(summary.winner.config), summary.winner.score)
    assert float(row["first_images"]) == summary.winner.proxy_score
    assert row["winner_of"] == str(summary.feasibility[0].budget)
    again = raced(runs, monkeypatch, ImageByImage(left=0))  # all of it is in the ledger
    assert (again.winner.config, again.images) == (summary.winner.config, summary.images)
    assert again.forwarded == 0


@pytest.mark.parametrize("strategy", ["surrogate", "evolution"])
def test_the_winner_of_every_budget_is_on_the_front(runs: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images name another best one than all of them do: the front is of those that were scored on all."""
    fake = ImageByImage()
    monkeypatch.setattr(Scores, "score", lambda _, configs, images: fake.score(configs, images))
    summary = search_front(session_in(runs, search=RACE | {"strategy": strategy}), budgets="80%,60%")
    rows = {row["ratios"]: row for row in front_in(summary.folder.path)}
    winners = [(summary.feasibility[0].budget, summary.winner)]
    winners += [(other.budget, other.finalist) for other in summary.others]
    for budget, winner in winners:
        row = rows[str(winner.config)]
        assert float(row["top1"]) == winner.score == pytest.approx(fake.mean(winner.config, range(250)), abs=1e-9)
        assert str(budget) in row["winner_of"].split("; ")
    assert list(rows)[-1] == str(summary.winner.config)


def test_a_metric_that_is_no_mean_over_images_is_computed_on_all_of_them(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "metric", replace(Classification.metric, mean_over_images=False))
    fake = ImageByImage()
    summary = raced(runs, monkeypatch, fake)
    assert all(finalist.score == fake.mean(finalist.config, range(250)) for finalist in summary.finalists)
    assert [config for config, name in fake.asked if name == "all"] == sorted(f.config for f in summary.finalists)


class EmptyLaps(ImageByImage):
    """An AP of images most of which hold no object: those of `empty` none at all."""

    def __init__(self, *empty: str) -> None:
        super().__init__()
        self.empty = empty

    def score(self, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        if images.name.endswith(self.empty):
            raise NothingToScoreError("data", f"none of {images.count} images holds an object", "Evaluate on more.")
        return super().score(configs, images)


def test_a_lap_without_anything_to_score_decides_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "metric", replace(Classification.metric, mean_over_images=False))
    fake = EmptyLaps("lap 1")
    summary = raced(runs, monkeypatch, fake)
    assert all(finalist.score == fake.mean(finalist.config, range(250)) for finalist in summary.finalists)
    assert any(name.endswith("lap 2") for _, name in fake.asked)


def test_first_images_without_anything_to_score_name_the_setting(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "metric", replace(Classification.metric, mean_over_images=False))
    with pytest.raises(NothingToScoreError, match=r"holds an object\. Raise search\.samples"):
        raced(runs, monkeypatch, EmptyLaps("of seed 0"))


@pytest.mark.parametrize("left", [14, 20, 30])
def test_a_search_killed_in_its_race_names_the_same_winner(
    runs: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = shutil.copytree(runs, runs.with_name("straight"))
    whole = raced(straight, monkeypatch, ImageByImage())
    before = ImageByImage(left)
    with pytest.raises(KeyboardInterrupt):
        raced(runs, monkeypatch, before)
    after = ImageByImage()
    resumed = raced(runs, monkeypatch, after)
    assert [(f.config, f.score) for f in resumed.finalists] == [(f.config, f.score) for f in whole.finalists]
    assert before.images > 0
    assert before.images + after.images == whole.images == resumed.images


def test_a_candidate_whose_numbers_are_not_finite_is_named_and_costs_no_other(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"strategy": "evolution", "population": GROUP, "parents": 2, "generations": 1}
    session = session_in(shutil.copytree(adapted, tmp_path / "runs"), search=section)
    grouped = list[SparsityConfig]()

    def overflowing(model: nn.Module, config: SparsityConfig) -> None:
        if config not in grouped:
            grouped.append(config)
        set_sparsity(model, config)
        with torch.no_grad():
            model.get_classifier().bias.fill_(math.inf if config in grouped[1:2] else 0.0)  # type: ignore[operator]

    monkeypatch.setattr("sparsevit_cli.evaluation.set_sparsity", overflowing)
    with pytest.raises(NonFiniteError) as caught:
        search(session)
    session.locks.close()
    assert caught.value.what == f"candidate {grouped[1]}"
    assert "over 32 images is nan" in caught.value.got
    session = session_in(tmp_path / "runs", search=section)
    with opened_search(session) as work:
        assert set(work.ledger.known()) == {*grouped} - {grouped[1]}
        assert len(work.ledger.known()) == GROUP - 1
    session.locks.close()


# -- the leader killed ------------------------------------------------------------------------------------------


def told_of(runs: Path) -> list[str]:
    """Candidates with their metrics, the front, and the winners."""
    folder = runs / "tiny" / "search"
    rows = [row for name in ("history.csv", "pareto.csv") for row in csv.DictReader((folder / name).open())]
    winners = [f"{path.name} {read_winner(path)[0]}" for path in sorted(folder.glob("winner*"))]
    return [*(f"{row['ratios']} {row.get('top1')}" for row in rows), *winners]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_search_whose_leader_is_killed_again_and_again_is_the_straight_one(
    kills: int, adapted: Path, tmp_path: Path
) -> None:
    """SIGKILL before and after scores, commits and files: of the search itself, its race, and further budgets."""
    straight, killed = (shutil.copytree(adapted, tmp_path / name) for name in ("straight", "killed"))
    child = subprocess.Popen(
        [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None

    def play(runs: Path, kill_at: int) -> tuple[int, int]:
        print(json.dumps({"runs": str(runs), "kill_at": kill_at}), file=child.stdin, flush=True)
        code, events = json.loads(child.stdout.readline())  # type: ignore[union-attr]
        return code, events

    code, events = play(straight, 0)
    assert code == 0
    step = events // (kills + 1)
    assert step > 1
    assert [play(killed, step + number % 4 - 1)[0] for number in range(kills)] == [-signal.SIGKILL] * kills
    assert play(killed, 0)[0] == 0
    child.stdin.close()
    assert child.wait(60) == 0
    assert told_of(killed) == told_of(straight)
    committed = set[str]()
    for line in (killed / "log").read_text().splitlines():
        word, _, key = line.partition(" ")
        assert key not in committed, "paid twice"
        if word == "committed":
            committed.add(key)


def test_sensitivity_scores_every_pair_once_and_informs_a_search(runs: Path) -> None:
    session = session_in(runs)
    summary = measure_sensitivity(session)
    assert summary.slots == ("stage 0, pair 0", "stage 1, pair 0")
    assert summary.ratios == (0.0, 0.2, 0.4, 0.6, 0.8)
    assert summary.evaluated == 9  # dense is one for both
    assert summary.scores[0][0] == summary.scores[1][0]
    assert all(sorted(gmacs, reverse=True) == list(gmacs) for gmacs in summary.gmacs)
    with (summary.folder.path / "sensitivity.csv").open() as file:
        assert [float(row["ratio"]) for row in csv.DictReader(file)] == [0.0, 0.2, 0.4, 0.6, 0.8] * 2
    assert (summary.folder.path / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    session.locks.close()
    session = session_in(runs)
    assert measure_sensitivity(session).evaluated == 0
    session.locks.close()


@pytest.mark.parametrize(
    "flags",
    [["--pareto", "--sensitivity"], ["--budgets", "80%", "--pareto"], ["--budgets", "80%", "--budget-macs", "1G"]],
)
def test_flags_that_exclude_each_other_are_refused(flags: list[str]) -> None:
    done = CliRunner().invoke(app, ["search", *flags], prog_name="sparsevit")
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr


def test_budgets_of_two_kinds_are_refused_by_a_dry_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["search", "--config", str(write_tiny(tmp_path)), "--dry-run", "--budgets"]
    done = CliRunner().invoke(app, [*command, "30ms,3G"], prog_name="sparsevit")
    assert done.exit_code == 2
    assert "holds both latencies and multiply-adds" in done.stderr
    done = CliRunner().invoke(app, [*command, "80%,60%"], prog_name="sparsevit")
    assert done.exit_code == 0
    assert "budgets: 80%, 60%" in done.stdout
