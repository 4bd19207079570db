"""Checks what works on this machine: each check does the thing itself, and reports the outcome."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from mar.errors import Failure
from orchestration.config import LaunchConfig
from orchestration.tracking.provenance import package_versions


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    works: bool
    message: str


def examine(launch: LaunchConfig) -> list[Finding]:
    """Run every check; one that fails does not stop the next."""
    checks: dict[str, Callable[[], str]] = {
        "python": platform.python_version,
        "packages": _packages,
        "devices": _devices,
        "decord": lambda: _decode("decord"),
        "torchcodec": lambda: _decode("torchcodec"),
        "pyav": lambda: _decode("pyav"),
        "ray": _ray,
        "tracking store": lambda: _tracking(launch),
        "disk": lambda: _disk(launch),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, True, check()))
        # Libraries raise errors of any type; each is a finding, and the next checks must run.
        except Exception as error:
            message = str(error).strip() or repr(error)
            findings.append(Finding(name, False, message.splitlines()[0]))
    return findings


def _packages() -> str:
    versions = package_versions()
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _devices() -> str:
    # Not at the top: it takes seconds, and other checks must run even if it cannot be loaded.
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or f"no accelerator; {os.cpu_count()} CPU cores"


def _decode(decoder: str) -> str:
    """Write a clip, and read it back with one decoder."""
    from mar.data.decoders import fastest_decoder, probe_decoder

    fault = probe_decoder(decoder)
    # Nothing is wrong without it: the default decoders do not need it.
    if fault and decoder == "torchcodec":
        return f"an optional extra, not here ({fault})"
    if fault:
        raise Failure(fault)
    if decoder == fastest_decoder():
        return "a test clip decoded correctly; data.decoder: auto uses this one"
    return "a test clip decoded correctly"


def _ray() -> str:
    from orchestration.backends.ray_session import describe_cluster

    return describe_cluster()


def _tracking(launch: LaunchConfig) -> str:
    from orchestration.tracking.store import Store

    return f"{launch.shown_tracking}: {len(Store(launch).trials())} trials"


def _disk(launch: LaunchConfig) -> str:
    # The store itself may not exist yet: its disk is that of its nearest existing parent.
    store = launch.store.resolve()
    folder = next(parent for parent in (store, *store.parents) if parent.exists())
    free_gib = shutil.disk_usage(folder).free / 2**30
    # A single checkpoint of a ViT-B has 1.1 GiB.
    if free_gib < 1:
        raise Failure(f"{free_gib:.2f} GiB free at {folder}: too little for checkpoints")
    return f"{free_gib:.0f} GiB free at {folder}"
