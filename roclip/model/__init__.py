"""open_clip towers: built from a name or a JSON file, loaded from files that nobody has to trust, and exported.

In: a model's name and the options of the `model` section. Out: `Towers`, called with pixels and tokens.
"""
