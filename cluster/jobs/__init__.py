"""Runs as Ray Jobs on a cluster, from outside: submit one, follow its log, stop it."""
