"""The options of a command that are settings (robot/settings.py): made from their description."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import typer

from ..robot.settings import Settings, descriptions, parse_table
from ..robot.settings_text import option_name


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(given, ...)` an option for every setting that has one.

    given: dict[str, Any], what `override` takes: None for every option that is not given.
    """

    @functools.wraps(command)
    def with_settings(**options: Any) -> None:
        names = [name for name in _parameters() if name in options]
        command(given({name: options.pop(name) for name in names}), **options)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*_parameters().values(), *own)
    ]
    with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    with_settings.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_settings.__wrapped__  # inspect would look there
    return with_settings


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options -> what `override` takes. Raises SettingsError."""
    values = dict(options)
    for name, value in options.items():
        if isinstance(value, list | tuple):
            values[name] = parse_table(option_name(name), value)
    return values


def _parameters() -> dict[str, inspect.Parameter]:
    hints = get_type_hints(Settings)
    found = {}
    for field in dataclasses.fields(Settings):
        description = descriptions()[field.name]
        if not description.help:
            continue
        default = "" if field.default is dataclasses.MISSING else field.default
        shown = description.default_text or (default if default not in (None, "", False) else "")
        is_table = field.default is dataclasses.MISSING
        found[field.name] = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=list[str] | None if is_table else hints[field.name] | None,
            default=typer.Option(
                None,
                option_name(field.name),
                help=description.help + (f"  [default: {shown}]" if shown else ""),
                metavar=description.metavar,
                show_default=False,
            ),
        )
    return found
