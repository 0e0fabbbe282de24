"""Images in, two arrays of pixels out: what a task on images trains on, and what it holds out.

    digits = load_images("digits")                                    # scikit-learn's, 8 x 8: no download
    own = load_images([Path("photos/")], size=32, odd="crop")         # photos/cat/1.png is a cat

``sources`` has what comes with an installed package, one file a source, registered by the name that ``[data] source`` says; ``files`` reads
pictures and ``arrays`` reads NumPy's, MNIST's and CIFAR's files. Which image is held out is in ``split``.
Not here: what a task makes of the pixels (``mue.lab.tasks``).
"""

from mue.lab.data.images.image_set import ImageSet
from mue.lab.data.images.load import load_images

__all__ = ["ImageSet", "load_images"]
