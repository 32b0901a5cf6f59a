"""check-data: a data set read as its task will read it, before anything is trained on it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparsevit_cli.atomic import sha256_file, write_atomic
from sparsevit_cli.data.files import bytes_at
from sparsevit_cli.data.loader import checked_batches, num_batches
from sparsevit_cli.data.pictures import contact_sheet
from sparsevit_cli.data.source import Categories, Finding, Source, shorten
from sparsevit_cli.data.splits import fixed_subset
from sparsevit_cli.errors import DataError, SparseViTError
from sparsevit_cli.reporting import optional_output
from sparsevit_cli.runs import SCHEMA_VERSION, RunFolder
from sparsevit_cli.sizes import Size

from .session import Session

PICTURES = 16
EXAMPLES = 10
"""Names kept of what is wrong; all are counted."""
SHEET = "samples.png"


@dataclass(frozen=True)
class SplitCheck:
    """One split: how many samples it has, how many of them were tried, and how many of those cannot be read.

    `categories` are the examples of each category in the samples that were read, by name; empty if the task does not
    tell. Those of train are counted as the model gets them, augmented.
    """

    name: str
    samples: int
    tried: int
    unreadable: int
    image_size: Size
    categories: Mapping[str, int]


@dataclass(frozen=True)
class DataCheck:
    """What `check-data` found. `findings` do no harm to a training; `problems` end it, and there are none if `usable`.

    `pictures` are the names of the samples on the sheet, row by row; empty if there is no sheet.
    """

    folder: RunFolder
    about: Mapping[str, str]
    counted: str
    rows: tuple[tuple[str, str], ...]
    splits: tuple[SplitCheck, ...]
    findings: tuple[Finding, ...]
    problems: tuple[SparseViTError, ...]
    pictures: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """True if all commands can work with these data."""
        return not self.problems

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit check-data --json`, and of its metrics.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            **self.about,
            "usable": self.usable,
            "problems": [str(problem) for problem in self.problems],
            "counted": self.counted,
            "rows": dict(self.rows),
            "splits": {split.name: asdict(split) for split in self.splits},
            "findings": [asdict(finding) for finding in self.findings],
            "pictures": list(self.pictures),
        }

    def refuse_unusable(self) -> None:
        """Raise the first problem, the others told with it."""
        if self.problems:
            first, *others = self.problems
            first.others = tuple(map(str, others))
            raise first


def check_data(session: Session, *, samples: int | None = None) -> DataCheck:
    """Read the data of the experiment: every sample, or `samples` of each split.

    Raises DataError for data whose lists alone cannot be used. Samples that cannot be read are in the result.
    """
    data = session.data()
    folder = session.folder("check-data")
    stop = partial(session.stop.check, "check-data", "nothing of this check is saved")
    sources = {"train": data.train, "search": data.search, "val": data.val}
    splits, findings = [], list(data.findings)
    problems: list[SparseViTError] = []
    readers = {name: _Reader(session, name, source, data.categories, samples) for name, source in sources.items()}
    with session.reporter.progress("check-data", sum(reader.batches for reader in readers.values())) as progress:
        for reader in readers.values():
            for _ in reader.read(stop):
                progress.advance(unreadable=sum(len(each.bad) for each in readers.values()))
            splits.append(reader.result())
            findings += reader.findings()
            problems += reader.problems()
    findings += duplicates(sources, stop)
    folder.set_aside(["metrics.json", SHEET], session.reporter)
    pictures: tuple[str, ...] = ()
    with optional_output(session.reporter, SHEET):
        pictures = _write_sheet(session, data.train, folder.path / SHEET)
    rows = tuple(data.describe())
    found = DataCheck(
        folder, session.task.about(), session.task.counted, rows, tuple(splits), tuple(findings), tuple(problems),
        pictures,
    )  # fmt: skip
    prints = {"data_fingerprint": data.fingerprint, "val_fingerprint": data.val_fingerprint}
    folder.write_result({**found.document(), **prints, **session.environment}, files=[SHEET] if pictures else [])
    return found


class _Reader:
    """Reads one split, and remembers what it met."""

    def __init__(
        self, session: Session, name: str, source: Source, categories: Categories, samples: int | None
    ) -> None:
        self.session, self.name, self.source, self.categories = session, name, source, categories
        wanted = len(source) if samples is None else min(samples, len(source))
        self.chosen = fixed_subset(len(source), wanted, session.config.seed)
        self.batch_size = session.config.data.eval_batch_size
        self.batches = num_batches(wanted, self.batch_size, drop_last=False)
        self.bad: list[tuple[str, str]] = []
        self.not_finite: list[str] = []
        self._counts: torch.Tensor | None = None

    def read(self, stop: Any) -> Iterator[None]:
        """Read batch by batch; `stop` may raise."""
        section = self.session.config.data
        for batch, bad in checked_batches(
            self.source, self.batch_size, section.workers, self.chosen, section.max_wait_seconds, stop
        ):
            stop()
            self.bad += bad
            if batch is not None:
                finite = batch.is_finite().tolist()
                numbers = batch.indices.tolist()
                names = [self.source.sample_name(n) for n, is_fine in zip(numbers, finite, strict=True) if not is_fine]
                self.not_finite += names
                counts = self.session.task.category_counts(batch, self.categories)
                if counts is not None:
                    self._counts = counts if self._counts is None else self._counts + counts
            yield

    def result(self) -> SplitCheck:
        """What was met, once all is read."""
        counts = {} if self._counts is None else dict(zip(self.categories.names, self._counts.tolist(), strict=True))
        return SplitCheck(
            self.name, len(self.source), len(self.chosen), len(self.bad), self.source.image_size, counts
        )  # fmt: skip

    def findings(self) -> Iterator[Finding]:
        """Samples that cannot be read, and categories that no sample shows."""
        if self.bad:
            yield _finding(self.name, "samples that cannot be read", [f"{name} ({why})" for name, why in self.bad])
        if self.not_finite:
            yield _finding(self.name, "samples with values that are not finite", self.not_finite)
        absent = [name for name, count in self.result().categories.items() if not count]
        if absent and len(self.chosen) == len(self.source):
            yield _finding(self.name, "categories without an example", absent)

    def problems(self) -> Iterator[DataError]:
        """What other commands would refuse."""
        if not len(self.source):
            yield DataError(f"data: {self.name} split", "no samples", "Add some, or choose another split.")
        if self.not_finite:
            got = f"{len(self.not_finite)} hold values that are not finite: {shorten(self.not_finite)}"
            yield DataError(f"data: {self.name} samples", got, "Repair or remove them.")
        if not self.bad:
            return
        limit = self.source.bad_images if self.name == "train" else None
        if limit is None:
            got = f"{len(self.bad)} of {len(self.chosen)} cannot be read: {shorten(_told(self.bad))}"
            yield DataError(f"data: {self.name} samples", got, "Repair or remove them: none is left out.")
            return
        try:
            limit.note(self.bad)
        except DataError as error:
            yield error


def _told(bad: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name} ({reason})" for name, reason in bad]


def _finding(split: str, what: str, names: Sequence[str]) -> Finding:
    return Finding(split, what, len(names), tuple(names[:EXAMPLES]))


# -- duplicates -------------------------------------------------------------------------------------------------


def duplicates(sources: Mapping[str, Source], stop: Any = lambda: None) -> list[Finding]:
    """Samples of one split whose file has the same bytes as one of an earlier split. Splits without files have none.

    Only files whose size occurs in another split are read. `stop` may raise, between two files.
    """
    sizes = {name: _sizes(source) for name, source in sources.items()}
    digests: dict[str, dict[str, int]] = {}
    for name, found in sizes.items():
        others = {size for other, theirs in sizes.items() if other != name for size in theirs.values()}
        digests[name] = {}
        for index, size in found.items():
            if size in others:
                stop()
                digests[name].setdefault(_digest(sources[name], index), index)
    findings = []
    for one, other in combinations(sources, 2):
        shared = [digest for digest in digests[other] if digest in digests[one]]
        pairs = [
            f"{sources[other].sample_name(digests[other][digest])} is "
            f"{sources[one].sample_name(digests[one][digest])}"
            for digest in shared
        ]  # fmt: skip
        if pairs:
            findings.append(_finding(other, f"files with the same bytes as one of {one}", pairs))
    return findings


def _sizes(source: Source) -> dict[int, int]:
    """Bytes of each sample's file, by its number; those that are empty or cannot be opened are told by the reading."""
    found = {}
    for index in range(len(source)):
        path = source.sample_file(index)
        size = 0 if path is None else bytes_at(path)
        if size > 0:
            found[index] = size
    return found


def _digest(source: Source, index: int) -> str:
    path = source.sample_file(index)
    assert path is not None
    try:
        return sha256_file(path)
    except OSError:  # it can be listed and not be read: the reading told of it
        return f"unreadable {path}"


# -- the sheet --------------------------------------------------------------------------------------------------


def _write_sheet(session: Session, source: Source, path: Path) -> tuple[str, ...]:
    """Write the sheet of `PICTURES` samples, drawn by the seed; the names of what is on it."""
    pictures: list[Image.Image] = []
    names: list[str] = []
    for index in fixed_subset(len(source), 2 * PICTURES, session.config.seed):
        if len(pictures) == PICTURES:
            break
        try:
            pictures.append(session.task.picture(source, index))
        except DataError:  # told by the reading
            continue
        names.append(source.sample_name(index))
    if not pictures:
        session.reporter.warn(f"{SHEET} is left out: none of the samples tried can be read")
        return ()
    file = io.BytesIO()
    contact_sheet(pictures).save(file, "PNG")
    write_atomic(path, file.getvalue())
    return tuple(names)
