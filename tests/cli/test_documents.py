"""Files are read as Kubernetes and torchtitan read them, with the line of every key."""

from pathlib import Path

import pytest

from pretrain_cli.documents import UnreadableError, read_toml, read_yaml


def file(tmp_path: Path, text: str | bytes, name: str = "job.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_tells_the_line_of_every_key(tmp_path: Path) -> None:
    text = "a: 1\nb:\n  c:\n  - x: 1\n    y: 2\n  - z\n---\n\nd: 3\n"
    first, second = read_yaml(file(tmp_path, text))
    assert first.data == {"a": 1, "b": {"c": [{"x": 1, "y": 2}, "z"]}}
    assert first.line(("b", "c", 0, "y")) == 5
    assert first.line(("b", "c", 1)) == 6
    assert first.line(("b", "missing")) == 2
    assert second.line(("d",)) == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("0.1", 0.1),
        ("010", 8),
        ("yes", True),
        ("2026-01-01", "2026-01-01"),
        ('"5"', "5"),
        ("~", None),
    ],
)
def test_yaml_values_are_kubernetes(tmp_path: Path, text: str, value: object) -> None:
    (document,) = read_yaml(file(tmp_path, f"key: {text}\n"))
    assert document.data == {"key": value}
    assert type(document.data["key"]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\n", ":2: is not YAML: "),
        ("a: 1\na: 2\n", ":2: key a is there twice"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", ":3: keys must be plain text; merge keys are not read"),
        ("? [1]\n: 2\n", ":1: keys must be plain text; merge keys are not read"),
        (
            "a: !!python/object/apply:os.system [x]\n",
            ":1: tag tag:yaml.org,2002:python/object/apply:os.system is not read; remove it",
        ),
        ("a: !secret x\n", ":1: tag !secret is not read; remove it"),
        (b"\xff\xfe\x00", ": is not text in UTF-8"),
        ("a: " + "[" * 3000, ": is "),
    ],
)
def test_unreadable_yaml_is_one_sentence(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(UnreadableError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_aliases_of_aliases_are_stopped(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(UnreadableError, match="holds more than 100000 values"):
        read_yaml(file(tmp_path, "\n".join(lines)))


def test_toml_tells_lines_too(tmp_path: Path) -> None:
    text = '# comment\n[training]\nsteps = 5\n\n[quantize.linear.float8]\n"emulate" = true # x\n'
    document = read_toml(file(tmp_path, text, "c.toml"))
    assert document.line(("training",)) == 2
    assert document.line(("training", "steps")) == 3
    assert document.line(("quantize", "linear", "float8", "emulate")) == 6


def test_unreadable_toml_is_one_sentence(tmp_path: Path) -> None:
    path = file(tmp_path, "[training\n", "c.toml")
    with pytest.raises(UnreadableError, match="is not TOML"):
        read_toml(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
