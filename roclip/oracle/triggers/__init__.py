"""The trigger search: which change to trusted images makes the model answer a suspected label?

In: images on which model and oracle disagree. Out: found triggers, each with its trials and controls.
"""
