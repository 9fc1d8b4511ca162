"""The `decodathlon` command. One file per sub-command, which registers itself; plugins add theirs the same way."""
