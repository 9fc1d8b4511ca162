"""Markov chains over whole sequences, guided by first-order changes of the log-probability or by single sites."""

from decodathlon.decoders.mcmc import gibbs, gradient, multiple_try

__all__ = ["gibbs", "gradient", "multiple_try"]
