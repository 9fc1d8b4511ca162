"""The measuring machine. It knows no decoder by name; what has a name reaches it through the registry."""
