"""Where cells run: in worker processes (`local`), or in this one (`inline`)."""
