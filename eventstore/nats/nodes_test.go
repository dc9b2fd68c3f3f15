//go:build unix

package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/internal/natsserver"
	"github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/saga"
)

// nodeVariable makes the test binary a node: URL, stream, directory, name.
const nodeVariable = "DEED_NATS_NODE"

func init() {
	if plan := os.Getenv(nodeVariable); plan != "" {
		var p nodePlan
		if err := errors.Join(json.Unmarshal([]byte(plan), &p), p.run()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

type nodePlan struct{ URL, Stream, Directory, Name string }

// note appends a line to the node's file, in one write, so that it is there when
// the process is killed.
func (p nodePlan) note(format string, a ...any) {
	f, err := os.OpenFile(filepath.Join(p.Directory, p.Name+".notes"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintf(f, "%d %s\n", time.Now().UnixNano(), fmt.Sprintf(format, a...))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		panic(err)
	}
}

// work is the saga: steps that must not be done twice, and one that is told apart
// by its key.
func (p nodePlan) work() *saga.Definition[int, string] {
	return saga.Define("work", func(s *saga.Run, n int) (string, error) {
		for i := range 3 {
			_, err := saga.Once(s, fmt.Sprint("once ", i), func(step saga.Step) (int, error) {
				p.note("once %s", step.IdempotencyKey())
				return i, nil
			})
			if err != nil && !errors.Is(err, saga.ErrOutcomeUnknown) {
				return "", err
			}
			_, err = saga.Do(s, fmt.Sprint("do ", i), func(step saga.Step) (int, error) {
				p.note("do %s", step.IdempotencyKey())
				return i, nil
			})
			if err != nil {
				return "", err
			}
			if err := s.Sleep(fmt.Sprint("pause ", i), time.Duration(50+n%7*20)*time.Millisecond); err != nil {
				return "", err
			}
		}
		return "done", nil
	})
}

// run is a node, with a state of its own.
func (p nodePlan) run() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	state, err := sqlite.Open(ctx, filepath.Join(p.Directory, p.Name+".db"))
	if err != nil {
		return err
	}
	defer func() { _ = state.Close() }()
	out, err := os.Create(filepath.Join(p.Directory, p.Name+".log"))
	if err != nil {
		return err
	}
	logger := slog.New(slog.NewTextHandler(out, nil))
	app, err := deed.Start(ctx, URL(p.URL, Stream(p.Stream), Logger(logger)), deed.State(state), deed.Leases(Leases), deed.Logger(logger), p.work())
	if err != nil {
		return err
	}
	p.note("ready")
	<-ctx.Done()
	stop, done := context.WithTimeout(context.Background(), 20*time.Second)
	defer done()
	return app.Stop(stop)
}

type natsNode struct {
	nodePlan
	t    *testing.T
	cmd  *exec.Cmd
	exit chan struct{}
	err  error
}

func (p nodePlan) start(t *testing.T) *natsNode {
	t.Helper()
	plan, err := json.Marshal(p)
	require.NoError(t, err)
	n := &natsNode{nodePlan: p, t: t, cmd: exec.Command(os.Args[0]), exit: make(chan struct{})}
	n.cmd.Env = append(os.Environ(), nodeVariable+"="+string(plan))
	n.cmd.Stderr = os.Stderr
	require.NoError(t, n.cmd.Start())
	go func() { defer close(n.exit); n.err = n.cmd.Wait() }()
	t.Cleanup(func() { _ = n.cmd.Process.Kill(); <-n.exit })
	require.Eventually(t, func() bool { return len(n.notes("ready")) > 0 }, time.Minute, 5*time.Millisecond, "%s does not start", p.Name)
	return n
}

// notes returns when the node has noted what begins like this, by the rest.
func (p nodePlan) notes(kind string) map[string][]time.Time {
	data, _ := os.ReadFile(filepath.Join(p.Directory, p.Name+".notes"))
	all := map[string][]time.Time{}
	for line := range strings.Lines(string(data)) {
		var at int64
		stamp, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		_, _ = fmt.Sscan(stamp, &at)
		if is, rest, _ := strings.Cut(rest, " "); is == kind {
			all[rest] = append(all[rest], time.Unix(0, at))
		}
	}
	return all
}

// Processes that share the log and nothing else are killed, stopped for longer
// than a lease lasts, and told to end: every run ends, no step that must not be
// done twice is, and the work is taken over in time.
func TestNodes_OwnStates(t *testing.T) {
	t.Parallel()
	long := os.Getenv("DEED_TEST_LONG") != ""
	c, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	dir, stream := t.TempDir(), newName()
	url := c.URL()
	log := reopenLog(t, c, stream)
	admin, err := Leases(log)
	require.NoError(t, err)
	all := []nodePlan{}
	var alive []*natsNode
	join := func() {
		p := nodePlan{url, stream, dir, fmt.Sprint("n", len(all)+1)}
		all = append(all, p)
		alive = append(alive, p.start(t))
	}
	runs := 0
	begin := func() {
		runs++
		engine := saga.NewEngine(log, nil, nil, saga.Options{})
		require.NoError(t, saga.Start(t.Context(), engine, nodePlan{}.work(), fmt.Sprint(runs), runs))
	}
	// traffic starts runs until somebody other than not has done a step since then, and
	// returns who, and when it was.
	traffic := func(not *natsNode, since time.Time) (*natsNode, time.Time) {
		t.Helper()
		for {
			begin()
			for _, n := range alive {
				if n == not {
					continue
				}
				var first time.Time
				for _, at := range slices.Concat(slices.Collect(maps.Values(n.notes("once")))...) {
					if at.After(since) && (first.IsZero() || at.Before(first)) {
						first = at
					}
				}
				if !first.IsZero() {
					return n, first
				}
			}
			require.Less(t, time.Since(since), time.Minute, "nobody works")
			wait, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			<-wait.Done()
			cancel()
		}
	}
	forget := func(n *natsNode) { alive = slices.DeleteFunc(alive, func(o *natsNode) bool { return o == n }) }
	join()
	join()
	owner, _ := traffic(nil, time.Now())

	l := admin.(*leases)
	// leased waits until somebody else has the lease.
	leased := func(was current) time.Time {
		t.Helper()
		require.Eventually(t, func() bool {
			is, err := l.look(t.Context(), "saga work")
			return err == nil && is.held && is.Epoch != was.Epoch
		}, time.Minute, 2*time.Millisecond, "nobody has the lease")
		return time.Now()
	}
	// steady waits until one node alone has worked for a second, and says what it has.
	steady := func() current {
		t.Helper()
		for began := time.Now(); ; {
			since := time.Now()
			for time.Since(since) < time.Second {
				traffic(nil, time.Now())
			}
			var busy []*natsNode
			for _, n := range alive {
				if slices.ContainsFunc(slices.Concat(slices.Collect(maps.Values(n.notes("once")))...), since.Before) {
					busy = append(busy, n)
				}
			}
			if is, err := l.look(t.Context(), "saga work"); err == nil && is.held && len(busy) == 1 {
				owner = busy[0]
				return is
			}
			require.Less(t, time.Since(began), time.Minute, "more than one node works")
		}
	}
	retire := func() {
		was := steady()
		began := time.Now()
		require.NoError(t, owner.cmd.Process.Signal(syscall.SIGTERM))
		handed := leased(was)
		heir, at := traffic(owner, handed)
		t.Logf("after SIGTERM: the lease after %v, the first step after %v", handed.Sub(began).Round(time.Millisecond), at.Sub(began).Round(time.Millisecond))
		<-owner.exit
		require.NoError(t, owner.err)
		forget(owner)
		owner = heir
	}
	murder := func() {
		steady()
		began := time.Now()
		require.NoError(t, owner.cmd.Process.Kill())
		forget(owner)
		heir, at := traffic(nil, began)
		t.Logf("after SIGKILL: %v", at.Sub(began).Round(time.Millisecond))
		require.Less(t, at.Sub(began), 12*time.Second)
		owner = heir
	}
	suspend := func() {
		steady()
		began := time.Now()
		require.NoError(t, owner.cmd.Process.Signal(syscall.SIGSTOP))
		heir, at := traffic(owner, began)
		t.Logf("after SIGSTOP: %v", at.Sub(began).Round(time.Millisecond))
		require.Less(t, at.Sub(began), 12*time.Second)
		woken := time.Now()
		require.NoError(t, owner.cmd.Process.Signal(syscall.SIGCONT))
		traffic(owner, woken) // the heir goes on
		owner = heir
	}
	retire()
	join()
	if long {
		for range 3 {
			suspend()
			murder()
			join()
			retire()
			join()
		}
	} else {
		// Without waiting for the lease to end: it is taken away.
		began := time.Now()
		require.NoError(t, owner.cmd.Process.Signal(syscall.SIGSTOP))
		require.Eventually(t, func() bool {
			is, err := l.look(t.Context(), "saga work")
			return err == nil && (!is.held || l.Release(t.Context(), ownership.Lease{Name: is.Name, Owner: is.Owner, Epoch: is.Epoch, Revision: is.revision}) == nil)
		}, time.Minute, 5*time.Millisecond)
		members, err := l.Members(t.Context())
		require.NoError(t, err)
		for _, m := range members {
			require.NoError(t, l.Leave(t.Context(), m.Name))
		}
		heir, at := traffic(owner, began)
		t.Logf("after SIGSTOP, its lease taken away: %v", at.Sub(began).Round(time.Millisecond))
		require.NoError(t, owner.cmd.Process.Signal(syscall.SIGCONT))
		traffic(owner, time.Now())
		owner = heir
	}

	// Every run ends, with nobody to look after it but those that are left.
	engine := saga.NewEngine(log, nil, nil, saga.Options{})
	for n := range runs {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		out, err := saga.Wait(ctx, engine, nodePlan{}.work(), fmt.Sprint(n+1))
		cancel()
		require.NoError(t, err, "run %d of %d", n+1, runs)
		require.Equal(t, "done", out)
	}
	onces, dos := map[string]int{}, map[string]int{}
	for _, p := range all {
		for key, at := range p.notes("once") {
			onces[key] += len(at)
		}
		for key, at := range p.notes("do") {
			dos[key] += len(at)
		}
	}
	again := 0
	for _, n := range dos {
		again += n - 1
	}
	require.Len(t, dos, 3*runs, "a Do has a key of its own, the same each time")
	for key, n := range onces {
		require.Equal(t, 1, n, "%s", key)
	}
	t.Logf("%d runs, %d of %d steps were done once at most, %d of %d others were done again", runs, len(onces), 3*runs, again, 3*runs)
	for _, n := range alive {
		require.NoError(t, n.cmd.Process.Signal(syscall.SIGTERM))
		<-n.exit
		require.NoError(t, n.err)
	}
}
