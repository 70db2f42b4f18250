"""The oracle check: a segmentation network that never saw the crawled data contradicts a poisoned model.

In: a checkpoint, its shards, trusted images with masks. Out: a verdict with reasons, the triggers, the victims, and a set that
repairs the model. Read `check.py` first, which calls the rest in order.

    segmenters/    oracles: trained here, or taken from torchvision, transformers or human masks
    scan/          model and oracle score every distinct image, shard by shard
    statistics.py  which disagreements are not explained by chance?
    triggers/      what causes a label? proved by putting it on trusted images
    victims.py     which samples taught the trigger (memory.py); curate.py: the set that repairs the model
    verdict.py     the verdict and its reasons; report.py, figures.py: the report; ground_truth.py: its accuracy
    measure.py     accuracy and trigger success of a model on trusted images, before and after a repair

After arXiv:2511.13545, with an oracle trained on masks instead of a second CLIP, and with a test against trusted
images instead of a set difference.
"""
