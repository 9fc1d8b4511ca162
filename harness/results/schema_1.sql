-- Schema 1, 2026-11-21. Append-only facts, no foreign keys; `results` (views.sql) is what people read.
-- Files in use have this; a change is a new schema_N.sql.

CREATE TABLE migration (version INTEGER PRIMARY KEY, applied TIMESTAMPTZ DEFAULT now());

CREATE TABLE run (
    run_id VARCHAR PRIMARY KEY,
    started TIMESTAMPTZ,
    hardware VARCHAR,
    git_commit VARCHAR,
    git_dirty BOOLEAN,
    environment JSON,          -- versions, machine
    options JSON               -- what the user asked for
);

CREATE TABLE cell (
    run_id VARCHAR,
    cell_id VARCHAR,
    started TIMESTAMPTZ,
    suite VARCHAR,
    suite_version INTEGER,
    slice VARCHAR,
    scale VARCHAR,
    decoder VARCHAR,           -- spec string
    family VARCHAR,
    params JSON,
    claim VARCHAR,
    model VARCHAR,
    dtype VARCHAR,
    device VARCHAR,
    dataset VARCHAR,
    data JSON,                 -- revision, split, source, hash of the text
    sizes JSON,                -- the fixed sample sizes
    seed BIGINT,
    status VARCHAR,
    reason VARCHAR,
    error VARCHAR,
    seconds JSON,
    notes JSON,
    PRIMARY KEY (run_id, cell_id)
);

CREATE TABLE metric (
    run_id VARCHAR,
    cell_id VARCHAR,
    metric VARCHAR,
    value DOUBLE,
    unit VARCHAR,
    better VARCHAR,
    ci_low DOUBLE,
    ci_high DOUBLE,
    n BIGINT,
    baseline VARCHAR,
    PRIMARY KEY (run_id, cell_id, metric)
);

CREATE TABLE sample (run_id VARCHAR, cell_id VARCHAR, place INTEGER, row VARCHAR, data JSON,
    PRIMARY KEY (run_id, cell_id, place));
CREATE TABLE cycle (run_id VARCHAR, cell_id VARCHAR, place INTEGER, data JSON, PRIMARY KEY (run_id, cell_id, place));
CREATE TABLE profile (run_id VARCHAR, cell_id VARCHAR, stack VARCHAR, seconds DOUBLE);
CREATE TABLE vote (vote_id VARCHAR PRIMARY KEY, pair_id VARCHAR, annotator VARCHAR, choice VARCHAR, voted TIMESTAMPTZ);
