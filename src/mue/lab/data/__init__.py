"""Text or images in: corpora as memory-mapped streams of tokens, images as arrays in memory; batches as a pure function of (seed, step).

    corpus  = load_corpus(Path("my_text/"), cache=Path("runs/cache"))     # or stdlib_corpus(cache): no download
    batches = Batches(corpus, "train", sequence=256, batch_sequences=32, seed=0)
    x_BT, y_BT = batches.at(1_000_000)                                     # any step, at once

A corpus is tokenised once into ``cache/<hash>.bin``; the JSON beside it is written last and is what makes it valid.
The cached file is itself a pre-tokenised source: ``load_corpus(cache / "<hash>.bin", ...)`` reads it.
``images`` reads images. ``spec`` reads the ``[data]`` table of an experiment file. Not here: what a task makes of the data (``mue.lab.tasks``).
"""

from mue.lab.data.batches import Batches
from mue.lab.data.corpus import Corpus, load_corpus, stdlib_corpus
from mue.lab.data.images import ImageSet, load_images
from mue.lab.data.sources import TEXT_SUFFIXES
from mue.lab.data.spec import Data

__all__ = ["TEXT_SUFFIXES", "Batches", "Corpus", "Data", "ImageSet", "load_corpus", "load_images", "stdlib_corpus"]
