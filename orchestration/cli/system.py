"""The verbs for this machine and its store: ui, recover, doctor."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mar.errors import UserError
from orchestration.cli.options import DEFAULT_STORE, AsJson, StoreFolder, TrackingUri
from orchestration.secrets import without_secrets

if TYPE_CHECKING:
    from orchestration.tracking.store import Store


def _print_links(address: str, store: Store) -> None:
    """Print each study's page on a server."""
    for study, page in store.pages().items():
        print(f"  {study:<34} {address}{page}")
    # The server is another process that prints next: what is buffered here would come after it.
    sys.stdout.flush()


def ui(
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow on the embedded store, for this machine only (loopback)."""
    import subprocess

    from orchestration.config import LaunchConfig
    from orchestration.tracking.embedded import serve
    from orchestration.tracking.store import Store

    launch = LaunchConfig(store=store, tracking_uri=tracking_uri)
    if tracking_uri is None and not (store / "mlflow.db").is_file():
        raise UserError(
            f"--store {store}: no tracking store there yet; `mar run quickstart` makes one"
        )
    # Another address is a database, which a server is started for.
    if tracking_uri and tracking_uri.startswith("http"):
        shown = without_secrets(tracking_uri)
        print(f"the tracking store is a server: open {shown}")
        _print_links(shown, Store(launch))
        return
    address = f"http://127.0.0.1:{port}"
    print(f"MLflow at {address} (stop with Ctrl-C)")
    _print_links(address, Store(launch))
    # With the interpreter that runs this: MLflow is installed for it.
    command, environment = serve(launch, port)
    sys.exit(subprocess.call([sys.executable, "-m", *command], env=environment))  # noqa: S603


def recover(store: StoreFolder = DEFAULT_STORE, tracking_uri: TrackingUri = None) -> None:
    """Write runs into MLflow for finished results whose database was lost.

    Exit code 1 if a result is damaged.
    """
    from orchestration.config import LaunchConfig
    from orchestration.execution.recover import recover as recover_store

    found = recover_store(LaunchConfig(store=store, tracking_uri=tracking_uri))
    for name in found.names:
        print(f"recovered  {name}")
    for damage in found.damaged:
        print(f"damaged    {damage}")
    print(
        f"{len(found.names)} recovered, {found.num_known} known before, "
        f"{len(found.damaged)} damaged"
    )
    # The others are recovered, but a script must notice.
    if found.damaged:
        sys.exit(1)


def doctor(
    store: StoreFolder = DEFAULT_STORE, tracking_uri: TrackingUri = None, as_json: AsJson = False
) -> None:
    """Check what mar needs on this machine: devices, decoders, Ray, the tracking store.

    Exit code 1 if something does not work.
    """
    from orchestration.config import LaunchConfig
    from orchestration.diagnostics.doctor import examine

    findings = examine(LaunchConfig(store=store, tracking_uri=tracking_uri))
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            outcome = "FAIL"
            if finding.works:
                outcome = "ok"
            print(f"{outcome:<4}  {finding.name:<15} {finding.message}")
    if not all(finding.works for finding in findings):
        sys.exit(1)
