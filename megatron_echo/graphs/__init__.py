"""CUDA graphs of whole training steps, and their stand-in on a CPU."""
