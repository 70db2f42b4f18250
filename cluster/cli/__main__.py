"""`python -m cluster.cli`: the `roclip` command, where its script is not on the path."""

from cluster.cli.main import main

main()
