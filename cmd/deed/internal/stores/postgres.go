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
// Everything else stays as it is, byte for byte: how it is read is the driver's affair,
// who may for example have a question mark in a password.
func parsePostgres(dsn string) (postgresLog, error) {
	log := postgresLog{url: dsn, schema: postgres.DefaultSchema}
	at := strings.Index(dsn, "://") + len("://")
	authority, _, _ := strings.Cut(dsn[at:], "/")
	at += strings.LastIndexByte(authority, '@') + 1
	mark := strings.IndexByte(dsn[at:], '?')
	if mark < 0 {
		return log, nil
	}
	at += mark
	var others []string
	for pair := range strings.SplitSeq(dsn[at+1:], "&") {
		key, value, _ := strings.Cut(pair, "=")
		if key != "schema" && key != "pooled" {
			others = append(others, pair)
			continue
		}
		value, err := url.PathUnescape(value)
		if err != nil {
			return log, fmt.Errorf("%w: %s in the store's name: %w", eventstore.ErrInvalid, key, err)
		}
		if key == "schema" {
			// As postgres.Schema does, whose answer would come too late for what is only printed.
			if value == "" || len(value) > 63 || strings.ContainsAny(value, "\x00$") {
				return log, fmt.Errorf("%w: schema=%q in the store's name: use 1 to 63 bytes, and no $", eventstore.ErrInvalid, value)
			}
			log.schema = value
			log.options = append(log.options, postgres.Schema(value))
			continue
		}
		switch pooled, err := strconv.ParseBool(value); {
		case err != nil:
			return log, fmt.Errorf("%w: pooled=%q in the store's name: say pooled=true, or leave it out", eventstore.ErrInvalid, value)
		case pooled:
			log.options = append(log.options, postgres.Pooled())
		}
	}
	if log.url = dsn[:at]; len(others) > 0 {
		log.url += "?" + strings.Join(others, "&")
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
