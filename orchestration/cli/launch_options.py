"""Makes the options of ``mar run`` that set where and how trials run.

Each option is defined once, as a field of ``LaunchConfig`` or ``WorkerConfig``: its name, type,
default, range and help text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mar.errors import UserError
from mar.training.retention import RetentionPolicy
from orchestration.config import HELP, METAVAR, MINIMUM, LaunchConfig, WorkerConfig
from orchestration.secrets import webhook_of

_ENVIRONMENT = {"object_store": "MAR_OBJECT_STORE"}
"""Field -> environment variable from which its option is read, too."""


def takes_launch_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Add the launch's options to a verb that has the parameters ``store`` and ``tracking_uri``.

    The verb gets the ``LaunchConfig`` that is made from the options as ``launch``.
    """
    signature = inspect.signature(verb, eval_str=True)
    # ``launch`` is no option: ``command`` makes it from the others.
    own = [each for each in signature.parameters.values() if each.name != "launch"]
    launch_fields = _option_fields(LaunchConfig)
    worker_fields = _option_fields(WorkerConfig)
    options = [
        *(_parameter(each, LaunchConfig) for each in launch_fields),
        *(_parameter(each, WorkerConfig) for each in worker_fields),
    ]

    def command(**values: Any) -> None:
        launch_values = {each.name: values.pop(each.name) for each in launch_fields}
        worker_values = {each.name: values.pop(each.name) for each in worker_fields}
        launch = _launch_config(
            values["store"], values["tracking_uri"], launch_values, worker_values
        )
        verb(**values, launch=launch)

    command.__doc__ = verb.__doc__
    command.__name__ = verb.__name__
    # Typer reads a command's parameters from its signature and its annotations.
    parameters = [*own, *options]
    with_signature: Any = command
    with_signature.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def check_launch_options(values: Mapping[str, Any]) -> None:
    """Check the parameters of a verb with the launch's options.

    Raises:
        UserError: one is out of its range, or two contradict each other.
    """
    launch_values = {each.name: values[each.name] for each in _option_fields(LaunchConfig)}
    # It may be a file on the machine where the launch will run.
    launch_values["webhook"] = None
    worker_values = {each.name: values[each.name] for each in _option_fields(WorkerConfig)}
    _launch_config(Path(values["store"]), values["tracking_uri"], launch_values, worker_values)


def _option_fields(config: type[Any]) -> list[Field[Any]]:
    """Return the fields that are options: those with a help text."""
    return [each for each in fields(config) if HELP in each.metadata]


def _parameter(each: Field[Any], config: type[Any]) -> inspect.Parameter:
    """Return the option of one field, as a parameter of the command."""
    # With ``from __future__ import annotations`` a field's own type is only a text.
    kind = get_type_hints(config)[each.name]
    default = each.default
    # Typer knows no such type: the option is a text, which ``_launch_config`` parses.
    if kind is RetentionPolicy:
        kind = str
        default = str(RetentionPolicy())
    names: tuple[str, ...] = ()
    if kind is bool:
        # Without this, Typer would add --no-compile beside --compile.
        names = (_option_name(each.name),)
    option = typer.Option(
        *names,
        help=each.metadata[HELP],
        min=each.metadata.get(MINIMUM),
        metavar=each.metadata.get(METAVAR),
        envvar=_ENVIRONMENT.get(each.name),
    )
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _option_name(field_name: str) -> str:
    return f"--{field_name.replace('_', '-')}"


def _launch_config(
    store: Path,
    tracking_uri: str | None,
    launch_values: Mapping[str, Any],
    worker_values: Mapping[str, Any],
) -> LaunchConfig:
    """Return the configuration that is made from the options' values.

    Raises:
        UserError: one is out of its range, or two contradict each other.
    """
    worker = dict(worker_values)
    try:
        worker["keep"] = RetentionPolicy.parse(worker["keep"])
    except ValueError as error:
        raise UserError(f"--keep {worker['keep']}: {error}") from None
    # On the command line 0 means never, which is none in the configuration.
    worker["hang_timeout_s"] = worker["hang_timeout_s"] or None
    min_workers = worker["min_workers"]
    if min_workers and min_workers > worker["workers"]:
        raise UserError(f"--min-workers {min_workers}: more than --workers {worker['workers']}")
    launch = dict(launch_values)
    if launch["webhook"]:
        launch["webhook"] = webhook_of(launch["webhook"])
    try:
        return LaunchConfig(
            store=store, tracking_uri=tracking_uri, worker=WorkerConfig(**worker), **launch
        )
    except ValueError as error:
        # The message begins with the field's name, from which the option's follows.
        name, _, message = str(error).partition(": ")
        raise UserError(f"{_option_name(name)} {message}") from None
