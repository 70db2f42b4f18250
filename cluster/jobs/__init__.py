"""Runs as Ray Jobs on a cluster, from outside: send one, follow its log, stop it."""
