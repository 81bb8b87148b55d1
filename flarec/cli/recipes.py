"""`flarec recipes`: the built-in recipes, and every key of one."""

from __future__ import annotations

import click


@click.command("recipes")
@click.argument("name", metavar="[NAME|FILE]", required=False)
@click.option("--toml", "as_toml", is_flag=True, help="Print the recipe as TOML, to start a file of your own.")
def command(name: str | None, as_toml: bool) -> None:
    """List the recipes, or document every key of one (a built-in name or a TOML file)."""
    from flarec import recipes
    from flarec.errors import UsageError
    from flarec.recipe import load_recipe

    if name is None:
        if as_toml:
            raise UsageError(f"--toml needs a recipe; choose one of {', '.join(recipes.NAMES)}")
        width = max(map(len, recipes.NAMES)) + 2
        for known in recipes.NAMES:
            click.echo(f"{known:<{width}}{load_recipe(known).description}")
        click.echo("\n`flarec recipes NAME` documents every key; `--set key=value` of `flarec convert` changes one.")
        return
    recipe = load_recipe(name)
    if as_toml:
        click.echo(recipe.to_toml(), nl=False)
        return
    click.echo(f"{recipe.name}: {recipe.description}")
    section = ""
    for entry in recipe.describe():
        head, _, _ = entry.key.rpartition(".")
        if head != section:
            click.echo()
            section = head
        click.echo(click.wrap_text(f"{entry.key} = {_toml(entry.value)}", 120, "", "    "))
        click.echo(click.wrap_text(entry.doc, 116, "    ", "    "))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)) if isinstance(value, tuple) else str(value)
