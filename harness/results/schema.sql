-- The store. Append-only facts, no foreign keys; `results` is what people read.

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

-- One row per metric, and one with a null metric for a cell that has none. `audit` is null until a cell was audited.
CREATE VIEW results AS
SELECT c.run_id, c.cell_id, c.started, c.suite, c.scale, c.decoder, c.family, c.params, c.claim,
       NULL::VARCHAR AS audit, c.model, c.dtype, c.dataset, c.slice, m.metric, m.value, m.unit, m.better, m.ci_low,
       m.ci_high, m.n, m.baseline, c.seed, c.status, c.reason, r.hardware, r.git_commit, r.git_dirty
FROM cell c
LEFT JOIN metric m USING (run_id, cell_id)
LEFT JOIN run r USING (run_id);

-- The newest row of each thing measured on each kind of machine.
CREATE VIEW latest AS
SELECT * FROM results
QUALIFY row_number() OVER (PARTITION BY cell_id, metric, hardware, dataset ORDER BY started DESC) = 1;
