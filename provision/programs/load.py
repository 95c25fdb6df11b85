"""Every card, or the processor, at full load for a while: `load.py SECONDS`. Its heat, its power, its speed, its sums.

A product of the same matrices must come out the same each time; a card that gets slower tells why by itself.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

# NVML's reasons for a lower clock: https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
# The power limit (0x4) is not among them: under full load that is the usual one.
SLOWED = {
    0x08: "the hardware slows it down",
    0x20: "too hot, by the driver",
    0x40: "too hot, by the hardware",
    0x80: "the power supply brakes it",
}
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second until driver 535
FIELDS = "index,temperature.gpu,power.draw,clocks.sm,pcie.link.width.current,pcie.link.width.max"
SLOWER = 0.8  # of its first speed: less at the end is too little
TELL_S = 5.0


@dataclass
class Seen:
    """Of one card while it was at work; in the order of time. None where it has no such sensor."""

    temperature_c: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    reasons: int = 0
    narrow: str = ""  # its place on the bus gives fewer lanes than it has
    tflops: list[float] = field(default_factory=list)
    wrong: float = 0.0  # of the largest element
    failed: str = ""  # what ended its work before the time


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def take_sample(seen: dict[int, Seen], line: str) -> None:
    """A line of nvidia-smi with FIELDS and one of REASONS."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 7 or not words[0].isdigit() or int(words[0]) not in seen:
        return
    card = seen[int(words[0])]
    for value, into in ((words[1], card.temperature_c), (words[2], card.power_w)):
        if (known := number(value)) is not None:
            into.append(known)
    if words[4] != words[5] and number(words[4]) and number(words[5]):
        card.narrow = f"{words[4]} of {words[5]} PCIe lanes"
    if words[6].startswith("0x"):
        card.reasons |= int(words[6], 16)


def watch_cards(seen: dict[int, Seen], ended: threading.Event) -> None:
    reasons = list(REASONS)
    while not ended.wait(1):
        argv = ["nvidia-smi", f"--query-gpu={FIELDS},{reasons[0]}", "--format=csv,noheader,nounits"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode and len(reasons) > 1:
            reasons.pop(0)
        for line in done.stdout.splitlines():
            take_sample(seen, line)


def watch_processor(seen: dict[int, Seen], ended: threading.Event) -> None:
    """Sensors whose driver names a processor's: Intel's, AMD's, and what firmware offers on others."""
    places = [
        path
        for path in Path("/sys/class/hwmon").glob("*/temp*_input")
        if read(path.parent / "name") in ("coretemp", "k10temp", "zenpower", "cpu_thermal")
    ]
    throttled = list(Path("/sys/devices/system/cpu").glob("cpu*/thermal_throttle/package_throttle_count"))
    before = [read(path) for path in throttled]
    while not ended.wait(1):
        values = [value / 1000 for path in places if (value := number(read(path))) is not None]
        if values:
            seen[0].temperature_c.append(max(values))
        if before != [read(path) for path in throttled]:
            seen[0].reasons |= 0x40


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class Worker:
    """One device, and a product that is made again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        card = device.type == "cuda"
        self.size = 8192 if card else 768
        kind = torch.float32
        if card:
            kind = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        generator = torch.Generator().manual_seed(0)
        shape = (self.size, self.size)
        self.left, self.right = (torch.randn(shape, generator=generator).to(device, kind) for _ in range(2))
        self.first = self.left @ self.right
        self.largest = self.first.float().abs().max().item()
        self.out = torch.empty_like(self.first)
        self.count = 0

    def work(self, until: float) -> tuple[float, float]:
        """Products until then: (TFLOP/s, how far the last is from the first, as a part of the largest element)."""
        began = time.perf_counter()
        self.count = 0
        while True:
            for _ in range(8):
                torch.matmul(self.left, self.right, out=self.out)
            self.count += 8
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if time.perf_counter() >= until:
                break
        rate = 2 * self.size**3 * self.count / (time.perf_counter() - began) / 1e12
        wrong = (self.out.float() - self.first.float()).abs().max().item() / self.largest
        return rate, wrong if wrong == wrong else float("inf")  # not a number is as wrong as can be


def press(index: int, device: torch.device, seen: Seen, ends: float) -> None:
    try:
        worker = Worker(device)
        worker.work(0)  # the first takes the time that libraries take to start
        while True:  # once at least: on a busy computer the libraries may have taken all of the time
            rate, wrong = worker.work(min(ends, time.perf_counter() + 1))
            seen.tflops.append(rate)
            seen.wrong = max(seen.wrong, wrong)
            if time.perf_counter() >= ends:
                return
    except Exception as error:  # whatever it is: a card that leaves the bus after a minute is not a good one
        seen.failed = (str(error).splitlines() or [type(error).__name__])[0]


def judge(name: str, card: Seen, *, alone: bool) -> tuple[str, bool]:
    """What was seen of one device, and whether it is well. `alone`: a slower end is its own fault, and nobody else's."""
    part = max(1, len(card.tflops) // 4)
    first, last = statistics.median(card.tflops[:part]), statistics.median(card.tflops[-part:])
    said = f"{name}: {last:.3g} TFLOP/s"
    if card.temperature_c:
        said += f", at most {max(card.temperature_c):.0f} °C"
    if card.power_w:
        said += f" and {max(card.power_w):.0f} W"
    wrong = [text for bit, text in SLOWED.items() if card.reasons & bit]
    if card.narrow:
        wrong.append(f"it has only {card.narrow}")
    if alone and last < SLOWER * first:
        wrong.append(f"its speed fell from {first:.3g}")
    if card.failed:
        wrong.append(f"it broke off: {card.failed}")
    if card.wrong > 1e-2:
        wrong.append(f"the same product came out differently, by {card.wrong:.2g} of its largest element")
    return said + "".join(f"; {text}" for text in wrong), not wrong


def show(seen: dict[int, Seen], left_s: float) -> str:
    parts = []
    for card in seen.values():
        heat = f"{card.temperature_c[-1]:.0f} °C " if card.temperature_c else ""
        power = f"{card.power_w[-1]:.0f} W " if card.power_w else ""
        speed = f"{card.tflops[-1]:.3g} TFLOP/s" if card.tflops else "beginning"
        parts.append(f"{heat}{power}{speed}")
    return f"load: {left_s:.0f} s left; {', '.join(parts)}"


def main(seconds: float) -> int:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(cards)] or [torch.device("cpu")]
    seen = {index: Seen() for index in range(len(devices))}
    ended = threading.Event()
    watcher = threading.Thread(target=watch_cards if cards else watch_processor, args=(seen, ended))
    ends = time.perf_counter() + seconds
    workers = [
        threading.Thread(target=press, args=(index, device, seen[index], ends))
        for index, device in enumerate(devices)
    ]
    for thread in (watcher, *workers):
        thread.start()
    told = 0.0
    while any(worker.is_alive() for worker in workers):
        if time.perf_counter() - told >= TELL_S:
            told = time.perf_counter()
            tell(show(seen, max(0.0, ends - told)))
        time.sleep(0.1)
    ended.set()
    watcher.join()
    good = True
    for index, card in seen.items():
        if not card.tflops:
            print(f"{devices[index]}: it broke off: {card.failed}")
            good = False
            continue
        name = torch.cuda.get_device_name(index) if cards else "processor"
        said, well = judge(name, card, alone=bool(cards))  # a processor has other work, too
        good = good and well
        print(said)
        of = f"card{index}_" if cards else ""
        print(f"figure {of}load_tflops {card.tflops[-1]:.4g}")
        for name, values in (("temperature_c", card.temperature_c), ("power_w", card.power_w)):
            if values:
                print(f"figure {of}{name} {max(values):.1f}")
    return 0 if good else 1


def tell(text: str) -> None:
    if "TELL_FD" in os.environ:
        os.write(int(os.environ["TELL_FD"]), f"{text}\n".encode())


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts; read when CUDA begins
    sys.exit(main(float(sys.argv[1])))
