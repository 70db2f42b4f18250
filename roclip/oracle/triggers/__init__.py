"""The search for triggers: what, put on trusted images, makes the model say a suspected label.

In: images that the model and the oracle disagree about. Out: found triggers, each with its evidence and controls.
"""
