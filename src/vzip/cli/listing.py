"""What can be named on the command line of eval.py and train.py.

  python -m vzip list                   everything
  python -m vzip list exp               the recipes
  python -m vzip list budget            one group

Recipes (+exp=NAME) with their first line, and the options of every group (group=NAME).
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from vzip.config.options import RECIPE_GROUP, config_dir, groups, header, options
from vzip.errors import ConfigError, nearest
from vzip.installed import program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", help="only this group, or 'exp' for the recipes with their whole header")


def main(args: argparse.Namespace) -> int:
    directory = config_dir()
    known = [*groups(directory), RECIPE_GROUP]
    if args.group is not None and args.group not in known:
        raise ConfigError(f"'{args.group}': no such group{nearest(args.group, known)}; groups: {', '.join(known)}.")
    console = Console()
    if args.group in (None, RECIPE_GROUP):
        table = Table("recipe", "what it is", title=f"recipes: {program('eval')} +exp=NAME", title_justify="left")
        for name in options(directory, RECIPE_GROUP):
            lines = header(directory / RECIPE_GROUP / f"{name}.yaml")
            table.add_row(name, "\n".join(lines if args.group else lines[:1]))
        console.print(table)
    if args.group != RECIPE_GROUP:
        table = Table("group", "option", "what it is", title="options: GROUP=OPTION", title_justify="left")
        for group in groups(directory) if args.group is None else [args.group]:
            for row, name in enumerate(options(directory, group)):
                first = header(directory / group / f"{name}.yaml")[:1]
                table.add_row("" if row else group, name, *first)
            table.add_section()
        console.print(table)
    return 0
