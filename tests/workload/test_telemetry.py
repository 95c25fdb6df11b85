"""The GPU's sensors. NVML is a stand-in here: there is no GPU to ask; what it returns has NVML's units and names."""

import sys
from types import SimpleNamespace

import pytest
import torch

from workload.telemetry import Telemetry


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Nvml:
    """A mock of the module pynvml for one card, counting how often it is asked."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def nvmlInit(self) -> None:
        self._answer("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._answer("handle")
        assert uuid == "GPU-0a1b"
        return "card"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self._answer("memory")
        return SimpleNamespace(total=24 << 30, free=20 << 30, used=4 << 30)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._answer("temperature")
        assert (handle, sensor) == ("card", self.NVML_TEMPERATURE_GPU)
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._answer("power")
        return 287_500  # milliwatts

    def _answer(self, what: str) -> None:
        self.asked.append(what)
        if what in self.broken:
            raise RuntimeError(what)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    mock = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", mock)
    properties = SimpleNamespace(uuid="0a1b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return mock


def test_the_sensors_are_read_in_plain_units_once_a_second(nvml: Nvml) -> None:
    clock = Clock()
    telemetry = Telemetry(torch.device("cuda", 0), clock)
    seen = {"memory_bytes": float(4 << 30), "temperature_c": 61.0, "power_w": 287.5}
    for now in (0.0, 0.5, 0.99):
        clock.now = now
        assert telemetry.read() == seen
    assert nvml.asked == ["init", "handle", "memory", "temperature", "power"]
    clock.now = 1.01
    assert telemetry.read() == seen
    assert nvml.asked.count("power") == 2


def test_a_sensor_that_is_not_there_leaves_the_others(nvml: Nvml) -> None:
    nvml.broken = {"power"}
    assert Telemetry(torch.device("cuda", 0), Clock()).read().keys() == {"memory_bytes", "temperature_c"}


@pytest.mark.parametrize("broken", ["init", "handle"])
def test_without_a_driver_there_is_nothing_to_read_and_no_error(nvml: Nvml, broken: str) -> None:
    nvml.broken = {broken}
    assert Telemetry(torch.device("cuda", 0), Clock()).read() == {}


def test_a_cpu_and_a_missing_package_have_no_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Telemetry(torch.device("cpu")).read() == {}
    assert Telemetry(torch.device("cuda", 0)).read() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_card_says_what_it_is_doing() -> None:
    pytest.importorskip("pynvml")
    seen = Telemetry(torch.device("cuda", 0)).read()
    assert seen["memory_bytes"] > 0
    assert 0 < seen["temperature_c"] < 120
