"""Monitoring by Prometheus and Grafana: values from a run's files, dashboards and alerts from one registry of series."""
