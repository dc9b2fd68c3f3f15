-- What identifies this log, for its whole life.
CREATE TABLE {schema}.log (
  id      uuid PRIMARY KEY,
  created timestamptz NOT NULL DEFAULT now()
);

-- A kind is an event type within a category. One index on kinds serves
-- queries by category, by type and by both.
CREATE TABLE {schema}.kinds (
  id       int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  category text COLLATE "C" NOT NULL,
  type     text COLLATE "C" NOT NULL,
  UNIQUE (category, type)
);

-- The log. Positions are given by the writer, under the lock, and never by a
-- sequence: without the lock two writers fail on the primary key instead of
-- leaving a hole.
CREATE TABLE {schema}.events (
  position bigint PRIMARY KEY,
  version  bigint NOT NULL,
  kind     int NOT NULL,
  slice    smallint NOT NULL,
  id       uuid NOT NULL,
  time     bigint NOT NULL,            -- nanoseconds since 1970, UTC
  stream   text COLLATE "C" NOT NULL,  -- category-id
  tags     text[],
  metadata text,                       -- JSON
  data     bytea,
  UNIQUE (stream, version)
);
CREATE INDEX events_kind ON {schema}.events (kind, position);

CREATE TABLE {schema}.tags (
  tag      text COLLATE "C" NOT NULL,
  position bigint NOT NULL,
  kind     int NOT NULL,
  PRIMARY KEY (tag, position)
);

-- Idempotency keys. The rest of the receipt is in the events first to last.
CREATE TABLE {schema}.keys (
  key         text COLLATE "C" PRIMARY KEY,
  fingerprint bytea NOT NULL,
  first       bigint NOT NULL,
  last        bigint NOT NULL
);

-- Events are only ever added: the statistics that matter to the planner and the
-- visibility map are kept by vacuuming after inserts.
ALTER TABLE {schema}.events SET (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
ALTER TABLE {schema}.tags SET (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- Takes the lock of the log for the rest of the transaction and returns how
-- long it waited, in microseconds. Whoever has it is the only writer. What is
-- read in a later statement sees every commit of earlier holders, because
-- PostgreSQL makes a commit visible before it releases its locks; that needs a
-- snapshot per statement, which only READ COMMITTED takes.
CREATE FUNCTION {schema}.lock_log(lock bigint) RETURNS bigint
LANGUAGE plpgsql
-- Whoever waits longer looks for a holder that was stopped.
SET lock_timeout = '3s'
AS $$
DECLARE
  began timestamptz := clock_timestamp();
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'deed appends need READ COMMITTED, this transaction is %', upper(current_setting('transaction_isolation'))
      USING ERRCODE = 'DE002', HINT = 'begin the transaction with ISOLATION LEVEL READ COMMITTED';
  END IF;
  PERFORM pg_advisory_xact_lock(lock);
  RETURN extract(epoch FROM clock_timestamp() - began) * 1000000;
END $$;

-- Writes a batch that was judged on the log up to the known position, in one
-- round trip, also when others have written since: if nothing that the batch
-- relies on was touched, the events move up behind the new head. Otherwise
-- nothing is written. What others have written comes back in both cases, so
-- that the caller can judge (again) on it.
--
-- The first row is the verdict: the head before the batch, whether it was
-- written (version 1 or 0), and in kind the microseconds waited for the lock;
-- the others are the events after the known position, unless there are more
-- than the caller wants to see.
--
-- events_* are one element an event; tags_event is the number of the event in
-- the batch, from 1 on, as are keys_first and keys_last. streams are those whose
-- revision the batch relies on, items what must not have been appended since:
-- an item is touched by an event that fits all of its columns that are not null.
CREATE FUNCTION {schema}.append_events(
  lock bigint, known bigint, most int,
  streams text[],
  items_stream text[], items_category text[], items_types text[], items_tags text[],
  events_version bigint[], events_kind int[], events_slice smallint[], events_id uuid[], events_time bigint[],
  events_stream text[], events_tags text[], events_metadata text[], events_data bytea[],
  tags_tag text[], tags_event int[], tags_kind int[],
  keys_key text[], keys_fingerprint bytea[], keys_first int[], keys_last int[]
) RETURNS TABLE (r_position bigint, r_version bigint, r_kind int, r_id uuid, r_stream text, r_tags text[])
LANGUAGE plpgsql
-- A plan that was made while the tables were empty would scan them for ever.
SET enable_seqscan = off SET jit = off SET lock_timeout = '3s'
AS $$
DECLARE
  began   timestamptz := clock_timestamp();
  waited  bigint;
  head    bigint;
  touched boolean := false;
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'deed appends need READ COMMITTED, this transaction is %', upper(current_setting('transaction_isolation'))
      USING ERRCODE = 'DE002', HINT = 'begin the transaction with ISOLATION LEVEL READ COMMITTED';
  END IF;
  PERFORM pg_advisory_xact_lock(lock);
  waited := extract(epoch FROM clock_timestamp() - began) * 1000000;
  SELECT coalesce(max(e.position), 0) INTO head FROM {schema}.events e;
  IF head < known THEN
    RAISE EXCEPTION 'the log ends at position %, but position % was written before', head, known USING ERRCODE = 'DE003';
  END IF;
  IF head > known THEN
    touched := head - known > most
      OR EXISTS (SELECT FROM {schema}.events e WHERE e.position > known AND (e.stream = ANY (streams) OR e.id = ANY (events_id)))
      OR EXISTS (SELECT FROM {schema}.keys k WHERE k.key = ANY (keys_key))
      OR cardinality(items_stream) > 0 AND EXISTS (
        SELECT FROM {schema}.events e JOIN {schema}.kinds k ON k.id = e.kind
        CROSS JOIN unnest(items_stream, items_category, items_types, items_tags) AS i (stream, category, types, tags)
        WHERE e.position > known
          AND (i.stream IS NULL OR e.stream = i.stream)
          AND (i.category IS NULL OR k.category = i.category)
          AND (i.types IS NULL OR k.type = ANY (string_to_array(i.types, E'\n')))
          AND (i.tags IS NULL OR e.tags @> string_to_array(i.tags, E'\n')));
  END IF;
  RETURN QUERY SELECT head, CASE WHEN touched THEN 0::bigint ELSE 1::bigint END, least(waited, 2147483647)::int, NULL::uuid, NULL::text, NULL::text[];
  IF head > known AND head - known <= most THEN
    RETURN QUERY SELECT e.position, e.version, e.kind, e.id, e.stream, e.tags
      FROM {schema}.events e WHERE e.position > known ORDER BY e.position;
  END IF;
  IF touched THEN
    RETURN;
  END IF;
  INSERT INTO {schema}.events (position, version, kind, slice, id, time, stream, tags, metadata, data)
    SELECT head + b.n, b.version, b.kind, b.slice, b.id, b.time, b.stream, string_to_array(b.tags, E'\n'), b.metadata, b.data
    FROM unnest(events_version, events_kind, events_slice, events_id, events_time, events_stream, events_tags, events_metadata, events_data)
      WITH ORDINALITY AS b (version, kind, slice, id, time, stream, tags, metadata, data, n);
  IF cardinality(tags_tag) > 0 THEN
    INSERT INTO {schema}.tags (tag, position, kind)
      SELECT b.tag, head + b.event, b.kind FROM unnest(tags_tag, tags_event, tags_kind) AS b (tag, event, kind);
  END IF;
  IF cardinality(keys_key) > 0 THEN
    INSERT INTO {schema}.keys (key, fingerprint, first, last)
      SELECT b.key, b.fingerprint, head + b.first, head + b.last
      FROM unnest(keys_key, keys_fingerprint, keys_first, keys_last) AS b (key, fingerprint, first, last);
  END IF;
END $$;

-- For people with psql.
CREATE VIEW {schema}.history AS
  SELECT e.position, e.stream, e.version, k.type,
         to_timestamp(e.time / 1e9) AS time, e.tags, e.metadata,
         CASE WHEN e.metadata LIKE '%"codec":%' THEN encode(e.data, 'base64') ELSE convert_from(e.data, 'UTF8') END AS data
  FROM {schema}.events e JOIN {schema}.kinds k ON k.id = e.kind;
