package projectiontest_test

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/projection/projectiontest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type Borrowed struct{ Reader string }

type Returned struct{}

func (Borrowed) EventType() string { return "book.borrowed" }
func (Returned) EventType() string { return "book.returned" }

type Book struct {
	Reader string
	Since  time.Time
	Times  int
	By     string
}

var books = projection.View("books",
	projection.OnMeta(func(b *Book, e Borrowed, r eventstore.Recorded) {
		b.Reader, b.Since, b.By = e.Reader, r.Time, r.Metadata.Actor
		b.Times++
	}),
	projection.On(func(b *Book, _ Returned) { b.Reader, b.Since = "", time.Time{} }),
)

func TestFor(t *testing.T) {
	t.Parallel()
	monday := time.Date(2026, 3, 2, 9, 0, 0, 0, time.UTC)
	projectiontest.For(t, books).
		NoRow("dune").
		Then(nil).
		At(monday).With(eventstore.Metadata{Actor: "desk 1"}).
		Given("book", "dune", Borrowed{"Ann"}).
		Given("book", "emma", Borrowed{"Bob"}, Returned{}).
		Row("dune", Book{Reader: "Ann", Since: monday, Times: 1, By: "desk 1"}).
		Given("book", "dune", Returned{}, &Borrowed{"Cid"}).
		Then(map[string]Book{
			"dune": {Reader: "Cid", Since: monday, Times: 2, By: "desk 1"},
			"emma": {Times: 1, By: "desk 1"},
		}).
		Rebuilt()
}

var loans = projection.SQL("loans",
	projection.Setup(`CREATE TABLE IF NOT EXISTS loans (book TEXT, reader TEXT)`),
	projection.Reset(`DELETE FROM loans`),
	projection.OnSQL(func(ctx context.Context, tx projection.Tx, e Borrowed, r eventstore.Recorded) error {
		_, err := tx.Exec(ctx, `INSERT INTO loans VALUES ($1, $2)`, r.Stream.ID, e.Reader)
		return err
	}))

func openSQLite(t *testing.T) *sqlite.Store {
	store, err := sqlite.Open(context.Background(), filepath.Join(t.TempDir(), "test.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return store
}

func TestForSQL(t *testing.T) {
	t.Parallel()
	projectiontest.ForSQL(t, loans, openSQLite(t)).
		Then(`SELECT book FROM loans`).
		Given("book", "dune", Borrowed{"Ann"}, Returned{}, Borrowed{"Bob"}).
		Then(`SELECT book, count(*) FROM loans GROUP BY book`, projectiontest.Line{"dune", 2}).
		Then(`SELECT reader FROM loans ORDER BY reader`, projectiontest.Line{"Ann"}, projectiontest.Line{"Bob"}).
		Rebuilt()
}

// failing runs a test that is expected to fail and returns what it said.
func failing(t *testing.T, test func(t testing.TB)) string {
	t.Helper()
	fake := &fakeT{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer fake.cleanUp()
		test(fake)
	}()
	<-done
	require.True(t, fake.failed, "the test passed")
	return fake.said.String()
}

// fakeT records a failure instead of failing the test.
type fakeT struct {
	testing.TB
	mu       sync.Mutex
	failed   bool
	said     strings.Builder
	cleanups []func()
}

func (f *fakeT) Helper()          {}
func (f *fakeT) Cleanup(c func()) { f.cleanups = append(f.cleanups, c) }
func (f *fakeT) FailNow()         { f.failed = true; runtime.Goexit() }
func (f *fakeT) Errorf(format string, a ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed = true
	fmt.Fprintf(&f.said, format, a...)
}

func (f *fakeT) cleanUp() {
	for i := len(f.cleanups) - 1; i >= 0; i-- {
		f.cleanups[i]()
	}
}

func TestFor_Fails(t *testing.T) {
	t.Parallel()
	calls := 0
	restless := projection.View("restless", projection.On(func(b *Book, _ Borrowed) {
		calls++
		b.Times = calls
	}))
	ill := projection.View("ill", projection.On(func(_ *Book, _ Borrowed) { panic("at the disco") }))
	for name, c := range map[string]struct {
		test func(t testing.TB)
		want string
	}{
		"another row": {func(t testing.TB) {
			projectiontest.For(t, books).Given("book", "dune", Borrowed{"Ann"}).Row("dune", Book{Reader: "Bob"})
		}, `row "dune" of view "books"`},
		"no such row": {func(t testing.TB) {
			projectiontest.For(t, books).Given("book", "dune", Borrowed{"Ann"}).Row("emma", Book{})
		}, `view "books" has no row "emma", only "dune"`},
		"a row too many": {func(t testing.TB) {
			projectiontest.For(t, books).Given("book", "dune", Borrowed{"Ann"}).NoRow("dune")
		}, `view "books" has the row "dune"`},
		"rows too many": {func(t testing.TB) {
			projectiontest.For(t, books).Given("book", "dune", Borrowed{"Ann"}).Then(nil)
		}, `rows of view "books"`},
		"handler fails": {func(t testing.TB) {
			projectiontest.For(t, ill).Given("book", "dune", Borrowed{"Ann"}).Then(nil)
		}, `projection "ill" failed on event "book.borrowed" of stream "book-dune", version 1: handler panicked: at the disco`},
		"depends on more than events": {func(t testing.TB) {
			projectiontest.For(t, restless).Given("book", "dune", Borrowed{"Ann"}).Rebuilt()
		}, `a fold must depend on its events alone`},
		"definition with mistakes": {func(t testing.TB) {
			projectiontest.For(t, projection.View[Book]("empty"))
		}, `it has no handlers`},
		"nothing checked": {func(t testing.TB) {
			projectiontest.For(t, books).Given("book", "dune", Borrowed{"Ann"})
		}, `the test of "books" checks nothing`},
		"other lines": {func(test testing.TB) {
			projectiontest.ForSQL(test, loans, openSQLite(t)).Given("book", "dune", Borrowed{"Ann"}).
				Then(`SELECT reader FROM loans`, projectiontest.Line{"Bob"})
		}, `result of SELECT reader FROM loans`},
		"more lines": {func(test testing.TB) {
			projectiontest.ForSQL(test, loans, openSQLite(t)).Given("book", "dune", Borrowed{"Ann"}).
				Then(`SELECT reader FROM loans`)
		}, `it returns more than the 0 lines expected`},
		"fewer lines": {func(test testing.TB) {
			projectiontest.ForSQL(test, loans, openSQLite(t)).Given("book", "dune", Borrowed{"Ann"}).
				Then(`SELECT reader FROM loans`, projectiontest.Line{"Ann"}, projectiontest.Line{"Bob"})
		}, `result of SELECT reader FROM loans`},
	} {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, failing(t, c.test), c.want)
		})
	}
}
