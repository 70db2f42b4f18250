"""The oracle check: a segmentation network that never saw the crawled data contradicts a poisoned model.

Read `check.py` first: the order of things.

    eyes       base.py (what an oracle is), trained.py, torchvision_net.py, transformers_net.py, annotations.py, opening.py,
               vocabulary.py, naming.py; mask_sets.py reads what one is trained on
    pass       scorer.py, look.py, shard_record.py, scan.py: model and oracle look at every image, shard by shard
    tests      statistics.py: which disagreements does chance not explain?
    trigger    search.py: occlusion.py, shape.py, paste.py, global_pattern.py, inversion.py, presence.py: what causes a
    label, shown by
               doing it
    victims    victims.py, memory.py, curate.py: whom it was taught with, the set that repairs it; measure.py: what a repair did
    words      verdict.py, run_report.py, figures.py, ground_truth.py

After arXiv:2511.13545, with an oracle trained on masks instead of a second CLIP, and with a test against trusted
images instead of a set difference.
"""
