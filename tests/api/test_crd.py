"""The committed CRD is the models' own, structural, and small."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain_api import crd, names
from pretrain_api.job import JobSpec
from pretrain_api.status import JobStatus

# What a structural schema may hold (apiextensions.k8s.io/v1), beside x-kubernetes extensions.
KEYWORDS = {
    "type", "description", "properties", "required", "items", "additionalProperties", "enum",
    "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength",
    "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "default",
}  # fmt: skip


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    return yaml.safe_load(crd.render())


@pytest.fixture(scope="module")
def version(definition: dict[str, Any]) -> dict[str, Any]:
    (version,) = definition["spec"]["versions"]
    return version


@pytest.fixture(scope="module")
def root(version: dict[str, Any]) -> dict[str, Any]:
    return version["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


def test_committed_file_is_fresh(repository: Path) -> None:
    assert crd.main(["--check", "--file", str(repository / crd.FILE)]) == 0


def test_stale_file_is_noticed_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "crds" / "crd.yaml"
    assert crd.main(["--check", "--file", str(file)]) == 1
    assert crd.main(["--file", str(file)]) == 0
    assert crd.main(["--check", "--file", str(file)]) == 0
    file.write_text(file.read_text().replace("Namespaced", "Cluster"))
    assert crd.main(["--check", "--file", str(file)]) == 1
    assert f"{file} is stale; run python -m pretrain_api.crd" in capsys.readouterr().err


def test_yaml_holds_what_was_generated(definition: dict[str, Any]) -> None:
    assert definition == crd.definition()


def test_it_is_small_enough_for_client_side_apply() -> None:
    assert len(crd.render().encode()) < crd.SIZE_LIMIT


def test_schema_is_structural(root: dict[str, Any]) -> None:
    for path, node in nodes(root):
        unknown = {key for key in node if not key.startswith("x-kubernetes-")} - KEYWORDS
        assert not unknown, path
        assert "type" in node or "x-kubernetes-int-or-string" in node, path
        assert not ("properties" in node and "additionalProperties" in node), path


def test_every_list_says_how_it_merges_and_has_a_bound(root: dict[str, Any]) -> None:
    for path, node in nodes(root):
        if node.get("type") == "array":
            assert node["x-kubernetes-list-type"] in ("atomic", "map"), path
            assert "maxItems" in node, path


def test_every_field_is_explained(root: dict[str, Any]) -> None:
    envelope = {".apiVersion", ".kind", ".metadata", ".metadata.name", ".spec", ".status"}
    for path, node in nodes(root):
        if path and not path.endswith("[]") and path not in envelope:
            assert node.get("description"), path


def test_defaults_are_told_but_only_needed_ones_are_stored(root: dict[str, Any]) -> None:
    stored = {path: node["default"] for path, node in nodes(root) if "default" in node}
    assert stored == {
        ".spec.suspend": False,
        ".spec.workers": {},
        ".spec.workers.replicas": 1,
        ".spec.workers.processesPerWorker": 1,
    }
    told = root["properties"]["spec"]["properties"]["training"]["properties"]["steps"]
    assert told["description"].endswith("Default: 10000.")


def test_every_rule_has_a_message_and_names_a_field(root: dict[str, Any]) -> None:
    paths = {path for path, _ in nodes(root)}
    for path, node in nodes(root):
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"], path
            assert f"{path}{rule.get('fieldPath', '')}" in paths


def test_what_is_written_has_the_models_fields(root: dict[str, Any]) -> None:
    for part, model in (("spec", JobSpec), ("status", JobStatus)):
        aliases = {field.alias for field in model.model_fields.values()}
        assert set(root["properties"][part]["properties"]) == aliases


def test_columns_read_fields_that_exist(version: dict[str, Any], root: dict[str, Any]) -> None:
    paths = {path for path, _ in nodes(root)} | {".metadata.creationTimestamp"}
    columns = version["additionalPrinterColumns"]
    assert {column["jsonPath"] for column in columns} <= paths
    assert [column["name"] for column in columns if "priority" not in column] == [
        "Phase", "Step", "Loss", "Tokens/s", "ETA", "Workers", "Restarts", "Checkpoint", "Age",
    ]  # fmt: skip


def test_scale_reads_fields_that_exist(version: dict[str, Any], root: dict[str, Any]) -> None:
    paths = {path for path, _ in nodes(root)}
    assert set(version["subresources"]["scale"].values()) <= paths
    assert version["subresources"]["status"] == {}


def test_names_are_the_constants(definition: dict[str, Any]) -> None:
    assert definition["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert definition["spec"]["names"]["shortNames"] == ["ptj"]
    assert f"{names.GROUP}/{names.VERSION}" == names.API_VERSION


def test_kubernetes_own_schema_accepts_it(definition: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(definition, "1.34", strict=True)
