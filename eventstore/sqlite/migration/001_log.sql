-- What identifies this log, for its whole life.
CREATE TABLE deed_log (
  id      TEXT NOT NULL,
  created TEXT NOT NULL
);

-- A kind is an event type within a category. One index on kinds serves
-- queries by category, by type and by both.
CREATE TABLE deed_kinds (
  id       INTEGER PRIMARY KEY,
  category TEXT NOT NULL,
  type     TEXT NOT NULL,
  UNIQUE (category, type)
);

CREATE TABLE deed_streams (
  id       INTEGER PRIMARY KEY,
  category TEXT NOT NULL,
  name     TEXT NOT NULL,
  UNIQUE (category, name)
);

CREATE TABLE deed_events (
  position INTEGER PRIMARY KEY,
  stream   INTEGER NOT NULL,
  version  INTEGER NOT NULL,
  kind     INTEGER NOT NULL,
  id       BLOB NOT NULL,
  time     INTEGER NOT NULL, -- nanoseconds since 1970, UTC
  tags     TEXT,             -- joined by line feeds
  metadata TEXT,             -- JSON
  data     BLOB
);

-- Every index ends with the position, the table's row id.
CREATE INDEX deed_events_stream ON deed_events (stream);
CREATE INDEX deed_events_kind ON deed_events (kind);

CREATE TABLE deed_tags (
  tag      TEXT NOT NULL,
  position INTEGER NOT NULL,
  kind     INTEGER NOT NULL,
  PRIMARY KEY (tag, position)
) WITHOUT ROWID;

-- Idempotency keys. The rest of the receipt is in the events first to last.
CREATE TABLE deed_keys (
  key         TEXT PRIMARY KEY,
  fingerprint TEXT NOT NULL,
  first       INTEGER NOT NULL,
  last        INTEGER NOT NULL
) WITHOUT ROWID;

-- For people with a SQLite shell.
CREATE VIEW deed_history AS
  SELECT e.position, s.category || '-' || s.name AS stream, e.version, k.type,
         strftime('%Y-%m-%dT%H:%M:%fZ', e.time / 1e9, 'unixepoch') AS time,
         replace(e.tags, char(10), ' ') AS tags, e.metadata, CAST(e.data AS TEXT) AS data
  FROM deed_events e JOIN deed_streams s ON s.id = e.stream JOIN deed_kinds k ON k.id = e.kind;
