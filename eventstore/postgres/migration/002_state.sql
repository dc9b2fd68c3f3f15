-- What background work keeps: rows of views and the like, by table and key.
-- Keys are bytes, so that any string is one and their order is that of bytes.
CREATE TABLE {schema}.tables (
  id   int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name text COLLATE "C" NOT NULL UNIQUE
);

CREATE TABLE {schema}.rows (
  tbl   int NOT NULL,
  key   bytea NOT NULL,
  value bytea,
  PRIMARY KEY (tbl, key)
);
-- Rows are rewritten all the time, and none of their indexed columns: leave room
-- on each page for the next version.
ALTER TABLE {schema}.rows SET (fillfactor = 70);

CREATE TABLE {schema}.checkpoints (
  name     text COLLATE "C" PRIMARY KEY,
  log      text NOT NULL,
  epoch    bigint NOT NULL,
  position bigint NOT NULL
);
ALTER TABLE {schema}.checkpoints SET (fillfactor = 50);

-- Processes that hold leases, and until when each is believed to live without
-- another heartbeat, by the database's clock.
CREATE TABLE {schema}.members (
  id    uuid PRIMARY KEY,
  until timestamptz NOT NULL
);

-- The epoch outlives the lease. A lease without an end by time is held as long
-- as its member lives.
CREATE TABLE {schema}.leases (
  name   text COLLATE "C" PRIMARY KEY,
  owner  text NOT NULL,
  epoch  bigint NOT NULL,
  held   boolean NOT NULL,
  until  timestamptz,
  member uuid
);
ALTER TABLE {schema}.leases SET (fillfactor = 50);

-- For people with psql.
CREATE VIEW {schema}.view_rows AS
  SELECT t.name AS view, encode(r.key, 'escape') AS key, encode(r.value, 'escape') AS value
  FROM {schema}.rows r JOIN {schema}.tables t ON t.id = r.tbl;
