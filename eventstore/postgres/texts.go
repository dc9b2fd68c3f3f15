package postgres

import "strings"

// texts are the statements whose form does not vary, for one schema.
type texts struct {
	head, lastEvent                  string
	delta, heads, receipts           string
	appendEvents, appendBatch        string
	commitMode                       string // how batches are committed; "" for as the session says
	copyEvents, copyTags             string
	copyKeys, lock, lockTimed        string
	ends, notify, notifyAll, written string
}

func newTexts(schema string) texts {
	with := func(text string) string { return strings.ReplaceAll(text, "{schema}", schema) }
	t := texts{
		head:      with("SELECT max(position) FROM {schema}.events"),
		lastEvent: with("SELECT id FROM {schema}.events WHERE position = $1"),
		delta:     with("SELECT e.position, e.version, e.kind, e.id, e.stream, e.tags FROM {schema}.events e WHERE e.position > $1 ORDER BY e.position LIMIT $2"),
		heads: with(`SELECT n.stream, e.version, e.position, e.id FROM unnest($1::text[]) AS n (stream)
			CROSS JOIN LATERAL (SELECT version, position, id FROM {schema}.events WHERE stream = n.stream ORDER BY version DESC LIMIT 1) e`),
		receipts: with(`SELECT k.key, k.fingerprint, k.first, k.last, e.stream, e.version, e.position
			FROM {schema}.keys k JOIN {schema}.events e ON e.position BETWEEN k.first AND k.last
			WHERE k.key = ANY ($1::text[]) ORDER BY e.position`),
		appendEvents: with("SELECT r_position, r_version, r_kind, r_id, r_stream, r_tags FROM {schema}.append_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24)"),
		copyEvents:   with("COPY {schema}.events (position, version, kind, slice, id, time, stream, tags, metadata, data) FROM STDIN (FORMAT binary)"),
		copyTags:     with("COPY {schema}.tags (tag, position, kind) FROM STDIN (FORMAT binary)"),
		copyKeys:     with("COPY {schema}.keys (key, fingerprint, first, last) FROM STDIN (FORMAT binary)"),
		lock:         with("SELECT {schema}.lock_log($1)"),
		lockTimed:    "SELECT clock_timestamp(), pg_advisory_xact_lock($1), clock_timestamp()",
		ends: with(`SELECT e.position, e.id FROM (VALUES (1)) AS one (row)
			LEFT JOIN LATERAL (SELECT position, id FROM {schema}.events ORDER BY position DESC LIMIT 1) e ON true`),
		written: with(`SELECT f.id, e.position, e.version FROM (SELECT e.position, e.id, n.size FROM {schema}.events e
				JOIN unnest($2::text[], $3::int[]) AS n (id, size) ON n.id::uuid = e.id WHERE e.position > $1 OFFSET 0) f
			CROSS JOIN LATERAL (SELECT position, version FROM {schema}.events WHERE position >= f.position AND position < f.position + f.size ORDER BY position OFFSET 0) e
			ORDER BY e.position`),
		notify: "SELECT pg_notify($1, $2)", notifyAll: "SELECT pg_notify($1, told) FROM unnest($2::text[]) AS told",
	}
	t.appendBatch = t.appendEvents
	return t
}
