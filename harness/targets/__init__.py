"""Targets: the one seam between decoders and models. `base` is the protocol; start reading there."""
