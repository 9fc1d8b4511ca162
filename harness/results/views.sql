-- What people read; made anew whenever a file is brought to the newest schema.

-- One row per metric, and one with a null metric for a cell that has none. `audit` is null until a cell was audited.
CREATE OR REPLACE VIEW results AS
SELECT c.run_id, c.cell_id, c.started, c.suite, c.suite_version, c.scale, c.decoder, c.family, c.params, c.claim,
       NULL::VARCHAR AS audit, c.model, c.dtype, c.dataset, c.slice, m.metric, m.value, m.unit, m.better, m.ci_low,
       m.ci_high, m.n, m.baseline, c.seed, c.status, c.reason, c.notes, r.hardware, r.git_commit, r.git_dirty
FROM cell c
LEFT JOIN metric m USING (run_id, cell_id)
LEFT JOIN run r USING (run_id);

CREATE OR REPLACE VIEW known_cell AS
SELECT c.*, r.hardware, r.git_commit, r.git_dirty FROM cell c JOIN run r USING (run_id);

-- What nothing speaks against: measured whole, by known code, on real data.
CREATE OR REPLACE VIEW sound_cell AS
FROM known_cell
WHERE status = 'ok' AND git_dirty IS false AND coalesce(data->>'source', '') <> 'stand-in'
  AND NOT coalesce(starts_with(dataset, 'unverified'), false);

-- The newest cell of each thing measured on each kind of machine, by the newest version of its suite that was measured
-- there. "The same thing" is spelt out, because `--device auto` and `--device cpu` may be.
CREATE OR REPLACE MACRO newest_of(cells) AS TABLE
SELECT c.* FROM query_table(cells) c
-- A cell that failed before its model was loaded knows neither dtype nor data, but it has its id: it stands for all data
-- until one of them is measured again.
SEMI JOIN (
    SELECT run_id, cell_id FROM query_table(cells)
    QUALIFY row_number() OVER (PARTITION BY cell_id, hardware, dataset ORDER BY started DESC, run_id DESC) = 1
        AND started >= coalesce(max(started) FILTER (dataset IS NULL) OVER (PARTITION BY cell_id, hardware), started)
        AND (dataset IS NOT NULL
             OR row_number() OVER (PARTITION BY cell_id, hardware ORDER BY started DESC, run_id DESC) = 1)
) u ON c.run_id = u.run_id AND c.cell_id = u.cell_id
LEFT JOIN (
    SELECT suite, model, scale, seed, hardware, max(suite_version) AS newest FROM query_table(cells)
    WHERE status IN ('ok', 'partial') GROUP BY ALL
) v ON (c.suite, c.model, c.scale, c.seed, c.hardware) = (v.suite, v.model, v.scale, v.seed, v.hardware)
WHERE c.suite_version >= coalesce(v.newest, c.suite_version)
QUALIFY row_number() OVER (
    PARTITION BY c.suite, c.suite_version, c.slice, c.scale, c.decoder, c.model, c.dtype, c.dataset, c.seed, c.hardware
    ORDER BY c.started DESC, c.run_id DESC
) = 1;

CREATE OR REPLACE VIEW latest_cell AS FROM newest_of('known_cell');

-- Its rows with all its metrics: never one metric of an old cell beside another of a new one.
CREATE OR REPLACE VIEW latest AS
SELECT results.* FROM results SEMI JOIN latest_cell USING (run_id, cell_id);
