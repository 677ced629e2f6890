"""Every command in the docs has a test that runs it, and here are those that need no cluster."""

import argparse
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pretrain_docs import commands
from pretrain_docs.commands import FENCE, HERE, NOT_RUN, PARSED, STARTS, Command

LANGUAGES = {"", "sh", "console", "text", "yaml", "toml", "json", "mermaid"}
TRAINS = re.compile(r"step +\d+/\d+ ")
# What a reader brings along: files under the names that the pages use, small enough for a test.
BROUGHT = {
    "job.yaml": (commands.ROOT / "manifests/examples/01-one-worker.yaml").read_text(),
    "llama3_8b.toml": textwrap.dedent("""\
        [model]
        name = "llama3"
        flavor = "tiny"
        [training]
        dataset = "text"
        dataset_path = "tests/assets/text"
        local_batch_size = 1
        seq_len = 32
        """),
}


def test_every_command_is_run_by_a_test() -> None:
    homeless = [
        f"{each.where}: no test runs `{each.text}`"
        for each in commands.collect()
        if each.text not in NOT_RUN and commands.home(each) is None
    ]
    assert homeless == [], (
        "say in docs/pretrain_docs/commands.py which test runs it, or in NOT_RUN why none can"
    )


def test_every_home_is_a_test_that_asks_for_its_commands(repository: Path) -> None:
    homes = {commands.home(each) for each in commands.collect() if each.text not in NOT_RUN}
    for home in homes - {None}:
        source = repository / home.partition("::")[0]
        assert re.search(r"commands\.(of|in_manifest|quickstart|FENCE)\b", source.read_text()), home


def test_what_is_not_run_is_still_shown_and_has_a_reason() -> None:
    assert NOT_RUN.keys() <= {each.text for each in commands.collect()}
    assert all(len(reason.split()) > 3 for reason in NOT_RUN.values())


@pytest.mark.parametrize("page", commands.pages(), ids=lambda page: page.name)
def test_no_command_hides_in_a_fence_without_a_language(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        assert language in LANGUAGES
        if language not in ("sh", "console"):
            hidden = [line for line in block.splitlines() if STARTS.match(line.lstrip("$# "))]
            assert hidden == [], "mark the fence as sh"


def test_commands_are_found_wherever_they_stand() -> None:
    page = (
        "Say `make up` or `an option`.\n\n```sh\nhelm install a \\\n  --wait   # slowly\n\n"
        "kubectl get ptj\n```\n```console\n$ kubectl get nodes\nNAME\n```\n```text\nmake x\n```\n"
    )
    assert list(commands.in_page(page)) == [
        (4, "helm install a --wait"),
        (7, "kubectl get ptj"),
        (10, "kubectl get nodes"),
        (1, "make up"),
    ]
    manifest = "# Words.\n#\n#   kubectl apply -f x     # and more\napiVersion: v1\n#   not this\n"
    assert list(commands.in_manifest(manifest)) == [(3, "kubectl apply -f x")]


@pytest.mark.parametrize("text", ["terraform apply -auto-approve", "docker run it"])
def test_a_command_of_an_unknown_program_has_no_home(text: str) -> None:
    assert commands.home(Command(text, "README.md", 1)) is None


# --- run here -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it looks to a reader who has put files of their own into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for each in repository.iterdir():
        (folder / each.name).symlink_to(each)
    for name, text in BROUGHT.items():
        (folder / name).write_text(text)
    (folder / "outputs").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("command", commands.of(HERE), ids=lambda command: command.text)
def test_it_runs(checkout: Path, command: Command) -> None:
    """A run that would take minutes is interrupted after its first steps, and saves."""
    is_long = command.text.startswith("pretrain run manifests/")
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    text = f"{command.text} --help" if command.is_mention else command.text
    with subprocess.Popen(
        ["bash", "-c", text], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "PATH": programs, "CUDA_VISIBLE_DEVICES": ""},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = list[str]()
        for line in process.stdout:
            lines.append(line)
            if is_long and TRAINS.search(line) and not any(map(TRAINS.search, lines[:-1])):
                process.send_signal(signal.SIGINT)
    assert process.returncode == (143 if is_long else 0), lines
    assert not is_long or lines[-1].startswith("preempted: step")


# --- only understood ----------------------------------------------------------------------------


class ParsedError(Exception):
    """A program has read its command line and had nothing against it."""


def programs_of(command: Command, repository: Path) -> list[list[str]]:
    """Words of the programs behind a command; behind a verb of make, those of its recipe."""
    words = shlex.split(command.text)
    if words[0] != "make":
        return [words]
    makefile = (repository / "Makefile").read_text()
    assert all(f"{word.partition('=')[0]}" in makefile for word in words if "=" in word)
    recipe = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words[1:]],
        cwd=repository, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [shlex.split(line) for line in recipe.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", commands.of(PARSED), ids=lambda command: command.text)
def test_it_is_understood(
    repository: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The verb of make exists, and the programs behind it know their options and files."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    programs = programs_of(command, repository)
    assert programs or command.text == "make setup"  # which has nothing to do where this runs
    for words in programs:
        files = [word for word in words if word.startswith("tests/")]
        assert all((repository / word).exists() for word in files)
        module = words[words.index("-m") + 1] if "-m" in words else ""
        if module.startswith("pretrain_"):
            monkeypatch.setattr(sys, "argv", words[words.index(module) :])
            monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # it is new
            with pytest.raises(ParsedError):
                runpy.run_module(module, run_name="__main__")


def test_a_wrong_option_is_not_understood(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Command('make soak ARGS="--fault 5 --sed 7"', "README.md", 1)
    with pytest.raises(SystemExit):
        test_it_is_understood(repository, monkeypatch, command)
