"""`roclip doctor`: checks whether this machine, or every node of a cluster, has what a config needs."""
