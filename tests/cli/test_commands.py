"""`python -m vzip`: commands load only what they need, and user errors are one line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

import pytest
from tests.media.images import bomb

from vzip import cli
from vzip.config import schema
from vzip.config.options import RECIPE_GROUP, config_dir, groups, options
from vzip.errors import ImageError

ROOT = config_dir().parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module_with(monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException) -> list[Namespace]:
    """Makes `ask` a command that ends as told, and returns what it was called with."""
    calls: list[Namespace] = []
    module = ModuleType("a command")

    def main(args: Namespace) -> int:
        calls.append(args)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module.__dict__.update(main=main, add_arguments=lambda parser: parser.add_argument("picture"))
    monkeypatch.setitem(sys.modules, cli.COMMANDS["ask"].module, module)
    return calls


def test_list_names_every_recipe_and_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for group in [*groups(config_dir()), RECIPE_GROUP]:
        for option in options(config_dir(), group):
            assert f"{'+exp' if group == RECIPE_GROUP else group}={option} " in shown, "as one types it"
    assert "LLaVA-1.5-7B, VisionZip at 64 visual tokens (54 dominant + 10 contextual)." in shown


def test_list_of_one_group(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list", "budget"]) == 0
    shown = capsys.readouterr().out
    assert "192tok" in shown and "llava15_7b" not in shown
    assert cli.main(["list", RECIPE_GROUP]) == 0
    assert "python eval.py +exp=llava15_7b_64tok" in capsys.readouterr().out
    assert cli.main(["list", "budgets"]) == 2
    assert "'budgets': no such group (did you mean 'budget'?)" in capsys.readouterr().err


def test_list_describes_a_groups_keys_in_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "launcher"]) == 0
    shown = capsys.readouterr().out
    for name, described in schema.keys_in("launcher").items():
        assert name == "name" or f"  launcher.{name}: {described.rule.text}\n" in shown
        assert name == "name" or described.sentence in " ".join(shown.split())
    assert cli.main(["list", "compressor"]) == 0
    shown = capsys.readouterr().out
    assert "compressor.window: of compressor=vscan\n      side of a window in patches" in shown


@pytest.mark.parametrize("name", list(cli.PROGRAMS))
def test_help_lists_every_key_and_option_without_composing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        f"runpy.run_path('{name}.py', run_name='__main__')\n"
        "print([module for module in ('torch', 'transformers', 'lmms_eval', 'datasets') if module in sys.modules])"
    )
    shown = python(code)
    assert shown.splitlines()[-1] == "[]" and f"python {name}.py" in shown
    words = " ".join(shown.split())
    for group in groups(config_dir()):
        assert f"{group}: {', '.join(options(config_dir(), group))}" in shown
        for key, described in schema.keys_in(group).items():
            assert key in ("name", "kind") or described.sentence in words
    for key in schema.known_keys():
        assert key.endswith((".name", ".kind")) or f"  {key}: " in shown
    assert "compressor.merge_rule: of compressor=visionzip" in shown


def test_an_unknown_command_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["comprae", "runs"]) == 2
    assert "'comprae': no such command (did you mean 'compare'?)" in capsys.readouterr().err


def test_without_a_command_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in [*cli.COMMANDS, *cli.PROGRAMS])


def test_a_command_gets_its_arguments_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = module_with(monkeypatch, 3)
    assert cli.main(["ask", "cat.png"]) == 3 and calls[0].picture == "cat.png"


def test_a_users_error_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module_with(monkeypatch, ImageError("cat.png: empty"))
    assert cli.main(["ask", "cat.png"]) == 2
    assert capsys.readouterr().err == "ImageError: cat.png: empty\n"


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    module_with(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["ask", "cat.png"])


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "needs_something.py").write_text("import a_package_nobody_has.part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "COMMANDS", {"ask": cli.Command("needs_something", "")})
    assert cli.main(["ask"]) == 2
    message = capsys.readouterr().err
    assert "MissingPackageError: `ask` needs the package a-package-nobody-has, which is not installed" in message


def test_a_package_that_a_command_misses_at_work_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module_with(monkeypatch, ModuleNotFoundError("No module named 'av'", name="av"))
    assert cli.main(["ask", "cat.png"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("MissingPackageError: `ask` needs the package av, which is not installed: ")
    assert "[video]" in message and "Traceback" not in message


@pytest.mark.parametrize("name", list(cli.PROGRAMS))
def test_a_program_is_the_script_itself_in_any_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{name}.yaml").write_text("not: ours\n")
    monkeypatch.setattr(sys, "argv", ["vzip"])
    words = ["budget=32tok", "--cfg", "job", "--resolve"]
    assert cli.main([name, *words]) == 0
    told = capsys.readouterr().out
    assert "num_dominant: 27" in told and "not: ours" not in told
    script = subprocess.run([sys.executable, ROOT / f"{name}.py", *words], capture_output=True, text=True, check=True)
    assert script.stdout == told
    with pytest.raises(SystemExit) as end:
        cli.main([name, "budgt=32tok"])
    assert end.value.code == 2 and "did you mean 'budget'?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def test_only_the_chosen_commands_module_is_imported() -> None:
    others = [command.module for name, command in cli.COMMANDS.items() if name != "list"]
    shown = python(
        f"import sys; from vzip.cli import main; main(['list']); print([m for m in {others} if m in sys.modules])"
    )
    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_there(name: str) -> None:
    module = __import__(cli.COMMANDS[name].module, fromlist=["main"])
    module.add_arguments(ArgumentParser())
    assert callable(module.main)


@pytest.mark.whole
def test_bench_loads_no_evaluation_packages() -> None:
    # Not even where they are installed: a speed measurement must run where they are not.
    code = (
        "import sys\n"
        "from vzip.cli import main\n"
        "try:\n"
        "    main(['bench', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = ('lmms_eval', 'datasets', 'hydra', 'omegaconf', 'wandb', 'deepspeed')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    shown = python(code)
    assert "usage: python -m vzip bench" in shown and shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "BOMB", "What?"], "bomb.png: too many pixels"),
        (["chat", "--image", "BOMB"], "bomb.png: too many pixels"),
        (["ask", "x" * 5000, "What?"], "no such file"),
        (["ask", "a\0b", "What?"], "no such file"),
        (["chat", "--image", "x" * 5000], "no such image file"),
        (["chat", "--video", "x" * 5000], "no such video file"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("vzip.models.load.load_vlm", None)
    path = bomb(tmp_path / "bomb.png")
    assert cli.main([str(path) if word == "BOMB" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and len(told) < 600


@pytest.mark.parametrize("number", ["0", "-3"])
def test_no_answer_is_no_answer(capsys, number):
    for words in (["ask", "cat.png", "What?"], ["chat"]):
        assert cli.main([*words, f"--max-new-tokens={number}"]) == 2
        assert f"--max-new-tokens={number}: must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["judge", "compare"])
@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_no_file_can_have_is_one_line(capsys, monkeypatch, command, path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert cli.main([command, path]) == 2
    told = capsys.readouterr().err
    assert "Error: " in told and "Traceback" not in told and len(told) < 900


def test_an_interrupted_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module_with(monkeypatch, KeyboardInterrupt("what has arrived is kept in data"))
    assert cli.main(["ask", "a.png"]) == 130
    told = capsys.readouterr().err
    assert told == "interrupted: what has arrived is kept in data. The same command continues.\n"


# What these two measure or show decides their options, so torch and transformers are imported for them.
_SLOW = ("bench", "demo")


def test_help_needs_nothing_heavy() -> None:
    modules = [command.module for name, command in cli.COMMANDS.items() if name not in _SLOW]
    heavy = ("torch", "transformers", "lmms_eval", "datasets", "deepspeed", "matplotlib")
    code = f"import sys, {', '.join(modules)}; print([name for name in {heavy} if name in sys.modules])"
    assert python(code) == "[]\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_begins_with_three_examples(name: str) -> None:
    path = ROOT / "src" / f"{cli.COMMANDS[name].module.replace('.', '/')}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    examples = [line for line in text.splitlines() if re.match(r"\s*(python -m vzip|python eval\.py|printf)\b", line)]
    assert len(examples) >= 3 and f"python -m vzip {name}" in examples[0], text
    assert text.index(examples[0]) < 250, "they come first"


def test_the_nearest_name_comes_last_behind_a_long_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benhc"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "Did you mean 'bench'?"


@pytest.mark.parametrize("words", [["list"], ["--help"], ["eval", "--help"]])
def test_a_reader_that_goes_early_sees_no_traceback(words: list[str]) -> None:
    """As `python -m vzip list | head -1`."""
    command = [sys.executable, "-m", "vzip", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and not said, said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("words", [["list"], ["--help"], ["eval", "--help"]])
def test_an_output_that_is_full_is_one_sentence(words: list[str]) -> None:
    command = [sys.executable, "-m", "vzip", *words]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1 and process.stderr.startswith("standard output: No space left on device;")
    assert len(process.stderr.splitlines()) == 1, process.stderr
