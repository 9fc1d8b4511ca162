-- What people read; made anew whenever a file is brought to the newest schema.

-- The verdict of every audited cell: Holm's correction over all of its run, at a false alarm in 1,000; `weak` where only
-- a total variation distance above 0.05 would have been seen, `self` where the decoder was held against the law that it
-- computes itself; `fail` also where a shaped law is not its definition. The same as harness/results/audited.py.
CREATE OR REPLACE VIEW audited AS
WITH number AS (
    SELECT run_id, cell_id,  -- in one pass over the metrics, for there may be a million
           any_value(value) FILTER (metric = 'goodness_p') AS p, any_value(n) FILTER (metric = 'goodness_p') AS draws,
           any_value(value) FILTER (metric = 'visible_tvd') AS visible,
           coalesce(any_value(value) FILTER (metric = 'own_law'), 0) AS own,
           coalesce(any_value(value) FILTER (metric = 'definition_gap'), 0) AS gap
    FROM metric WHERE metric IN ('goodness_p', 'visible_tvd', 'own_law', 'definition_gap')
    GROUP BY run_id, cell_id HAVING bool_or(metric = 'goodness_p') AND bool_or(metric = 'visible_tvd')
), tested AS (
    SELECT c.run_id, c.cell_id, c.started, c.decoder, c.decoder_sha256, m.p, m.draws, m.visible, m.own, m.gap,
           row_number() OVER (PARTITION BY c.run_id ORDER BY m.p, c.cell_id) AS rank,
           count(*) OVER (PARTITION BY c.run_id) AS tests
    FROM cell c JOIN number m USING (run_id, cell_id) WHERE c.suite = 'audit' AND c.status = 'ok'
)
SELECT run_id, cell_id, started, decoder, decoder_sha256, draws,
       CASE WHEN gap > 1e-6
                 OR bool_and(p <= 1e-3 / (tests - rank + 1)) OVER (PARTITION BY run_id ORDER BY rank) THEN 'fail'
            WHEN visible > 0.05 THEN 'weak' WHEN own = 1 THEN 'self' ELSE 'pass' END AS audit
FROM tested;

-- What the audits say of each decoder as its source stood. A fail stands until a later audit with at least as many draws
-- finds nothing; else the best that was shown counts. Audits by changed code count only where there are no others.
CREATE OR REPLACE VIEW verdict AS
WITH known AS (
    SELECT a.*, coalesce(r.git_dirty, true) AS dirty FROM audited a JOIN run r USING (run_id)
    QUALIFY coalesce(r.git_dirty, true) = bool_and(coalesce(r.git_dirty, true)) OVER (PARTITION BY decoder, decoder_sha256)
), standing AS (
    FROM known f WHERE NOT (audit = 'fail' AND EXISTS (
        FROM known l WHERE (l.decoder, l.decoder_sha256) = (f.decoder, f.decoder_sha256)
        AND l.started > f.started AND l.draws >= f.draws AND l.audit <> 'fail'))
)
SELECT decoder, decoder_sha256,
       CASE WHEN bool_or(audit = 'fail') THEN 'fail'
            ELSE max_by(audit, list_position(['weak', 'self', 'pass'], audit)) END AS audit
FROM standing GROUP BY ALL;

-- One row per metric, and one with a null metric for a cell that has none. `audit` is null where nobody has audited the
-- decoder as its source stood.
CREATE OR REPLACE VIEW results AS
SELECT c.run_id, c.cell_id, c.started, c.suite, c.suite_version, c.scale, c.decoder, c.family, c.params, c.claim,
       a.audit, c.model, c.dtype, c.dataset, c.slice, m.metric, m.value, m.unit, m.better, m.ci_low,
       m.ci_high, m.n, m.baseline, c.seed, c.status, c.reason, c.notes,
       coalesce(c.hardware, r.hardware) AS hardware, r.git_commit, r.git_dirty
FROM cell c
LEFT JOIN metric m USING (run_id, cell_id)
LEFT JOIN run r USING (run_id)
LEFT JOIN verdict a ON (a.decoder, a.decoder_sha256) = (c.decoder, c.decoder_sha256);

CREATE OR REPLACE VIEW known_cell AS
SELECT c.* REPLACE (coalesce(c.hardware, r.hardware) AS hardware), r.git_commit, r.git_dirty
FROM cell c JOIN run r USING (run_id);

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
