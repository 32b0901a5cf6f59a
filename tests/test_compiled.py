"""Where compiled code comes from: nobody else's library is run, a damaged one is found, any compiler may be there."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.cli import _library_talk
from sparsevit_cli.kernels import cache, choice, fallback
from sparsevit_cli.kernels.cpp import compiled, native
from sparsevit_cli.kernels.portable import PORTABLE
from sparsevit_cli.reporting import SilentReporter

CPU = torch.device("cpu")
STRANGER = 12345

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not compiled.may_be_measured() or shutil.which(os.environ.get("CXX") or "g++") is None,
    reason="needs Linux on x86-64, and a C++ compiler",
)

CANARY = """
#include <cstdlib>
#include <cstdio>
__attribute__((constructor)) static void sing() { if (const char* at = std::getenv("CANARY")) std::fopen(at, "w"); }
extern "C" { void block_workspace() {} }
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Ours as compiled, and one that leaves a file when it is loaded."""
    folder = tmp_path_factory.mktemp("libraries")
    native.load()
    ours = cache.read_library(cache.cache_folder() / f"windows-{native.version()}.so")
    assert ours is not None, "the tests need a cache folder of their user's own"
    (folder / "canary.cpp").write_text(CANARY)
    command = ["g++", "-shared", "-fPIC", str(folder / "canary.cpp"), "-o", str(folder / "canary.so")]
    subprocess.run(command, check=True)
    (folder / "ours.so").write_bytes(ours)
    return {"ours": ours, "canary": (folder / "canary.so").read_bytes()}


class Place:
    """A home with a cache folder, and a compiler that is quick and counts."""

    def __init__(self, folder: Path, libraries: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.libraries, self._patch = folder, libraries, monkeypatch
        self.cache = folder / "cache" / "sparsevit-cli"
        self.canary, self.count = folder / "canary", folder / "count"
        (folder / "ours.so").write_bytes(libraries["ours"])
        (folder / "canary.so").write_bytes(libraries["canary"])
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("CANARY", str(self.canary))
        self.compile_by(f"cp {folder}/ours.so $out")

    def compile_by(self, writing: str, knowing: str = "echo '#define __x86_64__ 1'") -> None:
        """$CXX is a script that does `writing` for a library at $out, and `knowing` where it is asked what it knows."""
        path = self.home / "compiler"
        shown = 'while [ "$1" != -o ]; do shift; done; out=$2'
        path.write_text(
            f"#!/bin/sh\ncase $* in *-dM*) {knowing};; *) {shown}; echo >> {self.count}; {writing};; esac\n",
            encoding="latin-1",
        )
        path.chmod(0o700)
        self._patch.setenv("CXX", str(path))

    @property
    def library(self) -> Path:
        return self.cache / f"windows-{compiled.version()}.so"

    @property
    def compilations(self) -> int:
        return len(self.count.read_bytes()) if self.count.exists() else 0

    def plant(self, path: Path | None = None) -> Path:
        """The canary where our library is looked for, with a hash that is right."""
        path = path or self.library
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cache.sealed(path.name, self.libraries["canary"]))
        return path


MEMORIES: tuple[Any, ...] = (choice._engine, fallback.warn_once, compiled.load, compiled._key)


@pytest.fixture
def place(tmp_path: Path, libraries: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Nothing is known of engines before the test, nor after it of what it pretended."""
    for memory in MEMORIES:
        memory.cache_clear()
    yield Place(tmp_path, libraries, monkeypatch)
    for memory in MEMORIES:
        memory.cache_clear()


@pytest.fixture(params=["given away", "pretended"])
def give_away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Another user's from now on: truly, where the tests run as root, and as far as we look in any case."""
    if request.param == "given away":
        if os.geteuid():
            pytest.skip("only root can give files away")
        return lambda path: os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    real, given_away = cache._refuse_strangers, set()

    def refuse(path: Path, state: os.stat_result, *, shared: bool) -> None:
        of_stranger = os.stat_result((*state[:4], STRANGER, *state[5:]))
        real(path, of_stranger if path in given_away else state, shared=shared)

    monkeypatch.setattr(cache, "_refuse_strangers", refuse)
    return given_away.add


def runs_native() -> bool:
    return choice.running("native", CPU).startswith("native ")


def foreign_folder(place: Place, give_away: Callable[[Path], None]) -> None:
    give_away(place.plant())
    give_away(place.cache)


def foreign_file(place: Place, give_away: Callable[[Path], None]) -> None:
    give_away(place.plant())


def foreign_parent(place: Place, give_away: Callable[[Path], None]) -> None:
    place.plant()
    give_away(place.cache.parent)


def foreign_home(place: Place, give_away: Callable[[Path], None]) -> None:
    """As with sudo, which may keep HOME."""
    os.environ.pop("XDG_CACHE_HOME")
    place.plant(place.home / ".cache" / "sparsevit-cli" / place.library.name)
    give_away(place.home)


def foreign_link(place: Place, give_away: Callable[[Path], None]) -> None:
    place.plant(place.home / "theirs" / place.library.name)
    place.cache.parent.mkdir()
    place.cache.symlink_to(place.home / "theirs")
    give_away(place.cache)


def own_link_to_a_foreign_folder(place: Place, give_away: Callable[[Path], None]) -> None:
    give_away(place.plant(place.home / "theirs" / "x" / place.library.name).parent)
    place.cache.parent.mkdir()
    place.cache.symlink_to("../theirs/x")


def foreign_link_on_the_way(place: Place, give_away: Callable[[Path], None]) -> None:
    """Ours leads to theirs, and theirs to a folder of ours: today."""
    place.plant(place.home / "real" / "sparsevit-cli" / place.library.name)
    (place.home / "theirs").symlink_to("real")
    (place.home / "cache").symlink_to("theirs")
    give_away(place.home / "theirs")


def linked_file(place: Place, give_away: Callable[[Path], None]) -> None:
    give_away(place.plant(place.home / "theirs.so"))
    place.cache.mkdir(parents=True)
    place.library.symlink_to(place.home / "theirs.so")


ARRANGEMENTS = [
    foreign_folder, foreign_file, foreign_parent, foreign_home, foreign_link, own_link_to_a_foreign_folder,
    foreign_link_on_the_way, linked_file,
]  # fmt: skip


@pytest.mark.parametrize("arrange", ARRANGEMENTS, ids=lambda arrange: arrange.__name__)
def test_nothing_of_another_user_is_run(
    arrange: Callable[[Place, Callable[[Path], None]], None], place: Place, give_away: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])  # put back after an arrangement without it
    arrange(place, give_away)
    assert runs_native()
    assert not place.canary.exists()
    assert place.compilations == 1


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o707, 0o770])
@pytest.mark.parametrize("which", ["cache", "parent", "file"])
def test_nothing_is_run_that_others_could_have_written(
    mode: int, which: str, place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "_is_own_group", lambda path, number: False)
    path = place.plant()
    {"cache": place.cache, "parent": place.cache.parent, "file": path}[which].chmod(mode)
    if which == "parent" and mode & stat.S_ISVTX:
        assert cache.cache_folder() == place.cache, "in a sticky folder nobody can exchange what is ours"
        return
    assert runs_native()
    assert not place.canary.exists()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (which != "file")
    assert all("can be written by other users" in text and "XDG_CACHE_HOME" in text for text in warnings)


@pytest.mark.parametrize("value", ["", ".", "cache", "../cache"])
def test_a_relative_cache_folder_is_ignored(value: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.home / "x").mkdir()
    monkeypatch.chdir(place.home / ("x" if value.startswith("..") else "."))
    place.plant(Path(value).absolute() / "sparsevit-cli" / place.library.name)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert runs_native()
    assert not place.canary.exists()
    assert cache.cache_folder() == place.home / ".cache" / "sparsevit-cli"


def test_a_group_of_ones_own_is_no_stranger(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A umask of 002 with a group for each user, as Fedora has it."""
    place.cache.mkdir(parents=True)
    place.cache.parent.chmod(0o775)
    user = type("User", (), {"pw_gid": place.cache.stat().st_gid, "pw_name": "me"})
    group = type("Group", (), {"gr_name": "me", "gr_mem": []})
    monkeypatch.setattr("pwd.getpwuid", lambda number: user)
    monkeypatch.setattr("grp.getgrgid", lambda number: group)
    assert cache.cache_folder() == place.cache
    group.gr_mem = ["me", "you"]
    with pytest.raises(PermissionError, match="written by other users"):
        cache.cache_folder()


def test_root_that_a_container_does_not_know_may_own_what_stands_on_the_way(
    place: Place, monkeypatch: pytest.MonkeyPatch, give_away: Callable[[Path], None]
) -> None:
    give_away(place.plant().parents[1])
    with pytest.raises(PermissionError, match="belongs to user"):
        cache.cache_folder()
    monkeypatch.setattr(cache, "_disguises_of_root", lambda: (STRANGER,))
    assert cache.cache_folder() == place.cache
    give_away(place.library)
    assert cache.read_library(place.library) is None
    give_away(place.cache)
    with pytest.raises(PermissionError, match="belongs to user"):
        cache.cache_folder()


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_compiled_once_and_kept(umask: int, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = os.umask(umask)
    try:
        compiled.load()
    finally:
        os.umask(before)
    assert "compiling" in caplog.text
    assert stat.S_IMODE(place.library.stat().st_mode) == 0o600
    compiled.load.cache_clear()
    compiled.load()
    assert place.compilations == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_one_compiles_at_a_time(place: Place) -> None:
    place.compile_by(f"sleep 0.2; cp {place.home}/ours.so $out")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: compiled.load.__wrapped__(), range(3)))
    assert [library.lanes() for library in found] == [native.load().lanes()] * 3
    assert place.compilations == 1


def test_what_a_killed_compilation_left_is_deleted(place: Place) -> None:
    (place.cache / ".tmp-1").mkdir(parents=True)
    (place.cache / ".tmp-1" / "library.so").touch()
    (place.cache / ".tmp-2").touch()
    compiled.load()
    assert {path.name for path in place.cache.iterdir()} == {"lock", place.library.name}


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    path.unlink()
    folder = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(folder)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def another_engines(path: Path) -> None:
    """Sound, but of another CPU: its instructions would be unknown to this one."""
    path.write_bytes(cache.sealed("windows-0123.so", path.read_bytes()[:-32]))


def huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "fifo": a_fifo, "socket": a_socket, "link": a_link, "link to nothing": a_link_to_nothing,
    "link to itself": a_link_to_itself, "another engine's": another_engines, "huge": huge,
    "empty": changed(lambda raw: b""), "a byte": changed(lambda raw: raw[:1]), "cut": changed(lambda raw: raw[:-4096]),
    "halved": changed(lambda raw: raw[: len(raw) // 2]), "zeroed": changed(lambda raw: bytes(len(raw))),
    "a page zeroed": changed(lambda raw: raw[:8192] + bytes(4096) + raw[12288:]),
    "code zeroed, length kept": changed(lambda raw: raw[:4096] + bytes(len(raw) - 4096)),
    "a bit flipped": changed(lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:]),
    "without a hash": changed(lambda raw: raw[:-32]), "text": changed(lambda raw: b"not a library"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_library_is_compiled_again(damage: Callable[[Path], None], place: Place) -> None:
    compiled.load()
    damage(place.library)
    compiled.load.cache_clear()
    assert runs_native()
    assert place.compilations == 2
    compiled.load.cache_clear()
    choice._engine.cache_clear()
    assert runs_native()
    assert place.compilations == 2, "what was compiled again is kept"


@given(st.binary(max_size=64), st.data())
def test_any_change_is_found(tmp_path_factory: pytest.TempPathFactory, library: bytes, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "any.so"
    cache.keep_library(path, library)
    assert cache.read_library(path) == library
    raw = path.read_bytes()
    position = data.draw(st.integers(0, len(raw) - 1))
    path.write_bytes(raw[:position] + data.draw(st.binary(max_size=3).filter(lambda new: new != raw[position:][:1]))
                     + raw[position + 1 :])  # fmt: skip
    assert path.read_bytes() == raw or cache.read_library(path) is None


def test_a_library_that_is_cut_while_it_runs_does_no_harm(place: Place) -> None:
    library = compiled.load()
    os.truncate(place.library, 0)
    call = (ctypes.c_int64 * 64)()
    assert library.projection_workspace(ctypes.byref(call), 0) >= 0
    assert library.block_workspace(ctypes.byref(call), 0) >= 0


def test_a_folder_in_its_place_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.library.mkdir(parents=True)
    assert runs_native()
    assert "cannot be kept" in caplog.text


def test_a_home_that_cannot_be_written_is_no_obstacle(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (place.home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.home / "file"))
    assert runs_native()
    assert "each process compiles the C++ kernels anew" in caplog.text
    monkeypatch.setattr(Path, "home", lambda: Path(""))  # no home at all
    monkeypatch.delenv("XDG_CACHE_HOME")
    compiled.load.cache_clear()
    assert compiled.load().lanes()


def test_without_any_folder_of_its_own_the_portable_ones_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place.cache.mkdir(parents=True)
    place.home.chmod(0o777)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(place.home))
    assert choice.running("auto", CPU) == "portable"
    assert "can be written by other users" in caplog.text
    assert place.compilations == 0


def test_memory_that_may_not_be_a_file_is_no_obstacle(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert runs_native()


COMPILERS = {
    "fails": ("exit 1", None, "did not compile"),
    "says odd bytes": ("printf 'f\\374r \\200\\377' >&2; exit 1", None, "did not compile.*f.*r"),
    "says nothing of use": ("exit 0", None, "wrote no library"),
    "writes nothing": (": > $out", None, "wrote no library"),
    "writes a pipe": ("mkfifo $out", None, "wrote no library"),
    "writes text": ("echo text > $out", None, "cannot be used.*(header|short)"),
    "writes zeros": ("head -c 100000 /dev/zero > $out", None, "cannot be used"),
    "writes half": ("head -c 30000 $ours > $out", None, "cannot be used"),
    "writes zeros into ours": ("cp $ours $out; dd if=/dev/zero of=$out bs=4096 seek=1 count=40 conv=notrunc 2>&1", None,
                               "cannot be used"),
    "writes another library": ("cp $canary $out", None, "cannot be used.*undefined symbol"),
    "hangs": ("sleep 100", None, "ended after"),
    "leaves a child that hangs": ("sleep 100 & exit 0", None, "ended after"),
    "is killed": ("kill -9 $$", None, "did not compile.*SIGKILL"),
    "does not know itself": ("", "exit 1", "does not run"),
    "knows odd bytes and fails": ("", "printf '\\377'; printf '\\377\\n' >&2; exit 1", "does not run"),
    "thinks for ever": ("", "sleep 100", "does not run.*ended after"),
}  # fmt: skip


@pytest.mark.parametrize(("writing", "knowing", "reason"), COMPILERS.values(), ids=COMPILERS.keys())
def test_with_an_odd_compiler_the_portable_ones_run(
    writing: str, knowing: str | None, reason: str, place: Place, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(compiled, "SECONDS", 0.3 if "sleep" in writing else 300)
    monkeypatch.setattr(compiled, "SECONDS_TO_ANSWER", 0.3 if knowing and "sleep" in knowing else 300)
    writing = writing.replace("$ours", f"{place.home}/ours.so").replace("$canary", f"{place.home}/canary.so")
    place.compile_by(writing or ":", knowing or ":")
    assert_portable_with_one_warning(f"{place.home}/compiler.*{reason}", caplog)
    assert not [path for path in place.cache.glob("*") if path.name != "lock"], "nothing of it is kept"


@pytest.mark.parametrize(("content", "reason"), [(None, "no C\\+\\+ compiler"), (b"\x7fELF\x00\xff", "does not run")])
def test_without_a_compiler_the_portable_ones_run(
    content: bytes | None, reason: str, place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", "")
    else:
        (place.home / "compiler").write_bytes(content)
    assert_portable_with_one_warning(reason, caplog)


def assert_portable_with_one_warning(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    for kernels in ("auto", "native", "auto"):
        assert choice.chosen(kernels, CPU) is PORTABLE
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(f"{reason}.*the portable kernels run instead", warning), warning
    assert "\n" not in warning
    assert choice.running("auto", CPU) == "portable"


def test_a_compiler_that_talks_odd_bytes_and_works_is_taken(place: Place) -> None:
    place.compile_by(f"printf '\\377\\200'; printf '\\374' >&2; cp {place.home}/ours.so $out", "printf '\\377\\200'")
    assert runs_native()


def test_other_structures_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    native.check_structures()

    class Longer(ctypes.Structure):
        _fields_ = (*native._Scoring._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(native, "_Scoring", Longer)
    with pytest.raises(RuntimeError, match="other structures"):
        native.check_structures()


def test_nothing_is_compiled_for_cpus_that_were_not_measured(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.platform, "machine", lambda: "aarch64")
    assert choice.chosen("auto", CPU) is PORTABLE
    assert choice.explained("auto", CPU) == f"portable ({compiled.UNMEASURED})"
    assert place.compilations == 0


@pytest.mark.parametrize(("flags", "is_left_alone"), [("fpu avx avx512_2", True), ("fpu avx2 fma", False)])
def test_nothing_is_compiled_for_cpus_without_avx2(
    flags: str, is_left_alone: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "CPUINFO", place.home / "cpuinfo")
    assert compiled.may_be_measured(), "where Linux tells nothing, the compiler does"
    compiled.CPUINFO.write_text(f"processor\t: 0\nvmx flags\t: avx2\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert (choice.chosen("auto", CPU) is PORTABLE) == is_left_alone
    assert place.compilations == (not is_left_alone)
    if is_left_alone:
        assert choice.chosen("native", CPU).name == "native", "asked for by name, they are compiled all the same"


def test_another_c_library_is_another_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled.version()
    compiled._key.cache_clear()
    monkeypatch.setattr(compiled.platform, "libc_ver", lambda: ("glibc", "2.0"))
    assert compiled.version() != before


def test_what_torch_and_triton_compile_is_private(
    place: Place, monkeypatch: pytest.MonkeyPatch, give_away: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "theirs")  # what a user names is left alone
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cache.keep_compilers_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place.cache / "torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == "theirs"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    give_away(place.cache / "torchinductor")
    cache.keep_compilers_private()
    assert place.home not in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parents
    assert stat.S_IMODE(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).stat().st_mode) == 0o700


def test_a_command_says_that_it_compiles_and_what_it_cannot_do(place: Place) -> None:
    said: list[str] = []

    class Reporter(SilentReporter):
        def say(self, message: str) -> None:
            said.append(message)

    reporter: Any = Reporter()
    with _library_talk(reporter, verbose=False):
        assert runs_native()
        place.compile_by("exit 1")
        for memory in MEMORIES:
            memory.cache_clear()
        place.library.unlink()
        assert not runs_native()
        assert choice.chosen("native", CPU) is PORTABLE
    assert [message.partition(" (")[0] for message in said] == ["compiling the C++ kernels for this CPU"] * 2
    assert len(reporter.warnings) == 1
    assert logging.getLogger("sparsevit_cli").propagate
