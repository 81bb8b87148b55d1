"""`flarec passes`: passes and properties, who requires and provides what, and where a pass comes from."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import click


@click.command()
@click.option("--plugin", "plugins", multiple=True, metavar="FILE.py", help="Also of this plugin (its code runs).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(plugins: tuple[str, ...], as_json: bool) -> None:
    """List the passes that pipelines can hold, those of installed plugins among them, and the properties."""
    from flarec.passes import passes_by_name

    known = passes_by_name(plugins)
    rows = [_row(row.cls, row.origin) for row in known.values()]
    properties: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for kind in ("provides", "requires", "invalidates"):
            for name in row[kind]:
                properties.setdefault(name, {}).setdefault(f"{kind}_it", []).append(row["name"])
    table = {"passes": rows, "properties": properties}
    if as_json:
        click.echo(json.dumps(table, indent=2))
        return
    _print(table)


def _row(cls: Any, origin: str) -> dict[str, Any]:
    from flarec.ir.pipeline import names_of

    return {
        "name": cls.name,
        "options": {field.name: repr(field.default) for field in fields(cls)},
        "requires": sorted(names_of(cls.requires)),
        "provides": sorted(names_of(cls.provides)),
        "invalidates": sorted(names_of(cls.invalidates)),
        "targets": sorted(cls.targets),
        "from": origin,
        "what": (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " "),
    }


def _print(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    passes = Table(title="passes", title_justify="left")
    passes.add_column("pass", no_wrap=True)  # `@after:` wants it whole
    for column in ("options", "targets", "requires", "provides", "invalidates", "from"):
        passes.add_column(column, overflow="fold")
    for row in table["passes"]:
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        claims = (", ".join(row[kind]) for kind in ("targets", "requires", "provides", "invalidates"))
        passes.add_row(row["name"], options, *claims, row["from"])
    console.print(passes, markup=False)
    properties = Table(
        "property", "provided by", "required by", "invalidated by", title="properties", title_justify="left"
    )
    for name, users in table["properties"].items():
        given = ["capture"] if name == "captured" else []
        lists = ([*given, *users.get("provides_it", [])], users.get("requires_it", []), users.get("invalidates_it", []))
        properties.add_row(name, *(", ".join(items) for items in lists))
    console.print(properties, markup=False)
