"""The arena: people compare two decoders' answers to one prompt, blind. Sets of pairs, votes, and what they say."""
