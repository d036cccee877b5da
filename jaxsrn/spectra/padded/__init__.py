"""Zero padding: the search for the leading pair of a layer that has no symbol."""
