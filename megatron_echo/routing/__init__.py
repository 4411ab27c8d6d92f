"""The router's part of the layer."""
