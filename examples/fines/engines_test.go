package main

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/esdbserver"
	"github.com/deed-go/deed/internal/pgtest"
)

// TestEngines replays the sample on PostgreSQL, NATS and EventStoreDB: the domain code and
// the report are the same. Finished replays are found again, with and without
// the read models.
func TestEngines(t *testing.T) {
	t.Parallel()
	expected := expectedSample(t)
	run := func(t *testing.T, name string, args ...string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		require.Zero(t, program(t.Context(), append([]string{"-json", "-store", name}, args...), &stdout, &stderr), stderr.String())
		requireReport(t, expected, stdout.Bytes())
	}
	again := func(t *testing.T, name string) {
		t.Helper()
		db := filepath.Join(t.TempDir(), "views.db")
		run(t, name, "-db", db)
		run(t, name, "-db", db)
		run(t, name) // read models in memory: made anew
	}
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		name := pgtest.Database(t)
		run(t, name)
		run(t, name) // nothing is left to do
	})
	t.Run("nats", func(t *testing.T) {
		t.Parallel()
		again(t, "nats:"+t.TempDir())
	})
	t.Run("esdb", func(t *testing.T) {
		t.Parallel()
		log, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "server.db"))
		require.NoError(t, err)
		defer func() { require.NoError(t, log.Close()) }()
		server, err := esdbserver.Start(log)
		require.NoError(t, err)
		defer func() { require.NoError(t, server.Close()) }()
		again(t, server.URL())
	})
}
