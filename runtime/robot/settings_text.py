"""Settings as text: a complete command, and robot.toml."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .settings import Settings, descriptions

# By table ("" for none) and key: an example value, and what is wanted.
Wanted = Mapping[str, Mapping[str, tuple[Any, str]]]


def option_name(name: str) -> str:
    """The option of a setting: --log-mb of log_mb."""
    return descriptions()[name].option or "--" + name.replace("_", "-")


def as_command(settings: Settings, more: Sequence[str] = ()) -> str:
    """A command with every option that differs from its default. more: other words."""
    words = ["smolvla-run", "--bundle", settings.bundle]
    for name, value in _given(settings).items():
        option = option_name(name)
        if name == "bundle" or not descriptions()[name].help:
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, dict):
            for key, entry in value.items():
                words += [option, f"{key}={entry}"]
        else:
            words += [option, str(value)]
    return shlex.join([*words, *more])


def as_toml(settings: Settings, wanted: Wanted | None = None) -> str:
    """The text of a robot.toml with the bundle and every setting that differs from its default.

    wanted: what was not found; each is written as a comment.
    """
    wanted = wanted or {}
    values = {"bundle": settings.bundle} | _given(settings)
    values = {name: v for name, v in values.items() if name not in wanted.get("", {})}
    tables = {"": {n: v for n, v in values.items() if not isinstance(v, dict)}}
    tables |= {n: v for n, v in values.items() if isinstance(v, dict)}
    lines: list[str] = []
    for table in dict.fromkeys((*tables, *wanted)):
        if table:
            lines.append(f"[{table}]")
        lines += [f"{_key(table, k)} = {toml(v)}" for k, v in tables.get(table, {}).items()]
        for key, (example, what) in wanted.get(table, {}).items():
            lines.append(f"# {_key(table, key)} = {toml(example)}  # {what}")
    return "\n".join(lines) + "\n"


def _given(settings: Settings) -> dict[str, Any]:
    """Every setting that differs from its default, in the order of the fields."""
    default = Settings()
    return {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(Settings)
        if getattr(settings, f.name) != getattr(default, f.name)
    }


def _key(table: str, key: str) -> str:
    """The names of settings need no quotes, those of a table's entries can be any text."""
    return toml(key) if table else key


def toml(value: object) -> str:
    """Strings, numbers and booleans of JSON are TOML too."""
    return json.dumps(value, ensure_ascii=False)
