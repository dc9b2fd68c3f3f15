package stores

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/postgres"
)

// postgresLog is what a DSN says of a log in PostgreSQL.
type postgresLog struct {
	url     string // for the driver, which would ask the server for settings that it does not know
	schema  string
	options []postgres.Option
}

// parsePostgres takes what is deed's out of a DSN: schema=NAME says which of several
// logs of a database, pooled=true that there is a pooler in transaction mode on the way.
func parsePostgres(dsn string) (postgresLog, error) {
	log := postgresLog{url: dsn, schema: postgres.DefaultSchema}
	// Not by url.Parse, which does not know of several hosts with ports.
	base, rest, _ := strings.Cut(dsn, "?")
	query, err := url.ParseQuery(rest)
	if err != nil {
		return log, nil //nolint:nilerr // the driver says what is wrong with it
	}
	if !query.Has("schema") && !query.Has("pooled") {
		return log, nil
	}
	if query.Has("schema") {
		log.schema = query.Get("schema")
		log.options = append(log.options, postgres.Schema(log.schema))
	}
	if query.Has("pooled") {
		switch pooled, err := strconv.ParseBool(query.Get("pooled")); {
		case err != nil:
			return log, fmt.Errorf("%w: pooled=%q in the store's name: say pooled=true, or leave it out", eventstore.ErrInvalid, query.Get("pooled"))
		case pooled:
			log.options = append(log.options, postgres.Pooled())
		}
	}
	query.Del("schema")
	query.Del("pooled")
	if log.url = base; len(query) > 0 {
		log.url += "?" + query.Encode()
	}
	return log, nil
}

func openPostgres(_ context.Context, dsn string, mode Mode) (eventstore.Opener, error) {
	log, err := parsePostgres(dsn)
	if err != nil {
		return nil, err
	}
	if mode == Existing {
		log.options = append(log.options, postgres.WithoutMigration())
	}
	return postgres.URL(log.url, log.options...), nil
}

func migratePostgres(ctx context.Context, dsn string) ([]Migration, error) {
	log, err := parsePostgres(dsn)
	if err != nil {
		return nil, err
	}
	applied, err := postgres.Migrate(ctx, log.url, log.options...)
	return log.migrations(applied), err
}

func printPostgres(dsn string) ([]Migration, error) {
	log, err := parsePostgres(dsn)
	if err != nil {
		return nil, err
	}
	return log.migrations(postgres.Migrations()), nil
}

func (l *postgresLog) migrations(steps []postgres.Migration) []Migration {
	var all []Migration
	for _, m := range steps {
		all = append(all, Migration{Version: m.Version, Name: m.Name, SQL: m.In(l.schema)})
	}
	return all
}
