"""The machine under test: its name, and its rates of matrix multiplication and of copying."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The first name that occurs in the device's name counts: "H100 PCIe" comes before "H100".
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) matrix products by the data sheets, 10¹² operations a second."""
_PACKAGES = ("torch", "timm", "transformers", "numpy", "ray", "mlflow", "optuna")
"""The packages whose versions a benchmark states."""


@dataclass(frozen=True)
class Machine:
    """The rates of a machine that limit a step on it."""

    name: str
    versions: str
    matmul_tflops: float
    """Measured: a large bfloat16 (or float32) matrix product, two operations for a multiply-add."""
    copy_gb_s: float
    """Measured: copying 256 MiB, bytes read plus bytes written."""
    peak_tflops: float
    """From the data sheet, for bfloat16; for a device that we do not know, ``matmul_tflops``."""

    @property
    def convention(self) -> str:
        """The note that explains how the shares of a step are counted."""
        peak = f"the measured {self.matmul_tflops:.2f}"
        if self.peak_tflops != self.matmul_tflops:
            peak = f"the data sheet's {self.peak_tflops:.0f}"
        return (
            f"MFU: useful operations (two for each multiply-add of the paper's formula; training "
            f"counts three times the forward pass, reconstruction branch included) over {peak} "
            f"TFLOP/s. Measured here: matrix product {self.matmul_tflops:.2f} TFLOP/s, "
            f"copy {self.copy_gb_s:.1f} GB/s."
        )


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def this_machine(device: torch.device, precision: str = "bf16") -> Machine:
    """Name the machine and measure its rates; this takes seconds."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        size = 8192
    else:
        name = _processor()
        size = 2048
    # Outputs are allocated before the timing, so that no allocation is timed.
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty(size, size, device=device, dtype=dtype)
    seconds = _median_seconds(lambda: torch.mm(left, right, out=product), device)
    # A product of n × n matrices has n³ multiply-adds, of two operations each.
    matmul_tflops = 2 * size**3 / seconds / 1e12
    # 2²⁶ float32 values are 256 MiB; a copy reads and writes each of them.
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device)
    copy_gb_s = 2 * source.nbytes / seconds / 1e9
    peak_tflops = _peak_tflops(name, matmul_tflops)
    return Machine(name, _versions(), matmul_tflops, copy_gb_s, peak_tflops)


def _peak_tflops(device_name: str, measured: float) -> float:
    """Return a device's rate by its data sheet; for one that is not listed, the measured rate."""
    for known, tflops in _PEAK_TFLOPS.items():
        if known in device_name:
            return tflops
    return measured


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of ten repetitions, after two that warm up."""
    times: list[float] = []
    for _ in range(12):
        # A device works asynchronously: without waiting, only the launch would be timed.
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _processor() -> str:
    """Return the name of the CPU and its number of cores."""
    name = platform.processor() or platform.machine()
    # Linux: Python gives the architecture alone, this file has the model.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
                break
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> str:
    """Return the versions of Python and of the installed ones of ``_PACKAGES``."""
    parts = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)
