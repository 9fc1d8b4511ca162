"""Engines behind a server that speaks the OpenAI protocol: how they are reached, what each calls its parameters, and
what one does with them when it is asked."""
