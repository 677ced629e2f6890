"""What is generated from something else, for readers and for those who install without Helm.

The API reference comes from the definition, the chart's README from its values, and the
PrometheusRule from the chart's alerts.
"""
