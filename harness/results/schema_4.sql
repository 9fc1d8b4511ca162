-- Schema 4, 2026-11-21: what is sound is told apart from what is newest (`sound_cell`, `newest_of`); the tables stay.

DROP VIEW IF EXISTS latest;
DROP VIEW IF EXISTS latest_cell;
