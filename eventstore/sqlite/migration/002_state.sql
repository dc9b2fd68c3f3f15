-- What background work keeps: rows of views and the like, by table and key.
CREATE TABLE deed_tables (
  id   INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE
);

CREATE TABLE deed_rows (
  tbl   INTEGER NOT NULL,
  key   TEXT NOT NULL,
  value BLOB,
  PRIMARY KEY (tbl, key)
) WITHOUT ROWID;

CREATE TABLE deed_checkpoints (
  name     TEXT PRIMARY KEY,
  log      TEXT NOT NULL,
  epoch    INTEGER NOT NULL,
  position INTEGER NOT NULL
) WITHOUT ROWID;

-- The epoch outlives the lease.
CREATE TABLE deed_leases (
  name  TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  held  INTEGER NOT NULL, -- 0: released, or its process has ended
  until INTEGER NOT NULL  -- nanoseconds since 1970; 0: not by time
) WITHOUT ROWID;
