"""Reads URL lists and cuts them into parts: one part becomes one shard. The same list gives the same parts, whatever its
format.
"""
