package stores

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	_ "modernc.org/sqlite" // reads a file's version before the store opens it

	"github.com/deed-go/deed/eventstore"
)

// Table is a list of backends.
type Table []Backend

// A DSN is a parsed name of a store.
type DSN struct {
	Backend
	raw string
}

// Parse finds the backend of the DSN. Its error lists the known ones and
// wraps [eventstore.ErrInvalid].
func (t Table) Parse(dsn string) (DSN, error) {
	scheme, _, colon := strings.Cut(dsn, ":")
	if !colon {
		hint := ""
		if dsn != "" && !strings.Contains(dsn, "=") {
			hint = fmt.Sprintf("; if that is an SQLite file, say sqlite:%s", dsn)
		}
		return DSN{}, fmt.Errorf("%w: the store %q does not begin with the name of a backend; known are %s%s", eventstore.ErrInvalid, Redact(dsn), t.known(), hint)
	}
	for _, b := range t {
		if slices.Contains(b.Schemes, strings.ToLower(scheme)) {
			return DSN{Backend: b, raw: dsn}, nil
		}
	}
	return DSN{}, fmt.Errorf("%w: the store %q is of an unknown backend, %q; known are %s", eventstore.ErrInvalid, Redact(dsn), scheme, t.known())
}

// Examples returns a DSN for each backend.
func (t Table) Examples() []string {
	var all []string
	for _, b := range t {
		all = append(all, b.Example)
	}
	return all
}

func (t Table) known() string { return strings.Join(t.Examples(), ", ") }

// String returns the DSN without its password.
func (d DSN) String() string { return Redact(d.raw) }

// Raw returns the DSN as it was given, password included.
func (d DSN) Raw() string { return d.raw }

// Opener returns what opens the store.
func (d DSN) Opener(ctx context.Context, mode Mode) (eventstore.Opener, error) {
	return d.Open(ctx, d.raw, mode)
}

// DurabilityOf says what an append to the open store survives.
func (d DSN) DurabilityOf(ctx context.Context, store eventstore.Store) (string, error) {
	if asked, ok := eventstore.Find[interface {
		Durability(ctx context.Context) (string, error)
	}](store); ok {
		return asked.Durability(ctx)
	}
	return d.Durability, nil
}

// Redact returns the DSN with its passwords replaced by xxxxx.
func Redact(dsn string) string {
	scheme, rest, isURL := strings.Cut(dsn, "://")
	if !isURL {
		return keywords.ReplaceAllString(dsn, "${1}xxxxx")
	}
	u, err := url.Parse(dsn)
	// An @ in the path is a password with a slash in it that was not escaped.
	if err != nil || strings.Contains(u.Path, "@") || u.Host == "" && strings.Contains(rest, "@") {
		if !strings.ContainsAny(rest, "@=") {
			return dsn
		}
		return scheme + "://xxxxx"
	}
	parts := strings.Split(u.RawQuery, "&")
	for i, part := range parts {
		if key, _, ok := strings.Cut(part, "="); ok && secret.MatchString(key) {
			parts[i] = key + "=xxxxx"
		}
	}
	u.RawQuery = strings.Join(parts, "&")
	return u.Redacted()
}

// RedactText removes the passwords of URLs and of connection strings from a
// text, such as an error message.
func RedactText(text string) string {
	text = userinfo.ReplaceAllStringFunc(text, func(found string) string {
		if strings.HasSuffix(found, ":PASSWORD@") {
			return found // as examples have it
		}
		return userinfo.ReplaceAllString(found, "${1}:xxxxx@")
	})
	return keywords.ReplaceAllString(text, "${1}xxxxx")
}

var (
	secret   = regexp.MustCompile(`(?i)password|secret|token`)
	keywords = regexp.MustCompile(`(?i)(\b\w*password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'"]+)`)
	userinfo = regexp.MustCompile(`(://[^\s:/@"]*):[^\s@"]*@`)
)

// after returns what follows the scheme.
func after(dsn string) string {
	_, rest, _ := strings.Cut(dsn, ":")
	return strings.TrimPrefix(rest, "//")
}

type opener func(context.Context) (eventstore.Store, error)

// Open implements eventstore.Opener.
func (o opener) Open(ctx context.Context) (eventstore.Store, error) { return o(ctx) }

// Close closes what an Opener has opened.
func Close(store eventstore.Store) error {
	if closer, ok := store.(io.Closer); ok {
		return closer.Close()
	}
	return nil
}

// sqliteVersion returns the version of the schema in the file, 0 when there is
// none or it cannot be read: opening the store says then what is wrong.
func sqliteVersion(ctx context.Context, path string) int {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return 0
	}
	name := url.URL{Scheme: "file", OmitHost: true, Path: filepath.ToSlash(absolute), RawQuery: "mode=ro"}
	db, err := sql.Open("sqlite", name.String())
	if err != nil {
		return 0
	}
	defer db.Close()
	var version int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return 0
	}
	return version
}
