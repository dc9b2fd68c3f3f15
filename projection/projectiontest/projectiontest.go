// Package projectiontest tests projections in the words of the domain: given
// these events, the read model shows these rows. It runs the real engine on a
// store in memory, or on the one the test chooses.
//
// It may import projection, eventstore and eventstore/memory; only tests
// should import it.
package projectiontest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection"
)

// Store is a log and a state: what projections need. The embedded stores are.
type Store interface {
	eventstore.Store
	projection.State
}

// Option changes what a test runs on.
type Option func(*settings)

type settings struct {
	store    Store
	encoding *eventstore.Encoding
}

// On runs the test on the given store, for example SQLite for an SQL
// projection; the test closes it. Without it the store is a new one in memory.
func On(store Store) Option { return func(s *settings) { s.store = store } }

// Encoding decodes events by the application's rules, old schemas and names
// included. Without it they are plain JSON.
func Encoding(enc *eventstore.Encoding) Option { return func(s *settings) { s.encoding = enc } }

// patience is how long a projection may take; it bounds tests that would hang.
const patience = 30 * time.Second

// base is what tests of views and of SQL projections share.
type base struct {
	t          testing.TB
	projection projection.Projection
	settings   settings
	engine     *projection.Engine
	now        time.Time
	metadata   eventstore.Metadata
	checked    bool
}

func newBase(t testing.TB, p projection.Projection, options []Option) *base {
	t.Helper()
	b := &base{t: t, projection: p, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	for _, o := range options {
		o(&b.settings)
	}
	if b.settings.store == nil {
		store := memory.New()
		t.Cleanup(func() { _ = store.Close() })
		b.settings.store = store
	}
	b.engine = projection.NewEngine(b.settings.store, b.settings.store, projection.Options{
		Encoding: b.settings.encoding,
		Logger:   slog.New(slog.DiscardHandler),
		Attempts: 1,
	})
	require.NoError(t, b.engine.Add(p))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, w := range b.engine.Workers() {
		running.Go(func() { _ = w.Run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
		if !b.checked {
			t.Errorf("projectiontest: the test of %q checks nothing: end it with Then, Row or NoRow", p.Name())
		}
	})
	return b
}

func (b *base) given(category, id string, events []projection.Event) {
	b.t.Helper()
	commit := eventstore.Commit{}
	for _, e := range events {
		stored := eventstore.Event{
			Stream: eventstore.Stream{Category: category, ID: id}, Type: e.EventType(), Time: b.now, Metadata: b.metadata,
		}
		if tagged, ok := e.(interface{ Tags() []string }); ok {
			stored.Tags = tagged.Tags()
		}
		data, err := b.settings.encoding.Encode(e.EventType(), e, &stored.Metadata)
		require.NoError(b.t, err)
		stored.Data = data
		commit.Events = append(commit.Events, stored)
	}
	if len(commit.Events) == 0 {
		return
	}
	_, err := b.settings.store.Append(context.Background(), commit)
	require.NoError(b.t, err)
}

// settle waits until the projection has seen every event, and fails the test
// if it could not handle them all.
func (b *base) settle() {
	b.t.Helper()
	b.checked = true
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	head, err := b.settings.store.Head(ctx)
	require.NoError(b.t, err)
	require.NoError(b.t, b.engine.WaitFor(ctx, b.projection.Name(), head))
	letters, err := b.engine.DeadLetters(ctx, b.projection.Name())
	require.NoError(b.t, err)
	for _, d := range letters {
		if d.Error != "" {
			b.t.Errorf("projection %q failed on event %q of stream %q, version %d: %s", b.projection.Name(), d.Type, d.Stream, d.Version, d.Error)
		}
	}
	if len(letters) > 0 {
		b.t.FailNow()
	}
}

func (b *base) rebuild() {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	require.NoError(b.t, b.engine.Rebuild(ctx, b.projection.Name()))
}

// Test is the test of a view. Its methods return it, so that a test reads as
// one sentence; they fail the test at once when something is wrong.
type Test[R any] struct {
	base *base
	view *projection.ViewDefinition[R]
}

// For begins the test of a view, which starts empty.
func For[R any](t testing.TB, view *projection.ViewDefinition[R], options ...Option) *Test[R] {
	t.Helper()
	return &Test[R]{base: newBase(t, view, options), view: view}
}

// At says when the events given from here on happened, in UTC. Without it
// that is the beginning of 2026.
func (t *Test[R]) At(when time.Time) *Test[R] {
	t.base.now = when
	return t
}

// With says what metadata the events given from here on carry.
func (t *Test[R]) With(m eventstore.Metadata) *Test[R] {
	t.base.metadata = m
	return t
}

// Given appends events to the stream of the category and id.
func (t *Test[R]) Given(category, id string, events ...projection.Event) *Test[R] {
	t.base.t.Helper()
	t.base.given(category, id, events)
	return t
}

// Row checks that the row under the key is the wanted one.
func (t *Test[R]) Row(key string, want R) *Test[R] {
	t.base.t.Helper()
	rows := t.rows()
	got, ok := rows[key]
	if !ok {
		require.Failf(t.base.t, "row is missing", "view %q has no row %q, only %s", t.view.Name(), key, keys(rows))
	}
	require.Equalf(t.base.t, want, got, "row %q of view %q", key, t.view.Name())
	return t
}

// NoRow checks that there is no row under the key.
func (t *Test[R]) NoRow(key string) *Test[R] {
	t.base.t.Helper()
	if got, ok := t.rows()[key]; ok {
		require.Failf(t.base.t, "unexpected row", "view %q has the row %q: %+v", t.view.Name(), key, got)
	}
	return t
}

// Then checks that the view has these rows, by key, and no others.
func (t *Test[R]) Then(want map[string]R) *Test[R] {
	t.base.t.Helper()
	got := t.rows()
	if len(want) == 0 && len(got) == 0 {
		return t
	}
	require.Equalf(t.base.t, want, got, "rows of view %q", t.view.Name())
	return t
}

// Rebuilt folds everything again from the beginning and checks that the rows
// come out as they were: a fold that depends on anything but its events, such
// as the time of day, does not pass.
func (t *Test[R]) Rebuilt() *Test[R] {
	t.base.t.Helper()
	before := t.rows()
	t.base.rebuild()
	require.Equalf(t.base.t, before, t.rows(), "rows of view %q after a rebuild: a fold must depend on its events alone", t.view.Name())
	return t
}

func (t *Test[R]) rows() map[string]R {
	t.base.t.Helper()
	t.base.settle()
	rows := map[string]R{}
	err := t.base.settings.store.View(context.Background(), func(tx projection.StateTx) error {
		for e, err := range t.view.Rows(tx, projection.Range{}) {
			if err != nil {
				return err
			}
			rows[e.Key] = e.Row
		}
		return nil
	})
	require.NoError(t.base.t, err)
	return rows
}

func keys[R any](rows map[string]R) string {
	if len(rows) == 0 {
		return "none at all"
	}
	all := make([]string, 0, len(rows))
	for k := range rows {
		all = append(all, fmt.Sprintf("%q", k))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

// Line is one row that a query returns: the values of its columns.
type Line []any

// SQLTest is the test of an SQL projection, used like [Test].
type SQLTest struct {
	base   *base
	checks []check
}

type check struct {
	query string
	want  []Line
}

// ForSQL begins the test of an SQL projection on a store that has SQL, which
// the test closes. Its tables must be empty.
func ForSQL(t testing.TB, p *projection.SQLDefinition, store Store, options ...Option) *SQLTest {
	t.Helper()
	return &SQLTest{base: newBase(t, p, append(options, On(store)))}
}

// At says when the events given from here on happened, in UTC.
func (t *SQLTest) At(when time.Time) *SQLTest {
	t.base.now = when
	return t
}

// With says what metadata the events given from here on carry.
func (t *SQLTest) With(m eventstore.Metadata) *SQLTest {
	t.base.metadata = m
	return t
}

// Given appends events to the stream of the category and id.
func (t *SQLTest) Given(category, id string, events ...projection.Event) *SQLTest {
	t.base.t.Helper()
	t.base.given(category, id, events)
	t.checks = nil
	return t
}

// Then checks that the query returns these lines, in this order. A column is
// read as the type of the value it is compared with.
func (t *SQLTest) Then(query string, want ...Line) *SQLTest {
	t.base.t.Helper()
	t.base.settle()
	t.verify(check{query, want})
	t.checks = append(t.checks, check{query, want})
	return t
}

// Rebuilt empties the tables by the projection's Reset, folds everything again
// and repeats the checks made since events were last given.
func (t *SQLTest) Rebuilt() *SQLTest {
	t.base.t.Helper()
	t.base.settle()
	t.base.rebuild()
	for _, c := range t.checks {
		t.verify(c)
	}
	return t
}

func (t *SQLTest) verify(c check) {
	t.base.t.Helper()
	var got []Line
	err := t.base.settings.store.View(context.Background(), func(tx projection.StateTx) error {
		rows, err := tx.Query(context.Background(), c.query)
		if err != nil {
			return err
		}
		for rows.Next() {
			if len(got) == len(c.want) {
				return errors.Join(fmt.Errorf("%s: it returns more than the %d lines expected", c.query, len(c.want)), rows.Close())
			}
			columns := c.want[len(got)]
			pointers := make([]any, len(columns))
			for i, v := range columns {
				if v == nil {
					return errors.Join(fmt.Errorf("line %d, column %d: nil says no type: select coalesce(…) or IS NULL instead", len(got)+1, i+1), rows.Close())
				}
				pointers[i] = reflect.New(reflect.TypeOf(v)).Interface()
			}
			if err := rows.Scan(pointers...); err != nil {
				return errors.Join(err, rows.Close())
			}
			line := make(Line, len(columns))
			for i, p := range pointers {
				line[i] = reflect.ValueOf(p).Elem().Interface()
			}
			got = append(got, line)
		}
		return errors.Join(rows.Err(), rows.Close())
	})
	require.NoError(t.base.t, err)
	require.Equalf(t.base.t, c.want, got, "result of %s", c.query)
}
