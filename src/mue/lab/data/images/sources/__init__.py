"""Images that come with an installed package, one file a source, registered by the name that ``[data] source`` says."""
