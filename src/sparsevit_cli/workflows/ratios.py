"""Which ratios? Typed ones come first, then configured or finetuned ones, then the winner; here, for every command."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.runs import missing_result
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.winner import parse_ratios, parse_winner, read_winner

from .session import Session, Weights

Depths = tuple[int, ...]
"""Blocks per stage of the model that the ratios are for."""


def winner_ratios(session: Session, depths: Depths, needed_by: str) -> SparsityConfig:
    """The winner of the search. Raises CheckpointError that says what to type if there is none."""
    folder = session.earlier("search")
    path = folder.path / "winner.yaml"
    if not path.exists():
        raise missing_result(folder, needed_by)
    return SparsityConfig.from_ratios(read_winner(path)[0], depths)


def ratios_to_finetune(session: Session, depths: Depths, needed_by: str, adapted: str) -> SparsityConfig:
    """Those of the configuration, else the winner found with the `adapted` weights (a hash)."""
    given = session.config.finetune.ratios
    if given is not None:
        return SparsityConfig.from_ratios(given, depths)
    winner = winner_ratios(session, depths, needed_by)
    _check_weights(session, read_winner(session.earlier("search").path / "winner.yaml")[1], needed_by, adapted)
    return winner


def typed_to_finetune(session: Session, typed: str, depths: Depths, needed_by: str, adapted: str) -> SparsityConfig:
    """Those that were typed. Raises CheckpointError for a winner that was not found with the `adapted` weights."""
    config, about = parse_winner(typed, depths)
    if "checkpoint_sha256" in about:
        _check_weights(session, about, needed_by, adapted)
    return config


def _check_weights(session: Session, about: Mapping[str, object], needed_by: str, adapted: str) -> None:
    if about.get("checkpoint_sha256") != adapted:
        got = "the winner was found with other adapted weights"
        raise CheckpointError(needed_by, got, f"Type: {session.earlier('search').typed}")


def ratios_of_weights(session: Session, depths: Depths, typed: str | None, weights: Weights) -> SparsityConfig:
    """What was typed; else what finetune trained at, the winner for adapted weights, dense for all others."""
    if typed is not None:
        return parse_ratios(typed, depths)
    if weights.name == "finetune":  # whatever was searched since
        return _finetuned_ratios(session, depths)
    if weights.name != "adapt":
        session.reporter.say(
            f"weights of {weights.name}: no ratios are given, all windows are computed (--ratios 0.6 prunes)"
        )
        return SparsityConfig.dense(depths)
    if session.config.finetune.ratios is not None:
        return SparsityConfig.from_ratios(session.config.finetune.ratios, depths)
    return winner_ratios(session, depths, "sparsevit evaluate")


def _finetuned_ratios(session: Session, depths: Depths) -> SparsityConfig:
    """Those that finetune trained at. Raises CheckpointError."""
    path = session.earlier("finetune").path / "sparsity.json"
    with understood(path, f"Type: {session.earlier('finetune').typed}"):
        return SparsityConfig.from_ratios(read_json(path)["ratios"], depths)


def ratios_to_profile(session: Session, depths: Depths, typed: str | None, *, named: bool) -> SparsityConfig:
    """What was typed; else that of the section profile, what finetune trained at, what it is to train at, the winner.

    If another model is `named` on the command line, it is what was typed or the winner.
    """
    if typed is not None:
        return parse_ratios(typed, depths)
    if not named:
        section, asked = session.config.profile.ratios, session.config.finetune.ratios
        if section is not None:
            return SparsityConfig.from_ratios(section, depths)
        configured = None if asked is None else SparsityConfig.from_ratios(asked, depths)
        if session.earlier("finetune").read_result() is not None:  # as evaluate and export, whatever was searched since
            found = _finetuned_ratios(session, depths)
            if found != configured:
                _tell_of_finetune(session, found)
            return found
        if configured is not None:
            return configured
    try:
        return winner_ratios(session, depths, "sparsevit profile")
    except CheckpointError as error:
        raise CheckpointError(error.what, error.got, f"{error.do}, or give --ratios 0.6") from error


def _tell_of_finetune(session: Session, found: SparsityConfig) -> None:
    """Which ratios are profiled, with a warning if the winner of the search is another one."""
    told, path = f"profile: at {found}, which finetune trained at", session.earlier("search").path / "winner.yaml"
    with suppress(CheckpointError):  # no winner, or none that can be read
        if read_winner(path)[0] != found:
            session.reporter.warn(f"{told}; the winner of the search is another one: --ratios {path} profiles that")
            return
    session.reporter.say(told)
