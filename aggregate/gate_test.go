package aggregate_test

import (
	"context"
	"iter"
	"log/slog"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/memory"
)

// gate is a memory store whose commits wait until the test says what becomes
// of them.
type gate struct {
	*memory.Store
	held chan *heldCommit
	// beforeRead, if set, runs before each read.
	beforeRead func(ctx context.Context) error
}

type heldCommit struct {
	eventstore.Commit
	store   *memory.Store
	resolve func(eventstore.Receipt, error)
}

func (g *gate) Enqueue(_ context.Context, c eventstore.Commit) *eventstore.Pending {
	p, resolve := eventstore.NewPending()
	g.held <- &heldCommit{c, g.Store, resolve}
	return p
}

func (g *gate) Read(ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) iter.Seq2[eventstore.Recorded, error] {
	return func(yield func(eventstore.Recorded, error) bool) {
		if g.beforeRead != nil {
			if err := g.beforeRead(ctx); err != nil {
				yield(eventstore.Recorded{}, err)
				return
			}
		}
		for r, err := range g.Store.Read(ctx, q, o) {
			if !yield(r, err) {
				return
			}
		}
	}
}

// next returns the oldest commit that waits.
func (g *gate) next(t *testing.T) *heldCommit {
	t.Helper()
	synctest.Wait()
	select {
	case c := <-g.held:
		return c
	default:
		require.FailNow(t, "no commit is on its way")
		return nil
	}
}

// held0 returns the oldest commit that waits, and lets it pass.
func (g *gate) held0(t *testing.T) *heldCommit {
	t.Helper()
	c := g.next(t)
	g.held <- c
	return c
}

func (g *gate) none(t *testing.T) {
	t.Helper()
	synctest.Wait()
	require.Empty(t, g.held, "commits on their way")
}

// pass lets every commit through until no more come.
func (g *gate) pass() {
	for {
		synctest.Wait()
		select {
		case c := <-g.held:
			c.release()
		default:
			return
		}
	}
}

// release lets the commit be judged and written.
func (c *heldCommit) release() {
	c.resolve(c.store.Append(context.Background(), c.Commit))
}

func (c *heldCommit) fail(err error) { c.resolve(eventstore.Receipt{}, err) }

// lose writes the commit, but its outcome does not come back.
func (c *heldCommit) lose() {
	_, _ = c.store.Append(context.Background(), c.Commit)
	c.fail(eventstore.ErrOutcomeUnknown)
}

// running is an Execute that may be under way.
type running struct {
	cancel  context.CancelFunc
	decided int // times Decide ran
	done    bool
	receipt eventstore.Receipt
	err     error
}

func start(t *testing.T, r *aggregate.Runtime, req aggregate.Request[account]) *running {
	t.Helper()
	return startOf(t, r, accounts, req)
}

// startOf calls Execute and returns when everybody waits for something.
func startOf[S any](t *testing.T, r *aggregate.Runtime, def *aggregate.Definition[S], req aggregate.Request[S]) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c := &running{cancel: cancel}
	decide := req.Decide
	req.Decide = func(s S) ([]aggregate.Event, error) {
		c.decided++
		return decide(s)
	}
	go func() {
		c.receipt, c.err = aggregate.Execute(ctx, r, def, req)
		c.done = true
	}()
	synctest.Wait()
	return c
}

func (c *running) waits(t *testing.T, why string) {
	t.Helper()
	synctest.Wait()
	require.False(t, c.done, "answered too early: %s (receipt %+v, error %v)", why, c.receipt, c.err)
}

func (c *running) succeeds(t *testing.T) eventstore.Receipt {
	t.Helper()
	synctest.Wait()
	require.True(t, c.done, "not answered")
	require.NoError(t, c.err)
	return c.receipt
}

func (c *running) fails(t *testing.T, target error) {
	t.Helper()
	synctest.Wait()
	require.True(t, c.done, "not answered")
	require.ErrorIs(t, c.err, target)
}

// gated runs the test in a bubble, where waiting until nothing moves needs no
// sleeping.
func gated(t *testing.T, o aggregate.Options, test func(t *testing.T, g *gate, r *aggregate.Runtime)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := &gate{Store: memory.New(), held: make(chan *heldCommit, 1000)}
		if o.Logger == nil {
			o.Logger = slog.New(slog.DiscardHandler)
		}
		r := aggregate.NewRuntime(g, o)
		defer func() {
			g.pass()
			if t.Failed() {
				ended, cancel := context.WithCancel(context.Background())
				cancel()
				_ = r.Stop(ended) // nothing may stay behind in the bubble
				return
			}
			require.NoError(t, r.Stop(t.Context()))
			require.NoError(t, g.Close())
		}()
		test(t, g, r)
	})
}

var ann = eventstore.Stream{Category: "account", ID: "ann"}

// foreign writes one deposit to ann past the runtime.
func (g *gate) foreign(t *testing.T, cents int64) {
	t.Helper()
	e, err := accounts.Encode(nil, ann, deposited{Cents: cents}, eventstore.Metadata{Actor: "foreign"}, t0)
	require.NoError(t, err)
	_, err = g.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{e}})
	require.NoError(t, err)
}

// history returns the data of ann's events.
func (g *gate) history(t *testing.T) []string {
	t.Helper()
	var all []string
	for r, err := range g.Store.Read(t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		all = append(all, r.Type+string(r.Data))
	}
	return all
}
