//go:build unix

package postgres

import (
	"context"
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

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/projection"
)

// nodes is a database, equal processes that do the background work on it, and
// somebody who appends.
type nodes struct {
	*chaos
	alive   []*peer
	stopped []*peer // with a farewell
	named   int
	store   *Store           // of the state
	log     eventstore.Store // the same, or another one
	writing sync.WaitGroup
	quiet   atomic.Bool
	parcels atomic.Int64

	mu      sync.Mutex
	refused map[string]int // attempts to commit under a lease that was lost, by its name

	afterKill, afterStop, afterPause []time.Duration
	slowestStop                      []time.Duration // of each node that was stopped, its slowest unit
	calm                             map[string]int
}

// peer is one of them, with what it has said.
type peer struct {
	*chaosChild
	mu    sync.Mutex
	lines []string
	ended bool
	moved chan struct{}
}

// said waits until the node has said the line, from the n-th one on, and
// returns which one it was; -1 says that cancel was closed before.
func (n *peer) hearing(line string, from int, cancel <-chan struct{}) int {
	n.c.t.Helper()
	timer := time.NewTimer(3 * waiting)
	defer timer.Stop()
	for {
		n.mu.Lock()
		i := slices.Index(n.lines[from:], line)
		ended, moved := n.ended, n.moved
		n.mu.Unlock()
		switch {
		case i >= 0:
			return from + i
		case ended && line != "":
			require.Failf(n.c.t, "a process has ended", "%s: %v\n%s", n.name, n.exit, &n.output)
		case ended:
			return -1
		}
		select {
		case <-moved:
		case <-cancel:
			return -1
		case <-timer.C:
			require.Failf(n.c.t, "a process does not answer", "%s has not said %q", n.name, line)
		}
	}
}

func (n *peer) heard() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.lines)
}

func newNodes(t testing.TB, plan chaosPlan) *nodes {
	plan.Nodes, plan.Patience = true, 30*time.Second
	ns := &nodes{chaos: newChaos(t, plan, Migrations()), refused: map[string]int{}}
	// What is committed is noted in the same transaction, beside the epoch of the
	// lease as it is then. The row of a checkpoint is locked meanwhile, so the notes
	// of one are in the order of their commits.
	ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `CREATE TABLE public.receipts (id uuid PRIMARY KEY);
			CREATE TABLE public.moves (n bigserial PRIMARY KEY, name text, node text, owner text, epoch bigint, position bigint, current bigint);
			CREATE FUNCTION public.note_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO public.moves (name, node, owner, epoch, position, current)
					SELECT NEW.name, current_setting('application_name'), l.owner, NEW.epoch, NEW.position, l.epoch FROM deed.leases l WHERE l.name = NEW.name;
				RETURN NULL; END $$;
			CREATE TRIGGER note_move AFTER INSERT OR UPDATE ON deed.checkpoints FOR EACH ROW EXECUTE FUNCTION public.note_move();
			CREATE TABLE public.owners (n bigserial PRIMARY KEY, name text, node text, epoch bigint, at timestamptz);
			CREATE FUNCTION public.note_owner() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO public.owners (name, node, epoch, at) VALUES (NEW.name, current_setting('application_name'), NEW.epoch, clock_timestamp());
				RETURN NULL; END $$;
			CREATE TRIGGER note_owner AFTER INSERT OR UPDATE OF epoch ON deed.leases FOR EACH ROW EXECUTE FUNCTION public.note_owner()`)
		return err
	})
	p := pool(t, ns.url, func(c *pgxpool.Config) { c.ConnConfig.RuntimeParams["application_name"] = chaosName })
	ns.store = openPool(t, p, Patience(time.Minute))
	ns.log = ns.store
	if ns.plan.NATS != "" {
		log, err := nats.Open(t.Context(), ns.plan.NATS)
		require.NoError(t, err)
		t.Cleanup(func() { _ = log.Close() })
		ns.log = log
	}
	return ns
}

// join starts so many nodes, and returns when they run.
func (ns *nodes) join(count int) {
	ns.t.Helper()
	began := len(ns.alive)
	for range count {
		ns.named++
		n := &peer{chaosChild: ns.start(fmt.Sprintf("n%d", ns.named), nil), moved: make(chan struct{})}
		ns.alive = append(ns.alive, n)
		pumped := make(chan struct{})
		go func() {
			defer close(pumped)
			for line := range n.said {
				if unit, ok := strings.CutPrefix(line, fencedAttempt+" "); ok {
					ns.mu.Lock()
					ns.refused[unit]++
					ns.mu.Unlock()
				}
				n.tell(func() { n.lines = append(n.lines, line) })
			}
			n.tell(func() { n.ended = true })
		}()
		ns.t.Cleanup(func() { _ = n.cmd.Process.Kill(); <-pumped })
	}
	for _, n := range ns.alive[began:] {
		n.hearing(chaosReady, 0, nil)
	}
}

func (n *peer) tell(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
	close(n.moved)
	n.moved = make(chan struct{})
}

// write appends parcels until the nodes are to be left in peace.
func (ns *nodes) write(pause time.Duration) {
	ns.writing.Go(func() {
		random := rand.New(rand.NewPCG(ns.plan.Seed, 77))
		for n := 0; !ns.quiet.Load(); n++ {
			c := eventstore.Commit{Key: fmt.Sprint("parcel ", n)}
			stream := eventstore.Stream{Category: "parcel", ID: fmt.Sprint(random.IntN(40))}
			for range 1 + random.IntN(3) {
				e := parcel{N: 1 + random.Int64N(100), Bonus: random.IntN(20) == 0}
				for range 1 + random.IntN(3) {
					if l := strings.Repeat("x", 1+random.IntN(3)) + fmt.Sprint(random.IntN(12)); !slices.Contains(e.Labels, l) {
						e.Labels = append(e.Labels, l)
					}
				}
				data, _ := json.Marshal(e)
				c.Events = append(c.Events, eventstore.Event{ID: newID(), Type: e.EventType(), Data: data, Stream: stream})
			}
			for {
				_, err := ns.log.Append(context.WithoutCancel(ns.t.Context()), c)
				if err == nil {
					break
				}
				if !eventstore.CanRetry(err) {
					ns.t.Errorf("append: %v", err)
					return
				}
			}
			ns.parcels.Add(int64(len(c.Events)))
			time.Sleep(time.Duration(random.Int64N(2 * int64(pause))))
		}
	})
}

// For how long nobody does the work of a node that was told to stop, and of one
// that was killed or stopped without a word.
const (
	gracefulBound = 200 * time.Millisecond
	deadBound     = 12 * time.Second
)

type acquisition struct {
	n     int64 // they are numbered
	node  string
	epoch int64
	at    time.Time
}

// owners says who has acquired each lease last.
func (ns *nodes) owners() map[string]acquisition {
	ns.t.Helper()
	var all map[string]acquisition
	ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
		all = map[string]acquisition{}
		rows, err := conn.Query(ctx, `SELECT DISTINCT ON (name) n, name, node, epoch, at FROM public.owners WHERE name = ANY ($1) ORDER BY name, n DESC`, nodeUnits())
		if err != nil {
			return err
		}
		var name string
		var a acquisition
		_, err = pgx.ForEachRow(rows, []any{&a.n, &name, &a.node, &a.epoch, &a.at}, func() error { all[name] = a; return nil })
		return err
	})
	return all
}

// follow waits until all that the node had is another node's, counted from when
// that began, and returns how long each took; what took longer than it should is
// logged.
func (ns *nodes) follow(n *peer, had map[string]acquisition, began time.Time, bound time.Duration) []time.Duration {
	ns.t.Helper()
	var units []string
	var since []int64
	for unit, a := range had {
		if a.node == n.name {
			units = append(units, unit)
			since = append(since, a.n)
		}
	}
	var took []time.Duration
	var slow []string
	for {
		left := slices.Clone(units)
		took, slow = took[:0], slow[:0]
		ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
			rows, err := conn.Query(ctx, `SELECT DISTINCT ON (name) name, node, epoch, at FROM public.owners JOIN unnest($1::text[], $3::bigint[]) AS had (name, since) USING (name) WHERE node <> $2 AND n > since ORDER BY name, n`, units, n.name, since)
			if err != nil {
				return err
			}
			var unit string
			var a acquisition
			_, err = pgx.ForEachRow(rows, []any{&unit, &a.node, &a.epoch, &a.at}, func() error {
				left = slices.DeleteFunc(left, func(l string) bool { return l == unit })
				if a.at.Before(began) {
					return nil // it was on its way already
				}
				took = append(took, a.at.Sub(began))
				if a.at.Sub(began) > bound {
					slow = append(slow, fmt.Sprintf("%s by %s after %v", unit, a.node, a.at.Sub(began)))
				}
				return nil
			})
			return err
		})
		if len(left) == 0 {
			if len(slow) > 0 {
				ns.t.Logf("from %s at %s: %s", n.name, began.UTC().Format("15:04:05.000"), strings.Join(slow, ", "))
			}
			return took
		}
		if time.Since(began) > 2*waiting {
			var leases []string
			ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
				rows, err := conn.Query(ctx, "SELECT to_json(l)::text FROM deed.leases l WHERE name = ANY ($1)", left)
				if err == nil {
					leases, err = pgx.CollectRows(rows, pgx.RowTo[string])
				}
				return err
			})
			require.Fail(ns.t, "no heir", "nobody takes over %q from %s since %s: acquired were %+v, leases are %v", left, n.name, began.UTC().Format("15:04:05.000"), had, leases)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// without takes the node off those that live.
func (ns *nodes) forget(n *peer) {
	ns.alive = slices.DeleteFunc(ns.alive, func(o *peer) bool { return o == n })
}

func (ns *nodes) any() *peer { return ns.alive[ns.random.IntN(len(ns.alive))] }

// murder kills a node, and starts another one when its work is the others'.
func (ns *nodes) murder() {
	ns.t.Helper()
	ns.steady()
	n := ns.any()
	had := ns.owners()
	began := time.Now()
	n.signal(syscall.SIGKILL)
	ns.kills++
	ns.forget(n)
	ns.afterKill = append(ns.afterKill, ns.follow(n, had, began, deadBound)...)
	ns.join(1)
}

// retire stops a node as a deployment does, and starts another one.
func (ns *nodes) retire() {
	ns.t.Helper()
	ns.steady()
	n := ns.any()
	had := ns.owners()
	began := time.Now()
	n.signal(syscall.SIGTERM)
	ns.forget(n)
	ns.stopped = append(ns.stopped, n)
	took := ns.follow(n, had, began, gracefulBound)
	ns.afterStop = append(ns.afterStop, took...)
	if len(took) > 0 {
		ns.slowestStop = append(ns.slowestStop, slices.Max(took))
	}
	n.hearing(chaosDone, 0, nil)
	n.told(chaosFinish)
	ns.join(1)
}

// suspend stops a node for so long, wherever it is.
func (ns *nodes) suspend(d time.Duration) {
	ns.t.Helper()
	ns.steady()
	n := ns.any()
	had := ns.owners()
	began := time.Now()
	n.signal(syscall.SIGSTOP)
	ns.afterPause = append(ns.afterPause, ns.follow(n, had, began, deadBound)...)
	time.Sleep(time.Until(began.Add(d)))
	n.signal(syscall.SIGCONT)
}

// steady returns when the units are spread evenly over the nodes that live, and
// how many each of them has.
func (ns *nodes) steady() map[string]int {
	ns.t.Helper()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		counts := map[string]int{}
		for _, n := range ns.alive {
			counts[n.name] = 0
		}
		all := ns.owners()
		for _, a := range all {
			if _, ok := counts[a.node]; ok {
				counts[a.node]++
			} else {
				counts["(others)"]++
			}
		}
		least, most, units := 1<<30, 0, 0
		for _, n := range counts {
			least, most, units = min(least, n), max(most, n), units+n
		}
		if units == len(nodeUnits()) && most-least <= 1 && counts["(others)"] == 0 {
			return counts
		}
		require.Less(ns.t, time.Since(began), waiting, "%d units are spread unevenly: %v", len(nodeUnits()), counts)
	}
}

// usurp stops the node that runs the model in the middle of a batch, and the one
// that takes over as well, before it has committed anything: then nothing but the
// epoch says that the first one, which goes on, is too late.
func (ns *nodes) usurp() {
	ns.t.Helper()
	ns.steady()
	const unit = "projection." + wholeModel
	heard := map[*peer]int{}
	for _, n := range ns.alive {
		heard[n] = n.heard()
		n.told(chaosFreeze, wholeModel)
	}
	next := func(not *peer) *peer {
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			for _, n := range ns.alive {
				n.mu.Lock()
				froze := slices.Contains(n.lines[heard[n]:], chaosFreezing)
				n.mu.Unlock()
				if froze && n != not {
					return n
				}
			}
			require.Less(ns.t, time.Since(began), 2*waiting, "nobody takes over %s: %+v", unit, ns.owners()[unit])
		}
	}
	first := next(nil)
	stopped := time.Now()
	second := next(first)
	ns.others = append(ns.others, time.Since(stopped))
	for _, n := range ns.alive {
		if n != first && n != second {
			n.told(chaosThaw, wholeModel)
		}
	}
	moves := func() (n int) {
		ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, "SELECT count(*) FROM public.moves WHERE name = $1 AND node = $2", unit, first.name).Scan(&n)
		})
		return n
	}
	before, from := moves(), first.heard()
	first.signal(syscall.SIGCONT)
	ns.paused = append(ns.paused, time.Since(stopped))
	eventually(ns.t, func() bool {
		first.mu.Lock()
		refused := slices.Contains(first.lines[from:], fencedAttempt+" "+unit)
		first.mu.Unlock()
		return refused || moves() > before
	}, "%s does not go on with %s", first.name, unit)
	second.signal(syscall.SIGCONT)
}

// usurpTransaction stops the node that runs the SQL projection within its
// transaction, which the server ends after ten seconds.
func (ns *nodes) usurpTransaction() {
	ns.t.Helper()
	ns.steady()
	heard := map[*peer]int{}
	for _, n := range ns.alive {
		heard[n] = n.heard()
		n.told(chaosFreeze, sqlModel)
	}
	var frozen *peer
	eventually(ns.t, func() bool {
		for _, n := range ns.alive {
			n.mu.Lock()
			if slices.Contains(n.lines[heard[n]:], chaosFreezing) {
				frozen = n
			}
			n.mu.Unlock()
		}
		return frozen != nil
	}, "nobody runs %s", sqlModel)
	stopped := time.Now()
	for _, n := range ns.alive {
		if n != frozen {
			n.told(chaosThaw, sqlModel)
		}
	}
	const unit = "projection." + sqlModel
	eventually(ns.t, func() bool { return ns.owners()[unit].node != frozen.name }, "nobody takes over %s from %s", unit, frozen.name)
	ns.others = append(ns.others, time.Since(stopped))
	frozen.signal(syscall.SIGCONT)
	ns.paused = append(ns.paused, time.Since(stopped))
}

// finish lets the nodes do what is left, sees how it is spread, and stops them.
func (ns *nodes) finish() {
	ns.t.Helper()
	ns.quiet.Store(true)
	ns.writing.Wait()
	var behind string
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		head, err := ns.log.Head(ns.t.Context())
		require.NoError(ns.t, err)
		ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `SELECT concat_ws(', ', string_agg(format('%s of epoch %s at %s, lease of epoch %s', n.name, c.epoch, c.position, l.epoch), ', ') FILTER (WHERE n.name LIKE 'projection.%' AND c.position IS DISTINCT FROM $2),
					CASE WHEN r.count <> $3 THEN format('%s receipts of %s', r.count, $3) END)
				FROM unnest($1::text[]) AS n (name) LEFT JOIN deed.checkpoints c ON c.name = n.name LEFT JOIN deed.leases l ON l.name = n.name
				CROSS JOIN (SELECT count(*) FROM public.receipts) r GROUP BY r.count`, nodeUnits(), int64(head), ns.parcels.Load()).Scan(&behind)
		})
		if behind == "" {
			break
		}
		require.Less(ns.t, time.Since(began), waiting, "the nodes do not come to the end of the log, %d: %s\n%v", head, behind, ns.owners())
	}
	ns.calm = ns.steady()
	for _, n := range ns.alive {
		n.signal(syscall.SIGTERM)
	}
	for _, n := range ns.alive {
		n.hearing(chaosDone, 0, nil)
		n.told(chaosFinish)
	}
	for _, n := range append(ns.stopped, ns.alive...) {
		n.hearing("", n.heard(), nil) // until it has ended
		require.NoError(ns.t, n.exit, "%s: %s", n.name, &n.output)
		log, err := os.ReadFile(filepath.Join(ns.dir, n.name+".log"))
		require.NoError(ns.t, err)
		require.NotContains(ns.t, string(log), "level=ERROR", "what %s had to say", n.name)
	}
}

func (ns *nodes) events(q eventstore.Query) (all []eventstore.Recorded) {
	ns.t.Helper()
	for e, err := range ns.log.Read(ns.t.Context(), q, eventstore.ReadOptions{}) {
		require.NoError(ns.t, err)
		all = append(all, e)
	}
	return all
}

// evidence reads what there is in the end.
func (ns *nodes) evidence() *judged {
	ns.t.Helper()
	j := &judged{models: map[string]map[string]trail{}, applied: map[string]map[int64]int{}, receipt: map[string]bool{}, rewards: map[string]int{}}
	for _, e := range ns.events(eventstore.Match(eventstore.Item{Types: []string{parcel{}.EventType()}})) {
		p := judgedParcel{position: uint64(e.Position), id: e.ID.String(), stream: e.Stream.ID}
		require.NoError(ns.t, json.Unmarshal(e.Data, &p.parcel))
		j.parcels = append(j.parcels, p)
	}
	for _, e := range ns.events(eventstore.Match(eventstore.Item{Types: []string{rewarded{}.EventType()}})) {
		var r rewarded
		require.NoError(ns.t, json.Unmarshal(e.Data, &r))
		j.rewards[r.Parcel]++
	}
	each := func(ctx context.Context, conn *pgx.Conn, into []any, do func(), query string) error {
		rows, err := conn.Query(ctx, query)
		if err != nil {
			return err
		}
		_, err = pgx.ForEachRow(rows, into, func() error { do(); return nil })
		return err
	}
	ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
		for i := range nodeModels {
			m := &nodeModels[i]
			rows := map[string]trail{}
			j.models[m.name] = rows
			var key string
			var row trail
			query := `SELECT convert_from(r.key, 'UTF8'), (v->>'events')::bigint, (v->>'sum')::bigint, (v->>'last')::bigint, (v->>'hash')::bigint
				FROM deed.rows r JOIN deed.tables t ON t.id = r.tbl CROSS JOIN LATERAL (SELECT convert_from(r.value, 'UTF8')::json) x (v)
				WHERE t.name = 'view.` + m.name + `'`
			if m.sql {
				query = "SELECT id, events, sum, last, hash FROM public." + m.name
			}
			if err := each(ctx, conn, []any{&key, &row.Events, &row.Sum, &row.Last, &row.Hash}, func() { rows[key] = row }, query); err != nil {
				return err
			}
			if m.sql {
				applied := map[int64]int{}
				j.applied[m.name] = applied
				var position int64
				if err := each(ctx, conn, []any{&position}, func() { applied[position]++ }, "SELECT position FROM public."+m.name+"_applied"); err != nil {
					return err
				}
			}
		}
		var id string
		if err := each(ctx, conn, []any{&id}, func() { j.receipt[id] = true }, "SELECT id::text FROM public.receipts"); err != nil {
			return err
		}
		j.commits = nil
		var c nodeCommit
		if err := each(ctx, conn, []any{&c.unit, &c.node, &c.owner, &c.epoch, &c.position, &c.current}, func() { j.commits = append(j.commits, c) },
			"SELECT name, node, owner, epoch, position, current FROM public.moves ORDER BY n"); err != nil {
			return err
		}
		return conn.QueryRow(ctx, "SELECT count(*) FROM deed.rows r JOIN deed.tables t ON t.id = r.tbl WHERE t.name LIKE 'projection.dead.%'").Scan(&j.dead)
	})
	return j
}

// verify asks the projections themselves.
func (ns *nodes) verify(j *judged) {
	ns.t.Helper()
	engine := projection.NewEngine(ns.log, ns.store, projection.Options{Logger: slog.New(slog.DiscardHandler)})
	for i := range nodeModels {
		p := nodeModels[i].definition("nobody", &freezer{})
		require.NoError(ns.t, engine.Add(p))
		v, err := engine.Verify(ns.t.Context(), p.Name())
		require.NoError(ns.t, err)
		require.True(ns.t, v.Agrees(), v.String())
	}
}

// attempts is how often a commit of a former owner was refused.
func (ns *nodes) attempts() (n int) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for _, times := range ns.refused {
		n += times
	}
	return n
}

// spread describes times.
func spreadOf(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	slices.Sort(all)
	round := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	return fmt.Sprintf("%d took %v to %v, median %v, p95 %v", len(all), round(all[0]), round(all[len(all)-1]), round(all[len(all)/2]), round(percentile(all, 95)))
}

// percentile is of times in order.
func percentile(all []time.Duration, p int) time.Duration {
	return all[min(len(all)-1, len(all)*p/100)]
}

func (ns *nodes) summary(j *judged) string {
	acquired := 0
	ns.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT count(*) FROM public.owners WHERE name = ANY ($1)", nodeUnits()).Scan(&acquired)
	})
	return fmt.Sprintf("%d parcels, %d units, %d commits under %d acquisitions; %d processes: %d killed, %d stopped, %d paused units moved; %d crashes of the server; "+
		"%d commits of former owners refused, in %d forced pauses of %v; taken over after SIGKILL: %s; after SIGTERM: %s; after SIGSTOP: %s; in the end %v",
		len(j.parcels), len(nodeUnits()), len(j.commits), acquired, ns.named, ns.kills, len(ns.stopped), len(ns.afterPause), ns.restarts,
		ns.attempts(), len(ns.paused), ns.paused, spreadOf(ns.afterKill), spreadOf(ns.afterStop), spreadOf(ns.afterPause), ns.calm)
}

// Equal processes divide the projections and sagas among them, while they are
// killed, stopped for longer than their leases last, told to end, and started
// again, and while the server crashes. What was committed must be what owners in
// their time have committed, and the read models must be folds of the log.
func TestNodes(t *testing.T) {
	if !long() {
		t.Parallel()
	}
	testNodes(t, chaosPlan{})
}

// The same with the log in NATS, where the nodes find each other as well; what
// they make of it, and the epochs, are in PostgreSQL.
func TestNodes_NATS(t *testing.T) {
	if !long() {
		t.Skip("TestNodes asks for the same of nodes that find each other in the state; set DEED_TEST_LONG=1 for this one")
	}
	server, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(server.Close)
	testNodes(t, chaosPlan{NATS: server.URL()})
}

func testNodes(t *testing.T, plan chaosPlan) {
	plan.Lease = time.Second
	pause, every := 2500*time.Millisecond, 40*time.Millisecond
	if long() { // with the leases that everybody has
		plan.Lease, pause = 10*time.Second, 20*time.Second
	}
	ns := newNodes(t, plan)
	ns.write(every)
	began := time.Now()
	ns.join(3)
	ns.steady()
	if long() {
		ns.retire()
		ns.murder()
		ns.usurp()
		ns.retire()
		ns.suspend(pause)
		ns.retire()
		ns.restart()
		ns.retire()
		ns.usurpTransaction()
		ns.murder()
		ns.suspend(pause)
		ns.murder()
		for time.Since(began) < 2*time.Minute {
			ns.retire()
		}
	} else {
		ns.retire()
		ns.murder()
		ns.usurp()
		ns.suspend(pause)
		ns.restart()
		ns.retire()
	}
	ns.finish()
	j := ns.evidence()
	t.Log(ns.summary(j))
	found := j.judge()
	require.Empty(t, found, complaints(found))
	ns.verify(j)
	require.NotZero(t, ns.attempts(), "commits of former owners that were refused")
	if long() {
		require.LessOrEqual(t, slices.Max(ns.afterKill), deadBound, "taking over from who was killed")
		// A node's units move together, so that one hiccup of the machine is ten slow
		// units: it is nodes that are counted, 95 of 100 of them, or all but one.
		slices.Sort(ns.slowestStop)
		require.LessOrEqual(t, ns.slowestStop[max(0, len(ns.slowestStop)-1-(len(ns.slowestStop)+19)/20)], gracefulBound, "taking over from who was stopped: %v", ns.slowestStop)
	}
}

// Were the epoch not looked at when something is committed, the checks of
// TestNodes would say so.
func TestNodes_NoticesCommitsWithoutEpoch(t *testing.T) {
	t.Parallel()
	ns := newNodes(t, chaosPlan{Lease: time.Second, Careless: true})
	ns.write(40 * time.Millisecond)
	ns.join(3)
	ns.usurp()
	ns.quiet.Store(true)
	ns.writing.Wait()
	found := ns.evidence().judge()
	t.Logf("found: %s", found[foundStale]) // nobody waited for the rest to be done
	require.NotEmpty(t, found[foundStale], "commits of former owners")
}

// What the judge finds when something is wrong, one thing at a time.
func TestNodes_Judge(t *testing.T) {
	t.Parallel()
	sound := func() *judged {
		j := &judged{models: map[string]map[string]trail{}, applied: map[string]map[int64]int{}, receipt: map[string]bool{}, rewards: map[string]int{}}
		for i := range 20 {
			p := judgedParcel{position: uint64(2*i + 1), id: fmt.Sprint("p", i), stream: fmt.Sprint(i % 3), parcel: parcel{N: int64(i), Labels: []string{"x", "xx"}[:1+i%2], Bonus: i%4 == 0}}
			j.parcels = append(j.parcels, p)
			j.receipt[p.id] = true
			if p.Bonus {
				j.rewards[p.id] = 1
			}
		}
		for i := range nodeModels {
			m := &nodeModels[i]
			j.models[m.name], j.applied[m.name] = map[string]trail{}, map[int64]int{}
			for _, p := range j.parcels {
				j.applied[m.name][int64(p.position)] = 1
				for _, key := range m.rows(p.stream, p.parcel) {
					row := j.models[m.name][key]
					row.follow(p.N, p.position)
					j.models[m.name][key] = row
				}
			}
		}
		j.commits = []nodeCommit{
			{unit: "u", node: "a", epoch: 1, position: 5, current: 1},
			{unit: "v", node: "b", epoch: 1, position: 5, current: 1},
			{unit: "u", node: "a", epoch: 1, position: 9, current: 1},
			{unit: "u", node: "b", epoch: 2, position: 12, current: 2},
		}
		return j
	}
	require.Empty(t, sound().judge())
	for name, c := range map[string]struct {
		found  string
		change func(j *judged)
	}{
		"a commit under an epoch that is not current": {foundStale, func(j *judged) { j.commits[2].current = 2 }},
		"a lower epoch after a higher one":            {foundStale, func(j *judged) { j.commits[3].epoch, j.commits[3].current = 0, 0 }},
		"a checkpoint that goes back":                 {foundStale, func(j *judged) { j.commits[3].position = 8 }},
		"two nodes under one epoch":                   {foundOwners, func(j *judged) { j.commits[2].node = "b" }},
		"a row that lacks an event":                   {foundRows, func(j *judged) { j.models["streams"]["1"] = trail{Events: 1} }},
		"a row that is not there":                     {foundRows, func(j *judged) { delete(j.models["labels_parted"], "xx") }},
		"a row too many":                              {foundRows, func(j *judged) { j.models["labels_parted"]["xxx"] = trail{} }},
		"events in another order": {foundRows, func(j *judged) {
			j.parcels[3], j.parcels[6] = j.parcels[6], j.parcels[3]
		}},
		"an event applied twice":          {foundApplied, func(j *judged) { j.applied[sqlModel][3] = 2 }},
		"an event applied that is not":    {foundApplied, func(j *judged) { j.applied[sqlModel][2] = 1 }},
		"an event set aside":              {foundRows, func(j *judged) { j.dead = 1 }},
		"a reaction that did not happen":  {foundReactions, func(j *judged) { delete(j.receipt, "p2") }},
		"a saga that took effect twice":   {foundReactions, func(j *judged) { j.rewards["p4"] = 2 }},
		"a saga that was not to be begun": {foundReactions, func(j *judged) { j.rewards["p5"] = 1 }},
	} {
		j := sound()
		c.change(j)
		require.NotEmpty(t, j.judge()[c.found], name)
	}
}
