"""The alerts as an object of the Prometheus operator, for those who install without Helm.

As the chart renders them: what its own monitor scrapes has the monitor's name as the label ``job``,
so that an operator of another release hides nothing.
"""

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
ANY = "absent(pretrain_operator_leader == 1)"
MONITOR = "pretrain-system/pretrain-operator"
OWN = (
    f'label_replace(absent(pretrain_operator_leader{{job="{MONITOR}"}} == 1), '
    f'"job", "{MONITOR}", "", "")'
)


def render(alerts: str) -> str:
    """The PrometheusRule for the text of a rule file."""
    return HEADER + indent(alerts.replace(ANY, OWN), "  ")
