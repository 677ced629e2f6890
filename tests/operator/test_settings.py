"""Settings from the environment: every mistake is one sentence that names the variable."""

import pytest

from pretrain_operator.settings import Settings, SettingsError, load


def test_defaults_and_foreign_variables() -> None:
    assert load({"PATH": "/bin", "PRETRAIN_CONFIG": "x"}) == Settings()


def test_everything_can_be_set() -> None:
    settings = load(
        {
            "PRETRAIN_OPERATOR_NAMESPACES": "team-a, team-b",
            "PRETRAIN_OPERATOR_TRAINER_IMAGE": "registry/trainer:1",
            "PRETRAIN_OPERATOR_METRICS_PORT": "0",
            "PRETRAIN_OPERATOR_HEALTH_PORT": "8081",
            "PRETRAIN_OPERATOR_LOG_FORMAT": "json",
            "PRETRAIN_OPERATOR_LOG_LEVEL": "debug",
            "PRETRAIN_OPERATOR_RECONCILERS": "4",
            "PRETRAIN_OPERATOR_WORKER_PEERS": '[{"podSelector": {}}]',
            "PRETRAIN_OPERATOR_LEASE_NAMESPACE": "control",
            "PRETRAIN_OPERATOR_LEASE_NAME": "team.operator",
            "PRETRAIN_OPERATOR_LEASE_IDENTITY": "pod-1",
        }
    )
    assert settings.namespaces == ("team-a", "team-b")
    assert (settings.metrics_port, settings.health_port) == (0, 8081)
    assert settings.worker_peers == ({"podSelector": {}},)
    assert settings.log_level == "DEBUG"
    assert (settings.lease_namespace, settings.lease_name) == ("control", "team.operator")


def test_a_lease_is_switched_off_by_an_empty_namespace() -> None:
    assert load({"PRETRAIN_OPERATOR_LEASE_NAMESPACE": ""}).lease_namespace == ""


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NAMESPACES", "a,B_c", "'B_c' is no name of a namespace"),
        ("METRICS_PORT", "99999", "is no port"),
        ("LOG_FORMAT", "xml", "must be text or json"),
        ("RECONCILERS", "0", "from 1 to 1000"),
        ("WORKER_PEERS", "{}", "must be a JSON list"),
        ("WORKER_PEERS", "[1", "must be a JSON list"),
        ("LEASE_NAMESPACE", "a/b", "'a/b' is no name of a namespace"),
        ("LEASE_NAME", "-", "'-' is no name of an object"),
        ("TRAINER_IMAGE", "", "must not be empty"),
        ("TRAINER_IMAG", "x", "no such setting"),
    ],
)
def test_mistakes_name_the_variable(name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"PRETRAIN_OPERATOR_{name}: .*{says}"):
        load({f"PRETRAIN_OPERATOR_{name}": value})
