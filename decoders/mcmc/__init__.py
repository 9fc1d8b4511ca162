"""Markov chains over whole sequences: by the gradient, by single sites, or by writing the rest of an answer anew."""

from decodathlon.decoders.mcmc import gibbs, gradient, multiple_try, smc_quest, suffix

__all__ = ["gibbs", "gradient", "multiple_try", "smc_quest", "suffix"]
