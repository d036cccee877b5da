"""Zero padding: the leading pair of a layer that has no symbol, proven where it is small, else searched for."""
