-- Schema 3, 2026-11-21: what the decoders, suites and metrics of a run are, as the plugins that it had described them.

ALTER TABLE run ADD COLUMN about JSON;
