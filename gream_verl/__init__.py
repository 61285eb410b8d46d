"""GREAM, generative reasoning recommendation, as a plugin for stock verl."""

__version__ = "0.1.0"
