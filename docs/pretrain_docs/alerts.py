"""The alerts as an object of the Prometheus operator, for those who install without Helm."""

from textwrap import indent

HEADER = """\
# Generated from charts/pretrain-operator/files/alerts.yaml (`make generate`); do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pretrain-operator
  namespace: pretrain-system
  labels:
    app.kubernetes.io/name: pretrain-operator
spec:
"""


def render(alerts: str) -> str:
    """The PrometheusRule for the text of a rule file."""
    return HEADER + indent(alerts, "  ")
