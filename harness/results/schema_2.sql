-- Schema 2, 2026-11-21: resumed runs, the whole record of a cell, units of metrics, gates.

ALTER TABLE cell ADD COLUMN attempts JSON;             -- how it ended before, in a run that was resumed
ALTER TABLE cell ADD COLUMN log VARCHAR;               -- end of the worker's output, of a cell that was not measured
ALTER TABLE cell ADD COLUMN conditions JSON;           -- what else the machine did meanwhile
ALTER TABLE cell ADD COLUMN protocol JSON;             -- how it was measured
ALTER TABLE cell ADD COLUMN weights JSON;              -- which model: fingerprint, revision, tokenizer
ALTER TABLE cell ADD COLUMN decoder_sha256 VARCHAR;    -- of the file that defines the decoder
ALTER TABLE cell ADD COLUMN shard_sha256 VARCHAR;      -- of the whole shard: two files that disagree are told apart
ALTER TABLE metric ADD COLUMN units JSON;              -- what it was computed from, unit by unit

CREATE TABLE gate (
    run_id VARCHAR,
    gate VARCHAR,              -- its rule, and for what it holds
    decoder VARCHAR,
    cell_id VARCHAR,           -- the cell that it judged
    outcome VARCHAR,           -- pass, fail, inconclusive, not run
    detail VARCHAR,
    judged TIMESTAMPTZ,
    PRIMARY KEY (run_id, gate, decoder, cell_id)
);
