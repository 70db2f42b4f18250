"""Does this machine, or every node of a cluster, have what a config needs?"""
