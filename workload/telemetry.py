"""What the GPU's own sensors say, through NVML (package nvidia-ml-py, optional)."""

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

MAX_AGE_S = 1.0  # the sensors themselves change no faster, and asking costs the training thread a millisecond


class Telemetry:
    """The sensors of one device. Nothing here raises: a run does not end because a thermometer did."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sensors = _find_sensors(device) if device.type == "cuda" else {}
        self._read_s = -MAX_AGE_S - 1.0  # on a clock that may begin at 0
        self._seen: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """memory_bytes (in use on the card, by everybody), temperature_c, power_w; what cannot be read is left out.

        Empty on a CPU and without nvidia-ml-py. At most MAX_AGE_S old.
        """
        now = self._clock()
        if self._sensors and not 0 <= now - self._read_s < MAX_AGE_S:
            self._read_s = now
            self._seen = {}
            for name, sensor in self._sensors.items():
                try:
                    self._seen[name] = float(sensor())
                except (
                    Exception
                ):  # NVML's errors are of many kinds; laptops have no power sensor, a lost GPU has none
                    continue
        return dict(self._seen)


def _find_sensors(device: torch.device) -> dict[str, Callable[[], float]]:
    """What to call for each value; {} when NVML is not there or does not know the device."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # By UUID: CUDA numbers the cards by CUDA_VISIBLE_DEVICES and by speed, NVML by their places on the bus.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception:
        return {}
    return {
        "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # it says milliwatts
    }
