"""Every command that a page shows, and the test that runs it.

A page that shows a command promises that it works, so each has one home: a test that takes its
commands from here and runs all of them. A new command needs no entry if its program has a home;
one of another program is refused until somebody says where it is run, or why it can't be.

Commands are the lines of fences marked ``sh`` or ``console`` (there only behind a prompt), code
spans that begin with a known program, and what stands indented in the comment above a manifest.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
HEADER = re.compile(r"^#   (\S.*)$", re.M)
REMARK = re.compile(r"\s{2,}[#(].*$")  # what a line says to the reader
PROMPT = re.compile(r"^[$#] ")
PROGRAMS = ("docker", "eval", "helm", "kind", "kubectl", "make", "pip", "pretrain", "python")
STARTS = re.compile(rf"({'|'.join(PROGRAMS)})3? \S|(PYTHONPATH=|printf )\S")
MENTION = re.compile(r"(helm|kubectl|pretrain) [a-z-]+")  # a verb that is talked about

QUICKSTART = "tests/e2e/test_quickstart.py"  # the page as a stranger would type it
EXAMPLES = "tests/e2e/test_examples.py"  # the commands above an example, with that example
PAGES = "tests/e2e/test_pages.py"  # whatever else asks a cluster
MANIFESTS = "tests/apiserver/test_manifests.py"  # Kustomize, with an API server of its own
HERE = "tests/repo/test_commands.py::test_it_runs"  # without a cluster
PARSED = "tests/repo/test_commands.py::test_it_is_understood"  # too long, or what CI is made of

# Commands that no test can run, and why.
NOT_RUN = {
    "kind load docker-image": "needs kind, and so an engine for containers in containers",
    "pip install '.[cli,trainer]'": "CI installs the same extras from the same file, by uv",
}


@dataclass(frozen=True)
class Command:
    """A command as a shell takes it, and where it was seen first."""

    text: str
    page: str
    line: int

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def is_mention(self) -> bool:
        """Whether it is only a program and its verb, as in a sentence about it."""
        return MENTION.fullmatch(self.text) is not None


def pages() -> list[Path]:
    """All that may show commands."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("charts/*/README.md")]
    return sorted([*found, ROOT / "devcluster" / "README.md"])


def manifests() -> list[Path]:
    """YAML files whose comments say how to use them."""
    folder = ROOT / "manifests"
    return sorted([*folder.glob("examples/*.yaml"), *folder.rglob("kustomization.yaml")])


def collect() -> list[Command]:
    """Every command once, in the order of pages."""
    found: dict[str, Command] = {}
    for path in (*pages(), *manifests()):
        read = in_page if path.suffix == ".md" else in_manifest
        for line, text in read(path.read_text()):
            command = Command(text, str(path.relative_to(ROOT)), line)
            found.setdefault(text, command)
    return list(found.values())


def in_page(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each command of a page in Markdown."""
    for match in FENCE.finditer(text):
        language, first = match[1], text.count("\n", 0, match.start(2)) + 1
        if language in ("sh", "console"):
            yield from in_block(match[2], first, language == "console")
    prose = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in SPAN.finditer(prose):
        span = " ".join(match[1].split())
        if STARTS.match(span):
            yield prose.count("\n", 0, match.start()) + 1, span


def in_block(block: str, line: int, prompts: bool = False) -> Iterator[tuple[int, str]]:
    """Line and text of each command of a fence, without remarks and with its lines joined."""
    text, begin = "", line
    for number, each in enumerate(block.splitlines(), line):
        if prompts and not text and not PROMPT.match(each):
            continue  # what the command printed
        part = REMARK.sub("", PROMPT.sub("", each) if prompts else each).strip()
        begin = begin if text else number
        text = f"{text} {part.removesuffix(chr(92)).rstrip()}".strip()
        if text and not part.endswith("\\"):
            yield begin, text
            text = ""


def in_manifest(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each command in the comment above a manifest."""
    for match in HEADER.finditer(text.partition("\napiVersion:")[0]):
        yield text.count("\n", 0, match.start()) + 1, REMARK.sub("", match[1]).strip()


def home(command: Command) -> str | None:
    """The test that runs it; None if there is none."""
    text = command.text
    if text in quickstart():
        return QUICKSTART
    if command.is_mention:
        return HERE if text.startswith("pretrain") else PAGES
    if text == "make help" or text.startswith("pretrain "):
        return HERE
    if text.startswith("make ") or re.match(r"python -m (?!pretrain_devcluster env)", text):
        return PARSED
    if command.page.startswith("manifests/examples/"):
        return EXAMPLES
    if command.page.startswith("manifests/"):
        return MANIFESTS
    shell = ("kubectl ", "helm ", "python -m pretrain_devcluster ", "PYTHONPATH=", "eval ")
    return PAGES if text.startswith(shell) else None


def quickstart() -> list[str]:
    """The commands of the quickstart, in order."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    blocks = (match[2] for match in FENCE.finditer(text) if match[1] == "sh")
    return [command for block in blocks for _, command in in_block(block, 1)]


def of(test: str) -> list[Command]:
    """The commands that a test has to run."""
    return [each for each in collect() if each.text not in NOT_RUN and home(each) == test]
