"""What can be named on the command line of eval.py and train.py.

   python -m vzip list                   everything
   python -m vzip list exp               the recipes
   python -m vzip list budget            one group

Recipes (+exp=NAME) and the options of every group (group=NAME), each in a sentence. With a group: all that its files
say, and the group's keys.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vzip.config import schema
from vzip.config.options import RECIPE_GROUP, config_dir, groups, header, option_values, options
from vzip.errors import ConfigError, nearest
from vzip.installed import program
from vzip.keys import describe
from vzip.option_files import comments, option_file, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", help="only this group, or 'exp' for the recipes, with their whole header")


def main(args: argparse.Namespace) -> int:
    directory = config_dir()
    known = [*groups(directory), RECIPE_GROUP]
    if args.group is not None and args.group not in known:
        raise ConfigError(f"'{args.group}': no such group{nearest(args.group, known)}; groups: {', '.join(known)}.")
    console = Console()
    chosen = [RECIPE_GROUP, *groups(directory)] if args.group is None else [args.group]
    for group in chosen:
        chooses = f"+{RECIPE_GROUP}" if group == RECIPE_GROUP else group
        typed = f"{program('train' if group in ('train', 'data') else 'eval')} {chooses}=..."
        table = Table("write", "what it is", title=typed, title_justify="left")
        table.columns[0].no_wrap = True
        for name in options(directory, group):
            path = option_file(directory, group, name)
            table.add_row(f"{chooses}={name}", "\n".join(header(path)) if args.group else summary(path))
        console.print(table)
    if args.group not in (None, RECIPE_GROUP):
        print("\n".join([f"keys of {args.group}, as KEY=VALUE:", *key_lines(args.group, directory)]))
    return 0


def key_lines(group: str, directory: Path) -> list[str]:
    """The keys of a group with rule and sentence; of an open group, with what its files say."""
    if group not in schema.OPEN_GROUPS:
        keys = schema.keys_in(group)
        return describe({name: own for name, own in keys.items() if name not in ("name", "kind")}, f"{group}.")
    lines = []
    for name in options(directory, group):
        said = comments(option_file(directory, group, name))
        own_keys = [key for key in option_values(directory, group, name) if key not in ("name", "_target_", "budget")]
        for own in own_keys:
            lines += [f"  {group}.{own}: of {group}={name}", *([f"      {said[own]}"] if own in said else [])]
    return lines


def program_help(description: str) -> str:
    """What ``eval.py --help`` and ``train.py --help`` print: examples, options, and every key."""
    directory = config_dir()
    lines = [description.strip(), "", "GROUP=OPTION (what they are: python -m vzip list [GROUP]):"]
    lines += [f"  {group}: {', '.join(options(directory, group))}" for group in groups(directory)]
    lines += ["+exp=RECIPE (python -m vzip list exp)", "", "KEY=VALUE:", *describe(schema.TOP)]
    for group in groups(directory):
        lines += key_lines(group, directory)
    lines += ["", "--config-dir DIR: options of your own beside these, as DIR/budget/mine.yaml and DIR/exp/mine.yaml."]
    lines += ["-m: a sweep over values with commas. --cfg job --resolve: the configuration that the words make."]
    return "\n".join([*lines, "--hydra-help: the other flags."])
