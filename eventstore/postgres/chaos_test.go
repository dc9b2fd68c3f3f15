//go:build unix

package postgres

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/pgtest"
)

// chaos is a server, the processes that use it at the same time, and a reader
// that believes in the order of positions as plainly as SQL lets it.
type chaos struct {
	t       testing.TB
	server  *pgtest.Server
	url     string
	dir     string
	plan    chaosPlan
	random  *rand.Rand
	running []*chaosChild
	ended   []*chaosChild // killed
	plain   *plainReader

	terminated, restarts, kills int
	fenced                      int
	paused, others              []time.Duration
}

// newChaos starts a server, and makes the schema by the steps if there are any.
func newChaos(t testing.TB, plan chaosPlan, steps []Migration) *chaos {
	c := &chaos{t: t, server: pgtest.Start(t), dir: t.ArtifactDir(), plan: plan}
	c.plan.Seed = uint64(time.Now().UnixNano())
	t.Logf("seed %d", c.plan.Seed)
	c.random = rand.New(rand.NewPCG(c.plan.Seed, 1))
	c.url = c.server.Database(t)
	if steps != nil {
		_, err := Migrate(t.Context(), c.url, with(func(s *settings) { s.steps = steps }))
		require.NoError(t, err)
	}
	return c
}

// chaosChild is a process as seen from outside.
type chaosChild struct {
	c      *chaos
	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	said   chan string // closed when it has ended
	output bytes.Buffer
	exit   error // to be read when said is closed
	killed bool
	stats  Stats

	offset int64 // of the claims that were looked at
	acked  int64 // the last position that was acknowledged
}

// start starts a process.
func (c *chaos) start(name string, change func(*chaosPlan)) *chaosChild {
	c.t.Helper()
	plan := c.plan
	plan.URL, plan.Dir, plan.Name = c.url, c.dir, name
	plan.Seed = c.random.Uint64()
	if change != nil {
		change(&plan)
	}
	text, err := json.Marshal(plan)
	require.NoError(c.t, err)
	program, err := os.Executable()
	require.NoError(c.t, err)
	child := &chaosChild{c: c, name: name, said: make(chan string, 16)}
	child.cmd = exec.Command(program, "-test.run=^TestChaosProcess$", "-test.timeout=10m")
	child.cmd.Env = append(os.Environ(), chaosVariable+"="+string(text))
	child.stdin, err = child.cmd.StdinPipe()
	require.NoError(c.t, err)
	out, err := child.cmd.StdoutPipe()
	require.NoError(c.t, err)
	errs := &bytes.Buffer{}
	child.cmd.Stderr = errs
	require.NoError(c.t, child.cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(child.said)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if word, ok := strings.CutPrefix(lines.Text(), chaosSays); ok {
				child.said <- word
			} else {
				fmt.Fprintln(&child.output, lines.Text())
			}
		}
		child.exit = child.cmd.Wait()
		_, _ = errs.WriteTo(&child.output)
	}()
	c.t.Cleanup(func() {
		_ = child.cmd.Process.Kill()
		for range child.said {
			// Nobody wants to hear it any more.
		}
		<-ended
	})
	c.running = append(c.running, child)
	return child
}

// hears waits until the process says the word, and returns the rest.
func (child *chaosChild) hears(word string) string {
	child.c.t.Helper()
	timer := time.NewTimer(3 * waiting)
	defer timer.Stop()
	for {
		select {
		case line, more := <-child.said:
			if !more {
				child.gone()
			}
			if first, rest, _ := strings.Cut(line, " "); first == word {
				return rest
			}
		case <-timer.C:
			require.Failf(child.c.t, "a process does not answer", "%s has not said %q", child.name, word)
		}
	}
}

// gone fails the test because the process has ended.
func (child *chaosChild) gone() {
	child.c.t.Helper()
	for range child.said {
		// It says no more; then it has ended.
	}
	require.Failf(child.c.t, "a process has ended", "%s: %v\n%s", child.name, child.exit, &child.output)
}

func (child *chaosChild) told(words ...any) {
	child.c.t.Helper()
	if _, err := fmt.Fprintln(child.stdin, words...); err != nil {
		child.gone()
	}
}

func (child *chaosChild) signal(s syscall.Signal) {
	child.c.t.Helper()
	require.NoError(child.c.t, child.cmd.Process.Signal(s))
}

// kill kills the process, and starts another one in its place.
func (c *chaos) kill(i int, name string) {
	c.t.Helper()
	child := c.running[i]
	child.killed = true
	require.NoError(c.t, child.cmd.Process.Kill())
	for range child.said {
		// It has nothing more to say; then it has ended.
	}
	c.kills++
	c.ended = append(c.ended, child)
	c.start(name, nil).hears(chaosReady)
	c.running[i] = c.running[len(c.running)-1]
	c.running = c.running[:len(c.running)-1]
}

// admin runs fn on a connection of the test's own, whatever it takes to get
// one.
func (c *chaos) admin(fn func(context.Context, *pgx.Conn) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.t.Context()), waiting)
	defer cancel()
	for {
		err := onConnection(ctx, c.url, fn)
		if err == nil {
			return
		}
		if ctx.Err() != nil || !transient(err) {
			require.NoError(c.t, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// chaosName is what connections of the test itself say of themselves.
const chaosName = "chaos itself"

func onConnection(ctx context.Context, url string, fn func(context.Context, *pgx.Conn) error) error {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return err
	}
	config.RuntimeParams["application_name"] = chaosName
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return fn(ctx, conn)
}

// terminate ends each of the processes' sessions with the probability.
func (c *chaos) terminate(probability float64) {
	c.t.Helper()
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		var n int
		err := conn.QueryRow(ctx, `SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
			SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
			AND application_name <> $1 AND random() < $2 OFFSET 0) a`, chaosName, probability).Scan(&n)
		c.terminated += n
		return err
	})
}

// terror ends sessions every now and then until the time is over.
func (c *chaos) terror(d time.Duration) {
	c.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Until(end), time.Duration(500+c.random.IntN(500))*time.Millisecond))
		c.terminate([]float64{0.2, 0.5, 1}[c.random.IntN(3)])
	}
}

func (c *chaos) restart() {
	c.t.Helper()
	c.server.Restart("immediate")
	c.restarts++
}

// look reads the claims that have come since the last look, and returns the
// last position that the process was told.
func (child *chaosChild) look() int64 {
	child.c.t.Helper()
	file, err := os.Open(filepath.Join(child.c.dir, child.name+claimsFile))
	require.NoError(child.c.t, err)
	defer file.Close()
	_, err = file.Seek(child.offset, io.SeekStart)
	require.NoError(child.c.t, err)
	text, err := io.ReadAll(file)
	require.NoError(child.c.t, err)
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	child.offset += int64(len(text))
	for line := range bytes.Lines(text) {
		var claim claim
		require.NoError(child.c.t, json.Unmarshal(line, &claim), "%s: %q", child.name, line)
		if claim.Outcome == claimAck {
			child.acked = max(child.acked, claim.Last)
		}
	}
	return child.acked
}

// freeze has the process stop while it has the log's lock, and returns when
// the others have gone on: when one was told of a position that did not exist
// when the process had stopped.
func (c *chaos) freeze(i int) time.Duration {
	c.t.Helper()
	child := c.running[i]
	var began time.Time
	for attempts := 1; ; attempts++ {
		child.told(chaosFreeze, "log")
		child.hears(chaosFreezing)
		began = time.Now()
		if c.locks(child) {
			break
		}
		// Its session had been ended just before, without its knowing yet.
		child.signal(syscall.SIGCONT)
		require.Less(c.t, attempts, 20, "%s never has the lock of the log when it is stopped", child.name)
	}
	var head int64 // nobody can have appended since
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT coalesce(max(position), 0) FROM deed.events").Scan(&head)
	})
	for {
		for j, other := range c.running {
			if j != i && other.look() > head {
				return time.Since(began)
			}
		}
		if time.Since(began) > 2*waiting {
			child.signal(syscall.SIGCONT)
			require.Fail(c.t, "nobody goes on", "a process was stopped %s ago while it had the lock of the log; the log ends at position %d", time.Since(began), head)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// locks reports whether the process has the lock of the log, or gets it from
// those who were before it.
func (c *chaos) locks(child *chaosChild) bool {
	c.t.Helper()
	text, err := os.ReadFile(filepath.Join(c.dir, child.name+portsFile))
	require.NoError(c.t, err)
	ports := strings.Fields(string(text))
	for last := time.Now(); time.Since(last) < 300*time.Millisecond; time.Sleep(time.Millisecond) {
		var granted, waiting int
		c.admin(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `SELECT count(*) FILTER (WHERE l.granted AND a.wait_event_type = 'Client'), count(*) FILTER (WHERE NOT l.granted)
				FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
				WHERE l.locktype = 'advisory' AND a.datname = current_database() AND a.client_port::text = ANY ($1)`, ports).Scan(&granted, &waiting)
		})
		if granted > 0 {
			return true
		}
		if waiting > 0 {
			last = time.Now()
		}
	}
	return false
}

// pause freezes a process, for as long as it takes the others to go on and for
// at least so long, with sessions being ended then.
func (c *chaos) pause(i int, d, bound time.Duration) {
	c.t.Helper()
	took := c.freeze(i)
	began := time.Now().Add(-took)
	c.others = append(c.others, took)
	if left := d - took; left > 0 {
		c.terror(left)
	}
	c.running[i].signal(syscall.SIGCONT)
	c.paused = append(c.paused, time.Since(began))
	require.LessOrEqual(c.t, took, bound, "while a process is stopped that has the lock, the others must go on within this time")
}

// plainReader follows the log with nothing but SQL: it asks for what is behind
// the last position that it has seen.
type plainReader struct {
	stop  chan struct{}
	done  sync.WaitGroup
	seen  []seenEvent
	jumps atomic.Int64 // over positions, so far
	last  error
}

func (c *chaos) read() {
	r := &plainReader{stop: make(chan struct{})}
	c.plain = r
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.t.Context()))
	c.t.Cleanup(func() { cancel(); r.done.Wait() })
	r.done.Go(func() {
		for ctx.Err() == nil {
			if r.last = onConnection(ctx, c.url, r.follow); r.last == nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
}

func (r *plainReader) follow(ctx context.Context, conn *pgx.Conn) error {
	for ctx.Err() == nil {
		stopped := false
		select {
		case <-r.stop:
			stopped = true // nothing is appended any more: this is the last look
		default:
		}
		after := int64(0)
		if n := len(r.seen); n > 0 {
			after = r.seen[n-1].position
		}
		rows, err := conn.Query(ctx, "SELECT position, id FROM deed.events WHERE position > $1 ORDER BY position", after)
		if err != nil {
			return err
		}
		var e seenEvent
		if _, err := pgx.ForEachRow(rows, []any{&e.position, &e.id}, func() error {
			if e.position != after+1 {
				r.jumps.Add(1)
			}
			after = e.position
			r.seen = append(r.seen, e)
			return nil
		}); err != nil {
			return err
		}
		if stopped {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return ctx.Err()
}

// finish stops the processes and gathers what is left of everything.
func (c *chaos) finish() *evidence {
	c.t.Helper()
	for _, child := range c.running {
		child.signal(syscall.SIGTERM)
	}
	for _, child := range c.running {
		child.hears(chaosDrained)
	}
	var head int64
	c.admin(func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, "SELECT coalesce(max(position), 0) FROM deed.events").Scan(&head)
	})
	for _, child := range c.running {
		child.told(chaosFinish, head)
		// One that has ended since was waited for, which closes this end, too.
		if err := child.stdin.Close(); !errors.Is(err, os.ErrClosed) {
			require.NoError(c.t, err)
		}
	}
	for _, child := range c.running {
		require.NoError(c.t, json.Unmarshal([]byte(child.hears(chaosDone)), &child.stats))
		for range child.said {
			// It says no more; then it has ended.
		}
		require.NoError(c.t, child.exit, "%s: %s", child.name, child.output.String())
	}
	close(c.plain.stop)
	c.plain.done.Wait()
	require.NoError(c.t, c.plain.last)

	ev := &evidence{sightings: []sighting{{who: "plain SQL", seen: c.plain.seen, whole: true}}}
	c.admin(func(ctx context.Context, conn *pgx.Conn) error { return exhume(ctx, conn, ev) })
	for _, child := range append(c.ended, c.running...) {
		said := testimony{process: child.name, killed: child.killed}
		text, err := os.ReadFile(filepath.Join(c.dir, child.name+claimsFile))
		require.NoError(c.t, err)
		lines := bytes.Split(text, []byte("\n"))
		for _, line := range lines[:len(lines)-1] {
			var claim claim
			require.NoError(c.t, json.Unmarshal(line, &claim), "%s: %q", child.name, line)
			said.claims = append(said.claims, claim)
		}
		ev.processes = append(ev.processes, said)
		for _, reader := range []string{"all", "some", "middle"} {
			s := sighting{who: child.name + "." + reader, whole: !child.killed}
			if reader == "some" {
				s.only = isSome
			}
			file, err := os.ReadFile(filepath.Join(c.dir, child.name+"."+reader+seenFile))
			require.NoError(c.t, err)
			s.after, s.seen = parseSeen(file)
			ev.sightings = append(ev.sightings, s)
		}
	}
	return ev
}

// summary says what has happened.
func (c *chaos) summary(ev *evidence) string {
	acked, duplicates, again, resolved := 0, 0, 0, map[string]int{}
	refused := map[string]int{}
	cut, lost := 0, 0
	for _, p := range ev.processes {
		for i := range p.claims {
			c := &p.claims[i]
			cut, lost = cut+c.Cut, lost+c.Lost
			switch c.Outcome {
			case claimAck:
				acked++
				if c.Resolved != "" {
					resolved[c.Resolved]++
				}
			case claimDuplicate:
				duplicates++
			case claimAgain:
				again++
			case claimRefused:
				refused[c.Why]++
			}
		}
	}
	seen := 0
	for i := range ev.sightings {
		seen += len(ev.sightings[i].seen)
	}
	var stats Stats
	for _, child := range c.running {
		stats = addStats(stats, child.stats)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d commits acknowledged, %d events, %d keys; %d duplicates of other writers' keys, %d of own ones\n", acked, len(ev.log), len(ev.keys), duplicates, again)
	fmt.Fprintf(&b, "refused: %v\n", refused)
	fmt.Fprintf(&b, "%d unknown outcomes because of a deadline and %d because the database was away, resolved; commits that were found so: %v\n", cut, lost, resolved)
	fmt.Fprintf(&b, "%d sessions ended, %d crashes of the server, %d processes killed\n", c.terminated, c.restarts, c.kills)
	fmt.Fprintf(&b, "%d readers saw %d events\n", len(ev.sightings), seen)
	if len(c.paused) > 0 {
		fmt.Fprintf(&b, "processes that had the lock were stopped for %v; the others went on after %v\n", c.paused, c.others)
	}
	fmt.Fprintf(&b, "stats, summed: %+v", stats)
	return b.String()
}

// Three processes append and read as differently as they can, while their
// sessions are ended all the time, the server crashes, one process is stopped
// with the log's lock in its hands, and one is killed. Then the log, read with
// plain SQL, must be what everybody was told.
func TestChaos(t *testing.T) {
	writers := 6
	if long() {
		writers = 16
	} else {
		t.Parallel()
	}
	c := newChaos(t, chaosPlan{Writers: writers, Patience: 30 * time.Second}, nil)
	c.start("a", nil)
	c.start("b", func(p *chaosPlan) { p.Mixed, p.Cuts, p.Patience = true, 60, 2*time.Second })
	c.start("c", func(p *chaosPlan) { p.Mixed, p.Cuts, p.Patience = true, 60, 50*time.Millisecond })
	for _, child := range c.running {
		child.hears(chaosReady)
	}
	c.read()
	began := time.Now()
	if long() {
		c.terror(time.Duration(5000+c.random.IntN(6000)) * time.Millisecond)
		c.restart()
		c.terror(5 * time.Second)
		// The lock is waited for 3 seconds, or twice, then its holder is ended and
		// everybody appends what has gathered.
		const goesOn = 12 * time.Second
		c.pause(1+c.random.IntN(2), 10*time.Second, goesOn)
		c.terror(5 * time.Second)
		c.kill(0, "a2")
		c.terror(time.Duration(5000+c.random.IntN(6000)) * time.Millisecond)
		c.restart()
		c.terror(5 * time.Second)
		c.pause(1+c.random.IntN(2), 0, goesOn)
		c.terror(max(5*time.Second, time.Minute-time.Since(began)))
	} else {
		c.terror(time.Second)
		c.restart()
		c.terror(time.Second)
		c.pause(1+c.random.IntN(2), 0, waiting) // how long it takes is for machines with nothing else to do
		c.kill(0, "a2")
		c.terror(time.Second)
	}
	ev := c.finish()
	t.Log(c.summary(ev))
	require.Positive(t, c.terminated)
	require.NotEmpty(t, ev.log)
	if long() {
		require.Equal(t, 2, c.restarts)
		require.GreaterOrEqual(t, time.Since(began), time.Minute)
	}
	requireSound(t, ev)
}

func requireSound(t testing.TB, ev *evidence) {
	t.Helper()
	if found := ev.judge(); len(found) > 0 {
		require.Fail(t, "the log is not what everybody was told", report(found))
	}
}

// without returns the schema's steps without the log's lock.
func without(t testing.TB) []Migration {
	steps := Migrations()
	const lock = "  PERFORM pg_advisory_xact_lock(lock);\n"
	require.Equal(t, 2, strings.Count(steps[0].SQL, lock), "the lock in lock_log and in append_events")
	steps[0].SQL = strings.ReplaceAll(steps[0].SQL, lock, "")
	return steps
}

func shorter() time.Duration {
	if long() {
		return 8 * time.Second
	}
	return 3 * time.Second
}

// Were positions given by a sequence, as they are elsewhere, the checks of the
// chaos would say so: readers go past events that are committed late, and what
// is rolled back leaves holes.
func TestChaos_NoticesSequencePositions(t *testing.T) {
	t.Parallel()
	n := map[string]int{}
	for range 3 { // on a machine that is busy readers may be too slow to go past anything
		n = sequencePositions(t)
		require.NotZero(t, n[foundHole], "holes")
		if n[foundSkipped] > 0 {
			break
		}
	}
	require.NotZero(t, n[foundSkipped], "events that a reader went past")
}

func sequencePositions(t *testing.T) map[string]int {
	steps := without(t)
	steps[0].SQL += `
		CREATE SEQUENCE {schema}.positions;
		CREATE FUNCTION {schema}.give_position() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			NEW.position := nextval('{schema}.positions');
			RETURN NEW;
		END $$;
		CREATE TRIGGER give_position BEFORE INSERT ON {schema}.events FOR EACH ROW EXECUTE FUNCTION {schema}.give_position();`
	c := newChaos(t, chaosPlan{Writers: 6, Patience: 30 * time.Second, Unlocked: true, Keyless: true, Careless: true}, steps)
	// A process alone gets far enough; then one that meets a hole does not look
	// back to it when it is opened anew.
	alone := c.start("a", nil)
	alone.hears(chaosReady)
	c.read()
	eventually(t, func() bool { return alone.look() > 2*mostDelta }, "one process alone does not get on")
	for _, name := range []string{"b", "c"} {
		c.start(name, nil)
	}
	for _, child := range c.running[1:] {
		child.hears(chaosReady)
	}
	// On a machine that is busy it may take longer until it has gone wrong.
	holes := int64(0)
	for began, settled := time.Now(), int64(0); time.Since(began) < waiting && (time.Since(began) < shorter() || holes == 0 || c.plain.jumps.Load() == 0); {
		time.Sleep(500 * time.Millisecond)
		c.admin(func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, "SELECT $1 - count(*) FILTER (WHERE position <= $1), coalesce(max(position), 0) FROM deed.events", settled).Scan(&holes, &settled)
		})
	}
	ev := c.finish()
	t.Log(c.summary(ev))
	found := ev.judge()
	t.Logf("found: %s", report(found))
	return findings(found)
}

// Without the lock alone, the positions that writers give themselves collide
// on the primary key: they are in each other's way, and nothing else happens.
func TestChaos_WithoutLockWritersCollide(t *testing.T) {
	t.Parallel()
	collisions := func(t *testing.T, plan chaosPlan, steps []Migration, d time.Duration) (n uint64) {
		plan.Writers, plan.Patience, plan.Keyless = 6, 30*time.Second, true // used keys collide, too
		c := newChaos(t, plan, steps)
		for _, name := range []string{"a", "b", "c"} {
			c.start(name, func(p *chaosPlan) { p.Mixed = name != "a" })
		}
		for _, child := range c.running {
			child.hears(chaosReady)
		}
		c.read()
		time.Sleep(d)
		ev := c.finish()
		t.Log(c.summary(ev))
		requireSound(t, ev)
		for _, child := range c.running {
			n += child.stats.Collisions
		}
		return n
	}
	t.Run("WithLock", func(t *testing.T) {
		t.Parallel()
		require.Zero(t, collisions(t, chaosPlan{}, nil, time.Second), "batches that met a position that was taken")
	})
	t.Run("WithoutLock", func(t *testing.T) {
		t.Parallel()
		require.NotZero(t, collisions(t, chaosPlan{Unlocked: true}, without(t), shorter()), "batches that met a position that was taken")
	})
}
