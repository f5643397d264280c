"""`vlfast recipes`: list the recipes."""

from __future__ import annotations

from vlfast.cli.options import Parser

HELP = "list the recipes"


def main(argv: list[str]) -> None:
    Parser("vlfast recipes", description=HELP).parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from vlfast.trainers.recipes import RECIPES

    table = Table("recipe", "paper", "equation", "learns")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.paper, recipe.equation, recipe.learns)
    Console().print(table)
