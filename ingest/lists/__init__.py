"""URL lists to parts: one part becomes one shard. The same list gives the same parts, whatever the format."""
