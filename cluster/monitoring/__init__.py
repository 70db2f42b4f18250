"""What Prometheus, Grafana and alerts see of a run: published from its files, defined in one registry."""
