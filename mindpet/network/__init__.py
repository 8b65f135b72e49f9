"""Questions to any network, and what is done to it: kinds of layers, paths, parameters and their values."""
