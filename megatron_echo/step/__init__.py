"""The end of a step: where values are read, once."""
