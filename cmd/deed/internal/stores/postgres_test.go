package stores

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/postgres"
	"github.com/deed-go/deed/internal/pgtest"
)

func TestParsePostgres(t *testing.T) {
	t.Parallel()
	for dsn, want := range map[string]struct {
		url, schema string
		options     int
	}{
		"postgres://ann:se%2Fcret@h:5432/s":                                                     {"postgres://ann:se%2Fcret@h:5432/s", "deed", 0},
		"postgres://h/s?sslmode=disable&application_name=a+b":                                   {"postgres://h/s?sslmode=disable&application_name=a+b", "deed", 0},
		"postgres://ann:se%2Fcret@h/s?schema=orders":                                            {"postgres://ann:se%2Fcret@h/s", "orders", 1},
		"postgres://ann:%zz@h/s":                                                                {"postgres://ann:%zz@h/s", "deed", 0},
		"postgres://ann:se?cret@h/s?sslmode=disable&schema=orders":                              {"postgres://ann:se?cret@h/s?sslmode=disable", "orders", 1},
		"postgres://ann:se?schema=x@h/s":                                                        {"postgres://ann:se?schema=x@h/s", "deed", 0},
		"postgres://h/s?schema=orders&options=-c%20a%3Db&sslmode=disable&ssl=true&password=a;b": {"postgres://h/s?options=-c%20a%3Db&sslmode=disable&ssl=true&password=a;b", "orders", 1},
		"postgres:///s?schema=a+b":                                                              {"postgres:///s", "a+b", 1},
		"postgresql://h/s?pooled=true&sslmode=disable":                                          {"postgresql://h/s?sslmode=disable", "deed", 1},
		"postgres://h1:5432,h2:5433/s?pooled=0&schema=a%26b&target_session_attrs=primary":       {"postgres://h1:5432,h2:5433/s?target_session_attrs=primary", "a&b", 1},
	} {
		got, err := parsePostgres(dsn)
		require.NoError(t, err, dsn)
		require.Equal(t, want.url, got.url)
		require.Equal(t, want.schema, got.schema)
		require.Len(t, got.options, want.options, dsn)
	}
	for _, wrong := range []string{"pooled=perhaps", "pooled", "schema=", "schema=%zz", "schema=a$b", "schema=" + strings.Repeat("x", 64)} {
		_, err := parsePostgres("postgres://ann:secret@h/s?" + wrong)
		require.ErrorIs(t, err, eventstore.ErrInvalid, wrong)
		require.ErrorContains(t, err, wrong[:6])
		require.NotContains(t, err.Error(), "secret")
	}
}

// Each schema of a database is a log of its own, for every command.
func TestPostgres_Schemas(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	name := func(query string) DSN {
		sign := "?"
		if strings.Contains(url, "?") {
			sign = "&"
		}
		dsn, err := Known().Parse(url + sign + query)
		require.NoError(t, err)
		return dsn
	}
	orders := name("schema=orders")
	printed, err := orders.Migrations(orders.Raw())
	require.NoError(t, err)
	require.Len(t, printed, len(postgres.Migrations()))
	for _, m := range printed {
		require.Contains(t, m.SQL, `"orders"`)
		require.NotContains(t, m.SQL, `"deed".`)
	}
	applied, err := orders.Migrate(t.Context(), orders.Raw())
	require.NoError(t, err)
	require.Len(t, applied, len(printed))

	open := func(dsn DSN, mode Mode) (eventstore.Store, error) {
		source, err := dsn.Opener(t.Context(), mode)
		require.NoError(t, err)
		return source.Open(t.Context())
	}
	_, err = open(name("schema=deed"), Existing)
	require.Error(t, err, "the default schema was not made")
	store, err := open(name("schema=orders&pooled=true"), Existing)
	require.NoError(t, err)
	stream := eventstore.Stream{Category: "order", ID: "1"}
	_, err = store.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: stream, Type: "placed", Data: []byte(`{}`)}}})
	require.NoError(t, err)
	require.EqualValues(t, 1, store.(*postgres.Store).Stats().Calls, "it did not write as behind a pooler")
	require.NoError(t, Close(store))
	other, err := open(name("schema=other"), Create)
	require.NoError(t, err)
	head, err := other.Head(t.Context())
	require.NoError(t, err)
	require.Zero(t, head)
	require.NoError(t, Close(other))
}
