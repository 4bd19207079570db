"""The machine that is measured: what it is, and how fast it multiplies and copies."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) matrix products, from the makers' data sheets; the first name that occurs
counts."""
_PACKAGES = ("torch", "timm", "transformers", "numpy", "ray", "mlflow", "optuna")


@dataclass(frozen=True)
class Machine:
    """What limits a step here."""

    name: str
    versions: str
    matmul_tflops: float
    """Measured: a large bfloat16 (or float32) matrix product, two operations a multiply-add."""
    copy_gb_s: float
    """Measured: copying 256 MiB, bytes read and bytes written."""
    peak_tflops: float
    """The data sheet's for bfloat16; where we know none: ``matmul_tflops``."""

    @property
    def convention(self) -> str:
        """How the shares of a step are counted."""
        known = self.peak_tflops != self.matmul_tflops
        peak = (
            f"the data sheet's {self.peak_tflops:.0f}"
            if known
            else f"the measured {self.matmul_tflops:.2f}"
        )
        return (
            "MFU: useful operations (two for each multiply-add of the paper's formula; training "
            "three times the forward "
            f"pass, reconstruction branch included) over {peak} TFLOP/s. Measured here: matrix "
            "product "
            f"{self.matmul_tflops:.2f} TFLOP/s, copy {self.copy_gb_s:.1f} GB/s."
        )


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def this_machine(device: torch.device, precision: str = "bf16") -> Machine:
    """Name and measure the machine, seconds."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    c = torch.empty(size, size, device=device, dtype=kind)
    rate = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=c), device) / 1e12
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device) / 1e9
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    peak = next((each for known, each in _PEAK_TFLOPS.items() if known in name), rate)
    return Machine(name, _versions(), rate, copied, peak)


def _seconds(work: object, device: torch.device) -> float:
    assert callable(work)
    times: list[float] = []
    for _ in range(12):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> str:
    parts = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)
