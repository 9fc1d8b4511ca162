-- Schema 6, 2026-11-23: runs on several machines. A cell says where it was measured; what does not has its run's hardware.

ALTER TABLE cell ADD COLUMN hardware VARCHAR;
ALTER TABLE cell ADD COLUMN place JSON;                -- node, GPU (UUID, driver, clocks)
DROP VIEW IF EXISTS latest;
DROP VIEW IF EXISTS latest_cell;
DROP VIEW IF EXISTS sound_cell;
DROP VIEW IF EXISTS known_cell;
DROP VIEW IF EXISTS results;
