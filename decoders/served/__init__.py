"""Decoders on servers: what each does with answers that an engine writes, where it shows no logits."""

from decodathlon.decoders.served import best_of as best_of
from decodathlon.decoders.served import plain as plain
from decodathlon.decoders.served import steps as steps
from decodathlon.decoders.served import suffix as suffix
