"""Images that come with an installed package, one file a source, registered by the name that ``[data] source`` says.

Here: which images a source has, and which of them are held out. Not here: files on disk (``mue.lab.data.images.files``), and what is done
to images of another size (``mue.lab.data.images.load``).
"""
