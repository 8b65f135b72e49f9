"""Files of adapters and of bases, without a network."""
