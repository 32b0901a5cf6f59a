"""Devices by name, and what is said about them."""

from __future__ import annotations

import json

import pytest
import torch

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.device import (
    available_devices,
    describe_device,
    describe_versions,
    device_identity,
    resolve_device,
)


def test_auto_takes_what_is_there() -> None:
    assert str(resolve_device("auto")) == (available_devices()[1:] or ("cpu",))[0]
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:-1", "", "meta"])
def test_absent_devices_are_refused_with_those_that_are_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"this machine has cpu.*Choose one of them, or auto") as caught:
        resolve_device(name)
    assert caught.value.exit_code == 2


def test_identity_is_what_does_not_change_by_itself() -> None:
    cpu = torch.device("cpu")
    assert device_identity(cpu) == device_identity(cpu)
    assert device_identity(cpu).items() <= describe_device("cpu").items()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert device_identity(cpu)["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_descriptions_are_plain_json_with_a_name_and_versions() -> None:
    description = json.loads(json.dumps({"device": describe_device("cpu"), "versions": describe_versions()}))
    assert description["device"]["name"]
    assert description["device"]["cores"] >= 1
    assert description["versions"]["torch"] == torch.__version__
    assert {"python", "platform", "timm", "sparsevit-cli", "fvcore"} <= set(description["versions"])
