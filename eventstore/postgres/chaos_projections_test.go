//go:build unix

package postgres

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

type tallied struct {
	N int64 `json:"n"`
}

func (tallied) EventType() string { return "tallied" }

// tally is a row of the view, and of the SQL projection's table.
type tally struct {
	Events int64  `json:"events"`
	Sum    int64  `json:"sum"`
	Last   uint64 `json:"last"`
}

const (
	talliesView = "tallies"
	talliesSQL  = "tallies_sql"
	fencedWord  = "fenced" // a process says it of a projection that it has no more
)

// shortLease is how long a process without a heartbeat keeps its leases.
const shortLease = time.Second

// projections returns a view and an SQL projection of the same fold. The
// process can be made to stop within either handler.
func projections(view, sql *freezer) (*projection.ViewDefinition[tally], *projection.SQLDefinition) {
	return projection.View(talliesView, projection.OnMeta(func(row *tally, e tallied, r eventstore.Recorded) {
			row.Events, row.Sum, row.Last = row.Events+1, row.Sum+e.N, uint64(r.Position)
			view.now()
		})).Indexed(projection.Index("sum", func(row tally) int64 { return row.Sum })), projection.SQL(talliesSQL,
			projection.Setup("CREATE TABLE IF NOT EXISTS public.tallies (id text PRIMARY KEY, events bigint, sum bigint, last bigint)"),
			projection.Reset("TRUNCATE public.tallies"),
			projection.OnSQL(func(ctx context.Context, tx projection.Tx, e tallied, r eventstore.Recorded) error {
				_, err := tx.Exec(ctx, `INSERT INTO public.tallies AS t VALUES ($1, 1, $2, $3)
					ON CONFLICT (id) DO UPDATE SET events = t.events + 1, sum = t.sum + excluded.sum, last = excluded.last`, r.Stream.ID, e.N, int64(r.Position))
				sql.now()
				return err
			}))
}

// projectingProcess runs an application: it appends, and folds what it has the
// lease for.
func projectingProcess(t *testing.T, plan chaosPlan) {
	view, sql := &freezer{}, &freezer{}
	control := newControl(map[string]*freezer{talliesView: view, talliesSQL: sql})
	a, b := projections(view, sql)
	ports := appendTo(t, plan, portsFile)
	p := chaosPool(t, plan, &freezer{}, ports)
	logger := slog.New(&fencedHandler{slog.NewTextHandler(appendTo(t, plan, ".log"), nil)})
	app, err := deed.Start(t.Context(), Pool(p, with(func(s *settings) { s.leaseTTL = shortLease })), a, b, deed.Logger(logger))
	require.NoError(t, err)
	var listening, writing sync.WaitGroup
	listening.Go(control.listen)
	var stop atomic.Bool
	for w := range plan.Writers {
		writing.Go(func() {
			random := rand.New(rand.NewPCG(plan.Seed, uint64(w)))
			for n := 0; !stop.Load(); n++ {
				c := eventstore.Commit{Key: fmt.Sprintf("%s/%d/%d", plan.Name, w, n)}
				for range 1 + random.IntN(3) {
					data, _ := json.Marshal(tallied{1 + random.Int64N(9)})
					c.Events = append(c.Events, eventstore.Event{
						ID: uuid.Must(uuid.NewV7()), Type: "tallied", Data: data,
						Stream: eventstore.Stream{Category: "tally", ID: fmt.Sprint(random.IntN(20))},
					})
				}
				for {
					_, err := app.Store().Append(t.Context(), c)
					if err == nil {
						break
					}
					if !eventstore.CanRetry(err) {
						t.Errorf("append: %v", err)
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				time.Sleep(time.Duration(random.IntN(10_000)) * time.Microsecond)
			}
		})
	}
	say(chaosReady)
	<-control.term
	stop.Store(true)
	writing.Wait()
	say(chaosDrained)
	listening.Wait()
	require.NoError(t, app.Stop(t.Context()))
	say(chaosDone, "{}")
}

// fencedHandler says so when a projection was fenced, or when the process has
// found out by itself that it is too late.
type fencedHandler struct{ slog.Handler }

func (h *fencedHandler) Handle(ctx context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "projection lost its lease") || strings.HasPrefix(r.Message, "projection is handed over") {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "projection" {
				say(fencedWord, a.Value.String())
			}
			return true
		})
	}
	return h.Handler.Handle(ctx, r)
}

// ownership is who has a projection, and how far it has brought it.
type ownership struct {
	owner           string
	epoch, position int64
}

func (c *chaos) ownership(name string) (is ownership) {
	c.t.Helper()
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT l.owner, l.epoch, coalesce(c.position, 0) FROM deed.leases l LEFT JOIN deed.checkpoints c
			ON c.name = l.name AND c.epoch = l.epoch WHERE l.name = 'projection.' || $1`, name).Scan(&is.owner, &is.epoch, &is.position)
	})
	return is
}

// reached is the checkpoint, of whatever epoch: who takes over and finds nothing to
// do leaves it as it is.
func (c *chaos) reached(name string) (position int64) {
	c.t.Helper()
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT coalesce(max(position), 0) FROM deed.checkpoints WHERE name = 'projection.' || $1", name).Scan(&position)
	})
	return position
}

// usurp stops the process that runs the projection, in the middle of it, until
// another process has taken it over; then the first one goes on where it was,
// and is fenced. The other one has either brought the projection further, or it
// was stopped as well, before it could: then nothing but the epoch says that the
// first one is too late.
func (c *chaos) usurp(name string, further bool) {
	c.t.Helper()
	for _, child := range c.running {
		child.told(chaosFreeze, name)
	}
	var first, second *chaosChild
	began := time.Now()
	fenced := false
	hear := func() {
		for _, child := range c.running {
			for silent := false; !silent; {
				select {
				case line, more := <-child.said:
					switch {
					case !more:
						child.gone()
					case line == chaosFreezing && first == nil:
						first = child
					case line == chaosFreezing && second == nil && !further:
						second = child
					case line == chaosFreezing:
						child.signal(syscall.SIGCONT)
					case line == fencedWord+" "+name:
						c.fenced++
						fenced = fenced || child == first
					}
				default:
					silent = true
				}
			}
		}
		require.Less(c.t, time.Since(began), 3*waiting, "taking over %s: %+v", name, c.ownership(name))
		time.Sleep(2 * time.Millisecond)
	}
	thaw := func() {
		for _, child := range c.running {
			if child != first && child != second {
				child.told(chaosThaw, name)
			}
		}
	}
	for first == nil {
		hear()
	}
	stopped := time.Now()
	before := c.ownership(name)
	if further {
		thaw()
		for is := before; is.epoch == before.epoch || is.position <= before.position; is = c.ownership(name) {
			if is.epoch == before.epoch && is.position > before.position {
				// Somebody else has the lease, and the process that was stopped did not know yet.
				first.signal(syscall.SIGCONT)
				c.usurp(name, further)
				return
			}
			hear()
		}
	} else {
		for second == nil {
			hear()
		}
		thaw()
	}
	c.others = append(c.others, time.Since(stopped))
	fenced = false
	first.signal(syscall.SIGCONT)
	for !fenced {
		hear()
	}
	c.paused = append(c.paused, time.Since(stopped))
	if second != nil {
		second.signal(syscall.SIGCONT)
	}
}

// Three applications with the same projections: one folds, the others stand
// by. Their sessions are ended, and whoever folds is stopped for longer than it
// keeps its lease and then goes on. The rows must be the fold of the log, and
// nobody may have committed after a later owner has.
func TestChaos_Projections(t *testing.T) {
	t.Parallel()
	c := newChaos(t, chaosPlan{Writers: 3, Patience: 30 * time.Second, Projections: true}, Migrations())
	// What is committed is noted in the same transaction, beside the epoch of the
	// lease as it is then. The row of a checkpoint is locked meanwhile, so the notes
	// of one are in the order of their commits.
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `CREATE TABLE public.moves (n bigserial PRIMARY KEY, name text, epoch bigint, position bigint, current bigint);
			CREATE FUNCTION public.note_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO public.moves (name, epoch, position, current)
					SELECT NEW.name, NEW.epoch, NEW.position, l.epoch FROM deed.leases l WHERE l.name = NEW.name;
				RETURN NULL; END $$;
			CREATE TRIGGER note_move AFTER INSERT OR UPDATE ON deed.checkpoints FOR EACH ROW EXECUTE FUNCTION public.note_move()`)
		return err
	})
	t.Cleanup(func() {
		for _, name := range []string{"a", "b", "c", "d"} {
			if said, err := os.ReadFile(filepath.Join(c.dir, name+".log")); t.Failed() && err == nil {
				t.Logf("%s said:\n%s", name, said)
			}
		}
	})
	for _, name := range []string{"a", "b", "c"} {
		c.start(name, nil)
	}
	for _, child := range c.running {
		child.hears(chaosReady)
	}
	c.read()
	c.terror(time.Second)
	c.usurp(talliesView, false)
	c.usurp(talliesView, true)
	if long() {
		c.terror(time.Second)
		// Within its transaction the lease itself is locked, until the server ends a
		// session that is idle for 10 seconds.
		c.usurp(talliesSQL, true)
		c.terror(2 * time.Second)
		c.restart()
		c.kill(c.random.IntN(3), "d")
		c.terror(2 * time.Second)
		for i := range 6 {
			c.usurp(talliesView, i%2 == 0)
			c.terror(time.Second)
		}
	}
	for _, child := range c.running {
		child.signal(syscall.SIGTERM)
	}
	for _, child := range c.running {
		child.hears(chaosDrained)
	}
	var head int64
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT max(position) FROM deed.events").Scan(&head)
	})
	eventually(t, func() bool {
		return c.reached(talliesView) == head && c.reached(talliesSQL) == head
	}, "the log ends at %d, and the projections have not come so far", head)
	for _, child := range c.running {
		child.told(chaosFinish)
		child.hears(chaosDone)
		for range child.said {
			// It says no more; then it has ended.
		}
		require.NoError(t, child.exit, "%s: %s", child.name, &child.output)
		if log, err := os.ReadFile(filepath.Join(c.dir, child.name+".log")); err == nil {
			require.NotContains(t, string(log), "level=ERROR", "what %s had to say", child.name)
		}
	}
	close(c.plain.stop)
	c.plain.done.Wait()

	want, view, sql := map[string]tally{}, map[string]tally{}, map[string]tally{}
	moves, dead := map[string]ownership{}, 0
	var indexed [][]byte
	var stale []string
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		collect := func(into map[string]tally, query string) error {
			rows, err := conn.Query(ctx, query)
			if err != nil {
				return err
			}
			var id string
			var row tally
			_, err = pgx.ForEachRow(rows, []any{&id, &row.Events, &row.Sum, &row.Last}, func() error { into[id] = row; return nil })
			return err
		}
		if err := collect(want, `SELECT substr(stream, 7), count(*), sum((convert_from(data, 'UTF8')::json->>'n')::bigint)::bigint, max(position) FROM deed.events GROUP BY stream`); err != nil {
			return err
		}
		if err := collect(sql, "SELECT id, events, sum, last FROM public.tallies"); err != nil {
			return err
		}
		if err := collect(view, `SELECT convert_from(r.key, 'UTF8'), (v->>'events')::bigint, (v->>'sum')::bigint, (v->>'last')::bigint
			FROM deed.rows r JOIN deed.tables t ON t.id = r.tbl CROSS JOIN LATERAL (SELECT convert_from(r.value, 'UTF8')::json) x (v)
			WHERE t.name = 'view.`+talliesView+`'`); err != nil {
			return err
		}
		if entries, err := conn.Query(ctx, "SELECT r.key FROM deed.rows r JOIN deed.tables t ON t.id = r.tbl WHERE t.name = 'view."+talliesView+"#sum' ORDER BY r.key"); err != nil {
			return err
		} else if indexed, err = pgx.CollectRows(entries, pgx.RowTo[[]byte]); err != nil {
			return err
		}
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM deed.rows r JOIN deed.tables t ON t.id = r.tbl WHERE t.name LIKE 'projection.dead.%'").Scan(&dead); err != nil {
			return err
		}
		rows, err := conn.Query(ctx, "SELECT name, epoch, position, current FROM public.moves ORDER BY n")
		if err != nil {
			return err
		}
		var name string
		var to ownership
		var current int64
		_, err = pgx.ForEachRow(rows, []any{&name, &to.epoch, &to.position, &current}, func() error {
			if from := moves[name]; to.epoch != current || to.epoch < from.epoch || to.position < from.position {
				stale = append(stale, fmt.Sprintf("%s: %+v after %+v, while the lease had epoch %d", name, to, from, current))
			}
			moves[name] = to
			return nil
		})
		return err
	})
	events := int64(0)
	for _, row := range want {
		events += row.Events
	}
	t.Logf("%d events, %d sessions ended, %d crashes of the server, %d processes killed, projections fenced %d times; others took over after %v, and the owners went on after %v; in the end %+v",
		events, c.terminated, c.restarts, c.kills, c.fenced, c.others, c.paused, moves)
	require.Empty(t, stale, "commits of former owners")
	require.Equal(t, want, sql, "the table of the SQL projection, and the fold of the log")
	require.Equal(t, want, view, "the rows of the view, and the fold of the log")
	var entries [][]byte
	for id, row := range want {
		entries = append(entries, append(binary.BigEndian.AppendUint64(nil, uint64(row.Sum)+1<<63), id...))
	}
	slices.SortFunc(entries, bytes.Compare)
	require.Equal(t, entries, indexed, "the entries of the view's index, and its rows")
	require.Zero(t, dead, "events that were set aside")
	// Each event once, also by the projections' own account.
	a, b := projections(&freezer{}, &freezer{})
	store := openURL(t, c.url)
	engine := projection.NewEngine(store, store, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	for _, p := range []projection.Projection{a, b} {
		require.NoError(t, engine.Add(p))
		v, err := engine.Verify(t.Context(), p.Name())
		require.NoError(t, err)
		require.True(t, v.Agrees(), v.String())
		require.EqualValues(t, events, v.Applied)
		t.Logf("%s: %s", p.Name(), v)
	}
	require.EqualValues(t, head, events)
	for i, e := range c.plain.seen {
		require.EqualValues(t, i+1, e.position, "what plain SQL saw")
	}
	require.Len(t, c.plain.seen, int(head))
}
