"""The suites: a page each of what is measured. How it is measured lives in `harness/measure`."""
