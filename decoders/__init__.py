"""The decoders: one file each, or a folder where one has several parts. The only place that knows methods."""
