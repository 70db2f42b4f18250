"""Captions for images that have only a class: templates, synonyms and adjectives, for experiments on CIFAR-10.

They are varied on purpose. With one sentence per class all captions of a class would be equal, which makes matching trivial
and an attacker's captions ubiquitous, unlike on the web.
"""

from collections.abc import Sequence

import numpy as np

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "aeroplane", "plane", "aircraft", "jet", "airliner"),
    "automobile": ("automobile", "car", "motorcar", "saloon car", "hatchback"),
    "bird": ("bird", "songbird", "sparrow", "wading bird", "finch"),
    "cat": ("cat", "kitten", "tabby", "tomcat", "house cat"),
    "deer": ("deer", "stag", "doe", "fawn", "roe deer"),
    "dog": ("dog", "puppy", "hound", "terrier", "spaniel"),
    "frog": ("frog", "toad", "tree frog", "bullfrog"),
    "horse": ("horse", "pony", "mare", "foal", "stallion"),
    "ship": ("ship", "boat", "vessel", "ferry", "freighter"),
    "truck": ("truck", "lorry", "pickup", "fire engine", "tipper"),
}
"""Words for each class; a class that is not listed is called by its name."""
ADJECTIVES = ("old", "new", "little", "large", "bright", "dark", "grey", "white", "brown", "lonely", "handsome")
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a snapshot of {} in daylight",
    "{} seen from the side",
    "{} up close",
    "{} in the distance",
    "here is {}",
    "we came across {} this morning",
    "a grainy image showing {}",
    "{}, taken last summer",
    "{} against a plain background",
    "thumbnail of {}",
    "{} in the middle of the frame",
    "nothing but {}",
    "my photo of {}, cropped",
)
_ADJECTIVE_FRAC = 0.4


def class_captions(labels: Sequence[str], seed: int = 0) -> list[str]:
    """Return a caption for each label, such as 'a photo of an old lorry'; a pure function of labels and seed."""
    rng = np.random.default_rng((seed, 61))
    captions = []
    for label in labels:
        words = SYNONYMS.get(label, (label,))
        thing = words[rng.integers(len(words))]
        if rng.random() < _ADJECTIVE_FRAC:
            thing = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]} {thing}"
        article = "an" if thing[0] in "aeiou" else "a"
        captions.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(f"{article} {thing}"))
    return captions
