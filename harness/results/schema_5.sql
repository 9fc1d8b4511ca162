-- Schema 5, 2026-11-21: the verdict of the audit stands beside every row (`audited`, `verdict`); the tables stay.

DROP VIEW IF EXISTS latest;
DROP VIEW IF EXISTS results;
