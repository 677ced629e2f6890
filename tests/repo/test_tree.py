"""The shape of the tree: nothing that breaks Python, names a machine or stops being readable."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = ("api", "operator", "trainer", "cli", "devcluster", "demo", "bench", "docs")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def tracked(repository: Path) -> list[Path]:
    """Every file of the project, new ones included, without what git ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [repository / name for name in listing.split("\0") if name]
    return [file for file in files if file.is_file()]


def modules(repository: Path) -> list[Path]:
    return [path for top in CODE for path in sorted((repository / top).rglob("*.py"))]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("folder", [*CODE, "tests"])
def test_top_level_folders_are_no_packages(repository: Path, folder: str) -> None:
    # A package called `operator` at the root shadows the standard library's and stops the
    # interpreter; the others stay alike, so that nobody has to remember which one is special.
    assert not (repository / folder / "__init__.py").exists()


def test_test_folders_are_no_packages(repository: Path) -> None:
    assert list((repository / "tests").rglob("__init__.py")) == []


def test_every_package_is_marked_typed(repository: Path) -> None:
    packages = {
        path.parent for top in CODE[:4] for path in (repository / top).glob("*/__init__.py")
    }
    assert packages
    assert sorted(str(p) for p in packages if not (p / "py.typed").exists()) == []


def test_files_and_functions_stay_small(repository: Path) -> None:
    too_long: list[str] = []
    for path in modules(repository):
        source = path.read_text()
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            too_long.append(f"{path}: {lines} lines")
        for function in functions(ast.parse(source)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                too_long.append(f"{path}:{function.lineno} {function.name}: {lines} lines")
    assert too_long == []


def test_every_function_is_annotated(repository: Path) -> None:
    bare: list[str] = []
    for path in modules(repository):
        for function in functions(ast.parse(path.read_text())):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in {"self", "cls"}]
            if function.returns is None or any(a.annotation is None for a in named):
                bare.append(f"{path}:{function.lineno} {function.name}")
    assert bare == []


# Written in two pieces each, so that this file does not find itself.
LEAKS = [
    re.compile(pattern)
    for pattern in (
        r"/wo" r"rk/(main|shared|\.library)",
        r"(?<![\w.])/ro" r"ot/(?!\.cache)",  # caches inside image builds are root's
        r"/ho" r"me/[a-z]",
        r"pypi\.o" r"rg|pythonhosted\.o" r"rg|proxy\.golang\.o" r"rg|registry\.npmjs\.o" r"rg",
        r"docker\.i" r"o/|ghcr\.i" r"o/|quay\.i" r"o/|deb\.debian\.o" r"rg",
    )
]


def test_no_machine_path_and_no_registry_host_is_written_down(repository: Path) -> None:
    found: list[str] = []
    for path in tracked(repository):
        if path.suffix in {".sum", ".mod"} or path.stat().st_size > 2**20:
            continue
        text = path.read_text(errors="ignore")
        found += [f"{path}: {match[0]}" for leak in LEAKS if (match := leak.search(text))]
    assert found == []


def test_no_file_is_huge(repository: Path) -> None:
    assert [str(p) for p in tracked(repository) if p.stat().st_size > 2**20] == []


def test_the_chart_carries_the_generated_definition(repository: Path) -> None:
    generated = repository / "manifests" / "base" / "crds"
    shipped = repository / "charts" / "pretrain-operator" / "files" / "crds"
    names = sorted(path.name for path in generated.glob("*.yaml"))
    assert names
    assert names == sorted(path.name for path in shipped.glob("*.yaml"))
    stale = [n for n in names if (generated / n).read_bytes() != (shipped / n).read_bytes()]
    assert stale == [], "run `make generate`"
