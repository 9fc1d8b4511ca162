"""How things are measured: speed, memory, perplexity, and the statistics that they share."""
