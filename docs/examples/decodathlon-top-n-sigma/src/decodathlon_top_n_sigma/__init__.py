"""Top-n-sigma sampling: the tokens whose logits lie within n standard deviations of the greatest."""

from decodathlon import Sampler, decoder


@decoder(
    "top-n-sigma",
    claim="shaped",
    bounds={"n": "(0, inf)", "temperature": "[0.01, 100]"},
    sweep={"n": [0.5, 1.0, 2.0]},
    paper="Tang, Liu, Xu, Zhang 2024, Top-nσ: Not All Logits Are You Need",
)
class TopNSigma(Sampler):
    """The tokens whose logit is at least the greatest minus n standard deviations of all logits, renormalised.

    The cut is made before the temperature, so the temperature changes how probable the kept tokens are, not which.
    """

    n: float = 1.0
    temperature: float = 1.0

    def shape(self, logits):
        greatest = logits.max(-1, keepdim=True).values
        kept = logits >= greatest - self.n * logits.std(-1, keepdim=True, correction=0)
        return (logits / self.temperature).masked_fill(~kept, float("-inf")).log_softmax(-1)
